"""What the scripts share: how they fail, names, rows, what was made from what."""

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unicodedata import category

ROOT = Path(__file__).resolve().parent.parent
NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"  # what VERSION and MODEL can be: one folder, no hidden one
DEFAULTS = {"VERSION": "v1", "MODEL": "gemma-3-text-27b-it-4bit"}


# ---- what a person sees --------------------------------------------------------------------------
HIDDEN = "Cc", "Cf", "Cs", "Zl", "Zp"  # control, format, surrogate, separators of lines
FINE = {"\n", "\u200c", "\u200d", *map(chr, range(0xE0020, 0xE0080))}  # what emoji are joined with


def visible(text):
    r"""Return text that can only be read: chats and base models may hold terminal escapes.

    Control, bidirectional and surrogate characters come out as \x1b and the like. Emoji stay, with
    what joins them, and also those that this Python does not know yet.
    """
    return "".join(
        c.encode("unicode_escape").decode() if category(c) in HIDDEN and c not in FINE else c
        for c in text
    )


def fail(what, *fixes, code=1):
    """End the script: a line that says what is wrong, and a line for each way to mend it.

    A fix is a command that can be pasted as it stands; a remark stands behind a "#".
    """
    warn(what, *fixes, kind="error")
    sys.exit(code)


def warn(what, *fixes, kind="warning"):
    """Print what a person should know, and go on."""
    lines = [f"{kind}: {' '.join(what.split())[:500]}", *(f"FIX: {fix}" for fix in fixes)]
    print(visible("\n".join(lines)), file=sys.stderr)


# ---- VERSION and MODEL, and what they name -------------------------------------------------------
def from_environment(variable):
    """Return VERSION or MODEL: the variable, or its default."""
    return os.environ.get(variable, DEFAULTS[variable])


def check_names(version, model):
    """Refuse a VERSION or MODEL that is no name of a folder."""
    for variable, name in ("VERSION", version), ("MODEL", model):
        if not re.fullmatch(NAME, name):
            what = f"{variable}={name!a} is not made of letters, digits, '.', '_' and '-'"
            fail(what, f"export {variable}={DEFAULTS[variable]}")


def download(model):
    """Return the command that makes models/base/MODEL."""
    if model.startswith("tiny-gemma-3"):
        bits = re.search(r"-(\d)bit$", model)
        return "python tests/tiny_base.py" + (f" --bits {bits[1]}" if bits else "")
    return f"hf download mlx-community/{model} --local-dir models/base/{model}"


def rerun(script, **settings):
    """Return the command that runs a script again, for the same names and with other settings.

    rerun("./fine_tune.sh", BATCH_SIZE=1) → "VERSION=v1 MODEL=gemma BATCH_SIZE=1 ./fine_tune.sh"
    """
    names = {name: from_environment(name) for name in DEFAULTS}
    return " ".join([*(f"{name}={value}" for name, value in (names | settings).items()), script])


# ---- rows of the training data -------------------------------------------------------------------
def chat_of(row):
    """Return a row of the data as a chat; ValueError, LookupError or TypeError if it is none.

    {"prompt": "hi", "completion": "ho"} and {"messages": […]} → [{"role": …, "content": …}, …]
    """
    chat = row.get("messages") or [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    for turn in chat:
        (turn["role"] + turn["content"]).encode()  # texts, without lone surrogates
    return chat


def read_rows(path, command):
    """Return the rows of a .jsonl file as chats; `command` makes the file anew."""
    chats = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            chats.append(chat_of(json.loads(line)))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            fail(f"{path}, line {number}: {error!r}", command)
    return chats


# What data/prompt.py, data/transcript.py and models/chat.py need of it.
HOW_MADE = ["shape", "names", "authors", "prompt", "question_prompt", "window"]
HOW_MADE += ["max_context_chars", "max_seq_length"]


def read_settings(path, command):
    """Return how the rows were made, s.window and so on, from the settings.json beside them."""
    try:
        settings = json.loads(path.read_bytes())
        missing = [name for name in HOW_MADE if name not in settings]
    except (ValueError, TypeError) as error:
        fail(f"{path}: {error!r}", command)
    if missing:
        fail(f"{path} lacks {', '.join(missing)}", command)
    return SimpleNamespace(**settings)


# ---- how fast to learn ---------------------------------------------------------------------------
def learning_rate(hidden):
    """Return the learning rate for a hidden size: 2e-4 for 640, 3.8e-5 for 5376.

    2e-4 was best in tests/benchmarks/README.md. The exponent is the one that Schulman et al. (LoRA
    Without Regret, 2025) found for Llama.
    """
    return 2e-4 * (640 / hidden) ** 0.78


def lower_rate(rate):
    """Return a third of a learning rate: "3e-4" → 0.0001."""
    return float(f"{float(rate) / 3:.1e}")


# ---- what was made from what ---------------------------------------------------------------------
def checksum(path):
    """Return the SHA-256 of a file, '' if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def settings_of(adapter):
    """Return how an adapter was trained, {"ITERS": "600", …}, from its file `settings`."""
    file = adapter / "settings"
    lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
    return dict(line.split("=", 1) for line in lines if "=" in line)


def data_changed(data, adapter):
    """Say whether the data, and so window, names and author, may differ from what was trained."""
    settings = settings_of(adapter)
    for name in "train", "valid":
        then, now = settings.get(f"{name.upper()}_SHA256"), checksum(data / f"{name}.jsonl")
        if then and now and then != now:
            return True
    return False


def is_stale(adapter, fused):
    """Say whether the fused model was made from another adapter than the one there now."""
    file = fused / "fused_from.json"
    if not file.is_file():
        return False
    made_from = json.loads(file.read_bytes())["adapter_sha256"]
    return checksum(adapter / "adapters.safetensors") not in ("", made_from)


def warn_of_changes(at):
    """Print what no longer belongs together of folders.places(); return [(sentence, command)]."""
    found = []
    if data_changed(at.data, at.adapter):
        found.append(("the data are not those of the training", f"{at.run} ./fine_tune.sh"))
    if is_stale(at.adapter, at.fused):
        found.append((f"{at.fused} was made from another adapter", f"{at.run} ./fuse.sh"))
    for warning in found:
        warn(*warning)
    return found


def checkpoints(work):
    """Return {iteration: file} of the checkpoints of a training, in the order of time."""
    return {int(file.stem): file for file in sorted(work.glob("0*.safetensors"))}
