"""Exact expectations for data.py: checked lines, both kinds of tokenizer, templates, stop ids. `python -m pytest tests/test_data.py`"""
import hashlib
import json
import runpy
import shutil
import sys
from contextlib import nullcontext
from datetime import datetime
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

import data
from data import (
    INSTRUCTION,
    PLAIN_TEMPLATE,
    Problem,
    TiktokenTokenizer,
    Tokenizer,
    append_jsonl,
    chat_ids,
    data_file,
    file_hash,
    join_completion,
    load_model,
    load_problems,
    load_tokenizer,
    opening,
    problem_ids,
    read_jsonl,
    split_completion,
    stop_and_pad_ids,
    template_hash,
    text_of,
    whole_turns,
    write_jsonl,
)
from rollout import Sampler
from sft import token_pair

GOOD = {"id": "p1", "problem": "How many has Ann?", "answer": "4", "teachers": ["She has 4.", "Ann has four."], "domain": "toy"}
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PREFILL = CHAT.replace("assistant\n", "assistant\n<think>")
SPEC = dict(name="t", pattern=r" ?[A-Za-z]+|\d|\s|[^\sA-Za-z\d]", words=["Ann", " Ann", " has", "answer", "ünï"],
            special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>", pad="<|endoftext|>", instruction="", chat_template=CHAT)


def file_of(folder: Path, *lines: dict | str) -> Path:
    path = folder / "problems.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path

# ------------------------------------------------------------------------------------------------ problems


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{% for m in messages %}"])
def test_a_template_that_cannot_be_used_says_so(tmp_path, template):
    for tokenizer in (TiktokenTokenizer({**SPEC, "chat_template": template}), huggingface(tmp_path, template)):
        with pytest.raises(ValueError, match="chat template cannot make a prompt of one user turn"):
            chat_ids(tokenizer, "?")


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
    ({**GOOD, "teachers": "one"}, "field 'teachers' must be a list of non-empty strings without <think> and </think> (a trace stands between them), got 'one'"),
    ({**GOOD, "teachers": ["<think>\nShe has 4.</think>\\boxed{4}"]}, "field 'teachers' must be a list of non-empty strings without <think>"),
    ({**GOOD, "teachers": ["one", ""]}, "field 'teachers' must be a list of non-empty strings"),
    ({**GOOD, "teachers": None}, "field 'teachers' must be a list of non-empty strings"),
    ({**GOOD, "teacher": ["one"]}, "unknown field 'teacher'; a problem has the fields id, problem, answer, teachers, domain"),
    ("[1, 2]", "expected a JSON object, got list"),
    ('"text"', "expected a JSON object, got str"),
    ("{'id': 1}", "not valid JSON (Expecting property name enclosed in double quotes at column 2)"),
    (json.dumps(GOOD)[:-1], "not valid JSON ("),
    (json.dumps(GOOD) * 2, "not valid JSON (Extra data at column"),
    ({**GOOD, "problem": "half a pair \ud800"}, "field 'problem' must be a non-empty string, got 'half a pair \\ud800' (surrogates not allowed)"),
    ({**GOOD, "teachers": ["\udc00"]}, "field 'teachers' must be a list of non-empty strings"),
    ("[" * 100_000, "not valid JSON (maximum recursion depth"),
    (json.dumps(GOOD)[:-1] + ', "answer": "5"}', "not valid JSON (the field 'answer' stands there twice)"),
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


def test_a_line_that_is_not_utf8_is_named_and_a_byte_order_mark_is_none_of_it(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + b'{"id": "\xff"}\n')
    with pytest.raises(ValueError) as error:
        load_problems(path)
    assert str(error.value).startswith(f"{path}:2: not valid JSON ('utf-8' codec can't decode byte 0xff")
    assert [p.id for p in load_problems(path, skip_bad=True)] == ["p1"]


def test_skip_bad_counts_and_lists_every_bad_line_and_tells_what_repeats(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = file_of(tmp_path, GOOD, "{broken", {**GOOD, "id": "p2"}, {**GOOD, "problem": "Other?"}, {**GOOD, "id": "p3", "answer": ""}, {**GOOD, "id": "p4", "problem": "New?"})
    assert [p.id for p in load_problems(path, skip_bad=True)] == ["p1", "p2", "p4"]
    out, err = capsys.readouterr()
    assert not out and err.split("\n") == [
        f"3 bad lines of {path} passed over:", f"  {path}:2: not valid JSON (Expecting property name enclosed in double quotes at column 2)",
        f"  {path}:4: id 'p1' was used before, at {path}:1; ids must be unique", f"  {path}:5: field 'answer' must be a non-empty string, got ''",
        f"1 problems of {path} repeat an earlier one, and were kept:", f"  {path}:3: 'p2' reads as 'p1'", ""]
    with pytest.raises(ValueError, match="holds no problems"):
        load_problems(file_of(tmp_path, "{broken", "[]"), skip_bad=True)
    load_problems(file_of(tmp_path, GOOD, {**GOOD, "id": "p2", "problem": "Other?"}), skip_bad=True)
    load_problems(file_of(tmp_path, GOOD, {**GOOD, "id": "p2"}))
    assert capsys.readouterr().err.split("\n")[3:] == [               # also without skip_bad
        f"1 problems of {path} repeat an earlier one, and were kept:", f"  {path}:2: 'p2' reads as 'p1'", ""]
    load_problems(file_of(tmp_path, *({**GOOD, "id": str(n)} for n in range(22))))
    assert (err := capsys.readouterr().err).startswith("21 problems of") and err.endswith(f"  {path}:21: '20' reads as '0'\n  ...\n")
    load_problems(file_of(tmp_path, GOOD, {**GOOD, "id": "p2", "problem": "Other?"}))
    assert not capsys.readouterr().err                               # the failed file's heading and its two lines; of a clean file nothing is said


def test_hashes_name_a_file_and_a_template(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", [GOOD])
    before = file_hash(data_file(tmp_path, "test"))
    assert before == hashlib.sha256((tmp_path / "test.jsonl").read_bytes()).hexdigest()[:16]
    append_jsonl(tmp_path / "test.jsonl", [GOOD])
    assert file_hash(data_file(tmp_path / "test.jsonl")) != before
    assert template_hash(words()) == hashlib.sha256(CHAT.encode()).hexdigest()[:16] != template_hash(TiktokenTokenizer({**SPEC, "chat_template": PREFILL}))
    assert template_hash(TiktokenTokenizer({**SPEC, "chat_template": None})) == hashlib.sha256(PLAIN_TEMPLATE.encode()).hexdigest()[:16]
    assert template_hash(huggingface(tmp_path, CHAT)) == template_hash(words())                  # the text counts, not whose tokenizer holds it


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
    (tmp_path / "cut.jsonl").write_text('{"a": "\u65e5"}', encoding="utf-8")                                              # a last line without its end is not glued to the next
    append_jsonl(tmp_path / "cut.jsonl", rows)
    assert (tmp_path / "cut.jsonl").read_bytes() == '{"a": "\u65e5"}\n'.encode() + (tmp_path / "new.jsonl").read_bytes()

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


R1 = ("{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
      "{{ '<\uff5cUser\uff5c>' + m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}")


def test_deepseek_r1_s_template(tmp_path: Path) -> None:
    """BOS from the template and one from the post-processor would be two; the thinking is open; a user turn's special tokens are the template's own, once each."""
    hf = huggingface(tmp_path, R1)
    ids = chat_ids(hf, "How many?")
    assert ids[0] == hf.bos_token_id and ids.count(hf.bos_token_id) == 1 and hf.decode(ids) == "<s><\uff5cUser\uff5c>How many?<\uff5cAssistant\uff5c><think>\n"
    assert opening(hf) == "<think>" and hf.eos_token_id not in ids
    prompt, target = token_pair(hf, "How many?", join_completion("Ann has 4.", "4"))
    assert prompt == ids and hf.decode(target) == "Ann has 4.</think>\n\\boxed{4}<|im_end|>" and hf.bos_token_id not in target


@pytest.mark.parametrize("template, opened", [(CHAT, ""), (PREFILL, "<think>"), (CHAT.replace("assistant\n", "assistant\n<think>\n"), "<think>"), (None, "<think>")])
def test_what_the_prompt_has_written_of_the_answer(tmp_path: Path, template: str | None, opened: str) -> None:
    for tok in (TiktokenTokenizer({**SPEC, "chat_template": template}), huggingface(tmp_path, template)):
        assert opening(tok) == opened
        assert split_completion(opening(tok) + "a</think>4") == ("a", "4") and split_completion(opening(tok) + "a 4") == ("a 4", None)

@pytest.mark.parametrize("special", [True, False])
def test_thinking_marks_stay_though_the_tokenizer_counts_them_among_its_special_tokens(tmp_path: Path, special: bool) -> None:
    hf = huggingface(tmp_path / "plain", CHAT)
    hf.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in ("<think>", "</think>")])
    hf.save_pretrained(tmp_path / "marks")
    hf = load_tokenizer(tmp_path / "marks")
    text = "<think>first \\boxed{7}, no</think>\nAnn has \\boxed{4}."
    ids = hf.encode(text, add_special_tokens=False)
    assert (hf.decode(ids, skip_special_tokens=True) == text) == (not special)
    assert whole_turns(hf, [ids + [hf.eos_token_id], ids[:1], [hf.eos_token_id], []]) == [text, "<think>", "", ""]
    ours = TiktokenTokenizer({**SPEC, "special": [*SPEC["special"], *(["<think>", "</think>"] if special else [])]})
    assert text_of(ours, ours.encode(text + "<|im_end|>")) == text


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    hf = huggingface(tmp_path / "one", CHAT)
    hf.chat_template = {"default": PREFILL, "tool_use": CHAT}
    hf.save_pretrained(tmp_path / "two")
    hf = load_tokenizer(tmp_path / "two")
    assert hf.decode(chat_ids(hf, "How many?")).endswith("assistant\n<think>") and template_hash(hf) == hashlib.sha256(PREFILL.encode()).hexdigest()[:16]
    hf.chat_template = {"tool_use": CHAT}
    assert hf.decode(chat_ids(hf, "How many?")).endswith("assistant\n") and template_hash(hf) == hashlib.sha256(CHAT.encode()).hexdigest()[:16]


def test_a_template_that_asks_for_the_day_is_always_told_the_same(tmp_path: Path) -> None:
    """Or a seed would give other completions tomorrow, and a resumed run other prompts."""
    dated = '{{ "Today Date: " + (strftime_now("%d %b %Y") if strftime_now is defined else "none") + "\n" }}' + CHAT
    hf = huggingface(tmp_path, dated)
    said, theirs = hf.decode(chat_ids(hf, "How many?")), hf.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    assert said.startswith("Today Date: 26 Jul 2024\n<|im_start|>user") and datetime.now().strftime("%d %b %Y") in theirs
    counting = TiktokenTokenizer({**SPEC, "chat_template": "\n{{ strftime_now('%Y-%m') }}-{{ strftime_now('%d') | int - 1 }} {{ strftime_now('%Y-%m-%d') }}"})
    assert counting.decode(chat_ids(counting, "?")) == "\n2024-07-25 2024-07-26"                # what stands before and behind stays
    ours = TiktokenTokenizer({**SPEC, "chat_template": dated})
    assert ours.decode(chat_ids(ours, "How many?")) == said and template_hash(ours) == template_hash(hf) != template_hash(words())

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


def word_level(folder: Path, special: dict[str, str], vocabulary: tuple[str, ...] = ("Ann", "has", "four")) -> Tokenizer:
    """A tokenizer that knows a few words and maps all others to one <unk>."""
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(("<unk>", *vocabulary, *dict.fromkeys(v for v in special.values() if v != "<unk>")))}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template="{{ messages[0].content }} :", **special).save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
@pytest.mark.parametrize("rules", ["words", "bytes", "metaspace"])
def test_a_tokenizer_reads_by_the_rules_of_its_file(rules: str, kind: type, tmp_path: Path) -> None:
    """AutoTokenizer takes a class by the type of the model, and that class its own rules, whatever tokenizer.json says (of a Qwen2 folder in 5.24, of a Llama one in 5.17)."""
    if rules == "words":
        backend = Backend(models.WordLevel({word: i for i, word in enumerate(("<unk>", "<end>", "one", "two", "12", "345"))}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        backend, byte_level = Backend(models.BPE(unk_token="<unk>")), rules == "bytes"
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.Metaspace()
        backend.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
        backend.train_from_iterator(["one two 12 345"] * 9, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<end>"], show_progress=False))
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")
    config = kind(vocab_size=len(tok), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "in")
    tok.save_pretrained(tmp_path / "in")
    data.save_model(*load_model(tmp_path / "in"), tmp_path / "out")
    for text in ("one two 12 345", "two one"):
        ids = tok.encode(text, add_special_tokens=False)
        for folder in ("in", "out"):
            again = load_tokenizer(tmp_path / folder)
            assert again.encode(text, add_special_tokens=False) == ids and again.decode(ids) == tok.decode(ids) == text and len(again) == len(tok)


@pytest.mark.parametrize("file, text", [("config.json", '{"model_type": "qwen2", "hidden_size": "64"}'), ("config.json", "[]"), ("tokenizer_config.json", "[]"),
                                        ("config.json", '{"model_type": "qwen2", "num_attention_heads": 0}'), ("tokenizer_config.json", '{"eos_token": 5}'),
                                        ("tiktoken.json", "[]"), ("tiktoken.json", '{"words": [1], "special": [2]}')])
def test_fields_of_another_kind_end_in_one_line(file: str, text: str, tmp_path: Path) -> None:
    hf = huggingface(tmp_path / "in")
    tiny(len(hf)).save_pretrained(tmp_path / "in")
    (tmp_path / "in" / file).write_text(text)
    with pytest.raises(ValueError, match="in: cannot be loaded; save or copy it again"):
        load_model(tmp_path / "in")


def test_an_unknown_word_ends_nothing(tmp_path: Path) -> None:
    """Without <|im_end|> in its vocabulary a word-level tokenizer encodes it as <unk>, one id: were that a stop id, any unknown word would end a completion."""
    model, tok = tiny(16), word_level(tmp_path / "a", {"eos_token": "</s>"})
    assert tok.encode("<|im_end|>", add_special_tokens=False) == tok.encode("whatever", add_special_tokens=False) == [0]
    assert stop_and_pad_ids(model, tok) == ({tok.eos_token_id}, tok.eos_token_id) and tok.pad_token_id is None           # and no pad token: eos fills
    same = word_level(tmp_path / "b", {"eos_token": "</s>", "pad_token": "</s>"})
    assert stop_and_pad_ids(model, same) == ({same.eos_token_id}, same.eos_token_id)
    known = word_level(tmp_path / "c", {"eos_token": "</s>", "pad_token": "<pad>"}, ("Ann", "<|endoftext|>"))
    assert stop_and_pad_ids(model, known) == ({known.eos_token_id, 2}, known.pad_token_id)


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(tmp_path: Path) -> None:
    tok = word_level(tmp_path, {"eos_token": "</s>", "bos_token": "<s>"})
    tok._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", tok.bos_token_id), ("</s>", tok.eos_token_id)])
    assert tok.encode("Ann")[-1] == tok.eos_token_id
    tok.chat_template = None
    ids = chat_ids(tok, "Ann has")
    assert ids[0] == tok.bos_token_id and tok.eos_token_id not in ids and ids[2:4] == tok.encode("Ann has", add_special_tokens=False)


@pytest.mark.parametrize("said, kept", [
    ({"temperature": 0.0}, (False, None, None)), ({"do_sample": False, "temperature": 0.6, "top_k": 5}, (False, None, None)),
    ({"temperature": 0.6}, (True, 0.6, None)), ({"do_sample": True, "temperature": 0.6, "top_k": 5}, (True, 0.6, 5)), ({}, (None, None, None))])
def test_a_base_that_answers_greedily_stays_one_and_what_is_saved_can_be_used(said: dict, kept: tuple, tmp_path: Path) -> None:
    """transformers loads settings that contradict each other, and neither saves nor generates by them."""
    hf = huggingface(tmp_path / "in")
    tiny(len(hf)).save_pretrained(tmp_path / "in")
    (tmp_path / "in/generation_config.json").write_text(json.dumps(said | {"eos_token_id": 5}))
    data.save_model(*load_model(tmp_path / "in"), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (again.generation_config.do_sample, again.generation_config.temperature, again.generation_config.top_k) == kept
    assert again.generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape[1] <= 4
    (tmp_path / "in/generation_config.json").write_text(json.dumps(said | {"eos_token_id": [5, 7, 9]})[:-6])
    with pytest.raises(ValueError, match="in: cannot be loaded.*generation_config.json"):      # else the ids that end a text would be lost without a word
        load_model(tmp_path / "in")


def test_a_tokenizer_without_an_end_says_what_to_do(tmp_path: Path) -> None:
    model, tok = tiny(16), word_level(tmp_path, {})
    with pytest.raises(ValueError, match="set eos_token in its tokenizer_config.json"):
        stop_and_pad_ids(model, tok)
    model.generation_config.eos_token_id = 3                         # the model knows one
    assert stop_and_pad_ids(model, tok) == ({3}, 3)


def test_ids_of_a_padded_embedding_have_no_text_and_do_no_harm(tmp_path: Path) -> None:
    for tok in (words(), huggingface(tmp_path)):
        ids = tok.encode("Ann has", add_special_tokens=False)
        assert tok.decode([len(tok), *ids, len(tok) + 399, 151_999]) == "Ann has" == tok.decode([*ids, 10**6], skip_special_tokens=True)
    folder = tmp_path / "padded"
    tiny(len(words()) + 40).save_pretrained(folder)
    words().save_pretrained(folder)
    model, tok = load_model(folder)
    model.get_output_embeddings().register_forward_hook(               # it says nothing but such an id
        lambda module, args, out: torch.nn.functional.one_hot(torch.tensor(len(tok) + 7), out.shape[-1]).expand_as(out) * 99.0)
    rollout = Sampler(model, *stop_and_pad_ids(model, tok)).generate([[1, 2]], 1, 3, 1.0)
    assert rollout.completion(0) == [len(tok) + 7] * 3 and data.whole_turns(tok, [rollout.completion(0)]) == [""]


# ------------------------------------------------------------------------------------------------ what cannot be loaded: one line each


def checkpoint(folder: Path, tied: bool = False) -> Path:
    model = tiny(len(words()))
    model.config.tie_word_embeddings = tied
    if tied:
        model = AutoModelForCausalLM.from_config(model.config)
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def refused(path: Path | str) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        load_model(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: ")
    return str(error.value)


def test_a_path_that_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "there is no such folder; give a checkpoint folder, or a hub name such as"
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "nowhere", "./nowhere", "a/b/c", "bad name", f"../{tmp_path.name}/nowhere"):
        assert wanted in refused(path)
    assert "is a file; give the folder that save_pretrained wrote" in refused(tmp_path / "file")
    assert "no config.json in this folder" in refused(tmp_path)
    (tmp_path / "out").mkdir()
    assert wanted in refused("out/gsmr")                             # beside a run's folders: not a name to ask the hub for
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "neither a folder here nor a hub name that can be reached (" in refused("nobody/nothing")


@pytest.mark.parametrize("damage", ["half", "empty", "garbage", "gone", "config", "type", "tokenizer"])
def test_a_damaged_checkpoint(tmp_path: Path, damage: str) -> None:
    folder = checkpoint(tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    match damage:
        case "half" | "empty" | "garbage":
            weights.write_bytes({"half": whole[:len(whole) // 2], "empty": b"", "garbage": b"x" * 400}[damage])
        case "gone":
            weights.unlink()
        case "config" | "type":
            (folder / "config.json").write_text({"config": '{"a":', "type": '{"model_type": "none"}'}[damage])
        case "tokenizer":
            (folder / "tiktoken.json").unlink()
    assert "cannot be loaded; save or copy it again (" in refused(folder)


@pytest.mark.parametrize("part", ["pre_tokenizer", "model", "decoder", "normalizer"])
def test_a_tokenizer_file_with_a_part_that_is_not_known_here(tmp_path: Path, part: str) -> None:
    """As a newer version of `tokenizers` writes it: that library raises a bare Exception."""
    folder = checkpoint(tmp_path / "model")
    (folder / "tiktoken.json").unlink()
    spec = json.loads(Backend(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a")).to_str()) | {part: {"type": "FromTomorrow"}}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert "cannot be loaded; save or copy it again (" in refused(folder)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    """transformers fills them with random numbers and goes on."""
    folder = checkpoint(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({name: w for name, w in weights.items() if name != "lm_head.weight"}, folder / "model.safetensors", {"format": "pt"})
    assert "1 weights are missing or of another size (first: lm_head.weight)" in refused(folder)
    save_file({**weights, "lm_head.weight": weights["lm_head.weight"][:-1].clone()}, folder / "model.safetensors", {"format": "pt"})
    assert f"first: lm_head.weight ({len(words()) - 1}, 16) instead of ({len(words())}, 16)" in refused(folder)
    model, _ = load_model(checkpoint(tmp_path / "tied", tied=True), dtype="bfloat16")            # a tied head is not in the file, and not missing
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight and model.get_input_embeddings().weight.dtype == torch.bfloat16


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
    assert out.startswith(f"1 problems, 2 teacher traces; template {template_hash(words())}\n")
    path = file_of(tmp_path, "{broken", GOOD)
    for flags, says in (([], f"error: {path}:1: not valid JSON"), (["--skip_bad"], f"1 bad lines of {path} passed over:\n  {path}:1: not valid JSON")):
        monkeypatch.setattr(sys, "argv", ["data.py", str(path), "--model", str(tmp_path / "model"), *flags])
        with nullcontext() if flags else pytest.raises(SystemExit) as end:
            runpy.run_path(str(Path(__file__).parent.parent / "data.py"), run_name="__main__")
        out, err = capsys.readouterr()
        assert says in (err if flags else end.value.code) and out.startswith("1 problems, 2 teacher traces") == bool(flags)


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] + 1 }}", "{{ 1 // 0 }}", "{{ nothing.there }}"])
def test_a_template_or_a_tokenizer_file_that_is_broken_ends_in_one_line(template, tmp_path):
    shutil.copytree("toy/student", tmp_path / "own")
    file = tmp_path / "own/tiktoken.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(spec | {"chat_template": template}), encoding="utf-8")
    with pytest.raises(ValueError, match="the chat template cannot make a prompt"):
        data.chat_ids(data.load_tokenizer(tmp_path / "own"), "hello")
    file.write_text(json.dumps({"pattern": "."}), encoding="utf-8")
    with pytest.raises(ValueError, match="own: cannot be loaded"):
        data.load_tokenizer(tmp_path / "own")
