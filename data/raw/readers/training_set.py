r"""Ready training sets are no chats: their rows become pairs of prompt and completion.

Rows:

    {"instruction": "say hi", "input": "", "output": "hi"}
    {"messages": [{"role": "user", "content": "hi?"}, {"role": "assistant", "content": "hello"}]}
    {"conversations": [{"from": "human", "value": "hi?"}, {"from": "gpt", "value": "hello"}]}
    {"text": "Q: hi?\nA: hello"}
"""

import re

from .shared import share, text_of

APP = "training set"
ASKED = "prompt", "instruction", "question", "input"
ANSWERED = "completion", "output", "response", "answer"
ASKED_AND_ANSWERED = re.compile(
    r"(?is)(?:### ?)?(?:q|question|user|human|instruction|prompt)s? ?:\s?(.*)"
    r"\n(?:### ?)?(?:a|answer|assistant|bot|gpt|response|output)s? ?:\s?(.*)"
)


def understands(file):
    is_one_talk = "messages" in file.keys and share(file.entries, lambda m: "role" in m)
    return is_one_talk or share(file.entries, lambda entry: turns_of(entry) or is_pair(entry))


def read(file):
    """Yield {"prompt": …, "completion": …}, with the number of the talk if it has many turns."""
    rows = [file.data] if "messages" in file.keys else file.entries
    for number, row in enumerate(rows):
        if turns_of(row):
            yield from pairs_of(turns_of(row), number)
        elif is_pair(row):
            yield pair_of(row)


def turns_of(row):
    return row.get("messages") or row.get("conversations")


def is_pair(row):
    has_keys = any(key in row for key in ASKED) and any(key in row for key in ANSWERED)
    return has_keys or ASKED_AND_ANSWERED.fullmatch(text_of(row.get("text")))


def pair_of(row):
    """Return the pair of {"instruction", "input", "output"}, {"text": "Q: …"} and the like."""
    if found := ASKED_AND_ANSWERED.fullmatch(text_of(row.get("text"))):
        return {"prompt": found[1], "completion": found[2]}
    asked = next(key for key in ASKED if key in row)
    answered = next(key for key in ANSWERED if key in row)
    parts = [row[asked], row.get("input") if asked == "instruction" else ""]
    prompt = "\n\n".join(filter(None, map(text_of, parts)))
    return {"prompt": prompt, "completion": text_of(row[answered])}


def pairs_of(turns, number):
    """Yield a pair for each turn of the assistant; its prompt is all that was said before it.

    system s, user a, assistant b, user c, assistant d → (s a, b) and (s a b c, d)
    """
    before = []
    for turn in turns:
        text = text_of(turn.get("content") or turn.get("value"))
        if before and (turn.get("role") or turn.get("from")) in ("assistant", "gpt", "model"):
            prompt = "\n\n".join(before)
            yield {"conversation": number, "prompt": prompt, "completion": text}
        before.append(text)
