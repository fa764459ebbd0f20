"""The study's page: tables, verdicts and pictures, all from the results file that study.py wrote, put into the marked places of docs/study.md.

    python study.py report                                      # docs/study.jsonl -> docs/study.md and its pictures, byte for byte
    python study.py report --results out/study.jsonl            # another study -> out/study.md: the same page with its figures

Interval: mean +- t(0.975, n-1) * sd / sqrt(n) over n seeds. Two arms are compared seed by seed, and a claim about them is supported (the interval of the difference lies
on the claimed side of 0), not supported (on the other side), or undecided (0 is in it).
"""
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from grade import mean_interval
from plots import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, pictures

Runs = dict[tuple[str, str], dict[int, dict]]             # (regime, arm) -> seed -> its line of the results file
DIGITS = {"length": 0, "paths": 1}
COLORS = {"base": "#777777", "grpo": RED, "rlkd": BLUE, "rlkd, true structure": SKY, "structure only": GREEN, "sft 512": PURPLE, "sft 8192": ORANGE}
CLAIMS = (   # what the paper says or implies, arm, against, figure
    ("RLKD is more accurate than outcome-only GRPO (paper, table of AIME24: pass@1)", "rlkd", "grpo", "sampled"),
    ("... and one greedy answer is too", "rlkd", "grpo", "greedy"),
    ("... and at pass@64 (guesses not counted)", "rlkd", "grpo", "found@64"),
    ("RLKD's pass@64 is above the base's: it finds what the base does not", "rlkd", "base", "found@64"),
    ("RLKD follows the teacher's structure more than GRPO does", "rlkd", "grpo", "structure"),
    ("... and it chooses the teacher's next sub-problem more often", "rlkd", "grpo", "choice"),
    ("RLKD is more accurate than SFT on the same teacher traces", "rlkd", "sft 512", "sampled"),
    ("... and at pass@64 (guesses not counted)", "rlkd", "sft 512", "found@64"),
    ("RLKD follows the teacher's structure more than SFT does (paper: SFT copies the surface)", "rlkd", "sft 512", "structure"),
    ("0.1 % of the data are enough: RLKD on 8 problems against SFT on 8192", "rlkd, 8 problems", "sft 8192", "sampled"),
    ("RLKD beats GRPO on larger problems", "rlkd", "grpo", "larger"),
    ("... and on a wording never seen", "rlkd", "grpo", "other"),
    ("Structure and outcome together beat the structure reward alone", "rlkd", "structure only", "sampled"),
    ("RL from the base beats RL after SFT (RLKD-Zero)", "rlkd", "sft 512 -> rlkd", "sampled"),
    ("After SFT, RLKD beats GRPO", "sft 512 -> rlkd", "sft 512 -> grpo", "sampled"),
    ("The reward has to stop where the student leaves the teacher's branch", "rlkd, true structure", "no stop rule", "sampled"),
    ("A generative reward model beats the similarity of lines", "rlkd", "line similarity", "sampled"),
)
BEYOND = (   # what we added or asked
    ("The reward model's mistakes cost accuracy: true structure against GSRM", "rlkd, true structure", "rlkd", "sampled"),
    ("All teacher traces beat one", "rlkd", "rlkd, one teacher", "sampled"),
    ("GDPO beats the plain sum of the rewards", "rlkd, true structure", "plain sum", "sampled"),
    ("The structure reward over the teacher's number of steps beats the raw sum (both in a plain sum)", "plain sum", "plain sum of raw", "sampled"),
    ("RLKD beats on-policy distillation from an SFT teacher model", "rlkd", "distillation", "sampled"),
    ("... and on-policy distillation of a student that SFT has taught the teacher's voice", "rlkd", "sft 512 -> distillation", "sampled"),
    ("RLKD beats GRPO with that distillation", "rlkd", "grpo + distillation", "sampled"),
    ("GRPO finds more different right walks than RLKD", "grpo", "rlkd", "paths"),
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


def cell(sample: np.ndarray, digits: int = 2, sign: str = "") -> str:
    """Mean and half the interval's width."""
    if not len(sample):
        return ""
    mean, _, low, _ = mean_interval(sample)
    return f"{mean:{sign}.{digits}f}" + (f" ± {mean - low:.{digits}f}" if np.isfinite(low) and sample.std() else "")          # alike for all seeds: there is no spread to tell


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) if lines else "*no runs yet*"

# ------------------------------------------------------------------------------------------------ tables

def arms_table(runs: Runs, regime: str, arms: list[str], metrics: dict[str, str]) -> str:
    """An arm a line: seeds, and every figure with its interval."""
    def figures(arm: str) -> list[str]:
        samples = [(values(runs, regime, arm, name), DIGITS.get(name.split()[-1], 2)) for name in metrics]
        return [cell(sample, digits) + f" ({len(sample)} seeds)" * (0 < len(sample) < len(runs[regime, arm])) for sample, digits in samples]
    return table(["arm", "seeds", *metrics.values()], [[arm, str(len(runs[regime, arm])), *figures(arm)] for arm in arms if (regime, arm) in runs])


def against_table(runs: Runs, regime: str, arms: list[str], against: str, names: dict[str, str]) -> str:
    """Differences to one arm, paired by seed."""
    lines = [[arm, str(len(gains(runs, regime, arm, against, "sampled")))] + [cell(gains(runs, regime, arm, against, name), DIGITS.get(name, 2), "+") for name in names]
             for arm in arms if arm != against and len(gains(runs, regime, arm, against, "sampled")) > 1]
    return table([f"arm - {against}", "seeds", *names.values()], lines)


def verdicts(runs: Runs, claims: tuple, regimes: tuple[str, ...] = ("sparse", "dense")) -> str:
    """Each claim in each regime: the difference, its interval, and what that says."""
    def judged(arm: str, against: str, name: str, regime: str) -> str:
        sample = gains(runs, regime, arm, against, name)
        if len(sample) < 2:
            return "not run"
        _, _, low, high = mean_interval(sample)
        word = "**supported**" if low > 0 else "**not supported**" if high < 0 else "undecided"
        return f"{word}: {cell(sample, DIGITS.get(name, 2) + 1, '+')} ({len(sample)} seeds)"
    return table(["claim", "figure", *regimes], [[text, f"{name}, {arm} - {against}", *(judged(arm, against, name, regime) for regime in regimes)]
                                                 for text, arm, against, name in claims])


def levels_table(runs: Runs, levels: dict[str, str]) -> str:
    """Base, GRPO, RLKD over the difficulties: sampled accuracy and RLKD - GRPO, then what GRPO and RLKD find and how they get there."""
    each = lambda name, figure: [cell(values(runs, name, arm, figure)) for arm in ("base", "grpo", "rlkd")]
    lines = [[text, str(len(gain := gains(runs, name, "rlkd", "grpo", "sampled"))), *each(name, "sampled"), cell(gain, 2, "+"), *each(name, "found@64"), *each(name, "structure")]
             for name, text in levels.items() if (name, "base") in runs]
    return table(["people needed", "seeds", "sampled: base", "grpo", "rlkd", "rlkd - grpo, paired", "pass@64 without guesses: base", "grpo", "rlkd",
                  "true structure: base", "grpo", "rlkd"], lines)

# ------------------------------------------------------------------------------------------------ pictures

def band(axes, x: list, samples: list[np.ndarray], color: str, label: str, line: str = "-") -> None:
    """Means over seeds with their intervals."""
    found = [mean_interval(sample) for sample in samples]
    mean = np.array([f[0] for f in found])
    axes.plot(x, mean, line, color=color, label=label, marker="o" if len(x) < 9 else None, markersize=4)
    axes.fill_between(x, [max(0, f[2]) for f in found], [min(1, f[3]) for f in found], where=[np.isfinite(f[2]) for f in found], color=color, alpha=0.18, linewidth=0)


def side_by_side(path: Path, regimes: tuple[str, ...], draw: Callable, xlabel: str, ylabel: str, **more) -> None:
    """One picture with a panel a regime; draw(axes, regime)."""
    plt = pictures()
    figure, grid = plt.subplots(1, len(regimes), figsize=(4.8 * len(regimes), 3.9), sharey=True, constrained_layout=True, squeeze=False)
    for axes, regime in zip(grid[0], regimes):
        draw(axes, regime)
        axes.set(xlabel=xlabel, title=regime, **more)
        if axes.get_xscale() == "log":
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.grid(alpha=0.3)
        if not axes.lines:
            axes.text(0.5, 0.5, "no runs yet", transform=axes.transAxes, ha="center", color="0.5")
    grid[0][0].set_ylabel(ylabel)
    handles = {label: handle for axes in grid[0] for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curves(runs: Runs, path: Path) -> None:
    def draw(axes, regime: str) -> None:
        for arm in [a for a in COLORS if any("curve" in row for row in runs.get((regime, a), {}).values())]:
            curves = np.array([row["curve"]["outcome"] for row in runs[regime, arm].values() if "curve" in row])
            band(axes, [10 * i + 5 for i in range(curves.shape[1])], list(curves.T), COLORS[arm], arm)
    side_by_side(path, ("sparse", "dense"), draw, "step", "accuracy of the training rollouts", ylim=(0, 1))


def draw_data(runs: Runs, path: Path) -> None:
    def draw(axes, regime: str) -> None:
        sft, rlkd = {n: f"sft {n}" for n in (32, 128, 512, 2048, 8192)}, {n: f"rlkd, {n} problems" for n in (8, 32, 128)} | {512: "rlkd"}
        for label, color, arms in (("SFT", COLORS["sft 512"], sft), ("RLKD", COLORS["rlkd"], rlkd)):
            there = [n for n, arm in arms.items() if (regime, arm) in runs]
            if there:
                band(axes, there, [values(runs, regime, arms[n], "sampled") for n in there], color, label)
        for arm in ("base", "grpo"):
            if (regime, arm) in runs:
                line, label = (":", "base") if arm == "base" else ("--", "grpo, 512 problems")
                axes.axhline(values(runs, regime, arm, "sampled").mean(), color=COLORS[arm], linestyle=line, label=label)
    side_by_side(path, ("sparse", "dense"), draw, "training problems with teacher traces", "accuracy, sampled", xlim=(6, 11000), xscale="log", ylim=(0, 1))


def draw_pass(runs: Runs, path: Path) -> None:
    def draw(axes, regime: str) -> None:
        for arm in [a for a in COLORS if (regime, a) in runs]:
            sizes = [2**i for i in range(7)]
            band(axes, sizes, [values(runs, regime, arm, f"found@{k}") for k in sizes], COLORS[arm], arm)
        axes.set_xscale("log", base=2)
    side_by_side(path, ("sparse", "dense"), draw, "k samples", "pass@k without guesses", xlim=(0.9, 72), ylim=(0, 1.02))


def draw_left(runs: Runs, path: Path) -> None:
    """Where students leave every teacher branch: an arm a line, a step a column."""
    plt, regimes = pictures(), ("sparse", "dense")
    shown = {*COLORS, "sft 512 -> grpo", "sft 512 -> rlkd", "sft 512 -> distillation", "line similarity"}
    arms = {regime: [arm for r, arm in runs if r == regime and arm in shown] for regime in regimes}
    figure, grid = plt.subplots(1, 2, figsize=(11, 0.9 + 0.36 * max(map(len, arms.values()))), constrained_layout=True, squeeze=False)
    for axes, regime in zip(grid[0], regimes):
        width = min(14, max((len(row["left"]) for arm in arms[regime] for row in runs[regime, arm].values()), default=1))
        share = lambda row, width=width: (row["left"] + [0.0] * width)[:width] + [row["never left"]]
        if not arms[regime]:
            axes.axis("off")
            continue
        image = axes.imshow([np.mean([share(row) for row in runs[regime, arm].values()], axis=0) for arm in arms[regime]], cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(width + 1), [*map(str, range(1, width + 1)), "never"], fontsize=8)
        axes.set_yticks(range(len(arms[regime])), arms[regime], fontsize=8)
        axes.set(title=regime, xlabel="step at which the student leaves every teacher branch")
        figure.colorbar(image, ax=axes, label="share of samples")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_levels(runs: Runs, path: Path) -> None:
    """Gain of RLKD over GRPO against the base's success rate, a point a difficulty."""
    plt = pictures()
    figure, axes = plt.subplots(figsize=(5.6, 3.9), constrained_layout=True)
    for regime in dict.fromkeys(r for r, _ in runs):
        gain, base = gains(runs, regime, "rlkd", "grpo", "sampled"), values(runs, regime, "base", "sampled")
        if len(gain) and len(base):
            mean, _, low, _ = mean_interval(gain)
            axes.errorbar(base.mean(), mean, yerr=mean - low if np.isfinite(low) else None, marker="o", color=COLORS["rlkd"], capsize=3)
            side = dict(xytext=(7, 5)) if base.mean() < 0.5 else dict(xytext=(-4, 7), ha="right")
            axes.annotate(LEVELS[regime], (base.mean(), mean), textcoords="offset points", fontsize=9, **side)
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set(xlabel="accuracy of the base, sampled (a guess is right one time in ten)", ylabel="accuracy of RLKD - accuracy of GRPO", title="people needed, of how many",
             xlim=(0.08, 1.02), xscale="log")
    axes.set_xticks([0.1, 0.2, 0.5, 1.0], ["0.1", "0.2", "0.5", "1.0"])
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


PICTURES = {"curves": draw_curves, "data": draw_data, "pass": draw_pass, "left": draw_left, "levels": draw_levels}

# ------------------------------------------------------------------------------------------------ the page

METRICS = {"greedy": "accuracy, greedy", "sampled": "sampled", "found@64": "pass@64 without guesses", "structure": "true structure", "choice": "choice",
           "answer": "answer on the branch", "paths": "right walks", "length": "length"}
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
        made[f"study-{regime}-gains"] = against_table(runs, regime, mine, "grpo", named("sampled", "greedy", "found@64", "structure", "choice", "larger", "other"))
        made[f"study-{regime}-rewards"] = against_table(runs, regime, [arm for arm in REWARDS if arm in arms], "rlkd, true structure",
                                                        named("sampled", "greedy", "found@64", "structure", "length"))
        made[f"study-{regime}-reader"] = table(["arm", "seeds", "GSRM's reward - true one", "r of the two"],
                                               [[arm, str(len(runs[regime, arm])), cell(values(runs, regime, arm, "reader gap"), 3, "+"), cell(values(runs, regime, arm, "r"))]
                                                for arm in mine if len(values(runs, regime, arm, "reader gap")) and "true" not in arm and arm != "line similarity"])
    made["study-claims"], made["study-beyond"], made["study-levels"] = verdicts(runs, CLAIMS), verdicts(runs, BEYOND), levels_table(runs, LEVELS)
    machines = Counter(row.get("machine", "an AMD EPYC or Intel Xeon (their lines do not say which)") for row in rows)
    made["study-size"] = (f"{len(rows)} runs, {sum(row['seconds'] for row in rows) / 3600:.0f} hours of training and evaluation on one core each, beside other work: "
                          + "; ".join(f"{count} on {name}" for name, count in sorted(machines.items())) + ".")
    minutes = lambda *keys: sum(row["seconds"] for key in keys for row in runs[key].values()) / 60
    made["study-quotes"] = "\n".join(f"* {text}: **{cell(sample, 2, '+')}** in sampled accuracy, paired by seed, {len(sample)} seeds: "
                                      f"`python study.py --arms {shlex.join((arm, other))} --regimes {regime} --results out/study.jsonl`, "
                                      f"{minutes((regime, arm), (regime, other)):.0f} minutes of one core"
                                      for text, regime, arm, other in QUOTES if len(sample := gains(runs, regime, arm, other, "sampled"))) or "*no runs yet*"
    made["study-short"] = arms_table(runs, "sparse", ["base", "sft 512", "grpo", "rlkd"], named("greedy", "sampled", "found@64", "structure", "larger", "other"))
    return made


def fill(text: str, made: dict[str, str]) -> str:
    """The page with each `<!-- study-NAME --> ... <!-- /study-NAME -->` holding its block; ValueError for a place that no block is made for."""
    if unknown := set(re.findall(r"<!-- (study-[\w-]+) -->", text)) - set(made):
        raise ValueError(f"the page has a place for {', '.join(sorted(unknown))}, which the report does not make")
    return re.sub(r"<!-- (study-[\w-]+) -->.*?<!-- /\1 -->", lambda m: f"<!-- {m[1]} -->\n{made[m[1]]}\n<!-- /{m[1]} -->", text, flags=re.DOTALL)


def report(rows: list[dict], made: dict[str, str], page: Path, template: Path) -> list[Path]:
    """Writes the page (the template's prose, the rows' `blocks`) and its pictures beside it; the same rows give the same bytes. -> what was written."""
    runs, written = gathered(rows), [page]
    page.write_text(fill(template.read_text(encoding="utf-8"), made), encoding="utf-8")
    for name, draw in PICTURES.items():
        written.append(page.with_name(f"{page.stem}_{name}.png"))
        draw(runs, written[-1])
    return written
