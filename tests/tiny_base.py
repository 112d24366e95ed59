"""Build a tiny base model, offline and in seconds, to try the guide without a download.

    python tests/tiny_base.py             # models/base/tiny-gemma-3
    python tests/tiny_base.py --bits 4    # also models/base/tiny-gemma-3-4bit

It has the architecture, the chat template and the files of Gemma 3, 420,000 seeded random weights,
and a BPE tokenizer trained on data/raw/messages_sample.json. It knows no language: it is for trying
the steps, not for chatting. An existing model is replaced. Exit codes: 0 done, 2 wrong usage.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten
    from mlx_lm import convert
    from mlx_lm.models.gemma3_text import Model, ModelArgs
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
except ImportError as error:
    sys.exit(f"error: {error}. FIX: source venv/bin/activate (see README.md, Install)")

ROOT = Path(__file__).resolve().parent.parent
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
CONFIG = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,  # gemma3_text needs at least sliding_window_pattern layers
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 1536,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "max_position_embeddings": 4096,
    "bos_token_id": SPECIAL.index("<bos>"),
    "eos_token_id": [SPECIAL.index("<eos>"), SPECIAL.index("<end_of_turn>")],
    "tie_word_embeddings": True,
    "torch_dtype": "float32",  # bfloat16 and float16 products are many times slower on a CPU
}
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages -%}
<start_of_turn>{{ "model" if message.role == "assistant" else message.role }}
{{ message.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def train_tokenizer(raw, vocab_size):
    """Return a byte-level BPE tokenizer, to which no text is unknown, trained on the file `raw`."""
    texts = (
        m
        for entry in json.loads(raw.read_text("utf-8"))
        for m in [*entry["previous_messages"], entry["message"]]
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    return tokenizer


def random_weights(seed=0):
    """Return {name: float32 array}: normal, with deviation 1/sqrt(input size).

    Norms are 0, because Gemma adds 1 to them.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    parameters = tree_flatten(Model(ModelArgs.from_dict(CONFIG)).parameters())
    for name, shape in sorted((name, values.shape) for name, values in parameters):
        values = rng.normal(0, shape[-1] ** -0.5, shape) if len(shape) == 2 else np.zeros(shape)
        weights[name] = mx.array(values.astype(np.float32))
    return weights


def build(folder):
    """Write config, weights and tokenizer into the new folder `folder`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2), "utf-8")
    mx.save_safetensors(
        str(folder / "model.safetensors"), random_weights(), metadata={"format": "mlx"}
    )
    train_tokenizer(ROOT / "data/raw/messages_sample.json", CONFIG["vocab_size"]).save(
        str(folder / "tokenizer.json")
    )
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2), "utf-8")


def replace(folder, make):
    """Let `make(path)` write beside `folder`, then put the result in its place."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    print(f"wrote {folder.relative_to(ROOT)}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bits", type=int, choices=[2, 3, 4, 5, 6, 8], help="also build a base quantised to this"
    )
    bits = parser.parse_args().bits
    base = ROOT / "models/base/tiny-gemma-3"
    replace(base, build)
    if bits:
        replace(
            base.with_name(f"{base.name}-{bits}bit"),
            lambda path: convert(str(base), str(path), quantize=True, q_bits=bits, q_group_size=64),
        )


if __name__ == "__main__":
    main()
