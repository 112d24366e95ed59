"""What becomes of the exports of each app: a table of cases for each, with invented words.

A case is what one message of the file has, and what becomes of it: "Ann: hi" or the kind as which
it is left out. The tests behind the tables say what holds for all apps: times, names, copies.
"""
# ruff: noqa: RUF001 (apps write in many alphabets)

from data.raw import from_export
from data.raw.readers.files import title_of

import json
from collections import Counter

import pytest

table = pytest.mark.parametrize


@pytest.fixture
def convert(tmp_path):
    """Return convert({"a.txt": …}, keep=["bot"]) → (entries, {kind: left out}, notes)."""

    def convert(files, dates=None, keep=()):
        for name, content in files.items():
            path = tmp_path / "export" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = content if isinstance(content, str | bytes) else json.dumps(content)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        chats, _ = from_export.read_files([str(tmp_path / "export")], dates)
        notes = [note for chat in chats for note in chat.notes]
        pairs = [m for chat in chats for m in chat.messages if isinstance(m, dict)]
        conversations, left_out = ({}, {}) if pairs else from_export.sort_out(chats, keep)
        kinds = {kind: len(texts) for kind, texts in left_out.items()}
        return pairs or from_export.entries_of(conversations), kinds, notes

    return convert


@pytest.fixture
def check(convert):
    """Return check({"a.txt": …}, "Ann: hi|Bob: ok", media=1) → entries, once they are that."""

    def check(files, talk, dates=None, keep=(), **left_out):
        entries, kinds, _ = convert(files, dates, keep)
        said = "|".join(f"{entry.get('author')}: {entry['message']}" for entry in entries)
        assert (said, Counter(kinds)) == (talk, Counter(left_out))
        return entries

    return check


def each(key, entries):
    """Return the values of a key, each once, in the order in which they come."""
    return list(dict.fromkeys(entry.get(key) for entry in entries))


# ---- JSON of the apps ----------------------------------------------------------------------------
def meta(text):
    """Return it as Instagram writes it: "Zoë" → "ZoÃ«"."""
    return text.encode().decode("latin-1")


# app: the file, its conversation and time; what all messages have; each one and what becomes of it
APPS = {
    "Telegram": [
        ({"name": "Home", "id": 7, "messages": ...}, "Home", "2026-11-24T09:44:00"),
        {"type": "message", "from": "Ann", "date_unixtime": "1795513440", "text": ""}
        | {"date": "2026-11-24T10:44:00"},  # by the clock of the phone
        ({"text": "ciao"}, "Ann: ciao"),
        ({"text": ["see ", {"type": "link", "text": "a.it"}, "!"]}, "Ann: see a.it!"),
        ({"text_entities": [{"type": "plain", "text": "parts"}]}, "Ann: parts"),
        ({"text": "a caption", "photo": "photos/1.jpg"}, "Ann: a caption"),
        ({"text": "who?", "from": None}, "None: who?"),
        ({"type": "service", "action": "invite_members"}, "app"),
        ({"media_type": "sticker", "sticker_emoji": "🙂"}, "media"),
        ({"text": "news", "forwarded_from": "A channel"}, "forwarded"),
        ({"text": "found", "via_bot": "@gif"}, "bot"),
        ({"text": "a post", "from_id": "channel7"}, "channel"),
        ({"text": "I am", "from_id": "user7"}, "Ann: I am"),
        ({"text": "I am another", "from_id": "user8"}, "Ann 8: I am another"),
        ({"text": "gone", "from": None, "from_id": "user9"}, "Deleted Account 9: gone"),
        ({"poll": {"question": "When?"}}, "poll"),
    ],
    "Discord": [
        ({"guild": {"name": "G"}, "channel": {"name": "c"}, "messages": ...},
         "G / c", "2026-11-24T09:44:25"),
        {"author": {"name": "ann", "nickname": "N"}, "type": "Default", "content": ""}
        | {"timestamp": "2026-11-24T10:44:25.1234567+01:00"},
        ({"content": "hi"}, "ann: hi"),
        ({"content": "yes?", "type": "Reply", "author": {"name": "bob"}}, "bob: yes?"),
        ({"content": "Joined the server.", "type": "GuildMemberJoin"}, "app"),
        ({"content": "beep", "author": {"name": "robot", "isBot": True}}, "bot"),
        ({"attachments": [{"url": "a.png"}]}, "media"),
        ({"forwardedMessage": {"content": "old"}}, "forwarded"),
        ({"poll": {"question": "When?"}}, "poll"),
    ],
    "Instagram": [
        ({"participants": [], "title": "Z", "messages": ...}, "Z", "2026-11-24T09:44:00"),
        {"timestamp_ms": 1795513440000, "sender_name": meta("Zoë")},
        ({"content": meta("hi 😂")}, "Zoë: hi 😂"),
        ({"content": "You sent me soup", "sender_name": "Bob"}, "Bob: You sent me soup"),
        ({"content": meta("Reacted 😂 to your message ")}, "app"),
        ({"content": meta("Zoë hat einen Anhang gesendet.")}, "app"),
        ({"content": "Liked a message"}, "app"),
        ({"photos": [{"uri": "a.jpg"}]}, "media"),
        ({"content": "x", "is_unsent": True}, "deleted"),
        ({"content": "Audio call ended", "call_duration": 3}, "call"),
    ],
    "Messenger, encrypted": [
        ({"participants": ["Zoë"], "threadName": "Zoë_12", "messages": ...},
         "Zoë", "2026-11-24T09:44:00"),
        {"senderName": "Zoë", "timestamp": 1795513440000, "type": "text", "text": ""},
        ({"text": "früher"}, "Zoë: früher"),
        ({"text": "später", "senderName": "Bob"}, "Bob: später"),
        ({"isUnsent": True}, "deleted"),
    ],
    "Twitch": [
        ({"streamer": {}, "comments": ..., "video": {}}, "folder", "1970-01-01T00:01:05"),
        {"content_offset_seconds": 65, "commenter": {"display_name": "Ann", "name": "ann"}},
        ({"message": {"body": "hi"}}, "Ann: hi"),
        ({"message": {"body": "gone"}, "commenter": None}, "None: gone"),
        ({"message": {"body": "+1", "user_notice_params": {"msg-id": "resub"}}}, "app"),
        ({"message": {"body": "late"}, "created_at": "2026-11-24T10:44:25Z"}, "Ann: late"),
    ],
    "Slack": [
        (..., "folder", "2026-11-24T09:44:00"),
        {"type": "message", "user_profile": {"real_name": "Ann"}, "ts": "1795513440.0001"},
        ({"text": "you &amp; all, <https://a.b|look>"}, "Ann: you & all, look"),
        ({"text": "me", "user_profile": {"real_name": "Cy"}}, "Cy: me"),
        ({"text": "<!here> lunch?"}, "Ann: @here lunch?"),
        ({"text": "Reminder: lunch", "user": "USLACKBOT"}, "bot"),
        ({"text": "has joined", "subtype": "channel_join"}, "app"),
        ({"text": "beep", "bot_id": "B1"}, "bot"),
    ],
    "Google Chat": [
        ({"messages": ...}, "folder", "2026-11-24T22:44:25"),
        {"creator": {"name": "Ann", "email": "a@b.c", "user_type": "Human"}, "text": ""}
        | {"created_date": "Tuesday, November 24, 2026 at 10:44:25\u202fPM UTC"},
        ({"text": "hi"}, "Ann: hi"),
        ({"text": "ok", "creator": {"name": "Bob"}}, "Bob: ok"),
        ({"text": "beep", "creator": {"name": "B", "user_type": "Bot"}}, "bot"),
        ({"message_state": "DELETED", "creator": None, "created_date": None}, "deleted"),
    ],
    "Matrix": [
        ({"room_name": "Home", "messages": ...}, "Home", "2026-11-24T09:44:00"),
        {"type": "m.room.message", "sender": "@ann:a.org", "origin_server_ts": 1795513440000},
        ({"content": {"msgtype": "m.text", "body": "hi"}}, "ann: hi"),
        ({"sender": "@bob:a.org"}
         | {"content": {"msgtype": "m.text", "body": "> <@ann:a.org> hi\n> all\n\nyes\n> no",
                        "m.relates_to": {"m.in_reply_to": {"event_id": "$1"}}}},
         "bob: yes\n> no"),  # without the quotation
        ({"content": {"msgtype": "m.text", "body": "hu"}, "event_id": "$2"}, "ann: ho"),  # edited
        ({"content": {"msgtype": "m.text", "body": "* ho", "m.new_content": {"body": "ho"},
                      "m.relates_to": {"rel_type": "m.replace", "event_id": "$2"}}}, "app"),
        ({"content": {"msgtype": "m.notice", "body": "beep"}}, "bot"),
        ({"content": {"msgtype": "m.image", "body": "a.png", "filename": "a.png"}}, "media"),
        ({"content": {"msgtype": "m.image", "body": "cake", "filename": "a.png"}}, "ann: cake"),
        ({"content": {"membership": "join"}, "type": "m.room.member"}, "app"),
        ({"content": {}}, "deleted"),
    ],
    "Reddit": [
        (..., "t3_x", "2026-11-24T09:44:00"),
        {"author": "ann", "created_utc": 1795513440, "link_id": "t3_x"},
        ({"body": "1 &gt; 0"}, "ann: 1 > 0"),
        ({"body": "so?", "author": "bob"}, "bob: so?"),
        ({"body": "I am a bot", "author": "AutoModerator"}, "bot"),
        ({"body": "[removed]", "author": "[deleted]"}, "deleted"),
    ],
    "Rocket.Chat": [
        ({"messages": ...}, "GENERAL", "2026-11-24T09:44:00"),
        {"rid": "GENERAL", "ts": "2026-11-24T09:44:00.123Z", "u": {"username": "a", "name": "Ann"}},
        ({"msg": "hi"}, "Ann: hi"),
        ({"msg": "ok", "u": {"username": "bob"}}, "bob: ok"),
        ({"msg": "carl", "t": "uj"}, "app"),
    ],
}  # fmt: skip


@table("app", APPS)
def test_what_people_wrote_is_kept_and_all_else_is_left_out_by_kind(check, app):
    (file, place, time), message, *cases = APPS[app]
    messages = [message | differs for differs, _ in cases]
    file = messages if file is ... else {k: messages if v is ... else v for k, v in file.items()}
    talk = "|".join(becomes for _, becomes in cases if ": " in becomes)
    left_out = Counter(becomes for _, becomes in cases if ": " not in becomes)
    entries = check({"folder/messages.json": file}, talk, **left_out)
    assert (entries[0]["conversation"], entries[0]["time"]) == (place, time)


def telegram_chat(title, form, *authors):
    messages = [{"type": "message", "from": author, "text": "hi"} for author in authors]
    return {"name": title, "type": form, "id": 1, "messages": messages}


def test_telegrams_export_of_everything_gives_the_talks_between_people(check):
    chats = [
        telegram_chat("News", "public_channel", "News"),
        telegram_chat("Helper", "bot_chat", "Helper", "Me"),
        telegram_chat(None, "saved_messages", "Me"),
        telegram_chat("Only mine", "private_supergroup", "Me", "Me"),
        telegram_chat("Ann", "personal_chat", "Ann", "Me") | {"id": 5},
        telegram_chat("Ann", "personal_chat", "Ann", "Me") | {"id": 6},
    ]
    left = [telegram_chat("Gone", "private_group", "Cy", "Me")]
    files = {"result.json": {"chats": {"list": chats}, "left_chats": {"list": left}}}
    talk = "Ann: hi|Me: hi|Ann: hi|Me: hi|Cy: hi|Me: hi"
    entries = check(files, talk, channel=1, bot=2, notes=1, alone=2)
    assert each("conversation", entries) == ["Ann 5", "Ann 6", "Gone"]


def test_a_topic_of_a_forum_of_telegram_is_a_conversation(check):
    said = {"type": "message"}
    messages = [
        {"id": 10, "type": "service", "actor": "Ann", "text": ""}
        | {"action": "topic_created", "title": "Food"},
        said | {"id": 11, "from": "Ann", "text": "soup?", "reply_to_message_id": 10},
        said | {"id": 12, "from": "Bob", "text": "hello all"},
        said | {"id": 13, "from": "Bob", "text": "bread", "reply_to_message_id": 11},
        said | {"id": 14, "from": "Ann", "text": "hello"},
    ]
    files = {"result.json": {"name": "Home", "messages": messages}}
    entries = check(files, "Ann: soup?|Bob: bread|Bob: hello all|Ann: hello", app=1)
    assert each("conversation", entries) == ["Home / Food", "Home"]


def test_instagrams_files_are_newest_first_and_make_one_conversation(check):
    def file(*texts):
        message = {"sender_name": "A"}
        messages = [message | {"timestamp_ms": 10**12 + int(t), "content": t} for t in texts]
        return {"participants": [], "title": "Zoe", "messages": messages}

    files = {"zoe_1/message_1.json": file("4", "3"), "zoe_1/message_2.json": file("2", "1")}
    entries = check(files, "A: 1|A: 2|A: 3|A: 4", keep=["alone"])
    assert each("conversation", entries) == ["Zoe"]


META = {  # who, and the app's sentences as messages of theirs
    "Ann Lee": [
        *["Ann Lee hat einen Anhang gesendet.", "annlee liked a message"],
        *["Ann sent an attachment.", "Nick sent an attachment.", "Le ha gustado un mensaje"],
        *["anni.3 started an audio call"],
        *["Ann bixu zorla mendi"] * 3,  # in no table, but it comes back
    ],
    "Bob": [
        *["You named the group Cakes.", "Enviaste um anexo.", "Hai inviato un allegato."],
        *["Reagált 😂 az üzenetre ", "Reagált ❤️ az üzenetre "],  # nor this, but the emoji differ
    ],
}


def test_what_meta_wrote_is_left_out_in_any_language_and_what_people_wrote_is_not(check):
    people = [("Bob", "Ann sent me cake."), ("Ann Lee", "Ann is late"), ("Ann Lee", "so 😂 funny")]
    notices = [(name, text) for name, texts in META.items() for text in texts]
    messages = [
        {"sender_name": name, "timestamp_ms": 1795513440000 + place, "content": meta(text)}
        for place, (name, text) in enumerate(people + notices)
    ]
    file = {"participants": [], "title": "x", "messages": messages}
    talk = "|".join(f"{name}: {text}" for name, text in people)
    check({"message_1.json": file}, talk, app=len(notices))


def test_slack_has_names_in_a_file_of_their_own_and_threads_are_conversations(check):
    users = [
        {"id": "U1", "name": "ann.l", "profile": {"display_name": "", "real_name": "Ann Lee"}},
        {"id": "U2", "name": "bob", "profile": {"display_name": "Bob"}},
    ]
    channels = [{"id": "C1", "name": "cakes", "members": ["U1"]}]
    day = [
        {"type": "message", "ts": "1795513441.0001", "user": "U1", "text": "hi <@U2> <#C1|>"},
        {"type": "message", "ts": "1795513442.0001", "user": "U2", "text": "so", "thread_ts": "7"},
        {"type": "message", "ts": "1795513443.0001", "user": "U2", "text": "ok"},
    ]
    files = {"a/2026-11-24.json": day, "channels.json": channels, "users.json": users}
    entries = check(files, "Ann Lee: hi @Bob #cakes|Bob: ok|Bob: so", keep=["alone"])
    assert each("conversation", entries) == ["a", "a / 7"]


# ---- lists, CSV, training sets ------------------------------------------------------------------
@table("author", ["author", "sender", "username", "user", "from", "name", "Nick"])
@table("text", ["message", "text", "content", "Body"])
def test_a_list_of_messages_under_the_keys_of_other_programs(check, author, text):
    log = [{"date": "26/12/24", "time": "6:06", author: name, text: "hi"} for name in "AB"]
    for content in log, {"messages": log}, "\n".join(map(json.dumps, log)):
        entries = check({"a.json": content}, "A: hi|B: hi")
        assert each("time", entries) == ["2024-12-26T06:06:00"]


@table("delimiter", [",", ";", "\t"])
@table("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_csv_with_a_header(check, convert, delimiter, encoding):
    long = "é" * 200_000
    lines = [
        "No,Date,Chat,From,Text",
        '7,24/11/26 10:45,Home,B,"3,\nand ""all"""',
        f"8,24/11/26 10:44,Home,A,{long}",
        "9,24-Nov-26 10:44 AM,Home,B,1",
        ",,,,",
    ]
    content = "\r\n".join(lines).replace(",", delimiter).encode(encoding)
    talk = f'B: 1|A: {long}|B: 3{delimiter}\nand "all"'
    entries = check({"a.csv": content}, talk, media=1)
    assert each("time", entries) == ["2026-11-24T10:44:00", "2026-11-24T10:45:00"]
    assert convert({"a.csv": content})[2] == ["nothing was understood in No"]


def test_a_row_of_csv_with_a_comma_too_many_is_left_out_and_told(convert):
    entries, _, notes = convert({"a.csv": "from,text\nAnn,hi\nBob,well, yes\nAnn\nBob,NA"})
    assert [entry["message"] for entry in entries] == ["hi", "NA"]
    assert notes == ["rows with more columns than the header are left out or cut"]


def test_texts_without_authors_and_times_are_messages_and_never_copies(check):
    files = {f"{folder}/a.json": [{"text": "ok"}, {"text": "ok"}] for folder in "ab"}
    check(files, "None: ok|None: ok|None: ok|None: ok")


# ---- WhatsApp -----------------------------------------------------------------------------------
@table(
    ("clock", "headers"),
    [
        ("00:04:00", "11/24/26, 12:04 AM - "),
        ("02:15:00", "24/11/26, 2:15 at night - "),
        ("09:15:00", "24/11/26, 9:15 in the morning - "),
        ("10:44:00", "24/11/26, 10:44 - |24. 11. 2026, 10:44 - |24.11.2026 klo 10.44 - "),
        ("10:44:00", "24.11.2026 г., 10:44 ч. - |24/11/26 10:44 a.\xa0m. - |2026-11-24 10:44 - "),
        ("10:44:00", "2026/11/24 上午10:44 - |24/11/2569 10:44 - |२४/११/२६, १०:४४ - "),
        ("10:44:00", "10:44, 24/11/2026 - |10:44, 24 Nov 2026 - |[24/11/R8, 10:44:00] "),
        ("10:44:25", "[24/11/26, 10:44:25] |[24.11.26 10.44.25] |\u200e[24/11/2026, 10:44:25] "),
        ("13:44:00", "2026年11月24日 下午1:44 - |2026년 11월 24일 오후 1:44 - "),
        ("21:15:00", "24/11/26, 9:15 in the evening - |24/11/26, 9:15 at night - "),
        ("21:15:00", "24/11/26 9:15 de la noche - |24/11/26, 9:15 μ.μ. - "),
        ("22:44:00", "11/24/26, 10:44\u202fPM - |٢٤‏/١١‏/٢٠٢٦، ١٠:٤٤ م - "),
        (
            "22:44:25",
            "24/11/26, 10:44:25 pm: |11/24/26, 10:44:25 PM: |[11/24/26, 10:44:25\u202fPM] ",
        ),
        ("22:44:25", "\u200f[٢٤‏/١١‏/٢٠٢٦، ١٠:٤٤:٢٥ م] "),
    ],
)
def test_a_message_begins_with_a_date_in_any_form(check, clock, headers):
    for header in headers.split("|"):
        chat = f"{header}Ann: hi: you\n[1] second line\n{header}Bob: ok"
        entries = check({"a.txt": chat}, "Ann: hi: you\n[1] second line|Bob: ok")
        assert each("time", entries) == [f"2026-11-24T{clock}"], header


ANDROID, IPHONE = "24/11/26, 10:44 - ", "[24/11/26, 10:44:25] "


def chat_of(*messages, form=ANDROID):
    return "\n".join(form + message for message in messages)


OF_PEOPLE = ["see <https://a.b>", "std::vector<int>", "</h1>", "3 < 4 > 2", "so <big grin>"]
OF_PEOPLE += ["the image omitted a lot", "oh. (it is)"]


@table(
    ("text", "words"),
    [
        *((text, text) for text in OF_PEOPLE),
        ("ok \u200e<This message was edited>", "ok"),
        ("gut <Diese Nachricht wurde bearbeitet.>", "gut"),
        ("<Media omitted>\nlook here", "look here"),
        ("IMG-20261124-WA0001.jpg (file attached)\nlook\nhere", "look\nhere"),
        ("IMG-20261124-WA0001.jpg (Datei angehängt)\nschau", "schau"),
        ("look \u200e<attached: 00000012-PHOTO-2026-11-24-10-44-25.jpg>", "look"),
        ("look <pièce jointe : 00000012-PHOTO-2026-11-24-10-44-25.jpg>", "look"),
        ("look at this\u200eimage omitted", "look at this"),
        ("Cake:\nmilk\neggs (6 large)", "Cake:\nmilk\neggs (6 large)"),  # no poll
        ("soon:\n14/11/2026 18:00 - dinner: soup", "soon:\n14/11/2026 18:00 - dinner: soup"),
        ("@\u2068Bob\u2069 hi", "@Bob hi"),
    ],
)
def test_the_words_of_a_person_stay_without_the_tags_around_them(check, text, words):
    check({"a.txt": chat_of(f"Ann: {text}", "Bob: ok")}, f"Ann: {words}|Bob: ok")


@table(
    ("form", "kind", "texts"),
    [
        (ANDROID, "media", ["<Media omitted>", "<Без медиафайлов>", "<המדיה לא נכללה>", "null"]),
        (ANDROID, "media", ["AUD-1-WA0001. (file attached)", "Medya dahil edilmedi"]),
        (ANDROID, "media", ["2013-08-06-PHOTO-00000006.jpg <attached>"]),
        (ANDROID, "media", ["<Pominięto multimedia>\nplan.pdf", "S.webp (archivo adjunto)"]),
        (ANDROID, "deleted", ["This message was deleted", "Diese Nachricht wurde gelöscht."]),
        (ANDROID, "deleted", ["تم حذف هذه الرسالة.", "这条消息已被删除。"]),
        (ANDROID, "call", ["Missed voice call", "Videollamada perdida", "मिस्ड वीडियो कॉल"]),
        (ANDROID, "location", ["Ort: https://maps.google.com/?q=48,16", "live location shared"]),
        (ANDROID, "location", ["Home (Vienna, Austria): https://foursquare.com/v/4e89af"]),
        (ANDROID, "poll", ["UMFRAGE:\nWann?\nOPTION: Heute (1 Stimme)\nOPTION: Nie (0 Stimmen)"]),
        (ANDROID, "app", ["Waiting for this message. This may take a while."]),
        (IPHONE, "media", ["\u200eimage omitted", "\u200f\u200eلم يتم إدراج الصورة"]),
        (IPHONE, "media", ["\u200e<adjunto: 00000012-STICKER-2026-11-24-10-44-25.webp>"]),
        (IPHONE, "media", ["report.pdf • \u200e12 pages \u200edocument omitted"]),
        (IPHONE, "deleted", ["\u200eYou deleted this message."]),
        (IPHONE, "app", ["\u200eMissed voice call. \u200eTap to call back", "\u200eCy added you"]),
        (IPHONE, "app", ["\u200e\u200eDein Code hat sich geändert. \u200eMehr"]),
        (IPHONE, "poll", ["\u200ePOLL:\nWhen?\n\u200eOPTION: Now (\u200e2 votes)"
                          "\n\u200eOPTION: Later (\u200e1 vote)"]),
        (IPHONE, "location", ["\u200eLocation: https://maps.google.com/?q=48.2,16.3"]),
    ],
)  # fmt: skip
def test_what_whatsapp_wrote_is_left_out_in_many_languages(check, form, kind, texts):
    chat = chat_of(*(f"Ann: {text}" for text in texts), "A: a", "B: b", form=form)
    check({"a.txt": "\ufeff" + chat.replace("\n", "\r\n")}, "A: a|B: b", **{kind: len(texts)})


@table(
    ("kind", "texts"),
    [
        ("call", ["Missed voice call, Tap to call back", "Video call, 6 min"]),
        (
            "app",
            ["Ann changed the group name to “Cakes”", "Your security code with Ann changed. Why?"],
        ),
    ],
)
def test_on_an_iphone_marks_that_an_editor_stripped_are_not_needed(check, kind, texts):
    chat = chat_of(*(f"Ann: {text}" for text in texts), "A: a", "B: b", form=IPHONE)
    check({"a.txt": chat}, "A: a|B: b", **{kind: len(texts)})
    said = "|".join(f"Ann: {text}" for text in texts)
    check({"a.txt": f"{chat}\n{IPHONE}B: \u200eimage omitted"}, f"{said}|A: a|B: b", media=1)


def test_a_line_without_an_author_is_a_notice_of_the_app(check):
    notices = [
        "Messages and calls are end-to-end encrypted. Tap to learn more.",
        'Ann changed the subject from "Plans: May" to "Plans: June"',
        "Ann ha creato il gruppo “Gita: mare”",
    ]
    check({"a.txt": chat_of(*notices, "A: a", "B: b")}, "A: a|B: b", app=3)


UNKNOWN = ["<Média kihagyva innen>\nnézd", "nézd <Média kihagyva innen>"]
UNKNOWN += ["nézd\u200ekép kihagyva", "1.pdf (fájl innen)\nnézd"]


@table("text", UNKNOWN)
def test_a_tag_that_no_table_knows_is_the_apps_if_it_comes_back(check, text):
    check({"a.txt": chat_of(*(f"{name}: {text}" for name in "ABC"))}, "A: nézd|B: nézd|C: nézd")
    shown = text.replace("\u200e", "")
    check({"a.txt": chat_of(f"A: {text}", f"B: {text}")}, f"A: {shown}|B: {shown}")


# ---- Signal, logs, iMessage, plain text ----------------------------------------------------------
def test_signal_export(check):
    chat = """\
[2026-11-24 10:44:25] Ann: see you  \n(- Me: 👍, Cy: ❤️ -)![a.jpg](./media/a.jpg)
[2026-11-24 10:44:30] Me: \n\n> see you\n> there\n\nyes, 1 > 0  \n> not quoted
[2026-11-24 10:44:33] Ann:   \n(( 🎉 ))
[2026-11-24 10:44:35] Ann: (media not exported)
[2026-11-24 10:44:37] Ann: Incoming voice call (accepted, 2m 3s)
[2026-11-24 10:44:40] Ann: (This message was deleted)
"""
    twin = {"date": "2026-11-24T10:44:25.100", "sender": "Ann", "body": "see you  "}
    files = {"Ann/chat.md": chat, "Ann/data.json": [twin]}
    files |= {"Note to Self/chat.md": "[2026-11-24 10:44:25] Me: soup\n"}
    talk = "Ann: see you|Me: yes, 1 > 0  \n> not quoted"
    entries = check(files, talk, media=2, call=1, deleted=1, notes=1)
    assert each("conversation", entries) == ["Ann"]


LOGS = {  # program: (log, notices in it)
    "mIRC": ("# Log started: 2026-11-24 10:00 +0100\n[10:44:25] <@Ann> hi\n[10:45] <+bob> ok", 1),
    "days": ("[2026-11-24 10:44:25] <Ann> hi\n[2026-11-24 10:45:00] <bob> ok", 0),
    "irssi": ("--- Day changed Tue Nov 24 2026\n10:44:25 < Ann> hi\n"
              "10:45 -!- cy joined\n10:45 <@bob> ok", 2),
    "no clock": ("# 2026-11-24\n[10:44:25] <Ann> hi\n=== cy joined\n[10:45] <bob> ok", 2),
    "eggdrop": ("[00:00] --- Tue Nov 24 2026\n[10:44:25] <Ann> hi\n"
                "[10:44] Action: Ann waves\n[10:45] <bob> ok", 2),
    "WeeChat": ("2026-11-24 10:44:25\t@Ann\thi\n2026-11-24 10:45:00\t-->\tcy joined\n"
                "2026-11-24 10:45:00\tbob\tok", 1),
    "HexChat": ("**** BEGIN LOGGING AT Tue Nov 24 09:00:00 2026\n"
                "Nov 24 10:44:25 <Ann>\thi\nNov 24 10:45:00 <bob>\tok", 1),
    "dircproxy": ("# 2026-11-24\n[24 Nov 10:44:25] <Ann!n=a@b> +hi\n"
                  "[24 Nov 10:45] <bob!n=b@b> -ok\n[24 Nov 10:45] --> cy (n=c@b) joined", 2),
    "Konversation": ("[Tuesday 24 November 2026] [10:44:25 CET] <Ann>\thi\n"
                     "[Tuesday 24 November 2026] [10:45:00 CET] <bob>\tok", 0),
    "Textual": ("[2026-11-24T11:44:25+0100] <Ann> hi\n[2026-11-24T11:45:00+0100] * bob nods\n"
                "[2026-11-24T11:45:00+0100] <bob> ok", 1),
    "The Lounge": ("[2026-11-24T10:44:25.123Z] <Ann> hi\n[2026-11-24T10:45:00.123Z] <bob> ok", 0),
    "Chatty": ("# Log started: 2026-11-24 10:00:00\n[10:44:25] Ann: hi\n[10:45:00] bob: ok", 1),
    "Twitch": ("[2026-11-24 10:44:25 UTC] Ann: hi\n[2026-11-24 10:45:00 UTC] bob: ok", 0),
    "Pidgin": ("Conversation with bob@x.y at Tue 24 Nov 2026 10:44:25 AM CET on a@x.y (jabber)\n"
               "(10:44:25 AM) Ann: hi\n(10:45:00 AM) bob/Home: ok\n(10:46:00 AM) bob is away", 1),
    "WhatsApp Viewer": ("24.11.2026 - 10:44:25; Ann: hi\n24.11.2026 - 10:45:00; bob: ok", 0),
    "a day, a name": ("2026-11-24 10:44:25 Ann: hi\n2026-11-24 10:45:00 bob: ok", 0),
}  # fmt: skip


@table("program", LOGS)
def test_logs_of_many_programs(check, program):
    log, notices = LOGS[program]
    entries = check({"a.log": log}, "Ann: hi|bob: ok", app=notices)
    assert each("time", entries) == ["2026-11-24T10:44:25", "2026-11-24T10:45:00"]


def test_a_log_goes_on_after_midnight(check):
    log = "[23:59:50] a: late\n[00:00:10] b: early\n[00:00:05] a: a clock goes wrong"
    entries = check({"a.log": log}, "a: late|a: a clock goes wrong|b: early")
    times = ["1970-01-01T23:59:50", "1970-01-02T00:00:05", "1970-01-02T00:00:10"]
    assert each("time", entries) == times


def test_a_log_may_have_its_day_in_its_name(check):
    files = {f"#home/2026-11-{day}.log": "[10:44] <a> hi\n[10:44] <b> ok" for day in (24, 26)}
    entries = check(files, "a: hi|b: ok|a: hi|b: ok")
    assert each("time", entries) == ["2026-11-24T10:44:00", "2026-11-26T10:44:00"]
    assert each("conversation", entries) == ["#home"]


def test_imessage_exporter(check):
    chat = """\
Nov 24, 2026 10:44:25 AM (Read by you)\nMe\none\n\ntwo\nTapbacks:\nLoved by Ann\n
Nov 24, 2026  1:44:30 PM\nAnn\nNov 24, 2026  1:44:30 PM beter\nEdited 15 seconds later: best
This message responded to an earlier message.
    Nov 24, 2026  1:45:00 PM\n    Me\n    an answer\n
Nov 24, 2026  1:45:00 PM\nMe\nan answer\nReactions:\n❤️ by Ann\nand more\n
Nov 24, 2026  1:46:00 PM You named the conversation Home\n
Nov 24, 2026  1:46:30 PM\nAnn\nThey unsent this message part 5 seconds after sending!\n
Nov 24, 2026  1:47:00 PM\nAnn\n/Users/me/Library/Messages/Attachments/a/b.heic
"""
    talk = "Me: one\n\ntwo|Ann: best|Me: an answer\nand more"
    entries = check({"+15550100.txt": chat}, talk, app=2, media=1)
    assert [when[11:] for when in each("time", entries)] == ["10:44:25", "13:44:30", "13:45:00"]
    assert each("conversation", entries) == ["Person 1"]


def test_discords_csv_and_text(check):
    table = """AuthorID,Author,Date,Content,Attachments,Reactions
"1","ann","2026-11-24T10:44:25+01:00","hi","",""
"2","bob","2026-11-24T10:45:25+01:00","ok","",""
"2","bob","2026-11-24T10:46:25+01:00","Joined the server.","",""
"1","ann","2026-11-24T10:47:25+01:00","Started a call that lasted 12 minutes.","",""
"""
    check({"a.csv": table}, "ann: hi|bob: ok", app=1, call=1)


def test_discords_text(check):
    chat = f"""{"=" * 62}\nGuild: G\nChannel: c\n{"=" * 62}
[24/11/2026 10:44] ann (pinned)\nhi\n\n{{Attachments}}\nhttps://a.b\n\n{{Reactions}}\n👍 (1)\n
[24/11/2026 10:45] bob\nnote: yes\n\n{"=" * 62}\nExported 2 message(s)\n"""
    assert each("conversation", check({"a.txt": chat}, "ann: hi|bob: note: yes")) == ["G / c"]


def test_whatsapp_chat_exporter(check):
    chat = """[2026-11-24 10:44] You: yes\n                         at eight
[2026-11-24 10:45] Ann: <media file in WhatsApp/IMG-1.jpg>
[2026-11-24 10:45] Ann: <media file in WhatsApp/IMG-2.jpg>\n                         look
[2026-11-24 10:46] You: <The media is missing>"""
    check({"a.txt": chat}, "You: yes\nat eight|Ann: look", media=2)


# ---- what is half understood ---------------------------------------------------------------------
def test_one_wrong_byte_or_old_lines_do_not_spoil_the_letters_of_the_others(check):
    lines = ["[10:44] <a> perché".encode(), "[10:44] <b> già".encode()] * 10
    cut = b"\n".join([*lines, b"[10:44] <a> perch\xc3"])
    entries = check({"a.log": cut}, "|".join(["a: perché", "b: già"] * 10 + ["a: perch\ufffd"]))
    assert len(entries) == 21
    old = ["[10:44] <a> perché".encode("cp1252"), "[10:45] <b> già".encode()]
    check({"a.log": b"\n".join(old)}, "a: perché|b: già")


def test_mojibake_is_repaired_where_most_of_a_file_has_it(check):
    spoilt = [{"user": name, "text": meta("perché")} for name in "AB"]
    check({"a.json": spoilt}, "A: perché|B: perché")
    check({"a.json": [*spoilt, *[{"user": "C", "text": "perché"}] * 3]}, "A: perchÃ©|B: perchÃ©"
          "|C: perché|C: perché|C: perché")  # fmt: skip


def test_a_program_that_is_half_like_an_app_is_not_taken_for_it(convert, capsys):
    half = chat_of("Ann: hi", "Bob: ok") + "\n24/11/26 10:44 -- Ann wrote\n24/11/26 10:45 > hi"
    with pytest.raises(SystemExit):
        convert({"a.txt": half})
    assert "a text that begins with '24/11/26, 10:44 - Ann: hi'" in capsys.readouterr().err


@table(("key", "column"), [("writtenBy user", "author"), ("Date of it", "time")])
def test_authors_and_times_under_an_unknown_name_are_told(convert, capsys, key, column):
    with pytest.raises(SystemExit):
        convert({"a.json": [{"text": "hi", key: "24.11.2026"}, {"text": "ok", key: "24.11.2026"}]})
    assert f"a list with its {column}s under {key!r}" in capsys.readouterr().err


# ---- times --------------------------------------------------------------------------------------
@table(
    ("time", "values"),
    [
        ("2026-11-24T09:44:00", [1795513440, "1795513440.5", 1795513440000, 1795513440000000]),
        ("2026-11-24T09:44:00", ["Tue, 24 Nov 2026 09:44:00 +0100", "2026-11-24T10:44:00+01:00"]),
        ("2026-11-24T00:00:00", ["24.11.2026"]),
        ("1970-01-01T20:15:00", ["20:15", "8:15 PM"]),  # and not today
    ],
)
def test_a_time_may_be_written_in_many_ways(check, values, time):
    for value in values:
        log = [{"timestamp": value, "user": name, "text": "hi"} for name in "AB"]
        assert each("time", check({"a.json": log}, "A: hi|B: hi")) == [time], value


@table(
    "time",
    [
        "Dienstag, 24. November 2026 um 22:44:25 UTC",
        "mardi 24 novembre 2026 à 22:44:25 UTC",
        "martes, 24 de noviembre de 2026, 22:44:25 UTC",
        "martedì 24 novembre 2026 alle ore 22:44:25 UTC",
        "2026. november 24., kedd 22:44:25 UTC",
        "2026년 11월 24일 화요일 오후 10시 44분 25초 UTC",
        "2026年11月24日星期二 UTC 下午10:44:25",
        "вторник, 24 ноября 2026 г., 22:44:25 UTC",
        "Tue Nov 24 22:44:25 2026",
    ],
)
def test_a_month_and_a_part_of_the_day_have_names_in_many_languages(check, time):
    log = [{"created": time, "user": name, "text": "hi"} for name in "AB"]
    assert each("time", check({"a.json": log}, "A: hi|B: hi")) == ["2026-11-24T22:44:25"]


@table(
    "time",
    [
        "no time",
        float("inf"),
        float("nan"),
        "99.99.2026, 10:44",
        "24.11.2026, 10:99",
    ],
)
def test_a_chat_with_times_that_nobody_understands_is_refused_but_one_such_time_is_not(
    convert, capsys, time
):
    log = [{"time": "24.11.2026, 10:44", "user": name, "text": "hi"} for name in "AB" * 10]
    entries, _, _ = convert({"a.json": [log[0] | {"time": time}, *log]})
    assert [entry.get("time") for entry in entries][:2] == [None, "2026-11-24T10:44:00"]
    with pytest.raises(SystemExit):
        convert({"a.json": [entry | {"time": time} for entry in log]})
    assert f"times that are not understood, like '{time}'" in capsys.readouterr().err


@table(
    ("dates", "first"),
    [
        ("1/2/26 13/2/26", "2026-02-01"),  # no month is 13
        ("1/2/26 2/13/26", "2026-01-02"),
        ("3/4/26 4/4/26 5/4/26 1/5/26", "2026-04-03"),  # so time goes on
        ("4/3/26 4/4/26 4/5/26 5/1/26", "2026-04-03"),
        ("1/5/26 5/4/26 4/4/26 3/4/26", "2026-04-03"),  # or back
        ("26-04-03 26-04-04 26-05-01", "2026-04-03"),
    ],
)
def test_the_order_of_day_and_month_is_that_of_the_whole_file(convert, dates, first):
    lines = [f"{day}, 9:44 - {'AB'[i % 2]}: hi\n" for i, day in enumerate(dates.split())]
    entries, _, notes = convert({"chat.txt": "".join(lines)})
    assert (entries[0]["time"][:10], notes) == (first, [])


def test_old_exports_leave_out_the_year_that_it_is(check):
    chat = "30 Dec 2015 23:00 - A: a\n2 Jan 10:44 - B: b\n3 Jan 10:44 - A: c"
    days = [when[:10] for when in each("time", check({"a.txt": chat}, "A: a|B: b|A: c"))]
    assert days == ["2015-12-30", "2016-01-02", "2016-01-03"]


@table(
    ("picture", "day"),
    [
        ("3/4/26, 9:44 AM - A: IMG-20260403-WA0001.jpg (file attached)", "2026-04-03"),
        ("[3/4/26, 9:44:25 AM] A: <attached: 01-PHOTO-2026-03-04-09-44-25.jpg>", "2026-03-04"),
    ],
)
def test_the_name_of_a_picture_decides_before_capitals_do(convert, picture, day):
    begins = picture.partition("A: ")[0]
    entries, _, notes = convert({"a.txt": f"{picture}\n{begins}B: hi\n{begins}A: ok"})
    assert (entries[0]["time"][:10], notes) == (day, [])


def test_days_in_a_row_decide_before_capitals_do(convert):
    days = "03/04/26", "05/04/26", "06/04/26"
    lines = [f"{day}, 9:44 AM - {name}: hi\n" for day in days for name in "AB"]
    entries, _, notes = convert({"a.txt": "".join(lines)})
    assert (entries[0]["time"][:10], notes) == ("2026-04-03", [])


@table(
    ("clock", "dates", "day"),
    [
        ("9:44", None, "2026-02-01"),
        ("9:44 AM", None, "2026-01-02"),  # an American phone
        ("9:44 AM", "dmy", "2026-02-01"),
    ],
)
def test_where_nothing_decides_capitals_or_the_setting_do_and_it_is_told(
    convert, clock, dates, day
):
    entries, _, notes = convert({"a.txt": f"1/2/26, {clock} - A: a\n1/2/26, {clock} - B: b"}, dates)
    assert each("time", entries) == [f"{day}T09:44:00"]
    other = "mdy" if clock == "9:44" else "dmy"
    assert [note[-11:] for note in notes] == ([] if dates else [f"--dates {other}"])


# ---- all apps: names, bots, copies --------------------------------------------------------------
AUTHORS = {
    "+43 660 0000001": "Person 1",
    "\u202a+43 660 0000001\u202c": "Person 1",
    "~\u202fAnn": "Ann",
    "+1 (555) 010\u20110002": "Person 2",
    "\u202a+44\xa07700\xa0900000\u202c": "Person 3",
    "A\x1b[2Jn\u202e  Lee": "A[2Jn Lee",
    "\U0001f468\u200d\U0001f33e": "\U0001f468\u200d\U0001f33e",
}


def test_authors_lose_what_is_no_name_and_a_phone_number_becomes_a_person(check):
    talk = "|".join(f"{author}: hi" for author in AUTHORS.values())
    check({"a.txt": chat_of(*(f"{name}: hi" for name in AUTHORS))}, talk)


def test_bots_are_known_by_name_and_a_kind_that_is_kept_is_not_left_out(check):
    log = {"a.log": "[10:00:00] <ann> hi\n[10:00:01] <Nightbot> buy!\n[10:00:02] <bob> ok"}
    check(log, "ann: hi|bob: ok", bot=1)
    check(log, "ann: hi|Nightbot: buy!|bob: ok", keep=["bot"])


def test_a_message_that_two_exports_hold_is_read_once(check):
    old = "24/11/26, 10:44 - A: hi\n24/11/26, 10:44 - A: hi\n24/11/26, 10:45 - B: ok"
    new = old + "\n24/11/26, 10:46 - A: more\n24/11/26, 10:46 - A: more"
    talk = "A: hi|A: hi|B: ok|A: more|A: more"
    check({"Ann.txt": old, "Ann (1).txt": new}, talk, copy=3)


def test_a_conversation_is_named_by_its_file_or_folder():
    titles = {
        "x/Chat WhatsApp con Ann.txt": "Chat WhatsApp con Ann",
        "Чат WhatsApp с Bob (1).txt": "Чат WhatsApp с Bob",
        "Cy.zip/_chat.txt": "Cy",
        "Cy/notes.txt": "notes",
    }
    assert {file: title_of(file) for file in titles} == titles
