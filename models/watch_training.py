"""Run mlx_lm.lora, show and log what it prints, keep its checkpoints, and end it at NaN.

    python -m models.watch_training WORK BATCHES_DONE ITERS mlx_lm.lora --train …

Reads   "    20    6.516 ▼    1,528      6.0k" (batch, loss, tokens a second, tokens so far) and
        "  save  0000200_adapters.safetensors"
Writes  WORK/training.log, WORK/train_losses.csv, and WORK/0000200.safetensors for each checkpoint
        that is complete
Exit    0 all batches are trained, 1 they are not, 130 Ctrl-C

The trainer, and all that a launcher has started, ends when this program or fine_tune.sh does: a
closed pipe would not do, for mlx.launch goes on when nobody reads what it prints.
"""

from models.common import checkpoints, fail, rerun

import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

LOSS = re.compile(r" *\d+ +(\S+) [▼▲] +([\d,]+)")
SAVED = re.compile(r" *save +(\d+)_adapters.safetensors")
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def main(work, batches_done, iters, *command):
    work, batches_done, iters = Path(work), int(batches_done), int(iters)
    for number in signal.SIGTERM, signal.SIGHUP:  # they too lead to `finally`
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    trainer = start(command)
    try:
        batch, error = follow(work, lines_of(trainer.stdout.fileno()), batches_done, iters)
        code = trainer.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(trainer.pid, signal.SIGKILL)
    last = work / "run/adapters.safetensors"
    if code or batch != iters or not last.exists():
        what = f"mlx_lm.lora ended with code {code} after {batch} of {iters} batches"
        fail(f"{what}: {error[:200]}", *fixes(work, code, error))
    keep(work, "adapters", iters)


def start(command):
    """Start the trainer as the leader of a process group, so that one kill ends all of it."""
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # stays open and empty: mlx.launch listens to it
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"COLUMNS": "100"},  # one line a batch
            start_new_session=True,
            close_fds=False,  # it keeps the lock of fine_tune.sh as long as it lives
        )
    except FileNotFoundError:
        usual = '"mlx.launch --hostfile hosts.json --"'
        fail(f"LAUNCH: there is no {command[0]}", rerun("./fine_tune.sh", LAUNCH=usual))


def lines_of(pipe):
    """Yield what comes through the pipe, line by line and without colours and progress bars."""
    parent, rest = os.getppid(), b""
    while True:
        is_ready, _, _ = select.select([pipe], [], [], 1)
        if os.getppid() != parent:
            sys.exit("fine_tune.sh was ended, and so is the training")
        if not is_ready:
            continue
        data = os.read(pipe, 65536)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            plain = COLOURS.sub("", line.decode("utf-8", "replace")).rstrip("\r")
            text = plain.rpartition("\r")[2]  # of a progress bar, the last state
            if not re.search("[█░]", text):
                yield text


def follow(work, lines, batches_done, iters):
    """Follow a training to its end; return its last batch, and the line that tells its error."""
    batch, recent, error, started = batches_done, [], "it does not say why", time.monotonic()
    with (
        open(work / "training.log", "a", buffering=1) as log,
        open(work / "train_losses.csv", "a", buffering=1) as losses,
        tqdm(None, "training", iters, initial=batch, disable=None, leave=False) as bar,
    ):
        for line in lines:
            print(line, file=log)
            if found := LOSS.match(line):
                batch += 1  # two trainers that form no group print every batch twice
                bar.update()
                recent.append((float(found[1]), int(found[2].replace(",", ""))))
                if not math.isfinite(recent[-1][0]):
                    stop_at_nan(work, batch)
                if batch % 10 == 0 or batch == iters:
                    report(batch, recent, losses, bar)
                    recent = []
                if batch == batches_done + 1:
                    started = time.monotonic()  # the first batch compiles, too
                if batch == batches_done + 11:
                    say_time_left((time.monotonic() - started) / 10 * (iters - batch), bar)
            elif found := SAVED.match(line):
                keep(work, f"{found[1]}_adapters", batches_done + int(found[1]))
            elif "rror" in line:
                error = line.strip()
    return batch, error


def report(batch, recent, losses, bar):
    """Write down and show the mean of the recent batches: [(6.5, 1500), (6.1, 1700)]."""
    loss = sum(loss for loss, _ in recent) / len(recent)
    speed = sum(speed for _, speed in recent) / len(recent)
    print(f"{batch},{loss:.3f},{speed:.0f}", file=losses)
    text = f"{batch:6}  training loss {loss:.3f}  {speed:5.0f} tokens/s"
    bar.write(text, file=sys.stdout)


def say_time_left(seconds, bar):
    """Say how long the training will take, if that is worth a pause."""
    if seconds > 60:
        bar.write(f"time        about {seconds / 60:.0f} minutes more, then the scoring")


def keep(work, name, batch):
    """Move a checkpoint that is complete to where a resumed run looks for it.

    Of those that are there to be resumed from, and not to be scored, only the last one stays.
    """
    with suppress(FileNotFoundError):  # two trainers that form no group
        (work / f"run/{name}.safetensors").rename(work / f"{batch:07d}.safetensors")
    for saved, file in checkpoints(work).items():
        if saved < batch and saved % int(os.environ["EVAL_EVERY"]):
            file.unlink()


def stop_at_nan(work, batch):
    """End a training whose loss is NaN; RESUME=1 then has no batches left, and scores."""
    saved = max(checkpoints(work), default=0)
    rate = float(f"{float(os.environ['LEARNING_RATE']) / 3:.1e}")
    ways = [rerun("./fine_tune.sh", RESUME=0, LEARNING_RATE=rate)]
    if saved:
        with open(work / "settings", "a") as file:
            print(f"# the loss was NaN or infinite by batch {batch}\nITERS={saved}", file=file)
        ways.insert(0, rerun("./fine_tune.sh", RESUME=1) + "  # keeps the best one before it")
    fail(f"the loss became NaN or infinite by batch {batch}", *ways)


def fixes(work, code, error):
    """Return the commands that may mend what ended the trainer."""
    resume = {"RESUME": 1 if checkpoints(work) else 0}
    again = rerun("./fine_tune.sh", **resume)
    if "ImpactingInteractivity" in error:  # macOS, for the sake of what is on the display
        sleepless = rerun("caffeinate -s ./fine_tune.sh", **resume)
        relaxed = rerun("./fine_tune.sh", **resume, AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1)
        return [
            f"{sleepless}  # and turn the display off: that is what macOS does it for",
            f"{relaxed}  # helps on many Macs, and the display stutters",
        ]
    if re.search("unable to write|no space", error, re.IGNORECASE):
        return ["df -h models/adapters  # free space, then:", again]
    if re.search("memory|alloc|wired", error, re.IGNORECASE) or code == -signal.SIGKILL:
        less = rerun("./fine_tune.sh", RESUME=0, GRAD_CHECKPOINT=1, BATCH_SIZE=1)
        return [less, *[allow_more()] * (sys.platform == "darwin")]
    return [f"tail -n 30 '{work}/training.log'", again]


def allow_more():
    """Return the command that lets a Mac's GPU have most of the memory."""
    megabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 85 // 100 // 2**20
    return f"sudo sysctl iogpu.wired_limit_mb={megabytes}  # 85 % of the memory, till it restarts"


if __name__ == "__main__":
    main(*sys.argv[1:])
