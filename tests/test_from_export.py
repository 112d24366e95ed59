"""What from_export.py finds, refuses, writes and prints.

What becomes of a message is in test_readers.py. Kills and full disks are in test_faults.py.
"""

from data.raw import from_export
from data.raw.readers import find
from data.raw.readers.files import open_file

import io
import json
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

table = pytest.mark.parametrize

CHAT = """\
24/11/26, 10:44 - Messages and calls are end-to-end encrypted.
24/11/26, 10:44 - Ann Lee: hi
24/11/26, 10:45 - Bob: ok
24/11/26, 10:46 - Ann Lee: <Media omitted>
25/11/26, 10:46 - Ann Lee: soup?
"""


# ---- helpers -------------------------------------------------------------------------------------
@pytest.fixture
def home(tmp_path):
    """A folder with an export, beside it a project of its own."""
    (tmp_path / "my project/data/raw").mkdir(parents=True)
    (tmp_path / "chat.txt").write_text(CHAT)
    return tmp_path


@pytest.fixture
def main(home, monkeypatch, capsys):
    """Return main("chat.txt", …): what it printed, and the errors; its exit code is main.code."""

    def main(*arguments):
        monkeypatch.chdir(home)
        monkeypatch.setattr(from_export, "RAW", home / "my project/data/raw")
        monkeypatch.setattr(sys, "argv", ["from_export.py", "--version", "ours", *arguments])
        main.code = 0
        try:
            from_export.main()
        except SystemExit as end:
            main.code = end.code
        return "".join(capsys.readouterr())

    return main


def written(home, version="ours"):
    path = home / f"my project/data/raw/messages_{version}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else []


def packed(files):
    """Return the bytes of a .zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


# ---- settings ------------------------------------------------------------------------------------
@table(
    ("arguments", "code", "what"),
    [
        ([], 2, "FIX: python data/raw/from_export.py ~/Downloads/"),
        (["chat.txt", "--keep", "apps"], 2, "FIX: python data/raw/from_export.py ~/Downloads/"),
        (["chat.txt", "--version", "../x"], 1, "FIX: export VERSION=v1"),
    ],
)
def test_wrong_usage_is_answered_with_what_to_type(home, main, arguments, code, what):
    assert what in main(*arguments).splitlines()[-1]
    assert (main.code, written(home)) == (code, [])


# ---- find ----------------------------------------------------------------------------------------
def test_a_name_with_spaces_needs_no_quotes(home, main):
    (home / "WhatsApp Chat with Ann.txt").write_text(CHAT)
    assert "3 entries" in main("WhatsApp", "Chat", "with", "Ann.txt")


def test_in_a_folder_what_is_no_chat_is_told_and_not_an_error(home, main):
    folder = home / "Downloads"
    (folder / "deep er").mkdir(parents=True)
    (folder / "deep er/chat.txt").write_text(CHAT)
    (folder / "bill.txt").write_text("Dear customer")
    (folder / ".hidden.txt").write_text(CHAT)
    (folder / "loop").symlink_to(folder)
    assert "1  Downloads/bill.txt: a text" in main("Downloads")
    assert len(written(home)) == 3
    assert main("Downloads/deep er", "Downloads/bill.txt").startswith("error: Downloads/bill.txt")


def test_what_the_script_wrote_is_no_export(home, main):
    raw = home / "my project/data/raw"
    (raw / "chat.txt").write_text(CHAT)
    (raw / "from_export.py").touch()
    for _ in range(2):
        assert "3 entries" in main(str(raw), "--version", "two")


def test_nothing_of_a_zip_is_unpacked(home, main):
    outside = {"../../outside.txt": CHAT, f"{home}/b.txt": CHAT.replace("Bob", "Cy")}
    (home / "a.zip").write_bytes(packed(outside))
    before = {path for path in home.rglob("*") if "my project" not in str(path)}
    assert "3 entries" in main("a.zip")
    assert {path for path in home.rglob("*") if "my project" not in str(path)} == before


def test_a_zip_that_would_not_fit_into_memory_is_refused(home, main, monkeypatch):
    (home / "bomb.zip").write_bytes(packed({"a.txt": CHAT, "b.txt": CHAT}))
    monkeypatch.setattr(find, "MOST_BYTES", 2 * len(CHAT))
    assert "bomb.zip/a.txt and so on" in main("bomb.zip")
    monkeypatch.setattr(find, "MOST_BYTES", 2 * len(CHAT) - 1)
    assert "bomb.zip holds over 0 GB\nFIX: unzip bomb.zip -d bomb" in main("bomb.zip")


def test_a_link_that_leads_out_of_a_folder_is_left_out_and_told(home, main):
    (home / "export").mkdir()
    (home / "export/chat.txt").write_text(CHAT)
    (home / "secret.txt").write_text(CHAT.replace("Bob", "Cy"))
    (home / "export/link.txt").symlink_to(home / "secret.txt")
    assert "not read              1  export/link.txt: a link that leads out" in main("export")
    assert len(written(home)) == 3


# ---- refuse --------------------------------------------------------------------------------------
DEEP = '{"messages": [{"creator": {}, "text": %s}]}' % ("[" * 700 + "]" * 700)
ZIP = packed({"chat.txt": CHAT})
PASSWORD = ZIP.replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")
UNREADABLE = {
    "missing": ("x.zip", None, "x.zip is not there, or no file"),
    "damaged": ("x.zip", ZIP.replace(b"Ann Lee", b"Ann Lea"), "Bad CRC-32 for file"),
    "cut off": ("x.zip", ZIP[:200], "a .zip that is not whole"),
    "locked": ("x.zip", PASSWORD, "is locked with a password\nFIX: unzip x.zip -d x"),
    "empty zip": ("x.zip", packed({}), "x.zip holds no chat"),
    "document": ("x.docx", packed({"[Content_Types].xml": "<Types/>"}), "x.docx is a document"),
    "diary": ("x.txt", "Dear diary\n", "x.txt is a text that begins with 'Dear diary'"),
    "web page": ("x.html", "<!DOCTYPE html><p>", "Machine-readable JSON"),
    "cut off JSON": ("x.json", '{"messages": [{"type": "mess', "begins with '{\"messages"),
    "brackets": ("x.json", "[" * 100000, "not as its app writes it"),
    "deep text": ("x.json", DEEP, "not as its app writes it"),
    "no chats": ("x.json", '{"chats": {"list": 7}}', "not as its app writes it"),
    "other keys": ("x.json", '{"songs": [], "title": "x"}', "JSON with the keys songs, title"),
    "no keys": ("x.json", "[1, null]", "JSON with the keys (none)"),
    "windows": ("x.json", '[{"previous_messages": [], "message": "b"}]', "copy it into data/raw"),
    "empty": ("x.txt", "", "x.txt is empty"),
    "binary": ("x.txt", "\0\1\2", "x.txt is no text"),
    "escapes": ("x.txt", "\x1b[2J\u202e", "begins with '\\x1b[2J\\u202e'"),
    "alone": ("x.txt", "1/2/26, 9:44 - Ann: hi", "nothing is left that people said to each other"),
}


@table("case", UNREADABLE)
def test_what_cannot_be_read_gets_an_error_that_says_what_it_is(home, main, case):
    name, content, what = UNREADABLE[case]
    if content is not None:
        (home / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    error = main(name)
    assert what in error and (main.code, written(home)) == (1, [])
    fixes = [line.removeprefix("FIX: ") for line in error.splitlines() if line.startswith("FIX: ")]
    assert fixes and not any(subprocess.run(["bash", "-nc", fix]).returncode for fix in fixes)


def test_chats_and_training_sets_do_not_mix(home, main):
    (home / "set.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "chats and training sets" in main("chat.txt", "set.jsonl")
    assert main("set.jsonl").splitlines()[-1].strip() == "VERSION=ours python build_train.py"


# ---- write ---------------------------------------------------------------------------------------
def test_another_export_replaces_only_if_told_and_what_was_there_is_kept(home, main):
    assert "3 entries" in main("chat.txt")
    assert "3 entries" in main("chat.txt")  # the same one
    (home / "chat.txt").write_text(CHAT + "25/11/26, 10:47 - Bob: yes\n")
    error = main("chat.txt")
    assert "FIX: python from_export.py --version ours chat.txt --replace" in error
    assert "FIX: python from_export.py --version ours chat.txt --version ours_2\n" in error
    assert (main.code, len(written(home))) == (1, 3)
    assert "4 entries" in main("chat.txt", "--version", "two") and len(written(home)) == 3
    assert "4 entries" in main("chat.txt", "--replace") and len(written(home)) == 4
    before = home / "my project/data/raw/messages_ours.json.before"
    assert len(json.loads(before.read_text())) == 3


def test_the_sample_of_the_guide_is_not_replaced_because_of_a_forgotten_export(home, main):
    (home / "my project/data/raw/messages_sample.json").write_text("[]")
    assert main("chat.txt", "--version", "sample").endswith("FIX: export VERSION=v1\n")


def test_what_an_editor_saves_at_the_last_moment_is_kept(home, main, monkeypatch):
    main("chat.txt")
    (home / "chat.txt").write_text(CHAT.replace("soup", "cake"))
    target, link = home / "my project/data/raw/messages_ours.json", from_export.folders.link

    def link_and_save(old, new):
        link(old, new)
        with open(old, "r+") as file:
            file.write("[ // mine")

    monkeypatch.setattr(from_export.folders, "link", link_and_save)
    assert "replaced" in main("chat.txt", "--replace")
    assert "cake" in target.read_text()
    assert target.with_name("messages_ours.json.before").read_text().startswith("[ // mine")


def test_a_jsonl_of_the_same_name_is_not_shadowed(home, main):
    edited = home / "my project/data/raw/messages_ours.jsonl"
    edited.write_text('{"message": "mine"}\n')
    assert "messages_ours.jsonl has other content" in main("chat.txt") and main.code == 1
    assert "replaced" in main("chat.txt", "--replace") and not edited.exists()
    assert "mine" in edited.with_name("messages_ours.jsonl.before").read_text()


def test_on_a_disk_that_knows_no_capitals_ann_does_not_replace_Ann(home, main, monkeypatch):  # noqa: N802
    main("chat.txt", "--version", "ann")
    (home / "chat.txt").write_text(CHAT.replace("soup", "cake"))
    monkeypatch.setattr(from_export.os, "listdir", lambda folder: ["messages_Ann.json"])  # a Mac's
    error = main("chat.txt", "--version", "ann", "--replace")
    assert "under a name with other capitals" in error and main.code == 1
    assert "soup?" in [entry["message"] for entry in written(home, "ann")]


# ---- report --------------------------------------------------------------------------------------
def test_a_zip_becomes_a_log_and_the_next_command_is_named(home, main):
    files = {"_chat.txt": CHAT, "__MACOSX/._chat.txt": "x", "a.jpg": "x"}
    (home / "Chat with Bob.zip").write_bytes(packed(files))
    assert [" ".join(line.split()) for line in main("Chat with Bob.zip").splitlines()] == [
        "read 1 WhatsApp, Chat with Bob.zip/_chat.txt",
        "conversations 1",
        "3 Chat with Bob",
        "authors 2",
        "2 Ann Lee",
        "1 Bob",
        "period 2026-11-24 to 2026-11-25",
        "left out 1 written by the app itself (app): Messages and calls are end-to-end encryp",
        "left out 1 media without words (media): <Media omitted>",
        "",
        "wrote my project/data/raw/messages_ours.json: 3 entries, to be edited if need be",
        "next, to answer as one of them, or as anybody:",
        "VERSION=ours python build_train.py --only-author 'Ann Lee'",
        "VERSION=ours python build_train.py",
    ]
    lines = (home / "my project/data/raw/messages_ours.json").read_text().splitlines()
    when = '"time": "2026-11-24T10:45:00"'
    assert lines[0] == "[" and lines[-1] == "]" and len(lines) == 5
    assert lines[2] == (
        f'{{"conversation": "Chat with Bob", {when}, "author": "Bob", "message": "ok"}},'
    )


def test_the_author_of_most_conversations_is_the_one_to_learn(capsys):
    talks = [("Me", "X"), *[("X", "X")] * 3, ("Me", "Y"), *[("Y", "Y")] * 3]
    entries = [{"author": author, "conversation": place} for author, place in talks]
    from_export.next_steps(entries, "v1")
    assert "--only-author Me\n" in capsys.readouterr().out


# ---- untrusted text ------------------------------------------------------------------------------
def test_hostile_text_reaches_neither_the_terminal_nor_the_shell(home, main):
    name = "A\x1b[2J\u202e'; rm -rf ~; '"
    log = [{"author": name, "text": "\ud800\x07\x9b\x00hi"}, {"author": "B", "text": "ok"}] * 2
    (home / "a\x1b[2J.json").write_text(json.dumps(log))
    printed = main("a\x1b[2J.json")
    assert all(c.isprintable() or c == "\n" for c in printed)
    assert (written(home)[0]["author"], written(home)[0]["message"]) == (
        "A[2J'; rm -rf ~; '",
        "?hi",
    )
    command = next(line for line in printed.splitlines() if "--only-author" in line)
    assert shlex.split(command)[-1] == "A[2J'; rm -rf ~; '"


@table("name", ["Ann 👩‍👧", "Bob 🩷", "Cy 🏴󠁧󠁢󠁥󠁮󠁧󠁿", "Zoë d'A \u202e$HOME", "\ud83dDan"])
def test_the_command_that_it_prints_names_the_author_as_the_data_do(home, main, name):
    log = [{"author": author, "text": "hi", "time": 0} for author in (name, name, "B")]
    (home / "a.json").write_text(json.dumps(log))
    command = next(line for line in main("a.json").splitlines() if "--only-author" in line)
    shell = subprocess.run(["bash", "-c", f"printf %s {command.split('--only-author ')[1]}"],
                           capture_output=True, check=True)  # fmt: skip
    assert shell.stdout.decode() == written(home)[0]["author"]


@table("head", ["24/11/26, 10:44 - Ann: ", "[10:44:25] <ann> ", "from,text\na,"])
def test_no_text_takes_long(head):
    texts = " ", "\n", "!", "<", "a <", "\u200e<", "(1 ", "1", "1/", "1/2/26, 10:44", ":", "\t", "«"
    for text in texts:
        content = head + text * (50_000 // len(text))
        start = time.process_time()
        chat = from_export.read_file(open_file("a.txt", content.encode(), {}), None)
        from_export.sort_out([chat], [])
        assert time.process_time() - start < 2, text


def seconds_of(process):
    """Return how long the processor has worked on a process; ps prints 00:00:01 or 0:01.02."""
    command = ["ps", "-o", "time=", "-p", str(process.pid)]
    minutes, seconds = subprocess.check_output(command, text=True).split(":")[-2:]
    return 60 * int(minutes) + float(seconds)


def test_ctrl_c_leaves_nothing(project, run):
    chat = project / "chat.txt"
    chat.write_text(CHAT * 100_000)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = run(project, "data/raw/from_export.py", chat, start=subprocess.Popen, **pipes)
    while seconds_of(process) < 1:  # by then it reads
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == (b"", b"\n")
    assert process.returncode == -signal.SIGINT  # for a shell this is 130
    assert {path.name for path in (project / "data/raw").glob("*messages*")} == {
        "messages_sample.json"
    }


def test_it_runs_from_any_folder(project, run):
    (project / "chat.txt").write_text(CHAT)
    away = Path(project.parent)
    env = {"VERSION": "mine"}
    result = run(project, "data/raw/from_export.py", project / "chat.txt", env=env, cwd=away)
    assert (result.returncode, result.stderr) == (0, "")
    assert (project / "data/raw/messages_mine.json").stat().st_mode & 0o777 == 0o600
