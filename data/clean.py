r"""What may be learned of a message: nothing invisible, no control tokens, no personal data.

tidy, tidy_name = cleaners(hide=True, block="words.txt", tokens=["<go!>"])
tidy("ring 98765 43210 <go!>") → "ring […] < go!>"
tidy_name("+39 333 123 4567")  → "Person 1"
"""

# ruff: noqa: RUF001 (chat is in many scripts)
from data.personal import hide_personal
from models.common import fail

import re
import shlex
import unicodedata
from functools import cache
from pathlib import Path

# ---- what cannot be seen -------------------------------------------------------------------------
MARKS = "".join(chr(i) for i in range(0x20000) if unicodedata.combining(chr(i)))
INVISIBLE = re.compile(  # without 200c and 200d, which join Persian letters and emoji
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
    f"|[{MARKS}](?<=[{MARKS}]{{31}})"  # NFC is quadratic in the accents on one letter
)


def clean(text):
    r"""Return text in NFC, on one line, without what cannot be seen: " a\u200b \n b" → "a b"."""
    if not text.isascii() or not text.isprintable():
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    return " ".join(text.split())


# ---- one's own words -----------------------------------------------------------------------------
def block_list(path):
    """Return the pattern that finds the words of a file, in any case, but not within words."""
    try:
        lines = Path(path).read_text("utf-8-sig").split("\n") if path else []
    except (OSError, UnicodeError) as error:
        fail(f"--block: {error}", f"ls -l {shlex.quote(path)}  # UTF-8, a word or phrase a line")
    words = sorted(filter(None, map(clean, lines)), key=len, reverse=True)
    pattern = "|".join(map(re.escape, words)) or "(?!)"  # matches nothing
    letter = "[^\\W\u0e00-\u0eff\u2e80-\uffff]"  # of a script that has spaces
    return re.compile(f"(?i)(?<!{letter})(?:{pattern})(?!{letter})")


# ---- control tokens ------------------------------------------------------------------------------
CONTROL = (  # the marks in chat templates
    r"<(?:\|[^\s<>|]{1,40}\|?|[^\s<>|]{1,40}\|)>"
    r"|<(?:/?s|bos|eos|pad|unk|(?:start|end)_of_(?:turn|image))>"
    r"|<｜[^\s<>｜]{1,40}｜>|\[/?INST\]|<</?SYS>>"
)
BRACKETS = re.compile(r"[<\[|>({｜].*[>\]|<)}｜]")  # other added tokens are words, or spaces
HTML = re.compile(  # Gemma has these as tokens, and they control nothing
    r"</?(?:table|caption|t(?:head|body|foot|r|h|d)|h[1-6]|blockquote|[uo]l|li|strong|em|b|i|u|code"
    r"|a|p|br|hr|su[bp]|img|span|div)/?>"
)


def control_tokens(tokenizer):
    """Return the texts, "<think>" and others, that are one token which controls the model."""
    texts = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return sorted(text for text in texts if BRACKETS.fullmatch(text) and not HTML.fullmatch(text))


def control_token_in(chats, tokenizer):
    """Return the first control token in the chats, None if there is none."""
    pattern = re.compile("|".join(map(re.escape, control_tokens(tokenizer))) or "(?!)")
    found = (pattern.search(turn["content"]) for chat in chats for turn in chat)
    return next((match[0] for match in found if match), None)


# ---- all of it -----------------------------------------------------------------------------------
def cleaners(hide, block, tokens):
    """Return two functions: message → what may be learned of it, author → name that may be shown.

    `hide`: personal data become […]; `block`: a file of words that do; `tokens`: of the base model.
    """
    control = re.compile("|".join([CONTROL, *map(re.escape, tokens)]))
    blocked = block_list(block)
    people = {}

    @cache  # so equal messages are one string in memory
    def tidy(text):
        text = hide_personal(clean(text)) if hide else clean(text)
        text = blocked.sub("[…]", text)
        return control.sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)  # "< eos>"

    @cache
    def tidy_name(author):
        shown = tidy(author)[:60]
        if "[…]" not in shown:
            return shown
        return people.setdefault(clean(author), f"Person {len(people) + 1}")

    return tidy, tidy_name
