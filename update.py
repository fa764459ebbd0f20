"""One update of the policy: rollouts and their advantages in, one step of the optimiser out.

    loss = sum over the step's tokens of (clipped policy term + beta * KL) / denominator            grpo.py says which terms and which denominator
           + teacher_kl * KL(student || teacher model) / denominator                                on-policy distillation, exact over the vocabulary

The denominator is that of all rows of all processes, so a micro-batch adds its plain share, gradients are sums, and the update depends neither on how the
rows were cut nor on how they were dealt out. The log-probs are made inside the head's matmul (logprob.py), [N, V] logits are never held.
A loss or a gradient that is not finite moves nothing, on any process: the step is skipped and reported. Weights that the optimiser itself has
made infinite are reported, and train.py goes back to its last checkpoint.
"""
import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from transformers import PreTrainedModel

from data import Tokenizer, load_model
from grpo import denominator, grpo_loss
from logprob import linear_kl, linear_logprob, linear_policy_loss
from parallel import all_max, all_sum, finite, inside, plain, world
from rollout import Rollout, check_head, few_logits, micro_batches, predictors


class Settings(Protocol):
    """What an update reads of train.Config."""
    temperature: float
    aggregation: str
    level: str
    clip_low: float
    clip_high: float
    beta: float
    kl_kind: str
    teacher_kl: float
    max_new_tokens: int
    max_tokens: int
    max_grad_norm: float


def even(pieces: list[list[int]]) -> list[list[int]]:
    """As many micro-batches as the process with the most has: a sharded forward is a collective. An empty one is run on row 0 and counts for nothing."""
    return pieces + [[]] * (int(all_max(len(pieces))) - len(pieces))


def adamw(model: PreTrainedModel, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0, lr: float = 1e-3) -> torch.optim.AdamW:
    """The optimiser of what is trained; ValueError where that is not float32: an update of less than 1/256 of a bfloat16 weight would be rounded away."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if coarse := {p.dtype for p in parameters} - {torch.float32}:
        raise ValueError(f"the weights to be trained are {coarse.pop()}: load them in float32, and let parallel.shard compute in another dtype")
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=parameters[0].device.type == "cuda" or None)      # fused needs no scratch


@torch.no_grad()
def reference_logp(model: PreTrainedModel, prompts: list[list[int]], rollout: Rollout, config: Settings) -> torch.Tensor:
    """(N, T) float32: log-prob of each sampled token under `model`, 0 behind a row's end."""
    out = torch.zeros_like(rollout.logp)
    for rows in even(micro_batches([len(p) + int(n) for p, n in zip(prompts, rollout.lengths)], config.max_tokens)):
        def logp_of(rows: list[int] = rows or [0]) -> torch.Tensor:
            hidden, targets = predictors(model, [prompts[n] for n in rows], [rollout.completion(n) for n in rows])
            return linear_logprob(hidden, model.get_output_embeddings().weight, targets, config.temperature)[0]
        logp = inside(model, logp_of)
        if rows:
            out[rows] = torch.zeros_like(out[rows]).masked_scatter(rollout.mask[rows], logp)
    return out


def load_teacher(path: str, tokenizer: Tokenizer, device: str, dtype: str) -> PreTrainedModel:
    """The frozen teacher model of on-policy distillation; ValueError where its tokens are not the student's."""
    teacher, other = load_model(path, device, dtype)
    tokens = lambda t: t.get_vocab() if hasattr(t, "get_vocab") else (t.spec["words"], t.spec["special"])
    if tokens(other) != tokens(tokenizer):
        raise ValueError(f"--teacher {path}: its tokenizer is not the student's, so their probabilities cannot be compared; choose a model of the same family, or use its traces")
    check_head(teacher)
    return teacher.requires_grad_(False)


@torch.no_grad()
def teacher_view(teacher: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden (tokens, D2), head (V2, D2)) of a teacher model on the student's tokens, for the exact KL."""
    return inside(teacher, lambda: (predictors(teacher, prompts, completions)[0], teacher.get_output_embeddings().weight))


def micro_loss(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]], per_token: dict[str, torch.Tensor], config: Settings,
               tally: Callable[[dict[str, torch.Tensor]], None], teacher: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss share of one micro-batch, and the tokens' log-probs. per_token: old_logp (NaN: those very log-probs), sampler_logp, advantages, denominator and perhaps
    ref_logp, (tokens,) in row order, as `predictors` gives them; teacher: its teacher_view. The policy's loss is evaluated inside the head's matmul (linear_policy_loss,
    three matmuls instead of four) unless it couples the tokens of a row (level sequence). Heads of one tokenizer may be padded to different lengths: the KL is over the
    rows that both have."""
    head, T = model.get_output_embeddings().weight, config.temperature
    hidden, targets = predictors(model, prompts, completions)                          # (tokens, D), (tokens,)
    keep = torch.arange(max(map(len, completions))) < torch.tensor([[len(c)] for c in completions])                    # (n, T)
    keep = (keep if config.level == "sequence" else torch.ones(len(targets), dtype=torch.bool)).to(targets.device)

    def loss_of(logp: torch.Tensor, rows: slice) -> torch.Tensor:
        lay = lambda x: x[rows] if keep.ndim == 1 else x.new_zeros(keep.shape).masked_scatter(keep, x)
        x, logp = {name: lay(value) for name, value in per_token.items()}, logp if keep.ndim == 1 else lay(logp)
        old = torch.where(x["old_logp"].isnan(), logp.detach(), x["old_logp"])
        loss, sums = grpo_loss(logp, old, x.get("ref_logp"), x["advantages"], keep[rows], x["denominator"].clamp_min(1), clip_low=config.clip_low, clip_high=config.clip_high,
                               beta=config.beta, kl_kind=config.kl_kind, level=config.level, sampler_logp=x["sampler_logp"])
        tally(sums)
        return loss

    if config.level == "sequence":
        loss = loss_of(logp := linear_logprob(hidden, head, targets, T)[0], slice(None))
    else:
        loss, logp = linear_policy_loss(hidden, head, targets, T, loss_of)
    if teacher:
        V = min(len(head), len(teacher[1]))
        token_kl = linear_kl(hidden, head[:V], teacher[0], teacher[1][:V], T)                                         # (tokens,)
        tally({"teacher_kl": token_kl.detach().sum()})
        loss = loss + config.teacher_kl * (token_kl / per_token["denominator"].clamp_min(1)).sum()
    return loss, logp.detach()


def update(model: PreTrainedModel, ref_logp: torch.Tensor | None, optimizer: torch.optim.Optimizer, prompts: list[list[int]], rollout: Rollout,
           adv: torch.Tensor, scored: torch.Tensor, config: Settings, teacher: PreTrainedModel | None = None, old_logp: torch.Tensor | None = None) -> dict[str, float]:
    """One optimiser step on all processes' rollouts: (N,) advantages and bool `scored`, (N, T) ref_logp, a frozen `teacher` or none; metrics are means over
    tokens, reduced once: entropy and clip ratios over those of all scored rows, the others over those of rows that have a gradient.
    old_logp, (N, T): what the ratio compares with. NaNs in it are replaced in place by the log-probs of this pass, with which later updates on the same rollouts then compare
    (not with the sampler's, which rounds differently: in bfloat16 by more than GSPO's clip). None: the sampler's."""
    model.train()
    mask = rollout.mask & scored.to(rollout.mask.device)[:, None]                       # (N, T); an unscored row is not there
    denom = denominator(mask.cpu(), config.aggregation, config.max_new_tokens, all_sum)                      # (N,), over the whole step
    used = [n for n, there in enumerate(mask.any(1).tolist()) if there and (adv[n] != 0 or config.beta or (teacher and config.teacher_kl))]      # the others have gradient 0
    old = rollout.logp if old_logp is None else old_logp
    total = 0.0 if rollout.logp.isfinite().all() else math.nan                          # a broken student's groups may be spread-less: no loss below would tell
    sums = {"entropy": float(rollout.entropy[mask].sum()), "scored_tokens": float(mask.sum())}
    sums |= dict.fromkeys(["kl"] * (ref_logp is not None) + ["teacher_kl"] * bool(teacher), 0.0)                   # not measured is not 0

    def tally(part: dict[str, torch.Tensor]) -> None:
        for name, value in part.items():
            sums[name] = max(sums.get(name, 0.0), float(value)) if name.endswith("/max") else sums.get(name, 0.0) + float(value)

    for piece in even(micro_batches([len(prompts[n]) + int(rollout.lengths[n]) for n in used], config.max_tokens)):
        rows = [used[i] for i in piece] or [0]
        valid, repeat = rollout.mask[rows], lambda x, rows=rows: x[rows].to(rollout.logp.device).repeat_interleave(rollout.lengths[rows])
        per_token = {"old_logp": old[rows][valid], "sampler_logp": rollout.logp[rows][valid], "advantages": repeat(adv), "denominator": repeat(denom)}
        if ref_logp is not None:
            per_token["ref_logp"] = ref_logp[rows][valid]
        tokens = [prompts[n] for n in rows], [rollout.completion(n) for n in rows]
        if not piece:
            per_token["advantages"] = torch.zeros_like(per_token["advantages"])         # this pass is there for the collectives only: advantages of 0 keep NaN out of it
        seen = teacher_view(teacher, *tokens) if teacher else None
        loss, logp = inside(model, partial(micro_loss, model, *tokens, per_token, config, tally if piece else lambda part: None, seen))
        (loss * bool(piece) * world()).backward()                                       # FSDP2 averages over processes, shares are to be summed
        total += loss.item() * bool(piece)
        if old_logp is not None and piece:
            old_logp[rows] = old_logp[rows].masked_scatter(valid, torch.where(per_token["old_logp"].isnan(), logp, per_token["old_logp"]))
    return apply_gradient(model, optimizer, total, sums, config.max_grad_norm)


@torch.no_grad()
def check_sound(model: PreTrainedModel) -> PreTrainedModel:
    """FloatingPointError where the model's logits are not finite, as after a far too high rate, though its weights may be; else -> the model. A collective."""
    if not inside(model, lambda: few_logits(model)[1]).isfinite().all():
        raise FloatingPointError("the student's weights are finite, its logits are not, so no model is written: lower --lr and start again; earlier checkpoints, if there "
                                 "are any, can be exported (python checkpoint.py --help)")
    return model


def merged(updates: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of all updates on the same rollouts as one row: means, but the largest of a /max and of "nonfinite" and "nonfinite_weights"."""
    mean = lambda values: sum(values) / len(values)
    return {name: (max if name.endswith("/max") or name.startswith("nonfinite") else mean)([m[name] for m in updates]) for name in updates[0]}


def apply_gradient(model: PreTrainedModel, optimizer: torch.optim.Optimizer, loss: float, sums: dict[str, float], max_grad_norm: float) -> dict[str, float]:
    """Sums the metrics over processes, clips the gradient, steps; -> mean metrics. "nonfinite" is 1 where loss or gradient was not finite,
    or the weights are not now; "nonfinite_weights" is 1 where they are not. A mean over no token is NaN."""
    names = ["tokens", "scored_tokens", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean",
             "sampling/importance_sampling_ratio/mean", *(name for name in ("kl", "teacher_kl") if name in sums)]
    total, *values = all_sum(torch.tensor([loss] + [sums.get(name, 0.0) for name in names], dtype=torch.float64)).tolist()
    means = dict(zip(names, values))
    largest = {name: all_max(sums.get(name, 0.0)) for name in ("sampling/sampling_logp_difference/max", "sampling/importance_sampling_ratio/max")}
    norm = float(plain(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)))
    tokens, scored_tokens = means.pop("tokens"), means.pop("scored_tokens")                # of rows with a gradient; of all scored rows
    sound = math.isfinite(norm) and math.isfinite(total)
    stepped = sound and tokens > 0                         # AdamW moves on its momentum even where every group was spread-less
    if stepped:
        optimizer.step()
    optimizer.zero_grad()
    broken = stepped and not finite(model)                  # the optimiser's own arithmetic: a learning rate far too high, moments that have overflowed
    count = lambda name: scored_tokens if name.startswith(("entropy", "clip_ratio")) else tokens
    means = {name: value / count(name) if count(name) else math.nan for name, value in means.items()}
    return {"loss": total, **means, **largest, "grad_norm": norm, "skipped_step": float(not stepped), "nonfinite": float(not sound or broken), "nonfinite_weights": float(broken)}
