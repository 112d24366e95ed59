"""The folders that one stage hands on to the next: where they are, and that each is whole.

    python -m models.folders models/adapters/adapter-v1_gemma

prints what the names of work on that folder begin with: models/adapters/.adapter-v1_gemma. A folder
may be a link to another disk: then the work is done there.
"""

from models.common import DEFAULTS, NAME, check_names, fail, from_environment

import contextlib
import fcntl
import filecmp
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace


# ---- what is there -------------------------------------------------------------------------------
def places(version, model):
    """Return the folders of a VERSION and a MODEL, and how commands for them begin."""
    name = f"{version}_{model}"
    return SimpleNamespace(
        data=Path("data/for_train", version),
        base=Path("models/base", model),
        adapter=Path(f"models/adapters/adapter-{name}"),
        fused=Path(f"models/fused/fused-{name}"),
        results=Path("data/results", name),
        run=f"VERSION={version} MODEL={model}",
        build=f"VERSION={version} python build_train.py",
    )


def place_of(folder):
    """Return where a folder really is: a link may lead to another disk, which must be there."""
    place, here = Path(os.path.realpath(folder)), Path.cwd()
    if place != here / folder and not place.parent.is_dir():
        fail(f"{folder} leads to {place}, which is not there", "# attach its disk")
    return place.relative_to(here) if place.is_relative_to(here) else place


def need(file, variable, command):
    """Refuse a folder without its file; the fixes are the command, and the folders that have it.

    need(Path("models/base/gemma/config.json"), "MODEL", "hf download …")
    """
    finish_move(file.parent)
    if file.is_file():
        return
    others = sorted(path.parent.name for path in file.parent.parent.glob(f"*/{file.name}"))
    exports = [f"export {variable}={name}" for name in others if re.fullmatch(NAME, name)]
    if exports and variable == "MODEL" and file.parent.name == DEFAULTS["MODEL"]:
        # A new terminal, in which nothing is exported: the command would download 15 GB.
        fail(f"there is no {file}: MODEL is the default, not one that is there", *exports, command)
    fail(f"there is no {file}", command, *exports)


# ---- a new one appears whole or not at all -------------------------------------------------------
def before(folder):
    """Return where the previous folder is kept: models/fused/fused-v1_gemma.before."""
    place = place_of(folder)
    return place.with_name(f"{place.name}.before")


def hidden(folder):
    """Return how names of work begin: models/fused/.fused-v1_gemma; no VERSION has that dot."""
    place = place_of(folder)
    return place.with_name(f".{place.name}")


@contextlib.contextmanager
def work_folder(output):
    """Give an empty folder beside an output, for a run of seconds; a second run waits its turn.

    What a killed run has left in it goes with the next run.
    """
    work = Path(f"{hidden(output)}.work")
    work.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{hidden(output)}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # it ends with the process, however that ends
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def into_place(new, folder, ours):
    """Put a finished folder into its place; return where the previous one is now, None if nowhere.

    `ours` are the files that scripts write there ("*.jsonl", …): all others are a person's own.
    Killed at any moment, this leaves the previous folder or the new one; see finish_move().
    """
    folder = place_of(folder)
    finish_move(folder)  # of a run that was killed
    replaces = folder.exists()
    if replaces and is_same(new, folder):
        shutil.rmtree(new)
        return None
    if replaces:
        carry_over(folder, new, ours)
    new.rename(f"{hidden(folder)}.new")
    finish_move(folder)
    return before(folder) if replaces else None


def is_same(new, old):
    """Say whether two folders hold the same files."""
    names = sorted(path.name for path in new.iterdir())
    if names != sorted(path.name for path in old.iterdir()):
        return False
    return not any(filecmp.cmpfiles(new, old, names, shallow=False)[1:])


def carry_over(old, new, ours):
    """Put into the new folder what a person has put into the old one."""
    written = {path.name for pattern in ours for path in old.glob(pattern)}
    for path in old.iterdir():
        if path.name in written or (new / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, copy_function=link, symlinks=True)
        else:
            link(path, new / path.name)


def link(source, target):
    """Link a file, or copy it where the disk knows no links, as exFAT."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def finish_move(folder):
    """Do the last two renames, also those of a run that was killed between them.

    v1 → v1.before, .v1.new → v1
    """
    folder = place_of(folder)
    new = Path(f"{hidden(folder)}.new")
    if not new.exists():
        return
    with contextlib.suppress(FileNotFoundError):  # another script has just done it
        if folder.exists():
            shutil.rmtree(before(folder), ignore_errors=True)
            folder.rename(before(folder))
        new.rename(folder)


if __name__ == "__main__":
    check_names(from_environment("VERSION"), from_environment("MODEL"))
    print(hidden(sys.argv[1]))
