#!/usr/bin/env bash
# shellcheck disable=SC2034 # Python reads the settings

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

# sh, zsh, source and, because of the 02, Python too stop here and show this line.
[ "${BASH_SOURCE-}" = "$0" ] || { echo "error: not started. FIX: ./fine_tune.sh" >&2 && return 02; }

fail() {
  echo "error: $1. FIX: $2" >&2
  exit 1
}
misread() { # a line of the settings that bash cannot read, and its number: ITERS = 100
  trap - EXIT
  # Without the note behind it, and with spaces for signs: 'ITERS : "100"  # note' → ITERS, 100.
  read -r name value <<<"$(tr "=:\$\"'" ' ' <<<"${1%%#*}")"
  fail "line $2 of fine_tune.sh, ${1%%$'\n'*}, is not NAME=value" "write there: $name=\"$value\""
}
set +o posix # as `sh` on a Mac is
trap 'misread "$BASH_COMMAND" "$LINENO"' ERR
no_end() {
  fail "a quote or bracket in the settings of fine_tune.sh has no end" 'write each as NAME="value"'
}
trap no_end EXIT
given=$(export -p) # ITERS=60 ./fine_tune.sh wins over the line below
set -a             # Python sees them too

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
RESUME=auto                    # after an interrupted run: 1 goes on with it, 0 starts anew
# ------------------------------------------------------------------------------------------------

trap - ERR EXIT
eval "$given" 2>/dev/null || true # of all that this sets, only settings have changed
set +a
set -euo pipefail

command -v mlx_lm.lora >/dev/null ||
  fail "mlx_lm.lora was not found, so the virtual environment is not active" \
    "source venv/bin/activate (see README.md, Install)"
unset "${!HF_@}" "${!TRANSFORMERS@}" "${!MLXLM@}" "${!TQDM@}"
for name in "${!PYTHON@}"; do
  [ "$name" = PYTHONPATH ] || unset "$name"
done
export SCRIPT=$0
export HF_HUB_OFFLINE=1 PYTHONUTF8=1 PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1
export TRANSFORMERS_VERBOSITY=critical # its warnings hold what a config says, raw
# MLX 0.32 fails where it sees several NVIDIA cards, so each process gets one to see.
export CARD=${CUDA_VISIBLE_DEVICES:-}
export CUDA_VISIBLE_DEVICES=${CARD:-0}
trap '' INT # until Python is there to hear it
exec python3 - "$@" <<'PYTHON'
import contextlib, errno, fcntl, json, math, os, re, shutil, signal, subprocess, sys, threading
from pathlib import Path
from types import SimpleNamespace

VERSION, MODEL = os.environ.get("VERSION", ""), os.environ.get("MODEL", "")
LAUNCH = os.environ.get("LAUNCH", "").split()
BASE, DATA = Path("models/base", MODEL), Path("data/for_train", VERSION)
NAME = f"adapter-{VERSION}_{MODEL}"
ADAPTER = Path("models/adapters", NAME)
OLD = Path(f"models/adapters/.{NAME}.old")
WORK = Path(f"models/adapters/.{NAME}.partial")  # becomes ADAPTER when all is done
RUN = WORK / "run"  # what is needed until then: the data, the checkpoints, the losses
FINISHING = threading.Lock()  # who holds it is not interrupted
DOWNLOAD = f"hf download mlx-community/{MODEL} --local-dir {BASE}"
if tiny := re.fullmatch("tiny-gemma-3(-([0-9])bit)?", MODEL):
    DOWNLOAD = "python tests/tiny_base.py" + (f" --bits {tiny[2]}" if tiny[2] else "")
BUILD = f"VERSION={VERSION} MODEL={MODEL} python build_train.py"

# The least and the most that each setting can be, and the value that an error proposes. Where the
# least is a whole number, the setting is one; where the proposal is a word, the word will do too.
LIMITS = {
    "ITERS": (1, math.inf, "auto"),
    "BATCH_SIZE": (1, math.inf, 2),
    "MAX_SEQ_LENGTH": (1, math.inf, 1024),
    "RANK": (1, math.inf, 32),
    "EVAL_EVERY": (1, math.inf, 200),
    "GRAD_CHECKPOINT": (0, 1, 1),
    "EMBEDDINGS": (0, 1, 0),
    "MASK_PROMPT": (0, 1, 1),
    "SEED": (0, 10**9, 0),
    "CHECK_MEMORY": (0, 1, 0),
    "RESUME": (0, 1, "auto"),
    "NUM_LAYERS": (-1, math.inf, -1),
    "LEARNING_RATE": (1e-9, math.inf, "auto"),
    "SCALE": (0.1, math.inf, 10.0),
    "DROPOUT": (0.0, 0.9, 0.1),
}

# The matrices that are adapted, as Gemma, Llama, Mistral, Qwen and Phi name them; a name that a
# model does not have does no harm. With EMBEDDINGS=0 mlx-lm finds all but the embeddings itself.
MATRICES = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o", "qkv")]
MATRICES += [f"mlp.{name}_proj" for name in ("gate", "up", "down", "gate_up")]
MATRICES += ["model.embed_tokens", "language_model.model.embed_tokens"]


def main(*arguments):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=hear_ctrl_c, daemon=True).start()

    check_words(arguments)
    os.chdir(Path(os.environ["SCRIPT"]).resolve().parent)
    lock = take_lock()
    if finish_last_run() and os.environ.get("RESUME") == "1":
        return
    s = check()
    done = set_up(s, " ".join(arguments))
    if done < s.ITERS:  # else an interrupted run has only the choice left to do
        train(s, done, lock, arguments)
    best = choose()
    FINISHING.acquire()  # for good: what comes now is done in a moment
    best.rename(WORK / "adapters.safetensors")  # with this name the run is complete
    put_in_place()


def fail(what, fix, code=1):
    what = str(what).rstrip(".")
    print(re.sub("[^ -~]", "?", f"error: {what}. FIX: {fix}"), file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def or_fail(what, fix):
    """Whatever goes wrong with a file that is not ours becomes an error that names it."""
    try:
        yield
    except Exception as error:
        fail(f"{what} cannot be used: {type(error).__name__}: {str(error)[:200]}", fix)


def hear_ctrl_c():
    """Wait for Ctrl-C in a thread: the main one would not hear it while MLX computes."""
    signal.sigwait({signal.SIGINT})
    with FINISHING:
        done = max(checkpoints(), default=0)
        try:
            print("\ninterrupted: the adapter of before, if any, is as it was", file=sys.stderr)
            if done:
                how = "RESUME=1 in front of the same command goes on"
                print(f"{how} from the checkpoint after {done} batches", file=sys.stderr)
            else:
                print("there is no checkpoint yet, the same command starts anew", file=sys.stderr)
        finally:  # the other end of a pipe, as in 2>&1 | tee, hears Ctrl-C too
            os._exit(130)


def make_room():
    """Return what mends a full disk."""
    again = "RESUME=1 ./fine_tune.sh" if checkpoints() else "./fine_tune.sh"
    return f"make room on the disk of models/adapters, then {again}"


def progress(what, steps, done=0):
    """Return a bar for a terminal; into a pipe go only the lines that it writes."""
    from tqdm import tqdm

    return tqdm(None, what, steps, initial=done, file=sys.stdout, disable=None, leave=False)


# ---- one run at a time, whole or not at all ------------------------------------------------------
def take_lock():
    """Return a file that is locked as long as this program or its trainer lives."""
    ADAPTER.parent.mkdir(parents=True, exist_ok=True)
    lock = open(f"models/adapters/.{NAME}.lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fix = "wait until it is done; or end it, then RESUME=1 ./fine_tune.sh goes on with it"
        fail(f"another run is writing {ADAPTER}", fix)
    return lock


def put_in_place():
    """Let the work folder, without what only the run needed, be the adapter."""
    shutil.rmtree(RUN, ignore_errors=True)
    if ADAPTER.exists():
        ADAPTER.rename(OLD)
    WORK.rename(ADAPTER)
    shutil.rmtree(OLD, ignore_errors=True)
    print(f"wrote       {ADAPTER}/adapters.safetensors")
    print("            also losses.csv, training.log, lora_config.yaml")
    print(f"next        VERSION={VERSION} MODEL={MODEL} ./fuse.sh")


def finish_last_run():
    """Mend what a kill in put_in_place() has left; say whether that run is complete by now."""
    is_complete = (WORK / "adapters.safetensors").exists()
    with FINISHING:
        if is_complete:
            put_in_place()
        if OLD.exists() and not ADAPTER.exists():
            OLD.rename(ADAPTER)
        shutil.rmtree(OLD, ignore_errors=True)
    return is_complete


# ---- checks before a model is loaded -------------------------------------------------------------
def check_words(arguments):
    """Refuse arguments that mlx_lm.lora shall not get, and names that are none."""
    passed = ("--report-to", "--project-name")  # and the word that follows one of them
    for before, argument in zip(["", *arguments], arguments):
        if before not in passed and not argument.startswith(passed):
            fail(f"it takes no {argument}", "settings go in front: ITERS=60 ./fine_tune.sh", 2)
    names = ("VERSION", VERSION, "v1"), ("MODEL", MODEL, "gemma-3-text-27b-it-4bit")
    for name, text, usual in names:
        if not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9._-]*", text):
            last = text.rstrip("/").split("/")[-1]  # of a path or a repository
            meant = re.sub("[^A-Za-z0-9._-]", "_", last).lstrip(".-")
            what = f"{name} is not a name of letters, digits, '.', '_' and '-'"
            fail(what, f"export {name}={meant or usual}")


def check():
    """Check all that can be checked before a model is loaded; return the settings."""
    s = read_settings()
    refuse_other_base()
    if LAUNCH and not shutil.which(LAUNCH[0]):
        example = 'LAUNCH="mlx.launch --hostfile hosts.json --" ./fine_tune.sh'
        fail(f"LAUNCH: there is no command {LAUNCH[0]}", example)
    if BASE.is_symlink() and not BASE.exists():
        fail(f"{BASE} is a link to {BASE.readlink()}, which is not there", "connect its disk")
    need("base model", BASE / "config.json", "MODEL", DOWNLOAD)
    for name in ("train.jsonl", "valid.jsonl"):
        need(name, DATA / name, "VERSION", BUILD)
    size = read_base()
    train, valid = read_rows(DATA / "train.jsonl"), read_rows(DATA / "valid.jsonl")
    longest = count_longest(s, train, valid)
    check_sizes(s, size, len(train), longest)
    print(f"base model  {MODEL}")
    print(f"data        {VERSION}: {len(train)} rows to train on, the longest of {longest} tokens")
    print(f"            {len(valid)} rows to choose a checkpoint by")
    settle(s, size, len(train))
    print(f"settings    {in_words(s)}")
    check_memory(s, size, longest)
    return s


def read_settings():
    """Return the settings as s.ITERS, …; 10,000 is refused with 10000 as the fix."""
    s = SimpleNamespace()
    for name, (least, most, usual) in LIMITS.items():
        if name not in os.environ:
            fail(f"the settings of fine_tune.sh have no {name}", f"write there: {name}={usual}")
        text = os.environ[name]
        value = text if text == usual else read_number(text, least, most)
        if value is None:
            whole = isinstance(least, int)
            meant = text.replace(",", "" if whole else ".")
            if read_number(meant, least, most) is None:
                meant = usual
            what = f"{name}={text} is not a {'whole ' * whole}number from {least}"
            what += f" to {most}" if most < math.inf else ""
            fail(what, f"{name}={meant} ./fine_tune.sh")
        setattr(s, name, value)
    return s


def read_number(text, least, most):
    """Return the number, of the same kind as `least`; None if it is none or out of bounds."""
    try:
        number = type(least)(text)
    except ValueError:
        return None
    return number if least <= number <= most and number < math.inf else None


def in_words(s):
    """Return the settings as they would be typed: "ITERS=100 BATCH_SIZE=2 …"."""
    of_this_call = ("RESUME", "CHECK_MEMORY")
    values = vars(s).items()
    return " ".join(f"{name}={value}" for name, value in values if name not in of_this_call)


def refuse_other_base():
    """VERSION=a_b MODEL=c and VERSION=a MODEL=b_c have the same folder."""
    config = ADAPTER / "adapter_config.json"
    if config.exists():
        with or_fail(config, f"mv {ADAPTER} {ADAPTER}.mine"):
            other = Path(json.loads(config.read_bytes())["model"]).name
        if other != MODEL:
            fail(f"{ADAPTER} is that of the base {other}", f"another VERSION than {VERSION}")


def need(what, file, setting, make):
    """Refuse a folder without its file; the fix names the folders that have it."""
    there = [path for path in file.parent.parent.glob(f"*/{file.name}") if path.stat().st_size]
    if file not in there:
        names = sorted(path.parent.name for path in there)
        fixes = [f"export {setting}={name}" for name in names]
        fixes.insert(0 if setting == "VERSION" else len(fixes), make)  # one's own data first
        fail(f"there is no {what} in {file.parent}", ", or ".join(fixes))


def read_base():
    """Return the sizes in config.json and the bytes of the weights; refuse what is not whole."""
    import safetensors

    with or_fail(f"the base model in {BASE}", DOWNLOAD):
        config = json.loads((BASE / "config.json").read_bytes())
        text = config.get("text_config", config)
        size = SimpleNamespace(hidden=text["hidden_size"], layers=text["num_hidden_layers"])
        # Some leave out what is as their kind of model has it.
        size.vocabulary = int(text.get("vocab_size") or 262208)
        inner = text.get("intermediate_size") or 4 * size.hidden
        size.inner = max(inner) if isinstance(inner, list) else inner  # one for each layer

        if not (0 < size.layers <= 1000 and size.hidden > 0):
            raise ValueError("no model has so many layers, or so few numbers in them")

        shards = {"model.safetensors"}
        index = BASE / "model.safetensors.index.json"
        if index.exists():
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        for shard in shards:
            safetensors.safe_open(BASE / shard, "numpy")  # refuses a file that is cut off
        size.weights = sum((BASE / shard).stat().st_size for shard in shards)
    if "model_file" in config:
        fail(f"{MODEL} brings code of its own, which is never run", "another base model")
    return size


def read_rows(path):
    """Return the rows of a file as conversations."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        with or_fail(f"{path}, line {number},", BUILD):
            rows.append(read_row(line.decode()))
    return rows


def read_row(line):
    """Return a row as a conversation.

    {"prompt": "hi", "completion": "ho"}, {"messages": […]} → [{"role": …, "content": …}, …]
    """
    row = json.loads(line)
    chat = row.get("messages")
    if not chat:
        prompt = {"role": "user", "content": row["prompt"]}
        chat = [prompt, {"role": "assistant", "content": row["completion"]}]
    for turn in chat:
        turn["content"].encode()  # fails if it is no text
    return chat


def encode(tokenizer, chat):
    """Return the tokens of a conversation, and how many of them come before its last reply."""
    tokens = tokenizer.apply_chat_template(chat, return_dict=False)
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
    if tokens[: len(prompt)] != prompt or tokens == prompt:
        what = f"the chat template of {MODEL} does not tell which tokens are the reply"
        fail(what, "another base model; those of Gemma 3 and Llama 3 do")
    return tokens, len(prompt)


def count_longest(s, train, valid):
    """Return the most tokens in a row.

    No row has more tokens than bytes. So of the rows to train on it counts those of more bytes than
    a row may have tokens, and the 100 of most bytes at least.
    """
    from mlx_lm.utils import load_tokenizer

    sizes = [len(str(chat).encode()) for chat in train]
    least = min(s.MAX_SEQ_LENGTH, *sorted(sizes)[-100:])
    long_rows = [chat for chat, size in zip(train, sizes) if size >= least]
    endless = f"the chat template of {MODEL} takes more than a minute"
    signal.signal(signal.SIGALRM, lambda *_: fail(endless, "another base model"))
    signal.alarm(60)  # a template is a program
    chat_model = "another base: a chat model, as those with -it or -Instruct in their names"
    with or_fail(f"the tokenizer of {BASE}", f"{DOWNLOAD}, or {chat_model}"):
        tokenizer = load_tokenizer(BASE, {"trust_remote_code": False})
        longest = max(len(encode(tokenizer, chat)[0]) for chat in valid + long_rows)
    signal.alarm(0)
    return longest


def check_sizes(s, size, rows, longest):
    """Refuse settings that these rows, or this base model, cannot be trained with rightly."""
    if s.NUM_LAYERS == 0 or s.NUM_LAYERS > size.layers:  # mlx-lm takes 0 for all
        what = f"NUM_LAYERS={s.NUM_LAYERS} is not one of the {size.layers} layers of {MODEL}"
        fail(what, f"NUM_LAYERS={size.layers} ./fine_tune.sh")
    if longest > s.MAX_SEQ_LENGTH:
        what = f"a row has {longest} tokens: MAX_SEQ_LENGTH={s.MAX_SEQ_LENGTH} cuts off its reply"
        fail(what, f"MAX_SEQ_LENGTH={longest} ./fine_tune.sh")
    # Seen on CUDA from 1.5 times 2^31 logits: a wrong loss, NaN gradients, no error.
    most = min(rows, 2**31 // size.vocabulary // longest)
    if s.BATCH_SIZE > most:
        what = f"of these rows a batch can have {most} at most"
        fail(what, f"BATCH_SIZE={most} ./fine_tune.sh")


# ---- what it takes -------------------------------------------------------------------------------
def settle(s, size, rows):
    """Make numbers of ITERS=auto and LEARNING_RATE=auto, and say why.

    One epoch and, for a hidden size of 640, 2e-4 were best in tests/benchmarks/README.md. The bound
    of 1,200 rows is for the time that a large model takes; the exponent is the one that Schulman
    et al. (LoRA Without Regret, 2025) found for Llama.
    """
    epoch = rows // s.BATCH_SIZE
    if s.ITERS == "auto":
        s.ITERS = min(epoch, max(1, 1200 // s.BATCH_SIZE))
    print(f"run         {s.ITERS} batches of {s.BATCH_SIZE} = {s.ITERS / epoch:.3g} epochs")
    if s.ITERS < epoch:
        print(f"            more lowers the loss, up to one epoch: ITERS={epoch}")
    if s.ITERS > 2 * epoch:
        measured = "(8,000 rows at 1, 2, 4 epochs: 3.33, 3.39, 3.86; 500 rows: 3.66, 3.78, 5.47)"
        what = f"more than one epoch made held-out chats worse {measured}"
        print(f"warning: {what}. FIX: ITERS={epoch} ./fine_tune.sh", file=sys.stderr)
    if s.LEARNING_RATE == "auto":
        s.LEARNING_RATE = float(f"{2e-4 * (640 / size.hidden) ** 0.78:.1e}")
        reason = f"2e-4 x (640 / {size.hidden})^0.78, by the model's hidden size"
        print(f"rate        {s.LEARNING_RATE} = {reason}")


def memory(s, size, longest):
    """Return the bytes at the peak, fitted to what tests/benchmarks/memory.py measured.

    A matrix trains RANK x (inputs + outputs) numbers. A layer has four for the attention, here as
    if they were square, and three behind it. An update takes 26 bytes a trained number; each token
    of a batch 8 bytes a word of the vocabulary, and what the layers keep for the way back.
    """
    layers = size.layers if s.NUM_LAYERS < 0 else s.NUM_LAYERS
    layer = 8 * size.hidden + 3 * (size.hidden + size.inner)
    numbers = s.RANK * (layers * layer + s.EMBEDDINGS * (size.vocabulary + size.hidden))
    width = 4 * size.hidden + 3 * size.inner
    kept = 0 if s.GRAD_CHECKPOINT else 2 * (layers + size.layers) * width
    token = numbers / 20 + 8 * size.vocabulary + kept
    return 5e8 + size.weights + 26 * numbers + s.BATCH_SIZE * longest * token


def check_memory(s, size, longest):
    """Refuse what does not fit, with settings that do: a Mac may crash where memory runs out."""
    import mlx.core as mx

    info = mx.device_info()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = info.get("max_recommended_working_set_size") or info.get("total_memory") or machine
    needed = memory(s, size, longest)
    print(f"memory      about {needed / 1e9:.1f} GB of {allowed / 1e9:.1f} GB that MLX may use")
    if needed < allowed or not s.CHECK_MEMORY:
        return
    little = {"NUM_LAYERS": min(8, size.layers), "EMBEDDINGS": 0}
    changes = {}
    for change in ({"GRAD_CHECKPOINT": 1}, {"BATCH_SIZE": 1}, {"RANK": min(8, s.RANK)}, little):
        changes |= change
        if memory(SimpleNamespace(**vars(s) | changes), size, longest) < allowed:
            fix = " ".join(f"{name}={value}" for name, value in changes.items())
            fail("that does not fit, and a Mac may crash", f"{fix} ./fine_tune.sh")
    fail("no settings make it fit", f"a smaller base, or MAX_SEQ_LENGTH={longest // 2} {BUILD}")


# ---- the work folder -----------------------------------------------------------------------------
def config(s, done):
    """Return the text of mlx_lm.lora's YAML, for a run of which `done` batches are done already.

    The rest of a straight line is a straight line, so a resumed run takes up the rate where it
    was. It warms up again because its optimizer starts anew.
    """
    left = s.ITERS - done
    warmup = min(10, left // 2)  # batches in which the rate rises from 0
    line = [s.LEARNING_RATE * left / s.ITERS, 0.0, max(1, left - warmup)]
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
        "learning_rate": s.LEARNING_RATE,
        "lr_schedule": {"name": "linear_schedule", "arguments": line, "warmup": warmup},
        "seed": s.SEED + done,  # else a resumed run would see the first batches again
        "iters": left,
        "steps_per_report": 1,
        "save_every": s.EVAL_EVERY,
    }
    if done:
        settings["resume_adapter_file"] = str(checkpoints()[done])
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items())


def record(s, arguments):
    """Return the text of lora_config.yaml: where the run came from, and its settings."""
    about = {"base model": MODEL, "launcher": " ".join(LAUNCH), "arguments": arguments}
    about["settings"] = in_words(s)
    for name in ("train.jsonl", "valid.jsonl"):
        with open(DATA / name, "rb") as file:
            about[name] = subprocess.check_output("cksum", stdin=file, text=True).strip()
    lines = [f"# {name}: {json.dumps(value)}\n" for name, value in about.items()]
    return "".join(lines) + config(s, 0)


def checkpoints():
    """Return {iteration: file} of what is complete, in the order of time."""
    files = sorted(RUN.glob("[0-9]*_adapters.safetensors"))
    return {int(file.name[:7]): file for file in files}


def forget_checkpoints():
    """Leave nothing to resume of a run that learned NaN: it would lead there again."""
    for file in checkpoints().values():
        file.unlink()


def set_up(s, arguments):
    """Make the work folder, with the data as they are now, or find that of an interrupted run.

    Return how many of its batches are done.
    """
    text = record(s, arguments)
    if s.RESUME == 1:
        check_resumed(s, text)
        done = max(checkpoints())
        print(f"resuming    after {done} of {s.ITERS} batches; the optimizer starts anew")
        return done
    if s.RESUME == "auto" and checkpoints():
        what = f"an interrupted run has a checkpoint after {max(checkpoints())} batches"
        fail(what, "RESUME=1 ./fine_tune.sh goes on from it, RESUME=0 ./fine_tune.sh starts anew")
    shutil.rmtree(WORK, ignore_errors=True)
    # Without a valid.jsonl beside it mlx-lm leaves out its own validation, whose loss counts the
    # prompts and the padding too.
    (RUN / "data").mkdir(parents=True)
    shutil.copy(DATA / "train.jsonl", RUN / "data")
    shutil.copy(DATA / "valid.jsonl", RUN)
    (WORK / "lora_config.yaml").write_text(text)
    return 0


def check_resumed(s, text):
    """Refuse to go on with a run of other settings or data; text: what record() says now."""
    if not checkpoints():
        fail("there is no interrupted run with a checkpoint to resume", "RESUME=0 ./fine_tune.sh")
    before = (WORK / "lora_config.yaml").read_text()
    anew = "RESUME=0 ./fine_tune.sh starts anew"
    had = re.search('# settings: "(.*)"', before)[1].split()
    other = " ".join(word for word in had if word not in in_words(s).split())
    lines = before.splitlines()
    changed = [line.split(":")[0].lstrip("# ") for line in text.splitlines() if line not in lines]
    if other and "train.jsonl" not in changed:  # ITERS=auto follows the data
        fail(f"the interrupted run had {other}", f"{other} RESUME=1 ./fine_tune.sh; {anew}")
    if changed:
        fail(f"{', '.join(changed)}: not as in the interrupted run", anew)


# ---- training ------------------------------------------------------------------------------------
# A watcher waits until this program ends, however it does: then the pipe that is its standard input
# closes. It kills its process group, the trainer and all that a launcher has started.
WATCHED = """
  exec 3<&0
  { read -r _ <&3; kill -9 0; } >/dev/null 2>&1 &
  exec 3<&- "$@"
"""
ONE_CARD = """
  cards=$(nvidia-smi -L 2>/dev/null | wc -l)
  card=$((${MLX_RANK:-0} % (cards > 0 ? cards : 1)))
  export CUDA_VISIBLE_DEVICES="${CARD:-$card}"
  exec "$@"
"""


def train(s, done, lock, arguments):
    """Run mlx_lm.lora, or several by LAUNCH, and keep its checkpoints."""
    (RUN / "config.yaml").write_text(config(s, done))
    command = ["sh", "-c", WATCHED, "sh", *LAUNCH]
    command += ["sh", "-c", ONE_CARD, "sh", "mlx_lm.lora", "--train", *arguments]
    command += ["--config", RUN / "config.yaml", "--model", BASE]
    command += ["--data", RUN / "data", "--adapter-path", RUN / "adapter"]
    trainer = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"COLUMNS": "100"},  # one line a batch
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        pass_fds=[lock.fileno()],
    )
    try:
        iteration = follow(s, done, trainer.stdout)
        judge(s, iteration, trainer.wait())
    finally:
        with contextlib.suppress(OSError):
            os.killpg(trainer.pid, signal.SIGKILL)


def follow(s, done, output):
    """Make a progress bar, losses and checkpoints of what is printed; return the last batch.

    mlx_lm.lora prints a line for each batch, "    20    6.516 ▼    1,528      6.0k" (the loss,
    tokens a second, tokens so far), and for each checkpoint "  save  0000200_adapters.safetensors".
    """
    iteration, recent = done, []
    with (
        open(WORK / "training.log", "a", buffering=1) as log,
        open(RUN / "losses", "a", buffering=1) as losses,
        progress("training", s.ITERS, done) as bar,
    ):
        for line in output:
            line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)  # colours
            if not re.search("[█░]", line):  # its bar
                log.write(line)
            if found := re.match(r" *\d+ +(\S+) [▼▲] +([\d,]+)", line):
                iteration += 1
                loss, speed = float(found[1]), int(found[2].replace(",", ""))
                if not math.isfinite(loss):
                    forget_checkpoints()
                    what = f"the loss became NaN or infinite at iteration {iteration}"
                    fail(what, "a smaller LEARNING_RATE or SCALE")
                recent.append((loss, speed))
                bar.update()
                if iteration % min(10, s.EVAL_EVERY) == 0 or iteration == s.ITERS:
                    report(iteration, recent, losses, bar)
                    recent = []
            elif found := re.match(r" *save +((\d+)_adapters.safetensors)", line):
                keep_checkpoint(found[1], done + int(found[2]))
    return iteration


def report(iteration, recent, losses, bar):
    """Write down and show the mean of the recent batches: [(6.5, 1500), (6.1, 1700)]."""
    loss = sum(loss for loss, _ in recent) / len(recent)
    speed = sum(speed for _, speed in recent) / len(recent)
    print(f"{iteration},{loss:.3f},{speed:.0f}", file=losses)
    text = f"{iteration:6}  training loss {loss:.3f}  {speed:5.0f} tokens/s"
    bar.write(text, file=sys.stdout)


def keep_checkpoint(name, iteration):
    """Move a checkpoint that is complete to where a resumed run looks for it."""
    with contextlib.suppress(FileNotFoundError):  # two trainers that do not know of each other
        shutil.copy(RUN / "adapter/adapter_config.json", WORK)
        (RUN / "adapter" / name).rename(RUN / f"{iteration:07d}_adapters.safetensors")


def judge(s, iteration, code):
    """Keep the last weights of a run that came to its end; say why another did not."""
    if code == 0 and iteration == s.ITERS and (RUN / "adapter/adapters.safetensors").exists():
        keep_checkpoint("adapters.safetensors", s.ITERS)
        return
    log = WORK / "training.log"
    said = re.findall(r"\S.*", log.read_text()) or ["it said nothing"]
    why = ([line for line in said[-20:] if "rror" in line] or said)[-1]
    fix = f"look at the end of {log}"
    if re.search("unable to write|no space", why, re.IGNORECASE):
        fix = make_room()
    if re.search("memory|alloc", why, re.IGNORECASE) or code == -signal.SIGKILL:
        less = "GRAD_CHECKPOINT=1 BATCH_SIZE=1"
        fix = f"RESUME=0 {less} ./fine_tune.sh; then RANK=8 or NUM_LAYERS=8 too"
    what = f"mlx_lm.lora ended with code {code} after {iteration} of {s.ITERS} batches"
    fail(f"{what}: {why[:200]}", fix)


# ---- the best checkpoint -------------------------------------------------------------------------
def choose():
    """Return the checkpoint with the lowest loss."""
    print("scoring     each checkpoint on valid.jsonl: nats per token of the replies")
    try:
        scores = score()
    except RuntimeError as error:  # of MLX: memory ran out, or a file is damaged
        fix = "close other programs, then RESUME=1 ./fine_tune.sh; RESUME=0 starts anew"
        fail(f"scoring failed: {error}", fix)
    good = {n: loss for n, loss in scores.items() if n and math.isfinite(loss)}
    if not good:
        forget_checkpoints()
        fail("all weights became NaN or infinite", "a smaller LEARNING_RATE or SCALE")
    best = min(good, key=good.get)
    print(f"kept        iteration {best}: validation loss {good[best]:.3f}, base {scores[0]:.3f}")
    if good[best] >= scores[0]:
        print("warning: that is no better than the base model", file=sys.stderr)
    write_losses(scores)
    return checkpoints()[best]


def score():
    """Return {iteration: loss} of every checkpoint, and of the base model as iteration 0."""
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, tokenizer = load(str(BASE), tokenizer_config={"trust_remote_code": False})
    batches = make_batches(tokenizer)
    steps = len(batches) * (1 + len(checkpoints()))
    with progress("scoring", steps) as bar:
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


def make_batches(tokenizer, most=2048):
    """Return batches of up to `most` tokens: inputs, places of the replies' tokens, these tokens.

    ([1, 2, 3, 4, 5], 3) → inputs [1, 2, 3, 4, 5], places [2, 3], targets [4, 5]
    """
    import mlx.core as mx

    rows = [encode(tokenizer, chat) for chat in read_rows(RUN / "valid.jsonl")]
    rows.sort(key=lambda row: len(row[0]))
    batches = []
    while rows:
        count = max(1, most // len(rows[-1][0]))
        batch, rows = rows[-count:], rows[:-count]
        width = math.ceil(len(batch[-1][0]) / 32) * 32  # few widths: CUDA compiles for each
        inputs = [tokens + [0] * (width - len(tokens)) for tokens, _ in batch]
        numbers, places, targets = [], [], []
        for number, (tokens, start) in enumerate(batch):
            numbers += [number] * (len(tokens) - start)
            places += range(start - 1, len(tokens) - 1)  # each foretells the next token
            targets += tokens[start:]
        where = mx.array(numbers), mx.array(places)
        batches.append((mx.array(inputs), where, mx.array(targets)))
    return batches


def loss_of_replies(model, batches, bar):
    """Return the loss in nats per token of the replies, their end of turn included.

    Only the replies' logits become float32: those of all tokens would take gigabytes.
    """
    import mlx.core as mx
    import mlx.nn as nn

    total = count = 0
    for inputs, places, targets in batches:
        logits = model(inputs)[places].astype(mx.float32)
        total += nn.losses.cross_entropy(logits, targets, reduction="sum").item()
        count += targets.size
        mx.clear_cache()
        bar.update()
    return total / count


def write_losses(scores):
    """Make losses.csv: "200,2.437,1528" and {200: 3.039} → "200,2.437,3.0390,1528".

    A line that a resumed run has written again counts as it was written last.
    """
    table = {}
    for line in re.findall(r"^\d+,\S+,\d+$", (RUN / "losses").read_text(), re.MULTILINE):
        iteration, loss, speed = line.split(",")
        table[int(iteration)] = loss, speed
    with open(WORK / "losses.csv", "w") as file:
        print("iteration,train_loss,val_loss,tokens_per_second", file=file)
        for iteration in sorted({*table, *scores}):
            loss, speed = table.get(iteration, ("", ""))
            score = f"{scores[iteration]:.4f}" if iteration in scores else ""
            print(f"{iteration},{loss},{score},{speed}", file=file)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ImportError as error:
        fail(error, "source venv/bin/activate (see README.md, Install)")
    except BrokenPipeError:  # nobody reads any more
        os._exit(1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fail("the disk of models/adapters is full", make_room())
        file = error.filename or WORK
        what = f"{file} cannot be read or written: {error.strerror}"
        fail(what, f"ls -ld {file} shows what is there and whose it is")
PYTHON
