"""WeChat: the CSV of PyWxDump or WeFlow, and of WeChatMsg, which is now called MemoTrace.

Messages under the header of each; in older files content holds {"src": "", "msg": "来"}:

    id,MsgSvrID,type_name,is_sender,talker,room_name,msg,src,CreateTime
    7,40739,文本,0,wxid_ann,wxid_ann,来,,2026-11-24 10:44:00

    localId,TalkerId,Type,SubType,IsSender,CreateTime,Status,StrContent,StrTime,Remark,NickName,Sender
    1,2,1,0,0,1795513440,,来,2026-11-24 10:44:00,小美,Mei,小美
"""

import re

from .files import parse_json
from .shared import Message, dig, share

APP = "WeChat"
FORMS = [  # where type, sender, time and text stand, and in which columns the conversation's name
    ("type_name", "talker", "CreateTime", "msg", ["room_name"]),
    ("type_name", "talker", "CreateTime", "content", ["room_name"]),
    ("Type", "Sender", "StrTime", "StrContent", ["Remark", "NickName", "TalkerId"]),
    ("Type", "TalkerId", "StrTime", "StrContent", ["TalkerId"]),
    ("类型", "发送人", "时间", "内容", []),
]
KINDS = dict.fromkeys(["文本", "文字", "text", "1", "引用回复"], "")
KINDS |= dict.fromkeys(["系统通知", "系统消息", "拍一拍", "撤回消息", "system", "10000"], "app")
KINDS |= dict.fromkeys(["音视频通话", "语音通话", "视频通话", "通话", "50"], "call")
ANSWER = re.compile(r"<title>([^<]*)</title>.*<type>57</type>", re.DOTALL)  # with a quotation
QUOTED = re.compile(r"\s*\[引用\].*\Z", re.DOTALL)


def understands(file):
    return share(file.entries, form_of)


def form_of(row):
    """Return the form of a row: the first whose columns it has."""
    return next((form for form in FORMS if set(form[:4]) <= row.keys()), None)


def read(file):
    for row in file.entries:
        type_, sender, time, text, names = form_of(row)
        is_mine = "1" in (row.get("is_sender"), row.get("IsSender"))
        kind = KINDS.get(row[type_], "media")
        words = dig(parse_json(row[text]), "msg") or row[text]
        if answer := ANSWER.search(words):
            words, kind = answer[1], ""
        yield Message(
            time=row[time],
            author="Me" if is_mine else row[sender],
            text=QUOTED.sub("", words),
            kind=kind,
            conversation=next((row[name] for name in names if row.get(name)), ""),
        )
