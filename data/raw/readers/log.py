"""Logs of IRC and Twitch: a message a line; the day stands in lines of its own, if at all.

Messages, and a line with the day:

    [10:44] <@ann> hi                       mIRC, irssi, HexChat, eggdrop; also with a day before
    2026-11-24 10:44:25 [tab] @ann [tab] hi WeeChat
    [10:44:25] ann: hi                      Chatty
    [24 Nov 10:44] <ann!n=ann@host> +hi     dircproxy
    --- Day changed Tue Nov 24 2026
"""

import functools
import re
from datetime import datetime, timedelta
from pathlib import Path

from .shared import Message, share
from .times import stamp_of, time_of

APP = "log"
ISO = r"\d{4}-\d\d-\d\d"
NAMED = r"[A-Z][a-z]{2} [ \d]\d|\d\d? [A-Z][a-z]{2}|[^\W\d_]+ \d\d? [^\W\d_]+ \d{4}"
CLOCK = r"(?P<hours>\d\d?):(?P<minutes>\d\d)(?::(?P<seconds>\d\d))?"
ZONE = r"(?:\.\d+)?(?:Z|(?P<east>[+-]\d\d):?\d\d| [A-Z]{3,4})?"
STAMP = rf"\[?(?:(?P<day>{ISO}|{NAMED})\]?[T ]\[?)?{CLOCK}{ZONE}\]?\s+"
FORMS = (
    re.compile(STAMP + r"<[\s@+%&~!]{0,3}(?P<nick>[^>\s!]{1,60})(?P<host>!\S+)?>\s?(?P<words>.*)"),
    re.compile(rf"(?P<day>{ISO}) {CLOCK}\t[@+%&~]?(?P<nick>[\w\[\]\\`^{{|}}-]*\w)\t(?P<words>.*)"),
    # Chatty's; with a day it would be WhatsApp's
    re.compile(rf"\[?{CLOCK}\]?\s+(?P<nick>[^\s:<>]{{1,60}}):\s(?P<words>.*)"),
)
NOTICE = re.compile(rf"{STAMP}|[-=*<>!]{{2,}}|\* ")  # "=== cy joined", "* bob waves"
DAY_LINE = re.compile(rf"(?:#|---|\*\*\*\*|Session |\[?{CLOCK}\]? ---).*\b(?:19|20)\d\d\b.*")


def understands(file):
    """Return the share of messages, notices and lines with a day; somebody must speak."""
    form = form_of(file.lines)
    is_known = lambda line: form.match(line) or NOTICE.match(line) or DAY_LINE.match(line)  # noqa: E731
    return share(file.lines, is_known) if share(file.lines, form.match) else 0


def form_of(lines):
    """Return the form in which most lines are: in a log with <ann>, "Action: …" is a notice."""
    return max(FORMS, key=lambda form: share(lines, form.match))


def read(file):
    form = form_of(file.lines)
    last = day_in(Path(file.name).stem, datetime(1970, 1, 1))
    for line in filter(str.strip, file.lines):
        if found := form.match(line):
            parts = {"day": "", "east": "", "host": ""} | found.groupdict("")
            now = day_in(parts["day"], last) + clock_of(parts)
            if now < last - timedelta(minutes=1) and not parts["day"]:  # past midnight
                now += timedelta(days=1)
            last = now
            words = parts["words"][1:] if parts["host"] else parts["words"]  # dircproxy's + or -
            yield Message(now, parts["nick"], words)
        else:
            last = day_in(line, last) if DAY_LINE.match(line) else last
            yield Message(last, "", line, "app")


def clock_of(parts):
    hours = int(parts["hours"]) - int(parts["east"] or 0)  # east of Greenwich it is later
    return timedelta(hours=hours, minutes=int(parts["minutes"]), seconds=int(parts["seconds"] or 0))


def day_in(text, otherwise):
    """Return the midnight of the day in a text, as in "--- Day changed Tue Jan 02 2024"."""
    has_year = re.search(r"\d{4}", text)
    when = named_in(text if has_year else f"{text} {otherwise.year}") or otherwise
    return datetime(when.year, when.month, when.day)


@functools.cache
def named_in(text):
    if not re.search(rf"{ISO}|\b[A-Z][a-z]{{2,8}} [ \d]\d\b|\b\d\d? ?[A-Z][a-z]{{2,8}}", text):
        return None
    return time_of(stamp_of(text.strip("#-*[] ")), "ymd")
