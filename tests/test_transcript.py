"""data/transcript.py: a row as people read it is what data/prompt.py made it of."""

from data.prompt import make_chat
from data.transcript import longest_talk, transcript, what_others_said

from types import SimpleNamespace

import pytest

PROMPT = "{context}\n\nWrite the next message of this chat, as {author}."
QUESTION = "{context}\n\nAsk the next question in this chat, as {author}."
CONTEXT = [("ann", "hi: all"), ("cy", "two\nlines"), ("bob", "yes"), ("ann", "ready?")]


def settings(**changes):
    usual = {"shape": "prompt", "names": True, "prompt": PROMPT, "question_prompt": QUESTION}
    usual |= {"max_context_chars": 300, "authors": ["ann", "bob"]}
    return SimpleNamespace(**usual | changes)


@pytest.mark.parametrize("is_question", [False, True])
@pytest.mark.parametrize("shape", [{}, {"shape": "turns", "authors": ["bob"]}])
def test_a_row_is_shown_as_the_messages_that_it_was_made_of(shape, is_question):
    made = settings(**shape)
    chat = make_chat(CONTEXT, "bob", made, is_question)
    reply = {"role": "assistant", "content": "go"}
    assert transcript([*chat, reply], made) == [*CONTEXT, ("bob", "go")]


def test_without_names_each_line_is_a_message_of_nobody():
    made = settings(names=False, prompt="Go on:\n{context}", authors=[])
    chat = [{"role": "user", "content": "Go on:\nhi\nho"}, {"role": "assistant", "content": "yo"}]
    assert transcript(chat, made) == [("", "hi"), ("", "ho"), ("", "yo")]


def test_a_pair_that_was_not_made_from_a_log_stays_as_it_is():
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    assert transcript(chat, settings(authors=[], names=False)) == [("", "2 + 2?"), ("", "4")]


def test_rows_that_follow_each_other_are_one_talk():
    a, b, c, d, e = [(name, name) for name in "abcde"]
    rows = [[a, b, c, d, e], [d, a], [a, b, c], [b, c, d]]
    assert longest_talk(rows, 10) == [2, 3, 0]
    assert longest_talk(rows, 2) == [3, 0]
    assert longest_talk([[a, b], [d, e]], 10) == []


@pytest.mark.parametrize(
    ("messages", "joined", "said"),
    [
        ([("ann", "hi"), ("ann", "you?"), ("bob", "yes")], True, "hi\nyou?"),
        ([("ann", "hi"), ("ann", "you?"), ("bob", "yes")], False, "you?"),
        ([("cy", "hi"), ("ann", "you?"), ("bob", "yes")], True, "you?"),
        ([("bob", "hi"), ("bob", "yes")], True, ""),
        ([("bob", "yes")], True, ""),
    ],
)
def test_what_another_one_said_right_before(messages, joined, said):
    assert what_others_said(messages, joined) == said
