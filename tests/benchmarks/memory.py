"""Measure what fits: peak memory of training and fusing, beside what fine_tune.sh reckons.

    python tests/benchmarks/memory.py 1B 4B 12B 27B             training
    python tests/benchmarks/memory.py 1B 4B --fuse models/base/MODEL --folder /tmp    fusing

The models have the shapes of Gemma 3 and random 4-bit weights, drawn and quantised matrix by
matrix, so that 27B needs no more than its 4 bits. Training goes through mlx-lm's own
linear_to_lora_layers and train, on rows of random tokens that are all as long as said. Fusing runs
the commands of fuse.sh with the tokenizer of MODEL. A line (tab-separated) is printed, and goes to
--out, after each measurement:

    shape  what   batch  tokens  layers  checkpointing  rank  embeddings  peak_gb  reckoned_gb  …
    1B     train  2      512     -1      0              32    1           7.8      8.71         …

Set MLX_CUDA_USE_CUDNN_SDPA=0 on an NVIDIA GPU: attention is then computed in the same
way as in training on a Mac, which has no fused one for gradients.
"""

# ruff: noqa: E402 (our own modules are found from the root)
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from models.adapted import look_at
from models.memory import memory_to_train

import argparse
import contextlib
import io
import json
import shutil
import subprocess
import tempfile
import time
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers

KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "query_pre_attn_scalar",
)
SHAPES = {
    "1B": (26, 1152, 6912, 4, 1, 256, 512, 256),
    "4B": (34, 2560, 10240, 8, 4, 256, 1024, 256),
    "12B": (48, 3840, 15360, 16, 8, 256, 1024, 256),
    "27B": (62, 5376, 21504, 32, 16, 128, 1024, 168),
}
NAMES = ("batch", "tokens", "layers", "checkpointing", "rank", "embeddings")  # layers: -1 is all
SETTINGS = [  # the defaults first
    (2, 512, -1, 0, 32, 1), (2, 512, -1, 1, 32, 1), (1, 512, -1, 0, 32, 1), (1, 512, -1, 1, 32, 1),
    (1, 512, -1, 1, 8, 1), (1, 256, -1, 0, 32, 1), (1, 512, 16, 0, 32, 0), (2, 256, -1, 0, 32, 1),
    (1, 1024, -1, 1, 32, 1), (2, 512, -1, 0, 32, 0), (1, 512, 8, 0, 32, 0),
    (2, 1024, -1, 1, 32, 1), (4, 512, -1, 1, 32, 1), (4, 512, -1, 0, 32, 1),
    (2, 1024, -1, 0, 32, 1),
]  # fmt: skip
CONFIG = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "quantization": {"group_size": 64, "bits": 4},
    "torch_dtype": "bfloat16",
}


def config_of(shape):
    return CONFIG | dict(zip(KEYS, SHAPES[shape], strict=True))


def reckon(model, weights, batch, tokens, layers, checkpointing, rank, embeddings):
    """Return the bytes that fine_tune.sh reckons."""
    size = look_at(model, model.args.__dict__, embeddings)
    size.weights = weights
    s = SimpleNamespace(NUM_LAYERS=layers, GRAD_CHECKPOINT=checkpointing, RANK=rank)
    s.EMBEDDINGS, s.BATCH_SIZE = embeddings, batch
    return int(memory_to_train(s, size, tokens))


def build(shape):
    """Return a gemma3_text model of random 4-bit weights, drawn and quantised one by one."""
    model = gemma3_text.Model(gemma3_text.ModelArgs.from_dict(config_of(shape)))
    model.sanitize({})  # input and output embeddings are the same matrix
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=64, bits=4)  # nothing is computed yet
    for _, module in model.named_modules():
        if not module.children():
            mx.eval(module.parameters())
            mx.clear_cache()
    return model


def lora(model, rank, embeddings):
    """Return the lora_parameters of fine_tune.sh."""
    keys = look_at(model, model.args.__dict__, embeddings).keys
    return {"rank": rank, "scale": 10.0, "dropout": 0.0, "keys": keys}


def measure_training(model, batch, tokens, layers, checkpointing, rank, embeddings, iters=3):
    """Return the peak (bytes) and the seconds of the last iteration, or None if out of memory."""
    plain = gemma3_text.TransformerBlock.__call__
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 262144, tokens).tolist(), 0) for _ in range(batch)]
    clock = []

    class Callback:
        def on_train_loss_report(self, info):
            clock.append(1 / info["iterations_per_second"])

        def on_val_loss_report(self, info):
            pass

    model.freeze()
    plain_embeddings = model.model.embed_tokens
    linear_to_lora_layers(model, layers, lora(model, rank, embeddings))
    mx.eval(model.trainable_parameters())
    mx.clear_cache()
    mx.reset_peak_memory()
    try:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            settings = TrainingArgs(
                batch_size=batch,
                iters=iters,
                steps_per_report=1,
                steps_per_save=iters + 1,
                max_seq_length=tokens,
                adapter_file=f"{folder}/adapters.safetensors",
                grad_checkpoint=bool(checkpointing),
            )
            adam = optim.Adam(learning_rate=1e-4, bias_correction=True)
            train(model, adam, rows, args=settings, training_callback=Callback())
        return mx.get_peak_memory(), clock[-1]
    except (RuntimeError, MemoryError) as error:
        print(f"{type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return None
    finally:
        gemma3_text.TransformerBlock.__call__ = plain
        remove_lora_layers(model)
        model.model.embed_tokens = plain_embeddings
        mx.clear_cache()


def write(out, **line):
    text = "\t".join(f"{value}" for value in line.values())
    with out.open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write("\t".join(line) + "\n")
        file.write(text + "\n")
    print(text, flush=True)


def peak_of(command, *arguments):
    """Run an mlx_lm command in a process of its own; return its peak memory (bytes) and seconds."""
    code = f"import mlx.core as mx; from mlx_lm.{command} import main; main(); "
    code += "print(); print(mx.get_peak_memory())"
    started = time.time()
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:100], time.time() - started
    return int(done.stdout.split()[-1]), time.time() - started


def gigabytes(value):
    if isinstance(value, Path):
        value = sum(file.stat().st_size for file in value.glob("*.safetensors"))
    return f"{value / 1e9:.2f}" if isinstance(value, int) else value


def save_base_and_adapter(shape, tokenizer, base, adapter):
    """Save a base of this shape, with another tokenizer, and an adapter that is untrained."""
    for path in base, adapter:
        path.mkdir(parents=True)
    for file in tokenizer.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, base)
    config = json.loads((tokenizer / "config.json").read_text())
    ends = {key: config[key] for key in ("eos_token_id", "bos_token_id") if key in config}
    (base / "config.json").write_text(json.dumps(config_of(shape) | ends))
    model = build(shape)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "mlx"})

    settings = {"model": str(base), "fine_tune_type": "lora", "num_layers": -1}
    settings["lora_parameters"] = lora(model, 32, True)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    linear_to_lora_layers(model, -1, settings["lora_parameters"])
    model.freeze()
    model.unfreeze(keys=["lora_a", "lora_b"], strict=False)
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)


def measure_fusing(shape, tokenizer, folder, out):
    """Fuse a base and an adapter of this shape at the base's bits, at 16, and then to 8."""
    base, adapter = folder / f"{shape}-base", folder / f"{shape}-adapter"
    save_base_and_adapter(shape, tokenizer, base, adapter)
    mx.clear_cache()
    made = ["--model", base, "--adapter-path", adapter, "--save-path"]
    plain, exact, eight = (folder / f"{shape}-{name}" for name in ("plain", "16", "8"))
    convert = ["convert", "-q", "--q-bits", 8, "--hf-path", exact, "--mlx-path"]
    for what, result, spent, *command in (
        ("fuse base", plain, plain, "fuse", *made, plain),
        ("fuse 16", exact, base, "fuse", *made, exact, "--dequantize"),
        ("16 to 8", eight, exact, *convert, eight),
    ):
        peak, seconds = peak_of(*command)
        line = dict.fromkeys(NAMES, "") | {"peak_gb": gigabytes(peak), "reckoned_gb": ""}
        line |= {"seconds": f"{seconds:.1f}", "disk_gb": gigabytes(result)}
        write(out, shape=shape, what=what, **line)
        shutil.rmtree(spent, ignore_errors=True)  # 27B would fill 100 GB else
    for path in adapter, eight:
        shutil.rmtree(path, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shapes", nargs="+", choices=SHAPES)
    add("--fuse", type=Path, metavar="MODEL", help="measure fusing, with the tokenizer of this")
    add("--folder", type=Path, default=Path("/tmp"), help="for the fused models: 4 to 85 GB")
    add("--settings", nargs="+", type=int, default=range(len(SETTINGS)), help="their numbers")
    add("--out", type=Path, default=Path("memory.tsv"))
    s = parser.parse_args()
    if s.fuse and not (s.fuse / "config.json").is_file():
        sys.exit(f"error: there is no {s.fuse}/config.json. FIX: python tests/tiny_base.py")
    print(mx.device_info(), flush=True)
    for shape in s.shapes:
        if s.fuse:
            measure_fusing(shape, s.fuse, s.folder, s.out)
            continue
        model = build(shape)
        weights = sum(values.nbytes for _, values in tree_flatten(model.parameters()))
        print(f"{shape}: {gigabytes(weights)} GB of weights", flush=True)
        for setting in (SETTINGS[i] for i in s.settings):
            reckoned = reckon(model, weights, *setting)
            peak, seconds = measure_training(model, *setting) or ("out of memory", 0)
            line = dict(zip(NAMES, setting, strict=True)) | {"peak_gb": gigabytes(peak)}
            line |= {"reckoned_gb": gigabytes(reckoned), "seconds": f"{seconds:.2f}"}
            write(s.out, shape=shape, what="train", **line, disk_gb="")
        del model
        mx.clear_cache()


if __name__ == "__main__":
    main()
