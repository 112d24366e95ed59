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
misread=""
trap 'misread=${misread:-$BASH_COMMAND}' ERR # a setting that bash cannot read: ITERS = 100
given=$(export -p)                           # ITERS=60 ./fine_tune.sh wins over the line below
set -a                                       # Python sees them too

# ---- settings: NAME=value, no spaces around the = ----------------------------------------------
VERSION=v1                     # which data: data/for_train/VERSION
MODEL=gemma-3-text-27b-it-4bit # which base model: models/base/MODEL
ITERS=auto                     # batches to train on; auto: one epoch, of 1,200 rows at most
BATCH_SIZE=2                   # rows in a batch; out of memory: 1
GRAD_CHECKPOINT=0              # 1 takes about 0.6 of the memory, and a third more time
MAX_SEQ_LENGTH=1024            # most tokens in a row, as in build_train.py
LEARNING_RATE=auto             # auto: by the model's size; NaN or a jumping loss: a third of it
RANK=32                        # size of the adapter, 4 to 64; overfitting, little memory: 8
SCALE=10.0                     # factor on what the adapter adds; NaN or a jumping loss: 5
DROPOUT=0.0                    # share of the adapter's input dropped, to 0.2; overfitting: more
NUM_LAYERS=-1                  # layers to train, counted from the last; -1 all
EMBEDDINGS=1                   # 1 adapts the token embeddings too; 0 with a small NUM_LAYERS
MASK_PROMPT=0                  # 1 learns replies only; 0 is better where prompts are chat too
EVAL_EVERY=200                 # batches between checkpoints; at the end valid.jsonl scores each
SEED=0                         # another whole number, another order of the batches
CHECK_MEMORY=1                 # 0 trains though it seems not to fit; a Mac may crash
LAUNCH=                        # several machines: "mlx.launch --hostfile hosts.json --"
RESUME=0                       # 1 goes on with an interrupted run of the same settings and data
# ------------------------------------------------------------------------------------------------

trap - ERR
eval "$given" 2>/dev/null || true # of all that this sets, only settings have changed
set +a
set -euo pipefail

main() {
  check_arguments "$@"
  cd "$(dirname "$0")"
  ADAPTER=models/adapters/adapter-${VERSION}_$MODEL
  OLD=models/adapters/.adapter-${VERSION}_$MODEL.old
  export WORK=models/adapters/.adapter-${VERSION}_$MODEL.partial # the run happens here
  trap interrupted INT
  lock "models/adapters/.adapter-${VERSION}_$MODEL.lock"
  finish_last_run

  run program check "$@"
  if [ -d "$WORK/run" ]; then # not so where an interrupted run has only the choice left to do
    # shellcheck disable=SC2086 # LAUNCH is several words
    run program watch $LAUNCH sh -c "$ONE_CARD" sh \
      mlx_lm.lora --train --config "$WORK/run/config.yaml" --model "models/base/$MODEL" \
      --data "$WORK/data" --adapter-path "$WORK/run" "$@"
  fi
  run program choose
  put_in_place
  echo "wrote       $ADAPTER/adapters.safetensors"
  echo "            also losses.csv, training.log, lora_config.yaml"
  echo "next        ./fuse.sh"
}

fail() { # what is wrong, what mends it, exit code
  echo "error: $1. FIX: $2" >&2
  exit "${3:-1}"
}

# ---- the shell ---------------------------------------------------------------------------------

unset CDPATH
export HF_HUB_OFFLINE=1 PYTHONUTF8=1 PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1
export TRANSFORMERS_VERBOSITY=critical # its warnings hold what a config says, raw

# MLX 0.32 fails where it sees several NVIDIA cards, so each process gets one to see.
# shellcheck disable=SC2016
ONE_CARD='
  cards=$(nvidia-smi -L 2>/dev/null | wc -l)
  card=$((${MLX_RANK:-0} % (cards > 0 ? cards : 1)))
  export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-$card}"
  exec "$@"
'

check_arguments() {
  if [ -n "$misread" ]; then
    read -r name value <<<"${misread/=/ }"
    fail "'$misread' in the settings is not NAME=value" "$name=\"$value\""
  fi
  for argument in "$@"; do
    case $argument in
      --report-to* | --project-name*) ;;
      -* | *=*) fail "it takes no $argument" "settings go in front: ITERS=60 ./fine_tune.sh" 2 ;;
    esac
  done
  for name in VERSION MODEL; do
    case ${!name} in
      "" | [.-]* | *[!A-Za-z0-9._-]*)
        part=${!name%/} # the last part of a path or a repository
        part=${part##*/}
        part=${part//[!A-Za-z0-9._-]/_}
        fail "$name is not a name of letters, digits, '.', '_' and '-'" \
          "$name=${part#[.-]} ./fine_tune.sh"
        ;;
    esac
  done
  command -v mlx_lm.lora >/dev/null ||
    fail "mlx_lm.lora was not found, so the virtual environment is not active" \
      "source venv/bin/activate (README.md, Install, says how it is made)"
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
  wait "$child" || exit
  child=""
}

interrupted() {
  trap '' INT
  if [ -n "$child" ]; then
    kill "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  echo >&2
  echo "interrupted: the adapter of before, if any, is as it was." \
    "RESUME=1 in front of the same command goes on from the newest checkpoint, if there is one" >&2
  exit 130
}

# ---- folders -----------------------------------------------------------------------------------

lock() { # for as long as this script or anything that it started lives
  exec 9>>"$1" ||
    fail "models/adapters cannot be written to" "chmod u+w models/adapters, or make room there"
  python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
    fail "another run is writing $ADAPTER" \
      "wait until it is done; or end it, then RESUME=1 ./fine_tune.sh goes on with it"
}

put_in_place() {
  trap '' INT
  rm -rf "$WORK/data" "$WORK/valid.jsonl" "$WORK"/[0-9]*_adapters.safetensors
  if [ -e "$ADAPTER" ]; then mv "$ADAPTER" "$OLD"; fi
  mv "$WORK" "$ADAPTER"
  rm -rf "$OLD"
  trap interrupted INT
}

finish_last_run() { # one that was killed in put_in_place
  if [ -f "$WORK/adapters.safetensors" ]; then put_in_place; fi
  if [ -e "$OLD" ] && [ ! -e "$ADAPTER" ]; then mv "$OLD" "$ADAPTER"; fi
  rm -rf "$OLD"
}

# ---- the program: check, watch, choose -----------------------------------------------------------

program() {
  exec python3 - "$@" <<'PYTHON'
import contextlib, difflib, json, math, os, re, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace

VERSION, MODEL = os.environ["VERSION"], os.environ["MODEL"]
BASE, DATA = Path("models/base", MODEL), Path("data/for_train", VERSION)
WORK, SCRIPT = Path(os.environ["WORK"]), os.getppid()
LOG, LOSSES = WORK / "training.log", WORK / "losses.csv"
DOWNLOAD = f"hf download mlx-community/{MODEL} --local-dir {BASE}"
BUILD = f"VERSION={VERSION} MODEL={MODEL} python build_train.py"

SETTINGS = {  # the least that a setting can be, and a usual value
    "ITERS": (1, "auto"),
    "BATCH_SIZE": (1, 2),
    "GRAD_CHECKPOINT": (0, 0),
    "MAX_SEQ_LENGTH": (1, 1024),
    "LEARNING_RATE": (0.0, "auto"),
    "RANK": (1, 32),
    "SCALE": (0.0, 10.0),
    "DROPOUT": (0.0, 0.0),
    "NUM_LAYERS": (-1, -1),
    "EMBEDDINGS": (0, 1),
    "MASK_PROMPT": (0, 0),
    "EVAL_EVERY": (1, 200),
    "SEED": (0, 0),
    "CHECK_MEMORY": (0, 1),
    "RESUME": (0, 0),
}
# The matrices that are adapted, as Gemma, Llama, Mistral, Qwen and Phi name them; a name that a
# model does not have does no harm. With EMBEDDINGS=0 mlx-lm finds all but the embeddings itself.
MATRICES = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o", "qkv")]
MATRICES += [f"mlp.{name}_proj" for name in ("gate", "up", "down", "gate_up")]
MATRICES += ["model.embed_tokens", "language_model.model.embed_tokens"]


def fail(what, fix):
    sys.exit(re.sub("[^ -~]", "?", f"error: {what}. FIX: {fix}"))


@contextlib.contextmanager
def readable(what, fix):
    """Whatever goes wrong with a file that is not ours becomes an error that names it."""
    try:
        yield
    except Exception as error:
        fail(f"{what} cannot be used: {type(error).__name__}: {str(error)[:200]}", fix)


with readable("python3", "source venv/bin/activate (README.md, Install, says how it is made)"):
    from safetensors import safe_open
    from tqdm import tqdm

    if sys.argv[1] != "watch":  # there ONE_CARD chooses a card for each process
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
        import mlx.core as mx
        import mlx.nn as nn


# ---- checks before a model is loaded -----------------------------------------------------------
def read_settings():
    """Return the settings as s.ITERS, …; 10,000 is refused with 10000 as the fix."""
    s = SimpleNamespace()
    for name, (least, usual) in SETTINGS.items():
        text = os.environ[name]
        for guess in (text, text.replace(",", "."), text.replace(",", ""), str(usual)):
            with contextlib.suppress(ValueError):
                number = usual if guess == str(usual) else type(least)(guess)
                if number == usual or number >= least:
                    break
        if guess != text:
            what = f"{name}={text} is not {'a whole' if type(least) is int else 'a'} number"
            fail(f"{what} from {least}", f"{name}={guess} ./fine_tune.sh")
        setattr(s, name, number)
    return s


def look_at_target():
    """Refuse to replace the adapter of another base.

    VERSION=a_b MODEL=c and VERSION=a MODEL=b_c have the same folder.
    """
    config = Path(f"models/adapters/adapter-{VERSION}_{MODEL}/adapter_config.json")
    if config.exists():
        with readable(config, f"mv {config.parent} {config.parent}.mine"):
            other = Path(json.loads(config.read_bytes())["model"]).name
        if other != MODEL:
            fail(f"{config.parent} is that of the base {other}", f"another VERSION than {VERSION}")


def look_for(what, file, setting, make):
    """Refuse a folder without its file; name the one there is that was probably meant."""
    there = [path for path in file.parent.parent.glob(f"*/{file.name}") if path.stat().st_size]
    if file not in there:
        names = sorted(path.parent.name for path in there)
        meant = difflib.get_close_matches(file.parent.name, names, 1, cutoff=0)
        fixes = [*(f"export {setting}={name}" for name in meant), make]
        what = f"there is no {what} in {file.parent} (there: {', '.join(names) or 'none'})"
        fail(what, ", or ".join(fixes))


def read_base():
    """Return the sizes in config.json and the bytes of the weights; refuse what is not whole."""
    with readable(f"the base model in {BASE}", DOWNLOAD):
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
        size.vocabulary = int(text.get("vocab_size") or 262208)

        shards = {path.name for path in BASE.glob("model*.safetensors")} or {"model.safetensors"}
        index = BASE / "model.safetensors.index.json"
        if index.exists():
            shards |= set(json.loads(index.read_bytes())["weight_map"].values())
        for shard in shards:
            safe_open(BASE / shard, "numpy")  # refuses a file that is cut off
        size.weights = sum((BASE / shard).stat().st_size for shard in shards)
    if "model_file" in config:
        fail(f"{MODEL} brings code of its own, which is never run", "another base model")
    return size


def read_rows(path):
    """Return the rows of a file as conversations.

    {"prompt": "hi", "completion": "ho"}, {"messages": […]} → [{"role": …, "content": …}, …]
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        with readable(f"{path}, line {number},", BUILD):
            row = json.loads(line)
            rows.append(
                row.get("messages")
                or [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"]},
                ]
            )
    return rows


def encode(tokenizer, chat):
    """Return the tokens of a conversation, and how many of them come before its last reply."""
    tokens = tokenizer.apply_chat_template(chat, return_dict=False)
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
    if tokens[: len(prompt)] != prompt or tokens == prompt:
        what = f"the chat template of {MODEL} does not tell which tokens are the reply"
        fail(what, "another base model; those of Gemma 3 and Llama 3 do")
    return tokens, len(prompt)


def give_up(*_):
    raise TimeoutError("it took more than a minute")


def check_rows(s, size, train, valid):
    """Return the most tokens in a row; refuse rows that cannot be trained on rightly."""
    from mlx_lm.utils import load_tokenizer

    by_length = sorted(train + valid, key=lambda chat: len(str(chat).encode()))
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)  # a template is a program, and may have no end
    with readable(f"the tokenizer of {BASE}", f"{DOWNLOAD}, or another base model"):
        tokenizer = load_tokenizer(BASE, {"trust_remote_code": False})
        longest = max(len(encode(tokenizer, row)[0]) for row in valid[:20] + by_length[-100:])
    signal.alarm(0)
    if s.BATCH_SIZE > len(train):
        what = f"train.jsonl has {len(train)} rows, fewer than BATCH_SIZE={s.BATCH_SIZE}"
        fail(what, f"BATCH_SIZE={len(train)} ./fine_tune.sh")
    if longest > s.MAX_SEQ_LENGTH:
        what = f"a row has {longest} tokens: MAX_SEQ_LENGTH={s.MAX_SEQ_LENGTH} cuts off its reply"
        fail(what, f"MAX_SEQ_LENGTH={longest} ./fine_tune.sh")
    # Seen on CUDA from 1.5 times that many logits: a wrong loss, NaN gradients, no error.
    most = 2**31 // size.vocabulary // longest
    if s.BATCH_SIZE > most:
        what = f"MLX computes no more than {most} rows of {longest} tokens rightly"
        fail(what, f"BATCH_SIZE={most} ./fine_tune.sh")
    return longest


# ---- what it takes -----------------------------------------------------------------------------
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


def settle_iterations(s, rows):
    """Make a number of ITERS=auto, and print how far the run goes.

    One epoch was the best in the measurements of tests/benchmarks/README.md; the bound is for the
    time that a large model takes.
    """
    epoch = rows // s.BATCH_SIZE
    if s.ITERS == "auto":
        s.ITERS = min(epoch, max(1, 1200 // s.BATCH_SIZE))
    print(f"run         {s.ITERS} batches of {s.BATCH_SIZE} = {s.ITERS / epoch:.3g} epochs")
    if s.ITERS < epoch:
        print(f"            more lowers the loss, up to one epoch: ITERS={epoch}")
    elif s.ITERS > 1.5 * epoch:
        print(f"            more than one epoch learns by heart: ITERS={epoch}")


def learning_rate(s, size):
    """Return LEARNING_RATE; auto is 2e-4, the best of our sweeps, and less for larger models.

    The exponent is the one that Schulman et al. (LoRA Without Regret, 2025) found for Llama.
    """
    if s.LEARNING_RATE != "auto":
        return s.LEARNING_RATE
    rate = float(f"{2e-4 * (640 / size.hidden) ** 0.78:.1e}")
    print(f"rate        {rate} = 2e-4 x (640 / {size.hidden})^0.78, by the model's hidden size")
    return rate


# ---- the work folder ---------------------------------------------------------------------------
def config(s, rate, done):
    """Return the lines of mlx_lm.lora's YAML, for a run of which `done` batches are done already.

    The rest of a straight line is a straight line, so a resumed run takes up the rate where it
    was. It warms up again because its optimizer starts anew.
    """
    left = s.ITERS - done
    warmup = min(10, left // 2)  # batches in which the rate rises from 0
    line = [rate * left / s.ITERS, 0.0, max(1, left - warmup)]
    unbiased = {"bias_correction": True}  # else the first updates are 6 times too large
    lora = {"rank": s.RANK, "scale": s.SCALE, "dropout": s.DROPOUT}
    if s.EMBEDDINGS:
        lora["keys"] = MATRICES
    settings = {
        "fine_tune_type": "lora",
        "num_layers": s.NUM_LAYERS,
        "lora_parameters": lora,
        "batch_size": s.BATCH_SIZE,
        "grad_accumulation_steps": 1,
        "grad_checkpoint": bool(s.GRAD_CHECKPOINT),
        "mask_prompt": bool(s.MASK_PROMPT),
        "max_seq_length": s.MAX_SEQ_LENGTH,
        "optimizer": "adam",  # adamw, muon, sgd, adafactor
        "optimizer_config": {"adam": unbiased, "adamw": unbiased},
        "learning_rate": rate,
        "lr_schedule": {"name": "linear_schedule", "arguments": line, "warmup": warmup},
        "seed": s.SEED,
        "iters": left,
        "steps_per_report": 1,
        "save_every": s.EVAL_EVERY,
    }
    if done:
        settings["resume_adapter_file"] = str(checkpoints()[done])
    return [f"{name}: {json.dumps(value)}" for name, value in settings.items()]


def record(s, rate, arguments):
    """Return the lines of lora_config.yaml: where the run came from, and its settings."""
    about = {"base model": MODEL, "launcher": os.environ["LAUNCH"], "arguments": arguments}
    for name in ("train.jsonl", "valid.jsonl"):
        with open(DATA / name, "rb") as file:
            about[name] = subprocess.check_output("cksum", stdin=file, text=True).strip()
    lines = [f"# {name}: {json.dumps(value)}" for name, value in about.items()]
    return [*lines, *config(s, rate, 0)]


def checkpoints():
    """Return {iteration: file} of what is complete, in the order of time."""
    files = sorted(WORK.glob("[0-9]*_adapters.safetensors"))
    return {int(file.name[:7]): file for file in files}


def batches_done(s, lines):
    """Return how many batches of an interrupted run are done, if it is to be gone on with."""
    if not s.RESUME:
        return 0
    if not checkpoints():
        fail("there is no interrupted run with a checkpoint to resume", "RESUME=0 ./fine_tune.sh")
    before = (WORK / "lora_config.yaml").read_text().splitlines()
    changed = [line.split(":")[0].strip("# ") for line in lines if line not in before]
    if changed:
        what = f"{', '.join(changed)}: not as in the interrupted run"
        fail(what, "set it back, or start anew: RESUME=0 ./fine_tune.sh")
    done = max(checkpoints())
    print(f"resuming    after {done} of {s.ITERS} batches; the optimizer starts anew")
    return done


def set_up(s, rate, lines, done):
    """Make the work folder, with the data as they are now."""
    if not done:
        shutil.rmtree(WORK, ignore_errors=True)
        # Without a valid.jsonl beside it mlx-lm leaves out its own validation, whose loss counts
        # the prompts and the padding too.
        (WORK / "data").mkdir(parents=True)
        shutil.copy(DATA / "train.jsonl", WORK / "data")
        shutil.copy(DATA / "valid.jsonl", WORK)
        (WORK / "lora_config.yaml").write_text("\n".join(lines) + "\n")
    shutil.rmtree(WORK / "run", ignore_errors=True)
    if done < s.ITERS:
        (WORK / "run").mkdir()
        (WORK / "run/config.yaml").write_text("\n".join(config(s, rate, done)) + "\n")


def check(*arguments):
    """Check all that can be checked before a model is loaded, and set up the run."""
    s = read_settings()
    look_at_target()
    look_for("base model", BASE / "config.json", "MODEL", DOWNLOAD)
    for name in ("train.jsonl", "valid.jsonl"):
        look_for(name, DATA / name, "VERSION", BUILD)
    size = read_base()
    train, valid = read_rows(DATA / "train.jsonl"), read_rows(DATA / "valid.jsonl")
    longest = check_rows(s, size, train, valid)

    other = [f"{name}={value}" for name, value in vars(s).items() if value != SETTINGS[name][1]]
    print(f"base model  {MODEL}")
    print(f"data        {VERSION}: {len(train)} rows to train on, the longest of {longest} tokens")
    print(f"            {len(valid)} rows to choose a checkpoint by")
    settle_iterations(s, len(train))
    print(f"settings    {' '.join(other) or 'all as usual'}")
    check_memory(s, size, longest)
    rate = learning_rate(s, size)

    lines = record(s, rate, " ".join(arguments))
    set_up(s, rate, lines, batches_done(s, lines))


# ---- training ----------------------------------------------------------------------------------
def watch(*command):
    """Run a trainer; end it, and all that a launcher has started, if this program ends."""
    with readable(command[0], "LAUNCH as README.md has it"):
        trainer = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # of /dev/null mlx.launch would read without end
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"COLUMNS": "100"},  # one line a batch
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            pass_fds=[9],  # the lock
        )
    try:
        iteration = follow(trainer.stdout)
        judge(trainer.wait(), iteration)
    finally:
        with contextlib.suppress(OSError):
            os.killpg(trainer.pid, signal.SIGKILL)


def follow(output):
    """Make a progress bar, losses.csv and checkpoints of what is printed; return the last batch.

    mlx_lm.lora prints a line for each batch, "    20    6.516 ▼    1,528      6.0k" (the loss,
    tokens a second, tokens so far), and for each checkpoint "  save  0000200_adapters.safetensors".
    """
    iters, every = all_batches(), int(os.environ["EVAL_EVERY"])
    done = iteration = max(checkpoints(), default=0)
    recent = []
    with (
        open(LOG, "a", buffering=1) as log,
        open(LOSSES, "a", buffering=1) as losses,
        tqdm(None, "training", iters, file=sys.stdout, disable=None, initial=done, leave=0) as bar,
    ):
        for line in output:
            line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)  # colours
            if not re.search("[█░]", line):  # its bar
                log.write(line)
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
                if iteration % min(10, every) == 0 or iteration == iters:
                    loss, speed = (sum(column) / len(recent) for column in zip(*recent))
                    print(f"{iteration},{loss:.3f},,{speed:.0f}", file=losses)
                    text = f"{iteration:6}  training loss {loss:.3f}  {speed:5.0f} tokens/s"
                    bar.write(text, file=sys.stdout)
                    recent = []
            elif found := re.match(r" *save +((\d+)_adapters.safetensors)", line):
                keep_checkpoint(found[1], done + int(found[2]))
    return iteration


def all_batches():
    """Return how many batches the run has, as check() wrote it down."""
    return int(re.search(r"\niters: (\d+)", (WORK / "lora_config.yaml").read_text())[1])


def keep_checkpoint(name, iteration):
    """Move a checkpoint that is complete to where a resumed run looks for it."""
    shutil.copy(WORK / "run/adapter_config.json", WORK)
    (WORK / "run" / name).rename(WORK / f"{iteration:07d}_adapters.safetensors")


def judge(code, iteration):
    """Keep the last weights of a run that came to its end; say why another did not."""
    iters = all_batches()
    if code == 0 and iteration == iters and (WORK / "run/adapters.safetensors").exists():
        keep_checkpoint("adapters.safetensors", iters)
        shutil.rmtree(WORK / "run")
        return
    said = [line.strip() for line in LOG.read_text().splitlines() if line.strip()]
    why = ([line for line in said[-20:] if "rror" in line] or said or ["it said nothing"])[-1]
    fix = f"look at the end of {LOG}"
    if re.search("memory|alloc", why, re.IGNORECASE) or code == -signal.SIGKILL:
        fix = "GRAD_CHECKPOINT=1 BATCH_SIZE=1 ./fine_tune.sh; then RANK=8 or NUM_LAYERS=8 too"
    what = f"mlx_lm.lora ended with code {code} after {iteration} of {iters} batches"
    fail(f"{what}: {why[:200]}", fix)


# ---- the best checkpoint -----------------------------------------------------------------------
def make_batches(tokenizer, most=2048):
    """Return batches of up to `most` tokens: inputs, places of the replies' tokens, these tokens.

    ([1, 2, 3, 4, 5], 3) → inputs [1, 2, 3, 4, 5], places [2, 3], targets [4, 5]
    """
    rows = [encode(tokenizer, chat) for chat in read_rows(WORK / "valid.jsonl")]
    rows.sort(key=lambda row: len(row[0]))
    batches = []
    while rows:
        count = max(1, most // len(rows[-1][0]))
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
        logits = model(inputs)[places].astype(mx.float32)
        total += nn.losses.cross_entropy(logits, targets, reduction="sum").item()
        count += targets.size
        mx.clear_cache()
        bar.update()
    return total / count


def score():
    """Return {iteration: loss} of every checkpoint, and of the base model as iteration 0."""
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, tokenizer = load(str(BASE), tokenizer_config={"trust_remote_code": False})
    batches = make_batches(tokenizer)
    steps = len(batches) * (1 + len(checkpoints()))
    with tqdm(None, "scoring", steps, file=sys.stdout, disable=None, leave=0) as bar:
        scores = {0: loss_of_replies(model, batches, bar)}
        bar.write(f"     0  validation loss {scores[0]:.3f}  (base model)", file=sys.stdout)
        adapter = json.loads((WORK / "adapter_config.json").read_bytes())
        linear_to_lora_layers(model, adapter["num_layers"], adapter["lora_parameters"])
        model.eval()
        for iteration, file in checkpoints().items():
            model.load_weights(str(file), strict=False)
            loss = scores[iteration] = loss_of_replies(model, batches, bar)
            bar.write(f"{iteration:6}  validation loss {loss:.3f}", file=sys.stdout)
    return scores


def write_losses(scores):
    """Put the loss of each checkpoint into its line, "200,2.437,,1528" → "200,2.437,3.039,1528".

    A line that a resumed run has written again counts as it was written last.
    """
    table = {}
    lines = re.findall(r"^(\d+),([\d.]*),[\d.]*,(\d*)$", LOSSES.read_text(), re.MULTILINE)
    for iteration, loss, speed in lines:
        table[int(iteration)] = [iteration, loss, "", speed]
    for iteration, loss in scores.items():
        table.setdefault(iteration, [str(iteration), "", "", ""])[2] = f"{loss:.4f}"
    lines = ["iteration,train_loss,val_loss,tokens_per_second"]
    lines += [",".join(table[iteration]) for iteration in sorted(table)]
    (WORK / "losses.new").write_text("\n".join(lines) + "\n")
    (WORK / "losses.new").replace(LOSSES)


def choose():
    """Keep the checkpoint with the lowest loss, and leave nothing else of the run."""
    print("scoring     each checkpoint on valid.jsonl: nats per token of the replies")
    scores = score()
    good = {n: loss for n, loss in scores.items() if n and math.isfinite(loss)}
    if not good:
        fail("all weights became NaN or infinite", "a smaller LEARNING_RATE or SCALE")
    best = min(good, key=good.get)
    print(f"kept        iteration {best}: validation loss {good[best]:.3f}, base {scores[0]:.3f}")
    if good[best] >= scores[0]:
        print("warning: that is no better than the base model", file=sys.stderr)
    write_losses(scores)
    checkpoints()[best].rename(WORK / "adapters.safetensors")  # with this name the run is complete


# ---- the flow ----------------------------------------------------------------------------------
def end_with_script():
    """End this program when its script has ended, however that was."""
    while os.getppid() == SCRIPT:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


threading.Thread(target=end_with_script, daemon=True).start()
for number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:  # nohup
        signal.signal(number, lambda *_: sys.exit(1))
try:
    {"check": check, "watch": watch, "choose": choose}[sys.argv[1]](*sys.argv[2:])
except BrokenPipeError:  # nobody reads any more
    os._exit(1)
except OSError as error:
    what = f"{error.filename or WORK} cannot be read or written: {error.strerror}"
    fail(what, "make room on the disk of models/adapters, then RESUME=1 ./fine_tune.sh")
PYTHON
}

main "$@"
exit # bash reads no further: an editor may write into this file while it runs
