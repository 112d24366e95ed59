"""What fine_tune.sh adds to a bare mlx_lm.lora with the same settings; run it on a machine that does nothing else.

    python tests/tiny_base.py && MODEL=tiny-gemma-3 python build_train.py
    python tests/benchmarks/fine_tune.py --iters 200 --repeat 3

Runs both in turn and prints the seconds of each, the difference and the ratio of the medians. The target is at most
2 % plus 2 seconds.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def seconds(command, env):
    start = time.perf_counter()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-gemma-3")
    parser.add_argument("--version", default="v1")
    parser.add_argument("--iters", default="200")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    settings = {"MODEL": args.model, "VERSION": args.version, "ITERS": args.iters, "EVAL_EVERY": "50", "PATIENCE": "0"}
    env = os.environ | settings | {"HF_HUB_OFFLINE": "1"}
    ours = ["bash", ROOT / "fine_tune.sh"]
    subprocess.run(ours, env=env, check=True, stdout=subprocess.DEVNULL)  # warms the caches, leaves the settings
    config = ROOT / f"models/adapters/adapter-{args.version}_{args.model}/lora_config.yaml"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "config.yaml")
        copy.write_bytes(config.read_bytes())
        bare = ["mlx_lm.lora", "--train", "--config", copy, "--model", ROOT / f"models/base/{args.model}"]
        bare += ["--data", ROOT / f"data/for_train/{args.version}", "--adapter-path", Path(folder, "adapter")]
        times = {"mlx_lm.lora": [], "fine_tune.sh": []}
        for turn in range(args.repeat):
            for name, command in [("mlx_lm.lora", bare), ("fine_tune.sh", ours)]:
                times[name].append(seconds(command, env))
                print(f"{turn + 1}  {name:12}  {times[name][-1]:7.2f} s", flush=True)
    plain, whole = (statistics.median(times[name]) for name in ("mlx_lm.lora", "fine_tune.sh"))
    print(f"medians: {plain:.2f} s and {whole:.2f} s: {whole - plain:+.2f} s, ratio {whole / plain:.3f}")


if __name__ == "__main__":
    main()
