#!/usr/bin/env bash
# shellcheck disable=SC2034,SC2329 # settings go to Python, functions to `run`
# Stage 2: train a LoRA adapter on the rows of build_train.py, and keep its best checkpoint.
#
#   ./fine_tune.sh                                 with the settings below
#   ITERS=60 LEARNING_RATE=1e-4 ./fine_tune.sh     with other settings, for this run only
#   RESUME=1 ./fine_tune.sh                        goes on with a run that was interrupted
#   ./fine_tune.sh --report-to wandb               goes through to mlx_lm.lora; --project-name too
#
# Reads   models/base/$MODEL, data/for_train/$VERSION/{train,valid}.jsonl
# Writes  models/adapters/adapter-${VERSION}_$MODEL/: adapters.safetensors (the checkpoint with
#         the lowest loss on valid.jsonl), adapter_config.json, lora_config.yaml (the settings),
#         losses.csv, training.log
# Exit    0 done, 1 bad input or environment, 2 wrong usage, 130 Ctrl-C

# sh, zsh and, because of the 02, even Python stop here and show this line.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this is for bash. FIX: ./fine_tune.sh" && exit 02; }

misread=""
trap 'misread=${misread:-$BASH_COMMAND}' ERR # a line of the settings that is none: ITERS = 100
given=$(export -p)                           # ITERS=60 ./fine_tune.sh wins over the line below
set -a

# ---- settings: NAME=value, no spaces around the = ----------------------------------------------
VERSION=v1                     # which data: data/for_train/VERSION
MODEL=gemma-3-text-27b-it-4bit # which base model: models/base/MODEL
ITERS=600                      # batches to train on
BATCH_SIZE=2                   # rows in a batch; out of memory: 1
GRAD_ACCUMULATION=1            # batches per update; 2 with BATCH_SIZE=1 is like 1 with 2
GRAD_CHECKPOINT=0              # 1 takes about 0.6 of the memory, and a third more time
MAX_SEQ_LENGTH=1024            # most tokens in a row, as in build_train.py
LEARNING_RATE=auto             # auto: by the model's size; NaN or a jumping loss: a third of it
SCHEDULE=linear                # the rate after the warm-up: linear (to 0 at the end), constant
WARMUP=10                      # batches in which the rate rises from 0; 0 none
RANK=32                        # size of the adapter, 4 to 64; overfitting, little memory: 8
SCALE=10.0                     # factor on what the adapter adds; NaN or a jumping loss: 5
DROPOUT=0.0                    # share of the adapter's input dropped, to 0.2; overfitting: more
NUM_LAYERS=-1                  # layers to train, counted from the last; -1 all
EMBEDDINGS=1                   # 1 adapts the token embeddings too; 0 with a small NUM_LAYERS
OPTIMIZER=adam                 # adam, adamw, muon, sgd, adafactor
FINE_TUNE_TYPE=lora            # lora, dora, full (an unquantised base and much memory)
MASK_PROMPT=0                  # 1 learns completions only; 0 is better where prompts are chat
EVAL_EVERY=200                 # batches from one checkpoint to the next; the best is kept
KEEP_CHECKPOINTS=0             # 1 keeps the others beside it
SEED=0                         # another whole number, another order of the batches
CHECK_MEMORY=1                 # 0 trains though it seems not to fit; a Mac may crash
LAUNCH=                        # several machines: "mlx.launch --hostfile hosts.json --"
RESUME=0                       # 1 goes on with an interrupted run of the same settings and data
# ------------------------------------------------------------------------------------------------

eval "$given" 2>/dev/null || true # nothing but settings has changed since
set +a
trap - ERR

main() {
  tidy_shell "$@"
  check_names
  NAME="${VERSION}_$MODEL"
  export ADAPTER="models/adapters/adapter-$NAME"
  export WORK="models/adapters/.adapter-$NAME.partial" # the run happens here
  OLD="models/adapters/.adapter-$NAME.old"
  lock "models/adapters/.adapter-$NAME.lock"
  run check_and_set_up "$*"

  if [ -d "$WORK/run" ]; then # not so if an interrupted run has only the choice left to do
    # shellcheck disable=SC2086 # LAUNCH is several words
    run watch $LAUNCH sh -c "$ONE_CARD" sh \
      mlx_lm.lora --train --config "$WORK/run/config.yaml" --model "models/base/$MODEL" \
      --data "$WORK/data" --adapter-path "$WORK/run" "$@"
  fi
  run choose_checkpoint
  put_in_place
  {
    echo "wrote       $ADAPTER/adapters.safetensors"
    echo "            also losses.csv, training.log, lora_config.yaml"
    echo "next        ./fuse.sh"
  } 2>/dev/null || true # `| head -1` reads no more
}

fail() {
  echo "error: $1. FIX: $2" >&2
  exit "${3:-1}"
}

# ---- the shell ---------------------------------------------------------------------------------

# MLX 0.32 fails where it sees several NVIDIA cards: each process gets one. No card, no harm.
# shellcheck disable=SC2016
ONE_CARD='
  cards=$(nvidia-smi -L 2>/dev/null | wc -l)
  card=$((${MLX_RANK:-0} % (cards > 0 ? cards : 1)))
  export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-$card}"
  exec "$@"
'

tidy_shell() { # settings, arguments and environment as the rest expects them
  trap interrupted INT
  set -euo pipefail
  set +f +C +o posix # a BASH_ENV may have set these
  IFS=$' \t\n'
  unset CDPATH PYTHONOPTIMIZE MLXLM_USE_MODELSCOPE FORCE_COLOR TTY_COMPATIBLE
  export PYTHONUTF8=1 PYTHONIOENCODING=utf-8 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
  export PYTHONSAFEPATH=1 # no json.py of the current folder
  if [ -n "$misread" ]; then
    name=${misread%%[ =]*}
    value=${misread#"$name"}
    value=${value#"${value%%[! =]*}"}
    fail "'$misread' in the settings is not NAME=value" "write $name=\"$value\""
  fi
  for argument in "$@"; do
    case $argument in
      -h | --help)
        sed -n '2,/^# -----/s/^# \{0,1\}//p' "$0"
        exit
        ;;
      --report-to* | --project-name*) ;;
      -*) fail "$argument is not an argument of fine_tune.sh" "ITERS=60 ./fine_tune.sh for a setting" 2 ;;
      [A-Z]*=*) fail "$argument stands behind the command" "$argument ./fine_tune.sh" 2 ;;
    esac
  done
  if ! command -v mlx_lm.lora >/dev/null; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
      fail "python3 is $(python3 -V 2>&1 || true), and 3.11 or newer is needed" \
        "install one (on a Mac: brew install python@3.13), then: python3.13 -m venv venv"
    fail "mlx_lm.lora was not found, so the virtual environment is not active" \
      "source venv/bin/activate (README.md, Install, says how it is made)"
  fi
  script=$0
  while [ -L "$script" ]; do # called through a link, as from ~/bin
    cd "$(dirname "$script")"
    script=$(readlink "$(basename "$script")")
  done
  cd "$(dirname "$script")" || exit
}

# Programs run in the background, because only while it waits does bash hear Ctrl-C at once.
# There they are deaf to Ctrl-C (no tracebacks), so that it is this script that ends them.
child=""
run() {
  "$@" &
  child=$!
  code=0
  wait "$child" || code=$?
  child=""
  [ "$code" != 141 ] || code=1 # nobody reads the output any more
  [ "$code" = 0 ] || exit "$code"
}
interrupted() {
  trap '' INT
  if [ -n "$child" ]; then
    kill "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  printf '\ninterrupted: the adapter of before, if there is one, is as it was. ' >&2
  if ls "${WORK:-.}"/[0-9]*_adapters.safetensors >/dev/null 2>&1; then
    echo "RESUME=1 in front of the same command goes on; without it, training starts anew" >&2
  else
    echo "There is no checkpoint yet: the same command starts anew" >&2
  fi
  exit 130
}

lock() { # for as long as this script or anything that it started lives
  if ! { mkdir -p models/adapters && : >>"$1"; } 2>/dev/null; then
    fail "models/adapters cannot be written to" "chmod u+w models/adapters, or make room on its disk"
  fi
  exec 9>>"$1"
  python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
    fail "another run is writing $ADAPTER" \
      "wait until it is done, or end it; RESUME=1 ./fine_tune.sh then goes on with it"
  if [ -f "$WORK/adapters.safetensors" ]; then put_in_place; fi # only that was left to do
  if [ -d "$OLD" ] && [ ! -e "$ADAPTER" ]; then mv "$OLD" "$ADAPTER"; fi
  rm -rf "$OLD"
}
put_in_place() {
  trap '' INT
  if [ -d "$ADAPTER" ]; then mv "$ADAPTER" "$OLD"; fi
  mv "$WORK" "$ADAPTER"
  rm -rf "$OLD"
  trap interrupted INT
}

check_names() {
  for name in VERSION MODEL; do
    value=${!name}
    last=${value%/}
    last=${last##*/}
    last=${last//[^A-Za-z0-9._-]/_}
    [[ $value =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] && continue
    fix="$name=${last:-v1} ./fine_tune.sh"
    case $value in
      /* | .* | */ | models/* | */*/*) fail "$name is a path, not the name of a folder" "$fix" ;;
      */*) fix="hf download $value --local-dir models/base/$last; $fix" ;;
    esac
    fail "$name is not a name of letters, digits, '.', '_' and '-'" "$fix"
  done
}

# ---- checks before a model is loaded, and the work folder --------------------------------------

check_and_set_up() {
  exec python3 - "$@" <<'PYTHON'
import contextlib
import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
COUNT = "[1-9][0-9]{0,8}", "a whole number above 0"
WHOLE = "[0-9]{1,9}", "a whole number"
NUMBER = "[0-9]*[.]?[0-9]+(e[+-]?[0-9]+)?", "a number with a decimal point"
SWITCH = "[01]", "0 or 1"
RULES = {  # (what a setting must be, in words), a value that is right
    "ITERS": (COUNT, 600),
    "BATCH_SIZE": (COUNT, 2),
    "GRAD_ACCUMULATION": (COUNT, 1),
    "GRAD_CHECKPOINT": (SWITCH, 0),
    "MAX_SEQ_LENGTH": (COUNT, 1024),
    "LEARNING_RATE": (("auto|" + NUMBER[0], "auto or " + NUMBER[1]), "auto"),
    "SCHEDULE": (("linear|constant", "linear or constant"), "linear"),
    "WARMUP": (WHOLE, 10),
    "RANK": (COUNT, 32),
    "SCALE": (NUMBER, 10.0),
    "DROPOUT": (("0?[.][0-9]+|0", "a number from 0 to below 1"), 0.0),
    "NUM_LAYERS": (("-1|" + COUNT[0], "-1 (all) or " + COUNT[1]), -1),
    "EMBEDDINGS": (SWITCH, 1),
    "OPTIMIZER": (("adam|adamw|muon|sgd|adafactor", "the name of an optimizer"), "adam"),
    "FINE_TUNE_TYPE": (("lora|dora|full", "lora, dora or full"), "lora"),
    "MASK_PROMPT": (SWITCH, 0),
    "EVAL_EVERY": (COUNT, 200),
    "KEEP_CHECKPOINTS": (SWITCH, 0),
    "SEED": (WHOLE, 0),
    "CHECK_MEMORY": (SWITCH, 1),
    "RESUME": (SWITCH, 0),
}
# The matrices that are adapted, as Gemma, Llama, Mistral, Qwen and Phi name them; a name that a
# model does not have does no harm. With EMBEDDINGS=0 mlx-lm finds all but the embeddings itself.
MATRICES = [
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o", "qkv")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down", "gate_up")),
    "model.embed_tokens",
    "language_model.model.embed_tokens",
]
VERSION, MODEL = os.environ["VERSION"], os.environ["MODEL"]
BASE, DATA = Path("models/base", MODEL), Path("data/for_train", VERSION)
ADAPTER, WORK = Path(os.environ["ADAPTER"]), Path(os.environ["WORK"])
DOWNLOAD = f"hf download mlx-community/{MODEL} --local-dir {BASE}"
BUILD = f"VERSION={VERSION} MODEL={MODEL} python build_train.py"


def fail(what, fix):
    sys.exit(f"error: {what}. FIX: {fix}")


def shown(text):
    """Text from elsewhere, short and without control characters."""
    return ascii(" ".join(str(text).split()))[1:-1][:200]


@contextlib.contextmanager
def readable(what, fix):
    """Whatever goes wrong with a file that is not ours becomes an error with its name."""
    try:
        yield
    except Exception as error:
        fail(f"{what} cannot be used: {type(error).__name__}: {shown(error)}", fix)


# ---- the settings
def read_setting(name):
    """Return a setting as a number if it is one; 10,000 is refused with 10000 as the fix."""
    value = os.environ[name]
    (pattern, words), example = RULES[name]
    if not re.fullmatch(pattern, value):
        guesses = [value.strip(), value.replace(",", ""), value.replace(",", ".")]
        right = next((guess for guess in guesses if re.fullmatch(pattern, guess)), example)
        fail(f"{name}={shown(value)} is not {words}", f"{name}={right} ./fine_tune.sh")
    return int(value) if type(example) is int else value


def read_settings():
    s = SimpleNamespace(**{name: read_setting(name) for name in RULES})
    if s.EVAL_EVERY % s.GRAD_ACCUMULATION:
        fail(
            f"EVAL_EVERY={s.EVAL_EVERY} is not a multiple of GRAD_ACCUMULATION={s.GRAD_ACCUMULATION}",
            f"EVAL_EVERY={10 * s.GRAD_ACCUMULATION} ./fine_tune.sh",
        )
    return s


# ---- what is there
def look_at_target():
    """Whether the adapter can be put into its place at the end."""
    if ADAPTER.is_symlink() or (ADAPTER.exists() and not ADAPTER.is_dir()):
        fail(f"{ADAPTER} is a link or a file, where a folder goes", f"mv {ADAPTER} {ADAPTER}.mine")
    config = ADAPTER / "adapter_config.json"
    if config.exists():
        with readable(config, f"mv {ADAPTER} {ADAPTER}.mine"):
            other = Path(json.loads(config.read_bytes())["model"]).name
        if other != MODEL:
            fail(f"{ADAPTER} is that of the base {shown(other)}", f"another VERSION than {VERSION}")


def look_for_base():
    if not (BASE / "config.json").is_file():
        there = sorted(path.parent.name for path in BASE.parent.glob("*/config.json"))
        near = difflib.get_close_matches(MODEL, there, 1)
        forgotten = MODEL == "gemma-3-text-27b-it-4bit" and len(there) == 1
        fix = f"export MODEL={there[0]}" if forgotten else DOWNLOAD
        if near and not forgotten:
            fix = f"MODEL={near[0]} ./fine_tune.sh"
        fail(f"there is no base model in {BASE} (there are: {shown(', '.join(there)) or 'none'})", fix)


def look_for_data():
    for file in (DATA / "train.jsonl", DATA / "valid.jsonl"):
        if not file.exists() or not file.stat().st_size:
            there = sorted(path.parent.name for path in DATA.parent.glob("[!.]*/train.jsonl"))
            fail(f"{file} is missing or empty (there are: {shown(', '.join(there)) or 'none'})", BUILD)


def read_base(s):
    """Return the sizes in config.json and the bytes of the weights; refuse what is not whole."""
    with readable(f"{BASE}/config.json", DOWNLOAD):
        config = json.loads((BASE / "config.json").read_bytes())
        text = config.get("text_config", config)
        heads, hidden = text["num_attention_heads"], text["hidden_size"]
        size = SimpleNamespace(
            layers=text["num_hidden_layers"],
            hidden=hidden,
            inner=text.get("intermediate_size", 4 * hidden),
            queries=heads * text.get("head_dim", hidden // heads),
            keys=text.get("num_key_value_heads", heads) * text.get("head_dim", hidden // heads),
            vocabulary=text["vocab_size"],
        )
        for name, value in vars(size).items():
            if type(value) is not int or not 0 < value < (1000 if name == "layers" else 10**7):
                raise ValueError(f"{name} are {value}")
    if "model_file" in config:
        fail(f"{MODEL} brings code of its own, which is never run", "take another base model")
    if s.FINE_TUNE_TYPE == "full" and "quantization" in config:
        fail(f"{MODEL} is quantised, and full trains whole weights", "FINE_TUNE_TYPE=lora ./fine_tune.sh")
    if s.NUM_LAYERS > size.layers:
        fail(f"NUM_LAYERS={s.NUM_LAYERS}, but {MODEL} has {size.layers}", "NUM_LAYERS=-1 ./fine_tune.sh")
    with readable(f"the base model in {BASE}", DOWNLOAD):
        shards = {path.name for path in BASE.glob("model*.safetensors")} or {"model.safetensors"}
        index = BASE / "model.safetensors.index.json"
        if index.exists():
            shards |= set(json.loads(index.read_bytes())["weight_map"].values())
        for shard in shards:
            with safe_open(BASE / shard, "numpy"):  # refuses a file that is cut off
                pass
        if not any((BASE / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise OSError("there is no tokenizer")
    size.weights = sum(path.stat().st_size for path in BASE.glob("model*.safetensors"))
    return size


def conversation(row):
    """{"prompt": "hi", "completion": "ho"} or {"messages": […]} → [{"role": …, "content": …}, …]."""
    if "messages" in row:
        return row["messages"]
    texts = [("user", row["prompt"]), ("assistant", row["completion"])]
    return [{"role": role, "content": text} for role, text in texts]


def read_rows(path):
    """Return the bytes of a file, and its rows as conversations."""
    rows = []
    with readable(path, BUILD):
        file = path.read_bytes()
    for number, line in enumerate(file.splitlines(), 1):
        with readable(f"{path}, line {number},", BUILD):
            row = conversation(json.loads(line))
            if [turn["role"] for turn in row] != ["user", "assistant"] * (len(row) // 2) or not row:
                raise ValueError("not user, assistant, user, assistant")
            "".join(turn["content"] for turn in row).encode()
            rows.append(row)
    return file, rows


def longest_row(rows):
    """Return the most tokens in a row; refuse a template that hides where the reply begins."""
    from mlx_lm.utils import load_tokenizer

    def give_up(*_):
        raise TimeoutError("the chat template takes for ever")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    most = 0
    with readable(f"the tokenizer of {BASE}", DOWNLOAD):
        tokens_of = load_tokenizer(BASE, {"trust_remote_code": False}).apply_chat_template
        for row in rows:
            tokens = tokens_of(row, return_dict=False)
            prompt = tokens_of(row[:-1], add_generation_prompt=True, return_dict=False)
            if tokens[: len(prompt)] != prompt or tokens == prompt:
                break
            most = max(most, len(tokens))
        else:
            signal.alarm(0)
            return most
    fail(
        f"the chat template of {MODEL} begins a reply otherwise than it writes one: what belongs to it cannot be told",
        "take another base model; Gemma 3, Llama 3 and Qwen 2.5 are right",
    )


# ---- what it takes
def trained_numbers(s, size):
    """Return how many numbers are trained: RANK x (inputs + outputs) of each matrix."""
    layers = size.layers if s.NUM_LAYERS < 0 else s.NUM_LAYERS
    hidden, inner, queries, keys = size.hidden, size.inner, size.queries, size.keys
    if s.FINE_TUNE_TYPE == "full":
        return layers * hidden * (2 * queries + 2 * keys + 3 * inner)
    layer = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner)
    return s.RANK * (layers * layer + s.EMBEDDINGS * (size.vocabulary + hidden))


def memory(s, size, longest):
    """Return the bytes at the peak, fitted to what tests/benchmarks/memory.py measured.

    An update takes 26 bytes a trained number. Each token of a batch takes 8 bytes a word of the
    vocabulary, and what the layers keep for the way back.
    """
    layers = size.layers if s.NUM_LAYERS < 0 else s.NUM_LAYERS
    width = 4 * size.hidden + 3 * size.inner
    kept = 0 if s.GRAD_CHECKPOINT else (4 * layers + 2 * (size.layers - layers)) * width
    numbers = trained_numbers(s, size)
    token = numbers / 20 + 8 * size.vocabulary + kept
    return 5e8 + size.weights + 26 * numbers + s.BATCH_SIZE * longest * token


def check_memory(s, size, longest):
    """Refuse what does not fit, with settings that do: a Mac may crash where memory runs out."""
    import mlx.core as mx

    info = mx.device_info()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = info.get("max_recommended_working_set_size") or info.get("total_memory") or machine
    need = memory(s, size, longest)
    print(f"memory      about {need / 1e9:.1f} GB of {allowed / 1e9:.1f} GB that MLX may use")
    if need < allowed or not s.CHECK_MEMORY:
        return
    smaller, changes = SimpleNamespace(**vars(s)), {}
    for change in (
        {"GRAD_CHECKPOINT": 1},
        {"BATCH_SIZE": 1},
        {"RANK": min(8, s.RANK)},
        {"NUM_LAYERS": min(8, size.layers), "EMBEDDINGS": 0},
    ):
        changes |= change
        vars(smaller).update(change)
        if memory(smaller, size, longest) < allowed:
            fix = " ".join(f"{name}={value}" for name, value in changes.items())
            fail("that does not fit, and a Mac may crash", f"{fix} ./fine_tune.sh (CHECK_MEMORY=0 tries)")
    fail("that fits with no settings", f"a smaller base, or MAX_SEQ_LENGTH={longest // 2} {BUILD}")


def learning_rate(s, size):
    """Return LEARNING_RATE; auto is 2e-4, the best of our sweeps, made smaller for large models.

    The exponent is the one that Schulman et al. (LoRA Without Regret, 2025) found for Llama.
    """
    if s.LEARNING_RATE != "auto":
        return float(s.LEARNING_RATE)
    rate = float(f"{2e-4 * (640 / size.hidden) ** 0.78:.1e}")
    print(f"rate        {rate} = 2e-4 x (640 / hidden size {size.hidden})^0.78")
    return rate


# ---- what mlx_lm.lora reads
def config(s, rate, done):
    """Return the lines of its YAML, for a run of which `done` batches are done already.

    The rest of a straight line is a straight line, so a resumed run takes up the rate where it
    was. It warms up again because its optimizer starts anew.
    """
    lora = {"rank": s.RANK, "scale": float(s.SCALE), "dropout": float(s.DROPOUT)}
    if s.EMBEDDINGS and s.FINE_TUNE_TYPE != "full":
        lora["keys"] = MATRICES
    updates = (s.ITERS - done) // s.GRAD_ACCUMULATION  # mlx counts these, not batches
    warmup = min(s.WARMUP // s.GRAD_ACCUMULATION, updates // 2)
    first, last = rate, rate
    if s.SCHEDULE == "linear":
        first, last = rate * (s.ITERS - done) / s.ITERS, 0.0
    schedule = [first, last, max(1, updates - warmup)]
    unbiased = {"bias_correction": True}  # else the first updates are 6 times too large
    settings = {
        "fine_tune_type": s.FINE_TUNE_TYPE,
        "num_layers": s.NUM_LAYERS,
        "lora_parameters": lora,
        "batch_size": s.BATCH_SIZE,
        "grad_accumulation_steps": s.GRAD_ACCUMULATION,
        "grad_checkpoint": bool(s.GRAD_CHECKPOINT),
        "mask_prompt": bool(s.MASK_PROMPT),
        "max_seq_length": s.MAX_SEQ_LENGTH,
        "optimizer": s.OPTIMIZER,
        "optimizer_config": {"adam": unbiased, "adamw": unbiased},
        "learning_rate": rate,
        "lr_schedule": {"name": "linear_schedule", "arguments": schedule, "warmup": warmup},
        "seed": s.SEED,
        "iters": s.ITERS - done,
        "steps_per_report": 1,
        "save_every": s.EVAL_EVERY,
    }
    if done:
        settings["resume_adapter_file"] = f"{WORK}/{done:07d}_adapters.safetensors"
    return [f"{name}: {json.dumps(value)}" for name, value in settings.items()]


def record(s, rate, files):
    """Return the lines of lora_config.yaml."""
    sums = [
        f"# {name}: " + subprocess.run(["cksum"], input=file, capture_output=True).stdout.decode().strip()
        for name, file in files.items()
    ]
    return [
        "# Written by fine_tune.sh: how this adapter was made.",
        f"# base model: {MODEL}",
        f"# launcher: {json.dumps(os.environ['LAUNCH'])}",
        f"# arguments: {json.dumps(sys.argv[1])}",
        *sums,
        *config(s, rate, 0),
    ]


def batches_done(s, now):
    """Return how many batches of an interrupted run are done, if it is to be gone on with."""
    done = max((int(path.name[:7]) for path in WORK.glob("[0-9]*_adapters.safetensors")), default=0)
    if not s.RESUME:
        if done:
            print(f"new start   the interrupted run is thrown away ({done} batches)")
        return 0
    if not done:
        fail("there is no interrupted run with a checkpoint to resume", "RESUME=0 ./fine_tune.sh")
    with readable(WORK / "lora_config.yaml", "RESUME=0 ./fine_tune.sh"):
        before = (WORK / "lora_config.yaml").read_text("utf-8").splitlines()
    for old, new in zip(before, now, strict=True):
        if old != new:
            print(f"was: {shown(old)}\nnow: {shown(new)}", file=sys.stderr)
    if before != now:
        fail(
            "settings or data are not those of the interrupted run",
            "set them back, or start anew: RESUME=0 ./fine_tune.sh",
        )
    print(f"resuming    after {done} of {s.ITERS} batches; the optimizer starts anew")
    return done


def set_up(s, rate, files, done):
    """Make the work folder, with the data as they are now."""
    if not done:
        shutil.rmtree(WORK, ignore_errors=True)
        # Without a valid.jsonl beside it, mlx-lm trains without its own validation, whose loss
        # counts prompts and padding.
        (WORK / "data").mkdir(parents=True)
        (WORK / "data/train.jsonl").write_bytes(files["train.jsonl"])
        (WORK / "valid.jsonl").write_bytes(files["valid.jsonl"])
        (WORK / "lora_config.yaml").write_text("\n".join(record(s, rate, files)) + "\n")
        (WORK / "losses.csv").write_text("iteration,train_loss,val_loss,tokens_per_second\n")
    shutil.rmtree(WORK / "run", ignore_errors=True)
    if done < s.ITERS:
        (WORK / "run").mkdir()
        (WORK / "run/config.yaml").write_text("\n".join(config(s, rate, done)) + "\n")


def main():
    s = read_settings()
    look_at_target()
    look_for_base()
    look_for_data()
    size = read_base(s)
    files, rows = {}, {}
    for name in ("train.jsonl", "valid.jsonl"):
        files[name], rows[name] = read_rows(DATA / name)
    train, valid = rows.values()
    if len(train) < s.BATCH_SIZE:
        fail(f"train.jsonl has fewer rows than BATCH_SIZE={s.BATCH_SIZE}", f"BATCH_SIZE={len(train)} ./fine_tune.sh")

    by_length = sorted(train + valid, key=lambda row: sum(len(turn["content"].encode()) for turn in row))
    longest = longest_row(valid[:20] + by_length[-100:])
    if longest > s.MAX_SEQ_LENGTH:
        fail(
            f"a row has {longest} tokens: MAX_SEQ_LENGTH={s.MAX_SEQ_LENGTH} would cut off its reply",
            f"MAX_SEQ_LENGTH={s.MAX_SEQ_LENGTH} {BUILD}, or MAX_SEQ_LENGTH={longest} ./fine_tune.sh",
        )
    # Seen on CUDA from 1.5 times that: a wrong loss, NaN gradients, no error.
    most = 2**31 // size.vocabulary // longest
    if s.BATCH_SIZE > most:
        fail(f"MLX computes at most {most} rows of {longest} tokens rightly", f"BATCH_SIZE={most} ./fine_tune.sh")

    layers = "all" if s.NUM_LAYERS < 0 else f"{s.NUM_LAYERS} of them"
    megabytes = 4 * trained_numbers(s, size) / 1e6
    print(f"base model  {MODEL}: {size.layers} layers, training {layers}")
    print(f"data        {VERSION}: {len(train)} rows to train on, {len(valid)} to choose by, longest {longest} tokens")
    print(f"run         {s.ITERS} batches of {s.BATCH_SIZE} = {s.ITERS * s.BATCH_SIZE / len(train):.3g} epochs")
    print(f"checkpoints every {s.EVAL_EVERY} batches, {megabytes:.3g} MB each")
    check_memory(s, size, longest)
    rate = learning_rate(s, size)
    done = batches_done(s, record(s, rate, files))
    need = ((s.ITERS - done) // s.EVAL_EVERY + 3) * megabytes
    free = shutil.disk_usage(WORK.parent).free / 1e6
    if need > free:
        fail(f"the checkpoints need {need:.0f} MB of disk, {free:.0f} are free", f"EVAL_EVERY={s.ITERS} ./fine_tune.sh")
    with readable(WORK, "make room on the disk of models/adapters"):
        set_up(s, rate, files, done)


with readable("safetensors", "pip install -r requirements.txt"):
    from safetensors import safe_open
main()
PYTHON
}

# ---- training ----------------------------------------------------------------------------------

watch() { # run a command, show and log what it prints, end it if a loss is NaN or this script ends
  exec python3 - "$@" <<'PYTHON'
import contextlib
import csv
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

WORK = Path(os.environ["WORK"])
ITERS = int(os.environ["ITERS"])
REPORT_EVERY = min(10, int(os.environ["EVAL_EVERY"]))
SCRIPT = os.getppid()
log = open(WORK / "training.log", "a", encoding="utf-8", buffering=1)


class Stop(Exception):
    """What is wrong with the run, and its fix."""


def lines(pipe):
    """Yield what the trainer prints, line by line, without colours; end when the script has ended."""
    rest = b""
    while os.getppid() == SCRIPT:
        if not select.select([pipe], [], [], 1)[0]:
            continue
        data = os.read(pipe.fileno(), 65536)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line.decode("utf-8", "replace"))
            yield text.rpartition("\r")[2]
    raise BrokenPipeError


def follow(pipe, done):
    """Turn the trainer's lines into losses.csv, a progress bar and checkpoints; return the last batch.

    mlx_lm.lora prints a line for each batch and each checkpoint:
        "    20    6.516 ▼    1,528      6.0k"
        "  save  0000200_adapters.safetensors"
    """
    table = WORK / "losses.csv"
    rows = [row for row in csv.reader(table.open()) if row[0] == "iteration" or int(row[0]) <= done]
    losses = table.open("w", buffering=1, newline="")
    csv.writer(losses, lineterminator="\n").writerows(rows)
    bar = tqdm(total=ITERS, initial=done, desc="training", file=sys.stdout, disable=None, leave=False, dynamic_ncols=True)
    iteration, recent = done, []
    for line in lines(pipe):
        if "█" not in line and "░" not in line:
            print(line, file=log)
        if found := re.match(r" *(\d+) +(\S+) [▼▲] +([\d,]+)", line):
            iteration, loss, speed = done + int(found[1]), float(found[2]), int(found[3].replace(",", ""))
            bar.update(iteration - bar.n)
            if not math.isfinite(loss):
                raise Stop(f"the loss became NaN or infinite at iteration {iteration}", "a smaller LEARNING_RATE or SCALE")
            recent.append((loss, speed))
            if len(recent) == REPORT_EVERY or iteration == ITERS:
                loss, speed = (sum(column) / len(recent) for column in zip(*recent))
                print(f"{iteration},{loss:.3f},,{speed:.0f}", file=losses)
                bar.write(f"{iteration:6}  train loss {loss:.3f}  {speed:.0f} tokens/s", file=sys.stdout)
                recent = []
        elif found := re.match(r" *save +(\d+)_adapters", line):
            # Renamed when complete: a checkpoint in WORK is never one that a kill has cut off.
            shutil.copy(WORK / "run/adapter_config.json", WORK)
            number = done + int(found[1])
            (WORK / f"run/{found[1]}_adapters.safetensors").rename(WORK / f"{number:07d}_adapters.safetensors")
        elif re.match("Loading (pretrained|datasets)|Trainable|.WARNING", line):
            bar.write(line, file=sys.stdout)
    bar.close()
    return iteration


def end(trainer):
    """End the trainer, and the launcher's processes with it."""
    with contextlib.suppress(OSError):
        os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()


def last_words():
    log.flush()
    lines = (WORK / "training.log").read_text("utf-8").split("\n")
    words = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    return ascii(words.strip())[1:-1][:200]


for number in signal.SIGTERM, signal.SIGHUP:
    if signal.getsignal(number) != signal.SIG_IGN:  # nohup
        signal.signal(number, lambda *_: sys.exit(1))
checkpoints = sorted(WORK.glob("[0-9]*_adapters.safetensors"))
done = int(checkpoints[-1].name.split("_")[0]) if checkpoints else 0
trainer = subprocess.Popen(
    sys.argv[1:],
    stdin=subprocess.PIPE,  # mlx.launch turns in circles where this is /dev/null
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    env=os.environ | {"COLUMNS": "100"},  # in a narrow terminal its lines would break
    start_new_session=True,  # a group of its own, which can be ended as a whole
    pass_fds=[9],  # the lock
)
try:
    iteration = follow(trainer.stdout, done)
    code = trainer.wait()
    if code == 2:
        raise Stop(f"mlx_lm.lora does not take these arguments: {last_words()}", "leave them out")
    final = WORK / "run/adapters.safetensors"
    if code or iteration < ITERS or not final.exists():
        memory = re.search("memory|malloc", last_words()) or code == -signal.SIGKILL
        fix = "BATCH_SIZE=1 GRAD_CHECKPOINT=1 ./fine_tune.sh" if memory else f"see the end of {WORK}/training.log"
        raise Stop(f"mlx_lm.lora ended with code {code} after {iteration} of {ITERS} batches: {last_words()}", fix)
    shutil.copy(WORK / "run/adapter_config.json", WORK)
    final.rename(WORK / f"{ITERS:07d}_adapters.safetensors")
    shutil.rmtree(WORK / "run")
except Stop as stop:
    what, fix = stop.args
    sys.exit(f"error: {what}. FIX: {fix}")
except BrokenPipeError:  # nobody reads any more, or this script has ended
    os._exit(1)
except OSError as error:
    sys.exit(f"error: {WORK} cannot be written: {error.strerror}. FIX: make room on the disk of models/adapters")
finally:
    end(trainer)
PYTHON
}

# ---- the best checkpoint -----------------------------------------------------------------------

choose_checkpoint() {
  exec python3 - <<'PYTHON'
import csv
import json
import math
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers
from tqdm import tqdm

WORK = Path(os.environ["WORK"])
TOKENS = 2048  # in a batch
SCRIPT = os.getppid()


def read_rows(tokenizer):
    """Return [(tokens of a chat, how many of them are before the reply), …], by length."""
    rows = []
    for line in (WORK / "valid.jsonl").read_bytes().splitlines():
        row = json.loads(line)
        chat = row.get("messages") or [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
        rows.append((tokenizer.apply_chat_template(chat, return_dict=False), len(prompt)))
    return sorted(rows, key=lambda row: len(row[0]))


def make_batches(rows):
    """Return batches of TOKENS tokens: (inputs, places of the completions' tokens, these tokens).

    [1 2 3 4 5] of which 3 come before the reply → inputs [1 2 3 4], places [2 3], targets [4 5]
    """
    batches = []
    while rows:
        count = max(1, TOKENS // len(rows[-1][0]))
        part, rows = rows[-count:], rows[:-count]
        width = -(-len(part[-1][0]) // 32) * 32  # few different widths: CUDA compiles for each
        inputs = [tokens[:-1] + [0] * (width - len(tokens)) for tokens, _ in part]
        found = [(i, place - 1, tokens[place]) for i, (tokens, start) in enumerate(part) for place in range(start, len(tokens))]
        row, place, target = map(mx.array, zip(*found))
        batches.append((mx.array(inputs), (row, place), target))
    return batches


def completion_loss(model, batches, bar):
    """Return the loss in nats per token of the completions, the end of the turn included."""
    total = count = 0
    for inputs, places, targets in batches:
        if os.getppid() != SCRIPT:
            sys.exit(1)
        logits = model(inputs)[places].astype(mx.float32)
        total += nn.losses.cross_entropy(logits, targets, reduction="sum").item()
        count += targets.size
        mx.clear_cache()
        bar.update()
    return total / count


def score_all():
    """Return {iteration: loss} of the base model (0) and of every checkpoint."""
    model, tokenizer = load(f"models/base/{os.environ['MODEL']}", tokenizer_config={"trust_remote_code": False})
    batches = make_batches(read_rows(tokenizer))
    files = sorted(WORK.glob("[0-9]*_adapters.safetensors"))
    bar = tqdm(total=len(batches) * (1 + len(files)), desc="scoring", file=sys.stdout, disable=None, leave=False, dynamic_ncols=True)
    scores = {0: completion_loss(model, batches, bar)}
    bar.write(f"     0  loss {scores[0]:.3f}  base model", file=sys.stdout)
    adapter = json.loads((WORK / "adapter_config.json").read_bytes())
    if adapter["fine_tune_type"] != "full":
        dora = adapter["fine_tune_type"] == "dora"
        linear_to_lora_layers(model, adapter["num_layers"], adapter["lora_parameters"], use_dora=dora)
    for file in files:
        iteration = int(file.name.split("_")[0])
        weights = mx.load(str(file))
        model.load_weights(list(weights.items()), strict=False)
        model.eval()
        scores[iteration] = completion_loss(model, batches, bar)
        if not all(mx.isfinite(weight).all().item() for weight in weights.values()):
            scores[iteration] = math.nan
        bar.write(f"{iteration:6}  loss {scores[iteration]:.3f}", file=sys.stdout)
    bar.close()
    return scores


def write_losses(scores):
    with (WORK / "losses.csv").open() as file:
        names, *rows = csv.reader(file)
    table = {int(row[0]): row for row in rows}
    for iteration, loss in scores.items():
        row = table.setdefault(iteration, [iteration, "", "", ""])
        row[2] = f"{loss:.4f}"
    with (WORK / "losses.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([names, *(table[n] for n in sorted(table))])


print("scoring     the base model (0) and each checkpoint: nats per token of the replies in valid.jsonl", flush=True)
try:
    scores = score_all()
    good = {n: loss for n, loss in scores.items() if n and math.isfinite(loss)}
    if not good:
        sys.exit("error: every checkpoint holds NaN or infinite weights. FIX: a smaller LEARNING_RATE")
    best = min(good, key=good.get)
    write_losses(scores)
    if os.environ["KEEP_CHECKPOINTS"] == "1":
        shutil.copy(WORK / f"{best:07d}_adapters.safetensors", WORK / "best")
    else:
        (WORK / f"{best:07d}_adapters.safetensors").rename(WORK / "best")
        for file in WORK.glob("[0-9]*_adapters.safetensors"):
            file.unlink()
    shutil.rmtree(WORK / "data")
    (WORK / "valid.jsonl").unlink()
    print(f"kept        iteration {best}: validation loss {good[best]:.3f}, {scores[0]:.3f} before training")
    if good[best] >= scores[0]:
        print("warning: it is no better than the base model: more rows, or a smaller LEARNING_RATE", file=sys.stderr)
    (WORK / "best").rename(WORK / "adapters.safetensors")  # with it, the run is complete
except BrokenPipeError:
    os._exit(1)
except OSError as error:
    sys.exit(f"error: {error.filename} could not be read or written: {error.strerror}. FIX: look at the disk, then RESUME=1")
PYTHON
}

main "$@"
exit # nothing behind this is read, whatever an editor writes into this file meanwhile
