"""Figures, structure report, paired comparison, pictures and printed completions of report.py and plots.py, against hand-made rows and naive twins.
`python -m pytest tests/test_report.py`"""
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from tiny import row

import eval as evaluation
import generations
import plots
import report
import toy
from data import load_model, load_problems, split_completion, write_jsonl
from gsrm import Step, exact_judge, structure_rewards

# ------------------------------------------------------------------------------------------------ figures

def test_groups_that_could_not_be_scored_are_not_ones_without_a_spread():
    """Four groups of two: equal rewards, unequal ones, one row scored, none: of the two that can be compared one has no spread."""
    table = [({"structure": structure}, advantage) for structure, advantage in ((1, 0.0), (1, 0.0), (0, -1.0), (1, 1.0), (1, 0.0), (None, 0.0), (None, 0.0), (None, 0.0))]
    rows = [row("p", None) | {"rewards": rewards, "advantage": advantage} for rewards, advantage in table]
    assert report.log_row(1, rows, {"structure": 1.0}, 2)["frac_reward_zero_std"] == 0.5
    assert math.isnan(report.log_row(1, rows[4:], {"structure": 1.0}, 2)["frac_reward_zero_std"])                  # nothing to be compared: not known, not 0


def test_the_interval_of_a_negative_measure_holds_its_mean():
    mean, low, high, _ = report.interval(np.array([-0.9, -0.7, -0.5]))
    assert mean == pytest.approx(-0.7) and low < mean < high < 0 and report.interval(np.array([0.0, 0.0, 0.3])).low == 0


def test_pass_and_majority_are_means_over_subsets():
    """k = 6: sizes 1, 2, 4 and 6 itself; against every subset of the samples."""
    answers = {"a": ["1", "1", "2", "2", "2", None], "b": ["3", "1", "1", "1", "3", "4"]}
    s = report.summary([row(p, a == "1", a, i) for p, given in answers.items() for i, a in enumerate(given)])
    assert [m for m in s if "@" in m] == ["mean@6", "pass@1", "pass@2", "pass@4", "pass@6", "maj@2", "maj@4", "maj@6"]

    def majority(subset):
        counts = {a: subset.count(a) for a in subset if a}
        return np.mean([a == "1" for a in counts if counts[a] == max(counts.values())]) if counts else 0.0
    for k in (2, 4, 6):
        subsets = [list(itertools.combinations(given, k)) for given in answers.values()]
        assert s[f"pass@{k}"].mean == pytest.approx(np.mean([np.mean(["1" in sub for sub in of]) for of in subsets]))
        assert s[f"maj@{k}"].mean == pytest.approx(np.mean([np.mean([majority(list(sub)) for sub in of]) for of in subsets]))
    assert [s["pass@1"].mean, s["mean@6"].mean] == pytest.approx([(2 / 6 + 3 / 6) / 2] * 2)
    assert s["mean@6"].error == pytest.approx(np.std([2 / 6, 3 / 6], ddof=1) / math.sqrt(2))


def test_the_table_says_error_and_interval(capsys):
    report.print_table({"m": {"mean@2": report.Interval(0.5, 0.25, 0.75, 0.125), "length": report.Interval(123.4, 100.0, 150.0, 12.0),
                              "ungraded": report.Interval(3, 3, 3)}}, errors=True)
    lines = capsys.readouterr().out.splitlines()
    assert "0.500 +- 0.125  [0.250, 0.750]" in lines[1] and "123.4 +- 12.0  [100.0, 150.0]" in lines[2]
    assert lines[3].split() == ["ungraded", "3"] and lines[0].startswith("mean +- std. error [95 %]")
    report.print_table({"m": {"r(structure, true_structure)": report.Interval(math.nan, math.nan, math.nan)}})
    assert capsys.readouterr().out.splitlines()[1].split() == ["r(structure,", "true_structure)", "nan"]


def test_one_problem_has_figures_and_no_intervals(capsys):
    scored_row = row("p", True, structure=0.5, steps=[["m", "q", "a", 1.0], ["m", "q", "a", 0.5]], choices=[True, False])
    for errors in (False, True):
        report.print_table({"m": report.summary([scored_row, scored_row | {"correct": False}])}, errors=errors)
    report.print_structure([scored_row])
    text = capsys.readouterr().out
    assert re.search(r"^mean@2 +0\.50 *$", text, re.MULTILINE) and re.search(r"^mean@2 +0\.500 *$", text, re.MULTILINE)
    assert re.search(r"^choice accuracy +0\.500$", text, re.MULTILINE) and "inf" not in text and "+-" not in text.replace("mean +-", "")

# ------------------------------------------------------------------------------------------------ structure

TEACHER = [Step(f"m{i}", f"q{i}", f"a{i}") for i in range(4)]


def but(i, **fields):
    return [Step(**{"meta": s.meta, "query": s.query, "answer": s.answer} | (fields if i == j else {})) for j, s in enumerate(TEACHER)]


def scored(problem, student, *teachers):
    score, = structure_rewards([student], [list(teachers)], exact_judge)
    return row(problem, True, structure=score.value, left_at=score.left_at, choices=score.choices,
               steps=[[s.meta, s.query, s.answer, e] for s, e in zip(score.structure, score.steps)])


def test_a_half_credit_says_whether_choice_or_answer_was_wrong():
    cases = [(TEACHER, [1, 1, 1, 1], [1, 1, 1, 1]), (but(1, query="x"), [1, 0, 1, 1], [1, None, 1, 1]), (but(1, answer="x"), [1, 1, 1, 1], [1, 0, 1, 1]),
             (but(1, query="x", answer="x"), [1, 0, 1, 1], [1, None, 1, 1]), (but(2, meta="x"), [1, 1, 0], [1, 1, None]), (TEACHER[:2], [1, 1], [1, 1]), ([], [], [])]
    for student, choices, answers in cases:
        r = scored("p", student, TEACHER)
        assert r["choices"] == choices and report.answers_right(r) == answers, student


def test_choices_are_those_on_the_trace_followed():
    """Two steps as the long trace has them (0.5), but a short one earns 1 before it is left: that is the trace whose choices count."""
    short, long = [TEACHER[0]], [TEACHER[0], Step("m1", "x", "a1"), *TEACHER[2:]]
    assert scored("p", TEACHER, short, long)["choices"] == [1] and scored("p", TEACHER, long)["choices"] == [1, 0, 1, 1]


def test_structure_report_by_hand():
    rows = [scored("p", TEACHER, TEACHER), scored("p", but(1, query="x"), TEACHER),                   # p: choices 4/4 and 3/4, answers 4/4 and 3/3
            scored("q", but(0, meta="x"), TEACHER), scored("q", but(2, meta="x", answer="y"), TEACHER),      # q: 0/1 and 2/3; answers none and 2/2
            scored("q", [], TEACHER), row("q", False)]                                                # no steps: earns 0, chooses nothing; unscored: not there
    figures, steps = report.structure_report(rows)
    assert figures["structure"].mean == pytest.approx(((1 + 3.5 / 4) / 2 + (0 + 0.5 + 0) / 3) / 2)
    assert figures["choice accuracy"].mean == pytest.approx((7 / 8 + 2 / 4) / 2) and figures["answer accuracy on the branch"].mean == 1.0
    assert [s["judged"] for s in steps] == [4, 3, 3, 2] and [s["choice"] for s in steps] == pytest.approx([3 / 4, 2 / 3, 2 / 3, 1.0]) and [s["left"] for s in steps] == [1, 0, 1, 0]


def test_structure_report_on_the_toy_world_against_a_naive_walk(capsys):
    """A student of the toy, the rule as its GSRM, one teacher trace: the walk written out again."""
    model, tok = load_model("toy/student")
    problems = [p for p in load_problems("toy", "test") if p.teachers][:8]
    problems = [type(p)(p.id, p.problem, p.answer, p.teachers[:1]) for p in problems]
    rows = evaluation.evaluate(model, tok, problems, 8, 1.0, 1.0, 100, 3, None, evaluation.load_gsrm("toy:read", "", None, "cpu"))
    choices, answers, left = {p.id: [] for p in problems}, {p.id: [] for p in problems}, {}
    same = lambda a, b: a.lower().split() == b.lower().split()
    for r in rows:
        teacher = toy.read(next(p for p in problems if p.id == r["id"]).teachers[0])
        for i, (s, t) in enumerate(zip(toy.read(split_completion(r["text"])[0]), teacher)):
            choices[r["id"]].append(same(s.meta, t.meta) and same(s.query, t.query))
            if not same(s.meta, t.meta):
                left[i] = left.get(i, 0) + 1
                break
            if same(s.query, t.query):
                answers[r["id"]].append(same(s.answer, t.answer))
    figures, steps = report.structure_report(rows)
    assert figures["choice accuracy"].mean == pytest.approx(np.mean([np.mean(c) for c in choices.values()])) and 0 < figures["choice accuracy"].mean < 1
    assert figures["answer accuracy on the branch"].mean == pytest.approx(np.mean([np.mean(a) for a in answers.values() if a]))
    assert {s["step"] - 1: s["left"] for s in steps if s["left"]} == left and sum(left.values()) > 20
    report.print_structure(rows)
    text = capsys.readouterr().out
    assert f"structure of {len(rows)} samples of 8 problems" in text and "choice accuracy" in text and "never left" in text and "#" in text and "nan" not in text


def test_a_student_without_steps_has_no_accuracy(capsys):
    report.print_structure([scored("p", [], TEACHER), scored("q", [], TEACHER)])
    text = capsys.readouterr().out
    assert re.search(r"^structure +0\.000 \+-", text, re.MULTILINE) and re.search(r"^choice accuracy +-$", text, re.MULTILINE) and "nan" not in text

def test_what_failed_is_counted_by_its_reason(capsys):
    """Samples of problems without teacher traces are no failures, and the question for traces is only put where nobody has any."""
    bare, why = [row("p", True, sample=s) for s in range(2)], ("not decomposed", "a judgement failed", "not decomposed")
    failed = [row("q", True, sample=s, reason=reason) for s, reason in enumerate(why)]
    report.print_structure([*bare, *failed, row("r", True, structure=1.0, steps=[["m", "q", "a", 1.0]], choices=[True], reason=None)])
    said = capsys.readouterr().out
    assert ("structure of 1 samples of 1 problems with teacher traces, 2 without: mean +- standard error [95 % interval]\n"
            "3 samples could not be scored: not decomposed 2, a judgement failed 1 (the same") in said
    report.print_structure([*bare, *failed])
    assert "structure: 3 samples could not be scored: not decomposed 2" in (said := capsys.readouterr().out) and "no problem has" not in said
    report.print_structure(bare)
    assert capsys.readouterr().out == "structure: no problem has teacher traces\n"


def ended(out, before, after, capsys):
    """What print_end says of completions (problem, sample, temperature, right)."""
    for when, rows in (("before", before), ("after", after)):
        if rows is not None:
            write_jsonl(out / f"eval_{when}.jsonl", [row(name, right, "1", sample, warm) for name, sample, warm, right in rows])
    report.print_end(out)
    return capsys.readouterr().out


def test_before_and_after_are_of_the_same_completions(tmp_path, capsys):
    """A resume may have changed how many problems and samples: then the table is of what both have, and says so."""
    few = [(name, sample, float(sample < 2), False) for name in "ab" for sample in range(3)]
    many = [(name, sample, float(sample < 2), name in "cd" or sample == 1) for name in "abcd" for sample in range(3)]
    said = ended(tmp_path, few, few, capsys)
    assert "made both before" not in said and re.search(r"accuracy sampled +0\.00 +0\.00\n", said)
    said = ended(tmp_path, few, many, capsys)
    assert "of the 6 completions" in said and re.search(r"accuracy sampled +0\.00 +0\.50\n", said) and re.search(r"pass@2 +0\.00 +1\.00\n", said)
    (tmp_path / "eval_before.jsonl").unlink()
    said = ended(tmp_path, None, many, capsys)
    assert "made both before" not in said and re.search(r"accuracy sampled +0\.75", said) and "before  " not in said
    (tmp_path / "eval_after.jsonl").unlink()
    assert "held-out" not in ended(tmp_path, few, None, capsys)                       # the evaluation after training was turned off

# ------------------------------------------------------------------------------------------------ comparison

def store(path, rows):
    write_jsonl(path, rows)
    return str(path)


def test_compare_pairs_by_problem(tmp_path, capsys):
    rng = np.random.default_rng(0)
    p = {f"p{i}": rng.uniform(0.1, 0.7) for i in range(40)}
    a = [row(n, bool(rng.random() < x), "1", s) for n, x in p.items() for s in range(4)]
    b = [row(n, bool(rng.random() < x + 0.25), "1", s) for n, x in reversed(p.items()) for s in range(4)] + [row("new", True, "1", s) for s in range(4)]
    a, b = a + [row(n, False, "1", temperature=0.0) for n in p], b + [row(n, n < "p2", "1", temperature=0.0) for n in p]
    got = report.compare(store(tmp_path / "a.jsonl", a), store(tmp_path / "b.jsonl", b), tmp_path / "c.png")
    means = [np.array([np.mean([r["correct"] for r in rows if r["id"] == n and r["temperature"]]) for n in p]) for rows in (a, b)]
    gain, half = means[1] - means[0], 1.96 * (means[1] - means[0]).std(ddof=1) / math.sqrt(40)
    assert got["mean@4"]["diff"] == pytest.approx(gain.mean()) and got["mean@4"]["low"] == pytest.approx(gain.mean() - half, abs=0.15 * half) and got["mean@4"]["p"] < 0.01
    assert got["greedy"]["diff"] == pytest.approx(np.mean([n < "p2" for n in p])) and got["greedy"]["problems"] == 40 and "structure" not in got
    text = capsys.readouterr().out
    assert "left out: 1 problems that only" in text and "new" in text and "too narrow" not in text and (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_compare_notes_other_sampling_and_takes_structure_along(tmp_path, capsys):
    paths = [store(tmp_path / f"{name}.jsonl", [row(n, True, structure=x) for n, x in zip("pqr", values)]) for name, values in (("a", (0.1, 0.2, 0.3)), ("b", (0.4, None, 0.8)))]
    for path, temperature in zip(paths, (0.6, 1.0)):
        generations.settings_path(tmp_path / path).write_text(json.dumps({"config": {"temperature": temperature, "top_p": 1.0}}))
    got = report.compare(*paths)
    assert got["structure"]["diff"] == pytest.approx((0.3 + 0.5) / 2) and got["structure"]["problems"] == 2
    text = capsys.readouterr().out
    assert "note: --temperature was 0.6" in text and "fewer than some 20 problems" in text


def test_structure_scored_for_too_few_problems_does_not_cost_the_rest(tmp_path, capsys):
    """An untrained student's text is often unscored: the accuracies are compared all the same."""
    paths = [store(tmp_path / f"{name}.jsonl", [row(n, True, structure=x) for n, x in zip("pqr", values)]) for name, values in (("a", (0.1, None, None)), ("b", (0.4, 0.2, 0.8)))]
    got = report.compare(*paths)
    assert "structure" not in got and got[next(iter(got))]["problems"] == 3 and "note: structure: scored on both sides for 1 problem(s) only" in capsys.readouterr().out


def test_a_side_without_verdicts_is_said_and_the_rest_compared(tmp_path, capsys):
    sides = (("a", None, (0.1, 0.2)), ("b", True, (0.4, 0.8)))
    paths = [store(tmp_path / f"{name}.jsonl", [row(n, right, structure=x) for n, x in zip("pq", values)]) for name, right, values in sides]
    assert list(report.compare(*paths)) == ["structure"] and "note: mean@1: graded on both sides for 0 problem(s) only" in capsys.readouterr().out
    bare = [store(tmp_path / f"{name}.jsonl", [row(n, right) for n in "pq"]) for name, right, _ in sides]
    with pytest.raises(ValueError, match="a.jsonl and .*b.jsonl: there is nothing to compare: .* two problems or more that are graded, or scored, on both sides"):
        report.compare(*bare)


@pytest.mark.parametrize("other, words", [
    ([row(n, True, sample=s) for n in "pq" for s in range(3)], r"2 samples per problem, .* 3.*same --k"),
    ([row("p", True), row("p", True, sample=1), row("q", True)], "problem q has 1 samples, others have 2.*run its command again"),
    ([row(n, True, sample=s) for n in "xy" for s in range(2)], "share no problem id"),
    ([row(n, True, sample=s, gold="2") for n in "pq" for s in range(2)], "problem p: the gold answer is not the same"),
    ([row(n, True, sample=s, problem="?") for n in "pq" for s in range(2)], "problem p: the text is not the same"),
    ([row(n, True, temperature=0.0) for n in "pq"], "one holds greedy completions"),
])
def test_compare_refuses(tmp_path, other, words):
    a = store(tmp_path / "a.jsonl", [row(n, True, sample=s) for n in "pq" for s in range(2)])
    with pytest.raises(ValueError, match=words):
        report.compare(a, store(tmp_path / "b.jsonl", other))


# ------------------------------------------------------------------------------------------------ pictures

def test_a_curve_leaves_gaps_out_and_looks_back():
    log = [{"step": i, "kl": {3: math.nan, 5: None}.get(i, float(i))} for i in range(30)] + [{"step": 30}]
    steps, y, smooth = plots.curve(log, "kl")
    assert steps == [i for i in range(30) if i not in (3, 5)]
    assert smooth[0] == 0 and smooth[-1] == pytest.approx(np.mean(range(20, 30))) and smooth[3] == pytest.approx((0 + 1 + 2 + 4) / 4)


@pytest.mark.parametrize("torn", ["", '{"step": 2, "rew', '{"step": 2, "reward": 1.0}', "{", '{"step": 2, "text": "\u03c0'])
def test_a_log_s_last_line_without_its_end_is_left_out(tmp_path, torn):
    file, last = tmp_path / "log.jsonl", torn.encode()
    file.write_bytes(b'{"step": 0, "reward": 0.5}\n{"step": 1, "reward": 0.25}\n' + last[:len(last) - ("\u03c0" in torn)])                # also one torn within a character
    assert plots.read_logs([str(tmp_path)]) == {tmp_path.name: [{"step": 0, "reward": 0.5}, {"step": 1, "reward": 0.25}]}
    file.write_bytes(b'{"step": 0}\n{"step": 1, "rew\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"log.jsonl:2: expected the log line"):
        plots.read_logs([str(tmp_path)])


def test_small_multiples_draw_each_metric_of_each_run(tmp_path, monkeypatch):
    for name, metrics in (("x/a", {"reward": 1.0, "rewards/structure/mean": 0.5, "true_structure": 0.1, "kl": 0.1}), ("y/a", {"reward": 2.0, "true_structure": 0.2})):
        (tmp_path / name).mkdir(parents=True)
        write_jsonl(tmp_path / name / "log.jsonl", [{"step": i, **metrics} for i in range(20)])
    runs, plt, drawn = [str(tmp_path / "x/a"), str(tmp_path / "y/a")], plots.pictures(), []
    monkeypatch.setattr(plt, "close", drawn.append)
    plots.small_multiples(runs, tmp_path / "c.png")
    heights = {axes.get_title(): [float(line.get_ydata()[-1]) for line in axes.lines[1::2]] for axes in drawn[0].axes}
    assert list(heights.values()) == [[1.0, 2.0], [0.5, 0.2], [], [], [0.1], []] and (tmp_path / "c.png").stat().st_size > 10_000
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == runs           # two runs called alike: whole paths
    (tmp_path / "x/a/log.jsonl").write_text('{"loss": 1}\n')
    for bad, words in (([], "no run to plot"), ([str(tmp_path)], "no log.jsonl there"), ([runs[0]], "log.jsonl:1: expected the log line")):
        with pytest.raises(ValueError, match=words):
            plots.small_multiples(bad, tmp_path / "never.png")
    assert not (tmp_path / "never.png").exists()


def test_a_name_with_dollar_signs_is_no_mathematics(tmp_path):
    runs = [str(tmp_path / "x$y_{$"), str(tmp_path / "b")]
    for run in runs:
        Path(run).mkdir()
        write_jsonl(Path(run) / "log.jsonl", [{"step": i, "true_structure": 0.2} for i in range(3)])
    for draw in (plots.plot, plots.small_multiples):
        draw(runs, tmp_path / "c.png")
    plots.pass_curves({"x$y_{$": {"pass@1": (0.5, 0.4, 0.6), "pass@2": (0.6, 0.5, 0.7)}}, tmp_path / "p.png")


def test_a_rollout_is_painted_by_what_its_steps_earned(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "painted", lambda paragraphs: drawn.append(paragraphs) or type("Figure", (), {"savefig": lambda self, *a, **k: None})())
    green, yellow, red = (plots.tint(c, 0.45) for c in (plots.GREEN, plots.YELLOW, plots.RED))
    one = row("a", True, steps=[["m", "q", "1", 1.0], ["m2", "q2", "2", 0.5], ["m3", "q3", "3", 0.0]], left_at=2, structure=0.75,
              text="<think>\nfirst.\nsecond.\nthird.\n</think>\n\\boxed{1}")
    plots.rollout_picture(one, tmp_path / "x.png")
    assert drawn[0][2:5] == [[("first.", green), ("", None)], [("second.", yellow), ("", None)], [("third.", red), ("   left the teacher's branch here", None)]]
    assert drawn[0][0] == [("P a?", None)] and drawn[0][5] == [("\\boxed{1}", None)] and "0.75" in drawn[0][-1][-1][0]
    plots.rollout_picture(one | {"text": "<think>all in one line</think>\\boxed{1}"}, tmp_path / "x.png")
    assert drawn[1][3] == [("m2: q2? 2", yellow), ("", None)]
    with pytest.raises(ValueError, match="no scored steps"):
        plots.rollout_picture(one | {"structure": None}, tmp_path / "x.png")


def test_painted_text_is_wrapped_and_keeps_its_words_and_colours():
    pieces = [("one two", (1, 0, 0)), (" costs $5, not $6\n", None), ("x" * 12, (0, 0, 1)), (" end", None)]
    figure = plots.painted([pieces, [("second", None)]], width=12)
    figure.canvas.draw()                                # dollars are no mathematics
    texts = [t for t in figure.axes[0].texts if t.get_text().strip()]
    assert [t.get_text() for t in texts] == ["one", "two", "costs", "$5,", "not", "$6", "x" * 12, "end", "second"]
    places = [(int(t.get_position()[1]), t.get_position()[0]) for t in texts]                          # (line, column)
    assert places == [(0, 0), (0, 4), (1, 0), (1, 6), (2, 0), (2, 4), (3, 0), (4, 0), (5, 0)]
    assert [(r.get_x(), r.get_width(), r.get_facecolor()[:3]) for r in figure.axes[0].patches] == [(0, 3, (1, 0, 0)), (3, 1, (1, 0, 0)), (4, 3, (1, 0, 0)), (0, 12, (0, 0, 1))]
    assert plots.tint("#000000", 0) == (1, 1, 1) and plots.tint("#000000", 7) == (0, 0, 0) and plots.tint("#ff0000", 0.5) == (1, 0.5, 0.5)


def test_the_tree_merges_equal_beginnings_only():
    figure = plots.tree([["a", "b", "c"], ["a", "c", "c"], ["a", "b", "d"]], "root", {("a", "c"): "left here"}, {(): 1.0})
    where = {(t.get_text(), round(t.get_position()[0])): t.get_position()[1] for t in figure.axes[0].texts if t.get_text()}
    top, middle = pytest.approx((0 + 1 + 2) / 3), pytest.approx((0 + 1) / 2)
    assert where == {("root", 0): top, ("a", 1): top, ("b", 2): middle, ("c", 2): 2, ("c", 3): 2, ("d", 3): 1,        # the last trace is drawn second
                     ("left here", 2): pytest.approx(2.36)}
    boxes = [t.get_text() for t in figure.axes[0].texts if t.get_bbox_patch()]
    assert sorted(boxes) == ["a", "b", "c", "c", "c", "d", "root"] and len(figure.axes[0].lines) == 6
