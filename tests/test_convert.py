"""Cases and numbers for convert.py: rows in the public schemas, every kind of bad row, contamination, whole files, real data. `python -m pytest tests/test_convert.py`"""
import json
import math
import random
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import convert
from convert import CONVERTERS, aime, gpqa, grams, gsm8k, math500, normalised, openr1, openthoughts, s1k, thought
from data import INSTRUCTION, Problem, load_problems

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
R1 = {"problem": "What is $1+1$?", "solution": "It is $2$.", "answer": "2", "problem_type": "Algebra", "question_type": "math-word-problem", "source": "olympiads",
      "uuid": "586fd646-76d6-5070-8c81-9993ab9d8559", "is_reasoning_complete": [True, True, True],
      "generations": ["<think>\nOne and one.\n</think>\n\nSo $\\boxed{2}$.", "<think>\nGuess.\n</think>\n\n$\\boxed{3}$", "<think>\nCount: 1, 2.\n</think>\n\n$\\boxed{2}$"],
      "correctness_math_verify": [True, False, True], "correctness_llama": None, "finish_reasons": None, "correctness_count": 2,
      "messages": [{"content": "What is $1+1$?", "role": "user"}, {"content": "<think>\nOne and one.\n</think>\n\nSo $\\boxed{2}$.", "role": "assistant"}]}
META = {"problem": "What is 2+2?", "deepseek_reasoning": "Two and two.", "deepseek_solution": "It is $\\boxed{5}$.", "ground_truth_solution": "Adding gives $\\boxed{4}$.",
        "domain": "math", "source": "numina_math", "test_cases": None, "starter_code": None}
TALK = {"system": "Your role as an assistant involves ...", "conversations": [
    {"from": "user", "value": "Return your final response within \\boxed{}. What is 2+2?"},
    {"from": "assistant", "value": "<|begin_of_thought|>\n\nTwo and two, so \\boxed{9}? No.\n\n<|end_of_thought|>\n\n"
                                   "<|begin_of_solution|>\n\nIt is \\boxed{4}.\n\n<|end_of_solution|>"}]}
S1 = {"solution": "128", "question": "How many are there?", "cot_type": "math", "source_type": "AI-MO/NuminaMath-CoT/aops_forum", "metadata": "{'url': None}",
      "gemini_thinking_trajectory": "Gemini thinks.", "gemini_attempt": "128", "deepseek_thinking_trajectory": "Eight primes, so 2^7.", "deepseek_attempt": "\\boxed{128}",
      "gemini_grade": "Yes", "gemini_grade_reason": "same", "deepseek_grade": "Yes", "deepseek_grade_reason": "same"}
S1_FIRST = {"solution": "128", "question": "How many are there?", "cot_type": "math", "source_type": "x", "metadata": "{}", "cot": None,
            "thinking_trajectories": ["Gemini thinks.", "And again."], "attempt": "128"}
GSM = {"question": "How many has Ann?", "answer": "She has 48/2 = <<48/2=24>>24 now.\nThen $<<24*2=48>>48.\n#### 1,048"}
MATH = {"problem": "Find $x$.", "solution": "$\\boxed{\\frac{1}{2}}$", "answer": "\\frac{1}{2}", "subject": "Intermediate Algebra", "level": 2, "unique_id": "test/algebra/1.json"}
AIME = {"id": 60, "problem": "Find $m+n$.", "solution": "... \\boxed{025}", "answer": "025", "url": "https://artofproblemsolving.com/", "year": "2024"}
GPQA = {"Question": "Which one?\n", "Correct Answer": "right ", "Incorrect Answer 1": "wrong 1", "Incorrect Answer 2": "wrong 2", "Incorrect Answer 3": "wrong 3",
        "Record ID": "rec055vn3qEqKHHTc", "High-level domain": "Biology", "Subdomain": "Molecular Biology", "Extra Revised Question": None}
GOOD = {"openr1": R1, "openthoughts": META, "s1k": S1, "gsm8k": GSM, "math500": MATH, "aime24": AIME, "aime25": {"problem": "Find it.", "answer": "70", "id": "0"}, "gpqa": GPQA}


def file_of(folder: Path, rows: list, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def run(name: str, source: object, out: Path, *flags: object) -> list[Problem]:
    convert.main([name, "--input", str(source), "--out", str(out), *map(str, flags)])
    return load_problems(out)


def refused(name: str, source: object, out: Path, *flags: object) -> str:
    """The one line of the error; neither --out nor anything beside it is left behind."""
    before = {path: path.read_bytes() for path in out.parent.iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        convert.main([name, "--input", str(source), "--out", str(out), *map(str, flags)])
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("error: ") and "\n" not in stop.value.code     # a text: exit status 1
    assert {path: path.read_bytes() for path in out.parent.iterdir() if path.is_file()} == before
    return stop.value.code[7:]


def without(row: dict, *names: str) -> dict:
    return {key: value for key, value in row.items() if key not in names}


def questions(*texts: str) -> list[dict]:
    return [{**GSM, "question": t} for t in texts]

# ------------------------------------------------------------------------------------------------ one row

@pytest.mark.parametrize(("completion", "trace"), [
    ("<think>\na b\n</think>\n\n4", "a b"),
    ("a b</think>4", "a b"),                                         # the opening tag stood in the prompt
    ("<think>a</think>", "a"),
    ("<think>a b, and so on without an end", None),                  # no closing tag
    ("no tags at all: 4", None),
    ("<think>\n \n</think>4", None),                                 # empty
    ("<think>a</think>3. <think>b</think>4", None),                  # two blocks: which one led to the answer?
    ("<think>a</think>3. <think>b", None),
    ("<think>a</think>b</think>4", None),
    ("<think>a <think>b</think> c</think>4", None),
    ("Sure. <think>a</think>4", None),
])
def test_a_trace_is_the_one_closed_block(completion: str, trace: str | None) -> None:
    assert thought(completion) == trace
    markers = completion.replace("<think>", "<|begin_of_thought|>").replace("</think>", "<|end_of_thought|>")
    boxed = markers + " \\boxed{4}"
    turns = [TALK["conversations"][0], {"from": "assistant", "value": boxed}]
    record = openthoughts({**TALK, "conversations": turns})
    assert record == ("not one closed thought" if trace is None else {"problem": turns[0]["value"], "answer": "4", "teachers": [trace], "domain": "math"})


def test_openr1_takes_every_verified_generation() -> None:
    assert openr1(R1) == {"id": R1["uuid"], "problem": "What is $1+1$?", "answer": "2", "teachers": ["One and one.", "Count: 1, 2."], "left_out": 1}
    assert openr1({**R1, "correctness_math_verify": [False, True, None]})["teachers"] == ["Guess."]
    cut = {**R1, "generations": [R1["generations"][0], R1["generations"][1], "<think>never ends \\boxed{2}"]}
    assert openr1(cut)["teachers"] == ["One and one."] and openr1(cut)["left_out"] == 2
    assert openr1({**cut, "correctness_math_verify": [False, False, True]}) == "no verified generation with one closed <think> block"
    for flags in (None, [], [False, False, False], [None, None, None]):
        assert openr1({**R1, "correctness_math_verify": flags, "correctness_llama": [True, True, True]}) == "no generation verified by Math-Verify"


def test_openthoughts_in_both_configs() -> None:
    assert openthoughts(META) == {"problem": "What is 2+2?", "answer": "4", "teachers": ["Two and two."], "domain": "math"}
    assert openthoughts({**META, "domain": "physics", "ground_truth_solution": "no box"}) == {**openthoughts(META), "answer": "5", "domain": "physics"}
    assert openthoughts({**META, "ground_truth_solution": None})["answer"] == "5"
    assert openthoughts({**META, "domain": "code", "ground_truth_solution": "def f(): ...", "deepseek_solution": "```python```"}) == "no \\boxed{} answer"
    assert openthoughts({**META, "deepseek_reasoning": "I write </think> here"}) == "not one closed thought"                      # the teacher's text, not a broken row
    record = openthoughts(TALK)
    assert (record["answer"], record["teachers"], record["domain"]) == ("4", ["Two and two, so \\boxed{9}? No."], "math")
    code = [{"from": "user", "value": "Generate an executable Python function"}, TALK["conversations"][1]]
    assert openthoughts({**TALK, "conversations": code})["domain"] == "other"
    third = [{"from": name, "value": turn["value"]} for name, turn in zip(("human", "gpt"), TALK["conversations"])]
    assert openthoughts({"conversations": third}) == record                                          # OpenThoughts3's names
    unboxed = {"from": "assistant", "value": TALK["conversations"][1]["value"].replace("It is \\boxed{4}.", "It is 4.")}
    assert openthoughts({**TALK, "conversations": [code[0], unboxed]}) == "no \\boxed{} answer"      # what the thought boxed does not count


def test_s1k_in_both_versions() -> None:
    assert s1k(S1) == {"problem": "How many are there?", "answer": "128", "teachers": ["Eight primes, so 2^7."], "domain": "math"}
    assert s1k(S1_FIRST) == {**s1k(S1), "teachers": ["Gemini thinks.", "And again."]}
    assert s1k({**S1, "solution": "1. Start.\n2. So $\\boxed{7}$."})["answer"] == "7"
    long = {**S1, "solution": "We start with a proof.\nIt goes on.", "deepseek_attempt": "hence \\boxed{9}"}
    assert s1k(long)["answer"] == "9" and s1k({**long, "deepseek_grade": "No"}) == s1k({**long, "deepseek_attempt": "hence 9"}) == "no \\boxed{} or short answer"
    assert s1k({**S1, "solution": "x" * 100})["answer"] == "x" * 100 and s1k({**S1, "solution": "x" * 101, "deepseek_grade": "No"}) == "no \\boxed{} or short answer"
    assert s1k({**S1_FIRST, "thinking_trajectories": ["we <think> add", "And again."]})["teachers"] == ["And again."]
    assert s1k({**S1, "deepseek_thinking_trajectory": "we <think> add"}) == "no thinking trajectory"
    assert s1k({**S1_FIRST, "thinking_trajectories": []}) == s1k({**S1_FIRST, "thinking_trajectories": None}) == "no thinking trajectory"


def test_gsm8k_solution_is_the_teacher() -> None:
    assert gsm8k(GSM) == {"problem": "How many has Ann?", "answer": "1,048", "teachers": ["She has 48/2 = 24 now.\nThen $48."]}
    assert gsm8k({**GSM, "answer": "1 < 2 and 3 << 4 >> 1\n#### -3"})["teachers"] == ["1 < 2 and 3  1"]           # a mark is whatever stands between << and >>


def test_math500() -> None:
    assert math500(MATH) == {"id": "test/algebra/1.json", "problem": "Find $x$.", "answer": "\\frac{1}{2}", "domain": "intermediate algebra"}


@pytest.mark.parametrize(("row", "record"), [
    (AIME, {"id": "aime-60", "problem": "Find $m+n$.", "answer": "25"}),
    ({"problem": "Find it.", "answer": "336^\\circ", "id": "0"}, {"id": "aime-0", "problem": "Find it.", "answer": "336"}),
    ({"id": 0, "problem": "Find it.", "solution": "\\boxed{204}", "url": "u"}, {"id": "aime-0", "problem": "Find it.", "answer": "204"}),
    ({"ID": "2024-I-1", "Problem": "Find it.", "Solution": "long", "Answer": 0}, {"id": "aime-2024-I-1", "problem": "Find it.", "answer": "0"}),
    ({"question": "Find it.", "answer": "$999$"}, {"id": None, "problem": "Find it.", "answer": "999"}),
    ({"problem": None, "prompt": "Find it.", "answer": 7}, {"id": None, "problem": "Find it.", "answer": "7"}),
])
def test_aime_in_its_public_shapes(row: dict, record: dict) -> None:
    assert aime(row, "aime") == record


@pytest.mark.parametrize("answer", ["1000", "-1", "3.5", "seven", "12 or 13", True, "", None, 12.0])
def test_an_aime_answer_is_an_integer(answer: object) -> None:
    with pytest.raises(ValueError, match="field 'answer'"):
        aime({"problem": "Find it.", "answer": answer}, "aime24")


def test_gpqa_letter_is_right_whatever_the_order() -> None:
    assert gpqa(GPQA) == {"id": "rec055vn3qEqKHHTc", "problem": "Which one?\n\n(A) wrong 1\n(B) wrong 3\n(C) wrong 2\n(D) right", "answer": "D", "domain": "biology"}
    letters = Counter()
    for seed in range(20):
        for n in range(20):
            record = gpqa({**GPQA, "Record ID": f"rec{n}"}, seed)
            listed = dict(re.findall(r"^\(([A-D])\) (.+)$", record["problem"], re.M))
            assert sorted(listed.values()) == ["right", "wrong 1", "wrong 2", "wrong 3"] and list(listed) == list("ABCD") and listed[record["answer"]] == "right"
            letters[record["answer"]] += 1
    assert all(70 <= letters[letter] <= 130 for letter in "ABCD")                  # 400 draws, sd 8.7
    twins = gpqa({**GPQA, "Incorrect Answer 1": "right"})                          # a choice that reads like the right one does not move the letter
    assert twins["answer"] == gpqa(GPQA)["answer"]


def test_gpqa_order_depends_on_seed_and_record_alone(tmp_path: Path) -> None:
    rows = [{**GPQA, "Question": f"Question {n}?", "Record ID": f"rec{n}"} for n in range(12)]
    first = {p.id: p for p in run("gpqa", file_of(tmp_path, rows), tmp_path / "a.jsonl")}
    mixed = random.Random(0).sample(rows, 7)
    assert all(first[p.id] == p for p in run("gpqa", file_of(tmp_path, mixed), tmp_path / "b.jsonl"))
    assert [p.answer for p in run("gpqa", file_of(tmp_path, rows), tmp_path / "c.jsonl", "--seed", 1)] != [p.answer for p in first.values()]
    assert [p.answer for p in first.values()] == [gpqa(row, 0)["answer"] for row in rows]

# ------------------------------------------------------------------------------------------------ bad rows


BAD = [
    *((name, without(row, key), f"field {key!r}") for name, row in GOOD.items()
      for key in {"openr1": ["problem", "answer", "generations", "correctness_math_verify"], "openthoughts": ["problem", "deepseek_reasoning", "domain"],
                  "s1k": ["question", "solution", "cot_type"], "gsm8k": ["question", "answer"], "math500": ["problem", "answer", "subject", "unique_id"],
                  "aime24": ["problem"], "aime25": ["problem", "answer"],
                  "gpqa": ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Record ID", "High-level domain"]}[name]),
    ("openr1", {**R1, "answer": None}, "field 'answer' must be a non-empty string, got None"),
    ("openr1", {**R1, "problem": "  "}, "field 'problem' must be a non-empty string, got '  '"),
    ("openr1", {**R1, "generations": "one"}, "field 'generations' must be a list of str, got 'one'"),
    ("openr1", {**R1, "generations": ["one", 2, "three"]}, "field 'generations' must be a list of str"),
    ("openr1", {**R1, "correctness_math_verify": ["True", "False", "True"]}, "field 'correctness_math_verify' must be a list of bool"),
    ("openr1", {**R1, "correctness_math_verify": [1, 0, 1]}, "field 'correctness_math_verify' must be a list of bool"),
    ("openr1", {**R1, "correctness_math_verify": [True, True]}, "field 'correctness_math_verify' must have an entry for each of the 3 generations, has 2"),
    ("openthoughts", {**TALK, "conversations": TALK["conversations"][:1]}, "field 'conversations' must be a turn from user and one from assistant, got ['user']"),
    ("openthoughts", {**TALK, "conversations": TALK["conversations"][::-1]}, "field 'conversations' must be a turn from user and one from assistant"),
    ("openthoughts", {**TALK, "conversations": None}, "field 'conversations' must be a turn from user"),
    ("openthoughts", {**TALK, "conversations": ["a", "b"]}, "field 'conversations' must be a list of dict"),
    ("openthoughts", {**TALK, "conversations": [TALK["conversations"][0], {"from": "assistant"}]}, "field 'value' must be a non-empty string, got None"),
    ("openthoughts", {**META, "deepseek_reasoning": ""}, "field 'deepseek_reasoning' must be a non-empty string"),
    ("openthoughts", {**META, "problem": "Return your final response within \\boxed{}."}, "as a problem: field 'problem' must be a non-empty string, got ''"),
    ("s1k", {**S1, "deepseek_thinking_trajectory": None}, "field 'deepseek_thinking_trajectory' must be a non-empty string, got None"),
    ("s1k", without(S1, "deepseek_thinking_trajectory"), "field 'thinking_trajectories' must be a list of str, got 'nothing'"),
    ("s1k", {**S1_FIRST, "thinking_trajectories": ["good", " "]}, "as a problem: field 'teachers' must be a list of non-empty strings"),
    ("gsm8k", {**GSM, "answer": "She has 24."}, "field 'answer' must be a worked solution and one last line '#### gold', got 'She has 24.'"),
    ("gsm8k", {**GSM, "answer": "#### 24"}, "field 'answer' must be a worked solution"),
    ("gsm8k", {**GSM, "answer": "She has 24.\n####"}, "field 'answer' must be a worked solution"),
    ("gsm8k", {**GSM, "answer": "24\n#### 24\n#### 25"}, "field 'answer' must be a worked solution"),
    ("gsm8k", {**GSM, "answer": "<<1+1=2>>\n#### 2"}, "as a problem: field 'teachers' must be a list of non-empty strings"),
    ("gsm8k", {**GSM, "question": ["How many?"]}, "field 'question' must be a non-empty string, got ['How many?']"),
    ("gsm8k", {**GSM, "question": True}, "field 'question' must be a non-empty string, got True"),
    ("gsm8k", {**GSM, "question": "half a pair: \ud800"}, "surrogates not allowed"),
    ("gsm8k", ["a", "list"], "expected a JSON object, got list"),
    ("gsm8k", {"row_idx": 0, "row": "text", "truncated_cells": []}, "expected a JSON object, got str"),
    ("gsm8k", {"row_idx": 0, "row": GSM, "truncated_cells": ["answer"]}, "field 'answer' was cut off by the datasets server (truncated_cells)"),
]


@pytest.mark.parametrize(("name", "row", "message"), BAD)
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_a_bad_row_stops_everything_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture, name: str, row: object, message: str, kind: str) -> None:
    good = GOOD[name]
    source, out = file_of(tmp_path, [good, row, good], f"rows{kind}"), tmp_path / "out.jsonl"
    error = refused(name, source, out)
    assert error.startswith(f"{source}, row 2: ") and message in error and error.endswith("(--skip_bad passes over such rows)")
    assert len(run(name, source, out, "--skip_bad")) == 2
    told = capsys.readouterr().out
    assert told.startswith("3 rows read\n2 written\n") and f"1 bad rows passed over: \n  {source}, row 2: " in told and message in told


def test_a_line_that_is_not_json_is_one_bad_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    twice = json.dumps(GSM).encode()[:-1] + b', "answer": "#### 5"}'
    for broken in (b"{'question': 1}", json.dumps(GSM).encode()[:-1], json.dumps(GSM).encode() * 2, b'{"question": "\xff\xfe"}', twice):
        source.write_bytes(json.dumps(GSM).encode() + b"\n\n" + broken + b"\n" + json.dumps({**GSM, "question": "line\u2028end?"}, ensure_ascii=False).encode() + b"\r\n")
        assert re.match(re.escape(f"{source}, row 3: ") + "(not valid JSON: |.*codec can't decode|the field 'answer' stands there twice)", refused("gsm8k", source, out))
        assert [(p.id, p.problem) for p in run("gsm8k", source, out, "--skip_bad", "--overwrite")] == [("gsm8k-1", GSM["question"]), ("gsm8k-3", "line\u2028end?")]
        out.unlink()
    assert "1 bad rows" in capsys.readouterr().out


def test_whatever_stands_in_a_row_it_is_a_problem_or_a_named_fault(tmp_path: Path) -> None:
    """3,000 rows with fields taken out or put to something else: nothing but ValueError is raised, each row is counted once."""
    rng, shapes = random.Random(0), [*GOOD.items(), ("openthoughts", TALK), ("s1k", S1_FIRST)]
    values = [None, True, 0, -1, 3.5, math.inf, "", " ", "x", "\\boxed{", "<think>", "</think>", "\ud800", "\0", [], {}, [None], [[]], [{}], ["a"], [1], {"a": 1}, [True, False],
              "9" * 50, [{"from": "user", "value": 1}, {"from": "assistant", "value": None}], [{"from": ["user"]}]]
    for n in range(3000):
        name, row = rng.choice(shapes)
        row = {key: rng.choice(values) if rng.random() < 0.2 else value for key, value in row.items() if rng.random() < 0.95}
        row = {"row": row, "truncated_cells": rng.choice(values)} if n % 10 == 0 else row
        counts, lists = Counter(), convert.defaultdict(list)
        written = list(convert.records([(1, ("here", row))], name, CONVERTERS[name][0], set(), True, counts, lists))
        skipped = sum(count for what, count in counts.items() if what.startswith("rows skipped"))
        assert counts["rows read"] == 1 == len(written) + skipped + len(lists["bad rows passed over"]) and counts["written"] == len(written)


def test_what_is_nested_too_deeply_is_one_bad_row(tmp_path: Path) -> None:
    source, out = file_of(tmp_path, [GSM, "[" * 100_000, GSM]), tmp_path / "out.jsonl"
    assert refused("gsm8k", source, out).startswith(f"{source}, row 2: maximum recursion depth exceeded")
    assert len(run("gsm8k", source, out, "--skip_bad")) == 2
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert "deep.json: maximum recursion" in refused("gsm8k", tmp_path / "deep.json", tmp_path / "other.jsonl")


def test_the_first_20_bad_rows_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = file_of(tmp_path, [GSM, *[{**GSM, "question": ""}] * 23])
    assert len(run("gsm8k", source, tmp_path / "out.jsonl", "--skip_bad")) == 1
    told = capsys.readouterr().out
    assert "23 bad rows passed over" in told and told.count("field 'question'") == 20 and "row 21: " in told and "row 22: " not in told and told.rstrip().endswith(", ...")

# ------------------------------------------------------------------------------------------------ files in


def test_every_converter_from_every_kind_of_file(tmp_path: Path) -> None:
    for name, row in GOOD.items():
        out = tmp_path / f"{name}.out.jsonl"
        served = {"features": [], "rows": [{"row_idx": 0, "row": row, "truncated_cells": []}], "num_rows_total": 1, "partial": False}
        (tmp_path / "served.json").write_text(json.dumps(served))
        found = [run(name, source, out, "--overwrite") for source in (file_of(tmp_path, [row]), file_of(tmp_path, [row], "rows.json"), tmp_path / "served.json")]
        assert len(found[0]) == 1 and found[0] == found[1] == found[2]
        lines = out.read_text(encoding="utf-8").split("\n")
        assert lines[1:] == [""] and list(json.loads(lines[0])) == ["id", "problem", "answer", "teachers", "domain"]
        assert bool(found[0][0].teachers) == (name in ("openr1", "openthoughts", "s1k", "gsm8k"))
    assert [p.problem for p in load_problems(tmp_path / "openr1.out.jsonl")] == ["What is $1+1$?"] and load_problems(tmp_path / "openr1.out.jsonl")[0].id == R1["uuid"]


def test_lines_under_the_name_json_and_a_byte_order_mark(tmp_path: Path) -> None:
    (source := tmp_path / "rows.json").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in questions("One?", "Two?")) + b"\r\n")
    assert [p.problem for p in run("gsm8k", source, tmp_path / "a.jsonl")] == ["One?", "Two?"]
    source.write_text(json.dumps(GSM) + "\n{broken\n")
    assert refused("gsm8k", source, tmp_path / "b.jsonl").startswith(f"{source}, row 2: not valid JSON")


def test_instructions_of_other_projects_are_taken_off(tmp_path: Path) -> None:
    assert run("openthoughts", file_of(tmp_path, [TALK]), tmp_path / "a.jsonl")[0].problem == "What is 2+2?"
    assert run("aime24", file_of(tmp_path, [{"prompt": f"Find $x$.\n{INSTRUCTION}", "answer": 7}]), tmp_path / "b.jsonl")[0] == Problem("aime24-1", "Find $x$.", "7")


@pytest.mark.parametrize("name", GOOD)
def test_parquet_round_trip(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: Parquet is not checked")
    import pyarrow
    from pyarrow import parquet
    field = next(key for key in ("problem", "question", "Question") if key in GOOD[name])
    rows = [{**GOOD[name], field: f"Number {n}?"} for n in range(600)]                # more than two batches
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=250)
    once, again = run(name, tmp_path / "rows.parquet", tmp_path / "a.jsonl"), run(name, file_of(tmp_path, rows), tmp_path / "b.jsonl")
    assert len(once) == 600 and once == again
    parquet.write_table(pyarrow.Table.from_pylist([*rows[:3], {**rows[3], field: None}]), tmp_path / "bad.parquet")
    assert f"bad.parquet, row 4: field {field!r}" in refused(name, tmp_path / "bad.parquet", tmp_path / "c.jsonl")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-100])
    assert str(tmp_path / "torn.parquet") in refused(name, tmp_path / "torn.parquet", tmp_path / "c.jsonl")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    assert "pip install pyarrow" in refused("gsm8k", tmp_path / "rows.parquet", out)
    assert "pip install datasets, or --input a .json or .jsonl file" in refused("gsm8k", "openai/gsm8k", out)
    assert "pip install datasets" in refused("s1k", "", out)
    assert "No such file" in refused("gsm8k", tmp_path / "typo.jsonl", out) and "No such file" in refused("gsm8k", "typo.json", out)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("rows.json", "{", "rows.json: Expecting property name"),
    ("rows.json", '"text"', "rows.json: expected a .jsonl or .parquet file, or a .json list of rows"),
    ("rows.json", '{"rows": 3}', "expected a .jsonl or .parquet file, or a .json list of rows"),
    ("rows.json", '{"question": "a"}', "expected a .jsonl or .parquet file, or a .json list of rows"),
    ("rows.csv", "question,answer\n", "rows.csv: expected a .jsonl or .parquet file"),
    ("rows.jsonl", "\n \n", "nothing to write to"),
    ("rows.json", "[]", "nothing to write to"),
])
def test_files_that_hold_no_rows(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    assert message in refused("gsm8k", tmp_path / name, tmp_path / "out.jsonl")


def test_the_hub_is_asked_for_data_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: object, **flags: object) -> list[dict]:
        calls.append((args, flags))
        return [GOOD[name]]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in CONVERTERS:
        convert.main([name, "--out", str(tmp_path / f"{name}.jsonl")])
        assert len(load_problems(tmp_path / f"{name}.jsonl")) == 1
    name = "gsm8k"
    for source in ("mine/copy", "openai/gsm8k:main:test", "mine/copy::validation"):
        run(name, source, tmp_path / "out.jsonl", "--overwrite")
    assert calls == [((repository, config), {"split": split}) for repository, config, split in [
        ("open-r1/OpenR1-Math-220k", "default", "train"), ("open-thoughts/OpenThoughts-114k", "metadata", "train"), ("simplescaling/s1K-1.1", None, "train"),
        ("openai/gsm8k", "main", "train"), ("HuggingFaceH4/MATH-500", None, "test"), ("HuggingFaceH4/aime_2024", None, "train"), ("math-ai/aime25", None, "test"),
        ("Idavidrein/gpqa", "gpqa_diamond", "train"), ("mine/copy", None, "train"), ("openai/gsm8k", "main", "test"), ("mine/copy", None, "validation")]]

# ------------------------------------------------------------------------------------------------ what is kept, and the account of it


def test_limit_draws_by_seed_and_keeps_the_order(tmp_path: Path) -> None:
    source = file_of(tmp_path, questions(*(f"Question {n}?" for n in range(1, 101))))
    drawn = {}
    for limit, seed in ((10, 0), (10, 0), (10, 1), (30, 0), (1, 0), (100, 0), (500, 3)):
        got = [(p.id, p.problem) for p in run("gsm8k", source, tmp_path / "out.jsonl", "--limit", limit, "--seed", seed, "--overwrite")]
        numbers = [int(i.split("-")[1]) for i, _ in got]
        assert numbers == sorted(set(numbers)) and len(numbers) == min(limit, 100) and all(text == f"Question {n}?" for n, (_, text) in zip(numbers, got))
        assert drawn.setdefault((limit, seed), numbers) == numbers
    assert drawn[10, 0] != drawn[10, 1] != list(range(1, 11)) and set(drawn[1, 0]) < set(drawn[10, 0]) < set(drawn[30, 0])
    times = Counter(n for seed in range(200) for n in numbers_of(seed))
    assert len(times) == 20 and all(25 <= count <= 80 for count in times.values())           # 200 draws of 5 from 20: 50 each, sd 6.1
    with pytest.raises(SystemExit) as stop:
        convert.main(["gsm8k", "--input", str(source), "--out", str(tmp_path / "other.jsonl"), "--limit", "-1"])
    assert stop.value.code == 2 and not (tmp_path / "other.jsonl").exists()


def numbers_of(seed: int) -> list[int]:
    """The draw of main, as it is written there."""
    draw = random.Random(seed)
    return [n for _, n in sorted((draw.random(), n) for n in range(20))[:5]]


def test_limit_draws_the_smallest_numbers(tmp_path: Path) -> None:
    source = file_of(tmp_path, questions(*(f"Question {n}?" for n in range(20))))
    for seed in range(5):
        got = [int(p.id.split("-")[1]) - 1 for p in run("gsm8k", source, tmp_path / "out.jsonl", "--limit", 5, "--seed", seed, "--overwrite")]
        assert got == sorted(numbers_of(seed))


def test_rows_outside_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    kept = numbers_of(7)
    rows = [GSM if n in kept else {"broken": n} for n in range(20)]
    assert len(run("gsm8k", file_of(tmp_path, rows), tmp_path / "out.jsonl", "--limit", 5, "--seed", 7)) == 5


def test_repeated_problems_are_reported_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = file_of(tmp_path, questions("How many has Ann?", "how many  has\nANN", "How many has Bob?", "How-many: has (Ann)!?", "∀?", "∃?", "∀?"))
    assert [p.id for p in run("gsm8k", source, tmp_path / "out.jsonl")] == [f"gsm8k-{n}" for n in range(1, 8)]
    assert capsys.readouterr().out == ("7 rows read\n7 written\n3 repeat an earlier problem, and were kept: gsm8k-2 = gsm8k-1, gsm8k-4 = gsm8k-1, gsm8k-7 = gsm8k-5\n")


def test_ids_become_unique(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [R1, {**R1, "problem": "Another?"}, {**R1, "problem": "A third?", "uuid": None}, {**R1, "problem": "A fourth?", "uuid": "b"}, {**R1}]
    got = run("openr1", file_of(tmp_path, rows), tmp_path / "out.jsonl")
    assert [p.id for p in got] == [R1["uuid"], f"{R1['uuid']}-openr1-2", "openr1-3", "b", f"{R1['uuid']}-openr1-5"]
    assert f"1 repeat an earlier problem, and were kept: {R1['uuid']}-openr1-5 = {R1['uuid']}\n" in capsys.readouterr().out


def test_skipped_rows_and_generations_are_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    unverified, unclosed = {**R1, "correctness_math_verify": None}, {**R1, "generations": ["<think>a"] * 3}
    run("openr1", file_of(tmp_path, [R1, unverified, unclosed, unverified, {**R1, "problem": "Another?"}]), tmp_path / "out.jsonl")
    told = capsys.readouterr().out.split("\n")
    assert sorted(told[:5]) == sorted(["5 rows read", "2 written", "2 rows skipped: no generation verified by Math-Verify",
                                       "1 rows skipped: no verified generation with one closed <think> block",
                                       "2 generations left out: not verified, or not one closed <think> block"]) and len(told) == 6
    assert refused("openr1", file_of(tmp_path, [unverified]), tmp_path / "none.jsonl").startswith("nothing to write to")
    assert "1 rows skipped: no generation verified" in capsys.readouterr().out

# ------------------------------------------------------------------------------------------------ contamination


def test_words_and_grams() -> None:
    assert normalised("Let $x_1 = \\frac{3}{4}$; FIND  x₁\tnow, É!") == "let x 1 frac 3 4 find x₁ now é" and normalised("∀ ∃") == "∀ ∃"
    letters = "a b c d e f g h i j k l m n o".split()
    assert grams(" ".join(letters)) == {" ".join(letters[i:i + 13]) for i in range(3)} and grams(" ".join(letters[:13])) == {" ".join(letters[:13])}
    assert grams("A, b?") == {"a b"} and grams("∀") == {"∀"}


WORDS = "amy has three red pens and buys four more at the shop near home".split()             # 14 of them
SAME = " ".join(WORDS[:13])


@pytest.mark.parametrize(("problem", "dropped"), [
    (SAME, True),
    (f"Before that: {SAME}, and after it as well.", True),
    (SAME.upper().replace(" ", " -- "), True),                                               # case and punctuation
    (SAME.replace(" ", "\n\t ") + "?", True),                                                # whitespace
    (f"($\\text{{{SAME}}}$)", True),
    (" ".join(WORDS[1:14]), True),                                                           # the second run of 13
    (" ".join(WORDS[:12]), False),                                                           # 12 shared words, a whole problem of 12
    (" ".join(WORDS[:12]) + " downtown and then goes on to many others", False),             # 12 shared words in a long one
    (f"so {' '.join(WORDS[2:14])} again and again", False),                                  # the last 12
    (SAME.replace("three", "3"), False),
    (SAME.replace("amy has", "amyhas") + " near home", False),
    (SAME.replace("four", "fo-ur"), False),
    ("What is $2+2$?", True),                                                                # short ones are compared whole
    ("WHAT, is 2 2", True),
    ("Now what is 2+2?", False),
    ("What is 2?", False),
    ("∀", True),
    ("∃", False),
])
def test_exclusion_of_evaluation_problems(tmp_path: Path, capsys: pytest.CaptureFixture, problem: str, dropped: bool) -> None:
    held = file_of(tmp_path, [{"id": "e1", "problem": " ".join(WORDS), "answer": "7"}], "one.jsonl")
    short = file_of(tmp_path, [{"id": "e2", "problem": "what is 2 + 2", "answer": "4"}, {"id": "e3", "problem": "∀", "answer": "4"}], "two.jsonl")
    source = file_of(tmp_path, questions("Quite another problem.", problem))
    got = run("gsm8k", source, tmp_path / "out.jsonl", "--exclude", held, short)
    assert [p.id for p in got] == ["gsm8k-1"] + ["gsm8k-2"] * (not dropped)
    told = capsys.readouterr().out
    assert ("1 dropped by --exclude: gsm8k-2\n" if dropped else "0 dropped by --exclude\n") in told and f"2 rows read\n{2 - dropped} written\n" in told


def test_exclusion_names_the_first_20_and_takes_what_convert_wrote(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = questions(*(f"Question {n}?" for n in range(1, 31)))
    run("gsm8k", file_of(tmp_path, rows[:25]), tmp_path / "test.jsonl")
    capsys.readouterr()
    for exclude in (tmp_path / "test.jsonl", tmp_path):                                      # a folder holds its evaluation problems in test.jsonl
        assert [p.id for p in run("gsm8k", file_of(tmp_path, rows), tmp_path / "out.jsonl", "--exclude", exclude, "--overwrite")] == [f"gsm8k-{n}" for n in range(26, 31)]
        assert f"25 dropped by --exclude: {', '.join(f'gsm8k-{n}' for n in range(1, 21))}, ...\n" in capsys.readouterr().out
    run("gsm8k", file_of(tmp_path, rows[5:]), tmp_path / "out.jsonl", "--exclude", tmp_path / "test.jsonl", "--overwrite")
    assert f"20 dropped by --exclude: {', '.join(f'gsm8k-{n}' for n in range(1, 21))}\n" in capsys.readouterr().out
    assert "nothing to write" in refused("gsm8k", file_of(tmp_path, rows[:25]), tmp_path / "none.jsonl", "--exclude", tmp_path / "test.jsonl")
    assert "unknown field 'question'" in refused("gsm8k", file_of(tmp_path, rows), tmp_path / "none.jsonl", "--exclude", file_of(tmp_path, rows, "raw.jsonl"))
    assert "no problems at" in refused("gsm8k", file_of(tmp_path, rows), tmp_path / "none.jsonl", "--exclude", tmp_path / "typo.jsonl")


def test_a_dropped_problem_is_no_earlier_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    held = file_of(tmp_path, [{"id": "e", "problem": "Held out?", "answer": "7"}], "eval.jsonl")
    run("gsm8k", file_of(tmp_path, questions("Held out?", "Held out!", "Free?")), tmp_path / "out.jsonl", "--exclude", held)
    assert capsys.readouterr().out == "3 rows read\n1 written\n2 dropped by --exclude: gsm8k-1, gsm8k-2\n"


def test_a_bad_line_of_exclude_stops_or_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Left unread it would let its problem into training, so it is never passed over in silence."""
    held = file_of(tmp_path, [{"id": "e", "problem": "Held out?", "answer": "1"}, {"id": "f", "problem": "Held out, too?"}, "{broken"], "held.jsonl")
    source = file_of(tmp_path, questions("Held out?", "Held out, too?", "Free?"))
    assert f"{held}:3: not valid JSON" in refused("gsm8k", source, tmp_path / "out.jsonl", "--exclude", held)
    assert [p.id for p in run("gsm8k", source, tmp_path / "out.jsonl", "--exclude", held, "--skip_bad")] == ["gsm8k-2", "gsm8k-3"]
    err = capsys.readouterr().err
    assert f"2 bad lines of {held} passed over:" in err and f"  {held}:2: field 'answer'" in err and f"  {held}:3: not valid JSON" in err

# ------------------------------------------------------------------------------------------------ the file that is written


def test_an_existing_file_is_refused(tmp_path: Path) -> None:
    source, out = file_of(tmp_path, [GSM]), tmp_path / "out.jsonl"
    out.write_text("precious")
    before = Path(source).read_bytes()
    assert refused("gsm8k", source, source, "--overwrite") == f"--out {source}: is {source}, which is read: choose another --out" and Path(source).read_bytes() == before
    assert refused("gsm8k", source, out) == f"{out} exists already: choose another --out, or pass --overwrite"
    assert out.read_text() == "precious" and len(run("gsm8k", source, out, "--overwrite")) == 1
    assert refused("gsm8k", source, tmp_path) == f"{tmp_path} exists already: choose another --out, or pass --overwrite"


def test_a_failure_keeps_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    assert "row 3" in refused("gsm8k", file_of(tmp_path, [GSM, GSM, {}]), out, "--overwrite")          # `refused` compares the folder
    assert "directory" in refused("gsm8k", file_of(tmp_path, [GSM]), tmp_path, "--overwrite").lower()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stop_at_three(row: dict) -> dict:
        seen.extend(path.name for path in tmp_path.iterdir() if path.name.startswith("."))            # the file aside is what grows
        assert not (tmp_path / "out.jsonl").exists()
        if len(seen) == 3:
            raise KeyboardInterrupt
        return gsm8k(row)
    monkeypatch.setitem(CONVERTERS, "gsm8k", (stop_at_three, ""))
    source = file_of(tmp_path, [GSM] * 5)
    with pytest.raises(KeyboardInterrupt):
        convert.main(["gsm8k", "--input", str(source), "--out", str(tmp_path / "out.jsonl")])
    assert len(set(seen)) == 1 and [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_two_conversions_at_once_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of one, another process fails at the same --out, and a third one is through: the file is that one's, whole, and the first says that it is there."""
    source, out = file_of(tmp_path, [GSM] * 3), tmp_path / "out.jsonl"
    other = [sys.executable, "data.py", "convert", "gsm8k", "--input", str(source), "--out", str(out)]

    def meanwhile(row: dict) -> dict:
        if not out.exists():
            for more, status in (["--exclude", "nosuch"], 1), ([], 0):
                assert subprocess.run([*other, *more], cwd=Path(convert.__file__).parent, capture_output=True).returncode == status
        return gsm8k(row)
    monkeypatch.setitem(CONVERTERS, "gsm8k", (meanwhile, ""))
    with pytest.raises(SystemExit, match=f"error: {out} exists already: choose another --out, or pass --overwrite"):
        convert.main(["gsm8k", "--input", str(source), "--out", str(out)])
    assert len(load_problems(out)) == 3 and sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_the_file_aside_becomes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renamed, not copied: a reader of --out sees the old file or the whole new one."""
    inodes = set()

    def look(row: dict) -> dict:
        inodes.update(path.stat().st_ino for path in tmp_path.iterdir() if path.name.startswith("."))
        return gsm8k(row)
    monkeypatch.setitem(CONVERTERS, "gsm8k", (look, ""))
    (tmp_path / "out.jsonl").write_text("old")
    run("gsm8k", file_of(tmp_path, [GSM] * 3), tmp_path / "out.jsonl", "--overwrite")
    assert inodes == {(tmp_path / "out.jsonl").stat().st_ino}


def test_an_impossible_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as stop:
        convert.main(["gsm8k", "--input", str(file_of(tmp_path, [GSM])), "--out", str(tmp_path / "file" / "out.jsonl")])
    assert str(stop.value.code).startswith("error: ")
    assert len(run("gsm8k", tmp_path / "rows.jsonl", tmp_path / "new" / "folder" / "out.jsonl")) == 1


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    source, out = file_of(tmp_path, [GSM]), tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["convert.py", "gsm8k", "--input", str(source), "--out", str(out)])
    runpy.run_path(str(ROOT / "convert.py"), run_name="__main__")
    assert capsys.readouterr().out == "1 rows read\n1 written\n" and load_problems(out)[0].answer == "1,048"
    for wrong in (["gsm9k", "--out", "x"], ["gsm8k"], ["gsm8k", "--out", "x", "--over"], ["gsm8k", "--out", "x", "--limit", "ten"]):
        with pytest.raises(SystemExit) as stop:
            convert.main(wrong)
        assert stop.value.code == 2


def test_a_bad_command_ends_with_status_1(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "convert.py", "gsm8k", "--input", file_of(tmp_path, [{}]), "--out", tmp_path / "out.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "") and re.fullmatch("error: .*field 'answer' must be a non-empty string, got None .*\n", done.stderr)

# ------------------------------------------------------------------------------------------------ real data


def real(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not there")
    return DATA / name


@pytest.mark.parametrize(("name", "file", "rows"), [("gsm8k", "gsm8k_train.jsonl", 7473), ("gsm8k", "gsm8k_test.jsonl", 1319), ("gsm8k", "gsm8k_test_socratic.jsonl", 1319)])
def test_real_gsm8k(tmp_path: Path, capsys: pytest.CaptureFixture, name: str, file: str, rows: int) -> None:
    got = run(name, real(file), tmp_path / "out.jsonl")
    raw = [json.loads(line) for line in real(file).read_text(encoding="utf-8").splitlines()]
    assert capsys.readouterr().out == f"{rows} rows read\n{rows} written\n" and len(got) == len(raw) == rows              # no repeats
    for problem, row in zip(got, raw):
        assert problem.answer == row["answer"].split("\n#### ")[1].strip() and problem.problem == row["question"].strip() and problem.domain == "math"
        (teacher,) = problem.teachers
        assert "<<" not in teacher and ">>" not in teacher and "####" not in teacher and len(teacher) > 10
        assert teacher.split() == re.sub("<<.*?>>", "", row["answer"].rpartition("####")[0]).split()                      # nothing else is gone


def test_real_evaluation_sets(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    got = run("math500", real("math500.json"), tmp_path / "math.jsonl")
    raw = json.loads(real("math500.json").read_text(encoding="utf-8"))
    assert [(p.id, p.problem, p.answer) for p in got] == [(r["unique_id"], r["problem"].strip(), r["answer"]) for r in raw] and len(got) == 500
    assert not any(p.teachers for p in got) and Counter(p.domain for p in got)["intermediate algebra"] == 97 and len({p.domain for p in got}) == 7
    got = run("aime24", real("aime24.jsonl"), tmp_path / "aime.jsonl")
    raw = [json.loads(line) for line in real("aime24.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [int(p.answer) for p in got] == [r["answer"] for r in raw] and len(got) == 30 and not any("step by step" in p.problem for p in got)
    assert [f"{p.problem}\n{INSTRUCTION}" for p in got] == [r["prompt"] for r in raw]
    assert capsys.readouterr().out == "500 rows read\n500 written\n30 rows read\n30 written\n"


def plain_overlap(train: list[str], test: list[str]) -> list[int]:
    """Twin of --exclude without regular expressions: numbers of the training problems that share a run of 13 words (or all of fewer)."""
    def runs(problem: str) -> set[tuple[str, ...]]:
        words = "".join(c if c.isalnum() else " " for c in problem.lower()).split()
        return {tuple(words[i:i + 13]) for i in range(len(words) - 12)} or {tuple(words)}
    held = set().union(*map(runs, test))
    return [n for n, problem in enumerate(train, 1) if runs(problem) & held]


def test_real_overlap_of_gsm8k_train_and_test(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """4 of the 7,473: the same story with other names and numbers. None of MATH-500 or AIME 2024."""
    test, math = run("gsm8k", real("gsm8k_test.jsonl"), tmp_path / "test.jsonl"), run("math500", real("math500.json"), tmp_path / "math.jsonl")
    aimes = run("aime24", real("aime24.jsonl"), tmp_path / "aime.jsonl")
    train = run("gsm8k", real("gsm8k_train.jsonl"), tmp_path / "train.jsonl")
    capsys.readouterr()
    kept = run("gsm8k", real("gsm8k_train.jsonl"), tmp_path / "clean.jsonl", "--exclude", *(tmp_path / f"{name}.jsonl" for name in ("test", "math", "aime")))
    assert capsys.readouterr().out == "7473 rows read\n7469 written\n4 dropped by --exclude: gsm8k-21, gsm8k-407, gsm8k-1315, gsm8k-5163\n"
    assert plain_overlap([p.problem for p in train], [p.problem for p in test]) == [21, 407, 1315, 5163] and len(kept) == 7469
    assert plain_overlap([p.problem for p in train], [p.problem for p in math + aimes]) == []
