"""Speed, memory and error, measured side by side: `python bench.py logprob`, the head's log-probs, and `python bench.py rollout`, sampling, beside others.

logprob: for each model shape and number of rows, one table: milliseconds (median), TFLOP/s and peak memory on top of the inputs, for the log-probs alone and
for forward + backward of a clipped GRPO loss with k3 and a weight per token; errors against float64 of the same rounded inputs. The rate counts the
FLOPs that are needed, 2 N D V forward and 6 N D V with both gradients, whatever an implementation really spends; the cuBLAS rows are bare matmuls, the roof.

    python bench.py logprob                                    all shapes and rows on a GPU; on a CPU small shapes, memory and errors only
    python bench.py logprob --shape 1.5b --rows 8192 --data peaked --only ours cuBLAS
    python bench.py logprob --tune --shape 1.5b --rows 8192     forward tile sizes, one line each, fastest last
    python bench.py rollout                                    tokens per second, useful ones only, and the share of what the hardware allows

How: implementations take turns inside a round, so that clocks and temperature drift for all alike; warm-ups first; the L2 cache is overwritten before
each run; the median of the rounds. Memory on a CPU counts the tensors that torch's dispatcher sees, not the inside of an operator. "random" data is
white noise; "peaked" has logits of standard deviation 8 and targets drawn from the model, like a trained model's. Left out: several GPUs, gradients
of the entropy, and tuning any peer beyond its defaults.
"""
from __future__ import annotations

import argparse
import itertools
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3Config

import kernels
import logprob
import peers
from command import Parser, at_least
from peers import LENGTH, Case, Job

SHAPES = {"1.5b": (1536, 151936), "1.7b": (2048, 151936), "7b": (3584, 152064), "tiny": (64, 4099)}      # (D, V) of Qwen2.5-1.5B, Qwen3-1.7B, Qwen2.5-7B
MODELS = {"toy": (64, 3, 4, 4, 128, 553), "10m": (256, 8, 8, 4, 1024, 8192), "1.5b": (1536, 28, 12, 2, 8960, 151936), "7b": (3584, 28, 28, 4, 18944, 152064)}   # hidden, layers, heads, kv heads, MLP, V
PEER_ERRORS = (ImportError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError, NotImplementedError)     # a peer may be too old for this torch
if logprob.triton is not None:
    from triton.errors import TritonError
    PEER_ERRORS += (TritonError,)


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
            Row("ours B, frozen head", loss=partial(peers.ours_b, frozen=True)), Row("ours from logits", peers.ours_from_logits),
            Row("torch eager", peers.eager), Row("torch.compile", lambda c: compiled(c.hidden, c.weight, c.targets, c.temperature)),
            Row("torch chunked 1024", peers.chunked),
            Row("torch linear_cross_entropy", peers.torch_linear_cross_entropy), Row("Liger scaled CE (SM90)", peers.liger_scaled),
            Row("Liger FLCE (sum only)", loss=peers.liger_sft, comparable=False), Row("Liger chunked GRPO", loss=peers.liger_grpo, comparable=False),
            Row("Liger GRPO from logits", loss=peers.liger_grpo_from_logits, comparable=False), Row("cut-cross-entropy", peers.cut_cross_entropy), Row("verl", peers.verl),
            Row("cuBLAS 1F / 3F", bare=("f", "fxw")), Row("cuBLAS 4F", bare=("f", "ffxw"))]


# ---- measuring

class LiveBytes(TorchDispatchMode):
    """Peak bytes of the storages that torch's operations made and that were alive together: memory on a CPU, where nobody else counts it."""
    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            storage = t.untyped_storage() if isinstance(t, Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return out

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_bytes(run: Callable[[Case], object], case: Case) -> tuple[int, object]:
    """Peak memory over what was there before, results included, and the result."""
    if not case.hidden.is_cuda:
        with LiveBytes() as live:
            out = run(case)
        return live.peak, out
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run(case)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, out


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
                size, logp = peak_bytes(row.forward, case)
                cells["GB"], forwards[row.name] = f"{size / 1e9:.3f}", row.forward
                if logp is not None:
                    cells["logp err"] = f"{(logp[want.rows].double() - want.logp).abs().max().item():.1e}"
                    del logp
            row.step(case)
            size, grads = peak_bytes(row.step, case)
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
        needed = 2 * case.hidden.numel() * len(case.weight)
        for runs, factor, prefix in ((forwards, 1, ""), (steps, 3, "step ")):
            for name, ms in milliseconds(runs, case, rounds).items():
                table[name][prefix + "ms"], table[name][prefix + "TF/s"] = f"{ms:.2f}", f"{factor * needed / ms / 1e9:.0f}"
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
    print(torch.cuda.get_device_name() if gpu else "CPU (memory and errors only)", f"torch {torch.__version__}", str(dtype),
          f"triton {logprob.triton.__version__ if logprob.triton else 'absent'}", f"temperature {args.temperature}", f"{args.rounds} rounds", sep=", ")
    for shape in shapes:
        for N in counts:
            case = make_case(N, *SHAPES[shape], args.data, args.temperature, device, dtype)
            print(f"\n{shape}: D = {SHAPES[shape][0]}, V = {SHAPES[shape][1]}, N = {N}, {args.data} data")
            torch.compiler.reset()                                                  # one shape must not make the next one fall back to eager
            tune(case, args.rounds) if args.tune else measure(case, chosen(args.only), args.rounds)


# ---- sampling

def limit_seconds(job: Job, lengths: list[int]) -> float:
    """What the hardware needs at least: each decoding step reads the weights and the used keys and values once, or multiplies, whichever is slower."""
    device, size = job.model.device, next(job.model.parameters()).element_size()
    copy, square = torch.empty(1 << 26, device=device), torch.randn(2048, 2048, device=device, dtype=job.model.dtype)

    def best(run: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            run()
            if copy.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)
    bandwidth, rate = 2 * copy.nbytes / best(copy.clone), 2 * 2048**3 / best(lambda: square @ square)
    config, parameters = job.model.config, sum(p.numel() for p in job.model.parameters())
    kv = 2 * size * config.num_hidden_layers * config.num_key_value_heads * config.head_dim                       # bytes per token
    starts, seconds = [len(p) for p in job.prompts for _ in range(job.group)], 0.0
    for t in range(max(lengths)):
        context = [start + t for start, length in zip(starts, lengths) if length > t]
        seconds += max((parameters * size + kv * sum(context)) / bandwidth, 2 * parameters * len(context) / rate)
    return seconds


def make_job(name: str, rows: int, lengths: str, max_new: int) -> Job:
    """Random weights, prompts of 16 to 64 tokens. "equal": nobody stops early; "spread": any of V / (max_new / 3) stop tokens ends a row, so lengths are geometric."""
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    hidden, layers, heads, kv_heads, inner, V = MODELS[name]
    config = Qwen3Config(vocab_size=V, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads, intermediate_size=inner,
                         max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.device("cuda" if gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if gpu else torch.float32).eval()
    stops = set(range(1, 1 + round(3 * V / max_new))) if lengths == "spread" else set()
    prompts = [torch.randint(V // 2, V, (int(n),)).tolist() for n in torch.randint(16, 65, (rows // 8,))]
    return Job(model, prompts, 8, max_new, stops, 0)


def bench_rollout(args: argparse.Namespace) -> None:
    gpu = torch.cuda.is_available()
    print(torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads", f"torch {torch.__version__}", f"{args.rounds} rounds, medians, taking turns", sep=", ")
    for name, rows, max_new in itertools.product(args.model or (["1.5b", "7b"] if gpu else ["toy", "10m"]), args.rows or ([64, 256, 512] if gpu else [64]), [args.max_new_tokens or (2048 if gpu else 128)]):
        for lengths in ("equal", "spread"):
            job = make_job(name, rows, lengths, max_new)
            runs = {"ours": peers.sample_ours, "HF generate": peers.sample_hf, "HF generate, static cache": partial(peers.sample_hf, cache_implementation="static"),
                    "HF continuous batching": peers.sample_hf_continuous}
            times, tokens, failed = {n: [] for n in runs}, {n: [] for n in runs}, {}
            for _ in range(args.rounds + 1):                                                     # the first round warms up
                for n in [n for n in runs if n not in failed]:
                    torch.manual_seed(len(times[n]))
                    started = time.perf_counter()
                    try:
                        sampled = runs[n](job)
                    except PEER_ERRORS as error:
                        failed[n] = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
                    else:
                        times[n].append(time.perf_counter() - started)
                        tokens[n].append(sum(sampled))
            drawn = peers.sample_ours(job)
            bound = sum(drawn) / limit_seconds(job, drawn)
            print(f"\n{name}: {rows} rows of up to {max_new} tokens, lengths {lengths}; limit {bound:.0f} tokens/s\n| | tokens/s | of ours | of the limit |\n|---|---|---|---|")
            rate = {n: statistics.median(c / s for c, s in zip(tokens[n][1:], times[n][1:])) for n in runs if n not in failed}
            for n in runs:
                print(f"| {n} | {rate[n]:.0f} | {rate[n] / rate['ours']:.2f} | {rate[n] / bound:.2f} |" if n in rate else f"| {n} | {failed[n]} | | |", flush=True)


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
    command = commands.add_parser("rollout", help="sampling, beside transformers' generate and continuous batching")
    command.add_argument("--model", nargs="+", choices=MODELS)
    command.add_argument("--rows", nargs="+", type=at_least(8), help="completions, eight of each prompt")
    command.add_argument("--max_new_tokens", type=at_least(1))
    command.add_argument("--rounds", type=at_least(1), default=5)
    command.set_defaults(run=bench_rollout)
    args = parser.parse_args()
    if getattr(args, "only", None) and not chosen(args.only):
        parser.error(f"--only {' '.join(args.only)}: in no row's name; there are {', '.join(row.name for row in rows())}")
    if getattr(args, "tune", False) and not torch.cuda.is_available():
        parser.error("--tune: tile sizes are timed on a GPU, and there is none here")
    args.run(args)


if __name__ == "__main__":
    main()
