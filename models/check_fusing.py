"""Check the input of fuse.sh, say why a step failed, and put the fused model into place.

    python -m models.check_fusing check                prints the bits to fuse at: base, 8 or 16
    python -m models.check_fusing explain LOG          of a command that failed
    python -m models.check_fusing finish WORK FUSED    WORK/model, made with WORK/adapter

Exit    0 done, 1 it cannot be fused, or a step has failed
"""

from models import common, folders
from models.chat_template import load_tokenizer
from models.common import fail, from_environment, rerun
from models.memory import memory_for_mlx, memory_to_fuse, sizes_to_fuse

import json
import os
import re
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm

# Files that are replaced with a fused model; all others in its folder a person has put there.
OURS = ("model*.safetensors*", "tokenizer*", "*.jinja")


# ---- before --------------------------------------------------------------------------------------
def check():
    version, model = from_environment("VERSION"), from_environment("MODEL")
    bits = os.environ["FUSED_BITS"]
    if bits not in ("auto", "base", "16", "8"):
        fail(f"FUSED_BITS={bits} is not auto, base, 16 or 8", rerun("./fuse.sh", FUSED_BITS="auto"))
    at = folders.places(version, model)
    folders.need(at.base / "config.json", "MODEL", common.download(model))
    check_adapter(at.adapter, version, model)
    try:
        base_size, full_size = sizes_to_fuse(at.base)
        if not load_tokenizer(at.base).has_chat_template:
            raise ValueError("it has no chat template")
    except Exception as error:  # whatever is wrong with a download
        fail(f"the base model in {at.base} cannot be used: {error!r}", common.download(model))
    bits = choose_bits(bits, base_size, full_size)
    check_disk(at.fused, bits, base_size, full_size)
    print(bits)


def check_adapter(adapter, version, model):
    """Refuse an adapter that is missing, of another base, damaged, or has learned NaN."""
    folders.finish_move(adapter)
    if not (adapter / "adapters.safetensors").is_file():
        names = sorted(path.name for path in adapter.parent.glob(f"adapter-*_{model}"))
        others = [name.removeprefix("adapter-").removesuffix(f"_{model}") for name in names]
        exports = [f"export VERSION={other}" for other in others if other != version]
        fail(f"there is no adapter in {adapter}", rerun("./fine_tune.sh"), *exports)
    try:
        trained_on = json.loads((adapter / "adapter_config.json").read_bytes())["model"]
        weights = mx.load(str(adapter / "adapters.safetensors"))
        is_finite = all(mx.isfinite(values).all() for values in weights.values())
    except Exception as error:
        fail(f"the adapter in {adapter} cannot be used: {error!r}", rerun("./fine_tune.sh"))
    if Path(trained_on).name != model:
        fail(f"{adapter} was trained on {trained_on}", rerun("./fine_tune.sh"))
    if not is_finite:
        fail(f"{adapter} holds NaN or infinite values", rerun("./fine_tune.sh"))


def choose_bits(bits, base_size, full_size):
    """Return the bits to fuse at: auto is 8 if the base is quantized and there is memory enough."""
    needed, allowed = memory_to_fuse(base_size, full_size), memory_for_mlx()
    if bits == "auto":
        bits = "8" if base_size < full_size and needed < allowed else "base"
    if bits == "base" and base_size < full_size:
        what = "rounding to the bits of the base may lose some of what was learned"
        fix = rerun("./fuse.sh", FUSED_BITS=8)
        fix += f"  # takes {needed / 1e9:.3g} GB of memory, of {allowed / 1e9:.3g} GB"
        common.warn(f"{what}; test_on_validation.py tells", fix)
    if bits == "base" and base_size == full_size:
        print("bits        as in the base, which is not rounded: nothing is lost", file=sys.stderr)
    return bits


def check_disk(fused, bits, base_size, full_size):
    """Refuse what the disk has no room for; an older fused model, NAME.before, makes room."""
    eight = full_size + full_size * 8.5 / 16  # the way to 8 bits leads over 16
    old, needed = folders.before(fused), {"base": base_size, "16": full_size, "8": eight}[bits]
    if shutil.disk_usage(old.parent).free < needed and old.exists():
        print(f"deleting    {old}: the disk has no room for it", file=sys.stderr)
        shutil.rmtree(old)
    free = shutil.disk_usage(old.parent).free
    if free < needed:
        what = f"fusing takes {needed / 1e9:.3g} GB of disk, and {free / 1e9:.3g} GB are free"
        smaller = [rerun("./fuse.sh", FUSED_BITS="base")] if base_size < free else []
        fail(what, *smaller, "df -h models/fused")


# ---- a step that failed --------------------------------------------------------------------------
def explain(log):
    """Fail with the last error in the log of a command, and the fix for it."""
    said = re.findall(r"^[A-Za-z_.:+]+: .*", Path(log).read_text("utf-8", "replace"), re.MULTILINE)
    why = said[-1] if said else "it said nothing, like a process that is killed"
    fixes = [f"tail -n 30 '{log}'"]
    if not said or "emory" in why:
        fixes = [rerun("./fuse.sh", FUSED_BITS="base") + "  # or use the adapter as it is"]
    if re.search("unable to write|no space|too large", why, re.IGNORECASE):
        fixes = ["df -h models/fused  # free space", rerun("./fuse.sh")]
    fail(f"fusing failed: {why[:200]}", *fixes)


# ---- after ---------------------------------------------------------------------------------------
def finish(work, fused):
    """Check that the fused model loads, write what it was made from, and put it into place."""
    work = Path(work)
    try:
        mlx_lm.load(str(work / "model"), lazy=True)
    except Exception as error:
        fail(f"the fused model does not load: {error!r}", rerun("./fuse.sh"))
    origin = {
        "base": from_environment("MODEL"),
        "version": from_environment("VERSION"),
        "bits": os.environ["FUSED_BITS"],
        "group_size": 64,  # that of mlx_lm.convert
        "adapter_sha256": common.checksum(work / "adapter/adapters.safetensors"),
    }
    (work / "model/fused_from.json").write_text(json.dumps(origin, indent=2))
    replaced = folders.into_place(work / "model", fused, OURS)
    if replaced:
        print(f"replaced    a fused model; it is in {replaced}")
    print(f"wrote       {fused}, with fused_from.json")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["check"]:
            check()
        case ["explain", log]:
            explain(log)
        case ["finish", work, fused]:
            finish(work, fused)
