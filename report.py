"""What a run says: rows of rollouts.jsonl and log.jsonl, the line on the screen, tables with intervals, learning curves.

Metric names are TRL's. A mean is over the completions of a step; what could not be scored or graded is left out of it and counted.
"""
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data import Problem, read_jsonl
from grade import mean_interval, pass_at_k
from gsrm import Score
from rollout import Rollout

# ------------------------------------------------------------------------------------------------ a training step

def rollout_rows(step: int, problems: list[Problem], texts: list[str], rollout: Rollout, rewards: dict[str, list[float | None]], scores: list[Score | None],
                 adv: list[float], truth: list[float | None], group_size: int) -> list[dict]:
    """What rollouts.jsonl keeps of each completion."""
    return [{"step": step, "id": p.id, "sample": n % group_size, "text": texts[n], "length": int(rollout.lengths[n]), "stop": "stop" if rollout.finished[n] else "length",
             "rewards": {name: values[n] for name, values in rewards.items()}, "advantage": adv[n], "true_structure": truth[n],
             "steps": [[s.meta, s.query, s.answer, earned] for s, earned in zip(scores[n].structure, scores[n].steps or [0.0] * len(scores[n].structure))] if scores[n] else None,
             "left_at": scores[n].left_at if scores[n] else None, "trace": scores[n].trace if scores[n] else None} for n, p in enumerate(problems)]


def log_row(step: int, rows: list[dict], weights: dict[str, float], group_size: int) -> dict[str, float]:
    """Means over the step's completions, under TRL's metric names."""
    scored = [r for r in rows if all(r["rewards"][name] is not None for name in r["rewards"] if weights[name])]
    totals = [sum(weights[name] * value for name, value in r["rewards"].items() if weights[name]) for r in scored]
    out = {"step": step, "reward": float(np.mean(totals)) if totals else math.nan, "reward_std": float(np.std(totals)) if totals else math.nan, "unscored": len(rows) - len(scored)}
    for name in rows[0]["rewards"]:
        values = [r["rewards"][name] for r in rows if r["rewards"][name] is not None]
        out |= {f"rewards/{name}/mean": float(np.mean(values)) if values else math.nan, f"rewards/{name}/std": float(np.std(values)) if values else math.nan}
    if (true := [r["true_structure"] for r in rows if r["true_structure"] is not None]):
        out["true_structure"] = float(np.mean(true))
    groups = [[r["advantage"] for r in rows[g:g + group_size]] for g in range(0, len(rows), group_size)]
    lengths, ended = [r["length"] for r in rows], [r["length"] for r in rows if r["stop"] == "stop"]
    return out | {"frac_reward_zero_std": sum(not any(g) for g in groups) / len(groups), "completions/mean_length": float(np.mean(lengths)), "completions/min_length": min(lengths),
                  "completions/max_length": max(lengths), "completions/clipped_ratio": 1 - len(ended) / len(rows),
                  "completions/mean_terminated_length": float(np.mean(ended)) if ended else 0.0, "num_tokens": sum(lengths)}


def screen_line(m: dict[str, float], steps: int, beta: float) -> str:
    """A training step on one line."""
    parts = [f"step {m['step']:4d}/{steps}", f"reward {m['reward']:.3f}"] + [f"{name} {m[f'rewards/{name}/mean']:.3f}" for name in ("structure", "outcome", "format") if f"rewards/{name}/mean" in m]
    parts += [f"length {m['completions/mean_length']:.0f}", f"cut off {m['completions/clipped_ratio']:.0%}", f"kl {m['kl']:.4f}" if beta else "", f"entropy {m['entropy']:.2f}"]
    parts += [f"grad {m['grad_norm']:.2f}", f"{m['step_time']:.2f} s (sample {m['time/sampling']:.2f} score {m['time/scoring']:.2f} update {m['time/update']:.2f})"]
    if m["unscored"]:
        parts.append(f"UNSCORED {m['unscored']}")
    return "  ".join(p for p in parts if p)

# ------------------------------------------------------------------------------------------------ an evaluation

def summary(rows: list[dict]) -> dict[str, tuple[float, float, float]]:
    """metric -> (mean, low, high), 95 % with problems as clusters. Rows that could not be graded or scored are left out, and counted in `ungraded`."""
    by_problem: dict[str, list[dict]] = {}
    for row in rows:
        by_problem.setdefault(row["id"], []).append(row)
    groups = list(by_problem.values())

    def interval(value: Callable[[dict], float | None], most: float = 1.0) -> tuple[float, float, float]:
        known = [[v for r in g if (v := value(r)) is not None] for g in groups]
        mean, _, low, high = mean_interval(np.array([np.mean(vs) if vs else np.nan for vs in known]))
        return mean, max(low, 0.0), min(high, most)                        # an interval ends where the measure does

    k = min(len(g) for g in groups)
    out = {f"mean@{k}": interval(lambda r: r["correct"])}
    graded = [g for g in groups if all(r["correct"] is not None for r in g)]
    for j in [2**i for i in range(1, k.bit_length())]:
        if graded:
            mean, _, low, high = mean_interval(np.array([pass_at_k(len(g), sum(r["correct"] for r in g), j) for g in graded]))
            out[f"pass@{j}"] = mean, max(low, 0.0), min(high, 1.0)
    for name in ("structure", "true_structure"):
        if any(r[name] is not None for r in rows):
            out[name] = interval(lambda r, name=name: r[name])
    out["length"], out["truncated"] = interval(lambda r: r["length"], math.inf), interval(lambda r: r["stop"] == "length")
    return out | {"ungraded": (sum(r["correct"] is None for r in rows),) * 3}


def correlation(rows: list[dict]) -> float:
    """Pearson's r between the reward model's structure reward and the true one; nan where either is constant."""
    pairs = np.array([(r["structure"], r["true_structure"]) for r in rows if r["structure"] is not None and r["true_structure"] is not None])
    return float(np.corrcoef(pairs.T)[0, 1]) if len(pairs) > 1 and pairs.std(0).all() else float("nan")


def print_table(columns: dict[str, dict[str, tuple[float, float, float]]]) -> None:
    """One row a metric, one column a model: mean and 95 % interval."""
    width = max(map(len, columns)) + 2
    print(" " * 28 + "".join(f"{name:>{max(width, 26)}}" for name in columns))
    for metric in dict.fromkeys(m for column in columns.values() for m in column):
        cells = [f"{c[metric][0]:.2f}" + (f"  [{c[metric][1]:.2f}, {c[metric][2]:.2f}]" if c[metric][1] != c[metric][2] else "") if metric in c else "-" for c in columns.values()]
        print(f"{metric:<28}" + "".join(f"{cell:>{max(width, 26)}}" for cell in cells))


def show(row: dict) -> str:
    """One completion with the steps that GSRM read in it, each marked by what it earned and where it left the teacher's branch."""
    lines = [row["problem"], "", row["text"].strip(), ""]
    for i, (meta, query, answer, earned) in enumerate(row["steps"] or []):
        left = row["left_at"] is not None and i >= row["left_at"]
        lines.append(f"  {'x' if left else '+' if earned == 1 else '~'} {earned:4.2f}  {meta:<16} {query:<16} {answer}" + ("   <- left the teacher's branch" if i == row["left_at"] else ""))
    return "\n".join(lines + [f"  structure reward {row['structure']}, true {row['true_structure']}, answer {row['answer']} ({'right' if row['correct'] else 'wrong'})"])


def print_end(out: Path) -> None:
    """The table before -> after of a finished run, one rollout with its steps marked, and the files it wrote."""
    if (out / "eval_after.jsonl").exists():
        columns = {}
        for when in ("before", "after"):
            rows = [row for _, row in read_jsonl(out / f"eval_{when}.jsonl")] if (out / f"eval_{when}.jsonl").exists() else []
            sampled, greedy = [r for r in rows if r["temperature"]], [r for r in rows if not r["temperature"]]
            if rows:
                columns[when] = {"accuracy greedy": summary(greedy)["mean@1"]} | {("accuracy sampled" if m.startswith("mean@") else m): v for m, v in summary(sampled).items()}
                columns[when] |= {"r(structure, true_structure)": (correlation(sampled),) * 3} if "true_structure" in columns[when] else {}
        print("\nheld-out problems, mean and 95 % interval (problems as clusters)")
        print_table(columns)
        best = max(sampled, key=lambda r: (bool(r["correct"]), -abs((r["structure"] or 0) - 0.7)))
        print(f"\none rollout after training, its steps as GSRM reads them (+ follows the teacher, ~ half right, x off the branch)\n{show(best)}")
    print(f"\nwrote {', '.join(sorted(str(p) for p in out.iterdir()))}")


def plot(runs: list[str], path: Path) -> None:
    """Learning curves of one or several runs' log.jsonl: structure and outcome reward, faint per step and smoothed, on one picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    styles = {"rewards/structure/mean": ("C0", "structure (GSRM)"), "true_structure": ("C2", "structure (true)"), "rewards/outcome/mean": ("C1", "outcome: final answer right")}
    for run, line in zip(runs, ("-", "--", ":", "-.") * len(runs)):
        log = [row for _, row in read_jsonl(Path(run) / "log.jsonl")]
        for key, (color, label) in styles.items():
            if key in log[0] and not (key == "true_structure" and "rewards/structure/mean" in log[0]):
                steps, y = [row["step"] for row in log], np.array([row[key] for row in log])
                smooth = [y[max(0, i - 9): i + 1].mean() for i in range(len(y))]
                axes.plot(steps, y, color=color, alpha=0.2, linewidth=0.8)
                axes.plot(steps, smooth, line, color=color, label=label + (f", {Path(run).name}" if len(runs) > 1 else ""))
    axes.set(xlabel="step", ylabel="mean reward of the step's rollouts", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
