"""What test_on_validation.py costs beyond the models' own work, as ratios within one run.

    python tests/benchmarks/test_on_validation.py models/base/MODEL data/for_train/v1/valid.jsonl

1. Loss of 400 rows against the bare forward passes of the same batches: at most 1.1 times as long.
2. Replies to 100 rows, with the default of --reply-batch, against one generate() after the other:
   at most 1.1 times as long. Temperature 0, so that both sides write the same tokens.

Medians of --repeats after a warm-up, in which a GPU compiles. Exit code 1 if a limit is not met:

    loss of 400 rows        bare   0.76 s, script   0.69 s: 0.91
    100 replies      one by one   9.80 s, script   3.43 s: 0.35
"""

# ruff: noqa: E402 (our own modules are found from the root)
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import test_on_validation as script
from models.chat_template import load_model

import argparse
import contextlib
import io
import json
import statistics
import time
from types import SimpleNamespace

import mlx.core as mx
from mlx_lm import generate

GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}


def seconds(run):
    """Return how long a function takes."""
    mx.synchronize()
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        run()
    mx.synchronize()
    return time.perf_counter() - start


def race(label, name, plain, ours, repeats):
    """Print the median times of two functions that take turns; say whether ours is quick enough."""
    times = [(seconds(plain), seconds(ours)) for _ in range(1 + repeats)]
    bare, script = map(statistics.median, zip(*times[1:], strict=True))
    print(f"{label:18} {name:>10} {bare:6.2f} s, script {script:6.2f} s: {script / bare:.2f}")
    return script <= 1.1 * bare


def batches(rows, most_tokens):
    """Return the token arrays that are scored: longest rows first, padded."""
    left = sorted((row.tokens for row in rows), key=len, reverse=True)
    arrays = []
    while left:
        width = len(left[0])
        size = max(1, most_tokens // width)
        arrays.append(mx.array([row + [0] * (width - len(row)) for row in left[:size]])[:, :-1])
        left = left[size:]
    mx.eval(arrays)
    return arrays


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--replies", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    lines = args.data.read_text("utf-8").splitlines()[: args.rows]
    chats = [script.common.chat_of(json.loads(line)) for line in lines]
    rows = script.encode_rows(chats, script.UNKNOWN, args.base)
    model, tokenizer = load_model(args.base)
    options = GREEDY | {"max_tokens": args.max_tokens}
    for name in "batch_tokens", "reply_batch":
        options[name] = script.parser.get_default(name)
    options = SimpleNamespace(**options)
    arrays, asked = batches(rows, options.batch_tokens), rows[: args.replies]

    def bare():
        for array in arrays:
            mx.eval(model(array))

    def one_by_one():
        for row in asked:
            prompt = row.tokens[: row.start]
            generate(model, tokenizer, prompt, max_tokens=args.max_tokens)

    def losses():
        script.measure_losses(model, rows, options, "")

    def replies():
        script.write_replies(model, tokenizer, asked, options, "")

    print(f"{mx.default_device()}, mlx {mx.__version__}, {args.base.name}")
    met = race(f"loss of {len(rows)} rows", "bare", bare, losses, args.repeats)
    met &= race(f"{len(asked)} replies", "one by one", one_by_one, replies, args.repeats)
    sys.exit(not met)


if __name__ == "__main__":
    main()
