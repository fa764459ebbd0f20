r"""How good is a student? Samples, grades and scores its completions, stores every one of them, and says how sure the figures are.

    mean@k: share of right samples      pass@k = 1 - C(n-c, k) / C(n, k)      maj@k: is the most frequent answer right      structure: mean structure reward
    interval = mean +- t(0.975, N-1) * sd(p_1..p_N) / sqrt(N), p_i the figure of problem i: N problems are the clusters, not N*k samples

    python eval.py --model PATH --data aime24.jsonl --k 64       # T 0.6, top-p 0.95, 32768 new tokens; the same command goes on after an interruption
    python eval.py --model out/toy/model --data toy --k 16 --temperature 1 --top_p 1 --max_new_tokens 150 --gsrm toy/gsrm --truth toy:read
    python eval.py rescore out/eval/FILE.jsonl                   # grades stored generations again, without sampling
    python eval.py compare A.jsonl B.jsonl --plot compare.png    # paired by problem: difference, interval, p
    python eval.py show out/toy --step 40                        # rollouts of a training run, step by step
    python eval.py plot out/toy out/grpo                         # learning curves of several runs -> curve.png

A generation is a JSON line with its token ids, text, gold answer and verdict; FILE.settings.json beside it says under what settings it was drawn. Each can be
drawn again alone: `Sampler.generate([prompt], sample + 1, ..., seed=seed, index=[index])`, last row. Grading is in grade.py (three-valued: right, wrong,
None = could not be graded; None never becomes 0). What the reward model could not score keeps the `reason`, and the same command asks for it again.
"""
import hashlib
import importlib.util
import json
import platform
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel

from command import ConfigParser, Parser, ending, flag, picture_file, read_record, write_aside, write_record, writing
from data import Problem, Tokenizer, append_jsonl, file_hash, load_model, load_problems, load_tokenizer, problem_ids, split_completion, stop_and_pad_ids, whole_turns, write_jsonl
from generations import read_generations, rows_to_show, settings_path, show, structure_fields
from grade import final_answer, grade, grade_all, pass_at_k  # noqa: F401  (grade and pass_at_k are part of what eval offers)
from gsrm import GSRM
from plan import CACHE_GB, sampler_of
from plots import plot, rollout_picture, small_multiples
from report import compare, correlation, print_structure, print_table, summary
from rollout import Sampler
from scorer import load_function, load_gsrm, true_structure
from watch import MODEL_FILES, revision

# ------------------------------------------------------------------------------------------------ sampling and scoring

Draw = Callable[[list[list[int]], list[int]], list[tuple[list[int], bool]]]      # prompts, their numbers -> k (token ids, ended by itself) of each, prompt-major


def by_sampler(sampler: Sampler, k: int, temperature: float, top_p: float, max_new_tokens: int, seed: int) -> Draw:
    """Completions from our own sampler."""
    def draw(prompts: list[list[int]], index: list[int]) -> list[tuple[list[int], bool]]:
        rollout = sampler.generate(prompts, k, max_new_tokens, temperature, top_p, seed, index)
        return [(rollout.completion(n), bool(rollout.finished[n])) for n in range(k * len(prompts))]
    return draw


def by_vllm(path: str, tokenizer: Tokenizer, k: int, temperature: float, top_p: float, max_new_tokens: int, seed: int, dtype: str) -> Draw:
    """The same from vLLM, token ids in and out, a seed of its own for every sample. Tested against a stand-in only."""
    from vllm import LLM, SamplingParams
    stops, _ = stop_and_pad_ids(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None)), tokenizer)    # vLLM adds those of generation_config.json
    engine = LLM(model=path, dtype=dtype, seed=seed)

    def draw(prompts: list[list[int]], index: list[int]) -> list[tuple[list[int], bool]]:
        rows = [(prompt, int(np.random.SeedSequence([seed, i, g]).generate_state(1)[0])) for prompt, i in zip(prompts, index) for g in range(k)]
        params = [SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, seed=s, stop_token_ids=sorted(stops), detokenize=False) for _, s in rows]
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt, _ in rows], params)
        return [(list(output.outputs[0].token_ids), output.outputs[0].finish_reason == "stop") for output in outputs]
    return draw


def structures(gsrm: GSRM | None, problems: list[Problem], texts: list[str]) -> list[dict]:
    """What a row keeps of how its completion followed the teacher; nobody is asked without a reward model or without the problem's teacher traces."""
    taught = [n for n, p in enumerate(problems) if p.teachers] if gsrm else []
    scores = dict(zip(taught, gsrm([problems[n].problem for n in taught], [split_completion(texts[n])[0] for n in taught],
                                   [list(problems[n].teachers) for n in taught]))) if taught else {}
    return [{"structure": scores[n].value if n in scores else None, **structure_fields(scores.get(n))} for n in range(len(texts))]


def scored_rows(tokenizer: Tokenizer, problems: list[Problem], index: list[int], drawn: list[tuple[list[int], bool]], temperature: float, seed: int,
                gsrm: GSRM | None, truth: Callable | None) -> list[dict]:
    """What is stored of each completion: where it came from, what it says, what it is worth."""
    k = len(drawn) // len(problems)
    of_row, texts = [p for p in problems for _ in range(k)], whole_turns(tokenizer, [ids for ids, _ in drawn])
    right, true, structure = grade_all(texts, [p.answer for p in of_row]), true_structure(truth, of_row, texts), structures(gsrm, of_row, texts)
    return [{"id": p.id, "index": index[n // k], "sample": n % k, "seed": seed, "temperature": temperature, "correct": right[n], "answer": final_answer(texts[n]), "gold": p.answer,
             "length": len(drawn[n][0]), "stop": "stop" if drawn[n][1] else "length", "true_structure": true[n], **structure[n], "text": texts[n], "problem": p.problem,
             "tokens": drawn[n][0]} for n, p in enumerate(of_row)]


def score_again(rows: list[dict], gsrm: GSRM | None, problems: list[Problem]) -> list[dict]:
    """Asks once more for the structure of stored completions that have none although their problem has teacher traces: the reward model had failed. -> these rows."""
    of = {p.id: p for p in problems if p.teachers and gsrm}
    lost = [row for row in rows if row["structure"] is None and row["id"] in of]
    for row, fields in zip(lost, structures(gsrm, [of[row["id"]] for row in lost], [row["text"] for row in lost])):
        row |= fields
    return lost


def evaluate(model: PreTrainedModel, tokenizer: Tokenizer, problems: list[Problem], k: int, temperature: float, top_p: float, max_new_tokens: int, seed: int = 0,
             instruction: str | None = None, gsrm: GSRM | None = None, truth: Callable | None = None, cache_gb: float = CACHE_GB) -> list[dict]:
    """k sampled completions of each problem (one greedy one at temperature 0), graded and, where problems have teacher traces, structure-scored: a row each."""
    draw, index = by_sampler(sampler_of(model, tokenizer, cache_gb), k if temperature else 1, temperature, top_p, max_new_tokens, seed), list(range(len(problems)))
    return scored_rows(tokenizer, problems, index, draw([problem_ids(tokenizer, p, instruction) for p in problems], index), temperature, seed, gsrm, truth)


def before_after(model: PreTrainedModel, tokenizer: Tokenizer, problems: list[Problem], gsrm: GSRM | None, truth: Callable | None, path: Path, config) -> str:
    """train.py's evaluation: one greedy and eval_k sampled completions of each problem, kept in `path`; the sampled ones' means in words."""
    rows = [row for temperature in (0.0, config.temperature) for row in evaluate(model, tokenizer, problems, config.eval_k, temperature, 1.0, config.max_new_tokens, 0,
                                                                                 config.instruction, gsrm, truth, config.cache_gb)]
    write_jsonl(path, rows)
    means = summary([row for row in rows if row["temperature"]])
    return ", ".join(f"{name} {means[name][0]:.2f}" for name in means if name.startswith("mean@") or name in ("structure", "true_structure", "length"))

# ------------------------------------------------------------------------------------------------ commands

@dataclass(frozen=True)
class Config:
    """Flags of `python eval.py`; sampling as DeepSeek-R1 and the paper do it."""
    model: str = field(metadata={"help": "checkpoint folder or hub name"})
    data: str = field(metadata={"help": "problems: JSONL, or a folder with test.jsonl"})
    k: int = flag(1, "samples per problem", "[1, inf)")
    temperature: float = flag(0.6, "0: one greedy completion per problem", "[0, inf)")
    top_p: float = flag(0.95, "nucleus", "(0, 1]")
    max_new_tokens: int = flag(32768, "completion budget; lowered to what the model's positions allow", "[1, inf)")
    skip_bad: bool = flag(False, "list malformed lines of the data instead of stopping at one")
    limit: int = flag(0, "only the first so many problems (0: all)", "[0, inf)")
    gsrm: str = flag("", "reward model for the structure report: checkpoint folder, http://HOST:PORT/v1#MODEL, or module:function")
    judge: str = flag("", "its judge, if another one: checkpoint folder or http://HOST:PORT/v1#MODEL")
    truth: str = flag("", "module:function that reads true steps")
    gsrm_max_new_tokens: int = flag(2048, "budget of a written structure", "[1, inf)")
    instruction: str | None = flag(None, "text after each problem (default: the tokenizer's own, else 'Please reason step by step ...')")
    seed: int = flag(0, "of the samples", "[0, inf)")
    out: str = flag("", "where the generations go (default: out/eval/<model>-<data>.jsonl)")
    engine: Literal["own", "vllm"] = flag("own", "own, or vllm (pip install vllm)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "of the models: float32, bfloat16, float16, or auto: what the checkpoint was saved in")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")


def parse_config(argv: list[str] | None = None) -> Config:
    """Config from defaults and flags. An unknown flag or value, or an engine that is not there, ends the program with a line that says so."""
    parser = ConfigParser(Config, description=__doc__.split("\n")[0] + " Also: python eval.py rescore | compare | show | plot, each with --help", allow_abbrev=False)
    c = Config(**vars(parser.parse_args(argv)))
    if c.judge and not c.gsrm:
        parser.error(f"--judge {c.judge}: it judges the steps that a reward model reads; give --gsrm too, or leave it out")
    if c.engine == "vllm" and not importlib.util.find_spec("vllm"):
        parser.error("--engine vllm: vLLM is not installed; pip install vllm, or leave the flag out")
    return c


def settings(config: Config, budget: int, tokenizer: Tokenizer, problems: list[Problem], prompts: list[list[int]], gsrm: GSRM | None) -> dict:
    """What the generations and their scores follow from, but for the code (so a rule counts by its name); a file is only gone on with under the same. Of the chat
    template the one in use counts."""
    digest = lambda value: hashlib.sha256(json.dumps(value).encode()).hexdigest()
    files = {file.name: file_hash(file) for pattern in MODEL_FILES for file in sorted(Path(config.model).glob(pattern)) if file.is_file()}
    packages = ("torch", "transformers", "math-verify") + (("vllm",) if config.engine == "vllm" else ())
    return {"config": {name: value for name, value in asdict(config).items() if name != "out"} | {"max_new_tokens": budget}, "revision": revision(config.model),
            "model_files": files, "reward_model": [gsrm.name, gsrm.judge_name] if gsrm else None, "problems": len(problems),
            "problems_sha256": digest([asdict(p) for p in problems]), "chat_template_sha256": digest(tokenizer.chat_template), "prompts_sha256": digest(prompts),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in packages}}


def start_file(out: Path, wanted: dict, k: int) -> list[dict]:
    """Rows that an interrupted evaluation of the same settings left in `out`, those of a half-written problem cut off; none and a new record of the settings for a
    new one. ValueError where `out` holds anything else."""
    record = settings_path(out)
    if not out.exists():                                  # a record without generations binds nobody
        out.parent.mkdir(parents=True, exist_ok=True)
        write_record(record, wanted)
        return []
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name a file for the generations, such as {out / 'eval.jsonl'}")
    if not record.is_file():
        raise ValueError(f"{out} exists already, without a record of its settings ({record.name}): choose another --out")
    flat = lambda tree: {f"{part} {name}": value for part, values in tree.items() for name, value in (values.items() if isinstance(values, dict) else (("", values),))}
    if "weights_sha256" in (old := read_record(record)):    # its weights may be of any config.json
        raise ValueError(f"{record} is of an earlier version, which noted of the model's files the *.safetensors only: whether the rest is the same nobody can tell; "
                         "choose another --out, or read what is there with `python eval.py rescore`")
    before, now = flat(old), flat(wanted)
    if changed := [f"{name.strip()} was {before.get(name)!r}, is {now.get(name)!r}" for name in before | now if before.get(name) != now.get(name)]:
        raise ValueError(f"{out} holds an evaluation of other settings ({'; '.join(changed)}): choose another --out")
    content = out.read_bytes()
    whole = content[:content.rfind(b"\n") + 1]           # what follows the last line end was cut off in writing, perhaps inside a character
    write_aside(out, lambda file: file.write_bytes(whole))
    rows = read_generations(out) if whole else []
    count = Counter(row["id"] for row in rows)
    rows = [row for row in rows if count[row["id"]] == k]
    write_aside(out, lambda file: write_jsonl(file, rows))
    return rows


def sample_rows(config: Config, out: Path | None = None) -> tuple[list[dict], GSRM | None, Callable | None]:
    """Rows of `evaluate` under the command's flags, with the reward model and the truth that scored them. With `out` they are stored there as the sampler's waves
    finish, and what it holds already is not sampled again."""
    problems, own = load_problems(config.data, "test", config.skip_bad)[:config.limit or None], config.engine == "own"
    model, tokenizer = load_model(config.model, config.device, config.dtype) if own else (None, load_tokenizer(config.model))
    prompts = [problem_ids(tokenizer, p, config.instruction) for p in problems]
    model_config = model.config if own else AutoConfig.from_pretrained(config.model)
    longest, positions = max(map(len, prompts)), getattr(model_config, "max_position_embeddings", 1 << 30)
    if (budget := min(config.max_new_tokens, positions - longest)) < 1:
        raise ValueError(f"{config.data}: the longest prompt has {longest} tokens, the model {positions} positions: nothing can be sampled")
    if budget < config.max_new_tokens:
        print(f"--max_new_tokens lowered from {config.max_new_tokens} to {budget}: the model has {positions} positions, the longest prompt {longest} tokens")
    gsrm = load_gsrm(config.gsrm, config.judge, None, config.device, config.gsrm_max_new_tokens, dtype=config.dtype) if config.gsrm else None
    truth = load_function(config.truth) if config.truth else None
    k = config.k if config.temperature else 1
    rows = start_file(out, settings(config, budget, tokenizer, problems, prompts, gsrm), k) if out else []
    if out and (lost := score_again(rows, gsrm, problems)):
        write_aside(out, lambda file: write_jsonl(file, rows))
        print(f"{len(lost)} completions in {out} had no structure reward and were scored again: now {sum(row['structure'] is None for row in lost)} have none")
    there = {row["id"] for row in rows}
    todo = [i for i, p in enumerate(problems) if p.id not in there]
    print(f"{len(problems)} problems x {k} samples, temperature {config.temperature}, top-p {config.top_p}, up to {budget} new tokens"
          + (f"; {len(there)} problems are in {out} already" if there else ""), flush=True)
    sampling = (k, config.temperature, config.top_p, budget, config.seed)
    sampler = sampler_of(model, tokenizer) if own else None
    draw = by_sampler(sampler, *sampling) if own else by_vllm(config.model, tokenizer, *sampling, config.dtype) if todo else None
    wave = min(sampler.max_rows, sampler.max_tokens // (longest + budget)) if own else 1024                  # rows that are decoded together
    for start in range(0, len(todo), size := max(1, wave // k)):
        some = todo[start:start + size]
        rows += (new := scored_rows(tokenizer, [problems[i] for i in some], some, draw([prompts[i] for i in some], some), config.temperature, config.seed, gsrm, truth))
        if out:
            append_jsonl(out, new)
        if size < len(todo):
            right = np.mean([r["correct"] for r in rows if r["correct"] is not None] or [np.nan])
            print(f"{len(there) + start + len(some)} of {len(problems)} problems, right so far: {right:.3f}", flush=True)
    return rows, gsrm, truth


def rescore(file: str) -> None:
    """Grades a file's generations again and replaces it at once; says how many verdicts changed, and how, and what the figures are now."""
    rows = read_generations(file)
    if bare := next((n for n, row in enumerate(rows, 1) if not isinstance(row.get("gold"), str)), None):
        raise ValueError(f"{file}: generation {bare} has no gold answer to be graded against: give a file that eval.py wrote (--out)")
    word, verdicts = {True: "right", False: "wrong", None: "not graded"}, grade_all([row["text"] for row in rows], [row["gold"] for row in rows])
    changes = Counter(f"{word[row['correct']]} -> {word[verdict]}" for row, verdict in zip(rows, verdicts) if row["correct"] is not verdict)
    rows = [row | {"correct": verdict, "answer": final_answer(row["text"])} for row, verdict in zip(rows, verdicts)]
    write_aside(Path(file), lambda path: write_jsonl(path, rows))
    print(f"{changes.total()} of {len(rows)} verdicts changed" + (f": {', '.join(f'{n} {what}' for what, n in changes.items())}" if changes else ""))
    kinds = {"sampled": [row for row in rows if row["temperature"]], "greedy": [row for row in rows if not row["temperature"]]}          # train.py's files hold both
    print_table({name: summary(some) for name, some in kinds.items() if some}, errors=True)


def commands(argv: list[str]) -> None:
    """`python eval.py rescore | compare | show | plot`: what works on stored generations and runs."""
    parser = Parser(prog="python eval.py", allow_abbrev=False)
    new = parser.add_subparsers(dest="command").add_parser
    one = new("rescore", help="grade stored generations again")
    one.add_argument("file", help="generations, as eval.py stores them")
    two = new("compare", help="two evaluations, paired by problem: B - A with its 95 %% interval and p")
    two.add_argument("a")
    two.add_argument("b")
    two.add_argument("--plot", type=picture_file, metavar="PNG", help="where both pass@k curves with their bands go (default: A-B.png beside B)")
    completions = new("show", help="completions with their steps: the best, the middle and the worst, or those asked for")
    completions.add_argument("out", type=Path, help="folder of a training run, or a file of generations")
    completions.add_argument("--step", type=int, help="training step (default: the last)")
    completions.add_argument("--problem", metavar="ID")
    completions.add_argument("--sample", type=int, help="number in its group")
    completions.add_argument("--plot", type=picture_file, metavar="PNG", help="draw the first of them, its steps coloured by what they earned")
    completions.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    curves = new("plot", help="learning curves of one or several runs")
    curves.add_argument("runs", nargs="+", metavar="OUT")
    curves.add_argument("--out", type=picture_file, metavar="PNG", default=Path("curve.png"), help="where the picture goes (default: curve.png)")
    curves.add_argument("--simple", action="store_true", help="structure and outcome reward only, on one pair of axes")
    args = parser.parse_args(argv)
    if args.command == "rescore":
        file = Path(args.file).resolve()                       # behind a link it is the file itself that is replaced
        if not file.parent.is_dir():
            read_generations(file)                             # says so; a lock would make the folder
        with writing(file):
            rescore(str(file))
    elif args.command == "compare":
        compare(args.a, args.b, args.plot)
    elif args.command == "show":
        color = args.color == "always" or args.color == "auto" and sys.stdout.isatty()
        rows = rows_to_show(args.out, args.step, args.problem, args.sample)
        print("\n\n".join(show(row, color) for row in rows))
        if args.plot:
            rollout_picture(rows[0], args.plot)
    else:
        (plot if args.simple else small_multiples)(args.runs, args.out)
        print(f"wrote {args.out}")


def main(config: Config) -> None:
    slug = "_".join(part for part in Path(config.model).parts if part not in ("/", "..", "."))
    out = Path(config.out or f"out/eval/{slug}-{Path(config.data).stem}.jsonl")
    with writing(out):
        rows, _, truth = sample_rows(config, out)
    print_table({Path(config.model).name: summary(rows)}, errors=True)
    print("length: median {:.0f}, 90 % below {:.0f}, longest {:.0f} tokens".format(*np.quantile([row["length"] for row in rows], [0.5, 0.9, 1.0])))
    if config.gsrm:
        print_structure(rows)
        print(f"r(structure, true_structure) = {correlation(rows):.3f}\n" * bool(truth), end="")
    else:
        print("structure: not read; --gsrm toy/gsrm --truth toy:read, for one, reports it")
    print(f"generations in {out}")


if __name__ == "__main__":
    with ending():
        if sys.argv[1:] and not sys.argv[1].startswith("-"):
            commands(sys.argv[1:])
        else:
            try:
                main(parse_config())
            except KeyboardInterrupt:
                sys.exit("interrupted: the same command goes on where it stopped")
