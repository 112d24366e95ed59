"""Times, as any app in any country writes them → datetime."""

import itertools
import re
import warnings
from datetime import UTC, datetime

from dateutil import parser as date_parser

warnings.filterwarnings("ignore", category=date_parser.UnknownTimezoneWarning)

ORDERS = {"dmy": (2, 1, 0), "mdy": (2, 0, 1), "ymd": (0, 1, 2)}  # where year, month and day stand
MARK = "[\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"  # invisible: which way to write
DAY = rf"(\d{{1,4}}){MARK}?\s?[-./年년]{MARK}?\s?(\d\d?){MARK}?\s?[-./月월]{MARK}?\s?(\d{{1,4}})"
CLOCK = r"(\d\d?)[:.](\d\d)(?:[:.](\d\d))?"
MORNING = r"(am|午前|上午|早上|凌晨|오전|ص|πμ|morning|mañana|madrugada)$"
AFTERNOON = r"(pm|午後|下午|中午|오후|م|μμ|afternoon|evening|noon|tarde)$"
NIGHT = r"(atnight|noche|noite|晚上)$"  # 9 at night is 21, and 3 at night is 3


def read_times(texts, order=None):
    """Return ([datetime or None], note); the order of day and month is found by all dates.

    ["1/2/26, 9:44 PM", "13/2/26, 9:44 PM"] → the 1st and the 13th of February, at 21:44
    """
    stamps = {text: stamp_of(text) for text in dict.fromkeys(texts)}
    dates = list(dict.fromkeys(s[:3] for s in stamps.values() if isinstance(s, tuple)))
    note = ""
    if dates and not order:
        faults = {each: faults_of(dates, each) for each in ORDERS}
        order = min(faults, key=faults.get)
        if order != "ymd" and faults["dmy"] == faults["mdy"]:
            order, other = "dmy", "mdy"  # capitals are how American phones write it
            if re.search("[AP]M", texts[0]):
                order, other = other, order
            note = f"dates are read as {order}, for nothing decides: else --dates {other}"
    times = {text: time_of(stamp, order) for text, stamp in stamps.items()}
    return [times[text] for text in texts], note


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
