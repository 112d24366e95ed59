"""Which base models a machine can train; all is reckoned, nothing is downloaded."""

from models import which_model

import re

import pytest


def printed(mac, monkeypatch, capsys):
    """Return the lines for a Mac of so many gigabytes: [("16", "gemma-3-1b-it-4bit", "yes"), …]."""
    monkeypatch.setattr(which_model, "memory_for_mlx", lambda: which_model.usable(mac))
    which_model.main()
    line = r"^ *(\d+) GB  (\S+) +[\d.]+ GB  all +(.*)$"
    return re.findall(line, capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("mac", which_model.MACS)
def test_what_is_for_this_machine_comes_first(mac, monkeypatch, capsys):
    lines = printed(mac, monkeypatch, capsys)
    assert len(lines) == len(which_model.BASES)
    for_this = [int(line[0]) for line in lines if int(line[0]) <= mac]
    assert for_this == sorted(for_this, reverse=True)
    assert [int(line[0]) for line in lines[: len(for_this)]] == for_this


def test_the_guides_default_trains_on_32_gb_with_less_and_on_96_as_it_is(monkeypatch, capsys):
    verdicts = {}
    for mac in 24, 32, 48, 96:
        lines = {name: verdict for _, name, verdict in printed(mac, monkeypatch, capsys)}
        verdicts[mac] = lines["gemma-3-text-27b-it-4bit"]
    assert verdicts == {
        24: "no",
        32: "tight: GRAD_CHECKPOINT=1 BATCH_SIZE=1 RANK=8",
        48: "tight: GRAD_CHECKPOINT=1",
        96: "yes",
    }
