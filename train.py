"""RLKD: reinforcement learning on following the teacher's reasoning structure (arXiv 2505.16142).

    repeat:  sample G completions for each of P problems                                      rollout.py
             reward = w_s * structure (GSRM) + w_o * outcome + w_f * format                   gsrm.py, eval.py
             advantage = reward against the others of its group                               grpo.py
             one step up the clipped policy gradient, held near the start by beta * KL        grpo.py, logprob.py

    python train.py                                              # the toy: 4 minutes on two CPU cores
    python train.py --w_structure 0 --out out/grpo               # the baseline: GRPO, outcome only
    torchrun --nproc_per_node 2 train.py --out out/two           # the same update from two processes
    python train.py --resume auto                                # go on after an interruption, bitwise as if there had been none (CPU)

A run leaves in --out: model/ (Hugging Face checkpoint), log.jsonl (a line a step), rollouts.jsonl (every completion, its steps and rewards), curve.png, run.json
(the configuration), checkpoints/. Left out on purpose: a Trainer class, callbacks, an external sampler. Sharding (FSDP2) is not here yet.
"""
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import HfArgumentParser, PreTrainedModel

import eval as evaluation
import report
from checkpoint import load_optimizer, save_checkpoint, start_folder
from data import Problem, Tokenizer, append_jsonl, load_model, load_problems, problem_ids, save_model, split_completion, stop_and_pad_ids, whole_turns
from grpo import combine_advantages, denominator, grpo_loss, scored_rows
from gsrm import GSRM, Score
from logprob import linear_logprob, linear_policy_loss
from rollout import Rollout, Sampler, check_head, micro_batches, predictors


def flag(default, text: str):
    """A Config field whose help text is shown by --help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Flags of `python train.py`; defaults suit 1.5B-7B students (../docs say why). A preset overrides defaults, flags override the preset."""
    preset: str = flag("toy", "toy, or none")
    model: str = flag("", "student: checkpoint folder or hub name")
    data: str = flag("", "problems with teacher traces: JSONL, or a folder with train.jsonl and test.jsonl")
    eval_data: str = flag("", "problems for the tables before and after; empty: test.jsonl of a --data folder, if there is one")
    gsrm: str = flag("", "reward model: checkpoint folder, http://HOST:PORT/v1#MODEL, or module:function, a rule that reads a trace into steps")
    judge: str = flag("", "judge of step pairs: checkpoint folder or http://HOST:PORT/v1#MODEL; empty: what gsrm.json in the folder of --gsrm names, else the same model")
    truth: str = flag("", "module:function that reads a trace's true steps where they are known; only measured, never trained on")
    out: str = flag("out/run", "folder that the run writes")
    limit: int = flag(0, "train on the first so many problems only (0: all)")
    instruction: str | None = flag(None, "text after each problem (default: the tokenizer's own, else 'Please reason step by step ...')")
    w_structure: float = flag(1.0, "weight of the structure reward; 0 asks no GSRM (plain GRPO)")
    w_outcome: float = flag(1.0, "weight of the outcome reward, 1 for a right final answer")
    w_format: float = flag(0.2, "weight of the format reward, 1 for <think>...</think> and one boxed answer")
    combine: str = flag("gdpo", "several rewards: gdpo (each normalised in its group, then summed) or sum (the paper's)")
    normalize: bool = flag(True, "structure reward divided by the teacher's number of steps; False: the authors' raw sum")
    max_teachers: int = flag(0, "use only the first so many teacher traces of a problem (0: all)")
    steps: int = flag(500, "optimiser steps (each on fresh rollouts, times updates_per_batch)")
    problems_per_step: int = flag(16, "P, problems per step over all processes")
    group_size: int = flag(8, "G, completions per problem")
    max_new_tokens: int = flag(4096, "completion budget in tokens")
    gsrm_max_new_tokens: int = flag(2048, "budget of a written structure in tokens")
    temperature: float = flag(1.0, "of sampling, and of the trainer's log-probs")
    updates_per_batch: int = flag(1, "optimiser steps on the same rollouts (1 is on-policy)")
    scale: str = flag("std", "advantages: std (divide by the group's) or none")
    aggregation: str = flag("token", "loss per token (DAPO), sequence (GRPO) or fixed length (Dr.GRPO)")
    level: str = flag("token", "importance ratio per token or sequence (GSPO)")
    clip_low: float = flag(0.2, "ratio is clipped below 1 - clip_low")
    clip_high: float = flag(0.28, "ratio is clipped above 1 + clip_high")
    beta: float = flag(1e-3, "weight of the KL to the frozen start; 0 loads no reference model")
    kl_kind: str = flag("k3", "k1, k2 or k3 (see grpo.kl)")
    lr: float = flag(1e-6, "learning rate (AdamW), constant after the warm-up")
    warmup_steps: int = flag(0, "steps in which the rate climbs")
    weight_decay: float = flag(0.0, "AdamW's")
    adam_beta2: float = flag(0.999, "AdamW's second beta")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    max_tokens: int = flag(16384, "padded tokens per micro-batch; no effect on the update")
    eval_problems: int = flag(64, "evaluation problems (the first so many; 0: no evaluation)")
    eval_k: int = flag(8, "samples per evaluation problem")
    save_every: int = flag(50, "steps between checkpoints (0: only at the end)")
    resume: str = flag("", "auto: go on from the newest whole checkpoint in --out")
    seed: int = flag(0, "everything random follows from it")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")


PRESETS: dict[str, dict] = {
    "none": {},
    "toy": dict(model="toy/student", data="toy", gsrm="toy/gsrm", truth="toy:read", out="out/toy", steps=240, problems_per_step=8, max_new_tokens=150,
                gsrm_max_new_tokens=200, w_outcome=0.25, beta=0.01, lr=3e-4, warmup_steps=5, adam_beta2=0.99, device="cpu"),
}

# ------------------------------------------------------------------------------------------------ processes

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """x summed over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather_rows(rows: list[dict]) -> list[dict]:
    """Rows of every process on each of them, in rank order, as JSON bytes (no pickle)."""
    if world() == 1:
        return rows
    data = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    parts = [torch.zeros(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
    dist.all_gather(parts, torch.nn.functional.pad(data, (0, int(max(sizes)) - len(data))))
    return [row for part, size in zip(parts, sizes) for row in json.loads(bytes(part[:size].tolist()))]

# ------------------------------------------------------------------------------------------------ one step, piece by piece

def cursor(count: int, take: int, seed: int, step: int) -> list[int]:
    """Indices of step `step`'s problems: epochs of all `count` problems, each in an order of its own; a function of (seed, step), so resume needs no state."""
    orders: dict[int, np.ndarray] = {}
    places = range(step * take, (step + 1) * take)
    return [int(orders.setdefault(i // count, np.random.default_rng([seed, i // count]).permutation(count))[i % count]) for i in places]


def reward_weights(config: Config) -> dict[str, float]:
    return {"structure": config.w_structure, "outcome": config.w_outcome, "format": config.w_format}


def format_reward(text: str, finished: bool) -> float:
    """1 for a finished completion of the form [<think>] trace </think> final, with a boxed final answer; else 0."""
    trace, final = split_completion(text)
    return float(finished and final is not None and "\\boxed{" in final and "think>" not in final and "<think>" not in trace)


def score(problems: list[Problem], texts: list[str], finished: list[bool], gsrm: GSRM | None, config: Config) -> tuple[dict[str, list[float | None]], list[Score | None]]:
    """(rewards by name, each (N,) with None where unscored; the structure Scores) of N completions, row n belonging to problems[n]."""
    rewards: dict[str, list[float | None]] = {}
    scores: list[Score | None] = [None] * len(texts)
    if config.w_structure:
        traces = [list(p.teachers[:config.max_teachers or None]) for p in problems]
        scores = list(gsrm(problems, [split_completion(text)[0] for text in texts], traces))
        rewards["structure"] = [s.value for s in scores]
    rewards["outcome"] = [None if right is None else float(right) for right in evaluation.grade_all(texts, [p.answer for p in problems])]
    rewards["format"] = [format_reward(text, done) for text, done in zip(texts, finished)]
    return rewards, scores


def advantages(rewards: dict[str, list[float | None]], config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """((N,) advantages, (N,) bool scored) of this process's rewards."""
    tables = {name: torch.tensor([math.nan if v is None else v for v in values]).view(-1, config.group_size) for name, values in rewards.items()}
    weights = {name: w for name, w in reward_weights(config).items() if name in tables}
    scored = scored_rows(tables, weights)
    return combine_advantages(tables, weights, scored, config.combine, config.scale).flatten(), scored.flatten()


def micro_loss(model: PreTrainedModel, reference: PreTrainedModel | None, prompts: list[list[int]], completions: list[list[int]], per_token: dict[str, torch.Tensor],
               config: Config, tally: Callable[[dict[str, torch.Tensor]], None]) -> torch.Tensor:
    """The loss share of one micro-batch. per_token: old_logp, advantages, denominator, (tokens,) in row order, as `predictors` gives them. The loss is
    evaluated inside the head's matmul (linear_policy_loss, three matmuls instead of four) unless it couples the tokens of a row (level sequence)."""
    head, T = model.get_output_embeddings().weight, config.temperature
    hidden, targets = predictors(model, prompts, completions)                          # (tokens, D), (tokens,)
    if reference is not None:
        with torch.no_grad():
            per_token["ref_logp"] = linear_logprob(predictors(reference, prompts, completions)[0], reference.get_output_embeddings().weight, targets, T)[0]
    keep = torch.arange(max(map(len, completions))) < torch.tensor([[len(c)] for c in completions])                    # (n, T)
    keep = (keep if config.level == "sequence" else torch.ones(len(targets), dtype=torch.bool)).to(targets.device)

    def loss_of(logp: torch.Tensor, rows: slice) -> torch.Tensor:
        lay = lambda x: x[rows] if keep.ndim == 1 else x.new_zeros(keep.shape).masked_scatter(keep, x)
        x = {name: lay(value) for name, value in per_token.items()}
        loss, sums = grpo_loss(logp if keep.ndim == 1 else lay(logp), x["old_logp"], x.get("ref_logp"), x["advantages"], keep[rows], x["denominator"].clamp_min(1),
                               clip_low=config.clip_low, clip_high=config.clip_high, beta=config.beta, kl_kind=config.kl_kind, level=config.level)
        tally(sums)
        return loss

    if config.level == "sequence":
        return loss_of(linear_logprob(hidden, head, targets, T)[0], slice(None))
    return linear_policy_loss(hidden, head, targets, T, loss_of)[0]


def update(model: PreTrainedModel, reference: PreTrainedModel | None, optimizer: torch.optim.Optimizer, prompts: list[list[int]], rollout: Rollout,
           adv: torch.Tensor, scored: torch.Tensor, config: Config) -> dict[str, float]:
    """One optimiser step on all processes' rollouts; metrics are sums over all tokens, reduced once. A non-finite gradient skips the step."""
    model.train()
    mask = rollout.mask & scored.to(rollout.mask.device)[:, None]                       # (N, T); an unscored row is not there
    denom = denominator(mask.cpu(), config.aggregation, config.max_new_tokens, all_sum)                      # (N,), over the whole step
    used = [n for n, there in enumerate(mask.any(1).tolist()) if there and (adv[n] != 0 or config.beta)]      # the others have gradient 0
    total, sums = 0.0, {"entropy": float(rollout.entropy[used].sum())}

    def tally(part: dict[str, torch.Tensor]) -> None:
        for name, value in part.items():
            sums[name] = max(sums.get(name, 0.0), float(value)) if name.endswith("/max") else sums.get(name, 0.0) + float(value)

    for piece in micro_batches([len(prompts[n]) + int(rollout.lengths[n]) for n in used], config.max_tokens):
        rows = [used[i] for i in piece]
        repeat = lambda x, rows=rows: x[rows].to(model.device).repeat_interleave(rollout.lengths[rows])
        per_token = {"old_logp": rollout.logp[rows][rollout.mask[rows]], "advantages": repeat(adv), "denominator": repeat(denom)}
        loss = micro_loss(model, reference, [prompts[n] for n in rows], [rollout.completion(n) for n in rows], per_token, config, tally)
        loss.backward()
        total += loss.item()
    return apply_gradient(model, optimizer, total, sums, config)


def apply_gradient(model: PreTrainedModel, optimizer: torch.optim.Optimizer, loss: float, sums: dict[str, float], config: Config) -> dict[str, float]:
    """Sums gradients and metrics over processes (they add up: the loss was divided by the whole step's denominator), clips, steps; -> mean metrics."""
    names = ["tokens", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
             "sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean"]
    means = dict(zip(names, all_sum(torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64)).tolist()))
    largest = torch.tensor([sums.get("sampling/sampling_logp_difference/max", 0.0)])
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        for p in model.parameters():
            p.grad = all_sum(torch.zeros_like(p) if p.grad is None else p.grad)
    norm, tokens = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm), means.pop("tokens")
    stepped = bool(norm.isfinite()) and tokens > 0          # AdamW moves on its momentum even where every group was spread-less
    if stepped:
        optimizer.step()
    optimizer.zero_grad()
    return {"loss": float(all_sum(torch.tensor(loss, dtype=torch.float64))), **{name: value / max(tokens, 1) for name, value in means.items()},
            "sampling/sampling_logp_difference/max": float(largest), "grad_norm": float(norm), "skipped_step": float(not stepped)}

# ------------------------------------------------------------------------------------------------ the run

def parse_config(argv: list[str] | None = None) -> Config:
    """Config from defaults, then the preset, then flags. An unknown flag, preset or value ends the program with a line that says so."""
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0], allow_abbrev=False)
    preset = parser.parse_known_args(argv)[0].preset
    if preset not in PRESETS:
        parser.error(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    parser.set_defaults(**PRESETS[preset])
    config = Config(**vars(parser.parse_args(argv)))
    for f in fields(config):
        if f.name in ("model", "data") and not getattr(config, f.name):
            parser.error(f"--{f.name} is needed: {f.metadata['help']}")
    checks = {"group_size": config.group_size >= 2, "problems_per_step": config.problems_per_step >= world(), "steps": config.steps >= 1, "max_new_tokens": config.max_new_tokens >= 1,
              "temperature": config.temperature > 0, "lr": config.lr > 0, "gsrm": bool(config.gsrm) or not config.w_structure, "updates_per_batch": config.updates_per_batch >= 1,
              "w_structure": any((config.w_structure, config.w_outcome, config.w_format)), "combine": config.combine in ("gdpo", "sum"), "scale": config.scale in ("std", "none"),
              "aggregation": config.aggregation in ("token", "sequence", "fixed"), "level": config.level in ("token", "sequence"), "kl_kind": config.kl_kind in ("k1", "k2", "k3")}
    hints = {"group_size": "a group of 1 has nothing to be compared with, use 2 or more", "problems_per_step": f"each of the {world()} processes needs at least one problem a step",
             "gsrm": "the structure reward needs a reward model; give one, or --w_structure 0", "w_structure": "at least one reward needs a weight other than 0",
             "temperature": "RL samples at a temperature above 0"}
    for name, fine in checks.items():
        if not fine:
            help_text = next(f.metadata["help"] for f in fields(config) if f.name == name)
            parser.error(f"--{name} {getattr(config, name)}: {hints.get(name, help_text)}")
    return config


def load_data(config: Config) -> tuple[list[Problem], list[Problem]]:
    """(training, evaluation) problems."""
    problems = load_problems(config.data)[:config.limit or None]
    if config.w_structure and (bare := [p.id for p in problems if not p.teachers]):
        raise ValueError(f"{config.data}: {len(bare)} problems have no teacher trace (first: {bare[0]}), so their structure cannot be rewarded: drop them, or use --w_structure 0")
    held_out = load_problems(config.eval_data or config.data, "test") if config.eval_data or (Path(config.data) / "test.jsonl").is_file() else []
    return problems, held_out[:config.eval_problems]


def step_once(step: int, problems: list[Problem], model: PreTrainedModel, tokenizer: Tokenizer, reference: PreTrainedModel | None, optimizer: torch.optim.Optimizer, sampler: Sampler,
              gsrm: GSRM | None, truth: Callable | None, config: Config) -> tuple[dict[str, float], list[dict]]:
    """One training step: (metrics, rows for rollouts.jsonl), of all processes."""
    clock = [time.time()]
    mine = list(range(rank(), config.problems_per_step, world()))                                             # places in the step's list, dealt out
    chosen = [problems[i] for i in cursor(len(problems), config.problems_per_step, config.seed, step)]
    prompts = {i: problem_ids(tokenizer, chosen[i], config.instruction) for i in mine}
    rollout = sampler.generate([prompts[i] for i in mine], config.group_size, config.max_new_tokens, config.temperature, seed=config.seed * 1_000_003 + step, index=mine)
    rows = [i for i in mine for _ in range(config.group_size)]
    texts = whole_turns(tokenizer, [rollout.completion(n) for n in range(len(rows))])
    clock.append(time.time())
    rewards, scores = score([chosen[i] for i in rows], texts, rollout.finished.tolist(), gsrm, config)
    true = evaluation.true_structure(truth, [chosen[i] for i in rows], texts)
    adv, scored = advantages(rewards, config)
    clock.append(time.time())
    for group in optimizer.param_groups:
        group["lr"] = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
    for _ in range(config.updates_per_batch):
        metrics = update(model, reference, optimizer, [prompts[i] for i in rows], rollout, adv, scored, config)
    clock.append(time.time())
    table = gather_rows(report.rollout_rows(step + 1, [chosen[i] for i in rows], texts, rollout, rewards, scores, adv.tolist(), true, config.group_size))
    metrics = report.log_row(step + 1, table, reward_weights(config), config.group_size) | metrics | {"learning_rate": optimizer.param_groups[0]["lr"], "step_time": clock[-1] - clock[0]}
    metrics |= {f"time/{name}": b - a for name, a, b in zip(("sampling", "scoring", "update"), clock, clock[1:])}
    if gsrm:                                              # what scoring cost: like the times, it depends on what the caches already held
        metrics |= {f"time/gsrm/{name}": value for name, value in gsrm.stats.items()}
        gsrm.stats.clear()
    return metrics, table


def main(config: Config) -> None:
    out, say = Path(config.out), print if rank() == 0 else (lambda *_, **__: None)
    start = start_folder(out, asdict(config), config.resume, rank() == 0)
    if dist.is_initialized():
        dist.barrier()                                    # every process has looked at the folder before one of them writes to it
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        (out / "run.json").write_text(json.dumps({"config": asdict(config), "torch": torch.__version__, "command": sys.argv}, indent=1))
    say("settings that differ from the defaults (all: run.json): " + " ".join(f"--{f.name} {value}" for f in fields(config) if (value := getattr(config, f.name)) != f.default))
    say(f"P x G = {config.problems_per_step} x {config.group_size} = {config.problems_per_step * config.group_size} rollouts a step, {config.steps} steps, {world()} process(es)", flush=True)
    torch.manual_seed(config.seed)
    problems, held_out = load_data(config)
    model, tokenizer = load_model(start or config.model, config.device)
    check_head(model)
    sampler = Sampler(model, *stop_and_pad_ids(model, tokenizer))
    reference = load_model(config.model, config.device)[0].requires_grad_(False) if config.beta else None         # the start of the run, also after a resume
    gsrm = evaluation.load_gsrm(config.gsrm, config.judge, out / "gsrm_cache.jsonl", config.device, config.gsrm_max_new_tokens, config.normalize) if config.gsrm else None
    truth = evaluation.load_function(config.truth) if config.truth else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay)
    first = load_optimizer(start, optimizer) if start else 0
    measure = lambda name: evaluation.before_after(model, tokenizer, held_out, gsrm, truth, out / f"eval_{name}.jsonl", config) if held_out and rank() == 0 else None
    say(f"{len(problems)} problems, student {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters" + (f", going on after step {first}" if first else ""), flush=True)
    if first == 0 and held_out:
        say(f"evaluating the student before training on {len(held_out)} held-out problems ...", flush=True)
        say(f"before training: {measure('before')}", flush=True)
    for step in range(first, config.steps):
        metrics, table = step_once(step, problems, model, tokenizer, reference, optimizer, sampler, gsrm, truth, config)
        if rank() == 0:
            append_jsonl(out / "rollouts.jsonl", table)
            append_jsonl(out / "log.jsonl", [metrics])
            say(report.screen_line(metrics, config.steps, config.beta), flush=True)
            if step + 1 == config.steps or config.save_every and (step + 1) % config.save_every == 0:
                save_checkpoint(out / "checkpoints", model, tokenizer, optimizer, step + 1)
    if rank() == 0:
        save_model(model, tokenizer, out / "model")
        report.plot([str(out)], out / "curve.png")
        measure("after")
        report.print_end(out)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:                              # set by torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        main(parse_config())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
