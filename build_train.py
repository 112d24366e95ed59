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

# ruff: noqa: E402, RUF001 (imports need preparations; chat is in many scripts)
import os
import signal
import sys

if sys.version_info < (3, 11):  # noqa: UP036 (a Mac's own Python is 3.9)
    sys.exit(f"error: this is Python {sys.version.split()[0]}. FIX: install 3.11, see README.md")
signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C: at once, the output is whole

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
from bisect import bisect, bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from itertools import groupby, pairwise
from pathlib import Path

try:
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"error: {error}. FIX: source venv/bin/activate; pip install -r requirements.txt")

# ---- settings: edit a default here, or give the flag for a single run ----------------------------
parser = argparse.ArgumentParser(
    description="Make the training data from a chat.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,
)
parser.error = lambda what: parser.exit(2, f"error: {what}. FIX: python build_train.py --help\n")
add, env = parser.add_argument, os.environ.get
# fmt: off
add("--version", default=env("VERSION", "v1"), help="which data: data/raw/messages_VERSION.json")
add("--model", default=env("MODEL", "gemma-3-text-27b-it-4bit"), help="whose tokenizer to use")
add("--prompt", default="{context}\n\nWrite the next message of this chat[, as {author}].",
    help="template of a prompt; what stands in [] goes if the model does not see names")
add("--question-prompt", default="{context}\n\nAsk the next question in this chat[, as {author}].",
    help="the same, where the reply is a question")
add("--names", type=int, default=1, help="1: the model sees who says what; 0: it does not")
add("--only-author", default="", help="learn the replies of this author alone; '' of everyone")
add("--shape", help="prompt, or turns: the only author and the others; that author's default")
add("--window", type=int, default=10, help="messages before a reply that the model sees")
add("--stride", type=int, default=0,
    help="messages from one trained reply to the next; 0: as --window; of one author, 1")
add("--gap", type=float, default=6.0, help="hours of silence that end a talk; 0 none do")
add("--burst", type=float, default=0.0, help="join an author's messages within so many minutes")
add("--off", default="", help="names of rules to switch off, with commas: 'link,too short'")
add("--block", type=os.path.abspath, help="file of words, one a line, that become […] everywhere")
add("--max-context-chars", type=int, default=300, help="of a message before a reply; the rest is …")
add("--max-seq-length", type=int, default=env("MAX_SEQ_LENGTH", 1024), help="tokens of a row")
add("--valid-size", type=float, default=0.1, help="share of the rows to validate with, 0 to 1")
add("--valid-rows", type=int, default=400, help="most rows to validate with")
add("--seed", type=int, default=0, help="of the split; another whole number, another split")
# fmt: on
# --------------------------------------------------------------------------------------------------


def settings(arguments=None):
    """Return the settings of this run; end it if one of them cannot be."""
    s = parser.parse_args(arguments)
    s.prompt = s.prompt.replace("\\n", "\n")
    s.question_prompt = s.question_prompt.replace("\\n", "\n")
    s.shape = s.shape or ("turns" if s.only_author else "prompt")
    s.stride = s.stride or (1 if s.only_author else s.window)
    s.off = [name.strip().casefold() for name in s.off.split(",") if name.strip()]
    possible = {
        "prompt": "{context}" in s.prompt,
        "question_prompt": "{context}" in s.question_prompt,
        "shape": s.shape == "prompt" or (s.shape == "turns" and s.only_author),
        "window": s.window > 0,
        "stride": s.stride > 0,
        "valid_size": 0 < s.valid_size < 1,
        "valid_rows": s.valid_rows > 0,
    }
    for name, is_possible in possible.items():
        if not is_possible:
            parser.error(f"--{name.replace('_', '-')} cannot be {getattr(s, name)!a}")
    if unknown := set(s.off) - set(ALL_RULES):
        parser.error(f"--off names {min(unknown)!a}, and the rules are: {', '.join(ALL_RULES)}")
    return s


# ---- filter: a reply is dropped by the first rule that is true; remove a line, change it, add one
BOTS = {"nightbot", "streamelements", "streamlabs", "moobot", "fossabot", "wizebot"}
COMMAND = re.compile(r"[!/][^\W\d_]\w*(\s|$)")  # not "/etc/fstab"
is_number = cache(re.compile(r"[\s.,:+%-]*\d[\d\s.,:+%-]*").fullmatch)
LINK = re.compile(r"(?i)://|www\.|(?<=\w)\.[a-z]{2,6}/")
# fmt: off
RULES = {
    "empty":          lambda row, s: not row.reply,
    "no context":     lambda row, s: len(row.window) < 2,
    "other author":   lambda row, s: s.only_author and row.author != s.only_author,
    "bot":            lambda row, s: row.author.casefold() in BOTS,
    "bot command":    lambda row, s: COMMAND.match(row.reply),
    "link":           lambda row, s: LINK.search(row.reply),
    "too short":      lambda row, s: len(row.reply) < 2,
    "too long":       lambda row, s: len(row.reply) > 1000,
    "personal data":  lambda row, s: "[…]" in row.reply,
    "same character": lambda row, s: re.search(r"(.)\1{14}", row.reply),
    "same words":     lambda row, s: repetition(row.reply) >= 3,
    "no letters":     lambda row, s: len(row.reply) >= 40 and share(str.isalpha, row.reply) < 0.3,
    "numbers":        lambda row, s: share(is_number, row.texts[:-1]) >= 0.8,  # a crowd votes
}
# fmt: on
ALL_RULES = [*RULES, "duplicate", "pasted again", "stock reply"]  # these: in choose()
STOCK_SHARE = 0.02  # of the rows that may have one and the same reply; five always may
PUNCTUATION = {i: None for i in range(0x10000) if unicodedata.category(chr(i))[0] in "PZ"}


def repetition(text):
    """Return how often a word is there, on average: "gg gg GG gg gg gg" → 3.0, of 2 at least."""
    words = text.count(" ") + 1
    return words / max(2, len(set(text.casefold().split()))) if words >= 6 else 0


def share(test, items):
    return len(list(filter(test, items))) / max(1, len(items))


@cache
def folded(text):
    """Return it without case, punctuation and space: "Ciao,  MAMMA!!" → "ciaomamma"; "?!" stays."""
    return text.casefold().translate(PUNCTUATION) or text


def choose(rows, s, dropped):
    """Return the rows that pass all rules; add (row, name of the rule) to `dropped` for others."""
    rules = [(name, rule) for name, rule in RULES.items() if name not in s.off]
    exchanges, replies = set(), Counter()  # of the rows that are kept
    kept = []
    for row in rows:
        broken = next((name for name, rule in rules if rule(row, s)), None)
        if not broken:
            reply = folded(row.reply)
            exchange = tuple(map(folded, row.texts))
            repeats = {
                "duplicate": exchange in exchanges,
                "pasted again": len(row.reply) >= 80 and replies[reply] > 0,
                "stock reply": replies[reply] >= max(5, STOCK_SHARE * (len(kept) + 1) - 1),
            }
            broken = next((name for name in repeats if repeats[name] and name not in s.off), None)
        if broken:
            dropped.append((row, broken))
            continue
        kept.append(row)
        exchanges.add(exchange)
        replies[reply] += 1
    return kept


# ---- personal data -------------------------------------------------------------------------------
EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}\.\w[\w.-]{1,200}")
CONTACT = re.compile(r"(?i)(?:\btel:|\bwa\.me/|\bphone=|@(?=\d{7}))\+?\d(?:[ ().-]{0,2}\d){6,18}")
IBAN = re.compile(
    r"(?<!\w)[A-Za-z]{2}\d\d ?[A-Za-z]{0,4}(?: ?\d){8,26}(?: ?[A-Z\d]{1,4}){0,3}(?!\w)"
)
SEVEN_DIGITS = re.compile(r"\d(?:\D{0,2}\d){6}")
LONG_NUMBER = re.compile(
    r"(?<![\w/=#&?%~$€£-])(?<!\d[.:,])"  # not in an address, a file name, a sum, a time
    r"[+(]{0,2}\d(?:[ ().\u2010-\u2013/-]{0,2}\d){6,18}"
    r"(?![\w/=%]|[.,:-]\d|-[^\W\d])"
)
YEAR, DAY = r"(?:19|20)\d\d", r"[0-3]?\d"
DATE = re.compile(  # 2024-05-31, 31/5/2024, 1914-1918
    rf"(?<!\d)(?:{YEAR}\D+(?:{DAY}\D+{DAY}|{YEAR})|{DAY}\D+{DAY}\D+{YEAR})(?!\d)"
)
WITH_DOTS = re.compile(r"0\d+(?:\.\d\d)*(?:\.\d{2,9})|\(?\d{3}\)?\.\d{3}\.\d{4}")


def is_personal(number):
    """Say whether it looks like the number of a telephone, a card or an account.

    "612 34 56 78", "(11) 98765-4321" and "4111111111111111" do; "192.168.100.200", "31/5/2024",
    "6-4 7-5 6-7", "2 000 000" and "1.234.567" do not.
    """
    sizes = tuple(map(len, re.findall(r"\d+", number)))  # of its groups of digits
    if "+" in number or re.match("00[1-9]", number):
        return sum(sizes) >= 8
    if "." in number and not WITH_DOTS.fullmatch(number):
        return False  # an address of the internet, a version, a price
    if DATE.search(number) or ("/" in number and number[0] != "0"):
        return False
    if sum(sizes) == 7:
        return sizes in {(3, 4), (3, 2, 2)}
    if len(sizes) == 1:
        return sum(sizes) >= 9
    return len(sizes) <= 5 and min(sizes[1:]) > 1


def hide_personal(text):
    """Return it with […] in place of numbers and addresses: "ring 98765 43210" → "ring […]"."""
    if "@" in text:
        text = EMAIL.sub("[…]", text)
    if SEVEN_DIGITS.search(text):
        text = IBAN.sub("[…]", CONTACT.sub("[…]", text))
        text = LONG_NUMBER.sub(lambda m: "[…]" if is_personal(m[0]) else m[0], text)
    return text


def block_list(path):
    """Return the pattern that finds the words of a file, in any case, but not within words."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeError) as error:
        fail(f"--block: {error}", f"write words in UTF-8, one a line, to {shlex.quote(path)}")
    words = sorted({clean(line) for line in lines} - {""}, key=len, reverse=True)
    pattern = "|".join(map(re.escape, words)) or "(?!)"  # which nothing is
    letter = "[^\\W\u0e00-\u0eff\u2e80-\uffff]"  # but of a script that sets no spaces
    return re.compile(f"(?i)(?<!{letter})(?:{pattern})(?!{letter})")


# ---- clean ---------------------------------------------------------------------------------------
MARKS = "".join(chr(i) for i in range(0x20000) if unicodedata.combining(chr(i)))
INVISIBLE = re.compile(
    # subtle: joiners (200c, 200d) stay where they make an emoji, or a word in Arabic or Hindi
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
    "|(?<![\u0600-\u0dff\u2600-\u27bf\ufe0f\U0001f000-\U0001faff])[\u200c\u200d]"
    "|[\u200c\u200d](?![^\\s\u200c\u200d])"
    f"|[{MARKS}](?<=[{MARKS}]{{31}})"  # beyond 30 accents on one letter NFC takes for ever
)
CONTROL = (  # what the chat templates of models are made of
    r"<(?:\|[^\s<>|]{1,40}\|?|[^\s<>|]{1,40}\|)>"
    r"|<(?:/?s|bos|eos|pad|unk|(?:start|end)_of_(?:turn|image))>"
    r"|<｜[^\s<>｜]{1,40}｜>|\[/?INST\]|<</?SYS>>"
)


def clean(text):
    r"""Return it in NFC, on one line, without what cannot be seen: " a\u200b \n b" → "a b"."""
    if not text.isascii() or not text.isprintable():
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    return " ".join(text.split())


def cleaners(s, tokens):
    """Return two functions: message → what may be learned of it, author → name that may be shown.

    The second makes "Person 1" of "+39 333 123 4567". `tokens` control the base model.
    """
    control = re.compile("|".join([CONTROL, *map(re.escape, tokens)]))
    blocked = block_list(s.block) if s.block else None
    people = {}

    @cache  # so equal messages are one string in memory
    def tidy(text):
        text = clean(text)
        text = text if "personal data" in s.off else hide_personal(text)
        text = blocked.sub("[…]", text) if blocked else text
        return control.sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)  # "< eos>"

    @cache
    def name(author):
        shown = tidy(author)[:60]
        if "[…]" in shown:
            shown = people.setdefault(clean(author), f"Person {len(people) + 1}")
        return shown

    return tidy, name


# ---- read ----------------------------------------------------------------------------------------
@dataclass(slots=True)
class Message:
    """One message of a chat."""

    text: str
    author: str = ""
    time: float | None = None  # seconds
    entry: int = 0  # its number: in the list from 0, or the line of a .jsonl file, from 1


@dataclass(slots=True)
class Row:
    """A reply that may be learned, with what came before it."""

    entry: int
    window: tuple[Message, ...]  # the context, oldest message first, then the reply
    prompt: str = ""  # of a pair; its lines are the context
    talk: int = 0
    start: int = 0  # place of the oldest message in the log
    end: int = 0  # place of the reply
    tokens: int = 0
    texts = property(lambda row: [message.text for message in row.window])
    reply = property(lambda row: row.window[-1].text)
    author = property(lambda row: row.window[-1].author)
    places = property(lambda row: range(row.start, row.end + 1))


KEYS = {  # what the keys of an entry may be called
    "message": ("message", "text", "content"),
    "author": ("author", "sender", "username", "user", "from", "name"),
    "time": ("time", "date", "timestamp"),
    "conversation": ("conversation",),
    "previous_messages": ("previous_messages",),
    "prompt": ("prompt",),
    "completion": ("completion",),
}
ALL_KEYS = {key for keys in KEYS.values() for key in keys}


def fail(what, fix):
    sys.exit(f"error: {what}. FIX: {fix}")


def say(*words):
    """Print, or go on without: after `| head -1` nobody reads."""
    try:
        print(*words)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


bar = partial(tqdm, delay=1, leave=False, disable=None)


def bad_raw(path, what):
    """End the run, for raw data that cannot be read; mostly it is an app's export in its place."""
    export = path.with_name(path.name.replace("messages_", "export_"))
    fix = f"mend it (README.md says what an entry is); an app's export: mv {path} {export}"
    fail(what, f"{fix}; python data/raw/from_export.py {export}")


def read_entries(path):
    """Yield (number, entry) of the list in a .json file, or of the lines of a .jsonl file."""
    where = path
    try:
        with path.open("rb") as file:
            if path.suffix == ".json":
                entries = json.load(file)
                if not isinstance(entries, list):
                    raise ValueError(f"{json.dumps(entries)[:60]} is no list of entries")
                yield from enumerate(bar(entries, "reading"))
                return
            for number, line in enumerate(bar(file, "reading"), 1):
                where = f"{path}, line {number}"
                if line.strip():
                    yield number, json.loads(line)
    except (ValueError, RecursionError) as error:
        bad_raw(path, f"{where} is not JSON in UTF-8: {error}")


def get(entry, name, *types):
    """Return a value of the entry; raise ValueError if it is none of the types."""
    key = next((key for key in KEYS[name] if key in entry), name)
    value = entry.get(key)
    if isinstance(value, types):
        return value
    raise ValueError(f'"{key}" is {json.dumps(value)[:60]}' if key in entry else f'no "{key}"')


def seconds(value):
    """Return a time in seconds: "1970-01-01T00:01", 60 and "60" → 60.0."""
    try:
        number = float(value)
    except ValueError:
        time = datetime.fromisoformat(value)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    return number / 1000 if number > 1e11 else number  # JavaScript counts milliseconds


bare = cache(Message)  # without an author; equal ones are one object in memory


def parse(number, entry, tidy, name):
    """Return the Message that the entry of a log is, or the Row if it brings its context along."""
    author = name(str(get(entry, "author", str, int, type(None)) or ""))
    if "prompt" in entry:
        texts = get(entry, "prompt", str), get(entry, "completion", str)
        prompt, reply = ("\n".join(map(tidy, text.split("\n"))).strip() for text in texts)
        context = prompt.split("\n")
    else:
        prompt, reply = "", tidy(get(entry, "message", str))
        if "previous_messages" not in entry:
            time = get(entry, "time", str, int, float, type(None))
            return Message(reply, author, None if time in (None, "") else seconds(time), number)
        context = map(tidy, get(entry, "previous_messages", list))
    window = [bare(text) for text in context if text]
    return Row(number, (*window, Message(reply, author) if author else bare(reply)), prompt)


def read(path, tidy, name):
    """Return {conversation: [Message or Row, …]}, in the order of the file."""
    conversations, unknown = defaultdict(list), set()
    for number, entry in read_entries(path):
        entry = entry if isinstance(entry, dict) else {"message": entry}
        unknown |= entry.keys() - ALL_KEYS
        try:
            conversation = get(entry, "conversation", str, int, type(None))
            item = parse(number, entry, tidy, name)
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            what = f"{path}, entry or line {number}: {error} in {json.dumps(entry)[:100]}"
            bad_raw(path, what)
        conversations["" if conversation is None else clean(str(conversation))].append(item)
    if unknown:
        say("not used   these keys of entries:", ", ".join(map(json.dumps, sorted(unknown)[:9])))
    return conversations


# ---- lay out: one log with places; talks are parts of it, rows are windows of it -----------------
def in_order(log):
    """Return the log in the order of time, in the order of the file if times are not known."""
    if any(message.time is None for message in log):
        return log
    back = sum(a.time > b.time for a, b in pairwise(log))
    if back <= 0.01 * len(log):  # not more than when clocks are set or tell no a.m. from p.m.
        return log
    forth = sum(a.time < b.time for a, b in pairwise(log))
    return sorted(log[::-1] if back > forth else log, key=lambda message: message.time)


def minutes(a, b):
    """Return the minutes between two messages, 0 if that is not known."""
    return 0 if None in (a.time, b.time) else abs(b.time - a.time) / 60


def cut(messages, belong):
    """Return them in groups of neighbours that belong together."""
    groups = []
    for message in messages:
        if groups and belong(groups[-1][-1], message):
            groups[-1].append(message)
        else:
            groups.append([message])
    return groups


def talks_of(log, s):
    r"""Return the log in the order of time, cut where it was silent.

    What one author wrote at a stretch is one message:
    ann "hi", ann "are you there?", bob "yes" → [[ann "hi\nare you there?", bob "yes"]]
    """

    def is_one_talk(a, b):
        return not s.gap or minutes(a, b) <= 60 * s.gap

    def is_one_message(a, b):
        if a.author != b.author or not a.author:
            return False
        is_turn = s.shape == "turns" and a.author == s.only_author
        return is_turn or (s.burst and minutes(a, b) <= s.burst)

    def join(burst):
        text = "\n".join(message.text for message in burst)
        return replace(burst[0], text=text) if len(burst) > 1 else burst[0]

    return [[*map(join, cut(talk, is_one_message))] for talk in cut(in_order(log), is_one_talk)]


def lay_out(conversations, s, dropped):
    """Return the rows, each with its places in one log: all conversations, one after another."""
    rows, ready, number, place = [], [], 0, 0
    for conversation, items in conversations.items():
        log = [item for item in items if type(item) is Message]
        dropped.extend((Row(item.entry, (item,)), "empty") for item in log if not item.text)
        for talk in talks_of([item for item in log if item.text], s):
            number += 1
            for i, message in enumerate(talk):
                window = tuple(talk[max(0, i - s.window) : i + 1])
                start = place + i - len(window) + 1
                rows.append(Row(message.entry, window, "", number, start, place + i))
            place += len(talk)
        ready = [item for item in items if type(item) is Row]
        number, place = line_up(ready, number, place, bool(conversation))
        rows += ready
    if ready and s.window != parser.get_default("window"):
        say("note       --window has no effect: the windows of this file are cut already")
    return rows


def overlap(before, window):
    """Return how many messages at the end of `before` begin `window`: (a b c d, c d e) → 2."""
    starts = [i for i, text in enumerate(before) if text == window[0]] if window else []
    for i in starts[:20]:  # the longest come first; more than 20 only in spam
        if before[i:] == window[: len(before) - i]:
            return len(before) - i
    return 0


def frame(pairs):
    """Return how many lines (0 or 1) at either end of the prompts are no chat: all have them."""
    ignored = []
    for edge in 0, -2:
        lines = Counter(row.texts[edge] for row in pairs if len(row.window) > 1)
        count = sum(count for _, count in lines.most_common(2))
        ignored.append(int(count >= max(3, 0.95 * len(pairs))))
    return ignored


def line_up(rows, number, place, has_name):
    """Give rows that came with their context talks and places: windows laid end to end.

    a b c, b c d, x y → a at place 4, b 5, c 6, d 7; what overlaps nothing is far away: x 12, y 13
    """
    first, last = frame([row for row in rows if row.prompt])
    far = 2 * max((len(row.window) for row in rows), default=0)
    before = []
    for row in rows:
        window = [text for text in row.texts if text]
        if row.prompt:
            window = [*window[first : len(window) - 1 - last], row.reply]
        shared = overlap(before, window)
        if without := overlap(before[:-1], window[:-1]):  # one's own replies are in no context
            shared = max(shared, without + 1)
        place += len(window) - shared if shared else far
        if not shared and not (before and has_name):
            number += 1
        row.talk, row.start, row.end = number, place - len(window) + 1, place
        before = window
    return number, place + far


# ---- split: no message of a validation row stands in a training row ------------------------------
def stretches_of(rows):
    """Return the places of the log where stretches begin that go to one side: talks, or parts."""
    longest = max(len(row.window) for row in rows)
    length = min(max(50, 2 * longest), max(longest + 2, len(rows) // 4))  # in rows
    starts = set()
    for _, talk in groupby(rows, lambda row: row.talk):
        talk = list(talk)
        starts.add(min(row.start for row in talk))
        starts.update(talk[i].end for i in range(length, len(talk) - length // 2, length))
    return sorted(starts)


def shuffled(items, seed):
    return random.Random(seed).sample(items, len(items))  # noqa: S311 (it is no secret)


def split(rows, s, dropped):
    """Return (training rows, validation rows); what reaches from one side to the other is dropped.

    Stretches of the log are drawn for validation until they hold enough rows.
    """
    starts = stretches_of(rows)
    reach = [(bisect(starts, row.start), bisect(starts, row.end)) for row in rows]
    sizes = Counter(last for first, last in reach if first == last)
    wanted = min(s.valid_rows, max(2, round(s.valid_size * len(rows))))
    drawn, count = set(), 0
    for stretch in shuffled(range(1, len(starts) + 1), s.seed)[:-1]:
        if count < wanted:
            drawn.add(stretch)
            count += sizes[stretch]
    train, valid = [], []
    for row, (first, last) in zip(rows, reach, strict=True):
        sides = {stretch in drawn for stretch in range(first, last + 1)}
        if len(sides) > 1:
            dropped.append((row, "split: between train and valid"))
        else:
            (valid if True in sides else train).append(row)
    return train, valid


def runs(row, size):
    """Return what stands on end in its window, `size` messages each: a b c d, 3 → {abc, bcd}."""
    texts = row.texts
    return set(zip(*(texts[i:] for i in range(size)), strict=False))


def drop_copies(train, valid, dropped):
    """Return valid without the rows that share text with train: the chat repeats itself."""
    longest = max((len(row.window) for row in train + valid), default=0)
    size = max(2, min(3, (longest - 1) // 2))  # three, or two of short windows
    valid_runs = [runs(row, size) for row in valid]
    telling = {run for some in valid_runs for run in some if len(set("".join(run))) >= 12}
    counts = Counter()
    for row in train:
        counts.update(telling & runs(row, size))
    copies = {run for run, count in counts.items() if count <= 2 * longest}  # more: a template
    copied = [not copies.isdisjoint(some) for some in valid_runs]
    rows = list(zip(valid, copied, strict=True))
    dropped.extend((row, "split: is in train as well") for row, is_copy in rows if is_copy)
    return [row for row, is_copy in rows if not is_copy]


def thin_out(rows, s, dropped):
    """Return training rows whose replies are --stride messages apart, from the end of each talk.

    Of replies at 1, 2, … 20 with windows of ten: 10 (its window is 0 to 10) and 20 (10 to 20).
    """
    kept = []
    for row in reversed(rows):
        is_near = kept and kept[-1].talk == row.talk and kept[-1].end - row.end < s.stride
        if is_near and not row.prompt:
            dropped.append((row, "between rows (--stride)"))
        else:
            kept.append(row)
    return kept[::-1]


# ---- rows as the trainer reads them --------------------------------------------------------------
to_json = json.JSONEncoder(ensure_ascii=False).encode


def settle_names(rows, s):
    """Decide whether the model sees names, and make the templates say so."""
    authors = [message.author for row in rows for message in row.window]
    others = set(authors) - {s.only_author}
    is_known = sum(map(bool, authors)) > len(authors) / 2
    s.names = bool(s.names and is_known and (s.shape == "prompt" or len(others) > 1))
    optional = r"\[([^\[\]]*\{author\}[^\[\]]*)\]"
    for name in "prompt", "question_prompt":
        setattr(s, name, re.sub(optional, r"\1" if s.names else "", getattr(s, name)))


def line(message, s, with_name):
    """Return a message as the model sees it, "ann: hi!", shortened if need be."""
    text = message.text
    if len(text) > s.max_context_chars:
        text = text[: s.max_context_chars].rstrip() + "…"
    return f"{message.author or 'someone'}: {text}" if with_name else text


def training_row(row, s):
    r"""Return the row as mlx-lm reads it.

    ann "hi", bob "hello" → {"prompt": "ann: hi\n\nWrite …, as bob.", "completion": "hello"}
    """
    if s.shape == "turns":
        return {"messages": turns(row, s)}
    if row.prompt:
        return {"prompt": row.prompt, "completion": row.reply}
    context = "\n".join([line(message, s, s.names) for message in row.window[:-1]])
    template = s.question_prompt if row.reply.endswith(("?", "？", "؟")) else s.prompt
    prompt = template.replace("{author}", row.author or "someone").replace("{context}", context)
    return {"prompt": prompt.strip(), "completion": row.reply}


def turns(row, s):
    r"""Return the row as a talk of the author, who is the assistant, with the user: all others.

    ann "hi", cy "you?", bob "hello" → user "ann: hi\ncy: you?", assistant "hello"
    """
    messages = []
    for message in row.window[:-1]:
        is_own = message.author == s.only_author
        role = "assistant" if is_own else "user"
        text = line(message, s, s.names and not is_own)
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + text
        elif messages or not is_own:  # it begins with the user
            messages.append({"role": role, "content": text})
    return [*messages, {"role": "assistant", "content": row.reply}]


# ---- count tokens, fit, order --------------------------------------------------------------------
def chat_of(row):
    """Return a row of the data as messages, as mlx-lm does."""
    if "messages" in row:
        return row["messages"]
    roles = ("user", row["prompt"]), ("assistant", row["completion"])
    return [{"role": role, "content": text} for role, text in roles]


def give_up(*_):
    raise TimeoutError("it took more than a minute")


def token_counter(folder):
    """Return (function [row of the data] → [its tokens, as the trainer counts], control tokens)."""

    def estimate(rows):
        texts = ["".join(turn["content"] for turn in chat_of(row)) for row in rows]
        return [12 + len(text.encode()) // 3 for text in texts]

    def count(rows):
        chats = [tokenizer.apply_chat_template(chat_of(row), tokenize=False) for row in rows]
        encode = tokenizer.backend_tokenizer.encode_batch_fast
        return [len(tokens) for tokens in encode(chats, add_special_tokens=False)]

    if not folder.is_dir():
        there = sorted(path.name for path in folder.parent.glob("[!.]*") if path.is_dir())
        fix = f"hf download mlx-community/{folder.name} --local-dir {folder}"
        fix = f"export MODEL={shlex.quote(there[0])}" if len(there) == 1 else fix
        print(f"warning: tokens are ESTIMATED, there is no {folder}. FIX: {fix}", file=sys.stderr)
        return estimate, []
    say(f"counting   tokens with the tokenizer and chat template of {folder}")
    for name in [n for n in os.environ if n.startswith(("HF_", "TRANSFORMERS_", "MLXLM_"))]:
        del os.environ[name]  # a wrong one would break an import, another hub would be asked
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)  # a template is a program, and may have no end
    try:
        from mlx_lm.utils import load_tokenizer  # here, because it takes a second

        config = folder / "config.json"
        if config.exists() and json.loads(config.read_bytes()).get("num_hidden_layers", 0) > 1000:
            raise ValueError("so many layers would fill the memory")
        tokenizer = load_tokenizer(folder, {"trust_remote_code": False})  # no code of its own runs
        count([{"prompt": "Hi!", "completion": "Hello"}])
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        template = str(tokenizer.chat_template)
    except Exception as error:  # whatever a broken download leads to
        what = f"the tokenizer or chat template of {folder} does not work: {str(error)!a:.200}"
        fix = f"set MODEL to an instruction-tuned model; if the download broke off, rm -r {folder}"
        fail(what, f"{fix} and hf download it again")
    finally:
        signal.alarm(0)
    control = [token.content for token in added if token.special and token.content in template]
    control = {*control, *tokenizer.all_special_tokens}
    return count, sorted(token for token in control if len(token.strip()) > 2)


def fit(rows, s, count, dropped):
    """Return the rows that fit --max-seq-length, if need be without their oldest messages."""
    kept = []
    for i in bar(range(0, len(rows), 1000), "counting tokens"):
        part = rows[i : i + 1000]
        for row, tokens in zip(part, count([training_row(row, s) for row in part]), strict=True):
            row.tokens = tokens
            if tokens > s.max_seq_length and not row.prompt:
                shorten(row, s, count)
            if row.tokens > s.max_seq_length:
                dropped.append((row, "over --max-seq-length"))
            else:
                kept.append(row)
    return kept


def shorten(row, s, count):
    """Take as few of the oldest messages as possible from a row that is too long."""
    window = row.window[-s.max_seq_length :]  # every message is a token at least
    needed = 2 if s.shape == "turns" else 1

    def fits(first):
        row.window = window[first:]
        row.tokens = count([training_row(row, s)])[0]
        return row.tokens <= s.max_seq_length

    fits(bisect_left(range(len(window) - needed), True, key=fits))


def order(rows, seed):
    """Return the rows the longest first: mlx-lm makes batches of them in this order.

    subtle: it never uses the last rows, if they fill no batch; drawn at random they are no
    biased sample of what is to be learned.
    """
    rest = max((len(rows) % batch for batch in range(1, min(16, len(rows)) + 1)), default=0)
    rows = shuffled(rows, seed)
    return sorted(rows[rest:], key=lambda row: -row.tokens) + rows[:rest]


# ---- the output appears whole or not at all ------------------------------------------------------
def beside(folder, word):
    return folder.with_name(f".{folder.name}.{word}")  # no VERSION begins with a dot


def claim(folder):
    """Take the output for this run alone, and mend what a killed one left; return the open lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = beside(folder, "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is writing {folder}", "wait until it is done, or end it")
    shutil.rmtree(beside(folder, "partial"), ignore_errors=True)
    if beside(folder, "old").exists() and not folder.exists():  # killed between two renames
        beside(folder, "old").rename(folder)
    return lock


def write(folder, files):
    """Write {name: lines} to the folder that claim() took."""
    partial, old = beside(folder, "partial"), beside(folder, "old")
    partial.mkdir()
    for name, lines in files.items():
        with (partial / name).open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(to_json(line) + "\n" for line in lines)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# ---- the run -------------------------------------------------------------------------------------
def find_raw(version):
    """Return the file to read; if it is not there, say what is, and how it is made."""
    folder = Path("data/raw")
    for name in f"messages_{version}.json", f"messages_{version}.jsonl":
        if (folder / name).exists() and (folder / name).stat().st_size:
            return folder / name
    files = sorted(path.name for path in folder.glob("[!.]*") if path.name.isprintable())
    exports = [f"data/raw/{name}" for name in files if name.endswith((".txt", ".zip"))]
    export = shlex.quote(exports[0]) if exports else "PATH"
    what = f"data/raw/messages_{version}.json is not there or empty; there are {', '.join(files)}"
    fail(what, f"python data/raw/from_export.py {export} --version {version}")


def check_author(conversations, s, raw):
    """End the run if nobody is called as --only-author says; propose who was meant."""
    authors = Counter(item.author for items in conversations.values() for item in items)
    names = [name for name, _ in authors.most_common() if name]
    if s.only_author in ["", *names]:
        return
    if not names:
        fail(f'no entry of {raw} says its "author"', "leave --only-author out")
    near = difflib.get_close_matches(s.only_author, names[:5000], 1) or names
    what = f"no message of {raw} is by {s.only_author!a}; most are by {', '.join(names[:5])}"
    fail(what, f"--only-author {shlex.quote(near[0])}")


def print_table(s, dropped):
    """Print how many rows each rule dropped, and the first of them: cleaned, so safe to print."""
    counts = Counter(rule for _, rule in dropped)
    first = {rule: " ".join(row.reply.split())[:60] for row, rule in reversed(dropped)}
    say(f"\n{'rule':34}{'dropped':>9}   for example")
    for rule in dict.fromkeys([*ALL_RULES, *counts]):
        count = "off" if rule in s.off else f"{counts[rule]:,}"
        say(f"{rule:34}{count:>9}   {first.get(rule, '')}".rstrip())


def report(train, valid, dropped, raw):
    """Print what came out, and end the run if it is not enough, or if it leaks."""
    if not train or not valid:
        what = f"{raw}: {len(train) + len(valid)} rows are left, too few to split"
        fail(f"{what} (it takes about 30)", "use a longer chat, or --off 'RULE' of the table")
    counts = f"{len(train):,} rows to train, {len(valid):,} to validate, {len(dropped):,} dropped"
    say(f"\nsplit      {counts}")
    held = {place for row in valid for place in row.places}
    leaks = sum(not held.isdisjoint(row.places) for row in train)
    say(f"leaks      validation rows hold {len(held):,} messages; training rows with one: {leaks}")
    if leaks:
        fail("the split leaks", "report it, build_train.py is wrong")
    for name, rows in ("train", train), ("valid", valid):
        tokens = [row.tokens for row in rows]
        mean = sum(tokens) / len(tokens)
        say(f"{name:10} {sum(tokens):,} tokens, longest row {max(tokens):,}, mean {mean:.1f}")
    say(f"one epoch  {len(train) // 2:,} iterations at BATCH_SIZE=2")


def build(s, raw, folder):
    """Make the training data: the story of this script."""
    count, tokens = token_counter(Path("models/base", s.model))
    tidy, name = cleaners(s, tokens)
    conversations = read(raw, tidy, name)
    s.only_author = name(s.only_author)
    check_author(conversations, s, raw)

    dropped = []
    rows = lay_out(conversations, s, dropped)
    rows = choose(rows, s, dropped)
    settle_names(rows, s)
    talks, seen = len({row.talk for row in rows}), "names" if s.names else "no names"
    say(f"rows       {len(rows):,} of {talks:,} talks; the model sees {seen}")
    train, drawn = split(rows, s, dropped) if rows else ([], [])
    valid = drop_copies(train, drawn, dropped)
    if len(valid) < len(drawn) / 2:
        what = f"{len(drawn) - len(valid)} of {len(drawn)} validation rows stand in training rows"
        fix = 'sort it by time, or give each entry its "conversation"'
        fail(f"{raw} is not in the order of time: {what}", fix)
    valid = shuffled(valid, s.seed)
    dropped.extend((row, "split: beyond --valid-rows") for row in valid[s.valid_rows :])
    train = thin_out(train, s, dropped)
    train = order(fit(train, s, count, dropped), s.seed)
    valid = order(fit(valid[: s.valid_rows], s, count, dropped), s.seed)
    dropped.sort(key=lambda item: item[0].entry)
    print_table(s, dropped)
    report(train, valid, dropped, raw)

    authors = Counter(row.author for row in train if row.author)
    s.authors = [author for author, _ in authors.most_common(100)]
    reasons = ({"entry": row.entry, "rule": rule, "message": row.reply} for row, rule in dropped)
    files = {
        "train.jsonl": (training_row(row, s) for row in train),
        "valid.jsonl": (training_row(row, s) for row in valid),
        "dropped.jsonl": reasons,
        "settings.json": [vars(s)],
    }
    write(folder, files)
    say(f"\nwritten    {folder}/:", ", ".join(files))
    say("next       ./fine_tune.sh")


def main():
    s = settings()
    for variable, name in ("VERSION", s.version), ("MODEL", s.model):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            what = f"{variable} is {name!a}, not a name of letters, digits, '.', '_' and '-'"
            fail(what, f"export {variable}={re.sub('[^A-Za-z0-9]+', '_', name).strip('_') or 'v1'}")
    os.chdir(Path(__file__).resolve().parent)
    folder = Path("data/for_train", s.version)
    try:
        raw = find_raw(s.version)
        say(f"reading    {raw} with", ", ".join(f"{n} {value!a}" for n, value in vars(s).items()))
        with claim(folder):
            build(s, raw, folder)
    except OSError as error:
        fix = "df -h data; ls -ld data data/*; make room, or mend the path or its permissions"
        fail(f"{folder} was not made: {error}", fix)


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    gc.disable()  # millions of small objects and no circles: to look for those takes a third longer
    main()
