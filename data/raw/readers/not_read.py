"""Files that no reader reads: what they are, and what a person can do."""

import re

AGAIN = "# export the chat again: as JSON or CSV if the app can, else as text"


class NotReadError(Exception):
    """NotReadError(what the file is, a FIX)."""


def refuse(file):
    """Raise the error that says what the file is."""
    start = next(filter(str.strip, file.lines), "").strip()[:60]
    keys = {str(key) for entry in file.entries[:100] for key in entry}
    if re.match(r"(?i)<!doctype html|<html", start):
        raise NotReadError("a web page", "# export it as JSON; in Telegram: Machine-readable JSON")
    if "previous_messages" in keys:
        raise NotReadError("what build_train.py reads as it is", "# copy it into data/raw")
    if file.data is not None:
        raise NotReadError(f"JSON with the keys {', '.join(sorted(keys)[:9]) or '(none)'}", AGAIN)
    raise NotReadError(f"a text that begins with {start!r}" if start else "empty", AGAIN)
