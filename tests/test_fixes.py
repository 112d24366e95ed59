"""Every FIX line can be pasted: it runs, and nothing of a person's is lost.

pytest -m faults -n auto tests/test_fixes.py     # each in a project of its own: minutes
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import contents, cut_off

pytestmark = [pytest.mark.slow, pytest.mark.faults]
BASE = "models/base/tiny-gemma-3"
DATA = "data/for_train/sample"
ADAPTER = "models/adapters/adapter-sample_tiny-gemma-3"
BUILD = "python build_train.py --valid-rows 6"
TRAIN = "./fine_tune.sh"
TEST = "python test_on_validation.py --replies 0"


def shell(project, commands):
    """Run a line as a person pastes it; return what it said, both streams, and its exit code."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    names = {"VERSION": "sample", "MODEL": "tiny-gemma-3", "ITERS": "2", "EVAL_EVERY": "1"}
    done = subprocess.run(
        ["bash", "-c", commands],
        cwd=project,
        env=os.environ | names | {"PATH": path, "RANK": "4"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert "Traceback" not in done.stdout, done.stdout[-2000:]
    return done.returncode, done.stdout


@pytest.fixture(scope="session")
def trained(template, tmp_path_factory):
    """A project with data and an adapter."""
    project = tmp_path_factory.mktemp("trained") / "my project"
    shutil.copytree(template, project)
    code, said = shell(project, f"{BUILD} && {TRAIN}")
    assert code == 0, said
    return project


def remove(name):
    return lambda project: shutil.rmtree(project / name)


def write(name, text):
    return lambda project: (project / name).write_text(text)


def damage(name):
    return lambda project: cut_off(project / name)


def interrupt(project):
    """Leave what a training leaves that was killed after its first checkpoint."""
    work = project / "models/adapters/.adapter-sample_tiny-gemma-3.partial"
    (work / "data").mkdir(parents=True)
    (work / "run").mkdir()
    adapter = project / ADAPTER
    shutil.copy(adapter / "adapters.safetensors", work / "0000001.safetensors")
    shutil.copy(adapter / "adapter_config.json", work / "run")
    for name in "settings", "training.log", "lora_config.yaml":
        shutil.copy(adapter / name, work)
    shutil.copy(project / DATA / "train.jsonl", work / "data")
    shutil.copy(project / DATA / "valid.jsonl", work)
    (work / "train_losses.csv").write_text("1,7.5,100\n")


def nothing(project):
    pass


# name: what is broken, the command that then fails, the line that mends it
CASES = {
    "no data": (remove(DATA), TRAIN, f"VERSION=sample .*{BUILD.split(' --')[0]}"),
    "no adapter": (remove(ADAPTER), "./fuse.sh", "./fine_tune.sh"),
    "no adapter to test": (remove(ADAPTER), TEST, "./fine_tune.sh"),
    "no adapter to talk to": (remove(ADAPTER), "python models/chat.py", "./fine_tune.sh"),
    "no base": (remove(BASE), TRAIN, "python tests/tiny_base.py"),
    "a download that broke off": (damage(f"{BASE}/model.safetensors"), TRAIN, "tiny_base.py"),
    "a tokenizer cut off": (damage(f"{BASE}/tokenizer.json"), TRAIN, "tiny_base.py"),
    "an adapter cut off": (damage(f"{ADAPTER}/adapters.safetensors"), "./fuse.sh", "fine_tune.sh"),
    "its settings damaged": (write(f"{ADAPTER}/adapter_config.json", "{"), "./fuse.sh", TRAIN),
    "a row damaged": (write(f"{DATA}/train.jsonl", '{"prompt": 1}\n'), TRAIN, "build_train.py"),
    "a validation row": (write(f"{DATA}/valid.jsonl", "nothing\n"), TEST, "build_train.py"),
    "settings of the data": (write(f"{DATA}/settings.json", "["), "python models/chat.py", "build"),
    "10,000": (nothing, f"ITERS=10,000 {TRAIN}", "ITERS=auto"),
    "too many rows": (nothing, f"BATCH_SIZE=1000 {TRAIN}", "BATCH_SIZE="),
    "too long": (nothing, f"MAX_SEQ_LENGTH=64 {TRAIN}", "MAX_SEQ_LENGTH="),
    "too many layers": (nothing, f"NUM_LAYERS=99 {TRAIN}", "NUM_LAYERS=-1"),
    "NaN": (nothing, f"ITERS=9 SCALE=1e10 LEARNING_RATE=1e38 {TRAIN}", "LEARNING_RATE="),
    "interrupted": (interrupt, TRAIN, "RESUME=1"),
    "bits": (nothing, "FUSED_BITS=7 ./fuse.sh", "FUSED_BITS=auto"),
    "an author": (nothing, "python build_train.py --only-author x", None),
    "a rule": (nothing, "python build_train.py --off liink", "--help"),
    "a path as name": (nothing, f"VERSION=data/raw {BUILD}", "export VERSION=v1"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_an_error_proposes_can_be_pasted_and_mends_it(trained, tmp_path, name):
    break_it, command, expected = CASES[name]
    broken = Path(shutil.copytree(trained, tmp_path / "broken"))
    break_it(broken)
    own = {path: data for path, data in contents(broken).items() if path.startswith("data/raw/")}
    code, said = shell(broken, command)
    assert code in (1, 2), said
    assert re.search("^error: ", said, re.MULTILINE), said
    fixes = re.findall("^FIX: (.*)$", said, re.MULTILINE)
    assert fixes and (expected is None or any(re.search(expected, fix) for fix in fixes)), said
    for number, fix in enumerate(fixes):
        if fix.startswith("#") or "hf download" in fix:  # a remark; no network
            continue
        project = Path(shutil.copytree(broken, tmp_path / str(number)))
        code, said = shell(project, fix)
        assert code == 0, f"{fix}\n{said}"
        assert own.items() <= contents(project).items()


def test_the_adapter_of_before_is_kept_whichever_fix_is_pasted(trained, tmp_path):
    project = Path(shutil.copytree(trained, tmp_path / "project"))
    before = (project / ADAPTER / "adapters.safetensors").read_bytes()
    code, said = shell(project, "SEED=1 ./fine_tune.sh")
    assert code == 0 and "replaced    an adapter with validation loss " in said, said
    kept = project / f"{ADAPTER}.before/adapters.safetensors"
    assert kept.read_bytes() == before
    assert json.loads((project / ADAPTER / "adapter_config.json").read_text())["seed"] == 1
