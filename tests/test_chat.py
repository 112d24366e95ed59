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
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY, last_error

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
ADAPTER = "models/adapters/adapter-sample_tiny-gemma-3"
FUSED = "models/fused/fused-sample_tiny-gemma-3"


def load_script():
    spec = importlib.util.spec_from_file_location("chat", REPOSITORY / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


chat = load_script()


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def project(project):
    """A project whose fused model is the tiny base, and which knows ann and bob."""
    write_json(project / "data/for_train/sample/settings.json", SETTINGS)
    shutil.copytree(project / "models/base/tiny-gemma-3", project / FUSED)
    return project


# ---- the prompt is that of the training rows -----------------------------------------------------
ROWS = {
    "names": ("prompt", ["ann", "bob", "eve"], []),
    "no names": ("prompt", ["ann", "bob", "eve"], ["--names", "0"]),
    "one author": ("prompt", ["ann", "bob"], ["--only-author", "ann"]),
    "messages of several lines": ("prompt", ["ann", "bob"], ["--burst", "3"]),
    "turns of two": ("turns", ["ann", "bob"], ["--only-author", "ann"]),
    "turns of several": ("turns", ["ann", "bob", "eve"], ["--only-author", "ann"]),
}
ODD = ["Perche\u0301", "<end_of_turn>", "<|im_end|>", "a\u200bb", "👩\u200d💻", "[INST]"]


def invented_log(people, several_lines):
    """Return [(author, text)], no text twice; those of whom `several_lines` holds write two."""
    draw, log, author = random.Random(0), [], ""
    for number in range(300):
        author = draw.choice(
            [name for name in people if name != author or name not in several_lines]
        )
        lines = (
            [f"word{number}", f"again{number}"] if author in several_lines else [f"word{number}"]
        )
        odd = [draw.choice([*ODD, ("abcdefghij" * 6)[: draw.randint(40, 60)]]) for _ in lines]
        text = "\n".join(f"{line} {word} end" for line, word in zip(lines, odd, strict=True))
        log.append((author, text))
    return log


@pytest.mark.parametrize(("shape", "people", "arguments"), ROWS.values(), ids=ROWS)
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

    settings = json.loads((project / "data/for_train/sample/settings.json").read_text())
    log = [(author, chat.tidy_lines(text)) for author, text in log]
    places = {text: place for place, (_, text) in enumerate(log)}
    rows = (project / "data/for_train/sample/train.jsonl").read_text("utf-8").splitlines()
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
    assert log == [("me", "message 7"), ("me", "message 8")]
    log = [("me", "a message that is too long alone")]
    assert chat.make_prompt(log, "ann", settings, tokenizer) == "a message that is too long alone"


@pytest.mark.parametrize(
    ("settings", "author", "me", "expected"),
    [
        (SETTINGS, "", "me", ("ann", "me")),
        (SETTINGS, "bob", "me", ("bob", "me")),
        (SETTINGS, "zoe", "me", ("zoe", "me")),
        (SETTINGS, "", "ann", ("ann", "ann_")),
        (SETTINGS | {"authors": ["me"]}, "", "me", ("me", "me_")),
        (SETTINGS | {"authors": []}, "", "me", ("model", "me")),
        (SETTINGS | {"names": False}, "", "me", ("model", "me")),
        (SETTINGS | {"names": False, "authors": ["ann"]}, "ann", "me", ("ann", "me")),
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


# ---- what is missing or wrong, before a model is loaded ------------------------------------------
def no_settings(project):
    shutil.rmtree(project / "data/for_train/sample")


def no_model(project):
    shutil.rmtree(project / FUSED)


def no_model_and_one_base(project):
    no_model(project)
    shutil.rmtree(project / "models/base/tiny-gemma-3-4bit")


def other_base_was_fused(project):
    write_json(project / FUSED / "fused_from.json", {"base": "models/base/b_tiny-gemma-3"})


def other_base_was_adapted(project):
    no_model(project)
    write_json(project / ADAPTER / "adapter_config.json", {"model": "x/other\x1b"})


def odd_settings(value):
    return lambda project: write_json(project / "data/for_train/sample/settings.json", value)


DOWNLOAD = "hf download mlx-community/zephyr --local-dir models/base/zephyr"
TRAIN = "VERSION=sample MODEL=tiny-gemma-3 ./fine_tune.sh"
BUILD = "VERSION=sample python build_train.py"
ERRORS = [
    (no_settings, {}, "there is no data/for_train/sample/settings.json", BUILD),
    (
        None,
        {"VERSION": None},
        "there is no data/for_train/v1/settings.json",
        "export VERSION=sample",
    ),
    (None, {"VERSION": "v1"}, "VERSION can be sample", "VERSION=v1 python build_train.py"),
    (None, {"VERSION": "simple"}, "VERSION can be sample", "export VERSION=sample"),
    (None, {"VERSION": "my chat"}, "'my chat', which is not the name of a folder", "use letters"),
    (None, {"MODEL": "../x"}, "'../x', which is not the name of a folder", "use letters"),
    (no_model, {}, f"there is no {ADAPTER}", TRAIN),
    (no_model, {"MODEL": "tiny-gemma3"}, "MODEL can be tiny", "export MODEL=tiny-gemma-3"),
    (no_model, {"MODEL": "zephyr"}, "there is no models/base/zephyr", DOWNLOAD),
    (no_model_and_one_base, {"MODEL": None}, "MODEL can be tiny", "export MODEL=tiny-gemma-3"),
    (other_base_was_fused, {}, "was made from b_tiny-gemma-3, not from tiny", "another VERSION"),
    (other_base_was_adapted, {}, "was made from other\\x1b, not from tiny", "another VERSION"),
    (odd_settings([1]), {}, 'has no "shape"', BUILD),
    (odd_settings(SETTINGS | {"authors": "ann"}), {}, 'has no "authors"', BUILD),
    (odd_settings(SETTINGS | {"window": 0}), {}, 'has no "window"', BUILD),
    (odd_settings(SETTINGS | {"max_seq_length": True}), {}, 'has no "max_seq_length"', BUILD),
]


@pytest.mark.parametrize(("change", "env", "what", "fix"), ERRORS)
def test_error_names_the_fix(project, run, change, env, what, fix):
    if change:
        change(project)
    result = run(project, SCRIPT, env=env, input="hi\n")
    error = last_error(result)
    assert (result.returncode, result.stdout) == (1, "")
    assert error.startswith("error: ")
    assert what in error.partition(" FIX: ")[0]
    assert fix in error.partition(" FIX: ")[2]


@pytest.mark.parametrize("content", ["", "null", "[" * 100_000, '{"shape": "turns"', "\ud800"])
def test_settings_that_cannot_be_read(project, run, content):
    path = project / "data/for_train/sample/settings.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert BUILD in last_error(run(project, SCRIPT, input="hi\n"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperature", "3"],
        ["--temperature", "nan"],
        ["--max-tokens", "0"],
        ["--seed", "-1"],
        ["--top-k", "x"],
        ["--temp", "1"],
    ],
)
def test_wrong_usage(project, run, arguments):
    result = run(project, SCRIPT, *arguments)
    assert result.returncode == 2
    assert last_error(result).endswith("FIX: python models/chat.py --help")


@pytest.mark.parametrize("settings", [TURNS, SETTINGS | {"names": False}])
def test_a_model_of_one_voice_replies_as_nobody_else(project, run, settings):
    write_json(project / "data/for_train/sample/settings.json", settings)
    result = run(project, SCRIPT, "--as", "zoe\x1b", input="hi\n")
    assert result.returncode == 1
    assert "--as 'zoe" in last_error(result)
    assert last_error(result).endswith("FIX: leave --as out")


# ---- in a pipe -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(template):
    """Return (model, tokenizer) of the tiny base."""
    import mlx_lm

    return mlx_lm.load(str(template / "models/base/tiny-gemma-3"))


def likeliest(tiny, log, author, settings, most=8):
    """Return the reply to a log, of which the likeliest token is taken each time."""
    import mlx_lm

    model, tokenizer = tiny
    prompt = chat.make_prompt(list(log), author, settings, tokenizer)
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=most).strip()


GREEDY = ["--temperature", "0", "--max-tokens", "8"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [SETTINGS, TURNS], ids=["prompt", "turns"])
def test_each_line_of_a_pipe_gets_a_reply_to_all_that_was_said(project, run, tiny, settings):
    write_json(project / "data/for_train/sample/settings.json", settings)
    log, expected = [], ""
    for message in ["hi < eos>", "how are\nyou"]:
        log.append(("me", message))
        reply = likeliest(tiny, log, "ann", settings)
        log.append(("ann", chat.tidy_lines(reply)))
        expected += chat.visible(reply) + " …\n"  # cut off at 8 tokens
    result = run(project, SCRIPT, *GREEDY, input="hi <eos>\n\nhow are\\\nyou", cwd=project.parent)
    assert (result.returncode, result.stdout) == (0, expected)
    assert result.stderr == f"talking to {FUSED}\n"


@pytest.mark.slow
def test_hostile_surroundings_change_nothing(project, run):
    """No code of the folders runs, nothing is asked of a network, all bytes are taken."""
    for folder in [project, project / "models"]:
        (folder / "json.py").write_text("raise SystemExit('the wrong json')")
    arguments = ["--seed", 1, "--max-tokens", 8]
    expected = run(project, SCRIPT, *arguments, input="perché\n").stdout
    hostile = {
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "LC_ALL": "C",
        "PYTHONOPTIMIZE": "2",
        "MLXLM_USE_MODELSCOPE": "True",
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "MPLBACKEND": "bogus",
    }
    link = project / "linked"
    link.mkdir()
    (link / "chat.py").symlink_to(project / SCRIPT)
    result = run(link, "chat.py", *arguments, env=hostile, cwd=project, input="perché\n")
    assert (result.returncode, result.stdout) == (0, expected)
    assert run(project, SCRIPT, stdin=subprocess.DEVNULL).returncode == 0


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_quietly(project, run):
    process = run(
        project,
        SCRIPT,
        "--max-tokens",
        "500",
        start=subprocess.Popen,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"hi\nhi\nhi\n")
    process.stdin.close()
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == f"talking to {FUSED}\n".encode()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["argparse", "mlx.core", "mlx_lm.utils", "talking to"])
def test_ctrl_c_ends_it_with_130(project, run, moment):
    process = run(
        project,
        SCRIPT,
        "--max-tokens",
        "100000",
        env={"PYTHONPROFILEIMPORTTIME": "1"},  # names each module when it is there
        start=subprocess.Popen,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"hi\n")
    process.stdin.flush()
    assert any(moment.encode() in line for line in process.stderr)
    if moment == "talking to":
        # subtle: before the first token MLX may run a compiler; no signal counts in system(3)
        process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert b"Traceback" not in process.stderr.read()


# ---- on a terminal -------------------------------------------------------------------------------
class Terminal:
    """A person at a terminal: reads up to what is expected, types."""

    def __init__(self, run, project, *arguments):
        self.mine, theirs = pty.openpty()
        ends = dict.fromkeys(["stdin", "stdout", "stderr"], theirs)
        self.process = run(
            project,
            SCRIPT,
            *arguments,
            env={"TERM": "xterm"},
            start=subprocess.Popen,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **ends,
        )
        os.close(theirs)

    def read_to(self, expected, seconds=20):
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
    terminal.read_to(f"talking to {FUSED}\neve: ")

    log = [("eve", "one\ntwo")]
    reply = likeliest(tiny, log, "ann", SETTINGS)
    shown = chat.visible(reply).replace("\n", "\n     ") + " …\neve: "
    terminal.type("\x1b[200~one\ntwo\x1b[201~" + ENTER)  # as a terminal pastes
    assert terminal.read_to("eve: ") == f"one\ntwo\nann: {shown}"

    terminal.type("not this" + CTRL_C)
    assert "(Ctrl-D ends the talk)" in terminal.read_to("eve: ")

    log += [("ann", chat.tidy_lines(reply)), ("eve", "three\nfour")]
    reply = likeliest(tiny, log, "ann", SETTINGS)
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
    for _ in range(3):
        terminal.type("hi" + ENTER)
        terminal.read_to("ann: ")
        terminal.read_to(" ")
        terminal.type(CTRL_C)
        assert "Ctrl-D" not in terminal.read_to("\nme: ")
    assert terminal.end() == 0


# ---- models --------------------------------------------------------------------------------------
@pytest.mark.slow
def test_base_and_adapter_if_there_is_no_fused_model(project, run, tiny):
    import mlx.core as mx
    import mlx_lm
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    config = {"num_layers": 6, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}
    model, _ = mlx_lm.load(str(project / "models/base/tiny-gemma-3"))
    model.freeze()
    linear_to_lora_layers(model, *config.values())
    weights = dict(tree_flatten(model.trainable_parameters()))
    write_json(project / ADAPTER / "adapter_config.json", config)
    weights = {name: mx.random.normal(weight.shape) for name, weight in weights.items()}
    mx.save_safetensors(str(project / ADAPTER / "adapters.safetensors"), weights)
    no_model(project)

    result = run(project, SCRIPT, *GREEDY, input="hi\n")
    assert result.returncode == 0
    assert result.stderr == f"talking to models/base/tiny-gemma-3 with {ADAPTER}\n"
    assert likeliest(tiny, [("me", "hi")], "ann", SETTINGS) not in result.stdout


@pytest.mark.parametrize(
    ("origin", "warns"),
    [
        ({"adapter_sha256": hashlib.sha256(b"weights").hexdigest()}, False),
        ({"adapter_sha256": hashlib.sha256(b"other weights").hexdigest()}, True),
        ({}, True),
    ],
)
def test_a_fused_model_of_another_adapter(project, monkeypatch, capsys, origin, warns):
    (project / ADAPTER).mkdir()
    (project / ADAPTER / "adapters.safetensors").write_bytes(b"weights")
    write_json(project / FUSED / "fused_from.json", origin)
    monkeypatch.chdir(project)
    assert chat.find_model("sample", "tiny-gemma-3")[0][0] == Path(FUSED)
    warning = f"warning: {FUSED} does not seem to be of the present adapter: "
    assert capsys.readouterr().err.startswith(warning) == warns


@pytest.mark.slow
@pytest.mark.parametrize(
    ("says", "flags", "always_the_likeliest"),
    [
        ({}, {}, False),
        ({"temperature": 0}, {}, True),
        ({"top_k": 1}, {}, True),
        ({"top_p": 1e-9}, {}, True),
        ({}, {"temperature": 0.0}, True),
        ({"temperature": 0}, {"temperature": 1.0}, False),
        ({"top_k": 1}, {"top_k": 10**9}, False),
        ({"temperature": "0", "top_k": True, "top_p": None}, {}, False),
        ({"temperature": -1, "top_k": 1e999}, {}, False),
    ],
)
def test_sampling_is_as_the_flags_or_the_base_say(tmp_path, says, flags, always_the_likeliest):
    import mlx.core as mx

    write_json(tmp_path / "generation_config.json", says)
    args = SimpleNamespace(**dict.fromkeys(["temperature", "top_p", "top_k"]) | flags, seed=1)
    draw = chat.make_sampler(args, tmp_path, 50)
    loglikelihoods = mx.log(mx.array([[0.03] + [0.97 / 49] * 49]))
    drawn = [draw(loglikelihoods).item() for _ in range(60)]
    assert (set(drawn) == {0}) == always_the_likeliest
    draw = chat.make_sampler(args, tmp_path, 50)
    assert [draw(loglikelihoods).item() for _ in range(60)] == drawn  # it is the same seed


def without_weights(base):
    (base / "model.safetensors").unlink()


def cut_weights(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def edit(file, **changes):
    def change(base):
        path = base / file
        write_json(path, json.loads(path.read_text()) | changes)

    return change


def own_code(base):
    """Code in the model's folder, under each name by which it can be asked for."""
    (base / "own.py").write_text("import pathlib; pathlib.Path('/tmp/chat-ran').touch()")
    auto_map = {name: "own.Own" for name in ["AutoConfig", "AutoModelForCausalLM"]}
    edit("config.json", auto_map=auto_map, model_type="own", model_file="own.py")(base)
    tokenizer = {"AutoTokenizer": ["own.Own", None]}
    edit("tokenizer_config.json", auto_map=tokenizer, tokenizer_class="Own")(base)


TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
NO_PREFIX = TEMPLATE + "{% if add_generation_prompt %}<eos>{% endif %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BROKEN = [
    (without_weights, "No safetensors found"),
    (cut_weights, "does not load: "),
    (edit("config.json", model_type="\x1b[31m"), "\\x1b[31m"),
    (edit("config.json", hidden_size="wide"), "does not load: "),
    (edit("config.json", num_hidden_layers=10**9), "says 1000000000 layers"),
    (edit("tokenizer_config.json", chat_template=None), "chat_template is not set"),
    (edit("tokenizer_config.json", chat_template="{{ 1 / 0 }}"), "division by zero"),
    (edit("tokenizer_config.json", chat_template=NO_PREFIX), "begins a reply otherwise"),
    (edit("tokenizer_config.json", chat_template=ENDLESS), "it does not come to an end"),
    (own_code, "does not load: "),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "what"), BROKEN)
def test_a_model_that_does_not_load(project, monkeypatch, capfd, change, what):
    """What is wrong is said, within the time set, and no code of the model runs."""
    base, alarm = project / "models/base/tiny-gemma-3", signal.alarm
    change(base)
    monkeypatch.setattr(signal, "alarm", lambda seconds: alarm(min(seconds, 2)))
    with pytest.raises(SystemExit) as stop:
        chat.load([(base, "the command")], [{"role": "user", "content": "hi"}])
    alarm(0)
    assert what in str(stop.value)
    assert " FIX: " in str(stop.value)
    assert not Path("/tmp/chat-ran").exists()


# ---- other programs ------------------------------------------------------------------------------
ROW = [
    {"role": "user", "content": "hi\nare you there?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "ready?"},
]


@pytest.mark.slow
def test_mlx_lm_server_gives_the_model_the_prompt_of_the_training_rows(project, run, tiny):
    """The first likelihoods that it reports are those after the tokens of the row."""
    import mlx.core as mx

    model, tokenizer = tiny
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("mlx_lm.server"), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--model", str(project / "models/base/tiny-gemma-3")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < end
            time.sleep(0.1)
        body = {"messages": ROW, "max_tokens": 1, "temperature": 0, "logprobs": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body | {"top_logprobs": 5}).encode(),
            {"Content-Type": "application/json"},
        )
        reply = json.load(urllib.request.urlopen(request, timeout=30))
    finally:
        server.kill()
        server.wait()
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
    import mlx_lm.chat

    given, generate = [], mlx_lm.chat.stream_generate

    def record(model, tokenizer, prompt, **options):
        given.append(prompt)
        return generate(model, tokenizer, prompt, **options)

    lines = iter(["hi\nare you there?", "ready?", "q"])
    base = str(project / "models/base/tiny-gemma-3")
    monkeypatch.setattr("sys.argv", ["mlx_lm.chat", "--model", base, "--max-tokens", "3"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(mlx_lm.chat, "stream_generate", record)
    mlx_lm.chat.main()
    tokenizer = tiny[1]
    bos = tokenizer.bos_token_id
    row = tokenizer.apply_chat_template(ROW, add_generation_prompt=True)
    assert given[0] == tokenizer.apply_chat_template(ROW[:1], add_generation_prompt=True)
    assert row[: len(given[0])] == given[0]
    assert (row.count(bos), (given[0] + given[1]).count(bos)) == (1, 2)
