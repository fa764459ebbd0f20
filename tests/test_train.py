"""The loop: exact resume, equal runs, one gradient whatever the micro-batch or the number of processes, unscored rows left out, clear refusals."""
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import checkpoint, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, HfArgumentParser, Qwen2Config

import reward
import train
from checkpoint import Checkpoints, load_checkpoint
from data import Problem, file_hash, load_model, load_tokenizer, problem_ids, stop_and_pad_ids, write_jsonl
from gsrm import Score
from rollout import Rollout, Sampler
from toy import make_problems
from update import reference_logp

ROOT = Path(train.__file__).parent
SMALL = ["--problems_per_step", "4", "--group_size", "4", "--max_new_tokens", "40", "--eval_problems", "0", "--gsrm", "toy:read", "--seed", "3",
         "--beta", "0", "--lr", "5e-4", "--adam_beta2", "0.95", "--w_outcome", "1", "--w_format", "0"]                 # whatever the preset says


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from dataclasses import asdict
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    write_jsonl(path, [asdict(p) for p in make_problems(5, 12, 5, (2, 4))])
    return path


def config(data, out, *flags):
    return train.parse_config([*SMALL, "--data", str(data), "--out", str(out), *flags])


def weights(out, name="model"):
    return load_file(Path(out) / name / "model.safetensors")


def lines(out):
    """log.jsonl without clock times."""
    return [{k: v for k, v in json.loads(line).items() if "time" not in k} for line in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """One run of 4 steps."""
    out = tmp_path_factory.mktemp("straight")
    train.main(config(data, out, "--steps", "4", "--save_every", "2"))
    return out


def test_a_resumed_run_is_the_straight_run_bitwise(data, straight, tmp_path):
    train.main(config(data, tmp_path, "--steps", "2", "--save_every", "2"))
    with (tmp_path / "log.jsonl").open("a") as file:                       # what a run that was killed in step 4 leaves behind
        file.write(json.dumps({"step": 3, "reward": 9.0}) + '\n{"step": 4, "rew')
    (tmp_path / "checkpoints" / ".step_000003").mkdir()                    # and a checkpoint that was never finished
    train.main(config(data, tmp_path, "--steps", "4", "--save_every", "2", "--resume", "auto"))
    a, b = weights(straight), weights(tmp_path)
    half, _ = load_model("toy/student")
    load_checkpoint(straight / "checkpoints" / "step_000002", half)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["model.norm.weight"], half.get_parameter("model.norm.weight"))
    assert lines(straight) == lines(tmp_path) and [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4]
    assert (straight / "rollouts.jsonl").read_text() == (tmp_path / "rollouts.jsonl").read_text()


def test_two_equal_runs_are_equal_and_another_seed_is_not(data, straight, tmp_path):
    train.main(config(data, tmp_path / "a", "--steps", "1"))
    train.main(config(data, tmp_path / "b", "--steps", "1", "--seed", "4"))
    first = [line for line in (straight / "rollouts.jsonl").read_text().splitlines() if json.loads(line)["step"] == 1]
    assert (tmp_path / "a" / "rollouts.jsonl").read_text().splitlines() == first != (tmp_path / "b" / "rollouts.jsonl").read_text().splitlines()


@pytest.mark.parametrize("aggregation,level", [("token", "token"), ("sequence", "token"), ("fixed", "token"), ("sequence", "sequence")])
def test_the_update_does_not_depend_on_the_micro_batch(data, tmp_path, aggregation, level):
    results = []
    for tokens in (1, 200, 100_000):                                       # rows one by one, a few, all at once
        out = tmp_path / str(tokens)
        train.main(config(data, out, "--steps", "1", "--max_tokens", str(tokens), "--aggregation", aggregation, "--level", level, "--beta", "0.01", "--w_format", "0.5"))
        results.append(weights(out))
    for other in results[1:]:
        assert max(float((other[k] - results[0][k]).abs().max()) for k in other) < 1e-5              # Adam's first steps turn rounding of tiny gradients into this much


def test_ratio_is_one_on_the_first_pass(straight):
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 and row["clip_ratio/region_mean"] == 0 for row in lines(straight))


def test_the_logged_figures_are_those_of_the_rollouts(straight):
    rows = [json.loads(line) for line in (straight / "rollouts.jsonl").read_text().splitlines()]
    tokenizer, seen, problems = load_tokenizer("toy/student"), 0, {r["id"]: Problem(r["id"], r["problem"], r["gold"]) for r in rows}
    for log in lines(straight):
        of_step = [r for r in rows if r["step"] == log["step"]]
        seen += sum(r["length"] + len(problem_ids(tokenizer, problems[r["id"]])) for r in of_step)
        assert len(of_step) == 16 and log["num_tokens"] == seen                    # TRL's: prompts and completions, of the run so far
        deviation = lambda value, of_step=of_step: pytest.approx(statistics.stdev(value(r["rewards"]) for r in of_step))
        assert log["reward_std"] == deviation(lambda r: r["structure"] + r["outcome"]) and log["rewards/outcome/std"] == deviation(lambda r: r["outcome"])
        assert log["rewards/structure/mean"] == pytest.approx(sum(r["rewards"]["structure"] for r in of_step) / 16) == pytest.approx(log["true_structure"])  # the rule is the truth
        assert log["completions/clipped_ratio"] == sum(r["stop"] == "length" for r in of_step) / 16
        groups = [[r["advantage"] for r in of_step[g:g + 4]] for g in range(0, 16, 4)]
        assert log["frac_reward_zero_std"] == sum(not any(g) for g in groups) / 4 and all(abs(sum(g)) < 1e-5 for g in groups)


def one_step(data, scores):
    """Parameters after one update in which GSRM gives `scores` (a function of the row number)."""
    cfg = replace(config(data, "unused"), w_outcome=0.0)
    model, tok = load_model("toy/student")
    problems = train.load_problems(data)[:4]
    prompts = [problem_ids(tok, p) for p in problems]
    rollout = Sampler(model, *stop_and_pad_ids(model, tok)).generate(prompts, 4, 40, 1.0)
    rewards = {"structure": [scores(n) for n in range(16)]}
    adv, scored = train.advantages(rewards, cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train.update(model, None, optimizer, [prompts[n // 4] for n in range(16)], rollout, adv, scored, cfg)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), adv, scored


def test_an_unscored_row_is_left_out_and_never_a_zero(data):
    value = lambda n: (n % 4) / 4
    gone, adv, scored = one_step(data, lambda n: None if n == 5 else value(n))
    assert not scored[5] and adv[5] == 0 and scored.sum() == 15
    assert torch.allclose(adv[4:8].sum(), torch.tensor(0.0), atol=1e-6)    # the others are compared among themselves
    zero, adv_zero, _ = one_step(data, lambda n: 0.0 if n == 5 else value(n))
    assert not torch.equal(gone, zero) and adv_zero[5] < 0


def test_large_rewards_keep_their_differences():
    """A structure reward of one's own may be any number: in float32 1e6 and 1e6 + 0.01 are one, and 1e39 none."""
    settings = train.Config(w_structure=1.0, w_outcome=0.0, w_format=0.0, group_size=2, preset="")
    for low, high in ((1e6, 1e6 + 0.01), (-1e39, 1e39)):
        adv, scored = reward.advantages({"structure": [low, high]}, settings)
        assert adv.tolist() == pytest.approx([-1, 1], abs=1e-6) and scored.all() and adv.dtype == torch.float32


def test_a_reward_that_is_not_a_number_is_no_score(monkeypatch):
    monkeypatch.setattr(reward, "format_reward", lambda text, finished: math.nan if text == "b" else 1.0)
    settings = train.Config(w_structure=0.0, group_size=2, preset="")
    rewards, _ = reward.score([Problem("p", "?", "1", [])] * 2, ["a", "b"], [True, True], None, settings)
    assert rewards["format"] == [1.0, None] and reward.advantages(rewards, settings)[1].tolist() == [True, False]


def test_spreadless_groups_move_nothing(data):
    same, adv, _ = one_step(data, lambda n: 0.5)
    start = torch.cat([p.detach().flatten() for p in load_model("toy/student")[0].parameters()])
    assert torch.equal(same, start) and not adv.any()


def test_the_entropy_is_that_of_all_tokens_spreadless_groups_too(data):
    """Two groups of which one moves nothing: whether --beta keeps its rows in the update says nothing of the entropy."""
    model, tokenizer = load_model("toy/student")
    prompts = [problem_ids(tokenizer, p) for p in make_problems(5, 2, 5, (2, 4)) for _ in range(2)]
    seen = []
    for beta in (0.0, 0.01):
        rollout = Sampler(model, *stop_and_pad_ids(model, tokenizer)).generate(prompts, 1, 12, 1.0, seed=0)
        adv, scored = torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.ones(4, dtype=torch.bool)
        cfg = replace(config(data, "unused"), beta=beta)
        ref = reference_logp(load_model("toy/student")[0], prompts, rollout, cfg) if beta else None
        seen.append(train.update(model, ref, torch.optim.SGD(model.parameters(), lr=0.0), prompts, rollout, adv, scored, cfg))
    wanted = float(rollout.entropy[rollout.mask].mean())
    assert ["kl" in m for m in seen] == [False, True]                        # without a reference none was measured
    nothing = train.update(model, ref, torch.optim.SGD(model.parameters(), lr=0.0), prompts, rollout, 0 * adv, ~scored, cfg)
    always = {"loss", "grad_norm", "skipped_step", "nonfinite", "nonfinite_weights", "sampling/sampling_logp_difference/max", "sampling/importance_sampling_ratio/max"}
    assert {name for name, value in nothing.items() if math.isnan(value)} == {*seen[1]} - always and nothing["skipped_step"] == 1
    assert [m["entropy"] for m in seen] == pytest.approx([wanted] * 2, rel=1e-5) and wanted != pytest.approx(float(rollout.entropy[:2][rollout.mask[:2]].mean()), rel=1e-2)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_completions_without_a_token_are_no_rows(data, level):
    """All of them: a skipped step. Some, in micro-batches of their own: the step of the others."""
    cfg, model, tokenizer = replace(config(data, "unused"), level=level, beta=0.01, max_tokens=1), *load_model("toy/student")
    start, sampler = load_model("toy/student")[0], Sampler(model, *stop_and_pad_ids(model, tokenizer))
    moved = {}
    for name, index, lengths in (("none", [0, 1], [0, 0]), ("some", [0, 1, 2, 3], [0, 3, 0, 3]), ("others", [1, 3], [3, 3])):
        model.load_state_dict(start.state_dict())
        prompts, adv = [([5], [6, 7])[n % 2] for n in index], torch.tensor([1.0, 1.0, -1.0, -0.5])[index]
        rollout = replace(sampler.generate(prompts, 1, max(lengths), 1.0, seed=1, index=index), lengths=torch.tensor(lengths))
        metrics = train.update(model, reference_logp(start, prompts, rollout, cfg), torch.optim.SGD(model.parameters(), lr=1.0), prompts, rollout, adv, adv != 0, cfg)
        assert metrics["skipped_step"] == (name == "none") and metrics["nonfinite"] == 0
        moved[name] = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), start.parameters())]).detach()
    assert not moved["none"].any() and moved["others"].abs().max() > 1e-3 and torch.allclose(moved["some"], moved["others"], atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_ratio_is_to_what_the_trainer_itself_said_first(data, level):
    """However far off the sampler's log-probs are: two updates are those on the trainer's own, and the sampling metrics say how far."""
    cfg, prompts = replace(config(data, "unused"), level=level, beta=0.0, clip_low=0.05, clip_high=0.05, max_tokens=200), []
    outcomes = {}
    for noise in (0.0, 0.3):
        model, tokenizer = load_model("toy/student")
        prompts = [problem_ids(tokenizer, p) for p in make_problems(5, 2, 5, (2, 4)) for _ in range(2)]
        rollout = Sampler(model, *stop_and_pad_ids(model, tokenizer)).generate(prompts, 1, 12, 1.0, seed=0)
        truth = reference_logp(model, prompts, rollout, cfg)
        rollout = replace(rollout, logp=rollout.logp + noise * torch.randn(rollout.logp.shape, generator=torch.Generator().manual_seed(1)))
        adv, scored, old = torch.tensor([1.0, -1.0, 0.5, -0.5]), torch.ones(4, dtype=torch.bool), torch.full_like(rollout.logp, torch.nan)
        update = lambda: train.update(model, None, torch.optim.SGD(model.parameters(), lr=3.0), prompts, rollout, adv, scored, cfg, None, old)  # noqa: B023
        first, second = update(), update()
        assert torch.allclose(old[rollout.mask], truth[rollout.mask], atol=2e-5) and first["clip_ratio/region_mean"] == 0 < second["clip_ratio/region_mean"]
        assert first["sampling/sampling_logp_difference/mean"] == pytest.approx(float((truth - rollout.logp).abs()[rollout.mask].mean()), abs=2e-5)
        assert first["sampling/importance_sampling_ratio/max"] == pytest.approx(float((truth - rollout.logp).exp()[rollout.mask].max()), rel=1e-4)
        assert first["sampling/importance_sampling_ratio/mean"] == pytest.approx(float((truth - rollout.logp).exp()[rollout.mask].mean()), rel=1e-4)
        outcomes[noise] = [p.detach().clone() for p in model.parameters()], second["loss"], second["grad_norm"]
    assert all(torch.equal(a, b) for a, b in zip(outcomes[0.0][0], outcomes[0.3][0])) and outcomes[0.0][1:] == outcomes[0.3][1:]
    assert not torch.equal(outcomes[0.0][0][0], load_model("toy/student")[0].get_input_embeddings().weight)


def test_in_bfloat16_the_first_update_is_on_policy(data, tmp_path):
    """GSPO's clip is narrower than bfloat16's rounding between sampler and trainer: measured against the sampler it would cut a third of the tokens."""
    train.main(config(data, tmp_path, "--steps", "2", "--dtype", "bfloat16", "--level", "sequence", "--aggregation", "sequence", "--clip_low", "3e-4", "--clip_high", "4e-4"))
    for line in lines(tmp_path):
        assert line["clip_ratio/region_mean"] == 0 and 1e-4 < line["sampling/sampling_logp_difference/mean"] < 0.05 and line["grad_norm"] > 0


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that an operation returned."""
    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.most = max([self.most] + [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        return out


@pytest.mark.parametrize("frozen, tied", [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_training_step_never_holds_the_logits(data, level, frozen, tied):
    """N * V = 24 million here; the largest tensor of update(), reference model and backward included, is a chunk of a million, or the head."""
    torch.manual_seed(0)
    V, N, T = 16_000, 24, 64
    net = lambda: AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                                               num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, pad_token_id=None))
    model, reference = net(), net().requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(not frozen)
    rollout = Rollout(torch.randint(V, (N, T)), torch.full((N,), T), torch.full((N, T), -9.7), torch.ones(N, dtype=torch.bool), torch.zeros(N, T))
    cfg = replace(config(data, "unused"), beta=0.01, level=level)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with Largest() as seen:
        ref_logp = reference_logp(reference, [[1, 2, 3]] * N, rollout, cfg)
        train.update(model, ref_logp, optimizer, [[1, 2, 3]] * N, rollout, torch.randn(N), torch.ones(N, dtype=torch.bool), cfg)
    assert seen.most <= max(1 << 20, 16 * V) < N * T * V / 20
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters())]
    assert moved == [p.requires_grad for p in model.parameters()]                                       # a frozen head stays, everything else learns


def test_an_outage_of_the_reward_model_is_no_reward_of_zero(data, tmp_path, monkeypatch):
    class Down:
        stats: dict = {}
        def __call__(self, problems, traces, teachers): return [Score(None, reason="endpoint down") for _ in traces]
    monkeypatch.setattr(train, "load_gsrm", lambda *a: Down())
    train.main(config(data, tmp_path, "--steps", "1"))
    row, = lines(tmp_path)
    assert row["unscored"] == 16 and row["skipped_step"] == 1 and row["loss"] == 0 and "entropy" not in row["warnings"]
    assert row["reward"] is row["frac_reward_zero_std"] is None and "NaN" not in (tmp_path / "log.jsonl").read_text()          # JSON has no such number
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path).values(), load_file(ROOT / "toy/student/model.safetensors").values()))


def test_a_reward_that_stays_away_ends_the_run_and_it_goes_on_later(data, tmp_path, monkeypatch):
    """Steps 2 to 4 have no score: after three of them a checkpoint and an error; with the reward back the run goes on behind them. One scored step in between is no end."""
    class Flaky:
        def __init__(self, down): self.stats, self.calls, self.down = {}, 0, down
        def __call__(self, problems, traces, teachers):
            self.calls += 1
            return [Score(None if self.calls in self.down else n / len(traces)) for n in range(len(traces))]
    gsrm = Flaky({2, 3, 4, 7, 8})
    monkeypatch.setattr(train, "load_gsrm", lambda *a: gsrm)
    with pytest.raises(ConnectionError, match="no completion of 3 steps in a row could be scored.*--resume auto"):
        train.main(config(data, tmp_path, "--steps", "9", "--max_faults", "3", "--save_every", "0"))
    assert [row["unscored"] for row in lines(tmp_path)] == [0, 16, 16, 16]
    train.main(config(data, tmp_path, "--steps", "9", "--max_faults", "3", "--save_every", "0", "--resume", "auto"))
    assert [row["unscored"] for row in lines(tmp_path)] == [0, 16, 16, 16, 0, 0, 16, 16, 0]


def test_cursor_goes_through_every_problem_each_epoch():
    seen = [i for step in range(15) for i in train.cursor(12, 4, 0, step)]
    assert all(sorted(seen[e:e + 12]) == list(range(12)) for e in range(0, 60, 12)) and seen[:12] != seen[12:24]
    assert train.cursor(12, 5, 0, 2) == [i for s in range(4) for i in train.cursor(12, 5, 0, s)][10:15] != train.cursor(12, 5, 1, 2)
    assert len(train.cursor(3, 8, 0, 0)) == 8                              # fewer problems than places in a step


@pytest.mark.parametrize("text,finished,worth", [
    ("a</think>\n\\boxed{4}", True, 1), ("<think>a</think>\\boxed{4}", True, 1), ("a</think>\n\\boxed{4}", False, 0), ("a \\boxed{4}", True, 0),
    ("a</think>\\boxed{4", True, 0), ("a</think>\\boxed{}", True, 0), ("a</think>\\fbox{4}", True, 1), ("a</think>\\boxed {4}", True, 1), ("a</think><answer>4</answer>", True, 0),
    ("a</think>4", True, 0), ("a</think>b</think>\\boxed{4}", True, 0), ("a<think>b</think>\\boxed{4}", True, 0)])
def test_format_reward(text, finished, worth):
    assert reward.format_reward(text, finished) == worth


def test_checkpoint_brings_the_optimiser_back(tmp_path):
    model, tok = load_model("toy/student")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, tok, optimizer, 3)
    checkpoints.wait()
    other, _ = load_model("toy/judge")
    other = type(other)(model.config)
    again = torch.optim.AdamW(other.parameters(), lr=1e-3)
    assert load_checkpoint(tmp_path / "step_000003", other, again) == {"step": 3}
    a, b = optimizer.state_dict()["state"], again.state_dict()["state"]
    assert a.keys() == b.keys() and all(torch.equal(a[i][k], b[i][k]) for i in a for k in ("step", "exp_avg", "exp_avg_sq"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def test_the_exported_model_is_a_hugging_face_checkpoint(straight):
    model = AutoModelForCausalLM.from_pretrained(straight / "model")
    done = subprocess.run([sys.executable, "checkpoint.py", str(straight / "checkpoints" / "step_000004"), "--out", str(straight / "exported")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, _ = load_model(straight / "exported")
    x = torch.arange(300, 330)[None]
    assert torch.equal(model(input_ids=x).logits, ours(input_ids=x).logits)


@pytest.mark.parametrize("flags,says", [
    (["--stepz", "3"], "--stepz"), (["--preset", "huge"], "choose one of"), (["--preset", "paper-gsrm", "--dry_run"], "python sft.py --preset paper-gsrm"),
    (["--group_size", "1"], "'1' is not a whole number of 2 or more (G, completions per problem; one alone"), (["--combine", "product"], "--combine: invalid choice: 'product'"),
    (["--max_new_tokens", "0"], "--max_new_tokens/--max-new-tokens: '0' is not a whole number of 1 or more"), (["--top_p", "0.9"], "log-probs would not be the trainer's"),
    (["--w_structure", "0", "--w_outcome", "0", "--w_format", "0"], "at least one reward"),
    (["--preset", "none"], "--model is needed"), (["--lr", "fast"], "--lr")])
def test_bad_flags_end_with_one_line_that_says_what_to_change(flags, says, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_config(flags)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_help_says_where_a_number_has_to_lie_and_transformers_own_parser_takes_the_flags(capsys):
    with pytest.raises(SystemExit):
        train.parse_config(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "ratio is clipped below 1 - clip_low, in [0, 1) (default: 0.2)" in said and "{gdpo,sum}" in said
    assert "--stop_at_divergence" in said and "--no_stop" not in said                  # which takes it all the same, with the same help, as if it did the same
    assert train.parse_config(["--no_stop_at_divergence"]).stop_at_divergence is False
    assert HfArgumentParser(train.Config).parse_args_into_dataclasses(["--clip_low", "0.1"])[0].clip_low == 0.1


def test_a_model_of_ones_own_is_told_of_the_toys_settings(data, tmp_path, capsys, monkeypatch):
    """Without --preset they are in force, a rate and a reward model that nobody asked for."""
    def leave(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "set_up", leave)
    own = checkpoint(tmp_path / "own", "qwen2", tokenizer("chatml"))
    for model, preset, told in ((own, [], True), ("toy/student", [], False), (own, ["--preset", "none"], False)):
        with pytest.raises(KeyboardInterrupt):
            train.main(config(data, tmp_path / f"out{told}{len(preset)}", "--model", str(model), *preset))
        assert ("for another model --preset qwen1.5b, or none" in capsys.readouterr().out) is told


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(data, straight):
    before = (straight / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="already holds a run"):
        train.main(config(data, straight, "--steps", "4"))
    with pytest.raises(ValueError, match="--lr was 0.0005, is 0.1"):
        train.main(config(data, straight, "--steps", "4", "--resume", "auto", "--lr", "0.1"))
    with pytest.raises(ValueError, match="--steps 3: .*step_000004 has gone further already: ask for more"):
        train.main(config(data, straight, "--steps", "3", "--resume", "auto"))
    assert (straight / "log.jsonl").read_text() == before and json.loads((straight / "run.json").read_text())["config"]["steps"] == 4


def test_the_evaluation_of_a_student_that_trains_on_goes(data, straight, tmp_path):
    out = shutil.copytree(straight, tmp_path / "out")
    (out / "eval_after.jsonl").write_text("")
    train.main(config(data, out, "--steps", "4", "--resume", "auto"))
    assert (out / "eval_after.jsonl").exists()                             # nothing was left to train
    train.main(config(data, out, "--steps", "5", "--resume", "auto"))
    assert not (out / "eval_after.jsonl").exists() and len(lines(out)) == 5


def test_a_run_is_not_resumed_on_other_data_or_another_chat_template(data, tmp_path):
    """The same path with other problems in it, for training or evaluation, a folder or a file; a file that has moved is the same file."""
    out, student, problems = tmp_path / "out", tmp_path / "student", data.read_text().splitlines(keepends=True)
    shutil.copytree("toy/student", student)
    for name, rows in (("train", problems[:10]), ("test", problems[10:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    go = lambda steps, place=tmp_path, *flags: train.main(config(place, out, "--model", str(student), "--steps", str(steps), "--eval_problems", "1", "--eval_k", "1", *flags))
    go(1)
    kept = snapshot(out)
    for file, said in ((tmp_path / "train.jsonl", "train.jsonl has other contents"), (tmp_path / "test.jsonl", "test.jsonl has other contents"),
                       (student / "tiktoken.json", f"the chat template of --model {student} is another one")):
        before = file.read_text()
        file.write_text(before.replace("<|im_end|>\\n", "<|im_end|>") if file.suffix == ".json" else before + problems[0].replace('"id": "', '"id": "z'))
        with pytest.raises(ValueError, match=f"--resume: .*{re.escape(said)}.* put the old (file|one) back, or choose another --out"):
            go(2, tmp_path, "--resume", "auto")
        assert snapshot(out) == kept
        file.write_text(before)
    weight = student / "model.safetensors"
    before = weight.read_bytes()
    weight.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"--resume: {student} is not the model that it was when the run began .SHA-256 .* put the old one back, or choose another --out"):
        go(2, tmp_path, "--resume", "auto")
    assert snapshot(out) == kept
    weight.write_bytes(before)
    moved = [tmp_path / "moved" / name for name in ("train.jsonl", "test.jsonl")]
    moved[0].parent.mkdir()
    for file in moved:
        (tmp_path / file.name).rename(file)
    go(2, moved[0].parent, "--resume", "auto")
    assert [row["step"] for row in lines(out)] == [1, 2] and json.loads((out / "run.json").read_text())["data"] == {str(file): file_hash(file) for file in moved}
    go(3, moved[0].parent, "--resume", "auto", "--eval_problems", "0")                                   # knows nothing of the test data; what the run knew stays
    moved[1].write_text("".join(problems[9:]))
    with pytest.raises(ValueError, match="test.jsonl has other contents"):
        go(4, moved[0].parent, "--resume", "auto")


def test_the_record_names_every_model_that_a_run_loads(tmp_path):
    """And no other: not the GSRM beside a structure reward of one's own, not a rule."""
    def models(*flags):
        out = tmp_path / "-".join(flags).replace("/", "_")
        train.main(train.parse_config(["--data", "toy", "--out", str(out), "--steps", "1", "--eval_problems", "0", "--problems_per_step", "1", "--group_size", "2",
                                       "--max_new_tokens", "4", *flags]))
        return {Path(path).resolve().name: value for path, value in json.loads((out / "run.json").read_text())["models"].items()}
    found = models("--teacher", "toy/student", "--gsrm", "toy/gsrm")
    assert list(found) == ["student", "gsrm", "judge"] and len(set(found.values())) == 3
    student = {"student": found["student"]}
    assert models("--structure_reward", "reward:line_similarity", "--gsrm", "toy/gsrm") == models("--gsrm", "toy:read") == student


def test_the_counts_of_a_step_are_its_own(data, tmp_path):
    """And not of the evaluation before training, which asks the same reward model."""
    counts = []
    for name, problems in (("with", "3"), ("without", "0")):
        train.main(config(data, tmp_path / name, "--steps", "1", "--eval_data", str(data), "--eval_problems", problems, "--eval_k", "1"))
        counts.append(json.loads((tmp_path / name / "log.jsonl").read_text()))
    assert counts[0]["time/gsrm/unscored"] == counts[1]["time/gsrm/unscored"] and 16 <= counts[0]["time/gsrm/decompositions"] <= counts[1]["time/gsrm/decompositions"]


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_problems_without_teachers_cannot_be_structure_rewarded(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "problem": "1+1?", "answer": "2"}])
    with pytest.raises(ValueError, match="no teacher trace"):
        train.load_data(config(tmp_path / "p.jsonl", tmp_path / "out"))
    assert len(train.load_data(config(tmp_path / "p.jsonl", tmp_path / "out", "--w_structure", "0"))[0]) == 1


def test_skip_bad_lists_the_lines_and_goes_on(data, tmp_path, capsys):
    file = tmp_path / "train.jsonl"
    file.write_text(data.read_text() + '{"id": "x"}\n')
    with pytest.raises(ValueError, match="train.jsonl:13"):
        train.load_data(config(file, tmp_path / "out"))
    assert len(train.load_data(config(file, tmp_path / "out", "--skip_bad", "True"))[0]) == 12 and "train.jsonl:13" in capsys.readouterr().err
