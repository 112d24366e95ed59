"""Say which base models this machine can train, before one is downloaded.

    python -m models.which_model

memory           the smallest Mac that trains it well, with GRAD_CHECKPOINT=1 at most
on this machine  it trains with the defaults ("yes"), with these settings ("tight"), or not ("no")

The memory is that of fine_tune.sh, computed from the shape of a model for rows of 512 tokens; chat
seldom has longer ones. Any other chat model of mlx-community that mlx-lm can load will do as well:
fine_tune.sh says how much of it is adapted and whether it fits before it loads it.
"""

from models.adapted import look_at, make_model
from models.check_training import SETTINGS
from models.memory import changes_to_fit, memory_for_mlx

from functools import cache
from types import SimpleNamespace

import mlx.core as mx

MACS = 8, 16, 24, 32, 48, 64, 96, 128  # gigabytes
TOKENS = 512

# Names on huggingface.co/mlx-community, gigabytes to download, family, and the values of KEYS in
# config.json. What else a family has there is in MORE, and what all have in COMMON.
KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
)  # fmt: skip
BASES = [
    ("gemma-3-1b-it-4bit", 0.7, "gemma3_text", (1152, 6912, 26, 4, 1, 256, 262144)),
    ("Llama-3.2-1B-Instruct-4bit", 0.7, "llama", (2048, 8192, 16, 32, 8, 64, 128256)),
    ("Llama-3.2-3B-Instruct-4bit", 1.8, "llama", (3072, 8192, 28, 24, 8, 128, 128256)),
    ("Qwen3-4B-Instruct-2507-4bit", 2.3, "qwen3", (2560, 9728, 36, 32, 8, 128, 151936)),
    ("gemma-3-text-4b-it-4bit", 2.2, "gemma3_text", (2560, 10240, 34, 8, 4, 256, 262144)),
    ("Qwen3.5-4B-MLX-4bit", 2.9, "qwen3_5", (2560, 9216, 32, 16, 4, 256, 248320)),
    ("Qwen3-8B-4bit", 4.6, "qwen3", (4096, 12288, 36, 32, 8, 128, 151936)),
    ("Qwen3.5-9B-MLX-4bit", 5.6, "qwen3_5", (4096, 12288, 32, 16, 4, 256, 248320)),
    ("gemma-3-text-12b-it-4bit", 7.2, "gemma3_text", (3840, 15360, 48, 16, 8, 256, 262144)),
    ("gpt-oss-20b-MXFP4-Q8", 12.1, "gpt_oss", (2880, 2880, 24, 64, 8, 64, 201088)),
    ("Mistral-Small-24B-Instruct-2501-4bit", 13.3, "llama", (5120, 32768, 40, 32, 8, 128, 131072)),
    ("gemma-3-text-27b-it-4bit", 15.2, "gemma3_text", (5376, 21504, 62, 32, 16, 128, 262144)),
    ("Qwen3-30B-A3B-Instruct-2507-4bit", 17.2, "qwen3_moe", (2048, 6144, 48, 32, 4, 128, 151936)),
    ("Llama-3.3-70B-Instruct-4bit", 39.7, "llama", (8192, 28672, 80, 64, 8, 128, 128256)),
]
MORE = {
    "gemma3_text": {"query_pre_attn_scalar": 256, "sliding_window_pattern": 6},
    "qwen3_5": {
        "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_num_key_heads": 16, "linear_value_head_dim": 128,
        "full_attention_interval": 4,
    },
    "gpt_oss": {"num_local_experts": 32, "num_experts_per_tok": 4},
    "qwen3_moe": {
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    },
}  # fmt: skip
COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768}
COMMON |= {"tie_word_embeddings": True}


def main():
    allowed = memory_for_mlx()
    here = closest_mac(allowed)
    print(f"this machine lets MLX use {allowed / 1e9:.1f} GB, as a Mac of {here} GB does")
    if mx.default_device() == mx.cpu:
        print("MLX finds no GPU here: what fits into the memory would still take days")
    print("\nmemory  base model                            download  adapts    on this machine")
    lines = sorted(line_of(*base, allowed) for base in BASES)
    for_here = [line for line in lines if line[0] <= here]
    larger = lines[len(for_here) :]
    for mac, _, line in for_here[::-1] + larger:  # the best for this machine first
        print(f"{mac:3} GB  {line}")
    print("\nnext    hf download mlx-community/NAME --local-dir models/base/NAME")


def usable(mac):
    """Return the bytes that macOS lets MLX use on a Mac of so many gigabytes."""
    return mac * 2**30 * (2 / 3 if mac <= 32 else 3 / 4)


def closest_mac(allowed):
    """Return the gigabytes of the largest Mac on which MLX may not use more than this."""
    return max([mac for mac in MACS if usable(mac) <= 1.01 * allowed], default=MACS[0])


@cache
def size_of_base(gigabytes, family, shape):
    """Return the sizes of a base that need not be on this disk."""
    text = COMMON | MORE.get(family, {}) | dict(zip(KEYS, shape, strict=True))
    config = text | {"model_type": family, "text_config": text}
    size = look_at(make_model(config), config)
    size.weights = gigabytes * 1e9
    return size


def line_of(name, gigabytes, family, shape, allowed):
    """Return (smallest Mac that trains it well, its download, the line to print).

    24, 4.6, "Qwen3-8B-4bit       4.6 GB  all       tight: GRAD_CHECKPOINT=1 BATCH_SIZE=1"
    """
    size = size_of_base(gigabytes, family, shape)
    s = SimpleNamespace(**{setting: default for setting, (_, _, default) in SETTINGS.items()})
    macs = [mac for mac in MACS if is_easy(changes_to_fit(s, size, TOKENS, usable(mac)))]
    changes = changes_to_fit(s, size, TOKENS, allowed)
    if changes is None or "NUM_LAYERS" in changes:  # a few layers alone learn too little
        verdict = "no"
    else:
        less = " ".join(f"{setting}={value}" for setting, value in changes.items())
        verdict = f"tight: {less}" if less else "yes"
    adapted, _, every = size.summary.partition(" matrices")[0].split()
    share = "all" if adapted == every else f"{adapted} of {every}"
    return macs[0], gigabytes, f"{name:36}  {gigabytes:5.1f} GB  {share:8}  {verdict}"


def is_easy(changes):
    return changes is not None and set(changes) <= {"GRAD_CHECKPOINT"}  # which only takes time


if __name__ == "__main__":
    main()
