"""One chat template for training, scoring, fuse and talk, whatever the base model's own is."""

from models.chat_template import check_template, load_tokenizer, settle, shadow
from models.completion_loss import encode

import json

import pytest
import tiny_families

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes, why?"}]
ALWAYS_THINKS = tiny_families.THINKS.replace("enable_thinking", "no_such_setting")
NO_REPLY = "{% for turn in messages[:1] %}<|im_start|>{{ turn.content }}{% endfor %}"


@pytest.fixture
def base(tmp_path):
    tiny_families.build("llama", tmp_path / "base")
    return tmp_path / "base"


def use(template, base):
    """Let the base have another template; return its tokenizer."""
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return load_tokenizer(base)


def prompt_and_reply(tokenizer):
    tokens, start = encode(tokenizer, CHAT)
    return tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[start:])


START = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
SHOWN = {
    "TURNS": (START, "yes, why?<|im_end|>\n"),
    "THINKS": (START + "<think>\n\n</think>\n\n", "yes, why?<|im_end|>\n"),
    "THINKS_LOUD": (
        "<|think|><|im_start|>\nuser\nhi<|im_end|>\n<|im_start|>\nassistant\n",
        "yes, why?<|im_end|>\n",
    ),
    "DATE": ("01 Jan 2026\n" + START, "yes, why?<|im_end|>\n"),
    "NO_END": ("<|user|>\nhi<|assistant|>\n<think></think>\n", "yes, why?<eos>"),
    "CHANNEL": (
        "2026-01-01<|im_start|>user\n<|message|>hi<|im_end|>\n"
        "<|im_start|>assistant\n<|channel|>final<|message|>",
        "yes, why?<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_reply_is_no_thought_and_has_an_end_and_the_date_is_always_the_same(name, base):
    tokenizer = use(getattr(tiny_families, name), base)
    assert prompt_and_reply(tokenizer) == SHOWN[name]
    assert prompt_and_reply(settle(tokenizer)) == SHOWN[name]  # once more, as for a fused model


def test_a_model_that_always_thinks_gets_an_empty_thought_into_the_prompt(base):
    assert prompt_and_reply(use(ALWAYS_THINKS, base)) == SHOWN["THINKS"]


def test_a_template_that_needs_no_change_is_not_changed(base):
    assert use(tiny_families.TURNS, base).chat_template == tiny_families.TURNS


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (NO_REPLY, "does not tell which tokens are the reply"),
        (tiny_families.TURNS.replace("{{ turn.content }}", "{{ turn.content | upper }}"), "writes"),
        ("{{ raise_exception('only with tools') }}", "only with tools"),
    ],
)
def test_a_template_that_teaches_no_replies_is_refused_and_left_as_it_is(template, reason, base):
    tokenizer = use(template, base)
    with pytest.raises(Exception, match=reason):
        check_template(tokenizer)
    assert tokenizer.chat_template == template


def test_a_shadow_has_the_settled_template_alone_and_links_to_all_else(base, tmp_path):
    use(tiny_families.TURNS, base)
    (base / "chat_template.jinja").write_text(tiny_families.THINKS)  # it wins over the one inside
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    shadow(base, tmp_path / "shadow")
    made = {file.name for file in (tmp_path / "shadow").iterdir()}
    assert made == set(before) - {"chat_template.jinja"}
    assert (tmp_path / "shadow/model.safetensors").is_symlink()
    config = json.loads((tmp_path / "shadow/tokenizer_config.json").read_text())
    assert config["chat_template"].endswith(tiny_families.THINKS)
    assert config["eos_token"] == "<eos>"
    assert prompt_and_reply(load_tokenizer(tmp_path / "shadow")) == SHOWN["THINKS"]
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
