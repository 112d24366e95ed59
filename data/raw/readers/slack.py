"""Slack: "Export data" of the workspace; a folder for each channel, a file for each day.

A message, who U12 is, in users.json, and what C5 is, in channels.json:

    [{"type": "message", "user": "U12", "ts": "1795513440.0001", "text": "you &amp; <@U34>"}]
    [{"id": "U12", "profile": {"display_name": "Ann"}}]
    [{"id": "C5", "name": "cakes", "members": ["U12", "U34"]}]
"""

import html
import re

from .shared import Message, first, share, text_of

APP = "Slack"
OF_PEOPLE = None, "thread_broadcast", "me_message", "file_share"  # subtypes


def understands(file):
    return share(file.entries, {"ts", "type"}.issubset) or share(file.entries, is_name)


def is_name(entry):
    return "id" in entry and ("profile" in entry or {"name", "members"} <= entry.keys())


def read(file):
    """Yield the messages of a day; a thread is a conversation of its own.

    users.json and channels.json have names alone; from_export.py reads them before all others.
    """
    for m in file.entries:
        if is_name(m):
            file.names[m["id"]] = text_of(m.get("profile")) or text_of(m)
            continue
        yield Message(
            time=m.get("ts"),
            author=file.names.get(m.get("user")) or m.get("user_profile") or m.get("user"),
            text=as_seen(text_of(m.get("text")), file.names),
            kind=first(
                bot=m.get("bot_id") or m.get("user") == "USLACKBOT",
                app=m.get("subtype") not in OF_PEOPLE,
            ),
            conversation=f"{file.title} / {m['thread_ts']}" if m.get("thread_ts") else "",
        )


def as_seen(text, names):
    """Return what people see: "<@U12> look <https://a.b|here> &amp; go" → "@Ann look here & go"."""
    text = re.sub(r"<([@#])(\w+)[^<>]*>", lambda who: who[1] + names.get(who[2], who[2]), text)
    text = re.sub(r"<!(\w+)>", r"@\1", text)  # <!here>
    return html.unescape(re.sub(r"<(?:[^<>|]*\|)?([^<>]*)>", r"\1", text))
