"""Files that no reader reads: what they are, and what a person can do."""

import re
import shlex

AGAIN = "# export the chat again: as JSON or CSV if the app can, else as text"
AS_LIST = '# write its messages as JSON, a list of {"time", "author", "message"}: that is read'
AS_PAIRS = '# it answers as a machine does; to learn that, write rows of {"prompt", "completion"}'
UNPACK = "tar -xf {}  # then give the folder"
TO_TEXT = "# save it as text or CSV, or export the chat from its app"
AS_JSON = "# export it as JSON; in Telegram: Machine-readable JSON"
AS_TEXT = "# run wtsexporter with --txt, and give what it writes"
DISCORD = "# DiscordChatExporter writes what both sides said; choose its format JSON"

FIRST_BYTES = (
    (rb"%PDF", "a PDF", TO_TEXT),
    (rb"\xd0\xcf\x11\xe0", "a document of Word or Excel", TO_TEXT),
    (rb"SQLite format 3", "a database", "# export the chat in its app"),
    (rb"\x1f\x8b|(?s:.{257})ustar", "a .tar or .gz", UNPACK),
    (rb"PK", "a .zip that is not whole", "# copy it or export the chat again"),
    (rb"\xff\xd8\xff|\x89PNG", "a picture", AGAIN),
    (rb"(?!\xff\xfe|\xfe\xff)(?s:.{0,1000}?)\0", "no text", AGAIN),  # those two begin UTF-16
)
FIRST_WORDS = (
    (r"(?i)<!doctype html|<html", "a web page", AS_JSON),
    (r"<\?xml", "XML, but no backup of SMS Backup & Restore", AGAIN),
    (r"window\.YTD", "an archive of X (Twitter)", AS_LIST),
    (r"消息记录", "an export of QQ", AS_LIST),
    (r"\{\\rtf", "a document (RTF)", TO_TEXT),
)
KEYS = (  # of the file or of its entries
    ({"mapping", "title"}, "a ChatGPT export", AS_PAIRS),
    ({"chat_messages"}, "a Claude export", AS_PAIRS),
    ({"user_name", "character_name"}, "a chat of SillyTavern", AS_PAIRS),
    ({"ID", "Contents", "Attachments"}, "Discord's package of what you alone wrote", DISCORD),
    ({"Direct Messages"}, "a TikTok export", AS_LIST),
    ({"Direct Message"}, "a TikTok export", AS_LIST),
    ({"zerver_message"}, "an export of Zulip", AS_LIST),
    ({"type", "version", "post"}, "an export of Mattermost", AS_LIST),
    ({"previous_messages"}, "what build_train.py reads as it is", "# copy it into data/raw"),
)


class NotReadError(Exception):
    """NotReadError(what the file is, a FIX)."""


def refuse_bytes(name, content):
    """Raise the error for a file that holds no text."""
    if content is None:
        raise NotReadError("a link that leads out of the folder", f"ls -l {shlex.quote(name)}")
    if re.search(r"\.crypt\d+$", name):
        raise NotReadError("an encrypted backup of WhatsApp", "# in the chat: Export chat")
    if name.endswith("[Content_Types].xml"):
        raise NotReadError("a document of Word or Excel", TO_TEXT)
    for start, what, fix in FIRST_BYTES:
        if re.match(start, content):
            raise NotReadError(what, fix.replace("{}", shlex.quote(name)))


def understands(file):
    return bool(known_as(file))


def read(file):
    refuse(file)


def refuse(file):
    """Raise the error that says what the file is."""
    if known := known_as(file):
        raise NotReadError(*known)
    if file.data is not None:
        keys = ", ".join(sorted(keys_of(file))[:9])
        raise NotReadError(f"JSON with the keys {keys or '(none)'}", AGAIN)
    start = first_words(file)
    raise NotReadError(f"a text that begins with {start!r}" if start else "empty", AGAIN)


def known_as(file):
    """Return (what it is, a FIX) of an export that is known by name, else None."""
    keys = keys_of(file)
    if any(key.endswith(("@s.whatsapp.net", "@g.us")) for key in keys):
        return "JSON of WhatsApp Chat Exporter", AS_TEXT
    by_keys = (known for needed, *known in KEYS if needed <= keys)
    by_words = (known for words, *known in FIRST_WORDS if re.match(words, first_words(file)))
    return next(by_keys, None) or next(by_words, None)


def keys_of(file):
    return file.keys | {str(key) for entry in file.entries[:100] for key in entry}


def first_words(file):
    return next(filter(str.strip, file.lines), "").strip()[:60]
