"""Numbers for rollout.py: a one-token-at-a-time twin, exact probabilities, and the silent defects of sampling. `python -m pytest tests/test_rollout.py`"""
import copy
import gc
import math
import random
import weakref
from collections import Counter
from contextlib import nullcontext
from functools import cache, partial
from io import StringIO

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GraniteConfig,
    LlamaConfig,
    MBartConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RwkvConfig,
)

import decode as D
import rollout as R
from data import TiktokenTokenizer, chat_ids
from decode import draw
from logprob import linear_logprob
from rollout import Rollout, Sampler, TextModel, check_head, micro_batches, predictors, without_dropout

VOCAB, EOS, PAD = 64, 2, 2                                           # pad == eos throughout, as in many a tokenizer
KINDS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
PROMPTS = [[1, 7, 3], [5, EOS, 9, 9, 4, EOS, 30, 11], [12], [8, 8, 8, 8, 21]]          # lengths differ; the stop token stands in one prompt
STOPS = {EOS, 17, 40, 41, 42}


@cache
def model(kind: str = "qwen3", attention: str = "sdpa", vocab: int = VOCAB) -> PreTrainedModel:
    """Two random layers whose weights are large enough for sharp, position-dependent predictions."""
    torch.manual_seed(0)
    config = {**KINDS, "mistral": partial(MistralConfig, sliding_window=6)}[kind](
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=128, initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x)


def distribution(logits: torch.Tensor, temperature: float, top_p: float = 1.0) -> list[float]:
    """The probabilities sampled from, in plain Python: softmax at the temperature, the fewest likeliest tokens whose sum reaches top_p, renormalised."""
    z = [x / temperature for x in logits.tolist()]
    weights = [math.exp(x - max(z)) for x in z]
    p, kept, mass = [w / sum(weights) for w in weights], set(), 0.0
    for v in sorted(range(len(p)), key=lambda v: -p[v]):
        if mass >= top_p:
            break
        kept.add(v)
        mass += p[v]
    return [p[v] / mass if v in kept else 0.0 for v in range(len(p))]


@torch.no_grad()
def twin_row(net: PreTrainedModel, prompt: list[int], uniform: np.ndarray, temperature: float, top_p: float,
             stops: set[int]) -> tuple[list[int], list[float], list[float], bool]:
    """One completion: no batch, no cache, no padding; the whole text again for every token. (tokens, log-probs, entropies, finished)"""
    tokens, logps, entropies = [], [], []
    for u in uniform.tolist():
        logits = net(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
        p = distribution(logits, temperature or 1.0, top_p if temperature else 1.0)
        token = next(v for v in range(len(p)) if sum(p[: v + 1]) > u) if temperature else max(range(len(p)), key=p.__getitem__)
        tokens.append(token)
        logps.append(math.log(p[token]))
        entropies.append(entropy(distribution(logits, temperature or 1.0)))
        if token in stops:
            return tokens, logps, entropies, True
    return tokens, logps, entropies, False


def numbers(index: int, g: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, index, g]).random(count, dtype=np.float32) * (1 - 2**-20)


def check_against_twin(net: PreTrainedModel, rollout: Rollout, prompts: list[list[int]], group: int, count: int, temperature: float, top_p: float,
                       stops: set[int], seed: int) -> None:
    assert rollout.tokens.shape == rollout.logp.shape == rollout.entropy.shape == (len(prompts) * group, max(rollout.lengths.tolist()))
    for n in range(len(prompts) * group):
        tokens, logps, entropies, finished = twin_row(net, prompts[n // group], numbers(n // group, n % group, count, seed), temperature, top_p, stops)
        assert rollout.completion(n) == tokens and bool(rollout.finished[n]) == finished
        assert rollout.mask[n].tolist() == [t < len(tokens) for t in range(rollout.tokens.shape[1])]
        assert rollout.logp[n, : len(tokens)].tolist() == pytest.approx(logps, abs=1e-5)
        assert rollout.entropy[n, : len(tokens)].tolist() == pytest.approx(entropies, abs=1e-5)
        assert set(rollout.tokens[n, len(tokens):].tolist()) <= {PAD} and not rollout.logp[n, len(tokens):].any() and not rollout.entropy[n, len(tokens):].any()


def equal(a: Rollout, b: Rollout, tolerance: float = 0.0) -> bool:
    same = all(torch.equal(x, y) for x, y in ((a.tokens, b.tokens), (a.lengths, b.lengths), (a.finished, b.finished)))
    return same and torch.allclose(a.logp, b.logp, rtol=0, atol=tolerance)

# ------------------------------------------------------------------------------------------------ the sampler against a plain twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8), (0.0, 1.0)])
def test_sampler_equals_the_twin(kind: str, temperature: float, top_p: float) -> None:
    rollout = Sampler(model(kind), STOPS, PAD).generate(PROMPTS, 3, 10, temperature, top_p, seed=5)
    check_against_twin(model(kind), rollout, PROMPTS, 3, 10, temperature, top_p, STOPS, 5)
    if temperature == 1:
        assert 2 <= rollout.finished.sum() <= 10 and len(set(rollout.lengths.tolist())) >= 4, "the case does not reach what it should"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_any_attention_gives_the_same_samples(kind: str, attention: str) -> None:
    """Eager attention reads a boolean 4-D mask as numbers to add: off by nats, in silence."""
    net = model(kind, attention)
    rollout = Sampler(net, STOPS, PAD).generate(PROMPTS, 2, 10, 1.0, seed=1)
    check_against_twin(net, rollout, PROMPTS, 2, 10, 1.0, 1.0, STOPS, 1)


def test_sliding_windows_are_refused() -> None:
    """They would need another cache; a full one would sample from another distribution, in silence, once a text is longer than the window."""
    with pytest.raises(ValueError, match="full attention only"):
        Sampler(model("mistral"), STOPS, PAD)
    layers = {**model("qwen2").config.to_dict(), "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "layer_types": None}
    with pytest.raises(ValueError, match="use_sliding_window=False"):                             # of two layers only the second has one
        Sampler(AutoModelForCausalLM.from_config(Qwen2Config(**layers)), STOPS, PAD)
    full = AutoModelForCausalLM.from_config(MistralConfig(**{**model("mistral").config.to_dict(), "sliding_window": None}))
    check_against_twin(full, Sampler(full.eval(), STOPS, PAD).generate(PROMPTS, 1, 8, 1.0), PROMPTS, 1, 8, 1.0, 1.0, STOPS, 0)


def test_top_p_1_is_no_cut_and_tiny_top_p_is_greedy() -> None:
    sampler = Sampler(model(), STOPS, PAD)
    greedy = sampler.generate(PROMPTS, 1, 10, 0.0)
    narrow = sampler.generate(PROMPTS, 1, 10, 1.0, top_p=1e-6)
    assert torch.equal(narrow.tokens, greedy.tokens) and not narrow.logp.any()                   # one token left, with probability 1
    assert equal(sampler.generate(PROMPTS, 2, 10, 0.9, top_p=1.0), sampler.generate(PROMPTS, 2, 10, 0.9, top_p=1 - 1e-9), 1e-5)


def test_greedy_takes_the_likeliest_token_and_ignores_the_seed() -> None:
    sampler = Sampler(model("qwen2"), STOPS, PAD)
    a, b = (sampler.generate(PROMPTS, 2, 8, 0.0, seed=seed) for seed in (0, 1))
    assert equal(a, b) and torch.equal(a.tokens[::2], a.tokens[1::2])
    hidden, targets = predictors(model("qwen2"), PROMPTS, [a.completion(2 * i) for i in range(len(PROMPTS))])
    logits = hidden @ model("qwen2").get_output_embeddings().weight.T
    assert torch.equal(logits.argmax(-1), targets)
    assert torch.allclose(logits.log_softmax(-1).max(-1).values, a.logp[::2][a.mask[::2]], atol=1e-5)


def test_any_row_is_the_same_in_other_company() -> None:
    """Alone, in another order, beside longer prompts: a prompt's completions hang on its index and the seed only."""
    sampler = Sampler(model(), STOPS, PAD)
    whole = sampler.generate(PROMPTS, 3, 12, 1.0, seed=7)
    for i, prompt in enumerate(PROMPTS):
        alone = sampler.generate([prompt], 3, 12, 1.0, seed=7, index=[i])
        for g in range(3):
            assert alone.completion(g) == whole.completion(3 * i + g) and alone.finished[g] == whole.finished[3 * i + g]
            assert torch.allclose(alone.logp[g, : alone.lengths[g]], whole.logp[3 * i + g, : alone.lengths[g]], atol=1e-5)
    order = [2, 0, 3, 1]
    mixed = sampler.generate([PROMPTS[i] for i in order], 2, 12, 1.0, seed=7, index=order)         # fewer samples: the first ones of each group
    assert [mixed.completion(n) for n in range(8)] == [whole.completion(3 * order[n // 2] + n % 2) for n in range(8)]


def test_seed_index_and_sample_number_each_make_another_completion() -> None:
    sampler = Sampler(model(), {99}, PAD)
    rollout = sampler.generate([PROMPTS[0]] * 3, 3, 12, 1.0, seed=0)
    other = sampler.generate([PROMPTS[0]] * 3, 3, 12, 1.0, seed=1)
    assert len({tuple(r.completion(n)) for r in (rollout, other) for n in range(9)}) == 18
    assert equal(rollout, sampler.generate([PROMPTS[0]] * 3, 3, 12, 1.0, seed=0))                # and two equal calls are equal, bit for bit
    again = sampler.generate([PROMPTS[0]] * 2, 3, 12, 1.0, seed=0, index=[4, 4])
    assert [again.completion(n) for n in range(3)] == [again.completion(n) for n in range(3, 6)]


@pytest.mark.parametrize("max_rows", [1, 3, 6, 7, 1000])
def test_waves_change_nothing(max_rows: int) -> None:
    whole = Sampler(model(), STOPS, PAD).generate(PROMPTS, 3, 12, 1.0, seed=3)
    assert equal(Sampler(model(), STOPS, PAD, max_rows).generate(PROMPTS, 3, 12, 1.0, seed=3), whole, 1e-5)


def test_more_room_only_lengthens_rows_that_were_cut() -> None:
    sampler = Sampler(model(), STOPS, PAD)
    short, long = (sampler.generate(PROMPTS, 3, count, 1.0, seed=3) for count in (5, 12))
    assert [short.completion(n) for n in range(12)] == [long.completion(n)[:5] for n in range(12)]
    assert torch.equal(short.finished, long.finished & (long.lengths <= 5)) and not short.finished.all()

# ------------------------------------------------------------------------------------------------ the distribution


def chi_square(counts: Counter, p: list[float], total: int) -> float:
    """Pearson's statistic over its threshold at one in 30,000 (Wilson-Hilferty, z = 4); rare values share a bin; inf where the impossible happened."""
    if any(p[v] == 0 for v in counts):
        return math.inf
    order = sorted((v for v in range(len(p)) if p[v] > 0), key=lambda v: -p[v])
    common = [v for v in order if total * p[v] >= 5]
    bins = [(counts[v], total * p[v]) for v in common]
    rest = total - sum(e for _, e in bins)
    if rest >= 5:
        bins.append((total - sum(counts[v] for v in common), rest))
    df = max(len(bins) - 1, 1)
    return sum((o - e) ** 2 / e for o, e in bins) / (df * (1 - 2 / (9 * df) + 4 * math.sqrt(2 / (9 * df))) ** 3)


def test_chi_square_threshold() -> None:
    """The tail beyond it in closed form, for even degrees of freedom: exp(-x/2) sum over j < df/2 of (x/2)^j / j!."""
    for df in (2, 10, 50):
        p, e = [1 / (df + 1)] * (df + 1), 1000.0
        shift = math.sqrt(10 * e)                                    # one bin up, one down: the statistic is 20
        x = 20 / chi_square(Counter({0: e + shift, 1: e - shift} | {v: e for v in range(2, df + 1)}), p, e * (df + 1))
        assert 1e-5 < math.exp(-x / 2) * sum((x / 2) ** j / math.factorial(j) for j in range(df // 2)) < 1e-4


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_samples_follow_the_exact_distribution(temperature: float, top_p: float) -> None:
    """20,000 samples of one prompt: the first token, and the second given each of the commonest first ones; log-probs are those of the same distribution."""
    net, prompt, count = model("llama"), PROMPTS[3], 20_000
    rollout = Sampler(net, {99}, PAD, max_rows=4096).generate([prompt], count, 2, temperature, top_p, seed=11)
    with torch.no_grad():
        logits = net(torch.tensor([prompt])).logits[0, -1]
        first = distribution(logits, temperature, top_p)
        nexts = net(torch.tensor([[*prompt, v] for v in range(VOCAB)])).logits[:, -1]
    counts = Counter(rollout.tokens[:, 0].tolist())
    assert chi_square(counts, first, count) < 1
    assert chi_square(counts, distribution(logits, temperature * 1.1, top_p), count) > 1         # 10 % hotter would be noticed
    assert chi_square(counts, distribution(logits, temperature, 0.75 if top_p < 1 else 0.97), count) > 1
    second = [distribution(z, temperature, top_p) for z in nexts]
    for token, seen in counts.most_common(3):
        assert seen > 500
        assert chi_square(Counter(rollout.tokens[rollout.tokens[:, 0] == token, 1].tolist()), second[token], seen) < 1
    assert rollout.entropy[:, 0].tolist() == pytest.approx([entropy(distribution(logits, temperature))] * count, abs=1e-4)       # before the cut
    expected = torch.tensor([[math.log(first[a]), math.log(second[a][b])] for a, b in rollout.tokens.tolist()])
    assert torch.allclose(rollout.logp, expected, atol=1e-5)


def test_rows_and_places_draw_independently() -> None:
    """If the numbers of two rows or of two places hung together, agreement between them would differ from sum of p squared."""
    logits = torch.tensor([[0.0, 0.5, 1.0, -0.5]]).log_softmax(-1)
    u = torch.from_numpy(np.stack([numbers(i, g, 2, 0) for i in range(100) for g in range(100)]))
    tokens = torch.stack([draw(logits.expand(10_000, -1), u[:, t], 1.0)[0] for t in (0, 1)], 1)
    same = float((logits.exp() ** 2).sum())
    for a, b in ((tokens[:, 0], tokens[:, 1]), (tokens[::2, 0], tokens[1::2, 0]), (tokens[:5000, 0], tokens[5000:, 0]), (tokens[1:, 0], tokens[:-1, 1])):
        assert abs((a == b).float().mean().item() - same) < 5 * math.sqrt(same * (1 - same) / len(a))


def test_draw_inverts_the_cdf_at_its_corners() -> None:
    p = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]])
    for u, token in ((0.0, 0), (0.2499, 0), (0.25, 2), (0.7499, 2), (0.75, 3), (1 - 2**-20, 3)):  # a token of probability 0 never comes, not even at the ends
        drawn, logp, _ = draw(p.log(), torch.tensor([u]), 1.0)
        assert drawn.item() == token and logp.item() == pytest.approx(math.log(p[0, token]), abs=1e-6)
    p = torch.tensor([[0.2, 0.0, 0.5, 0.3, 0.0]])
    drawn, logp, _ = draw(p.log(), torch.tensor([0.99]), 1.0, top_p=0.49)                           # 0.5 passes top_p: alone in the nucleus
    assert drawn.item() == 2 and logp.item() == pytest.approx(0, abs=1e-6)
    drawn, logp, _ = draw(p.log(), torch.tensor([0.99]), 1.0, top_p=0.51)                           # the token that crosses top_p stays in
    assert drawn.item() == 3 and logp.item() == pytest.approx(math.log(0.3 / 0.8), abs=1e-5)

# ------------------------------------------------------------------------------------------------ silent defects


def test_masks_come_from_lengths_never_from_ids() -> None:
    """The pad id is sampled in the middle of completions, and stands in prompts: it is a token like any other there."""
    rollout = Sampler(model(), {17, 40, 41}, PAD).generate(PROMPTS, 16, 12, 1.3, seed=2)
    inside = (rollout.tokens == PAD) & rollout.mask
    assert inside.sum() > 3 and (rollout.logp[inside] < 0).all()
    assert torch.equal(rollout.mask.sum(1), rollout.lengths) and all(len(rollout.completion(n)) == rollout.lengths[n] for n in range(64))
    for other in (0, 5, 63):                                                                     # another id in unused places changes no sample
        padded = Sampler(model(), {17, 40, 41}, other).generate(PROMPTS, 16, 12, 1.3, seed=2)
        assert torch.equal(padded.tokens[rollout.mask], rollout.tokens[rollout.mask]) and (padded.tokens[~rollout.mask] == other).all()
        assert torch.allclose(padded.logp, rollout.logp, atol=1e-6)


def test_stop_token_present() -> None:
    """Every stop id ends a row, is its last token, is inside the mask and has its log-prob; a row without one is not finished."""
    rollout = Sampler(model(), STOPS, PAD).generate(PROMPTS, 16, 12, 1.0, seed=2)
    ended_by = Counter()
    for n in range(64):
        tokens = rollout.completion(n)
        assert not STOPS & set(tokens[:-1]) and (tokens[-1] in STOPS) == bool(rollout.finished[n]) and (len(tokens) == 12 or rollout.finished[n])
        assert rollout.mask[n, len(tokens) - 1] and rollout.logp[n, len(tokens) - 1] < 0
        ended_by[tokens[-1] if rollout.finished[n] else None] += 1
    assert len(ended_by) >= 4 and ended_by[EOS] and ended_by[None]


def test_stop_token_trained() -> None:
    """pad == eos: the gradient reaches the prediction of the stop token, with the closed-form value, through the trainer's path (predictors, mask)."""
    net = model("qwen2")
    rollout = Sampler(net, {EOS}, EOS).generate(PROMPTS, 16, 12, 1.3, seed=4)
    rows = [n for n in range(64) if rollout.finished[n]]
    assert len(rows) >= 3
    hidden, targets = predictors(net, [PROMPTS[n // 16] for n in rows], [rollout.completion(n) for n in rows])
    weight = net.get_output_embeddings().weight
    logp, _ = linear_logprob(hidden, weight, targets)
    assert (targets == EOS).sum() == len(rows) and len(logp) == rollout.mask[rows].sum()
    by_row = torch.zeros(rollout.mask[rows].shape).masked_scatter(rollout.mask[rows], logp)      # (N, T), as the loss has it
    loss = -by_row[torch.arange(len(rows)), rollout.lengths[rows] - 1].sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    p = torch.softmax(hidden.detach()[targets == EOS] @ weight.detach().T, -1)[:, EOS]
    assert torch.allclose(gradient[EOS], -((1 - p)[:, None] * hidden.detach()[targets == EOS]).sum(0), atol=1e-4) and gradient[EOS].norm() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_behaviour_policy_equals_scored_policy(kind: str, temperature: float) -> None:
    net = model(kind)
    rollout = Sampler(net, STOPS, PAD).generate(PROMPTS, 4, 12, temperature, seed=6)
    with torch.no_grad():
        hidden, targets = predictors(net, [PROMPTS[n // 4] for n in range(16)], [rollout.completion(n) for n in range(16)])
        scored = [linear_logprob(hidden, net.get_output_embeddings().weight, targets, t)[0] for t in (temperature, temperature * 1.01)]
    assert torch.equal(targets, rollout.tokens[rollout.mask])
    ratios = [(s - rollout.logp[rollout.mask]).exp() for s in scored]
    assert (ratios[0] - 1).abs().max() < 1e-4 < (ratios[1] - 1).abs().max()                      # a trainer that forgot the temperature would be seen
    cut = Sampler(net, STOPS, PAD).generate(PROMPTS, 4, 12, temperature, top_p=0.7, seed=6)
    with torch.no_grad():
        hidden, targets = predictors(net, [PROMPTS[n // 4] for n in range(16)], [cut.completion(n) for n in range(16)])
        full = linear_logprob(hidden, net.get_output_embeddings().weight, targets, temperature)[0]
    assert ((full - cut.logp[cut.mask]).exp() - 1).min() < -0.05                                 # with top_p < 1 they are two policies: refused in training


def test_scored_through_every_token_of_the_prompt() -> None:
    """The stop token inside a prompt is attended like any other: changing it changes what follows it, in sampler and trainer alike."""
    prompt = PROMPTS[1]
    for i in range(len(prompt)):
        changed = [*prompt[:i], 33, *prompt[i + 1:]]
        a, b = (Sampler(model(), {EOS}, EOS).generate([p], 1, 1, 1.0).logp[0, 0] for p in (prompt, changed))
        ha, hb = (predictors(model(), [p], [[0]])[0] for p in (prompt, changed))
        assert abs(a - b) > 1e-4 and (ha - hb).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_right_padding_does_not_leak(kind: str) -> None:
    """Float64: hidden states of a batch of ragged rows are those of each row alone, and of a plain forward that picks its places by hand."""
    net = model(kind).double()
    try:
        completions = [[3, EOS, EOS], [4, 5, 6, 7, 8, 9, EOS], [10], []]
        hidden, targets = predictors(net, PROMPTS, completions)
        assert targets.tolist() == sum(completions, []) and hidden.shape == (11, 32)
        single = torch.cat([predictors(net, [p], [c])[0] for p, c in zip(PROMPTS, completions) if c])
        by_hand = torch.cat([net.base_model(input_ids=torch.tensor([p + c])).last_hidden_state[0, len(p) - 1: len(p) + len(c) - 1]
                             for p, c in zip(PROMPTS, completions)])
        assert (hidden - single).abs().max() < 1e-10 and (hidden - by_hand).abs().max() < 1e-10
        (gradient,) = torch.autograd.grad(hidden[:3].sum(), net.get_input_embeddings().weight)   # of row 0 only: no other row's tokens, no pads
        seen = set(PROMPTS[0] + completions[0][:-1])
        assert {v for v in range(VOCAB) if gradient[v].abs().sum() > 0} == seen
    finally:
        net.float()


def test_rollouts_can_enter_a_loss() -> None:
    """What the sampler returns is no inference tensor: it may be saved for backward."""
    rollout = Sampler(model(), STOPS, PAD).generate(PROMPTS, 2, 5, 1.0)
    assert not any(t.is_inference() for t in (rollout.tokens, rollout.logp, rollout.entropy, rollout.lengths, rollout.finished, rollout.mask))
    x = torch.ones_like(rollout.logp, requires_grad=True)
    (x * rollout.logp).sum().backward()
    assert torch.equal(x.grad, rollout.logp)

# ------------------------------------------------------------------------------------------------ edges


def test_no_room_and_no_prompts() -> None:
    none = Sampler(model(), STOPS, PAD).generate(PROMPTS, 2, 0, 1.0)
    assert none.tokens.shape == none.logp.shape == none.mask.shape == (8, 0) and not none.lengths.any() and not none.finished.any() and none.completion(0) == []
    empty = Sampler(model(), STOPS, PAD).generate([], 2, 5, 1.0)
    assert len(empty.tokens) == len(empty.lengths) == len(empty.logp) == len(empty.finished) == 0
    for prompts in ([[5]], [[5], [6, 7]], PROMPTS):
        hidden, targets = predictors(model(), prompts, [[]] * len(prompts))
        assert hidden.shape == (0, 32) and targets.shape == (0,) and targets.dtype == torch.int64


def test_a_prompt_that_does_not_fit_is_named() -> None:
    sampler = Sampler(model(), STOPS, PAD)
    with pytest.raises(ValueError, match=r"prompt 2 has 120 tokens.*max_new_tokens=9.*128 positions"):
        sampler.generate([[1], [2, 3], [4] * 120], 1, 9, 1.0)
    assert sampler.generate([[4] * 120], 1, 8, 1.0).lengths[0] <= 8  # exactly full
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sampler.generate([[1], []], 1, 5, 1.0)
    for wrong in (dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_p=0.0), dict(top_p=1.1), dict(group_size=0), dict(max_new_tokens=-1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sampler.generate(PROMPTS, **{"group_size": 1, "max_new_tokens": 3, "temperature": 1.0, **wrong})


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_as_it_was(training: bool) -> None:
    net = model("qwen2")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.config.use_cache = False
    net.train(training)
    try:
        Sampler(net, STOPS, PAD).generate(PROMPTS, 2, 5, 1.0)
        assert net.training is training and net.config.use_cache is False and all(m.training is training for m in net.modules())
        calls = []

        def fails(module: torch.nn.Module, inputs: tuple) -> None:
            assert not net.training                                  # sampled in eval mode: no dropout
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("out of memory")
        hook = net.register_forward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            Sampler(net, STOPS, PAD).generate(PROMPTS, 2, 5, 1.0)
        hook.remove()
        assert net.training is training and net.config.use_cache is False and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    finally:
        net.eval()
        net.config.use_cache = True


@pytest.mark.parametrize("static", [False, True])
def test_ctrl_c_in_on_finish_leaves_nothing_broken(static: bool) -> None:
    """While rows still decode: mode, gradients and inference mode are as before, and the same sampler goes on as if nothing had been."""
    net = model("qwen2").train()
    sampler = Sampler(net, STOPS, PAD, static=static)
    before, heard = sampler.generate(PROMPTS, 3, 10, 1.0, seed=5), []

    def on_finish(row: int, ids: list[int]) -> None:
        heard.append(row)
        if len(heard) == 3:
            raise KeyboardInterrupt
    try:
        with pytest.raises(KeyboardInterrupt):
            sampler.generate(PROMPTS, 3, 10, 1.0, seed=5, on_finish=on_finish)
        assert len(heard) == 3 < len(before.lengths)
        assert all(m.training for m in net.modules()) and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        hidden, targets = predictors(net, PROMPTS, [before.completion(3 * i) for i in range(4)])
        hidden.sum().backward()
        assert net.get_input_embeddings().weight.grad.abs().sum() > 0
        assert equal(before, sampler.generate(PROMPTS, 3, 10, 1.0, seed=5))
    finally:
        net.zero_grad()
        net.eval()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("static", [False, True])
def test_gradient_checkpointing_frozen_weights_and_modes_stay(static: bool) -> None:
    """A model in training: checkpointing on (which drops the cache in train mode), some weights frozen, one module in eval mode, dropout."""
    net = model("llama")
    want = Sampler(net, STOPS, PAD).generate(PROMPTS, 2, 10, 1.0, seed=5)
    training = AutoModelForCausalLM.from_config(net.config)
    training.load_state_dict(net.state_dict())
    training.gradient_checkpointing_enable()
    training.config.attention_dropout = 0.5
    for layer in training.model.layers:
        layer.self_attn.attention_dropout = 0.5
    training.train()
    training.model.norm.eval()
    training.lm_head.weight.requires_grad_(False)
    state = lambda: ({n: m.training for n, m in training.named_modules()}, {n: p.requires_grad for n, p in training.named_parameters()},
                     [layer.gradient_checkpointing for layer in training.model.layers], training.config.use_cache)
    before = state()
    assert equal(want, Sampler(training, STOPS, PAD, static=static).generate(PROMPTS, 2, 10, 1.0, seed=5), 1e-5)
    assert state() == before and all(before[2]) and training.training and not training.model.norm.training
    predictors(training, PROMPTS, [want.completion(2 * i) for i in range(4)])[0].sum().backward()              # and it still trains, checkpointed
    assert training.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_no_stop_ids_means_full_length() -> None:
    for static in (False, True):
        rollout = Sampler(model(), set(), PAD, static=static).generate(PROMPTS, 2, 10, 1.0)
        assert rollout.lengths.tolist() == [10] * 8 and not rollout.finished.any()


def test_finished_rows_leave_the_batch() -> None:
    """The work shrinks with the rows: forward passes see only those still going."""
    net, sizes = model(), []
    hook = net.register_forward_pre_hook(lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    rollout = Sampler(net, STOPS | set(range(50, 64)), PAD).generate(PROMPTS, 8, 12, 1.0, seed=2)
    hook.remove()
    longest = rollout.tokens.shape[1]
    assert sizes[0] == len(PROMPTS)                                  # one prefill per prompt, shared by its group
    going = [sum(length > t or not f for f, length in zip(rollout.finished.tolist(), rollout.lengths.tolist())) for t in range(1, longest)]
    assert len(sizes) == longest and all(need <= size <= need / 0.8 for need, size in zip(going, sizes[1:])) and sizes[-1] < 16


@pytest.mark.parametrize("max_tokens", [1, 16, 24])
@pytest.mark.parametrize("static", [False, True])
def test_prompts_are_read_in_pieces_of_bounded_size(max_tokens: int, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts, padded to 8 tokens: one by one, two by two, three and one; the samples stay."""
    net, sizes = model(), []
    want = Sampler(net, STOPS, PAD, static=static).generate(PROMPTS, 3, 12, 1.0, seed=3)
    monkeypatch.setattr(D, "prefill", partial(D.prefill, max_tokens=max_tokens))
    hook = net.register_forward_pre_hook(lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    got = Sampler(net, STOPS, PAD, static=static).generate(PROMPTS, 3, 12, 1.0, seed=3)
    hook.remove()
    assert [shape for shape in sizes if shape[1] > 1] == {1: [(1, 8)] * 4, 16: [(2, 8)] * 2, 24: [(3, 8), (1, 8)]}[max_tokens]
    assert equal(want, got, 1e-5)


def test_a_static_decoder_holds_the_caches_of_few_prompts_beside_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eleven prompts read one by one, in rows that are not in their order, no more than the last one's cache is alive when the next is read, and none after it."""
    net, caches, alive = model(), [], []
    rows = [(k % 11, [3 + k % 11] * (1 + k % 11), np.zeros(4, np.float32)) for k in range(22)]
    monkeypatch.setattr(D, "prefill", partial(D.prefill, max_tokens=1))

    def look(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        alive.append(sum(cache() is not None for cache in caches))
        caches.append(weakref.ref(kwargs[D.cache_argument(type(net))]))
    hook = net.register_forward_pre_hook(look, with_kwargs=True)
    static = D.StaticDecoder(net, 24, 16, 4, (1.0, 1.0), torch.tensor([1]), PAD)
    with torch.no_grad():
        static.fill(rows)
        hook.remove()
        gc.collect()
        assert len(alive) == 11 and max(alive) <= 1 and not any(cache() for cache in caches)
        ids, real, of_row, *_ = D.padded(rows, 4, PAD, torch.device("cpu"))
        (_, whole, _), = D.prefill.func(net, ids, real)
    for (keys, values), layer in zip(static.room, whole.layers):
        for row in range(22):
            seen = real[of_row[row]].bool()
            assert torch.allclose(keys[row, :, :11][:, seen], layer.keys[of_row[row]][:, seen], atol=1e-6)
            assert torch.allclose(values[row, :, :11][:, seen], layer.values[of_row[row]][:, seen], atol=1e-6)


def test_micro_batches_cover_each_row_once_within_the_bound() -> None:
    rng = random.Random(0)
    for _ in range(300):
        lengths, bound = [rng.randint(1, 50) for _ in range(rng.randint(0, 40))], rng.choice((1, 20, 60, 200, 10_000))
        pieces = micro_batches(lengths, bound)
        assert sorted(sum(pieces, [])) == list(range(len(lengths))) and all(pieces)
        for piece, following in zip(pieces, [*pieces[1:], None]):
            widest = max(lengths[n] for n in piece)
            assert len(piece) == 1 or len(piece) * widest <= bound
            assert following is None or widest * (len(piece) + 1) > bound                        # no piece is smaller than it has to be
    assert micro_batches([5, 9, 9, 1], 18) == [[1, 2], [0, 3]] and micro_batches([30, 2], 10) == [[0], [1]]

# ------------------------------------------------------------------------------------------------ a model as two functions on texts


@cache
def text_tokenizer() -> TiktokenTokenizer:
    words = ["yes", " yes", "Yes", "no", " No", "apple", " apple"]
    return TiktokenTokenizer(dict(name="t", pattern=r" ?[A-Za-z]+|\d|\s|[^\sA-Za-z\d]", words=words, special=["<|end|>"], eos="<|end|>", pad="<|end|>",
                                  instruction="", chat_template="{% for m in messages %}{{ m.content }}:{% endfor %}"))


@cache
def text_model(max_tokens: int = 16384) -> TextModel:
    tok = text_tokenizer()
    net = model("llama", vocab=len(tok))
    return TextModel(Sampler(net, {tok.eos_token_id, 10, 100, 101, 102, 103, 104, 127, 138, 181, 198}, tok.pad_token_id), partial(chat_ids, tok), tok.encode,
                     lambda ids: " ".join(map(str, ids)), 6, max_tokens)


TEXTS = ["a long prompt with an apple", "x", "no", "another one", "x", "1+2", "is it yes or no"]


def test_text_model_answers_in_order_without_the_stop_token() -> None:
    lm = text_model()
    expected, cut = [], 0
    for text in TEXTS:
        tokens, _, _, finished = twin_row(lm.sampler.model, chat_ids(text_tokenizer(), text), np.zeros(6), 0.0, 1.0, set(lm.sampler.stop_ids.tolist()))
        expected.append(" ".join(map(str, tokens[:-1])) if finished else "")                               # what was cut off is no answer
        cut += not finished
    before = lm.tally["cut_off"]
    assert lm.generate(TEXTS) == expected and len(set(expected)) > 2 and any(0 < len(e.split()) < 6 for e in expected)
    assert lm.tally["cut_off"] - before == cut > 0
    assert lm.generate([]) == [] and lm.p_yes([]) == []


def test_a_prompt_that_fills_the_positions_costs_nobody_else_an_answer() -> None:
    """128 positions, six new tokens: 126 leave room for two of them, 128 and more for none."""
    lm, short = text_model(), TEXTS[:2]
    alone = lm.generate(short)
    answers = lm.generate(["1" * 127, short[0], "b" * 125, short[1], "1" * 200, "1" * 125])
    assert answers[0] == answers[4] == "" and [answers[1], answers[3]] == alone and answers[2] and answers[5] == ""          # two tokens were not enough for the last one
    tokens, *_ = twin_row(lm.sampler.model, chat_ids(text_tokenizer(), "b" * 125), np.zeros(2), 0.0, 1.0, set())
    assert answers[2] == str(tokens[0]) and tokens[1] in lm.sampler.stop_ids and lm.generate(["1" * 127]) == [""]            # for good: it is no outage


@pytest.mark.parametrize("max_tokens", [1, 30, 16384])
def test_p_yes_is_the_share_of_yes_in_yes_and_no(max_tokens: int) -> None:
    lm, tok = text_model(max_tokens), text_tokenizer()
    yes, no = [256, 257, 258], [259, 260]                            # "Yes" and " No" exist as one token, " Yes" and "no " do not
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            p = torch.softmax(lm.sampler.model(torch.tensor([chat_ids(tok, text)])).logits[0, -1].double(), -1)
        expected.append((p[yes].sum() / (p[yes].sum() + p[no].sum())).item())
    assert lm.answers == [yes, no] and lm.p_yes(TEXTS) == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.1 and lm.p_yes(TEXTS) == lm.p_yes(TEXTS)


def test_a_tokenizer_that_cannot_say_no_is_refused() -> None:
    tok = TiktokenTokenizer(dict(text_tokenizer().spec, words=["yes", "maybe"]))
    with pytest.raises(ValueError, match="no single token for yes or for no"):
        TextModel(text_model().sampler, partial(chat_ids, tok), tok.encode, tok.decode, 4)


def test_without_judging_no_word_for_no_is_needed() -> None:
    tok = TiktokenTokenizer(dict(text_tokenizer().spec, words=["yes", "maybe"]))
    assert TextModel(text_model().sampler, partial(chat_ids, tok), tok.encode, tok.decode, 4, judges=False).generate([]) == []


def test_a_judge_that_is_sure_to_say_something_else_has_not_judged() -> None:
    """One that opens its thinking: p(yes) / (p(yes) + p(no)) of next to nothing is noise. One that is sure of nothing is taken at its word."""
    tok, ids = text_tokenizer(), chat_ids(text_tokenizer(), "x")
    net = AutoModelForCausalLM.from_config(model("llama", vocab=len(tok)).config)
    lm = TextModel(Sampler(net, {tok.eos_token_id}, tok.pad_token_id), partial(chat_ids, tok), tok.encode, tok.decode, 6)
    yes, no = lm.answers
    with torch.no_grad():
        hidden = net.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        unit = hidden / hidden.square().sum()                                                    # head row c * unit has the logit c there
        for likely, answer, judged in ((20.0, 0.0, False), (20.0, 15.0, True), (0.0, 0.0, True)):
            net.lm_head.weight.zero_()
            net.lm_head.weight[7] = likely * unit
            net.lm_head.weight[yes + no] = answer * unit
            p, = lm.p_yes(["x"])
            assert (p == pytest.approx(len(yes) / len(yes + no), abs=1e-5)) if judged else p is None


def test_positions_that_depend_on_the_row_s_length_are_refused() -> None:
    factors = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4, rope_theta=10000.0)
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    rope = dict(rope_type="longrope", original_max_position_embeddings=64, **factors)
    with pytest.raises(ValueError, match="longrope.*company.*choose another"):
        Sampler(AutoModelForCausalLM.from_config(LlamaConfig(**sizes, max_position_embeddings=256, rope_parameters=rope)), STOPS, PAD)
    Sampler(AutoModelForCausalLM.from_config(LlamaConfig(**sizes, max_position_embeddings=64, rope_parameters=rope)), STOPS, PAD)


@pytest.mark.parametrize("bounds", [dict(max_rows=1), dict(max_rows=5), dict(max_tokens=90), dict(max_rows=4, max_tokens=1)])
def test_waves_give_the_same_rows_and_each_is_handed_over_once_it_ends(bounds: dict) -> None:
    """A wave may begin in the middle of a group; what on_finish hears is what the Rollout holds."""
    whole, heard = Sampler(model(), STOPS, PAD).generate(PROMPTS, 3, 12, 1.0, seed=4), []
    waves = Sampler(model(), STOPS, PAD, **bounds).generate(PROMPTS, 3, 12, 1.0, seed=4, on_finish=lambda row, ids: heard.append((row, ids)))
    assert equal(whole, waves, 1e-5) and sorted(heard) == [(n, whole.completion(n)) for n in range(len(whole.lengths))]
    assert not whole.finished.all() and whole.finished.any()


@pytest.mark.parametrize("static", [False, True])
def test_a_long_call_shows_how_many_rows_have_ended(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[R.tqdm] = []

    def bar(**settings: object) -> R.tqdm:
        assert settings.pop("disable") is None and settings.pop("delay") == 5                    # on a terminal only, after five seconds
        bars.append(R.tqdm_class(**settings, disable=False, file=StringIO()))
        return bars[-1]
    monkeypatch.setattr(R, "tqdm_class", R.tqdm, raising=False)
    monkeypatch.setattr(R, "tqdm", bar)
    Sampler(model(), STOPS, PAD, max_rows=5, static=static).generate(PROMPTS, 3, 12, 1.0, seed=4)
    assert [(b.total, b.n) for b in bars] == [(12, 12)]


def test_a_completion_is_handed_over_while_others_still_decode() -> None:
    heard: list[int] = []
    rollout = Sampler(model(), STOPS, PAD).generate(PROMPTS, 3, 12, 1.0, seed=4, on_finish=lambda row, ids: heard.append(len(ids)))
    assert heard == sorted(rollout.lengths.tolist())


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_plain_head_is_taken_and_another_refused(kind: str) -> None:
    check_head(model(kind))
    biased = AutoModelForCausalLM.from_config(model(kind).config)
    biased.lm_head = torch.nn.Linear(32, VOCAB)
    with pytest.raises(ValueError, match="Linear with a bias"):
        check_head(biased)
    adapted = AutoModelForCausalLM.from_config(model(kind).config)
    adapted.lm_head = torch.nn.Sequential(adapted.lm_head)                                       # like an adapter: a module around the weight
    with pytest.raises(ValueError, match="merge"):
        check_head(adapted)


@pytest.mark.parametrize("config", [
    GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    OPTConfig(vocab_size=VOCAB, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, max_position_embeddings=64, layerdrop=0.5)])
def test_dropout_is_off_in_training_too(config) -> None:
    net, ids = AutoModelForCausalLM.from_config(config), torch.arange(2, 20)[None]
    with torch.no_grad():
        assert not torch.equal(net.train()(ids).logits, net(ids).logits)                          # such configs have some
        without_dropout(net)
        assert torch.equal(net.train()(ids).logits, net.eval()(ids).logits)


def test_router_jitter_is_off_too_and_a_dropout_that_stays_is_refused() -> None:
    common = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    net, ids = AutoModelForCausalLM.from_config(MixtralConfig(**common, intermediate_size=64, num_key_value_heads=2, router_jitter_noise=0.5)), torch.arange(2, 20)[None]
    with torch.no_grad():
        assert not torch.equal(net.train()(ids).logits, net(ids).logits)
        without_dropout(net.eval())
        assert not net.training and torch.equal(net.train()(ids).logits, net.eval()(ids).logits)
    with pytest.raises(ValueError, match="FalconForCausalLM computes otherwise in training"):       # it reads config.hidden_dropout at every pass
        without_dropout(AutoModelForCausalLM.from_config(FalconConfig(**common, hidden_dropout=0.5)))
    without_dropout(AutoModelForCausalLM.from_config(FalconConfig(**common)))


def test_models_without_a_place_for_positions_or_without_a_body_are_refused() -> None:
    with pytest.raises(ValueError, match="mbart counts positions itself"):
        Sampler(AutoModelForCausalLM.from_config(MBartConfig(vocab_size=VOCAB, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64,
                                                             max_position_embeddings=64, is_decoder=True)), STOPS, PAD)
    bare = AutoModelForCausalLM.from_config(model().config)
    type(bare).base_model_prefix, was = "", type(bare).base_model_prefix
    try:
        with pytest.raises(ValueError, match="does not say which part of it is the body"):
            check_head(bare)
    finally:
        type(bare).base_model_prefix = was


def half(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(model().config).bfloat16().eval()


def test_logits_of_half_precision_are_not_rounded_on_their_way_to_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; here the CPU plays one. The sampler's log-probs are then the trainer's but for the bodies' own rounding."""
    net, off = half(0), {}
    with torch.no_grad():
        net.lm_head.weight.mul_(20)                                                           # logits of tens, as real models have them: 0.1 apart in bfloat16
    for place in ("cuda", "cpu"):
        monkeypatch.setattr(R, "EXACT", {place})
        rollout = Sampler(net, set(), PAD, static=False).generate(PROMPTS, 8, 6, 1.0)
        rows = range(len(rollout.lengths))
        with torch.no_grad():
            hidden, targets = predictors(net, [PROMPTS[n // 8] for n in rows], [rollout.completion(n) for n in rows])
        exact = torch.log_softmax(hidden.double() @ net.lm_head.weight.double().T, -1).gather(1, targets[:, None])[:, 0]
        off[place] = (rollout.logp[rollout.mask] - exact).abs().median().item()
        assert "forward" not in vars(net.lm_head) and net(input_ids=torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16
    assert off["cpu"] < off["cuda"] / 2, off


def test_a_judge_in_half_precision_is_not_rounded_to_even_chances() -> None:
    whole, tok = text_model(1), text_tokenizer()
    net = copy.deepcopy(whole.sampler.model).bfloat16()
    lm = TextModel(Sampler(net, STOPS, PAD), partial(chat_ids, tok), tok.encode, tok.decode, 4, max_tokens=1)          # each text alone, as below
    for text, p in zip(TEXTS, lm.p_yes(TEXTS)):
        with torch.no_grad():
            logits = predictors(net, [chat_ids(tok, text)], [[0]])[0].double() @ net.lm_head.weight.double().T
        assert p == pytest.approx(torch.sigmoid(logits[0, lm.answers[0]].logsumexp(0) - logits[0, lm.answers[1]].logsumexp(0)).item(), abs=1e-5)


def test_alibi_is_refused() -> None:
    with pytest.raises(ValueError, match="ALiBi"):
        Sampler(AutoModelForCausalLM.from_config(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4)), STOPS, PAD)


def test_a_head_that_scales_its_logits_is_refused() -> None:
    common = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                  bos_token_id=None, eos_token_id=None, pad_token_id=None)
    for config in (GraniteConfig(**common, logits_scaling=3.0), CohereConfig(**common, logit_scale=0.0625)):
        with pytest.raises(ValueError, match="softcap or a logit scale"):
            check_head(AutoModelForCausalLM.from_config(config).eval())
    check_head(AutoModelForCausalLM.from_config(GraniteConfig(**common, logits_scaling=1.0)).eval())
    with torch.no_grad():
        for cap, spread in ((30.0, 0.02), (30.0, 0.3), (None, 0.02)):        # logits far below the cap, where it changes next to nothing: larger ones will come
            capped = AutoModelForCausalLM.from_config(Gemma2Config(**common, head_dim=8, initializer_range=spread, final_logit_softcapping=cap)).eval()
            ids = torch.arange(8)[None]
            before = capped(input_ids=ids).logits
            with pytest.raises(ValueError, match="softcap or a logit scale") if cap else nullcontext():
                check_head(capped)
            assert torch.equal(before, capped(input_ids=ids).logits)          # the check leaves nothing behind


def test_local_attention_that_no_layer_type_names_and_a_state_that_is_no_cache_are_refused() -> None:
    common = dict(vocab_size=VOCAB, hidden_size=32, max_position_embeddings=128)
    local = GPTNeoConfig(**common, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=16)
    for config in (local, RwkvConfig(vocab_size=VOCAB, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=64)):
        with pytest.raises(ValueError, match="knows full attention only"):
            Sampler(AutoModelForCausalLM.from_config(config), STOPS, PAD)
    Sampler(AutoModelForCausalLM.from_config(GPTNeoConfig(**common, num_layers=2, num_heads=4, attention_types=[[["global"], 2]])), STOPS, PAD)
