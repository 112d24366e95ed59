"""Load the tokenizer and the model of a folder as all scripts need them; none of its code runs.

A chat template may ask the model to think before it replies, print today's date, or leave a reply
without an end. Training, scoring, fusing and talking all need one template that does none of this.
load_tokenizer() makes it in memory, shadow() in a folder for mlx_lm.lora and mlx_lm.fuse:

    python -m models.chat_template models/base/MODEL FOLDER/MODEL
"""

from models.completion_loss import encode

import json
import shutil
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path

import mlx_lm
from mlx_lm import utils

# Lines that go before a template. mlx-lm asks every model to think that can. The large Gemma 4 must
# go on thinking: else its template writes an empty thought into prompts, but not into chats.
THINKING = "{% set enable_thinking = false %}", "{% set enable_thinking = true %}"
SAME_DAY = (  # for Llama, gpt-oss and Mistral, whose prompts hold the date
    "{% macro strftime_now(form) %}{{ form.replace('%Y', '2026').replace('%m', '01')"
    ".replace('%d', '01').replace('%B', 'January').replace('%b', 'Jan') }}{% endmacro %}"
)
# And behind it. END: in GLM 4 a reply ends where the next turn begins. OPENING: gpt-oss writes
# "<|channel|>final<|message|>" before each reply, which nobody sees as a part of the prompt.
END = (
    "{% if not add_generation_prompt and messages[-1].role == 'assistant' %}"
    "{{ eos_token }}{% endif %}"
)
OPENING = "{%% if add_generation_prompt %%}{{ %s }}{%% endif %%}"

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
PROMPTS = [USER], [USER, ASSISTANT, USER]
REPLIES = "yes, why?", "7", "…"


def load_tokenizer(folder):
    """Return the tokenizer of models/base/MODEL or of a fused model."""
    ends = utils.load_config(Path(folder)).get("eos_token_id")
    return settle(utils.load_tokenizer(Path(folder), {"trust_remote_code": False}, ends))


def load_model(folder, adapter=None):
    """Return (model, tokenizer) of a folder, with an adapter if one is given."""
    model, tokenizer = mlx_lm.load(
        str(folder),
        tokenizer_config={"trust_remote_code": False},
        adapter_path=adapter and str(adapter),
    )
    return model, settle(tokenizer)


def settle(tokenizer):
    """Replace the tokenizer's chat template by its first form that passes check_template().

    If none does it stays as it is. The settled template of a fused model passes again.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):  # one for chats, another one for tools
        template = template["default"]
    if template is None:
        return tokenizer
    for form in forms(tokenizer, template):
        tokenizer.chat_template = form
        with suppress(Exception):  # a template is a program, and may fail in any way
            check_template(tokenizer)
            return tokenizer
    tokenizer.chat_template = template
    return tokenizer


def forms(tokenizer, template):
    """Yield the ways to complete a template, those that change least first.

    "…" → "{% set enable_thinking = false %}…", the same with an end, with an opening, …
    """
    day = SAME_DAY if "strftime_now" in template else ""
    thinking = THINKING if "enable_thinking" in template else [""]
    for before, end in product(thinking, ["", END]):
        form = day + before + template + end
        yield form
        tokenizer.chat_template = form
        with suppress(Exception):
            yield form + OPENING % json.dumps(opening(tokenizer), ensure_ascii=False)


def opening(tokenizer):
    """Return what the template writes between a prompt and its reply: "<|channel|>final…"."""
    chat = tokenizer.apply_chat_template([*PROMPTS[0], ASSISTANT], tokenize=False)
    prompt = tokenizer.apply_chat_template(PROMPTS[0], tokenize=False, add_generation_prompt=True)
    if not chat.startswith(prompt):
        raise ValueError("the prompt is not the beginning of the chat")
    return chat.removeprefix(prompt).split(ASSISTANT["content"])[0]


def check_template(tokenizer):
    """Raise an error with the reason if replies cannot be learned with this template."""
    for prompt, reply in product(PROMPTS, REPLIES):
        chat = [*prompt, {"role": "assistant", "content": reply}]
        tokens, start = encode(tokenizer, chat)
        written = tokenizer.decode(tokens[start:])
        if not written.lstrip().startswith(reply):
            raise ValueError(f"the chat template writes {written!a} for the reply {reply!a}")
        if not tokenizer.eos_token_ids.intersection(tokens[start:]):
            raise ValueError("the chat template does not mark the end of a reply")


def shadow(base, folder):
    """Make a folder of links to the files of a base model, with the template of load_tokenizer().

    It stands in tokenizer_config.json alone: mlx-lm and llama.cpp look in different places first.
    """
    base, folder = Path(base), Path(folder)
    template = load_tokenizer(base).chat_template
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = base / "tokenizer_config.json"
    ours = {"chat_template.jinja", "chat_template.json", config.name}
    for file in base.iterdir():
        if file.is_file() and file.name not in ours:
            (folder / file.name).symlink_to(file.resolve())
    settings = json.loads(config.read_bytes()) if config.is_file() else {}
    (folder / config.name).write_text(json.dumps(settings | {"chat_template": template}), "utf-8")


if __name__ == "__main__":
    shadow(*sys.argv[1:])
