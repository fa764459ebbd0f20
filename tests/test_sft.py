"""Numbers for sft.py: loss and gradient against a naive cross entropy, micro-batches, schedule, pairs. `python -m pytest tests/test_sft.py`"""
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_parallel import torchrun
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Config

import convert
import eval as evaluation
import parallel
import rollout
import sft
import toy
from data import TiktokenTokenizer, chat_ids, file_hash, load_model, load_problems, problem_ids, template_hash, write_jsonl
from gsrm import Step, decompose_prompt, format_steps, judge_prompt, parse_steps
from rollout import Sampler, predictors
from sft import Config, Example, Pair, hold_out, linear_schedule, load_examples, load_pairs, mean_loss, parse_config, shuffled, train_pairs
from watch import Leave

TOKENIZER = TiktokenTokenizer(dict(name="t", pattern=r" ?[A-Za-z]+|\d|\s|[^\sA-Za-z\d]", words=["Ann", " has", "yes", "no"], special=["<|im_end|>"], eos="<|im_end|>",
                                   pad="<|im_end|>", instruction="", chat_template="{% for m in messages %}{{ m.content }}:{% endfor %}"))
EOS, ROOT = TOKENIZER.eos_token_id, Path(sft.__file__).parent
BATCH: list[Pair] = [([1, 2, 3], [4, 5, EOS]), ([6], [7, 8, 9, 10, 11, EOS]), ([1, 2, 3, 4, 5, 6, 7, EOS, 9], [EOS]),
                     ([20, 21], [22, EOS])]                          # pad == eos, also in a prompt
TARGETS = sum(len(t) for _, t in BATCH)


def tiny(tied: bool = False, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
                                                        bos_token_id=None, eos_token_id=None, pad_token_id=None))


FAMILIES = {"qwen2": {}, "llama": {}, "mistral": {"sliding_window": 3}}                   # the third one's rows are longer than its window


def family(kind: str, **more: object) -> PreTrainedModel:
    """The same size, another architecture."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**dict(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None), **more}))


def naive_loss(model: PreTrainedModel, batch: list[Pair], skip_prompt: bool = True) -> torch.Tensor:
    """Full logits of one row at a time; the token at place i is predicted at place i - 1; the mean over target tokens."""
    total, count = torch.zeros(()), 0
    for prompt, target in batch:
        logits = model(torch.tensor([prompt + target])).logits[0]
        for i in range(len(prompt) if skip_prompt else 1, len(prompt) + len(target)):
            total = total + torch.nn.functional.cross_entropy(logits[i - 1], torch.tensor((prompt + target)[i]))
            count += 1
    return total / count


def gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def naive_gradients(model: PreTrainedModel, batch: list[Pair], skip_prompt: bool = True) -> list[torch.Tensor]:
    model.zero_grad()
    naive_loss(model, batch, skip_prompt).backward()
    result = gradients(model)
    model.zero_grad()
    return result


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """What reaches the optimiser: per step the gradient before clipping, its norm after clipping and the learning rate."""
    record: dict[str, list] = {"gradient": [], "norm": [], "lr": []}
    clip = torch.nn.utils.clip_grad_norm_

    def clipping(parameters: Iterator[torch.nn.Parameter], limit: float) -> torch.Tensor:
        parameters = list(parameters)
        record["gradient"].append([p.grad.clone() for p in parameters])
        return clip(parameters, limit)

    class Spy(torch.optim.AdamW):
        def step(self, closure: Callable | None = None) -> None:
            group = self.param_groups[0]
            record["norm"].append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
            record["lr"].append(group["lr"])
            super().step(closure)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipping)
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    return record


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float = 2e-6) -> bool:
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=1e-4, atol=tolerance) for x, y in zip(a, b))

# ------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradient_equal_the_naive_cross_entropy_of_targets(tied: bool, seen: dict[str, list]) -> None:
    model = tiny(tied)
    value, expected, with_prompt = naive_loss(model, BATCH).item(), naive_gradients(model, BATCH), naive_gradients(model, BATCH, skip_prompt=False)
    [loss] = train_pairs(model, iter([BATCH]), 1, 1e-3, lambda progress: 1.0)
    assert loss == pytest.approx(value, abs=1e-5) and close(seen["gradient"][0], expected)
    assert not close(seen["gradient"][0], with_prompt, 1e-3)         # prompt tokens get no loss: with it the gradient would be another
    assert max(g.abs().max().item() for g in expected) > 1e-2


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_batch_is_the_sum_over_its_documents_alone(kind: str, seen: dict[str, list]) -> None:
    """Loss and gradient of padded micro-batches against one document after another, no padding anywhere; sliding windows (which the sampler refuses) included."""
    model = family(kind, **FAMILIES[kind])
    value, expected = naive_loss(model, BATCH).item(), naive_gradients(model, BATCH)
    [loss] = train_pairs(model, iter([BATCH]), 1, 0.0, lambda progress: 1.0, max_tokens=20)
    assert loss == pytest.approx(value, abs=1e-5) and close(seen["gradient"][0], expected)
    if kind == "mistral":
        open_window = family(kind, sliding_window=None)
        assert abs(naive_loss(open_window, BATCH).item() - value) > 1e-3
        with pytest.raises(ValueError, match="full attention only"):
            Sampler(model, {EOS}, EOS)


def test_padded_rows_do_not_leak_where_packed_ones_can() -> None:
    """Why rows are padded: packed into one row, documents see each other through transformers' default cache; restarting positions part them with use_cache=False only."""
    model = tiny().double()
    rows = [p + t for p, t in BATCH]
    alone = torch.cat([model.base_model(torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in rows])
    ids, restarting = torch.tensor([sum(rows, [])]), torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = {cache: model.base_model(ids, position_ids=restarting, use_cache=cache).last_hidden_state[0] for cache in (True, False)}
    assert torch.allclose(packed[False], alone, atol=1e-12) and (packed[True] - alone).abs().max() > 0.1
    ours, _ = predictors(model, [row[:1] for row in rows], [row[1:] for row in rows])
    assert torch.allclose(ours, torch.cat([part[:-1] for part in alone.split([len(row) for row in rows])]), atol=1e-12)


# ------------------------------------------------------------------------------------------------ memory: number formats, recomputation, long rows


def test_bfloat16_with_master_weights_trains_to_the_float32_loss(alone: None) -> None:
    losses = {}
    for dtype, model in (("float32", tiny()), ("bfloat16", parallel.shard(tiny(), "bfloat16"))):
        losses[dtype] = list(train_pairs(model, itertools.repeat(BATCH), 20, 8e-3, linear_schedule(0.1), max_tokens=20))
        assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
    a, b = losses.values()
    assert a[0] > 3 and a[-1] < 0.3 and b != a and b == pytest.approx(a, abs=0.1) and b[-1] == pytest.approx(a[-1], abs=0.03)
    with pytest.raises(ValueError, match="load them in float32, and let parallel.shard compute in another dtype"):
        next(train_pairs(tiny().bfloat16(), itertools.repeat(BATCH), 1, 1e-3, linear_schedule(0.1)))


@pytest.mark.parametrize("tied", [False, True])
def test_small_steps_add_up_where_bfloat16_would_stand_still(alone: None, tied: bool, seen: dict[str, list]) -> None:
    """Steps of 1e-5 on norm weights of 1: in bfloat16 (spacing 2^-7) each would be rounded away. Nor are the gradients of several backwards rounded where they are added up."""
    model = parallel.shard(tiny(tied), "bfloat16")
    list(train_pairs(model, itertools.repeat(BATCH), 5, 1e-5, lambda progress: 1.0, max_tokens=1))
    moved = (parallel.plain(model.model.norm.weight) - 1).detach().abs()
    assert 1e-5 < moved.max() < 5.1e-5 and moved.median() > 1e-5
    whole, parts = naive_gradients(tiny(tied), BATCH), [parallel.plain(g) for g in seen["gradient"][0]]
    assert close(whole, parts, 0.02) and not any(torch.equal(g, g.bfloat16().float()) for g in parts if g.ndim > 1)


@pytest.fixture
def alone() -> Iterator[None]:
    """One process, with what shards want."""
    yield
    parallel.finish()


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_activation_checkpointing_gives_the_same_gradient_and_leaves_the_model_as_found(kind: str, seen: dict[str, list]) -> None:
    calls = []
    for checkpointing in (False, True):
        model, count = family(kind), []
        model.get_input_embeddings().requires_grad_(False)           # the reentrant kind would then learn nothing
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, count=count: count.append(1))
        list(train_pairs(model, iter([BATCH]), 1, 1e-3, lambda progress: 1.0, checkpointing=checkpointing))
        calls.append(len(count))
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) and not model.training
    assert calls == [1, 2] and all(torch.equal(a, b) for a, b in zip(*seen["gradient"]))           # each layer once more, in the backward pass


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that an operation returned."""
    most = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        self.most = max([self.most] + [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        return out


def test_a_long_context_never_holds_the_logits() -> None:
    """3000 target tokens and 16000 words, training and held-out loss: 48 million logits, of which at most a million are there at once."""
    V, T = 16_000, 3000
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                                                         bos_token_id=None, eos_token_id=None, pad_token_id=None), attn_implementation="sdpa")
    pairs = [([1, 2, 3], torch.randint(V, (T,)).tolist())]
    with Largest() as seen:
        [loss] = train_pairs(model, iter([pairs]), 1, 1e-3, lambda progress: 1.0, checkpointing=True)
        after = mean_loss(model, pairs)
    assert seen.most <= 1 << 20 < T * V / 40 and loss == pytest.approx(math.log(V), abs=0.1) and after < loss


def test_held_out_loss_is_the_naive_one_and_moves_nothing() -> None:
    model = tiny().train()
    before = [p.detach().clone() for p in model.parameters()]
    assert mean_loss(model, BATCH, 20) == pytest.approx(naive_loss(model, BATCH).item(), abs=1e-5) and model.training
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(model.parameters(), before))
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="held-out loss is nan"):
        mean_loss(model, BATCH)


def test_the_last_token_of_every_target_is_trained_with_pad_equal_to_eos(seen: dict[str, list]) -> None:
    """The EOS row of the head is pulled towards the states before each EOS: closed form of the untied head's gradient."""
    model = tiny()
    expected = torch.zeros(32)
    with torch.no_grad():
        for prompt, target in BATCH:
            hidden = model.base_model(torch.tensor([prompt + target])).last_hidden_state[0]
            p = torch.softmax(model.lm_head(hidden), -1)[:, EOS]
            for i in range(len(prompt), len(prompt) + len(target)):
                expected -= (float((prompt + target)[i] == EOS) - p[i - 1]) * hidden[i - 1] / TARGETS
    list(train_pairs(model, iter([BATCH]), 1, 1e-3, lambda progress: 1.0))
    head = [name for name, _ in model.named_parameters()].index("lm_head.weight")
    assert torch.allclose(seen["gradient"][0][head][EOS], expected, atol=1e-5) and expected.norm() > 0.1


@pytest.mark.parametrize("max_tokens", [1, 12, 20])
def test_micro_batch_size_does_not_change_the_update(max_tokens: int, seen: dict[str, list]) -> None:
    """One denominator for the whole step: rows of unequal length in 4, 3 or 2 micro-batches give the gradient of one."""
    whole, pieces = tiny(), tiny()
    a = list(train_pairs(whole, itertools.repeat(BATCH), 3, 1e-3, lambda progress: 1.0))
    b = list(train_pairs(pieces, itertools.repeat(BATCH), 3, 1e-3, lambda progress: 1.0, max_tokens=max_tokens))
    assert a == pytest.approx(b, abs=1e-5) and a[0] > a[2]
    assert close(seen["gradient"][0], seen["gradient"][3]) and close(seen["gradient"][2], seen["gradient"][5], 1e-4)
    assert len(sft.micro_batches([len(p) + len(t) for p, t in BATCH], max_tokens)) == {1: 4, 12: 3, 20: 2}[max_tokens]


def test_order_within_a_batch_and_a_copied_pair_change_nothing(seen: dict[str, list]) -> None:
    for batch in (BATCH, BATCH[::-1], BATCH * 2):
        list(train_pairs(tiny(), iter([batch]), 1, 1e-3, lambda progress: 1.0))
    assert close(*seen["gradient"][:2]) and close(*seen["gradient"][1:])


def test_the_update_is_adamw_on_the_clipped_gradient(seen: dict[str, list]) -> None:
    """First step from zero moments: each weight moves by lr * g / (|g| + eps'), so by lr at most; a rate of 0 moves nothing; gradients do not pile up."""
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    list(train_pairs(model, iter([BATCH]), 1, 1e-3, lambda progress: 1.0))
    norm = torch.stack([g.norm() for g in seen["gradient"][0]]).norm().item()
    assert norm > 1 and seen["norm"][0] == pytest.approx(1, abs=1e-4)
    for p, old, g in zip(model.parameters(), before, seen["gradient"][0]):
        assert torch.allclose(p.detach() - old, -1e-3 * (g / norm) / ((g / norm).abs() + 1e-8), atol=1e-5)
    still = tiny()
    list(train_pairs(still, itertools.repeat(BATCH), 3, 1e-3, lambda progress: 0.0))
    assert all(torch.equal(p, old) for p, old in zip(still.parameters(), before))
    assert close(seen["gradient"][1], seen["gradient"][2]) and close(seen["gradient"][2], seen["gradient"][3])


def test_overfits_three_pairs() -> None:
    """To near-zero loss, and the sampler then writes the targets, stop token included."""
    model, pairs = tiny(), BATCH[:3]
    losses = list(train_pairs(model, itertools.repeat(pairs), 60, 1e-2, linear_schedule(0.1)))
    assert losses[0] > 3 and losses[-1] < 0.01 and not model.training
    rollout = Sampler(model, {EOS}, EOS).generate([p for p, _ in pairs], 1, 8, 0.0)
    assert [rollout.completion(n) for n in range(3)] == [t for _, t in pairs] and rollout.finished.all()


def test_a_loss_that_is_not_finite_stops_before_the_update() -> None:
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        before["model.norm.weight"][3] = model.model.norm.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="loss nan, gradient norm nan at step 1, which is not made: lower the learning rate"):
        list(train_pairs(model, itertools.repeat(BATCH), 2, 1e-3, lambda progress: 1.0))
    assert all(torch.equal(v.nan_to_num(9), before[k].nan_to_num(9)) for k, v in model.state_dict().items())


def overflow(at: int) -> Callable:
    """clip_grad_norm_ that finds, in its call number `at`, what an overflow in the backward pass leaves behind on this process: one infinite element."""
    clip, calls = torch.nn.utils.clip_grad_norm_, itertools.count(1)

    def spoiled(parameters: Iterator[torch.nn.Parameter], limit: float) -> torch.Tensor:
        parameters = list(parameters)
        if next(calls) == at:
            grad = parameters[-1].grad
            (grad.to_local() if isinstance(grad, DTensor) else grad).view(-1)[:1] = math.inf
        return clip(parameters, limit)
    return spoiled


@pytest.mark.parametrize("sharded", [False, True])
def test_a_gradient_that_is_not_finite_under_a_finite_loss_moves_nothing(alone: None, monkeypatch: pytest.MonkeyPatch, sharded: bool) -> None:
    """Two steps are made, the third is not: weights and moments are those of the second."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow(3))
    model = parallel.shard(tiny()) if sharded else tiny()
    optimizer, losses = sft.adamw(model), []
    with pytest.raises(FloatingPointError, match=r"loss \d.*, gradient norm inf at step 3, which is not made: lower the learning rate, or look at its pairs"):
        for loss in train_pairs(model, itertools.repeat(BATCH), 5, 1e-3, lambda progress: 1.0, optimizer=optimizer):
            losses.append(loss)
            after = [parallel.plain(p.detach()).clone() for p in model.parameters()]
    assert len(losses) == 2 and losses[1] < losses[0] and {s["step"].item() for s in optimizer.state.values()} == {2.0} and not model.training
    assert all(torch.equal(parallel.plain(p.detach()), old) and old.isfinite().all() for p, old in zip(model.parameters(), after, strict=True))


def test_weights_that_an_update_broke_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser's own overflow, after a finite loss and gradient: no step is given on, so none is kept."""
    real, model, losses = torch.optim.AdamW.step, tiny(), []

    def step(self: torch.optim.AdamW) -> None:
        real(self)
        if len(losses) == 1:
            self.param_groups[0]["params"][-1].data.view(-1)[0] = math.inf
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(FloatingPointError, match="step 2 left weights that are not finite: lower the learning rate, or look at its pairs"):
        for loss in train_pairs(model, itertools.repeat(BATCH), 5, 1e-3, lambda progress: 1.0):
            losses.append(loss)
    assert len(losses) == 1


def test_a_run_that_a_gradient_ends_keeps_its_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the step, writes no model, and the same command goes on from step 2 to the weights of a run without the accident."""
    tiny().save_pretrained(tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    path = file_of(tmp_path, *[{"prompt": f"Ann {i}", "target": f" has {i}"} for i in range(6)])
    flags = f"--model {tmp_path}/start --data {path} --epochs 2 --batch_size 2 --lr 1e-3 --device cpu --save_every 2 --out {tmp_path}/".split()
    run = lambda name, *more: sft.main(parse_config([*flags[:-1], flags[-1] + name, *more]))
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="gradient norm inf at step 4"):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", overflow(4))
        run("hit")
    ends = time.time() + 60
    while not (tmp_path / "hit/checkpoints/step_000002").exists() and time.time() < ends:               # it is written in the background, and the end of a process waits for that
        time.sleep(0.01)
    assert [p.name for p in (tmp_path / "hit/checkpoints").glob("step_*")] == ["step_000002"] and not (tmp_path / "hit/model.safetensors").exists()
    run("hit", "--resume", "auto")
    run("straight")
    assert all(map(torch.equal, *([p.detach() for p in load_model(tmp_path / name)[0].parameters()] for name in ("hit", "straight"))))

# ------------------------------------------------------------------------------------------------ schedule and order


def test_linear_schedule_closed_form() -> None:
    rate = linear_schedule(0.1)
    for progress, expected in ((0.0, 0.0), (0.025, 0.25), (0.05, 0.5), (0.0999999, 1.0), (0.1, 1.0), (0.325, 0.75), (0.55, 0.5), (0.91, 0.1), (1.0, 0.0),
                               (1.1, 0.0)):
        assert rate(progress) == pytest.approx(expected, abs=1e-5)
    assert [linear_schedule(0.0)(p) for p in (0.0, 0.25, 0.5, 1.0)] == [1.0, 0.75, 0.5, 0.0]
    assert [linear_schedule(1.0)(p) for p in (0.25, 0.5)] == pytest.approx([0.25, 0.5])
    steps = [rate(i / 1000) for i in range(1000)]
    assert steps.index(max(steps)) == 100 and max(steps) == 1.0 and sum(steps) == pytest.approx(500, abs=1)


def test_the_rate_of_each_step_is_the_schedule(seen: dict[str, list]) -> None:
    list(train_pairs(tiny(), itertools.repeat(BATCH), 20, 2e-3, linear_schedule(0.2)))
    assert seen["lr"] == pytest.approx([2e-3 * (i / 4 if i < 4 else (20 - i) / 16) for i in range(20)], abs=1e-9)


def test_shuffled_epochs() -> None:
    pairs = [([i], [i]) for i in range(7)]
    flat = [p[0][0] for batch in itertools.islice(shuffled(pairs, 3, 0), 14) for p in batch]       # 42 pairs: six epochs, cut across by batches of 3
    epochs = [flat[i:i + 7] for i in range(0, 42, 7)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and len(set(map(tuple, epochs))) == 6
    again, other = ([p[0][0] for batch in itertools.islice(shuffled(pairs, 3, seed), 14) for p in batch] for seed in (0, 1))
    assert again == flat != other and pairs == [([i], [i]) for i in range(7)]
    large = [[p[0][0] for p in batch] for batch in itertools.islice(shuffled(pairs, 16, 0), 7)]      # batches larger than the data: 112 pairs, 16 epochs
    assert all(len(batch) == 16 for batch in large) and Counter(sum(large, [])) == dict.fromkeys(range(7), 16)

# ------------------------------------------------------------------------------------------------ pairs


def file_of(folder: Path, *lines: object) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def config(data: str, **more: object) -> Config:
    return Config(**{"model": "", "data": data, "out": "", "device": "cpu", **more})


def test_pairs_of_prompt_and_target(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"prompt": "Ann", "target": " has 4"}, "", {"prompt": "x", "target": "4"})
    assert load_pairs(config(path), TOKENIZER) == [([256, 58], [257, 32, 52, EOS]), ([120, 58], [52, EOS])]          # the chat template adds ":" (58)
    assert load_pairs(config(path, limit=1), TOKENIZER) == [([256, 58], [257, 32, 52, EOS])]


def test_pairs_of_teacher_traces(tmp_path: Path) -> None:
    problem = {"id": "a", "problem": "Ann", "answer": "4", "teachers": ["one 1", " two 2\n"]}
    path = file_of(tmp_path, problem, {**problem, "id": "b", "teachers": []}, {**problem, "id": "c", "teachers": ["three"]})
    pairs = load_pairs(config(path, instruction="Go."), TOKENIZER)
    assert [TOKENIZER.decode(p) for p, _ in pairs] == ["Ann\n\nGo.:"] * 3
    assert [TOKENIZER.decode(t) for _, t in pairs] == [f"<think>\n{trace}</think>\n\\boxed{{4}}<|im_end|>" for trace in ("one 1", "two 2", "three")]
    opened = TiktokenTokenizer({**TOKENIZER.spec, "chat_template": "{{ messages[0].content }}:<think>\n{{ '' }}"})              # the prompt has written it already
    assert [opened.decode(t) for _, t in load_pairs(config(path), opened)][0] == "one 1</think>\n\\boxed{4}<|im_end|>"
    assert all(t[-1] == EOS and t.count(EOS) == 1 for _, t in pairs)
    assert len(load_pairs(config(path, limit=1), TOKENIZER)) == 2    # one problem, two traces
    first = sft.load_problems(path)[0]
    assert load_pairs(config(path), TOKENIZER)[0][0] == problem_ids(TOKENIZER, first) == chat_ids(TOKENIZER, "Ann")
    with pytest.raises(ValueError, match="no problem has a teacher trace"):
        load_pairs(config(file_of(tmp_path, {**problem, "teachers": []})), TOKENIZER)


@pytest.mark.parametrize("line", [{"prompt": "x"}, {"prompt": "x", "target": 4}, {"prompt": None, "target": "y"},
                                  {"prompt": "x", "target": ""}, {"prompt": "x", "target": " \n"}, {"prompt": "", "target": "y"}, {"prompt": "\t", "target": "y"},
                                  {"prompt": "x", "target": "y", "weight": "1"}, ["x", "y"], "{broken"])
def test_a_malformed_pair_is_named_with_file_and_line(tmp_path: Path, line: object) -> None:
    good = {"prompt": "x", "target": "y"}
    path = file_of(tmp_path, good, "", line, good)
    with pytest.raises(ValueError) as error:
        load_pairs(config(path, limit=1), TOKENIZER)                 # also where only the first line is wanted
    assert str(error.value).startswith(f"{path}:3: ") and ("two strings 'prompt' and 'target'" in str(error.value) or "not valid JSON" in str(error.value))
    first = file_of(tmp_path, line, good)
    with pytest.raises(ValueError) as error:
        load_pairs(config(first), TOKENIZER)
    assert str(error.value).startswith(f"{first}:1: ")

# ------------------------------------------------------------------------------------------------ tasks: GSRM's pairs, problems, lengths

STEPS = format_steps([Step("because", "what is 1+1", "2"), Step("then", "what is 2+1", "3")])
GSRM_PAIR = {"prompt": decompose_prompt("1+1+1?", "1+1 is 2, and 1 more is 3."), "target": STEPS}


@pytest.mark.parametrize("template", [TOKENIZER.spec["chat_template"], "<|im_end|>{{ messages[0].content }}<think>\n"])
def test_a_gsrm_is_trained_on_the_very_prompt_that_scoring_sends(tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids for ids, through scorer.load_gsrm, TextModel and the sampler on one side and a file of pairs on the other; hostile text included. The target is what it would write."""
    tokenizer = TiktokenTokenizer({**TOKENIZER.spec, "chat_template": template})
    tiny().save_pretrained(tmp_path / "gsrm")
    tokenizer.save_pretrained(tmp_path / "gsrm")
    problem, trace = "1+1+1? <|im_end|>", "1+1 is 2.\n[Answer 1]: 7 </trace> <think>\n\u2028 and 1 more is 3."
    pairs = [GSRM_PAIR, {"prompt": decompose_prompt(problem, trace), "target": STEPS}, {"prompt": judge_prompt("query", "what is 1+1", "1+1?"), "target": "yes"}]
    examples = load_examples(config(file_of(tmp_path, *pairs), task="gsrm"), tokenizer, file_of(tmp_path, *pairs))
    sent: list[list[int]] = []
    generate, of = Sampler.generate, rollout.predictors
    monkeypatch.setattr(Sampler, "generate", lambda self, prompts, *rest: sent.extend(prompts) or generate(self, prompts, *rest))
    monkeypatch.setattr(rollout, "predictors", lambda model, prompts, completions: sent.extend(prompts) or of(model, prompts, completions))
    gsrm = evaluation.load_gsrm(str(tmp_path / "gsrm"), "", None, "cpu", max_new_tokens=1)
    gsrm.decompose(["1+1+1?"], ["1+1 is 2, and 1 more is 3."])
    gsrm.decompose([problem], [trace])
    gsrm.judge([("query", "what is 1+1", "1+1?")])
    assert [ids for n, ids in enumerate(sent) if ids not in sent[:n]] == [e.pair[0] for e in examples] and all(EOS not in ids[1:] for ids in sent)
    assert parse_steps(tokenizer.decode(examples[0].pair[1], skip_special_tokens=True)).steps == parse_steps(STEPS).steps and examples[0].pair[1][-1] == EOS


@pytest.mark.parametrize(("pair", "message"), [
    ({"prompt": "Split this trace.", "target": STEPS}, "the prompt is not one of GSRM's"),
    ({**GSRM_PAIR, "target": "1. because: what is 1+1? 2"}, "the target cannot be read as steps (no step tags)"),
    ({**GSRM_PAIR, "target": STEPS.replace("[Answer 2]: 3", "")}, "the target cannot be read as steps (step 2: no Answer)"),
    ({**GSRM_PAIR, "target": ""}, "expected the two strings 'prompt' and 'target', neither of them empty"),
    ({"prompt": judge_prompt("meta", "a", "b"), "target": "maybe"}, "a judge's target is 'yes' or 'no', not 'maybe'"),
    ({**GSRM_PAIR, "target": "\ud800"}, "expected the two strings 'prompt' and 'target'"),
])
def test_a_pair_that_gsrm_could_not_use_is_refused_or_listed(tmp_path: Path, pair: dict, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError) as error:
        load_pairs(config(file_of(tmp_path, GSRM_PAIR, pair), task="gsrm"), TOKENIZER)
    assert f":2: {message}" in str(error.value)
    path = file_of(tmp_path, GSRM_PAIR, {**GSRM_PAIR, "target": "[No steps]"}, pair, {"prompt": judge_prompt("meta", "a", "b"), "target": "no"}, "{broken")
    assert len(load_pairs(config(path, task="gsrm", skip_bad=True), TOKENIZER)) == 3
    err = capsys.readouterr().err
    assert f"2 bad lines of {path} passed over:" in err and f"{path}:3: {message}" in err and f"{path}:5: not valid JSON" in err
    with pytest.raises(ValueError, match="holds no problems"):
        load_pairs(config(file_of(tmp_path, ""), task="gsrm"), TOKENIZER)
    assert len(load_pairs(config(file_of(tmp_path, "{broken", {"prompt": "x"}, GSRM_PAIR), task="gsrm", skip_bad=True), TOKENIZER)) == 1     # whatever the first line is
    if message.startswith("the prompt"):
        assert len(load_pairs(config(file_of(tmp_path, GSRM_PAIR, pair)), TOKENIZER)) == 2           # without --task any pair will do


def test_data_of_another_task_are_an_error(tmp_path: Path) -> None:
    problem = {"id": "a", "problem": "Ann", "answer": "4", "teachers": ["one"]}
    with pytest.raises(ValueError, match="holds problems, and --task gsrm wants lines with 'prompt' and 'target'"):
        load_pairs(config(file_of(tmp_path, problem), task="gsrm"), TOKENIZER)
    with pytest.raises(ValueError, match="holds prompt/target pairs, and --task trace wants problems"):
        load_pairs(config(file_of(tmp_path, GSRM_PAIR), task="trace"), TOKENIZER)
    assert len(load_pairs(config(file_of(tmp_path, problem), task="trace"), TOKENIZER)) == 1


def test_a_longer_pair_is_an_error_or_listed_never_cut(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = file_of(tmp_path, {"prompt": "x", "target": "abc"}, {"prompt": "x", "target": "1234"}, {"prompt": "xx", "target": "1 2 3 4"})
    lengths = [len(p) + len(t) for p, t in load_pairs(config(path), TOKENIZER)]
    with pytest.raises(ValueError) as error:
        load_pairs(config(path, max_length=lengths[1] - 1), TOKENIZER)
    assert str(error.value).startswith(f"{path}:2: {lengths[1]} tokens, more than {lengths[1] - 1}") and "2 of 3 pairs are too long: --skip_long" in str(error.value)
    kept = load_pairs(config(path, max_length=lengths[1], skip_long=True), TOKENIZER)
    assert [len(p) + len(t) for p, t in kept] == lengths[:2]
    assert f"1 pairs of {path} are longer than {lengths[1]} tokens and are left out:\n  {path}:3: {lengths[2]} tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match="3 of 3 pairs are too long: a longer --max_length helps, or"):
        load_pairs(config(path, max_length=2, skip_long=True), TOKENIZER)
    with pytest.raises(ValueError, match=f"{lengths[2]} tokens, more than {lengths[1]} "):
        load_examples(config(path, max_length=1000), TOKENIZER, path, positions=lengths[1])          # the model's own limit holds too


def test_problems_without_a_trace_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    problem = {"id": "a", "problem": "Ann", "answer": "4", "teachers": ["one"]}
    assert len(load_pairs(config(file_of(tmp_path, problem, {**problem, "id": "b", "teachers": []})), TOKENIZER)) == 1
    assert "1 problems of" in (err := capsys.readouterr().err) and "have no teacher trace and are left out:\n  b\n" in err


def test_a_tokenizer_without_an_end_cannot_teach_one() -> None:
    endless = TiktokenTokenizer(TOKENIZER.spec)
    endless.eos_token_id = None
    with pytest.raises(ValueError, match="set eos_token in its tokenizer_config.json"):
        sft.token_pair(endless, "x", "y")


def test_a_held_out_share_takes_problems_whole(tmp_path: Path) -> None:
    examples = [Example(f"{n}.{k}", f"problem {n}", ([n], [k])) for n in range(20) for k in range(3)]
    train, held = hold_out(examples, 0.2, 0)
    assert len(held) == 12 and sorted(e.where for e in train + held) == sorted(e.where for e in examples)
    assert not {e.source for e in train} & {e.source for e in held}
    assert hold_out(examples, 0.2, 0) == (train, held) != hold_out(examples, 0.2, 1) and len(hold_out(examples, 0.001, 0)[1]) == 3
    with pytest.raises(ValueError, match="at least two problems"):
        hold_out(examples[:3], 0.5, 0)
    path = file_of(tmp_path, *[{"prompt": decompose_prompt(f"{n} + 1?", trace), "target": STEPS} for n in range(2) for trace in ("one way", "another way")])
    assert len({e.source for e in load_examples(config(path), TOKENIZER, path)}) == 2             # two traces of one problem belong together
    path = file_of(tmp_path, {"id": "a", "problem": "Ann", "answer": "4", "teachers": ["one", "two"]}, {"id": "b", "problem": "Bob", "answer": "4", "teachers": ["one"]})
    assert [e.source for e in load_examples(config(path), TOKENIZER, path)] == ["Ann", "Ann", "Bob"]


GSM8K = Path(__file__).parent.parent.parent / "shared" / "data" / "gsm8k_train.jsonl"


@pytest.mark.skipif(not GSM8K.is_file(), reason="the GSM8K file is not here")
def test_gsm8k_makes_pairs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every row converts; the pair of a row is its worked solution and its gold answer."""
    out = tmp_path / "train.jsonl"
    convert.main(["gsm8k", "--input", str(GSM8K), "--out", str(out), "--limit", "300"])
    problems, pairs = load_problems(out), load_pairs(config(str(out), task="trace"), TOKENIZER)
    assert len(problems) == len(pairs) == 300
    for p, (prompt, target) in zip(problems, pairs):
        assert prompt == problem_ids(TOKENIZER, p) and TOKENIZER.decode(target) == f"<think>\n{p.teachers[0]}</think>\n\\boxed{{{p.answer}}}<|im_end|>"

# ------------------------------------------------------------------------------------------------ the command


def test_main_trains_a_checkpoint_that_loads_and_repeats(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny().save_pretrained(tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    path = file_of(tmp_path, *[{"prompt": f"Ann {i}", "target": f" has {i}"} for i in range(6)])
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sft.main(config(path, model=str(tmp_path / "start"), out=str(tmp_path / name), epochs=5.0, batch_size=4, lr=5e-3, seed=seed))
        runs.append(load_model(tmp_path / name))
    out = capsys.readouterr().out
    assert out.count("6 pairs, 24 target tokens, 8 steps of 4") == 3 and out.count("checkpoint in") == 3         # 5 * 6 / 4 = 7.5
    a, b, c = (list(model.state_dict().values()) for model, _ in runs)
    assert all(map(torch.equal, a, b)) and not all(map(torch.equal, a, c))
    model, tok = runs[0]
    pairs = load_pairs(config(path), tok)
    assert tok.spec == TOKENIZER.spec and naive_loss(model, pairs) < naive_loss(tiny(), pairs) / 2


def test_main_reports_held_out_loss_and_keeps_the_best_epoch(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Training longs for 4 where the held-out pairs say 7: their loss falls, then rises, and what is saved is the epoch in between."""
    tiny().save_pretrained(tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"Ann {i}", "target": f" has {4 if i else 7}"} for i in range(6)])
    write_jsonl(tmp_path / "held.jsonl", [{"prompt": f"Ann {i}", "target": f" has {7 if i > 7 else 4}"} for i in range(6, 9)])
    arguments = dict(model=str(tmp_path / "start"), data=str(tmp_path / "train.jsonl"), eval_data=str(tmp_path / "held.jsonl"), epochs=12.0, batch_size=2, lr=1e-2, device="cpu")
    held = load_pairs(config(str(tmp_path / "held.jsonl")), TOKENIZER)
    loss, tables = {}, {}
    for keep in ("best", "last"):
        sft.main(Config(**arguments, out=str(tmp_path / keep), keep=keep))
        loss[keep] = mean_loss(load_model(tmp_path / keep)[0], held)
        note = json.loads((tmp_path / keep / "sft.json").read_text())
        tables[keep] = note["epochs"]
        assert note["chat_template"] == template_hash(TOKENIZER) and note["config"]["keep"] == keep
        assert note["data"] == {str(path): file_hash(path) for path in (tmp_path / "train.jsonl", tmp_path / "held.jsonl")}
    curve = [row["held_out"] for row in tables["best"]]
    assert tables["best"] == tables["last"] and [(row["epoch"], row["step"]) for row in tables["best"]] == [(e, 3 * e) for e in range(1, 13)]
    assert min(curve) < curve[-1] and loss["best"] == pytest.approx(min(curve), abs=1e-5) and loss["last"] == pytest.approx(curve[-1], abs=1e-5)
    for epochs, end in ((0.2, (0.2, 1)), (1.1, (1.1, 2))):                 # 6 pairs, 4 a step: all of them have had their turn after two
        sft.main(Config(**arguments | {"epochs": epochs, "batch_size": 4}, out=str(tmp_path / f"{epochs}")))
        ends = [(row["epoch"], row["step"]) for row in json.loads((tmp_path / f"{epochs}" / "sft.json").read_text())["epochs"]]
        assert ends == [end]
    out = capsys.readouterr()
    assert ("3 pairs held out (loss " in out.out and out.out.count("the best so far") >= 1
            and f"epoch 12, step 36: loss {tables['last'][-1]['loss']:.4f}, held out {curve[-1]:.4f}" in out.out)


KILLED = """
import os, runpy, signal, sys
import data
write, saved = data.save_model, []
def cut_short(model, tokenizer, out, state=None):
    write(model, tokenizer, out, state)
    saved.append(out)
    if len(saved) == 2:                                 # the second epoch that is the best so far
        file = out / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
data.save_model = cut_short
runpy.run_path("sft.py", run_name="__main__")
"""


def test_a_run_killed_while_it_writes_and_one_told_to_leave_end_as_the_straight_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Weights bitwise, losses of all epochs too; what was half written at the kill is written again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)                            # bitwise means the same number of threads in every process
    tiny().save_pretrained(tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    path = file_of(tmp_path, *[{"prompt": f"Ann {i}", "target": f" has {i}"} for i in range(7)])
    flags = f"--model {tmp_path}/start --data {path} --eval_share 0.3 --epochs 4 --batch_size 2 --lr 1e-2 --keep best --save_every 2 --device cpu --out".split()
    sft.main(parse_config([*flags, str(tmp_path / "straight")]))
    end = lambda name: (json.loads((tmp_path / name / "sft.json").read_text())["epochs"], [p.detach() for p in load_model(tmp_path / name)[0].parameters()])
    table, weights = end("straight")
    assert [row["step"] for row in table] == [3, 5, 8, 10] and table[0]["held_out"] > table[1]["held_out"] and not (tmp_path / "straight/checkpoints").exists()

    (tmp_path / "killed.py").write_text(KILLED)
    killed = subprocess.run([sys.executable, tmp_path / "killed.py", *flags, tmp_path / "killed"], cwd=ROOT, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL and (tmp_path / "killed/model.safetensors").stat().st_size == 1000, killed.stderr[-2000:]
    with pytest.raises(ValueError, match="choose another --out, or go on with --resume auto"):
        sft.main(parse_config([*flags, str(tmp_path / "killed")]))
    with pytest.raises(ValueError, match="--lr was 0.01, is 0.1"):
        sft.main(parse_config([*flags, str(tmp_path / "killed"), "--resume", "auto", "--lr", "0.1"]))
    whole = Path(path).read_text()
    Path(path).write_text(whole.replace("Ann 3", "Ann 8"))
    with pytest.raises(ValueError, match="--resume: .*data.jsonl has other contents .* put the old file back, or choose another --out"):
        sft.main(parse_config([*flags, str(tmp_path / "killed"), "--resume", "auto"]))
    Path(path).write_text(whole)

    real = sft.train_pairs

    def told(*arguments: object) -> Iterator[float]:
        for step, loss in enumerate(real(*arguments), arguments[7] + 1):
            if step in (5, 7):                          # the first is the end of an epoch
                os.kill(os.getpid(), signal.SIGTERM)
            yield loss
    capsys.readouterr()
    for name, stops in (("killed", ()), ("told", (5, 7))):
        monkeypatch.setattr(sft, "train_pairs", told if stops else real)
        for step in stops:
            with pytest.raises(Leave, match=f"SIGTERM: stopped after step {step}; go on with --resume auto"):
                sft.main(parse_config([*flags, str(tmp_path / name), "--resume", "auto"]))
            assert not (tmp_path / name / "sft.json").exists()
        sft.main(parse_config([*flags, str(tmp_path / name), "--resume", "auto"]))
        again, after = end(name)
        assert again == table and all(torch.equal(a, b) for a, b in zip(weights, after, strict=True)), name
    said = capsys.readouterr().out
    killed_at, *told_at = [int(n) for n in re.findall(r"going on from \S+step_0*(\d+)", said)]
    assert killed_at in (2, 4) and told_at == [5, 7]                        # the one of step 4 may not have been through when the kill came
    with pytest.raises(ValueError, match="holds a checkpoint or a run already: choose another --out$"):
        sft.main(parse_config([*flags, str(tmp_path / "told"), "--resume", "auto"]))             # it is through
    torch.set_num_threads(before)


def test_a_signal_on_a_step_with_a_checkpoint_writes_no_second_one_and_copies_of_the_user_s_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                                                capsys: pytest.CaptureFixture) -> None:
    """Between removing the one of that step and renaming its successor a kill would find none."""
    tiny().save_pretrained(tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    path, out = file_of(tmp_path, *[{"prompt": f"Ann {i}", "target": f" has {i}"} for i in range(6)]), tmp_path / "out"
    flags = f"--model {tmp_path}/start --data {path} --epochs 2 --batch_size 1 --save_every 4 --device cpu --resume auto --out {out}".split()
    saved, real, save = [], sft.train_pairs, sft.Checkpoints.save

    def told(*arguments: object) -> Iterator[float]:
        for step, loss in enumerate(real(*arguments), 1):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield loss
    monkeypatch.setattr(sft.Checkpoints, "save", lambda self, *given, **notes: saved.append(given[3]) or save(self, *given, **notes))
    with monkeypatch.context() as patch, pytest.raises(Leave, match="stopped after step 4"):
        patch.setattr(sft, "train_pairs", told)
        sft.main(parse_config(flags))
    assert saved == [4] and [path.name for path in (out / "checkpoints").iterdir()] == ["step_000004"]
    (out / "checkpoints/best.pt").write_text("mine")
    shutil.copytree(out / "checkpoints/step_000004", out / "checkpoints/step_000004_mine")
    sft.main(parse_config(flags))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["best.pt", "step_000004_mine"] and (out / "sft.json").exists()
    assert "starts over" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pairs", "problems"])
def test_the_limit_is_of_the_training_data_only(tmp_path: Path, capsys: pytest.CaptureFixture, kind: str) -> None:
    """Two of six are trained on, and the held-out loss is that of all five held-out pairs."""
    tiny().save_pretrained(tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    for name, count in (("train", 6), ("test", 5)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"Ann {i}", "target": f" has {i}" * (1 + i)} if kind == "pairs" else
                                                 {"id": f"{name} {i}", "problem": f"Ann {i}", "answer": str(i), "teachers": [f"Ann has {i}"]} for i in range(count)])
    data, held = (str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")) if kind == "pairs" else (str(tmp_path), str(tmp_path))
    settings = config(data, eval_data=held, limit=2, model=str(tmp_path / "start"), out=str(tmp_path / "out"))
    assert [len(load_examples(settings, TOKENIZER, path, split)) for path, split in ((data, "train"), (held, "test"))] == [2, 5]
    sft.main(settings)
    said = capsys.readouterr().out
    assert "2 pairs, " in said and "5 pairs held out" in said
    row, = json.loads((tmp_path / "out/sft.json").read_text())["epochs"]
    pairs = [e.pair for e in load_examples(config(held), TOKENIZER, held, "test")]
    assert len(pairs) == 5 and row["held_out"] == pytest.approx(mean_loss(load_model(tmp_path / "out")[0], pairs), abs=1e-5)


def test_what_is_kept_is_fixed_and_checkpoints_stay_until_the_model_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to leave after the best epoch: another --keep is refused with nothing touched (the best epoch's weights are nowhere else), the same one ends as ever."""
    tiny().save_pretrained(tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"Ann {i}", "target": f" has {4 if i else 7}"} for i in range(6)])
    write_jsonl(tmp_path / "held.jsonl", [{"prompt": f"Ann {i}", "target": f" has {7 if i > 7 else 4}"} for i in range(6, 9)])
    flags = (f"--model {tmp_path}/start --data {tmp_path}/train.jsonl --eval_data {tmp_path}/held.jsonl --epochs 12 --batch_size 2 --lr 1e-2 --device cpu "
             f"--resume auto --out {tmp_path}/").split()
    run = lambda name, keep: sft.main(parse_config([*flags[:-1], flags[-1] + name, "--keep", keep]))
    real = sft.train_pairs

    def told(*arguments: object) -> Iterator[float]:
        for step, loss in enumerate(real(*arguments), arguments[7] + 1):
            if step == 30:
                os.kill(os.getpid(), signal.SIGTERM)
            yield loss
    for keep, other in (("last", "best"), ("best", "last")):
        out = tmp_path / keep
        with monkeypatch.context() as patch, pytest.raises(Leave, match="stopped after step 30"):
            patch.setattr(sft, "train_pairs", told)
            run(keep, keep)
        assert (out / "model.safetensors").exists() == (keep == "best")
        with pytest.raises(ValueError, match=f"--keep was '{keep}', is '{other}'; go on with the same settings, or choose another --out"):
            run(keep, other)
        assert (out / "checkpoints/step_000030/manifest.json").exists()
    (tmp_path / "best/model.safetensors").rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match="best has lost the weights of --keep best: export the newest"):
        run("best", "best")
    assert (out / "checkpoints/step_000030/manifest.json").exists() and not (out / "sft.json").exists()
    (tmp_path / "aside").rename(tmp_path / "best/model.safetensors")
    losses, held = [], load_pairs(config(str(tmp_path / "held.jsonl")), TOKENIZER)
    for keep in ("best", "last"):
        run(keep, keep)
        losses.append([row["held_out"] for row in json.loads((tmp_path / keep / "sft.json").read_text())["epochs"]])
        assert mean_loss(load_model(tmp_path / keep)[0], held) == pytest.approx(min(losses[0]) if keep == "best" else losses[0][-1], abs=1e-5)
    assert losses[0] == losses[1] and len(losses[0]) == 12 and losses[0].index(min(losses[0])) < 10 and not (out / "checkpoints").exists()


def test_the_toy_s_true_structures_train_a_gsrm(tmp_path: Path, alone: None) -> None:
    """From problems to a checkpoint in bfloat16, with activation checkpointing and a held-out share."""
    problems = toy.make_problems(0, 4, 5, (2, 3))
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": decompose_prompt(p.problem, t), "target": format_steps(toy.read(t))} for p in problems for t in p.teachers])
    tiny().save_pretrained(tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    sft.main(parse_config(f"--task gsrm --model {tmp_path}/start --data {tmp_path}/pairs.jsonl --eval_share 0.25 --epochs 2 --lr 3e-3 --dtype bfloat16 "
                          f"--gradient_checkpointing --keep best --device cpu --out {tmp_path}/gsrm".split()))
    table = json.loads((tmp_path / "gsrm" / "sft.json").read_text())["epochs"]
    assert table[1]["held_out"] < table[0]["held_out"] < 6 and next(load_model(tmp_path / "gsrm", dtype="auto")[0].parameters()).dtype == torch.bfloat16


NORMS = """
import runpy, torch, parallel
clip = torch.nn.utils.clip_grad_norm_
def told(parameters, limit):
    norm = clip(parameters, limit)
    print(f"norm {float(parallel.plain(norm)):.6f} of rank {parallel.rank()}", flush=True)
    return norm
torch.nn.utils.clip_grad_norm_ = told
runpy.run_path("sft.py", run_name="__main__")
"""


def test_two_processes_make_the_steps_of_one(tmp_path: Path, seen: dict[str, list]) -> None:
    """Batches of three, so that one process has two micro-batches and the other one; with masters in CPU memory, recomputed layers, held-out losses and the best epoch kept.
    The norm before clipping is looked at too: AdamW would hide a gradient that is a mean instead of a sum."""
    (tmp_path / "norms.py").write_text(NORMS)
    tiny(True).save_pretrained(tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    path = file_of(tmp_path, *[{"prompt": f"Ann {i}", "target": f" has {i}" * (1 + i % 3)} for i in range(9)])
    flags = f"--model {tmp_path}/start --data {path} --eval_share 0.4 --epochs 3 --batch_size 3 --max_tokens 1 --lr 3e-3 --keep best --device cpu --out {tmp_path}/".split()
    sft.main(parse_config([*flags[:-1], flags[-1] + "one"]))
    code, said, _ = torchrun(2, tmp_path / "norms.py", *flags[:-1], flags[-1] + "two", "--offload", "True", "--gradient_checkpointing")
    assert code == 0 and said.count("loss of the last epoch") == 1 and said.count("epoch 1, step") == 1, said[-3000:]           # of the first process
    norms = [torch.stack([g.norm() for g in step]).norm().item() for step in seen["gradient"]]
    for rank in (0, 1):
        assert [float(word) for word in re.findall(rf"norm ([0-9.]+) of rank {rank}", said)] == pytest.approx(norms, rel=1e-3)
    one, two = ({"epochs": json.loads((tmp_path / name / "sft.json").read_text())["epochs"], "model": load_model(tmp_path / name)[0]} for name in ("one", "two"))
    assert len(one["epochs"]) == 3 and all(a == pytest.approx(b, abs=1e-5) for a, b in zip(one["epochs"], two["epochs"], strict=True))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one["model"].parameters(), two["model"].parameters(), strict=True))
    assert two["model"].lm_head.weight is two["model"].model.embed_tokens.weight and not torch.allclose(two["model"].model.norm.weight, torch.ones(32), atol=1e-4)


NEEDED = ["--model", "m", "--data", "d", "--out", "o", "--device", "cpu"]


def test_flags_override_the_preset_and_the_preset_the_defaults(capsys: pytest.CaptureFixture) -> None:
    assert parse_config(NEEDED) == Config(model="m", data="d", out="o", device="cpu")
    paper = asdict(parse_config(["--preset", "paper-gsrm", "--data", "d", "--out", "o", "--device", "cpu", "--lr", "1e-4", "--gradient_checkpointing", "False"]))
    assert {k: v for k, v in paper.items() if v != asdict(Config())[k] and k not in ("preset", "data", "out", "device")} == {
        "task": "gsrm", "model": "Qwen/Qwen2.5-7B-Instruct", "max_length": 25_000, "max_tokens": 25_000, "dtype": "bfloat16", "lr": 1e-4}
    assert (paper["epochs"], paper["warmup"], paper["batch_size"], sft.PRESETS["paper-gsrm"]["lr"]) == (1.0, 0.1, 4, 5e-5)                   # method.md, "GSRM training"


@pytest.mark.parametrize(("flags", "message"), [
    (["--preset", "paper"], "--preset paper: choose one of none, paper-gsrm"), (["--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
    (["--task", "judge"], "--task: invalid choice: 'judge'"), (["--keep", "best"], "--keep 'best': needs held-out pairs"),
    (["--dtype", "float16"], "--dtype: invalid choice: 'float16'"), (["--out", "m"], "--out 'm': a folder, another one than --model"),
    (["--eval_share", "0.1", "--eval_data", "x"], "--eval_share 0.1: not --eval_data too"), (["--batch_size", "0"], "'0' is not a whole number of 1 or more"),
    (["--eval_share", "1"], "'1' is not a finite number in [0, 1)"), (["--warmup", "1.1"], "'1.1' is not a finite number in [0, 1]"),
    (["--model", ""], "--model is needed: checkpoint folder or hub name to start from"), (["--epochs", "two"], "--epochs: 'two' is not a finite number"),
])
def test_a_wrong_flag_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        parse_config([*NEEDED, *flags])
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert end.value.code == 2 and "error: " in last and message in last
