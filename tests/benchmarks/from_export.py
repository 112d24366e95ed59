"""What from_export.py costs, and that its time grows with the text alone.

    python tests/benchmarks/from_export.py
    python tests/benchmarks/from_export.py --only log --repeats 1     # in seconds

reads a quarter and the whole of 200,000 messages and of texts made to be slow, and prints

                                             n        4n    4n : n
    log                                 0.89 s    3.53 s      4.38

The ratio should be under 5, 200,000 messages of WhatsApp under 10 s. Takes some minutes; writes to
a temporary folder alone.
"""

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent.parent / "data/raw/from_export.py"
WORDS = ["river", "light", "coat", "old", "cake", "maybe", "window", "paper", "rain", "soup"]
ENTRY = "24/11/26, 10:44 - Ann: "


def whatsapp(count):
    """Return a chat of two years by three people, of whom one is a phone number."""
    random.seed(0)
    lines = []
    for number in range(count):
        day = number * 700 // count
        date = f"{day % 28 + 1:02}/{day // 28 % 12 + 1:02}/{20 + day // 336}"
        clock = f"{number // 60 % 24:02}:{number % 60:02}"
        author = random.choice(["Ann Lee", "Bob", "+43 660 0000001"])
        lines.append(f"{date}, {clock} - {author}: {' '.join(random.choices(WORDS, k=6))}")
    return "\n".join(lines)


def telegram(count):
    messages = [
        {
            "type": "message",
            "id": number,
            "date_unixtime": str(1_700_000_000 + 60 * number),
            "from": "AB"[number % 2],
            "text": [{"type": "bold", "text": "soup"}, f" and {number}"],
        }
        for number in range(count)
    ]
    return json.dumps({"name": "A", "messages": messages})


def csv(count):
    rows = [f"24-Nov-26 10:{n % 60:02} AM,{'AB'[n % 2]},soup {n}" for n in range(count)]
    return "\n".join(["Date,Author,Content", *rows])


def log(count):
    return "\n".join(
        f"[{n // 60 % 24:02}:{n % 60:02}:00] <{'ab'[n % 2]}> soup" for n in range(count)
    )


def one_message(piece):
    """Return a function that makes a chat with one message of so many pieces."""
    return lambda count: f"{ENTRY}a{piece * count}b\n24/11/26, 10:44 - Bob: ok"


CASES = {
    "WhatsApp": (whatsapp, 200_000),
    "Telegram": (telegram, 200_000),
    "CSV": (csv, 200_000),
    "log": (log, 200_000),
    "one message of lines": (one_message("a\n"), 2_000_000),
    "one message of spaces": (one_message(" "), 40_000_000),
    "one message of '<'": (one_message("<"), 10_000_000),
    "one message of '(1 '": (one_message("(1 "), 10_000_000),
    "one message of marks and tags": (one_message("\u200e<"), 5_000_000),
    "one message of dates": (one_message("24/11/26, "), 4_000_000),
}


def seconds(folder, text):
    """Return how much time of the processor the script takes for a file with this text.

    Time of the processor, because then it does not count what else runs on the machine.
    """
    (folder / "export.txt").write_text(text, "utf-8")
    command = [sys.executable, folder / "from_export.py", folder / "export.txt", "--replace"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each case; the best counts")
    parser.add_argument("--only", nargs="+", default=CASES, choices=CASES, metavar="CASE")
    arguments = parser.parse_args()
    repeats = arguments.repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(SCRIPT, folder)
        start = min(seconds(folder, whatsapp(20)) for _ in range(repeats))
        print(f"{'start':<32}{start:8.2f} s")
        print(f"{'':<32}{'n':>10}{'4n':>10}{'4n : n':>10}")
        for case in arguments.only:
            make, count = CASES[case]
            small, large = make(count // 4), make(count)
            few = min(seconds(folder, small) for _ in range(repeats))
            many = min(seconds(folder, large) for _ in range(repeats))
            ratio = max(many - start, 0.01) / max(few - start, 0.01)
            print(f"{case:<32}{few:8.2f} s{many:8.2f} s{ratio:10.2f}", flush=True)


if __name__ == "__main__":
    main()
