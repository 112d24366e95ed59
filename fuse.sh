#!/usr/bin/env bash
# Fuse the adapter into the base model: one model folder that needs no adapter any more.
#
#   ./fuse.sh                  keeps as much of what was learned as this machine can
#   FUSED_BITS=16 ./fuse.sh    exact and large
#
# Reads   models/base/$MODEL, models/adapters/adapter-${VERSION}_$MODEL
# Writes  models/fused/fused-${VERSION}_$MODEL, and in it fused_from.json: what it was made from
# Exit    0 done, 1 bad input or environment, 2 wrong usage, 130 Ctrl-C

# sh, zsh, source and, because of the 02, Python too stop here and show this line.
[ "${BASH_SOURCE-}" = "$0" ] || { echo "error: not started. FIX: ./fuse.sh" >&2 && return 02; }

fail() {
  echo "error: $1. FIX: $2" >&2
  exit "${3:-1}"
}
misread() { # a line of the settings that bash cannot read, and its number: FUSED_BITS = 8
  trap - EXIT
  # Without the note behind it, and with spaces for signs: 'MODEL : "a"  # note' → MODEL, a.
  read -r name value <<<"$(tr "=:\$\"'" ' ' <<<"${1%%#*}")"
  fail "line $2 of fuse.sh, ${1%%$'\n'*}, is not NAME=value" "write there: $name=\"$value\""
}
trap 'misread "$BASH_COMMAND" "$LINENO"' ERR
trap 'fail "a quote or bracket in the settings of fuse.sh has no end" "write NAME=\"value\""' EXIT
given=$(declare -p VERSION MODEL FUSED_BITS 2>/dev/null || true)

# ---- settings -----------------------------------------------------------------------------------
VERSION=v1                     # which data the adapter was trained on
MODEL=gemma-3-text-27b-it-4bit # which base model: models/base/MODEL
FUSED_BITS=auto                # 16, 8, base (as many as it has), auto (8 if memory suffices)
# -------------------------------------------------------------------------------------------------

eval "$given" # what the environment sets wins over the lines above
trap - ERR EXIT
set +Cfx -euo pipefail # BASH_ENV may have set others
IFS=$' \t\n'
trap '' PIPE XFSZ # a closed pipe and a full disk shall not end us without our words
unset CDPATH "${!HF_@}" "${!TRANSFORMERS@}" "${!MLXLM@}" "${!TQDM@}"
for name in "${!PYTHON@}"; do
  [ "$name" = PYTHONPATH ] || unset "$name"
done
export LC_ALL=C PYTHONUTF8=1 PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1
say() { echo "$*" 2>/dev/null || true; }

# ---- checks before a model is loaded ------------------------------------------------------------
[ $# = 0 ] || fail "it takes no $1" "settings go in front: FUSED_BITS=16 ./fuse.sh" 2
for setting in VERSION MODEL; do
  [ $setting = VERSION ] && usual=v1 || usual=gemma-3-text-27b-it-4bit
  value=${!setting:-}
  good=${value%/}
  good=${good##*/} # the last part of a path
  good=${good//[!A-Za-z0-9._-]/_}
  good=${good#"${good%%[!.-]*}"} # without dots and dashes at its beginning
  [[ $value =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] ||
    fail "$setting=$value is not a name" "export $setting=${good:-$usual}"
done
[[ ${FUSED_BITS:=} =~ ^(auto|base|16|8)$ ]] ||
  fail "FUSED_BITS=$FUSED_BITS is not auto, base, 16 or 8" "FUSED_BITS=auto ./fuse.sh"
command -v mlx_lm.fuse >/dev/null || fail "mlx_lm.fuse was not found" \
  "source venv/bin/activate (see README.md, Install)"
# The script may be called by a link, as in ~/bin.
cd "$(python3 -c 'import os, sys; print(os.path.dirname(os.path.realpath(sys.argv[1])))' "$0")"

BASE=models/base/$MODEL
ADAPTER=models/adapters/adapter-${VERSION}_$MODEL
FUSED=models/fused/fused-${VERSION}_$MODEL
HIDDEN=models/fused/.fused-${VERSION}_$MODEL
PARTIAL=$HIDDEN.partial # all is made here; FUSED itself changes at the very end
RETRAIN="VERSION=$VERSION MODEL=$MODEL ./fine_tune.sh"
DOWNLOAD="hf download mlx-community/$MODEL --local-dir $BASE"
bits=${MODEL#tiny-gemma-3-}
case $MODEL in
  tiny-gemma-3) DOWNLOAD="python tests/tiny_base.py" ;;
  tiny-gemma-3-[0-9]bit) DOWNLOAD="python tests/tiny_base.py --bits ${bits%bit}" ;;
esac

if [ -L "$BASE" ] && [ ! -e "$BASE" ]; then
  fail "$BASE is a link to $(readlink "$BASE"), which is not there" "connect its disk"
fi
if [ ! -f "$BASE/config.json" ]; then
  fix=""
  for folder in models/base/*/; do
    [ ! -d "$folder" ] || fix+="export MODEL=$(basename "$folder"), or "
  done
  fail "there is no base model in $BASE" "$fix$DOWNLOAD"
fi
if [ ! -f "$ADAPTER/adapters.safetensors" ]; then
  fix=$RETRAIN
  for folder in models/adapters/adapter-*_"$MODEL"/; do
    name=$(basename "$folder" "_$MODEL")
    [ ! -d "$folder" ] || fix+=", or export VERSION=${name#adapter-}"
  done
  fail "there is no adapter in $ADAPTER" "$fix"
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
mkdir -p models/fused 2>/dev/null || true
{ exec 9>"$HIDDEN.lock"; } 2>/dev/null ||
  fail "models/fused cannot be written to" "chmod u+w models/fused"
python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
  fail "another run is writing $FUSED" "wait until it is done, or end it"
if [ -d "$HIDDEN.old" ] && [ ! -e "$FUSED" ]; then
  mv "$HIDDEN.old" "$FUSED" # the last run was killed between the two renames at its end
fi
rm -rf "$HIDDEN.old" "$PARTIAL"
trap 'rm -rf "$PARTIAL"' EXIT
mkdir "$PARTIAL" "$PARTIAL/adapter"

# A copy, for ./fine_tune.sh may replace the adapter meanwhile; after cd both are of one adapter.
(cd "$ADAPTER" && cp adapters.safetensors adapter_config.json "$OLDPWD/$PARTIAL/adapter") ||
  fail "the adapter cannot be copied" "make room on the disk of models/fused, or $RETRAIN"

# ---- what there is, and how many bits -----------------------------------------------------------
export BASE VERSION MODEL FUSED_BITS PARTIAL DOWNLOAD RETRAIN
run python3 /dev/fd/3 3<<'PYTHON' >"$PARTIAL/bits" || exit 1
import hashlib, json, os, sys
from pathlib import Path

base, partial = Path(os.environ["BASE"]), Path(os.environ["PARTIAL"])
model, bits = os.environ["MODEL"], os.environ["FUSED_BITS"]


def fail(what, fix):
    sys.exit(f"error: {repr(what)[1:-1]}. FIX: {fix}")  # repr: a file may hold terminal escapes


try:
    import mlx.core as mx
except ImportError as error:  # mlx_lm.fuse is that of another Python
    fail(error.msg, "source venv/bin/activate (see README.md, Install)")
try:
    config = json.loads((base / "config.json").read_bytes())
    if config.get("text_config", config).get("num_hidden_layers", 0) > 1000:
        raise ValueError("so many layers would fill the memory")
    quantized = config.get("quantization")
    here = sum(path.stat().st_size for path in base.glob("model*.safetensors"))
    whole = here  # its size at 16 bits; a group of weights also has a scale and a bias
    if quantized:
        whole = here * 16 / (quantized["bits"] + 32 / quantized["group_size"])
except Exception as error:
    fail(f"{base}/config.json cannot be used: {error!r}", os.environ["DOWNLOAD"])
try:
    adapter = partial / "adapter/adapters.safetensors"
    checksum = hashlib.sha256(adapter.read_bytes()).hexdigest()
    trained_on = json.loads(adapter.with_name("adapter_config.json").read_bytes())["model"]
    if Path(trained_on).name != model:
        raise ValueError(f"it was trained on {trained_on}")
    if not all(mx.isfinite(values).all() for values in mx.load(str(adapter)).values()):
        raise ValueError("it holds NaN or infinite values")
except Exception as error:
    fail(f"the adapter cannot be used: {error!r}", os.environ["RETRAIN"])

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
origin = {"base": model, "adapter_sha256": checksum, "version": os.environ["VERSION"]}
origin |= {"bits": bits, "group_size": 64}  # that of mlx_lm.convert
(partial / "fused_from.json").write_text(json.dumps(origin, indent=2))
print(bits)
PYTHON
BITS=$(cat "$PARTIAL/bits")
say "fusing      $MODEL and adapter-${VERSION}_$MODEL, FUSED_BITS=$BITS"

# ---- fusing -------------------------------------------------------------------------------------
step() { # a command; of what it prints, the line that matters is shown, and only if it fails
  run "$@" >"$PARTIAL/log" 2>&1 && return
  local code=$? why fix=$DOWNLOAD
  why=$(grep -E '^[A-Za-z_.:+]+: ' "$PARTIAL/log" | tail -n 1 | tr -cd '[:print:]' || true)
  case $code-$why in
    137-* | *emory*) fix="FUSED_BITS=base ./fuse.sh, or use the adapter as it is: both need less" ;;
    *write* | *"No space"* | *"too large"*) fix="make room on the disk of models/fused" ;;
  esac
  fail "$1 ended with code $code: $why" "$fix"
}
say "running     mlx_lm.fuse"
fuse() { step mlx_lm.fuse --model "$BASE" --adapter-path "$PARTIAL/adapter" --save-path "$@"; }
case $BITS in
  base) fuse "$PARTIAL/model" ;;
  16) fuse "$PARTIAL/model" --dequantize ;;
  8) # rounding the sum to the 4 bits of the base would lose most of the update
    fuse "$PARTIAL/exact" --dequantize
    say "running     mlx_lm.convert"
    step mlx_lm.convert --hf-path "$PARTIAL/exact" --mlx-path "$PARTIAL/model" -q --q-bits 8
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
assert tokenizer.has_chat_template, "the base has no chat template, or has lost it"
' "$PARTIAL/model"

# ---- into its place -----------------------------------------------------------------------------
trap '' INT TERM HUP # for this moment: everything or nothing
if [ -e "$FUSED" ] || [ -L "$FUSED" ]; then mv "$FUSED" "$HIDDEN.old"; fi
mv "$PARTIAL/model" "$FUSED"
rm -rf "$HIDDEN.old"
say "wrote       $FUSED, with fused_from.json"
say "next        VERSION=$VERSION MODEL=$MODEL python test_on_validation.py"
