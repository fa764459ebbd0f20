"""What runs and evaluations say: rows of rollouts.jsonl and log.jsonl, the line on the screen, tables with intervals, paired comparison, single completions.

Metric names are TRL's. A mean is over the completions of a step; what could not be scored or graded is left out of it and counted. In an evaluation the
problems are the clusters: a figure is the mean over problems of each problem's own mean, its interval comes from their spread. Pictures are in plots.py.
"""
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import Problem, read_jsonl
from generations import flags_of, read_generations, show, structure_fields
from grade import majority_at_k, mean_interval, paired_bootstrap, pass_at_k
from gsrm import Score
from plots import pass_curves
from rollout import Rollout

# ------------------------------------------------------------------------------------------------ a training step

def rollout_rows(step: int, problems: list[Problem], texts: list[str], rollout: Rollout, rewards: dict[str, list[float | None]], scores: list[Score | None],
                 adv: list[float], truth: list[float | None], group_size: int) -> list[dict]:
    """What rollouts.jsonl keeps of each completion."""
    return [{"step": step, "id": p.id, "sample": n % group_size, "problem": p.problem, "gold": p.answer, "text": texts[n], "length": int(rollout.lengths[n]),
             "stop": "stop" if rollout.finished[n] else "length", "rewards": {name: values[n] for name, values in rewards.items()}, "advantage": adv[n],
             "true_structure": truth[n], **structure_fields(scores[n])} for n, p in enumerate(problems)]


def log_row(step: int, rows: list[dict], weights: dict[str, float], group_size: int) -> dict[str, float]:
    """Means over the step's completions, under TRL's metric names and with its sample deviations; `num_tokens` are those of this step's completions."""
    def whole(r: dict) -> bool:
        return all(r["rewards"][name] is not None for name in r["rewards"] if weights[name])
    scored = [r for r in rows if whole(r)]
    totals = [sum(weights[name] * value for name, value in r["rewards"].items() if weights[name]) for r in scored]
    mean, std = (lambda values: float(np.mean(values)) if values else math.nan), (lambda values: float(np.std(values, ddof=1)) if len(values) > 1 else math.nan)
    out = {"step": step, "reward": mean(totals), "reward_std": std(totals), "unscored": len(rows) - len(scored)}
    for name in rows[0]["rewards"]:
        values = [r["rewards"][name] for r in rows if r["rewards"][name] is not None]
        out |= {f"rewards/{name}/mean": mean(values), f"rewards/{name}/std": std(values)}
    if (true := [r["true_structure"] for r in rows if r["true_structure"] is not None]):
        out["true_structure"] = mean(true)
    groups = [[r["advantage"] for r in rows[g:g + group_size] if whole(r)] for g in range(0, len(rows), group_size)]
    compared = [group for group in groups if len(group) > 1]                    # what could not be scored says nothing about how hard a problem is
    lengths, ended = [r["length"] for r in rows], [r["length"] for r in rows if r["stop"] == "stop"]
    return out | {"frac_reward_zero_std": mean([not any(g) for g in compared]), "completions/mean_length": mean(lengths),
                  "completions/min_length": min(lengths), "completions/max_length": max(lengths), "completions/clipped_ratio": 1 - len(ended) / len(rows),
                  "completions/mean_terminated_length": float(np.mean(ended)) if ended else 0.0, "num_tokens": sum(lengths)}


def log_line(metrics: dict) -> dict:
    """A step's metrics as log.jsonl keeps them: null where there is no finite number, for which JSON has no word (of a step that broke, faults/ says which it was)."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in metrics.items()}


def screen_line(m: dict[str, float], steps: int, beta: float) -> str:
    """A training step on one line."""
    parts = [f"step {m['step']:4d}/{steps}", f"reward {m['reward']:.3f}"]
    parts += [f"{name} {m[f'rewards/{name}/mean']:.3f}" for name in (key.split("/")[1] for key in m if key.startswith("rewards/") and key.endswith("/mean"))]
    parts += [f"length {m['completions/mean_length']:.0f}", f"cut off {m['completions/clipped_ratio']:.0%}", f"kl {m['kl']:.4f}" if beta else "", f"entropy {m['entropy']:.2f}"]
    parts += [f"grad {m['grad_norm']:.2f}", f"{m['step_time']:.2f} s (sample {m['time/sampling']:.2f} score {m['time/scoring']:.2f} update {m['time/update']:.2f})"]
    if m["unscored"]:
        parts.append(f"UNSCORED {m['unscored']}")
    return "  ".join(p for p in parts if p)

# ------------------------------------------------------------------------------------------------ an evaluation

class Interval(NamedTuple):
    """A mean with its 95 % interval and standard error, problems as clusters."""
    mean: float
    low: float
    high: float
    error: float = 0.0


def by_problem(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of each problem, in the order of the file."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return groups


def problem_means(rows: list[dict], value: Callable[[dict], float | None | list[bool]]) -> np.ndarray:
    """(P,) mean of value(row) over each problem's rows, in the order of the file; a row may give one number, several, or None = not known; NaN where nothing is."""
    known = [[v for row in group for v in np.ravel(value(row)) if v is not None] for group in by_problem(rows).values()]
    return np.array([np.mean(values) if values else np.nan for values in known], dtype=float)


def interval(per_problem: np.ndarray, most: float = 1.0) -> Interval:
    """mean_interval, cut at what the measure can be: a structure reward of one's own may be negative."""
    mean, error, low, high = mean_interval(per_problem)
    return Interval(mean, low if (per_problem < 0).any() else max(low, 0.0), min(high, most), error)


def summary(rows: list[dict]) -> dict[str, Interval]:
    """metric -> Interval. Rows that could not be graded or scored are left out, and counted in `ungraded`; pass@j needs all samples of a problem graded.
    maj@1 is not listed: it is the mean."""
    groups = list(by_problem(rows).values())
    k = min(len(g) for g in groups)
    sizes = sorted({2**i for i in range(k.bit_length())} | {k})
    out = {f"mean@{k}": interval(problem_means(rows, lambda r: r["correct"]))}
    graded = [g for g in groups if all(r["correct"] is not None for r in g)]
    for j in sizes if graded and k > 1 else ():
        out[f"pass@{j}"] = interval(np.array([pass_at_k(len(g), sum(r["correct"] for r in g), j) for g in graded]))
    for j in sizes[1:] if all("answer" in r for r in rows) else ():
        out[f"maj@{j}"] = interval(np.array([majority_at_k([r["answer"] for r in g], [r["correct"] for r in g], j) for g in groups]))
    for name in ("structure", "true_structure"):
        if any(r[name] is not None for r in rows):
            raw_sums = any(r[name] is not None and r[name] > 1 for r in rows)                        # --normalize False
            out[name] = interval(problem_means(rows, lambda r, name=name: r[name]), math.inf if raw_sums else 1.0)
    out["length"], out["truncated"] = interval(problem_means(rows, lambda r: r["length"]), math.inf), interval(problem_means(rows, lambda r: r["stop"] == "length"))
    return out | {"ungraded": Interval(*(sum(r["correct"] is None for r in rows),) * 3)}


def correlation(rows: list[dict]) -> float:
    """Pearson's r between the reward model's structure reward and the true one; nan where either is constant."""
    pairs = np.array([(r["structure"], r["true_structure"]) for r in rows if r["structure"] is not None and r["true_structure"] is not None])
    return float(np.corrcoef(pairs.T)[0, 1]) if len(pairs) > 1 and pairs.std(0).all() else float("nan")


def print_table(columns: dict[str, dict[str, tuple]], errors: bool = False) -> None:
    """One row a metric, one column a model: mean and 95 % interval, with `errors` one more digit and the standard error."""
    number = lambda x: f"{x:.{2 if not errors else 3 if abs(x) < 10 else 1}f}"
    def cell(mean: float, low: float, high: float, error: float = 0.0) -> str:
        known = low < high and math.isfinite(error)                                   # one problem has no interval
        return number(mean) + ((f" +- {number(error)}" if errors else "") + f"  [{number(low)}, {number(high)}]" if known else "")
    width = max(*map(len, columns), 34 if errors else 24) + 2
    print(f"{'mean +- std. error [95 %]' if errors else '':<28}" + "".join(f"{name:>{width}}" for name in columns))
    for metric in dict.fromkeys(m for column in columns.values() for m in column):
        print(f"{metric:<28}" + "".join(f"{'-' if metric not in c else f'{c[metric][0]:.0f}' if metric == 'ungraded' else cell(*c[metric]):>{width}}" for c in columns.values()))


def answers_right(row: dict) -> list[bool | None]:
    """Of each step on the branch: is the answer the teacher's too? None where another sub-problem was solved than the teacher's, whose answer says nothing."""
    return [earned == 1 if chosen else None for (*_, earned), chosen in zip(row["steps"] or [], row["choices"] or [])]


def structure_report(rows: list[dict]) -> tuple[dict[str, Interval], list[dict]]:
    """How students follow the teacher: mean structure reward; choice accuracy (at a step on the branch, are the next meta and query the teacher's);
    answer accuracy on the branch (they are: is the answer the teacher's too). And per step: samples judged there, the two shares, samples that left all branches there.
    The choices are those on the trace that was followed; of several traces a student may leave this one and never all of them. Unscored rows are left out."""
    scored = [row for row in rows if row["structure"] is not None]
    figures = {"structure": summary(scored)["structure"],
               "choice accuracy": interval(problem_means(scored, lambda r: r["choices"])), "answer accuracy on the branch": interval(problem_means(scored, answers_right))}
    steps = []
    for i in range(max((len(r["steps"] or []) for r in scored), default=0)):
        choices, right = [r["choices"][i] for r in scored if len(r["choices"] or []) > i], [a[i] for r in scored if len(a := answers_right(r)) > i and a[i] is not None]
        steps.append({"step": i + 1, "judged": len(choices), "choice": float(np.mean(choices)) if choices else math.nan,
                      "answer": float(np.mean(right)) if right else math.nan, "left": sum(r["left_at"] == i for r in scored)})
    return figures, steps


def print_structure(rows: list[dict]) -> None:
    """structure_report in words and bars; what failed is counted by its reason, apart from samples of problems without teacher traces."""
    scored, failed = [row for row in rows if row["structure"] is not None], Counter(row["reason"] for row in rows if row["structure"] is None and row.get("reason"))
    why = f"{failed.total()} samples could not be scored: {', '.join(f'{reason} {count}' for reason, count in failed.most_common())} (the same command tries them again)"
    if not scored:
        return print(f"structure: {why if failed else 'no problem has teacher traces'}")
    figures, steps = structure_report(rows)
    never, empty = sum(r["left_at"] is None and bool(r["steps"]) for r in scored), sum(not r["steps"] for r in scored)
    without = len(rows) - len(scored) - failed.total()
    print(f"\nstructure of {len(scored)} samples of {len(by_problem(scored))} problems with teacher traces" + f", {without} without" * bool(without)
          + ": mean +- standard error [95 % interval]" + f"\n{why}" * bool(failed))
    for name, (mean, low, high, error) in figures.items():
        print(f"{name:<32}" + ("-" if math.isnan(mean) else f"{mean:.3f}" + f" +- {error:.3f}  [{low:.3f}, {high:.3f}]" * math.isfinite(error)))          # "-": no step was judged
    print("\n step  judged  choice right  answer right  left every branch here")
    bar = lambda count: f"{count:7d} {count / len(scored):5.1%}  " + "#" * round(40 * count / len(scored))
    share = lambda value: "-" if math.isnan(value) else f"{value:.3f}"
    last = max((s["step"] for s in steps if s["judged"] or s["left"]), default=0)                    # steps behind the teacher's last have nothing to follow
    for s in steps[:last]:
        print(f"{s['step']:5d}{s['judged']:8d}{share(s['choice']):>14}{share(s['answer']):>14}{bar(s['left'])}")
    print(f"{'never left':<41}{bar(never)}")
    print(f"{'no steps':<41}{bar(empty)}\n" if empty else "")

# ------------------------------------------------------------------------------------------------ two evaluations

def samples_each(path: str, rows: list[dict]) -> int:
    """k, the same for each problem; ValueError where it is not."""
    counts = {name: len(group) for name, group in by_problem(rows).items()}
    k = max(counts.values())
    if uneven := next((name for name, count in counts.items() if count != k), None):
        raise ValueError(f"{path}: problem {uneven} has {counts[uneven]} samples, others have {k}: if the evaluation was interrupted, run its command again")
    return k


def pair(paths: tuple[str, str], sides: list[list[dict]]) -> list[list[dict]]:
    """Both sides' rows of the problems that both hold, in one order; says which are left out. ValueError where k or a problem differs, or none is shared."""
    groups, ks = [by_problem(rows) for rows in sides], [samples_each(path, rows) for path, rows in zip(paths, sides)]
    if ks[0] != ks[1]:
        raise ValueError(f"{paths[0]} holds {ks[0]} samples per problem, {paths[1]} {ks[1]}: sample both with the same --k")
    shared = [name for name in groups[0] if name in groups[1]]
    if not shared:
        raise ValueError(f"{paths[0]} and {paths[1]} share no problem id: they were made from different data")
    for name in shared:
        for what in ("problem", "gold"):
            if None not in (a := groups[0][name][0].get(what), b := groups[1][name][0].get(what)) and a != b:
                raise ValueError(f"problem {name}: the {'gold answer' if what == 'gold' else 'text'} is not the same in {paths[0]} and {paths[1]} "
                                 f"({str(a)[:40]!r}, {str(b)[:40]!r}): different data")
    for path, group in zip(paths, groups):
        if alone := [name for name in group if name not in shared]:
            print(f"left out: {len(alone)} problems that only {path} holds: {', '.join(alone[:8])}{', ...' if len(alone) > 8 else ''}")
    return [[row for name in shared for row in group[name]] for group in groups]


def compare(first: str, second: str, picture: Path | None = None) -> dict[str, dict[str, float]]:
    """Prints both files' figures and second - first by the paired bootstrap over the problems that both hold, and draws both pass@k curves into `picture` (default: beside
    the second file); -> metric -> paired_bootstrap's figures."""
    paths, sides, differences, tables = (first, second), [read_generations(path) for path in (first, second)], {}, [{}, {}]
    records = [flags_of(Path(path)) for path in paths]
    for name in records[0] if all(records) else ():
        if name not in ("model", "data", "limit", "k", "device") and records[0][name] != records[1].get(name):
            print(f"note: --{name} was {records[0][name]!r} in {first}, {records[1].get(name)!r} in {second}")
    for sampled in (True, False):
        rows = [[row for row in side if bool(row["temperature"]) == sampled] for side in sides]
        if not all(rows):
            continue
        rows = pair(paths, rows)
        for table, side in zip(tables, rows):
            figures = summary(side)
            table |= figures if sampled else {"greedy": figures["mean@1"]} | ({} if table else figures)
        measures = {next(m for m in tables[0] if m.startswith("mean@")) if sampled else "greedy": "correct"}
        for name in ("structure", "true_structure") if "structure" not in differences else ():
            measures |= {name: name} if all(any(row[name] is not None for row in side) for side in rows) else {}
        for metric, key in measures.items():
            a, b = (problem_means(side, lambda row, key=key: row[key]) for side in rows)
            problems = int((~np.isnan(a - b)).sum())
            if problems >= 2:
                differences[metric] = paired_bootstrap(b, a) | {"problems": problems}
            else:
                print(f"note: {metric}: {'graded' if key == 'correct' else 'scored'} on both sides for {problems} problem(s) only, so it is not compared")
    if not differences:
        raise ValueError(f"{first} and {second}: there is nothing to compare: " + ("a comparison needs two problems or more that are graded, or scored, on both sides"
                         if any(tables) else "one holds greedy completions, the other sampled ones"))
    labels = ["A " + Path(first).stem, "B " + Path(second).stem]
    print_table(dict(zip(labels, tables)), errors=True)
    print("\nB - A, paired by problem (bootstrap over problems)")
    for metric, d in differences.items():
        print(f"{metric:<28}{d['diff']:+.3f}  [{d['low']:+.3f}, {d['high']:+.3f}]  p {d['p']:.4f}  {d['problems']} problems")
    if min(d["problems"] for d in differences.values()) < 20:
        print("note: with fewer than some 20 problems a bootstrap's interval is too narrow and its p too small")
    curves = any(metric.startswith("pass@") for metric in tables[0])
    if picture and not curves:
        raise ValueError("--plot: pass@k curves need several samples per problem (--k)")
    if curves:
        pass_curves(dict(zip(labels, tables)), picture := picture or Path(second).with_name(f"{Path(first).stem}-{Path(second).stem}.png"))
        print(f"wrote {picture}")
    return differences

# ------------------------------------------------------------------------------------------------ the end of a run

def print_end(out: Path) -> None:
    """The table before -> after of a finished run, one rollout with its steps marked, and the files it wrote."""
    sides = {when: [row for _, row in read_jsonl(file)] for when in ("before", "after") if (file := out / f"eval_{when}.jsonl").exists()}
    key, columns = (lambda r: (r["id"], r["sample"], r["temperature"])), {}
    both = set.intersection(*({key(r) for r in rows} for rows in sides.values())) if "after" in sides else set()           # a resume may have changed --eval_problems
    if both:
        for when, rows in sides.items():
            sampled, greedy = ([r for r in rows if key(r) in both and bool(r["temperature"]) == warm] for warm in (True, False))
            figures = {"accuracy sampled" if m.startswith("mean@") else m: v for m, v in summary(sampled).items() if m != "pass@1" and not m.startswith("maj@")}
            columns[when] = {"accuracy greedy": summary(greedy)["mean@1"]} | figures
            columns[when] |= {"r(structure, true_structure)": Interval(*(correlation(sampled),) * 3)} if "true_structure" in columns[when] else {}
        print("\nheld-out problems, mean and 95 % interval (problems as clusters)")
        if any(len(rows) > len(both) for rows in sides.values()):
            print(f"(of the {len(both)} completions, greedy ones too, that were made both before and after: --eval_problems or --eval_k was another one then)")
        print_table(columns)
        shown = max(sampled, key=lambda r: (bool(r["correct"]), -abs((r["structure"] or 0) - 0.7)))           # right, and on the branch for most of its way: both marks to be seen
        legend = ", its steps as GSRM reads them (+ follows the teacher, ~ half right or less, x earns nothing: off the branch, or behind the teacher's last step)"
        print(f"\none rollout after training{legend * bool(shown['steps'])}\n{show(shown)}")
    print(f"\nwrote {', '.join(sorted(str(p) for p in out.iterdir()))}")
