"""The evidence: arms x seeds as plain command lines over train.py, sft.py and eval.py; docs/study.md is drawn from one results file.

    python study.py --quick                                # base, GRPO, RLKD; 3 seeds; sparse regime: 23 minutes on two cores of a shared Xeon (out/quick.jsonl, out/quick.md)
    python study.py                                        # the full study: goes on where docs/study.jsonl ends (many hours)
    python study.py --arms rlkd grpo --regimes dense --seeds 0 1 2 3 4 --results out/study.jsonl
    python study.py report                                 # docs/study.md, its tables and pictures, again from docs/study.jsonl alone (evidence.py)
    python study.py measure                                # the measures of the lines whose samples are still in out/study once more: after a change of a measure

An arm is a list of commands; each is printed, and can be run alone once the regime's problems are there (`data_commands`: the first that are printed). All arms of a
regime start from the same student, see the same problems and are evaluated by the same commands on the same held-out problems. A finished (regime, arm, seed) is a line
of the results file and is not run again, so an interrupted study goes on; a line that lacks a measure, of an older study.py, counts as unfinished, and the new one takes
its place. A seed is that of sampling, of the order of the problems and of the evaluation; data and base student are the same for all.
"""
import argparse
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Lock

from tqdm import tqdm

import evidence
from command import Parser, at_least, ending, folder, write_aside, writing
from data import read_jsonl, write_jsonl
from measures import SETS, measured, rounded, training
from watch import machine

ROOM = 200                                                # tokens of a completion in training: the longest walk in the teacher's wordy voice fits
MADE = "python toy.py problems --people {people} --needed {needed} "
REGIMES = {   # name -> (people, how many the answer takes), of training and of the larger problems
    "sparse": ((11, "7 8"), (13, "9 10")), "dense": ((9, "4 6"), (11, "7 8")),                                          # the two regimes of all arms
    "5-people": ((5, "2 3"), (7, "3 4")), "7-people": ((7, "3 4"), (9, "4 6")), "13-people": ((13, "9 10"), (14, "10 11")),     # more difficulties, for base, GRPO and RLKD
}
EPOCHS = {32: 200, 128: 60, 512: 30, 2048: 10, 8192: 4}    # of SFT on the teacher traces of so many problems: enough to go past the best one by validation, which is kept
SFT = ("python sft.py --model toy/student --data {{data}}/train.jsonl --limit {n} --eval_data {{data}}/val.jsonl --keep best --epochs {epochs} --lr 1e-3 --batch_size 32 "
       "--seed {{seed}} --out {{root}}/sft_{n}/seed{{seed}}/model")
TRAIN = f"python train.py --data {{data}}/train.jsonl --limit 512 --eval_problems 0 --save_every 0 --max_new_tokens {ROOM} --seed {{seed}} --out {{out}}"
EVAL = "python eval.py --model {model} --top_p 1 --max_new_tokens 300 --gsrm toy:read --seed {seed} "
EVALS = {"greedy": EVAL + "--data {data}/all.jsonl --temperature 0 --out {out}/greedy.jsonl",
         "test": EVAL + "--data {data}/test.jsonl --temperature 1 --k 64 --out {out}/test.jsonl",
         "transfer": EVAL + "--data {data}/transfer.jsonl --temperature 1 --k 16 --out {out}/transfer.jsonl"}
SFTS = {n: SFT.format(n=n, epochs=epochs) for n, epochs in EPOCHS.items()}
OWNS = {n: SFTS[n].replace("/train.", "/own.").replace("/val.", "/own_val.").replace(f"sft_{n}/", f"sft_{n}__own_words/") for n in (32, 128, 512)}       # in the student's words
FROM_SFT, FROM_OWN, TEACHER = " --model {root}/sft_512/seed{seed}/model", " --model {root}/sft_512__own_words/seed{seed}/model", " --teacher {root}/sft_8192/seed{seed}/model"
TRUE = TRAIN + " --gsrm toy:read"                         # the world's own reader as reward model: what differs between such arms is not the reading
DISTIL = TRAIN + TEACHER + " --w_structure 0 --w_outcome 0 --w_format 0 --beta 0"
ARMS: dict[str, list[str]] = {                            # name -> commands; the student is what the last one wrote, without one the base
    "base": [], "grpo": [TRAIN + " --w_structure 0"], "rlkd": [TRAIN], **{f"sft {n}": [command] for n, command in SFTS.items()},
    "structure only": [TRAIN + " --w_outcome 0"], "rlkd, true structure": [TRUE], "rlkd, one teacher": [TRAIN + " --max_teachers 1"],
    "sft 512 -> grpo": [SFTS[512], TRAIN + FROM_SFT + " --w_structure 0"], "sft 512 -> rlkd": [SFTS[512], TRAIN + FROM_SFT],
    **{f"sft 512 -> {name}, lr/3": [SFTS[512], TRAIN + FROM_SFT + more + " --lr 1e-4"] for name, more in (("grpo", " --w_structure 0"), ("rlkd", ""))},
    **{f"sft {n}, own words": [command] for n, command in OWNS.items()},
    "sft 512, own words -> grpo": [OWNS[512], TRAIN + FROM_OWN + " --w_structure 0"], "sft 512, own words -> rlkd": [OWNS[512], TRAIN + FROM_OWN],
    "grpo, outcome alone, weight 1": [TRAIN + " --w_structure 0 --w_outcome 1 --w_format 0"],
    "line similarity": [TRAIN + " --structure_reward reward:line_similarity"],
    "distillation": [SFTS[8192], DISTIL],                                                                                    # on-policy, exact reverse KL
    "sft 512 -> distillation": [SFTS[512], SFTS[8192], DISTIL + FROM_SFT],                                                   # where both speak one voice
    "grpo + distillation": [SFTS[8192], TRAIN + TEACHER + " --w_structure 0 --teacher_kl 0.1"],                              # in the manner of KDRL
    **{f"rlkd, {n} problems": [TRAIN.replace("--limit 512", f"--limit {n}")] for n in (8, 32, 128)},
    **{f"structure : outcome {name}": [TRUE + f" --w_outcome {w}"] for name, w in (("1/4", 4), ("1/2", 2), ("1", 1), ("2", 0.5))},           # 4 is the preset's, w_outcome 0.25
    "no stop rule": [TRUE + " --stop_at_divergence False"], "plain sum": [TRUE + " --combine sum"], "plain sum of raw": [TRUE + " --combine sum --normalize False"],
    "no std": [TRUE + " --scale none"], "Dr.GRPO": [TRUE + " --scale none --aggregation fixed --clip_high 0.2"],
    "GRPO's mean over rows": [TRUE + " --aggregation sequence --clip_high 0.2"],
    "two updates, clip 0.2": [TRUE + " --updates_per_batch 2 --clip_high 0.2"], "two updates, DAPO's clip": [TRUE + " --updates_per_batch 2"],
}
MAIN = ("base", "grpo", "rlkd")
SPARSE_ONLY = ("sft 512, own words -> grpo", "sft 512, own words -> rlkd", "no std", "Dr.GRPO", "GRPO's mean over rows", "two updates, clip 0.2", "two updates, DAPO's clip")
QUICK = dict(arms=["rlkd", "grpo", "base"], regimes=["sparse"], seeds=[0, 1, 2], results="out/quick.jsonl")        # the long ones first: no core waits at the end
NEEDED = ("greedy,sampled,pass@64,found@64,structure,choice,answer,sums,paths,length,larger,larger choice,larger found@16,other,other choice,other found@16,left,never left,"
          "stayed and found,no steps,seconds,commands").split(",")                                          # of a finished line of the results
KINDS = {"regime": str, "arm": str, "machine": str, "commit": str, "seed": int, "commands": list, "left": list, "curve": dict}        # of a line's fields; others: numbers, or null
_made: defaultdict[Path, Lock] = defaultdict(Lock)         # two arms may start from one SFT model: one of them makes it
_running: set[subprocess.Popen] = set()                    # what SIGTERM ends with the study


def has_arm(regime: str, arm: str) -> bool:
    return regime == "sparse" or arm in MAIN or regime == "dense" and arm not in SPARSE_ONLY


def data_commands(regime: str, path: Path) -> list[str]:
    """What makes a regime's problems: train, val, both with the teacher's traces in the student's own words, the held-out sets one by one and together."""
    level, larger = REGIMES[regime]
    problems = lambda name, of, count, seed, more="": MADE.format(people=of[0], needed=of[1]) + f"--count {count} --seed {seed} {more}--out {shlex.quote(f'{path}/{name}.jsonl')}"
    test, wider, other = (64, SETS["test"]), (64, SETS["larger"]), (64, SETS["other"], "--wording other ")
    return [problems("train", level, 8192, 11), problems("val", level, 128, 14),
            problems("own", level, 512, 11, "--voice student "), problems("own_val", level, 128, 14, "--voice student "),
            problems("test", level, *test), problems("transfer", larger, *wider),
            problems("transfer", level, *other[:2], other[2] + "--append "),
            problems("all", level, *test), problems("all", larger, *wider, "--append "), problems("all", level, *other[:2], other[2] + "--append ")]


def run(command: str, threads: int, log: Path) -> None:
    """One command line, printed, its output appended to `log`; RuntimeError with its last line if it fails."""
    tqdm.write(f"$ {command}")
    with log.open("a") as file:
        file.write(f"$ {command}\n")
        file.flush()
        words = shlex.split(command)
        child = subprocess.Popen([sys.executable if words[0] == "python" else words[0], *words[1:]], stdout=file, stderr=subprocess.STDOUT,
                                 env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        _running.add(child)
        code = child.wait()
        _running.discard(child)
    if code:
        raise RuntimeError(f"{command} ended with status {code}: {log.read_text().splitlines()[-1]} (all that it said: {log})")


def place(root: Path, regime: str, arm: str, seed: int) -> Path:
    """The folder of a run."""
    return root / regime / "".join(c if c.isalnum() else "_" for c in arm) / f"seed{seed}"


def clear(out: Path) -> None:
    """Removes what is in a run's folder; ValueError where a command that has outlived a killed study is still writing there: it holds the lock on its --out."""
    with ExitStack() as locks:
        for path in (folder(out), *(out / f"{name}.jsonl" for name in EVALS)):
            locks.enter_context(writing(path))
        shutil.rmtree(out, ignore_errors=True)


def one(regime: str, arm: str, seed: int, root: Path, threads: int) -> dict:
    """Trains and evaluates one arm with one seed: its line of the results file."""
    out = place(root, regime, arm, seed)
    fill = {name: shlex.quote(str(value)) for name, value in dict(data=root / regime / "data", root=root / regime, seed=seed, out=out).items()}
    commands = [c.format(**fill) for c in ARMS[arm]]
    made = [Path(words[words.index("--out") + 1]) for words in map(shlex.split, commands)]                # of sft.py a model/, of train.py the folder around it
    model = "toy/student" if not made else made[-1] if made[-1].name == "model" else made[-1] / "model"
    evals, started = [c.format(**fill, model=shlex.quote(str(model))) for c in EVALS.values()], time.time()
    if out not in (path.parent for path in made):
        clear(out)                                        # a half run starts over; an SFT model stays, another arm may have started from it
    out.mkdir(parents=True, exist_ok=True)
    for command, path in zip(commands, made):
        with _made[path]:
            log = (path.parent if path.name == "model" else path) / "log.txt"
            if not (path / "sft.json").exists() or not log.exists() or f"$ {command}\n" not in log.read_text():          # not trained to the end, or by older settings
                clear(path)
                folder(log.parent)
                log.write_text("")
                run(command, threads, log)
    for name, command in zip(EVALS, evals):
        with writing(out / f"{name}.jsonl"):
            for end in (".jsonl", ".settings.json"):
                (out / f"{name}{end}").unlink(missing_ok=True)
        run(command, threads, out / "log.txt")
    found = measured(out) | rounded(training(out))
    for large in (out / "rollouts.jsonl", out / "gsrm_cache.jsonl"):
        large.unlink(missing_ok=True)                     # 40 MB a run
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return {"regime": regime, "arm": arm, "seed": seed, **found, "seconds": round(time.time() - started), "machine": machine(), "commands": commands + evals}


def fault(row: object) -> str:
    """What is wrong with a line of the results, "" where nothing is."""
    if not isinstance(row, dict):
        return "no line of a study"
    if missing := [name for name in ("regime", "arm", "seed", "sampled", "seconds", "commands") if name not in row]:
        return f"no line of a study, it has no {missing[0]!r}"
    number = lambda value: value is None or isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    curve = row["curve"] if isinstance(row.get("curve"), dict) else {}
    curves, left = [*curve.values()], row["left"] if isinstance(row.get("left"), list) else []
    odd = [name for name, value in row.items() if not (isinstance(value, KINDS[name]) if name in KINDS else number(value)) or name == "seconds" and value is None]
    odd += ["curve"] * any(not isinstance(c, list) or len(c) != len(curves[0]) or not all(map(number, c)) for c in curves)
    odd += ["curve"] * ("structure" in curve and "true_structure" not in curve)
    odd += ["left"] * any(share is None or not number(share) for share in left)
    return f"field {odd[0]!r} is not what a study writes, got {repr(row[odd[0]])[:60]}" if odd else ""


def read_results(path: Path) -> list[dict]:
    """The runs in a results file; ValueError names the line that is none."""
    rows, places = read_jsonl(path), {}
    for where, row in rows:
        if wrong := fault(row):
            raise ValueError(f"{where}: {wrong}: give a file that `python study.py run` wrote")
        if row["regime"] not in REGIMES or row["arm"] not in ARMS:
            raise ValueError(f"{where}: this study has no arm {row['arm']!r} in a regime {row['regime']!r}: was it written by an older study.py?")
        if (first := places.setdefault((row["regime"], row["arm"], row["seed"]), where)) != where:
            raise ValueError(f"{where}: the run of {row['arm']!r} in {row['regime']!r} with seed {row['seed']} stands at {first} already: keep one of the two")
    return [row for _, row in rows]


def replace(path: Path, new: list[dict]) -> None:
    """Puts lines of results into the place of those of the same runs, if there are any, else at the end."""
    key, rows = (lambda row: (row["regime"], row["arm"], row["seed"])), read_results(path) if path.exists() else []
    fresh = {key(row): row for row in new}
    lines = [fresh.pop(key(row), row) for row in rows] + list(fresh.values())
    write_aside(path, lambda file: write_jsonl(file, lines))


def measure_again(results: Path, root: Path) -> None:
    """Measures once more where a run's samples are still there, all of them, which are known by their accuracies; what came of its training stays."""
    new, rows = [], read_results(results)
    for row in rows:
        out = place(root, row["regime"], row["arm"], row["seed"])
        if not all((out / f"{name}.jsonl").exists() for name in EVALS):
            continue
        with suppress(KeyError, ValueError):               # samples of an evaluation that was cut off
            found = measured(out)
            if all(name not in row or found[name] == row[name] for name in ("sampled", "greedy", "larger", "other", "length")):
                new.append(row | found)
    replace(results, new)
    print(f"measured {len(new)} of {len(rows)} lines again; the samples of the others are no longer in {root}, or not all")


def order(row: dict) -> tuple[int, int, int]:
    """Where a line of the results stands in the tables, in whatever order the runs ended."""
    return list(REGIMES).index(row["regime"]), list(ARMS).index(row["arm"]), row["seed"]


def go_on(args) -> None:
    """Runs what the results file does not hold yet, arm by arm."""
    folder(args.results.parent)                                                     # before hours of work that could not be written down
    rows = read_results(args.results) if args.results.exists() else []
    done = {(row["regime"], row["arm"], row["seed"]) for row in rows if not set(NEEDED) - set(row)}
    asked = dict.fromkeys((regime, arm, seed) for arm in args.arms for regime in args.regimes for seed in args.seeds if has_arm(regime, arm))
    todo = [key for key in asked if key not in done]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    for regime in dict.fromkeys(regime for regime, *_ in todo):
        path = args.out / regime / "data"
        path.mkdir(parents=True, exist_ok=True)
        if not (path / "own_val.jsonl").exists() or not (path / "all.jsonl").exists() or len(read_jsonl(path / "all.jsonl")) < 3 * 64:
            for command in data_commands(regime, path):
                run(command, threads, path / "log.txt")
    written = Lock()

    def work(key: tuple[str, str, int]) -> None:
        row = one(*key, args.out, threads)
        with written:                                     # by whoever has finished, so that nothing is lost where another one fails
            replace(args.results, [row])
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(todo), unit="run") as bar:
        try:
            for future in as_completed([pool.submit(work, key) for key in todo]):
                future.result()
                bar.update()
        finally:                                          # where one has failed, what has begun ends, and nothing else begins
            pool.shutdown(wait=False, cancel_futures=True)


def stop(*_signal) -> None:
    """Ends what runs, and then the study."""
    for child in list(_running):
        child.terminate()
    sys.exit("terminated: the same command goes on with what is not finished")


def results_file(text: str) -> Path:
    """A type for add_argument: the page and its pictures lie beside the results, under the same name."""
    if not text.endswith(".jsonl"):
        raise argparse.ArgumentTypeError(f"{text}: results go to a file named .jsonl (the page beside it, .md)")
    return Path(text)


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("command", nargs="?", choices=("run", "report", "measure"), default="run",
                        help="run: what the results lack; report: the page and its pictures beside them (of docs/study.jsonl the README's tables, too); measure: samples once more")
    parser.add_argument("--quick", action="store_true", help="the small study: " + json.dumps(QUICK))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=" | ".join(ARMS))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES), help="levels of difficulty")
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[0, 1, 2, 3, 4], help="of sampling, order of the problems and evaluation (default: 0 1 2 3 4)")
    parser.add_argument("--jobs", type=at_least(1), default=max(1, (os.cpu_count() or 1)), help="arms that run side by side, each with its share of the cores")
    parser.add_argument("--results", type=results_file, default=Path("docs/study.jsonl"), help="a line a run (default: docs/study.jsonl; with --quick out/quick.jsonl)")
    parser.add_argument("--out", type=Path, default=Path("out/study"), help="where the runs go")
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)                                                # which flags beside it still change
    args = parser.parse_args()
    named = [name for name in ("arms", "regimes", "seeds") if getattr(args, name) != parser.get_default(name)] + ["quick"] * args.quick
    if args.command != "run" and named:
        parser.error(f"--{named[0]}: {args.command} takes all lines of --results; leave it out")
    if lost := [arm for arm in args.arms if "arms" in named and not any(has_arm(regime, arm) for regime in args.regimes)]:
        parser.error(f"--arms {shlex.quote(lost[0])}: not run in --regimes {' '.join(args.regimes)}: {', '.join(SPARSE_ONLY)} are run in sparse only, levels beside sparse and "
                     f"dense have {', '.join(MAIN)}")
    if args.command == "run" or args.command == "measure" and args.results.exists():
        with writing(args.results, flag="--results"), writing(folder(args.out)):
            go_on(args) if args.command == "run" else measure_again(args.results, args.out)
    if not args.results.exists() or not (rows := read_results(args.results)):
        parser.error(f"no results at {args.results}: run the study first")
    template, rows = Path(__file__).resolve().parent / "docs/study.md", sorted(rows, key=order)
    written = evidence.report(rows, made := evidence.blocks(rows), args.results.with_suffix(".md"), template)
    if args.results.resolve() == template.with_suffix(".jsonl"):                    # the front page quotes the committed study
        readme = template.parent.parent / "README.md"
        readme.write_text(evidence.fill(readme.read_text(encoding="utf-8"), made), encoding="utf-8")
    print(f"{made['study-short']}\n\n{made['study-quotes']}\n\nwrote {', '.join(map(str, written))}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    with ending(RuntimeError):
        main()
