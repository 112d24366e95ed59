"""iMessage, as imessage-exporter writes it (imessage-exporter -f txt): a file for each chat.

A message that was edited, what was tapped on it, and a notice:

    Nov 24, 2026 10:44:25 AM (Read by you after 5 seconds)
    Ann Lee
    Nov 24, 2026 10:44:25 AM are you their?
    Edited 15 seconds later: are you there?
    Tapbacks:
    Loved by Me

    Nov 24, 2026 10:46:25 AM You renamed the conversation to Home
"""

import re

from .shared import Message, kind_of_sentence

APP = "iMessage"
DATE = re.compile(r"([A-Z][a-z]{2} \d\d, \d{4} +\d\d?:\d\d:\d\d [AP]M) *(?:\(.*)?(.*)")
EDITS = re.compile(r"(?ms)\A.*^Edited [^\n]{1,60}? later: ")
TAPBACKS = re.compile(
    r"(?m)^(?:Tapbacks|Reactions):\n(?:\S+(?: at)? by .*\n?|.*Sticker from .*\n?)*"
)
NOT_SAID = re.compile(  # an answer, which comes again below; files
    r"(?m)^(?:    |SharePlay Message\n|(?:\w+ )?Sticker from |/.*/Attachments/|attachments/"
    r"|/.*/[0-9a-f]{2}/[0-9a-f]{40}|Attachment missing!).*\n?"
)


def understands(file):
    return bool(file.lines) and bool(DATE.match(file.lines[0]))


def read(file):
    for start, lines in parts(file.lines):
        when, note = start.groups()
        if note:
            yield Message(when, "", note, "app")
            continue
        author, *lines = lines or [""]
        words = EDITS.sub("", "\n".join(lines))  # the last version
        words = NOT_SAID.sub("", TAPBACKS.sub("", words))
        said = [line for line in words.split("\n") if not kind_of_sentence(line, APP)]
        is_notice = words.strip() and not "".join(said).strip()
        if is_notice:
            yield Message(when, author, words, "app")
        else:
            yield Message(when, author, "\n".join(said))


def parts(lines):
    """Return [(match of the date, lines below)]; a date begins a message behind an empty line."""
    found, before = [], ""
    for line in lines:
        start = DATE.match(line)
        if start and not before.strip():
            found.append((start, []))
        elif found:
            found[-1][1].append(line)
        before = line
    return found
