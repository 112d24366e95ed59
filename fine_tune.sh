#!/usr/bin/env bash
# Train a LoRA adapter on the dataset of build_train.py, and keep the best of the run, not the last.
#
#   ./fine_tune.sh                                 with the settings below
#   ITERS=60 LEARNING_RATE=2e-4 ./fine_tune.sh     with other settings, for this run only
#   RESUME=1 ./fine_tune.sh                        goes on with a run that was interrupted
#   ./fine_tune.sh --report-to wandb               arguments go through to mlx_lm.lora
#
# Reads   models/base/$MODEL, data/for_train/$VERSION/{train,valid}.jsonl
# Writes  models/adapters/adapter-${VERSION}_$MODEL/: adapters.safetensors (the checkpoint with the lowest validation
#         loss), adapter_config.json, lora_config.yaml (the settings), losses.csv, training.log, numbered checkpoints
# Exit    0 done, 1 bad input or environment, 2 wrong usage, 130 Ctrl-C

# ---- settings ------------------------------------------------------------------------------------------------------
VERSION=${VERSION:-v1}                      # which data: data/for_train/VERSION
MODEL=${MODEL:-gemma-3-text-27b-it-4bit}    # which base model: models/base/MODEL
ITERS=${ITERS:-600}                         # batches to train on; the best checkpoint is kept, so rather too many
BATCH_SIZE=${BATCH_SIZE:-2}                 # rows in a batch; out of memory: 1
GRAD_ACCUMULATION=${GRAD_ACCUMULATION:-1}   # batches per update of the weights; 2 with BATCH_SIZE=1 is like 1 with 2
GRAD_CHECKPOINT=${GRAD_CHECKPOINT:-0}       # 1 takes about 0.6 of the memory, and a third more time
MAX_SEQ_LENGTH=${MAX_SEQ_LENGTH:-1024}      # tokens in a row, as in build_train.py; out of memory: 512 in both
NUM_LAYERS=${NUM_LAYERS:--1}                # layers to train, counted from the last; -1 all; out of memory: 16 or 8
EMBEDDINGS=${EMBEDDINGS:-1}                 # 1 adapts the token embeddings too; 0 where NUM_LAYERS shall save memory
RANK=${RANK:-32}                            # size of the adapter, 4 to 64; overfitting, or 27B in 32 GB: 8
SCALE=${SCALE:-10.0}                        # factor on what the adapter adds; NaN or a jumping loss: 5
DROPOUT=${DROPOUT:-0.0}                     # share of the adapter's input dropped, 0 to 0.2; overfitting: more
LEARNING_RATE=${LEARNING_RATE:-2e-4}        # largest step of an update; NaN or a jumping loss: a third of it
SCHEDULE=${SCHEDULE:-linear}                # learning rate after the warm-up: linear (to 0 at the end) or constant
WARMUP=${WARMUP:-10}                        # batches in which the learning rate rises from 0; 0 none
OPTIMIZER=${OPTIMIZER:-adam}                # adam, adamw, muon, sgd, adafactor
FINE_TUNE_TYPE=${FINE_TUNE_TYPE:-lora}      # lora, dora, full (an unquantised base and much memory)
MASK_PROMPT=${MASK_PROMPT:-0}               # 1 learns completions only; 0 is better where prompts are chat as well
EVAL_EVERY=${EVAL_EVERY:-100}               # batches from one evaluation of the whole validation set to the next
PATIENCE=${PATIENCE:-3}                     # evaluations without improvement that end the run; 0 never
KEEP_CHECKPOINTS=${KEEP_CHECKPOINTS:-1}     # numbered checkpoints that stay beside the best, 0 or more
SEED=${SEED:-0}                             # another whole number, another order of the batches
LAUNCH=${LAUNCH:-}                          # several machines: "mlx.launch --hostfile hosts.json --" (see README)
RESUME=${RESUME:-0}                         # 1 goes on with an interrupted run of the same settings and data
# --------------------------------------------------------------------------------------------------------------------

set -euo pipefail
EXTRA=$*
ROOT=$(cd "$(dirname "$0")" && pwd)
# C: a decimal comma, as in Italian, would break the numbers that awk writes. Python stays with UTF-8.
export LC_ALL=C PYTHONUTF8=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
fail() { echo "error: $1. FIX: $2" >&2; exit "${3:-1}"; }

# ---- checks before a model is loaded -------------------------------------------------------------------------------
for argument in "$@"; do
  case $argument in
    -h | --help) awk 'NR > 1 { if (/^# -----/) exit; sub(/^# ?/, ""); print }' "$0"; exit 0 ;;
    --report-to* | --project-name* | --test* | --trust-remote-code) ;;
    -*) fail "$argument is not an argument of fine_tune.sh, or is a setting at its top" \
      "ITERS=60 ./fine_tune.sh for a setting; --report-to, --project-name, --test, --trust-remote-code go to mlx_lm.lora" 2 ;;
    [A-Z]*=*) fail "$argument stands behind the command" "$argument ./fine_tune.sh" 2 ;;
  esac
done
name=${MODEL%/} name=${name##*/}
case $MODEL in
  models/* | ./* | ../* | /* | */) fail "MODEL=$MODEL is a path" "MODEL=$name ./fine_tune.sh" ;;
  */*) fail "MODEL=$MODEL is not the name of a folder in models/base" \
    "MODEL=$name ./fine_tune.sh, after hf download $MODEL --local-dir models/base/$name" ;;
esac
check() {  # the setting $1 must match $2, which $3 says in words; the fix is its default
  [[ ${!1} =~ ^($2)$ ]] || fail "$1=${!1} is not $3" "$1=$(sed -n "s/^$1=.*:-\(.*\)}.*/\1/p" "$0") ./fine_tune.sh"
}
for name in VERSION MODEL; do check $name '[A-Za-z0-9_][A-Za-z0-9._-]*' "a name of letters, digits, '.', '_' and '-'"; done
for name in ITERS BATCH_SIZE GRAD_ACCUMULATION RANK MAX_SEQ_LENGTH EVAL_EVERY; do
  check $name '[1-9][0-9]*' "a whole number above 0"
done
for name in WARMUP PATIENCE KEEP_CHECKPOINTS SEED; do check $name '0|[1-9][0-9]*' "a whole number"; done
for name in LEARNING_RATE SCALE DROPOUT; do check $name '[0-9]*[.]?[0-9]+([eE]-?[0-9]+)?' "a number, with a decimal point"; done
for name in EMBEDDINGS MASK_PROMPT GRAD_CHECKPOINT RESUME; do check $name '0|1' "0 or 1"; done
check NUM_LAYERS '-1|[1-9][0-9]*' "-1 (all) or a whole number above 0"
check SCHEDULE 'linear|constant' "linear or constant"
check OPTIMIZER 'adam|adamw|muon|sgd|adafactor' "adam, adamw, muon, sgd or adafactor"
check FINE_TUNE_TYPE 'lora|dora|full' "lora, dora or full"
[ "$FINE_TUNE_TYPE" != full ] || EMBEDDINGS=0   # mlx-lm then trains the layers alone
[ $((EVAL_EVERY % GRAD_ACCUMULATION)) = 0 ] ||
  fail "EVAL_EVERY=$EVAL_EVERY is not a multiple of GRAD_ACCUMULATION" "EVAL_EVERY=$((GRAD_ACCUMULATION * 10)) ./fine_tune.sh"
BASE=$ROOT/models/base/$MODEL
DATA=$ROOT/data/for_train/$VERSION
ADAPTER=$ROOT/models/adapters/adapter-${VERSION}_$MODEL
export PARTIAL=$ADAPTER.partial             # the run happens here; ADAPTER itself changes at the very end
if ! command -v mlx_lm.lora >/dev/null; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "python3 is $(python3 -V 2>&1 || true), and 3.11 or newer is needed" \
      "install one (on a Mac: brew install python@3.13), then make the environment: python3.13 -m venv venv"
  fail "mlx_lm.lora was not found, so the virtual environment is not active" \
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
for name in train valid; do
  [ -s "$DATA/$name.jsonl" ] || fail "data/for_train/$VERSION/$name.jsonl is missing or empty" \
    "VERSION=$VERSION python build_train.py"
done
if [ -f "$PARTIAL/pid" ] && ps -ww -p "$(cat "$PARTIAL/pid")" -o args= 2>/dev/null | grep -qF "$PARTIAL"; then
  fail "process $(cat "$PARTIAL/pid") is training this adapter" "wait until it is done, or: kill $(cat "$PARTIAL/pid")"
fi
if [ -d "$ADAPTER.old" ]; then              # the last run was cut off between the renames at its end: finish them
  [ -d "$ADAPTER" ] || mv "$PARTIAL" "$ADAPTER"
  rm -rf "$ADAPTER.old"
fi

look() {  # at the base model and the data; prints what they are, and to descriptor 3 the matrices to adapt
  python3 - "$BASE" "$DATA" "$FINE_TUNE_TYPE" "$ITERS" "$BATCH_SIZE" "$RANK" "$EVAL_EVERY" "$EMBEDDINGS" "$NUM_LAYERS" "$MAX_SEQ_LENGTH" <<'PYTHON'
import json, os, re, shutil, sys
from safetensors import SafetensorError, safe_open

def fail(what, fix):
    sys.exit(f"error: {what}. FIX: {fix}")

base, data, kind, *numbers = sys.argv[1:]
model, version = os.path.basename(base), os.path.basename(data)
iters, batch, rank, every, embeddings, layers, length = map(int, numbers)

shapes = {}  # of every tensor of the base model; a file that is cut off does not open
try:
    config = json.load(open(f"{base}/config.json"))
    index = f"{base}/model.safetensors.index.json"
    shards = set(json.load(open(index))["weight_map"].values()) if os.path.exists(index) else {"model.safetensors"}
    for shard in shards:
        with safe_open(f"{base}/{shard}", "numpy") as file:
            shapes.update((name, file.get_slice(name).get_shape()) for name in file.keys())
    if not any(os.path.exists(f"{base}/{name}") for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise OSError("there is no tokenizer")
except (OSError, ValueError, KeyError, SafetensorError) as error:
    fail(f"the base model in models/base/{model} is not complete: {error}",
         f"hf download mlx-community/{model} --local-dir models/base/{model}")
text = config.get("text_config", config)
depth, vocabulary = text.get("num_hidden_layers", layers), text.get("vocab_size", 1)
if layers > depth:
    fail(f"NUM_LAYERS={layers}, but {model} has {depth} layers", "NUM_LAYERS=-1 ./fine_tune.sh trains all")

most = 2**31 // vocabulary  # tokens in a batch; seen on CUDA from 1.5 times that: a wrong loss, NaN gradients, no error
if batch * length > most:
    smaller = f"BATCH_SIZE={most // length}" if length <= most else f"BATCH_SIZE=1 MAX_SEQ_LENGTH={most}"
    print(f"warning: {batch} rows of {length} tokens are more logits than MLX computes rightly on CUDA; if your rows are"
          f" that long: {smaller} ./fine_tune.sh", file=sys.stderr)

if kind == "full" and "quantization" in config:
    fail(f"{model} is quantised, and FINE_TUNE_TYPE=full trains whole weights", "FINE_TUNE_TYPE=lora ./fine_tune.sh")

rows = {}
for name in ("train", "valid"):
    with open(f"{data}/{name}.jsonl", "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                row["prompt"] + row["completion"] + ""
            except (ValueError, KeyError, TypeError):
                fail(f"data/for_train/{version}/{name}.jsonl, line {number}, is not a prompt and a completion",
                     f"VERSION={version} python build_train.py")
    rows[name] = number
    if number < batch:
        fail(f"{name}.jsonl has {number} rows, fewer than BATCH_SIZE={batch}", f"BATCH_SIZE={number} ./fine_tune.sh")

matrices, size = set(), 0  # a checkpoint holds RANK x (inputs + outputs) numbers of 4 bytes a matrix, or all of it (full)
for name, shape in shapes.items():
    found = re.search(r"(?:layers\.(\d+)\.(.+)|^(.*embed_tokens))\.weight$", name)
    if found and len(shape) > 1 and (embeddings or not found[3]):
        matrices.add(found[2] or found[3])
        if found[3] or int(found[1]) >= (0 if layers < 0 else depth - layers):
            scales = shapes.get(name.replace(".weight", ".scales"))  # a quantised matrix is packed, its scales tell the width
            inputs = scales[-1] * config["quantization"]["group_size"] if scales else shape[-1]
            size += 4 * (shape[-2] * inputs if kind == "full" else rank * (shape[-2] + inputs))
need, free = size * (iters // every + 3), shutil.disk_usage(os.path.dirname(base)).free
if need > free:
    fail(f"the checkpoints need {need / 1e9:.1f} GB and {free / 1e9:.1f} GB of disk are free", "make room, or raise EVAL_EVERY")
print(f"base model  {model}: {depth} layers, training {'all' if layers < 0 else layers}")
print(f"data        {version}: {rows['train']} rows to train on, {rows['valid']} to validate on")
print(f"run         {iters} batches of {batch} = {iters * batch / rows['train']:.3g} epochs; {size / 1e6:.3g} MB a checkpoint")
print(", ".join(sorted(matrices)), file=open(3, "w"))
PYTHON
}
{ MATRICES=$(look 3>&1 >&4); } 4>&1         # the summary goes on to the terminal, the names into the variable
echo "settings    LEARNING_RATE=$LEARNING_RATE SCHEDULE=$SCHEDULE WARMUP=$WARMUP RANK=$RANK SCALE=$SCALE EMBEDDINGS=$EMBEDDINGS"
echo "            DROPOUT=$DROPOUT MASK_PROMPT=$MASK_PROMPT MAX_SEQ_LENGTH=$MAX_SEQ_LENGTH OPTIMIZER=$OPTIMIZER EVAL_EVERY=$EVAL_EVERY PATIENCE=$PATIENCE SEED=$SEED"

# ---- the settings as mlx_lm.lora reads them ------------------------------------------------------------------------
KEYS=""                                     # mlx-lm adapts all matrices of the layers, or those that are named
if [ "$EMBEDDINGS" = 1 ]; then KEYS=", keys: [$MATRICES]"; fi
config() {  # of a run of which $1 batches are done already: the rest of the schedule
  cat <<YAML
# Written by fine_tune.sh: how this adapter was made.
# base model: $MODEL  launcher: ${LAUNCH:-none}  arguments: ${EXTRA:-none}
# train.jsonl: $(cksum <"$DATA/train.jsonl")
# valid.jsonl: $(cksum <"$DATA/valid.jsonl")
fine_tune_type: $FINE_TUNE_TYPE
num_layers: $NUM_LAYERS
lora_parameters: {rank: $RANK, scale: $SCALE, dropout: $DROPOUT$KEYS}
batch_size: $BATCH_SIZE
grad_accumulation_steps: $GRAD_ACCUMULATION
grad_checkpoint: $([ "$GRAD_CHECKPOINT" = 1 ] && echo true || echo false)
mask_prompt: $([ "$MASK_PROMPT" = 1 ] && echo true || echo false)
max_seq_length: $MAX_SEQ_LENGTH
optimizer: $OPTIMIZER
optimizer_config: {adam: {bias_correction: true}, adamw: {bias_correction: true}}  # else the first steps are 6 x too large
seed: $SEED
iters: $((ITERS - $1))
steps_per_report: $((EVAL_EVERY < 10 ? EVAL_EVERY : 10))
steps_per_eval: $EVAL_EVERY
save_every: $EVAL_EVERY
val_batches: -1
learning_rate: $LEARNING_RATE
YAML
  # mlx counts updates, not batches, and stays at the peak for two updates where the warm-up ends. The schedule is made
  # of straight lines because the rest of a straight line, which is what a resumed run needs, is a straight line again.
  awk -v rate="$LEARNING_RATE" -v end="$([ "$SCHEDULE" = linear ] && echo 0 || echo "$LEARNING_RATE")" \
    -v all=$((ITERS / GRAD_ACCUMULATION)) -v warm=$((WARMUP / GRAD_ACCUMULATION)) -v past=$(($1 / GRAD_ACCUMULATION)) 'BEGIN {
      steps = all > warm ? all - warm : 1
      over = past > warm ? past - warm - (warm > 0) : 0
      if (over >= steps) over = steps - 1
      print "lr_schedule:\n  name: linear_schedule"
      printf "  arguments: [%.9f, %.9f, %d]\n", rate + (end - rate) * over / steps, end, steps - over
      if (past < warm) printf "  warmup: %d\n  warmup_init: %.9f\n", warm - past, rate * past / warm
    }'
}
DONE=0
if [ "$RESUME" = 1 ]; then
  for newest in "$PARTIAL"/[0-9]*_adapters.safetensors; do :; done
  [ -f "$newest" ] || fail "there is no interrupted run with a checkpoint to resume" "./fine_tune.sh without RESUME=1"
  config 0 | diff "$PARTIAL/lora_config.yaml" - ||
    fail "settings or data are not those of the interrupted run (<, above)" "set them back, or start anew: ./fine_tune.sh"
  DONE=$((10#$(basename "$newest" _adapters.safetensors)))
  set -- --resume-adapter-file "$newest" "$@"
  awk -F, -v done="$DONE" 'NR == 1 || $1 <= done' "$PARTIAL/losses.csv" >"$PARTIAL/losses.new"
  mv "$PARTIAL/losses.new" "$PARTIAL/losses.csv"
  echo "resuming    after $DONE of $ITERS batches; the optimizer's state starts anew"
else
  rm -rf "$PARTIAL"
  mkdir -p "$PARTIAL/run" || fail "models/adapters cannot be written to" "chmod u+w models/adapters, or make room on the disk"
  config 0 >"$PARTIAL/lora_config.yaml"
  echo "iteration,train_loss,val_loss,tokens_per_second" >"$PARTIAL/losses.csv"
fi

# ---- training ------------------------------------------------------------------------------------------------------
cursor() { if [ -t 1 ]; then printf '\033[?25h'; fi; }  # mlx-lm hides it while its progress bar moves
on_interrupt() {
  cursor
  local how="No checkpoint yet: the same command starts anew"
  if ls "$PARTIAL"/[0-9]*_adapters.safetensors >/dev/null 2>&1; then
    how="To go on, put RESUME=1 in front of the same command; without it, training starts anew"
  fi
  printf '\ninterrupted: the previous adapter is as it was. %s\n' "$how" >&2
  exit 130
}
trap on_interrupt INT
SCREEN=/dev/null
if [ -t 1 ]; then                           # the terminal gets mlx-lm's live progress bar, the log plain lines
  SCREEN=/dev/tty
  export FORCE_COLOR=1 COLUMNS="${COLUMNS:-$(tput cols 2>/dev/null || echo 80)}"
fi
AWK="awk"
if awk -W version 2>&1 </dev/null | grep -q mawk; then AWK="awk -W interactive"; fi  # else mawk waits for 4 KB
if [ "$DONE" -lt "$ITERS" ]; then
  config "$DONE" >"$PARTIAL/run/config.yaml"
  set +e
  # shellcheck disable=SC2016,SC2086
  sh -c 'echo $$ >"$PARTIAL/pid"; exec "$@"' sh $LAUNCH mlx_lm.lora --train --config "$PARTIAL/run/config.yaml" \
    --model "$BASE" --data "$DATA" --adapter-path "$PARTIAL/run" "$@" 2>"$PARTIAL/run/stderr" | tee "$SCREEN" |
    $AWK -v done="$DONE" -v iters="$ITERS" -v every="$EVAL_EVERY" -v patience="$PATIENCE" -v screen="$SCREEN" '
      function now(  t) { "date +%s" | getline t; close("date +%s"); return t }
      function clear(seconds) { return seconds < 100 ? int(seconds) + 1 " s" : int(seconds / 60 + .5) " min" }
      function say(text) { printf "%s  %s\n", (screen == "/dev/tty" ? "\r\033[2K" : ""), text; fflush() }
      function row(text) { print text >>losses; close(losses) }
      # Exit code 3: a loss that is no number; 4: early stop.
      function stop(code) { system("pkill -P $(cat \"$PARTIAL/pid\"); kill $(cat \"$PARTIAL/pid\")"); exit code }
      function judge(loss) { if (best == "" || loss < best) { best = loss; stale = 0 } else stale++ }
      BEGIN {
        losses = ENVIRON["PARTIAL"] "/losses.csv"
        journal = ENVIRON["PARTIAL"] "/training.log"
        while ((getline line <losses) > 0) if (split(line, cell, ",") > 2 && cell[3] + 0) judge(cell[3] + 0)
      }
      {
        gsub(/\033\[[0-9;?]*[A-Za-z]/, "")
        sub(/.*\r/, "")                     # what a redraw of the progress bar left in front of the line
        if (/█|░/) next
        print >>journal; close(journal)
        if (screen != "/dev/tty") { print; fflush() }
        iteration = $1 + done
        if ($1 ~ /^[0-9]+$/ && $2 == "val") {
          row(iteration ",," $3 ",")
          if ($3 !~ /^[0-9.]+$/) stop(3)
          if ($1 > 1 || !done) judge($3 + 0)
          if (patience && stale >= patience) { say("early stop: no better validation loss in " patience " evaluations"); stop(4) }
          if (!clock) { seconds = $4 + 0; clock = now() }
        } else if ($1 ~ /^[0-9]+$/ && $3 ~ /▼|▲/) {
          gsub(/,/, "", $4)
          row(iteration "," $2 ",," $4)
          if ($2 !~ /^[0-9.]+$/) stop(3)
          if (!told++) {                    # later estimates, at each checkpoint, are plain proportion
            evaluations = int(iters / every) - int(iteration / every) + (iters % every > 0)
            left = (iters - iteration) * (now() - clock) / $1 + evaluations * seconds
            say(sprintf("about %.0f tokens a batch, about %s left", 1000 * $5 / $1, clear(left)))
          }
        } else if ($1 == "save" && $2 ~ /^[0-9]+_adapters.safetensors$/) {
          # Renamed when complete: a checkpoint in PARTIAL is never one that a kill has cut off.
          system(sprintf("mv \"$PARTIAL/run/%s\" \"$PARTIAL/%07d_adapters.safetensors\"", $2, $2 + done))
          left = (iters - done - $2) * (now() - clock) / $2
          if (left > 0) say("about " clear(left) " left")
        }
      }'
  codes=("${PIPESTATUS[@]}")
  set -e
  cursor
  cat "$PARTIAL/run/stderr" >>"$PARTIAL/training.log"
  rm -f "$PARTIAL/pid"
  case ${codes[0]}-${codes[2]} in
    *-3) fail "the loss became NaN or infinite at iteration $(tail -n 1 "$PARTIAL/losses.csv" | cut -d, -f1)" \
      "a smaller LEARNING_RATE or SCALE; with MASK_PROMPT=1 also a MAX_SEQ_LENGTH that no row exceeds" ;;
    *-4) ;;                                 # early stop
    0-*) mv "$PARTIAL/run/adapters.safetensors" "$PARTIAL/$(printf %07d "$ITERS")_adapters.safetensors" ;;
    2-*) fail "mlx_lm.lora does not take the arguments '$EXTRA'" "mlx_lm.lora --help lists those that it takes" 2 ;;
    130-*) on_interrupt ;;
    *) fail "mlx_lm.lora ended with code ${codes[0]}: $(tail -n 1 "$PARTIAL/training.log") (${PARTIAL#"$ROOT/"}/training.log)" \
      "if memory ran out: BATCH_SIZE=1 GRAD_CHECKPOINT=1 ./fine_tune.sh; to go on, RESUME=1 in front of the same command" ;;
  esac
fi

# ---- the best checkpoint -------------------------------------------------------------------------------------------
for file in "$PARTIAL"/[0-9]*_adapters.safetensors; do
  awk -F, -v n="$((10#$(basename "$file" _adapters.safetensors)))" '$1 == n && $3 != "" { print $3, $1 }' "$PARTIAL/losses.csv"
done | sort -n >"$PARTIAL/ranking"
[ -s "$PARTIAL/ranking" ] || fail "no checkpoint has a validation loss, see ${PARTIAL#"$ROOT/"}/training.log" "./fine_tune.sh"
read -r LOSS BEST <"$PARTIAL/ranking"
BEFORE=$(awk -F, '$1 == 1 { print $3; exit }' "$PARTIAL/losses.csv")
LAST=$(awk -F, '$3 != "" { last = $3 } END { print last }' "$PARTIAL/losses.csv")
cp "$PARTIAL/$(printf %07d "$BEST")_adapters.safetensors" "$PARTIAL/adapters.safetensors"
python3 -c 'import mlx.core as mx, sys; sys.exit(not all(mx.isfinite(w).all().item() for w in mx.load(sys.argv[1]).values()))' \
  "$PARTIAL/adapters.safetensors" || fail "the best checkpoint holds NaN or infinite weights" "a smaller LEARNING_RATE"
if [ -d "$PARTIAL/run" ]; then cp "$PARTIAL/run/adapter_config.json" "$PARTIAL/"; fi
kept=0
for file in $(cd "$PARTIAL" && ls -r [0-9]*_adapters.safetensors); do
  if [ "$((10#${file%%_*}))" != "$BEST" ] && [ $((kept += 1)) -gt "$KEEP_CHECKPOINTS" ]; then rm "$PARTIAL/$file"; fi
done
rm -rf "$PARTIAL/run" "$PARTIAL/ranking"
if [ -d "$ADAPTER" ]; then mv "$ADAPTER" "$ADAPTER.old"; fi
mv "$PARTIAL" "$ADAPTER"
rm -rf "$ADAPTER.old"
echo "best        iteration $BEST: validation loss $LOSS, $BEFORE before training, $LAST at the end"
echo "wrote       ${ADAPTER#"$ROOT/"}/adapters.safetensors (also losses.csv, training.log, lora_config.yaml)"
echo "next        ./fuse.sh"
