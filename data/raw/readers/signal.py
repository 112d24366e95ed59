"""Signal, as signal-export writes it: a folder with chat.md for each chat.

A message with a quotation and a reaction to it, a sticker and a call:

    [2026-11-24 10:44:25] Me:

    > are you there?

    yes
    (- Ann: 👍 -)
    [2026-11-24 10:45:25] Ann: (( 🎉 ))
    [2026-11-24 10:46:25] Ann: Incoming voice call (accepted, 2m 3s)
"""

import re

from .shared import Message, blocks, first, kind_of_sentence, share

APP = "Signal"
LINE = re.compile(r"\[(\d{4}-\d\d-\d\d,? \d\d:\d\d\S*)\] ([^\n]{1,100}?): ?")
NOT_SAID = (
    re.compile(r"\A(?:>.*\n)+\n"),  # what is quoted
    re.compile(r"(?:\A|\n)\(- .* -\)"),  # reactions
    re.compile(r"(?:\A|\n)\(\( .* \)\)"),  # a sticker
    re.compile(r"!?\[[^][\n]*\]\([^()\n]*\)|\(\w+ not exported\)"),  # files
)


def understands(file):
    is_signal = any("] Me: " in line for line in file.lines) or file.name.endswith(".md")
    dated = [line for line in file.lines if line.startswith("[2")]
    return is_signal and share(dated, LINE.match)


def read(file):
    for start, words in blocks(file.lines, LINE.match):
        for pattern in NOT_SAID:
            words = pattern.sub("", words)
        kind = first(notes=file.title == "Note to Self") or kind_of_sentence(words, APP)
        yield Message(start[1], start[2], words, kind)
