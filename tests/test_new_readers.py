"""What becomes of the exports of LINE, KakaoTalk, WeChat and others, and of ready training sets.

Cases as in test_readers.py: what a message of the file has, and "Ann: hi" or the kind it is left
out as. All names and words are invented.
"""
# ruff: noqa: F811, RUF001 (fixtures are imported; apps write in many alphabets)

from data.raw import from_export
from data.raw.readers.not_read import NotReadError

import json

import pytest
from test_readers import check, convert, each  # noqa: F401

table = pytest.mark.parametrize


def rows(header, *lines):
    return "\n".join([header, *lines])


# ---- LINE ----------------------------------------------------------------------------------------
CLOCKS = "20:32|下午08:32|午後8:32|8:32 PM|08:32PM"


@table("day", ["2026/11/23(月)", "2026/11/23（一）", "2026/11/23週一", "2026.11.23 Monday"])
@table("clock", CLOCKS.split("|"))
def test_line_writes_the_day_in_a_line_of_its_own(check, day, clock):
    chat = f"[LINE] 花子とのトーク履歴\n保存日時：2026/11/24 10:44\n\n{day}\n{clock}\tAnn Lee\thi\n"
    chat += f"{clock}\tBob\tok, 10:45\n"
    entries = check({"[LINE] Ann.txt": chat}, "Ann Lee: hi|Bob: ok, 10:45")
    assert each("time", entries) == ["2026-11-23T20:32:00"]


@table("day", ["Mon, 23/11/2026", "Mon, 11/23/2026", "R8/11/23(月)"])
def test_line_writes_the_day_in_other_orders(check, day):
    entries = check({"a.txt": f"{day}\n10:44\tAnn\thi\n10:44\tBob\tok"}, "Ann: hi|Bob: ok")
    assert each("time", entries) == ["2026-11-23T10:44:00"]


@table(
    ("line", "becomes"),
    [
        ('花子\t"一行目\n2 "行" 目"', '花子: 一行目\n2 "行" 目'),
        ('花子\t"一行だけ"', '花子: "一行だけ"'),
        ("花子\t[1] yes", "花子: [1] yes"),
        ("花子\t[スタンプ]", "media"),
        ("花子\t[File] plan.pdf", "media"),
        ("太郎\t☎ 通話時間 2:13", "call"),
        ("☎ 通話時間 2:13", "call"),
        ("太郎がメッセージの送信を取り消しました", "app"),
        ("\t太郎が参加しました。", "app"),
        ("花子\tMessage unsent.", "deleted"),
    ],
)
def test_what_stands_in_a_chat_of_line(check, line, becomes):
    chat = f"2026/11/23(月)\n10:30\t太郎\tはい\n10:31\t{line}\n10:32\t花子\tね\n"
    talk, left_out = (f"|{becomes}", {}) if ": " in becomes else ("", {becomes: 1})
    check({"a.txt": chat}, f"太郎: はい{talk}|花子: ね", **left_out)


def test_a_pc_writes_no_end_of_a_name_but_all_lines_of_a_person_begin_alike(check):
    chat = """\
2026.11.23 Monday
16:23 Ann Lee Today I found:\na cake
16:25 Bob yes
16:25 Bob Stickers
2026.11.24 Tuesday
09:00 Ann Lee no
09:01 Bob unsent a message.
09:02 Cy so I am here
"""
    talk = "Ann Lee: Today I found:\na cake|Bob: yes|Ann Lee: no|Cy: so I am here"
    entries = check({"a.txt": chat}, talk, media=1, deleted=1)
    assert entries[-1]["time"] == "2026-11-24T09:02:00"


# ---- KakaoTalk -----------------------------------------------------------------------------------
KAKAOTALK = {
    "Android": "2026년 11월 24일 오후 1:44\n2026년 11월 24일 오후 1:44, 민수 : {}\n"
    "2026년 11월 24일 오후 1:45, 지영 : 응\n2026년 11월 24일 오후 1:46, 수진님이 나갔습니다.",
    "iPhone": "2026년 11월 24일 화요일\n2026. 11. 24. 오후 1:44, 민수 : {}\n"
    "2026. 11. 24. 13:45, 지영 : 응\n2026. 11. 24. 오후 1:46: 민수님이 수진님을 초대했습니다.",
    "English": "November 24, 2026, 1:44 PM, 민수 : {}\nNovember 24, 2026 at 1:45 PM, 지영 : 응\n"
    "November 24, 2026, 1:46 PM, Cy joined this chatroom.",
    "English, 2014": "1:44PM, November 24, 2026\n1:44PM, November 24, 2026, 민수 : {}\n"
    "1:45PM, November 24, 2026, 지영 : 응\n1:45PM, November 24, 2026, 지영 invited Cy.",
    "PC": "--------------- 2026년 11월 24일 화요일 ---------------\n[민수] [오후 1:44] {}\n"
    "수진님이 들어왔습니다.\n[지영] [오후 1:45] 응",
    "PC, English": "--------------- Tuesday, November 24, 2026 ---------------\n"
    "[민수] [1:44 PM] {}\n[지영] [1:45 PM] 응\n수진님이 나갔습니다.",
    "Mac": 'Date,User,Message\n"2026-11-24 13:44:00","민수","{}"\n'
    '"2026-11-24 13:45:00","지영","응"\n"2026-11-24 13:46:00","민수","지영님이 나갔습니다."',
}


@table("form", KAKAOTALK)
@table(
    ("words", "left_out"),
    [
        ("장소: 호수 10:30", None),
        ("첫째 줄\n둘째 줄", None),
        ("(이모티콘_Ann) 네", None),
        ("사진 3장", "media"),
        ("(emoticon)", "media"),
        ("", "media"),
        ("<사진 읽지 않음>", "media"),
        ("보이스톡 해요", "call"),
        ("삭제된 메시지입니다.", "deleted"),
    ],
)
def test_kakaotalk(check, form, words, left_out):
    chat = f"민수 님과 카카오톡 대화\n저장한 날짜 : 2026-11-24 22:58:30\n\n{KAKAOTALK[form]}"
    chat = KAKAOTALK[form] if form == "Mac" else chat
    said = "" if left_out else f"민수: {words.removeprefix('(이모티콘_Ann) ')}|"
    kinds = {"app": 1} | ({left_out: 1} if left_out else {})
    entries = check({"a.csv": chat.format(words)}, f"{said}지영: 응", keep=["alone"], **kinds)
    assert entries[-1]["time"] == "2026-11-24T13:45:00"


# ---- tables --------------------------------------------------------------------------------------
def test_wechat_by_pywxdump(check):
    header = "id,MsgSvrID,type_name,is_sender,talker,room_name,msg,src,CreateTime"
    export = rows(
        header,
        "1,7,文本,1,wxid_me,小美,今天来吗,,2026/11/24 11:43",
        "2,8,文本,0,wxid_mei,小美,来,,2026/11/24 11:44",
        '3,9,引用回复,0,wxid_mei,小美,"好\n\n[引用](2026-11-24)我:今天来吗",,2026/11/24 11:45',
        "4,10,图片,0,wxid_mei,小美,图片,a.dat,2026/11/24 11:46",
        "5,11,系统通知,0,wxid_mei,小美,你撤回了一条消息,,2026/11/24 11:47",
    )
    entries = check({"a.csv": export}, "Me: 今天来吗|wxid_mei: 来|wxid_mei: 好", media=1, app=1)
    assert (entries[0]["conversation"], entries[0]["time"]) == ("小美", "2026-11-24T11:43:00")
    older = header.replace("msg,src", "content")
    line = '1,7,文本,0,mei,小美,"{""src"": """", ""msg"": ""来""}",2026-11-24 11:43:20'
    check({"a.csv": rows(older, line)}, "mei: 来", keep=["alone"])


def test_wechat_by_wechatmsg(check):
    answer = "<msg><appmsg><title>好的</title><type>57</type></appmsg></msg>"
    export = rows(
        "localId,TalkerId,Type,SubType,IsSender,CreateTime,Status,StrContent,StrTime,Remark,"
        "NickName,Sender",
        "1,2,1,0,1,1795513440,,来吗,2026-11-24 10:44:00,小美,Mei,我",
        "2,2,1,0,0,1795513500,,来,2026-11-24 10:45:00,小美,Mei,小美",
        f"3,2,49,57,0,1795513560,,{answer},2026-11-24 10:46:00,小美,Mei,小美",
        "4,2,3,0,0,1795513620,,<msg><img/></msg>,2026-11-24 10:47:00,小美,Mei,小美",
    )
    entries = check({"a.csv": export}, "Me: 来吗|小美: 来|小美: 好的", media=1)
    assert (entries[0]["conversation"], entries[0]["time"]) == ("小美", "2026-11-24T10:44:00")


def test_imazing(check):
    export = rows(
        "Chat Session,Message Date,Deleted Date,Type,Sender ID,Sender Name,Text,Attachment",
        "Ann Lee,2026-11-24 10:44:25,,Incoming,+15550100,Ann Lee,are you coming?,",
        "Ann Lee,2026-11-24 10:45:25,,Outgoing,,,yes,",
        "Ann Lee,2026-11-24 10:46:25,,Incoming,+15550100,Ann Lee,,a.heic",
        "Ann Lee,2026-11-24 10:47:25,,Notification,,,You named the conversation “Cake”.,",
        "Ann Lee,2026-11-24 10:48:25,2026-11-24 10:49:00,Incoming,+15550100,Ann Lee,oh,",
        "Cy,2026-11-24 11:44:25,,Incoming,+15550102,,open?,",
        "Cy,2026-11-24 11:45:25,,Outgoing,,,no,",
    )
    talk = "Ann Lee: are you coming?|Me: yes|Person 1: open?|Me: no"
    entries = check({"a.csv": export}, talk, media=1, app=1, deleted=1)
    assert each("conversation", entries) == ["Ann Lee", "Cy"]
    assert entries[0]["time"] == "2026-11-24T10:44:25"


# ---- SMS Backup & Restore ------------------------------------------------------------------------
XML = "<?xml version='1.0' encoding='UTF-8' standalone='yes' ?>\n"
SMS = """\
<smses count="6">
<sms address="+15550100" date="1795513440000" type="1" body="hi &amp; you" contact_name="Ann" />
<sms address="+15550100" date="1795513441000" type="2" body="&#55357;&#56832; ok" />
<sms address="+15550100" date="1795513442000" type="3" body="a draft" contact_name="Ann" />
<sms address="+15550102" date="1795513443000" type="1" body="who?&#0;" contact_name="(Unknown)" />
<sms address="+15550102" date="1795513444000" type="2" body="me" contact_name="(Unknown)" />
<mms address="+15550100~+15550102" date="1795513445000" msg_box="1" contact_name="(Unknown)">
 <parts><part ct="application/smil" text="no" /><part ct="image/jpeg" data="AAAA" text="null" />
 <part ct="text/plain" text="lóok" /></parts>
 <addrs><addr address="+15550199" type="151" /><addr address="+15550100" type="137" /></addrs></mms>
<mms address="+15550100~+15550102" date="1795513446000" msg_box="2" contact_name="(Unknown)">
 <parts><part ct="text/plain" text="nice" /></parts></mms>
</smses>
"""


def test_sms_backup_and_restore(check):
    talk = "Ann: hi & you|Me: 😀 ok|Person 1: who?|Me: me|Ann: lóok|Me: nice"
    for encoding in "UTF-8", "ISO-8859-1":
        export = (XML.replace("UTF-8", encoding) + SMS).encode(encoding)
        entries = check({"sms.xml": export}, talk)
    assert each("conversation", entries) == ["Ann", "Person 1", "Group 1"]
    assert entries[0]["time"] == "2026-11-24T09:44:00"


@table(
    ("xml", "error"),
    [
        ('<!DOCTYPE smses [<!ENTITY a "aaaa">]>' + SMS.replace("hi", "&a;"), "DOCTYPE"),
        (SMS[:300], "not whole"),
        ("<calls count='0'></calls>", "no backup of SMS"),
    ],
)
def test_xml_with_entities_or_cut_off_is_refused(xml, error):
    with pytest.raises(NotReadError, match=error):
        from_export.read_file(from_export.open_file("a.xml", (XML + xml).encode(), {}), None)


# ---- Skype, Teams, Snapchat ----------------------------------------------------------------------
SKYPE = [  # messagetype, content, what becomes of it
    ("RichText", "yes &amp; <b>soon</b>", "Ann Lee: yes & soon"),
    ("RichText", '<quote author="bob"><legacyquote>so?</legacyquote></quote>no', "Ann Lee: no"),
    ("RichText", "Edited previous message: at 8<e_m ts='1'></e_m>", "Ann Lee: at 8"),
    ("RichText", '<ss type="laugh" alt="😆">(laugh)</ss> ok', "Ann Lee: 😆 ok"),
    ("RichText/Html", "<p>one</p><p>two</p>", "Ann Lee: one\ntwo"),
    ("RichText/UriObject", "<URIObject>To view this photo, go to: a.b</URIObject>", "media"),
    ("Event/Call", "<partlist></partlist>", "call"),
    ("ThreadActivity/AddMember", "<addmember></addmember>", "app"),
    ("Poll", "{}", "poll"),
]


@table(("form", "content", "becomes"), SKYPE)
def test_skype(check, form, content, becomes):
    ann = {"displayName": "Ann Lee", "from": "8:ann.lee", "messagetype": form, "content": content}
    bob = {"displayName": None, "from": "8:live:.cid.bob", "messagetype": "Text", "content": "so"}
    times = {"originalarrivaltime": "2026-11-24T09:01:00.123Z", "properties": None}
    talk = {"id": "8:ann.lee", "displayName": None, "MessageList": [bob | times, ann | times]}
    talk = {"userId": "8:bob", "conversations": [talk]}
    said, left_out = ([becomes], {}) if ": " in becomes else ([], {becomes: 1})
    entries = check(
        {"messages.json": talk}, "|".join(["bob: so", *said]), keep=["alone"], **left_out
    )
    assert (entries[0]["conversation"], entries[0]["time"]) == ("ann.lee", "2026-11-24T09:01:00")


def test_teams_of_an_organisation(check):
    def message(name, content, **more):
        sender = {"user": {"displayName": name}}
        body = {"contentType": "html", "content": content}
        return {"createdDateTime": "2026-11-24T10:44:25Z", "from": sender, "body": body} | more

    messages = [
        message("Ann", '<p>are you&nbsp;coming? <emoji alt="🙂"></emoji></p>', chatId="19:a"),
        message("Bob", "yes<attachment id='1'></attachment>", chatId="19:a"),
        message("Ann", "gone", deletedDateTime="2026-11-24T10:45:25Z"),
        message("Ann", "<systemEventMessage/>", messageType="systemEventMessage"),
        message("x", "beep") | {"from": {"application": {"displayName": "Robot"}}},
    ]
    for content in messages, {"value": messages}:
        check({"a.json": content}, "Ann: are you coming? 🙂|Bob: yes", deleted=1, app=1, bot=1)


def test_snapchat_of_today_and_before_2023(check):
    def message(sender, form, time, content):
        created = f"2026-11-24 10:{time}:25 UTC"
        return {"From": sender, "Media Type": form, "Created": created, "Content": content}

    history = {
        "ann_lee": [
            message("ann_lee", "TEXT", 46, "yes"),
            message("bob", "MEDIA", 45, None),
            message("bob", "STATUSERASEDMESSAGE", 45, ""),
            message("bob", "TEXT", 44, "are you coming?"),
        ]
    }
    files = {"json/chat_history.json": history}
    entries = check(files, "bob: are you coming?|ann_lee: yes", media=1, deleted=1)
    assert each("conversation", entries) == ["ann_lee"]
    old = {
        "Received Saved Chat History": [message("ann_lee", "TEXT", 46, "yes")],
        "Sent Saved Chat History": [message(None, "TEXT", 44, "so?") | {"To": "ann_lee"}],
    }
    entries = check({"json/chat_history.json": old}, "Me: so?|ann_lee: yes")
    assert each("conversation", entries) == ["ann_lee"]


# ---- ready training sets -------------------------------------------------------------------------
def turns(roles):
    """Return the turns of "user a|assistant b"."""
    pairs = [turn.split() for turn in roles.split("|")]
    return [{"role": role, "content": text} for role, text in pairs]


ASKED, ANSWERED = turns("user a"), turns("assistant b")
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "chatgpt", "value": "b"}]
CHATML = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
CHATML += "<|im_start|>assistant\nb<|im_end|>\n"


@table(
    ("row", "pairs"),
    [
        ({"prompt": "a", "completion": "b"}, "a → b"),
        ({"instruction": "a", "input": "", "output": "b"}, "a → b"),
        ({"instruction": "a", "input": "c", "output": "b"}, "a+c → b"),
        ({"question": "a", "answer": "b", "id": 7, "input": "c"}, "a → b"),
        ({"text": "Q: c\nA: d\nQ: e\nA: f"}, "c\nA: d\nQ: e → f"),
        ({"messages": turns("system s|user a|assistant b|user c|assistant d")},
         "s+a → b, s+a+b+c → d"),
        ({"messages": turns("assistant b|user c|assistant d")}, "b+c → d"),
        ({"conversations": SHAREGPT}, "a → b"),
        ({"text": CHATML}, "s+a → b"),
        ({"text": "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b </s>"}, "s+a → b"),
        ({"text": "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>"}, "a → b, a+b+c → d"),
        ({"text": "Below is a task.\n\n### Instruction:\na\n\n### Input:\nc\n\n### Response:\nb"},
         "a+c → b"),
        ({"text": "### Human: a\n### Assistant: b\n### Steps: c"}, "a → b\n### Steps: c"),
        ({"text": "<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>"},
         "a → b"),
        ({"instruction": "a", "context": "c", "response": "b", "category": "qa"}, "c+a → b"),
        ({"instruction": "a", "input": "c", "output": "b", "system": "s", "history": [["x", "y"]]},
         "s+x+y+a+c → b"),
        ({"system": "s", "conversations": SHAREGPT}, "s+a → b"),
        ({"messages": ASKED + ANSWERED, "label": True}, "a → b"),
        ({"messages": ASKED + ANSWERED, "label": False}, ""),
        ({"prompt": "a", "completion": "b", "label": False}, ""),
        ({"prompt": "a", "completion": ""}, ""),
        ({"messages": [*ASKED, ANSWERED[0] | {"weight": 0}, *turns("user c|assistant d")]},
         "a+b+c → d"),
        ({"messages": [*ASKED, {"role": "assistant", "content": None, "tool_calls": []}]}, ""),
        ({"prompt": "a", "chosen": "b", "rejected": "no"}, "a → b"),
        ({"prompt": "a", "chosen": ASKED + ANSWERED, "rejected": ASKED}, "a → b"),
        ({"prompt": ASKED, "chosen": ANSWERED, "rejected": turns("assistant no")}, "a → b"),
        ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {}}, "a → b"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: no"},
         "a → b"),
    ],
)  # fmt: skip
def test_a_row_of_a_training_set_becomes_pairs(convert, row, pairs):
    set_of_two = [row, {"prompt": "good", "completion": "pair"}]
    for content in json.dumps(set_of_two), "\n".join(map(json.dumps, set_of_two)):
        found, _, notes = convert({"a.jsonl": content})
        shown = [
            f"{pair['prompt'].replace(chr(10) * 2, '+')} → {pair['completion']}" for pair in found
        ]
        assert shown == [*filter(None, pairs.split(", ")), "good → pair"]
        is_bad = not pairs or "weight" in json.dumps(row)
        assert [note[-3:] for note in notes] == [": 1"] * is_bad


def test_a_training_set_in_csv(convert):
    found, _, _ = convert({"a.csv": 'prompt,completion\nhi?,"well, hello"\nbye,see you\n'})
    assert [(pair["prompt"], pair["completion"]) for pair in found] == [
        ("hi?", "well, hello"),
        ("bye", "see you"),
    ]


# ---- what is refused by name ---------------------------------------------------------------------
@table(
    ("name", "content", "what", "fix"),
    [
        ("a.json", [{"title": "Cake", "mapping": {}}], "a ChatGPT export", "completion"),
        ("a.json", [{"uuid": "1", "chat_messages": []}], "a Claude export", "completion"),
        ("a.json", {"Direct Messages": {}, "Profile": {}}, "a TikTok export", "a list of"),
        ("a.js", "window.YTD.direct_messages.part0 = []", "X (Twitter)", "a list of"),
        ("m.csv", "ID,Timestamp,Contents,Attachments\n1,2026-11-24 10:44:25,hi,", "you alone wrote",
         "DiscordChatExporter"),
        ("a.txt", "消息记录（此消息记录为文本格式）\n", "QQ", "a list of"),
        ("a.pdf", "%PDF-1.7", "a document", "as text"),
        ("a.docx", "PK", "a document", "as text"),
        ("a.db", "SQLite format 3\0", "a database", "export the chat"),
        ("msgstore.db.crypt15", "??", "an encrypted backup of WhatsApp", "export the chat"),
        ("signal-2026-11-24.backup", "??", "an encrypted backup of Signal", "signal-export"),
        ("backup.ab", "ANDROID BACKUP", "a backup of an Android phone", "export the chat"),
        ("Messages/chat.db", "SQLite format 3\0", "the database of iMessage", "imessage-exporter"),
        ("my a.tar.gz", "??", "a .tar", "tar -xf 'my a.tar.gz'"),
        ("a.txt.gz", "??", "a .gz", "gunzip -k a.txt.gz"),
        ("a.RAR", "Rar!", "an archive", "unpack it"),
        ("a.mbox", "From ann@x.org\n", "e-mail", "a list of"),
        ("a.jpeg", "??", "a picture", "export the chat"),
        ("a.opus", "OggS", "a voice note", "export the chat"),
        ("a.webloc", "<?xml ?>", "a shortcut", "download the file"),
    ],
)  # fmt: skip
def test_other_exports_are_refused_by_their_name(name, content, what, fix):
    content = content if isinstance(content, str) else json.dumps(content)
    with pytest.raises(NotReadError) as error:
        from_export.read_file(from_export.open_file(name, content.encode(), {}), None)
    assert what in error.value.args[0] and fix in error.value.args[1]


def test_of_a_folder_the_file_that_is_known_by_name_is_told(tmp_path, capsys):
    message = {"ID": 1, "Timestamp": "2026-11-24 10:44:25", "Contents": "hi", "Attachments": ""}
    for name, content in ("c1/channel.json", {"id": "1"}), ("c1/messages.json", [message]):
        (tmp_path / "c1").mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        from_export.read_files([str(tmp_path)], None)
    assert "c1/messages.json is Discord's package" in capsys.readouterr().err
