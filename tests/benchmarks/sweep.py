"""Compare settings of fine_tune.sh by the loss of the replies.

    python tests/benchmarks/sweep.py --model MODEL --version VERSION --jobs 8
    python tests/benchmarks/sweep.py --only 'rate *' --set ITERS=1200 --seeds 0 1 2
    python tests/benchmarks/sweep.py --only 'rank 4' --set ITERS=4     # half a minute

Runs ./fine_tune.sh once for each recipe and seed, on data/for_train/VERSION (or evenly taken rows
of it), and writes a line to --out as soon as a run is done; what stands there already is not run
again. `valid` is the loss of the checkpoint that was kept, `test` its loss on test.jsonl, rows that
chose nothing, if that file is beside valid.jsonl: nats per token of the replies, end of turn
included. Small models leave a GPU mostly idle, so several runs share one (--jobs). At the end it
prints all runs, the best first, `valid` and `test` before the recipe:

    7.6380  7.6380  rank 4                   seed 0  best 4
"""

import argparse
import csv
import fnmatch
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RATES = (2e-5, 5e-5, 1e-4, 2e-4, 4e-4, 1e-3)
# Settings of fine_tune.sh; besides: ROWS to train on, EPOCHS over them instead of ITERS.
RECIPES = {
    "defaults": {},
    **{f"rate {rate}": {"LEARNING_RATE": rate} for rate in RATES},
    **{f"scale {n}": {"SCALE": n} for n in (2.0, 5.0, 20.0)},
    **{f"rank {n}": {"RANK": n} for n in (4, 8, 16, 64)},
    **{f"layers {n}": {"NUM_LAYERS": n} for n in (4, 8, 16)},
    **{f"batch {n}": {"BATCH_SIZE": n} for n in (1, 4, 8)},
    **{f"dropout {p}": {"DROPOUT": p} for p in (0.05, 0.1)},
    "no embeddings": {"EMBEDDINGS": 0},
    "mask": {"MASK_PROMPT": 1},
    **{
        f"{rows} rows, {epochs} epochs": {"ROWS": rows, "EPOCHS": epochs}
        for rows in (500, 2000, 8000)
        for epochs in (1, 2, 4)
    },
}
COLUMNS = ["model", "data", "recipe", "seed", "valid", "test", "best", "seconds", "settings"]


def write_data(source, target, count):
    """Link the data of a run: `count` rows that are evenly taken from train.jsonl, or all."""
    target.mkdir(parents=True)
    for file in source.glob("*.jsonl"):
        shutil.copy(file, target)
    if count:
        lines = (source / "train.jsonl").read_bytes().splitlines(keepends=True)
        if count > len(lines):
            raise RuntimeError(f"there are only {len(lines)} rows")
        even = [lines[i * len(lines) // count] for i in range(count)]
        (target / "train.jsonl").write_bytes(b"".join(even))


def settings_of(recipe):
    """Return environment variables: {"ROWS": 500, "EPOCHS": 2} → ITERS=500 in batches of 2."""
    settings = dict(recipe)
    rows, epochs = settings.pop("ROWS", 0), settings.pop("EPOCHS", 0)
    if rows:
        settings["ITERS"] = rows * epochs // settings.get("BATCH_SIZE", 2)
        settings["EVAL_EVERY"] = max(1, settings["ITERS"] // 4)
    return {name: str(value) for name, value in settings.items()}


def test_loss(base, adapter, rows):
    """Return the loss of the replies in nats per token, as test_on_validation.py reckons it."""
    spec = importlib.util.spec_from_file_location("stage_4", ROOT / "test_on_validation.py")
    stage_4 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage_4)
    model, tokenizer = stage_4.load("./fine_tune.sh", base, adapter)
    rows = stage_4.read_rows(argparse.Namespace(version="VERSION"), rows, base, tokenizer)
    nats = stage_4.row_losses(model, rows, batch_tokens=2048)
    return nats.sum() / sum(row.length() for row in rows)


def measure(s, name, recipe, seed):
    """Run fine_tune.sh in a version of its own, append a line to --out, tidy up."""
    version = f"sweep-{s.version}-{name}-{seed}".replace(" ", "_").replace(",", "")
    data, adapter = (
        ROOT / f"data/for_train/{version}",
        ROOT / f"models/adapters/adapter-{version}_{s.model}",
    )
    line = {"model": s.model, "data": s.version, "recipe": name, "seed": seed}
    line["settings"] = json.dumps(recipe, sort_keys=True)
    names = {"VERSION": version, "MODEL": s.model, "SEED": str(seed), "CHECK_MEMORY": "0"}
    started = time.time()
    try:
        shutil.rmtree(data, ignore_errors=True)
        write_data(ROOT / f"data/for_train/{s.version}", data, recipe.get("ROWS", 0))
        done = subprocess.run(
            ["bash", ROOT / "fine_tune.sh"],
            env=os.environ | settings_of(recipe) | names,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        with (adapter / "losses.csv").open() as file:
            losses = [row for row in csv.DictReader(file) if row["val_loss"]]
        best = min(losses[1:], key=lambda row: float(row["val_loss"]))
        line |= {"valid": best["val_loss"], "best": best["iteration"]}
        if (data / "test.jsonl").exists():
            base = ROOT / f"models/base/{s.model}"
            command = [sys.executable, __file__, "--score", base, adapter, data / "test.jsonl"]
            scored = subprocess.run(command, capture_output=True, text=True, check=True)
            line["test"] = f"{float(scored.stdout.split()[-1]):.4f}"
    except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
        line["valid"] = f"failed: {error}"[:300]
    line["seconds"] = round(time.time() - started)
    with s.out.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS, delimiter="\t").writerow(line)
    print(f"{name:24} seed {seed}: {line['valid']} ({line['seconds']} s)", flush=True)
    for folder in (data, adapter):
        if not s.keep:
            shutil.rmtree(folder, ignore_errors=True)


def read_results(out):
    with out.open(newline="") as file:
        return [row for row in csv.DictReader(file, delimiter="\t") if row["valid"][0].isdigit()]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-gemma-3")
    parser.add_argument("--version", default="sample")
    parser.add_argument("--only", nargs="+", default=["*"], help="recipes; * for any text")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="for all")
    parser.add_argument("--label", default="", help="put before the names of the recipes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("sweep.tsv"))
    parser.add_argument("--keep", action="store_true", help="the adapters and their data")
    parser.add_argument("--score", type=Path, nargs=3, help="base, adapter, rows: print the loss")
    s = parser.parse_args()
    if s.score:
        print(test_loss(*s.score))
        return
    if not s.out.exists():
        s.out.write_text("\t".join(COLUMNS) + "\n")
    done = {(r["model"], r["data"], r["recipe"], r["seed"]) for r in read_results(s.out)}
    changes = dict(item.split("=", 1) for item in s.set)
    runs = []
    with ThreadPoolExecutor(s.jobs) as pool:
        for name, recipe in RECIPES.items():
            for seed in s.seeds if any(fnmatch.fnmatch(name, p) for p in s.only) else []:
                label = s.label + name
                if (s.model, s.version, label, str(seed)) not in done:
                    runs.append(pool.submit(measure, s, label, changes | recipe, seed))
    for run in runs:
        run.result()  # an error of this script's own shows here
    results = [r for r in read_results(s.out) if (r["model"], r["data"]) == (s.model, s.version)]
    if not results:
        sys.exit("error: no run succeeded. FIX: mend what the lines above say")
    for r in sorted(results, key=lambda r: float(r["valid"])):
        print(f"{r['valid']}  {r['test']}  {r['recipe']:24} seed {r['seed']}  best {r['best']}")


if __name__ == "__main__":
    main()
