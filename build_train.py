"""Stage 1: make the training data from a chat.

    python build_train.py                            # your own chat, data/raw/messages_v1.json
    VERSION=sample python build_train.py             # the sample that comes with the guide
    python build_train.py --only-author ann --gap 3  # a model that answers as ann

Reads   data/raw/messages_${VERSION}.json, or .jsonl (one entry a line), in one of three shapes:
        {"message": "hi!", "author": "ann", "time": "2024-05-31T18:04", "conversation": "family"}
            a log, as data/raw/from_export.py writes it; only "message" must be there
        {"previous_messages": ["hi all", "hi!"], "message": "ready?"}
            a reply and what came before it
        {"prompt": "Hi!", "completion": "Hello"}
            a pair that is ready
        and the tokenizer of models/base/${MODEL}/, if it is there
Writes  data/for_train/${VERSION}/: train.jsonl and valid.jsonl (one row a line), dropped.jsonl
        (every entry that is in neither of them, and why), settings.json (how they were made)
Exit    0 done, 1 something is missing or wrong, 2 wrong usage, 130 Ctrl-C
"""

import os
import signal
import sys

if sys.version_info < (3, 11):  # noqa: UP036 (a Mac's own Python is 3.9)
    sys.exit(f"error: this is Python {sys.version.split()[0]}. FIX: install 3.11, see README.md")
signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C; what is half done is cleaned later

import argparse
import difflib
import fcntl
import gc
import json
import random
import re
import shlex
import shutil
import unicodedata
from bisect import bisect
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path

try:
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"error: {error}. FIX: source venv/bin/activate; pip install -r requirements.txt")

COMMON_MODEL = "gemma-3-text-27b-it-4bit"
SHAPE_OF_ONE_AUTHOR = "prompt"  # the default of --shape with --only-author: "prompt" or "turns"


# ---- settings: edit a default here, or give the flag for a single run ----------------------------
def arguments():
    parser = argparse.ArgumentParser(
        description="Make the training data from a chat.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, env = parser.add_argument, os.environ.get
    # fmt: off
    add("--version", default=env("VERSION", "v1"), help="which data: data/raw/messages_VERSION.json")
    add("--model", default=env("MODEL", COMMON_MODEL), help="whose tokenizer: models/base/MODEL")
    # the prompt of a row; what stands in [] goes where authors are not known or --names is 0
    add("--prompt", default="{context}\n\nWrite the next message of this chat[, as {author}].")
    add("--question-prompt", default="{context}\n\nAsk the next question in this chat[, as {author}].")
    add("--names", type=int, default=1, help="1: the model sees who says what; 0: it does not")
    add("--only-author", default="", help="learn the replies of this author alone; '' of everyone")
    add("--shape", default="", help="of a row: prompt, or turns (user, assistant, …) of one author")
    add("--window", type=int, default=10, help="log: messages before a reply that it sees")
    add("--gap", type=float, default=6.0, help="log: hours of silence that end a talk; 0 none do")
    add("--burst", type=float, default=0.0, help="log: an author's messages within so many minutes are one")
    add("--stride", type=int, default=1, help="make a row of every so many-th reply; 1 of every one")
    add("--off", default="", help="names of rules to switch off, with commas: 'link,too short'")
    add("--min-context", type=int, default=1, help="messages that a reply needs before it; 0 none")
    add("--min-chars", type=int, default=2, help="characters of the shortest reply")
    add("--max-chars", type=int, default=1000, help="characters of the longest reply")
    add("--stock-share", type=float, default=0.02, help="share of one and the same reply; 5 always")
    add("--block", default="", help="file of words, one a line, that become […] wherever they stand")
    add("--remove-emoji", action="store_true", help="remove emoji from all messages")
    add("--max-context-chars", type=int, default=300, help="of a context message; the rest becomes …")
    add("--max-seq-length", type=int, default=env("MAX_SEQ_LENGTH", 1024), help="tokens of a row")
    add("--batch-size", type=int, default=env("BATCH_SIZE", 2), help="for the figures printed")
    add("--valid-size", type=float, default=0.1, help="share of the rows to validate with, 0 to 1")
    add("--valid-rows", type=int, default=400, help="most rows to validate with")
    add("--seed", type=int, default=0, help="of the split; another whole number, another split")
    # fmt: on
    # ---- end of the settings ---------------------------------------------------------------------
    parser.error = lambda what: parser.exit(2, f"error: {what}. FIX: python build_train.py --help\n")
    s = parser.parse_args()
    check_arguments(s, parser.error)
    return s


def check_arguments(s, refuse):
    for name, value in vars(s).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) is int:
            least = 0 if name in ("names", "min_context", "min_chars", "seed") else 1
            if not least <= value < 2**32:
                refuse(f"{flag} is {value}, not {least} or more")
        if name in ("gap", "burst") and not 0 <= value < 1e6:
            refuse(f"{flag} is {value}, not 0 or more")
        if name in ("stock_share", "valid_size") and not 0 < value < 1:
            refuse(f"{flag} is {value}, not between 0 and 1")
    s.prompt = s.prompt.replace("\\n", "\n")
    s.question_prompt = s.question_prompt.replace("\\n", "\n")
    if "{context}" not in s.prompt or "{context}" not in s.question_prompt:
        refuse("--prompt or --question-prompt does not say where {context} goes")
    s.shape = s.shape or (SHAPE_OF_ONE_AUTHOR if s.only_author else "prompt")
    if s.shape not in ("prompt", "turns"):
        refuse(f"--shape is {s.shape!a}, not prompt or turns")
    if s.shape == "turns" and not s.only_author:
        refuse("--shape turns needs --only-author, the one whom the model learns to be")
    s.off = [name.strip().casefold() for name in s.off.split(",") if name.strip()]
    if unknown := set(s.off) - set(ALL_RULES):
        refuse(f"--off names {min(unknown)!a}, and the rules are: {', '.join(ALL_RULES)}")


# ---- filter: a row is dropped by the first rule that is true; remove a line, change it, add one --
BOTS = {"nightbot", "streamelements", "streamlabs", "moobot", "fossabot", "wizebot"}
LINK = re.compile(r"(?i)://|www\.|(?<=\w)\.[a-z]{2,6}/")
# fmt: off
RULES = {
    "empty":          lambda row, s: not row.reply,
    "no context":     lambda row, s: len(row.window) - 1 < s.min_context,
    "other author":   lambda row, s: s.only_author and row.author != s.only_author,
    "bot":            lambda row, s: row.author.casefold() in BOTS,
    "bot command":    lambda row, s: re.match(r"[!/][^\W\d_]\w*(\s|$)", row.reply),  # not "/etc/x"
    "link":           lambda row, s: LINK.search(row.reply),
    "too short":      lambda row, s: len(row.reply) < s.min_chars,
    "too long":       lambda row, s: len(row.reply) > s.max_chars,
    "personal data":  lambda row, s: "[…]" in row.reply,
    "same character": lambda row, s: re.search(r"(.)\1{14}", row.reply),
    "same words":     lambda row, s: has_same_words(row.reply),
    "no letters":     lambda row, s: len(row.reply) >= 40 and share_of_letters(row.reply) < 0.3,
    "numbers":        lambda row, s: is_of_numbers(row.window[:-1]),
}
# fmt: on
ALL_RULES = [*RULES, "duplicate", "pasted again", "stock reply", "stride"]  # those: see choose()
PUNCTUATION = {i: None for i in range(0x10000) if unicodedata.category(chr(i))[0] in "PZ"}
is_number = cache(re.compile(r"[\d\s.,:+%-]*\d[\d\s.,:+%-]*").fullmatch)


def has_same_words(text):
    """Are there, on average, three or more of each word? "gg gg GG gg gg gg" → True."""
    return text.count(" ") >= 3 * max(2, len(set(text.casefold().split()))) - 1


def share_of_letters(text):
    return sum(map(str.isalpha, text)) / len(text)


def is_of_numbers(context):
    """Is it four fifths numbers, as when a crowd votes?"""
    return 0 < 0.8 * len(context) <= sum(1 for message in context if is_number(message.text))


@cache
def folded(text):
    """Return it without case, punctuation and space: "Ciao,  MAMMA!!" → "ciaomamma"; "?!" stays."""
    return text.casefold().translate(PUNCTUATION) or text


def choose(rows, s, dropped):
    """Return the rows that pass all rules; add (row, name of the rule) to `dropped` for others."""
    table = [(name, rule) for name, rule in RULES.items() if name not in s.off]
    exchanges, replies, kept, passed = set(), Counter(), [], 0
    for row in rows:
        broken = next((name for name, rule in table if rule(row, s)), None)
        reply = folded(row.reply)
        exchange = (reply, *[folded(message.text) for message in row.window[:-1]])
        if broken:
            pass
        elif exchange in exchanges and "duplicate" not in s.off:
            broken = "duplicate"
        elif replies[reply] and len(row.reply) >= 80 and "pasted again" not in s.off:
            broken = "pasted again"
        elif replies[reply] >= max(5, s.stock_share * (len(kept) + 1)) and "stock reply" not in s.off:
            broken = "stock reply"
        else:
            passed += 1
            if passed % s.stride and "stride" not in s.off:
                broken = "stride"
        if broken:
            dropped.append((row, broken))
            continue
        kept.append(row)
        exchanges.add(exchange)
        replies[reply] += 1
    return kept


# ---- clean ---------------------------------------------------------------------------------------
MARKS = "".join(chr(i) for i in range(0x20000) if unicodedata.combining(chr(i)))
INVISIBLE = re.compile(
    # subtle: joiners (200c, 200d) stay where they make an emoji, or a word in Arabic or Hindi
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
    "|(?<![\u0600-\u0dff\u2600-\u27bf\ufe0f\U0001f000-\U0001faff])[\u200c\u200d]"
    "|[\u200c\u200d](?![^\\s\u200c\u200d])"
    f"|[{MARKS}](?<=[{MARKS}]{{31}})"  # more than 30 accents on one letter
)
EMOJI = re.compile(
    "[\U0001f000-\U0001faff\u2300-\u23ff\u2600-\u27bf\u2b00-\u2bff\ufe0f\u20e3]"
)
CONTROL = re.compile(  # what the chat templates of models are made of
    r"<(?:\|[^\s<>|]{1,40}\|?|[^\s<>|]{1,40}\||/?s|bos|eos|pad|unk|(?:start|end)_of_(?:turn|image))>"
    r"|<｜[^\s<>｜]{1,40}｜>|\[/?INST\]|<</?SYS>>"
)
PERSONAL = re.compile(
    r"[\w.+-]{1,64}@[\w-]{1,63}\.\w[\w.]*"  # e-mail
    r"|\b[A-Za-z]{2}\d\d ?[A-Za-z]{0,4}(?: ?\d){10,26}"  # IBAN
    r"|(?<![\w.:/-])(?:(?:\+|00?)[1-9](?:[ ().-]{0,2}\d){7,13}"
    r"|\(?\d{3}\)?[ .-]?\d{3}[ .-]?\d{3,4}"  # +39 …, (555) …
    r"|\d{4}[ -]?(?:\d{4}[ -]?\d{4}[ -]?\d{4}|\d{6}[ -]?\d{5}))(?![\w:/-]|\.\d)"  # payment card
)


def clean(text):
    """Return it in NFC, on one line, without what cannot be seen: "  a\\u200b \\n b" → "a b"."""
    if not text.isascii() or not text.isprintable():
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    return " ".join(text.split())


def cleaner(s):
    """Return the function that makes of a message what may be learned of it."""

    @cache  # so equal messages share one string in memory
    def tidy(text):
        text = clean(EMOJI.sub("", text) if s.remove_emoji else text)
        if "personal data" not in s.off:
            text = PERSONAL.sub("[…]", text)
        return CONTROL.sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)

    return tidy


def namer(tidy):
    """Return the function name → name that may be shown: "+39 333 123 4567" → "Person 1"."""
    people = {}

    @cache
    def name(author):
        author = clean(author)
        shown = tidy(author)
        if "[…]" in shown:
            shown = people.setdefault(author, f"Person {len(people) + 1}")
        return shown

    return name


# ---- read ----------------------------------------------------------------------------------------
@dataclass(slots=True)
class Message:
    text: str
    author: str = ""
    time: float | None = None  # seconds
    entry: int = 0


@dataclass(slots=True)
class Row:
    entry: int  # its number: in the list from 0, or the line of a .jsonl file, from 1
    window: tuple[Message, ...]  # the context, oldest message first, then the reply
    prompt: str = ""  # of a pair; its lines are the context
    talk: int = 0
    start: int = 0  # place of the oldest message in the log
    end: int = 0  # place of the reply
    tokens: int = 0

    @property
    def reply(self):
        return self.window[-1].text

    @property
    def author(self):
        return self.window[-1].author


KEYS = {
    "message": ("message", "text", "content"),
    "author": ("author", "sender", "username", "user", "from", "name"),
    "time": ("time", "date", "timestamp"),
    "conversation": ("conversation",),
    "previous_messages": ("previous_messages",),
    "prompt": ("prompt",),
    "completion": ("completion",),
}


def fail(what, fix):
    sys.exit(f"error: {what}. FIX: {fix}")


def read_entries(path):
    """Yield (number, entry) of the list in a .json file, or of the lines of a .jsonl file."""
    line, entries = 1, []
    try:
        with path.open("rb") as file:
            if path.suffix == ".json":
                entries = json.load(file)
            bar = tqdm(file, "reading", delay=1, leave=False, disable=None)
            for line, data in enumerate(bar, 1):
                if data.strip():
                    yield line, json.loads(data)
    except UnicodeDecodeError as error:
        fix = f"iconv -f WINDOWS-1252 -t UTF-8 '{path}' > new; mv new '{path}'"
        line += error.object.count(10, 0, error.start)
        fail(f"{path} is not UTF-8 text, line {line}", fix)
    except (ValueError, RecursionError) as error:  # no JSON; a number too long; too deep
        what = getattr(error, "msg", error)
        line += getattr(error, "lineno", 1) - 1
        fix = f"mend it, or {from_export(path)}"
        if path.suffix == ".json":
            fix += f"; with one entry a line, mv '{path}' '{path}l'"
        column = getattr(error, "colno", 1)
        fail(f"{path} is not JSON: {what}, line {line}, column {column}", fix)
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}", f"ls -l {path}, and mend its permissions")
    if not isinstance(entries, list):
        fail(f"{path} holds {json.dumps(entries)[:60]}, not a list", from_export(path))
    for number, entry in enumerate(tqdm(entries, "reading", delay=1, leave=False, disable=None)):
        entries[number] = None  # its memory is free as soon as its row is made
        yield number, entry


def from_export(path):
    """Return the command that makes raw data of the export that someone put in its place."""
    moved = path.with_name(path.name.replace("messages_", "export_"))
    return f"mv {path} {moved}; python data/raw/from_export.py {moved}"


@cache
def understood(keys):
    """Return {our name: the entry's name} of the keys of an entry."""
    found = {}
    for name, synonyms in KEYS.items():
        for key in synonyms:
            if key in keys:
                found.setdefault(name, key)
    return found


def field(entry, name, *types):
    """Return a value of the entry; raise ValueError if it is none of these types."""
    key = understood(tuple(entry)).get(name, name)
    value = entry.get(key)
    if not isinstance(value, types):
        is_there = key in entry
        raise ValueError(f'"{key}" is {json.dumps(value)[:60]}' if is_there else f'there is no "{key}"')
    return value


def seconds(value):
    """Return the time as seconds: "2024-05-31T18:04", 1717178640 or "1717178640000" → 1717178640.0."""
    if value is None or value == "":
        return None
    try:
        number = float(value)
        return number / 1000 if number > 1e11 else number  # in milliseconds
    except ValueError:
        pass
    time = datetime.fromisoformat(value)
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def read(path, s):
    """Return {conversation: (its Messages, the Rows that came with their context)}."""
    tidy = cleaner(s)
    name = namer(tidy)
    s.only_author = name(s.only_author)
    bare = cache(Message)
    conversations = defaultdict(lambda: ([], []))

    def context_of(texts):
        return [bare(text) for text in map(tidy, texts) if text]

    for number, entry in read_entries(path):
        entry = entry if isinstance(entry, dict) else {"message": entry}
        try:
            author = name(str(field(entry, "author", str, int, type(None)) or ""))
            conversation = field(entry, "conversation", str, int, type(None))
            conversation = "" if conversation is None else clean(str(conversation))
            log, rows = conversations[conversation]
            if "prompt" in entry:
                texts = field(entry, "prompt", str), field(entry, "completion", str)
                prompt, reply = (
                    "\n".join(map(tidy, text.split("\n"))).strip() for text in texts
                )
                context = [bare(text) for text in prompt.split("\n") if text]
                rows.append(Row(number, (*context, Message(reply, author)), prompt))
            elif "previous_messages" in entry:
                before = field(entry, "previous_messages", list)
                if set(map(type, before)) - {str}:
                    what = json.dumps(before)[:60]
                    raise ValueError(f'"previous_messages" is {what}')
                context = context_of(before)
                reply = tidy(field(entry, "message", str))
                reply = Message(reply, author) if author else bare(reply)
                rows.append(Row(number, (*context, reply)))
            else:
                text = tidy(field(entry, "message", str))
                time = seconds(field(entry, "time", str, int, float, type(None)))
                log.append(Message(text, author, time, number))
        except (ValueError, OverflowError) as error:
            fix = "mend or remove it; README.md says what an entry is"
            fail(f"{path}, entry or line {number}: {error} in {json.dumps(entry)[:100]}", fix)
    return conversations


# ---- lay out: one log with places, talks of it, and rows that are windows of it ------------------
def in_order(log):
    """Return the log in the order of time, if every message has one."""
    times = [message.time for message in log]
    if None in times or all(a <= b for a, b in pairwise(times)):
        return log
    back = sum(a > b for a, b in pairwise(times))
    newest_first = back > len(log) / 2
    return sorted(reversed(log) if newest_first else log, key=lambda message: message.time)


def minutes_between(a, b):
    """Return the minutes between two messages, 0 if that is not known."""
    return (b.time - a.time) / 60 if a.time is not None and b.time is not None else 0


def talks(log, s):
    """Return the log cut where it was silent: [[Message, …], …]."""
    cut = []
    for message in log:
        if not cut or (s.gap and minutes_between(cut[-1][-1], message) > 60 * s.gap):
            cut.append([])
        cut[-1].append(message)
    return cut


def bursts(talk, s):
    """Return the talk with messages that one author wrote on end joined by line breaks.

    ann "hi", ann "are you there?", bob "yes" → ann "hi\\nare you there?", bob "yes"
    """
    groups = []
    for message in talk:
        last = groups[-1][-1] if groups else None
        on_end = last and last.author == message.author != ""
        near = s.burst and on_end and minutes_between(last, message) <= s.burst
        one_turn = s.shape == "turns" and on_end and message.author == s.only_author
        if near or one_turn:
            groups[-1].append(message)
        else:
            groups.append([message])
    return [
        Message("\n".join(part.text for part in group), group[0].author, group[0].time, group[0].entry)
        if len(group) > 1
        else group[0]
        for group in groups
    ]


def lay_out(conversations, s, dropped):
    """Return the rows, with their places in one log: that of all conversations, one after another."""
    rows, place, number = [], 0, 0
    for log, given in conversations.values():
        dropped.extend((Row(m.entry, (m,)), "empty") for m in log if not m.text)
        log = in_order([message for message in log if message.text])
        for talk in talks(log, s):
            number += 1
            talk = bursts(talk, s)
            for i, message in enumerate(talk):
                window = tuple(talk[max(0, i - s.window) : i + 1])
                row = Row(message.entry, window, "", number)
                row.end = place + i
                row.start = row.end - len(window) + 1
                rows.append(row)
            place += len(talk)
        without_template([row for row in given if row.prompt])
        number, place = line_up(given, number, place)
        rows += given
    return rows


def without_template(pairs):
    """Take the first or last line from the contexts of pairs, if it is in nearly all prompts."""
    for edge in 0, -2:
        lines = Counter(row.window[edge].text for row in pairs if len(row.window) > 1)
        if sum(count for _, count in lines.most_common(2)) >= max(3, 0.95 * len(pairs)):
            for row in pairs:
                context = row.window[:-1]
                row.window = (*(context[1:] if edge == 0 else context[:-1]), row.window[-1])


def overlap(before, window):
    """Return how many messages at the end of `before` begin `window`: (a b c d, c d e) → 2."""
    starts = [i for i, text in enumerate(before) if text == window[0]] if window else []
    for i in starts[:20]:  # the longest come first; more than 20 only in spam
        if before[i:] == window[: len(before) - i]:
            return len(before) - i
    return 0


def line_up(rows, number, place):
    """Give rows that came with their context places in the log: windows that overlap end to end.

    a b c, then b c d, then x y: c stands at place 2, d at 3, and y far from both
    """
    longest = max((len(row.window) for row in rows), default=0)
    before = []
    for row in rows:
        texts = [message.text for message in row.window if message.text]
        shared = overlap(before, texts), overlap(before[:-1], texts[:-1])
        new = min(
            len(texts) - shared[0] if shared[0] else 2 * longest,
            len(texts) - 1 - shared[1] if shared[1] else 2 * longest,  # contexts without the replies
        )
        if new == 2 * longest:
            number += 1
        place += new
        row.talk, row.end, row.start = number, place, place - len(texts) + 1
        before = texts
    return number, place + 2 * longest


# ---- split: no message of a validation row stands in a training row ------------------------------
def split(rows, s, dropped):
    """Return (training rows, validation rows).

    The log is cut into stretches, and whole stretches are drawn for validation. What reaches
    from one side to the other is on neither.
    """
    longest = max(len(row.window) for row in rows)
    length = min(max(50, 2 * longest), max(longest + 2, len(rows) // 4))  # rows of a stretch
    cuts = set()
    for _, talk in groupby(rows, lambda row: row.talk):
        talk = list(talk)
        cuts.add(min(row.start for row in talk))
        cuts.update(talk[i].end for i in range(length, len(talk) - length // 2, length))
    cuts = sorted(cuts)

    stretches = defaultdict(list)
    for row in rows:
        stretches[bisect(cuts, row.end)].append(row)
    wanted = min(s.valid_rows, max(s.batch_size, round(s.valid_size * len(rows))))
    drawn, count = set(), 0
    order = sorted(stretches)
    random.Random(s.seed).shuffle(order)
    for stretch in order[:-1]:
        if count >= wanted:
            break
        drawn.add(stretch)
        count += sum(bisect(cuts, row.start) == stretch for row in stretches[stretch])

    train, valid = [], []
    for row in rows:
        first, last = bisect(cuts, row.start), bisect(cuts, row.end)
        sides = {stretch in drawn for stretch in range(first, last + 1)}
        if len(sides) == 2:
            dropped.append((row, "split: between train and valid"))
        elif True in sides:
            valid.append(row)
        else:
            train.append(row)
    return train, valid


def runs(row, size):
    """Return all messages on end in its window, `size` at a time: a b c d, 3 → abc, bcd."""
    texts = [message.text for message in row.window]
    return zip(*(texts[i:] for i in range(size)), strict=False)


def drop_copies(train, valid, dropped):
    """Return valid without the rows that share text with train: the chat is there twice."""
    longest = max((len(row.window) for row in train + valid), default=0)
    size = max(2, min(3, (longest - 1) // 2))  # messages on end: three, or two of short windows
    found = [set(runs(row, size)) for row in valid]
    telling = {run for some in found for run in some if len(set("".join(run))) >= 12}  # not "gg"
    counts = Counter()
    for row in train:
        counts.update(telling.intersection(runs(row, size)))
    copies = {run for run, count in counts.items() if count <= 2 * longest}  # more: a template
    kept = []
    for row, some in zip(valid, found, strict=True):
        if some & copies:
            dropped.append((row, "split: is in train as well"))
        else:
            kept.append(row)
    return kept


# ---- rows as the trainer reads them --------------------------------------------------------------
def line(message, s, named):
    text = message.text
    if len(text) > s.max_context_chars:
        text = text[: s.max_context_chars].rstrip() + "…"
    return f"{message.author or 'someone'}: {text}" if named else text


def trained(row, s):
    """Return the row as a line of the training data."""
    return turns(row, s) if s.shape == "turns" else pair(row, s)


def pair(row, s):
    context = "\n".join(line(message, s, s.names) for message in row.window[:-1])
    asks = row.reply.endswith(("?", "？", "؟"))  # noqa: RUF001
    template = s.question_prompt if asks else s.prompt
    prompt = template.replace("{author}", row.author or "someone").replace("{context}", context)
    return {"prompt": row.prompt or prompt.strip(), "completion": row.reply}


def turns(row, s):
    """Return it as a dialogue of which the author is the assistant, everyone else the user."""
    messages = []
    for message in row.window[:-1]:
        is_own = message.author == s.only_author
        role = "assistant" if is_own else "user"
        text = line(message, s, s.names and not is_own)
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + text
        elif messages or not is_own:
            messages.append({"role": role, "content": text})
    return {"messages": [*messages, {"role": "assistant", "content": row.reply}]}


def settle_names(rows, s):
    """Decide whether names are shown, and let the templates say so."""
    known = sum(bool(message.author) for row in rows for message in row.window)
    s.names = bool(s.names) and known > sum(len(row.window) for row in rows) / 2
    others = {message.author for row in rows for message in row.window} - {s.only_author}
    if s.shape == "turns":
        s.names = s.names and len(others) > 1
    optional = re.compile(r"\[([^\[\]]*\{author\}[^\[\]]*)\]")
    for name in "prompt", "question_prompt":
        template = optional.sub(r"\1" if s.names else "", getattr(s, name))
        setattr(s, name, template)


# ---- fit, order, write and report ----------------------------------------------------------------
def token_counter(folder):
    """Return the function [line of the data] → [its tokens, as mlx-lm's trainer makes them]."""
    if not folder.is_dir():
        print(f"\nESTIMATED tokens, there is no {folder}")
        return lambda lines: [len(str(line).encode("utf-8", "replace")) // 3 for line in lines]
    print(f"\ncounting tokens with the tokenizer and chat template of {folder}")
    from mlx_lm.utils import load_tokenizer  # here, because it takes a second

    def chat(line):
        if "messages" in line:
            return line["messages"]
        return [
            {"role": "user", "content": line["prompt"]},
            {"role": "assistant", "content": line["completion"]},
        ]

    def count(lines):
        texts = [tokenizer.apply_chat_template(chat(line), tokenize=False) for line in lines]
        encode = tokenizer.backend_tokenizer.encode_batch_fast
        return [len(tokens) for tokens in encode(texts, add_special_tokens=False)]

    try:
        tokenizer = load_tokenizer(folder, {"trust_remote_code": False})
        count([{"prompt": "Hi!", "completion": "Hello"}])
    except Exception as error:  # what a broken download or a template raises can be anything
        fix = f"rm -r {folder} and download it again, or set MODEL to an instruction-tuned model"
        fail(f"{folder} has no tokenizer with a chat template that works: {str(error)!a:.200}", fix)
    return count


def shorten(row, s, count):
    """Take the oldest messages from a row that is too long, as few as possible."""
    window = row.window[-s.max_seq_length :]  # every message is a token at least
    too_many, enough = 0, len(window) - 1  # messages to take away
    while enough - too_many > 1:
        middle = (too_many + enough) // 2
        row.window = window[middle:]
        if count([trained(row, s)])[0] > s.max_seq_length:
            too_many = middle
        else:
            enough = middle
    row.window = window[enough:]
    row.tokens = count([trained(row, s)])[0]


def fit(rows, s, count, dropped):
    """Return the rows that fit --max-seq-length, if need be without their oldest messages."""
    kept = []
    for i in tqdm(range(0, len(rows), 1000), "counting", delay=1, leave=False, disable=None):
        part = rows[i : i + 1000]
        for row, tokens in zip(part, count([trained(row, s) for row in part]), strict=True):
            row.tokens = tokens
            if tokens > s.max_seq_length and len(row.window) > 1 and not row.prompt:
                shorten(row, s, count)
            if row.tokens > s.max_seq_length:
                dropped.append((row, "over --max-seq-length"))
            else:
                kept.append(row)
    return kept


def order(rows, seed):
    """Return the rows so that mlx-lm, which makes batches in the order of the file, finds rows of equal length."""
    # subtle: it never uses the last rows, if they fill no batch; drawn at random they are no biased sample
    rest = max((len(rows) % batch for batch in range(1, min(16, len(rows)) + 1)), default=0)
    rows = random.Random(seed).sample(rows, len(rows))
    return sorted(rows[rest:], key=lambda row: -row.tokens) + rows[:rest]


def write(folder, files):
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, text in files.items():
        with (partial / name).open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(text)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def print_table(s, dropped):
    """Print how many rows each rule dropped, and the first of them: cleaned, so safe to print."""
    counts = Counter(rule for _, rule in dropped)
    first = {rule: row for row, rule in reversed(dropped)}
    print(f"\n{'rule':34}{'dropped':>9}   for example")
    for rule in dict.fromkeys([*ALL_RULES, *counts]):
        example = ""
        if rule in first:
            example = " ".join(first[rule].reply.split())[:70] or "(nothing is left)"
        count = "off" if rule in s.off else format(counts[rule], ",")
        print(f"{rule:34}{count:>9}   {example}")


def main():
    s = arguments()
    os.chdir(Path(__file__).resolve().parent)
    gc.disable()
    raw = Path(f"data/raw/messages_{s.version}.json")
    if not raw.exists():
        raw = raw.with_suffix(".jsonl")
    if not raw.exists():
        fail(f"{raw} is not there", "python data/raw/from_export.py PATH")
    folder = Path("data/for_train", s.version)
    dropped = []
    rows = choose(lay_out(read(raw, s), s, dropped), s, dropped)
    if not rows:
        print_table(s, dropped)
        fail("no rows", "")
    settle_names(rows, s)
    train, drawn = split(rows, s, dropped)
    valid = drop_copies(train, drawn, dropped)
    valid = random.Random(s.seed).sample(valid, len(valid))
    dropped.extend((row, "split: beyond --valid-rows") for row in valid[s.valid_rows :])
    count = token_counter(Path("models/base", s.model))
    train = order(fit(train, s, count, dropped), s.seed)
    valid = order(fit(valid[: s.valid_rows], s, count, dropped), s.seed)
    dropped.sort(key=lambda item: item[0].entry)
    print_table(s, dropped)
    places = {place for row in valid for place in range(row.start, row.end + 1)}
    leaks = sum(not places.isdisjoint(range(row.start, row.end + 1)) for row in train)
    print(f"{len(train)} train, {len(valid)} valid, leaks {leaks}; names {s.names}")
    for name, part in ("train", train), ("valid", valid):
        print(name, sum(row.tokens for row in part), "tokens")
    encode = json.JSONEncoder(ensure_ascii=False).encode
    write(folder, {
        "train.jsonl": (encode(trained(row, s)) + "\n" for row in train),
        "valid.jsonl": (encode(trained(row, s)) + "\n" for row in valid),
        "dropped.jsonl": (encode({"entry": row.entry, "rule": rule, "message": row.reply}) + "\n" for row, rule in dropped),
        "settings.json": json.dumps(vars(s), ensure_ascii=False, indent=1) + "\n",
    })


if __name__ == "__main__":
    main()
