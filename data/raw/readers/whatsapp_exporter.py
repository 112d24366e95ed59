"""WhatsApp, as WhatsApp Chat Exporter writes it from a backup (wtsexporter --txt).

Messages, and the second line of one:

    [2026-11-23 10:30] You: are you coming?
    [2026-11-23 10:31] Ann Lee: yes
                                 at eight
    [2026-11-23 10:32] Ann Lee: <media file in WhatsApp/Media/IMG-1.jpg>
"""

import re

from .shared import Message, blocks, share

APP = "WhatsApp Chat Exporter"
LINE = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d)\] ([^\n:]{1,100}): ?")
MEDIA = re.compile(r"\A<(?:media file in [^<>\n]*|The media is missing)>\n?")


def understands(file):
    return share([line for line in file.lines if line.startswith("[2")], LINE.match)


def read(file):
    for start, words in blocks(file.lines, LINE.match):
        words = re.sub(r"\n {20,}", "\n", words)  # lines are aligned behind the name
        yield Message(start[1], start[2], MEDIA.sub("", words))
