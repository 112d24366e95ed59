"""Discord, as DiscordChatExporter writes it: format JSON (best), CSV or TXT.

A message in each:

    {"guild": {"name": "Home"}, "channel": {"name": "talk"}, "messages": [
      {"type": "Default", "timestamp": "2026-11-24T10:44:25+01:00", "content": "hi",
       "author": {"name": "ann", "isBot": false}}]}

    AuthorID,Author,Date,Content,Attachments,Reactions
    "1001","ann","2026-11-24T10:44:25+01:00","hi","",""

    [24/11/2026 10:44] ann
    hi
"""

import re

from .shared import Message, blocks, dig, first, kind_of_sentence, share

APP = "Discord"
LINE = re.compile(r"\[(\d[^]\n]*\d:\d\d[^]\n]*)\] ([^\n:]{1,60}?)(?: \(pinned\))?$")
BESIDE = re.compile(r"(?ms)^(?:\{(?:Attachments|Embed|Stickers|Reactions|Forwarded \w+)\}|={60}).*")


def understands(file):
    if {"guild", "channel"} <= file.keys:
        return share(file.entries, {"timestamp", "author"}.issubset)
    if file.entries:
        return share(file.entries, {"AuthorID", "Author", "Date", "Content"}.issubset)
    dated = [line for line in file.lines if line.startswith("[")]
    return any(line.startswith("Guild: ") for line in file.lines[:5]) and share(dated, LINE.match)


def read(file):
    if "guild" in file.keys:
        return read_json(file)
    return read_csv(file) if file.entries else read_text(file)


def read_json(file):
    places = dig(file.data, "guild", "name"), dig(file.data, "channel", "name")
    for m in file.entries:
        yield Message(
            time=m.get("timestamp"),
            author=m.get("author"),
            text=m.get("content"),
            kind=first(
                app=m.get("type", "Default") not in ("Default", "Reply"),
                bot=dig(m, "author", "isBot"),
                forwarded=m.get("forwardedMessage"),
                poll=m.get("poll"),
            ),
            conversation=" / ".join(filter(None, places)),
        )


def read_csv(file):
    for m in file.entries:
        kind = kind_of_sentence(m["Content"], APP)
        yield Message(m["Date"], m["Author"], m["Content"], kind)


def read_text(file):
    title = " / ".join(line.partition(": ")[2] for line in file.lines[1:3])
    for start, words in blocks(file.lines, LINE.match):
        text = BESIDE.sub("", words).strip()
        kind = "forwarded" if "{Forwarded Message}" in words else kind_of_sentence(text, APP)
        yield Message(start[1], start[2], text, kind, title)
