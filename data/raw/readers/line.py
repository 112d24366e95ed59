r"""LINE: "Send chat history" of a phone, "Save chat" of a PC; a .txt for each chat.

Messages with tabs, below a line with the day, as a phone writes them; the tags in its language:

    2026/11/24(火)                  also 2026.11.24 Tuesday, Tue, 11/24/2026, R8/11/24(火)
    10:44   花子    来る
    10:45   太郎    "一行目
    二行目"
    10:46   花子    [スタンプ]
    10:47   花子がメッセージの送信を取り消しました

A PC writes one space, so that nothing shows where a name ends:

    2026.11.24 Tuesday
    10:44 Ann Lee are you coming?
"""

import re
from collections import defaultdict
from itertools import takewhile

from .shared import Message, blocks, kind_of_sentence, sample, share

APP = "LINE"
DATE = r"(?:\d{4}|R\d\d?)[./年]\d\d?[./月]\d\d?日?"
DAY = re.compile(
    rf"(?P<day>{DATE})\s?(?:\W?\w{{1,3}}\W?|\w+day|\w曜日)?$|\w{{3}}, (?P<other_day>[\d/]{{8,10}})$"
)
CLOCK = r"(?:[^\W\d]{2} ?)?\d\d?:\d\d(?: ?[AaPp][Mm])?"
PHONE = re.compile(rf"(?P<clock>{CLOCK})(?:\t| {{4}})(?:(?P<author>.{{0,60}}?)(?:\t| {{4}}))?")
PC = re.compile(rf"(?P<clock>{CLOCK}) (?P<author>)")

TAG = re.compile(r"\[[^\[\]\n]{1,30}\](?: \(null\)| \S+\.\w+)?")  # [Photo], [File] plan.pdf


def understands(file):
    lines = sample(file.lines)
    clocks = [line for line in lines if re.match(CLOCK, line)]
    if len(clocks) < len(lines) / 10 or not any(map(DAY.match, file.lines)):
        return 0
    return share(clocks, form_of(clocks).match)


def form_of(lines):
    return PHONE if share(lines, PHONE.match) > 1 / 2 else PC


def read(file):
    form = form_of([line for line in file.lines if re.match(CLOCK, line)])
    header = re.compile(f"{form.pattern}|{DAY.pattern}")
    day, messages = "", []
    for start, words in blocks(file.lines, header.match):
        day = start["day"] or start["other_day"] or day
        if start["clock"]:
            messages.append((f"{day} {start['clock']}", start["author"], words))
    names = names_in([words for *_, words in messages])
    for when, author, words in messages:
        if form is PC:
            author = names[first_words(words)[0]]
            words = words.removeprefix(author).strip()
        if re.fullmatch(r'"[^\n]*\n(?s:.*)"', words):  # around several lines
            words = words[1:-1]
        yield Message(when, author, words, kind_of(author, words, form))


def names_in(texts):
    """Return the name behind each first word, as long as the words after it are always the same.

    ["Ann Lee hi", "Bob yes", "Ann Lee so", "Bob no"] → {"Ann": "Ann Lee", "Bob": "Bob"}
    """
    starts = defaultdict(list)
    for words in map(first_words, texts):
        starts[words[0]].append(words)
    return {word: common_start(same) for word, same in starts.items()}


def common_start(starts):
    """Return the words with which all begin; of one line the first."""
    columns = zip(*starts, strict=False)
    words = [words[0] for words in takewhile(lambda words: len(set(words)) == 1, columns)]
    return " ".join(words if len(starts) > 1 else words[:1])


def first_words(text):
    """Return the first three words of the first line: a name has no more."""
    return text.split("\n")[0].split(" ")[:3]


def kind_of(author, words, form):
    if words.startswith("☎"):
        return "call"
    if not author:
        return "app"
    if TAG.fullmatch(words):
        return "media"
    if form is PC and (kind := kind_of_sentence(words, "LINE of a PC")):
        return kind
    return kind_of_sentence(words, APP)
