"""Make a chat log from what an app exported: the step before build_train.py.

    python data/raw/from_export.py ~/Downloads/result.json
    python data/raw/from_export.py ~/Downloads/"WhatsApp Chat with Ann.zip" --version ann

Reads   files, folders or .zip of WhatsApp, Telegram, Discord, Instagram, Messenger, Twitch, IRC,
        Slack, Signal, iMessage, Google Chat, Matrix; CSV with a header, JSON lists of messages,
        ready training sets. Their content tells them apart; nothing is unpacked or sent anywhere.
Writes  data/raw/messages_${VERSION}.json, a list with one entry a line, to be read and edited:
        {"conversation": "Ann", "time": "2026-11-24T10:44:25", "author": "Ann Lee", "message": "hi"}
        one conversation after the other, each in the order of time;
        of a training set {"prompt": "Hi!", "completion": "Hello"}

What is no talk between people is left out, counted and shown: see KINDS below.
"""
# ruff: noqa: E402 (Ctrl-C must be quiet, and imports safe, while the other imports still run)
# ruff: noqa: RUF001 (the sentences of the apps are in many alphabets)

import os
import sys

sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.realpath(__file__))]
import signal

if __name__ == "__main__":
    # Ctrl-C ends it at once; what it has written is whole.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\n"), os._exit(130)))

import argparse
import contextlib
import csv
import fcntl
import functools
import html
import io
import itertools
import json
import re
import shlex
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

try:
    from dateutil import parser as date_parser
    from tqdm import tqdm
except ImportError as e:
    sys.exit(f"error: {e}. FIX: source venv/bin/activate (see README.md, Install)")

warnings.filterwarnings("ignore", category=date_parser.UnknownTimezoneWarning)

# ---- settings: what is left out, unless --keep names it -----------------------------------------
KINDS = {
    "app": "written by the app itself",
    "deleted": "deleted messages",
    "call": "calls",
    "media": "media without words",
    "poll": "polls",
    "location": "locations",
    "forwarded": "forwarded messages",
    "bot": "bots",
    "channel": "channels",
    "notes": "notes to oneself",
    "alone": "chats in which one person alone speaks",
    "copy": "already in a file read before",
}
BOTS = {"nightbot", "streamelements", "streamlabs", "moobot", "fossabot", "wizebot", "sery_bot"}
ORDERS = {"dmy": (2, 1, 0), "mdy": (2, 0, 1), "ymd": (0, 1, 2)}  # where year, month and day stand
READABLE = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".log", ".md", ".html", ".zip"}
MOST_BYTES = 2 << 30  # of the chats in a .zip
RAW = Path(__file__).resolve().parent


def settings():
    what = "Make data/raw/messages_VERSION.json of what an app exported."
    parser = argparse.ArgumentParser(description=what)
    add, version = parser.add_argument, os.environ.get("VERSION", "v1")
    add("paths", nargs="+", metavar="PATH", help="file, folder or .zip that an app exported")
    add("--version", default=version, help="name of the data; $VERSION, or else v1")
    add("--keep", action="append", choices=KINDS, default=[], help="a kind not to leave out")
    add("--dates", choices=list(ORDERS), help="order of day, month, year; else found by itself")
    add("--replace", action="store_true", help="write over the messages of another export")
    example = 'python data/raw/from_export.py ~/Downloads/"WhatsApp Chat with Ann.zip"'
    parser.error = lambda what: parser.exit(2, f"error: {what}. FIX: {example}\n")
    s = parser.parse_args()

    if not re.fullmatch(r"\w[\w.-]*", s.version, re.ASCII):
        name = re.sub(r"[^A-Za-z0-9]+", "_", s.version).strip("_") or "v1"
        fail(f"VERSION is {s.version!a}, not a name for a file", f"export VERSION={name}")
    return s


def fail(what, fix):
    sys.exit(f"error: {shown(what)}. FIX: {shown(fix)}")


def shown(text):
    r"""Return text for a terminal: what could control it is spelled out, as in "\x1b[2J"."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


# ---- find ---------------------------------------------------------------------------------------
def files_in(path):
    """Yield (name, content) of a file, or of all files in a folder or .zip."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            is_ours = file.parent.resolve() == RAW and file.name.startswith("messages_")
            if may_be_a_chat(file.relative_to(path)) and file.is_file() and not is_ours:
                yield from files_in(file)
    elif not path.is_file():
        fix = "name a file that is there: drag it into this window"
        typed = [os.path.expanduser(word.strip("“”‘’")) for word in sys.argv]
        words = with_quotes(typed)
        if words != sys.argv and any(map(os.path.exists, words[1:])):
            fix = shlex.join(["python", *words])
        fail(f"{path} is not there, or no file", fix)
    elif zipfile.is_zipfile(path):
        yield from files_in_zip(path)
    else:
        yield str(path), path.read_bytes()


def files_in_zip(path):
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if may_be_a_chat(Path(name))]
            if sum(archive.getinfo(name).file_size for name in names) > MOST_BYTES:
                fail(f"{path} holds over {MOST_BYTES >> 30} GB", "unzip it, name the chats in it")
            for name in names:
                yield f"{path}/{name}", archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:  # also a password
        fail(f"{path} cannot be unpacked: {e}", "unzip it yourself, and name the folder")


def may_be_a_chat(path):
    """Say whether a file in a folder or .zip is to be read: no picture, and nothing hidden."""
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in READABLE and not is_hidden


def with_quotes(words):
    """Join the words that are one path: ["Chat", "with", "Ann.zip"] → ["Chat with Ann.zip"]."""
    for length in range(len(words), 1, -1):
        for start in range(len(words) - length + 1):
            path, rest = " ".join(words[start : start + length]), words[start + length :]
            if os.path.exists(path):
                return [*with_quotes(words[:start]), path, *with_quotes(rest)]
    return words


@functools.cache
def title_of(name):
    """Return a name for the conversation in a file: "x/Chat with Ann (1).txt" → "Chat with Ann".

    Many apps give all files one name, and folders tell them apart: "Ann.zip/_chat.txt" → "Ann".
    """
    path = Path(name)
    everyones = r"_chat|chat|data|export|index|messages?|message_\d+|result|\d{4}-\d\d-\d\d"
    if re.fullmatch(everyones, path.stem) and path.parent.name:
        path = path.parent
    stem = path.stem if path.suffix.lower() in READABLE else path.name
    return re.sub(r" ?\(\d+\)$", "", stem)


# ---- recognise ----------------------------------------------------------------------------------
notes = []  # what the user should know of the files, told at the end


class UnknownFileError(Exception):
    """No reader knows the file; says what was seen in it."""


class Message(NamedTuple):
    """What one person said, or what is to be left out: values of the app, until read_times."""

    time: object
    author: object
    text: object
    kind: str = ""  # a name of KINDS, if it is to be left out
    conversation: object = ""  # if the file holds several


def read(name, content):
    """Return (app, messages) of a file; the messages of a training set are dicts."""
    text = decode(content).replace("\r\n", "\n").replace("\r", "\n")
    data = parse_json(text)
    if data is not None:
        outer, inner = keys_of(data), keys_of(messages_of(data))
        for app, file_keys, message_keys, reader in JSON_READERS:
            if outer.issuperset(file_keys.split()) and inner.issuperset(message_keys.split()):
                return app, list(reader(data, name))
    for line in text.split("\n")[:50]:
        for app, looks_like, reader in TEXT_READERS:
            if looks_like(line):
                return app, list(reader(text, name))
    start = text.strip()[:60]
    if re.match(r"(?i)<!doctype html|<html", start):
        raise UnknownFileError("a web page: export as JSON (in Telegram: Machine-readable JSON)")
    raise UnknownFileError(f"a text that begins with {start!r}" if start else "empty")


def decode(content):
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):  # as Excel writes it
        return content.decode("utf-16", "replace")
    if content.startswith(b"PK"):
        raise UnknownFileError("a .zip that is not whole: copy it or export the chat again")
    if b"\0" in content[:1000]:
        raise UnknownFileError("no text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("windows-1252", "replace")


def parse_json(text):
    """Return what the JSON holds (of JSON lines a list), or None if it is none."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    for parts in [text], text.split("\n"):  # one document, or one in every line
        with contextlib.suppress(ValueError):
            found = [json.loads(part) for part in parts if part.strip()]
            return found if len(found) > 1 else found[0]
    return None


def messages_of(data):
    """Return the list of messages in the data, wherever the app put it; of one message, [it]."""
    if isinstance(data, dict):
        data = data.get("messages") or data.get("comments") or [data]
    return data if isinstance(data, list) else []


def keys_of(data):
    """Return the keys of a dict, or of the first dicts in a list: [{"a": 1}, {"b": 2}] → {a, b}."""
    entries = [data] if isinstance(data, dict) else data[:100]
    return {key for entry in entries if isinstance(entry, dict) for key in entry if key}


# ---- read: JSON of the apps. A reader yields the messages of a file -----------------------------
def first(**tests):
    """Return the first name that is true: with app=0, bot=1, call=1 it is "bot"."""
    return next((name for name, true in tests.items() if true), "")


def text_of(value):
    """Return the text of a JSON value: None → "", 7 → "7", parts or keys → their text."""
    if isinstance(value, list):
        return "".join(text_of(part) for part in value)
    if isinstance(value, dict):
        keys = "text", "body", "display_name", "displayName", "real_name", "name", "username"
        return next((text_of(value[key]) for key in keys if value.get(key)), "")
    return "" if value is None or isinstance(value, bool) else str(value)


def read_telegram(data, name):
    """Read one chat, or the export of all; a topic of a forum is a conversation of its own."""
    chats = []
    for key in "chats", "left_chats":
        chats += data.get(key, {}).get("list", [])
    chats = chats or [data]
    names = Counter(chat.get("name") for chat in chats)
    for chat in chats:
        title = text_of(chat.get("name")) or title_of(name)
        if names[chat.get("name")] > 1:
            title += f" {text_of(chat.get('id'))}"
        form = text_of(chat.get("type"))
        topics = {}  # message → its topic
        for m in chat["messages"]:
            topic = topics.get(m.get("reply_to_message_id"))
            if m.get("action") == "topic_created":
                topic = text_of(m.get("title"))
            topics[m.get("id")] = topic
            kind = first(
                notes=form == "saved_messages",
                bot=form in ("bot_chat", "verify_codes") or "via_bot" in m,
                channel="channel" in form or text_of(m.get("from_id")).startswith("channel"),
                app=m.get("type", "message") != "message",
                forwarded="forwarded_from" in m or "saved_from" in m,
                poll="poll" in m,
            )
            when = m.get("date_unixtime") or m.get("date")
            text = m.get("text") or m.get("text_entities")
            place = f"{title} / {topic}" if topic else title
            yield Message(when, m.get("from"), text, kind, place)


def read_discord(data, name):
    place = " / ".join(filter(None, (data["guild"].get("name"), data["channel"].get("name"))))
    for m in data["messages"]:
        kind = first(
            app=m.get("type", "Default") not in ("Default", "Reply"),
            bot=m["author"].get("isBot"),
            forwarded=m.get("forwardedMessage"),
            poll=m.get("poll"),
        )
        yield Message(m.get("timestamp"), m["author"], m.get("content"), kind, place)


def read_meta(data, name):
    """Read Instagram and Messenger: as they export all data, and as they export encrypted chats."""
    title = text_of(data.get("title")) or re.sub(r"_\d+$", "", text_of(data.get("threadName")))
    for m in data["messages"]:
        author = repaired(text_of(m.get("sender_name") or m.get("senderName")))
        text = repaired(text_of(m.get("content") or m.get("text")))
        kind = first(
            deleted=m.get("is_unsent") or m.get("isUnsent"),
            call="call_duration" in m or m.get("type") == "Call",
            app=m.get("type") in ("Subscribe", "Unsubscribe", "placeholder")
            or SENTENCES.get(plain(re.sub(r"[^\w\s]+ ", "", text))) == "app"  # without its emoji
            or (text.startswith(f"{author} ") and text.endswith(".")),  # "Zoë sent an attachment."
        )
        when = m.get("timestamp_ms") or m.get("timestamp")
        yield Message(when, author, text, kind, repaired(title))


def repaired(text):
    """Undo that UTF-8 was written as if it were Latin-1: "CafÃ©" → "Café"."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def read_twitch(data, name):
    for m in data["comments"]:
        when = m.get("created_at") or m.get("content_offset_seconds")  # of the video
        notice = (m["message"].get("user_notice_params") or {}).get("msg-id")
        yield Message(when, m.get("commenter"), m["message"], first(app=notice))


slack_names = {}  # number → name, from users.json, which is read before all other files


def read_slack(data, name):
    """Read a day of a channel, or users.json; a thread is a conversation of its own."""
    for m in data:
        if "profile" in m:
            slack_names[m["id"]] = text_of(m["profile"]) or text_of(m)
            continue
        kind = first(
            bot=m.get("bot_id"),
            app=m.get("subtype") not in (None, "thread_broadcast", "me_message", "file_share"),
        )
        author = slack_names.get(m.get("user")) or m.get("user_profile") or m.get("user")
        place = f"{title_of(name)} / {m['thread_ts']}" if m.get("thread_ts") else ""
        yield Message(m["ts"], author, slack_text(text_of(m.get("text"))), kind, place)


def slack_text(text):
    """Return what people see: "<@U12> look <https://a.b|here> &amp; go" → "@Ann look here & go"."""
    text = re.sub(r"<@(\w+)[^<>]*>", lambda user: f"@{slack_names.get(user[1], user[1])}", text)
    return html.unescape(re.sub(r"<(?:[^<>|]*\|)?([^<>]*)>", r"\1", text))


def read_google_chat(data, name):
    for m in data["messages"]:
        kind = first(
            bot=m["creator"].get("user_type") == "Bot",
            deleted=m.get("message_state") == "DELETED",
        )
        when = text_of(m.get("created_date")).replace(" at ", " ")
        yield Message(when, m["creator"], m.get("text"), kind)


def read_matrix(data, name):
    for m in data["messages"]:
        content = m.get("content") or {}
        relation = content.get("m.relates_to") or {}
        kind = first(
            app=m.get("type") != "m.room.message" or relation.get("rel_type") == "m.replace",
            deleted=not content,
            bot=content.get("msgtype") == "m.notice",
            media=content.get("msgtype") not in ("m.text", "m.emote"),
        )
        text = text_of(content)
        if "m.in_reply_to" in relation:  # the quotation before the answer
            text = re.sub(r"\A(?:> .*\n)+\n", "", text)
        author = text_of(m.get("sender")).removeprefix("@").partition(":")[0]
        yield Message(m.get("origin_server_ts"), author, text, kind, data["room_name"])


# ---- read: lists of messages, CSV, training sets ------------------------------------------------
COLUMNS = {
    "conversation": "conversation channel chat thread room group conversation_id chat_name",
    "time": "time timestamp date datetime created_at sent_at created sent timestamp_ms ts",
    "author": "author sender sender_name username user from nick nickname name display_name",
    "text": "message text content body msg contents",
}
ASKED = "prompt", "instruction", "question", "input"
ANSWERED = "completion", "output", "response", "answer"
ASKED_AND_ANSWERED = re.compile(
    r"(?is)(?:### ?)?(?:q|question|user|human|instruction|prompt)s? ?:\s?(.*)"
    r"\n(?:### ?)?(?:a|answer|assistant|bot|gpt|response|output)s? ?:\s?(.*)"
)


def columns_of(keys):
    """Return which keys hold what: ["Date", "User", "Text"] → {"time": ["Date"], …}."""
    keys = {str(key).casefold().strip().replace(" ", "_"): key for key in keys if key}
    found = {
        column: [keys[name] for name in names.split() if name in keys][:1]
        for column, names in COLUMNS.items()
    }
    if "date" in keys and "time" in keys:
        found["time"] = [keys["date"], keys["time"]]
    return found


def read_entries(data, name):
    """Read messages under the keys that many programs use."""
    keys = ", ".join(sorted(keys_of(data))[:9])
    data = messages_of(data)
    columns = columns_of(keys_of(data))
    if not columns["text"]:
        raise UnknownFileError(f"JSON with the keys {keys or '(none)'}")
    if "previous_messages" in keys_of(data):
        raise UnknownFileError("what build_train.py reads as it is, if you copy it into data/raw")
    ignored = keys_of(data) - {key for keys in columns.values() for key in keys}
    if ignored:
        notes.append(f"nothing was understood in {', '.join(sorted(ignored))} of {title_of(name)}")
    for entry in data:
        values = {
            column: " ".join(text_of(entry[key]) for key in keys if entry.get(key))
            for column, keys in columns.items()
        }
        yield Message(**values)


def read_csv(text, name):
    csv.field_size_limit(sys.maxsize)
    return read_entries(list(csv.DictReader(io.StringIO(text), delimiter=delimiter(text))), name)


def delimiter(text):
    return max(",;\t|", key=text.partition("\n")[0].count)


def is_csv_header(line):
    names = next(csv.reader([line], delimiter=delimiter(line)), [])
    return len(names) > 1 and bool(columns_of(names)["text"])


def read_pairs(data, name):
    """Yield the pairs of a training set: {"instruction", "input", "output"} and the like."""
    for entry in messages_of(data):
        asked = next(key for key in ASKED if key in entry)
        answered = next(key for key in ANSWERED if key in entry)
        parts = [entry[asked], entry.get("input") if asked == "instruction" else ""]
        prompt = "\n\n".join(filter(None, map(text_of, parts)))
        yield {"prompt": prompt, "completion": text_of(entry[answered])}


def read_turns(data, name):
    """Yield a pair for each turn of the assistant; its prompt is all that was said before it.

    system s, user a, assistant b, user c, assistant d → (s a, b) and (s a b c, d)
    """
    for number, entry in enumerate(data if isinstance(data, list) else [data]):
        before = []
        for turn in entry.get("messages") or entry["conversations"]:
            text = text_of(turn.get("content") or turn.get("value"))
            if before and (turn.get("role") or turn.get("from")) in ("assistant", "gpt", "model"):
                prompt = "\n\n".join(before)
                yield {"conversation": number, "prompt": prompt, "completion": text}
            before.append(text)


def read_texts(data, name):
    r"""Read {"text": …}: "Q: hi?\nA: hello" is a pair, and all else a list of messages."""
    parts = [
        ASKED_AND_ANSWERED.fullmatch(text_of(entry.get("text"))) for entry in messages_of(data)
    ]
    if not all(parts):
        return read_entries(data, name)
    return [{"prompt": part[1], "completion": part[2]} for part in parts]


# ---- read: lines of text ------------------------------------------------------------------------
MARK = "[\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"  # invisible: which way to write
DAY = rf"(\d{{1,4}}){MARK}?\s?[-./年년]{MARK}?\s?(\d\d?){MARK}?\s?[-./月월]{MARK}?\s?(\d{{1,4}})"
CLOCK = r"(\d\d?)[:.](\d\d)(?:[:.](\d\d))?"
# "[24/11/26, 10:44:25] Ann: hi" on an iPhone, "24/11/26, 10:44 - Ann: hi" on Android,
# "24/11/26, 10:44:25 PM: Ann: hi" on old iPhones, "10:44, 24/11/26 - Ann: hi" in Vietnam
ENTRY = re.compile(
    rf"{MARK}{{0,3}}(?P<iphone>\[)?{MARK}?"
    rf"(?P<when>{DAY}\D{{1,20}}?{CLOCK}[^\d\]]{{0,24}}?|{CLOCK}\D{{1,3}}{DAY})"
    r"(?(iphone)\]|(?:\s[-–]|:))(?:\s|$)"
)
AUTHOR = re.compile(r"([^\n]{1,100}?)\s?:(?:\s|$)")
LOCATION = re.compile(r"[^\n:]{1,60}: https://maps\.google\.com/\?q=\S+")
POLL = re.compile(r"\W?[^\W\d_]{2,20} ?:\n(?s:.*)\(\W?\d+ [^()\n]+\)")
FILE_NAME = re.compile(r"[^\n]{1,200}\.(pdf|docx?|xlsx?|pptx?|zip|jpe?g|png|mp[34]|opus|vcf|webp)")
MARKED_TAG = re.compile(r"[\u200e\u200f]<[^<>]*>|<[^<>\n:]{2,30}: ?\d{8}-[^<>\n]*>")
TAGS = (  # what may be the app's in a message, and its words
    re.compile(r"\A.{1,200}\.\w{0,5} \(([^()\n]{3,40})\)(?=\n|\Z)"),  # IMG-1.jpg (file attached)
    re.compile(r'\A<([^<>\n\d/="]{3,60})>(?=\n|\Z)'),  # <Media omitted>
    re.compile(r'<([^<>\n\d/="]{3,60})>\Z'),  # ok <This message was edited>
    re.compile(r"\u200e([^\u200e\n<>]{3,60})\Z"),  # look, and then "image omitted"
)


def read_whatsapp(text, name):
    r"""Read messages that begin with a date; the lines after it belong to them.

    "24/11/26, 10:44 - Ann: one\ntwo" → Message("24/11/26, 10:44", "Ann", "one\ntwo")
    """
    entries = []  # (match of the date, lines)
    for line in text.split("\n"):
        if start := ENTRY.match(line):
            entries.append((start, [line[start.end() :]]))
        elif entries:
            entries[-1][1].append(line)
    said = [author_and_words("\n".join(lines).strip()) for _, lines in entries]
    counts = Counter(tag for _, words in said for tag in tags_in(words))
    tags = {tag for tag, count in counts.items() if count >= 3}  # in whatever language
    for (start, _), (author, words) in zip(entries, said, strict=True):
        words, kind = whatsapp_words(words, bool(start["iphone"]), tags)
        yield Message(start["when"], author, words, kind if author else "app")


def author_and_words(text):
    """Return the parts of "Ann: hi" → ("Ann", "hi"); the notices of the app have no author."""
    found = AUTHOR.match(text)
    # subtle: 'Ann named the group "a: b"' is a notice; nobody's name has one quotation mark
    if not found or sum(found[1].count(quote) for quote in '"“”„«»') % 2:
        return "", text
    return found[1], text[found.end() :]


def tags_in(text):
    """Return what in a message may be the app's: "<Media omitted>" → {"Media omitted"}."""
    tags = {found[1] for tag in TAGS if (found := tag.search(text))}
    return {tag for tag in tags if " " in tag or not tag.isascii()}  # no <div>, no <grin>


def whatsapp_words(text, is_iphone, tags):
    r"""Return (what the author wrote, kind), without what the app put around it.

    "IMG-1.jpg (file attached)\nlook" → ("look", ""), "image omitted" → ("image omitted", "media")
    """
    if kind := kind_of_sentence(text):
        return text, kind
    words = MARKED_TAG.sub("", text).strip()
    if "• \u200e" in text:  # "report.pdf • 12 pages"
        return text, "media"
    if is_iphone and text.startswith(("\u200e", "\u200f")):  # before all that is not a person's
        return text, "app" if words else "media"
    for tag in TAGS:
        found = tag.search(words)
        if found and (found[1] in tags or plain(found[1]) in SENTENCES):
            words = (words[: found.start()] + words[found.end() :]).strip()
            words = "" if FILE_NAME.fullmatch(words) else words
    return words, ""


def kind_of_sentence(text):
    """Return the kind of a message that the app wrote from beginning to end, or ""."""
    if LOCATION.fullmatch(text):
        return "location"
    if POLL.fullmatch(text):
        return "poll"
    kind = SENTENCES.get(plain(text), "")
    return kind if kind in KINDS else ""


def plain(sentence):
    r"""Return it as the table has it: "\u200e<Media omitted>." → "media omitted"."""
    return INVISIBLE.sub("", sentence).strip(" \n<>").rstrip(".。।").casefold()


def read_signal(text, name):
    """Read what signal-export writes, without reactions, quotations and names of files."""
    for m in read_whatsapp(text, name):
        words = re.sub(r"\n\(- .* -\) *\Z|(?m:^> .*\n?)", "", m.text)
        words = re.sub(r"!?\[[^][\n]*\]\([^()\n]*\)|\(\w+ not exported\)", "", words)
        deleted = words.strip() == "(This message was deleted)"
        kind = m.kind or first(notes=title_of(name) == "Note to Self", deleted=deleted)
        yield m._replace(text=words, kind=kind)


LOG_CLOCK = r"\[?(?P<hours>\d\d?):(?P<minutes>\d\d)(?::(?P<seconds>\d\d))?\]?\s+"
LOG_STAMP = rf"\[?(?:(?P<day>\d{{4}}-\d\d-\d\d|[A-Z][a-z]{{2}} [ \d]\d)[T ])?{LOG_CLOCK}"
LOG_LINES = (
    # [10:44] <@ann> hi
    re.compile(LOG_STAMP + r"<[\s@+%&~!]{0,3}(?P<nick>[^>\s]{1,60})>\s?(?P<words>.*)"),
    # 2026-11-24 10:44:25, @ann and hi with tabs between them (WeeChat)
    re.compile(LOG_STAMP + r"[@+%&~]?(?P<nick>[\w\[\]\\`^{|}-]*\w)\t(?P<words>.*)"),
    # [10:44:25] ann: hi; with a day it would be WhatsApp's
    re.compile(LOG_CLOCK + r"(?P<nick>[^\s:<>]{1,60}):\s(?P<words>.*)"),
)
LOG_DAY = re.compile(r"(?:#|---|\*\*\*\*|Session ).*\b(?:19|20)\d\d\b.*")


def log_line(line):
    """Return the parts of what a nick said, {"nick": "ann", "words": "hi", …}, else None."""
    for form in LOG_LINES:
        if found := form.match(line):
            return {"day": ""} | found.groupdict("")
    return None


def read_log(text, name):
    """Read a log of IRC or Twitch, a message a line; the day has lines of its own, if at all."""
    last = day_in(Path(name).stem, datetime(1970, 1, 1))
    for line in filter(str.strip, text.split("\n")):
        if parts := log_line(line):
            clock = {unit: int(parts[unit] or 0) for unit in ("hours", "minutes", "seconds")}
            now = day_in(parts["day"], last) + timedelta(**clock)
            if now < last - timedelta(minutes=1) and not parts["day"]:  # past midnight
                now += timedelta(days=1)
            last = now
            yield Message(now, parts["nick"], parts["words"])
        else:
            last = day_in(line, last) if LOG_DAY.match(line) else last
            yield Message(last, "", line, "app")


def day_in(text, otherwise):
    """Return the midnight of the day in a text, as in "--- Day changed Tue Jan 02 2024"."""
    when = otherwise
    with contextlib.suppress(ValueError, OverflowError):
        if re.search(r"(19|20)\d\d-\d\d-\d\d|\b[A-Z][a-z]{2} [ \d]\d\b", text):
            when = date_parser.parse(text.strip("#-* "), fuzzy=True, default=otherwise)
    return when.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)


IMESSAGE_DATE = re.compile(
    r"(?m)^([A-Z][a-z]{2} \d\d, \d{4} +\d\d?:\d\d:\d\d [AP]M) *(?:\(.*)?(.*)\n?"
)
IMESSAGE_NOTE = re.compile(
    r"(?m)^(?:    |This message (?:responded to an earlier|was deleted)|Sent with "
    r"|Attachment missing!|(?:\w+ )?Sticker from |/.*/Attachments/|attachments/).*\n?"
)


def read_imessage(text, name):
    """Read what imessage-exporter writes: a line with the time, one with the name, the words."""
    _, *parts = IMESSAGE_DATE.split(text)  # time, note, block, time, note, block, …
    for when, note, block in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        author, _, words = block.partition("\n")
        words = re.split(r"(?m)^(?:Tapbacks|Reactions):$", words)[0]
        words = re.sub(r"(?ms)\A.*^Edited [^\n]{1,60}? later: ", "", words)  # the last version
        if note:
            yield Message(when, "", note, "app")
        else:
            yield Message(when, author, IMESSAGE_NOTE.sub("", words))


# ---- times --------------------------------------------------------------------------------------
MORNING = r"(am|午前|上午|早上|凌晨|오전|ص|πμ|morning|mañana|madrugada)$"
AFTERNOON = r"(pm|午後|下午|中午|오후|م|μμ|afternoon|evening|noon|tarde)$"
NIGHT = r"(atnight|noche|noite|晚上)$"  # 9 at night is 21, and 3 at night is 3


def read_times(messages, order, title):
    """Return the messages with datetimes (or None) and texts in place of what the app wrote.

    The order of day and month is found by all dates of the file; if nothing decides, it is told.
    """
    texts = [text_of(m.time) for m in messages]
    stamps = {text: stamp_of(text) for text in dict.fromkeys(texts)}
    dates = list(dict.fromkeys(s[:3] for s in stamps.values() if isinstance(s, tuple)))
    if dates and not order:
        faults = {each: faults_of(dates, each) for each in ORDERS}
        order = min(faults, key=faults.get)
        if order != "ymd" and faults["dmy"] == faults["mdy"]:
            order, other = "dmy", "mdy"  # capitals are how American phones write it
            if re.search("[AP]M", texts[0]):
                order, other = other, order
            told = f"dates are read as {order}, for nothing decides: else --dates {other}"
            notes.append(f"{title}: {told}")
    times = {text: time_of(stamp, order) for text, stamp in stamps.items()}
    return [
        Message(times[text], text_of(m.author), text_of(m.text), m.kind, text_of(m.conversation))
        for text, m in zip(texts, messages, strict=True)
    ]


def stamp_of(text):
    """Return (number, number, number, hour, minute, second), whichever of the first is the day.

    Or a datetime where that is clear, or None where there is no time.
    """
    if since := since_1970(text):
        return since
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        if day := re.search(DAY, text):
            return *map(int, day.groups()), *clock_in(text[: day.start()] + text[day.end() :])
        try:
            when = date_parser.parse(text[:60], default=datetime(1970, 1, 1))  # if only a clock
        except (ValueError, OverflowError):
            return None
    return when.astimezone(UTC).replace(tzinfo=None) if when.tzinfo else when


def since_1970(number):
    """Return the time of so many seconds, or milli-, micro- or nanoseconds; None if it is none."""
    try:
        seconds = float(number)
        for _ in range(3):
            seconds /= 1000 if abs(seconds) > 1e11 else 1
        return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def clock_in(text):
    """Return (hour, minute, second): ", 10:44 PM" → (22, 44, 0), " 12:05 a. m." → (0, 5, 0)."""
    found = re.search(CLOCK, text)
    if not found:
        return 0, 0, 0
    hour, minute, second = (int(number or 0) for number in found.groups())
    words = re.sub(r"\W", "", (text[: found.start()] + text[found.end() :]).casefold())
    at_night = re.search(NIGHT, words)
    if re.search(AFTERNOON, words) or (at_night and 6 <= hour < 12):
        hour = hour % 12 + 12
    elif hour == 12 and (at_night or re.search(MORNING, words)):
        hour = 0
    return hour, minute, second


def faults_of(dates, order):
    """Return how many dates are impossible in an order, or go back in time.

    [(1, 2, 26), (1, 13, 26)]: as mdy 0, as dmy 1, for there is no month 13.
    """
    days = [day for numbers in dates if (day := time_of(numbers, order))]
    falls = sum(a > b for a, b in itertools.pairwise(days))
    rises = sum(a < b for a, b in itertools.pairwise(days))
    return len(dates) - len(days) + min(falls, rises)  # some logs run backwards


def time_of(stamp, order):
    """Return the time of (24, 11, 26, 10, 44, 0), or None; 2569 is Thailand's name for 2026."""
    if not isinstance(stamp, tuple):
        return stamp
    year, month, day = (stamp[place] for place in ORDERS[order])
    year += 2000 if year < 100 else -543 if year > 2400 else 0
    try:
        return datetime(year, month, day, *stamp[3:])
    except ValueError:
        return None


# ---- leave out ----------------------------------------------------------------------------------
@functools.cache
def tidy_name(name):
    r"""Return a name on one line: "\u202a~ Ann\nLee" → "Ann Lee"."""
    return " ".join(INVISIBLE.sub("", name).split()).removeprefix("~").strip()


def sort_out(files, keep):
    """Return ({conversation: messages in the order of time}, {kind: texts that are left out})."""
    conversations, left_out = defaultdict(list), defaultdict(list)
    before = set()  # the messages of the files before
    for name, _, messages in files:
        title, talks = title_of(name), defaultdict(list)
        for m in messages:
            text = INVISIBLE.sub("", m.text).strip()
            place = tidy_name(m.conversation or title)
            m = Message(m.time, tidy_name(m.author), text, m.kind, place)
            is_copy = m.time and m in before
            is_bot = m.author.casefold() in BOTS
            kind = m.kind or first(bot=is_bot, media=not m.text, copy=is_copy)
            if m.text and kind in ["", *keep]:
                talks[place].append(m)
            else:
                left_out[kind].append(m.text)
        for place, talk in talks.items():
            times = [m.time for m in talk if m.time]
            is_newest_first = times and times[0] > times[-1]
            conversations[place] += talk[::-1] if is_newest_first else talk
            before.update(talk)

    for place, talk in list(conversations.items()):
        authors = {m.author for m in talk}
        if len(authors) == 1 and "" not in authors and "alone" not in keep:
            left_out["alone"] += [m.text for m in conversations.pop(place)]
        elif all(m.time for m in talk):
            talk.sort(key=lambda m: m.time)  # equal times stay as the file has them
    return conversations, left_out


def without_number(name, people):
    """Return "Person 1" for the first name that is a phone number, and so on; others stay."""
    if not re.fullmatch(r"\+?[\d\s().\-\u2011/]{7,30}", name):
        return name
    return people.setdefault(re.sub(r"\D", "", name), f"Person {len(people) + 1}")


def entries_of(conversations):
    """Return the entries to write: [{"conversation": …, "time": …, "author": …, "message": …}]."""
    people, entries = {}, []
    for place, messages in conversations.items():
        for m in messages:
            entry = {
                "conversation": without_number(place, people),
                "time": m.time and m.time.isoformat(timespec="seconds"),
                "author": without_number(m.author, people),
                "message": m.text,
            }
            entries.append({key: value for key, value in entry.items() if value})
    return entries


# ---- write --------------------------------------------------------------------------------------
def claim(target):
    """Return an open file whose lock keeps a second run on the same target away."""
    lock = open(target.with_name(f".{target.name}.lock"), "w")  # noqa: SIM115 (open until the end)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is writing {target}", "wait until it is done, or end it")
    return lock


def write(target, entries, replace):
    """Write one entry a line, whole or not at all."""
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    content = f"[\n{lines}\n]\n".encode("utf-8", "replace")
    if target.exists() and not replace and target.read_bytes() != content:
        what = f"{os.path.relpath(target)} has other content: another export, or edited by hand"
        fail(what, "add --replace to write over it, or --version NAME to write beside it")
    partial = target.with_name(f".{target.name}.partial")
    partial.write_bytes(content)
    partial.replace(target)


# ---- tell ---------------------------------------------------------------------------------------
def tell(title, number, text=""):
    number = f"{number:,}" if isinstance(number, int) else number
    print(f"{title:<14}{number:>9}  {shown(text)}".rstrip())


def report(files, not_read, left_out, entries):
    apps = Counter(app for _, app, _ in files)
    names = {app: name for name, app, _ in reversed(files)}  # of the first file of each app
    for app, number in apps.items():
        tell("read", number, f"{app}, {names[app]}" + " and so on" * (number > 1))
    for name, why in list(not_read.items())[:1]:
        tell("not read", len(not_read), f"{name}: {why}" + " and so on" * (len(not_read) > 1))
    talk = [entry for entry in entries if "message" in entry]  # of chats, not of training sets
    for title, key in ("conversations", "conversation"), ("authors", "author"):
        if counts := Counter(entry[key] for entry in talk if key in entry):
            tell(title, len(counts))
            for name, number in counts.most_common(10):
                tell("", number, name)
            if len(counts) > 10:
                tell("", "…", f"and {len(counts) - 10:,} more")
    if days := sorted(entry["time"][:10] for entry in entries if "time" in entry):
        tell("period", "", f"{days[0]} to {days[-1]}")
    for kind, texts in sorted(left_out.items(), key=lambda item: -len(item[1])):
        sample = " ".join(next(filter(None, texts), "").split())[:40]
        tell("left out", len(texts), f"{KINDS[kind]} ({kind}): {sample}".removesuffix(": "))
    for note in notes[:10]:
        tell("note", "", note)


def next_steps(entries, version):
    """Print the commands that go on: first for the author who speaks in most conversations."""
    build = f"VERSION={version} python build_train.py"
    messages = Counter(entry["author"] for entry in entries if "author" in entry)
    if not messages:
        print(f"next:\n      {build}")
        return
    pairs = {(entry.get("author"), entry.get("conversation")) for entry in entries}
    places = Counter(author for author, _ in pairs)
    author = max(messages, key=lambda author: (places[author], messages[author]))
    print("next, to answer as one of them, or as anybody:")
    print(f"      {build} --only-author {shown(shlex.quote(author))}")
    print(f"      {build}")


# ---- all of it ----------------------------------------------------------------------------------
def read_files(paths, dates):
    """Return ([(name, app, messages)], {name: why it is not read}) of all that the paths hold."""
    contents = [file for path in paths for file in files_in(Path(path).expanduser())]
    contents.sort(key=lambda file: not file[0].endswith("users.json"))  # Slack's names come first
    files, not_read = [], {}
    for name, content in tqdm(contents, unit=" files", leave=False, disable=None):
        try:
            app, messages = read(name, content)
            if messages and isinstance(messages[0], Message):
                messages = read_times(messages, dates, title_of(name))
            files.append((name, app, messages))
        except UnknownFileError as e:
            not_read[name] = str(e)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, csv.Error) as e:
            not_read[name] = f"not as its app writes it: {e!r:.80}"
    wrong = [name for name in not_read if name in paths or not files]
    if wrong or not files:
        what = f"{wrong[0]} is {not_read[wrong[0]]}" if wrong else f"{paths[0]} holds no such file"
        known = ", ".join(dict.fromkeys(app for app, *_ in JSON_READERS + TEXT_READERS))
        fix = "export the chat again: as JSON or CSV if the app can, else as text"
        fail(f"{what}; known are {known}", fix)
    return files, not_read


def main():
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")
    s = settings()
    target = RAW / f"messages_{s.version}.json"
    with claim(target):
        files, not_read = read_files(s.paths, s.dates)
        pairs = [m for _, _, messages in files for m in messages if isinstance(m, dict)]
        if pairs and len(pairs) < sum(len(messages) for _, _, messages in files):
            fail("these are chats and training sets", "one run for each, with --version NAME")
        conversations, left_out = ({}, {}) if pairs else sort_out(files, s.keep)
        entries = pairs or entries_of(conversations)
        if entries:
            write(target, entries, s.replace)
    report(files, not_read, left_out, entries)
    if not entries:
        fail("nothing is left that people said to each other", "--keep KIND, of those above")
    what = f"{len(entries):,} entries; delete what it must not learn"
    print(f"\nwrote {os.path.relpath(target)}: {what}")
    next_steps(entries, s.version)


# ---- tables: who reads what ---------------------------------------------------------------------
JSON_READERS = (  # app, keys of the file, keys of its messages, reader; the first that fits
    ("Telegram", "chats", "", read_telegram),
    ("Discord", "guild channel messages", "", read_discord),
    ("Instagram or Messenger", "participants messages", "", read_meta),
    ("Twitch", "comments", "commenter", read_twitch),
    ("Matrix", "room_name", "sender", read_matrix),
    ("Google Chat", "messages", "creator", read_google_chat),
    ("Telegram", "messages", "type text", read_telegram),
    ("Slack", "", "ts type", read_slack),
    ("Slack", "", "id profile", read_slack),
    ("training set", "messages", "role", read_turns),
    ("training set", "", "messages", read_turns),
    ("training set", "", "conversations", read_turns),
    *(("training set", "", f"{a} {b}", read_pairs) for a in ASKED for b in ANSWERED),
    ("list of texts", "", "text", read_texts),
    ("list of messages", "", "", read_entries),
)
TEXT_READERS = (  # app, how one of the first lines looks, reader
    ("iMessage", IMESSAGE_DATE.match, read_imessage),
    ("log", log_line, read_log),
    ("Signal", re.compile(r"\[\d{4}(-\d\d){2},? \d\d:\d\d\S*\] Me: ").match, read_signal),
    ("Twitch", re.compile(r"\[\S+ \S+ UTC\] ").match, read_whatsapp),
    ("WhatsApp", ENTRY.match, read_whatsapp),
    ("CSV", is_csv_header, read_csv),
)


# ---- tables: what the apps write, in the languages of their users -------------------------------
INVISIBLE = re.compile(  # control characters and MARK; not what joins the parts of an emoji
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufffc]"
)
TABLE = """
deleted:
This message was deleted | You deleted this message | This message was deleted by an admin | Diese
Nachricht wurde gelöscht | Du hast diese Nachricht gelöscht | Se eliminó este mensaje | Este
mensaje fue eliminado | Eliminaste este mensaje | Ce message a été supprimé | Vous avez supprimé ce
message | Questo messaggio è stato eliminato | Hai eliminato questo messaggio | Mensagem apagada |
Esta mensagem foi apagada | Você apagou esta mensagem | Apagou/Apagaste esta mensagem | Dit bericht
is verwijderd | U/Je hebt dit bericht verwijderd | Данное сообщение удалено | Вы удалили данное/это
сообщение | Сообщение удалено | Це повідомлення було видалено | Ви видалили це повідомлення | Ta
wiadomość została usunięta | Usunięto/Usunąłeś(-ęłaś) tę wiadomość | Tato zpráva byla
smazána/odstraněna | Tuto zprávu jste smazal/smazala/odstranil/odstranila | Táto správa bola
odstránená | Túto správu ste odstránili | Acest mesaj a fost șters | Ați șters acest mesaj | Ez az
üzenet törlésre került | Törölted ezt az üzenetet | Ezt az üzenetet törölted | Αυτό το μήνυμα
διαγράφηκε | Διαγράψατε αυτό το μήνυμα | Bu mesaj silindi | Bu mesajı sildiniz | הודעה זו נמחקה |
מחקת הודעה זו | מחקת את ההודעה הזו | تم حذف هذه الرسالة | لقد حذَفت هذه الرسالة | أنت حذفت هذه
الرسالة | این پیام حذف شده است | این پیام حذف شد | شما این پیام را حذف کردید | یہ میسج حذف کر دیا
گیا ہے | یہ پیغام حذف کیا گیا | آپ نے یہ میسج حذف کر دیا ہے | यह मैसेज डिलीट कर दिया गया है | यह
संदेश मिटाया गया | आपने यह मैसेज डिलीट किया | हा मेसेज हटवण्यात आला | এই মেসেজটি বাদ দেওয়া হয়েছে
| આ મેસેજ ડિલીટ કરાયો | Pesan ini dihapus | Pesan ini telah dihapus | Anda menghapus pesan ini |
Anda telah menghapus pesan ini | Mesej ini telah dipadam | Anda telah memadamkan mesej ini | Tin
nhắn này đã bị xóa | Bạn đã xóa tin nhắn này | ข้อความนี้ถูกลบแล้ว | คุณได้ลบข้อความนี้ |
此訊息已刪除 | 您已刪除此訊息 | 这条消息已被删除 | 您已删除这条消息 |
このメッセージは削除されました | このメッセージを削除しました | 이 메시지는 삭제되었습니다 | 이
메시지를 삭제했습니다 | 삭제한 메시지입니다 | Det här meddelandet raderades | Du raderade det här
meddelandet | Detta meddelande raderades | Denne besked er blevet slettet | Denne besked blev
slettet | Du har slettet denne besked | Du slettede denne besked | Denne meldingen ble slettet | Du
slettet denne meldingen | Tämä viesti poistettiin | Poistit tämän viestin | Ova je poruka izbrisana
| Izbrisali ste ovu poruku | Ова порука је обрисана | Съобщението беше изтрито | Aquest missatge
s'ha suprimit | Has suprimit aquest missatge | Ujumbe huu ulifutwa | Umefuta ujumbe huu | Hierdie
boodskap was uitgevee

call:
Missed voice/video call | Missed group voice/video call | Verpasster Sprachanruf/Videoanruf |
Llamada/Videollamada perdida | Llamada de voz perdida | Videochamada perdida | Chamada/Ligação de
voz/vídeo perdida | Appel vocal/vidéo manqué | Chiamata vocale persa | Videochiamata persa | Gemist
spraakgesprek/videogesprek | Gemiste spraakoproep/video-oproep | Пропущенный
аудиозвонок/видеозвонок | Пропущений аудіодзвінок/відеодзвінок | Nieodebrane połączenie |
Nieodebrane połączenie głosowe/wideo | Zmeškaný hovor/videohovor | Zmeškaný hlasový hovor | Apel
vocal/video nepreluat | Nem fogadott hanghívás/videohívás | Αναπάντητη κλήση/βιντεοκλήση |
Αναπάντητη φωνητική κλήση | Cevapsız sesli/görüntülü arama | שיחה קולית שלא נענתה | שיחת וידאו שלא
נענתה | مكالمة صوتية/فيديو فائتة | تماس صوتی/تصویری پاسخ داده نشده | مسڈ وائس/ویڈیو کال | मिस्ड
वॉइस/वीडियो कॉल | Panggilan suara/video tak terjawab | Panggilan suara/video terlepas | Cuộc gọi
nhỡ | Cuộc gọi nhỡ video | สายที่ไม่ได้รับ | 未接語音通話 | 未接視像通話 | 未接视频通话 |
未接语音通话 | 不在着信 | 音声通話不在着信 | ビデオ通話不在着信 | 부재중 전화/영상통화 | Missat
röstsamtal/videosamtal | Ubesvaret taleopkald/videoopkald | Tapt taleanrop/videoanrop | Vastaamaton
äänipuhelu/videopuhelu | Propušteni glasovni poziv | Propušteni videopoziv | Trucada de veu perduda

media:
Media/image/video/audio/sticker/GIF/document omitted | Contact card omitted | video note omitted |
View once voice message omitted | null | Medien ausgeschlossen/weggelassen |
Bild/Video/Audio/Sticker/GIF/Dokument weggelassen | Kontaktkarte ausgelassen |
Multimedia/Archivo/Video/audio/sticker/GIF/documento/vídeo omitido | imagen/Mídia/figurinha omitida
| Tarjeta de contacto omitida | Médias/Fichier/audio/sticker omis | image/vidéo absente | GIF
retiré | GIF esclusa | document manquant | Fiche contact manquante | Media omessi/omesso | Media
disingkirkan | immagine omessa | video/audio/documento omesso | sticker non incluso | Scheda
contatto omessa | Mídia oculta | Arquivo de mídia oculto | Ficheiro/vídeo/sticker/Contacto não
revelado | imagem ocultada | imagem/GIF não revelada | áudio ocultado | ficheiro de áudio não
revelado | Cartão do contato omitido | Без медиафайлов | Файл пропущен | Медіа пропущено |
Pominięto multimedia | Média vynechány | Médiá vynechané | Conținut media omis | Hiányzó médiafájl
| Εξαίρεση πολυμέσων | Medya atlanmış | המדיה לא נכללה | המדיה הוסרה | تم استبعاد الوسائط | لم يتم
إدراج الصورة/الفيديوهات/المستند | لم يتم إدراج المقاطع الصوتية | تم حذف الملصقات | لم يتم إدراج
صورة GIF | لم يتم إدراج بطاقة جهة اتصال | میڈیا چھوڑ دیا گیا | मीडिया के बिना | मीडिया वगळले |
মিডিয়া বাদ দেওয়া হয়েছে | મીડિયા અવગણાયું | Bỏ qua Media | สื่อถูกลบ | 省略多媒体文件 |
忽略多媒體檔 | メディアは含まれていません | 미디어 파일을 생략한 대화내용 | 미디어 파일 제외됨 |
Media har utelämnats | Mediefil udeladt | Uten vedlegg | Media jätetty pois | Medijski zapis
izostavljen | Media weggelaten | Medya dahil edilmedi | מדיה הושמטה | Media tidak disertakan |
afbeelding weggelaten | video weggelaten | audio weggelaten | sticker weggelaten | GIF weggelaten |
document weggelaten | Visitekaartje weggelaten | изображение отсутствует | видео отсутствует |
аудиофайл отсутствует | аудио отсутствует | стикер не добавлен | GIF отсутствует | документ
отсутствует | Карточка контакта отсутствует | зображення відсутнє | відео відсутнє | аудіо відсутнє
| Наклейку не додано | pliki pominięto | obraz pominięty | wideo pominięte | audio pominięte |
pominięto naklejkę | Plik GIF pominięty | dokument pominięty | Média vynechána | obrázek vynechán |
video vynecháno | zvukový soubor vynechán | nálepka vynechána | obrázok vynechaný | video vynechané
| Imagine omisă | clip video omis | kép küldése sikertelen | Videó kihagyva | εικόνα παραλείφθηκε |
βίντεο παραλείφθηκε | ήχος παραλείφθηκε | görüntü dahil edilmedi | video dahil edilmedi | ses dahil
edilmedi | Çıkartma dahil edilmedi | GIF dahil edilmedi | belge dahil edilmedi | Kişi kartı dahil
edilmedi | התמונה הושמטה | סרטון הווידאו הושמט | קטע קול הושמט | סטיקר הושמט | GIF הושמט | מסמך
הושמט | כרטיס איש קשר הושמט | تصویر حذف شد | ویدیو حذف شد | صدا حذف شد | استیکر حذف شد | फ़ोटो हटाई
गई | वीडियो छोड़ा गया | ऑडियो हटाई गयी | स्टिकर छोड़ा गया | gambar tidak disertakan | video tidak
disertakan | audio tidak disertakan | stiker tidak disertakan | imej tidak dimasukkan | đã bỏ qua
hình ảnh | đã bỏ video | đã bỏ sticker | ไม่มีรูปภาพ | วิดีโอถูกลบ | ไม่มีสติกเกอร์ | 圖片已略去 |
圖像已省略 | 照片已忽略 | 影片已略去 | 视频已忽略 | 音訊已略去 | 音频已忽略 | 貼圖已略去 |
贴图已省略 | 画像は含まれていません | ビデオは含まれていません | 音声は含まれていません |
スタンプは含まれていません | 이미지 생략됨 | 비디오 생략됨 | 오디오 생략됨 | 스티커 제외됨 | bild
utesluten | video utesluten | billede udeladt | video udeladt | bilde ikke inkludert | video
utelatt | ei kuvaa | slika izostavljena | Без файл | Imatge omesa | Mitjans omesos | Media imerukwa
| Media weggelaat

location:
live location shared | Live-Standort wird geteilt | ubicación en tiempo real compartida |
Localisation en direct partagée | posizione attuale condivisa | localização atual compartilhada |
live locatie gedeeld | Геоданные отправлены | udostępniona transmisja położenia | Mevcut konum
paylaşıldı | משתף מיקום בשידור חי | تمت مشاركة الموقع المباشر | Lokasi terkini dibagikan

app:
Reacted to your message | Liked a message | Audio/Video call ended | You missed a call | You
missed a video call | You sent an attachment | You left the group | Hat mit auf deine Nachricht
reagiert | Gefällt eine Nachricht | Reaccionó con a tu mensaje | Le gustó un mensaje | Indicó que
le gusta un mensaje | A réagi avec à votre message | A réagi à votre message | A aimé un message |
Ha reagito con al tuo messaggio | Ha messo mi piace a un messaggio | Reagiu com à sua mensagem |
Curtiu uma mensagem | Heeft gereageerd op je bericht | Vond een bericht leuk | Waiting for this
message. This may take a while | Warte auf diese Nachricht. Dies kann etwas dauern | Warten auf
diese Nachricht | Esperando este mensaje. Esto puede tomar tiempo | Esperando el mensaje. Esto
puede tardar un tiempo | En attente de ce message. Cela peut prendre du temps | In attesa del
messaggio. Potrebbe volerci qualche minuto | Aguardando mensagem. Essa ação pode levar alguns
instantes | Wachten op dit bericht. Dit kan even duren

tag:
This message was edited | Diese Nachricht wurde bearbeitet | Se editó este mensaje | Ce message a
été modifié | Questo messaggio è stato modificato | Mensagem editada | Dit bericht is bewerkt |
Данное сообщение изменено | Bu mesaj düzenlendi | تم تعديل هذه الرسالة | Pesan ini diedit | यह
मैसेज एडिट किया गया | file attached | Datei angehängt | archivo adjunto | fichier joint | file
allegato | arquivo/ficheiro anexado | bestand bijgevoegd | файл добавлен | dosya ekli | الملف مرفق
| file terlampir | फाइल अटैच कर दी गई है | Este mensaje fue editado | Esta mensagem foi editada |
Сообщение изменено | Це повідомлення було відредаговано | Ta wiadomość została zmieniona | Tato
zpráva byla upravena | ההודעה נערכה | 此訊息已編輯 | 这条消息已编辑 |
このメッセージは編集されました | 수정된 메시지입니다 | Meddelandet har redigerats | Beskeden blev
redigeret | Viestiä muokattiin | archivo adjuntado | файл додано | plik załączony | załączony plik
| soubor byl přiložen | súbor pripojený | fișier atașat | fájl csatolva | συνημμένο αρχείο | קובץ
מצורף | پیوست شد | پیوستہ فائل | फाइल संलग्न | ফাইল সংযুক্ত হয়েছে | ફાઇલ જોડાયેલ | fail
dilampirkan | tệp đính kèm | ไฟล์ที่แนบ | 附件檔案 | 文件附件 | 添付ファイル有り | 파일 첨부됨 |
bifogad fil | fil vedhæftet | vedlagt fil | liitetiedosto | datoteka u privitku | priložena
datoteka | прикачен файл | прикачена датотека | arxiu adjunt | faili limeambatanishwa | lêer
aangeheg
"""
SENTENCES = {}  # "this message was deleted" → "deleted"
for block in TABLE.strip().split("\n\n"):
    kind, _, sentences = block.partition(":\n")
    for sentence in sentences.replace("\n", " ").split("|"):
        for words in itertools.product(*(word.split("/") for word in sentence.split())):
            SENTENCES[plain(" ".join(words))] = kind


if __name__ == "__main__":
    try:
        main()
        print(end="", flush=True)
    except BrokenPipeError:  # what reads the output has enough, as in "| head -1"
        os._exit(0)
    except OSError as e:
        fix = "make it accessible, free space on its disk, or move away what stands in its place"
        fail(f"{e.filename or RAW}: {e.strerror}", fix)
