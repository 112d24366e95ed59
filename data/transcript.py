r"""Rows of the data → messages as people read them: data/prompt.py backwards.

Settings are those of data/prompt.py; only_author and authors say who replies.
"""

import re
from itertools import takewhile

SPEAKER = re.compile(r"([^:\n]{1,60}): (.*)")


def transcript(chat, settings):
    r"""Return the messages of a row as [(name, text), …], the reply last and without the prompt.

    [{"role": "user", "content": "ann: hi\ncy: you?\n\nWrite the next message …, as bob."},
     {"role": "assistant", "content": "yes"}]  →  [("ann", "hi"), ("cy", "you?"), ("bob", "yes")]

    A name that the row does not tell is "".
    """
    author = settings.authors[0] if len(settings.authors) == 1 else ""
    messages = []
    for turn in chat[:-1]:
        if turn["role"] == "assistant":
            messages.append((author, turn["content"]))
        else:
            content, author = without_instruction(turn["content"], author, settings)
            messages += split_lines(content, settings.names)
    return [*messages, (author, chat[-1]["content"])]


def without_instruction(prompt, author, settings):
    r"""Return the chat in a prompt, and whose reply it asks for.

    "ann: hi\n\nWrite the next message of this chat, as bob." → "ann: hi", "bob"
    """
    if settings.shape == "turns":
        return prompt, author
    for template in (settings.prompt, settings.question_prompt):
        pattern = re.escape(template.strip())
        pattern = pattern.replace(re.escape("{context}"), "(?P<context>.*)", 1)
        pattern = pattern.replace(re.escape("{author}"), "(?P<author>.*)", 1)
        found = re.fullmatch(pattern, prompt, re.DOTALL)
        if found:
            return found["context"], found.groupdict().get("author", author)
    return prompt, author


def split_lines(text, names):
    r"""Return the messages of a chat: "ann: hi\nyou?\nbob: yes" → [("ann", "hi\nyou?"), …]."""
    lines = text.split("\n")
    if not names:
        return [("", line) for line in lines]
    messages = []
    for line in lines:
        found = SPEAKER.fullmatch(line)
        if found:
            messages.append((found[1], found[2]))
        elif messages:
            name, before = messages[-1]
            messages[-1] = name, f"{before}\n{line}"
        else:
            messages.append(("", line))
    return messages


def as_text(messages):
    r"""Return messages as text: [("ann", "hi"), ("", "yes")] → "ann: hi\nyes"."""
    return "\n".join(f"{name}: {text}" if name else text for name, text in messages)


def what_others_said(messages, joined):
    """Return what somebody else said right before the reply, "" if its author did.

    joined: all that they wrote in a row, as the replies are in the shape "turns".
    """
    *before, (author, _) = messages
    if not before or before[-1][0] == author:
        return ""
    speaker, last = before[-1]
    if not joined:
        return last
    said = takewhile(lambda message: message[0] == speaker, reversed(before))
    return "\n".join(reversed([text for _, text in said]))


def longest_talk(transcripts, most):
    """Return the places of rows that follow each other in the chat, `most` at most.

    A row follows another if its messages hold that one's reply, right behind the message that
    stood before it: [[a, b, c], [x, y], [b, c, d]] → [0, 2].
    """
    places = {tuple(messages[-2:]): place for place, messages in enumerate(transcripts)}
    before = {}
    for place, messages in enumerate(transcripts):
        for i in range(2, len(messages)):
            earlier = places.get(tuple(messages[i - 2 : i]))
            if earlier is not None:
                before[place] = earlier  # the last one that is found is the nearest
    talks = []
    for place in before:
        talk = [place]
        while talk[0] in before and before[talk[0]] not in talk and len(talk) < most:
            talk.insert(0, before[talk[0]])
        talks.append(talk)
    return max(talks, key=len, default=[])
