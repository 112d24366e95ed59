"""models/common.py and models/__init__.py: how a script fails, names, rows."""

from models import common

import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY, failure


# ---- how a script fails --------------------------------------------------------------------------
def test_an_error_is_one_line_and_every_fix_is_a_line_that_can_be_pasted(capsys):
    said = failure(capsys, common.fail, "there is\nno data", "python build_train.py", "ls data")
    assert said == "error: there is no data\nFIX: python build_train.py\nFIX: ls data\n"


def test_what_a_terminal_would_obey_is_only_shown(capsys):
    said = failure(capsys, common.fail, "a file named \x1b[2Jhi\u202e 👩\u200d👧")
    assert said == "error: a file named \\x1b[2Jhi\\u202e 👩\u200d👧\n"


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-v", "a/b", "a b", "è", "v1\n", "a'b"])
def test_a_version_or_model_is_one_plain_folder(capsys, name):
    assert "FIX: export VERSION=v1" in failure(capsys, common.check_names, name, "gemma")
    assert "FIX: export MODEL=gemma-3-text-27b-it-4bit" in failure(
        capsys, common.check_names, "v1", name
    )


def test_rows_are_read_as_chats_and_a_line_that_is_none_is_named(capsys, tmp_path):
    file = tmp_path / "train.jsonl"
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    pair = {"prompt": "hi", "completion": "ho"}
    file.write_text("\n".join(map(json.dumps, [pair, {"messages": talk}])))
    assert common.read_rows(file, "python build_train.py") == [talk, talk]
    for bad in (
        "[1]",
        '{"prompt": "hi"}',
        '{"prompt": 1, "completion": "a"}',
        '{"messages": [1]}',
        "{",
    ):
        file.write_text('{"prompt": "hi", "completion": "ho"}\n' + bad)
        said = failure(capsys, common.read_rows, file, "python build_train.py")
        assert "line 2" in said and "FIX: python build_train.py" in said


# ---- models/__init__.py --------------------------------------------------------------------------
def python(code, *options, **variables):
    """Run a line of code as a script of the project would."""
    command = [sys.executable, *options, "-c", f"import models, os, sys; {code}"]
    environment = os.environ | variables
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_ctrl_c_ends_without_a_traceback_and_with_the_code_of_a_signal():
    done = python("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (-2, "\n")  # 130 for a shell


def test_a_full_disk_and_a_forbidden_file_are_one_line_with_their_fix():
    done = python("open('/dev/full', 'w').write('x' * 99999)")
    assert done.returncode == 1 and "error: the disk is full" in done.stderr
    assert "FIX: df -h" in done.stderr and "Traceback" not in done.stderr
    done = python("raise PermissionError(13, 'Permission denied', '/etc/it')")
    assert "error: [Errno 13]" in done.stderr and "FIX: ls -ld '/etc'" in done.stderr


def test_a_fault_of_ours_keeps_its_traceback():
    assert "ZeroDivisionError" in python("1 / 0").stderr


def test_new_files_are_for_their_owner_alone_and_the_hub_is_not_asked():
    done = python("print(oct(os.umask(0)), os.environ['HF_HUB_OFFLINE'])", HF_HUB_OFFLINE="0")
    assert done.stdout == "0o77 1\n"


def test_without_the_packages_it_says_how_to_get_them():
    done = python("", "-S")  # without site-packages
    assert done.returncode == 1
    assert done.stderr.startswith("error: the package babel is not installed for ")
    assert "\nFIX: " in done.stderr and "Traceback" not in done.stderr


def test_an_old_python_is_told_before_anything_else():
    code = (REPOSITORY / "models/__init__.py").read_text()
    done = python(f"sys.version_info = (3, 9, 6); exec({code!r})")
    assert done.stderr == (
        "error: Python 3.11 or newer is needed, this is 3.9\n"
        "FIX: python3.13 -m venv --clear venv && source venv/bin/activate\n"
    )
