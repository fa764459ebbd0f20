"""Every command of the README runs: extracted from the file, in its order, in one folder, long ones with small settings. What needs models or machines that a test has not
is refused for just that reason, so its flags at least are ones that the files take; tests/test_pipeline.py runs those on tiny checkpoints."""
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = [command.strip() for block in BLOCKS for line in block.splitlines()
            for command in re.split(r"\s+# |\s\s+# ", line)[0].split(" && ") if re.match(r"python |torchrun |pip ", line)]
SMALL = "--steps 2 --save_every 1 --eval_problems 2 --eval_k 2 --problems_per_step 2 --group_size 2"
MADE_SMALL = {   # command, up to where it is told apart -> what is put behind it, or "old -> new"
    "python train.py --w_structure 0": SMALL, "python train.py --resume auto": SMALL, "python train.py --help": "", "python train.py --teacher": SMALL,
    "python train.py --structure_reward": SMALL, "python sft.py --model toy/student": "--limit 8 --epochs 1", "python eval.py --model out/toy/model": "--limit 2 --k 2",
    "python eval.py rescore": "FILE.jsonl -> out/toy/eval_after.jsonl", "python eval.py compare out/toy": "", "python eval.py show": "--step 40 -> --step 1",
    "python eval.py show out/toy/eval_after": "--problem 11-78-2-41 --sample 5 -> ", "python eval.py plot": "", "python gsrm.py eval toy": "--limit 32 -> --limit 2",
    "python checkpoint.py": "step_000200 -> step_000002", "torchrun --nproc_per_node 2": "--steps 5 -> " + SMALL,
    "python bench.py rollout": "--model toy --rows 8 --max_new_tokens 9 --rounds 1", "python study.py report": "", "python train.py": SMALL,
}
MISSING = {   # these end with one line that names what is not here
    "python data.py convert": r"data/math500.jsonl|hub|datasets", "python gsrm.py annotate": r"data/openr1.jsonl",
    "python sft.py --preset paper-gsrm": r"Qwen/Qwen2.5-1.5B-Instruct|data/pairs.jsonl", "python gsrm.py eval data": r"data/openr1.jsonl|out/gsrm",
    "python train.py --preset": r"data/openr1.jsonl|Qwen/|out/gsrm", "torchrun --nproc_per_node 8": r"data/openr1.jsonl|deepseek|out/gsrm",
    "python eval.py --model": r"data/math500.jsonl|Qwen|out/rlkd", "python eval.py compare out/before": r"out/before.jsonl",
}
ELSEWHERE = {"pip install": "the test run itself begins with it", "python -m pytest": "this is it",
             "python toy.py": "half an hour; tests/test_toy.py trains its parts for a few steps",
             "python study.py --quick": "half an hour; tests/test_study.py", "torchrun --nnodes 2": "wants two machines"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkout without its out/: files by links, so that what a command writes stays here."""
    place = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name not in ("out", "README.md", "docs") and not path.name.startswith("."):
            (place / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", place / "docs")
    shutil.copy(ROOT / "README.md", place)
    (place / "out").mkdir()
    return place


def rule(command, rules):
    """The longest beginning of `command` that the rules know, "" where there is none."""
    return max((start for start in rules if command.startswith(start)), key=len, default="")


def test_the_readme_has_commands_and_every_one_has_a_rule():
    assert len(COMMANDS) > 25 and [c for c in COMMANDS if c.startswith("pip install -r requirements.txt")]
    assert not [c for c in COMMANDS if not any(rule(c, rules) for rules in (MADE_SMALL, MISSING, ELSEWHERE))]


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=lambda n: COMMANDS[n][:60].replace(" ", "_"))
def test_a_command_of_the_readme(number, folder, monkeypatch, capsys):
    command = COMMANDS[number]
    start, rules = max(((rule(command, rules), rules) for rules in (MADE_SMALL, MISSING, ELSEWHERE)), key=lambda found: len(found[0]))
    if rules is ELSEWHERE:
        pytest.skip(ELSEWHERE[start])
    if rules is MADE_SMALL:
        old, _, new = MADE_SMALL[start].rpartition(" -> ")
        command = command.replace(old, new) if old else f"{command} {new}"
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)          # it has read the variable already
    words = shlex.split(command.replace("torchrun --nproc_per_node 8", "python"))
    if words[0] == "torchrun":
        words[0:1] = [sys.executable, "-m", "torch.distributed.run", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
        subprocess.run(words, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        return
    monkeypatch.setattr(sys, "argv", words[1:])
    status, text = 0, ""
    try:
        runpy.run_path(words[1], run_name="__main__")
    except SystemExit as leaving:
        status, text = (1, leaving.code) if isinstance(leaving.code, str) else (leaving.code or 0, "")
    text += "".join(capsys.readouterr())
    assert bool(status) == (rules is MISSING) and "unrecognized" not in text, text[-3000:]
    assert rules is MADE_SMALL or re.search(MISSING[start], text), text[-3000:]


DIFFS = re.findall(r"^```diff\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(DIFFS)), ids=lambda n: DIFFS[n].split("\n")[0][4:])
def test_a_diff_of_the_readme_fits_its_files(number):
    for name, body in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", DIFFS[number], re.DOTALL | re.MULTILINE):
        text = (ROOT / name).read_text(encoding="utf-8")
        for hunk in body.split("@@\n"):
            lines = hunk.splitlines()
            old, new = ("\n".join(line[1:] for line in lines if not line.startswith(skip)) for skip in "+-")
            assert text.count(old) == 1, f"{name}: {old}"
            text = text.replace(old, new)
        compile(text, name, "exec")


def test_lengths_of_the_files_in_the_readme():
    stated = dict(re.findall(r"^\| \[([\w.]+\.py)\]\(\1\) \| (\d+) \|", README, re.MULTILINE))
    assert {path.name for path in ROOT.glob("*.py")} == set(stated)
    assert {name: int(count) for name, count in stated.items()} == {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in stated}
