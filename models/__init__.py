"""What every script of the guide needs before its first line; importing this package does it.

It ends the script where Python is too old or a package is missing, keeps the script off the
network, lets nobody else read what it writes, and turns Ctrl-C and a full disk into an exit code
and one line instead of a traceback.
"""

import errno
import importlib.util
import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036 (a Mac's own Python is 3.9, and it reads this far)
    sys.exit(
        "error: Python 3.11 or newer is needed, this is %d.%d\n" % sys.version_info[:2]  # noqa: UP031
        + "FIX: python3.13 -m venv --clear venv && source venv/bin/activate"
    )
for package in "babel", "jinja2", "mlx", "mlx_lm", "numpy", "pandas", "sklearn", "tqdm":
    if importlib.util.find_spec(package) is None:
        in_venv = sys.prefix != sys.base_prefix
        install = "pip install -r requirements.txt"
        sys.exit(
            f"error: the package {package} is not installed for {sys.executable}\n"
            f"FIX: {install if in_venv else 'source venv/bin/activate'}"
        )

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.umask(0o077)  # chats are private: new files are for their owner alone
if sys.platform == "linux":
    # MLX runs what it finds compiled in TMPDIR/mlx, and in /tmp anybody may have put it there.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ["TMPDIR"] = os.path.join(cache, "fine-tune")
    os.makedirs(os.environ["TMPDIR"], exist_ok=True)
    if importlib.util.find_spec("nvidia") is None:
        # On a CPU compiling takes 40 s once, and saves nothing of the tiny base's time.
        os.environ.setdefault("MLX_DISABLE_COMPILE", "1")


FULL_DISK = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def explain(kind, error, trace):
    """Say in one line what a user can mend; Python's own words for everything else."""
    if kind is KeyboardInterrupt:  # Python then exits as the shell expects: 130
        print(file=sys.stderr)
    elif kind is BrokenPipeError:  # `… | head` reads no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif isinstance(error, OSError) and error.errno in FULL_DISK:
        print(f"error: the disk is full: {error}\nFIX: df -h .  # free space", file=sys.stderr)
    elif isinstance(error, PermissionError) or getattr(error, "errno", 0) == errno.EROFS:
        where = os.path.dirname(os.path.abspath(error.filename or "."))
        print(f"error: {error}\nFIX: ls -ld '{where}'  # who may write there", file=sys.stderr)
    elif kind is MemoryError:
        print("error: the memory ran out\nFIX: # close other programs", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = explain
