"""What build_train.py costs beside a plain script, and that its time grows with the text alone.

    python tests/benchmarks/build_train.py                     # chat made from the sample
    python tests/benchmarks/build_train.py --base models/base/tiny-gemma-3
    python tests/benchmarks/build_train.py --only hostile
    python tests/benchmarks/build_train.py --only plain --entries 5000     # in seconds

prints seconds, seconds of processor time and peak memory, each with its ratio to the plain script,
or to a text of a quarter of the length:

    plain script                    1.3 s    1.3 p    167 MB
    build_train.py, windows         0.3 s    0.3 p     39 MB   x 0.22, 0.21, 0.23
    a burst of one author                   50,000   0.65 p     200,000   2.65 p   x 4.1

Takes some minutes and 4 GB of memory; writes to a temporary folder alone. The ratios are taken in
one run, alternating, so that they hold on any machine.
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

# The tokenizer's own time: the rows that build_train.py wrote, nothing else.
TOKENIZER = r"""
import json, sys, time
from pathlib import Path
from mlx_lm.utils import load_tokenizer

tokenizer = load_tokenizer(Path(sys.argv[1]))
roles = [{"role": "user", "content": "PROMPT"}, {"role": "assistant", "content": "COMPLETION"}]
frame = tokenizer.apply_chat_template(roles, tokenize=False)
names = [f"{sys.argv[2]}/{name}.jsonl" for name in ("train", "valid")]
pairs = [json.loads(line) for name in names for line in open(name, encoding="utf-8")]
texts = [frame.replace("PROMPT", p["prompt"]).replace("COMPLETION", p["completion"]) for p in pairs]
start = time.perf_counter()
for i in range(0, len(texts), 1000):
    tokenizer.backend_tokenizer.encode_batch_fast(texts[i : i + 1000], add_special_tokens=False)
print(time.perf_counter() - start)
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
def make_log(source, count):
    """Return messages of the sample, each with a word or two exchanged, so that they differ."""
    draw = random.Random(0)
    entries = json.loads(source.read_text(encoding="utf-8"))
    messages = [entry["message"] for entry in entries if 0 < len(entry["message"]) < 45]
    words = [word for message in messages for word in message.split()]
    log = []
    for _ in range(count):
        message = draw.choice(messages).split()
        for _ in range(draw.randint(1, 2)):
            message[draw.randrange(len(message)) if message else 0 :][:1] = []
            message.insert(draw.randint(0, len(message)), draw.choice(words))
        log.append(" ".join(message))
    return log


def windows(log, size=10):
    """Yield the entries of the guide's shape."""
    for i in range(1, len(log)):
        yield {"previous_messages": log[max(0, i - size) : i], "message": log[i]}


def as_log(log, authors):
    """Yield the entries of a log with times and many authors, as from_export.py writes them."""
    draw = random.Random(0)
    for i, message in enumerate(log):
        author = f"author{int(draw.paretovariate(0.5)) % authors}"
        yield {"conversation": "c", "time": 1e9 + 20 * i, "author": author, "message": message}


def write_json(path, entries):
    with path.open("w", encoding="utf-8") as file:
        lines = (json.dumps(entry, ensure_ascii=False) for entry in entries)
        file.write("[" + ",\n".join(lines) + "]")


def ordinary(count):
    return [f"well {i} it is {i * 7} or so" for i in range(count)]


# Texts that were slow once: name → (function size → entries, size, flags).
HOSTILE = {
    "digits and a letter": (lambda n: ["1" * n + "a", *ordinary(60)], 200_000, []),
    "digits and spaces": (lambda n: ["1 " * n + "a", *ordinary(60)], 100_000, []),
    "letters and an @": (lambda n: ["a" * n + "@", *ordinary(60)], 200_000, []),
    "control tokens": (lambda n: ["<|" * n, *ordinary(60)], 100_000, []),
    "combining marks": (lambda n: ["e" + "\u0301\u0316" * n, *ordinary(60)], 100_000, []),
    "joiners": (lambda n: ["a" + "\u200d" * n, *ordinary(60)], 200_000, []),
    "one word": (lambda n: ["bla " * n, *ordinary(60)], 100_000, []),
    "a cell of line breaks": (
        lambda n: [*({"prompt": f"{i}", "completion": "\n" * n} for i in range(60))],
        8_000, ["--off", "empty,too short"]),
    "pairs of many lines": (
        lambda n: [{"prompt": "\n".join(ordinary(n)), "completion": f"it {i}"} for i in range(30)],
        4_000, []),
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
    """Run it; return (seconds, seconds of processor time, peak MB, what it printed)."""
    command = [sys.executable, "-c", TIMER, *map(str, command)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    first, _, output = done.stdout.partition("\n")
    seconds, processor, peak, code = first.split()
    if code != "0" and not may_fail:
        sys.exit(f"error: {output[-500:]}. FIX: run the command by hand")
    return (
        float(seconds),
        float(processor),
        int(peak) / (1e6 if sys.platform == "darwin" else 1e3),
        output,
    )


def beside_plain(root, source, count):
    """Print time and memory of build_train.py without a tokenizer as ratios to the plain script."""
    chat = root / "data/raw/messages_big.json"
    plain_script = root / "plain.py"
    plain_script.write_text(PLAIN)
    log = make_log(source, count)
    write_json(chat, windows(log))
    size = chat.stat().st_size / 1e6
    print(f"{count:,} entries, {size:.0f} MB; s: seconds, p: seconds of processor time")
    ours_command = sys.executable, root / "build_train.py", "--version", "big", "--model", "none"
    plain_command = sys.executable, plain_script, chat, root / "plain"
    runs = [(measure(*plain_command), measure(*ours_command)) for _ in range(3)]
    plain, ours = ([min(run[side][k] for run in runs) for k in range(3)] for side in (0, 1))
    show("plain script", plain)
    show("build_train.py, windows", ours, plain)
    write_json(chat, as_log(log, 5_000))
    show("build_train.py, log, names", measure(*ours_command), plain)
    write_json(chat, windows(make_log(source, 5 * count)))
    show("five times as many windows", measure(*ours_command), ours)
    write_json(chat, windows(log))


def show(name, costs, others=None):
    ratios = [f"{a / b:.2f}" for a, b in zip(costs[:3], (others or costs)[:3], strict=True)]
    print(f"{name:28} {costs[0]:6.1f} s {costs[1]:6.1f} p {costs[2]:6.0f} MB", end="")
    print(f"   x {', '.join(ratios)}" if others else "")


def with_tokenizer(root, base):
    command = sys.executable, root / "build_train.py", "--version", "big", "--model"
    without, counted = measure(*command, "none"), measure(*command, "base")
    own = float(measure(sys.executable, "-c", TOKENIZER, base, root / "data/for_train/big")[3])
    show("build_train.py, tokenizer", counted)
    times = (counted[0] - without[0]) / own
    print(f"  the time without, and {times:.2f} x the tokenizer's own time of {own:.1f} s")


def hostile(root):
    """Print how the time grows when hostile text is four times as long: 4 is linear."""
    for name, (make, size, flags) in HOSTILE.items():
        times = []
        for n in size, 4 * size:
            write_json(root / "data/raw/messages_bad.json", make(n))
            command = sys.executable, root / "build_train.py", "--version", "bad", "--model", "none"
            times.append(measure(*command, *flags, may_fail=True)[1])
        print(f"{name:36} {size:9,} {times[0]:6.2f} p", end="  ")
        print(f"{4 * size:10,} {times[1]:6.2f} p   x {times[1] / times[0]:.1f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sample = REPOSITORY / "data/raw/messages_sample.json"
    parser.add_argument("--chat", type=Path, default=sample, help="in the guide's shape")
    parser.add_argument("--base", type=Path, help="base model folder, to count tokens as well")
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--only", choices=["plain", "hostile"])
    args = parser.parse_args()
    if not args.chat.is_file():
        sys.exit(f"error: there is no {args.chat}. FIX: leave --chat out")
    if args.base and not args.base.is_dir():
        sys.exit(f"error: there is no {args.base}. FIX: python tests/tiny_base.py")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder in "data/raw", "models/base", "plain":
            (root / folder).mkdir(parents=True)
        shutil.copy(REPOSITORY / "build_train.py", root)
        if args.only != "hostile":
            beside_plain(root, args.chat, args.entries)
        if args.base:
            (root / "models/base/base").symlink_to(args.base.resolve())
            with_tokenizer(root, args.base.resolve())
        if args.only != "plain":
            hostile(root)


if __name__ == "__main__":
    main()
