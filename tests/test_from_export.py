"""What from_export.py reads: a table of the forms of exports, and the rules of every stage."""
# ruff: noqa: RUF001 (apps write in many alphabets)

import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "data/raw/from_export.py"
spec = importlib.util.spec_from_file_location("from_export", SCRIPT)
from_export = importlib.util.module_from_spec(spec)
spec.loader.exec_module(from_export)


@pytest.fixture
def convert(tmp_path):
    """Return convert({"chat.txt": …}, keep="bot"): (entries, {kind: number left out})."""
    from_export.notes.clear()
    from_export.slack_names.clear()

    def convert(files, keep="", dates=None):
        for name, content in files.items():
            path = tmp_path / "export" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = content if isinstance(content, str | bytes) else json.dumps(content)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        read, _ = from_export.read_files([str(tmp_path / "export")], dates)
        conversations, left_out = from_export.sort_out(read, set(keep.split(",")) - {""})
        counts = {kind: len(texts) for kind, texts in left_out.items()}
        return from_export.entries_of(conversations), counts

    return convert


def said(entries):
    """Return [("Ann", "hi"), …]."""
    return [(entry.get("author"), entry["message"]) for entry in entries]


# ---- WhatsApp: how a message begins ------------------------------------------------------------
@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("24/11/26, 10:44 - {}", "2026-11-24T10:44:00"),
        ("24/11/2026, 10:44 - {}", "2026-11-24T10:44:00"),
        ("11/24/26, 10:44 AM - {}", "2026-11-24T10:44:00"),
        ("11/24/26, 12:04 AM - {}", "2026-11-24T00:04:00"),
        ("11/24/26, 10:44\u202fPM - {}", "2026-11-24T22:44:00"),
        ("24.11.26, 10:44 - {}", "2026-11-24T10:44:00"),
        ("24. 11. 2026, 10:44 - {}", "2026-11-24T10:44:00"),
        ("24.11.2026 klo 10.44 - {}", "2026-11-24T10:44:00"),
        ("24.11.26 10.44 - {}", "2026-11-24T10:44:00"),
        ("24/11/2026 à 10:44 - {}", "2026-11-24T10:44:00"),
        ("24.11.2026 г., 10:44 ч. - {}", "2026-11-24T10:44:00"),
        ("24/11/26 10:44 p. m. - {}", "2026-11-24T22:44:00"),
        ("24/11/26 10:44 a.\xa0m. - {}", "2026-11-24T10:44:00"),
        ("24/11/26, 9:15 in the morning - {}", "2026-11-24T09:15:00"),
        ("24/11/26, 9:15 in the evening - {}", "2026-11-24T21:15:00"),
        ("24/11/26, 9:15 at night - {}", "2026-11-24T21:15:00"),
        ("24/11/26, 2:15 at night - {}", "2026-11-24T02:15:00"),
        ("24/11/26 9:15 de la noche - {}", "2026-11-24T21:15:00"),
        ("24/11/26, 9:15 μ.μ. - {}", "2026-11-24T21:15:00"),
        ("2026-11-24 10:44 - {}", "2026-11-24T10:44:00"),
        ("2026/11/24 上午10:44 - {}", "2026-11-24T10:44:00"),
        ("2026/11/24 下午1:44 - {}", "2026-11-24T13:44:00"),
        ("2026年11月24日 下午1:44 - {}", "2026-11-24T13:44:00"),
        ("2026년 11월 24일 오후 1:44 - {}", "2026-11-24T13:44:00"),
        ("24/11/2569 10:44 - {}", "2026-11-24T10:44:00"),
        ("10:44, 24/11/2026 - {}", "2026-11-24T10:44:00"),
        ("٢٤‏/١١‏/٢٠٢٦، ١٠:٤٤ م - {}", "2026-11-24T22:44:00"),
        ("२४/११/२६, १०:४४ - {}", "2026-11-24T10:44:00"),
        ("11/24/26, 10:44:25 PM: {}", "2026-11-24T22:44:25"),
        ("[24/11/26, 10:44:25] {}", "2026-11-24T10:44:25"),
        ("[24.11.26, 10:44:25] {}", "2026-11-24T10:44:25"),
        ("[11/24/26, 10:44:25\u202fPM] {}", "2026-11-24T22:44:25"),
        ("[2026-11-24 10:44:25] {}", "2026-11-24T10:44:25"),
        ("[2026/11/24 下午1:44:25] {}", "2026-11-24T13:44:25"),
        ("[2026. 11. 24. 오후 1:44:25] {}", "2026-11-24T13:44:25"),
        ("[24. 11. 2026 10:44:25] {}", "2026-11-24T10:44:25"),
        ("[24.11.26 10.44.25] {}", "2026-11-24T10:44:25"),
        ("[٢٤‏/١١‏/٢٠٢٦، ١٠:٤٤:٢٥ م] {}", "2026-11-24T22:44:25"),
        ("\u200e[24/11/2026, 10:44:25] {}", "2026-11-24T10:44:25"),
        ("\u200f[24/11/2026, 10:44:25] {}", "2026-11-24T10:44:25"),
    ],
)
def test_a_message_of_whatsapp_begins_with_a_date_in_any_form(convert, header, expected):
    chat = "\n".join([header.format("Ann: hi: you"), "[1] second line", header.format("Bob: ok")])
    entries, left_out = convert({"chat.txt": chat})
    assert said(entries) == [("Ann", "hi: you\n[1] second line"), ("Bob", "ok")]
    assert entries[0]["time"] == expected and not left_out


@pytest.mark.parametrize(
    ("dates", "first", "assumed"),
    [
        (["1/2/26", "13/2/26"], "2026-02-01", False),  # no month is 13
        (["1/2/26", "2/13/26"], "2026-01-02", False),
        (["3/4/26", "4/4/26", "5/4/26", "1/5/26"], "2026-04-03", False),  # so time goes on
        (["4/3/26", "4/4/26", "4/5/26", "5/1/26"], "2026-04-03", False),
        (["26-04-03", "26-04-04", "26-05-01"], "2026-04-03", False),
        (["1/2/26", "2/2/26"], "2026-02-01", True),  # nothing decides
    ],
)
def test_the_order_of_day_and_month_is_that_of_the_whole_file(convert, dates, first, assumed):
    chat = "\n".join(f"{day}, 10:44 - {'AB'[i % 2]}: hi" for i, day in enumerate(dates))
    entries, _ = convert({"chat.txt": chat})
    assert entries[0]["time"][:10] == first
    note = "export: dates are read as dmy, for nothing decides: else --dates mdy"
    assert from_export.notes == assumed * [note]
    entries, _ = convert({"chat.txt": "1/2/26, 10:44 - A: a\n1/2/26, 10:44 - B: b"}, dates="mdy")
    assert entries[0]["time"][:10] == "2026-01-02"


# ---- WhatsApp: what is the app's and what the author's -----------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see <https://a.b>", "see <https://a.b>"),
        ("std::vector<int>", "std::vector<int>"),
        ("</h1>", "</h1>"),
        ("3 < 4 > 2", "3 < 4 > 2"),
        ("so <big grin>", "so <big grin>"),
        ("null and void", "null and void"),
        ("the image omitted a lot", "the image omitted a lot"),
        ("ok <This message was edited>", "ok"),
        ("ok \u200e<This message was edited>", "ok"),
        ("gut <Diese Nachricht wurde bearbeitet.>", "gut"),
        ("tamam <Bu mesaj düzenlendi>", "tamam"),
        ("<Media omitted>\nlook here", "look here"),
        ("<Medien ausgeschlossen>\nschau", "schau"),
        ("IMG-20261124-WA0001.jpg (file attached)\nlook\nhere", "look\nhere"),
        ("IMG-20261124-WA0001.jpg (Datei angehängt)\nschau", "schau"),
        ("look \u200e<attached: 00000012-PHOTO-2026-11-24-10-44-25.jpg>", "look"),
        ("look <pièce jointe : 00000012-PHOTO-2026-11-24-10-44-25.jpg>", "look"),
        ("look at this\u200eimage omitted", "look at this"),
        ("@\u2068Bob\u2069 hi", "@Bob hi"),
    ],
)
def test_the_words_of_a_person_stay_without_the_tags_around_them(convert, text, expected):
    entries, _ = convert({"chat.txt": f"24/11/26, 10:44 - Ann: {text}\n24/11/26, 10:44 - Bob: ok"})
    assert said(entries) == [("Ann", expected), ("Bob", "ok")]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("media", "<Media omitted>"),
        ("media", "<Multimedia omitido>"),
        ("media", "<Mídia oculta>"),
        ("media", "<Без медиафайлов>"),
        ("media", "<המדיה לא נכללה>"),
        ("media", "<省略多媒体文件>"),
        ("media", "null"),
        ("media", "IMG-20261124-WA0001.jpg (file attached)"),
        ("media", "STK-20261124-WA0001.webp (archivo adjunto)"),
        ("media", "AUD-20261124-WA0001. (file attached)"),
        ("media", "plan.pdf (file attached)\nplan"),
        ("media", "<Pominięto multimedia>\nplan.pdf"),
        ("media", "görüntü dahil edilmedi"),
        ("deleted", "This message was deleted"),
        ("deleted", "Diese Nachricht wurde gelöscht."),
        ("deleted", "Bu mesaj silindi"),
        ("deleted", "تم حذف هذه الرسالة."),
        ("deleted", "这条消息已被删除。"),
        ("call", "Missed voice call"),
        ("call", "Videollamada perdida"),
        ("location", "location: https://maps.google.com/?q=48.2,16.3"),
        ("location", "Standort: https://maps.google.com/?q=48.2,16.3"),
        ("location", "live location shared"),
        ("poll", "POLL:\nWhen?\nOPTION: Today (2 votes)\nOPTION: Never (0 votes)"),
        ("poll", "UMFRAGE:\nWann?\nOPTION: Heute (1 Stimme)"),
        ("app", "Waiting for this message. This may take a while."),
    ],
)
def test_what_whatsapp_wrote_is_left_out_in_many_languages(convert, kind, text):
    chat = f"24/11/26, 10:44 - Ann: {text}\n24/11/26, 10:44 - Ann: hi\n24/11/26, 10:44 - Bob: ok"
    entries, left_out = convert({"chat.txt": chat})
    assert said(entries) == [("Ann", "hi"), ("Bob", "ok")] and left_out == {kind: 1}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("media", "\u200eimage omitted"),
        ("media", "\u200f\u200eلم يتم إدراج الصورة"),
        ("media", "\u200e<attached: 00000012-PHOTO-2026-11-24-10-44-25.jpg>"),
        ("media", "\u200e<adjunto: 00000012-STICKER-2026-11-24-10-44-25.webp>"),
        ("media", "report.pdf • \u200e12 pages \u200edocument omitted"),
        ("media", "report.pdf • \u200e12 Seiten \u200e<Anhang: 00000012-report.pdf>"),
        ("deleted", "\u200eYou deleted this message."),
        ("app", "\u200eVoice call, \u200e1 min"),
        ("app", "\u200eMissed voice call. \u200eTap to call back"),
        ("app", "\u200e\u200eDein Code hat sich geändert. \u200eMehr"),
        ("app", "\u200eCy added you"),
        ("poll", "\u200ePOLL:\nWhen?\n\u200eOPTION: Today (\u200e2 votes)"),
        ("location", "\u200eLocation: https://maps.google.com/?q=48.2,16.3"),
    ],
)
def test_on_an_iphone_an_invisible_mark_tells_what_the_app_wrote(convert, kind, text):
    chat = "\r\n".join(f"[24/11/26, 10:44:25] {line}" for line in [f"Ann: {text}", "A: a", "B: b"])
    entries, left_out = convert({"chat.txt": "\ufeff" + chat})
    assert said(entries) == [("A", "a"), ("B", "b")] and left_out == {kind: 1}


@pytest.mark.parametrize(
    "notice",
    [
        "Messages and calls are end-to-end encrypted. Tap to learn more.",
        "Ann added Bob",
        'Ann changed the subject from "Plans: May" to "Plans: June"',
        "Ann ha creato il gruppo “Gita: mare”",
    ],
)
def test_a_notice_without_an_author_is_left_out(convert, notice):
    chat = f"24/11/26, 10:44 - {notice}\n24/11/26, 10:44 - A: a\n24/11/26, 10:44 - B: b"
    entries, left_out = convert({"chat.txt": chat})
    assert said(entries) == [("A", "a"), ("B", "b")] and left_out == {"app": 1}


def test_a_tag_that_no_table_knows_is_the_apps_if_it_comes_back(convert):
    texts = ["<Média kihagyva innen>", "<Média kihagyva innen>\nnézd", "jó <Média kihagyva innen>"]
    chat = "\n".join(f"24/11/26, 10:44 - {'AB'[i % 2]}: {text}" for i, text in enumerate(texts))
    entries, left_out = convert({"chat.txt": chat})
    assert said(entries) == [("B", "nézd"), ("A", "jó")] and left_out == {"media": 1}


# ---- authors -----------------------------------------------------------------------------------
def test_an_author_who_is_a_phone_number_becomes_a_person(convert):
    numbers = [
        "+43 660 0000001",
        "\u202a+43 660 0000001\u202c",
        "~\u202fAnn",
        "+1 (555) 010\u20110002",
        "\u202a+44\xa07700\xa0900000\u202c",
    ]
    chat = "\n".join(f"24/11/26, 10:44 - {name}: hi" for name in numbers)
    people = ["Person 1", "Person 1", "Ann", "Person 2", "Person 3"]
    assert [name for name, _ in said(convert({"chat.txt": chat})[0])] == people


def test_names_lose_what_is_invisible_but_not_what_makes_an_emoji(convert):
    farmer = "\U0001f468\u200d\U0001f33e"
    chat = f"24/11/26, 10:44 - A\x1b[2Jn\u202e  Lee: hi\n24/11/26, 10:44 - {farmer}: ok"
    assert said(convert({"chat.txt": chat})[0]) == [("A[2Jn Lee", "hi"), (farmer, "ok")]


def test_bots_are_known_by_name(convert):
    log = "[10:00:00] <ann> hi\n[10:00:01] <Nightbot> buy!\n[10:00:02] <bob> ok"
    entries, left_out = convert({"a.log": log})
    assert said(entries) == [("ann", "hi"), ("bob", "ok")] and left_out == {"bot": 1}
    assert len(convert({}, keep="bot")[0]) == 3


# ---- Telegram ----------------------------------------------------------------------------------
def telegram(text, name="Ann", **more):
    return {"type": "message", "from": name, "from_id": "user1", "text": text} | more


def test_telegram_keeps_what_people_wrote(convert):
    messages = [
        telegram("ciao", id=1),
        telegram(["see ", {"type": "link", "text": "https://a.it"}, " there"], "Bob"),
        telegram("a caption", photo="photos/1.jpg"),
        {"type": "message", "from": "Bob", "text_entities": [{"type": "plain", "text": "parts"}]},
        telegram("who?", None),
        telegram("", type="service", action="invite_members"),
        {"id": 9, "type": "unsupported"},
        telegram("", media_type="sticker", sticker_emoji="🙂"),
        telegram("news", forwarded_from="A channel"),
        telegram("found", via_bot="@gif"),
        telegram("a post", "News", from_id="channel7"),
        telegram("", poll={"question": "When?"}),
    ]
    entries, left_out = convert({"result.json": {"name": "Ann", "id": 7, "messages": messages}})
    assert said(entries) == [
        ("Ann", "ciao"),
        ("Bob", "see https://a.it there"),
        ("Ann", "a caption"),
        ("Bob", "parts"),
        (None, "who?"),
    ]
    kinds = {"app": 2, "media": 1, "forwarded": 1, "bot": 1, "channel": 1, "poll": 1}
    assert left_out == kinds and entries[0]["conversation"] == "Ann"


def test_telegrams_export_of_everything_gives_the_talks_between_people(convert):
    def chat(name, form, number, *names):
        messages = [telegram(f"hi from {who}", who) for who in names]
        return {"name": name, "type": form, "id": number, "messages": messages}

    chats = [
        chat("News", "public_channel", 1, "News"),
        chat("Helper", "bot_chat", 2, "Helper", "Me"),
        chat(None, "saved_messages", 3, "Me"),
        chat("Only mine", "private_supergroup", 4, "Me", "Me"),
        chat("Ann", "personal_chat", 5, "Ann", "Me"),
        chat("Ann", "personal_chat", 6, "Ann", "Me"),
    ]
    gone = [chat("Gone", "private_group", 8, "Cy", "Me")]
    export = {"chats": {"list": chats}, "left_chats": {"list": gone}}
    entries, left_out = convert({"result.json": export})
    assert [e["conversation"] for e in entries[::2]] == ["Ann 5", "Ann 6", "Gone"]
    assert left_out == {"channel": 1, "bot": 2, "notes": 1, "alone": 2}


def test_a_topic_of_a_forum_is_a_conversation(convert):
    messages = [
        telegram("", type="service", action="topic_created", id=10, title="Food"),
        telegram("soup?", id=11, reply_to_message_id=10),
        telegram("hello all", "Bob", id=12),
        telegram("bread", "Bob", id=13, reply_to_message_id=11),
        telegram("hello", id=14),
    ]
    entries, _ = convert({"result.json": {"name": "Home", "messages": messages}})
    talks = [(entry["conversation"], entry["message"]) for entry in entries]
    food, rest = ("Home / Food", "Home")
    assert talks == [(food, "soup?"), (food, "bread"), (rest, "hello all"), (rest, "hello")]


def test_telegrams_seconds_since_1970_count_before_its_clock(convert):
    hours = {"date": "2026-11-24T10:44:00"}
    messages = [
        telegram("b", date_unixtime="1795513500", **hours),
        telegram("a", "Bob", date_unixtime="1795513440", **hours),
    ]
    entries, _ = convert({"result.json": {"name": "x", "messages": messages}})
    assert [(e["message"], e["time"]) for e in entries] == [
        ("a", "2026-11-24T09:44:00"),
        ("b", "2026-11-24T09:45:00"),
    ]


# ---- the other apps ----------------------------------------------------------------------------
def test_discord(convert):
    def message(name, content, form="Default", **more):
        author = {"name": name, "nickname": "N", "isBot": name == "robot"}
        when = "2026-11-24T10:44:25.1234567+01:00"
        return {"type": form, "timestamp": when, "content": content, "author": author} | more

    messages = [
        message("ann", "hi"),
        message("bob", "yes?", "Reply"),
        message("ann", "Joined the server.", "GuildMemberJoin"),
        message("ann", "Started a call that lasted 3 minutes.", "Call"),
        message("robot", "beep"),
        message("bob", "", attachments=[{"url": "a.png"}]),
        message("bob", "", forwardedMessage={"content": "old"}),
    ]
    export = {"guild": {"name": "G"}, "channel": {"name": "general"}, "messages": messages}
    entries, left_out = convert({"a.json": export})
    assert said(entries) == [("ann", "hi"), ("bob", "yes?")]
    assert entries[0]["conversation"] == "G / general"
    assert entries[0]["time"] == "2026-11-24T09:44:25"
    assert left_out == {"app": 2, "bot": 1, "media": 1, "forwarded": 1}


def test_discord_csv(convert):
    csv = (
        "AuthorID,Author,Date,Content,Attachments,Reactions\n"
        '"1","ann#0001","24-Nov-26 10:44 AM","hi, ""all""\nof you","",""\n'
        '"2","bob","2026-11-24T10:45:25.1234567+00:00","ok","",""\n'
        '"2","bob","24-Nov-26 10:46 PM","","a.png",""\n'
    )
    entries, left_out = convert({"general.csv": csv})
    assert said(entries) == [("ann#0001", 'hi, "all"\nof you'), ("bob", "ok")]
    assert entries[0]["time"] == "2026-11-24T10:44:00" and left_out == {"media": 1}
    assert from_export.notes == [
        "nothing was understood in Attachments, AuthorID, Reactions of general"
    ]


def meta(name, text, minute, **more):
    return (
        {"sender_name": name, "timestamp_ms": 1795513440000 + 60000 * minute}
        | ({"content": text} if text else {})
        | more
    )


def test_instagram_is_newest_first_in_several_files_and_latin_1(convert):
    zoe, moji = "Zo\u00c3\u00ab", "\u00f0\u009f\u0098\u0082"
    people = {"participants": [{"name": zoe}, {"name": "Bob"}], "title": zoe}
    newer = [
        meta("Bob", "bye", 9),
        meta(zoe, f"Reacted {moji} to your message ", 8),
        meta(zoe, f"{zoe} sent an attachment.", 7),
        meta(zoe, f"{zoe} hat einen Anhang gesendet.", 7),
        meta("Bob", "Liked a message", 6),
        meta("Bob", "You sent me soup", 6),
        meta(zoe, None, 5, photos=[{"uri": "a.jpg"}]),
        meta(zoe, "x", 5, is_unsent=True),
        meta("Bob", "Audio call ended", 4, call_duration=3),
        meta(zoe, f"third {moji}", 4),
    ]
    older = [meta(zoe, "second", 3), meta("Bob", "first", 2)]
    files = {
        "inbox/zoe_1/message_1.json": people | {"messages": newer},
        "inbox/zoe_1/message_2.json": people | {"messages": older},
    }
    entries, left_out = convert(files)
    assert said(entries) == [
        ("Bob", "first"),
        ("Zoë", "second"),
        ("Zoë", "third 😂"),
        ("Bob", "You sent me soup"),
        ("Bob", "bye"),
    ]
    assert {entry["conversation"] for entry in entries} == {"Zoë"}
    assert left_out == {"app": 4, "media": 1, "deleted": 1, "call": 1}


def test_messengers_encrypted_chats_have_keys_of_their_own(convert):
    def message(name, text, **more):
        return {"senderName": name, "text": text, "timestamp": 1795513440000, "type": "text"} | more

    messages = [
        message("Zoë", "später"),
        message("Bob", "früher"),
        message("Bob", "", isUnsent=True),
        message("Bob", "", type="media", media=[{"uri": "a.jpg"}]),
    ]
    export = {"participants": ["Bob", "Zoë"], "threadName": "Zoë_12", "messages": messages}
    entries, left_out = convert({"Zoë_12.json": export})
    assert said(entries) == [("Zoë", "später"), ("Bob", "früher")]
    assert entries[0]["conversation"] == "Zoë" and left_out == {"deleted": 1, "media": 1}


def test_twitch_downloader(convert):
    def comment(name, text, seconds, **message):
        commenter = name and {"display_name": name, "name": name.lower()}
        message = {"body": text, "fragments": [{"text": "x"}]} | message
        return {"content_offset_seconds": seconds, "commenter": commenter, "message": message}

    comments = [
        comment("Ann", "hi", 5),
        comment("Bob", "later", 65, user_notice_params={"msg-id": None}),
        comment("Bob", "subscribed!", 66, user_notice_params={"msg-id": "resub"}),
        comment("Nightbot", "buy", 67),
        comment(None, "gone", 68),
    ]
    comments[1]["created_at"] = "2026-11-24T10:44:25Z"
    export = {"streamer": {"name": "ann"}, "comments": comments, "video": {}}
    entries, left_out = convert({"vod.json": export})
    assert sorted(said(entries), key=str) == [("Ann", "hi"), ("Bob", "later"), (None, "gone")]
    assert left_out == {"app": 1, "bot": 1}
    assert {e["message"]: e["time"] for e in entries}["later"] == "2026-11-24T10:44:25"


@pytest.mark.parametrize(
    ("log", "times"),
    [
        ("# Log started: 2026-11-24 10:00:00 +0100\n[10:44:25] <@Ann> hi\n[10:45] <+bob> ok", 24),
        ("[10:44:25] <Ann> hi\n[10:45:00] <bob> ok", None),
        ("[2026-11-24 10:44:25] <Ann> hi\n[2026-11-24 10:45:00] <bob> ok", 24),
        ("--- Log opened Tue Nov 24 09:00:00 2026\n10:44:25 < Ann> hi\n10:45 <@bob> ok", 24),
        ("--- Day changed Tue Nov 24 2026\n10:44:25 <Ann> hi\n10:45 -!- cy joined\n"
         "10:45 <bob> ok", 24),
        ("2026-11-24 10:44:25\t@Ann\thi\n2026-11-24 10:45:00\t-->\tcy joined\n"
         "2026-11-24 10:45:00\tbob\tok", 24),
        ("**** BEGIN LOGGING AT Tue Nov 24 09:00:00 2026\n\nNov 24 10:44:25 <Ann>\thi\n"
         "Nov 24 10:45:00 <bob>\tok", 24),
        ("Session Start: Tue Nov 24 09:00:00 2026\n[10:44:25] <Ann> hi\n[10:45] <bob> ok", 24),
        ("[10:44:25] Ann: hi\n[10:45:00] bob: ok", None),
        ("[2026-11-24 10:44:25 UTC] Ann: hi\n[2026-11-24 10:45:00 UTC] bob: ok", 24),
    ],
)  # fmt: skip
def test_logs_of_irc_and_twitch(convert, log, times):
    entries, left_out = convert({"a.log": log})
    assert said(entries) == [("Ann", "hi"), ("bob", "ok")] and set(left_out) <= {"app"}
    day = "2026-11-24" if times else "1970-01-01"
    assert [e["time"] for e in entries] == [f"{day}T10:44:25", f"{day}T10:45:00"]


def test_a_log_goes_on_after_midnight_and_may_have_its_day_in_its_name(convert):
    log = "[23:59:50] <ann> late\n[00:00:10] <bob> early\n[00:00:05] <ann> a clock that goes wrong"
    entries, _ = convert({"#home.2026-11-24.log": log})
    assert [entry["time"][8:] for entry in entries] == ["24T23:59:50", "25T00:00:05", "25T00:00:10"]


def test_every_day_of_a_channel_may_be_a_file(convert):
    log = "[10:44:25] <ann> hi\n[10:45:00] <bob> ok"
    entries, _ = convert({f"#home/2026-11-{day}.log": log for day in (23, 24)})
    assert [entry["time"][8:10] for entry in entries] == ["23", "23", "24", "24"]
    assert {entry["conversation"] for entry in entries} == {"#home"}


def test_slack_has_names_in_a_file_of_their_own(convert):
    def message(user, text, second, **more):
        return {
            "type": "message",
            "user": user,
            "text": text,
            "ts": f"17955134{second}.0001",
        } | more

    files = {
        "general/2026-11-24.json": [
            message("U1", "hi <@U2> &amp; all, <https://a.b|look>", 41),
            message("U2", "see <https://c.d>", 42),
            message("U3", "who am I", 43, user_profile={"real_name": "Cy"}),
            message("U1", "has joined", 44, subtype="channel_join"),
            message("U1", "beep", 45, bot_id="B1"),
            message("U1", "soup?", 46, thread_ts="1795513446.0001"),
            message("U2", "yes", 47, thread_ts="1795513446.0001"),
        ],
        "users.json": [
            {"id": "U1", "name": "ann.l", "profile": {"display_name": "", "real_name": "Ann Lee"}},
            {"id": "U2", "name": "bob", "profile": {"display_name": "Bob"}},
        ],
    }
    entries, left_out = convert(files)
    assert said(entries) == [
        ("Ann Lee", "hi @Bob & all, look"),
        ("Bob", "see https://c.d"),
        ("Cy", "who am I"),
        ("Ann Lee", "soup?"),
        ("Bob", "yes"),
    ]
    assert [e["conversation"] for e in entries[2:4]] == ["general", "general / 1795513446.0001"]
    assert left_out == {"app": 1, "bot": 1}


def test_signal_export(convert):
    chat = """\
[2026-11-24 10:44:25] Me: hello  \n(- Ann: 👍 -)
[2026-11-24 10:44:30] Ann: \n\n> hello\n\nhi, 1 > 0  \n![a](media/a.jpg)
[2026-11-24 10:44:35] Ann: (media not exported)
[2026-11-24 10:44:40] Ann: (This message was deleted)
"""
    files = {"Ann/chat.md": chat, "Note to Self/chat.md": chat[: chat.index("(- ")]}
    entries, left_out = convert(files)
    assert said(entries) == [("Me", "hello"), ("Ann", "hi, 1 > 0")]
    assert entries[0]["conversation"] == "Ann"
    assert left_out == {"media": 1, "deleted": 1, "notes": 1}


def test_imessage_exporter(convert):
    chat = """\
Nov 24, 2026 10:44:25 AM (Read by you after 5 seconds)
Me
one

two
Tapbacks:
Loved by Ann

Nov 24, 2026  1:44:30 PM
Ann
better
Edited 15 seconds later: best
This message responded to an earlier message.
    Nov 24, 2026  1:45:00 PM
    Me
    an answer

Nov 24, 2026  1:45:00 PM
Me
an answer
This message responded to an earlier message.

Nov 24, 2026  1:46:00 PM You named the conversation Home

Nov 24, 2026  1:47:00 PM
Ann
/Users/me/Library/Messages/Attachments/a/b.heic
"""
    entries, left_out = convert({"+15550100.txt": chat})
    assert said(entries) == [("Me", "one\n\ntwo"), ("Ann", "best"), ("Me", "an answer")]
    assert [entry["time"][11:] for entry in entries] == ["10:44:25", "13:44:30", "13:45:00"]
    assert left_out == {"app": 1, "media": 1} and entries[0]["conversation"] == "Person 1"


def test_google_chat(convert):
    def message(name, text, when, **more):
        creator = {"name": name, "email": "a@b.c", "user_type": "Bot" if name == "B" else "Human"}
        return {"creator": creator, "created_date": when, "text": text} | more

    messages = [
        message("Ann", "hi", "Tuesday, November 24, 2026 at 10:44:25\u202fAM UTC"),
        message("Bob", "ok", "Tuesday, November 24, 2026 at 10:45:25 PM UTC"),
        message("B", "beep", "Tuesday, November 24, 2026 at 10:46:25 PM UTC"),
        message(
            "Bob", "", "Tuesday, November 24, 2026 at 10:47:25 PM UTC", message_state="DELETED"
        ),
    ]
    entries, left_out = convert({"DM abc/messages.json": {"messages": messages}})
    assert said(entries) == [("Ann", "hi"), ("Bob", "ok")]
    assert [e["time"] for e in entries] == ["2026-11-24T10:44:25", "2026-11-24T22:45:25"]
    assert entries[0]["conversation"] == "DM abc" and left_out == {"bot": 1, "deleted": 1}


def test_matrix(convert):
    def event(name, form="m.room.message", **content):
        when = 1795513440000
        return {
            "type": form,
            "sender": f"@{name}:a.org",
            "origin_server_ts": when,
            "content": content,
        }

    messages = [
        event("ann", msgtype="m.text", body="hi"),
        event(
            "bob",
            msgtype="m.text",
            body="> <@ann:a.org> hi\n> all\n\nyes\n> no quotation",
            **{"m.relates_to": {"m.in_reply_to": {"event_id": "$1"}}},
        ),
        event("ann", msgtype="m.text", body="* hi!", **{"m.relates_to": {"rel_type": "m.replace"}}),
        event("ann", msgtype="m.notice", body="beep"),
        event("ann", msgtype="m.image", body="a.png"),
        event("cy", "m.room.member", membership="join"),
        event("ann"),
    ]
    entries, left_out = convert({"export.json": {"room_name": "Home", "messages": messages}})
    assert said(entries) == [("ann", "hi"), ("bob", "yes\n> no quotation")]
    assert entries[0]["conversation"] == "Home"
    assert left_out == {"app": 2, "bot": 1, "media": 1, "deleted": 1}


# ---- lists, CSV, training sets -----------------------------------------------------------------
@pytest.mark.parametrize("author", ["author", "sender", "username", "user", "from", "name", "Nick"])
@pytest.mark.parametrize("text", ["message", "text", "content", "Body"])
def test_a_list_of_messages_under_the_keys_of_other_programs(convert, author, text):
    log = [{"date": "26/12/24", "time": "6:06", author: name, text: "hi"} for name in "AB"]
    for content in (log, {"messages": log}, "\n".join(json.dumps(entry) for entry in log)):
        entries, _ = convert({"a.json": content})
        assert said(entries) == [("A", "hi"), ("B", "hi")]
        assert entries[0]["time"] == "2024-12-26T06:06:00"


@pytest.mark.parametrize(
    ("value", "time"),
    [
        (1795513440, "2026-11-24T09:44:00"),
        ("1795513440.5", "2026-11-24T09:44:00"),
        (1795513440000, "2026-11-24T09:44:00"),
        ("2026-11-24T10:44:25Z", "2026-11-24T10:44:25"),
        ("Tue, 24 Nov 2026 10:44:25 +0100", "2026-11-24T09:44:25"),
        ("24.11.2026", "2026-11-24T00:00:00"),
        ("no time", None),
        (float("inf"), None),
        (float("nan"), None),
        ("99.99.2026, 10:44", None),
        ("24.11.2026, 10:99", None),
    ],
)
def test_times_of_lists(convert, value, time):
    log = [{"timestamp": value, "user": {"name": name, "id": 7}, "text": "hi"} for name in "AB"]
    assert [entry.get("time") for entry in convert({"a.json": log})[0]] == [time, time]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_a_header(convert, delimiter):
    rows = [["Date", "Chat", "From", "Text"], ["24/11/26 10:44", "Home", "Ann", "hi"]]
    rows += [["24/11/26 10:45", "Home", "Bob", "ok"], ["", "", "", ""]]
    text = "\n".join(delimiter.join(row) for row in rows)
    for content in (text, text.encode("utf-16"), "\ufeff" + text.replace("\n", "\r\n")):
        entries, _ = convert({"a.csv": content})
        assert said(entries) == [("Ann", "hi"), ("Bob", "ok")]
        assert entries[0]["conversation"] == "Home"


def test_a_log_that_runs_backwards_is_turned(convert):
    rows = [
        "time,author,message",
        "2026-11-24 10:45,B,3",
        "2026-11-24 10:44,A,2",
        "2026-11-24 10:44,B,1",
    ]
    assert [message for _, message in said(convert({"a.csv": "\n".join(rows)})[0])] == list("123")


TURNS = [("system", "You are Ann."), ("user", "hi?"), ("assistant", "hello"), ("user", "so?")]
TURNS = [*TURNS, ("assistant", "soup")]


@pytest.mark.parametrize(
    ("rows", "pairs"),
    [
        ([{"prompt": "a", "completion": "b"}], [("a", "b")]),
        ([{"instruction": "a", "input": "", "output": "b"}], [("a", "b")]),
        ([{"instruction": "a", "input": "c", "output": "b"}], [("a\n\nc", "b")]),
        ([{"question": "a", "answer": "b", "id": 7}], [("a", "b")]),
        ([{"prompt": "a", "response": "b"}], [("a", "b")]),
        (
            [{"text": "Q: a\nA: b"}, {"text": "Q: c\nA: d\nQ: e\nA: f"}],
            [("a", "b"), ("c\nA: d\nQ: e", "f")],
        ),
        ([{"text": "### Instruction:\na\n\n### Response:\nb"}], [("a\n", "b")]),
        (
            [{"messages": [{"role": role, "content": text} for role, text in TURNS]}],
            [
                ("You are Ann.\n\nhi?", "hello"),
                ("You are Ann.\n\nhi?\n\nhello\n\nso?", "soup"),
            ],
        ),
        (
            [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
            [("a", "b")],
        ),
    ],
)
def test_a_training_set_becomes_pairs(convert, rows, pairs):
    for content in (json.dumps(rows), "\n".join(json.dumps(row) for row in rows)):
        read = from_export.read("a.jsonl", content.encode())[1]
        assert [(pair["prompt"], pair["completion"]) for pair in read] == pairs


def test_texts_without_questions_are_messages(convert):
    entries, _ = convert({"a.json": [{"text": "hi"}, {"text": "you"}]})
    assert entries == [
        {"conversation": "a", "message": "hi"},
        {"conversation": "a", "message": "you"},
    ]


# ---- several files -----------------------------------------------------------------------------
def test_a_message_that_two_exports_hold_is_read_once(convert):
    old = "24/11/26, 10:44 - Ann: hi\n24/11/26, 10:44 - Ann: hi\n24/11/26, 10:45 - Bob: ok"
    new = old.split("\n", 1)[1] + "\n24/11/26, 10:46 - Ann: more\n24/11/26, 10:46 - Ann: more"
    entries, left_out = convert({"Ann.txt": old, "Ann (1).txt": new})
    assert said(entries) == [("Ann", "hi")] * 2 + [("Bob", "ok")] + [("Ann", "more")] * 2
    assert left_out == {"copy": 2}


def test_without_times_nothing_is_a_copy(convert):
    files = {f"{folder}/chat.json": [{"text": "ok"}, {"text": "ok"}] for folder in "ab"}
    assert len(convert(files)[0]) == 4 and len(convert({"c/chat.json": [{"text": "ok"}]})[0]) == 5


def test_conversations_are_named_by_file_or_folder(convert):
    chat = "24/11/26, 10:44 - A: a\n24/11/26, 10:44 - B: b"
    names = ["Chat WhatsApp con Ann.txt", "Чат WhatsApp с Bob.txt", "Cy/_chat.txt", "Cy/notes.txt"]
    entries, _ = convert({name: chat for name in names})
    expected = ["Chat WhatsApp con Ann", "Cy", "notes", "Чат WhatsApp с Bob"]
    assert sorted({entry["conversation"] for entry in entries}) == expected
    log = [{"channel": "\u202e", "user": name, "text": "hi"} for name in "AB"]
    assert {e["conversation"] for e in convert({"no name.json": log})[0]} == {*expected, "no name"}


# ---- the command -------------------------------------------------------------------------------
CHAT = """\
24/11/26, 10:44 - Messages and calls are end-to-end encrypted.
24/11/26, 10:44 - Ann Lee: hi
24/11/26, 10:45 - Bob: ok
24/11/26, 10:46 - Ann Lee: <Media omitted>
25/11/26, 10:46 - Ann Lee: soup?
"""
ENTRY = '{"conversation": "WhatsApp Chat with Bob", "time": "2026-11-24T10:44:00", '
WRITTEN = ENTRY + '"author": "Ann Lee", "message": "hi"}'


@pytest.fixture
def home(tmp_path):
    """A project of the script alone, in a folder whose name holds a space, and an export."""
    raw = tmp_path / "my project/data/raw"
    raw.mkdir(parents=True)
    (raw / "from_export.py").write_bytes(SCRIPT.read_bytes())
    (tmp_path / "chat.txt").write_text(CHAT, "utf-8")
    return tmp_path


@pytest.fixture
def export(home, run):
    """Return export("chat.txt", …): the finished run on files of `home`."""

    def export(*arguments, **kwargs):
        return run(home / "my project", "data/raw/from_export.py", *arguments, cwd=home, **kwargs)

    return export


def raw(home):
    """Return what lies in data/raw, locks aside."""
    folder = home / "my project/data/raw"
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    del files["from_export.py"]
    return {name: content for name, content in files.items() if not name.endswith(".lock")}


def failed(result):
    """Return the error of a run that must have ended as every script of the guide does."""
    assert result.returncode == 1 and "Traceback" not in result.stderr
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ") and " FIX: " in error
    return error


def test_a_zip_becomes_a_log_and_the_next_command_is_named(home, export):
    with zipfile.ZipFile(home / "WhatsApp Chat with Bob.zip", "w") as archive:
        archive.writestr("_chat.txt", CHAT)
        archive.writestr("__MACOSX/._chat.txt", "x")
        archive.writestr("a.jpg", "x")
    result = export("WhatsApp Chat with Bob.zip")
    assert result.returncode == 0 and result.stderr == ""
    lines = raw(home)["messages_sample.json"].decode().splitlines()
    assert lines[0] == "[" and lines[1] == WRITTEN + "," and lines[-1] == "]" and len(lines) == 5
    told = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert told == [
        "read 1 WhatsApp, WhatsApp Chat with Bob.zip/_chat.txt",
        "conversations 1",
        "3 WhatsApp Chat with Bob",
        "authors 2",
        "2 Ann Lee",
        "1 Bob",
        "period 2026-11-24 to 2026-11-25",
        "left out 1 written by the app itself (app): Messages and calls are end-to-end encryp",
        "left out 1 media without words (media): <Media omitted>",
        "",
        "wrote my project/data/raw/messages_sample.json: 3 entries; delete what it must not learn",
        "next VERSION=sample python build_train.py --only-author 'Ann Lee' # to answer as one of"
        " them",
        "VERSION=sample python build_train.py # to answer as anybody",
    ]


def test_the_author_of_most_conversations_is_the_one_to_learn(home, export):
    for number in range(3):
        lines = [f"24/11/26, 10:44 - Me: hi {number}"] + [
            f"24/11/26, 10:44 - {'XYZ'[number]}: ok"
        ] * 9
        (home / f"{number}.txt").write_text("\n".join(lines))
    assert "--only-author Me " in export("0.txt", "1.txt", "2.txt").stdout


def test_without_an_argument_it_says_what_to_type(home, export):
    result = export()
    assert result.returncode == 2
    assert result.stderr.endswith("from_export.py' 'WhatsApp Chat with Ann.zip'\n")
    (home / "my project/data/raw/My chat.txt").write_text(CHAT)
    typed = export().stderr.splitlines()[-1]
    done = subprocess.run(["bash", "-c", typed], cwd=home, env=os.environ | {"VERSION": "two"})
    assert done.returncode == 0 and "messages_two.json" in raw(home)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("notes.txt", "Dear diary\n", "notes.txt is a text that begins with 'Dear diary'; known"),
        ("a.html", "<!DOCTYPE html><p>", "Machine-readable JSON"),
        ("a.json", '{"messages": [{"type": "mess', "a.json is damaged JSON"),
        ("a.json", "[" * 100000, "not as its app writes it"),
        ("a.json", '{"a": ' * 100000, "not as its app writes it"),
        ("a.json", '{"songs": [], "title": "x"}', "JSON with the keys songs, title"),
        ("a.json", "[]", "JSON with the keys (none)"),
        ("a.json", "[1, null]", "JSON with the keys (none)"),
        ("a.json", '[{"previous_messages": ["a"], "message": "b"}]', "copy it into data/raw"),
        ("a.json", '{"messages": [{"type": 1, "text": 2}, 3]}', "not as its app writes it"),
        ("a.json", '{"chats": {"list": 7}}', "not as its app writes it"),
        ("a.csv", "a,b\n1,2\n", "a text that begins with 'a,b"),
        ("a.txt", "", "a.txt is empty"),
        ("a.txt", b"\x00\x01\x02", "a.txt is no text"),
        ("a.txt", "\x1b[2J\u202e", "begins with '\\x1b[2J\\u202e'"),
        ("a.zip", b"PK\x05\x06" + bytes(18), "holds no such file"),
        ("a.zip", b"PK\x03\x04" + bytes(100), "a.zip is no text"),
    ],
)  # fmt: skip
def test_what_no_reader_knows_gets_an_error(home, name, content, what):
    (home / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SystemExit) as end:
        from_export.read_files([str(home / name)], None)
    assert what in end.value.code and "FIX: export the chat again" in end.value.code


def test_an_error_writes_nothing_and_is_one_line_with_its_fix(home, export):
    (home / "chat.txt").write_text("24/11/26, 10:44 - Ann: hi\n24/11/26, 10:44 - Ann: you")
    assert "nothing is left that people said to each other" in failed(export("chat.txt"))
    (home / "chat.txt").write_text("Dear\ndiary")
    assert "chat.txt is a text that begins with 'Dear\\ndiary'" in failed(export("chat.txt"))
    assert raw(home) == {}


def test_a_file_that_is_not_there_gets_the_nearest_name(home, export):
    assert failed(export("chatt.txt")).endswith("from_export.py' chat.txt")
    assert failed(export("elsewhere/x.zip")).endswith("drag the file into this window")


def test_in_a_folder_what_is_no_chat_is_told_and_not_an_error(home, export):
    folder = home / "Downloads"
    (folder / "deep er").mkdir(parents=True)
    (folder / "deep er/chat.txt").write_text(CHAT)
    (folder / "bill.txt").write_text("Dear customer")
    (folder / ".hidden.txt").write_text(CHAT)
    (folder / "loop").symlink_to(folder)
    result = export("Downloads")
    assert (
        result.returncode == 0
        and "not read              1  Downloads/bill.txt: a text" in result.stdout
    )
    assert len(json.loads(raw(home)["messages_sample.json"])) == 3
    assert "Dear customer" in failed(export("Downloads/deep er", "Downloads/bill.txt"))


def test_chats_and_training_sets_do_not_mix(home, export):
    (home / "set.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "chats and training sets" in failed(export("chat.txt", "set.jsonl"))
    assert (
        export("set.jsonl").stdout.splitlines()[-1] == "next  VERSION=sample python build_train.py"
    )
    assert json.loads(raw(home)["messages_sample.json"]) == [{"prompt": "a", "completion": "b"}]


def test_another_export_is_not_written_over_unless_told(home, export):
    assert export("chat.txt").returncode == 0
    first = raw(home)
    assert export("chat.txt").returncode == 0 and raw(home) == first
    (home / "chat.txt").write_text(CHAT + "25/11/26, 10:47 - Bob: yes\n")
    assert "edited by hand. FIX: add --replace" in failed(export("chat.txt")) and raw(home) == first
    assert export("chat.txt", "--version", "two").returncode == 0
    assert raw(home)["messages_sample.json"] == first["messages_sample.json"]
    assert export("chat.txt", "--replace").returncode == 0
    assert raw(home)["messages_sample.json"] == raw(home)["messages_two.json"]


def test_kinds_can_be_kept(home, export):
    assert export("chat.txt", "--keep", "app, media").returncode == 0
    assert len(json.loads(raw(home)["messages_sample.json"])) == 5
    result = export("chat.txt", "--keep", "apps")
    assert result.returncode == 2 and "choose from app, deleted, call" in result.stderr


@pytest.mark.parametrize(
    ("version", "fix"), [("my chat", "my_chat"), ("../x", "_x"), (".x", "x"), ("-", "v1")]
)
def test_a_version_is_a_name_for_a_file(export, version, fix):
    error = failed(export("chat.txt", env={"VERSION": version}))
    assert error.endswith(f"is not a name for a file. FIX: --version {fix}")


def test_v1_is_the_default(home, export):
    assert export("chat.txt", env={"VERSION": None}).returncode == 0
    assert list(raw(home)) == ["messages_v1.json"]


# ---- whole or not at all, and nowhere else -----------------------------------------------------
def test_a_second_run_on_the_same_name_is_refused(home, export):
    with open(home / "my project/data/raw/.messages_sample.json.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is writing" in failed(export("chat.txt"))
        assert export("chat.txt", "--version", "two").returncode == 0
    assert export("chat.txt").returncode == 0


@pytest.mark.parametrize("kind", ["folder", "dangling link", "link", "lines"])
def test_a_target_that_cannot_be_replaced_is_told_before_the_work(home, export, kind):
    target = home / "my project/data/raw/messages_sample.json"
    other = home / "other.json"
    other.write_text("[]")
    {
        "folder": target.mkdir,
        "dangling link": lambda: target.symlink_to("nowhere"),
        "link": lambda: target.symlink_to(other),
        "lines": target.with_suffix(".jsonl").touch,
    }[kind]()
    assert "is not there" not in failed(export("there is no such file"))
    assert other.read_text() == "[]"


def test_a_full_disk_leaves_what_was_there(home, export):
    assert export("chat.txt").returncode == 0
    first = raw(home)
    (home / "chat.txt").write_text(CHAT * 1000)
    limit = 'ulimit -f 4; exec "$0" "$@"'
    command = [
        sys.executable,
        str(home / "my project/data/raw/from_export.py"),
        "chat.txt",
        "--replace",
    ]
    env = os.environ | {"VERSION": "sample"}
    result = subprocess.run(
        ["bash", "-c", limit, *command], cwd=home, env=env, capture_output=True, encoding="utf-8"
    )
    assert "File too large" in failed(result)
    assert raw(home)["messages_sample.json"] == first["messages_sample.json"]


def test_ctrl_c_ends_it_quietly(home, export):
    (home / "chat.txt").write_text(CHAT * 20000)
    process = export(
        "chat.txt", start=subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    lock = home / "my project/data/raw/.messages_sample.json.lock"
    while not lock.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == (b"", b"") and process.returncode == 130
    assert raw(home) == {}


def test_nothing_of_a_zip_is_unpacked(home, export):
    with zipfile.ZipFile(home / "a.zip", "w") as archive:
        archive.writestr("../../outside.txt", CHAT)
        archive.writestr("/tmp/from_export_outside.txt", CHAT.replace("Bob", "Cy"))
    before = {path for path in home.rglob("*") if "data/raw" not in str(path)}
    assert export("a.zip").returncode == 0
    assert {path for path in home.rglob("*") if "data/raw" not in str(path)} == before
    assert not Path("/tmp/from_export_outside.txt").exists()


def test_a_zip_that_would_not_fit_into_memory_is_refused(home, monkeypatch):
    with zipfile.ZipFile(home / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"{number}.txt", bytes(1 << 20))
    monkeypatch.setattr(from_export, "MOST_BYTES", 3 << 20)
    assert len(list(from_export.files_in(home / "bomb.zip"))) == 3
    monkeypatch.setattr(from_export, "MOST_BYTES", (3 << 20) - 1)
    with pytest.raises(SystemExit, match=r"bomb.zip holds over .* FIX: unzip it"):
        list(from_export.files_in(home / "bomb.zip"))


def test_a_zip_that_is_damaged_or_has_a_password_is_told(home, export):
    with zipfile.ZipFile(home / "a.zip", "w") as archive:
        archive.writestr("chat.txt", CHAT)
    content = (home / "a.zip").read_bytes()
    where = content.index(b"PK\x01\x02")
    (home / "a.zip").write_bytes(content.replace(b"Ann Lee", b"Ann Lea"))
    assert "cannot be unpacked: Bad CRC-32" in failed(export("a.zip"))
    locked = bytearray(content)
    locked[6] |= 1
    locked[where + 8] |= 1
    (home / "a.zip").write_bytes(locked)
    assert "cannot be unpacked" in failed(export("a.zip"))


# ---- untrusted text, odd surroundings ----------------------------------------------------------
def test_hostile_text_reaches_neither_the_terminal_nor_the_shell(home, export):
    name = "A\x1b[2J\u202e'; rm -rf ~; '"
    log = [
        {"author": who, "text": text}
        for who, text in [(name, "\ud800\x07\x9b\x00hi"), ("B", "ok")] * 2
    ]
    (home / "a\x1b[2J.json").write_text(json.dumps(log))
    result = export("a\x1b[2J.json")
    assert result.returncode == 0
    assert all(c.isprintable() or c == "\n" for c in result.stdout)
    entries = json.loads(raw(home)["messages_sample.json"].decode("utf-8"))
    assert entries[0]["author"] == "A[2J'; rm -rf ~; '" and entries[0]["message"] == "?hi"
    assert """--only-author 'A[2J'"'"'; rm -rf ~; '"'"'' """ in result.stdout


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        {"PYTHONOPTIMIZE": "2", "PYTHONHASHSEED": "7"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"HOME": "/nowhere", "TERM": "dumb", "COLUMNS": "1"},
    ],
)
def test_the_same_bytes_in_any_surroundings(home, export, env):
    chat = CHAT.replace("Bob", "Zoë 🙂")
    (home / "chat.txt").write_text(chat, "utf-8")
    assert export("chat.txt").returncode == 0
    first = raw(home)
    result = export("chat.txt", env=env, stdin=subprocess.DEVNULL)
    assert result.returncode == 0 and result.stderr == "" and raw(home) == first


def test_head_ends_it_quietly(home):
    script = str(home / "my project/data/raw/from_export.py")
    command = f"'{sys.executable}' '{script}' chat.txt | true; echo ${{PIPESTATUS[0]}}"
    env = os.environ | {"VERSION": "sample"}
    result = subprocess.run(
        ["bash", "-c", command], cwd=home, env=env, capture_output=True, text=True
    )
    assert (result.stdout, result.stderr) == ("0\n", "") and "messages_sample.json" in raw(home)


def test_files_beside_the_script_are_not_its_modules(home, export):
    for folder in (home, home / "my project/data/raw"):
        for name in ("json", "signal", "csv", "dateutil", "argparse"):
            (folder / f"{name}.py").write_text("raise SystemExit('ran')")
    assert export("chat.txt").returncode == 0


def test_it_finds_its_project_through_a_link(home, run):
    (home / "bin").mkdir()
    (home / "bin/from_export.py").symlink_to(home / "my project/data/raw/from_export.py")
    assert run(home / "bin", "from_export.py", home / "chat.txt", cwd="/").returncode == 0
    assert "messages_sample.json" in raw(home)


def test_without_the_environment_it_says_so(home):
    command = [sys.executable, "-I", "-S", home / "my project/data/raw/from_export.py", "chat.txt"]
    result = subprocess.run(command, cwd=home, capture_output=True, encoding="utf-8")
    assert failed(result).endswith("FIX: source venv/bin/activate; pip install -r requirements.txt")


def test_a_pipe_is_not_waited_for(home, export):
    os.mkfifo(home / "pipe.txt")
    assert "pipe.txt is not there, or no file" in failed(export("pipe.txt", timeout=20))
    assert "holds no such file" in failed(export("my project", timeout=20))


@pytest.mark.parametrize(
    "text",
    [
        " ",
        "\n",
        "!",
        "<",
        "a <",
        "\u200e<",
        "(1 ",
        "1",
        "1/",
        "1/2/26, 10:44",
        ":",
        "\t",
        "a ",
        "«",
    ],
)
@pytest.mark.parametrize(
    "head", ["24/11/26, 10:44 - Ann: ", "[10:44:25] <ann> ", "", "from,text\na,"]
)
def test_no_text_takes_long(head, text):
    content = (head + text * (50_000 // len(text))).encode()
    start = time.monotonic()
    try:
        _, messages = from_export.read("a.txt", content)
        from_export.sort_out([("a.txt", "", from_export.read_times(messages, None, "a"))], set())
    except from_export.UnknownFileError:
        pass
    assert time.monotonic() - start < 2
