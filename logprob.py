"""Log-probabilities, entropies and KL of a language-model head, forward and backward, without ever holding the (N, V) logits.

RL needs log p(token) of every sampled token, but the head's logits are (N, V) with V = 152k: 10 GB in bf16 at N = 32768, and rounding them to bf16 costs up to 0.09 nats.
Here a tile of logits lives in registers, in float32, is reduced at once and forgotten. Letters: N rows (tokens), D hidden, V vocabulary, T temperature;
z = hidden @ weight.T / T, p = softmax(z), y = target; F = one (N, D) x (D, V) matmul.

    anchor   c near z_y (d = (z - c) / ln 2, so 2^d = e^(z - c)), a row dot made beforehand: sums over the vocabulary need no running maximum and no rescaling, they just add
    forward  S = sum_v e^(z_v - c),  B = sum_v e^(z_v - c) (z_v - c);    logp = z_y - c - log S,  entropy = log S - B/S
    mode A   linear_logprob, any loss outside: backward makes dz again by vocabulary chunks (4 F), for a = dloss/dlogp, e = dloss/dentropy,
                 dz_v = a (1[v=y] - p_v) - e p_v (entropy + log p_v);    dX = dz W / T,  dW = dz^T X / T
    mode B   linear_policy_loss, the loss evaluated inside, one chunk of rows after another, while E = e^(z - c) is at hand (3 F; frozen head 2 F):
             dz = -(a/S) E, but for the target's E_y - S, so both matmuls take E as it is and only (n, D) things are scaled: dX = k (E W),  dW += E^T (k X),  k = -a / (S T)
    KL       reverse KL(p||q) = sum p (z - t) - lse_z + lse_t,  dz_v = p_v (log p_v - log q_v - KL);    forward KL(q||p),  dz_v = p_v - q_v

Every sum is float32, under torch.autocast too, gradients are rounded to the inputs' dtype once, rows with zero gradient cost no backward matmul (mode B: where they are over a
quarter). Targets far below the maximum stay exact: a tile past 2^64 times the anchor is summed again relative to its own maximum, and mode B, whose E would not fit (log-prob
< -44 nats), stores p for such a row. In fp16, which has no room for E, mode B is mode A.

The kernels (kernels.py) run on CUDA where Triton is installed, the plain `..._reference` twins at the end anywhere else. Memory on top of inputs and gradients (bf16):
forward 12 V/256 bytes a row and 8 D of 2,048 rows; mode A 0.5 GB and N D float32; mode B chunk x V, and V D float32 when N > chunk. Alone: `pytest tests/test_logprob.py`
checks all of it against float64, `python bench.py logprob` measures it beside others. Left out on purpose: masks (drop the rows), bias, softcap, entropy inside mode B, shards of
the vocabulary, double backward. Recomputation is from cut cross-entropy (Wijmans et al. 2024), gradients made in the forward pass from Liger (Hsu et al. 2024).
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import LIMIT, LN2, LOG2E, triton

WORKSPACE = 1 << 28         # elements of dz that backward holds at once (0.5 GB in bf16)
CPU_ELEMENTS = 1 << 20      # logits that a twin holds at once: about a CPU's cache
CHUNK = 8192                # rows of mode B at a time
COMPACT_BELOW = 0.75        # mode B: share of live rows under which moving them together costs less than multiplying the dead ones
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LossFn = Callable[[Tensor, slice], Tensor]


def _workspace(rows: int, cols: int, like: Tensor) -> Tensor:
    """(rows, cols) whose rows begin at multiples of 16 bytes, as descriptors ask."""
    return like.new_empty(rows, -(-cols // 8) * 8)[:, :cols]


def _matmul(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """a @ b in float32, added to `into` where given: bf16 and fp16 operands stay on the tensor cores, the accumulator is never rounded."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32) if into is None else torch.addmm(into, a, b, out_dtype=torch.float32, out=into)
    return torch.mm(a.float(), b.float()) if into is None else into.addmm_(a.float(), b.float())


def _merge(part: Tensor) -> tuple[Tensor, Tensor]:
    (_, tiles, N), (lse, mean) = part.shape, part.new_empty(2, part.shape[2])
    kernels.merge_kernel[(triton.cdiv(N, 32),)](part, lse, mean, N, part[0].numel(), tiles=tiles, BT=64, BN=32)
    return lse, mean


def _statistics(x: Tensor, weight: Tensor, targets: Tensor, T: float, E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp and entropy in nats, log2 S and the anchor in log2 units, all (N,); E (N, V), if given, receives 2^d, clamped at 2^LIMIT."""
    (N, D), V, tiles = x.shape, len(weight), kernels.tile_sizes(x)
    near = [(part * weight[y].float()).sum(-1) for part, y in zip(x.split(2048), targets.split(2048), strict=True)]        # float32: a bf16 one may be far at a low T
    anchor = (torch.cat(near) * (LOG2E / T)).round()                                # whole, so that its rounding does not show
    hit, part = torch.empty_like(anchor), anchor.new_empty(3, triton.cdiv(V, tiles["BV"]), N)
    kernels.launch(kernels.forward_kernel, tiles, V, (x, weight), targets, anchor, hit, part, None if E is None else kernels.output_blocks(E, tiles), N, part[0].numel(),
                   LOG2E / T, D=D, V=V, LIMIT=LIMIT)
    lse, mean = _merge(part)
    return ((hit - lse) * LN2).clamp(max=0.0), (lse - mean) * LN2, lse, anchor


def _logprob_dz(T: float, dz: Tensor, v: int, x: Tensor, weight: Tensor, grads: list[Tensor | None], y: Tensor, logp: Tensor, entropy: Tensor, norm: Tensor) -> None:
    """dz / T of mode A for the columns from v; norm is log2 of the sum of 2^z."""
    (N, width), tiles, (a, e) = dz.shape, kernels.tile_sizes(x), (g if g is None else g / T for g in grads)
    a = torch.zeros_like(logp) if a is None else a
    A, G, at_target = -a, None, -a * torch.expm1(logp)                              # a (1 - p_y), with all its digits where p_y is near 1
    if e is not None:
        A, G, at_target = A - e * entropy, e * LN2, at_target - e * logp.exp() * (entropy + logp)
    kernels.launch(kernels.dlogits_kernel, tiles, width, (x, weight), norm, A, G, kernels.output_blocks(dz, tiles), N, v, width, LOG2E / T, D=x.shape[1])
    column = (y - v).clamp(0, width - 1)[:, None]
    dz.scatter_(1, column, torch.where((y - v)[:, None] == column, at_target[:, None].to(dz.dtype), dz.gather(1, column)))


def _kl_dz(T: float, reverse: bool, W2: Tensor, dz: Tensor, v: int, x: Tensor, weight: Tensor, grads: list[Tensor],
           x2: Tensor, lse: Tensor, lse2: Tensor, kl: Tensor) -> None:
    (N, width), tiles, a = dz.shape, kernels.tile_sizes(x, 2), grads[0] * ((LN2 if reverse else 1.0) / T)
    kernels.launch(kernels.kl_dlogits_kernel, tiles, width, (x, weight, x2, W2), lse, lse2, kl, a, kernels.output_blocks(dz, tiles), N, v, width, LOG2E / T,
                   D=x.shape[1], D2=x2.shape[1], REVERSE=reverse)


class _Recomputed(torch.autograd.Function):
    """Outputs (N,) made beforehand from saved (N, ...) tensors; backward lets `fill` make dz again, one chunk of the vocabulary after another."""
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, fill: Callable[..., None], outputs: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden, weight, *saved)
        ctx.fill = fill
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        hidden, weight, *saved = ctx.saved_tensors
        live = torch.stack([g != 0 for g in grads if g is not None]).any(0).nonzero()[:, 0]
        x, saved, grads = hidden[live], [t[live] for t in saved], [g if g is None else g[live] for g in grads]
        (n, V), chunks = (len(x), len(weight)), max(1, -(-len(x) * len(weight) // WORKSPACE))
        step = -(-V // chunks // 256) * 256                                         # whole tiles, chunks of about one size
        (need_x, need_w, *_), buffer = ctx.needs_input_grad, _workspace(n, min(step, V), x)
        dX, dW = torch.zeros_like(x, dtype=torch.float32) if need_x else None, torch.zeros_like(weight) if need_w else None
        for v in range(0, V if n else 0, step):
            dz, part = buffer[:, :min(step, V - v)], slice(v, min(v + step, V))
            ctx.fill(dz, v, x, weight, grads, *saved)
            if need_x:
                _matmul(dz, weight[part], into=dX)
            if need_w:
                torch.mm(dz.T, x, out=dW[part])                                     # final at once: only dX accumulates
        return torch.zeros_like(hidden).index_copy_(0, live, dX.to(hidden.dtype)) if need_x else None, dW, None, None, None


class _Precomputed(torch.autograd.Function):
    """A loss whose gradients exist already; they are scaled in place and handed over, so backward runs once."""
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, loss: Tensor, dX: Tensor | None, dW: Tensor | None) -> Tensor:
        ctx.gradients = (dX, dW)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("linear_policy_loss hands its gradients over in its one backward pass: call it again, or use linear_logprob")
        (dX, dW), ctx.gradients = ctx.gradients, None
        return None if dX is None else dX.mul_(g), None if dW is None else dW.mul_(g), None, None, None


class _LogprobFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, T: float) -> Tensor:
        lse, logp = logits.new_empty(2, len(logits), dtype=torch.float32)
        kernels.logits_kernel[(len(logits),)](logits, targets, lse, logp, logits.stride(0), LOG2E / T, V=logits.shape[1], BLOCK=4096, num_warps=8)
        ctx.save_for_backward(logits, targets, lse, logp)
        ctx.temperature = T
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, a: Tensor):
        logits, targets, lse, logp = ctx.saved_tensors
        (N, V), T = logits.shape, ctx.temperature
        kernels.logits_backward_kernel[(N, triton.cdiv(V, 4096))](logits, targets, lse, logp, a / T, logits.stride(0), LOG2E / T, V=V, BLOCK=4096, num_warps=8)
        torch.autograd.graph.increment_version(logits)                              # whoever still wants the logits gets torch's error, not our gradient
        return logits, None, None


def _evaluate(loss_fn: LossFn, logp: Tensor, rows: slice, wanted: bool) -> tuple[Tensor, Tensor]:
    """The loss of a chunk and its gradient a (n,) in the log-probs: any loss at all, for the price of an (n,) autograd graph."""
    with torch.set_grad_enabled(wanted):
        leaf = logp.detach().requires_grad_(wanted)
        loss = loss_fn(leaf, rows)
        a = torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else torch.zeros_like(leaf)
    return loss.detach(), a


def _chunk_gradients(E: Tensor, x: Tensor, weight: Tensor, y: Tensor, T: float, stats: tuple[Tensor, ...], a: Tensor, dX: Tensor | None, dW: Tensor | None, only: bool) -> None:
    """The two matmuls of n rows, E overwritten: fills dX (n, D), fills (where this is the `only` chunk) or adds to dW (V, D)."""
    logp, _, lse, anchor = stats
    for far in ((lse > LIMIT) & (a != 0)).nonzero()[:, 0].split(256):               # does not fit relative to the anchor: p itself, as if S = 1
        E[far] = torch.exp2(_matmul(x[far], weight.T) * (LOG2E / T) - (lse + anchor)[far, None]).to(E.dtype)
    S = torch.where(lse > LIMIT, 1.0, torch.exp2(lse))
    k = -a / (S * T)
    E.scatter_(1, y[:, None], (S * torch.expm1(logp))[:, None].to(E.dtype))         # E_y - S = -S (1 - p_y)
    live = k.nonzero()[:, 0]
    if len(live) < COMPACT_BELOW * len(k):
        for i in range(0, len(live), 256):                                          # in place: a row's source never lies before its place
            E[i:min(i + 256, len(live))] = E[live[i:i + 256]]
        E, x, k = E[:len(live)], x[live], k[live]
    else:
        live = torch.arange(len(k), device=k.device)
    if len(live) and dX is not None:
        dX.index_copy_(0, live, (k[:, None] * _matmul(E, weight)).to(dX.dtype))
    if len(live) and dW is not None:
        kx = (k[:, None] * x).to(x.dtype)
        torch.mm(E.T, kx, out=dW) if only else _matmul(E.T, kx, into=dW)


def _policy_loss(x: Tensor, weight: Tensor, y: Tensor, T: float, loss_fn: LossFn, chunk: int, needs: list[bool]) -> tuple[Tensor | None, ...]:
    N, only = len(x), len(x) <= chunk
    logp, total = x.new_empty(N, dtype=torch.float32), x.new_zeros((), dtype=torch.float32)
    dX = torch.zeros_like(x) if needs[0] else None
    dW = torch.zeros_like(weight, dtype=weight.dtype if only else torch.float32) if needs[1] else None
    buffer = _workspace(min(chunk, N), len(weight), x) if any(needs) else None
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        E = buffer[:rows.stop - start] if any(needs) else None
        stats = _statistics(x[rows], weight, y[rows], T, E)
        logp[rows] = stats[0]
        loss, a = _evaluate(loss_fn, stats[0], rows, any(needs))
        total += loss
        if E is not None:
            _chunk_gradients(E, x[rows], weight, y[rows], T, stats, a, None if dX is None else dX[rows], dW, only)
    buffer = E = None                                                               # before dW is copied
    return total, logp, dX, None if dW is None else dW.to(weight.dtype)


# ---- what others call

def _fused(t: Tensor) -> bool:
    return triton is not None and t.is_cuda and len(t) > 0


def _check(hidden: Tensor, weight: Tensor, temperature: float, chunk: int = 1) -> None:
    if not isinstance(weight, Tensor) or hasattr(weight, "full_tensor"):
        raise TypeError(f"weight must be a plain (V, D) tensor, not {type(weight).__name__}: merge adapters into it, gather shards (.full_tensor()) first")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be (N, D) and weight (V, D), not {tuple(hidden.shape)} and {tuple(weight.shape)}: flatten it, drop masked rows")
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise TypeError(f"hidden and weight must both be float32, bfloat16 or float16, not {hidden.dtype} and {weight.dtype}: cast one of them")
    if _fused(hidden) and hidden.shape[1] % 16:
        raise ValueError(f"the kernels need a hidden size that is a multiple of 16, not {hidden.shape[1]}: pad both inputs with zero columns")
    if not (temperature > 0 and chunk > 0):
        raise ValueError(f"temperature and chunk must be positive, not {temperature} and {chunk}")


def _check_targets(targets: Tensor, N: int, V: int) -> Tensor:
    if targets.shape != (N,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be ({N},) int64, not {tuple(targets.shape)} {targets.dtype}")
    torch._assert_async(((targets >= 0) & (targets < V)).all(), f"a target lies outside 0..{V - 1}: drop ignored rows before the call")
    return targets.contiguous()


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy in nats, both (N,) float32, of softmax(hidden @ weight.T / temperature); hidden (N, D), weight (V, D), targets (N,).

    Differentiable in both inputs through both outputs (mode A: one matmul forward; three backward, two with a frozen head)."""
    _check(hidden, weight, temperature)
    targets = _check_targets(targets, len(hidden), len(weight))
    if not _fused(hidden):
        return linear_logprob_reference(hidden, weight, targets, temperature)
    hidden, weight = hidden.contiguous(), weight.contiguous()
    with torch.no_grad():
        logp, entropy, lse, anchor = _statistics(hidden, weight, targets, temperature)
    return _Recomputed.apply(hidden, weight, partial(_logprob_dz, temperature), (logp, entropy), (targets, logp, entropy, lse + anchor))


def linear_policy_loss(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, loss_fn: LossFn, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """The sum over chunks of loss_fn(logp (n,), rows) -> scalar, and the log-probs (N,) detached; rows is the chunk's slice of the N rows.

    The gradients are ready when this returns (mode B: three matmuls in all, two with a frozen head), so loss_fn must add up over chunks (divide by
    counts known beforehand), only logp carries gradient (what else it closes over is constant), and backward runs once per call."""
    _check(hidden, weight, temperature, chunk)
    targets = _check_targets(targets, len(hidden), len(weight))
    if not _fused(hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return linear_policy_loss_reference(hidden, weight, targets, temperature, loss_fn, chunk)
    if hidden.dtype == torch.float16:                                               # 2^d does not fit fp16: mode A
        logp, _ = linear_logprob(hidden, weight, targets, temperature)
        return torch.stack([loss_fn(part, slice(i * chunk, i * chunk + len(part))) for i, part in enumerate(logp.split(chunk))]).sum(), logp.detach()
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight)]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        loss, logp, dX, dW = _policy_loss(hidden.contiguous(), weight.contiguous(), targets, temperature, loss_fn, chunk, needs)
    return _Precomputed.apply(hidden, weight, loss, dX, dW), logp


def linear_kl(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, temperature: float = 1.0, direction: str = "reverse") -> Tensor:
    """Exact KL over the whole vocabulary, (N,) float32 nats: "reverse" is KL(student || teacher), "forward" KL(teacher || student).

    Differentiable in hidden (N, D) and weight (V, D); the teacher, (N, D2) and (V, D2), gets no gradient. Two matmuls forward, four backward."""
    _check(hidden, weight, temperature)
    _check(teacher_hidden, teacher_weight, temperature)
    if direction not in ("reverse", "forward") or len(hidden) != len(teacher_hidden) or len(weight) != len(teacher_weight):
        raise ValueError("direction is 'reverse' or 'forward', and both models must see the same rows and share a vocabulary")
    if not _fused(hidden):
        return linear_kl_reference(hidden, weight, teacher_hidden, teacher_weight, temperature, direction)
    reverse, V, tiles = direction == "reverse", len(weight), kernels.tile_sizes(hidden, 2)
    student, teacher = (hidden.contiguous(), weight.contiguous()), (teacher_hidden.detach().contiguous(), teacher_weight.detach().contiguous())
    operands = student + teacher if reverse else teacher + student
    with torch.no_grad():
        part, part2 = hidden.new_empty(2, 3, triton.cdiv(V, tiles["BV"]), len(hidden), dtype=torch.float32)
        kernels.launch(kernels.kl_kernel, tiles, V, operands, part, part2, len(hidden), part[0].numel(), LOG2E / temperature, D=operands[0].shape[1], D2=operands[2].shape[1], V=V)
        (lse, mean), (lse2, _) = _merge(part), _merge(part2)
        kl = mean - lse + lse2                                                      # in log2 units
        norms = (lse, lse2) if reverse else (lse2, lse)                             # the student's first
    return _Recomputed.apply(*student, partial(_kl_dz, temperature, reverse, teacher[1]), ((kl * LN2).clamp(min=0.0),), (teacher[0], *norms, kl))[0]


def logprob_from_logits(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target), (N,) float32 nats, of softmax(logits / temperature) where logits (N, V) exist anyway.

    With the kernels backward writes the gradient over the logits: no second (N, V), but nothing else may need them then (torch raises if something does)."""
    if logits.dim() != 2 or logits.dtype not in DTYPES or not temperature > 0:
        raise ValueError(f"logits must be (N, V) float32, bfloat16 or float16 and temperature positive, not {tuple(logits.shape)} {logits.dtype} and {temperature}")
    targets = _check_targets(targets, *logits.shape)
    if not _fused(logits):
        return logprob_from_logits_reference(logits, targets, temperature)
    dense = logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]           # backward writes there: no two entries may share a place
    return _LogprobFromLogits.apply(logits if dense else logits.contiguous(), targets, temperature)


# ---- plain twins: what runs without a GPU, and what the kernels are compared with

def _by_rows(function: Callable[..., tuple[Tensor, ...]], V: int, *rows: Tensor) -> tuple[Tensor, ...]:
    """function over chunks of rows that hold at most CPU_ELEMENTS logits; where there are several, backward makes them again instead of keeping them."""
    chunks = list(zip(*(t.split(max(1, CPU_ELEMENTS // V)) for t in rows), strict=True))
    with torch.autocast(rows[0].device.type, enabled=False):
        parts = [function(*c) if len(chunks) == 1 or not torch.is_grad_enabled() else checkpoint(function, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks]
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))


def linear_logprob_reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    weight = weight.float()

    def rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        lp = torch.log_softmax(x.float() / temperature @ weight.T, -1)              # (n, V)
        return lp.gather(1, y[:, None])[:, 0], -(lp.exp() * lp).sum(-1)
    return _by_rows(rows, len(weight), hidden, targets)


def linear_policy_loss_reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, loss_fn: LossFn, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight)]
    x, W, losses, logps = hidden.detach().float() / temperature, weight.detach().float(), [], []
    dX, dW = (torch.zeros_like(t) if need else None for t, need in zip((x, W), needs, strict=True))
    for start in range(0, max(1, len(x)), step := min(chunk, max(1, CPU_ELEMENTS // len(W)))):      # no rows: one empty chunk
        rows = slice(start, min(start + step, len(x)))
        lp, y = torch.log_softmax(x[rows] @ W.T, -1), targets[rows, None]           # (n, V)
        logps.append(lp.gather(1, y)[:, 0])
        loss, a = _evaluate(loss_fn, logps[-1], rows, any(needs))
        losses.append(loss)
        live = a.nonzero()[:, 0]
        dz = lp.index_select(0, live).exp_().mul_(-a[live, None]).scatter_add_(1, y[live], a[live, None])
        if needs[0]:
            dX[rows].index_copy_(0, live, dz @ W / temperature)
        if needs[1]:
            dW.addmm_(dz.T, x[rows][live])
    dX, dW = (None if d is None else d.to(hidden.dtype) for d in (dX, dW))
    return _Precomputed.apply(hidden, weight, torch.stack(losses).sum(), dX, dW), torch.cat(logps)


def linear_kl_reference(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, temperature: float = 1.0, direction: str = "reverse") -> Tensor:
    weight, teacher_weight = weight.float(), teacher_weight.detach().float()

    def rows(x: Tensor, t: Tensor) -> tuple[Tensor]:
        lp, lq = torch.log_softmax(x.float() / temperature @ weight.T, -1), torch.log_softmax(t.float() / temperature @ teacher_weight.T, -1)
        first, second = (lp, lq) if direction == "reverse" else (lq, lp)
        return ((first.exp() * (first - second)).sum(-1),)
    return _by_rows(rows, len(weight), hidden, teacher_hidden.detach())[0]


def logprob_from_logits_reference(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.log_softmax(logits.float() / temperature, -1).gather(1, targets[:, None])[:, 0]
