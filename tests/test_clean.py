"""What may be learned of a message: data/clean.py."""
# ruff: noqa: RUF001 (chat in many scripts)

from data.clean import clean, cleaners, control_token_in, control_tokens

import re
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

table = pytest.mark.parametrize


# ---- what cannot be seen -------------------------------------------------------------------------
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
]


@table(("dirty", "expected"), DIRTY)
def test_what_can_be_read_stays_and_what_cannot_be_seen_goes(dirty, expected):
    assert clean(dirty) == expected


@settings(deadline=None, database=None, derandomize=True, max_examples=300)
@given(st.text(st.characters()))
def test_any_text_becomes_one_line_of_normal_utf_8(text):
    cleaned = clean(text)
    assert cleaned == clean(cleaned) == unicodedata.normalize("NFC", cleaned)
    assert cleaned == " ".join(cleaned.split())
    assert not {unicodedata.category(letter) for letter in cleaned} & {"Cc", "Cs"}


# ---- one's own words -----------------------------------------------------------------------------
def test_ones_own_words_are_hidden_but_not_within_words(tmp_path):
    (tmp_path / "words").write_text("\ufeffAnna\nvia  Roma 12\nC++\n张伟\n\n", encoding="utf-8")
    tidy, _ = cleaners(True, str(tmp_path / "words"), [])
    texts = ["ANNA, ciao", "Susanna e annata", "in Via Roma 12!", "via Roma 123", "uso c++"]
    hidden = ["[…], ciao", "Susanna e annata", "in […]!", "via Roma 123", "uso […]"]
    assert [*map(tidy, texts)] == hidden
    assert tidy("我是张伟啊") == "我是[…]啊"


@table("name", ["not UTF-8", "not there"])
def test_a_block_list_that_cannot_be_read_is_named(tmp_path, capsys, name):
    (tmp_path / "not UTF-8").write_bytes(b"\xff")
    with pytest.raises(SystemExit):
        cleaners(True, str(tmp_path / name), [])
    assert re.search(rf"^error: --block: .*\nFIX: ls -l .*{name}", capsys.readouterr().err)


# ---- names ---------------------------------------------------------------------------------------
def test_an_author_who_is_a_telephone_number_is_shown_as_a_person():
    _, name = cleaners(True, None, [])
    numbers = "\u202a+39\u00a0333\u00a0123\u00a04567\u202c", "+39 333 765 4321", "+39 333 123 4567"
    assert [*map(name, numbers)] == ["Person 1", "Person 2", "Person 1"]
    assert name("bob") == "bob" and name("b" * 99) == "b" * 60


# ---- control tokens ------------------------------------------------------------------------------
CONTROL = [
    ("ok<end_of_turn>", "ok< end_of_turn>"),
    ("<|im_start|>system", "< |im_start|>system"),
    ("<turn|> <|turn>", "< turn|> < |turn>"),
    ("<｜User｜> <eos> </s>", "< ｜User｜> < eos> < /s>"),
    ("<en\u200bd_of_turn>", "< end_of_turn>"),
    ("the base's own: <go!>", "the base's own: < go!>"),
    ("<b> c, <3, x < y | z >, vector<int>, [x]", "<b> c, <3, x < y | z >, vector<int>, [x]"),
]


@table(("text", "expected"), CONTROL)
def test_control_tokens_become_harmless_and_other_brackets_stay(text, expected):
    tidy, _ = cleaners(True, None, ["<go!>"])
    assert tidy(text) == expected


class Tokenizer:
    """What is asked of the tokenizer of a base model."""

    all_special_tokens = ("<eos>",)

    def get_added_vocab(self):
        texts = ["<think>", "[TOOL_CALLS]", "<filename>", "<b>", "</h1>", "\n\n", "ciao", "▁▁"]
        return {text: i for i, text in enumerate(texts)}


def test_all_tokens_that_a_tokenizer_was_given_control_but_not_its_words_and_html():
    assert control_tokens(Tokenizer()) == ["<eos>", "<filename>", "<think>", "[TOOL_CALLS]"]


def test_control_tokens_are_found_once_more_before_training():
    tidy, _ = cleaners(True, None, [])  # the data are older than the base
    chats = [[{"role": "user", "content": tidy(f"ciao {text}")}] for text in ("<b>", "<filename>")]
    assert control_token_in(chats, Tokenizer()) == "<filename>"
    assert control_token_in(chats[:1], Tokenizer()) is None


# ---- time ----------------------------------------------------------------------------------------
LONG = ["1", "12 34-", "+4", "a.b@", "e\u0301\u0323", "x\n", " ", "[", "<|", "a", "👩\u200d"]
LONG += ["AT61 ", "http://", "\\"]  # what patterns may choke on


@table("text", LONG, ids=ascii)
def test_no_text_takes_long(text):
    tidy, _ = cleaners(True, None, [])
    start = time.process_time()
    tidy("x" + text * (50_000 // len(text)) + "y")
    assert time.process_time() - start < 2
