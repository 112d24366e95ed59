"""Talk to the model that was trained, in the terminal.

    python models/chat.py                       # it replies as the author that was learned
    python models/chat.py --as ann --me bob     # as another one of the chat, under your own name
    echo "are you there?" | python models/chat.py

Enter sends a line; a backslash at its end begins another line of the same message. Arrow up brings
back what was typed. Ctrl-C stops a reply, Ctrl-D ends the talk. Nothing of it is stored.

Reads   data/for_train/${VERSION}/settings.json: the window, the names and the instruction
        models/fused/fused-${VERSION}_${MODEL}/ or, where that is missing, models/base/${MODEL}/
        with models/adapters/adapter-${VERSION}_${MODEL}/
Exit    0 the talk ended, 1 something is missing or wrong, 2 wrong usage, 130 Ctrl-C
"""

import os
import signal
import sys

if sys.version_info < (3, 11):  # noqa: UP036 (a Mac's own Python is 3.9)
    sys.exit("error: Python 3.11 or newer is needed. FIX: python3.13 -m venv --clear venv")
if __name__ == "__main__":
    # Ctrl-C ends it at once, until it talks to a person.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\n"), os._exit(130)))

import argparse
import contextlib
import hashlib
import json
import re
import select
import subprocess
import unicodedata
from pathlib import Path

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 (it gives input() its editing keys and its history)


# ---- settings: edit a default here, or give the flag for a single run ----------------------------
DEFAULTS = {"VERSION": "v1", "MODEL": "gemma-3-text-27b-it-4bit"}  # of these variables
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.error = lambda what: parser.exit(2, f"error: {what}. FIX: python models/chat.py --help\n")
add, env = parser.add_argument, (DEFAULTS | os.environ).get
add("--version", default=env("VERSION"), help="which data: data/for_train/VERSION")
add("--model", default=env("MODEL"), help="which base model: models/base/MODEL")
add("--as", dest="author", default="", help="who replies, instead of who was learned most")
add("--me", default="me", help="your name in the chat")
add("--temperature", type=float, help="0 always the likeliest word, 1 as learned, up to 2")
add("--max-tokens", type=int, default=300, help="tokens of the longest reply")
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 0}  # if generation_config.json says nothing
# --------------------------------------------------------------------------------------------------


def arguments():
    args = parser.parse_args()
    if not (0 <= (args.temperature or 0) <= 2 and args.max_tokens > 0):
        parser.error("--temperature is 0 to 2, --max-tokens 1 or more")
    for variable, name in ("VERSION", args.version), ("MODEL", args.model):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            last = name.rstrip("/").split("/")[-1]  # of a path or a repository
            good = re.sub(r"[^A-Za-z0-9._-]+", "_", last).lstrip("._-") or DEFAULTS[variable]
            what = f"{variable} is {name!a}, not letters, digits, '.', '_' and '-'"
            fail(what, f"export {variable}={good}")
    return args


# ---- helpers -------------------------------------------------------------------------------------
def visible(text):
    r"""Return text that can only be read: an escape character, for example, becomes \x1b."""
    fine = "\n\xa0\u3000\u200c\u200d"  # wide spaces, and what joins emoji
    return "".join(
        c if c.isprintable() or c in fine else c.encode("unicode_escape").decode() for c in text
    )


def fail(what, fix):
    sys.exit(visible(f"error: {what}. FIX: {fix}"))


def note(text):
    """Print what is not part of the talk."""
    print(visible(text), file=sys.stderr, flush=True)


# ---- what is there -------------------------------------------------------------------------------
def missing(what, folder, variable, make):
    """Fail for lack of a folder; the fix names those that are there."""
    there = sorted(path.name for path in folder.parent.glob("[!.]*") if path.is_dir())
    fixes = [f"export {variable}={name}" for name in there]
    fixes.insert(0 if variable == "VERSION" else len(fixes), make)  # one's own data first
    fail(f"there is no {what} in {folder}", ", or ".join(fixes))


def read_settings(version):
    """Return what build_train.py wrote down about the training data."""
    path = Path(f"data/for_train/{version}/settings.json")
    make = f"VERSION={version} python build_train.py"
    if not path.parent.exists():
        missing("settings.json", path.parent, "VERSION", make)
    try:
        settings = json.loads(path.read_text("utf-8"))
        needed = "shape names authors prompt window max_context_chars max_seq_length"
        return {name: settings[name] for name in needed.split()}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        fail(f"{path} cannot be used: {e!r}", make)


def is_stale(adapter, fused):
    """Say whether the fused model was made from another adapter than the one there now."""
    try:
        made_from = json.loads((fused / "fused_from.json").read_bytes())["adapter_sha256"]
        weights = (adapter / "adapters.safetensors").read_bytes()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False
    return hashlib.sha256(weights).hexdigest() != made_from


def was_built_anew(version, adapter):
    """Say whether the data, and so the window, the names and the author, may be others by now."""
    data, trained = Path(f"data/for_train/{version}/train.jsonl"), adapter / "lora_config.yaml"
    if not (data.exists() and trained.exists()):
        return False
    checksum = subprocess.run(["cksum"], input=data.read_bytes(), capture_output=True).stdout
    return checksum.strip() not in trained.read_bytes()


def find_model(version, model):
    """Return [(folder, the command that makes it)] of the fused model, or of base and adapter."""
    run, name = f"VERSION={version} MODEL={model}", f"{version}_{model}"
    adapter = Path(f"models/adapters/adapter-{name}")
    fused = Path(f"models/fused/fused-{name}")
    if was_built_anew(version, adapter):
        note(f"warning: the data are not those of the training. Train anew: {run} ./fine_tune.sh")
    if fused.is_dir():
        if is_stale(adapter, fused):
            note(f"warning: {fused} was made from another adapter. To renew it: {run} ./fuse.sh")
        return [(fused, f"{run} ./fuse.sh")]
    base = Path(f"models/base/{model}")
    download = f"hf download mlx-community/{model} --local-dir {base}"
    if model == "tiny-gemma-3":
        download = "python tests/tiny_base.py"
    if not base.is_dir():
        missing("base model", base, "MODEL", download)
    if not adapter.is_dir():
        fail(f"there is no {adapter}, and no {fused}", f"{run} ./fine_tune.sh")
    return [(base, download), (adapter, f"{run} ./fine_tune.sh")]


def speakers(args, settings):
    """Return the names of who replies and of who types."""
    learned = [tidy(name) for name in settings["authors"]] or ["model"]
    can_choose = settings["shape"] == "prompt" and settings["names"]
    usual = learned[0] if can_choose or len(learned) == 1 else "model"
    author, me = tidy(args.author) or usual, tidy(args.me) or "me"
    if not can_choose and author != usual:
        fail(f"this model was not taught to reply as {author}", "leave --as out")
    if can_choose and author not in learned:
        note(f"warning: nothing of {author} was learned, but of {', '.join(learned[:5])}")
    return author, me if me != author else f"{me}_"


# ---- the prompt, as build_train.py makes it ------------------------------------------------------
CONTROL = (  # what the chat templates of models are made of
    r"<(?:\|[^\s<>|]{1,40}\|?|[^\s<>|]{1,40}\|)>"
    r"|<(?:/?s|bos|eos|pad|unk|(?:start|end)_of_(?:turn|image))>"
    r"|<｜[^\s<>｜]{1,40}｜>|\[/?INST\]|<</?SYS>>"  # noqa: RUF001
)


def tidy(text):
    """Return a line as those that were learned are: "  Perche\u0301  <eos>" → "Perché < eos>"."""
    text = "".join(c for c in text if c.isprintable() or c.isspace() or c in "\u200c\u200d")
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return re.sub(CONTROL, lambda token: f"{token[0][0]} {token[0][1:]}", text)


def tidy_lines(text):
    return "\n".join(filter(None, map(tidy, text.split("\n"))))


def make_chat(log, author, settings):
    r"""Return the last messages of the log as the chat that the author has to go on with.

    [("me", "hi"), ("ann", "hello"), ("me", "ready?")] becomes, if the shape is "prompt",
        [{"role": "user", "content": "me: hi\nann: hello\nme: ready?\n\nWrite …, as ann."}]
    and if it is "turns"
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, …]
    """
    most, in_turns = settings["max_context_chars"], settings["shape"] == "turns"
    turns = []
    for name, text in log[-settings["window"] :]:
        if len(text) > most:
            text = text[:most].rstrip() + "…"
        is_own = in_turns and name == author
        if settings["names"] and not is_own:
            text = f"{name}: {text}"
        role = "assistant" if is_own else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n" + text
        elif turns or not is_own:
            turns.append({"role": role, "content": text})
    if not in_turns:
        prompt = settings["prompt"].replace("{author}", author)
        prompt = prompt.replace("{context}", turns[0]["content"])
        turns = [{"role": "user", "content": prompt.strip()}]
    return turns


def make_prompt(log, author, settings, tokenizer):
    """Return the tokens of the prompt, without the oldest messages if it would be too long."""
    for start in range(max(0, len(log) - settings["window"]), len(log)):
        chat = make_chat(log[start:], author, settings)
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        if len(tokens) <= settings["max_seq_length"]:
            break
    return tokens


# ---- the model -----------------------------------------------------------------------------------
def give_up(*_):
    raise TimeoutError("it took more than a minute")


def load(parts):
    """Return the model and its tokenizer; parts: see find_model()."""
    try:
        import mlx_lm  # here, because it takes a second
    except ImportError as e:
        fail(e, "source venv/bin/activate (see README.md, Install)")
    note("loading " + " with ".join(str(folder) for folder, _ in parts))
    signal.signal(signal.SIGALRM, give_up)
    folder, fix = parts[0]
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if config.get("num_hidden_layers", 0) > 1000:
            raise ValueError("so many layers would fill the memory")
        model, tokenizer = mlx_lm.load(str(folder), {"trust_remote_code": False})
        signal.alarm(60)  # a chat template is a program, and may have no end
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
        if len(parts) == 2:
            folder, fix = parts[1]
            model = mlx_lm.utils.load_adapters(model, str(folder))
            model.eval()
        return model, tokenizer
    except Exception as e:  # whatever is wrong with the files
        fail(f"{folder} does not load: {' '.join(str(e).split())[:200]}", fix)
    finally:
        signal.alarm(0)


def make_sampler(args, folder):
    """Return what draws a token: as generation_config.json says, or SAMPLING, or --temperature."""
    from mlx_lm import sample_utils

    said = {}
    with contextlib.suppress(OSError, ValueError):
        said = json.loads((folder / "generation_config.json").read_text("utf-8"))
    said["temperature"] = said.get("temperature") if args.temperature is None else args.temperature
    values = SAMPLING | {name: said[name] for name in SAMPLING if said.get(name) is not None}
    return sample_utils.make_sampler(values["temperature"], values["top_p"], top_k=values["top_k"])


# ---- the talk ------------------------------------------------------------------------------------
def read_message(prompt):
    """Return the lines that are typed, or pasted at once, as one message."""
    typed = sys.stdin.isatty()
    lines = [input(prompt)]
    with contextlib.suppress(EOFError):
        while lines[-1].endswith("\\") or (typed and select.select([sys.stdin], [], [], 0.05)[0]):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(input(" " * len(prompt)))
    return "\n".join(lines)


def show(parts, indent):
    """Print a reply as it comes and return it: all of it, or up to Ctrl-C."""
    text, shown, end = "", 0, "\n"
    with contextlib.suppress(KeyboardInterrupt):
        for part in parts:
            text += part.text
            ready = text.strip()
            print(visible(ready[shown:]).replace("\n", "\n" + indent), end="", flush=True)
            shown = len(ready)
            if part.finish_reason == "length":
                end = " …\n"
    print(end=end, flush=True)
    return text


def talk(answer, author, me):
    """Read messages and answer them until the input ends."""
    typed = sys.stdin.isatty()
    before, after = (f"{visible(name)}: " if typed else "" for name in (me, author))
    log = []  # [("me", "hi"), ("ann", "hello"), …]
    while True:
        try:
            message = tidy_lines(read_message(before))
            if not message:
                continue
            log.append((me, message))
            print(after, end="", flush=True)
            reply = tidy_lines(show(answer(log), " " * len(after)))
            if reply:
                log.append((author, reply))
        except EOFError:
            print(end="\n" if typed else "")
            return
        except KeyboardInterrupt:  # not while it writes: show() knows of that
            print("\n(Ctrl-D ends the talk)")


def main():
    os.chdir(Path(__file__).resolve().parent.parent)
    args = arguments()
    settings = read_settings(args.version)
    parts = find_model(args.version, args.model)
    author, me = speakers(args, settings)
    model, tokenizer = load(parts)
    sampler = make_sampler(args, parts[0][0])

    def answer(log):
        from mlx_lm import stream_generate

        prompt = make_prompt(log, author, settings, tokenizer)
        return stream_generate(model, tokenizer, prompt, args.max_tokens, sampler=sampler)

    if sys.stdin.isatty():
        note("(Ctrl-D ends the talk)")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # talk() takes it from here
    talk(answer, author, me)


if __name__ == "__main__":
    for name in [n for n in os.environ if n.startswith(("HF_", "TRANSFORMERS_", "MLXLM_"))]:
        del os.environ[name]  # a wrong one would break an import, another hub would be asked
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    for stream in sys.stdin, sys.stdout:
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)
    except BrokenPipeError:  # as of | head -1
        os._exit(0)
    except (OSError, RuntimeError) as e:
        note(f"error: {e}. FIX: make room on the disk or in memory")
        os._exit(1)
