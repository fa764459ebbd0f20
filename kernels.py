"""The Triton kernels of logprob.py and how they are launched: the formulas are in that file's docstring, tests/test_logprob.py checks both together.

A tile is (BM rows) x (BV vocabulary entries) of logits, summed over D in blocks of BK, in float32 registers; operands come through tensor descriptors
(on Hopper: the copy engine). In here z, d and lse are in log2 units, because exp2 is the hardware's exponential.
"""
from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:                            # macOS, Windows: the twins need none of it
    triton = None

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
LIMIT = 64.0                # log2 units above the anchor: up to here 2^d sums in float32 and stores in bf16 with room to spare
kernel = triton.jit if triton else lambda function: function


@kernel
def place(pid, N, V, BM: tl.constexpr, BV: tl.constexpr, GROUP: tl.constexpr):
    """Tile order: GROUP row tiles in turn share one tile of the weight while it is in L2."""
    n_rows, n_cols = tl.cdiv(N, BM), tl.cdiv(V, BV)
    first = pid // (GROUP * n_cols) * GROUP
    height = min(n_rows - first, GROUP)
    return first + pid % (GROUP * n_cols) % height, pid % (GROUP * n_cols) // height


@kernel
def tile(X, W, row, col, scale, D: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """X[row:row+BM] @ W[col:col+BV].T * scale in float32; descriptors read zeros past every edge."""
    acc = tl.zeros((BM, BV), tl.float32)
    for k in range(0, D, BK):
        acc = tl.dot(X.load([row, k]), W.load([col, k]).T, acc, input_precision="ieee")
    return acc * scale


@kernel
def forward_kernel(X, W, Y, Anchor, Hit, Part, E, N, size, scale, D: tl.constexpr, V: tl.constexpr, LIMIT: tl.constexpr,
                    BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """Part (3, tiles, N): per tile and row an offset, sum 2^(d - offset) and sum 2^(d - offset) d; Hit (N,): the target's d; E (N, V), if wanted: 2^d."""
    m, v = place(tl.program_id(0), N, V, BM, BV, GROUP)
    rows, cols = m * BM + tl.arange(0, BM), v * BV + tl.arange(0, BV)
    anchor = tl.load(Anchor + rows, rows < N, other=0.0)[:, None]
    y = tl.load(Y + rows, rows < N, other=-1).to(tl.int32)
    here, inside = (y >= v * BV) & (y < v * BV + BV), (cols < V)[None, :]
    d = tl.where(inside, tile(X, W, m * BM, v * BV, scale, D, BM, BV, BK) - anchor, -1e4)    # about log2(p_v / p_y); -1e4 weighs nothing
    if tl.max(here.to(tl.int32), 0) > 0:                                           # one tile in five: z_y from the same sums as every z_v
        tl.store(Hit + rows, tl.sum(tl.where(cols[None, :] == y[:, None], d, 0.0), 1), here)
    e = tl.exp2(tl.minimum(d, LIMIT))
    offset, total, first = tl.zeros((BM,), tl.float32), tl.sum(e, 1), tl.sum(e * d, 1)
    if E is not None:
        E.store([m * BM, v * BV], e.to(E.dtype))
    if tl.log2(tl.max(tl.reshape(total, [BM, 1]))) >= LIMIT:                       # hardly ever: made again rather than kept in registers. A column: for triton 3.6 and sm_100
        d = tl.where(inside, tile(X, W, m * BM, v * BV, scale, D, BM, BV, BK) - anchor, -1e4)
        offset = tl.where(tl.max(d, 1) > LIMIT, tl.max(d, 1), 0.0)
        e = tl.exp2(d - offset[:, None])
        total, first = tl.sum(e, 1), tl.sum(e * d, 1)
    at = Part + v.to(tl.int64) * N + rows
    tl.store(at, offset, rows < N)
    tl.store(at + size, total, rows < N)
    tl.store(at + size + size, first, rows < N)                                    # not 2 * size: 32 bits do not hold that of half a million rows


@kernel
def merge_kernel(Part, Lse, Mean, N, size, tiles: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """Adds up Part (3, tiles, N) in a fixed order: Lse = log2 of the whole sum, Mean = third part / sum."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    top, total, first = tl.full((BN,), -1e30, tl.float32), tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        at, ok = Part + t[:, None].to(tl.int64) * N + n[None, :], (t < tiles)[:, None] & (n < N)[None, :]
        offset = tl.load(at, ok, other=-1e30)
        higher = tl.maximum(top, tl.max(offset, 0))
        old, new = tl.exp2(top - higher), tl.exp2(offset - higher[None, :])
        total = total * old + tl.sum(tl.load(at + size, ok, other=0.0) * new, 0)
        first = first * old + tl.sum(tl.load(at + size + size, ok, other=0.0) * new, 0)
        top = higher
    tl.store(Lse + n, top + tl.log2(total), n < N)
    tl.store(Mean + n, first / total, n < N)


@kernel
def dlogits_kernel(X, W, Lse, A, G, DZ, N, start, width, scale, D: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """dz = p (A - G log2 p) for `width` columns from `start`; the target's entry is not right yet."""
    m, v = place(tl.program_id(0), N, width, BM, BV, GROUP)
    rows = tl.minimum(m * BM + tl.arange(0, BM), N - 1)                            # rows past the last are clipped by the store
    t = tile(X, W, m * BM, start + v * BV, scale, D, BM, BV, BK) - tl.load(Lse + rows)[:, None]
    dz = tl.load(A + rows)[:, None]
    if G is not None:
        dz = dz - t * tl.load(G + rows)[:, None]
    DZ.store([m * BM, v * BV], (tl.exp2(t) * dz).to(DZ.dtype))


@kernel
def kl_kernel(X, W, X2, W2, Part, Part2, N, size, scale, D: tl.constexpr, D2: tl.constexpr, V: tl.constexpr,
               BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """For KL(first || second): Part (3, tiles, N) as above with the first model's maximum as offset and z - t in place of d; Part2 (2, tiles, N)."""
    m, v = place(tl.program_id(0), N, V, BM, BV, GROUP)
    rows, inside = m * BM + tl.arange(0, BM), (v * BV + tl.arange(0, BV) < V)[None, :]
    z = tl.where(inside, tile(X, W, m * BM, v * BV, scale, D, BM, BV, BK), -1e30)
    t = tl.where(inside, tile(X2, W2, m * BM, v * BV, scale, D2, BM, BV, BK), -1e30)
    top, top2 = tl.max(z, 1), tl.max(t, 1)
    e, at = tl.exp2(z - top[:, None]), v.to(tl.int64) * N + rows
    tl.store(Part + at, top, rows < N)
    tl.store(Part + at + size, tl.sum(e, 1), rows < N)
    tl.store(Part + at + size + size, tl.sum(e * (z - t), 1), rows < N)
    tl.store(Part2 + at, top2, rows < N)
    tl.store(Part2 + at + size, tl.sum(tl.exp2(t - top2[:, None]), 1), rows < N)


@kernel
def kl_dlogits_kernel(X, W, X2, W2, Lse, Lse2, Kl, A, DZ, N, start, width, scale, D: tl.constexpr, D2: tl.constexpr, REVERSE: tl.constexpr,
                       BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    m, v = place(tl.program_id(0), N, width, BM, BV, GROUP)
    rows = tl.minimum(m * BM + tl.arange(0, BM), N - 1)
    lp = tile(X, W, m * BM, start + v * BV, scale, D, BM, BV, BK) - tl.load(Lse + rows)[:, None]
    lq = tile(X2, W2, m * BM, start + v * BV, scale, D2, BM, BV, BK) - tl.load(Lse2 + rows)[:, None]
    a, kl = tl.load(A + rows)[:, None], tl.load(Kl + rows)[:, None]
    dz = a * tl.exp2(lp) * (lp - lq - kl) if REVERSE else a * (tl.exp2(lp) - tl.exp2(lq))
    DZ.store([m * BM, v * BV], dz.to(DZ.dtype))


@kernel
def logits_kernel(Z, Y, Lse, Logp, stride, scale, V: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program, one pass: every lane keeps its own maximum and sum, and they meet once at the end."""
    n, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    target = tl.load(Z + n * stride + tl.load(Y + n)).to(tl.float32) * scale
    top, total = tl.full((BLOCK,), 1.0, tl.float32) * tl.maximum(target, -1e30), tl.zeros((BLOCK,), tl.float32)       # -inf - -inf would be NaN
    for v in range(0, V, BLOCK):
        z = tl.load(Z + n * stride + v + k, v + k < V, other=float("-inf")).to(tl.float32) * scale
        higher = tl.maximum(top, z)
        total = total * tl.exp2(top - higher) + tl.exp2(z - higher)
        top = higher
    peak = tl.max(top, 0)
    lse = peak + tl.log2(tl.sum(total * tl.exp2(top - peak), 0))
    tl.store(Lse + n, lse)
    tl.store(Logp + n, (target - lse) / 1.4426950408889634)


@kernel
def logits_backward_kernel(Z, Y, Lse, Logp, A, stride, scale, V: tl.constexpr, BLOCK: tl.constexpr):
    """Overwrites a block of a row of logits with A (1[v=y] - p), A = a/T; a row with A = 0 is not even read."""
    n, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a, at = tl.load(A + n), Z + n * stride + cols
    p = tl.exp2(tl.load(at, cols < tl.where(a != 0, V, 0), other=float("-inf")).to(tl.float32) * scale - tl.load(Lse + n))
    dz = tl.where(cols == tl.load(Y + n), a * (1 - tl.exp(tl.load(Logp + n))), -a * p)
    tl.store(at, dz.to(Z.dtype.element_ty), cols < V)


# ---- launches

def tile_sizes(t: Tensor, accumulators: int = 1) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages: all the tuning there is."""
    if t.device.type == "cpu":                                                     # Triton's interpreter
        return {"BM": 16, "BV": 32, "BK": 16, "GROUP": 4}
    if t.dtype == torch.float32:                                                   # exact products, no tensor cores
        return {"BM": 64, "BV": 64, "BK": 16, "GROUP": 8, "num_warps": 8, "num_stages": 2}
    if (major := torch.cuda.get_device_capability(t.device)[0]) in (9, 10):        # H100, H200; B200, where 256 would spill
        return {"BM": 128, "BV": (256 if major == 9 else 128) // accumulators, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    return {"BM": 64, "BV": 128, "BK": 32, "GROUP": 8, "num_warps": 8, "num_stages": 3}


def launch(function, tiles: dict[str, int], width: int, operands: tuple[Tensor, ...], *args: Tensor | TensorDescriptor | float | None, **constants) -> None:
    """One program per tile; operands (hidden, weight, ...) become descriptors of (BM, BK) and (BV, BK) blocks by turns."""
    blocks = [TensorDescriptor.from_tensor(t, [tiles["BV" if i % 2 else "BM"], tiles["BK"]]) for i, t in enumerate(operands)]
    function[(triton.cdiv(len(operands[0]), tiles["BM"]) * triton.cdiv(width, tiles["BV"]),)](*blocks, *args, **constants, **tiles)


def output_blocks(t: Tensor, tiles: dict[str, int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(t, [tiles["BM"], tiles["BV"]])


