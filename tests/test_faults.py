"""Kills, signals, two runs at once and full disks, at many moments, over all scripts that write.

    pytest -m faults tests/test_faults.py      # eight moments of each kind and script: many minutes
    CASES=30 pytest -m faults                  # so many

After each case the output is the one of before, byte for byte, or a whole new one; an error is told
in words; nothing is left running; and the next run works.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import contents

pytestmark = [pytest.mark.slow, pytest.mark.faults]
CASES = int(os.environ.get("CASES", "8"))
MOMENTS = [(number + 0.5) / CASES for number in range(CASES)]  # shares of the time that a run takes
RUN = "sample_tiny-gemma-3"


@dataclass
class Stage:
    """A script, what it writes, and settings that make it quick."""

    command: list
    output: str
    settings: dict = field(default_factory=dict)
    seconds: float = 0.0  # of a whole run: measured by finished()


STAGES = {
    "export": Stage(
        ["data/raw/from_export.py", "chat.txt", "--version", "mine", "--replace"],
        "data/raw/messages_mine.json",
    ),
    "build": Stage(["build_train.py", "--valid-rows", "6"], "data/for_train/sample"),
    "train": Stage(
        ["fine_tune.sh"],
        f"models/adapters/adapter-{RUN}",
        {"ITERS": "4", "EVAL_EVERY": "2", "RANK": "4", "RESUME": "0"},
    ),
    "fuse": Stage(["fuse.sh"], f"models/fused/fused-{RUN}"),
    "test": Stage(
        ["test_on_validation.py", "--replies", "2", "--max-tokens", "4"], f"data/results/{RUN}"
    ),
}
EACH = pytest.mark.parametrize("name", STAGES)


def start(project, name, **options):
    """Start a stage in a process group of its own."""
    stage = STAGES[name]
    program = sys.executable if stage.command[0].endswith(".py") else "bash"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    names = {"VERSION": "sample", "MODEL": "tiny-gemma-3", "PATH": path}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [program, *stage.command],
        cwd=project,
        env=os.environ | names | stage.settings,
        start_new_session=True,
        text=True,
        **pipes | options,
    )


# A Ctrl-C while Python starts, before models/__init__.py could take care of it.
AT_THE_START = re.compile(
    r'Traceback .*\n(?:  File "(?:<frozen|.*/models/__init__\.py).*\n(?:    .*\n)*)*'
    r"KeyboardInterrupt\n"
)


def finish(process):
    """Return (exit code, what it said) of a stage; it must have shown no traceback."""
    said = AT_THE_START.sub("", "".join(process.communicate()))
    assert "Traceback" not in said and "Exception ignored" not in said, said[-2000:]
    return process.returncode, said


@pytest.fixture(scope="session")
def finished(template, tmp_path_factory):
    """A project in which all stages have run."""
    project = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(template, project)
    times = [f"{1 + n // 60:02}/11/26, 10:{n % 60:02}:00" for n in range(300)]
    lines = [f"[{time}] {'AB'[n % 2]}: word {n}\n" for n, time in enumerate(times)]
    (project / "chat.txt").write_text("".join(lines))
    for name, stage in STAGES.items():
        began = time.monotonic()
        code, said = finish(start(project, name))
        assert code == 0, said
        stage.seconds = time.monotonic() - began
    return project


@pytest.fixture
def project(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))


def output_of(project, name):
    """Return {path: bytes} of what a stage has written."""
    output = project / STAGES[name].output
    return contents(output) if output.is_dir() else {"": output.read_bytes()}


def check_whole(project, finished, name, before):
    """The output is the one of before, or has all its files, and each can be read."""
    now = output_of(project, name)
    if now == before:
        return
    assert now.keys() == output_of(finished, name).keys()
    for path, data in now.items():
        if path.endswith(".jsonl"):
            [json.loads(line) for line in data.decode().splitlines()]
        elif path.endswith(".json"):
            json.loads(data)
        elif path.endswith(".safetensors"):
            mx.eval(mx.load(str(project / STAGES[name].output / path)))


def at_work(project):
    """Return the processes that have the project as their current folder (where /proc tells)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")) == project:
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ")[:200])
        except OSError:
            pass  # it has ended
    return found


def check_quiet(project):
    """What a script has started ends with it, within seconds."""
    deadline = time.monotonic() + 60
    while at_work(project) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert at_work(project) == []


def check_next_run(project, name):
    """The same command works again."""
    code, said = finish(start(project, name))
    assert code == 0, said


@EACH
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_leaves_the_output_of_before_and_the_next_run_works(project, finished, name, moment):
    before = output_of(project, name)
    process = start(project, name)
    time.sleep(moment * STAGES[name].seconds)
    process.kill()  # the script alone: what it has started must notice by itself
    process.communicate()
    check_quiet(project)
    if not (project / STAGES[name].output).exists():  # killed between the last two renames
        check_next_run(project, name)
    check_whole(project, finished, name, before)
    check_next_run(project, name)


@EACH
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", MOMENTS[1::3])
def test_a_signal_ends_a_stage_and_all_that_it_started(
    project, finished, name, signal_number, moment
):
    before = output_of(project, name)
    process = start(project, name)
    time.sleep(moment * STAGES[name].seconds)
    os.killpg(process.pid, signal_number)  # a terminal's Ctrl-C reaches all of them
    code, said = finish(process)
    assert code in (0, 130, -signal_number, 128 + signal_number), said
    check_quiet(project)
    check_whole(project, finished, name, before)
    check_next_run(project, name)


@EACH
@pytest.mark.parametrize("delay", MOMENTS[::2])
def test_of_two_runs_at_once_one_is_refused_or_both_are_whole(project, finished, name, delay):
    before = output_of(project, name)
    first = start(project, name)
    time.sleep(delay * STAGES[name].seconds)
    results = [finish(start(project, name)), finish(first)]
    assert all(code == 0 or "\nFIX: " in said for code, said in results), results
    assert any(code == 0 for code, _ in results), results
    check_whole(project, finished, name, before)


@EACH
@pytest.mark.parametrize("size", [0, 100, 10_000, 200_000])
def test_a_disk_that_fills_up_is_told_and_spoils_nothing(project, finished, name, size):
    before = output_of(project, name)

    def limit_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    code, said = finish(start(project, name, preexec_fn=limit_files))
    assert code == 0 or (code == 1 and "\nFIX: " in said), said
    check_whole(project, finished, name, before)
    check_next_run(project, name)
