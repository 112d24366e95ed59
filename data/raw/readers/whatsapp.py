"""WhatsApp: "Export chat", without media; a .txt or a .zip, in the language of the phone.

Messages, and one that the app wrote:

    24/11/26, 10:44 - Ann: hi               Android
    [24/11/26, 10:44:25] Ann: hi            iPhone
    24/11/26, 10:44:25 PM: Ann: hi          old iPhone
    10:44, 24/11/26 - Ann: hi               in Vietnam
    24/11/26, 10:45 - Bob: <Media omitted>
"""

import re
from collections import Counter

from .shared import KIND_OF_SENTENCE, Message, blocks, plain
from .times import CLOCK, DAY, MARK

APP = "WhatsApp"
ENTRY = re.compile(
    rf"{MARK}{{0,3}}(?P<iphone>\[)?{MARK}?"
    rf"(?P<when>{DAY}\D{{1,20}}?{CLOCK}[^\d\]]{{0,24}}?|{CLOCK}\D{{1,3}}{DAY})"
    r"(?(iphone)\]|(?:\s[-\u2013]|:))(?:\s|$)"
)
AUTHOR = re.compile(r"([^\n]{1,100}?)\s?:(?:\s|$)")
LOCATION = re.compile(r"[^\n:]{1,60}: https://maps\.google\.com/\?q=\S+")
POLL = re.compile(r"\W?[^\W\d_]{2,20} ?:\n(?s:.*)\(\W?\d+ [^()\n]+\)")
FILE_NAME = re.compile(r"[^\n]{1,200}\.(pdf|docx?|xlsx?|pptx?|zip|jpe?g|png|mp[34]|opus|vcf|webp)")
MARKED_TAG = re.compile(r"[\u200e\u200f]<[^<>]*>|<[^<>\n:]{2,30}: ?\d{8}-[^<>\n]*>")
TAGS = (  # what may be the app's in a message, and its words
    re.compile(r"\A.{1,200}\.\w{0,5} \(([^()\n]{3,40})\)(?=\n|\Z)"),  # IMG-1.jpg (file attached)
    re.compile(r'\A<([^<>\n\d/="]{3,60})>(?=\n|\Z)'),  # <Media omitted>
    re.compile(r'<([^<>\n\d/="]{3,60})>\Z'),  # ok <This message was edited>
    re.compile(r"\u200e([^\u200e\n<>]{3,60})\Z"),  # look, and then "image omitted"
)


def understands(file):
    return any(ENTRY.match(line) for line in file.lines[:50])


def read(file):
    """Yield the messages; what the app put around somebody's words is taken off."""
    entries = [
        (start["when"], bool(start["iphone"]), *author_and_words(text))
        for start, text in blocks(file.lines, ENTRY)
    ]
    counts = Counter(tag for *_, words in entries for tag in tags_in(words))
    tags = {tag for tag, count in counts.items() if count >= 3}  # in whatever language
    for when, is_iphone, author, words in entries:
        words, kind = without_tags(words, is_iphone, tags)
        yield Message(when, author, words, kind if author else "app")


def author_and_words(text):
    """Return the parts of "Ann: hi" → ("Ann", "hi"); the notices of the app have no author."""
    found = AUTHOR.match(text)
    # subtle: 'Ann named the group "a: b"' is a notice; nobody's name has one quotation mark
    if not found or sum(found[1].count(quote) for quote in '"“”„«»') % 2:
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
        if found and (found[1] in tags or plain(found[1]) in KIND_OF_SENTENCE):
            words = (words[: found.start()] + words[found.end() :]).strip()
            words = "" if FILE_NAME.fullmatch(words) else words
    return words, ""


def kind_of(text):
    """Return the kind of a message that the app wrote from beginning to end, or ""."""
    if LOCATION.fullmatch(text):
        return "location"
    if POLL.fullmatch(text):
        return "poll"
    kind = KIND_OF_SENTENCE.get(plain(text), "")
    return "" if kind == "tag" else kind
