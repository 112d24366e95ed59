"""What the page of test_on_validation.py shows; data/report.html is its template, for jinja2."""

from models.common import visible
from models.figures import LABELS, STYLE
from models.verdict import far_figures

import json
import math
import random
from datetime import datetime
from pathlib import Path

import jinja2
import pandas as pd

BLIND = 20  # rows of the blind test
FIGURES = "loss", "gain", "kept", "length", "unfinished", *STYLE, "missing words", "by heart"


# ---- how it was trained --------------------------------------------------------------------------
def date_of(path):
    """Return when a file was written, as "29 November 2026"; "" if there is none."""
    return f"{datetime.fromtimestamp(path.stat().st_mtime):%-d %B %Y}" if path.exists() else ""


def learning_curve(path):
    """Return [(iteration, loss), …] of losses.csv; [] if PEFT has trained the adapter."""
    if not path.exists():
        return []
    losses = pd.read_csv(path, index_col="iteration")["val_loss"].dropna()
    return list(losses.items())


def chart(curve):
    """Return where the template draws a curve; {} if it has too few points.

    [(0, 9.5), (200, 3.1), (400, 3.0)] → {"points": "40,10 225,128 410,130", "x": [(40, 0), …], …}
    """
    if len(curve) < 3:
        return {}
    losses = [loss for _, loss in curve]
    low, high = min(losses), max(losses)
    places = [
        (40 + 370 * iteration / curve[-1][0], 10 + 120 * (high - loss) / (high - low or 1))
        for iteration, loss in curve
    ]
    step = math.ceil((len(curve) - 1) / 4)
    best = min(range(1, len(curve)), key=losses.__getitem__)
    return {
        "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in places),
        "x": [(places[i][0], curve[i][0]) for i in range(0, len(curve), step)],
        "y": [(10, high), (70, (high + low) / 2), (130, low)],
        "best": (places[best], curve[best]),
    }


# ---- the chat ------------------------------------------------------------------------------------
def last_of(messages, most):
    """Return the messages before a reply, the last ones, each of 300 characters at most."""
    texts = [(visible(name), visible(text)) for name, text in messages[:-1][-most:]]
    return [(name, text if len(text) <= 300 else f"{text[:300]}…") for name, text in texts]


def turns_of(talk, said, facts):
    """Return the sample talk, [{"before": [(name, text), …], "real": …, "reply": …}, …].

    "before" is what stands in the chat since the reply of the turn before, three messages at most.
    """
    turns, earlier = [], None
    for row in talk:
        seen = [i for i in range(2, len(row.messages)) if row.messages[i - 2 : i] == earlier]
        turn = {"before": last_of(row.messages[max(seen, default=0) :], 3)}
        turn["author"] = visible(row.messages[-1][0])
        turn["real"] = said["reference"][row.line]
        turn["reply"] = said[facts["judged"]][row.line]
        turns.append(turn)
        earlier = row.messages[-2:]
    return turns


def blind_cards(asked, said, facts):
    """Return the blind test: rows in which the judged model did not say what was really said.

    [{"before": [("ann", "hi")], "pair": [("yo", True), ("hello", False)]}]: the first is real
    """
    coin = random.Random(f"{facts['settings']['seed']} {said}")  # noqa: S311 (it is no secret)
    cards = []
    for row in asked:
        real, reply = said["reference"][row.line], said[facts["judged"]][row.line]
        if reply not in ("", real) and real:
            pair = [(real, True), (reply, False)]
            coin.shuffle(pair)
            cards.append({"before": last_of(row.messages, 4), "pair": pair})
    return cards[:BLIND]


# ---- tables --------------------------------------------------------------------------------------
def shown(table, name, who):
    """Return a figure as text: "3.07", "0.88 ± 0.07", "34%"; "" if there is none."""
    value = table[name].get(who, "")
    if not isinstance(value, float):
        return value
    if name == "length":
        return f"{value:.0f}"
    if name == "gain":
        return f"{value:.2f} ± {table['gain error'][who]:.2f}"
    return f"{value:.2f}" if name == "loss" else f"{value:.0%}"


def cells(table):
    """Return {name: {who: text}} of the figures that there are."""
    everyone = ["reference", *table["loss"]]
    names = [name for name in FIGURES if any(table[name].values())]
    return {name: {who: shown(table, name, who) for who in everyone} for name in names}


def read_runs(final, facts, table):
    """Return {name: metrics} of this run and of all reports on the same validation rows."""
    runs = {"this one": facts | table}
    for file in sorted(final.parent.glob("[!.]*/metrics.json")):
        try:
            run = json.loads(file.read_bytes())
            is_same = run["valid_sha256"] == facts["valid_sha256"] and run["judged"] in run["loss"]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # of an older form, or broken
        if is_same and file.parent.suffix != ".before":
            runs["the one before" if file.parent == final else file.parent.name] = run
    return runs


def compare(runs):
    """Return the runs as a table, [] if there is but one.

    [{"name": "this one", "loss": "3.067", "taken for real": "37% ± 6%", "differs": "RANK=8"}, …]
    """
    settings = {name: run["training"] | run["settings"] for name, run in runs.items()}
    differing = []
    for key in sorted(set().union(*settings.values()) - {"version"}):
        if len({str(each.get(key, "")) for each in settings.values()}) > 1:
            differing.append(key)
    this, table = runs["this one"], []
    count = this.get("pairs", {}).get(this["judged"])
    for name, run in runs.items():
        who = run["judged"]
        row = {"name": name, "judged": who, "loss": f"{run['loss'][who]:.3f}"}
        row["differs"] = ", ".join(f"{key}={settings[name].get(key, '')}" for key in differing)
        if count and run.get("pairs", {}).get(who) == count:  # more teach the classifier more
            told, error = run["told apart"][who], run["told apart error"][who]
            row["taken for real"] = f"{1 - told:.0%} ± {error:.0%}"
        table.append(row)
    return table if len(table) > 1 else []


# ---- the page ------------------------------------------------------------------------------------
def render(facts, table, asked, talk, said, final):
    """Return the page. The text of the chat is escaped by jinja2."""
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=here, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = pages.get_template("report.html")
    judged = facts["judged"]
    blind = blind_cards(asked, said, facts)
    return page.render(
        facts,
        chart=chart(facts["curve"]),
        cells=cells(table),
        far={who: far_figures(table, who) for who in table["replies"] if who != "reference"},
        longest=visible(table["longest by heart"].get(judged, "")),
        talk=turns_of(talk, said, facts),
        blind=blind,
        sure=math.ceil(len(blind) / 2 + math.sqrt(len(blind))),  # two standard errors over half
        runs=compare(read_runs(final, facts, table)),
        labels=LABELS,
    )
