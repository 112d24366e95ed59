"""What build_train.py costs beside a plain script, and that its time grows with the text alone.

    python tests/benchmarks/build_train.py                               # minutes, 4 GB of memory
    python tests/benchmarks/build_train.py --base models/base/tiny-gemma-3
    python tests/benchmarks/build_train.py --only hostile
    python tests/benchmarks/build_train.py --only plain --entries 5000   # seconds

prints seconds, seconds of processor time and peak memory, each with its ratio to the plain script,
or to a text of a quarter of the length; it writes to a temporary folder alone:

    plain script                    1.3 s    1.3 p    167 MB
    build_train.py, windows         0.3 s    0.3 p     39 MB   x 0.22, 0.21, 0.23
    a burst of one author                   50,000   0.65 p     200,000   2.65 p   x 4.1
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent

# What a person would write: load, clean, filter by one rule, split at random, write.
PLAIN = r"""
import json, re, sys, unicodedata
from sklearn.model_selection import train_test_split

def clean(text):
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\ufeff]", " ", text)
    return re.sub(r"\s+", " ", text).strip()

with open(sys.argv[1], encoding="utf-8") as file:
    entries = json.load(file)
rows = []
for entry in entries:
    context, reply = [clean(m) for m in entry["previous_messages"]], clean(entry["message"])
    if reply and not re.search(r"https?://", reply):
        prompt = "\n".join(context) + "\n\nWrite the next message of this chat."
        rows.append({"prompt": prompt, "completion": reply})
parts = train_test_split(rows, test_size=0.1, random_state=0)
for name, part in zip(["train", "valid"], parts):
    with open(f"{sys.argv[2]}/{name}.jsonl", "w", encoding="utf-8") as file:
        for row in part:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
"""

TIMER = r"""
import resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss, done.returncode)
print(done.stdout)
"""


# ---- chats ---------------------------------------------------------------------------------------
def make_log(count):
    """Return messages of the sample, each with a word exchanged, so that they differ."""
    draw = random.Random(0)
    sample = REPOSITORY / "data/raw/messages_sample.json"
    entries = json.loads(sample.read_text(encoding="utf-8"))
    messages = [entry["message"] for entry in entries if 0 < len(entry["message"].strip()) < 45]
    words = [word for message in messages for word in message.split()]
    log = []
    for _ in range(count):
        message = draw.choice(messages).split()
        message[draw.randrange(len(message))] = draw.choice(words)
        log.append(" ".join([*message, draw.choice(words)]))
    return log


def windows(log, size=10):
    """Yield replies that bring what came before them."""
    for i in range(1, len(log)):
        yield {"previous_messages": log[max(0, i - size) : i], "message": log[i]}


def as_log(log, authors):
    """Yield a log with times and many authors, as from_export.py writes it."""
    draw = random.Random(0)
    for i, message in enumerate(log):
        author = f"author{int(draw.paretovariate(0.5)) % authors}"
        yield {"conversation": "c", "time": 1e9 + 20 * i, "author": author, "message": message}


def ordinary(count):
    return [f"well {i} it is {i * 7} or so" for i in range(count)]


def pairs(prompt, completion, count):
    return [{"prompt": f"{i}{prompt}", "completion": f"{completion}{i}"} for i in range(count)]


# Texts that were slow once: name → (function size → entries, size, flags).
HOSTILE = {
    "digits and a letter": (lambda n: ["1" * n + "a", *ordinary(60)], 200_000, []),
    "digits and spaces": (lambda n: ["1 " * n + "a", *ordinary(60)], 100_000, []),
    "letters and an @": (lambda n: ["a" * n + "@", *ordinary(60)], 200_000, []),
    "passwords": (lambda n: ["password is the " * n, *ordinary(60)], 20_000, []),
    "control tokens": (lambda n: ["<|" * n, *ordinary(60)], 100_000, []),
    "combining marks": (lambda n: ["e" + "\u0301\u0316" * n, *ordinary(60)], 100_000, []),
    "joiners": (lambda n: ["a" + "\u200d" * n, *ordinary(60)], 200_000, []),
    "one word": (lambda n: ["bla " * n, *ordinary(60)], 100_000, []),
    "a cell of line breaks": (
        lambda n: pairs("", "\n" * n, 60), 8_000, ["--off", "empty,too short"]),
    "pairs of many lines": (lambda n: pairs("\n".join(ordinary(n)), "it ", 30), 4_000, []),
    "entries that repeat all before them": (
        lambda n: [*windows(ordinary(int(n**0.5)), n)], 500_000, []),
    "one message, over and over": (lambda n: [*windows(["LULW"] * n, 100)], 2_000, []),
    "--window 500": (ordinary, 2_000, ["--window", "500"]),
    "a burst of one author": (
        lambda n: [{"message": m, "author": "ann", "time": 0} for m in ordinary(n)],
        50_000, ["--burst", "5"]),
    "as many authors as messages": (
        lambda n: [{"message": m, "author": m[:9]} for m in ordinary(n)], 20_000, []),
    "as many conversations as messages": (
        lambda n: [{"message": m, "conversation": m} for m in ordinary(n)], 20_000, []),
}  # fmt: skip


# ---- measure -------------------------------------------------------------------------------------
def measure(*command, may_fail=False):
    """Run it; return seconds, seconds of processor time and peak MB."""
    command = [sys.executable, "-c", TIMER, *map(str, command)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    first, _, output = done.stdout.partition("\n")
    seconds, processor, peak, code = first.split()
    if code != "0" and not may_fail:
        sys.exit(f"error: {output[-500:]}\nFIX: # run the command by hand")
    return float(seconds), float(processor), int(peak) / (1e6 if sys.platform == "darwin" else 1e3)


def build(root, entries, *flags, **kwargs):
    """Measure build_train.py on these entries."""
    with (root / "data/raw/messages_big.json").open("w", encoding="utf-8") as file:
        lines = (json.dumps(entry, ensure_ascii=False) for entry in entries)
        file.write("[" + ",\n".join(lines) + "]")
    return measure(sys.executable, root / "build_train.py", "--version", "big", *flags, **kwargs)


def show(name, costs, others=None):
    ratios = [f"{a / b:.2f}" for a, b in zip(costs, others or costs, strict=True)]
    print(f"{name:28} {costs[0]:6.1f} s {costs[1]:6.1f} p {costs[2]:6.0f} MB", end="")
    print(f"   x {', '.join(ratios)}" if others else "", flush=True)


def beside_plain(root, count, base):
    """Print time and memory of build_train.py as ratios to the plain script."""
    log, none = make_log(count), ("--model", "none")
    (root / "plain").mkdir()
    ours = build(root, windows(log), *none)
    plain = measure(
        sys.executable, "-c", PLAIN, root / "data/raw/messages_big.json", root / "plain"
    )
    print(f"{count:,} entries; s: seconds, p: seconds of processor time")
    show("plain script", plain)
    show("build_train.py, windows", ours, plain)
    if base:
        (root / "models/base/base").symlink_to(base.resolve())
        show("... with a tokenizer", build(root, windows(log), "--model", "base"), ours)
    show("build_train.py, log, names", build(root, as_log(log, 5_000), *none), plain)
    show("five times as many windows", build(root, windows(make_log(5 * count)), *none), ours)


def hostile(root):
    """Print how the time grows when hostile text is four times as long: 4 is linear."""
    for name, (make, size, flags) in HOSTILE.items():
        times = [
            build(root, make(n), "--model", "none", *flags, may_fail=True)[1]
            for n in (size, 4 * size)
        ]
        print(f"{name:36} {size:9,} {times[0]:6.2f} p", end="  ")
        print(f"{4 * size:10,} {times[1]:6.2f} p   x {times[1] / times[0]:.1f}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, help="base model folder, to count tokens as well")
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--only", choices=["plain", "hostile"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder in "data/raw", "models/base":
            (root / folder).mkdir(parents=True)
        for script in "build_train.py", *REPOSITORY.glob("[dm]*/*.py"):
            path = REPOSITORY / script
            shutil.copy(path, root / path.relative_to(REPOSITORY))
        if args.only != "hostile":
            beside_plain(root, args.entries, args.base)
        if args.only != "plain":
            hostile(root)


if __name__ == "__main__":
    main()
