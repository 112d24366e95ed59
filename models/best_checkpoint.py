"""Score each checkpoint of a training, and make the best one the adapter.

    python -m models.best_checkpoint WORK models/base/MODEL models/adapters/adapter-VERSION_MODEL

Reads   WORK: 0000200.safetensors and so on, valid.jsonl, train_losses.csv, run/adapter_config.json
Writes  the adapter: adapters.safetensors, losses.csv, and how it was trained
Exit    0 done, 1 no checkpoint is any good, 130 Ctrl-C
"""

from models.chat_template import load_model
from models.common import checkpoints, fail, lower_rate, read_rows, rerun, warn
from models.completion_loss import encode, loss_of_replies
from models.folders import into_place

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pandas as pd
from mlx_lm.tuner.utils import linear_to_lora_layers
from tqdm import tqdm

# How it was trained:
HOW = ("settings", "lora_config.yaml", "training.log", "run/adapter_config.json")
OURS = ("adapters.safetensors", "losses.csv", *(Path(name).name for name in HOW))


def main(work, base, adapter):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, even while MLX computes
    work, adapter = Path(work), Path(adapter)
    try:
        losses = score(work, base)
    except RuntimeError as error:  # MLX: the memory ran out, or a checkpoint is damaged
        again = rerun("./fine_tune.sh", RESUME=1) + "  # after closing other programs"
        fail(f"scoring failed: {error}", again, rerun("./fine_tune.sh", RESUME=0))
    best = choose(losses)
    folder = work / "best"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(checkpoints(work)[best], folder / "adapters.safetensors")
    for name in HOW:
        shutil.copy(work / name, folder)
    table(work, losses).to_csv(folder / "losses.csv")
    put_in_place(folder, adapter)


def score(work, base):
    """Return {iteration: loss} of every checkpoint, and of the base model as iteration 0."""
    model, tokenizer = load_model(base)
    chats = read_rows(work / "valid.jsonl", rerun("./fine_tune.sh", RESUME=0))
    rows = [encode(tokenizer, chat) for chat in chats]
    print("scoring     each checkpoint on valid.jsonl: nats per token of the replies", flush=True)
    steps = len(rows) * (1 + len(checkpoints(work)))
    with tqdm(None, "scoring", steps, disable=None, leave=False) as bar:
        losses = {0: loss_of_replies(model, rows, bar.update)}
        bar.write(f"     0  validation loss {losses[0]:.3f}  (base model)")
        config = json.loads((work / "run/adapter_config.json").read_bytes())
        linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"])
        model.eval()
        for iteration, file in checkpoints(work).items():
            model.load_weights(str(file), strict=False)
            losses[iteration] = loss_of_replies(model, rows, bar.update)
            bar.write(f"{iteration:6}  validation loss {losses[iteration]:.3f}")
    return losses


def choose(losses):
    """Return the iteration with the lowest loss: {0: 9.5, 200: 3.1, 400: 3.2} → 200."""
    good = {when: loss for when, loss in losses.items() if when and math.isfinite(loss)}
    if not good:
        rate = lower_rate(os.environ["LEARNING_RATE"])
        again = rerun("./fine_tune.sh", RESUME=0, LEARNING_RATE=rate)
        fail("all weights became NaN or infinite", again)
    best = min(good, key=good.get)
    print(f"kept        iteration {best}: validation loss {good[best]:.3f}, base {losses[0]:.3f}")
    if good[best] >= losses[0]:
        warn("that is no better than the base model")
    return best


def table(work, losses):
    """Return the losses of training and validation side by side.

    "200,2.437,1528" and {0: 9.5, 200: 3.039} → iteration 0: NaN, 9.5, NaN; 200: 2.437, 3.039, 1528.
    """
    columns = ["iteration", "train_loss", "tokens_per_second"]
    train = pd.read_csv(work / "train_losses.csv", names=columns, index_col=0)
    train = train[~train.index.duplicated(keep="last")]  # a resumed run repeats some
    validation = pd.Series(losses, name="val_loss").round(4)
    both = train.join(validation, how="outer").rename_axis("iteration")
    return both[["train_loss", "val_loss", "tokens_per_second"]]


def put_in_place(folder, adapter):
    """Make the folder the adapter, and say what it replaces."""
    before = lowest_loss(adapter)
    where = into_place(folder, adapter, OURS)
    if where:
        print(f"replaced    an adapter with validation loss {before}; it is in {where}")
    print(f"wrote       {adapter}/adapters.safetensors")
    print("            also losses.csv, training.log, lora_config.yaml, settings")


def lowest_loss(adapter):
    """Return the validation loss of an adapter from its losses.csv, "unknown" if there is none."""
    try:
        losses = pd.read_csv(adapter / "losses.csv", index_col="iteration")["val_loss"]
        return f"{losses[losses.index > 0].min():.3f}"
    except (OSError, ValueError, LookupError):
        return "unknown"


if __name__ == "__main__":
    main(*sys.argv[1:])
