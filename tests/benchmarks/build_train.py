"""What build_train.py costs: prints every figure of the README, in one run, so that the ratios hold on any machine.

    python tests/benchmarks/build_train.py                            # chat made from the sample, tiny base
    python tests/benchmarks/build_train.py --chat data/raw/messages_irc.json --base models/base/gemma-3-270m-4bit

Needs some minutes and 4 GB of memory; writes to a temporary folder alone.
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

# The plain script that a person would write: load, clean, filter by one rule, split at random, write.
YARDSTICK = r"""
import json, re, sys, unicodedata
from sklearn.model_selection import train_test_split

def clean(text):
    text = unicodedata.normalize("NFC", text)
    return re.sub(r"\s+", " ", re.sub(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\ufeff]", " ", text)).strip()

with open(sys.argv[1], encoding="utf-8") as file:
    entries = json.load(file)
rows = []
for entry in entries:
    context, reply = [clean(m) for m in entry["previous_messages"]], clean(entry["message"])
    if reply and not re.search(r"https?://", reply):
        rows.append({"prompt": "\n".join(context) + "\n\nWrite the next message of this chat.", "completion": reply})
for name, part in zip(["train", "valid"], train_test_split(rows, test_size=0.1, random_state=0)):
    with open(f"{sys.argv[2]}/{name}.jsonl", "w", encoding="utf-8") as file:
        for row in part:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
"""

# The tokenizer's own time: the texts that build_train.py wrote, through the chat template, nothing else.
TOKENIZER = r"""
import json, sys, time
from pathlib import Path
from mlx_lm.utils import load_tokenizer

tokenizer = load_tokenizer(Path(sys.argv[1]))
roles = [{"role": "user", "content": "PROMPT"}, {"role": "assistant", "content": "COMPLETION"}]
frame = tokenizer.apply_chat_template(roles, tokenize=False)
pairs = [json.loads(line) for name in ("train", "valid") for line in open(f"{sys.argv[2]}/{name}.jsonl")]
texts = [frame.replace("PROMPT", p["prompt"]).replace("COMPLETION", p["completion"]) for p in pairs]
start = time.perf_counter()
for i in range(0, len(texts), 1000):
    tokenizer.backend_tokenizer.encode_batch_fast(texts[i : i + 1000], add_special_tokens=False)
print(time.perf_counter() - start)
"""


def make_chat(path, source, entries):
    """Write `entries` windows of a chat log whose messages are those of `source`, each with a word or two exchanged."""
    draw = random.Random(0)
    messages = [e["message"] for e in json.loads(source.read_text(encoding="utf-8")) if 0 < len(e["message"]) < 45]
    words = [word for message in messages for word in message.split()]
    log = []
    for _ in range(entries + 10):
        message = draw.choice(messages).split()
        for _ in range(draw.randint(1, 2)):
            message[draw.randrange(len(message)) if message else 0 :][:1] = []
            message.insert(draw.randint(0, len(message)), draw.choice(words))
        log.append(" ".join(message))
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for i in range(10, len(log)):
            entry = {"previous_messages": log[i - 10 : i], "message": log[i]}
            file.write((",\n" if i > 10 else "") + json.dumps(entry, ensure_ascii=False))
        file.write("]")


def measure(*command):
    """Run the command; return (seconds, seconds of processor time, peak MB, what it printed)."""
    timer = (
        "import resource, subprocess, sys, time; t = time.perf_counter(); r = subprocess.run(sys.argv[1:], "
        "stdout=subprocess.PIPE, text=True); s = time.perf_counter() - t; "
        "u = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(s, u.ru_utime + u.ru_stime, u.ru_maxrss, r.returncode); print(r.stdout)"
    )
    command = [sys.executable, "-c", timer, *map(str, command)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    first, _, output = done.stdout.partition("\n")
    seconds, processor, peak, code = first.split()
    assert code == "0", output
    return float(seconds), float(processor), int(peak) / (1e6 if sys.platform == "darwin" else 1e3), output


def cost(lengths, batch):
    """Tokens computed for each token of rows in this order, as mlx-lm pads them: to 1 more than a multiple of 32."""
    batches = [lengths[i : i + batch] for i in range(0, len(lengths) - batch + 1, batch)]
    return sum(batch * (1 + (max(b) + 31) // 32 * 32) for b in batches) / sum(map(sum, batches))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--chat", type=Path, default=REPOSITORY / "data/raw/messages_v1.json", help="in the guide's shape"
    )
    parser.add_argument("--base", type=Path, default=REPOSITORY / "models/base/tiny-gemma-3", help="base model folder")
    parser.add_argument("--entries", type=int, default=200_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "data/raw").mkdir(parents=True)
        (root / "models/base").mkdir(parents=True)
        (root / "plain").mkdir()
        shutil.copy(REPOSITORY / "build_train.py", root)
        (root / "models/base/base").symlink_to(args.base.resolve())
        chat, script = root / "data/raw/messages_big.json", root / "build_train.py"
        plain_script = root / "yardstick.py"
        plain_script.write_text(YARDSTICK)

        make_chat(chat, args.chat, args.entries)
        print(f"{args.entries:,} entries, {chat.stat().st_size / 1e6:.0f} MB; s: seconds, p: seconds of processor time")
        plain_command = sys.executable, plain_script, chat, root / "plain"
        our_command = sys.executable, script, "--version", "big", "--model"
        runs = [(measure(*plain_command), measure(*our_command, "none")) for _ in range(3)]
        plain, ours = ([min(run[i][k] for run in runs) for k in range(3)] for i in (0, 1))
        ratios = [b / a for a, b in zip(plain, ours, strict=True)]
        print(f"yardstick          {plain[0]:6.1f} s {plain[1]:6.1f} p {plain[2]:6.0f} MB")
        print(f"without tokenizer  {ours[0]:6.1f} s {ours[1]:6.1f} p {ours[2]:6.0f} MB: {ratios[0]:.2f} x the time, "
              f"{ratios[1]:.2f} x the processor time, {ratios[2]:.2f} x the memory of the yardstick")  # fmt: skip
        counted = measure(*our_command, "base")
        own = float(measure(sys.executable, "-c", TOKENIZER, args.base, root / "data/for_train/big")[3])
        print(f"with tokenizer     {counted[0]:6.1f} s {counted[1]:6.1f} p {counted[2]:6.0f} MB: the time without, and "
              f"{(counted[0] - ours[0]) / own:.2f} x the tokenizer's own time of {own:.1f} s")  # fmt: skip
        make_chat(chat, args.chat, 5 * args.entries)
        large = measure(*our_command, "none")
        print(f"five times as many {large[0]:6.1f} s {large[1]:6.1f} p {large[2]:6.0f} MB: "
              f"{large[0] / ours[0]:.2f} x the time, {large[1] / ours[1]:.2f} x the processor time")  # fmt: skip
        chat.unlink()

        shutil.copy(args.chat, root / "data/raw/messages_small.json")
        measure(sys.executable, script, "--version", "small", "--model", "base")
        from mlx_lm.utils import load_tokenizer

        tokenizer, lengths = load_tokenizer(args.base.resolve()), []
        for line in (root / "data/for_train/small/train.jsonl").open(encoding="utf-8"):
            row = json.loads(line)
            roles = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            lengths.append(len(tokenizer.apply_chat_template(roles)))
        for batch in 4, 8, 16:
            here, ideal = cost(lengths, batch), cost(sorted(lengths), batch)
            at_random = cost(random.Random(0).sample(lengths, len(lengths)), batch)
            print(f"padding at batch {batch:2}: {here / ideal - 1:+.1%} tokens against the ideal order; "
                  f"a random order: {at_random / ideal - 1:+.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
