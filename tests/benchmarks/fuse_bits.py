"""How many bits: what each way of fusing keeps of what was learned, for small updates and for large ones.

    python tests/benchmarks/fuse_bits.py models/base/MODEL data/for_train/VERSION

Trains adapters with recipes of sweep.py, of small and of large updates, and fuses each at the bits of the base (plain
mlx_lm.fuse), at 16 bits, and from there to 8, 6, 5 and 4 bits. Writes a line to --out (tab-separated) after each: size
of the model, seconds that making it took, loss on all validation rows (as in sweep.py), and the share of the adapter's
improvement over the base that it keeps. mlx_lm.dwq, gptq and awq are not in it: they need another package or the net.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

from sweep import DEFAULTS, completion_loss, fuse, mlx_lm, read_rows, train

COMMON = DEFAULTS | {"rank": 8, "keys": None, "batch_size": 4}
SMALL = COMMON | {"learning_rate": 1e-5, "bias_correction": False}
ADAPTERS = {
    "small updates, masked": SMALL | {"mask_prompt": True},
    "small updates": SMALL,
    "large updates": COMMON | {"learning_rate": 3e-4},
    "defaults": DEFAULTS,
}


def fuse_plain(base, folder):
    mlx_lm("fuse", "--model", base, "--adapter-path", folder / "adapter", "--save-path", folder / "plain")
    return folder / "plain"


def compare(base, data, folder, name, out):
    rows = read_rows(data / "valid.jsonl")
    train(base, data, folder, ADAPTERS[name])
    before, adapter = completion_loss(base, rows), completion_loss(base, rows, folder / "adapter")
    write(out, base.name, name, "base model", base, 0, before, "")
    write(out, base.name, name, "adapter, not fused", folder / "adapter", 0, adapter, "100.0 %")
    ways = {"base bits": partial(fuse_plain, base, folder), "16 bits": partial(fuse, base, folder, 16)}
    ways |= {
        f"{bits} bits, group {group}": partial(fuse, base, folder, bits, group)
        for bits in (8, 6, 5, 4)
        for group in (64, 32)
    }
    for way, make in ways.items():
        started = time.time()
        try:
            result = make()
        except RuntimeError as error:
            write(out, base.name, name, way, folder, 0, float("nan"), str(error)[:200])
            continue
        seconds = time.time() - started
        loss = completion_loss(result, rows)
        write(out, base.name, name, way, result, seconds, loss, f"{100 * (before - loss) / (before - adapter):.1f} %")


def write(out, base, adapter, way, path, seconds, loss, kept):
    size = sum(file.stat().st_size for file in path.glob("[am]*.safetensors")) / 1e6
    line = f"{base}\t{adapter}\t{way}\t{size:.0f}\t{seconds:.1f}\t{loss:.4f}\t{kept}"
    with out.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", default=list(ADAPTERS), choices=ADAPTERS)
    parser.add_argument("--out", type=Path, default=Path("fuse_bits.tsv"))
    s = parser.parse_args()
    if not s.out.exists():
        s.out.write_text("base\tadapter\tfused\tMB\tseconds\tloss\tkept\n")
    for name in s.only:
        with tempfile.TemporaryDirectory(prefix="fuse-bits-") as folder:
            compare(s.base, s.data, Path(folder), name, s.out)


if __name__ == "__main__":
    main()
