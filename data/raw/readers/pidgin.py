"""Pidgin, in ~/.purple/logs: a file for each talk; the first line has the day.

The first line, a message and a notice:

    Conversation with ann@jabber.org at Mon 23 Nov 2026 10:30:01 AM CET on bob@jabber.org (jabber)
    (10:30:01 AM) ann: are you coming?
    (10:31:01 AM) ann has signed off.
"""

import re

from .shared import Message, blocks
from .times import stamp_of, time_of

APP = "Pidgin"
FIRST = re.compile(r"Conversation with (\S+) at (.+) on \S+ \(\w+\)")
STAMP = re.compile(r"\((\d[^()]{4,30})\) ")
AUTHOR = re.compile(r"([^\n:]{1,100}): ?")


def understands(file):
    return bool(FIRST.match(next(iter(file.lines), "")))


def read(file):
    name, when = FIRST.match(file.lines[0]).groups()
    day = time_of(stamp_of(when), "mdy")
    for start, words in blocks(file.lines[1:], STAMP.match):
        author = AUTHOR.match(words)
        has_day = re.search(r"\d\D\d+\D\d{4}", start[1])  # when it goes on after midnight
        time = start[1] if has_day else f"{day:%Y-%m-%d} {start[1]}"
        if author:
            who = author[1].partition("/")[0]  # without the device
            yield Message(time, who, words[author.end() :], conversation=name)
        else:
            yield Message(time, "", words, "app", name)
