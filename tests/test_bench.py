"""The measuring itself: turns, slow and failing peers, what counts as a token, and that a timed step is train.py's. `python -m pytest tests/test_bench.py`"""
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import bench
import bench_rl
import peers
from rollout import Sampler


def test_turns_are_taken_and_the_slow_and_the_broken_drop_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of our own: ours takes 1 s, another 2, a slow one 50, all of them more in the warm-up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)                 # what is counted is the CPU's, here and below, on any machine
    now, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def peer(name: str, seconds: float, error: type[Exception] | None = None):
        def run() -> list[int]:
            order.append(name)
            now[0] += 3 * seconds if order.count(name) == 1 else seconds
            if error:
                raise error("no such kernel")
            if name == "other":
                torch.zeros(1000) + torch.ones(1000)                               # three thousand floats at once
            return [60, 40]
        return run
    rate, memory, notes = bench_rl.take_turns({"ours": peer("ours", 1), "other": peer("other", 2), "slow": peer("slow", 50), "absent": peer("absent", 0, ImportError),
                                       "broken": peer("broken", 0, RuntimeError)}, 3, 10.0)
    assert rate == {"ours": 100.0, "other": 50.0, "slow": 2.0}                     # the warm-up is no measurement: on a CPU a slow one runs again too
    assert memory == {"ours": 0, "other": 12000, "slow": 0}
    assert notes == {"slow": "one run", "absent": "absent", "broken": "RuntimeError: no such kernel"}
    assert order == ["ours", "other", "slow", "absent", "broken", *["ours", "other", "slow"], *["ours", "other"] * 2]
    with pytest.raises(RuntimeError, match="no such kernel"):                      # ours may not fail
        bench_rl.take_turns({"ours": peer("ours", 0, RuntimeError)}, 1, 10.0)


def test_everyone_samples_the_same_job_and_only_useful_tokens_count() -> None:
    """Equal lengths: all of them; spread: up to and with the stop token. ours, both loops: the same rows."""
    assert peers.up_to_stop([[5, 2, 7, 2], [5, 5], [2]], {2}) == [2, 2, 1]
    equal, spread = (bench_rl.make_job("toy", 16, lengths, 24) for lengths in ("equal", "spread"))
    for run in (peers.sample_ours, peers.sample_hf):
        torch.manual_seed(0)
        assert run(equal) == [24] * 16
        lengths = run(spread)
        assert len(lengths) == 16 and max(lengths) <= 24 and min(lengths) < 12
    assert peers.sample_ours(spread) == peers.sample_ours(spread, static=True) == Sampler(spread.model, spread.stop_ids, 0).generate(spread.prompts, 8, 24, 1.0).lengths.tolist()
    assert len(spread.samplers) == 2 and not any(sampler.unproven for sampler in spread.samplers.values())


def test_the_table_has_all_that_was_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_rl, "limit_seconds", lambda job, lengths: sum(lengths) / 1000)
    bench_rl.bench_rollout(SimpleNamespace(model=["toy"], rows=[8], max_new_tokens=9, rounds=1, patience=60.0, cpu_time=False))
    out = capsys.readouterr().out
    assert "toy: 8 rows of up to 9 tokens, lengths equal (mean 9); limit 1000 tokens/s" in out and "lengths spread (mean" in out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    for name in ("ours", "ours, static", "HF generate", "HF generate, static cache", "HF continuous batching"):
        rows = [row for row in cells if row[0] == name]
        assert len(rows) == 2 and all(float(rate) > 0 and abs(float(share) - float(rate) / 1000) < 0.01 and int(megabytes) >= 0 for _, rate, _, share, megabytes, _ in rows)


def test_on_a_gpu_the_default_is_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.5B and 7B shapes, 64, 256 and 512 rows, equal and spread, 2048 new tokens; everyone takes part."""
    jobs, parts = [], set()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(bench_rl, "make_job", lambda *job: jobs.append(job))
    monkeypatch.setattr(bench_rl, "limit_seconds", lambda job, lengths: 1.0)
    monkeypatch.setattr(peers, "sample_ours", lambda job, static=None: [2048])
    monkeypatch.setattr(bench_rl, "take_turns", lambda runs, rounds, patience: (parts.update(runs), ({"ours": 1.0}, {"ours": 1}, {}))[1])
    monkeypatch.setattr("sys.argv", ["bench.py", "rollout"])
    bench.main()
    assert jobs == [(name, rows, lengths, 2048) for name in ("1.5b", "7b") for rows in (64, 256, 512) for lengths in ("equal", "spread")]
    assert parts == {"ours", "ours, plain loop", "HF generate", "HF generate, static cache", "HF continuous batching", "vLLM"}
    assert bench_rl.MODELS["1.5b"] == (1536, 28, 12, 2, 8960, 151936) and bench_rl.MODELS["7b"] == (3584, 28, 28, 4, 18944, 152064)          # Qwen2.5's


def test_continuous_batching_is_given_the_memory_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its defaults it would take most of what the machine has."""
    job, sizes = bench_rl.make_job("toy", 16, "spread", 24), []
    generate = type(job.model).generate_batch
    monkeypatch.setattr(type(job.model), "generate_batch", lambda self, *args, **kwargs: sizes.append(kwargs["continuous_batching_config"]) or generate(self, *args, **kwargs))
    size, lengths = bench_rl.peak_bytes(partial(peers.sample_hf_continuous, job))
    assert len(lengths) == 16 and min(lengths) < max(lengths) <= 24 and size < 1e8
    assert sizes[0].num_blocks * (getattr(sizes[0], "page_size", None) or sizes[0].block_size) >= 16 * (max(map(len, job.prompts)) + 24)


def test_a_timed_step_is_a_training_step() -> None:
    """Its parts add up to it, all rows have full length where they must, GSRM is asked by RLKD only."""
    ours = bench_rl.Steps(["--device", "cpu", "--w_structure", "0", "--w_format", "0", "--max_new_tokens", "20", "--problems_per_step", "2"], full_length=True)
    m = ours()
    assert m["tokens"] == 2 * 8 * 20 and m["step"] >= m["sampling"] + m["scoring"] + m["update"] > 0.9 * m["step"] > 0
    assert ours.run.gsrm is None and ours.step == 1
    rlkd = bench_rl.Steps(["--device", "cpu", "--max_new_tokens", "60", "--problems_per_step", "1"])
    rlkd.read_teachers(1)
    known = len(rlkd.run.gsrm.cache)
    assert known and rlkd()["tokens"] <= 8 * 60 and len(rlkd.run.gsrm.cache) == known                # the step read no teacher again


def test_without_trl_ours_run_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def absent(*args) -> None:
        raise ImportError("No module named 'trl'")
    monkeypatch.setattr(peers, "trl_steps", absent)
    args = SimpleNamespace(max_new_tokens=12, rounds=1, cpu_time=False)
    monkeypatch.setattr(bench_rl, "Steps", lambda flags, full_length=False, Steps=bench_rl.Steps: Steps([*flags, "--problems_per_step", "1"], full_length))
    bench_rl.bench_step(args)
    out = capsys.readouterr().out
    assert out.count("no TRL here") == 2 and out.count("| ours, outcome only |") == 2 and out.count("| ours, RLKD with GSRM |") == 1 and "TRL, outcome" not in out
    assert "8 rows, all rows 12 tokens" in out and "GSRM's share of the RLKD step: 0." in out


def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench.py", "step", "--max_new_tokens", "0", "--rounds", "1"])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code and "max_new_tokens" in capsys.readouterr().err
