"""data/report.py and report.html: a page that shows all, runs nothing, and fits a phone."""

from data import report
from models import figures, verdict
from test_on_validation import Row

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

HTML = Path(report.__file__).with_suffix(".html").read_text("utf-8")
OWNED = "document.title='owned'"
HOSTILE = [
    f"<script>{OWNED}</script>",
    f'</textarea></title></style><img src=x onerror="{OWNED}"><svg onload="{OWNED}">',
    f'<iframe srcdoc="<script>parent.{OWNED}</script>"></iframe>',
    "<meta http-equiv=refresh content=0>",
    "{{ 7 * 191 }}{% raw %} ]]> --> &lt;b&gt; $x^2$ \\frac",
    "\x1b[31mred\x1b]0;owned\x07\x1b[2J\x9b1m",
    "\u202eright to left\u2066 and \u200f over",
    "nul \x00 backspace \x08\x08\x08 delete \x7f, lone \ud800 surrogate \udfff",
    "Z" + "\u0351\u036b\u0353\u036a\u0302\u034f\u0334" * 50,
    "W" * 3_000,
]


def page_of(folder, texts, talk=(), **forms):
    """Return the page of rows whose context and true reply are these texts.

    A model replies in its form: fused="{}!" adds an exclamation mark to each true reply.
    """
    rows = [
        Row(line, [("ann", text), ("bob", text)], [0, 1, 2], 0) for line, text in enumerate(texts)
    ]
    table = defaultdict(dict)
    nats = {who: np.full(len(rows), 18.0 - 2 * place) for place, who in enumerate(forms)}
    figures.add_losses(table, nats, np.full(len(rows), 3))
    said = {"reference": {row.line: row.reply() for row in rows}}
    for who, form in forms.items():
        said[who] = {line: form.format(text) for line, text in said["reference"].items()}
    for who in said:
        figures.add_style(table, who, [*said[who].values()])
        table["unfinished"][who] = 0.0
    facts = {"name": "bob", "author": "bob", "judged": [*forms][-1], "rows": 60}
    facts |= {"learned": {"rows": 9, "messages": 90}, "run": "VERSION=v1", "data": {"window": 10}}
    facts |= {"settings": {"version": "v1", "model": "m", "seed": 0, "replies": 100}}
    facts |= {"training": {"RANK": "8", "ITERS": "400", "LEARNING_RATE": "1e-4"}}
    facts |= {"curve": [(0, 9.5), (200, 3.1), (400, 3.2)]}
    facts |= {"valid_sha256": "abc", "trained": "", "tested": "29 November 2026"}
    facts |= {"warnings": [("a <b>warning</b>", "a command")]}
    facts["verdict"] = verdict.verdict(table, facts)
    return report.render(facts, table, rows, [rows[place] for place in talk], said, folder / "v1_m")


# ---- what it shows -------------------------------------------------------------------------------
def test_a_learning_curve_has_axes_and_of_two_points_there_is_none():
    chart = report.chart([(0, 9.0), (200, 3.0), (400, 4.0)])
    assert chart["points"] == "40.0,10.0 225.0,130.0 410.0,110.0"
    assert chart["x"] == [(40, 0), (225, 200), (410, 400)]
    assert chart["y"] == [(10, 9.0), (70, 6.0), (130, 3.0)]
    assert chart["best"] == ((225, 130), (200, 3.0))
    assert report.chart([(0, 9.0), (200, 3.0)]) == {}


def test_a_talk_shows_what_was_said_since_the_turn_before():
    first = [("ann", "hi"), ("bob", "yes")]
    second = [*first, ("cy", "and me"), ("ann", "go?"), ("bob", "go")]
    talk = [Row(1, first, [], 0), Row(2, second, [], 0)]
    said = {"reference": {1: "yes", 2: "go"}, "base": {1: "no", 2: "stay"}}
    turns = report.turns_of(talk, said, {"judged": "base"})
    assert [turn["before"] for turn in turns] == [
        [("ann", "hi")],
        [("cy", "and me"), ("ann", "go?")],
    ]
    assert [(turn["reply"], turn["real"]) for turn in turns] == [("no", "yes"), ("stay", "go")]


def test_the_blind_test_hides_which_reply_is_real_and_mixes_them(tmp_path):
    page = page_of(tmp_path, [f"ciao {n}" for n in range(25)], base="{}", adapter="{}!")
    cards = re.findall(r'<article class="turn panel.*?</article>', page, re.DOTALL)
    first = []
    for card in cards:
        replies = re.findall(
            r'<label class="pick bubble( real)?">.*?said">(ciao \d+!?)<', card, re.DOTALL
        )
        [real] = [text for is_real, text in replies if is_real]
        [made] = [text for is_real, text in replies if not is_real]
        assert made == f"{real}!"
        assert card.count('class="answer') == 2
        first.append(replies[0][1] == real)
    assert len(cards) == 20
    assert 4 < sum(first) < 16
    assert "Half of 20 is guessing; 15 or more right means" in " ".join(page.split())


def test_equal_replies_are_no_blind_test(tmp_path):
    assert "Can you tell?" not in page_of(tmp_path, ["ciao", "boh"], base="{}!", adapter="{}")


def test_other_runs_on_the_same_rows_stand_beside_this_one(tmp_path):
    run = {"valid_sha256": "abc", "judged": "fused", "loss": {"fused": 2.5}}
    run |= {"training": {"RANK": "32"}}
    run |= {"settings": {"version": "v1", "model": "n", "replies": 100, "seed": 0}}
    run |= {"told apart": {"fused": 0.6}, "told apart error": {"fused": 0.05}}
    run |= {"pairs": {"fused": 80}}
    fewer = run | {"pairs": {"fused": 40}}
    others = {"v1_n": run, "v1_few": fewer, "v1_m.before": run}
    others["v2_m"] = run | {"valid_sha256": "other"}
    for name, metrics in others.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    facts = {"valid_sha256": "abc", "judged": "adapter", "training": {"RANK": "8"}}
    facts |= {"settings": {"version": "v1", "model": "m", "replies": 100, "seed": 0}}
    table = {"loss": {"adapter": 2.75}, "pairs": {"adapter": 80}}
    table |= {"told apart": {"adapter": 0.7}, "told apart error": {"adapter": 0.05}}
    this, few, other = report.compare(report.read_runs(tmp_path / "v1_m", facts, table))
    assert this == {
        "name": "this one", "judged": "adapter", "loss": "2.750", "taken for real": "30% ± 5%",
        "differs": "RANK=8, model=m",
    }  # fmt: skip
    assert other["name"] == "v1_n"
    assert other["differs"] == "RANK=32, model=n"
    assert "taken for real" not in few  # of another number of replies it tells nothing


def test_the_instruction_is_no_part_of_the_page_and_speakers_are_named(tmp_path):
    page = page_of(tmp_path, ["ciao"], talk=[0], base="{}!")
    assert "<b>ann</b> ciao" in page
    assert re.search(r'<b class="reference">bob</b><p class="said">ciao</p>', page)


# ---- how it looks --------------------------------------------------------------------------------
def brightness(colour):
    """Return the relative luminance of #rrggbb (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_all_text_of_the_page_has_contrast(mode):
    found = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", HTML)
    colours = {name: brightness(both[mode]) for name, *both in found}
    grounds = colours.pop("paper"), colours.pop("card")
    del colours["line"]
    assert {"ink", "soft", "base", "adapter", "fused", "good", "near", "bad"} == set(colours)
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
def test_nothing_of_the_page_runs_or_is_fetched_and_it_fits_a_phone(tmp_path, server):
    here, asked_for = server
    fetch = f"<img src={here}/a><style>@import '{here}/c'</style>"
    forms = {"base": "{}", "adapter": "{}", "fused": "{}!"}
    page = page_of(tmp_path, [fetch, *HOSTILE * 2], talk=range(11), **forms)
    (tmp_path / "report.html").write_text(page, "utf-8")

    # The same texts in a page that does not take care do run and do fetch, so this test can fail.
    (tmp_path / "careless.html").write_text("<title>v1</title>" + HOSTILE[0] + fetch)
    assert "<title>owned</title>" in chromium(tmp_path, f"{here}/careless.html")
    assert "/a" in asked_for

    asked_for.clear()
    dom = chromium(tmp_path, f"{here}/report.html")
    assert {*asked_for} - {"/favicon.ico"} == {"/report.html"}
    assert "<title>v1 · m</title>" in dom
    tags = re.sub(r">[^<]*<", "><", dom)
    assert (
        re.findall(r"<(?:script|img|iframe|link|object|embed|base|form|a)\b|\son\w+=", tags) == []
    )
    assert "{{ 7 * 191 }}" in dom  # no template in a text is filled in
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200f\u202a-\u202e\u2066-\u2069]", dom)

    size = "document.title = 'wide ' + this.contentDocument.documentElement.scrollWidth"
    frame = f'<iframe src="report.html" width=390 height=800 onload="{size}"></iframe>'
    (tmp_path / "phone.html").write_text(frame)
    phone = chromium(tmp_path, f"{here}/phone.html")
    assert int(re.search(r"<title>wide (\d+)</title>", phone)[1]) <= 390


@pytest.mark.slow
def test_a_choice_in_the_blind_test_is_counted_and_shows_the_answer(tmp_path, server):
    page = page_of(tmp_path, ["ciao", "boh", "ehi"], base="{}!")
    choose = """<script>onload = () => {
        document.querySelector("input.right").click()
        document.querySelectorAll("article:last-of-type input:not(.right)")[0].click()
        let shown = [...document.querySelectorAll(".answer")].filter(e => e.checkVisibility())
        let counted = e => getComputedStyle(e).counterIncrement
        document.title = [shown.length, ...[...document.querySelectorAll(":checked")].map(counted)]
    }</script>"""
    unlocked = page.replace("default-src 'none';", "script-src 'unsafe-inline';")
    (tmp_path / "report.html").write_text(unlocked + choose, "utf-8")
    dom = chromium(tmp_path, f"{server[0]}/report.html")
    assert "<title>4,chosen 1 right 1,chosen 1</title>" in dom
