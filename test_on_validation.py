"""Stage 4: does it work? Test the base model, the adapter and the fused model on the validation set.

    python test_on_validation.py                       # then open data/results/${VERSION}_${MODEL}/report.html

Reads   data/for_train/${VERSION}/valid.jsonl, models/base/${MODEL}/, models/adapters/adapter-${VERSION}_${MODEL}/
        and, if it is there, models/fused/fused-${VERSION}_${MODEL}/
Writes  data/results/${VERSION}_${MODEL}/: report.html (to look at), generations.csv (every reply), metrics.json
Exit    0 done, 1 something is missing or wrong, 2 wrong usage, 130 Ctrl-C (with a report of what was done so far)
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (a Mac's own Python is 3.9)
    sys.exit(f"error: this is Python {sys.version.split()[0]}, 3.11 is needed. FIX: install it, see README.md")

import argparse
import filecmp
import gc
import hashlib
import io
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import time
import unicodedata
from collections import Counter
from contextlib import suppress
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import jinja2
    import mlx.core as mx
    import mlx.nn as nn
    import mlx_lm
    import numpy as np
    import pandas as pd
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.utils import load_tokenizer
    from safetensors import SafetensorError, safe_open
    from tqdm import tqdm
except ImportError as e:
    sys.exit(f"error: {e}. FIX: source venv/bin/activate; pip install -r requirements.txt")
except KeyboardInterrupt:
    sys.exit(130)


# ---- settings: edit a default here, or give the flag for a single run ------------------------------------------------
def settings():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda what: parser.exit(2, f"error: {what}. FIX: python test_on_validation.py --help\n")
    add, env = parser.add_argument, os.environ.get
    # fmt: off
    add("--version", default=env("VERSION", "v1"), help="which data: data/for_train/VERSION")
    add("--model", default=env("MODEL", "gemma-3-text-27b-it-4bit"), help="which model: models/base/MODEL")
    add("--models", default="all", help="all that are there, or some of base,adapter,fused")
    add("--replies", type=int, default=100, help="rows that every model answers, for the figures of style; 0 none")
    add("--show", type=int, default=20, help="how many of these rows the report shows side by side; 0 none")
    add("--temperature", type=float, default=0.8, help="0 always the likeliest word, 1 as the model would, up to 2")
    add("--max-tokens", type=int, default=60, help="tokens of the longest reply")
    add("--seed", type=int, default=0, help="same seed (and --reply-batch): same rows, same replies")
    add("--reply-batch", type=int, default=0, help="replies written at a time; 0 what is fastest on this machine")
    add("--batch-tokens", type=int, default=2048, help="tokens read at a time; lower it if memory runs out")
    # fmt: on
    # ---- end of the settings -----------------------------------------------------------------------------------------
    args = parser.parse_args()
    least = {"replies": 0, "show": 0, "temperature": 0, "max_tokens": 1, "seed": 0, "reply_batch": 0, "batch_tokens": 1}
    for name, limit in least.items():
        if not limit <= getattr(args, name) <= (2 if name == "temperature" else math.inf):
            parser.error(f"argument --{name.replace('_', '-')}: {getattr(args, name)} is out of range")
    if args.models != "all" and not set(args.models.split(",")) <= {"base", "adapter", "fused"}:
        parser.error(f"argument --models: {args.models!a} is neither 'all' nor some of base,adapter,fused")
    if "/" in args.model:
        name = args.model.split("/")[-1]
        fix = f"hf download {args.model} --local-dir models/base/{name}; MODEL={name} python test_on_validation.py"
        fail(f"MODEL={args.model!a} is not the name of a folder in models/base", fix)
    for name in args.version, args.model:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            fail(f"VERSION or MODEL is {name!a}", "use letters, digits, '.', '_' and '-' alone")
    return args


def fail(what, fix):
    sys.exit(f"error: {what}. FIX: {fix}")


def download(model):
    return f"hf download mlx-community/{model} --local-dir models/base/{model}"


# ---- untrusted text --------------------------------------------------------------------------------------------------
def visible(text, longest=None):
    r"""Text that can only be read: an escape character comes out as the four characters \x1b.

    Control characters, bidirectional overrides and lone surrogates are escaped; newlines, tabs and the joiners that
    emoji are made of stay. What is over `longest` characters is cut and counted.
    """
    cut = f" … ({len(text) - longest:,} more characters)" if longest and len(text) > longest else ""
    bad = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t\u200c\u200d"}
    return "".join(c.encode("unicode_escape").decode() if c in bad else c for c in text[:longest]) + cut


def one_line(error):
    return visible(" ".join(str(error).split()), 200)


def defuse(text):
    """A cell that no spreadsheet takes for a formula: "=1+1" becomes "'=1+1".

    Also after a separator or a line break: a spreadsheet that expects ';' (Italy) cuts a comma-separated file there.
    """
    text = visible(text, 32_000).replace("\t", " ")
    return re.sub(r"((?:^|[;\n])\s*)([=+\-@＝＋－＠])", r"\1'\2", text)  # noqa: RUF001


# ---- what is there ---------------------------------------------------------------------------------------------------
def lacking(folder, needed=("config.json", "tokenizer_config.json"), weights="model.safetensors"):
    """Return the files that a folder lacks or has only in part (a download that was cut off), as text; "" if none."""
    shards = read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values()
    bad = [name for name in needed if not (folder / name).exists()]
    for name in sorted(set(shards)) or [weights]:
        try:
            with safe_open(folder / name, "numpy"):
                pass
        except (OSError, SafetensorError):
            bad.append(name)
    return ", ".join(bad)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def find_models(root, args):
    """Return {"base": (folder, adapter folder or None), ...} of the models to test, and a list of warnings."""
    base, of = root / "models/base" / args.model, f"{args.version}_{args.model}"
    adapter, fused = root / f"models/adapters/adapter-{of}", root / f"models/fused/fused-{of}"
    run, warnings = f"VERSION={args.version} MODEL={args.model}", []
    names = ["base", "adapter", "fused"] if args.models == "all" else args.models.split(",")
    if {"base", "adapter"} & set(names) and (bad := lacking(base)):
        fail(f"no whole base model: models/base/{args.model} lacks {bad}", download(args.model))
    if "adapter" in names:
        if bad := lacking(adapter, ["adapter_config.json"], "adapters.safetensors"):
            fix = f"{run} ./fine_tune.sh, or test the base model alone: --models base"
            fail(f"no whole adapter: models/adapters/{adapter.name} lacks {bad}", fix)
        config = adapter / "lora_config.yaml"
        with (root / f"data/for_train/{args.version}/valid.jsonl").open("rb") as valid:
            now = subprocess.run(["cksum"], stdin=valid, capture_output=True, text=True).stdout.split()[:2]
        if config.exists() and f"# valid.jsonl: {' '.join(now)}\n" not in config.read_text(encoding="utf-8"):
            warnings.append("valid.jsonl is not the one of the training: the adapter may have learned some of its rows")
    if args.models == "all" and not fused.exists():
        names.remove("fused")
        warnings.append(f"there is no fused model to test; to make it: {run} ./fuse.sh")
    if "fused" in names:
        if bad := lacking(fused):
            fail(f"no whole fused model: models/fused/{fused.name} lacks {bad}", f"{run} ./fuse.sh")
        source = read_json(fused / "fused_from.json").get("adapter_sha256")
        weights = adapter / "adapters.safetensors"
        if source and weights.exists() and source != hashlib.sha256(weights.read_bytes()).hexdigest():
            warnings.append(f"the fused model was made from another adapter than the one there now: {run} ./fuse.sh")
    folders = {"base": (base, None), "adapter": (base, adapter), "fused": (fused, None)}
    return {name: folders[name] for name in folders if name in names}, warnings


def read_rows(valid, folder, longest):
    """Return the rows of valid.jsonl as dicts, with the tokens that the model in `folder` makes of them.

    "line" number, "prompt", "completion"; "tokens" of the whole chat, "ask" those before the completion, "start" their
    number. The completion includes the end of the turn, as in training. A lone surrogate becomes U+FFFD.
    """
    try:
        tokenizer, config, rows = load_tokenizer(folder), read_json(folder / "config.json"), []
    except Exception as e:  # the Rust part raises Exception itself
        fail(f"the tokenizer in {folder.name} does not load: {one_line(e)}", download(folder.name))
    if not tokenizer.has_chat_template:
        fail(f"{folder.name} has no chat template", "set MODEL to an instruct model (-it, -Instruct)")
    longest = min(longest, config.get("text_config", config).get("max_position_embeddings", math.inf))
    for line, text in enumerate(valid.read_bytes().splitlines(), 1):
        where = f"data/for_train/{valid.parent.name}/valid.jsonl line {line}"
        try:
            row = json.loads(text)
            ask, say = (
                row[k].encode("utf-16", "surrogatepass").decode("utf-16", "replace") for k in ("prompt", "completion")
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            fail(f'{where} is not {{"prompt": text, "completion": text}} in UTF-8', "python build_train.py")
        chat = [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
        tokens = tokenizer.apply_chat_template(chat)
        start = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)
        if len(tokens) > longest:
            fix = "python build_train.py, or a larger --batch-tokens"
            fail(f"{where} has {len(tokens)} tokens, more than {longest}", fix)
        rows.append(dict(line=line, prompt=ask, completion=say, tokens=tokens, ask=start, start=len(start)))
    return rows or fail(f"data/for_train/{valid.parent.name}/valid.jsonl is empty", "python build_train.py")


# ---- one model at a time ---------------------------------------------------------------------------------------------
def progress(steps, label):
    """Yield from a list; show a bar with the time left on a terminal, a line every ten seconds in a pipe."""
    start = shown = time.monotonic()
    for n, step in enumerate(tqdm(steps, label, leave=False) if sys.stderr.isatty() else steps, 1):
        yield step
        now = time.monotonic()
        if not sys.stderr.isatty() and (n == len(steps) or now - shown > 10):
            left, shown = (now - start) / n * (len(steps) - n), now
            print(f"{label} {n}/{len(steps)}, {left:.0f} s left", file=sys.stderr, flush=True)


def row_losses(model, rows, batch_tokens, label=""):
    """Return (sums, counts), one number per row: loss of the completion in nats, tokens of the completion.

    Longest rows first, so that what does not fit into memory shows at once. Only the logits of completions become
    float32: those of all tokens would be 2 GB (2,048 tokens, Gemma's vocabulary of 262,144).
    """
    order, batches = sorted(range(len(rows)), key=lambda i: -len(rows[i]["tokens"])), []
    while order:
        size = max(1, batch_tokens // len(rows[order[0]]["tokens"]))
        batches.append(order[:size])
        del order[:size]
    sums, counts = np.zeros(len(rows)), np.array([len(r["tokens"]) - r["start"] for r in rows])
    for batch in progress(batches, label):
        width = len(rows[batch[0]]["tokens"])
        tokens = np.array([rows[i]["tokens"] + [0] * (width - len(rows[i]["tokens"])) for i in batch])
        scored = [(b, p) for b, i in enumerate(batch) for p in range(rows[i]["start"], len(rows[i]["tokens"]))]
        row, position = np.array(scored).T
        logits = model(mx.array(tokens[:, :-1]))[mx.array(row), mx.array(position - 1)].astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, mx.array(tokens[row, position]))
        sums[batch] = np.bincount(row, np.array(losses), len(batch))
    return sums, counts


def replies_at_a_time(model):
    """Return 8 if a step of 8 replies takes this machine less than three times as long as a step of one, else 1.

    It does on a GPU and with small models; not on a CPU that is busy with the products of a large one.
    """
    best, end = {1: math.inf, 8: math.inf}, time.perf_counter() + 2
    for turn in range(8):  # the best of some turns: the machine may be busy with other things
        for size in best:
            start = time.perf_counter()
            mx.eval(model(mx.zeros((size, 1), dtype=mx.int32)))
            best[size] = min(best[size], time.perf_counter() - start)
        if turn > 1 and time.perf_counter() > end:
            break
    return 8 if best[8] < 3 * best[1] else 1


def write_replies(model, tokenizer, rows, sample, args, replies, label=""):
    """Fill `replies`, {row: text}, batch by batch, so that Ctrl-C keeps what is there."""
    size = args.reply_batch or replies_at_a_time(model)
    options = {"sampler": make_sampler(args.temperature), "max_tokens": args.max_tokens}
    order = sorted(sample, key=lambda i: rows[i]["start"]) if size > 1 else sample
    mx.random.seed(args.seed)
    for batch in progress([order[i : i + size] for i in range(0, len(order), size)], label):
        texts = []
        if size > 1:
            with suppress(ValueError):  # a cache that has no batches, as Llama 4's
                texts = mlx_lm.batch_generate(model, tokenizer, [rows[i]["ask"] for i in batch], **options).texts
        texts = texts or [mlx_lm.generate(model, tokenizer, rows[i]["ask"], **options) for i in batch]
        replies.update((i, visible(text.strip())) for i, text in zip(batch, texts, strict=True))


def test_model(name, folder, adapter, rows, sample, args, result):
    """Fill `result` with sums, counts (see row_losses), replies and seconds. The model is gone when this returns."""
    try:
        model, tokenizer = mlx_lm.load(str(folder), adapter_path=adapter and str(adapter))
    except Exception as e:  # whatever is wrong with the files
        fix = download(args.model) if name == "base" else "./fine_tune.sh" if adapter else "./fuse.sh"
        fail(f"the {name} model does not load: {one_line(e)}", fix)
    start = time.monotonic()
    sums, counts = row_losses(model, rows, args.batch_tokens, f"{name:7} loss")
    result.update(sums=sums, counts=counts, replies={})
    write_replies(model, tokenizer, rows, sample, args, result["replies"], f"{name:7} replies")
    result["seconds"] = time.monotonic() - start


# ---- what came out ---------------------------------------------------------------------------------------------------
def style(replies, prompts):
    """Return figures of replies to prompts (one message of the chat a line); capitals and spaces do not count.

    style(["ok", "Ok", "why?"], ["hi\\nOK", "hi", "hi"]) = {"replies": 3, "length": 2.67 (characters),
    "questions": 0.33, "distinct": 0.67, "repeated": "ok" (None: no reply came twice), "repeated_share": 0.67,
    "copied": 0.33 (the reply is a message of its prompt)}
    """
    if not replies:
        return {"replies": 0}
    said = pd.Series(replies, dtype="object")
    keys, count = said.map(fold), said.map(fold).value_counts()
    return {
        "replies": len(said),
        "length": float(said.map(len).mean()),
        "questions": float(said.str.contains("[?؟？]").mean()),  # noqa: RUF001
        "distinct": len(count) / len(said),
        "repeated": said[(keys == count.index[0]).idxmax()] if count.iloc[0] > 1 else None,
        "repeated_share": float(count.iloc[0] / len(said)),
        "copied": float(np.mean([k in map(fold, p.split("\n")) for k, p in zip(keys, prompts, strict=True)])),
    }


def fold(text):
    return " ".join(text.casefold().split())


def summarize(results, rows, asked):
    """Return {"loss", "perplexity", "style": per model, "kept", "error"}; loss in nats per completion token.

    kept = (base - fused) / (base - adapter) is the share of the improvement that the fused model keeps. error is the
    standard error of the first difference, over rows (a ratio estimate: Cochran, Sampling Techniques, 2.11).
    """
    loss = {m: float(r["sums"].sum() / r["counts"].sum()) for m, r in results.items()}
    out = {"loss": loss, "perplexity": {m: math.exp(min(x, 700)) for m, x in loss.items()}, "kept": None, "error": None}
    texts = {"reference": {i: visible(rows[i]["completion"].strip()) for i in asked}}
    texts |= {m: r["replies"] for m, r in results.items()}
    out["style"] = {m: style(list(t.values()), [rows[i]["prompt"] for i in t]) for m, t in texts.items()}
    tuned = [m for m in loss if m != "base"]
    if "base" in loss and tuned:
        counts, gain = results["base"]["counts"], loss["base"] - loss[tuned[0]]
        rest = results["base"]["sums"] - results[tuned[0]]["sums"] - gain * counts
        out["error"] = float(np.sqrt((rest**2).sum()) / counts.sum())
        if len(tuned) == 2 and gain > 2 * out["error"]:
            out["kept"] = (loss["base"] - loss["fused"]) / gain
    return out


def verdict(out):
    """Return ("good", "mixed" or "bad", a sentence) for what summarize() returned."""
    loss, called = out["loss"], {"base": "base model", "adapter": "adapter", "fused": "fused model"}
    broken = [called[m] for m, x in loss.items() if not math.isfinite(x)]
    if broken:
        fix = "Download the base model again" if "base model" in broken else "Train again with a lower learning rate"
        return "bad", f"Broken: the loss of the {' and the '.join(broken)} is not a number. {fix}."
    tuned = [m for m in loss if m != "base"]
    if "base" not in loss or not tuned:
        each = ", ".join(f"{called[m]} {x:.2f}" for m, x in loss.items())
        return "mixed", f"Loss of the {each}: whether training helped, a test of base model and adapter together says."
    gain, pair = loss["base"] - loss[tuned[0]], f"loss {loss[tuned[0]]:.2f} instead of {loss['base']:.2f}"
    if abs(gain) <= 2 * out["error"]:
        kind, text = "mixed", f"no better than the base: {pair}, which may be chance. Train longer, or on more data"
    elif gain < 0:
        kind, text = "bad", f"worse than the base: {pair}. Train with a lower learning rate, or on more data"
    else:
        kind, text = "good", f"better than the base: {pair}"
    text = f"The {called[tuned[0]]} is {text}"
    if out["kept"] is not None and out["kept"] >= 0.9:
        text += f"; the fused model keeps {100 * out['kept']:.1f} % of it"
    elif out["kept"] is not None:
        kind, kept = "bad", f"keeps only {100 * out['kept']:.0f} % of it" if out["kept"] > 0 else "has lost all of it"
        text += f", but the fused model {kept} (loss {loss['fused']:.2f}). Fuse again: FUSED_BITS=8 ./fuse.sh"
    for m in tuned:
        share = out["style"][m].get("repeated_share", 0)
        if out["style"][m]["replies"] >= 5 and share >= 0.3 and share > 2 * out["style"]["reference"]["repeated_share"]:
            same = visible(out["style"][m]["repeated"], 40).replace("\n", " ") or "nothing"
            text += f". But the {called[m]} has collapsed: it answers {100 * share:.0f} % of the rows “{same}”"
            kind = "bad"
            break
    return kind, text + "."


def table(out):
    """Return the figures as a DataFrame of text, a column for the reference and for each model."""
    figures = {
        "loss per completion token": {m: f"{x:.4f}" for m, x in out["loss"].items()},
        "perplexity": {m: f"{x:,.2f}" if x < 1000 else f"{x:,.0f}" for m, x in out["perplexity"].items()},
        "improvement kept": {} if out["kept"] is None else {"fused": f"{100 * out['kept']:.1f} %"},
    }
    for m, s in out["style"].items():
        if s["replies"]:
            same = s["repeated"] and f"{s['repeated'][:16]} {100 * s['repeated_share']:.0f} %"
            figures.setdefault("length in characters", {})[m] = f"{s['length']:.1f}"
            for name in ("questions", "distinct", "copied"):
                figures.setdefault(name, {})[m] = f"{100 * s[name]:.0f} %"
            figures.setdefault("most repeated", {})[m] = " ".join((same or "").split())
        figures.setdefault("replies", {})[m] = str(s["replies"])
    return pd.DataFrame(figures).T.reindex(columns=["reference", *out["loss"]]).fillna("")


# ---- the page --------------------------------------------------------------------------------------------------------
INKS = {"ink": "#010101", "reference": "#020202", "base": "#030303", "adapter": "#040404", "fused": "#050505"}


def drawing(draw):
    """Return draw(axes) as SVG. Each of INKS becomes a colour of the page, which knows light and dark."""
    look = {k: INKS["ink"] for k in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")}
    look |= {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9, "axes.linewidth": 0.5, "legend.frameon": False}
    look |= {"axes.spines.top": False, "axes.spines.right": False}
    with rc_context(look):
        figure, file = Figure(figsize=(4.6, 2.7), layout="constrained"), io.StringIO()
        draw(figure.subplots())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    for name, colour in INKS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def learning_curve(adapter):
    """Return losses.csv as SVG, with the checkpoint that became adapters.safetensors marked; None without it."""
    if not (adapter / "losses.csv").exists():
        return None
    losses = pd.read_csv(adapter / "losses.csv").groupby("iteration")[["train_loss", "val_loss"]].last()
    train, valid = losses["train_loss"].dropna(), losses["val_loss"].dropna()
    best = adapter / "adapters.safetensors"
    kept = [int(p.name[:7]) for p in sorted(adapter.glob("0*_adapters.safetensors")) if filecmp.cmp(p, best, False)]

    def draw(axes):
        axes.plot(train.index, train, color=INKS["reference"], linewidth=1, label="training")
        axes.plot(valid.index, valid, color=INKS["adapter"], marker=".", label="validation")
        for i in [i for i in kept if i in valid.index][:1]:
            axes.plot(i, valid[i], "o", color=INKS["adapter"], markersize=9, label=f"kept: iteration {i}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="iteration", ylabel="loss, as training counts it")
        axes.legend()

    return drawing(draw)


def length_histogram(results, rows, asked):
    """Return as SVG how long replies and reference are, in characters; None without replies."""
    lengths = {"reference": [len(rows[i]["completion"].strip()) for i in asked]}
    lengths |= {m: [len(t) for t in r["replies"].values()] for m, r in results.items() if r["replies"]}
    if not asked:
        return None
    longest = max(10, *(np.quantile(v, 0.95) for v in lengths.values()))

    def draw(axes):
        for m, v in lengths.items():
            look = {"histtype": "step", "linewidth": 1.4, "linestyle": (0, (2, 2)) if m == "fused" else "-"}
            look = {"histtype": "stepfilled", "alpha": 0.35} if m == "reference" else look
            axes.hist(np.minimum(v, longest), np.linspace(0, longest, 21), color=INKS[m], label=m, **look)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="characters (the last bar: and more)", ylabel="replies")
        axes.legend()

    return drawing(draw)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ args.version }} · {{ args.model }}</title>
<style>
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #fff; --line: #e4e1dc; --ink: #2a2926; --quiet: #6d6a64;
  --reference: #7d786f; --base: #a3562f; --adapter: #2f6db0; --fused: #237353; --good: #237353; --mixed: #a87a12;
  --bad: #b3382c }
@media (prefers-color-scheme: dark) { :root { --paper: #191a1c; --card: #212326; --line: #36383c; --ink: #e6e4e0;
  --quiet: #a09d97; --reference: #a8a49c; --base: #e0925f; --adapter: #7fb2ea; --fused: #6fc7a0; --good: #6fc7a0;
  --mixed: #e0b550; --bad: #ee8072 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
p { margin: 0 } h2 { margin: 3rem 0 .75rem; font-size: 1rem; font-weight: 600 }
h1 { margin: .5rem 0 1rem; padding-left: 1rem; border-left: .3rem solid; text-wrap: balance;
  font: 500 clamp(1.4rem, 4.5vw, 2.1rem)/1.25 ui-serif, Georgia, serif }
.good { border-color: var(--good) } .mixed { border-color: var(--mixed) } .bad { border-color: var(--bad) }
table + p { margin-top: .75rem } .note, figcaption, footer { color: var(--quiet); font-size: .875rem }
.warning { margin: .75rem 0 0; padding: .5rem .75rem; border: 1px solid var(--mixed); border-radius: .4rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1.5rem;
  margin-top: 2.5rem }
figure { margin: 0; max-width: 32rem }
svg { display: block; width: 100%; height: auto } svg text { font-family: inherit !important }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums }
table { font-size: clamp(.75rem, 3vw, 1rem) } td { white-space: nowrap } tr:nth-last-child(2) td { white-space: normal }
th, td { padding: .4em 0 .4em .7em; border-bottom: 1px solid var(--line); text-align: right; font-weight: 400 }
th { overflow-wrap: normal } tbody th { padding-left: 0; text-align: left }
thead th, dt { font-weight: 600; color: var(--quiet) } dt { font-size: .875rem }
.base { color: var(--base) } .adapter { color: var(--adapter) } .fused { color: var(--fused) }
article { margin: 0 0 1rem; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  overflow: hidden }
article p { color: var(--quiet); font-size: .9rem; unicode-bidi: isolate }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(12rem, 100%), 1fr)); gap: .75rem 1.25rem;
  margin: .75rem 0 0 }
dd { margin: 0; white-space: pre-wrap; unicode-bidi: isolate }
</style>
</head>
<body>
<p class="note">{{ args.version }} · {{ args.model }}</p>
<h1 class="{{ kind }}">{{ sentence }}</h1>
<p class="note">Measured on {{ "{:,}".format(rows) }} validation rows with {{ "{:,}".format(tokens) }} completion
tokens.</p>
{% for warning in warnings %}
<p class="warning">{{ warning }}</p>
{% endfor %}
<section class="plots">
{% if curve %}
<figure>{{ curve | safe }}<figcaption>The learning curve. Training counts other tokens than the table
below, so the losses differ.</figcaption></figure>
{% endif %}
{% if histogram %}
<figure>{{ histogram | safe }}<figcaption>How long the replies are, beside those of the chat.</figcaption></figure>
{% endif %}
</section>
<h2>The numbers</h2>
<table>
<thead><tr><th></th>{% for c in table.columns %}<th class="{{ c }}">{{ c }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, line in table.iterrows() %}
<tr><th>{{ name }}</th>{% for x in line %}<td><bdi>{{ x }}</bdi></td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
<p class="note">Loss in nats, lower is better; perplexity: among how many equally likely words the model would have to
guess. Copied: replies that stand word for word in their context.</p>
<h2>Side by side</h2>
{% for card in cards %}
<article>
{% for text in card.context %}<p>{{ text }}</p>{% endfor %}
<dl>
{% for name, text in card.texts %}
<div><dt class="{{ name }}">{{ name }}</dt><dd>{{ text }}</dd></div>
{% endfor %}
</dl>
</article>
{% endfor %}
<footer>Replies with temperature {{ args.temperature }}, seed {{ args.seed }}, at most {{ args.max_tokens }} tokens.
All of them are in generations.csv, all numbers in metrics.json.</footer>
</body>
</html>
"""


def report(args, out, results, rows, asked, warnings, adapter):
    """Return the page as text. jinja2 escapes all that is put into it, except the two drawings."""
    ends, cards = Counter(r["prompt"].rpartition("\n\n")[2] for r in rows), []
    for i in asked[: args.show]:
        texts = {"reference": rows[i]["completion"]} | {
            m: r["replies"].get(i, "(not asked)") for m, r in results.items()
        }
        chat, _, end = rows[i]["prompt"].rpartition("\n\n")
        chat = chat if ends[end] > 1 else rows[i]["prompt"]  # without "Write the next message", which all have
        context = [visible(t, 200) for t in chat.strip().split("\n")[-4:]]
        cards.append({"context": context, "texts": [(m, visible(t, 500) or "(nothing)") for m, t in texts.items()]})
    kind, sentence = verdict(out)
    facts = {"args": args, "kind": kind, "sentence": sentence, "warnings": warnings, "cards": cards, "rows": len(rows)}
    facts |= {"table": table(out), "tokens": sum(len(r["tokens"]) - r["start"] for r in rows)}
    facts |= {"curve": learning_curve(adapter), "histogram": length_histogram(results, rows, asked)}
    return jinja2.Environment(autoescape=True, trim_blocks=True).from_string(PAGE).render(facts)


# ---- written whole or not at all -------------------------------------------------------------------------------------
def clean_up(final):
    """Finish the swap of a run that was killed in the middle of it, and remove what it left."""
    partial, old = final.with_name(final.name + ".partial"), final.with_name(final.name + ".old")
    if old.exists() and not final.exists():
        (partial if partial.exists() else old).rename(final)
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)


def write(final, args, out, results, rows, asked, warnings, page):
    """Write the three files beside the final folder, then put them in its place."""
    partial, old = final.with_name(final.name + ".partial"), final.with_name(final.name + ".old")
    partial.mkdir(parents=True)
    (partial / "report.html").write_text(page, encoding="utf-8")
    cells = {"prompt": [rows[i]["prompt"] for i in asked], "reference": [rows[i]["completion"] for i in asked]}
    cells |= {m: [r["replies"].get(i, "") for i in asked] for m, r in results.items()}
    frame = pd.DataFrame({name: [defuse(t) for t in texts] for name, texts in cells.items()})
    frame.insert(0, "line", [rows[i]["line"] for i in asked])
    frame.to_csv(partial / "generations.csv", index=False, quoting=1, encoding="utf-8-sig")  # Excel needs the mark
    facts = dict(zip(("kind", "verdict"), verdict(out), strict=True)) | {"warnings": warnings, "rows": len(rows)} | out
    facts |= {"seconds": {m: r.get("seconds") for m, r in results.items()}, "settings": vars(args)}
    facts["completion_tokens"] = sum(len(r["tokens"]) - r["start"] for r in rows)
    facts["versions"] = {"python": platform.python_version(), "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__}
    facts = json.loads(json.dumps(facts), parse_constant=lambda name: None)  # NaN and Infinity are no JSON
    (partial / "metrics.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def main():
    args, root = settings(), Path(__file__).resolve().parent
    valid = root / f"data/for_train/{args.version}/valid.jsonl"
    if not valid.exists():
        fail(f"data/for_train/{args.version}/valid.jsonl is not there", f"VERSION={args.version} python build_train.py")
    models, warnings = find_models(root, args)
    rows = read_rows(valid, next(iter(models.values()))[0], args.batch_tokens)
    sample = random.Random(args.seed).sample(range(len(rows)), min(args.replies, len(rows)))
    final = root / f"data/results/{args.version}_{args.model}"
    clean_up(final)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"testing {', '.join(models)} on {len(rows)} rows of data/for_train/{args.version}/valid.jsonl", flush=True)
    results, stopped = {}, False
    try:
        for name, (folder, adapter) in models.items():
            test_model(name, folder, adapter, rows, sample, args, results.setdefault(name, {}))
            gc.collect()
            mx.clear_cache()
    except KeyboardInterrupt:
        stopped = True
        warnings.append("stopped with Ctrl-C: this is what was done so far")
    results = {m: r for m, r in results.items() if r}
    if not results:
        print("stopped before the first loss was known: nothing written", file=sys.stderr)
        return 130
    asked = [i for i in sample if any(i in r["replies"] for r in results.values())]
    out = summarize(results, rows, asked)
    page = report(args, out, results, rows, asked, warnings, root / f"models/adapters/adapter-{final.name}")
    write(final, args, out, results, rows, asked, warnings, page)
    print(f"\n{verdict(out)[1]}\n\n{table(out).to_string()}\n")
    print("\n".join(f"data/results/{final.name}/{name}" for name in ("report.html", "generations.csv", "metrics.json")))
    return 130 if stopped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}", "make room, or mend the rights of the folder")
