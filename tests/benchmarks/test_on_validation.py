"""What test_on_validation.py costs beyond the models' own work: ratios within one run, so that they hold anywhere.

    python tests/benchmarks/test_on_validation.py                                     # tiny base, rows of the sample
    python tests/benchmarks/test_on_validation.py --base models/base/MODEL --data data/for_train/v1/valid.jsonl

1. Loss of 400 rows under base, adapter and fused model, against the bare forward passes of the same batches: at most
   1.2 times as long. Tokens are made before, models are loaded before, on both sides.
2. Replies to 100 rows, with the default of --reply-batch (1 on a CPU, else 8), against the loop of the guide, one
   generate() after the other: at least as fast. The other batch sizes are shown beside it. Temperature 0, so that both
   sides write the same tokens.

Adapter and fused model are made of --base in a temporary folder. Medians of --repeats after a warm-up (its seconds
are printed too: a GPU compiles then). Exit code 1 if a limit is not met. Needs mlx, mlx-lm and what the script imports.
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
spec = importlib.util.spec_from_file_location("stage_4", REPOSITORY / "test_on_validation.py")
stage_4 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage_4)


def make(folder, base, data, count):
    """Return (base, adapter, fused, rows file), made in `folder` where they are not given."""
    shutil.copytree(REPOSITORY / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data/raw").mkdir(parents=True)
    shutil.copy(REPOSITORY / "data/raw/messages_v1.json", folder / "data/raw")
    if not base:
        subprocess.run([sys.executable, folder / "tests/tiny_base.py"], check=True, stdout=subprocess.DEVNULL)
        base = folder / "models/base/tiny-gemma-3"
    if data:
        lines = Path(data).read_text("utf-8").splitlines()
    else:
        entries = json.loads((folder / "data/raw/messages_v1.json").read_text("utf-8"))
        pairs = [{"prompt": "\n".join(e["previous_messages"]), "completion": e["message"]} for e in entries]
        lines = [json.dumps(p) for p in pairs if p["prompt"] and 0 < len(p["completion"]) < 200]
    lines = random.Random(0).sample(lines, min(count, len(lines)))
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    adapter, fused = folder / "adapter", folder / "fused"
    train = f"-m mlx_lm lora --train --iters 2 --val-batches 1 --batch-size 2 --num-layers -1 --data {folder}"
    for command in (
        f"{train} --adapter-path {adapter}",
        f"-m mlx_lm fuse --adapter-path {adapter} --save-path {fused}",
    ):
        done = subprocess.run([sys.executable, *command.split(), "--model", base], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
    return Path(base), adapter, fused, folder / "valid.jsonl"


def seconds(run):
    mx.synchronize()
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        run()
    mx.synchronize()
    return time.perf_counter() - start


def race(runs, repeats):
    """Return {name: (seconds of the warm-up, median seconds)}, the runs taking turns."""
    times = {name: [] for name in runs}
    for _ in range(1 + repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
            print(f"  {name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return {name: (cold, statistics.median(warm)) for name, (cold, *warm) in times.items()}


def batches(rows, budget):
    """Return the token arrays of the batches that the script makes: longest rows first, padded, within the budget."""
    left, out = sorted(rows["tokens"], key=len, reverse=True), []
    while left:
        size = max(1, budget // len(left[0]))
        out.append(mx.array([t + [0] * (len(left[0]) - len(t)) for t in left[:size]])[:, :-1])
        left = left[size:]
    mx.eval(out)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--replies", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 8, 32])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base, adapter, fused, data = make(Path(folder), args.base, args.data, args.rows)
        print(f"{mx.default_device()}, mlx {mx.__version__}, {base.name}")
        rows = stage_4.read_rows(data, load(str(base), lazy=True)[1])
        bare, ours, met = 0, 0, True
        for name, (model_folder, adapter_path) in {
            "base": (base, None), "adapter": (base, adapter), "fused": (fused, None),
        }.items():  # fmt: skip
            model, tokenizer = load(str(model_folder), adapter_path=adapter_path and str(adapter_path))
            arrays = batches(rows, args.batch_tokens)
            times = race(
                {
                    "bare": lambda m=model, a=arrays: [mx.eval(m(x)) for x in a],
                    "ours": lambda m=model: stage_4.row_losses(m, rows, args.batch_tokens),
                },
                args.repeats,
            )
            (cold_bare, b), (cold_ours, o) = times["bare"], times["ours"]
            print(
                f"loss of {len(rows)} rows, {name:7}: bare forward passes {b:7.2f} s, script {o:7.2f} s, "
                f"{o / b:.2f} times (warm-up {cold_bare:.1f} and {cold_ours:.1f} s)"
            )
            bare, ours = bare + b, ours + o
        print(f"loss of all three: {ours:.2f} s against {bare:.2f} s, {ours / bare:.2f} times; limit 1.2")
        met &= ours <= 1.2 * bare

        def guide():
            """One by one, as the guide does."""
            for text in rows["prompt"][: args.replies]:
                chat = [{"role": "user", "content": text}]
                prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
                generate(model, tokenizer, prompt=prompt, max_tokens=args.max_tokens, sampler=make_sampler(0.0))

        def script(size):
            options = argparse.Namespace(reply_batch=size, temperature=0.0, max_tokens=args.max_tokens, seed=0)
            stage_4.write_replies(model, tokenizer, rows["ask"][: args.replies], options, {})

        chosen = 1 if mx.default_device() == mx.cpu else 8
        runs = {"guide": guide, "chosen": lambda: script(chosen)}
        runs |= {n: lambda n=n: script(n) for n in args.sizes if n != chosen}
        times = race(runs, args.repeats)
        for name, (cold, warm) in times.items():
            label = {"guide": "the guide's loop", "chosen": f"the script ({chosen} at a time)"}.get(
                name, f"{name} at a time"
            )
            ratio = times["guide"][1] / warm
            print(
                f"{args.replies} replies, {label:26}: {warm:7.2f} s, {ratio:5.2f} times as fast (warm-up {cold:.1f} s)"
            )
        met &= times["chosen"][1] <= 1.05 * times["guide"][1]  # 5 %: noise between two equal loops
    print("limits met" if met else "LIMITS NOT MET")
    sys.exit(not met)


if __name__ == "__main__":
    main()
