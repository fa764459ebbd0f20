"""What a completion is worth: structure (GSRM), outcome (grading), format; and how that becomes the advantage of a row over the others of its group.

    gdpo (the default)    advantage = sum of the weights times each reward against the others of its group
    sum (the paper's)     advantage = the weighted sum of the rewards against the others of its group           a reward is a number, or None = could not be scored

Add a reward of your own in `score` (a list with a number or None per row) and its weight in `reward_weights`; or give one in the place of GSRM's by
--structure_reward module:function, as `line_similarity` is one. None never becomes 0: the row is left out of its group and of the loss, and is counted.
"""
import math
import re
from difflib import SequenceMatcher
from typing import Protocol

import torch

from data import Problem, split_completion
from grade import final_answer, grade_all
from grpo import combine_advantages, scored_rows
from gsrm import GSRM, Score


class Settings(Protocol):
    """What is read of train.Config."""
    w_structure: float
    w_outcome: float
    w_format: float
    max_teachers: int
    combine: str
    scale: str
    group_size: int


def reward_weights(config: Settings) -> dict[str, float]:
    return {"structure": config.w_structure, "outcome": config.w_outcome, "format": config.w_format}


def format_reward(text: str, finished: bool) -> float:
    """1 for a finished completion of the form [<think>] trace </think> final, with a boxed final answer; else 0."""
    trace, final = split_completion(text)
    boxed = final is not None and re.search(r"\\(?:boxed|fbox)\s*\{", final) and final_answer(text)
    return float(bool(finished and boxed and "think>" not in final and "<think>" not in trace))


def line_similarity(problems: list[str], traces: list[str], teacher_traces: list[list[str]]) -> list[float | None]:
    """A baseline without a model that reads or judges (in the manner of SRL, arXiv 2510.25992): difflib's ratio, in words, of the student's i-th line and the teacher's
    i-th line, mean over the teacher's lines (0 where the student has none), of the teacher trace that it is nearest to; in [0, 1], None without a teacher's."""
    lines = lambda text: [line.split() for line in text.strip().splitlines() if line.strip()]
    near = lambda student, teacher: sum(SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in zip(student, teacher)) / max(1, len(teacher))
    return [max((near(lines(trace), lines(teacher)) for teacher in teachers), default=None) for trace, teachers in zip(traces, teacher_traces, strict=True)]


def score(problems: list[Problem], texts: list[str], finished: list[bool], gsrm: GSRM | None, config: Settings) -> tuple[dict[str, list[float | None]], list[Score | None]]:
    """(rewards by name, each (N,) with None where unscored; the structure Scores) of N completions, row n belonging to problems[n]."""
    rewards: dict[str, list[float | None]] = {}
    scores: list[Score | None] = [None] * len(texts)
    if config.w_structure:
        traces = [list(p.teachers[:config.max_teachers or None]) for p in problems]
        scores = list(gsrm(problems, [split_completion(text)[0] for text in texts], traces))
        rewards["structure"] = [s.value for s in scores]
    rewards["outcome"] = [None if right is None else float(right) for right in grade_all(texts, [p.answer for p in problems])]
    rewards["format"] = [format_reward(text, done) for text, done in zip(texts, finished, strict=True)]
    return {name: [None if v is None or math.isnan(v) else v for v in values] for name, values in rewards.items()}, scores


def advantages(rewards: dict[str, list[float | None]], config: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """((N,) advantages, (N,) bool scored) of this process's rewards."""
    tables = {name: torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64).view(-1, config.group_size) for name, values in rewards.items()}
    weights = {name: w for name, w in reward_weights(config).items() if name in tables}
    if not any(weights.values()):                        # distillation alone (--teacher_kl): no row is better than another
        return torch.zeros(len(rewards["outcome"])), torch.ones(len(rewards["outcome"]), dtype=torch.bool)
    scored = scored_rows(tables, weights)
    return combine_advantages(tables, weights, scored, config.combine, config.scale).flatten(), scored.flatten()
