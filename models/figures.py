"""The figures of test_on_validation.py: losses, told apart, style, learned by heart.

They come in a table, {"loss": {"base": 9.539, "adapter": 3.066}, "loss error": …}. The reference is
what was really said, and an error is a standard error.
"""

import math
import re
from collections import Counter

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict

# Whose replies there are; "base", "adapter" and "fused" are the models.
LABELS = {
    "base": "base model",
    "adapter": "adapter",
    "fused": "fused model",
    "somebody else": "somebody else",
    "reference": "other real replies",
}

# The figures of style, as shares of the replies. Change one, add one.
EMOJI = re.compile(r"[\U0001f000-\U0001faff\u2600-\u27bf]|(?<!\w)[:;=]-?[()DPp](?!\w)")
LOOP = re.compile(r"(?<!\S)(\S.{0,38}?)(?:\s+\1){3}(?!\S)|(.{5,40}?)\2{3}", re.DOTALL)
STYLE = {
    "question": lambda text: re.search("[?\u061f\uff1f]", text),
    "emoji": EMOJI.search,  # and :-)
    "capital first": lambda text: text[:1].isupper(),
    "full stop last": lambda text: re.search(r"(?<!\.)[.\u3002]$", text),
    "several lines": lambda text: "\n" in text,
    "looping": LOOP.search,  # the same piece four times: "sa sa sa sa", not "hahahaha"
}
SPLITS = 3  # times that the classifier judges all pairs, each time with other fifths
SPREAD = 1.3  # errors over those of independent pairs: the classifier learned from the same ones


# ---- losses --------------------------------------------------------------------------------------
def ratio(parts, wholes):
    """Return what all parts are to all wholes, and the standard error of that over the rows.

    Nats [2, 4] of rows of [1, 2] tokens: a loss of 2, error 0. (Cochran, Sampling Techniques, 2.11)
    """
    value = parts.sum() / wholes.sum()
    return float(value), float(np.sqrt(((parts - value * wholes) ** 2).sum()) / wholes.sum())


def add_losses(table, nats, counts):
    """Add what follows from the nats of each row, {model: array}, and its number of tokens."""
    for who in nats:
        table["loss"][who], table["loss error"][who] = ratio(nats[who], counts)
    if "base" not in nats:
        return
    gains = {who: nats["base"] - nats[who] for who in nats if who != "base"}
    for who in gains:
        table["gain"][who], table["gain error"][who] = ratio(gains[who], counts)
    if len(gains) == 2 and table["gain"]["adapter"] > 2 * table["gain error"]["adapter"]:
        table["kept"]["fused"], _ = ratio(gains["fused"], gains["adapter"])


# ---- told apart ----------------------------------------------------------------------------------
def told_apart(real, made):
    """Return how often a classifier picks the real one of two replies, and the error of that.

    It learns from four fifths of the pairs, by pieces of one to four letters and by where a reply
    begins and ends, and judges the other pairs. Equal replies count half. More replies teach it
    more, so that only figures of as many replies can be compared.
    """
    texts = [f"\x02{text}\x03" for text in real + made]
    is_real = [True] * len(real) + [False] * len(made)
    letters = TfidfVectorizer(
        analyzer="char", ngram_range=(1, 4), lowercase=False, sublinear_tf=True
    ).fit_transform(texts)
    pairs = 2 * list(range(len(real)))  # both replies of a pair are learned, or both are judged
    leads = []
    for seed in range(SPLITS):
        scores = cross_val_predict(
            LogisticRegression(C=10, max_iter=1000),
            letters,
            is_real,
            groups=pairs,
            cv=GroupKFold(5, shuffle=True, random_state=seed),
            method="decision_function",
        )
        leads.append(np.round(scores[: len(real)] - scores[len(real) :], 9))
    picked = float(np.mean(np.sign(leads)) / 2 + 0.5)
    near = (picked * len(real) + 1) / (len(real) + 2)  # so that 40 of 40 has an error, too
    return picked, SPREAD * math.sqrt(near * (1 - near) / len(real))


def add_told_apart(table, who, real, made):
    """Add how well some replies are told from as many real ones."""
    told, table["told apart error"][who] = told_apart(real, made)
    table["told apart"][who] = max(told, 0.5) if who == "reference" else told  # less is chance
    table["pairs"][who] = len(real)


# ---- style ---------------------------------------------------------------------------------------
def add_style(table, who, texts):
    """Add the mean length and the shares of STYLE of some replies."""
    table["length"][who] = sum(map(len, texts)) / len(texts)
    for name, found in STYLE.items():
        table[name][who] = sum(bool(found(text)) for text in texts) / len(texts)
    table["replies"][who] = len(texts)


def words(text):
    """Return the words of a text, of two letters and more: "I don't!" → {"don't"}."""
    return set(re.findall(r"[^\W\d_](?:'?[^\W\d_])+", text.casefold().replace("\u2019", "'")))


def missing_words(real, made, names):
    """Return which of the words that most real replies have never come up: “no”, “boh”.

    They are 20 at most, in 5 % of the real replies at least. Names of the chat do not count.
    """
    counts = Counter(word for text in real for word in words(text) - names)
    often = [word for word in sorted(counts) if counts[word] >= max(5, len(real) / 20)]
    often.sort(key=counts.get, reverse=True)
    said = set().union(*map(words, made))
    return ", ".join(f"“{word}”" for word in often[:20] if word not in said)


# ---- learned by heart ----------------------------------------------------------------------------
def add_by_heart(table, who, replies, learned):
    """Add how many of the replies of 20 characters and more stand in the text that was learned."""
    long = [text for text in replies if len(text) >= 20]
    found = [text for text in long if text in learned]
    if long:
        table["by heart"][who] = len(found) / len(long)
        table["long replies"][who] = len(long)
        table["longest by heart"][who] = max(found, key=len, default="")
