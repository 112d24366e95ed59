"""Figures → sentences: two questions, each with a word, a figure and what it means; what to do.

    Did it learn?             yes      2.6 times as likely   It gives each next token of real …
    Does it sound like Ann?   nearly   37%                   How often a classifier, a program …

The headline follows the worse of the two. The table of figures comes from models/figures.py.
"""

from models.common import lower_rate
from models.figures import LABELS, STYLE

import math
import shlex
import textwrap

FEW = 30  # fewer rows are too few to be sure of a loss
CLOSE = 0.1  # up to this much easier to tell than the person's own replies still counts as "yes"
KEPT = 0.9  # of what the adapter learned; a fused model that keeps less has lost a part
MORE_CHAT = "Add more chat.", "python data/raw/from_export.py --help"


def unsure(question):
    """Return an answer to fill in: bars [(model, width up to 1, text), …], more [sentence, …]."""
    return {"question": question, "word": "unsure", "figure": "", "bars": [], "more": []}


# ---- did it learn? -------------------------------------------------------------------------------
def two_digits(value):
    """Return a number as text, without an exponent: 0.2479 → "0.25", 2612.3 → "2600"."""
    return f"{float(f'{value:.2g}'):g}"


def chance(loss):
    """Return the probability that a model gives a token: a loss of 2.3 is "10%", 6 "0.25%"."""
    return f"{two_digits(100 * math.exp(-loss))}%"


def learned(table, facts):
    """Answer it from the losses of the first trained model and the base model."""
    answer = unsure("Did it learn?")
    if is_broken(table):
        return answer | {"word": "no", "means": "A loss is not a number: the training went wrong."}
    if not table["gain"]:
        return answer | {"means": "To tell, test the base model and a trained one together."}
    who = next(iter(table["gain"]))
    new, old = table["loss"][who], table["loss"]["base"]
    answer["figure"] = f"{two_digits(math.exp(old - new))} times as likely"
    answer["means"] = (
        f"It gives each next token (a word or a piece of one) of {facts['rows']} real replies that "
        f"it never saw a chance of {chance(new)} on average, the base model {chance(old)}. "
        f"No model comes near 100%. As a loss: {new:.2f} instead of {old:.2f}."
    )
    best = min(table["loss"].values())
    for model, loss in table["loss"].items():
        answer["bars"].append((model, math.exp(best - loss), chance(loss)))
    if facts["rows"] < FEW:
        answer["more"].append(f"That is too few replies to be sure; {FEW} would do.")
    elif abs(new - old) < 2 * table["gain error"][who]:
        answer["word"] = "no"
        answer["more"].append("The difference may be chance.")
    else:
        answer["word"] = "yes" if new < old else "no"
    for kept in table["kept"].values():
        answer["more"].append(f"The fused model keeps {kept:.0%} of what the adapter learned.")
    return answer


def is_broken(table):
    """Say whether a loss is not a number."""
    return not all(map(math.isfinite, table["loss"].values()))


# ---- does it sound like them? --------------------------------------------------------------------
def closeness(table, who):
    """Return how close a model comes to the person: "yes", "nearly", "no", or "unsure".

    told apart:  50 %      floor: the person    half way      ceiling: somebody else   100 %
                   |  yes   | + CLOSE:  nearly  |    no          |                        |
    """
    told, error = table["told apart"][who], table["told apart error"][who]
    floor = table["told apart"].get("reference", 0.5)
    ceiling = max(table["told apart"].get("somebody else", 1), floor + 2 * CLOSE)
    if told > (floor + ceiling) / 2:
        return "no"
    if error > CLOSE:
        return "unsure"
    if told > floor + CLOSE or far_figures(table, who) or recites(table, who):
        return "nearly"
    return "yes"


def sounds(table, facts):
    """Answer it from the replies of the judged model."""
    who = facts["judged"]
    answer = unsure(f"Does it sound like {facts['name']}?")
    if who not in table["told apart"]:
        return answer | {"means": "It takes at least 20 replies to tell."}
    told, error = table["told apart"][who], table["told apart error"][who]
    answer["word"] = closeness(table, who)
    answer["figure"] = f"{1 - told:.0%}"
    answer["means"] = (
        "How often a classifier, a program that guesses which of two replies is the real one, "
        f"takes the model's for it (± {100 * error:.0f} points). 50% is perfect: nobody could tell."
    )
    for other, share in table["told apart"].items():
        answer["bars"].append((other, min(1, 2 * (1 - share)), f"{1 - share:.0%}"))
    for name in far_figures(table, who):
        mine, real = f"{table[name][who]:.0%}", f"{table[name]['reference']:.0%}"
        answer["more"].append(f"{name.capitalize()}: {mine} of its replies, {real} of real ones.")
    if table["missing words"][who]:
        answer["more"].append(f"It never says {table['missing words'][who]}.")
    if answer["word"] == "unsure":
        answer["more"].append("That is too few replies to say more; 100 would do.")
    return answer


def far_figures(table, who):
    """Return the shares that are far from the reference's: over 15 points, and more than chance."""
    least = max(0.15, 2 / math.sqrt(table["replies"][who]))
    names = "cut off", *STYLE
    return [name for name in names if abs(table[name][who] - table[name]["reference"]) > least]


def recites(table, who):
    """Say whether it repeats the training data more often than real replies do."""
    if table["long replies"].get(who, 0) < FEW:
        return False
    return table["by heart"][who] > table["by heart"].get("reference", 0) + CLOSE


def by_heart(table, who):
    """Return the sentence about replies that stand in the training data, "" if all are short."""
    if who not in table["by heart"]:
        return ""
    mine, real = table["by heart"][who], table["by heart"].get("reference", 0)
    return (
        f"{mine:.0%} of its replies of 20 characters or more stand word for word in the training "
        f"data, {real:.0%} of the real replies to the same rows."
    )


# ---- the whole -----------------------------------------------------------------------------------
def headline(table, facts, learned, sounds):
    """Return the sentence over all: the worse of the two answers."""
    name = facts["name"]
    if is_broken(table):
        return "The training went wrong: a loss is not a number."
    if not table["gain"]:
        return "There is nothing to compare."
    if facts["is_trial"]:
        return "A trial: all steps work. So small a base model can only write gibberish."
    if learned["word"] == "no":
        is_worse = max(table["gain"].values()) < 0
        return f"It {'became worse' if is_worse else 'is no better'} than the base model."
    if table["kept"].get("fused", 1) < KEPT:
        return "The adapter learned, but the fused model has lost part of it."
    if learned["word"] == "unsure" and sounds["word"] != "no":
        return "There are too few replies to say whether it learned."
    return {
        "no": f"It learned something, but it does not sound like {name} yet.",
        "unsure": f"It learned; there are too few replies to say whether it sounds like {name}.",
        "nearly": f"It learned, and it nearly sounds like {name}.",
        "yes": f"It learned, and it sounds like {name}.",
    }[sounds["word"]]


def how_to_train(table, facts, learned):
    """Yield how to train the next time, (sentence, command), if that should change."""
    run, trained, curve = facts["run"], facts["training"], dict(facts["curve"])
    iterations = int(trained.get("ITERS", 0))
    best = min(list(curve)[1:], key=curve.get, default=math.inf)
    train = slower = less = longer = f"{run} ./fine_tune.sh"
    if trained:  # else PEFT has trained the adapter, and models/peft.py does not know how
        slower = f"{run} LEARNING_RATE={lower_rate(trained['LEARNING_RATE'])} ./fine_tune.sh"
        less = f"{run} ITERS={min(best, iterations // 2)} ./fine_tune.sh"
        longer = f"{run} ITERS={2 * iterations} ./fine_tune.sh"
    if is_broken(table) or max(table["gain"].values(), default=0) < 0:
        yield "Train with a third of the learning rate.", slower
    elif not table["gain"]:
        yield "Train an adapter.", train
    elif best <= iterations / 2 or recites(table, facts["judged"]):
        yield "Train less: it begins to learn by heart.", less
    elif learned["word"] == "no":
        yield "Train longer.", longer


def next_steps(table, facts, learned, sounds):
    """Return what to do next, [(sentence, command)]: at most three, the most urgent first."""
    run = facts["run"]
    if facts["is_trial"] and table["gain"] and not is_broken(table):
        steps = [("Choose a real base model, and train that.", "python -m models.which_model")]
        return [*steps, MORE_CHAT] if learned["word"] == "unsure" else steps
    steps = [*how_to_train(table, facts, learned)]
    if table["kept"].get("fused", 1) < KEPT:
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
        steps.append(MORE_CHAT)
        steps.append(("Or train a larger base model.", "python -m models.which_model"))
    return steps[:3]


def verdict(table, facts):
    """Return {"headline": …, "answers": [two], "by heart": a sentence or "", "next": […]}."""
    answers = learned(table, facts), sounds(table, facts)
    return {
        "headline": headline(table, facts, *answers),
        "answers": answers,
        "by heart": by_heart(table, facts["judged"]),
        "next": next_steps(table, facts, *answers),
    }


def as_text(verdict):
    """Yield the lines of a verdict for the terminal."""
    indented = textwrap.TextWrapper(90, initial_indent="  ", subsequent_indent="  ").fill
    yield verdict["headline"]
    for answer in verdict["answers"]:
        word = answer["word"].capitalize()
        yield f"\n{answer['question']} {word}: {answer['figure']}".rstrip(": ")
        yield indented(answer["means"])
        for who, width, text in answer["bars"]:
            yield f"    {LABELS[who]:18} {text:>6}  {'█' * round(40 * width)}".rstrip()
        yield from map(indented, answer["more"])
    if verdict["by heart"]:
        yield f"\nDid it learn by heart?\n{indented(verdict['by heart'])}"
    yield "\nWhat to do next"
    for sentence, command in verdict["next"]:
        yield f"  {sentence}\n    {command}"
