"""Numbers for grpo.py: closed forms, exact expectations, naive loops, and TRL itself where it is installed. `python -m pytest tests/test_grpo.py`"""
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from grpo import VARIANTS, combine_advantages, denominator, group_advantages, grpo_loss, kl, policy_terms, scored_rows

NAN, INF = float("nan"), float("inf")
MAX_LENGTH = 11                                                      # completion budget of the "fixed" denominator


def tensor(x: list) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def everyone(rewards: Tensor) -> Tensor:
    return torch.ones_like(rewards, dtype=torch.bool)


def batch(seed: int, rows: int = 8, tokens: int = 7, drift: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, old_logp, ref_logp (N, T), advantages (N,) and a mask from lengths 1..T: float64, with ratios on both sides of every clip."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(rows, tokens, generator=g, dtype=torch.float64) * 3
    old, ref = (logp + drift * torch.randn(rows, tokens, generator=g, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(rows, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=g)
    return logp, old, ref, advantages, torch.arange(tokens) < lengths[:, None]


def split(name: str) -> tuple[str, dict[str, str | float]]:
    """A variant's aggregation, and its arguments of grpo_loss."""
    switches = VARIANTS[name]
    return switches["how"], {key: switches[key] for key in ("clip_low", "clip_high", "level")}


# ---- advantages

@pytest.mark.parametrize("group", [[0.0, 1.0, 1.0, 0.0], [0.25, 0.5, 1.0, 0.0], [3.0, 3.001, 3.0, 3.0005]])
def test_advantages_closed_form(group: list[float]) -> None:
    mean, std = statistics.fmean(group), statistics.pstdev(group)
    rewards = tensor([group])
    got = group_advantages(rewards, everyone(rewards))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), tensor([[(r - mean) / std for r in group]]), rtol=0, atol=2e-6)
    torch.testing.assert_close(group_advantages(rewards, everyone(rewards), "none").double(), tensor([[r - mean for r in group]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("junk", [0.0, 100.0, NAN, INF])
def test_defect_8_unscored_row_is_left_out_and_never_becomes_zero_reward(junk: float, scale: str) -> None:
    rewards = tensor([[1.0, junk, 3.0, 5.0], [2.0, 2.5, junk, junk]])
    scored = torch.tensor([[True, False, True, True], [True, True, False, False]])
    std = {"std": math.sqrt(8 / 3), "none": 1.0}[scale], {"std": 0.25, "none": 1.0}[scale]
    want = tensor([[-2 / std[0], 0, 0, 2 / std[0]], [-0.25 / std[1], 0.25 / std[1], 0, 0]])
    got = group_advantages(rewards, scored, scale)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    assert (got[~scored] == 0).all()


@pytest.mark.parametrize("scale", ["std", "none"])
def test_defect_10_no_spread_gives_exactly_zero(scale: str) -> None:
    rewards = tensor([[0.1] * 4, [7.3] * 4, [0.5, 0.5 + 4e-7, 0.5, 0.5 - 4e-7], [0.7, 9.0, NAN, 4.0], [NAN] * 4, [0.1, 0.1, 0.1, NAN], [0, 0, 1e-3, 0]])
    scored = torch.tensor([[True] * 4, [True] * 4, [True] * 4, [True, False, False, False], [False] * 4, [True, True, True, False], [True] * 4])
    got = group_advantages(rewards, scored, scale)
    assert (got[:6] == 0).all()                                      # equal, equal, tiny spread, one scored row, none, equal beside NaN
    assert (got[6] != 0).all()                                       # a small but real spread counts
    assert (group_advantages(rewards[5:6], scored[5:6], scale, min_spread=0.0) == 0).all()   # 0.1 is not a binary fraction
    assert (group_advantages(rewards[6:], scored[6:], scale, min_spread=1e-3) == 0).all()      # a spread equal to min_spread is none


def test_defect_10_two_passes_survive_a_large_offset_and_the_bound_holds() -> None:
    group = torch.tensor([[1e6, 1e6 + 1, 1e6 + 1, 1e6]])             # float32: E[r^2] - E[r]^2 would give 0 or less
    assert group_advantages(group, everyone(group)).tolist() == [[-1.0, 1.0, 1.0, -1.0]]
    for size in (2, 8, 64):                                          # one outlier reaches sqrt(G - 1), whatever its size
        for outlier in (2e-6, 1.0, 1e8):
            rewards = torch.zeros(1, size, dtype=torch.float64)
            rewards[0, 0] = outlier
            assert group_advantages(rewards, everyone(rewards))[0, 0].item() == pytest.approx(math.sqrt(size - 1), rel=1e-6)


def test_sum_and_gdpo() -> None:
    rewards = {"structure": tensor([[0.0, 0.1, 0.2, 0.1]]), "outcome": tensor([[10.0, 0.0, 0.0, 10.0]]), "off": tensor([[NAN] * 4])}
    weights, scored = {"structure": 2.0, "outcome": 1.0, "off": 0.0}, torch.ones(1, 4, dtype=torch.bool)
    total = [10.0, 0.2, 0.4, 10.2]
    want = tensor([[(r - statistics.fmean(total)) / statistics.pstdev(total) for r in total]])
    torch.testing.assert_close(combine_advantages(rewards, weights, scored).double(), want, rtol=0, atol=1e-6)
    root = math.sqrt(2)                                              # structure z: -root, 0, root, 0; outcome z: 1, -1, -1, 1
    got = combine_advantages(rewards, weights, scored, how="gdpo")
    torch.testing.assert_close(got.double(), tensor([[-2 * root + 1, -1, 2 * root - 1, 1]]), rtol=0, atol=1e-6)
    # without the division both are linear, so they must agree
    torch.testing.assert_close(*(combine_advantages(rewards, weights, scored, how, "none") for how in ("sum", "gdpo")), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["sum", "gdpo"])
def test_row_unscored_in_one_weighted_reward_is_left_out_of_all(how: str) -> None:
    rewards = {"structure": tensor([[0.0, NAN, 1.0, 0.5]]), "outcome": tensor([[1.0, 1.0, 0.0, 1.0]])}
    scored = torch.tensor([[True, True, True, False]])               # row 1: NaN, its None; row 3: the caller says so
    got = combine_advantages(rewards, {"structure": 1.0, "outcome": 3.0}, scored, how)
    want = {"sum": [[1.0, 0.0, -1.0, 0.0]], "gdpo": [[2.0, 0.0, -2.0, 0.0]]}[how]
    torch.testing.assert_close(got.double(), tensor(want), rtol=0, atol=1e-6)
    assert scored_rows(rewards, {"structure": 1.0, "outcome": 3.0}).tolist() == [[True, False, True, True]]
    assert scored_rows(rewards, {"structure": 0.0, "outcome": 3.0}).all()


# ---- KL: every outcome of a categorical enumerated, float64

@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_defect_4_kl_expected_value_and_expected_gradient(kind: str) -> None:
    theta = tensor([0.3, -1.2, 0.9, 0.1]).requires_grad_()
    logq = tensor([1.0, 0.2, -0.5, -0.3]).log_softmax(0)
    logp = theta.log_softmax(0)                                      # the policy; logq is the reference
    policy_ref = (logp.exp() * (logp - logq)).sum()
    ref_policy = (logq.exp() * (logq - logp)).sum()
    p = logp.exp().detach()                                          # samples held fixed: each outcome with its probability
    expected = (p * kl(logp, logq, kind)).sum()
    value = {"k1": policy_ref, "k2": (p * (logp - logq).square()).sum() / 2, "k3": policy_ref}[kind]
    torch.testing.assert_close(expected, value, rtol=0, atol=1e-14)
    gradient, = torch.autograd.grad(expected, theta, retain_graph=True)
    want = {"k1": torch.zeros(4, dtype=torch.float64), "k2": torch.autograd.grad(policy_ref, theta, retain_graph=True)[0],
            "k3": torch.autograd.grad(ref_policy, theta, retain_graph=True)[0]}[kind]
    torch.testing.assert_close(gradient, want, rtol=0, atol=1e-14)
    if kind != "k1":
        assert (kl(logp, logq, kind) >= 0).all() and gradient.abs().max() > 0.01


# ---- the loss against naive loops

def naive_loss(name: str, beta: float, logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> float:
    """The four papers' objectives, a float at a time."""
    how, switch = split(name)
    low, high = 1 - switch["clip_low"], 1 + switch["clip_high"]
    rows = []                                                        # one list of token terms a row
    for i in range(len(logp)):
        valid = [t for t in range(logp.shape[1]) if mask[i, t]]
        logs = [logp[i, t].item() - old[i, t].item() for t in valid]
        if switch["level"] == "sequence" and valid:
            logs = [sum(logs) / len(logs)] * len(logs)
        terms = []
        for t, log_ratio in zip(valid, logs, strict=True):
            ratio, a, d = math.exp(log_ratio), advantages[i].item(), ref[i, t].item() - logp[i, t].item()
            surrogate = min(ratio, high) * a if a >= 0 else max(ratio, low) * a
            terms.append(-surrogate + beta * (math.exp(d) - d - 1))
        if terms:
            rows.append(terms)
    if how == "sequence":
        return sum(sum(terms) / len(terms) for terms in rows) / len(rows)
    return sum(map(sum, rows)) / (sum(map(len, rows)) if how == "token" else len(rows) * MAX_LENGTH)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_loss_is_the_closed_form_of_each_variant(name: str, beta: float) -> None:
    how, switch = split(name)
    for seed in range(5):
        logp, old, ref, advantages, mask = batch(seed, drift=3e-4 if name == "gspo" else 0.3)
        mask = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.8)   # holes, perhaps an empty row
        loss, _ = grpo_loss(logp, old, ref if beta else None, advantages, mask, denominator(mask, how, MAX_LENGTH), beta=beta, **switch)
        assert loss.item() == pytest.approx(naive_loss(name, beta, logp, old, ref, advantages, mask), abs=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_loss_gradient_and_metrics_are_trls(name: str, beta: float) -> None:
    trl = pytest.importorskip("trl")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"the stub below follows GRPOTrainer._compute_loss of trl 1.16, this is {trl.__version__}")
    how, switch = split(name)
    logp, old, ref, advantages, mask = batch(3, drift=4e-4 if name == "gspo" else 0.3)
    theirs, ours = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    stub = SimpleNamespace(                                          # what that method reads of a trainer
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (theirs, torch.zeros_like(theirs), None), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=switch["level"], beta=beta,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1), use_vllm=False,
        loss_type={"sequence": "grpo", "token": "dapo", "fixed": "dr_grpo"}[how], max_completion_length=MAX_LENGTH,
        epsilon_low=switch["clip_low"], epsilon_high=switch["clip_high"], current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x), model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)})
    prompt = torch.ones(len(logp), 1, dtype=torch.long)
    inputs = {"prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask.long(), "completion_mask": mask.long(), "advantages": advantages,
              "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum()}
    want = trl.GRPOTrainer._compute_loss(stub, None, inputs)
    loss, metrics = grpo_loss(ours, old, ref, advantages, mask, denominator(mask, how, MAX_LENGTH), beta=beta, **switch)
    want.backward()
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-7)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-7)
    for key, values in stub._metrics["train"].items():
        # with a sequence ratio TRL counts a clipped row once, we count its tokens
        if values and key in metrics and (switch["level"] == "token" or key == "kl"):
            assert (metrics[key] / metrics["tokens"]).item() == pytest.approx(values[0], abs=1e-6)


def test_variants_are_the_papers_switches() -> None:
    switches = {name: tuple(variant.values()) for name, variant in VARIANTS.items()}
    assert switches == {"grpo": ("std", "sequence", 0.2, 0.2, "token"), "dapo": ("std", "token", 0.2, 0.28, "token"),
                        "dr_grpo": ("none", "fixed", 0.2, 0.2, "token"), "gspo": ("std", "sequence", 3e-4, 4e-4, "sequence")}


# ---- gradients

def test_defect_2_first_pass_has_ratio_1_and_the_reinforce_gradient() -> None:
    torch.manual_seed(0)
    theta = torch.randn(6, 5, 9, dtype=torch.float64, requires_grad=True)      # (N, T, V) logits
    targets, advantages = torch.randint(9, (6, 5, 1)), torch.randn(6, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 4, 2, 5])[:, None]
    logp = theta.log_softmax(-1).gather(-1, targets).squeeze(-1)               # (N, T)
    per_token = advantages[:, None].expand(6, 5)[mask]
    for level in ("token", "sequence"):
        terms, ratio = policy_terms(logp, logp.detach(), advantages, mask, level=level)
        assert (ratio == 1).all() and (terms[~mask] == 0).all()
        loss, metrics = grpo_loss(logp, logp.detach(), None, advantages, mask, denominator(mask), level=level)
        assert loss.item() == pytest.approx(-per_token.mean().item(), abs=1e-7)
        assert metrics["clip_ratio/region_mean"] == 0 and metrics["sampling/sampling_logp_difference/max"] == 0
        reinforce = -(logp[mask] * per_token).sum() / mask.sum()
        torch.testing.assert_close(*(torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (loss, reinforce)), rtol=0, atol=1e-8)


def test_a_ratio_that_would_overflow_is_clipped_like_any_other() -> None:
    logp = tensor([-100.0, -100.0, -100.0])[:, None].float().requires_grad_()                # e^100 is no float32
    terms, ratio = policy_terms(logp, torch.full((3, 1), -200.0), tensor([1.0, 0.0, -1.0]).float(), torch.ones(3, 1, dtype=torch.bool), 0.2, 0.28)
    assert terms[:2].flatten().tolist() == [pytest.approx(-1.28), 0.0] and terms[2] == torch.inf and (ratio[:2] > 1e30).all()
    terms[:2].sum().backward()
    assert (logp.grad[:2] == 0).all()                                                        # the third's blow-up is not hidden: its loss is infinite


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clipped_side_has_exactly_no_gradient(level: str) -> None:
    ratios = [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.0] * 2
    advantages = tensor([2.0] * 7 + [-3.0] * 7)
    logp = tensor(ratios).log()[:, None].expand(14, 3).clone().requires_grad_()    # (N, T), the same ratio along a row
    mask = torch.ones(14, 3, dtype=torch.bool)
    terms, _ = policy_terms(logp, torch.zeros_like(logp), advantages, mask, 0.2, 0.28, level)
    terms.sum().backward()
    # A > 0: nothing above 1.28 (already raised enough), all below 0.8; A < 0: nothing below 0.8, all above 1.28
    clipped = [False] * 5 + [True] * 2 + [True] * 2 + [False] * 5
    want = tensor([0.0 if c else -r * a for c, r, a in zip(clipped, ratios, advantages.tolist(), strict=True)])[:, None].expand(14, 3)
    torch.testing.assert_close(logp.grad, want, rtol=1e-12, atol=1e-12)
    assert (logp.grad[torch.tensor(clipped)] == 0).all()


def world_denominators(masks: list[Tensor], how: str) -> list[Tensor]:
    """Each rank's denominator with a simulated all-reduce, which every rank must enter exactly once."""
    parts: list[Tensor] = []
    for mask in masks:
        denominator(mask, how, MAX_LENGTH, reduce=lambda x: parts.append(x) or x)
    assert len(parts) == len(masks) and all(part.ndim == 0 for part in parts)
    return [denominator(mask, how, MAX_LENGTH, reduce=lambda _: torch.stack(parts).sum()) for mask in masks]


@pytest.mark.parametrize("name", list(VARIANTS))
def test_defect_3_same_gradient_for_any_micro_batch_and_world_size(name: str) -> None:
    how, switch = split(name)
    _, noise, ref, advantages, mask = batch(5, drift=1e-3 if name == "gspo" else 0.3)
    inputs = torch.randn(8, 7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = tensor([0.3, -0.7, 0.2, 0.5]).requires_grad_()          # one shared parameter
    old = (inputs @ weight).detach() + (noise - noise.mean()) * (1e-3 if name == "gspo" else 0.3)
    mask[2] = False                                                  # a row that counts nowhere

    def step(ranks: list[Tensor], micro: int) -> tuple[Tensor, float, dict[str, float]]:
        weight.grad, total, sums = None, 0.0, {}
        for rows, denom in zip(ranks, world_denominators([mask[rows] for rows in ranks], how), strict=True):
            for part in torch.arange(len(rows)).split(micro):
                i = rows[part]
                loss, metrics = grpo_loss(inputs[i] @ weight, old[i], ref[i], advantages[i], mask[i], denom[part], beta=0.1, **switch)
                loss.backward()                                      # shares add up
                total += loss.item()
                for key, value in metrics.items():
                    sums[key] = max(sums.get(key, 0.0), value.item()) if key.endswith("/max") else sums.get(key, 0.0) + value.item()
        return weight.grad, total, sums

    whole, loss, sums = step([torch.arange(8)], 8)
    assert whole.abs().max() > 1e-3
    order = torch.tensor([6, 2, 0, 7, 5, 1, 3, 4])                   # ranks with different rows, lengths and row counts
    for ranks in ([torch.arange(8)], [order[:3], order[3:]], [order[:1], order[1:2], order[2:], order[:0]]):   # last: a rank without tokens, one without rows
        for micro in (1, 2, 8):
            gradient, total, parts = step(ranks, micro)
            torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-6)
            assert total == pytest.approx(loss, abs=1e-6)
            assert parts == pytest.approx(sums, abs=1e-9)            # defect 6: metrics are sums of the step, not of its last micro-batch
    assert loss == pytest.approx(naive_loss(name, 0.1, (inputs @ weight).detach(), old, ref, advantages, mask), abs=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("junk", [NAN, INF, -INF, -1e4, 1e4])
def test_defect_1_every_valid_token_is_trained_and_padding_is_harmless(junk: float, level: str) -> None:
    logp, old, ref, advantages, mask = batch(7, drift=0.05)
    advantages = advantages[:, None].expand(8, 7)
    results = []
    for fill in ({}, {0}, {1}, {2}, {3}, {0, 1, 2, 3}):              # which of the four tensors hold junk under the mask
        x = [t.masked_fill(~mask, junk) if k in fill else t.clone() for k, t in enumerate((logp, old, ref, advantages))]
        x[0].requires_grad_()
        loss, metrics = grpo_loss(*x, mask, denominator(mask), beta=0.1, level=level)
        loss.backward()
        assert (x[0].grad[~mask] == 0).all() and (x[0].grad[mask] != 0).all()   # the last valid token (the stop token) is trained too
        results.append((loss, x[0].grad, metrics))
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=0, atol=0)


def test_unscored_row_and_spreadless_group_have_no_gradient() -> None:
    logp, old, _, _, mask = batch(9)
    rewards = tensor([[1.0, NAN, 0.0, 0.5], [0.3] * 4])              # P = 2 groups of G = 4
    advantages = group_advantages(rewards, ~rewards.isnan()).flatten()
    logp.requires_grad_()
    grpo_loss(logp, old, None, advantages, mask, denominator(mask), clip_low=0.99, clip_high=100.0)[0].backward()   # nothing clipped
    assert (logp.grad.abs().sum(1) > 0).tolist() == [True, False, True, False] + [False] * 4   # row 3 earned exactly the mean


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
def test_flat_chunks_equal_padded_rows(name: str) -> None:
    how, switch = split(name)
    logp, old, ref, advantages, mask = batch(11)
    denom = denominator(mask, how, MAX_LENGTH)
    padded, flat = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss, metrics = grpo_loss(padded, old, ref, advantages, mask, denom, beta=0.1, **switch)
    loss.backward()
    rows, columns = mask.nonzero(as_tuple=True)                      # (n,) each
    total, sums = 0.0, dict.fromkeys(metrics, 0.0)
    for i in torch.arange(len(rows)).split(5) + (torch.arange(0),):  # chunks of a fused kernel, and an empty one
        r, c = rows[i], columns[i]
        share, part = grpo_loss(flat[r, c], old[r, c], ref[r, c], advantages[r], torch.ones(len(i), dtype=torch.bool), denom[r], beta=0.1, **switch)
        share.backward()
        total += share.item()
        sums = {key: max(sums[key], x.item()) if key.endswith("/max") else sums[key] + x.item() for key, x in part.items()}
    assert total == pytest.approx(loss.item(), abs=1e-12)
    torch.testing.assert_close(flat.grad, padded.grad, rtol=0, atol=1e-12)
    assert sums == pytest.approx({key: x.item() for key, x in metrics.items()}, abs=1e-12)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_step_without_tokens_is_zero_and_finite(name: str) -> None:
    how, switch = split(name)
    logp = torch.full((3, 4), NAN, requires_grad=True)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    denom = denominator(mask, how, MAX_LENGTH)
    loss, metrics = grpo_loss(logp, logp.detach(), logp.detach(), torch.zeros(3), mask, denom, beta=0.1, **switch)
    loss.backward()
    assert (denom >= 1).all() and loss.item() == 0 and (logp.grad == 0).all()
    assert all(value == 0 for value in metrics.values())


# ---- denominators and metrics by hand

def test_denominators_by_hand() -> None:
    mask = torch.arange(4) < torch.tensor([3, 0, 1])[:, None]        # 4 tokens in 2 rows; the empty row is no row
    other = torch.tensor(10)                                         # what the other ranks add
    assert denominator(mask, "token").tolist() == [4, 4, 4]
    assert denominator(mask, "sequence").tolist() == [6, 2, 2]
    assert denominator(mask, "fixed", 5).tolist() == [10, 10, 10]
    assert denominator(mask, "token", reduce=lambda x: x + other).tolist() == [14, 14, 14]
    assert denominator(mask, "sequence", reduce=lambda x: x + other).tolist() == [36, 12, 12]
    assert denominator(mask, "fixed", 5, reduce=lambda x: x + other).tolist() == [60, 60, 60]


def test_defect_6_metrics_are_masked_sums_by_hand() -> None:
    ratio = tensor([[0.5, 2.0, 1.5, 9.0], [0.7, 1.5, 0.5, 0.1]])     # under the mask: 3 tokens of row 0, 3 of row 1
    mask = torch.tensor([[True, True, True, False], [True, True, True, False]])
    ref = tensor([[0.0, 0.1, -0.1, 50.0], [0.0, 0.0, 0.2, 50.0]]) + ratio.log()
    logp = ratio.log().requires_grad_()
    loss, metrics = grpo_loss(logp, torch.zeros_like(ratio), ref, tensor([1.0, -1.0]), mask, denominator(mask), kl_kind="k2")
    want = {
        "tokens": 6, "kl": (0.01 + 0.01 + 0.04) / 2,
        "clip_ratio/low_mean": 2, "clip_ratio/high_mean": 2, "clip_ratio/region_mean": 4,   # low: 0.7, 0.5 of row 1; high: 2.0, 1.5 of row 0
        "sampling/sampling_logp_difference/mean": 3 * math.log(2) + 2 * math.log(1.5) - math.log(0.7),
        "sampling/sampling_logp_difference/max": math.log(2),
        "sampling/importance_sampling_ratio/mean": 6.7, "sampling/importance_sampling_ratio/max": 2.0,
    }
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(want, abs=1e-12)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    assert "kl" not in grpo_loss(logp, logp.detach(), None, tensor([1.0, -1.0]), mask, denominator(mask))[1]
    assert loss.item() == pytest.approx((-(0.5 + 1.28 + 1.28) + (0.8 + 1.5 + 0.8)) / 6, abs=1e-7)   # beta 0: kl is only reported
    rows = grpo_loss(logp, torch.zeros_like(ratio), None, tensor([1.0, -1.0]), mask, denominator(mask), clip_low=0.1, clip_high=0.1, level="sequence")[1]
    assert rows["clip_ratio/high_mean"] == 3 and rows["clip_ratio/low_mean"] == 3               # a clipped row counts its valid tokens
    assert rows["sampling/importance_sampling_ratio/mean"].item() == pytest.approx(3 * (1.5 ** (1 / 3) + 0.525 ** (1 / 3)))


# ---- errors say what to change

ROW, MASK = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
PER_ROW = torch.ones(2)


@pytest.mark.parametrize(("message", "call"), [
    ("scale='max' is unknown: use one of std, none", lambda: group_advantages(ROW, MASK, "max")),
    ("must both be", lambda: group_advantages(ROW, MASK[:1])),
    ("must both be", lambda: group_advantages(ROW, MASK.long())),
    ("group_size to 2 or more", lambda: group_advantages(ROW[:, :1], MASK[:, :1])),
    ("mark it unscored", lambda: group_advantages(ROW + NAN, MASK)),
    ("use one of sum, gdpo", lambda: combine_advantages({"a": ROW}, {"a": 1.0}, MASK, "mean")),
    ("at least one reward a weight", lambda: combine_advantages({"a": ROW}, {"a": 0.0}, MASK)),
    ("give each reward a weight", lambda: combine_advantages({"a": ROW, "b": ROW}, {"a": 1.0}, MASK)),
    ("each non-zero weight a reward", lambda: combine_advantages({"a": ROW}, {"a": 1.0, "b": 1.0}, MASK)),
    ("differ in shape", lambda: combine_advantages({"a": ROW, "b": ROW[:1]}, {"a": 1.0, "b": 1.0}, MASK)),
    ("scored is", lambda: combine_advantages({"a": ROW}, {"a": 1.0}, MASK[0])),
    ("use one of k1, k2, k3", lambda: kl(ROW, ROW, "k4")),
    ("same tokens", lambda: kl(ROW, ROW[:, :1])),
    ("use one of token, sequence", lambda: policy_terms(ROW, ROW, PER_ROW, MASK, level="row")),
    ("clip_low < 1", lambda: policy_terms(ROW, ROW, PER_ROW, MASK, clip_low=1.0)),
    ("clip_high >= 0", lambda: policy_terms(ROW, ROW, PER_ROW, MASK, clip_high=-0.1)),
    ("must have one shape", lambda: policy_terms(ROW, ROW[:1], PER_ROW, MASK)),
    ("bool mask", lambda: policy_terms(ROW, ROW, PER_ROW, MASK.long())),
    ("advantages is", lambda: policy_terms(ROW, ROW, torch.ones(3), MASK)),
    ("pass \\(N, T\\) tensors", lambda: policy_terms(ROW[0], ROW[0], ROW[0], MASK[0], level="sequence")),
    ("use one of token, sequence, fixed", lambda: denominator(MASK, "mean")),
    ("pass max_length", lambda: denominator(MASK, "fixed")),
    ("must be \\(N, T\\) bool", lambda: denominator(MASK.long())),
    ("needs ref_logp", lambda: grpo_loss(ROW, ROW, None, PER_ROW, MASK, PER_ROW, beta=0.1)),
    ("ref_logp is", lambda: grpo_loss(ROW, ROW, ROW[:1], PER_ROW, MASK, PER_ROW)),
    ("denominator is", lambda: grpo_loss(ROW, ROW, None, PER_ROW, MASK, torch.ones(3))),
    ("denominator is", lambda: grpo_loss(ROW[0], ROW[0], None, ROW[0], MASK[0], PER_ROW)),
])
def test_bad_arguments_say_what_to_change(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
