#!/usr/bin/env bash
# Fuse the adapter into the base model: one model folder that needs no adapter any more.
#
#   ./fuse.sh                  keeps as much of what was learned as this machine can
#   FUSED_BITS=16 ./fuse.sh    exact and large
#
# Reads   models/base/$MODEL, models/adapters/adapter-${VERSION}_$MODEL
# Writes  models/fused/fused-${VERSION}_$MODEL, and in it fused_from.json: what it was made from
# Exit    0 done, 1 bad input or environment, 2 wrong usage, 130 Ctrl-C

# sh, zsh and, because of the 02, Python too stop here and show this line.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this is for bash. FIX: ./fuse.sh" >&2 && exit 02; }

fail() {
  echo "error: $1. FIX: $2" >&2
  exit "${3:-1}"
}
trap 'fail "line $LINENO, $BASH_COMMAND, is not NAME=value" "${BASH_COMMAND// /}"' ERR
given=$(declare -p VERSION MODEL FUSED_BITS GROUP_SIZE 2>/dev/null || true)

# ---- settings -----------------------------------------------------------------------------------
VERSION=v1                     # which data the adapter was trained on
MODEL=gemma-3-text-27b-it-4bit # which base model: models/base/MODEL
FUSED_BITS=auto                # 16, 8, 6, 5, base (as many as it has), auto (8 if memory suffices)
GROUP_SIZE=64                  # weights that share a scale: 64; with 6 or 5 bits rather 32
# -------------------------------------------------------------------------------------------------

eval "$given" # what the environment sets wins over the lines above
trap - ERR
set +Cfx -euo pipefail # BASH_ENV may have set others
shopt -s nullglob
IFS=$' \t\n'
trap '' PIPE XFSZ # a closed pipe and a full disk shall not end us without our words
unset CDPATH PYTHONOPTIMIZE PYTHONIOENCODING "${!HF_@}" "${!TRANSFORMERS@}" "${!MLXLM@}"
export LC_ALL=C PYTHONUTF8=1 PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1
say() { echo "$*" 2>/dev/null || true; }

script=${BASH_SOURCE[0]}
while [ -L "$script" ]; do # as in ~/bin
  folder=$(dirname "$script")
  script=$(readlink "$script")
  case $script in /*) ;; *) script=$folder/$script ;; esac
done
cd "$(dirname "$script")"

# ---- checks before a model is loaded ------------------------------------------------------------
case ${1-} in
  "") ;;
  -h | --help)
    sed -n -e '2,/^$/p' -e '/^# ---- settings/,/^# ---*$/p' fuse.sh | sed 's/^# \{0,1\}//'
    exit 0
    ;;
  [A-Z]*=*) fail "$1 stands behind the command" "$1 ./fuse.sh" 2 ;;
  *) fail "fuse.sh takes no argument, and $1 is one" "./fuse.sh --help" 2 ;;
esac

check() { # the setting $1 must match $2, which $3 says in words; the fix is the default, $4
  [[ ${!1} =~ ^($2)$ ]] || fail "$1=${!1} is not $3" "$1=$4 ./fuse.sh"
}
name=${MODEL%/}
name=${name##*/}
[ "$MODEL" = "$name" ] || fail "MODEL=$MODEL is a path, not a name" "MODEL=$name ./fuse.sh"
for setting in VERSION MODEL; do
  check $setting '[A-Za-z0-9_][A-Za-z0-9._-]*' "a name of letters, digits, '.', '_' and '-'" v1
done
check FUSED_BITS 'auto|base|16|8|6|5' "auto, base, 16, 8, 6 or 5" auto
check GROUP_SIZE '32|64|128' "32, 64 or 128" 64

command -v mlx_lm.fuse >/dev/null || fail "mlx_lm.fuse was not found" \
  "source venv/bin/activate (made by: python3 -m venv venv, then pip install -r requirements.txt)"

BASE=models/base/$MODEL
ADAPTER=models/adapters/adapter-${VERSION}_$MODEL
FUSED=models/fused/fused-${VERSION}_$MODEL
HIDDEN=models/fused/.fused-${VERSION}_$MODEL
PARTIAL=$HIDDEN.partial # all is made here; FUSED itself changes at the very end
RETRAIN="VERSION=$VERSION MODEL=$MODEL ./fine_tune.sh"

if [ ! -f "$BASE/config.json" ]; then
  set -- models/base/*/config.json
  set -- "${@%/config.json}"
  set -- "${@##*/}"
  meant=$(python3 -c 'import difflib, sys
print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1))' "$MODEL" "$@" 2>/dev/null || true)
  if [ $# = 1 ] && [[ $given != *" MODEL="* ]]; then meant=$1; fi
  fix="hf download mlx-community/$MODEL --local-dir $BASE"
  [ -z "$meant" ] || fix="export MODEL=$meant"
  fail "there is no base model in $BASE (there: ${*:-none})" "$fix"
fi
if [ ! -f "$ADAPTER/adapters.safetensors" ]; then
  set -- models/adapters/adapter-*
  fail "there is no adapter in $ADAPTER (there: ${*##*/})" "$RETRAIN, or export another VERSION"
fi

mkdir -p models/fused 2>/dev/null || true
[ -w models/fused ] || fail "models/fused cannot be written to" "chmod u+w models/fused"
if [ -L "$FUSED" ] || { [ -e "$FUSED" ] && [ ! -d "$FUSED" ]; }; then
  fail "$FUSED is not a folder of its own" "mv $FUSED $FUSED.other"
elif [ -d "$FUSED" ] && [ ! -w "$FUSED" ]; then
  fail "$FUSED cannot be written to" "chmod -R u+w $FUSED"
fi

# ---- what runs, and how it ends -----------------------------------------------------------------
run() { # a command that ends when this script does, even by kill -9
  "$@" &
  local child=$! code=0
  exec 8> >(read -r || kill "$child" 2>/dev/null) # read fails when nobody holds 8 any more
  wait "$child" || code=$?
  echo >&8
  exec 8>&-
  return "$code"
}
exec 7>&2 # while a command runs, 2 is its log
stop() {
  trap '' INT TERM HUP
  for child in $(jobs -p); do
    kill "$child" 2>/dev/null || true
    wait "$child" || true
  done
  echo "interrupted: the previous fused model is as it was" >&7 || true
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP

# The lock ends with the last process that holds descriptor 9: this one or a child, however it ends.
{ exec 9>"$HIDDEN.lock"; } 2>/dev/null || fail "$HIDDEN.lock is not a file" "rm -r $HIDDEN.lock"
run python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
  fail "another run is writing $FUSED" "wait until it is done, or end it"
if [ -d "$HIDDEN.old" ] && [ ! -e "$FUSED" ]; then
  mv "$HIDDEN.old" "$FUSED" # the last run was killed between the two renames at its end
fi
rm -rf "$HIDDEN.old"
trap 'rm -rf "$PARTIAL"' EXIT
rm -rf "$PARTIAL"
mkdir "$PARTIAL" "$PARTIAL/adapter"

# A copy, for ./fine_tune.sh may replace the adapter meanwhile; after cd both are of one adapter.
copy() { cd "$ADAPTER" && cp adapters.safetensors adapter_config.json "$OLDPWD/$PARTIAL/adapter"; }
why=$(copy 2>&1 | tail -n 1) || fail "the adapter cannot be copied: $why" "make room, or $RETRAIN"

# ---- what there is, and how many bits -----------------------------------------------------------
run python3 /dev/fd/3 "$BASE" "$FUSED" "$PARTIAL" "$VERSION" "$FUSED_BITS" "$GROUP_SIZE" \
  "$RETRAIN" 3<<'PYTHON' || exit 1
import glob, hashlib, json, os, re, sys
from importlib.metadata import version

try:
    import mlx.core as mx
except ImportError as e:  # mlx_lm.fuse is that of another Python
    sys.exit(f"error: {e}. FIX: source venv/bin/activate; pip install -r requirements.txt")

base, fused, partial, data, bits, group, retrain = sys.argv[1:]
model = os.path.basename(base)


def fail(what, fix):
    sys.exit(f"error: {repr(what)[1:-1]}. FIX: {fix}")  # repr: a file may hold terminal escapes


try:
    text = open(f"{base}/config.json").read()
    quantized = json.loads(text).get("quantization")
    here = sum(map(os.path.getsize, glob.glob(f"{base}/model*.safetensors")))
    whole = here  # its size at 16 bits; a group of weights also has a scale and a bias
    if quantized:
        whole = here * 16 / (quantized["bits"] + 32 / quantized["group_size"])
    if any(int(layers) > 1000 for layers in re.findall(r"layers?\W+(\d+)", text)):
        raise ValueError("more than 1,000 layers")
except Exception as error:
    fail(f"{base}/config.json is not that of a model: {error!r}",
         f"hf download mlx-community/{model} --local-dir {base}")
try:
    path = f"{partial}/adapter/adapters.safetensors"
    checksum = hashlib.sha256(open(path, "rb").read()).hexdigest()
    trained_on = json.load(open(f"{partial}/adapter/adapter_config.json"))["model"]
    trained_on = os.path.basename(trained_on)
    finite = all(mx.isfinite(values).all().item() for values in mx.load(path).values())
except Exception as error:
    fail(f"the adapter does not open: {error!r}", retrain)
if trained_on != model:
    fail(f"the adapter was trained on {trained_on}, not on {model}",
         f"MODEL={trained_on} ./fuse.sh")
if not finite:
    fail("the adapter holds NaN or infinite values", f"{retrain} with a smaller LEARNING_RATE")
try:
    before = json.load(open(f"{fused}/fused_from.json"))["base"]
except Exception:
    before = model  # none is there, or nobody knows from what it was made
if before != model:
    fail(f"{fused} is there, and made from {before}", "choose another VERSION for one of them")

# mlx_lm.fuse holds the base and the 16-bit model at once: measured, 1.06 times their sum.
need = 1.1 * (here + whole)
device = mx.device_info()  # Metal tells what it may use, CUDA what the card has, a CPU nothing
memory = device.get("max_recommended_working_set_size") or device.get("total_memory")
memory = memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
if bits == "auto":
    bits = "8" if quantized and need < memory else "base"
if bits == "base" and quantized:
    print(f"warning: rounding to {quantized['bits']} bits may forget a part of what was learned"
          f" (test_on_validation.py tells). FUSED_BITS=8 takes {need / 1e9:.3g} GB of memory,"
          f" of {memory / 1e9:.3g} GB", file=sys.stderr)
origin = {"base": model, "adapter_sha256": checksum, "version": data}
origin |= {"bits": bits, "group_size": int(group)}
origin |= {"mlx": version("mlx"), "mlx_lm": version("mlx-lm")}
json.dump(origin, open(f"{partial}/fused_from.json", "w"), indent=2)
print(bits, file=open(f"{partial}/bits", "w"))
PYTHON
BITS=$(cat "$PARTIAL/bits")
say "fusing      $MODEL and adapter-${VERSION}_$MODEL, FUSED_BITS=$BITS"

# ---- fusing -------------------------------------------------------------------------------------
step() { # a command; of what it prints, the line that matters is shown, and only if it fails
  run "$@" >"$PARTIAL/log" 2>&1 && return
  local code=$? why fix="hf download mlx-community/$MODEL --local-dir $BASE"
  why=$(grep -E '^[A-Za-z_.:+]+: ' "$PARTIAL/log" | tail -n 1 | tr -cd '[:print:]' || true)
  case $code-$why in
    137-* | *emory*) fix="FUSED_BITS=base ./fuse.sh, or use the adapter as it is: both need less" ;;
    *write* | *"No space"* | *"too large"*) fix="make room on the disk of models/fused" ;;
  esac
  fail "$1 ended with code $code: $why" "$fix"
}
fuse() {
  say "running     mlx_lm.fuse"
  step mlx_lm.fuse --model "$BASE" --adapter-path "$PARTIAL/adapter" --save-path "$@"
}
case $BITS in
  base) fuse "$PARTIAL/model" ;;
  16) fuse "$PARTIAL/model" --dequantize ;;
  *) # rounding the sum to the 4 bits of the base would lose most of the update
    fuse "$PARTIAL/exact" --dequantize
    say "running     mlx_lm.convert"
    step mlx_lm.convert --hf-path "$PARTIAL/exact" --mlx-path "$PARTIAL/model" \
      -q --q-bits "$BITS" --q-group-size "$GROUP_SIZE"
    rm -r "$PARTIAL/exact"
    ;;
esac
# As the base has them: mlx-lm writes the one for transformers 5 alone, GGUF needs the other.
for name in tokenizer_config.json tokenizer.model; do
  [ ! -f "$BASE/$name" ] || cp "$BASE/$name" "$PARTIAL/model/"
done
mv "$PARTIAL/fused_from.json" "$PARTIAL/model/"
step python3 -c '
import mlx_lm, sys

_, tokenizer = mlx_lm.load(sys.argv[1], lazy=True)
if not tokenizer.has_chat_template:
    sys.exit("ValueError: the base has no chat template, or has lost it")
' "$PARTIAL/model"

# ---- into its place -----------------------------------------------------------------------------
trap '' INT TERM HUP # for this moment: everything or nothing
[ ! -d "$FUSED" ] || mv "$FUSED" "$HIDDEN.old"
mv "$PARTIAL/model" "$FUSED"
rm -rf "$HIDDEN.old"
say "wrote       $FUSED, with fused_from.json"
say "next        python test_on_validation.py"
