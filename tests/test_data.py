"""Exact expectations for data.py: checked lines, both kinds of tokenizer, templates, stop ids. `python -m pytest tests/test_data.py`"""
import json
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from data import (
    INSTRUCTION,
    Problem,
    TiktokenTokenizer,
    Tokenizer,
    append_jsonl,
    chat_ids,
    join_completion,
    load_model,
    load_problems,
    load_tokenizer,
    opening,
    problem_ids,
    read_jsonl,
    split_completion,
    stop_and_pad_ids,
    write_jsonl,
)

GOOD = {"id": "p1", "problem": "How many has Ann?", "answer": "4", "teachers": ["She has 4.", "Ann has four."], "domain": "toy"}
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PREFILL = CHAT.replace("assistant\n", "assistant\n<think>")
SPEC = dict(name="t", pattern=r" ?[A-Za-z]+|\d|\s|[^\sA-Za-z\d]", words=["Ann", " Ann", " has", "answer", "ünï"],
            special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>", pad="<|endoftext|>", instruction="", chat_template=CHAT)


def file_of(folder: Path, *lines: dict | str) -> Path:
    path = folder / "problems.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines), encoding="utf-8")
    return path

# ------------------------------------------------------------------------------------------------ problems


def test_good_lines(tmp_path: Path) -> None:
    least = {"id": "p2", "problem": "1+1?", "answer": "2"}
    odd = {"id": "p\u20283", "problem": "a\u2028b\u2029c\x85d é\U0001f600", "answer": " 2 ", "teachers": ["line\u2028line\nline"]}
    path = file_of(tmp_path, GOOD, "", least, "  ", odd)
    assert load_problems(path) == load_problems(str(path)) == [
        Problem("p1", "How many has Ann?", "4", ("She has 4.", "Ann has four."), "toy"),
        Problem("p2", "1+1?", "2"), Problem(**{**odd, "teachers": tuple(odd["teachers"])})]
    assert [where for where, _ in read_jsonl(path)] == [f"{path}:{n}" for n in (1, 3, 5)]


@pytest.mark.parametrize(("line", "message"), [
    ({**GOOD, "id": 7}, "field 'id' must be a non-empty string, got 7"),
    ({**GOOD, "problem": ""}, "field 'problem' must be a non-empty string, got ''"),
    ({**GOOD, "answer": "  "}, "field 'answer' must be a non-empty string, got '  '"),
    ({**GOOD, "answer": 4}, "field 'answer' must be a non-empty string, got 4"),
    ({k: v for k, v in GOOD.items() if k != "answer"}, "field 'answer' must be a non-empty string, got None"),
    ({**GOOD, "domain": None}, "field 'domain' must be a non-empty string, got None"),
    ({**GOOD, "teachers": "one"}, "field 'teachers' must be a list of non-empty strings, got 'one'"),
    ({**GOOD, "teachers": ["one", ""]}, "field 'teachers' must be a list of non-empty strings"),
    ({**GOOD, "teachers": None}, "field 'teachers' must be a list of non-empty strings"),
    ({**GOOD, "teacher": ["one"]}, "unknown field 'teacher'; a problem has the fields id, problem, answer, teachers, domain"),
    ("[1, 2]", "expected a JSON object, got list"),
    ('"text"', "expected a JSON object, got str"),
    ("{'id': 1}", "not valid JSON (Expecting property name enclosed in double quotes at column 2)"),
    (json.dumps(GOOD)[:-1], "not valid JSON ("),
    (json.dumps(GOOD) * 2, "not valid JSON (Extra data at column"),
])
def test_a_bad_line_is_named_with_file_line_and_field(tmp_path: Path, line: dict | str, message: str) -> None:
    path = file_of(tmp_path, {**GOOD, "id": "first"}, "", line, {**GOOD, "id": "last"})
    with pytest.raises(ValueError) as error:
        load_problems(path)
    assert str(error.value).startswith(f"{path}:3: {message}")


def test_an_id_used_twice_names_both_lines(tmp_path: Path) -> None:
    path = file_of(tmp_path, GOOD, {**GOOD, "id": "p2"}, GOOD)
    with pytest.raises(ValueError) as error:
        load_problems(path)
    assert str(error.value) == f"{path}:3: id 'p1' was used before, at {path}:1; ids must be unique"


def test_a_folder_holds_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [GOOD])
    write_jsonl(tmp_path / "test.jsonl", [{**GOOD, "id": "t1"}, {**GOOD, "id": "t2"}])
    assert [p.id for p in load_problems(tmp_path)] == ["p1"] and [p.id for p in load_problems(tmp_path, "test")] == ["t1", "t2"]
    assert [p.id for p in load_problems(tmp_path / "test.jsonl")] == ["t1", "t2"]
    with pytest.raises(FileNotFoundError, match=r"no problems at .*dev\.jsonl: give a JSONL file, or a folder that holds dev\.jsonl"):
        load_problems(tmp_path, "dev")
    with pytest.raises(FileNotFoundError, match="no problems at"):
        load_problems(tmp_path / "nowhere")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: holds no problems"):
        load_problems(tmp_path / "empty.jsonl")


def test_jsonl_round_trip(tmp_path: Path) -> None:
    rows = [{"a": "x\u2028y\u2029\x85\r\n\t\"\\ é日", "b": [1, 2.5, None, True]}, {}, {"n": {"m": "\x00\x1f"}}]
    write_jsonl(tmp_path / "rows.jsonl", rows[:1])
    append_jsonl(tmp_path / "rows.jsonl", rows[1:])
    append_jsonl(tmp_path / "new.jsonl", rows)
    assert [row for _, row in read_jsonl(tmp_path / "rows.jsonl")] == [row for _, row in read_jsonl(tmp_path / "new.jsonl")] == rows

# ------------------------------------------------------------------------------------------------ tokenizers


@cache
def words() -> TiktokenTokenizer:
    return TiktokenTokenizer(SPEC)


def huggingface(folder: Path, template: str | None = "{{ bos_token }}" + CHAT, bos: bool = True, pad: str | None = "<|endoftext|>") -> Tokenizer:
    """A byte-level BPE tokenizer that writes a BOS of its own, saved and loaded again."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = ["<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator([json.dumps(GOOD)] * 3, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token=pad, chat_template=template)
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


TEXT = st.one_of(st.text(), st.lists(st.sampled_from([*SPEC["words"], *SPEC["special"], "<|", "|>", "é", "\u2028", "\0", " ", "\r\n", "日本",
                                                      "\U0001f469\u200d\U0001f680", "7"])).map("".join))


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(TEXT)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = words().encode(text)
    assert words().decode(ids) == text and all(0 <= i < len(words()) for i in ids)
    assert words().decode([i for i in ids if i not in words().special_ids]) == words().decode(ids, skip_special_tokens=True)


def test_words_are_single_tokens_specials_have_their_own_and_bytes_do_the_rest(tmp_path: Path) -> None:
    tok = words()
    assert len(tok) == 256 + 5 + 3 and tok.encode("Ann has") == [256, 258] and tok.encode(" Ann") == [257]
    assert tok.encode("<|endoftext|><|im_start|><|im_end|>") == [261, 262, 263]
    assert (tok.eos_token_id, tok.pad_token_id, tok.special_ids) == (263, 261, {261, 262, 263})
    assert tok.encode("xé") == list("xé".encode()) and tok.encode("x", add_special_tokens=True) == [120]
    assert tok.decode([262, 256, 263]) == "<|im_start|>Ann<|im_end|>" and tok.decode([262, 256, 263], skip_special_tokens=True) == "Ann"
    tok.save_pretrained(tmp_path / "new")
    again = load_tokenizer(tmp_path / "new")
    assert isinstance(again, TiktokenTokenizer) and again.spec == SPEC and again.encode("Ann ünï <|im_end|>") == tok.encode("Ann ünï <|im_end|>")


def test_both_tokenizers_render_a_template_alike(tmp_path: Path) -> None:
    """Blocks are trimmed as transformers trims them."""
    template = ("{%- for m in messages %}\n  {% if m.role == 'user' %}\n<|im_start|>{{ m.content | trim }}\n  {% endif %}\n{% endfor %}"
                "{% if add_generation_prompt %}\nassistant\n{% endif %}\n")
    theirs, ours = huggingface(tmp_path, template), TiktokenTokenizer({**SPEC, "chat_template": template})
    for generation in (True, False):
        messages = [{"role": "user", "content": " hi "}, {"role": "system", "content": "x"}, {"role": "user", "content": "you"}]
        a, b = (tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation) for tok in (theirs, ours))
        assert a == b and "<|im_start|>hi" in a and ("assistant" in a) == generation


def test_chat_prompt_text(tmp_path: Path) -> None:
    asked = Problem("p", "How many?", "4")
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    hf = huggingface(tmp_path)
    assert words().decode(chat_ids(words(), "hi")) == turn.format("hi") and hf.decode(chat_ids(hf, "hi")) == "<s>" + turn.format("hi")
    prefilled = TiktokenTokenizer({**SPEC, "chat_template": PREFILL})
    assert prefilled.decode(chat_ids(prefilled, "hi")) == turn.format("hi") + "<think>"
    assert words().decode(problem_ids(words(), asked)) == turn.format("How many?")               # its own instruction is empty
    assert words().decode(problem_ids(words(), asked, "Be brief.")) == turn.format("How many?\n\nBe brief.")
    own = TiktokenTokenizer({**SPEC, "instruction": "Think."})
    assert own.decode(problem_ids(own, asked)) == turn.format("How many?\n\nThink.") and own.decode(problem_ids(own, asked, "")) == turn.format("How many?")
    assert hf.decode(problem_ids(hf, asked)) == "<s>" + turn.format(f"How many?\n\n{INSTRUCTION}")


def test_bos_is_never_doubled_and_never_forgotten(tmp_path: Path) -> None:
    hf = huggingface(tmp_path / "a")
    bos = hf.bos_token_id
    assert chat_ids(hf, "hi").count(bos) == 1 and chat_ids(hf, "hi")[0] == bos
    text = hf.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert hf.encode(text).count(bos) == 2                           # what plain encoding would do
    assert chat_ids(huggingface(tmp_path / "b", CHAT), "hi").count(bos) == 0                     # the template's word is final
    base = huggingface(tmp_path / "c", None)                         # a base model without a template was trained with its BOS in front
    assert chat_ids(base, "hi").count(bos) == 1 and chat_ids(base, "hi")[0] == bos
    assert chat_ids(huggingface(tmp_path / "d", None, bos=False), "hi").count(bos) == 0


def test_a_base_model_gets_the_plain_template(tmp_path: Path) -> None:
    base = huggingface(tmp_path, None, bos=False)
    assert base.decode(chat_ids(base, "How many?")) == "User: How many?\n\nAssistant: <think>\n"
    ours = TiktokenTokenizer({**SPEC, "chat_template": None})
    assert ours.decode(chat_ids(ours, "a {{ b }} {% c")) == "User: a {{ b }} {% c\n\nAssistant: <think>\n"        # content is data, not a template


@pytest.mark.parametrize("template, opened", [(CHAT, ""), (PREFILL, "<think>"), (CHAT.replace("assistant\n", "assistant\n<think>\n"), "<think>"), (None, "<think>")])
def test_what_the_prompt_has_written_of_the_answer(tmp_path: Path, template: str | None, opened: str) -> None:
    for tok in (TiktokenTokenizer({**SPEC, "chat_template": template}), huggingface(tmp_path, template)):
        assert opening(tok) == opened
        assert split_completion(opening(tok) + "a</think>4") == ("a", "4") and split_completion(opening(tok) + "a 4") == ("a 4", None)

# ------------------------------------------------------------------------------------------------ models


def tiny(vocab: int) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=vocab, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                                        num_key_value_heads=1, head_dim=8, eos_token_id=None, bos_token_id=None, pad_token_id=None))


def test_stop_ids_are_every_way_to_end(tmp_path: Path) -> None:
    model, hf = tiny(300), huggingface(tmp_path / "a")
    im_end, end = hf.encode("<|im_end|>", add_special_tokens=False)[0], hf.encode("<|endoftext|>", add_special_tokens=False)[0]
    assert hf.eos_token_id == im_end != end and stop_and_pad_ids(model, hf) == ({im_end, end}, end)      # both ends; <|eot_id|> is no token here
    model.generation_config.eos_token_id = 77
    assert stop_and_pad_ids(model, hf) == ({im_end, end, 77}, end)
    model.generation_config.eos_token_id = [78, 79, end]
    assert stop_and_pad_ids(model, hf) == ({im_end, end, 78, 79}, end)
    model.generation_config.eos_token_id = 0                         # 0 is an id
    assert stop_and_pad_ids(model, hf)[0] == {im_end, end, 0}
    model.generation_config.eos_token_id = None
    assert stop_and_pad_ids(model, huggingface(tmp_path / "b", pad=None)) == ({im_end, end}, min(im_end, end))
    assert stop_and_pad_ids(model, words()) == ({261, 263}, 261)
    bare = TiktokenTokenizer({**SPEC, "special": ["<end>"], "eos": "<end>", "pad": "<end>"})
    assert stop_and_pad_ids(model, bare) == ({261}, 261)             # pad == eos


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    for vocab, fits in ((len(words()) - 1, False), (len(words()), True), (320, True)):           # an embedding with room to spare is common
        folder = tmp_path / str(vocab)
        tiny(vocab).save_pretrained(folder)
        words().save_pretrained(folder)
        if fits:
            model, tok = load_model(folder)
            assert not model.training and model.get_input_embeddings().weight.shape[0] == vocab and isinstance(tok, TiktokenTokenizer)
            assert all(p.dtype.itemsize == 4 for p in model.parameters())
        else:
            with pytest.raises(ValueError, match=f"the tokenizer has {len(words())} tokens, the model's embedding {vocab}"):
                load_model(folder)

# ------------------------------------------------------------------------------------------------ completions


@pytest.mark.parametrize(("text", "parts"), [
    ("a b</think>\\boxed{4}", ("a b", "\\boxed{4}")),
    ("<think>\na b\n</think>\n\n4 ", ("a b", "4")),
    ("  <think> a", ("a", None)),
    ("a b", ("a b", None)),
    ("", ("", None)),
    ("</think>", ("", "")),
    ("a</think>b</think>c", ("a", "b</think>c")),
    ("a <think> b</think>c", ("a <think> b", "c")),
    ("<think><think>a</think>b", ("<think>a", "b")),
])
def test_split_completion(text: str, parts: tuple[str, str | None]) -> None:
    assert split_completion(text) == parts


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text().filter(lambda t: "</think>" not in t and not t.strip().startswith("<think>")), st.text().map(str.strip))
def test_split_is_the_inverse_of_join(trace: str, answer: str) -> None:
    text = join_completion(trace, answer)
    assert split_completion(text) == split_completion("<think>" + text) == (trace.strip(), f"\\boxed{{{answer}}}")


def test_join_completion_exactly() -> None:
    assert join_completion("\n Ann has 4. ", "4") == "Ann has 4.</think>\n\\boxed{4}"


def test_main_shows_what_a_model_will_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    words().save_pretrained(tmp_path / "model")
    path = file_of(tmp_path, GOOD)
    monkeypatch.setattr(sys, "argv", ["data.py", str(path), "--model", str(tmp_path / "model")])
    runpy.run_path(str(Path(__file__).parent.parent / "data.py"), run_name="__main__")
    out, ids = capsys.readouterr().out, problem_ids(words(), Problem(**GOOD))
    assert f"{len(ids)} tokens: ['<|im_start|>', 'u', 's', 'e', 'r', '\\n'" in out and "id='p1'" in out
