"""
GRPO: rewards of a group of completions -> advantages -> a clipped policy loss. Pure functions of tensors, nothing else.

    A_i      = (r_i - mean r) / std r            over the scored rows of row i's group; scale="none" does not divide
    ratio_it = exp(logp_it - old_logp_it)        old: before the first update on these rollouts; level="token";  level="sequence" (GSPO): exp of the row's mean over t
    term_it  = -min(ratio_it A_i, clip(ratio_it, 1 - clip_low, 1 + clip_high) A_i)
    loss     = sum_it mask_it (term_it + beta kl_it) / denominator_i

denominator_i is computed once, over all rows of all ranks of an optimiser step; every micro-batch then adds its plain share:

    token     all tokens of the step         (DAPO)
    sequence  length_i * rows of the step    (GRPO)
    fixed     rows of the step * max_length  (Dr.GRPO)

so the gradient cannot depend on micro-batch, accumulation or world size. Dimension letters: P problems, G group, N = P*G rows,
T tokens; index t describes token t; masks come from lengths. `python -m pytest tests/test_grpo.py` checks it all against closed forms.

Left out on purpose: a value model; an epsilon under the std (see group_advantages); entropy bonus and dual clip; importance weights for
a foreign sampler (ours samples from the module it trains); GDPO's last step, a normalisation over the batch (it would make a problem's
gradient depend on which other problems were drawn).
"""
from collections.abc import Callable

import torch
from torch import Tensor

# The family by four switches: arguments of group_advantages (scale), denominator (how), grpo_loss (clip pair, level).
VARIANTS: dict[str, dict[str, str | float]] = {
    "grpo": {"scale": "std", "how": "sequence", "clip_low": 0.2, "clip_high": 0.2, "level": "token"},        # arXiv 2402.03300, eq. 3
    "dapo": {"scale": "std", "how": "token", "clip_low": 0.2, "clip_high": 0.28, "level": "token"},          # arXiv 2503.14476, eq. 8
    "dr_grpo": {"scale": "none", "how": "fixed", "clip_low": 0.2, "clip_high": 0.2, "level": "token"},       # arXiv 2503.20783, section 3.2
    "gspo": {"scale": "std", "how": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "level": "sequence"},   # arXiv 2507.18071, eq. 5 and 7
}


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(allowed)}")


# ---- advantages: (P, G) rewards -> (P, G)

def group_advantages(rewards: Tensor, scored: Tensor, scale: str = "std", min_spread: float = 1e-6) -> Tensor:
    """(P, G) rewards and bool `scored` -> (P, G) float32: reward minus the mean over the scored rows of its group, over their population std.
    Exactly 0 for an unscored row (whatever stands in it), a group with a spread (max - min) <= min_spread or with fewer than 2 scored rows."""
    _one_of("scale", scale, ("std", "none"))
    if rewards.ndim != 2 or rewards.shape != scored.shape or scored.dtype != torch.bool:
        raise ValueError(f"rewards and a bool scored must both be (P, G), got {tuple(rewards.shape)} and {tuple(scored.shape)} {scored.dtype}")
    if rewards.shape[1] < 2:
        raise ValueError("a group of 1 has no mean to compare with: set group_size to 2 or more")
    if not rewards[scored].isfinite().all():
        raise ValueError("a scored row holds NaN or inf: mark it unscored, or mend the reward function")
    n = scored.sum(1, keepdim=True)                                  # (P, 1) scored rows of each group
    r = torch.where(scored, rewards.double(), 0.0)                   # float64: rewards near 1e6 keep their differences
    centred = torch.where(scored, r - r.sum(1, keepdim=True) / n, 0.0)
    spread = r.masked_fill(~scored, -torch.inf).amax(1, keepdim=True) - r.masked_fill(~scored, torch.inf).amin(1, keepdim=True)
    if scale == "std":
        # Two passes, population form, and no epsilon: the spread test guards the division. n numbers with mean 0 and mean square 1 obey
        # |A| <= sqrt(n - 1): with one at a, the others sum to -a, so n >= a^2 + a^2 / (n - 1). An epsilon would only bend small spreads.
        centred = centred / (centred.square().sum(1, keepdim=True) / n).sqrt()
    return torch.where(scored & (spread > min_spread), centred, 0.0).float()


def _weighted(rewards: dict[str, Tensor], weights: dict[str, float]) -> dict[str, float]:
    used = {name: w for name, w in weights.items() if w != 0}
    if not used:
        raise ValueError("every reward weight is 0: give at least one reward a weight")
    if set(used) - set(rewards) or set(rewards) - set(weights):
        raise ValueError(f"rewards {sorted(rewards)}, weights {sorted(weights)}: give each reward a weight (0 ignores it) and each non-zero weight a reward")
    if len({rewards[name].shape for name in used}) > 1:
        raise ValueError(f"the rewards {sorted(used)} differ in shape: make all of them (P, G)")
    return used


def scored_rows(rewards: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """(P, G) bool: rows that every reward with a weight could score. NaN in a reward tensor stands for None, "could not be scored"."""
    return torch.stack([~rewards[name].isnan() for name in _weighted(rewards, weights)]).all(0)


def combine_advantages(rewards: dict[str, Tensor], weights: dict[str, float], scored: Tensor, how: str = "sum", scale: str = "std") -> Tensor:
    """(P, G) advantages of several rewards: "sum" = of their weighted sum (RLKD paper); "gdpo" = weighted sum of each one's own advantages
    (arXiv 2601.05242), so none drowns the rest. Weight 0 ignores a reward; a row unscored in one weighted reward is left out of all."""
    _one_of("how", how, ("sum", "gdpo"))
    used, known = _weighted(rewards, weights), scored_rows(rewards, weights)
    if scored.shape != known.shape:
        raise ValueError(f"scored is {tuple(scored.shape)}, the rewards are {tuple(known.shape)}: both must be (P, G)")
    scored = scored & known
    if how == "sum":
        return group_advantages(sum(w * rewards[name].double() for name, w in used.items()), scored, scale)
    return sum(w * group_advantages(rewards[name], scored, scale) for name, w in used.items())


# ---- the loss: (N, T) padded rows, or (n,) valid tokens in one flat vector

def _same_tokens(logp: Tensor, ref_logp: Tensor) -> None:
    if logp.shape != ref_logp.shape:
        raise ValueError(f"ref_logp is {tuple(ref_logp.shape)}, logp is {tuple(logp.shape)}: score the same tokens with both models")


def kl(logp: Tensor, ref_logp: Tensor, kind: str = "k3") -> Tensor:
    """Per-token estimate of KL(policy || ref) on samples of the policy (joschu.net/blog/kl-approx.html): k1 and k3 unbiased, k2 and k3 never negative.
    As a loss, samples held fixed, the expected gradient of k1 is 0 (noise only), of k2 grad KL(policy || ref), of k3 grad KL(ref || policy)."""
    _one_of("kind", kind, ("k1", "k2", "k3"))
    _same_tokens(logp, ref_logp)
    d = ref_logp - logp
    if kind == "k1":
        return -d
    return d.square() / 2 if kind == "k2" else torch.expm1(d) - d    # expm1: exp(d) - 1 without losing small d


def _per_token(name: str, x: Tensor, logp: Tensor) -> Tensor:
    """A per-row (N,) or per-token tensor, made to broadcast against logp."""
    if x.shape == logp.shape:
        return x
    if logp.ndim == 2 and x.shape == logp.shape[:1]:
        return x[:, None]                                            # (N, 1)
    raise ValueError(f"{name} is {tuple(x.shape)}: with logp {tuple(logp.shape)} it must be per token, or (N,) for an (N, T) logp")


def policy_terms(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2, clip_high: float = 0.28,
                 level: str = "token") -> tuple[Tensor, Tensor]:
    """Per-token loss terms and ratios, both shaped like logp; 0 and finite where mask is False, whatever stands there. advantages: per token or (N,).
    level="sequence" (GSPO eq. 7; TRL's importance_sampling_level) gives each token its row's ratio, and needs (N, T)."""
    _one_of("level", level, ("token", "sequence"))
    if not (0 <= clip_low < 1 and clip_high >= 0):
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}: need 0 <= clip_low < 1 and clip_high >= 0 (ratios stay in 1 - low .. 1 + high)")
    if not logp.shape == old_logp.shape == mask.shape or mask.dtype != torch.bool:
        raise ValueError(f"logp {tuple(logp.shape)}, old_logp {tuple(old_logp.shape)}, bool mask {tuple(mask.shape)} {mask.dtype} must have one shape")
    if level == "sequence" and logp.ndim != 2:
        raise ValueError(f"level='sequence' averages over a row: pass (N, T) tensors, not flat {tuple(logp.shape)}, or use level='token'")
    # where, not multiplication, and before exp: NaN * 0 is NaN, forward and backward
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    if level == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(logp)
    adv = torch.where(mask, _per_token("advantages", advantages, logp), 0.0)
    ratio = torch.where(adv < 0, log_ratio, log_ratio.clamp(max=80.0)).exp()      # clipped there anyway; exp would overflow, and 0 * inf is NaN
    return -torch.min(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv), ratio


def denominator(mask: Tensor, how: str = "token", max_length: int | None = None, reduce: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """(N, T) bool mask of all this rank's rows of one optimiser step -> (N,) float32, never below 1, to be indexed by micro-batch.
    `reduce` sums a 0-d int64 tensor over ranks; called exactly once. A row without tokens does not count as a row."""
    _one_of("how", how, ("token", "sequence", "fixed"))
    if how == "fixed" and (max_length is None or max_length < 1):
        raise ValueError("how='fixed' divides by rows * max_length: pass max_length, the completion budget in tokens")
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be (N, T) bool, got {tuple(mask.shape)} {mask.dtype}")
    lengths = mask.sum(1)                                            # (N,)
    total = reduce(lengths.sum() if how == "token" else (lengths > 0).sum()).clamp(min=1)
    share = {"token": torch.ones_like(lengths), "sequence": lengths.clamp(min=1), "fixed": torch.full_like(lengths, max_length or 1)}[how]
    return (share * total).float()


def grpo_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, advantages: Tensor, mask: Tensor, denominator: Tensor, *,
              clip_low: float = 0.2, clip_high: float = 0.28, beta: float = 0.0, kl_kind: str = "k3", level: str = "token",
              sampler_logp: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the step's loss (shares add up: never average them) and its detached 0-d metrics. Takes (N, T), or flat (n,) with
    per-token advantages and denominator. A metric ending in /max reduces by max, any other by sum, then divides by "tokens" (TRL's names).
    sampler_logp: what the sampler said of the tokens, for the metrics sampling/* only (default: old_logp)."""
    if beta != 0 and ref_logp is None:
        raise ValueError(f"beta={beta} needs ref_logp: score the tokens with the frozen reference model, or set beta to 0")
    terms, ratio = policy_terms(logp, old_logp, advantages, mask, clip_low, clip_high, level)
    metrics = {"tokens": mask.sum()}
    if ref_logp is not None:
        _same_tokens(logp, ref_logp)                                 # before where(), which would broadcast it
        token_kl = kl(torch.where(mask, logp, 0.0), torch.where(mask, ref_logp, 0.0), kl_kind)
        metrics["kl"] = token_kl.detach().sum()
        if beta != 0:
            terms = terms + beta * token_kl
    loss = (terms / _per_token("denominator", denominator, logp)).sum()

    with torch.no_grad():                                            # clipped = the tokens whose gradient the clip removed
        adv = torch.where(mask, _per_token("advantages", advantages, logp), 0.0)
        low, high = (ratio < 1 - clip_low) & (adv < 0), (ratio > 1 + clip_high) & (adv > 0)
        difference = torch.where(mask, logp - (old_logp if sampler_logp is None else sampler_logp), 0.0)
        sampler_ratio = torch.where(mask, ratio if sampler_logp is None else difference.clamp(max=80.0).exp(), 0.0)
        metrics |= {"clip_ratio/low_mean": low.sum(), "clip_ratio/high_mean": high.sum(), "clip_ratio/region_mean": (low | high).sum()}
        # on the first pass these two compare trainer and sampler; later they also hold the policy's own drift
        for name, x in (("sampling_logp_difference", difference.abs()), ("importance_sampling_ratio", sampler_ratio)):
            metrics[f"sampling/{name}/mean"] = x.sum()
            metrics[f"sampling/{name}/max"] = torch.nn.functional.pad(x.flatten(), (0, 1)).max()   # the pad: an empty chunk has max 0
    return loss, metrics
