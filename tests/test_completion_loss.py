"""One loss: nats per token of the replies and their end of turn, not of prompts and padding."""

from models.chat_template import load_model
from models.completion_loss import encode, loss_of_replies, nats_of_replies

import mlx.core as mx
import numpy as np
import pytest

CHATS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    for prompt, reply in [("ciao raga", "tutto bene bro"), ("che gioco fai stasera", "LULW")]
]


@pytest.fixture(scope="module")
def base(template):
    return load_model(template / "models/base/tiny-gemma-3")


def test_the_reply_is_what_follows_the_prompt_and_it_has_an_end(base):
    _, tokenizer = base
    tokens, start = encode(tokenizer, CHATS[0])
    assert tokenizer.decode(tokens[start:]) == "tutto bene bro<end_of_turn>\n"
    assert tokenizer.decode(tokens[:start]).endswith(
        "ciao raga<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_template_that_begins_a_reply_otherwise_than_it_writes_one_is_refused():
    class Tokenizer:
        def apply_chat_template(self, chat, add_generation_prompt=False, return_dict=False):
            return [1, 2] if add_generation_prompt else [1, 3, 4]

    with pytest.raises(ValueError, match="does not tell which tokens are the reply"):
        encode(Tokenizer(), CHATS[0])


def test_the_loss_is_that_of_the_replies_alone(base):
    """By its definition, row by row: the mean of -log p over the tokens that follow the prompt."""
    model, tokenizer = base
    rows = [encode(tokenizer, chat) for chat in CHATS]
    expected = []
    for tokens, start in rows:
        chances = mx.softmax(model(mx.array([tokens[:-1]]))[0, start - 1 :], axis=-1)
        expected.append(-np.log(np.array(chances)[range(len(tokens) - start), tokens[start:]]))
    for most_tokens in 1, 2048:  # a batch of one row, of all rows
        nats = nats_of_replies(model, rows, most_tokens)
        assert nats == pytest.approx([losses.sum() for losses in expected], abs=1e-3)
    mean = np.concatenate(expected).mean()
    assert loss_of_replies(model, rows) == pytest.approx(mean, abs=1e-4)


def test_each_row_is_counted_once_for_the_progress_bar(base):
    model, tokenizer = base
    rows = [encode(tokenizer, chat) for chat in CHATS * 3]
    counts = []
    loss_of_replies(model, rows, counts.append)
    assert sum(counts) == 6
