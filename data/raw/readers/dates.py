"""All times of a file: which number is the day, and which year it is where none is written."""

import itertools
import re
from datetime import datetime, timedelta

from .cldr import language_of
from .times import DAY, DAY_OR_NOT, NO_YEAR, ORDERS, numbers_of, stamp_of, time_of


def read_times(texts, order=None, lines=()):
    """Return ([datetime or None], note); the order of day and month is found by all dates.

    ["1/2/26, 9:44 PM", "13/2/26, 9:44 PM"] → the 1st and the 13th of February, at 21:44
    """
    language = language_of(list(dict.fromkeys(texts)))
    stamps = {text: stamp_of(text, language) for text in dict.fromkeys(texts)}
    dates = list(dict.fromkeys(s[:3] for s in stamps.values() if isinstance(s, tuple)))
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
        written = named and re.search(DAY, line[: named.start()])
        if written:
            day = datetime(*map(int, named.groups()))
            for order in "dmy", "mdy":
                if time_of(tuple(numbers_of(written)), order) == day:
                    return order if named[2] != named[3] else None
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
    """Return the times with a year where the app left it out, as old WhatsApp did for this year."""
    last = max((time for time in times if time and time.year != NO_YEAR), default=None)
    year = last.year if last else 1970
    first = next((time for time in times if time and time.year == NO_YEAR), None)
    if last and first and first.replace(year=year) < last:
        year += 1
    return [time.replace(year=year) if time and time.year == NO_YEAR else time for time in times]
