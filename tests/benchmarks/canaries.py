"""What a model learns by heart: random lines put into the training data once and five times.

    python tests/benchmarks/canaries.py models/base/MODEL LOG.jsonl --only-author NAME

A canary is a reply such as "the boat is called lemon river candle", its three words drawn at
random. build_train.py makes rows of LOG, canaries take the place of replies of some of them, and
fine_tune.sh trains for 1, 2 and 4 epochs. Then each canary is asked for where it stood:

rank      its place among itself and 1,000 lines with other words, the likeliest first: 1 is known
          by heart, 501 is chance (median over the canaries)
verbatim  how often the model writes the three words by itself, given "the boat is called"

VERSION is canaries, whose data and adapters are replaced. It prints

    epochs    loss         never: rank, verbatim       once: rank, verbatim ...
    0        3.229         487   0 of 20               503   0 of 20
    1        2.267         502   0 of 20               120   0 of 20
"""

# ruff: noqa: E402 (our own modules are found from the root)
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)

from models.chat_template import load_model, load_tokenizer
from models.common import chat_of, read_rows
from models.completion_loss import encode, loss_of_replies

import argparse
import copy
import json
import os
import random
import shutil
import statistics
import subprocess

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

WORDS = """
apple arrow basket bear bell bird boat bottle bread bridge brush button cake candle carpet castle
chair cherry circle clock cloud coffee corner cotton crown desert diamond dragon drum eagle engine
feather finger flower forest garden glass goose guitar hammer harbor honey horse island jacket
kettle kitchen ladder lemon letter lion market melon mirror monkey mountain needle ocean orange
paper pencil pepper piano pillow planet pocket rabbit river rocket saddle silver spider spoon summer
table tiger tower tunnel turtle valley violin wagon water window winter wolf yellow zebra
"""
BEGINNING = "the boat is called"
TIMES = {"never": 0, "once": 1, "five times": 5}


# ---- canaries in the training data ---------------------------------------------------------------
def lines(count, draw):
    """Return different random lines."""
    found = set()
    while len(found) < count:
        found.add(f"{BEGINNING} {' '.join(draw.sample(WORDS.split(), 3))}")
    return draw.sample(sorted(found), count)


def put_in(canaries, rows, draw):
    """Put canaries in place of the replies of rows; return {canary: the chat before one of them}.

    canaries: {"once": ["the boat is called lemon river candle", …], …}
    """
    free = draw.sample(rows, len(rows))
    prompts = {}
    for kind, texts in canaries.items():
        for text in texts:
            chosen = [free.pop() for _ in range(TIMES[kind] or 1)]
            prompts[text] = copy.deepcopy(chat_of(chosen[0])[:-1])
            for row in chosen if TIMES[kind] else []:
                last = row["messages"][-1] if "messages" in row else row
                last["content" if "messages" in row else "completion"] = text
    return prompts


def run(*command, **settings):
    """Run a script of the guide with VERSION=canaries; end with its last words if it fails."""
    env = os.environ | {"VERSION": "canaries", "RESUME": "0"} | settings
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}{done.stderr[-2000:]}")


# ---- asking --------------------------------------------------------------------------------------
def said(text):
    return {"role": "assistant", "content": text}


def ends_of(texts, tokenizer):
    """Return {text: its tokens behind "the boat is called"}, the same behind every prompt."""
    tokens = [
        encode(tokenizer, [{"role": "user", "content": "hi"}, said(text)])[0] for text in texts
    ]
    columns = enumerate(zip(*tokens, strict=False))
    shared = next(place for place, column in columns if len(set(column)) > 1)
    return {text: each[shared:] for text, each in zip(texts, tokens, strict=True)}


def repeat(cache, count):
    """Return the cache of one prompt as that of `count` equal ones."""
    many = copy.copy(cache)
    many.state = [
        mx.repeat(part, count, axis=0) if isinstance(part, mx.array) else part
        for part in cache.state
    ]
    return many


def nats(model, start, ends, size=250):
    """Return how surprising each of the ends is behind the tokens of the start, in nats."""
    cache = make_prompt_cache(model)
    model(mx.array([start[:-1]]), cache=cache)  # once for all of them
    found = []
    for first in range(0, len(ends), size):
        rests = [[start[-1], *end] for end in ends[first : first + size]]
        width = max(map(len, rests))
        batch = mx.array([rest + [0] * (width - len(rest)) for rest in rests])
        logits = model(batch[:, :-1], cache=[repeat(each, len(rests)) for each in cache])
        losses = nn.losses.cross_entropy(logits.astype(mx.float32), batch[:, 1:])
        counted = mx.arange(width - 1) < mx.array([len(rest) - 1 for rest in rests])[:, None]
        found += (losses * counted).sum(axis=1).tolist()
    return found


def ask(model, tokenizer, canary, prompt, ends, others):
    """Return the rank of a canary, and whether the model writes its words by itself."""
    tokens, _ = encode(tokenizer, [*prompt, said(canary)])
    start = tokens[: -len(ends[canary])]
    mine, *theirs = nats(model, start, [ends[text] for text in [canary, *others]])
    words = mlx_lm.generate(model, tokenizer, start, max_tokens=12)
    is_known = words.strip().startswith(canary.removeprefix(BEGINNING).strip())
    return 1 + sum(each <= mine for each in theirs), is_known


def report(epochs, base, adapter, valid, canaries, *asked):
    """Print a line of the table: how well a model knows the canaries."""
    model, tokenizer = load_model(base, adapter)
    loss = loss_of_replies(model, [encode(tokenizer, chat) for chat in valid])
    cells = [f"{epochs:<6} {loss:7.3f}"]
    for texts in canaries.values():
        prompts, *rest = asked
        found = [ask(model, tokenizer, text, prompts[text], *rest) for text in texts]
        rank = statistics.median(rank for rank, _ in found)
        cells.append(f"{rank:9.0f}  {sum(known for _, known in found):2} of {len(texts)}")
    print("      ".join(cells), flush=True)
    del model
    mx.clear_cache()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path, help="models/base/MODEL")
    parser.add_argument("log", type=Path, help="a log as data/raw/messages_VERSION.jsonl")
    parser.add_argument("--only-author", default="", help="learn the replies of this author alone")
    parser.add_argument("--epochs", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--each", type=int, default=20, help="canaries of each kind")
    parser.add_argument("--others", type=int, default=1000, help="lines to compare each with")
    args = parser.parse_args()

    data, model = ROOT / "data/for_train/canaries", args.base.name
    shutil.copy(args.log, ROOT / f"data/raw/messages_canaries{args.log.suffix}")
    author = ["--only-author", args.only_author] if args.only_author else []
    run(sys.executable, "build_train.py", *author, MODEL=model)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_bytes().splitlines()]
    draw = random.Random(0)
    drawn = lines(len(TIMES) * args.each + args.others, draw)
    ends = ends_of(drawn, load_tokenizer(args.base))
    canaries = {kind: [drawn.pop() for _ in range(args.each)] for kind in TIMES}
    asked = put_in(canaries, rows, draw), ends, drawn
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (data / "train.jsonl").write_text(text, "utf-8")

    print(f"{len(rows)} rows, {args.each * sum(TIMES.values())} of them canaries")
    print("epochs    loss", *(f"{kind}: rank, verbatim" for kind in TIMES), sep="   ")
    valid = read_rows(data / "valid.jsonl", "")
    report(0, args.base, None, valid, canaries, *asked)
    for epochs in args.epochs:
        batches = str(epochs * len(rows) // 2)  # of two rows, the default
        run("./fine_tune.sh", MODEL=model, ITERS=batches, EVAL_EVERY=batches)
        adapter = ROOT / f"models/adapters/adapter-canaries_{model}"
        report(epochs, args.base, adapter, valid, canaries, *asked)


if __name__ == "__main__":
    main()
