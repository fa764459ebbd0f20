"""Sampling and whole RL steps beside others: `python bench.py rollout` and `python bench.py step`.

rollout: for each model (random weights), one table of equal and one of spread lengths: tokens per second, useful ones only (up to a row's stop token); their share
of the limit: every decoding step reads the weights and the used keys and values once at the measured copy bandwidth, or multiplies at the measured rate of a
large matmul, whichever is slower; and peak memory on top of the weights.
step: seconds of one training step on the toy, split into sampling, scoring and update (log-probs of policy and reference, loss, gradient, optimiser). Outcome
reward only against TRL's GRPOTrainer, both on the same model, problems, group, optimiser, dtype and KL weight, once with every completion of full length,
once with rows that stop where they like; and the toy's RLKD step with GSRM, its teachers read before, as a run reads them once.

How: implementations take turns in one process, the first round warms up (and measures memory), medians. One whose run takes longer than --patience seconds is
not run again (on a CPU, where counting memory takes time of its own, once more): that one run is its figure, and its row says so. On a machine that others use
too, --cpu_time with one thread. Left out: nano-vllm (one stop token, and it needs a tokenizer), peers' options beyond these rows.
"""
from __future__ import annotations

import argparse
import itertools
import statistics
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3Config

import peers
import train
from command import at_least
from data import load_model, problem_ids, stop_and_pad_ids, whole_turns
from grade import grade_all
from peers import PEER_ERRORS, Job
from rollout import Sampler
from scorer import load_gsrm
from watch import machine

T = TypeVar("T")
MODELS = {"toy": (64, 3, 4, 4, 128, 553), "10m": (256, 8, 8, 4, 1024, 8192),                    # hidden, layers, heads, kv heads, MLP, V
          "1.5b": (1536, 28, 12, 2, 8960, 151936), "7b": (3584, 28, 28, 4, 18944, 152064)}


def start_clock(args: argparse.Namespace) -> str:
    """-> the machine, in words. --cpu_time: all clocks, train.py's too, show CPU seconds of this process."""
    if args.cpu_time:
        time.perf_counter = time.time = time.process_time
    threads = [] if torch.cuda.is_available() else [f"{torch.get_num_threads()} threads"]
    return ", ".join((machine(), *threads, f"torch {torch.__version__}", *["CPU time"] * args.cpu_time))


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the storages that torch's operations made and that were alive together: memory on a CPU, where nobody else counts it. This thread's only."""
    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return out

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_bytes(run: Callable[[], T]) -> tuple[int, T]:
    """Peak memory over what was there before, results included, and the result; 0 for what happens in other threads (on a CPU) or processes."""
    if not torch.cuda.is_available():
        with LiveBytes() as live:
            out = run()
        return live.peak, out
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, out

# ------------------------------------------------------------------------------------------------ sampling

def limit_seconds(job: Job, lengths: list[int]) -> float:
    """What the hardware needs at least: each decoding step reads the weights and the used keys and values once, or multiplies, whichever is slower."""
    device, size = job.model.device, next(job.model.parameters()).element_size()
    copy, square = torch.empty(1 << 26, device=device), torch.randn(2048, 2048, device=device, dtype=job.model.dtype)

    def best(run: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            run()
            if copy.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)
    bandwidth, rate = 2 * copy.nbytes / best(copy.clone), 2 * 2048**3 / best(lambda: square @ square)
    config, parameters = job.model.config, sum(p.numel() for p in job.model.parameters())
    kv = 2 * size * config.num_hidden_layers * config.num_key_value_heads * config.head_dim                       # bytes per token
    starts, seconds = [len(p) for p in job.prompts for _ in range(job.group)], 0.0
    for t in range(max(lengths)):
        context = [start + t for start, length in zip(starts, lengths) if length > t]
        seconds += max((parameters * size + kv * sum(context)) / bandwidth, 2 * parameters * len(context) / rate)
    return seconds


def make_job(name: str, rows: int, lengths: str, max_new: int) -> Job:
    """Random weights, prompts of 16 to 64 tokens. "equal": nobody stops early; "spread": any of V / (max_new / 3) stop tokens ends a row, so lengths are geometric."""
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    hidden, layers, heads, kv_heads, inner, V = MODELS[name]
    config = Qwen3Config(vocab_size=V, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads,
                         intermediate_size=inner, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.device("cuda" if gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if gpu else torch.float32).eval()
    stops = set(range(1, 1 + round(3 * V / max_new))) if lengths == "spread" else set()
    prompts = [torch.randint(V // 2, V, (int(n),)).tolist() for n in torch.randint(16, 65, (rows // 8,))]
    return Job(model, prompts, 8, max_new, stops, 0)


def take_turns(runs: dict[str, Callable[[], list[int]]], rounds: int, patience: float) -> tuple[dict[str, float], dict[str, int], dict[str, str]]:
    """Median tokens per second of each, its peak bytes, and what there is to say about those that failed or were too slow to run again."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    memory: dict[str, int] = {}
    notes: dict[str, str] = {}
    for i in range(rounds + 1):                                                                  # the first round warms up
        for name in [name for name in runs if name not in notes]:
            torch.manual_seed(i)
            started = time.perf_counter()
            try:
                size, lengths = (0, runs[name]()) if i else peak_bytes(runs[name])
            except PEER_ERRORS as error:
                if name.startswith("ours"):
                    raise
                notes[name], rates[name] = "absent" if isinstance(error, ImportError) else f"{type(error).__name__}: {' '.join(str(error).split())[:80]}", []
            else:
                seconds = time.perf_counter() - started
                rates[name].append(sum(lengths) / seconds)
                memory[name] = max(size, memory.get(name, 0))
                if seconds > patience and i < rounds and (i or torch.cuda.is_available()):             # counting memory on a CPU takes time of its own: that run is no figure
                    notes[name] = f"{i} rounds" if i > 1 else "one run"
    return {name: statistics.median(rate[1:] or rate) for name, rate in rates.items() if rate}, memory, notes


def bench_rollout(args: argparse.Namespace) -> None:
    gpu = torch.cuda.is_available()
    print(f"{start_clock(args)}, {args.rounds} rounds, medians, taking turns")
    for name, rows in itertools.product(args.model or (["1.5b", "7b"] if gpu else ["toy", "10m"]), args.rows or ([64, 256, 512] if gpu else [64])):
        max_new = args.max_new_tokens or (2048 if gpu else 64 if name == "10m" else 128)
        for lengths in ("equal", "spread"):
            job = make_job(name, rows, lengths, max_new)
            drawn = peers.sample_ours(job)
            bound = sum(drawn) / limit_seconds(job, drawn)
            runs = {"ours": peers.sample_ours, "ours, plain loop" if gpu else "ours, static": partial(peers.sample_ours, static=not gpu),
                    "HF generate": peers.sample_hf, "HF generate, static cache": partial(peers.sample_hf, cache_implementation="static"),
                    "HF continuous batching": peers.sample_hf_continuous, "vLLM": peers.VLLM()}
            rate, memory, notes = take_turns({n: partial(run, job) for n, run in runs.items()}, args.rounds, args.patience or (120 if gpu else 10))
            print(f"\n{name}: {rows} rows of up to {max_new} tokens, lengths {lengths} (mean {sum(drawn) / rows:.0f}); limit {bound:.0f} tokens/s\n"
                  "| | tokens/s | of ours | of the limit | peak MB | |\n|---|---|---|---|---|---|")
            for n in runs:
                speeds = f"{rate[n]:.0f} | {rate[n] / rate['ours']:.2f} | {rate[n] / bound:.2f}" if n in rate else "- | - | -"
                print(f"| {n} | {speeds} | " + (f"{memory[n] / 1e6:.0f}" if memory.get(n) else "-") + f" | {notes.get(n, '')} |", flush=True)

# ------------------------------------------------------------------------------------------------ whole steps

class Steps:
    """Our training steps, one a call, on a model of their own; -> seconds by part."""

    def __init__(self, flags: list[str], full_length: bool = False):
        c = train.parse_config(flags)
        self.step, (model, tokenizer) = 0, load_model(c.model, c.device)
        stops, pad = stop_and_pad_ids(model, tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, betas=(0.9, c.adam_beta2), weight_decay=c.weight_decay)
        self.run = train.Run(c, train.load_data(c)[0], model, tokenizer, load_model(c.model, c.device)[0].requires_grad_(False) if c.beta else None, optimizer,
                             Sampler(model, set() if full_length else stops, pad),
                             load_gsrm(c.gsrm, c.judge, None, c.device, c.gsrm_max_new_tokens, c.normalize) if c.w_structure else None, None)

    def read_teachers(self, steps: int) -> None:
        chosen = [self.run.problems[i] for s in range(steps) for i in train.cursor(len(self.run.problems), self.run.config.problems_per_step, self.run.config.seed, s)]
        self.run.gsrm.teachers([p.problem for p in chosen], [list(p.teachers) for p in chosen])

    def __call__(self) -> dict[str, float]:
        started = time.perf_counter()
        metrics, rows, _ = train.step_once(self.run, self.step)
        self.step += 1
        return {"step": time.perf_counter() - started, "sampling": metrics["time/sampling"], "scoring": metrics["time/scoring"],
                "update": metrics["time/reference"] + metrics["time/update"],
                "tokens": metrics["completions/mean_length"] * len(rows)}


def bench_step(args: argparse.Namespace) -> None:
    device, outcome = ["--device", "cuda" if torch.cuda.is_available() else "cpu"], ["--w_structure", "0", "--w_format", "0"]
    rlkd = Steps(device)
    rlkd.read_teachers(args.rounds + 1)
    print(f"{start_clock(args)}; float32, AdamW, beta {rlkd.run.config.beta}; {args.rounds} rounds after one that warms up, medians, taking turns", flush=True)
    for title, full_length, tokens in ((f"all rows {args.max_new_tokens} tokens", True, args.max_new_tokens), ("rows stop where they like", False, rlkd.run.config.max_new_tokens)):
        ours = Steps([*device, *outcome, "--max_new_tokens", str(tokens)], full_length)
        seconds: dict[str, list[dict[str, float]]] = {"ours, outcome only": [], "TRL, outcome only": []} | ({} if full_length else {"ours, RLKD with GSRM": []})
        race(ours, seconds, None if full_length else rlkd, args.rounds + 1)
        N = ours.run.config.problems_per_step * ours.run.config.group_size
        middle = {n: {k: statistics.median(p[k] for p in parts[1:]) for k in parts[0]} for n, parts in seconds.items() if parts}
        print(f"\n{N} rows, {title}\n| | seconds a step | of ours | sampling | scoring | update | tokens a row |\n|---|---|---|---|---|---|---|")
        for name, m in middle.items():
            cells = m["step"], m["step"] / middle["ours, outcome only"]["step"], m["sampling"], m["scoring"], m["update"]
            print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in cells) + f" | {m['tokens'] / N:.0f} |", flush=True)
    print(f"GSRM's share of the RLKD step: {m['scoring'] / m['step']:.2f}")


def race(ours: Steps, seconds: dict[str, list[dict[str, float]]], rlkd: Steps | None, steps: int) -> None:
    """Fills seconds, step by step by turns; without TRL ours run alone."""
    def grade(completions: list[list[int]], problems: list[int]) -> list[float]:
        rights = grade_all(whole_turns(ours.run.tokenizer, completions), [ours.run.problems[i].answer for i in problems])
        return [float(right or 0) for right in rights]

    def turn(trl: dict[str, float] | None) -> None:
        for name, part in zip(seconds, (ours(), trl, rlkd() if rlkd else None)):
            seconds[name] += [part] if part else []

    model, c = load_model(ours.run.config.model, ours.run.config.device)[0], ours.run.config
    prompts = [problem_ids(ours.run.tokenizer, p, c.instruction) for p in ours.run.problems]
    ends = ours.run.tokenizer.eos_token_id, stop_and_pad_ids(model, ours.run.tokenizer)[1]
    try:
        peers.trl_steps(model, prompts, c, ends, not len(ours.run.sampler.stop_ids), grade, steps, turn)
    except ImportError as error:
        print(f"no TRL here ({error}): ours alone")
        for _ in range(steps):
            turn(None)


def add_commands(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("rollout", help="sampling, beside transformers' generate and continuous batching, and vLLM")
    command.add_argument("--model", nargs="+", choices=MODELS)
    command.add_argument("--rows", nargs="+", type=at_least(8), help="completions, eight of each prompt")
    command.add_argument("--max_new_tokens", type=at_least(1))
    command.add_argument("--rounds", type=at_least(1), default=3)
    command.add_argument("--patience", type=at_least(0, float), help="seconds; whoever takes longer is not run again (default: 10, on a GPU 120)")
    command.add_argument("--cpu_time", action="store_true", help="CPU seconds instead of wall time")
    command.set_defaults(run=bench_rollout)
    command = commands.add_parser("step", help="whole RL steps on the toy, beside TRL's")
    command.add_argument("--max_new_tokens", type=at_least(1), default=105)
    command.add_argument("--rounds", type=at_least(1), default=10)
    command.add_argument("--cpu_time", action="store_true", help="CPU seconds instead of wall time")
    command.set_defaults(run=bench_step)
