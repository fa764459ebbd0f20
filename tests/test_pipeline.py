"""Real formats end to end: one training step of each Hugging Face family, and the README's commands in a row on GSM8K. `python -m pytest tests/test_pipeline.py [-m slow]`"""
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, checkpoint, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from data import Problem, chat_ids, load_problems, load_tokenizer, opening, read_jsonl, whole_turns, write_jsonl
from endpoint import annotation_prompt
from gsrm import Step, decompose_prompt, format_steps
from toy import make_problems

ROOT = Path(train.__file__).parent
SHARED = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
rows_of = lambda path: [row for _, row in read_jsonl(path)]

# ------------------------------------------------------------------------------------------------ one step of each family


@pytest.mark.parametrize(("kind", "template", "tied"), [("qwen2", "chatml", True), ("qwen3", "chatml", False), ("llama", "r1", False), ("qwen2", "r1", False), ("llama", "chatml", True), ("qwen3", "r1", True)])
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
    assert same.chat_template == tok.chat_template and same.get_vocab() == was.get_vocab() and (same.eos_token, same.pad_token, same.bos_token) == (tok.eos_token, tok.pad_token, tok.bos_token)

    words = "Ünï 47 <think>so</think>\n\\boxed{12}"
    ids, again = chat_ids(was, words), chat_ids(load_tokenizer(out / "model"), words)
    bos = [] if tok.bos_token_id is None else [tok.bos_token_id]
    assert ids == again == chat_ids(tok, words) and [i for i in ids if i == tok.bos_token_id] == bos and opening(same) == ("<think>" if template == "r1" else "")
    assert whole_turns(same, [same.encode(words, add_special_tokens=False) + [same.eos_token_id, size - 1]]) == [opening(same) + words]      # ids without a token say nothing
    with torch.no_grad():
        assert after(input_ids=torch.tensor([ids])).logits.shape == (1, len(ids), size)
