"""Every family of base models: what is adapted, what a reply looks like, and the way to a talk.

tiny_families.py has their configs and chat templates.
"""

from models.adapted import look_at, read_model
from models.chat_template import load_model, shadow
from models.completion_loss import encode

import re
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import pytest
import tiny_families
from mlx.utils import tree_flatten
from mlx_lm import fuse, stream_generate
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import save_config

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes, why?"}]

# What cannot be adapted, and why; of all others every matrix is, and the embeddings are.
EXCEPTIONS = {
    "gemma3n": "24 of 28 matrices, and the embeddings",  # it reads two kinds past their layer,
    "seed_oss": "14 of 14 matrices; the embeddings cannot be adapted",  # and these the embeddings
    "llama4_text": "14 of 14 matrices; the embeddings cannot be adapted",
    "kimi_linear": "21 of 23 matrices, and the embeddings",  # one for each head, in a class of
    "deepseek_v3": "17 of 21 matrices, and the embeddings",  # their own
}


def train(base, adapter):
    """Train on one chat with mlx-lm's adapted layers, and save them as mlx_lm.lora does."""
    size = look_at(*read_model(base))
    model, tokenizer = load_model(base)
    model.freeze()
    parameters = {"rank": 8, "scale": 10.0, "dropout": 0.0, "keys": size.keys}
    linear_to_lora_layers(model, -1, parameters)
    model.train()
    tokens = mx.array([encode(tokenizer, CHAT)[0]])

    def loss(model):
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    step = nn.value_and_grad(model, loss)
    optimizer = optimizers.Adam(3e-3, bias_correction=True)
    for _ in range(60):
        _, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state)
    adapter.mkdir()
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    config = {"num_layers": -1, "lora_parameters": parameters}
    save_config(config, adapter / "adapter_config.json")


def reply(folder):
    """Return what a model says to "hi", and why it stops: "stop" at the end of a turn."""
    model, tokenizer = load_model(folder)
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True)
    parts = list(stream_generate(model, tokenizer, prompt, max_tokens=30))
    return "".join(part.text for part in parts), parts[-1].finish_reason


@pytest.fixture
def base(family, tmp_path):
    tiny_families.build(family, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_all_matrices_and_the_embeddings_are_adapted(family, base):
    summary = look_at(*read_model(base)).summary
    expected = EXCEPTIONS.get(family, r"(\d+) of \1 matrices, and the embeddings")
    assert re.fullmatch(expected, summary)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_a_fused_model_says_what_was_learned_without_tags_and_ends(family, base, monkeypatch):
    monkeypatch.chdir(base.parent)
    train(base, Path("adapter"))
    shadow(base, "shadow")
    arguments = ["--model", "shadow", "--adapter-path", "adapter", "--save-path", "fused"]
    monkeypatch.setattr(sys, "argv", ["mlx_lm.fuse", *arguments])
    fuse.main()
    assert reply("fused") == ("yes, why?", "stop")


BY_HAND = [
    pytest.param(family, marks=pytest.mark.faults)
    for family in ("nemotron_h", "lfm2", "qwen3_moe", "glm4_moe")
]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5", *BY_HAND])
def test_all_scripts_take_a_base_of_another_family(family, project, run):
    model = f"tiny-{family}"
    tiny_families.build(family, project / "models/base" / model)
    settings = {"MODEL": model, "ITERS": "3", "EVAL_EVERY": "3", "MAX_SEQ_LENGTH": "128"}
    for script, *arguments in [
        ("build_train.py", "--window", 2, "--max-seq-length", 128, "--valid-rows", 20),
        ("fine_tune.sh",),
        ("fuse.sh",),
        ("test_on_validation.py", "--replies", 2, "--max-tokens", 4),
        ("models/chat.py", "--max-tokens", 4),
    ]:
        result = run(project, script, *arguments, env=settings, input="are you there?\n")
        assert result.returncode == 0, result.stderr
