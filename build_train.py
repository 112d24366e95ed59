"""Step 4 of the guide: make the training data from a chat.

    python build_train.py                            # your own chat, data/raw/messages_v1.json
    VERSION=sample python build_train.py             # the sample that comes with the guide
    python build_train.py --only-author ann --gap 3  # a model that answers as ann

Reads   data/raw/messages_${VERSION}.json or .jsonl, which data/messages.py describes, and the
        tokenizer in models/base/${MODEL}/, if it is there
Writes  data/for_train/${VERSION}/: train.jsonl and valid.jsonl (a row a line), dropped.jsonl (all
        other entries, and why), settings.json (how they were made)
Exit    0 done, 1 something is missing or wrong, 2 wrong usage, 130 Ctrl-C
"""

from data.clean import cleaners, control_tokens
from data.messages import BOTS, Message, bar, find_raw, read
from data.personal import looks_private
from data.prompt import make_chat
from data.split import COPY, drop_copies, split
from models import common, folders
from models.common import fail, visible

# ruff: noqa: RUF001 (chat is in many scripts)
import argparse
import difflib
import json
import os
import random
import re
import shlex
import sys
import unicodedata
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path


# ---- how a setting is typed ----------------------------------------------------------------------
def template(text):
    return text.replace("\\n", "\n")


def list_of_names(text):
    """Return the names in "Link, too short": ["link", "too short"]."""
    return [name.strip() for name in text.casefold().split(",")]


# ---- settings: edit a default here, or give the flag for a single run ----------------------------
parser = argparse.ArgumentParser(
    description="Make the training data from a chat.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,
)
parser.error = lambda what: fail(what, "python build_train.py --help", code=2)
add, env = parser.add_argument, common.from_environment
# fmt: off
add("--version", default=env("VERSION"), help="which data: data/raw/messages_VERSION.json")
add("--model", default=env("MODEL"), help="whose tokenizer to use")
add("--prompt", type=template,
    default="{context}\n\nWrite the next message of this chat[, as {author}].",
    help="the prompt; what is in [] is left out if the model does not see names")
add("--question-prompt", type=template,
    default="{context}\n\nAsk the next question in this chat[, as {author}].",
    help="the same, where the reply is a question")
add("--names", type=int, choices=[0, 1], default=1, help="1: the model sees who says what")
add("--only-author", default="", help="learn this author's replies alone")
add("--shape", choices=["prompt", "turns"], help="turns with --only-author, else prompt")
add("--window", type=int, default=10, help="messages before a reply that the model sees")
add("--stride", type=int, default=0,
    help="messages from one trained reply to the next; 0: as --window")
add("--gap", type=float, default=6.0, help="hours of silence that end a talk; 0: none")
add("--burst", type=float, default=0.0, help="join an author's messages within so many minutes")
add("--off", type=list_of_names, default=[], metavar="RULES",
    help="names of rules to switch off, with commas: 'link,too short'")
add("--block", type=os.path.abspath, help="file of words, one a line, that become […] everywhere")
add("--max-context-chars", type=int, default=300, help="of a message before a reply; then comes …")
add("--max-seq-length", type=int, default=os.environ.get("MAX_SEQ_LENGTH", 1024),
    help="most tokens in a row, as in fine_tune.sh")
add("--valid-size", type=float, default=0.1, help="share of the rows to validate with, 0 to 1")
add("--valid-rows", type=int, default=400, help="most rows to validate with")
add("--seed", type=int, default=0, help="whole number; another one gives another split")
# fmt: on
# --------------------------------------------------------------------------------------------------


def read_settings(words):
    """Return the settings of this run; end it if one of them is wrong."""
    s, more = parser.parse_known_args(words)
    if more and s.only_author and not more[0].startswith("-"):
        name = shlex.quote(" ".join([s.only_author, *more]).strip("“”‘’"))
        fix = f"python build_train.py --only-author {name}"
        fail("--only-author takes a name of several words in quotes", fix, code=2)
    if more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    common.check_names(s.version, s.model)
    if sum(word.startswith("--only-author") for word in words) > 1:
        parser.error("--only-author takes one name; leave it out to learn everybody")
    s.shape = s.shape or ("turns" if s.only_author else "prompt")
    s.stride = s.stride or s.window
    if "{context}" not in s.prompt or "{context}" not in s.question_prompt:
        parser.error("--prompt and --question-prompt need {context}")
    if s.shape == "turns" and not s.only_author:
        parser.error("--shape turns needs --only-author")
    if min(s.window, s.stride, s.valid_rows) < 1:
        parser.error("--window, --stride and --valid-rows have to be 1 or more")
    if not 0 < s.valid_size < 1:
        parser.error("--valid-size has to be between 0 and 1")
    if unknown := set(s.off) - set(ALL_RULES):
        parser.error(f"--off names {min(unknown)!a}, and the rules are: {', '.join(ALL_RULES)}")
    return s


# ---- what the data are made of -------------------------------------------------------------------
@dataclass(slots=True)
class Row:
    """A message that may be learned as a reply, with what came before it."""

    context: list[Message]  # oldest first
    message: Message
    talk_number: int
    places: range  # of its messages, counted through all talks
    tokens: int = 0
    rule: str = ""  # the name of the rule that dropped it
    reply = property(lambda row: row.message.text)
    author = property(lambda row: row.message.author)
    texts = property(lambda row: [message.text for message in (*row.context, row.message)])


def say(title, text):
    """Print a line of the report."""
    print(visible(f"{title:10} {text}"))


def kept(rows):
    """Return the rows that no rule has dropped so far."""
    return [row for row in rows if not row.rule]


def shuffled(items, seed):
    """Return the items in a random order, the same for the same seed."""
    return random.Random(seed).sample(items, len(items))  # noqa: S311 (it is no secret)


# ---- who is learned ------------------------------------------------------------------------------
def check_author(conversations, s, raw):
    """End the run if nobody has the name of --only-author; propose a name that is there."""
    authors = Counter(message.author for log in conversations.values() for message in log)
    names = [name for name, _ in authors.most_common() if name]
    if s.only_author in ["", *names]:
        return
    near = difflib.get_close_matches(s.only_author, names[:5000], 1) or names[:1]
    flags = "".join(f" --only-author {shlex.quote(name)}" for name in near)
    there = ", ".join(names[:5]) or "people without a name"
    what = f"no message of {raw} is by {s.only_author!a}; most are by {there}"
    exports = [f"export VERSION={version}" for version in versions_with(s.only_author, raw.parent)]
    fail(what, *exports, f"VERSION={s.version} python build_train.py{flags}")


def versions_with(author, folder):
    """Yield the other chats in which an author writes: a forgotten export is the usual mistake."""
    needle = f'"author": {json.dumps(author, ensure_ascii=False)}'
    for file in sorted(folder.glob("messages_*.json")):
        if needle in file.read_text("utf-8", "replace"):
            yield file.stem.removeprefix("messages_")


# ---- lay out: messages → talks → rows, and the places of their messages --------------------------
def in_order(log):
    """Return the log in the order of time, or as it is if a time is not known."""
    if any(message.time is None for message in log):
        return log
    back = sum(a.time > b.time for a, b in pairwise(log))
    if back <= 0.01 * len(log):  # a clock was set, or it is 01:00 after 12:59, without a.m. or p.m.
        return log
    return sorted(log, key=lambda message: message.time)


def talks_of(log, s):
    r"""Return the log as talks, which end in silence; messages of one turn become one.

    ann "hi", ann "are you there?", bob "yes" → [[ann "hi\nare you there?", bob "yes"]]
    """
    talks, last = [], None
    for message in in_order(log):
        is_timed = last and last.time is not None and message.time is not None
        pause = abs(message.time - last.time) / 60 if is_timed else 0  # minutes
        is_same_author = last and last.author == message.author != ""
        is_assistant = s.shape == "turns" and message.author == s.only_author
        if not last or (s.gap and pause > 60 * s.gap):
            talks.append([[message]])
        elif is_same_author and (is_assistant or (s.burst and pause <= s.burst)):
            talks[-1][-1].append(message)
        else:
            talks[-1].append([message])
        last = message
    return [[joined(turn) for turn in talk] for talk in talks]


def joined(turn):
    """Return the messages of a turn as one message."""
    return replace(turn[0], text="\n".join(message.text for message in turn))


def rows_of_talk(talk, talk_number, place, s):
    """Return a row for each message; its context is the --window messages before it.

    a b c, --window 1 → (nothing) a, at the first place; a b; b c
    """
    rows = []
    for end, message in enumerate(talk):
        start = max(0, end - s.window)
        places = range(place + start, place + end + 1)
        rows.append(Row(talk[start:end], message, talk_number, places))
    return rows


def overlap(before, texts):
    """Return how far back into `before` the texts begin: (a b c, b c d) → 2.

    The last of `before` may differ, since some contexts leave out the replies:
    (a b c R, b c d) → 3.
    """
    for size in range(min(len(before), len(texts)), 1, -1):
        if before[-size] == texts[0] and before[-size:-1] == texts[: size - 1]:
            return size
    return int(before[-1:] == texts[:1])


def rows_of_ready(messages, talk_number, place, is_one_talk, s):
    """Return the rows of messages that have their contexts, laid end to end where these overlap.

    a b → c,  b c → d,  x → y        a at place 0, b 1, c 2, d 3; x far away, in a talk of its own
    """
    rows, before = [], []
    for message in messages:
        texts = [each.text for each in (*message.context, message)]
        shared = overlap(before, texts)
        if rows and not shared:
            place += s.stride  # far enough for --stride to keep both
            talk_number += not is_one_talk
        places = range(place - shared, place - shared + len(texts))
        place = places.stop
        rows.append(Row(message.context, message, talk_number, places))
        before = texts
    return rows


def lay_out(conversations, s):
    """Return the rows, one for each message or turn."""
    rows, empty = [], []
    for conversation, messages in conversations.items():
        log = [message for message in messages if message.context is None]
        empty += [Row([], m, 0, range(1), rule="empty") for m in log if not m.text]
        for talk in talks_of([message for message in log if message.text], s):
            rows += rows_of_talk(talk, *next_free(rows), s)
        ready = [message for message in messages if message.context is not None]
        rows += rows_of_ready(ready, *next_free(rows), bool(conversation), s)
    return rows + empty


def next_free(rows):
    """Return the number of the next talk, and its first place."""
    return (rows[-1].talk_number + 1, rows[-1].places.stop) if rows else (0, 0)


# ---- choose: a row is dropped by the first rule that is true; remove a line, change it, add one --
is_number = cache(re.compile(r"[\s.,:+%-]*\d[\d\s.,:+%-]*").fullmatch)
# fmt: off
RULES = {
    "empty":          lambda row, s: not row.reply,
    "no context":     lambda row, s: not row.context,
    "other author":   lambda row, s: s.only_author and row.author != s.only_author,
    "bot":            lambda row, s: row.author.casefold() in BOTS,
    "bot command":    lambda row, s: re.match(r"[!/][^\W\d_]\w*(\s|$)", row.reply),  # no path
    "link":           lambda row, s: re.search(r"(?i)://|www\.|(?<=\w)\.[a-z]{2,6}/", row.reply),
    "too short":      lambda row, s: len(row.reply) < 2,
    "too long":       lambda row, s: len(row.reply) > 1000,
    "personal data":  lambda row, s: "[…]" in row.reply,
    "same character": lambda row, s: re.search(r"(.)\1{14}", row.reply),
    "same words":     lambda row, s: repetition(row.reply) >= 3,
    "no letters":     lambda row, s: len(row.reply) >= 40 and share(str.isalpha, row.reply) < 0.3,
    "numbers":        lambda row, s: share(is_number, row.texts[:-1]) >= 0.8,  # a crowd that votes
}
# fmt: on
ALL_RULES = [*RULES, "duplicate", "pasted again", "stock reply"]  # these: in choose()
STOCK_SHARE = 0.02  # of rows that may have the same reply; five may in any case
PUNCTUATION = {i: None for i in range(0x10000) if unicodedata.category(chr(i))[0] in "PZ"}


def repetition(text):
    """Return how many words there are to each different one; 0 for under six words.

    "gg gg GG gg gg gg" → 3.0, as if two were different
    """
    words = text.count(" ") + 1
    return words / max(2, len(set(text.casefold().split()))) if words >= 6 else 0


def share(test, items):
    """Return the share of items that pass a test."""
    return len(list(filter(test, items))) / max(1, len(items))


@cache
def folded(text):
    """Return text without case, punctuation and spaces: "Ciao,  MAMMA!!" → "ciaomamma"."""
    return text.casefold().translate(PUNCTUATION) or text  # "?!" stays


def choose(rows, s):
    """Drop the rows that break a rule."""
    rules = [(name, rule) for name, rule in RULES.items() if name not in s.off]
    exchanges, replies, count = set(), Counter(), 0  # of the rows that are kept
    for row in kept(rows):
        row.rule = next((name for name, rule in rules if rule(row, s)), "")
        if row.rule:
            continue
        reply = folded(row.reply)
        exchange = tuple(map(folded, row.texts))
        repeats = {
            "duplicate": exchange in exchanges,
            "pasted again": len(row.reply) >= 80 and replies[reply] > 0,
            "stock reply": replies[reply] >= max(5, STOCK_SHARE * (count + 1) - 1),
        }
        row.rule = next((name for name in repeats if repeats[name] and name not in s.off), "")
        if not row.rule:
            exchanges.add(exchange)
            replies[reply] += 1
            count += 1


def thin_out(rows, s):
    """Drop training rows so that replies are --stride messages apart, from the end of each talk.

    Of the replies 1 to 20, with windows of ten, 10 and 20 are kept: they show 0 to 10 and 10 to 20.
    """
    after = None
    for row in reversed(rows):
        is_same_talk = after and after.talk_number == row.talk_number
        is_near = is_same_talk and after.places.stop - row.places.stop < s.stride
        if is_near and not row.message.prompt:  # ready pairs all stay
            row.rule = "between rows (--stride)"
        else:
            after = row


# ---- rows as the trainer reads them --------------------------------------------------------------
def settle_names(rows, s):
    """Decide whether the model sees names, and make the templates say so."""
    authors = [message.author for row in rows for message in (*row.context, row.message)]
    others = set(authors) - {s.only_author}
    is_known = sum(map(bool, authors)) > len(authors) / 2
    s.names = bool(s.names) and is_known and (s.shape == "prompt" or len(others) > 1)
    optional = r"\[([^\[\]]*\{author\}[^\[\]]*)\]"
    for name in "prompt", "question_prompt":
        setattr(s, name, re.sub(optional, r"\1" if s.names else "", getattr(s, name)))


def training_row(row, s):
    r"""Return the row as mlx-lm reads it.

    ann "hi", bob "hello" → {"prompt": "ann: hi\n\nWrite …, as bob.", "completion": "hello"}
    """
    if row.message.prompt:
        return {"prompt": row.message.prompt, "completion": row.reply}
    context = [(message.author, message.text) for message in row.context]
    is_question = row.reply.endswith(("?", "？", "؟"))
    chat = make_chat(context, row.author, s, is_question)
    if s.shape == "turns":
        return {"messages": [*chat, {"role": "assistant", "content": row.reply}]}
    return {"prompt": chat[0]["content"], "completion": row.reply}


# ---- count tokens, fit, order --------------------------------------------------------------------
def find_tokenizer(s):
    """Return the tokenizer of the base model, None if there is no base model."""
    folder = Path("models/base", s.model)
    if not folder.is_dir():
        others = sorted(path.parent.name for path in folder.parent.glob("*/config.json"))
        what = f"there is no base model in {folder}, so tokens are ESTIMATED"
        common.warn(what, common.download(s.model), *(f"export MODEL={name}" for name in others))
        return None
    from models.chat_template import load_tokenizer  # here, because it takes a second

    try:
        tokenizer = load_tokenizer(folder)
        count_tokens([{"prompt": "Hi!", "completion": "Hello"}], tokenizer)
    except Exception as error:  # whatever a broken download leads to
        fail(f"the tokenizer of {folder} does not work: {error!r}", common.download(s.model))
    return tokenizer


def count_tokens(rows, tokenizer):
    """Return the tokens of each row of the data, as the trainer counts them, or an estimate."""
    chats = [common.chat_of(row) for row in rows]
    if not tokenizer:
        return [12 + sum(len(turn["content"].encode()) for turn in chat) // 3 for chat in chats]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    return [len(tokens) for tokens in encode(texts, add_special_tokens=False)]


def fit(rows, s, tokenizer):
    """Make the rows fit --max-seq-length, if need be without their oldest messages; drop others."""
    for i in bar(range(0, len(rows), 1000), "counting tokens"):
        part = rows[i : i + 1000]
        counts = count_tokens([training_row(row, s) for row in part], tokenizer)
        for row, count in zip(part, counts, strict=True):
            row.tokens = count
            if row.tokens > s.max_seq_length:
                shorten(row, s, tokenizer)
            if row.tokens > s.max_seq_length:
                row.rule = "over --max-seq-length"


def shorten(row, s, tokenizer):
    """Cut a row that is too long down to as many of its newest messages as fit."""
    context = row.context
    fewest = 1 if s.shape == "turns" else 0
    for size in range(fewest, len(context)):
        shorter = replace(row, context=context[len(context) - size :])
        [tokens] = count_tokens([training_row(shorter, s)], tokenizer)
        if tokens > s.max_seq_length:
            return
        row.context, row.tokens = shorter.context, tokens


def drop_repeated(train, valid, s):
    """Drop the rows of valid that are, word for word, in train too."""
    trained = {str(training_row(row, s)) for row in train}
    for row in valid:
        if str(training_row(row, s)) in trained:
            row.rule = COPY


def order(rows, seed):
    """Return the rows, longest first: mlx-lm makes batches of neighbours, so little is padding.

    subtle: it drops the last rows where they fill no batch. So that these are no biased sample, as
    many as a batch of up to 16 may leave over stand at the end, drawn at random.
    """
    rest = max((len(rows) % batch for batch in range(1, min(16, len(rows)) + 1)), default=0)
    rows = shuffled(rows, seed)
    return sorted(rows[rest:], key=lambda row: -row.tokens) + rows[:rest]


# ---- tell what came out --------------------------------------------------------------------------
def tell_dropped(dropped):
    """Print how many rows each rule dropped, and the first of them."""
    first = {row.rule: " ".join(row.reply.split()) for row in reversed(dropped)}
    print(f"\n{'rule':30}{'dropped':>9}  for example")
    for rule, count in Counter(row.rule for row in dropped).most_common():
        print(visible(f"{rule:30}{count:>9,}  {first[rule]:.39}".rstrip()))
    print()


def tell_sizes(train, valid):
    """Print how many rows and tokens there are; prove that no message is in both sets."""
    for name, rows in ("train", train), ("valid", valid):
        tokens = [row.tokens for row in rows]
        say(name, f"{len(rows):,} rows, {sum(tokens):,} tokens, longest row {max(tokens):,}")
    held_out = set().union(*(row.places for row in valid))
    if any(not held_out.isdisjoint(row.places) for row in train):
        fail("a training row holds a message of a validation row", "# report this bug")
    say("held out", "no message of a validation row stands in a training row")
    say("one epoch", f"{len(train) // 2:,} iterations at BATCH_SIZE=2")


def tell_private(rows):
    """Print what may still be private in the messages of the rows, for --block."""
    texts = dict.fromkeys(text for row in rows for text in row.texts)
    found = [" ".join(part.split()) for part in map(looks_private, texts) if part]
    if found:
        say("private?", f"{len(found):,} found that may be a password, a code or an address:")
        for part in list(dict.fromkeys(found))[:8]:
            say("", f"  {part:.65}")
        say("", "to hide some, write them to a file, one a line, and add --block FILE")


ENOUGH = [  # from so many training rows on; tests/benchmarks/README.md has the measurements
    (0, "hardly: it learns little more than the tone; more chat helps most"),
    (100, "for the tone, yes; four times as much chat makes it a little better (loss -4 to -5 %)"),
    (500, "yes, to sound like somebody; four times as much is a little better (loss -4 to -5 %)"),
    (2000, "yes, plenty"),
]


def tell_who(train, authors, s):
    """Print whose replies are learned, and whether they are enough."""
    if s.only_author:
        who = s.only_author
    elif authors:
        who = f"everybody (as one of them: add --only-author {shlex.quote(authors[0])})"
    else:
        who = "everybody (the chat does not say who wrote what)"
    say("it learns", f"to reply as {who}")
    verdicts = [text for least, text in ENOUGH if len(train) >= least]
    say("enough?", verdicts[-1])


# ---- write ---------------------------------------------------------------------------------------
def write(folder, files):
    """Write {name: lines} to the folder, whole or not at all; return where the old one went."""
    with folders.work_folder(folder) as work:
        for name, lines in files.items():
            with (work / name).open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return folders.into_place(work, folder, ours=list(files))


def tell_replaced(before, version):
    """Say whose data were replaced, and which adapters were trained on them."""
    author = "somebody"
    with suppress(OSError, ValueError, LookupError, TypeError):  # it may be damaged
        author = json.loads((before / "settings.json").read_bytes())["only_author"] or "everybody"
    say("replaced", f"the data of {author}; they are in {before}")
    trained_on = common.checksum(before / "train.jsonl")
    for adapter in Path("models/adapters").glob(f"adapter-{version}_*"):
        if common.settings_of(adapter).get("TRAIN_SHA256") == trained_on:
            say("", f"{adapter} was trained on them")


# ---- the run -------------------------------------------------------------------------------------
def make_rows(raw, s, tokenizer):
    """Return the rows to train with, those to validate with, and those that are dropped."""
    tokens = control_tokens(tokenizer) if tokenizer else []
    tidy, tidy_name = cleaners("personal data" not in s.off, s.block, tokens)
    conversations = read(raw, tidy, tidy_name)
    s.only_author = tidy_name(s.only_author)
    check_author(conversations, s, raw)

    rows = lay_out(conversations, s)
    choose(rows, s)
    good = kept(rows)
    settle_names(good, s)
    talks = len({row.talk_number for row in good})
    seen = "sees" if s.names else "does not see"
    say("rows", f"{len(good):,} (talks: {talks:,}); the model {seen} who says what")

    train, valid = split(good, s.valid_size, s.valid_rows, s.seed) if good else ([], [])
    drop_copies(train, valid)
    valid = shuffled(kept(valid), s.seed)
    for row in valid[s.valid_rows :]:
        row.rule = "split: beyond --valid-rows"
    thin_out(train, s)
    train, valid = kept(train), kept(valid)
    fit(train + valid, s, tokenizer)
    drop_repeated(kept(train), kept(valid), s)

    dropped = sorted((row for row in rows if row.rule), key=lambda row: row.message.entry)
    return order(kept(train), s.seed), order(kept(valid), s.seed), dropped


def main():
    """Make the training data: the story of this script."""
    s = read_settings(sys.argv[1:])
    os.chdir(common.ROOT)
    raw, folder = find_raw(s.version), Path("data/for_train", s.version)
    say("reading", " ".join([str(raw), *sys.argv[1:]]))

    train, valid, dropped = make_rows(raw, s, find_tokenizer(s))
    tell_dropped(dropped)
    if not train or not valid:
        what = f"{raw}: {len(train) + len(valid)} rows are left, too few to split"
        fail(f"{what} (it takes about 30)", "# use a longer chat, or --off 'RULE' of the table")
    tell_sizes(train, valid)
    tell_private(train + valid)
    counts = Counter(row.author for row in train if row.author)
    authors = [author for author, _ in counts.most_common(100)]
    tell_who(train, authors, s)

    files = {
        "train.jsonl": [training_row(row, s) for row in train],
        "valid.jsonl": [training_row(row, s) for row in valid],
        "dropped.jsonl": [
            {"entry": row.message.entry, "rule": row.rule, "message": row.reply} for row in dropped
        ],
        "settings.json": [vars(s) | {"authors": authors}],
    }
    before = write(folder, files)
    if before:
        tell_replaced(before, s.version)
    say("written", f"{folder}/: {', '.join(files)}")
    say("next", f"VERSION={s.version} MODEL={s.model} ./fine_tune.sh")


if __name__ == "__main__":
    main()
