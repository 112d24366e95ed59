"""Telegram Desktop: "Export chat history", format "Machine-readable JSON"; one chat, or all.

A message in result.json:

    {"name": "Home", "type": "private_group", "messages": [
      {"id": 7, "type": "message", "date_unixtime": "1795513440", "from": "Ann",
       "text": ["see ", {"type": "link", "text": "a.it"}]}]}
"""

from collections import Counter

from .shared import Message, first, share, text_of

APP = "Telegram"


def understands(file):
    return 1 if "chats" in file.keys else share(file.entries, is_message)


def is_message(m):
    return {"type", "text"} <= m.keys() and ("from" in m or "actor" in m)


def read(file):
    """Yield the messages of every chat; a topic of a forum is a conversation of its own."""
    chats = []
    for key in "chats", "left_chats":
        chats += file.data.get(key, {}).get("list", [])
    chats = chats or [file.data]
    people = {}  # name → number of the first one who has it
    names = Counter(chat.get("name") for chat in chats)
    for chat in chats:
        name = text_of(chat.get("name")) or file.title
        if names[chat.get("name")] > 1:  # two people of one name
            name += f" {text_of(chat.get('id'))}"
        yield from read_chat(chat, name, people)


def read_chat(chat, name, people):
    topics = {}  # number of a message → its topic
    for m in chat["messages"]:
        topic = topics.get(m.get("reply_to_message_id"))
        if m.get("action") == "topic_created":
            topic = text_of(m.get("title"))
        topics[m.get("id")] = topic
        yield Message(
            time=m.get("date_unixtime") or m.get("date"),
            author=name_of(text_of(m.get("from")), text_of(m.get("from_id")), people),
            text=m.get("text") or m.get("text_entities"),
            kind=kind_of(m, text_of(chat.get("type"))),
            conversation=f"{name} / {topic}" if topic else name,
        )


def name_of(name, number, people):
    """Return the name of a person: who has no name any more, or another's, gets the number."""
    if not number.startswith("user"):
        return name
    name = name or "Deleted Account"
    is_first = name != "Deleted Account" and people.setdefault(name, number) == number
    return name if is_first else f"{name} {number.removeprefix('user')}"


def kind_of(m, chat_type):
    """Say what a message is, if it is not what one person said to another."""
    return first(
        notes=chat_type == "saved_messages",
        bot=chat_type in ("bot_chat", "verify_codes") or "via_bot" in m,
        channel="channel" in chat_type or text_of(m.get("from_id")).startswith("channel"),
        app=m.get("type", "message") != "message",
        forwarded="forwarded_from" in m or "saved_from" in m,
        poll="poll" in m,
    )
