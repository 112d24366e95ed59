#!/usr/bin/env bash
# Fuse the adapter into the base model: one model folder that needs no adapter any more.
#
#   ./fuse.sh                         keeps as much of what was learned as this machine can
#   FUSED_BITS=16 ./fuse.sh           exact and large
#   ./fuse.sh --upload-repo NAME/MY-MODEL      arguments go through to mlx_lm.fuse
#
# Reads   models/base/$MODEL, models/adapters/adapter-${VERSION}_$MODEL
# Writes  models/fused/fused-${VERSION}_$MODEL, and in it fused_from.json: what it was made from
# Exit    0 done, 1 bad input or environment, 2 wrong usage, 130 Ctrl-C

# ---- settings ------------------------------------------------------------------------------------------------------
VERSION=${VERSION:-v1}                      # which data the adapter was trained on
MODEL=${MODEL:-gemma-3-text-27b-it-4bit}    # which base model: models/base/MODEL
FUSED_BITS=${FUSED_BITS:-auto}              # bits per weight: 16, 8, 6, 5, base (as the base has them), or auto: on a
                                            # quantised base 8 if the memory suffices for making it, else base
GROUP_SIZE=${GROUP_SIZE:-64}                # weights that share a scale: 64; with 6 or 5 bits rather 32
# --------------------------------------------------------------------------------------------------------------------

set -euo pipefail
ROOT=$(cd "$(dirname "$0")" && pwd)
export LC_ALL=C PYTHONUTF8=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
fail() { echo "error: $1. FIX: $2" >&2; exit "${3:-1}"; }

# ---- checks before a model is loaded -------------------------------------------------------------------------------
UPLOAD="" GGUF=""
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) awk 'NR > 1 { if (/^# -----/) exit; sub(/^# ?/, ""); print }' "$0"; exit 0 ;;
    --upload-repo) [ $# -gt 1 ] || fail "--upload-repo names no repository" "--upload-repo NAME/MY-MODEL" 2
      UPLOAD=$2; shift ;;
    --upload-repo=*) UPLOAD=${1#*=} ;;
    --export-gguf) GGUF=1; arguments+=("$1") ;;
    --gguf-path* | --trust-remote-code) arguments+=("$1") ;;
    -*) fail "$1 is not an argument of fuse.sh, or is a setting at its top" \
      "FUSED_BITS=8 ./fuse.sh for a setting; --export-gguf, --gguf-path, --trust-remote-code go to mlx_lm.fuse" 2 ;;
    [A-Z]*=*) fail "$1 stands behind the command" "$1 ./fuse.sh" 2 ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
name=${MODEL%/} name=${name##*/}
case $MODEL in
  models/* | ./* | ../* | /* | */) fail "MODEL=$MODEL is a path" "MODEL=$name ./fuse.sh" ;;
  */*) fail "MODEL=$MODEL is not the name of a folder in models/base" \
    "MODEL=$name ./fuse.sh, after hf download $MODEL --local-dir models/base/$name" ;;
esac
check() {  # the setting $1 must match $2, which $3 says in words; the fix is its default
  [[ ${!1} =~ ^($2)$ ]] || fail "$1=${!1} is not $3" "$1=$(sed -n "s/^$1=.*:-\(.*\)}.*/\1/p" "$0") ./fuse.sh"
}
for name in VERSION MODEL; do check $name '[A-Za-z0-9_][A-Za-z0-9._-]*' "a name of letters, digits, '.', '_' and '-'"; done
check FUSED_BITS 'auto|base|16|8|6|5' "auto, base, 16, 8, 6 or 5"
check GROUP_SIZE '32|64|128' "32, 64 or 128"
[ -z "$GGUF" ] || [ "$FUSED_BITS" = 16 ] || fail "GGUF export needs whole weights" "FUSED_BITS=16 ./fuse.sh --export-gguf" 2
BASE=$ROOT/models/base/$MODEL
ADAPTER=$ROOT/models/adapters/adapter-${VERSION}_$MODEL
FUSED=$ROOT/models/fused/fused-${VERSION}_$MODEL
PARTIAL=$FUSED.partial                      # all is made here; FUSED itself changes at the very end
if ! command -v mlx_lm.fuse >/dev/null; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "python3 is $(python3 -V 2>&1 || true), and 3.11 or newer is needed" \
      "install one (on a Mac: brew install python@3.13), then make the environment: python3.13 -m venv venv"
  fail "mlx_lm.fuse was not found, so the virtual environment is not active" \
    "source venv/bin/activate (made by: python3 -m venv venv; source venv/bin/activate; pip install -r requirements.txt)"
fi
if [ ! -f "$BASE/config.json" ]; then
  there=""
  for folder in "$ROOT"/models/base/*/; do
    if [ -f "${folder}config.json" ]; then there="$there $(basename "$folder")"; fi
  done
  fail "there is no base model in models/base/$MODEL (downloaded:${there:- none})" \
    "hf download mlx-community/$MODEL --local-dir models/base/$MODEL"
fi
for name in adapters.safetensors adapter_config.json; do
  [ -f "$ADAPTER/$name" ] || fail "${ADAPTER#"$ROOT/"}/$name is missing" "VERSION=$VERSION MODEL=$MODEL ./fine_tune.sh"
done
if [ -d "$FUSED.old" ]; then                # the last run was cut off between the renames at its end: finish them
  [ -d "$FUSED" ] || mv "$PARTIAL/model" "$FUSED"
  rm -rf "$FUSED.old"
fi
rm -rf "$PARTIAL"
mkdir -p "$PARTIAL" || fail "models/fused cannot be written to" "chmod u+w models/fused, or make room on the disk"
trap 'rm -rf "$PARTIAL"' EXIT
trap 'echo >&2; echo "interrupted: the previous fused model is as it was" >&2; exit 130' INT

python3 - "$BASE" "$ADAPTER" "$PARTIAL" "$VERSION" "$FUSED_BITS" "$GROUP_SIZE" "$GGUF" <<'PYTHON'
import glob, hashlib, json, os, shutil, sys
from importlib.metadata import version
import mlx.core as mx
from safetensors import SafetensorError, safe_open

def fail(what, fix):
    sys.exit(f"error: {what}. FIX: {fix}")

def gb(size):
    return f"{size / 1e9:.3g} GB" if size > 1e8 else f"{size / 1e6:.3g} MB"

base, adapter, partial, data, bits, group, gguf = sys.argv[1:]
model = os.path.basename(base)
retrain = f"VERSION={data} MODEL={model} ./fine_tune.sh"

shards = glob.glob(f"{glob.escape(base)}/model*.safetensors")
outputs = {}  # of every tensor of the base model; a file that is cut off does not open
try:
    config = json.load(open(f"{base}/config.json"))
    for shard in shards:
        with safe_open(shard, "numpy") as file:
            outputs.update((name, file.get_slice(name).get_shape()[0]) for name in file.keys())
except (OSError, ValueError, SafetensorError) as error:
    fail(f"the base model in models/base/{model} is not complete: {error}",
         f"hf download mlx-community/{model} --local-dir models/base/{model}")
quantization = config.get("quantization")
if gguf and config.get("model_type") not in ("llama", "mixtral", "mistral"):
    fail(f"mlx-lm does not export {config.get('model_type')} models as GGUF", "FUSED_BITS=16 ./fuse.sh, then as the README says")
try:
    trained_on = os.path.basename(json.load(open(f"{adapter}/adapter_config.json"))["model"])
    update = mx.load(f"{adapter}/adapters.safetensors")
except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
    fail(f"the adapter does not open: {error}", retrain)
if trained_on != model:
    fail(f"the adapter was trained on {trained_on}, not on {model}", retrain)
for name, values in update.items():
    matrix, _, part = name.rpartition(".")
    # The side of the update that is as long as the matrix: of an embedding lora_a (rows), else lora_b (outputs).
    side = {"lora_a": 0} if "embed" in matrix else {"lora_b": -1}
    if part in side and values.shape[side[part]] != outputs.get(matrix + ".weight", values.shape[side[part]]):
        fail(f"the adapter does not fit {model}: {name} is for another size", retrain)
    if not mx.isfinite(values).all().item():
        fail(f"the adapter holds NaN or infinite values, first in {name}", f"{retrain} with a smaller LEARNING_RATE")

# Bytes per weight at b bits: the bits, and for each group a 16-bit scale and a 16-bit bias.
here = sum(map(os.path.getsize, shards))
weights = here / ((quantization["bits"] + 32 / quantization["group_size"]) / 8 if quantization else 2)
size = {b: weights * (int(b) + 32 / int(group)) / 8 for b in "865"} | {"16": weights * 2, "base": here}
# mlx_lm.fuse holds base and 16-bit model at once (whatever it is rounded to later), or frees of the base what it has
# written: measured on CUDA, 1.06 times their sum at 4B, 0.85 at 27B. At the base's bits 2.7 bases at 12B, 1.9 at 27B.
need = {b: here + size["16"] + min(0.08 * size["16"], 6e8) for b in size} | {"base": min(2.7 * here, 2 * here + 5e9)}
device = mx.device_info()  # Metal tells what it may use, CUDA what the card has, a CPU nothing
memory = device.get("max_recommended_working_set_size") or device.get("total_memory")
memory = memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
if bits == "auto":
    bits = "8" if quantization and need["8"] < memory else "base"
if need[bits] > memory:
    way_out = "" if bits == "base" else "run FUSED_BITS=base ./fuse.sh, or "
    print(f"warning: needs about {gb(need[bits])} of memory and the machine has {gb(memory)}; instead {way_out}"
          "use the adapter unfused (see README)", file=sys.stderr)
disk, free = size[bits] + (size["16"] if bits in "865" else 0), shutil.disk_usage(partial).free
if disk > free:
    fail(f"{gb(disk)} of disk are needed and {gb(free)} are free", "make room, or FUSED_BITS=base ./fuse.sh")
print(f"base model  {model}: {gb(here)}" + (f" at {quantization['bits']} bits" if quantization else ""))
print(f"fused       FUSED_BITS={bits}: about {gb(size[bits])}; while it is made {gb(need[bits])} of {gb(memory)} memory")
if bits == "base" and quantization:
    print(f"warning: rounding to {quantization['bits']} bits forgets a part of what was learned. All of it is kept by FUSED_BITS=8 (needs"
          f" {gb(need['8'])} of memory) and by the adapter unfused (see README)", file=sys.stderr)
checksum = hashlib.sha256(open(f"{adapter}/adapters.safetensors", "rb").read()).hexdigest()
origin = {"base": model, "adapter_sha256": checksum, "version": data, "bits": bits, "group_size": int(group)}
origin |= {"mlx": version("mlx"), "mlx_lm": version("mlx-lm")}
json.dump(origin, open(f"{partial}/fused_from.json", "w"), indent=2)
PYTHON
BITS=$(sed -n 's/.*"bits": "\(.*\)".*/\1/p' "$PARTIAL/fused_from.json")

# ---- fusing --------------------------------------------------------------------------------------------------------
step() {  # runs a command; what it prints is shown only if it fails
  echo "running     $1"
  "$@" >"$PARTIAL/log" 2>&1 && return
  local code=$?
  [ $code != 2 ] || fail "$1 does not take the arguments '${arguments[*]-}'" "$1 --help lists those that it takes" 2
  fail "$1 ended with code $code: $(tail -n 1 "$PARTIAL/log")" \
    "if memory or disk ran out: FUSED_BITS=base ./fuse.sh, or use the adapter unfused (see README)"
}
fuse() { step mlx_lm.fuse --model "$BASE" --adapter-path "$ADAPTER" ${arguments[@]+"${arguments[@]}"} --save-path "$@"; }
case $BITS in
  base) fuse "$PARTIAL/model" ;;
  16) fuse "$PARTIAL/model" --dequantize ;;
  *) # Rounding the update to the base's 4 bits would lose most of it, so it is added at 16 bits and then rounded to more.
    fuse "$PARTIAL/exact" --dequantize
    step mlx_lm.convert --hf-path "$PARTIAL/exact" --mlx-path "$PARTIAL/model" -q --q-bits "$BITS" --q-group-size "$GROUP_SIZE"
    rm -r "$PARTIAL/exact" ;;
esac

# ---- checks of the result, and into its place ----------------------------------------------------------------------
python3 - "$PARTIAL/model" <<'PYTHON'
import sys
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import load

try:
    parameters = tree_flatten(load(sys.argv[1], lazy=True)[0].parameters())
    while parameters:  # taken out one by one, so that no more than one is in memory
        name, values = parameters.pop()
        if mx.issubdtype(values.dtype, mx.floating) and not mx.isfinite(values).all().item():
            raise ValueError(f"{name} holds NaN or infinite values")
except Exception as error:  # whatever it is, the result is not one to keep
    sys.exit(f"error: the fused model is not whole: {error}. FIX: make room on the disk, or a smaller LEARNING_RATE")
PYTHON
# As the base has them: mlx-lm writes the one for transformers 5 alone, and does not copy the other, which GGUF needs.
for name in tokenizer_config.json tokenizer.model; do
  if [ -f "$BASE/$name" ]; then cp "$BASE/$name" "$PARTIAL/model/"; fi
done
mv "$PARTIAL/fused_from.json" "$PARTIAL/model/"
if [ -d "$FUSED" ]; then mv "$FUSED" "$FUSED.old"; fi
mv "$PARTIAL/model" "$FUSED"
rm -rf "$FUSED.old"
echo "wrote       ${FUSED#"$ROOT/"}, with fused_from.json"
if [ -n "$UPLOAD" ]; then
  if [ -t 0 ]; then
    read -r -p "Upload it to huggingface.co/$UPLOAD, for anyone to read what was learned from the chat? [y/N] " answer
    case $answer in y | Y | yes) ;; *) echo "not uploaded"; exit 0 ;; esac
  fi
  HF_HUB_OFFLINE=0 mlx_lm.upload --path "$FUSED" --upload-repo "$UPLOAD" ||
    fail "the upload failed, see above; the fused model is in place" "hf auth login, then ./fuse.sh --upload-repo $UPLOAD"
fi
echo "next        python test_on_validation.py"
