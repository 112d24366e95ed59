"""From the bytes of a file to its text: old encodings, and UTF-8 that was taken for Latin-1."""

import contextlib
import re

from .shared import share

FOREIGN = re.compile(r"[^\x00-\x7f]+")


def decode(content):
    """Return the text of a file in UTF-8, UTF-16 (as Excel writes it) or Windows' own letters."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    text = content.decode("utf-8-sig", "replace")
    wrong, foreign = text.count("\ufffd"), len(text) - len(text.encode("ascii", "ignore"))
    if wrong <= foreign / 10:  # a program may have cut a line within a letter
        return text
    return "\n".join(map(decode_line, content.split(b"\n")))


def decode_line(line):
    """Return the text of a line; in an old log each line may have its own encoding."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return line.decode("windows-1252", "replace")


def without_mojibake(text):
    """Return the text with "CafÃ©" as "Café", if most of its foreign letters are like that."""
    escaped = r"(?<!\\)\\u00([89a-f][0-9a-f])"  # as JSON may write them
    text = re.sub(escaped, lambda letter: chr(int(letter[1], 16)), text)
    letters = FOREIGN.findall(text[:1_000_000])
    if share(letters, lambda run: repaired(run) != run) < 1 / 2:
        return text
    return FOREIGN.sub(lambda run: repaired(run[0]), text)


def repaired(letters):
    """Return the letters that were meant: "Ã©" → "é"; what is no mojibake stays."""
    for encoding in "latin-1", "windows-1252":
        with contextlib.suppress(UnicodeError):
            return letters.encode(encoding).decode("utf-8")
    return letters
