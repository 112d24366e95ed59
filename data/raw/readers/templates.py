"""Turns in a text, between the marks of a template: ChatML, Llama, Gemma, Alpaca, Q and A."""

import re

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


def turns_in(text):
    """Return the turns of a text in one of the templates of models."""
    for template in TEMPLATES:
        if found := template.findall(text):
            return [{"role": role.casefold(), "content": words.strip()} for role, words in found]
    found = list(INST.finditer(text)) or [ASKED_AND_ANSWERED.fullmatch(text)]
    turns = [turn for part in found if part for turn in part.groupdict().items()]
    return [{"role": role, "content": words.strip()} for role, words in turns if words]
