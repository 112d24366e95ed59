"""Stage 1: make the training data from an exported chat.

    python build_train.py                     # the sample; then ./fine_tune.sh
    VERSION=mine python build_train.py --valid-size 0.2

Reads   data/raw/messages_${VERSION}.json, or .jsonl (one entry a line), in the order of time, in one of three shapes:
        {"previous_messages": ["hi all", "hi!"], "message": "ready?"}            a reply and what came before it
        "hi all"  or  {"message": "hi all", "author": "ann", "conversation": 7}  a chat log
        {"prompt": "Hi!", "completion": "Hello"}                                 pairs that are ready
        and the tokenizer of models/base/${MODEL}/, if it is there
Writes  data/for_train/${VERSION}/: train.jsonl and valid.jsonl (one {"prompt": …, "completion": …} a line),
        dropped.jsonl (every entry that is in neither of them, and why)
Exit    0 done, 1 something is missing or wrong, 2 wrong usage, 130 Ctrl-C
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}. FIX: see README.md, Install")

import argparse
import gc
import json
import os
import re
import shutil
import signal
import unicodedata
from bisect import bisect
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path

signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # Ctrl-C
os.environ["HF_HUB_OFFLINE"] = "1"
try:
    from sklearn.model_selection import train_test_split
    from sklearn.utils import shuffle
    from tqdm import tqdm
except ImportError as e:
    sys.exit(f"error: {e}. FIX: source venv/bin/activate; pip install -r requirements.txt")


# ---- settings: edit a default here, or give the flag for a single run ------------------------------------------------
# fmt: off
def settings():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda what: parser.exit(2, f"error: {what}. FIX: python build_train.py --help\n")
    add, env = parser.add_argument, os.environ.get
    add("--version", default=env("VERSION", "v1"), help="which data: data/raw/messages_VERSION.json")
    add("--model", default=env("MODEL", "gemma-3-text-27b-it-4bit"), help="whose tokenizer: models/base/MODEL")
    add("--prompt", default="{context}\n\nWrite the next message of this chat.", help="template of a prompt")
    add("--question-prompt", default="{context}\n\nAsk the next question in this chat.", help="where the reply asks")
    add("--window", type=int, default=10, help="chat log: messages before a reply that go into its prompt")
    add("--only-author", default="", help="learn the replies of this author alone; '' of everyone")
    add("--off", default="", help="names of rules to switch off, with commas: 'link,too short'")
    add("--min-context", type=int, default=1, help="messages that a reply needs before it; 0 none")
    add("--min-chars", type=int, default=2, help="characters of the shortest reply")
    add("--max-chars", type=int, default=1000, help="characters of the longest reply")
    add("--stock-share", type=float, default=0.02, help="share of the rows for one and the same reply; 5 rows always")
    add("--remove-emoji", action="store_true", help="remove emoji from all messages")
    add("--max-context-chars", type=int, default=300, help="characters of a context message; the rest becomes '…'")
    add("--max-seq-length", type=int, default=env("MAX_SEQ_LENGTH", 1024), help="tokens of a row, as in fine_tune.sh")
    add("--batch-size", type=int, default=env("BATCH_SIZE", 2), help="as in fine_tune.sh; for the figures printed")
    add("--valid-size", type=float, default=0.1, help="share of the rows to validate with, 0 to 1")
    add("--valid-rows", type=int, default=400, help="most rows to validate with")
    add("--seed", type=int, default=0, help="of the split; another whole number, another split")
# ----------------------------------------------------------------------------------------------------------------------
    s = parser.parse_args()
    for name, value in vars(s).items():
        least = 0 if name in ("min_context", "min_chars", "seed") else 1
        if (type(value) is int and not least <= value < 2**32) or (type(value) is float and not 0 < value < 1):
            allowed = f"{least} or more" if type(value) is int else "between 0 and 1"
            parser.error(f"--{name.replace('_', '-')} is {value}, not {allowed}")
    s.prompt, s.question_prompt = s.prompt.replace("\\n", "\n"), s.question_prompt.replace("\\n", "\n")
    if "{context}" not in s.prompt or "{context}" not in s.question_prompt:
        parser.error("--prompt or --question-prompt does not say where {context} goes")
    s.only_author = clean(s.only_author)  # as the authors of the chat are
    s.off = [name.strip().casefold() for name in s.off.split(",") if name.strip()]
    if unknown := set(s.off) - set(rules(s)):
        parser.error(f"--off names {min(unknown)!a}, and the rules are: {', '.join(rules(s))}")
    return s


# ---- filter: a row is rejected by the first rule that says True; remove a line, change it, add one -------------------
def rules(s):
    """Return {name of the rule: function(reply, context, author) → True to reject the row}."""
    seen, pasted, stock = Counter(), Counter(), Counter()
    return {
        "empty":          lambda reply, *_: not reply,
        "no context":     lambda reply, context, _: len(context) < s.min_context,
        "other author":   lambda reply, context, author: s.only_author and author != s.only_author,
        "bot":            lambda reply, context, author: author.casefold() in BOTS,
        "bot command":    lambda reply, *_: re.match(r"[!/][^\W\d_]\w*(\s|$)", reply),  # not "/etc/fstab"
        "link":           lambda reply, *_: re.search(r"(?i)://|www\.|(?<=\w)\.[a-z]{2,6}/", reply),
        "too short":      lambda reply, *_: len(reply) < s.min_chars,
        "too long":       lambda reply, *_: len(reply) > s.max_chars,
        "personal data":  lambda reply, *_: "[…]" in reply,  # what PERSONAL becomes in all messages
        "same character": lambda reply, *_: re.search(r"(.)\1{14}", reply),
        "same words":     lambda reply, *_: reply.count(" ") >= 3 * max(2, len(set(reply.casefold().split()))) - 1,
        "no letters":     lambda reply, *_: len(reply) >= 40 and sum(map(str.isalpha, reply)) < 0.3 * len(reply),
        "numbers":        lambda reply, context, _: len(list(filter(is_number, context))) >= 0.8 * len(context) > 0,
        "duplicate":      lambda reply, context, _: is_over((folded(reply), *map(folded, context)), seen),
        "pasted again":   lambda reply, *_: len(reply) >= 80 and is_over(folded(reply), pasted),
        "stock reply":    lambda reply, *_: is_over(folded(reply), stock, 5, s.stock_share),
    }
# fmt: on


BOTS = {"nightbot", "streamelements", "streamlabs", "moobot", "fossabot", "wizebot"}
PERSONAL = re.compile(
    r"[\w.+-]{1,64}@[\w-]{1,63}\.\w[\w.]*"  # e-mail
    r"|\b[A-Za-z]{2}\d\d ?[A-Za-z]{0,4}(?: ?\d){10}(?: ?\d|[A-Z])*"  # IBAN
    r"|(?<![\w.:/-])(?:(?:\+|00?)[1-9](?:[ ().-]{0,2}\d){7,13}|\(?\d{3}\)?[ .-]?\d{3}[ .-]?\d{3,4}"  # +39 …, (555) …
    r"|\d{4}[ -]?(?:\d{4}[ -]?\d{4}[ -]?\d{4}|\d{6}[ -]?\d{5}))(?![\w:/-]|\.\d)"  # payment card
)
PUNCTUATION = {i: None for i in range(0x10000) if unicodedata.category(chr(i))[0] in "PZ"}  # and white space
is_number = cache(re.compile(r"[\d\s.,:+%-]*\d[\d\s.,:+%-]*").fullmatch)


@cache
def folded(message):
    """Return the message without case, punctuation and white space: "Ciao,  MAMMA!!" → "ciaomamma"; "?!" stays."""
    return message.casefold().translate(PUNCTUATION) or message


def is_over(key, counts, most=1, share=0.0):
    """Let a key through `most` times, or up to its share of all let through, and count it; return True beyond that."""
    if counts[key] + 1 > max(most, share * (counts[None] + 1)):
        return True
    counts[key] += 1
    counts[None] += 1  # the total
    return False


# ---- read and clean --------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Row:
    number: int  # of the entry: in the list from 0, or the line of a .jsonl file, from 1
    window: tuple[str, ...]  # the context, oldest message first, then the reply: ("hi all", "hi!", "ready?")
    author: str = ""
    conversation: str = ""
    prompt: str = ""  # of a pair; its lines are the context
    start: int = 0  # place of the oldest message in the log
    end: int = 0  # place of the reply
    tokens: int = 0


INVISIBLE = re.compile(  # subtle: joiners (200c, 200d) stay where they make an emoji, or a word in Arabic or Hindi
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufeff"
    "\uffa0\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
    "|(?<![\u0600-\u0dff\u2600-\u27bf\ufe0f\U0001f000-\U0001faff])[\u200c\u200d]|[\u200c\u200d](?![^\\s\u200c\u200d])"
)
EMOJI = re.compile("[\U0001f000-\U0001faff\u2300-\u23ff\u2600-\u27bf\u2b00-\u2bff\ufe0f\u20e3]")


def clean(text, remove_emoji=False):
    """Return text in NFC, on one line, without what cannot be seen: "  Perche\\u0301\\u200b no?\\n" → "Perché no?"."""
    text = EMOJI.sub("", text) if remove_emoji else text
    if not text.isascii() or not text.isprintable():
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    return " ".join(text.split())


def fail(what, fix):
    sys.exit(f"error: {what}. FIX: {fix}")


def read_entries(path):
    """Yield (number, entry) of the list in a .json file, numbers from 0, or of the lines of a .jsonl file, from 1."""
    line, entries = 1, []
    try:
        with path.open("rb") as file:
            if path.suffix == ".json":
                entries = json.load(file)
            for line, data in enumerate(tqdm(file, "reading", delay=1, leave=False, disable=None), 1):
                if data.strip():
                    yield line, json.loads(data)
    except UnicodeDecodeError as e:
        fix = f"iconv -f WINDOWS-1252 -t UTF-8 '{path}' > new; mv new '{path}'"
        fail(f"{path} is not UTF-8 text, line {line + e.object.count(10, 0, e.start)}", fix)
    except (ValueError, RecursionError) as e:  # no JSON; a number too long; too deep
        what, line, column = getattr(e, "msg", e), line + getattr(e, "lineno", 1) - 1, getattr(e, "colno", 1)
        fix = "mend it or export again; a chat of WhatsApp: README.md, Your own chat"
        fix += f"; with one entry a line, mv '{path}' '{path}l'" if path.suffix == ".json" else ""
        fail(f"{path} is not JSON: {what}, line {line}, column {column}", fix)
    except OSError as e:
        fail(f"{path} cannot be read: {e.strerror}", f"ls -l {path}, and mend its permissions")
    if not isinstance(entries, list):
        fix = "write [ENTRY, ENTRY, …]; an export of Telegram: README.md, Your own chat"
        fail(f"{path} holds {json.dumps(entries)[:60]}, not a list", fix)
    for number, entry in enumerate(tqdm(entries, "reading", delay=1, leave=False, disable=None)):
        entries[number] = None  # its memory is free as soon as its row is made
        yield number, entry


def read_rows(path, s, dropped):
    """Return the rows, cleaned, that pass all rules; add (row, name of the rule) to `dropped` for the others."""
    mask = str if "personal data" in s.off else lambda text: PERSONAL.sub("[…]", text)
    tidy = cache(lambda text: mask(clean(text, s.remove_emoji)))  # so equal messages share one string in memory
    label = cache(clean)  # a name may be a phone number; it goes into no file
    table = [(name, rule) for name, rule in rules(s).items() if name not in s.off]
    logs, rows = defaultdict(lambda: deque(maxlen=s.window)), []  # conversation → its last messages

    def get(key, *types):
        value = entry.get(key)
        if not isinstance(value, types) or (isinstance(value, list) and set(map(type, value)) - {str}):
            what = f'"{key}" is {json.dumps(value)[:60]}' if key in entry else f'there is no "{key}"'
            fix = 'mend or remove it; an entry is a text, or has "message", or "prompt" and "completion" (README.md)'
            fail(f"{path}, entry or line {number}: {what} in {json.dumps(entry)[:100]}", fix)
        return value

    for number, entry in read_entries(path):
        entry = entry if isinstance(entry, dict) else {"message": entry}
        names = [get(key, str, int, type(None)) for key in ("author", "conversation")]
        author, conversation = ("" if name is None else label(str(name)) for name in names)
        prompt, log = "", logs[conversation]
        if "prompt" in entry:
            texts = get("prompt", str), get("completion", str)
            prompt, reply = ("\n".join(map(tidy, text.split("\n"))).strip() for text in texts)
            context = prompt.split("\n")
        else:
            reply = tidy(get("message", str))
            context = map(tidy, get("previous_messages", list)) if "previous_messages" in entry else tuple(log)
            log.extend([reply] if reply else [])
        context = tuple(filter(None, context))
        row = Row(number, (*context, reply), author, conversation, prompt)
        broken = next((name for name, rule in table if rule(reply, context, author)), None)
        if broken:
            dropped.append((row, broken))
        else:
            rows.append(row)
    return rows


# ---- split: no message of a validation row stands in a training row --------------------------------------------------
def overlap(a, b):
    """Return how many messages after window a its window b was cut, None if they share none; b may lack a's reply."""
    for shift in range(len(b)):
        for old, new in (a, b[: len(b) - shift]), (a[:-1], b[: len(b) - 1 - shift]):
            shared = min(len(old), len(new))
            if shared and old[-shared:] == new[-shared:]:
                return shift


def line_up(rows, longest, length):
    """Set start and end, places in the log that overlap if windows may; return the places where new stretches begin."""
    logs, before = [], Row(0, ())
    for row in sorted(rows, key=lambda row: row.conversation):
        same = row.conversation == before.conversation
        shift = overlap(before.window, row.window) if same else None
        if shift is None and not (same and row.conversation):
            logs.append([])
        row.end = before.end + (2 * longest if shift is None else shift)  # what shares nothing lies far apart
        row.start = row.end - len(row.window) + 1
        logs[-1].append(row)
        before = row
    inside = {log[i].end for log in logs for i in range(length, len(log) - length // 2, length)}
    return sorted(inside | {log[0].start for log in logs})


def split(rows, s, dropped):
    """Return (training rows, validation rows): every stretch of the log is on one side, and what straddles on none."""
    for edge, rest in (0, slice(1, None)), (-2, slice(None, -1)):  # lines round nearly all prompts: a template, no chat
        lines = Counter(row.window[edge] for row in rows if row.prompt and len(row.window) > 1).most_common(2)
        if sum(count for _, count in lines) >= max(3, 0.95 * len(rows)):
            for row in rows:
                row.window = (*row.window[:-1][rest], row.window[-1])
    longest = max(len(row.window) for row in rows)
    cuts = line_up(rows, longest, min(max(50, 2 * longest), max(longest + 2, len(rows) // 4)))
    usable = sum(bisect(cuts, row.start) == bisect(cuts, row.end) for row in rows) or 1
    wanted = min(s.valid_rows, max(s.batch_size, round(s.valid_size * len(rows))))
    count = min(max(1, round(wanted * len(cuts) / usable)), len(cuts) - 1)
    drawn = set(train_test_split(range(1, len(cuts) + 1), test_size=count, random_state=s.seed)[1]) if count else set()
    train, valid, between = [], [], []
    for row in rows:
        sides = {stretch in drawn for stretch in range(bisect(cuts, row.start), bisect(cuts, row.end) + 1)}
        (between if len(sides) == 2 else valid if True in sides else train).append(row)
    dropped.extend((row, "split: between train and valid") for row in between)
    return train, valid


def drop_copies(train, valid, dropped):
    """Return valid without the rows that share text with train after all: the chat is out of order, or there twice."""
    longest = max((len(row.window) for row in train + valid), default=0)
    size = max(2, min(3, (longest - 1) // 2))  # messages on end: three, or two of short windows
    runs = [set(zip(*(row.window[i:] for i in range(size)), strict=False)) for row in valid]
    telling = {run for some in runs for run in some if len(set("".join(run))) >= 12}  # not "LULW", "gg", "LULW"
    counts = Counter()
    for row in train:
        counts.update(telling.intersection(zip(*(row.window[i:] for i in range(size)), strict=False)))
    copies = {run for run, count in counts.items() if count <= 2 * longest}  # in more rows than that: a template
    dropped.extend((row, "split: is in train as well") for row, some in zip(valid, runs, strict=True) if some & copies)
    return [row for row, some in zip(valid, runs, strict=True) if not some & copies]


# ---- fit, order, write and report ------------------------------------------------------------------------------------
def pair(row, s):
    """Return the line of the training data that the row becomes."""
    reply, most = row.window[-1], s.max_context_chars
    context = [text if len(text) <= most else text[:most].rstrip() + "…" for text in row.window[:-1]]
    template = s.question_prompt if reply.endswith(("?", "？", "؟")) else s.prompt  # noqa: RUF001
    return {"prompt": row.prompt or template.replace("{context}", "\n".join(context)).strip(), "completion": reply}


def token_counter(folder):
    """Return the function list of pairs → list of the tokens that mlx-lm's trainer makes of them."""
    if not folder.is_dir():
        print(f"\nESTIMATED tokens, no {folder}: hf download mlx-community/{folder.name} --local-dir {folder}")
        return lambda pairs: [12 + len("".join(pair.values()).encode()) // 3 for pair in pairs]
    print(f"\ncounting tokens with the tokenizer and chat template of {folder}")
    from mlx_lm.utils import load_tokenizer  # here, because it takes a second

    def count(pairs):
        turns = [zip(("user", "assistant"), pair.values(), strict=True) for pair in pairs]
        chats = [[{"role": role, "content": text} for role, text in turn] for turn in turns]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        return list(map(len, tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)))

    try:
        tokenizer = load_tokenizer(folder)
        count([{"prompt": "Hi!", "completion": "Hello"}])
    except Exception as e:  # what a broken download or a template raises can be anything
        fix = f"rm -r {folder} and download it again, or set MODEL to an instruction-tuned (-it) model"
        fail(f"{folder} has no tokenizer with a chat template that works: {str(e)!a:.200}", fix)
    return count


def fit(rows, s, count, dropped):
    """Return the rows that fit --max-seq-length, if need be without their oldest messages; set row.tokens."""
    for i in tqdm(range(0, len(rows), 1000), "counting tokens", delay=1, leave=False, disable=None):
        part = rows[i : i + 1000]
        for row, tokens in zip(part, count([pair(row, s) for row in part]), strict=True):
            row.tokens = tokens
            while row.tokens > s.max_seq_length and len(row.window) > 1 and not row.prompt:
                row.window = row.window[1:]
                row.tokens = count([pair(row, s)])[0]
    dropped.extend((row, "over --max-seq-length") for row in rows if row.tokens > s.max_seq_length)
    return [row for row in rows if row.tokens <= s.max_seq_length]


def order(rows, seed):
    """Return the rows so that mlx-lm, which makes batches in the order of the file, finds rows of equal length."""
    # subtle: it never uses the last rows, if they fill no batch; drawn at random they are no biased sample
    rest = max((len(rows) % batch for batch in range(1, min(16, len(rows)) + 1)), default=0)
    rows = shuffle(rows, random_state=seed)
    return sorted(rows[rest:], key=lambda row: -row.tokens) + rows[:rest]


def write(folder, files):
    """Write {name: lines} to a folder that appears whole or not at all. Without files: mend what a killed run left."""
    partial, old = Path(f"{folder}.partial"), Path(f"{folder}.old")
    encode = json.JSONEncoder(ensure_ascii=False).encode
    try:
        for name, lines in files.items():
            partial.mkdir(parents=True, exist_ok=True)
            with (partial / name).open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(encode(line) + "\n" for line in lines)
        if files and folder.exists():
            folder.rename(old)
        if files:
            partial.rename(folder)
    except OSError as e:
        fail(f"{folder} cannot be written: {e.strerror}", f"df -h {folder.parent}; ls -ld {folder.parent}; make room")
    finally:
        if old.exists() and not folder.exists():  # killed between the renames
            (partial if partial.exists() else old).rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def print_table(s, dropped):
    """Print how many rows each rule rejected, and the first of them: cleaned text, so that it is safe to print."""
    counts, first = Counter(rule for _, rule in dropped), {rule: row for row, rule in reversed(dropped)}
    print(f"\n{'rule':34}{'rejected':>9}   for example")
    for rule in dict.fromkeys([*rules(s), *counts]):
        example = " ".join(first[rule].window[-1].split())[:70] or "(nothing is left)" if rule in first else ""
        print(f"{rule:34}{'off' if rule in s.off else format(counts[rule], ','):>9}   {example}")


def main():
    s = settings()
    for name in s.version, s.model:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            last = name.rstrip("/").split("/")[-1]
            last = re.sub(r"^messages_|[.]jsonl?$", "", last) if name == s.version else last
            last = re.sub(r"^[^A-Za-z0-9_]+|[^A-Za-z0-9._-]", "", last)
            fix = f"{'VERSION' if name == s.version else 'MODEL'}={last or 'v1'} python build_train.py"
            if name == s.model and name.count("/") == 1:
                fix += f", after hf download {name} --local-dir models/base/{last}"
            fail(f"MODEL or VERSION is {name!a}, not a name alone", fix)
    os.chdir(Path(__file__).resolve().parent)
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    gc.disable()  # millions of small objects and no circles: looking for circles would take a third of the time
    base, folder = Path("models/base", s.model), Path("data/for_train", s.version)
    names = [Path(f"data/raw/messages_{s.version}{suffix}") for suffix in (".json", ".jsonl")]
    raw = next((name for name in names if name.exists()), names[0])
    if not raw.exists() or raw.stat().st_size == 0:
        fail(f"{raw} is not there or empty", f"cp YOUR_CHAT.json {raw}, or set VERSION to the data that is there")
    write(folder, {})
    print(f"reading {raw} with", ", ".join(f"{name} {value!r}" for name, value in vars(s).items()))
    dropped = []
    rows = read_rows(raw, s, dropped)
    train, drawn = split(rows, s, dropped) if rows else ([], [])
    valid = drop_copies(train, drawn, dropped)
    if len(valid) < len(drawn) / 2:
        what = f"{len(drawn) - len(valid)} of {len(drawn)} validation rows stand in training rows"
        fail(f"{raw} is not in the order of time: {what}", 'sort it by time, or give each entry its "conversation"')
    valid = shuffle(valid, random_state=s.seed)
    dropped.extend((row, "split: beyond --valid-rows") for row in valid[s.valid_rows :])
    count = token_counter(base)
    train, valid = (order(fit(part, s, count, dropped), s.seed) for part in (train, valid[: s.valid_rows]))
    dropped.sort(key=lambda item: item[0].number)
    print_table(s, dropped)
    if not train or not valid:
        fix = "use a longer chat, or --off 'RULE' of the table"
        if s.only_author and not rows:
            fix = f"--only-author with one of {sorted({row.author for row, _ in dropped})[:20]}"
        fail(f"{raw}: {len(rows)} rows are left, too few to split (it takes about 30)", fix)
    places = {place for row in valid for place in range(row.start, row.end + 1)}
    leaks = sum(not places.isdisjoint(range(row.start, row.end + 1)) for row in train)
    print(f"\nsplit      {len(train):,} rows to train, {len(valid):,} to validate, {len(dropped):,} dropped")
    print(f"leaks      {len(places):,} messages of the log are in validation rows; training rows with one: {leaks}")
    if leaks:
        fail(f"{leaks} training rows hold messages of validation rows", "this is an error in build_train.py: report it")
    for name, part in ("train", train), ("valid", valid):
        tokens, size = [row.tokens for row in part], s.batch_size
        batches = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
        padded = sum(size * (1 + 32 * -(-max(batch) // 32)) for batch in batches)  # as mlx-lm pads a batch
        more, mean = padded / max(1, sum(map(sum, batches))) - 1, sum(tokens) / len(tokens)
        print(f"{name:6} {sum(tokens):,} tokens, longest row {max(tokens):,}, mean {mean:.1f}, padding {more:.1%} more")
    if not base.is_dir():
        print(f"warning: these tokens are an estimate, because {base} is not there", file=sys.stderr)
    epoch = len(train) // s.batch_size
    print(f"one epoch  {epoch:,} iterations at batch size {s.batch_size}; three: ITERS={3 * epoch} ./fine_tune.sh")
    reasons = ({"entry": row.number, "rule": rule, "message": row.window[-1]} for row, rule in dropped)
    train, valid = ((pair(row, s) for row in part) for part in (train, valid))
    write(folder, {"train.jsonl": train, "valid.jsonl": valid, "dropped.jsonl": reasons})
    print(f"\nwritten    {folder}/train.jsonl, {folder}/valid.jsonl, {folder}/dropped.jsonl\nnext       ./fine_tune.sh")


if __name__ == "__main__":
    main()
