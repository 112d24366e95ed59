"""How large a base model is, how much memory it takes to train it, and how much there is."""

import models  # noqa: F401 (it checks Python and the packages first)

import json
import os
from types import SimpleNamespace

import mlx.core as mx
import safetensors


def sizes_of(base):
    """Return the sizes of the base model in a folder; raise an error if it is not whole.

    {"num_hidden_layers": 34, "hidden_size": 2560, …} → layers=34, hidden=2560, inner=10240, …
    """
    config = json.loads((base / "config.json").read_bytes())
    if "model_file" in config:
        raise ValueError("it brings code of its own, which is never run")
    text = config.get("text_config", config)
    inner = text.get("intermediate_size") or 4 * text["hidden_size"]
    return SimpleNamespace(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        inner=max(inner) if isinstance(inner, list) else inner,  # one for each layer
        vocabulary=text.get("vocab_size") or 262208,
        weights=bytes_of_weights(base),
    )


def bytes_of_weights(base):
    """Return the size of all files of weights, each of which must be whole."""
    names = {"model.safetensors"}
    index = base / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    for name in names:
        safetensors.safe_open(base / name, "numpy")  # raises an error where a file is cut off
    return sum((base / name).stat().st_size for name in names)


def memory_for_mlx():
    """Return the bytes that MLX may use: of a Mac's memory, of a card's, or of the machine's."""
    info = mx.device_info()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return info.get("max_recommended_working_set_size") or info.get("total_memory") or machine


def memory_to_train(s, size, longest):
    """Return the bytes at the peak, fitted to what tests/benchmarks/memory.py measured.

    A matrix trains RANK x (inputs + outputs) numbers; a layer has four for the attention, here as
    if they were square, and three behind it. An update takes 26 bytes a trained number; each token
    of a batch 8 bytes a word of the vocabulary, and what the layers keep for the way back.
    """
    layers = size.layers if s.NUM_LAYERS < 0 else s.NUM_LAYERS
    layer = 8 * size.hidden + 3 * (size.hidden + size.inner)
    numbers = s.RANK * (layers * layer + s.EMBEDDINGS * (size.vocabulary + size.hidden))
    width = 4 * size.hidden + 3 * size.inner
    kept = 0 if s.GRAD_CHECKPOINT else 2 * (layers + size.layers) * width
    token = numbers / 20 + 8 * size.vocabulary + kept
    return 5e8 + size.weights + 26 * numbers + s.BATCH_SIZE * longest * token


def memory_to_fuse(here, whole):
    """Return the bytes at the peak: mlx_lm.fuse holds the base and the 16-bit model at once."""
    return 1.1 * (here + whole)  # measured: 1.06 times their sum


def size_at_16_bits(base):
    """Return (what the weights of a base take, what they take when they are not quantized)."""
    here = bytes_of_weights(base)
    quantized = json.loads((base / "config.json").read_bytes()).get("quantization")
    if not quantized:
        return here, here
    # A group of weights also has a scale and a bias, of 16 bits each.
    return here, here * 16 / (quantized["bits"] + 32 / quantized["group_size"])
