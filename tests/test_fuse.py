"""fuse.sh: the fused model keeps what was learned, and appears whole or not at all."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from conftest import REPOSITORY, contents, cut_off, last_error

CHAT = [
    ("ciao raga come va", "tutto bene bro, tu?"),
    ("che gioco fai stasera", "sempre lo stesso LULW"),
    ("ma la sedia", "GNEEEK"),
    ("hai salvato", "no, ceccopoint perso"),
]
# At 4 bits the step of the tiny base's small random weights is so fine that rounding to it loses
# nothing; at 2 bits it is coarse, as in a large trained model at 4.
COARSE = "tiny-gemma-3-2bit"
ADAPTER = f"models/adapters/adapter-sample_{COARSE}"
FUSED = f"models/fused/fused-sample_{COARSE}"
HIDDEN = f"models/fused/.fused-sample_{COARSE}"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def trained(template, tmp_path_factory):
    """A project with adapters for the tiny base at 2, 4 and 32 bits: all those of 2, in truth."""
    project = Path(shutil.copytree(template, tmp_path_factory.mktemp("trained") / template.name))
    command = [sys.executable, project / "tests/tiny_base.py", "--bits", "2"]
    subprocess.run(command, check=True, capture_output=True)
    data = project / "data/for_train/sample"
    data.mkdir()
    rows = [{"prompt": prompt, "completion": reply} for prompt, reply in CHAT]
    for name in ["train", "valid"]:
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [Path(sys.executable).with_name("mlx_lm.lora"), "--train"]
    train += ["--model", project / f"models/base/{COARSE}", "--data", data]
    train += ["--adapter-path", project / ADAPTER, "--num-layers", "-1"]
    train += ["--iters", "40", "--batch-size", "2", "--learning-rate", "3e-4"]
    subprocess.run(train, check=True, capture_output=True)
    for model in ["tiny-gemma-3-4bit", "tiny-gemma-3"]:
        adapter = project / f"models/adapters/adapter-sample_{model}"
        shutil.copytree(project / ADAPTER, adapter)
        change(adapter / "adapter_config.json", model=f"models/base/{model}")
    return project


@pytest.fixture
def project(trained, tmp_path):
    """A copy of it, with an older fused model of the coarse base."""
    copy = Path(shutil.copytree(trained, tmp_path / trained.name))
    (copy / FUSED).mkdir()
    (copy / FUSED / "model.safetensors").write_bytes(b"older")
    return copy


@pytest.fixture
def fuse(project, run):
    def fuse(*args, **options):
        variables = {name: options.pop(name) for name in list(options) if name.isupper()}
        return run(project, "fuse.sh", *args, env={"MODEL": COARSE} | variables, **options)

    return fuse


def loss(model, adapter=None):
    """Return the nats per token of the replies."""
    model, tokenizer = mlx_lm.load(str(model), adapter_path=adapter and str(adapter))
    total = count = 0
    for prompt, reply in CHAT:
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        render = partial(tokenizer.apply_chat_template, return_dict=False)
        start = len(render(chat[:1], add_generation_prompt=True))
        tokens = mx.array(render(chat))
        logits = model(tokens[None, :-1])[0, start - 1 :]
        total += nn.losses.cross_entropy(logits, tokens[start:]).sum().item()
        count += len(tokens) - start
    return total / count


def kept(project):
    """Return the share of what the adapter improves on the base that the fused model keeps."""
    base = project / f"models/base/{COARSE}"
    before, learned = loss(base), loss(base, project / ADAPTER)
    assert before - learned > 0.5
    return (before - loss(project / FUSED)) / (before - learned)


def older_model_is_as_it_was(project):
    left = [path.name for path in (project / "models/fused").iterdir() if path.suffix != ".lock"]
    return contents(project / FUSED) == {"model.safetensors": b"older"} and left == [FUSED[13:]]


# ---- what comes out -----------------------------------------------------------------------------
@pytest.mark.slow
def test_the_default_keeps_98_percent_where_the_bits_of_the_base_lose_a_part(project, fuse):
    result = fuse()
    assert result.returncode == 0, result.stderr
    assert "FUSED_BITS=8" in result.stdout and result.stderr == ""
    assert kept(project) >= 0.98
    result = fuse(FUSED_BITS="base")
    assert result.returncode == 0, result.stderr
    assert "warning: rounding to 2 bits may forget a part of what was learned" in result.stderr
    assert kept(project) < 0.9
    assert fuse(FUSED_BITS="16").returncode == 0
    assert kept(project) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "bits", "expected"),
    [
        ("tiny-gemma-3-4bit", "base", 4),
        ("tiny-gemma-3-4bit", "auto", 8),
        ("tiny-gemma-3", "auto", None),
    ],
)
def test_bits_of_the_result_and_its_origin(project, fuse, model, bits, expected):
    result = fuse(MODEL=model, FUSED_BITS=bits)
    assert result.returncode == 0, result.stderr
    fused = project / f"models/fused/fused-sample_{model}"
    quantization = json.loads((fused / "config.json").read_text()).get("quantization")
    assert (quantization and quantization["bits"]) == expected
    assert not quantization or quantization["group_size"] == 64
    adapter = project / f"models/adapters/adapter-sample_{model}/adapters.safetensors"
    assert json.loads((fused / "fused_from.json").read_text()) == {
        "base": model,
        "adapter_sha256": hashlib.sha256(adapter.read_bytes()).hexdigest(),
        "version": "sample",
        "bits": "8" if expected == 8 else "base",
        "group_size": 64,
    }
    tokenizer = "tokenizer_config.json"
    base = project / f"models/base/{model}"
    assert (fused / tokenizer).read_bytes() == (base / tokenizer).read_bytes()


# ---- whole or not at all ------------------------------------------------------------------------
def start(project, run):
    return run(
        project,
        "fuse.sh",
        env={"MODEL": COARSE},
        start=subprocess.Popen,
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def wait_until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("30 seconds have passed")


def wait_for(project, name, process):
    """Wait until fuse.sh has made this file in its work folder."""
    wait_until(lambda: process.poll() is not None or [*project.glob(f"{HIDDEN}.partial/{name}")])
    assert process.poll() is None


def children(process):
    """Return the states of the processes that run in the session of a script, but for zombies."""
    command = ["ps", "-A", "-o", "sess=,stat="]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if line.split()[0] == str(process.pid) and "Z" not in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "moment"),
    [
        ("SIGINT", 130, "adapter"),
        ("SIGHUP", 129, "log"),
        ("SIGTERM", 143, "exact/*.safetensors"),
        ("SIGKILL", -9, "model/*.safetensors"),
    ],
)
def test_a_signal_to_the_script_alone_ends_its_children_too(project, run, fuse, name, code, moment):
    process = start(project, run)
    wait_for(project, moment, process)
    os.kill(process.pid, getattr(signal, name))
    assert process.wait(timeout=10) == code
    wait_until(lambda: children(process) == [])
    if name == "SIGKILL":
        assert contents(project / FUSED) == {"model.safetensors": b"older"}
        assert fuse().returncode == 0
        assert {"config.json", "fused_from.json"} <= set(contents(project / FUSED))
        names = {path.name for path in (project / "models/fused").iterdir()}
        assert names == {FUSED[13:], f".{FUSED[13:]}.lock"}
    else:
        assert process.stderr.read() == "interrupted: the previous fused model is as it was\n"
        assert older_model_is_as_it_was(project)


@pytest.mark.slow
def test_neither_a_second_run_nor_another_adapter_disturbs_the_first(project, run, fuse):
    first = (project / ADAPTER / "adapters.safetensors").read_bytes()
    process = start(project, run)
    wait_for(project, "log", process)
    assert last_error(fuse(FUSED_BITS="16")) == (
        f"error: another run is writing {FUSED}. FIX: wait until it is done, or end it"
    )
    shutil.rmtree(project / ADAPTER)
    assert process.wait() == 0
    origin = json.loads((project / FUSED / "fused_from.json").read_text())
    assert origin["bits"] == "8"
    assert origin["adapter_sha256"] == hashlib.sha256(first).hexdigest()


def test_a_swap_that_was_cut_in_the_middle_is_undone(project, fuse):
    (project / FUSED).rename(project / f"{HIDDEN}.old")
    (project / f"{HIDDEN}.partial/model").mkdir(parents=True)
    (project / ADAPTER / "adapters.safetensors").write_bytes(b"")
    assert fuse().returncode == 1
    assert older_model_is_as_it_was(project)


@pytest.mark.slow
def test_a_disk_that_fills_up_while_fusing(project, fuse):
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (500_000, 500_000))
    result = fuse(preexec_fn=full)
    assert result.returncode == 1
    assert last_error(result).endswith("FIX: make room on the disk of models/fused")
    assert older_model_is_as_it_was(project)


# ---- errors -------------------------------------------------------------------------------------
def nan_adapter(project):
    path = str(project / ADAPTER / "adapters.safetensors")
    weights = {name: values * float("nan") for name, values in mx.load(path).items()}
    mx.eval(weights)
    mx.save_safetensors(path, weights)


def link_to_a_disk_that_is_not_there(project):
    shutil.rmtree(project / BASE)
    (project / BASE).symlink_to("/Volumes/X")


BASE = f"models/base/{COARSE}"
RETRAIN = f"VERSION=sample MODEL={COARSE} ./fine_tune.sh"
DOWNLOAD = "python tests/tiny_base.py --bits 2"
NO_BASE = "there is no base model in models/base"
DAMAGED = "the adapter cannot be used: "
ERRORS = {  # harm, settings, how the last line of stderr begins, its fix
    "MODEL forgotten": (
        lambda p: [shutil.rmtree(p / f"models/base/{name}") for name in ("tiny-gemma-3", COARSE)],
        {"MODEL": None}, f"{NO_BASE}/gemma-3-text-27b-it-4bit. ",
        "export MODEL=tiny-gemma-3-4bit, or hf download mlx-community/gemma-3-text-27b-it-4bit"),
    "MODEL mistyped": (None, {"MODEL": "tiny"}, f"{NO_BASE}/tiny. ",
        "export MODEL=tiny-gemma-3"),
    "tiny not built": (lambda p: shutil.rmtree(p / "models/base"), {},
        f"there is no base model in {BASE}", "python tests/tiny_base.py --bits 2"),
    "disk unplugged": (link_to_a_disk_that_is_not_there, {},
        f"{BASE} is a link to /Volumes/X, which is not there", "connect its disk"),
    "MODEL a path": (None, {"MODEL": f"{BASE}/"}, f"MODEL={BASE}/ is not a name",
        f"export MODEL={COARSE}"),
    "VERSION no name": (None, {"VERSION": "--x"}, "VERSION=--x is not a name", "export VERSION=x"),
    "VERSION empty": (None, {"VERSION": ""}, "VERSION= is not a name", "export VERSION=v1"),
    "unknown bits": (None, {"FUSED_BITS": "7"}, "FUSED_BITS=7 is not auto, base, 16 or 8",
        "FUSED_BITS=auto ./fuse.sh"),
    "no adapter": (lambda p: shutil.rmtree(p / ADAPTER), {}, f"there is no adapter in {ADAPTER}",
        RETRAIN),
    "no config": (lambda p: change(p / BASE / "config.json", quantization=3), {},
        f"{BASE}/config.json cannot be used: TypeError(", DOWNLOAD),
    "10^9 layers": (lambda p: change(p / BASE / "config.json", num_hidden_layers=10**9), {},
        f"{BASE}/config.json cannot be used: ValueError('so many layers", DOWNLOAD),
    "adapter cut off": (lambda p: cut_off(p / ADAPTER / "adapters.safetensors"), {},
        f"{DAMAGED}RuntimeError(", RETRAIN),
    "adapter of NaN": (nan_adapter, {}, f"{DAMAGED}ValueError('it holds NaN", RETRAIN),
    "adapter of another base": (
        lambda p: change(p / ADAPTER / "adapter_config.json", model="a/tiny\x1b[31m"), {},
        f"{DAMAGED}ValueError(", RETRAIN),
}  # fmt: skip


@pytest.mark.slow  # the adapters are trained
@pytest.mark.parametrize(("harm", "settings", "begins", "fix"), ERRORS.values(), ids=ERRORS)
def test_error_before_a_model_is_loaded(project, fuse, harm, settings, begins, fix):
    if harm:
        harm(project)
    result = fuse(**settings)
    assert result.returncode == 1
    assert last_error(result).startswith(f"error: {begins}")
    assert f". FIX: {fix}" in last_error(result)
    assert "\x1b" not in result.stderr and "running" not in result.stdout
    assert older_model_is_as_it_was(project)


def no_chat_template(path):
    path.unlink()
    change(path.with_name("tokenizer_config.json"), chat_template=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "harm", "why"),
    [
        ("tokenizer.json", Path.unlink, "Couldn't instantiate the backend"),
        ("model.safetensors", Path.unlink, "No safetensors found"),
        ("model.safetensors", cut_off, "incomplete download"),
        ("chat_template.jinja", no_chat_template, "the base has no chat template"),
    ],
    ids=["no tokenizer", "no weights", "cut off", "no template"],
)
def test_what_failed_is_told_by_its_cause(project, fuse, file, harm, why):
    harm(project / BASE / file)
    result = fuse(FUSED_BITS="base")
    assert result.returncode == 1
    assert " ended with code 1: " in last_error(result) and why in last_error(result)
    assert last_error(result).endswith(f"FIX: {DOWNLOAD}")
    assert older_model_is_as_it_was(project)


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", ["kill -9 $$", "echo 'libc++abi: [METAL] Insufficient Memory' >&2; exit 134"]
)
def test_only_a_process_that_was_killed_or_said_so_ran_out_of_memory(
    project, fuse, tmp_path, program
):
    (tmp_path / "mlx_lm.fuse").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "mlx_lm.fuse").chmod(0o755)
    result = fuse(PATH=os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    assert result.returncode == 1
    assert "FIX: FUSED_BITS=base ./fuse.sh" in last_error(result)


@pytest.mark.slow
def test_a_place_that_cannot_be_written_to(project, fuse):
    (project / f"{HIDDEN}.lock").mkdir()  # root may write to all folders
    assert "error: models/fused cannot be written to. FIX: chmod" in last_error(fuse())


# ---- how it is called ---------------------------------------------------------------------------
def test_it_takes_no_arguments(template, run):
    result = run(template, "fuse.sh", "FUSED_BITS=8")
    assert result.returncode == 2
    assert last_error(result).endswith("FIX: settings go in front: FUSED_BITS=16 ./fuse.sh")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("FUSED_BITS = 8", 'FUSED_BITS = 8, is not NAME=value. FIX: write there: FUSED_BITS="8"'),
        ("VERSION=my chat", 'is not NAME=value. FIX: write there: VERSION="my chat"'),
        ('MODEL = "a b"', 'is not NAME=value. FIX: write there: MODEL="a b"'),
        ('MODEL="gemma', "a quote or bracket in the settings of fuse.sh has no end. FIX: write"),
        ("fused_bits=8", "FUSED_BITS= is not auto, base, 16 or 8. FIX: FUSED_BITS=auto ./fuse.sh"),
    ],
)
def test_a_setting_edited_wrongly(template, run, tmp_path, line, error):
    script = (template / "fuse.sh").read_text()
    script = re.sub("^FUSED_BITS=.*$", line, script, flags=re.MULTILINE)
    (tmp_path / "fuse.sh").write_text(script)
    result = run(tmp_path, "fuse.sh")
    assert result.returncode == 1 and error in last_error(result)


@pytest.mark.parametrize("program", [*filter(shutil.which, ["dash", "zsh", "python3"])])
def test_another_program_than_bash_says_what_to_type(program):
    result = subprocess.run([program, REPOSITORY / "fuse.sh"], capture_output=True, text=True)
    assert result.returncode != 0
    assert "./fuse.sh" in result.stderr and "Traceback" not in result.stderr


def test_without_the_virtual_environment(template):
    path = {"PATH": "/usr/bin:/bin"}
    if shutil.which("mlx_lm.fuse", path=path["PATH"]):
        pytest.skip("mlx-lm is installed for all")
    command = ["bash", template / "fuse.sh"]
    result = subprocess.run(command, env=path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "FIX: source venv/bin/activate" in last_error(result)


@pytest.mark.slow
def test_modules_come_from_pythonpath_too_and_one_that_fails_to_is_told(project, fuse, tmp_path):
    (tmp_path / "mlx.py").touch()
    error = last_error(fuse(PYTHONPATH=str(tmp_path)))
    assert error.startswith("error: No module named 'mlx.core'")
    assert error.endswith("FIX: source venv/bin/activate (see README.md, Install)")
    assert older_model_is_as_it_was(project)


@pytest.mark.slow
def test_it_works_through_a_link_from_anywhere(project, run, tmp_path):
    (tmp_path / "fuse.sh").symlink_to(project / "fuse.sh")
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    result = run(tmp_path, "fuse.sh", env={"MODEL": COARSE, "FUSED_BITS": "base"})
    assert result.returncode == 0, result.stderr
    assert "config.json" in contents(project / FUSED)
