"""fine_tune.sh: the best adapter is kept, a bad or killed run changes nothing, a resumed one does the rest."""

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import contents, cut_off, last_error
from mlx_lm.tuner.utils import build_schedule

ADAPTER = "models/adapters/adapter-v1_tiny-gemma-3"
# The validation rows ask the same and answer otherwise: what is learned helps at first (the form), then harms.
TRAIN = [("ciao raga come va", "tutto bene bro"), ("che gioco fai stasera", "sempre lo stesso LULW")] * 4
VALID = [("ciao raga come va", "ZQ{7%}#WX&9+K~<J8"), ("che gioco fai stasera", "7%^Y=|Qz&3@Kx;9*HJ")] * 2
FAST = {"ITERS": "6", "EVAL_EVERY": "3", "BATCH_SIZE": "2", "LEARNING_RATE": "1e-3", "RANK": "8", "SCALE": "20.0"}
OVERFIT = FAST | {"ITERS": "40", "EVAL_EVERY": "4", "LEARNING_RATE": "3e-3", "SCHEDULE": "constant"}
OVERFIT |= {"MASK_PROMPT": "1", "PATIENCE": "0"}


def write_data(project, train=TRAIN, valid=VALID):
    folder = project / "data/for_train/v1"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in [("train", train), ("valid", valid)]:
        lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) + "\n" for p, c in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def project(project):
    write_data(project)
    return project


@pytest.fixture
def train(project, run):
    return lambda *args, **env: run(project, "fine_tune.sh", *args, env=FAST | env)


def put_older_adapter(project):
    """Pretend that an earlier run left an adapter; return its files."""
    (project / ADAPTER).mkdir()
    (project / ADAPTER / "adapters.safetensors").write_bytes(b"older")
    return contents(project / ADAPTER)


def test_a_run_leaves_adapter_settings_losses_and_log(project, train):
    result = train()
    assert result.returncode == 0, result.stdout + result.stderr
    names = {path.name for path in (project / ADAPTER).iterdir()}
    assert names >= {"adapters.safetensors", "adapter_config.json", "lora_config.yaml", "losses.csv", "training.log"}
    assert f"wrote       {ADAPTER}/adapters.safetensors" in result.stdout
    losses = pd.read_csv(project / ADAPTER / "losses.csv")
    assert list(losses.columns) == ["iteration", "train_loss", "val_loss", "tokens_per_second"]
    assert losses[losses.val_loss.notna()].iteration.tolist() == [1, 3, 6]
    assert losses[losses.train_loss.notna()].iteration.tolist() == [3, 6]
    assert (losses.tokens_per_second.dropna() > 0).all()
    log = (project / ADAPTER / "training.log").read_text("utf-8")
    assert "Loading pretrained model" in log and "save  0000006_adapters.safetensors" in log
    assert "\x1b" not in log and "█" not in log
    assert not (project / (ADAPTER + ".partial")).exists()


def test_the_adapter_is_the_checkpoint_with_the_lowest_validation_loss(project, train):
    result = train(**OVERFIT, KEEP_CHECKPOINTS="2")
    assert result.returncode == 0, result.stdout + result.stderr
    losses = pd.read_csv(project / ADAPTER / "losses.csv").dropna(subset=["val_loss"])[1:]
    best = int(losses.iteration[losses.val_loss.idxmin()])
    assert losses.iteration.max() == 40 and best < 40 and losses.val_loss.min() < losses.val_loss.iloc[-1]
    files = contents(project / ADAPTER)
    assert files["adapters.safetensors"] == files[f"{best:07d}_adapters.safetensors"]
    assert files["adapters.safetensors"] != files["0000040_adapters.safetensors"]
    numbered = sorted(name for name in files if name[0] == "0")
    assert numbered == sorted({f"{n:07d}_adapters.safetensors" for n in (best, 36, 40)})
    assert f"best        iteration {best}: validation loss {losses.val_loss.min():.3f}" in result.stdout


def test_a_run_that_no_longer_improves_stops_early(project, train):
    result = train(**OVERFIT | {"PATIENCE": "2"})
    assert result.returncode == 0, result.stdout + result.stderr
    losses = pd.read_csv(project / ADAPTER / "losses.csv").dropna(subset=["val_loss"])
    assert "early stop" in result.stdout
    best = int(losses.iteration[losses.val_loss.idxmin()])
    assert losses.iteration.max() == best + 2 * 4 < 40
    assert (project / ADAPTER / f"{best:07d}_adapters.safetensors").exists()


def test_nan_ends_the_run_and_spares_the_older_adapter(project, train):
    older = put_older_adapter(project)
    # The prompt alone fills the row, so that with masking no token is left to learn: 0 / 0.
    write_data(project, train=[("ciao raga " * 40, "ok")] * 4)
    result = train(MASK_PROMPT="1", MAX_SEQ_LENGTH="32")
    assert result.returncode == 1
    assert last_error(result).startswith("error: the loss became NaN or infinite at iteration 3. FIX: ")
    assert contents(project / ADAPTER) == older


def test_an_adapter_with_nan_weights_is_refused_though_every_loss_was_finite(project, train):
    older = put_older_adapter(project)
    # The only update is the last one: no loss is measured after it.
    result = train(ITERS="1", EVAL_EVERY="1", LEARNING_RATE="1e38", SCALE="1e10", WARMUP="0", OPTIMIZER="sgd")
    assert result.returncode == 1
    assert "NaN or infinite" in last_error(result)
    assert contents(project / ADAPTER) == older


def test_more_logits_in_a_batch_than_cuda_can_count_are_warned_of(train):
    for length, smaller in ("1000000", "BATCH_SIZE=1"), ("2000000", f"BATCH_SIZE=1 MAX_SEQ_LENGTH={2**31 // 1536}"):
        result = train(ITERS="1", EVAL_EVERY="1", MAX_SEQ_LENGTH=length)  # x 2 rows x a vocabulary of 1,536
        assert result.returncode == 0 and f"warning: 2 rows of {length} tokens" in result.stderr
        assert f": {smaller} ./fine_tune.sh" in result.stderr
    assert "warning" not in train(ITERS="1", EVAL_EVERY="1").stderr


def kill_when(project, run, appears, env):
    """Start a run, kill -9 all of it as soon as a path that matches `appears` exists."""
    process = run(
        project, "fine_tune.sh", env=env, start=subprocess.Popen, start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(project.glob(appears)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_kill_9_at_the_start_spares_the_older_adapter(project, train, run):
    older = put_older_adapter(project)
    kill_when(project, run, f"{ADAPTER}.partial/run/config.yaml", FAST)
    assert contents(project / ADAPTER) == older
    result = train(RESUME="1")
    assert result.returncode == 1
    assert last_error(result).startswith("error: there is no interrupted run with a checkpoint to resume. FIX: ")
    assert contents(project / ADAPTER) == older


def test_kill_9_while_a_checkpoint_is_written_and_resume_for_the_rest(project, train, run):
    older = put_older_adapter(project)
    settings = FAST | {"ITERS": "16", "EVAL_EVERY": "4", "GRAD_ACCUMULATION": "2", "WARMUP": "2"}
    kill_when(project, run, f"{ADAPTER}.partial/run/0000008_adapters.safetensors", settings)
    assert contents(project / ADAPTER) == older
    saved = {path.name for path in (project / f"{ADAPTER}.partial").glob("0*")}
    done = 8 if "0000008_adapters.safetensors" in saved else 4  # the file may have been whole a moment before the kill

    changed = train(**settings | {"RESUME": "1", "RANK": "4"})
    assert changed.returncode == 1
    assert "< lora_parameters: {rank: 8" in changed.stdout and "> lora_parameters: {rank: 4" in changed.stdout
    assert last_error(changed).startswith("error: settings or data are not those of the interrupted run")
    assert contents(project / ADAPTER) == older

    result = train(**settings, RESUME="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"after {done} of 16 batches" in result.stdout
    losses = pd.read_csv(project / ADAPTER / "losses.csv")
    assert losses.iteration.is_monotonic_increasing
    assert losses.iteration[losses.train_loss.notna()].tolist() == [4, 8, 12, 16]
    # The rest of the schedule: the learning rate of each update is what it would have been without the kill.
    whole = build_schedule(yaml.safe_load((project / ADAPTER / "lora_config.yaml").read_text())["lr_schedule"])
    rest = build_schedule(json.loads((project / ADAPTER / "adapter_config.json").read_text())["lr_schedule"])
    updates = range(done // 2, 16 // 2)
    wanted, found = [float(whole(n)) for n in updates], [float(rest(n - done // 2)) for n in updates]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("step", [1, 2])
def test_kill_9_at_the_swap_loses_neither_adapter(project, train, tmp_path, step):
    """A `mv` that dies instead of its step-th rename of the adapter's folder stands for the kill at that moment."""
    older = put_older_adapter(project)
    (tmp_path / "bin").mkdir()
    deadly = tmp_path / "bin/mv"
    deadly.write_text(
        "#!/bin/sh\n"
        "case $2 in */adapter-v1_tiny-gemma-3 | *.old)\n"
        '  echo x >>"$0.count"\n'
        f'  if [ "$(wc -l <"$0.count")" -eq {step} ]; then kill -9 $PPID; exit; fi ;;\n'
        "esac\n"
        '/bin/mv "$@"\n'
    )
    deadly.chmod(0o755)
    path = os.environ["PATH"]
    result = train(PATH=f"{deadly.parent}{os.pathsep}{path}")
    assert result.returncode == -signal.SIGKILL
    assert contents(project / (ADAPTER if step == 1 else f"{ADAPTER}.old")) == older

    result = train(BATCH_SIZE="99")  # any later run, even one that ends at once
    assert result.returncode == 1
    adapter = contents(project / ADAPTER)
    assert adapter == older if step == 1 else len(adapter["adapters.safetensors"]) > 1000
    assert not (project / f"{ADAPTER}.old").exists()


def test_a_second_run_of_the_same_adapter_is_refused_while_the_first_is_training(project, train, run):
    first = run(project, "fine_tune.sh", env=FAST | {"ITERS": "4000"}, start=subprocess.Popen, start_new_session=True)
    try:
        while not list(project.glob(f"{ADAPTER}.partial/0*")):
            assert first.poll() is None
            time.sleep(0.1)
        os.kill(first.pid, signal.SIGKILL)  # the script alone: mlx_lm.lora goes on
        result = train()
        assert result.returncode == 1
        pid = (project / f"{ADAPTER}.partial/pid").read_text().strip()
        assert last_error(result).startswith(f"error: process {pid} is training this adapter. FIX: ")
        assert last_error(result).endswith(f"kill {pid}")
        os.kill(int(pid), signal.SIGKILL)
        assert train().returncode == 0
    finally:
        os.killpg(first.pid, signal.SIGKILL)


def test_two_ranks_train_one_adapter(project, train):
    result = train(LAUNCH="mlx.launch -n 2 --backend ring --", ITERS="3")
    assert result.returncode == 0, result.stdout + result.stderr
    losses = pd.read_csv(project / ADAPTER / "losses.csv")
    assert losses.iteration.tolist() == [1, 3, 3]
    assert "launcher: mlx.launch -n 2" in (project / ADAPTER / "lora_config.yaml").read_text()


def test_early_stop_ends_every_rank(project, train):
    result = train(**OVERFIT | {"PATIENCE": "1", "LAUNCH": "mlx.launch -n 2 --backend ring --", "ITERS": "400"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "early stop" in result.stdout
    processes = subprocess.run(["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True).stdout
    assert str(project) not in processes


def test_it_runs_from_any_folder_and_the_bigger_batch_by_accumulation(project, run, tmp_path):
    result = run(project, "fine_tune.sh", env=FAST | {"GRAD_ACCUMULATION": "3"}, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((project / ADAPTER / "adapter_config.json").read_text())["grad_accumulation_steps"] == 3


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_other_fine_tune_types(project, train, kind):
    result = train(FINE_TUNE_TYPE=kind, LEARNING_RATE="1e-4")
    assert result.returncode == 0, result.stdout + result.stderr
    weights = mx.load(str(project / ADAPTER / "adapters.safetensors"))
    parts = {name.rpartition(".")[2] for name in weights}
    assert parts == ({"lora_a", "lora_b", "m"} if kind == "dora" else {"weight"})
    # the announced size of a checkpoint, in MB, is that of the file
    said = float(result.stdout.split("epochs; ")[1].split(" MB")[0])
    assert said == pytest.approx((project / ADAPTER / "adapters.safetensors").stat().st_size / 1e6, rel=0.1, abs=0.06)


def on_terminal(run, project, env, act):
    """Run fine_tune.sh on a pseudo terminal; `act(seen, file)` gets all output so far. Return output and code."""
    leader, follower = pty.openpty()
    process = run(
        project, "fine_tune.sh", env=FAST | env, start=subprocess.Popen, start_new_session=True,
        stdin=follower, stdout=follower, stderr=follower,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(follower)
    seen = b""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # Linux: the other side is closed
            data = b""
        if not data:
            break
        seen += data
        act(seen, leader)
    return seen.decode("utf-8", "replace"), process.wait()


def test_on_a_terminal_the_progress_bar_is_live_and_the_log_is_plain(project, run):
    seen, code = on_terminal(run, project, {}, lambda seen, leader: None)
    assert code == 0, seen
    assert "█" in seen and "\x1b[" in seen and " s left" in seen
    assert seen.rstrip().endswith("./fuse.sh")
    log = (project / ADAPTER / "training.log").read_text("utf-8")
    assert "val " in log and "\x1b" not in log and "█" not in log and "░" not in log


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(project, run):
    older = put_older_adapter(project)
    pressed = []

    def press(seen, leader):
        if seen.count(b" left") > 1 and not pressed:  # the second stands after a checkpoint
            pressed.append(os.write(leader, b"\x03"))

    seen, code = on_terminal(run, project, {"ITERS": "4000"}, press)
    assert code == 130
    assert "put RESUME=1 in front of the same command" in seen and "Traceback" not in seen
    assert contents(project / ADAPTER) == older


# ---- the errors of a beginner --------------------------------------------------------------------------------------
ERRORS = {
    "no base model": (
        lambda p: shutil.rmtree(p / "models/base/tiny-gemma-3"),
        {},
        "error: there is no base model in models/base/tiny-gemma-3 (downloaded: tiny-gemma-3-4bit). "
        "FIX: hf download mlx-community/tiny-gemma-3 --local-dir models/base/tiny-gemma-3",
    ),
    "a shard cut off": (
        lambda p: cut_off(p / "models/base/tiny-gemma-3/model.safetensors"),
        {},
        "error: the base model in models/base/tiny-gemma-3 is not complete: ",
    ),
    "no tokenizer": (
        lambda p: (p / "models/base/tiny-gemma-3/tokenizer.json").unlink(),
        {},
        "error: the base model in models/base/tiny-gemma-3 is not complete: there is no tokenizer",
    ),
    "a shard missing": (
        lambda p: (p / "models/base/tiny-gemma-3/model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'
        ),
        {},
        "error: the base model in models/base/tiny-gemma-3 is not complete: ",
    ),
    "no training data": (
        lambda p: (p / "data/for_train/v1/train.jsonl").unlink(),
        {},
        "error: data/for_train/v1/train.jsonl is missing or empty. FIX: VERSION=v1 python build_train.py",
    ),
    "a broken row": (
        lambda p: (p / "data/for_train/v1/valid.jsonl").write_text(
            '{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n'
        ),
        {},
        "error: data/for_train/v1/valid.jsonl, line 2, is not a prompt and a completion. FIX: ",
    ),
    "too few rows": (
        None,
        {"BATCH_SIZE": "6"},
        "error: valid.jsonl has 4 rows, fewer than BATCH_SIZE=6. FIX: BATCH_SIZE=4 ",
    ),
    "evaluation within an update": (
        None,
        {"GRAD_ACCUMULATION": "2"},
        "error: EVAL_EVERY=3 is not a multiple of GRAD_ACCUMULATION. FIX: ",
    ),
    "too many layers": (
        None,
        {"NUM_LAYERS": "7"},
        "error: NUM_LAYERS=7, but tiny-gemma-3 has 6 layers. FIX: NUM_LAYERS=-1 ",
    ),
    "not a number": (None, {"ITERS": "many"}, "error: ITERS=many is not a whole number above 0. FIX: "),
    "not a rate": (
        None,
        {"LEARNING_RATE": "0,1"},
        "error: LEARNING_RATE=0,1 is not a number, with a decimal point. FIX: LEARNING_RATE=2e-4 ",
    ),
    "unknown schedule": (None, {"SCHEDULE": "cosine"}, "error: SCHEDULE=cosine is not linear or constant. FIX: "),
    "a repository as MODEL": (
        None,
        {"MODEL": "mlx-community/gemma-3-1b-it-4bit"},
        "error: MODEL=mlx-community/gemma-3-1b-it-4bit is not the name of a folder in models/base. FIX: "
        + "MODEL=gemma-3-1b-it-4bit ./fine_tune.sh, after hf download mlx-community/gemma-3-1b-it-4bit",
    ),
    "full on a quantised base": (
        None,
        {"MODEL": "tiny-gemma-3-4bit", "FINE_TUNE_TYPE": "full"},
        "error: tiny-gemma-3-4bit is quantised, and FINE_TUNE_TYPE=full trains whole weights. FIX: ",
    ),
    "a path as MODEL": (
        None,
        {"MODEL": "models/base/tiny-gemma-3"},
        "error: MODEL=models/base/tiny-gemma-3 is a path. FIX: MODEL=tiny-gemma-3 ./fine_tune.sh",
    ),
    "a path that ends with /": (
        None,
        {"MODEL": "./models/base/tiny-gemma-3/"},
        "error: MODEL=./models/base/tiny-gemma-3/ is a path. FIX: MODEL=tiny-gemma-3 ./fine_tune.sh",
    ),
    "a path as VERSION": (
        None,
        {"VERSION": "../v1"},
        "error: VERSION=../v1 is not a name of letters, digits, '.', '_' and '-'. FIX: ",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_before_a_model_is_loaded(project, train, name):
    harm, env, expected = ERRORS[name]
    older = put_older_adapter(project)
    if harm:
        harm(project)
    result = train(**env)
    assert result.returncode == 1
    assert last_error(result).startswith(expected) and ". FIX: " in last_error(result)
    assert "Loading" not in result.stdout
    assert contents(project / ADAPTER) == older


def test_without_the_virtual_environment(project, train, tmp_path):
    """A PATH with the system's tools and a python3 that says its version, but without mlx_lm.lora."""
    for name in ["dirname", "cat", "sed", "bash"]:
        (tmp_path / name).symlink_to(shutil.which(name))
    (tmp_path / "python3").symlink_to(sys.executable)
    command = [str(tmp_path / "bash"), str(project / "fine_tune.sh")]
    env = {"PATH": str(tmp_path), "MODEL": "tiny-gemma-3"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert last_error(result).startswith(
        "error: mlx_lm.lora was not found, so the virtual environment is not active. FIX: source venv"
    )
    (tmp_path / "python3").unlink()
    (tmp_path / "python3").write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.6\nexit 1\n')
    (tmp_path / "python3").chmod(0o755)
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert last_error(result).startswith("error: python3 is Python 3.9.6, and 3.11 or newer is needed. FIX: ")


def test_wrong_usage(train):
    for argument, expected in [
        ("--iters", "error: --iters is not an argument of fine_tune.sh, or is a setting at its top. FIX: ITERS=60 "),
        ("--iter", "error: --iter is not an argument of fine_tune.sh, or is a setting at its top. FIX: ITERS=60 "),
        ("--no-such-flag", "error: --no-such-flag is not an argument of fine_tune.sh, "),
        ("ITERS=7", "error: ITERS=7 stands behind the command. FIX: ITERS=7 ./fine_tune.sh"),
    ]:
        result = train(argument)
        assert result.returncode == 2
        assert last_error(result).startswith(expected)


def test_arguments_go_through_to_mlx_lm(project, train):
    result = train("--project-name", "mine")
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((project / ADAPTER / "adapter_config.json").read_text())["project_name"] == "mine"
    assert "arguments: --project-name mine" in (project / ADAPTER / "lora_config.yaml").read_text()


def test_help_shows_purpose_and_settings(train):
    result = train("--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Train a LoRA adapter")
    assert "LEARNING_RATE=${LEARNING_RATE:-2e-4} " in result.stdout and "RESUME=${RESUME:-0} " in result.stdout
    assert "set -euo" not in result.stdout
