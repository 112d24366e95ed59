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

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}. FIX: see README.md, Install")

import argparse
import gc
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
from itertools import groupby, pairwise
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ImportError as e:
    sys.exit(f"error: {e}. FIX: source venv/bin/activate; pip install -r requirements.txt")
except KeyboardInterrupt:
    sys.exit(130)


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
    add("--line", default="{message}", help="a message in the prompt; '{author}: {message}' shows the author of a log")
    add("--window", type=int, default=10, help="chat log: messages before a reply that go into its prompt")
    add("--only-author", default="", help="learn the replies of this author alone; '' of everyone")
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
    add("--valid-size", type=float, default=0.1, help="share of the rows to validate with, 0 to 1")
    add("--valid-rows", type=int, default=400, help="most rows to validate with")
    add("--stretch", type=int, default=50, help="neighbouring rows that the split keeps together")
    add("--seed", type=int, default=0, help="of the split; another whole number, another split")
# ----------------------------------------------------------------------------------------------------------------------
    s = parser.parse_args()
    counts = ["window", "max_chars", "max_context_chars", "max_seq_length", "batch_size", "valid_rows", "stretch"]
    limits = dict.fromkeys(counts, (1, 10**9)) | dict.fromkeys(["number_share", "stock_share"], (0.0001, 1))
    limits |= dict.fromkeys(["min_context", "min_chars"], (0, 10**9))
    limits |= {"valid_size": (0.0001, 0.9999), "seed": (0, 2**32 - 1)}
    for name, (least, most) in limits.items():
        if not least <= getattr(s, name) <= most:
            parser.error(f"--{name.replace('_', '-')} is {getattr(s, name)}, not from {least} to {most}")
    for name, part in ("prompt", "{context}"), ("question_prompt", "{context}"), ("line", "{message}"):
        setattr(s, name, getattr(s, name).replace("\\n", "\n"))
        if part not in getattr(s, name):
            parser.error(f"--{name.replace('_', '-')} does not say where {part} goes")
    s.off, s.bots = (sorted({x.strip().casefold() for x in names.split(",")} - {""}) for names in (s.off, s.bots))
    if unknown := set(s.off) - set(rules(s)):
        parser.error(f"--off names {min(unknown)!a}, and the rules are: {', '.join(rules(s))}")
    return s


# ---- filter: a row is rejected by the first rule that says True; remove a line, change it, add one -------------------
def rules(s):
    """Return {name of the rule: function(reply, context, author) → True to reject the row}."""
    return {
        "empty":         lambda reply, context, author: not reply,
        "no context":    lambda reply, context, author: len(context) < s.min_context,
        "other author":  lambda reply, context, author: s.only_author and author != s.only_author,
        "bot":           lambda reply, context, author: author.casefold() in s.bots or COMMAND.match(reply),
        "link":          lambda reply, context, author: LINK.search(reply),
        "too short":     lambda reply, context, author: len(reply) < s.min_chars,
        "too long":      lambda reply, context, author: len(reply) > s.max_chars,
        "personal data": lambda reply, context, author: masked(reply) != reply,  # in a context it becomes […]
        "repetition":    lambda reply, context, author: is_repetition(reply),
        "numbers":       lambda reply, context, author: number_share(context) >= s.number_share,
        "duplicate":     is_seen_before(lambda reply, context: (folded(reply), *map(folded, context))),
        "pasted again":  is_seen_before(lambda reply, context: len(reply) >= 80 and folded(reply)),
        "stock reply":   lambda reply, context, author: False,  # has to know all rows: see drop_stock_replies
    }


COMMAND = re.compile(r"[!/][^\W\d_]\w*(\s|$)")  # "!discord", "/msg ann", not "/etc/fstab"
LINK = re.compile(r"://|www\.|(?<=\w)\.[a-z]{2,6}/", re.I)
LONG_RUN = re.compile(r"(.)\1{14}")
NUMBER = re.compile(r"[\d\s.,:+%-]*\d[\d\s.,:+%-]*")
MAYBE_PERSONAL = re.compile(r"[@\d]")  # a fast look before the long one
PERSONAL = re.compile(
    r"[\w.+-]{1,64}@[\w-]{1,63}\.\w[\w.]*"  # e-mail
    r"|\b[A-Z]{2}\d\d(?: ?[A-Z\d]{4}){3,7}(?: ?[A-Z\d]{1,3})?\b|\b[a-z]{2}\d\d[a-z]?\d{10}[a-z\d]*"  # IBAN
    r"|(?<![\w.:/-])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}|3[47]\d\d([ -]?)\d{6}\2\d{5}"  # payment card
    r"|(?:\+|00)[1-9](?:[ ().-]{0,2}\d){8,13}|0\d{1,3}[ /-]?\d{6,8}|3\d\d([ .-]?)\d{3}\3\d{3,4}"  # phone: +39…, 06…, 3…
    r"|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}|0\d(?:[ .-]\d\d){4})(?![\w:/-]|\.\d)"  # (555) 123-4567, 06 12 34 56 78
)
PUNCTUATION = re.compile(r"[\s!-/:-@[-`{-~¡-©«¬®-±´¶-¸»¿‐-⁞、-〟！-／：-＠｡-･؟،؛।॥]+")  # noqa: RUF001
# fmt: on


@cache
def is_number(message):
    return NUMBER.fullmatch(message) is not None


def number_share(context):
    return sum(map(is_number, context)) / max(1, len(context))


@cache
def masked(text):
    """Return the text with "[…]" where personal data stands."""
    return PERSONAL.sub("[…]", text) if MAYBE_PERSONAL.search(text) else text


@cache
def folded(message):
    """Return the message without case, punctuation and white space: "Ciao,  MAMMA!!" → "ciaomamma"; "?!" stays."""
    return PUNCTUATION.sub("", message.casefold()) or message


def is_repetition(reply):
    """One character 15 times over; the same few words over and over; a wall of signs that are no letters."""
    words = reply.casefold().split()
    return (
        (len(reply) >= 15 and LONG_RUN.search(reply))
        or (len(words) >= 6 and len(set(words)) <= len(words) / 3)
        or (len(reply) >= 40 and sum(map(str.isalpha, reply)) < 0.3 * len(reply))
    )


def is_seen_before(key):
    """Return a rule: True if the key(reply, context) of an earlier row was the same; a key that is False never is."""
    seen = set()

    def rule(reply, context, author):
        size, this = len(seen), key(reply, context)
        seen.add(this)
        return this and len(seen) == size

    return rule


# ---- read and clean --------------------------------------------------------------------------------------------------
INVISIBLE = re.compile(  # subtle: joiners (200c, 200d) stay where they make an emoji, or a word in Arabic or Hindi
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff\U000e0000-\U000e0fff]"
    "|(?<![\u0600-\u0dff\u2600-\u27bf\ufe0f\U0001f000-\U0001faff])[\u200c\u200d]|[\u200c\u200d](?![^\\s\u200c\u200d])"
)
BLANK = re.compile("[\u2800\u3164\uffa0]")  # letters by name, with nothing to see
EMOJI = re.compile("[\U0001f000-\U0001faff\u2300-\u23ff\u2600-\u27bf\u2b00-\u2bff\ufe0f\u20e3]")


def clean(text, remove_emoji=False):
    """Return text in NFC and on one line, without what cannot be seen; accents and all scripts stay.

    "  Perche\\u0301\\u200b no?\\n" → "Perché no?"
    """
    if not text.isascii():
        text = EMOJI.sub("", text) if remove_emoji else text
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", BLANK.sub(" ", text)))
    elif not text.isprintable():
        text = INVISIBLE.sub("", text)
    return " ".join(text.split())


@dataclass(slots=True)
class Row:
    number: int  # of the entry in the list (from 0), of the line in a .jsonl file (from 1)
    window: tuple[str, ...]  # the context, oldest message first, then the reply: ("hi all", "hi!", "ready?")
    author: str
    conversation: str | int | None
    prompt: str = ""  # of a pair; its lines are the context
    end: int | None = None  # place of the reply in the log; the oldest message stands at start(row)
    skip: int = 0  # oldest messages left out of the prompt because the row is too long
    tokens: int = 0


def start(row):
    return row.end - len(row.window) + 1


def fail(what, fix):
    sys.exit(f"error: {what}. FIX: {fix}")


def progress(rows, what):
    """Yield the rows; show a bar on a terminal, a line every few seconds in a pipe."""
    total = len(rows) if hasattr(rows, "__len__") else None
    if sys.stderr.isatty():
        yield from tqdm(rows, what, total, unit=" rows", unit_scale=True, leave=False, delay=1)
        return
    shown = time.monotonic()
    for done, row in enumerate(rows):
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(f"{what}: {done:,}" + (f" of {total:,}" if total else ""), file=sys.stderr, flush=True)
        yield row


def parse(data, path, line=1):
    """Return what JSON in UTF-8 bytes says; `line` is where they begin in the file."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        line += data.count(b"\n", 0, e.start)
        guess = "UTF-16" if b"\0" in data[:4] or data[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        fail(f"{path} is not UTF-8 text, line {line}", f"iconv -f {guess} -t UTF-8 '{path}' > new; mv new '{path}'")
    except json.JSONDecodeError as e:
        fix = f"mend it or export again; with one entry a line, mv '{path}' '{path.with_suffix('.jsonl')}'"
        fail(f"{path} is not JSON: {e.msg}, line {line + e.lineno - 1}, column {e.colno}", fix)
    except (ValueError, RecursionError) as e:
        fail(f"{path} has JSON too deep or a number too long, in what begins at line {line}: {e}", "export again")


def read_entries(path):
    """Yield (number, entry) of the list in a .json file, numbers from 0, or of the lines of a .jsonl file, from 1."""
    if path.stat().st_size == 0:
        fail(f"{path} is empty (0 bytes)", "export the chat again, and look whether the disk is full")
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            yield from ((i, parse(line, path, i)) for i, line in enumerate(file, 1) if line.strip())
        return
    entries = parse(path.read_bytes(), path)
    if not isinstance(entries, list):
        fail(f"{path} holds {kind(entries)}, not a list", "write [ENTRY, ENTRY, …], see README.md, Your own chat")
    for number, entry in enumerate(entries):
        entries[number] = None  # its memory is free as soon as its row is made
        yield number, entry


def kind(value):
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def read_rows(path, s):
    """Yield a row for each entry, cleaned but not filtered. Equal messages share one string in memory."""
    tidy = cache(lambda text: clean(text, s.remove_emoji))
    logs, places = defaultdict(lambda: deque(maxlen=s.window)), Counter()  # conversation → last messages; next place
    shape = None

    def bad(what):
        unit = "line" if path.suffix == ".jsonl" else "entry"
        fail(f"{path}, {unit} {number}: {what}", "mend or remove that entry, see README.md, Your own chat")

    def get(key, types=str):
        if key not in entry:
            bad(f'no "{key}", only {sorted(entry)!a:.100}')
        if not isinstance(entry[key], types) or isinstance(entry[key], bool):
            bad(f'"{key}" is {kind(entry[key])}, not {"a list" if types is list else "a text"}')
        return entry[key]

    for number, entry in read_entries(path):
        if isinstance(entry, str):
            entry = {"message": entry}
        elif not isinstance(entry, dict):
            bad(f"{kind(entry)}, not an object or a text")
        if shape is None:
            shape = next((key for key in ("previous_messages", "prompt", "message") if key in entry), "message")
        elif shape == "message" and "previous_messages" in entry:
            bad('"previous_messages", which the first entry does not have')
        author = tidy(str(get("author", (str, int)))) if entry.get("author") is not None else ""
        conversation = get("conversation", (str, int)) if entry.get("conversation") is not None else None
        if shape == "previous_messages":
            previous, reply = get("previous_messages", list), tidy(get("message"))
            try:
                context = [message for message in map(tidy, previous) if message]
            except (TypeError, AttributeError):
                wrong = next(message for message in previous if not isinstance(message, str))
                bad(f'"previous_messages" holds {kind(wrong)}, not texts alone')
            yield Row(number, (*context, reply), author, conversation)
        elif shape == "prompt":
            prompt, reply = ("\n".join(map(tidy, get(key).split("\n"))).strip() for key in ("prompt", "completion"))
            yield Row(number, (*filter(None, prompt.split("\n")), reply), author, conversation, prompt)
        else:
            log, reply = logs[conversation], tidy(get("message"))
            yield Row(number, (*log, reply), author, conversation, end=places[conversation])
            if reply:
                log.append(s.line.replace("{author}", author).replace("{message}", reply))
                places[conversation] += 1


def filter_rows(rows, s, dropped):
    """Return the rows that pass all rules; add (row, name of the rule) to `dropped` for the others."""
    table = [(name, rule) for name, rule in rules(s).items() if name not in s.off]
    kept = []
    for row in rows:
        *context, reply = row.window
        for name, rule in table:
            if rule(reply, context, row.author):
                dropped.append((row, name))
                break
        else:
            kept.append(row)
    return kept if "stock reply" in s.off else drop_stock_replies(kept, s, dropped)


def drop_stock_replies(rows, s, dropped):
    """Thin out, evenly over time, a reply that would make up more than --stock-share of the rows."""
    counts = Counter(folded(row.window[-1]) for row in rows)
    most, limit = None, len(rows)
    while most != limit:  # fewer rows make the same share fewer
        most, limit = limit, max(1, int(s.stock_share * sum(min(count, limit) for count in counts.values())))
    kept, due = [], {reply: 0 for reply, count in counts.items() if count > limit}
    for row in rows:
        reply = folded(row.window[-1])
        if reply in due:  # limit times in its count, this comes to another whole count
            due[reply] += limit
            if due[reply] < counts[reply]:
                dropped.append((row, "stock reply"))
                continue
            due[reply] -= counts[reply]
        kept.append(row)
    return kept


# ---- split: no message of a validation row stands in a training row --------------------------------------------------
LOG = 10**9  # places between the beginnings of two logs: more than a log is long


def overlap(a, b):
    """Return (messages shared, shift) if window b may be cut from the same log, `shift` messages after window a.

    ("a", "b", "c"), ("b", "c", "d") → ("b", "c"), 1. The reply of a may be missing in b, as where the context is the
    messages of others alone: ("a", "b", "REPLY"), ("b", "c", "ANSWER") → ("b",), 1.
    """
    if a[1:] == b[:-1] and len(a) > 1:  # as it is nearly always
        return a[1:], 1
    for shift in range(len(b)):
        for old, new in (a, b[: len(b) - shift] if shift else ()), (a[:-1], b[: len(b) - 1 - shift]):
            shared = min(len(old), len(new))
            if shared and old[-1] == new[-1] and old[-shared:] == new[-shared:]:
                return new[-shared:], shift
    return (), 0


def find_places(rows):
    """Find out where in its log every window was cut, and set row.end to the place of its reply.

    Nearly always a window overlaps with the one before it in the file. Where it does not, or hardly, it may overlap
    with any other, for logs can be shuffled and interleaved: then the windows that share the rarest messages are joined
    first, and a link that says otherwise later is not made.
    """
    counts = Counter(row.window[-1] for row in rows)
    latest = {}  # (conversation, message) → last row that brought the message in
    before, gap = list(range(len(rows))), [0] * len(rows)  # row → a row it hangs together with, places from that to it

    def root(i):
        """Return the row that stands for all that hang together with row i; afterwards before[i] is that row."""
        path = []
        while before[i] != i:
            path.append(i)
            i = before[i]
        for j in reversed(path):
            if before[j] != i:
                before[j], gap[j] = i, gap[j] + gap[before[j]]
        return i

    def link(i, j, shift):
        a, b = root(i), root(j)
        if a != b:
            before[a], gap[a] = b, gap[j] + shift - gap[i]

    def links(i):
        """Yield (weight, -shift, row, earlier row): ways in which row i may hang together with others."""
        row = rows[i]
        for j in {i - 1, *(latest.get((row.conversation, message), i) for message in row.window)} - {-1, i}:
            if rows[j].conversation == row.conversation:
                for early, late in (j, i), (i, j):
                    shared, shift = overlap(rows[early].window, rows[late].window)
                    weight = sum(1 / (1 + counts[message]) for message in shared)
                    weight += 0.4 if shared and early == late - 1 else 0
                    if weight > 0.2:  # else only what everybody says all the time
                        yield weight, -shift, late, early

    unsure, ask_again = [], []
    for i, row in enumerate(progress(rows, "looking for windows that overlap")):
        shared, shift = overlap(rows[i - 1].window, row.window)
        if i and len(shared) > max(3, len(row.window) // 2) and rows[i - 1].conversation == row.conversation:
            link(i, i - 1, shift)
            new = row.window[-2:]
        else:
            unsure += links(i)
            ask_again.append(i)
            new = row.window
        latest.update(((row.conversation, message), i) for message in new)
    for i in ask_again:  # in a shuffled file, the window before it may come later
        unsure += links(i)
    for _, shift, i, j in sorted(unsure, reverse=True):
        link(i, j, -shift)
    logs = {}
    for i, row in enumerate(rows):
        log = logs.setdefault(root(i), len(logs))
        row.end = log * LOG + LOG // 2 + gap[i]


def strip_template(rows):
    """Take the first and last lines that nearly all prompts share out of row.window: they are a template, not chat."""
    for edge, rest in (0, slice(1, None)), (-2, slice(None, -1)):
        while True:
            lines = Counter(row.window[edge] for row in rows if len(row.window) > 1).most_common(2)  # 2: and questions
            if not lines or lines[0][1] == 1 or sum(count for _, count in lines) < 0.95 * len(rows):
                break
            for row in rows:
                row.window = (*row.window[:-1][rest], row.window[-1])


def line_up(rows):
    """Put all rows on one line, so that `start` to `end` of two rows overlap only if their windows do.

    Return the groups, each a list of rows in the order of the log: a conversation, or windows that hang together.
    """
    if rows[0].prompt:
        strip_template(rows)
    if rows[0].end is None:
        find_places(rows)
    numbers = {}
    for row in rows:
        row.end += numbers.setdefault(row.conversation, len(numbers)) * LOG**2
    rows.sort(key=lambda row: row.end)
    group = lambda row: row.end // (LOG if row.conversation is None else LOG**2)  # noqa: E731
    return [list(members) for _, members in groupby(rows, key=group)]


def split(groups, s, dropped):
    """Return (training rows, validation rows) that share no message; add the rows that straddle to `dropped`.

    The groups are cut into stretches and train_test_split draws those of the validation set. Where two stretches meet
    that are not on the same side, the later one loses the rows that reach back over the cut.
    """
    total, longest = sum(map(len, groups)), max(len(row.window) for group in groups for row in group)
    length = min(max(s.stretch, 2 * longest), max(longest + 2, total // 4))
    stretches, usable, reach = [], 0, -LOG
    for group in groups:
        pieces = max(1, len(group) // length)
        stretches += [group[a:b] for a, b in pairwise(len(group) * i // pieces for i in range(pieces + 1))]
    for stretch in stretches:
        usable += sum(start(row) > reach for row in stretch)  # what is left if the stretches beside it are not drawn
        reach = stretch[-1].end
    wanted = min(s.valid_rows, max(s.batch_size, round(s.valid_size * total)))
    count = min(max(1, round(wanted * len(stretches) / usable)), len(stretches) - 1)
    if count < 1:
        return [], []
    drawn = set(train_test_split(range(len(stretches)), test_size=count, random_state=s.seed)[1])
    sides, reach = {"train": [], "valid": []}, {"train": -LOG, "valid": -LOG}
    for i, stretch in enumerate(stretches):
        side, other = ("valid", "train") if i in drawn else ("train", "valid")
        for row in stretch:
            if start(row) <= reach[other]:
                dropped.append((row, f"split: shares messages with {other}"))
            else:
                sides[side].append(row)
                reach[side] = row.end
    valid = shuffled(drop_copies(sides["train"], sides["valid"], dropped), s.seed)
    dropped.extend((row, "split: beyond --valid-rows") for row in valid[s.valid_rows :])
    return sides["train"], valid[: s.valid_rows]


def drop_copies(train, valid, dropped):
    """Return valid without rows of which three messages on end are in a training row too: chat that is there twice."""
    triples, copies = defaultdict(list), set()
    for row in valid:
        for triple in zip(row.window, row.window[1:], row.window[2:], strict=False):
            triples[triple].append(row.number)
    messages = {message for triple in triples for message in triple}
    for row in train:
        if not messages.isdisjoint(row.window):
            for triple in zip(row.window, row.window[1:], row.window[2:], strict=False):
                if triple in triples and len(set(triple)) > 1:
                    copies.update(triples[triple])
    dropped.extend((row, "split: is in train as well") for row in valid if row.number in copies)
    return [row for row in valid if row.number not in copies]


def count_leaks(train, valid):
    """Return (places of the log in validation rows, training rows in which one of them is)."""
    places = {place for row in valid for place in range(start(row), row.end + 1)}
    return len(places), sum(not places.isdisjoint(range(start(row), row.end + 1)) for row in train)


def shuffled(rows, seed):
    """Return the rows in random order: the same on every machine, which random.shuffle does not promise."""
    draw = random.Random(seed).random
    return [row for _, row in sorted(((draw(), row) for row in rows), key=lambda pair: pair[0])]


# ---- length ----------------------------------------------------------------------------------------------------------
def pair_maker(s):
    """Return the function row → (prompt, completion)."""
    mask = str if "personal data" in s.off else masked

    @cache
    def shown(message):
        message = mask(message)
        return message if len(message) <= s.max_context_chars else message[: s.max_context_chars].rstrip() + "…"

    def pair(row):
        reply = row.window[-1]
        if row.prompt:
            return mask(row.prompt), reply
        template = s.question_prompt if reply.endswith(("?", "？", "؟")) else s.prompt  # noqa: RUF001
        return template.replace("{context}", "\n".join(map(shown, row.window[row.skip : -1]))).strip(), reply

    return pair


def token_counter(folder, sample):
    """Return the function list of pairs → list of the tokens that mlx-lm's trainer makes of them.

    Filling in the chat template once and putting the texts where they go is far faster than filling it in every time.
    The result is compared on the sample of pairs; where a template does more than that, each row goes through it.
    """
    if not folder.is_dir():
        return lambda pairs: [12 + len((prompt + reply).encode()) // 3 for prompt, reply in pairs]
    from mlx_lm.utils import load_tokenizer  # here, because it takes a second

    def render(prompt, reply, **options):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        return tokenizer.apply_chat_template(messages, **options)

    def exact(pairs):
        return [len(render(*pair)) for pair in pairs]

    def fast(pairs):
        texts = [before + prompt + between + reply + after for prompt, reply in pairs]
        counts = [len(tokens) for tokens in encode(texts, add_special_tokens=False)]
        for i, (prompt, reply) in enumerate(pairs):
            if "<" in prompt or "<" in reply:  # a template may look for tags such as </think>
                counts[i] = len(render(prompt, reply))
        return counts

    try:
        tokenizer = load_tokenizer(folder)
        before, _, rest = render("PROMPT", "COMPLETION", tokenize=False).partition("PROMPT")
        between, _, after = rest.partition("COMPLETION")
        encode = getattr(getattr(tokenizer, "backend_tokenizer", None), "encode_batch_fast", None)
        return fast if encode and fast(sample) == exact(sample) else exact
    except Exception as e:  # what a broken download or a template raises can be anything
        fix = f"rm -r {folder} and download it again, or set MODEL to an instruction-tuned (-it) model"
        fail(f"{folder} has no tokenizer with a chat template that works: {str(e)!a:.200}", fix)


def fit(rows, s, pair, count, dropped):
    """Return the rows that fit --max-seq-length, if need be without their oldest messages; set row.tokens."""
    waiting = rows
    while waiting:
        too_long = []
        for i in progress(range(0, len(waiting), 1000), "counting tokens, thousands of rows"):
            part = waiting[i : i + 1000]
            for row, tokens in zip(part, count([pair(row) for row in part]), strict=True):
                row.tokens = tokens
                if tokens > s.max_seq_length:
                    too_long.append(row)
        for row in too_long:
            row.skip += 1
        waiting = [row for row in too_long if row.skip < len(row.window) and not row.prompt]
    dropped.extend((row, "over --max-seq-length") for row in rows if row.tokens > s.max_seq_length)
    return [row for row in rows if row.tokens <= s.max_seq_length]


def order(rows, seed):
    """Return the rows so that mlx-lm's batches hold rows of equal length.

    mlx-lm means to sort by length but compares equal keys, so the order of the file makes the batches. Rows at its end
    that do not fill a batch are never used: a few drawn at random stand there, not all the longest or the shortest.
    """
    draw, last = random.Random(seed).random, {}
    while len(last) < max((len(rows) % batch for batch in range(1, min(16, len(rows)) + 1)), default=0):
        last[int(draw() * len(rows))] = True
    by_length = sorted((row for i, row in enumerate(rows) if i not in last), key=lambda row: -row.tokens)
    return by_length + [rows[i] for i in last]


def padding(rows, s):
    """Return the share of tokens that mlx-lm computes on top, as it pads a batch to 1 more than a multiple of 32."""
    batches = [rows[i : i + s.batch_size] for i in range(0, len(rows) - s.batch_size + 1, s.batch_size)]
    widths = [min(1 + 32 * -(-max(row.tokens for row in batch) // 32), s.max_seq_length) for batch in batches]
    return s.batch_size * sum(widths) / sum(row.tokens for batch in batches for row in batch) - 1 if batches else 0


# ---- write and report ------------------------------------------------------------------------------------------------
def beside(folder):
    """Return where a new version of the folder is written, and where the previous one waits during the swap."""
    return folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")


def clear_leftovers(folder):
    """Finish the swap of a run that was killed in the middle of it, and remove what it left behind."""
    partial, old = beside(folder)
    if old.exists() and not folder.exists():
        (partial if partial.exists() else old).rename(folder)
    for leftover in partial, old:
        shutil.rmtree(leftover, ignore_errors=True)


def write(folder, files):
    """Write {name: lines} to a folder that appears whole or not at all."""
    partial, old = beside(folder)
    try:
        partial.mkdir(parents=True)
        for name, lines in files.items():
            with (partial / name).open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except OSError as e:
        fail(f"{folder} cannot be written: {e.strerror}", f"df -h {folder.parent}; ls -ld {folder.parent}; make room")
    finally:
        clear_leftovers(folder)


def print_table(s, dropped, total):
    """Print how many rows each rule rejected, and the first of them: cleaned text, so that it is safe to print."""
    counts, examples = Counter(rule for _, rule in dropped), {}
    for row, rule in dropped:
        examples.setdefault(rule, " ".join((row.window[-1] or "(nothing is left)").split()))
    print(f"\n{'rule':34}{'rejected':>9}   for example")
    for rule in dict.fromkeys([*rules(s), *counts]):
        print(f"{rule:34}{'off' if rule in s.off else format(counts[rule], ','):>9}   {examples.get(rule, '')[:70]}")
    print(f"{'kept':34}{total - len(dropped):>9,}   of {total:,}\n")


def main():
    s = settings()
    if "/" in s.model:
        name = s.model.rstrip("/").split("/")[-1]
        fix = f"hf download {s.model} --local-dir models/base/{name}; MODEL={name} python build_train.py"
        fail(f"MODEL is {s.model!a}, not the name of a folder in models/base", fix)
    for name in s.version, s.model:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            fail(f"VERSION or MODEL is {name!a}", "use letters, digits, '.', '_' and '-', a letter or digit first")
    os.chdir(Path(__file__).resolve().parent)
    sys.stdout.reconfigure(errors="replace")
    gc.disable()  # millions of small objects and no circles: looking for circles would take a third of the time
    base, folder = Path("models/base", s.model), Path("data/for_train", s.version)
    names = [Path(f"data/raw/messages_{s.version}.{suffix}") for suffix in ("json", "jsonl")]
    raw = next((name for name in names if name.exists()), None)
    if raw is None:
        fail(f"{names[0]} is not there", f"cp YOUR_CHAT.json {names[0]}, or set VERSION to the data that is there")
    clear_leftovers(folder)
    print(textwrap.fill("settings: " + ", ".join(f"{name} {value!r}" for name, value in vars(s).items()), 120))

    dropped = []
    rows = filter_rows(progress(read_rows(raw, s), f"reading {raw}"), s, dropped)
    total = len(rows) + len(dropped)
    if not rows:
        print_table(s, dropped, total)
        fix = "look at the table and switch off a rule: --off 'NAME'" if total else "export the chat again"
        fail(f"{raw}: none of its {total} entries is left", fix)
    train, valid = split(line_up(rows), s, dropped)
    pair = pair_maker(s)
    count = token_counter(base, [pair(row) for row in (train + valid)[:: len(rows) // 50 + 1]])
    train, valid = (order(fit(part, s, pair, count, dropped), s.seed) for part in (train, valid))
    print_table(s, dropped, total)
    if not train or not valid:
        fix = "use a longer chat, or a smaller --window or --stretch"
        fail(f"{raw}: {len(rows)} rows are too few to split ({len(train)} to train, {len(valid)} to validate)", fix)
    places, leaks = count_leaks(train, valid)
    print(f"split      {len(train):,} rows to train, {len(valid):,} to validate")
    print(f"leaks      {places:,} messages of the log are in validation rows; training rows with one of them: {leaks}")
    if leaks:
        fail(f"{leaks} training rows hold messages of validation rows", "this is an error in build_train.py: report it")
    if base.is_dir():
        print(f"tokens     counted with the tokenizer and chat template of {base}")
    else:
        print(f"tokens     ESTIMATED from characters, because {base} is not there. To have them counted:")
        print(f"           hf download mlx-community/{s.model} --local-dir {base}")
    for name, part in ("train", train), ("valid", valid):
        tokens = [row.tokens for row in part]
        total, mean, more = sum(tokens), sum(tokens) / len(tokens), padding(part, s)
        print(f"{name:10} {total:,} tokens, longest row {max(tokens):,}, mean {mean:.1f}, padding {more:.1%} more")
    epoch = len(train) // s.batch_size
    print(f"one epoch  {epoch:,} iterations at batch size {s.batch_size}; three: ITERS={3 * epoch} ./fine_tune.sh")
    if min(len(train), len(valid)) < s.batch_size:
        print(f"NOTE       there are fewer rows than the batch size {s.batch_size}: BATCH_SIZE=1, or a longer chat")

    dropped.sort(key=lambda item: item[0].number)
    unit = "line" if raw.suffix == ".jsonl" else "entry"
    quote = json.JSONEncoder(ensure_ascii=False).encode

    def lines(rows):
        for prompt, reply in map(pair, progress(rows, "writing")):
            yield f'{{"prompt": {quote(prompt)}, "completion": {quote(reply)}}}\n'

    reasons = (quote({unit: row.number, "rule": rule, "message": row.window[-1]}) + "\n" for row, rule in dropped)
    write(folder, {"train.jsonl": lines(train), "valid.jsonl": lines(valid), "dropped.jsonl": reasons})
    print(f"\nwritten    {folder}/train.jsonl, {folder}/valid.jsonl, {folder}/dropped.jsonl")
    print("next       ./fine_tune.sh")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}", f"ls -l '{e.filename}', and mend its rights")
    except MemoryError:
        fail("the chat does not fit in memory", "write it as .jsonl, one entry a line, or cut it in two VERSIONs")
