"""Figures → sentences: two questions, each with a word, a figure and what it means; what to do.

    Did it learn?             yes      10%   The chance that it gives, on average, to each next …
    Does it sound like Ann?   nearly   37%   How often a classifier, shown a real reply and the …

The headline follows the worse of the two. test_on_validation.py prints them, and they head its
page; models/figures.py has the table of figures that they come from.
"""

from models.figures import STYLE

import math
import shlex
import textwrap

FEW = 30  # fewer rows are too few to be sure of a loss
CLOSE = 0.1  # told apart so much more often than the person's own replies: as good as they
PHRASES = {  # what the replies do that a figure of style counts
    "unfinished": "break off before they end",
    "question": "ask something",
    "emoji": "have an emoji",
    "capital first": "begin with a capital letter",
    "full stop last": "end with a full stop",
    "several lines": "have several lines",
    "looping": "say the same again and again",
}


# ---- figures as text -----------------------------------------------------------------------------
def shown(table, name, who):
    """Return a figure as text: "3.07", "0.88 ± 0.07", "84% ± 4%", "34%", of a few "2 of 7".

    It has as many digits as its error leaves: 0.05 two, 0.3 one, 12 none after the point.
    """
    value = table[name].get(who, "")
    error = table.get(f"{name} error", {}).get(who)
    if not isinstance(value, float):
        return str(value)
    if name == "length":
        return f"{value:,.0f}"
    if name in ("loss", "gain"):
        least = min(table["gain error"].values(), default=error)  # they are to be compared
        places = max(0, -math.floor(math.log10(least))) if least > 0 else 2
        text = f"{value:.{places}f}"
        return text if name == "loss" else f"{text} ± {error:.{places}f}"
    if error is not None:
        return f"{value:.0%} ± {error:.0%}"
    count = table["replies"].get(who, FEW)
    return f"{value:.0%}" if count >= FEW else f"{value * count:.0f} of {count}"


def chance(loss):
    """Return how likely a model finds a token, on average: a loss of 2.3 is "10%", 6 "0.25%"."""
    return f"{float(f'{100 * math.exp(-loss):.2g}'):g}%"


# ---- did it learn? -------------------------------------------------------------------------------
def learned(table, facts):
    """Return the answer of the losses, of the first trained model beside the base."""
    answer = {"question": "Did it learn?", "word": "unsure", "figure": "", "more": []}
    if is_broken(table):
        return answer | {"word": "no", "means": "A loss is not a number: the training went wrong."}
    if not table["gain"]:
        return answer | {"means": "To tell, test the base model and a trained one together."}
    who = next(iter(table["gain"]))
    gain, error = table["gain"][who], table["gain error"][who]
    new, old = (shown(table, "loss", model) for model in (who, "base"))
    answer["figure"] = chance(table["loss"][who])
    answer["means"] = (
        "The chance that it gives, on average, to each next token (a word or a piece of one) of "
        f"{facts['rows']} real replies that it never saw. The base model gives "
        f"{chance(table['loss']['base'])}. As a loss: {new} instead of {old}."
    )
    if facts["rows"] < FEW:
        answer["more"] = [f"That is too few replies to be sure; {FEW} would do."]
    elif gain > 2 * error:
        answer["word"] = "yes"
    else:
        answer["word"] = "no"
        answer["more"] = [] if gain < -2 * error else ["The difference may be chance."]
    if table["kept"]:
        kept = f"The fused model keeps {table['kept']['fused']:.0%} of what the adapter learned."
        answer["more"].append(kept)
    return answer


def is_broken(table):
    """Say whether a loss is not a number."""
    return not all(map(math.isfinite, table["loss"].values()))


# ---- does it sound like them? --------------------------------------------------------------------
def sounds(table, facts):
    """Return the answer of the replies of the judged model."""
    who = facts["judged"]
    answer = {"question": f"Does it sound like {facts['name']}?", "word": "unsure", "figure": ""}
    if who not in table["told apart"]:
        return answer | {"means": "Only 20 replies or more can tell.", "more": []}
    told, error = table["told apart"][who], table["told apart error"][who]
    answer["figure"] = f"{1 - told:.0%}"
    answer["means"] = (
        "How often a classifier, shown a real reply and the model's, takes the model's for the "
        f"real one (± {100 * error:.0f} points). 50% is perfect: nobody could tell."
    )
    answer["beside"] = beside(table, who, facts["name"])
    far = far_figures(table, who)
    answer["more"] = [differs(table, who, name) for name in far]
    if table["missing words"][who]:
        answer["more"].append(f"It never says {table['missing words'][who]}.")

    floor = max(table["told apart"].get("reference", 0.5), 0.5)  # less is chance
    ceiling = max(table["told apart"].get("somebody else", 1), floor + 2 * CLOSE)
    if told > (floor + ceiling) / 2:
        answer["word"] = "no"
    elif error > CLOSE:
        answer["more"].append("So few replies cannot tell more; 100 would do.")
    elif told > floor + CLOSE or far or recites(table, who):
        answer["word"] = "nearly"
    else:
        answer["word"] = "yes"
    return answer


def passing(table, who):
    """Return how often replies pass for real; of the person's own, more than half is chance."""
    share = 1 - table["told apart"][who]
    return min(share, 0.5) if who == "reference" else share


def beside(table, who, name):
    """Return what else passes for real: "Beside it: base 4%, somebody else 8%, Ann 47%."."""
    shares = {other: f"{passing(table, other):.0%}" for other in table["told apart"]}
    del shares[who]
    if "reference" in shares:
        shares[name] = shares.pop("reference")
    found = ", ".join(f"{other} {share}" for other, share in shares.items())
    return f"Beside it: {found}." if found else ""


def far_figures(table, who):
    """Return the shares that are over 15 points, and more than chance, from the reference's."""
    far = []
    for name in "unfinished", *STYLE:
        share, real = table[name][who], table[name]["reference"]
        both = (share + real) / 2
        chance = math.sqrt(2 * both * (1 - both) / table["replies"][who])
        if abs(share - real) > max(0.15, 3 * chance):
            far.append(name)
    return far


def differs(table, who, name):
    """Return a sentence about a figure of style that is far from that of the real replies."""
    does = PHRASES.get(name, f"are of the kind “{name}”")
    mine, real = table[name][who], table[name]["reference"]
    return f"{mine:.0%} of its replies {does}, of the real ones {real:.0%}."


# ---- did it learn by heart? ----------------------------------------------------------------------
def recites(table, who):
    """Say whether it repeats the training data by more than real replies do, and than chance."""
    if who not in table["by heart"] or "reference" not in table["by heart"]:
        return False
    error = math.hypot(table["by heart error"][who], table["by heart error"]["reference"])
    return table["by heart"][who] > table["by heart"]["reference"] + max(CLOSE, 2 * error)


def by_heart(table, facts):
    """Return the sentence about replies that stand in the training data word for word."""
    if facts["judged"] not in table["by heart"]:
        return ""
    counts = []
    for who in facts["judged"], "reference":
        of = table["long replies"].get(who, 0)
        counts.append(f"{table['by heart'].get(who, 0) * of:.0f} of {of}")
    return (
        f"Of its replies of 20 characters or more, {counts[0]} stand word for word in the training "
        f"data; of the real replies to the same rows, {counts[1]}."
    )


# ---- the whole -----------------------------------------------------------------------------------
def headline(table, facts, learned, sounds):
    """Return the sentence over all: the worse of the two answers."""
    name = facts["name"]
    if is_broken(table):
        return "The training went wrong: a loss is not a number."
    if not table["gain"]:
        return "Nothing to compare: the base model and a trained one have to be tested together."
    if learned["word"] == "no":
        worse = max(table["gain"].values()) < 0
        return f"It {'became worse' if worse else 'is no better'} than the base model."
    if table["kept"].get("fused", 1) < 0.9:
        return "The adapter learned, but the fused model has lost part of it."
    if sounds["word"] == "no":
        return f"It learned something, but it does not sound like {name} yet."
    if learned["word"] == "unsure":
        return "There are too few replies to say whether it learned."
    if sounds["word"] == "unsure":
        return f"It learned; there are too few replies to say whether it sounds like {name}."
    return f"It learned, and it {'nearly ' * (sounds['word'] == 'nearly')}sounds like {name}."


def next_steps(table, facts, learned, sounds):
    """Return what to do next, [(sentence, command)]: at most three, the most urgent first."""
    run, curve = facts["run"], dict(facts["curve"])
    rate = float(facts["training"].get("LEARNING_RATE", 1e-4))
    iterations = int(facts["training"].get("ITERS", 300))
    best = min(list(curve)[1:], key=curve.get, default=iterations)
    steps = []
    if is_broken(table) or max(table["gain"].values(), default=0) < 0:
        command = f"{run} LEARNING_RATE={rate / 3:.1g} ./fine_tune.sh"
        steps.append(("Train with a third of the learning rate.", command))
    elif not table["gain"]:
        steps.append(("Train an adapter.", f"{run} ./fine_tune.sh"))
    elif best <= iterations / 2 or recites(table, facts["judged"]):
        fewer = f"{run} ITERS={min(best, iterations // 2)} ./fine_tune.sh"
        steps.append(("Train less: it begins to learn by heart.", fewer))
    elif learned["word"] == "no":
        steps.append(("Train longer.", f"{run} ITERS={2 * iterations} ./fine_tune.sh"))
    if table["kept"].get("fused", 1) < 0.9:
        steps.append(("Fuse at 16 bits.", f"{run} FUSED_BITS=16 ./fuse.sh"))
    pairs = table["pairs"].get(facts["judged"], 0)
    if sounds["word"] == "unsure" and pairs < min(100, facts["rows"] // 2):
        more = f"{run} python test_on_validation.py --replies 100"
        steps.append(("Let it reply to more rows.", more))
    elif "unsure" in (learned["word"], sounds["word"]):
        author = f" --only-author {shlex.quote(facts['author'])}" if facts["author"] else ""
        build = f"{run} python build_train.py{author} --valid-size 0.3"
        steps.append(("Keep more replies for the test, and train again.", build))
    if learned["word"] == "yes" and sounds["word"] in ("yes", "nearly"):
        steps.append(("Talk to it.", f"{run} python models/chat.py"))
    if table["gain"] and sounds["word"] != "yes":
        more = "Add more chat: four times as much lowers the loss by 4 to 5%."
        steps.append((more, "python data/raw/from_export.py --help"))
    return steps[:3]


def verdict(table, facts):
    """Return {"headline": …, "answers": [two], "by heart": a sentence or "", "next": […]}.

    facts: see find_facts() of test_on_validation.py.
    """
    answers = learned(table, facts), sounds(table, facts)
    return {
        "headline": headline(table, facts, *answers),
        "answers": answers,
        "by heart": by_heart(table, facts),
        "next": next_steps(table, facts, *answers),
    }


def as_text(verdict):
    """Yield the lines of a verdict for the terminal."""
    yield verdict["headline"]
    for answer in verdict["answers"]:
        figure = f": {answer['figure']}" * bool(answer["figure"])
        yield f"\n{answer['question']} {answer['word'].capitalize()}{figure}"
        for sentence in filter(None, [answer["means"], answer.get("beside"), *answer["more"]]):
            yield indented(sentence)
    if verdict["by heart"]:
        yield f"\nDid it learn by heart?\n{indented(verdict['by heart'])}"
    for sentence, command in verdict["next"]:
        yield f"\nnext: {sentence}\n  {command}"


def indented(sentence):
    return textwrap.fill(sentence, 90, initial_indent="  ", subsequent_indent="  ")
