r"""KakaoTalk: "Export chat" of a phone or of a PC (.txt), or of a Mac (.csv), in Korean or English.

Messages, and what the app wrote; in a PC's file the day stands in a line of its own:

    2026년 11월 24일 오전 9:00, 민수 : 오늘 와?             Android
    2026. 11. 24. 오전 9:00, 민수 : 오늘 와?                iPhone
    November 24, 2026 at 9:00 AM, Ann : are you coming?    in English; the clock may stand first
    2026년 11월 24일 오전 9:01, 수진님이 나갔습니다.
    --------------- 2026년 11월 24일 화요일 ---------------
    [민수] [오전 9:00] 오늘 와?                            PC
    "2026-11-24 09:00:12","민수","오늘 와?"                 Mac, under Date,User,Message
"""

import re

from .shared import Message, blocks, kind_of_sentence, sample, share

APP = "KakaoTalk"
CLOCK = r"(?:오전|오후)?\s?\d\d?:\d\d(?:\s?[AaPp]\.?[Mm]\.?)?"
DAY = r"(?:\d{4}(?:[.-]|년) ?\d\d?(?:[.-]|월) ?\d\d?[.일]?|[A-Z][a-z]{2,8} \d\d?, \d{4})"
WEEKDAY = rf"{DAY},? \S*(?:요일|day)|[A-Z][a-z]+day, {DAY}"
NOTICE = r".{1,500}님[이을과].{0,500}(?:나갔|들어왔|초대했|퇴장했|내보냈|가렸)습니다\.?.*"
HEADER = re.compile(
    rf"(?P<when>{DAY},?(?: at)? {CLOCK}|{CLOCK}, {DAY})(?:[,:] |$)(?:(?P<author>.{{1,100}}?) : )?"
    rf"|\[(?P<pc_author>.{{1,100}}?)\] \[(?P<clock>{CLOCK})\] ?"
    rf"|(?:-{{5,}} )?(?P<day>{WEEKDAY})(?: -{{5,}})?$"
    rf"|(?P<notice>{NOTICE})$"
)
STARTS = re.compile(rf"{DAY}|{CLOCK}|\[.{{1,100}}?\] \[|-{{5,}} ")  # no other line begins so

NOT_SAID = re.compile(  # words may stand behind an emoticon
    r"(?i)\((?:이모티콘|emoticon)(?:_[^()\n]*)?\)|\A사진 \d+장\Z|\Aphotos \d+\Z"
)


def understands(file):
    lines = sample(file.lines)
    starts = [line for line in lines if STARTS.match(line)]
    if len(starts) > len(lines) / 10:
        return share(starts, HEADER.match)
    return share(file.entries, lambda row: set(row) == {"Date", "User", "Message"})


def read(file):
    for row in file.entries:
        yield message(row["Date"], row["User"], row["Message"])
    day = ""
    for start, words in blocks(file.lines, HEADER.match):
        day = start["day"] or day
        author = start["author"] or start["pc_author"]
        words = words or start["notice"] or ""
        if author or words:
            when = start["when"] or f"{day} {start['clock'] or ''}"
            yield message(when, author, words)


def message(when, author, words):
    words = NOT_SAID.sub("", words).strip()
    is_notice = not author or re.fullmatch(NOTICE, words)
    return Message(when, author, words, "app" if is_notice else kind_of_sentence(words, APP))
