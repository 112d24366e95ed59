"""Make a chat log from what an app exported: the step before build_train.py.

    python data/raw/from_export.py ~/Downloads/result.json
    python data/raw/from_export.py ~/Downloads/"WhatsApp Chat with Ann.zip" --version ann

Reads   files, folders or .zip of WhatsApp, Telegram, Discord, Instagram, Messenger, Signal,
        iMessage, SMS, LINE, KakaoTalk, WeChat, Snapchat, Slack, Teams, Skype, Google Chat, Matrix,
        Rocket.Chat, Twitch, IRC, Pidgin, Reddit; CSV with a header, JSON lists of messages, ready
        training sets. Their content tells them apart; nothing is unpacked or sent anywhere.
        Each app has a file in data/raw/readers/.
Writes  data/raw/messages_${VERSION}.json, a list with one entry a line, to be read and edited:
        {"conversation": "Ann", "time": "2026-11-24T10:44:25", "author": "Ann Lee", "message": "hi"}
        one conversation after the other, each in the order of time;
        of a training set {"prompt": "Hi!", "completion": "Hello"}
        What is no talk between people is left out, counted and shown: see KINDS below.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.messages import BOTS
from data.raw.readers import READERS, not_read
from data.raw.readers.files import open_file
from data.raw.readers.find import files_in
from data.raw.readers.not_read import AGAIN, NotReadError
from data.raw.readers.shared import INVISIBLE, Message, first, text_of
from data.raw.readers.times import ORDERS, read_times
from models import common, folders
from models.common import fail, visible

import argparse
import functools
import json
import os
import re
import shlex
from collections import Counter, defaultdict
from os.path import relpath
from typing import NamedTuple

from tqdm import tqdm

# ---- settings: what is left out, unless --keep names it ------------------------------------------
KINDS = {
    "app": "written by the app itself",
    "deleted": "deleted messages",
    "call": "calls",
    "media": "media without words",
    "poll": "polls",
    "location": "locations",
    "forwarded": "forwarded messages",
    "bot": "bots",
    "channel": "channels",
    "notes": "notes to oneself",
    "alone": "chats in which one person alone speaks",
    "copy": "already in a file read before",
}
UNDERSTOOD = 0.9  # share of a file that a reader must understand to read it
RAW = common.ROOT / "data/raw"
EXAMPLE = 'python data/raw/from_export.py ~/Downloads/"WhatsApp Chat with Ann.zip"'


def arguments():
    what = "Make data/raw/messages_VERSION.json of what an app exported."
    parser = argparse.ArgumentParser(description=what)
    add, version = parser.add_argument, common.from_environment("VERSION")
    add("paths", nargs="+", metavar="PATH", help="file, folder or .zip that an app exported")
    add("--version", default=version, help="name of the data; $VERSION, or v1")
    add("--keep", action="append", choices=KINDS, default=[], help="a kind not to leave out")
    add("--dates", choices=list(ORDERS), help="order of day, month, year; else found by itself")
    add("--replace", action="store_true", help="write over the messages of another export")
    parser.error = lambda what: fail(what, EXAMPLE, code=2)
    s = parser.parse_args()
    common.check_names(s.version, common.DEFAULTS["MODEL"])
    if Path(" ".join(s.paths)).exists():  # a name with spaces, and without its quotes
        s.paths = [" ".join(s.paths)]
    return s


# ---- read ----------------------------------------------------------------------------------------
class Chat(NamedTuple):
    """What was read from one file."""

    name: str
    title: str
    app: str
    messages: list  # of Message, or of {"prompt", "completion"}
    notes: list


def read_files(paths, dates):
    """Return ([Chat], {name: (what it is, a FIX)}) of all files that the paths hold."""
    found = dict(file for path in paths for file in files_in(Path(path)))
    chats, refused, names = [], {}, {}
    for name in tqdm(in_order(found), unit=" files", leave=False, disable=None):
        try:
            chats.append(read_file(open_file(name, found[name], names), dates))
        except NotReadError as e:
            refused[name] = e.args
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as e:
            refused[name] = f"not as its app writes it: {e!r:.80}", AGAIN
    wrong = [name for name in refused if name in paths or not chats]
    if wrong:
        name = min(wrong, key=lambda name: refused[name][1] == AGAIN)  # what is known comes first
        what, fix = refused[name]
        fail(f"{name} is {what}", fix)
    if not chats:
        look = f"ls {shlex.quote(paths[0])}  # is there a .txt, .json, .csv or .zip?"
        fail(f"{paths[0]} holds no chat", look)
    return chats, refused


def in_order(names):
    """Return the names as they are read: Slack's users first, and Signal's chats only once."""
    twins = {str(Path(name).with_name("data.json")) for name in names if name.endswith("chat.md")}
    once = [name for name in names if name not in twins]
    return sorted(once, key=lambda name: not name.endswith(("users.json", "channels.json")))


def read_file(file, dates):
    """Return the Chat of a file, read by the first reader that understands it."""
    readers = (reader for reader in READERS if reader.understands(file) >= UNDERSTOOD)
    reader = next(readers, not_read)
    messages = list(reader.read(file))
    if messages and isinstance(messages[0], Message):
        written = [text_of(m.time) for m in messages]
        times, note = read_times(written, dates, file.lines)
        check_times(written, times)
        messages = [tidy(*pair, file.title) for pair in zip(messages, times, strict=True)]
        if note:
            file.notes.append(note)
    return Chat(file.name, file.title, reader.APP, messages, file.notes)


def check_times(written, times):
    """Refuse a file in which more than a tenth of the times cannot be read."""
    failed = [text for text, time in zip(written, times, strict=True) if text and not time]
    if len(failed) > (1 - UNDERSTOOD) * len(written):
        what = f"a chat with times that are not understood, like {failed[0][:60]!r}"
        raise NotReadError(what, "# write them as 2026-11-24 10:44:25 and try again")


def tidy(m, time, title):
    """Return a message with plain texts in place of the app's values."""
    return Message(
        time=time,
        author=tidy_name(text_of(m.author)),
        text=INVISIBLE.sub("", text_of(m.text)).strip(),
        kind=m.kind,
        conversation=tidy_name(text_of(m.conversation) or title),
    )


@functools.cache
def tidy_name(name):
    r"""Return a name on one line: "\u202a~ Ann\nLee" → "Ann Lee"."""
    name = INVISIBLE.sub("", name).encode("utf-8", "replace").decode()  # half a character: ?
    return " ".join(name.split()).removeprefix("~").strip()


# ---- leave out -----------------------------------------------------------------------------------
def sort_out(chats, keep):
    """Return ({conversation: messages in the order of time}, {kind: texts that are left out})."""
    conversations, left_out = defaultdict(list), defaultdict(list)
    before = set()  # the messages of the files before
    for chat in chats:
        talks = defaultdict(list)
        for m in chat.messages:
            is_bot = m.author.casefold() in BOTS
            is_copy = m.time and m in before
            kind = m.kind or first(bot=is_bot, media=not m.text, copy=is_copy)
            if m.text and kind in ["", *keep]:
                talks[m.conversation].append(m)
            else:
                left_out[kind].append(m.text)
        for place, talk in talks.items():
            times = [m.time for m in talk if m.time]
            is_newest_first = times and times[0] > times[-1]
            conversations[place] += talk[::-1] if is_newest_first else talk
            before.update(talk)

    for place, talk in list(conversations.items()):
        authors = {m.author for m in talk}
        if len(authors) == 1 and "" not in authors and "alone" not in keep:
            left_out["alone"] += [m.text for m in conversations.pop(place)]
        elif all(m.time for m in talk):
            talk.sort(key=lambda m: m.time)  # equal times stay as the file has them
    return conversations, left_out


def without_number(name, people):
    """Return "Person 1" for the first name that is a phone number, and so on; others stay."""
    if not re.fullmatch(r"\+?[\d\s().\-\u2011/]{7,30}", name):
        return name
    return people.setdefault(re.sub(r"\D", "", name), f"Person {len(people) + 1}")


def entries_of(conversations):
    """Return the entries to write: [{"conversation": …, "time": …, "author": …, "message": …}]."""
    people, entries = {}, []
    for place, messages in conversations.items():
        for m in messages:
            entry = {
                "conversation": without_number(place, people),
                "time": m.time and m.time.isoformat(timespec="seconds"),
                "author": without_number(m.author, people),
                "message": m.text,
            }
            entries.append({key: value for key, value in entry.items() if value})
    return entries


# ---- write ---------------------------------------------------------------------------------------
def write(target, entries, replace):
    """Write one entry a line, whole or not at all; what was there before is kept once beside it."""
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    content = f"[\n{lines}\n]\n".encode("utf-8", "replace")
    with folders.work_folder(target) as work:
        files = target, target.with_suffix(".jsonl")  # build_train.py reads one of them
        others = [file for file in files if file.exists() and file.read_bytes() != content]
        if others and not replace:
            refuse_to_replace(others[0])
        if target.exists() and target.name not in os.listdir(target.parent):
            what = f"{relpath(target)} is there under a name with other capitals"
            fail(what, shlex.join(["python", *sys.argv, "--version", f"{target.stem[9:]}_2"]))
        new = work / target.name
        new.write_bytes(content)
        for old in others:
            before = old.with_name(f"{old.name}.before")
            before.unlink(missing_ok=True)
            folders.link(old, before)  # what an editor saves right now is in it
            print(f"replaced {relpath(old)}; what it was is in {before.name}")
        new.replace(target)
        target.with_suffix(".jsonl").unlink(missing_ok=True)


def refuse_to_replace(old):
    """Fail, for a file that holds another export, or what a person edited."""
    again = shlex.join(["python", *sys.argv])
    if old.name == "messages_sample.json":  # the first command of the guide exports VERSION=sample
        fail(f"VERSION=sample, and {relpath(old)} is the sample of the guide", "export VERSION=v1")
    fail(
        f"{relpath(old)} has other content: another export, or edited by hand",
        f"{again} --version {old.stem.removeprefix('messages_')}_2",
        f"{again} --replace  # the old one is then {old.name}.before",
    )


# ---- report --------------------------------------------------------------------------------------
def tell(title, number, text=""):
    """Print "authors               2", a line of the report."""
    number = f"{number:,}" if isinstance(number, int) else number
    text = visible(" ".join(text.split()))
    print(f"{title:<14}{number:>9}  {text}".rstrip())


def report(chats, refused, left_out, entries):
    apps = Counter(chat.app for chat in chats)
    names = {chat.app: chat.name for chat in reversed(chats)}  # of the first file of each app
    for app, number in apps.items():
        tell("read", number, f"{app}, {names[app]}" + " and so on" * (number > 1))
    if refused:
        name, (why, _) = next(iter(refused.items()))
        tell("not read", len(refused), f"{name}: {why}" + " and so on" * (len(refused) > 1))
    talk = [entry for entry in entries if "message" in entry]  # of chats, not of training sets
    for title, key in ("conversations", "conversation"), ("authors", "author"):
        if counts := Counter(entry[key] for entry in talk if key in entry):
            tell(title, len(counts))
            for name, number in counts.most_common(10):
                tell("", number, name)
            if len(counts) > 10:
                tell("", "…", f"and {len(counts) - 10:,} more")
    if days := sorted(entry["time"][:10] for entry in entries if "time" in entry):
        tell("period", "", f"{days[0]} to {days[-1]}")
    for kind, texts in sorted(left_out.items(), key=lambda item: -len(item[1])):
        sample = " ".join(next(filter(None, texts), "").split())[:40]
        tell("left out", len(texts), f"{KINDS[kind]} ({kind}): {sample}".removesuffix(": "))
    for note in [f"{chat.title}: {note}" for chat in chats for note in chat.notes][:10]:
        tell("note", "", note)


def next_steps(entries, version):
    """Print the commands that go on: first for the author who speaks in most conversations."""
    build = f"VERSION={version} python build_train.py"
    messages = Counter(entry["author"] for entry in entries if "author" in entry)
    if not messages:
        print(f"next:\n      {build}")
        return
    pairs = {(entry.get("author"), entry.get("conversation")) for entry in entries}
    places = Counter(author for author, _ in pairs)
    author = max(messages, key=lambda author: (places[author], messages[author]))
    print("next, to answer as one of them, or as anybody:")
    print(f"      {build} --only-author {visible(shlex.quote(author))}")
    print(f"      {build}")


def keep_most(left_out):
    """Return the command that keeps the kind of which most messages are left out."""
    kinds = [kind for kind, texts in left_out.items() if any(texts)]
    if not kinds:
        return "# export another chat"
    kind = max(kinds, key=lambda kind: len(left_out[kind]))
    return f"{shlex.join(['python', *sys.argv])} --keep {kind}"


def main():
    s = arguments()
    target = RAW / f"messages_{s.version}.json"
    chats, refused = read_files(s.paths, s.dates)
    pairs = [m for chat in chats for m in chat.messages if isinstance(m, dict)]
    if pairs and len(pairs) < sum(len(chat.messages) for chat in chats):
        fail("these are chats and training sets", "# read each of them with a --version of its own")
    conversations, left_out = ({}, {}) if pairs else sort_out(chats, s.keep)
    entries = pairs or entries_of(conversations)
    if entries:
        write(target, entries, s.replace)
    report(chats, refused, left_out, entries)
    if not entries:
        fail("nothing is left that people said to each other", keep_most(left_out))
    print(f"\nwrote {relpath(target)}: {len(entries):,} entries, to be edited if need be")
    next_steps(entries, s.version)


if __name__ == "__main__":
    main()
