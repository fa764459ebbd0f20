"""RLKD: reinforcement learning on following the teacher's reasoning structure (arXiv 2505.16142).

    repeat:  sample G completions for each of P problems                                      rollout.py
             reward = w_s * structure (GSRM) + w_o * outcome + w_f * format                   gsrm.py, eval.py
             advantage = reward against the others of its group                               grpo.py
             one step up the clipped policy gradient, held near the start by beta * KL        update.py: grpo.py, logprob.py

    python train.py                                              # the toy: 4 minutes on two CPU cores
    python train.py --w_structure 0 --out out/grpo               # the baseline: GRPO, outcome only
    torchrun --nproc_per_node 2 train.py --out out/two           # the same update from two processes (FSDP2; several machines: parallel.py)
    python train.py --resume auto                                # go on after an interruption, bitwise as if there had been none (CPU)

A run leaves in --out: model/ (Hugging Face checkpoint), log.jsonl (a line a step), rollouts.jsonl (every completion, its steps and rewards), curve.png, run.json
(settings, versions, commit, data), checkpoints/. Left out on purpose: a Trainer class, callbacks, an external sampler, tensor parallelism.
"""
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

import eval as evaluation
import parallel
import report
from checkpoint import Checkpoints, cut_logs, load_checkpoint, newest_of_all, start_folder
from command import ConfigParser, ending, folder, out_of_range
from data import (
    Problem,
    Tokenizer,
    append_jsonl,
    data_file,
    file_hash,
    load_model,
    load_problems,
    problem_ids,
    save_model,
    stop_and_pad_ids,
    template_hash,
    whole_turns,
)
from gsrm import GSRM
from parallel import gather_rows, rank, world
from reward import advantages, reward_weights, score
from rollout import Sampler, check_head
from update import reference_logp, update
from watch import Faults, Leave, dump, leaving, peak_gigabytes, run_record, tracker, warnings


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
    keep: int = flag(2, "checkpoints kept: the last so many, and the one with the best reward")
    resume: str = flag("", "auto: go on from the newest whole checkpoint in --out")
    seed: int = flag(0, "everything random follows from it")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    dtype: str = flag("float32", "what the models compute in: float32, or bfloat16 (the student's masters, gradients and moments stay float32)")
    gradient_checkpointing: bool = flag(False, "recompute each layer in the backward pass instead of holding its activations")
    offload: bool = flag(False, "the student's masters, gradients and moments rest in CPU memory (for cards of 24-40 GB; slower)")
    reward_timeout: float = flag(1800.0, "seconds that processes wait for one another's rewards")
    max_faults: int = flag(3, "steps in a row with a loss or gradient that is not finite: back to the last good checkpoint once, then the run ends")
    warn_entropy: float = flag(0.02, "warn below so many nats a token")
    warn_truncated: float = flag(0.8, "warn above this share of cut-off completions")
    warn_spreadless: float = flag(0.8, "warn above this share of groups with equal rewards")
    warn_ratio: float = flag(1.0, "warn above this difference of sampler and trainer on a token, nats")
    warn_unscored: float = flag(0.1, "warn above this share of completions without a reward")
    log_to: str = flag("", "wandb, trackio or tensorboard, besides log.jsonl")


MANY = math.inf
RANGES = {"seed": (0, 2**63 // 1_000_003), "limit": (0, MANY), "steps": (1, MANY), "max_new_tokens": (1, MANY), "updates_per_batch": (1, MANY), "keep": (1, MANY), "max_faults": (1, MANY),
          "max_teachers": (0, MANY), "gsrm_max_new_tokens": (1, MANY), "max_tokens": (1, MANY), "eval_problems": (0, MANY),
          "eval_k": (1, MANY), "save_every": (0, MANY), "warmup_steps": (0, MANY), "weight_decay": (0, MANY), "clip_low": (0, 1), "clip_high": (0, MANY), "beta": (0, MANY),
          "adam_beta2": (0, 1), "max_grad_norm": (1e-9, MANY), "reward_timeout": (0.001, MANY)}       # low <= number < high, where `parse_config` says nothing else
PRESETS: dict[str, dict] = {
    "none": {},
    "toy": dict(model="toy/student", data="toy", gsrm="toy/gsrm", truth="toy:read", out="out/toy", steps=240, problems_per_step=8, max_new_tokens=150,
                gsrm_max_new_tokens=200, w_outcome=0.25, beta=0.01, lr=3e-4, warmup_steps=5, adam_beta2=0.99, device="cpu"),
}

# ------------------------------------------------------------------------------------------------ one step, piece by piece

def cursor(count: int, take: int, seed: int, step: int) -> list[int]:
    """Indices of step `step`'s problems: epochs of all `count` problems, each in an order of its own; a function of (seed, step), so resume needs no state."""
    orders: dict[int, np.ndarray] = {}
    places = range(step * take, (step + 1) * take)
    return [int(orders.setdefault(i // count, np.random.default_rng([seed, i // count]).permutation(count))[i % count]) for i in places]

# ------------------------------------------------------------------------------------------------ the run

def parse_config(argv: list[str] | None = None) -> Config:
    """Config from defaults, then the preset, then flags. An unknown flag, preset or value ends the program with a line that says so."""
    parser = ConfigParser(Config, description=__doc__.split("\n")[0], allow_abbrev=False)
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
              "dtype": config.dtype in ("float32", "bfloat16"), "keep": config.keep >= 1, "max_faults": config.max_faults >= 1,
              "log_to": config.log_to in ("", "wandb", "trackio", "tensorboard"), "resume": config.resume in ("", "auto"), "aggregation": config.aggregation in ("token", "sequence", "fixed"), "level": config.level in ("token", "sequence"), "kl_kind": config.kl_kind in ("k1", "k2", "k3")}
    hints = {"group_size": "a group of 1 has nothing to be compared with, use 2 or more", "problems_per_step": f"each of the {world()} processes needs at least one problem a step",
             "gsrm": "the structure reward needs a reward model; give one, or --w_structure 0", "w_structure": "at least one reward needs a weight other than 0",
             "temperature": "RL samples at a temperature above 0"}
    wrong, wanted = out_of_range(asdict(config), RANGES)
    if wrong:
        checks[wrong] = False
        hints.setdefault(wrong, wanted)
    if config.log_to and checks["log_to"] and not importlib.util.find_spec(config.log_to):
        checks["log_to"], hints["log_to"] = False, f"pip install {config.log_to}, or leave the flag out (log.jsonl has every figure)"
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


@dataclass
class Run:
    """What lives as long as a run: the models, what samples and scores with them, and what holds their state."""
    config: Config
    problems: list[Problem]
    model: PreTrainedModel
    tokenizer: Tokenizer
    reference: PreTrainedModel | None
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    gsrm: GSRM | None
    truth: Callable | None


def set_up(config: Config, out: Path) -> Run:
    """Models, sampler, reward model and optimiser at the start of a run."""
    torch.manual_seed(config.seed)
    problems = load_data(config)[0]
    model, tokenizer = load_model(config.model, config.device)
    check_head(model)
    sampler = Sampler(model, *stop_and_pad_ids(model, tokenizer))                # while it can still ask the model for its device
    reference = load_model(config.model, config.device, config.dtype)[0].requires_grad_(False) if config.beta else None
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if world() > 1 or config.dtype != "float32" or config.offload:
        parallel.shard(model, config.dtype, config.offload)
        reference = reference and parallel.shard(reference, config.dtype, config.offload)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay)
    gsrm = evaluation.load_gsrm(config.gsrm, config.judge, out / "gsrm_cache.jsonl", config.device, config.gsrm_max_new_tokens, config.normalize) if config.gsrm else None
    return Run(config, problems, model, tokenizer, reference, optimizer, sampler, gsrm, evaluation.load_function(config.truth) if config.truth else None)


def check_room(run: Run, held_out: list[Problem]) -> None:
    """ValueError where a prompt and a completion together pass the model's positions: now, and not in the step that meets this problem."""
    longest, name = max((len(problem_ids(run.tokenizer, p, run.config.instruction)), p.id) for p in [*run.problems, *held_out])
    if longest + run.config.max_new_tokens > run.sampler.max_positions:
        raise ValueError(f"the prompt of problem {name} has {longest} tokens; with --max_new_tokens {run.config.max_new_tokens} it passes the model's {run.sampler.max_positions} "
                         "positions: lower --max_new_tokens, or drop the problem")


def step_once(run: Run, step: int, leave: Callable[[], None] = lambda: None) -> tuple[dict[str, float], list[dict], list[list[int]]]:
    """One training step: (metrics, rows for rollouts.jsonl, of all processes; this process's completions). `leave` may raise as long as nothing has moved."""
    config, model, tokenizer, clock = run.config, run.model, run.tokenizer, [time.time()]
    mine = list(range(rank(), config.problems_per_step, world()))                                             # places in the step's list, dealt out
    chosen = [run.problems[i] for i in cursor(len(run.problems), config.problems_per_step, config.seed, step)]
    asked = {i: problem_ids(tokenizer, chosen[i], config.instruction) for i in mine}
    rows = [i for i in mine for _ in range(config.group_size)]
    with parallel.gathered(model):
        rollout = run.sampler.generate([asked[i] for i in mine], config.group_size, config.max_new_tokens, config.temperature, seed=config.seed * 1_000_003 + step, index=mine)
    texts, problems, prompts = whole_turns(tokenizer, [rollout.completion(n) for n in range(len(rows))]), [chosen[i] for i in rows], [asked[i] for i in rows]
    clock.append(time.time())
    rewards, scores = score(problems, texts, rollout.finished.tolist(), run.gsrm, config)
    true = evaluation.true_structure(run.truth, problems, texts)
    adv, scored = advantages(rewards, config)
    parallel.meet(f"scoring step {step + 1}", config.reward_timeout)
    leave()
    clock.append(time.time())
    ref_logp = reference_logp(run.reference, prompts, rollout, config) if run.reference else None
    clock.append(time.time())
    for group in run.optimizer.param_groups:
        group["lr"] = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
    for _ in range(config.updates_per_batch):
        metrics = update(model, ref_logp, run.optimizer, prompts, rollout, adv, scored, config)
    clock.append(time.time())
    table = gather_rows(report.rollout_rows(step + 1, problems, texts, rollout, rewards, scores, adv.tolist(), true, config.group_size))
    metrics = report.log_row(step + 1, table, reward_weights(config), config.group_size) | metrics | {"learning_rate": run.optimizer.param_groups[0]["lr"], "step_time": clock[-1] - clock[0]}
    metrics |= {f"time/{name}": b - a for name, a, b in zip(("sampling", "scoring", "reference", "update"), clock, clock[1:])}
    metrics |= {"time/tokens_per_second": metrics["num_tokens"] / metrics["step_time"], "time/peak_memory_gb": peak_gigabytes(config.device)}
    if run.gsrm:                                          # what scoring cost: like the times, it depends on what the caches already held
        metrics |= {f"time/gsrm/{name}": value for name, value in run.gsrm.stats.items()}
        run.gsrm.stats.clear()
    if said := warnings(metrics, config):
        metrics["warnings"] = said
    return metrics, table, [rollout.completion(n) for n in range(len(rows))]


def measure(run: Run, held_out: list[Problem], path: Path) -> str:
    """Evaluates the student on the first process, the others wait; -> the means in words."""
    with parallel.gathered(run.model):
        return evaluation.before_after(run.model, run.tokenizer, held_out, run.gsrm, run.truth, path, run.config) if held_out and rank() == 0 else ""


def train_on(run: Run, state: dict, out: Path, checkpoints: Checkpoints) -> None:
    """The loop, from the step of `state` to the last. Leave: asked to end, the checkpoint is written. FloatingPointError: nothing finite comes any more."""
    config, done, rewards, shown, track = run.config, state["step"], [], {}, tracker(run.config.log_to, out, run.config)
    faults = Faults(config.max_faults, state.get("faults", 0), state.get("rolled_back", False))

    def save() -> None:
        mean = float(np.mean(rewards)) if rewards else math.nan
        checkpoints.save(run.model, run.tokenizer, run.optimizer, done, reward=None if math.isnan(mean) else mean, faults=faults.in_row, rolled_back=faults.rolled_back)
        rewards.clear()

    with leaving() as leave:
        try:
            for step in range(done, config.steps):
                metrics, table, tokens = step_once(run, step, leave)
                done, saved = step + 1, False
                rewards.append(metrics["reward"])
                if rank() == 0:
                    append_jsonl(out / "rollouts.jsonl", table)
                    append_jsonl(out / "log.jsonl", [metrics])
                    track(metrics)
                    print(report.screen_line(metrics, config.steps, config.beta), flush=True)
                    for name, text in metrics.get("warnings", {}).items():
                        if done - shown.get(name, -20) >= 20:                  # each in log.jsonl every time, on the screen now and then
                            shown[name] = done
                            print(f"  warning: {text}", flush=True)
                    if metrics["nonfinite"]:
                        dump(out, metrics, table, tokens)
                if verdict := faults.verdict(metrics["nonfinite"]):
                    checkpoints.wait()
                    good = newest_of_all(out / "checkpoints")[0]
                    if verdict == "stop" or good is None:
                        raise FloatingPointError(f"{config.max_faults} steps in a row had a loss or gradient that is not finite{', again after going back to a checkpoint' * (verdict == 'stop')}: "
                                                 f"lower --lr, look at {out / 'faults'}, or at the data of those steps")
                    load_checkpoint(good, run.model, run.optimizer)
                    print(f"  {config.max_faults} steps in a row were not finite: parameters and optimiser are those of {good} again; going on with new problems", flush=True)
                if saved := bool(verdict) or done == config.steps or bool(config.save_every and done % config.save_every == 0 and not faults.in_row):
                    save()
                checkpoints.wait(0)
                leave()
        except Leave as asked:
            if done > state["step"] and not saved:
                save()
            checkpoints.wait()
            raise Leave(asked.number, done) from None


def main(config: Config) -> None:
    out, say = Path(config.out), print if rank() == 0 else (lambda *_, **__: None)
    start, passed = start_folder(out, asdict(config), config.resume)
    for why in passed:
        say(f"passed over {why}", flush=True)
    folder(out)
    say("settings that differ from the defaults (all: run.json): " + " ".join(f"--{f.name} {value}" for f in fields(config) if (value := getattr(config, f.name)) != f.default))
    say(f"P x G = {config.problems_per_step} x {config.group_size} = {config.problems_per_step * config.group_size} rollouts a step, {config.steps} steps, {world()} process(es)", flush=True)
    held_out, run = load_data(config)[1], set_up(config, out)
    check_room(run, held_out)
    checkpoints = Checkpoints(out / "checkpoints", config.keep)
    state = load_checkpoint(start, run.model, run.optimizer) if start else {"step": 0}
    if rank() == 0:
        if config.resume:
            cut_logs(out, state["step"])
        files = [data_file(config.data)] + ([data_file(config.eval_data or config.data, "test")] if held_out else [])
        (out / "run.json").write_text(json.dumps(run_record(config, {str(f): file_hash(f) for f in files}, template_hash(run.tokenizer)), indent=1))
    say(f"{len(run.problems)} problems, student {sum(p.numel() for p in run.model.parameters()) / 1e6:.2f}M parameters" + (f", going on from {start}" if start else ""), flush=True)
    if state["step"] == 0 and held_out:
        say(f"evaluating the student before training on {len(held_out)} held-out problems ...", flush=True)
        say(f"before training: {measure(run, held_out, out / 'eval_before.jsonl')}", flush=True)
    train_on(run, state, out, checkpoints)
    checkpoints.wait()
    whole = parallel.whole_state(run.model)
    if rank() == 0:
        save_model(run.model, run.tokenizer, out / "model", whole)
        report.plot([str(out)], out / "curve.png")
    measure(run, held_out, out / "eval_after.jsonl")
    if rank() == 0:
        report.print_end(out)


if __name__ == "__main__":
    parallel.start()
    try:
        with ending():
            main(parse_config())
    except Leave as asked:
        print(asked, file=sys.stderr)
        sys.exit(128 + asked.number)                      # what a shell expects of a process that a signal has ended
    parallel.finish()                                     # only then: after an error the others may hang in a collective, and torchrun ends them
