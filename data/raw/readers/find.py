"""From paths to the files that may be chats: in folders and .zip, of which nothing is unpacked."""

from models.common import fail

import shlex
import zipfile
from pathlib import Path

from .files import READABLE
from .not_read import known_by_name

MOST_BYTES = 2 << 30  # of a file, or of the chats in a .zip


def files_in(path):
    """Yield (name, content) of a file, or of all files in a folder or .zip.

    The content of a link that leads out of the folder is None: somebody may have laid it there.
    """
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if is_ours(file) or not is_readable(file.relative_to(path)):
                continue
            if not file.resolve().is_relative_to(path.resolve()):
                yield str(file), None
            elif file.is_file():
                yield from files_in(file)
    elif not path.is_file():
        folder = shlex.quote(str(path.parent)) if path.parent.is_dir() else "~/Downloads"
        look = f"ls {folder}  # is it here? a name with spaces goes in quotes"
        fail(f"{path} is not there, or no file", look)
    elif zipfile.is_zipfile(path) and not known_by_name(path.name):  # as a .docx is
        yield from files_in_zip(path)
    elif path.stat().st_size > MOST_BYTES:
        fail(f"{path} holds over {MOST_BYTES >> 30} GB", "# export single chats")
    else:
        yield str(path), path.read_bytes()


def files_in_zip(path):
    unzip = f"unzip {shlex.quote(str(path))} -d {shlex.quote(str(path.with_suffix('')))}"
    try:
        with zipfile.ZipFile(path) as archive:
            files = [file for file in archive.infolist() if is_readable(Path(file.filename))]
            if sum(file.file_size for file in files) > MOST_BYTES:
                fail(f"{path} holds over {MOST_BYTES >> 30} GB", f"{unzip}  # then name one chat")
            for file in files:
                yield f"{path}/{file.filename}", archive.read(file)
    except Exception as e:  # an archive may be damaged in any way
        if "password" in str(e):
            fail(f"{path} is locked with a password", unzip)
        fail(f"{path} cannot be unpacked: {e!r:.80}", "# copy it or export the chat again")


def is_ours(file):
    """Say whether from_export.py wrote a file."""
    return file.name.startswith("messages_") and file.with_name("from_export.py").exists()


def is_readable(path):
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in READABLE and not is_hidden
