"""Bad input to every command: one line on stderr that says what to change, a non-zero exit, no traceback, and nothing on disk has been touched.

The commands run in this process, as `python FILE ...` would run them (runpy): a process of its own for each costs 5 s of imports. A few do run as processes,
to show that this makes no difference.
"""
import contextlib
import hashlib
import io
import json
import logging
import runpy
import shlex
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from checkpoint import Checkpoints
from data import load_tokenizer
from toy import make_problems

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ("train.py --data {w}/problems.jsonl --gsrm toy:read --out {w}/new --steps 1 --problems_per_step 2 --group_size 2 --max_new_tokens 8 --eval_problems 0 --beta 0 --truth '' ")
EVAL = "eval.py --model toy/student --data {w}/problems.jsonl --max_new_tokens 8 --out {w}/new.jsonl "
SFT = "sft.py --model toy/student --data {w}/problems.jsonl --out {w}/new "
CARD = "gsrm.py eval {w}/problems.jsonl --gsrm toy:read "
ANNOTATE = "gsrm.py annotate {w}/problems.jsonl --url http://127.0.0.1:9/v1 --model m --out {w}/new.jsonl "
SHOW = "data.py {w}/problems.jsonl --model toy/student "
CONVERT = "data.py convert gsm8k --input {w}/gsm8k.jsonl --out {w}/new.jsonl "
STEP = "{w}/run/checkpoints/step_000001"
STUDY = "study.py run --arms base --regimes sparse --seeds 0 --jobs 1 --out {w}/study --results {w}/new.jsonl "
TOY = "toy.py problems --people 5 --needed 2 4 --count 2 --out {w}/new.jsonl "
ROLLOUT = "bench.py rollout --model toy --rows 8 --max_new_tokens 4 --rounds 1 "
LOGPROB = "bench.py logprob --shape tiny --rows 8 --rounds 1 "

BAD = [
    (TRAIN + "--stepz 3", "--stepz"),
]


def command(line: str) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a command line of the project, run in this process; any exception but SystemExit comes through: it would be a traceback."""
    file, *words = shlex.split(line)
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv, threads, handlers = sys.argv, torch.get_num_threads(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logs = [handler for handler in logging.getLogger("transformers").handlers if isinstance(handler, logging.StreamHandler)]
    before, sys.argv = [handler.setStream(err) for handler in logs], [file, *words]
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(file, run_name="__main__")
    except SystemExit as end:                            # what the interpreter makes of sys.exit's argument
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        err.write(f"{end.code}\n" if isinstance(end.code, str) else "")
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
        for handler, stream in zip(logs, before):
            handler.setStream(stream)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, out.getvalue(), err.getvalue()


def snapshot(folder: Path) -> dict[str, str]:
    """{file: hash of what it holds} of everything below a folder."""
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*")) if file.is_file()}


def lines(path: Path, *rows: object) -> None:
    """A JSONL file; a text goes in as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")


def tiny(vocabulary: int) -> torch.nn.Module:
    """A model that is not the toy's: another width."""
    return AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                                                        head_dim=8, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None))


@pytest.fixture(scope="module")
def w(tmp_path_factory) -> Path:
    """A folder with what can go wrong, and with one good one of each."""
    w = tmp_path_factory.mktemp("w")
    good = [asdict(p) for p in make_problems(5, 3, 5, (2, 4))]
    a, b, c = good
    lines(w / "problems.jsonl", *good)
    lines(w / "empty.jsonl")
    lines(w / "broken.jsonl", a, '{"id": "b", "problem": ')
    lines(w / "field.jsonl", a, b | {"anser": "4"})
    lines(w / "type.jsonl", a, b | {"answer": 4})
    lines(w / "list.jsonl", a, [1, 2])
    lines(w / "twice.jsonl", a, b, c | {"id": a["id"]})
    lines(w / "bare.jsonl", *({k: v for k, v in p.items() if k != "teachers"} for p in good))
    lines(w / "long.jsonl", a | {"problem": "How many has Ann? " * 600})
    (w / "latin1.jsonl").write_bytes(b'{"id": "\xe9"}\n')
    lines(w / "pairs.jsonl", {"prompt": "a", "target": "b"}, {"prompt": "a", "target": 3})
    lines(w / "gsm8k.jsonl", {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}, {"question": "1 + 2?", "answer": 3})
    lines(w / "kept.jsonl", "this is mine")
    lines(w / "rubbish.py", "numbers = 3", "def text(trace): return 'no steps'", "def nothing(trace): return None", "def nan(trace): return [float('nan')]")
    row = {"id": "a", "sample": 0, "temperature": 1.0, "correct": True, "structure": None, "true_structure": None, "length": 3, "stop": "stop", "text": "x", "steps": None, "left_at": None}
    lines(w / "rows.jsonl", row, row | {"id": "b"})
    lines(w / "others.jsonl", row | {"id": "x"}, row | {"id": "y"})
    lines(w / "uneven.jsonl", row, row | {"sample": 1}, row | {"id": "b"})
    lines(w / "norow.jsonl", row, {"id": "b"})
    lines(w / "study.jsonl", {"regime": "sparse", "arm": "grpo", "seed": 0})
    for name in ("mixed", "cut", "noconfig", "words", "badwords", "nan", "badconfig"):
        shutil.copytree(ROOT / "toy/student", w / name)
    tiny(553).config.save_pretrained(w / "mixed")
    (w / "cut/model.safetensors").write_bytes((w / "cut/model.safetensors").read_bytes()[:1000])
    (w / "noconfig/config.json").unlink()
    (w / "badconfig/config.json").write_text("{")
    spec = json.loads((w / "words/tiktoken.json").read_text())
    (w / "words/tiktoken.json").write_text(json.dumps(spec | {"words": spec["words"] + [f"zz{i}" for i in range(200)]}))
    (w / "badwords/tiktoken.json").write_text("{")
    save_file({k: v * float("nan") for k, v in load_file(w / "nan/model.safetensors").items()}, w / "nan/model.safetensors", {"format": "pt"})
    assert command((TRAIN + "--out {w}/run").format(w=w))[0] == 0
    shutil.copytree(w / "run", w / "foreign")
    shutil.rmtree(w / "foreign/checkpoints/step_000001")
    model, checkpoints = tiny(553), Checkpoints(w / "foreign/checkpoints")
    checkpoints.save(model, load_tokenizer(ROOT / "toy/student"), torch.optim.AdamW(model.parameters()), 1)
    checkpoints.wait()
    shutil.copytree(w / "run", w / "norecord")
    (w / "norecord/run.json").write_text("{")
    shutil.copytree(w / "run/checkpoints/step_000001", w / "damaged")
    (w / "damaged/state.json").write_text("{}")
    return w
