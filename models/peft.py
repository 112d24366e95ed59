"""Carry an adapter to PEFT and back, or train it there, on an NVIDIA card, on what no Mac can hold.

    python -m models.peft export                   # ours as a PEFT one, which most programs read
    python -m models.peft import FOLDER            # a PEFT one as ours: for fuse.sh, chat.py, …
    python -m models.peft trl models/base/LARGE    # a folder that TRL trains from

export  Where embeddings are the output matrix too, as in Gemma, and EMBEDDINGS=1, llama.cpp's
        converter refuses it, and merge_and_unload() adds twice: take the fused model for these.
trl     TRL trains LARGE on the data as EMBEDDINGS=0 ./fine_tune.sh has trained MODEL, at the rate
        for the size of LARGE. Copy the folder to the machine with the card.

Reads   VERSION and MODEL, models/base/${MODEL}/, models/adapters/adapter-${VERSION}_${MODEL}/;
        trl: data/for_train/${VERSION}/train.jsonl, config.json and the tokenizer of LARGE
Writes  in models/adapters/, export: peft-${VERSION}_${MODEL}/; trl: trl-${VERSION}_LARGE/;
        import: adapter-${VERSION}_${MODEL}/; the previous one is kept beside it
Exit    0 done, 1 something is missing or does not fit, 2 wrong usage
"""

from models import common, folders
from models.adapted import read_model, shape_of, token_embeddings
from models.best_checkpoint import OURS
from models.chat_template import load_tokenizer

import argparse
import json
from pathlib import Path

import mlx.core as mx

PEFT = "base_model.model."  # PEFT puts this before each name
RECIPE = """\
# pip install trl==1.16.0 peft==0.21.2, and here, with LARGE as its makers publish it:
#     trl sft --config trl.yaml --model_name_or_path ORIGINAL
# On two cards add: --accelerate_config fsdp2 --num_processes 2 --per_device_train_batch_size 1
# On more, a batch has K times the rows: divide max_steps by K, multiply learning_rate by its root.
# (Two H200s: loss 3.344, or 3.373 with K = 2; EMBEDDINGS=0 ./fine_tune.sh: 3.342.)
datasets: [{{path: json, data_files: train.jsonl}}]
chat_template_path: chat_template.jinja
train_sampling_strategy: group_by_length  # rows of one length in a batch: less padding
max_length: {MAX_SEQ_LENGTH}
completion_only_loss: {mask_prompt}

use_peft: true
lora_r: {RANK}
lora_alpha: {alpha:g}  # PEFT divides this by the rank: SCALE={SCALE}
lora_dropout: {DROPOUT}
lora_target_modules: all-linear

max_steps: {ITERS}  # iterations
per_device_train_batch_size: {BATCH_SIZE}  # rows
learning_rate: {rate:.1e}
lr_scheduler_type: linear
warmup_steps: 10
max_grad_norm: 0  # mlx_lm.lora does not clip, either
seed: {SEED}

# Qwen2.5-Coder 0.5B on an H200: loss 3.323 with these two lines, 3.328 after EMBEDDINGS=0
# ./fine_tune.sh, 4.192 before; with dtype: bfloat16 TRL ended in loss 0 and grad_norm nan. float32
# takes twice the memory: where it does not fit, try bfloat16, and watch for nan.
dtype: float32
attn_implementation: eager

output_dir: adapter
save_steps: {EVAL_EVERY}
save_total_limit: 1
report_to: none
"""


# ---- names and shapes ----------------------------------------------------------------------------
def names_in_peft(module, embeddings):
    """Return what PEFT calls lora_a and lora_b of a module, such as model.layers.0.mlp.up_proj."""
    # Models that also see have a language_model, inside of their model in PEFT and around it here.
    theirs = PEFT + module.replace("language_model.model.", "model.language_model.")
    if module == embeddings:
        return f"{theirs}.lora_embedding_A", f"{theirs}.lora_embedding_B"
    return f"{theirs}.lora_A.weight", f"{theirs}.lora_B.weight"


def to_peft(weights, model):
    """Return the tensors of an adapter as PEFT has them: transposed.

    model.layers.0.mlp.up_proj.lora_a (640, 32)
        → base_model.model.model.layers.0.mlp.up_proj.lora_A.weight (32, 640)
    model.embed_tokens.lora_a (262144, 32)
        → base_model.model.model.embed_tokens.lora_embedding_A (32, 262144) and, if the embeddings
          are the output matrix too, base_model.model.lm_head.lora_B.weight (262144, 32)
    """
    embeddings, _ = token_embeddings(model)
    tied = not any(name.endswith("lm_head") for name, _ in model.named_modules())
    tensors = {}
    for module in {name.rpartition(".")[0] for name in weights}:
        a, b = weights[f"{module}.lora_a"], weights[f"{module}.lora_b"]
        name_a, name_b = names_in_peft(module, embeddings)
        tensors |= {name_a: a.T, name_b: b.T}
        if module == embeddings and tied:  # the output goes through them the other way round
            tensors |= {f"{PEFT}lm_head.lora_B.weight": a, f"{PEFT}lm_head.lora_A.weight": b}
    return tensors


def from_peft(tensors, model):
    """Return the tensors of a PEFT adapter by our names: to_peft() backwards, or ValueError."""
    embeddings, _ = token_embeddings(model)
    learned = {
        name: values
        for name, values in tensors.items()
        if not name.endswith(".base_layer.weight")  # a copy of the base's embeddings
        # all-linear also adapts the part of a model that sees, where B stays 0.
        and tensors.get(name.replace("lora_A", "lora_B"), values).any()
    }
    weights = {}
    for name, module in model.named_modules():
        name_a, name_b = names_in_peft(name, embeddings)
        if name_b not in learned:
            continue
        a, b = learned[name_a].T, learned[name_b].T
        if {a.shape[0], b.shape[1]} == set(shape_of(module)[1:]):
            weights |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    again, none = to_peft(weights, model), mx.zeros(0)
    for name in sorted(learned.keys() | again.keys()):
        if not mx.array_equal(learned.get(name, none), again.get(name, none)):
            raise ValueError(f"{name} is not plain LoRA on this base")
    return weights


# ---- the files of the three folders --------------------------------------------------------------
def for_peft(adapter, base):
    weights = mx.load(str(adapter / "adapters.safetensors"))
    if any(values.ndim > 2 for values in weights.values()):
        common.fail("PEFT cannot hold an adapter of experts", common.rerun("./fuse.sh"))
    tensors = to_peft(weights, read_model(base)[0])
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors}
    lora = json.loads((adapter / "adapter_config.json").read_bytes())["lora_parameters"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora["rank"],
        "lora_alpha": lora["scale"] * lora["rank"],
        "target_modules": sorted(names - {"lm_head"}),
        "ensure_weight_tying": "lm_head" in names,  # adapts lm_head, too
    }
    return {"adapter_config.json": json.dumps(config), "adapter_model.safetensors": tensors}


def for_trl(adapter, chats, large):
    config = json.loads((large / "config.json").read_bytes())
    settings = common.settings_of(adapter)
    recipe = RECIPE.format(
        **settings,
        alpha=float(settings["SCALE"]) * int(settings["RANK"]),
        mask_prompt=settings["MASK_PROMPT"] == "1",
        rate=common.learning_rate(config.get("text_config", config)["hidden_size"]),
    )
    # Both are lists of turns: TRL puts no chat template around a prompt that is plain text.
    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    template = load_tokenizer(large).chat_template
    return {"trl.yaml": recipe, "train.jsonl": lines, "chat_template.jinja": template}


def for_mlx(folder, base):
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        if config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"):
            raise ValueError("it is not of one rank and one alpha")
        tensors = mx.load(str(folder / "adapter_model.safetensors"))
        weights = from_peft(tensors, read_model(base)[0])
        lora = {"rank": config["r"], "scale": config["lora_alpha"] / config["r"], "dropout": 0.0}
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        what = f"{folder} cannot be used with {base}: {error}"
        common.fail(what, "# plain LoRA can, trained on the original of this base")
    lora["keys"] = sorted({name.rpartition(".")[0] for name in weights})
    config = {"model": str(base), "num_layers": -1, "lora_parameters": lora}
    return {"adapter_config.json": json.dumps(config), "adapters.safetensors": weights}


def write(folder, files):
    """Write {name: text or tensors} to the folder, whole or not at all."""
    with folders.work_folder(folder) as work:
        for name, content in files.items():
            if name.endswith(".safetensors"):
                mx.save_safetensors(str(work / name), content, {"format": "pt"})
            else:
                (work / name).write_text(content, "utf-8")
        folders.into_place(work, folder, OURS)
    print(f"wrote       {folder}")


def main():
    parser = argparse.ArgumentParser("python -m models.peft", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("export")
    commands.add_parser("import").add_argument("folder", type=Path, help="of the PEFT adapter")
    commands.add_parser("trl").add_argument("folder", type=Path, help="of the large model")
    args = parser.parse_args()

    version, model = common.from_environment("VERSION"), common.from_environment("MODEL")
    common.check_names(version, model)
    at = folders.places(version, model)
    folders.need(at.base / "config.json", "MODEL", common.download(model))
    if args.command == "import":
        return write(at.adapter, for_mlx(args.folder, at.base))
    if not (at.adapter / "settings").is_file():
        common.fail(f"there is no {at.adapter}/settings", common.rerun("./fine_tune.sh"))
    if args.command == "export":
        return write(at.adapter.with_name(f"peft-{version}_{model}"), for_peft(at.adapter, at.base))
    large, train = args.folder, at.data / "train.jsonl"
    if not (large / "config.json").is_file():
        common.fail(f"there is no {large}/config.json", common.download(large.name))
    build = common.rerun("python build_train.py")
    folders.need(train, "VERSION", build)
    files = for_trl(at.adapter, common.read_rows(train, build), large)
    write(at.adapter.with_name(f"trl-{version}_{large.name}"), files)


if __name__ == "__main__":
    main()
