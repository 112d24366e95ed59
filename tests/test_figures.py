"""models/figures.py: true figures, with errors that cover what chance does."""

from models import figures

from collections import defaultdict

import numpy as np
import pytest


# ---- losses --------------------------------------------------------------------------------------
def losses(**nats):
    """Return the table of rows of two tokens each, by the nats of each row."""
    table = defaultdict(dict)
    nats = {who: np.array(rows, dtype=float) for who, rows in nats.items()}
    figures.add_losses(table, nats, np.array([2] * len(next(iter(nats.values())))))
    return table


def test_loss_gain_and_what_the_fused_model_keeps():
    table = losses(base=[10, 6], adapter=[4, 4], fused=[6, 4])
    assert table["loss"] == {"base": 4.0, "adapter": 2.0, "fused": 2.5}
    assert table["gain"] == {"adapter": 2.0, "fused": 1.5}
    assert table["gain error"]["adapter"] == pytest.approx(0.7071, abs=1e-4)
    assert table["kept"] == {"fused": 0.75}


def test_what_is_kept_of_a_gain_that_may_be_chance_is_not_said():
    assert losses(base=[10, 6], adapter=[9, 6.6], fused=[9, 6])["gain"]["adapter"] > 0
    assert losses(base=[10, 6], adapter=[9, 6.6], fused=[9, 6])["kept"] == {}
    assert losses(base=[10, 6], adapter=[11, 7], fused=[12, 8])["kept"] == {}
    assert losses(adapter=[4, 4])["gain"] == {}


# ---- told apart ----------------------------------------------------------------------------------
WORDS = ["boh", "ciao", "dai", "ma", "no", "però", "sedia", "sì", "vai", "certo"]


def texts(count, seed):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, 4)) for _ in range(count)]


def test_the_classifier_tells_what_can_be_told_and_no_more():
    real, alike = texts(100, 0), texts(100, 1)
    share, error = figures.told_apart(real, alike)
    assert abs(share - 0.5) < 2 * error
    share, error = figures.told_apart(real, [text.capitalize() for text in alike])
    assert share == 1.0
    assert 0 < error < 0.02
    assert figures.told_apart(real, real)[0] == 0.5


def test_the_classifier_is_judged_on_pairs_of_which_it_has_learned_neither():
    """Each pair shares words of its own: whoever learned one reply would misjudge the other."""
    pairs = [(f"{a} {b} {c} x", f"{a} {b} {c} y") for a in WORDS for b in WORDS[:4] for c in "k"]
    mixed = [pair[:: 1 if place % 2 else -1] for place, pair in enumerate(pairs)]
    share, error = figures.told_apart(*map(list, zip(*mixed, strict=True)))
    assert share > 0.5 - 2 * error


def test_the_error_covers_what_another_seed_gives():
    real = texts(60, 0)
    shares, errors = zip(
        *[figures.told_apart(real, texts(60, seed)) for seed in range(1, 9)], strict=True
    )
    assert np.std(shares) < 1.2 * np.mean(errors)


def test_that_the_person_is_told_from_themselves_is_never_better_than_chance(monkeypatch):
    monkeypatch.setattr(figures, "told_apart", lambda real, made: (0.4, 0.05))
    table = defaultdict(dict)
    for who in "base", "reference":
        figures.add_told_apart(table, who, ["hi"], ["ho"])
    assert table["told apart"] == {"base": 0.4, "reference": 0.5}


# ---- style ---------------------------------------------------------------------------------------
STYLE = {
    "looping": (["sa sa sa sa", "boh\nboh\nboh\nboh"], ["no no no", "hahahaha", "ok"]),
    "emoji": (["ok 🙏🏽", ":-)", "va bene ;D"], ["12:30", "a:b", "C:(x)", "=)x"]),
    "full stop last": (["Ok.", "好。"], ["ok...", "ok", "a.b"]),
    "question": (["perché?", "لماذا؟"], ["perché"]),
    "capital first": (["Ok", "È vero"], ["ok", "è", "🙏 Ok", ""]),
    "several lines": (["a\nb"], ["a b"]),
}


@pytest.mark.parametrize("name", STYLE)
def test_a_figure_of_style_is_the_share_of_replies_that_have_it(name):
    with_it, without = STYLE[name]
    table = defaultdict(dict)
    figures.add_style(table, "base", with_it)
    figures.add_style(table, "adapter", without)
    figures.add_style(table, "fused", [with_it[0], without[0]])
    assert table[name] == {"base": 1.0, "adapter": 0.0, "fused": 0.5}


def test_favourite_words_that_are_missing_are_quoted_and_whole():
    real = ["boh I don't", "boh", "boh", "Boh!", "boh don\u2019t", "boh", "don't", "don't", "Don't"]
    assert figures.missing_words(real, ["ma certo"], {"ann"}) == "“boh”, “don't”"
    assert figures.missing_words(real, ["BOH", "don\u2019t"], set()) == ""
    assert figures.missing_words(real, [], {"boh"}) == "“don't”"


# ---- learned by heart ----------------------------------------------------------------------------
def test_long_replies_that_stand_in_what_was_learned_are_counted():
    learned = "ann: see you at the station at nine\nbob: boh"
    replies = ["boh", "see you at the station", "you at the station at nine"]
    replies += ["see you at the airport"]
    table = defaultdict(dict)
    figures.add_by_heart(table, "adapter", replies, learned)
    figures.add_by_heart(table, "base", ["boh"], learned)
    assert table["by heart"] == {"adapter": pytest.approx(2 / 3)}
    assert table["long replies"] == {"adapter": 3}
    assert table["longest by heart"] == {"adapter": "you at the station at nine"}
