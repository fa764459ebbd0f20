"""Warnings at their thresholds, numbers that are not finite (skipped, dumped, rolled back once, then the end), the run's record, dashboards."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import config, data, lines, weights  # noqa: F401
from transformers import AutoModelForCausalLM

import train
import update
import watch
from data import file_hash, load_model

FINE = {"entropy": 0.3, "num_tokens": 100, "completions/clipped_ratio": 0.1, "frac_reward_zero_std": 0.2,
        "sampling/sampling_logp_difference/max": 1e-5, "unscored": 0, "nonfinite": 0.0, "skipped_step": 0.0}


@pytest.mark.parametrize("name, metric, at, beyond", [
    ("entropy", "entropy", 0.02, 0.019), ("truncated", "completions/clipped_ratio", 0.8, 0.81), ("spreadless", "frac_reward_zero_std", 0.8, 0.81),
    ("ratio", "sampling/sampling_logp_difference/max", 1.0, 1.01), ("unscored", "unscored", 1.6, 2), ("nonfinite", "nonfinite", 0, 1)])
def test_each_warning_comes_beyond_its_threshold_and_no_sooner(data, name, metric, at, beyond):  # noqa: F811
    cfg = config(data, "unused")                                           # 4 x 4 rollouts
    assert watch.warnings(FINE, cfg) == {} == watch.warnings(FINE | {metric: at}, cfg)
    said = watch.warnings(FINE | {metric: beyond}, cfg)
    assert list(said) == [name] and (name == "nonfinite" or f"--warn_{name}" in said[name])


def test_completions_without_a_reward_name_the_budget_where_structures_were_cut_off(data):  # noqa: F811
    cfg, cut = config(data, "unused"), {"time/gsrm/cut_off": 3}
    said = watch.warnings(FINE | {"unscored": 2} | cut, cfg)["unscored"]
    assert "3 times a structure was cut off" in said and "--gsrm_max_new_tokens may be too small" in said and not watch.warnings(FINE | cut, cfg)
    assert "--gsrm_max_new_tokens" not in watch.warnings(FINE | {"unscored": 2, "time/gsrm/cut_off": 0}, cfg)["unscored"]


def test_thresholds_are_flags_and_a_second_pass_may_drift(data):  # noqa: F811
    loose = config(data, "unused", "--warn_entropy", "0", "--warn_truncated", "1", "--warn_spreadless", "1", "--warn_unscored", "1", "--updates_per_batch", "2")
    assert watch.warnings(FINE | {"entropy": 0.0, "completions/clipped_ratio": 1.0, "frac_reward_zero_std": 1.0, "unscored": 16,
                                  "sampling/sampling_logp_difference/max": 9.0}, loose) == {}


def test_the_verdict_on_faults():
    faults = watch.Faults(3)
    assert [faults.verdict(x) for x in (1, 1, 0, 1, 1, 1)] == ["", "", "", "", "", "roll back"]
    assert [faults.verdict(x) for x in (0, 1, 1, 1)] == ["", "", "", "stop"]
    assert watch.Faults(2, in_row=1, rolled_back=True).verdict(1) == "stop"          # as a resumed run finds itself


@pytest.fixture
def spoil(monkeypatch):
    """The losses of these steps (by how often the student was updated) become NaN."""
    calls, real_update, real_loss, steps = [0], train.update, update.linear_policy_loss, set()

    def counted(*args):
        calls[0] += 1
        return real_update(*args)

    def spoiled(*args):
        value, *rest = real_loss(*args)
        return (value * float("nan") if calls[0] in steps else value, *rest)
    monkeypatch.setattr(train, "update", counted)
    monkeypatch.setattr(update, "linear_policy_loss", spoiled)
    return steps


def test_a_step_that_is_not_finite_moves_nothing_and_leaves_its_batch(data, tmp_path, spoil):  # noqa: F811
    spoil |= {2}
    train.main(config(data, tmp_path / "two", "--steps", "2"))
    spoil.clear()
    train.main(config(data, tmp_path / "one", "--steps", "1"))
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(a[k], b[k]) for k in a)
    first, second = lines(tmp_path / "two")
    assert (first["nonfinite"], second["nonfinite"], second["skipped_step"]) == (0, 1, 1) and "nonfinite" in second["warnings"]
    fault = json.loads((tmp_path / "two/faults/step_000002.json").read_text())
    assert len(fault["rollouts"]) == len(fault["tokens"]) == 16 and [len(t) for t in fault["tokens"]] == [r["length"] for r in fault["rollouts"]]


def test_two_updates_on_the_same_rollouts_are_one_row_of_the_log(data, tmp_path, spoil, monkeypatch):  # noqa: F811
    spoil |= {3}                                           # the first update of the second step: the second one is fine and must not hide it
    seen, counted = [], train.update
    monkeypatch.setattr(train, "update", lambda *args: seen.append(counted(*args)) or seen[-1])
    train.main(config(data, tmp_path, "--steps", "2", "--updates_per_batch", "2", "--clip_high", "0.001", "--clip_low", "0.001"))
    first, second = lines(tmp_path)
    for name in ("loss", "grad_norm", "clip_ratio/region_mean", "sampling/importance_sampling_ratio/mean"):
        assert first[name] == (seen[0][name] + seen[1][name]) / 2
    assert seen[0]["clip_ratio/region_mean"] == 0 < first["clip_ratio/region_mean"]
    assert first["sampling/sampling_logp_difference/max"] == max(m["sampling/sampling_logp_difference/max"] for m in seen[:2]) > 0
    assert (first["nonfinite"], second["nonfinite"], second["skipped_step"]) == (0, 1, 0.5) and (tmp_path / "faults/step_000002.json").exists()


def test_faults_in_a_row_roll_back_once_then_end_the_run(data, tmp_path, spoil, capsys):  # noqa: F811
    spoil |= {3, 4, 6, 7}
    with pytest.raises(FloatingPointError, match="2 steps in a row.*again after going back.*--lr"):
        train.main(config(data, tmp_path, "--steps", "9", "--save_every", "2", "--max_faults", "2"))
    assert "going on with new problems" in capsys.readouterr().out
    log = lines(tmp_path)
    assert [row["nonfinite"] for row in log] == [0, 0, 1, 1, 0, 1, 1]
    states = {p.name: json.loads((p / "state.json").read_text()) for p in (tmp_path / "checkpoints").iterdir()}
    assert states["step_000004"]["rolled_back"] is True and states["step_000004"]["faults"] == 0
    one, _ = load_model("toy/student")
    four, _ = load_model("toy/student")
    train.load_checkpoint(tmp_path / "checkpoints/step_000002", one)
    train.load_checkpoint(tmp_path / "checkpoints/step_000004", four)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), four.parameters()))               # what was gone back to


def test_a_broken_student_is_found_though_no_loss_is_taken(data, tmp_path, spoil, monkeypatch):  # noqa: F811
    """It samples the same token everywhere, so that no group has a spread, and without the KL nothing is left to compute."""
    counted = train.update

    def breaks(model, *rest):
        metrics = counted(model, *rest)
        model.model.norm.weight.data.fill_(float("nan"))
        return metrics
    monkeypatch.setattr(train, "update", breaks)
    with pytest.raises(FloatingPointError, match="2 steps in a row had a loss or gradient that is not finite"):
        train.main(config(data, tmp_path, "--steps", "4", "--max_faults", "2", "--beta", "0"))
    assert [row["nonfinite"] for row in lines(tmp_path)] == [0, 1, 1]


def test_a_student_whose_logits_are_not_finite_is_not_written_as_a_model(data, tmp_path, monkeypatch):  # noqa: F811
    """Its weights are finite, and the run is over before --max_faults steps have failed: nor does a resume write it."""
    counted = train.update

    def breaks(model, *rest):
        metrics = counted(model, *rest)
        model.model.norm.weight.data.fill_(3e38)
        return metrics
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", breaks)
        with pytest.raises(FloatingPointError, match="its logits are not, so no model is written: lower --lr"):
            train.main(config(data, tmp_path, "--steps", "1"))
    with pytest.raises(FloatingPointError, match="no model is written"):
        train.main(config(data, tmp_path, "--steps", "1", "--resume", "auto"))
    assert not (tmp_path / "model").exists() and len(lines(tmp_path)) == 1


@pytest.fixture
def overflow(monkeypatch):
    """AdamW's steps of these numbers leave an infinite weight, though loss and gradient were finite."""
    calls, real, steps = [0], torch.optim.AdamW.step, set()

    def step(self, *args):
        real(self, *args)
        calls[0] += 1
        if calls[0] in steps:
            self.param_groups[0]["params"][-1].data.view(-1)[0] = float("inf")
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return steps


@pytest.mark.parametrize("last", [4, 3])
def test_weights_that_an_update_broke_are_never_kept(data, tmp_path, overflow, capsys, last):  # noqa: F811
    """At once back to the checkpoint before, also in the run's last step; and not a second time."""
    overflow |= {3}
    train.main(config(data, tmp_path, "--steps", str(last), "--save_every", "1", "--keep", "4"))
    assert [(row["nonfinite"], row["nonfinite_weights"]) for row in lines(tmp_path)] == [(0, 0), (0, 0), (1, 1), (0, 0)][:last]
    assert "left weights that are not finite: parameters and optimiser are those of" in (said := capsys.readouterr().out) and "warning: the update left weights" in said
    model = AutoModelForCausalLM.from_pretrained("toy/student")
    at = []
    for step in range(1, last + 1):
        train.load_checkpoint(tmp_path / f"checkpoints/step_{step:06d}", model)
        at.append([p.detach().clone() for p in model.parameters()])
        assert all(p.isfinite().all() for p in at[-1])
    assert all(torch.equal(p, q) for p, q in zip(at[1], at[2])) and all(w.isfinite().all() for w in weights(tmp_path).values())
    if last == 3:
        overflow |= {4}
        with pytest.raises(FloatingPointError, match="an update left weights that are not finite, again after going back to a checkpoint: lower --lr"):
            train.main(config(data, tmp_path, "--steps", "4", "--save_every", "1", "--keep", "4", "--resume", "auto"))
        assert not (tmp_path / "checkpoints/step_000004").exists()


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(data, tmp_path, spoil):  # noqa: F811
    spoil |= {1, 2}
    with pytest.raises(FloatingPointError, match="2 steps in a row had a loss or gradient that is not finite: lower --lr"):
        train.main(config(data, tmp_path, "--steps", "4", "--max_faults", "2"))


HUB = """
import sys, watch
from pathlib import Path
folder = Path(sys.argv[1])
for commit in ("a" * 40, "b" * 40, "b" * 40):
    (folder / "refs/main").write_text(commit)
    print(watch.revision("me/tiny"), watch.model_hash("me/tiny"))
"""


def test_a_hub_model_is_known_by_its_revision(tmp_path):
    """In a cache as huggingface_hub lays it out, without the network."""
    folder = tmp_path / "hub/models--me--tiny"
    for commit in ("a", "b"):
        (folder / "snapshots" / (commit * 40)).mkdir(parents=True)
        (folder / "snapshots" / (commit * 40) / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "refs").mkdir()
    done = subprocess.run([sys.executable, "-c", HUB, str(folder)], cwd=Path(watch.__file__).parent, env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
                          capture_output=True, text=True)
    first, second, again = (line.split() for line in done.stdout.splitlines())
    assert first[0] == "a" * 40 and second[0] == "b" * 40 and second == again and first[1] != second[1]


def test_what_lies_beside_a_model_is_no_part_of_it(tmp_path):
    """A report card or generations that a command was told to write there; a chat template is."""
    shutil.copytree("toy/gsrm", tmp_path / "gsrm")
    before = watch.model_hash(str(tmp_path / "gsrm"))
    for name in ("card.json", "rows.settings.json", "log.txt"):
        (tmp_path / "gsrm" / name).write_text("{}")
    assert watch.model_hash(str(tmp_path / "gsrm")) == before == watch.model_hash("toy/gsrm") and watch.revision("toy/gsrm") is None
    (tmp_path / "gsrm/chat_template.jinja").write_text("{}")
    assert watch.model_hash(str(tmp_path / "gsrm")) != before


def test_a_signal_is_heard_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with watch.leaving() as check:
        check()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)                               # what torchrun passes on is the same request
        with pytest.raises(watch.Leave) as asked:
            check()
    assert asked.value.number == signal.SIGTERM and "SIGTERM" in str(asked.value) and signal.getsignal(signal.SIGTERM) is before


def test_the_record_says_what_the_run_was(data, tmp_path):  # noqa: F811
    train.main(config(data, tmp_path, "--steps", "1"))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"]["seed"] == 3 and record["processes"] == 1 and record["versions"]["torch"] == torch.__version__
    assert record["data"] == {str(data): file_hash(data)} and len(record["chat_template"]) == 16
    row, = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"time/sampling", "time/scoring", "time/reference", "time/update", "time/tokens_per_second", "time/peak_memory_gb"} <= set(row) and 0.1 < row["time/peak_memory_gb"] < 20


def test_dashboards_are_optional(data, tmp_path, monkeypatch):  # noqa: F811
    assert watch.tracker("", tmp_path, config(data, "unused"))({"step": 1}) is None
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    with pytest.raises(ImportError, match="pip install trackio"):
        watch.tracker("trackio", tmp_path, config(data, "unused"))
    seen = []
    board = type("Board", (), {"init": staticmethod(lambda **k: seen.append(k["name"])), "log": staticmethod(lambda values, step: seen.append((values, step)))})
    monkeypatch.setitem(__import__("sys").modules, "wandb", board)
    watch.tracker("wandb", tmp_path, config(data, "unused"))({"step": 3, "reward": 0.5, "warnings": {"entropy": "low"}})
    assert seen == [tmp_path.name, ({"step": 3, "reward": 0.5}, 3)]
