"""From the bytes of a file to what stands in it: text, JSON or CSV."""

import contextlib
import io
import json
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from .not_read import refuse_unread
from .shared import share

READABLE = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".log", ".md", ".zip", ".xml"}
READABLE |= {".html", ".js"}  # only to say what they are
TABLES = {"message", "text", "content", "body", "msg", "contents", "strcontent", "内容"}
TABLES |= {"completion", "response", "output", "answer"}  # one of these heads a column
FOREIGN = re.compile(r"[^\x00-\x7f]+")
PICTURES = re.compile(rb' data="[^"]*"')  # in MMS; they make gigabytes of a backup
LISTS = "messages", "comments", "value"  # keys under which an app puts its messages


class File(NamedTuple):
    """What stands in a file, before it is known which app wrote it."""

    name: str  # with its path, also in a .zip
    title: str  # of the conversation, if the app writes none
    lines: list  # of the text, if it is neither JSON nor CSV
    data: object  # what its JSON or CSV holds, else None
    keys: set  # of the data, if they are one {…}
    entries: list  # what may be the messages in the data, each a {…}
    names: dict  # number of a user → name, the same for all files of a run
    notes: list  # what a person should know of it


def open_file(name, content, names):
    """Return a File of the bytes, which may be anything."""
    refuse_unread(name, content)
    content = PICTURES.sub(b"", content) if name.lower().endswith(".xml") else content
    text = decode(content).replace("\r\n", "\n").replace("\r", "\n")
    text = without_mojibake(text)
    notes = []
    data = parse_json(text)
    if data is None:
        data = parse_csv(text, notes)
    lines = text.split("\n") if data is None else []
    keys = set(data) if isinstance(data, dict) else set()
    entries = [entry for entry in messages_of(data) if isinstance(entry, dict)]
    return File(name, title_of(name), lines, data, keys, entries, names, notes)


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


# ---- bytes → text --------------------------------------------------------------------------------
def decode(content):
    """Return the text of a file in UTF-8, UTF-16 (as Excel writes it) or Windows' own letters."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    text = content.decode("utf-8-sig", "replace")
    wrong, foreign = text.count("\ufffd"), len(text) - len(text.encode("ascii", "ignore"))
    if wrong <= foreign / 10:  # a program may have cut a line within a letter
        return text
    return "\n".join(map(decode_line, content.split(b"\n")))


def decode_line(line):
    """Return the text of a line; in an old log each line may have its own encoding."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return line.decode("windows-1252", "replace")


def without_mojibake(text):
    """Return the text with "CafÃ©" as "Café", if most of its foreign letters are like that."""
    escaped = r"(?<!\\)\\u00([89a-f][0-9a-f])"  # as JSON may write them
    text = re.sub(escaped, lambda letter: chr(int(letter[1], 16)), text)
    letters = FOREIGN.findall(text[:1_000_000])
    if share(letters, lambda run: repaired(run) != run) < 1 / 2:
        return text
    return FOREIGN.sub(lambda run: repaired(run[0]), text)


def repaired(letters):
    """Return the letters that were meant: "Ã©" → "é"; what is no mojibake stays."""
    for encoding in "latin-1", "windows-1252":
        with contextlib.suppress(UnicodeError):
            return letters.encode(encoding).decode("utf-8")
    return letters


# ---- text → JSON or CSV --------------------------------------------------------------------------
def parse_json(text):
    """Return what the JSON holds (of JSON lines a list), or None if it is none."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    for parts in [text], text.split("\n"):  # one document, or one in every line
        with contextlib.suppress(ValueError):
            found = [json.loads(part) for part in parts if part.strip()]
            return found if len(found) > 1 else found[0]
    return None


def parse_csv(text, notes):
    """Return the rows of a CSV with a header as a list of {column: text}, or None if it is none."""
    header = text.partition("\n")[0]
    delimiter = max(",;\t|", key=header.count)
    names = [name.strip(' "').casefold() for name in header.split(delimiter)]
    if len(names) < 2 or not TABLES.intersection(names):
        return None
    import pandas as pd  # here, for it takes half a second and 50 MB, and few exports are CSV

    with warnings.catch_warnings(record=True, category=pd.errors.ParserWarning) as too_long:
        table = pd.read_csv(
            io.StringIO(text),
            sep=delimiter,
            dtype=str,
            keep_default_na=False,  # "NA" and "null" are words
            index_col=False,  # all rows may be longer than the header
            on_bad_lines="warn",
        )
    if too_long:
        notes.append("rows with more columns than the header are left out or cut")
    return table.fillna("").to_dict("records")


def messages_of(data):
    """Return the list of messages in the data, wherever the app put it; of one message, [it]."""
    if isinstance(data, dict):
        data = next((data[key] for key in LISTS if data.get(key)), [data])
    return data if isinstance(data, list) else []
