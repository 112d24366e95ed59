"""Snapchat: accounts.snapchat.com, "My Data", with JSON files; json/chat_history.json.

A message of today's files, and of those before 2023:

    {"ann_lee": [{"From": "ann_lee", "Media Type": "TEXT", "Created": "2026-11-24 10:44:25 UTC",
      "Content": "yes", "Conversation Title": null, "IsSender": false}]}
    {"Received Saved Chat History": [{"From": "ann_lee", "Media Type": "TEXT",
      "Created": "2026-11-24 10:44:25 UTC", "Text": "yes"}], "Sent Saved Chat History": […]}
"""

import re

from .shared import Message, share

APP = "Snapchat"
KINDS = {  # a type begins so; all others are media
    "TEXT": "",
    "STATUSERASED": "deleted",
    "STATUSCALL": "call",
    "STATUS": "app",
    "LOCATION": "location",
    "NONPARTICIPANTBOT": "bot",
}


def understands(file):
    return share([m for _, m in messages_in(file)], {"Media Type", "Created"}.issubset)


def messages_in(file):
    """Yield (friend, message) of all lists of the file."""
    for friend, messages in file.data.items() if file.keys else ():
        for message in messages if isinstance(messages, list) else ():
            if isinstance(message, dict):
                yield friend, message


def read(file):
    for friend, m in messages_in(file):
        old = re.fullmatch(r"(Received|Sent) .*History", friend)
        if old:
            friend = m.get("From") or m.get("To")
        yield Message(
            time=m.get("Created"),
            author="Me" if old and old[1] == "Sent" else m.get("From"),
            text=m.get("Content") or m.get("Text"),
            kind=kind_of(m["Media Type"].upper()),
            conversation=m.get("Conversation Title") or friend,
        )


def kind_of(type_):
    return next((kind for start, kind in KINDS.items() if type_.startswith(start)), "media")
