"""Matrix, as Element writes a room: "Export chat", format JSON.

A message, and the edit of one:

    {"room_name": "Home", "messages": [
      {"type": "m.room.message", "sender": "@ann:matrix.org", "origin_server_ts": 1795513440000,
       "event_id": "$1", "content": {"msgtype": "m.text", "body": "hu"}},
      {"type": "m.room.message", "content": {"m.new_content": {"body": "hi"},
       "m.relates_to": {"rel_type": "m.replace", "event_id": "$1"}}}]}
"""

import re

from .shared import Message, dig, first, share, text_of

APP = "Matrix"


def understands(file):
    return "room_name" in file.keys and share(file.entries, {"type", "sender"}.issubset)


def read(file):
    edited = {  # number of a message → its last version
        dig(m, "content", "m.relates_to", "event_id"): dig(m, "content", "m.new_content")
        for m in file.entries
        if is_edit(m)
    }
    for m in file.entries:
        content = m.get("content") or {}
        form = dig(content, "msgtype")
        text = text_of(edited.get(m.get("event_id")) or content)
        if dig(content, "m.relates_to", "m.in_reply_to"):  # the quotation before the answer
            text = re.sub(r"\A(?:> .*\n)+\n", "", text)
        has_caption = dig(content, "filename") not in (None, text)
        yield Message(
            time=m.get("origin_server_ts"),
            author=text_of(m.get("sender")).removeprefix("@").partition(":")[0],
            text=text,
            kind=first(
                app=m.get("type") != "m.room.message" or is_edit(m),
                deleted=not content,
                bot=form == "m.notice",
                media=form not in ("m.text", "m.emote") and not has_caption,
            ),
            conversation=file.data["room_name"],
        )


def is_edit(m):
    return dig(m, "content", "m.relates_to", "rel_type") == "m.replace"
