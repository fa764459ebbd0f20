"""The plan against hand calculations and against real tensors; every preset in a small step; nothing is loaded or written by --dry_run."""
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from test_train import ROOT, SMALL, config, data, weights  # noqa: F401
from transformers import AutoModelForCausalLM, DeepseekV3Config, FalconConfig, Qwen2Config

import eval as evaluation
import parallel
import plan
import rollout
import sft
import train
from data import load_model, load_tokenizer, problem_ids, save_model, write_jsonl
from toy import make_problems

G = 1e9


def tiny(**changes):
    return Qwen2Config(**dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=553, tie_word_embeddings=True,
                              max_position_embeddings=512) | changes)


def numel(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"num_hidden_layers": 3, "head_dim": 32}])
def test_a_model_without_memory_is_counted_like_a_real_one(changes):
    s, model = plan.shape(tiny(**changes)), AutoModelForCausalLM.from_config(tiny(**changes))
    assert s.params == numel(model) == s.layers * s.layer + s.rest and s.layer == numel(model.model.layers[0])
    assert (s.D, s.I, s.V, s.heads, s.kv_heads, s.head_dim) == (64, 96, 553, 4, 2, changes.get("head_dim", 16))


def test_the_presets_models_have_the_counts_of_their_checkpoints():
    """Those of the safetensors indices on the hub: 3.09 GB and 15.23 GB in bfloat16."""
    assert plan.shape(plan.read_config("Qwen/Qwen2.5-Math-1.5B")).params == 1_543_714_304
    assert plan.shape(plan.read_config("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")).params == plan.shape(plan.read_config("Qwen/Qwen2.5-Math-7B")).params == 7_615_616_512
    assert all(p["model"] in plan.KNOWN for name, p in train.PRESETS.items() if name not in ("none", "toy"))


def test_cache_bytes_are_those_of_a_cache():
    model, _ = load_model("toy/student")
    cache = model(input_ids=torch.arange(300, 310)[None], use_cache=True).past_key_values
    assert sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) == 10 * plan.cache_bytes(model.config, 4)
    assert plan.cache_bytes(plan.read_config("Qwen/Qwen2.5-Math-1.5B"), 2) == 2 * 28 * 2 * 128 * 2 == 28_672
    assert plan.cache_bytes(DeepseekV3Config(), 2) == 61 * (512 + 64) * 2 == 70_272
    assert plan.cache_bytes(FalconConfig(hidden_size=4544, num_attention_heads=71), 2) == 2 * 32 * 64 * 2 == 8_192
    small = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    latent = dict(intermediate_size=32, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
                  num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_shared_experts=1)
    for kind in (FalconConfig(**small, multi_query=True), FalconConfig(**small, multi_query=False), DeepseekV3Config(**small, **latent)):
        cached = AutoModelForCausalLM.from_config(kind).eval()
        cache = cached(input_ids=torch.arange(10)[None], use_cache=True).past_key_values
        assert sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) == 10 * plan.cache_bytes(kind, 4) == 40 * plan.shape(kind).cached


def saved_bytes(model, tokens):
    """Bytes that a forward pass keeps for the backward one, parameters not counted."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) if t.untyped_storage().data_ptr() not in own else t, lambda t: t):
        out = model.train().model(input_ids=torch.randint(50, (2, tokens // 2)), use_cache=False)
    assert out.last_hidden_state.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(dtype, checkpointing):
    """A layer's share, as the difference of five layers and one."""
    def bytes_of(layers):
        model = AutoModelForCausalLM.from_config(tiny(num_hidden_layers=layers)).to(dtype)
        if checkpointing:
            parallel.recompute(model)
        return saved_bytes(model, 64)
    s = plan.shape(tiny())
    want = 64 * dtype.itemsize if checkpointing else plan.kept_by_layer(s, dtype.itemsize)
    assert (bytes_of(5) - bytes_of(1)) / 4 / 64 == pytest.approx(want, rel=0.02)


def test_the_toys_tensors_are_the_plans(data, tmp_path):  # noqa: F811
    cfg = replace(config(data, tmp_path), beta=0.01)
    run, s = train.set_up(cfg, tmp_path), plan.shape(plan.read_config("toy/student"))
    p = plan.estimate(cfg, s, [], 1, 60)
    nbytes = lambda tensors: sum(t.nbytes for t in tensors)
    assert p.memory["always"]["masters"] == nbytes(run.model.parameters()) and p.memory["always"]["reference"] == nbytes(run.reference.parameters())
    seen = {}
    run.optimizer.register_step_pre_hook(lambda *_: seen.update(gradients=nbytes(q.grad for q in run.model.parameters())))
    train.step_once(run, 0)
    assert p.memory["update"]["gradients"] == seen["gradients"] == 4 * s.params
    assert p.memory["always"]["AdamW's moments"] == nbytes(x for state in run.optimizer.state.values() for name, x in state.items() if name != "step") == 8 * s.params
    r = p.rollouts
    assert (r.rows, r.longest, r.together, r.cache) == (16, 100, 16, 16 * 100 * 2 * 3 * 4 * 16 * 4) and p.micro_batches == 1


def test_a_wave_is_the_samplers(data, monkeypatch):  # noqa: F811
    """A small cache makes more waves, and the same completions."""
    model, tok = load_model("toy/student")
    prompts = [problem_ids(tok, p) for p in train.load_problems(data)[:3]]
    s, longest, waves = plan.shape(model.config), max(map(len, prompts)) + 20, []
    sampler = plan.sampler_of(model, tok, cache_gb=7 * longest * plan.cache_bytes(model.config, 4) / G)
    large = plan.sampler_of(model, tok).generate(prompts, 4, 20, 1.0, seed=5)
    real = rollout.decode
    monkeypatch.setattr(rollout, "decode", lambda model, rows, **rest: (waves.append(len(rows)), real(model, rows, **rest))[1])
    small = sampler.generate(prompts, 4, 20, 1.0, seed=5)
    w = plan.sampling(s, 12, 3, longest - 20, 20, 7 * longest * plan.cache_bytes(model.config, 4) / G, 4)
    assert waves == [7, 5] and w.together == 7 and torch.equal(small.tokens, large.tokens)


FULL = ["--preset", "qwen1.5b", "--dry_run"]


def test_bytes_of_qwen_by_hand():
    """1.5437e9 parameters, 0.2334e9 of them the tied embedding; 170 rows of 4096 tokens are what 20 GB hold."""
    cfg, s = train.parse_config(FULL), plan.shape(plan.read_config("Qwen/Qwen2.5-Math-1.5B"))
    p = plan.estimate(cfg, s, [], 1, 1024)
    n, head = 1_543_714_304, 151_936 * 1536
    always, update = p.memory["always"], p.memory["update"]
    assert always["masters"] == 4 * n and always["AdamW's moments"] == 8 * n and always["reference"] == 2 * n and update["gradients"] == 4 * n
    assert p.memory["sampling"]["working copy"] == 2 * n and p.rollouts.together == 170 and p.rollouts.cache == 170 * 4096 * 28_672
    assert update["head"] == 8192 * 151_936 * 2 + 6 * head + 16384 * 1536 * 2                   # E, the head's gradient in float32 and then bfloat16, that of the hidden states
    all_kept = plan.estimate(replace(cfg, gradient_checkpointing=False), s, [], 1, 1024)
    assert update["activations"] == 16384 * (28 * 1536 * 2 + plan.kept_by_layer(s, 2)) < all_kept.memory["update"]["activations"] / 8
    tokens = 512 * 4096
    assert p.seconds["update"] == 8 * n * tokens / plan.FLOPS and p.seconds["reference"] == 2 * n * tokens / plan.FLOPS
    assert all_kept.seconds["update"] == 6 * n * tokens / plan.FLOPS
    decode = 3072 * sum(2 * n + rows * (1024 + 1536) * 28_672 for rows in (170, 170, 170, 2)) / plan.BANDWIDTH
    assert p.seconds["sampling"] == pytest.approx(decode + 2 * n * 64 * 1024 / plan.FLOPS)
    assert p.peak == max(p.peaks.values()) == pytest.approx(sum(always.values()) + max(sum(p.memory[k].values()) for k in ("sampling", "update", "reference")))


def test_a_teacher_model_is_counted(capsys):
    cfg, s, t = train.parse_config(FULL), plan.shape(plan.read_config("Qwen/Qwen2.5-Math-1.5B")), plan.shape(plan.read_config("Qwen/Qwen2.5-Math-7B"))
    without, with_teacher = plan.estimate(cfg, s, [], 1, 1024), plan.estimate(cfg, s, [], 1, 1024, t)
    assert (with_teacher.memory["always"]["teacher"] == 2 * t.params and without.memory["always"]["teacher"] == 0
            and plan.estimate(cfg, s, [], 4, 1024, t).memory["always"]["teacher"] == t.params / 2)
    assert with_teacher.seconds["update"] - without.seconds["update"] == pytest.approx(2 * t.params * 512 * 4096 / plan.FLOPS)
    more = sum(with_teacher.memory["update"].values()) - sum(without.memory["update"].values())
    assert more == 16384 * 2 * (5 * 3584 + 3 * 18944) + 4 * t.layer + (1 << 28) * 2 + 4 * 151_936 * 1536 + 4 * 16384 * 1536
    train.main(train.parse_config([*FULL, "--teacher", "Qwen/Qwen2.5-Math-7B", "--structure_reward", "reward:line_similarity"]))
    said = capsys.readouterr().out
    assert "teacher        Qwen/Qwen2.5-Math-7B: 7,615.62M parameters" in said and "reward model   reward:line_similarity\n" in said


def test_what_is_shared_out_is_shared_out():
    cfg, s = train.parse_config(["--preset", "paper", "--dry_run"]), plan.shape(plan.read_config("Qwen/Qwen2.5-Math-7B"))
    one, four = (plan.estimate(cfg, s, [s], w, 1024) for w in (1, 4))
    for phase, name in (("always", "masters"), ("always", "AdamW's moments"), ("always", "reference"), ("update", "gradients"), ("sampling", "cache")):
        assert four.memory[phase][name] * 4 == one.memory[phase][name] > 0
    assert (four.memory["sampling"]["working copy"] == one.memory["sampling"]["working copy"]
            and four.memory["always"]["reward model"] == one.memory["always"]["reward model"] == 2 * s.params)
    away = plan.estimate(replace(cfg, offload=True), s, [s], 1, 1024)
    assert away.memory["always"]["masters"] == away.memory["update"]["gradients"] == 0 and away.cpu == 8 * s.params + (4 + 2 + 4) * s.pinned
    assert s.pinned == 28 * ((2 << 24) + (2 << 21) + (3 << 27) + (3 << 12) + (2 << 9)) + (2 << 30) + (1 << 12)         # q, o; k, v; three of the MLP; norms, biases
    assert four.saving * 4 == one.saving == away.saving == 24 * s.params
    lora = plan.shape(plan.read_config(cfg.model), 32)
    assert lora.adapters == 28 * 32 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    small = plan.estimate(replace(cfg, lora_rank=32), lora, [s], 1, 1024)
    assert small.memory["always"]["masters"] == 2 * s.params + 4 * lora.adapters and small.memory["always"]["reference"] == 0


@pytest.mark.parametrize("preset, flags, says", [
    ("qwen1.5b", (), ["1,543.71M", "64 problems x 8 = 512 rollouts a step", "170 rows at a time, 4 wave(s)", "\nfits in 80 GB", "Qwen2.5-7B-Instruct assumed, give --gsrm"]),
    ("qwen1.5b", ("--gradient_checkpointing", "False", "--gpu_memory_gb", "48"),
     ["does not fit in 48 GB", "--gradient_checkpointing True                65.2 GB, not enough alone",
      "--gradient_checkpointing True --cache_gb 10 --max_tokens 8192 --offload True   31.2 GB, fits"]),
    ("qwen1.5b", ("--gsrm", "Qwen/Qwen2.5-1.5B-Instruct", "--judge", "Qwen/Qwen2.5-1.5B-Instruct"),
     ["Qwen/Qwen2.5-1.5B-Instruct, Qwen/Qwen2.5-1.5B-Instruct: 3,087.43M parameters in each process"]),
    ("qwen1.5b", ("--max_new_tokens", "3500"), ["the model has 4096 positions: --max_new_tokens 3072"]),
    ("paper", (), ["7,615.62M", "8 problems x 4 = 32", "does not fit in 80 GB", "--nproc_per_node 8", "--offload True"]),
    ("qwen1.5b", ("--gsrm", "http://127.0.0.1:1/v1#m", "--judge", "Qwen/Qwen2.5-7B-Instruct"),
     ["reward model   http://127.0.0.1:1/v1#m, Qwen/Qwen2.5-7B-Instruct: 7,615.62M parameters in each process", ", reward model 15.2"]),
    ("paper-zero", ("--gsrm", "http://127.0.0.1:1/v1#m"), ["reward model   http://127.0.0.1:1/v1#m\n", "= 4096 tokens each"])])
def test_dry_run_needs_no_network_and_leaves_nothing(preset, flags, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(train.parse_config(["--preset", preset, "--dry_run", *flags]))
    out = capsys.readouterr().out
    assert all(text in out for text in says), out
    assert not list(tmp_path.iterdir())


def test_bytes_of_the_paper_s_gsrm_by_hand(capsys, tmp_path, monkeypatch):
    """7.6156e9 parameters, 1.09e9 of them embedding and head; four pairs of 25000 tokens, one at a time."""
    n, rest, b = 7_615_616_512, 2 * 152_064 * 3584 + 3584, 2
    cfg, s = sft.parse_config(["--preset", "paper-gsrm", "--dry_run"]), plan.shape(plan.read_config("Qwen/Qwen2.5-7B-Instruct"))
    p = plan.lesson(cfg, s, 25_000, 1)
    assert {name: size for name, size in p.memory["always"].items() if size} == {"masters": 4 * n, "AdamW's moments": 8 * n} and p.micro_batches == 4
    update = p.memory["update"]
    kept = 2 * (4 + 2 * b) * 3584 + 4 * 30 + 2 * b * (3584 + 512) + 4 * b * 18_944                  # norms, attention, gate and up, of one layer that is computed again
    assert update["gradients"] == 4 * n and update["activations"] == 25_000 * (28 * 3584 * b + kept) and update["a unit's gradient"] == 6 * rest
    assert update["head"] == (1 << 28) * b + 152_064 * 3584 * b + 25_000 * 3584 * b and p.seconds == {"update": 8 * n * 100_000 / plan.FLOPS}
    away = plan.lesson(replace(cfg, offload=True), s, 25_000, 1)
    assert away.cpu == 8 * n + (4 + 4) * s.pinned and away.peak == pytest.approx(p.peak - 16 * n) and plan.lesson(cfg, s, 25_000, 4).memory["always"]["masters"] == n
    monkeypatch.chdir(tmp_path)
    sft.main(cfg)
    out = capsys.readouterr().out
    assert all(text in out for text in ("7,615.62M", "4 pairs a step", "25000 tokens each", "100,000 a step", "does not fit in 80 GB: 147.5",
                                        "--offload True                               25.7 GB, fits", "--nproc_per_node 4                  56.1 GB, fits",
                                        "forward 3.81 s (25%), recomputation 3.81 s (25%), backward 7.62 s (50%)")) and not list(tmp_path.iterdir())


def test_dry_run_of_sft_counts_pairs_that_lie_here(data, tmp_path, capsys):  # noqa: F811
    """What is held out is not counted, and the last batch of the last epoch is a step, too: the numbers are those that the run says."""
    for share, batch in (("0", "5"), ("0.5", "4")):
        flags = ["--model", "toy/student", "--data", str(data), "--epochs", "1", "--batch_size", batch, "--eval_share", share, "--device", "cpu", "--out", str(tmp_path / share)]
        sft.main(cfg := sft.parse_config([*flags, "--dry_run"]))
        pairs, out = sft.load_pairs(cfg, load_tokenizer("toy/student")), capsys.readouterr().out
        longest, steps = max(len(p) + len(t) for p, t in pairs), math.ceil(len(pairs) / int(batch))
        assert f"; {len(pairs)} pairs, {steps} steps; at most {longest} tokens each (the longest of {data}), {int(batch) * longest} a step" in out and "\nfits in 80 GB" in out
        assert not (tmp_path / share).exists()
        sft.main(sft.parse_config(flags))
        said = capsys.readouterr().out
        assert said.startswith(f"{len(pairs)} pairs, ") and f", {steps} steps of {batch}, " in said


def test_dry_run_of_sft_plans_for_the_pairs_that_the_run_takes(tmp_path, capsys):
    """A pair longer than the model's 1024 positions: refused in the run's own words, or with --skip_long left out of what is planned for."""
    lines = [{"prompt": "Ann", "target": "Bob"}, {"prompt": "Ann", "target": "Bob " * 1100}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--model", "toy/student", "--data", str(tmp_path / "data.jsonl"), "--device", "cpu", "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"data.jsonl:2: \d+ tokens, more than 1024 .*1 of 2 pairs are too long: --skip_long") as said:
        sft.main(sft.parse_config(flags))
    with pytest.raises(ValueError) as planned:
        sft.main(sft.parse_config([*flags, "--dry_run"]))
    assert str(planned.value) == str(said.value) and "fits" not in capsys.readouterr().out
    sft.main(sft.parse_config([*flags, "--dry_run", "--skip_long", "True"]))
    (prompt, target), = sft.load_pairs(sft.parse_config([*flags, "--limit", "1"]), load_tokenizer("toy/student"))
    assert f"; 1 pairs, 1 steps; at most {len(prompt) + len(target)} tokens each" in capsys.readouterr().out and not any((tmp_path / "out").glob("*"))


def test_dry_run_counts_prompts_that_lie_here(data, tmp_path, capsys):  # noqa: F811
    train.main(train.parse_config(["--dry_run", "--data", str(data), "--gsrm", "toy/gsrm", "--out", str(tmp_path / "out")]))
    out, tok = capsys.readouterr().out, load_tokenizer("toy/student")
    longest = max(len(problem_ids(tok, p)) for p in train.load_problems(data))
    assert f"{longest} (prompt: the longest of {data}) + 150 = {longest + 150} tokens" in out and "fits in 80 GB" in out and not (tmp_path / "out").exists()
    assert f"{2 * numel(load_model('toy/gsrm')[0]) / 1e6:.2f}M parameters in each process" in out              # gsrm.json names a judge besides


def test_every_remedy_that_is_named_helps(capsys):
    """The figures behind the advice: what is said to fit does fit, what is said to be not enough is more than the card."""
    train.main(train.parse_config(["--preset", "paper", "--dry_run"]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " GB, " in line and line.startswith("  ")]
    assert len(lines) >= 6 and {line[-1] for line in lines} == {"fits", "alone"}
    assert all((float(line[line.index("GB,") - 1]) <= 0.92 * 80) == (line[-1] == "fits") for line in lines)


def test_a_served_model_costs_this_process_nothing(capsys):
    """Neither does the advice to serve one that is served already; a reader here does not do a served judge's work."""
    def said(*flags):
        train.main(train.parse_config(["--preset", "paper", "--dry_run", *flags]))
        return capsys.readouterr().out
    reader, url = ("--gsrm", plan.READER), "http://127.0.0.1:1/v1#m"
    both, local, served = said(*reader, "--judge", url), said(*reader, "--judge", plan.SMALL_READER), said("--gsrm", url, "--judge", plan.SMALL_READER)
    peak = lambda out: float(re.search(r"does not fit in 80 GB: ([\d.]+)", out)[1])
    advice = lambda out: [(text, float(size)) for text, size in re.findall(r"^  (--gsrm http\S+(?: --judge http\S+)?) +([\d.]+) GB", out, re.M)]
    none = peak(said("--w_structure", "0"))
    assert advice(local) == advice(both) == [("--gsrm http://... --judge http://...", none)]
    assert advice(served) == [("--gsrm http://... --judge http://...", none)] and advice(said("--gsrm", url)) == []
    scoring = lambda out: float(re.search(r"scoring ([\d.]+) s", out)[1])
    assert scoring(both) < scoring(local) and scoring(said("--gsrm", url, "--judge", url)) == 0


def test_a_model_that_cannot_be_read_is_said_on_one_line():
    done = subprocess.run([sys.executable, "train.py", "--preset", "none", "--model", "nobody/nothing", "--dry_run"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert (done.returncode == 1 and done.stderr.startswith("error: nobody/nothing: neither a folder here nor a hub name that can be reached")
            and done.stderr.count("\n") == 1), done.stderr


@pytest.mark.parametrize("flags, says", [(["qwen1.5b"], "--data is needed by --preset qwen1.5b"),
                                         (["paper", "--data", "toy"], "the structure reward needs a reward model; give one"),
                                         (["toy", "--cache_gb", "0"], "--cache_gb/--cache-gb: '0' is not a finite number in (0, inf)"),
                                         (["toy", "--lora_rank", "-1"], "--lora_rank/--lora-rank: '-1' is not a whole number of 0 or more")])
def test_what_a_preset_needs_is_said(flags, says, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_config(["--preset", *flags])
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_reward_models_load_in_the_dtype_asked_for():
    gsrm = evaluation.load_gsrm("toy/gsrm", "", None, "cpu", 200, dtype="bfloat16", cache_gb=0.001)
    sampler = gsrm.generate.__self__.sampler
    assert sampler.model.dtype == torch.bfloat16 and sampler.max_tokens == 1_000_000 // plan.cache_bytes(sampler.model.config, 2)
    assert evaluation.load_gsrm("toy/gsrm", "", None, "cpu").generate.__self__.sampler.model.dtype == torch.float32


@pytest.mark.parametrize("preset", [name for name in train.PRESETS if name not in ("none", "toy")])
def test_every_preset_makes_a_step(preset, tmp_path):
    """A tiny random Qwen2 in the place of the hub's; everything else that is not a length or a count is the preset's own."""
    save_model(AutoModelForCausalLM.from_config(tiny()), load_tokenizer("toy/student"), tmp_path / "tiny")
    write_jsonl(tmp_path / "train.jsonl", [asdict(p) for p in make_problems(5, 4, 5, (2, 4))])
    cfg = train.parse_config(["--preset", preset, "--model", str(tmp_path / "tiny"), "--data", str(tmp_path / "train.jsonl"), "--gsrm", "toy:read",
                              "--out", str(tmp_path / "out"), "--steps", "1", "--problems_per_step", "2", "--max_new_tokens", "12", "--warmup_steps", "0", "--device", "cpu"])
    assert cfg.dtype == "bfloat16" and (cfg.combine, cfg.normalize, cfg.aggregation) == (("gdpo", True, "token") if preset == "qwen1.5b" else ("sum", False, "sequence"))
    try:
        train.main(cfg)
    finally:
        parallel.finish()
    before = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").named_parameters())
    after = weights(tmp_path / "out")
    assert after.keys() == before.keys() and max(float((after[k] - before[k].detach()).abs().max()) for k in after) <= 1.01 * cfg.lr
