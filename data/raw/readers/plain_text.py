"""Any text in which a message begins with a day, a clock, a name and a colon.

Messages of three programs:

    2026-11-23 10:30:01 Ann: are you coming?
    01.04.2015 - 16:00:27; Ann: are you coming?
    2026년 11월 23일 오전 9:00, Ann : are you coming?
"""

import re

from .shared import Message, blocks, sample, share
from .times import CLOCK, DAY

APP = "text with names"
WHEN = rf"\[?{DAY}\D{{1,20}}?{CLOCK}(?:\s?[AaPp]\.?[Mm]\.?)?\]?"
DATED = re.compile(WHEN)
LINE = re.compile(rf"(?P<when>{WHEN})[;,]?\s(?:- )?(?P<author>[^\s:;][^\n:;]{{0,60}}?)\s?:(?:\s|$)")


def understands(file):
    """Return the share of the lines with a day that name somebody."""
    return share([line for line in sample(file.lines) if DATED.match(line)], LINE.match)


def read(file):
    for start, words in blocks(file.lines, LINE.match):
        yield Message(start["when"], start["author"], words)
