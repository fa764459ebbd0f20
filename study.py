"""The evidence: arms x seeds as plain command lines over train.py, sft.py and eval.py; every table is drawn from one results file.

    python study.py --quick --results out/study.jsonl      # base, SFT, GRPO, RLKD; 3 seeds; sparse regime: 20 minutes on two cores
    python study.py --arms rlkd grpo --regimes dense --seeds 0 1 2 3 4 --results out/study.jsonl
    python study.py report                                 # the tables again, from docs/study.jsonl alone

An arm is a list of commands; each is printed and can be run alone. All arms start from the same student, train on the same problems and are evaluated by the
same two commands on the same held-out problems. A finished (regime, arm, seed) is a line of the results file and is not run again, so an interrupted study goes on.
Interval: mean +- t(0.975, n-1) * sd / sqrt(n) over n seeds. Differences are paired by seed.
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

from command import Parser, at_least, ending, folder
from data import append_jsonl, read_jsonl
from grade import mean_interval
from report import correlation, summary

REGIMES = {   # name -> (folder of problems, commands that make it, completion budget of RL, of evaluation: the teacher's voice, which SFT learns, is longer)
    "sparse": ("toy", [], 150, 200),
    "dense": ("out/study/dense",
              [f"python toy.py problems --people 9 --needed 4 6 --count 256 --seed {seed} --out out/study/dense/{split}.jsonl" for seed, split in ((1, "train"), (2, "test"))], 150, 200),
}
TRAIN = "python train.py --data {data} --eval_problems 0 --save_every 0 --max_new_tokens {budget} --seed {seed} --out {out}"
SFT = "python sft.py --model toy/student --data {data} --epochs 12 --lr 5e-4 --batch_size 32 --seed {seed} --out {out}/model"
EVAL = ("python eval.py --model {model} --data {data} --limit 64 --k 16 --temperature {temperature} --top_p 1 --max_new_tokens {room} "
        "--gsrm toy/gsrm --gsrm_max_new_tokens 300 --truth toy:read --seed {seed} --out {out}/eval_{temperature}.jsonl")
ARMS = {
    "base": [],
    "sft": [SFT],
    "grpo": [TRAIN + " --w_structure 0"],
    "rlkd": [TRAIN],
    "rlkd, true structure": [TRAIN + " --gsrm toy:read"],
    "structure only": [TRAIN + " --w_outcome 0"],
    "rlkd, one teacher": [TRAIN + " --max_teachers 1"],
    "rlkd, plain sum": [TRAIN + " --combine sum"],
}
QUICK = dict(arms=["base", "sft", "grpo", "rlkd"], regimes=["sparse"], seeds=[0, 1, 2])
METRICS = {"greedy": "accuracy greedy", "sampled": "accuracy sampled", "pass@16": "pass@16", "structure": "structure (GSRM)", "true_structure": "structure (true)",
           "r": "r(GSRM, true)", "length": "length"}


def run(command: str, threads: int, log: Path) -> None:
    """One command line, its output appended to `log`; RuntimeError with its last line if it fails."""
    with log.open("a") as file:
        file.write(f"$ {command}\n")
        file.flush()
        words = shlex.split(command)
        code = subprocess.run([sys.executable if words[0] == "python" else words[0], *words[1:]], stdout=file, stderr=subprocess.STDOUT,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
    if code:
        raise RuntimeError(f"{command} ended with status {code}: {log.read_text().splitlines()[-1]} (all that it said: {log})")


def figures(sampled: list[dict], greedy: list[dict]) -> dict[str, float]:
    """The study's measures of one trained student."""
    means, k = summary(sampled), sum(r["id"] == sampled[0]["id"] for r in sampled)
    return {"greedy": summary(greedy)["mean@1"][0], "sampled": means[f"mean@{k}"][0], f"pass@{k}": means[f"pass@{k}"][0], "structure": means["structure"][0],
            "true_structure": means["true_structure"][0], "r": correlation(sampled), "length": means["length"][0], "truncated": means["truncated"][0]}


def one(regime: str, arm: str, seed: int, folder: Path, threads: int) -> dict:
    """Trains and evaluates one arm with one seed: its line of the results file."""
    data, _, budget, room = REGIMES[regime]
    out = folder / regime / arm.replace(", ", "_").replace(" ", "_") / f"seed{seed}"
    out.mkdir(parents=True, exist_ok=True)
    fill = dict(data=data, budget=budget, room=room, seed=seed, out=out, model=out / "model" if ARMS[arm] else "toy/student")
    commands = [c.format(**fill, temperature="") for c in ARMS[arm]] + [EVAL.format(**fill, temperature=t) for t in (1, 0)]
    started = time.time()
    for file in ("log.txt", "log.jsonl", "rollouts.jsonl", "run.json", *(f"eval_{t}{end}" for t in (1, 0) for end in (".jsonl", ".settings.json"))):           # a half run starts over
        (out / file).unlink(missing_ok=True)
    shutil.rmtree(out / "model", ignore_errors=True)
    for command in commands:
        run(command, threads, out / "log.txt")
    rows = [[row for _, row in read_jsonl(out / f"eval_{t}.jsonl")] for t in (1, 0)]
    return {"regime": regime, "arm": arm, "seed": seed, **figures(*rows), "seconds": round(time.time() - started), "commands": commands}


def read_results(path: Path) -> list[dict]:
    """The runs in a results file; ValueError names the line that is none."""
    rows, wanted = read_jsonl(path), ("regime", "arm", "seed", *METRICS)
    for where, row in rows:
        if not isinstance(row, dict) or (missing := next((name for name in wanted if name not in row), None)):
            raise ValueError(f"{where}: no line of a study" + (f", it has no {missing!r}" if isinstance(row, dict) else "") + ": give a file that `python study.py run` wrote")
    return [row for _, row in rows]


def report(results: Path) -> str:
    """Markdown tables of a results file: one per regime, arms in their order, then differences to GRPO paired by seed."""
    rows, text = read_results(results), []
    for regime in [r for r in REGIMES if any(row["regime"] == r for row in rows)]:
        of = {arm: sorted([row for row in rows if (row["regime"], row["arm"]) == (regime, arm)], key=lambda row: row["seed"]) for arm in ARMS}
        text += [f"**{regime}**: mean over seeds and 95 % interval", "", "| | seeds | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 2) + "|"]
        for arm, found in of.items():
            if found:
                limits = {"length": (0, 0.0), "r": (2, -1.0, 1.0)}
                text.append(f"| {arm} | {len(found)} | " + " | ".join(cell([row[m] for row in found], *limits.get(m, (2, 0.0, 1.0))) for m in METRICS) + " |")
        pairs = [(arm, [(a, b) for a in found for b in of["grpo"] if a["seed"] == b["seed"]]) for arm, found in of.items() if arm not in ("base", "grpo")]
        text += [""] + [f"{arm} - grpo, paired by seed: sampled accuracy {cell([a['sampled'] - b['sampled'] for a, b in both])}, true structure "
                        f"{cell([a['true_structure'] - b['true_structure'] for a, b in both])}" for arm, both in pairs if len(both) > 1] + [""]
    return "\n".join(text)


def cell(values: list[float], digits: int = 2, least: float = -np.inf, most: float = np.inf) -> str:
    """Mean and interval, which is cut at what the measure can be."""
    mean, _, low, high = np.clip(mean_interval(np.array(values)), least, most)
    return f"{mean:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if np.isfinite(low) and low < high else "")


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--quick", action="store_true", help="the small study: " + json.dumps(QUICK))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=at_least(1), default=max(1, (os.cpu_count() or 1)), help="arms that run side by side, each with its share of the cores")
    parser.add_argument("--results", type=Path, default=Path("docs/study.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("out/study"), help="where the runs go")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    if args.command == "run":
        folder(args.results.parent)                                                 # before hours of work that could not be written down
        done = {(row["regime"], row["arm"], row["seed"]) for row in read_results(args.results)} if args.results.exists() else set()
        todo = [(regime, arm, seed) for regime in args.regimes for seed in args.seeds for arm in args.arms[::-1] if (regime, arm, seed) not in done]
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        for regime in {regime for regime, *_ in todo}:
            (args.out / regime).mkdir(parents=True, exist_ok=True)
            for command in REGIMES[regime][1]:
                run(command, threads, args.out / regime / "log.txt")
        with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(todo), unit="run") as bar:
            for future in as_completed([pool.submit(one, *key, args.out, threads) for key in todo]):
                append_jsonl(args.results, [future.result()])
                bar.update()
    if not args.results.exists() or not (tables := report(args.results)):
        parser.error(f"no results at {args.results}: run the study first")
    print(tables)


if __name__ == "__main__":
    with ending(RuntimeError):
        main()
