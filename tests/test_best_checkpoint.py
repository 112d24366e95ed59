"""The checkpoint with the lowest loss becomes the adapter, and what it replaces is kept."""

from models import best_checkpoint
from models.best_checkpoint import choose, put_in_place, table

import math

import pytest

NAN = float("nan")


@pytest.fixture(autouse=True)
def names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in {"VERSION": "v1", "MODEL": "gemma", "LEARNING_RATE": "3e-4"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({0: 9.5, 200: 3.1, 400: 3.2}, 200),
        ({0: 9.5, 200: NAN, 400: 3.2}, 400),
        ({0: 9.5, 200: 3.1, 400: 3.1}, 200),
    ],
)
def test_the_lowest_loss_is_the_best(losses, best, capsys):
    assert choose(losses) == best
    said = capsys.readouterr()
    assert f"kept        iteration {best}: validation loss 3." in said.out and said.err == ""


def test_that_nothing_was_learned_is_said(capsys):
    assert choose({0: 3.0, 200: 3.1}) == 200
    assert capsys.readouterr().err == "warning: that is no better than the base model\n"


def test_no_checkpoint_without_nan_is_an_error(capsys):
    with pytest.raises(SystemExit):
        choose({0: 9.5, 200: NAN})
    assert capsys.readouterr().err == (
        "error: all weights became NaN or infinite\n"
        "FIX: VERSION=v1 MODEL=gemma RESUME=0 LEARNING_RATE=0.0001 ./fine_tune.sh\n"
    )


def test_losses_of_training_and_validation_stand_side_by_side(tmp_path):
    lines = "10,4.1,1500\n20,9.9,1\n20,4.0,1600\n"  # a resumed run has done the second ten again
    (tmp_path / "train_losses.csv").write_text(lines)
    losses = table(tmp_path, {0: 9.5, 15: 3.30007, 20: 3.2})
    assert losses.reset_index().to_csv(index=False).splitlines() == [
        "iteration,train_loss,val_loss,tokens_per_second",
        "0,,9.5,",
        "10,4.1,,1500.0",
        "15,,3.3001,",
        "20,4.0,3.2,1600.0",
    ]


def folder(path, weights, losses):
    path.mkdir()
    (path / "adapters.safetensors").write_text(weights)
    (path / "losses.csv").write_text(f"iteration,train_loss,val_loss\n{losses}")
    return path


def test_a_better_adapter_that_is_replaced_is_kept_and_told(tmp_path, capsys):
    adapter = folder(tmp_path / "adapter", "better", "0,,7.5\n10,,6.747\n20,,6.9\n")
    (adapter / "my notes.txt").write_text("hours")
    put_in_place(folder(tmp_path / "best", "worse", "10,,7.72\n"), adapter)
    said = capsys.readouterr().out
    assert "replaced    an adapter with validation loss 6.747; it is in adapter.before\n" in said
    assert (tmp_path / "adapter.before/adapters.safetensors").read_text() == "better"
    assert (adapter / "adapters.safetensors").read_text() == "worse"
    assert (adapter / "my notes.txt").read_text() == "hours"


def test_the_loss_of_an_adapter_of_another_make_is_unknown(tmp_path):
    assert best_checkpoint.lowest_loss(tmp_path) == "unknown"
    assert not math.isnan(float(best_checkpoint.lowest_loss(folder(tmp_path / "a", "", "1,,2\n"))))
