"""Signal, as signal-export writes it: a folder with chat.md for each chat.

A message, and a reaction to it:

    [2026-11-24 10:44:25] Me: are you there?
    (- Ann: 👍 -)
"""

import re

from .shared import Message, blocks, first, share

APP = "Signal"
LINE = re.compile(r"\[(\d{4}-\d\d-\d\d,? \d\d:\d\d\S*)\] ([^\n]{1,100}?): ?")
REACTIONS = re.compile(r"\n\(- .* -\) *\Z")
QUOTATION = re.compile(r"(?m)^> .*\n?")
ATTACHMENT = re.compile(r"!?\[[^][\n]*\]\([^()\n]*\)|\(\w+ not exported\)")


def understands(file):
    is_signal = any("] Me: " in line for line in file.lines) or file.name.endswith(".md")
    dated = [line for line in file.lines if line.startswith("[2")]
    return is_signal and share(dated, LINE.match)


def read(file):
    for start, words in blocks(file.lines, LINE.match):
        for pattern in REACTIONS, QUOTATION, ATTACHMENT:
            words = pattern.sub("", words)
        is_deleted = words.strip() == "(This message was deleted)"
        kind = first(notes=file.title == "Note to Self", deleted=is_deleted)
        yield Message(start[1], start[2], words, kind)
