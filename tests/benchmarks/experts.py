"""Is it worth to adapt the experts of a mixture? Loss and size of the adapter, with and without.

    python tests/benchmarks/experts.py LOG.jsonl

LOG is a log as data/raw/messages_VERSION.jsonl, in another language than the sample chat. A small
Qwen3 MoE (8 experts, 2 for each byte) learns it from scratch, byte by byte; then an adapter learns
the sample chat by the recipe of fine_tune.sh, and is scored on the last fifth of that. Prints a
line for each choice of what is adapted:

    attention, embeddings              0.08 M  3.428 → 2.585 nats a byte
"""

# ruff: noqa: E402 (our own modules are found from the root)
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from models.adapted import make_model
from models.common import ROOT, learning_rate

import argparse
import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import build_schedule, linear_to_lora_layers

CONFIG = {
    "model_type": "qwen3_moe", "vocab_size": 256, "hidden_size": 96, "num_hidden_layers": 3,
    "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}  # fmt: skip
BLOCK = 128  # bytes in a row
ATTENTION = [*(f"self_attn.{name}_proj" for name in "qkvo"), "model.embed_tokens"]
EXPERTS = [f"mlp.switch_mlp.{name}_proj" for name in ("gate", "up", "down")]
CHOICES = {  # what is adapted, and the rank
    "attention, embeddings": (ATTENTION, 32),
    "attention, embeddings, experts": (ATTENTION + EXPERTS, 32),
    "the same at rank 8": (ATTENTION + EXPERTS, 8),
}


def blocks_of(messages):
    """Return messages as rows of BLOCK + 1 bytes."""
    text = "\n".join(message["message"] for message in messages)
    data = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    usable = len(data) // (BLOCK + 1) * (BLOCK + 1)
    return data[:usable].reshape(-1, BLOCK + 1)


def loss_of(model, rows):
    logits = model(rows[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, rows[:, 1:], reduction="mean")


def train(model, blocks, optimizer, batches, size):
    """Train on so many random batches; print the mean loss of every hundred."""
    step, draw, losses = nn.value_and_grad(model, loss_of), np.random.default_rng(0), []
    model.train()
    for batch in range(1, batches + 1):
        rows = mx.array(blocks[draw.integers(0, len(blocks), size)])
        loss, gradients = step(model, rows)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
        if batch % 100 == 0:
            print(f"{batch:6}  {np.mean(losses[-100:]):.3f}", file=sys.stderr, flush=True)
    model.eval()


def score(model, blocks):
    parts = [blocks[start : start + 16] for start in range(0, len(blocks), 16)]
    return sum(loss_of(model, mx.array(part)).item() * len(part) for part in parts) / len(blocks)


def adapt(weights, keys, rank, blocks, batches):
    """Train an adapter as fine_tune.sh does; return the model and the size of the adapter."""
    model = make_model(CONFIG)
    model.update(weights)
    mx.random.seed(0)
    parameters = {"rank": rank, "scale": 10.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, -1, parameters)
    rate = learning_rate(CONFIG["hidden_size"])
    line = {"name": "linear_schedule", "arguments": [rate, 0.0, batches - 10], "warmup": 10}
    adam = optim.Adam(learning_rate=build_schedule(line), bias_correction=True)
    train(model, blocks, adam, batches, size=2)
    return model, sum(values.size for _, values in tree_flatten(model.trainable_parameters()))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("--batches", type=int, default=1500, help="of 8 rows, to make the base")
    s = parser.parse_args()

    base_rows = blocks_of(map(json.loads, s.log.read_text("utf-8").splitlines()))
    chat = blocks_of(json.loads((ROOT / "data/raw/messages_sample.json").read_bytes()))
    fifth = len(chat) // 5
    learned, held_out = chat[:-fifth], chat[-fifth:]
    print(f"{len(base_rows)} rows for the base, {len(learned)} to adapt it, {fifth} to score")
    mx.random.seed(0)
    base = make_model(CONFIG)
    base.unfreeze()
    train(base, base_rows, optim.AdamW(optim.cosine_decay(2e-3, s.batches)), s.batches, size=8)
    before = score(base, held_out)
    for name, (keys, rank) in CHOICES.items():
        batches = len(learned) // 2  # one epoch
        model, numbers = adapt(base.parameters(), keys, rank, learned, batches)
        after = score(model, held_out)
        print(
            f"{name:32} {numbers / 1e6:6.2f} M  {before:.3f} → {after:.3f} nats a byte", flush=True
        )


if __name__ == "__main__":
    main()
