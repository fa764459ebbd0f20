"""What a command's flags name as its reward model: when a cache is its own, and which models may judge. `python -m pytest tests/test_scorer.py`"""
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, PretrainedConfig

import watch
from data import TiktokenTokenizer, load_model
from scorer import load_gsrm

SPEC = dict(name="t", pattern=r" ?[A-Za-z]+|\d|\s|[^\sA-Za-z\d]", words=["yes", "no", " Ann"], special=["<|end|>"], eos="<|end|>", pad="<|end|>", instruction="",
            chat_template="{% for m in messages %}{{ m.content }}:{% endfor %}")
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             eos_token_id=0, bos_token_id=None, pad_token_id=None)


def saved(folder: Path, config: PretrainedConfig, **spec: object) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    TiktokenTokenizer(SPEC | spec).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("rows, whole", [(300, 1 << 28), (150_000, 1 << 28), (150_000, 1 << 20)])
def test_a_reward_model_trained_anew_at_the_same_path_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, whole: int) -> None:
    """Also where only the layers were trained and the embedding, more than 16 MiB that stand first in the file, was not; and where the same weights read other prompts."""
    monkeypatch.setattr(watch, "WHOLE", whole)
    path, cache = saved(tmp_path / "gsrm", LlamaConfig(vocab_size=rows, tie_word_embeddings=True, **SIZES)), tmp_path / "cache.jsonl"
    before = load_gsrm(path, "", cache, "cpu", 4)
    again = load_gsrm(path, "", cache, "cpu", 4)
    assert before.name == before.judge_name == again.name and before.name.startswith(path)
    model, _ = load_model(path)
    with torch.no_grad():
        for layer in model.model.layers:
            for p in layer.parameters():
                p.mul_(1.5)
    model.save_pretrained(path)
    trained = load_gsrm(path, "", cache, "cpu", 4)
    assert trained.name == trained.judge_name != before.name
    TiktokenTokenizer(SPEC | {"chat_template": "{% for m in messages %}{{ m.content }}?{% endfor %}"}).save_pretrained(path)
    names = [before.name, trained.name, load_gsrm(path, "", cache, "cpu", 4).name]
    for file in ("pytorch_model.bin", "merges.txt"):                          # older checkpoints have their weights and their words there
        (Path(path) / file).write_text("other")
        names.append(load_gsrm(path, "", cache, "cpu", 4).name)
    assert len(set(names)) == 5


def test_a_judge_needs_a_plain_head_and_a_word_for_no_and_a_reader_neither(tmp_path: Path) -> None:
    plain, scaled = LlamaConfig(vocab_size=300, **SIZES), GraniteConfig(vocab_size=300, logits_scaling=8.0, **SIZES)
    good, odd, mute = saved(tmp_path / "good", plain), saved(tmp_path / "odd", scaled), saved(tmp_path / "mute", plain, words=[" Ann"])
    for judge in (odd, mute):
        with pytest.raises(ValueError, match="softcap or a logit scale.*nor judge" if judge == odd else "no single token for yes or for no"):
            load_gsrm(good, judge, None, "cpu", 4)
        with pytest.raises(ValueError):
            load_gsrm(judge, "", None, "cpu", 4)                              # it would judge itself
        gsrm = load_gsrm(judge, good, None, "cpu", 4)
        p, = gsrm.ask([("meta", "Ann has 4", "Ann has five")])
        want, = load_gsrm(good, "", None, "cpu", 4).ask([("meta", "Ann has 4", "Ann has five")])
        assert p == want and 0 < p < 1
