"""The guide as a whole: the stages in a row, the layout, bash 3.2, and READMEs that are true."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHELL = [REPOSITORY / "fine_tune.sh", REPOSITORY / "fuse.sh", REPOSITORY / ".ci/run"]
PYTHON = [
    "data/raw/from_export.py",
    "build_train.py",
    "test_on_validation.py",
    "models/chat.py",
]
ENGLISH, ITALIAN = REPOSITORY / "README.md", REPOSITORY / ".github/README.it.md"
GUIDES = pytest.mark.parametrize("guide", [ENGLISH, ITALIAN], ids=["English", "Italian"])


@pytest.mark.slow
def test_the_four_stages_end_to_end_from_a_quantized_base(project, run):
    model = "tiny-gemma-3-4bit"
    env = {"MODEL": model, "ITERS": "20", "EVAL_EVERY": "10", "LEARNING_RATE": "1e-3"}
    for script, *args in [
        ("build_train.py", "--valid-rows", "16"),
        ("fine_tune.sh",),
        ("fuse.sh",),
        ("test_on_validation.py", "--replies", "4", "--max-tokens", "8"),
    ]:
        result = run(project, script, *args, env=env)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Traceback" not in result.stdout + result.stderr
    results = project / f"data/results/sample_{model}"
    loss = json.loads((results / "metrics.json").read_text("utf-8"))["loss"]
    assert loss["adapter"] < loss["base"] - 0.3
    assert loss["fused"] == pytest.approx(loss["adapter"], abs=0.01)
    losses = pd.read_csv(project / f"models/adapters/adapter-sample_{model}/losses.csv")
    assert loss["adapter"] == pytest.approx(losses["val_loss"].min(), abs=0.01)
    replies = pd.read_csv(results / "generations.csv")
    assert len(replies) == 4 and replies[["line", "prompt", "reference"]].notna().all(axis=None)
    assert "<script" not in (results / "report.html").read_text("utf-8")


def test_another_version_has_folders_of_its_own(project, run):
    sample = project / "data/raw/messages_sample.json"
    (project / "data/raw/messages_two.json").write_bytes(sample.read_bytes())
    result = run(project, "build_train.py", env={"VERSION": "two"})
    assert result.returncode == 0, result.stderr
    built = [path.name for path in (project / "data/for_train").glob("[!.]*")]
    assert built == ["two"]
    result = run(project, "fine_tune.sh", env={"VERSION": "three"})
    assert result.returncode == 1 and "VERSION=three" in result.stderr
    result = run(project, "test_on_validation.py", env={"VERSION": "two"})
    assert result.returncode == 1 and "adapter-two_tiny-gemma-3" in result.stderr


def test_nothing_else_stands_at_the_top():
    command = ["git", "ls-files"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    files = done.stdout.splitlines()
    top = {name.split("/")[0] for name in files if not name.startswith(".")}
    assert top <= {
        "README.md",
        "LICENSE",
        "requirements.txt",
        "build_train.py",
        "fine_tune.sh",
        "fuse.sh",
        "test_on_validation.py",
        "data",
        "models",
        "tests",
    }
    data = [name for name in files if name.startswith(("data/", "models/"))]
    others = [name for name in data if not name.endswith((".py", ".gitkeep", ".html"))]
    assert others == ["data/raw/messages_sample.json", "data/raw/readers/phrases.json"]


# ---- a Mac's bash is 3.2 and its tools are BSD's -------------------------------------------------
NOT_ON_A_MAC = {
    "associative or global array": r"\bdeclare\s+-[a-zA-Z]*[Ag]",
    "nameref": r"\b(local|declare)\s+-[a-zA-Z]*n\b",
    "mapfile": r"\b(mapfile|readarray)\b",
    "case conversion": r"\$\{[^}]*(,,?|\^\^?)[^}]*\}",
    "transformation": r"\$\{\w+@[A-Za-z]\}",
    "negative index or length": r"\$\{\w+(\[-\d+\]|:[^}:]*:\s*-\d+)\}",
    "append both": r"&>>",
    "pipe both": r"\|&",
    "fall through": r";;?&",
    "test of a variable": r"\[\[?\s+-v\s",
    "time format": r"printf\s+['\"]?%\(",
    "wait for any": r"\bwait\s+-n\b",
    "coprocess": r"\bcoproc\b",
    "descriptor variable": r"\bexec\s+\{",
    "read with a default": r"\bread\s+-[a-zA-Z]*i\b",
    "globstar": r"\bglobstar\b",
    "EPOCHSECONDS or BASHPID": r"\$\{?(EPOCH|BASHPID)",
    "empty array under set -u": r"(?<!\+)\"\$\{(?!PIPESTATUS)\w+\[@\]\}\"",
    "hidden failure": r"\blocal\s+\w+=\"?\$\(",
    "sed -i": r"\bsed\s+(-\w+\s+)*-i",
    "grep -P": r"\bgrep\s+-[a-zA-Z]*P",
    "readlink -f": r"\breadlink\s+-f",
    "date -d": r"\bdate\s+(-d|--date)",
    "GNU's alone": r"\b(timeout|nproc|sha256sum|md5sum|tac|shuf|realpath|setsid)\s",
    "stat -c": r"\bstat\s+(-c|--format)",
    "sort -V": r"\bsort\s+-[a-zA-Z]*V",
    "head of all but": r"\bhead\s+-n\s+-",
    "mktemp without -d": r"\bmktemp\b(?!\s+-d)",
}


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_no_construct_that_fails_on_a_mac(script):
    code = [
        (n, line)
        for n, line in enumerate(script.read_text("utf-8").splitlines(), 1)
        if not line.lstrip().startswith("#")
    ]
    found = [
        f"{script.name}:{n}: {what}: {line}"
        for n, line in code
        for what, bad in NOT_ON_A_MAC.items()
        if re.search(bad, line)
    ]
    found = [line for line in found if '[@]+"${' not in line]  # the form that bash 3.2 wants
    assert found == []


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("mapfile", "mapfile -t lines <file"),
        ("case conversion", 'echo "${name,,}"'),
        ("negative index or length", 'echo "${names[-1]}"'),
        ("empty array under set -u", 'command "${arguments[@]}"'),
        ("hidden failure", "local x=$(false)"),
        ("sed -i", "sed -i s/a/b/ file"),
        ("pipe both", "command |& tee log"),
        ("GNU's alone", "timeout 5 command"),
    ],
)
def test_the_check_for_a_mac_finds_what_it_looks_for(what, line):
    assert re.search(NOT_ON_A_MAC[what], line)


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    subprocess.run(["shellcheck", script], check=True)


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_scripts_are_formatted(script):
    subprocess.run(["shfmt", "-d", "-i", "2", "-ci", script], check=True)


# ---- the READMEs ---------------------------------------------------------------------------------
BLOCK = re.compile(r"(?:<!-- ([^\n]*?) -->\n)?```sh\n(.*?)```", re.DOTALL)


def blocks(guide):
    """Return [(the comment before it, commands), …] of a guide's shell blocks."""
    return BLOCK.findall(guide.read_text("utf-8"))


def tables(guide):
    """Return [[cell, …], …]: the rows of all tables."""
    lines = guide.read_text("utf-8").splitlines()
    return [line.strip("|").split("|") for line in lines if line.startswith("|")]


def export_of_whatsapp(path):
    """Write a .zip as an iPhone makes it: 300 messages of two people, over five days."""
    words = ["sea", "wind", "train", "bread", "paper", "coffee", "garden", "window", "music"]
    lines = []
    for n in range(300):
        said = " ".join(
            words[(n * step + step) % len(words)] for step in (1, 5, 7, 11)[: 2 + n % 3]
        )
        day, hour, minute = 1 + n // 60, 10 + n % 60 // 10, n % 60
        author = ["Ann Lee", "Bob"][n * n % 3 % 2]
        lines.append(f"[{day:02}/11/26, {hour}:{minute:02}:00] {author}: {said} {n}\n")
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("_chat.txt", "".join(lines))


@pytest.mark.slow
def test_every_command_that_needs_no_network_runs_in_order(project, tmp_path):
    export_of_whatsapp(tmp_path / "home/Downloads/WhatsApp Chat with Ann.zip")
    commands = [text for comment, text in blocks(ENGLISH) if not comment]
    assert len(commands) >= 5
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {name: value for name, value in os.environ.items() if name != "VERSION"}
    env |= {"HOME": str(tmp_path / "home"), "PATH": path, "MODEL": "tiny-gemma-3"}
    env |= {"ITERS": "20", "EVAL_EVERY": "10"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        cwd=project,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stdout + done.stderr
    assert "--only-author" in done.stdout
    assert (project / "models/fused/fused-v1_tiny-gemma-3/config.json").exists()


def test_both_guides_have_the_same_commands_and_zsh_can_read_them():
    assert blocks(ENGLISH) == blocks(ITALIAN)
    assert "#" not in "".join(commands for _, commands in blocks(ENGLISH))  # no comment, if typed


def test_both_guides_have_the_same_figures_in_their_tables():
    def figures(guide):  # 3,450 and 3.87 are 3.450 and 3,87 in Italian
        return [
            re.findall(r"\d+", re.sub(r"(?<=\d)[.,](?=\d)", "", " ".join(row)))
            for row in tables(guide)
        ]

    assert figures(ENGLISH) == figures(ITALIAN)


@GUIDES
def test_settings_and_flags_that_a_guide_names_exist(guide):
    text = guide.read_text("utf-8")
    shell = "".join(path.read_text("utf-8") for path in SHELL)
    for name in set(re.findall(r"\b([A-Z][A-Z_]{3,})=", text)) - {"VERSION", "LD_PRELOAD"}:
        assert re.search(rf"^{name}=", shell, re.MULTILINE) or name == "HF_HUB_OFFLINE", name
    for script in PYTHON:
        source = (REPOSITORY / script).read_text("utf-8")
        for command in re.findall(rf"python {script}([^\n`#;&|]*)", text):
            for flag in re.findall(r"--[a-z-]+", command):
                assert f'"{flag}"' in source, f"{script} {flag}"


@GUIDES
def test_files_that_a_guide_runs_exist(guide):
    for _, commands in blocks(guide):
        for name in re.findall(r"(?:^|\s)(?:\./|python )((?:\w+/)*\w+\.(?:sh|py))", commands):
            assert (REPOSITORY / name).is_file(), name


def headings(path):
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@GUIDES
def test_every_link_within_the_project_leads_somewhere(guide):
    links = re.findall(r"\]\((?!http)(.*?)\)", guide.read_text("utf-8"))
    assert len(links) > 5
    for link in links:
        name, _, heading = link.partition("#")
        path = guide.parent / name if name else guide
        assert path.exists(), link
        assert not heading or heading in headings(path), link


def test_the_guide_is_short():
    assert len(ENGLISH.read_text("utf-8").splitlines()) <= 220


def test_every_direct_dependency_is_pinned():
    lines = (REPOSITORY / "requirements.txt").read_text("utf-8").splitlines()
    for line in [line for line in lines if line and not line.startswith("#")]:
        assert re.match(r"[\w-]+(\[\w+\])?==[\d.]+", line), line
