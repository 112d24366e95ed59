"""fuse.sh: the fused model keeps what was learned, and appears whole or not at all."""

from models import check_fusing
from models.chat_template import load_model
from models.common import chat_of, checksum
from models.completion_loss import encode, loss_of_replies

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import contents, cut_off, is_over, wait_until

ROWS = [
    ("ciao raga come va", "tutto bene bro, tu?"),
    ("che gioco fai stasera", "sempre lo stesso LULW"),
    ("ma la sedia", "GNEEEK"),
    ("hai salvato", "no, ceccopoint perso"),
]
# At 4 bits the step of the tiny base's small random weights is so fine that rounding to it loses
# nothing; at 2 bits it is coarse, as in a large trained model at 4.
COARSE = "tiny-gemma-3-2bit"
BASE = f"models/base/{COARSE}"
ADAPTER = f"models/adapters/adapter-sample_{COARSE}"
FUSED = f"models/fused/fused-sample_{COARSE}"
HIDDEN = f"models/fused/.fused-sample_{COARSE}"
WORK, LOCK = f"{HIDDEN}.partial", f"{HIDDEN}.lock"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def trained(template, tmp_path_factory):
    """A project with adapters for the tiny base at 2 and 32 bits: both those of 2, in truth."""
    project = Path(shutil.copytree(template, tmp_path_factory.mktemp("trained") / template.name))
    command = [sys.executable, project / "tests/tiny_base.py", "--bits", "2"]
    subprocess.run(command, check=True, capture_output=True)
    data = project / "data/for_train/sample"
    data.mkdir()
    lines = [json.dumps({"prompt": prompt, "completion": reply}) + "\n" for prompt, reply in ROWS]
    for name in "train", "valid":
        (data / f"{name}.jsonl").write_text("".join(lines))
    train = [Path(sys.executable).with_name("mlx_lm.lora"), "--train"]
    train += ["--model", project / BASE, "--data", data]
    train += ["--adapter-path", project / ADAPTER, "--num-layers", "-1"]
    train += ["--iters", "40", "--batch-size", "2", "--learning-rate", "3e-4"]
    subprocess.run(train, check=True, capture_output=True)
    other = project / "models/adapters/adapter-sample_tiny-gemma-3"
    shutil.copytree(project / ADAPTER, other)
    change(other / "adapter_config.json", model="models/base/tiny-gemma-3")
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
    return lambda *args, **env: run(project, "fuse.sh", *args, env={"MODEL": COARSE} | env)


def loss(model, adapter=None):
    model, tokenizer = load_model(model, adapter)
    chats = [chat_of({"prompt": prompt, "completion": reply}) for prompt, reply in ROWS]
    return loss_of_replies(model, [encode(tokenizer, chat) for chat in chats])


def kept(project):
    """Return the share of what the adapter improves on the base that the fused model keeps."""
    before, learned = loss(project / BASE), loss(project / BASE, project / ADAPTER)
    assert before - learned > 0.5
    return (before - loss(project / FUSED)) / (before - learned)


def is_older(project):
    left = {path.name for path in (project / "models/fused").iterdir()}
    left -= {".gitkeep", Path(LOCK).name, Path(LOCK).with_suffix(".log").name}
    return contents(project / FUSED) == {"model.safetensors": b"older"} and left == {FUSED[13:]}


# ---- what comes out ------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_default_keeps_98_percent_where_the_bits_of_the_base_lose_a_part(project, fuse):
    (project / FUSED / "my notes.txt").write_bytes(b"hours")
    result = fuse()
    assert result.returncode == 0, result.stderr
    assert "FUSED_BITS=8" in result.stdout and result.stderr == ""
    assert kept(project) >= 0.98
    assert json.loads((project / FUSED / "config.json").read_text())["quantization"]["bits"] == 8
    assert json.loads((project / FUSED / "fused_from.json").read_text()) == {
        "base": COARSE,
        "version": "sample",
        "bits": "8",
        "group_size": 64,
        "adapter_sha256": checksum(project / ADAPTER / "adapters.safetensors"),
    }
    assert f"replaced    a fused model; it is in {FUSED}.before" in result.stdout
    assert (project / f"{FUSED}.before/model.safetensors").read_bytes() == b"older"
    assert (project / FUSED / "my notes.txt").read_bytes() == b"hours"
    # The converter of llama.cpp looks for the chat template there.
    assert "<start_of_turn>" in (project / FUSED / "tokenizer_config.json").read_text()

    result = fuse(FUSED_BITS="base")
    assert result.returncode == 0, result.stderr
    assert "warning: rounding to the bits of the base may lose" in result.stderr
    assert kept(project) < 0.9
    assert fuse(FUSED_BITS="16").returncode == 0
    assert kept(project) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_a_base_that_is_not_quantized_stays_so_and_a_link_stays_a_link(project, fuse, tmp_path):
    (tmp_path / "disk").mkdir()
    fused = project / "models/fused/fused-sample_tiny-gemma-3"
    fused.symlink_to(tmp_path / "disk")
    assert fuse(MODEL="tiny-gemma-3").returncode == 0
    assert "quantization" not in json.loads((tmp_path / "disk/config.json").read_text())
    assert fused.is_symlink()


# ---- whole or not at all -------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "moment"),
    [
        (signal.SIGINT, 130, "base"),
        (signal.SIGTERM, 130, "exact/*.safetensors"),
        (signal.SIGKILL, -9, "model/*.safetensors"),
    ],
)
def test_a_signal_leaves_the_fused_model_of_before(project, run, fuse, number, code, moment):
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    process = run(project, "fuse.sh", env={"MODEL": COARSE}, start=subprocess.Popen, **pipes)
    wait_until(lambda: list((project / WORK).glob(moment)))
    if number == signal.SIGINT:
        assert f"error: another run is writing {FUSED}\n" in fuse().stderr
    os.kill(process.pid, number)
    assert process.wait(timeout=10) == code
    wait_until(lambda: is_over(project / LOCK))
    if number == signal.SIGKILL:
        assert contents(project / FUSED) == {"model.safetensors": b"older"}
        assert fuse().returncode == 0  # what was left does no harm
    else:
        assert "interrupted: an older fused model stays as it was" in process.stderr.read()
        assert is_older(project)


# ---- errors --------------------------------------------------------------------------------------
def nan_adapter(project):
    path = str(project / ADAPTER / "adapters.safetensors")
    weights = {name: values * float("nan") for name, values in mx.load(path).items()}
    mx.eval(weights)
    mx.save_safetensors(path, weights)


TRAIN = f"VERSION=sample MODEL={COARSE} ./fine_tune.sh"
TINY = "python tests/tiny_base.py --bits 2"
ERRORS = {  # what was done to the project, settings, the error, its first FIX
    "MODEL mistyped": (None, {"MODEL": "tiny"}, "there is no models/base/tiny/config.json",
        "hf download mlx-community/tiny --local-dir models/base/tiny"),
    "MODEL a path": (None, {"MODEL": "a/b"}, "MODEL='a/b' is not made of",
        "export MODEL=gemma-3-text-27b-it-4bit"),
    "unknown bits": (None, {"FUSED_BITS": "7"}, "FUSED_BITS=7 is not auto, base, 16 or 8",
        f"VERSION=sample MODEL={COARSE} FUSED_BITS=auto ./fuse.sh"),
    "no adapter": (lambda p: (p / ADAPTER).rename(p / f"models/adapters/adapter-mine_{COARSE}"), {},
        f"there is no adapter in {ADAPTER}", TRAIN),
    "no config": (lambda p: change(p / BASE / "config.json", quantization=3), {},
        f"the base model in {BASE} cannot be used: TypeError", TINY),
    "adapter cut off": (lambda p: cut_off(p / ADAPTER / "adapters.safetensors"), {},
        f"the adapter in {ADAPTER} cannot be used: RuntimeError", TRAIN),
    "adapter of NaN": (nan_adapter, {}, f"{ADAPTER} holds NaN or infinite values", TRAIN),
    "adapter of another base": (
        lambda p: change(p / ADAPTER / "adapter_config.json", model="a/tiny\x1b[31m"), {},
        f"{ADAPTER} was trained on a/tiny\\x1b[31m", TRAIN),
    "no tokenizer": (lambda p: (p / BASE / "tokenizer.json").unlink(), {"FUSED_BITS": "base"},
        f"the base model in {BASE} cannot be used: ", TINY),
}  # fmt: skip


@pytest.mark.slow  # the adapters are trained
@pytest.mark.parametrize(("harm", "settings", "error", "fix"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_fused_is_refused_in_one_line(project, fuse, harm, settings, error, fix):
    if harm:
        harm(project)
    result = fuse(**settings)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning")]
    place = next(n for n, line in enumerate(lines) if line.startswith("error: "))
    assert result.returncode == 1 and error in lines[place] and lines[place + 1] == f"FIX: {fix}"
    assert "Traceback" not in result.stderr and "\x1b" not in result.stderr
    assert is_older(project)


LESS, DISK = "FUSED_BITS=base ./fuse.sh", "df -h models/fused"
SAID = [  # by a step that failed; the error, the fix
    ("Loading\n", "it said nothing", LESS),
    ("libc++abi: [METAL] Insufficient Memory\n", "Insufficient Memory", LESS),
    ("RuntimeError: [write] Unable to write 9 bytes\n", "Unable to write", DISK),
    ("a\nOSError: [Errno 28] No space left on device\n", "No space left", DISK),
    ("ValueError: no\x1b[31m\n", r"ValueError: no\x1b[31m", "tail -n 30"),
]


@pytest.mark.parametrize(("said", "error", "fix"), SAID)
def test_a_step_that_failed_is_told_by_its_cause(tmp_path, capsys, monkeypatch, said, error, fix):
    monkeypatch.setenv("MODEL", "gemma")
    (tmp_path / "log").write_text(said)
    with pytest.raises(SystemExit):
        check_fusing.explain(tmp_path / "log")
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert error in first and fix in second


@pytest.mark.parametrize(
    ("bits", "here", "whole", "memory", "chosen"),
    [
        ("auto", 16e9, 50e9, 96e9, "8"),
        ("auto", 16e9, 50e9, 64e9, "base"),  # it would take 73 GB
        ("auto", 50e9, 50e9, 512e9, "base"),  # not quantized
        ("16", 16e9, 50e9, 64e9, "16"),
    ],
)
def test_auto_is_8_bits_where_that_helps_and_fits(monkeypatch, bits, here, whole, memory, chosen):
    monkeypatch.setattr(check_fusing, "memory_for_mlx", lambda: memory)
    assert check_fusing.choose_bits(bits, here, whole) == chosen


def test_the_disk_is_looked_at_before_it_fills_up(tmp_path, capsys, monkeypatch):
    """A base of 16 GB at 4 bits, and 50 GB at 16 bits: to 8 bits it goes by way of 16."""
    (tmp_path / "fused.before").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 20e9))
    with pytest.raises(SystemExit):
        check_fusing.check_disk(tmp_path / "fused", "8", 16e9, 50e9)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("deleting    ") and not (tmp_path / "fused.before").exists()
    assert lines[1] == "error: fusing takes 76.6 GB of disk, and 20 GB are free"
    assert "FUSED_BITS=base ./fuse.sh" in lines[2]
    check_fusing.check_disk(tmp_path / "fused", "base", 16e9, 50e9)


def test_settings_go_in_front(template, run):
    result = run(template, "fuse.sh", "FUSED_BITS=8")
    assert result.returncode == 2 and result.stderr.endswith("FIX: ./fuse.sh --help\n")
    assert run(template, "fuse.sh", "--help").stdout.startswith("Step 6 of the guide: fuse")
