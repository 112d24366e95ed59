"""fine_tune.sh: the checkpoint with the best replies is kept, a bad run changes nothing."""

import fcntl
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pandas as pd
import pytest
import yaml
from conftest import REPOSITORY, contents, cut_off, last_error
from mlx_lm import load

ADAPTER = "models/adapters/adapter-sample_tiny-gemma-3"
HIDDEN = "models/adapters/.adapter-sample_tiny-gemma-3"
WORK, OLD, LOCK = f"{HIDDEN}.partial", f"{HIDDEN}.old", f"{HIDDEN}.lock"
CHECKPOINTS = f"{WORK}/run/0*_adapters.safetensors"
BASE = "models/base/tiny-gemma-3"
DATA = "data/for_train/sample"
# The validation rows ask the same and answer otherwise: what is learned helps at first (the form),
# then harms.
TRAIN = [("ciao raga", "tutto bene bro"), ("che gioco fai stasera", "sempre lo stesso LULW")] * 4
VALID = [("ciao raga", "ZQ{7%}#WX&9+K~<J8"), ("che gioco fai stasera", "7%^Y=|Qz&3@Kx;9*HJ")]
FAST = {"ITERS": "6", "EVAL_EVERY": "3", "LEARNING_RATE": "1e-3", "RANK": "8", "SCALE": "20.0"}
OVERFIT = {"ITERS": "25", "EVAL_EVERY": "6", "LEARNING_RATE": "8e-3"}
LONG = {"ITERS": "4000", "EVAL_EVERY": "4"}
SCRIPT = (REPOSITORY / "fine_tune.sh").read_text("utf-8")
SHELL, PROGRAM = SCRIPT.removesuffix("PYTHON\n").split("<<'PYTHON'\n")
SETTINGS = dict(re.findall(r"^([A-Z_]+)=(\S*)", SHELL, re.MULTILINE))


def as_prompt(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def as_messages(prompt, completion):
    turns = [("user", prompt), ("assistant", completion)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_data(project, train=TRAIN, valid=VALID, shape=as_prompt):
    (project / DATA).mkdir(parents=True, exist_ok=True)
    for name, rows in [("train", train), ("valid", valid)]:
        lines = [json.dumps(shape(*row)) + "\n" for row in rows]
        (project / DATA / f"{name}.jsonl").write_text("".join(lines))


@pytest.fixture
def project(project):
    write_data(project)
    return project


@pytest.fixture
def train(project, run):
    return lambda *args, **env: run(project, "fine_tune.sh", *args, env=FAST | env)


@pytest.fixture
def call(project, monkeypatch, capsys):
    """Return the function that calls a function of fine_tune.sh in this process.

    call("check", RANK="8") → what it printed, and its exit code
    """

    def call(function, *arguments, program=PROGRAM, **settings):
        names = {"VERSION": "sample", "MODEL": "tiny-gemma-3"}
        for name, value in (SETTINGS | names | settings).items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(project)
        exec(program, names := {"__name__": "fine_tune"})
        handler, code = signal.getsignal(signal.SIGALRM), 0
        try:
            names[function](*arguments)
        except SystemExit as end:
            code = end.code
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, handler)
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return call


def assert_error(result, what, fix=""):
    error = last_error(result)
    assert result.returncode == 1 and error.startswith(f"error: {what}"), error
    assert f". FIX: {fix}" in error and "\x1b" not in error


def put_older_adapter(project):
    """Pretend that an earlier run left an adapter; return its files."""
    (project / ADAPTER).mkdir()
    (project / ADAPTER / "adapters.safetensors").write_bytes(b"older")
    return contents(project / ADAPTER)


# ---- how it is called --------------------------------------------------------------------------
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_source_does_not_close_the_terminal(project, shell):
    if not shutil.which(shell):
        pytest.skip("not installed")
    command = [shell, "-c", "source ./fine_tune.sh; echo open"]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert (last_error(result), result.stdout) == (
        "error: not started. FIX: ./fine_tune.sh",
        "open\n",
    )


@pytest.mark.parametrize("shell", ["sh", "dash", "zsh", sys.executable])
def test_another_interpreter_says_what_to_type(project, shell):
    if not shutil.which(shell):
        pytest.skip("not installed")
    result = subprocess.run([shell, project / "fine_tune.sh"], capture_output=True, text=True)
    assert result.returncode in (1, 2) and "FIX: ./fine_tune.sh" in result.stdout + result.stderr


def edit(project, line):
    """Put this line of the settings in the place of ITERS=auto; return its number."""
    script = re.sub(r"^ITERS=.*$", line, SCRIPT, flags=re.MULTILINE)
    (project / "fine_tune.sh").write_text(script)
    return script[: script.index(f"\n{line}\n")].count("\n") + 2


def test_a_setting_edited_by_hand_counts(project, train):
    edit(project, 'ITERS="100"  # note')
    assert "run         100 batches" in train(ITERS=None, RESUME="1").stdout  # nothing to resume


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("ITERS = 100", 'ITERS = 100, is not NAME=value. FIX: write there: ITERS="100"'),
        ("ITERS= 100", 'ITERS= 100, is not NAME=value. FIX: write there: ITERS="100"'),
        ("ITERS: 100", 'ITERS: 100, is not NAME=value. FIX: write there: ITERS="100"'),
        ("$ITERS=100", '$ITERS=100, is not NAME=value. FIX: write there: ITERS="100"'),
        ('MODEL = "a b"', 'MODEL = "a b", is not NAME=value. FIX: write there: MODEL="a b"'),
        ("LAUNCH=ls -l", 'LAUNCH=ls -l, is not NAME=value. FIX: write there: LAUNCH="ls -l"'),
        (
            'MODEL="gemma',
            "a quote or bracket in the settings of fine_tune.sh has no end. FIX: write",
        ),
        ("ITERS=$(", "a quote or bracket in the settings of fine_tune.sh has no end. FIX: write"),
        ("iters=100", "the settings of fine_tune.sh have no ITERS. FIX: write there: ITERS=auto"),
    ],
)
def test_a_setting_edited_wrongly(project, train, line, error):
    number = edit(project, line)
    if "is not NAME" in error:
        error = f"line {number} of fine_tune.sh, {error}"
    result = train(ITERS=None)
    assert result.returncode == 1 and last_error(result).startswith(f"error: {error}")


def test_an_apostrophe_alone(project, train):
    edit(project, "ITERS='100  # note")
    assert last_error(train(ITERS=None)).endswith('. FIX: write there: ITERS="100"')


def test_without_the_virtual_environment(project, tmp_path):
    (tmp_path / "bash").symlink_to(shutil.which("bash"))
    command = [str(tmp_path / "bash"), str(project / "fine_tune.sh")]
    result = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert_error(result, "mlx_lm.lora was not found", "source venv/bin/activate")


@pytest.mark.parametrize("argument", ["--iters", "--trust-remote-code", "ITERS=7", "7"])
def test_arguments_that_do_not_go_through(call, argument):
    result = call("check_words", ["--report-to", "wandb", argument])
    assert result.returncode == 2
    assert last_error(result).startswith(f"error: it takes no {argument}. FIX: settings go in ")


def test_when_nobody_reads_the_output_any_more_it_ends_quietly(project, run):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = run(project, "fine_tune.sh", env=FAST, start=subprocess.Popen, **pipes)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("MODEL", "me/gemma", "export MODEL=gemma"),
        ("MODEL", "./models/base/gemma/", "export MODEL=gemma"),
        ("VERSION", "\x1b[31m/v2", "export VERSION=v2"),
        ("VERSION", "my chat", "export VERSION=my_chat"),
        ("VERSION", "", "export VERSION=v1"),
    ],
)
def test_a_name_that_is_none(call, name, value, fix):
    assert_error(call("check_words", [], **{name: value}), f"{name} is not a name", fix)


# ---- one run at a time, and what a killed one left ---------------------------------------------
def test_a_second_run_of_the_same_adapter_is_refused(project, call):
    shutil.rmtree((project / LOCK).parent)  # it makes the folder
    assert call("take_lock").returncode == 0
    with (project / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_error(call("take_lock"), f"another run is writing {ADAPTER}", "wait until it is")
    assert call("take_lock").returncode == 0


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        ({ADAPTER: "older", WORK: "newer"}, "newer"),  # killed before the two renames
        ({OLD: "older", WORK: "newer"}, "newer"),  # between them
        ({ADAPTER: "newer", OLD: "older"}, "newer"),  # behind them
        ({OLD: "older"}, "older"),
    ],
)
def test_kill_9_at_the_swap_loses_neither_adapter(project, call, left, kept):
    for folder, adapter in left.items():
        (project / folder).mkdir()
        (project / folder / "adapters.safetensors").write_text(adapter)
    assert call("finish_last_run").returncode == 0
    assert contents(project / ADAPTER) == {"adapters.safetensors": kept.encode()}
    assert not (project / OLD).exists() and not (project / WORK).exists()


def test_to_resume_a_run_that_lacked_nothing_but_its_place_ends_well(project, train):
    (project / WORK).mkdir()
    (project / WORK / "adapters.safetensors").write_text("newer")
    result = train(RESUME="1")
    assert result.returncode == 0 and result.stdout.startswith(f"wrote       {ADAPTER}/")
    assert contents(project / ADAPTER) == {"adapters.safetensors": b"newer"}


# ---- errors before a model is loaded -----------------------------------------------------------
@pytest.mark.parametrize(
    ("setting", "what", "fix"),
    [
        ("ITERS=abc", "is not a whole number from 1", "auto"),
        ("ITERS=10,000", "is not a whole number from 1", "10000"),
        ("LEARNING_RATE=0,1", "is not a number from 1e-09", "0.1"),
        ("LEARNING_RATE=nan", "is not a number from 1e-09", "auto"),
        ("SCALE=inf", "is not a number from 0.1", "10.0"),
        ("DROPOUT=1,5", "is not a number from 0.0 to 0.9", "0.1"),
        ("BATCH_SIZE=0", "is not a whole number from 1", "2"),
        ("RESUME=yes", "is not a whole number from 0 to 1", "auto"),
        ("SEED=4294967296", "is not a whole number from 0 to 1000000000", "0"),
        ("NUM_LAYERS=99", "is not one of the 6 layers of tiny-gemma-3", "6"),
        ("NUM_LAYERS=0", "is not one of the 6 layers of tiny-gemma-3", "6"),
    ],
)
def test_a_wrong_setting(call, setting, what, fix):
    name, value = setting.split("=")
    assert_error(call("check", **{name: value}), f"{setting} {what}. ", f"{name}={fix} ./fine_tune")


def write(file, text):
    return lambda project: (project / file).write_text(text, "latin-1")


def change_config(project, **values):
    path = project / BASE / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def put_adapter_of_another_base(project):
    (project / ADAPTER).mkdir()
    (project / ADAPTER / "adapter_config.json").write_text('{"model": "models/base/other"}')


def link_to_a_disk_that_is_not_there(project):
    shutil.rmtree(project / BASE)
    (project / BASE).symlink_to("/Volumes/X/tiny")


def row(line):
    good = json.dumps(as_prompt("a", "b"))
    return write(f"{DATA}/valid.jsonl", f"{good}\n{line}\n")


# It begins a reply otherwise than it writes one.
TEMPLATE = """{% for m in messages %}{{ m.content }}!{% endfor %}
{%- if add_generation_prompt %}?{% endif %}"""
DOWNLOAD = f"hf download mlx-community/tiny-gema-3 --local-dir {BASE.replace('mm', 'm')}"
TINY = "python tests/tiny_base.py"
BUILD = "VERSION=sample MODEL=tiny-gemma-3 python build_train.py"
A_ROW = f"{DATA}/valid.jsonl, line 2, cannot be used: "
A_BASE = f"the base model in {BASE} cannot be used: "
TOKENIZER = f"the tokenizer of {BASE} cannot be used: "
INDEX = f"{BASE}/model.safetensors.index.json"
REFUSED = {  # the harm done to the project, the settings, the error, its fix
    "MODEL mistyped": (None, {"MODEL": "tiny-gema-3"},
        "there is no base model in models/base/tiny-gema-3",
        f"export MODEL=tiny-gemma-3, or export MODEL=tiny-gemma-3-4bit, or {DOWNLOAD}"),
    "tiny not built": (lambda p: shutil.rmtree(p / "models/base"), {},
        f"there is no base model in {BASE}", TINY),
    "tiny not built at 4 bits": (lambda p: shutil.rmtree(p / "models/base"),
        {"MODEL": "tiny-gemma-3-4bit"}, "there is no base model in", f"{TINY} --bits 4"),
    "disk unplugged": (link_to_a_disk_that_is_not_there, {},
        f"{BASE} is a link to /Volumes/X/tiny, which is not there", "connect its disk"),
    "VERSION forgotten": (None, {"VERSION": "v1"}, "there is no train.jsonl in data/for_train/v1",
        "VERSION=v1 MODEL=tiny-gemma-3 python build_train.py, or export VERSION=sample"),
    "no launcher": (None, {"LAUNCH": "mpirun -n 2"}, "LAUNCH: there is no command mpirun",
        'LAUNCH="mlx.launch --hostfile hosts.json --" ./fine_tune.sh'),
    "config a list": (write(f"{BASE}/config.json", "[3]"), {}, f"{A_BASE}AttributeError", TINY),
    "config lacks sizes": (write(f"{BASE}/config.json", '{"hidden_size": 64}'), {},
        f"{A_BASE}KeyError", TINY),
    "no hidden size": (lambda p: change_config(p, hidden_size=0), {}, f"{A_BASE}ValueError", TINY),
    "10^9 layers": (lambda p: change_config(p, num_hidden_layers=10**9), {},
        f"{A_BASE}ValueError", TINY),
    "weights cut off": (lambda p: cut_off(p / BASE / "model.safetensors"), {},
        f"{A_BASE}SafetensorError", TINY),
    "shard missing": (write(INDEX, '{"weight_map": {"a": "model-2.safetensors"}}'), {},
        f"{A_BASE}FileNotFoundError", TINY),
    "tokenizer empty": (write(f"{BASE}/tokenizer.json", "{}"), {}, TOKENIZER, TINY),
    "template fails": (write(f"{BASE}/chat_template.jinja", "{{ 1 / 0 }}"), {},
        f"{TOKENIZER}ZeroDivisionError", TINY),
    "template ambiguous": (write(f"{BASE}/chat_template.jinja", TEMPLATE), {},
        "the chat template of tiny-gemma-3 does not tell which tokens are", "another base model"),
    "code": (lambda p: change_config(p, model_file="evil.py"), {},
        "tiny-gemma-3 brings code of its own, which is never run", "another base model"),
    "adapter of another base": (put_adapter_of_another_base, {},
        f"{ADAPTER} is that of the base other", "another VERSION"),
    "row without a reply": (row('{"prompt": "3"}'), {}, f"{A_ROW}KeyError", BUILD),
    "turn without text": (row('{"messages": [{"role": "user"}]}'), {}, f"{A_ROW}KeyError", BUILD),
    "row deep": (row("[" * 100_000), {}, f"{A_ROW}RecursionError", BUILD),
    "row not UTF-8": (row("\xff"), {}, f"{A_ROW}UnicodeDecodeError", BUILD),
    "row with half a character": (row('{"prompt": "\\ud800", "completion": "a"}'), {},
        f"{A_ROW}UnicodeEncodeError", BUILD),
    "row with a mark of order": (row("\xef\xbb\xbf{}"), {}, f"{A_ROW}JSONDecodeError", BUILD),
    "row empty": (row(""), {}, f"{A_ROW}JSONDecodeError", BUILD),
    "row too long": (None, {"MAX_SEQ_LENGTH": "9"}, "a row has 39 tokens",
        "MAX_SEQ_LENGTH=39 ./fine_tune.sh"),
    "few rows": (None, {"BATCH_SIZE": "9"}, "of these rows a batch can have 8 at most",
        "BATCH_SIZE=8 ./fine_tune.sh"),
    "logits": (lambda p: change_config(p, vocab_size=9_999_999),  # more than CUDA can count
        {"BATCH_SIZE": "8"}, "of these rows a batch can have 5 at most",
        "BATCH_SIZE=5 ./fine_tune.sh"),
}  # fmt: skip


@pytest.mark.parametrize(("harm", "settings", "what", "fix"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_rightly_is_refused(project, call, harm, settings, what, fix):
    if harm:
        harm(project)
    assert_error(call("check", **settings), what, fix)


def test_an_endless_chat_template_is_refused(project, call):
    loop = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    (project / BASE / "chat_template.jinja").write_text(loop)
    hasty = PROGRAM.replace("signal.alarm(60)", "signal.alarm(1)")
    result = call("check", program=hasty)
    assert_error(result, "the chat template of tiny-gemma-3 takes more", "another base model")


ROOM = "make room on the disk of models/adapters, then ./fine_tune.sh"


def replace_by_a_folder(project):
    (project / DATA / "valid.jsonl").unlink()
    (project / DATA / "valid.jsonl").mkdir()


@pytest.mark.parametrize(
    ("harm", "what", "fix"),
    [
        (lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
         "the disk of models/adapters is full", ROOM),
        (replace_by_a_folder, f"{DATA}/valid.jsonl cannot be read or written: Is a directory",
         f"ls -ld {DATA}/valid.jsonl shows what is there"),
    ],
    ids=["full disk", "folder"],
)  # fmt: skip
def test_a_file_that_cannot_be_read_or_written(project, harm, what, fix):
    settings = SETTINGS | {"VERSION": "sample", "MODEL": "tiny-gemma-3"}
    settings["SCRIPT"] = str(project / "fine_tune.sh")
    result = subprocess.run(
        [sys.executable, "-"],
        env=os.environ | settings,
        input=PROGRAM,
        preexec_fn=lambda: harm(project),
        capture_output=True,
        text=True,
    )
    assert_error(result, what, fix)


# ---- what it takes -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("hidden_size", "rate"),
    [(640, "0.0002"), (1152, "0.00013"), (2560, "6.8e-05"), (5376, "3.8e-05")],
)
def test_the_learning_rate_follows_the_size_of_the_model(project, call, hidden_size, rate):
    change_config(project, hidden_size=hidden_size)
    said = call("check").stdout
    assert f"rate        {rate} = 2e-4 x (640 / {hidden_size})^0.78" in said
    assert f"LEARNING_RATE={rate} " in said


def test_more_than_two_epochs_are_warned_of(call):
    assert call("check", ITERS="8").stderr == ""  # 8 rows, 2 in a batch
    warning = call("check", ITERS="9").stderr
    assert warning.startswith("warning: more than one epoch made held-out chats worse (8,000 rows")
    assert warning.endswith(". FIX: ITERS=4 ./fine_tune.sh\n")


GEMMA_3 = {  # layers, hidden, intermediate; GB of 4-bit weights
    "4B": ((34, 2560, 10240), 2.2),
    "27B": ((62, 5376, 21504), 15.2),
}


def pretend_to_be(project, model):
    """Give the tiny base the config and the size, in a file that is all holes, of a Gemma 3."""
    (layers, hidden, inner), gigabytes = GEMMA_3[model]
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    change_config(project, **sizes, vocab_size=262144)
    size = int(gigabytes * 1e9)
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"x": tensor}).encode()
    with (project / BASE / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    write_data(project, train=[("ciao", "ZQ " * 248)] * 16)  # 512 tokens each


@pytest.mark.parametrize(
    ("model", "measured", "settings"),  # the table of tests/benchmarks/README.md
    [
        ("4B", 16.9, {}),
        ("27B", 61.2, {}),
        ("27B", 32.9, {"GRAD_CHECKPOINT": "1"}),
        ("27B", 18.3, {"GRAD_CHECKPOINT": "1", "BATCH_SIZE": "1", "RANK": "8"}),
        ("27B", 26.2, {"NUM_LAYERS": "16", "BATCH_SIZE": "1", "EMBEDDINGS": "0"}),
    ],
)
def test_the_memory_is_reckoned_as_it_was_measured(project, call, model, measured, settings):
    pretend_to_be(project, model)
    result = call("check", CHECK_MEMORY="0", **settings)
    assert "the longest of 512 tokens" in result.stdout
    reckoned = float(re.search(r"memory      about ([\d.]+) GB", result.stdout)[1])
    assert 0.9 * measured < reckoned < 1.15 * measured


def test_what_does_not_fit_is_refused_with_settings_that_do(project, call):
    pretend_to_be(project, "27B")
    result = call("check", BATCH_SIZE="16")  # 320 GB
    if "error: no settings make it fit" in last_error(result):
        pytest.skip("this machine is too small for 27B")
    assert_error(result, "that does not fit, and a Mac may crash")
    fix = re.search("FIX: (.*) ./fine_tune.sh", last_error(result))[1]
    smaller = dict(setting.split("=") for setting in fix.split())
    assert call("check", **{"BATCH_SIZE": "16"} | smaller).returncode == 0


# ---- a whole run -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(template, tmp_path_factory):
    """A project after one run, called by a link, in an environment full of traps."""
    home = tmp_path_factory.mktemp("home")
    project = Path(shutil.copytree(template, home / "my project"))
    write_data(project)
    (home / "tune").symlink_to("my project/fine_tune.sh")
    traps = {
        "CDPATH": str(home),
        "FORCE_COLOR": "1",
        "MLXLM_USE_MODELSCOPE": "True",
        "PYTHONIOENCODING": "ascii",
        "SHELLOPTS": "braceexpand:hashall",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LINES_OF_TEXT": "a\ndeclare -x ITERS=1; exit 7\n'\"$(exit 8)`",
    }
    settings = FAST | OVERFIT | {"VERSION": "sample", "MODEL": "tiny-gemma-3"}
    result = subprocess.run(
        ["bash", "tune", "--project-name", "mine"],
        cwd=home,
        env=os.environ | traps | settings,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (project / "stdout").write_text(result.stdout)
    return project


def losses_of(project):
    return pd.read_csv(project / ADAPTER / "losses.csv", index_col="iteration")


@pytest.mark.slow
def test_a_run_leaves_adapter_settings_losses_and_log_and_nothing_else(trained):
    assert {path.name for path in (trained / ADAPTER).iterdir()} == {
        "adapters.safetensors",
        "adapter_config.json",
        "lora_config.yaml",
        "losses.csv",
        "training.log",
    }
    assert not (trained / WORK).exists() and not (trained / OLD).exists()
    losses = losses_of(trained)
    assert list(losses.columns) == ["train_loss", "val_loss", "tokens_per_second"]
    assert losses.val_loss.dropna().index.tolist() == [0, 6, 12, 18, 24, 25]
    assert losses.train_loss.dropna().index.tolist() == [6, 12, 18, 24, 25]
    log = (trained / ADAPTER / "training.log").read_text("utf-8")
    assert "save  0000024_adapters.safetensors" in log and "\x1b" not in log and "█" not in log


@pytest.mark.slow
def test_the_settings_of_the_run_stand_beside_the_adapter(trained):
    text = (trained / ADAPTER / "lora_config.yaml").read_text()
    for name in ("train.jsonl", "valid.jsonl"):
        checksum = subprocess.check_output("cksum", stdin=(trained / DATA / name).open(), text=True)
        assert f'# {name}: "{checksum.strip()}"\n' in text
    assert '# arguments: "--project-name mine"' in text
    settings = yaml.safe_load(text)
    assert settings["iters"] == 25 and settings["lora_parameters"]["rank"] == 8
    assert "model.embed_tokens" in settings["lora_parameters"]["keys"]
    config = json.loads((trained / ADAPTER / "adapter_config.json").read_text())
    assert config["project_name"] == "mine" and config["model"] == BASE


def loss_of_replies(project, adapter=None):
    """Nats per token of the completions of valid.jsonl, row by row."""
    model, tokenizer = load(str(project / BASE), adapter_path=adapter and str(adapter))
    total = count = 0
    for prompt, completion in VALID:
        chat = as_messages(prompt, completion)["messages"]
        start = len(
            tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
        )
        tokens = tokenizer.apply_chat_template(chat, return_dict=False)
        logits = model(mx.array([tokens[:-1]]))[0, start - 1 :]
        total += nn.losses.cross_entropy(logits, mx.array(tokens[start:]), reduction="sum").item()
        count += len(tokens) - start
    return total / count


@pytest.mark.slow
def test_the_checkpoint_with_the_lowest_loss_of_the_replies_is_kept(trained):
    losses = losses_of(trained).val_loss.dropna()
    best = losses[1:].idxmin()
    assert best < 25 and losses[best] < losses[25] and losses[best] < losses[0]
    said = f"kept        iteration {best}: validation loss ([0-9.]+), base ([0-9.]+)\n"
    said = re.search(said, (trained / "stdout").read_text())
    assert list(map(float, said.groups())) == pytest.approx([losses[best], losses[0]], abs=1e-3)
    assert losses[0] == pytest.approx(loss_of_replies(trained), abs=2e-4)
    assert losses[best] == pytest.approx(loss_of_replies(trained, trained / ADAPTER), abs=2e-4)


@pytest.mark.slow
def test_two_ranks_train_one_adapter_on_messages_with_a_quantised_base(project, train):
    write_data(project, shape=as_messages)
    launch = {"LAUNCH": "mlx.launch -n 2 --backend ring --", "MODEL": "tiny-gemma-3-4bit"}
    result = train(**launch, ITERS="2", EVAL_EVERY="1")
    assert result.returncode == 0, result.stdout + result.stderr
    losses = (project / f"{ADAPTER}-4bit/losses.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in losses[1:]] == ["0", "1", "2"]


# ---- what goes wrong while it trains -----------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("iters", "error"),
    [
        ("9", "the loss became NaN or infinite at iteration "),
        ("1", "all weights became NaN or infinite. FIX: "),  # no loss comes after it
    ],
)
def test_nan_ends_the_run_and_spares_the_older_adapter(project, train, iters, error):
    older = put_older_adapter(project)
    result = train(ITERS=iters, LEARNING_RATE="1e38", SCALE="1e10")
    assert_error(result, error, "a smaller LEARNING_RATE or SCALE")
    assert contents(project / ADAPTER) == older
    assert not list(project.glob(CHECKPOINTS))  # so the next run is not asked to go on with it


def is_over(project):
    """Whether no process of a run lives any more: each holds the lock, the trainer too."""
    with (project / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_and_kill(project, run, number):
    """Send a signal to fine_tune.sh, to it alone, after the first checkpoint."""
    options = {"start": subprocess.Popen, "stderr": subprocess.PIPE}
    process = run(project, "fine_tune.sh", env=FAST | LONG, **options)
    wait_until(lambda: list(project.glob(CHECKPOINTS)))
    process.stderr.close()  # nobody reads it, as after Ctrl-C in ./fine_tune.sh 2>&1 | tee log
    os.kill(process.pid, number)
    code = process.wait()
    wait_until(lambda: is_over(project))
    return code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, -15), (signal.SIGHUP, -1), (signal.SIGINT, 130)]
)
def test_the_trainer_ends_with_its_script(project, run, number, code):
    older = put_older_adapter(project)
    assert start_and_kill(project, run, number) == code
    assert contents(project / ADAPTER) == older


@pytest.mark.slow
def test_after_kill_9_a_resumed_run_does_the_rest(project, train, run):
    assert start_and_kill(project, run, signal.SIGKILL) == -signal.SIGKILL
    again = train(**LONG)  # would begin at the beginning
    assert_error(again, "an interrupted run has a checkpoint after ", "RESUME=1 ./fine_tune.sh go")
    changed = train(**LONG, RESUME="1", RANK="4")  # FAST has another
    fix = "RANK=8 RESUME=1 ./fine_tune.sh; RESUME=0 ./fine_tune.sh starts anew"
    assert_error(changed, "the interrupted run had RANK=8", fix)
    write_data(project, train=TRAIN[1:])
    changed = train(**LONG, RESUME="1", RANK="4")
    assert_error(changed, "settings, train.jsonl, ", "RESUME=0 ./fine_tune.sh starts anew")
    write_data(project)
    # Pretend that all but 8 of the batches are done.
    newest = max(project.glob(CHECKPOINTS))
    newest.rename(newest.with_name("0003992_adapters.safetensors"))
    result = train(**LONG, RESUME="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resuming    after 3992 of 4000 batches" in result.stdout
    losses = losses_of(project)
    assert losses.index.is_monotonic_increasing and losses.index.is_unique
    assert losses.val_loss.dropna().index[-3:].tolist() == [3992, 3996, 4000]
    config = json.loads((project / ADAPTER / "adapter_config.json").read_text())
    first, last, updates = config["lr_schedule"]["arguments"]  # the rest of the line
    assert (first, last) == (pytest.approx(1e-3 * 8 / 4000), 0)
    assert updates + config["lr_schedule"]["warmup"] == 8
    assert config["seed"] == 3992  # other batches than the first again


LOOK = f"look at the end of {WORK}/training.log"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "error", "fix"),
    [
        ('echo "$@"', "code 0 after 0 of 4 batches: ", LOOK),
        ('"$@" & kill -9 $!', "code 0 after 0 of 4 batches: ", LOOK),
        ('"$@"; "$@"', "code 0 after 8 of 4 batches: ", LOOK),  # each trains alone
        ("exit 7", "code 7 after 0 of 4 batches: it said nothing", LOOK),
        ("echo 'Error: [write] Unable to write'; exit 1", "code 1 after 0 of 4 batches: Error: ",
         ROOM),
        ("echo 'Error: [METAL] Insufficient Memory'; exit 1", "code 1 after 0 of 4 batches: Error",
         "RESUME=0 GRAD_CHECKPOINT=1 BATCH_SIZE=1 ./fine_tune.sh"),
    ],
    ids=["only says", "killed", "no group", "fails", "full disk", "memory"],
)  # fmt: skip
def test_a_launcher_that_fails(project, train, launcher, error, fix):
    older = put_older_adapter(project)
    (project / "launch").write_text("#!/bin/sh\n" + launcher)
    (project / "launch").chmod(0o755)
    result = train(LAUNCH="./launch", ITERS="4", EVAL_EVERY="4")
    assert_error(result, f"mlx_lm.lora ended with {error}", fix)
    assert contents(project / ADAPTER) == older


def test_a_checkpoint_that_cannot_be_scored(project, call):
    (project / WORK / "run").mkdir(parents=True)
    shutil.copy(project / DATA / "valid.jsonl", project / WORK / "run")
    lora = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    config = {"num_layers": -1, "lora_parameters": lora}
    (project / WORK / "adapter_config.json").write_text(json.dumps(config))
    (project / WORK / "run/0000004_adapters.safetensors").write_bytes(b"12345678 no weights")
    fix = "close other programs, then RESUME=1 ./fine_tune.sh; RESUME=0 starts anew"
    assert_error(call("choose"), "scoring failed: ", fix)


@pytest.mark.slow
def test_a_narrow_terminal_has_a_live_bar_and_ctrl_c_says_how_to_go_on(project, run):
    older = put_older_adapter(project)
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 16, 0, 0))
    process = run(
        project,
        "fine_tune.sh",
        env=FAST | LONG,
        start=subprocess.Popen,
        start_new_session=True,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(follower)
    seen, pressed = b"", False
    while process.poll() is None or select.select([leader], [], [], 0)[0]:
        if not pressed and list(project.glob(CHECKPOINTS)):
            pressed = os.write(leader, b"\x03") == 1
        if select.select([leader], [], [], 0.1)[0]:
            try:
                seen += os.read(leader, 65536)
            except OSError:  # the other side is closed
                break
    assert process.wait() == 130
    wait_until(lambda: is_over(project))
    text = seen.decode()
    assert re.search(r"\rtraining: +\d+%\|", text) and "Traceback" not in text
    assert "RESUME=1 in front of the same command" in text
    assert contents(project / ADAPTER) == older
