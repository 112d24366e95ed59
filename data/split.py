"""Rows → rows to train with and rows to validate with: no message stands in both.

A row has .texts (its own last), .talk_number, .places (of its messages, in all talks laid end to
end) and .rule, the name of the rule that dropped it.
"""

from bisect import bisect_left
from collections import Counter
from itertools import accumulate, groupby

from sklearn.model_selection import train_test_split

COPY = "split: is in train as well"


def stretches(rows):
    """Return the number of the stretch that each place is in: stretches are drawn as a whole.

    A stretch is a talk, or a part of a long one. A part has 50 rows, or twice as many as the
    longest row has messages; here it has four:

        place     0 1 2 3 4 5 6 7 8 9
        talk      a a a b b b b b b b
        stretch   1 1 1 2 2 2 2 3 3 3
        a row           * * *             lies within stretch 2
        a row               * * *         reaches from 2 to 3: if one of these is for training and
                                          one for validation, the row is for neither
    """
    longest = max(len(row.places) for row in rows)
    length = min(max(50, 2 * longest), max(longest + 2, len(rows) // 4))
    begins = set()
    for _, talk in groupby(rows, lambda row: row.talk_number):
        talk = list(talk)
        begins.add(talk[0].places[0])
        begins.update(row.places[-1] for row in talk[length : len(talk) - length // 2 : length])
    last = rows[-1].places[-1]
    return list(accumulate(place in begins for place in range(last + 1)))


def draw(sizes, wanted, seed):
    """Return the stretches for validation: as few as hold the rows that are wanted.

    `sizes` is {stretch: how many rows lie within it}. With the same seed train_test_split draws
    the same stretches first, whatever the count: so more stretches always hold more rows.
    """

    def drawn(count):
        return train_test_split(sorted(sizes), test_size=count, random_state=seed)[1]

    def rows_in(count):
        return sum(sizes[stretch] for stretch in drawn(count))

    most = len(sizes) - 1  # one is left to train with
    return drawn(1 + bisect_left(range(1, most), wanted, key=rows_in)) if most else []


def split(rows, valid_size, valid_rows, seed):
    """Return (rows to train with, rows to validate with); drop those between them."""
    stretch_of = stretches(rows)
    reaches = [(stretch_of[row.places[0]], stretch_of[row.places[-1]]) for row in rows]
    sizes = {last: 0 for _, last in reaches}
    for first, last in reaches:
        sizes[last] += first == last
    wanted = min(valid_rows, max(2, round(valid_size * len(rows))))
    drawn = set(draw(sizes, wanted, seed))
    train, valid = [], []
    for row, (first, last) in zip(rows, reaches, strict=True):
        is_drawn = {stretch in drawn for stretch in range(first, last + 1)}
        if len(is_drawn) > 1:
            row.rule = "split: between train and valid"
        else:
            (valid if True in is_drawn else train).append(row)
    return train, valid


def runs(row, size):
    """Return every `size` messages of a row that follow each other: a b c d, 3 → {abc, bcd}."""
    texts = row.texts
    return set(zip(*(texts[i:] for i in range(size)), strict=False))


def drop_copies(train, valid):
    """Drop the rows of valid that share text with train: the chat repeats itself."""
    longest = max((len(row.texts) for row in train + valid), default=0)
    size = max(2, min(3, (longest - 1) // 2))  # three, or two of short rows
    held = {run for row in valid for run in runs(row, size)}
    telling = {run for run in held if len(set("".join(run))) >= 12}  # not "gg", "lol", "gg"
    counts = Counter(run for row in train for run in telling & runs(row, size))
    copies = {run for run, count in counts.items() if count <= 2 * longest}  # more: an instruction
    for row in valid:
        if not copies.isdisjoint(runs(row, size)):
            row.rule = COPY
