"""LoRA: the reference is the start, checkpoints hold adapters only, resume is bitwise, what is exported is merged and plain. Needs peft."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_parallel import furthest, torchrun
from test_train import ROOT, SMALL, config, data, lines, weights  # noqa: F401
from transformers import AutoModelForCausalLM

import lora
import parallel
import plan
import train
from data import load_model

RANK = ["--lora_rank", "4", "--lora_alpha", "6", "--lr", "5e-3", "--beta", "0.01"]
X = torch.arange(300, 340)[None]


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        lora.add_adapters(load_model("toy/student")[0], 4, 8, "all-linear", "toy/student")


def test_a_model_without_adapters_is_left_alone():
    model = load_model("toy/student")[0].train()
    with lora.adapters_off(model):
        assert model.training
    assert model.training and lora.adapted(model) == {}


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def straight(peft, data, tmp_path_factory):  # noqa: F811
    """One run of 3 steps with adapters."""
    out = tmp_path_factory.mktemp("lora")
    train.main(config(data, out, *RANK, "--steps", "3", "--save_every", "2"))
    return out


def stirred(targets="all-linear"):
    """The toy's student with adapters that are not zero."""
    model = lora.add_adapters(load_model("toy/student")[0], 4, 6, targets, "toy/student")
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("targets", ["all-linear", "q_proj, v_proj", "self_attn.q_proj,self_attn.v_proj", "1.self_attn.v_proj, layers.1.self_attn.q_proj"])
def test_merging_is_the_closed_form_and_pefts(peft, targets):
    """W + 6/4 B A, layer by layer; the same from peft's own merge."""
    model, base = stirred(targets), load_model("toy/student")[0]
    merged = lora.merge(parallel.whole_state(model), {name: layer.scaling["default"] for name, layer in lora.adapted(model).items()})
    name = "model.layers.1.self_attn.v_proj"
    a, b = (model.get_submodule(name).get_submodule(f"lora_{x}.default").weight for x in "AB")
    assert a.shape == (4, 64) and torch.allclose(merged[f"{name}.weight"], base.get_submodule(name).weight + 6 / 4 * b @ a, atol=1e-6)
    assert len(lora.adapted(model)) == (3 * 7 if targets == "all-linear" else 2 if "1" in targets else 3 * 2)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.shape(base.config, 4, targets).adapters
    want = model(input_ids=X).logits
    base.load_state_dict(merged, strict=False)
    assert torch.allclose(base(input_ids=X).logits, want, atol=1e-4)
    for layer in lora.adapted(model).values():
        layer.merge()
        assert torch.allclose(layer.base_layer.weight, merged[next(n for n, m in model.named_modules() if m is layer) + ".weight"], atol=1e-6)


def test_with_the_adapters_off_it_is_the_start(peft):
    model, base = stirred().train(), load_model("toy/student")[0]
    trained = [p.requires_grad for p in model.parameters()]
    with lora.adapters_off(model):
        assert not model.training and torch.equal(model(input_ids=X).logits, base(input_ids=X).logits)
        assert trained == [p.requires_grad for p in model.parameters()]
    assert model.training and not torch.allclose(model(input_ids=X).logits, base(input_ids=X).logits, atol=0.1)


NO_TARGETS = [("lm_head", "lm_head is the head"), ("q_proj,embed_tokens", "model.embed_tokens is no linear layer"), ("nowhere", "called 'nowhere'"),
              ("q_proj,v_porj", "no layer of this model is called 'v_porj'"), ("proj", "no layer of this model is called 'proj'"), ("q_proj,", "called ''")]


@pytest.mark.parametrize("targets, says", NO_TARGETS)
def test_adapters_where_they_cannot_be_are_refused_by_the_plan_too(targets, says):
    model = load_model("toy/student")[0]
    for refuses in (lambda: plan.shape(model.config, 4, targets), lambda: lora.layers_of(model, targets)):
        with pytest.raises(ValueError, match=rf"^--lora_targets {targets}: .*{says}.*leave it out$"):
            refuses()


@pytest.mark.parametrize("targets, says", NO_TARGETS)
def test_a_refusal_leaves_the_model_as_it_was(peft, targets, says):
    model = load_model("toy/student")[0]
    with pytest.raises(ValueError, match=says):
        lora.add_adapters(model, 4, 8, targets, "toy/student")
    assert lora.adapted(model) == {} and all(p.requires_grad for p in model.parameters())


def test_the_kl_is_to_the_start(straight):
    kl = [row["kl"] for row in lines(straight)]
    assert abs(kl[0]) < 1e-9 < 1e-6 < kl[1] < kl[2]


def test_what_is_exported_is_plain_and_the_adapter_loads_in_peft(peft, straight):
    start, merged, logits = load_file(ROOT / "toy/student/model.safetensors"), weights(straight), AutoModelForCausalLM.from_pretrained(straight / "model")(input_ids=X).logits
    assert merged.keys() == start.keys() and all(w.dtype == torch.float32 for w in merged.values())
    assert {name for name in merged if not torch.equal(merged[name], start[name])} == {name for name in merged if "_proj" in name}
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ROOT / "toy/student"), straight / "adapter")
    assert torch.allclose(again(input_ids=X).logits, logits, atol=1e-4) and json.loads((straight / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 6


def test_a_resumed_run_is_the_straight_run_bitwise(straight, data, tmp_path):  # noqa: F811
    """And its checkpoints hold the adapters with their moments, no frozen weight."""
    train.main(config(data, tmp_path, *RANK, "--steps", "2", "--save_every", "2"))
    train.main(config(data, tmp_path, *RANK, "--steps", "3", "--save_every", "2", "--resume", "auto"))
    a, b = weights(straight), weights(tmp_path)
    assert all(torch.equal(a[k], b[k]) for k in a) and lines(straight) == lines(tmp_path)
    shard, = (tmp_path / "checkpoints" / "step_000003").glob("*.safetensors")
    saved = load_file(shard)
    assert saved and all(".lora_" in name for name in saved) and {name.split("/")[0] for name in saved} == {"model", "step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(ValueError, match="--lora_rank was 4, is 8"):
        train.main(config(data, tmp_path, *RANK, "--lora_rank", "8", "--steps", "4", "--resume", "auto"))


def test_a_checkpoint_is_exported_merged(straight, tmp_path):
    done = subprocess.run([sys.executable, "checkpoint.py", str(straight / "checkpoints" / "step_000003"), "--out", str(tmp_path / "model")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    a, b = weights(straight), weights(tmp_path)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_adapters_are_not_exported_on_a_base_that_is_another_one_now(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"models": dict.fromkeys(record["models"], "0" * 16)}))
    done = subprocess.run([sys.executable, "checkpoint.py", str(run / "checkpoints" / "step_000003"), "--out", str(tmp_path / "model")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "model").exists()
    assert done.stderr.startswith("error: the adapters' model: toy/student is not what it was in training (SHA-256 0000000000000000..., now ") and done.stderr.count("\n") == 1


def test_a_checkpoint_is_exported_on_the_base_that_the_run_computed_with(peft, data, tmp_path):  # noqa: F811
    """A float32 base under --dtype bfloat16 was rounded when the adapters were trained, and model/ is made of that."""
    train.main(config(data, tmp_path / "out", *RANK, "--dtype", "bfloat16", "--steps", "1"))
    done = subprocess.run([sys.executable, "checkpoint.py", str(tmp_path / "out/checkpoints/step_000001"), "--out", str(tmp_path / "model")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    a, b = weights(tmp_path / "out"), weights(tmp_path)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_make_the_same_steps(straight, data, tmp_path):  # noqa: F811
    """Shards of adapters beside shards of frozen weights."""
    code, said, _ = torchrun(2, "train.py", *SMALL, *RANK, "--steps", "3", "--save_every", "2", "--data", str(data), "--out", str(tmp_path))
    assert code == 0, said[-3000:]
    assert furthest(straight, tmp_path) < 1e-5 and [row["kl"] for row in lines(tmp_path)] == pytest.approx([row["kl"] for row in lines(straight)], abs=1e-6)


def test_in_bfloat16_only_what_is_frozen_is_rounded(peft, straight, data, tmp_path):  # noqa: F811
    run = train.set_up(config(data, tmp_path, *RANK, "--dtype", "bfloat16", "--gradient_checkpointing", "True"), tmp_path)
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32} and {p.dtype for p in run.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert run.reference is run.model
    before = [p.detach().clone() for p in run.model.parameters()]
    metrics = [train.step_once(run, step)[0] for step in range(2)]
    moved = [not torch.equal(a, b) for a, b in zip(before, run.model.parameters())]
    assert not any(m for m, p in zip(moved, run.model.parameters()) if not p.requires_grad) and any(moved)
    assert metrics[0]["kl"] < 1e-3 and metrics[0]["reward"] == pytest.approx(lines(straight)[0]["reward"], abs=0.1)
