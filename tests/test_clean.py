"""What may be learned of a message: data/clean.py."""
# ruff: noqa: RUF001 (chat in many scripts)

from data.clean import clean, cleaners, hide_personal

import re
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

table = pytest.mark.parametrize


def cells(text):
    return text.strip().replace("\n", "|").split("|")


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


# ---- personal data -------------------------------------------------------------------------------
PERSONAL = """
anna.rossi+x@example.co.uk|+39 333 123 4567|3331234567!|(555) 123-4567|+4366412345678|@436641234567
wa.me/4366412345678|tel:0664123456|98765 43210|(11) 98765-4321|8 912 345-67-89|612 34 56 78
+1 (555) 123‑4567|06 12 34 56 78|06.12.34.56.78|0664/1234567|0171-1234567|02 1234 5678|138 1234 5678
010-1234-5678|9123 4567|20 12 34 56|555-1234|555 12 34|+43/664/1234567|00 43 664 1234567
0044 7400 123456|٠٥٠١٢٣٤٥٦٧|whatsapp://send?phone=39333123456|IT60 X054 2811 1010 0000 0123 456
it60x0542811101000000123456|DE89 3704 0044 0532 0130 00|GB82 WEST 1234 5698 7654 32
4111 1111 1111 1111|4111111111111111|378282246310005|3782 822463 10005|555.123.4567
"""
NOT_PERSONAL = """
TriHard 7|alle 10:30 o 11:45|3-0 2-1|6-4 7-5 6-7 3-6 7-6|1914-1918|2010/2011|il 31/12/2024 alle 10
1234-5 87-42|2024-05-31 18:04|2013-03-26-205909|kernel 2.6.15-27-686|v10.0.1.218|192.168.100.200
10.0.0.0/24|91.189.88.31:80|costa 1.234.567,89|2 000 000|14.500 euro|1234567|1 2 3 4 5 6 7 8 9
11 22 33 44 55 66 77 88 99|@anna7|[17180697.916000]|0x00060329|9582879ff7f8570a87554c|user@host
bugs.net/1234567|3.14159265358979
"""


@table("text", cells(PERSONAL))
def test_personal_data_of_all_countries_are_hidden(text):
    assert re.fullmatch(r"ecco \D*\[…\]\D* ciao", hide_personal(f"ecco {text} ciao"))


@table("text", cells(NOT_PERSONAL))
def test_other_numbers_stay(text):
    assert hide_personal(f"ecco {text} ciao") == f"ecco {text} ciao"


def test_ones_own_words_are_hidden_but_not_within_words(tmp_path):
    (tmp_path / "words").write_text("\ufeffAnna\nvia  Roma 12\nC++\n张伟\n\n", encoding="utf-8")
    tidy, _ = cleaners(True, str(tmp_path / "words"), [])
    texts = ["ANNA, ciao", "Susanna e annata", "in Via Roma 12!", "via Roma 123", "uso c++"]
    hidden = ["[…], ciao", "Susanna e annata", "in […]!", "via Roma 123", "uso […]"]
    assert [*map(tidy, texts)] == hidden
    assert tidy("我是张伟啊") == "我是[…]啊"


@table("name", ["words", "not there"])
def test_a_block_list_that_cannot_be_read_is_named(tmp_path, capsys, name):
    (tmp_path / "words").write_bytes(b"\xff")
    with pytest.raises(SystemExit):
        cleaners(True, str(tmp_path / name), [])
    assert re.search(rf"^error: --block: .*\nFIX: ls -l .*{name}", capsys.readouterr().err)


# ---- names ---------------------------------------------------------------------------------------
def test_an_author_who_is_a_telephone_number_is_shown_as_a_person():
    _, name = cleaners(True, None, [])
    assert name("\u202a+39\u00a0333\u00a0123\u00a04567\u202c") == "Person 1"
    assert name("+39 333 765 4321") == "Person 2"
    assert name("+39 333 123 4567") == "Person 1"
    assert name("bob") == "bob"


def test_a_name_is_cut_at_60_characters():
    _, name = cleaners(True, None, [])
    assert name("b" * 99) == "b" * 60


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


# ---- time ----------------------------------------------------------------------------------------
LONG = ["1", "12 34-", "+4", "a.b@", "e\u0301\u0323", "x\n", " ", "[", "<|", "a", "👩\u200d"]
LONG += ["AT61 ", "http://", "\\"]  # what patterns may choke on


@table("text", LONG, ids=ascii)
def test_no_text_takes_long(text):
    tidy, _ = cleaners(True, None, [])
    start = time.process_time()
    tidy("x" + text * (50_000 // len(text)) + "y")
    assert time.process_time() - start < 2
