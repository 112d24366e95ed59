"""The guide as a whole: the four stages in a row, the layout, bash 3.2, and a README that says what the scripts do."""

import json
import os
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text("utf-8")
SHELL = [REPOSITORY / "fine_tune.sh", REPOSITORY / "fuse.sh", REPOSITORY / ".ci/run"]


@pytest.mark.parametrize("model", ["tiny-gemma-3", "tiny-gemma-3-4bit"])
def test_the_four_stages_end_to_end(project, run, model):
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
    rows = list(map(json.loads, (project / "data/for_train/v1/train.jsonl").read_bytes().splitlines()))
    assert len(rows) > 300 and all(row.keys() == {"prompt", "completion"} for row in rows)
    results = project / f"data/results/v1_{model}"
    loss = json.loads((results / "metrics.json").read_text("utf-8"))["loss"]
    assert loss["adapter"] < loss["base"] - 0.3
    assert loss["fused"] == pytest.approx(loss["adapter"], abs=0.01)
    replies = pd.read_csv(results / "generations.csv")
    assert len(replies) == 4 and replies.notna().all(axis=None)
    assert "<script" not in (results / "report.html").read_text("utf-8")


def test_another_version_has_folders_of_its_own(project, run):
    (project / "data/raw/messages_two.json").write_bytes((project / "data/raw/messages_v1.json").read_bytes())
    result = run(project, "build_train.py", env={"VERSION": "two"})
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (project / "data/for_train").iterdir()] == ["two"]
    result = run(project, "fine_tune.sh", env={"VERSION": "three"})
    assert result.stderr.strip().endswith("FIX: VERSION=three python build_train.py")
    result = run(project, "test_on_validation.py", env={"VERSION": "two"})
    assert result.returncode == 1 and "adapter-two_tiny-gemma-3" in result.stderr


def test_nothing_else_stands_at_the_top():
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= {
        "README.md",
        "README.it.md",
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
    assert [f for f in tracked.splitlines() if f.startswith(("data/", "models/")) and not f.endswith(".gitkeep")] == [
        "data/raw/messages_v1.json"
    ]


# ---- a Mac's bash is 3.2 and its tools are BSD's -------------------------------------------------------------------
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


# ---- the README --------------------------------------------------------------------------------------------------
def code_blocks():
    return re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def test_settings_and_flags_in_the_readme_exist():
    shell = "".join(path.read_text("utf-8") for path in SHELL)
    for name in set(re.findall(r"\b([A-Z][A-Z_]+)=\S+ (?:[A-Z_]+=\S+ )*\./", README)):
        assert f"\n{name}=${{{name}:-" in shell, name
    for script in ["build_train.py", "test_on_validation.py"]:
        source = (REPOSITORY / script).read_text("utf-8")
        for command in re.findall(rf"python {script}([^\n`#;&|]*)", README):
            for flag in re.findall(r"--[a-z-]+", command):
                assert flag == "--help" or f'"{flag}"' in source, f"{script} {flag}"


def test_files_and_folders_that_the_readme_runs_exist():
    for block in code_blocks():
        for name in re.findall(r"(?:^|\s)(?:\./|python )((?:tests/)?[\w/]+\.(?:sh|py))", block):
            assert (REPOSITORY / name).is_file(), name


def test_every_direct_dependency_is_pinned():
    lines = (REPOSITORY / "requirements.txt").read_text("utf-8").splitlines()
    for line in [line for line in lines if line and not line.startswith("#")]:
        assert re.match(r"[\w-]+(\[\w+\])?==[\d.]+", line), line


def test_every_link_within_the_readme_has_its_heading():
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#(.*?)\)", README))
    assert links and links <= slugs


# ---- an exported chat --------------------------------------------------------------------------------------------
def telegram(number, text, name="Ann", kind="message", **more):
    return {"id": number, "type": kind, "from": name, "text": text} | more


TELEGRAM = [
    telegram(1, "", kind="service"),
    {"id": 9, "type": "unsupported"},
    telegram(2, "ciao"),
    telegram(3, ["see ", {"type": "link", "text": "https://example.it"}, " there"], "Bob"),
    telegram(4, "", "Bob"),
    telegram(5, "news", "Bob", forwarded_from="A channel"),
    telegram(6, "da chi?", None),
]
LOG = [(7, "Ann", "ciao"), (7, "Bob", "see https://example.it there"), (7, None, "da chi?")]
ANDROID = """\
24/11/2026, 10:44 - Messages are end-to-end encrypted. Tap to learn more.
24/11/2026, 10:44 - Ann: ciao: a tutti <This message was edited>
24/11/2026, 10:45 - Bob: <Media omitted>
24/11/2026, 10:45 - Bob: null
24.11.26 klo 10.46 - Bob: due
[1] righe: 3 < 4 > 2
24/11/26 à 10:47 - Ann added Bob
"""
IPHONE = """\
\u200e[24/11/2026, 10:44:25] Family: \u200eMessages and calls are end-to-end encrypted.
[11/24/26, 10:44:25\u202fAM] Ann: ciao: a tutti \u200e<This message was edited>
\u200e[24. 11. 2026 10:45:01] Bob: \u200eimage omitted
\u200e[24/11/26, 10:45:01] Bob: report.pdf • \u200e12 pages \u200edocument omitted
[2026/11/24 上午10:46:59] Bob: due
[1] righe: 3 < 4 > 2
"""


def chat_at(path):
    return [(str(path), "Ann", "ciao: a tutti"), (str(path), "Bob", "due\n[1] righe: 3 < 4 > 2")]


def convert(project, path, export):
    """Put an export into ~/Downloads and run the block of the README that reads it."""
    file = project.parent / "Downloads" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(export, "utf-8", newline="")
    (command,) = [block for block in code_blocks() if ("hat*.txt" if path.endswith("txt") else "result.json") in block]
    env = os.environ | {"HOME": str(project.parent)}
    done = subprocess.run(["bash", "-c", command], cwd=project, env=env, capture_output=True, text=True)
    target = project / "data/raw/messages_mine.json"
    entries = json.loads(target.read_text("utf-8")) if target.exists() else []
    return done, file, [(entry["conversation"], entry["author"], entry["message"]) for entry in entries]


def test_the_readme_reads_an_export_of_telegram(project, run):
    one = "Telegram Desktop/ChatExport_2026-11-24/result.json"
    done, _, log = convert(project, one, json.dumps({"id": 7, "messages": TELEGRAM}))
    assert log == LOG and done.stdout == "3 messages by\n  -\n  Ann\n  Bob\n"
    chats = [{"id": 7, "messages": TELEGRAM}, {"id": 8, "messages": TELEGRAM[2:3]}]
    (project.parent / "Downloads" / one).unlink()
    every = "Telegram Desktop/DataExport_2026-11-24/result.json"
    assert convert(project, every, json.dumps({"chats": {"list": chats}}))[2] == [*LOG, (8, "Ann", "ciao")]
    done, _, log = convert(project, every, '{"id": 7, "messages": [')
    assert done.returncode and log == [*LOG, (8, "Ann", "ciao")]  # what was there is as it was
    assert "too few to split" in run(project, "build_train.py", env={"VERSION": "mine"}).stderr


def test_the_readme_reads_exports_of_whatsapp(project, run):
    done, android, log = convert(project, "WhatsApp Chat with Ann.txt", ANDROID)
    assert log == chat_at(android) and done.stdout == "2 messages by\n  Ann\n  Bob\n"
    _, iphone, log = convert(project, "_chat.txt", "\ufeff" + IPHONE.replace("\n", "\r\n"))
    assert sorted(log) == sorted(chat_at(android) + chat_at(iphone))
    done, _, kept = convert(project, "other chat.txt", "2026년 11월 24일 오전 10:44, Ann : ciao\n")
    assert done.returncode == 1 and "does not begin with a date" in done.stderr and kept == log
    assert "too few to split" in run(project, "build_train.py", env={"VERSION": "mine"}).stderr
