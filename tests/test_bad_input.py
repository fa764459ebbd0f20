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
import subprocess
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
TRAIN = ("train.py --data {w}/problems.jsonl --gsrm toy:read --out {w}/new --steps 1 --problems_per_step 2 --group_size 2 --max_new_tokens 8 "
         "--eval_problems 0 --beta 0 --truth '' ")
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

BAD = [   # command line, what its one line has to say
    # ---- train.py
    (TRAIN + "--stepz 3", "unrecognized arguments: --stepz 3"),
    (TRAIN + "--preset huge", "--preset huge: choose one of"),
    (TRAIN + "--preset none", "--model is needed"),
    (TRAIN + "--model toy", "toy: no config.json in this folder; give the folder that save_pretrained wrote"),
    (TRAIN + "--lr fast", "--lr: 'fast' is not a finite number in (0, inf)"),
    (TRAIN + "--lr nan", "--lr: 'nan' is not a finite number in (0, inf)"),
    (TRAIN + "--group_size 1", "'1' is not a whole number of 2 or more (G, completions per problem; one alone has nothing to be compared with)"),
    (TRAIN + "--max_new_tokens 0", "--max_new_tokens/--max-new-tokens: '0' is not a whole number of 1 or more"),
    (TRAIN + "--limit -1", "--limit: '-1' is not a whole number of 0 or more"),
    (TRAIN + "--eval_problems -3", "'-3' is not a whole number of 0 or more"),
    (TRAIN + "--seed -1", "--seed: '-1' is not a whole number in [0, "),
    (TRAIN + "--clip_low 2", "--clip_low/--clip-low: '2' is not a finite number in [0, 1)"),
    (TRAIN + "--w_outcome nan", "--w_outcome/--w-outcome: 'nan' is not a finite number (weight of"),
    (TRAIN + "--w_structure 0 --w_outcome 0 --w_format 0", "at least one reward needs a weight other than 0"),
    (TRAIN + "--scale variance", "--scale: invalid choice: 'variance'"),
    (TRAIN + "--temperature 0", "'0' is not a finite number in (0, inf) (of sampling, which RL needs"),
    (TRAIN + "--top_p 0.9", "'0.9' is not a finite number in [1, 1] (1, the whole distribution"),
    (TRAIN + "--gsrm ''", "give one, or --w_structure 0"),
    (TRAIN + "--gsrm toy:nothing", "give module:function, for example toy:read"),
    (TRAIN + "--gsrm rubbish:text", "rubbish:text gave 'no steps' for the trace '': it has to return a list of gsrm.Step"),
    (TRAIN + "--gsrm rubbish:nan", "rubbish:nan gave '[nan]'"),
    (TRAIN + "--gsrm http://127.0.0.1:9/v1", "write it behind a #, as in http://127.0.0.1:9/v1#"),
    (TRAIN + "--judge toy/judge", "--judge toy/judge: the steps of a rule (toy:read) are compared word by word; leave it out"),
    (TRAIN + "--judge {w}/nowhere --w_structure 0 --gsrm ''", "nowhere: there are no steps for it to judge; give a --gsrm"),
    (TRAIN + "--judge {w}/nowhere --structure_reward reward:line_similarity", "nowhere: there are no steps for it to judge; give a --gsrm"),
    (TRAIN + "--gsrm {w}/badjudge", "gsrm.json: expected a JSON object with the field 'judge'"),
    (TRAIN + "--truth rubbish:nothing", "rubbish:nothing gave 'None'"),
    (TRAIN + "--model {w}/nowhere", "nowhere: there is no such folder"),
    (TRAIN + "--model {w}/mixed", "so this is no checkpoint of a Qwen3ForCausalLM"),
    (TRAIN + "--model {w}/cut", "cut: cannot be loaded; save or copy it again"),
    (TRAIN + "--model {w}/nan", "holds numbers that are not finite"),
    (TRAIN + "--model {w}/words", "they do not belong together"),
    (TRAIN + f"--model {STEP}", "is a training checkpoint: `python checkpoint.py"),
    (EVAL.replace("toy/student", STEP), "is a training checkpoint: `python checkpoint.py"),
    (TRAIN + "--model {w}/problems.jsonl", "is a file; give the folder that save_pretrained wrote"),
    (TRAIN + "--data {w}/nowhere.jsonl", "give a JSONL file, or a folder that holds train.jsonl"),
    (TRAIN + "--data {w}/empty.jsonl", "empty.jsonl: holds no problems"),
    (TRAIN + "--data {w}/broken.jsonl", "broken.jsonl:2: not valid JSON"),
    (TRAIN + "--data {w}/field.jsonl", "field.jsonl:2: unknown field 'anser'"),
    (TRAIN + "--data {w}/type.jsonl", "type.jsonl:2: field 'answer' must be a non-empty string, got 4"),
    (TRAIN + "--data {w}/twice.jsonl", "twice.jsonl:3: id"),
    (TRAIN + "--data {w}/bare.jsonl", "drop them, or use --w_structure 0"),
    (TRAIN + "--data {w}/long.jsonl", "passes the model's 1024 positions: lower --max_new_tokens, or drop the problem"),
    (TRAIN + "--eval_data {w}/long.jsonl --eval_problems 1", "passes the model's 1024 positions"),
    (TRAIN + "--device warp", "--device warp: not on this machine, choose one of: cpu"),
    (TRAIN + "--device cuda:99", "--device cuda:99: not on this machine"),
    (TRAIN + "--resume last", "--resume: invalid choice: 'last'"),
    (TRAIN + "--out {w}/kept.jsonl/out", "kept.jsonl/out: Not a directory: choose another path"),
    (TRAIN + "--out {w}/run", "already holds a run: choose another --out, or go on with --resume auto"),
    (TRAIN + "--out {w}/run --resume auto --lr 1", "--lr was 0.0003, is 1.0; go on with the same settings, or choose another --out"),
    (TRAIN + "--out {w}/foreign --resume auto --steps 3", "step_000001 is of another model: model.embed_tokens.weight is (553, 16) there and (553, 64) here"),
    (TRAIN + "--out {w}/norecord --resume auto", "run.json: not valid JSON"),
    # ---- sft.py
    (SFT + "--modell x", "unrecognized arguments: --modell x"),
    (SFT + "--epochs inf", "--epochs: 'inf' is not a finite number in (0, inf)"),
    (SFT + "--batch_size 0", "'0' is not a whole number of 1 or more (pairs per optimiser step)"),
    (SFT + "--limit -1", "--limit: '-1' is not a whole number of 0 or more"),
    (SFT + "--seed -1", "--seed: '-1' is not a whole number in [0, "),
    (SFT + "--keep all", "--keep: invalid choice: 'all'"),
    (SFT + "--warmup 1.5", "--warmup: '1.5' is not a finite number in [0, 1]"),
    (SFT + "--keep best", "add --eval_data FILE, or --eval_share 0.05"),
    (SFT + "--eval_share 0.1 --eval_data toy", "--eval_share 0.1: not --eval_data too"),
    (SFT + "--task gsrm", "`python gsrm.py annotate` makes them from problems"),
    (SFT + "--data {w}/pairs.jsonl", "pairs.jsonl:2: expected the two strings 'prompt' and 'target'"),
    (SFT + "--eval_data {w}/judged.jsonl", "problems.jsonl holds problems, --eval_data {w}/judged.jsonl prompt/target pairs: give held-out data of the same kind"),
    (SFT + "--data {w}/judged.jsonl --eval_data {w}/problems.jsonl", "judged.jsonl holds prompt/target pairs, --eval_data {w}/problems.jsonl problems: give held-out"),
    (SFT + "--data {w}/long.jsonl", "pairs are too long: a longer --max_length helps, or a model of more positions"),
    (SFT + "--data {w}/bare.jsonl", "no problem has a teacher trace, so there is nothing to imitate"),
    (SFT + "--model {w}/mixed", "so this is no checkpoint of a Qwen3ForCausalLM"),
    (SFT + "--dry_run --data {w}/nowhere.jsonl", "no problems at {w}/nowhere.jsonl: give a JSONL file"),
    (SFT + "--dry_run --model Qwen/Qwen2.5-7B-Instruct --eval_data {w}/nowhere.jsonl", "no problems at {w}/nowhere.jsonl: give a JSONL file"),
    (SFT + "--device warp", "--device warp: not on this machine"),
    (SFT + "--out {w}/kept.jsonl/out", "kept.jsonl/out: Not a directory: choose another path"),
    (SFT + "--out toy/student", "a folder, another one than --model"),
    (SFT + "--out {w}/run", "holds a checkpoint or a run already: choose another --out"),
    (SFT + "--out {w}/run/model", "holds a checkpoint or a run already: choose another --out"),
    # ---- eval.py and its subcommands
    ("eval.py", "the following arguments are required: --model, --data"),
    ("eval.py comapre a b", "invalid choice: 'comapre' (choose from"),
    (EVAL + "--kk 3", "unrecognized arguments: --kk 3"),
    (EVAL + "--k 0", "--k: '0' is not a whole number of 1 or more (samples per problem)"),
    (EVAL + "--top_p 1.5", "--top_p/--top-p: '1.5' is not a finite number in (0, 1]"),
    (EVAL + "--temperature nan", "--temperature: 'nan' is not a finite number of 0 or more"),
    (EVAL + "--limit -1", "--limit: '-1' is not a whole number of 0 or more"),
    (EVAL + "--dtype int8", "--dtype: invalid choice: 'int8'"),
    (EVAL + "--device warp", "--device warp: not on this machine"),
    (EVAL + "--model {w}/nan", "holds numbers that are not finite"),
    (EVAL + "--data {w}/long.jsonl", "nothing can be sampled"),
    (EVAL + "--data {w}/latin1.jsonl", "latin1.jsonl:1: not valid JSON"),
    (EVAL + "--gsrm {w}/nowhere", "nowhere: there is no such folder"),
    (TRAIN + "--gsrm {w}/nowhere", "nowhere: there is no such folder"),
    (TRAIN + "--teacher {w}/nowhere", "nowhere: there is no such folder"),
    (EVAL + "--gsrm toy/gsrm --gsrm_max_new_tokens 0", "'0' is not a whole number of 1 or more (budget of a written structure)"),
    (EVAL + "--judge toy/judge", "give --gsrm too, or leave it out"),
    (EVAL + "--truth rubbish:text", "it has to return a list of gsrm.Step"),
    (EVAL + "--out {w}/rows.jsonl", "without a record of its settings (rows.settings.json): choose another --out"),
    (EVAL + "--out {w}/norecord.jsonl", "norecord.settings.json: not valid JSON"),
    (EVAL + "--out {w}/kept.jsonl/out.jsonl", "kept.jsonl: File exists: choose another path"),
    ("eval.py rescore {w}/nowhere.jsonl", "give a file that eval.py wrote (--out)"),
    ("eval.py rescore {w}/norow.jsonl", "norow.jsonl:2: not a generation, it has no 'sample'"),
    ("eval.py rescore {w}/rows.jsonl", "generation 1 has no gold answer"),
    ("eval.py compare {w}/rows.jsonl", "the following arguments are required: b"),
    ("eval.py compare {w}/rows.jsonl {w}/others.jsonl", "share no problem id"),
    ("eval.py compare {w}/rows.jsonl {w}/uneven.jsonl", "problem b has 1 samples, others have 2"),
    ("eval.py show {w}/run --step 99", "no step 99; it holds steps 1 to 1"),
    ("eval.py show {w}/latin1.jsonl", "latin1.jsonl:1: not valid JSON"),
    ("eval.py plot {w}/nowhere", "give the folder that train.py wrote (--out)"),
    ("eval.py plot {w}/run --out {w}/run", "--out: {w}/run is a folder: name a file for the picture, such as {w}/run/curve.png"),
    ("eval.py compare {w}/rows.jsonl {w}/rows.jsonl --plot {w}/run", "--plot: {w}/run is a folder: name a file"),
    ("eval.py plot {w}/run --out {w}/kept.jsonl/x.png", "kept.jsonl/x.png: Not a directory: choose another path"),
    # ---- gsrm.py
    ("gsrm.py", "python gsrm.py annotate DATA --url URL --model NAME --out FILE, or python gsrm.py eval DATA"),
    ("gsrm.py eval {w}/bare.jsonl --gsrm toy:read", "two problems or more, each with a teacher trace"),
    (CARD + "--gsrm rubbish:late", "rubbish:late gave 'None' for the trace"),
    (CARD + "--data toy", "give one of the two"),
    (CARD + "--limit -1", "--limit: '-1' is not a whole number of 0 or more"),
    (CARD + "--model toy/student --k 0", "--k: '0' is not a whole number of 1 or more"),
    (CARD + "--model {w}/long.jsonl", "is a file; give the folder"),
    (CARD + "--gsrm toy/gsrm --pairs rubbish:text", "it has to return (prompt of the judge, 'yes' or 'no')"),
    (CARD + "--out {w}/kept.jsonl", "kept.jsonl exists already: choose another --out"),
    (CARD + "--out {w}/kept.jsonl/x.json", "kept.jsonl: File exists: choose another path"),
    (ANNOTATE + "--url nonsense", "the url must look like http://host:port/v1"),
    (ANNOTATE + "--url http://127.0.0.1:80O0/v1", "the url must look like http://host:port/v1"),
    (CARD + "--gsrm http://127.0.0.1:99999/v1#m", "the url must look like http://host:port/v1"),
    (ANNOTATE + "--concurrency 0", "--concurrency: '0' is not a whole number of 1 or more"),
    (ANNOTATE + "--limit -1", "--limit: '-1' is not a whole number of 0 or more"),
    ("gsrm.py annotate {w}/bare.jsonl --url http://127.0.0.1:9/v1 --model m --out {w}/new.jsonl", "no problem has a teacher trace"),
    # ---- data.py
    ("data.py {w}/broken.jsonl --model toy/student", "broken.jsonl:2: not valid JSON"),
    (SHOW + "--model {w}/badwords", "badwords: cannot be loaded"),
    (CONVERT, "gsm8k.jsonl, row 2: field 'answer' must be"),
    (CONVERT + "--limit -1", "--limit: '-1' is not a whole number of 0 or more"),
    (CONVERT + "--out {w}/kept.jsonl", "choose another --out, or pass --overwrite"),
    (CONVERT + "--input {w}/nowhere.jsonl", "nowhere.jsonl: No such file or directory"),
    (CONVERT + "--exclude {w}/broken.jsonl", "broken.jsonl:2: not valid JSON"),
    ("data.py convert nothing --out {w}/new.jsonl", "invalid choice: 'nothing'"),
    # ---- checkpoint.py
    (f"checkpoint.py {STEP}", "the following arguments are required: --out"),
    ("checkpoint.py {w}/nowhere --out {w}/new", "no such folder"),
    ("checkpoint.py {w}/damaged --out {w}/new", "state.json is missing or cut short"),
    (f"checkpoint.py {STEP} --out {{w}}/run", "is there already: choose another --out"),
    (f"checkpoint.py {STEP} --out {{w}}/kept.jsonl/x", "kept.jsonl/x: Not a directory: choose another path"),
    # ---- study.py
    ("study.py report --results {w}/nowhere.jsonl", "run the study first"),
    ("study.py report --results {w}/study.jsonl", "study.jsonl:1: no line of a study, it has no 'sampled'"),
    (STUDY + "--arms ppo", "invalid choice: 'ppo'"),
    (STUDY + "--jobs 0", "--jobs: '0' is not a whole number of 1 or more"),
    (STUDY + "--results {w}/broken.jsonl", "broken.jsonl:2: not valid JSON"),
    (STUDY + "--results {w}/kept.jsonl/x.jsonl", "kept.jsonl: File exists: choose another path"),
    # ---- toy.py problems
    (TOY + "--people 99", "99 people: a world has 3 to 14"),
    (TOY + "--count 0", "--count: '0' is not a whole number of 1 or more"),
    (TOY + "--needed 6 4", "ask for fewer, or for more people"),
    (TOY + "--out {w}/kept.jsonl/x", "kept.jsonl/x: Not a directory: choose another path"),
    ("toy.py nothing", "invalid choice: 'nothing'"),
    # ---- bench.py
    ("bench.py", "the following arguments are required: {logprob,rollout,step}"),
    (ROLLOUT + "--rows 3", "--rows: '3' is not a whole number of 8 or more"),
    (ROLLOUT + "--max_new_tokens 0", "--max_new_tokens: '0' is not a whole number of 1 or more"),
    (ROLLOUT + "--model 70b", "invalid choice: '70b'"),
    (LOGPROB + "--temperature 0", "--temperature: '0' is not a finite number of"),
    (LOGPROB + "--only nothing", "--only nothing: in no row's name; there are ours A"),
]
ABSENT = [("wandb", TRAIN + "--log_to wandb", "--log_to wandb: pip install wandb, or leave the flag out"),
          ("vllm", EVAL + "--engine vllm", "pip install vllm, or leave the flag out"),
          ("openai", ANNOTATE, "an endpoint needs the openai package: pip install openai"), ("datasets", "data.py convert math500 --out {w}/new.jsonl", "pip install datasets")]


def command(line: str) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a command line of the project, run in this process; any exception but SystemExit comes through: it would be a traceback."""
    file, *words = shlex.split(line)
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv, threads, handlers = sys.argv, torch.get_num_threads(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logs = [handler for handler in logging.getLogger("transformers").handlers if type(handler) is logging.StreamHandler]      # not those of pytest
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
    return AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                                        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None))


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
    lines(w / "judged.jsonl", {"prompt": "a", "target": "b"})
    lines(w / "gsm8k.jsonl", {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}, {"question": "1 + 2?", "answer": 3})
    lines(w / "kept.jsonl", "this is mine")
    lines(w / "rubbish.py", "numbers = 3", "def text(trace): return 'no steps'", "def nothing(trace): return None", "def nan(trace): return [float('nan')]",
          "def late(trace): return None if trace else []")
    row = {"id": "a", "sample": 0, "temperature": 1.0, "correct": True, "structure": None, "true_structure": None,
           "length": 3, "stop": "stop", "text": "x", "steps": None, "left_at": None}
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
    shutil.copytree(ROOT / "toy/gsrm", w / "badjudge")
    (w / "badjudge/gsrm.json").write_text("{}")
    spec = json.loads((w / "words/tiktoken.json").read_text())
    (w / "words/tiktoken.json").write_text(json.dumps(spec | {"words": spec["words"] + [f"zz{i}" for i in range(200)]}))
    (w / "badwords/tiktoken.json").write_text("{")
    save_file({k: v * float("nan") for k, v in load_file(w / "nan/model.safetensors").items()}, w / "nan/model.safetensors", {"format": "pt"})
    assert command((TRAIN + "--out {w}/run").format(w=w))[0] == 0
    shutil.copytree(w / "run", w / "foreign")
    lines(w / "foreign/log.jsonl", {"step": 1}, {"step": 2})               # a resume cuts off the second, but not before it knows that it can go on
    shutil.rmtree(w / "foreign/checkpoints/step_000001")
    model, checkpoints = tiny(553), Checkpoints(w / "foreign/checkpoints")
    checkpoints.save(model, load_tokenizer(ROOT / "toy/student"), torch.optim.AdamW(model.parameters()), 1)
    checkpoints.wait()
    shutil.copytree(w / "run", w / "norecord")
    (w / "norecord/run.json").write_text("{")
    (w / "norecord.settings.json").write_text("{")
    lines(w / "norecord.jsonl", row)
    shutil.copytree(w / "run/checkpoints/step_000001", w / "damaged")
    (w / "damaged/state.json").write_text("{}")
    return w


@pytest.fixture(autouse=True)
def rubbish(w, monkeypatch):
    """The functions of rubbish.py, as if it stood in the working folder."""
    monkeypatch.syspath_prepend(w)


def refused(line: str, says: str, w: Path) -> None:
    before = snapshot(w)
    status, _, err = command(line.format(w=w) if "{w}" in line else line)
    assert status not in (0, None) and says.replace("{w}", str(w)) in err and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert snapshot(w) == before                         # nothing has been written, changed or removed


@pytest.mark.parametrize(("line", "says"), BAD, ids=lambda text: text[-50:])
def test_bad_input_ends_with_one_line_that_says_what_to_change(line, says, w):
    if line.endswith("--gsrm http://127.0.0.1:9/v1"):
        pytest.importorskip("openai", reason="the optional package openai is not installed")
    refused(line, says, w)


@pytest.mark.parametrize(("package", "line", "says"), ABSENT)
def test_a_package_that_is_not_there(package, line, says, w, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)      # as if it were not installed
    refused(line, says, w)


def test_the_commands_do_the_same_as_processes(w):
    cases = [(TRAIN + "--stepz 3").format(w=w), (EVAL + "--data {w}/broken.jsonl").format(w=w), (SFT + "--model {w}/mixed").format(w=w)]
    started = [subprocess.Popen([sys.executable, *shlex.split(line)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for line in cases]
    for line, process in zip(cases, started):
        _, err = process.communicate(timeout=120)
        status, _, same = command(line)
        assert (process.returncode, err) == (status, same)


def test_the_same_commands_without_the_mistake(w, tmp_path):
    """What the table bends is straight: each of its commands runs."""
    shutil.copytree(w, tmp_path / "w")
    lines(tmp_path / "w/gsm8k.jsonl", {"question": "1 + 1?", "answer": "It is 2.\n#### 2"})
    for line in (TRAIN, SFT + "--out {w}/sft", EVAL, CARD, SHOW, CONVERT + "--overwrite", f"checkpoint.py {STEP} --out {{w}}/exported",
                 TOY + "--out {w}/more.jsonl", "eval.py show {w}/run"):
        status, _, err = command(line.format(w=tmp_path / "w"))
        assert status == 0, (line, err)


def test_a_training_run_goes_on_without_a_reader(tmp_path):
    """`train.py ... 2>&1 | head -1` ends as without it: what is trained does not hang on a screen."""
    code = (f"import sys; sys.path.insert(0, '.'); from pathlib import Path; from tqdm import tqdm; from watch import training\n"
            f"def main(config):\n    for n in tqdm(range(2_000), mininterval=0):\n        print('line' * 100, flush=True)\n"
            f"    print('more', file=sys.stderr)\n    Path('{tmp_path}/done').write_text('whole')\ntraining(main, lambda: None)")
    for pipe in ("| head -1", "2>&1 | head -1"):
        piped = subprocess.run(["bash", "-c", f'set -o pipefail; "$0" -c "$1" {pipe}', sys.executable, code], cwd=ROOT, capture_output=True, text=True)
        assert piped.returncode == 0 and "Traceback" not in piped.stderr and (tmp_path / "done").read_text() == "whole" and 400 < len(piped.stdout) < 9_000
        (tmp_path / "done").unlink()


def test_ctrl_c_and_a_reader_that_has_gone_leave_no_traceback():
    """KeyboardInterrupt where no command has a better answer; `... | head -1` closes the pipe behind the first line."""
    code = "import sys; sys.path.insert(0, '.'); from command import ending\nwith ending():\n    "
    stopped = subprocess.run([sys.executable, "-c", code + "raise KeyboardInterrupt"], cwd=ROOT, capture_output=True, text=True)
    assert (stopped.returncode, stopped.stderr) == (1, "interrupted\n")
    piped = subprocess.run(["bash", "-c", 'set -o pipefail; "$0" -c "$1" | head -1', sys.executable, code + "[print('line' * 100) for _ in range(10_000)]"],
                           cwd=ROOT, capture_output=True, text=True)
    assert (piped.returncode, piped.stderr) == (0, "") and piped.stdout.startswith("line")
