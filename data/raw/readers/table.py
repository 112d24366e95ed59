"""CSV with a header, or a list in JSON, under the names that many programs use.

Two messages:

    Date,Author,Content
    24-Nov-26 10:44 AM,ann,hi
    [{"timestamp": 1795513440, "user": "ann", "text": "hi"}]
"""

import re

from .not_read import NotReadError
from .shared import Message, first, sample, text_of

APP = "list of messages"
COLUMNS = {
    "conversation": "conversation channel chat thread room group conversation_id chat_name "
    "group_id chat_session",
    "time": "time timestamp date datetime created_at sent_at created sent timestamp_ms ts "
    "created_utc createtime message_date",
    "author": "author sender sender_name username user from nick nickname name display_name "
    "author_name user_name from_id",
    "text": "message text content body msg contents",
}
LIKE = {  # a column with one of these words in its name is what it says
    "time": {"time", "date", "created", "sent", "timestamp", "zeit", "datum", "fecha", "data"},
    "author": {"author", "sender", "user", "from", "nick", "autor", "autore", "absender", "von"},
}


def understands(file):
    keys = keys_of(file.entries)
    return bool(columns_of(keys)["text"]) and "previous_messages" not in keys


def read(file):
    keys = keys_of(file.entries)
    columns = columns_of(keys)
    ignored = keys - {key for found in columns.values() for key in found}
    for column in LIKE:
        alike = [key for key in sorted(ignored) if LIKE[column].intersection(words_in(key))]
        if alike and not columns[column]:
            what = f"a list with its {column}s under {alike[0]!r}, a name that is not known"
            raise NotReadError(what, f'# call it "{column}" and try again')
    if ignored:
        file.notes.append(f"nothing was understood in {', '.join(sorted(ignored))}")
    for entry in file.entries:
        values = {
            column: " ".join(text_of(entry[key]) for key in found if entry.get(key))
            for column, found in columns.items()
        }
        yield Message(**values, kind=first(app=entry.get("system") is True))


def words_in(key):
    """Return the words of a name: "messageDate" and "Message Date" → {"message", "date"}."""
    return {word.casefold() for word in re.findall(r"[^\W\d_A-Z]+|[A-Z][^\W\d_A-Z]*", str(key))}


def keys_of(entries):
    """Return all keys of the entries: [{"a": 1}, {"b": 2}] → {"a", "b"}."""
    return {key for entry in sample(entries) for key in entry if key}


def columns_of(keys):
    """Return which keys hold what: ["Date", "User", "Text"] → {"time": ["Date"], …}."""
    keys = {str(key).casefold().strip().replace(" ", "_"): key for key in keys}
    found = {
        column: [keys[name] for name in names.split() if name in keys][:1]
        for column, names in COLUMNS.items()
    }
    if "date" in keys and "time" in keys:
        found["time"] = [keys["date"], keys["time"]]
    return found
