"""How large a base model is, how much memory it takes to train it, and how much there is."""

import json
import os
from types import SimpleNamespace

import mlx.core as mx
import safetensors


def bytes_of_weights(base):
    """Return the size of all files of weights, each of which must be whole."""
    names = {"model.safetensors"}
    index = base / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    for name in names:
        safetensors.safe_open(base / name, "numpy")  # an error if the file is cut off
    return sum((base / name).stat().st_size for name in names)


def memory_for_mlx():
    """Return the bytes that MLX may use: of a Mac's memory, of a card's, or of the machine's."""
    info = mx.device_info()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return info.get("max_recommended_working_set_size") or info.get("total_memory") or machine


def memory_to_train(s, size, longest):
    """Return the bytes at the peak, fitted to Gemma 3 with tests/benchmarks/memory.py.

    `size` comes from look_at() in models/adapted.py, and has the bytes of the weights too.

    Each adapted matrix has RANK x (inputs + outputs) numbers to train, of 26 bytes each. A token of
    a batch takes 8 bytes for each word of the vocabulary, and what the blocks keep for the backward
    pass: with GRAD_CHECKPOINT only that of one block, which matters if the block has a state.
    Qwen2.5 at 2 x 512 tokens took less: 4.8 GB instead of 5.6 at 0.5B, 7.9 instead of 9.6 at 1.5B.
    """
    blocks = size.blocks
    trained = blocks[-s.NUM_LAYERS :] if s.NUM_LAYERS > 0 else blocks
    used = sum(block.used for block in trained)
    largest_state = max(block.state for block in blocks)
    kept = 20 * largest_state
    if not s.GRAD_CHECKPOINT:
        kept = 1.6 * (used + sum(block.used for block in blocks))
        kept += 10 * (largest_state + sum(block.state for block in blocks))
    embeddings = s.EMBEDDINGS * (size.vocabulary + size.hidden)
    numbers = s.RANK * (embeddings + sum(block.adapted for block in trained))
    token = s.RANK * (embeddings + used) / 20 + 8 * size.vocabulary + kept
    return 5e8 + size.weights + 26 * numbers + s.BATCH_SIZE * longest * token


def changes_to_fit(s, size, longest, allowed):
    """Return the changes of the settings that make a training fit into `allowed` bytes.

    {} if it fits as it is, {"GRAD_CHECKPOINT": 1, "BATCH_SIZE": 1}, …, None if nothing helps.
    """
    changes = {}
    few_layers = {"NUM_LAYERS": min(8, len(size.blocks)), "EMBEDDINGS": 0}
    rank = {"RANK": min(8, s.RANK)}
    for change in {}, {"GRAD_CHECKPOINT": 1}, {"BATCH_SIZE": 1}, rank, few_layers:
        changes |= change
        changed = SimpleNamespace(**vars(s) | changes)
        if memory_to_train(changed, size, longest) < allowed:
            return changes
    return None


def memory_to_fuse(base_size, full_size):
    """Return the bytes at the peak: mlx_lm.fuse holds the base and the 16-bit model at once."""
    return 1.1 * (base_size + full_size)  # measured: 1.06 times their sum


def sizes_to_fuse(base):
    """Return (the bytes of the weights of a base, their bytes at 16 bits)."""
    base_size = bytes_of_weights(base)
    quantized = json.loads((base / "config.json").read_bytes()).get("quantization")
    if not quantized:
        return base_size, base_size
    # Each group of weights also has a scale and a bias of 16 bits.
    return base_size, base_size * 16 / (quantized["bits"] + 32 / quantized["group_size"])
