"""What from_export.py costs, and that its time grows with the text alone.

    python tests/benchmarks/from_export.py
    python tests/benchmarks/from_export.py --only log --repeats 1     # in seconds
    python tests/benchmarks/from_export.py --only WhatsApp --beside ~/old/data/raw/from_export.py

reads a quarter and the whole of 300,000 messages and of texts made to be slow, and prints

                                             n        4n    4n : n    memory
    log                                 0.89 s    3.53 s      4.38    104 MB

The ratio should be under 5, 300,000 messages of WhatsApp under 15 s. Takes some minutes; writes to
a temporary folder alone. --beside runs another version of the script on the same texts, in turn.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "data/raw/from_export.py"
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
    "WhatsApp": (whatsapp, 300_000),
    "Telegram": (telegram, 300_000),
    "CSV": (csv, 300_000),
    "log": (log, 300_000),
    "one message of lines": (one_message("a\n"), 2_000_000),
    "one message of spaces": (one_message(" "), 40_000_000),
    "one message of '<'": (one_message("<"), 10_000_000),
    "one message of '(1 '": (one_message("(1 "), 10_000_000),
    "one message of marks and tags": (one_message("\u200e<"), 5_000_000),
    "one message of dates": (one_message("24/11/26, "), 4_000_000),
}


def cost(script, export, text):
    """Return (seconds of the processor, most memory in MB) of the script for a file with this text.

    Time of the processor, because then it does not count what else runs on the machine.
    """
    export.write_text(text, "utf-8")
    command = [sys.executable, script, export, "--replace"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on a Mac, else KB
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit


def project_in(folder):
    """Copy what the script needs into a folder of its own; return the copy of the script."""
    names = "__init__.py", "common.py", "folders.py"
    for name in [*(f"models/{name}" for name in names), "data/__init__.py", "data/messages.py"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(SCRIPT.parent / "readers", folder / "data/raw/readers")
    return Path(shutil.copy(SCRIPT, folder / "data/raw/from_export.py"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--repeats", type=int, default=3, help="runs of each case; the best counts")
    add("--only", nargs="+", default=CASES, choices=CASES, metavar="CASE")
    add("--beside", type=Path, help="another from_export.py; it writes beside itself")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scripts = [project_in(Path(name)), *filter(None, [arguments.beside])]
        export = Path(name) / "export.txt"
        start = min(cost(scripts[0], export, whatsapp(20)) for _ in range(arguments.repeats))[0]
        print(f"{'start':<32}{start:8.2f} s")
        print(f"{'':<32}{'n':>10}{'4n':>10}{'4n : n':>10}{'memory':>10}")
        for case in arguments.only:
            make, count = CASES[case]
            texts = make(count // 4), make(count)
            runs = {(script, text): [] for script in scripts for text in texts}
            for _ in range(arguments.repeats):  # in turn, so that a busy minute hits all
                for (script, text), costs in runs.items():
                    costs.append(cost(script, export, text))
            for script in scripts:
                few, many = (min(runs[script, text])[0] for text in texts)
                memory = min(megabytes for _, megabytes in runs[script, texts[1]])
                ratio = max(many - start, 0.01) / max(few - start, 0.01)
                title = case if script == scripts[0] else "  beside it"
                times = f"{few:8.2f} s{many:8.2f} s{ratio:10.2f}"
                print(f"{title:<32}{times}{memory:7.0f} MB", flush=True)


if __name__ == "__main__":
    main()
