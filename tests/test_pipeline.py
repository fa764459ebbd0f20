"""Real formats end to end: one training step of each Hugging Face family, and the README's commands in a row on GSM8K. `python -m pytest tests/test_pipeline.py [-m slow]`"""
import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, checkpoint, serving, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import sft
import train
from checkpoint import main as checkpoint_main
from data import chat_ids, load_model, load_problems, load_tokenizer, opening, read_jsonl, stop_and_pad_ids, whole_turns, write_jsonl
from endpoint import annotation_prompt
from gsrm import Step, decompose_prompt, format_steps
from toy import make_problems

ROOT = Path(train.__file__).parent
SHARED = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
rows_of = lambda path: [row for _, row in read_jsonl(path)]

# ------------------------------------------------------------------------------------------------ one step of each family


@pytest.mark.parametrize(("kind", "template", "tied"), [("qwen2", "chatml", True), ("qwen3", "chatml", False), ("llama", "r1", False),
                                                        ("qwen2", "r1", False), ("llama", "chatml", True), ("qwen3", "r1", True)])
def test_one_step_of_each_family_with_its_own_tokenizer(kind: str, template: str, tied: bool, tmp_path: Path) -> None:
    """The trainer's log-probs are the sampler's, something moves, and what is exported is an ordinary checkpoint with the template that it was trained under."""
    problems = make_problems(5, 4, 5, (2, 4))
    write_jsonl(data := tmp_path / "train.jsonl", [asdict(p) for p in problems])
    tok = tokenizer(template, [text for p in problems for text in (p.problem, *p.teachers)], 500)
    student, out = checkpoint(tmp_path / "student", kind, tok, tied), tmp_path / "out"
    train.main(train.parse_config(["--preset", "none", "--model", str(student), "--data", str(data), "--gsrm", "tiny:read", "--out", str(out), "--steps", "1", "--device", "cpu",
                                   "--problems_per_step", "3", "--group_size", "4", "--max_new_tokens", "24", "--lr", "1e-3", "--beta", "0.01", "--temperature", "0.9"]))
    [log], rollouts = rows_of(out / "log.jsonl"), rows_of(out / "rollouts.jsonl")
    assert 0 < log["sampling/sampling_logp_difference/max"] < 1e-4 and log["grad_norm"] > 0 and not log["skipped_step"] and log["frac_reward_zero_std"] < 1
    assert {0.25, 0.5} <= {row["rewards"]["structure"] for row in rollouts} <= {0.0, 0.25, 0.5} and len(rollouts) == 12                       # 0: fewer than three words

    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (student, out / "model"))
    was, same, size = load_tokenizer(student), AutoTokenizer.from_pretrained(out / "model"), len(tok) + 37
    moved = float((after.model.embed_tokens.weight - before.model.embed_tokens.weight).detach().abs().max())
    assert type(after).config_class is CONFIGS[kind] and after.model.embed_tokens.weight.shape[0] == after.lm_head.weight.shape[0] == size and moved > 1e-4
    assert (after.lm_head.weight.data_ptr() == after.model.embed_tokens.weight.data_ptr()) is tied is after.config.tie_word_embeddings
    assert (same.chat_template == tok.chat_template and was.get_vocab() == tok.get_vocab()
            and set(same.get_vocab().items()) - set(tok.get_vocab().items()) <= {("<|endoftext|>", len(tok))}          # AutoTokenizer's own, of a Qwen2
            and (same.eos_token, same.pad_token, same.bos_token) == (tok.eos_token, tok.pad_token, tok.bos_token))

    words = "Ünï 47 <think>so</think>\n\\boxed{12}"
    ids, again = chat_ids(was, words), chat_ids(load_tokenizer(out / "model"), words)
    bos = [] if tok.bos_token_id is None else [tok.bos_token_id]
    assert ids == again == chat_ids(tok, words) and [i for i in ids if i == tok.bos_token_id] == bos and opening(same) == ("<think>" if template == "r1" else "")
    assert whole_turns(same, [same.encode(words, add_special_tokens=False) + [same.eos_token_id, size - 1]]) == [opening(same) + words]      # ids without a token say nothing
    with torch.no_grad():
        assert after(input_ids=torch.tensor([ids])).logits.shape == (1, len(ids), size)

# ------------------------------------------------------------------------------------------------ odd checkpoints


def edit(file: Path, **changes: object) -> None:
    """Other fields in a JSON file; None takes one out."""
    file.write_text(json.dumps({name: value for name, value in (json.loads(file.read_text()) | changes).items() if value is not None}))


ODD = {"no pad token": ("llama", "r1", {"tokenizer_config.json": {"pad_token": None}, "config.json": {"pad_token_id": None}}),
       "stop ids that only generation_config knows": ("llama", "r1", {"generation_config.json": {"eos_token_id": [1, 40]}}),
       "no chat template": ("llama", "r1", {}),
       "no room to spare": ("qwen2", "r1", {}),                      # transformers loads it with a token more than its files have: <|endoftext|>
       "a sliding window that is switched off": ("qwen2", "chatml", {"config.json": {"sliding_window": 4, "use_sliding_window": False,
                                                                                     "max_window_layers": 0, "layer_types": None}}),
       "a head of its own that the config calls tied": ("qwen2", "chatml", {"config.json": {"tie_word_embeddings": True}}),
       "sampling settings that contradict each other": ("qwen3", "chatml", {"generation_config.json": {"temperature": 0.6, "top_p": 0.9, "do_sample": False}})}


@pytest.mark.parametrize("oddity", ODD)
def test_an_odd_checkpoint_is_trained_exported_and_evaluated(oddity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sft's loss is transformers' own over the target tokens; what either trainer saves has the start's stop ids, template and tokens, and is sampled from."""
    (kind, template, changes), problems = ODD[oddity], make_problems(5, 3, 5, (2, 4))
    write_jsonl(data := tmp_path / "train.jsonl", [asdict(p) for p in problems])
    tok = tokenizer(template, [text for p in problems for text in (p.problem, *p.teachers)], 400)
    start = checkpoint(tmp_path / "start", kind, tok, spare=0 if oddity == "no room to spare" else 37)
    for name, fields in changes.items():
        edit(start / name, **fields)
    if oddity == "no chat template":
        (start / "chat_template.jinja").unlink()
    model, tok = load_model(start)
    stops, ids = stop_and_pad_ids(model, tok), chat_ids(tok, "2 <|endoftext|> 3?")
    assert max(ids) < len(model.get_input_embeddings().weight) and (oddity != "no chat template" or tok.decode(ids).endswith("?\n\nAssistant: <think>\n"))
    assert ids.count(tok.bos_token_id) == (ids[0] == tok.bos_token_id) == (template == "r1") and stops[0] >= ({1, 40} if "stop ids" in oddity else {tok.eos_token_id})

    sft.main(sft.parse_config(["--model", str(start), "--data", str(data), "--out", str(tmp_path / "sft"), "--batch_size", "6", "--max_tokens", "300", "--device", "cpu"]))
    pairs, loss = sft.load_pairs(sft.Config(data=str(data)), tok), 0.0
    with torch.no_grad():
        for prompt, target in pairs:
            loss += float(model(input_ids=torch.tensor([prompt + target]), labels=torch.tensor([[-100] * len(prompt) + target])).loss) * len(target)
    assert json.loads((tmp_path / "sft" / "sft.json").read_text())["epochs"][0]["loss"] == pytest.approx(loss / sum(len(t) for _, t in pairs), abs=1e-5) and len(pairs) == 6

    train.main(train.parse_config(["--preset", "none", "--model", str(start), "--data", str(data), "--gsrm", "tiny:read", "--out", str(tmp_path / "rl"), "--steps", "1",
                                   "--device", "cpu", "--problems_per_step", "2", "--group_size", "2", "--max_new_tokens", "8"]))
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", str(tmp_path / "rl" / "checkpoints" / "step_000001"), "--out", str(tmp_path / "export")])
    checkpoint_main()
    for folder in (tmp_path / "sft", tmp_path / "rl" / "model", tmp_path / "export"):
        after, same = load_model(folder)
        assert (stop_and_pad_ids(after, same) == stops and chat_ids(same, "2 <|endoftext|> 3?") == ids
                and same.get_vocab() == tok.get_vocab() and same.chat_template == tok.chat_template)
    rows, _, _ = evaluation.sample_rows(evaluation.Config(str(tmp_path / "export"), str(data), k=2, temperature=1.0, top_p=1.0, max_new_tokens=20, device="cpu"))
    assert len(rows) == 6 and all((row["tokens"][-1] in stops[0]) == (row["stop"] == "stop") and not stops[0] & set(row["tokens"][:-1]) for row in rows)


def test_a_sliding_window_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tok = tokenizer("chatml", ["1 2 3"])
    edit(checkpoint(tmp_path / "start", "qwen2", tok) / "config.json", use_sliding_window=True, sliding_window=4, max_window_layers=0, layer_types=None)
    write_jsonl(data := tmp_path / "train.jsonl", [asdict(p) for p in make_problems(5, 3, 5, (2, 4))])
    for run in (lambda: train.main(train.parse_config(["--preset", "none", "--model", str(tmp_path / "start"), "--data", str(data), "--gsrm", "tiny:read",
                                                       "--out", str(tmp_path / "rl"), "--device", "cpu"])),
                lambda: evaluation.main(evaluation.Config(str(tmp_path / "start"), str(data), max_new_tokens=8, device="cpu", out=str(tmp_path / "rows.jsonl")))):
        with pytest.raises(ValueError, match="full attention only .Qwen2: use_sliding_window=False"):
            run()
    assert not (tmp_path / "rows.jsonl").exists() and not list((tmp_path / "rl").glob("*.json*"))

# ------------------------------------------------------------------------------------------------ from nothing to a trained student

OWN_ROWS = [                                                         # in GSM8K's form, for where its file is not
    ("Mia has 3 boxes with 8 pears each and eats 5 pears. How many pears are left?",
     "There are 3*8 = <<3*8=24>>24 pears.\nAfter eating, 24-5 = <<24-5=19>>19 pears are left.\n#### 19"),
    ("A bus makes 6 trips a day with 40 seats each. How many seats is that in 7 days?",
     "A day has 6*40 = <<6*40=240>>240 seats.\nIn a week that is 240*7 = <<240*7=1680>>1680 seats.\n#### 1680"),
    ("Omar reads 12 pages on Monday and twice as many on Tuesday. How many pages does he read in all?",
     "On Tuesday he reads 2*12 = <<2*12=24>>24 pages.\nIn all he reads 12+24 = <<12+24=36>>36.\n#### 36"),
    ("Ropes of 45 m are cut into pieces of 9 m. What do 4 ropes give?", "One rope gives 45/9 = <<45/9=5>>5 pieces.\nSo 4 ropes give 4*5 = <<4*5=20>>20 pieces.\n#### 20"),
    ("Lena saves $15 a week and has $30 now. How much has she after 6 weeks?", "She adds 15*6 = $<<15*6=90>>90.\nWith what she has that is 30+90 = $<<30+90=120>>120.\n#### 120"),
    ("A field is 20 m long and half as wide. How many meters of fence go around it?",
     "It is 20/2 = <<20/2=10>>10 m wide.\nOnce around is 2*(20+10) = <<2*(20+10)=60>>60 m.\n#### 60"),
    ("Three friends share 2 pizzas of 9 slices. How many slices does each get?", "There are 2*9 = <<2*9=18>>18 slices.\nEach gets 18/3 = <<18/3=6>>6 slices.\n#### 6"),
    ("A tank holds 500 liters and loses 25 liters an hour. When is it at 300 liters?",
     "It has to lose 500-300 = <<500-300=200>>200 liters.\nThat takes 200/25 = <<200/25=8>>8 hours.\n#### 8"),
]


def worked_steps(answer: str) -> list[Step]:
    """The steps that GSM8K's calculator marks tell: why, by the sentence before the mark; what is computed; its result."""
    return [Step(f"{before.split('=')[0].strip()} comes next, its numbers are known", f"What is {task}?", result)
            for line in answer.split("\n") for before, task, result in re.findall(r"^([^<]*)<<([^<>=]*)=([^<>=]*)>>", line)]


def command(*words: object) -> str:
    """What `python <words>` prints; it must succeed."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=900)      # for what hangs; a starved machine is no failure
    assert done.returncode == 0, f"{words[0]}: {done.stdout[-500:]}\n{done.stderr[-1500:]}"
    return done.stdout


@pytest.mark.slow
def test_the_commands_in_a_row_on_gsm8k(tmp_path: Path) -> None:
    """Rows of GSM8K become problems, a served annotator splits their solutions, a GSRM learns to, a student learns the solutions and is trained with that GSRM; three
    model families, two chat templates. The annotator has learnt these very answers before, from GSM8K's own marks: a tiny model could not split a trace unseen."""
    if missing := [name for name in ("openai", "fastapi", "uvicorn", "pydantic", "accelerate") if find_spec(name) is None]:
        pytest.skip(f"transformers serve and its client need {', '.join(missing)}")
    source, data, pairs, rl = SHARED, tmp_path / "problems.jsonl", tmp_path / "pairs.jsonl", tmp_path / "rl"
    if not source.is_file():
        write_jsonl(source := tmp_path / "gsm8k.jsonl", [{"question": question, "answer": answer} for question, answer in OWN_ROWS])
    assert "8 written" in command("data.py", "convert", "gsm8k", "--input", source, "--limit", 8, "--out", data)
    problems, structures = load_problems(data), {row["question"].strip(): format_steps(worked_steps(row["answer"])) for row in rows_of(source)}
    lessons = [{"prompt": annotation_prompt(p, t), "target": structures[p.problem]} for p in problems for t in p.teachers]
    write_jsonl(tmp_path / "lessons.jsonl", lessons)
    texts = [text for row in lessons for text in row.values()]
    for kind, template in (("qwen3", "chatml"), ("qwen2", "chatml"), ("llama", "r1")):
        checkpoint(tmp_path / kind, kind, tokenizer(template, texts), kind == "qwen2", 96)

    cpu = ["--device", "cpu"]
    learn = lambda name, *flags: float(re.search(r"last loss ([0-9.]+)", command("sft.py", *flags, "--batch_size", 2, "--lr", "3e-3", "--out", tmp_path / name, *cpu))[1])
    assert learn("annotator", "--model", tmp_path / "qwen3", "--data", tmp_path / "lessons.jsonl", "--epochs", 60) < 0.05
    with serving(tmp_path / "annotator") as url:
        said = command("gsrm.py", "annotate", data, "--url", url, "--model", tmp_path / "annotator", "--out", pairs, "--max_new_tokens", 400)
    written, rejected = map(int, re.search(r"^(\d+) pairs in .*; (\d+) rejected", said).groups())
    wanted = {decompose_prompt(p.problem, t): structures[p.problem] for p in problems for t in p.teachers}
    assert written + rejected == 8 == len(wanted) and written == len(rows_of(pairs)) and sum(row["target"] == wanted[row["prompt"]] for row in rows_of(pairs)) >= 6

    assert learn("gsrm", "--task", "gsrm", "--model", tmp_path / "qwen2", "--data", pairs, "--epochs", 60) < 0.05
    assert learn("student", "--task", "trace", "--model", tmp_path / "llama", "--data", data, "--epochs", 60) < 0.5
    scoring = ["--gsrm", tmp_path / "gsrm", "--judge", tmp_path / "qwen3", "--gsrm_max_new_tokens", 300, "--max_new_tokens", 250, *cpu]
    said = command("train.py", "--preset", "none", "--model", tmp_path / "student", "--data", data, "--eval_data", data, "--out", rl, "--steps", 3, "--problems_per_step", 4,
                   "--group_size", 4, "--lr", "1e-4", "--eval_problems", 8, "--eval_k", 2, *scoring)
    log, cached = rows_of(rl / "log.jsonl"), [row["text"] for row in rows_of(rl / "gsrm_cache.jsonl") if "text" in row]
    exact = sum(text in cached for text in wanted.values())
    print(f"{written} pairs, {rejected} rejected; of the teacher's {len(wanted)} traces GSRM read {exact} exactly, {len(cached)} at all; structure reward",
          [row["rewards/structure/mean"] for row in log])
    assert exact >= 6 and len(log) == 3 and "accuracy greedy" in said and len(rows_of(rl / "eval_before.jsonl")) == len(rows_of(rl / "eval_after.jsonl")) == 8 + 16
    for row in log:
        assert (all(math.isfinite(row[name]) for name in ("reward", "rewards/structure/mean", "loss", "grad_norm"))
                and row["unscored"] < 8 and row["sampling/sampling_logp_difference/max"] < 1e-4)
    assert max(row["rewards/structure/mean"] for row in log) > 0 and any(row["rewards/structure/std"] > 0 and row["grad_norm"] > 0 for row in log)

    for name, model in (("before", tmp_path / "llama"), ("after", rl / "model")):
        assert "mean@1" in command("eval.py", "--model", model, "--data", data, "--temperature", 0, "--out", tmp_path / f"{name}.jsonl", *scoring)
        assert [row["id"] for row in rows_of(tmp_path / f"{name}.jsonl")] == [p.id for p in problems]
    said = command("eval.py", "compare", tmp_path / "before.jsonl", tmp_path / "after.jsonl")
    diff, low, high = map(float, re.search(r"^greedy +([-+.0-9]+) +\[([-+.0-9]+), ([-+.0-9]+)\]  p [.0-9]+  8 problems", said, re.MULTILINE).groups())
    print(said)
    assert 0 < low <= diff <= high <= 1 and diff >= 0.5                 # it has seen the answers: a student that does not know them now has not read its checkpoint
