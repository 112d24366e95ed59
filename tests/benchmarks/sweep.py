"""Compare recipes: train each, fuse it as fuse.sh does, and score what comes out on all validation rows.

    python tests/benchmarks/sweep.py models/base/MODEL data/for_train/VERSION --jobs 8
    python tests/benchmarks/sweep.py models/base/MODEL data/for_train/VERSION --only 'rate *' --set scale=10

A line goes to --out (tab-separated) as soon as a run is done; runs that stand there already are not repeated. All runs
see the same number of rows unless their recipe says otherwise, and the tokens that they trained on stand in the table.
The loss is in nats per token of the completions, the end-of-turn token counted, padding not. Small models leave a GPU
mostly idle, so several runs share one (--jobs); they are processes of their own and do not change each other's result,
but a run that finds no memory left is lost, and its line says so. --set 'checkpoint="last"' saves the validations.
"""

import argparse
import csv
import fnmatch
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
EMBEDDINGS = ["model.embed_tokens"]
# What fine_tune.sh does. Keys are those of mlx_lm.lora's config; besides: rank, scale, dropout, keys (matrices to
# adapt; None: all of the layers, no embeddings), schedule (linear or cosine to 0, constant), warmup (updates),
# bias_correction and betas (of Adam; None: mlx's), rows (to train on), epochs (passes over rows that are taken evenly
# from the file, so that together they are the rows to train on; 0: any rows of the file), checkpoint (best or last),
# bits (of the fused model), shuffle (rows not ordered by length), context (lines of the prompt that stay; None: all),
# rate_times (factor on the learning rate).
DEFAULTS = {
    "learning_rate": 2e-4, "schedule": "linear", "warmup": 10, "optimizer": "adam", "bias_correction": True,
    "fine_tune_type": "lora", "num_layers": -1, "rank": 32, "scale": 10.0, "dropout": 0.0,
    "keys": [*ATTENTION, *MLP, *EMBEDDINGS], "batch_size": 2, "mask_prompt": False, "max_seq_length": 1024,
    "rows": 1200, "checkpoint": "best", "bits": 8, "shuffle": False, "context": None, "rate_times": 1,
    "betas": None, "epochs": 0,
}  # fmt: skip
RATES = (1e-5, 3e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3)
RECIPES = {
    "defaults": {},
    "mlx-lm's own": {"learning_rate": 1e-5, "schedule": "constant", "warmup": 0, "num_layers": 16, "rank": 8,
                     "scale": 20.0, "keys": None, "batch_size": 4, "bias_correction": False, "shuffle": True,
                     "checkpoint": "last", "bits": 16},
    **{f"rate {rate}": {"learning_rate": rate} for rate in RATES},
    **{f"rate {rate}, no bias correction": {"learning_rate": rate, "bias_correction": False} for rate in RATES},
    **{f"warmup {n}": {"warmup": n} for n in (0, 10, 30, 60)},
    **{f"schedule {name}": {"schedule": name} for name in ("linear", "constant", "cosine")},
    **{f"rank {n}": {"rank": n} for n in (4, 8, 16, 32, 64)},
    **{f"rank {n}, rate x {times}": {"rank": n, "rate_times": times}
       for n, times in ((8, 2), (8, 3), (16, 1.4), (64, 0.5), (64, 0.7))},
    **{f"scale {n}": {"scale": n} for n in (2.0, 5.0, 10.0, 20.0, 40.0)},
    **{f"scale {n}, rate x {times}": {"scale": n, "rate_times": times}
       for n, times in ((10.0, 2), (10.0, 3), (5.0, 4), (2.0, 10), (40.0, 0.5))},
    **{f"layers {n}": {"num_layers": n} for n in (4, 8, 16, -1)},
    "no embeddings": {"keys": None},
    "attention and embeddings": {"keys": [*ATTENTION, *EMBEDDINGS]},
    "attention alone": {"keys": ATTENTION},
    "mlp alone": {"keys": MLP},
    "query and value alone": {"keys": ["self_attn.q_proj", "self_attn.v_proj"]},
    **{f"dropout {p}": {"dropout": p} for p in (0.05, 0.1)},
    **{f"batch {n}": {"batch_size": n} for n in (1, 2, 4, 8, 16)},
    **{f"batch {n}, rate x {times}": {"batch_size": n, "rate_times": times}
       for n, times in ((1, 0.5), (1, 0.7), (4, 1.4), (4, 2), (8, 2), (16, 2.8))},
    "mask": {"mask_prompt": True},
    "mask, batch 16": {"mask_prompt": True, "batch_size": 16},
    **{f"mask, rate x {times}": {"mask_prompt": True, "rate_times": times} for times in (0.3, 2)},
    "dora": {"fine_tune_type": "dora"},
    "adamw": {"optimizer": "adamw"},
    **{f"betas 0.9 {b}": {"betas": [0.9, b]} for b in (0.95, 0.99)},
    **{f"muon {rate}": {"optimizer": "muon", "learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3, 1e-2)},
    "shuffled rows": {"shuffle": True},
    **{f"context {n}": {"context": n} for n in (3, 5)},
    **{f"{n} epochs": {"epochs": n} for n in (1, 2, 4)},
    **{f"{n} rows": {"rows": n} for n in (240, 600, 2400, 4800)},
    "last checkpoint": {"checkpoint": "last"},
}  # fmt: skip


def run(*arguments):
    """Run a command and return its output; raise RuntimeError with the end of the output if it fails."""
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(" / ".join(done.stdout.strip().splitlines()[-3:]))
    return done.stdout


def mlx_lm(command, *arguments):
    return run(sys.executable, "-m", "mlx_lm", command, *map(str, arguments))


def read_rows(path, context=None):
    """Return [{"prompt": …, "completion": …}]; of the prompt's chat the last `context` lines, or all."""
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    for row in rows if context else []:
        chat, instruction = row["prompt"].rsplit("\n\n", 1)
        row["prompt"] = "\n".join(chat.split("\n")[-context:]) + "\n\n" + instruction
    return rows


def write_data(source, target, recipe, seed):
    target.mkdir()
    for name in "train", "valid":
        rows = read_rows(source / f"{name}.jsonl", recipe["context"])
        if name == "train" and recipe["epochs"]:
            rows = rows[:: max(1, len(rows) * recipe["epochs"] // recipe["rows"])]
        if recipe["shuffle"]:
            random.Random(seed).shuffle(rows)
        (target / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def config(recipe, seed):
    """Return the recipe as mlx_lm.lora reads it: validation and a checkpoint after every third of the run.

    Where the last checkpoint is taken anyway, validation is cut to one batch: it would take as long as the training.
    """
    iters = max(3, recipe["rows"] // recipe["batch_size"])
    best = recipe["checkpoint"] == "best"
    rate, warmup = recipe["learning_rate"] * recipe["rate_times"], min(recipe["warmup"], iters // 2)
    shape, arguments = {
        "constant": ("linear_schedule", [rate, rate, iters]),
        "linear": ("linear_schedule", [rate, 0.0, iters - warmup]),
        "cosine": ("cosine_decay", [rate, iters - warmup, 0.0]),
    }[recipe["schedule"]]
    lora = {key: recipe[key] for key in ("rank", "scale", "dropout", "keys") if recipe[key] is not None}
    same = ("fine_tune_type", "num_layers", "optimizer", "batch_size", "mask_prompt", "max_seq_length")
    adam = {"bias_correction": True} if recipe["bias_correction"] else {}
    adam |= {"betas": recipe["betas"]} if recipe["betas"] else {}
    return {key: recipe[key] for key in same} | {
        "train": True, "seed": seed, "iters": iters, "val_batches": -1 if best else 1,
        "steps_per_eval": iters // 3, "save_every": iters // 3, "lora_parameters": lora,
        "lr_schedule": {"name": shape, "arguments": arguments, "warmup": warmup},
        "optimizer_config": {"adam": adam, "adamw": adam},
    }  # fmt: skip


def train(base, data, folder, recipe, seed=0):
    """Train into the new folder/adapter with the chosen checkpoint as adapters.safetensors.

    Return the validation loss that mlx_lm.lora prints for it, its iteration and the number of tokens trained on.
    """
    adapter = folder / "adapter"
    write_data(data, folder / "data", recipe, seed)
    (folder / "config.yaml").write_text(json.dumps(config(recipe, seed)))  # JSON is YAML
    log = mlx_lm("lora", "--config", folder / "config.yaml", "--model", base, "--data", folder / "data",
                 "--adapter-path", adapter)  # fmt: skip
    log = re.sub(r"\x1b\[[0-9;]*m", "", log)
    (folder / "training.log").write_text(log)
    tokens = re.findall(r"[▼▲] +[\d,]+ +([\d.]+)k", log)[-1]
    losses = [(float(loss), int(n)) for n, loss in re.findall(r"(\d+) +val +(\S+)", log)]
    saved = [(loss, n) for loss, n in losses if (adapter / f"{n:07d}_adapters.safetensors").exists()]
    loss, iteration = losses[-1]
    if recipe["checkpoint"] == "best":
        loss, iteration = min(saved, key=lambda pair: (pair[0] != pair[0], pair))  # NaN is worst
        shutil.copy(adapter / f"{iteration:07d}_adapters.safetensors", adapter / "adapters.safetensors")
    return loss, iteration, float(tokens)


def fuse(base, folder, bits, group_size=64):
    """Fuse folder/adapter into base, at 16 bits and then at `bits`; return the folder of the result."""
    exact, result = folder / "fused16", folder / f"fused{bits}-{group_size}"
    if not exact.exists():
        mlx_lm("fuse", "--model", base, "--adapter-path", folder / "adapter", "--save-path", exact, "--dequantize")
    if bits == 16:
        return exact
    mlx_lm("convert", "--hf-path", exact, "--mlx-path", result, "-q", "--q-bits", bits, "--q-group-size", group_size)
    return result


def completion_loss(model_dir, rows, adapter=None, budget=2048):
    """Return the mean negative log-probability, in nats, of the completions' tokens, given prompt and template.

    Rows of like length go through the model together, `budget` tokens at a time.
    """
    import mlx.core as mx
    from mlx_lm import load

    mx.set_cache_limit(0)  # runs share the memory of one GPU
    model, tokenizer = load(str(model_dir), adapter_path=adapter and str(adapter))
    model.eval()
    texts = []
    for row in rows:
        user, reply = {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}
        start = len(tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False))
        texts.append((tokenizer.apply_chat_template([user, reply], return_dict=False), start))
    texts.sort(key=lambda text: -len(text[0]))
    total = count = 0
    while texts:
        width = len(texts[0][0])
        batch, texts = texts[: max(1, budget // width)], texts[max(1, budget // width) :]
        logits = model(mx.array([tokens + [0] * (width - len(tokens)) for tokens, _ in batch])[:, :-1])
        where = [(i, j - 1, tokens[j]) for i, (tokens, start) in enumerate(batch) for j in range(start, len(tokens))]
        row, place, target = map(mx.array, zip(*where, strict=True))
        chosen = logits[row, place].astype(mx.float32)  # only what is scored is cast: the vocabulary is large
        total += (mx.logsumexp(chosen, axis=-1) - chosen[mx.arange(len(where)), target]).sum().item()
        count += len(where)
    return total / count


def measure(base, data, name, recipe, seed, out):
    started = time.time()
    line = {"base": base.name, "recipe": name, "seed": seed}
    try:
        with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
            folder = Path(folder)
            val, iteration, tokens = train(base, data, folder, recipe, seed)
            fused = fuse(base, folder, recipe["bits"])
            loss = run(sys.executable, __file__, str(base), str(folder / "data"), "--score", str(fused)).split()[-1]
            line |= {"loss": f"{float(loss):.4f}", "val_loss": val, "iteration": iteration, "k_tokens": tokens}
    except RuntimeError as error:
        line |= {"loss": "nan", "val_loss": str(error)[:300]}
    line |= {"seconds": round(time.time() - started), "settings": json.dumps(recipe, sort_keys=True)}
    with out.open("a", encoding="utf-8") as file:
        print(*(line.get(key, "") for key in COLUMNS), sep="\t", file=file)
    print(f"{line['base']}  {name}  seed {seed}: {line['loss']}  ({line['seconds']} s)", flush=True)


COLUMNS = ["base", "recipe", "seed", "loss", "val_loss", "iteration", "k_tokens", "seconds", "settings"]


def read_results(out):
    with out.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", default=["*"], help="names of recipes, with * for any text")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other defaults for all recipes")
    parser.add_argument("--label", default="", help="put before the names of the recipes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("sweep.tsv"))
    parser.add_argument("--score", type=Path, help="print the loss of this model on the validation rows, no more")
    s = parser.parse_args()
    if s.score:
        print(completion_loss(s.score, read_rows(s.data / "valid.jsonl")))
        return
    changes = {key: json.loads(value) for key, value in (item.split("=", 1) for item in s.set)}
    if not s.out.exists():
        s.out.write_text("\t".join(COLUMNS) + "\n")
    done = {(r["base"], r["seed"], r["settings"]) for r in read_results(s.out) if r["loss"] != "nan"}
    runs = []
    with ThreadPoolExecutor(s.jobs) as pool:
        for name in (name for name in RECIPES if any(fnmatch.fnmatchcase(name, pattern) for pattern in s.only)):
            recipe = DEFAULTS | changes | RECIPES[name]
            for seed in s.seeds:
                if (key := (s.base.name, str(seed), json.dumps(recipe, sort_keys=True))) not in done:
                    done.add(key)
                    runs.append(pool.submit(measure, s.base, s.data, s.label + name, recipe, seed, s.out))
    for one in runs:
        one.result()  # an error of the script's own shows here
    results = [r for r in read_results(s.out) if r["base"] == s.base.name and r["loss"] != "nan"]
    for r in sorted(results, key=lambda r: float(r["loss"])):
        print(f"{r['loss']}  {r['recipe']:40} seed {r['seed']}  iteration {r['iteration']}, {r['k_tokens']}k tokens")


if __name__ == "__main__":
    main()
