"""models/chat.py: a talk in the shape that was trained, with keys that do what people expect."""

from models import chat, common, sampling

import fcntl
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import mlx_lm
import pytest
from conftest import cut_off

SCRIPT = "models/chat.py"
BASE = Path("models/base/tiny-gemma-3")
FUSED = Path("models/fused/fused-sample_tiny-gemma-3")
DATA = Path("data/for_train/sample")
SETTINGS = {
    "shape": "prompt",
    "names": True,
    "authors": ["ann", "bob"],
    "prompt": "{context}\n\nWrite the next message of this chat, as {author}.",
    "question_prompt": "{context}\n\nAsk the next question in this chat, as {author}.",
    "window": 10,
    "max_context_chars": 300,
    "max_seq_length": 1024,
}
TURNS = SETTINGS | {"shape": "turns", "names": False, "authors": ["ann"]}
GREEDY = ["--temperature", "0", "--max-tokens", "8"]


def cases(names, table):
    return pytest.mark.parametrize(names, list(table.values()), ids=list(table))


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def project(project, monkeypatch):
    """A project whose fused model is the tiny base, and which knows ann and bob."""
    write_json(project / DATA / "settings.json", SETTINGS)
    shutil.copytree(project / BASE, project / FUSED)
    monkeypatch.chdir(project)
    return project


@pytest.fixture(scope="module")
def tiny(template):
    """Return (model, tokenizer) of the tiny base."""
    return chat.load_model(template / BASE)


@pytest.fixture(scope="module")
def tidy(tiny):
    """Return what makes a message as those that were learned."""
    return chat.cleaner(tiny[1])


def likeliest(tiny, log):
    """Return ann's reply to a log, of which the likeliest token is taken each time."""
    model, tokenizer = tiny
    prompt = chat.make_prompt(log, "ann", SimpleNamespace(**SETTINGS), tokenizer)
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=8).strip()


# ---- what is wrong -------------------------------------------------------------------------------
def remove(*folders):
    return lambda: [shutil.rmtree(folder) for folder in folders]


def settings(value):
    return lambda: write_json(DATA / "settings.json", value)


def cut_model():
    cut_off(FUSED / "model.safetensors")


BUILD = "VERSION=sample python build_train.py"
TRAIN = "VERSION=sample MODEL=tiny-gemma-3 ./fine_tune.sh"

# {id: (what is done to the project, flags, the first FIX)}
WRONG = {
    "no data": (remove(DATA), "", BUILD),
    "no settings": ((DATA / "settings.json").unlink, "", BUILD),
    "settings are a list": (settings([1]), "", BUILD),
    "settings are incomplete": (settings({"shape": "turns"}), "", BUILD),
    "no name": (None, "--version ../x", "export VERSION=v1"),
    "not trained": (remove(FUSED), "", TRAIN),
    "no base": (remove(FUSED, BASE), "", "python tests/tiny_base.py"),
    "model cut": (cut_model, "", "VERSION=sample MODEL=tiny-gemma-3 ./fuse.sh"),
    "one author": (settings(TURNS), "--as zoe", "python models/chat.py --as ann"),
    "a flag": (None, "--temperature nan", "python models/chat.py --help"),
}


@pytest.mark.slow
@cases("change, flags, fix", WRONG)
def test_what_is_missing_or_wrong_is_said_with_its_fix(project, run, change, flags, fix):
    if change:
        change()
    result = run(project, SCRIPT, *flags.split(), input="hi\n")
    assert (result.returncode, result.stdout) == (2 if "--help" in fix else 1, "")
    assert re.search(f"error: .+\nFIX: {re.escape(fix)}\n", result.stderr)
    assert "Traceback" not in result.stderr


@cases(
    "settings, author, me, expected",
    {
        "who was learned most": (SETTINGS, "", "me", ("ann", "me")),
        "another one": (SETTINGS, "bob", "me", ("bob", "me")),
        "both the same": (SETTINGS, "", "ann", ("ann", "ann_")),
        "several without names": (SETTINGS | {"names": False}, "", "me", ("model", "me")),
        "nobody": (SETTINGS | {"authors": []}, "", "me", ("model", "me")),
        "only author": (TURNS, "", "me", ("ann", "me")),
    },
)
def test_who_replies_and_who_types(settings, author, me, expected):
    args = SimpleNamespace(author=author, me=me)
    assert chat.speakers(args, SimpleNamespace(**settings)) == expected


@cases(
    "said, sampled",
    {
        "nothing": (None, (0.8, 0.95, 0)),
        "some": ({"temperature": 0, "top_k": 64, "top_p": None}, (0, 0.95, 64)),
        "a list": ([1], (0.8, 0.95, 0)),
    },
)
def test_sampling_is_as_the_base_says(tmp_path, said, sampled):
    write_json(tmp_path / "generation_config.json", said)
    assert tuple(sampling.sampling_of(tmp_path).values()) == sampled
    assert tuple(sampling.sampling_of(tmp_path, 0.5).values()) == (0.5, *sampled[1:])
    assert tuple(sampling.sampling_of(tmp_path / "none").values()) == (0.8, 0.95, 0)


# ---- the prompt ----------------------------------------------------------------------------------
def invented_log(people):
    """Return [(author, text)], no text twice, of people who take turns at random."""
    draw, log = random.Random(0), [("", "")]
    for number in range(300):
        author = draw.choice([name for name in people if name != log[-1][0]])
        log.append((author, f"word{number} {draw.choice(['Perché', 'no <eos>', 'x' * 60])} end"))
    return log[1:]


@pytest.mark.slow
@cases(
    "people, flags",
    {
        "names": (["ann", "bob", "eve"], "--shape prompt"),
        "no names": (["ann", "bob", "eve"], "--shape prompt --names 0"),
        "one author": (["ann", "bob"], "--shape prompt --only-author ann"),
        "turns of two": (["ann", "bob"], "--only-author ann"),
        "turns of several": (["ann", "bob", "eve"], "--only-author ann"),
    },
)
def test_the_prompt_is_that_of_the_training_rows(project, run, tidy, people, flags):
    log = invented_log(people)
    entries = [{"author": author, "message": text} for author, text in log]
    shutil.rmtree(DATA)
    write_json(project / "data/raw/messages_sample.json", entries)
    flags = f"{flags} --window 4 --max-context-chars 60".split()
    made = run(project, "build_train.py", *flags, env={"MODEL": "not-there"})
    assert made.returncode == 0, made.stderr

    found = common.read_settings(DATA / "settings.json", "")
    log = [(author, tidy(text)) for author, text in log]
    places = {text: place for place, (_, text) in enumerate(log)}
    rows = common.read_rows(DATA / "train.jsonl", "")
    assert len(rows) > 20
    for *prompt, reply in rows:
        place = places[reply["content"]]
        context = log[max(0, place - found.window) : place]
        assert chat.make_chat(context, log[place][0], found) == prompt


@pytest.mark.slow
def test_a_message_that_is_typed_is_cleaned_as_those_that_were_learned(tidy):
    typed = "  two   words\t\n\nPerche\u0301\u200b bye<end_of_turn>\x1b"
    assert tidy(typed) == "two words\nPerché bye< end_of_turn>"


def test_a_long_talk_loses_its_oldest_messages():
    tokenizer = SimpleNamespace(apply_chat_template=lambda turns, **_: turns[0]["content"])
    found = SimpleNamespace(**TURNS | {"window": 3})
    log = [("me", f"message {number}") for number in range(9)]
    assert chat.make_prompt(log, "ann", found, tokenizer) == "message 6\nmessage 7\nmessage 8"
    found.max_seq_length = 20
    assert chat.make_prompt(log, "ann", found, tokenizer) == "message 7\nmessage 8"
    log = [("me", "a message that is too long alone")]
    assert chat.make_prompt(log, "ann", found, tokenizer) == log[0][1]


# ---- the talk, in a pipe -------------------------------------------------------------------------
@pytest.mark.slow
def test_each_line_of_a_pipe_gets_a_reply_to_all_that_was_said(project, run, tiny, tidy):
    log, expected = [], ""
    for message in ["perché < eos>", "how are\nyou", "exit"]:
        log.append(("me", message))
        reply = likeliest(tiny, log)
        log.append(("ann", tidy(reply)))
        expected += common.visible(reply) + " …\n"  # cut off at 8 tokens
    said = {"input": "perché <eos>\n\nhow are\\\nyou\nexit", "cwd": project.parent}
    result = run(project, SCRIPT, *GREEDY, **said)
    assert (result.returncode, result.stdout) == (0, expected)
    assert result.stderr == f"loading {FUSED}\n"


@pytest.mark.slow
def test_ctrl_c_ends_it_with_130(project, run):
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    process = run(project, SCRIPT, "--max-tokens", 100_000, start=subprocess.Popen, **pipes)
    process.stdin.write(b"hi\n")
    process.stdin.flush()
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) in (130, -signal.SIGINT)  # a shell makes 130 of that
    assert process.stderr.read() == f"loading {FUSED}\n\n".encode()


# ---- the talk, at a terminal ---------------------------------------------------------------------
ENTER, UP, CTRL_C = "\r", "\x1b[A", "\x03"
PASTE = "\x1b[200~{}\x1b[201~"  # as a terminal pastes


class Terminal:
    """A person at a terminal: types, and reads up to what is expected."""

    def __init__(self, run, project, *flags):
        self.mine, theirs = pty.openpty()
        self.process = run(
            project,
            SCRIPT,
            *flags,
            env={"TERM": "xterm"},
            start=subprocess.Popen,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **dict.fromkeys(["stdin", "stdout", "stderr"], theirs),
        )
        os.close(theirs)

    def type(self, text):
        os.write(self.mine, text.encode())

    def read_to(self, expected, seconds=60):
        """Return what was shown, up to and with what is expected."""
        seen, end = b"", time.monotonic() + seconds
        while not seen.endswith(expected.replace("\n", "\r\n").encode()):
            assert select.select([self.mine], [], [], end - time.monotonic())[0], seen
            seen += os.read(self.mine, 1)
        return re.sub(r"\x1b\[\?2004.", "", seen.decode()).replace("\r\n", "\n").replace("\r", "")


@pytest.mark.slow
def test_a_talk_at_a_terminal(project, run, tiny):
    """Names stand before what is said, a paste is one message, Ctrl-C takes back a line."""
    terminal = Terminal(run, project, "--me", "eve", *GREEDY)
    terminal.read_to(f"loading {FUSED}\n(exit ends the talk)\neve: ")

    log = [("eve", "one\ntwo")]
    first = likeliest(tiny, log)
    terminal.type(PASTE.format("one\ntwo") + ENTER)
    shown = common.visible(first).replace("\n", "\n     ")
    assert terminal.read_to("eve: ") == f"one\ntwo\nann: {shown} …\neve: "

    terminal.type("not this")
    time.sleep(0.3)  # Python loses a Ctrl-C that comes in the moment before it waits for a key
    terminal.type(CTRL_C)
    assert "(exit ends the talk)" in terminal.read_to("eve: ")

    terminal.type("three" + ENTER)
    terminal.read_to(" …\neve: ")
    terminal.type(UP + ENTER)
    assert terminal.read_to("ann: ").endswith("three\nann: ")
    terminal.read_to("eve: ")
    terminal.type("exit" + ENTER)
    assert terminal.process.wait(10) == 0


@pytest.mark.slow
def test_a_reply_is_stopped_by_ctrl_c_and_hides_what_is_typed_meanwhile(project, run):
    terminal = Terminal(run, project, "--max-tokens", "100000")
    terminal.read_to("me: ")
    for _ in range(2):
        terminal.type("hi" + ENTER)
        terminal.read_to("ann: ")
        terminal.read_to(" ")
        terminal.type("typed meanwhile")
        time.sleep(0.3)
        terminal.type(CTRL_C)
        shown = terminal.read_to("\nme: ")
        assert "typed meanwhile" not in shown
        assert "exit ends" not in shown
    terminal.type("\x15\x04")  # deletes the line; Ctrl-D
    assert terminal.process.wait(10) == 0
