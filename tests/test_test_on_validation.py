"""test_on_validation.py: true numbers, a true verdict, and chat text that can do nothing but be read."""

import ast
import csv
import fcntl
import functools
import http.server
import importlib.util
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import unicodedata

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from mlx_lm import load

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BASE, ADAPTER = "models/base/tiny-gemma-3", "models/adapters/adapter-v1_tiny-gemma-3"
FUSED, RESULTS = "models/fused/fused-v1_tiny-gemma-3", "data/results/v1_tiny-gemma-3"
HOSTILE = [
    "<script>document.title='owned'</script>",
    "</textarea></title></style><img src=x onerror=\"document.title='owned'\"><svg onload=\"document.title='owned'\">",
    "<iframe srcdoc=\"<script>parent.document.title='owned'</script>\"></iframe><meta http-equiv=refresh content=0>",
    "{{ 7 * 191 }}{% raw %} ]]> --> &lt;b&gt; $x^2$ \\frac",
    '=HYPERLINK("http://127.0.0.1";"x")',
    "+1+cmd|' /C calc'!A0",
    "-1+1",
    "@SUM(1+1)",
    "\t=1+1",
    "\r=1+1",
    "ciao; =1+1",
    "ciao\n=1+1",
    "\x1b[31mred\x1b]0;owned\x07\x1b[2J\x9b1m",
    "\u202eright to left\u2066 and \u200f over",
    "nul \x00 backspace \x08\x08\x08 delete \x7f",
    "lone \ud800 surrogate \udfff",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!" * 5,
    "W" * 100_000,
    "",
]


@pytest.fixture(scope="module")
def trained(template, tmp_path_factory):
    """A project in which the first three stages have run on the sample, in small: 24 validation rows."""
    root = shutil.copytree(template, tmp_path_factory.mktemp("trained") / "my project")
    env = os.environ | {"VERSION": "v1", "MODEL": "tiny-gemma-3", "ITERS": "8", "EVAL_EVERY": "8", "WARMUP": "0"}
    env |= {"LEARNING_RATE": "1e-2", "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    for command in (
        [sys.executable, "build_train.py", "--valid-rows", "24"],
        ["bash", "fine_tune.sh"],
        ["bash", "fuse.sh"],
    ):
        subprocess.run(command, cwd=root, env=env, check=True, capture_output=True)
    return root


@pytest.fixture
def project(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / trained.name)


@pytest.fixture(scope="module")
def script():
    return load_script(os.path.join(REPOSITORY, "test_on_validation.py"))


def load_script(path):
    spec = importlib.util.spec_from_file_location("stage_4", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stage_4(project, monkeypatch, capsys):
    """Run the script of the project in this process, which saves the imports: (exit code, stdout, stderr)."""
    monkeypatch.setenv("VERSION", "v1")
    monkeypatch.setenv("MODEL", "tiny-gemma-3")
    module = load_script(project / "test_on_validation.py")

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["test_on_validation.py", *args])
        try:
            code, message = module.main(), ""
        except SystemExit as e:
            code, message = (e.code, "") if isinstance(e.code, int) else (1, e.code)
        out, err = capsys.readouterr()
        return code, out, err + message

    return call


def write_rows(project, rows):
    text = "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows)
    (project / "data/for_train/v1/valid.jsonl").write_text(text, encoding="utf-8")


def metrics(project):
    return json.loads((project / RESULTS / "metrics.json").read_text(encoding="utf-8"))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else None


# ---- numbers ---------------------------------------------------------------------------------------------------------
def true_loss(project, folder, adapter):
    """The definition, without batches: mean of -log p over the tokens after the prompt, end of turn included."""
    model, tokenizer = load(str(project / folder), adapter_path=adapter and str(project / adapter))
    losses = []
    for line in (project / "data/for_train/v1/valid.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        tokens = tokenizer.apply_chat_template(chat)
        start = len(tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True))
        logits = np.array(model(mx.array([tokens[:-1]]))[0].astype(mx.float32), dtype=np.float64)[start - 1 :]
        top = logits.max(-1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(-1))
        losses += list(log_sum - logits[np.arange(len(logits)), tokens[start:]])
    return np.mean(losses), len(losses)


def test_the_losses_of_all_models_are_the_true_ones_to_four_digits_and_the_rest_follows_from_them(project, run):
    done = run(project, "test_on_validation.py", "--replies", "6", "--max-tokens", "8", "--batch-tokens", "700")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    found = metrics(project)
    for name, model in {"base": (BASE, None), "adapter": (BASE, ADAPTER), "fused": (FUSED, None)}.items():
        loss, tokens = true_loss(project, *model)
        assert found["loss"][name] == pytest.approx(loss, abs=5e-5)
        assert found["perplexity"][name] == pytest.approx(np.exp(loss), rel=1e-4)
        assert found["tokens"] == tokens
        shown = f"{found['loss'][name]:.5g}"
        assert shown in done.stdout and shown in (project / RESULTS / "report.html").read_text()
    base, adapter, fused = (found["loss"][m] for m in ("base", "adapter", "fused"))
    assert found["kept"]["fused"] == pytest.approx((base - fused) / (base - adapter))
    assert done.stdout.splitlines()[2] == found["verdict"]
    # The page has the verdict, both plots in the colours of the page, and the mark of the kept checkpoint.
    page = (project / RESULTS / "report.html").read_text(encoding="utf-8")
    assert found["verdict"] in page and page.count("<svg") == 2 and "var(--adapter)" in page
    assert re.search(r"kept: iteration 8<", page)
    # A pipe gets plain lines with the time left.
    assert re.search(r"^base +loss \d+/\d+, \d+ s left$", done.stderr, re.MULTILINE)
    # All that is said to be written is there, and nothing else.
    assert sorted(contents(project / RESULTS)) == ["generations.csv", "metrics.json", "report.html"]
    assert [p.name for p in (project / "data/results").iterdir() if p.is_dir()] == ["v1_tiny-gemma-3"]


def figures_of(script, replies, prompts, losses):
    """figures() for replies of a model to prompts, with the reference "ok"; every row has two tokens."""
    texts = pd.DataFrame({"prompt": prompts, "reference": "ok", **{m: replies for m in losses}}, dtype=object)
    sums = {m: np.array(x, dtype=float) for m, x in losses.items()}
    return script.figures(texts, sums, np.full(len(prompts), 2))


def test_figures_of_style(script):
    prompts = ["hi\nOK", "hi", "hi\nwhy", "so?"]
    table = figures_of(script, ["ok", "Ok", "why?", "ja"], prompts, {"base": [2, 2, 2, 2]})
    assert table.loc["base"].to_dict() == {
        "loss": 1.0,
        "perplexity": pytest.approx(2.71828, abs=1e-5),
        "length": 2.5,
        "questions": 0.25,
        "distinct": 0.75,
        "looping": 0.0,
        "copied": 0.25,
        "most repeated": "ok",
        "its share": 0.5,
        "replies": 4,
    }
    looping = figures_of(
        script, ["sa sa sa sa", "no no no hahahaha", "boh\nboh\nboh\nboh", None], prompts, {"base": [2] * 4}
    )
    assert looping["looping"]["base"] == pytest.approx(2 / 3) and looping["looping"]["reference"] == 0
    varied = figures_of(script, ["a", "b"], ["", ""], {"base": [2, 2]})
    assert varied["most repeated"]["reference"] == "ok" and pd.isna(varied["most repeated"]["base"])
    stuck = figures_of(script, ["", ""], ["", ""], {"base": [2, 2]})
    assert stuck["most repeated"]["base"] == "(nothing)" and stuck["its share"]["base"] == 1
    texts = pd.DataFrame({"prompt": "", "reference": ["a", "b"], "base": ["c", "d"]})
    assert "its share" not in script.figures(texts, {"base": np.ones(2)}, np.ones(2))
    missing = figures_of(script, [None, None], ["", ""], {"base": [2, 2]})
    assert missing["replies"]["base"] == 0 and pd.isna(missing["its share"]["base"])


def test_gain_error_and_what_the_fused_model_keeps(script):
    table = figures_of(script, ["x"] * 2, [""] * 2, {"base": [10, 6], "adapter": [4, 4], "fused": [6, 4]})
    assert table["gain"]["adapter"] == 2.0 and table["gain"]["fused"] == 1.5
    assert table["error"]["adapter"] == pytest.approx(np.sqrt(2**2 + 2**2) / 4)
    assert table["kept"]["fused"] == 0.75


NAN = float("nan")
STUCK = {"most repeated": "lol", "its share": 0.75}


def table_of(loss, kept, style):
    """A table as figures() makes it, for these losses, every gain having an error of 0.04."""
    table = pd.DataFrame({"loss": loss}, index=["reference", *loss])
    if "base" in loss and len(loss) > 1:
        table["gain"] = (loss["base"] - table["loss"]).drop("base")
        table["error"] = 0.04
    if kept is not None:
        table.loc["fused", "kept"] = kept
    table["replies"], table["its share"], table["most repeated"], table["looping"] = 20, 0.05, "no", 0.0
    for m, figures in style.items():
        table.loc[m, list(figures)] = list(figures.values())
    return table


@pytest.mark.parametrize(
    ("loss", "kept", "style", "kind", "sentence"),
    [
        (
            {"base": 9.539, "adapter": 3.066, "fused": 3.079},
            0.998,
            {},
            "good",
            "Better than the base: loss 3.07 instead of 9.54; the fused model keeps 99.8% of it.",
        ),
        ({"base": 9.5, "fused": 3.1}, None, {}, "good", "Better than the base: loss 3.10 instead of 9.50."),
        (
            {"base": 9.539, "adapter": 3.402, "fused": 7.85},
            0.275,
            {},
            "bad",
            "Better than the base: loss 3.40 instead of 9.54; the fused model keeps 27.5% of it. "
            "Fuse again: FUSED_BITS=8 ./fuse.sh.",
        ),
        (
            {"base": 3.0, "adapter": 3.5},
            None,
            {},
            "bad",
            "Worse than the base: loss 3.50 instead of 3.00. Train with a lower learning rate, or on more data.",
        ),
        (
            {"base": 3.0, "adapter": 2.95},
            None,
            {},
            "mixed",
            "No better than the base: loss 2.95 instead of 3.00, which may be chance. Train longer, or on more data.",
        ),
        (
            {"base": 9.0, "adapter": 3.0},
            None,
            {"adapter": STUCK},
            "bad",
            "Better than the base: loss 3.00 instead of 9.00. "
            "But the adapter model repeats itself: 75% of its replies are “lol”.",
        ),
        (
            {"base": 9.0, "adapter": 3.0},
            None,
            {"adapter": {"looping": 0.4}},
            "bad",
            "Better than the base: loss 3.00 instead of 9.00. "
            "But the adapter model repeats itself: 40% of its replies say the same piece over and over.",
        ),
        # What the chat itself repeats is no collapse.
        (
            {"base": 9.0, "adapter": 3.0},
            None,
            {"adapter": STUCK, "reference": STUCK},
            "good",
            "Better than the base: loss 3.00 instead of 9.00.",
        ),
        (
            {"base": 9.0, "adapter": NAN},
            None,
            {},
            "bad",
            "Broken: a loss is not a number. Train again with a lower learning rate.",
        ),
        ({"base": 9.0}, None, {}, "mixed", "Nothing to compare: test the base model and the adapter together."),
    ],
)
def test_the_verdict(script, loss, kept, style, kind, sentence):
    assert script.verdict(table_of(loss, kept, style)) == (kind, sentence)


def test_a_loss_that_is_not_a_number_goes_through_to_the_page_and_to_valid_json(script, tmp_path):
    write_made_up(script, tmp_path, ["hi"] * 3, ["base", "adapter"], losses={"adapter": np.array([1, NAN, 1])})
    found = json.loads((tmp_path / "results/metrics.json").read_text(), parse_constant=pytest.fail)
    assert found["loss"]["adapter"] is None
    assert "Broken: a loss is not a number" in (tmp_path / "results/report.html").read_text()


def test_same_seed_same_replies_other_seed_others(project, stage_4):
    write_rows(project, [("ciao", "tutto bene"), ("che si dice?", "LULW"), ("perché?", "boh"), ("?", "ciao a tutti")])

    def replies(*args):
        assert stage_4("--models", "base", "--replies", "4", "--max-tokens", "6", *args)[0] == 0
        return (project / RESULTS / "generations.csv").read_bytes()

    one_by_one = ["--reply-batch", "1"]
    first, batched = replies(*one_by_one), replies("--reply-batch", "3")
    assert replies(*one_by_one) == first and replies("--reply-batch", "3") == batched
    assert replies(*one_by_one, "--seed", "1") != first
    assert replies(*one_by_one, "--temperature", "0") == replies("--reply-batch", "3", "--temperature", "0")


def test_one_model_in_memory_at_a_time(project):
    """What is in memory when each of three models is taken, and in the end: less than half of one."""

    class Watched(dict):
        def pop(self, name):
            held.append(mx.get_active_memory())
            return super().pop(name)

    held, script = [], load_script(project / "test_on_validation.py")
    args = script.ArgumentParser().parse_args([])
    args.temperature, args.seed, args.reply_batch, args.batch_tokens = 0.8, 0, 1, 2048
    args.models, args.version, args.model, args.max_tokens = "base,adapter,fused", "v1", "tiny-gemma-3", 2
    models = Watched(script.find_models(args, project / "data/for_train/v1/valid.jsonl")[0])
    rows = script.read_rows(project / "data/for_train/v1/valid.jsonl", models["base"][1])[:4]
    script.test_models(models, rows, rows.index[:2], args, {}, {})
    held.append(mx.get_active_memory())
    assert len(held) == 4
    assert max(held) - held[0] < (project / BASE / "model.safetensors").stat().st_size / 2


# ---- hostile text ----------------------------------------------------------------------------------------------------
def write_made_up(script, folder, texts, models, losses=None):
    """Write the three files for prompts, references and replies that no tiny model would give."""
    losses = {m: np.full(len(texts), 18.0 - 2 * i) for i, m in enumerate(models)} | (losses or {})
    frame = pd.DataFrame(
        {"prompt": [f"{t}\n{t}\n\nGo on." for t in texts], "reference": texts, **dict.fromkeys(models)}
    )
    for m in models:
        frame[m] = texts
    frame = frame.map(script.visible)
    frame.index += 1
    table = script.figures(frame, losses, np.full(len(texts), 2))
    kind, sentence = script.verdict(table)
    settings = {"version": "v1", "model": "m", "show": 50, "temperature": 0.8, "seed": 0, "max_tokens": 60}
    facts = {"kind": kind, "verdict": sentence, "warnings": ["a warning"], "rows": len(texts), "settings": settings}
    facts |= json.loads(table.to_json())
    script.write(folder / "results", script.report(facts, table, frame, folder / "no adapter"), frame, facts)
    return sentence + script.readable(table).to_string()


def readable(text):
    """Whether a terminal or a browser only shows it: no control, format or surrogate characters but the usual ones."""
    return {
        c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t\u200c\u200d\ufeff"
    } == set()


def test_visible_text_keeps_what_is_harmless(script):
    assert script.visible("perché\t🙏🏽 👩‍💻\nnuova riga") == "perché\t🙏🏽 👩‍💻\nnuova riga"
    assert script.visible("a\x1b[1m\x00\u202e\ud800") == r"a\x1b[1m\x00\u202e\ud800"
    assert script.visible("abcdef", 4) == "abcd … (2 more characters)"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("  @SUM(A1)", "  '@SUM(A1)"),
        ("-.-", "'-.-"),
        ("\t=1", " '=1"),
        ("\r=1", r"\r=1"),
        ("ciao;=1+1", "ciao;'=1+1"),
        ("ciao\n+1", "ciao\n'+1"),
        ("1 + 1 = 2, a-b", "1 + 1 = 2, a-b"),
        ("perché? 👩‍💻", "perché? 👩‍💻"),
    ],
)
def test_a_cell_is_no_formula(script, text, cell):
    assert script.defuse(text) == cell


def test_hostile_text_is_inert_in_the_spreadsheet_file_and_on_the_terminal(script, tmp_path):
    terminal = write_made_up(script, tmp_path, HOSTILE, ["base", "adapter"])
    assert readable(terminal)
    text = (tmp_path / "results/generations.csv").read_text(encoding="utf-8-sig")
    assert readable(text)
    table = list(csv.reader(io.StringIO(text)))
    assert table[0] == ["line", "prompt", "reference", "base", "adapter"]
    assert max(len(cell) for row in table for cell in row) < 32_767  # what a cell of a spreadsheet can hold
    assert [row[0] for row in table[1:]] == [str(i + 1) for i in range(len(HOSTILE))]
    # As comma-separated, and as a spreadsheet of a country that separates with ';' cuts the same file.
    for cells in (
        table,
        list(csv.reader(io.StringIO(text), delimiter=";")),
        list(csv.reader(io.StringIO(text), delimiter="\t")),
    ):
        for cell in (cell for row in cells for cell in row):
            assert not re.match(r"[=+\-@\t\r]", cell)
    assert json.loads((tmp_path / "results/metrics.json").read_text(encoding="utf-8"))["rows"] == len(HOSTILE)


def chromium(tmp_path, page, *flags):
    """Return the page's DOM as text after it was open for two seconds in a real browser."""
    names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    mac = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
    browser = next(filter(None, [*map(shutil.which, names), mac if os.path.exists(mac) else None]), None)
    if not browser:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no Chromium here: apt install chromium, or install Chrome"
        )
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync --virtual-time-budget=2000 --dump-dom"
    profile = f"--user-data-dir={tmp_path / 'browser'}"
    done = subprocess.run([browser, *quiet.split(), profile, *flags, page], capture_output=True, timeout=60)
    return done.stdout.decode()


def test_nothing_runs_in_the_browser_and_nothing_is_fetched(script, tmp_path):
    asked_for = []

    class Server(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked_for.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    fetches = [f"<img src={here}/a><link rel=stylesheet href={here}/b>", f"<style>@import '{here}/c'</style>"]
    texts = HOSTILE + fetches
    write_made_up(script, tmp_path, texts, ["base", "adapter"])
    # The same texts in a page that does not take care do run and do fetch, so this test can fail.
    (tmp_path / "careless.html").write_text("<title>v1</title>" + HOSTILE[0] + fetches[0], encoding="utf-8")
    careless = chromium(tmp_path, f"{here}/careless.html")
    assert "<title>owned</title>" in careless and "/a" in asked_for
    asked_for.clear()
    dom = chromium(tmp_path, f"{here}/results/report.html")
    server.shutdown()
    assert asked_for[0] == "/results/report.html" and set(asked_for[1:]) <= {"/favicon.ico"}
    assert "<title>v1 · m</title>" in dom
    assert (
        re.findall(r"<(?:script|img|iframe|link|object|embed|base|form|a)\b|\son\w+=", re.sub(r">[^<]*<", "><", dom))
        == []
    )
    assert dom.count("<dl>") == len(texts) and dom.count("<svg ") == 1
    assert "1337" not in dom and "{{ 7 * 191 }}" in dom  # no template in a text is filled in
    assert readable(dom) and len(dom) < 300_000


def test_the_page_fits_a_phone(script, tmp_path):
    texts = [t.replace("\ud800", "").replace("\udfff", "") for t in HOSTILE]
    write_made_up(script, tmp_path, texts, ["base", "adapter", "fused"])
    (tmp_path / "phone.html").write_text(
        '<iframe src="results/report.html" style="width:390px;height:800px;border:0" onload="document.title ='
        " 'wide ' + this.contentDocument.documentElement.scrollWidth\"></iframe>"
    )
    dom = chromium(tmp_path, f"file://{tmp_path}/phone.html", "--allow-file-access-from-files")
    assert int(re.search(r"<title>wide (\d+)</title>", dom)[1]) <= 390


def test_hostile_chat_goes_through_the_whole_chain(project, run):
    raw = [
        {"previous_messages": [f"ciao {i}", f"{t} {i}", f"{t} {i * i}", f"che si dice, {i}?"], "message": f"{i} {t}"}
        for i, t in enumerate(HOSTILE * 4)
    ]
    (project / "data/raw/messages_v1.json").write_text(json.dumps(raw), encoding="utf-8")
    assert run(project, "build_train.py", "--valid-rows", "12").returncode == 0
    # On a terminal, where escapes would work.
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    args = ["--models", "base", "--replies", "6", "--max-tokens", "60"]
    child = run(project, "test_on_validation.py", *args, start=subprocess.Popen, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 65536):
            shown += part
    except OSError:  # Linux: the other end was closed
        pass
    assert child.wait(60) == 0
    shown = shown.decode()
    assert re.search(r"base +replies: +\d+%.*\d\d:\d\d<\d\d:\d\d", shown)  # the bar, with the time left
    assert readable(re.sub(r"\r|\x1b\[A", "", shown))  # tqdm moves with these two
    assert readable((project / RESULTS / "report.html").read_text(encoding="utf-8"))


# ---- cut short -------------------------------------------------------------------------------------------------------
def start_and_wait_for(project, run, text, *args):
    """Start the script and return its process as soon as it has written `text`."""
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "encoding": "utf-8"}
    process = run(project, "test_on_validation.py", *args, start=subprocess.Popen, env={"PYTHONUNBUFFERED": "1"}, **out)
    for line in process.stdout:
        if text in line:
            return process
    raise AssertionError(f"{text!r} was never written")


def slow(project):
    """Make the validation set four times as long, so that a signal comes in the middle."""
    valid = project / "data/for_train/v1/valid.jsonl"
    valid.write_bytes(valid.read_bytes() * 4)


def test_ctrl_c_reports_what_is_done(project, run):
    slow(project)
    process = start_and_wait_for(
        project, run, "base    replies 2/2", "--replies", "2", "--reply-batch", "1", "--max-tokens", "4"
    )
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in out) == (130, False)
    assert set(metrics(project)["loss"]) == {"reference", "base"}
    assert "stopped with Ctrl-C" in (project / RESULTS / "report.html").read_text(encoding="utf-8")
    assert "Nothing to compare" in out and "warning: stopped with Ctrl-C" in out


@pytest.mark.parametrize(("kill", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_stopped_before_a_loss_or_killed_leaves_the_previous_report(project, run, kill, code):
    slow(project)
    (project / RESULTS).mkdir(parents=True)
    (project / RESULTS / "report.html").write_text("previous")
    process = start_and_wait_for(project, run, "testing base, adapter, fused on 96 rows")
    process.send_signal(kill)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in out) == (code, False)
    assert contents(project / RESULTS) == {"report.html": b"previous"}
    assert not (project / f"{RESULTS}.partial").exists()


@pytest.mark.parametrize(
    ("folders", "left"),
    [
        ({"r.old": "older", "r.partial": "newer"}, "newer"),  # killed between the two renames: the new one was whole
        ({"r.old": "older"}, "older"),
        ({"r": "newer", "r.old": "older"}, "newer"),  # killed before the old one was gone
        ({"r": "older", "r.partial": "half"}, "older"),  # killed while writing
    ],
)
def test_a_swap_that_was_cut_short_is_finished_or_undone(script, tmp_path, folders, left):
    for name, text in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.html").write_text(text)
    script.clean_up(tmp_path / "r")
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    assert (tmp_path / "r/report.html").read_text() == left


# ---- what is missing or wrong ----------------------------------------------------------------------------------------
def test_without_a_fused_model_base_and_adapter_are_compared(project, stage_4):
    shutil.rmtree(project / FUSED)
    code, out, err = stage_4("--replies", "0")
    assert code == 0 and "there is no fused model to test; to make it: VERSION=v1 MODEL=tiny-gemma-3 ./fuse.sh" in err
    assert set(metrics(project)["loss"]) == {"reference", "base", "adapter"} and "than the base" in out
    assert "there is no fused model" in (project / RESULTS / "report.html").read_text(encoding="utf-8")


def test_only_the_models_asked_for_are_tested_and_needed(project, stage_4):
    shutil.rmtree(project / ADAPTER)
    assert stage_4("--models", "base,fused", "--replies", "0")[0] == 0
    assert set(metrics(project)["loss"]) == {"reference", "base", "fused"}


def test_it_warns_of_a_fused_model_of_another_adapter_and_of_other_validation_rows(project, stage_4):
    code, _, err = stage_4("--replies", "0")
    assert code == 0 and "warning" not in err
    weights = dict(mx.load(str(project / ADAPTER / "adapters.safetensors")))
    name = next(iter(weights))
    mx.save_safetensors(str(project / ADAPTER / "adapters.safetensors"), weights | {name: weights[name] + 1e-3})
    write_rows(project, [("ciao", "tutto bene")] * 3)
    code, _, err = stage_4("--replies", "0")
    assert code == 0 and "warning: the fused model was made from another adapter than the one there now" in err
    assert "warning: valid.jsonl is not the one of the training" in err
    assert len(metrics(project)["warnings"]) == 2


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "args", "error"),
    [
        (
            lambda p: (p / "data/for_train/v1/valid.jsonl").unlink(),
            [],
            "data/for_train/v1/valid.jsonl is not there. FIX: VERSION=v1 python build_train.py",
        ),
        (
            lambda p: shutil.rmtree(p / BASE),
            [],
            "models/base/tiny-gemma-3 is not there. "
            "FIX: hf download mlx-community/tiny-gemma-3 --local-dir models/base/tiny-gemma-3",
        ),
        (
            lambda p: cut_off(p / BASE / "model.safetensors"),
            [],
            "incomplete download or corrupt file?. "
            "FIX: hf download mlx-community/tiny-gemma-3 --local-dir models/base/tiny-gemma-3",
        ),
        (
            lambda p: cut_off(p / BASE / "tokenizer.json"),
            [],
            ". FIX: hf download mlx-community/tiny-gemma-3 --local-dir models/base/tiny-gemma-3",
        ),
        (
            lambda p: shutil.rmtree(p / ADAPTER),
            [],
            "models/adapters/adapter-v1_tiny-gemma-3 is not there. "
            "FIX: VERSION=v1 MODEL=tiny-gemma-3 ./fine_tune.sh, or test the base model alone: --models base",
        ),
        (
            lambda p: cut_off(p / ADAPTER / "adapters.safetensors"),
            [],
            "FIX: VERSION=v1 MODEL=tiny-gemma-3 ./fine_tune.sh, or test the base model alone: --models base",
        ),
        (
            lambda p: shutil.rmtree(p / FUSED),
            ["--models", "base,fused"],
            "models/fused/fused-v1_tiny-gemma-3 is not there. FIX: VERSION=v1 MODEL=tiny-gemma-3 ./fuse.sh",
        ),
        (lambda p: write_rows(p, []), [], "data/for_train/v1/valid.jsonl is empty. FIX: python build_train.py"),
        (
            lambda p: (p / "data/for_train/v1/valid.jsonl").write_text(
                '{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n'
            ),
            [],
            'data/for_train/v1/valid.jsonl line 2 is not {"prompt": text, "completion": text} in UTF-8. '
            "FIX: python build_train.py",
        ),
        (
            lambda p: write_rows(p, [("a", 7)]),
            [],
            'data/for_train/v1/valid.jsonl line 1 is not {"prompt": text, "completion": text} in UTF-8. '
            "FIX: python build_train.py",
        ),
        (
            lambda p: write_rows(p, [("a", "\ud800")]),
            [],
            'data/for_train/v1/valid.jsonl line 1 is not {"prompt": text, "completion": text} in UTF-8. '
            "FIX: python build_train.py",
        ),
        (
            lambda p: None,
            ["--model", "mlx-community/gemma-3-text-27b-it-4bit"],
            "VERSION or MODEL is 'mlx-community/gemma-3-text-27b-it-4bit', which is not the name of a folder. "
            "FIX: hf download mlx-community/gemma-3-text-27b-it-4bit --local-dir models/base/gemma-3-text-27b-it-4bit; "
            "MODEL=gemma-3-text-27b-it-4bit python test_on_validation.py",
        ),
        *(
            (
                lambda p: None,
                ["--model", path],
                f"VERSION or MODEL is '{path}', which is not the name of a folder. "
                "FIX: MODEL=tiny-gemma-3 python test_on_validation.py",
            )
            for path in ("models/base/tiny-gemma-3/", "./models/base/tiny-gemma-3", "/x/tiny-gemma-3")
        ),
        (
            lambda p: None,
            ["--version", ".."],
            "VERSION or MODEL is '..', which is not the name of a folder. "
            "FIX: use letters, digits, '.', '_' and '-' alone",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_said_before_a_model_loads_with_the_way_out(project, stage_4, damage, args, error):
    damage(project)
    code, out, err = stage_4(*args)
    assert code == 1 and err.splitlines()[-1].startswith("error: ") and err.splitlines()[-1].endswith(error)
    assert out == "" and not (project / RESULTS).exists()


@pytest.mark.parametrize(
    "args", [["--nonsense"], ["--models", "base,all"], ["--temperature", "3"], ["--replies", "-1"]]
)
def test_wrong_usage(stage_4, args):
    code, _, err = stage_4(*args)
    assert (
        code == 2 and err.splitlines()[-1].startswith("error: ") and "FIX: python test_on_validation.py --help" in err
    )


def test_a_python_that_is_too_old_can_still_read_the_script_and_say_so():
    with open(os.path.join(REPOSITORY, "test_on_validation.py"), encoding="utf-8") as file:
        tree = ast.parse(file.read(), feature_version=(3, 9))
    kinds = [type(node).__name__ for node in tree.body[:4]]
    assert kinds == ["Expr", "ImportFrom", "Import", "If"]  # docstring, annotations, sys, the check
