"""What is learned of a chat: build_train.py. Kills and full disks are in test_faults.py."""
# ruff: noqa: RUF001 (chat in many scripts)

import build_train
from data.clean import cleaners
from data.messages import Message, parse
from models import common, folders

import json
import random
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

table = pytest.mark.parametrize


# ---- helpers -------------------------------------------------------------------------------------
def made(entries, *flags):
    """Return ({entry: row of the data}, {entry: rule that dropped it}); nothing is split."""
    s = build_train.read_settings([*map(str, flags)])
    tidy, name = cleaners("personal data" not in s.off, None, [])
    entries = [e if isinstance(e, dict) else {"message": e} for e in entries]
    messages = [parse(number, entry, tidy, name) for number, entry in enumerate(entries)]
    rows = build_train.lay_out({"": messages}, s)
    build_train.choose(rows, s)
    kept = build_train.kept(rows)
    build_train.settle_names(kept, s)
    data = {row.message.entry: build_train.training_row(row, s) for row in kept}
    return data, {row.message.entry: row.rule for row in rows if row.rule}


def talk(count, seed=0):
    """Return messages that are all different: "sugo gatto brodo no0x", …"""
    draw = random.Random(seed)
    words = ["sugo", "gatto", "sedia", "brodo", "nonna", "rigore"]
    return [f"{' '.join(draw.sample(words, 3))} no{i}x" for i in range(count)]


def by(names, texts):
    """Return a log in which these authors speak by turns."""
    return [{"author": names[i % len(names)], "message": text} for i, text in enumerate(texts)]


def at(*messages):
    """Return a log of (minute, author, text)."""
    return [{"time": 60 * when, "author": who, "message": text} for when, who, text in messages]


def windows(log, size=10):
    """Return the log as replies that bring what came before them."""
    return [
        {"previous_messages": log[max(0, i - size) : i], "message": log[i]}
        for i in range(1, len(log))
    ]


def after(context, reply):
    return {"previous_messages": context.split("|"), "message": reply}


def marks(rows):
    """Return the messages of talk() that stand in a row or in many: {"no7x", …}."""
    return set(re.findall(r"no\d+x", str(rows)))


class Chat:
    """A project without a base model, so that tokens are estimated."""

    def __init__(self, root, monkeypatch, capsys):
        self.root, self.out = root, root / "data/for_train/v1"
        self.monkeypatch, self.capsys = monkeypatch, capsys
        (root / "data/raw").mkdir(parents=True)
        monkeypatch.setattr(common, "ROOT", root)
        monkeypatch.chdir(root)

    def build(self, entries, *flags):
        """Run the script; return what it printed."""
        (self.root / "data/raw/messages_v1.json").write_text(json.dumps(entries))
        names = ["--version", "v1", "--model", "none"]
        self.monkeypatch.setattr(sys, "argv", ["build_train.py", *names, *map(str, flags)])
        build_train.main()
        return self.capsys.readouterr().out

    def fail(self, entries, *flags):
        """Run the script, which fails; return its error and its FIX."""
        with pytest.raises(SystemExit):
            self.build(entries, *flags)
        return self.capsys.readouterr().err.splitlines()[-2:]

    def lines(self, name):
        return [json.loads(line) for line in (self.out / name).read_text("utf-8").splitlines()]

    def sides(self):
        return self.lines("train.jsonl"), self.lines("valid.jsonl")

    def content(self):
        return {path.name: path.read_bytes() for path in self.out.iterdir()}


@pytest.fixture
def chat(tmp_path, monkeypatch, capsys):
    return Chat(tmp_path / "my project", monkeypatch, capsys)


# ---- settings ------------------------------------------------------------------------------------
USAGE = [
    (["--valid-size", "1"], "--valid-size has to be between 0 and 1"),
    (["--window", "0"], "--window, --stride and --valid-rows have to be 1 or more"),
    (["--prompt", "hello"], "--prompt and --question-prompt need {context}"),
    (["--shape", "turns"], "--shape turns needs --only-author"),
    (["--off", "lnik"], "--off names 'lnik', and the rules are: empty, "),
    (["--only-author", "ann", "--only-author", "bob"], "--only-author takes one name"),
    (["--frob", "3"], "unrecognized arguments: --frob"),
]


@table(("flags", "what"), USAGE)
def test_wrong_usage_is_answered_before_anything_is_read(capsys, flags, what):
    with pytest.raises(SystemExit) as stop:
        build_train.read_settings(flags)
    error, fix = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and error.startswith(f"error: {what}")
    assert fix == "FIX: python build_train.py --help"


@table("words", [["Ann", "Lee"], ["“Ann", "Lee”"]])
def test_a_name_without_its_quotes_gets_them(capsys, words):
    with pytest.raises(SystemExit):
        build_train.read_settings(["--only-author", *words])
    assert "FIX: python build_train.py --only-author 'Ann Lee'\n" in capsys.readouterr().err


def test_settings_json_says_how_the_rows_were_made(chat):
    chat.build(by("abbccc", talk(400)), "--window", 3, "--stride", 1)
    [s] = chat.lines("settings.json")
    expected = {"version": "v1", "shape": "prompt", "names": True, "window": 3, "only_author": ""}
    assert (expected | {"authors": ["c", "b", "a"]}).items() <= s.items()
    assert s["prompt"] == "{context}\n\nWrite the next message of this chat, as {author}."


# ---- who is learned ------------------------------------------------------------------------------
THREE = by(["Bob", "Bob", "Ann", "Eve Lin"], talk(60))
STRANGERS = [
    (THREE, "An", " --only-author Ann"),
    (THREE, "zzz", " --only-author Bob"),
    (THREE, "Eve Li", " --only-author 'Eve Lin'"),
    (talk(60), "An", ""),
]


@table(("log", "name", "flag"), STRANGERS)
def test_an_author_who_is_not_there_is_answered_with_one_who_is(chat, log, name, flag):
    _, fix = chat.fail(log, "--only-author", name)
    assert fix == f"FIX: VERSION=v1 python build_train.py{flag}"


def test_an_author_of_another_chat_is_found_there(chat):
    family = chat.root / "data/raw/messages_family.json"
    family.write_text('[{"author": "Zoë", "message": "hi"}]', "utf-8")
    fixes = chat.fail(THREE, "--only-author", "Zoë")
    assert fixes[0] == "FIX: export VERSION=family"


def test_an_author_who_is_a_telephone_number_may_be_named_by_it(chat):
    number = "+39 333 123 4567"
    printed = chat.build(by(["bob", number], talk(400)), "--only-author", number)
    assert "it learns  to reply as Person 1\n" in printed
    assert not [name for name, text in chat.content().items() if number.encode() in text]


# ---- talks ---------------------------------------------------------------------------------------
@table(("gap", "hours", "talks"), [(6, 5.9, 1), (6, 6.1, 2), (0, 99, 1), (2, 3, 2)])
def test_a_silence_longer_than_the_gap_ends_a_talk(gap, hours, talks):
    log = at((0, "ann", "hi all"), (60 * hours, "bob", "hi!"))
    assert [*made(log, "--gap", gap)[1].values()] == ["no context"] * talks


def timed(texts):
    return [{"message": text, "time": 1e9 + 60 * i} for i, text in enumerate(texts)]


def test_a_log_out_of_order_is_sorted_by_its_times():
    log = timed(talk(200))
    mixed = [log[i // 2 if i % 2 else 199 - i // 2] for i in range(200)]  # half of it goes back
    rows = {str(row) for row in made(log, "--gap", 0)[0].values()}
    assert {str(row) for row in made(mixed, "--gap", 0)[0].values()} == rows


def test_a_clock_without_am_and_pm_does_not_change_the_order():
    log = timed(talk(200))
    for entry in log[100:]:
        entry["time"] -= 12 * 3600
    data, _ = made(log, "--gap", 0)
    assert marks(data[100]["prompt"]) == {f"no{i}x" for i in range(90, 100)}
    assert made(log)[1] == {0: "no context", 100: "no context"}  # twelve hours are a silence


BURST = at((0, "ann", "hi"), (1, "ann", "are you there?"), (4, "ann", "or not"), (5, "bob", "yes"))
BURSTS = [
    (0, "ann: hi\nann: are you there?\nann: or not"),
    (1.5, "ann: hi\nare you there?\nann: or not"),
    (5, "ann: hi\nare you there?\nor not"),
]


@table(("minutes", "context"), BURSTS)
def test_what_one_author_writes_at_a_stretch_may_become_one_message(minutes, context):
    data, _ = made(BURST, "--burst", minutes, "--prompt", "{context}")
    assert data[3]["prompt"] == context


def test_messages_without_an_author_are_never_joined():
    data, _ = made([{"message": text} for text in ("hi", "you", "so")], "--burst", 5)
    assert data[2]["prompt"].startswith("hi\nyou\n\n")


TALK = by(["ann", "bob", "cy", "ann", "ann", "bob", "ann"],
    ["me first", "hi", "you", "what", "is it", "no", "fine"])  # fmt: skip


def test_turns_are_a_talk_of_the_author_with_the_others():
    data, _ = made(TALK, "--only-author", "ann")
    contents = [turn["content"] for turn in data[6]["messages"]]
    assert contents == ["bob: hi\ncy: you", "what\nis it", "bob: no", "fine"]
    assert data[6]["messages"][-1]["role"] == "assistant"


def test_in_a_talk_of_two_the_other_needs_no_name():
    data, _ = made(by("ab", ["hi", "you", "so"]), "--only-author", "b")
    assert data[1]["messages"][0]["content"] == "hi"


# ---- windows that are cut already ----------------------------------------------------------------
def test_windows_that_are_cut_already_keep_exactly_their_messages():
    log = talk(99)
    entries = [*windows(log[:50], 4), *windows(log[50:], 30)]
    data, _ = made(entries, "--window", 7, "--prompt", "{context}")
    assert [row["prompt"].split("\n") for row in data.values()] == [
        entry["previous_messages"] for entry in entries
    ]


def test_windows_are_laid_end_to_end_by_what_they_share():
    s = build_train.read_settings([])
    texts = ["a b c", "b c d", "c d X", "c d f", "x y"]  # X: a reply that no context holds
    messages = [Message(t.split()[-1], context=[Message(u) for u in t.split()[:-1]]) for t in texts]
    rows = build_train.rows_of_ready(messages, 0, 0, False, s)
    places = [(0, 0, 1, 2), (0, 1, 2, 3), (0, 2, 3, 4), (0, 2, 3, 4), (1, 15, 16)]
    assert [(row.talk_number, *row.places) for row in rows] == places
    rows = build_train.rows_of_ready(messages, 0, 0, True, s)
    assert {row.talk_number for row in rows} == {0}  # all of one conversation


# ---- rules ---------------------------------------------------------------------------------------
BAD_REPLIES = [
    ("\u200b \u2800\u3164", "empty"),
    ("!so mirtilla_wav", "bot command"),
    ("/msg ann hello", "bot command"),
    ("guarda https://example.com/a", "link"),
    ("WWW.EXAMPLE.COM", "link"),
    ("clips.twitch.tv/Abc", "link"),
    ("W", "too short"),
    ("bla " * 251, "too long"),
    ("noooooooooooooooooo", "same character"),
    ("LULW LULW lulw LULW LULW LULW", "same words"),
    ("compra ora compra ora compra ora", "same words"),
    ("⣿⣿⣷⡁⢆⠈⠕⢕⢂⢕⢂⢕⢂⢔⢂⢕⢄⠂⣂⠂⠆⢂⢕⢂⢕⢂⢕⢂⢕⢂⢕⢂⢕⢂⢕⢂⢕⢂⢕⢂⢕", "no letters"),
    ("chiama +39 333 123 4567", "personal data"),
]


@table(("reply", "rule"), BAD_REPLIES)
def test_a_bad_reply_is_dropped_by_its_rule_unless_that_is_off(reply, rule):
    entries = [after("hi all|hi!", reply)]
    assert made(entries)[1] == {0: rule}
    assert made(entries, "--off", rule)[1].get(0) != rule


GOOD = """
perché no?|今日は寒いね|مرحبا بكم|क्या हाल है|да ладно|ไม่เป็นไรนะ|ok|ahahahahahah|😂😂
+1|NOOOOOOO|gg gg gg|!|<3|e/o|si.no.boh|/etc/fstab non va|uso std::vector<int>, </h1>
"""


def test_a_good_reply_is_kept_as_it_is():
    replies = GOOD.strip().replace("\n", "|").split("|")
    data, _ = made([after("how", reply) for reply in replies], "--off", "too short")
    assert [data[i]["completion"] for i in range(len(replies))] == replies


LOG = ["hi all", "hi!", "we are ready", "so?"]
ALIKE = [
    after("ciao, come va?|Bene!", "Anche io!"),
    after("CIAO come va| bene", "anche io..."),
    after("ciao, come va?|male", "Anche io"),
]
DROPPED = {  # case: (entries, flags, {entry: rule})
    "nothing before it": (LOG, [], {0: "no context"}),
    "nothing in it": (["\u200b", *LOG], [], {0: "empty", 1: "no context"}),
    "by a bot": (by(["ann", "NightBot"], LOG), [], {0: "no context", 1: "bot", 3: "bot"}),
    "by others": (by("ab", LOG[1:]), ["--only-author", "b"], {0: "no context", 2: "other author"}),
    "after numbers": ([after("1|2,5|-3|4|ok", "vince")], [], {0: "numbers"}),
    "after some numbers": ([after("1|2|3|vai|ok", "vince")], [], {}),
    "again to the same context": (ALIKE, [], {1: "duplicate"}),
}


@table("case", DROPPED)
def test_a_reply_is_dropped_for_what_stands_before_it_and_for_its_author(case):
    entries, flags, rules = DROPPED[case]
    assert made(entries, *flags)[1] == rules


def test_a_pasted_wall_is_kept_once_and_a_stock_reply_up_to_its_share():
    log = talk(1000)
    laughs = [i for i in range(10, 990, 4) if i % 100]
    for i in laughs:
        log[i] = "LULW"
    for i in 100, 200, 300:
        log[i] = f"Buonasera, sono la tua sedia, {'e oggi parlo io, ' * 4}ecco."
    data, rules = made(log)
    assert [i for i in rules if rules[i] == "pasted again"] == [200, 300]
    kept = [i for i in laughs if i in data]
    assert 10 < len(kept) <= 0.02 * len(data)
    assert kept[0] < 50 and kept[-1] > 900  # spread over time


@table("stride", [1, 10])
def test_every_entry_is_in_exactly_one_file(chat, stride):
    log = talk(600)
    log[50:60] = ["!uptime"] * 10
    log[300] = " ".join(f"lunga{i}" for i in range(99))
    flags = ["--valid-rows", 30, "--max-seq-length", 120, "--stride", stride]
    chat.build(windows(log), *flags)
    dropped = chat.lines("dropped.jsonl")
    entries = [line["entry"] for line in dropped]
    assert entries == sorted(set(entries))
    assert len(entries) == 599 - sum(map(len, chat.sides()))
    assert all(line["message"] == log[line["entry"] + 1] for line in dropped)


# ---- rows to train with, rows to validate with ---------------------------------------------------
FLAGS = ["", "--names 0", "--gap 0.2", "--burst 9", "--shape prompt"]


@table("flags", FLAGS)
def test_no_message_of_validation_is_trained_whatever_the_rows_look_like(chat, flags):
    """Every message is unlike all others, so a text tells its place."""
    draw, now, log = random.Random(2), 0, []
    for text in talk(1500):
        now += draw.expovariate(1 / 120)
        log.append({"message": text, "author": draw.choice("aabc"), "time": now})
    chat.build(log, "--only-author", "a", *flags.split())
    train, valid = map(marks, chat.sides())
    assert len(train) > 300 and len(valid) > 30 and not train & valid


def test_a_chat_that_was_exported_twice_is_not_validated_with_what_is_trained(chat):
    log = talk(400)
    chat.build([*log, "and now once more", *log[:250]], "--off", "duplicate")
    train, valid = ([marks(row) for row in side] for side in chat.sides())
    held = set().union(*valid)
    assert [row for row in train if len(held & row) >= 3] == []


def test_a_row_of_validation_that_training_repeats_word_for_word_does_not_count(chat):
    """In a hundred talks somebody says hi, and somebody else says it too."""
    log = [{"conversation": i, "message": text} for i in range(100) for text in ("hi", "hello you")]
    chat.build(log + [{"message": text} for text in talk(300)], "--off", "duplicate,stock reply")
    train, valid = ([str(row) for row in side] for side in chat.sides())
    assert valid and not set(train) & set(valid)
    rules = [line["rule"] for line in chat.lines("dropped.jsonl")]
    assert rules.count("split: is in train as well") > 3


def test_training_rows_follow_one_another_and_hold_what_all_rows_would(chat):
    log = by("ab", talk(300))
    chat.build(log, "--stride", 1)
    every, valid = chat.sides()
    chat.build(log)
    spaced, same = chat.sides()
    assert same == valid
    assert len(spaced) < len(every) / 8 and {*map(str, spaced)} < {*map(str, every)}
    assert len(marks(spaced)) > 0.9 * len(marks(every))


def test_ready_pairs_are_all_trained_also_where_they_overlap(chat):
    log = talk(300)
    pairs = [
        {"prompt": "\n".join(log[max(0, i - 5) : i]), "completion": log[i]} for i in range(1, 300)
    ]
    chat.build(pairs)
    assert len(chat.sides()[0]) > 200


# ---- names and prompts ---------------------------------------------------------------------------
TASK = "Write the next message of this chat"
ONLY = ["--prompt", "{context}"]
PROMPTS = {  # the prompt of the last reply: (entries, flags, prompt)
    "names": (by("abc", LOG[:3]), [], f"a: hi all\nb: hi!\n\n{TASK}, as c."),
    "no names": (by("abc", LOG[:3]), ["--names", 0], f"hi all\nhi!\n\n{TASK}."),
    "a name of many": (by(["ann", "bob", None], LOG[:3]), ONLY, "ann: hi all\nbob: hi!"),
    "few names": (by([None, None, "bob"], LOG[:3]), ONLY, "hi all\nhi!"),
    "question": (["hi", "so?"], [], "hi\n\nAsk the next question in this chat."),
    "そう？": (["poi", "そう？"], ["--question-prompt", "Ask: {context}"], "Ask: poi"),
    "new line": (LOG[:2], ["--prompt", "{context}\\n>"], "hi all\n>"),
    "personal data": (["ring ann@example.com now", "ok"], ONLY, "ring […] now"),
    "personal data off": (["ring a@b.it", "ok"], [*ONLY, "--off", "personal data"], "ring a@b.it"),
}


@table("case", PROMPTS)
def test_the_prompt_is_what_the_model_sees_before_the_last_reply(case):
    entries, flags, prompt = PROMPTS[case]
    rows, _ = made(entries, *flags)
    assert rows[max(rows)]["prompt"] == prompt


# ---- count tokens, fit, order --------------------------------------------------------------------
LENGTHS = [("prompt", 7), ("turns", 8)]  # messages of ten letters that fit into 40 tokens


def row_of(texts):
    *context, reply = [Message(text, "ab"[i % 2]) for i, text in enumerate(texts)]
    return build_train.Row(context, reply, 0, range(len(texts)))


@table(("shape", "count"), LENGTHS)
def test_a_row_that_is_too_long_loses_as_few_of_its_oldest_messages_as_possible(shape, count):
    flags = ["--max-seq-length", "40", "--prompt", "{context}", "--names", "0"]
    s = build_train.read_settings([*flags, "--only-author", "a", "--shape", shape])
    row = row_of(["x" * 10] * 20 + ["reply"])
    context = row.context
    build_train.fit([row], s, None)
    assert row.context == context[-count:] and row.tokens <= 40


@table(("shape", "rule"), [("prompt", ""), ("turns", "over --max-seq-length")])
def test_a_prompt_may_lose_its_whole_context_but_turns_need_a_user(shape, rule):
    flags = ["--max-seq-length", "40", "--only-author", "b", "--shape", shape]
    row = row_of(["x" * 300, "reply"])
    build_train.fit([row], build_train.read_settings(flags), None)
    assert row.rule == rule


@pytest.mark.slow
def test_tokens_are_those_of_the_trainer(template):
    from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset
    from mlx_lm.utils import load_tokenizer

    texts = ["ciao", "perché no? 😂", "a <b> c", "<think>hm</think> sì", "<end_of_turn>", "x\ny"]
    tokenizer = load_tokenizer(template / "models/base/tiny-gemma-3")
    pairs = [{"prompt": a, "completion": b} for a in texts for b in texts]
    roles = ["user", "assistant"] * 3
    talks = [
        {"messages": [{"role": r, "content": texts[(i + n) % 6]} for n, r in enumerate(roles)]}
        for i in range(6)
    ]
    of_pairs = CompletionsDataset(pairs, tokenizer, "prompt", "completion", False)
    for rows, trainer in (pairs, of_pairs), (talks, ChatDataset(talks, tokenizer)):
        expected = [len(trainer.process(row)[0]) for row in rows]
        assert build_train.count_tokens(rows, tokenizer) == expected


def rows_of(lengths):
    return [build_train.Row([], Message(str(n)), 0, range(1), tokens=n) for n in lengths]


@pytest.mark.slow
@table("batch", [4, 16])
def test_order_gives_batches_of_equal_length_in_mlx_lm(batch):
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import iterate_batches

    class Tokens(list):
        def process(self, row):
            return row

    def cost(rows):
        """Return the tokens that are computed for each token that is in a row."""
        tokens = Tokens(([1] * row.tokens, 0) for row in rows)
        batches = list(iterate_batches(CacheDataset(tokens), batch, 4096, seed=0))
        return sum(b.size for b, _ in batches) / sum(n[:, 1].sum().item() for _, n in batches)

    draw = random.Random(0)
    rows = rows_of([int(draw.lognormvariate(5, 0.6)) + 1 for _ in range(1999)])
    ordered = build_train.order(rows, 0)
    assert sorted(row.tokens for row in ordered) == sorted(row.tokens for row in rows)
    ideal = cost(sorted(rows, key=lambda row: row.tokens))
    assert cost(ordered) <= 1.03 * ideal < 1.2 * ideal < cost(rows)


def test_the_longest_rows_are_first_in_the_file(chat):
    draw = random.Random(0)
    log = [" ".join([text, *talk(draw.randrange(9), i)]) for i, text in enumerate(talk(400))]
    chat.build(log, "--window", 2)
    sizes = [len(str(row)) for row in chat.sides()[0]]
    assert sizes[0] > sizes[40] > sizes[80] > sizes[120]


@table("batch", [7, 16])
def test_rows_that_do_not_fill_a_batch_are_no_biased_sample(batch):
    left_out = []
    for seed in range(60):
        rows = build_train.order(rows_of(range(1, 1015 - batch)), seed)
        left_out += [row.tokens for row in rows[len(rows) - len(rows) % batch :]]
    assert 0.75 < sum(left_out) / len(left_out) / 500 < 1.25


# ---- the base model ------------------------------------------------------------------------------
def test_without_the_base_model_tokens_are_estimated_and_that_is_said(chat):
    (chat.root / "models/base/tiny").mkdir(parents=True)
    (chat.root / "models/base/tiny/config.json").write_text("{}")
    assert build_train.find_tokenizer(build_train.read_settings(["--model", "none"])) is None
    assert chat.capsys.readouterr().err.splitlines() == [
        "warning: there is no base model in models/base/none, so tokens are ESTIMATED",
        "FIX: hf download mlx-community/none --local-dir models/base/none",
        "FIX: export MODEL=tiny",
    ]


def test_a_base_model_that_does_not_work_is_named(chat, template):
    base = shutil.copytree(template / "models/base/tiny-gemma-3", chat.root / "models/base/tiny")
    (base / "tokenizer.json").write_text('{"version": "1.0"')
    error, fix = chat.fail(talk(60), "--model", "tiny")
    assert "the tokenizer of models/base/tiny does not work: " in error
    assert fix == "FIX: hf download mlx-community/tiny --local-dir models/base/tiny"


# ---- what is printed and written -----------------------------------------------------------------
REPORT = r"""
rule +dropped  for example
between rows .*
bot command +1  !discord

train      \d\d rows, [\d,]+ tokens, longest row \d+
valid      \d\d rows, [\d,]+ tokens, longest row \d+
held out   no message of a validation row stands in a training row
one epoch  \d+ iterations at BATCH_SIZE=2
private\?   1 found that may be a password, a code or an address:
             password is gattonero
           to hide some, write them to a file, one a line, and add --block FILE
it learns  to reply as everybody \(as one of them: add --only-author (ann|bob)\)
enough\?    hardly: it learns little more than the tone; more chat helps most
written    data/for_train/v1/: train\.jsonl, valid\.jsonl, dropped\.jsonl, settings\.json
next       VERSION=v1 MODEL=none \./fine_tune\.sh
"""


def test_the_report_tells_what_was_dropped_who_is_learned_and_what_comes_next(chat):
    log = ["hi", "!discord", *talk(400)]
    log[200] = "the password is gattonero"
    printed = chat.build(by(["ann", "bob"], log))
    for line in REPORT.strip().splitlines():
        assert re.search(rf"^{line}$", printed, re.M), line
    assert "replaced" not in printed


def test_what_is_replaced_is_told_and_kept(chat):
    log = by(["ann", "bob"], talk(400))
    chat.build(log, "--only-author", "ann")
    before = chat.content()
    trained_on = common.checksum(chat.out / "train.jsonl")
    for name, checksum in ("tiny", trained_on), ("other", "0"):
        (chat.root / f"models/adapters/adapter-v1_{name}").mkdir(parents=True)
        settings = chat.root / f"models/adapters/adapter-v1_{name}/settings"
        settings.write_text(f"TRAIN_SHA256={checksum}\n")
    (chat.out / "notes.txt").write_text("mine")
    printed = chat.build(log, "--only-author", "bob")
    kept = "data/for_train/v1.before"
    assert re.search(rf"replaced   the data of ann; they are in {kept}\n"
        r" +models/adapters/adapter-v1_tiny was trained on them\nwritten", printed)  # fmt: skip
    assert before == {name: (chat.root / kept / name).read_bytes() for name in before}
    assert (chat.out / "notes.txt").read_text() == "mine"


@table("entries", [["!a", "!b"], ["what is it", "that is it", "so it is"]])
def test_too_few_rows_are_refused_and_the_output_stays_as_it_was(chat, entries):
    chat.build(talk(60))
    before = chat.content()
    error, fix = chat.fail(entries)
    assert "rows are left, too few to split" in error and fix.startswith("FIX: # use a longer chat")
    assert chat.content() == before
    assert {path.name for path in chat.out.parent.iterdir()} == {"v1", ".v1.lock"}


def test_what_a_killed_build_left_goes_with_the_next(chat):
    left = chat.out.parent / ".v1.work"
    left.mkdir(parents=True)
    (left / "train.jsonl").write_text("half a ro")
    chat.build(talk(60))
    assert {path.name for path in chat.out.parent.iterdir()} == {"v1", ".v1.lock"}


def test_of_two_builds_at_once_the_second_waits(tmp_path):
    def build(number):
        with folders.work_folder(tmp_path / "v1") as work:
            (work / number).touch()
            time.sleep(0.05)
            return [path.name for path in work.iterdir()]

    with ThreadPoolExecutor() as pool:
        assert [*pool.map(build, "abcd")] == [["a"], ["b"], ["c"], ["d"]]


def test_chat_text_cannot_write_to_the_terminal(chat):
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e https://x.example/"
    log = by([evil + name for name in "abc"], [evil + text for text in talk(60)])
    printed = chat.build([entry | {evil: 1} for entry in log], "--off", "link")
    printed += str(chat.fail(log, "--only-author", evil)).replace("\\n", "\n")
    assert all(letter.isprintable() or letter == "\n" for letter in printed)


def test_the_same_input_and_seed_give_the_same_bytes_in_every_process(project, run):
    contents = []
    for hash_seed, language, seed in ("1", "C", 0), ("2", "it_IT.UTF-8", 0), ("1", "C", 1):
        env = {"MODEL": "none", "PYTHONHASHSEED": hash_seed, "LC_ALL": language}
        assert run(project, "build_train.py", "--seed", seed, env=env).returncode == 0
        folder = project / "data/for_train/sample"
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    assert contents[0]["valid.jsonl"] != contents[2]["valid.jsonl"]
