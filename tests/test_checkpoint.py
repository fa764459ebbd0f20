"""Checkpoints: damage is found and passed over, nothing whole is lost, and a run killed at any moment ends as if it had not been."""
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
from test_train import ROOT, config, data, lines, weights  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM, Glm4MoeConfig

import checkpoint
import train
from checkpoint import FREE, Checkpoints, changed, cut_logs, damage, load_checkpoint, lost, newest, spare
from data import load_model, save_model
from watch import Leave


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Bitwise means the same number of threads in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small():
    """(model, tokenizer, optimiser) after one step."""
    model, tokenizer = load_model("toy/student")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    return model, tokenizer, optimizer


@pytest.fixture(scope="module")
def straight(one_thread, data, tmp_path_factory):  # noqa: F811
    """One run of 8 steps, a checkpoint every two."""
    out = tmp_path_factory.mktemp("straight")
    train.main(config(data, out, "--steps", "8", "--save_every", "2", "--keep", "4"))
    return out


def copy(run, to):
    subprocess.run(["cp", "-r", str(run), str(to)], check=True)
    return to


def test_two_machines_with_a_disk_each_are_told_before_anything_is_trained(tmp_path, monkeypatch):
    """The first process sees its own mark, another one does not: all of them stop. One process, or a shared disk: no mark is left behind."""
    checkpoint.check_shared(tmp_path / "shared")
    assert list((tmp_path / "shared").iterdir()) == []
    monkeypatch.setattr(checkpoint, "all_max", lambda value: 1.0 if isinstance(value, bool) else value)              # somebody does not see it
    with pytest.raises(OSError, match="is not one folder for all processes.*give an --out on a disk that all machines share"):
        Checkpoints(tmp_path / "own")
    assert list((tmp_path / "own").iterdir()) == []


def test_what_is_written_is_what_was_saved_though_training_goes_on(small, tmp_path):
    model, tokenizer, optimizer = small
    then = [p.detach().clone() for p in model.parameters()]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, tokenizer, optimizer, 1, reward=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    checkpoints.wait()
    assert damage(tmp_path / "step_000001") == "" and load_checkpoint(tmp_path / "step_000001", model, optimizer) == {"step": 1, "reward": 0.5}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), then))


def test_a_tokenizer_with_several_chat_templates_is_saved_whole(small, tmp_path):
    """transformers writes those after the first into a folder of their own, whose files belong to the checkpoint."""
    model, _, optimizer = small
    tokenizer = tiny.tokenizer("chatml", ["hello"])
    tokenizer.chat_template = {"default": tiny.CHATML, "tool_use": tiny.CHATML + "{# tools #}"}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, tokenizer, optimizer, 1)
    checkpoints.wait()
    inner, = (file for file in (tmp_path / "step_000001").rglob("*tool_use*"))
    assert damage(tmp_path / "step_000001") == "" and inner.parent != tmp_path / "step_000001"
    inner.write_text(tiny.CHATML)
    assert inner.name in damage(tmp_path / "step_000001")


def test_copies_beside_the_checkpoints_are_none_of_the_run_s(small, tmp_path):
    """Neither gone on from, nor deleted, nor tripped over; and a million steps come after 999999."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    copies = [tmp_path / name for name in ("step_000003_best", "step_000009_2", "step_9", "step_final")]
    for folder in copies:
        folder.mkdir()
    for step in (1, 2, 3):
        checkpoints.save(*small, step)
        checkpoints.wait()
    assert newest(tmp_path) == (tmp_path / "step_000003", []) and all(folder.is_dir() for folder in copies) and not (tmp_path / "step_000002").exists()
    (tmp_path / "step_000003").rename(tmp_path / "step_999999")
    checkpoints.save(*small, 1_000_000)
    checkpoints.wait()
    assert newest(tmp_path)[0].name == "step_1000000" and not (tmp_path / "step_999999").exists()


@pytest.mark.parametrize("fused", [True, None])
def test_adamw_s_step_lies_where_the_kernel_wants_it(small, tmp_path, monkeypatch, fused):
    """Beside the parameter for the fused one, on the CPU for the others; the meta device stands for a GPU: nothing can be loaded there, but all is laid out."""
    model, tokenizer, optimizer = small
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, tokenizer, optimizer, 1)
    checkpoints.wait()
    monkeypatch.setattr(dcp, "load", lambda tensors, **how: None)
    model.to("meta").tie_weights()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    load_checkpoint(tmp_path / "step_000001", model, optimizer)
    for p in model.parameters():
        state = optimizer.state[p]
        assert state["step"].device.type == ("meta" if fused else "cpu") and state["exp_avg"].device == state["exp_avg_sq"].device == p.device
        assert state["step"].dtype == torch.float32 and state["step"].shape == () and state["exp_avg"].shape == p.shape


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])])
def test_a_fused_adamw_goes_on_bitwise_from_what_was_saved(tmp_path, device):
    """Two steps, against one step, a checkpoint, and the second step from it; sft.py's optimiser on a GPU is this one."""
    def steps(model, optimizer, count):
        for _ in range(count):
            model(input_ids=torch.tensor([[1, 2, 3]], device=device)).logits.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    def fresh():
        model, tokenizer = load_model("toy/student", device)
        return model, tokenizer, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model, tokenizer, optimizer = fresh()
    steps(model, optimizer, 1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, tokenizer, optimizer, 1)
    checkpoints.wait()
    again, _, other = fresh()
    load_checkpoint(tmp_path / "step_000001", again, other)
    assert {state["step"].item() for state in other.state.values()} == {1.0} and {state["step"].device.type for state in other.state.values()} == {device}
    assert all(map(torch.equal, steps(model, optimizer, 1), steps(again, other, 1)))


RECORD = {"config": {"data": "a", "eval_data": "", "lr": 1.0, "keep": 2, "model": "m"}, "data": {"a": "1"}, "chat_template": "t"}
HELD = RECORD | {"config": RECORD["config"] | {"eval_data": "b"}, "data": {"a": "1", "b": "2"}}
SAME = RECORD | {"config": RECORD["config"] | {"eval_data": "a"}}                     # held out is what is trained on: one file


def given(record, **other):
    return record | {"config": record["config"] | {k: v for k, v in other.items() if k in record["config"]}} | ({"data": other["files"]} if "files" in other else {})


@pytest.mark.parametrize("before, now, says", [
    (RECORD, RECORD, ""), (HELD, HELD, ""), (SAME, SAME, ""), (RECORD, given(RECORD, keep=3), ""),
    (RECORD, given(RECORD, data="c", files={"c": "1"}), ""), (HELD, given(HELD, data="c", eval_data="d", files={"c": "1", "d": "2"}), ""),              # moved
    (RECORD, given(RECORD, files={"a": "1", "test": "9"}), ""),                                                                     # --eval_problems was 0
    (RECORD, given(RECORD, lr=2.0), "--lr was 1.0, is 2.0; go on with the same settings"),
    (RECORD, given(RECORD, files={"a": "9"}), r"^a has other contents \(SHA-256 9...\) than a when the run began \(1...\); put the old file back, or choose another --out$"),
    (HELD, given(HELD, data="c", files={"c": "9", "b": "2"}), "^c has other contents .* than a "), (HELD, given(HELD, files={"a": "1", "b": "9"}), "^b has other contents"),
    (HELD, given(HELD, data="b", eval_data="a", files={"b": "2", "a": "1"}), "^b has other contents .* than a "),
    (RECORD, given(HELD), "--eval_data was '', is 'b'"), (HELD, given(RECORD), "--eval_data was 'b', is ''"), (SAME, HELD, "--eval_data was 'a', is 'b'"),
    (RECORD, RECORD | {"chat_template": "u"}, r"the chat template of --model m is another one \(SHA-256 u...\) than when the run began \(t...\)"),
    ({"config": RECORD["config"]}, RECORD, ""), ({"config": RECORD["config"]}, given(RECORD, data="c", files={"c": "1"}), "--data was 'a', is 'c'"),     # no hashes
])
def test_what_keeps_a_run_from_going_on(before, now, says):
    why = changed(before, now, FREE)
    assert re.search(says, why) if says else why == ""


def test_the_last_ones_and_the_best_are_kept(small, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, reward in enumerate((0.1, 0.9, None, 0.3, 0.2, 0.4), 1):
        checkpoints.save(*small, step, reward=reward)
    checkpoints.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000002", "step_000005", "step_000006"]


def test_one_that_a_kill_left_half_removed_goes_with_the_next_save(small, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, lose in ((1, "state.json"), (2, ""), (3, "")):
        checkpoints.save(*small, step)
        checkpoints.wait()
        if lose:
            (tmp_path / f"step_{step:06d}" / lose).unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003"]               # without rewards there is no best one


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"reward": "much"}', '{"reward": null}', '{"reward": NaN}', b"\xff"])
def test_a_checkpoint_whose_reward_cannot_be_read_has_none(tmp_path, broken):
    """It goes as one without a reward does, and the best of the others stays."""
    for step, note in ((1, broken), (2, '{"reward": -0.5}'), (3, '{"reward": -0.7}'), (4, '{"reward": 9}')):
        (tmp_path / f"step_{step:06d}").mkdir()
        (tmp_path / f"step_{step:06d}" / "state.json").write_bytes(note.encode() if isinstance(note, str) else note)
    last = tmp_path / "step_000004"
    assert [p.name for p in spare(tmp_path, 1, last)] == ["step_000001", "step_000003"] and [p.name for p in spare(tmp_path, 3, last)] == ["step_000001"]


def test_damaged_ones_of_higher_numbers_do_not_push_out_the_new_one(small, tmp_path):
    """A run that went on from before them, and was asked to leave before it had passed them."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, reward in ((50, 0.9), (100, 0.5)):
        checkpoints.save(*small, step, reward=reward)
        checkpoints.wait()
    spoil(tmp_path / "step_000100", "changed")
    checkpoints.save(*small, 75, reward=0.4)
    checkpoints.wait()
    assert newest(tmp_path)[0].name == "step_000075" and sorted(p.name for p in tmp_path.iterdir()) == ["step_000050", "step_000075", "step_000100"]


def test_what_a_kill_left_half_written_goes_with_the_next_start(tmp_path):
    (tmp_path / ".step_000063").mkdir(parents=True)
    (tmp_path / ".step_000063/part.safetensors").write_bytes(b"0" * 9)
    Checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())


def spoil(checkpoint, how):
    file = next(checkpoint.glob("*.safetensors"))
    if how == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "changed":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif how == "missing":
        file.unlink()
    else:
        (checkpoint / "manifest.json").write_text({"no manifest": "{", "odd manifest": "[]", "odd entry": '{"state.json": 1}', "empty manifest": "{}"}[how])


@pytest.mark.parametrize("how, says", [("cut", "cut short"), ("missing", "is missing"), ("changed", "was changed"),
                                       ("no manifest", "manifest.json"), ("odd manifest", "manifest.json"), ("odd entry", "manifest.json"), ("empty manifest", "all that")])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(data, straight, tmp_path, capsys, how, says):  # noqa: F811
    out = copy(straight, tmp_path / "out")
    for step in (8, 6):
        spoil(out / "checkpoints" / f"step_{step:06d}", how)
    found, passed = newest(out / "checkpoints")
    assert found.name == "step_000004" and len(passed) == 2 and all(says in why for why in passed)
    if how == "changed":                                                   # and the run that goes on from the one before is the straight one
        train.main(config(data, out, "--steps", "8", "--save_every", "2", "--keep", "4", "--resume", "auto"))
        said = capsys.readouterr().out
        assert "passed over" in said and "step_000004" in said and not newest(out / "checkpoints")[1]
        assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(out).values())) and lines(out) == lines(straight)


def test_logs_cut_at_any_byte_keep_the_lines_up_to_the_step(tmp_path):
    whole = [json.dumps({"step": step, "text": "π 𝜋\u2028"}, ensure_ascii=False).encode() + b"\n" for step in (1, 2, 3)]
    for end in range(len(whole[2]) + 1):
        for name in ("log.jsonl", "rollouts.jsonl"):
            (tmp_path / name).write_bytes(b"".join(whole[:2]) + whole[2][:end])
        cut_logs(tmp_path, 1 if end % 2 else 2)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == dict.fromkeys(("log.jsonl", "rollouts.jsonl"), b"".join(whole[:1 if end % 2 else 2]))


@pytest.mark.parametrize("name", ["log.jsonl", "rollouts.jsonl"])
@pytest.mark.parametrize("broken", [b'{"step": 2, "tex', b'{"text": "a"}', b"[2]", b'{"step": "2"}', b'{"step": 2, "text": "\xe9"}'])
def test_a_broken_line_of_a_log_is_named_and_both_logs_left_as_they_are(tmp_path, name, broken):
    logs = {log: b'{"step": 1}\n' + (broken if log == name else b'{"step": 2}') + b'\n{"step": 3}\n' for log in ("log.jsonl", "rollouts.jsonl")}
    for log, whole in logs.items():
        (tmp_path / log).write_bytes(whole)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}:2: expected the log line of a training step"):
        cut_logs(tmp_path, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == logs


GONE = {   # what is done to a run of 8 steps with a checkpoint every two -> what is said
    "checkpoints missing": (lambda out: shutil.rmtree(out / "checkpoints"), r"8 steps and no whole checkpoint \(\S*checkpoints is not there\): .*, or move log.jsonl away"),
    "checkpoints moved": (lambda out: [shutil.rmtree(path) for path in (out / "checkpoints").iterdir()], r"8 steps and no whole checkpoint \(\S*checkpoints holds none\)"),
    "all damaged": (lambda out: [spoil(path, "changed") for path in (out / "checkpoints").iterdir()],
                    r"8 steps and no whole checkpoint \(.*step_000008: \S+ was changed;.*step_000002: .*move log.jsonl away, with rollouts.jsonl, checkpoints, model$"),
    "no run.json": (lambda out: (out / "run.json").unlink(), r"holds log.jsonl and no run.json, .* or move log.jsonl away"),
}


@pytest.mark.parametrize("how", GONE)
def test_a_run_whose_checkpoints_are_gone_is_not_overwritten(data, straight, tmp_path, how):  # noqa: F811
    out = copy(straight, tmp_path / "out")
    GONE[how][0](out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=GONE[how][1]):
        train.main(config(data, out, "--steps", "8", "--save_every", "2", "--keep", "4", "--resume", "auto"))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} and len(lines(out)) == 8


@pytest.mark.parametrize("name", ["rollouts.jsonl", "checkpoints/step_000100/state.json", "sft.json", "config.json", "model/config.json"])
@pytest.mark.parametrize("resume", [(), ("--resume", "auto")])
def test_a_new_run_does_not_mix_with_what_is_there(data, tmp_path, name, resume):  # noqa: F811
    """The record run.json is not there, so that --resume auto begins a new one too."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{Path(*Path(name).parts[:-1] or [name])} is there already, of another run or a model: choose another --out, or move it away"):
        train.main(config(data, tmp_path, "--steps", "1", *resume))
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [Path(name)] and (tmp_path / name).read_text() == "{}"


@pytest.mark.parametrize("resume", [(), ("--resume", "auto")])
def test_a_run_does_not_write_over_its_own_start(data, straight, tmp_path, resume):  # noqa: F811
    """Also not by another name, and where the log is that of a run that began from it."""
    (tmp_path / "out").mkdir()
    copy(straight / "model", tmp_path / "out/model")
    (tmp_path / "alias").symlink_to(tmp_path / "out/model")
    if resume:
        record = json.loads((straight / "run.json").read_text())
        (tmp_path / "out/run.json").write_text(json.dumps(record | {"config": record["config"] | {"model": f"{tmp_path}/alias"}}))
    with pytest.raises(ValueError, match="out/model is --model itself, which the run would write over: choose another --out"):
        train.main(config(data, tmp_path / "out", "--model", f"{tmp_path}/alias", "--steps", "8", "--save_every", "2", "--keep", "4", *resume))
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(tmp_path / "out").values()))


@pytest.mark.parametrize("last, every, there, starts", [
    (0, 2, [], True), (1, 2, [], True), (5, 0, [], True),                  # killed before the first was due
    (2, 2, [], True), (3, 2, [".step_000002"], True), (4, 2, [".step_000002"], True),         # while it was written, which goes on to the second
    (3, 2, [], False), (5, 2, [".step_000002"], False), (3, 2, [".step_000004"], False), (2, 2, None, False),
    (1, 2, ["step_000001"], False), (5, 0, ["step_000005"], False), (0, 2, ["../model"], False), (5, 0, ["../model"], False),
])
def test_a_run_starts_over_only_where_its_first_checkpoint_cannot_be_whole_yet(tmp_path, last, every, there, starts):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": step, "nonfinite": 0}) + "\n" for step in range(1, last + 1)) + '{"step": 9')
    for name in ["", *there] if there is not None else ():
        (tmp_path / "checkpoints" / name).mkdir()
    why = lost(tmp_path, every, newest(tmp_path / "checkpoints")[1])
    assert (why == "") == starts and (starts or f"holds {last} steps and no whole checkpoint (" in why)


def test_a_step_that_was_not_finite_has_no_checkpoint(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": step, "nonfinite": int(step == 2)}) + "\n" for step in (1, 2, 3)))
    assert lost(tmp_path, 2, []) == "" != lost(tmp_path, 1, [])


@pytest.mark.parametrize("name", ["config", "data", "models"])
def test_a_record_that_no_run_has_written_is_named(data, straight, tmp_path, name):  # noqa: F811
    out = copy(straight, tmp_path / "out")
    (out / "run.json").write_text(json.dumps(json.loads((out / "run.json").read_text()) | {name: ["mine"]}))
    with pytest.raises(ValueError, match=f"run.json: '{name}' is no object, as a run writes it: put the file back, or choose another --out"):
        train.main(config(data, out, "--steps", "8", "--save_every", "2", "--keep", "4", "--resume", "auto"))


def test_a_run_that_starts_over_says_so_and_one_refused_keeps_its_evaluation(data, tmp_path, capsys):  # noqa: F811
    """Two steps and no checkpoint yet: they are made again. A broken line of the log: nothing is removed."""
    train.main(config(data, tmp_path, "--steps", "2", "--save_every", "0"))
    first = json.loads((tmp_path / "run.json").read_text())
    shutil.rmtree(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "eval_after.jsonl").write_text("kept")
    capsys.readouterr()
    whole = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "rollouts.jsonl").write_text("broken\n" + (rollouts := (tmp_path / "rollouts.jsonl").read_text()))
    with pytest.raises(ValueError, match="rollouts.jsonl:1: expected the log line"):
        train.main(config(data, tmp_path, "--steps", "2", "--save_every", "0", "--resume", "auto"))
    assert (tmp_path / "eval_after.jsonl").read_text() == "kept"
    (tmp_path / "rollouts.jsonl").write_text(rollouts)
    (tmp_path / "log.jsonl").write_text(whole)
    capsys.readouterr()
    train.main(config(data, tmp_path, "--steps", "2", "--save_every", "0", "--resume", "auto"))
    said = capsys.readouterr().err
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["earlier"] == [{name: first[name] for name in ("command", "commit", "versions", "machine", "processes")}] and first["machine"]
    assert f"note: no checkpoint in {tmp_path}/checkpoints yet: the run starts over\n" in said and "note: 2 logged steps after step 0, " in said
    assert len(lines(tmp_path)) == 2 and not (tmp_path / "eval_after.jsonl").exists()


def test_a_finished_run_whose_log_has_gone_ends_as_it_did(data, straight, tmp_path):  # noqa: F811
    out = copy(straight, tmp_path / "out")
    (out / "log.jsonl").unlink()
    train.main(config(data, out, "--steps", "8", "--save_every", "2", "--keep", "4", "--resume", "auto"))
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(out).values(), strict=True))


def test_a_full_disk_leaves_the_earlier_checkpoints(small, tmp_path):
    """The system refuses files of more than 100 kB, as a full disk would."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(*small, 1)
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        checkpoints.save(*small, 2)
        with pytest.raises(OSError, match="step_000002 could not be written.*untouched.*--resume auto"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest(tmp_path) == (tmp_path / "step_000001", [])
    checkpoints.save(*small, 3)                                            # there is room again
    checkpoints.wait()
    assert newest(tmp_path)[0].name == "step_000003"


def test_a_full_disk_at_the_end_is_said_in_one_line(small, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=f"{tmp_path}/model: could not be written .*: make room"):
            save_model(small[0], small[1], tmp_path / "model")
        fast = tiny.tokenizer("chatml")
        fast.add_tokens([f"<{n}>" for n in range(2_000)])                      # its file is larger than that, and tokenizers raises a bare Exception
        with pytest.raises(OSError, match="step_000001: could not be written .*: make room"):
            Checkpoints(tmp_path / "checkpoints").save(small[0], fast, small[2], 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_of_another_model_is_refused(small, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(*small, 1)
    checkpoints.wait()
    for change in ({"num_hidden_layers": 2}, {"num_hidden_layers": 4}, {"intermediate_size": 96}):
        sizes = AutoConfig.from_pretrained(tmp_path / "step_000001").to_dict() | change
        other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes | {"layer_types": None}))
        with pytest.raises(ValueError, match="is of another model: model.layers"):
            load_checkpoint(tmp_path / "step_000001", other)


def test_buffers_that_belong_to_the_weights_are_exported_too(small, tmp_path, monkeypatch):
    """A mixture of experts keeps its router's corrections in one: from the config alone it would come back as zeros."""
    model = AutoModelForCausalLM.from_config(Glm4MoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1, n_group=1, topk_group=1)).eval()
    name, buffer = next((n, b) for n, b in model.named_buffers() if "correction" in n)
    buffer.copy_(torch.tensor([5.0, 0.0, 0.0, 4.0]))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(model, small[1], torch.optim.AdamW(model.parameters()), 1)
    checkpoints.wait()
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", str(tmp_path / "checkpoints/step_000001"), "--out", str(tmp_path / "model")])
    checkpoint.main()
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), torch.arange(20)[None]
    assert torch.equal(dict(again.named_buffers())[name], buffer)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_gap_in_the_log_is_said(tmp_path, capsys):
    for steps, lacks in (((1, 2, 3, 4), 0), ((1, 2), 1), ((1, 2, 4), 0), ((), 3)):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
        cut_logs(tmp_path, at := 3 if 3 in steps or lacks else 2)
        assert (f"lacks {lacks} of the 3 steps" in (said := capsys.readouterr().err)) == bool(lacks)
        again = sum(step > at for step in steps)
        assert (f"note: {again} logged step after step {at}, the newest checkpoint's, will be made again\n" in said) == bool(again)
        assert said.count("\n") == bool(lacks) + bool(again)


def test_a_folder_that_cannot_be_written_ends_the_run(data, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        train.main(config(data, tmp_path / "file" / "out", "--steps", "1"))
    assert (tmp_path / "file").read_text() == "mine"

# ------------------------------------------------------------------------------------------------ killed


DRIVER = '''
import json, os, random, signal, sys, threading, time
from pathlib import Path
import checkpoint, parallel, rollout, train, update
flags, moments, seed, least = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
def die_in(module, name, nth, after):
    """SIGKILL in the nth call of a function, before or after its work."""
    real, calls = getattr(module, name), [0]
    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == nth and not after:
            die()
        result = real(*args, **kwargs)
        if calls[0] == nth:
            die()
        return result
    setattr(module, name, wrapped)
PLACES = {"sampling": lambda: die_in(rollout, "decode", 2, True), "scoring": lambda: die_in(train, "score", 1, False),
          "backward": lambda: die_in(update, "apply_gradient", 1, False),
          "after the update": lambda: die_in(train, "update", 2, True), "between the two logs": lambda: die_in(train, "append_jsonl", 3, True),
          "while shards are written": lambda: die_in(checkpoint.HuggingFaceStorageWriter, "write_data", 1, True),
          "before the manifest": lambda: die_in(checkpoint, "manifest", 1, False),
          "before the rename": lambda: die_in(checkpoint, "manifest", 1, True), "while old ones are removed": lambda: die_in(checkpoint, "spare", 1, True),
          "at the end": lambda: die_in(train, "save_model", 1, False)}
rng, killed, done = random.Random(seed), 0, False
while not done:
    moment = moments.pop(0) if moments else "random" if killed < least else "never"
    if not (child := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if moment == "random":
            threading.Timer(rng.uniform(0.0, 1.5), die).start()
        elif moment != "never":
            PLACES[moment]()
        train.main(train.parse_config(flags))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    killed += os.WIFSIGNALED(status)
    done = status == 0
    if not done and not os.WIFSIGNALED(status):
        sys.exit(f"a resumed run failed in {moment!r}: {status}")
    print(moment, "killed" if os.WIFSIGNALED(status) else "ended", flush=True)
'''
MOMENTS = ["sampling", "scoring", "backward", "after the update", "between the two logs", "while shards are written",
           "before the manifest", "before the rename", "while old ones are removed", "at the end"]


def killed_run(data, out, moments, seed, least):  # noqa: F811
    flags = [*train_flags(data, out), "--resume", "auto"]
    command = [sys.executable, "-c", DRIVER, json.dumps(flags), json.dumps(moments), str(seed), str(least)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.count("killed")


def train_flags(data, out):  # noqa: F811
    from test_train import SMALL
    return [*SMALL, "--data", str(data), "--out", str(out), "--steps", "8", "--save_every", "2", "--keep", "4"]


def same_run(a, b):
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert lines(a) == lines(b) and [row["step"] for row in lines(b)] == list(range(1, 9))
    assert (a / "rollouts.jsonl").read_text() == (b / "rollouts.jsonl").read_text()


def test_a_run_killed_at_ten_moments_ends_as_the_straight_one(data, straight, tmp_path):  # noqa: F811
    """In sampling, scoring and backward, between the two log files, and at every stage of a checkpoint's making: SIGKILL, resumed each time."""
    assert killed_run(data, tmp_path / "out", MOMENTS, 1, 0) == len(MOMENTS) == 10
    same_run(straight, tmp_path / "out")


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_the_straight_one(data, straight, tmp_path):  # noqa: F811
    """Run after run, each killed and resumed until it is through, until there were 30 kills in all."""
    kills, runs = 0, 0
    while kills < 30:
        kills, runs = kills + killed_run(data, tmp_path / str(runs), [], runs, 12), runs + 1
        same_run(straight, tmp_path / str(runs - 1))
    print(f"{kills} kills in {runs} runs")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_before_leaving(data, straight, tmp_path, number):  # noqa: F811
    out = tmp_path / "out"
    flags = [f if f != "2" or i < 1 else "100" for i, f in enumerate(train_flags(data, out))]        # no checkpoint would come by itself
    process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    seen = 0
    while seen < 2:
        seen += process.stdout.readline().startswith("step ")
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and "stopped after step" in said and "Traceback" not in said
    kept, = (out / "checkpoints").iterdir()
    assert damage(kept) == "" and int(kept.name[5:]) == len(lines(out)) >= 2
    train.main(config(data, out, "--steps", "8", "--save_every", "2", "--keep", "4", "--resume", "auto"))
    same_run(straight, out)


def test_a_signal_while_the_last_checkpoint_is_written_loses_nothing(data, tmp_path, monkeypatch):  # noqa: F811
    def slow(folder, real=checkpoint.manifest):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        return real(folder)
    monkeypatch.setattr(checkpoint, "manifest", slow)
    flags = ("--steps", "2", "--save_every", "0", "--resume", "auto")
    with pytest.raises(Leave, match="SIGTERM: stopped after step 2; go on with --resume auto"):
        train.main(config(data, tmp_path, *flags))
    monkeypatch.undo()
    assert newest(tmp_path / "checkpoints") == (tmp_path / "checkpoints/step_000002", []) and not (tmp_path / "model").exists()
    train.main(config(data, tmp_path, *flags))
    assert len(lines(tmp_path)) == 2 and weights(tmp_path)


def test_threads_of_a_finished_run_do_not_keep_the_process(small, tmp_path):
    started = time.time()
    checkpoints = Checkpoints(Path(tmp_path))
    checkpoints.save(*small, 1)
    checkpoints.wait()
    assert checkpoints.pending is None and time.time() - started < 60
