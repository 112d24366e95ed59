"""test_on_validation.py: true losses, whole results, and chat that can only be read.

The figures are tested in test_figures.py, the sentences in test_verdict.py, the page in
test_report.py.
"""

import test_on_validation as script
from models import chat_template

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from conftest import contents, cut_off

BASE = "models/base/tiny-gemma-3"
ADAPTER = "models/adapters/adapter-sample_tiny-gemma-3"
FUSED = "models/fused/fused-sample_tiny-gemma-3"
VALID, SETTINGS = "data/for_train/sample/valid.jsonl", "data/for_train/sample/settings.json"
RESULTS = "data/results/sample_tiny-gemma-3"
RUN = "VERSION=sample MODEL=tiny-gemma-3"
ME = "test_on_validation.py"
ALL = "base,adapter,fused"


def cases(names, table):
    return pytest.mark.parametrize(names, list(table.values()), ids=list(table))


@pytest.fixture(scope="module")
def finished(template, tmp_path_factory):
    """A project in which the stages before this one ran: some validation rows, and a short run."""
    project = shutil.copytree(template, tmp_path_factory.mktemp("finished") / template.name)
    settings = f"{RUN} ITERS=4 EVAL_EVERY=2 LEARNING_RATE=2e-2 RANK=4"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | dict(item.split("=") for item in settings.split()) | {"PATH": path}
    build = "python build_train.py --valid-rows 10 --window 2 --max-seq-length 64"
    stages = f"{build} && ./fine_tune.sh && ./fuse.sh"
    done = subprocess.run(stages, shell=True, cwd=project, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return project


@pytest.fixture
def trained(finished, tmp_path):
    """A copy of it, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / finished.name))


def write_rows(project, *rows):
    path = project / VALID
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def metrics(project):
    return json.loads((project / RESULTS / "metrics.json").read_bytes())


# ---- what is wrong -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags", ["--nonsense", "--models base,all", "--temperature nan", "--max-tokens 0"]
)
def test_a_wrong_flag_is_wrong_usage(template, run, flags):
    result = run(template, ME, *flags.split())
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*\nFIX: python test_on_validation\.py --help\n", result.stderr)


ROW = {"prompt": "ciao", "completion": "ehi"}
BUILD = "VERSION=sample python build_train.py"
OTHER = "export MODEL=gemma-3-text-27b-it-4bit  # or another instruct model"
THINKS = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<t>{% endif %}"
)


def rows(*rows):
    return lambda project: write_rows(project, *rows)


def settings(value):
    return lambda project: (project / SETTINGS).write_text(json.dumps(value))


def template_of(text):
    return lambda project: edit(project / BASE / "tokenizer_config.json", chat_template=text)


# {id: (what is done to a project of a base and one row, flags, where it is wrong, the first FIX)}
WRONG = {
    "version": (None, "--version ..", "VERSION='..'", "export VERSION=v1"),
    "no rows": (None, "--version two", "for_train/two", "VERSION=two python build_train.py"),
    "no base": (lambda p: shutil.rmtree(p / BASE), "", BASE, "python tests/tiny_base.py"),
    "base cut": (
        lambda p: cut_off(p / BASE / "model.safetensors"), "--models base",
        BASE, "python tests/tiny_base.py"),
    "no adapter": (None, "", ADAPTER, f"{RUN} ./fine_tune.sh"),
    "no disk": (
        lambda p: (p / RESULTS).symlink_to(p / "away/disk"), "--models base",
        "/away/disk, which is not there", "# attach its disk"),
    "no fused": (None, "--models base,fused", FUSED, f"{RUN} ./fuse.sh"),
    "empty": (rows(), "--models base", VALID, BUILD),
    "no reply": (rows({"prompt": "a"}), "--models base", "line 1", BUILD),
    "settings are a list": (settings([1]), "--models base", SETTINGS, BUILD),
    "settings are incomplete": (settings({"names": 1}), "--models base", "lacks shape, ", BUILD),
    "no row": (rows(ROW, []), "--models base", "line 2", BUILD),
    "template fails": (
        template_of("{{ raise_exception('no\x1b[2J') }}"), "--models base", "no\\x1b[2J", OTHER),
    "template thinks": (template_of(THINKS), "--models base", "line 1", OTHER),
}  # fmt: skip


@pytest.mark.slow
@cases("damage, flags, where, fix", WRONG)
def test_what_is_wrong_is_said_with_its_fix(project, run, damage, flags, where, fix):
    write_rows(project, ROW)
    if damage:
        damage(project)
    result = run(project, ME, *flags.split())
    assert result.returncode == 1
    error = result.stderr[result.stderr.index("error: ") :].splitlines()
    assert where in error[0]
    assert error[1] == f"FIX: {fix}"
    assert not (project / RESULTS).exists()


# ---- what belongs together -----------------------------------------------------------------------
def remove(path):
    return lambda project: shutil.rmtree(project / path)


def other_adapter(project):
    edit(project / FUSED / "fused_from.json", adapter_sha256="0")


def other_rows(project):
    (project / VALID).write_bytes((project / VALID).read_bytes() * 2)


# {id: (what is changed after the training, the models asked for, those that are tested, a warning)}
# What is not asked for, nor the fused model by default, need not be there.
CHANGED = {
    "not fused": (remove(FUSED), ALL, ["base", "adapter"], ""),
    "no adapter": (remove(ADAPTER), "base,fused", ["base", "fused"], ""),
    "other rows": (other_rows, "adapter", ["adapter"], "not those of the training"),
    "other rows, base": (other_rows, "base", ["base"], ""),
    "other adapter": (other_adapter, ALL, ALL.split(","), "from another adapter"),
    "other adapter, base": (other_adapter, "base", ["base"], ""),
}


@pytest.mark.slow
@cases("change, models, tested, warning", CHANGED)
def test_what_is_asked_for_must_belong_together(trained, run, change, models, tested, warning):
    change(trained)
    result = run(trained, ME, "--models", models, "--replies", 0)
    found = metrics(trained)
    assert (result.returncode, list(found["loss"])) == (0, tested)
    assert len(found["warnings"]) == bool(warning)
    assert "kept" not in found  # an old fuse is not blamed for a new adapter
    assert warning in result.stderr
    page = (trained / RESULTS / "report.html").read_text("utf-8")
    assert ("<b>Warning:</b>" in page) == bool(warning)


# ---- losses and replies --------------------------------------------------------------------------
def true_loss(project, folder, adapter=None):
    """Return the loss by its definition, row by row, and the number of tokens.

    It is the mean of -log p over the tokens that follow the prompt.
    """
    model, tokenizer = chat_template.load_model(project / folder, adapter and project / adapter)
    losses = []
    for line in (project / VALID).read_text("utf-8").splitlines():
        row = json.loads(line)
        user = {"role": "user", "content": row["prompt"]}
        reply = {"role": "assistant", "content": row["completion"]}
        tokens = tokenizer.apply_chat_template([user, reply])
        start = len(tokenizer.apply_chat_template([user], add_generation_prompt=True))
        logits = model(mx.array([tokens[:-1]]))[0, start - 1 :].astype(mx.float32)
        chances = np.array(mx.softmax(logits, axis=-1), dtype=np.float64)
        losses += list(-np.log(chances[np.arange(len(chances)), tokens[start:]]))
    return np.mean(losses), len(losses)


@pytest.mark.slow
def test_the_losses_are_the_true_ones_and_those_of_the_training(trained, run):
    result = run(trained, ME, *["--replies", "3", "--max-tokens", "4", "--batch-tokens", "200"])
    assert result.returncode == 0, result.stderr
    found = metrics(trained)
    for name, model in {"base": [BASE], "adapter": [BASE, ADAPTER], "fused": [FUSED]}.items():
        true = true_loss(trained, *model)
        assert (found["loss"][name], found["tokens"]) == pytest.approx(true, abs=5e-5)
    assert found["kept"]["fused"] == pytest.approx(1, abs=0.01)
    curve = pd.read_csv(trained / ADAPTER / "losses.csv").set_index("iteration").val_loss
    assert found["loss"]["base"] == pytest.approx(curve[0], abs=0.01)
    assert found["loss"]["adapter"] == pytest.approx(curve[curve.index > 0].min(), abs=0.01)
    assert found["verdict"]["headline"].startswith("A trial: all steps work.")
    assert found["verdict"]["headline"] in result.stdout
    assert "base loss: 9 rows\n" in result.stderr  # a plain line in a pipe, where no bar can be
    assert sorted(contents(trained / RESULTS)) == ["generations.csv", "metrics.json", "report.html"]
    assert found["cut off"]["adapter"] == 1.0


@pytest.mark.slow
def test_a_reply_ends_at_the_end_of_its_turn_or_is_cut_off(template):
    model, tokenizer = chat_template.load_model(template / BASE)
    ask = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    row = script.Row(1, [("", "hi"), ("", "ho")], ask, len(ask))
    args = SimpleNamespace(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=3, reply_batch=1)
    text, ended = script.write_replies(model, tokenizer, [row], args, "")[1]
    assert text
    assert not ended
    tokenizer.add_eos_token(str(tokenizer.encode(text, add_special_tokens=False)[0]))
    assert script.write_replies(model, tokenizer, [row], args, "")[1] == ("", True)


@pytest.mark.slow
def test_of_messages_the_last_one_is_scored_and_answered(trained, run):
    def tested(*texts):
        roles = ["user", "assistant"] * (len(texts) // 2)
        pairs = zip(roles, texts, strict=True)
        write_rows(trained, {"messages": [{"role": role, "content": text} for role, text in pairs]})
        flags = ["--models", "base", "--replies", "1", "--max-tokens", "4"]
        assert run(trained, ME, *flags).returncode == 0
        return metrics(trained)

    one, two = tested("ciao", "ehi"), tested("ciao", "ehi", "come va?", "ehi")
    assert one["tokens"] == two["tokens"]
    assert one["length"]["reference"] == two["length"]["reference"]
    assert one["loss"] != two["loss"]


# ---- told apart ----------------------------------------------------------------------------------
def told(rows, asked):
    """Return the figures of so many rows, of which so many are answered with "no!" behind them."""
    words = ["boh ma sì", "ciao dai", "no però", "vai certo"]
    talks = [[("ann", "loud!!"), ("bob", words[line % 4])] for line in range(rows)]
    rows = [script.Row(line, talk, [], 0) for line, talk in enumerate(talks)]
    data = SimpleNamespace(rows=rows, made=SimpleNamespace(authors=["bob"], shape="turns"))
    real, table = [row.reply() for row in rows[:asked]], defaultdict(dict)
    made = {"base": [f"{text} no!" for text in real]}
    script.add_told_apart(table, data, real, made, rows[:asked])
    return table


def test_person_and_others_are_told_apart_beside_the_model_with_as_many_replies():
    table = told(rows=50, asked=40)
    assert table["pairs"] == {"base": 25, "reference": 25, "somebody else": 25}
    assert table["told apart"]["base"] == table["told apart"]["somebody else"] == 1.0
    assert table["told apart"]["reference"] < 0.75
    assert told(rows=100, asked=20)["pairs"]["reference"] == 20


def test_of_few_rows_all_are_judged_and_the_person_is_not():
    assert told(rows=30, asked=25)["pairs"] == {"base": 25, "somebody else": 25}


# ---- written whole -------------------------------------------------------------------------------
FORMULAS = [
    *['=HYPERLINK("http://127.0.0.1";"x")', "+1+cmd|' /C calc'!A0", "-1+1", "@SUM(1+1)"],
    *["\t=1+1", "\r=1+1", "ciao; =1+1", "ciao\n=1+1", 'hi;"=1+1', 'hi\n" =1+1', '"=1+1"'],
    *["\x1b[31mred\x1b]0;owned\x07", "\u202eright to left", "nul \x00, lone \ud800", "W" * 40_000],
]


def test_text_is_no_formula_for_any_spreadsheet_and_else_stays_as_it_is(tmp_path):
    harmless = "perché 🙏🏽 👩‍💻\n1 + 1 = 2, a-b"
    assert script.defuse(harmless) == harmless
    assert script.defuse("=1+1;@A\n -1\t") == "'=1+1;'@A\n '-1 "

    talks = [[("ann", text), ("bob", text)] for text in FORMULAS]
    asked = [script.Row(line, talk, [], 0) for line, talk in enumerate(talks)]
    said = {"reference": {row.line: row.messages[-1][1] for row in asked}}
    script.write(tmp_path / "results", "page", {"loss": float("nan")}, asked, said)
    text = (tmp_path / "results/generations.csv").read_text("utf-8-sig")
    assert text.isprintable() or not set(map(ord, text)) & ({*range(32)} - {10})
    for delimiter in ",;\t":  # as the spreadsheets of other countries cut the same file
        cells = [cell for row in csv.reader(io.StringIO(text), delimiter=delimiter) for cell in row]
        assert not [cell for cell in cells if re.match(r"[=+\-@\t\r]", cell)]
    assert max(map(len, text.split('","'))) < 32_767  # what a cell can hold
    assert json.loads((tmp_path / "results/metrics.json").read_bytes()) == {"loss": None}


def test_the_results_of_before_are_kept_beside_the_new_ones(tmp_path):
    final, row = tmp_path / "data/results/v1_m", script.Row(1, [("", "hi"), ("", "ho")], [], 0)
    assert script.write(final, "first", {}, [row], {"reference": {1: "ho"}}) is None
    before = script.write(final, "second", {}, [row], {"reference": {1: "ho"}})
    assert (final / "report.html").read_text() == "second"
    assert (before / "report.html").read_text() == "first"
    assert sorted(path.name for path in final.parent.glob("[!.]*")) == ["v1_m", "v1_m.before"]
