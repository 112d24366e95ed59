"""Raw data → messages: data/messages.py."""

from data.messages import find_raw, mended, read, seconds

import json
from pathlib import Path
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


BAD = {  # content of the file: what is said of it
    b'[\n{"message": "a"},\n {"message" "b"}]': ".json: not JSON: Expecting ':' delimiter: line 3",
    b"12/05/24, 10:30 - Ann: hi": ".json: not JSON: ",
    b'{"messages": []}': '.json: {"messages": []} is not a list of entries',
    '["a",\n"perch\u00e9"]'.encode("cp1252"): ".json, line 2: not UTF-8",
    b'["a", {"message": 3}]': '.json, entry 1: "message" is 3',
    b'[{"message": "a"}, {"msg": "b"}]': '.json, entry 1: no "message" in {"msg"',
    b'[{"previous_messages": "a", "message": "b"}]': '.json, entry 0: "previous_messages" is "a"',
    b'[{"previous_messages": [null], "message": "b"}]': ".json, entry 0: ",
    b'[{"prompt": "c"}]': '.json, entry 0: no "completion"',
    b'[{"message": "a", "time": "noon"}]': ".json, entry 0: Invalid isoformat string: 'noon'",
    b"[" * 100_000: ".json: not JSON: maximum recursion",
    b'{"message": "a"}\n\n{"message": 3}\n': '.jsonl, line 3: "message" is 3',
}


@table("content", BAD, ids=range(len(BAD)))
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, capsys, content):
    what = BAD[content]
    name = "messages_v1.jsonl" if what.startswith(".jsonl") else "messages_v1.json"
    with pytest.raises(SystemExit) as stop:
        messages_of(tmp_path, content, name)
    error, *fixes = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and f"messages_v1{what}" in error
    assert all(line.startswith("FIX: # ") for line in fixes)


def test_keys_that_are_not_used_are_named(tmp_path, capsys):
    messages_of(tmp_path, [{"message": "a", "sender": "ann", "\x1b[2J": 1}])
    assert capsys.readouterr().err.startswith(
        r"warning: these keys of entries are not used: \x1b[2J, sender"
    )


# ---- the file is not there -----------------------------------------------------------------------
def test_a_missing_file_is_answered_with_those_that_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "data/raw/messages_family.jsonl").write_text("hi")
    with pytest.raises(SystemExit):
        find_raw("v1")
    assert capsys.readouterr().err.splitlines() == [
        "error: there is no data/raw/messages_v1.json",
        "FIX: # python data/raw/from_export.py YOUR_EXPORT --version v1",
        "FIX: export VERSION=family",
    ]
    assert find_raw("family") == Path("data/raw/messages_family.jsonl")
