"""Is it worth to adapt the experts of a mixture? Memory and loss, with and without them.

    python tests/benchmarks/experts.py --base models/base/SmolLM2-135M-Instruct-4bit --version v1

A dense Llama becomes a mixture with real weights: each expert is a copy of its MLP, and a random
router sends a token to two of them. Before training the mixture computes what the dense model does;
each expert then learns from its own share of the tokens. The recipe is that of fine_tune.sh. Prints
a line for each choice of what is adapted, and for the dense model:

    attention, embeddings                4.2 M    3.10 GB    31 s  loss 4.552 → 3.640
"""

# ruff: noqa: E402 (our own modules are found from the root)
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from models.common import learning_rate, read_rows
from models.completion_loss import encode, loss_of_replies

import argparse
import contextlib
import io
import json
import shutil
import tempfile
import time

import mlx.core as mx
import mlx.optimizers as optim
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import build_schedule, linear_to_lora_layers

ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = ["gate_proj", "up_proj", "down_proj"]
CHOICES = {
    "attention, embeddings": ATTENTION,
    "attention, embeddings, experts": [
        *ATTENTION,
        *(f"block_sparse_moe.switch_mlp.{name}" for name in MLP),
    ],
    "the dense model, all": [*ATTENTION, *(f"mlp.{name}" for name in MLP)],
}


def make_mixture(dense, folder, experts):
    """Write a Mixtral whose experts are copies of the MLPs of a Llama.

    model.layers.0.mlp.up_proj.weight (1536, 72)
        → model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight (8, 1536, 72)
    """
    config = json.loads((dense / "config.json").read_bytes())
    weights = {}
    for name, values in mx.load(str(dense / "model.safetensors")).items():
        if ".mlp." in name:
            name = name.replace(".mlp.", ".block_sparse_moe.switch_mlp.")
            values = mx.stack([values] * experts)
        weights[name] = values
    mx.random.seed(0)
    for layer in range(config["num_hidden_layers"]):
        router = mx.random.normal((experts, config["hidden_size"])) * config["hidden_size"] ** -0.5
        dtype = weights["model.norm.weight"].dtype
        weights[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router.astype(dtype)
    config |= {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": 2}
    for file in dense.glob("*token*"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def measure(base, keys, rows, valid, rank, iters):
    """Train as fine_tune.sh does; return numbers, peak, seconds, loss and the one before."""
    mx.clear_cache()
    model, _ = mlx_lm.load(str(base))
    before = loss_of_replies(model, valid)
    model.freeze()
    lora = {"rank": rank, "scale": 10.0, "dropout": 0.0, "keys": [*keys, "model.embed_tokens"]}
    mx.random.seed(0)
    linear_to_lora_layers(model, -1, lora)
    numbers = sum(values.size for _, values in tree_flatten(model.trainable_parameters()))
    rate = learning_rate(model.args.hidden_size)
    line = {"name": "linear_schedule", "arguments": [rate, 0.0, max(1, iters - 10)], "warmup": 10}
    adam = optim.Adam(learning_rate=build_schedule(line), bias_correction=True)
    started = time.time()
    mx.reset_peak_memory()
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        settings = TrainingArgs(
            batch_size=2,
            iters=iters,
            steps_per_save=iters + 1,
            max_seq_length=1024,
            adapter_file=f"{folder}/adapters.safetensors",
        )
        train(model, adam, [(tokens, 0) for tokens, _ in rows], args=settings)
    peak, seconds = mx.get_peak_memory(), time.time() - started
    model.eval()
    return numbers, peak, seconds, loss_of_replies(model, valid), before


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="a dense Llama")
    parser.add_argument("--version", default="v1", help="data/for_train/VERSION")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--iters", type=int, default=300)
    parser.add_argument("--valid-rows", type=int, default=200)
    s = parser.parse_args()

    _, tokenizer = mlx_lm.load(str(s.base), lazy=True)
    data = ROOT / "data/for_train" / s.version
    train_chats, chats = (
        read_rows(data / f"{name}.jsonl", "python build_train.py") for name in ("train", "valid")
    )
    every = max(1, len(train_chats) // (2 * s.iters))  # rows of all lengths
    rows = [encode(tokenizer, chat) for chat in train_chats[::every]]
    valid = [encode(tokenizer, chat) for chat in chats[: s.valid_rows]]
    with tempfile.TemporaryDirectory() as folder:
        make_mixture(s.base, Path(folder), s.experts)
        for name, keys in CHOICES.items():
            base = s.base if "dense" in name else folder
            result = measure(base, keys, rows, valid, s.rank, s.iters)
            numbers, peak, seconds, loss, before = result
            print(
                f"{name:32} {numbers / 1e6:7.1f} M  {peak / 1e9:6.2f} GB  {seconds:4.0f} s"
                f"  loss {before:.3f} → {loss:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
