"""models/verdict.py: the headline follows the worse of two answers, and each says what it means."""

from models import verdict

from collections import defaultdict

import pytest

NAN = float("nan")
USUAL = {"question": 0.1, "emoji": 0.2, "capital first": 0.3, "full stop last": 0.1}
USUAL |= {"several lines": 0.0, "looping": 0.0, "unfinished": 0.0, "replies": 100}
FACTS = {
    "name": "Ann",
    "author": "Ann",
    "judged": "adapter",
    "rows": 60,
    "asked": 50,
    "run": "VERSION=v1 MODEL=m",
    "training": {"ITERS": "300", "LEARNING_RATE": "3e-4"},
    "curve": [(0, 3.2), (200, 2.4), (300, 2.3)],
}


def table_of(base=3.2, adapter=2.3, told=0.55, floor=0.5, other=0.9, error=0.05, **more):
    """Return a table as of figures.py: losses, how well the replies are told apart, style."""
    table = defaultdict(dict, loss={"base": base, "adapter": adapter})
    table["gain"], table["gain error"] = {"adapter": base - adapter}, {"adapter": 0.04}
    table["told apart"] = {"adapter": told, "reference": floor, "somebody else": other}
    table["told apart error"] = dict.fromkeys(table["told apart"], error)
    table["missing words"] = {"adapter": ""}
    table["pairs"] = {"adapter": 25}
    for name, value in USUAL.items():
        table[name] = {"reference": value, "adapter": value}
    for name, value in more.items():
        table[name.replace("_", " ")]["adapter"] = value
    return table


def told(table, **facts):
    """Return the headline, both words, and the commands of what to do next."""
    found = verdict.verdict(table, FACTS | facts)
    words = [answer["word"] for answer in found["answers"]]
    return found["headline"], words, [command for _, command in found["next"]]


TALK = "VERSION=v1 MODEL=m python models/chat.py"
MORE = "python data/raw/from_export.py --help"
FINE = "It learned, and it sounds like Ann."
NEARLY = "It learned, and it nearly sounds like Ann."
NOT_YET = "It learned something, but it does not sound like Ann yet."
NO_BETTER = "It is no better than the base model."
TRAIN = "VERSION=v1 MODEL=m {} ./fine_tune.sh"
FEW = "There are too few replies to say whether it learned."
BUILD = "VERSION=v1 MODEL=m python build_train.py --only-author Ann --valid-size 0.3"
REPLIES = "VERSION=v1 MODEL=m python test_on_validation.py --replies 100"

# {id: (figures, facts, headline, words, the first command)}
VERDICTS = {
    "fine": (table_of(), {}, FINE, ["yes", "yes"], TALK),
    "nearly": (table_of(told=0.65), {}, NEARLY, ["yes", "nearly"], TALK),
    "not yet": (table_of(told=0.75), {}, NOT_YET, ["yes", "no"], MORE),
    "not yet, as another": (table_of(told=0.66, other=0.8), {}, NOT_YET, ["yes", "no"], MORE),
    "gibberish that learned": (table_of(7.95, 6.03, told=1.0), {}, NOT_YET, ["yes", "no"], MORE),
    "it loops": (table_of(told=0.5, looping=0.4), {}, NEARLY, ["yes", "nearly"], TALK),
    "chance": (table_of(adapter=3.15), {}, NO_BETTER, ["no", "yes"], TRAIN.format("ITERS=600")),
    "worse": (
        table_of(adapter=3.6, told=0.55), {}, "It became worse than the base model.",
        ["no", "yes"], TRAIN.format("LEARNING_RATE=0.0001")),
    "broken": (
        table_of(adapter=NAN), {}, "The training went wrong: a loss is not a number.",
        ["no", "yes"], TRAIN.format("LEARNING_RATE=0.0001")),
    "few rows": (table_of(), {"rows": 7}, FEW, ["unsure", "yes"], BUILD),
    "few rows that became worse": (
        table_of(adapter=3.6), {"rows": 7}, FEW,
        ["unsure", "yes"], TRAIN.format("LEARNING_RATE=0.0001")),
    "few replies": (
        table_of(error=0.12), {},
        "It learned; there are too few replies to say whether it sounds like Ann.",
        ["yes", "unsure"], REPLIES),
    "few replies of few rows": (
        table_of(error=0.12), {"rows": 50},
        "It learned; there are too few replies to say whether it sounds like Ann.",
        ["yes", "unsure"], BUILD),
    "best early": (
        table_of(), {"curve": [(0, 3.2), (100, 2.3), (300, 2.9)]}, FINE,
        ["yes", "yes"], TRAIN.format("ITERS=100")),
}  # fmt: skip


@pytest.mark.parametrize(
    ("table", "facts", "headline", "words", "command"), list(VERDICTS.values()), ids=list(VERDICTS)
)
def test_the_verdict(table, facts, headline, words, command):
    found = told(table, **facts)
    assert found[:2] == (headline, words)
    assert found[2][0] == command


def test_a_base_model_alone_cannot_be_judged():
    table = table_of()
    table["gain"], table["loss"] = {}, {"base": 3.2}
    assert told(table, judged="base")[1][0] == "unsure"
    assert told(table, judged="base")[2][0] == "VERSION=v1 MODEL=m ./fine_tune.sh"


def test_of_an_adapter_of_peft_the_settings_are_unknown():
    for table in table_of(adapter=3.6), table_of(adapter=3.15), table_of(adapter=NAN):
        commands = told(table, training={}, curve=[])[2]
        assert commands[0] == "VERSION=v1 MODEL=m ./fine_tune.sh"


def test_a_fused_model_that_lost_something_is_fused_again():
    table = table_of()
    table["kept"] = {"fused": 0.5}
    headline, _, commands = told(table)
    assert headline == "The adapter learned, but the fused model has lost part of it."
    assert commands[0] == "VERSION=v1 MODEL=m FUSED_BITS=16 ./fuse.sh"


def test_an_answer_is_a_figure_of_which_more_is_better_and_what_it_means():
    learned, sounds = verdict.verdict(table_of(told=0.63), FACTS)["answers"]
    assert (learned["figure"], sounds["figure"]) == ("10%", "37%")
    assert "As a loss: 2.30 instead of 3.20." in learned["means"]
    assert "(± 5 points). 50% is perfect: nobody could tell." in sounds["means"]
    assert sounds["question"] == "Does it sound like Ann?"


def test_what_is_beside_it_stands_in_bars_of_which_longer_is_better():
    found = verdict.verdict(table_of(told=0.63), FACTS)
    learned, sounds = ([bar[0::2] for bar in answer["bars"]] for answer in found["answers"])
    assert learned == [("base", "4.1%"), ("adapter", "10%")]
    assert sounds == [("adapter", "37%"), ("reference", "50%"), ("somebody else", "10%")]
    shown = [line.split() for line in verdict.as_text(found)]
    assert ["other", "real", "replies", "50%", "█" * 40] in shown
    assert ["somebody", "else", "10%", "█" * 8] in shown


def test_what_differs_is_said_in_words():
    table = table_of(emoji=0.8, unfinished=0.3, missing_words="“don't”")
    assert verdict.verdict(table, FACTS)["answers"][1]["more"] == [
        "Unfinished: 30% of its replies, 0% of real ones.",
        "Emoji: 80% of its replies, 20% of real ones.",
        "It never says “don't”.",
    ]
    few = table_of(emoji=0.6, replies=5)
    assert verdict.far_figures(few, "adapter") == []


def test_reciting_the_training_data_is_not_sounding_like_somebody():
    table = table_of()
    table["by heart"] = {"adapter": 0.5, "reference": 0.04}
    table["long replies"] = {"adapter": 40, "reference": 50}
    headline, _, commands = told(table)
    assert (headline, commands[0]) == (NEARLY, TRAIN.format("ITERS=150"))
    assert verdict.by_heart(table, "adapter") == (
        "50% of its replies of 20 characters or more stand word for word in the training data, "
        "4% of the real replies to the same rows."
    )
    table["by heart"]["adapter"] = 0.08
    assert told(table)[0] == FINE


@pytest.mark.parametrize(
    ("loss", "shown"), [(0, "100%"), (2.3, "10%"), (3.2, "4.1%"), (6, "0.25%")]
)
def test_a_loss_as_a_chance(loss, shown):
    assert verdict.chance(loss) == shown
