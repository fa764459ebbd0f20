"""Sampling and scoring of an evaluation, its tables, and what `python eval.py` prints, against hand-made rows."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import report
import toy
from data import load_model, load_problems
from gsrm import exact_judge, structure_rewards

ROOT = Path(evaluation.__file__).parent


def row(problem, correct, structure=None, true=None, stop="stop", length=10, temperature=1.0):
    return {"id": problem, "correct": correct, "structure": structure, "true_structure": true, "stop": stop, "length": length, "temperature": temperature}


def test_summary_treats_problems_as_clusters():
    rows = [row("a", True), row("a", True), row("a", False), row("a", True), row("b", False), row("b", False), row("b", False), row("b", False)]
    s = report.summary(rows)
    assert s["mean@4"][0] == pytest.approx((0.75 + 0) / 2)
    assert s["mean@4"][1:] == (0.0, 1.0)                                   # two problems say next to nothing; cut at what a share can be
    lengths = report.summary([row(name, True, length=n) for name, n in (("a", 400), ("a", 420), ("b", 430), ("b", 440))])["length"]
    half = 12.706 * (25 / math.sqrt(2)) / math.sqrt(2)                     # t(0.975, 1) * sd / sqrt(N)
    assert lengths == pytest.approx((422.5, 422.5 - half, 422.5 + half), rel=1e-3)
    assert s["pass@2"][0] == pytest.approx((1 - 0 / 6) / 2) and s["pass@4"][0] == 0.5
    assert s["truncated"][0] == 0 and s["length"][0] == 10 and s["ungraded"][0] == 0


def test_what_could_not_be_graded_or_scored_is_left_out_and_counted():
    s = report.summary([row("a", True, 0.5), row("a", None, None), row("b", False, 1.0), row("b", False, None)])
    assert s["mean@2"][0] == pytest.approx((1.0 + 0.0) / 2) and s["structure"][0] == pytest.approx(0.75) and s["ungraded"][0] == 1
    assert s["pass@2"][0] == 0.0                                           # only b has all its samples graded


def test_correlation_closed_form():
    assert report.correlation([row("a", 1, x, 2 * x + 1) for x in (0.0, 0.2, 0.9)]) == pytest.approx(1.0)
    assert report.correlation([row("a", 1, x, -x) for x in (0.0, 0.2, 0.9)] + [row("a", 1, None, 5.0)]) == pytest.approx(-1.0)
    assert math.isnan(report.correlation([row("a", 1, 0.5, x) for x in (0.0, 1.0)]))


def test_true_structure_is_the_structure_reward_of_the_true_steps():
    problems = load_problems("toy", "test")[:6]
    texts = [p.teachers[-1] + "</think>" for p in problems[:5]] + ["</think>"]
    assert evaluation.true_structure(toy.read, problems, texts) == [1.0] * 5 + [0.0] and evaluation.true_structure(None, problems, texts) == [None] * 6
    cut = [t.split("\n")[0] for t in texts[:5]]
    want = [s.value for s in structure_rewards([toy.read(t) for t in cut], [[toy.read(t) for t in p.teachers] for p in problems[:5]], exact_judge)]
    assert evaluation.true_structure(toy.read, problems[:5], [c + "</think>" for c in cut]) == want and all(0 < v < 0.2 for v in want)


def test_rows_say_what_was_sampled_and_can_be_drawn_again():
    model, tok = load_model("toy/student")
    problems = load_problems("toy", "test")[:3]
    gsrm = evaluation.load_gsrm("toy:read", "", None, "cpu")
    rows = evaluation.evaluate(model, tok, problems, 2, 1.0, 1.0, 60, 7, None, gsrm, toy.read)
    assert [(r["id"], r["sample"]) for r in rows] == [(p.id, k) for p in problems for k in (0, 1)] and all(r["length"] <= 60 for r in rows)
    assert rows == evaluation.evaluate(model, tok, problems, 2, 1.0, 1.0, 60, 7, None, gsrm, toy.read)
    assert all(r["structure"] == r["true_structure"] for r in rows)        # the rule is the truth
    greedy = evaluation.evaluate(model, tok, problems, 8, 0.0, 1.0, 60)
    assert len(greedy) == 3 and all(r["structure"] is None for r in greedy)


def test_show_marks_each_step_and_where_it_left():
    text = report.show({"problem": "P?", "text": " trace</think>4", "answer": "4", "correct": True, "structure": 0.375, "true_structure": 0.375, "left_at": 2,
                        "steps": [["m1", "q1", "a1", 1.0], ["m2", "q2", "a2", 0.5], ["m3", "q3", "a3", 0.0]]})
    lines = [line.split() for line in text.splitlines() if line.startswith("  ") and "reward" not in line]
    assert [line[0] for line in lines] == ["+", "~", "x"] and "left the teacher's branch" in text.splitlines()[-2]


def test_a_wrong_function_name_says_so():
    for name in ("toy:nothing", "nowhere:read", "toy"):
        with pytest.raises(ValueError, match="module:function"):
            evaluation.load_function(name)


def test_a_reward_model_behind_an_endpoint():
    pytest.importorskip("openai", reason="openai is not installed")
    with pytest.raises(ValueError, match="which model.*#"):
        evaluation.load_gsrm("http://127.0.0.1:9/v1", "", None, "cpu")
    gsrm = evaluation.load_gsrm("http://127.0.0.1:9/v1#m", "http://127.0.0.1:9/v1#j", None, "cpu")
    gsrm.generate.__self__.retries = 0                                      # nobody listens on the discard port
    assert [s.value for s in gsrm(["p"], ["a b c d"], [["a b c d"]])] == [None] and gsrm.generate.__self__.model == "m"


def run(*command):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_commands(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = run("eval.py", "--model", "toy/student", "--data", "toy", "--k", "2", "--limit", "4", "--temperature", "1", "--max_new_tokens", "60", "--out", str(out))
    assert done.returncode == 0 and "mean@2" in done.stdout and len(out.read_text().splitlines()) == 8, done.stderr[-1000:]
    assert {"id", "seed", "text", "stop", "correct", "answer"} <= set(json.loads(out.read_text().splitlines()[0]))
    bad = run("eval.py", "--model", "toy/student", "--data", "nowhere.jsonl")
    assert bad.returncode == 1 and "error: no problems at nowhere.jsonl" in bad.stderr and "Traceback" not in bad.stderr


def test_plot_draws_the_curves_of_several_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps({"step": i, "rewards/outcome/mean": i / 30, "rewards/structure/mean": 0.5}) + "\n" for i in range(30)))
    report.plot([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "c.png").stat().st_size > 10_000
