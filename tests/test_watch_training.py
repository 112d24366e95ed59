"""What mlx_lm.lora prints is followed: losses, checkpoints, NaN, and why it ended."""

from models import watch_training

import os
import subprocess
import time

import pytest


def loss(batch, loss, speed="1,528"):
    return f"  {batch:4}    {loss} ▼    {speed}      6.0k"


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setenv("VERSION", "v1")
    monkeypatch.setenv("MODEL", "gemma")
    monkeypatch.setenv("LEARNING_RATE", "3e-4")
    monkeypatch.setenv("EVAL_EVERY", "10")
    (tmp_path / "run").mkdir()
    return tmp_path


def names(work):
    return sorted(file.name for file in work.glob("0*"))


# ---- following -----------------------------------------------------------------------------------
def test_losses_are_means_of_ten_batches_and_checkpoints_count_from_the_start(work):
    (work / "run/0000010_adapters.safetensors").touch()
    lines = [loss(n, 3.0 if n < 6 else 4.0) for n in range(1, 11)]
    lines += ["  save  0000010_adapters.safetensors", loss(11, 3.5, "900"), "Saved final weights"]
    assert watch_training.follow(work, lines, 200, 211) == (211, "it does not say why")
    assert (work / "train_losses.csv").read_text() == "210,3.500,1528\n211,3.500,900\n"
    assert names(work) == ["0000210.safetensors"]
    assert (work / "training.log").read_text().splitlines() == lines


def test_of_the_checkpoints_between_two_that_are_scored_only_the_last_stays(work):
    for batch in 5, 10, 15, 20, 25, 30, 33:
        (work / "run/new.safetensors").touch()
        watch_training.keep(work, "new", batch)
        assert max(names(work)) == f"{batch:07d}.safetensors"
    assert [int(name[:7]) for name in names(work)] == [10, 20, 30, 33]


def test_an_error_outlasts_what_is_said_after_it(work):
    lines = ["Traceback:", "ValueError: the batch is too large", "", "goodbye"]
    assert watch_training.follow(work, lines, 0, 9) == (0, "ValueError: the batch is too large")


def test_the_time_left_is_said_once_it_can_be_told(work, capsys, monkeypatch):
    clock = iter([100, 700, 100, 101])  # after one batch, after ten more
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    for _ in range(2):
        watch_training.follow(work, [loss(n, 3.0) for n in range(1, 12)], 0, iters=51)
    said = capsys.readouterr().out
    assert said.count("time  ") == 1  # four seconds are not worth a line
    assert "time        about 40 minutes more, then the scoring\n" in said


def test_nan_ends_the_run_and_keeps_the_checkpoints_of_before(work, capsys):
    (work / "run/0000001_adapters.safetensors").touch()
    lines = [loss(1, 3.5), "  save  0000001_adapters.safetensors", loss(2, "nan"), loss(3, "nan")]
    with pytest.raises(SystemExit):
        watch_training.follow(work, lines, 0, 30)
    assert capsys.readouterr().err.splitlines()[-3:] == [
        "error: the loss became NaN or infinite by iteration 2",
        "FIX: VERSION=v1 MODEL=gemma RESUME=1 ./fine_tune.sh  # keeps the best checkpoint so far",
        "FIX: VERSION=v1 MODEL=gemma RESUME=0 LEARNING_RATE=0.0001 ./fine_tune.sh",
    ]
    assert names(work) == ["0000001.safetensors"]
    assert (work / "settings").read_text().endswith("\nITERS=1\n")  # so RESUME=1 only scores


def test_nan_without_a_checkpoint_leaves_only_to_start_anew(work, capsys):
    with pytest.raises(SystemExit):
        watch_training.follow(work, [loss(1, "inf")], 0, 30)
    assert "RESUME=1" not in capsys.readouterr().err


# ---- the trainer ---------------------------------------------------------------------------------
def run(work, *command, iters=2):
    """Let this command be the trainer; return the exit code."""
    try:
        watch_training.main(work, 0, iters, *command)
    except SystemExit as end:
        return end.code
    return 0


def say(*lines):
    """Return a command that prints these lines."""
    return ["printf", "%s\n", *lines]


def test_the_last_weights_are_a_checkpoint_too(work):
    (work / "run/adapters.safetensors").touch()
    assert run(work, *say("\x1b[31mtrain ███░ 50%\r" + loss(1, 3.5), "train ██", loss(2, 3.4))) == 0
    assert names(work) == ["0000002.safetensors"]
    assert "█" not in (work / "training.log").read_text()


DISK = "df -h models/adapters"
LESS = "RESUME=0 GRAD_CHECKPOINT=1 BATCH_SIZE=1 ./fine_tune.sh"
ENDS = {  # the trainer, how it ended, what mends it
    "fails": (["sh", "-c", "exit 7"], "code 7 after 0 of 2 iterations: it does not say why", "log"),
    "killed": (["sh", "-c", "kill -9 $$"], "code -9 after 0 of 2 iterations", LESS),
    "stops early": (say(loss(1, 3)), "code 0 after 1 of 2 iterations", "training.log"),
    "no group": (say(*[loss(1, 3), loss(1, 3), loss(2, 3), loss(2, 3)]), "after 4 of 2", "log"),
    "memory": (say("RuntimeError: [METAL] Insufficient Memory"), "Insufficient Memory", LESS),
    "disk": (say("RuntimeError: [write] Unable to write 9 bytes"), "Unable to write", DISK),
    "no launcher": (["mlx.lunch"], "LAUNCH: there is no mlx.lunch", 'LAUNCH="mlx.launch'),
}  # fmt: skip


def test_a_mac_that_stops_long_work_for_its_display_has_two_ways_out(work):
    (work / "0000010.safetensors").touch()
    error = "libc++abi: [METAL] (0e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
    asleep, relaxed = watch_training.fixes_for(work, -6, error)
    assert "RESUME=1 caffeinate -s ./fine_tune.sh  # and turn the display off" in asleep
    assert "RESUME=1 AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 ./fine_tune.sh" in relaxed


def test_a_mac_can_be_allowed_more_memory(work, monkeypatch):
    monkeypatch.setattr(watch_training.sys, "platform", "darwin")
    less, more = watch_training.fixes_for(work, -6, "[METAL] Insufficient Memory (…OutOfMemory)")
    assert less.endswith(LESS) and more.startswith("sudo sysctl iogpu.wired_limit_mb=")


@pytest.mark.parametrize(("command", "error", "fix"), ENDS.values(), ids=ENDS)
def test_a_trainer_that_did_not_train_is_told_by_its_cause(work, capsys, command, error, fix):
    (work / "run/adapters.safetensors").touch()  # mlx-lm writes it with each checkpoint
    assert run(work, *command) == 1
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ") and error in first
    assert second.startswith("FIX: ") and fix in second
    assert names(work) == []


def test_what_a_launcher_has_started_ends_with_the_watcher(work):
    """As mlx.launch does, this one starts a process that neither reads nor prints."""
    started = f"sleep 600 & echo $! >'{work}/pid'; printf '%s\\n' '{loss(1, 'nan')}'; wait"
    assert run(work, "sh", "-c", started) == 1
    pid = int((work / "pid").read_text())
    for _ in range(100):
        if not is_running(pid):
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def test_the_trainer_holds_what_is_open_for_it(work):
    """As the lock of fine_tune.sh, which nobody else may have as long as the trainer lives."""
    with open(work / "lock", "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        watch_training.start(["sh", "-c", f"echo held >/dev/fd/{lock.fileno()}"]).wait()
    assert (work / "lock").read_text() == "held\n"


def is_running(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip() not in ("", "Z", "Zs")
