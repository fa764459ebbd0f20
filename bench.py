"""Speed, memory and error, measured side by side: the head's log-probs here, sampling and whole steps in bench_rl.py.

logprob: for each model shape and number of rows, one table: milliseconds (median), TFLOP/s and peak memory on top of the inputs, for the log-probs alone and
for forward + backward of a clipped GRPO loss with k3 and a weight per token; errors against float64 of the same rounded inputs. The rate counts the
FLOPs that are needed, 2 N D V forward and 6 N D V with both gradients, whatever an implementation really spends; the cuBLAS rows are bare matmuls, the roof.

    python bench.py logprob                                    all shapes and rows on a GPU; on a CPU small shapes, memory and errors only
    python bench.py logprob --shape 1.5b --rows 8192 --data peaked --only ours cuBLAS
    python bench.py logprob --tune --shape 1.5b --rows 8192     forward tile sizes, one line each, fastest last
    python bench.py rollout                                    sampling: tokens per second, useful ones only, and the share of what the hardware allows
    python bench.py step                                       whole RL steps, beside TRL's (pip install trl)

How: implementations take turns inside a round, so that clocks and temperature drift for all alike; warm-ups first; the L2 cache is overwritten before
each run; the median of the rounds. Memory on a CPU counts the tensors that torch's dispatcher sees, not the inside of an operator. "random" data is
white noise; "peaked" has logits of standard deviation 8 and targets drawn from the model, like a trained model's. Left out: several GPUs, gradients
of the entropy, and tuning any peer beyond its defaults.
"""
from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import bench_rl
import kernels
import logprob
import peers
from command import Parser, at_least, ending
from peers import LENGTH, PEER_ERRORS, Case
from watch import machine

SHAPES = {"1.5b": (1536, 151936), "1.7b": (2048, 151936), "7b": (3584, 152064), "tiny": (64, 4099)}      # (D, V) of Qwen2.5-1.5B, Qwen3-1.7B, Qwen2.5-7B


def make_case(N: int, D: int, V: int, data: str, temperature: float, device: str, dtype: torch.dtype) -> Case:
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, D, generator=g, device=device).to(dtype)
    W = (torch.randn(V, D, generator=g, device=device) * ((8 if data == "peaked" else 1) / D ** 0.5)).to(dtype)
    y = torch.randint(V, (N,), generator=g, device=device)
    if data == "peaked":
        y = torch.cat([torch.softmax(part.float() @ W.float().T / temperature, -1).multinomial(1, generator=g)[:, 0] for part in x.split(256)])
    logp, _ = logprob.linear_logprob(x, W, y, temperature)
    old, ref = (logp + 0.1 * torch.randn(N, generator=g, device=device) for _ in range(2))
    advantages = torch.randn(-(-N // LENGTH), generator=g, device=device).repeat_interleave(LENGTH)[:N]
    weights = torch.rand(N, generator=g, device=device) / N
    return Case(x.requires_grad_(), W.requires_grad_(), y, advantages, weights, old, ref, temperature)


@dataclass
class Row:
    """An implementation: log-probs, a step of the same GRPO loss (`own` where it is another loss or has no gradients of both), or both."""
    name: str
    logp: Callable[[Case], Tensor] | None = None
    loss: Callable[[Case], Tensor] | None = None
    bare: tuple[str, str] | None = None
    comparable: bool = True
    products: int = 3                                                               # (N, D) x (D, V) that a step needs

    def forward(self, case: Case) -> Tensor | None:
        with torch.no_grad():
            return peers.bare(self.bare[0])(case) if self.bare else self.logp(case)

    def step(self, case: Case) -> tuple[Tensor | None, ...] | None:
        if self.bare:
            return peers.bare(self.bare[1])(case)
        loss = self.loss(case) if self.loss else case.loss(self.logp(case))
        return torch.autograd.grad(loss, (case.hidden, case.weight), allow_unused=True)


def rows() -> list[Row]:
    compiled = torch.compile(peers.from_logits, dynamic=False)
    return [Row("ours A", peers.ours_a), Row("ours B", loss=peers.ours_b), Row("ours B, chunk 4096", loss=partial(peers.ours_b, chunk=4096)),
            Row("ours B, frozen head", loss=partial(peers.ours_b, frozen=True), products=2), Row("ours from logits", peers.ours_from_logits),
            Row("torch eager", peers.eager), Row("torch.compile", lambda c: compiled(c.hidden, c.weight, c.targets, c.temperature)),
            Row("torch chunked 1024", peers.chunked),
            Row("torch linear_cross_entropy", peers.torch_linear_cross_entropy), Row("Liger scaled CE (SM90)", peers.liger_scaled),
            Row("Liger FLCE (sum only)", loss=peers.liger_sft, comparable=False), Row("Liger chunked GRPO", loss=peers.liger_grpo, comparable=False),
            Row("Liger GRPO from logits", loss=peers.liger_grpo_from_logits, comparable=False), Row("cut-cross-entropy", peers.cut_cross_entropy), Row("verl", peers.verl),
            Row("cuBLAS 1F / 3F", bare=("f", "fxw")), Row("cuBLAS 4F", bare=("f", "ffxw"))]


# ---- measuring

def milliseconds(runs: dict[str, Callable[[Case], object]], case: Case, rounds: int) -> dict[str, float]:
    """Median of each, taking turns; every run starts after 256 MB were written over the L2 cache."""
    flush, times = torch.empty(1 << 26, dtype=torch.int32, device="cuda"), {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            run(case)
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop))
    return {name: statistics.median(t) for name, t in times.items()}


@dataclass
class Truth:
    """float64 from the same rounded inputs: log-probs of all rows, gradients of sampled rows of hidden and of weight."""
    rows: Tensor
    cols: Tensor
    logp: Tensor
    dX: Tensor
    dW: Tensor


def truth(case: Case, samples: int = 256) -> Truth:
    N, V, T = len(case.targets), len(case.weight), case.temperature
    g = torch.Generator(case.hidden.device).manual_seed(1)
    rows = torch.randperm(N, generator=g, device=case.hidden.device)[:samples]
    cols = torch.cat([case.targets[rows[:samples // 2]], torch.randint(V, (samples // 2,), generator=g, device=rows.device)]).unique()
    x, W = case.hidden.detach().double() / T, case.weight.detach().double()
    lse = torch.cat([torch.logsumexp(part @ W.T, -1) for part in x.split(256)])
    logp = (x * W[case.targets]).sum(-1) - lse
    leaf = logp.clone().requires_grad_()
    a, = torch.autograd.grad(case.loss(leaf), leaf)
    dz = -a[rows, None] * torch.exp(x[rows] @ W.T - lse[rows, None])                 # (samples, V)
    dz[torch.arange(len(rows)), case.targets[rows]] += a[rows]
    part = -a[:, None] * torch.exp(x @ W[cols].T - lse[:, None])                     # (N, samples)
    part += a[:, None] * (case.targets[:, None] == cols)
    return Truth(rows, cols, logp[rows], dz @ W / T, part.T @ x)


def relative(got: Tensor, want: Tensor) -> str:
    return f"{((got.double() - want).norm() / want.norm()).item():.1e}"


def measure(case: Case, implementations: list[Row], rounds: int) -> None:
    """Memory and errors one by one, then times by turns; prints the table."""
    want, table, forwards, steps = truth(case), {}, {}, {}
    for row in implementations:
        cells = table[row.name] = dict.fromkeys(("ms", "TF/s", "GB", "logp err", "step ms", "step TF/s", "step GB", "dX err", "dW err", ""), "-")
        try:
            if row.logp or row.bare:
                row.forward(case)
                size, logp = bench_rl.peak_bytes(partial(row.forward, case))
                cells["GB"], forwards[row.name] = f"{size / 1e9:.3f}", row.forward
                if logp is not None:
                    cells["logp err"] = f"{(logp[want.rows].double() - want.logp).abs().max().item():.1e}"
                    del logp
            row.step(case)
            size, grads = bench_rl.peak_bytes(partial(row.step, case))
            cells["step GB"], steps[row.name] = f"{size / 1e9:.3f}", row.step
            if grads is not None and row.comparable:
                cells["dX err"] = relative(grads[0][want.rows], want.dX)
                cells["dW err"] = "-" if grads[1] is None else relative(grads[1][want.cols], want.dW)
            del grads
        except torch.cuda.OutOfMemoryError:
            cells[""] = "out of memory"
        except PEER_ERRORS as error:
            if row.name.startswith("ours"):
                raise
            cells[""] = "absent" if isinstance(error, ImportError) else f"failed: {type(error).__name__}: {' '.join(str(error).split())[:60]}"
    if case.hidden.is_cuda:
        product, needed = 2 * case.hidden.numel() * len(case.weight), {row.name: row.products for row in implementations}
        for runs, prefix in ((forwards, ""), (steps, "step ")):
            for name, ms in milliseconds(runs, case, rounds).items():
                table[name][prefix + "ms"], table[name][prefix + "TF/s"] = f"{ms:.2f}", f"{(needed[name] if prefix else 1) * product / ms / 1e9:.0f}"
    header = next(iter(table.values()))
    print(f"| {'':26} | " + " | ".join(f"{h:>9}" for h in header) + " |")
    print("|---" * (len(header) + 1) + "|")
    for name, cells in table.items():
        print(f"| {name:26} | " + " | ".join(f"{c:>9}" for c in cells.values()) + " |", flush=True)


def tune(case: Case, rounds: int) -> None:
    """Times the forward pass for other tile sizes than kernels.tile_sizes' own; edit that function with what wins."""
    original, results = kernels.tile_sizes, []
    for sizes in itertools.product((64, 128), (128, 256), (64, 128), (8, 16), (4, 8), (3, 4)):
        tiles = dict(zip(("BM", "BV", "BK", "GROUP", "num_warps", "num_stages"), sizes))
        kernels.tile_sizes = lambda t, accumulators=1, tiles=tiles: tiles
        run = Row("", peers.ours_a).forward
        try:
            run(case)
            results.append((milliseconds({"": run}, case, rounds)[""], tiles))
        except PEER_ERRORS as error:
            print(f"{tiles}: {type(error).__name__}")
    kernels.tile_sizes = original
    for ms, tiles in sorted(results, key=lambda r: -r[0]):
        print(f"{ms:8.2f} ms {2 * case.hidden.numel() * len(case.weight) / ms / 1e9:5.0f} TFLOP/s  {tiles}")


def chosen(only: list[str] | None) -> list[Row]:
    return [row for row in rows() if not only or any(word.lower() in row.name.lower() for word in only)]


def bench_logprob(args: argparse.Namespace) -> None:
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    shapes = args.shape or (["1.5b", "1.7b", "7b"] if gpu else ["tiny"])
    counts = args.rows or ([2048, 8192, 32768] if gpu else [256, 1024])
    print(machine() + " (memory and errors only)" * (not gpu), f"torch {torch.__version__}", str(dtype),
          f"triton {logprob.triton.__version__ if logprob.triton else 'absent'}", f"temperature {args.temperature}", f"{args.rounds} rounds", sep=", ")
    for shape in shapes:
        for N in counts:
            case = make_case(N, *SHAPES[shape], args.data, args.temperature, device, dtype)
            print(f"\n{shape}: D = {SHAPES[shape][0]}, V = {SHAPES[shape][1]}, N = {N}, {args.data} data")
            torch.compiler.reset()                                                  # one shape must not make the next one fall back to eager
            tune(case, args.rounds) if args.tune else measure(case, chosen(args.only), args.rounds)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("logprob", help="log-probs of the language-model head, beside other implementations")
    command.add_argument("--shape", nargs="+", choices=SHAPES)
    command.add_argument("--rows", nargs="+", type=at_least(1))
    command.add_argument("--data", choices=("random", "peaked"), default="random")
    command.add_argument("--temperature", type=at_least(1e-6, float), default=1.0)
    command.add_argument("--rounds", type=at_least(1), default=30)
    command.add_argument("--only", nargs="+", help="rows whose name contains one of these")
    command.add_argument("--tune", action="store_true", help="try tile sizes of the forward kernel instead")
    command.set_defaults(run=bench_logprob)
    bench_rl.add_commands(commands)
    args = parser.parse_args()
    if getattr(args, "only", None) and not chosen(args.only):
        parser.error(f"--only {' '.join(args.only)}: in no row's name; there are {', '.join(row.name for row in rows())}")
    if getattr(args, "tune", False) and not torch.cuda.is_available():
        parser.error("--tune: tile sizes are timed on a GPU, and there is none here")
    with ending():
        args.run(args)


if __name__ == "__main__":
    main()
