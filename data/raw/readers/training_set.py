r"""Ready training sets are no chats: their rows become pairs of prompt and completion.

Rows; what a set marks as bad is not learned, and of two answers only the chosen one:

    {"instruction": "say hi", "input": "", "output": "hi", "system": "…", "history": [["a", "b"]]}
    {"messages": [{"role": "user", "content": "hi?"}, {"role": "assistant", "content": "hello"}]}
    {"conversations": [{"from": "human", "value": "hi?"}], "chosen": {"from": "gpt", "value": …}}
    {"text": "<|im_start|>user\nhi?<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>"}
    {"text": "Q: hi?\nA: hello"}
"""

import re

from .shared import dig, share, text_of

APP = "training set"
TALKS = "messages", "conversations", "conversation"
ASKED = "prompt", "instruction", "question", "input"
ANSWERED = "completion", "output", "response", "answer", "chosen"
ANSWERERS = {"assistant", "gpt", "model", "chatgpt", "bot", *ANSWERED}
HEADS = "system|instruction|input|human|user|question|response|assistant|answer|output"

TEMPLATES = [  # of turns in a text, each a role and its words
    re.compile(r"(?s)<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)"),
    re.compile(r"(?s)<\|start_header_id\|>(\w+)<\|end_header_id\|>(.*?)(?:<\|eot_id\|>|\Z)"),
    re.compile(r"(?s)<start_of_turn>(\w+)\n(.*?)(?:<end_of_turn>|\Z)"),
    re.compile(rf"(?is)(?:\A|\n)### ?({HEADS}) ?:(.*?)(?=\n### ?(?:{HEADS}) ?:|\Z)"),
    re.compile(r"(?s)\n\n(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)"),
]
INST = re.compile(
    r"(?s)\[INST\](?:\s*<<SYS>>(?P<system>.*?)<</SYS>>)?(?P<user>.*?)\[/INST\]"
    r"(?P<assistant>.*?)(?=<s>|</s>|\[INST\]|\Z)"
)
ASKED_AND_ANSWERED = re.compile(
    r"(?is)(?:q|question|user|human|instruction|prompt)s? ?:\s?(?P<user>.*)"
    r"\n(?:a|answer|assistant|bot|gpt|response|output)s? ?:\s?(?P<assistant>.*)"
)


def understands(file):
    return is_talk(dig(file.data, "messages")) or share(file.entries, turns_of)


def read(file):
    """Yield {"prompt": …, "completion": …}, with the number of the talk if the row is one."""
    rows = [file.data] if "messages" in file.keys else file.entries
    left_out = 0
    for number, row in enumerate(rows):
        label = str(row.get("kto_tag", row.get("label")))
        pairs = pairs_of(turns_of(row))
        has_turns = len(pairs) > 1 or any(key in row for key in TALKS)
        talk = {"conversation": number} if has_turns else {}
        for pair in pairs:
            if pair["completion"] and label.casefold() != "false":
                yield talk | pair
            else:
                left_out += 1
    if left_out:
        file.notes.append(f"answers that are empty or marked as bad are not learned: {left_out:,}")


def turns_of(row):
    """Return the turns of a row, each {"role": …, "content": …}; none if it is no such row.

    {"instruction": "a", "output": "b"}         → a b
    {"text": "<s>[INST] a [/INST] b </s>"}      → a b
    {"system": "s", "messages": [a, b, c, d]}   → s a b c d
    {"conversations": [a], "chosen": b}         → a b
    {"prompt": "a", "chosen": [a, b]}           → a b
    """
    talk = next((row[key] for key in TALKS if is_talk(row.get(key))), [])
    key = next((key for key in ASKED if row.get(key)), "")
    asked = as_turns(row.get(key), "user")
    if key == "instruction":
        asked = asked + as_turns(row.get("input"), "user")
    answer = next((row[key] for key in ANSWERED if key in row), None)
    answered = as_turns(answer, "assistant") if asked or talk else turns_in(answer)
    if len(answered) > 1:
        talk = answered
    elif answered and (asked or "chosen" in row):
        talk = (asked or talk) + answered
    talk = talk or turns_in(row.get("text"))
    return before_of(row) + talk if talk else []


def is_talk(value):
    return isinstance(value, list) and share(value, is_turn) > 1 / 2


def is_turn(value):
    keys = set(value) if isinstance(value, dict) else set()
    return {"role", "content"} <= keys or {"from", "value"} <= keys


def as_turns(value, role):
    """Return a value as turns: a talk is some, a turn is one, and so are the words of a role."""
    if is_talk(value):
        return value
    if is_turn(value):
        return [value]
    return [] if value is None else [{"role": role, "content": value}]


def turns_in(value):
    """Return the turns of a talk, or of a text in one of the templates of models."""
    if is_talk(value):
        return value
    text = text_of(value)
    for template in TEMPLATES:
        if found := template.findall(text):
            return [{"role": role.casefold(), "content": words.strip()} for role, words in found]
    found = list(INST.finditer(text)) or [ASKED_AND_ANSWERED.fullmatch(text)]
    turns = [turn for part in found if part for turn in part.groupdict().items()]
    return [{"role": role, "content": words.strip()} for role, words in turns if words]


def before_of(row):
    """Return the system's words, the turns before and the context, none of which is an answer."""
    texts = [row.get("system"), row.get("system_prompt"), row.get("context")]
    for pair in row.get("history") or []:
        texts += pair if isinstance(pair, list) else [pair]
    return [{"role": "before", "content": text} for text in texts if text]


def pairs_of(turns):
    """Return a pair for each turn of the assistant; its prompt is all that was said before it.

    system s, user a, assistant b, user c, assistant d → (s a, b) and (s a b c, d)
    """
    before, pairs = [], []
    for turn in turns:
        text = text_of(turn.get("content") or turn.get("value"))
        if before and (turn.get("role") or turn.get("from")) in ANSWERERS:
            completion = text if turn.get("weight", 1) else ""
            pairs.append({"prompt": "\n\n".join(before), "completion": completion})
        before += [text] if text else []
    return pairs
