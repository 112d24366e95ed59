"""Make a folder from which TRL trains on NVIDIA cards what no Mac can hold.

    python -m models.trl models/base/LARGE              # for two cards
    python -m models.trl models/base/LARGE --cards 8

mlx_lm.lora gives each machine the whole model; TRL can give each card a piece of it (FSDP). It
trains here as fine_tune.sh has trained a smaller base on the same data: the rows and their order,
the loss, all linear layers, the rank, and a rate that is the lower the larger the model. The
embeddings stay as they are: TRL cannot adapt them where they are the output matrix too.
models/peft.py brings the result back.

Reads   VERSION and MODEL, the smaller base; models/adapters/adapter-${VERSION}_${MODEL}/settings,
        data/for_train/${VERSION}/train.jsonl; of LARGE, config.json and the tokenizer
Writes  models/adapters/trl-${VERSION}_LARGE/: trl.yaml, which says how to train, train.jsonl and
        chat_template.jinja. Copy this folder to the machine; nothing else is needed there
Exit    0 done, 1 something is missing or wrong, 2 wrong usage
"""

from models import common
from models.chat_template import load_tokenizer
from models.common import fail
from models.peft import empty_folder

import argparse
import json
import shutil
from pathlib import Path

RECIPE = """\
# pip install trl==1.16.0 peft==0.21.2, and in the folder of this file, on one card:
#     trl sft --config trl.yaml --model_name_or_path ORIGINAL
# where ORIGINAL is the model as its makers publish it, at 16 bits. On several cards:
#     trl sft --config trl.yaml --model_name_or_path ORIGINAL \\
#         --accelerate_config fsdp2 --num_processes {cards}

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

max_steps: {steps}  # batches
per_device_train_batch_size: {rows}  # rows, on each of {cards} cards
learning_rate: {rate:.2g}
lr_scheduler_type: linear
warmup_steps: {warmup}
max_grad_norm: 0  # mlx_lm.lora does not clip, either
seed: {SEED}
dtype: bfloat16

output_dir: adapter
save_steps: {EVAL_EVERY}
save_total_limit: 1
report_to: none
"""


def hidden_size(base):
    config = json.loads((base / "config.json").read_bytes())
    return config.get("text_config", config)["hidden_size"]


def fill_in(settings, growth, cards):
    """Return what RECIPE names, for a base whose hidden size has grown so many times.

    {"BATCH_SIZE": "2", "ITERS": "600", "LEARNING_RATE": "2e-4", …}, 8, 4
        → one row on each card, so half the steps, and a rate of 2e-4 * 8**-0.78 * 2**0.5

    The exponent is that of fine_tune.sh; batches of twice the size wanted 1.4 times the rate.
    """
    rows = max(1, int(settings["BATCH_SIZE"]) // cards)
    larger_batch = rows * cards / int(settings["BATCH_SIZE"])
    steps = max(1, round(int(settings["ITERS"]) / larger_batch))
    return settings | {
        "cards": cards,
        "rows": rows,
        "steps": steps,
        "warmup": steps // 2 if steps < 20 else 10,
        "rate": float(settings["LEARNING_RATE"]) * growth**-0.78 * larger_batch**0.5,
        "alpha": float(settings["SCALE"]) * int(settings["RANK"]),
        "mask_prompt": "true" if settings["MASK_PROMPT"] == "1" else "false",
    }


def as_rows(chats):
    """Return the lines of train.jsonl: TRL puts no chat template around a plain prompt."""
    rows = ({"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_recipe(settings, chats, base, folder):
    new = empty_folder(folder)
    (new / "trl.yaml").write_text(RECIPE.format(**settings), "utf-8")
    (new / "train.jsonl").write_text(as_rows(chats), "utf-8")
    (new / "chat_template.jinja").write_text(load_tokenizer(base).chat_template, "utf-8")
    return new


def main():
    parser = argparse.ArgumentParser(
        prog="python -m models.trl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", type=Path, help="folder of the large model")
    parser.add_argument("--cards", type=int, default=2, help="how many will train")
    args = parser.parse_args()

    version, model = common.from_environment("VERSION"), common.from_environment("MODEL")
    common.check_names(version, model)
    build = common.rerun("python build_train.py")
    small, data = Path("models/base", model), Path("data/for_train", version)
    adapter = Path(f"models/adapters/adapter-{version}_{model}")
    common.need(small / "config.json", "MODEL", common.download(model))
    common.need(data / "train.jsonl", "VERSION", build)
    if not (adapter / "settings").is_file():
        fail(f"there is no {adapter}/settings", common.rerun("./fine_tune.sh"))
    if not (args.base / "config.json").is_file():
        fail(f"there is no {args.base}/config.json", common.download(args.base.name))

    growth = hidden_size(args.base) / hidden_size(small)
    settings = fill_in(common.settings_of(adapter), growth, args.cards)
    chats = common.read_rows(data / "train.jsonl", build)
    folder = adapter.with_name(f"trl-{version}_{args.base.name}")
    new = write_recipe(settings, chats, args.base, folder)
    shutil.copy(adapter / "settings", new)  # for models/peft.py: which data it has learned
    common.into_place(new, folder, ["trl.yaml", "train.jsonl", "chat_template.jinja", "settings"])
    print(f"wrote       {folder}")
    print("next        copy it to the machine with the cards; trl.yaml says how to train")


if __name__ == "__main__":
    main()
