#!/usr/bin/env bash
# Step 5 of the guide: train a LoRA adapter with mlx_lm.lora, and keep its best checkpoint.
#
#   ./fine_tune.sh                                with the settings below
#   ITERS=60 LEARNING_RATE=1e-4 ./fine_tune.sh    with other settings, for this run only
#   RESUME=1 ./fine_tune.sh                       goes on with a run that was interrupted
#   ./fine_tune.sh --report-to wandb              goes through to mlx_lm.lora; --project-name too
#
# Reads   models/base/$MODEL, data/for_train/$VERSION/{train,valid}.jsonl
# Writes  models/adapters/adapter-${VERSION}_$MODEL/: adapters.safetensors (the checkpoint with the
#         lowest loss on the replies of valid.jsonl), adapter_config.json, losses.csv, training.log,
#         settings and lora_config.yaml (how it was trained)
# Exit    0 done, 1 bad input or environment, 2 wrong usage, 130 Ctrl-C

# ---- settings: edit a value behind :- ------------------------------------------------------------
set -a                                   # the Python programs read them, too
VERSION=${VERSION:-v1}                   # which data: data/for_train/VERSION
MODEL=${MODEL:-gemma-3-text-27b-it-4bit} # which base model: models/base/MODEL
ITERS=${ITERS:-auto}                     # iterations; auto: one epoch, at most 1,200 rows
BATCH_SIZE=${BATCH_SIZE:-2}              # rows in a batch; out of memory: 1
GRAD_CHECKPOINT=${GRAD_CHECKPOINT:-0}    # 1 takes about 0.6 of the memory, and a third more time
MAX_SEQ_LENGTH=${MAX_SEQ_LENGTH:-1024}   # most tokens in a row, as in build_train.py
LEARNING_RATE=${LEARNING_RATE:-auto}     # auto: by the model's size; a loss that jumps: a third
RANK=${RANK:-32}                         # size of the adapter, 4 to 64; overfitting: 8
SCALE=${SCALE:-10.0}                     # factor on what the adapter adds; a loss that jumps: 5
DROPOUT=${DROPOUT:-0.0}                  # share of its input that is dropped; overfitting: to 0.2
NUM_LAYERS=${NUM_LAYERS:--1}             # layers to train, counted from the last; -1 all
EMBEDDINGS=${EMBEDDINGS:-1}              # 1 adapts the token embeddings too
MASK_PROMPT=${MASK_PROMPT:-0}            # 1 learns replies only; 0 is better where prompts are chat
EVAL_EVERY=${EVAL_EVERY:-200}            # iterations between two scored checkpoints
SEED=${SEED:-0}                          # another whole number: the batches in another order
CHECK_MEMORY=${CHECK_MEMORY:-1}          # 0 trains even if it seems not to fit; a Mac may crash
LAUNCH=${LAUNCH:-}                       # several machines: "mlx.launch --hostfile hosts.json --"
RESUME=${RESUME:-auto}                   # after an interrupted run: 1 goes on, 0 starts anew
set +a
# --------------------------------------------------------------------------------------------------

fail() { # what is wrong, and the commands that fix it
  echo "error: $1" >&2
  shift
  printf 'FIX: %s\n' "$@" >&2
  exit 1
}

case ${1:-} in
  "" | --report-to* | --project-name*) ;;
  -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
  *) (fail "fine_tune.sh takes no $1; settings go in front" "./fine_tune.sh --help") || exit 2 ;;
esac

set -eu
cd "$(dirname "$0")"
umask 077                                                # chats are private
export HF_HUB_OFFLINE=1                                  # nothing leaves this machine
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" # MLX 0.32 fails where it sees several

command -v python >/dev/null || fail "python was not found" "source venv/bin/activate"
adapter=models/adapters/adapter-${VERSION}_$MODEL
# All work is done beside the adapter, on its disk; the adapter itself changes at the very end.
hidden=$(python -m models.folders "$adapter") # models/adapters/.adapter-v1_gemma
work=$hidden.partial
train=data/for_train/$VERSION/train.jsonl valid=data/for_train/$VERSION/valid.jsonl
again="VERSION=$VERSION MODEL=$MODEL ./fine_tune.sh"

# ---- checks, before a model is loaded ------------------------------------------------------------
newest=$(find "$work" -maxdepth 1 -name '0*' 2>/dev/null | sort | tail -n 1) # checkpoint, if any
if [ "$RESUME" = 1 ]; then
  [ "$newest" ] || fail "there is no interrupted run to go on with" "RESUME=0 $again"
  # shellcheck source=/dev/null
  . "$work/settings" # a resumed run keeps the settings it was started with, and its data
  train=$work/data/train.jsonl valid=$work/valid.jsonl
fi
plan=$(python -m models.check_training "$train" "$valid") # ITERS=600 and so on, in place of auto
eval "$plan"                                              # only numbers and quoted words

# The lock ends with the last process that holds descriptor 9, however it ends: this one or a child.
exec 9>"$hidden.lock"
python -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
  fail "another run is writing $adapter" "# wait until it is done, or end it"

# ---- start, or go on -----------------------------------------------------------------------------
cannot_write() {
  fail "cannot write to $work" "df -h models/adapters  # free space" "RESUME=$RESUME $again"
}
if [ "$RESUME" = 1 ]; then
  iters_done=$((10#$(basename "$newest" .safetensors))) # 10#: 0000200 is not octal
  echo "resuming    after $iters_done of $ITERS iterations; the optimizer starts anew"
elif [ "$RESUME" = auto ] && [ "$newest" ]; then
  fail "an interrupted run has left a checkpoint, $(basename "$newest")" \
    "RESUME=1 $again  # goes on with it" "RESUME=0 $again  # starts anew"
else
  iters_done=0 newest=
  rm -rf "$work"
  mkdir -p "$work/data"
  cp "$train" "$work/data" || cannot_write
  cp "$valid" "$work" || cannot_write # not in data/: mlx_lm.lora would score it, padding too
  echo "$plan" >"$work/settings" || cannot_write
fi

# ---- train ---------------------------------------------------------------------------------------
# What mlx_lm.lora has no flags for. The rate rises for some iterations, then falls to 0 in a line,
# which a resumed run rejoins. With such a schedule --learning-rate is only written down.
left=$((ITERS - iters_done))
warmup=$((left < 20 ? left / 2 : 10))
rate=$(LC_ALL=C awk "BEGIN { print $LEARNING_RATE * $left / $ITERS }")
cat >"$work/lora_config.yaml" <<YAML || cannot_write
lora_parameters:
  rank: $RANK
  scale: $SCALE
  dropout: $DROPOUT
  keys: [$KEYS]
lr_schedule:
  name: linear_schedule
  arguments: [$rate, 0.0, $((left - warmup))]
  warmup: $warmup
optimizer_config: {adam: {bias_correction: true}} # else early updates are up to 6 times too large
grad_checkpoint: $GRAD_CHECKPOINT
mask_prompt: $MASK_PROMPT
YAML

interrupted() {
  echo "interrupted: an earlier adapter is unchanged
FIX: RESUME=1 $again  # goes on from the last checkpoint, if there is one" >&2
  exit 130
}
trap interrupted INT
if [ "$(uname)" = Darwin ]; then
  caffeinate -i -w $$ 9>&- & # a Mac does not fall asleep while this script runs
fi
# A checkpoint to resume from every 50 iterations: about ten minutes at 27B.
save_every=$((EVAL_EVERY % 50 == 0 ? 50 : EVAL_EVERY))
if [ "$left" -gt 0 ]; then
  # Links to the files of the base model, with a chat template that does not ask it to think.
  python -m models.chat_template "models/base/$MODEL" "$work/base/$MODEL"
  # shellcheck disable=SC2086 # LAUNCH is several words
  python -m models.watch_training "$work" "$iters_done" "$ITERS" \
    $LAUNCH "$(command -v mlx_lm.lora)" --train "$@" \
    --model "$work/base/$MODEL" \
    --data "$work/data" \
    --adapter-path "$work/run" \
    --config "$work/lora_config.yaml" \
    --num-layers "$NUM_LAYERS" --max-seq-length "$MAX_SEQ_LENGTH" \
    --batch-size "$BATCH_SIZE" --iters "$left" --seed "$((SEED + iters_done))" \
    --learning-rate "$LEARNING_RATE" --save-every "$save_every" --steps-per-report 1 \
    ${newest:+--resume-adapter-file "$newest"}
fi

# ---- keep the best checkpoint --------------------------------------------------------------------
python -m models.best_checkpoint "$work" "models/base/$MODEL" "$adapter"
rm -rf "$work"
echo "next        VERSION=$VERSION MODEL=$MODEL ./fuse.sh"
