"""Reddit: comments as JSON lines (Pushshift, Arctic Shift and others).

A comment:

    {"author": "ann", "body": "see &gt; below", "created_utc": 1795513440, "link_id": "t3_x"}
"""

import html

from .shared import Message, first, share, text_of

APP = "Reddit"


def understands(file):
    return share(file.entries, {"author", "body", "created_utc"}.issubset)


def read(file):
    for m in file.entries:
        text = html.unescape(text_of(m["body"]))
        is_gone = text in ("[removed]", "[deleted]")
        yield Message(
            time=m["created_utc"],
            author=m["author"],
            text=text,
            kind=first(bot=m["author"] == "AutoModerator", deleted=is_gone),
            conversation=m.get("link_id") or "",  # the post under which it stands
        )
