"""The study's page: tables, verdicts and pictures, all from the results file that study.py wrote, put into the marked places of docs/study.md.

    python study.py report                                      # docs/study.jsonl -> docs/study.md and its pictures, byte for byte
    python study.py report --results out/study.jsonl            # another study -> out/study.md: the same page with its figures

Interval: mean +- t(0.975, n-1) * sd / sqrt(n) over n seeds. Two arms are compared seed by seed, and a claim about them is supported (the interval of the difference lies
on the claimed side of 0), not supported (on the other side), or undecided (0 is in it).
"""
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import numpy as np

from grade import mean_interval
from plots import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, pictures

Runs = dict[tuple[str, str], dict[int, dict]]             # (regime, arm) -> seed -> its line of the results file
DIGITS = {"length": 0, "paths": 1}
COLORS = {"base": "#777777", "grpo": RED, "rlkd": BLUE, "rlkd, true structure": SKY, "structure only": GREEN, "sft 512": PURPLE, "sft 8192": ORANGE,
          "sft 512 -> grpo": "#8c564b", "sft 512 -> rlkd": "#000000"}
READ = {"rlkd": BLUE, "structure only": GREEN, "rlkd, 8 problems": ORANGE, "rlkd, 32 problems": SKY, "rlkd, 128 problems": RED, "sft 512 -> rlkd": "#000000"}   # by GSRM
CLAIMS = (   # what the paper reports or says, arm, against, figure
    ("RLKD beats GRPO after SFT (paper: AIME24 pass@1, of a distilled student)", "sft 512 -> rlkd", "sft 512 -> grpo", "sampled"),
    ("... and at pass@64 (paper: the same student; here guesses do not count)", "sft 512 -> rlkd", "sft 512 -> grpo", "found@64"),
    ("RLKD without SFT beats SFT (paper: RLKD-Zero, AIME24 pass@1, against an Instruct model of other data)", "rlkd", "sft 512", "sampled"),
    ("0.1 % of the data are enough, given a reward model: RLKD on 8 problems against SFT on 8192", "rlkd, 8 problems", "sft 8192", "sampled"),
    ("RLKD follows the teacher's structure more than SFT does (paper: SFT copies the surface)", "rlkd", "sft 512", "structure"),
    ("... also where it comes after SFT", "sft 512 -> rlkd", "sft 512", "structure"),
    ("The reward has to stop where the student leaves the teacher's branch", "rlkd, true structure", "no stop rule", "sampled"),
    ("Structure and outcome together beat the structure reward alone", "rlkd", "structure only", "sampled"),
    ("A generative reward model beats the similarity of lines", "rlkd", "line similarity", "sampled"),
)
BEYOND = (   # what we asked besides, or added
    ("From the base, RLKD beats GRPO", "rlkd", "grpo", "sampled"),
    ("... without guesses", "rlkd", "grpo", "found@1"),
    ("... and with one greedy answer", "rlkd", "grpo", "greedy"),
    ("... and at pass@64 without guesses", "rlkd", "grpo", "found@64"),
    ("... and on larger problems", "rlkd", "grpo", "larger"),
    ("... and on a wording never seen", "rlkd", "grpo", "other"),
    ("RLKD follows the teacher's structure more than GRPO does", "rlkd", "grpo", "structure"),
    ("... and it chooses the teacher's next sub-problem more often", "rlkd", "grpo", "choice"),
    ("GRPO finds more different walks than RLKD", "grpo", "rlkd", "paths"),
    ("RLKD's pass@64 without guesses is above the base's", "rlkd", "base", "found@64"),
    ("... and above that of SFT on the same traces", "rlkd", "sft 512", "found@64"),
    ("On a wording never seen, RLKD keeps what the base can do", "rlkd", "base", "other"),
    ("RLKD after SFT improves on that SFT student", "sft 512 -> rlkd", "sft 512", "sampled"),
    ("GRPO after SFT does", "sft 512 -> grpo", "sft 512", "sampled"),
    ("After SFT, RLKD keeps what many samples find (pass@64 without guesses)", "sft 512 -> rlkd", "sft 512", "found@64"),
    ("... and GRPO does", "sft 512 -> grpo", "sft 512", "found@64"),
    ("RLKD from the base beats RLKD after SFT", "rlkd", "sft 512 -> rlkd", "sampled"),
    ("The reward model's mistakes cost accuracy: true structure against GSRM", "rlkd, true structure", "rlkd", "sampled"),
    ("All teacher traces beat one", "rlkd", "rlkd, one teacher", "sampled"),
    ("GDPO beats the plain sum of the rewards", "rlkd, true structure", "plain sum", "sampled"),
    ("The structure reward over the teacher's number of steps beats the raw sum (both in a plain sum)", "plain sum", "plain sum of raw", "sampled"),
    ("The preset's structure : outcome 4 beats 1", "rlkd, true structure", "structure : outcome 1", "sampled"),
    ("RLKD beats on-policy distillation from an SFT teacher model", "rlkd", "distillation", "sampled"),
    ("... and on-policy distillation of a student that SFT has taught the teacher's voice", "rlkd", "sft 512 -> distillation", "sampled"),
    ("RLKD beats GRPO with that distillation", "rlkd", "grpo + distillation", "sampled"),
)


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


def spread(sample: np.ndarray) -> bool:
    """Do the seeds differ, by more than rounding?"""
    return bool(np.ptp(sample) > 1e-9)


def cell(sample: np.ndarray, digits: int = 2, sign: str = "") -> str:
    """Mean and half the interval's width."""
    if not len(sample):
        return ""
    mean, _, low, _ = mean_interval(sample)
    return f"{mean:{sign}.{digits}f}" + (f" ± {mean - low:.{digits}f}" if np.isfinite(low) and spread(sample) else "")          # alike for all seeds: there is no spread to tell


def noted(sample: np.ndarray, digits: int, of: int, sign: str = "") -> str:
    """The same, with the number of seeds where not all `of` them have the figure."""
    return cell(sample, digits, sign) + f" ({len(sample)} seed{'s' * (len(sample) > 1)})" * (0 < len(sample) < of)


def gap(curve: dict[str, list[float | None]]) -> np.ndarray:
    """The structure reward minus the true one along a curve; NaN where a step had no scored row."""
    return np.array(curve["structure"], dtype=float) - np.array(curve["true_structure"], dtype=float)


def reader_gap(runs: Runs, regime: str, arm: str) -> np.ndarray:
    """The run's structure reward minus the true one over its last 20 training steps, of every seed."""
    curves = [row["curve"] for _, row in sorted(runs.get((regime, arm), {}).items()) if "structure" in row.get("curve", {})]
    ends = np.array([gap(curve)[-2:].mean() for curve in curves])
    return ends[~np.isnan(ends)]


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) if lines else "*no runs yet*"

# ------------------------------------------------------------------------------------------------ tables

def arms_table(runs: Runs, regime: str, arms: list[str], metrics: dict[str, str]) -> str:
    """An arm a line: seeds, and every figure with its interval."""
    def figures(arm: str) -> list[str]:
        return [noted(values(runs, regime, arm, name), DIGITS.get(name.split()[-1], 2), len(runs[regime, arm])) for name in metrics]
    return table(["arm", "seeds", *metrics.values()], [[arm, str(len(runs[regime, arm])), *figures(arm)] for arm in arms if (regime, arm) in runs])


def against_table(runs: Runs, regime: str, arms: list[str], against: str, names: dict[str, str]) -> str:
    """Differences to one arm, paired by seed."""
    lines = [[arm, str(n)] + [noted(gains(runs, regime, arm, against, name), DIGITS.get(name, 2), n, "+") for name in names]
             for arm in arms if arm != against and (n := len(gains(runs, regime, arm, against, "sampled"))) > 1]
    return table([f"arm - {against}", "seeds", *names.values()], lines)


def verdicts(runs: Runs, claims: tuple, regimes: tuple[str, ...] = ("sparse", "dense")) -> str:
    """Each claim in each regime: the difference, its interval, and what that says."""
    def judged(arm: str, against: str, name: str, regime: str) -> str:
        sample = gains(runs, regime, arm, against, name)
        if len(sample) < 2:
            return "one seed" if len(sample) else "not run"
        if not spread(sample):
            return f"the same difference in every seed: {cell(sample, DIGITS.get(name, 2) + 1, '+')} ({len(sample)} seeds)"
        _, _, low, high = mean_interval(sample)
        word = "**supported**" if low > 0 else "**not supported**" if high < 0 else "undecided"
        return f"{word}: {cell(sample, DIGITS.get(name, 2) + 1, '+')} ({len(sample)} seeds)"
    return table(["claim", "figure", *regimes], [[text, f"{name}, {arm} - {against}", *(judged(arm, against, name, regime) for regime in regimes)]
                                                 for text, arm, against, name in claims])


def reader_table(runs: Runs, regime: str) -> str:
    """How GSRM agrees with the truth at the end of training."""
    lines = [[arm, str(n := len(runs[regime, arm])), noted(reader_gap(runs, regime, arm), 3, n, "+"), noted(values(runs, regime, arm, "r"), 2, n)]
             for arm in READ if (regime, arm) in runs]
    return table(["arm", "seeds", "GSRM's reward - true one", "r of the two"], lines)


def levels_table(runs: Runs, levels: dict[str, str]) -> str:
    """Base, GRPO, RLKD over the difficulties: sampled accuracy and RLKD - GRPO, then what of it is no guess, and how they get there."""
    each = lambda name, figure: [noted(values(runs, name, arm, figure), 2, len(runs.get((name, arm), {}))) for arm in ("base", "grpo", "rlkd")]
    lines = [[text, str(len(gain := gains(runs, name, "rlkd", "grpo", "sampled"))), *each(name, "sampled"), cell(gain, 2, "+"), *each(name, "found@1"), *each(name, "structure")]
             for name, text in levels.items() if (name, "base") in runs]
    return table(["people needed", "seeds", "sampled: base", "grpo", "rlkd", "rlkd - grpo, paired", "without guesses: base", "grpo", "rlkd",
                  "true structure: base", "grpo", "rlkd"], lines)

# ------------------------------------------------------------------------------------------------ pictures

def band(axes, x: list, samples: list[np.ndarray], color: str, label: str) -> None:
    """Means over seeds with their intervals."""
    mean, _, low, high = np.array([mean_interval(sample) for sample in samples]).reshape(-1, 4).T
    axes.plot(x, mean, color=color, label=label, marker="o" if len(x) < 9 else None, markersize=4)
    axes.fill_between(x, low.clip(0), high.clip(None, 1), where=np.isfinite(low), color=color, alpha=0.18, linewidth=0)
    if len(x) == 1 and np.isfinite(low[0]):                # a band has no width there
        axes.errorbar(x, mean, yerr=mean - low, color=color, capsize=3)


def side_by_side(path: Path, regimes: tuple[str, ...], draw: Callable, xlabel: str, ylabels: dict[str, str], **more) -> None:
    """One picture with a panel a regime, a row of them a figure: draw(axes, regime, figure) for each of ylabels."""
    plt = pictures()
    figure, grid = plt.subplots(len(ylabels), len(regimes), figsize=(4.8 * len(regimes), 0.7 + 3.2 * len(ylabels)), sharey=True, constrained_layout=True, squeeze=False)
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
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curves(runs: Runs, path: Path) -> None:
    def draw(axes, regime: str, name: str) -> bool:
        for arm in COLORS:
            if curves := [row["curve"][name] for row in runs.get((regime, arm), {}).values() if name in row.get("curve", {})]:
                band(axes, [10 * i + 5 for i in range(max(map(len, curves)))], [np.array(tens, dtype=float) for tens in zip_longest(*curves)], COLORS[arm], arm)
        return bool(axes.lines)
    side_by_side(path, ("sparse", "dense"), draw, "step", {"outcome": "accuracy of the training rollouts", "true_structure": "their true structure"}, ylim=(0, 1))


def draw_data(runs: Runs, path: Path) -> None:
    def draw(axes, regime: str, name: str) -> bool:
        sft, rlkd = {n: f"sft {n}" for n in (32, 128, 512, 2048, 8192)}, {n: f"rlkd, {n} problems" for n in (8, 32, 128)} | {512: "rlkd"}
        for label, color, arms in (("SFT", COLORS["sft 512"], sft), ("RLKD", COLORS["rlkd"], rlkd)):
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
    shown = {*COLORS, "sft 512 -> distillation", "line similarity", "structure : outcome 1/4"}
    whole = {key: [row for row in seeds.values() if all(row.get(name) is not None for name in (*rest, "left"))] for key, seeds in runs.items()}
    arms = {regime: [arm for r, arm in runs if r == regime and arm in shown and whole[r, arm]] for regime in regimes}
    figure, grid = plt.subplots(1, 2, figsize=(11, 1.6 + 0.34 * max(1, *map(len, arms.values()))), constrained_layout=True, squeeze=False)
    for axes, regime in zip(grid[0], regimes):
        width = min(12, max((len(row["left"]) for arm in arms[regime] for row in whole[regime, arm]), default=1))

        def share(row: dict, width: int = width) -> list[float]:
            return (row["left"] + [0.0] * width)[:width] + [row["stayed and found"], row["never left"] - row["stayed and found"], row["no steps"]]
        if not arms[regime]:
            axes.axis("off")
            axes.text(0.5, 0.5, f"{regime}: not measured yet", ha="center", color="0.5")
            continue
        image = axes.imshow([np.mean([share(row) for row in whole[regime, arm]], axis=0) for arm in arms[regime]], cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(width + 3), [*map(str, range(1, width + 1)), "stays, answers", "stays, does not", "no step"], fontsize=8)
        for label in axes.get_xticklabels()[-3:]:
            label.set_rotation(90)
        axes.set_yticks(range(len(arms[regime])), arms[regime], fontsize=8)
        axes.set(title=regime, xlabel="step with a reason that no teacher trace has there")
        figure.colorbar(image, ax=axes, label="share of samples")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_reader(runs: Runs, path: Path) -> None:
    """Reward hacking, if there is any: GSRM's structure reward minus the true one over the steps, a line a seed."""
    def draw(axes, regime: str, name: str) -> bool:
        for arm, color in READ.items():
            for curve in [row["curve"] for _, row in sorted(runs.get((regime, arm), {}).items()) if name in row.get("curve", {})]:
                axes.plot([10 * i + 5 for i in range(len(curve[name]))], gap(curve), color=color, linewidth=1, alpha=0.8, label=arm)
        return bool(axes.lines)
    side_by_side(path, ("sparse", "dense"), draw, "step", {"structure": "GSRM's reward - true one"})


def draw_levels(runs: Runs, path: Path) -> None:
    """Gain of RLKD over GRPO against the base's success rate, a point a difficulty; and the three of them, level by level."""
    plt, levels = pictures(), [level for level in LEVELS if (level, "base") in runs]
    figure, (against, each) = plt.subplots(1, 2, figsize=(10.4, 3.9), constrained_layout=True)
    for level in levels:
        gain, base = gains(runs, level, "rlkd", "grpo", "sampled"), values(runs, level, "base", "sampled")
        if len(gain):
            mean, _, low, _ = mean_interval(gain)
            against.errorbar(base.mean(), mean, yerr=mean - low if np.isfinite(low) else None, marker="o", color=COLORS["rlkd"], capsize=3)
            easy = base.mean() > 0.8
            against.annotate(LEVELS[level], (base.mean(), mean), textcoords="offset points", xytext=(4, -14) if easy else (7, 5), ha="right" if easy else "left", fontsize=9)
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

# ------------------------------------------------------------------------------------------------ the page

METRICS = {"greedy": "accuracy, greedy", "sampled": "sampled", "found@1": "sampled, no guesses", "found@64": "pass@64, no guesses", "structure": "true structure",
           "choice": "choice", "answer": "answer on the branch", "paths": "walks", "length": "length"}
ELSEWHERE = {"larger": "larger: sampled", "other": "reworded: sampled"}
LEVELS = {"5-people": "2-3 of 5", "7-people": "3-4 of 7", "dense": "4-6 of 9", "sparse": "7-8 of 11", "13-people": "9-10 of 13"}
QUOTES = (("RLKD - GRPO where outcomes are sparse", "sparse", "rlkd", "grpo"), ("RLKD - GRPO where they are dense", "dense", "rlkd", "grpo"),
          ("RLKD - SFT on the same 512 problems, sparse", "sparse", "rlkd", "sft 512"))            # of the README
REWARDS = ("structure : outcome 1/4", "structure : outcome 1/2", "structure : outcome 1", "structure : outcome 2", "no stop rule", "plain sum", "plain sum of raw",
           "no std", "Dr.GRPO", "GRPO's mean over rows", "two updates, clip 0.2", "two updates, DAPO's clip")


def blocks(rows: list[dict]) -> dict[str, str]:
    """What the report puts into the page's marked places, by their names."""
    runs, made, named = gathered(rows), {}, lambda *names: {name: (METRICS | ELSEWHERE)[name] for name in names}
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for regime in ("sparse", "dense"):
        mine = [arm for arm in arms if arm not in REWARDS]
        made[f"study-{regime}"] = arms_table(runs, regime, mine, METRICS)
        for name in ELSEWHERE:                             # 16 samples there, 64 on problems as trained
            places = {m: (name if m == "sampled" else f"{name} {m}").replace("@64", "@16") for m in METRICS}
            made[f"study-{regime}-{name}"] = arms_table(runs, regime, mine, {places[m]: METRICS[m].replace("@64", "@16") for m in METRICS})
        made[f"study-{regime}-gains"] = against_table(runs, regime, mine, "grpo", named("sampled", "greedy", "found@1", "found@64", "structure", "choice", "larger", "other"))
        made[f"study-{regime}-rewards"] = against_table(runs, regime, [arm for arm in REWARDS if arm in arms], "rlkd, true structure",
                                                        named("sampled", "greedy", "found@1", "structure", "choice", "paths", "length"))
        made[f"study-{regime}-reader"] = reader_table(runs, regime)
    made["study-claims"], made["study-beyond"], made["study-levels"] = verdicts(runs, CLAIMS), verdicts(runs, BEYOND), levels_table(runs, LEVELS)
    machines = Counter(row.get("machine", "an AMD EPYC or Intel Xeon (their lines do not say which)") for row in rows)
    made["study-size"] = (f"{len(rows)} runs, {sum(row['seconds'] for row in rows) / 3600:.0f} hours of training and evaluation on one core each, beside other work: "
                          + "; ".join(f"{count} on {name}" for name, count in sorted(machines.items())) + ".")
    made["study-quotes"] = "\n".join(f"* {text}: **{cell(sample, 3, '+')}** in sampled accuracy, paired by seed, {len(sample)} seeds: "
                                      f"`python study.py --arms {shlex.join((arm, other))} --regimes {regime} --results out/study.jsonl`, "
                                      f"{sum(row['seconds'] for key in ((regime, arm), (regime, other)) for row in runs[key].values()) / 60:.0f} minutes of one core"
                                      for text, regime, arm, other in QUOTES if len(sample := gains(runs, regime, arm, other, "sampled"))) or "*no runs yet*"
    made["study-short"] = arms_table(runs, "sparse", ["base", "sft 512", "grpo", "rlkd"], named("greedy", "sampled", "found@1", "found@64", "structure", "larger", "other"))
    return made


def fill(text: str, made: dict[str, str]) -> str:
    """The page with each `<!-- study-NAME --> ... <!-- /study-NAME -->` holding its block; ValueError for a place that no block is made for."""
    if unknown := set(re.findall(r"<!-- (study-[\w-]+) -->", text)) - set(made):
        raise ValueError(f"the page has a place for {', '.join(sorted(unknown))}, which the report does not make")
    return re.sub(r"<!-- (study-[\w-]+) -->.*?<!-- /\1 -->", lambda m: f"<!-- {m[1]} -->\n{made[m[1]]}\n<!-- /{m[1]} -->", text, flags=re.DOTALL)


def report(rows: list[dict], made: dict[str, str], page: Path, template: Path) -> list[Path]:
    """Writes the page (the template's prose, the rows' `blocks`) and its pictures beside it; the same rows give the same bytes. -> what was written."""
    runs, written, text, end = gathered(rows), [page], fill(template.read_text(encoding="utf-8"), made), "<!-- /study-size -->"
    if page.stem != template.stem:
        text = re.sub(r"\]\((?!study[_.]|https?:)([^)]+)\)", lambda link: f"]({os.path.relpath(template.parent / link[1], page.parent)})", text)
        text = re.sub(r"\]\(study(_\w+\.png|\.jsonl)\)", rf"]({page.stem}\1)", text)
        text = text.replace(end, f"{end}\n\n**Tables and pictures are of the runs in {page.stem}.jsonl, the sentences are the committed study's and may not fit them.**")
    page.write_text(text, encoding="utf-8")
    for name, draw in PICTURES.items():
        written.append(page.with_name(f"{page.stem}_{name}.png"))
        draw(runs, written[-1])
    return written
