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
    sys.exit("error: Python 3.11 or newer is needed. FIX: python3.13 -m venv --clear venv")
# Ctrl-C ends it at once; what it has written is whole.
signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\n"), os._exit(130)))

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
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from itertools import groupby, pairwise
from pathlib import Path

try:
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"error: {error}. FIX: source venv/bin/activate (see README.md, Install)")

# ---- settings: edit a default here, or give the flag for a single run ----------------------------
DEFAULTS = {"VERSION": "v1", "MODEL": "gemma-3-text-27b-it-4bit"}
parser = argparse.ArgumentParser(
    description="Make the training data from a chat.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,
)
parser.error = lambda what: parser.exit(2, f"error: {what}. FIX: python build_train.py --help\n")
add, env = parser.add_argument, (DEFAULTS | os.environ).get
# fmt: off
add("--version", default=env("VERSION"), help="which data: data/raw/messages_VERSION.json")
add("--model", default=env("MODEL"), help="whose tokenizer to use")
add("--prompt", default="{context}\n\nWrite the next message of this chat[, as {author}].",
    help="template of a prompt; what stands in [] goes if the model does not see names")
add("--question-prompt", default="{context}\n\nAsk the next question in this chat[, as {author}].",
    help="the same, where the reply is a question")
add("--names", type=int, default=1, help="1: the model sees who says what; 0: it does not")
add("--only-author", default="", help="learn the replies of this author alone; '' of everyone")
add("--shape", choices=["prompt", "turns"], help="turns, of --only-author: a talk with the others")
add("--window", type=int, default=10, help="messages before a reply that the model sees")
add("--stride", type=int, default=0,
    help="messages from one trained reply to the next; 0: as --window")
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


def fail(what, fix):
    sys.exit(f"error: {what}. FIX: {fix}")


def with_quotes(words):
    """Return the words as they were meant: ["--off", "too", "short"] → ["--off", "too short"]."""
    meant = []
    for word in words:
        word = word.strip("“”‘’")
        after_flag = meant and meant[-1].startswith("--") and "=" not in meant[-1]
        if not meant or after_flag or word.startswith("--"):
            meant.append(word)
        else:
            meant[-1] += f" {word}"
    return meant


def check_quotes(words, unknown):
    """End the run for a word that is no setting; propose quotes if those are what it lacks."""
    quoted = with_quotes(words)
    if quoted == words:
        parser.error(f"it takes no {unknown}")
    command = shlex.join(["python", "build_train.py", *quoted])
    parser.exit(2, f"error: it takes no {unknown} by itself. FIX: {command}\n")


def settings(words):
    """Return the settings of this run; end it if one of them cannot be."""
    s, rest = parser.parse_known_args(words)
    if rest:
        check_quotes(words, rest[0])
    s.prompt = s.prompt.replace("\\n", "\n")
    s.question_prompt = s.question_prompt.replace("\\n", "\n")
    s.shape = s.shape or ("turns" if s.only_author else "prompt")
    s.stride = s.stride or s.window
    s.off = [name.strip().casefold() for name in s.off.split(",") if name.strip()]
    if "{context}" not in s.prompt or "{context}" not in s.question_prompt:
        parser.error("--prompt and --question-prompt need {context}")
    if s.shape == "turns" and not s.only_author:
        parser.error("--shape turns needs --only-author")
    if min(s.window, s.stride, s.valid_rows) < 1:
        parser.error("--window, --stride and --valid-rows have to be 1 or more")
    if not 0 < s.valid_size < 1:
        parser.error("--valid-size has to be between 0 and 1")
    if unknown := set(s.off) - set(ALL_RULES):
        parser.error(f"--off names {min(unknown)!a}, and the rules are: {', '.join(ALL_RULES)}")
    for variable, name in ("VERSION", s.version), ("MODEL", s.model):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            what = f"{variable} is {name!a}, not a name of letters, digits, '.', '_' and '-'"
            last = name.rstrip("/").split("/")[-1]  # of a path or a repository
            meant = re.sub("[^A-Za-z0-9.-]+", "_", last).strip("._-")
            fail(what, f"export {variable}={meant or DEFAULTS[variable]}")
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


def is_personal(number):
    """Say whether it looks like the number of a telephone, a card or an account.

    "612 34 56 78", "(11) 98765-4321" and "4111111111111111" do; "192.168.100.200", "31/5/2024",
    "6-4 7-5 6-7", "2 000 000" and "1.234.567" do not.
    """
    sizes = tuple(map(len, re.findall(r"\d+", number)))  # of its groups of digits
    if "+" in number or re.match("00[1-9]", number):
        return sum(sizes) >= 8
    if "." in number and sizes != (3, 3, 4) and not re.match(r"0\d", number):
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
        lines = Path(path).read_text("utf-8-sig").split("\n") if path else []
    except (OSError, UnicodeError) as error:
        fail(f"--block: {error}", f"write words in UTF-8, one a line, to {shlex.quote(path)}")
    words = sorted(filter(None, map(clean, lines)), key=len, reverse=True)
    pattern = "|".join(map(re.escape, words)) or "(?!)"  # which nothing is
    letter = "[^\\W\u0e00-\u0eff\u2e80-\uffff]"  # but of a script that sets no spaces
    return re.compile(f"(?i)(?<!{letter})(?:{pattern})(?!{letter})")


# ---- clean ---------------------------------------------------------------------------------------
MARKS = "".join(chr(i) for i in range(0x20000) if unicodedata.combining(chr(i)))
INVISIBLE = re.compile(  # but for joiners, 200c and 200d: Persian and emoji are made with them
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
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
    blocked = block_list(s.block)
    people = {}

    @cache  # so equal messages are one string in memory
    def tidy(text):
        text = clean(text)
        if "personal data" not in s.off:
            text = hide_personal(text)
        text = blocked.sub("[…]", text)
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

    window: list[Message]  # the context, oldest message first, then the reply
    prompt: str = ""  # of a pair; its lines are the context
    talk: int = 0
    start: int = 0  # place of the oldest message in the talk
    end: int = 0  # place of the reply
    tokens: int = 0
    entry = property(lambda row: row.window[-1].entry)
    texts = property(lambda row: [message.text for message in row.window])
    reply = property(lambda row: row.window[-1].text)
    author = property(lambda row: row.window[-1].author)
    places = property(lambda row: {(row.talk, i) for i in range(row.start, row.end + 1)})


UNKNOWN = type(None)
KEYS = {  # what a value of an entry may be, and what its key may be called
    "message": (str, ["message", "text", "content"]),
    "author": ((str, int, UNKNOWN), ["author", "sender", "username", "user", "from", "name"]),
    "time": ((str, int, float, UNKNOWN), ["time", "date", "timestamp"]),
    "conversation": ((str, int, UNKNOWN), ["conversation"]),
    "previous_messages": (list, ["previous_messages"]),
    "prompt": (str, ["prompt"]),
    "completion": (str, ["completion"]),
}
ALL_KEYS = {key for _, keys in KEYS.values() for key in keys}


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


def get(entry, name):
    """Return a value of the entry; raise ValueError if it is not what it may be."""
    types, keys = KEYS[name]
    key = next((key for key in keys if key in entry), name)
    value = entry.get(key)
    if isinstance(value, types):
        return value
    raise ValueError(f'"{key}" is {json.dumps(value)[:60]}' if key in entry else f'no "{key}"')


def seconds(value):
    """Return a time in seconds: "1970-01-01T00:01", 60 and "60" → 60.0; None if not known."""
    if value in (None, ""):
        return None
    try:
        number = float(value)
    except ValueError:
        time = datetime.fromisoformat(value)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    return number / 1000 if number > 1e11 else number  # JavaScript counts milliseconds


bare = cache(Message)  # of a context; equal ones are one object in memory


def parse(number, entry, tidy, name):
    """Return the Message that the entry of a log is, or the Row if it brings its context along."""
    author = name(str(get(entry, "author") or ""))
    if "prompt" in entry:
        texts = get(entry, "prompt"), get(entry, "completion")
        prompt, reply = ("\n".join(map(tidy, text.split("\n"))).strip() for text in texts)
        context = prompt.split("\n")
    elif "previous_messages" in entry:
        prompt, reply = "", tidy(get(entry, "message"))
        context = map(tidy, get(entry, "previous_messages"))
    else:
        time = seconds(get(entry, "time"))
        return Message(tidy(get(entry, "message")), author, time, number)
    window = [bare(text) for text in context if text]
    return Row([*window, Message(reply, author, None, number)], prompt)


def read(path, tidy, name):
    """Return {conversation: [Message or Row, …]}, in the order of the file."""
    conversations, unknown = defaultdict(list), set()
    for number, entry in read_entries(path):
        entry = entry if isinstance(entry, dict) else {"message": entry}
        unknown |= entry.keys() - ALL_KEYS
        try:
            conversation = get(entry, "conversation")
            item = parse(number, entry, tidy, name)
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            what = f"{path}, entry or line {number}: {error} in {json.dumps(entry)[:100]}"
            bad_raw(path, what)
        conversations["" if conversation is None else clean(str(conversation))].append(item)
    if unknown:
        say("not used   these keys of entries:", ", ".join(map(json.dumps, sorted(unknown)[:9])))
    return conversations


# ---- lay out: talks, the places of messages in them, and rows, which are windows of them ---------
def in_order(log):
    """Return the log in the order of time, in the order of the file if times are not known."""
    if any(message.time is None for message in log):
        return log
    back = sum(a.time > b.time for a, b in pairwise(log))
    if back <= 0.01 * len(log):  # not more than when clocks are set or tell no a.m. from p.m.
        return log
    newest_first = back > sum(a.time < b.time for a, b in pairwise(log))
    return sorted(log[::-1] if newest_first else log, key=lambda message: message.time)


def talks_of_log(log, s):
    r"""Return the log as talks, which silence ends; in a talk, what is one turn is one message.

    ann "hi", ann "are you there?", bob "yes" → [[ann "hi\nare you there?", bob "yes"]]
    """
    talks, last = [], None
    for message in in_order(log):
        is_timed = last and last.time is not None and message.time is not None
        pause = abs(message.time - last.time) / 60 if is_timed else 0
        is_same = last and last.author == message.author != ""
        is_assistant = s.shape == "turns" and message.author == s.only_author
        if not last or (s.gap and pause > 60 * s.gap):
            talks.append([[message]])
        elif is_same and (is_assistant or (s.burst and pause <= s.burst)):
            talks[-1][-1].append(message)
        else:
            talks[-1].append([message])
        last = message
    return [[joined(turn) for turn in talk] for talk in talks]


def joined(turn):
    text = "\n".join(message.text for message in turn)
    return replace(turn[0], text=text) if len(turn) > 1 else turn[0]


def overlap(before, window):
    """Return how many messages at the end of `before` begin `window`: (a b c, b c d) → 2.

    The last of `before` may be another: (a b c R, b c d) → 3; some contexts lack one's own replies.
    """
    for size in range(min(len(before), len(window)), 1, -1):
        if before[-size] == window[0] and before[-size:-1] == window[: size - 1]:
            return size
    return int(before[-1:] == window[:1])


def frame(pairs):
    """Return how many lines (0 or 1) at either end of the prompts are no chat: all have them."""
    ignored = []
    for edge in 0, -2:
        lines = Counter(row.texts[edge] for row in pairs if len(row.window) > 1)
        count = sum(count for _, count in lines.most_common(2))
        ignored.append(int(count >= max(3, 0.95 * len(pairs))))
    return ignored


def lay_end_to_end(rows, talk, is_one_talk):
    """Give rows that came with their context their places; return the number of the last talk.

    a b c, b c d, x y → a at place 998, b 999, c 1000, d 1001; what overlaps nothing is far away
    """
    first, last = frame([row for row in rows if row.prompt])
    before, end = [], 0
    for row in rows:
        texts = row.texts
        if row.prompt:
            texts = [*texts[first : len(texts) - 1 - last], row.reply]
        shared = overlap(before, texts)
        if not before or not (shared or is_one_talk):
            talk += 1
        end += len(texts) - shared if shared else 1000
        row.talk, row.start, row.end = talk, end - len(texts) + 1, end
        before = texts
    return talk


def lay_out(conversations, s, dropped):
    """Return the rows, one for each message or turn, with their places."""
    rows, ready, number, in_turns = [], [], 0, 0
    for conversation, items in conversations.items():
        log = [item for item in items if type(item) is Message]
        dropped.extend((Row([item]), "empty") for item in log if not item.text)
        log = [item for item in log if item.text]
        talks = talks_of_log(log, s)
        in_turns += len(log) - sum(map(len, talks))
        for talk in talks:
            number += 1
            for end in range(len(talk)):
                start = max(0, end - s.window)
                rows.append(Row(talk[start : end + 1], "", number, start, end))
        ready = [item for item in items if type(item) is Row]
        number = lay_end_to_end(ready, number, is_one_talk=bool(conversation))
        rows += ready
    if in_turns:
        say(f"joined     {in_turns:,} messages to the one before, of the same author, as one turn")
    if ready and s.window != parser.get_default("window"):
        say("note       --window has no effect: the windows of this file are cut already")
    return rows


# ---- split: no message of a validation row stands in a training row ------------------------------
def stretches_of(rows):
    """Return the (talk, place) where stretches begin that go to one side: talks, or parts."""
    longest = max(len(row.window) for row in rows)
    length = min(max(50, 2 * longest), max(longest + 2, len(rows) // 4))  # in rows
    starts = set()
    for number, talk in groupby(rows, lambda row: row.talk):
        ends = [row.end for row in talk]
        starts.add((number, -1))
        starts.update((number, end) for end in ends[length : len(ends) - length // 2 : length])
    return sorted(starts)


def shuffled(items, seed):
    return random.Random(seed).sample(items, len(items))  # noqa: S311 (it is no secret)


def split(rows, s, dropped):
    """Return (training rows, validation rows); what reaches from one side to the other is dropped.

    Stretches of the log are drawn for validation until they hold enough rows.
    """
    starts = stretches_of(rows)
    firsts = [bisect(starts, (row.talk, row.start)) for row in rows]
    lasts = [bisect(starts, (row.talk, row.end)) for row in rows]
    sizes = Counter(last for first, last in zip(firsts, lasts, strict=True) if first == last)
    wanted = min(s.valid_rows, max(2, round(s.valid_size * len(rows))))
    drawn, count = set(), 0
    for stretch in shuffled(range(1, len(starts) + 1), s.seed)[:-1]:
        if count < wanted:
            drawn.add(stretch)
            count += sizes[stretch]
    train, valid = [], []
    for row, first, last in zip(rows, firsts, lasts, strict=True):
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
    held = {run for row in valid for run in runs(row, size)}
    telling = {run for run in held if len(set("".join(run))) >= 12}  # not "gg", "lol", "gg"
    counts = Counter(run for row in train for run in telling & runs(row, size))
    copies = {run for run, count in counts.items() if count <= 2 * longest}  # more: a template
    kept = []
    for row in valid:
        if copies.isdisjoint(runs(row, size)):
            kept.append(row)
        else:
            dropped.append((row, "split: is in train as well"))
    return kept


BETWEEN = "between rows (--stride)"


def thin_out(rows, s, dropped):
    """Return training rows whose replies are --stride messages apart, from the end of each talk.

    Of replies at 1, 2, … 20 with windows of ten: 10 (its window is 0 to 10) and 20 (10 to 20).
    """
    kept = []
    for row in reversed(rows):
        is_near = kept and kept[-1].talk == row.talk and kept[-1].end - row.end < s.stride
        if is_near and not row.prompt:
            dropped.append((row, BETWEEN))
        else:
            kept.append(row)
    return kept[::-1]


# ---- rows as the trainer reads them --------------------------------------------------------------
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
def count_tokens(rows, tokenizer):
    """Return the tokens of each row of the data, as the trainer counts them, or an estimate."""
    roles = {"user": "prompt", "assistant": "completion"}
    chats = [
        row.get("messages") or [{"role": role, "content": row[key]} for role, key in roles.items()]
        for row in rows
    ]
    if not tokenizer:
        return [12 + sum(len(turn["content"].encode()) for turn in chat) // 3 for chat in chats]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    return [len(tokens) for tokens in encode(texts, add_special_tokens=False)]


def find_tokenizer(folder):
    """Return the tokenizer of the base model, None if there is no base model."""
    if folder.is_dir():
        say(f"counting   tokens with the tokenizer and chat template of {folder}")
        return load_tokenizer(folder)
    there = [path.name for path in folder.parent.glob("[!.]*") if path.is_dir()]
    fix = f"hf download mlx-community/{folder.name} --local-dir {folder}"
    if folder.name == "tiny-gemma-3":
        fix = "python tests/tiny_base.py"
    elif len(there) == 1:
        fix = f"export MODEL={shlex.quote(there[0])}"
    what = f"there is no base model in {folder}, so tokens are ESTIMATED"
    print(f"warning: {what}. FIX: {fix}", file=sys.stderr)
    return None


def load_tokenizer(folder):
    """Return a tokenizer that works, or end the run."""
    for name in [n for n in os.environ if n.startswith(("HF_", "TRANSFORMERS_", "MLXLM_"))]:
        del os.environ[name]  # a wrong one would break an import, another hub would be asked
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    what = f"the tokenizer or chat template of {folder} does not work"
    fix = f"set MODEL to an instruction-tuned model; if the download broke off, rm -r {folder}"
    fix += " and hf download it again"
    signal.signal(signal.SIGALRM, lambda *_: fail(f"{what}: it took more than a minute", fix))
    signal.alarm(60)  # a template is a program, and may have no end
    try:
        from mlx_lm import utils  # here, because it takes a second

        config = folder / "config.json"
        if config.exists() and json.loads(config.read_bytes()).get("num_hidden_layers", 0) > 1000:
            raise ValueError("so many layers would fill the memory")
        tokenizer = utils.load_tokenizer(folder, {"trust_remote_code": False})  # it runs no code
        count_tokens([{"prompt": "Hi!", "completion": "Hello"}], tokenizer)
    except Exception as error:  # whatever a broken download leads to
        fail(f"{what}: {str(error)!a:.200}", fix)
    finally:
        signal.alarm(0)
    return tokenizer


def fit(rows, s, tokenizer, dropped):
    """Return the rows that fit --max-seq-length, if need be without their oldest messages."""
    kept = []
    for i in bar(range(0, len(rows), 1000), "counting tokens"):
        part = rows[i : i + 1000]
        counts = count_tokens([training_row(row, s) for row in part], tokenizer)
        for row, count in zip(part, counts, strict=True):
            row.tokens = count
            if row.tokens > s.max_seq_length and not row.prompt:
                shorten(row, s, tokenizer)
            if row.tokens > s.max_seq_length:
                dropped.append((row, "over --max-seq-length"))
            else:
                kept.append(row)
    return kept


def shorten(row, s, tokenizer):
    """Leave a row that is too long as many of its newest messages as fit, if any do."""
    window = row.window
    fewest = 2 if s.shape == "turns" else 1
    for size in range(fewest, len(window)):
        shorter = replace(row, window=window[-size:])
        [tokens] = count_tokens([training_row(shorter, s)], tokenizer)
        if tokens > s.max_seq_length:
            return
        row.window, row.tokens = shorter.window, tokens


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
    if beside(folder, "old").exists() and not folder.exists():  # killed between two renames
        beside(folder, "old").rename(folder)
    for word in "partial", "old":
        shutil.rmtree(beside(folder, word), ignore_errors=True)
    return lock


def write(folder, files):
    """Write {name: lines} to the folder that claim() took."""
    partial, old = beside(folder, "partial"), beside(folder, "old")
    to_json = json.JSONEncoder(ensure_ascii=False).encode
    partial.mkdir()
    for name, lines in files.items():
        with (partial / name).open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(to_json(line) + "\n" for line in lines)
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
    logs = [name for name in files if name.startswith("messages_")]
    others = [name.removeprefix("messages_").partition(".")[0] for name in logs]
    fixes = [f"python data/raw/from_export.py {export} --version {version}"]
    fixes += [f"export VERSION={other}" for other in others if other != "sample"]
    what = f"data/raw/messages_{version}.json is not there or empty; there are {', '.join(files)}"
    fail(what, ", or ".join(fixes))


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
    fail(what, f"python build_train.py --only-author {shlex.quote(near[0])}")


def check_order(drawn, valid, raw):
    """End the run if most validation rows were copies: then neighbours are not side by side."""
    copies = len(drawn) - len(valid)
    if copies > len(drawn) / 2:
        what = f"{copies} of {len(drawn)} validation rows stand in training rows"
        fix = 'give each entry its "conversation", or sort it by time'
        fail(f"{raw} is not in the order of time: {what}", fix)


def print_table(s, dropped):
    """Print how many rows each rule dropped, and the first of them: cleaned, so safe to print."""
    counts = Counter(rule for _, rule in dropped)
    first = {rule: " ".join(row.reply.split())[:60] for row, rule in reversed(dropped)}
    say(f"\n{'rule':34}{'dropped':>9}   for example")
    for rule in dict.fromkeys([*ALL_RULES, *counts]):
        if rule in counts:
            say(f"{rule:34}{counts[rule]:>9,}   {first[rule]}".rstrip())
    if s.off:
        say("switched off:", ", ".join(s.off))


def report(train, valid, dropped, raw):
    """Print what came out, and end the run if it is not enough, or if it leaks."""
    if not train or not valid:
        what = f"{raw}: {len(train) + len(valid)} rows are left, too few to split"
        fail(f"{what} (it takes about 30)", "use a longer chat, or --off 'RULE' of the table")
    between = sum(rule == BETWEEN for _, rule in dropped)
    counts = f"{len(train):,} rows to train, {len(valid):,} to validate"
    others = f"{between:,} in prompts of others, {len(dropped) - between:,} dropped"
    say(f"\nsplit      {counts}, {others}")
    held = set().union(*(row.places for row in valid))
    leaks = sum(not held.isdisjoint(row.places) for row in train)
    say(f"leaks      validation rows hold {len(held):,} messages; training rows with one: {leaks}")
    if leaks:
        fail("the split leaks", "report it, build_train.py is wrong")
    for name, rows in ("train", train), ("valid", valid):
        tokens = [row.tokens for row in rows]
        say(f"{name:10} {sum(tokens):,} tokens, longest row {max(tokens):,}")
    say(f"one epoch  {len(train) // 2:,} iterations at BATCH_SIZE=2")


def build(s, raw, folder):
    """Make the training data: the story of this script."""
    tokenizer = find_tokenizer(Path("models/base", s.model))
    special = tokenizer.all_special_tokens if tokenizer else []
    tidy, name = cleaners(s, [token for token in special if len(token) > 2])
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
    check_order(drawn, valid, raw)
    valid = shuffled(valid, s.seed)
    dropped.extend((row, "split: beyond --valid-rows") for row in valid[s.valid_rows :])
    train = thin_out(train, s, dropped)
    train = order(fit(train, s, tokenizer, dropped), s.seed)
    valid = order(fit(valid[: s.valid_rows], s, tokenizer, dropped), s.seed)
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
    say(f"next       VERSION={s.version} MODEL={s.model} ./fine_tune.sh")


def main():
    s = settings(sys.argv[1:])
    os.chdir(Path(__file__).resolve().parent)
    folder = Path("data/for_train", s.version)
    try:
        raw = find_raw(s.version)
        changed = {n: v for n, v in vars(s).items() if v and v != parser.get_default(n)}
        say(f"reading    {raw} with", ", ".join(f"{n} {v!a}" for n, v in changed.items()))
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
