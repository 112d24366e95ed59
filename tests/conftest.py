"""A project folder of its own for each test, with the real scripts and real, tiny base models."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def contents(folder):
    """Return {path: bytes} of every file below `folder`."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def last_error(result):
    """Return the last line on stderr of a finished run that must not have shown a traceback."""
    assert "Traceback" not in result.stdout + result.stderr
    return result.stderr.strip().splitlines()[-1]


def failure(capsys, function, *arguments):
    """Return what a person reads when it fails."""
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    assert end.value.code == 1
    return capsys.readouterr().err


def is_over(lock):
    """Say whether no process of a run lives any more: each holds the lock."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def cut_off(path):
    """Take the last 1,000 bytes off a file, as a download that broke off does."""
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A project folder with the scripts, the sample and both tiny bases.

    Its name holds a space, as a folder of a Mac may.
    """
    root = tmp_path_factory.mktemp("template") / "my project"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    for name in filter(None, names.stdout.split("\0")):  # not the models and chats of a developer
        if (REPOSITORY / name).exists() and not name.startswith((".github/", "tests/test_")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, root / name)
    subprocess.run(
        [sys.executable, root / "tests/tiny_base.py", "--bits", "4"],
        check=True,
        capture_output=True,
    )
    return root


@pytest.fixture
def project(template, tmp_path):
    """A copy of the template that the test may change at will."""
    return Path(shutil.copytree(template, tmp_path / template.name))


def check_fixes(said):
    """Whatever a script proposes is a command that a shell can read, with no placeholder."""
    for fix in re.findall("^FIX: (.*)$", said or "", re.MULTILINE):
        subprocess.run(["bash", "-n", "-c", fix], check=True)


@pytest.fixture
def run():
    """Return the function that runs a script of the project as a person would.

    run(project, "build_train.py", "--valid-size", "0.2", env={"MODEL": …}) → CompletedProcess;
    VERSION and MODEL are sample and tiny-gemma-3 unless `env` says otherwise, and a variable that
    is None there is removed.
    """

    def run(
        project, script, *args, env=None, cwd=None, timeout=300, start=subprocess.run, **kwargs
    ):
        variables = (
            os.environ
            | {"VERSION": "sample", "MODEL": "tiny-gemma-3", "PYTHONUTF8": "1"}
            | (env or {})
        )
        tools = [str(Path(sys.executable).parent), variables["PATH"]]  # an explicit PATH goes first
        variables["PATH"] = os.pathsep.join(tools[::-1] if "PATH" in (env or {}) else tools)
        command = [
            sys.executable if script.endswith(".py") else "bash",
            str(project / script),
            *map(str, args),
        ]
        if start is subprocess.run:
            kwargs = {"capture_output": True, "timeout": timeout, "encoding": "utf-8"} | kwargs
        environment = {k: v for k, v in variables.items() if v is not None}
        done = start(command, env=environment, cwd=cwd or project, **kwargs)
        if start is subprocess.run:
            check_fixes(done.stderr)
        return done

    return run
