r"""Instagram and Messenger: "Download your information", format JSON; also encrypted chats.

A message in message_1.json, with UTF-8 written as if it were Latin-1, and one of Messenger's
encrypted chats:

    {"participants": [{"name": "Zo\u00c3\u00ab"}], "title": "Zo\u00c3\u00ab", "messages": [
      {"sender_name": "Zo\u00c3\u00ab", "timestamp_ms": 1795513440000, "content": "hi"}]}
    {"participants": ["Zoë"], "threadName": "Zoë_12", "messages": [
      {"senderName": "Zoë", "timestamp": 1795513440000, "text": "hi", "type": "text"}]}
"""

import re

from .shared import Message, first, kind_of_sentence, share, text_of

APP = "Instagram or Messenger"


def understands(file):
    if not {"participants", "messages"} <= file.keys:
        return 0
    known = share(file.entries, lambda m: "sender_name" in m or "senderName" in m)
    return known or not file.data["messages"]


def read(file):
    title = text_of(file.data.get("title"))
    title = title or re.sub(r"_\d+$", "", text_of(file.data.get("threadName")))
    for m in file.entries:
        author = text_of(m.get("sender_name") or m.get("senderName"))
        text = text_of(m.get("content") or m.get("text"))
        yield Message(
            time=m.get("timestamp_ms") or m.get("timestamp"),
            author=author,
            text=text,
            kind=first(
                deleted=m.get("is_unsent") or m.get("isUnsent"),
                call="call_duration" in m or m.get("type") == "Call",
                app=m.get("type") in ("Subscribe", "Unsubscribe", "placeholder")
                or kind_of_sentence(without_emoji(text), "Meta")
                or (text.startswith(f"{author} ") and text.endswith(".")),
            ),
            conversation=title,
        )


def without_emoji(text):
    """Return "Reacted to your message" of "Reacted 😂 to your message"."""
    return re.sub(r"[^\w\s]+ ", "", text)
