"""What the page of test_on_validation.py shows; data/report.html is its template, for jinja2."""

from models.common import visible
from models.verdict import chance, far_figures, passing, shown

import json
import math
import random
from datetime import datetime
from pathlib import Path

import jinja2
import pandas as pd

BLIND = 20  # rows of the blind test
LABELS = {"base": "base model", "adapter": "adapter", "fused": "fused model"}


# ---- how it was trained --------------------------------------------------------------------------
def date_of(path):
    """Return when a file was written, as "29 November 2026"; "" if there is none."""
    return f"{datetime.fromtimestamp(path.stat().st_mtime):%-d %B %Y}" if path.exists() else ""


def learning_curve(path):
    """Return [(iteration, loss), …] of losses.csv; [] if it is not as it should be: an ornament."""
    try:
        curve = pd.read_csv(path)[["iteration", "val_loss"]].dropna()
        return [(int(iteration), float(loss)) for iteration, loss in curve.to_numpy()]
    except (OSError, ValueError, KeyError):
        return []


# ---- the bars under each question, and the curve -------------------------------------------------
def bars(table, facts):
    """Return the bars of both answers, [[(label, model, share of the width, text), …], […]]."""
    chances = {who: math.exp(-loss) for who, loss in table["loss"].items() if loss >= 0}
    widest = max(chances.values(), default=1)
    learned = [
        (LABELS[who], who, share / widest, chance(table["loss"][who]))
        for who, share in chances.items()
    ]
    labels = {"somebody else": "somebody else"} | LABELS | {"reference": facts["name"]}
    shares = {who: passing(table, who) for who in table["told apart"]}
    sounds = [
        (label, who, min(1, 2 * shares[who]), f"{shares[who]:.0%}")
        for who, label in labels.items()
        if who in shares
    ]
    return [learned, sounds]


def chart(curve):
    """Return where the template draws a curve; {} if that is no more than a straight line.

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
def last_of(messages, most, of_all=300):
    """Return the last messages before a reply, as many as `most`, each harmless and not long."""
    texts = [(visible(name), visible(text)) for name, text in messages[:-1][-most:]]
    return [(name, text if len(text) <= of_all else f"{text[:of_all]}…") for name, text in texts]


def turns_of(talk, said, facts):
    """Return the sample talk, [{"before": [(name, text), …], "real": …, "reply": …}, …].

    "before" is what stands in the chat since the reply of the turn before, three messages at most.
    """
    turns, earlier = [], None
    for row in talk:
        seen = [i for i in range(len(row.messages)) if row.messages[i - 2 : i] == earlier]
        turns.append(
            {
                "author": visible(row.messages[-1][0]),
                "before": last_of(row.messages[max(seen, default=0) :], 3),
                "real": said["reference"][row.line],
                "reply": said[facts["judged"]][row.line],
            }
        )
        earlier = row.messages[-2:]
    return turns


def blind_cards(asked, said, facts):
    r"""Return what the page shows of the rows in which the judged model said something else.

    {"before": [("ann", "hi")], "pair": [("yo", True), ("hello", False)]}: the first one is real
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
def cells(table):
    """Return {name: {who: text}} of the figures that someone has."""
    everyone = ["reference", *table["loss"]]
    left_out = {"told apart", "longest by heart", "long replies"}
    told, errors = table["told apart"], table["told apart error"]
    table = table | {
        "taken for real": {who: 1 - share for who, share in told.items()},
        "taken for real error": errors,
    }
    return {
        name: {who: shown(table, name, who) for who in everyone}
        for name in list(table)
        if name not in left_out and not name.endswith("error") and any(table[name].values())
    }


def read_runs(final, facts, table):
    """Return {name: metrics} of this run and of all reports on the same validation rows."""
    runs = {"this one": facts | table}
    for file in sorted(final.parent.glob("[!.]*/metrics.json")):
        try:
            run = json.loads(file.read_bytes())
            is_same = run["valid_sha256"] == facts["valid_sha256"] and run["judged"] in run["loss"]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # of an older form, or broken
        if is_same and file.parent.name != f"{final.name}.before":  # that one goes now
            runs["the one before" if file.parent == final else file.parent.name] = run
    return runs


def pairs_of(run):
    """Return how many pairs of replies of a run were judged: more teach the classifier more."""
    return run.get("pairs", {}).get(run["judged"])


def compare(runs):
    """Return the runs as a table, [] if there is but one.

    [{"name": "this one", "loss": "3.07", "taken for real": "37% ± 6%", "differs": "RANK=8"}, …]
    """
    settings = {name: run["training"] | run["settings"] for name, run in runs.items()}
    differing = [
        key
        for key in sorted({key for each in settings.values() for key in each} - {"version"})
        if len({str(each.get(key, "")) for each in settings.values()}) > 1
    ]
    count = pairs_of(runs["this one"])
    table = []
    for name, run in runs.items():
        row = {"name": name, "judged": run["judged"], "loss": f"{run['loss'][run['judged']]:.3f}"}
        told = run.get("told apart", {}).get(run["judged"])
        if told is not None and pairs_of(run) == count:  # else it tells nothing
            error = run["told apart error"][run["judged"]]
            row["taken for real"] = f"{1 - told:.0%} ± {error:.0%}"
        values = settings[name]
        row["differs"] = ", ".join(f"{key}={values.get(key, '')}" for key in differing)
        table.append(row)
    return table if len(table) > 1 else []


# ---- the page ------------------------------------------------------------------------------------
def render(facts, table, asked, talk, said, final):
    """Return the page. The text of the chat is escaped by jinja2."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(
        loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html")
    judged = facts["judged"]
    has_replies = judged and asked
    blind = blind_cards(asked, said, facts) if has_replies else []
    return page.render(
        facts,
        bars=bars(table, facts),
        chart=chart(facts["curve"]),
        cells=cells(table),
        far={who: far_figures(table, who) for who in table["replies"] if who != "reference"},
        longest=visible(table["longest by heart"].get(judged, "")),
        talk=turns_of(talk, said, facts) if has_replies else [],
        blind=blind,
        sure=math.ceil(len(blind) / 2 + math.sqrt(len(blind))),  # two standard errors over half
        runs=compare(read_runs(final, facts, table)),
        labels=LABELS,
    )
