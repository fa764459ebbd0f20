"""Pictures: a run's learning curves (curve.png, small multiples of several runs), the pass@k curves of two evaluations, coloured text, the tree of a teacher's traces.
Drawn with matplotlib, which is loaded here only."""
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from command import log_lines

WINDOW = 10                            # steps that a smoothed curve looks back over


def pictures():
    """matplotlib.pyplot that draws to files and needs no screen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def read_logs(runs: Sequence[str]) -> dict[str, list[dict]]:
    """name -> rows of log.jsonl, for each run's folder; the name is the folder's own, or the whole path where two are called alike. ValueError if there is nothing to draw."""
    if not runs:
        raise ValueError("no run to plot: give the folders of one or several runs, for example out/toy")
    names = [Path(run).resolve().name for run in runs]
    logs = {}
    for run, name in zip(runs, names):
        if not (file := Path(run) / "log.jsonl").is_file():
            raise ValueError(f"{run}: no log.jsonl there; give the folder that train.py wrote (--out)")
        if not (log := [row for _, row in log_lines(file)]):
            raise ValueError(f"{file}:1: expected the log line of a training step")
        logs[(name if names.count(name) == 1 else str(run)).replace("$", r"\$")] = log          # as text: to matplotlib a pair of $ is mathematics
    return logs


def curve(log: list[dict], key: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Steps that have the metric, its values (a missing or unscored one is left out), and their mean over the last WINDOW of them."""
    points = [(row["step"], row[key]) for row in log if isinstance(row.get(key), (int, float)) and np.isfinite(row[key])]
    y = np.array([value for _, value in points])
    return [step for step, _ in points], y, np.array([y[max(0, i - WINDOW + 1): i + 1].mean() for i in range(len(y))])


def plot(runs: Sequence[str], path: Path) -> None:
    """The front picture: structure and outcome reward of one or several runs, faint per step and smoothed, on one pair of axes."""
    logs, plt = read_logs(runs), pictures()
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    styles = {"rewards/structure/mean": ("C0", "structure (GSRM)"), "true_structure": ("C2", "structure (true)"), "rewards/outcome/mean": ("C1", "outcome: final answer right")}
    for (name, log), line in zip(logs.items(), ("-", "--", ":", "-.") * len(logs)):
        for key, (color, label) in styles.items():
            if key in log[0] and not (key == "true_structure" and "rewards/structure/mean" in log[0]):
                steps, y, smooth = curve(log, key)
                axes.plot(steps, y, color=color, alpha=0.2, linewidth=0.8)
                axes.plot(steps, smooth, line, color=color, label=label + (f", {name}" if len(logs) > 1 else ""))
    axes.set(xlabel="step", ylabel="mean reward of the step's rollouts", ylim=(min(0.0, axes.dataLim.y0), max(1.0, axes.dataLim.y1)))         # above 1: --normalize False
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


PANELS = {   # title -> metrics, the first that a run's log has is drawn; True: a share, drawn from 0 to 1
    "reward, weighted sum": (("reward",), False),
    "structure reward (true one without GSRM)": (("rewards/structure/mean", "true_structure"), True),
    "accuracy (outcome reward)": (("rewards/outcome/mean",), True),
    "length, tokens": (("completions/mean_length",), False),
    "KL to the start, nats a token": (("kl",), False),
    "entropy, nats a token": (("entropy",), False),
}


def small_multiples(runs: Sequence[str], path: Path) -> None:
    """Six small pictures, one per metric, a colour per run: faint per step, and smoothed. A run without a metric (no KL without a reference) is not in that picture."""
    logs, plt = read_logs(runs), pictures()
    figure, grid = plt.subplots(2, 3, figsize=(11, 5.6), sharex=True, constrained_layout=True)
    for axes, (title, (keys, share)) in zip(grid.flat, PANELS.items()):
        for color, log in enumerate(logs.values()):
            steps, y, smooth = next((drawn for key in keys if (drawn := curve(log, key))[0]), ([], [], []))
            if steps:
                axes.plot(steps, y, color=f"C{color}", alpha=0.2, linewidth=0.8)
                axes.plot(steps, smooth, color=f"C{color}", linewidth=1.6)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(*((min(0.0, axes.dataLim.y0), max(1.0, axes.dataLim.y1)) if share and axes.lines else (min(0.0, axes.get_ylim()[0]), None)))
        axes.grid(alpha=0.3)
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.5")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    lines = [plt.Line2D([], [], color=f"C{color}", linewidth=1.6) for color in range(len(logs))]
    figure.legend(lines, list(logs), loc="outside lower center", ncols=min(len(logs), 4), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def pass_curves(tables: dict[str, dict[str, tuple]], path: Path) -> None:
    """pass@k over k with its 95 % band, one curve per evaluation; `tables` holds what report.summary makes of each."""
    plt = pictures()
    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for name, table in tables.items():
        sizes = sorted(int(metric[5:]) for metric in table if metric.startswith("pass@"))
        mean, low, high = np.array([table[f"pass@{k}"][:3] for k in sizes]).reshape(-1, 3).T
        line, = axes.plot(sizes, mean, marker="o", markersize=3.5, label=name.replace("$", r"\$"))
        axes.fill_between(sizes, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda k, _: f"{k:g}")
    axes.set(xlabel="k samples", ylabel="pass@k, mean and 95 % interval over problems", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)

# ------------------------------------------------------------------------------------------------ texts and trees

ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"        # Okabe and Ito's, for colour-blind readers too


def tint(color: str, share: float = 0.4) -> tuple[float, ...]:
    """A colour mixed with white, to stand behind black text: share 0 is white, 1 the colour itself."""
    from matplotlib.colors import to_rgb
    return tuple(1 - min(max(share, 0.0), 1.0) * (1 - c) for c in to_rgb(color))


def painted(paragraphs: list[list[tuple[str, object]]], width: int = 118, size: float = 9.0):
    """Figure of monospaced text on coloured ground: paragraphs of (text, colour or None) pieces, wrapped at `width` characters; a line break in a text counts as a blank."""
    from matplotlib.figure import Figure
    column, line, cells = 0, 0, []                                       # cells: (line, column, text, colour)
    for pieces in paragraphs:
        for text, color in pieces:
            for word in re.findall(r"\s|\S+", text):
                if column + len(word) > width and column:
                    column, line = 0, line + 1
                if word.strip() or column:
                    cells.append((line, column, word if word.strip() else " ", color))
                    column += len(word)
        column, line = 0, line + 1
    figure = Figure(figsize=((width + 1) * 0.602 * size / 72, (line + 0.3) * 1.5 * size / 72))           # 0.602 em: the advance of DejaVu Sans Mono
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.5, width + 0.5), ylim=(line + 0.15, -0.15))
    axes.axis("off")
    for y, x, text, color in cells:
        if color is not None:
            axes.barh(y + 0.5, len(text), 0.86, x, color=color, linewidth=0)
        axes.text(x, y + 0.52, text, family="DejaVu Sans Mono", fontsize=size, va="center_baseline", parse_math=False)
    return figure


def rollout_picture(row: dict, path: Path) -> None:
    """One stored completion with the ground behind each step coloured by what it earned: behind the trace's own lines where there are as many as steps, else behind the steps
    that GSRM read. ValueError where its steps were not scored."""
    if not row["steps"] or (reward := (row.get("rewards") or row).get("structure")) is None:
        raise ValueError(f"problem {row['id']}, sample {row['sample']}: no scored steps to draw; choose another sample, or evaluate with --gsrm")
    trace, _, final = row["text"].partition("</think>")
    lines = [line for line in trace.replace("<think>", "").strip().splitlines() if line.strip()]
    said = lines if len(lines) == len(row["steps"]) else [f"{meta}: {query}? {answer}" for meta, query, answer, _ in row["steps"]]
    color = lambda earned: tint(GREEN if earned == 1 else YELLOW if earned else RED, 0.45)
    note = {row["left_at"]: "   left the teacher's branch here"}
    steps = [[(line, color(earned)), (note.get(i, ""), None)] for i, (line, (*_, earned)) in enumerate(zip(said, row["steps"]))]
    legend = [("follows the teacher", color(1)), ("  ", None), ("half right", color(0.5)), ("  ", None), ("off the branch", color(0)), (f"   structure reward {reward:.2f}", None)]
    painted([[(row.get("problem", ""), None)], [("", None)], *steps, [(final.strip(), None)], [("", None)], legend]).savefig(path, dpi=130)


def tree(traces: list[list[str]], root: str, notes: dict[tuple[str, ...], str] | None = None, shades: dict[tuple[str, ...], float] | None = None):
    """Figure of the tree whose paths are the traces, each a list of step labels: equal beginnings are one branch. A node is named by the labels that lead to it, () is the
    root; `notes` go under nodes, `shades` from 0 to 1 onto them."""
    from matplotlib.figure import Figure
    first = lambda start: next(k for k, other in enumerate(traces) if other[:len(start)] == start)
    traces = sorted(traces, key=lambda t: [first(t[:i + 1]) for i in range(len(t))])                     # branches side by side, in the order in which they were first seen
    nodes = {tuple(t[:i]): float(np.mean([k for k, other in enumerate(traces) if other[:i] == t[:i]])) for t in traces for i in range(len(t) + 1)}       # name -> height
    deepest = max(map(len, traces))
    figure = Figure(figsize=(1.6 * (deepest + 1), 1.25 * len(traces) + 0.25))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.5, deepest + 0.5), ylim=(len(traces) - 0.4, -0.55))
    axes.axis("off")
    for name, y in nodes.items():
        if name:
            axes.plot((len(name) - 1, len(name)), (nodes[name[:-1]], y), color="0.6", linewidth=1.5, zorder=1)
        axes.text(len(name), y, name[-1] if name else root, ha="center", va="center", fontsize=9, linespacing=1.35, zorder=2, parse_math=False,
                  bbox=dict(boxstyle="round,pad=0.4", facecolor=tint(SKY, (shades or {}).get(name, 0.0)), edgecolor="0.4"))
        axes.text(len(name), y + 0.36, (notes or {}).get(name, ""), ha="center", va="top", fontsize=9, color=RED)
    return figure
