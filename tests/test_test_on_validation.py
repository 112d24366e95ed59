"""test_on_validation.py: true figures, an honest verdict, and chat that can only be read.

The sections are those of the script, in its order. A table of cases is {id: what to do, what must
come of it}; `pytest -k "id"` runs one of them.
"""

import ast
import csv
import functools
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
import unicodedata
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import REPOSITORY, contents, cut_off
from mlx_lm import load

BASE = "models/base/tiny-gemma-3"
ADAPTER = "models/adapters/adapter-sample_tiny-gemma-3"
FUSED = "models/fused/fused-sample_tiny-gemma-3"
VALID = "data/for_train/sample/valid.jsonl"
RESULTS = "data/results/sample_tiny-gemma-3"
NAN = float("nan")
ALL = "base,adapter,fused"
BASE_ALONE = "--models base --replies 2 --max-tokens 4"


# ---- helpers -------------------------------------------------------------------------------------
def cases(names, table):
    return pytest.mark.parametrize(names, list(table.values()), ids=list(table))


@pytest.fixture
def script(monkeypatch):
    """The script as a module, as if it were called with VERSION and MODEL of the sample."""
    monkeypatch.setenv("VERSION", "sample")
    monkeypatch.setenv("MODEL", "tiny-gemma-3")
    spec = importlib.util.spec_from_file_location("stage_4", REPOSITORY / "test_on_validation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stage_4(script, monkeypatch, capsys):
    """Run the script in this process: stage_4(project, flags) → (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # if it asked
    monkeypatch.chdir(".")  # back again afterwards: the script goes to its own folder

    def call(project, flags=""):
        monkeypatch.setattr(script, "ROOT", project)
        monkeypatch.setattr(sys, "argv", ["test_on_validation.py", *flags.split()])
        try:
            code = script.main()
        except SystemExit as e:
            code = e.code
        except KeyboardInterrupt:  # pytest would end
            code = "interrupted"
        return code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.fixture(scope="module")
def finished(template, tmp_path_factory):
    """A project in which the stages before this one ran: nine validation rows, and a short run."""
    project = shutil.copytree(template, tmp_path_factory.mktemp("finished") / template.name)
    settings = "VERSION=sample MODEL=tiny-gemma-3 ITERS=4 EVAL_EVERY=2 LEARNING_RATE=2e-2 RANK=4"
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


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def turns(*texts):
    """Return a row of messages: user, assistant, user, …"""
    roles = ["user", "assistant"] * (len(texts) // 2)
    pairs = zip(roles, texts, strict=True)
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def write_rows(project, *rows):
    path = project / VALID
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def metrics(project):
    return json.loads((project / RESULTS / "metrics.json").read_bytes())


def page(project):
    return (project / RESULTS / "report.html").read_text("utf-8")


# ---- settings ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags", ["--nonsense", "--models base,all", "--temperature nan", "--max-tokens 0"]
)
def test_a_wrong_flag_is_wrong_usage(template, stage_4, flags):
    code, _, err = stage_4(template, flags)
    assert code == 2
    assert re.fullmatch(r"error: .*\. FIX: python test_on_validation\.py --.*\n", err)


def test_a_python_that_is_too_old_can_still_read_the_script_and_say_so():
    text = (REPOSITORY / "test_on_validation.py").read_text("utf-8")
    tree = ast.parse(text, feature_version=(3, 9))
    kinds = [type(node).__name__ for node in tree.body[:5]]
    assert kinds == ["Expr", "Import", "Import", "Import", "If"]  # docstring, …, the check


# ---- what is there -------------------------------------------------------------------------------
RUN = "VERSION=sample MODEL=tiny-gemma-3"
TINY = "python tests/tiny_base.py"
TRAIN = f"{RUN} ./fine_tune.sh, or test the base model alone: {RUN} python"
BUILD = "VERSION=sample python build_train.py"
INSTRUCT = "MODEL=gemma-3-text-27b-it-4bit ./fine_tune.sh, or another instruct model"
LINE = f"{VALID} line 1"
FAILS = "{{ raise_exception('no\x1b[2J') }}"
THINKS = """{% for m in messages %}{{ m.content }}{% endfor %}
{% if add_generation_prompt %}<think>{% endif %}"""


def rows(*rows):
    return lambda project: write_rows(project, *rows)


def template_of(text):
    return lambda project: edit(project / BASE / "tokenizer_config.json", chat_template=text)


def own_code(project):
    (project / BASE / "own.py").write_text("open('ran', 'w')\nclass Own: pass\n")
    own = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    edit(project / BASE / "tokenizer_config.json", **own)


# {id: (what is done to a project of a base and one row, flags, where it is wrong, the fix)}
WRONG = {
    "version": (None, "--version ..", "VERSION is '..'", "export VERSION=v1"),
    "model": (None, "--model x/.tiny/", "MODEL is 'x/.tiny/'", "export MODEL=tiny"),
    "no rows": (None, "--version two", "for_train/two", "VERSION=two python build"),
    "no base": (
        lambda p: shutil.rmtree(p / BASE), "", BASE, f"export MODEL=tiny-gemma-3-4bit, or {TINY}"),
    "base cut": (lambda p: cut_off(p / BASE / "model.safetensors"), "", BASE, TINY),
    "base too deep": (
        lambda p: edit(p / BASE / "config.json", num_hidden_layers=10**9), "",
        "1000000000 layers", TINY),
    "own code": (own_code, "", ADAPTER, TRAIN),  # it is passed over, and the next thing is missing
    "no adapter": (None, "", ADAPTER, TRAIN),
    "empty adapter": (lambda p: (p / ADAPTER).mkdir(), "", ADAPTER, TRAIN),
    "no fused": (None, "--models base,fused", FUSED, f"{RUN} ./fuse.sh"),
    "empty": (rows(), "--models base", VALID, BUILD),
    "no reply": (rows({"prompt": "a"}), "--models base", LINE, BUILD),
    "surrogate": (rows(pair("a", "\ud800")), "--models base", LINE, BUILD),
    "no row": (rows(pair("a", "b"), []), "--models base", f"{VALID} line 2", BUILD),
    "no user": (rows({"messages": [turns("a", "b")["messages"][1]]}), "--models base", LINE, BUILD),
    "no template": (template_of(None), "--models base", LINE, INSTRUCT),
    "template fails": (template_of(FAILS), "--models base", "no\\x1b[2J", INSTRUCT),
    "template thinks": (template_of(THINKS), "--models base", "begins a reply otherwise", INSTRUCT),
}  # fmt: skip


@pytest.mark.slow
@cases("damage, flags, where, fix", WRONG)
def test_what_is_wrong_is_said_first_with_its_fix(project, stage_4, damage, flags, where, fix):
    """And no code of a base runs, and nobody is asked."""
    write_rows(project, pair("ciao", "ehi"))
    if damage:
        damage(project)
    code, out, err = stage_4(project, flags)
    assert (code, out, err.count("\n")) == (1, "", 1)
    what, _, way_out = err.partition(". FIX: ")
    assert what.startswith("error: ")
    assert where in what
    assert way_out.startswith(fix)
    assert not (project / RESULTS).exists()
    assert not (project / "ran").exists()
    assert sys.stdin.read() == "y\n" * 9


def test_whoever_forgot_a_name_is_told_those_that_there_are(project, stage_4, monkeypatch):
    monkeypatch.delenv("MODEL")
    write_rows(project, pair("ciao", "ehi"))
    forgot = "--version v1"
    fix = "VERSION=v1 python build_train.py, or export VERSION=sample\n"
    assert stage_4(project, forgot)[2].endswith(f"FIX: {fix}")
    fix = "FIX: export MODEL=tiny-gemma-3, or export MODEL=tiny-gemma-3-4bit, or hf download "
    assert fix in stage_4(project, "--model gemma")[2]


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
    "other rows": (other_rows, "adapter", ["adapter"], "not the one of the training"),
    "other rows, base": (other_rows, "base", ["base"], ""),
    "other adapter": (other_adapter, ALL, ALL.split(","), "from another adapter"),
    "other adapter, base": (other_adapter, "base", ["base"], ""),
}


@pytest.mark.slow
@cases("change, models, tested, warning", CHANGED)
def test_what_is_asked_for_must_belong_together(trained, stage_4, change, models, tested, warning):
    change(trained)
    code, _, err = stage_4(trained, f"--models {models} --replies 0")
    found = metrics(trained)
    assert (code, list(found["loss"])) == (0, tested)
    assert "kept" not in found  # an old fuse is not blamed for a new adapter
    assert len(found["warnings"]) == bool(warning)
    if warning:
        assert warning in found["warnings"][0]
        assert f"warning: {found['warnings'][0]}\n" in err
        assert found["warnings"][0] in page(trained)


@cases(
    "said, flags, used",
    {
        "nothing said": (None, "", (0.8, 0.95, 0)),
        "said": ({"top_k": 64, "top_p": 0.9, "temperature": 1}, "", (1.0, 0.9, 64)),
        "set": ({"top_k": 64, "temperature": 1.0}, "--temperature 0.5", (0.5, 0.95, 64)),
        "set to nought": ([{"top_k": 3}], "--top-k 0", (0.8, 0.95, 0)),
    },
)
def test_sampling_is_as_the_base_says_unless_set(script, tmp_path, monkeypatch, said, flags, used):
    monkeypatch.setattr(sys, "argv", ["test_on_validation.py", *flags.split()])
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    args = script.settings()
    script.set_sampling(args, tmp_path)
    assert (args.temperature, args.top_p, args.top_k) == used


# ---- one model at a time -------------------------------------------------------------------------
def true_loss(project, folder, adapter=None):
    """Return the loss by its definition, row by row, and the number of tokens.

    It is the mean of -log p over the tokens that follow the prompt.
    """
    model, tokenizer = load(str(project / folder), adapter_path=adapter and str(project / adapter))
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
def test_the_losses_are_the_true_ones_and_those_of_the_training(trained, stage_4):
    flags = "--replies 3 --max-tokens 4 --batch-tokens 200"  # several batches, padded
    code, out, err = stage_4(trained, flags)
    assert code == 0, err
    found = metrics(trained)
    for name, model in {"base": [BASE], "adapter": [BASE, ADAPTER], "fused": [FUSED]}.items():
        true = true_loss(trained, *model)
        assert (found["loss"][name], found["tokens"]) == pytest.approx(true, abs=5e-5)
    assert found["kept"]["fused"] == pytest.approx(1, abs=0.01)

    with (trained / ADAPTER / "losses.csv").open() as file:
        curve = {row["iteration"]: float(row["val_loss"]) for row in csv.DictReader(file)}
    kept = min(curve, key=curve.get)
    assert found["loss"]["base"] == pytest.approx(curve["0"], abs=0.01)
    assert found["loss"]["adapter"] == pytest.approx(curve[kept], abs=0.01)
    assert f"Kept: iteration {kept},\n{curve[kept]:.2f}." in page(trained)

    assert found["verdict"].startswith("Better than the base: loss ")
    assert found["verdict"] in out.replace("\n", " ")
    assert found["warnings"] == []
    assert "base loss: " in err  # a plain line in a pipe, where no bar can be
    assert sorted(contents(trained / RESULTS)) == ["generations.csv", "metrics.json", "report.html"]


@pytest.mark.slow
def test_of_messages_the_last_one_is_scored_and_answered(trained, stage_4):
    def tested(*rows):
        write_rows(trained, *rows)
        edit((trained / VALID).with_name("settings.json"), authors=["ann"])
        assert stage_4(trained, BASE_ALONE)[0] == 0
        return metrics(trained)

    prompts = tested(pair("ciao\ncome va?", "bene"), pair("ciao", "ehi"))
    assert tested(turns("ciao\ncome va?", "bene"), turns("ciao", "ehi")) == prompts
    assert tested(turns("ciao", "ehi", "come va?", "bene"))["tokens"] < prompts["tokens"]
    with (trained / RESULTS / "generations.csv").open(encoding="utf-8-sig") as file:
        row = next(csv.DictReader(file))
    assert (row["prompt"], row["reference"]) == ("ciao\nann: ehi\ncome va?", "bene")


@pytest.mark.slow
def test_same_seed_same_replies_other_seed_others(trained, stage_4):
    write_rows(trained, *(pair(text, text) for text in ["ciao", "che si dice?", "perché?", "?"]))

    def replies(flags):
        usual = "--models base --replies 4 --max-tokens 6"
        assert stage_4(trained, f"{usual} {flags}")[0] == 0
        return sorted((trained / RESULTS / "generations.csv").read_bytes().splitlines())

    first = replies("")
    assert replies("") == first
    assert replies("--seed 1") != first
    likeliest = replies("--temperature 0 --reply-batch 1")
    assert replies("--temperature 0 --reply-batch 3") == likeliest


def run_to(run, project, line, **options):
    """Start the script, send Ctrl-C at a line that begins so; return (code, what follows)."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    process = run(project, "test_on_validation.py", start=subprocess.Popen, **pipes, **options)
    assert any(each.startswith(line) for each in process.stdout)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    return process.returncode, rest


def test_ctrl_c_amid_the_imports_ends_it_without_a_word(project, run, tmp_path):
    (tmp_path / "jinja2.py").write_text("print('here', flush=True)\nimport time\ntime.sleep(60)")
    end = run_to(run, project, "here", env={"PYTHONPATH": str(tmp_path)})
    assert end == (130, "\n")


@pytest.mark.slow
def test_ctrl_c_amid_the_first_model_leaves_the_report_of_before(trained, run):
    (trained / VALID).write_bytes((trained / VALID).read_bytes() * 50)  # it takes seconds
    (trained / RESULTS).mkdir()
    (trained / RESULTS / "report.html").write_text("before")
    code, rest = run_to(run, trained, "base loss")
    assert code == 130
    assert "Traceback" not in rest
    assert contents(trained / RESULTS) == {"report.html": b"before"}


@pytest.mark.slow
@cases(
    "calls, before, known",
    {
        "base": (1, None, ["base"]),
        "base, which tells less than before": (1, ["base", "adapter"], ["base", "adapter"]),
        "base and adapter": (2, ["base"], ["base", "adapter"]),
    },
)
def test_ctrl_c_leaves_a_report_of_what_is_done(
    trained, script, stage_4, monkeypatch, calls, before, known
):
    write_replies = script.write_replies
    made = []

    def interrupted(*args):
        made.append(args)
        if len(made) == calls:
            os.kill(os.getpid(), signal.SIGINT)
        write_replies(*args)

    if before:
        stage_4(trained, f"--models {','.join(before)} --replies 0")
    monkeypatch.setattr(script, "write_replies", interrupted)
    code, _, err = stage_4(trained, "--replies 2 --max-tokens 2")
    assert code == 130
    assert list(metrics(trained)["loss"]) == known
    if before == known:
        assert "the report of before is as it was" in err
    else:
        assert "stopped with Ctrl-C" in page(trained)
        assert "stopped with Ctrl-C" in err


# ---- figures -------------------------------------------------------------------------------------
def figures_of(script, real, made, nats=None, ended=True):
    """Return figures() of rows of two tokens each.

    real: the true replies; made: {model: its replies, None where one is missing}.
    """
    rows = [script.Row(line, "", text, [0], [0, 1, 2]) for line, text in enumerate(real, 1)]
    nats = nats or {who: [2] * len(rows) for who in made}
    nats = {who: np.array(sums, dtype=float) for who, sums in nats.items()}
    done = {
        who: {line: (text, ended) for line, text in enumerate(texts, 1) if text is not None}
        for who, texts in made.items()
    }
    return script.figures(rows, rows, nats, done, Namespace(max_tokens=60))[0]


def test_gain_error_and_what_the_fused_model_keeps(script):
    nats = {"base": [10, 6], "adapter": [4, 4], "fused": [6, 4]}
    table = figures_of(script, ["x"] * 2, dict.fromkeys(nats, ["x"] * 2), nats)
    assert table["loss"] == {"base": 4.0, "adapter": 2.0, "fused": 2.5}
    assert table["gain"] == {"adapter": 2.0, "fused": 1.5}
    assert table["gain error"]["adapter"] == pytest.approx(0.7071, abs=1e-4)
    assert table["kept"]["fused"] == 0.75


STYLE = {
    "looping": (["sa sa sa sa", "boh\nboh\nboh\nboh"], ["no no no", "hahahaha", "ok"]),
    "emoji": (["ok 🙏🏽", ":-)", "va bene ;D"], ["12:30", "a:b", "C:(x)", "=)x"]),
    "full stop last": (["Ok.", "好。"], ["ok...", "ok", "a.b"]),
    "question": (["perché?", "لماذا؟"], ["perché"]),
    "capital first": (["Ok", "È vero"], ["ok", "è", "🙏 Ok", ""]),
    "several lines": (["a\nb"], ["a b"]),
}


@pytest.mark.parametrize("name", STYLE)
def test_a_figure_of_style_is_the_share_of_replies_that_have_it(script, name):
    with_it, without = STYLE[name]
    for text in with_it:
        assert figures_of(script, ["ok"], {"base": [text]})[name]["base"] == 1.0, text
    for text in without:
        assert figures_of(script, ["ok"], {"base": [text]})[name]["base"] == 0.0, text
    both = figures_of(script, ["ok"] * 2, {"base": [with_it[0], without[0]]})
    assert both[name] == {"reference": 0.0, "base": 0.5}


def test_replies_that_never_ended_or_never_came(script):
    some = figures_of(script, ["ok"] * 2, {"base": ["a", None]}, ended=False)
    assert (some["replies"]["base"], some["unfinished"]["base"]) == (1, 1.0)
    none = figures_of(script, ["ok"] * 2, {"base": [None, None]})
    assert "base" not in none["replies"]
    assert none["loss"]["base"] == 1.0


def test_the_classifier_tells_what_can_be_told_and_no_more(script):
    draw = np.random.default_rng(0)
    words = ["boh", "ciao", "dai", "ma", "no", "però", "sedia", "sì", "vai", "certo"]
    real, alike = ([" ".join(draw.choice(words, 4)) for _ in range(100)] for _ in range(2))
    loud = [text.capitalize() + "!" for text in alike]
    assert script.told_apart(real, real) == (0.5, pytest.approx(0.05, abs=0.001))
    share, error = script.told_apart(real, alike)
    assert abs(share - 0.5) < 3 * error
    share, error = script.told_apart(real, loud)
    assert share == 1.0
    assert 0 < error < 0.02


def test_favourite_words_that_are_missing(script):
    real = ["boh certo", "boh", "Boh!", "boh ma", "boh", "ma", "ciao"]
    assert script.missing_words(real, ["ma certo"]) == ["boh"]
    assert script.missing_words(real, ["BOH"]) == []
    table = figures_of(script, ["boh"] * 20, {"base": ["ma"] * 20})
    assert table["missing words"] == {"base": "boh"}


@pytest.mark.parametrize(
    ("shown", "name", "value", "error", "replies"),
    [
        ("3.07", "loss", 3.0655, 0.05, 100),
        ("3.1", "loss", 3.0655, 0.4, 3),
        ("0.88 ± 0.07", "gain", 0.8833, 0.07, 100),
        ("33", "length", 33.3, None, 100),
        ("71% ± 4%", "told apart", 0.7123, 0.041, 100),
        ("33%", "emoji", 0.3333, None, 30),
        ("2 of 7", "emoji", 2 / 7, None, 7),
        ("nan", "loss", NAN, NAN, 7),
    ],
)
def test_a_figure_has_the_digits_its_error_allows(script, shown, name, value, error, replies):
    table = {"replies": {"base": replies}, "gain error": {}, name: {"base": value}}
    if error is not None:
        table[f"{name} error"] = {"base": error}
    assert script.shown(table, name, "base") == shown


# ---- the verdict ---------------------------------------------------------------------------------
USUAL = {"question": 0.1, "emoji": 0.2, "capital first": 0.3, "full stop last": 0.1}
USUAL |= {"several lines": 0.0, "looping": 0.0, "unfinished": 0.0, "length": 30.0, "replies": 100}


def table_of(style=None, kept=None, **loss):
    """Return a table as of figures(): these losses, gains with an error of 0.04, these styles."""
    gain = {who: loss["base"] - loss[who] for who in loss if who != "base"}
    table = defaultdict(dict, loss=loss, gain=gain)
    table["gain error"] = dict.fromkeys(gain, 0.04)
    if kept:
        table["kept"] = {"fused": kept}
    for who in ["reference", *loss]:
        for name, value in (USUAL | (style or {}).get(who, {})).items():
            table[name][who] = value
    return table


def learned(**style):
    return table_of(style, base=9.0, adapter=3.0)


BETTER = "Better than the base: loss 3.00 instead of 9.00"
LOST = table_of(base=9.0, adapter=3.0, fused=6.0, kept=0.5)
KEPT = table_of(base=9.0, adapter=3.0, fused=3.0, kept=0.998)
AGAIN = "The fused model keeps 50% of that. Fuse again: "
NOT_YET = "It does not write like them yet: "
TOLD, ALWAYS = ({"told apart": share, "told apart error": 0.04} for share in (0.7, 1.0))
TELLS = "A classifier tells its replies from the real ones in 70% ± 4% of the pairs (the base's in"
LOOPS = {"looping": 0.4}
OTHER = {"full stop last": 0.8, "unfinished": 0.3, "missing words": "boh, lol"}
DIFFERS = "unfinished 30% instead of 0%; full stop last 80% instead of 10%; it never says boh, lol."

# {id: (figures, rows, bits of the fused model, how the sentences begin)}
VERDICTS = {
    "better": (learned(), 400, "", [BETTER + "."]),
    "few rows": (learned(), 7, "", [BETTER + ", but too few rows to be sure: 7 (30 would do"]),
    "worse": (table_of(base=3.0, adapter=3.5), 400, "", ["Worse than the base: loss 3.50 inst"]),
    "chance": (table_of(base=3.0, adapter=2.95), 400, "", ["No better than the base: loss 2.95"]),
    "broken": (table_of(base=9.0, adapter=NAN), 400, "", ["Broken: a loss is not a number."]),
    "base alone": (table_of(base=9.0), 400, "", ["Nothing to compare: "]),
    "fused": (KEPT, 400, "8", [BETTER, "The fused model keeps 100% of that."]),
    "fused at 4 bits": (LOST, 400, "base", [BETTER, AGAIN + "FUSED_BITS=8 ./fuse.sh."]),
    "fused at 8 bits": (LOST, 400, "8", [BETTER, AGAIN + "FUSED_BITS=16 ./fuse.sh."]),
    "fused at 16 bits": (LOST, 400, "16", [BETTER, AGAIN + "./fuse.sh."]),
    "told apart": (learned(base=ALWAYS, adapter=TOLD), 400, "", [BETTER, TELLS]),
    "other style": (learned(adapter=OTHER), 400, "", [BETTER, NOT_YET + DIFFERS]),
    "loops": (learned(adapter=LOOPS), 400, "", [BETTER, NOT_YET + "looping 40%"]),
    "the chat loops, too": (learned(reference=LOOPS, adapter=LOOPS), 400, "", [BETTER]),
    "few replies": (learned(adapter={"replies": 5, "emoji": 0.6}), 400, "", [BETTER]),
}


@cases("table, rows, bits, sentences", VERDICTS)
def test_the_verdict(script, table, rows, bits, sentences):
    said = script.verdict(table, rows, bits)
    assert len(said) == len(sentences)
    assert [text[: len(start)] for text, start in zip(said, sentences, strict=True)] == sentences


# ---- the page ------------------------------------------------------------------------------------
OWNED = "document.title='owned'"
HOSTILE = [
    f"<script>{OWNED}</script>",
    f'</textarea></title></style><img src=x onerror="{OWNED}"><svg onload="{OWNED}">',
    f'<iframe srcdoc="<script>parent.{OWNED}</script>"></iframe>',
    "<meta http-equiv=refresh content=0>",
    "{{ 7 * 191 }}{% raw %} ]]> --> &lt;b&gt; $x^2$ \\frac",
    *['=HYPERLINK("http://127.0.0.1";"x")', "+1+cmd|' /C calc'!A0", "-1+1", "@SUM(1+1)"],
    *["\t=1+1", "\r=1+1", "ciao; =1+1", "ciao\n=1+1"],
    "\x1b[31mred\x1b]0;owned\x07\x1b[2J\x9b1m",
    "\u202eright to left\u2066 and \u200f over",
    "nul \x00 backspace \x08\x08\x08 delete \x7f, lone \ud800 surrogate \udfff",
    "Z" + "\u0351\u036b\u0353\u036a\u0302\u034f\u0334" * 50,
    "W" * 40_000,
    "",
]


def write_made_up(script, folder, texts, **forms):
    """Write the three files for rows whose context and true reply are these texts.

    A model replies in its form: fused="{}!" adds an exclamation mark to each true reply. Return
    the page.
    """
    rows = [
        script.Row(line, f"{text}\n{text}", text, [0], [0, 1, 2])
        for line, text in enumerate(texts, 1)
    ]
    nats = {who: np.full(len(texts), 18.0 - 2 * i) for i, who in enumerate(forms)}
    done = {
        who: {row.line: (form.format(script.visible(row.reference)), True) for row in rows}
        for who, form in forms.items()
    }
    args = Namespace(version="v1", model="m", seed=0, max_tokens=60)
    table, said = script.figures(rows, rows, nats, done, args)
    facts = {"sentences": script.verdict(table, len(rows), "8"), "warnings": ["a warning"]}
    facts |= {"rows": len(rows), "settings": vars(args), "versions": {"mlx": "0", "mlx_lm": "0"}}
    text = script.report(facts, table, rows, said, folder / "adapter", args)
    (folder / "data").mkdir()
    script.write(folder / "data/results", text, facts, rows, said)
    return text


def is_readable(text):
    """Say whether it holds no control, format or surrogate characters, but those of emoji."""
    fine = "\n\t\u200c\u200d\ufeff"
    return not {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in fine}


def test_text_is_made_visible_and_no_formula_and_else_stays_as_it_is(script):
    harmless = "perché 🙏🏽 👩‍💻\n1 + 1 = 2, a-b"
    assert script.visible(harmless) == harmless
    assert script.defuse(harmless) == harmless
    assert script.visible("a\x1b[1m\x00\u202e\ud800") == r"a\x1b[1m\x00\u202e\ud800"
    assert script.defuse("=1+1;@A\n -1\t") == "'=1+1;'@A\n '-1 "


def test_hostile_text_is_inert_in_the_spreadsheet_file(script, tmp_path):
    write_made_up(script, tmp_path, HOSTILE, base="{}", adapter="{}")
    text = (tmp_path / "data/results/generations.csv").read_text("utf-8-sig")
    assert is_readable(text)
    for delimiter in ",;\t":  # as the spreadsheets of other countries cut the same file
        table = csv.reader(io.StringIO(text), delimiter=delimiter)
        cells = [cell for row in table for cell in row]
        assert not [cell for cell in cells if re.match(r"[=+\-@\t\r]", cell)]
    assert max(map(len, text.split('","'))) < 32_767  # what a cell can hold


def test_the_blind_test_shows_two_replies_and_hides_which_is_real(script, tmp_path):
    texts = [f"ciao {n}" for n in range(25)]
    text = write_made_up(script, tmp_path, texts, base="{}", adapter="{}!")
    answers = []
    for card in text.split('<article class="panel">')[1:]:
        shown, answer = card.split("<details>", 1)
        assert "really said" not in shown
        replies = re.findall(r'<p class="said">(ciao \d+!?)</p></div>', shown)
        real = re.search(r"<strong>([AB])</strong> was really said", answer)[1]
        first, second = replies if real == "A" else replies[::-1]
        assert second == first + "!"
        answers.append(real)
    assert len(answers) == 20
    assert 4 < answers.count("A") < 16
    assert "Of 20, half is guessing;\n15 or more right means that you can tell" in text


@cases("fused, blind", {"as said": ("{}", 0), "another": ("{}?", 2)})
def test_equal_replies_are_no_blind_test_and_stand_once(script, tmp_path, fused, blind):
    forms = {"base": "{}!", "adapter": fused, "fused": fused}
    text = write_made_up(script, tmp_path, ["ciao", "boh"], **forms)
    assert text.count("Which one is real?") == blind
    assert text.count('<b class="base">') == blind
    assert '<b class="adapter">' not in text


@cases("context, shown", {"short": ("1\n2", "1\n2"), "long": ("x" * 301, "… " + "x" * 300)})
def test_a_context_that_was_cut_says_so(script, context, shown):
    row = script.Row(1, context, "real", [], [])
    said = {"reference": {1: "real"}, "base": {1: "made"}}
    assert script.blind_cards([row], said, "base", 0)[0]["chat"] == shown


def test_a_learning_curve_that_cannot_be_read_costs_nothing(script, tmp_path):
    path = tmp_path / "losses.csv"
    for text in "", "iteration\n0\n", "iteration,val_loss\n0,5\n", "\0\0":
        path.write_text(text)
        assert script.learning_curve(path) == []
    path.write_text("iteration,val_loss\n0,5\n10,\n20,4\n")
    assert script.learning_curve(path) == [(0, 5.0), (20, 4.0)]


def brightness(colour):
    """Return the relative luminance of #rrggbb (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_all_text_of_the_page_has_contrast(script, mode):
    found = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", script.PAGE)
    colours = {name: brightness(both[mode]) for name, *both in found}
    grounds = colours.pop("paper"), colours.pop("card")
    del colours["line"]
    assert {"ink", "soft", "base", "adapter", "fused", "far"} <= set(colours)
    for name, colour in colours.items():
        for ground in grounds:
            dark, light = sorted([colour, ground])
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


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


@pytest.fixture
def server(tmp_path):
    """A web server of tmp_path: (its address, the paths that it was asked for)."""
    asked_for = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked_for.append(self.path)

    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked_for
        server.shutdown()


@pytest.mark.slow
def test_nothing_of_the_page_runs_or_is_fetched_and_it_fits_a_phone(script, tmp_path, server):
    here, asked_for = server
    fetch = f"<img src={here}/a><style>@import '{here}/c'</style>"
    write_made_up(script, tmp_path, [fetch, *HOSTILE], base="{}", adapter="{}", fused="{}!")

    # The same texts in a page that does not take care do run and do fetch, so this test can fail.
    (tmp_path / "careless.html").write_text("<title>v1</title>" + HOSTILE[0] + fetch)
    assert "<title>owned</title>" in chromium(tmp_path, f"{here}/careless.html")
    assert "/a" in asked_for

    asked_for.clear()
    dom = chromium(tmp_path, f"{here}/data/results/report.html")
    assert {*asked_for} - {"/favicon.ico"} == {"/data/results/report.html"}
    assert "<title>v1 · m</title>" in dom
    tags = re.sub(r">[^<]*<", "><", dom)
    active = r"<(?:script|img|iframe|link|object|embed|base|form|a)\b|\son\w+="
    assert re.findall(active, tags) == []
    assert dom.count("<article") == 20
    assert "{{ 7 * 191 }}" in dom  # no template in a text is filled in
    assert is_readable(dom)

    size = "document.title = 'wide ' + this.contentDocument.documentElement.scrollWidth"
    frame = f'<iframe src="data/results/report.html" width=390 height=800 onload="{size}"></iframe>'
    (tmp_path / "phone.html").write_text(frame)
    phone = chromium(tmp_path, f"{here}/phone.html")
    assert int(re.search(r"<title>wide (\d+)</title>", phone)[1]) <= 390


# ---- written whole or not at all -----------------------------------------------------------------
@cases(
    "folders, left",
    {
        "killed between the renames": ({".r.old": "older", ".r.partial": "newer"}, "older"),
        "killed before the old one was gone": ({"r": "newer", ".r.old": "older"}, "newer"),
        "killed while writing": ({"r": "older", ".r.partial": "half"}, "older"),
        "names that users have": ({"r": "mine", "r.old": "mine", "r.partial": "mine"}, "mine"),
    },
)
def test_a_swap_that_was_cut_short_is_undone_or_finished(script, tmp_path, folders, left):
    for name, text in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.html").write_text(text)
    script.hold(tmp_path / "r").close()
    kept = {name for name in folders if name[0] != "."}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"r", ".r.lock"}
    assert (tmp_path / "r/report.html").read_text() == left


def test_a_second_run_is_refused_until_the_first_ends(script, tmp_path, capsys):
    with script.hold(tmp_path / "r"):  # the kernel lets go of it, however the run ends
        with pytest.raises(SystemExit):
            script.hold(tmp_path / "r")
        assert re.match("error: another run is writing .*/r. FIX: wait", capsys.readouterr().err)
    script.hold(tmp_path / "r").close()


# ---- the run -------------------------------------------------------------------------------------
@pytest.mark.slow
def test_it_works_in_an_odd_environment_and_for_a_pipe_that_closes(trained, run, tmp_path):
    """Through a link, beside a json.py, with ASCII alone, no input, and | head -1."""
    link = tmp_path / "bin/test_on_validation.py"
    link.parent.mkdir()
    link.symlink_to(trained / "test_on_validation.py")
    for folder in trained, tmp_path:
        (folder / "json.py").write_text("raise SystemExit('json.py ran')")
    odd = {"PYTHONUTF8": None, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONOPTIMIZE": "2"}
    odd |= {"MLXLM_USE_MODELSCOPE": "True", "HF_HUB_OFFLINE": "0", "HTTPS_PROXY": "http://x:1"}
    options = {"env": odd, "cwd": tmp_path, "start": subprocess.Popen, "stdin": subprocess.DEVNULL}
    options |= dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    process = run(link.parent, link.name, *BASE_ALONE.split(), **options)
    assert f"testing base on 9 rows of {VALID}\n".encode() in iter(process.stdout.readline, b"")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0, err
    assert b"Traceback" not in err
    assert b"Broken" not in err
    assert metrics(trained)["replies"]["base"] == 2
