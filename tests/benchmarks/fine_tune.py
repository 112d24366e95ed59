"""What fine_tune.sh takes beside a bare mlx_lm.lora; run it on a machine that does nothing else.

    python tests/tiny_base.py
    VERSION=sample MODEL=tiny-gemma-3 python build_train.py
    python tests/benchmarks/fine_tune.py --version sample --model tiny-gemma-3 --iters 60 --every 30

Runs in turn, with the same settings and rows:
    bare        mlx_lm.lora with as many evaluations of all of valid.jsonl as there are checkpoints
    no eval     mlx_lm.lora without any
    ours        fine_tune.sh; `scoring` is the part of it in which the checkpoints are scored
and prints the medians:

    bare 47.37 s  no eval 26.86 s  ours 47.53 s  scoring 18.83 s
    ours / bare: 1.003
    evaluations: 20.51 s by mlx_lm.lora, 18.83 s by ours

The target is ours at most 1.02 times bare. With `--repeat 1` this took three minutes on two cores
that did nothing else.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def seconds(command, env):
    """Return how long a command takes, and how long from its line `scoring` to its line `kept`."""
    start = time.perf_counter()
    marks = {}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            marks[line.split(" ")[0]] = time.perf_counter()
    if process.returncode:
        raise SystemExit(process.returncode)  # it has said why
    scoring = marks.get("kept", 0) - marks.get("scoring", 0)
    return time.perf_counter() - start, scoring


def bare(args, folder, config, evaluate):
    """Return mlx_lm.lora with the settings of fine_tune.sh, or with its own evaluations too."""
    data = folder / ("with" if evaluate else "without")
    data.mkdir()
    source = ROOT / f"data/for_train/{args.version}"
    for name in ("train.jsonl", "valid.jsonl") if evaluate else ("train.jsonl",):
        shutil.copy(source / name, data)
    command = ["mlx_lm.lora", "--train", "--config", config, "--data", data]
    command += ["--model", f"models/base/{args.model}", "--adapter-path", folder / "adapter"]
    return [*command, "--steps-per-eval", args.every, "--val-batches", "-1"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-gemma-3")
    parser.add_argument("--version", default="sample")
    parser.add_argument("--iters", default="200")
    parser.add_argument("--every", default="50", help="batches from one evaluation to the next")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    settings = {"MODEL": args.model, "VERSION": args.version, "ITERS": args.iters}
    env = os.environ | settings | {"EVAL_EVERY": args.every, "RESUME": "0", "HF_HUB_OFFLINE": "1"}
    ours = ["bash", ROOT / "fine_tune.sh"]
    seconds(ours, env)  # warms the caches, leaves the settings
    adapter = ROOT / f"models/adapters/adapter-{args.version}_{args.model}"
    with tempfile.TemporaryDirectory() as folder:
        # mlx-lm writes all its settings there as JSON, which is YAML, too.
        config = Path(shutil.copy(adapter / "adapter_config.json", folder))
        commands = {
            "bare": bare(args, Path(folder), config, evaluate=True),
            "no eval": bare(args, Path(folder), config, evaluate=False),
            "ours": ours,
        }
        times = {name: [] for name in [*commands, "scoring"]}
        for turn in range(1, args.repeat + 1):
            for name, command in commands.items():
                whole, scoring = seconds(command, env)
                times[name].append(whole)
                if scoring:
                    times["scoring"].append(scoring)
                print(f"{turn}  {name:8} {whole:8.2f} s", flush=True)
    median = {name: statistics.median(values) for name, values in times.items()}
    print("  ".join(f"{name} {value:.2f} s" for name, value in median.items()))
    print(f"ours / bare: {median['ours'] / median['bare']:.3f}")
    evaluations = median["bare"] - median["no eval"]
    print(f"evaluations: {evaluations:.2f} s by mlx_lm.lora, {median['scoring']:.2f} s by ours")


if __name__ == "__main__":
    main()
