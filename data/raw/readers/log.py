"""Logs of IRC and Twitch: a message a line; the day stands in lines of its own, if at all.

Messages, and a line with the day:

    [10:44] <@ann> hi                       mIRC, irssi, HexChat; also with the day before
    2026-11-24 10:44:25 [tab] @ann [tab] hi WeeChat
    [10:44:25] ann: hi                      Chatty
    --- Day changed Tue Nov 24 2026
"""

import contextlib
import re
from datetime import datetime, timedelta
from pathlib import Path

from dateutil import parser as date_parser

from .shared import Message

APP = "log"
CLOCK = r"\[?(?P<hours>\d\d?):(?P<minutes>\d\d)(?::(?P<seconds>\d\d))?\]?\s+"
STAMP = rf"\[?(?:(?P<day>\d{{4}}-\d\d-\d\d|[A-Z][a-z]{{2}} [ \d]\d)[T ])?{CLOCK}"
LINES = (
    re.compile(STAMP + r"<[\s@+%&~!]{0,3}(?P<nick>[^>\s]{1,60})>\s?(?P<words>.*)"),
    re.compile(STAMP + r"[@+%&~]?(?P<nick>[\w\[\]\\`^{|}-]*\w)\t(?P<words>.*)"),
    # Chatty's; with a day it would be WhatsApp's
    re.compile(CLOCK + r"(?P<nick>[^\s:<>]{1,60}):\s(?P<words>.*)"),
)
DAY = re.compile(r"(?:#|---|\*\*\*\*|Session ).*\b(?:19|20)\d\d\b.*")


def understands(file):
    return any(parts_of(line) for line in file.lines[:50])


def read(file):
    last = day_in(Path(file.name).stem, datetime(1970, 1, 1))
    for line in filter(str.strip, file.lines):
        if parts := parts_of(line):
            clock = {unit: int(parts[unit] or 0) for unit in ("hours", "minutes", "seconds")}
            now = day_in(parts["day"], last) + timedelta(**clock)
            if now < last - timedelta(minutes=1) and not parts["day"]:  # past midnight
                now += timedelta(days=1)
            last = now
            yield Message(now, parts["nick"], parts["words"])
        else:
            last = day_in(line, last) if DAY.match(line) else last
            yield Message(last, "", line, "app")


def parts_of(line):
    """Return the parts of what a nick said, {"nick": "ann", "words": "hi", …}, else None."""
    for form in LINES:
        if found := form.match(line):
            return {"day": ""} | found.groupdict("")
    return None


def day_in(text, otherwise):
    """Return the midnight of the day in a text, as in "--- Day changed Tue Jan 02 2024"."""
    when = otherwise
    with contextlib.suppress(ValueError, OverflowError):
        if re.search(r"(19|20)\d\d-\d\d-\d\d|\b[A-Z][a-z]{2} [ \d]\d\b", text):
            when = date_parser.parse(text.strip("#-* "), fuzzy=True, default=otherwise)
    return when.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
