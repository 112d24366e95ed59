"""What is adapted, how large it is, and the memory that it takes; test_families.py has the rest."""

from models.adapted import look_at, make_model, matrices, read_model
from models.memory import memory_to_train

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.nn as nn
import pytest
import tiny_families

TESTS = Path(__file__).parent


def test_what_chooses_experts_is_not_adapted(tmp_path):
    tiny_families.build("qwen3_next", tmp_path / "base")
    model, config = read_model(tmp_path / "base")
    names = set(matrices(model.layers[0]))
    assert {"mlp.gate", "mlp.shared_expert_gate"}.isdisjoint(names)
    assert {"mlp.switch_mlp.up_proj", "mlp.shared_expert.up_proj"} < names
    assert {"linear_attn.in_proj_qkvz", "linear_attn.out_proj"} < names
    keys = look_at(model, config, embeddings=False).keys
    assert "self_attn.q_proj" in keys
    assert not any("embed" in key or key.split(".")[-1] == "gate" for key in keys)


def test_a_base_whose_layers_are_none_that_mlx_lm_adapts_is_refused(tmp_path):
    tiny_families.build("bitnet", tmp_path / "base")
    with pytest.raises(ValueError, match="adapts 0 of 14 matrices, and no BitLinear"):
        look_at(*read_model(tmp_path / "base"))


def test_of_several_embeddings_those_of_the_tokens_are_adapted():
    keys = look("gemma4").keys
    assert [key for key in keys if "embed" in key] == ["language_model.model.embed_tokens"]


def test_a_quantized_base_has_the_same_sizes():
    config = tiny_families.config_of("qwen3_moe")
    model = make_model(config)
    full = look_at(model, config)
    nn.quantize(model, group_size=32, bits=4)
    assert vars(look_at(model, config).blocks[0]) == vars(full.blocks[0])


def look(family, **changes):
    """Return what look_at() tells of a model of this family that is on no disk."""
    config = tiny_families.config_of(family, **changes)
    return look_at(make_model(config), config)


def test_a_token_goes_through_some_of_the_experts_that_are_all_adapted():
    size = look("qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
    attention = (64 + 64) + 2 * (64 + 32) + (64 + 64)
    assert size.blocks[0].adapted == attention + 8 * 3 * (64 + 32)
    assert size.blocks[0].used == attention + 2 * 3 * (64 + 32)


def test_a_deep_model_does_not_overflow_the_stack():
    look_often = """if True:
        from test_adapted import look
        for _ in range(3):
            look("llama", num_hidden_layers=150)
    """
    command = ["bash", "-c", 'ulimit -s 600; "$0" -c "$1"', sys.executable, look_often]
    folders = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": folders})


def memory(size, weights, rows, tokens, **changes):
    size.weights = weights * 1e9
    settings = {"RANK": 32, "NUM_LAYERS": -1, "EMBEDDINGS": 1, "GRAD_CHECKPOINT": 0}
    s = SimpleNamespace(**settings | {"BATCH_SIZE": rows} | changes)
    return memory_to_train(s, size, tokens) / 1e9


def test_recurrent_layers_take_most_of_the_memory():
    shape = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32}
    heads = {"linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    gated_delta = look("qwen3_5", **shape, **heads, full_attention_interval=4)
    assert [block.state for block in gated_delta.blocks[:4]] == [32 * 128 * 128] * 3 + [0]
    assert memory(gated_delta, 5.0, 1, 1024) == pytest.approx(154, rel=0.02)
    assert memory(gated_delta, 5.0, 1, 1024, GRAD_CHECKPOINT=1) == pytest.approx(21, rel=0.1)
    mamba = look("nemotron_h", mamba_num_heads=64)
    assert [block.state for block in mamba.blocks] == [64 * 2 * 256, 0, 0]


# Measured by tests/benchmarks/memory.py: rows, tokens, settings besides the defaults, GB.
MEASURED = {
    "4B": [(2, 512, {}, 16.9), (1, 512, {"RANK": 8, "GRAD_CHECKPOINT": 1}, 4.3)],
    "12B": [(2, 512, {}, 34.6), (1, 512, {"NUM_LAYERS": 16, "EMBEDDINGS": 0}, 15.3)],
    "27B": [(2, 512, {}, 61.2), (1, 256, {}, 29.7), (1, 1024, {"GRAD_CHECKPOINT": 1}, 33.3)],
}
SHAPES = {"4B": (2560, 10240, 34, 8, 4, 256, 2.2), "12B": (3840, 15360, 48, 16, 8, 256, 6.6)}
SHAPES["27B"] = (5376, 21504, 62, 32, 16, 128, 15.2)


@pytest.mark.parametrize("name", SHAPES)
def test_the_memory_of_gemma_3_is_reckoned_within_15_percent(name):
    hidden, inner, blocks, heads, key_heads, head, weights = SHAPES[name]
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": head}
    size = look("gemma3_text", vocab_size=262144, **shape)
    for rows, tokens, changes, measured in MEASURED[name]:
        assert memory(size, weights, rows, tokens, **changes) == pytest.approx(measured, rel=0.15)
