"""test_on_validation.py: true figures, a true verdict, and chat that can do nothing but be read."""

import argparse
import ast
import csv
import functools
import hashlib
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import unicodedata
from collections import defaultdict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import REPOSITORY, contents, cut_off
from mlx.utils import tree_unflatten
from mlx_lm import load, lora
from mlx_lm.utils import save

NAME = "sample_tiny-gemma-3"
BASE, ADAPTER = "models/base/tiny-gemma-3", f"models/adapters/adapter-{NAME}"
FUSED, RESULTS = f"models/fused/fused-{NAME}", f"data/results/{NAME}"
VALID = "data/for_train/sample/valid.jsonl"
NAN = float("nan")


# ---- helpers -------------------------------------------------------------------------------------
def load_script(path):
    spec = importlib.util.spec_from_file_location("stage_4", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load_script(REPOSITORY / "test_on_validation.py")


@pytest.fixture(scope="module")
def trained(template, tmp_path_factory):
    """A project with 10 validation rows, an adapter that learned a little, and a fused model."""
    root = shutil.copytree(template, tmp_path_factory.mktemp("trained") / "my project")
    data = root / "data/for_train/sample"
    data.mkdir(parents=True)
    entries = json.loads((root / "data/raw/messages_sample.json").read_bytes())
    chats = [("\n".join(e["previous_messages"]) + "\n\nGo on.", e["message"]) for e in entries]
    rows = [json.dumps(pair(*chat)) + "\n" for chat in chats if chat[1]]
    (data / "valid.jsonl").write_text("".join(rows[:10]))
    (data / "train.jsonl").write_text("".join(rows[10:90]))
    (data / "settings.json").write_text(json.dumps({"max_seq_length": 1024, "authors": ["ann"]}))
    base, adapter = str(root / BASE), str(root / ADAPTER)
    how = {"model": base, "data": str(data), "adapter_path": adapter, "train": True, "iters": 12}
    how |= {"batch_size": 2, "num_layers": -1, "learning_rate": 1e-2}
    lora.run(types.SimpleNamespace(**lora.CONFIG_DEFAULTS | how))
    model, tokenizer, config = load(base, adapter_path=adapter, return_config=True)
    layers = [(name, m.fuse()) for name, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(layers))
    save(root / FUSED, base, model, tokenizer, config, donate_model=False)
    losses = "iteration,train_loss,val_loss\n0,,7.7\n4,6.9,7.1\n8,6.5,6.6\n"
    (root / ADAPTER / "losses.csv").write_text(losses)
    return root


@pytest.fixture
def project(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / trained.name))


@pytest.fixture
def stage_4(monkeypatch, capsys):
    """Run the script of a project in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("VERSION", "sample")
    monkeypatch.setenv("MODEL", "tiny-gemma-3")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # if it asked
    monkeypatch.chdir(".")  # back again afterwards: the script goes to its own folder

    def call(project, *args, patch=lambda module: None):
        module = load_script(project / "test_on_validation.py")
        patch(module)
        monkeypatch.setattr(sys, "argv", ["test_on_validation.py", *args])
        try:
            code = module.main()
        except SystemExit as e:
            code = e.code
        except KeyboardInterrupt:
            code = 130
        return code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def write_rows(project, *rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (project / VALID).write_text(text, encoding="utf-8")


def turns(*texts):
    """A row of messages: user, assistant, user, …"""
    roles = ["user", "assistant"] * (len(texts) // 2)
    messages = [{"role": r, "content": text} for r, text in zip(roles, texts, strict=True)]
    return {"messages": messages}


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def metrics(project):
    return json.loads((project / RESULTS / "metrics.json").read_bytes())


def page(project):
    return (project / RESULTS / "report.html").read_text(encoding="utf-8")


# ---- what is missing or wrong --------------------------------------------------------------------
RUN = "VERSION=sample MODEL=tiny-gemma-3"
DOWNLOAD = "python tests/tiny_base.py"
TRAIN = f"{RUN} ./fine_tune.sh, or test the base model alone: "
BUILD = "VERSION=sample python build_train.py"
INSTRUCT = "MODEL=gemma-3-text-27b-it-4bit ./fine_tune.sh, or another instruct model"
CLOSE = "export MODEL=tiny-gemma-3"
TEMPLATE = f"the chat template of {BASE} fails on {VALID} line 1: "
THINKS = "{% for m in messages %}{{ m.content }}{% endfor %}"
THINKS += "{% if add_generation_prompt %}<think>{% endif %}"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def lack(path):
    return lambda project: shutil.rmtree(project / path)


def cut(path):
    return lambda project: cut_off(project / path)


def valid(*rows):
    return lambda project: write_rows(project, *rows)


def template(text):
    return lambda project: edit(project / BASE / "tokenizer_config.json", chat_template=text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "args", "error", "fix"),
    [
        (None, "--version two", "there is no valid.jsonl in data/for_train/two (there: sample)",
         "VERSION=two python build_train.py"),
        (None, "--version ..", "VERSION is '..'", "export VERSION=v1"),
        (None, "--model models/base/tiny-gemma-3/", "MODEL is 'models/base/tiny-gemma-3/'", CLOSE),
        (None, "--model .tiny-gemma-3", "MODEL is '.tiny-gemma-3'", CLOSE),
        (lack(BASE), "", f"there is no base model in {BASE} (there: tiny-gemma-3-4bit)", DOWNLOAD),
        (cut(f"{BASE}/model.safetensors"), "", f"{BASE} does not load: ", DOWNLOAD),
        (lambda p: edit(p / BASE / "config.json", num_hidden_layers=10**9), "",
         f"{BASE} does not load: 1000000000 layers", DOWNLOAD),
        (lack(ADAPTER), "", f"there is no folder {ADAPTER}", TRAIN),
        (cut(f"{ADAPTER}/adapters.safetensors"), "", f"{ADAPTER} does not load: ", TRAIN),
        (lack(FUSED), "--models base,fused", f"there is no folder {FUSED}", f"{RUN} ./fuse.sh"),
        (valid(), "", f"{VALID} is empty", BUILD),
        *((valid(row), "", f"{VALID} line 1 is not", BUILD) for row in (
            {"prompt": "a"}, pair("a", 7), pair("a", "\ud800"), [],
            {"messages": turns("a", "b")["messages"][1:]})),
        (template(None), "", TEMPLATE, INSTRUCT),
        (template("{{ raise_exception('no\x1b[2J') }}"), "", TEMPLATE + "no\\x1b[2J", INSTRUCT),
        (template(THINKS), "", TEMPLATE + "it begins a reply otherwise", INSTRUCT),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_said_first_with_the_way_out(
    project, stage_4, damage, args, error, fix
):
    if damage:
        damage(project)
    code, out, err = stage_4(project, *args.split())
    assert err.startswith(f"error: {error}") and f". FIX: {fix}" in err and err.count("\n") == 1
    assert (code, out) == (1, "") and not (project / RESULTS).exists()


@pytest.mark.slow
def test_no_code_of_a_base_runs_and_nobody_is_asked(project, stage_4):
    (project / BASE / "own.py").write_text("open('ran', 'w')\nclass Own: pass\n")
    names = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    edit(project / BASE / "tokenizer_config.json", **names)
    stage_4(project, "--models", "base", "--replies", "0")
    assert not (project / "ran").exists()
    assert sys.stdin.read() == "y\n" * 9


def test_whoever_forgot_model_and_version_is_told_the_only_ones_there_are(
    project, stage_4, monkeypatch
):
    monkeypatch.delenv("VERSION")
    monkeypatch.delenv("MODEL")
    fix = "FIX: VERSION=v1 python build_train.py; for the sample: export VERSION=sample\n"
    assert stage_4(project)[2].endswith(fix)
    data = project / "data/for_train"
    (data / "sample").rename(data / "family")
    assert stage_4(project)[2].endswith("FIX: export VERSION=family\n")
    shutil.rmtree(project / f"{BASE}-4bit")
    err = stage_4(project, "--version", "family")[2]
    assert err.endswith("FIX: export MODEL=tiny-gemma-3\n")


@pytest.mark.parametrize(
    "args", ["--nonsense", "--models base,all", "--temperature nan", "--max-tokens 0"]
)
def test_wrong_usage(trained, stage_4, args):
    code, _, err = stage_4(trained, *args.split())
    assert code == 2 and re.fullmatch(r"error: .*\. FIX: python test_on_validation\.py --.*\n", err)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("models", "lacks", "tested"),
    [
        ("base,adapter,fused", FUSED, ["base", "adapter"]),
        ("base,fused", ADAPTER, ["base", "fused"]),
    ],
)
def test_only_the_models_that_are_asked_for_are_needed(project, stage_4, models, lacks, tested):
    shutil.rmtree(project / lacks)
    assert stage_4(project, "--models", models, "--replies", "0")[0] == 0
    assert list(metrics(project)["loss"]) == tested and "than the base" in page(project)


def test_what_does_not_belong_together_is_told(script, tmp_path, capsys):
    weights, origin, valid = (
        tmp_path / name for name in ("adapters.safetensors", "fused_from.json", "valid.jsonl")
    )
    weights.write_text("old")
    origin.write_text(json.dumps({"adapter_sha256": hashlib.sha256(b"old").hexdigest()}))
    valid.write_text("{}\n")
    checksum = subprocess.check_output(["cksum"], input=valid.read_bytes()).decode()
    (tmp_path / "lora_config.yaml").write_text(f"# valid.jsonl: {checksum}")
    args = argparse.Namespace(version="v1", model="m")

    def warnings(*models):
        models = dict.fromkeys(models)
        stale = script.is_stale(tmp_path, tmp_path)
        return " ".join(script.find_warnings(args, models, stale, tmp_path, tmp_path, valid))

    assert warnings("base", "adapter", "fused") == ""
    weights.write_text("new")
    assert "was made from another adapter" in warnings("adapter", "fused")
    assert warnings("base", "adapter") == ""
    valid.write_text("{}\n{}\n")
    assert "is not the one of the training" in warnings("base", "adapter")
    assert "is not the one of the training" in capsys.readouterr().err
    assert warnings("base") == ""  # it has learned nothing


@pytest.mark.slow
def test_a_fuse_is_not_blamed_for_an_adapter_that_is_newer(project, stage_4):
    (project / FUSED / "fused_from.json").write_text(json.dumps({"adapter_sha256": "0"}))
    code, _, err = stage_4(project, "--replies", "0")
    assert code == 0 and "kept" not in metrics(project)
    assert "was made from another adapter" in err


@pytest.mark.parametrize(
    ("said", "given", "used"),
    [
        (None, [], (0.8, 0.95, 0)),
        ({"top_k": 64, "top_p": 0.9, "temperature": 1}, [], (1.0, 0.9, 64)),
        ({"top_k": 64, "temperature": 1.0}, ["--temperature", "0.5"], (0.5, 0.95, 64)),
        ([{"top_k": 3}], ["--top-k", "0"], (0.8, 0.95, 0)),
    ],
)
def test_sampling_is_as_the_base_says_unless_it_is_set(
    script, tmp_path, monkeypatch, said, given, used
):
    monkeypatch.setattr(sys, "argv", ["test_on_validation.py", *given])
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    args = script.settings()
    script.set_sampling(args, tmp_path)
    assert (args.temperature, args.top_p, args.top_k) == used


# ---- numbers -------------------------------------------------------------------------------------
def true_loss(project, folder, adapter=None):
    """The definition, row by row: the mean of -log p over the tokens that follow the prompt."""
    model, tokenizer = load(str(project / folder), adapter_path=adapter and str(project / adapter))
    losses = []
    for line in (project / VALID).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        user = {"role": "user", "content": row["prompt"]}
        chat = [user, {"role": "assistant", "content": row["completion"]}]
        tokens = tokenizer.apply_chat_template(chat)
        start = len(tokenizer.apply_chat_template([user], add_generation_prompt=True))
        logits = model(mx.array([tokens[:-1]]))[0, start - 1 :].astype(mx.float32)
        chances = np.array(mx.softmax(logits, axis=-1), dtype=np.float64)
        losses += list(-np.log(chances[np.arange(len(chances)), tokens[start:]]))
    return np.mean(losses), len(losses)


@pytest.mark.slow
def test_the_losses_of_all_models_are_the_true_ones_and_the_rest_follows_from_them(
    project, stage_4
):
    args = ["--replies", "3", "--max-tokens", "4", "--batch-tokens", "700"]
    code, out, err = stage_4(project, *args)
    assert code == 0, err
    found = metrics(project)
    for name, model in {"base": [BASE], "adapter": [BASE, ADAPTER], "fused": [FUSED]}.items():
        true = true_loss(project, *model)
        assert (found["loss"][name], found["tokens"]) == pytest.approx(true, abs=5e-5)
    assert found["verdict"].startswith("Better than the base: loss ")
    assert found["verdict"] in out.replace("\n", " ") and "Better than the base" in page(project)
    assert "Kept: iteration 8,\n6.60." in page(project)  # the learning curve
    assert "base loss: " in err and found["warnings"] == []
    assert sorted(contents(project / RESULTS)) == ["generations.csv", "metrics.json", "report.html"]


@pytest.mark.slow
def test_of_messages_the_last_one_is_scored_and_answered(project, stage_4):
    def tested(*rows):
        write_rows(project, *rows)
        assert stage_4(project, "--models", "base", "--replies", "2", "--max-tokens", "4")[0] == 0
        return metrics(project)

    prompts = tested(pair("ciao\ncome va?", "bene"), pair("ciao", "ehi"))
    assert tested(turns("ciao\ncome va?", "bene"), turns("ciao", "ehi")) == prompts
    assert tested(turns("ciao", "ehi", "come va?", "bene"))["tokens"] < prompts["tokens"]
    with (project / RESULTS / "generations.csv").open(encoding="utf-8-sig") as file:
        row = next(csv.DictReader(file))
    assert (row["prompt"], row["reference"]) == ("ciao\nann: ehi\ncome va?", "bene")


@pytest.mark.slow
def test_the_loss_of_the_adapter_is_the_one_that_fine_tune_printed(project, run, stage_4):
    shutil.rmtree(project / ADAPTER)
    done = run(project, "fine_tune.sh", env={"ITERS": "4", "EVAL_EVERY": "4"})
    assert done.returncode == 0, done.stderr
    assert stage_4(project, "--models", "base,adapter", "--replies", "0")[0] == 0
    with (project / ADAPTER / "losses.csv").open() as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    found = metrics(project)
    assert found["loss"]["base"] == pytest.approx(losses[0], abs=0.01)
    assert found["loss"]["adapter"] == pytest.approx(min(losses), abs=0.01)
    assert found["warnings"] == []


@pytest.mark.slow
def test_same_seed_same_replies_other_seed_others(project, stage_4):
    write_rows(project, *(pair(text, text) for text in ["ciao", "che si dice?", "perché?", "?"]))

    def replies(args):
        usual = "--models base --replies 4 --max-tokens 6 "
        assert stage_4(project, *(usual + args).split())[0] == 0
        return (project / RESULTS / "generations.csv").read_bytes()

    first = replies("")
    assert replies("") == first != replies("--seed 1")
    alone, together = (f"--temperature 0 --reply-batch {count}" for count in (1, 3))
    assert replies(alone) == replies(together)


# ---- figures -------------------------------------------------------------------------------------
def figures_of(script, reference, replies, nats=None, ended=True):
    """figures() for rows of two tokens each, and the replies of each model, None where missing."""
    rows = [script.Row(line, "", real, [0], [0, 1, 2]) for line, real in enumerate(reference, 1)]
    done = {
        who: {line: (text, ended) for line, text in enumerate(texts, 1) if text is not None}
        for who, texts in replies.items()
    }
    nats = nats or {who: [2] * len(rows) for who in replies}
    nats = {who: np.array(sums, dtype=float) for who, sums in nats.items()}
    return script.figures(rows, rows, nats, done, argparse.Namespace(max_tokens=60))[0]


def test_figures_of_style(script):
    table = figures_of(script, ["ok"] * 4, {"base": ["ok", "Ok.", "why?\n:)", "ja"]})
    found = {name: values["base"] for name, values in table.items() if "base" in values}
    assert found == {"loss": 1.0, "loss error": 0.0, "length": 3.5, "replies": 4} | {
        **dict.fromkeys(["question", "emoji", "capital first", "full stop last"], 0.25),
        "several lines": 0.25,
        "looping": 0.0,
        "unfinished": 0.0,
    }


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [
        ("looping", ["sa sa sa sa", "boh\nboh\nboh\nboh"], ["no no no", "hahahaha", "ok"]),
        ("emoji", ["ok 🙏🏽", ":-)", "va bene ;D"], ["12:30", "a:b", "C:(x)", "=)x"]),
        ("full stop last", ["Ok.", "好。"], ["ok...", "ok", "a.b"]),
        ("question", ["perché?", "لماذا؟"], ["perché"]),
        ("capital first", ["Ok", "È vero"], ["ok", "è", "🙏 Ok", ""]),
    ],
)
def test_a_figure_of_style_finds(script, name, yes, no):
    found = {text: bool(script.STYLE[name](text)) for text in yes + no}
    assert found == dict.fromkeys(yes, True) | dict.fromkeys(no, False)


def test_replies_that_never_ended_or_never_came(script):
    some = figures_of(script, ["ok"] * 2, {"base": ["a", None]}, ended=False)
    assert (some["replies"]["base"], some["unfinished"]["base"]) == (1, 1.0)
    none = figures_of(script, ["ok"] * 2, {"base": [None, None]})
    assert "base" not in none["replies"] and none["loss"]["base"] == 1.0


def test_gain_error_and_what_the_fused_model_keeps(script):
    nats = {"base": [10, 6], "adapter": [4, 4], "fused": [6, 4]}
    table = figures_of(script, ["x"] * 2, dict.fromkeys(nats, ["x"] * 2), nats)
    assert table["gain"] == {"adapter": 2.0, "fused": 1.5}
    assert table["gain error"]["adapter"] == pytest.approx(np.sqrt(2**2 + 2**2) / 4)
    assert table["kept"]["fused"] == 0.75


def test_the_classifier_tells_what_can_be_told_and_no_more(script):
    rng = np.random.default_rng(0)
    words = ["boh", "ciao", "dai", "ma", "no", "però", "sedia", "sì", "vai", "certo"]
    real, same = ([" ".join(rng.choice(words, 4)) for _ in range(100)] for _ in range(2))
    loud = [text.capitalize() + "!" for text in same]
    assert script.told_apart(real, real) == (0.5, pytest.approx(0.05, abs=0.001))
    share, error = script.told_apart(real, same)
    assert abs(share - 0.5) < 3 * error and error == pytest.approx(0.05, abs=0.001)
    share, error = script.told_apart(real, loud)
    assert share == 1.0 and 0 < error < 0.02
    assert script.told_apart([""] * 20, [""] * 20)[0] == 0.5


def test_favourite_words_that_are_missing(script):
    real = ["boh certo", "boh", "Boh!", "boh ma", "boh", "ma", "ciao"]
    assert script.missing_words(real, ["ma certo"]) == ["boh"]
    assert script.missing_words(real, ["BOH"]) == []
    table = figures_of(script, ["boh"] * 20, {"base": ["ma"] * 20})
    assert table["missing words"] == {"base": "boh"}


@pytest.mark.parametrize(
    ("text", "name", "value", "error", "replies"),
    [
        ("3.07", "loss", 3.0655, 0.05, 100),
        ("3.1", "loss", 3.0655, 0.4, 3),
        ("0.88 ± 0.07", "gain", 0.8833, 0.07, 100),
        ("33", "length", 33.3, None, 100),
        ("71% ± 4%", "told apart", 0.7123, 0.041, 100),
        ("33%", "emoji", 0.3333, None, 30),
        ("2 of 7", "emoji", 2 / 7, None, 7),
        ("7", "replies", 7, None, 7),
        ("nan", "loss", NAN, NAN, 7),
    ],
)
def test_a_figure_has_no_more_digits_than_its_error_allows(
    script, text, name, value, error, replies
):
    table = {"replies": {"base": replies}, "gain error": {}, name: {"base": value}}
    if error is not None:
        table[f"{name} error"] = {"base": error}
    assert script.shown(table, name, "base") == text


# ---- the verdict ---------------------------------------------------------------------------------
def table_of(loss, kept=None, **style):
    """A table as figures() makes it, for these losses, every gain having an error of 0.04."""
    table = defaultdict(dict, {"loss": loss})
    if "base" in loss:
        table["gain"] = {who: loss["base"] - loss[who] for who in loss if who != "base"}
        table["gain error"] = dict.fromkeys(table["gain"], 0.04)
    if kept:
        table["kept"] = {"fused": kept}
    for who in ["reference", *loss]:
        figures = {"question": 0.1, "emoji": 0.2, "capital first": 0.3, "full stop last": 0.1}
        figures |= {"several lines": 0.0, "looping": 0.0, "unfinished": 0.0, "length": 30.0}
        figures |= {"replies": 100} | style.get(who, {})
        for name, value in figures.items():
            table[name][who] = value
    return table


TOLD, ALWAYS = ({"told apart": share, "told apart error": 0.04} for share in (0.7, 1.0))
OTHER = {"full stop last": 0.8, "unfinished": 0.3, "missing words": "boh, lol"}
LOSSES = {"base": 9.0, "adapter": 3.0}
LOST = {"base": 9.0, "adapter": 3.0, "fused": 7.85}
BETTER = "Better than the base: loss 3.00 instead of 9.00."
NOT_YET = "It does not write like them yet: "


@pytest.mark.parametrize(
    ("table", "sentences"),
    [
        (table_of({"base": 9.0, "fused": 3.0}), [BETTER]),
        (table_of(LOSSES | {"fused": 3.01}, 0.998),
         [BETTER, "The fused model keeps 100% of that."]),
        (table_of({"base": 3.0, "adapter": 3.5}),
         ["Worse than the base: loss 3.50 instead of 3.00. "
          "Train with a lower LEARNING_RATE, or on more data."]),
        (table_of({"base": 3.0, "adapter": 2.95}),
         ["No better than the base: loss 2.95 instead of 3.00, which may be chance. "
          "Train longer, or on more data."]),
        (table_of(LOSSES, adapter={"looping": 0.4}),
         [BETTER, f"{NOT_YET}looping 40% instead of 0%."]),
        # What the chat itself repeats is no fault.
        (table_of(LOSSES, adapter={"looping": 0.4}, reference={"looping": 0.5}), [BETTER]),
        (table_of(LOSSES, base=ALWAYS, adapter=TOLD),
         [BETTER, "A classifier tells its replies from the real ones in 70% ± 4% of the pairs "
          "(the base's in 100% ± 4%); 50% would be perfect."]),
        (table_of(LOSSES, adapter=OTHER),
         [BETTER, f"{NOT_YET}unfinished 30% instead of 0%; full stop last 80% instead of 10%; "
          "it never says boh, lol."]),
        # Few replies differ much by chance.
        (table_of(LOSSES, adapter={"replies": 5, "emoji": 0.6}), [BETTER]),
        (table_of({"base": 9.0, "adapter": NAN}),
         ["Broken: a loss is not a number. Train again with a lower LEARNING_RATE."]),
        (table_of({"base": 9.0}),
         ["Nothing to compare: test the base model and the adapter together."]),
    ],
)  # fmt: skip
def test_the_verdict(script, table, sentences):
    assert script.verdict(table, 400, "8") == sentences


def test_the_verdict_of_few_rows_says_how_little_they_are(script):
    few = BETTER[:-1] + ", but too few rows to be sure: 7 (30 would do)."
    assert script.verdict(table_of(LOSSES), 7, "8") == [few]


@pytest.mark.parametrize(
    ("bits", "setting"), [("base", "FUSED_BITS=8 "), ("8", "FUSED_BITS=16 "), ("16", "")]
)
def test_a_fuse_that_kept_too_little_is_advised_more_bits(script, bits, setting):
    kept = f"The fused model keeps 50% of that. Fuse again: {setting}./fuse.sh."
    assert script.verdict(table_of(LOST, 0.5), 400, bits) == [BETTER, kept]


# ---- the page ------------------------------------------------------------------------------------
OWNED = "document.title='owned'"
HOSTILE = [
    f"<script>{OWNED}</script>",
    f'</textarea></title></style><img src=x onerror="{OWNED}"><svg onload="{OWNED}">',
    f'<iframe srcdoc="<script>parent.{OWNED}</script>"></iframe>',
    "<meta http-equiv=refresh content=0>",
    "{{ 7 * 191 }}{% raw %} ]]> --> &lt;b&gt; $x^2$ \\frac",
    *('=HYPERLINK("http://127.0.0.1";"x")', "+1+cmd|' /C calc'!A0", "-1+1", "@SUM(1+1)"),
    *("\t=1+1", "\r=1+1", "ciao; =1+1", "ciao\n=1+1"),
    "\x1b[31mred\x1b]0;owned\x07\x1b[2J\x9b1m",
    "\u202eright to left\u2066 and \u200f over",
    "nul \x00 backspace \x08\x08\x08 delete \x7f, lone \ud800 surrogate \udfff",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!" * 5,
    "W" * 40_000,
    "",
]


def write_made_up(script, folder, texts, **replies):
    """Write the three files for chats and references that no tiny model would give.

    Replies are the references in a form for each model: fused="{}!".
    """
    rows = [
        script.Row(line, f"{text}\n{text}\n\nGo on.", text, [0], [0, 1, 2])
        for line, text in enumerate(texts, 1)
    ]
    args = argparse.Namespace(version="v1", model="m", seed=0, max_tokens=60)
    nats = {who: np.full(len(texts), 18.0 - 2 * i) for i, who in enumerate(replies)}
    done = {
        who: {row.line: (form.format(script.visible(row.reference)), True) for row in rows}
        for who, form in replies.items()
    }
    table, said = script.figures(rows, rows, nats, done, args)
    sentences = script.verdict(table, len(rows), "8")
    facts = {"sentences": sentences, "warnings": ["a warning"], "rows": len(rows)}
    facts |= {"settings": vars(args), "versions": {"mlx": "0", "mlx_lm": "0"}}
    text = script.report(facts, table, rows, said, folder / "adapter", args)
    (folder / "data").mkdir()
    script.write(folder / "data/results", text, facts, rows, said)
    return text, "\n".join(sentences)


def is_readable(text):
    """Whether a terminal or a browser only shows it: no control, format or surrogate characters."""
    fine = "\n\t\u200c\u200d\ufeff"
    return not {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in fine}


def test_text_is_made_visible_and_no_formula_and_else_stays_as_it_is(script):
    harmless = "perché 🙏🏽 👩‍💻\n1 + 1 = 2, a-b"
    assert script.visible(harmless) == script.defuse(harmless) == harmless
    assert script.visible("a\x1b[1m\x00\u202e\ud800") == r"a\x1b[1m\x00\u202e\ud800"
    assert script.defuse("=1+1;@A\n -1\t") == "'=1+1;'@A\n '-1 "


def test_hostile_text_is_inert_in_the_spreadsheet_file_and_on_the_terminal(script, tmp_path):
    _, terminal = write_made_up(script, tmp_path, HOSTILE, base="{}", adapter="{}")
    assert is_readable(terminal)
    text = (tmp_path / "data/results/generations.csv").read_text(encoding="utf-8-sig")
    assert is_readable(text)
    for delimiter in ",;\t":  # as the spreadsheets of other countries cut the same file
        table = list(csv.reader(io.StringIO(text), delimiter=delimiter))
        cells = [cell for row in table for cell in row]
        assert not [cell for cell in cells if re.match(r"[=+\-@\t\r]", cell)]
        assert max(map(len, cells)) < 32_767 or delimiter != ","  # what a cell can hold


def test_the_blind_test_shows_two_replies_and_hides_which_is_real(script, tmp_path):
    texts = [f"ciao {n}" for n in range(25)]
    text, _ = write_made_up(script, tmp_path, texts, base="{}", adapter="{}!")
    cards = text.split('<article class="panel">')[1:]
    answers = []
    for card in cards:
        shown, answer = card.split("<details>", 1)
        replies = re.findall(r'<p class="said">(ciao \d+!?)</p></div>', shown)
        real = re.search(r"<strong>([AB])</strong> was really said", answer)[1]
        first, second = replies if real == "A" else replies[::-1]
        assert second == first + "!" and "really said" not in shown
        answers.append(real)
    assert len(answers) == 20 and 4 < answers.count("A") < 16
    assert "Of 20, half is guessing;\n15 or more right means that you can tell" in text


@pytest.mark.parametrize(("fused", "blind"), [("{}", 0), ("{}?", 2)])
def test_replies_that_are_no_test_are_left_out_and_equal_ones_stand_once(
    script, tmp_path, fused, blind
):
    forms = {"base": "{}!", "adapter": fused, "fused": fused}
    text, _ = write_made_up(script, tmp_path, ["ciao", "boh"], **forms)
    assert text.count("Which one is real?") == text.count('<b class="base">') == blind
    assert '<b class="adapter">' not in text


def test_a_context_that_was_cut_says_so(script):
    said = {"reference": {1: "real"}, "base": {1: "made"}}
    for context, shown in ("1\n2", "1\n2"), ("x" * 301, "… " + "x" * 300):
        row = script.Row(1, context, "real", [], [])
        assert script.blind_cards([row], said, "base", 0)[0]["chat"] == shown


def test_a_learning_curve_that_cannot_be_read_costs_nothing(script, tmp_path):
    path = tmp_path / "losses.csv"
    for text in "", "iteration\n0\n", "iteration,val_loss\n0,5\n", "\0\0":
        path.write_text(text)
        assert script.learning_curve(path) == []
    path.write_text("iteration,val_loss\n0,5\n10,\n20,4\n")
    assert script.learning_curve(path) == [(0, 5.0), (20, 4.0)]


def test_all_text_of_the_page_has_contrast_in_light_and_dark(script):
    def brightness(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    found = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", script.PAGE)
    colours = {name: list(map(brightness, both)) for name, *both in found}
    assert {"paper", "card", "ink", "soft", "base", "adapter", "fused", "far"} <= set(colours)
    for name in colours.keys() - {"paper", "card", "line"}:
        for ground in "paper", "card":
            for mode in 0, 1:
                dark, light = sorted([colours[name][mode], colours[ground][mode]])
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground, mode)


def chromium(tmp_path, page):
    """Return the page's DOM as text after it was open for two seconds in a real browser."""
    mac = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
    names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", mac]
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("install chromium to see the page")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom"
    quiet += " --disable-background-networking --disable-component-update --disable-sync"
    command = [browser, *quiet.split(), "--virtual-time-budget=2000"]
    command += [f"--user-data-dir={tmp_path / 'browser'}", page]
    return subprocess.run(command, capture_output=True, timeout=60).stdout.decode()


def test_nothing_runs_in_the_browser_nothing_is_fetched_and_it_fits_a_phone(script, tmp_path):
    asked_for = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked_for.append(self.path)

    handler = functools.partial(Handler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    fetch = f"<img src={here}/a><style>@import '{here}/c'</style>"
    write_made_up(script, tmp_path, [fetch, *HOSTILE[:19]], base="{}", adapter="{}", fused="{}!")
    # The same texts in a page that does not take care do run and do fetch, so this test can fail.
    careless = "<title>v1</title>" + HOSTILE[0] + fetch
    (tmp_path / "careless.html").write_text(careless, encoding="utf-8")
    careless = chromium(tmp_path, f"{here}/careless.html")
    assert "<title>owned</title>" in careless and "/a" in asked_for
    asked_for.clear()
    dom = chromium(tmp_path, f"{here}/data/results/report.html")
    assert asked_for[0] == "/data/results/report.html" and set(asked_for[1:]) <= {"/favicon.ico"}
    assert "<title>v1 · m</title>" in dom
    tags = re.sub(r">[^<]*<", "><", dom)
    active = r"<(?:script|img|iframe|link|object|embed|base|form|a)\b|\son\w+="
    assert re.findall(active, tags) == []
    assert dom.count("<article") == 20 and dom.count("<svg ") == 0
    assert "1337" not in dom and "{{ 7 * 191 }}" in dom  # no template in a text is filled in
    assert is_readable(dom)
    size = "document.title = 'wide ' + this.contentDocument.documentElement.scrollWidth"
    frame = f'<iframe src="data/results/report.html" width=390 height=800 onload="{size}"></iframe>'
    (tmp_path / "phone.html").write_text(frame)
    phone = chromium(tmp_path, f"{here}/phone.html")
    server.shutdown()
    assert int(re.search(r"<title>wide (\d+)</title>", phone)[1]) <= 390


# ---- written whole or not at all -----------------------------------------------------------------
@pytest.mark.parametrize(
    ("folders", "left"),
    [
        ({".r.old": "older", ".r.partial": "newer"}, "older"),  # killed between the two renames
        ({"r": "newer", ".r.old": "older"}, "newer"),  # killed before the old one was gone
        ({"r": "older", ".r.partial": "half"}, "older"),  # killed while writing
        ({"r": "mine", "r.old": "mine", "r.partial": "mine"}, "mine"),  # names that users have
    ],
)
def test_a_swap_that_was_cut_short_is_undone_or_finished(script, tmp_path, folders, left):
    for name, text in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.html").write_text(text)
    script.hold(tmp_path / "r").close()
    kept = {name for name in folders if name[0] != "."} | {"r"}
    assert {p.name for p in tmp_path.iterdir()} == kept | {".r.lock"}
    assert (tmp_path / "r/report.html").read_text() == left


def test_a_second_run_is_refused_until_the_first_ends(script, tmp_path, capsys):
    with script.hold(tmp_path / "r"):  # the kernel lets go of it, however the run ends
        with pytest.raises(SystemExit):
            script.hold(tmp_path / "r")
        assert re.match("error: another run is writing .*/r. FIX: wait", capsys.readouterr().err)
    script.hold(tmp_path / "r").close()


# ---- cut short -----------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "count", "known"),
    [
        ("row_losses", 1, None),  # amid the losses of the base: nothing yet
        ("visible", 2, None),  # after its first reply: nothing to compare
        ("write_replies", 2, ["base", "adapter"]),  # before the first one of the adapter
    ],
)
def test_ctrl_c_leaves_a_report_of_what_is_done_or_the_one_of_before(
    project, stage_4, place, count, known
):
    def interrupt(module):
        original, calls = getattr(module, place), iter(range(1, 99))

        def call(*args):
            if next(calls) == count:
                raise KeyboardInterrupt
            return original(*args)

        setattr(module, place, call)

    (project / RESULTS).mkdir()
    (project / RESULTS / "report.html").write_text("previous")
    args = ["--replies", "2", "--max-tokens", "2"]
    code, _, err = stage_4(project, *args, patch=interrupt)
    assert code == 130
    if known is None:
        assert contents(project / RESULTS) == {"report.html": b"previous"}
    else:
        assert list(metrics(project)["loss"]) == known
        assert "stopped with Ctrl-C" in page(project) and "stopped with Ctrl-C" in err


@pytest.mark.slow
def test_ctrl_c_from_outside_is_quiet_while_it_starts_and_reports_later(project, run):
    (project / VALID).write_bytes((project / VALID).read_bytes() * 8)  # it comes in the middle
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    args = ["--replies", "2", "--max-tokens", "4"]
    process = run(project, "test_on_validation.py", start=subprocess.Popen, **out)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=60)[0], process.returncode) == ("\n", 130)
    process = run(project, "test_on_validation.py", *args, start=subprocess.Popen, **out)
    assert any(line.startswith("adapter loss") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in rest) == (130, False)
    assert list(metrics(project)["loss"]) == ["base"] and "Nothing to compare" in rest
    left = {path.name for path in (project / "data/results").iterdir()}
    assert left <= {NAME, f".{NAME}.lock", ".gitkeep"}


# ---- elsewhere -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_it_works_in_an_odd_environment_and_for_a_pipe_that_closes(project, run, tmp_path):
    link = tmp_path / "bin/test_on_validation.py"
    link.parent.mkdir()
    link.symlink_to(project / "test_on_validation.py")
    for folder in project, tmp_path:
        (folder / "json.py").write_text("raise SystemExit('json.py ran')")
    odd = {"PYTHONUTF8": None, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONOPTIMIZE": "2"}
    odd |= {"MLXLM_USE_MODELSCOPE": "True", "HF_HUB_OFFLINE": "0", "HTTPS_PROXY": "http://x:1"}
    pipe = {"stdin": subprocess.DEVNULL} | dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    options = {"env": odd, "cwd": tmp_path, "start": subprocess.Popen} | pipe
    args = ["--models", "base", "--replies", "1", "--max-tokens", "2"]
    process = run(tmp_path / "bin", link.name, *args, **options)
    assert f"testing base on 10 rows of {VALID}\n".encode() in iter(process.stdout.readline, b"")
    process.stdout.close()  # as `| head -1` does
    err = process.stderr.read()
    assert (process.wait(60), b"Traceback" in err, b"Broken" in err) == (0, False, False), err
    assert metrics(project)["replies"]["base"] == 1


def test_a_python_that_is_too_old_can_still_read_the_script_and_say_so():
    text = (REPOSITORY / "test_on_validation.py").read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 9))
    kinds = [type(node).__name__ for node in tree.body[:5]]
    assert kinds == ["Expr", "Import", "Import", "Import", "If"]  # docstring, …, the check
