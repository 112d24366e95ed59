"""models/folders.py: what is missing is named; a folder is the old one or the new one, whole."""

from models import folders

import shutil
from pathlib import Path

import pytest
from conftest import contents, failure

OURS = ("*.jsonl",)


# ---- what is there -------------------------------------------------------------------------------
def test_what_is_missing_is_named_with_the_command_that_makes_it_and_with_what_is_there(
    capsys, tmp_path
):
    for name in "two", "family", "two.before":
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").touch()
    folders.need(tmp_path / "two/train.jsonl", "VERSION", "python build_train.py")
    file = tmp_path / "v2/train.jsonl"
    said = failure(capsys, folders.need, file, "VERSION", "python build_train.py")
    assert said.splitlines()[1:] == [
        "FIX: python build_train.py",
        "FIX: export VERSION=family",
        "FIX: export VERSION=two",
        "FIX: export VERSION=two.before",
    ]


def test_in_a_new_terminal_the_base_models_that_are_there_come_before_a_download(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").touch()
    default = tmp_path / "gemma-3-text-27b-it-4bit/config.json"
    said = failure(capsys, folders.need, default, "MODEL", "hf download …").splitlines()
    assert said[0].endswith("config.json: MODEL is the default, not one that is there")
    assert said[1:] == ["FIX: export MODEL=mine", "FIX: hf download …"]


AWAY = {  # a script, the link to a disk that is not there, what the script looks for below it
    "an adapter": ("fine_tune.sh", "models/adapters/adapter-sample_tiny-gemma-3", ""),
    "all adapters": ("fine_tune.sh", "models/adapters", "/adapter-sample_tiny-gemma-3"),
    "the base": ("fine_tune.sh", "models/base/tiny-gemma-3", ""),
    "a fused model": ("fuse.sh", "models/fused/fused-sample_tiny-gemma-3", ""),
    "the adapter to fuse": ("fuse.sh", "models/adapters/adapter-sample_tiny-gemma-3", ""),
    "all data": ("build_train.py", "data/for_train", "/sample"),
}


@pytest.mark.parametrize(("script", "link", "below"), AWAY.values(), ids=AWAY)
def test_a_disk_that_is_not_there_is_told(project, run, tmp_path, script, link, below):
    disk = tmp_path / "away/disk"
    if (project / link).exists():
        shutil.rmtree(project / link)
    (project / link).symlink_to(disk)
    result = run(project, script)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-2:] == [
        f"error: {link}{below} leads to {disk}{below}, which is not there",
        "FIX: # attach its disk",
    ]


# ---- a new one appears whole or not at all -------------------------------------------------------
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
    return folders.into_place(write(folder.parent / "partial", words), folder, OURS)


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
        assert folders.hidden(folder) == tmp_path / "disk/.moved"
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
    folders.finish_move(folder)  # as each script does that needs the folder
    assert (folder / "train.jsonl").read_text() == ("new" if renames else "old")
    assert (folder / "my notes.txt").read_text() == "hours"
