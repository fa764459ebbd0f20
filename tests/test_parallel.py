"""Several processes: the same update whatever their number, bfloat16 with float32 masters, offloading, and a process that fails or hangs ends the job with its name."""
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import one_thread  # noqa: F401
from test_train import ROOT, SMALL, config, data, lines, weights  # noqa: F401

import parallel
import train
import update

STEPS = ["--steps", "3", "--beta", "0.01", "--w_format", "0.5"]


def torchrun(processes, script, *flags, timeout=300, launcher=()):
    """A job of several processes; -> (status, stdout and stderr, seconds)."""
    started = time.time()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0",
               *launcher, str(script), *flags]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}                    # a machine may have fewer cards than processes
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True)
    try:
        said, _ = job.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):               # where the time was up its processes would go on
            os.killpg(job.pid, signal.SIGKILL)
    return job.returncode, said, time.time() - started


def test_a_process_without_a_card_of_its_own_has_none(monkeypatch):
    """Two processes, one card: the second may work on the CPU; a card that is named becomes the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for number, name in ((0, "cpu"), (0, "cuda"), (0, "cuda:0"), (1, "cpu")):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        parallel.use_device(name)
    assert current == ["cuda:0"]
    with pytest.raises(ValueError, match="--device cuda: not on this machine, choose one of: cpu, cuda:0, or start fewer processes"):
        parallel.use_device("cuda")


def test_processes_that_something_else_has_numbered_are_refused(monkeypatch):
    """A scheduler that sets RANK and no LOCAL_RANK: which card is whose is not known, and one process alone is not what was asked for."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="start the processes with torchrun, or unset RANK"):
        parallel.start()
    assert not parallel.dist.is_initialized()


@pytest.mark.parametrize("flags, place", [((), "cuda"), (("--dtype", "bfloat16"), "cpu"), (("--offload", "True"), "cpu")])
def test_what_is_sharded_is_loaded_beside_the_card_one_model_after_the_other(data, tmp_path, monkeypatch, flags, place):  # noqa: F811
    """A card need not hold a whole float32 model, nor two at once: shard moves each there by itself. One process in float32 loads straight onto its card."""
    seen, load_model = [], train.load_model
    for module in (train, update):
        monkeypatch.setattr(module, "load_model", lambda path, device, dtype: seen.append(("load", device, dtype)) or load_model(path, "cpu", dtype))
    monkeypatch.setattr(parallel, "use_device", lambda device: seen.append(("use", device)))
    monkeypatch.setattr(parallel, "shard", lambda net, dtype, offload, device: seen.append(("shard", device, dtype, offload)) or net)
    run = train.set_up(config(data, tmp_path, *STEPS, "--device", "cuda", "--teacher", "toy/student", "--structure_reward", "reward:line_similarity", *flags), tmp_path)
    c = run.config
    models = [[("load", place, dtype)] + [("shard", "cuda", c.dtype, c.offload)] * (place == "cpu") for dtype in ("float32", c.dtype, c.dtype)]
    assert seen == [("use", "cuda"), *sum(models, [])] and run.optimizer.defaults["lr"] == c.lr and run.optimizer.defaults["betas"] == (0.9, c.adam_beta2)


def furthest(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.fixture(scope="module")
def alone(one_thread, data, tmp_path_factory):  # noqa: F811
    """Three steps of one process, all rows in one micro-batch."""
    out = tmp_path_factory.mktemp("alone")
    train.main(config(data, out, *STEPS, "--max_tokens", "100000"))
    return out


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_three_steps_do_not_depend_on_the_micro_batch(data, alone, tmp_path, rows):  # noqa: F811
    train.main(config(data, tmp_path, *STEPS, "--max_tokens", str(1 if rows == 1 else 110 * rows)))     # a row here has some 100 tokens
    assert furthest(alone, tmp_path) < 1e-5


def test_three_steps_do_not_depend_on_the_number_of_processes(data, alone, tmp_path):  # noqa: F811
    """Three processes share four problems, so their micro-batches differ in number: a forward left out would hang. (Two: tests/test_distill.py.)"""
    code, said, _ = torchrun(3, "train.py", *SMALL, *STEPS, "--data", str(data), "--out", str(tmp_path), "--max_tokens", "220")
    assert code == 0, said[-3000:]
    assert furthest(alone, tmp_path) < 1e-5
    for one, other in zip(lines(alone), lines(tmp_path), strict=True):
        assert all(one[k] == other[k] for k in ("reward", "num_tokens", "frac_reward_zero_std")) and one["kl"] == pytest.approx(other["kl"], abs=1e-6)
    counted = [[json.loads(line)["time/gsrm/decompositions"] for line in (out / "log.jsonl").read_text().splitlines()] for out in (alone, tmp_path)]
    assert counted[0] == counted[1] and min(counted[0]) >= 16                                           # of all processes
    assert sorted((alone / "rollouts.jsonl").read_text().splitlines()) == sorted((tmp_path / "rollouts.jsonl").read_text().splitlines())
    train.main(config(data, alone.parent / "four", *STEPS[2:], "--steps", "4"))
    train.main(config(data, tmp_path, *STEPS[2:], "--steps", "4", "--resume", "auto"))                   # one process goes on from the shards of three
    assert furthest(alone.parent / "four", tmp_path) < 1e-5 and [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4]


SAMPLING = """
import torch, parallel
from data import load_model
from rollout import Sampler
parallel.start()
prompts = [[5, 6, 7], [9, 10], [11] * 7]
for dtype in ("float32", "bfloat16"):
    model, whole = (load_model("toy/student", "cpu")[0] for _ in range(2))
    sampler = Sampler(model, {1, 2}, 0)
    parallel.shard(model, dtype)
    assert not list(model.bare.parameters()) and len(list(model.bare.buffers())) == len(list(model.buffers()))        # no weights of its own
    for step in range(2):
        plain = load_model("toy/student", "cpu", dtype)[0]
        plain.load_state_dict(whole.state_dict())
        for sampler.static in (False, True):
            with parallel.gathered(model) as sampler.model:
                weights = dict(sampler.model.named_parameters())
                assert weights.keys() == dict(plain.named_parameters()).keys() and all(torch.equal(w, p) for w, p in zip(weights.values(), plain.parameters()))
                places = [w.data_ptr() for w in weights.values()]
                got = sampler.generate(prompts, 4, 10 + 30 * parallel.rank(), 1.0, seed=step)        # one process has more steps to go than the other
                assert places == [w.data_ptr() for w in sampler.model.parameters()]
                assert not any(m._forward_pre_hooks or m._forward_hooks for m in sampler.model.modules())
            want = Sampler(plain, {1, 2}, 0, static=sampler.static).generate(prompts, 4, 10 + 30 * parallel.rank(), 1.0, seed=step)
            assert torch.equal(got.tokens, want.tokens) and torch.equal(got.logp, want.logp) and torch.equal(got.entropy, want.entropy)
            assert not list(sampler.model.parameters()) and all("DTensor" in type(p.data).__name__ for p in model.parameters())        # and back in shards
        with torch.no_grad():                                                   # an optimiser's step
            for net in (model, whole):
                for p in net.parameters():
                    p.mul_(1.1)
try:
    with parallel.gathered(model) as net:
        raise KeyboardInterrupt
except KeyboardInterrupt:
    assert not list(net.parameters()) and all("DTensor" in type(p.data).__name__ for p in model.parameters())
assert model.state_dict().keys() == whole.state_dict().keys()
print("the same")
parallel.finish()
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_sampling_from_shards_is_sampling_from_the_whole_model(tmp_path, processes):
    """Bitwise, in the dtype of computing, after steps too; the weights stay in their places for the call, as CUDA graphs want it."""
    if processes == 1:
        exec(compile(SAMPLING, "sampling.py", "exec"), {})
        return
    (tmp_path / "sampling.py").write_text(SAMPLING)
    code, said, _ = torchrun(processes, tmp_path / "sampling.py")
    assert code == 0 and said.count("the same") == processes, said[-3000:]


def test_a_step_on_float32_masters_samples_by_the_loop_for_graphs(data, tmp_path):  # noqa: F811
    """As the presets for GPUs do: what was sampled in bfloat16, in fixed places, has the log-probs of the trainer's sharded forward."""
    try:
        run = train.set_up(config(data, tmp_path, "--dtype", "bfloat16", "--beta", "0.01"), tmp_path)
        run.sampler.static = True                                                           # a GPU's default
        metrics = train.step_once(run, 0)[0]
        assert run.sampler.model is run.model.bare and run.sampler.static and metrics["skipped_step"] == 0
        assert 0 < metrics["sampling/sampling_logp_difference/mean"] < 0.02
    finally:
        parallel.finish()


def job(tmp_path, text):
    """A script that changes train.py in one place and runs it."""
    script = tmp_path / "job.py"
    script.write_text("import os, sys, time, torch\nimport train, parallel, update\nreal = train.score\nparallel.start()\nme = parallel.rank()\n" + text +
                      "\ntrain.main(train.parse_config())\nparallel.finish()\n")
    return script


def test_a_gradient_that_is_not_finite_on_one_process_skips_the_step_on_all(data, tmp_path):  # noqa: F811
    """In two jobs' time: also resumed by torchrun after a process has died in step 3 (--max_restarts), with the steps before it from the checkpoint; and in the last step
    the optimiser breaks a weight of that process's shard, so that both go back to the checkpoint before."""
    script = job(tmp_path, """
calls, loss, mark = [0], update.linear_policy_loss, sys.argv[0] + ".died"
def score(*args):
    calls[0] += 1
    if calls[0] == 3 and me == 1 and not os.path.exists(mark):
        open(mark, "w").close()
        raise RuntimeError("the second process has an accident")
    return real(*args)
def spoiled(*args):
    value, *rest = loss(*args)
    return (value * float("nan") if calls[0] == 2 and me == 1 and not os.path.exists(mark) else value, *rest)
step = torch.optim.AdamW.step
def breaks(self, *args):
    step(self, *args)
    if calls[0] == 3 and me == 1 and os.path.exists(mark):
        self.param_groups[0]["params"][-1].data.to_local().view(-1)[0] = float("inf")
train.score, update.linear_policy_loss, torch.optim.AdamW.step = score, spoiled, breaks
""")
    code, said, _ = torchrun(2, script, *SMALL, "--steps", "4", "--data", str(data), "--out", str(tmp_path / "out"), "--save_every", "1",
                             "--resume", "auto", launcher=("--max_restarts", "1"))
    assert code == 0 and "the second process has an accident" in said, said[-3000:]
    log = lines(tmp_path / "out")
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert [(row["nonfinite"], row["nonfinite_weights"]) for row in log] == [(0, 0), (0, 0), (0, 0), (1, 1)]
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "out").values())
    faults = sorted((tmp_path / "out" / "faults").iterdir())
    assert [f.name for f in faults] == ["step_000002.json", "step_000004.json"] and len(json.loads(faults[0].read_text())["rollouts"]) == 16


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_ends_the_job(data, tmp_path):  # noqa: F811
    script = job(tmp_path, "def score(*args):\n    time.sleep(300 if me == 1 else 0)\n    return real(*args)\ntrain.score = score\n")
    code, said, seconds = torchrun(2, script, *SMALL, "--steps", "2", "--data", str(data), "--out", str(tmp_path / "out"), "--reward_timeout", "2")
    assert code != 0 and seconds < 120
    assert "after scoring step 1" in said and "ank 1" in said and "--reward_timeout" in said, said[-3000:]


@pytest.mark.parametrize("flags, near", [(("--offload", "True"), 1e-6), (("--dtype", "bfloat16"), 2e-3), (("--gradient_checkpointing", "True"), 1e-7)])
def test_other_ways_to_hold_the_model_make_the_same_step(data, tmp_path, flags, near):  # noqa: F811
    """One process, SGD-like distance after one AdamW step of 5e-4: bfloat16 samples other tokens now and then, its masters move all the same, in float32."""
    train.main(config(data, tmp_path / "a", "--steps", "1", "--beta", "0.01"))
    try:
        train.main(config(data, tmp_path / "b", "--steps", "1", "--beta", "0.01", *flags))
    finally:
        parallel.finish()
    assert furthest(tmp_path / "a", tmp_path / "b") < near
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "b").values())
    if "bfloat16" in flags:
        assert lines(tmp_path / "b")[0]["sampling/sampling_logp_difference/mean"] < 0.02
        start = load_file(ROOT / "toy/student/model.safetensors")
        moved = [torch.cat([(w - start[name]).flatten() for name, w in weights(tmp_path / out).items()]) for out in "ab"]
        assert (moved[0].sign() == moved[1].sign()).float().mean() > 0.6 and moved[1].abs().max() < 1e-4       # 0.76 here; 0.5 by chance; below the masters' rounding


def test_rows_of_one_process_are_the_rows():
    assert parallel.gather_rows([{"a": 1}]) == [{"a": 1}] and parallel.all_max(3) == 3 and parallel.world() == 1 and parallel.rank() == 0
    assert torch.equal(parallel.all_sum(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
    parallel.meet("nothing", 0.0)
