"""logprob.py against float64 autograd: values, gradients, the properties of the formulas, memory, and compilation for GPUs that are not here.

Every test with a `device` runs on the plain twins, on the Triton kernels in Triton's interpreter (float32: its bf16 products are wrong, triton#11584;
in a process of its own, which `test_all_of_it_on_the_kernels_in_the_interpreter` starts) and, where there is one, on a GPU.
`python -m pytest tests/test_logprob.py`
"""
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels as K
import logprob as L

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_gpu = [pytest.mark.gpu, needs_gpu]
T = 0.7


@pytest.fixture(params=["interpreter" if INTERPRETED else "twin", pytest.param("cuda", marks=on_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "interpreter":
        monkeypatch.setattr(L, "_fused", lambda t: len(t) > 0)
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks at test sizes: of rows in the twins, of the vocabulary in the kernels' backward."""
    monkeypatch.setattr(L, "CPU_ELEMENTS", 7 * 301)
    monkeypatch.setattr(L, "WORKSPACE", 1)


def inputs(N: int = 21, D: int = 48, V: int = 301, seed: int = 0, scale: float = 0.5, device: str = "cpu",
           dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, targets; ragged against every tile by default."""
    g = torch.Generator().manual_seed(seed)
    x, W, y = torch.randn(N, D, generator=g) * scale, torch.randn(V, D, generator=g), torch.randint(V, (N,), generator=g)
    return x.to(device, dtype).requires_grad_(), W.to(device, dtype).requires_grad_(), y.to(device)


def exact(x: Tensor, W: Tensor, y: Tensor, temperature: float = T) -> tuple[Tensor, ...]:
    """float64 on the CPU: hidden and weight as leaves, then logp, entropy and all log-probabilities."""
    x, W = (t.detach().cpu().double().requires_grad_() for t in (x, W))
    lp = torch.log_softmax(x @ W.T / temperature, -1)
    return x, W, lp.gather(1, y.cpu()[:, None])[:, 0], -(lp.exp() * lp).sum(-1), lp


def rows_of(N: int, count: int = 1, seed: int = 1, device: str = "cpu") -> Tensor:
    return torch.randn(count, N, generator=torch.Generator().manual_seed(seed)).to(device)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Largest error relative to 1 + |want|; NaN and shape mismatches fail."""
    assert got.shape == want.shape
    error = ((got.detach().cpu().double() - want.detach().cpu().double()).abs() / (1 + want.detach().cpu().double().abs())).max().item()
    assert error <= tolerance, f"off by {error:.1e}, allowed {tolerance:.0e}"


def near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Frobenius norm of the difference over that of the wanted gradient."""
    assert got.shape == want.shape
    error = ((got.cpu().double() - want.cpu().double()).norm() / want.cpu().double().norm()).item()
    assert error <= tolerance, f"relative error {error:.1e}, allowed {tolerance:.0e}"


def grpo(advantages: Tensor, old: Tensor, ref: Tensor, beta: float = 0.04) -> Callable[[Tensor, slice], Tensor]:
    """A clipped objective with k3, summed over rows with a denominator known beforehand."""
    def loss_fn(logp: Tensor, rows: slice) -> Tensor:
        a, o, r = (t[rows].to(logp) for t in (advantages, old, ref))
        ratio = (logp - o).exp()
        return (-torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a) + beta * ((r - logp).exp() - (r - logp) - 1)).sum() / len(advantages)
    return loss_fn


def grpo_case(x: Tensor, W: Tensor, y: Tensor) -> tuple[Callable[[Tensor, slice], Tensor], Tensor, Tensor, Tensor]:
    """A loss on these inputs, its float64 value and gradients; a third of the rows has no advantage, some are clipped."""
    X, Wd, logp, _, _ = exact(x, W, y)
    noise = rows_of(len(y), 3, seed=5)
    advantages, old, ref = noise[0].clone(), (logp.detach() + 0.3 * noise[1]).float(), (logp.detach() + 0.3 * noise[2]).float()
    advantages[::3] = 0
    loss_fn = grpo(advantages, old, ref)
    loss = loss_fn(logp, slice(None))
    return loss_fn, loss.detach(), *torch.autograd.grad(loss, (X, Wd))


# ---- values and gradients

@pytest.mark.parametrize(("N", "D", "V"), [(21, 48, 301), (16, 16, 32), (1, 16, 5), (50, 32, 96)])
def test_logp_and_entropy(device: str, small_chunks: None, N: int, D: int, V: int) -> None:
    x, W, y = inputs(N, D, V, device=device)
    logp, entropy = L.linear_logprob(x, W, y, T)
    _, _, want, want_entropy, _ = exact(x, W, y)
    assert logp.dtype == entropy.dtype == torch.float32
    close(logp, want, 6e-6)
    close(entropy, want_entropy, 6e-6)


@pytest.mark.parametrize("V", [301, 320, 520])
def test_gradients_through_logp_and_entropy(device: str, small_chunks: None, V: int) -> None:
    x, W, y = inputs(V=V, device=device)
    a, e = rows_of(len(y), 2)
    X, Wd, logp, entropy, _ = exact(x, W, y)
    ours = L.linear_logprob(x, W, y, T)
    for terms in ((a, None), (None, e), (a, e)):
        want = torch.autograd.grad(sum((t * out).sum() for t, out in zip(terms, (logp, entropy), strict=True) if t is not None), (X, Wd), retain_graph=True)
        got = torch.autograd.grad(sum((t.to(device) * out).sum() for t, out in zip(terms, ours, strict=True) if t is not None), (x, W), retain_graph=True)
        for g, w in zip(got, want, strict=True):
            near(g, w)


@pytest.mark.parametrize("chunk", [8, 21, 8192])
def test_policy_loss(device: str, small_chunks: None, chunk: int) -> None:
    x, W, y = inputs(device=device)
    loss_fn, want, dX, dW = grpo_case(x, W, y)
    loss, logp = L.linear_policy_loss(x, W, y, T, loss_fn, chunk)
    (3 * loss).backward()
    close(loss, want, 1e-6)
    close(logp, exact(x, W, y)[2], 2e-6)
    near(x.grad, 3 * dX)
    near(W.grad, 3 * dW)
    assert not logp.requires_grad


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl(device: str, small_chunks: None, direction: str) -> None:
    x, W, y = inputs(device=device)
    x2, W2, _ = inputs(D=32, seed=7, device=device)                                 # a teacher of another width
    X, Wd, _, _, lp = exact(x, W, y)
    lq, a = exact(x2, W2, y)[4].detach(), rows_of(len(y))[0]
    want = (lp.exp() * (lp - lq) if direction == "reverse" else lq.exp() * (lq - lp)).sum(-1)
    kl = L.linear_kl(x, W, x2, W2, T, direction)
    close(kl, want, 3e-6)
    got = torch.autograd.grad((a.to(device) * kl).sum(), (x, W, x2, W2), allow_unused=True)
    for g, w in zip(got, torch.autograd.grad((a * want).sum(), (X, Wd)), strict=False):
        near(g, w)
    assert got[2] is got[3] is None


def test_a_vocabulary_of_many_tiles(device: str) -> None:
    """More tiles than are merged at once, with the largest logits far above the target's and in the last ones."""
    x, W, y = inputs(5, 16, 2200, device=device)
    with torch.no_grad():
        W[2100:, 0], x[:2, 0], y[:] = 30.0, 5.0, 7
    x2, W2, _ = inputs(5, 16, 2200, seed=3, device=device)
    _, _, logp, entropy, lp = exact(x, W, y)
    lq = exact(x2, W2, y)[4]
    assert (logp[:2] < -100).all() and (logp[2:] > -100).all()
    for got, want in zip(L.linear_logprob(x, W, y, T), (logp, entropy), strict=True):
        close(got, want, 2e-5)
    close(L.linear_kl(x, W, x2, W2, T), (lp.exp() * (lp - lq)).sum(-1), 2e-5)
    close(L.linear_kl(x, W, x2, W2, T, "forward"), (lq.exp() * (lq - lp)).sum(-1), 2e-5)


def test_kl_of_a_model_with_itself_is_zero_and_at_its_minimum(device: str) -> None:
    x, W, _ = inputs(device=device)
    for direction in ("reverse", "forward"):
        kl = L.linear_kl(x, W, x, W, T, direction)
        assert 0 <= kl.min() and kl.max() < 1e-5
        assert max(g.abs().max() for g in torch.autograd.grad(kl.sum(), (x, W))) < 1e-5


def test_logits_variant(device: str) -> None:
    z = torch.randn(9, 5000, generator=torch.Generator().manual_seed(0)).mul(4).to(device)
    z[0, 17], z[1, 17], z[2, 17] = 900.0, -900.0, 15.0                              # the target impossible, impossible, likely
    y, a = torch.tensor([3, 17, 17, 0, 4999, 4096, 4095, 8, 8], device=device), rows_of(9, device=device)[0]
    a[4] = 0
    Z = z.detach().cpu().double().requires_grad_()
    want = torch.log_softmax(Z / T, -1).gather(1, y.cpu()[:, None])[:, 0]
    dZ, = torch.autograd.grad((a.cpu() * want).sum(), Z)
    leaf = z.clone().requires_grad_()
    got = L.logprob_from_logits(leaf * 1, y, T)
    assert -2 < want[2] < -0.1
    close(got, want, 2e-6)
    got.backward(a)
    near(leaf.grad, dZ)
    assert (leaf.grad[4] == 0).all()


def test_targets_and_logits_in_any_memory(device: str) -> None:
    """A column of a table as targets; logits that repeat one row, whose gradient has to go into memory of its own."""
    x, W, y = inputs(device=device)
    column, a = torch.stack((y, y.flip(0), (y + 5) % len(W)), 1)[:, 0], rows_of(len(x), device=device)[0]
    assert column.stride() == (3,)
    for run in (lambda y: L.linear_logprob(x, W, y, T)[0], lambda y: L.linear_policy_loss(x, W, y, T, lambda logp, rows: (a[rows] * logp).sum())[1],
                lambda y: L.logprob_from_logits(x @ W.T, y, T)):
        assert torch.equal(run(column), run(y))
    z = (x[:1] @ W.T).detach().requires_grad_()
    want = torch.autograd.grad((a * torch.log_softmax(z.expand(len(y), -1) / T, -1).gather(1, y[:, None])[:, 0]).sum(), z)[0]
    got = torch.autograd.grad((a * L.logprob_from_logits(z.expand(len(y), -1), y, T)).sum(), z)[0]
    near(got, want)


def test_logits_of_minus_infinity(device: str) -> None:
    """A masked vocabulary: such a target has log-prob -inf, and every other gradient is finite."""
    z = torch.randn(3, 70, generator=torch.Generator().manual_seed(0)).to(device)
    z[:, 50:] = -torch.inf
    y = torch.tensor([3, 60, 49], device=device)
    leaf = z.clone().requires_grad_()
    logp = L.logprob_from_logits(leaf * 1, y, T)
    want = torch.log_softmax(z.double() / T, -1)
    assert logp[1] == -torch.inf and torch.allclose(logp[[0, 2]].double(), want[[0, 2], y[[0, 2]]], atol=1e-5)
    logp.sum().backward()
    near(leaf.grad, (torch.nn.functional.one_hot(y, 70).double() - want.exp()) / T)


def test_autocast_changes_nothing(device: str) -> None:
    x, W, y = inputs(device=device)
    x2, W2, _ = inputs(seed=3, device=device)
    for call in (lambda: L.linear_logprob(x, W, y, T)[0], lambda: L.linear_policy_loss(x, W, y, T, lambda logp, rows: logp.square().sum())[0],
                 lambda: L.linear_kl(x, W, x2, W2, T)):
        want = call()
        with torch.autocast(device, torch.bfloat16):
            got = call()
        assert torch.equal(got, want) and got.dtype == torch.float32
        assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(got.sum(), (x, W)), torch.autograd.grad(want.sum(), (x, W)), strict=True))


@pytest.mark.parametrize(("logits", "temperature", "says"), [
    (torch.zeros(2, 5), 0.0, "temperature positive, not .* 0.0"), (torch.zeros(2, 5), -1.0, "temperature positive"), (torch.zeros(1, 2, 5), 1.0, r"\(N, V\).*\(1, 2, 5\)"),
    (torch.zeros(5), 1.0, r"\(N, V\)"), (torch.zeros(2, 5).long(), 1.0, "int64"), (torch.zeros(2, 5).double(), 1.0, "float64")])
def test_logits_that_cannot_be_are_refused(logits: Tensor, temperature: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        L.logprob_from_logits(logits, torch.zeros(2, dtype=torch.int64), temperature)
    x, W, y = inputs()
    with pytest.raises(ValueError, match="chunk must be positive"):
        L.linear_policy_loss(x, W, y, T, lambda logp, rows: logp.sum(), chunk=0)


def test_logits_gradient_takes_the_memory_of_the_logits(device: str) -> None:
    if not L._fused(torch.empty(1, device=device)):
        pytest.skip("the plain twin keeps the logits")
    logits, y = torch.randn(4, 100, device=device).requires_grad_() * 1, torch.arange(4, device=device)
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    total = L.logprob_from_logits(logits, y).sum()
    square = (logits * logits).sum()
    total.backward()
    assert seen == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


# ---- properties of the formulas

def test_adding_one_vector_to_every_weight_changes_nothing(device: str) -> None:
    x, W, y = inputs(device=device)
    shifted = (W.detach() + rows_of(48, device=device)).requires_grad_()
    results = []
    for weight in (W, shifted):
        logp, entropy = L.linear_logprob(x, weight, y, T)
        results.append((logp, entropy, *torch.autograd.grad((logp * rows_of(21, device=device)[0] + entropy).sum(), (x, weight))))
    for before, after in zip(*results, strict=True):
        close(after, before, 2e-5)
    assert results[0][3].sum(0).abs().max() < 1e-4 < results[0][3].abs().sum(0).min()       # sum_v dz_v = 0, so the columns of dW cancel


def test_temperature_is_a_scale_of_the_hidden_states(device: str) -> None:
    x, W, y = inputs(device=device)
    for warm, cold in zip(L.linear_logprob(x, W, y, T), L.linear_logprob(x / T, W, y), strict=True):
        close(warm, cold, 3e-6)


def test_permuting_the_vocabulary_permutes_the_weight_gradient(device: str) -> None:
    x, W, y = inputs(device=device)
    order = torch.randperm(301, generator=torch.Generator().manual_seed(2)).to(device)
    logp, entropy = L.linear_logprob(x, W, y, T)
    logp2, entropy2 = L.linear_logprob(x, W[order], order.argsort()[y], T)
    close(logp2, logp, 6e-6)
    close(entropy2, entropy, 6e-6)
    for one, two in zip(torch.autograd.grad((logp + entropy).sum(), (x, W)), torch.autograd.grad((logp2 + entropy2).sum(), (x, W)), strict=True):
        near(two, one)


def test_chunk_sizes_do_not_matter(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, y = inputs(20, 32, 520, device=device)
    loss_fn, *_ = grpo_case(x, W, y)
    results = []
    for elements, chunk in ((1 << 28, 8192), (520 * 5, 5), (1, 16)):
        monkeypatch.setattr(L, "CPU_ELEMENTS", elements)
        monkeypatch.setattr(L, "WORKSPACE", elements)
        logp, entropy = L.linear_logprob(x, W, y, T)
        loss, _ = L.linear_policy_loss(x, W, y, T, loss_fn, chunk)
        results.append((logp, entropy, *torch.autograd.grad((logp * entropy).sum(), (x, W)), *torch.autograd.grad(loss, (x, W))))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            near(got.detach(), want.detach())


def test_a_row_does_not_depend_on_its_neighbours_by_a_single_bit(device: str) -> None:
    x, W, y = inputs(64, device=device)
    with torch.no_grad():
        x[5] *= 300                                                                 # a row that leaves the anchored range, in the first tile
        together = L.linear_logprob(x, W, y, T)
        alone = L.linear_logprob(x[:32], W, y[:32], T)
        x[5] /= 300
        calm = L.linear_logprob(x, W, y, T)
    assert together[0][5] < -100 < calm[0][5]
    others = torch.arange(64) != 5
    for whole, part, quiet in zip(together, alone, calm, strict=True):
        assert torch.equal(whole[:32], part)
        assert torch.equal(whole[others], quiet[others])


def test_rows_without_gradient_are_exactly_zero_and_may_be_left_out(device: str, small_chunks: None) -> None:
    x, W, y = inputs(device=device)
    a, dead = rows_of(21, device=device)[0], torch.arange(21, device=device) % 4 != 0         # under the share that mode B moves together
    a[dead] = 0
    for run in (lambda x, y, a: (L.linear_logprob(x, W, y, T)[0] * a).sum(),
                lambda x, y, a: L.linear_policy_loss(x, W, y, T, lambda logp, rows: (logp * a[rows]).sum(), 16)[0]):
        dX, dW = torch.autograd.grad(run(x, y, a), (x, W))
        assert (dX[dead] == 0).all() and (dX[~dead].abs().amax(1) > 0).all()
        dX2, dW2 = torch.autograd.grad(run(x[~dead], y[~dead], a[~dead]), (x, W))
        near(dX2, dX, 2e-6)
        near(dW2, dW, 2e-6)
        none = torch.autograd.grad(run(x, y, a * 0), (x, W))
        assert all((g == 0).all() for g in none)


def test_equal_logits_have_entropy_log_v(device: str) -> None:
    x, W, y = inputs(device=device)
    for hidden, weight in ((x * 0, W), (x, W * 0 + W[:1])):
        logp, entropy = L.linear_logprob(hidden, weight, y, T)
        close(entropy, torch.full((21,), 301.0).log(), 1e-6)
        close(logp, -torch.full((21,), 301.0).log(), 1e-6)


def test_targets_at_both_ends_of_the_vocabulary(device: str) -> None:
    x, W, _ = inputs(device=device)
    for y in (torch.zeros(21, dtype=torch.int64), torch.full((21,), 300), torch.full((21,), 288)):    # 288 opens the last, partial tile
        X, Wd, logp, _, _ = exact(x, W, y)
        ours, _ = L.linear_logprob(x, W, y.to(device), T)
        close(ours, logp, 2e-6)
        for got, want in zip(torch.autograd.grad(ours.sum(), (x, W)), torch.autograd.grad(logp.sum(), (X, Wd)), strict=True):
            near(got, want)


def ladder(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose target lies 0, 1e-3, 10, 43, 46, 50, 88, 104, 700 and 5000 nats from the rest, above or below; the last rows are ordinary."""
    gaps = [-30.0, -12.0, 0.0, 1e-3, 10.0, 43.0, 46.0, 50.0, 88.0, 104.0, 700.0, 5000.0]
    x, W, y = (t.detach().clone() for t in inputs(20, 16, 301))
    x[:12, 1:] *= 0.1
    x[:12, 0], W[:, 0], y[:12], W[150, 0] = torch.tensor(gaps) * T, 1.0, 150, 0.0     # z_v - z_150 is about the gap for every other v
    x[12:, 0] = 0.0
    return x.to(device).requires_grad_(), W.to(device).requires_grad_(), y.to(device)


def test_targets_far_below_and_near_probability_one_stay_exact(device: str) -> None:
    x, W, y = ladder(device)
    X, Wd, logp, entropy, _ = exact(x, W, y)
    assert logp.min() < -5000 and logp.max() > -1e-10
    ours, ours_entropy = L.linear_logprob(x, W, y, T)
    close(ours, logp, 2e-6)
    close(ours_entropy, entropy, 3e-4)                                              # float32 logits of 7000 are 5e-4 apart
    assert ours.max() <= 0
    a = rows_of(20, device=device)[0]
    number = torch.arange(20, device=device)
    for w in (a, a * (number == 9), a * (number != 9)):                             # also a far row alone, and all but that
        want = torch.autograd.grad((w.cpu() * logp).sum(), (X, Wd), retain_graph=True)
        mode_a = torch.autograd.grad((w * ours).sum(), (x, W), retain_graph=True)
        loss, _ = L.linear_policy_loss(x, W, y, T, lambda lp, rows, w=w: (w[rows] * lp).sum(), 20)
        for got, want_, got_b in zip(mode_a, want, torch.autograd.grad(loss, (x, W)), strict=True):
            near(got, want_, 2e-5)
            near(got_b, want_, 2e-5)


def test_kl_of_models_far_apart_is_finite_and_exact(device: str) -> None:
    x, W, y = ladder(device)
    x2, W2, _ = inputs(20, 16, 301, seed=3, device=device)
    lp, lq = exact(x, W, y)[4], exact(x2, W2, y)[4]
    close(L.linear_kl(x, W, x2, W2, T), (lp.exp() * (lp - lq)).sum(-1), 3e-4)
    close(L.linear_kl(x, W, x2, W2, T, "forward"), (lq.exp() * (lq - lp)).sum(-1), 3e-4)


def test_mode_a_equals_mode_b(device: str) -> None:
    x, W, y = inputs(device=device)
    loss_fn, *_ = grpo_case(x, W, y)
    logp, _ = L.linear_logprob(x, W, y, T)
    one = torch.autograd.grad(loss_fn(logp, slice(None)), (x, W))
    loss, logp_b = L.linear_policy_loss(x, W, y, T, loss_fn, 16)
    close(logp_b, logp, 1e-6)
    for a, b in zip(one, torch.autograd.grad(loss, (x, W)), strict=True):
        near(b, a, 2e-6)


# ---- what it costs

@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_what_was_never_written_is_never_read(device: str, small_chunks: None) -> None:
    """Every workspace starts as NaN here; one that leaked into a result would show."""
    x, W, y = inputs(device=device)
    x2, W2, _ = inputs(seed=7, device=device)
    torch.use_deterministic_algorithms(True, warn_only=True)                        # fills what torch.empty and its kin return
    try:
        assert torch.empty(9, device=device).isnan().all() and x.new_empty(9).isnan().all()
        results = [*L.linear_logprob(x, W, y, T), L.linear_kl(x, W, x2, W2, T), L.logprob_from_logits(x @ W.T, y, T),
                   L.linear_policy_loss(x, W, y, T, lambda logp, rows: (logp * (logp > -9)).sum(), 16)[0]]
        for out in results:
            grads = torch.autograd.grad(out.sum(), (x, W), retain_graph=True)
            assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
    finally:
        torch.use_deterministic_algorithms(False)


class Watch(TorchDispatchMode):
    """Remembers the largest float tensor that any operation returned, and counts the multiplications and additions of torch's matrix products."""
    elements, flops = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.elements = max(self.elements, t.numel() if isinstance(t, Tensor) and t.is_floating_point() else 0)
        return out


def test_no_tensor_of_n_times_v_elements_ever_exists(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    N, D, V = 32, 16, 640
    monkeypatch.setattr(L, "CPU_ELEMENTS", 16 * V)
    monkeypatch.setattr(L, "WORKSPACE", 256 * N)
    x, W, y = inputs(N, D, V, device=device)
    x2, W2, _ = inputs(N, D, V, seed=3, device=device)
    with Watch() as watch:
        logp, entropy = L.linear_logprob(x, W, y, T)
        (logp + entropy).sum().backward()
        L.linear_policy_loss(x, W, y, T, lambda logp, rows: logp.sum(), 16)[0].backward()
        L.linear_kl(x, W, x2, W2, T).sum().backward()
    assert 16 * V <= watch.elements <= max(256 * N, V * D) < N * V


def matmuls(run: Callable[[], Tensor], F_: int) -> float:
    """Matrix products of torch in forward and backward, in units of one (N, D) x (D, V); Triton's own do not count."""
    with Watch() as watch:
        run().backward()
    return watch.flops / F_


@pytest.mark.parametrize("mode", ["A", "B"])
def test_matmuls_are_counted_and_skipped(device: str, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Mode A: 4 (in the twin as in the kernels), mode B: 3; a frozen head saves one, a frozen body one, rows without gradient both."""
    N, D, V = 64, 16, 320
    monkeypatch.setattr(L, "CPU_ELEMENTS", 32 * V)
    x, W, y = inputs(N, D, V, device=device)
    weights = torch.ones(N, device=device)
    ours = {"A": lambda x, W: (L.linear_logprob(x, W, y, T)[0] * weights).sum(),
            "B": lambda x, W: L.linear_policy_loss(x, W, y, T, lambda logp, rows: (logp * weights[rows]).sum(), 32)[0]}[mode]
    fused, F_ = L._fused(x), 2 * N * D * V
    forward = 0 if fused else (2 if mode == "A" else 1)                             # the kernels' own do not count
    assert matmuls(lambda: ours(x, W), F_) == pytest.approx(forward + 2)
    assert matmuls(lambda: ours(x, W.detach()), F_) == pytest.approx(forward + 1)
    assert matmuls(lambda: ours(x.detach(), W), F_) == pytest.approx(forward + 1)
    if fused or mode == "B":
        weights[N // 4:] = 0
        assert matmuls(lambda: ours(x, W), F_) == pytest.approx(forward + 2 / 4)
        weights[:] = 0
        assert matmuls(lambda: ours(x, W), F_) == pytest.approx(forward)


def test_bf16_inputs_are_summed_in_float32_and_gradients_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L, "CPU_ELEMENTS", 8 * 301)
    x, W, y = inputs(dtype=torch.bfloat16)
    xf, Wf = x.detach().float().requires_grad_(), W.detach().float().requires_grad_()
    for run in (lambda x, W: L.linear_logprob(x, W, y, T)[0].sum(), lambda x, W: L.linear_policy_loss(x, W, y, T, lambda logp, rows: logp.sum())[0]):
        low, high = run(x, W), run(xf, Wf)
        assert low.dtype == torch.float32 and low == high
        for got, want in zip(torch.autograd.grad(low, (x, W)), torch.autograd.grad(high, (xf, Wf)), strict=True):
            assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())


# ---- how it is used

def test_without_grad_there_is_only_the_loss(device: str) -> None:
    x, W, y = inputs(device=device)
    loss_fn, want, *_ = grpo_case(x, W, y)
    with torch.no_grad():
        loss, logp = L.linear_policy_loss(x, W, y, T, loss_fn, 16)
        again, entropy = L.linear_logprob(x, W, y, T)
    close(loss, want, 1e-6)
    assert not any(t.requires_grad for t in (loss, logp, again, entropy))
    assert not L.linear_policy_loss(x.detach(), W.detach(), y, T, loss_fn)[0].requires_grad


def test_tied_embeddings_add_up_both_gradients(device: str) -> None:
    _, W, y = inputs(device=device)
    tokens = torch.randint(301, (21,), generator=torch.Generator().manual_seed(8)).to(device)
    Wd = W.detach().cpu().double().requires_grad_()
    torch.log_softmax(Wd[tokens.cpu()].tanh() @ Wd.T / T, -1).gather(1, y.cpu()[:, None]).sum().backward()
    L.linear_policy_loss(W[tokens].tanh(), W, y, T, lambda logp, rows: logp.sum(), 16)[0].backward()
    near(W.grad, Wd.grad)
    W.grad = None
    L.linear_logprob(W[tokens].tanh(), W, y, T)[0].sum().backward()
    near(W.grad, Wd.grad)


def test_rows_are_slices_that_cover_the_batch_in_order_and_the_loss_may_keep_metrics(device: str, small_chunks: None) -> None:
    x, W, y = inputs(device=device)
    seen, metrics = [], []

    def loss_fn(logp: Tensor, rows: slice) -> Tensor:
        seen.extend(range(*rows.indices(21)))
        assert len(logp) == rows.stop - rows.start <= 10
        metrics.append(logp.detach())
        return logp.sum() * 0
    loss, logp = L.linear_policy_loss(x, W, y, T, loss_fn, 10)
    loss.backward()
    assert seen == list(range(21)) and torch.equal(torch.cat(metrics), logp) and loss == 0 and (x.grad == 0).all()


def test_a_loss_that_ignores_the_log_probs_has_no_gradient(device: str) -> None:
    x, W, y = inputs(device=device)
    loss, _ = L.linear_policy_loss(x, W, y, T, lambda logp, rows: torch.ones((), device=device), 16)
    assert loss == 2                                                                # chunks of 16 and 5 rows
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, W)))


def test_a_second_backward_through_mode_b_is_refused(device: str) -> None:
    x, W, y = inputs(device=device)
    loss, _ = L.linear_policy_loss(x, W, y, T, lambda logp, rows: logp.sum())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_views_and_no_rows_at_all(device: str) -> None:
    x, W, y = inputs(device=device)
    wide = torch.cat([x, x], 1).detach()[:, :48].requires_grad_()
    weight = W.detach().T.contiguous().T.requires_grad_()
    assert not wide.is_contiguous() and not weight.is_contiguous()
    for got, want in zip(torch.autograd.grad(L.linear_logprob(wide, weight, y, T)[0].sum(), (wide, weight)),
                         torch.autograd.grad(L.linear_logprob(x, W, y, T)[0].sum(), (x, W)), strict=True):
        near(got, want, 1e-6)
    logp, entropy = L.linear_logprob(x[:0], W, y[:0], T)
    assert logp.shape == entropy.shape == (0,) and (torch.autograd.grad(logp.sum() + entropy.sum(), W)[0] == 0).all()
    loss, logp = L.linear_policy_loss(x[:0], W, y[:0], T, lambda logp, rows: (logp * torch.ones(5, device=device)[rows]).sum())
    assert logp.shape == (0,) and loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (W, x)))


def test_unusable_inputs_are_refused_with_what_to_change() -> None:
    x, W, y = inputs()
    for error, message, args in ((TypeError, "merge adapters", (x, torch.nn.Linear(48, 301), y, T)), (ValueError, "flatten", (x[None], W, y, T)),
                                 (ValueError, r"\(21, 40\) and \(301, 48\)", (x[:, :40], W, y, T)), (TypeError, "cast one", (x, W.bfloat16(), y, T)),
                                 (TypeError, "float64", (x.double(), W.double(), y, T)), (ValueError, "temperature", (x, W, y, 0.0)),
                                 (ValueError, "int64", (x, W, y.int(), T)), (ValueError, r"\(21,\)", (x, W, y[:5], T)),
                                 (RuntimeError, "outside 0..300", (x, W, y - 301, T)), (RuntimeError, "outside 0..300", (x, W, y + 301, T))):
        for call in (L.linear_logprob, lambda *a: L.linear_policy_loss(*a, lambda logp, rows: logp.sum())):
            with pytest.raises(error, match=message):
                call(*args)
    with pytest.raises(RuntimeError, match="outside 0..300"):
        L.logprob_from_logits(torch.randn(21, 301), y - 301)
    with pytest.raises(ValueError, match="share a vocabulary"):
        L.linear_kl(x, W, x, W[:300])
    with pytest.raises(ValueError, match="'reverse' or 'forward'"):
        L.linear_kl(x, W, x, W, direction="jsd")
    sharded = type("DTensor", (Tensor,), {"full_tensor": lambda self: self})(W.detach())
    with pytest.raises(TypeError, match="gather shards"):
        L.linear_logprob(x, sharded, y)


def test_a_hidden_size_the_kernels_cannot_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, y = inputs(D=40)
    L.linear_logprob(x, W, y)                                                       # the twin takes any
    monkeypatch.setattr(L, "_fused", lambda t: True)
    with pytest.raises(ValueError, match="multiple of 16"):
        L.linear_logprob(x, W, y)


# ---- beside other libraries

def test_equals_torch_linear_cross_entropy(device: str) -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch < 2.13 has no linear_cross_entropy")
    x, W, y = inputs(device=device)
    ours, theirs = -L.linear_logprob(x, W, y)[0].mean(), F.linear_cross_entropy(x, W, y)
    close(ours, theirs, 1e-6)
    for got, want in zip(torch.autograd.grad(ours, (x, W)), torch.autograd.grad(theirs, (x, W)), strict=True):
        near(got, want)


def test_equals_trl_selective_log_softmax(device: str) -> None:
    trl = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    x, W, y = inputs(device=device)
    close(L.linear_logprob(x, W, y)[0], trl.selective_log_softmax(x @ W.T, y), 3e-6)


def test_works_where_triton_is_not_installed() -> None:
    code = ("import sys; sys.modules['triton'] = None\nimport torch, logprob\n"
            "x, w, y = torch.randn(5, 8, requires_grad=True), torch.randn(9, 8), torch.arange(5)\n"
            "logprob.linear_logprob(x, w, y)[0].sum().backward(); logprob.linear_policy_loss(x, w, y, 1.0, lambda logp, rows: logp.sum())[0].backward()\n"
            "assert logprob.triton is None and x.grad.isfinite().all() and x.grad.abs().max() > 0")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the kernels, without and with a GPU

@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_it_on_the_kernels_in_the_interpreter() -> None:
    """The tests above once more, in a process in which Triton interprets its kernels on the CPU (it decides that when it is imported)."""
    pytest.importorskip("triton", reason="triton is not installed: the kernels run nowhere here")
    command = [sys.executable, "-W", "ignore", "-m", "pytest", __file__, "-k", "interpreter", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 30


class Launches:
    """Stands in for a kernel and remembers what it would have been launched with."""
    def __init__(self, kernel: object, seen: list) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **constants: self.seen.append((self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | constants))


def launches(monkeypatch: pytest.MonkeyPatch, capability: int) -> Iterator[tuple[object, dict]]:
    """Every launch of every kernel on a GPU of this capability, from bf16 inputs of Qwen's size that take no memory."""
    seen, N, D, V = [], 777, 1536, 151936
    for name in [n for n in dir(K) if n.endswith("_kernel")]:
        monkeypatch.setattr(K, name, Launches(getattr(K, name), seen))
    monkeypatch.setattr(L, "_fused", lambda t: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
    with torch.device("meta"):
        x, W, z, y, f = *(torch.empty(*s, dtype=torch.bfloat16) for s in ((N, D), (V, D), (N, V))), torch.empty(N, dtype=torch.int64), torch.empty(N)
        L._statistics(x, W, y, T)
        L._statistics(x, W, y, T, z)
        L.linear_kl(x, W, x, W, T)
        for fill in (lambda dz: L._logprob_dz(T, dz, 0, x, W, [f, None], y, f, f, f), lambda dz: L._logprob_dz(T, dz, 0, x, W, [f, f], y, f, f, f),
                     lambda dz: L._kl_dz(T, True, W, dz, 0, x, W, [f], x, f, f, f), lambda dz: L._kl_dz(T, False, W, dz, 0, x, W, [f], x, f, f, f)):
            fill(z[:, :4096])
        logits = z.requires_grad_() * 1
        L.logprob_from_logits(logits, y, T).backward(f)
    yield from seen


def compiled(kernel: object, values: dict, capability: int, tmp_path: Path) -> tuple[str, int, int]:
    """-> ptx, spilled bytes, shared memory of one launch, from Triton's compiler and NVIDIA's assembler."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor
    letters = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64"}
    options = {o: values.pop(o) for o in ("num_warps", "num_stages") if o in values}
    signature, constants, aligned = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        v = values[name]
        if parameter.is_constexpr or v is None:
            signature[name], constants[name] = "constexpr", v
        elif isinstance(v, Tensor):
            signature[name], aligned[(i,)] = "*" + letters[v.dtype], [["tt.divisibility", 16]]
        elif isinstance(v, TensorDescriptor):
            signature[name] = f"tensordesc<{letters[v.base.dtype]}{list(v.block_shape)}>"
        else:
            signature[name] = "fp32" if isinstance(v, float) else "i32"
            if isinstance(v, int) and v % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
    result = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 10 * capability, 32), options=options)
    (tmp_path / "kernel.ptx").write_text(result.asm["ptx"])
    target = re.search(r"\.target (\w+)", result.asm["ptx"]).group(1)
    report = subprocess.run([get_ptxas(10 * capability).path, "-v", f"--gpu-name={target}", str(tmp_path / "kernel.ptx"), "-o", str(tmp_path / "kernel.cubin")],
                            capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill", report)
    assert len(spilled) >= 2, report
    return result.asm["ptx"], sum(map(int, spilled)), result.metadata.shared


@pytest.mark.skipif(INTERPRETED, reason="Triton interprets in this process")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("capability", "shared_limit"), [(10, 227 * 1024), (9, 227 * 1024), (8, 163 * 1024)], ids=["sm_100", "sm_90", "sm_80"])
def test_kernels_compile_without_spilling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, shared_limit: int) -> None:
    """Triton and ptxas need no GPU; on Hopper the tensor cores are to be fed by the copy engine (wgmma, bulk tensor copies)."""
    pytest.importorskip("triton", reason="triton is not installed")
    done = set()
    for kernel, values in launches(monkeypatch, capability):
        ptx, spilled, shared = compiled(kernel, values, capability, tmp_path)
        assert spilled == 0 and shared < shared_limit, f"{kernel.__name__}: {spilled} bytes spilled, {shared} bytes of shared memory"
        if capability == 9 and "tile(" in kernel.src:
            assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx, f"{kernel.__name__} is not on Hopper's fast path"
        if capability == 10 and "tile(" in kernel.src:
            assert "tcgen05.mma" in ptx and "cp.async.bulk.tensor" in ptx, f"{kernel.__name__} is not on Blackwell's fast path"
        done.add(kernel.__name__)
    assert done == {f"{name}_kernel" for name in ("forward", "merge", "dlogits", "kl", "kl_dlogits", "logits", "logits_backward")}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("N", "D", "V"), [(777, 256, 32003), (512, 512, 32768)])
def test_half_precision_on_a_gpu(dtype: torch.dtype, N: int, D: int, V: int) -> None:
    """Against float64 of the same rounded inputs: log-probs to 1e-4 nats; gradients within rounding, and no worse than torch's own in that dtype."""
    x, W, y = inputs(N, D, V, scale=0.25, device="cuda", dtype=dtype)
    a, e = rows_of(N, 2, device="cuda") / 8
    X, Wd = x.detach().double().requires_grad_(), W.detach().double().requires_grad_()
    lp = torch.log_softmax(X @ Wd.T / T, -1)
    logp, entropy = lp.gather(1, y[:, None])[:, 0], -(lp.exp() * lp).sum(-1)
    ours, ours_entropy = L.linear_logprob(x, W, y, T)
    assert (ours - logp).abs().max() < 1e-4 and (ours_entropy - entropy).abs().max() < 5e-4
    for out, weight, mine in ((logp, a, ours), (entropy, e, ours_entropy)):
        want = torch.autograd.grad((weight * out).sum(), (X, Wd), retain_graph=True)
        got = torch.autograd.grad((weight * mine).sum(), (x, W), retain_graph=True)
        assert all(g.dtype == dtype and relative(g, w) < 4e-3 for g, w in zip(got, want, strict=True))
    want = torch.autograd.grad((a * logp).sum(), (X, Wd))
    eager = torch.autograd.grad((a * torch.log_softmax((x @ W.T).float() / T, -1).gather(1, y[:, None])[:, 0]).sum(), (x, W))
    for chunk in (256, 8192):
        loss, _ = L.linear_policy_loss(x, W, y, T, lambda logp, rows: (a[rows] * logp).sum(), chunk)
        got = torch.autograd.grad(loss, (x, W))
        assert all(relative(g, w) < min(4e-3, 1.1 * relative(t, w)) for g, w, t in zip(got, want, eager, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_very_low_temperature_in_bf16_on_a_gpu() -> None:
    """The anchor is a row dot of its own: rounded to bf16 it would be hundreds of log2 units off at this temperature, and every 2^d zero."""
    x, W, _ = inputs(200, 256, 8001, device="cuda", dtype=torch.bfloat16)
    y = (x @ W.T).argmax(1)
    logp, entropy = L.linear_logprob(x, W, y, 1e-3)
    want = torch.log_softmax(x.double() @ W.double().T / 1e-3, -1)
    close(logp, want.gather(1, y[:, None])[:, 0], 1e-2)
    loss, _ = L.linear_policy_loss(x, W, y, 1e-3, lambda logp, rows: logp.sum())
    assert entropy.isfinite().all() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, W)))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_in_bf16_on_a_gpu(direction: str) -> None:
    x, W, _ = inputs(300, 256, 8001, scale=0.25, device="cuda", dtype=torch.bfloat16)
    x2, W2, _ = inputs(300, 128, 8001, seed=3, scale=0.25, device="cuda", dtype=torch.bfloat16)
    X, Wd = x.detach().double().requires_grad_(), W.detach().double().requires_grad_()
    lp, lq = torch.log_softmax(X @ Wd.T / T, -1), torch.log_softmax(x2.detach().double() @ W2.detach().double().T / T, -1)
    want = (lp.exp() * (lp - lq) if direction == "reverse" else lq.exp() * (lq - lp)).sum(-1)
    kl = L.linear_kl(x, W, x2, W2, T, direction)
    close(kl, want, 5e-4)
    for got, w in zip(torch.autograd.grad(kl.sum(), (x, W)), torch.autograd.grad(want.sum(), (X, Wd)), strict=True):
        assert relative(got, w) < 4e-3


@pytest.mark.gpu
@needs_gpu
def test_more_than_two_to_the_31_logits_and_peak_memory_on_a_gpu() -> None:
    N, D, V = 16384, 64, 151936                                                     # N V = 2.5e9
    x, W, y = inputs(N, D, V, device="cuda", dtype=torch.bfloat16)
    sample = torch.tensor([0, 1, 8191, 8192, 14133, 14134, N - 1], device="cuda")   # row 14133 holds element 2^31
    want = torch.log_softmax(x[sample].double() @ W.double().T / T, -1).gather(1, y[sample, None])[:, 0]
    gradients = []
    for run, extra in ((lambda: L.linear_logprob(x, W, y, T)[0].sum(), 2 * L.WORKSPACE),
                       (lambda: L.linear_policy_loss(x, W, y, T, lambda logp, rows: logp.sum(), 4096)[0], 2 * 4096 * V),
                       (lambda: L.linear_policy_loss(x, W, y, T, lambda logp, rows: logp.sum(), N)[0], 2 * N * V)):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients.append(torch.autograd.grad(run(), (x, W)))
        bound = extra + 12 * N * (V // 256 + 1) + 6 * V * D + 16 * N * D + 2**26      # workspace, statistics, gradients in both precisions, small change
        assert torch.cuda.max_memory_allocated() - before < bound
    close(L.linear_logprob(x, W, y, T)[0][sample], want, 1e-5)
    for other in gradients[1:]:
        assert all(relative(g, w) < 6e-3 for g, w in zip(other, gradients[0], strict=True))
    z = (x @ W.T).detach()
    close(L.logprob_from_logits(z, y, T)[sample], torch.log_softmax(z[sample].double() / T, -1).gather(1, y[sample, None])[:, 0], 1e-5)


def test_a_sharded_head_is_refused_and_a_gathered_one_gets_its_gradient(tmp_path: Path) -> None:
    """FSDP2: what fully_shard leaves in the head is a DTensor; full_tensor() gathers it, and the gradient finds its way back to the shard."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        x, W, y = inputs()
        head = torch.nn.Linear(W.shape[1], W.shape[0], bias=False)
        head.weight.data.copy_(W)
        fully_shard(head, mesh=mesh)
        head.reshard()
        with pytest.raises(TypeError, match="gather shards"):
            L.linear_logprob(x, head.weight, y, T)
        for loss in (lambda w: L.linear_logprob(x, w, y, T)[0].sum(), lambda w: L.linear_policy_loss(x, w, y, T, lambda logp, rows: logp.sum())[0]):
            head.zero_grad()
            loss(head.weight.full_tensor()).backward()
            want = torch.autograd.grad(L.linear_logprob_reference(x, W, y, T)[0].sum(), W)[0]
            near(head.weight.grad.full_tensor(), want)
    finally:
        dist.destroy_process_group()
