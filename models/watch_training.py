"""Run mlx_lm.lora, log what it prints, keep its checkpoints, and end it at NaN.

    python -m models.watch_training WORK ITERS_DONE ITERS mlx_lm.lora --train …

Reads   "    20    6.516 ▼    1,528      6.0k" (iteration, loss, tokens a second, tokens so far) and
        "  save  0000200_adapters.safetensors"
Writes  WORK/training.log, WORK/train_losses.csv, and WORK/0000200.safetensors for each complete
        checkpoint
Exit    0 all iterations are done, 1 they are not, 130 Ctrl-C

The trainer ends when this program or fine_tune.sh ends. To close the pipe would not be enough:
mlx.launch goes on when nobody reads its output.
"""

from models.common import checkpoints, fail, lower_rate, rerun

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

import numpy as np
from tqdm import tqdm

LOSS = re.compile(r" *\d+ +(\S+) [▼▲] +([\d,]+)")
SAVED = re.compile(r" *save +(\d+)_adapters.safetensors")
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def main(work, iters_done, iters, *command):
    work, iters_done, iters = Path(work), int(iters_done), int(iters)
    for stop in signal.SIGTERM, signal.SIGHUP:  # so that they reach `finally`
        signal.signal(stop, lambda number, _: sys.exit(128 + number))
    trainer = start(command)
    try:
        iteration, error = follow(work, lines_of(trainer.stdout.fileno()), iters_done, iters)
        code = trainer.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(trainer.pid, signal.SIGKILL)
    last = work / "run/adapters.safetensors"
    if code or iteration != iters or not last.exists():
        what = f"mlx_lm.lora ended with code {code} after {iteration} of {iters} iterations"
        fail(f"{what}: {error[:200]}", *fixes_for(work, code, error))
    keep(work, "adapters", iters)


def start(command):
    """Start the trainer in a process group of its own, so that one kill ends all of it."""
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # open and empty: mlx.launch listens to it
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"COLUMNS": "100"},  # one line an iteration
            start_new_session=True,
            close_fds=False,  # it holds the lock of fine_tune.sh as long as it lives
        )
    except FileNotFoundError:
        usual = '"mlx.launch --hostfile hosts.json --"'
        fail(f"LAUNCH: there is no {command[0]}", rerun("./fine_tune.sh", LAUNCH=usual))


def lines_of(pipe):
    """Yield the lines that come through the pipe, without colours and progress bars."""
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
            text = COLOURS.sub("", line.decode("utf-8", "replace")).rstrip("\r")
            text = text.rpartition("\r")[2]  # the last state of a progress bar
            if not re.search("[█░]", text):
                yield text


def follow(work, lines, iters_done, iters):
    """Follow a training to its end; return its last iteration, and the line with its error."""
    iteration, recent, error = iters_done, [], "it does not say why"
    with (
        open(work / "training.log", "a", buffering=1) as log,
        open(work / "train_losses.csv", "a", buffering=1) as losses,
        tqdm(None, "training", iters, initial=iteration, disable=None, leave=False) as bar,
    ):
        for line in lines:
            print(line, file=log)
            if found := LOSS.match(line):
                iteration += 1  # counted, not read: trainers that work apart print each twice
                bar.update()
                loss, speed = float(found[1]), int(found[2].replace(",", ""))
                recent.append((loss, speed))
                if not math.isfinite(loss):
                    stop_at_nan(work, iteration)
                if iteration % 10 == 0 or iteration == iters:
                    report(iteration, recent, losses, bar)
                    recent = []
                if iteration == iters_done + 1:
                    started = time.monotonic()  # the first iteration compiles, too
                if iteration == iters_done + 11:
                    each = (time.monotonic() - started) / 10
                    say_time_left(each * (iters - iteration), bar)
            elif found := SAVED.match(line):
                keep(work, f"{found[1]}_adapters", iters_done + int(found[1]))
            elif "rror" in line:
                error = line.strip()
    return iteration, error


def report(iteration, recent, losses, bar):
    """Write and show the means of the recent iterations: [(6.5, 1500), (6.1, 1700)] → 6.3, 1600."""
    loss, speed = np.mean(recent, axis=0)
    print(f"{iteration},{loss:.3f},{speed:.0f}", file=losses)
    bar.write(f"{iteration:6}  training loss {loss:.3f}  {speed:5.0f} tokens/s")


def say_time_left(seconds, bar):
    """Say how long the training will take, if it takes more than a minute."""
    if seconds > 60:
        bar.write(f"time        about {seconds / 60:.0f} minutes more, then the scoring")


def keep(work, name, iteration):
    """Move a complete checkpoint to where a resumed run looks for it.

    Of those that are only for resuming, and will not be scored, the last one stays.
    """
    with suppress(FileNotFoundError):  # LAUNCH: two trainers that work apart
        (work / f"run/{name}.safetensors").rename(work / f"{iteration:07d}.safetensors")
    for saved, file in checkpoints(work).items():
        if saved < iteration and saved % int(os.environ["EVAL_EVERY"]):
            file.unlink()


def stop_at_nan(work, iteration):
    """End a training whose loss is NaN; RESUME=1 then trains no more, and only scores."""
    what = f"the loss became NaN or infinite by iteration {iteration}"
    saved = max(checkpoints(work), default=0)
    rate = lower_rate(os.environ["LEARNING_RATE"])
    fixes = [rerun("./fine_tune.sh", RESUME=0, LEARNING_RATE=rate)]
    if saved:
        with open(work / "settings", "a") as file:
            print(f"# {what}\nITERS={saved}", file=file)
        fixes.insert(0, rerun("./fine_tune.sh", RESUME=1) + "  # keeps the best checkpoint so far")
    fail(what, *fixes)


def fixes_for(work, code, error):
    """Return the commands that may fix what ended the trainer."""
    resume = {"RESUME": 1 if checkpoints(work) else 0}
    again = rerun("./fine_tune.sh", **resume)
    if "ImpactingInteractivity" in error:  # macOS ends long work on the GPU for the display's sake
        sleepless = rerun("caffeinate -s ./fine_tune.sh", **resume)
        relaxed = rerun("./fine_tune.sh", **resume, AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1)
        return [
            f"{sleepless}  # and turn the display off",
            f"{relaxed}  # helps on many Macs, and the display stutters",
        ]
    if re.search("unable to write|no space", error, re.IGNORECASE):
        return ["df -h models/adapters  # free space", again]
    if re.search("memory|alloc|wired", error, re.IGNORECASE) or code == -signal.SIGKILL:
        less = rerun("./fine_tune.sh", RESUME=0, GRAD_CHECKPOINT=1, BATCH_SIZE=1)
        megabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 85 // 100 // 2**20
        more = f"sudo sysctl iogpu.wired_limit_mb={megabytes}  # 85 % of the memory, till a restart"
        return [less, more] if sys.platform == "darwin" else [less]
    return [f"tail -n 30 '{work}/training.log'", again]


if __name__ == "__main__":
    main(*sys.argv[1:])
