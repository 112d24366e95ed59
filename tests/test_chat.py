"""models/chat.py: a talk in the shape that was trained, with keys that do what people expect.

The sections are those of the script, in its order. A table of cases is {id: what to do, what must
come of it}; `pytest -k "id"` runs one of them.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm.chat
import pytest
from conftest import REPOSITORY, cut_off, last_error
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

SCRIPT = "models/chat.py"
BASE = Path("models/base/tiny-gemma-3")
ADAPTER = Path("models/adapters/adapter-sample_tiny-gemma-3")
FUSED = Path("models/fused/fused-sample_tiny-gemma-3")
DATA = Path("data/for_train/sample")
SETTINGS = {
    "shape": "prompt",
    "names": True,
    "authors": ["ann", "bob"],
    "prompt": "{context}\n\nWrite the next message of this chat, as {author}.",
    "window": 10,
    "max_context_chars": 300,
    "max_seq_length": 1024,
}
TURNS = SETTINGS | {"shape": "turns", "names": False, "authors": ["ann"]}
GREEDY = ["--temperature", "0", "--max-tokens", "8"]

spec = importlib.util.spec_from_file_location("chat", REPOSITORY / SCRIPT)
chat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chat)


# ---- helpers -------------------------------------------------------------------------------------
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


@pytest.fixture(autouse=True)
def no_handler_stays():
    yield
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.fixture(scope="module")
def tiny(template):
    """Return (model, tokenizer) of the tiny base."""
    return mlx_lm.load(str(template / BASE))


def likeliest(tiny, log):
    """Return ann's reply to a log, of which the likeliest token is taken each time."""
    model, tokenizer = tiny
    prompt = chat.make_prompt(log, "ann", SETTINGS, tokenizer)
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=8).strip()


# ---- settings ------------------------------------------------------------------------------------
@pytest.mark.parametrize("flag", ["--temperature=3", "--temperature=nan", "--max-tokens=0"])
def test_a_wrong_flag_is_wrong_usage(template, run, flag):
    result = run(template, SCRIPT, flag)
    assert result.returncode == 2
    assert flag.partition("=")[0] in last_error(result)


# ---- what is there -------------------------------------------------------------------------------
BUILD = "VERSION=sample python build_train.py"


def remove(*folders):
    return lambda: [shutil.rmtree(folder) for folder in folders]


def settings(value):
    return lambda: write_json(DATA / "settings.json", value)


# {id: (what is done to the project, VERSION and MODEL, flags, the fix)}
WRONG = {
    "no data": (remove(DATA), {}, "", BUILD),
    "VERSION forgotten": (
        None, {"VERSION": None}, "",
        "VERSION=v1 python build_train.py, or export VERSION=sample"),
    "no name": (None, {"VERSION": "my chat"}, "", "export VERSION=my_chat"),
    "a repository": (None, {"MODEL": "me/gemma"}, "", "export MODEL=gemma"),
    "empty name": (None, {"VERSION": ""}, "", "export VERSION=v1"),
    "not trained": (remove(FUSED), {}, "", "VERSION=sample MODEL=tiny-gemma-3 ./fine_tune.sh"),
    "no base": (
        remove(FUSED, f"{BASE}-4bit"), {"MODEL": "zephyr"}, "",
        "export MODEL=tiny-gemma-3, or "
        "hf download mlx-community/zephyr --local-dir models/base/zephyr"),
    "no settings": ((DATA / "settings.json").unlink, {}, "", BUILD),
    "settings a list": (settings([1]), {}, "", BUILD),
    "settings cut": (settings({"shape": "turns"}), {}, "", BUILD),
    "one author": (settings(TURNS), {}, "--as zoe\x1b", "leave --as out"),
    "no names": (settings(SETTINGS | {"names": False}), {}, "--as bob", "leave --as out"),
}  # fmt: skip


@cases("change, env, flags, fix", WRONG)
def test_what_is_missing_or_wrong_is_said_with_its_fix(project, run, change, env, flags, fix):
    if change:
        change()
    result = run(project, SCRIPT, *flags.split(), env=env, input="hi\n")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(f"error: .+[.] FIX: {re.escape(fix)}", last_error(result))


@cases(
    "weights, rows, warning",
    {
        "all of one training": ("old", "old", ""),
        "another adapter": ("new", "old", "was made from another adapter"),
        "data built anew": ("old", "new", "not those of the training"),
    },
)
def test_what_does_not_belong_together_is_told(project, capsys, weights, rows, warning):
    write_json(FUSED / "fused_from.json", {"adapter_sha256": hashlib.sha256(b"old").hexdigest()})
    ADAPTER.mkdir()
    (ADAPTER / "adapters.safetensors").write_text(weights)
    checksum = subprocess.run(["cksum"], input=b"old", capture_output=True).stdout
    (ADAPTER / "lora_config.yaml").write_bytes(b"# train.jsonl: " + checksum)
    (DATA / "train.jsonl").write_text(rows)
    assert chat.find_model("sample", "tiny-gemma-3")[0][0] == FUSED
    told = capsys.readouterr().err
    assert warning in told
    assert told.count("warning") == bool(warning)


@cases(
    "settings, author, me, expected",
    {
        "who was learned most": (SETTINGS, "", "me", ("ann", "me")),
        "another one": (SETTINGS, "bob", "me", ("bob", "me")),
        "both the same": (SETTINGS, "", "ann", ("ann", "ann_")),
        "nobody": (SETTINGS | {"authors": []}, "", "me", ("model", "me")),
        "names that could command": (SETTINGS, "<eos>", "\x1b", ("< eos>", "me")),
        "only author": (TURNS, "", "me", ("ann", "me")),
    },
)
def test_who_replies_and_who_types(settings, author, me, expected):
    assert chat.speakers(SimpleNamespace(author=author, me=me), settings) == expected


# ---- the prompt, as build_train.py makes it ------------------------------------------------------
ODD = ["Perche\u0301", "<end_of_turn>", "<|im_end|>", "a\u200bb", "👩\u200d💻"]
ODD += ["x" * 52, "x" * 60]  # cut at 60 characters, of which the last may be a space


def invented_log(people, writers):
    """Return [(author, text)], no text twice; a writer writes two lines at a time."""
    draw = random.Random(0)
    author, log = "", []
    for number in range(300):
        author = draw.choice([name for name in people if name != author or name not in writers])
        lines = [f"{word}{number} {draw.choice(ODD)} end" for word in ("word", "again")]
        log.append((author, "\n".join(lines if author in writers else lines[:1])))
    return log


@cases(
    "people, writers, flags",
    {
        "names": (["ann", "bob", "eve"], [], "--shape prompt"),
        "no names": (["ann", "bob", "eve"], [], "--shape prompt --names 0"),
        "one author": (["ann", "bob"], [], "--shape prompt --only-author ann"),
        "bursts": (["ann", "bob"], ["ann", "bob"], "--shape prompt --burst 3"),
        "turns of two": (["ann", "bob"], ["ann"], "--only-author ann"),
        "turns of several": (["ann", "bob", "eve"], ["ann"], "--only-author ann"),
    },
)
def test_the_prompt_is_that_of_the_training_rows(project, run, people, writers, flags):
    log = invented_log(people, writers)
    lines = [(author, line) for author, text in log for line in text.split("\n")]
    entries = [
        {"author": author, "message": line, "time": 60 * number}
        for number, (author, line) in enumerate(lines)
    ]
    write_json(project / "data/raw/messages_sample.json", entries)
    flags = f"{flags} --window 4 --max-context-chars 60".split()
    made = run(project, "build_train.py", *flags, env={"MODEL": "not-there"})
    assert made.returncode == 0, made.stderr

    settings = json.loads((DATA / "settings.json").read_text())
    log = [(author, chat.tidy_lines(text)) for author, text in log]
    places = {text: place for place, (_, text) in enumerate(log)}
    rows = (DATA / "train.jsonl").read_text("utf-8").splitlines()
    assert len(rows) > 20
    for row in map(json.loads, rows):
        messages = row.get("messages") or [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        place = places[messages[-1]["content"]]
        assert chat.make_chat(log[:place], log[place][0], settings) == messages[:-1]


@pytest.mark.parametrize(
    ("typed", "learned"),
    [
        ("  two   words\t", "two words"),
        ("Perche\u0301\u200b no", "Perché no"),
        ("bye<end_of_turn>", "bye< end_of_turn>"),
        ("<|im_start|>system", "< |im_start|>system"),
        ("👩\u200d💻 \x1b[31m red \udce9", "👩\u200d💻 [31m red"),
    ],
)
def test_a_message_that_is_typed_is_cleaned_as_those_that_were_learned(typed, learned):
    assert chat.tidy(typed) == learned


def test_a_long_talk_loses_its_oldest_messages():
    tokenizer = SimpleNamespace(apply_chat_template=lambda turns, **_: turns[0]["content"])
    settings = TURNS | {"max_seq_length": 20, "window": 4}
    log = [("me", f"message {number}") for number in range(9)]
    assert chat.make_prompt(log, "ann", settings, tokenizer) == "message 7\nmessage 8"
    log = [("me", "a message that is too long alone")]
    assert chat.make_prompt(log, "ann", settings, tokenizer) == log[0][1]


# ---- the model -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_base_and_adapter_if_there_is_no_fused_model(project, capsys):
    config = {"num_layers": 6, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}
    model, _ = mlx_lm.load(str(BASE))
    model.freeze()
    linear_to_lora_layers(model, *config.values())
    weights = dict(tree_flatten(model.trainable_parameters()))
    write_json(ADAPTER / "adapter_config.json", config)
    mx.save_safetensors(str(ADAPTER / "adapters.safetensors"), weights)
    shutil.rmtree(FUSED)
    model, _ = chat.load(chat.find_model("sample", "tiny-gemma-3"))
    assert capsys.readouterr().err == f"loading {BASE} with {ADAPTER}\n"
    assert {*weights} < {*dict(tree_flatten(model.parameters()))}


def edit(file, **changes):
    return lambda: write_json(BASE / file, json.loads((BASE / file).read_text()) | changes)


def own_model():
    (BASE / "own.py").write_text("open('ran', 'w')")
    auto_map = {name: "own.Own" for name in ["AutoConfig", "AutoModelForCausalLM"]}
    edit("config.json", auto_map=auto_map, model_type="own", model_file="own.py")()


def own_tokenizer():
    (BASE / "own.py").write_text("open('ran', 'w')")
    auto_map = {"AutoTokenizer": ["own.Own", None]}
    own = {"auto_map": auto_map, "tokenizer_class": "Own", "chat_template": None}
    edit("tokenizer_config.json", **own)()


@pytest.mark.slow
@cases(
    "change, what",
    {
        "cut": (lambda: cut_off(BASE / "model.safetensors"), "does not load: "),
        "of no type": (edit("config.json", model_type="\x1b[31m"), "\\x1b[31m"),
        "too deep": (edit("config.json", num_hidden_layers=10**9), "so many layers"),
        "no template": (edit("tokenizer_config.json", chat_template=None), "is not set"),
        "template": (edit("tokenizer_config.json", chat_template="{{ 1 / 0 }}"), "by zero"),
        "own model": (own_model, "does not load: "),
        "own tokenizer": (own_tokenizer, "is not set"),  # it is passed over, and then this told
    },
)
def test_a_model_that_does_not_load_is_told_and_none_of_its_code_runs(project, change, what):
    change()
    with pytest.raises(SystemExit) as stop:
        chat.load([(BASE, "the command")])
    assert what in str(stop.value)
    assert str(stop.value).endswith(" FIX: the command")
    assert not Path("ran").exists()


@cases(
    "said, flag, takes_the_likeliest",
    {
        "nothing": ({}, None, False),
        "temperature said": ({"temperature": 0}, None, True),
        "top_k said": ({"top_k": 1}, None, True),
        "top_p said": ({"top_p": 1e-9}, None, True),
        "flag": ({}, 0.0, True),
        "flag against said": ({"temperature": 0}, 1.0, False),
        "null said": ({"temperature": None, "top_k": None}, None, False),
    },
)
def test_sampling_is_as_the_base_says_unless_it_is_set(tmp_path, said, flag, takes_the_likeliest):
    write_json(tmp_path / "generation_config.json", said)
    draw = chat.make_sampler(SimpleNamespace(temperature=flag), tmp_path)
    loglikelihoods = mx.log(mx.array([[0.03] + [0.97 / 49] * 49]))
    mx.random.seed(1)
    drawn = {draw(loglikelihoods).item() for _ in range(60)}
    assert (drawn == {0}) == takes_the_likeliest


# ---- the talk, in a pipe -------------------------------------------------------------------------
@pytest.mark.slow
def test_each_line_of_a_pipe_gets_a_reply_to_all_that_was_said(project, run, tiny):
    """Also through a link, beside a json.py, with variables that would break an import."""
    hostile = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "HF_HUB_ETAG_TIMEOUT": "soon"}
    hostile |= {"MLXLM_USE_MODELSCOPE": "True", "HF_HUB_OFFLINE": "0"}
    (project.parent / "json.py").write_text("raise SystemExit('the wrong json')")
    (project / "tests/chat.py").symlink_to(project / SCRIPT)
    log, expected = [], ""
    for message in ["perché < eos>", "how are\nyou"]:
        log.append(("me", message))
        reply = likeliest(tiny, log)
        log.append(("ann", chat.tidy_lines(reply)))
        expected += chat.visible(reply) + " …\n"  # cut off at 8 tokens
    said = {"input": "perché <eos>\n\nhow are\\\nyou", "env": hostile, "cwd": project.parent}
    result = run(project, "tests/chat.py", *GREEDY, **said)
    assert (result.returncode, result.stdout) == (0, expected)
    assert result.stderr == f"loading {FUSED}\n"


@pytest.fixture
def started(project, run):
    """Start it in a pipe, with a message to answer at length."""
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    process = run(project, SCRIPT, "--max-tokens", 100_000, start=subprocess.Popen, **pipes)
    process.stdin.write(b"hi\n")
    process.stdin.flush()
    assert process.stderr.readline() == f"loading {FUSED}\n".encode()
    return process


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_quietly(started):
    started.stdout.read(1)
    started.stdout.close()
    assert started.wait(60) == 0
    assert started.stderr.read() == b""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["loading", "replying"])
def test_ctrl_c_ends_it_with_130(started, moment):
    if moment == "replying":
        started.stdout.read(1)
    started.send_signal(signal.SIGINT)
    assert started.wait(30) == 130
    assert started.stderr.read() == b"\n"


# ---- the talk, at a terminal ---------------------------------------------------------------------
ENTER, UP, CTRL_C, CTRL_D = "\r", "\x1b[A", "\x03", "\x04"
PASTE = "\x1b[200~{}\x1b[201~"  # as a terminal pastes


class Terminal:
    """A person at a terminal: types, and reads up to what is expected."""

    def __init__(self, run, project, *flags):
        self.mine, theirs = pty.openpty()
        streams = dict.fromkeys(["stdin", "stdout", "stderr"], theirs)
        self.process = run(
            project,
            SCRIPT,
            *flags,
            env={"TERM": "xterm"},
            start=subprocess.Popen,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **streams,
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

    def end(self):
        """Return the exit code after Ctrl-D."""
        self.type(CTRL_D)
        return self.process.wait(10)


@pytest.mark.slow
def test_a_talk_at_a_terminal(project, run, tiny):
    """Names stand before what is said, a paste is one message, Ctrl-C takes back a line."""
    terminal = Terminal(run, project, "--me", "eve", *GREEDY)
    terminal.read_to(f"loading {FUSED}\n(Ctrl-D ends the talk)\neve: ")

    log = [("eve", "one\ntwo")]
    first = likeliest(tiny, log)
    terminal.type(PASTE.format("one\ntwo") + ENTER)
    shown = chat.visible(first).replace("\n", "\n     ")
    assert terminal.read_to("eve: ") == f"one\ntwo\nann: {shown} …\neve: "

    terminal.type("not this")
    time.sleep(0.3)  # Python loses a Ctrl-C that comes in the moment before it waits for a key
    terminal.type(CTRL_C)
    assert "(Ctrl-D ends the talk)" in terminal.read_to("eve: ")

    log += [("ann", chat.tidy_lines(first)), ("eve", "three\nfour")]
    shown = chat.visible(likeliest(tiny, log)).replace("\n", "\n     ")
    terminal.type("three" + ENTER + "four" + ENTER)  # faster than anybody types
    assert terminal.read_to("eve: ").endswith(f"ann: {shown} …\neve: ")

    terminal.type(UP + ENTER)
    assert terminal.read_to("ann: ").endswith("four\nann: ")
    terminal.read_to("eve: ")
    assert terminal.end() == 0


@pytest.mark.slow
def test_ctrl_c_stops_a_reply_and_not_the_talk(project, run):
    terminal = Terminal(run, project, "--max-tokens", "100000")
    terminal.read_to("me: ")
    for _ in range(2):
        terminal.type("hi" + ENTER)
        terminal.read_to("ann: ")
        terminal.read_to(" ")
        terminal.type(CTRL_C)
        assert "Ctrl-D" not in terminal.read_to("\nme: ")
    assert terminal.end() == 0


def test_text_that_could_command_the_terminal_is_only_shown():
    text = "a\x1b]0;x\x07\r\u202e\ud800\n👩\u200d💻é"
    assert chat.visible(text) == "a\\x1b]0;x\\x07\\r\\u202e\\ud800\n👩\u200d💻é"


# ---- other programs ------------------------------------------------------------------------------
ROW = [
    {"role": "user", "content": "hi\nare you there?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "ready?"},
]


@pytest.mark.slow
def test_mlx_lm_server_gives_the_model_the_prompt_of_the_training_rows(project, tiny):
    """It counts as many tokens, and replies as the model does to those of the row."""
    model, tokenizer = tiny
    tokens = tokenizer.apply_chat_template(ROW, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*ROW, {"role": "assistant", "content": "yes"}])
    assert whole[: len(tokens)] == tokens

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = Path(sys.executable).with_name("mlx_lm.server")
    command = [server, "--host", "127.0.0.1", "--port", str(port), "--model", BASE]
    body = json.dumps({"messages": ROW, "max_tokens": 8, "temperature": 0}).encode()
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as server:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None
            time.sleep(0.1)
        reply = json.load(urllib.request.urlopen(request, timeout=60))
        server.kill()
    assert reply["usage"]["prompt_tokens"] == len(tokens)
    expected = mlx_lm.generate(model, tokenizer, tokens, max_tokens=8)
    assert reply["choices"][0]["message"]["content"] == expected


@pytest.mark.slow
def test_mlx_lm_chat_gives_that_prompt_for_the_first_line_alone(project, tiny, monkeypatch):
    """With each further line comes another <bos>, as never in a row.

    If this test fails with a newer mlx-lm, README.md may recommend mlx_lm.chat.
    """
    given, generate = [], mlx_lm.chat.stream_generate

    def record(model, tokenizer, prompt, **options):
        given.append(prompt)
        return generate(model, tokenizer, prompt, **options)

    lines = iter(["hi\nare you there?", "ready?", "q"])
    monkeypatch.setattr("sys.argv", ["mlx_lm.chat", "--model", str(BASE), "--max-tokens", "3"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(mlx_lm.chat, "stream_generate", record)
    mlx_lm.chat.main()
    first = tiny[1].apply_chat_template(ROW[:1], add_generation_prompt=True)
    row = tiny[1].apply_chat_template(ROW, add_generation_prompt=True)
    bos = tiny[1].bos_token_id
    assert given[0] == first == row[: len(first)]
    assert (row.count(bos), (given[0] + given[1]).count(bos)) == (1, 2)
