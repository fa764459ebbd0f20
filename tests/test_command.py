"""One writer at a time: a second process with the same --out ends with one line, the first goes on, and nothing is left beside what it wrote."""
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from test_bad_input import ROOT, command

from command import read_record, write_record, writing
from data import write_jsonl
from toy import make_problems

HOLD = "import sys, time\nfrom command import writing\nwith writing(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(300)"


@contextmanager
def held(path):
    """Another process that writes `path`, until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout.readline() == "held\n"
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)


@pytest.mark.parametrize("kind", ["folder", "file", "no file yet"])
def test_one_process_writes_at_a_time(tmp_path, kind):
    """Refused while the other lives, not when it was killed; the same process may write again, and is kept out while it writes."""
    path = tmp_path / "out"
    path.mkdir() if kind == "folder" else path.write_text("mine") if kind == "file" else None
    before = sorted(tmp_path.iterdir())
    with held(path):
        with pytest.raises(ValueError, match=f"another process is writing {path}: wait for it, or choose another --out"), writing(path):
            pass
        with writing(path, mine=False) as same, writing(tmp_path / "other"):
            assert same == path
    for _ in range(2):
        with writing(path) as same, pytest.raises(ValueError, match="another process is writing"), writing(path):
            pass
        assert same == path and sorted(tmp_path.iterdir()) == before


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    """The system refuses files of more than 100 bytes, as a full disk would."""
    write_record(tmp_path / "run.json", {"steps": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError):
            write_record(tmp_path / "run.json", {"steps": 2, "data": "x" * 200})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_record(tmp_path / "run.json") == {"steps": 1}
    write_record(tmp_path / "run.json", {"steps": 2, "data": "x" * 200})
    assert read_record(tmp_path / "run.json", "data")["steps"] == 2 and [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_field_that_stands_twice_in_a_record_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"a": {"steps": 1, "steps": 2}}')
    with pytest.raises(ValueError, match=r"run.json: not valid JSON \(the field 'steps' stands there twice\)"):
        read_record(tmp_path / "run.json")


def test_a_lock_on_a_file_that_its_owner_has_just_removed_is_taken_anew(tmp_path, monkeypatch):
    import fcntl
    place, real, calls = tmp_path / ".rows.lock", fcntl.flock, []

    def late(*how):
        calls.append(how)
        if len(calls) == 1:
            place.unlink()                                                 # between open and flock
        real(*how)
    monkeypatch.setattr(fcntl, "flock", late)
    with writing(tmp_path / "rows"):
        assert place.exists() and len(calls) == 2


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def none(*how):
        raise OSError(37, "No locks available")
    monkeypatch.setattr("fcntl.flock", none)
    with writing(tmp_path):
        pass
    assert f"{tmp_path}: cannot be locked (No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize("line, out", [
    ("train.py --data {w}/train.jsonl --gsrm toy:read --steps 1 --eval_problems 0 --out {w}/out", "out/"),
    ("sft.py --model toy/student --data {w}/train.jsonl --out {w}/out", "out/"),
    ("eval.py --model toy/student --data {w}/train.jsonl --limit 1 --k 1 --max_new_tokens 4 --out {w}/rows.jsonl", "rows.jsonl"),
    ("eval.py rescore {w}/rows.jsonl", "rows.jsonl"),
    ("study.py --arms base --seeds 0 --regimes sparse --results {w}/study.jsonl --out {w}/out", "out/"),
    ("study.py --arms base --seeds 0 --regimes sparse --results {w}/study.jsonl --out {w}/out", "study.jsonl"),
    ("gsrm.py annotate {w}/train.jsonl --url http://127.0.0.1:9/v1 --model m --out {w}/pairs.jsonl", "pairs.jsonl"),
], ids=lambda text: text.split(" --")[0])
def test_a_second_command_with_the_same_out_is_refused(tmp_path, monkeypatch, line, out):
    if "annotate" in line:
        monkeypatch.setattr("endpoint.Endpoint", lambda *a, **b: SimpleNamespace(stats=Counter()))             # it would need openai, and is not asked
    write_jsonl(tmp_path / "train.jsonl", [vars(p) for p in make_problems(5, 4, 5, (2, 4))])
    if out.endswith("/"):
        (tmp_path / out).mkdir()
    with held(tmp_path / out):
        before = sorted(tmp_path.rglob("*"))
        status, _, err = command(line.format(w=tmp_path))
        assert status not in (0, None)
        flag = "--results" if out == "study.jsonl" else "--out"
        assert f"error: another process is writing {tmp_path / out}: wait for it, or choose another {flag}" in err and sorted(tmp_path.rglob("*")) == before


def test_a_job_of_two_processes_is_refused_and_ends(tmp_path):
    """Although only its first process knows why. (That the first does not keep the second out is what every other job of two processes in these tests shows.)"""
    write_jsonl(tmp_path / "train.jsonl", [vars(p) for p in make_problems(5, 4, 5, (2, 4))])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "train.py",
                *f"--data {tmp_path}/train.jsonl --gsrm toy:read --steps 1 --eval_problems 0 --problems_per_step 2 --group_size 2 --max_new_tokens 8 --out {tmp_path}/out".split()]
    (tmp_path / "out").mkdir()
    with held(tmp_path / "out"):
        refused = subprocess.run(torchrun, cwd=ROOT, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert refused.returncode and f"another process is writing {tmp_path}/out" in refused.stderr and not list((tmp_path / "out").iterdir())
