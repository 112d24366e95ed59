"""What test_on_validation.py costs beyond the models' own work, as ratios within one run.

    python tests/benchmarks/test_on_validation.py        # tiny base, rows of the sample
    python tests/benchmarks/test_on_validation.py --base models/base/MODEL \\
        --data data/for_train/v1/valid.jsonl

1. Loss of 400 rows under base, adapter and fused model, against the bare forward passes of the
   same batches: at most 1.1 times as long.
2. Replies to 100 rows, with the default of --reply-batch, against one
   generate() after the other: at most 1.1 times as long. Other batch sizes stand beside it.
   Temperature 0, so that both sides write the same tokens.

Adapter and fused model are made of --base in a temporary folder. Medians of --repeats after a
warm-up, in which a GPU compiles. Exit code 1 if a limit is not met. It prints

    loss, base     bare passes    0.76 s, script    0.69 s
    loss of 8 rows, all models: 0.934 times the bare passes
    8 replies, script, 8 at a time               0.68 s,  2.86 times as fast
    limits met

`--rows 8 --replies 8 --sizes 8 --max-tokens 8 --repeats 1` takes half a minute.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm import generate, load
from mlx_lm.sample_utils import make_sampler

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SAMPLE = REPOSITORY / "data/raw/messages_sample.json"
spec = importlib.util.spec_from_file_location("stage_4", REPOSITORY / "test_on_validation.py")
stage_4 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage_4)


def make_base(folder):
    """Build the tiny base in a project of its own; return its folder."""
    (folder / "data/raw").mkdir(parents=True)
    (folder / "tests").mkdir()
    shutil.copy(SAMPLE, folder / "data/raw")
    shutil.copy(REPOSITORY / "tests/tiny_base.py", folder / "tests")
    script = folder / "tests/tiny_base.py"
    subprocess.run([sys.executable, script], check=True, stdout=subprocess.DEVNULL)
    return folder / "models/base/tiny-gemma-3"


def make_data(folder, data, count):
    """Write train.jsonl and valid.jsonl, the same rows in both; return the latter."""
    if data:
        lines = data.read_text("utf-8").splitlines()
    else:
        lines = [
            json.dumps({"prompt": "\n".join(e["previous_messages"]), "completion": e["message"]})
            for e in json.loads(SAMPLE.read_bytes())
            if 0 < len(e["message"]) < 200
        ]
    lines = random.Random(0).sample(lines, min(count, len(lines)))
    for name in "train", "valid":
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "valid.jsonl"


def make_models(folder, base):
    """Return an adapter and a fused model, made of `base` and the rows in `folder`."""
    adapter, fused = folder / "adapter", folder / "fused"
    train = ["lora", "--train", "--iters", "2", "--batch-size", "2", "--num-layers", "-1"]
    for command in (
        [*train, "--data", folder, "--adapter-path", adapter],
        ["fuse", "--adapter-path", adapter, "--save-path", fused],
    ):
        command = [sys.executable, "-m", "mlx_lm", *command, "--model", base]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
    return adapter, fused


def seconds(run):
    """Return how long a function takes."""
    mx.synchronize()
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        run()
    mx.synchronize()
    return time.perf_counter() - start


def race(runs, repeats):
    """Return {name: median seconds} of functions that take turns, after a warm-up."""
    times = {name: [] for name in runs}
    for _ in range(1 + repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
            print(f"  {name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def batches(rows, budget):
    """Return the token arrays that the script makes: longest rows first, padded, by the budget."""
    left = sorted((row.tokens for row in rows), key=len, reverse=True)
    arrays = []
    while left:
        width = len(left[0])
        size = max(1, budget // width)
        arrays.append(mx.array([row + [0] * (width - len(row)) for row in left[:size]])[:, :-1])
        del left[:size]
    mx.eval(arrays)
    return arrays


def race_losses(models, rows, args):
    """Return whether the losses of all models take no longer than they may."""
    bare = ours = 0
    arrays = batches(rows, args.batch_tokens)
    for name, (model, _) in models.items():
        runs = {
            "bare": lambda m=model: [mx.eval(m(array)) for array in arrays],
            "ours": lambda m=model: stage_4.row_losses(m, rows, args.batch_tokens),
        }
        times = race(runs, args.repeats)
        bare, ours = bare + times["bare"], ours + times["ours"]
        print(f"loss, {name:8} bare passes {times['bare']:7.2f} s, script {times['ours']:7.2f} s")
    print(f"loss of {len(rows)} rows, all models: {ours / bare:.3f} times the bare passes")
    return ours <= 1.1 * bare


def race_replies(model, tokenizer, rows, args):
    """Return whether the replies take no longer than they may."""
    rows = rows[: args.replies]

    def guide():
        """Answer one by one, as the guide does."""
        for row in rows:
            sampler = make_sampler(0.0)
            generate(model, tokenizer, row.ask, max_tokens=args.max_tokens, sampler=sampler)

    def script(size):
        options = argparse.Namespace(reply_batch=size, max_tokens=args.max_tokens, seed=0)
        options.temperature, options.top_p, options.top_k = 0.0, 1.0, 0
        stage_4.write_replies(model, tokenizer, rows, options, {})

    runs = {"guide": guide}
    usual = stage_4.parser.get_default("reply_batch")
    runs |= {n: lambda n=n: script(n) for n in dict.fromkeys([usual, *args.sizes])}
    times = race(runs, args.repeats)
    for name, took in times.items():
        label = "one generate() after the other" if name == "guide" else f"script, {name} at a time"
        speed = times["guide"] / took
        print(f"{len(rows)} replies, {label:30} {took:7.2f} s, {speed:5.2f} times as fast")
    return times[usual] <= 1.1 * times["guide"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--replies", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 8, 32])
    args = parser.parse_args()
    if args.base and not args.base.is_dir():
        sys.exit(f"error: there is no {args.base}. FIX: python tests/tiny_base.py")
    if args.data and not args.data.is_file():
        sys.exit(f"error: there is no {args.data}. FIX: python build_train.py")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        base = args.base or make_base(folder)
        data = make_data(folder, args.data, args.rows)
        adapter, fused = make_models(folder, base)
        print(f"{mx.default_device()}, mlx {mx.__version__}, {base.name}")
        models = {
            "base": load(str(base)),
            "adapter": load(str(base), adapter_path=str(adapter)),
            "fused": load(str(fused)),
        }
        settings = argparse.Namespace(version="v1")
        rows = stage_4.read_rows(settings, data, base, models["base"][1])
        met = race_losses(models, rows, args)
        met &= race_replies(*models["fused"], rows, args)
    print("limits met" if met else "LIMITS NOT MET")
    sys.exit(not met)


if __name__ == "__main__":
    main()
