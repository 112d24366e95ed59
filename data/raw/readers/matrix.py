"""Matrix, as Element writes a room: "Export chat", format JSON.

A message:

    {"room_name": "Home", "messages": [
      {"type": "m.room.message", "sender": "@ann:matrix.org", "origin_server_ts": 1795513440000,
       "content": {"msgtype": "m.text", "body": "hi"}}]}
"""

import re

from .shared import Message, dig, first, share, text_of

APP = "Matrix"


def understands(file):
    return "room_name" in file.keys and share(file.entries, {"type", "sender"}.issubset)


def read(file):
    for m in file.entries:
        content = m.get("content") or {}
        form = content.get("msgtype")
        text = text_of(content)
        if dig(content, "m.relates_to", "m.in_reply_to"):  # the quotation before the answer
            text = re.sub(r"\A(?:> .*\n)+\n", "", text)
        yield Message(
            time=m.get("origin_server_ts"),
            author=text_of(m.get("sender")).removeprefix("@").partition(":")[0],
            text=text,
            kind=first(
                app=m.get("type") != "m.room.message"
                or dig(content, "m.relates_to", "rel_type") == "m.replace",
                deleted=not content,
                bot=form == "m.notice",
                media=form not in ("m.text", "m.emote"),
            ),
            conversation=file.data["room_name"],
        )
