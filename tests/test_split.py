"""No message stands in a row to train with and in one to validate with: data/split.py."""

from data.split import draw, drop_copies, split, stretches

from dataclasses import dataclass

import pytest

table = pytest.mark.parametrize


@dataclass
class Row:
    message: str
    talk_number: int
    places: range
    texts: tuple = ()
    rule: str = ""


def rows_of(*sizes, window=10):
    """Return the rows of talks of so many messages, one for each message but the first."""
    rows, first = [], 0
    for talk, size in enumerate(sizes):
        for end in range(first + 1, first + size):
            rows.append(Row(f"no{end}", talk, range(max(first, end - window), end + 1)))
        first += size
    return rows


def places(rows):
    return set().union(*(row.places for row in rows))


# ---- stretches -----------------------------------------------------------------------------------
def test_a_talk_is_a_stretch_and_a_long_one_is_several():
    stretch_of = stretches(rows_of(3, 200, 4))
    assert stretch_of[:3] == [1, 1, 1]
    assert stretch_of[3:203] == [2] * 51 + [3] * 50 + [4] * 50 + [5] * 49
    assert stretch_of[203:] == [6, 6, 6, 6]


# ---- the drawing ---------------------------------------------------------------------------------
def test_as_few_stretches_are_drawn_as_hold_the_rows_that_are_wanted():
    sizes = {number: 10 for number in range(100)}
    assert len(draw(sizes, 40, seed=0)) == 4
    assert len(draw(sizes, 41, seed=0)) == 5
    assert set(draw(sizes, 40, seed=0)) < set(draw(sizes, 41, seed=0))
    assert draw(sizes, 40, seed=0) != draw(sizes, 40, seed=1)


def test_one_stretch_is_left_to_train_with():
    assert len(draw({1: 5, 2: 5, 3: 5}, 99, seed=0)) == 2
    assert draw({1: 5}, 99, seed=0) == []


SHARES = [(0.1, 400, range(280, 340)), (0.3, 4000, range(880, 1060)), (0.1, 100, range(100, 160))]


@table(("valid_size", "valid_rows", "valid"), SHARES)
def test_validation_has_its_share_or_the_most_rows_and_training_has_the_others(
    valid_size, valid_rows, valid
):
    rows = rows_of(3000)
    train, held_out = split(rows, valid_size, valid_rows, 0)
    assert len(held_out) in valid
    assert len(train) > 2999 - len(held_out) * 1.6  # a stretch of 50 leaves 10 rows at either end
    assert len(train) + len(held_out) + sum(row.rule != "" for row in rows) == 2999


@table("window", [1, 3, 10, 60])
@table("sizes", [(900,), (30,) * 30, (2, 500, 7, 60), (5,) * 100])
def test_no_place_is_on_both_sides(sizes, window):
    train, valid = split(rows_of(*sizes, window=window), 0.1, 400, 0)
    assert train and valid
    assert not places(train) & places(valid)


# ---- copies --------------------------------------------------------------------------------------
def of_texts(*texts):
    return Row(texts[-1], 0, range(len(texts)), texts)


def kept(train, valid):
    drop_copies(train, valid)
    return [row for row in valid if not row.rule]


LONG = [f"message {i} of a long talk" for i in range(40)]
TRAIN = [of_texts(*LONG[i : i + 10]) for i in range(10)]


def test_a_row_that_shares_three_messages_on_end_with_training_does_not_validate():
    copy, other = of_texts("x", "y", *LONG[:3], "z"), of_texts("x", "y", *LONG[:2], "z")
    assert kept(TRAIN, [copy, other]) == [other]
    assert copy.rule == "split: is in train as well"


@table("longest", [3, 5])
def test_of_short_rows_two_messages_on_end_are_a_copy(longest):
    train = [of_texts(*LONG[i : i + longest]) for i in range(10)]
    copy, other = of_texts("x", *LONG[:2]), of_texts("x", "y", LONG[1])
    assert kept(train, [copy, other]) == [other]


def test_what_everybody_says_is_no_copy():
    short = of_texts("gg", "lol", "gg", "wp", "so it is")
    assert kept([*TRAIN, short], [short]) == [short]


def test_an_instruction_that_all_prompts_share_is_no_copy():
    """Ready pairs may all begin with the same lines."""
    lines = ["You are Ann, a good friend.", "Answer in Italian.", "Be as brief as you can."]
    rows = [of_texts(*lines, f"question {i}", f"answer {i}") for i in range(44)]
    assert kept(rows[:40], rows[40:]) == rows[40:]
