"""fine_tune.sh: the checkpoint with the best replies is kept, a bad run changes nothing."""

from models.chat_template import load_model
from models.common import chat_of, checksum
from models.completion_loss import encode, loss_of_replies

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios

import pandas as pd
import pytest
from conftest import contents, is_over, last_error, wait_until

ADAPTER = "models/adapters/adapter-sample_tiny-gemma-3"
HIDDEN = "models/adapters/.adapter-sample_tiny-gemma-3"
WORK, LOCK = f"{HIDDEN}.partial", f"{HIDDEN}.lock"
BASE, DATA = "models/base/tiny-gemma-3", "data/for_train/sample"
# The validation rows ask the same and answer otherwise: what is learned helps at first (the form),
# then harms.
TRAIN = [("ciao raga", "tutto bene bro"), ("che gioco fai stasera", "sempre lo stesso LULW")] * 4
VALID = [("ciao raga", "ZQ{7%}#WX&9+K~<J8"), ("che gioco fai stasera", "7%^Y=|Qz&3@Kx;9*HJ")]
FAST = {"ITERS": "6", "EVAL_EVERY": "3", "LEARNING_RATE": "1e-3", "RANK": "8", "SCALE": "20.0"}
OVERFIT = {"ITERS": "25", "EVAL_EVERY": "6", "LEARNING_RATE": "1.6e-2", "DROPOUT": "0.1"}
LONG = {"ITERS": "4000", "EVAL_EVERY": "4"}


@pytest.fixture
def project(project):
    (project / DATA).mkdir(parents=True)
    for name, rows in ("train", TRAIN), ("valid", VALID):
        lines = [json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows]
        (project / DATA / f"{name}.jsonl").write_text("".join(lines))
    return project


@pytest.fixture
def train(project, run):
    return lambda *args, **env: run(project, "fine_tune.sh", *args, env=FAST | env)


def put_older_adapter(project):
    """Pretend that an earlier run left an adapter; return its files."""
    (project / ADAPTER).mkdir()
    (project / ADAPTER / "adapters.safetensors").write_bytes(b"older")
    return contents(project / ADAPTER)


def losses_of(project):
    return pd.read_csv(project / ADAPTER / "losses.csv", index_col="iteration")


def loss(project, adapter=None):
    model, tokenizer = load_model(project / BASE, adapter)
    rows = [chat_of({"prompt": p, "completion": c}) for p, c in VALID]
    return loss_of_replies(model, [encode(tokenizer, chat) for chat in rows])


# ---- how it is called ----------------------------------------------------------------------------
def test_settings_go_in_front_and_help_is_the_head_of_the_script(project, run):
    result = run(project, "fine_tune.sh", "ITERS=60")
    assert result.returncode == 2 and result.stderr.splitlines() == [
        "error: fine_tune.sh takes no ITERS=60; settings go in front",
        "FIX: ./fine_tune.sh --help",
    ]
    result = run(project, "fine_tune.sh", "--help")
    assert result.returncode == 0 and result.stdout.startswith("Step 5 of the guide: train")
    assert "RESUME=1 ./fine_tune.sh" in result.stdout and "ITERS=${" not in result.stdout


def test_without_python_it_says_how_to_get_it(project, tmp_path):
    for program in "dirname", "basename":
        (tmp_path / program).symlink_to(shutil.which(program))
    command = [shutil.which("bash"), project / "fine_tune.sh"]
    result = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert result.returncode == 1 and last_error(result) == "FIX: source venv/bin/activate"


def test_a_second_run_of_the_same_adapter_is_refused(project, train):
    with (project / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = train()
    assert result.returncode == 1 and f"error: another run is writing {ADAPTER}\n" in result.stderr


# ---- a whole run ---------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_checkpoint_with_the_lowest_loss_of_the_replies_is_kept(project, train):
    put_older_adapter(project)
    result = train("--project-name", "mine", **OVERFIT)
    assert result.returncode == 0, result.stderr
    files = sorted(path.name for path in (project / ADAPTER).iterdir())
    assert files[:3] == ["adapter_config.json", "adapters.safetensors", "lora_config.yaml"]
    assert files[3:] == ["losses.csv", "settings", "training.log"]
    assert not (project / WORK).exists()
    assert (project / f"{ADAPTER}.before/adapters.safetensors").read_bytes() == b"older"

    losses = losses_of(project)
    assert losses.train_loss.dropna().index.tolist() == [10, 20, 25]
    losses = losses.val_loss.dropna()
    assert losses.index.tolist() == [0, 6, 12, 18, 24, 25]
    best = losses[1:].idxmin()
    assert best < 25 and losses[best] < losses[25] and losses[best] < losses[0]
    assert f"kept        iteration {best}: " in result.stdout
    assert losses[0] == pytest.approx(loss(project), abs=2e-4)
    assert losses[best] == pytest.approx(loss(project, project / ADAPTER), abs=2e-4)

    assert (project / ADAPTER / "adapters.safetensors").stat().st_mode & 0o077 == 0  # private
    log = (project / ADAPTER / "training.log").read_text()
    assert "save  0000024_adapters.safetensors" in log and " val " not in log

    settings = (project / ADAPTER / "settings").read_text().splitlines()
    assert "ITERS=25" in settings and "RANK=8" in settings
    assert f"TRAIN_SHA256={checksum(project / DATA / 'train.jsonl')}" in settings
    config = json.loads((project / ADAPTER / "adapter_config.json").read_text())
    assert config["project_name"] == "mine"
    schedule = {"name": "linear_schedule", "arguments": [1.6e-2, 0.0, 15], "warmup": 10}
    assert config["lr_schedule"] == schedule
    assert config["optimizer_config"]["adam"] == {"bias_correction": True}


@pytest.mark.slow
def test_the_settings_reach_the_trainer(project, train):
    settings = {"DROPOUT": "0.1", "SCALE": "5", "NUM_LAYERS": "3", "BATCH_SIZE": "4", "SEED": "7"}
    losses = []
    for mask in "0", "1":
        assert train(**settings, ITERS="1", GRAD_CHECKPOINT="1", MASK_PROMPT=mask).returncode == 0
        losses.append(losses_of(project).train_loss[1])  # before the first update
    assert losses[0] != losses[1]  # of all tokens, of the replies
    config = json.loads((project / ADAPTER / "adapter_config.json").read_text())
    lora = config["lora_parameters"]
    assert (lora["rank"], lora["scale"], lora["dropout"]) == (8, 5.0, 0.1)
    assert {"self_attn.q_proj", "mlp.down_proj", "model.embed_tokens"} < set(lora["keys"])
    names = "num_layers", "batch_size", "grad_checkpoint", "mask_prompt", "seed", "iters"
    assert [config[name] for name in names] == [3, 4, 1, 1, 7, 1]


# As ssh does, this one starts anew without the environment of who calls it, and with a terminal.
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done
shift
exec env -i HOME="$HOME" PATH=/usr/bin:/bin PYTHON -c \\
  'import pty, sys; sys.exit(pty.spawn(["bash", "-c", sys.argv[1]]) >> 8)' "$*"
"""


@pytest.mark.slow
def test_several_macs_train_one_adapter_and_stay_awake(project, train, tmp_path):
    for name, text in [
        ("ssh", SSH.replace("PYTHON", sys.executable)),
        ("uname", "#!/bin/sh\necho Darwin\n"),
        ("caffeinate", f"#!/bin/sh\necho $1 $2 >'{tmp_path}/awake'\n"),
    ]:
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    macs = [{"ssh": f"mac{n}", "ips": ["127.0.0.1"]} for n in (1, 2)]
    (project / "hosts.json").write_text(json.dumps(macs))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]  # other tests may use mlx.launch, too
    result = train(
        LAUNCH=f"mlx.launch --hostfile hosts.json --starting-port {port} --",
        MODEL="tiny-gemma-3-4bit",
        PATH=os.pathsep.join([str(tmp_path), os.path.dirname(sys.executable), os.environ["PATH"]]),
        ITERS="2",
        EVAL_EVERY="1",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    losses = pd.read_csv(project / f"{ADAPTER}-4bit/losses.csv")
    assert losses.val_loss.dropna().index.tolist() == [0, 1, 2]
    assert losses.train_loss.dropna().index.tolist() == [2]
    assert (tmp_path / "awake").read_text() == "-i -w\n"


@pytest.mark.slow
def test_an_adapter_on_another_disk_stays_there(project, train, tmp_path):
    put_older_adapter(project)
    disk = tmp_path / "disk"
    shutil.move(project / ADAPTER, disk)
    (project / ADAPTER).symlink_to(disk)
    for _ in range(2):
        assert train(ITERS="1").returncode == 0
    assert (project / ADAPTER).is_symlink() and (disk / "losses.csv").is_file()


# ---- what goes wrong while it trains -------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("iters", "error"),
    [
        ("9", "the loss became NaN or infinite by iteration "),
        ("1", "all weights became NaN or infinite\n"),  # no loss comes after it
    ],
)
def test_nan_ends_the_run_and_spares_the_older_adapter(project, train, iters, error):
    older = put_older_adapter(project)
    result = train(ITERS=iters, LEARNING_RATE="1e38", SCALE="1e10")
    assert result.returncode == 1 and f"error: {error}" in result.stderr
    assert contents(project / ADAPTER) == older


def start_and_kill(project, run, number):
    """Send a signal to fine_tune.sh, to it alone, after the first checkpoint."""
    pipe = {"start": subprocess.Popen, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    process = run(project, "fine_tune.sh", env=FAST | LONG, **pipe)
    wait_until(lambda: list((project / WORK).glob("0*")))
    process.stderr.close()  # nobody reads it, as after Ctrl-C in ./fine_tune.sh 2>&1 | tee log
    os.kill(process.pid, number)
    code = process.wait()
    wait_until(lambda: is_over(project / LOCK), seconds=10)
    return code


@pytest.mark.slow
def test_after_kill_9_a_resumed_run_does_the_rest(project, train, run):
    assert start_and_kill(project, run, signal.SIGKILL) == -signal.SIGKILL
    assert (project / WORK).stat().st_mode & 0o077 == 0  # private
    again = train(**LONG)  # would begin at the beginning
    assert "error: an interrupted run has left a checkpoint" in again.stderr
    assert "FIX: RESUME=1 VERSION=sample MODEL=tiny-gemma-3 ./fine_tune.sh  #" in again.stderr
    # Pretend that all but 8 of the batches are done.
    newest = max((project / WORK).glob("0*"))
    newest.rename(newest.with_name("0003992.safetensors"))
    (project / DATA / "train.jsonl").write_text("it goes on with its own data, and settings")
    result = train(RESUME="1", ITERS="77")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resuming    after 3992 of 4000 iterations" in result.stdout
    losses = losses_of(project)
    assert losses.index.is_monotonic_increasing and losses.index.is_unique
    assert losses.val_loss.dropna().index[-3:].tolist() == [3992, 3996, 4000]
    config = json.loads((project / ADAPTER / "adapter_config.json").read_text())
    first, last, updates = config["lr_schedule"]["arguments"]  # the rest of the line
    assert (first, last) == (pytest.approx(1e-3 * 8 / 4000), 0)
    assert updates + config["lr_schedule"]["warmup"] == 8
    assert config["resume_adapter_file"].endswith("0003992.safetensors")
    assert config["seed"] == 3992  # other batches than the first again


@pytest.mark.slow
def test_the_trainer_ends_with_its_script_and_after_nan_its_checkpoints_can_be_kept(
    project, train, run
):
    older = put_older_adapter(project)
    assert start_and_kill(project, run, signal.SIGTERM) == -signal.SIGTERM
    assert contents(project / ADAPTER) == older
    newest = max((project / WORK).glob("0*"))
    with (project / WORK / "settings").open("a") as file:  # as watch_training.py does at NaN
        print(f"ITERS={int(newest.stem)}", file=file)
    result = train(RESUME="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "training loss" not in result.stdout and "kept        iteration" in result.stdout


def test_there_is_nothing_to_resume(train):
    result = train(RESUME="1")
    assert result.returncode == 1 and "FIX: RESUME=0 VERSION=" in last_error(result)


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_says_how_to_go_on(project, run):
    older = put_older_adapter(project)
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    terminal = {"stdin": follower, "stdout": follower, "stderr": follower}
    terminal |= {"start_new_session": True}
    terminal["preexec_fn"] = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    process = run(project, "fine_tune.sh", env=FAST | LONG, start=subprocess.Popen, **terminal)
    os.close(follower)
    seen, pressed = b"", False
    while process.poll() is None or select.select([leader], [], [], 0)[0]:
        if not pressed and list((project / WORK).glob("0*")):
            pressed = os.write(leader, b"\x03") == 1
        if select.select([leader], [], [], 0.1)[0]:
            try:
                seen += os.read(leader, 65536)
            except OSError:  # the other side is closed
                break
    assert process.wait() == 130
    wait_until(lambda: is_over(project / LOCK), seconds=10)
    text = seen.decode()
    assert re.search(r"\rtraining: +\d+%\|", text) and "Traceback" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is not left hidden
    assert "./fine_tune.sh  # goes on from the last checkpoint" in text
    assert contents(project / ADAPTER) == older
