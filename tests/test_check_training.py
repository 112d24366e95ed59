"""What fine_tune.sh is given is checked before a model is loaded; auto becomes a number."""

from models import check_training

import json
import re
import shlex
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import REPOSITORY, cut_off

BASE, DATA = "models/base/tiny-gemma-3", "data/for_train/sample"
ROWS = [("ciao raga", "tutto bene bro"), ("che gioco fai stasera", "sempre lo stesso LULW")] * 4
USUAL = {name: default for name, (_, _, default) in check_training.SETTINGS.items()}


def write_rows(project, rows=ROWS):
    (project / DATA).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": prompt, "completion": reply}) + "\n" for prompt, reply in rows]
    (project / DATA / "train.jsonl").write_text("".join(lines))
    (project / DATA / "valid.jsonl").write_text(lines[0])  # not the longest one


@pytest.fixture
def check(project, monkeypatch, capsys):
    """Return check(RANK=8): the settings it prints, what it says, or its error and FIX lines."""
    write_rows(project)
    monkeypatch.chdir(project)

    def check(**settings):
        for name, value in {"VERSION": "sample", "MODEL": "tiny-gemma-3", **settings}.items():
            monkeypatch.setenv(name, str(value))
        try:
            check_training.main(f"{DATA}/train.jsonl", f"{DATA}/valid.jsonl")
        except SystemExit as end:
            assert end.code == 1
        printed, said = capsys.readouterr()
        words = [word.split("=", 1) for word in shlex.split(printed)]
        assert "Traceback" not in said and "\x1b" not in said
        return SimpleNamespace(settings=dict(words), said=said, lines=said.splitlines())

    return check


# ---- the settings --------------------------------------------------------------------------------
def test_the_defaults_are_those_of_fine_tune_sh():
    script = (REPOSITORY / "fine_tune.sh").read_text("utf-8")
    defaults = dict(re.findall(r"^([A-Z_]+)=\$\{\1:-(.*?)\}", script, re.MULTILINE))
    for name in "VERSION", "MODEL", "LAUNCH":
        del defaults[name]
    assert defaults == {name: str(default) for name, default in USUAL.items()}


def test_the_shell_gets_numbers_where_the_settings_say_auto(check):
    settings = check().settings
    assert (settings["ITERS"], settings["LEARNING_RATE"], settings["RANK"]) == ("4", "0.0012", "32")
    assert "model.embed_tokens" in settings["KEYS"]
    assert "model.embed_tokens" not in check(EMBEDDINGS=0).settings["KEYS"]
    assert len(settings["TRAIN_SHA256"]) == 64


WRONG = [  # a setting, its value, what it should be, the default
    ("ITERS", "10,000", "a whole number from 1", "auto"),
    ("LEARNING_RATE", "nan", "a number from 1e-09", "auto"),
    ("SCALE", "inf", "a number from 0.1", "10.0"),
    ("DROPOUT", "1.5", "a number from 0.0 to 0.9", "0.0"),
    ("CHECK_MEMORY", "yes", "a whole number from 0 to 1", "1"),
    ("BATCH_SIZE", "$(touch harm)", "a whole number from 1", "2"),
]


@pytest.mark.parametrize(("name", "value", "what", "proposal"), WRONG)
def test_a_wrong_setting_is_answered_with_the_default(check, name, value, what, proposal):
    assert check(**{name: value}).lines == [
        f"error: {name}={value} is not {what}",
        f"FIX: VERSION=sample MODEL=tiny-gemma-3 {name}={proposal} ./fine_tune.sh",
    ]


@pytest.mark.parametrize(
    ("hidden", "rate"), [(640, 2e-4), (1152, 1.3e-4), (2560, 6.8e-5), (5376, 3.8e-5)]
)
def test_the_learning_rate_follows_the_size_of_the_model(hidden, rate):
    s = SimpleNamespace(BATCH_SIZE=2, ITERS="auto", LEARNING_RATE="auto")
    check_training.fill_in(s, SimpleNamespace(hidden=hidden), rows=5000)
    assert (600, rate) == (s.ITERS, s.LEARNING_RATE)


def test_more_than_two_epochs_are_warned_of(check):  # 8 rows, 2 in a batch: 4 batches are one
    assert "warning" not in check(ITERS=8).said
    assert "warning: more than two epochs" in check(ITERS=9).said


UNFIT = [
    ({"NUM_LAYERS": 9}, "NUM_LAYERS=9 is not one of the 6 layers"),
    ({"NUM_LAYERS": 0}, "NUM_LAYERS=0 is not one of the 6 layers"),
    ({"MAX_SEQ_LENGTH": 20}, "a row has 28 tokens: MAX_SEQ_LENGTH=20 cuts off its reply"),
    ({"BATCH_SIZE": 9}, "BATCH_SIZE=9: a batch can have at most 8 of these rows"),
]


@pytest.mark.parametrize(("settings", "error"), UNFIT)
def test_settings_that_do_not_go_with_the_rows_or_the_base_are_refused(check, settings, error):
    assert f"error: {error}" in check(**settings).said


# ---- the longest row -----------------------------------------------------------------------------
class Bytes:
    """A tokenizer that makes a token of each byte, but one of a hundred a."""

    calls = 0

    def apply_chat_template(self, chat, add_generation_prompt=False, return_dict=False):
        self.calls += 1
        text = "".join(f"<{turn['content']}>" for turn in chat)
        return list(text.replace("a" * 100, "a").encode()) + [0] * add_generation_prompt


def test_the_longest_row_need_not_be_the_largest_and_is_found_without_tokenizing_all(monkeypatch):
    monkeypatch.setattr(check_training, "encode", lambda t, chat: (t.apply_chat_template(chat), 0))
    tokenizer = Bytes()
    replies = ["b" * 10] * 5000 + ["b" * 500, "a" * 1000, "b" * 499]
    chats = [
        [{"role": "user", "content": ""}, {"role": "assistant", "content": r}] for r in replies
    ]
    assert check_training.longest_of_many(tokenizer, chats) == 504
    assert tokenizer.calls < 10


# ---- memory --------------------------------------------------------------------------------------
def test_what_does_not_fit_is_refused_with_settings_that_do(monkeypatch, capsys):
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 40e9})
    settings = SimpleNamespace(**USUAL)
    blocks = [SimpleNamespace(adapted=123_648, used=123_648, state=0)] * 62
    gemma_27b = {"blocks": blocks, "hidden": 5376, "vocabulary": 262_144, "weights": 15.2e9}
    size = SimpleNamespace(**gemma_27b)
    with pytest.raises(SystemExit):
        check_training.check_memory(settings, size, longest=512)
    assert "GRAD_CHECKPOINT=1 ./fine_tune.sh" in capsys.readouterr().err
    for what_fits in {"GRAD_CHECKPOINT": 1}, {"CHECK_MEMORY": 0}:
        check_training.check_memory(SimpleNamespace(**USUAL | what_fits), size, longest=512)


# ---- base model and data -------------------------------------------------------------------------
def change_config(project, **values):
    path = project / BASE / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write(file, text):
    return lambda project: (project / file).write_bytes(text)


def row(line):
    return write(f"{DATA}/valid.jsonl", b'{"prompt": "a", "completion": "b"}\n' + line + b"\n")


# It begins a reply otherwise than it writes one.
AMBIGUOUS = b"{% for m in messages %}{{ m.content }}!{% endfor %}{{ add_generation_prompt }}"
TINY = "FIX: python tests/tiny_base.py"
BUILD = "FIX: VERSION=sample MODEL=tiny-gemma-3 python build_train.py"
REFUSED = {  # what was done to the project, the error, the first FIX
    "no base": (lambda p: (p / BASE).rename(p / BASE.replace("tiny", "my")),
        f"there is no {BASE}/config.json", TINY),
    "no data": (lambda p: (p / DATA).rename(p / DATA.replace("sample", "mine")),
        f"there is no {DATA}/train.jsonl", BUILD),
    "weights cut off": (lambda p: cut_off(p / BASE / "model.safetensors"), "incomplete", TINY),
    "no sizes": (write(f"{BASE}/config.json", b"{}"), f"{BASE} cannot be used", TINY),
    "code": (lambda p: change_config(p, model_file="harm.py"), "custom module", TINY),
    "tokenizer empty": (write(f"{BASE}/tokenizer.json", b"{}"), f"{BASE} cannot be used", TINY),
    "template ambiguous": (write(f"{BASE}/chat_template.jinja", AMBIGUOUS), "reply", TINY),
    "no reply": (row(b'{"prompt": "3"}'), f"{DATA}/valid.jsonl, line 2: KeyError", BUILD),
    "not UTF-8": (row(b"\xff"), f"{DATA}/valid.jsonl, line 2: UnicodeDecodeError", BUILD),
    "half a character": (row(rb'{"prompt": "\ud800", "completion": ""}'), "line 2", BUILD),
    "control token": (row(b'{"prompt": "a", "completion": "<eos>"}'), "row holds <eos>", BUILD),
    "deep": (row(b"[" * 100_000), f"{DATA}/valid.jsonl, line 2: RecursionError", BUILD),
}  # fmt: skip


@pytest.mark.parametrize(("harm", "error", "fix"), REFUSED.values(), ids=REFUSED)
def test_what_is_missing_or_damaged_is_told_with_what_mends_it(project, check, harm, error, fix):
    harm(project)
    lines = check().lines
    assert lines[0].startswith("error: ") and error in lines[0] and lines[1].startswith(fix)


def test_the_base_models_that_are_there_are_proposed(check):
    assert "FIX: export MODEL=tiny-gemma-3" in check(MODEL="tiny-gema-3").lines
