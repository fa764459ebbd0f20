"""Decoding one wave of rows that are all in the batch at once: the draw, the caches, and two loops that give the same completions.

`decode` is the plain one and the CPU's: one token at a time, the cache grows, finished rows leave as soon as a fifth of the batch has. `StaticDecoder` is CUDA's:
every tensor of a step lies in a fixed place, so that the step can be captured as a CUDA graph and replayed by one launch, where Python would launch hundreds of
kernels.

    graph (r, l):  model on the first r rows, attention over the first l places of their keys and values -> draw -> token, log-prob, entropy at index t; t += 1

r and l are buckets: r shrinks as rows leave, l grows with the text. A step never waits for the host; it looks for stop tokens every few steps, and what a row
decoded behind its own is cut off. Room and graphs live for one call of generate, in which the weights stay where they are. tests/test_decode.py runs both loops on a
CPU, and graphs as tapes of the step's operations; no GPU has run them yet, so `difference` compares both loops on a few rows before the first call.

Left out on purpose: paged caches; one prompt's keys read once for its whole group; waiting prompts in the places of finished rows. Since finished rows leave, a wave
wastes no row's work, only the fixed part of its tail's steps; rows of several ages, padded to one width, would cost more than that (docs/bench.md has the figures).
"""
import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import cache as once

import numpy as np
import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

Ended = Callable[[int, torch.Tensor], None]                             # (row, its tokens)
Wave = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]        # tokens, logp, entropy (N, T), lengths, finished (N,)


def draw(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (N,) drawn from softmax(logits / temperature) (N, V), cut to its top_p nucleus, by the uniform numbers u (N,); their log-probs under
    just that distribution; its entropy before the cut. temperature 0 takes the likeliest token, with log-prob and entropy at temperature 1."""
    logp = torch.log_softmax(logits.float() if temperature in (0, 1) else logits.float() / temperature, -1)                # (N, V)
    p = logp.exp()
    entropy = -(p * logp.clamp_min(-1e4)).sum(-1)
    if temperature == 0:
        best = logp.max(-1)
        return best.indices, best.values, entropy
    if top_p < 1:
        ordered = logp.sort(-1, descending=True)
        outside = ordered.values.exp().cumsum(-1) - ordered.values.exp() >= top_p                           # the token that crosses top_p stays in
        logp = torch.log_softmax(logp.masked_fill(outside.scatter(-1, ordered.indices, outside), -torch.inf), -1)
        p = logp.exp()
    cdf = p.double().cumsum_(-1) if p.is_cuda else p.cumsum(-1)                                             # in float32 a GPU's scan would not rise everywhere; a CPU's does
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp_max(logits.shape[-1] - 1)   # right: a token of probability 0 is never hit
    return token[:, 0], logp.gather(-1, token)[:, 0], entropy


class RoomyLayer(DynamicLayer):
    """A cache layer with room set aside: a new token is written in place, where concatenation would copy the whole cache at every token."""
    room: tuple[torch.Tensor, torch.Tensor] | None = None                                                   # keys and values, (N, heads, capacity, head_dim)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        need = used + key_states.shape[-2]
        if self.room is None or self.room[0].shape[-2] < need:
            self.room = tuple(x.new_empty(*x.shape[:2], need + 64, x.shape[-1]) for x in (key_states, value_states))
            if used:
                for room, old in zip(self.room, (self.keys, self.values)):
                    room[..., :used, :] = old
        for room, new in zip(self.room, (key_states, value_states)):
            room[..., used:need, :] = new
        self.keys, self.values = (room[..., :need, :] for room in self.room)
        return self.keys, self.values

    def append(self, others: list["RoomyLayer"]) -> None:
        """The others' rows, of as many tokens, behind its own; the others are empty then."""
        if others:
            self.room = tuple(torch.cat(rooms) for rooms in zip(*(layer.room for layer in (self, *others))))
            self.keys, self.values = (room[..., : self.keys.shape[-2], :] for room in self.room)
            for layer in others:
                layer.room = layer.keys = layer.values = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.room = tuple(room[indices] for room in self.room) if self.room else None
        if self.room:
            self.keys, self.values = (room[..., : self.keys.shape[-2], :] for room in self.room)
        else:
            super().batch_select_indices(indices)


@once
def cache_argument(model: type[PreTrainedModel]) -> str:
    """What a model's forward calls its cache: "cache" from transformers 5.24 on, "past_key_values" before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def padded(rows: list, room: int, pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of rows (prompt number, prompt, uniform numbers): the prompts, each once, left-padded (P, L), and what of them is no padding (P, L); of the rows, which prompt each has (N,),
    which of the L + room places it may read (N, L + room) bool, the position of its first new token (N,)."""
    by_number = {number: prompt for number, prompt, _ in rows}
    place, prompts, width = {number: k for k, number in enumerate(by_number)}, list(by_number.values()), max(map(len, by_number.values()))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    of_row = torch.tensor([place[number] for number, *_ in rows], device=device)
    readable = torch.cat((real.bool(), real.new_ones(len(prompts), room, dtype=torch.bool)), 1)
    return ids, real, of_row, readable[of_row], real.sum(-1)[of_row]


def prefill(model: PreTrainedModel, ids: torch.Tensor, real: torch.Tensor, max_tokens: int = 32768) -> Iterator[tuple[int, DynamicCache, torch.Tensor]]:
    """Prompts (P, L) through the model, in forwards of at most max_tokens padded tokens (or one prompt), whose activations would be larger than the cache:
    yields the number of a forward's first prompt, its KV cache (p rows) and next-token logits (p, V)."""
    for part in torch.arange(len(ids)).split(max(1, max_tokens // ids.shape[1])):
        cache = DynamicCache(config=model.config)
        cache.layers = [RoomyLayer() for _ in cache.layers]
        yield int(part[0]), cache, model(input_ids=ids[part], attention_mask=real[part], position_ids=(real[part].cumsum(-1) - 1).clamp_min(0), use_cache=True,
                                         logits_to_keep=1, **{cache_argument(type(model)): cache}).logits[:, -1]


def uniform(rows: list, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.stack([u for *_, u in rows])).to(device)                                     # (N, max_new)


def decode(model: PreTrainedModel, rows: list, max_new: int, draws: tuple[float, float], stop_ids: torch.Tensor, pad_id: int, ended: Ended) -> Wave:
    """The wave of rows (prompt number, prompt, uniform numbers (max_new,)); draws is (temperature, top_p)."""
    device, n = model.device, len(rows)
    tokens = torch.full((n, max_new), pad_id, device=device)
    logps, entropies = torch.zeros(2, n, max_new, device=device)
    lengths, finished = torch.full((n,), max_new, device=device), torch.zeros(n, dtype=torch.bool, device=device)
    ids, real, of_row, mask, position = padded(rows, max_new, pad_id, device)
    _, (cache, *others), logits = zip(*prefill(model, ids, real))
    for first, *rest in zip(cache.layers, *(other.layers for other in others)):
        first.append(rest)
    cache.batch_select_indices(of_row)
    logits = torch.cat(logits)[of_row]
    if model.config._attn_implementation in ("sdpa", "eager"):          # a ready mask, to be added, saves making one in every layer at every token
        mask = torch.where(mask, 0.0, -torch.inf).to(model.dtype)[:, None, None]
    u, live = uniform(rows, device), torch.arange(n, device=device)                                         # row numbers still in the batch
    running, going, start, T = torch.ones_like(finished), live, mask.shape[-1] - max_new, max_new           # a finished row may wait in the batch for company
    for t in range(max_new):
        token, logp, entropy = draw(logits, u[live, t], *draws)
        for kept, new in ((tokens, token), (logps, logp), (entropies, entropy)):
            kept[going, t] = new if len(going) == len(live) else new[running]
        stopped = torch.isin(token, stop_ids) & running
        if stopped.any():
            lengths[live[stopped]], finished[live[stopped]] = t + 1, True
            for row in live[stopped].tolist():
                ended(row, tokens[row, : t + 1])
            keep = (~finished[live]).nonzero()[:, 0]
            if len(keep) == 0:
                T = t + 1
                break
            if len(keep) <= 0.8 * len(live):                                                                # copying the cache pays when enough rows leave at once
                live, token, mask, position = live[keep], token[keep], mask[keep], position[keep]
                cache.batch_select_indices(keep)
            running = ~finished[live]
            going = live[running]
        if t + 1 < max_new:
            logits = model(input_ids=token[:, None], use_cache=True, position_ids=position[:, None] + t, attention_mask=mask[..., : start + t + 1],
                           **{cache_argument(type(model)): cache}).logits[:, -1]
    for row in (~finished).nonzero()[:, 0].tolist():                                                        # cut off by max_new
        ended(row, tokens[row])
    return tokens[:, :T], logps[:, :T], entropies[:, :T], lengths, finished

# ------------------------------------------------------------------------------------------------ the same with everything in a fixed place


class PlacedLayer(DynamicLayer):
    """A cache layer on memory of somebody else's, (r, heads, l, head_dim): the new token's keys and values go where the tensor `slot` (1,) says."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.slot, self.is_initialized = keys, values, slot, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values


def row_bucket(n: int) -> int:
    """The batch sizes that graphs are made for: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    power = 1 << (n - 1).bit_length()
    return 3 * power // 4 if 4 <= power and n <= 3 * power // 4 else power


def attention(text: PretrainedConfig) -> tuple[int, int, int]:
    """(query heads, heads of keys and values, dimension of a head)."""
    heads = text.num_attention_heads
    shared = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)                     # Falcon-7B
    return heads, 1 if shared else getattr(text, "num_key_value_heads", None) or heads, getattr(text, "head_dim", None) or text.hidden_size // heads


def cache_bytes(config: PretrainedConfig, itemsize: int) -> int:
    """Bytes of one token's keys and values; DeepSeek-V2's and V3's are a short code of both."""
    text = config.get_text_config()
    if code := getattr(text, "kv_lora_rank", None):
        return text.num_hidden_layers * (code + text.qk_rope_head_dim) * itemsize
    _, kv_heads, head_dim = attention(text)
    return 2 * text.num_hidden_layers * kv_heads * head_dim * itemsize


def rows_that_fit(model: PreTrainedModel, longest: int, free: int) -> int:
    """How many rows of `longest` tokens a StaticDecoder may have in 0.6 of `free` bytes, since it takes its room at once (the rest: prefill, logits, graphs)."""
    return max(1, int(0.6 * free / (cache_bytes(model.config, model.dtype.itemsize) * -(-longest // 8) * 8)))


class StaticDecoder:
    """Waves of up to N rows of up to `longest` tokens, prompt included, in memory and graphs that last for one call of generate."""

    def __init__(self, model: PreTrainedModel, N: int, longest: int, max_new: int, draws: tuple[float, float], stop_ids: torch.Tensor, pad_id: int,
                 check_every: int = 8, bucket: int = 256):
        self.model, self.N, self.max_new, self.draws, self.stop_ids, self.pad_id, self.check_every, self.bucket = model, N, max_new, draws, stop_ids, pad_id, check_every, bucket
        device, dtype, capacity = model.device, model.dtype, -(-longest // 8) * 8
        self.t, self.slot = torch.zeros(2, 1, dtype=torch.int64, device=device).unbind()                    # what is sampled next; where its predecessor's keys go
        self.token, self.position = torch.zeros(2, N, 1, dtype=torch.int64, device=device).unbind()         # the predecessor and its position
        self.readable, self.places = torch.zeros(N, 1, 1, capacity, dtype=torch.bool, device=device), torch.arange(capacity, device=device)
        self.hidden, self.seen = torch.full((), -torch.inf, dtype=dtype, device=device), torch.zeros((), dtype=dtype, device=device)
        self.tokens = torch.zeros(N, max_new, dtype=torch.int64, device=device)
        self.logp, self.entropy, self.u = torch.zeros(3, N, max_new, device=device).unbind()
        self.room: list[tuple[torch.Tensor, torch.Tensor]] = []                                             # per layer keys and values (N, heads, capacity, head_dim)
        self.graphs: dict[tuple[int, int], Callable[[], None]] = {}
        self.use_graphs, self.side, self.pool = device.type == "cuda", None, None                          # whether; the stream and the memory to capture them with

    def fill(self, rows: list) -> None:
        """Prompts into the room, their first tokens drawn. The room is zeros at first: what attention does not read may be anything but NaN."""
        n, (ids, real, of_row, readable, position), logits = len(rows), padded(rows, self.max_new, self.pad_id, self.slot.device), None
        for first, cache, new in prefill(self.model, ids, real):                                            # at once to its place: all prompts' caches would be half a room more
            its, = torch.where((of_row >= first) & (of_row < first + len(new)))                             # rows with one of these prompts
            mine = of_row[its] - first
            self.room = self.room or [tuple(x.new_zeros(self.N, x.shape[1], len(self.places), x.shape[3]) for x in (layer.keys, layer.values)) for layer in cache.layers]
            logits = new.new_empty(n, new.shape[1]) if logits is None else logits
            logits[its] = new[mine]
            for (keys, values), layer in zip(self.room, cache.layers):
                keys[its, :, : ids.shape[1]], values[its, :, : ids.shape[1]] = layer.keys[mine], layer.values[mine]
        self.readable[:n, 0, 0, : readable.shape[1]], self.position[:n, 0], self.u[:n] = readable, position, uniform(rows, self.u.device)
        self.t.zero_(), self.slot.fill_(ids.shape[1])
        self.keep(n, logits)

    def keep(self, r: int, logits: torch.Tensor) -> None:
        """Draws token t of the first r rows."""
        drawn = draw(logits, self.u[:r].index_select(1, self.t)[:, 0], *self.draws)
        for buffer, new in zip((self.tokens, self.logp, self.entropy), drawn):
            buffer[:r].index_copy_(1, self.t, new[:, None])
        self.token[:r, 0] = drawn[0]
        self.t += 1

    def step(self, r: int, l: int) -> None:
        """One token for the first r rows; attention reads the first l places. Reads and writes fixed places only and asks nothing of the host."""
        cache = DynamicCache()
        cache.layers, cache.layer_class_to_replicate = [PlacedLayer(keys[:r, :, :l], values[:r, :, :l], self.slot) for keys, values in self.room], None
        mask = torch.where(self.readable[:r, ..., :l] & (self.places[:l] <= self.slot), self.seen, self.hidden)        # (r, 1, 1, l), to be added
        logits = self.model(input_ids=self.token[:r], use_cache=True, position_ids=self.position[:r], attention_mask=mask,
                            **{cache_argument(type(self.model)): cache}).logits[:, -1]
        self.position[:r] += 1
        self.slot += 1
        self.keep(r, logits)

    def capture(self, r: int, l: int) -> Callable[[], None]:
        """The step as a graph; a call replays it. The only lines that need a GPU."""
        self.side, self.pool, graph = self.side or torch.cuda.Stream(self.t.device), self.pool or torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        self.side.wait_stream(torch.cuda.current_stream(self.t.device))
        with torch.cuda.stream(self.side):                                                                  # warm-up: libraries set themselves up outside the graph
            self.step(r, l)
        torch.cuda.current_stream(self.t.device).wait_stream(self.side)
        with torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"):  # NCCL's watchdog and other threads may call CUDA meanwhile
            self.step(r, l)
        return graph.replay

    def advance(self, r: int, l: int) -> None:
        """One step, by its graph if there is one. A new graph is tried on the inputs of a plain step first; without the same result there are no graphs."""
        if not self.use_graphs:
            return self.step(r, l)
        if (r, l) in self.graphs:
            return self.graphs[r, l]()
        state, column = (self.token, self.position, self.t, self.slot), self.t.clone()
        before, outcome = [x.clone() for x in state], lambda: [x[:r].index_select(1, column) for x in (self.tokens, self.logp, self.entropy)]

        def rewind() -> None:
            for x, old in zip(state, before):
                x.copy_(old)
        self.step(r, l)
        want = outcome()
        try:
            rewind()
            graph = self.capture(r, l)
            rewind()
            for x in (self.tokens, self.logp, self.entropy):
                x[:r].index_fill_(1, column, -1)
            graph()
            token, logp, entropy = outcome()
            off = torch.maximum((entropy - want[2]).abs(), (logp - want[1]).abs() * (token == want[0])).max().item()                # a draw at a border may fall either way
            if not off < 0.05 or not torch.equal(self.t, column + 1) or bool((token < 0).any()):
                raise RuntimeError(f"a replayed step is {off:.3g} nats off")
            self.graphs[r, l] = graph
        except RuntimeError as error:
            warnings.warn(f"sampling goes on without CUDA graphs: {error}", stacklevel=2)
            self.use_graphs = False
            self.graphs.clear()
            rewind()
            self.step(r, l)

    def shrink(self, running: torch.Tensor, live: torch.Tensor, used: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows that run move to the front, and the batch to the bucket that holds them, finished ones filling it up; -> their (running, live)."""
        order = torch.argsort(~running, stable=True)[: row_bucket(int(running.sum()))]
        for buffer in (self.token, self.position, self.readable, self.u, self.tokens, self.logp, self.entropy):
            buffer[: len(order)] = buffer[order]
        for keys, values in self.room:
            keys[: len(order), :, :used], values[: len(order), :, :used] = keys[order, :, :used], values[order, :, :used]
        return running[order], live[order]

    def decode(self, rows: list, ended: Ended) -> Wave:
        """Like `decode` above; a row is handed over up to check_every tokens after it has ended."""
        self.fill(rows)
        n, start, device = len(rows), int(self.slot), self.slot.device
        kept = [torch.zeros(n, self.max_new, dtype=x.dtype, device=device) for x in (self.tokens, self.logp, self.entropy)]
        lengths, finished = torch.full((n,), self.max_new, device=device), torch.zeros(n, dtype=torch.bool, device=device)
        live, running, checked = torch.arange(n, device=device), torch.ones(n, dtype=torch.bool, device=device), 0       # row numbers in the batch; which of them run
        for t in range(1, self.max_new + 1):                                                                # t tokens are there
            if t % self.check_every == 0 or t == self.max_new:
                stop = torch.isin(self.tokens[: len(live), checked:t], self.stop_ids)                       # (r, t - checked)
                over = running & stop.any(1)
                lengths[live[over]], finished[live[over]] = checked + 1 + stop[over].int().argmax(1), True
                done = over | running & (t == self.max_new)
                for whole, part in zip(kept, (self.tokens, self.logp, self.entropy)):
                    whole[live[done]] = part[: len(live)][done]
                for row, length in sorted(zip(live[done].tolist(), lengths[live[done]].tolist()), key=lambda x: x[1]):
                    ended(row, kept[0][row, :length])
                running, checked = running & ~done, t
                if not (going := int(running.sum())):
                    break
                if row_bucket(going) < len(live):
                    running, live = self.shrink(running, live, start + t - 1)
            reach = -(-(start + t) // self.bucket) * self.bucket if self.graphs or not self.use_graphs else len(self.places)     # the largest first: the others fit into its memory
            self.advance(len(live), min(reach, len(self.places)))
        T = int(lengths.max())
        behind = torch.arange(T, device=device) >= lengths[:, None]                                         # what rows went on to decode, unasked
        return *(x[:, :T].masked_fill(behind, fill) for x, fill in zip(kept, (self.pad_id, 0.0, 0.0))), lengths, finished


def difference(model: PreTrainedModel, rows: list, max_new: int, draws: tuple[float, float], stop_ids: torch.Tensor, pad_id: int) -> str:
    """What sets StaticDecoder's completions apart from the plain loop's, in words, on a few of the rows and tokens; "" where nothing does. Rounding may let a draw fall
    on the other side of a border, so rows are compared up to their first difference, and half of the tokens must come before one."""
    few, room = rows[:: -(-len(rows) // 8)], min(max_new, 24)
    few, setting = [(number, prompt, u[:room]) for number, prompt, u in few], (room, draws, stop_ids, pad_id)
    plain = decode(model, few, *setting, ended=lambda row, ids: None)
    try:
        static = StaticDecoder(model, len(few), max(len(prompt) for _, prompt, _ in few) + room, *setting).decode(few, ended=lambda row, ids: None)
    except RuntimeError as error:
        return f"it fails: {error}"
    T = min(plain[0].shape[1], static[0].shape[1])
    (a, logp_a, entropy_a), (b, logp_b, entropy_b) = ([x[:, :T] for x in wave[:3]] for wave in (plain, static))
    places = torch.arange(T, device=a.device)
    alike = ((a == b) & (places < plain[3][:, None]) & (places < static[3][:, None])).cumprod(1).bool()     # (n, T), before a row's first difference
    off = torch.stack((logp_a - logp_b, entropy_a - entropy_b)).abs()[:, alike].mean().item() if alike.any() else 0.0        # nats
    if alike.sum() < 0.5 * plain[3].sum():
        return f"{int(plain[3].sum() - alike.sum())} of {int(plain[3].sum())} tokens are others"
    return "" if off < (1e-3 if model.dtype == torch.float32 else 0.05) else f"log-probs and entropies are {off:.3g} nats off"
