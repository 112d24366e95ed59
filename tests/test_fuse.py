"""fuse.sh: the fused model keeps what was learned, and appears whole or not at all."""

import hashlib
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import contents, cut_off, last_error

CHAT = [
    ("ciao raga come va", "tutto bene bro, tu?"),
    ("che gioco fai stasera", "sempre lo stesso LULW"),
    ("ma la sedia", "GNEEEK"),
    ("hai salvato", "no, ceccopoint perso"),
] * 4


@pytest.fixture(scope="module")
def trained(template, tmp_path_factory):
    """A project with adapters of small updates for the tiny base at 2 bits (a coarse step), at 4 bits and unquantised.

    At 4 bits the step of the tiny base's small random weights is so fine that rounding to it loses nothing.
    """
    project = Path(shutil.copytree(template, tmp_path_factory.mktemp("trained") / template.name))
    folder = project / "data/for_train/v1"
    folder.mkdir()
    for name in ["train", "valid"]:
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": prompt, "completion": reply}) + "\n" for prompt, reply in CHAT)
        )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "ITERS": "30", "EVAL_EVERY": "30", "LEARNING_RATE": "3e-4"}
    subprocess.run([sys.executable, project / "tests/tiny_base.py", "--bits", "2"], check=True, capture_output=True)
    for model in ["tiny-gemma-3-2bit", "tiny-gemma-3-4bit", "tiny-gemma-3"]:
        command = ["bash", project / "fine_tune.sh"]
        subprocess.run(command, env=env | {"MODEL": model}, check=True, capture_output=True)
    return project


@pytest.fixture
def project(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / trained.name))


@pytest.fixture
def fuse(project, run):
    def fuse(*args, model="tiny-gemma-3-2bit", **env):
        return run(project, "fuse.sh", *args, env=env | {"MODEL": model})

    return fuse


def fused(project, model="tiny-gemma-3-2bit"):
    return project / f"models/fused/fused-v1_{model}"


def put_older_model(project):
    fused(project).mkdir()
    (fused(project) / "model.safetensors").write_bytes(b"older")
    return contents(fused(project))


def kept(project, run, model="tiny-gemma-3-2bit"):
    """Return the share of the adapter's improvement in loss per completion token that the fused model keeps."""
    result = run(project, "test_on_validation.py", "--replies", "0", env={"MODEL": model})
    assert result.returncode == 0, result.stderr
    loss = json.loads((project / f"data/results/v1_{model}/metrics.json").read_text())["loss"]
    assert loss["base"] - loss["adapter"] > 0.5
    return (loss["base"] - loss["fused"]) / (loss["base"] - loss["adapter"])


def test_the_default_keeps_98_percent_where_the_bits_of_the_base_lose_a_part(project, run, fuse):
    result = fuse()
    assert result.returncode == 0, result.stderr
    base = sum(path.stat().st_size for path in (project / "models/base/tiny-gemma-3-2bit").glob("*.safetensors"))
    assert "FUSED_BITS=8" in result.stdout and f"{base / 1e6:.3g} MB at 2 bits" in result.stdout
    assert kept(project, run) >= 0.98
    result = fuse(FUSED_BITS="base")
    assert result.returncode == 0, result.stderr
    assert "warning: rounding to 2 bits forgets a part of what was learned" in result.stderr
    assert f"while it is made {2.7 * base / 1e6:.3g} MB of " in result.stdout
    assert kept(project, run) < 0.9


@pytest.mark.parametrize(
    ("model", "bits", "quantization"),
    [
        ("tiny-gemma-3-2bit", "16", None),
        ("tiny-gemma-3-2bit", "6", {"bits": 6, "group_size": 32}),
        ("tiny-gemma-3-2bit", "5", {"bits": 5, "group_size": 32}),
        ("tiny-gemma-3-4bit", "base", {"bits": 4, "group_size": 64}),
        ("tiny-gemma-3-4bit", "auto", {"bits": 8, "group_size": 32}),
        ("tiny-gemma-3", "auto", None),
        ("tiny-gemma-3", "8", {"bits": 8, "group_size": 32}),
    ],
)
def test_bits_of_the_result_and_its_origin(project, fuse, model, bits, quantization):
    result = fuse(model=model, FUSED_BITS=bits, GROUP_SIZE="32")
    assert result.returncode == 0, result.stderr
    found = json.loads((fused(project, model) / "config.json").read_text()).get("quantization")
    assert (found and {key: found[key] for key in ("bits", "group_size")}) == quantization
    origin = json.loads((fused(project, model) / "fused_from.json").read_text())
    adapter = project / f"models/adapters/adapter-v1_{model}/adapters.safetensors"
    assert origin["adapter_sha256"] == hashlib.sha256(adapter.read_bytes()).hexdigest()
    tokenizer = "tokenizer_config.json"
    assert (fused(project, model) / tokenizer).read_bytes() == (
        project / f"models/base/{model}" / tokenizer
    ).read_bytes()
    assert (origin["base"], origin["version"]) == (model, "v1") and {"mlx", "mlx_lm"} <= set(origin)
    assert [path.name for path in (project / "models/fused").iterdir() if path.is_dir()] == [fused(project, model).name]


def test_an_adapter_unquantised_at_16_bits_is_exact(project, run, fuse):
    assert fuse(FUSED_BITS="16").returncode == 0
    assert kept(project, run) == pytest.approx(1, abs=1e-3)


def test_kill_9_while_fusing_leaves_the_older_model_and_the_next_run_replaces_it(project, run, fuse):
    older = put_older_model(project)
    process = run(
        project, "fuse.sh", env={"MODEL": "tiny-gemma-3-2bit"}, start=subprocess.Popen, start_new_session=True
    )
    while not list(project.glob("models/fused/*.partial/exact/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert contents(fused(project)) == older
    assert fuse().returncode == 0
    assert contents(fused(project)).keys() >= {"config.json", "model.safetensors", "tokenizer.json", "fused_from.json"}
    assert len(list((project / "models/fused").iterdir())) == 1


def test_a_swap_that_was_cut_in_the_middle_is_finished(project, fuse):
    older = put_older_model(project)
    fused(project).rename(fused(project).with_suffix(".old"))
    (project / "models/fused/fused-v1_tiny-gemma-3-2bit.partial/model").mkdir(parents=True)
    (project / "models/fused/fused-v1_tiny-gemma-3-2bit.partial/model/new").write_text("whole")
    (project / "models/adapters/adapter-v1_tiny-gemma-3-2bit/adapters.safetensors").write_bytes(b"")
    assert fuse().returncode == 1
    assert contents(fused(project)) == {"new": b"whole"} != older


def change_adapter(project, change):
    path = str(project / "models/adapters/adapter-v1_tiny-gemma-3-2bit/adapters.safetensors")
    weights = dict(mx.load(path))
    mx.eval(weights)
    mx.save_safetensors(path, change(weights))


ADAPTER = "models/adapters/adapter-v1_tiny-gemma-3-2bit"
ERRORS = {
    "no base model": (
        lambda p: shutil.rmtree(p / "models/base"),
        {},
        "error: there is no base model in models/base/tiny-gemma-3-2bit (downloaded: none). FIX: hf download mlx-comm",
    ),
    "a base model cut off": (
        lambda p: cut_off(p / "models/base/tiny-gemma-3-2bit/model.safetensors"),
        {},
        "error: the base model in models/base/tiny-gemma-3-2bit is not complete: ",
    ),
    "no adapter": (
        lambda p: shutil.rmtree(p / ADAPTER),
        {},
        f"error: {ADAPTER}/adapters.safetensors is missing. FIX: VERSION=v1 MODEL=tiny-gemma-3-2bit ./fine_tune.sh",
    ),
    "an adapter cut off": (
        lambda p: cut_off(p / f"{ADAPTER}/adapters.safetensors"),
        {},
        "error: the adapter does not open: ",
    ),
    "an adapter with NaN": (
        lambda p: change_adapter(p, lambda weights: {name: w * float("nan") for name, w in weights.items()}),
        {},
        "error: the adapter holds NaN or infinite values, first in ",
    ),
    "the adapter of another base": (
        lambda p: shutil.copy(p / "models/adapters/adapter-v1_tiny-gemma-3/adapter_config.json", p / ADAPTER),
        {},
        "error: the adapter was trained on tiny-gemma-3, not on tiny-gemma-3-2bit. FIX: ",
    ),
    "an adapter of another size": (
        lambda p: change_adapter(p, lambda weights: {name: mx.concatenate([w, w], 1) for name, w in weights.items()}),
        {},
        "error: the adapter does not fit tiny-gemma-3-2bit: ",
    ),
    "a GGUF of Gemma": (
        None,
        {"FUSED_BITS": "16", "ARGUMENT": "--export-gguf"},
        "error: mlx-lm does not export gemma3_text models as GGUF. FIX: FUSED_BITS=16 ./fuse.sh, then ",
    ),
    "unknown bits": (None, {"FUSED_BITS": "7"}, "error: FUSED_BITS=7 is not auto, base, 16, 8, 6 or 5. FIX: "),
    "unknown group": (None, {"GROUP_SIZE": "48"}, "error: GROUP_SIZE=48 is not 32, 64 or 128. FIX: "),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_before_a_model_is_loaded(project, fuse, name):
    harm, env, expected = ERRORS[name]
    older = put_older_model(project)
    if harm:
        harm(project)
    result = fuse(*filter(None, [env.get("ARGUMENT")]), **env)
    assert result.returncode == 1
    assert last_error(result).startswith(expected) and ". FIX: " in last_error(result)
    assert "running" not in result.stdout
    assert contents(fused(project)) == older
    assert not list((project / "models/fused").glob("*.partial"))


def test_a_disk_that_fills_up_while_fusing(project, run):
    older = put_older_model(project)
    size = 200_000  # bytes in a file, fewer than the 16-bit model has: the checks see room and the writing fails
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    result = run(project, "fuse.sh", env={"MODEL": "tiny-gemma-3-2bit"}, preexec_fn=full)
    assert result.returncode == 1
    assert last_error(result).startswith("error: ") and ". FIX: " in last_error(result)
    assert contents(fused(project)) == older
    assert not list((project / "models/fused").glob("*.partial"))


@pytest.fixture
def mounted(project):
    """Mount a tmpfs over models/fused with the given options; the tests of a full and of a read-only disk need root."""
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root can mount a small or a read-only disk")
    folder = project / "models/fused"
    yield lambda options: subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    subprocess.run(["umount", folder], check=True)


def test_a_small_disk(project, fuse, mounted):
    mounted("size=100k")
    result = fuse()
    assert result.returncode == 1
    assert "of disk are needed and" in last_error(result) and ". FIX: make room" in last_error(result)


def test_a_read_only_folder(project, fuse, mounted):
    mounted("ro")
    result = fuse()
    assert result.returncode == 1
    assert last_error(result).startswith("error: models/fused cannot be written to. FIX: chmod u+w models/fused")


def test_wrong_usage(fuse):
    for arguments, expected in [
        (
            ["--no-such-flag"],
            "error: --no-such-flag is not an argument of fuse.sh, or is a setting at its top. FIX: FUSED_BITS=8 ",
        ),
        (["--save-path", "x"], "error: --save-path is not an argument of fuse.sh, or is a setting at its top. FIX: "),
        (["--upload-repo"], "error: --upload-repo names no repository. FIX: "),
        (["--export-gguf"], "error: GGUF export needs whole weights. FIX: FUSED_BITS=16 ./fuse.sh --export-gguf"),
    ]:
        result = fuse(*arguments)
        assert result.returncode == 2
        assert last_error(result).startswith(expected)


def test_help_shows_purpose_and_settings(fuse):
    result = fuse("--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Fuse the adapter") and "FUSED_BITS=${FUSED_BITS:-auto} " in result.stdout
    assert "set -euo" not in result.stdout


def test_upload_asks_first_on_a_terminal_and_no_is_no(project, run):
    leader, follower = pty.openpty()
    os.write(leader, b"n\n")
    result = run(project, "fuse.sh", "--upload-repo", "me/mine", env={"MODEL": "tiny-gemma-3-2bit"}, stdin=follower)
    os.close(leader)
    os.close(follower)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("not uploaded\n")
    assert (fused(project) / "fused_from.json").exists()
