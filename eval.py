r"""How good is a student? Samples, grades and scores its completions, and says how sure the figures are.

    mean@k: share of right samples      pass@k = 1 - C(n-c, k) / C(n, k)      structure: mean structure reward on problems with teacher traces
    interval = mean +- t(0.975, N-1) * sd(p_1..p_N) / sqrt(N), p_i the figure of problem i: N problems are the clusters, not N*k samples

    python eval.py --model out/toy/model --data toy --k 16 --temperature 1 --top_p 1 --max_new_tokens 150 --gsrm toy/gsrm --truth toy:read
    python eval.py plot out/toy out/grpo                         # learning curves of several runs -> curve.png

Every generation is stored. Grading is in grade.py (three-valued: right, wrong, None = could not be graded; None never becomes 0).
"""
import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import HfArgumentParser, PreTrainedModel

from data import Problem, Tokenizer, chat_ids, load_model, load_problems, problem_ids, split_completion, stop_and_pad_ids, whole_turns, write_jsonl
from endpoint import Endpoint
from grade import final_answer, grade, grade_all, pass_at_k  # noqa: F401  (grade and pass_at_k are part of what eval offers)
from gsrm import GSRM, Step, exact_judge, judge_by, reading_rule, structure_rewards
from report import correlation, plot, print_table, summary
from rollout import Sampler, TextModel

# ------------------------------------------------------------------------------------------------ reward model and truth, from flags

def load_function(name: str) -> Callable[[str], list[Step]]:
    """The function behind "module:function", a file of the working folder: a rule that reads a trace into steps."""
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function, None) if importlib.util.find_spec(module) else None
    if not callable(found):
        raise ValueError(f"{name}: no such function; give module:function, for example toy:read")
    return found


URLS = ("http://", "https://")


def text_model(path: str, device: str, max_new_tokens: int) -> TextModel | Endpoint:
    """A checkpoint as functions on texts, or the model behind an OpenAI-compatible endpoint, "http://127.0.0.1:8000/v1#NAME"."""
    if path.startswith(URLS):
        url, _, name = path.partition("#")
        if not name:
            raise ValueError(f"{path}: which model? write it behind a #, as in {url}#Qwen/Qwen2.5-7B-Instruct")
        return Endpoint(url, name, max_new_tokens)
    model, tokenizer = load_model(path, device)
    return TextModel(Sampler(model, *stop_and_pad_ids(model, tokenizer)), partial(chat_ids, tokenizer), partial(tokenizer.encode, add_special_tokens=False),
                     partial(tokenizer.decode, skip_special_tokens=True), max_new_tokens)


def load_gsrm(gsrm: str, judge: str, cache_path: Path | None, device: str, max_new_tokens: int = 2048, normalize: bool = True) -> GSRM:
    """GSRM from a checkpoint folder or URL#MODEL (`judge`: another one for the judging; default: what gsrm.json in the folder names, else the same model), or from
    a rule module:function with equal words as its judge."""
    if ":" in gsrm and not gsrm.startswith(URLS) and not Path(gsrm).exists():
        return GSRM(reading_rule(load_function(gsrm)), exact_judge, None, gsrm, normalize)
    if not judge and (note := Path(gsrm) / "gsrm.json").is_file():            # {"judge": folder}, seen from the GSRM's own
        judge = str(Path(gsrm) / json.loads(note.read_text())["judge"])
    reader = text_model(gsrm, device, max_new_tokens)

    def named(path: str) -> str:
        """The path and its weights: a retrained model at the same path must not meet the old one's cache."""
        weights = hashlib.sha256()
        for file in sorted(Path(path).glob("*.safetensors")):
            with file.open("rb") as start:
                weights.update(start.read(1 << 24))                           # the first 16 MiB of each, not 15 GB to look at them
        return f"{path} {weights.hexdigest()}"

    same_answer = lambda pairs: grade_all([f"\\boxed{{{student}}}" for _, student in pairs], [teacher for teacher, _ in pairs], 2.0)
    return GSRM(reader.generate, judge_by(text_model(judge, device, 1).p_yes if judge else reader.p_yes, same_answer), cache_path, named(gsrm), normalize,
                judge_name=named(judge or gsrm))


def true_structure(truth: Callable[[str], list[Step]] | None, problems: list[Problem], texts: list[str]) -> list[float | None]:
    """Structure reward of each completion by the true structures, None where there is no truth to read."""
    if truth is None:
        return [None] * len(texts)
    read = {t: truth(t) for p in {p.id: p for p in problems}.values() for t in p.teachers}
    return [s.value for s in structure_rewards([truth(split_completion(t)[0]) for t in texts], [[read[t] for t in p.teachers] for p in problems], exact_judge)]

# ------------------------------------------------------------------------------------------------ sampling and scoring

def evaluate(model: PreTrainedModel, tokenizer: Tokenizer, problems: list[Problem], k: int, temperature: float, top_p: float, max_new_tokens: int, seed: int = 0,
             instruction: str | None = None, gsrm: GSRM | None = None, truth: Callable | None = None) -> list[dict]:
    """k sampled completions of each problem (one greedy one at temperature 0), graded and, where problems have teacher traces, structure-scored: a row each."""
    k = k if temperature else 1
    rollout = Sampler(model, *stop_and_pad_ids(model, tokenizer)).generate([problem_ids(tokenizer, p, instruction) for p in problems], k, max_new_tokens, temperature, top_p, seed)
    rows_of = [p for p in problems for _ in range(k)]
    texts = whole_turns(tokenizer, [rollout.completion(n) for n in range(len(rows_of))])
    right, true = grade_all(texts, [p.answer for p in rows_of]), true_structure(truth, rows_of, texts)
    taught = [n for n, p in enumerate(rows_of) if p.teachers] if gsrm else []
    scores = dict(zip(taught, gsrm([rows_of[n].problem for n in taught], [split_completion(texts[n])[0] for n in taught], [list(rows_of[n].teachers) for n in taught]))) if taught else {}
    return [{"id": p.id, "sample": n % k, "seed": seed, "temperature": temperature, "correct": right[n], "answer": final_answer(texts[n]), "length": int(rollout.lengths[n]),
             "stop": "stop" if rollout.finished[n] else "length", "structure": scores[n].value if n in scores else None, "true_structure": true[n],
             "left_at": scores[n].left_at if n in scores else None, "text": texts[n], "problem": p.problem,
             "steps": [[s.meta, s.query, s.answer, e] for s, e in zip(scores[n].structure, scores[n].steps)] if n in scores else None} for n, p in enumerate(rows_of)]


def before_after(model: PreTrainedModel, tokenizer: Tokenizer, problems: list[Problem], gsrm: GSRM | None, truth: Callable | None, path: Path, config) -> str:
    """train.py's evaluation: one greedy and eval_k sampled completions of each problem, kept in `path`; the sampled ones' means in words."""
    rows = [row for t in (0.0, config.temperature) for row in evaluate(model, tokenizer, problems, config.eval_k, t, 1.0, config.max_new_tokens, 0, config.instruction, gsrm, truth)]
    write_jsonl(path, rows)
    means = summary([row for row in rows if row["temperature"]])
    return ", ".join(f"{name} {means[name][0]:.2f}" for name in means if name.startswith("mean@") or name in ("structure", "true_structure", "length"))

# ------------------------------------------------------------------------------------------------ commands

@dataclass(frozen=True)
class Config:
    """Flags of `python eval.py`; sampling as DeepSeek-R1 and the paper do it."""
    model: str = field(metadata={"help": "checkpoint folder or hub name"})
    data: str = field(metadata={"help": "problems: JSONL, or a folder with test.jsonl"})
    k: int = field(default=1, metadata={"help": "samples per problem"})
    temperature: float = field(default=0.6, metadata={"help": "0: one greedy completion per problem"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus"})
    max_new_tokens: int = field(default=32768, metadata={"help": "completion budget; lowered to what the model's positions allow"})
    limit: int = field(default=0, metadata={"help": "only the first so many problems (0: all)"})
    gsrm: str = field(default="", metadata={"help": "reward model for the structure report: checkpoint folder or module:function"})
    judge: str = field(default="", metadata={"help": "its judge, if another checkpoint"})
    truth: str = field(default="", metadata={"help": "module:function that reads true steps"})
    gsrm_max_new_tokens: int = field(default=2048, metadata={"help": "budget of a written structure"})
    seed: int = field(default=0, metadata={"help": "of the samples"})
    out: str = field(default="", metadata={"help": "where the generations go (default: out/eval/<model>.jsonl)"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu or cuda"})


def sample_rows(config: Config) -> tuple[list[dict], GSRM | None, Callable | None]:
    """Rows of `evaluate` under the command's flags, with the reward model and the truth that scored them."""
    problems = load_problems(config.data, "test")[:config.limit or None]
    model, tokenizer = load_model(config.model, config.device)
    room = getattr(model.config, "max_position_embeddings", 1 << 30) - max(len(problem_ids(tokenizer, p)) for p in problems)
    gsrm = load_gsrm(config.gsrm, config.judge, None, config.device, config.gsrm_max_new_tokens) if config.gsrm else None
    truth = load_function(config.truth) if config.truth else None
    budget = min(config.max_new_tokens, room)
    print(f"{len(problems)} problems x {config.k if config.temperature else 1} samples, temperature {config.temperature}, top-p {config.top_p}, up to {budget} new tokens", flush=True)
    return evaluate(model, tokenizer, problems, config.k, config.temperature, config.top_p, budget, config.seed, None, gsrm, truth), gsrm, truth


def main(config: Config) -> None:
    rows, _, truth = sample_rows(config)
    out = Path(config.out or f"out/eval/{Path(config.model).resolve().name}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(out, rows)
    print_table({Path(config.model).name: summary(rows)})
    if config.gsrm and truth:
        print(f"r(structure, true_structure) = {correlation(rows):.3f}")
    print(f"generations in {out}")


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["plot"]:
            plot(sys.argv[2:], Path("curve.png"))
            print("wrote curve.png")
        else:
            main(HfArgumentParser(Config).parse_args_into_dataclasses()[0])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
