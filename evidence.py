"""The study's page: tables and verdicts, all from the results file that study.py wrote, put into the marked places of docs/study.md; its pictures: study_plots.py.

    python study.py report                                      # docs/study.jsonl -> docs/study.md and its pictures, byte for byte
    python study.py report --results out/study.jsonl            # another study -> out/study.md: the same page with its figures

Interval: mean +- t(0.975, n-1) * sd / sqrt(n) over n seeds. Two arms are compared seed by seed, and a claim about them is supported (the interval of the difference lies
on the claimed side of 0), not supported, the opposite (on the other side), no difference above 0.05 (0 is in it, and it reaches no further), or undecided (0 is in it, and more).
"""
import os
import re
import shlex
from collections import Counter
from pathlib import Path

import numpy as np

from grade import mean_interval
from measures import Runs, gains, gap, gathered, values
from study_plots import ALONE, LEVELS, PICTURES, READ

DIGITS, CLOSE = {"length": 0, "paths": 1}, 0.05
CLAIMS = (   # what the paper reports or says, arm, against, figure
    ("RLKD beats GRPO after SFT (paper: AIME24 pass@1, of a distilled student)", "sft 512 -> rlkd", "sft 512 -> grpo", "sampled"),
    ("... without guesses", "sft 512 -> rlkd", "sft 512 -> grpo", "found@1"),
    ("... and at pass@64 (paper: the same student; here guesses do not count)", "sft 512 -> rlkd", "sft 512 -> grpo", "found@64"),
    ("RLKD beats GRPO after SFT, both at a third of the rate", "sft 512 -> rlkd, lr/3", "sft 512 -> grpo, lr/3", "sampled"),
    ("... without guesses", "sft 512 -> rlkd, lr/3", "sft 512 -> grpo, lr/3", "found@1"),
    ("... and at pass@64", "sft 512 -> rlkd, lr/3", "sft 512 -> grpo, lr/3", "found@64"),
    ("RLKD without SFT beats SFT in the teacher's words (paper: RLKD-Zero, AIME24 pass@1, against an Instruct model of other data)", "rlkd", "sft 512", "sampled"),
    ("RLKD on 8 problems, given a reward model, beats SFT in the teacher's words on 8192 (paper: 0.1 % of the data are enough)", "rlkd, 8 problems", "sft 8192", "sampled"),
    ("RLKD follows the teacher's structure more than SFT in the teacher's words does (paper: SFT copies the surface)", "rlkd", "sft 512", "structure"),
    ("... also where it comes after SFT", "sft 512 -> rlkd", "sft 512", "structure"),
)
BEYOND = (   # what we asked besides, or added
    ("From the base, RLKD beats GRPO (both at the preset's weights)", "rlkd", "grpo", "sampled"),
    ("... without guesses", "rlkd", "grpo", "found@1"),
    ("... and with one greedy answer", "rlkd", "grpo", "greedy"),
    ("... and at pass@64 without guesses", "rlkd", "grpo", "found@64"),
    ("... and on larger problems", "rlkd", "grpo", "larger"),
    ("... and there without guesses", "rlkd", "grpo", "larger found@1"),
    ("... and on a wording never seen", "rlkd", "grpo", "other"),
    ("... and there without guesses", "rlkd", "grpo", "other found@1"),
    ("RLKD follows the teacher's structure more than GRPO does", "rlkd", "grpo", "structure"),
    ("... and it chooses the teacher's next sub-problem more often", "rlkd", "grpo", "choice"),
    ("GRPO finds more different walks than RLKD", "grpo", "rlkd", "paths"),
    ("RLKD beats GRPO on the outcome alone at weight 1 (no format reward)", "rlkd", ALONE, "sampled"),
    ("... and without guesses", "rlkd", ALONE, "found@1"),
    ("... and on larger problems", "rlkd", ALONE, "larger"),
    ("... and there without guesses", "rlkd", ALONE, "larger found@1"),
    ("GRPO on the outcome alone at weight 1 beats GRPO at the preset's weights", ALONE, "grpo", "sampled"),
    ("With the outcome at weight 1 in both, the structure reward (the true one, weight 1; and the preset's for format) adds accuracy", "structure : outcome 1", ALONE, "sampled"),
    ("... and on larger problems", "structure : outcome 1", ALONE, "larger"),
    ("... and there without guesses", "structure : outcome 1", ALONE, "larger found@1"),
    ("... and on a wording never seen", "structure : outcome 1", ALONE, "other"),
    ("... and there without guesses", "structure : outcome 1", ALONE, "other found@1"),
    ("Structure and outcome together beat the structure reward alone", "rlkd", "structure only", "sampled"),
    ("A generative reward model beats the similarity of lines", "rlkd", "line similarity", "sampled"),
    ("The reward has to stop where the student leaves the teacher's branch", "rlkd, true structure", "no stop rule", "sampled"),
    ("... and on larger problems", "rlkd, true structure", "no stop rule", "larger"),
    ("RLKD's pass@64 without guesses is above the base's", "rlkd", "base", "found@64"),
    ("... and above that of SFT on the same traces", "rlkd", "sft 512", "found@64"),
    ("On a wording never seen, RLKD is better than the base", "rlkd", "base", "other"),
    ("... and there without guesses", "rlkd", "base", "other found@1"),
    ("SFT in the student's own words beats SFT in the teacher's", "sft 512, own words", "sft 512", "sampled"),
    ("RLKD from the base beats that SFT in its own words", "rlkd", "sft 512, own words", "sampled"),
    ("... and at pass@64 without guesses", "rlkd", "sft 512, own words", "found@64"),
    ("... and on larger problems", "rlkd", "sft 512, own words", "larger"),
    ("RLKD after SFT in its own words improves on that student", "sft 512, own words -> rlkd", "sft 512, own words", "sampled"),
    ("GRPO after SFT in its own words improves on that student", "sft 512, own words -> grpo", "sft 512, own words", "sampled"),
    ("After SFT in its own words, RLKD beats GRPO", "sft 512, own words -> rlkd", "sft 512, own words -> grpo", "sampled"),
    ("... and on larger problems", "sft 512, own words -> rlkd", "sft 512, own words -> grpo", "larger"),
    ("... and follows the teacher's structure more", "sft 512, own words -> rlkd", "sft 512, own words -> grpo", "structure"),
    ("GRPO then finds more different walks than RLKD", "sft 512, own words -> grpo", "sft 512, own words -> rlkd", "paths"),
    ("RLKD after SFT in the teacher's words improves on that student", "sft 512 -> rlkd", "sft 512", "sampled"),
    ("... without guesses", "sft 512 -> rlkd", "sft 512", "found@1"),
    ("GRPO after SFT in the teacher's words improves on that student", "sft 512 -> grpo", "sft 512", "sampled"),
    ("... without guesses", "sft 512 -> grpo", "sft 512", "found@1"),
    ("RLKD after SFT in the teacher's words finds more than that student in many samples (pass@64 without guesses)", "sft 512 -> rlkd", "sft 512", "found@64"),
    ("GRPO after SFT in the teacher's words finds more than that student in many samples", "sft 512 -> grpo", "sft 512", "found@64"),
    ("At a third of the rate, RLKD after SFT in the teacher's words improves on that student", "sft 512 -> rlkd, lr/3", "sft 512", "sampled"),
    ("... without guesses", "sft 512 -> rlkd, lr/3", "sft 512", "found@1"),
    ("... with one greedy answer", "sft 512 -> rlkd, lr/3", "sft 512", "greedy"),
    ("... and in many samples", "sft 512 -> rlkd, lr/3", "sft 512", "found@64"),
    ("... and it follows the teacher's structure more", "sft 512 -> rlkd, lr/3", "sft 512", "structure"),
    ("At a third of the rate, GRPO improves on that student", "sft 512 -> grpo, lr/3", "sft 512", "sampled"),
    ("... without guesses", "sft 512 -> grpo, lr/3", "sft 512", "found@1"),
    ("... with one greedy answer", "sft 512 -> grpo, lr/3", "sft 512", "greedy"),
    ("... and in many samples", "sft 512 -> grpo, lr/3", "sft 512", "found@64"),
    ("On-policy distillation after SFT in the teacher's words improves on that student", "sft 512 -> distillation", "sft 512", "sampled"),
    ("... without guesses", "sft 512 -> distillation", "sft 512", "found@1"),
    ("... with one greedy answer", "sft 512 -> distillation", "sft 512", "greedy"),
    ("... and on larger problems", "sft 512 -> distillation", "sft 512", "larger"),
    ("... and in many samples", "sft 512 -> distillation", "sft 512", "found@64"),
    ("RLKD after SFT beats that distillation, from the same start", "sft 512 -> rlkd", "sft 512 -> distillation", "sampled"),
    ("... and in many samples", "sft 512 -> rlkd", "sft 512 -> distillation", "found@64"),
    ("GRPO after SFT beats it", "sft 512 -> grpo", "sft 512 -> distillation", "sampled"),
    ("... without guesses", "sft 512 -> grpo", "sft 512 -> distillation", "found@1"),
    ("RLKD after SFT at a third of the rate beats it", "sft 512 -> rlkd, lr/3", "sft 512 -> distillation", "sampled"),
    ("GRPO after SFT at a third of the rate beats it", "sft 512 -> grpo, lr/3", "sft 512 -> distillation", "sampled"),
    ("... without guesses", "sft 512 -> grpo, lr/3", "sft 512 -> distillation", "found@1"),
    ("RLKD from the base beats RLKD after SFT", "rlkd", "sft 512 -> rlkd", "sampled"),
    ("The reward model's mistakes cost accuracy: true structure against GSRM", "rlkd, true structure", "rlkd", "sampled"),
    ("All teacher traces beat one", "rlkd", "rlkd, one teacher", "sampled"),
    ("GDPO beats the plain sum of the rewards", "rlkd, true structure", "plain sum", "sampled"),
    ("... and on larger problems", "rlkd, true structure", "plain sum", "larger"),
    ("The structure reward over the teacher's number of steps beats the raw sum (both in a plain sum)", "plain sum", "plain sum of raw", "sampled"),
    ("The preset's structure : outcome 4 beats 1", "rlkd, true structure", "structure : outcome 1", "sampled"),
    ("... and on larger problems", "rlkd, true structure", "structure : outcome 1", "larger"),
    ("From the base, RLKD beats on-policy distillation (which breaks that student: in most seeds most samples end without a step)", "rlkd", "distillation", "sampled"),
    ("... and GRPO with that distillation (which ends below the base on average, and breaks it in most sparse seeds)", "rlkd", "grpo + distillation", "sampled"),
    ("RLKD from the base beats on-policy distillation after SFT", "rlkd", "sft 512 -> distillation", "sampled"),
)


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


def glance_table(runs: Runs, arms: tuple[str, ...], names: dict[str, str], regimes: tuple[str, ...] = ("sparse", "dense")) -> str:
    """A few figures of the main arms, the regimes side by side."""
    each = lambda regime, arm: [noted(values(runs, regime, arm, name), DIGITS.get(name, 2), len(runs.get((regime, arm), {}))) for name in names]
    head = [f"{regime}: {title}" if title == [*names.values()][0] else title for regime in regimes for title in names.values()]
    return table(["arm", *head], [[arm, *(part for regime in regimes for part in each(regime, arm))] for arm in arms if any((regime, arm) in runs for regime in regimes)])


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
        if not spread(sample) and abs(sample[0]) < 1e-9:
            return f"**no difference**: both {values(runs, regime, arm, name).mean():.2f} in every seed ({len(sample)} seeds)"
        _, _, low, high = mean_interval(sample)
        close = name not in DIGITS and max(-low, high) <= CLOSE
        word = "**supported**" if low > 0 else "**not supported, the opposite**" if high < 0 else f"**no difference above {CLOSE}**" if close else "undecided"
        return f"{word}: {cell(sample, DIGITS.get(name, 2) + 1, '+')} ({len(sample)} seeds)"
    return table(["claim", "figure", *regimes], [[text, f"{ALL.get(name, name)}: {arm} - {against}", *(judged(arm, against, name, regime) for regime in regimes)]
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


def elsewhere_table(runs: Runs, levels: dict[str, str]) -> str:
    """The same three over the difficulties on what they were not trained on."""
    each = lambda level, name: [*(noted(values(runs, level, arm, name), 2, len(runs.get((level, arm), {}))) for arm in ("base", "grpo", "rlkd")),
                                cell(gains(runs, level, "rlkd", "grpo", name), 2, "+")]
    head = [f"{title}: base" if arm == "base" else arm for title in ELSEWHERE.values() for arm in ("base", "grpo", "rlkd", "rlkd - grpo, paired")]
    return table(["people needed", *head], [[text, *(part for name in ELSEWHERE for part in each(level, name))] for level, text in levels.items() if (level, "base") in runs])

# ------------------------------------------------------------------------------------------------ the page

METRICS = {"greedy": "accuracy, greedy", "sampled": "sampled", "found@1": "sampled, no guesses", "found@64": "pass@64, no guesses", "structure": "true structure",
           "choice": "choice", "answer": "answer on the branch", "sums": "sums right", "paths": "walks", "length": "length"}
ELSEWHERE = {"larger": "larger, sampled", "other": "reworded, sampled"}
ALL = METRICS | ELSEWHERE | {"larger found@1": "larger, no guesses", "other found@1": "reworded, no guesses"}
QUOTES = (("RLKD - GRPO where outcomes are sparse, both at the preset's weights", "sparse", "rlkd", "grpo"),
          ("RLKD - GRPO on the outcome alone at weight 1, sparse", "sparse", "rlkd", ALONE),
          ("RLKD - GRPO where outcomes are dense, at the preset's weights", "dense", "rlkd", "grpo"),
          ("RLKD - GRPO on the outcome alone at weight 1, dense", "dense", "rlkd", ALONE),
          ("RLKD - SFT on the same 512 problems in the teacher's words, sparse", "sparse", "rlkd", "sft 512"),
          ("RLKD - SFT on the same walks told in the student's own words, sparse", "sparse", "rlkd", "sft 512, own words"))            # of the README
GLANCE = ("base", "grpo", ALONE, "structure only", "rlkd", "line similarity", "sft 512", "sft 512 -> grpo", "sft 512 -> rlkd", "sft 512 -> grpo, lr/3",
          "sft 512 -> rlkd, lr/3", "sft 512 -> distillation", "sft 512, own words", "sft 512, own words -> grpo", "sft 512, own words -> rlkd")
REWARDS = ("structure : outcome 1/4", "structure : outcome 1/2", "structure : outcome 1", "structure : outcome 2", "no stop rule", "plain sum", "plain sum of raw",
           "no std", "Dr.GRPO", "GRPO's mean over rows", "two updates, clip 0.2", "two updates, DAPO's clip")


def blocks(rows: list[dict]) -> dict[str, str]:
    """What the report puts into the page's marked places, by their names."""
    runs, made, named = gathered(rows), {}, lambda *names: {name: ALL[name] for name in names}
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for regime in ("sparse", "dense"):
        mine = [arm for arm in arms if arm not in REWARDS]
        made[f"study-{regime}"] = arms_table(runs, regime, mine, METRICS)
        for name in ELSEWHERE:                             # 16 samples there, 64 on problems as trained
            places = {m: (name if m == "sampled" else f"{name} {m}").replace("@64", "@16") for m in METRICS}
            made[f"study-{regime}-{name}"] = arms_table(runs, regime, mine, {places[m]: METRICS[m].replace("@64", "@16") for m in METRICS})
        made[f"study-{regime}-gains"] = against_table(runs, regime, mine, "grpo", named("sampled", "greedy", "found@1", "found@64", "structure", "choice", "larger", "other"))
        made[f"study-{regime}-rewards"] = against_table(runs, regime, [arm for arm in REWARDS if arm in arms], "rlkd, true structure",
                                                        named("sampled", "greedy", "found@1", "structure", "choice", "paths", "length", "larger"))
        made[f"study-{regime}-reader"] = reader_table(runs, regime)
    made["study-claims"], made["study-beyond"], made["study-levels"] = verdicts(runs, CLAIMS), verdicts(runs, BEYOND), levels_table(runs, LEVELS)
    made["study-levels-elsewhere"] = elsewhere_table(runs, LEVELS)
    machines = Counter(row.get("machine", "an AMD EPYC or Intel Xeon (their lines do not say which)") for row in rows)
    versions, hours = len({row["commit"].partition("+")[0] for row in rows if "commit" in row}), f"{sum(row['seconds'] for row in rows) / 3600:.1f}"
    made["study-size"] = (f"{len(rows)} run{'s' * (len(rows) > 1)}, {hours} hours of training and evaluation on one core each, beside other work: "
                          + "; ".join(f"{count} on {name}" for name, count in sorted(machines.items())) + f". Trained at {versions} commits of this repository." * (versions > 0))
    made["study-quotes"] = "\n".join(f"* {text}: **{cell(sample, 3, '+')}** in sampled accuracy, paired by seed, {len(sample)} seed{'s' * (len(sample) > 1)}: "
                                      f"`python study.py --arms {shlex.join((arm, other))} --regimes {regime} --results out/study.jsonl`, "
                                      f"{sum(row['seconds'] for key in ((regime, arm), (regime, other)) for row in runs[key].values()) / 60:.0f} minutes of one core"
                                      for text, regime, arm, other in QUOTES if len(sample := gains(runs, regime, arm, other, "sampled"))) or "*no runs yet*"
    intervals = lambda *names: sum(made[f"study-{name}"].count(" ± ") for name in names)
    beside = [f"{regime}-{kind}" for regime in ("sparse", "dense") for kind in ("gains", "rewards")]
    made["study-chance"] = (f"* {intervals('claims', 'beyond')} verdicts below have an interval: if nothing differed at all, one in twenty would leave 0 out all the same. "
                            f"The tables hold {intervals(*beside)} differences more. An interval that only just leaves it out is weak evidence.")
    made["study-glance"] = glance_table(runs, GLANCE, named("sampled", "found@1", "structure", "paths"))
    made["study-short"] = arms_table(runs, "sparse", ["base", "sft 512", "sft 512, own words", "grpo", ALONE, "rlkd", "sft 512, own words -> grpo", "sft 512, own words -> rlkd"],
                                     named("greedy", "sampled", "found@1", "found@64", "structure", "larger", "other"))
    return made


def fill(text: str, made: dict[str, str]) -> str:
    """The page with each `<!-- study-NAME --> ... <!-- /study-NAME -->` holding its block; ValueError for a place that no block is made for."""
    if unknown := set(re.findall(r"<!-- (study-[\w-]+) -->", text)) - set(made):
        raise ValueError(f"the page has a place for {', '.join(sorted(unknown))}, which the report does not make")
    return re.sub(r"<!-- (study-[\w-]+) -->.*?<!-- /\1 -->", lambda m: f"<!-- {m[1]} -->\n{made[m[1]]}\n<!-- /{m[1]} -->", text, flags=re.DOTALL)


def report(rows: list[dict], made: dict[str, str], page: Path, template: Path) -> list[Path]:
    """Writes the page (the template's prose, the rows' `blocks`) and its pictures beside it; the same rows give the same bytes. -> what was written."""
    runs, written, text, end = gathered(rows), [page], fill(template.read_text(encoding="utf-8"), made), "<!-- /study-size -->"
    if page.resolve() != template.resolve():
        text = re.sub(r"\]\((?!study[_.]|https?:)([^)]+)\)", lambda link: f"]({os.path.relpath(template.parent / link[1], page.parent)})", text)
        text = re.sub(r"\]\(study(_\w+\.png|\.jsonl)\)", rf"]({page.stem}\1)", text)
        text = text.replace(end, f"{end}\n\n**Tables and pictures are of the runs in {page.stem}.jsonl, the sentences are the committed study's and may not fit them.**")
    page.write_text(text, encoding="utf-8")
    for name, draw in PICTURES.items():
        written.append(page.with_name(f"{page.stem}_{name}.png"))
        draw(runs, written[-1])
    return written
