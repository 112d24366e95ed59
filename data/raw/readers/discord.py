"""Discord, as DiscordChatExporter writes it: format JSON.

A message:

    {"guild": {"name": "Home"}, "channel": {"name": "talk"}, "messages": [
      {"type": "Default", "timestamp": "2026-11-24T10:44:25+01:00", "content": "hi",
       "author": {"name": "ann", "isBot": false}}]}
"""

from .shared import Message, dig, first, share

APP = "Discord"


def understands(file):
    if not {"guild", "channel"} <= file.keys:
        return 0
    return share(file.entries, {"timestamp", "author"}.issubset) or not file.data.get("messages")


def read(file):
    places = dig(file.data, "guild", "name"), dig(file.data, "channel", "name")
    for m in file.entries:
        yield Message(
            time=m.get("timestamp"),
            author=m.get("author"),
            text=m.get("content"),
            kind=first(
                app=m.get("type", "Default") not in ("Default", "Reply"),
                bot=dig(m, "author", "isBot"),
                forwarded=m.get("forwardedMessage"),
                poll=m.get("poll"),
            ),
            conversation=" / ".join(filter(None, places)),
        )
