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
CONTEXT = [("ann", "me first"), ("bob", "hi"), ("cy", "you"), ("ann", "what"), ("bob", "no")]
PROMPTS = [
    ({}, "ann: me first\nbob: hi\ncy: you\nann: what\nbob: no\n\nWrite as ann."),
    ({"names": False}, "me first\nhi\nyou\nwhat\nno\n\nWrite as ann."),
    (
        {"prompt": "{author} after {context}", "names": False},
        "ann after me first\nhi\nyou\nwhat\nno",
    ),
    ({"max_context_chars": 2}, "ann: me…\nbob: hi\ncy: yo…\nann: wh…\nbob: no\n\nWrite as ann."),
]


@table(("change", "prompt"), PROMPTS)
def test_in_the_prompt_shape_the_chat_is_one_prompt(change, prompt):
    settings = SimpleNamespace(**SETTINGS | change)
    assert make_chat(CONTEXT, "ann", settings) == [{"role": "user", "content": prompt}]


def test_a_question_has_an_instruction_of_its_own():
    settings = SimpleNamespace(**SETTINGS)
    [turn] = make_chat([("ann", "hi")], "bob", settings, is_question=True)
    assert turn["content"] == "ann: hi\n\nAsk as bob."


def test_who_has_no_name_is_someone():
    settings = SimpleNamespace(**SETTINGS)
    assert make_chat([("", "hi")], "", settings)[0]["content"] == "someone: hi\n\nWrite as someone."


def test_braces_and_signs_of_a_chat_are_only_text():
    settings = SimpleNamespace(**SETTINGS | {"names": False, "prompt": "{context}!"})
    assert make_chat([("", "{author} {0} %s [a]")], "", settings)[0]["content"] == (
        "{author} {0} %s [a]!"
    )


TURNS = [
    ({}, ["bob: hi\ncy: you", "what", "bob: no"]),
    ({"names": False}, ["hi\nyou", "what", "no"]),
    ({"max_context_chars": 2}, ["bob: hi\ncy: yo…", "wh…", "bob: no"]),
]


@table(("change", "expected"), TURNS)
def test_in_turns_the_author_is_the_assistant_and_the_user_begins(change, expected):
    settings = SimpleNamespace(**SETTINGS | {"shape": "turns"} | change)
    turns = make_chat(CONTEXT, "ann", settings)
    assert [turn["content"] for turn in turns] == expected
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]


def test_a_reply_that_is_over_stands_in_the_talk_as_it_was_learned():
    """The assistant's own words, nothing before them: as the completion that the model learned."""
    settings = SimpleNamespace(**SETTINGS | {"shape": "turns"})
    talk = [("bob", "hi"), ("ann", "one"), ("ann", "two"), ("bob", "so?")]
    assert make_chat(talk, "ann", settings)[1] == {"role": "assistant", "content": "one\ntwo"}
