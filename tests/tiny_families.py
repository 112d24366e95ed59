"""Tiny base models with random weights, of every family that people use, to try the guide with.

    python tests/tiny_families.py qwen3_5 lfm2    # models/base/tiny-qwen3_5, models/base/tiny-lfm2

What differs between families is the names and kinds of their layers, and their chat templates.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.adapted import make_model

import mlx.core as mx
from mlx_lm.utils import save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent

# ---- chat templates, reduced to what they are tested for -----------------------------------------
TURNS = """{% for turn in messages %}<|im_start|>{{ turn.role }}
{{ turn.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As in Qwen 3.5 and Nemotron 3: a prompt asks for a thought, and the last reply has an empty one.
THINKS = """{% for turn in messages %}<|im_start|>{{ turn.role }}
{% if loop.last and turn.role == "assistant" %}<think>

</think>

{% endif %}{{ turn.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% if enable_thinking is defined and not enable_thinking %}

</think>

{% endif %}{% endif %}"""
# As in the large Gemma 4: without thinking a prompt has an empty thought, and a reply has none.
THINKS_LOUD = """{% if enable_thinking %}<|think|>{% endif %}{% for turn in messages %}<|im_start|>
{{ turn.role }}
{{ turn.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>
assistant
{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"""
# As in Llama 3.2: the prompt holds the date.
DATE = '{{ strftime_now("%d %b %Y") }}\n' + TURNS
# As in GLM 4: the next turn is all that ends a reply.
NO_END = """{% for turn in messages %}<|{{ turn.role }}|>
{% if turn.role == "assistant" %}<think></think>
{% endif %}{{ turn.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% if enable_thinking is defined and not enable_thinking %}<think></think>
{% endif %}{% endif %}"""
# As in gpt-oss: the model writes which channel a reply goes to.
CHANNEL = """{{ strftime_now("%Y-%m-%d") }}{% for turn in messages %}<|im_start|>{{ turn.role }}
{% if turn.role == "assistant" %}<|channel|>final{% endif %}<|message|>{{ turn.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

SPECIAL = ["<eos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|think|>"]
SPECIAL += ["<|user|>", "<|assistant|>", "<|channel|>", "<|message|>"]
TEXT = "hi\nhello, how are you?\n\nyes, why?\n\nno, not today, tomorrow\n"

# ---- families: what their config has besides COMMON, and another template than TURNS -------------
# fmt: off
VOCABULARY = 320
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": False,
    "rms_norm_eps": 1e-6, "norm_eps": 1e-6, "layer_norm_epsilon": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 2048, "tie_word_embeddings": True,
}
MOE = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "norm_topk_prob": True, "rope_scaling": None,
    "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
GATED_DELTA = {
    "full_attention_interval": 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.5,
}
MAMBA = {
    "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_n_heads": 8, "mamba_d_head": 16,
    "mamba_d_ssm": 128, "mamba_expand": 2, "ssm_state_size": 16, "mamba_d_state": 16,
    "conv_kernel": 4, "mamba_d_conv": 4, "n_groups": 1, "mamba_n_groups": 1,
    "mamba_proj_bias": False, "mamba_conv_bias": False, "mlp_bias": False, "use_bias": False,
    "use_conv_bias": False, "time_step_limit": [0.0, 100.0],
}
LATENT = {  # multi-head latent attention
    "kv_lora_rank": 16, "q_lora_rank": 16, "v_head_dim": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
}
SLIDING = {
    "sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
PER_LAYER = SLIDING | {
    "num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 64, "final_logit_softcapping": 30.0,
}
GEMMA_3N = PER_LAYER | {
    "model_type": "gemma3n", "rope_local_base_freq": 10000.0, "laurel_rank": 8,
    "activation_sparsity_pattern": [0.5, 0.5], "altup_num_inputs": 2, "altup_coef_clip": 1.0,
    "altup_correct_scale": True, "altup_active_idx": 0,
}
GRANITE = {
    "embedding_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0,
    "residual_multiplier": 1.0, "mlp_bias": False,
}
LFM2 = {
    "block_dim": 64, "block_ff_dim": 128, "block_multiple_of": 16, "conv_bias": False,
    "conv_L_cache": 3, "full_attn_idxs": [1], "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}
KIMI = {
    "model_max_length": 2048,
    "linear_attn_config": {
        "num_heads": 4, "head_dim": 16, "kda_layers": [1], "full_attn_layers": [2],
    },
}


def inside(**text):
    """Return a config as those of models that can see have it: all of it in text_config."""
    return {"text_config": COMMON | text}


FAMILIES = {
    "llama": ({}, DATE),
    "qwen2": ({}, TURNS),
    "qwen3": ({}, THINKS),
    "gemma2": (SLIDING | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, TURNS),
    "gemma3_text": (SLIDING, TURNS),
    "gemma3n": (inside(**GEMMA_3N), TURNS),
    "gemma4": (inside(**PER_LAYER, model_type="gemma4_text", global_head_dim=16), THINKS_LOUD),
    "mistral3": (inside(model_type="llama"), DATE),
    "phi3": ({}, TURNS),
    "smollm3": ({"no_rope_layer_interval": 4}, THINKS),
    "olmo2": ({}, TURNS),
    "olmo3": (SLIDING, TURNS),
    "granite": (GRANITE, TURNS),
    "exaone": ({"num_layers": 2}, TURNS),
    "exaone4": (SLIDING | {"sliding_window_pattern": "LG", "rope_scaling": None}, THINKS),
    "internlm3": ({"bias": False, "qkv_bias": False}, TURNS),
    "seed_oss": ({"attention_out_bias": False, "mlp_bias": False}, TURNS),
    "minicpm": ({"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 1.0,
        "tie_word_embeddings": False}, TURNS),
    "cohere2": (SLIDING | {"layer_norm_eps": 1e-5, "logit_scale": 1.0}, TURNS),
    "nanochat": ({}, TURNS),
    "apertus": ({"mlp_bias": False, "post_norm": True, "qk_norm": True}, TURNS),
    "glm4": ({"partial_rotary_factor": 0.5}, NO_END),
    "ernie4_5": ({"use_bias": False}, TURNS),
    "lfm2": (LFM2, TURNS),
    "falcon_h1": (MAMBA | {"lm_head_multiplier": 1.0, "embedding_multiplier": 1.0}, TURNS),
    "mamba2": (MAMBA | {"num_heads": 4, "state_size": 16, "expand": 1, "time_step_rank": "auto"},
        TURNS),
    "nemotron_h": (MAMBA | {"hybrid_override_pattern": ["M", "*", "-"], "num_hidden_layers": 3},
        THINKS),
    "granitemoehybrid": (GRANITE | MOE | MAMBA | {"layer_types": ["mamba", "attention"]}, TURNS),
    "qwen3_5": (inside(**GATED_DELTA), THINKS),
    "qwen3_next": (MOE | GATED_DELTA, THINKS),
    "qwen3_5_moe": (inside(**MOE, **GATED_DELTA), THINKS),
    "kimi_linear": (MOE | LATENT | KIMI, TURNS),
    "qwen3_moe": (MOE, THINKS),
    "gpt_oss": (MOE | SLIDING, CHANNEL),
    "glm4_moe": (MOE | {"use_qk_norm": True, "partial_rotary_factor": 0.5}, NO_END),
    "lfm2_moe": (MOE | LFM2 | {"num_dense_layers": 1, "use_expert_bias": True}, TURNS),
    "mixtral": (MOE, TURNS),
    "olmoe": (MOE, TURNS),
    "deepseek_v3": (MOE | LATENT, TURNS),
    "llama4_text": ({"intermediate_size_mlp": 128, "no_rope_layers": [1, 0], "use_qk_norm": True},
        DATE),
}
# fmt: on
CANNOT_BE_ADAPTED = {"bitnet": ({}, TURNS)}


def train_tokenizer():
    """Return a byte-level BPE tokenizer, to which no text is unknown; two line ends are a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 2, trainer)
    return tokenizer


def config_of(family, **changes):
    """Return the config of a family; the changes go where its sizes stand."""
    config = COMMON | (FAMILIES | CANNOT_BE_ADAPTED)[family][0] | {"model_type": family}
    if "text_config" in config:
        return config | {"text_config": config["text_config"] | changes}
    return config | changes


def build(family, folder):
    """Write a base model of this family into a folder."""
    config = config_of(family) | {"eos_token_id": [0, SPECIAL.index("<|im_end|>")]}
    mx.random.seed(0)
    save_model(folder, make_model(config))
    (folder / "config.json").write_text(json.dumps(config))
    train_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "chat_template": (FAMILIES | CANNOT_BE_ADAPTED)[family][1],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        build(name, ROOT / f"models/base/tiny-{name}")
