"""What the scripts share: how they fail, names, rows, outputs that appear whole or not at all."""

import contextlib
import fcntl
import filecmp
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
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
    lines = [f"error: {' '.join(what.split())[:500]}", *(f"FIX: {fix}" for fix in fixes)]
    print(visible("\n".join(lines)), file=sys.stderr)
    sys.exit(code)


def warn(what, *fixes):
    """Print what a person should know, and go on."""
    lines = [f"warning: {' '.join(what.split())}", *(f"FIX: {fix}" for fix in fixes)]
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


def need(file, variable, command):
    """Refuse a folder without its file; the fixes are the command, and the folders that have it.

    need(Path("models/base/gemma/config.json"), "MODEL", "hf download …")
    """
    finish_move(file.parent)
    if file.is_file():
        return
    others = sorted(path.parent.name for path in file.parent.parent.glob(f"*/{file.name}"))
    exports = [f"export {variable}={name}" for name in others if re.fullmatch(NAME, name)]
    fail(f"there is no {file}", command, *exports)


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


# ---- how fast to learn ---------------------------------------------------------------------------
def learning_rate(hidden):
    """Return the learning rate for a hidden size: 2e-4 for 640, 3.8e-5 for 5376.

    2e-4 was best in tests/benchmarks/README.md. The exponent is the one that Schulman et al. (LoRA
    Without Regret, 2025) found for Llama.
    """
    return 2e-4 * (640 / hidden) ** 0.78


# ---- what was made from what ---------------------------------------------------------------------
def checksum(path):
    """Return the SHA-256 of a file, '' if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def checksums_of_data(version):
    """Return the lines of an adapter's `settings` that tell its data: {"TRAIN_SHA256": "3b0c…"}."""
    data = Path("data/for_train", version)
    return {
        f"{name.upper()}_SHA256": checksum(data / f"{name}.jsonl") for name in ("train", "valid")
    }


def settings_of(adapter):
    """Return how an adapter was trained, {"ITERS": "600", …}, from its file `settings`."""
    file = adapter / "settings"
    lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
    return dict(line.split("=", 1) for line in lines if "=" in line)


def data_changed(version, adapter):
    """Say whether the data, and so window, names and author, may differ from what was trained."""
    trained = settings_of(adapter)
    return any(
        now and trained.get(name, now) != now for name, now in checksums_of_data(version).items()
    )


def is_stale(adapter, fused):
    """Say whether the fused model was made from another adapter than the one there now."""
    try:
        made_from = json.loads((fused / "fused_from.json").read_bytes())["adapter_sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    return checksum(adapter / "adapters.safetensors") not in ("", made_from)


def warn_of_changes(version, adapter, fused, run):
    """Return what does not belong together any more, [(sentence, command)], and print it."""
    found = []
    if data_changed(version, adapter):
        found.append(("the data are not those of the training", f"{run} ./fine_tune.sh"))
    if is_stale(adapter, fused):
        found.append((f"{fused} was made from another adapter", f"{run} ./fuse.sh"))
    for warning in found:
        warn(*warning)
    return found


def checkpoints(work):
    """Return {batch: file} of the checkpoints of a training, in the order of time."""
    return {int(file.stem): file for file in sorted(work.glob("0*.safetensors"))}


# ---- outputs appear whole or not at all ----------------------------------------------------------
def beside(folder, word):
    """Return models/fused/.fused-v1_gemma.partial and the like: no VERSION begins with a dot.

    An output may be a link to another disk: the work is done beside its target.
    """
    target = Path(os.path.realpath(folder))
    return target.with_name(f".{target.name}.{word}")


@contextlib.contextmanager
def work_folder(output):
    """Give an empty folder beside an output, for a run of seconds; a second run waits its turn.

    What a killed run has left in it goes with the next run.
    """
    work = beside(output, "work")
    work.parent.mkdir(parents=True, exist_ok=True)
    with beside(output, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # it ends with the process, however that ends
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def is_same(new, old):
    """Say whether two folders hold the same files."""
    names = sorted(path.name for path in new.iterdir())
    if names != sorted(path.name for path in old.iterdir()):
        return False
    return not any(filecmp.cmpfiles(new, old, names, shallow=False)[1:])


def link(source, target):
    """Make one file two, without a copy where the disk can: an exFAT disk knows no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def carry_over(old, new, ours):
    """Put into the new folder what a person has put into the old one."""
    written = {path.name for pattern in ours for path in old.glob(pattern)}
    for path in old.iterdir():
        if path.name in written or (new / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, copy_function=link, symlinks=True)
        else:
            link(path, new / path.name)


def before(folder):
    """Return where the output of before is kept: models/fused/fused-v1_gemma.before."""
    target = Path(os.path.realpath(folder))
    return target.with_name(f"{target.name}.before")


def into_place(new, folder, ours):
    """Put a finished folder into its place; return where the one of before is, None if nowhere.

    `ours` are the files that scripts write there ("*.jsonl", …): all others are a person's own.
    Killed at any moment this leaves the folder of before or the new one; see finish_move().
    """
    folder = Path(os.path.realpath(folder))
    finish_move(folder)  # of a run that was killed
    if folder.exists() and is_same(new, folder):
        shutil.rmtree(new)
        return None
    if folder.exists():
        carry_over(folder, new, ours)
    was_there = folder.exists()
    new.rename(beside(folder, "new"))
    finish_move(folder)
    if not was_there:
        return None
    kept, here = before(folder), Path.cwd()
    return kept.relative_to(here) if kept.is_relative_to(here) else kept


def finish_move(folder):
    """Do the last two renames, also those of a run that was killed between them.

    v1 → v1.before, .v1.new → v1
    """
    folder = Path(os.path.realpath(folder))
    new = beside(folder, "new")
    if not new.exists():
        return
    with contextlib.suppress(FileNotFoundError):  # another script has just done it
        if folder.exists():
            shutil.rmtree(before(folder), ignore_errors=True)
            folder.rename(before(folder))
        new.rename(folder)
