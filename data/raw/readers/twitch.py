"""Twitch, as TwitchDownloader writes a chat: JSON, or text with the time in UTC.

A message in either:

    {"comments": [{"created_at": "2026-11-24T10:44:25Z", "content_offset_seconds": 65,
       "commenter": {"display_name": "Ann"}, "message": {"body": "hi"}}]}
    [2026-11-24 10:44:25 UTC] Ann: hi
"""

import re

from .shared import Message, blocks, dig, first, share

APP = "Twitch"
LINE = re.compile(r"\[(\S+ \S+ UTC)\] ([^:]{1,60}): ")


def understands(file):
    return share(file.entries, {"commenter", "message"}.issubset) or share(file.lines, LINE.match)


def read(file):
    for start, words in blocks(file.lines, LINE.match):
        yield Message(start[1], start[2], words)
    for m in file.entries:
        yield Message(
            time=m.get("created_at") or m.get("content_offset_seconds"),  # of the video
            author=m.get("commenter"),
            text=m.get("message"),
            kind=first(app=dig(m, "message", "user_notice_params", "msg-id")),
        )
