"""Completions on disk: the lines of an evaluation's file and of a run's rollouts.jsonl, read back with every field checked, picked out, and printed.

    {"id": "p1", "sample": 0, "temperature": 0.6, "correct": true, "answer": "4", "gold": "4", "length": 61, "stop": "stop", "structure": 0.75, "reason": null,
     "true_structure": null, "steps": [["for Ann", "Ann has what", "4", 1.0], ...], "choices": [true, ...], "left_at": null, "text": "...", "tokens": [...], ...}

eval.py writes such lines; those that come from elsewhere can be graded, compared and shown as well. `correct`: null = could not be graded. `structure`: null = not
scored, and `reason` says why. A line of rollouts.jsonl has `step`, `rewards` and `advantage` in the place of `correct` and `structure`.
Fields beside those of FIELDS stay as they are.
"""
import re
from collections.abc import Callable
from pathlib import Path

from command import decoded, read_record
from data import half_pair, read_jsonl
from gsrm import Score

# ------------------------------------------------------------------------------------------------ one line

def structure_fields(score: Score | None) -> dict:
    """What is kept of how a completion followed the teacher: the steps with what each earned (0 where nothing was scored), which of several traces was followed and where all
    were left, and why there is no reward, or one of 0 without steps. All None where nobody was asked."""
    if score is None:
        return dict.fromkeys(("steps", "choices", "left_at", "trace", "reason"))
    earned = score.steps or [0.0] * len(score.structure)
    return {"steps": [[s.meta, s.query, s.answer, e] for s, e in zip(score.structure, earned)], "choices": score.choices, "left_at": score.left_at, "trace": score.trace,
            "reason": score.reason or None}


Test = Callable[[object], bool]


def a_text(value: object) -> bool:
    return isinstance(value, str) and not half_pair(value)


def whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def truth(value: object) -> bool:
    return isinstance(value, bool)


def a_step(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(a_text, value[:3])) and real(value[3])


def or_null(test: Test) -> Test:
    return lambda value: value is None or test(value)


def each(kind: type, values: Callable, test: Test) -> Test:
    return lambda value: isinstance(value, kind) and all(map(test, values(value)))


FIELDS: dict[str, tuple[str, Test]] = {                                      # name -> (what it has to be, is it that)
    "id": ("a text", a_text), "sample": ("a whole number", whole), "temperature": ("a number of 0 or more", lambda value: real(value) and value >= 0),
    "correct": ("true, false or null", or_null(truth)), "answer": ("a text or null", or_null(a_text)), "gold": ("a text", a_text), "problem": ("a text", a_text),
    "text": ("a text", a_text), "length": ("a whole number", whole), "stop": ('"stop" or "length"', ("stop", "length").__contains__),
    "structure": ("a number or null", or_null(real)), "true_structure": ("a number or null", or_null(real)), "reason": ("a text or null", or_null(a_text)),
    "steps": ("a list of [meta, query, answer, number], or null", or_null(each(list, iter, a_step))),
    "choices": ("a list of true and false, or null", or_null(each(list, iter, truth))),
    "left_at": ("a whole number or null", or_null(whole)), "trace": ("a whole number or null", or_null(whole)), "step": ("a whole number", whole), "advantage": ("a number", real),
    "rewards": ("an object of numbers and nulls", each(dict, dict.values, or_null(real))),
}
EVALUATED = ("id", "sample", "temperature", "correct", "structure", "true_structure", "length", "stop", "text")
SHOWN = ("id", "sample", "text", "steps", "left_at", "true_structure")       # of every completion that is printed; and then of one of a training step, or of an evaluation
TRAINED, GRADED = ("step", "rewards", "advantage", "length", "stop"), ("correct", "structure")


def check(row: object, where: str, needed: tuple[str, ...], what: str, give: str) -> dict:
    """The row itself; ValueError names the place where it is not `what`, for the lack of a field, and what to `give`, or a field that is not what FIELDS says."""
    if not isinstance(row, dict) or (missing := [name for name in needed if name not in row]):
        raise ValueError(f"{where}: not a {what}" + (f", it has no {missing[0]!r}" if isinstance(row, dict) else "") + f": give {give}")
    if wrong := next((name for name in FIELDS if name in row and not FIELDS[name][1](row[name])), None):
        raise ValueError(f"{where}: field {wrong!r} must be {FIELDS[wrong][0]}, got {repr(row[wrong])[:80]}")
    return row

# ------------------------------------------------------------------------------------------------ reading

def read_generations(path: str | Path) -> list[dict]:
    """Rows that eval.py (or train.py's evaluation) stored; ValueError names the line that is not one, or a sample that is there already."""
    if not Path(path).is_file():
        inside = Path(path) / "eval_after.jsonl"
        raise ValueError(f"no generations at {path}: give a file that eval.py wrote (--out)" + f", or {inside}" * inside.is_file())
    rows, seen = read_jsonl(path), {}
    for where, row in rows:
        check(row, where, EVALUATED, "generation", "a file that eval.py wrote (--out)")
        if (before := seen.setdefault((what := f"problem {row['id']!r}, sample {row['sample']!r}", not row["temperature"]), where)) != where:
            raise ValueError(f"{where}: {what} is in {before} already, and mean@k and pass@k would count it twice: take one of them out, or evaluate again with another --out")
    if not rows:
        raise ValueError(f"{path}: holds no generations")
    return [row for _, row in rows]


def settings_path(out: Path) -> Path:
    """Where the settings of the generations in `out` stand."""
    return out.with_name(out.name.removesuffix(".jsonl") + ".settings.json")


def flags_of(out: Path) -> dict:
    """The flags under which the generations in `out` were drawn, none where nobody wrote them down; ValueError where their file is broken."""
    if not (record := settings_path(out)).is_file():
        return {}
    if not isinstance(flags := read_record(record, "config")["config"], dict):
        raise ValueError(f"{record}: field 'config' must be an object of flags and their values, got {repr(flags)[:80]}")
    return flags


def rows_to_show(path: Path, step: int | None, problem: str | None, sample: int | None) -> list[dict]:
    """Completions of a training run's folder (its rollouts.jsonl, the last step or the given one) or of a file of generations: those of `problem` and `sample`,
    without either the best, the middle and the worst by advantage. The file is read line by line: a long run's is large. ValueError where there is none."""
    file = path / "rollouts.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no rollouts at {file}: give the folder that train.py wrote (--out), or a file of eval.py")
    kept, seen = [], set()
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = decoded(line, where := f"{file}:{number}")
            except ValueError:
                if line.endswith(b"\n"):
                    raise
                break                                    # the line that a run is writing just now
            kind = TRAINED if isinstance(row, dict) and "rewards" in row else GRADED
            check(row, where, SHOWN + kind, "completion", "the folder that train.py wrote (--out), or a file of eval.py")
            seen.add(of := row.get("step"))
            if step is None and kept and of != kept[-1].get("step"):
                kept = []                                # a later step has begun
            if step is None or of == step:
                kept.append(row)
    if not kept:
        held = f"steps {min(steps)} to {max(steps)}" if (steps := seen - {None}) else "no training steps"
        raise ValueError(f"{file}: no step {step}; it holds {held}" if seen else f"{file}: holds no completions")
    chosen = [row for row in kept if problem in (None, row["id"]) and sample in (None, row["sample"])]
    if not chosen:
        there = ", ".join(dict.fromkeys(row["id"] for row in kept))[:400]
        raise ValueError(f"{file}: no such completion; problems there: {there}, samples 0 to {max(row['sample'] for row in kept)}")
    if problem is None and sample is None:
        chosen.sort(key=lambda row: -next((float(row[name]) for name in ("advantage", "structure", "correct") if row.get(name) is not None), 0.0))
        chosen = [chosen[i] for i in sorted({0, len(chosen) // 2, len(chosen) - 1})]
    return chosen

# ------------------------------------------------------------------------------------------------ printing

COLORS = {"+": "\033[32m", "~": "\033[33m", "x": "\033[31m", "?": "\033[2m"}


def show(row: dict, color: bool = False) -> str:
    """One completion, of an evaluation or of training, with the steps that GSRM read in it, each marked by what it earned and where it left the teacher's branch.
    Control characters in a model's text do not reach the terminal."""
    plain = lambda text: re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text)
    rewards = row.get("rewards") or {"structure": row.get("structure")}
    lines = [plain(f"step {row.get('step')} " * ("step" in row) + f"problem {row['id']} sample {row['sample']} ")] if "sample" in row else []
    lines += [plain(row["problem"]), ""] if "problem" in row else []
    lines, choices = [*lines, plain(row["text"].strip()), ""], row.get("choices") or []
    for i, (meta, query, answer, earned) in enumerate(row["steps"] or []):
        mark = "?" if rewards.get("structure") is None else "+" if earned == 1 else "~" if earned else "x"
        line = f"  {mark} {earned:4.2f}  {plain(meta):<16} {plain(query):<16} {plain(answer)}"
        if mark == "~" and i < len(choices):
            line += "   (sub-problem and answer differ)" if earned < 0.5 else "   (answer differs)" if choices[i] else "   (sub-problem differs)"
        line += "   <- left the teacher's branch" if i == row["left_at"] else ""
        lines.append(COLORS[mark] + line + "\033[0m" if color else line)
    why = f" ({row['reason']})" if row.get("reason") else ""
    if "rewards" in row:
        parts = [f"{name} {'unscored' if value is None else f'{value:.2f}'}{why * (name == 'structure')}" for name, value in rewards.items()]
        parts += [f"true structure {row['true_structure']:.2f}"] if row["true_structure"] is not None else []
        parts += [f"advantage {row['advantage']:+.2f}", "stopped by itself" if row["stop"] == "stop" else "cut off at the limit", f"{row['length']} tokens"]
        return "\n".join([*lines, plain("  " + ", ".join(parts) + (f", gold answer {row['gold']}" if "gold" in row else ""))])
    verdict = {True: "right", False: "wrong", None: "not graded"}[row["correct"]]
    reward, true = (None if row[name] is None else f"{row[name]:.2f}" for name in ("structure", "true_structure"))
    return "\n".join([*lines, plain(f"  structure reward {reward or 'unscored'}{why}{f', true {true}' if true else ''}, answer {row.get('answer')} ({verdict})")])
