"""iMessage, as imessage-exporter writes it (imessage-exporter -f txt): a file for each chat.

A message, and what was tapped on it:

    Nov 24, 2026 10:44:25 AM (Read by you after 5 seconds)
    Ann Lee
    are you there?
    Tapbacks:
    Loved by Me
"""

import re

from .shared import Message, blocks

APP = "iMessage"
DATE = re.compile(r"([A-Z][a-z]{2} \d\d, \d{4} +\d\d?:\d\d:\d\d [AP]M) *(?:\(.*)?(.*)")
TAPBACKS = re.compile(r"(?m)^(?:Tapbacks|Reactions):$")
EDITS = re.compile(r"(?ms)\A.*^Edited [^\n]{1,60}? later: ")
NOT_SAID = re.compile(
    r"(?m)^(?:    |This message (?:responded to an earlier|was deleted)|Sent with "
    r"|Attachment missing!|(?:\w+ )?Sticker from |/.*/Attachments/|attachments/).*\n?"
)


def understands(file):
    return any(DATE.match(line) for line in file.lines[:50])


def read(file):
    for start, block in blocks(file.lines, DATE.match):
        when, note = start.groups()
        author, _, words = block.partition("\n")
        words = TAPBACKS.split(words)[0]
        words = EDITS.sub("", words)  # the last version
        if note:
            yield Message(when, "", note, "app")
        else:
            yield Message(when, author, NOT_SAID.sub("", words))
