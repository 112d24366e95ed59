"""Check the input of fine_tune.sh before a model is loaded, and fill in what is auto.

    python -m models.check_training data/for_train/v1/train.jsonl data/for_train/v1/valid.jsonl

Reads   VERSION, MODEL and the settings of fine_tune.sh, which are environment variables here
Prints  ITERS=600 and so on for the shell, on stdout; what a person wants to know, on stderr
Exit    0 it can be trained, 1 it cannot
"""

from data.clean import control_token_in
from models import common, folders
from models.adapted import look_at, read_model
from models.chat_template import check_template, load_tokenizer
from models.common import fail, learning_rate, rerun, warn
from models.completion_loss import encode
from models.memory import bytes_of_weights, changes_to_fit, memory_for_mlx, memory_to_train

import math
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

# The least and the most of each setting, and its default in fine_tune.sh, which an error proposes.
# If the least is a whole number, so is the setting.
SETTINGS = {
    "ITERS": (1, math.inf, "auto"),
    "BATCH_SIZE": (1, math.inf, 2),
    "GRAD_CHECKPOINT": (0, 1, 0),
    "MAX_SEQ_LENGTH": (1, math.inf, 1024),
    "LEARNING_RATE": (1e-9, math.inf, "auto"),
    "RANK": (1, math.inf, 32),
    "SCALE": (0.1, math.inf, 10.0),
    "DROPOUT": (0.0, 0.9, 0.0),
    "NUM_LAYERS": (-1, math.inf, -1),
    "EMBEDDINGS": (0, 1, 1),
    "MASK_PROMPT": (0, 1, 0),
    "EVAL_EVERY": (1, math.inf, 200),
    "SEED": (0, 10**9, 0),
    "CHECK_MEMORY": (0, 1, 1),
    "RESUME": (0, 1, "auto"),
}

OTHER_BASE = "python -m models.which_model  # lists others; their names have -it or -Instruct"


def main(train, valid):
    version, model = common.from_environment("VERSION"), common.from_environment("MODEL")
    s = SimpleNamespace(**{name: read_setting(name, *SETTINGS[name]) for name in SETTINGS})
    build, download = rerun("python build_train.py"), common.download(model)
    base, train, valid = Path("models/base", model), Path(train), Path(valid)
    folders.need(base / "config.json", "MODEL", download)
    for file in train, valid:
        folders.need(file, "VERSION", build)
    size, tokenizer = read_base(base, s.EMBEDDINGS, download)
    train_rows, valid_rows = common.read_rows(train, build), common.read_rows(valid, build)
    longest = check_rows(train_rows, valid_rows, tokenizer, build)
    say("base", f"{model}: adapts {size.summary}")
    say("data", f"{version}: {len(train_rows)} rows to train on, the longest of {longest} tokens")
    say("", f"{len(valid_rows)} rows to choose a checkpoint by")
    check_sizes(s, size, len(train_rows), longest)
    fill_in(s, size, len(train_rows))
    check_memory(s, size, longest)
    s.KEYS = ", ".join(size.keys)
    s.TRAIN_SHA256, s.VALID_SHA256 = common.checksum(train), common.checksum(valid)
    del s.RESUME  # of this call alone: a resumed run takes all others from the run that it resumes
    for name, value in vars(s).items():
        print(f"{name}={shlex.quote(str(value))}")


def say(title, text):
    print(f"{title:11} {text}", file=sys.stderr)


# ---- the settings --------------------------------------------------------------------------------
def read_setting(name, least, most, default):
    """Return a setting as a number, or "auto" where that is its default."""
    text, kind = os.environ.get(name, str(default)), type(least)
    if text == default:
        return text
    with suppress(ValueError):
        if least <= kind(text) <= most and kind(text) < math.inf:
            return kind(text)
    number = "a whole number" if kind is int else "a number"
    limits = f"from {least}" + (f" to {most}" if most < math.inf else "")
    fail(f"{name}={text} is not {number} {limits}", rerun("./fine_tune.sh", **{name: default}))


def fill_in(s, size, rows):
    """Fill in ITERS=auto and LEARNING_RATE=auto.

    One epoch was best in tests/benchmarks/README.md. At most 1,200 rows, as large models are slow.
    """
    epoch = rows // s.BATCH_SIZE
    if s.ITERS == "auto":
        s.ITERS = min(epoch, max(1, 1200 // s.BATCH_SIZE))
    if s.LEARNING_RATE == "auto":
        s.LEARNING_RATE = float(f"{learning_rate(size.hidden):.1e}")
        say("rate", f"{s.LEARNING_RATE}, by the hidden size of the base, {size.hidden}")
    say("run", f"{s.ITERS} iterations of {s.BATCH_SIZE} rows = {s.ITERS / epoch:.3g} epochs")
    if epoch > s.ITERS:
        say("", f"more lowers the loss, up to one epoch: ITERS={epoch}")
    if 2 * epoch < s.ITERS:
        measured = "(8,000 rows at 1, 2, 4 epochs: 3.33, 3.39, 3.86; 500 rows: 3.66, 3.78, 5.47)"
        fix = rerun("./fine_tune.sh", ITERS=epoch)
        warn(f"more than two epochs made held-out chats worse {measured}", fix)


# ---- the base model and the rows -----------------------------------------------------------------
def read_base(base, embeddings, download):
    """Return the sizes of a base model and its tokenizer; refuse one that is no good."""
    try:
        weights = bytes_of_weights(base)
        size = look_at(*read_model(base), embeddings)
        size.weights = weights
        tokenizer = load_tokenizer(base)
        check_template(tokenizer)
        return size, tokenizer
    except Exception as error:  # whatever is wrong with a download
        fail(f"the base model in {base} cannot be used: {error}", download, OTHER_BASE)


def check_rows(train, valid, tokenizer, build):
    """Return the most tokens in a row; refuse rows that this base model cannot learn."""
    token = control_token_in(train + valid, tokenizer)
    if token:  # the rows may be older than the base
        fail(f"a row holds {token}, which controls this base model", build)
    try:
        of_valid = max(len(encode(tokenizer, chat)[0]) for chat in valid)
        return max(of_valid, longest_of_many(tokenizer, train))
    except Exception as error:  # a chat template is a program, and may fail in any way
        fail(f"the chat template cannot write the rows: {error}", build, OTHER_BASE)


def longest_of_many(tokenizer, chats):
    """Return the most tokens in a row, without tokenizing all of a large chat.

    No text has more tokens than bytes: once a row of 400 tokens is found, a row of fewer than 400
    bytes, what the chat template puts around it included, cannot be longer.
    """
    frame = len(tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]))
    sizes = [len(str(chat).encode()) + frame for chat in chats]
    longest = 0
    for place in sorted(range(len(chats)), key=sizes.__getitem__, reverse=True):
        if sizes[place] <= longest:
            break
        longest = max(longest, len(encode(tokenizer, chats[place])[0]))
    return longest


def check_sizes(s, size, rows, longest):
    """Refuse settings that do not go with these rows or this base model."""
    if s.NUM_LAYERS == 0 or len(size.blocks) < s.NUM_LAYERS:  # mlx-lm takes 0 for all
        what = f"NUM_LAYERS={s.NUM_LAYERS} is not one of the {len(size.blocks)} layers of the base"
        fail(what, rerun("./fine_tune.sh", NUM_LAYERS=-1))
    if longest > s.MAX_SEQ_LENGTH:
        what = f"a row has {longest} tokens: MAX_SEQ_LENGTH={s.MAX_SEQ_LENGTH} cuts off its reply"
        fail(what, rerun("./fine_tune.sh", MAX_SEQ_LENGTH=longest))
    # At 1.5 times 2^31 logits CUDA gave a wrong loss and NaN gradients without an error.
    most = max(1, min(rows, 2**31 // size.vocabulary // longest))
    if most < s.BATCH_SIZE:
        what = f"BATCH_SIZE={s.BATCH_SIZE}: a batch can have at most {most} of these rows"
        fail(what, rerun("./fine_tune.sh", BATCH_SIZE=most))


# ---- memory --------------------------------------------------------------------------------------
def check_memory(s, size, longest):
    """Refuse what does not fit, and propose settings that do: out of memory a Mac may crash."""
    needed, allowed = memory_to_train(s, size, longest), memory_for_mlx()
    say("memory", f"about {needed / 1e9:.1f} GB of {allowed / 1e9:.1f} GB that MLX may use")
    if not s.CHECK_MEMORY:
        return
    changes = changes_to_fit(s, size, longest, allowed)
    if changes is None:
        half = rerun("python build_train.py", MAX_SEQ_LENGTH=longest // 2)
        fail("no settings make it fit into the memory", "python -m models.which_model", half)
    if changes:
        what = "that does not fit into the memory, and a Mac may crash"
        fail(what, rerun("./fine_tune.sh", **changes))


if __name__ == "__main__":
    main(*sys.argv[1:])
