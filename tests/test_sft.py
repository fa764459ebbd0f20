"""Numbers for sft.py: loss and gradient against a naive cross entropy, micro-batches, schedule, pairs. `python -m pytest tests/test_sft.py`"""
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedModel, Qwen2Config

import sft
from data import TiktokenTokenizer, chat_ids, load_model, problem_ids
from rollout import Sampler
from sft import Config, Pair, linear_schedule, load_pairs, shuffled, train_pairs

TOKENIZER = TiktokenTokenizer(dict(name="t", pattern=r" ?[A-Za-z]+|\d|\s|[^\sA-Za-z\d]", words=["Ann", " has"], special=["<|im_end|>"], eos="<|im_end|>",
                                   pad="<|im_end|>", instruction="", chat_template="{% for m in messages %}{{ m.content }}:{% endfor %}"))
EOS = TOKENIZER.eos_token_id
BATCH: list[Pair] = [([1, 2, 3], [4, 5, EOS]), ([6], [7, 8, 9, 10, 11, EOS]), ([1, 2, 3, 4, 5, 6, 7, EOS, 9], [EOS]),
                     ([20, 21], [22, EOS])]                          # pad == eos, also in a prompt
TARGETS = sum(len(t) for _, t in BATCH)


def tiny(tied: bool = False, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
                                                        bos_token_id=None, eos_token_id=None, pad_token_id=None))


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
    with pytest.raises(FloatingPointError, match="step 0: lower the learning rate"):
        list(train_pairs(model, itertools.repeat(BATCH), 2, 1e-3, lambda progress: 1.0))
    assert all(torch.equal(v.nan_to_num(9), before[k].nan_to_num(9)) for k, v in model.state_dict().items())

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
    path = file_of(tmp_path, {"prompt": "Ann", "target": " has 4"}, "", {"prompt": "x", "target": ""})
    assert load_pairs(config(path), TOKENIZER) == [([256, 58], [257, 32, 52, EOS]), ([120, 58], [EOS])]          # the chat template adds ":" (58)
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


def test_flags_are_the_paper_s_defaults_and_unknown_ones_are_errors() -> None:
    parse = HfArgumentParser(Config).parse_args_into_dataclasses
    [parsed] = parse(["--model", "m", "--data", "d", "--out", "o", "--device", "cpu"])
    assert asdict(parsed) == {"model": "m", "data": "d", "out": "o", "instruction": None, "limit": 0, "epochs": 1.0, "batch_size": 4, "max_tokens": 16384,
                              "lr": 5e-5, "warmup": 0.1, "seed": 0, "device": "cpu"}
    assert parse(["--model", "m", "--data", "d", "--out", "o", "--lr", "1", "--instruction", "Go."])[0].lr == 1.0
    with pytest.raises(ValueError, match="not used by the HfArgumentParser"):
        parse(["--model", "m", "--data", "d", "--out", "o", "--learning_rate", "1"])
