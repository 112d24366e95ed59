"""What languages call months and parts of a day ("AM", "de la noche", "下午"), as CLDR has it."""

import functools
import itertools
import re
from typing import NamedTuple

from babel import Locale

LANGUAGES = (  # the first of those that know as many words is taken
    "en de es fr it pt nl ru uk pl cs sk ro hu el tr he ar fa ur hi mr bn gu ta te id ms vi th "
    "zh zh_Hant ja ko sv da nb fi hr sr bg ca sw af et lv lt sl gl fil sq az kk ka hy"
)
NO_HOURS = frozenset()


class Words(NamedTuple):
    """What a language calls months and parts of the day: {"november": 11}, {"pm": {12, …, 23}}."""

    known: set
    months: dict
    parts: dict


def words_in(text):
    """Return the words of a text, only letters: "24 de Nov., 10:44 a. m." → de, nov, a, m."""
    return [word for part in re.split(r"[\s\d.,:;/-]+", text) if (word := letters(part))]


def letters(text):
    return re.sub(r"[\W\d_]", "", text.casefold())


@functools.cache
def words_of(language):
    locale = Locale.parse(language)
    hours = hours_of_parts(locale)
    names, months, parts = [], {}, {}
    for form, width in itertools.product(("format", "stand-alone"), ("wide", "abbreviated")):
        day_parts = locale.day_periods.get(form, {}).get(width, {})
        for number, name in locale.months[form][width].items():
            months[letters(name)] = number
        for part, name in day_parts.items():  # 오후 is "pm" and "afternoon1"
            parts[letters(name)] = parts.get(letters(name), NO_HOURS) | hours.get(part, NO_HOURS)
        names += locale.months[form][width].values()
        names += locale.days[form][width].values()
        names += day_parts.values()
    return Words({word for name in names for word in words_in(name)}, months, parts)


def hours_of_parts(locale):
    """Return {"am": {0, …, 11}, "night1": {21, …}} as CLDR has it; a night lasts until 6."""
    hours = {"am": frozenset(range(12)), "pm": frozenset(range(12, 24))}
    for part, (rule, *_) in locale.day_period_rules.get(None, {}).items():
        start, end = (rule.get(key, rule.get("at", 0)) // 3600 for key in ("from", "before"))
        end += 24 if end < start else 0
        night = range(6) if "night" in part else ()
        hours[part] = frozenset([*range(start, max(end, start + 1)), *night])
    return hours


def language_of(texts):
    """Return the language whose names of months, days and parts of the day are in most times."""
    words = {word for text in texts[:2000] for word in words_in(text)}
    if words <= words_of("en").known:
        return "en"
    return max(LANGUAGES.split(), key=lambda language: len(words & words_of(language).known))


@functools.cache
def part_of_day(before, after, language):
    """Return the hours of the part of the day beside a clock, an empty set if none is named."""
    parts = words_of("en").parts | words_of(language).parts
    before, after = words_in(before), words_in(after)
    for length in range(4, 0, -1):
        for name in "".join(before[-length:]), "".join(after[:length]):
            if name in parts:
                return parts[name]
    last = before[-1] if before else ""  # no spaces between words: 星期二上午
    ends = (parts[name] for name in parts if not name.isascii() and last.endswith(name))
    return next(ends, NO_HOURS)
