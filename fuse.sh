#!/usr/bin/env bash
# Step 6 of the guide: fuse base model and adapter into one folder that needs no adapter.
#
#   ./fuse.sh                  keeps as much of what was learned as this machine can
#   FUSED_BITS=16 ./fuse.sh    exact and large
#
# Reads   models/base/$MODEL, models/adapters/adapter-${VERSION}_$MODEL
# Writes  models/fused/fused-${VERSION}_$MODEL, and in it fused_from.json: what it was made from
# Exit    0 done, 1 bad input or environment, 2 wrong usage, 130 Ctrl-C

# ---- settings: edit a value behind :- ------------------------------------------------------------
set -a                                   # the Python programs read them, too
VERSION=${VERSION:-v1}                   # which data the adapter was trained on
MODEL=${MODEL:-gemma-3-text-27b-it-4bit} # which base model: models/base/MODEL
FUSED_BITS=${FUSED_BITS:-auto}           # 16, 8, base (as many as it has), auto (8 if memory does)
set +a
# --------------------------------------------------------------------------------------------------

fail() { # what is wrong, and the command that fixes it
  printf 'error: %s\nFIX: %s\n' "$1" "$2" >&2
  exit "${3:-1}"
}

case ${1:-} in
  "") ;;
  -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
  *) fail "fuse.sh takes no $1; settings go in front" "./fuse.sh --help" 2 ;;
esac

set -eu
cd "$(dirname "$0")"
umask 077               # what a chat has taught is private, too
export HF_HUB_OFFLINE=1 # nothing leaves this machine

command -v python >/dev/null || fail "python was not found" "source venv/bin/activate"
adapter=models/adapters/adapter-${VERSION}_$MODEL
fused=models/fused/fused-${VERSION}_$MODEL
# All work is done beside the fused model, on its disk; the model itself changes at the very end.
hidden=$(python -m models.folders "$fused") # models/fused/.fused-v1_gemma
work=$hidden.partial
base=$work/base/$MODEL

# ---- checks, before a model is loaded ------------------------------------------------------------
FUSED_BITS=$(python -m models.check_fusing check) # in place of auto

# The lock ends with the last process that holds descriptor 9, however it ends: this one or a child.
exec 9>"$hidden.lock"
python -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
  fail "another run is writing $fused" "# wait until it is done, or end it"

# ---- fuse ----------------------------------------------------------------------------------------
interrupted() {
  kill ${!:-} 2>/dev/null || true
  echo "interrupted: an older fused model stays as it was" >&2
  exit 130
}
trap interrupted INT TERM HUP
trap 'rm -rf "$work"' EXIT

step() { # log a command; it runs in the background, so that bash answers a signal at once
  echo "running     $1"
  "$@" >"$hidden.log" 2>&1 &
  wait $! || python -m models.check_fusing explain "$hidden.log"
}
fuse() { step mlx_lm.fuse --model "$base" --adapter-path "$work/adapter" --save-path "$@"; }

rm -rf "$work"
mkdir -p "$work/adapter"
cp "$adapter/adapters.safetensors" "$adapter/adapter_config.json" "$work/adapter" ||
  fail "cannot write to $work" "df -h models/fused  # free space"
# Links to the files of the base model, with the chat template that the adapter was trained with.
python -m models.chat_template "models/base/$MODEL" "$base"
echo "fusing      $MODEL and adapter-${VERSION}_$MODEL, FUSED_BITS=$FUSED_BITS"
case $FUSED_BITS in
  base) fuse "$work/model" ;;
  16) fuse "$work/model" --dequantize ;;
  8) # rounding the sum to the 4 bits of the base would lose most of the update
    fuse "$work/exact" --dequantize
    step mlx_lm.convert --hf-path "$work/exact" --mlx-path "$work/model" -q --q-bits 8
    ;;
esac
# Only transformers 5 reads the config that mlx-lm writes; GGUF needs that of the base.
cp "$base/tokenizer_config.json" "$work/model"
if [ -f "$base/tokenizer.model" ]; then cp "$base/tokenizer.model" "$work/model"; fi

# ---- into its place ------------------------------------------------------------------------------
python -m models.check_fusing finish "$work" "$fused"
rm -f "$hidden.log"
echo "next        VERSION=$VERSION MODEL=$MODEL python test_on_validation.py"
