"""Figures of card.py against closed forms, its attacks as pure functions, and the command. `python -m pytest tests/test_card.py`"""
import json
import math
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

import card
import toy
from card import (
    ATTACKS,
    attack_card,
    attacking,
    calibration,
    full_card,
    judge_card,
    judge_pairs,
    judging,
    load_gold,
    matched,
    pieces,
    read_socratic,
    report_card,
    same_value,
    value_of,
)
from data import Problem, load_problems
from gsrm import GSRM, KINDS, NO_STEPS, Step, decompose_prompt, exact_judge, format_steps, judge_by, parse_steps, reading_rule

ROOT = Path(card.__file__).parent
GOLD = [Step(f"m{i}", f"q{i}", f"a{i}") for i in range(1, 5)]
LINE = {"question": "How many in all?", "answer": "How many eggs are left? ** She has 16 - 3 = <<16-3=13>>13 eggs left.\n"
        "What do they earn? ** At $2 each they earn 13 * 2 = $<<13*2=26>>26.\nNothing? ** \nIs it enough? ** Yes\n#### 1,026"}

# ------------------------------------------------------------------------------------------------ reading


def test_report_card_closed_form() -> None:
    upper = [Step(s.meta.upper(), f" {s.query} ", s.answer) for s in GOLD]
    read = [GOLD, upper, GOLD[::-1], None, [], GOLD[:2] + GOLD[:1]]
    gold = [GOLD, GOLD, GOLD, GOLD, [], GOLD]
    hits, said, true = 4 + 4 + 4 + 0 + 0 + 2, 4 + 4 + 4 + 0 + 0 + 3, 20                          # a step said twice is right once
    want = {"exact": 3 / 6, "precision": hits / said, "recall": hits / true, "f1": 2 * hits / (said + true), "length_ratio": said / 16, "unread": 1 / 6}
    assert report_card(read, gold) == pytest.approx(want)
    assert report_card([], []) == dict.fromkeys(want, 0) and report_card([[]], [[]])["exact"] == 1 and report_card([None], [[]])["exact"] == 0
    with pytest.raises(ValueError):
        report_card([GOLD], [])


def test_matched_uses_each_gold_step_once() -> None:
    nines = [Step("", "a?", "9"), Step("", "b?", "9")]
    assert matched([nines[1]] * 3, nines, same_value) == [(nines[0], nines[1]), (nines[1], nines[1])]
    assert matched([nines[1]], nines, card.same_value_and_query) == [(nines[1], nines[1])]


@pytest.mark.parametrize(("answer", "value"), [("18", 18), ("$18", 18), ("She sells 18 eggs.", 18), ("1,026 dollars", 1026), ("2{,}000", 2000),
                                               ("-2.5", Fraction(-5, 2)), (".5", Fraction(1, 2)), ("3 of 4", 4), ("Ann", None),
                                               ("1/2", Fraction(1, 2)), ("-1/2", Fraction(-1, 2)), ("3 1/2 hours", Fraction(7, 2)), ("= 4/5 of a serving", Fraction(4, 5)),
                                               ("10-15", 15), ("5 - -3", -3), ("118,000", 118_000), ("-3 1/2", Fraction(-7, 2)),
                                               ("2 and 1/2", Fraction(1, 2)), ("from 3 to -3 1/2 m", Fraction(-7, 2))])
def test_value_of(answer: str, value: int | Fraction | None) -> None:
    assert value_of("9" * 5000) == value_of("9" * 600)               # Python reads no longer ones
    assert value_of(answer) == value


def test_soft_comparison() -> None:
    human = Step("", "How many eggs does Janet sell?", "9")
    assert same_value(Step("why", "x", "She sells 9.0 eggs"), human) and not same_value(Step("", human.query, "8"), human)
    assert same_value(Step("", "x", "in the MIDDLE"), Step("", "", "In the middle")) and not same_value(Step("", "x", "Ann"), human)
    close, far = "How many eggs are there for Janet to sell?", "What does she earn?"
    same = card.same_value_and_query
    assert same(Step("", close, "9"), human) and not same(Step("", far, "9"), human) and not same(Step("", close, "8"), human)


def test_socratic_lines_are_read() -> None:
    problem, steps = read_socratic(LINE, "f:1")
    assert problem == Problem("f:1", "How many in all?", "1,026", ("She has 16 - 3 = 13 eggs left.\nAt $2 each they earn 13 * 2 = $26.\nYes",))
    assert steps == [Step("", "How many eggs are left?", "13"), Step("", "What do they earn?", "26"), Step("", "Is it enough?", "Yes")]
    for bad in ({}, [], {"question": "x", "answer": "y"}, {"question": 1, "answer": "a ** b"}):
        with pytest.raises(ValueError, match="f:2: a line of GSM8K's socratic file"):
            read_socratic(bad, "f:2")
    for question, answer, field in ((" ", "a ** b", "problem"), ("\ud800", "a ** b", "problem"), ("q", "a ** ", "teachers")):
        with pytest.raises(ValueError, match=f"^f:2: field '{field}' must be"):
            read_socratic({"question": question, "answer": answer}, "f:2")


def test_every_line_of_the_public_file_is_read() -> None:
    path = ROOT.parent / "shared" / "data" / "gsm8k_test_socratic.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    problems, gold = load_gold(str(path), 0)
    assert len(problems) == len(gold) == 1319 and sum(map(len, gold)) == 4819 and all(s.query and s.answer for steps in gold for s in steps)
    assert all(len(steps) == len(p.teachers[0].split("\n")) for p, steps in zip(problems, gold)) and not any("<<" in p.teachers[0] for p in problems)
    assert load_gold(str(path), 3)[0] == problems[:3] and load_gold("toy", 2)[1] is None


def test_unfaithful_steps_are_counted_before_they_are_left_out() -> None:
    written = format_steps([Step("m", "q", "seven"), Step("m", "q", "99")])
    read, answered, faithful = card.decompose(GSRM(lambda prompts: [written] * len(prompts), exact_judge), ["p", "p"], ["it is seven"] * 2)
    assert read == [[Step("m", "q", "seven")]] * 2 and faithful == 1 / 2
    assert all(answered) and card.decompose(GSRM(lambda prompts: [None] * len(prompts), exact_judge), ["p"], ["it is seven"]) == ([None], [False], None)


def test_an_outage_is_no_misreading() -> None:
    """A rule that reads everything right, but that nobody could reach for every second problem, reads perfectly; garbage in its place does not."""
    problems = [Problem(f"p{n}", f"Problem {n}: what is {n} and {n}?", str(2 * n), (f"{n} and {n} is {2 * n}. So it is {2 * n}.",)) for n in range(4)]
    steps = lambda trace: [Step("to add", "the sum", value) for value in re.findall(r"and \d is (\d)", trace)]
    by_prompt = {decompose_prompt(p.problem, p.teachers[0]): format_steps(steps(p.teachers[0])) for p in problems}

    def reading(instead: str | None) -> dict:
        away = {decompose_prompt(p.problem, p.teachers[0]) for p in problems[::2]}
        gsrm = GSRM(lambda prompts: [instead if prompt in away else by_prompt.get(prompt, "") for prompt in prompts], exact_judge)
        return card.full_card(gsrm, problems, [], steps, None, [])["reading"][card.TEACHER]
    out, garbage = reading(None), reading("no step at all")
    assert out == dict(traces=2, exact=1, precision=1, recall=1, f1=1, length_ratio=1, unread=0, faithful=1, failed=1 / 2)
    assert {name: garbage[name] for name in ("traces", "exact", "recall", "unread", "failed")} == dict(traces=4, exact=1 / 2, recall=1 / 2, unread=1 / 2, failed=0)
    by_prompt.clear()
    nothing = card.full_card(GSRM(lambda prompts: [None] * len(prompts), exact_judge), problems, [], steps, None, [])["reading"][card.TEACHER]
    assert nothing == {"traces": 0, "unread": None, "faithful": None, "failed": 1.0}

# ------------------------------------------------------------------------------------------------ the judge


def test_calibration_closed_form() -> None:
    p, y = [0.05, 0.05, 0.95, 1.0, 0.5], [False, True, True, True, False]
    brier = (0.05**2 + 0.95**2 + 0.05**2 + 0 + 0.25) / 5
    ece = (2 * abs(0.05 - 0.5) + 2 * abs(0.975 - 1) + 1 * abs(0.5 - 0)) / 5                      # bins 0, 9 (1.0 is in the last one) and 5
    assert calibration(p, y) == pytest.approx({"brier": brier, "ece": ece})
    assert calibration([0.7] * 10, [True] * 7 + [False] * 3) == pytest.approx({"brier": 0.7 * 0.3, "ece": 0})        # calibrated is not sharp
    assert calibration([1.0, 0.0], [False, True]) == {"brier": 1, "ece": 1} and calibration([], []) == {"brier": 0, "ece": 0}
    assert calibration([0.0, 1.0], [True, False], bins=1) == {"brier": 1, "ece": 0}              # opposite errors in one bin cancel


def test_judge_card_leaves_failures_out_and_counts_them() -> None:
    got = judge_card([0.5, 0.49, None, 1.0], [True, True, True, False])
    assert got == pytest.approx({"pairs": 4, "accuracy": 1 / 3, "said_yes": 2 / 3, "brier": (0.25 + 0.51**2 + 1) / 3, "ece": (0.5 + 0.51 + 1) / 3, "failed": 1 / 4})
    assert judge_card([None], [True]) == {"pairs": 1, "failed": 1.0}


def test_pairs_have_the_right_labels() -> None:
    worlds = [[Step("for A", "A has what", "B plus C"), Step("for B", "B has what", "4")], [Step("for A", "A has what", "C plus B"), Step("for D", "D has what", "5")]]
    entries = [(n, step, Step(step.meta, step.query.upper(), step.answer)) for n, steps in enumerate(worlds) for step in steps]
    pairs = judge_pairs(entries)
    assert set(pairs["same"]) == {(kind, getattr(true, kind), getattr(read, kind)) for _, true, read in entries for kind in KINDS}
    differ = lambda a, b: sorted(a.lower().split()) != sorted(b.lower().split())
    assert all(differ(a, b) for name in ("other step", "shuffled") for _, a, b in pairs[name])  # "B plus C" and "C plus B" are no different pair
    fields = {(n, kind): {getattr(s, kind).lower() for s in steps} for n, steps in enumerate(worlds) for kind in KINDS}
    assert all(any(a.lower() in fields[n, k] and b.lower() in fields[n, k] for n in (0, 1)) for k, a, b in pairs["other step"])
    assert all(any(a.lower() in fields[n, k] and b.lower() in fields[1 - n, k] for n in (0, 1)) for k, a, b in pairs["shuffled"]) and pairs["shuffled"]
    swapped = judge_pairs([(0, worlds[0][0], worlds[0][0]), (1, worlds[1][0], worlds[1][0])])
    assert swapped["shuffled"] == swapped["other step"] == []
    assert judge_pairs(entries) == pairs and all(len(found) <= 2 for found in judge_pairs(entries, most=2).values())
    assert sorted(judge_pairs([(0, Step("", "q", "1"), Step("m", "q", "1"))])["same"]) == [("answer", "1", "1"), ("query", "q", "q")]      # human steps have no meta


def test_judging_closed_form() -> None:
    pairs = {"same": [("meta", "a", "a"), ("meta", "a", "b")], "shuffled": [("meta", "a", "c"), ("answer", "1", "2"), ("meta", "b", "c")]}
    rows = judging(judge_by(lambda prompts: [0.8] * len(prompts)), pairs)
    assert rows["same"]["accuracy"] == 1 and rows["shuffled"]["said_yes"] == pytest.approx(2 / 3) and rows["shuffled"]["accuracy"] == pytest.approx(1 / 3)
    assert rows["not settled by the text"] == pytest.approx({"pairs": 3, "accuracy": 1 / 3, "said_yes": 1, "brier": (0.04 + 2 * 0.64) / 3, "ece": 0.8 - 1 / 3, "failed": 0})

# ------------------------------------------------------------------------------------------------ attacks

TRACE = "for Ann, Ann has 3.\nfor Bob, Bob has 4.\nthen Cid makes 7."


def test_attacks_are_what_they_say() -> None:
    done = {name: attack(TRACE, "other trace") for name, attack in ATTACKS.items()}
    assert done == {name: attack(TRACE, "other trace") for name, attack in ATTACKS.items()} and TRACE not in done.values()      # pure, and none is the honest trace
    one, two, three = TRACE.split("\n")
    assert done["empty thinking"] == "" and done["another problem's teacher"] == "other trace"
    assert done["steps in reverse"] == f"{three}\n{two}\n{one}" and done["every step twice"] == f"{one}\n{one}\n{two}\n{two}\n{three}\n{three}"
    assert [s.query for s in parse_steps(done["step tags"]).steps] == [one, two, three]
    assert done["answer yes"].count("answer yes") == 3 and all(piece in done["answer yes"] for piece in (one, two, three))
    assert done["special tokens"].count("<|im_end|>") == 6 and done["special tokens"].count("</trace>") == 3
    assert pieces("One. Two is 2.5! Three?") == ["One.", "Two is 2.5!", "Three?"] and pieces(" \n ") == []
    assert all(isinstance(attack("", "x"), str) for attack in ATTACKS.values()) and ATTACKS["step tags"]("", "x") == NO_STEPS


def test_attack_card_closed_form() -> None:
    got = attack_card([0.5, 0.5, None, 0.25, 0.5], [1.0, 0.5, 1.0, None, 0.0], [0.0, 0.5, None])
    assert got == pytest.approx({"traces": 5, "honest": 0.5, "attacked": 0.5, "earned_more": 1 / 3, "true": 0.25, "unscored": 2 / 5})
    assert attack_card([None], [None], []) == {"traces": 1, "unscored": 1.0}                     # no figure, which is not 0


def test_a_reward_model_that_can_be_cheated_is_caught() -> None:
    """It solves the problem itself where there is next to no trace; the world's own rule does not."""
    problems = load_problems("toy", "test")[:4]
    halves = [(n, "\n".join(p.teachers[0].split("\n")[:4])) for n, p in enumerate(problems)]
    rule, r = attacking(GSRM(reading_rule(toy.read), exact_judge), toy.read, problems, halves)
    assert rule["(honest)"]["honest"] == rule["(honest)"]["true"] > 0.2 and (r == pytest.approx(1) or math.isnan(r))
    assert {name: row["attacked"] for name, row in rule.items() if name in ("empty thinking", "a few words", "another problem's teacher")} == {
        "empty thinking": 0, "a few words": 0, "another problem's teacher": 0}
    assert all(row["earned_more"] == 0 and row["attacked"] == row["true"] for row in rule.values())
    solved = {p.problem: toy.read(p.teachers[0]) for p in problems}
    naive = GSRM(reading_rule(toy.read), exact_judge)
    naive.decompose = lambda texts, traces: [solved[p] if "Let me think" in t else toy.read(t) for p, t in zip(texts, traces)]           # no faithfulness guard
    caught, _ = attacking(naive, toy.read, problems, halves)
    assert caught["a few words"]["earned_more"] == 1 and caught["a few words"]["attacked"] == 1 and caught["a few words"]["true"] == 0

# ------------------------------------------------------------------------------------------------ all of it


def test_full_card_of_the_rule_is_flawless() -> None:
    problems = load_problems("toy", "test")[:3]
    samples = [(n, "\n".join(p.teachers[-1].split("\n")[:5])) for n, p in enumerate(problems)]
    got = full_card(GSRM(reading_rule(toy.read), exact_judge), problems, samples, toy.read, None, [])
    assert list(got) == ["reading", "judge", "attacks", "r"] and list(got["reading"]) == [card.TEACHER, card.STUDENT]
    assert all(row["f1"] == row["exact"] == row["length_ratio"] == row["faithful"] == 1 and row["unread"] == 0 for row in got["reading"].values())
    assert got["judge"]["same"]["accuracy"] == got["judge"]["shuffled"]["accuracy"] == 1 and got["attacks"]["(honest)"]["traces"] == 3
    json.dumps(got, allow_nan=False)


def test_full_card_against_human_steps_and_without_any_gold() -> None:
    problems, gold = zip(*(read_socratic({**LINE, "question": f"{n}?"}, f"f:{n}") for n in range(3)))

    def read(trace: str) -> list[Step]:
        return [Step("next", "How many eggs are now left?" if "eggs" in line else "Huh?", line) for line in trace.split("\n")]
    got = full_card(GSRM(reading_rule(read), exact_judge), list(problems), [], None, list(gold), [])
    values, queries = got["reading"][card.TEACHER + ", values"], got["reading"][card.TEACHER + ", values and queries"]
    assert values["f1"] == 1 and values["exact"] == 1 and queries["precision"] == pytest.approx(1 / 3) and queries["exact"] == 0 and values["length_ratio"] == 1
    assert got["judge"]["same"]["pairs"] == 2 * 3                    # the three problems' steps are the same ones: each distinct pair of queries and of answers once
    bare = full_card(GSRM(reading_rule(read), exact_judge), list(problems), [], None, None, [])
    assert bare["reading"] == {card.TEACHER: {"traces": 3, "unread": 0, "faithful": 1, "failed": 0}} and "same" not in bare["judge"] and bare["attacks"]["(honest)"]["honest"] > 0


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "gsrm.py", *command], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "card.json"
    done = run("eval", "toy", "--gsrm", "toy/gsrm", "--truth", "toy:read", "--pairs", "toy:judging_text", "--limit", "2", "--gsrm_max_new_tokens", "200",
               "--model", "toy/student", "--k", "1", "--max_new_tokens", "60", "--out", str(out))
    assert done.returncode == 0, done.stderr[-1000:]
    written = json.loads(out.read_text())
    assert written["reading"][card.TEACHER]["f1"] > 0.9 and written["judge"]["labelled pairs, the model alone"]["accuracy"] > 0.9 and written["flags"]["limit"] == 2
    assert set(written["attacks"]) == {"(honest)", *ATTACKS} and written["attacks"]["empty thinking"]["attacked"] == 0
    assert all(word in done.stdout for word in ("student's samples", "earned_more", "brier", "shuffled", *ATTACKS))
    explained = "\n".join(line for line in done.stdout.split("\n") if line.startswith("  "))
    columns = {column for title in ("reading", "judge", "attacks") for row in written[title].values() for column in row} - {"traces", "pairs", "accuracy", "f1"}
    assert all(f"{column}:" in explained or f"{column}," in explained for column in columns)          # a stranger can read every column


def test_without_flags_it_is_the_card_of_the_model_that_ships(capsys: pytest.CaptureFixture) -> None:
    card.main(["eval", "--limit", "2", "--gsrm_max_new_tokens", "200"])
    bare = capsys.readouterr().out
    card.main("eval toy --gsrm toy/gsrm --truth toy:read --limit 2 --gsrm_max_new_tokens 200".split())
    assert capsys.readouterr().out == bare and "exact" in bare and "r(structure, true_structure)" in bare


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_no_error(flag: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        card.main([flag])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and all(f"python gsrm.py {words}" in said for words in ("eval DATA --gsrm", "annotate DATA --url", "COMMAND --help"))


@pytest.mark.parametrize(("flags", "said"), [("", "usage"), ("eval toy", "DATA and --gsrm are needed"), ("eval --gsrm toy/gsrm", "DATA and --gsrm are needed"),
                                             ("eval nowhere --gsrm toy:read", "no problems at nowhere"),
                                             ("eval --data toy --gsrm toy:read --limit 1", "two problems"), ("eval toy --gsrm toy:read --pairs toy:judging_text", "is a rule")])
def test_errors_are_one_line(flags: str, said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        card.main(flags.split())
    assert said in str(ended.value.code) and "Traceback" not in str(ended.value.code)
