"""Times as any app in any country writes them → datetime.

The day may stand in numbers in any order, which all times of a file tell together, or with the name
of a month in any language (cldr.py).
"""

import functools
import itertools
import re
from datetime import UTC, datetime, timedelta

from .cldr import language_of, part_of_day, words_in, words_of

ORDERS = {"dmy": (2, 1, 0), "mdy": (2, 0, 1), "ymd": (0, 1, 2)}  # where year, month and day stand
NO_YEAR = 4  # stands for it, for 29 February is a day of that year

MARK = "[\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"  # invisible: which way to write
NUMBER = r"((?:R|令和)?\d{1,4})"  # R8 is 2026, the eighth year of the emperor of Japan
DAY = rf"{NUMBER}{MARK}?\s?[-./年년]{MARK}?\s?(\d\d?){MARK}?\s?[-./月월]{MARK}?\s?{NUMBER}"
NAMED_DAY = r"(?:\d\d? [^\W\d_]{3,9}\.?|[^\W\d_]{3,9}\.? \d\d?,?)(?: \d{4})?"  # 1 Feb 2014
CLOCK = r"(\d\d?)[:.时時시]\s?(\d\d)(?:[:.분分]\s?(\d\d))?(?:\.\d+)?"
DAY_OR_NOT = re.compile(DAY)
CLOCK_OR_NOT = re.compile(CLOCK)


# ---- all times of a file -------------------------------------------------------------------------
def read_times(texts, order=None, lines=()):
    """Return ([datetime or None], note); the order of day and month is found by all dates.

    ["1/2/26, 9:44 PM", "13/2/26, 9:44 PM"] → the 1st and the 13th of February, at 21:44
    """
    different = list(dict.fromkeys(texts))
    language = language_of(different)
    stamps = {text: stamp_of(text, language) for text in different}
    dates = list(dict.fromkeys(stamp[:3] for stamp in stamps.values() if isinstance(stamp, tuple)))
    note = ""
    if dates and not order:
        order, note = order_of(dates, next(filter(DAY_OR_NOT.search, texts)), lines)
    times = {text: time_of(stamp, order) for text, stamp in stamps.items()}
    return with_years([times[text] for text in texts]), note


def order_of(dates, first_text, lines):
    """Return (order, note) for dates like (24, 11, 26); the note is empty if something decides."""
    faults = {order: faults_of(dates, order) for order in ORDERS}
    order = min(faults, key=faults.get)
    if order == "ymd" or faults["dmy"] != faults["mdy"]:
        return order, ""
    if sure := order_in_file_names(lines) or order_in_a_row(dates):
        return sure, ""
    has_zero_or_long_year = re.search(r"\b0\d\D+\d|\d{4}", DAY_OR_NOT.search(first_text)[0])
    is_american = re.search("[AP]M", first_text) and not has_zero_or_long_year
    order, other = ("mdy", "dmy") if is_american else ("dmy", "mdy")
    return order, f"dates are read as {order}, for nothing decides: else --dates {other}"


def faults_of(dates, order):
    """Return how many dates are impossible in an order, or go back in time.

    [(1, 2, 26), (1, 13, 26)]: as mdy 0, as dmy 1, for there is no month 13.
    """
    days = [day for numbers in dates if (day := time_of(numbers, order))]
    falls = sum(a > b for a, b in itertools.pairwise(days))
    rises = sum(a < b for a, b in itertools.pairwise(days))
    return len(dates) - len(days) + min(falls, rises)  # some logs run backwards


def order_in_file_names(lines):
    """Return the order in which the name of a picture is the day of its line, or None.

    "11/10/26, 10:44 - Ann: IMG-20261110-WA0001.jpg (file attached)" → "mdy"
    """
    for line in lines:
        named = re.search(r"\b[A-Z]{3,8}-(20\d\d)-?(\d\d)-?(\d\d)(?:-WA\d|-\d\d-)", line)
        written = named and DAY_OR_NOT.search(line[: named.start()])
        if written and named[2] != named[3]:
            day = datetime(*map(int, named.groups()))
            for order in "dmy", "mdy":
                if time_of(tuple(numbers_of(written)), order) == day:
                    return order
    return None


def order_in_a_row(dates):
    """Return the order in which the days follow closely, or None: 1/2 2/2 3/2 are in a row."""
    spans = {}
    for order in "dmy", "mdy":
        days = [time_of(numbers, order) for numbers in dates]
        steps = [abs(b - a) for a, b in itertools.pairwise(days) if a and b]
        spans[order] = sum(steps, timedelta())
    near, far = sorted(spans, key=spans.get)
    return near if len(dates) > 2 and 2 * spans[near] < spans[far] else None


def with_years(times):
    """Return the times with a year where the app left it out, as WhatsApp did about 2015."""
    last = max((time for time in times if time and time.year != NO_YEAR), default=None)
    year = last.year if last else 1970
    first = next((time for time in times if time and time.year == NO_YEAR), None)
    if last and first and first.replace(year=year) < last:
        year += 1
    return [time.replace(year=year) if time and time.year == NO_YEAR else time for time in times]


# ---- one time ------------------------------------------------------------------------------------
def stamp_of(text, language="en"):
    """Return (number, number, number, hour, minute, second), whichever of the first is the day.

    Or a datetime where that is clear, or None where there is no time.
    """
    if since := since_1970(text):
        return since
    try:
        when = datetime.fromisoformat(text)
        return when.astimezone(UTC).replace(tzinfo=None) if when.tzinfo else when
    except ValueError:
        if day := DAY_OR_NOT.search(text):
            rest = f"{text[: day.start()]} {text[day.end() :]}"
            return *numbers_of(day), *(clock_in(rest, language) or (0, 0, 0))
        return named_day(text, language)


def since_1970(number):
    """Return the time of so many seconds, or milli-, micro- or nanoseconds; None if it is none."""
    try:
        seconds = float(number)
        for _ in range(3):
            seconds /= 1000 if abs(seconds) > 1e11 else 1
        return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def numbers_of(day):
    """Return the three numbers of a match of DAY: "18/3/R4" → [18, 3, 2022]."""
    return [
        int(text) if text.isdecimal() else 2018 + int(text.lstrip("R令和"))
        for text in day.groups()[:3]
    ]


def named_day(text, language):
    """Return the datetime of "Tue, 24 Nov 2026 10:44:00", "2026. február 24., kedd 9:45"."""
    clock = clock_in(text, language)
    rest = re.sub(CLOCK, " ", text, count=1)
    months = words_of("en").months | words_of(language).months
    month = next((months[word] for word in words_in(rest) if word in months), 0)
    numbers = [int(number) for number in re.findall(r"\d+", rest)]
    year = next((number for number in numbers if number > 99), None)
    day, *others = [number for number in numbers if number != year] or [0]
    year = year or (2000 + others[0] if others else NO_YEAR)
    if clock and not month and not numbers:
        year, month, day = 1970, 1, 1  # only a clock
    try:
        return datetime(year, month, day, *(clock or ()))
    except ValueError:
        return None


def clock_in(text, language):
    """Return (hour, minute, second): ", 10:44 PM" → (22, 44, 0); None if there is none."""
    found = CLOCK_OR_NOT.search(text)
    if not found:
        return None
    hour, minute, second = (int(number or 0) for number in found.groups())
    hours = part_of_day(text[: found.start()], text[found.end() :], language)
    return which_hour(hour, hours), minute, second


@functools.cache
def which_hour(hour, hours):
    """Return which hour of 24 is meant: 9 in the evening → 21, 12 AM → 0, 3 at night → 3."""
    if hour > 12 or not hours:
        return hour
    apart = lambda a, b: min((a - b) % 24, (b - a) % 24)  # noqa: E731
    return min((hour % 12, hour % 12 + 12), key=lambda one: min(apart(one, h) for h in hours))


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
