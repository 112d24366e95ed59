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
    """Return convert({"chat.txt": …}, keep=["bot"]): (entries, {kind: number left out})."""
    from_export.notes.clear()
    from_export.slack_names.clear()

    def convert(files, keep=(), dates=None):
        for name, content in files.items():
            path = tmp_path / "export" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = content if isinstance(content, str | bytes) else json.dumps(content)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        read, _ = from_export.read_files([str(tmp_path / "export")], dates)
        conversations, left_out = from_export.sort_out(read, keep)
        counts = {kind: len(texts) for kind, texts in left_out.items()}
        return from_export.entries_of(conversations), counts

    return convert


def said(entries):
    """Return ["Ann: hi", …]."""
    return [f"{entry.get('author')}: {entry['message']}" for entry in entries]


def gives(result, *talk, **left_out):
    """Check what was said and how much of each kind was left out; return the entries."""
    entries, counts = result
    assert said(entries) == list(talk) and counts == left_out
    return entries


def of(key, entries):
    return [entry.get(key) for entry in entries]


# ---- WhatsApp ----------------------------------------------------------------------------------
ANDROID, IPHONE = "24/11/26, 10:44 - {}", "[24/11/26, 10:44:25] {}"


@pytest.mark.parametrize(
    ("clock", "headers"),
    [
        ("00:04:00", "11/24/26, 12:04 AM - "),
        ("02:15:00", "24/11/26, 2:15 at night - "),
        ("09:15:00", "24/11/26, 9:15 in the morning - "),
        ("10:44:00", "24/11/26, 10:44 - |24. 11. 2026, 10:44 - |24.11.2026 klo 10.44 - "),
        ("10:44:00", "24.11.2026 г., 10:44 ч. - |24/11/26 10:44 a.\xa0m. - |2026-11-24 10:44 - "),
        ("10:44:00", "2026/11/24 上午10:44 - |24/11/2569 10:44 - |२४/११/२६, १०:४४ - "),
        ("10:44:00", "10:44, 24/11/2026 - "),
        ("10:44:25", "[24/11/26, 10:44:25] |[24.11.26 10.44.25] |\u200e[24/11/2026, 10:44:25] "),
        ("13:44:00", "2026年11月24日 下午1:44 - |2026년 11월 24일 오후 1:44 - "),
        ("21:15:00", "24/11/26, 9:15 in the evening - |24/11/26, 9:15 at night - "),
        ("21:15:00", "24/11/26 9:15 de la noche - |24/11/26, 9:15 μ.μ. - "),
        ("22:44:00", "11/24/26, 10:44\u202fPM - |٢٤‏/١١‏/٢٠٢٦، ١٠:٤٤ م - "),
        ("22:44:25", "11/24/26, 10:44:25 PM: |[11/24/26, 10:44:25\u202fPM] "),
        ("22:44:25", "\u200f[٢٤‏/١١‏/٢٠٢٦، ١٠:٤٤:٢٥ م] "),
    ],
)
def test_a_message_of_whatsapp_begins_with_a_date_in_any_form(convert, clock, headers):
    for header in headers.split("|"):
        result = convert({"a.txt": f"{header}Ann: hi: you\n[1] second line\n{header}Bob: ok"})
        entries = gives(result, "Ann: hi: you\n[1] second line", "Bob: ok")
        assert entries[0]["time"] == f"2026-11-24T{clock}", header


@pytest.mark.parametrize(
    ("dates", "first", "else_"),
    [
        ("1/2/26 13/2/26", "2026-02-01", ""),  # no month is 13
        ("1/2/26 2/13/26", "2026-01-02", ""),
        ("3/4/26 4/4/26 5/4/26 1/5/26", "2026-04-03", ""),  # so time goes on
        ("4/3/26 4/4/26 4/5/26 5/1/26", "2026-04-03", ""),
        ("1/5/26 5/4/26 4/4/26 3/4/26", "2026-04-03", ""),  # or back
        ("26-04-03 26-04-04 26-05-01", "2026-04-03", ""),
        ("1/2/26 2/2/26", "2026-02-01", "mdy"),  # nothing decides
    ],
)
def test_the_order_of_day_and_month_is_that_of_the_whole_file(convert, dates, first, else_):
    chat = "\n".join(f"{day}, 9:44 - {'AB'[i % 2]}: hi" for i, day in enumerate(dates.split()))
    assert convert({"chat.txt": chat})[0][0]["time"][:10] == first
    assert [note[-3:] for note in from_export.notes] == ([else_] if else_ else [])


def test_where_nothing_decides_american_capitals_or_the_setting_do(convert):
    chat = "1/2/26, 9:44 AM - A: a\n1/2/26, 9:44 AM - B: b"
    assert convert({"chat.txt": chat})[0][0]["time"][:10] == "2026-01-02"
    assert convert({"chat.txt": chat}, dates="dmy")[0][0]["time"][:10] == "2026-02-01"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *[(text, text) for text in ("see <https://a.b>", "std::vector<int>", "</h1>", "3 < 4 > 2")],
        *[(text, text) for text in ("so <big grin>", "the image omitted a lot", "oh. (it is)")],
        ("ok \u200e<This message was edited>", "ok"),
        ("gut <Diese Nachricht wurde bearbeitet.>", "gut"),
        ("<Media omitted>\nlook here", "look here"),
        ("IMG-20261124-WA0001.jpg (file attached)\nlook\nhere", "look\nhere"),
        ("IMG-20261124-WA0001.jpg (Datei angehängt)\nschau", "schau"),
        ("look \u200e<attached: 00000012-PHOTO-2026-11-24-10-44-25.jpg>", "look"),
        ("look <pièce jointe : 00000012-PHOTO-2026-11-24-10-44-25.jpg>", "look"),
        ("look at this\u200eimage omitted", "look at this"),
        ("@\u2068Bob\u2069 hi", "@Bob hi"),
    ],
)
def test_the_words_of_a_person_stay_without_the_tags_around_them(convert, text, words):
    chat = f"{ANDROID.format('Ann: ')}{text}\n{ANDROID.format('Bob: ok')}"
    assert said(convert({"chat.txt": chat})[0]) == [f"Ann: {words}", "Bob: ok"]


@pytest.mark.parametrize(
    ("form", "kind", "texts"),
    [
        (ANDROID, "media", ["<Media omitted>", "<Без медиафайлов>", "<המדיה לא נכללה>", "null"]),
        (ANDROID, "media", ["AUD-1-WA0001. (file attached)", "Medya dahil edilmedi"]),
        (ANDROID, "media", ["<Pominięto multimedia>\nplan.pdf", "S.webp (archivo adjunto)"]),
        (ANDROID, "deleted", ["This message was deleted", "Diese Nachricht wurde gelöscht."]),
        (ANDROID, "deleted", ["تم حذف هذه الرسالة.", "这条消息已被删除。"]),
        (ANDROID, "call", ["Missed voice call", "Videollamada perdida", "मिस्ड वीडियो कॉल"]),
        (ANDROID, "location", ["Ort: https://maps.google.com/?q=48,16", "live location shared"]),
        (ANDROID, "poll", ["UMFRAGE:\nWann?\nOPTION: Heute (1 Stimme)"]),
        (ANDROID, "app", ["Waiting for this message. This may take a while."]),
        (IPHONE, "media", ["\u200eimage omitted", "\u200f\u200eلم يتم إدراج الصورة"]),
        (IPHONE, "media", ["\u200e<adjunto: 00000012-STICKER-2026-11-24-10-44-25.webp>"]),
        (IPHONE, "media", ["report.pdf • \u200e12 pages \u200edocument omitted"]),
        (IPHONE, "deleted", ["\u200eYou deleted this message."]),
        (IPHONE, "app", ["\u200eMissed voice call. \u200eTap to call back", "\u200eCy added you"]),
        (IPHONE, "app", ["\u200e\u200eDein Code hat sich geändert. \u200eMehr"]),
        (IPHONE, "poll", ["\u200ePOLL:\nWhen?\n\u200eOPTION: Today (\u200e2 votes)"]),
        (IPHONE, "location", ["\u200eLocation: https://maps.google.com/?q=48.2,16.3"]),
    ],
)  # fmt: skip
def test_what_whatsapp_wrote_is_left_out_in_many_languages(convert, form, kind, texts):
    lines = [f"Ann: {text}" for text in texts] + ["A: a", "B: b"]
    result = convert({"chat.txt": "\ufeff" + "\r\n".join(map(form.format, lines))})
    gives(result, "A: a", "B: b", **{kind: len(texts)})


def test_a_line_of_whatsapp_without_an_author_is_a_notice(convert):
    notices = [
        "Messages and calls are end-to-end encrypted. Tap to learn more.",
        'Ann changed the subject from "Plans: May" to "Plans: June"',
        "Ann ha creato il gruppo “Gita: mare”",
    ]
    chat = "\n".join(map(ANDROID.format, [*notices, "A: a", "B: b"]))
    gives(convert({"chat.txt": chat}), "A: a", "B: b", app=3)


@pytest.mark.parametrize(
    "text",
    [
        "<Média kihagyva innen>\nnézd",
        "nézd <Média kihagyva innen>",
        "nézd\u200ekép kihagyva",
        "1.pdf (fájl innen)\nnézd",
    ],
)
def test_a_tag_that_no_table_knows_is_the_apps_if_it_comes_back(convert, text):
    lines = [ANDROID.format(f"{name}: {text}") for name in "ABC"]
    assert of("message", convert({"chat.txt": "\n".join(lines)})[0]) == ["nézd"] * 3
    once = of("message", convert({"chat.txt": "\n".join(lines[:2])})[0])
    assert once == [text.replace("\u200e", "")] * 2


# ---- authors -----------------------------------------------------------------------------------
def test_authors_lose_what_is_no_name_and_a_phone_number_becomes_a_person(convert):
    names = {
        "+43 660 0000001": "Person 1",
        "\u202a+43 660 0000001\u202c": "Person 1",
        "~\u202fAnn": "Ann",
        "+1 (555) 010\u20110002": "Person 2",
        "\u202a+44\xa07700\xa0900000\u202c": "Person 3",
        "A\x1b[2Jn\u202e  Lee": "A[2Jn Lee",
        "\U0001f468\u200d\U0001f33e": "\U0001f468\u200d\U0001f33e",
    }
    chat = "\n".join(ANDROID.format(f"{name}: hi") for name in names)
    assert of("author", convert({"chat.txt": chat})[0]) == list(names.values())


def test_bots_are_known_by_name(convert):
    log = "[10:00:00] <ann> hi\n[10:00:01] <Nightbot> buy!\n[10:00:02] <bob> ok"
    gives(convert({"a.log": log}), "ann: hi", "bob: ok", bot=1)
    assert len(convert({}, keep=["bot"])[0]) == 3


# ---- the apps ----------------------------------------------------------------------------------
def telegram(text, name="Ann", **more):
    return {"type": "message", "from": name, "from_id": "user1", "text": text} | more


def test_telegram_keeps_what_people_wrote(convert):
    messages = [
        telegram("ciao", id=1, date="2026-11-24T10:44:00", date_unixtime="1795513440"),
        telegram(["see ", {"type": "link", "text": "https://a.it"}, "!"], "Bob"),
        telegram("caption", photo="photos/1.jpg"),
        {"type": "message", "from": "Bob", "text_entities": [{"type": "plain", "text": "parts"}]},
        telegram("who?", None),
        telegram("", type="service", action="invite_members"),
        telegram("", media_type="sticker", sticker_emoji="🙂"),
        telegram("news", forwarded_from="A channel"),
        telegram("found", via_bot="@gif"),
        telegram("a post", "News", from_id="channel7"),
        telegram("", poll={"question": "When?"}),
    ]
    result = convert({"result.json": {"name": "Ann", "id": 7, "messages": messages}})
    talk = ["Ann: ciao", "Bob: see https://a.it!", "Ann: caption", "Bob: parts", "None: who?"]
    entries = gives(result, *talk, app=1, media=1, forwarded=1, bot=1, channel=1, poll=1)
    assert entries[0]["conversation"] == "Ann"
    assert entries[0]["time"] == "2026-11-24T09:44:00"  # not the clock of the phone


def test_telegrams_export_of_everything_gives_the_talks_between_people(convert):
    def chat(name, form, number, *names):
        messages = [telegram("hi", who) for who in names]
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
    result = convert({"result.json": {"chats": {"list": chats}, "left_chats": {"list": gone}}})
    talk = ["Ann: hi", "Me: hi"] * 2 + ["Cy: hi", "Me: hi"]
    entries = gives(result, *talk, channel=1, bot=2, notes=1, alone=2)
    assert of("conversation", entries[::2]) == ["Ann 5", "Ann 6", "Gone"]


def test_a_topic_of_a_forum_is_a_conversation(convert):
    messages = [
        telegram("", type="service", action="topic_created", id=10, title="Food"),
        telegram("soup?", id=11, reply_to_message_id=10),
        telegram("hello all", "Bob", id=12),
        telegram("bread", "Bob", id=13, reply_to_message_id=11),
        telegram("hello", id=14),
    ]
    result = convert({"result.json": {"name": "Home", "messages": messages}})
    entries = gives(result, "Ann: soup?", "Bob: bread", "Bob: hello all", "Ann: hello", app=1)
    assert of("conversation", entries) == ["Home / Food"] * 2 + ["Home"] * 2


def test_discord(convert):
    def message(name, content, form="Default", **more):
        author = {"name": name, "nickname": "N", "isBot": name == "robot"}
        when = "2026-11-24T10:44:25.1234567+01:00"
        return {"type": form, "timestamp": when, "content": content, "author": author} | more

    messages = [
        message("ann", "hi"),
        message("bob", "yes?", "Reply"),
        message("ann", "Joined the server.", "GuildMemberJoin"),
        message("robot", "beep"),
        message("bob", "", attachments=[{"url": "a.png"}]),
        message("bob", "", forwardedMessage={"content": "old"}),
    ]
    export = {"guild": {"name": "G"}, "channel": {"name": "general"}, "messages": messages}
    result = convert({"a.json": export})
    entries = gives(result, "ann: hi", "bob: yes?", app=1, bot=1, media=1, forwarded=1)
    assert entries[0]["conversation"] == "G / general"
    assert entries[0]["time"] == "2026-11-24T09:44:25"


def test_instagram_is_newest_first_in_several_files_and_latin_1(convert):
    zoe, moji = "Zo\u00c3\u00ab", "\u00f0\u009f\u0098\u0082"

    def message(minute, name, text, **more):
        when = 1795513440000 + 60000 * minute
        return {"timestamp_ms": when, "sender_name": name, "content": text} | more

    newer = [
        message(9, "Bob", "bye"),
        message(8, zoe, f"Reacted {moji} to your message "),
        message(7, zoe, f"{zoe} hat einen Anhang gesendet."),
        message(6, "Bob", "Liked a message"),
        message(6, "Bob", "You sent me soup"),
        message(5, zoe, None, photos=[{"uri": "a.jpg"}]),
        message(5, zoe, "x", is_unsent=True),
        message(4, "Bob", "Audio call ended", call_duration=3),
        message(4, zoe, f"third {moji}"),
    ]
    older = [message(3, zoe, "second"), message(2, "Bob", "first")]
    exports = [{"participants": [], "title": zoe, "messages": part} for part in (newer, older)]
    names = "zoe_1/message_1.json", "zoe_1/message_2.json"
    result = convert(dict(zip(names, exports, strict=True)))
    talk = ["Bob: first", "Zoë: second", "Zoë: third 😂", "Bob: You sent me soup", "Bob: bye"]
    entries = gives(result, *talk, app=3, media=1, deleted=1, call=1)
    assert set(of("conversation", entries)) == {"Zoë"}


def test_messengers_encrypted_chats_have_keys_of_their_own(convert):
    names, when = ["Bob", "Zoë"], 1795513440000
    messages = [
        {"senderName": "Zoë", "text": "später", "timestamp": when + 1000, "type": "text"},
        {"senderName": "Bob", "text": "früher", "timestamp": when, "type": "text"},
        {"senderName": "Bob", "text": "", "timestamp": when, "isUnsent": True},
    ]
    export = {"participants": names, "threadName": "Zoë_12", "messages": messages}
    entries = gives(convert({"Zoë_12.json": export}), "Bob: früher", "Zoë: später", deleted=1)
    assert entries[0]["conversation"] == "Zoë"


def test_twitch_downloader(convert):
    def comment(name, text, seconds, notice=None):
        commenter = name and {"display_name": name, "name": name.lower()}
        message = {"body": text, "user_notice_params": {"msg-id": notice}}
        return {"content_offset_seconds": seconds, "commenter": commenter, "message": message}

    comments = [
        comment("Ann", "hi", 5),
        comment("Bob", "subscribed!", 66, "resub"),
        comment(None, "gone", 68),
        comment("Bob", "later", 69) | {"created_at": "2026-11-24T10:44:25Z"},
    ]
    result = convert({"vod.json": {"streamer": {}, "comments": comments, "video": {}}})
    entries = gives(result, "Ann: hi", "None: gone", "Bob: later", app=1)
    times = ["1970-01-01T00:00:05", "1970-01-01T00:01:08", "2026-11-24T10:44:25"]
    assert of("time", entries) == times


@pytest.mark.parametrize(
    ("day", "log"),
    [
        ("2026-11-24", "# Log started: 2026-11-24 10:00:00 +0100\n"
         "[10:44:25] <@Ann> hi\n[10:45] <+bob> ok"),
        ("2026-11-24", "[2026-11-24 10:44:25] <Ann> hi\n[2026-11-24 10:45:00] <bob> ok"),
        ("2026-11-24", "--- Day changed Tue Nov 24 2026\n10:44:25 < Ann> hi\n"
         "10:45 -!- cy joined\n10:45 <@bob> ok"),
        ("2026-11-24", "2026-11-24 10:44:25\t@Ann\thi\n2026-11-24 10:45:00\t-->\tcy joined\n"
         "2026-11-24 10:45:00\tbob\tok"),
        ("2026-11-24", "**** BEGIN LOGGING AT Tue Nov 24 09:00:00 2026\n\n"
         "Nov 24 10:44:25 <Ann>\thi\nNov 24 10:45:00 <bob>\tok"),
        ("1970-01-01", "[10:44:25] Ann: hi\n[10:45:00] bob: ok"),
        ("2026-11-24", "[2026-11-24 10:44:25 UTC] Ann: hi\n[2026-11-24 10:45:00 UTC] bob: ok"),
    ],
)  # fmt: skip
def test_logs_of_irc_and_twitch(convert, day, log):
    entries, left_out = convert({"a.log": log})
    assert said(entries) == ["Ann: hi", "bob: ok"] and set(left_out) <= {"app"}
    assert of("time", entries) == [f"{day}T10:44:25", f"{day}T10:45:00"]


def test_a_log_goes_on_after_midnight_and_may_have_its_day_in_its_name(convert):
    late = "[23:59:50] <ann> late\n[00:00:10] <bob> early\n[00:00:05] <ann> a clock goes wrong"
    entries, _ = convert({"#home/2026-11-24.log": late, "#home/2026-11-26.log": "[10:44] <a> hi"})
    times = ["24T23:59:50", "25T00:00:05", "25T00:00:10", "26T10:44:00"]
    assert [time[8:] for time in of("time", entries)] == times
    assert set(of("conversation", entries)) == {"#home"}


def test_slack_has_names_in_a_file_of_their_own(convert):
    def message(user, text, second, **more):
        when = f"17955134{second}.0001"
        return {"type": "message", "user": user, "text": text, "ts": when} | more

    thread = {"thread_ts": "1795513446.0001"}
    day = [
        message("U1", "hi <@U2> &amp; all, <https://a.b|look> <https://c.d>", 41),
        message("U3", "me too", 43, user_profile={"real_name": "Cy"}),
        message("U1", "has joined", 44, subtype="channel_join"),
        message("U1", "beep", 45, bot_id="B1"),
        message("U1", "soup?", 46, **thread),
        message("U2", "yes", 47, **thread),
    ]
    users = [
        {"id": "U1", "name": "ann.l", "profile": {"display_name": "", "real_name": "Ann Lee"}},
        {"id": "U2", "name": "bob", "profile": {"display_name": "Bob"}},
    ]
    result = convert({"general/2026-11-24.json": day, "users.json": users})
    talk = ["Ann Lee: hi @Bob & all, look https://c.d", "Cy: me too", "Ann Lee: soup?", "Bob: yes"]
    entries = gives(result, *talk, app=1, bot=1)
    assert of("conversation", entries)[1:3] == ["general", "general / 1795513446.0001"]


def test_signal_export(convert):
    chat = """\
[2026-11-24 10:44:25] Me: hello  \n(- Ann: 👍 -)
[2026-11-24 10:44:30] Ann: \n\n> hello\n\nhi, 1 > 0  \n![a](media/a.jpg)
[2026-11-24 10:44:35] Ann: (media not exported)
[2026-11-24 10:44:40] Ann: (This message was deleted)
"""
    result = convert({"Ann/chat.md": chat, "Note to Self/chat.md": chat[: chat.index("(- ")]})
    entries = gives(result, "Me: hello", "Ann: hi, 1 > 0", media=1, deleted=1, notes=1)
    assert entries[0]["conversation"] == "Ann"


def test_imessage_exporter(convert):
    chat = [
        "Nov 24, 2026 10:44:25 AM (Read by you)\nMe\none\n\ntwo\nTapbacks:\nLoved by Ann\n",
        "Nov 24, 2026  1:44:30 PM\nAnn\nbetter\nEdited 15 seconds later: best",
        "This message responded to an earlier message.",
        "    Nov 24, 2026  1:45:00 PM\n    Me\n    an answer\n",
        "Nov 24, 2026  1:45:00 PM\nMe\nan answer\n",
        "Nov 24, 2026  1:46:00 PM You named the conversation Home\n",
        "Nov 24, 2026  1:47:00 PM\nAnn\n/Users/me/Library/Messages/Attachments/a/b.heic\n",
    ]
    talk = ["Me: one\n\ntwo", "Ann: best", "Me: an answer"]
    entries = gives(convert({"+15550100.txt": "\n".join(chat)}), *talk, app=1, media=1)
    assert [time[11:] for time in of("time", entries)] == ["10:44:25", "13:44:30", "13:45:00"]
    assert entries[0]["conversation"] == "Person 1"


def test_google_chat(convert):
    def message(name, text, **more):
        creator = {"name": name, "email": "a@b.c", "user_type": "Bot" if name == "B" else "Human"}
        when = "Tuesday, November 24, 2026 at 10:44:25\u202fPM UTC"
        return {"creator": creator, "created_date": when, "text": text} | more

    messages = [message("Ann", "hi"), message("Bob", "ok"), message("B", "beep")]
    messages.append(message("Bob", "", message_state="DELETED"))
    result = convert({"DM abc/messages.json": {"messages": messages}})
    entries = gives(result, "Ann: hi", "Bob: ok", bot=1, deleted=1)
    assert of("time", entries) == ["2026-11-24T22:44:25"] * 2
    assert entries[0]["conversation"] == "DM abc"


def test_matrix(convert):
    def event(name, form="m.room.message", **content):
        event = {"type": form, "sender": f"@{name}:a.org", "content": content}
        return event | {"origin_server_ts": 1795513440000}

    answers, edits = {"m.in_reply_to": {"event_id": "$1"}}, {"rel_type": "m.replace"}
    answer = "> <@ann:a.org> hi\n> all\n\nyes\n> no quotation"
    messages = [
        event("ann", msgtype="m.text", body="hi"),
        event("bob", msgtype="m.text", body=answer, **{"m.relates_to": answers}),
        event("ann", msgtype="m.text", body="* hi!", **{"m.relates_to": edits}),
        event("ann", msgtype="m.notice", body="beep"),
        event("ann", msgtype="m.image", body="a.png"),
        event("cy", "m.room.member", membership="join"),
        event("ann"),
    ]
    result = convert({"export.json": {"room_name": "Home", "messages": messages}})
    talk = ["ann: hi", "bob: yes\n> no quotation"]
    entries = gives(result, *talk, app=2, bot=1, media=1, deleted=1)
    assert entries[0]["conversation"] == "Home"


# ---- lists, CSV, training sets -----------------------------------------------------------------
def test_a_list_of_messages_under_the_keys_of_other_programs(convert):
    for author in ("author", "sender", "username", "user", "from", "name", "Nick"):
        for text in ("message", "text", "content", "Body"):
            log = [{"date": "26/12/24", "time": "6:06", author: name, text: "hi"} for name in "AB"]
            for content in (log, {"messages": log}, "\n".join(map(json.dumps, log))):
                entries, _ = convert({"a.json": content})
                assert said(entries) == ["A: hi", "B: hi"]
                assert entries[0]["time"] == "2024-12-26T06:06:00"


@pytest.mark.parametrize(
    ("time", "values"),
    [
        ("2026-11-24T09:44:00", [1795513440, "1795513440.5", 1795513440000, 1795513440000000]),
        ("2026-11-24T09:44:00", ["Tue, 24 Nov 2026 10:44:00 +0100", "2026-11-24T09:44:00Z"]),
        ("2026-11-24T00:00:00", ["24.11.2026"]),
        ("1970-01-01T20:15:00", ["20:15", "8:15 PM"]),  # and not today
        (None, ["no time", float("inf"), float("nan"), "99.99.2026, 10:44", "24.11.2026, 10:99"]),
    ],
)
def test_times_of_lists(convert, values, time):
    for value in values:
        log = [{"timestamp": value, "user": {"name": name, "id": 7}, "text": "hi"} for name in "AB"]
        assert of("time", convert({"a.json": log})[0]) == [time, time], value


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_a_header(convert, delimiter):
    long = "é" * 200_000
    text = 'No,Date,Chat,From,Text\n7,24/11/26 10:45,Home,B,"3,\nand ""all"""\n'
    text += f"8,24/11/26 10:44,Home,A,{long}\n9,24-Nov-26 10:44 AM,Home,B,1\n,,,,\n"
    text = text.replace(",", delimiter)
    windows = ["\ufeff" + text.replace("\n", "\r\n"), text.encode("utf-16"), text.encode("cp1252")]
    for content in [text, *windows]:
        result = convert({"a.csv": content})
        entries = gives(result, "B: 1", f"A: {long}", f'B: 3{delimiter}\nand "all"', media=1)
        assert of("time", entries)[0] == "2026-11-24T10:44:00"
        assert from_export.notes[-1] == "nothing was understood in No of a"


ROLES = ["system", "user", "assistant", "user", "assistant"]
TURNS = [{"role": role, "content": text} for role, text in zip(ROLES, "sabcd", strict=True)]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        ({"prompt": "a", "completion": "b"}, [("a", "b")]),
        ({"instruction": "a", "input": "", "output": "b"}, [("a", "b")]),
        ({"instruction": "a", "input": "c", "output": "b"}, [("a\n\nc", "b")]),
        ({"question": "a", "answer": "b", "id": 7}, [("a", "b")]),
        ({"text": "Q: c\nA: d\nQ: e\nA: f"}, [("c\nA: d\nQ: e", "f")]),
        ({"text": "### Instruction:\na\n\n### Response:\nb"}, [("a\n", "b")]),
        ({"messages": TURNS}, [("s\n\na", "b"), ("s\n\na\n\nb\n\nc", "d")]),
        ({"messages": TURNS[2:]}, [("b\n\nc", "d")]),
        ({"conversations": SHAREGPT}, [("a", "b")]),
    ],
)
def test_a_training_set_becomes_pairs(row, pairs):
    for content in (json.dumps([row, row]), f"{json.dumps(row)}\n{json.dumps(row)}\n"):
        read = from_export.read("a.jsonl", content.encode())[1]
        assert [(pair["prompt"], pair["completion"]) for pair in read] == pairs * 2


def test_texts_without_questions_are_messages(convert):
    entries, _ = convert({"a.json": [{"text": "hi"}, {"text": "you"}]})
    assert entries == [{"conversation": "a", "message": text} for text in ("hi", "you")]


# ---- several files -----------------------------------------------------------------------------
def test_a_message_that_two_exports_hold_is_read_once(convert):
    old = "24/11/26, 10:44 - Ann: hi\n24/11/26, 10:44 - Ann: hi\n24/11/26, 10:45 - Bob: ok"
    new = old + "\n24/11/26, 10:46 - Ann: more\n24/11/26, 10:46 - Ann: more"
    entries, left_out = convert({"Ann.txt": old, "Ann (1).txt": new})
    assert said(entries) == ["Ann: hi"] * 2 + ["Bob: ok"] + ["Ann: more"] * 2
    assert left_out == {"copy": 3}


def test_without_times_nothing_is_a_copy(convert):
    files = {f"{folder}/a.json": [{"text": "ok"}, {"text": "ok"}] for folder in "ab"}
    assert of("message", convert(files)[0]) == ["ok"] * 4


def test_conversations_are_named_by_file_or_folder(convert):
    chat = "24/11/26, 10:44 - A: a\n24/11/26, 10:44 - B: b"
    names = ["Chat WhatsApp con Ann.txt", "Чат WhatsApp с Bob.txt", "Cy/_chat.txt", "Cy/notes.txt"]
    entries, _ = convert({name: chat for name in names})
    expected = {"Chat WhatsApp con Ann", "Cy", "notes", "Чат WhatsApp с Bob"}
    assert set(of("conversation", entries)) == expected


# ---- the command -------------------------------------------------------------------------------
CHAT = """\
24/11/26, 10:44 - Messages and calls are end-to-end encrypted.
24/11/26, 10:44 - Ann Lee: hi
24/11/26, 10:45 - Bob: ok
24/11/26, 10:46 - Ann Lee: <Media omitted>
25/11/26, 10:46 - Ann Lee: soup?
"""
FOLDER = "my project/data/raw"
OUTPUT = f"{FOLDER}/messages_sample.json"
DEEP = '{"messages": [{"creator": {}, "text": %s}]}' % ("[" * 700 + "]" * 700)


@pytest.fixture
def home(tmp_path):
    """A project of the script alone, in a folder whose name holds a space, and an export."""
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FOLDER / "from_export.py").write_bytes(SCRIPT.read_bytes())
    (tmp_path / "chat.txt").write_text(CHAT, "utf-8")
    return tmp_path


@pytest.fixture
def export(home, run):
    """Return export("chat.txt", …): the finished run on files of `home`."""

    def export(*arguments, **kwargs):
        return run(home / FOLDER, "from_export.py", *arguments, cwd=home, **kwargs)

    return export


@pytest.fixture
def main(home, monkeypatch, capsys):
    """Return main("chat.txt", …): what a run in this process printed, or the error of its end."""

    def main(*arguments):
        from_export.notes.clear()
        monkeypatch.chdir(home)
        monkeypatch.setattr(from_export, "RAW", home / FOLDER)
        monkeypatch.setattr(sys, "argv", ["from_export.py", "--version", "sample", *arguments])
        try:
            from_export.main()
        except SystemExit as end:
            return end.code
        return capsys.readouterr().out

    return main


def written(home):
    """Return {"messages_sample.json": content, …}, of all versions."""
    return {path.name: path.read_text("utf-8") for path in (home / FOLDER).glob("messages_*")}


def pack(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_a_zip_becomes_a_log_and_the_next_command_is_named(home, export):
    members = {"_chat.txt": CHAT, "__MACOSX/._chat.txt": "x", "a.jpg": "x"}
    pack(home / "WhatsApp Chat with Bob.zip", **members)
    result = export("WhatsApp Chat with Bob.zip")
    assert result.returncode == 0 and result.stderr == ""
    lines = (home / OUTPUT).read_text().splitlines()
    assert lines[0] == "[" and lines[-1] == "]" and len(lines) == 5
    assert json.loads(lines[1].removesuffix(",")) == {
        "conversation": "WhatsApp Chat with Bob",
        "time": "2026-11-24T10:44:00",
        "author": "Ann Lee",
        "message": "hi",
    }
    assert [" ".join(line.split()) for line in result.stdout.splitlines()] == [
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
        "next, to answer as one of them, or as anybody:",
        "VERSION=sample python build_train.py --only-author 'Ann Lee'",
        "VERSION=sample python build_train.py",
    ]


def test_the_author_of_most_conversations_is_the_one_to_learn(capsys):
    talks = [("Me", "X"), *[("X", "X")] * 3, ("Me", "Y"), *[("Y", "Y")] * 3]
    entries = [{"author": author, "conversation": place} for author, place in talks]
    from_export.next_steps(entries, "v1")
    assert "--only-author Me\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("notes.txt", "Dear diary\n", "notes.txt is a text that begins with 'Dear diary'"),
        ("a.html", "<!DOCTYPE html><p>", "Machine-readable JSON"),
        ("a.json", '{"messages": [{"type": "mess', "a text that begins with '{\"messages"),
        ("a.json", "[" * 100000, "not as its app writes it"),
        ("a.json", '{"songs": [], "title": "x"}', "JSON with the keys songs, title"),
        ("a.json", "[1, null]", "JSON with the keys (none)"),
        ("a.json", '[{"previous_messages": ["a"], "message": "b"}]', "copy it into data/raw"),
        ("a.json", '{"chats": {"list": 7}}', "not as its app writes it"),
        ("a.json", DEEP, "not as its app writes it"),
        ("a.txt", "", "a.txt is empty"),
        ("a.txt", b"\x00\x01\x02", "a.txt is no text"),
        ("a.txt", "\x1b[2J\u202e", "begins with '\\x1b[2J\\u202e'"),
        ("a.zip", b"PK\x05\x06" + bytes(18), "holds no such file"),
    ],
)
def test_what_no_reader_knows_gets_an_error(home, main, name, content, what):
    (home / name).write_bytes(content.encode() if isinstance(content, str) else content)
    error = main(name)
    assert what in error and "; known are Telegram, Discord" in error
    assert "FIX: export the chat again" in error and written(home) == {}


def test_what_cannot_be_read_is_told_and_nothing_is_written(home, main):
    (home / "chat.txt").write_text("24/11/26, 10:44 - Ann: hi\n24/11/26, 10:44 - Ann: you")
    assert "nothing is left that people said to each other" in main("chat.txt")
    os.mkfifo(home / "pipe.txt")
    assert "pipe.txt is not there, or no file" in main("pipe.txt")
    assert "x.zip is not there, or no file" in main("elsewhere/x.zip")
    assert "FIX: export VERSION=x" in main("chat.txt", "--version", "../x")
    assert main("chat.txt", "--keep", "apps") == main() == 2 and written(home) == {}


def test_a_path_without_its_quotes_is_told_with_them(home, main):
    for name in "Chat - Ann.zip", "my chat.txt":
        (home / name).write_text(CHAT)
    error = main("chat.txt", "Chat", "-", "Ann.zip", "my", "chat.txt", "--dates", "dmy")
    command = "python from_export.py --version sample chat.txt 'Chat - Ann.zip' 'my chat.txt'"
    assert error.startswith("error: Chat is not there")
    assert error.endswith(f"FIX: {command} --dates dmy")


def test_in_a_folder_what_is_no_chat_is_told_and_not_an_error(home, main):
    folder = home / "Downloads"
    (folder / "deep er").mkdir(parents=True)
    (folder / "deep er/chat.txt").write_text(CHAT)
    (folder / "bill.txt").write_text("Dear customer")
    (folder / ".hidden.txt").write_text(CHAT)
    (folder / "loop").symlink_to(folder)
    assert "1  Downloads/bill.txt: a text" in main("Downloads")
    assert len(json.loads((home / OUTPUT).read_text())) == 3
    assert main("Downloads/deep er", "Downloads/bill.txt").startswith("error: Downloads/bill.txt")
    (home / FOLDER / "chat.txt").write_text(CHAT)  # what the script wrote there is no export
    assert "3 entries" in main(FOLDER, "--version", "two")


def test_chats_and_training_sets_do_not_mix(home, main):
    (home / "set.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "chats and training sets" in main("chat.txt", "set.jsonl")
    assert main("set.jsonl").splitlines()[-1].strip() == "VERSION=sample python build_train.py"
    assert json.loads((home / OUTPUT).read_text()) == [{"prompt": "a", "completion": "b"}]


def test_another_export_is_not_written_over_unless_told(home, main):
    first = main("chat.txt") and written(home)
    assert "3 entries" in main("chat.txt") and written(home) == first
    (home / "chat.txt").write_text(CHAT + "25/11/26, 10:47 - Bob: yes\n")
    assert "FIX: add --replace" in main("chat.txt") and written(home) == first
    assert "5 entries" in main("chat.txt", "--replace", "--keep", "app")
    assert "4 entries" in main("chat.txt", "--version", "two") and len(written(home)) == 2


# ---- whole or not at all, and nowhere else -----------------------------------------------------
def test_a_second_run_on_the_same_name_is_refused(home, main):
    with open(home / FOLDER / ".messages_sample.json.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is writing" in main("chat.txt")
        assert "3 entries" in main("chat.txt", "--version", "two")
    assert "3 entries" in main("chat.txt")


def test_a_full_disk_leaves_what_was_there(home, main):
    assert main("chat.txt") and (first := written(home))
    (home / "chat.txt").write_text(CHAT * 1000)
    limited = 'ulimit -f 4; VERSION=sample exec "$0" "$@" chat.txt --replace'
    command = ["bash", "-c", limited, sys.executable, home / FOLDER / "from_export.py"]
    result = subprocess.run(command, cwd=home, capture_output=True, encoding="utf-8")
    assert result.returncode == 1 and "File too large" in result.stderr.splitlines()[-1]
    assert written(home) == first


def test_ctrl_c_ends_it_quietly(home, export):
    (home / "chat.txt").write_text(CHAT * 20000)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = export("chat.txt", start=subprocess.Popen, **pipes)
    while not (home / FOLDER / ".messages_sample.json.lock").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == (b"", b"\n") and process.returncode == 130
    assert written(home) == {}


def test_nothing_of_a_zip_is_unpacked(home, main):
    pack(home / "a.zip", **{"../../outside.txt": CHAT, f"{home}/b.txt": CHAT.replace("Bob", "Cy")})
    before = {path for path in home.rglob("*") if FOLDER not in str(path)}
    assert "3 entries" in main("a.zip")
    assert {path for path in home.rglob("*") if FOLDER not in str(path)} == before


def test_a_zip_that_would_not_fit_into_memory_is_refused(home, monkeypatch):
    pack(home / "bomb.zip", **{f"{number}.txt": bytes(1 << 20) for number in range(3)})
    monkeypatch.setattr(from_export, "MOST_BYTES", 3 << 20)
    assert len(list(from_export.files_in(home / "bomb.zip"))) == 3
    monkeypatch.setattr(from_export, "MOST_BYTES", (3 << 20) - 1)
    with pytest.raises(SystemExit, match=r"bomb.zip holds over .* FIX: unzip it"):
        list(from_export.files_in(home / "bomb.zip"))


def test_a_zip_that_is_damaged_or_has_a_password_is_told(home, main):
    pack(home / "a.zip", **{"chat.txt": CHAT})
    content = (home / "a.zip").read_bytes()
    (home / "a.zip").write_bytes(content.replace(b"Ann Lee", b"Ann Lea"))
    assert "cannot be unpacked: Bad CRC-32" in main("a.zip")
    locked = bytearray(content)
    locked[6] |= 1
    locked[content.index(b"PK\x01\x02") + 8] |= 1
    (home / "a.zip").write_bytes(locked)
    assert "cannot be unpacked" in main("a.zip")


# ---- untrusted text, odd surroundings ----------------------------------------------------------
def test_hostile_text_reaches_neither_the_terminal_nor_the_shell(home, main):
    texts = {"A\x1b[2J\u202e'; rm -rf ~; '": "\ud800\x07\x9b\x00hi", "B": "ok"}
    log = [{"author": name, "text": text} for name, text in texts.items()] * 2
    (home / "a\x1b[2J.json").write_text(json.dumps(log))
    out = main("a\x1b[2J.json")
    assert all(c.isprintable() or c == "\n" for c in out)
    assert said(json.loads((home / OUTPUT).read_text()))[0] == "A[2J'; rm -rf ~; ': ?hi"
    assert """--only-author 'A[2J'"'"'; rm -rf ~; '"'"''\n""" in out


def test_the_same_bytes_in_any_surroundings(home, export, main):
    (home / "chat.txt").write_text(CHAT.replace("Bob", "Zoë 🙂"), "utf-8")
    assert main("chat.txt") and (first := written(home))
    for folder in (home, home / FOLDER):  # files beside the script are not its modules
        for name in ("json", "signal", "csv", "dateutil", "argparse"):
            (folder / f"{name}.py").write_text("raise SystemExit('ran')")
    env = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONOPTIMIZE": "2"}
    result = export("chat.txt", env=env, stdin=subprocess.DEVNULL)
    assert result.returncode == 0 and result.stderr == "" and written(home) == first


def test_given_nothing_it_shows_an_example(export):
    result = export()
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "FIX: python data/raw/from" in result.stderr


def test_without_the_environment_it_says_so(home):
    command = [sys.executable, "-I", "-S", home / FOLDER / "from_export.py", "chat.txt"]
    result = subprocess.run(command, cwd=home, capture_output=True, encoding="utf-8")
    assert result.returncode == 1 and result.stderr.endswith(
        "FIX: source venv/bin/activate; pip install -r requirements.txt\n"
    )


TEXTS = " ", "\n", "!", "<", "a <", "\u200e<", "(1 ", "1", "1/", "1/2/26, 10:44", ":", "\t", "«"


@pytest.mark.parametrize("head", [ANDROID.format("Ann: "), "[10:44:25] <ann> ", "from,text\na,"])
def test_no_text_takes_long(head):
    for text in TEXTS:
        content = head + text * (50_000 // len(text))
        start = time.process_time()
        _, messages = from_export.read("a.txt", content.encode())
        messages = from_export.read_times(messages, None, "a")
        from_export.sort_out([("a.txt", "", messages)], set())
        assert time.process_time() - start < 2, text
