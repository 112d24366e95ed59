"""Stage 4: does it work, and does it sound like them? Test the models on the validation rows.

    python test_on_validation.py        # then open data/results/${VERSION}_${MODEL}/report.html

Reads   data/for_train/${VERSION}/: valid.jsonl and, if it is there, settings.json
        models/base/${MODEL}/, models/adapters/adapter-${VERSION}_${MODEL}/ and,
        if it is there, models/fused/fused-${VERSION}_${MODEL}/
Writes  data/results/${VERSION}_${MODEL}/: report.html (to look at), generations.csv (every reply),
        metrics.json (every figure)
Exit    0 done, 1 something is missing or wrong, 2 wrong usage,
        130 Ctrl-C (with a report of what was done so far)
"""

import os
import signal
import sys

if sys.version_info < (3, 11):  # noqa: UP036 (a Mac's own Python is 3.9)
    sys.exit("error: Python 3.11 or newer is needed. FIX: python3.13 -m venv --clear venv")

if __name__ == "__main__":
    # Ctrl-C ends it at once, even amid an import.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\n"), os._exit(130)))
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder of this script: a json.py in it must not run

import csv
import fcntl
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

for name in [n for n in os.environ if n.startswith(("HF_", "TRANSFORMERS_", "MLXLM_"))]:
    del os.environ[name]  # a wrong one would break an import, another hub would be asked
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
try:
    import jinja2
    import mlx.core as mx
    import mlx.nn as nn
    import mlx_lm
    import numpy as np
    from mlx_lm.sample_utils import make_sampler
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from tqdm import tqdm
except ImportError as e:
    sys.exit(f"error: {e}. FIX: source venv/bin/activate (see README.md, Install)")

ROOT = Path(__file__).resolve().parent
ME = "python test_on_validation.py"
NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"  # what VERSION and MODEL can be


# ---- settings: edit a default here, or give the flag for a single run ---------------------------
DEFAULTS = {"VERSION": "v1", "MODEL": "gemma-3-text-27b-it-4bit"}
parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False)
add, env = parser.add_argument, (DEFAULTS | os.environ).get
add("--version", default=env("VERSION"), help="data/for_train/VERSION")
add("--model", default=env("MODEL"), help="models/base/MODEL")
add("--models", default="base,adapter,fused", help="which of the three to test")
add("--replies", type=int, default=100, help="rows that every model answers; 0 none")
add("--temperature", type=float, help="0 the likeliest word, 1 as learned, to 2 (see SAMPLING)")
add("--top-p", type=float, help="draw from words with this share in all (see SAMPLING)")
add("--top-k", type=int, help="draw from so many of the likeliest words; 0 all (see SAMPLING)")
add("--max-tokens", type=int, default=60, help="tokens of the longest reply")
add("--seed", type=int, default=0, help="same seed: same rows; same machine: same replies")
add("--reply-batch", type=int, default=8, help="replies written at a time; less saves memory")
add("--batch-tokens", type=int, default=2048, help="tokens read at a time; less saves memory")

# What is not given of these is as generation_config.json of the base says, and else:
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 0}

# The figures of style, as shares of the replies. Change one, add one.
EMOJI = re.compile(r"[\U0001f000-\U0001faff\u2600-\u27bf]|(?<!\w)[:;=]-?[()DPp](?!\w)")
LOOP = re.compile(r"(?<!\S)(\S.{0,38}?)(?:\s+\1){3}(?!\S)|(.{5,40}?)\2{3}", re.DOTALL)
STYLE = {
    "question": lambda text: re.search("[?\u061f\uff1f]", text),
    "emoji": EMOJI.search,  # and :-)
    "capital first": lambda text: text[:1].isupper(),
    "full stop last": lambda text: re.search(r"(?<!\.)[.\u3002]$", text),
    "several lines": lambda text: "\n" in text,
    "looping": LOOP.search,  # the same piece four times: "sa sa sa sa", not "hahahaha"
}
FEW = 30  # of fewer rows or replies the report says that they are few
BLIND = 20  # rows of the blind test
# ---- end of the settings ------------------------------------------------------------------------


def settings():
    """Return the settings of this run; end it if one of them cannot be."""
    parser.error = lambda what: fail(what, f"{ME} --help", code=2)
    args = parser.parse_args()
    if not set(args.models.split(",")) <= {"base", "adapter", "fused"}:
        parser.error(f"--models is {args.models!a}, not made of base,adapter,fused")
    for name, value in vars(args).items():
        least = 1 if name in ("max_tokens", "reply_batch") else 0
        if isinstance(value, int | float) and not least <= value < 2**31:
            parser.error(f"--{name.replace('_', '-')} cannot be {value}")
    for name, text in ("VERSION", args.version), ("MODEL", args.model):
        if not re.fullmatch(NAME, text):
            last = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(text).name).lstrip("._-")
            what = f"{name} is {text!a}, not letters, digits, '.', '_' and '-'"
            fail(what, f"export {name}={last or DEFAULTS[name]}")
    return args


# ---- what a person sees -------------------------------------------------------------------------
def fail(what, fix, code=1):
    what = visible(" ".join(what.split()))[:400]
    print(f"error: {what}. FIX: {fix}", file=sys.stderr)
    sys.exit(code)


def visible(text):
    r"""Return text that can only be read.

    Control, bidirectional and surrogate characters come out as \x1b and the like; emoji stay.
    """
    fine = "\n\t\xa0\u200c\u200d"
    return "".join(
        c if c.isprintable() or c in fine else c.encode("unicode_escape").decode() for c in text
    )


def defuse(text):
    """Return a cell that no spreadsheet takes for a formula: "=1+1" → "'=1+1".

    Nor one that cuts the file at ';', as in Italy. It can hold 32,767 characters.
    """
    text = visible(text).replace("\t", " ")[:32_000]
    return re.sub(r"((?:^|[;\n])\s*)([=+\-@\uff1d\uff0b\uff0d\uff20])", r"\1'\2", text)


# ---- what is there ------------------------------------------------------------------------------
def read_json(path, key):
    """Return what a JSON file says under a key; None if it is not there, broken or odd."""
    try:
        return json.loads(Path(path).read_bytes())[key]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def missing(what, file, variable, make):
    """Fail for lack of a file; the fix names the folders that have one."""
    there = sorted(path.parent.name for path in file.parent.parent.glob(f"*/{file.name}"))
    fixes = [f"export {variable}={name}" for name in there if re.fullmatch(NAME, name)]
    fixes.insert(0 if variable == "VERSION" else len(fixes), make)  # one's own data first
    fail(f"there is no {what} in {file.parent}", ", or ".join(fixes))


def load(fix, folder, adapter=None):
    """Return (model, tokenizer). All files are checked; weights are not read before their use."""
    last = adapter or folder
    if not last.is_dir():
        fail(f"there is no folder {last}", fix)
    options = {"lazy": True, "adapter_path": adapter and str(adapter)}
    options["tokenizer_config"] = {"trust_remote_code": False}  # no code of a model, nor a question
    try:
        layers = read_json(folder / "config.json", "num_hidden_layers")
        if type(layers) is int and layers > 1000:
            raise ValueError(f"{layers} layers would fill the memory")
        return mlx_lm.load(str(folder), **options)
    except Exception as e:  # whatever is wrong with the files of a model
        fail(f"{last} does not load: {e}", fix)


def find_models(args, base, adapter, fused):
    """Return {"base": (model, tokenizer), …} of the models to test, see load()."""
    run = f"VERSION={args.version} MODEL={args.model}"
    download = f"hf download mlx-community/{args.model} --local-dir {base}"
    if args.model == "tiny-gemma-3":
        download = "python tests/tiny_base.py"
    train = f"{run} ./fine_tune.sh, or test the base model alone: {run} {ME} --models base"
    if not base.is_dir():
        missing("base model", base / "config.json", "MODEL", download)
    asked = set(args.models.split(","))
    if len(asked) == 3 and not fused.exists():
        asked.remove("fused")
    parts = {
        "base": (download, base),
        "adapter": (train, base, adapter),
        "fused": (f"{run} ./fuse.sh", fused),
    }
    return {name: load(*parts[name]) for name in parts if name in asked}


def is_stale(adapter, fused):
    """Say whether the fused model was made from another adapter than the one there now."""
    made_from = read_json(fused / "fused_from.json", "adapter_sha256")
    weights = adapter / "adapters.safetensors"
    if made_from is None or not weights.is_file():
        return False
    return hashlib.sha256(weights.read_bytes()).hexdigest() != made_from


def find_warnings(args, models, stale, adapter, fused, valid):
    """Return what the figures will lack."""
    found, run = [], f"VERSION={args.version} MODEL={args.model}"
    trained = adapter / "lora_config.yaml"
    if "fused" in models and stale:
        found.append(f"{fused} was made from another adapter; to renew it: {run} ./fuse.sh")
    checksum = subprocess.run(["cksum"], input=valid.read_bytes(), capture_output=True).stdout
    is_learned = models.keys() != {"base"} and trained.is_file()
    if is_learned and checksum.strip() not in trained.read_bytes():
        what = "valid.jsonl is not the one of the training, which may have seen some of it"
        found.append(f"{what}; to train anew: {run} ./fine_tune.sh")
    for warning in found:
        print(f"warning: {warning}", file=sys.stderr)
    return found


def set_sampling(args, base):
    """Set what is not given of SAMPLING as generation_config.json of the base says, if it does."""
    for name, usual in SAMPLING.items():
        said = read_json(base / "generation_config.json", name)
        if getattr(args, name) is None:
            setattr(args, name, usual if said is None else said)


# ---- the validation rows ------------------------------------------------------------------------
@dataclass
class Row:
    """A row of valid.jsonl."""

    line: int
    context: str  # what stood before the reply
    reference: str  # what was really said
    ask: list  # tokens up to where the reply begins
    tokens: list  # tokens of it all, with the end of the turn, as in training

    def length(self):
        """Return the tokens of the reply."""
        return len(self.tokens) - len(self.ask)


def chat_of(line):
    """Return the chat in a line of valid.jsonl; ValueError or the like if it holds none.

    {"prompt": "hi", "completion": "yo"} → [user says "hi", assistant says "yo"], messages such as
    {"role": "user", "content": "hi"}; {"messages": […]} holds a list of them.
    """
    row = json.loads(line)
    chat = row.get("messages") or [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    roles = [message["role"] for message in chat]
    if roles != ["user", "assistant"] * (len(chat) // 2):
        raise ValueError("user and assistant do not take turns")
    for message in chat:
        message["content"].encode()  # a text, without lone surrogates
    return chat


def give_up(*_):
    raise TimeoutError("it took more than a minute")


def encode(chat, tokenizer):
    """Return the tokens up to where the last reply begins, and those of it all."""
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)  # a template is a program, and may have no end
    try:
        ask = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True)
        tokens = tokenizer.apply_chat_template(chat)
    finally:
        signal.alarm(0)
    if not ask or tokens[: len(ask)] != ask or len(tokens) == len(ask):
        raise ValueError("it begins a reply otherwise than it goes on, so the reply has no loss")
    return ask, tokens


def read_rows(args, valid, base, tokenizer):
    """Return the rows of valid.jsonl."""
    build = f"VERSION={args.version} python build_train.py"
    other = f"MODEL={DEFAULTS['MODEL']} ./fine_tune.sh, or another instruct model (-it, -Instruct)"
    authors = read_json(valid.with_name("settings.json"), "authors") or ["reply"]
    names = {"user": "", "assistant": f"{authors[0]}: "}
    rows = []
    for number, line in enumerate(valid.read_bytes().splitlines(), 1):
        where = f"{valid} line {number}"
        try:
            chat = chat_of(line)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            shapes = '{"prompt": text, "completion": text} or {"messages": [user, assistant, …]}'
            fail(f"{where} is not {shapes} in UTF-8", build)
        try:
            ask, tokens = encode(chat, tokenizer)
        except Exception as e:  # whatever the program does
            fail(f"the chat template of {base} fails on {where}: {e}", other)
        context = "\n".join(names[m["role"]] + m["content"] for m in chat[:-1])
        rows.append(Row(number, context, chat[-1]["content"], ask, tokens))
    if not rows:
        fail(f"{valid} is empty", build)
    return rows


def draw(rows, args):
    """Return the rows that every model answers: for one seed the same."""
    places = np.random.default_rng(args.seed).permutation(len(rows))
    return [rows[place] for place in places[: args.replies]]


# ---- one model at a time ------------------------------------------------------------------------
def progress(steps, label):
    """Return a list to go through: with a bar, or in a pipe with a line at the start."""
    if not sys.stderr.isatty():
        print(f"{label}: {len(steps)} steps", file=sys.stderr)
    return tqdm(steps, label, leave=False, disable=None)


def row_losses(model, rows, batch_tokens, label=""):
    """Return for each row the loss of its completion: the sum over its tokens, in nats.

    Longest rows first: what does not fit into memory shows at once. Only the logits of completions
    become float32: those of all would be 2 GB (2,048 tokens, Gemma's vocabulary of 262,144).
    """
    left = sorted(rows, key=lambda row: -len(row.tokens))
    batches, nats = [], {}
    while left:
        size = max(1, batch_tokens // len(left[0].tokens))
        batches.append(left[:size])
        del left[:size]
    for batch in progress(batches, label):
        width = len(batch[0].tokens)
        padded = [row.tokens + [0] * (width - len(row.tokens)) for row in batch]
        logits = model(mx.array(padded)[:, :-1])
        for row, guesses in zip(batch, logits, strict=True):  # each of the token after it
            guesses = guesses[len(row.ask) - 1 : len(row.tokens) - 1].astype(mx.float32)
            targets = mx.array(row.tokens[len(row.ask) :])
            losses = nn.losses.cross_entropy(guesses, targets)
            nats[row.line] = np.array(losses).sum(dtype=float)
    return np.array([nats[row.line] for row in rows])


def write_replies(model, tokenizer, rows, args, done, label=""):
    """Fill done, {line: (reply, whether it ended)}, batch by batch: Ctrl-C keeps what is there."""
    sampler = make_sampler(args.temperature, top_p=args.top_p, top_k=args.top_k)
    options = {"max_tokens": args.max_tokens, "sampler": sampler, "return_token_ids": True}
    size = args.reply_batch
    rows = sorted(rows, key=lambda row: len(row.ask))
    mx.random.seed(args.seed)
    for batch in progress([rows[i : i + size] for i in range(0, len(rows), size)], label):
        made = mlx_lm.batch_generate(model, tokenizer, [row.ask for row in batch], **options)
        for row, text, tokens in zip(batch, made.texts, made.token_ids, strict=True):
            done[row.line] = visible(text.strip()), len(tokens) < args.max_tokens


def measure(models, rows, asked, args):
    """Return row_losses() and write_replies() by model, and whether Ctrl-C cut them short."""
    nats, replies = {}, {}
    quit_at_once = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for name in list(models):
            model, tokenizer = models.pop(name)  # one in memory at a time
            nats[name] = row_losses(model, rows, args.batch_tokens, f"{name} loss")
            replies[name] = {}
            write_replies(model, tokenizer, asked, args, replies[name], f"{name} replies")
            del model
            mx.clear_cache()
    except KeyboardInterrupt:
        if not nats:
            raise
        return nats, replies, True
    except (MemoryError, RuntimeError, ValueError) as e:
        fix = f"{ME} --batch-tokens 512 --reply-batch 1 (less memory), or --replies 0"
        fail(f"a model cannot be computed: {e}", fix)
    finally:
        signal.signal(signal.SIGINT, quit_at_once)
    return nats, replies, False


# ---- figures: {"loss": {"base": 9.539, "adapter": 3.066}, "loss error": …} ----------------------
def ratio(parts, wholes):
    """Return what all parts are to all wholes, and the standard error of that over the rows.

    Nats [2, 4] of rows of [1, 2] tokens: a loss of 2, error 0. (Cochran, Sampling Techniques, 2.11)
    """
    value = parts.sum() / wholes.sum()
    return float(value), float(np.sqrt(((parts - value * wholes) ** 2).sum()) / wholes.sum())


def loss_figures(table, nats, counts):
    """Add what follows from the nats of each row, {model: array}, and its number of tokens."""
    gains = {who: nats["base"] - nats[who] for who in nats if "base" in nats and who != "base"}
    for who in nats:
        table["loss"][who], table["loss error"][who] = ratio(nats[who], counts)
    for who in gains:
        table["gain"][who], table["gain error"][who] = ratio(gains[who], counts)
    if len(gains) == 2 and table["gain"]["adapter"] > 2 * table["gain error"]["adapter"]:
        kept = ratio(gains["fused"], gains["adapter"])
        table["kept"]["fused"], table["kept error"]["fused"] = kept


def told_apart(real, made):
    """Return how often a classifier picks the real one of two replies to a chat, and the error.

    It learns from four fifths of the pairs, by pieces of one to four letters and by where a reply
    begins and ends, and judges the other pairs. Equal replies count half.
    """
    texts = [f"\x02{text}\x03" for text in real + made]
    is_real = [True] * len(real) + [False] * len(made)
    letters = TfidfVectorizer(
        analyzer="char", ngram_range=(1, 4), lowercase=False, sublinear_tf=True
    )
    classifier = make_pipeline(letters, LogisticRegression(C=10, max_iter=1000))
    split = {"groups": 2 * list(range(len(real))), "cv": GroupKFold(5)}
    scores = cross_val_predict(classifier, texts, is_real, **split, method="decision_function")
    lead = np.round(scores[: len(real)] - scores[len(real) :], 9)
    picked = float(np.mean(lead > 0) + np.mean(lead == 0) / 2)
    near = (picked * len(real) + 1) / (len(real) + 2)  # so that 40 of 40 has an error, too
    return picked, math.sqrt(near * (1 - near) / len(real))


def style_figures(table, who, texts):
    """Add the mean length and the shares of STYLE of some replies."""
    table["length"][who] = sum(map(len, texts)) / len(texts)
    for name, found in STYLE.items():
        table[name][who] = sum(bool(found(text)) for text in texts) / len(texts)
    table["replies"][who] = len(texts)


def words(text):
    return set(re.findall(r"[^\W\d_]{2,}", text.casefold()))


def missing_words(real, made):
    """Return which of the words that most real replies have, 20 at most, never come up.

    Of ["no no", "boh"] that is "no" for replies [], if one reply of two were many.
    """
    counts = Counter(word for text in real for word in words(text))
    common = [word for word, count in counts.most_common(20) if count >= max(5, len(real) / 20)]
    return [word for word in common if word not in set().union(*map(words, made))]


def figures(rows, asked, nats, replies, args):
    """Return the figures and the texts {"reference": {line: text}, …}, of whom there are any."""
    table = defaultdict(dict)
    loss_figures(table, nats, np.array([row.length() for row in rows]))
    real = {
        row.line: (visible(row.reference), row.length() <= args.max_tokens + 1) for row in asked
    }
    said = {}
    for who, done in ({"reference": real} | replies).items():
        if not done:
            continue
        said[who] = {line: text for line, (text, _) in done.items()}
        mine = list(said[who].values())
        theirs = [real[line][0] for line in done]
        if who != "reference" and len(mine) >= 20:
            pair = told_apart(theirs, mine)
            table["told apart"][who], table["told apart error"][who] = pair
            table["missing words"][who] = ", ".join(missing_words(theirs, mine))
        style_figures(table, who, mine)
        table["unfinished"][who] = sum(not ended for _, ended in done.values()) / len(mine)
    return table, said


def shown(table, name, who):
    """Return a figure as text: "3.07", "0.88 ± 0.07", "84% ± 4%", "34%", of a few "2 of 7".

    It has as many digits as its error leaves: 0.05 two, 0.3 one, 12 none after the point.
    """
    value = table[name].get(who, "")
    error = table.get(f"{name} error", {}).get(who)
    if not isinstance(value, float):
        return str(value)
    if name == "length":
        return f"{value:,.0f}"
    if name in ("loss", "gain"):
        least = min(table["gain error"].values(), default=error)  # they are to be compared
        places = max(0, -math.floor(math.log10(least))) if least > 0 else 2
        text = f"{value:.{places}f}"
        return text if name == "loss" else f"{text} ± {error:.{places}f}"
    if error is not None:
        return f"{value:.0%} ± {error:.0%}"
    count = table["replies"][who]
    return f"{value:.0%}" if count >= FEW else f"{value * count:.0f} of {count}"


def cells(table):
    """Return {name: {who: text}} of the figures that someone has."""
    everyone = [*list(table["replies"])[:1], *table["loss"]]  # the reference, if it is known
    names = [name for name in table if set(table[name].values()) - {""} and "error" not in name]
    return {name: {who: shown(table, name, who) for who in everyone} for name in names}


# ---- the verdict, in sentences ------------------------------------------------------------------
def learned(table, count):
    """Say whether the first of the trained models is better than the base."""
    who = next(iter(table["gain"]))
    gain, error = table["gain"][who], table["gain error"][who]
    new, old = (shown(table, "loss", model) for model in (who, "base"))
    pair = f"than the base: loss {new} instead of {old}"
    if count < FEW:
        better = "Better" if gain > 0 else "No better"
        more = f"{FEW} would do, see build_train.py --valid-size"
        return f"{better} {pair}, but too few rows to be sure: {count} ({more})."
    if gain > 2 * error:
        return f"Better {pair}."
    if gain < -2 * error:
        return f"Worse {pair}. Train with a lower LEARNING_RATE, or on more data."
    return f"No better {pair}, which may be chance. Train longer, or on more data."


def keeps(table, bits):
    """Say whether the fused model has what the adapter learned; bits: what it was rounded to."""
    sentence = f"The fused model keeps {table['kept']['fused']:.0%} of that."
    if table["kept"]["fused"] >= 0.9:
        return sentence
    setting = {"8": "FUSED_BITS=16 ", "16": ""}.get(bits, "FUSED_BITS=8 ")
    return f"{sentence} Fuse again: {setting}./fuse.sh."


def far_figures(table, who):
    """Return the shares that are over 15 points, and more than chance, from the reference's."""
    far = []
    for name in "unfinished", *STYLE:
        share, real = table[name][who], table[name]["reference"]
        both = (share + real) / 2
        chance = math.sqrt(2 * both * (1 - both) / table["replies"][who])
        if abs(share - real) > max(0.15, 3 * chance):
            far.append(name)
    return far


def sounds(table, who):
    """Yield what there is to say of the replies of a model."""
    told = shown(table, "told apart", who)
    if told:
        base = shown(table, "told apart", "base")
        than = f" (the base's in {base})" if base and who != "base" else ""
        what = f"A classifier tells its replies from the real ones in {told} of the pairs{than}"
        yield f"{what}; 50% would be perfect."
    far = [
        f"{name} {shown(table, name, who)} instead of {shown(table, name, 'reference')}"
        for name in far_figures(table, who)
    ]
    words = shown(table, "missing words", who)
    if words:
        far.append(f"it never says {words}")
    if far:
        yield f"It does not write like them yet: {'; '.join(far)}."


def verdict(table, count, bits):
    """Return the sentences, the most important first."""
    if not all(map(math.isfinite, table["loss"].values())):
        return ["Broken: a loss is not a number. Train again with a lower LEARNING_RATE."]
    if not table["gain"]:
        return ["Nothing to compare: test the base model and the adapter together."]
    sentences = [learned(table, count)]
    if table["kept"]:
        sentences.append(keeps(table, bits))
    trained = [who for who in table["gain"] if who in table["replies"]]
    if trained:
        sentences += sounds(table, trained[-1])
    return sentences


# ---- the page -----------------------------------------------------------------------------------
def learning_curve(path):
    """Return [(iteration, loss), …] of losses.csv; [] if it is not as it should be: an ornament."""
    try:
        with path.open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["val_loss"]]
        curve = [(int(row["iteration"]), float(row["val_loss"])) for row in rows]
    except (OSError, ValueError, KeyError, csv.Error):
        return []
    return curve if len(curve) > 1 and curve[-1][0] else []


def blind_cards(asked, said, judged, seed):
    r"""Return what the page shows of the rows in which the judged model said something else.

    {"chat": "ann: hi\nbob: ready?", "pair": ["yo", "hello"], "real": "B", "others": {"base": "Hi"}}
    """
    coin = random.Random(f"{seed} {said}")  # noqa: S311 (another report, another order)
    cards = []
    for row in asked:
        texts = {who: lines[row.line] for who, lines in said.items() if row.line in lines}
        real, reply = texts.pop("reference"), texts.pop(judged, "")
        if reply in ("", real):
            continue
        pair = [real, reply]
        if coin.random() < 0.5:
            pair.reverse()
        chat = visible(row.context)
        if len(chat) > 300:
            chat = "… " + chat[-300:].split(" ", 1)[-1]
        others = {who: text for who, text in texts.items() if text != reply}
        real = "AB"[pair.index(real)]
        cards.append({"chat": chat, "pair": pair, "real": real, "others": others})
    return cards


def report(facts, table, asked, said, adapter, args):
    """Return the page. The text of the chat is escaped by jinja2."""
    made = [who for who in said if who != "reference"]
    judged = made[-1] if made else ""
    blind = blind_cards(asked, said, judged, args.seed)[:BLIND]
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return page.from_string(PAGE).render(
        facts,
        cells=cells(table),
        far={who: far_figures(table, who) for who in made},
        judged=judged,
        models=[who for who in table["loss"] if who in ("base", judged or "adapter")],
        blind=blind,
        sure=math.ceil(len(blind) / 2 + math.sqrt(len(blind))),  # two standard errors over half
        curve=learning_curve(adapter / "losses.csv"),
    )


# ---- written whole or not at all ----------------------------------------------------------------
def beside(final):
    """Return data/results/.v1_M.partial and .old, names that no VERSION gives."""
    return [final.with_name(f".{final.name}.{kind}") for kind in ("partial", "old")]


def hold(final):
    """Return the file that holds the results for this run; the kernel lets go of it at the end."""
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = final.with_name(f".{final.name}.lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is writing {final}", "wait until it is done, or end it")
    partial, old = beside(final)
    if old.exists() and not final.exists():  # killed between the two renames of write()
        old.rename(final)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return lock


def write(final, page, facts, asked, said):
    """Write the three files beside the final folder, then put them in its place."""
    partial, old = beside(final)
    partial.mkdir()
    (partial / "report.html").write_text(page, encoding="utf-8")
    known = json.loads(json.dumps(facts), parse_constant=lambda _: None)  # JSON knows no NaN
    text = json.dumps(known, indent=2, ensure_ascii=False)
    (partial / "metrics.json").write_text(text, encoding="utf-8")
    with (partial / "generations.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file, quoting=csv.QUOTE_ALL)  # -sig is a mark for Excel
        table.writerow(["line", "prompt", *said])
        for row in asked:
            texts = [texts.get(row.line, "") for texts in said.values()]
            table.writerow([row.line, *map(defuse, [row.context, *texts])])
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


# ---- the run ------------------------------------------------------------------------------------
def test(args, valid, final):
    """Test the models and write the results; return the exit code."""
    base = Path("models/base", args.model)
    adapter = Path("models/adapters", f"adapter-{final.name}")
    fused = Path("models/fused", f"fused-{final.name}")
    models = find_models(args, base, adapter, fused)
    rows = read_rows(args, valid, base, next(iter(models.values()))[1])
    set_sampling(args, base)
    asked = draw(rows, args)
    stale = is_stale(adapter, fused)
    warnings = find_warnings(args, models, stale, adapter, fused, valid)
    print(f"testing {', '.join(models)} on {len(rows)} rows of {valid}")
    nats, replies, stopped = measure(models, rows, asked, args)
    if stopped:
        if len(nats) < 2 and final.exists():
            print("interrupted: the report of before is as it was", file=sys.stderr)
            return 130
        warnings.append("stopped with Ctrl-C: this is what was done so far")

    table, said = figures(rows, asked, nats, replies, args)
    if stale:  # the fuse is not to blame for the difference
        table["kept"].clear()
        table["kept error"].clear()
    bits = read_json(fused / "fused_from.json", "bits")
    sentences = verdict(table, len(rows), str(bits))
    facts = {
        "verdict": " ".join(sentences),
        "warnings": warnings,
        "settings": vars(args),
        "rows": len(rows),
        "tokens": sum(row.length() for row in rows),
        "versions": {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__},
    }
    page = report(facts | {"sentences": sentences}, table, asked, said, adapter, args)
    write(final, page, facts | {name: table[name] for name in table if table[name]}, asked, said)
    files = [final / name for name in ("report.html", "generations.csv", "metrics.json")]
    print("", *sentences, "", *files, sep="\n")  # not before: `| tee` may have ended with Ctrl-C
    if stopped:
        print(f"warning: {warnings[-1]}", file=sys.stderr)
    return 130 if stopped else 0


def main():
    os.chdir(ROOT)
    for stream in sys.stdout, sys.stderr:  # to a terminal that knows ASCII alone, at once
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    args = settings()
    valid = Path(f"data/for_train/{args.version}/valid.jsonl")
    if not valid.is_file():
        missing("valid.jsonl", valid, "VERSION", f"VERSION={args.version} python build_train.py")
    final = Path("data/results", f"{args.version}_{args.model}")
    with hold(final):
        return test(args, valid, final)


# ---- the page, a template of jinja2 -------------------------------------------------------------
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ settings.version }} · {{ settings.model }}</title>
<style>
:root {
  color-scheme: light dark;
  --paper: light-dark(#faf9f7, #161719);
  --card: light-dark(#ffffff, #1e1f22);
  --line: light-dark(#e5e1db, #34363b);
  --ink: light-dark(#2b2926, #e8e6e2);
  --soft: light-dark(#68625a, #a9a59d);
  --base: light-dark(#9a4a22, #e59a6c);
  --adapter: light-dark(#27619f, #85b5ec);
  --fused: light-dark(#1d6a4b, #74c9a3);
  --far: light-dark(#86600a, #e2b755);
}
* { box-sizing: border-box }
body {
  margin: 0 auto; padding: 2rem 1rem; max-width: 66rem; overflow-wrap: anywhere;
  background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
}
h1, .big { font: clamp(1.6rem, 4.5vw, 2.2rem)/1.2 ui-serif, Georgia, serif; margin: .3rem 0 }
h2 { margin: 0; font: 1.2rem ui-serif, Georgia, serif }
p { margin: .4rem 0 }
summary { cursor: pointer; color: var(--soft) }
header { padding-left: 1.1rem; border-left: .3rem solid var(--line) }
.soft { color: var(--soft); font-size: .875rem }
.base { color: var(--base) } .adapter { color: var(--adapter) } .fused { color: var(--fused) }
.far { color: var(--far); font-weight: 600 }
.panel {
  margin: 1.25rem 0 0; padding: 1.1rem; min-width: 0; overflow-x: auto;
  background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
}
.two {
  display: grid; gap: 0 1.25rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr));
}
svg { margin-top: 1rem; width: 100%; fill: none; stroke: var(--adapter); overflow: visible }
svg text { fill: var(--soft); stroke: none; font-size: 12px }
table { width: 100%; border-collapse: collapse; overflow-wrap: normal }
th, td { padding: .35rem .3rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; font-weight: 400 }
tr > :first-child { text-align: left; color: var(--soft) }
.said { margin: .15rem 0; white-space: pre-wrap; unicode-bidi: plaintext }
@media (max-width: 40rem) { table { font-size: .75rem } }
</style>
{% macro big(name) %}
<p class="big">
{% for who in models %}
{{ "" if loop.first else "→" }} <span class="{{ who }}">{{ cells[name][who] }}</span>
{% endfor %}
</p>
{% endmacro %}
{% macro said(label, text) %}
<div><b class="{{ label }}">{{ label }}</b><p class="said">{{ text }}</p></div>
{% endmacro %}

<header>
<p class="soft">{{ settings.version }} · {{ settings.model }}</p>
<h1>{{ sentences[0] }}</h1>
{% for sentence in sentences[1:] %}<p>{{ sentence }}</p>{% endfor %}
</header>
{% for warning in warnings %}<p class="panel">{{ warning }}</p>{% endfor %}

<div class="two">
<section class="panel">
<h2>Did it learn?</h2>
{{ big("loss") }}
<p class="soft">Loss of the {{ models | join(" and of the ") }} model: how surprising it finds
what was really said, in {{ rows }} replies that it was not trained on. Lower is better.</p>
{% if curve %}
{% set losses = curve | map(attribute=1) | list %}
{% set low, top, last = losses | min, losses | max, curve[-1][0] %}
<svg viewBox="-6 -22 412 152" role="img" aria-label="loss by iteration">
<polyline points="{% for n, loss in curve %}
{{ 400 * n / last }},{{ 100 * (top - loss) / (top - low or 1) }} {% endfor %}"/>
<text x="0" y="124">0: the base, {{ "%.2f" % losses[0] }}</text>
<text x="400" y="124" text-anchor="end">iteration {{ last }}</text>
</svg>
{% set kept = curve[1:] | min(attribute=1) %}
<p class="soft">The loss while it was trained. Kept: iteration {{ kept[0] }},
{{ "%.2f" % kept[1] }}.</p>
{% endif %}
</section>
<section class="panel">
<h2>Does it sound like them?</h2>
{% if cells["told apart"] and cells["told apart"][judged] %}
{{ big("told apart") }}
<p class="soft">So often a classifier, shown a real reply and one of the
{{ models | join(" or of the ") }} model, picks the real one. 50% would be perfect: nobody could
tell.</p>
{% else %}
<p class="soft">With 20 replies or more, a classifier would judge that.</p>
{% endif %}
</section>
</div>

{% if blind %}
<section class="panel">
<h2>Can you tell?</h2>
<p>Two replies to the same chat: one was really said, the other is of the {{ judged }} model. Note
on paper which one you take for real, then open the answer.
{% if sure <= blind | length %}Of {{ blind | length }}, half is guessing;
{{ sure }} or more right means that you can tell.{% endif %}</p>
</section>
{% for card in blind %}
{% if loop.index == 5 %}
<details><summary class="panel">{{ loop.length - 4 }} more</summary>
{% endif %}
<article class="panel">
<p class="said soft">{{ card.chat }}</p>
<div class="two">{{ said("A", card.pair[0]) }}{{ said("B", card.pair[1]) }}</div>
<details><summary>Which one is real?</summary>
<p><strong>{{ card.real }}</strong> was really said.</p>
{% for who, text in card.others.items() %}{{ said(who, text) }}{% endfor %}
</details>
</article>
{% endfor %}
{% if blind[4:] %}</details>{% endif %}
{% endif %}

<section class="panel">
<h2>The figures</h2>
<table>
<tr><th></th>{% for who in cells.loss %}<th class="{{ who }}">{{ who }}</th>{% endfor %}</tr>
{% for name, row in cells.items() %}
<tr><td>{{ name }}</td>
{% for who, text in row.items() %}
<td{% if name in far[who] %} class="far"{% endif %}>{{ "≠ " if name in far[who] }}{{ text }}</td>
{% endfor %}</tr>
{% endfor %}
</table>
<p class="soft"><b>reference</b> what was really said. <b>loss</b> nats per token of that, the end
of the turn included. <b>gain</b> by how much it is below the base's. <b>kept</b> how much of that
the fused model has. <b>±</b> the standard error. <b>length</b> characters of a reply.
<b>looping</b> the same piece four times in a row. <b>unfinished</b> cut off at
{{ settings.max_tokens }} tokens. <b>≠</b> far from the reference, by more than chance.
<b>told apart</b> how often a classifier that looks at letters picks the real one of two replies:
compare it at the same number of replies only. <b>missing words</b> of the 20 that are used most,
those that never come up.</p>
</section>

<p class="soft">Replies at temperature {{ settings.temperature }}, top-p {{ settings.top_p }},
top-k {{ settings.top_k }}, at most {{ settings.max_tokens }} tokens, seed {{ settings.seed }}.
mlx {{ versions.mlx }}, mlx-lm {{ versions.mlx_lm }}.</p>
"""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        os._exit(130)
    except BrokenPipeError:  # `| head -1` has read enough; what there is to write is written
        os._exit(0)
    except OSError as e:
        place = visible(str(e.filename or "the output"))
        fix = f"make room (df -h .) or mend permissions (ls -ld '{place}')"
        fail(f"{place}: {e.strerror}", fix)
