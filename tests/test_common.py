"""models/common.py and models/__init__.py: how a script fails; outputs that are always whole."""

from models import common

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, contents

OURS = ("*.jsonl",)


def failure(capsys, function, *arguments):
    """Return what a person reads when it fails."""
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    assert end.value.code == 1
    return capsys.readouterr().err


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


def test_what_is_missing_is_named_with_the_command_that_makes_it_and_with_what_is_there(
    capsys, tmp_path
):
    for name in "v1", "family", "v1.before":
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").touch()
    common.need(tmp_path / "v1/train.jsonl", "VERSION", "python build_train.py")
    file = tmp_path / "v2/train.jsonl"
    said = failure(capsys, common.need, file, "VERSION", "python build_train.py")
    assert said.splitlines()[1:] == [
        "FIX: python build_train.py",
        "FIX: export VERSION=family",
        "FIX: export VERSION=v1",
        "FIX: export VERSION=v1.before",
    ]


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


# ---- outputs appear whole or not at all ----------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    """An output that is there, with a file of a person's own in it."""
    folder = tmp_path / "v1"
    write(folder, "old")
    (folder / "my notes.txt").write_text("hours")
    (folder / "plots").mkdir()
    (folder / "plots/loss.png").write_text("picture")
    return folder


def write(folder, words):
    folder.mkdir()
    (folder / "train.jsonl").write_text(words)
    return folder


def put(folder, words):
    """Make a new output beside the folder and put it into place."""
    return common.into_place(write(common.beside(folder, "partial"), words), folder, OURS)


def test_the_output_of_before_is_kept_beside_the_new_one_and_ones_own_files_stay(folder):
    before = put(folder, "new")
    assert before.resolve() == folder.with_name("v1.before")
    assert (before / "train.jsonl").read_text() == "old"
    own = {"my notes.txt": b"hours", "plots/loss.png": b"picture"}
    assert contents(folder) == {"train.jsonl": b"new"} | own
    put(folder, "newer")
    assert (before / "train.jsonl").read_text() == "new"
    assert contents(folder) == {"train.jsonl": b"newer"} | own
    assert sorted(path.name for path in folder.parent.iterdir()) == ["v1", "v1.before"]


def test_the_first_output_replaces_nothing(tmp_path):
    assert put(tmp_path / "v1", "new") is None
    assert [path.name for path in tmp_path.iterdir()] == ["v1"]


def test_the_same_output_again_leaves_what_was_kept(tmp_path):
    put(tmp_path / "v1", "edited by hand")
    put(tmp_path / "v1", "built anew")
    assert put(tmp_path / "v1", "built anew") is None
    assert (tmp_path / "v1.before/train.jsonl").read_text() == "edited by hand"


def test_an_output_that_is_a_link_is_replaced_where_it_leads(tmp_path, folder):
    (tmp_path / "disk").mkdir()
    folder.rename(tmp_path / "disk/moved")
    folder.symlink_to(tmp_path / "disk/moved")
    for words in "new", "newer":
        assert common.beside(folder, "partial").parent == tmp_path / "disk"
        put(folder, words)
        assert folder.is_symlink() and (folder / "train.jsonl").read_text() == words


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_between_two_renames_it_is_the_old_or_the_new_one(folder, monkeypatch, renames):
    rename, done = Path.rename, []

    def killed(self, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        put(folder, "new")
    monkeypatch.undo()
    common.finish_move(folder)  # as each script does that needs the folder
    assert (folder / "train.jsonl").read_text() == ("new" if renames else "old")
    assert (folder / "my notes.txt").read_text() == "hours"


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
