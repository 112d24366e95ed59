"""What build_train.py promises about training data; kills and full disks are in test_faults.py."""
# ruff: noqa: RUF001 (chat in many scripts)

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

RELAXED = settings(
    deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)
ALL_UNICODE = st.text(st.characters())  # control characters and lone surrogates too
ERROR = re.compile(r"error: .+\. FIX: .+")
table = pytest.mark.parametrize


# ---- helpers -------------------------------------------------------------------------------------
sys.path.insert(0, str(REPOSITORY))
handler = signal.getsignal(signal.SIGINT)
import build_train  # noqa: E402 (it is no package)

signal.signal(signal.SIGINT, handler)  # as it was


def made(entries, *flags):
    """Return ({entry: row of the data}, {entry: rule that dropped it}, settings); no split."""
    s = build_train.settings([*map(str, flags)])
    tidy, name = build_train.cleaners(s, [])
    items = [e if isinstance(e, dict) else {"message": e} for e in entries]
    conversations = {"": [build_train.parse(i, e, tidy, name) for i, e in enumerate(items)]}
    s.only_author = name(s.only_author)
    dropped = []
    rows = build_train.choose(build_train.lay_out(conversations, s, dropped), s, dropped)
    build_train.settle_names(rows, s)
    data = {row.entry: build_train.training_row(row, s) for row in rows}
    return data, {row.entry: rule for row, rule in dropped}, s


class Project:
    """A folder with nothing but the script; without a base model, so that tokens are estimated."""

    def __init__(self, root):
        self.root, self.out = root, root / "data/for_train/v1"
        (root / "data/raw").mkdir(parents=True)
        self.script = shutil.copy(REPOSITORY / "build_train.py", root)

    def raw(self, content, name="messages_v1.json"):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (self.root / "data/raw" / name).write_bytes(content)

    def build(self, *flags):
        """Run main(); return None if it went well, the error message if not."""
        folder, arguments = os.getcwd(), sys.argv
        build_train.__file__ = str(self.script)  # says where the project is
        sys.argv = ["build_train.py", "--version", "v1", "--model", "none", *map(str, flags)]
        try:
            build_train.main()
        except SystemExit as stop:
            return stop.code
        finally:
            os.chdir(folder)
            sys.argv = arguments

    def start(self, *flags, env=None):
        """Start the script as a person does."""
        command = [sys.executable, self.script, "--version", "v1", "--model", "none", *flags]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(list(map(str, command)), env=os.environ | (env or {}), **streams)

    def lines(self, name):
        text = (self.out / name).read_text("utf-8")
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def sides(self):
        return self.lines("train.jsonl"), self.lines("valid.jsonl")

    def content(self):
        return {path.name: path.read_bytes() for path in self.out.iterdir()}

    def folders(self):
        return sorted(path.name for path in self.out.parent.iterdir())


@pytest.fixture
def chat(tmp_path):
    return Project(tmp_path / "my project")


@pytest.fixture
def built(chat):
    """A project that was built once, from 59 windows."""
    chat.raw(windows(talk(60)))
    assert chat.build() is None
    return chat


def windows(log, size=10):
    """Return the guide's entries of a log."""
    return [
        {"previous_messages": log[max(0, i - size) : i], "message": log[i]}
        for i in range(1, len(log))
    ]


def talk(count, seed=0, stock=0.0):
    """Return a log of messages that are all different, but for a share of stock replies."""
    draw = random.Random(seed)
    words = ["sugo", "gatto", "sedia", "brodo", "nonna", "rigore"]
    texts = (f"{' '.join(draw.sample(words, 3))} no{i}x" for i in range(count))
    return [
        draw.choice(["LULW", "gg", "ahaha"]) if draw.random() < stock else text for text in texts
    ]


def reply_to(context, reply):
    return {"previous_messages": context.split("|"), "message": reply}


def by(names, texts):
    """Return a log in which these authors speak by turns."""
    return [{"author": names[i % len(names)], "message": text} for i, text in enumerate(texts)]


def at(*messages):
    """Return a log of (minute, author, text)."""
    return [{"time": 60 * when, "author": who, "message": text} for when, who, text in messages]


def turns(*texts):
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


def messages_in(rows):
    """Return the marks of the messages of talk() in a row or in many: {"no7x", …}."""
    return set(re.findall(r"no\d+x", str(rows)))


def cells(text):
    return text.strip().replace("\n", "|").split("|")


# ---- settings ------------------------------------------------------------------------------------
USAGE = [
    (["--valid-size", "1"], "--valid-size has to be between 0 and 1"),
    (["--window", "0"], "--window, --stride and --valid-rows have to be 1 or more"),
    (["--prompt", "hello"], "need {context}"),
    (["--shape", "turns"], "--shape turns needs --only-author"),
    (["--off", "lnik"], "--off names 'lnik', and the rules are: empty, "),
    (["--only-author", "‘Ann", "Lee’"], " --only-author 'Ann Lee'"),
    (["--off", "too", "short", "--gap", "3"], " --off 'too short' --gap 3"),
    (["--frob", "3"], "FIX: python build_train.py --help"),
    (["--model", "mlx-community/gemma"], "FIX: export MODEL=gemma"),
    (["--model", ""], "FIX: export MODEL=gemma-3-text-27b-it-4bit"),
    (["--version", "my chat"], "FIX: export VERSION=my_chat"),
    (["--version", "…"], "FIX: export VERSION=v1"),
]


@table(("flags", "message"), USAGE)
def test_wrong_usage_is_answered_before_anything_is_read(chat, capsys, flags, message):
    got = chat.build(*flags)
    is_name = flags[0] in ("--model", "--version")
    error = got if is_name else capsys.readouterr().err.strip().split("\n")[-1]
    assert is_name or got == 2
    assert ERROR.fullmatch(error) and message in error


def test_settings_json_says_how_the_rows_were_made(chat):
    chat.raw(by("abbccc", talk(400)))
    assert chat.build("--window", 3, "--stride", 1) is None
    [s] = chat.lines("settings.json")
    expected = {"version": "v1", "shape": "prompt", "names": True, "window": 3}
    assert (expected | {"authors": ["c", "b", "a"]}).items() <= s.items()
    assert s["prompt"] == "{context}\n\nWrite the next message of this chat, as {author}."
    assert set(s) == {"authors"} | set(vars(build_train.parser.parse_args([])))


# ---- filter --------------------------------------------------------------------------------------
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
    entries = [reply_to("hi all|hi!", reply)]
    assert made(entries)[1] == {0: rule}
    assert made(entries, "--off", rule)[1].get(0) != rule


GOOD = """
perché no?|今日は寒いね|مرحبا بكم|क्या हाल है|да ладно|ไม่เป็นไรนะ|ok|ahahahahahah|😂😂
+1|NOOOOOOO|gg gg gg|!|<3
e/o|si.no.boh|/etc/fstab non va|kernel 2.6.8.1-3|192.168.100.200|alle 19:30 del 12/05/2024
sono 14.500 euro|che bello!! 10/10|@giada_ohm ciao|2004-12-25 10:30|l'ho pagato 1.234.567 lire
uso std::vector<int>, </h1>
"""


def test_a_good_reply_is_kept_as_it_is():
    entries = [reply_to("how", reply) for reply in cells(GOOD)]
    data = made(entries, "--off", "too short")[0]
    assert [data[i]["completion"] for i in range(len(entries))] == cells(GOOD)


LOG = ["hi all", "hi!", "we are ready", "so?"]
ALIKE = [
    reply_to("ciao, come va?|Bene!", "Anche io!"),
    reply_to("CIAO come va| bene", "anche io..."),
    reply_to("ciao, come va?|male", "Anche io"),
]
DROPPED = {  # case: (entries, flags, {entry: rule})
    "nothing before it": (LOG, [], {0: "no context"}),
    "by a bot": (by(["ann", "NightBot"], LOG), [], {0: "no context", 1: "bot", 3: "bot"}),
    "by others": (by("ab", LOG[1:]), ["--only-author", "b"], {0: "no context", 2: "other author"}),
    "after numbers": ([reply_to("1|2,5|-3|4|ok", "vince")], [], {0: "numbers"}),
    "after some numbers": ([reply_to("1|2|3|vai|ok", "vince")], [], {}),
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
    data, rules, _ = made(log)
    assert [i for i in rules if rules[i] == "pasted again"] == [200, 300]
    kept = [i for i in laughs if i in data]
    assert 10 < len(kept) <= 0.02 * len(data)
    assert kept[0] < 50 and kept[-1] > 900  # spread over time


@table("stride", [1, 10])
def test_every_entry_is_in_exactly_one_file(chat, stride):
    log = talk(600, stock=0.1)
    log[50:60] = ["!uptime"] * 10
    log[300] = " ".join(f"lunga{i}" for i in range(99))
    chat.raw(windows(log))
    flags = ["--valid-rows", 30, "--max-seq-length", 120, "--stride", stride]
    assert chat.build(*flags) is None
    dropped = chat.lines("dropped.jsonl")
    entries = [line["entry"] for line in dropped]
    assert entries == sorted(set(entries))
    assert len(entries) == 599 - sum(map(len, chat.sides()))
    assert all(line["message"] == log[line["entry"] + 1] for line in dropped)


# ---- personal data -------------------------------------------------------------------------------
PERSONAL = """
anna.rossi+x@example.co.uk|+39 333 123 4567|3331234567!|(555) 123-4567|+4366412345678|@436641234567
wa.me/4366412345678|tel:0664123456|98765 43210|(11) 98765-4321|8 912 345-67-89|612 34 56 78
+1 (555) 123‑4567|06 12 34 56 78|06.12.34.56.78|0664/1234567|0171-1234567|02 1234 5678|138 1234 5678
010-1234-5678|9123 4567|20 12 34 56|555-1234|+43/664/1234567|00 43 664 1234567|0044 7400 123456
٠٥٠١٢٣٤٥٦٧|whatsapp://send?phone=39333123456|IT60 X054 2811 1010 0000 0123 456
it60x0542811101000000123456|DE89 3704 0044 0532 0130 00|GB82 WEST 1234 5698 7654 32
4111 1111 1111 1111|4111111111111111|378282246310005|3782 822463 10005|555.123.4567
"""
NOT_PERSONAL = """
TriHard 7|alle 10:30 o 11:45|3-0 2-1|6-4 7-5 6-7 3-6 7-6|1914-1918|2010/2011|il 31/12/2024 alle 10
1234-5 87-42|2024-05-31 18:04|2013-03-26-205909|kernel 2.6.15-27-686|v10.0.1.218|192.168.100.200
10.0.0.0/24|91.189.88.31:80|costa 1.234.567,89|2 000 000|14.500 euro|1234567|1 2 3 4 5 6 7 8 9 10
@anna7|[17180697.916000]|0x00060329|9582879ff7f8570a87554c|bugs.net/1234567|3.14159265358979
user@host
"""


def test_personal_data_of_all_countries_is_hidden():
    hidden = [build_train.hide_personal(f"ecco {text} ciao") for text in cells(PERSONAL)]
    assert [text for text in hidden if "[…]" not in text or re.search(r"\d", text)] == []


def test_other_numbers_are_not_hidden():
    for text in cells(NOT_PERSONAL):
        assert build_train.hide_personal(f"ecco {text} ciao") == f"ecco {text} ciao"


def test_ones_own_words_are_hidden_everywhere_but_not_within_words(tmp_path):
    (tmp_path / "words").write_text("\ufeffAnna\nvia  Roma 12\nC++\n张伟\n\n", encoding="utf-8")
    texts = ["ANNA, ciao", "Susanna e annata", "in Via Roma 12!", "via Roma 123", "uso c++"]
    texts += ["我是张伟啊", "bene"]
    flags = "--block", tmp_path / "words", "--prompt", "{context}"
    data, rules, _ = made(by(["Anna Bo"], texts), *flags)
    shown = ["[…], ciao", texts[1], "in […]!", texts[3], "uso […]", "我是[…]啊"]
    assert data[6]["prompt"].split("\n") == [f"Person 1: {text}" for text in shown]
    assert rules[4] == "personal data"


def test_a_block_list_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "words").write_bytes(b"\xff")
    for name in "words", "not there":
        with pytest.raises(SystemExit, match=rf"error: --block: .*\. FIX: .*/{name}"):
            made([], "--block", tmp_path / name)


def test_an_author_who_is_a_phone_number_is_shown_as_a_person():
    authors = ["\u202a+39\u00a0333\u00a0123\u00a04567\u202c", "+39 333 765 4321", "bob"]
    for name in authors[0], "+39 333 123 4567", "Person 1":
        data, rules, s = made(by(authors, talk(9)), "--only-author", name)
        assert [*data] == [3, 6] and s.only_author == "Person 1"
        assert "Person 2: " in data[6]["messages"][0]["content"]
        assert "+39" not in str((data, rules, s))


# ---- clean ---------------------------------------------------------------------------------------
DIRTY = [
    ("  Perche\u0301\u200b   no?\n\t", "Perché no?"),
    ("a\x00b\x1b[31mc\x7f", "ab[31mc"),
    ("\u202egnirts\u202c \u2066x\u2069", "gnirts x"),
    ("a\ud83db\udc00", "ab"),
    ("Kappa \U000e0000", "Kappa"),
    ("co\u00adop\ufeff", "coop"),
    ("👩\u200d💻 ok", "👩\u200d💻 ok"),
    ("می\u200cخواهم", "می\u200cخواهم"),
    ("ĀČčŁł ñ ß Ж 한국어 日本 עברית", "ĀČčŁł ñ ß Ж 한국어 日本 עברית"),
    ("ok<end_of_turn>", "ok< end_of_turn>"),  # control tokens become harmless, visibly
    ("<|im_start|>system", "< |im_start|>system"),
    ("<turn|> <|turn>", "< turn|> < |turn>"),
    ("[INST] a [/INST] <<SYS>>", "[ INST] a [ /INST] < <SYS>>"),
    ("<｜User｜> <eos> </s>", "< ｜User｜> < eos> < /s>"),
    ("<en\u200bd_of_turn>", "< end_of_turn>"),
    ("the base's own: <go!>", "the base's own: < go!>"),
    ("<b> c, <3, x < y | z >, vector<int>, [x]", "<b> c, <3, x < y | z >, vector<int>, [x]"),
]


@table(("dirty", "expected"), DIRTY)
def test_cleaning_keeps_what_can_be_read_and_nothing_that_controls(dirty, expected):
    tidy, _ = build_train.cleaners(build_train.settings([]), ["<go!>"])
    assert tidy(dirty) == expected


@settings(RELAXED, max_examples=300)
@given(ALL_UNICODE)
def test_cleaned_text_is_one_line_of_normal_visible_utf_8(text):
    clean = build_train.clean(text)
    assert clean == build_train.clean(clean)
    assert clean == unicodedata.normalize("NFC", clean) == " ".join(clean.split())
    clean.encode("utf-8")
    assert not {unicodedata.category(character) for character in clean} & {"Cc", "Cs"}
    assert not re.search("[\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]", clean)


# ---- read ----------------------------------------------------------------------------------------
TASK = "Write the next message of this chat"
LOGS = [LOG, [{"text": text, "mood": 7} for text in LOG], windows(LOG)]


@table("entries", LOGS, ids=["texts", "log", "windows"])
def test_a_reply_with_what_came_before_becomes_a_pair(entries):
    pair = {"prompt": f"hi all\nhi!\n\n{TASK}.", "completion": "we are ready"}
    assert pair in made(entries)[0].values()


def test_a_ready_pair_stays_as_it_is_but_for_what_cannot_be_seen():
    data = made([{"prompt": " are you  now\nready? ", "completion": "I am\u200b\n  now"}])[0]
    assert data[0] == {"prompt": "are you now\nready?", "completion": "I am\nnow"}


def test_windows_that_are_cut_already_keep_exactly_their_messages(capsys):
    log = talk(99)
    entries = [*windows(log[:50], 4), *windows(log[50:], 30)]
    data = made(entries, "--window", 7, "--prompt", "{context}")[0]
    for i, entry in enumerate(entries):
        assert data[i]["prompt"] == "\n".join(entry["previous_messages"])
    assert "--window has no effect" in capsys.readouterr().out


def test_jsonl_and_json_and_utf_16_and_a_byte_order_mark_give_the_same_rows(built):
    expected, text = built.sides(), json.dumps(windows(talk(60)))
    for content in b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"):
        built.raw(content)
        assert built.build() is None and built.sides() == expected
    (built.root / "data/raw/messages_v1.json").unlink()
    built.raw("\n\n".join(map(json.dumps, json.loads(text))).encode(), "messages_v1.jsonl")
    assert built.build() is None and built.sides() == expected


@table("author", ["author", "sender", "username", "user", "from", "name"])
@table("text", ["message", "text", "content"])
@table("time", ["time", "date", "timestamp"])
def test_other_names_of_the_keys_are_understood(author, text, time):
    log = [{author: "ann", text: "hi all", time: 0}, {author: "bob", text: "hi!", time: 60}]
    assert made(log)[0][1]["prompt"].startswith("ann: hi all\n")
    assert made([log[0], log[1] | {time: 9e4}])[0] == {}


def test_a_time_may_be_written_in_many_ways():
    texts = ["2024-05-31T18:04:00Z", "2024-05-31 18:04", "2024-05-31T20:04+02:00", "1717178640"]
    times = [build_train.seconds(time) for time in [*texts, 1717178640, 1717178640000]]
    assert times == [1717178640] * 6


BAD = {
    "0 bytes": (b"", r"messages_v1\.json is not there or empty"),
    "not JSON": (b'[\n{"message": "a"},\n  {"message" "b"}]', r"is not JSON .*: line 3 column 14 "),
    "an app's text": (b"12/05/24, 10:30 - Ann: hi",
        r"is not JSON .*: mv \S+ data/raw/export_v1\.json; \S+ \S+from_export\.py \S+export_v1\S+"),
    "Windows": ('["perché"]'.encode("cp1252"), r"is not JSON in UTF-8"),
    "an object": (b'{"messages": []}', r"\{\"messages\": \[\]\} is no list of entries"),
    "a bad line": (b'{"message": "a"}\n\n{"message": 3}\n', r'entry or line 3: "message" is 3'),
    "no message": (b'[{"message": "a"}, {"msg": "b"}]', r'line 1: no "message" in \{"msg": "b"\}'),
    "context is a text": (b'[{"previous_messages": "a", "message": "b"}]',
        r'"previous_messages" is "a"'),
    "context holds null": (b'[{"previous_messages": ["a", null], "message": "b"}]', r"line 0: "),
    "half a pair": (b'[{"prompt": "a", "completion": "b"}, {"prompt": "c"}]',
        r'line 1: no "completion"'),
    "a time that is none": (b'[{"message": "a", "date": "noon"}]', r"line 0: .*'noon'"),
    "too deep": (b"[" * 100_000, r"is not JSON .*recursion"),
    "nothing left": (b'["!a", "!b"]', r"0 rows are left, too few to split .*FIX: .*--off"),
    "too few": (b'["what is it", "that is it", "so it is"]', r"1 rows are left, too few to split"),
}  # fmt: skip


@table("name", BAD)
def test_bad_input_is_answered_with_its_fix_and_leaves_the_output_as_it_was(built, name):
    content, message = BAD[name]
    before = built.content()
    (built.root / "data/raw/messages_v1.json").unlink()
    built.raw(content, "messages_v1.jsonl" if name == "a bad line" else "messages_v1.json")
    error = built.build()
    assert ERROR.fullmatch(error) and re.search(message, error), error
    assert built.content() == before and built.folders() == [".v1.lock", "v1"]


LONG = [  # what patterns may choke on
    *("1", "12 34-", "+4", "a.b@", "e\u0301\u0323", "x\n", " ", "[", "<|", "a", "ha ", "👩\u200d"),
    *("AT61 ", "http://", "\\"),
]


@table("text", LONG, ids=ascii)
def test_no_text_takes_long(text):
    long = "x" + text * (50_000 // len(text)) + "y"
    start = time.process_time()
    made(["hi", long, long, "so"])
    assert time.process_time() - start < 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ALL_UNICODE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ALL_UNICODE, inner, max_size=4),
    max_leaves=12,
)
VALUES = ALL_UNICODE | st.lists(ALL_UNICODE, max_size=3) | JSON
ENTRIES = st.lists(st.dictionaries(st.sampled_from(sorted(build_train.ALL_KEYS)), VALUES))
SHAPES = {
    "windows": windows,
    "texts": list,
    "log": lambda log: [{"author": a, "message": b} for a, b in pairwise(log)],
    "pairs": lambda log: [{"prompt": a, "completion": b} for a, b in pairwise(log)],
}
TEXTS = st.lists(ALL_UNICODE, min_size=30, max_size=60)
CHATS = st.builds(lambda shape, log: SHAPES[shape](log), st.sampled_from(sorted(SHAPES)), TEXTS)


@settings(RELAXED, max_examples=150)
@given(JSON | ENTRIES | CHATS)
def test_any_json_ends_in_rows_for_the_trainer_or_in_an_error_with_its_fix(tmp_path_factory, raw):
    chat = Project(tmp_path_factory.mktemp("any") / "p")
    chat.raw(raw)
    error = chat.build("--window", 2, "--off", "stock reply,too short,same words,same character")
    if error is not None:
        assert ERROR.fullmatch(error), error
        return
    for row in chat.lines("train.jsonl") + chat.lines("valid.jsonl"):
        assert list(row) == ["prompt", "completion"] and row["prompt"] and row["completion"]
    for content in chat.content().values():
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", content.decode("utf-8"))


# ---- lay out: talks and windows ------------------------------------------------------------------
GAPS = [(6, 5.9, {0}), (6, 6.1, {0, 1}), (0, 99, {0}), (2, 3, {0, 1})]


@table(("gap", "hours", "without_context"), GAPS)
def test_a_silence_longer_than_the_gap_ends_a_talk(gap, hours, without_context):
    log = at((0, "ann", "hi all"), (60 * hours, "bob", "hi!"))
    assert made(log, "--gap", gap)[1] == dict.fromkeys(without_context, "no context")


@table("way", ["newest first", "shuffled", "no a.m. or p.m."])
def test_times_prove_the_order(way):
    log = [{"message": text, "time": 1e9 + 60 * i} for i, text in enumerate(talk(200))]
    expected = set(map(str, made(log, "--gap", 0)[0].values()))
    if way == "newest first":
        log.reverse()
    elif way == "shuffled":
        random.Random(0).shuffle(log)
    else:
        log[100:] = [entry | {"time": entry["time"] - 12 * 3600} for entry in log[100:]]
    assert set(map(str, made(log, "--gap", 0)[0].values())) == expected


BURST = at((0, "ann", "hi"), (1, "ann", "are you there?"), (4, "ann", "or not"), (5, "bob", "yes"))
BURSTS = [
    (0, "ann: hi\nann: are you there?\nann: or not"),
    (1.5, "ann: hi\nare you there?\nann: or not"),
    (5, "ann: hi\nare you there?\nor not"),
]


@table(("minutes", "context"), BURSTS)
def test_what_one_author_writes_at_a_stretch_may_become_one_message(minutes, context):
    data = made(BURST, "--burst", minutes, "--prompt", "{context}")[0]
    assert data[3]["prompt"] == context


# ---- split ---------------------------------------------------------------------------------------
APART = {
    "a log": list,
    "windows": windows,
    "windows without overlap": lambda log: windows(log, 2)[1::3],
}


@table("shape", APART)
def test_a_conversation_is_on_one_side_and_never_mixed_with_another(chat, shape):
    entries = []
    for number in range(20):
        log = [f"{text} of {number}." for text in talk(30, seed=number)]
        log = [entry if isinstance(entry, dict) else {"text": entry} for entry in APART[shape](log)]
        entries += [entry | {"conversation": number} for entry in log]
    chat.raw(entries)
    assert chat.build("--stride", 1) is None
    sides = [[set(re.findall(r" of (\d+)\.", str(row))) for row in side] for side in chat.sides()]
    assert {len(numbers) for side in sides for numbers in side} == {1}
    train, valid = (set().union(*side) for side in sides)
    assert len(train) + len(valid) == 20 and not train & valid and valid


AS_TEXT = ["--prompt", "{context}", "--question-prompt", "{context}"]
UNFILTERED = ["--off", "stock reply,duplicate,same words,same character"]


def export(name, count, size):
    """Return [place, …] of each window that an export of `count` messages holds."""
    every = [[*range(max(0, i - size), i + 1)] for i in range(1, count)]
    draw = random.Random(1)
    if name == "every fifth":
        return every[4::5]
    if name == "a third of them":
        return [places for places in every if draw.random() < 0.33]
    if name == "replies of one, context of the others":
        own = {i for i in range(count) if draw.random() < 0.3}
        heard = [[p for p in range(max(0, i - 3 * size), i) if p not in own] for i in range(count)]
        return [[*heard[i][-size:], i] for i in sorted(own) if heard[i]]
    return every


EXPORTS = ["all", "every fifth", "a third of them", "replies of one, context of the others"]


@table("size", [3, 10])
@table("shape", ["windows", "pairs"])
@table("name", EXPORTS)
def test_no_message_of_validation_stands_at_the_same_place_in_training(chat, name, shape, size):
    log = talk(900, stock=0.7)
    places = {}  # of the messages of each window; windows have to differ for this check
    for window in export(name, len(log), size):
        places.setdefault(tuple(log[place] for place in window), set(window))
    if shape == "windows":
        chat.raw([{"previous_messages": c, "message": reply} for *c, reply in places])
    else:
        pairs = [{"prompt": "\n".join([*c, "!"]), "completion": reply} for *c, reply in places]
        chat.raw(pairs)  # with a template, whose last line is no message
    assert chat.build(*AS_TEXT, *UNFILTERED) is None
    texts = [
        [(*row["prompt"].removesuffix("\n!").split("\n"), row["completion"]) for row in side]
        for side in chat.sides()
    ]
    train, valid = ([places[window] for window in side] for side in texts)
    held = set().union(*valid)
    assert held and train and not [row for row in train if row & held]


@table("flags", ["", "--names 0", "--gap 0.2", "--burst 9"])
@table("shape", ["prompt", "turns"])
def test_a_log_does_not_leak_whatever_its_rows_look_like(chat, shape, flags):
    """Every message is unlike all others, so a text tells its place."""
    draw, now, log = random.Random(2), 0, []
    for text in talk(1500):
        now += draw.expovariate(1 / 120)
        log.append({"message": text, "author": draw.choice("aabc"), "time": now})
    chat.raw(log)
    assert chat.build("--only-author", "a", "--shape", shape, *flags.split()) is None
    train, valid = map(messages_in, chat.sides())
    assert len(train) > 300 and len(valid) > 30 and not train & valid


def test_windows_that_are_out_of_order_are_refused(chat):
    chat.raw(random.Random(1).sample(windows(talk(900)), 899))
    what = r"not in the order of time: \d+ of \d+ validation rows .*FIX: give .*conversation"
    assert re.search(what, chat.build())
    assert not chat.out.exists()


def test_a_chat_that_was_exported_twice_does_not_leak(chat):
    log = talk(400)
    chat.raw([*log, "and now once more", *log[150:]])
    assert chat.build() is None
    train, valid = ([messages_in(row) for row in side] for side in chat.sides())
    held = set().union(*valid)
    assert [row for row in train if len(held & row) >= 3] == []


@table(("most", "valid"), [(150, range(150, 151)), (400, range(210, 401))])
def test_validation_has_its_share_or_the_most_rows_allowed(chat, most, valid):
    chat.raw([{"message": message, "conversation": "the only one"} for message in talk(3000)])
    assert chat.build("--valid-rows", most, "--stride", 1) is None
    assert len(chat.sides()[1]) in valid
    assert len(chat.sides()[0]) > 2400


def test_training_rows_follow_one_another_and_hold_what_all_rows_would(chat):
    chat.raw(by("ab", talk(300)))
    assert chat.build("--stride", 1) is None
    every, valid = chat.sides()
    assert chat.build() is None
    spaced, same = chat.sides()
    assert same == valid
    assert len(spaced) < len(every) / 8 and {*map(str, spaced)} < {*map(str, every)}
    assert len(messages_in(spaced)) > 0.9 * len(messages_in(every))


@table("flags", [[], ["--only-author", "a"]], ids=["everyone", "one author"])
def test_no_message_is_trained_twice_but_as_the_first_of_the_next_row(chat, flags):
    chat.raw(by("ab", talk(300)))
    assert chat.build(*flags) is None
    rows = chat.sides()[0]
    counts = Counter(message for row in rows for message in messages_in(row))
    replies = messages_in([row.get("completion") or row["messages"][-1] for row in rows])
    assert {message for message in counts if counts[message] > 1} <= replies
    assert len(counts) > 200 and max(counts.values()) <= 2


# ---- rows ----------------------------------------------------------------------------------------
ONLY = ["--prompt", "{context}"]
PROMPTS = {  # the prompt of the last reply: (entries, flags, prompt)
    "names": (by("abc", LOG[:3]), [], f"a: hi all\nb: hi!\n\n{TASK}, as c."),
    "no names": (by("abc", LOG[:3]), ["--names", 0], f"hi all\nhi!\n\n{TASK}."),
    "a name of many": (by(["ann", "bob", None], LOG[:3]), ONLY, "ann: hi all\nbob: hi!"),
    "someone": (by([None, "ann", "bob"], LOG[:3]), ONLY, "someone: hi all\nann: hi!"),
    "few names": (by([None, None, "bob"], LOG[:3]), ONLY, "hi all\nhi!"),
    "author": (by("ab", LOG[:2]), ["--prompt", "{author} after {context}"], "b after a: hi all"),
    "question": (["hi", "so?"], [], "hi\n\nAsk the next question in this chat."),
    "そう？": (["poi", "そう？"], ["--question-prompt", "Ask: {context}"], "Ask: poi"),
    "لماذا؟": (["poi", "لماذا؟"], ["--question-prompt", "Ask: {context}"], "Ask: poi"),
    "new line": (LOG[:2], ["--prompt", "{context}\\n>"], "hi all\n>"),
    "long": (["x" * 301, "so"], ONLY, "x" * 300 + "…"),
    "braces": (["{context} {0} %s [a]", "so"], ONLY, "{context} {0} %s [a]"),
    "personal data": (["ring ann@example.com now", "ok"], ONLY, "ring […] now"),
    "personal data off": (["ring a@b.it", "ok"], [*ONLY, "--off", "personal data"], "ring a@b.it"),
}


@table("case", PROMPTS)
def test_the_prompt_is_what_the_model_sees_before_the_last_reply(case):
    entries, flags, prompt = PROMPTS[case]
    rows = made(entries, *flags)[0]
    assert rows[max(rows)]["prompt"] == prompt


TALK = by(
    ["ann", "bob", "cy", "ann", "ann", "bob", "ann"],
    ["me first", "hi", "you", "what", "is it", "no", "fine"],
)
TURNS = [
    (TALK, [], ["bob: hi\ncy: you", "what\nis it", "bob: no", "fine"]),
    (TALK, ["--names", 0], ["hi\nyou", "what\nis it", "no", "fine"]),
    ([m for m in TALK if m["author"] != "cy"], [], ["hi", "what\nis it", "no", "fine"]),
    (TALK, ["--window", 2], ["bob: no", "fine"]),
]


@table(("log", "flags", "expected"), TURNS)
def test_turns_are_a_talk_of_the_author_with_the_others(log, flags, expected):
    data, *_ = made(log, "--only-author", "ann", *flags)
    assert data[max(data)] == turns(*expected)


# ---- count tokens, fit, order --------------------------------------------------------------------
LENGTHS = [("prompt", 7), ("turns", 8)]  # messages of ten letters that fit into 40 tokens


@table(("shape", "count"), LENGTHS)
def test_a_row_that_is_too_long_loses_as_few_of_its_oldest_messages_as_possible(shape, count):
    flags = ["--max-seq-length", "40", "--prompt", "{context}"]
    s = build_train.settings([*flags, "--names", "0", "--only-author", "a", "--shape", shape])
    texts = ["x" * 10] * 20 + ["reply"]
    window = [build_train.Message(text, "ab"[i % 2]) for i, text in enumerate(texts)]
    row = build_train.Row(window)
    assert build_train.fit([row], s, None, []) == [row]
    assert row.window == window[-count - 1 :] and row.tokens <= 40


@table(("shape", "kept"), [("prompt", ["reply"]), ("turns", [])])
def test_a_prompt_may_lose_its_whole_context_but_turns_need_a_user(shape, kept):
    flags = ["--max-seq-length", "40", "--only-author", "a", "--shape", shape]
    s, dropped = build_train.settings(flags), []
    row = build_train.Row([build_train.Message("x" * 300), build_train.Message("reply", "a")])
    fitting = build_train.fit([row], s, None, dropped)
    assert [text for row in fitting for text in row.texts] == kept
    assert dropped == ([] if kept else [(row, "over --max-seq-length")])


THINKING = (  # takes thoughts away, and shouts: no template that is filled in once can do that
    "{% for m in messages %}"
    "[{{ m.role }}] {{ m.content.split('</think>')[-1] | upper }}\n{% endfor %}"
)


@pytest.fixture
def base(project):
    """The folder of a base model; what loading it changes in this process is undone."""
    handler, variables = signal.getsignal(signal.SIGALRM), dict(os.environ)
    yield project / "models/base/tiny-gemma-3"
    signal.signal(signal.SIGALRM, handler)
    os.environ.clear()
    os.environ.update(variables)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.slow
@table("jinja", [None, THINKING], ids=["Gemma", "thinking"])
def test_tokens_are_those_of_the_trainer(jinja, base):
    from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset

    if jinja:
        (base / "chat_template.jinja").unlink(missing_ok=True)
        change(base / "tokenizer_config.json", chat_template=jinja)
    texts = ["ciao", "perché no? 😂", "a <b> c", "<think>hm</think> sì", "<end_of_turn>", "x\ny"]
    tokenizer = build_train.find_tokenizer(base)
    pairs = [{"prompt": a, "completion": b} for a in texts for b in texts]
    talks = [turns(*random.Random(i).choices(texts, k=6)) for i in range(20)]
    of_pairs = CompletionsDataset(pairs, tokenizer, "prompt", "completion", False)
    for rows, trainer in (pairs, of_pairs), (talks, ChatDataset(talks, tokenizer)):
        expected = [len(trainer.process(row)[0]) for row in rows]
        assert build_train.count_tokens(rows, tokenizer) == expected


def rows_of(lengths):
    return [build_train.Row([build_train.Message(str(n))], tokens=n) for n in lengths]


@pytest.mark.slow
@table("batch", [4, 16])
def test_order_gives_batches_of_equal_length_in_mlx_lm(batch):
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import iterate_batches

    class Tokens(list):
        def process(self, row):
            return row

    def cost(rows):
        """Tokens computed for each token that is in a row."""
        tokens = Tokens(([1] * row.tokens, 0) for row in rows)  # of length 2, as mlx-lm's rows
        batches = list(iterate_batches(CacheDataset(tokens), batch, 4096, seed=0))
        return sum(b.size for b, _ in batches) / sum(n[:, 1].sum().item() for _, n in batches)

    draw = random.Random(0)
    rows = rows_of([int(draw.lognormvariate(5, 0.6)) + 1 for _ in range(1999)])
    ordered = build_train.order(rows, 0)
    assert sorted(row.tokens for row in ordered) == sorted(row.tokens for row in rows)
    ideal = cost(sorted(rows, key=lambda row: row.tokens))
    assert cost(ordered) <= 1.03 * ideal < 1.2 * ideal < cost(rows)


@table("batch", [7, 16])
def test_rows_that_do_not_fill_a_batch_are_no_biased_sample(batch):
    left_out = []
    for seed in range(60):
        rows = build_train.order(rows_of(range(1, 1015 - batch)), seed)
        left_out += [row.tokens for row in rows[len(rows) - len(rows) % batch :]]
    assert 0.75 < sum(left_out) / len(left_out) / 500 < 1.25


# ---- the base model ------------------------------------------------------------------------------
DOWNLOAD = "hf download mlx-community/none --local-dir models/base/none"
THERE = [([], DOWNLOAD), (["tiny"], "export MODEL=tiny"), (["gemma-3-4b", "tiny"], DOWNLOAD)]


@table(("there", "fix"), THERE)
def test_without_the_base_model_tokens_are_estimated_and_that_is_said(chat, capsys, there, fix):
    for name in there:
        (chat.root / "models/base" / name).mkdir(parents=True)
    chat.raw(windows(talk(60)))
    assert chat.build() is None
    warning = capsys.readouterr().err.strip()
    assert re.fullmatch(rf"warning: .* tokens are ESTIMATED\. FIX: {re.escape(fix)}", warning)


@pytest.mark.slow
@table("content", ['{"version": "1.0"', "[]", None], ids=["cut off", "a list", "gone"])
def test_a_base_model_that_does_not_work_is_named(base, content):
    tokenizer = base / "tokenizer.json"
    tokenizer.write_text(content) if content else tokenizer.unlink()
    with pytest.raises(SystemExit, match=r"^error: .*tiny-gemma-3 does not work.*FIX: .*MODEL"):
        build_train.find_tokenizer(base)


# ---- the output appears whole or not at all ------------------------------------------------------
def test_killed_in_the_middle_of_the_swap_is_mended_by_the_next_run_even_if_it_fails(built):
    before = built.content()
    built.out.rename(built.out.with_name(".v1.old"))
    built.out.with_name(".v1.partial").mkdir()
    built.raw(b"[")
    assert "not JSON" in built.build()
    assert built.content() == before and built.folders() == [".v1.lock", "v1"]


def test_a_second_run_at_the_same_time_is_refused_and_another_version_is_not(built):
    before = built.content()
    with built.out.with_name(".v1.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert re.fullmatch(r"error: another run is writing .*/v1\. FIX: wait .*", built.build())
        built.raw(talk(60), "messages_v2.json")
        assert built.build("--version", "v2") is None
    assert built.content() == before and built.build() is None


def test_ctrl_c_ends_with_130_and_without_a_traceback(chat):
    chat.raw(talk(60_000))
    process = chat.start()
    while "reading " not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert not chat.out.exists()


# ---- the run -------------------------------------------------------------------------------------
MISSING = [
    ("messages_sample.json", "PATH"),
    ("WhatsApp Chat.txt", "'data/raw/WhatsApp Chat.txt'"),
    ("a.zip", "data/raw/a.zip"),
]


@table(("name", "path"), MISSING)
def test_a_missing_file_is_answered_with_what_is_there_and_how_to_make_it(chat, name, path):
    chat.raw(["a"], name)
    chat.raw(["a"], "\x1b[2J.txt")
    error = chat.build()
    assert error.endswith(f"{name}. FIX: python data/raw/from_export.py {path} --version v1")


THREE = by(["Bob", "Bob", "Ann", "Eve Lin"], talk(60))
STRANGERS = [
    (THREE, "An", "python build_train.py --only-author Ann"),
    (THREE, "zzz", "python build_train.py --only-author Bob"),
    (THREE, "Eve Li", "python build_train.py --only-author 'Eve Lin'"),
    (talk(60), "An", "leave --only-author out"),
]


@table(("log", "name", "fix"), STRANGERS)
def test_an_author_who_is_not_there_is_answered_with_one_who_is(chat, log, name, fix):
    chat.raw(log)
    assert chat.build("--only-author", name).endswith(f". FIX: {fix}")


# ---- what is printed -----------------------------------------------------------------------------
PRINTED = [
    r'^not used +these keys of entries: "mood\\u001b"$',
    r"^bot command +1 +!discord$",
    r"^split +\d+ rows to train, \d+ to validate, \d+ in prompts of others, \d+ dropped$",
    r"^leaks .*: 0$",
    r"^next +VERSION=v1 MODEL=none \./fine_tune\.sh$",
]


def test_the_summary_tells_what_was_dropped_that_nothing_leaks_and_what_comes_next(chat, capsys):
    chat.raw([{"message": text, "mood\x1b": 7} for text in ["hi", "!discord", *talk(200)]])
    assert chat.build() is None
    printed = capsys.readouterr().out
    assert [line for line in PRINTED if not re.search(line, printed, re.M)] == []


def test_chat_text_cannot_write_to_the_terminal(chat, capsys):
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e https://x.example/"
    log = by([evil + name for name in "abc"], [evil + text for text in talk(60)])
    chat.raw([entry | {evil: 1} for entry in log])
    assert chat.build("--off", "link") is None
    printed = chat.build("--only-author", evil)
    chat.raw([{"message": "a"}, {"\x1b[2J": evil}])
    printed += chat.build()
    printed += "".join(capsys.readouterr())
    assert not [c for c in printed if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"]


def test_it_works_where_nobody_reads_and_only_ascii_can_be_printed(chat):
    chat.raw(["perché 😂", *talk(60)])
    process = chat.start(env={"PYTHONIOENCODING": "ascii", "PYTHONOPTIMIZE": "2"})
    process.stdout.close()  # as `| head -1` does
    assert process.wait() == 0 and all(chat.sides())


# ---- the same input gives the same bytes ---------------------------------------------------------
@table("flags", [[], ["--only-author", "a"]], ids=["everyone", "one author"])
def test_two_processes_write_the_same_bytes_and_another_seed_others(chat, flags):
    draw = random.Random(0)
    chat.raw([entry | {"conversation": draw.randrange(3)} for entry in by("aab", talk(2000))])
    outputs = []
    for hash_seed, language, seed in ("1", "C", 0), ("2", "it_IT.UTF-8", 0), ("1", "C", 1):
        variables = {"PYTHONHASHSEED": hash_seed, "LC_ALL": language}
        process = chat.start(*flags, "--seed", seed, env=variables)
        assert process.communicate(timeout=60) and process.returncode == 0
        outputs.append(chat.content())
    assert outputs[0] == outputs[1]
    assert outputs[0]["valid.jsonl"] != outputs[2]["valid.jsonl"]
