"""Raw data → messages: data/messages.py."""

from data.messages import find_raw, mended, read, seconds

import json
from time import tzset

import pytest

table = pytest.mark.parametrize


def messages_of(tmp_path, content, name="messages_v1.json"):
    """Return the messages of a file in one list, without cleaning."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    conversations = read(path, str.strip, str.strip)
    return [message for log in conversations.values() for message in log]


def texts_of(messages):
    return [(*(before.text for before in m.context or []), m.text) for m in messages]


# ---- the three shapes ----------------------------------------------------------------------------
def test_a_log_has_authors_and_times(tmp_path):
    first, second = messages_of(
        tmp_path, [{"message": "hi", "author": "ann", "time": "1970-01-01T00:01"}, "a text alone"]
    )
    assert (first.text, first.author, first.time, first.entry) == ("hi", "ann", 60, 0)
    assert (second.text, second.author, second.time, second.entry) == ("a text alone", "", None, 1)
    assert first.context is second.context is None


def test_a_reply_may_bring_what_came_before_it(tmp_path):
    entry = {"previous_messages": ["hi all", "", "hi!"], "message": "ready?"}
    assert texts_of(messages_of(tmp_path, [entry])) == [("hi all", "hi!", "ready?")]


def test_a_ready_pair_keeps_its_prompt(tmp_path):
    [message] = messages_of(tmp_path, [{"prompt": "are\n\nyou ready?", "completion": "I\nam"}])
    assert texts_of([message]) == [("are", "you ready?", "I\nam")]
    assert message.prompt == "are\n\nyou ready?"


def test_conversations_are_apart(tmp_path):
    path = tmp_path / "messages_v1.json"
    path.write_text(json.dumps([{"message": str(i), "conversation": i % 2} for i in range(4)]))
    conversations = read(path, str, str)
    assert {name: texts_of(log) for name, log in conversations.items()} == {
        "0": [("0",), ("2",)],
        "1": [("1",), ("3",)],
    }


TIMES = ["2024-05-31T18:04:00Z", "2024-05-31 18:04", "2024-05-31T20:04+02:00", "1717178640"]


@table("time", [*TIMES, 1717178640, 1717178640000])
def test_a_time_may_be_written_in_many_ways_and_is_of_utc(time, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    tzset()
    assert seconds(time) == 1717178640


# ---- files as people edit them -------------------------------------------------------------------
LINES = '[\n{"message": "a, ]"},\n{"message": "b"},\n{"message": "c"}\n]\n'
EDITED = {
    "a comma too many": LINES.replace('"c"}', '"c"},'),
    "two commas": LINES.replace('"b"},', '"b"},,'),
    "a comma too few": LINES.replace('"b"},', '"b"}'),
    "all too few": LINES.replace("},", "}"),
    "a comma too many within an entry": LINES.replace('"b"}', '"b",\n}'),
    "a comma too few within an entry": LINES.replace('"b"', '"b"\n"author": "ann"'),
    "of Windows": LINES.replace('"c"}', '"c"},').replace("\n", "\r\n"),
}


@table("edit", EDITED)
def test_a_comma_too_many_or_too_few_at_the_end_of_a_line_is_forgiven(tmp_path, edit):
    messages = messages_of(tmp_path, EDITED[edit].encode())
    assert [message.text for message in messages] == ["a, ]", "b", "c"]


def test_a_comma_at_the_end_of_a_line_of_jsonl_is_forgiven(tmp_path):
    content = b'{"message": "a,"},\n\n{"message": "b"}\r\n'
    messages = messages_of(tmp_path, content, "messages_v1.jsonl")
    assert [(message.text, message.entry) for message in messages] == [("a,", 1), ("b", 3)]


def test_what_is_right_is_not_mended():
    pretty = json.dumps([{"message": "a", "previous_messages": ["b", 'c"']}, 7, None], indent=1)
    assert mended(pretty) == pretty and mended(LINES) == LINES


@table("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_may_begin_with_a_byte_order_mark(tmp_path, encoding):
    content = json.dumps(["perché"], ensure_ascii=False).encode(encoding)
    assert texts_of(messages_of(tmp_path, content)) == [("perché",)]


EDIT = "FIX: # correct "
EXPORT = "FIX: python data/raw/from_export.py "
BAD = {
    "not JSON": (b'[\n{"message": "a"},\n {"message" "b"}]', 'line 3: not JSON: Expecting', EDIT),
    "an app's text": (b"12/05/24, 10:30 - Ann: hi", "line 1: not JSON: ", EXPORT),
    "an iPhone's text": (b"[01.05.24, 10:00:00] Ann: hi", "line 1: not JSON: ", EXPORT),
    "an app's JSON": (b'{"messages": []}', 'line 1: {"messages": []} is no list', EXPORT),
    "Windows": ('["a",\n"perché"]'.encode("cp1252"), "line 2: not JSON in UTF-8", EDIT),
    "a bad message": (b'["a", {"message": 3}]', 'entry 1: "message" is 3', EDIT),
    "no message": (b'[{"message": "a"}, {"msg": "b"}]', 'entry 1: no "message" in {"msg"', EDIT),
    "context is a text": (b'[{"previous_messages": "a", "message": "b"}]', "entry 0: ", EDIT),
    "context holds null": (b'[{"previous_messages": [null], "message": "b"}]', "entry 0: ", EDIT),
    "half a pair": (b'[{"prompt": "c"}]', 'entry 0: no "completion"', EDIT),
    "a time that is none": (b'[{"message": "a", "time": "noon"}]', "entry 0: ", EDIT),
    "a nest": (b"[" * 100_000, "line 1: not JSON: maximum recursion", EDIT),
}  # fmt: skip


@table("name", BAD)
def test_what_cannot_be_read_is_named_and_stays_where_it_is(tmp_path, capsys, name):
    content, what, fix = BAD[name]
    with pytest.raises(SystemExit) as stop:
        messages_of(tmp_path, content)
    error, *fixes = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and f"messages_v1.json, {what}" in error
    assert fixes[0].startswith(fix)
    assert not any(" mv " in line or " rm " in line for line in fixes)
    assert (tmp_path / "messages_v1.json").read_bytes() == content


def test_a_bad_line_of_jsonl_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        messages_of(tmp_path, b'{"message": "a"}\n\n{"message": 3}\n', "messages_v1.jsonl")
    assert "messages_v1.jsonl, line 3: " in capsys.readouterr().err


def test_keys_that_are_not_used_are_named(tmp_path, capsys):
    messages_of(tmp_path, [{"message": "a", "sender": "ann", "\x1b[2J": 1}])
    assert capsys.readouterr().err.startswith(
        r"warning: these keys of entries are not used: \x1b[2J, sender"
    )


# ---- the file is not there -----------------------------------------------------------------------
MISSING = [
    ("messages_sample.json", ["# python data/raw/from_export.py YOUR_EXPORT --version v1"]),
    ("my chat.txt", ["python data/raw/from_export.py 'data/raw/my chat.txt' --version v1"]),
    ("messages_family.jsonl",
        ["# python data/raw/from_export.py YOUR_EXPORT --version v1", "export VERSION=family"]),
]  # fmt: skip


@table(("name", "fixes"), MISSING)
def test_a_missing_file_is_answered_with_what_is_there(tmp_path, monkeypatch, capsys, name, fixes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "data/raw" / name).write_text("hi")
    with pytest.raises(SystemExit):
        find_raw("v1")
    error, *lines = capsys.readouterr().err.splitlines()
    assert f"messages_v1.json is not there or empty; there are {name}" in error
    assert lines == [f"FIX: {fix}" for fix in fixes]
