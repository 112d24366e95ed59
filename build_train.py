"""Stage 1: make the training data from an exported chat.

    python build_train.py                     # the sample; then ./fine_tune.sh
    VERSION=mine python build_train.py --valid-size 0.2

Reads   data/raw/messages_${VERSION}.json, or .jsonl (one entry a line), in one of three shapes:
        {"previous_messages": ["hi all", "hi!"], "message": "ready?"}            a reply and what came before it
        "hi all"  or  {"message": "hi all", "author": "ann", "conversation": 7}  a chat log in the order of time
        {"prompt": "Hi!", "completion": "Hello"}                                 pairs that are ready
        and the tokenizer of models/base/${MODEL}/, if it is there
Writes  data/for_train/${VERSION}/: train.jsonl and valid.jsonl (one {"prompt": …, "completion": …} a line),
        dropped.jsonl (every entry that is in neither of them, and why)
Exit    0 done, 1 something is missing or wrong, 2 wrong usage, 130 Ctrl-C
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    sys.exit(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}. FIX: see README.md, Install")

import argparse
import json
import os
import random
import re
import shutil
import textwrap
import time
import unicodedata
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    from mlx_lm.utils import load_tokenizer
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ImportError as e:
    sys.exit(f"error: {e}. FIX: source venv/bin/activate; pip install -r requirements.txt")
except KeyboardInterrupt:
    sys.exit(130)

ROOT = Path(__file__).resolve().parent


# ---- settings: edit a default here, or give the flag for a single run ------------------------------------------------
def settings():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda what: parser.exit(2, f"error: {what}. FIX: python build_train.py --help\n")
    add, env = parser.add_argument, os.environ.get
    # fmt: off
    add("--version", default=env("VERSION", "v1"), help="which data: data/raw/messages_VERSION.json")
    add("--model", default=env("MODEL", "gemma-3-text-27b-it-4bit"), help="whose tokenizer: models/base/MODEL")
    add("--prompt", default="{context}\n\nWrite the next message of this chat.", help="template of a prompt")
    add("--question-prompt", default="{context}\n\nAsk the next question in this chat.", help="where the reply asks")
    add("--line", default="{message}", help="a message in the prompt; '{author}: {message}' shows the author of a log")
    add("--window", type=int, default=10, help="chat log: messages before a reply that go into its prompt")
    add("--only-author", default="", help="chat log: learn the replies of this author alone; '' of everyone")
    add("--off", default="", help="names of rules to switch off, with commas: 'link,too short'")
    add("--bots", default="nightbot,streamelements,streamlabs,moobot,fossabot,wizebot", help="authors that are bots")
    add("--min-context", type=int, default=1, help="messages that a reply needs before it; 0 none")
    add("--number-share", type=float, default=0.8, help="of a context: rejected where so many messages are numbers")
    add("--min-chars", type=int, default=2, help="characters of the shortest reply")
    add("--max-chars", type=int, default=1000, help="characters of the longest reply")
    add("--stock-share", type=float, default=0.02, help="of the rows that one and the same reply may be; 1 no limit")
    add("--remove-emoji", action="store_true", help="remove emoji from all messages")
    add("--max-context-chars", type=int, default=300, help="characters of a context message; the rest becomes '…'")
    add("--max-seq-length", type=int, default=env("MAX_SEQ_LENGTH", 1024), help="tokens of a row, as in fine_tune.sh")
    add("--batch-size", type=int, default=env("BATCH_SIZE", 4), help="as in fine_tune.sh; for the figures printed")
    add("--valid-size", type=float, default=0.1, help="share of the rows to validate with")
    add("--valid-rows", type=int, default=400, help="most rows to validate with")
    add("--stretch", type=int, default=50, help="rows in a row that the split keeps together")
    add("--seed", type=int, default=0, help="of the split; another whole number, another split")
    # fmt: on
    s = parser.parse_args()
    for name in "valid_size", "number_share", "stock_share":
        if not 0 < getattr(s, name) <= 1 or s.valid_size == 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(s, name)}, not a share between 0 and 1")
    for name in "window max_chars max_context_chars max_seq_length batch_size valid_rows stretch".split():
        if getattr(s, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(s, name)}, less than 1")
    if not 0 <= s.seed < 2**32:
        parser.error(f"--seed is {s.seed}, not a number from 0 to {2**32 - 1}")
    for name, part in ("prompt", "{context}"), ("question_prompt", "{context}"), ("line", "{message}"):
        setattr(s, name, getattr(s, name).replace("\\n", "\n"))
        if part not in getattr(s, name):
            parser.error(f"--{name.replace('_', '-')} does not say where {part} goes")
    s.off, s.bots = ({x.strip().casefold() for x in text.split(",")} - {""} for text in (s.off, s.bots))
    if unknown := s.off - set(rules(s)):
        parser.error(f"--off names {ascii(min(unknown))}, and the rules are: {', '.join(rules(s))}")
    return s


# ---- filter: a row is rejected by the first rule that says True; remove a line, change it, add one -------------------
LINK = re.compile(r"https?:|www\.|\w\.[a-z]{2,6}/", re.I)
COMMAND = re.compile(r"[!/][^\W\d_]\w*(\s|$)")  # "!discord", "/msg nick", not "/etc/fstab"
NUMBER = re.compile(r"[\d\s.,:+%-]*\d[\d\s.,:+%-]*")
LONG_RUN = re.compile(r"(.)\1{14}")
PERSONAL = re.compile(
    r"[\w.+-]{1,64}@[\w-]{1,63}\.\w[\w.]*"  # e-mail
    r"|\b[A-Z]{2}\d\d(?: ?[A-Z\d]{4}){3,7}(?: ?[A-Z\d]{1,3})?\b|\b[a-z]{2}\d\d[a-z]?\d{10}[a-z\d]*"  # IBAN
    r"|(?<![\w.:/-])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}|3[47]\d\d([ -]?)\d{6}\2\d{5}"  # payment card
    r"|(?:\+|00)[1-9](?:[ ().-]{0,2}\d){8,13}|0\d{1,3}[ /-]?\d{6,8}|3\d\d([ .-]?)\d{3}\3\d{3,4}"  # phone: +39…, 06…, 3…
    r"|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}|0\d(?:[ .-]\d\d){4})(?![\w:/-]|\.\d)"  # (555) 123-4567, 06 12 34 56 78
)


def rules(s):
    """Return {name: function(reply, context, author) → True if the row is to be rejected}, in the order of the tests."""
    # fmt: off
    return {
        "empty":           lambda reply, context, author: not reply,
        "no context":      lambda reply, context, author: len(context) < s.min_context,
        "other author":    lambda reply, context, author: s.only_author and author != s.only_author,
        "bot":             lambda reply, context, author: author.casefold() in s.bots or COMMAND.match(reply),
        "link":            lambda reply, context, author: LINK.search(reply),
        "too short":       lambda reply, context, author: len(reply) < s.min_chars,
        "too long":        lambda reply, context, author: len(reply) > s.max_chars,
        "repetition":      lambda reply, context, author: is_repetition(reply),
        "personal data":   lambda reply, context, author: PERSONAL.search(reply),
        "numbers":         lambda reply, context, author: 0 < s.number_share * len(context) <= sum(map(is_number, context)),
        "duplicate":       is_seen_before(lambda reply, context: (*map(folded, context), folded(reply))),
        "pasted again":    is_seen_before(lambda reply, context: len(reply) >= 80 and folded(reply)),
        "stock reply":     lambda reply, context, author: False,  # needs all rows: see stock_replies
    }
    # fmt: on


@cache
def is_number(message):
    return bool(NUMBER.fullmatch(message))


@cache
def folded(message):
    """The message without case, punctuation and white space: "Ciao,  MAMMA!!" → "ciaomamma", but "?!" stays."""
    return PUNCTUATION.sub("", message.casefold()) or message


def is_repetition(reply):
    """One character 15 times over; mostly one word; a phrase over and over; a wall of signs that are no letters."""
    words = reply.casefold().split()
    return (
        LONG_RUN.search(reply)
        or (len(words) >= 6 and len(set(words)) <= len(words) / 3)
        or (len(reply) >= 40 and sum(map(str.isalpha, reply)) < 0.3 * len(reply))
    )


def is_seen_before(key):
    """Return a rule: True if a row had the same key(reply, context) before; a key that is False is never the same."""
    seen = set()

    def rule(reply, context, author):
        this = key(reply, context)
        if not this or this not in seen:
            seen.add(this)
            return False
        return True

    return rule


# ---- read and clean --------------------------------------------------------------------------------------------------
PUNCTUATION = re.compile(r"[\s!-/:-@[-`{-~¡-©«¬®-±´¶-¸»¿‐-⁞、-〟！-／：-＠｡-･؟،؛।॥]+")
INVISIBLE = re.compile(  # subtle: joiners (200c, 200d) build emoji, and words in Arabic and Indic scripts: they stay there
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff\U000e0000-\U000e0fff]"
    "|(?<![\u0600-\u0dff\u2600-\u27bf\ufe0f\U0001f000-\U0001faff])[\u200c\u200d]|[\u200c\u200d](?![^\\s\u200c\u200d])"
)
BLANK = re.compile("[\u2800\u3164\uffa0]")  # letters by name, and nothing to see
EMOJI = re.compile("[\U0001f000-\U0001faff\u2300-\u23ff\u2600-\u27bf\u2b00-\u2bff\ufe0f\u200d\u20e3]")


def clean(text, remove_emoji=False):
    """Return text in NFC, on one line, without what cannot be seen; accents and all scripts stay.

    "  Perche\\u0301\\u200b no?\\n" → "Perché no?"
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", BLANK.sub(" ", text)))
        if remove_emoji:
            text = EMOJI.sub("", text)
    elif not text.isprintable():
        text = INVISIBLE.sub("", text)
    return " ".join(text.split())


@dataclass(slots=True)
class Row:
    number: int  # of the entry in the list (from 0), of the line in a .jsonl file (from 1)
    window: tuple[str, ...]  # the context, oldest message first, then the reply: ("hi all", "hi!", "ready?")
    author: str
    conversation: object
    end: int = 0  # place of the reply in the log, see find_places; the oldest message stands at `start`
    skip: int = 0  # oldest messages left out of the prompt because the row is too long
    tokens: int = 0
    prompt: str = ""  # of a ready pair; its lines are the context

    @property
    def start(self):
        return self.end - len(self.window) + 1


def fail(what, fix):
    sys.exit(f"error: {what}. FIX: {fix}")


def progress(items, what, total=None):
    """Yield the items; show a bar on a terminal, a line every few seconds in a pipe."""
    if sys.stderr.isatty():
        yield from tqdm(items, what, total, unit=" rows", unit_scale=True, leave=False, delay=1)
        return
    shown = time.monotonic()
    for done, item in enumerate(items):
        if done % 1000 == 0 and time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(f"{what}: {done:,}" + (f" of {total:,}" if total else ""), file=sys.stderr, flush=True)
        yield item


def parse(data, path, line=1):
    """Return what the UTF-8 JSON bytes say; `line` is where they start in the file."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        line += data.count(b"\n", 0, e.start)
        guess = "UTF-16" if b"\0" in data[:4] or data[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        fail(
            f"{path} is not UTF-8 text, line {line}",
            f"iconv -f {guess} -t UTF-8 '{path}' > new, and put new in its place",
        )
    except json.JSONDecodeError as e:
        fix = f"if it has one entry a line, mv '{path}' '{path}l'; else export it again or mend that line"
        fail(f"{path} is not JSON: {e.msg}, line {line + e.lineno - 1}, column {e.colno}", fix)
    except (ValueError, RecursionError) as e:
        fail(f"{path} has JSON that is too deep or a number that is too long, from line {line}: {e}", "export it again")


def read_entries(path):
    """Yield (number, entry) of the list in a .json file, numbers from 0, or of the lines of a .jsonl file, from 1."""
    if path.stat().st_size == 0:
        fail(f"{path} is empty (0 bytes)", "export the chat again, and mind that the disk is not full")
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parse(line, path, number)
        return
    entries = parse(path.read_bytes(), path)
    if not isinstance(entries, list):
        fail(
            f"{path} holds {kind(entries)}, not a list of entries",
            "write [entry, entry, …], see README.md, Your own chat",
        )
    for number, entry in enumerate(entries):
        entries[number] = None  # its memory is free once the row is made
        yield number, entry


def kind(value):
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def read_rows(path, s):
    """Yield a Row for each entry: cleaned, not filtered. Equal messages share one string in memory."""
    unit = "line" if path.suffix == ".jsonl" else "entry"
    tidy = cache(lambda text: clean(text, s.remove_emoji))
    logs = defaultdict(lambda: deque(maxlen=s.window))  # conversation → its last messages
    places = Counter()
    shape = None

    def bad(what):
        fail(f"{path}, {unit} {number}: {what}", "mend or remove that entry, see README.md, Your own chat")

    def text(key, types=str):
        if key not in entry:
            bad(f'no "{key}", only {ascii(sorted(entry))[:100]}')
        if not isinstance(entry[key], types) or isinstance(entry[key], bool):
            bad(f'"{key}" is {kind(entry[key])}, not a text')
        return entry[key]

    for number, entry in read_entries(path):
        if isinstance(entry, str):
            entry = {"message": entry}
        elif not isinstance(entry, dict):
            bad(f"{kind(entry)}, not an object or a text")
        if shape is None:
            shape = next((key for key in ("previous_messages", "prompt", "message") if key in entry), "message")
        elif shape == "message" and "previous_messages" in entry:
            bad('"previous_messages", and the entries before it have none')
        author = tidy(str(text("author", (str, int)))) if entry.get("author") is not None else ""
        conversation = text("conversation", (str, int)) if entry.get("conversation") is not None else None
        if shape == "previous_messages":
            reply, previous = tidy(text("message")), text("previous_messages", list)
            try:
                context = filter(None, [tidy(message) for message in previous])
            except (TypeError, AttributeError):
                wrong = next(m for m in previous if not isinstance(m, str))
                bad(f'"previous_messages" holds {kind(wrong)}, not texts alone')
            yield Row(number, (*context, reply), author, conversation)
        elif shape == "prompt":
            prompt, reply = ("\n".join(map(tidy, text(key).split("\n"))).strip() for key in ("prompt", "completion"))
            yield Row(number, (*filter(None, prompt.split("\n")), reply), author, conversation, prompt=prompt)
        else:
            reply, log = tidy(text("message")), logs[conversation]
            yield Row(number, (*log, reply), author, conversation, end=places[conversation])
            if reply:
                log.append(s.line.replace("{author}", author).replace("{message}", reply))
                places[conversation] += 1


def filter_rows(rows, s, dropped):
    """Return the rows that pass all rules; note the others in `dropped` as (row, name of the rule)."""
    table = {name: rule for name, rule in rules(s).items() if name not in s.off}
    kept = []
    for row in rows:
        *context, reply = row.window
        for name, rule in table.items():
            if rule(reply, context, row.author):
                dropped.append((row, name))
                break
        else:
            kept.append(row)
    return kept if "stock reply" in s.off else drop_stock_replies(kept, s.stock_share, dropped)


def drop_stock_replies(rows, share, dropped):
    """Thin out, evenly over time, every reply that makes up more than its share of the rows."""
    counts = Counter(folded(row.window[-1]) for row in rows)
    limit, most = len(rows), None
    while limit != most:  # fewer rows make the share smaller
        most, total = limit, sum(min(count, limit) for count in counts.values())
        limit = max(1, int(share * total))
    seen, kept = Counter(), []
    for row in rows:
        reply = folded(row.window[-1])
        count, nth = counts[reply], seen[reply]
        seen[reply] += 1
        if count <= limit or (nth + 1) * limit // count > nth * limit // count:
            kept.append(row)
        else:
            dropped.append((row, "stock reply"))
    return kept


# ---- split: rows of validation and of training share no message ------------------------------------------------------
def overlap(a, b):
    """Return (messages shared, shift) if window b was cut from the same log, `shift` messages after window a, or (0, 0).

    ("a", "b", "c") and ("b", "c", "d") share 2 at shift 1. The reply of a may be missing in b, as where only the
    messages of others are context: ("a", "b", "REPLY") and ("b", "c", "ANSWER") share 1 at shift 1.
    """
    for shift in range(len(b)):
        for tail, head in (a, b[: len(b) - shift] if shift else ()), (a[:-1], b[: len(b) - 1 - shift]):
            shared = min(len(tail), len(head))
            if shared and tail[-1] == head[-1] and tail[-shared:] == head[-shared:]:
                return shared, shift
    return 0, 0


def find_places(rows):
    """Give every window its place in the log it was cut from: set row.end so that windows that overlap stand at
    distances that say so, and return, for each row, the number of a row that stands for all that hang together.

    Each window is placed after the one that it overlaps most with: nearly always the one before it in the file, else
    one that ends with a message of its context, so that shuffled and interleaved logs are put together as well.
    """
    before, shift = list(range(len(rows))), [0] * len(rows)  # row → the row it overlaps with, and by how much
    latest = {}  # (conversation, message) → latest row that has the message as reply or just before it

    def root(i):
        path = []
        while before[i] != i:
            path.append(i)
            i = before[i]
        for j in reversed(path):
            if before[j] != i:
                shift[j] += shift[before[j]]
                before[j] = i
        return i

    def closest(i, candidates):
        """Return (messages shared, −shift, row) of the candidate that row i overlaps with most; row i itself if none."""
        same_log = (j for j in candidates if rows[j].conversation == rows[i].conversation)
        found = ((*overlap(rows[j].window, rows[i].window), j) for j in same_log)
        return max(((shared, -by, j) for shared, by, j in found if shared), default=(0, 0, i))

    def endings(i):
        row = rows[i]
        found = (latest.get((row.conversation, message)) for message in reversed(row.window[:-1]))
        return {j for j in found if j is not None}

    for i, row in enumerate(rows):
        shared, by, j = closest(i, [i - 1] if i else [])
        if 2 * shared <= len(row.window):
            shared, by, j = closest(i, endings(i) | ({i - 1} if i else set()))
        before[i], shift[i] = j, -by
        latest.update(((row.conversation, message), i) for message in row.window[-2:])
    for i in range(len(rows)):
        if before[i] == i:  # in a shuffled file the window before it may come later; subtle: no circles
            _, by, j = closest(i, {j for j in endings(i) if root(j) != i})
            before[i], shift[i] = j, -by
    roots = [root(i) for i in range(len(rows))]
    for i, row in enumerate(rows):
        row.end = shift[i]
    return roots


def lay_out(rows):
    """Lay all windows on one line, so that `start` to `end` of two rows overlap only if their windows do.

    Return the groups, each a list of rows in the order of the log: a conversation, or windows that hang together.
    """
    if rows[0].prompt:  # lines that many prompts have are the template, not the chat
        lines = Counter(line for row in rows for line in {*row.window[:-1]})
        common = {line for line, count in lines.items() if count > max(20, len(rows) / 10)}
        for row in rows:
            row.window = (*(line for line in row.window[:-1] if line not in common), row.window[-1])
    logs = [row.conversation for row in rows] if rows[0].end else find_places(rows)
    hang_together = defaultdict(list)
    for row, log in zip(rows, logs, strict=True):
        hang_together[log].append(row)
    groups = defaultdict(list)
    for log, members in hang_together.items():
        conversation = members[0].conversation
        groups[("log", log) if conversation is None else ("conversation", conversation)].append(members)
    line = 0
    for parts in groups.values():
        for members in parts:
            members.sort(key=lambda row: row.end)
            line -= min(row.start for row in members)
            for row in members:
                row.end += line
            line = members[-1].end + 1
    return [[row for members in parts for row in members] for parts in groups.values()]


def split(groups, s, dropped):
    """Return (training rows, validation rows) that share no message; note in `dropped` the rows between them.

    The groups are cut into stretches, train_test_split draws the stretches of the validation set, and of two stretches
    that meet on different sides, the later one loses the rows that reach back over the cut.
    """
    total = sum(map(len, groups))
    longest = max(len(row.window) for group in groups for row in group)
    length = min(max(s.stretch, 2 * longest), max(longest + 2, total // 4))
    stretches = []
    for group in groups:
        pieces = max(1, len(group) // length)
        cuts = [len(group) * i // pieces for i in range(pieces + 1)]
        stretches += [group[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    usable, reach = 0, -1  # rows that validation keeps if all stretches beside it are training
    for stretch in stretches:
        usable += sum(row.start > reach for row in stretch)
        reach = max(reach, stretch[-1].end)
    wanted = min(s.valid_rows, max(1, round(s.valid_size * total)))
    count = min(max(1, round(wanted * len(stretches) / usable)), len(stretches) - 1)
    if count < 1:
        return [], []
    _, drawn = train_test_split(range(len(stretches)), test_size=count, random_state=s.seed)
    drawn, sides, reach = set(drawn), {"train": [], "valid": []}, {"train": -1, "valid": -1}
    for i, stretch in enumerate(stretches):
        side, other = ("valid", "train") if i in drawn else ("train", "valid")
        for row in stretch:
            if row.start <= reach[other]:
                dropped.append((row, f"split: shares messages with {other}"))
            else:
                sides[side].append(row)
                reach[side] = row.end
    train, valid = sides["train"], drop_copies(sides["train"], sides["valid"], dropped)
    at_random = shuffled(valid, s.seed)
    dropped.extend((row, "split: beyond --valid-rows") for row in at_random[s.valid_rows :])
    return train, at_random[: s.valid_rows]


def drop_copies(train, valid, dropped):
    """Return valid without rows of which three messages on end stand in a training row too: chat that is there twice."""
    triples = defaultdict(list)
    for row in valid:
        for triple in zip(row.window, row.window[1:], row.window[2:], strict=False):
            triples[triple].append(row.number)
    messages, copies = {message for triple in triples for message in triple}, set()
    for row in train:
        if not messages.isdisjoint(row.window):
            for triple in zip(row.window, row.window[1:], row.window[2:], strict=False):
                if triple in triples and len(set(triple)) > 1:
                    copies.update(triples[triple])
    dropped.extend((row, "split: is in train as well") for row in valid if row.number in copies)
    return [row for row in valid if row.number not in copies]


def count_leaks(train, valid):
    """Return (places of the log that validation rows take up, how many of them a training row takes up as well)."""
    places = {place for row in valid for place in range(row.start, row.end + 1)}
    leaks = {place for row in train for place in range(row.start, row.end + 1) if place in places}
    return len(places), len(leaks)


def shuffled(rows, seed):
    """Return the rows in an order that is the same on every machine: random.random() is, random.shuffle() may not be."""
    draw = random.Random(seed).random
    return [row for _, row in sorted(((draw(), row) for row in rows), key=lambda pair: pair[0])]


# ---- length ----------------------------------------------------------------------------------------------------------
def writer(s):
    """Return the function row → {"prompt": …, "completion": …}."""

    @cache
    def shown(message):
        if "personal data" not in s.off:
            message = PERSONAL.sub("[…]", message)
        return message if len(message) <= s.max_context_chars else message[: s.max_context_chars].rstrip() + "…"

    def pair(row):
        reply = row.window[-1]
        if row.prompt:
            prompt = row.prompt if "personal data" in s.off else PERSONAL.sub("[…]", row.prompt)
        else:
            template = s.question_prompt if reply.endswith(("?", "？", "؟")) else s.prompt
            prompt = template.replace("{context}", "\n".join(map(shown, row.window[row.skip : -1]))).strip()
        return {"prompt": prompt, "completion": reply}

    return pair


def token_counter(folder, sample):
    """Return the function list of pairs → list of their tokens, as mlx-lm's trainer will see them."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return lambda pairs: [12 + len((p["prompt"] + p["completion"]).encode()) // 3 for p in pairs]
    tokenizer = load_tokenizer(folder)

    def render(pair, **options):
        roles = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["completion"]}]
        return tokenizer.apply_chat_template(roles, **options)

    def exact(pairs):
        return [len(render(pair)) for pair in pairs]

    try:
        frame = render({"prompt": "PROMPT", "completion": "COMPLETION"}, tokenize=False)
    except Exception as e:  # the template is code of the model's authors: anything may come out of it
        fail(
            f"{folder} has no chat template that works: {ascii(str(e))[:200]}",
            "set MODEL to an instruction-tuned model (-it)",
        )
    before, _, rest = frame.partition("PROMPT")
    between, _, after = rest.partition("COMPLETION")
    encode = getattr(getattr(tokenizer, "backend_tokenizer", None), "encode_batch_fast", None)

    def fast(pairs):
        texts = [before + p["prompt"] + between + p["completion"] + after for p in pairs]
        counts = [len(encoded) for encoded in encode(texts, add_special_tokens=False)]
        for i, text in enumerate(texts):  # templates look for tags such as </think> in what was said
            if "<" in pairs[i]["prompt"] or "<" in pairs[i]["completion"]:
                counts[i] = exact([pairs[i]])[0]
        return counts

    return fast if encode and fast(sample) == exact(sample) else exact


def fit(rows, s, pair, count, dropped):
    """Count tokens; rows over max_seq_length lose their oldest messages until they fit. Return those that do fit."""
    too_long = []
    for i in progress(range(0, len(rows), 1000), "counting tokens"):
        part = rows[i : i + 1000]
        for row, row.tokens in zip(part, count([pair(row) for row in part]), strict=True):
            if row.tokens > s.max_seq_length:
                too_long.append(row)
    while too_long:
        for row in too_long:
            row.skip += 1
        again = [row for row in too_long if row.skip < len(row.window) and not row.prompt]
        for row, row.tokens in zip(again, count([pair(row) for row in again]), strict=True):
            pass
        too_long = [row for row in again if row.tokens > s.max_seq_length]
    dropped.extend((row, "longer than --max-seq-length") for row in rows if row.tokens > s.max_seq_length)
    return [row for row in rows if row.tokens <= s.max_seq_length]


def order(rows, seed):
    """Return the rows in the order that makes mlx-lm's batches hold rows of equal length.

    mlx-lm means to sort by length but compares equal keys, so that the order of the file decides. It then leaves out
    the rows that do not fill a batch, at the end: a few rows drawn at random stand there, not the longest or shortest.
    """
    rows = shuffled(rows, seed)
    ends = max((len(rows) % batch for batch in range(1, min(16, len(rows)) + 1)), default=0)
    return sorted(rows[ends:], key=lambda row: (-row.tokens, row.number)) + rows[:ends]


def computed(tokens, s):
    """Return the tokens that mlx-lm computes for rows of these lengths: batches padded to 1 more than a multiple of 32."""
    batches = [tokens[i : i + s.batch_size] for i in range(0, len(tokens) - s.batch_size + 1, s.batch_size)]
    return sum(s.batch_size * min(1 + 32 * -(-max(batch) // 32), s.max_seq_length) for batch in batches)


# ---- write and report ------------------------------------------------------------------------------------------------
def write(folder, files):
    """Write {name: lines that json can hold} to a folder that appears whole or not at all."""
    partial, old = (folder.with_name(folder.name + end) for end in (".partial", ".old"))
    try:
        partial.mkdir(parents=True)
        for name, lines in files.items():
            with (partial / name).open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        fail(
            f"cannot write {folder}: {e.strerror}",
            f"make room or mend the rights: df -h '{folder.parent}'; ls -ld '{folder.parent}'",
        )
    shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(folder):
    """Finish a swap that was cut short, and remove what a killed run left."""
    partial, old = (folder.with_name(folder.name + end) for end in (".partial", ".old"))
    if old.exists() and not folder.exists():
        (partial if partial.exists() else old).rename(folder)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def report(s, dropped, total):
    """Print the settings, and what was dropped by which rule, with one example each: cleaned text, safe to print."""
    counts, examples = Counter(rule for _, rule in dropped), {}
    for row, rule in dropped:
        examples.setdefault(rule, " ".join((row.window[-1] or " ".join(row.window)).split()))
    print(textwrap.fill("settings: " + ", ".join(f"{name}={value!r}" for name, value in vars(s).items()), 120), "\n")
    for rule in dict.fromkeys([*rules(s), *counts]):
        print(f"{rule:32}{'off' if rule in s.off else format(counts[rule], ','):>10}   {examples.get(rule, '')[:70]}")
    print(f"{'kept':32}{total - len(dropped):>10,}   of {total:,}\n")


def main():
    s = settings()
    if "/" in s.model:
        name = s.model.split("/")[-1]
        fail(
            f"MODEL={ascii(s.model)} is not the name of a folder in models/base",
            f"hf download {s.model} --local-dir models/base/{name}; MODEL={name} python build_train.py",
        )
    for name in s.version, s.model:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            fail(f"VERSION or MODEL is {ascii(name)}", "use letters, digits, '.', '_' and '-' alone")
    os.chdir(ROOT)  # so that messages can say data/raw/…
    sys.stdout.reconfigure(errors="replace")
    raw, folder, base = (
        Path(f"data/raw/messages_{s.version}.json"),
        Path("data/for_train", s.version),
        Path("models/base", s.model),
    )
    clear_leftovers(folder)
    if not raw.exists():
        raw = raw.with_suffix(".jsonl")
    if not raw.exists():
        fail(
            f"{raw.with_suffix('.json')} is not there",
            f"cp YOUR_CHAT.json {raw.with_suffix('.json')}, see README.md, Your own chat",
        )

    dropped, seen = [], Counter()
    rows = progress(read_rows(raw, s), "reading and filtering")
    rows = filter_rows(rows, s, dropped)
    total = len(rows) + len(dropped)
    if not rows:
        report(s, dropped, total)
        fail(
            f"{raw}: none of {total} entries is left" if total else f"{raw} holds no entries",
            "look at the table above and switch off a rule: --off 'NAME'",
        )
    train, valid = split(lay_out(rows), s, dropped)
    pair = writer(s)
    count = token_counter(base, [pair(row) for row in (train + valid)[:: len(rows) // 50 + 1]])
    train, valid = (order(fit(part, s, pair, count, dropped), s.seed) for part in (train, valid))
    report(s, dropped, total)
    if not train or not valid:
        fail(
            f"{raw}: {len(rows)} rows are too few to split: {len(train)} for training, {len(valid)} for validation",
            "use a longer chat, or a smaller --window or --stretch",
        )
    places, leaks = count_leaks(train, valid)
    print(f"split       {len(train):,} rows to train, {len(valid):,} to validate")
    print(f"leak check  {places:,} messages of the log are in validation rows; of these, in training rows: {leaks}")
    if leaks:
        fail(
            f"{leaks} messages of the validation rows are in training rows",
            "this is an error of build_train.py: please report it",
        )
    if base.is_dir():
        print(f"tokens      counted by the tokenizer and the chat template of {base}")
    else:
        print(
            f"tokens      ESTIMATED from characters, {base} is not there: hf download mlx-community/{s.model} --local-dir {base}"
        )
    for name, part in ("train", train), ("valid", valid):
        tokens = [row.tokens for row in part]
        batches = len(part) // s.batch_size
        filled = computed(tokens, s)
        padding = filled / max(1, sum(tokens[: batches * s.batch_size])) - 1
        print(
            f"{name:11} {sum(tokens):,} tokens, longest row {max(tokens):,}, mean {sum(tokens) / len(tokens):.1f}; padding adds {padding:.1%} at batch size {s.batch_size}"
        )
    print(
        f"one epoch   {len(train) // s.batch_size:,} iterations at batch size {s.batch_size}: for three, ITERS={3 * (len(train) // s.batch_size)}"
    )
    unit = "line" if raw.suffix == ".jsonl" else "entry"
    dropped.sort(key=lambda item: item[0].number)
    write(
        folder,
        {
            "train.jsonl": map(pair, train),
            "valid.jsonl": map(pair, valid),
            "dropped.jsonl": ({unit: row.number, "rule": rule, "message": row.window[-1]} for row, rule in dropped),
        },
    )
    print(f"\nwritten     {folder}/train.jsonl, {folder}/valid.jsonl, {folder}/dropped.jsonl")
    print("next        ./fine_tune.sh")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}", f"ls -l '{e.filename}', and mend its rights")
