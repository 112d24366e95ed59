"""Talk to the model that was trained, in the terminal.

    python models/chat.py                       # it replies as the author that was learned
    python models/chat.py --as ann --me bob     # as another one of the chat, under your own name
    echo "are you there?" | python models/chat.py

Enter sends a line; a backslash at its end begins another line of the same message. Ctrl-C stops a
reply; exit, or Ctrl-D, ends the talk. Nothing of it is stored.

Reads   data/for_train/${VERSION}/settings.json: the window, the names and the instruction
        models/fused/fused-${VERSION}_${MODEL}/ or, where that is missing, models/base/${MODEL}/
        with models/adapters/adapter-${VERSION}_${MODEL}/
Exit    0 the talk ended, 1 something is missing or wrong, 2 wrong usage, 130 Ctrl-C
"""

# ruff: noqa: E402 (our own modules are found from the folder above)
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.clean import cleaners, control_tokens
from data.prompt import make_chat
from models import common, folders
from models.chat_template import load_model
from models.common import fail, from_environment, visible
from models.sampling import sampling_of

import argparse
import contextlib
import os
import select
import shlex
import termios

import mlx_lm
from mlx_lm.sample_utils import make_sampler

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 (it gives input() its editing keys and its history)


# ---- settings: edit a default here, or give the flag for a single run ----------------------------
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
add = parser.add_argument
add("--version", default=from_environment("VERSION"), help="which data: data/for_train/VERSION")
add("--model", default=from_environment("MODEL"), help="which base model: models/base/MODEL")
add("--as", dest="author", default="", help="who replies, instead of who was learned most")
add("--me", default="me", help="your name in the chat")
add("--temperature", type=float, help="0 always the likeliest word, 1 as learned")
add("--max-tokens", type=int, default=300, help="tokens of the longest reply")
ENDS = "exit", "quit", "/bye"  # typed alone, each ends the talk
# --------------------------------------------------------------------------------------------------


def arguments():
    """Return the settings of this run; end it if one of them is wrong."""
    parser.error = lambda what: fail(what, "python models/chat.py --help", code=2)
    args = parser.parse_args()
    if args.temperature is not None and not args.temperature >= 0:  # nor NaN
        parser.error("--temperature is 0 or more")
    common.check_names(args.version, args.model)
    return args


# ---- what is there -------------------------------------------------------------------------------
def find_model(at):
    """Return (fused, None) or (base, adapter), and the command that makes the last of them."""
    folders.finish_move(at.adapter)
    folders.finish_move(at.fused)
    common.warn_of_changes(at)
    if at.fused.is_dir():
        return at.fused, None, f"{at.run} ./fuse.sh"
    folders.need(at.base / "config.json", "MODEL", common.download(at.base.name))
    if not at.adapter.is_dir():
        fail(f"there is no {at.adapter}, and no {at.fused}", f"{at.run} ./fine_tune.sh")
    return at.base, at.adapter, f"{at.run} ./fine_tune.sh"


def speakers(args, settings):
    """Return the names of who replies and of who types."""
    learned = settings.authors or ["model"]
    if len(learned) > 1 and (settings.shape == "turns" or not settings.names):
        learned = ["model"]  # it was not told who replies
    author = args.author or learned[0]
    if author not in learned:
        what = f"this model did not learn to reply as {author}, but as {', '.join(learned[:5])}"
        fail(what, f"python models/chat.py --as {shlex.quote(learned[0])}")
    if args.me == author:
        return author, f"{author}_"
    return author, args.me


# ---- the talk ------------------------------------------------------------------------------------
def make_prompt(log, author, settings, tokenizer):
    """Return the tokens of the prompt, without the oldest messages if it would be too long.

    log: [("me", "hi"), ("ann", "hello"), ("me", "ready?")]
    """
    for start in range(max(0, len(log) - settings.window), len(log)):
        chat = make_chat(log[start:], author, settings)
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        if len(tokens) <= settings.max_seq_length:
            break
    return tokens


def cleaner(tokenizer):
    r"""Return what cleans a message as in training: " how   are\n\n you" → "how are\nyou"."""
    tidy, _ = cleaners(hide=False, block=None, tokens=control_tokens(tokenizer))
    return lambda text: "\n".join(filter(None, map(tidy, text.split("\n"))))


def read_message(prompt):
    """Return the lines that are typed, or pasted at once, as one message."""
    typed = sys.stdin.isatty()
    lines = [input(prompt)]
    with contextlib.suppress(EOFError):
        while lines[-1].endswith("\\") or (typed and select.select([sys.stdin], [], [], 0.05)[0]):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(input(" " * len(prompt)))
    return "\n".join(lines)


@contextlib.contextmanager
def silent_keys():
    """Hide what is typed while a reply is shown."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = before.copy()
    silent[3] &= ~termios.ECHO  # the local modes
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def show(parts, indent):
    """Print a reply as it comes and return it: all of it or, at a terminal, up to Ctrl-C."""
    text, shown, end = "", 0, "\n"
    stops = [KeyboardInterrupt] if sys.stdin.isatty() else []
    with silent_keys(), contextlib.suppress(*stops):
        for part in parts:
            text += part.text
            new = visible(text.strip()[shown:])
            print(new.replace("\n", "\n" + indent), end="", flush=True)
            shown = len(text.strip())
            end = " …\n" if part.finish_reason == "length" else "\n"
    print(end=end, flush=True)
    return text


def talk(answer, tidy, author, me):
    """Read messages and answer them until the input ends."""
    typed = sys.stdin.isatty()
    before = f"{visible(me)}: " if typed else ""
    after = f"{visible(author)}: " if typed else ""
    log = []  # [("me", "hi"), ("ann", "hello"), …]
    while True:
        try:
            message = tidy(read_message(before))
        except EOFError:
            if typed:
                print()
            return
        except KeyboardInterrupt:
            if not typed:
                raise
            print("\n(exit ends the talk)")
            continue
        if typed and message in ENDS:
            return
        if message:
            log.append((me, message))
            print(after, end="", flush=True)
            reply = tidy(show(answer(log), " " * len(after)))
            if reply:
                log.append((author, reply))


def main():
    os.chdir(common.ROOT)
    args = arguments()
    at = folders.places(args.version, args.model)
    folders.need(at.data / "settings.json", "VERSION", at.build)
    settings = common.read_settings(at.data / "settings.json", at.build)
    folder, adapter, command = find_model(at)
    author, me = speakers(args, settings)
    print(f"loading {adapter or folder}", file=sys.stderr, flush=True)
    try:
        model, tokenizer = load_model(folder, adapter)
        make_prompt([(me, "hi")], author, settings, tokenizer)
    except Exception as error:  # whatever is wrong with the files of a model
        fail(f"{adapter or folder} does not load: {error}", command)
    sampling = sampling_of(folder, args.temperature)
    sampler = make_sampler(sampling["temperature"], sampling["top_p"], top_k=sampling["top_k"])

    def answer(log):
        prompt = make_prompt(log, author, settings, tokenizer)
        return mlx_lm.stream_generate(model, tokenizer, prompt, args.max_tokens, sampler=sampler)

    if sys.stdin.isatty():
        print("(exit ends the talk)", file=sys.stderr, flush=True)
    sys.stdin.reconfigure(errors="replace")
    talk(answer, cleaner(tokenizer), author, me)


if __name__ == "__main__":
    main()
