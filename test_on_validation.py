"""Step 7 of the guide: test the models on the validation rows, and say whether it worked.

    python test_on_validation.py        # then open data/results/${VERSION}_${MODEL}/report.html

Reads   data/for_train/${VERSION}/: valid.jsonl, train.jsonl and settings.json
        models/base/${MODEL}/, models/adapters/adapter-${VERSION}_${MODEL}/ and, if it is there,
        models/fused/fused-${VERSION}_${MODEL}/
Writes  data/results/${VERSION}_${MODEL}/: report.html (to look at), generations.csv (every reply),
        metrics.json (every figure)
Exit    0 done, 1 something is missing or wrong, 2 wrong usage, 130 Ctrl-C
"""

from data import report
from data.transcript import as_text, longest_talk, transcript, what_others_said
from models import common, figures, folders, verdict
from models.chat_template import load_model, load_tokenizer
from models.common import check_names, fail, from_environment, visible
from models.completion_loss import encode, nats_of_replies
from models.sampling import sampling_of

import csv
import json
import os
import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pandas as pd
from mlx_lm.sample_utils import make_sampler
from tqdm import tqdm

ME = "python test_on_validation.py"

# ---- settings: edit a default here, or give the flag for a single run ---------------------------
parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False)
add = parser.add_argument
add("--version", default=from_environment("VERSION"), help="data/for_train/VERSION")
add("--model", default=from_environment("MODEL"), help="models/base/MODEL")
add("--models", default="base,adapter,fused", help="which of the three to test")
add("--replies", type=int, default=100, help="rows that every model answers; 0 none")
add("--temperature", type=float, help="0 the likeliest word, 1 as learned; else the base's own")
add("--max-tokens", type=int, default=60, help="tokens of the longest reply")
add("--seed", type=int, default=0, help="the same seed: the same rows and, on one machine, replies")
add("--reply-batch", type=int, default=8, help="replies written at a time; less saves memory")
add("--batch-tokens", type=int, default=2048, help="tokens read at a time; less saves memory")

TALK = 10  # turns of the sample talk
FEWEST = 20  # replies; from fewer nobody can say how a model sounds
# ---- end of the settings ------------------------------------------------------------------------


def arguments():
    """Return the settings of this run; end it if one of them is wrong."""
    parser.error = lambda what: fail(what, f"{ME} --help", code=2)
    args = parser.parse_args()
    check_names(args.version, args.model)
    if not set(args.models.split(",")) <= {"base", "adapter", "fused"}:
        parser.error(f"--models is {args.models!a}, not made of base,adapter,fused")
    for name, value in vars(args).items():
        least = 1 if name in ("max_tokens", "reply_batch", "batch_tokens") else 0
        if isinstance(value, int | float) and not value >= least:  # nor NaN
            parser.error(f"--{name.replace('_', '-')} cannot be {value}")
    return args


# ---- what is there ------------------------------------------------------------------------------
def find_models(args, at):
    """Return the models to test, {"base": (folder, adapter or None, how to make it), …}."""
    folders.need(at.data / "valid.jsonl", "VERSION", at.build)
    folders.need(at.base / "config.json", "MODEL", common.download(args.model))
    models = {
        "base": (at.base, None, common.download(args.model)),
        "adapter": (at.base, at.adapter, f"{at.run} ./fine_tune.sh"),
        "fused": (at.fused, None, f"{at.run} ./fuse.sh"),
    }
    for folder in at.adapter, at.fused, at.results:
        folders.finish_move(folder)
    asked = args.models.split(",")
    if args.models == parser.get_default("models") and not at.fused.exists():
        asked.remove("fused")
    for who in asked:
        folder, adapter, command = models[who]
        if not (adapter or folder).is_dir():
            fail(f"there is no {adapter or folder}", command)
    return {who: models[who] for who in models if who in asked}


# ---- the validation rows ------------------------------------------------------------------------
# What settings.json would say of rows that build_train.py did not make:
UNKNOWN = SimpleNamespace(shape="turns", names=False, prompt="", question_prompt="", authors=[])


@dataclass
class Row:
    """A row of valid.jsonl."""

    line: int
    messages: list  # [(name, text), …], the last is what was really said
    tokens: list  # of it all, as in training, with the end of the turn
    start: int  # where the reply begins in them

    def reply(self):
        """Return what was really said."""
        return visible(self.messages[-1][1])

    def reply_length(self):
        """Return the tokens of the reply."""
        return len(self.tokens) - self.start


def read_data(at):
    """Return the rows to test on, the messages of each row of train.jsonl, and their settings."""
    made, train = UNKNOWN, at.data / "train.jsonl"
    if (at.data / "settings.json").is_file():
        made = common.read_settings(at.data / "settings.json", at.build)
    chats = common.read_rows(train, at.build) if train.is_file() else []
    learned = [transcript(chat, made) for chat in chats]
    rows = encode_rows(common.read_rows(at.data / "valid.jsonl", at.build), made, at.base)
    if not rows:
        fail(f"{at.data}/valid.jsonl is empty", at.build)
    return SimpleNamespace(rows=rows, train=learned, made=made)


def encode_rows(chats, made, base):
    """Return the rows of valid.jsonl with their tokens."""
    tokenizer = load_tokenizer(base)
    rows = []
    for line, chat in enumerate(chats, 1):
        try:
            tokens, start = encode(tokenizer, chat)
        except Exception as error:  # a chat template is a program of the base
            other = f"export MODEL={common.DEFAULTS['MODEL']}  # or another instruct model"
            fail(f"the chat template of {base} fails on valid.jsonl, line {line}: {error}", other)
        rows.append(Row(line, transcript(chat, made), tokens, start))
    return rows


# ---- one model at a time ------------------------------------------------------------------------
def progress(total, label):
    """Return a bar for so many rows; in a pipe, print a line at the start instead."""
    if not sys.stderr.isatty():
        print(f"{label}: {total} rows", file=sys.stderr)
    return tqdm(total=total, desc=label, leave=False, disable=None)


def measure_losses(model, rows, args, label):
    """Return the loss of each row's reply: the sum over its tokens, in nats."""
    pairs = [(row.tokens, row.start) for row in rows]
    with progress(len(rows), label) as bar:
        return np.array(nats_of_replies(model, pairs, args.batch_tokens, bar.update))


def write_replies(model, tokenizer, rows, args, label):
    """Return {line: (reply, whether it ended)} of a model."""
    sampler = make_sampler(args.temperature, top_p=args.top_p, top_k=args.top_k)
    options = {"max_tokens": args.max_tokens, "sampler": sampler, "return_token_ids": True}
    left = sorted(rows, key=lambda row: row.start)
    mx.random.seed(args.seed)
    replies = {}
    with progress(len(rows), label) as bar:
        while left:
            part, left = left[: args.reply_batch], left[args.reply_batch :]
            prompts = [row.tokens[: row.start] for row in part]
            made = mlx_lm.batch_generate(model, tokenizer, prompts, **options)
            for row, text, tokens in zip(part, made.texts, made.token_ids, strict=True):
                replies[row.line] = visible(text.strip()), len(tokens) < args.max_tokens
            bar.update(len(part))
    return replies


def measure(models, rows, asked, args):
    """Return the nats of each row and the replies, by model."""
    nats, replies = {}, {}
    for who, (folder, adapter, command) in models.items():
        try:
            model, tokenizer = load_model(folder, adapter)
        except Exception as error:  # whatever is wrong with the files of a model
            fail(f"{adapter or folder} does not load: {error}", command)
        try:
            nats[who] = measure_losses(model, rows, args, f"{who} loss")
            replies[who] = write_replies(model, tokenizer, asked, args, f"{who} replies")
        except (MemoryError, RuntimeError, ValueError) as error:
            less = f"{ME} --version {args.version} --model {args.model} --batch-tokens 512"
            fail(f"{folder} cannot be computed: {error}", f"{less} --reply-batch 1")
        del model  # one in memory at a time
        mx.clear_cache()
    return nats, replies


# ---- figures ------------------------------------------------------------------------------------
def find_figures(data, asked, nats, replies, args):
    """Return the table of figures, and the texts {"reference": {line: text}, "base": …}."""
    table = defaultdict(dict)
    figures.add_losses(table, nats, np.array([row.reply_length() for row in data.rows]))
    said = {"reference": {row.line: row.reply() for row in data.rows}}
    for who in replies:
        said[who] = {line: text for line, (text, _) in replies[who].items()}
    if not asked:
        return table, said
    learned = "\n".join(text for talk in data.train for _, text in talk)
    texts = {who: [said[who][row.line] for row in asked] for who in said}
    for who in said:
        figures.add_style(table, who, texts[who])
        figures.add_by_heart(table, who, texts[who], learned)
    too_long = [row.reply_length() > args.max_tokens + 1 for row in asked]
    table["cut off"]["reference"] = sum(too_long) / len(asked)
    for who in replies:
        not_ended = [not replies[who][row.line][1] for row in asked]
        table["cut off"][who] = sum(not_ended) / len(asked)
    if len(asked) >= FEWEST:
        names = {name.casefold() for row in data.rows for name, _ in row.messages}
        real = texts.pop("reference")
        for who in texts:
            table["missing words"][who] = figures.missing_words(real, texts[who], names)
        add_told_apart(table, data, real, texts, asked)
    return table, said


def add_told_apart(table, data, real, made, asked):
    """Add how well replies of models, of the person and of others are told from the real ones.

    At most half of the validation rows are judged: the other half shows how well the person is told
    from themselves. Replies of train.jsonl cannot show it, as they come from other talks.
    """
    count = min(len(asked), len(data.rows) // 2)
    if count < FEWEST:
        count = len(asked)
    lines = {row.line for row in asked[:count]}
    texts = made | {"reference": [row.reply() for row in data.rows if row.line not in lines]}
    if len(data.made.authors) == 1:  # else everybody is imitated, and nobody is somebody else
        joined = data.made.shape == "turns"
        others = [visible(what_others_said(row.messages, joined)) for row in data.rows]
        texts["somebody else"] = list(filter(None, others))
    for who in texts:
        if len(texts[who]) >= count:
            figures.add_told_apart(table, who, real[:count], texts[who][:count])


def find_facts(args, at, data, models, warnings):
    """Return what the verdict and the page need besides the figures."""
    author = data.made.authors[0] if len(data.made.authors) == 1 else ""
    return {
        "author": author,
        "name": visible(author) or "them",
        "judged": list(models)[-1],
        "is_trial": args.model.startswith("tiny-"),  # of tests/tiny_base.py
        "rows": len(data.rows),
        "tokens": sum(row.reply_length() for row in data.rows),
        "learned": {"rows": len(data.train), "messages": sum(map(len, data.train))},
        "trained": report.date_of(at.adapter / "adapters.safetensors"),
        "run": at.run,
        "settings": vars(args),
        "data": vars(data.made),
        "training": common.settings_of(at.adapter),
        "curve": report.learning_curve(at.adapter / "losses.csv"),
        "valid_sha256": common.checksum(at.data / "valid.jsonl"),
        "tested": f"{date.today():%-d %B %Y}",
        "warnings": warnings,
    }


# ---- written whole or not at all ----------------------------------------------------------------
def defuse(text):
    """Return a cell that no spreadsheet takes for a formula: "=1+1" → "'=1+1".

    Nor one that cuts the file at ';', as in Italy. A cell holds at most 32,767 characters.
    """
    text = visible(text.replace("\t", " "))[:32_000]
    return re.sub(r"""((?:^|[;\n])[\s"]*)([=+\-@\uff1d\uff0b\uff0d\uff20])""", r"\1'\2", text)


def write(final, page, facts, asked, said):
    """Write the three files beside the final folder, then put them in its place."""
    known = json.loads(json.dumps(facts), parse_constant=lambda _: None)  # JSON knows no NaN
    columns = {"line": [row.line for row in asked]}
    columns["prompt"] = [defuse(as_text(row.messages[:-1])) for row in asked]
    for who, texts in said.items():
        columns[who] = [defuse(texts[row.line]) for row in asked]
    options = {"encoding": "utf-8-sig", "quoting": csv.QUOTE_ALL}  # -sig is a mark for Excel
    with folders.work_folder(final) as new:
        (new / "report.html").write_text(page, "utf-8")
        (new / "metrics.json").write_text(json.dumps(known, indent=2, ensure_ascii=False), "utf-8")
        pd.DataFrame(columns).to_csv(new / "generations.csv", index=False, **options)
        return folders.into_place(new, final, [file.name for file in new.iterdir()])


# ---- the run ------------------------------------------------------------------------------------
def main():
    os.chdir(common.ROOT)
    args = arguments()
    at = folders.places(args.version, args.model)
    models = find_models(args, at)
    data = read_data(at)
    vars(args).update(sampling_of(at.base, args.temperature))
    warnings = []
    if list(models) != ["base"]:
        warnings = common.warn_of_changes(at)
    print(f"testing     {', '.join(models)} on {len(data.rows)} rows of {at.data}/valid.jsonl")

    order = np.random.default_rng(args.seed).permutation(len(data.rows))
    asked = [data.rows[place] for place in order[: args.replies]]
    places = longest_talk([row.messages for row in data.rows], TALK) if asked else []
    talk = [data.rows[place] for place in places]
    answered = list({row.line: row for row in asked + talk}.values())  # each row once
    nats, replies = measure(models, data.rows, answered, args)

    table, said = find_figures(data, asked, nats, replies, args)
    if common.is_stale(at.adapter, at.fused):
        table["kept"].clear()  # it was made of something else
    facts = find_facts(args, at, data, models, warnings)
    facts["verdict"] = verdict.verdict(table, facts)
    page = report.render(facts, table, asked, talk, said, at.results)
    measured = {name: figure for name, figure in table.items() if figure}
    before = write(at.results, page, facts | measured, asked, said)
    print("", *verdict.as_text(facts["verdict"]), sep="\n")
    print(f"\nwrote       {at.results}/report.html")
    print("            also generations.csv, metrics.json")
    if before:
        print(f"replaced    the results of before; they are in {before}")
    look = "open" if sys.platform == "darwin" else "xdg-open"
    print(f"next        {look} {at.results}/report.html")


if __name__ == "__main__":
    main()
