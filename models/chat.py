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
    sys.exit(f"error: this is Python {sys.version.split()[0]}. FIX: install 3.11, see README.md")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C until it talks to a person
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder of this script: a json.py in it must not run

import argparse
import contextlib
import difflib
import hashlib
import json
import re
import select
import unicodedata
from pathlib import Path

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 (it gives input() its editing keys and its history)

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


# ---- settings: edit a default here, or give the flag for a single run ----------------------------
DEFAULTS = {"VERSION": "v1", "MODEL": "gemma-3-text-27b-it-4bit"}  # of these variables
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 0}  # if generation_config.json says nothing


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda what: parser.exit(
        2, f"error: {what}. FIX: python models/chat.py --help\n"
    )
    version, model = (os.environ.get(name) or default for name, default in DEFAULTS.items())
    add = parser.add_argument
    add("--version", default=version, help="which data: data/for_train/VERSION")
    add("--model", default=model, help="which base model: models/base/MODEL")
    add("--as", dest="author", default="", help="who replies, instead of who was learned most")
    add("--me", default="me", help="your name in the chat")
    add("--temperature", type=float, help="0 always the likeliest word, 1 as learned, up to 2")
    add("--top-p", type=float, help="share of the likeliest words, 1 all")
    add("--top-k", type=int, help="number of the likeliest words, 0 all")
    add("--max-tokens", type=int, default=300, help="tokens of the longest reply")
    add("--seed", type=int, help="the same number, the same replies")
    args = parser.parse_args()
    if not 0 <= (args.temperature or 0) <= 2 or args.max_tokens < 1 or (args.seed or 0) < 0:
        parser.error("--temperature is 0 to 2, --max-tokens 1 or more, --seed 0 or more")
    for name in args.version, args.model:
        if not NAME.fullmatch(name):
            what = f"VERSION or MODEL is {name!a}, which is not the name of a folder"
            fail(what, "use letters, digits, '.', '_' and '-' alone")
    return args


# ---- helpers -------------------------------------------------------------------------------------
def fail(what, fix):
    sys.exit(f"error: {what}. FIX: {fix}")


def note(text):
    """Print what is not part of the talk."""
    print(text, file=sys.stderr, flush=True)


def visible(text):
    r"""Return text that can only be read: an escape character, for example, becomes \x1b."""
    fine = "\n\xa0\u3000\u200c\u200d"  # wide spaces, and what joins emoji
    return "".join(
        c if c.isprintable() or c in fine else c.encode("unicode_escape").decode() for c in text
    )


def read_json(path):
    """Return the object in a file, an empty one if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- what is there -------------------------------------------------------------------------------
def find(pattern, variable, name, make):
    """Return the path that a pattern and a name make; else fail, with the name that was meant."""
    there = sorted(filter(NAME.fullmatch, (path.parts[2] for path in Path().glob(pattern))))
    if name in there:
        return Path(pattern.replace("*", name))
    near = difflib.get_close_matches(name, there, 1)
    if len(there) == 1 and name == DEFAULTS[variable] and not os.environ.get(variable):
        near = there  # it was forgotten
    what = f"there is no {pattern.replace('*', name)}"
    what += f"; {variable} can be {', '.join(there) or 'nothing yet'}"
    fail(what, f"export {variable}={near[0]}" if near else make)


def read_settings(version):
    """Return what build_train.py wrote down about the training data."""
    make = f"VERSION={version} python build_train.py"
    path = find("data/for_train/*/settings.json", "VERSION", version, make)
    settings = read_json(path)
    needed = {"shape": str, "names": bool, "authors": list, "prompt": str}
    needed |= {"window": int, "max_context_chars": int, "max_seq_length": int}
    for name, kind in needed.items():
        value = settings.get(name)
        if type(value) is not kind or (kind is int and value < 1):
            fail(f'{path} has no "{name}" that build_train.py could have written', make)
    return settings


def find_model(version, model):
    """Return [(folder, the command that makes it)] of the fused model, or of base and adapter."""
    run, name = f"VERSION={version} MODEL={model}", f"{version}_{model}"
    adapter = Path(f"models/adapters/adapter-{name}")
    fused = Path(f"models/fused/fused-{name}")
    if fused.is_dir():
        origin = origin_of(fused / "fused_from.json", "base", model)
        weights = adapter / "adapters.safetensors"
        if weights.exists() and origin.get("adapter_sha256") != checksum(weights):
            note(f"warning: {fused} does not seem to be of the present adapter: {run} ./fuse.sh")
        return [(fused, f"{run} ./fuse.sh")]
    download = f"hf download mlx-community/{model} --local-dir models/base/{model}"
    base = find("models/base/*/config.json", "MODEL", model, download).parent
    if not adapter.is_dir():
        fail(f"there is no {adapter}, and no {fused}", f"{run} ./fine_tune.sh")
    origin_of(adapter / "adapter_config.json", "model", model)
    return [(base, download), (adapter, f"{run} ./fine_tune.sh")]


def origin_of(path, key, model):
    """Return what stands beside a model; fail if it was made from another base.

    subtle: VERSION=a_b MODEL=c and VERSION=a MODEL=b_c have one folder.
    """
    origin = read_json(path)
    base = Path(str(origin.get(key, model))).name
    if base != model:
        what = f"{path.parent} was made from {visible(base)}, not from {model}"
        fail(what, "give one of the two another VERSION, from build_train.py on")
    return origin


def checksum(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def speakers(args, settings):
    """Return the names of who replies and of who types."""
    learned = [tidy(str(name)) for name in settings["authors"]]
    has_one_voice = settings["shape"] == "turns" or not settings["names"]
    usual = "model"
    if len(learned) == 1 or (learned and not has_one_voice):
        usual = learned[0]
    author = tidy(args.author)[:60] or usual
    if has_one_voice and author != usual:
        fail(
            f"--as {author!a}, but this model was not taught to be one of several", "leave --as out"
        )
    if author not in learned and args.author:
        known = visible(", ".join(learned[:5]))
        note(f"warning: nothing of {visible(author)} was learned, but of {known}")
    me = tidy(args.me)[:60] or "me"
    return author, me if me != author else f"{me}_"


# ---- the prompt, as build_train.py makes it ------------------------------------------------------
CONTROL = (  # what the chat templates of models are made of
    r"<(?:\|[^\s<>|]{1,40}\|?|[^\s<>|]{1,40}\||/?s|bos|eos|pad|unk|(?:start|end)_of_(?:turn|image))>"
    r"|<｜[^\s<>｜]{1,40}｜>|\[/?INST\]|<</?SYS>>"  # noqa: RUF001
)


def control_of(tokenizer):
    """Return the pattern of what this model takes for the end of a message, and its like."""
    special = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    tokens = {token.content for token in special if token.special}
    tokens = {token for token in tokens if token in str(tokenizer.chat_template)}
    tokens = sorted(token for token in {*tokens, *tokenizer.all_special_tokens} if len(token) > 2)
    return "|".join([CONTROL, *map(re.escape, tokens)])


def tidy(text, control=CONTROL):
    """Return a line as those that were learned are: "  Perche\u0301  <eos>" → "Perché < eos>"."""
    text = "".join(c for c in text if c.isprintable() or c.isspace() or c in "\u200c\u200d")
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return re.sub(control, lambda token: f"{token[0][0]} {token[0][1:]}", text)


def tidy_lines(text, control=CONTROL):
    return "\n".join(filter(None, (tidy(line, control) for line in text.split("\n"))))


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
    """Return the tokens of the prompt; a log that is too long loses its oldest messages."""
    while True:
        del log[: -settings["window"]]
        chat = make_chat(log, author, settings)
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        if len(tokens) <= settings["max_seq_length"] or len(log) == 1:
            return tokens
        del log[0]


# ---- the model -----------------------------------------------------------------------------------
def too_slow(*_):
    raise TimeoutError("it does not come to an end")


def load(parts, chat):
    """Return the model and its tokenizer, tried on a chat; parts: see find_model()."""
    try:
        import mlx_lm  # here, because it takes a second
    except ImportError as e:
        fail(e, "source venv/bin/activate; pip install -r requirements.txt")
    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(60)  # a template may have no end
    try:
        folder, fix = parts[0]
        layers = read_json(folder / "config.json").get("num_hidden_layers")
        if type(layers) is int and layers > 1000:  # it would fill the memory
            raise ValueError(f"config.json says {layers} layers")
        model, tokenizer = mlx_lm.load(str(folder), {"trust_remote_code": False}, lazy=True)
        if len(parts) == 2:
            folder, fix = parts[1]
            model = mlx_lm.utils.load_adapters(model, str(folder))
            model.eval()
        folder, fix = parts[0][0], "train a MODEL that is made to chat (-it, -Instruct)"
        start = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "hi"}])
        if whole[: len(start)] != start:
            raise ValueError("its chat template begins a reply otherwise than it writes one")
    except Exception as e:  # whatever is wrong with the files
        reason = visible(" ".join(str(e).split()))[:200].rstrip(".")
        fail(f"{folder} does not load: {reason}", fix)
    signal.alarm(0)
    return model, tokenizer


def read_weights(model):
    """Read the weights from the disk now, with a bar, and not with the first reply."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from tqdm import tqdm

    weights = tree_flatten(model.parameters())
    for _, weight in tqdm(weights, "reading", delay=1, leave=False, disable=None):
        mx.eval(weight)


def make_sampler(args, folder, vocabulary):
    """Return what draws a token: as the flags say, or generation_config.json, or SAMPLING."""
    import mlx.core as mx
    from mlx_lm import sample_utils

    if args.seed is not None:
        mx.random.seed(args.seed)
    values = dict(SAMPLING)
    for name, said in read_json(folder / "generation_config.json").items():
        if name in values and type(said) in (int, float) and said >= 0:
            values[name] = said
    values |= {name: given for name in values if (given := getattr(args, name)) is not None}
    top_k = int(min(vocabulary - 1, values["top_k"]))
    return sample_utils.make_sampler(values["temperature"], values["top_p"], top_k=top_k)


# ---- the talk ------------------------------------------------------------------------------------
def read_message(prompt):
    """Return the lines that are typed, or pasted at once, as one message."""
    lines = [input(prompt)]
    with contextlib.suppress(EOFError):
        while lines[-1].endswith("\\") or line_is_waiting():
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(input(" " * len(prompt)))
    return "\n".join(lines)


def line_is_waiting():
    return sys.stdin.isatty() and select.select([sys.stdin], [], [], 0.05)[0]


def show(parts, indent):
    """Print a reply as it comes and return it: all of it, or up to Ctrl-C."""
    text, shown = "", 0
    try:
        for part in parts:
            text += part.text
            ready = text.strip()
            print(visible(ready[shown:]).replace("\n", "\n" + indent), end="", flush=True)
            shown = len(ready)
        if part.finish_reason == "length":
            print(" …", end="")
    except KeyboardInterrupt:
        pass
    print(flush=True)
    return text


def talk(answer, author, me, control):
    """Read messages and answer them until the input ends."""
    typed = sys.stdin.isatty()
    before, after = (f"{visible(name)}: " if typed else "" for name in (me, author))
    log = []  # [("me", "hi"), ("ann", "hello"), …]
    while True:
        try:
            message = tidy_lines(read_message(before), control)
            if not message:
                continue
            log.append((me, message))
            print(after, end="", flush=True)
            reply = tidy_lines(show(answer(log), " " * len(after)), control)
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
    with contextlib.redirect_stdout(sys.stderr):  # warnings of libraries are no replies
        model, tokenizer = load(parts, make_chat([(me, "hello")], author, settings))
    read_weights(model)
    sampler = make_sampler(args, parts[0][0], tokenizer.vocab_size)

    def answer(log):
        from mlx_lm import stream_generate

        prompt = make_prompt(log, author, settings, tokenizer)
        return stream_generate(model, tokenizer, prompt, args.max_tokens, sampler=sampler)

    note("talking to " + " with ".join(str(folder) for folder, _ in parts))
    if sys.stdin.isatty():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # talk() takes it from here
    talk(answer, author, me, control_of(tokenizer))


if __name__ == "__main__":
    for name in [n for n in os.environ if n.startswith(("HF_", "TRANSFORMERS_", "MLXLM_"))]:
        del os.environ[name]  # a wrong one would break an import, another hub would be asked
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    for stream in sys.stdin, sys.stdout:
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)
    except BrokenPipeError:  # as of | head -1
        os._exit(0)
    except (OSError, RuntimeError) as e:
        note(f"error: {visible(str(e))}. FIX: make room on the disk or in memory")
        os._exit(1)
