"""The study's pictures, all from the results file: learning curves, accuracy against data, pass@k, where students leave the branch, levels, the reward model against the truth.

Means over seeds with their 95 % t intervals (evidence.py); the same rows give the same bytes.
"""
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import numpy as np

from grade import mean_interval
from measures import Runs, gains, gap, values
from plots import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, pictures

COLORS = {"base": "#777777", "grpo": RED, "rlkd": BLUE, "rlkd, true structure": SKY, "structure only": GREEN, "sft 512": PURPLE, "sft 8192": ORANGE,
          "sft 512, own words": "#999933", "sft 512 -> grpo": "#8c564b", "sft 512 -> rlkd": "#000000", "sft 512, own words -> grpo": "#c9a0dc",
          "sft 512, own words -> rlkd": "#5b2a86"}
ALONE = "grpo, outcome alone, weight 1"                   # of its seeds few leave the floor: lines, no mean
READ = {"rlkd": BLUE, "structure only": GREEN, "rlkd, 8 problems": ORANGE, "rlkd, 32 problems": SKY, "rlkd, 128 problems": PURPLE,          # by GSRM; and after SFT:
        "sft 512 -> rlkd": COLORS["sft 512 -> rlkd"], "sft 512 -> rlkd, lr/3": "#999933", "sft 512, own words -> rlkd": COLORS["sft 512, own words -> rlkd"]}
LEVELS = {"5-people": "2-3 of 5", "7-people": "3-4 of 7", "dense": "4-6 of 9", "sparse": "7-8 of 11", "13-people": "9-10 of 13"}


def band(axes, x: list, samples: list[np.ndarray], color: str, label: str) -> None:
    """Means over seeds with their intervals."""
    mean, _, low, high = np.array([mean_interval(sample) for sample in samples]).reshape(-1, 4).T
    axes.plot(x, mean, color=color, label=label, marker="o" if len(x) < 9 else None, markersize=4)
    axes.fill_between(x, low.clip(0), high.clip(None, 1), where=np.isfinite(low), color=color, alpha=0.18, linewidth=0)
    if len(x) == 1 and np.isfinite(low[0]):                # a band has no width there
        axes.errorbar(x, mean, yerr=mean - low, color=color, capsize=3)


def each_seed(axes, runs: Runs, regime: str, arm: str, figure: Callable, color: str, label: str, line: str = "-") -> None:
    """A line a seed: figure(learning curves), which is None where a run has none."""
    for _, row in sorted(runs.get((regime, arm), {}).items()):
        if (y := figure(row.get("curve", {}))) is not None:
            axes.plot([10 * i + 5 for i in range(len(y))], y, color=color, linewidth=1, alpha=0.8, label=label, linestyle=line)


def side_by_side(path: Path, regimes: tuple[str, ...], draw: Callable, xlabel: str, ylabels: dict[str, str], **more) -> None:
    """One picture with a panel a regime, a row of them a figure: draw(axes, regime, figure) for each of ylabels."""
    plt = pictures()
    figure, grid = plt.subplots(len(ylabels), len(regimes), figsize=(4.8 * len(regimes), 0.7 + 3.2 * len(ylabels)), sharex=True, sharey="row", squeeze=False,
                                constrained_layout=True)
    for i, (row, (name, ylabel)) in enumerate(zip(grid, ylabels.items())):
        for axes, regime in zip(row, regimes):
            if not draw(axes, regime, name):
                axes.text(0.5, 0.5, "no runs yet", transform=axes.transAxes, ha="center", color="0.5")
            axes.set(xlabel=xlabel if i == len(grid) - 1 else "", title="" if i else regime, **more)
            if axes.get_xscale() == "log":
                axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axes.grid(alpha=0.3)
        row[0].set_ylabel(ylabel)
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curves(runs: Runs, path: Path) -> None:
    def draw(axes, regime: str, name: str) -> bool:
        for arm in COLORS:
            if curves := [row["curve"][name] for row in runs.get((regime, arm), {}).values() if name in row.get("curve", {})]:
                band(axes, [10 * i + 5 for i in range(max(map(len, curves)))], [np.array(tens, dtype=float) for tens in zip_longest(*curves)], COLORS[arm], arm)
        each_seed(axes, runs, regime, ALONE, lambda curve: np.array(curve[name], dtype=float) if name in curve else None, COLORS["grpo"], f"{ALONE}, a line a seed", ":")
        return bool(axes.lines)
    side_by_side(path, ("sparse", "dense"), draw, "step", {"outcome": "accuracy of the training rollouts", "true_structure": "true structure of these rollouts"}, ylim=(0, 1))


def draw_data(runs: Runs, path: Path) -> None:
    def draw(axes, regime: str, name: str) -> bool:
        sft, rlkd = {n: f"sft {n}" for n in (32, 128, 512, 2048, 8192)}, {n: f"rlkd, {n} problems" for n in (8, 32, 128)} | {512: "rlkd"}
        own = {n: f"sft {n}, own words" for n in (32, 128, 512)}
        kinds = {"SFT in the teacher's words": (COLORS["sft 512"], sft), "SFT in the student's own words": (COLORS[own[512]], own), "RLKD": (COLORS["rlkd"], rlkd)}
        for label, (color, arms) in kinds.items():
            if there := [n for n, arm in arms.items() if (regime, arm) in runs]:
                band(axes, there, [values(runs, regime, arms[n], name) for n in there], color, label)
        for arm, line, width, label in (("grpo", "--", 1.5, "grpo, 512 problems"), ("base", ":", 3, "base")):         # dots on the dashes, where they are alike
            if (regime, arm) in runs:
                axes.axhline(values(runs, regime, arm, name).mean(), color=COLORS[arm], linestyle=line, linewidth=width, label=label)
        return bool(axes.lines)
    side_by_side(path, ("sparse", "dense"), draw, "training problems with teacher traces", {"sampled": "accuracy, sampled"}, xlim=(6, 11000), xscale="log", ylim=(0, 1))


def draw_pass(runs: Runs, path: Path) -> None:
    def draw(axes, regime: str, name: str) -> bool:
        sizes = [2**i for i in range(7)]
        for arm in COLORS:
            if len(values(runs, regime, arm, f"{name}@64")):
                band(axes, sizes, [values(runs, regime, arm, f"{name}@{k}") for k in sizes], COLORS[arm], arm)
        axes.set_xscale("log", base=2)
        return bool(axes.lines)
    side_by_side(path, ("sparse", "dense"), draw, "k samples", {"found": "pass@k without guesses"}, xlim=(0.9, 72), ylim=(0, 1.02))


def draw_left(runs: Runs, path: Path) -> None:
    """Where students leave every teacher branch: an arm a line, a step a column; then those who never do, and those who say no step."""
    plt, regimes, rest = pictures(), ("sparse", "dense"), ("never left", "stayed and found", "no steps")
    from matplotlib.colors import PowerNorm
    shown = {*COLORS, "sft 512 -> distillation", "line similarity", "structure : outcome 1/4"}
    whole = {key: [row for row in seeds.values() if all(row.get(name) is not None for name in (*rest, "left"))] for key, seeds in runs.items()}
    arms = {regime: [arm for r, arm in runs if r == regime and arm in shown and whole[r, arm]] for regime in regimes}
    rows = [max(2, len(arms[regime])) for regime in regimes]
    figure, grid = plt.subplots(2, 1, figsize=(9.2, 2.6 + 0.27 * sum(rows)), height_ratios=rows, constrained_layout=True)
    images = []
    for axes, regime in zip(grid, regimes):
        width = min(12, max((len(row["left"]) for arm in arms[regime] for row in whole[regime, arm]), default=1))

        def share(row: dict, width: int = width) -> list[float]:
            return (row["left"] + [0.0] * width)[:width] + [row["stayed and found"], row["never left"] - row["stayed and found"], row["no steps"]]
        if not arms[regime]:
            axes.axis("off")
            axes.text(0.5, 0.5, f"{regime}: not measured yet", ha="center", color="0.5")
            continue
        means = np.array([np.mean([share(row) for row in whole[regime, arm]], axis=0) for arm in arms[regime]])
        images.append(axes.imshow(means, cmap="cividis", norm=PowerNorm(0.5, 0, 1), aspect="auto"))       # most cells are below 0.3
        for (i, j), mean in np.ndenumerate(means):
            axes.text(j, i, f"{100 * mean:.0f}" if mean >= 0.005 else "", ha="center", va="center", fontsize=8, color="black" if mean > 0.17 else "white")
        axes.set_xticks(range(width + 3), [*map(str, range(1, width + 1)), "stays,\nright", "stays,\nnot right", "no step"], fontsize=8)
        axes.set_yticks(range(len(arms[regime])), arms[regime], fontsize=8)
        axes.set(title=regime, xlabel="step with a reason that no teacher trace has there")
    if images:
        figure.colorbar(images[0], ax=grid, label="share of samples, square-root scale (in the cells: per cent)", aspect=40)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_reader(runs: Runs, path: Path) -> None:
    """Reward hacking, if there is any: GSRM's structure reward minus the true one over the steps, a line a seed."""
    def draw(axes, regime: str, name: str) -> bool:
        for arm, color in READ.items():
            if arm.startswith("sft") == (name == "after"):
                each_seed(axes, runs, regime, arm, lambda curve: gap(curve) if "structure" in curve else None, color, arm)
        return bool(axes.lines)
    side_by_side(path, ("sparse", "dense"), draw, "step", {"before": "GSRM's reward - true one, from the base", "after": "... and after SFT (another scale)"})


def draw_levels(runs: Runs, path: Path) -> None:
    """Gain of RLKD over GRPO against the base's success rate, a point a difficulty; and the three of them, level by level."""
    plt, levels = pictures(), [level for level in LEVELS if (level, "base") in runs]
    figure, (against, each) = plt.subplots(1, 2, figsize=(10.4, 3.9), constrained_layout=True)
    for level in levels:
        gain, base = gains(runs, level, "rlkd", "grpo", "sampled"), values(runs, level, "base", "sampled")
        if len(gain):
            mean, _, low, _ = mean_interval(gain)
            against.errorbar(base.mean(), mean, yerr=mean - low if np.isfinite(low) else None, marker="o", color=COLORS["rlkd"], capsize=3)
            easy, floor = base.mean() > 0.8, base.mean() < 0.12 and mean < 0.2                  # near the right end; near the line on the left
            against.annotate(LEVELS[level], (base.mean(), mean), textcoords="offset points", xytext=(4, -14) if easy else (7, 10 if floor else 5),
                             ha="right" if easy else "left", fontsize=9)
    against.axhline(0, color="0.5", linewidth=0.8)
    against.set(xlabel="accuracy of the base, sampled (a guess is right one time in ten)", ylabel="accuracy of RLKD - accuracy of GRPO",
                title="a point a level: people needed of how many", xlim=(0.08, 1.05), xscale="log")
    against.set_xticks([0.1, 0.2, 0.5, 1.0], ["0.1", "0.2", "0.5", "1.0"])
    against.xaxis.minorticks_off()
    for arm in ("base", "grpo", "rlkd"):
        there = [i for i, level in enumerate(levels) if (level, arm) in runs]
        band(each, there, [values(runs, levels[i], arm, "sampled") for i in there], COLORS[arm], arm)
    each.set_xticks(range(len(levels)), [LEVELS[level] for level in levels])
    each.set(xlabel="people needed of how many", ylabel="accuracy, sampled", ylim=(0, 1.02))
    each.legend(frameon=False)
    for axes in (against, each):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


PICTURES = {"curves": draw_curves, "data": draw_data, "pass": draw_pass, "left": draw_left, "levels": draw_levels, "reader": draw_reader}
