r"""Raw data → messages: data/raw/messages_${VERSION}.json, or .jsonl (one entry a line), cleaned.

{"message": "hi!", "author": "ann", "time": "2024-05-31T18:04", "conversation": "family"}
    of a log, as data/raw/from_export.py writes it; only "message" must be there
{"previous_messages": ["hi all", "hi!"], "message": "ready?"}
    a reply and what came before it
{"prompt": "Hi!", "completion": "Hello"}
    a pair that is ready
"""

from models.common import fail, warn

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm

BOTS = {"nightbot", "streamelements", "streamlabs", "moobot", "fossabot", "wizebot", "sery_bot"}
bar = partial(tqdm, delay=1, leave=False, disable=None)


@dataclass(slots=True)
class Message:
    """One message of a chat."""

    text: str
    author: str = ""
    time: float | None = None  # seconds
    entry: int = 0  # its place in the list, from 0, or its line in a .jsonl file, from 1
    context: list | None = None  # the messages before it, if they stand in its entry
    prompt: str = ""  # of a ready pair; its lines are the context


# ---- the file ------------------------------------------------------------------------------------
def find_raw(version):
    """Return the file to read; if there is none, name the versions that there are."""
    folder = Path("data/raw")
    for name in f"messages_{version}.json", f"messages_{version}.jsonl":
        if (folder / name).is_file():
            return folder / name
    there = (path for path in folder.glob("messages_*") if path.suffix in (".json", ".jsonl"))
    others = sorted({path.stem.removeprefix("messages_") for path in there} - {"sample"})
    fixes = [f"export VERSION={other}" for other in others]
    make = f"# python data/raw/from_export.py YOUR_EXPORT --version {version}"
    fail(f"there is no data/raw/messages_{version}.json", make, *fixes)


def fail_to_read(where, what):
    """End the run for raw data that cannot be read."""
    edit = "# correct it in an editor; README.md says what an entry is"
    fail(f"{where}: {what}", edit, "# what an app exported goes through data/raw/from_export.py")


def mended(text):
    r"""Return JSON with the commas right that an edit left, or took away, at the end of a line.

    '[\n{…}\n{…},\n]' → '[\n{…},\n{…}\n]'; no string of JSON reaches over the end of a line
    """
    text = re.sub(r",[ \t,]*(\r?\n\s*[\]}])", r"\1", text)
    text = re.sub(r",[ \t,]+(\r?\n)", r",\1", text)
    return re.sub(r'(["}\]\del])([ \t]*\r?\n\s*["{\[])', r"\1,\2", text)


def read_list(path):
    """Return the list in a .json file."""
    content = path.read_bytes()
    try:
        text = content.decode(json.detect_encoding(content))
        try:
            entries = json.loads(text)
        except json.JSONDecodeError:
            entries = json.loads(mended(text))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        fail_to_read(f"{path}, line {line}", f"not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        fail_to_read(path, f"not JSON: {error}")
    if not isinstance(entries, list):
        fail_to_read(path, f"{json.dumps(entries):.60} is not a list of entries")
    return entries


def read_lines(path):
    """Yield (number, entry) of the lines of a .jsonl file."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield number, json.loads(line.rstrip(b", \r\n"))
            except (ValueError, RecursionError) as error:
                fail_to_read(f"{path}, line {number}", f"not JSON: {error}")


# ---- its entries ---------------------------------------------------------------------------------
KINDS = {  # key of an entry: what its value may be
    "message": str,
    "author": str | int | None,
    "time": str | int | float | None,
    "conversation": str | int | None,
    "previous_messages": list,
    "prompt": str,
    "completion": str,
}


def get(entry, key):
    """Return a value of the entry; raise ValueError if it is none of its KINDS."""
    value = entry.get(key)
    if isinstance(value, KINDS[key]):
        return value
    raise ValueError(f'"{key}" is {json.dumps(value):.60}' if key in entry else f'no "{key}"')


def seconds(value):
    """Return a time in seconds: "1970-01-01T00:01", 60 and "60" → 60.0; None if not known."""
    if value in (None, ""):
        return None
    try:
        number = float(value)
    except ValueError:
        time = datetime.fromisoformat(value)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    return number / 1000 if number > 1e11 else number  # JavaScript counts milliseconds


bare = cache(Message)  # a context repeats most of the one before it: this saves memory


def parse(number, entry, tidy, tidy_name):
    r"""Return the message of an entry, cleaned.

    {"prompt": "hi\nready?", "completion": "yes"} → "yes" with the context "hi", "ready?"
    """
    author = tidy_name(str(get(entry, "author") or ""))
    if "prompt" in entry:
        texts = get(entry, "prompt"), get(entry, "completion")
        prompt, reply = ("\n".join(map(tidy, text.split("\n"))).strip() for text in texts)
        context = [bare(text) for text in prompt.split("\n") if text]
        return Message(reply, author, None, number, context, prompt)
    reply = tidy(get(entry, "message"))
    if "previous_messages" in entry:
        context = [bare(text) for text in map(tidy, get(entry, "previous_messages")) if text]
        return Message(reply, author, None, number, context)
    return Message(reply, author, seconds(get(entry, "time")), number)


def read(path, tidy, tidy_name):
    """Return {conversation: [message, …]}, in the order of the file."""
    is_list = path.suffix == ".json"
    entries = enumerate(bar(read_list(path), "reading")) if is_list else read_lines(path)
    conversations, unknown = defaultdict(list), set()
    for number, entry in entries:
        entry = entry if isinstance(entry, dict) else {"message": entry}
        unknown |= entry.keys() - KINDS.keys()
        try:
            conversation = get(entry, "conversation")
            message = parse(number, entry, tidy, tidy_name)
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            where = f"{path}, {'entry' if is_list else 'line'} {number}"
            fail_to_read(where, f"{error} in {json.dumps(entry):.100}")
        conversations["" if conversation is None else str(conversation)].append(message)
    if unknown:
        warn(f"these keys of entries are not used: {', '.join(sorted(unknown)[:9])}")
    return conversations
