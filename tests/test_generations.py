"""Stored completions of generations.py: reading, checking field by field, picking out and printing. `python -m pytest tests/test_generations.py`"""
import json
from pathlib import Path

import pytest
from tiny import row

from data import write_jsonl
from generations import FIELDS, flags_of, read_generations, rows_to_show, settings_path, show, structure_fields
from gsrm import Score, Step


def store(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path

# ------------------------------------------------------------------------------------------------ reading

def test_what_is_no_file_of_generations_is_named(tmp_path):
    (tmp_path / "broken.jsonl").write_text(json.dumps(row("p", True)) + "\n{\"id\": 3,\n")
    (tmp_path / "other.jsonl").write_text('{"id": "p", "problem": "?", "answer": "1"}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n")
    for name, words in (("broken.jsonl", r"broken.jsonl:2: not valid JSON"), ("other.jsonl", "other.jsonl:1: not a generation, it has no 'sample'"),
                        ("list.jsonl", "list.jsonl:1: not a generation"),
                        ("empty.jsonl", "holds no generations"), ("picture.png", "picture.png:1: not valid JSON"), ("nowhere", "no generations at")):
        with pytest.raises(ValueError, match=words):
            read_generations(tmp_path / name)


@pytest.mark.parametrize("twice, first, again", [
    (row("q", False), 2, 5), (row("q", True, temperature=0.6), 2, 5), (row("q", True, temperature=0), 4, 5), (row("q", True, sample=1), 3, 5)])
def test_a_sample_that_is_there_twice_is_named(tmp_path, twice, first, again):
    """Greedy and sampled ones of a problem, which train.py keeps in one file, are two; a temperature that differs makes no other sample."""
    rows = [row("p", True), row("q", True), row("q", False, sample=1), row("q", True, temperature=0.0)]
    assert read_generations(store(tmp_path / "rows.jsonl", rows)) == rows
    store(tmp_path / "rows.jsonl", [*rows, twice])
    with pytest.raises(ValueError, match=rf"rows.jsonl:{again}: problem 'q', sample {twice['sample']} is in \S*rows.jsonl:{first} already"):
        read_generations(tmp_path / "rows.jsonl")


WRONG = {
    "id": [3, None, ["p"]], "sample": ["0", None, -1, True], "temperature": ["1", -1, float("inf"), None], "correct": ["true", 1, 2], "answer": [4], "gold": [None, 7],
    "problem": [None], "text": [None, 3, "\ud800"], "length": ["3", -1, 1.5, True, 10**400], "stop": [["stop"], None, "eos"], "structure": ["0.5", float("nan"), 10**400, True],
    "true_structure": ["1"], "reason": [3], "steps": ["x", [["meta"]], [["meta", "query", "answer", "1"]], [["meta", "query", None, 1.0]]], "choices": [[1], "x"],
    "left_at": ["1", -1], "trace": [1.5], "step": ["1"], "advantage": ["1", None], "rewards": [[], {"structure": "1"}],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_a_field_of_another_type_is_named_with_its_line(tmp_path, name, value):
    """A verdict "true" would be counted as no number, or with the others; a text null would end in a traceback."""
    good = rollout(1, "p", 0, 0.5) | {"steps": [["meta", "query", "answer", 1]], "choices": [True], "trace": 0, "reason": None, "temperature": 0}
    file = store(tmp_path / "rows.jsonl", [good])
    assert read_generations(file) == [good] == rows_to_show(file, None, None, None) and show(good)
    store(file, [good, good | {"sample": 1, name: value}])
    for read in (read_generations, lambda file: rows_to_show(file, None, None, None)):
        with pytest.raises(ValueError, match=rf"rows.jsonl:2: field '{name}' must be .*, got "):
            read(file)


def test_a_byte_order_mark_is_passed_over_also_where_files_were_put_together(tmp_path):
    (file := tmp_path / "rows.jsonl").write_bytes(b"".join(b"\xef\xbb\xbf" + json.dumps(rollout(1, name, 0, 0.5)).encode() + b"\r\n" for name in "pq"))
    assert read_generations(file) == rows_to_show(file, 1, None, None) == [rollout(1, name, 0, 0.5) for name in "pq"]


def test_every_field_has_a_wrong_value_above():
    assert WRONG.keys() == FIELDS.keys()


def test_a_field_that_stands_twice_is_not_its_last_value(tmp_path):
    (file := tmp_path / "rows.jsonl").write_text(json.dumps(row("p", True))[:-1] + ', "correct": false}\n')
    for read in (read_generations, lambda file: rows_to_show(file, None, None, None)):
        with pytest.raises(ValueError, match=r"rows.jsonl:1: not valid JSON \(the field 'correct' stands there twice\)"):
            read(file)


def test_settings_beside_generations_are_flags_or_nothing(tmp_path):
    assert flags_of(tmp_path / "rows.jsonl") == {}
    settings_path(tmp_path / "rows.jsonl").write_text('{"config": {"k": 4}}')
    assert flags_of(tmp_path / "rows.jsonl") == {"k": 4}
    settings_path(tmp_path / "rows.jsonl").write_text('{"config": 3}')
    with pytest.raises(ValueError, match=r"rows.settings.json: field 'config' must be an object .*, got 3"):
        flags_of(tmp_path / "rows.jsonl")


def test_what_is_kept_of_a_score():
    steps = [Step("m", "q", "1"), Step("n", "r", "2")]
    assert structure_fields(Score(0.25, [0.5, 0.0], 1, 2, steps, choices=[False, False])) == {
        "steps": [["m", "q", "1", 0.5], ["n", "r", "2", 0.0]], "choices": [False, False], "left_at": 1, "trace": 2, "reason": None}
    failed = structure_fields(Score(None, structure=steps, reason="a judgement failed"))
    assert failed["steps"] == [["m", "q", "1", 0.0], ["n", "r", "2", 0.0]] and failed["reason"] == "a judgement failed"
    assert structure_fields(None) == dict.fromkeys(failed)

# ------------------------------------------------------------------------------------------------ single completions

def rollout(step, problem, sample, advantage, **more):
    return row(problem, None, sample=sample) | {"step": step, "rewards": {"structure": 0.5, "outcome": None}, "advantage": advantage, "stop": "length", "length": 150} | more



def test_show_says_what_was_lost_and_keeps_escapes_off_the_terminal():
    r = row("p", True, "1", text="a\x1b[2Jb</think>", steps=[["m1", "q1", "a1", 1.0], ["m2", "q2", "a2", 0.5],
                                                             ["m3", "q3", "a3", 0.5], ["m4", "q4", "a\x9b4", 0.25], ["m5", "q5", "a5", 0.0]],
            choices=[True, False, True, False, False], left_at=4, structure=0.45)
    lines = [line for line in show(r).splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines[:5]] == ["+", "~", "~", "~", "x"] and "\x1b" not in show(r) and "\x9b" not in show(r)
    assert "(sub-problem differs)" in lines[1] and "(answer differs)" in lines[2] and "(sub-problem and answer differ)" in lines[3] and "left" in lines[4]
    colors = [line[:5] for line in show(r, color=True).splitlines() if line.startswith("\x1b")]
    assert colors == ["\x1b[32m", *["\x1b[33m"] * 3, "\x1b[31m"] and "not graded" in show(r | {"correct": None})


@pytest.mark.parametrize("more", [{}, {"rewards": {"structure": 0.5}, "advantage": 0.5, "step": 1}])
def test_no_field_of_a_completion_reaches_the_terminal_unfiltered(more):
    """The whole screen cleared, the window's title set: by id, problem, text, steps, and in the last line by answer or gold."""
    bad = "5\x1b[2J\x1b]0;owned\x07\x9b"
    lines = show(row(bad, True, bad, text=bad, problem=bad, gold=bad, steps=[[bad, bad, bad, 1.0]], choices=[True]) | more).splitlines()
    safe = "5?[2J?]0;owned??"
    assert not any("\x00" <= c < " " or "\x7f" <= c <= "\x9f" for line in lines for c in line)
    assert lines[0].endswith(f"problem {safe} sample 0 ") and (f"gold answer {safe}" if more else f"answer {safe} (right)") in lines[-1]


def test_rollouts_of_a_step_are_chosen_and_shown(tmp_path):
    rows = [rollout(step, name, sample, step * (i - 2) + sample / 10) for step in (1, 2) for i, name in enumerate("abcde") for sample in (0, 1)]
    write_jsonl(tmp_path / "rollouts.jsonl", rows)
    pick = lambda *args: [(r["step"], r["id"], r["sample"]) for r in rows_to_show(tmp_path, *args)]
    assert pick(None, None, None) == [(2, "e", 1), (2, "c", 0), (2, "a", 0)] and pick(1, None, None) == [(1, "e", 1), (1, "c", 0), (1, "a", 0)]
    assert pick(1, "b", None) == [(1, "b", 0), (1, "b", 1)] and pick(None, "b", 1) == [(2, "b", 1)]
    evaluated = [row(name, right, structure=structure) for name, right, structure in (("a", True, 0.0), ("b", False, 0.9), ("c", True, 0.5), ("d", False, None))]
    write_jsonl(tmp_path / "eval.jsonl", evaluated)                         # without advantages: by structure, 0 among them, then by right and wrong
    assert [r["id"] for r in rows_to_show(tmp_path / "eval.jsonl", None, None, None)] == ["b", "a", "d"]
    text = show(rows_to_show(tmp_path, None, "b", 1)[0])
    assert text.startswith("step 2 problem b sample 1") and "structure 0.50, outcome unscored, advantage -1.90, cut off at the limit, 150 tokens, gold answer 1" in text
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 3, "id"')                                      # a run is writing this line
    assert pick(None, "b", 1) == [(2, "b", 1)]
    for args, words in (((7, None, None), "no step 7; it holds steps 1 to 2"), ((1, "z", None), "no such completion; problems there: a, b")):
        with pytest.raises(ValueError, match=words):
            pick(*args)
    (tmp_path / "rollouts.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="rollouts.jsonl:1: not a completion"):
        pick(None, None, None)
    (tmp_path / "rollouts.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="rollouts.jsonl: holds no completions"):
        pick(None, None, None)
    with pytest.raises(ValueError, match="no rollouts at"):
        rows_to_show(tmp_path / "nowhere", None, None, None)


def test_steps_are_counted_where_only_some_lines_have_one(tmp_path):
    file = store(tmp_path / "rows.jsonl", [row("p", True), rollout(4, "p", 1, 0.5), rollout(3, "p", 1, 0.5)])
    with pytest.raises(ValueError, match="no step 7; it holds steps 3 to 4"):
        rows_to_show(file, 7, None, None)
    with pytest.raises(ValueError, match="no step 7; it holds no training steps"):
        rows_to_show(store(file, [row("p", True)]), 7, None, None)


def test_why_there_is_no_reward_is_shown():
    assert "structure unscored (not decomposed), outcome unscored" in show(rollout(1, "p", 0, 0.5, rewards={"structure": None, "outcome": None}, reason="not decomposed"))
    assert "structure reward unscored (a judgement failed), answer None" in show(row("p", True, reason="a judgement failed"))
    assert "structure reward 0.50, answer None" in show(row("p", True, structure=0.5, reason=None))
