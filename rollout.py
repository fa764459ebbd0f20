"""Rollouts: prompts in, sampled completions out, with the log-prob of every token under the distribution that it was drawn from.

One prefill per prompt, its KV cache repeated G times, one decoding loop over all rows (decode.py), finished rows leave the batch. The sampler uses the very
module that is being trained: no server, nothing to synchronise, no second copy of the weights (but where they are sharded, offloaded, or masters of bfloat16: parallel.gathered).

    u ~ U[0,1) from (seed, prompt index, sample index, t)        token_t = min{v : cdf_t(v) > u}        logp_t = log p_t(token_t)

so each row has its own stream of random numbers: the same completion comes out whatever else is in the batch, and any single one can be drawn again.
Token ids are the truth end to end; nothing is decoded and encoded again. `predictors` is the other half of the same coin: the hidden states that
predict given completions (teacher forcing), which is what training needs.

Left out on purpose: paged caches, servers, speculative decoding.
"""
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from decode import StaticDecoder, Wave, decode, difference, rows_that_fit

MAX_ROWS, MAX_TOKENS = 1024, 1 << 22                    # of one wave, unless a sampler is told otherwise


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


class Sampler:
    """Samples from any causal LM of transformers with a standard attention cache; ValueError for one with sliding windows or another kind of state."""

    def __init__(self, model: PreTrainedModel, stop_ids: set[int], pad_id: int, max_rows: int = MAX_ROWS, max_tokens: int = MAX_TOKENS, static: bool | None = None):
        """max_rows and max_tokens (rows * (longest prompt + max_new_tokens), what the cache may grow to) bound a wave; more rows run in several waves, with the same result.
        static: everything in fixed places, with CUDA graphs (default: on CUDA; sdpa or eager attention only), or the plain loop; same completions."""
        self.model, self.pad_id, self.max_rows, self.max_tokens = model, pad_id, max_rows, max_tokens
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=model.device)
        takes_numbers = model.config._attn_implementation in ("sdpa", "eager")                              # as a mask, to be added
        self.static = takes_numbers and (model.device.type == "cuda" if static is None else static)
        self.unproven = model.device.type == "cuda"                                                         # before its first call the static loop is compared with the plain one
        self.max_positions = getattr(model.config, "max_position_embeddings", 1 << 30)
        if getattr(model.config, "alibi", model.config.model_type == "bloom"):
            raise ValueError("the model puts positions into its attention mask (ALiBi), which this sampler does not: choose one with rotary or learned positions")
        if "local" in getattr(model.config, "attention_layers", ()) or {"cache", "past_key_values"}.isdisjoint(signature(type(model).forward).parameters):
            raise ValueError(f"{model.config.model_type} has local attention or a state of its own in place of a cache: this sampler knows full attention only")
        if "position_ids" not in signature(type(model).forward).parameters:
            raise ValueError(f"{model.config.model_type} counts positions itself, so that a prompt beside a longer one would get others: choose one that takes position_ids")
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings", self.max_positions) < self.max_positions:
            raise ValueError("the model turns its positions otherwise once a row is long (longrope), so that a row's samples would depend on its company: choose another one")
        if other := {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {"DynamicLayer"}:        # Mistral says it in no layer_types
            raise ValueError(f"the model needs a cache of {', '.join(sorted(other))}: this sampler knows full attention only (Qwen2: use_sliding_window=False, "
                             "Mistral: sliding_window=None)")

    def generate(self, prompts: list[list[int]], group_size: int, max_new_tokens: int, temperature: float, top_p: float = 1.0, seed: int = 0,
                 index: list[int] | None = None, on_finish: Callable[[int, list[int]], None] | None = None) -> Rollout:
        """G completions of each prompt. `index` are the prompts' numbers in the random streams (default 0, 1, ...): a prompt keeps its
        completions when it is sampled alone, in other company or on another rank. on_finish(row, token ids) hears of each completion as soon as it
        ends (static: up to 8 tokens later), while others still decode. ValueError where a prompt is empty or does not fit."""
        index = list(range(len(prompts))) if index is None else index
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty: a chat template always gives at least one token")
            if len(prompt) + max_new_tokens > self.max_positions:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} it passes the model's {self.max_positions} "
                                 "positions: shorten the prompt or lower max_new_tokens")
        if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or group_size < 1 or max_new_tokens < 0:
            raise ValueError(f"{temperature=} must be >= 0, {top_p=} in (0, 1], {group_size=} >= 1, {max_new_tokens=} >= 0")
        rows = [(i, prompts[i], np.random.default_rng([seed, index[i], g]).random(max_new_tokens, dtype=np.float32) * (1 - 2**-20))
                for i in range(len(prompts)) for g in range(group_size)]                                     # u < 1 also after rounding
        longest = max(map(len, prompts), default=0) + max_new_tokens
        per_wave = max(1, min(self.max_rows, self.max_tokens // max(longest, 1), len(rows)))
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()                                                                               # no dropout; gradient checkpointing pauses, and lets the cache be
            with tqdm(total=len(rows), unit="row", desc="sampling", delay=5, leave=False, disable=None) as bar:      # speaks up after 5 s, on a terminal
                def ended(first: int, row: int, ids: torch.Tensor) -> None:
                    bar.update()
                    if on_finish:
                        on_finish(first + row, ids.tolist())
                with torch.inference_mode(), float_head(self.model):
                    waves = self._waves(rows, per_wave, longest, max_new_tokens, (temperature, top_p), ended)
        finally:
            for module, training in modes:
                module.training = training
        width = max(w[0].shape[1] for w in waves)
        tokens, logp, entropy = (torch.cat([torch.nn.functional.pad(w[k], (0, width - w[k].shape[1]), value=fill) for w in waves])
                                 for k, fill in ((0, self.pad_id), (1, 0.0), (2, 0.0)))
        lengths, finished = (torch.cat([w[k] for w in waves]) for k in (3, 4))
        return Rollout(tokens, lengths, logp, finished, entropy)

    def _waves(self, rows: list, per_wave: int, longest: int, max_new: int, draws: tuple[float, float], ended: Callable[[int, int, torch.Tensor], None]) -> list[Wave]:
        if not rows or not max_new:
            none = torch.zeros(len(rows), dtype=torch.int64, device=self.model.device)
            return [(none.new_zeros(len(rows), 0), none.new_zeros(len(rows), 0).float(), none.new_zeros(len(rows), 0).float(), none, none.bool())]
        settings = {"max_new": max_new, "draws": draws, "stop_ids": self.stop_ids, "pad_id": self.pad_id}
        if self.static and self.unproven:
            if other := difference(self.model, rows, **settings):
                warnings.warn(f"sampling goes on in the plain loop, several times slower; the one for CUDA graphs gave other completions of a few rows: {other}", stacklevel=3)
            self.static, self.unproven = not other, False
        if self.static:
            if self.model.device.type == "cuda":
                free = torch.cuda.mem_get_info(self.model.device)[0] + torch.cuda.memory_reserved(self.model.device) - torch.cuda.memory_allocated(self.model.device)
                per_wave = min(per_wave, rows_that_fit(self.model, longest, free))
            run = StaticDecoder(self.model, per_wave, longest, **settings).decode
        else:
            run = partial(decode, self.model, **settings)
        return [run(rows[s:s + per_wave], ended=partial(ended, s)) for s in range(0, len(rows), per_wave)]


def predictors(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden (n, D), targets (n,)): for every completion token, in row order, the hidden state that predicts it. log p(target) is then
    log_softmax(hidden @ lm_head.T / T)[target]. Rows are padded on the right, where causal attention cannot see. This is where the shift by one happens."""
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    width, device = max(2, *map(len, rows)) - 1, model.device                                               # the last token predicts nothing
    ids = torch.tensor([(row + [0] * width)[:width] for row in rows], device=device)
    where = torch.tensor([[False] * (len(p) - 1) + [True] * len(c) + [False] * (width + 1 - len(p) - len(c)) for p, c in zip(prompts, completions)], device=device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state                             # (N, width, D)
    return hidden[where], torch.tensor([token for c in completions for token in c], dtype=torch.int64, device=device)


EXACT = {"cuda"}                                        # kinds of device on which the head's logits are float32, whatever the model computes in


def float_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(n, V) float32 logits of hidden states (n, D), as logprob.py has them: not rounded to the operands' type, which moves a bfloat16 log-prob by up to 0.1 nats."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


@contextmanager
def float_head(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, a plain head of half precision gives float_logits. (Not on a CPU: there each token would copy the weight.)"""
    head = model.get_output_embeddings()
    plain = isinstance(head, torch.nn.Linear) and head.bias is None and "forward" not in vars(head)         # and no hook's
    if ours := plain and model.device.type in EXACT and head.weight.dtype in (torch.bfloat16, torch.float16):
        head.forward = lambda hidden: float_logits(hidden.flatten(0, -2), head.weight).unflatten(0, hidden.shape[:-1])
    try:
        yield
    finally:
        if ours:
            del head.forward


def few_logits(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """((1, n) the first few token ids, (1, n, V) their logits) as logprob.py makes them: hidden @ weight.T."""
    ids = torch.arange(min(8, model.config.get_text_config().vocab_size), device=model.device)[None]
    return ids, model.base_model(input_ids=ids, use_cache=False).last_hidden_state @ model.get_output_embeddings().weight.T


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """ValueError where the model's logits are not hidden @ weight.T, for then the trainer's log-probs (logprob.py) would silently not be the sampler's:
    adapters on the head, a bias, a softcap, a logit scale."""
    head = model.get_output_embeddings()
    if model.base_model is model:
        raise ValueError(f"{type(model).__name__} does not say which part of it is the body under the head (base_model_prefix): choose another model")
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise ValueError(f"the head is {type(head).__name__}{' with a bias' if getattr(head, 'bias', None) is not None else ''}: the log-probs are made from a plain (V, D) "
                         "weight; merge adapters into it (peft: merge_and_unload), or choose a model without a bias there")
    ids, got = few_logits(model)
    large = head.register_forward_hook(lambda module, given, logits: 1000 * logits)                         # a softcap hardly bends the small logits of a few ids
    try:
        want = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        large.remove()
    got = 1000 * got.float()
    if not torch.allclose(want, got, rtol=0.02, atol=0.02 * float(want.abs().max())):
        raise ValueError(f"{type(model).__name__} does more to its logits than hidden @ weight.T (a softcap or a logit scale): logprob.py does not know it, so such a model "
                         "can neither be trained here nor judge")


def without_dropout(model: PreTrainedModel) -> None:
    """Turns every dropout and router jitter off, for training too (GPT-2's and OPT's configs have some): completions are sampled without, so with it the first ratio would not
    be 1, the KL to the start not 0, and a resumed run another one. ValueError where some is left: Falcon reads its config's at every pass."""
    random = lambda module, name: "drop" in name or "jitter" in name or name == "p" and isinstance(module, torch.nn.Dropout)
    for module in model.modules():
        vars(module).update({name: 0.0 for name, value in vars(module).items() if isinstance(value, float) and random(module, name)})
    was = model.training
    with torch.no_grad():
        plain, training = (few_logits(model.train(mode))[1].float() for mode in (False, True))
    model.train(was)
    if not torch.allclose(plain, training, rtol=1e-2, atol=1e-2 * float(plain.abs().max())):
        raise ValueError(f"{type(model).__name__} computes otherwise in training (a dropout that its config asks for): set it to 0 in config.json")


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
                 max_new_tokens: int, max_tokens: int = 16384, judges: bool = True):
        self.sampler, self.encode, self.decode, self.max_new_tokens, self.max_tokens, self.tally = sampler, encode, decode, max_new_tokens, max_tokens, Counter()
        self.answers = [sorted({ids[0] for word in words for ids in [tokenize(word)] if len(ids) == 1}) for words in (("yes", " yes", "Yes", " Yes"), ("no", " no", "No", " No"))]
        if judges and not all(self.answers):
            raise ValueError("the judge's tokenizer has no single token for yes or for no: p(yes) cannot be read off its first answer token")

    def generate(self, prompts: list[str]) -> list[str]:
        """The greedy completion of each prompt, its stop token left out; "" where it was cut off (half a structure would pass for a whole one; counted in `tally`) or the
        prompt fills the model's positions: no outage, it always will."""
        ids = [self.encode(p) for p in prompts]
        room = [min(self.max_new_tokens, self.sampler.max_positions - len(i)) for i in ids]
        order = sorted((n for n in range(len(ids)) if room[n] > 0), key=lambda n: len(ids[n]))              # like lengths share a wave: little padding
        texts = [""] * len(ids)
        for rows in ([n for n in order if room[n] == self.max_new_tokens], *([n] for n in order if room[n] < self.max_new_tokens)):        # a long prompt's own answer is short
            rollout = self.sampler.generate([ids[n] for n in rows], 1, room[rows[0]], 0.0) if rows else None
            for i, n in enumerate(rows):
                if rollout.finished[i]:
                    texts[n] = self.decode(rollout.completion(i)[:-1])
                else:
                    self.tally["cut_off"] += 1
        return texts

    @torch.inference_mode()
    def p_yes(self, prompts: list[str]) -> list[float | None]:
        """p(yes) / (p(yes) + p(no)) at the first token of the answer, one batched forward, deterministic; None where the model is about to say something else, such as <think>."""
        ids, model, result = [self.encode(p) for p in prompts], self.sampler.model, [None] * len(prompts)
        for rows in micro_batches([len(i) for i in ids], self.max_tokens):
            hidden, _ = predictors(model, [ids[n] for n in rows], [[0]] * len(rows))                        # (n, D): what predicts the next token
            logits = float_logits(hidden, model.get_output_embeddings().weight)                             # (n, V)
            yes, no = (logits[:, answer].logsumexp(-1) for answer in self.answers)
            either, likeliest = (x - logits.logsumexp(-1) for x in (torch.logaddexp(yes, no), logits.amax(-1)))          # a model that is sure of nothing is taken at its word
            for n, p, clear in zip(rows, torch.sigmoid(yes - no).tolist(), ((either > math.log(1e-4)) | (likeliest < math.log(0.5))).tolist()):
                result[n] = p if clear else None
        return result
