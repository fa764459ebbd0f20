"""What the study measures of a student: from the samples that eval.py left in a run's folder, and from the log that train.py left there.

    test.jsonl       problems as trained, many samples each          greedy.jsonl    one greedy sample of each problem, of all three sets
    transfer.jsonl   larger problems, and a wording never seen       log.jsonl, rollouts.jsonl    of an RL run

A right answer is no proof of a walk: one guess in ten is right, and a made-up last sum is a guess too. `walk` asks for every sum that the answer needs.
At the end: what tables and pictures take from the lines of all runs.
"""
import math
import re
from functools import cache
from pathlib import Path

import numpy as np

from command import read_record
from data import read_jsonl
from grade import pass_at_k
from report import by_problem, correlation, structure_report, summary
from toy import MOD

Runs = dict[tuple[str, str], dict[int, dict]]             # (regime, arm) -> seed -> its line of the results file
FACT = r"(\w+) has (?:(\w+) plus (\w+)|(\d))"           # of a question, in either wording
SETS = {"test": 12, "larger": 13, "other": 15}            # held-out sets by the seed of their problems: as trained, more people and deeper, a wording never seen


@cache
def world(problem: str) -> tuple[str, dict[str, tuple[tuple[str, ...], int]]]:
    """Who is asked for; and of everybody whose numbers theirs adds up (nobody's: it is given), and their number."""
    target = re.search(r"How many has (\w+)|(\w+) has how many", problem)
    facts = re.findall(FACT, problem)
    parts, given = {x: (a, b) if a else () for x, a, b, _ in facts}, {x: int(v) for x, _, _, v in facts if v}
    value = lambda x: given[x] if x in given else sum(map(value, parts[x])) % MOD
    return target[1] or target[2], {x: (of, value(x)) for x, of in parts.items()}


def sums(row: dict) -> tuple[set[str], list[bool]]:
    """Whose numbers a sample has by its end, from the facts or by right sums of such; and of its sums of numbers that it had by then, which are right."""
    _, people = world(row["problem"])
    known, right = {x for x, (parts, _) in people.items() if not parts}, []
    for _, query, answer, _ in row["steps"] or []:
        x, _, kind = query.partition(" ")
        if kind == "makes what" and x in people and people[x][0] and known.issuperset(people[x][0]):
            right.append(answer == str(people[x][1]))
            known |= {x} if right[-1] else set()
    return known, right


def walk(row: dict) -> tuple[str, ...] | None:
    """How a sample derived its right answer: what it looked up and added of those whom the answer needs, in its order, detours and repetitions left out. None where the
    answer is wrong; or right by a guess: a sum that it needs was not made, is wrong, or was made before its parts were known."""
    target, people = world(row["problem"])
    if not row["correct"] or target not in sums(row)[0]:
        return None
    needed = [target]
    for x in needed:
        needed.extend(part for part in people[x][0] if part not in needed)
    return tuple(dict.fromkeys(query for _, query, *_ in row["steps"] if query.partition(" ")[0] in needed))


def measures(rows: list[dict], greedy: list[dict]) -> tuple[dict[str, float], list[dict]]:
    """The study's measures of one student on one set of problems, k samples of each and a greedy one; and structure_report's steps."""
    means, (branch, steps), groups = summary(rows), structure_report(rows), list(by_problem(rows).values())
    made = [right for row in rows for right in sums(row)[1]]
    k, walks = len(groups[0]), [[found for row in group if (found := walk(row)) is not None] for group in groups]
    return {"greedy": summary(greedy)["mean@1"][0], "sampled": means[f"mean@{k}"][0], **{m: v[0] for m, v in means.items() if m.startswith("pass@")},
            **{f"found@{2**i}": float(np.mean([pass_at_k(k, len(right), 2**i) for right in walks])) for i in range(k.bit_length())},
            "structure": means["structure"][0], "choice": branch["choice accuracy"][0], "answer": branch["answer accuracy on the branch"][0],
            "sums": sum(made) / len(made) if made else math.nan,
            "paths": float(np.mean([len(set(right)) for right in walks])), "length": means["length"][0], "truncated": means["truncated"][0]}, steps


def figures(sampled: list[dict], transfer: list[dict], greedy: list[dict]) -> dict[str, float | list[float]]:
    """The measures on problems as trained (`sampled`), on the two other sets (in `transfer`; named "larger" for its sampled accuracy, "larger choice" and so on), greedy ones
    of all three in `greedy`; and where students leave the teacher's branch."""
    of = lambda rows, name: [r for r in rows if r["id"].split("-")[2] == str(SETS[name])]
    out, steps = measures(sampled, of(greedy, "test"))
    for name in ("larger", "other"):
        out |= {name if m == "sampled" else f"{name} {m}": value for m, value in measures(of(transfer, name), of(greedy, name))[0].items()}
    stayed, share = [r for r in sampled if r["left_at"] is None and r["steps"]], lambda some: len(list(some)) / len(sampled)
    return out | {"left": [step["left"] / len(sampled) for step in steps[:24]], "never left": share(stayed), "stayed and found": share(r for r in stayed if walk(r) is not None),
                  "no steps": share(r for r in sampled if not r["steps"])}


def training(out: Path) -> dict[str, str | float | dict[str, list[float]]]:
    """The commit of what trained here; of an RL run its learning curves, means of ten steps each, and r of its structure reward and the true structure over the last 24 steps."""
    record = next((read_record(file) for file in (out / "run.json", out / "model/sft.json") if file.exists()), {})
    commit = {"commit": record["commit"]} if record.get("commit") else {}
    if not (out / "log.jsonl").exists():
        return commit
    log = [row for _, row in read_jsonl(out / "log.jsonl")]
    names = {"outcome": "rewards/outcome/mean", "structure": "rewards/structure/mean", "true_structure": "true_structure", "length": "completions/mean_length",
             "entropy": "entropy", "unscored": "unscored"}
    known = lambda rows, key: [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]         # a step without a scored row has none
    mean = lambda rows, key: float(np.mean(known(rows, key))) if known(rows, key) else math.nan
    curves: dict = commit | {"curve": {name: [mean(log[i:i + 10], key) for i in range(0, len(log), 10)] for name, key in names.items() if key in log[0]}}
    if "rewards/structure/mean" in log[0]:
        curves["r"] = correlation([{"structure": row["rewards"]["structure"], "true_structure": row["true_structure"]}
                                   for _, row in read_jsonl(out / "rollouts.jsonl") if row["step"] > len(log) - 24])
    return curves


def rounded(value):
    """A line of the results as it is written: five digits, four in lists; null where there is no number."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [v if v is None else round(v, 4) for v in map(rounded, value)]
    return value if not isinstance(value, float) else round(value, 5) if math.isfinite(value) else None


def measured(out: Path) -> dict:
    """figures() of the samples that the evaluations have left in a run's folder."""
    rows = {name: [row for _, row in read_jsonl(out / f"{name}.jsonl")] for name in ("greedy", "test", "transfer")}
    return rounded(figures(rows["test"], rows["transfer"], rows["greedy"]))

# ------------------------------------------------------------------------------------------------ of all runs

def gathered(rows: list[dict]) -> Runs:
    runs: Runs = {}
    for row in rows:
        runs.setdefault((row["regime"], row["arm"]), {})[row["seed"]] = row
    return runs


def values(runs: Runs, regime: str, arm: str, name: str) -> np.ndarray:
    """A figure of every seed, in their order."""
    return np.array([row[name] for _, row in sorted(runs.get((regime, arm), {}).items()) if row.get(name) is not None], dtype=float)


def gains(runs: Runs, regime: str, arm: str, against: str, name: str) -> np.ndarray:
    """arm - against, of the seeds that both have."""
    a, b = runs.get((regime, arm), {}), runs.get((regime, against), {})
    return np.array([a[seed][name] - b[seed][name] for seed in sorted(a.keys() & b.keys()) if None not in (a[seed].get(name), b[seed].get(name))], dtype=float)


def gap(curve: dict[str, list[float | None]]) -> np.ndarray:
    """The structure reward minus the true one along a curve; NaN where a step had no scored row."""
    return np.array(curve["structure"], dtype=float) - np.array(curve["true_structure"], dtype=float)
