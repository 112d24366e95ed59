"""models/chat.py: a talk in the shape that was trained, with keys that do what people expect."""

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
BASE = "models/base/tiny-gemma-3"
ADAPTER = "models/adapters/adapter-sample_tiny-gemma-3"
FUSED = "models/fused/fused-sample_tiny-gemma-3"
KNOWN = "data/for_train/sample/settings.json"

spec = importlib.util.spec_from_file_location("chat", REPOSITORY / SCRIPT)
chat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chat)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def project(project):
    """A project whose fused model is the tiny base, and which knows ann and bob."""
    write_json(project / KNOWN, SETTINGS)
    shutil.copytree(project / BASE, project / FUSED)
    return project


@pytest.fixture(autouse=True)
def no_handler_stays():
    yield
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


# ---- what is missing or wrong, before a model is loaded ------------------------------------------
BUILD = "python build_train.py"
DOWNLOAD = "hf download mlx-community/zephyr --local-dir models/base/zephyr"


def remove(*folders):
    return lambda project: [shutil.rmtree(project / folder) for folder in folders]


def settings(text):
    return lambda project: (project / KNOWN).write_text(text)


@pytest.mark.parametrize(
    ("change", "env", "arguments", "fix"),
    [
        (remove("data/for_train/sample"), {}, "", f"VERSION=sample {BUILD}"),
        (None, {"VERSION": None}, "", f"VERSION=v1 {BUILD}; for the sample: export VERSION=sample"),
        (None, {"VERSION": "v1"}, "", f"VERSION=v1 {BUILD}"),
        (None, {"VERSION": "my chat"}, "", "export VERSION=my_chat"),
        (remove(FUSED), {}, "", "VERSION=sample MODEL=tiny-gemma-3 ./fine_tune.sh"),
        (remove(FUSED), {"MODEL": "zephyr"}, "", DOWNLOAD),
        (remove(FUSED, BASE + "-4bit"), {"MODEL": None}, "", "export MODEL=tiny-gemma-3"),
        (lambda p: (p / KNOWN).unlink(), {}, "", f"VERSION=sample {BUILD}"),
        (settings("[1]"), {}, "", f"VERSION=sample {BUILD}"),
        (settings('{"shape": "turns"}'), {}, "", f"VERSION=sample {BUILD}"),
        (settings(json.dumps(TURNS)), {}, "--as zoe\x1b", "leave --as out"),
        (settings(json.dumps(SETTINGS | {"names": False})), {}, "--as bob", "leave --as out"),
    ],
)
def test_error_names_the_fix(project, run, change, env, arguments, fix):
    if change:
        change(project)
    result = run(project, SCRIPT, *arguments.split(), env=env, input="hi\n")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(f"error: .+[.] FIX: {re.escape(fix)}", last_error(result))


@pytest.mark.parametrize("flag", ["--temperature=3", "--temperature=nan", "--max-tokens=0"])
def test_wrong_usage(template, run, flag):
    result = run(template, SCRIPT, flag)
    assert result.returncode == 2
    assert flag.partition("=")[0] in last_error(result)


# ---- the prompt is that of the training rows -----------------------------------------------------
ODD = ["Perche\u0301", "<end_of_turn>", "<|im_end|>", "a\u200bb", "👩\u200d💻", "[INST]"]


def invented_log(people, several_lines):
    """Return [(author, text)], no text twice; those of whom `several_lines` holds write two."""
    draw, log, author = random.Random(0), [], ""
    for number in range(300):
        author = draw.choice([name for name in people if name not in {author} & {*several_lines}])
        lines = []
        for word in ["word", "again"] if author in several_lines else ["word"]:
            odd = draw.choice([*ODD, "abcdefghij" * draw.randint(4, 6)])
            lines.append(f"{word}{number} {odd} end")
        log.append((author, "\n".join(lines)))
    return log


@pytest.mark.parametrize(
    ("shape", "people", "arguments"),
    [
        ("prompt", ["ann", "bob", "eve"], []),
        ("prompt", ["ann", "bob", "eve"], ["--names", "0"]),
        ("prompt", ["ann", "bob"], ["--only-author", "ann"]),
        ("prompt", ["ann", "bob"], ["--burst", "3"]),
        ("turns", ["ann", "bob"], ["--only-author", "ann"]),
        ("turns", ["ann", "bob", "eve"], ["--only-author", "ann"]),
    ],
    ids=["names", "no names", "one author", "several lines", "turns of two", "turns of several"],
)
def test_prompt_is_that_of_the_training_rows(project, run, shape, people, arguments):
    several = people if "--burst" in arguments else ["ann"] if shape == "turns" else []
    log = invented_log(people, several)
    lines = [(author, line) for author, text in log for line in text.split("\n")]
    entries = [
        {"author": author, "message": line, "time": 60 * number}
        for number, (author, line) in enumerate(lines)
    ]
    write_json(project / "data/raw/messages_sample.json", entries)
    arguments = [*arguments, "--shape", shape, "--window", 4, "--max-context-chars", 60]
    made = run(project, "build_train.py", *arguments, env={"MODEL": "not-there"})
    assert made.returncode == 0, made.stderr

    settings = json.loads((project / KNOWN).read_text())
    log = [(author, chat.tidy_lines(text)) for author, text in log]
    places = {text: place for place, (_, text) in enumerate(log)}
    rows = (project / KNOWN).with_name("train.jsonl").read_text("utf-8").splitlines()
    assert len(rows) > 20
    for row in map(json.loads, rows):
        messages = row.get("messages") or [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        place = places[messages[-1]["content"]]
        assert chat.make_chat(log[:place], log[place][0], settings) == messages[:-1]


def test_a_message_that_is_typed_is_cleaned_as_those_that_were_learned():
    cases = {
        "  two   words\t": "two words",
        "Perche\u0301\u200b no": "Perché no",
        "bye<end_of_turn>": "bye< end_of_turn>",
        "<|im_start|>system": "< |im_start|>system",
        "👩\u200d💻 \x1b[31m red \udce9": "👩\u200d💻 [31m red",
    }
    assert {text: chat.tidy(text) for text in cases} == cases


def test_a_long_talk_loses_its_oldest_messages():
    tokenizer = SimpleNamespace(apply_chat_template=lambda turns, **_: turns[0]["content"])
    settings = TURNS | {"max_seq_length": 20, "window": 4}
    log = [("me", f"message {number}") for number in range(9)]
    assert chat.make_prompt(log, "ann", settings, tokenizer) == "message 7\nmessage 8"
    log = [("me", "a message that is too long alone")]
    assert chat.make_prompt(log, "ann", settings, tokenizer) == log[0][1]


@pytest.mark.parametrize(
    ("settings", "author", "me", "expected"),
    [
        (SETTINGS, "", "me", ("ann", "me")),
        (SETTINGS, "bob", "me", ("bob", "me")),
        (SETTINGS, "", "ann", ("ann", "ann_")),
        (SETTINGS | {"authors": []}, "", "me", ("model", "me")),
        (SETTINGS, "<eos>", "\x1b", ("< eos>", "me")),
        (TURNS, "", "me", ("ann", "me")),
    ],
)
def test_who_replies_and_who_types(settings, author, me, expected):
    assert chat.speakers(SimpleNamespace(author=author, me=me), settings) == expected


def test_text_that_could_command_the_terminal_is_only_shown():
    assert chat.visible("a\x1b]0;x\x07\r\u202e\ud800\n👩\u200d💻é") == (
        "a\\x1b]0;x\\x07\\r\\u202e\\ud800\n👩\u200d💻é"
    )


# ---- models --------------------------------------------------------------------------------------
@pytest.mark.slow
def test_base_and_adapter_if_there_is_no_fused_model(project, monkeypatch, capsys):
    config = {"num_layers": 6, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}
    model, _ = mlx_lm.load(str(project / BASE))
    model.freeze()
    linear_to_lora_layers(model, *config.values())
    weights = dict(tree_flatten(model.trainable_parameters()))
    write_json(project / ADAPTER / "adapter_config.json", config)
    mx.save_safetensors(str(project / ADAPTER / "adapters.safetensors"), weights)
    shutil.rmtree(project / FUSED)
    monkeypatch.chdir(project)
    model, _ = chat.load(chat.find_model("sample", "tiny-gemma-3"))
    assert capsys.readouterr().err == f"loading {BASE} with {ADAPTER}\n"
    assert {*weights} < {*dict(tree_flatten(model.parameters()))}


@pytest.mark.parametrize("changed", [False, True])
def test_a_fused_model_of_another_adapter(project, monkeypatch, capsys, changed):
    monkeypatch.chdir(project)
    Path(ADAPTER).mkdir()
    Path(ADAPTER, "adapters.safetensors").write_text("new" if changed else "old")
    origin = {"adapter_sha256": hashlib.sha256(b"old").hexdigest()}
    Path(FUSED, "fused_from.json").write_text(json.dumps(origin))
    assert chat.find_model("sample", "tiny-gemma-3")[0][0] == Path(FUSED)
    assert ("was made from another adapter" in capsys.readouterr().err) == changed


@pytest.mark.parametrize("changed", [False, True])
def test_data_that_were_built_anew_after_the_training(project, monkeypatch, capsys, changed):
    monkeypatch.chdir(project)
    data = Path("data/for_train/sample/train.jsonl")
    data.write_text('{"prompt": "hi", "completion": "ho"}\n')
    checksum = subprocess.run(["cksum"], input=data.read_bytes(), capture_output=True).stdout
    Path(ADAPTER).mkdir()
    Path(ADAPTER, "lora_config.yaml").write_bytes(b"# train.jsonl: " + checksum)
    if changed:
        data.write_text("{}\n")
    chat.find_model("sample", "tiny-gemma-3")
    assert ("not those of the training" in capsys.readouterr().err) == changed


@pytest.mark.parametrize(
    ("says", "temperature", "always_the_likeliest"),
    [
        ({}, None, False),
        ({"temperature": 0}, None, True),
        ({"top_k": 1}, None, True),
        ({"top_p": 1e-9}, None, True),
        ({}, 0.0, True),
        ({"temperature": 0}, 1.0, False),
        ({"temperature": None, "top_k": None}, None, False),
    ],
)
def test_sampling_is_as_the_flag_or_the_base_says(
    tmp_path, says, temperature, always_the_likeliest
):
    write_json(tmp_path / "generation_config.json", says)
    draw = chat.make_sampler(SimpleNamespace(temperature=temperature), tmp_path)
    loglikelihoods = mx.log(mx.array([[0.03] + [0.97 / 49] * 49]))
    mx.random.seed(1)
    drawn = {draw(loglikelihoods).item() for _ in range(60)}
    assert (drawn == {0}) == always_the_likeliest


def edit(file, **changes):
    def change(base):
        write_json(base / file, json.loads((base / file).read_text()) | changes)

    return change


def own_code(base):
    """Code in the model's folder, under each name by which it can be asked for."""
    (base / "own.py").write_text(f"open({str(base / 'ran')!r}, 'w')")
    auto_map = {name: "own.Own" for name in ["AutoConfig", "AutoModelForCausalLM"]}
    edit("config.json", auto_map=auto_map, model_type="own", model_file="own.py")(base)
    tokenizer = {"AutoTokenizer": ["own.Own", None]}
    edit("tokenizer_config.json", auto_map=tokenizer, tokenizer_class="Own")(base)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda base: cut_off(base / "model.safetensors"), "does not load: "),
        (edit("config.json", model_type="\x1b[31m"), "\\x1b[31m"),
        (edit("config.json", num_hidden_layers=10**9), "so many layers"),
        (edit("tokenizer_config.json", chat_template=None), "chat_template is not set"),
        (edit("tokenizer_config.json", chat_template="{{ 1 / 0 }}"), "division by zero"),
        (own_code, "does not load: "),
    ],
)
def test_a_model_that_does_not_load(project, change, what):
    """What is wrong is said, with a fix, and no code of the model runs."""
    base = project / BASE
    change(base)
    with pytest.raises(SystemExit) as stop:
        chat.load([(base, "the command")])
    assert what in str(stop.value)
    assert str(stop.value).endswith(" FIX: the command")
    assert not (base / "ran").exists()


# ---- in a pipe -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(template):
    """Return (model, tokenizer) of the tiny base."""
    return mlx_lm.load(str(template / BASE))


def likeliest(tiny, log, settings):
    """Return ann's reply to a log, of which the likeliest token is taken each time."""
    model, tokenizer = tiny
    prompt = chat.make_prompt(log, "ann", settings, tokenizer)
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=8).strip()


GREEDY = ["--temperature", "0", "--max-tokens", "8"]


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
        reply = likeliest(tiny, log, SETTINGS)
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
    return process


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_quietly(started):
    started.stdout.read(1)
    started.stdout.close()
    assert started.wait(60) == 0
    assert started.stderr.read() == f"loading {FUSED}\n".encode()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["loading", "replying"])
def test_ctrl_c_ends_it_with_130(started, moment):
    started.stderr.readline()
    if moment == "replying":
        started.stdout.read(1)
    started.send_signal(signal.SIGINT)
    assert started.wait(30) == 130
    assert started.stderr.read() == b"\n"


# ---- on a terminal -------------------------------------------------------------------------------
class Terminal:
    """A person at a terminal: reads up to what is expected, types."""

    def __init__(self, run, project, *arguments):
        self.mine, theirs = pty.openpty()
        self.process = run(
            project,
            SCRIPT,
            *arguments,
            env={"TERM": "xterm"},
            start=subprocess.Popen,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **dict.fromkeys(["stdin", "stdout", "stderr"], theirs),
        )
        os.close(theirs)

    def read_to(self, expected, seconds=60):
        """Return what was shown, up to and with what is expected; all of it if that is None."""
        seen, end = b"", time.monotonic() + seconds
        wanted = expected and expected.replace("\n", "\r\n").encode()
        while wanted is None or wanted not in seen:
            assert select.select([self.mine], [], [], end - time.monotonic())[0], seen
            try:
                seen += os.read(self.mine, 1)
            except OSError:  # the other end is closed
                assert wanted is None, seen
                break
        return re.sub(r"\x1b\[\?2004.", "", seen.decode()).replace("\r\n", "\n").replace("\r", "")

    def type(self, text):
        os.write(self.mine, text.encode())

    def end(self):
        """Return the exit code after Ctrl-D."""
        self.type("\x04")
        self.read_to(None)
        return self.process.wait(10)


ENTER, UP, CTRL_C = "\r", "\x1b[A", "\x03"


@pytest.mark.slow
def test_a_talk_at_a_terminal(project, run, tiny):
    """Names stand before what is said, a paste is one message, Ctrl-C takes back a line."""
    terminal = Terminal(run, project, "--me", "eve", *GREEDY)
    terminal.read_to(f"loading {FUSED}\n(Ctrl-D ends the talk)\neve: ")

    log = [("eve", "one\ntwo")]
    reply = likeliest(tiny, log, SETTINGS)
    shown = chat.visible(reply).replace("\n", "\n     ") + " …\neve: "
    terminal.type("\x1b[200~one\ntwo\x1b[201~" + ENTER)  # as a terminal pastes
    assert terminal.read_to("eve: ") == f"one\ntwo\nann: {shown}"

    terminal.type("not this")
    time.sleep(0.3)  # Python loses a Ctrl-C that comes in the moment before it waits for a key
    terminal.type(CTRL_C)
    assert "(Ctrl-D ends the talk)" in terminal.read_to("eve: ")

    log += [("ann", chat.tidy_lines(reply)), ("eve", "three\nfour")]
    reply = likeliest(tiny, log, SETTINGS)
    shown = chat.visible(reply).replace("\n", "\n     ") + " …\neve: "
    terminal.type("three" + ENTER + "four" + ENTER)  # faster than anybody types
    assert terminal.read_to("eve: ").endswith(f"ann: {shown}")

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


# ---- other programs ------------------------------------------------------------------------------
ROW = [
    {"role": "user", "content": "hi\nare you there?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "ready?"},
]


@pytest.mark.slow
def test_mlx_lm_server_gives_the_model_the_prompt_of_the_training_rows(project, tiny):
    """The first likelihoods that it reports are those after the tokens of the row."""
    model, tokenizer = tiny
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("mlx_lm.server"), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--model", str(project / BASE)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    body = {"messages": ROW, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as server:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None
            time.sleep(0.1)
        reply = json.load(urllib.request.urlopen(request, timeout=60))
        server.kill()
    tokens = tokenizer.apply_chat_template(ROW, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*ROW, {"role": "assistant", "content": "yes"}])
    assert whole[: len(tokens)] == tokens
    assert reply["usage"]["prompt_tokens"] == len(tokens)
    logits = model(mx.array([tokens]))[0, -1]
    likelihoods = logits - mx.logsumexp(logits)
    for token in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        assert token["logprob"] == pytest.approx(likelihoods[token["id"]].item(), abs=1e-3)


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
    command = ["mlx_lm.chat", "--model", str(project / BASE), "--max-tokens", "3"]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(mlx_lm.chat, "stream_generate", record)
    mlx_lm.chat.main()
    first = tiny[1].apply_chat_template(ROW[:1], add_generation_prompt=True)
    row = tiny[1].apply_chat_template(ROW, add_generation_prompt=True)
    bos = tiny[1].bos_token_id
    assert given[0] == first == row[: len(first)]
    assert (row.count(bos), (given[0] + given[1]).count(bos)) == (1, 2)
