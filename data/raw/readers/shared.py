"""What the readers share: the shape of a message, values of JSON, the apps' own sentences."""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

INVISIBLE = re.compile(  # control characters and marks; not what joins the parts of an emoji
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffc]"
)
NAMES = "display_name", "displayName", "real_name", "name", "username", "user_id"
TEXTS = "text", "body", *NAMES  # the first of these keys that a value has is its text
SAMPLE = 2000  # so many lines or entries tell which app wrote a file


class Message(NamedTuple):
    """What one person said, or what is to be left out; the values are still the app's."""

    time: object
    author: object
    text: object
    kind: str = ""  # of from_export.KINDS, if it is not what one person said to another
    conversation: object = ""  # if the file holds several


def first(**tests):
    """Return the first name that is true: with app=0, bot=1, call=1 it is "bot"."""
    return next((name for name, true in tests.items() if true), "")


def sample(items):
    """Return at most SAMPLE of the items of a list, evenly from all of the file."""
    return items[:: len(items) // SAMPLE + 1]


def share(items, test):
    """Return the share of entries or lines for which a test is true; empty lines do not count."""
    results = [bool(test(item)) for item in sample(items) if item]
    return sum(results) / max(len(results), 1)


def dig(value, *keys):
    """Return value[key][key]…, or None where something on the way is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def text_of(value):
    """Return the text of a JSON value: None → "", 7 → "7", parts or keys → their text."""
    if isinstance(value, list):
        return "".join(text_of(part) for part in value)
    if isinstance(value, dict):
        return next((text_of(value[key]) for key in TEXTS if value.get(key)), "")
    return "" if value is None or isinstance(value, bool) else str(value)


def blocks(lines, header):
    r"""Yield (match, words): a line with a header begins a message, the others go on.

    ["10:44 Ann: one", "two", "10:45 Bob: ok"] → (match of "10:44 ", "Ann: one\ntwo"), …
    """
    start, words = None, []
    for line in lines:
        if found := header(line):
            if start:
                yield start, "\n".join(words).strip()
            start, words = found, [line[found.end() :]]
        elif start:
            words.append(line)
    if start:
        yield start, "\n".join(words).strip()


def plain(sentence):
    r"""Return a sentence as it is looked up: "\u200e<Media omitted>." → "media omitted"."""
    return INVISIBLE.sub("", sentence).strip(" \n<>").rstrip(".。।").casefold()


PHRASES = json.loads(Path(__file__).with_name("phrases.json").read_text("utf-8"))


@functools.cache
def sentences_of(app):
    """Return an app's {sentence: kind}, and {kind: pattern} of its sentences with a gap, "…"."""
    exact, patterns = {}, {}
    for kind, languages in PHRASES[app].items():
        sentences = [plain(sentence) for each in languages.values() for sentence in each]
        exact |= {sentence: kind for sentence in sentences if "…" not in sentence}
        gaps = [re.escape(sentence) for sentence in sentences if "…" in sentence]
        if gaps:
            patterns[kind] = re.compile("|".join(gaps).replace("…", ".{1,100}"))
    return exact, patterns


def kind_of_sentence(text, app):
    """Return the kind of a text that an app wrote from beginning to end, or ""."""
    exact, patterns = sentences_of(app)
    text = plain(text)
    found = (kind for kind, pattern in patterns.items() if pattern.fullmatch(text))
    return exact.get(text) or next(found, "")
