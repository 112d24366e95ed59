"""Google Chat: takeout.google.com; a folder with messages.json for each chat.

A message:

    {"messages": [{"creator": {"name": "Ann", "user_type": "Human"}, "text": "hi",
       "created_date": "Tuesday, November 24, 2026 at 10:44:25 AM UTC"}]}
"""

from .shared import Message, dig, first, share

APP = "Google Chat"


def understands(file):
    return share(file.entries, lambda m: "creator" in m or "message_state" in m)


def read(file):
    for m in file.entries:
        yield Message(
            time=m.get("created_date"),
            author=m.get("creator"),
            text=m.get("text"),
            kind=first(
                bot=dig(m, "creator", "user_type") == "Bot",
                deleted=m.get("message_state") == "DELETED",
            ),
        )
