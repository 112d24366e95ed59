"""What build_train.py promises about training data."""
# ruff: noqa: RUF001 (chat in many scripts)

import ast
import gc
import hashlib
import importlib.util
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCRIPT = Path(__file__).resolve().parent.parent / "build_train.py"
RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
ALL_UNICODE = st.text(st.characters())  # control characters and lone surrogates too


def load(path=SCRIPT):
    spec = importlib.util.spec_from_file_location("build_train", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_train"] = module  # where dataclass looks names up
    spec.loader.exec_module(module)
    return module


build_train = load()


class Project:
    """A folder with nothing but the script; without a base model, so that tokens are estimated."""

    def __init__(self, root):
        self.root, self.out = root, root / "data/for_train/v1"
        (root / "data/raw").mkdir(parents=True)
        self.script = shutil.copy(SCRIPT, root)
        self.module = load(self.script)

    def raw(self, content, name="messages_v1.json"):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (self.root / "data/raw" / name).write_bytes(content)

    def build(self, *flags):
        """Run main(); return None if it went well, the error message if not."""
        folder, arguments = os.getcwd(), sys.argv
        sys.argv = ["build_train.py", "--version", "v1", "--model", "none", *map(str, flags)]
        try:
            self.module.main()
        except SystemExit as e:
            return e.code
        finally:
            os.chdir(folder)
            sys.argv = arguments
            gc.enable()

    def start(self, *flags, **kwargs):
        """Start the script as a person does."""
        command = [sys.executable, self.script, "--version", "v1", "--model", "none", *map(str, flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        return subprocess.Popen(command, **pipes | kwargs)

    def lines(self, name):
        return [json.loads(line) for line in (self.out / f"{name}.jsonl").read_text("utf-8").split("\n")[:-1]]

    def pairs(self):
        return self.lines("train") + self.lines("valid")

    def rules(self):
        return {line["entry"]: line["rule"] for line in self.lines("dropped")}

    def content(self):
        return {path.name: path.read_bytes() for path in self.out.iterdir()}


@pytest.fixture
def chat(tmp_path):
    return Project(tmp_path / "my project")


def windows(log, size=10):
    """The guide's entries of a log."""
    return [{"previous_messages": log[max(0, i - size) : i], "message": log[i]} for i in range(1, len(log))]


def alone(count):
    """Entries that have nothing in common."""
    return [{"previous_messages": [f"how {i}", f"what {i}"], "message": f"thus {i}"} for i in range(count)]


def talk(count, seed=0, stock=0.0):
    """A log of messages that are all different, but for a share of stock replies."""
    draw = random.Random(seed)
    words = ["sugo", "gatto", "sedia", "brodo", "nonna", "rigore"]
    return [
        draw.choice(["LULW", "gg", "ahaha"]) if draw.random() < stock else f"{' '.join(draw.sample(words, 3))} no{i}x"
        for i in range(count)
    ]


# ---- input -----------------------------------------------------------------------------------------------------------
GREETING = {"prompt": "hi all\nhi!\n\nWrite the next message of this chat.", "completion": "we are ready"}


def test_a_reply_with_what_came_before_becomes_a_pair(chat):
    chat.raw([{"previous_messages": ["hi all", "hi!"], "message": "we are ready", "mood": 7}, *windows(talk(60))])
    assert chat.build() is None
    assert GREETING in chat.pairs()


@pytest.mark.parametrize(
    "entry", ["{!r}", "{{'message': {!r}}}", "{{'message': {!r}, 'author': 'ann', 'conversation': 7, 'id': []}}"]
)
def test_a_log_in_the_order_of_time_becomes_windows(chat, entry):
    chat.raw([ast.literal_eval(entry.format(message)) for message in ["hi all", "hi!", "we are ready", *talk(60)]])
    assert chat.build("--window", 2) is None
    assert GREETING in chat.pairs()
    assert chat.rules()[0] == "no context"


def test_windows_of_a_log_stay_in_their_conversation(chat):
    log = [{"message": message, "conversation": i % 2} for i, message in enumerate(talk(200))]
    chat.raw(log)
    assert chat.build("--window", 3) is None
    for pair in chat.pairs():
        numbers = {int(number) % 2 for number in re.findall(r"no(\d+)x", str(pair))}
        assert len(numbers) == 1


def test_ready_pairs_keep_their_prompts_and_line_breaks(chat):
    chat.raw([{"prompt": f" {text}  now\nplease ", "completion": f"{text}\n  yes"} for text in talk(60)])
    assert chat.build() is None
    assert {"prompt": f"{talk(60)[0]} now\nplease", "completion": f"{talk(60)[0]}\nyes"} in chat.pairs()


def test_jsonl_and_json_and_utf_16_and_a_byte_order_mark_give_the_same_rows(chat):
    entries = windows(talk(60))
    chat.raw(entries)
    assert chat.build() is None
    expected = chat.lines("train"), chat.lines("valid")
    chat.raw(b"\xef\xbb\xbf" + json.dumps(entries).encode())
    assert chat.build() is None
    assert (chat.lines("train"), chat.lines("valid")) == expected
    chat.raw(json.dumps(entries).encode("utf-16"))
    assert chat.build() is None
    assert (chat.lines("train"), chat.lines("valid")) == expected
    (chat.root / "data/raw/messages_v1.json").unlink()
    chat.raw("\n\n".join(map(json.dumps, entries)).encode(), "messages_v1.jsonl")
    assert chat.build() is None
    assert (chat.lines("train"), chat.lines("valid")) == expected


def test_who_speaks_is_not_shown(chat):
    chat.raw([{"message": message, "author": "ann"} for message in talk(60)])
    assert chat.build() is None
    assert "ann" not in str(chat.pairs())


# ---- filter ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("reply", "rule"),
    [
        ("\u200b \u2800\u3164", "empty"),
        ("!discord", "bot command"),
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
        ("scrivi a anna.rossi+x@example.co.uk", "personal data"),
        ("chiama +39 333 123 4567", "personal data"),
        ("chiama il 3331234567!", "personal data"),
        ("call (555) 123-4567", "personal data"),
        ("IBAN IT60 X054 2811 1010 0000 0123 456", "personal data"),
        ("it60x0542811101000000123456", "personal data"),
        ("carta 4111 1111 1111 1111", "personal data"),
        ("carta 4111111111111111", "personal data"),
        ("amex 378282246310005", "personal data"),
    ],
)
def test_a_bad_reply_is_rejected_by_its_rule(chat, reply, rule):
    chat.raw([{"previous_messages": ["hi all", "hi!"], "message": reply}, *windows(talk(40))])
    assert chat.build() is None
    assert chat.rules()[0] == rule
    if rule != "empty":
        assert chat.build("--off", rule) is None
        assert chat.rules().get(0) != rule


GOOD = (
    """
perché no?|今日は寒いね|مرحبا بكم|क्या हाल है|да ладно|ไม่เป็นไรนะ|ok|ahahahahahah|😂😂
+1|NOOOOOOO|gg gg gg|!|<3|e/o|si.no.boh|/etc/fstab non va|kernel 2.6.8.1-3|192.168.100.200
alle 19:30 del 12/05/2024|sono 14.500 euro|che bello!! 10/10|@giada_ohm ciao|2004-12-25 10:30|l'ho pagato 1.234.567 lire
""".strip()
    .replace("\n", "|")
    .split("|")
)


def test_good_replies_in_all_scripts_are_kept(chat):
    chat.raw([{"previous_messages": [f"how {i}"], "message": reply} for i, reply in enumerate(GOOD)])
    assert chat.build("--min-chars", 1, "--valid-size", 0.2) is None
    assert chat.rules() == {}
    assert sorted(pair["completion"] for pair in chat.pairs()) == sorted(GOOD)


def test_a_context_of_numbers_is_rejected_from_four_fifths_on(chat):
    votes = {"previous_messages": ["1", "2,5", "-3", "4", "ok"], "message": "vince il due"}
    fewer = {"previous_messages": ["1", "2", "3", "vai", "ok"], "message": "vince il tre"}
    chat.raw([votes, fewer, *alone(40)])
    assert chat.build() is None
    assert chat.rules() == {0: "numbers"}


def test_bots_and_other_authors_give_no_replies(chat):
    authors = ["ann", "NightBot", "bob"]
    chat.raw([{"message": message, "author": authors[i % 3]} for i, message in enumerate(talk(90))])
    assert chat.build("--only-author", "ann") is None
    rules = chat.rules()
    assert {rules[i] for i in range(1, 90, 3)} == {"other author"} == {rules[i] for i in range(2, 90, 3)}
    assert chat.build() is None
    assert {chat.rules()[i] for i in range(1, 90, 3)} == {"bot"}


def test_an_author_may_be_a_phone_number(chat):
    authors = ["\u202a+39\u00a0333\u00a0123\u00a04567\u202c", "+39 333 765 4321"]  # as WhatsApp writes it
    chat.raw([{"message": message, "author": authors[i % 2]} for i, message in enumerate(talk(90))])
    for name in authors[0], "+39 333 123 4567":
        assert chat.build("--only-author", name) is None
        assert {chat.rules()[i] for i in range(1, 90, 2)} == {"other author"}
    assert "+39" not in "".join(path.read_text("utf-8") for path in chat.out.iterdir())


def test_the_same_reply_to_the_same_context_is_kept_once(chat):
    context = ["ciao, come va?", "Bene!"]
    same = [{"previous_messages": ["CIAO come va", " bene"], "message": "anche io..."}]
    other = [{"previous_messages": ["ciao, come va?", "male"], "message": "Anche io"}]
    chat.raw([{"previous_messages": context, "message": "Anche io!"}, *same, *other, *alone(40)])
    assert chat.build("--off", "stock reply") is None
    assert chat.rules() == {1: "duplicate"}


def test_a_pasted_wall_is_kept_once_and_a_stock_reply_up_to_its_share(chat):
    wall = "Buonasera, sono la tua sedia, ti reggo da sette anni senza ferie e senza un grazie, oggi parlo io."
    log = talk(400)
    log[100] = log[200] = log[300] = wall
    for i in range(10, 390, 4):
        log[i] = "LULW"
    chat.raw(windows(log))
    assert chat.build("--stock-share", 0.05) is None
    rules = chat.rules()
    assert [rules.get(i - 1) for i in (200, 300)] == ["pasted again"] * 2
    laughs = [i for i in range(10, 390, 4) if log[i] == "LULW"]
    kept = [i for i in laughs if rules.get(i - 1) != "stock reply"]
    rest = 399 - 2 - len(laughs)  # 302 rows and 5 % of all: 15 of 317
    assert len(kept) == 15 and len(kept) / (rest + len(kept)) <= 0.05
    assert kept[0] < 50 and kept[-1] > 350  # spread over time


def test_every_entry_is_in_exactly_one_file(chat):
    log = talk(600, stock=0.1)
    log[50:60] = ["!uptime"] * 10
    chat.raw(windows(log))
    assert chat.build("--valid-rows", 30, "--max-seq-length", 120) is None
    dropped = chat.lines("dropped")
    assert len({line["entry"] for line in dropped}) == len(dropped) == 599 - len(chat.pairs())
    assert dropped == sorted(dropped, key=lambda line: line["entry"])
    for line in dropped:
        assert line["message"] == log[line["entry"] + 1]


# ---- cleaning --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("  Perche\u0301\u200b   no?\n\t", "Perché no?"),
        ("a\x00b\x1b[31mc\x7f", "ab[31mc"),
        ("\u202egnirts\u202c \u2066x\u2069", "gnirts x"),
        ("a\ud83db\udc00", "ab"),
        ("Kappa \U000e0000", "Kappa"),
        ("co\u00adop\ufeff", "coop"),
        ("a\u200db", "ab"),
        ("👩\u200d💻 ok", "👩\u200d💻 ok"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("क्\u200dष", "क्\u200dष"),
        ("ĀČčŁł ñ ß Ж 한국어 日本 עברית", "ĀČčŁł ñ ß Ж 한국어 日本 עברית"),
    ],
)
def test_cleaning_keeps_what_can_be_read_and_nothing_else(dirty, expected):
    assert build_train.clean(dirty) == expected


def test_emoji_go_only_if_the_setting_says_so():
    assert build_train.clean("ciao 😂 a tutti ❤️") == "ciao 😂 a tutti ❤️"
    assert build_train.clean("ciao 😂 a tutti ❤️👩\u200d💻 क्\u200dष", remove_emoji=True) == "ciao a tutti क्\u200dष"


@settings(RELAXED, max_examples=300)
@given(ALL_UNICODE)
def test_cleaned_text_is_one_line_of_normal_visible_utf_8(text):
    clean = build_train.clean(text)
    assert clean == build_train.clean(clean)
    assert clean == unicodedata.normalize("NFC", clean) == " ".join(clean.split())
    clean.encode("utf-8")
    for character in clean:
        assert unicodedata.category(character) not in ("Cc", "Cs")
        assert character not in "\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"


# ---- prompt ----------------------------------------------------------------------------------------------------------
def test_replies_that_ask_have_their_own_template(chat):
    ask = [{"previous_messages": ["a b c"], "message": reply} for reply in ("e poi?", "そう？", "لماذا؟")]
    chat.raw([*ask, *windows(talk(40))])
    assert chat.build("--prompt", "{context}\\n\\nTell", "--question-prompt", "Ask: {context}") is None
    for pair in chat.pairs():
        asks = pair["completion"] in ("e poi?", "そう？", "لماذا؟")
        assert pair["prompt"].startswith("Ask: ") if asks else pair["prompt"].endswith("\n\nTell")


def test_long_and_personal_messages_are_shortened_visibly_and_braces_are_text(chat):
    context = ["x" * 301, "{context} {0} %s", "scrivi a ann@example.com ora"]
    chat.raw([{"previous_messages": context, "message": "ma {context} che dici"}, *windows(talk(40))])
    assert chat.build("--prompt", "{context}\n>") is None
    prompt = next(pair["prompt"] for pair in chat.pairs() if pair["completion"] == "ma {context} che dici")
    assert prompt == "x" * 300 + "…\n{context} {0} %s\nscrivi a […] ora\n>"


# ---- split -----------------------------------------------------------------------------------------------------------
def true_leaks(chat, log, cut):
    """Rows of train that hold a place of the log that rows of valid hold. `cut`: for each entry, its places."""
    text = {}
    for i, places in enumerate(cut):
        text.setdefault((tuple(log[p] for p in places[:-1]), log[places[-1]]), i)
    assert len(text) == len(cut), "entries have to differ for this check"

    def held(name):
        rows = []
        for pair in chat.lines(name):
            *context, instruction = pair["prompt"].split("\n")
            assert instruction == "!"
            rows.append(set(cut[text[tuple(context), pair["completion"]]]))
        return rows

    taken = set().union(*held("valid"))
    assert taken
    return [places for places in held("train") if places & taken]


def cuts(name, count, size, draw):
    """The places of the windows that an export of `count` messages holds."""
    every = [[*range(max(0, i - size), i + 1)] for i in range(1, count)]
    if name == "every fifth":
        return every[4::5]
    if name == "windows that just meet":
        return every[size - 1 :: size]
    if name == "a third of them":
        return [places for places in every if draw.random() < 0.33]
    if name == "replies of one, context of the others":
        own = {i for i in range(count) if draw.random() < 0.3}
        heard = [([p for p in range(max(0, i - 3 * size), i) if p not in own][-size:], i) for i in sorted(own)]
        return [[*context, i] for context, i in heard if context]
    if name == "shuffled":
        return draw.sample(every, len(every))
    if name == "shuffled, a third of them":
        return draw.sample(every, len(every) // 3)
    if name == "two chats by turns":
        half = count // 2
        first = [places for places in every if places[-1] < half]
        second = [places for places in every if places[0] >= half]
        return [places for both in zip(first, second, strict=False) for places in both]
    return every


def entries_of(log, cut, shape="windows"):
    entries = [{"previous_messages": [log[p] for p in places[:-1]], "message": log[places[-1]]} for places in cut]
    if shape == "windows":
        return entries
    return [{"prompt": "\n".join([*e["previous_messages"], "!"]), "completion": e["message"]} for e in entries]


OFF = "stock reply,duplicate,same words,same character"
IN_ORDER = ["all", "every fifth", "windows that just meet", "a third of them", "replies of one, context of the others"]


@pytest.mark.parametrize("size", [3, 10])
@pytest.mark.parametrize("stock", [0, 0.3, 0.7])
@pytest.mark.parametrize("shape", ["windows", "pairs"])
@pytest.mark.parametrize("name", IN_ORDER)
def test_no_message_of_validation_stands_at_the_same_place_in_training(chat, name, shape, stock, size):
    log = talk(900, stock=stock)
    seen, cut = set(), []
    for places in cuts(name, len(log), size, random.Random(1)):
        text = tuple(log[p] for p in places)
        if text not in seen:
            seen.add(text)
            cut.append(places)
    chat.raw(entries_of(log, cut, shape))
    assert chat.build("--prompt", "{context}\n!", "--off", OFF) is None
    assert true_leaks(chat, log, cut) == []


@pytest.mark.parametrize("size", [3, 10])
@pytest.mark.parametrize("shape", ["windows", "pairs"])
@pytest.mark.parametrize("name", ["shuffled", "shuffled, a third of them", "two chats by turns"])
def test_logs_that_are_out_of_order_are_refused(chat, name, shape, size):
    log = talk(900)
    chat.raw(entries_of(log, cuts(name, len(log), size, random.Random(1)), shape))
    error = chat.build("--prompt", "{context}\n!")
    assert re.search(r"not in the order of time: \d+ of \d+ validation rows .*FIX: sort .*conversation", error)
    assert not chat.out.exists()


def test_two_chats_by_turns_are_told_apart_by_their_conversation(chat):
    log = talk(900)
    cut = cuts("two chats by turns", len(log), 10, random.Random(1))
    chat.raw([{**e, "conversation": cut[i][-1] // 450} for i, e in enumerate(entries_of(log, cut))])
    assert chat.build("--prompt", "{context}\n!") is None
    assert true_leaks(chat, log, cut) == []
    assert len(chat.lines("train")) > 0.7 * len(cut)


@pytest.mark.parametrize("stock", [0, 0.7])
def test_a_flat_log_does_not_leak(chat, stock):
    log = talk(900, stock=stock)
    chat.raw(log)
    assert chat.build("--prompt", "{context}\n!", "--window", 10, "--off", OFF) is None
    cut = [[*range(max(0, i - 10), i + 1)] for i in range(1, 900)]
    assert true_leaks(chat, log, cut) == []


def test_a_random_split_of_the_same_log_does_leak(chat):
    """The check above can fail: it finds what the usual split does."""
    log, draw = talk(300), random.Random(0)
    cut = [[*range(max(0, i - 10), i + 1)] for i in range(1, 300)]
    pairs = [{"prompt": "\n".join([*(log[p] for p in c[:-1]), "!"]), "completion": log[c[-1]]} for c in cut]
    draw.shuffle(pairs)
    chat.out.mkdir(parents=True)
    for name, part in ("valid", pairs[:30]), ("train", pairs[30:]):
        (chat.out / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part))
    assert len(true_leaks(chat, log, cut)) > 200


def test_the_sample_does_not_leak(chat):
    """Checked by text alone: of three messages on end in validation, not all stand on end in training."""
    shutil.copy(SCRIPT.parent / "data/raw/messages_v1.json", chat.root / "data/raw")
    assert chat.build("--prompt", "{context}\n!") is None

    def triples(name):
        rows = [[*pair["prompt"].split("\n")[:-1], pair["completion"]] for pair in chat.lines(name)]
        return {tuple(row[i : i + 3]) for row in rows for i in range(len(row) - 2)}

    assert len(chat.lines("train")) >= 300 and len(chat.lines("valid")) >= 30
    assert not {triple for triple in triples("valid") & triples("train") if len(set(triple)) > 1}


def test_a_chat_that_was_exported_twice_does_not_leak(chat):
    log = talk(400)
    chat.raw([*log, "and now once more", *log[150:]])
    assert chat.build("--prompt", "{context}\n!") is None
    rows = {
        name: [[*p["prompt"].split("\n")[:-1], p["completion"]] for p in chat.lines(name)]
        for name in ("train", "valid")
    }
    taken = {message for row in rows["valid"] for message in row}
    shared = [row for row in rows["train"] if len(taken.intersection(row)) >= 3]
    assert shared == []


def test_a_conversation_is_on_one_side(chat):
    entries = []
    for conversation in range(60):
        for entry in windows([f"{message} of {conversation}" for message in talk(12, seed=conversation)]):
            entries.append({**entry, "conversation": f"c{conversation}"})
    chat.raw(entries)
    assert chat.build() is None
    sides = [{re.search(r" of (\d+)$", p["completion"])[1] for p in chat.lines(name)} for name in ("train", "valid")]
    assert len(sides[0]) + len(sides[1]) == 60 and not sides[0] & sides[1] and sides[1]
    assert {rule for rule in chat.rules().values()} == set()


def test_one_conversation_can_be_the_whole_file(chat):
    chat.raw([{"message": message, "conversation": "only"} for message in talk(100)])
    assert chat.build() is None
    assert len(chat.lines("train")) >= 60 and 5 <= len(chat.lines("valid")) <= 20


@pytest.mark.parametrize("rows", [150, 400])
def test_validation_has_its_share_or_the_most_rows_allowed(chat, rows):
    chat.raw(windows(talk(3000)))
    assert chat.build("--valid-rows", rows) is None
    assert 0.7 * min(rows, 300) <= len(chat.lines("valid")) <= rows
    if rows == 150:
        assert len(chat.lines("valid")) == 150
        assert len(chat.lines("train")) > 2600  # what validation cannot use, training does


# ---- length ----------------------------------------------------------------------------------------------------------
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # takes away what an answer thought, and shouts: no template that is filled in once can do that
    "{% for m in messages %}[{{ m.role }}] {{ m.content.split('</think>')[-1] | upper }}\n{% endfor %}"
)


@pytest.mark.parametrize("jinja", [None, CHATML, THINKING])
def test_tokens_are_those_of_the_trainer(jinja, project):
    from mlx_lm.tuner.datasets import CompletionsDataset
    from mlx_lm.utils import load_tokenizer

    base = project / "models/base/tiny-gemma-3"
    if jinja:
        for name in base.glob("*.jinja"):
            name.write_text(jinja)
        config = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": jinja}))
    texts = [
        "ciao",
        "perché no? 😂",
        "a <b> c",
        "<think>hm</think> sì",
        "<end_of_turn>",
        "{context}",
        "x\ny",
        "한국어 ÀÈ",
    ]
    count = build_train.token_counter(base)
    rows = [{"prompt": prompt, "completion": reply} for prompt in texts for reply in texts]
    trainer = CompletionsDataset(rows, load_tokenizer(base), "prompt", "completion", False)
    assert count(rows) == [len(trainer.process(row)[0]) for row in rows]


def test_long_rows_lose_their_oldest_messages_and_never_the_reply(project, run):
    log = talk(200)
    long = {
        "previous_messages": ["hi"],
        "message": " ".join(f"risposta{i} nontagliare{i} lunga{i}," for i in range(20)),
    }
    (project / "data/raw/messages_v1.json").write_text(json.dumps([*windows(log), long]))
    done = run(project, "build_train.py", "--max-seq-length", 90, "--prompt", "{context}\n!")
    assert done.returncode == 0, done.stderr
    folder = project / "data/for_train/v1"
    from mlx_lm.utils import load_tokenizer

    tokenizer, longest = load_tokenizer(project / "models/base/tiny-gemma-3"), 0
    for pair in map(json.loads, [*(folder / "train.jsonl").open(), *(folder / "valid.jsonl").open()]):
        messages = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["completion"]}]
        tokens = len(tokenizer.apply_chat_template(messages))
        longest = max(longest, tokens)
        assert tokens <= 90
        *context, _ = pair["prompt"].split("\n")
        at = log.index(pair["completion"])
        assert context == log[at - len(context) : at]
        if len(context) < min(10, at):  # one more message would have been too many
            messages[0]["content"] = "\n".join([log[at - len(context) - 1], pair["prompt"]])
            assert len(tokenizer.apply_chat_template(messages)) > 90
    assert longest > 80
    dropped = {d["entry"]: d["rule"] for d in map(json.loads, (folder / "dropped.jsonl").open())}
    assert dropped[199] == "over --max-seq-length"


def rows_of(lengths):
    return [build_train.Row(i, ("a", "b"), tokens=tokens) for i, tokens in enumerate(lengths)]


@pytest.mark.parametrize("count", [1, 7, 100, 1000, 1003, 1999])
def test_order_gives_batches_of_equal_length_in_mlx_lm(count):
    import numpy as np
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import iterate_batches

    draw = random.Random(0)
    rows = rows_of([int(draw.lognormvariate(5, 0.6)) + 1 for _ in range(count)])
    ordered = build_train.order(rows, 0)
    assert sorted(row.number for row in ordered) == list(range(count))

    class Dataset(list):
        def process(self, row):
            return ([1] * row.tokens, 0)

    class Cache(CacheDataset):
        def itemlen(self, i):  # a Row has no len(); a row of the real dataset always has 2, its keys
            return 2

    def cost(rows, batch):
        """Tokens computed for each token that is in a row."""
        np.random.seed(0)
        batches = list(iterate_batches(Cache(Dataset(rows)), batch, 4096))
        return sum(b.size for b, _ in batches) / sum(lengths[:, 1].sum().item() for _, lengths in batches)

    for batch in 4, 16:
        if count >= 1000:
            ideal = cost(sorted(rows, key=lambda row: row.tokens), batch)
            assert cost(ordered, batch) <= 1.03 * ideal
            assert cost(rows, batch) > 1.2 * ideal


def test_rows_that_do_not_fill_a_batch_are_no_biased_sample():
    lengths = list(range(1, 1001))
    for batch in range(2, 17):
        left_out = []
        for seed in range(60):
            rows = build_train.order(rows_of(lengths[: 1000 - batch + 15]), seed)
            left_out += [row.tokens for row in rows[len(rows) - len(rows) % batch :]]
        if left_out:
            assert 0.75 < sum(left_out) / len(left_out) / 500 < 1.25


def test_without_the_base_model_tokens_are_estimated_and_that_is_said(chat, capsys):
    chat.raw(windows(talk(60)))
    assert chat.build() is None
    printed = capsys.readouterr().out
    assert "ESTIMATED" in printed and "hf download mlx-community/none --local-dir models/base/none" in printed


# ---- what is printed -------------------------------------------------------------------------------------------------
def test_the_summary_tells_what_happened_and_what_comes_next(project, run):
    done = run(project, "build_train.py")
    assert done.returncode == 0, done.stderr
    for rule in build_train.rules(None):
        assert re.search(rf"^{rule} +[\d,]+ ", done.stdout, re.M), rule
    assert "training rows with one: 0" in done.stdout
    assert re.search(r"^train +[\d,]+ tokens, longest row \d+, mean [\d.]+, padding [\d.]+% more", done.stdout, re.M)
    assert re.search(r"^one epoch +\d+ iterations at batch size 2", done.stdout, re.M)
    assert done.stdout.rstrip().endswith("next       ./fine_tune.sh")
    for name in "train.jsonl", "valid.jsonl", "dropped.jsonl":
        assert f"data/for_train/v1/{name}" in done.stdout
        assert (project / "data/for_train/v1" / name).exists()


def test_chat_text_cannot_write_to_the_terminal(chat, capsys):
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e https://x.example/"
    chat.raw([{"previous_messages": [evil], "message": evil}, *windows([evil + m for m in talk(60)])])
    assert chat.build("--off", "link") is None
    printed = capsys.readouterr().out
    chat.raw([{"message": "a"}, {"\x1b[2J": evil}])
    printed += chat.build()
    assert not [c for c in printed if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"]


# ---- bad input -------------------------------------------------------------------------------------------------------
BAD = {
    "0 bytes": (b"", r"messages_v1\.json is not there or empty"),
    "not JSON": (b'[\n{"message": "a"},\n  {"message" "b"}]', r"messages_v1\.json is not JSON: .*line 3, column 14"),
    "cut off": (b'["a", "b', r"is not JSON: .*line 1, column 7"),
    "lines in a .json": (b'{"message": "a"}\n{"message": "b"}\n', r"line 2, column 1\. FIX: .*mv .*messages_v1\.jsonl"),
    "Windows": ('["a",\n"perché"]'.encode("cp1252"), r"is not UTF-8 text, line 2\. FIX: iconv -f WINDOWS-1252"),
    "an object": (b'{"messages": []}', r"holds \{\"messages\": \[\]\}, not a list"),
    "a text": (b'"hi"', r"holds \"hi\", not a list"),
    "an empty list": (b"[]", r"0 rows are left"),
    "a number between": (b'["a", "b", 3]', r'line 2: "message" is 3'),
    "a null message": (b'["a", {"message": null}]', r'line 1: "message" is null'),
    "no message": (b'[{"message": "a"}, {"text": "b"}]', r'line 1: there is no "message" in \{"text": "b"\}'),
    "no keys at all": (b"[{}]", r'line 0: there is no "message" in \{\}'),
    "context is a text": (b'[{"previous_messages": "a", "message": "b"}]', r'"previous_messages" is "a"'),
    "context holds null": (b'[{"previous_messages": ["a", null], "message": "b"}]', r'line 0: .* is \["a", null\]'),
    "context holds a list": (b'[{"previous_messages": [["a"]], "message": "b"}]', r'line 0: .* is \[\["a"\]\]'),
    "half a pair": (b'[{"prompt": "a", "completion": "b"}, {"prompt": "c"}]', r'line 1: there is no "completion"'),
    "an author that is none": (b'[{"message": "a", "author": {}}]', r'line 0: "author" is \{\}'),
    "a conversation that is none": (b'[{"message": "a", "conversation": []}]', r'line 0: "conversation" is \[\]'),
    "too deep": (b"[" * 100_000, r"is not JSON: .*recursion"),
    "a number too long": (b"[" + b"9" * 5000 + b"]", r"is not JSON: .*digits"),
    "nothing left": (b'["!a", "!b"]', r"0 rows are left, too few to split \(it takes about 30\)\. FIX: .*--off"),
    "too few": (b'["what is it", "that is it", "so it is"]', r"2 rows are left, too few to split"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_answered_with_what_where_and_how_to_mend_it(chat, name):
    content, message = BAD[name]
    chat.raw(windows(talk(60)))
    assert chat.build() is None
    before = chat.content()
    chat.raw(content)
    error = chat.build()
    assert re.fullmatch(rf"error: .*{message}.*", error), error
    assert ". FIX: " in error and "\n" not in error
    assert chat.content() == before
    assert [path.name for path in chat.out.parent.iterdir()] == ["v1"]


def test_the_fix_of_a_bad_name_is_a_good_name(chat):
    assert chat.build("--version", "my chat").endswith("FIX: VERSION=mychat python build_train.py")
    assert chat.build("--version", "…").endswith("FIX: VERSION=v1 python build_train.py")


def test_a_bad_line_of_a_jsonl_file_is_named_by_its_number(chat):
    chat.raw(b'{"message": "a"}\n\n{"message": 3}\n', "messages_v1.jsonl")
    assert 'messages_v1.jsonl, entry or line 3: "message" is 3' in chat.build()
    chat.raw(b'{"message": "a"}\n{"message"}\n', "messages_v1.jsonl")
    assert "line 2, column 11" in (error := chat.build()) and "mv " not in error


def test_all_filtered_out_shows_the_table(chat, capsys):
    chat.raw(["!discord", "!uptime", "!uptime"])
    assert "FIX" in chat.build("--min-context", 0)
    assert re.search(r"^bot command +3 +!discord$", capsys.readouterr().out, re.M)


def test_the_process_ends_with_code_1_and_the_error_as_the_last_line(chat):
    chat.raw(b"[1]")
    process = chat.start()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.strip().split("\n")[-1].startswith("error: ") and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--valid-size", "1"], 2, "--valid-size is 1.0"),
        (["--valid-size", "nan"], 2, "--valid-size is nan"),
        (["--window", "0"], 2, "--window is 0"),
        (["--seed", "-1"], 2, "--seed is -1"),
        (["--seed", "4294967296"], 2, "--seed is 4294967296"),
        (["--batch-size", "four"], 2, "--batch-size"),
        (["--prompt", "hello"], 2, "--prompt or --question-prompt does not say where {context} goes"),
        (["--off", "lnik"], 2, "--off names 'lnik', and the rules are: empty, "),
        (["--nonsense"], 2, "--nonsense"),
        (["--model", "mlx-community/gemma"], 1, "MODEL=gemma"),
        (["--model", "../x y"], 1, "MODEL"),
        (["--version", "../v1"], 1, "VERSION"),
        (["--version", "-v"], 2, "--version"),
        (["--version", "v2"], 1, "data/raw/messages_v2.json is not there"),
    ],
)
def test_wrong_usage_is_answered_before_anything_is_read(chat, capsys, flags, code, message):
    got = chat.build(*flags)
    error = capsys.readouterr().err.strip().split("\n")[-1] if code == 2 else got
    assert (2 if got == 2 else 1) == code
    assert error.startswith("error: ") and message in error and ". FIX: " in error


def test_a_file_that_cannot_be_read_is_named(chat):
    raw = chat.root / "data/raw/messages_v1.json"
    raw.mkdir()
    process = chat.start()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"^error: .*messages_v1\.json cannot be read: .*\. FIX: ls -l", stderr.strip().split("\n")[-1])
    if os.geteuid():  # root reads everything
        raw.rmdir()
        chat.raw([])
        raw.chmod(0)
        _, stderr = chat.start().communicate(timeout=60)
        assert re.search(
            r"^error: .*messages_v1\.json.*Permission denied.*\. FIX: ls -l", stderr.strip().split("\n")[-1]
        )


def test_a_base_model_that_is_cut_off_is_named(chat):
    base = chat.root / "models/base/none"
    base.mkdir(parents=True)
    (base / "tokenizer.json").write_text('{"version": "1.0"')
    chat.raw(windows(talk(60)))
    assert re.fullmatch(r"error: models/base/none has no tokenizer .*\. FIX: .*", chat.build())
    assert not chat.out.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ALL_UNICODE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ALL_UNICODE, inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["previous_messages", "message", "author", "conversation", "prompt", "completion"])


@settings(RELAXED, max_examples=150)
@given(JSON | st.lists(st.dictionaries(KEYS, ALL_UNICODE | st.lists(ALL_UNICODE, max_size=3) | JSON)))
def test_any_json_ends_well_or_in_one_error_with_its_fix(tmp_path_factory, value):
    chat = Project(tmp_path_factory.mktemp("any") / "p")
    chat.raw(value)
    error = chat.build()
    assert error is None or re.fullmatch(r"error: .+\. FIX: .+", error), error


@settings(RELAXED, max_examples=60)
@given(st.lists(ALL_UNICODE, min_size=30, max_size=60), st.sampled_from(["windows", "log", "pairs"]))
def test_any_text_ends_in_files_that_the_trainer_can_read(tmp_path_factory, log, shape):
    chat = Project(tmp_path_factory.mktemp("any") / "p")
    pairs = [{"prompt": a, "completion": b} for a, b in pairwise(log)]
    chat.raw({"windows": windows(log), "log": log, "pairs": pairs}[shape])
    error = chat.build("--window", 2, "--off", "stock reply,too short,same words,same character,no letters")
    if error is None:
        for pair in chat.pairs():
            assert list(pair) == ["prompt", "completion"] and pair["prompt"] and pair["completion"]
        for name in "train", "valid", "dropped":
            text = (chat.out / f"{name}.jsonl").read_bytes().decode("utf-8")
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    else:
        assert re.fullmatch(r"error: .+\. FIX: .+", error), error


# ---- the output appears whole or not at all --------------------------------------------------------------------------
def test_killed_while_writing_leaves_the_previous_output(chat):
    chat.raw(windows(talk(60)))
    assert chat.build() is None
    before = chat.content()
    chat.raw(talk(40_000))
    process = chat.start()
    partial = chat.out.with_name("v1.partial")
    while process.poll() is None and not partial.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert partial.exists() and chat.content() == before
    chat.raw(windows(talk(60)))
    assert chat.build() is None
    assert chat.content() == before and [path.name for path in chat.out.parent.iterdir()] == ["v1"]


@pytest.mark.parametrize(("partial", "expected"), [(True, "new"), (False, "previous")])
def test_killed_in_the_middle_of_the_swap_is_mended_by_the_next_run_even_if_it_fails(chat, partial, expected):
    for name, there in ("v1.old", True), ("v1.partial", partial):
        if there:
            chat.out.with_name(name).mkdir(parents=True)
            (chat.out.with_name(name) / "train.jsonl").write_text("previous" if name == "v1.old" else "new")
    chat.raw(b"[")
    assert "not JSON" in chat.build()
    assert (chat.out / "train.jsonl").read_text() == expected
    assert [path.name for path in chat.out.parent.iterdir()] == ["v1"]


def check_full_disk(chat, **kwargs):
    before = chat.content()
    chat.raw(talk(3000))
    process = chat.start(**kwargs)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    last = stderr.strip().split("\n")[-1]
    assert re.fullmatch(r"error: data/for_train/v1 cannot be written: .+\. FIX: .*df -h.*", last)
    assert chat.content() == before and [path.name for path in chat.out.parent.iterdir()] == ["v1"]


def test_a_file_that_cannot_grow_leaves_the_previous_output(chat):
    chat.raw(windows(talk(60)))
    assert chat.build() is None
    limit = (100_000, 100_000)
    check_full_disk(chat, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))


def test_a_full_disk_leaves_the_previous_output(chat):
    disk = chat.root / "data/for_train"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        chat.raw(windows(talk(60)))
        assert chat.build() is None
        check_full_disk(chat)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_ctrl_c_ends_with_130_and_without_a_traceback(chat):
    chat.raw(talk(60_000))
    process = chat.start(stdout=subprocess.PIPE)
    process.stdout.readline()  # it prints its settings, and then reads
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr


# ---- the same input gives the same bytes -----------------------------------------------------------------------------
def test_two_processes_write_the_same_bytes(chat):
    log = [{"message": m, "author": f"a{i % 7}", "conversation": i % 3} for i, m in enumerate(talk(2000, stock=0.2))]
    chat.raw(log)
    outputs = []
    for seed, language in ("1", "C"), ("2", "it_IT.UTF-8"):
        process = chat.start(env=os.environ | {"PYTHONHASHSEED": seed, "LC_ALL": language, "LANG": language})
        assert process.communicate(timeout=60) and process.returncode == 0
        outputs.append(chat.content())
    assert outputs[0] == outputs[1]


def test_every_machine_writes_the_same_bytes(chat):
    """The bytes that one machine wrote once, held against the one that runs this."""
    chat.raw(windows(talk(300, stock=0.2)))
    assert chat.build() is None
    digests = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in chat.content().items()}
    assert digests == {
        "train.jsonl": "d009d38d9a10561f",
        "valid.jsonl": "3d1528f70f842252",
        "dropped.jsonl": "be8610903e47da5b",
    }


def test_another_seed_gives_another_split(chat):
    chat.raw(windows(talk(1000)))
    assert chat.build("--seed", 1) is None
    first = chat.content()
    assert chat.build("--seed", 2) is None
    assert chat.content()["valid.jsonl"] != first["valid.jsonl"]
