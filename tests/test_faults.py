"""What may befall any script: kills, signals, two at once, a full disk, hostile files.

    pytest -m faults tests/test_faults.py     # all of it, about ten minutes, the table at the end
    CASES=20 pytest -m faults                 # of each kind so many
    ALL_READERS=1 pytest -m faults -k damage  # every damaged file with every script that reads it

Every case works in a copy of a project in which all stages have run. After it, the output of
before must be there byte for byte, or a new one that is whole; an error must be one line with its
fix, and nothing may be left running. A bare `pytest` tries three cases of each kind, and only the
quick scripts.
"""

import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import contents

pytestmark = [pytest.mark.slow, pytest.mark.faults]
TABLE = {}  # kind of fault → (tried, survived)
BASE = "models/base/tiny-gemma-3"
DATA = "data/for_train/sample"
ADAPTER = "models/adapters/adapter-sample_tiny-gemma-3"
FUSED = "models/fused/fused-sample_tiny-gemma-3"


# ---- the stages ---------------------------------------------------------------------------------
@dataclass
class Stage:
    """A script, and what it reads and writes."""

    command: list
    output: str = ""
    reads: list = field(default_factory=list)
    settings: dict = field(default_factory=dict)
    other: dict = field(default_factory=dict)  # settings of which another output comes


TOKENIZER = [f"{BASE}/{name}.json" for name in ("config", "tokenizer", "tokenizer_config")]
MODEL = [*TOKENIZER, f"{BASE}/model.safetensors"]
LEARNED = [f"{ADAPTER}/{name}" for name in ("adapters.safetensors", "adapter_config.json")]
WHOLE = ("config.json", "model.safetensors", "tokenizer.json", "fused_from.json")
STAGES = {
    "export": Stage(
        ["data/raw/from_export.py", "chat.txt", "--version", "mine", "--replace"],
        "data/raw/messages_mine.json",
        ["chat.txt"],
    ),
    "build": Stage(
        ["build_train.py", "--valid-rows", "6"],
        DATA,
        ["data/raw/messages_sample.json", *TOKENIZER],
        {"MAX_SEQ_LENGTH": "96"},
        {"MAX_SEQ_LENGTH": "64"},
    ),
    "train": Stage(
        ["fine_tune.sh"],
        ADAPTER,
        [f"{DATA}/train.jsonl", f"{DATA}/valid.jsonl", *MODEL, f"{ADAPTER}/adapter_config.json"],
        # RESUME=0, as after an interrupted run with a checkpoint it asks what to do.
        {"ITERS": "2", "EVAL_EVERY": "1", "RANK": "4", "RESUME": "0"},
        {"RANK": "8"},
    ),
    "fuse": Stage(
        ["fuse.sh"],
        FUSED,
        [*MODEL, *LEARNED, f"{FUSED}/fused_from.json"],
        other={"FUSED_BITS": "8"},
    ),
    "test": Stage(
        ["test_on_validation.py", "--replies", "2", "--max-tokens", "4"],
        "data/results/sample_tiny-gemma-3",
        [f"{DATA}/valid.jsonl", *MODEL, *LEARNED]
        + [f"{ADAPTER}/{name}" for name in ("losses.csv", "lora_config.yaml")]
        + [f"{FUSED}/{name}" for name in WHOLE],
    ),
    "chat": Stage(
        ["models/chat.py", "--max-tokens", "4"],
        "",
        [f"{DATA}/settings.json"] + [f"{FUSED}/{name}" for name in WHOLE],
    ),
}
QUICK = ["export", "build"]
WRITERS = [name for name in STAGES if STAGES[name].output]


def start(project, name, *arguments, env=None, before=(), script=None, **options):
    """Start a stage in a session of its own."""
    stage = STAGES[name]
    program = sys.executable if stage.command[0].endswith(".py") else "bash"
    script = script or project / stage.command[0]
    command = [*before, program, script, *stage.command[1:], *arguments]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    names = {"VERSION": "sample", "MODEL": "tiny-gemma-3", "PATH": path}
    (project.parent / "typed").write_text("hello\n")
    with open(project.parent / "typed") as typed:
        options = {"cwd": project, "stdin": typed, "start_new_session": True} | options
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        environment = os.environ | names | stage.settings | (env or {})
        return subprocess.Popen(list(map(str, command)), env=environment, **options)


def start_other(project, name):
    """Start a stage with settings of which another output comes."""
    return start(project, name, env=STAGES[name].other)


def finish(process, limit=150):
    """Wait for a stage to end, and return what it left."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"it still runs after {limit} seconds") from None
    said = [(text or b"").decode("utf-8") for text in (out, err)]
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def go(project, name, *arguments, **options):
    return finish(start(project, name, *arguments, **options))


def shown(text):
    return ascii(text[-300:])


UNWANTED = ["Traceback", "Exception ignored", "Broken pipe", "Segmentation", "core dumped"]
STEERS = re.compile(r"[^\S\n\r\t ]|[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e]")  # a terminal


def check_words(result, *codes):
    """It ended as it may, without a traceback; its error is one line with its fix."""
    said = result.stdout + result.stderr
    assert result.returncode in codes, f"exit code {result.returncode}: {shown(result.stderr)}"
    assert not [words for words in UNWANTED if words in said], shown(result.stderr)
    assert not STEERS.search(said), shown(said)
    if result.returncode == 1:
        last = result.stderr.strip().rpartition("\n")[2]
        assert re.match(r"error: .+\. FIX: .", last), shown(last)


def output_of(project, name):
    """Return {path: bytes} of what a stage wrote."""
    output = project / STAGES[name].output
    if output == project:
        return {}
    return contents(output) if output.is_dir() else {"": output.read_bytes()}


def check_output(project, scope, name, before=None):
    """The output is that of before, or a whole one; nothing else that is visible lies beside it."""
    output, now = project / STAGES[name].output, output_of(project, name)
    if output == project:
        return
    beside = [path.name for path in output.parent.iterdir() if path.name[0] != "."]
    assert sorted(beside) == sorted({*beside} & scope.visible), beside
    if now == before:
        return
    assert {*now} - {"evil.py"} == {*output_of(scope.project, name)}, sorted(now)
    for path, data in now.items():
        assert data, f"{path} is empty"
        if path.endswith(".jsonl"):
            [json.loads(line) for line in data.decode().splitlines()]
        elif path.endswith(".json"):
            json.loads(data)
        elif path.endswith(".safetensors"):
            mx.eval(mx.load(str(output / path)))


def at_work(project):
    """Return the processes that have the project for their current folder, where /proc knows."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")).is_relative_to(project):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ")[:200])
        except OSError:
            pass
    return found


def nothing_runs(project):
    """What a script has started ends with it, a second later at the most."""
    for _ in range(15):
        if not at_work(project):
            return
        time.sleep(0.1)
    raise AssertionError(f"it goes on without its script: {at_work(project)}")


def check_agreement(project, name):
    """What the files of an output say of the settings is the same in all of them."""
    output = project / STAGES[name].output
    if name == "train":
        rank = json.loads((output / "adapter_config.json").read_text())["lora_parameters"]["rank"]
        assert f"rank: {rank}" in (output / "lora_config.yaml").read_text().replace('"', "")
    elif name == "fuse":
        quantization = json.loads((output / "config.json").read_text()).get("quantization")
        bits = json.loads((output / "fused_from.json").read_text())["bits"]
        assert bits == (str(quantization["bits"]) if quantization else "base")
    elif name == "build":
        before = output_of(project, name)
        length = json.loads(before["settings.json"])["max_seq_length"]
        assert go(project, name, env={"MAX_SEQ_LENGTH": str(length)}).returncode == 0
        assert output_of(project, name) == before, f"it is not what that gives: {length}"


# ---- the driver ---------------------------------------------------------------------------------
@dataclass
class Scope:
    """Which stages are tried, in copies of which project, and how long each of them takes."""

    stages: list
    project: Path
    seconds: dict
    most: int  # cases of each kind that are tried
    visible: set  # the names of all files and folders

    def cases(self, cases):
        """Return those of the cases that are tried: a case begins with the name of its stage."""
        cases = [case for case in cases if case[0] in self.stages]
        return cases[:: -(-len(cases) // self.most)]


@pytest.fixture(scope="module")
def scope(request, template, tmp_path_factory):
    """A project in which the stages have run."""
    project = Path(shutil.copytree(template, tmp_path_factory.mktemp("finished") / template.name))
    lines = [
        f"[{1 + i // 60:02}.05.24, 10:{i % 60:02}:00] {['Ann', 'Bob'][i % 2]}: message {i}\n"
        for i in range(300)
    ]
    (project / "chat.txt").write_text("".join(lines))
    is_long = "faults" in request.config.option.markexpr
    stages = list(STAGES) if is_long else QUICK
    seconds = {}
    for name in [*stages, *stages]:  # the second time, because the first compiles and caches
        began = time.monotonic()
        check_words(go(project, name), 0)
        seconds[name] = time.monotonic() - began
    visible = {path.name for path in project.rglob("[!.]*")} | {project.name}
    most = int(os.environ.get("CASES", 10**6)) if is_long else 3
    return Scope(stages, project, seconds, most, visible)


@pytest.fixture(scope="module", autouse=True)
def table(request):
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{'kind of fault':16}{'tried':>6}{'survived':>10}")
        for kind, (tried, survived) in TABLE.items():
            print(f"{kind:16}{tried:6}{survived:10}")


def attempt(kind, scope, cases, one):
    """Run one(project, *case) for every case, two at a time, each in a copy of the project."""

    def tried(case):
        with tempfile.TemporaryDirectory(prefix="fault-") as folder:
            project = Path(shutil.copytree(scope.project, Path(folder).resolve() / "my project"))
            try:
                one(project, *case)
            except AssertionError as error:
                return f"{kind} {case}: {str(error).partition(chr(10))[0]}"
        return ""

    cases = scope.cases(cases)
    with ThreadPoolExecutor(2) as pool:
        failures = list(filter(None, pool.map(tried, cases)))
    before = TABLE.get(kind, (0, 0))
    TABLE[kind] = before[0] + len(cases), before[1] + len(cases) - len(failures)
    assert not failures, "\n" + "\n".join(failures)


def spread(**counts):
    """Return [(stage, moment), …], the moments spread from the start of a run to its end."""
    return [(name, (k + 0.5) / n) for name, n in counts.items() for k in range(n)]


def files_beside(project, name):
    """Return what can be seen to change when a stage writes."""
    folder = (project / STAGES[name].output).parent
    found = []
    # os.walk passes over a folder that is renamed meanwhile; Path.rglob of Python 3.11 ends there
    for path in [Path(top, name) for top, _, names in os.walk(folder) for name in names]:
        try:
            found.append((path, path.stat().st_size, path.stat().st_mtime_ns))
        except OSError:  # renamed or removed meanwhile
            found.append((path, 0, 0))
    return sorted(found)


def wait_for_changes(project, name, process, count):
    """Wait until a stage has changed something so many times."""
    now = files_beside(project, name)
    while count and process.poll() is None:
        before, now = now, files_beside(project, name)
        count -= before != now


# ---- kill, signal, two at once, a full disk -----------------------------------------------------
def test_kill_9_leaves_the_output_of_before_and_the_next_run_works(scope):
    def one(project, name, share, changes, kill):
        before = output_of(project, name)
        process = start_other(project, name)
        time.sleep(share * scope.seconds[name])
        wait_for_changes(project, name, process, changes)
        with suppress(ProcessLookupError):  # it may be done
            kill(process.pid, signal.SIGKILL)
        process.wait()
        nothing_runs(project)
        finish(process)
        output = project / STAGES[name].output
        if output.exists():
            check_output(project, scope, name, before)
        else:  # killed between two renames
            assert contents(output.with_name(f".{output.name}.old")) == before
        check_words(go(project, name), 0)
        check_output(project, scope, name)
        check_agreement(project, name)

    moments = [(*case, 0) for case in spread(export=6, build=8, train=8, fuse=8, test=8)]
    moments += [(name, 0, count) for name in WRITERS for count in (1, 1, 2, 3, 3, 5)]
    kills = os.kill, os.killpg  # the script alone, or with all that it started
    attempt("kill -9", scope, [(*case, kills[i % 2]) for i, case in enumerate(moments)], one)


ENDS = {  # signal → exit codes; a negative one is that of the signal itself
    signal.SIGINT: (130, -signal.SIGINT),
    signal.SIGTERM: (143, -signal.SIGTERM),
    signal.SIGHUP: (129, -signal.SIGHUP),
}


def test_a_signal_ends_a_stage_and_all_that_it_started(scope):
    def one(project, name, moment, number):
        before = output_of(project, name)
        process = start(project, name)
        time.sleep(0.4 + moment * scope.seconds[name])  # before its first line Python answers
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        process.wait(20)
        nothing_runs(project)
        check_words(finish(process), 0, *ENDS[number])
        check_output(project, scope, name, before)

    moments = spread(export=5, build=9, train=6, fuse=6, test=6, chat=4)
    attempt("signal", scope, [(*case, number) for case in moments for number in ENDS], one)


def test_of_two_runs_at_once_one_is_refused_or_both_agree(scope):
    def one(project, name, delay):
        first = start(project, name)
        time.sleep(delay * scope.seconds[name])
        second = start_other(project, name)
        results = [finish(first), finish(second)]
        for result in results:
            check_words(result, 0, 1)
            assert result.returncode == 0 or "error: another run is writing" in result.stderr
        assert 0 in [result.returncode for result in results]
        nothing_runs(project)
        check_output(project, scope, name)
        check_agreement(project, name)

    attempt("two at once", scope, spread(export=10, build=14, train=4, fuse=6, test=6), one)


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_fills_up(scope):
    def one(project, name, size):
        before = output_of(project, name)
        check_words(go(project, name, preexec_fn=partial(limit_files, size)), 0, 1)
        check_output(project, scope, name, before)

    sizes = 0, 100, 3_000, 30_000, 100_000, 400_000
    attempt("full disk", scope, [(name, size) for name in WRITERS for size in sizes], one)


# ---- damaged files ------------------------------------------------------------------------------
def cut(share, path):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def make_folder(path):
    path.unlink()
    path.mkdir()


def link_to_itself(path):
    """Let the file be one that cannot be opened, by root neither."""
    path.unlink()
    path.symlink_to(path.name)


HARMS = {f"cut at {share}": partial(cut, share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)}
HARMS |= {
    f"replaced by {text[:9]!r}": lambda path, text=text: path.write_text(text)
    for text in ("", "[]", "{}", "3", "null", '"x"', "[" * 100_000, '[{"a": [null]}]')
}
HARMS |= {
    "3 kB of random bytes": lambda path: path.write_bytes(os.urandom(3000)),
    "a folder": make_folder,
    "cannot be opened": link_to_itself,
    "missing": Path.unlink,
}


def test_a_damaged_file_becomes_an_error_or_a_right_result(scope):
    def one(project, name, file, harm):
        HARMS[harm](project / file)
        damaged = STAGES[name].output and Path(file).is_relative_to(STAGES[name].output)
        before = None if damaged else output_of(project, name)
        result = go(project, name)
        check_words(result, 0, 1)
        if not damaged or result.returncode == 0:
            check_output(project, scope, name, before)

    files = dict.fromkeys(file for stage in STAGES.values() for file in stage.reads)
    cases = []
    for i, file in enumerate(files):
        readers = [name for name in scope.stages if file in STAGES[name].reads]
        for j, harm in enumerate(HARMS if readers else ()):
            some = readers if "ALL_READERS" in os.environ else [readers[(i + j) % len(readers)]]
            cases += [(name, file, harm) for name in some]
    attempt("damaged file", scope, cases, one)


# ---- odd environments ---------------------------------------------------------------------------
PROXIES = ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"]
ENVIRONMENTS = {
    "Python": {
        "PYTHONIOENCODING": "ascii",
        "PYTHONOPTIMIZE": "2",
        "PYTHONUTF8": "0",
        "LC_ALL": "C",
        "MPLBACKEND": "bogus",
        "MLXLM_USE_MODELSCOPE": "True",
    },
    "hub": {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": "/dev/null/x",
        "HF_HUB_DOWNLOAD_TIMEOUT": "soon",
        "HF_HUB_ETAG_TIMEOUT": "soon",
        "TRANSFORMERS_CACHE": "/dev/null",
        **dict.fromkeys(PROXIES, "socks5://127.0.0.1:9"),
    },
    "bash": {"BASH_ENV": "bash_env"},
    "terminal": {"COLUMNS": "7", "LINES": "1", "TERM": "dumb", "NO_COLOR": "1"},
}


def in_environment(environment, project, name, **options):
    (project / "bash_env").write_text("set -o noclobber -f; IFS=e/; CDPATH=/tmp:/")
    return go(project, name, env=environment, **options)


def without_a_network(project, name):
    environment = ENVIRONMENTS["Python"] | ENVIRONMENTS["hub"] | ENVIRONMENTS["bash"]
    return in_environment(environment, project, name, before=("unshare", "-n"))


def no_input(project, name):
    return go(project, name, stdin=None, preexec_fn=partial(os.close, 0))


def modules_in_the_current_folder(project, name):
    """Call it in a folder that holds a json.py and the like."""
    folder = project.parent / "elsewhere"
    folder.mkdir()
    shutil.copy(project / "chat.txt", folder)
    for module in "json", "numpy", "tqdm", "mlx", "random", "safetensors", "pandas":
        (folder / f"{module}.py").write_text("open('ran', 'w'); raise SystemExit('ran')")
    result = go(project, name, cwd=folder)
    assert not (folder / "ran").exists()
    return result


def through_a_link(project, name):
    """Call it by a link in ~/bin, with a CDPATH that leads astray."""
    home = project.parent / "bin"
    home.mkdir()
    script = project / STAGES[name].command[0]
    (home / script.name).symlink_to(os.path.relpath(script, home))
    shutil.copy(project / "chat.txt", home)
    env = {"CDPATH": f"{home}:/usr:/"}
    return go(project, name, script=Path(script.name), cwd=home, env=env)


def into_head(project, name):
    """Read a line of what it prints, and then no more, as | head -1 does."""
    process = start(project, name, stdout=(pipe := os.pipe())[1])
    os.close(pipe[1])
    os.read(pipe[0], 1)
    os.close(pipe[0])
    result = finish(process)
    nothing_runs(project)
    assert "rror" not in result.stderr, shown(result.stderr)
    if result.returncode == 1:
        result.returncode = 0
    return result


WAYS = {kind: partial(in_environment, environment) for kind, environment in ENVIRONMENTS.items()}
WAYS |= {
    "no input": no_input,
    "modules in the current folder": modules_in_the_current_folder,
    "through a link": through_a_link,
    "into head": into_head,
}
if shutil.which("unshare") and not subprocess.run(["unshare", "-n", "true"]).returncode:
    WAYS["without a network"] = without_a_network


def test_however_it_is_called_it_does_the_same(scope):
    def one(project, name, way):
        before = output_of(project, name)
        check_words(WAYS[way](project, name), 0)
        check_output(project, scope, name, before)

    attempt("way of calling", scope, [(name, way) for name in STAGES for way in WAYS], one)


# ---- a base that nobody can trust ---------------------------------------------------------------
EVIL = "open('RAN', 'w').write('ran')\nclass Evil:\n    pass\n"
ENDLESS = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x" + (
    "{% endfor %}" * 3
)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def custom_code(base, model_type):
    (base / "evil.py").write_text(EVIL)
    auto = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    change(base / "config.json", model_type=model_type, auto_map=auto)
    change(base / "tokenizer_config.json", tokenizer_class="Evil", auto_map=auto)


def pickle(base):
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch RAN'\ntR.")


def name_of_a_tensor(base):
    weights = mx.load(str(base / "model.safetensors"))
    mx.eval(weights)
    weights["model.layers.0.x]}\rreport_to: wandb\r\x1b[31m.weight"] = mx.zeros((2, 2))
    mx.save_safetensors(str(base / "model.safetensors"), weights)


def with_template(template):
    def harm(base):
        (base / "chat_template.jinja").unlink(missing_ok=True)
        change(base / "tokenizer_config.json", chat_template=template)

    return harm


def with_config(**values):
    return lambda base: change(base / "config.json", **values)


BASES = {
    "auto_map": lambda base: custom_code(base, "gemma3_text"),
    "auto_map, unknown type": lambda base: custom_code(base, "evil"),
    "model_file": lambda base: [
        (base / "evil.py").write_text(EVIL),
        change(base / "config.json", model_file="evil.py"),
    ],
    "pickle": pickle,
    "tensor name": name_of_a_tensor,
    "model type": with_config(model_type="\x1b[31m\u202e"),
    "10^9 layers": with_config(num_hidden_layers=10**9),
    "10^9 hidden": with_config(hidden_size=10**9),
    "vocabulary 0": with_config(vocab_size=0),
    "vocabulary a text": with_config(vocab_size="x"),
    "no text_config": with_config(text_config=None),
    "quantization 3": with_config(quantization=3),
    "group 0": with_config(quantization={"bits": 4, "group_size": 0}),
    "endless template": with_template(ENDLESS),
    "template that fails": with_template("{{ raise_exception('\\x1b[31m') }}"),
    "template with code": with_template("{{ ''.__class__.__base__.__subclasses__() }}"),
    "template that is none": with_template("{{ 1 + "),
    "no template": with_template(None),
}


def test_of_a_base_that_nobody_can_trust_nothing_runs(scope):
    def one(project, name, harm):
        folder = project / (FUSED if name == "chat" else BASE)
        BASES[harm](folder)
        leader, follower = pty.openpty()
        os.write(leader, b"y\n" * 5 + b"\x04" * 5)  # should it ask
        before = output_of(project, name)
        result = go(project, name, stdin=follower)
        os.close(leader)
        os.close(follower)
        check_words(result, 0, 1)
        assert not list(project.rglob("RAN")), "its code ran"
        for yaml in project.rglob("*.yaml"):
            assert "report_to" not in yaml.read_text().replace("\r", "\n").split("\n")
        check_output(project, scope, name, before)

    harms = [harm for harm in BASES if scope.most > 4 or harm != "endless template"]  # a minute
    cases = [(name, harm) for name in STAGES if name != "export" for harm in harms]
    attempt("untrusted base", scope, cases, one)
