"""Rollouts: prompts in, sampled completions out, with the log-prob of every token under the distribution that it was drawn from.

One prefill per prompt, its KV cache repeated G times, one decoding loop over all rows, finished rows leave the batch. The sampler uses the very
module that is being trained: no server, no second copy of the weights, nothing to synchronise.

    u ~ U[0,1) from (seed, prompt index, sample index, t)        token_t = min{v : cdf_t(v) > u}        logp_t = log p_t(token_t)

so each row has its own stream of random numbers: the same completion comes out whatever else is in the batch, and any single one can be drawn again.
Token ids are the truth end to end; nothing is decoded and encoded again. `predictors` is the other half of the same coin: the hidden states that
predict given completions (teacher forcing), which is what training needs.

Left out on purpose: paged caches, servers, speculative decoding.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class Rollout:
    """N = P*G sampled completions, prompt-major: row n is sample n % G of prompt n // G. Index t of a row describes its token t."""
    tokens: torch.Tensor                                # (N, T) int64, the stop token included, pad_id behind a row's end
    lengths: torch.Tensor                               # (N,) int64, tokens sampled
    logp: torch.Tensor                                  # (N, T) float32, under the distribution sampled from; 0 behind a row's end
    finished: torch.Tensor                              # (N,) bool, ended by a stop token (False: cut off by max_new_tokens)
    entropy: torch.Tensor                               # (N, T) float32, nats, of the distribution at token t; 0 behind a row's end

    @property
    def mask(self) -> torch.Tensor:
        """(N, T) bool, True on sampled tokens; made from lengths, never from pad ids, so that pad == eos is harmless."""
        return torch.arange(self.tokens.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def completion(self, n: int) -> list[int]:
        """Token ids of row n."""
        return self.tokens[n, : self.lengths[n]].tolist()


def draw(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (N,) drawn from softmax(logits / temperature) (N, V), cut to its top_p nucleus, by the uniform numbers u (N,); their log-probs under
    just that distribution; its entropy before the cut. temperature 0 takes the likeliest token, with log-prob and entropy at temperature 1."""
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), -1)                                     # (N, V)
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
    cdf = p.cumsum(-1)
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

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.room = tuple(room[indices] for room in self.room) if self.room else None
        if self.room:
            self.keys, self.values = (room[..., : self.keys.shape[-2], :] for room in self.room)
        else:
            super().batch_select_indices(indices)


class Sampler:
    """Samples from any causal LM of transformers with a standard attention cache; ValueError for one with sliding windows or another kind of state."""

    def __init__(self, model: PreTrainedModel, stop_ids: set[int], pad_id: int, max_rows: int = 1024, max_tokens: int = 1 << 22):
        """max_rows and max_tokens (rows * (longest prompt + max_new_tokens), what the cache may grow to) bound a wave; more rows run in several waves, with the same result."""
        self.model, self.pad_id, self.max_rows, self.max_tokens = model, pad_id, max_rows, max_tokens
        self.stop_ids = torch.tensor(sorted(stop_ids), device=model.device)
        self.max_positions = getattr(model.config, "max_position_embeddings", 1 << 30)
        if other := {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {"DynamicLayer"}:        # Mistral says it in no layer_types
            raise ValueError(f"the model needs a cache of {', '.join(sorted(other))}: this sampler knows full attention only (Qwen2: use_sliding_window=False, "
                             "Mistral: sliding_window=None)")

    def generate(self, prompts: list[list[int]], group_size: int, max_new_tokens: int, temperature: float, top_p: float = 1.0, seed: int = 0,
                 index: list[int] | None = None, on_finish: Callable[[int, list[int]], None] | None = None) -> Rollout:
        """G completions of each prompt. `index` are the prompts' numbers in the random streams (default 0, 1, ...): a prompt keeps its
        completions when it is sampled alone, in other company or on another rank. on_finish(row, token ids) hears of each completion as soon as it
        ends, while others still decode. ValueError where a prompt is empty or does not fit."""
        index = list(range(len(prompts))) if index is None else index
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty: a chat template always gives at least one token")
            if len(prompt) + max_new_tokens > self.max_positions:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} it passes the model's {self.max_positions} "
                                 "positions: shorten the prompt or lower max_new_tokens")
        if temperature < 0 or not 0 < top_p <= 1 or group_size < 1 or max_new_tokens < 0:
            raise ValueError(f"{temperature=} must be >= 0, {top_p=} in (0, 1], {group_size=} >= 1, {max_new_tokens=} >= 0")
        rows = [(i, prompts[i], np.random.default_rng([seed, index[i], g]).random(max_new_tokens, dtype=np.float32) * (1 - 2**-20))
                for i in range(len(prompts)) for g in range(group_size)]                                     # u < 1 also after rounding
        longest = max(map(len, prompts), default=0) + max_new_tokens
        was_training, per_wave = self.model.training, max(1, min(self.max_rows, self.max_tokens // max(longest, 1)))
        self.model.eval()
        try:
            with tqdm(total=len(rows), unit="row", desc="sampling", delay=5, leave=False, disable=None) as bar:      # speaks up after 5 s, on a terminal
                def ended(first: int, row: int, ids: torch.Tensor) -> None:
                    bar.update()
                    if on_finish:
                        on_finish(first + row, ids.tolist())
                waves = [self._wave(rows[s:s + per_wave], max_new_tokens, temperature, top_p, partial(ended, s))
                         for s in range(0, len(rows) or 1, per_wave)]
        finally:
            self.model.train(was_training)
        width = max(w[0].shape[1] for w in waves)
        tokens, logp, entropy = (torch.cat([torch.nn.functional.pad(w[k], (0, width - w[k].shape[1]), value=fill) for w in waves])
                                 for k, fill in ((0, self.pad_id), (1, 0.0), (2, 0.0)))
        lengths, finished = (torch.cat([w[k] for w in waves]) for k in (3, 4))
        return Rollout(tokens, lengths, logp, finished, entropy)

    @torch.inference_mode()
    def _wave(self, rows: list, max_new: int, temperature: float, top_p: float, ended: Callable[[int, torch.Tensor], None]) -> tuple[torch.Tensor, ...]:
        """tokens, logp, entropy (N, T), lengths, finished (N,) of rows (prompt number, prompt, uniform numbers), decoded together."""
        device, n = self.model.device, len(rows)
        tokens = torch.full((n, max_new), self.pad_id, device=device)
        logps, entropies = torch.zeros(2, n, max_new, device=device)
        lengths, finished = torch.full((n,), max_new, device=device), torch.zeros(n, dtype=torch.bool, device=device)
        if max_new == 0 or n == 0:
            return tokens, logps, entropies, lengths, finished
        u = torch.from_numpy(np.stack([row[2] for row in rows])).to(device)
        cache, logits, mask, position = self._prefill(rows, max_new)
        live = torch.arange(n, device=device)                                                               # row numbers still in the batch
        start, T = mask.shape[-1] - max_new, max_new
        for t in range(max_new):
            token, logp, entropy = draw(logits, u[live, t], temperature, top_p)
            running = ~finished[live]                                                                       # a finished row may wait in the batch for company
            for kept, new in ((tokens, token), (logps, logp), (entropies, entropy)):
                kept[live[running], t] = new[running]
            stopped = torch.isin(token, self.stop_ids) & running
            if stopped.any():
                lengths[live[stopped]], finished[live[stopped]] = t + 1, True
                for row in live[stopped].tolist():
                    ended(row, tokens[row, : t + 1])
                keep = (~finished[live]).nonzero()[:, 0]
                if len(keep) == 0:
                    T = t + 1
                    break
                if len(keep) <= 0.8 * len(live):                                                            # copying the cache pays when enough rows leave at once
                    live, token, mask, position = live[keep], token[keep], mask[keep], position[keep]
                    cache.batch_select_indices(keep)
            if t + 1 < max_new:
                out = self.model(input_ids=token[:, None], past_key_values=cache, use_cache=True, position_ids=position[:, None] + t,
                                 attention_mask=mask[..., : start + t + 1])
                logits = out.logits[:, -1]
        for row in (~finished).nonzero()[:, 0].tolist():                                                    # cut off by max_new
            ended(row, tokens[row])
        return tokens[:, :T], logps[:, :T], entropies[:, :T], lengths, finished

    def _prefill(self, rows: list, max_new: int) -> tuple[DynamicCache, torch.Tensor, torch.Tensor, torch.Tensor]:
        """KV cache and next-token logits of the rows' left-padded prompts, each prompt computed once; the attention mask of all decoding
        (N, [1, 1,] L + max_new) and the position of the first new token (N,)."""
        by_number, device = {number: prompt for number, prompt, _ in rows}, self.model.device
        place, prompts = {number: k for k, number in enumerate(by_number)}, list(by_number.values())
        of_row, width = torch.tensor([place[number] for number, *_ in rows], device=device), max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device)
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        cache = DynamicCache(config=self.model.config)
        cache.layers = [RoomyLayer() for _ in cache.layers]
        out = self.model(input_ids=ids, attention_mask=real, position_ids=(real.cumsum(-1) - 1).clamp_min(0), past_key_values=cache, use_cache=True,
                         logits_to_keep=1)
        cache.batch_select_indices(of_row)
        mask = torch.cat((real.bool(), real.new_ones(len(prompts), max_new, dtype=torch.bool)), 1)
        if self.model.config._attn_implementation == "sdpa":             # a ready mask saves making one at every token; eager attention would add its booleans up
            mask = mask[:, None, None]
        return cache, out.logits[:, -1][of_row], mask[of_row], real.sum(-1)[of_row]


def predictors(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden (n, D), targets (n,)): for every completion token, in row order, the hidden state that predicts it. log p(target) is then
    log_softmax(hidden @ lm_head.T / T)[target]. Rows are padded on the right, where causal attention cannot see. This is where the shift by one happens."""
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    width, device = max(map(len, rows)) - 1, model.device                                                   # the last token predicts nothing
    ids = torch.tensor([(row + [0] * width)[:width] for row in rows], device=device)
    where = torch.tensor([[False] * (len(p) - 1) + [True] * len(c) + [False] * (width + 1 - len(p) - len(c)) for p, c in zip(prompts, completions)], device=device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state                             # (N, width, D)
    return hidden[where], torch.tensor([token for c in completions for token in c], device=device)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """ValueError where the model's logits are not hidden @ weight.T, for then the trainer's log-probs (logprob.py) would silently not be the sampler's:
    adapters on the head, a bias, a softcap, a logit scale."""
    head, ids = model.get_output_embeddings(), torch.arange(min(8, model.config.get_text_config().vocab_size), device=model.device)[None]
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise ValueError(f"the head is {type(head).__name__}{' with a bias' if getattr(head, 'bias', None) is not None else ''}: the log-probs are made from a plain (V, D) weight; "
                         "merge adapters into it (peft: merge_and_unload), or choose a model without a bias there")
    want, got = model(input_ids=ids, use_cache=False).logits.float(), (model.base_model(input_ids=ids, use_cache=False).last_hidden_state @ head.weight.T).float()
    if not torch.allclose(want, got, rtol=0.02, atol=0.02 * float(want.abs().max())):
        raise ValueError(f"{type(model).__name__} does more to its logits than hidden @ weight.T (a softcap or a logit scale): logprob.py does not know it, so such a model "
                         "cannot be trained here")


def micro_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Row numbers, sorted by length and cut so that rows * longest row <= max_tokens in each piece (a longer row stands alone)."""
    pieces: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if pieces and lengths[pieces[-1][0]] * (len(pieces[-1]) + 1) <= max_tokens:
            pieces[-1].append(n)
        else:
            pieces.append([n])
    return pieces


class TextModel:
    """A causal LM as two functions on texts, which is all that GSRM asks of a model: greedy `generate` and the judge's `p_yes`.
    `encode` turns a text into a chat prompt's ids, `tokenize` a bare word into ids, `decode` ids into text."""

    def __init__(self, sampler: Sampler, encode: Callable[[str], list[int]], tokenize: Callable[[str], list[int]], decode: Callable[[list[int]], str],
                 max_new_tokens: int, max_tokens: int = 16384):
        self.sampler, self.encode, self.decode, self.max_new_tokens, self.max_tokens = sampler, encode, decode, max_new_tokens, max_tokens
        self.answers = [sorted({ids[0] for word in words for ids in [tokenize(word)] if len(ids) == 1}) for words in (("yes", " yes", "Yes", " Yes"), ("no", " no", "No", " No"))]
        if not all(self.answers):
            raise ValueError("the judge's tokenizer has no single token for yes or for no: p(yes) cannot be read off its first answer token")

    def generate(self, prompts: list[str]) -> list[str | None]:
        """The greedy completion of each prompt, its stop token left out; None for a prompt that fills the model's positions."""
        ids = [self.encode(p) for p in prompts]
        room = [min(self.max_new_tokens, self.sampler.max_positions - len(i)) for i in ids]
        order = sorted((n for n in range(len(ids)) if room[n] > 0), key=lambda n: len(ids[n]))              # like lengths share a wave: little padding
        texts: list[str | None] = [None] * len(ids)
        for rows in ([n for n in order if room[n] == self.max_new_tokens], *([n] for n in order if room[n] < self.max_new_tokens)):        # a long prompt shortens its own answer only
            rollout = self.sampler.generate([ids[n] for n in rows], 1, room[rows[0]], 0.0) if rows else None
            for i, n in enumerate(rows):
                texts[n] = self.decode(rollout.completion(i)[: rollout.lengths[i] - rollout.finished[i].int()])
        return texts

    @torch.inference_mode()
    def p_yes(self, prompts: list[str]) -> list[float]:
        """p(yes) / (p(yes) + p(no)) at the first token of the answer, one batched forward, deterministic."""
        ids, model, result = [self.encode(p) for p in prompts], self.sampler.model, [0.0] * len(prompts)
        for rows in micro_batches([len(i) for i in ids], self.max_tokens):
            hidden, _ = predictors(model, [ids[n] for n in rows], [[0]] * len(rows))                        # (n, D): what predicts the next token
            logits = (hidden @ model.get_output_embeddings().weight.T).float()                              # (n, V)
            yes, no = (logits[:, answer].logsumexp(-1) for answer in self.answers)
            for n, p in zip(rows, torch.sigmoid(yes - no).tolist()):
                result[n] = p
        return result
