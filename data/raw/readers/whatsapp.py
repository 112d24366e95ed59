"""WhatsApp: "Export chat", without media; a .txt or a .zip, in the language of the phone.

Also as WhatsApp Chat Exporter makes it of a backup (wtsexporter --txt).

Messages:

    24/11/26, 10:44 - Ann: hi               Android
    [24/11/26, 10:44:25] Ann: hi            iPhone
    24/11/26, 10:44:25 PM: Ann: hi          old iPhone
    10:44, 24/11/26 - Ann: hi               in Vietnam
    [2026-11-24 10:44] Ann: <media file in WhatsApp/Media/IMG-1.jpg>
                            look            WhatsApp Chat Exporter
"""

import re
from collections import Counter

from .shared import Message, blocks, kind_of_sentence, sample
from .times import CLOCK, DAY, MARK, NAMED_DAY

APP = "WhatsApp"
DATE = rf"(?:{DAY}|{NAMED_DAY})"
START = re.compile(rf"{MARK}{{0,3}}\[?{MARK}?(?:{DATE}\D{{1,20}}?{CLOCK}|{CLOCK}\D{{1,3}}{DATE})")
ENTRY = re.compile(
    rf"{MARK}{{0,3}}(?P<iphone>\[)?{MARK}?"
    rf"(?P<when>{DATE}\D{{1,20}}?{CLOCK}[^]\d:;,]{{0,24}}?|{CLOCK}\D{{1,3}}{DATE})"
    r"(?(iphone)\]|(?:\s[-\u2013]|(?:(?<=\d)|(?<=\s[AaPp][Mm])):))(?:\s|$)"
)
LONG_YEAR = re.compile(r"[-/.]\s?\d{4}|\d{4}\s?[-/.年년]")
AUTHOR = re.compile(r"([^\n]{1,100}?)\s?:(?:\s|$)")
LOCATION = re.compile(r"[^:]{1,90}: https://(?:maps\.google\.com/\?q=|foursquare\.com/v/)\S+")
POLL = re.compile(  # POLL:\nWhen?\nOPTION: Today (2 votes)\nOPTION: Later (1 vote)
    r"\W?[^\W\d_]{2,20} ?:\n(?s:.+?)\n\W?([^\W\d_]{2,20} ?:).*\(\W?\d+ [^()\n]+\)"
    r"(?:\n\W?\1.*\(\W?\d+ [^()\n]+\))+"
)
FILE_NAME = re.compile(r"[^\n]{1,200}\.(pdf|docx?|xlsx?|pptx?|zip|jpe?g|png|mp[34]|opus|vcf|webp)")
MARKED_TAG = re.compile(
    r"[\u200e\u200f]<[^<>]*>|<[^<>\n:]{2,30}: ?\d{8}-[^<>\n]*>"
    r"|<media file in [^<>\n]*>|<The media is missing>"  # of WhatsApp Chat Exporter
)
ALIGNED = re.compile(r"\n {20,}")  # its lines below the first
TAGS = (  # what may be the app's in a message, and its words
    re.compile(r"\A.{1,200}\.\w{0,5} [(<]([^()<>\n]{3,40})[)>](?=\n|\Z)"),  # a.jpg (file attached)
    re.compile(r'\A<([^<>\n\d/="]{3,60})>(?=\n|\Z)'),  # <Media omitted>
    re.compile(r'<([^<>\n\d/="]{3,60})>\Z'),  # ok <This message was edited>
    re.compile(r"\u200e([^\u200e\n<>]{3,60})\Z"),  # look, and then "image omitted"
)


def understands(file):
    """Return the share of the lines with a date that begin a message; somebody must speak."""
    dated = [line for line in sample(file.lines) if START.match(line)]
    starts = [start for line in dated if (start := ENTRY.match(line))]
    has_authors = any(author_and_words(start.string[start.end() :])[0] for start in starts)
    return has_authors and len(starts) / len(dated)


def form_of(start):
    """Return how the messages of an export begin: with "[", with ",", with "/", with "2026"."""
    return *(mark in start[0] for mark in "[,/"), bool(LONG_YEAR.search(start[0]))


def read(file):
    """Yield the messages; what the app put around somebody's words is taken off."""
    entries = [
        (start["when"], bool(start["iphone"]), *author_and_words(text))
        for start, text in blocks(file.lines, begins_in(file))
    ]
    counts = Counter(tag for *_, words in entries for tag in tags_in(words))
    tags = {tag for tag, count in counts.items() if count >= 3}  # in whatever language
    has_marks = any("\u200e" in line for line in file.lines)  # editors strip them
    for when, is_iphone, author, words in entries:
        words, kind = without_tags(words, is_iphone, tags)
        if author and is_iphone and not has_marks:
            kind = kind or kind_of_sentence(words.replace(author, "Ann"), "WhatsApp without marks")
        yield Message(when, author, ALIGNED.sub("\n", words), kind if author else "app")


def begins_in(file):
    """Return ENTRY.match for the form of this export: other dates stand in somebody's words."""
    forms = Counter(form_of(start) for line in sample(file.lines) if (start := ENTRY.match(line)))
    most = max(forms.values())
    of_app = {form for form, count in forms.items() if count >= min(20, most)}
    return lambda line: (start := ENTRY.match(line)) and (form_of(start) in of_app and start)


def author_and_words(text):
    """Return the parts of "Ann: hi" → ("Ann", "hi"); the notices of the app have no author."""
    found = AUTHOR.match(text)
    # subtle: 'Ann named the group "a: b"' is a notice; nobody's name has one quotation mark
    if not found or len(re.findall('["“”„«»]', found[1])) % 2:
        return "", text
    return found[1], text[found.end() :]


def tags_in(text):
    """Return what in a message may be the app's: "<Media omitted>" → {"Media omitted"}."""
    tags = {found[1] for tag in TAGS if (found := tag.search(text))}
    return {tag for tag in tags if " " in tag or not tag.isascii()}  # no <div>, no <grin>


def without_tags(text, is_iphone, tags):
    r"""Return (what the author wrote, kind).

    "IMG-1.jpg (file attached)\nlook" → ("look", ""), "image omitted" → ("image omitted", "media")
    """
    if kind := kind_of(text):
        return text, kind
    words = MARKED_TAG.sub("", text).strip()
    if "• \u200e" in text:  # "report.pdf • 12 pages"
        return text, "media"
    if is_iphone and text.startswith(("\u200e", "\u200f")):  # before all that is not a person's
        return text, "app" if words else "media"
    for tag in TAGS:
        found = tag.search(words)
        if found and (found[1] in tags or kind_of_sentence(found[1], APP)):
            words = (words[: found.start()] + words[found.end() :]).strip()
            words = "" if FILE_NAME.fullmatch(words) else words
    return words, ""


def kind_of(text):
    """Return the kind of a message that the app wrote from beginning to end, or ""."""
    if LOCATION.fullmatch(text):
        return "location"
    if text.count("\n") < 30 and POLL.fullmatch(text):  # a poll has 12 options at most
        return "poll"
    kind = kind_of_sentence(text, APP)
    return "" if kind == "tag" else kind
