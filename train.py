"""RLKD: reinforcement learning on following the teacher's reasoning structure (arXiv 2505.16142).

    repeat:  sample G completions for each of P problems                                      rollout.py
             rewards: structure (GSRM), outcome, format                                       reward.py: gsrm.py, grade.py
             advantage = each against the others of its group, then added up by weight        grpo.py
             one step up the clipped policy gradient, held near the start by beta * KL        update.py: grpo.py, logprob.py

    python train.py                                              # the toy: 4 minutes on two CPU cores
    python train.py --w_structure 0 --out out/grpo               # the baseline: GRPO, the same without the structure reward
    torchrun --nproc_per_node 2 train.py --out out/two           # the same update from two processes (FSDP2; several machines: parallel.py)
    python train.py --preset qwen1.5b --dry_run                  # settings, batch, estimated memory and time; nothing is loaded or written (plan.py)
    python train.py --resume auto                                # go on after an interruption, bitwise as if there had been none (CPU)

A run leaves in --out: model/ (Hugging Face checkpoint), log.jsonl (a line a step), rollouts.jsonl (every completion, its steps and rewards), eval_before.jsonl, eval_after.jsonl,
curve.png, run.json (settings, versions, commit, data), gsrm_cache.jsonl, checkpoints/. Left out on purpose: a Trainer class, callbacks, an external sampler, tensor parallelism.
"""
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

import lora
import parallel
import plan
import plots
import report
from checkpoint import Checkpoints, cut_logs, load_checkpoint, newest_of_all, start_folder
from command import ConfigParser, flag, folder, write_record, writing
from data import Problem, Tokenizer, append_jsonl, data_file, load_model, load_problems, load_tokenizer, problem_ids, save_model, whole_turns
from eval import before_after
from gsrm import GSRM
from parallel import gather_rows, rank, world
from reward import advantages, reward_weights, score
from rollout import Sampler, check_head, without_dropout
from scorer import OwnReward, checkpoints_of, load_function, load_gsrm, true_structure
from update import adamw, check_sound, load_teacher, merged, reference_logp, update
from watch import Faults, Leave, dump, leaving, peak_gigabytes, run_record, tracker, training, warnings


@dataclass(frozen=True)
class Config:
    """Flags of `python train.py`; defaults suit 1.5B-7B students. A preset overrides defaults, flags override the preset."""
    preset: str = flag("toy", "none (the defaults shown here), toy, qwen1.5b, paper or paper-zero")
    model: str = flag("", "student: checkpoint folder or hub name")
    data: str = flag("", "problems with teacher traces: JSONL, or a folder with train.jsonl and test.jsonl")
    eval_data: str = flag("", "problems for the tables before and after; empty: test.jsonl of a --data folder, if there is one")
    gsrm: str = flag("", "reward model: checkpoint folder, http://HOST:PORT/v1#MODEL, or module:function, a rule that reads a trace into steps")
    judge: str = flag("", "judge of step pairs: checkpoint folder or http://HOST:PORT/v1#MODEL; empty: what gsrm.json in the folder of --gsrm names, else the same model")
    structure_reward: str = flag("", "module:function that gives the structure reward in place of a GSRM (scorer.OwnReward), for example reward:line_similarity")
    truth: str = flag("", "module:function that reads a trace's true steps where they are known; only measured, never trained on")
    out: str = flag("out/run", "folder that the run writes")
    skip_bad: bool = flag(False, "list malformed lines of the data instead of stopping at one")
    limit: int = flag(0, "train on the first so many problems only (0: all)", "[0, inf)")
    instruction: str | None = flag(None, "text after each problem (default: the tokenizer's own, else 'Please reason step by step ...')")
    w_structure: float = flag(1.0, "weight of the structure reward; 0: plain GRPO; a --gsrm given all the same is loaded, and only scores the evaluations before and after")
    w_outcome: float = flag(1.0, "weight of the outcome reward, 1 for a right final answer")
    w_format: float = flag(0.2, "weight of the format reward, 1 for <think>...</think> and a boxed answer")
    combine: Literal["gdpo", "sum"] = flag("gdpo", "several rewards: gdpo (each normalised in its group, then summed) or sum (the paper's)")
    normalize: bool = flag(True, "structure reward divided by the teacher's number of steps; False: the authors' raw sum")
    stop_at_divergence: bool = flag(True, "structure reward ends where the student leaves the teacher's branch; False: counts every later step that agrees again")
    max_teachers: int = flag(0, "reward only by the first so many teacher traces of a problem (0: all, as evaluations always do)", "[0, inf)")
    steps: int = flag(500, "batches of fresh rollouts; each is followed by updates_per_batch optimiser steps", "[1, inf)")
    problems_per_step: int = flag(16, "P, problems per step over all processes", "[1, inf)")
    group_size: int = flag(8, "G, completions per problem; one alone has nothing to be compared with", "[2, inf)")
    max_new_tokens: int = flag(4096, "completion budget in tokens", "[1, inf)")
    gsrm_max_new_tokens: int = flag(2048, "budget of a written structure in tokens", "[1, inf)")
    temperature: float = flag(1.0, "of sampling, which RL needs, and of the trainer's log-probs", "(0, inf)")
    top_p: float = flag(1.0, "1, the whole distribution: under a cut one the samples' log-probs would not be the trainer's; eval.py has a --top_p", "[1, 1]")
    updates_per_batch: int = flag(1, "optimiser steps on the same rollouts (1 is on-policy)", "[1, inf)")
    scale: Literal["std", "none"] = flag("std", "advantages: std (divide by the group's) or none")
    aggregation: Literal["token", "sequence", "fixed"] = flag("token", "loss per token (DAPO), sequence (GRPO) or fixed length (Dr.GRPO)")
    level: Literal["token", "sequence"] = flag("token", "importance ratio per token or sequence (GSPO)")
    clip_low: float = flag(0.2, "ratio is clipped below 1 - clip_low", "[0, 1)")
    clip_high: float = flag(0.28, "ratio is clipped above 1 + clip_high", "[0, inf)")
    beta: float = flag(1e-3, "weight of the KL to the frozen start; 0 loads no reference model", "[0, inf)")
    kl_kind: Literal["k1", "k2", "k3"] = flag("k3", "k1, k2 or k3 (see grpo.kl)")
    teacher: str = flag("", "teacher model with the student's tokenizer, for on-policy distillation: its exact KL(student || teacher) is added to the loss")
    teacher_kl: float = flag(1.0, "weight of that KL; with --w_structure 0 --w_outcome 0 --w_format 0 there is nothing else", "[0, inf)")
    lr: float = flag(1e-6, "learning rate (AdamW), constant after the warm-up", "(0, inf)")
    warmup_steps: int = flag(0, "steps in which the rate climbs", "[0, inf)")
    weight_decay: float = flag(0.0, "AdamW's", "[0, inf)")
    adam_beta2: float = flag(0.999, "AdamW's second beta", "[0, 1)")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", "(0, inf)")
    max_tokens: int = flag(16384, "padded tokens per micro-batch; no effect on the update", "[1, inf)")
    cache_gb: float = flag(plan.CACHE_GB, "memory for the keys and values of rows sampled together, of the student as of the reward model; no effect on the samples", "(0, inf)")
    eval_problems: int = flag(64, "evaluation problems (the first so many; 0: no evaluation)", "[0, inf)")
    eval_k: int = flag(8, "samples per evaluation problem", "[1, inf)")
    save_every: int = flag(50, "steps between checkpoints (0: only at the end)", "[0, inf)")
    keep: int = flag(2, "checkpoints kept: the last so many, and the one with the best reward", "[1, inf)")
    resume: Literal["", "auto"] = flag("", "auto: go on from the newest whole checkpoint in --out")
    seed: int = flag(0, "everything random follows from it", f"[0, {2**63 // 1_000_003})")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "what the models compute in: float32, or bfloat16 (the student's masters, gradients and moments stay float32)")
    gradient_checkpointing: bool = flag(False, "recompute each layer in the backward pass instead of holding its activations")
    offload: bool = flag(False, "the student's masters, gradients and moments rest in CPU memory (for cards of 24-40 GB; slower)")
    lora_rank: int = flag(0, "train adapters of this rank beside the frozen weights (pip install peft; wants a higher --lr); 0: full fine-tuning", "[0, inf)")
    lora_alpha: int = flag(32, "adapters are scaled by alpha / rank", "[1, inf)")
    lora_targets: str = flag("all-linear", "layers with adapters: all-linear, or names such as q_proj,v_proj; never the head")
    reward_timeout: float = flag(1800.0, "seconds that processes wait for one another's rewards", "[1, inf)")
    max_faults: int = flag(3, "steps in a row that are not finite: back to the last good checkpoint (broken weights: at once), then the end; or without a score", "[1, inf)")
    warn_entropy: float = flag(0.02, "warn below so many nats a token")
    warn_truncated: float = flag(0.8, "warn above this share of cut-off completions")
    warn_spreadless: float = flag(0.8, "warn above this share of groups with equal rewards")
    warn_ratio: float = flag(1.0, "warn above this difference of sampler and trainer on a token, nats (looked at with --updates_per_batch 1 only)")
    warn_unscored: float = flag(0.1, "warn above this share of completions without a reward")
    log_to: Literal["", "wandb", "trackio", "tensorboard"] = flag("", "wandb, trackio or tensorboard, besides log.jsonl")
    dry_run: bool = flag(False, "print the settings, the batch, an estimate of memory and time (plan.py), and end")
    gpu_memory_gb: float = flag(80.0, "of the card that --dry_run plans for", "(0, inf)")


PRESETS: dict[str, dict] = {
    "none": {},
    "toy": dict(model="toy/student", data="toy", gsrm="toy/gsrm", truth="toy:read", out="out/toy", steps=240, problems_per_step=8, max_new_tokens=150,
                gsrm_max_new_tokens=200, w_outcome=0.25, beta=0.01, lr=3e-4, warmup_steps=5, adam_beta2=0.99, device="cpu"),
    # The defaults on one 80 GB card: 4 epochs of 3.2K problems. The model has 4096 positions, for prompt and completion together. Needs --data and --gsrm.
    "qwen1.5b": dict(model="Qwen/Qwen2.5-Math-1.5B", out="out/qwen1.5b", steps=200, problems_per_step=64, max_new_tokens=3072, dtype="bfloat16", gradient_checkpointing=True),
}
# The paper's released code: one epoch of 3.2K problems. Its fourth reward, the tag count (weight 10 beside 15:15:10), is not there. Needs --data and --gsrm, and several cards.
PRESETS["paper"] = dict(model="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", out="out/paper", steps=400, warmup_steps=40, problems_per_step=8, group_size=4, w_outcome=15.0,
                        w_structure=15.0, w_format=10.0, combine="sum", normalize=False, aggregation="sequence", lr=5e-5, max_grad_norm=0.2, beta=0.04, clip_low=0.2,
                        clip_high=0.2, temperature=0.7, max_new_tokens=4096, dtype="bfloat16", gradient_checkpointing=True)
PRESETS["paper-zero"] = PRESETS["paper"] | dict(model="Qwen/Qwen2.5-Math-7B", out="out/paper-zero", max_new_tokens=3072)        # "RLKD-Zero"; of 4096 positions

# ------------------------------------------------------------------------------------------------ the run

def cursor(count: int, take: int, seed: int, step: int) -> list[int]:
    """Indices of step `step`'s problems: epochs of all `count` problems, each in an order of its own; a function of (seed, step), so resume needs no state."""
    places = range(step * take, (step + 1) * take)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in {i // count for i in places}}
    return [int(orders[i // count][i % count]) for i in places]


def parse_config(argv: list[str] | None = None) -> Config:
    """Config from defaults, then the preset, then flags. An unknown flag, preset or value ends the program with a line that says so."""
    parser = ConfigParser(Config, description=__doc__.split("\n")[0], allow_abbrev=False)
    if ("--preset", "paper-gsrm") in zip(words := sys.argv if argv is None else argv, words[1:]):
        parser.error("--preset paper-gsrm trains the reward model, not the student: python sft.py --preset paper-gsrm (with --dry_run for its plan)")
    c = Config(**parser.parse_with(PRESETS, argv))
    if f := next((f for f in fields(c) if f.name in ("model", "data") and not getattr(c, f.name) and not (c.dry_run and c.model)), None):
        parser.error(f"--{f.name} is needed{f' by --preset {c.preset}' * (c.preset != 'none')}: {f.metadata['help']}")
    checks = {"problems_per_step": (c.problems_per_step >= world(), f"each of the {world()} processes needs at least one problem a step"),
              "w_structure": (any((c.w_structure, c.w_outcome, c.w_format, c.teacher and c.teacher_kl)), "at least one reward needs a weight other than 0 (or a --teacher)"),
              "gsrm": (c.gsrm or c.structure_reward or c.dry_run or not c.w_structure, "the structure reward needs a reward model; give one, or --w_structure 0"),
              "judge": (not c.judge or c.gsrm and not c.structure_reward, "there are no steps for it to judge; give a --gsrm (and no --structure_reward), or leave it out"),
              "log_to": (not c.log_to or importlib.util.find_spec(c.log_to), f"pip install {c.log_to}, or leave the flag out (log.jsonl has every figure)")}
    if wrong := next((name for name, (fine, _) in checks.items() if not fine), None):
        parser.error(f"--{wrong} {getattr(c, wrong)}: {checks[wrong][1]}")
    return c


def data_files(config: Config) -> list[Path]:
    """Where the problems come from: the training file and, if there is one, that of the evaluation."""
    return [data_file(config.data)] + ([data_file(config.eval_data or config.data, "test")] if config.eval_data or (Path(config.data) / "test.jsonl").is_file() else [])


def load_data(config: Config) -> tuple[list[Problem], list[Problem]]:
    """(training, evaluation) problems."""
    problems = load_problems(config.data, "train", config.skip_bad)[:config.limit or None]
    if config.w_structure and (bare := [p.id for p in problems if not p.teachers]):
        raise ValueError(f"{config.data}: {len(bare)} problems have no teacher trace (first: {bare[0]}), so their structure cannot be rewarded: drop them, or use --w_structure 0")
    return problems, [p for file in data_files(config)[1:] for p in load_problems(file, "test", config.skip_bad)][:config.eval_problems]


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
    held_out: list[Problem] = field(default_factory=list)
    teacher: PreTrainedModel | None = None


def set_up(config: Config, out: Path) -> Run:
    """Models, sampler, reward model and optimiser at the start of a run."""
    torch.manual_seed(config.seed)
    problems, held_out = load_data(config)
    parallel.use_device(config.device)
    sharded = world() > 1 or config.offload or config.dtype != "float32" and not config.lora_rank
    place = "cpu" if sharded else config.device              # parallel.shard moves a model to its card layer by layer: the whole may not fit there
    ready = lambda net: parallel.shard(net, config.dtype, config.offload, config.device) if sharded else net
    model, tokenizer = load_model(config.model, place, config.dtype if config.lora_rank else "float32")               # what is frozen needs no float32 masters
    check_head(model)
    without_dropout(model)
    if config.lora_rank:
        lora.add_adapters(model, config.lora_rank, config.lora_alpha, config.lora_targets, config.model)
    if config.gradient_checkpointing:
        parallel.recompute(model)
    ready(model)
    reference = None if not config.beta else model if config.lora_rank else ready(load_model(config.model, place, config.dtype)[0].requires_grad_(False))
    teacher = ready(load_teacher(config.teacher, tokenizer, place, config.dtype)) if config.teacher else None
    with parallel.gathered(model) as whole:
        sampler = plan.sampler_of(whole, tokenizer, config.cache_gb, config.dtype)
    optimizer = adamw(model, (0.9, config.adam_beta2), config.weight_decay, config.lr)
    gsrm = OwnReward(config.structure_reward) if config.structure_reward else None if not config.gsrm else load_gsrm(
        config.gsrm, config.judge, out / "gsrm_cache.jsonl", config.device, config.gsrm_max_new_tokens, config.normalize, config.dtype, config.cache_gb, config.stop_at_divergence)
    return Run(config, problems, model, tokenizer, reference, optimizer, sampler, gsrm, load_function(config.truth) if config.truth else None, held_out, teacher)


def step_once(run: Run, step: int, leave: Callable[[], None] = lambda: None) -> tuple[dict[str, float], list[dict], list[list[int]]]:
    """One training step: (metrics, rows for rollouts.jsonl, of all processes; this process's completions). `leave` may raise as long as nothing has moved."""
    config, model, tokenizer, clock = run.config, run.model, run.tokenizer, [time.time()]
    mine = list(range(rank(), config.problems_per_step, world()))                                             # places in the step's list, dealt out
    chosen = [run.problems[i] for i in cursor(len(run.problems), config.problems_per_step, config.seed, step)]
    asked = {i: problem_ids(tokenizer, chosen[i], config.instruction) for i in mine}
    rows = [i for i in mine for _ in range(config.group_size)]
    with parallel.gathered(model) as run.sampler.model:
        rollout = run.sampler.generate([asked[i] for i in mine], config.group_size, config.max_new_tokens, config.temperature, seed=config.seed * 1_000_003 + step, index=mine)
    texts, problems, prompts = whole_turns(tokenizer, [rollout.completion(n) for n in range(len(rows))]), [chosen[i] for i in rows], [asked[i] for i in rows]
    clock.append(time.time())
    getattr(run.gsrm, "stats", {}).clear()                # time/gsrm/*, below, are of this step alone
    rewards, scores = score(problems, texts, rollout.finished.tolist(), run.gsrm, config)
    adv, scored = advantages(rewards, config)
    true = true_structure(run.truth, problems, texts)
    parallel.meet(f"scoring step {step + 1}", config.reward_timeout)
    leave()
    clock.append(time.time())
    with lora.adapters_off(model):
        ref_logp = reference_logp(run.reference, prompts, rollout, config) if run.reference else None
    clock.append(time.time())
    for group in run.optimizer.param_groups:
        group["lr"] = rate = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
    old_logp = torch.full_like(rollout.logp, torch.nan)   # the first update fills it in, the others compare with it
    metrics = merged([update(model, ref_logp, run.optimizer, prompts, rollout, adv, scored, config, run.teacher, old_logp) for _ in range(config.updates_per_batch)])
    clock.append(time.time())
    table = gather_rows(report.rollout_rows(step + 1, problems, texts, rollout, rewards, scores, adv.tolist(), true, config.group_size))
    metrics = report.log_row(step + 1, table, reward_weights(config), config.group_size) | metrics | {"learning_rate": rate, "step_time": clock[-1] - clock[0]}
    metrics |= {f"time/{name}": b - a for name, a, b in zip(("sampling", "scoring", "reference", "update"), clock, clock[1:])}
    metrics |= {"time/tokens_per_second": metrics["num_tokens"] / metrics["step_time"], "time/peak_memory_gb": peak_gigabytes(config.device)}
    metrics["num_tokens"] += int(parallel.all_sum(torch.tensor(sum(map(len, prompts)))))
    metrics |= {f"time/gsrm/{name}": value for name, value in parallel.added_up(getattr(run.gsrm, "stats", {})).items()}        # seconds, too; caches may have had some
    metrics |= {"warnings": said} if (said := warnings(metrics, config)) else {}
    return metrics, table, [rollout.completion(n) for n in range(len(rows))]


def measure(run: Run, path: Path) -> str:
    """Evaluates the student on the held-out problems, on the first process; the others wait. -> the means in words."""
    with parallel.gathered(run.model) as model:
        return before_after(model, run.tokenizer, run.held_out, run.gsrm, run.truth, path, run.config) if rank() == 0 else ""


def train_on(run: Run, state: dict, out: Path, checkpoints: Checkpoints) -> None:
    """The loop, from the step of `state` to the last. Leave: asked to end, the checkpoint is written. FloatingPointError, ConnectionError: nothing finite, no reward comes."""
    config, done, rewards, shown, idle, track = run.config, state["step"], [], {}, 0, tracker(run.config.log_to, out, run.config)
    faults, seen = Faults(config.max_faults, state.get("faults", 0), state.get("rolled_back", False)), state.get("num_tokens", 0)

    def save() -> None:
        checkpoints.save(run.model, run.tokenizer, run.optimizer, done, reward=float(np.mean(rewards)) if rewards else None, num_tokens=seen, **faults.notes())
        rewards.clear()

    with leaving() as leave:
        try:
            for step in range(done, config.steps):
                metrics, table, tokens = step_once(run, step, leave)
                done, saved, idle = step + 1, False, idle + 1 if metrics["unscored"] == config.problems_per_step * config.group_size else 0
                metrics["num_tokens"] = seen = seen + metrics["num_tokens"]                    # TRL's: all that the run has seen
                rewards.extend([metrics["reward"]] * math.isfinite(metrics["reward"]))          # a step without a scored row has none
                if rank() == 0:
                    append_jsonl(out / "rollouts.jsonl", table)
                    append_jsonl(out / "log.jsonl", [report.log_line(metrics)])
                    track(metrics)
                    print(report.screen_line(metrics, config.steps, config.beta), flush=True)
                    for name, text in metrics.get("warnings", {}).items():
                        if done - shown.get(name, -20) >= 20:                  # each in log.jsonl every time, on the screen now and then
                            shown[name] = done
                            print(f"  warning: {text}", flush=True)
                    if metrics["nonfinite"]:
                        dump(out, metrics, table, tokens)
                if verdict := faults.verdict(metrics["nonfinite"], metrics["nonfinite_weights"]):
                    checkpoints.wait()
                    good = newest_of_all(out / "checkpoints")[0]
                    if verdict == "stop" or good is None:
                        raise FloatingPointError(faults.why + ", again after going back to a checkpoint" * (verdict == "stop")
                                                 + f": lower --lr, look at {out / 'faults'}, or at the data of those steps")
                    load_checkpoint(good, run.model, run.optimizer)
                    if rank() == 0:
                        print(f"  {faults.why}: parameters and optimiser are those of {good} again" + "; going on with new problems" * (done < config.steps), flush=True)
                if saved := bool(verdict) or idle == config.max_faults or done == config.steps or bool(config.save_every and done % config.save_every == 0 and not faults.in_row):
                    save()
                checkpoints.wait(0 if done < config.steps else None)               # of the last step while signals are still noted
                leave()
                if idle == config.max_faults:
                    checkpoints.wait()
                    raise ConnectionError(f"no completion of {idle} steps in a row could be scored (why: time/gsrm/* in {out / 'log.jsonl'}); mend that, then --resume auto")
        except Leave as asked:
            if done > state["step"] and not saved:
                save()
            checkpoints.wait()
            raise Leave(asked.number, done) from None


def main(config: Config) -> None:
    readers = checkpoints_of("" if config.structure_reward else config.gsrm, config.judge)
    if config.dry_run:
        return plan.show(config, readers, world()) if rank() == 0 else None
    say = print if rank() == 0 else (lambda *_, **__: None)
    record = run_record(config, data_files(config)[:1 + bool(config.eval_problems)], load_tokenizer(config.model), [config.model, config.teacher, *readers])
    with writing(folder(config.out), rank() == 0) as out:
        start, passed = start_folder(out, record, config.resume)
        say("".join(f"passed over {why}\n" for why in passed), end="", flush=True)
        say("settings that differ from the defaults (all: run.json): " + " ".join(f"--{f.name} {value}" for f in fields(config) if (value := getattr(config, f.name)) != f.default)
            + (hint := "\n(the toy's: for another model --preset qwen1.5b, or none)" * (config.preset == "toy")) * (own := not Path(config.model, "tiktoken.json").is_file())
            + f"\n{config.problems_per_step} problems x {config.group_size} samples a step, {config.steps} steps, {world()} processes", flush=True)
        run = set_up(config, out)
        plan.check_room(run.tokenizer, [*run.problems, *run.held_out], config.instruction, config.max_new_tokens, run.sampler.max_positions)
        checkpoints = Checkpoints(out / "checkpoints", config.keep)
        state = load_checkpoint(start, run.model, run.optimizer) if start else {"step": 0}
        if rank() == 0:
            cut_logs(out, state["step"], config.steps)        # a new run has none
            write_record(out / "run.json", record)
        total, trained = (sum(p.numel() for p in ps) / 1e6 for ps in (run.model.parameters(), run.optimizer.param_groups[0]["params"]))
        say(f"{len(run.problems)} problems, student {total:.2f}M parameters" + f", {trained:.2f}M trained" * (trained < total)
            + f", going on from {start}" * bool(start) + hint.replace("another model", "other problems") * (not own and any(p.domain != "toy" for p in run.problems)), flush=True)
        if state["step"] == 0 and run.held_out:
            say(f"evaluating the student before training on {len(run.held_out)} held-out problems ...", flush=True)
            say(f"before training: {measure(run, out / 'eval_before.jsonl')}", flush=True)
        train_on(run, state, out, checkpoints)
        whole = parallel.whole_state(check_sound(run.model))
        if rank() == 0:
            lora.save_merged(run.model, run.tokenizer, out / "model", whole, out / "adapter") if config.lora_rank else save_model(run.model, run.tokenizer, out / "model", whole)
            if (out / "log.jsonl").exists():                   # somebody has moved it, and nothing was left to train
                plots.plot([str(out)], out / "curve.png")
        if run.held_out:
            measure(run, out / "eval_after.jsonl")
        if rank() == 0:
            report.print_end(out)


if __name__ == "__main__":
    training(main, parse_config)
