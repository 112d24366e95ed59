r"""What may be learned of a message: nothing invisible, no control tokens, no personal data.

tidy, name = cleaners(hide=True, block="words.txt", tokens=["<go!>"])
tidy("ring 98765 43210 <go!>") → "ring […] < go!>"
name("+39 333 123 4567")       → "Person 1"
"""

# ruff: noqa: RUF001 (chat is in many scripts)
from models.common import fail

import re
import shlex
import unicodedata
from functools import cache
from pathlib import Path

# ---- what cannot be seen -------------------------------------------------------------------------
MARKS = "".join(chr(i) for i in range(0x20000) if unicodedata.combining(chr(i)))
INVISIBLE = re.compile(  # but for joiners, 200c and 200d: Persian and emoji are made with them
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
    f"|[{MARKS}](?<=[{MARKS}]{{31}})"  # NFC is quadratic in the accents on one letter
)


def clean(text):
    r"""Return text in NFC, on one line, without what cannot be seen: " a\u200b \n b" → "a b"."""
    if not text.isascii() or not text.isprintable():
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    return " ".join(text.split())


# ---- personal data -------------------------------------------------------------------------------
EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}\.\w[\w.-]{1,200}")
CONTACT = re.compile(r"(?i)(?:\btel:|\bwa\.me/|\bphone=|@(?=\d{7}))\+?\d(?:[ ().-]{0,2}\d){6,18}")
IBAN = re.compile(
    r"(?<!\w)[A-Za-z]{2}\d\d ?[A-Za-z]{0,4}(?: ?\d){8,26}(?: ?[A-Z\d]{1,4}){0,3}(?!\w)"
)
SEVEN_DIGITS = re.compile(r"\d(?:\D{0,2}\d){6}")
LONG_NUMBER = re.compile(
    r"(?<![\w/=#&?%~$€£-])(?<!\d[.:,])"  # not in an address, a file name, a sum, a time
    r"[+(]{0,2}\d(?:[ ().\u2010-\u2013/-]{0,2}\d){6,18}"
    r"(?![\w/=%]|[.,:-]\d|-[^\W\d])"
)
YEAR, DAY = r"(?:19|20)\d\d", r"[0-3]?\d"
DATE = re.compile(  # 2024-05-31, 31/5/2024, 1914-1918
    rf"(?<!\d)(?:{YEAR}\D+(?:{DAY}\D+{DAY}|{YEAR})|{DAY}\D+{DAY}\D+{YEAR})(?!\d)"
)


def is_personal(number):
    """Say whether it looks like the number of a telephone, a card or an account.

    "612 34 56 78", "(11) 98765-4321" and "4111111111111111" do; "192.168.100.200", "31/5/2024",
    "6-4 7-5 6-7", "2 000 000" and "1.234.567" do not.
    """
    sizes = tuple(map(len, re.findall(r"\d+", number)))  # of its groups of digits
    if "+" in number or re.match("00[1-9]", number):
        return sum(sizes) >= 8
    if "." in number and sizes != (3, 3, 4) and not re.match(r"0\d", number):
        return False  # an address of the internet, a version, a price
    if DATE.search(number) or ("/" in number and number[0] != "0"):
        return False
    if sum(sizes) == 7:
        return sizes in {(3, 4), (3, 2, 2)}
    if len(sizes) == 1:
        return sum(sizes) >= 9
    return len(sizes) <= 5 and min(sizes[1:]) > 1


def hide_personal(text):
    """Return text with […] in place of numbers and addresses: "ring 98765 43210" → "ring […]"."""
    if "@" in text:
        text = EMAIL.sub("[…]", text)
    if SEVEN_DIGITS.search(text):
        text = IBAN.sub("[…]", CONTACT.sub("[…]", text))
        text = LONG_NUMBER.sub(lambda m: "[…]" if is_personal(m[0]) else m[0], text)
    return text


# ---- one's own words -----------------------------------------------------------------------------
def block_list(path):
    """Return the pattern that finds the words of a file, in any case, but not within words."""
    try:
        lines = Path(path).read_text("utf-8-sig").split("\n") if path else []
    except (OSError, UnicodeError) as error:
        fail(f"--block: {error}", f"ls -l {shlex.quote(path)}  # UTF-8, a word or phrase a line")
    words = sorted(filter(None, map(clean, lines)), key=len, reverse=True)
    pattern = "|".join(map(re.escape, words)) or "(?!)"  # which nothing is
    letter = "[^\\W\u0e00-\u0eff\u2e80-\uffff]"  # but of a script that sets no spaces
    return re.compile(f"(?i)(?<!{letter})(?:{pattern})(?!{letter})")


# ---- control tokens ------------------------------------------------------------------------------
CONTROL = (  # what the chat templates of models are made of
    r"<(?:\|[^\s<>|]{1,40}\|?|[^\s<>|]{1,40}\|)>"
    r"|<(?:/?s|bos|eos|pad|unk|(?:start|end)_of_(?:turn|image))>"
    r"|<｜[^\s<>｜]{1,40}｜>|\[/?INST\]|<</?SYS>>"
)


# ---- all of it -----------------------------------------------------------------------------------
def cleaners(hide, block, tokens):
    """Return two functions: message → what may be learned of it, author → name that may be shown.

    `hide` says whether personal data become […], `block` is a file of words that become […], and
    `tokens` control the base model.
    """
    control = re.compile("|".join([CONTROL, *map(re.escape, tokens)]))
    blocked = block_list(block)
    people = {}

    @cache  # so equal messages are one string in memory
    def tidy(text):
        text = clean(text)
        if hide:
            text = hide_personal(text)
        text = blocked.sub("[…]", text)
        return control.sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)  # "< eos>"

    @cache
    def name(author):
        shown = tidy(author)[:60]
        if "[…]" in shown:
            shown = people.setdefault(clean(author), f"Person {len(people) + 1}")
        return shown

    return tidy, name
