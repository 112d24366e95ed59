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

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
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
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.sample_utils import make_sampler
    from tqdm import tqdm
except ImportError as e:
    sys.exit(f"error: {e}. FIX: source venv/bin/activate; pip install -r requirements.txt")
except KeyboardInterrupt:
    sys.exit(130)

ROOT = Path(__file__).resolve().parent
LOOK = dict.fromkeys(("loss", "gain", "error"), "{:.4f}") | {"perplexity": "{:,.1f}", "length": "{:.0f}"}
LOOP = re.compile(r"(?<!\S)(\S.{0,38}?)(?:\s+\1){3}(?!\S)|(.{5,40}?)\2{3}", re.DOTALL)  # "sa sa sa sa", not "hahahaha"
INKS = {"reference": "#010101", "base": "#020202", "adapter": "#030303", "fused": "#040404"}  # drawing() replaces them


# ---- settings: edit a default here, or give the flag for a single run ------------------------------------------------
def settings():
    parser = ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda what: parser.exit(2, f"error: {what}. FIX: python test_on_validation.py --help\n")
    add, env, cpu = parser.add_argument, os.environ.get, mx.default_device() == mx.cpu
    add("--version", default=env("VERSION", "v1"), help="which data: data/for_train/VERSION")
    add("--model", default=env("MODEL", "gemma-3-text-27b-it-4bit"), help="which model: models/base/MODEL")
    add("--models", default="base,adapter,fused", help="which of the three to test")
    add("--replies", type=int, default=100, help="rows that every model answers, for the figures of style; 0 none")
    add("--show", type=int, default=20, help="how many of these rows the report shows side by side; 0 none")
    add("--temperature", type=float, default=0.8, help="0 always the likeliest word, 1 as the model would, up to 2")
    add("--max-tokens", type=int, default=60, help="tokens of the longest reply, 1 or more")
    add("--seed", type=int, default=0, help="same seed: same rows, and on the same machine the same replies")
    add("--reply-batch", type=int, default=1 if cpu else 8, help="replies written at a time")
    add("--batch-tokens", type=int, default=2048, help="tokens read at a time; lower it if memory runs out")
    # ---- end of the settings -----------------------------------------------------------------------------------------
    args = parser.parse_args()
    for name in "replies", "show", "temperature", "seed", "max_tokens", "reply_batch", "batch_tokens":
        least = 1 if name in ("max_tokens", "reply_batch", "batch_tokens") else 0
        if not least <= getattr(args, name) <= (2 if name == "temperature" else 2**32 - 1):
            parser.error(f"argument --{name.replace('_', '-')}: {getattr(args, name)} is out of range")
    if not set(args.models.split(",")) <= {"base", "adapter", "fused"}:
        parser.error(f"argument --models: {args.models!a} is not made of base,adapter,fused")
    for name in args.version, args.model:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            last = name.rstrip("/").split("/")[-1]
            fix = f"MODEL={last} python test_on_validation.py"
            if "/" not in args.model:
                fix = "use letters, digits, '.', '_' and '-' alone"
            elif not re.match(r"\.{0,2}/|models/", name):
                fix = f"hf download {name} --local-dir models/base/{last}; {fix}"
            fail(f"VERSION or MODEL is {name!a}, which is not the name of a folder", fix)
    return args


def fail(what, fix):
    sys.exit(f"error: {what}. FIX: {fix}")


# ---- untrusted text --------------------------------------------------------------------------------------------------
def visible(text, longest=None):
    r"""Text that can only be read: control, bidirectional and surrogate characters come out as \x1b and the like."""
    cut = f" … ({len(text) - longest:,} more characters)" if longest and len(text) > longest else ""
    fine = "\n\t\xa0\u200c\u200d"
    text = [c if c.isprintable() or c in fine else c.encode("unicode_escape").decode() for c in text[:longest]]
    return "".join(text) + cut


def defuse(text):
    """A cell that no spreadsheet takes for a formula, "'=1+1" for "=1+1", even if it cuts the file at ';' (Italy)."""
    text = visible(text, 32_000).replace("\t", " ")
    return re.sub(r"((?:^|[;\n])\s*)([=+\-@＝＋－＠])", r"\1'\2", text)  # noqa: RUF001


# ---- what is there ---------------------------------------------------------------------------------------------------
def load(*parts):
    """Return (model, tokenizer) or fail. parts: (folder, fix) of the model and perhaps of its adapter.

    Lazy: all files are checked, but weights are not read before they are used.
    """
    for path, fix in parts:
        if not path.is_dir():
            fail(f"{path.relative_to(ROOT)} is not there", fix)
    try:
        return mlx_lm.load(str(parts[0][0]), adapter_path=str(path) if len(parts) == 2 else None, lazy=True)
    except Exception as e:  # whatever is wrong with the files
        fail(f"{path.relative_to(ROOT)} does not load: {visible(' '.join(str(e).split()), 200)}", fix)


def find_models(args, valid):
    """Return {"base": (model, tokenizer), ...}, see load(), of the models to test, and warnings."""
    run, name = f"VERSION={args.version} MODEL={args.model}", f"{args.version}_{args.model}"
    base, adapter = ROOT / f"models/base/{args.model}", ROOT / f"models/adapters/adapter-{name}"
    fused, asked, warnings = ROOT / f"models/fused/fused-{name}", args.models.split(","), []
    if len(asked) == 3 and not fused.exists():
        asked.remove("fused")
        warnings.append(f"there is no fused model to test; to make it: {run} ./fuse.sh")
    base = base, f"hf download mlx-community/{args.model} --local-dir models/base/{args.model}"
    tuned = adapter, f"{run} ./fine_tune.sh, or test the base model alone: --models base"
    parts = {"base": [base], "adapter": [base, tuned], "fused": [(fused, f"{run} ./fuse.sh")]}
    models = {m: load(*parts[m]) for m in parts if m in asked}
    trained, weights, source = adapter / "lora_config.yaml", adapter / "adapters.safetensors", fused / "fused_from.json"
    rows = subprocess.run(["cksum"], input=valid.read_bytes(), capture_output=True).stdout.strip()
    if "adapter" in models and trained.exists() and rows not in trained.read_bytes():
        warnings.append("valid.jsonl is not the one of the training: the adapter may have learned some of its rows")
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else ""
    if "fused" in models and source.exists() and sha256 not in source.read_text(encoding="utf-8"):
        warnings.append(f"the fused model was made from another adapter than the one there now: {run} ./fuse.sh")
    return models, warnings


def read_rows(valid, tokenizer):
    """Return valid.jsonl as a DataFrame; the index is the line number. Columns: prompt, reference (its completion), ask
    (tokens of the prompt up to where the reply begins), tokens (of both, with the end of the turn, as in training)."""
    rows = {}
    if not tokenizer.has_chat_template:
        fail("the model has no chat template", "set MODEL to an instruct model (-it, -Instruct)")
    for line, text in enumerate(valid.read_bytes().splitlines(), 1):
        try:
            row = json.loads(text)
            ask, say = (row[name].encode().decode() for name in ("prompt", "completion"))  # text, no lone surrogates
        except (ValueError, TypeError, KeyError, AttributeError):
            wrong = f'{valid.relative_to(ROOT)} line {line} is not {{"prompt": text, "completion": text}} in UTF-8'
            fail(wrong, "python build_train.py")
        chat = [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
        start = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)
        rows[line] = [ask, say, start, tokenizer.apply_chat_template(chat)]
    if not rows:
        fail(f"{valid.relative_to(ROOT)} is empty", "python build_train.py")
    return pd.DataFrame.from_dict(rows, orient="index", columns=["prompt", "reference", "ask", "tokens"])


# ---- one model at a time ---------------------------------------------------------------------------------------------
def progress(steps, label):
    """Yield from a list; show a bar with the time left on a terminal, a line for every quarter in a pipe."""
    start, count = time.monotonic(), len(steps)
    for n, step in enumerate(tqdm(steps, label, leave=False, disable=None), 1):  # None: no bar in a pipe
        yield step
        if not sys.stderr.isatty() and 4 * n // count > 4 * (n - 1) // count:
            left = (time.monotonic() - start) / n * (count - n)
            print(f"{label} {n}/{count}, {left:.0f} s left", file=sys.stderr, flush=True)


def row_losses(model, rows, batch_tokens, label=""):
    """Return for each row the loss of its completion: the sum over its tokens, in nats.

    Longest rows first: what does not fit into memory shows at once. Only the logits of completions become float32:
    those of all tokens would be 2 GB (2,048 tokens, Gemma's vocabulary of 262,144).
    """
    tokens, starts, sums, batches = list(rows["tokens"]), list(rows["ask"].map(len)), np.zeros(len(rows)), []
    order = sorted(range(len(rows)), key=lambda i: -len(tokens[i]))
    while order:
        size = max(1, batch_tokens // len(tokens[order[0]]))
        batches.append(order[:size])
        del order[:size]
    for batch in progress(batches, label):
        width = len(tokens[batch[0]])
        padded = np.array([tokens[i] + [0] * (width - len(tokens[i])) for i in batch])
        scored = [(b, p) for b, i in enumerate(batch) for p in range(starts[i], len(tokens[i]))]
        row, position = np.array(scored).T
        logits = model(mx.array(padded[:, :-1]))[mx.array(row), mx.array(position - 1)].astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, mx.array(padded[row, position]))
        sums[batch] = np.bincount(row, np.array(losses), len(batch))
    return sums


def write_replies(model, tokenizer, asks, args, replies, label=""):
    """Fill `replies`, {line: text}, from `asks`, tokens by line, batch by batch, so that Ctrl-C keeps what is there."""
    options = {"sampler": make_sampler(args.temperature), "max_tokens": args.max_tokens}
    mergeable = all(hasattr(cache, "merge") for cache in make_prompt_cache(model))  # not Llama 4's
    size, lines = args.reply_batch if mergeable else 1, list(asks.map(len).sort_values().index)
    mx.random.seed(args.seed)
    for batch in progress([lines[i : i + size] for i in range(0, len(lines), size)], label):
        prompts = [asks[line] for line in batch]
        if size == 1:
            texts = [mlx_lm.generate(model, tokenizer, prompts[0], **options)]
        else:
            texts = mlx_lm.batch_generate(model, tokenizer, prompts, **options).texts
        replies.update((line, text.strip()) for line, text in zip(batch, texts, strict=True))


def test_models(models, rows, asked, args, losses, replies):
    """Put row_losses() and write_replies() of each model into losses and replies. One model in memory at a time."""
    for name in list(models):
        model, tokenizer = models.pop(name)
        losses[name], replies[name] = row_losses(model, rows, args.batch_tokens, f"{name:7} loss"), {}
        write_replies(model, tokenizer, rows["ask"][asked], args, replies[name], f"{name:7} replies")
        del model
        mx.clear_cache()


# ---- what came out ---------------------------------------------------------------------------------------------------
def figures(texts, losses, counts):
    """Return all figures as a DataFrame, a row for the reference and one for each model.

    texts: see main(); losses: {model: nats of each row}; counts: tokens of each row. gain is over the base, error its
    standard error over rows (a ratio estimate: Cochran, Sampling Techniques, 2.11), kept the share of the adapter's
    gain that the fused model has. A reply loops if it holds the same piece four times in a row, and is copied if it is
    a line of its prompt; capitals and spaces do not count for that.
    """
    table = pd.DataFrame(index=["reference", *losses])
    table["loss"] = pd.Series({m: nats.sum() / counts.sum() for m, nats in losses.items()})
    table["perplexity"] = np.exp(table["loss"])
    for m in [m for m in losses if "base" in losses and m != "base"]:
        gains = losses["base"] - losses[m]
        table.loc[m, "gain"] = gains.sum() / counts.sum()
        table.loc[m, "error"] = np.sqrt(((gains - table["gain"][m] * counts) ** 2).sum()) / counts.sum()
    if "gain" in table and len(losses) == 3 and table["gain"]["adapter"] > 2 * table["error"]["adapter"]:
        table.loc["fused", "kept"] = table["gain"]["fused"] / table["gain"]["adapter"]
    if len(texts):
        said = texts[table.index]
        folded = texts.map(lambda text: re.sub("[ \t]+", " ", text.casefold()), na_action="ignore")
        chats, folded = folded["prompt"].str.split("\n"), folded[table.index]
        table["length"] = said.apply(lambda replies: replies.str.len().mean())
        table["questions"] = said.apply(lambda replies: replies.str.contains("[?؟？]").mean())  # noqa: RUF001
        table["distinct"] = folded.nunique() / folded.count()
        table["looping"] = said.apply(lambda replies: replies.dropna().map(LOOP.search).notna().mean())
        table["copied"] = sum(folded.loc[line].isin(chats[line]) for line in folded.index) / folded.count()
        if (repeated := table["distinct"] < 1).any():
            table["most repeated"] = folded.mode().iloc[0].str[:16].replace("", "(nothing)").where(repeated)
            table["its share"] = folded.apply(lambda replies: replies.value_counts(normalize=True).max())
        table["replies"] = folded.count()
    return table


def readable(table):
    """Return the figures as text, a row each, as the page and the terminal show them: what has no LOOK is a share."""
    plain = ("most repeated", "replies")
    look = {name: LOOK.get(name, "{}" if name in plain else "{:.1%}").format for name in table}
    return pd.DataFrame({name: table[name].map(look[name], na_action="ignore") for name in table}).T.fillna("")


def verdict(table):
    """Return ("good", "mixed" or "bad", a sentence) for what figures() returned."""
    loss = table["loss"].drop("reference")
    if not np.isfinite(loss).all():
        return "bad", "Broken: a loss is not a number. Train again with a lower learning rate."
    if "gain" not in table:
        return "mixed", "Nothing to compare: test the base model and the adapter together."
    tuned = table.dropna(subset="gain")
    first, pair = tuned.iloc[0], f"than the base: loss {tuned['loss'].iloc[0]:.2f} instead of {loss['base']:.2f}"
    if first["gain"] > 2 * first["error"]:
        kind, text = "good", f"Better {pair}"
    elif first["gain"] < -2 * first["error"]:
        kind, text = "bad", f"Worse {pair}. Train with a lower learning rate, or on more data"
    else:
        kind, text = "mixed", f"No better {pair}, which may be chance. Train longer, or on more data"
    if "kept" in table:
        text += f"; the fused model keeps {table['kept']['fused']:.1%} of it"
        if table["kept"]["fused"] < 0.9:
            kind, text = "bad", f"{text}. Fuse again: FUSED_BITS=8 ./fuse.sh"
    for name, row in tuned.iterrows():
        odd = [f for f in ("its share", "looping") if f in table and row[f] > max(0.3, 2 * table[f]["reference"])]
        if odd and row["replies"] >= 5:
            what = {"its share": f"are “{row.get('most repeated')}”", "looping": "say the same piece over and over"}
            text += f". But the {name} model repeats itself: {row[odd[0]]:.0%} of its replies {what[odd[0]]}"
            return "bad", text + "."
    return kind, text + "."


# ---- the page --------------------------------------------------------------------------------------------------------
def drawing(draw, data):
    """Return draw(axes, data) as SVG. Black and INKS become colours of the page, which knows light and dark."""
    look = {"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.5, "legend.frameon": False}
    with rc_context(look | {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9}):
        figure, file = Figure((4.6, 2.7), layout="constrained"), io.StringIO()
        axes = figure.subplots()
        draw(axes, data)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()[file.getvalue().index("<svg") :].replace("#000000", "currentColor")
    for name, colour in INKS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def learning_curve(axes, adapter):
    """Plot losses.csv, with the checkpoint of the lowest validation loss, which is adapters.safetensors."""
    losses = pd.read_csv(adapter / "losses.csv", index_col="iteration")
    axes.plot(losses["train_loss"].dropna(), color=INKS["reference"], label="training")
    scored = losses["val_loss"].dropna()
    axes.plot(scored, ".-", color=INKS["adapter"], label="validation")
    kept = (scored if len(scored) == 1 else scored.loc[2:]).idxmin()  # at iteration 1 nothing was learned yet
    axes.axvline(kept, color=INKS["adapter"], linestyle=":", label=f"kept: iteration {kept}")
    axes.set(xlabel="iteration", ylabel="loss, as training counts it")


def length_histogram(axes, texts):
    """Plot how long replies and references are; the longest 5 % are counted in the last bars."""
    lengths = texts.drop(columns="prompt").map(len, na_action="ignore").astype(float)
    lengths = lengths.clip(upper=max(10, lengths.quantile(0.95).max()))
    axes.hist([lengths[m].dropna() for m in lengths], 12, color=[INKS[m] for m in lengths], label=list(lengths))
    axes.set(xlabel="characters of a reply (the last bars: and more)", ylabel="replies")


def report(facts, table, texts, adapter):
    """Return the page as text. Chat text is escaped by jinja2 or by pandas; the plots hold none."""
    plots = [drawing(learning_curve, adapter)] if (adapter / "losses.csv").exists() else []
    plots += [drawing(length_histogram, texts)] if len(texts) else []
    cards = texts.head(facts["settings"]["show"]).fillna("(not asked)")
    chats = [text.rpartition("\n\n")[0] or text for text in cards["prompt"]]  # without "Write the next message"
    cards["prompt"] = ["\n".join(chat.split("\n")[-4:]) for chat in chats]
    cards = cards.map(lambda text: visible(text, 500) or "(nothing)").to_dict("records")
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    return page.render(facts, plots=plots, cards=cards, table=readable(table).to_html(border=0))


# ---- written whole or not at all -------------------------------------------------------------------------------------
def clean_up(final):
    """Finish the swap of a run that was killed in the middle of it, and remove what it left."""
    partial, old = final.with_name(final.name + ".partial"), final.with_name(final.name + ".old")
    if old.exists() and not final.exists():
        (partial if partial.exists() else old).rename(final)
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    return partial, old


def write(final, page, texts, facts):
    """Write the three files beside the final folder, then put them in its place."""
    partial, old = clean_up(final)
    partial.mkdir(parents=True)
    (partial / "report.html").write_text(page, encoding="utf-8")
    cells = texts.fillna("").map(defuse)
    cells.to_csv(partial / "generations.csv", index_label="line", quoting=1, encoding="utf-8-sig")  # a mark for Excel
    (partial / "metrics.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def main():
    args = settings()
    name, valid = f"{args.version}_{args.model}", ROOT / f"data/for_train/{args.version}/valid.jsonl"
    final = ROOT / "data/results" / name
    if not valid.exists():
        fail(f"{valid.relative_to(ROOT)} is not there", f"VERSION={args.version} python build_train.py")
    models, warnings = find_models(args, valid)
    rows = read_rows(valid, next(iter(models.values()))[1])
    asked = rows.sample(min(args.replies, len(rows)), random_state=args.seed).index
    clean_up(final)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"testing {', '.join(models)} on {len(rows)} rows of {valid.relative_to(ROOT)}", flush=True)
    losses, replies, code = {}, {}, 0
    try:
        test_models(models, rows, asked, args, losses, replies)
    except KeyboardInterrupt:
        if not losses:
            raise
        warnings, code = [*warnings, "stopped with Ctrl-C: this is what was done so far"], 130
        print(f"\nwarning: {warnings[-1]}", file=sys.stderr)
    texts = pd.DataFrame(dict(rows[["prompt", "reference"]]) | replies).loc[asked].map(visible, na_action="ignore")
    counts = (rows["tokens"].map(len) - rows["ask"].map(len)).to_numpy()
    table = figures(texts, losses, counts)
    if any("another adapter" in warning for warning in warnings):
        table = table.drop(columns="kept", errors="ignore")  # the fuse is not to blame for the difference
    facts = dict(zip(("kind", "verdict"), verdict(table), strict=True)) | {"warnings": warnings, "settings": vars(args)}
    facts |= {"rows": len(rows), "tokens": int(counts.sum())} | json.loads(table.to_json())
    facts["versions"] = {"python": sys.version.split()[0], "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__}
    write(final, report(facts, table, texts, ROOT / f"models/adapters/adapter-{name}"), texts, facts)
    print(f"\n{facts['verdict']}\n\n{readable(table).to_string()}\n")
    print("\n".join(f"data/results/{name}/{file}" for file in ("report.html", "generations.csv", "metrics.json")))
    return code


# ---- the page, a template of jinja2 ----------------------------------------------------------------------------------
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ settings.version }} · {{ settings.model }}</title>
<style>
:root { color-scheme: light dark; --paper: light-dark(#fbfaf8, #191a1c); --line: light-dark(#e4e1dc, #36383c);
  --ink: light-dark(#2a2926, #e6e4e0); --reference: light-dark(#7d786f, #a8a49c); --base: light-dark(#a3562f, #e0925f);
  --adapter: light-dark(#2f6db0, #7fb2ea); --fused: light-dark(#237353, #6fc7a0); --good: var(--fused);
  --mixed: light-dark(#a87a12, #e0b550); --bad: light-dark(#b3382c, #ee8072) }
body { margin: 0 auto; padding: 2rem 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
h1 { padding-left: 1rem; border-left: .3rem solid var(--{{ kind }}); font: 500 1.8rem/1.25 ui-serif, Georgia, serif }
.note { color: var(--reference); font-size: .875rem }
.warning { padding: .5rem .75rem; border: 1px solid var(--mixed); border-radius: .4rem }
section, dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem 2rem }
svg { width: 100%; max-width: 32rem; height: auto; fill: currentColor }
table { display: block; overflow-x: auto; overflow-wrap: normal; border-collapse: collapse; font-size: min(3vw, 1rem) }
th, td { padding: .4em .5em; border: solid var(--line); border-width: 0 0 1px; text-align: right; font-weight: 400 }
section table { grid-row: span 2 } tbody th { padding-left: 0; text-align: left } p, dd, td { unicode-bidi: isolate }
dl { grid-template-columns: repeat(auto-fit, minmax(min(12rem, 100%), 1fr)); overflow: hidden; padding: 1rem;
  border: 1px solid var(--line); border-radius: .5rem }
dt { font-weight: 600; font-size: .875rem } dd { margin: 0; white-space: pre-wrap } .prompt { grid-column: 1 / -1 }
</style>
<p class="note">{{ settings.version }} · {{ settings.model }} · temperature {{ settings.temperature }}</p>
<h1>{{ verdict }}</h1>
{% for warning in warnings %}<p class="warning">{{ warning }}</p>{% endfor %}
<section>{{ table | safe }}{% for plot in plots %}{{ plot | safe }}{% endfor %}</section>
<p class="note">Loss in nats per completion token, lower is better. Gain: over the base. Error: standard error of the
gain. Kept: how much of the gain the fused model has. Perplexity: among how many equally likely words the model would
have to guess. Length in characters. Questions, distinct, looping (the same piece four times in a row), copied (word for
word from the context): shares of all replies.</p>
{% for card in cards %}
<dl>
{% for name, text in card.items() %}
<div class="{{ name }}"><dt style="color: var(--{{ name }})">{{ name }}</dt><dd>{{ text }}</dd></div>
{% endfor %}
</dl>
{% endfor %}
"""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}", "make room, or mend the permissions of the folder")
