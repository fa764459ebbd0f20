"""The reward model and the truth that a command's flags name, made ready for use: checkpoints, endpoints, rules; for train.py, eval.py and card.py alike.

    --gsrm toy/gsrm                              a checkpoint folder, whose gsrm.json may name a judge of its own
    --gsrm http://127.0.0.1:8000/v1#NAME         a model behind an OpenAI-compatible endpoint          (--judge: the same two; #NAME may be left out if there is one)
    --gsrm 'http://127.0.0.1:8000/v1#NAME#{"chat_template_kwargs": {"enable_thinking": false}}'       with further fields of each request, as JSON
    --gsrm toy:read                              a rule of the working folder that reads a trace into steps; equal words are its judge
    --structure_reward reward:line_similarity    a function of the working folder that gives the structure reward itself, without reading steps
"""
import importlib
import importlib.util
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from command import read_record
from data import Problem, chat_ids, load_model, split_completion, text_of
from endpoint import Endpoint
from grade import grade_all
from gsrm import GSRM, Score, Step, exact_judge, judge_by, reading_rule, structure_rewards
from plan import CACHE_GB, sampler_of
from rollout import TextModel, check_head
from watch import model_hash


@contextmanager
def traced(name: str) -> Iterator[None]:
    """Errors of a function of one's own keep their traceback: a ValueError of it is no bad input, which ends a command with one line."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:              # those that command.ending takes for bad input
        raise RuntimeError(f"{name} has failed with {type(error).__name__}: {error}") from error


def find_function(name: str, like: str) -> Callable:
    """The function behind "module:function", a file of the working folder; an error names one `like` it."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:                           # the folder of the script is there already
        sys.path.append(os.getcwd())
    with traced(name):
        found = getattr(importlib.import_module(module), function, None) if module.isidentifier() and importlib.util.find_spec(module) else None
    if not callable(found):
        raise ValueError(f"{name}: no such function; give module:function, for example {like}")
    return found


def load_function(name: str) -> Callable[[str], list[Step]]:
    """The same, for a rule that reads a trace into steps: ValueError where it gives anything else, the first time for the empty trace, at once."""
    rule = find_function(name, "toy:read")

    def read(trace: str) -> list[Step]:
        with traced(name):
            steps = rule(trace)
        if not isinstance(steps, list) or not all(isinstance(step, Step) for step in steps):
            raise ValueError(f"{name} gave {str(steps)[:60]!r} for the trace {trace[:40]!r}: it has to return a list of gsrm.Step")
        return steps
    read("")
    return read


class OwnReward:
    """A structure reward from "module:function", called as a GSRM is: function(problems, traces, teacher traces of each) -> a number or None (could not be scored) of each."""

    def __init__(self, name: str):
        self.name, self.function, self.stats = name, find_function(name, "reward:line_similarity"), Counter()

    def __call__(self, problems: list[str], traces: list[str], teacher_traces: list[list[str]]) -> list[Score]:
        with traced(self.name):
            given = self.function([getattr(p, "problem", p) for p in problems], traces, teacher_traces)
        values = [v.item() if getattr(v, "ndim", None) == 0 else v for v in given] if isinstance(given, Iterable) else []          # numpy's and torch's numbers are some, too
        if len(values) != len(traces) or not all(v is None or isinstance(v, (int, float)) and math.isfinite(v) for v in values):
            raise ValueError(f"{self.name} gave {str(given)[:60]} for {len(traces)} traces: it has to return a list with a finite number, or None, for each")
        self.stats["unscored"] += values.count(None)
        return [Score(None if v is None else float(v), reason="" if v is not None else f"{self.name} gave None") for v in values]


URLS = ("http://", "https://")


def text_model(path: str, device: str, max_new_tokens: int, dtype: str = "float32", cache_gb: float = CACHE_GB, judges: bool = True) -> TextModel | Endpoint:
    """A checkpoint as functions on texts (without `judges` only as one that writes), or the model behind an OpenAI-compatible endpoint, "http://127.0.0.1:8000/v1#NAME"."""
    if path.startswith(URLS):
        url, _, name = path.partition("#")
        return Endpoint(url, name, max_new_tokens)
    model, tokenizer = load_model(path, device, dtype)
    if judges:
        check_head(model)
    return TextModel(sampler_of(model, tokenizer, cache_gb), partial(chat_ids, tokenizer), partial(tokenizer.encode, add_special_tokens=False),
                     partial(text_of, tokenizer), max_new_tokens, judges=judges)


def served(path: str) -> str:
    """URL#MODEL where a URL leaves the model out and its server has a single one, else the path as it is; ValueError where it has none or several."""
    url, _, name = path.partition("#")
    if name and not name.startswith("{") or not path.startswith(URLS):
        return path
    probe = Endpoint(url, "", 1)
    names = probe.models()
    probe.runner.run(probe.client.close())               # in its own loop, or a later one collects it and complains
    probe.runner.close()
    if len(names) != 1:
        raise ValueError(f"{path}: which model{f' of {len(names)}' * bool(names)}? write it behind a #, as in {url}#{names[0] if names else 'Qwen/Qwen2.5-7B-Instruct'}")
    return f"{url}#{names[0]}" + f"#{name}" * bool(name)


def is_rule(gsrm: str) -> bool:
    return ":" in gsrm and not gsrm.startswith(URLS) and not Path(gsrm).exists()


def judge_of(gsrm: str, judge: str) -> str:
    """The judge's checkpoint or URL#MODEL, "" where the GSRM judges itself: `judge`, else what gsrm.json in the GSRM's folder names, {"judge": folder seen from there}."""
    note = Path(gsrm) / "gsrm.json"
    return judge or (str(Path(gsrm) / str(read_record(note, "judge")["judge"])) if note.is_file() else "")


def checkpoints_of(gsrm: str, judge: str) -> list[str]:
    """The checkpoints that load_gsrm loads: none for a rule, or what answers behind a URL."""
    return [path for path in (gsrm, judge_of(gsrm, judge)) if path and not path.startswith(URLS)] if gsrm and not is_rule(gsrm) else []


def load_gsrm(gsrm: str, judge: str, cache_path: Path | None, device: str, max_new_tokens: int = 2048, normalize: bool = True, dtype: str = "float32",
              cache_gb: float = CACHE_GB, stop: bool = True) -> GSRM:
    """GSRM from a checkpoint folder or URL#MODEL (`judge`: another one for the judging; default: what gsrm.json in the folder names, else the same model), or from
    a rule module:function with equal words as its judge. Checkpoints compute in `dtype`; `stop`: see structure_rewards."""
    if is_rule(gsrm):
        if judge:
            raise ValueError(f"--judge {judge}: the steps of a rule ({gsrm}) are compared word by word; leave it out")
        return GSRM(reading_rule(load_function(gsrm)), exact_judge, None, gsrm, normalize, stop=stop)
    gsrm, judge = served(gsrm), served(judge_of(gsrm, judge))
    reader = text_model(gsrm, device, max_new_tokens, dtype, cache_gb, judges=not judge)

    named = lambda path: f"{path} {model_hash(path)}"        # a retrained model at the same path must not meet the old one's cache
    same_answer = lambda pairs: grade_all([f"\\boxed{{{student}}}" for _, student in pairs], [teacher for teacher, _ in pairs], 2.0)
    made = GSRM(reader.generate, judge_by(text_model(judge, device, 1, dtype, cache_gb).p_yes if judge else reader.p_yes, same_answer), cache_path, named(gsrm), normalize,
                judge_name=named(judge) if judge else "", stop=stop)
    reader.tally = made.stats                                                 # what was cut off is counted where GSRM counts
    return made


def true_structure(truth: Callable[[str], list[Step]] | None, problems: list[Problem], texts: list[str]) -> list[float | None]:
    """Structure reward of each completion by the true structures, None where there is no truth to read. Always the paper's rule over all teacher traces, normalised:
    a measure, whatever the run's own reward is."""
    if truth is None:
        return [None] * len(texts)
    read = {t: truth(t) for p in {p.id: p for p in problems}.values() for t in p.teachers}
    return [s.value for s in structure_rewards([truth(split_completion(t)[0]) for t in texts], [[read[t] for t in p.teachers] for p in problems], exact_judge)]
