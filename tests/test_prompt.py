"""What a model is asked, in training and in a talk: data/prompt.py."""

from data.prompt import make_chat

from types import SimpleNamespace

import pytest

table = pytest.mark.parametrize

SETTINGS = {
    "shape": "prompt",
    "names": True,
    "prompt": "{context}\n\nWrite as {author}.",
    "question_prompt": "{context}\n\nAsk as {author}.",
    "max_context_chars": 300,
}


def made(context, author, is_question=False, **change):
    return make_chat(context, author, SimpleNamespace(**SETTINGS | change), is_question)


CONTEXT = [("ann", "me first"), ("bob", "hi"), ("cy", "you"), ("ann", "what"), ("bob", "no")]
MARKED = "{author} after {context}"
PROMPTS = [
    ({}, "ann: me first\nbob: hi\ncy: you\nann: what\nbob: no\n\nWrite as ann."),
    ({"is_question": True}, "ann: me first\nbob: hi\ncy: you\nann: what\nbob: no\n\nAsk as ann."),
    ({"names": False}, "me first\nhi\nyou\nwhat\nno\n\nWrite as ann."),
    ({"prompt": MARKED, "names": False}, "ann after me first\nhi\nyou\nwhat\nno"),
    ({"max_context_chars": 2}, "ann: me…\nbob: hi\ncy: yo…\nann: wh…\nbob: no\n\nWrite as ann."),
]


@table(("change", "prompt"), PROMPTS)
def test_in_the_prompt_shape_the_chat_is_one_prompt(change, prompt):
    assert made(CONTEXT, "ann", **change) == [{"role": "user", "content": prompt}]


def test_who_has_no_name_is_someone():
    assert made([("", "hi")], "")[0]["content"] == "someone: hi\n\nWrite as someone."


def test_braces_and_signs_of_a_chat_are_only_text():
    [turn] = made([("", "{author} {0} %s [a]")], "", names=False, prompt="{context}!")
    assert turn["content"] == "{author} {0} %s [a]!"


TURNS = [
    ({}, ["bob: hi\ncy: you", "what", "bob: no"]),
    ({"names": False}, ["hi\nyou", "what", "no"]),
    ({"max_context_chars": 2}, ["bob: hi\ncy: yo…", "wh…", "bob: no"]),
]


@table(("change", "expected"), TURNS)
def test_in_turns_the_author_is_the_assistant_and_the_user_begins(change, expected):
    turns = made(CONTEXT, "ann", shape="turns", **change)
    assert [turn["content"] for turn in turns] == expected
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]


def test_a_reply_that_is_over_stands_in_the_talk_as_it_was_learned():
    """The assistant's own words, nothing before them: as the completion that the model learned."""
    talk = [("bob", "hi"), ("ann", "one"), ("ann", "two"), ("bob", "so?")]
    assert made(talk, "ann", shape="turns")[1] == {"role": "assistant", "content": "one\ntwo"}
