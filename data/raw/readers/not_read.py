"""Files that no reader reads: what they are, and what a person can do."""

import re
import shlex

AGAIN = "# export the chat again: as JSON or CSV if the app can, else as text"
IN_APP = "# export the chat in its app, without media, and give what that writes"
AS_LIST = '# write its messages as JSON, a list of {"time", "author", "message"}: that is read'
AS_PAIRS = '# it answers as a machine does; to learn that, write rows of {"prompt", "completion"}'
AS_JSON = "# export it as JSON; in Telegram: Machine-readable JSON"
AS_TEXT = "# run wtsexporter with --txt, and give what it writes"
DISCORD = "# DiscordChatExporter writes what both sides said; choose its format JSON"
IMESSAGE = "# run imessage-exporter -f txt, and give the folder that it writes"
SIGNAL = "# run signal-export on a computer with Signal Desktop, and give the folder that it writes"

ENDINGS = (  # how the name of a file ends, what it is, a FIX
    (r"\.tar|\.tgz|\.tar\.\w+", "a .tar", "tar -xf {}  # then give the folder"),
    (r"\.gz", "a .gz", "gunzip -k {}  # then give the file"),
    (r"\.(rar|7z|bz2|xz)", "an archive, but no .zip", "# unpack it, then give the folder"),
    (r"\.(crdownload|download|part)", "a download that is not complete", "# download it again"),
    (r"\.(webloc|url|lnk|icloud)", "a shortcut, not the file", "# download the file itself"),
    (r"\.(pdf|docx?|xlsx?|od[ts]|rtf|pages|numbers)", "a document", f"{AGAIN}; or save it as CSV"),
    (r"\.(eml|mbox|msg)", "e-mail", AS_LIST),
    (r"\.(png|jpe?g|heic|webp|gif)", "a picture", IN_APP),
    (r"\.(opus|ogg|m4a|aac|amr|mp3|wav|caf)", "a voice note or other sound", IN_APP),
    (r"\.(mp4|mov|webm|3gp)", "a video", IN_APP),
    (r"\.crypt\d+", "an encrypted backup of WhatsApp", IN_APP),
    (r"signal[^/]*\.backup", "an encrypted backup of Signal", SIGNAL),
    (r"\.ab", "a backup of an Android phone", IN_APP),
    (r"chat\.db", "the database of iMessage", IMESSAGE),
    (r"\.(db|sqlite3?)", "a database", IN_APP),
)
FIRST_WORDS = (
    (r"(?i)<!doctype html|<html", "a web page", AS_JSON),
    (r"<\?xml", "XML, but no backup of SMS Backup & Restore", AGAIN),
    (r"window\.YTD", "an archive of X (Twitter)", AS_LIST),
    (r"消息记录", "an export of QQ", AS_LIST),
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


def refuse_unread(name, content):
    """Raise the error for a file that holds no text."""
    if content is None:
        raise NotReadError("a link that leads out of the folder", f"ls -l {shlex.quote(name)}")
    if known := known_by_name(name):
        what, fix = known
        raise NotReadError(what, fix.replace("{}", shlex.quote(name)))
    if content.startswith(b"PK"):
        raise NotReadError("a .zip that is not whole", "# copy it or export the chat again")
    is_utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    if b"\0" in content[:1000] and not is_utf_16:
        raise NotReadError("no text", AGAIN)


def known_by_name(name):
    """Return (what it is, a FIX) of a file that is no chat by its name, else None."""
    return next((known for end, *known in ENDINGS if re.search(f"(?i)(?:{end})$", name)), None)


def understands(file):
    return bool(known_as(file))


def read(file):
    """Raise the error that says what the file is, whatever it is."""
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
