"""Numbers for decode.py: the static loop against the plain one (which test_rollout.py holds against a twin), and what a CUDA graph needs of a step.
`python -m pytest tests/test_decode.py`"""
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

import decode as D
import parallel
import rollout as R
from decode import StaticDecoder, row_bucket, rows_that_fit
from logprob import linear_logprob
from rollout import Rollout, Sampler

EOS = PAD = 2
STOPS = {EOS, 17, 40, 41, 42}
PROMPTS = [[1, 7, 3], [5, EOS, 9, 9, 4, EOS, 30, 11], [12], [8, 8, 8, 8, 21]]
KINDS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


@cache
def model(kind: str = "qwen3", attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    config = KINDS[kind](vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                         max_position_embeddings=128, initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StaticDecoder]]:
    """Buckets of 8 places and a look for stop tokens every 3 tokens, so that small cases cross both; the decoders that Samplers made."""
    made: list[StaticDecoder] = []

    def make(*args, **kwargs) -> StaticDecoder:
        made.append(StaticDecoder(*args, check_every=3, bucket=8, **kwargs))
        return made[-1]
    monkeypatch.setattr(R, "StaticDecoder", make)
    yield made


def both(net: PreTrainedModel, group: int, count: int, temperature: float = 1.0, top_p: float = 1.0, seed: int = 5, **bounds: int) -> tuple[Rollout, Rollout]:
    return tuple(Sampler(net, STOPS, PAD, static=static, **bounds).generate(PROMPTS, group, count, temperature, top_p, seed) for static in (False, True))


def check_equal(a: Rollout, b: Rollout, tolerance: float = 1e-5) -> None:
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.lengths, b.lengths) and torch.equal(a.finished, b.finished)
    assert (a.logp - b.logp).abs().max() < tolerance and (a.entropy - b.entropy).abs().max() < tolerance
    assert not b.logp[~b.mask].any() and not b.entropy[~b.mask].any() and set(b.tokens[~b.mask].tolist()) <= {PAD}

# ------------------------------------------------------------------------------------------------ the static loop is the plain one


@pytest.mark.parametrize(("kind", "attention"), [("qwen2", "sdpa"), ("qwen3", "sdpa"), ("llama", "sdpa"), ("llama", "eager")])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.3, 0.8), (0.0, 1.0)])
def test_static_equals_plain(kind: str, attention: str, temperature: float, top_p: float, decoders: list[StaticDecoder]) -> None:
    plain, static = both(model(kind, attention), 6, 21, temperature, top_p)
    check_equal(plain, static)
    assert len(decoders) == 1 and not any(t.is_inference() for t in (static.tokens, static.logp, static.lengths))
    if temperature:
        assert plain.finished.any() and not plain.finished.all() and len(set(plain.lengths.tolist())) > 5, "the case does not reach what it should"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7])
def test_lengths_around_the_looks_for_stop_tokens(count: int, decoders: list[StaticDecoder]) -> None:
    """max_new_tokens before, at and behind a look; stop tokens at any place between two looks."""
    plain, static = both(model(), 16, count, seed=2)
    check_equal(plain, static)
    assert count < 3 or set(plain.lengths.tolist()) >= set(range(2, count + 1))


@pytest.mark.parametrize("bounds", [dict(max_rows=1), dict(max_rows=5), dict(max_rows=7), dict(max_tokens=90)])
def test_waves_share_the_room(bounds: dict, decoders: list[StaticDecoder]) -> None:
    """Later waves find the keys, masks and positions of earlier ones in it, and the last wave is smaller."""
    plain, static = both(model(), 3, 14, seed=3, **bounds)
    check_equal(plain, static)
    assert len(decoders) == 1
    check_equal(both(model(), 3, 14, seed=3)[0], static)


def test_room_is_not_read_beyond_the_text(decoders: list[StaticDecoder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Large numbers in all places that no token has been written to change nothing."""
    fill = StaticDecoder.fill

    def dirty(self: StaticDecoder, rows: list) -> None:
        fill(self, rows)
        for pair in self.room:
            for x in pair:
                x[:, :, int(self.slot):] = 1e4
    plain, _ = both(model(), 3, 14)
    monkeypatch.setattr(StaticDecoder, "fill", dirty)
    check_equal(plain, Sampler(model(), STOPS, PAD, static=True).generate(PROMPTS, 3, 14, 1.0, seed=5))


def test_rows_leave_and_attention_grows_in_buckets(decoders: list[StaticDecoder], monkeypatch: pytest.MonkeyPatch) -> None:
    """(rows, places) of the steps: rows are the bucket of those that still ran at the last look, places the bucket of the text so far."""
    steps, step = [], StaticDecoder.step
    monkeypatch.setattr(StaticDecoder, "step", lambda self, r, l: (steps.append((r, l)), step(self, r, l)))
    _, static = both(model(), 8, 21, seed=2)
    going = lambda t: sum(n > t or not f for n, f in zip(static.lengths.tolist(), static.finished.tolist()))
    width, capacity = max(map(len, PROMPTS)), 32                                               # 8 + 21 places, in whole eights
    assert [l for _, l in steps] == [min(-(-(width + t) // 8) * 8, capacity) for t in range(1, len(steps) + 1)] and len({l for _, l in steps}) > 2
    rows, expected = 32, []
    for t in range(1, len(steps) + 1):
        rows = min(rows, row_bucket(going(t))) if t % 3 == 0 else rows
        expected.append(rows)
    assert [r for r, _ in steps] == expected and len(set(expected)) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_rows_as_memory_has_room_for(kind: str, decoders: list[StaticDecoder]) -> None:
    """Counted in the bytes that a decoder really takes for its keys and values."""
    both(model(kind), 2, 13)
    size, longest = sum(x.nbytes for pair in decoders[0].room for x in pair), 8 + 13
    assert decoders[0].N == 8 and [rows_that_fit(model(kind), longest, int(size / 0.6 * share)) for share in (1.001, 0.999, 2.001, 0)] == [8, 7, 16, 1]


def test_row_buckets() -> None:
    assert [row_bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 25, 500)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 16, 16, 24, 32, 512]
    assert all(n <= row_bucket(n) < 1.5 * n + 1 for n in range(1, 2000))


def test_a_completion_is_handed_over_within_one_look(decoders: list[StaticDecoder], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, heard, keep = [0], [], StaticDecoder.keep

    def counted(self: StaticDecoder, r: int, logits: torch.Tensor) -> None:
        drawn[0] += 1
        keep(self, r, logits)
    monkeypatch.setattr(StaticDecoder, "keep", counted)
    out = Sampler(model(), STOPS, PAD, static=True).generate(PROMPTS, 3, 14, 1.0, seed=4, on_finish=lambda row, ids: heard.append((row, ids, drawn[0])))
    assert sorted((row, ids) for row, ids, _ in heard) == [(n, out.completion(n)) for n in range(12)]
    assert all(len(ids) <= when < len(ids) + 3 for _, ids, when in heard) and len({when for *_, when in heard}) > 2

# ------------------------------------------------------------------------------------------------ what a graph needs


class NoHost(TorchDispatchMode):
    """Raises where an operation's outcome would have to come to the host, or where its result's size hangs on data."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        mask = name in ("index", "index_put", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2", "scalar_tensor", "lift_fresh") and not mask, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits_for_the_host_and_keeps_its_places(kind: str, top_p: float, decoders: list[StaticDecoder], monkeypatch: pytest.MonkeyPatch) -> None:
    step, addresses = StaticDecoder.step, set()

    def watched(self: StaticDecoder, r: int, l: int) -> None:
        with NoHost():
            step(self, r, l)
        tensors = [self.t, self.slot, self.token, self.position, self.readable, self.u, self.tokens, self.logp, self.entropy, *(x for pair in self.room for x in pair)]
        addresses.add(tuple(x.data_ptr() for x in tensors))
    monkeypatch.setattr(StaticDecoder, "step", watched)
    check_equal(*both(model(kind), 6, 15, top_p=top_p, max_rows=9))
    assert len(addresses) == 1
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHost():
        bool(torch.ones(1) > 0)


class OneDevice(NoHost):
    """Raises where a tensor of another device than "meta" takes part, as where something is copied from the host."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        assert all(x.device.type == "meta" for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)), func
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_takes_nothing_from_the_host(kind: str, dtype: torch.dtype) -> None:
    """On a device that is not the host's: every tensor of a step is there before it."""
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(model(kind).config, dtype=dtype).eval()
    decoder = StaticDecoder(net, 6, 30, 10, (0.7, 0.9), torch.tensor([1], device="meta"), PAD)
    decoder.room = [tuple(torch.empty(6, 2, 32, 8, dtype=dtype, device="meta") for _ in range(2)) for _ in range(2)]
    with torch.inference_mode(), OneDevice():
        decoder.step(4, 16)
    with pytest.raises(AssertionError, match="lift_fresh"), OneDevice():
        torch.ones(3, device="meta") * torch.tensor(2.0)


class Tape(NoHost):
    """What a CUDA graph is: the operations of one run and the places that they read and wrote, done again without Python."""
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():           # neither a view nor in place
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """torch.cuda's part, played on the CPU: all of StaticDecoder is run as it would be on a GPU, its graphs are tapes. -> those made."""
    made, init, stream, decoder = [], StaticDecoder.__init__, SimpleNamespace(wait_stream=lambda other: None), []

    def with_graphs(self: StaticDecoder, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        self.use_graphs = True
        decoder[:] = [self]

    @contextmanager
    def warm_up(s: object) -> Iterator[None]:
        """Its traces wiped out, for a tape does what it records, and the place behind may be out of the bucket."""
        state = [(x, x.clone()) for x in (decoder[0].token, decoder[0].position, decoder[0].t, decoder[0].slot)]
        yield
        for x, old in state:
            x.copy_(old)

    @contextmanager
    def graph(tape: Tape, pool: str, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert pool == "a pool" and capture_error_mode == "thread_local"
        made.append(tape)
        with tape:
            yield
    monkeypatch.setattr(StaticDecoder, "__init__", with_graphs)
    for name, part in {"Stream": lambda device: stream, "current_stream": lambda device: stream, "stream": warm_up, "graph_pool_handle": lambda: "a pool",
                       "CUDAGraph": Tape, "graph": graph}.items():
        monkeypatch.setattr(torch.cuda, name, part)
    return made


@pytest.mark.parametrize(("kind", "attention", "temperature", "top_p"), [("qwen2", "sdpa", 1.0, 1.0), ("qwen3", "sdpa", 0.7, 0.8), ("llama", "eager", 0.0, 1.0)])
def test_a_recorded_step_is_the_step(kind: str, attention: str, temperature: float, top_p: float, decoders: list[StaticDecoder], tapes: list[Tape]) -> None:
    """Nothing but what was recorded once in a bucket runs for its later steps, and the samples are the plain loop's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, static = both(model(kind, attention), 8, 40, temperature, top_p, seed=2, max_rows=20)
    check_equal(plain, static)
    assert len(tapes) == len(decoders[-1].graphs) >= 4 and decoders[-1].use_graphs


def test_graphs_do_not_outlive_the_weights_that_they_read(tapes: list[Tape]) -> None:
    """Between two calls of one sampler: weights changed in place as by an optimiser, loaded, and put elsewhere."""
    net = AutoModelForCausalLM.from_config(model().config).eval()
    sampler, before = Sampler(net, STOPS, PAD, static=True), None
    changes = [lambda: [p.mul_(1.5) for p in net.parameters()], lambda: net.load_state_dict(model().state_dict()),
               lambda: net.load_state_dict({name: x.clone() * 1.2 for name, x in model().state_dict().items()}, assign=True)]
    for change in changes:
        with torch.no_grad():
            change()
        plain, static = Sampler(net, STOPS, PAD, static=False).generate(PROMPTS, 3, 14, 1.0), sampler.generate(PROMPTS, 3, 14, 1.0)
        check_equal(plain, static)
        assert before is None or not torch.equal(before.logp[:, 0], static.logp[:, 0])
        before = static
    assert len(tapes) >= 3


def pretend(monkeypatch: pytest.MonkeyPatch, capture: Callable[[StaticDecoder, int, int], Callable[[], None]]) -> list[tuple[int, int]]:
    """Graphs on the CPU: `capture` in place of the real one. -> the keys captured."""
    keys, init = [], StaticDecoder.__init__

    def with_graphs(self: StaticDecoder, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        self.use_graphs = True

    def counted(self: StaticDecoder, r: int, l: int) -> Callable[[], None]:
        keys.append((r, l))
        self.step(r, l)                                              # the real one warms up: its traces are rewound
        return capture(self, r, l)
    monkeypatch.setattr(StaticDecoder, "__init__", with_graphs)
    monkeypatch.setattr(StaticDecoder, "capture", counted)
    return keys


def test_graphs_are_made_once_per_bucket_and_replayed(decoders: list[StaticDecoder], monkeypatch: pytest.MonkeyPatch) -> None:
    replays: list[tuple[int, int]] = []

    def capture(self: StaticDecoder, r: int, l: int) -> Callable[[], None]:
        return lambda: (replays.append((r, l)), self.step(r, l))
    keys = pretend(monkeypatch, capture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_equal(*both(model(), 8, 21, seed=2, max_rows=20))
    assert len(keys) == len(set(keys)) >= 4 and set(replays) == set(keys) and len(replays) > 2 * len(keys)
    assert keys[0] == max(keys) and keys[1][1] < keys[0][1]                                  # the pool of the largest holds the others


def refuses(self: StaticDecoder, r: int, l: int) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing")


def does_nothing(self: StaticDecoder, r: int, l: int) -> Callable[[], None]:
    return lambda: None


def reads_the_wrong_place(self: StaticDecoder, r: int, l: int) -> Callable[[], None]:
    """Like a graph that kept the address of a tensor that has gone: all in place, but the prediction is another's."""
    def replay() -> None:
        self.token[:r] = 33
        self.step(r, l)
    return replay


def goes_wrong_later(self: StaticDecoder, r: int, l: int) -> Callable[[], None]:
    if l > 16:
        raise RuntimeError("out of memory")
    return partial(self.step, r, l)


@pytest.mark.parametrize("broken", [refuses, does_nothing, reads_the_wrong_place, goes_wrong_later])
def test_without_a_graph_that_agrees_sampling_goes_on_plainly(broken: Callable, decoders: list[StaticDecoder], monkeypatch: pytest.MonkeyPatch) -> None:
    keys = pretend(monkeypatch, broken)
    plain = Sampler(model(), STOPS, PAD, static=False).generate(PROMPTS, 6, 21, 1.0, seed=5)
    with pytest.warns(UserWarning, match="without CUDA graphs") as caught:
        static = Sampler(model(), STOPS, PAD, static=True).generate(PROMPTS, 6, 21, 1.0, seed=5)
    check_equal(plain, static)
    assert len(caught) == 1 and len(keys) == (1 if broken is not goes_wrong_later else len(keys)) and not decoders[-1].use_graphs and not decoders[-1].graphs


def test_a_replay_that_leaves_no_token_is_noticed(decoders: list[StaticDecoder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-prob and entropy in place, the token not."""
    def keeps_the_token(self: StaticDecoder, r: int, l: int) -> Callable[[], None]:
        def replay() -> None:
            tokens = self.tokens.clone()
            self.step(r, l)
            self.tokens.copy_(tokens)
        return replay
    pretend(monkeypatch, keeps_the_token)
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        check_equal(*both(model(), 6, 21))

# ------------------------------------------------------------------------------------------------ the comparison before the first call


def ask(net: PreTrainedModel, count: int = 40, temperature: float = 1.0) -> str:
    rows = [(i, prompt, torch.rand(count, generator=torch.Generator().manual_seed(10 * i + g)).numpy()) for i, prompt in enumerate(PROMPTS) for g in range(3)]
    with torch.inference_mode():
        return D.difference(net, rows, count, (temperature, 1.0), torch.tensor(sorted(STOPS)), PAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_loops_agree_before_the_first_call(dtype: torch.dtype, temperature: float) -> None:
    net = AutoModelForCausalLM.from_config(model().config, dtype=dtype).eval()
    net.load_state_dict(model().state_dict())
    assert [ask(net, count, temperature) for count in (40, 1)] == ["", ""]


def other_tokens(keep: Callable, self: StaticDecoder, r: int, logits: torch.Tensor) -> None:
    keep(self, r, logits.roll(1, -1))


def other_numbers(keep: Callable, self: StaticDecoder, r: int, logits: torch.Tensor) -> None:
    keep(self, r, logits)
    self.logp += 0.1


def no_room(keep: Callable, self: StaticDecoder, r: int, logits: torch.Tensor) -> None:
    raise RuntimeError("no kernel for this")


@pytest.mark.parametrize(("wrong", "words"), [(other_tokens, r"\d+ of \d+ tokens are others"), (other_numbers, r"0\.\d+ nats off"), (no_room, "it fails: no kernel for this")])
def test_a_static_loop_that_differs_is_not_used(wrong: Callable, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call gives the plain loop's completions and says in a warning why; later calls ask no more."""
    sampler = Sampler(model(), STOPS, PAD, static=True)
    want = sampler.generate(PROMPTS, 3, 14, 1.0)
    monkeypatch.setattr(StaticDecoder, "keep", lambda self, r, logits, keep=StaticDecoder.keep: wrong(keep, self, r, logits))
    sampler.unproven, heard = True, []
    with pytest.warns(UserWarning, match=words) as caught:
        got = sampler.generate(PROMPTS, 3, 14, 1.0, on_finish=lambda row, ids: heard.append(row))
    assert len(caught) == 1 and torch.equal(got.tokens, want.tokens) and sorted(heard) == list(range(12)) and not sampler.static
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.generate(PROMPTS, 3, 14, 1.0)


# ------------------------------------------------------------------------------------------------ a sharded model, and a real GPU


def sample_from_shards(device: str) -> None:
    """Masters in float32, sampling in bfloat16: three steps, the weights changed between them; no warning; log-probs are the trainer's."""
    net = AutoModelForCausalLM.from_config(model().config).to(device).eval()
    net.load_state_dict(model().state_dict())
    sampler = Sampler(net, STOPS, PAD, static=True)
    parallel.shard(net, "bfloat16")
    try:
        for seed in range(3):
            with warnings.catch_warnings(), parallel.gathered(net) as sampler.model:
                warnings.simplefilter("error")
                rollout = sampler.generate(PROMPTS, 8, 60, 1.0, seed=seed)
                assert sampler.static and len(set(rollout.lengths.tolist())) > 5
                with torch.no_grad():
                    hidden, targets = R.predictors(sampler.model, [PROMPTS[n // 8] for n in range(32)], [rollout.completion(n) for n in range(32)])
                    logp = linear_logprob(hidden.float(), sampler.model.lm_head.weight.float(), targets)[0]
            assert (logp - rollout.logp[rollout.mask]).abs().mean() < 0.05
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(1.1)
    finally:
        parallel.finish()


def test_graphs_of_a_sharded_model(tapes: list[Tape]) -> None:
    sample_from_shards("cpu")
    assert len(tapes) >= 9


def on_a_gpu(test: Callable) -> Callable:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


@on_a_gpu
def test_graphs_of_a_sharded_model_on_a_gpu() -> None:
    sample_from_shards("cuda")


@on_a_gpu
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_draws_on_a_gpu_are_those_of_a_cpu(top_p: float) -> None:
    """A real vocabulary, most of it next to impossible: a scan in float32 would hit such tokens, even those outside the nucleus."""
    g = torch.Generator().manual_seed(0)
    logits, u = 4 * torch.randn(512, 151936, generator=g), torch.rand(512, generator=g)
    (token, logp, entropy), (want, logp_want, entropy_want) = (D.draw(logits.to(device), u.to(device), 1.0, top_p) for device in ("cuda", "cpu"))
    same = token.cpu() == want
    assert same.float().mean() > 0.98 and logp.isfinite().all()
    assert (logp.cpu() - logp_want)[same].abs().max() < 1e-3 and (entropy.cpu() - entropy_want).abs().max() < 1e-3


@on_a_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_on_a_gpu(kind: str, decoders: list[StaticDecoder]) -> None:
    """Real graphs against the plain loop on the same device, float32."""
    net = AutoModelForCausalLM.from_config(model(kind).config).to("cuda").eval()
    net.load_state_dict(model(kind).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")                               # a capture that fails would warn
        plain, static = both(net, 16, 90, seed=2)
        check_equal(plain, static, 1e-3)
        check_equal(*both(net, 16, 30, 1.0, 0.8, max_rows=24), 1e-3)
    assert all(decoder.use_graphs and decoder.graphs for decoder in decoders)
