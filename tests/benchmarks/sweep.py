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

# ruff: noqa: E402 (our own modules are found from the root)
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from models.chat_template import load_model
from models.common import read_rows
from models.completion_loss import encode, loss_of_replies

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pandas as pd

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
    """Return the loss of the replies in nats per token, as all scripts count it."""
    model, tokenizer = load_model(base, adapter)
    chats = read_rows(rows, "# write it anew")
    return loss_of_replies(model, [encode(tokenizer, chat) for chat in chats])


def measure(s, name, recipe, seed):
    """Train with a recipe in a version of its own, append a line to --out, tidy up."""
    version = f"sweep-{s.version}-{name}-{seed}".replace(" ", "_").replace(",", "")
    data = ROOT / f"data/for_train/{version}"
    adapter = ROOT / f"models/adapters/adapter-{version}_{s.model}"
    line = {"model": s.model, "data": s.version, "recipe": name, "seed": seed}
    started = time.time()
    try:
        shutil.rmtree(data, ignore_errors=True)
        write_data(ROOT / f"data/for_train/{s.version}", data, recipe.get("ROWS", 0))
        names = {"VERSION": version, "MODEL": s.model, "SEED": str(seed), "CHECK_MEMORY": "0"}
        run(["bash", ROOT / "fine_tune.sh"], settings_of(recipe) | names)
        losses = pd.read_csv(adapter / "losses.csv", index_col="iteration").val_loss[1:]
        line |= {"valid": losses.min(), "best": losses.idxmin()}
        if (data / "test.jsonl").exists():  # in a process of its own, which gives its memory back
            base = ROOT / f"models/base/{s.model}"
            said = run([sys.executable, __file__, "--score", base, adapter, data / "test.jsonl"])
            line["test"] = round(float(said.split()[-1]), 4)
    except (RuntimeError, OSError) as error:
        line["valid"] = f"failed: {error}"[:300]
    line |= {"seconds": round(time.time() - started), "settings": json.dumps(recipe)}
    pd.DataFrame([line], columns=COLUMNS).to_csv(
        s.out, mode="a", sep="\t", header=False, index=False
    )
    print(f"{name:24} seed {seed}: {line['valid']} ({line['seconds']} s)", flush=True)
    for folder in (data, adapter):
        if not s.keep:
            shutil.rmtree(folder, ignore_errors=True)


def run(command, settings=None):
    """Run a command and return what it printed; its error is a RuntimeError."""
    env = os.environ | (settings or {})
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise RuntimeError(said[-1] if said else done.stderr[-200:])
    return done.stdout


def results(s):
    """Return the runs that succeeded with this model and these data, as a table."""
    table = pd.read_csv(s.out, sep="\t", dtype=str, keep_default_na=False)
    mine = (table.model == s.model) & (table.data == s.version)
    return table[mine & ~table.valid.str.startswith("failed")]


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
    done = set(zip(results(s).recipe, results(s).seed, strict=True))
    changes = dict(item.split("=", 1) for item in s.set)
    runs = []
    with ThreadPoolExecutor(s.jobs) as pool:
        for name, recipe in RECIPES.items():
            for seed in s.seeds if any(fnmatch.fnmatch(name, p) for p in s.only) else []:
                if (s.label + name, str(seed)) not in done:
                    runs.append(pool.submit(measure, s, s.label + name, changes | recipe, seed))
    for finished in runs:
        finished.result()  # an error of this script's own shows here
    for r in results(s).sort_values("valid").itertuples():
        print(f"{r.valid}  {r.test}  {r.recipe:24} seed {r.seed}  best {r.best}")


if __name__ == "__main__":
    main()
