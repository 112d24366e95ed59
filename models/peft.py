"""Carry an adapter to PEFT, which most other programs read, and back.

    python -m models.peft export           # ours as a PEFT one
    python -m models.peft import FOLDER    # a PEFT one as ours: for fuse.sh, chat.py, …

Where embeddings are the output matrix too, as in Gemma, two things fail: llama.cpp's converter
takes an adapter that was trained with EMBEDDINGS=0 only, and PEFT's merge_and_unload() adds to that
matrix twice. The fused model is right in both cases.

Reads   VERSION and MODEL, models/base/${MODEL}/
Writes  export: models/adapters/peft-${VERSION}_${MODEL}/, from adapter-${VERSION}_${MODEL}/
        import: models/adapters/adapter-${VERSION}_${MODEL}/; the one of before is kept beside it
Exit    0 done, 1 the adapter is missing or does not fit, 2 wrong usage
"""

from models import common
from models.adapted import read_model

import argparse
import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm

PEFT = "base_model.model."  # PEFT puts this before each name
# Where layers and embeddings are, in PEFT and here; models that also see have a language_model.
TEXT = r"^(model\.language_model\.|language_model\.model\.|model\.)(?=layers\.|embed_tokens)"
OURS = "adapters.safetensors", "adapter_config.json", "settings", "lora_config.yaml", "losses.csv"


def embeddings_of(modules):
    """Return the name of the token embeddings, and whether they are the output matrix too.

    {"model.embed_tokens": …, "model.layers.0": …} without an lm_head → "model.embed_tokens", True
    """
    name = next(name for name in modules if name.endswith("embed_tokens"))
    return name, not any(name.endswith("lm_head") for name in modules)


# ---- ours → PEFT ---------------------------------------------------------------------------------
def to_peft(weights, modules):
    """Return the tensors of an adapter by the names of PEFT, where each is transposed.

    model.layers.0.mlp.up_proj.lora_a (640, 32)
        → base_model.model.model.layers.0.mlp.up_proj.lora_A.weight (32, 640)
    model.embed_tokens.lora_a (262144, 32)
        → base_model.model.model.embed_tokens.lora_embedding_A (32, 262144) and, if the embeddings
          are the output matrix too, base_model.model.lm_head.lora_B.weight (262144, 32)
    """
    embeddings, tied = embeddings_of(modules)
    tensors = {}
    for name, values in weights.items():
        module, letter = re.fullmatch(r"(.+)\.lora_([ab])", name).groups()
        if values.ndim != 2:
            fused = common.rerun("./fuse.sh") + "  # a fused model needs no adapter"
            common.fail(f"PEFT cannot hold {module}, the experts of a block", fused)
        prefix = "model.language_model." if module.startswith("language_model.") else "model."
        theirs = PEFT + re.sub(TEXT, prefix, module)
        if module != embeddings:
            tensors[f"{theirs}.lora_{letter.upper()}.weight"] = values.T
            continue
        tensors[f"{theirs}.lora_embedding_{letter.upper()}"] = values.T
        if tied:  # the output goes through the two matrices the other way round
            other = {"a": "B", "b": "A"}[letter]
            tensors[f"{PEFT}lm_head.lora_{other}.weight"] = values
    return tensors


def peft_config(lora, tensors):
    """Return adapter_config.json as PEFT has it; `lora` are the lora_parameters of mlx-lm."""
    names = {re.sub(r"\.lora_.*", "", name).rpartition(".")[2] for name in tensors}
    tied = {"embed_tokens", "lm_head"} <= names
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora["rank"],
        "lora_alpha": lora["scale"] * lora["rank"],
        "lora_dropout": lora["dropout"],
        "target_modules": sorted(names - {"lm_head"} if tied else names),
        "ensure_weight_tying": tied,  # so lm_head, too
        "bias": "none",
    }


def export_adapter(adapter, base, folder):
    lora = json.loads((adapter / "adapter_config.json").read_bytes())["lora_parameters"]
    modules = dict(read_model(base)[0].named_modules())
    tensors = to_peft(mx.load(str(adapter / "adapters.safetensors")), modules)
    new = empty_folder(folder)
    mx.save_safetensors(str(new / "adapter_model.safetensors"), tensors, {"format": "pt"})
    (new / "adapter_config.json").write_text(json.dumps(peft_config(lora, tensors), indent=2))
    common.into_place(new, folder, ["adapter_model.safetensors", "adapter_config.json"])
    print(f"wrote       {folder}")


# ---- PEFT → ours ---------------------------------------------------------------------------------
def from_peft(tensors, modules):
    """Return the tensors of a PEFT adapter by our names: to_peft() backwards."""
    embeddings, tied = embeddings_of(modules)
    prefix = embeddings.removesuffix("embed_tokens")
    weights = {}
    for name, values in tensors.items():
        if name.endswith(".base_layer.weight"):  # PEFT adds the base's own embeddings
            continue
        found = re.fullmatch(rf"{PEFT}(.+)\.lora_(embedding_)?([AB])(\.weight)?", name)
        if not found:
            raise ValueError(f"it holds {name}, which plain LoRA has not")
        weights[f"{re.sub(TEXT, prefix, found[1])}.lora_{found[3].lower()}"] = values.T
    if tied:
        join_head(weights, embeddings)
    return {name: weights[name] for name in sorted(weights) if is_of_use(name, weights, modules)}


def join_head(weights, embeddings):
    """Drop the adapter of the output, which has to be that of the embeddings."""
    none = mx.zeros((0, 0))
    for letter, other in "ab", "ba":
        head = weights.pop(f"lm_head.lora_{letter}", none)
        if not mx.array_equal(head.T, weights.get(f"{embeddings}.lora_{other}", none)):
            raise ValueError("it adapts embeddings and output apart, which are one matrix here")


def is_of_use(name, weights, modules):
    """Say whether the base has what a tensor adapts; if not, the tensor must change nothing.

    PEFT's all-linear adapts the part of a model that sees, too, which learns nothing from text.
    """
    module = name.rpartition(".")[0]
    if module not in modules and weights[f"{module}.lora_b"].any():
        raise ValueError(f"it adapts {module}, which the base has not")
    return module in modules


def mlx_config(config, weights, base):
    """Return adapter_config.json as mlx-lm has it; `config` is the one of PEFT."""
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError("its matrices differ in rank or alpha")
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    keys = sorted({name.rpartition(".")[0] for name in weights})
    lora = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    return {"model": str(base), "fine_tune_type": "lora", "num_layers": -1, "lora_parameters": lora}


def import_adapter(folder, base, adapter):
    new = empty_folder(adapter)
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        modules = dict(read_model(base)[0].named_modules())
        weights = from_peft(mx.load(str(folder / "adapter_model.safetensors")), modules)
        (new / "adapter_config.json").write_text(json.dumps(mlx_config(config, weights, base)))
        mx.save_safetensors(str(new / "adapters.safetensors"), weights)
        mlx_lm.load(str(base), adapter_path=str(new), lazy=True)  # refuses what has another shape
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        shutil.rmtree(new)
        what = f"{folder} cannot be used with {base}: {error}"
        common.fail(what, "# plain LoRA can, trained on the original of this base")
    if (folder.parent / "settings").is_file():  # from models/trl.py
        shutil.copy(folder.parent / "settings", new)
    before = common.into_place(new, adapter, OURS)
    if before:
        print(f"replaced    an adapter; it is in {before}")
    print(f"wrote       {adapter}")
    print(f"next        {common.rerun('./fuse.sh')}")


def empty_folder(folder):
    """Return an empty folder to work in, beside the one that is to be made."""
    new = common.beside(folder, "peft")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


def main():
    parser = argparse.ArgumentParser(
        prog="python -m models.peft",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("export")
    commands.add_parser("import").add_argument("folder", type=Path, help="of the PEFT adapter")
    args = parser.parse_args()

    version, model = common.from_environment("VERSION"), common.from_environment("MODEL")
    common.check_names(version, model)
    base, adapters = Path("models/base", model), Path("models/adapters")
    adapter = adapters / f"adapter-{version}_{model}"
    common.need(base / "config.json", "MODEL", common.download(model))
    if args.command == "import":
        import_adapter(args.folder, base, adapter)
    else:
        if not (adapter / "adapters.safetensors").is_file():
            common.fail(f"there is no adapter in {adapter}", common.rerun("./fine_tune.sh"))
        export_adapter(adapter, base, adapters / f"peft-{version}_{model}")


if __name__ == "__main__":
    main()
