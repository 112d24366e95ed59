#!/usr/bin/env bash
# shellcheck disable=SC2034,SC2329 # the settings go to Python, the functions to `run`

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

# sh, zsh and, because of the 02, Python too stop here and show this line.
[ -n "${BASH_VERSION:-}" ] || { echo "error: not run by bash. FIX: ./fine_tune.sh" >&2 && exit 02; }

set +o posix # as `sh` on a Mac is
trap 'exit 130' INT
misread=""
trap 'misread=${misread:-$BASH_COMMAND}' ERR # a setting that bash cannot read: ITERS = 100
given=$(export -p)                           # ITERS=60 ./fine_tune.sh wins over the line below
set -a                                       # Python sees them too

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
MASK_PROMPT=0                  # 1 learns replies only; 0 is better where prompts are chat too
EVAL_EVERY=200                 # batches between checkpoints; at the end valid.jsonl scores each
KEEP_CHECKPOINTS=0             # 1 keeps the others beside it
SEED=0                         # another whole number, another order of the batches
CHECK_MEMORY=1                 # 0 trains though it seems not to fit; a Mac may crash
LAUNCH=                        # several machines: "mlx.launch --hostfile hosts.json --"
RESUME=0                       # 1 goes on with an interrupted run of the same settings and data
# ------------------------------------------------------------------------------------------------

trap - ERR
eval "$given" 2>/dev/null || true # of all that this sets, only settings have changed
set +a

main() {
  trap interrupted INT
  tidy_shell
  check_arguments "$@"
  check_names
  find_mlx_and_project
  NAME=${VERSION}_$MODEL
  export ADAPTER=models/adapters/adapter-$NAME
  export WORK=models/adapters/.adapter-$NAME.partial # the run happens here
  OLD=models/adapters/.adapter-$NAME.old
  export SCRIPT=$$ # what it starts ends when this process is gone
  lock "models/adapters/.adapter-$NAME.lock"
  finish_last_run

  run check_and_set_up "$*"
  if [ -d "$WORK/run" ]; then # not so where an interrupted run has only the choice left to do
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
  } 2>/dev/null || true # nobody reads any more, as with `| head -1`
}

fail() { # what is wrong, what mends it, exit code
  echo "error: $1. FIX: $2" >&2
  exit "${3:-1}"
}

# ---- the shell ---------------------------------------------------------------------------------

# MLX 0.32 fails where it sees several NVIDIA cards, so each process gets one to see.
# shellcheck disable=SC2016
ONE_CARD='
  cards=$(nvidia-smi -L 2>/dev/null | wc -l)
  card=$((${MLX_RANK:-0} % (cards > 0 ? cards : 1)))
  export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-$card}"
  exec "$@"
'

tidy_shell() { # whatever BASH_ENV and the environment have set
  set -euo pipefail
  set +f +C +m
  IFS=$' \t\n'
  unset CDPATH PYTHONOPTIMIZE FORCE_COLOR TTY_COMPATIBLE "${!HF_@}" "${!TRANSFORMERS@}" "${!MLXLM@}"
  export HF_HUB_OFFLINE=1 PYTHONUTF8=1 PYTHONIOENCODING=utf-8 PYTHONUNBUFFERED=1
  export TRANSFORMERS_VERBOSITY=critical # its warnings hold what a config says, raw
  export PYTHONSAFEPATH=1                # a json.py in the current folder stays there
}

check_arguments() {
  if [ -n "$misread" ]; then
    name=${misread%%[ =]*}
    value=${misread#"$name"}
    value=${value#"${value%%[! =]*}"}
    fail "'$misread' in the settings is not NAME=value" "$name=\"$value\""
  fi
  for argument in "$@"; do
    case $argument in
      -h | --help)
        sed -n '4,/^# Exit/s/^# \{0,1\}//p; /^# ---- settings/,/^# -----/p' "$0"
        exit
        ;;
      --report-to* | --project-name*) ;;
      -*) fail "$argument is not known" "for a setting: ITERS=60 ./fine_tune.sh" 2 ;;
      [A-Z]*=*) fail "$argument stands behind the command" "$argument ./fine_tune.sh" 2 ;;
    esac
  done
}

check_names() {
  for name in VERSION MODEL; do
    value=${!name}
    last=${value%/}
    last=${last##*/}
    last=${last//[!A-Za-z0-9._-]/_}
    fix="$name=${last#[.-]} ./fine_tune.sh"
    case $value in
      "") what="is empty" fix="unset $name" ;;
      *[!A-Za-z0-9._/-]*) what="has other signs than letters, digits, '.', '_' and '-'" ;;
      [!./]*/?*)
        what="is a path or a repository, not a name"
        [ "$name" = VERSION ] || fix="hf download $value --local-dir models/base/$last; $fix"
        ;;
      */*) what="is a path, not a name" ;;
      [.-]*) what="begins with a '.' or '-'" ;;
      *) continue ;;
    esac
    case $value in models/* | data/*) fix="$name=$last ./fine_tune.sh" ;; esac
    fail "$name=${value//[!A-Za-z0-9._\/-]/?} $what" "$fix"
  done
}

find_mlx_and_project() {
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
  cd "$(dirname "$script")"
}

# Programs run in the background, because only while it waits does bash hear Ctrl-C at once.
# They do not hear it themselves, so that none ends with a traceback.
child=""
run() {
  {
    trap '' INT
    "$@"
  } &
  child=$!
  code=0
  wait "$child" || code=$?
  child=""
  [ "$code" != 141 ] || code=1 # nobody reads any more
  [ "$code" = 0 ] || exit "$code"
}

interrupted() {
  trap '' INT
  if [ -n "$child" ]; then
    kill "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  how="There is no checkpoint yet: the same command starts anew"
  if ls "${WORK:-.}"/[0-9]*_adapters.safetensors >/dev/null 2>&1; then
    how="To go on: RESUME=1 in front of the same command; without it, training starts anew"
  fi
  echo >&2
  echo "interrupted: the adapter of before, if any, is as it was. $how" >&2
  exit 130
}

# ---- folders -----------------------------------------------------------------------------------

lock() { # for as long as this script or anything that it started lives
  if ! { mkdir -p models/adapters && : >>"$1"; } 2>/dev/null; then
    fail "models/adapters cannot be written to" "chmod u+w models/adapters, or make room there"
  fi
  exec 9>>"$1"
  python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
    fail "another run is writing $ADAPTER" \
      "wait until it is done; or end it, then RESUME=1 ./fine_tune.sh goes on with it"
}

put_in_place() {
  trap '' INT
  if [ -d "$ADAPTER" ]; then mv "$ADAPTER" "$OLD"; fi
  mv "$WORK" "$ADAPTER" 2>/dev/null ||
    fail "$WORK, which is complete, cannot take the place of $ADAPTER" \
      "mv '$ADAPTER' '$ADAPTER.mine'; ./fine_tune.sh"
  rm -rf "$OLD"
  trap interrupted INT
}

finish_last_run() { # one that was killed in put_in_place
  if [ -f "$WORK/adapters.safetensors" ]; then put_in_place; fi
  if [ -d "$OLD" ] && [ ! -e "$ADAPTER" ]; then mv "$OLD" "$ADAPTER"; fi
  rm -rf "$OLD"
}

# ---- checks before a model is loaded, and the work folder --------------------------------------

check_and_set_up() {
  exec python3 - "$@" <<'PYTHON'
import contextlib, difflib, json, os, re, shutil, signal, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
VERSION, MODEL = os.environ["VERSION"], os.environ["MODEL"]
BASE, DATA = Path("models/base", MODEL), Path("data/for_train", VERSION)
ADAPTER, WORK = Path(os.environ["ADAPTER"]), Path(os.environ["WORK"])
DOWNLOAD = f"hf download mlx-community/{MODEL} --local-dir {BASE}"
BUILD = f"VERSION={VERSION} MODEL={MODEL} python build_train.py"

NUMBER = "[0-9]*[.]?[0-9]+(e[+-]?[0-9]+)?"
COUNTS = "ITERS=600 BATCH_SIZE=2 GRAD_ACCUMULATION=1 MAX_SEQ_LENGTH=1024 RANK=32 EVAL_EVERY=200"
SWITCHES = "GRAD_CHECKPOINT=0 EMBEDDINGS=1 MASK_PROMPT=0 KEEP_CHECKPOINTS=0 CHECK_MEMORY=1 RESUME=0"
KINDS = [  # what a setting must be, in words, and settings that are right
    ("[1-9][0-9]{0,8}", "a whole number above 0", COUNTS),
    ("[01]", "0 or 1", SWITCHES),
    ("[0-9]{1,9}", "a whole number", "WARMUP=10 SEED=0"),
    ("-1|[1-9][0-9]{0,8}", "-1 (all) or a whole number above 0", "NUM_LAYERS=-1"),
    (NUMBER, "a number with a decimal point", "SCALE=10.0"),
    ("auto|" + NUMBER, "auto or a number with a decimal point", "LEARNING_RATE=auto"),
    ("0?[.][0-9]+|0", "a number from 0 to below 1", "DROPOUT=0.0"),
    ("linear|constant", "linear or constant", "SCHEDULE=linear"),
    ("adam|adamw|muon|sgd|adafactor", "adam, adamw, muon, sgd or adafactor", "OPTIMIZER=adam"),
]
# The matrices that are adapted, as Gemma, Llama, Mistral, Qwen and Phi name them; a name that a
# model does not have does no harm. With EMBEDDINGS=0 mlx-lm finds all but the embeddings itself.
MATRICES = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o", "qkv")]
MATRICES += [f"mlp.{name}_proj" for name in ("gate", "up", "down", "gate_up")]
MATRICES += ["model.embed_tokens", "language_model.model.embed_tokens"]


def fail(what, fix):
    sys.exit(f"error: {what}. FIX: {fix}")


def shown(text):
    """Text from elsewhere, short and without control characters."""
    return ascii(" ".join(str(text).split()))[1:-1][:200]


@contextlib.contextmanager
def readable(what, fix):
    """Whatever goes wrong with a file that is not ours becomes an error that names it."""
    try:
        yield
    except Exception as error:
        fail(f"{what} cannot be used: {type(error).__name__}: {shown(error)}", fix)


# ---- settings and files
def read_settings():
    """Return the settings as s.ITERS, …; 10,000 is refused with 10000 as the fix."""
    s = SimpleNamespace()
    for pattern, words, examples in KINDS:
        for name, example in (pair.split("=") for pair in examples.split()):
            value = os.environ[name]
            if not re.fullmatch(pattern, value):
                guesses = [value.strip(), value.replace(",", "."), value.replace(",", ""), example]
                right = next(guess for guess in guesses if re.fullmatch(pattern, guess))
                fail(f"{name}={shown(value)} is not {words}", f"{name}={right} ./fine_tune.sh")
            setattr(s, name, int(value) if re.fullmatch("-?[0-9]+", value) else value)
    if s.EVAL_EVERY % s.GRAD_ACCUMULATION:
        fix = f"EVAL_EVERY={10 * s.GRAD_ACCUMULATION} ./fine_tune.sh"
        fail(f"EVAL_EVERY={s.EVAL_EVERY} is not a multiple of GRAD_ACCUMULATION", fix)
    return s


def look_at_target():
    """Find out whether the adapter can be put into its place at the end."""
    aside = f"mv {ADAPTER} {ADAPTER}.mine"
    if ADAPTER.is_symlink() or (ADAPTER.exists() and not ADAPTER.is_dir()):
        fail(f"{ADAPTER} is a link or a file, where a folder goes", aside)
    config = ADAPTER / "adapter_config.json"
    if config.exists():
        with readable(config, aside):
            other = Path(json.loads(config.read_bytes())["model"]).name
        if other != MODEL:
            fail(f"{ADAPTER} is that of the base {shown(other)}", f"a VERSION other than {VERSION}")


def names_with(folder, file):
    """Return the names in `folder` that can be given as VERSION or MODEL and hold a file."""
    names = [path.parent.name for path in folder.glob(f"*/{file}")]
    return sorted(name for name in names if re.fullmatch("[A-Za-z0-9_][A-Za-z0-9._-]*", name))


def look_for_base_and_data():
    there = names_with(BASE.parent, "config.json")
    if MODEL not in there:
        fix = DOWNLOAD
        if near := difflib.get_close_matches(MODEL, there, 1):
            fix = f"MODEL={near[0]} ./fine_tune.sh"
        if MODEL == "gemma-3-text-27b-it-4bit" and len(there) == 1:
            fix = f"export MODEL={there[0]}"
        fail(f"there is no base model in {BASE} (there: {', '.join(there) or 'none'})", fix)
    there = names_with(DATA.parent, "train.jsonl")
    for file in (DATA / "train.jsonl", DATA / "valid.jsonl"):
        with readable(file, BUILD):
            if not file.exists() or not file.stat().st_size:
                fail(f"{file} is missing or empty (there: {', '.join(there) or 'none'})", BUILD)


def read_base():
    """Return the sizes in config.json and the bytes of the weights; refuse what is not whole."""
    with readable(f"{BASE}/config.json", DOWNLOAD):
        config = json.loads((BASE / "config.json").read_bytes())
        text = config.get("text_config", config)
        # Some leave out what is as their kind of model has it; then it is as in Gemma 3.
        hidden, heads = text["hidden_size"], text.get("num_attention_heads") or 8
        head = text.get("head_dim") or hidden // heads
        inner = text.get("intermediate_size") or 4 * hidden
        size = SimpleNamespace(hidden=hidden, layers=text["num_hidden_layers"])
        size.inner = max(inner) if isinstance(inner, list) else inner  # one for each layer
        size.queries = heads * head
        size.keys = head * (text.get("num_key_value_heads") or heads)
        size.vocabulary = text.get("vocab_size") or 262208
        for name, value in vars(size).items():
            if type(value) is not int or not 0 < value < (1000 if name == "layers" else 10**7):
                raise ValueError(f"{name}: {value}")
    if "model_file" in config:
        fail(f"{MODEL} brings code of its own, which is never run", "another base model")
    with readable(f"the base model in {BASE}", DOWNLOAD):
        shards = {path.name for path in BASE.glob("model*.safetensors")} or {"model.safetensors"}
        index = BASE / "model.safetensors.index.json"
        if index.exists():
            shards |= set(json.loads(index.read_bytes())["weight_map"].values())
        for shard in shards:
            with safe_open(BASE / shard, "numpy"):  # refuses a file that is cut off
                pass
        size.weights = sum((BASE / shard).stat().st_size for shard in shards)
    return size


def conversation(row):
    """{"prompt": "hi", "completion": "ho"}, {"messages": […]} → [{"role": …, "content": …}, …]."""
    if "messages" in row:
        return row["messages"]
    texts = [("user", row["prompt"]), ("assistant", row["completion"])]
    return [{"role": role, "content": text} for role, text in texts]


def read_rows(path):
    """Return the bytes of a file, and its rows as conversations."""
    rows, shapes = [], set()
    with readable(path, BUILD):
        file = path.read_bytes()
    for number, line in enumerate(file.splitlines(), 1):
        with readable(f"{path}, line {number},", BUILD):
            row = json.loads(line)
            shapes.add("messages" in row)
            rows.append(conversation(row))
            roles = [turn["role"] for turn in rows[-1]]
            "".join(turn["content"] for turn in rows[-1]).encode()
            if len(shapes) > 1 or not roles or roles != ["user", "assistant"] * (len(roles) // 2):
                raise ValueError("neither a prompt and a completion nor messages of two in turn")
    return file, rows


def longest_row(rows):
    """Return the most tokens in a row; refuse a template that hides where the reply begins."""

    def give_up(*_):
        raise TimeoutError("the chat template takes for ever")

    from mlx_lm.utils import load_tokenizer

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    most = 0
    with readable(f"the tokenizer of {BASE}", f"{DOWNLOAD}, or another base model"):
        tokens_of = load_tokenizer(BASE, {"trust_remote_code": False}).apply_chat_template
        for row in rows:
            tokens = tokens_of(row, return_dict=False)
            prompt = tokens_of(row[:-1], add_generation_prompt=True, return_dict=False)
            if tokens[: len(prompt)] != prompt or tokens == prompt:
                what = f"the chat template of {MODEL} does not tell which tokens are the reply"
                fail(what, "another base model; those of Gemma 3 and Llama 3 do")
            most = max(most, len(tokens))
    signal.alarm(0)
    return most


# ---- what it takes
def trained_numbers(s, size):
    """Return how many numbers are trained: RANK x (inputs + outputs) of each matrix."""
    layers = size.layers if s.NUM_LAYERS < 0 else s.NUM_LAYERS
    attention = 2 * (size.hidden + size.queries) + 2 * (size.hidden + size.keys)
    layer = attention + 3 * (size.hidden + size.inner)
    return s.RANK * (layers * layer + s.EMBEDDINGS * (size.vocabulary + size.hidden))


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
    little = {"NUM_LAYERS": min(8, size.layers), "EMBEDDINGS": 0}
    changes = {}
    for change in ({"GRAD_CHECKPOINT": 1}, {"BATCH_SIZE": 1}, {"RANK": min(8, s.RANK)}, little):
        changes |= change
        if memory(SimpleNamespace(**vars(s) | changes), size, longest) < allowed:
            fix = " ".join(f"{name}={value}" for name, value in changes.items())
            fail("that does not fit, and a Mac may crash", f"{fix} ./fine_tune.sh")
    fail("no settings make it fit", f"a smaller base, or MAX_SEQ_LENGTH={longest // 2} {BUILD}")


def learning_rate(s, size):
    """Return LEARNING_RATE; auto is 2e-4, the best of our sweeps, and less for larger models.

    The exponent is the one that Schulman et al. (LoRA Without Regret, 2025) found for Llama.
    """
    if s.LEARNING_RATE != "auto":
        return float(s.LEARNING_RATE)
    rate = float(f"{2e-4 * (640 / size.hidden) ** 0.78:.1e}")
    print(f"rate        {rate} = 2e-4 x (640 / {size.hidden})^0.78, by the model's hidden size")
    return rate


# ---- what mlx_lm.lora reads
def config(s, rate, done):
    """Return the lines of its YAML, for a run of which `done` batches are done already.

    The rest of a straight line is a straight line, so a resumed run takes up the rate where it
    was. It warms up again because its optimizer starts anew.
    """
    lora = {"rank": s.RANK, "scale": float(s.SCALE), "dropout": float(s.DROPOUT)}
    if s.EMBEDDINGS:
        lora["keys"] = MATRICES
    left = s.ITERS - done
    updates = left // s.GRAD_ACCUMULATION  # mlx counts these, not batches
    warmup = min(s.WARMUP // s.GRAD_ACCUMULATION, updates // 2)
    first, last = (rate * left / s.ITERS, 0.0) if s.SCHEDULE == "linear" else (rate, rate)
    line = [first, last, max(1, updates - warmup)]
    unbiased = {"bias_correction": True}  # else the first updates are 6 times too large
    settings = {
        "fine_tune_type": "lora",
        "num_layers": s.NUM_LAYERS,
        "lora_parameters": lora,
        "batch_size": s.BATCH_SIZE,
        "grad_accumulation_steps": s.GRAD_ACCUMULATION,
        "grad_checkpoint": s.GRAD_CHECKPOINT == 1,
        "mask_prompt": s.MASK_PROMPT == 1,
        "max_seq_length": s.MAX_SEQ_LENGTH,
        "optimizer": s.OPTIMIZER,
        "optimizer_config": {"adam": unbiased, "adamw": unbiased},
        "learning_rate": rate,
        "lr_schedule": {"name": "linear_schedule", "arguments": line, "warmup": warmup},
        "seed": s.SEED,
        "iters": left,
        "steps_per_report": 1,
        "save_every": s.EVAL_EVERY,
    }
    if done:
        settings["resume_adapter_file"] = f"{WORK}/{done:07d}_adapters.safetensors"
    return [f"{name}: {json.dumps(value)}" for name, value in settings.items()]


def record(s, rate, files):
    """Return the lines of lora_config.yaml."""
    about = {"base model": MODEL, "launcher": os.environ["LAUNCH"], "arguments": sys.argv[1]}
    for name, file in files.items():
        cksum = subprocess.run(["cksum"], input=file, stdout=subprocess.PIPE, check=True)
        about[name] = cksum.stdout.decode().strip()
    return [*(f"# {name}: {shown(text)}" for name, text in about.items()), *config(s, rate, 0)]


def batches_done(s, now):
    """Return how many batches of an interrupted run are done, if it is to be gone on with."""
    done = max((int(file.name[:7]) for file in WORK.glob("[0-9]*_adapters.safetensors")), default=0)
    if not s.RESUME:
        if done:
            print(f"new start   an interrupted run, {done} batches of it done, is thrown away:")
            print("            RESUME=1 would have gone on with it")
        return 0
    if not done:
        fail("there is no interrupted run with a checkpoint to resume", "RESUME=0 ./fine_tune.sh")
    with readable(WORK / "lora_config.yaml", "RESUME=0 ./fine_tune.sh"):
        before = (WORK / "lora_config.yaml").read_text("utf-8").splitlines()
    changed = [line.split(":")[0].strip("# ") for line in now if line not in before]
    if changed:
        what = f"{', '.join(changed)}: not as in the interrupted run"
        fail(what, "set it back, or start anew: RESUME=0 ./fine_tune.sh")
    print(f"resuming    after {done} of {s.ITERS} batches; the optimizer starts anew")
    return done


def set_up(s, rate, files, lines, done):
    """Make the work folder, with the data as they are now."""
    if not done:
        shutil.rmtree(WORK, ignore_errors=True)
        # Without a valid.jsonl beside it mlx-lm leaves out its own validation, whose loss counts
        # the prompts and the padding too.
        (WORK / "data").mkdir(parents=True)
        (WORK / "data/train.jsonl").write_bytes(files["train.jsonl"])
        (WORK / "valid.jsonl").write_bytes(files["valid.jsonl"])
        (WORK / "lora_config.yaml").write_text("\n".join(lines) + "\n")
    shutil.rmtree(WORK / "run", ignore_errors=True)
    if done < s.ITERS:
        (WORK / "run").mkdir()
        (WORK / "run/config.yaml").write_text("\n".join(config(s, rate, done)) + "\n")


# ---- the flow
def check_rows(s, size, train, valid):
    """Return the most tokens in a row; refuse rows that cannot be trained on rightly."""
    if len(train) < s.BATCH_SIZE:
        fix = f"BATCH_SIZE={len(train)} ./fine_tune.sh"
        fail(f"train.jsonl has {len(train)} rows, fewer than BATCH_SIZE={s.BATCH_SIZE}", fix)
    by_bytes = sorted(train + valid, key=lambda row: sum(len(t["content"].encode()) for t in row))
    longest = longest_row(valid[:20] + by_bytes[-100:])
    if longest > s.MAX_SEQ_LENGTH:
        what = f"a row has {longest} tokens: MAX_SEQ_LENGTH={s.MAX_SEQ_LENGTH} cuts off its reply"
        fail(what, f"MAX_SEQ_LENGTH={longest} ./fine_tune.sh")
    # Seen on CUDA from 1.5 times that many logits: a wrong loss, NaN gradients, no error.
    most = 2**31 // size.vocabulary // longest
    if s.BATCH_SIZE > most:
        what = f"MLX computes no more than {most} rows of {longest} tokens rightly"
        fail(what, f"BATCH_SIZE={most} ./fine_tune.sh")
    return longest


def main():
    s = read_settings()
    look_at_target()
    look_for_base_and_data()
    size = read_base()
    if s.NUM_LAYERS > size.layers:
        what = f"NUM_LAYERS={s.NUM_LAYERS}, but {MODEL} has {size.layers} layers"
        fail(what, "NUM_LAYERS=-1 ./fine_tune.sh")
    train_file, train = read_rows(DATA / "train.jsonl")
    valid_file, valid = read_rows(DATA / "valid.jsonl")
    longest = check_rows(s, size, train, valid)

    epochs = s.ITERS * s.BATCH_SIZE / len(train)
    megabytes = 4 * trained_numbers(s, size) / 1e6
    usual = " ".join(pairs for *_, pairs in KINDS).split()
    other = [pair for pair in (f"{n}={v}" for n, v in vars(s).items()) if pair not in usual]
    print(f"base model  {MODEL}")
    print(f"data        {VERSION}: {len(train)} rows to train on, the longest of {longest} tokens")
    print(f"            {len(valid)} rows to choose a checkpoint by")
    print(f"run         {s.ITERS} batches of {s.BATCH_SIZE} = {epochs:.3g} epochs")
    print(f"settings    {' '.join(other) or 'all as usual'}")
    print(f"checkpoints every {s.EVAL_EVERY} batches, of {megabytes:.3g} MB")
    check_memory(s, size, longest)
    rate = learning_rate(s, size)

    files = {"train.jsonl": train_file, "valid.jsonl": valid_file}
    lines = record(s, rate, files)
    done = batches_done(s, lines)
    need = ((s.ITERS - done) // s.EVAL_EVERY + 3) * megabytes
    free = shutil.disk_usage(WORK.parent).free / 1e6
    if need > free:
        fix = f"make room there, or EVAL_EVERY={s.ITERS} ./fine_tune.sh"
        fail(f"checkpoints need {need:.0f} MB, and models/adapters has {free:.0f} MB free", fix)
    with readable(WORK, "make room on the disk of models/adapters"):
        set_up(s, rate, files, lines, done)


with readable("the environment", "pip install -r requirements.txt"):
    from safetensors import safe_open
main()
PYTHON
}

# ---- training ----------------------------------------------------------------------------------

watch() { # run a trainer; end it if a loss is NaN or if this script ends
  exec python3 - "$@" <<'PYTHON'
import contextlib, math, os, re, select, shutil, signal, subprocess, sys
from pathlib import Path
from tqdm import tqdm

WORK = Path(os.environ["WORK"])
LOG, LOSSES = WORK / "training.log", WORK / "losses.csv"
ITERS, EVAL_EVERY = int(os.environ["ITERS"]), int(os.environ["EVAL_EVERY"])
SCRIPT = int(os.environ["SCRIPT"])


def fail(what, fix):
    sys.exit(f"error: {what}. FIX: {fix}")


def lines(pipe):
    """Yield the trainer's lines without their colours, until it or the script has ended."""
    rest = b""
    while os.getppid() == SCRIPT:
        if select.select([pipe], [], [], 1)[0]:
            data = os.read(pipe.fileno(), 65536)
            if not data:
                return
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                text = line.decode("utf-8", "replace").rpartition("\r")[2]
                yield re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x1f\x7f-\x9f]", "", text)
    raise BrokenPipeError


def keep_checkpoint(name, iteration):
    """Move a checkpoint that is complete to where a resumed run looks for it."""
    shutil.copy(WORK / "run/adapter_config.json", WORK)
    (WORK / "run" / name).rename(WORK / f"{iteration:07d}_adapters.safetensors")


def follow(pipe, done, log, losses):
    """Make a progress bar, losses.csv and checkpoints of what is printed; return the last batch.

    mlx_lm.lora prints a line for each batch, "    20    6.516 ▼    1,528      6.0k" (the loss,
    tokens a second, tokens so far), and for each checkpoint "  save  0000200_adapters.safetensors".
    """
    bar = tqdm(total=ITERS, initial=done, desc="training", file=sys.stdout, disable=None, leave=0)
    iteration, recent = done, []
    for line in lines(pipe):
        if not re.search("[█░]", line):
            print(line, file=log)
        if found := re.match(r" *(\d+) +(\S+) [▼▲] +([\d,]+)", line):
            if done + int(found[1]) <= iteration:  # said before, so by another process
                fix = 'LAUNCH="mlx.launch -n 2 --backend ring --" ./fine_tune.sh'
                fail("the processes of LAUNCH do not find each other, each trains alone", fix)
            iteration, loss = done + int(found[1]), float(found[2])
            if not math.isfinite(loss):
                what = f"the loss became NaN or infinite at iteration {iteration}"
                fail(what, "a smaller LEARNING_RATE or SCALE")
            recent.append((loss, int(found[3].replace(",", ""))))
            bar.update()
            if iteration % min(10, EVAL_EVERY) == 0 or iteration == ITERS:
                loss, speed = (sum(column) / len(recent) for column in zip(*recent))
                print(f"{iteration},{loss:.3f},,{speed:.0f}", file=losses)
                text = f"{iteration:6}  training loss {loss:.3f}  {speed:5.0f} tokens/s"
                bar.write(text, file=sys.stdout)
                recent = []
        elif found := re.match(r" *save +((\d+)_adapters.safetensors)", line):
            keep_checkpoint(found[1], done + int(found[2]))
        elif re.match("Loading (pretrained|datasets)|Trainable|.WARNING|wandb|swanlab", line):
            bar.write(line, file=sys.stdout)
    bar.close()
    return iteration


def judge(code, iteration):
    """Keep the last weights of a run that came to its end; say why another did not."""
    if code == 0 and iteration == ITERS and (WORK / "run/adapters.safetensors").exists():
        keep_checkpoint("adapters.safetensors", ITERS)
        shutil.rmtree(WORK / "run")
        return
    said = [line.strip() for line in LOG.read_text("utf-8").split("\n") if line.strip()]
    errors = [line for line in said[-20:] if "rror" in line]
    why = ascii((errors or said or ["it said nothing"])[-1])[1:-1][:200]
    fix = f"look at the end of {LOG}"
    if "write" in why:
        fix = f"make room on the disk of {WORK.parent}"
    if re.search("memory|alloc", why, re.IGNORECASE) or code == -signal.SIGKILL:
        smaller = ("GRAD_CHECKPOINT=1", "BATCH_SIZE=1", "RANK=8", "EMBEDDINGS=0 NUM_LAYERS=8")
        new = [item for item in smaller if item not in (f"{n}={v}" for n, v in os.environ.items())]
        fix = " ".join(new[:2]) + " ./fine_tune.sh"
    fail(f"mlx_lm.lora ended with code {code} after {iteration} of {ITERS} batches: {why}", fix)


def end(trainer):
    """End the trainer, and all that a launcher has started."""
    with contextlib.suppress(OSError):
        os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()


for number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:  # nohup
        signal.signal(number, lambda *_: sys.exit(1))
done = max((int(file.name[:7]) for file in WORK.glob("[0-9]*_adapters.safetensors")), default=0)
try:
    trainer = subprocess.Popen(
        sys.argv[1:],
        stdin=subprocess.PIPE,  # of /dev/null mlx.launch would read without end
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"COLUMNS": "100"},  # in a narrow terminal its lines would be broken
        start_new_session=True,
        pass_fds=[9],  # the lock
    )
except OSError as error:
    fail(f"{sys.argv[1]} cannot be started: {error.strerror}", "LAUNCH as README.md has it")
try:
    with open(LOG, "a", buffering=1) as log, open(LOSSES, "a", buffering=1) as losses:
        print(file=losses)  # behind a line that a kill has cut off
        iteration = follow(trainer.stdout, done, log, losses)
    judge(trainer.wait(), iteration)
except BrokenPipeError:  # nobody reads any more, or the script was killed
    end(trainer)
    os._exit(1)
except OSError as error:
    fail(f"{WORK} cannot be written: {error.strerror}", "make room on the disk of models/adapters")
finally:
    end(trainer)
PYTHON
}

# ---- the best checkpoint -----------------------------------------------------------------------

choose_checkpoint() {
  exec python3 - <<'PYTHON'
import json, math, os, re, shutil, signal, sys
from pathlib import Path

signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers
from tqdm import tqdm

WORK = Path(os.environ["WORK"])
FILES = {int(file.name[:7]): file for file in sorted(WORK.glob("[0-9]*_adapters.safetensors"))}
TOKENS = 2048  # in a batch
SCRIPT = int(os.environ["SCRIPT"])


def read_rows(tokenizer):
    """Return [(tokens of a chat, how many of them come before the reply), …], by length."""
    rows = []
    for line in (WORK / "valid.jsonl").read_bytes().splitlines():
        row = json.loads(line)
        chat = row.get("messages") or [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        tokens_of = tokenizer.apply_chat_template
        prompt = tokens_of(chat[:-1], add_generation_prompt=True, return_dict=False)
        rows.append((tokens_of(chat, return_dict=False), len(prompt)))
    return sorted(rows, key=lambda row: len(row[0]))


def make_batches(rows):
    """Return batches of up to TOKENS tokens: inputs, places of the replies' tokens, these tokens.

    ([1, 2, 3, 4, 5], 3) → inputs [1, 2, 3, 4, 5], places [2, 3], targets [4, 5]
    """
    batches = []
    while rows:
        count = max(1, TOKENS // len(rows[-1][0]))
        batch, rows = rows[-count:], rows[:-count]
        width = -(-len(batch[-1][0]) // 32) * 32  # few widths, as CUDA compiles for each
        inputs = [tokens + [0] * (width - len(tokens)) for tokens, _ in batch]
        places = [
            (row, place - 1, tokens[place])
            for row, (tokens, start) in enumerate(batch)
            for place in range(start, len(tokens))
        ]
        row, place, target = (mx.array(column) for column in zip(*places))
        batches.append((mx.array(inputs), (row, place), target))
    return batches


def loss_of_replies(model, batches, bar):
    """Return the loss in nats per token of the replies, their end of turn included."""
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


def score():
    """Return {iteration: loss} of every checkpoint, and of the base model as iteration 0."""
    base = f"models/base/{os.environ['MODEL']}"
    model, tokenizer = load(base, tokenizer_config={"trust_remote_code": False})
    batches = make_batches(read_rows(tokenizer))
    steps = len(batches) * (1 + len(FILES))
    bar = tqdm(total=steps, desc="scoring", file=sys.stdout, disable=None, leave=0)
    scores = {0: loss_of_replies(model, batches, bar)}
    bar.write(f"     0  validation loss {scores[0]:.3f}  (base model)", file=sys.stdout)

    adapter = json.loads((WORK / "adapter_config.json").read_bytes())
    linear_to_lora_layers(model, adapter["num_layers"], adapter["lora_parameters"])
    model.eval()
    for iteration, file in FILES.items():
        weights = mx.load(str(file))
        model.load_weights(list(weights.items()), strict=False)
        scores[iteration] = loss_of_replies(model, batches, bar)
        if not all(mx.isfinite(weight).all().item() for weight in weights.values()):
            scores[iteration] = math.nan
        bar.write(f"{iteration:6}  validation loss {scores[iteration]:.3f}", file=sys.stdout)
    bar.close()
    return scores


def write_losses(scores):
    """Put the loss of each checkpoint into its line, "200,2.437,,1528" → "200,2.437,3.039,1528".

    A line that a resumed run has written again counts as it was written last.
    """
    table = {}
    for line in (WORK / "losses.csv").read_text().splitlines():
        if re.fullmatch(r"\d+,[\d.]*,[\d.]*,\d*", line):
            table[int(line.split(",")[0])] = line.split(",")
    for iteration, loss in scores.items():
        table.setdefault(iteration, [str(iteration), "", "", ""])[2] = f"{loss:.4f}"
    lines = ["iteration,train_loss,val_loss,tokens_per_second"]
    lines += [",".join(table[iteration]) for iteration in sorted(table)]
    (WORK / "losses.new").write_text("\n".join(lines) + "\n")
    (WORK / "losses.new").rename(WORK / "losses.csv")


def main():
    print("scoring     each checkpoint on valid.jsonl: nats per token of the replies", flush=True)
    scores = score()
    good = {n: loss for n, loss in scores.items() if n and math.isfinite(loss)}
    if not good:
        sys.exit("error: all weights became NaN or infinite. FIX: a smaller LEARNING_RATE or SCALE")
    best = min(good, key=good.get)
    print(f"kept        iteration {best}: validation loss {good[best]:.3f}, base {scores[0]:.3f}")
    if good[best] >= scores[0]:
        print("warning: that is no better than the base model", file=sys.stderr)
    write_losses(scores)
    shutil.copy(FILES[best], WORK / "best")
    (WORK / "best").rename(WORK / "adapters.safetensors")  # with this name the run is complete
    for file in FILES.values() if os.environ["KEEP_CHECKPOINTS"] == "0" else ():
        file.unlink()
    shutil.rmtree(WORK / "data")
    (WORK / "valid.jsonl").unlink()


try:
    main()
except OSError as error:
    fix = "make room on the disk of models/adapters, then RESUME=1 ./fine_tune.sh"
    what = f"{error.filename or WORK} cannot be read or written: {error.strerror}"
    sys.exit(f"error: {what}. FIX: {fix}")
PYTHON
}

main "$@"
exit # bash reads no further: an editor may write into this file while it runs
