"""The study's driver: its command lines are ones that the other files take, and its tables are those of its results file."""
import json
import math
import shlex
from pathlib import Path

import pytest
from transformers import HfArgumentParser

import eval as evaluation
import sft
import study
import train


def rows(regime="sparse"):
    """Three seeds each of GRPO and RLKD with known means."""
    figures = {"grpo": (0.10, 0.12, 0.11), "rlkd": (0.50, 0.62, 0.53)}
    return [{"regime": regime, "arm": arm, "seed": seed, **dict.fromkeys(study.METRICS, value), "length": 100 * value, "seconds": 1, "commands": []}
            for arm, values in figures.items() for seed, value in enumerate(values)]


def test_every_command_is_one_that_the_files_take():
    for data, made_by, budget, room in study.REGIMES.values():
        fill = dict(data="toy", budget=budget, room=room, seed=7, out="out/x", model="toy/student", temperature=1)
        for template in [*{t for templates in study.ARMS.values() for t in templates}, study.EVAL]:
            python, file, *flags = shlex.split(template.format(**fill))
            assert python == "python" and "{" not in template.format(**fill)
            parse = {"train.py": train.parse_config, "sft.py": lambda f: HfArgumentParser(sft.Config).parse_args_into_dataclasses(f)[0],
                     "eval.py": lambda f: HfArgumentParser(evaluation.Config).parse_args_into_dataclasses(f)[0]}[file]
            assert parse(flags).seed == 7
        assert data == "toy" or all(f"--out {data}/" in command for command in made_by)
    assert set(study.QUICK["arms"]) <= set(study.ARMS) and len(study.QUICK["seeds"]) == 3


def test_the_tables_are_those_of_the_results_file(tmp_path):
    file = tmp_path / "study.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()[::-1]))
    text = study.report(file)
    values = (0.50, 0.62, 0.53)
    mean, half = sum(values) / 3, 4.302653 * math.sqrt(sum((v - 0.55) ** 2 for v in values) / 2) / math.sqrt(3)
    line = next(line for line in text.splitlines() if line.startswith("| rlkd"))
    assert line.split(" | ")[1] == "3" and line.split(" | ")[2] == f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]" and line.endswith(f"{100 * mean:.0f} [{100 * (mean - half):.0f}, {100 * (mean + half):.0f}] |")
    gains = (0.40, 0.50, 0.42)                                             # paired by seed, so narrower than the difference of the two intervals
    mean, half = sum(gains) / 3, 4.302653 * math.sqrt(sum((g - 0.44) ** 2 for g in gains) / 2) / math.sqrt(3)
    assert f"rlkd - grpo, paired by seed: sampled accuracy {mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]" in text
    assert "dense" not in text and text == study.report(file)


def test_a_finished_run_is_not_run_again_and_a_failed_command_says_why(tmp_path, monkeypatch, capsys):
    file, ran = tmp_path / "study.jsonl", []
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()[:5]))
    monkeypatch.setattr(study, "one", lambda regime, arm, seed, out, threads: ran.append((regime, arm, seed)) or rows()[5])
    monkeypatch.setattr("sys.argv", ["study.py", "--arms", "grpo", "rlkd", "--regimes", "sparse", "--seeds", "0", "1", "2", "--results", str(file), "--out", str(tmp_path / "out"), "--jobs", "1"])
    study.main()
    assert ran == [("sparse", "rlkd", 2)] and len(file.read_text().splitlines()) == 6 and "| rlkd | 3 |" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="(?s)eval.py --model nowhere.*ended with status"):
        study.run("python eval.py --model nowhere --data nowhere", 1, Path(tmp_path) / "log.txt")


def test_figures_of_one_student():
    sampled = [{"id": i, "correct": c, "structure": s, "true_structure": t, "length": 10 * i, "stop": "stop"} for i, c, s, t in
               [(1, True, 0.5, 0.5), (1, False, 0.1, 0.2), (2, False, 0.0, 0.0), (2, False, 1.0, 0.9)]]
    greedy = [{"id": i, "correct": i == 2, "structure": None, "true_structure": None, "length": 1, "stop": "length"} for i in (1, 2)]
    got = study.figures(sampled, greedy)
    assert got["greedy"] == 0.5 and got["sampled"] == 0.25 and got["pass@2"] == 0.5 and got["structure"] == 0.4 and got["length"] == 15 and got["r"] > 0.98
