"""Problems in, prompts out: everything between a file on disk and a list of token ids.

A problem is one JSONL line

    {"id": "p1", "problem": "How many has Ann? ...", "answer": "4", "teachers": ["<one reasoning trace>", ...], "domain": "math"}

where `teachers` holds the K reasoning traces of the teacher (none are needed for evaluation). A completion of a student is
`<trace></think><final answer>`; the opening `<think>` may stand in the prompt (as DeepSeek-R1-Distill's template puts it) or in the completion (`opening`).

Show what a model will read:    python data.py toy --model toy/student        (--skip_bad lists broken lines instead of stopping at the first)
Convert a public data set:      python data.py convert gsm8k --input gsm8k_train.jsonl --out train.jsonl        (convert.py)
Left out on purpose: dataset objects, collators, streaming. A list of Problems fits in memory at any size this method needs (3.2K in the paper).
"""
import hashlib
import importlib
import json
import re
import sys
from dataclasses import dataclass, fields
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Protocol

import tiktoken
import torch
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from command import Parser, decoded, ending, full_disk, one_line, put_aside, tell
from parallel import use_device

disable_progress_bar()                                   # weights load in a moment; the screen belongs to the run
PROBE = "How many has Ann?\n\n  1,234 + x\u00b2 = \\frac{1}{2}; I'm \u4e2d\u6587 \u00fc <think>\n"         # what tokenizers cut in ways of their own

# ------------------------------------------------------------------------------------------------ problems

@dataclass(frozen=True)
class Problem:
    """One problem with its gold answer and the teacher's K reasoning traces (K may be 0)."""
    id: str
    problem: str
    answer: str
    teachers: tuple[str, ...] = ()
    domain: str = "math"


def half_pair(value: object) -> bool:
    """Does a text hold half of a surrogate pair? JSON can write it, UTF-8 and tokenizers cannot."""
    return isinstance(value, str) and re.search("[\\ud800-\\udfff]", value) is not None


def check_record(record: object, where: str) -> Problem:
    """A Problem from one decoded JSON line; ValueError names the place, the field and what was expected there."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}: write one problem a line")
    known = [f.name for f in fields(Problem)]
    if unknown := sorted(set(record) - set(known)):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; a problem has the fields {', '.join(known)}")
    for name in ("id", "problem", "answer", "domain"):
        value = record.get(name, "math" if name == "domain" else None)
        if not isinstance(value, str) or not value.strip() or half_pair(value):
            raise ValueError(f"{where}: field {name!r} must be a non-empty string, got {value!r}{' (surrogates not allowed)' * half_pair(value)}")
    teachers = record.get("teachers", [])
    if not isinstance(teachers, list) or not all(isinstance(t, str) and t.strip() and not half_pair(t) and not re.search("</?think>", t) for t in teachers):
        raise ValueError(f"{where}: field 'teachers' must be a list of non-empty strings without <think> and </think> (a trace stands between them), got {str(teachers)[:80]!r}")
    return Problem(**{**record, "teachers": tuple(teachers)})


def read_jsonl(path: str | Path, bad: list[str] | None = None) -> list[tuple[str, object]]:
    """[(place, decoded line)] of a JSONL file; blank lines are passed over. A line that is not JSON in UTF-8 is a ValueError naming file and line, or goes to `bad`."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):          # not splitlines: U+2028 is no line end in JSON
        if line.strip():
            try:
                rows.append((where := f"{path}:{number}", decoded(line, where)))
            except ValueError as error:
                put_aside(str(error), bad)
    return rows


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def append_jsonl(path: str | Path, rows: list[dict]) -> None:
    """The same, at the end of a file, whose last line may lack its own end."""
    with Path(path).open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        file.write(b"\n" * (file.read(1) not in (b"", b"\n")) + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def data_file(path: str | Path, split: str = "train") -> Path:
    """The JSONL file that is meant by a file, or by a folder that holds `split`.jsonl ("toy" is the folder toy/); FileNotFoundError."""
    file = Path(path) / f"{split}.jsonl" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no problems at {file}: give a JSONL file, or a folder that holds {split}.jsonl (as seen from {Path.cwd()})")
    return file


def file_hash(path: str | Path) -> str:
    """16 hex digits of a file's SHA-256: which data a run has read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def load_problems(path: str | Path, split: str = "train", skip_bad: bool = False) -> list[Problem]:
    """Problems of `data_file(path, split)`. Every line is checked, ids must be unique: ValueError at the first bad line, or with skip_bad a list of them on stderr.
    Problems that repeat an earlier one's text are listed there too, and kept."""
    file, bad = data_file(path, split), [] if skip_bad else None
    problems, seen, texts, repeats = [], {}, {}, []                      # seen: id -> its place; texts: text -> its first id
    for where, record in read_jsonl(file, bad):
        try:
            problem = check_record(record, where)
            if problem.id in seen:
                raise ValueError(f"{where}: id {problem.id!r} was used before, at {seen[problem.id]}; ids must be unique")
        except ValueError as error:
            put_aside(str(error), bad)
            continue
        if (first := texts.setdefault(problem.problem, problem.id)) != problem.id:
            repeats.append(f"{where}: {problem.id!r} reads as {first!r}")
        seen[problem.id] = where
        problems.append(problem)
    tell(f"bad lines of {file} passed over", bad or [])
    tell(f"problems of {file} repeat an earlier one, and were kept", repeats, 20)
    if not problems:
        raise ValueError(f"{file}: holds no problems")
    return problems

# ------------------------------------------------------------------------------------------------ tokenizers and models

class Tokenizer(Protocol):
    """The part of Hugging Face's tokenizer interface that the project uses."""
    chat_template: str | None
    eos_token_id: int | None
    pad_token_id: int | None
    def __len__(self) -> int: ...
    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool = ...) -> str: ...
    def apply_chat_template(self, messages: list[dict], *, chat_template: str, tokenize: bool = ..., add_generation_prompt: bool = ...) -> str: ...
    def save_pretrained(self, path: str) -> object: ...


@cache
def compiled(chat_template: str) -> Template:
    """Once per template: a millisecond, which would else be paid for every prompt and every trace that GSRM reads."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(chat_template)


class TiktokenTokenizer:
    """A `tiktoken.Encoding` behind Hugging Face's method names, from a folder's tiktoken.json:
    {"pattern": regex, "words": [...], "special": [...], "eos": ..., "pad": ..., "chat_template": jinja, "instruction": text}.
    Ids: 0-255 are the bytes, then the words (a word that the pattern cuts out whole is one token), then the special tokens; any text can be encoded."""

    def __init__(self, spec: dict):
        ranks = {bytes([b]): b for b in range(256)} | {word.encode(): 256 + i for i, word in enumerate(spec["words"])}
        special = {token: len(ranks) + i for i, token in enumerate(spec["special"])}
        self.spec, self.encoding = spec, tiktoken.Encoding(spec["name"], pat_str=spec["pattern"], mergeable_ranks=ranks, special_tokens=special)
        self.eos_token_id, self.pad_token_id, self.special_ids = special[spec["eos"]], special[spec["pad"]], set(special.values())
        self.chat_template: str | None = spec["chat_template"]
        self.instruction: str = spec["instruction"]

    def __len__(self) -> int:
        return self.encoding.n_vocab

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.encoding.encode(text, allowed_special="all")

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return self.encoding.decode([i for i in ids if i < len(self) and not (skip_special_tokens and i in self.special_ids)])     # a padded embedding has ids without text

    def apply_chat_template(self, messages: list[dict], chat_template: str = "", tokenize: bool = False, add_generation_prompt: bool = True) -> str:
        return compiled(chat_template or self.chat_template).render(messages=messages, add_generation_prompt=add_generation_prompt)

    def save_pretrained(self, path: str | Path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "tiktoken.json").write_text(json.dumps(self.spec, indent=1, ensure_ascii=False), encoding="utf-8")


def check_folder(path: str | Path, needs: str = "") -> None:
    """FileNotFoundError where `path` is neither a folder (that holds the file `needs`) nor what could be a name on the hub, ValueError for a training checkpoint."""
    folder = Path(path)
    if needs and (folder / "manifest.json").is_file() and (folder / "state.json").is_file():
        raise ValueError(f"{path} is a training checkpoint: `python checkpoint.py {path} --out FOLDER` makes a model of it")
    if not folder.exists() and (not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path)) or folder.parent != Path() and folder.parent.is_dir()):
        raise FileNotFoundError(f"{path}: there is no such folder; give a checkpoint folder, or a hub name such as Qwen/Qwen2.5-7B-Instruct")
    if folder.is_file() or folder.is_dir() and not (folder / needs).exists():
        raise FileNotFoundError(f"{path}: {'is a file' if folder.is_file() else f'no {needs} in this folder'}; give "
                                + (str(folder / "model") if (folder / "model" / "config.json").is_file() else "the folder that save_pretrained wrote"))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder (or hub name): a tiktoken.json if one lies there, else transformers' AutoTokenizer, unless tokenizer.json says otherwise: for some
    types of model transformers puts a class's own rules in the place of the file's (a Llama checkpoint with byte-level words, in 5.17), or tokens of its own (Qwen2)."""
    check_folder(path, "" if any(Path(path).glob("*.json")) else "config.json")
    with one_line(path):
        if (spec := Path(path) / "tiktoken.json").is_file():
            return TiktokenTokenizer(json.loads(spec.read_text(encoding="utf-8")))
        tokenizer = AutoTokenizer.from_pretrained(path)
        if cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False):
            written = PreTrainedTokenizerFast.from_pretrained(path)
            ids, again = (t.encode(PROBE, add_special_tokens=False) for t in (written, tokenizer))
            if ids != again or written.decode(ids) != tokenizer.decode(ids) or written.get_vocab() != tokenizer.get_vocab():
                tokenizer = written
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):                         # what AutoTokenizer makes of a Qwen folder without tokenizer files
            raise ValueError("its tokenizer knows no words: tokenizer files are missing")
        return tokenizer


def load_model(path: str | Path, device: str = "cpu", dtype: str = "float32") -> tuple[PreTrainedModel, Tokenizer]:
    """(causal LM, tokenizer) of a checkpoint folder or hub name, the model in eval mode on `device`. ValueError where weights are missing or of other sizes (transformers would go
    on with random ones) or not finite, for a device that is not there, or where the tokenizer has more tokens than the embedding; fewer are fine (Qwen pads 151665 to 152064)."""
    use_device(str(device))
    check_folder(path, "config.json")
    tokenizer = load_tokenizer(path)
    with one_line(path):
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
        if Path(path, "generation_config.json").is_file():
            GenerationConfig.from_pretrained(path)       # a broken one is passed over above, and with it the ids that end a text
    if wrong := sorted(report["missing_keys"]) + sorted(f"{name} {tuple(have)} instead of {tuple(want)}" for name, have, want in report["mismatched_keys"]):
        raise ValueError(f"{path}: {len(wrong)} weights are missing or of another size (first: {wrong[0]}), so this is no checkpoint of a {type(model).__name__}")
    if len(tokenizer) > (rows := model.get_input_embeddings().weight.shape[0]):
        raise ValueError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows}: they do not belong together")
    if broken := next((name for name, p in model.to(device).named_parameters() if not p.isfinite().all()), None):
        raise ValueError(f"{path}: {broken} holds numbers that are not finite: the training that wrote this checkpoint had failed; take an earlier one")
    if unused := report["unexpected_keys"]:
        print(f"{path}: {len(unused)} weights are left out, a {type(model).__name__} has no place for them (first: {min(unused)})", file=sys.stderr)
    if (head := model.get_output_embeddings()) is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False         # says otherwise where the file has a head of its own: transformers takes the file's
    settings, of_sampling = model.generation_config, ("temperature", "top_p", "top_k")                # without sampling they contradict it: could be loaded, but not saved again
    if settings.do_sample is False or settings.temperature == 0:
        settings.update(do_sample=False, **dict.fromkeys(of_sampling))
    elif any(getattr(settings, name, None) is not None for name in of_sampling):
        settings.do_sample = True
    return model.eval(), tokenizer


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, path: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """The inverse of load_model: a Hugging Face checkpoint folder. `state`: the whole tensors, where the model itself has only shards."""
    with full_disk(path):
        model.save_pretrained(path, state_dict=state)
        tokenizer.save_pretrained(str(path))


def stop_and_pad_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> tuple[set[int], int]:
    """(every id that ends a completion, the id that fills unused places). The pad id is never looked for in data: lengths say where a row ends.
    ValueError where nothing ends a completion."""
    eos = model.generation_config.eos_token_id
    stops = ({tokenizer.eos_token_id} | set([eos] if isinstance(eos, int) else eos or [])) - {None}
    for token in ("<|im_end|>", "<|endoftext|>", "<|eot_id|>"):              # Qwen base stops at one, its chat template at the other
        ids = tokenizer.encode(token, add_special_tokens=False)
        stops |= set(ids) if len(ids) == 1 and tokenizer.decode(ids) == token else set()           # <unk> is one id too
    if not stops:
        raise ValueError(NO_EOS)
    return stops, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops)

# ------------------------------------------------------------------------------------------------ prompts and completions

NO_EOS = "the tokenizer has no token that ends a text: set eos_token in its tokenizer_config.json"
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}Assistant: <think>\n"   # for a base model without one
A_DAY = "{%- macro strftime_now(form) %}{{ form" + "".join(f"|replace('%{a}', '{b}')" for a, b in zip("dmbBY", ("26", "07", "Jul", "July", "2024"))) + " }}{% endmacro %}{{ '' }}"


def template_of(tokenizer: Tokenizer) -> str:
    """The chat template in use: of several named ones the default, or first; one that asks what day it is (Llama 3.2's) is always told the same, so that a seed's samples stay."""
    template = named.get("default", next(iter(named.values()))) if isinstance(named := tokenizer.chat_template or PLAIN_TEMPLATE, dict) else named
    return A_DAY * ("strftime_now" in template) + template


def chat_ids(tokenizer: Tokenizer, content: str) -> list[int]:
    """Token ids of one user turn under the model's own chat template (PLAIN_TEMPLATE if it has none), ready for the answer.
    A template writes its own BOS, so none is added; without a template the tokenizer's own BOS, if any, stands in front."""
    messages = [{"role": "user", "content": content}]
    try:
        text = (tokenizer.apply_chat_template(messages, chat_template=template_of(tokenizer), tokenize=False, add_generation_prompt=True) if tokenizer.chat_template
                else compiled(PLAIN_TEMPLATE + "\n").render(messages=messages))                  # jinja drops a template's last line end
    except (TemplateError, TypeError, ArithmeticError) as error:
        raise ValueError(f"the chat template cannot make a prompt of one user turn ({error}): mend it, or take it out of the tokenizer's files") from None
    ids = tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template)
    return ids[:-1] if not tokenizer.chat_template and ids[-1] == tokenizer.eos_token_id else ids        # some tokenizers end every text


def template_hash(tokenizer: Tokenizer) -> str:
    """16 hex digits of the SHA-256 of the chat template in use: two runs that differ here have read different prompts."""
    return hashlib.sha256(template_of(tokenizer).encode()).hexdigest()[:16]


def problem_ids(tokenizer: Tokenizer, problem: Problem, instruction: str | None = None) -> list[int]:
    """The student's prompt: the problem and, on its own paragraph, the instruction (None: the tokenizer's own if it has one, else INSTRUCTION)."""
    instruction = getattr(tokenizer, "instruction", INSTRUCTION) if instruction is None else instruction
    return chat_ids(tokenizer, f"{problem.problem}\n\n{instruction}" if instruction else problem.problem)


def opening(tokenizer: Tokenizer) -> str:
    """What the prompt has already written of the assistant's turn: "<think>" or nothing."""
    return "<think>" if tokenizer.decode(chat_ids(tokenizer, "?")).rstrip().endswith("<think>") else ""


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What was sampled as text, without special tokens; <think> and </think>, which some tokenizers count among them, stay."""
    words = (tokenizer.encode(word, add_special_tokens=False) for word in ("<think>", "</think>"))
    marks = {word[0] for word in words if len(word) == 1 and not tokenizer.decode(word, skip_special_tokens=True) and "think>" in tokenizer.decode(word)}       # no <unk>
    return "".join(tokenizer.decode(list(part), skip_special_tokens=not kept) for kept, part in groupby(ids, marks.__contains__))


def whole_turns(tokenizer: Tokenizer, completions: list[list[int]]) -> list[str]:
    """The assistant's turn of each completion as text: what the prompt has written of it, then what was sampled, without special tokens."""
    start = opening(tokenizer)
    return [start + text_of(tokenizer, ids) for ids in completions]


def split_completion(text: str) -> tuple[str, str | None]:
    """(trace, final): what stands before and after `</think>`; final is None where the thinking never ended (a truncated completion)."""
    trace, closed, final = re.sub(r"^\s*<think>", "", text, count=1).partition("</think>")
    return trace.strip(), final.strip() if closed else None


def join_completion(trace: str, answer: str) -> str:
    """The inverse: the text that a teacher's trace is taught as by sft.py."""
    return f"{trace.strip()}</think>\n\\boxed{{{answer}}}"


def show(argv: list[str]) -> None:
    """Prints a file's first problem and its prompt, token by token, under a model's tokenizer."""
    parser = Parser(prog="python data.py", allow_abbrev=False, description="Prints a file's first problem and its prompt's tokens; `python data.py convert -h` converts data sets.")
    parser.add_argument("data", help="problems: JSONL, or a folder with train.jsonl")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name, for its tokenizer")
    parser.add_argument("--skip_bad", action="store_true", help="list bad lines instead of stopping at one")
    args = parser.parse_args(argv)
    with ending():
        problems, tok = load_problems(args.data, skip_bad=args.skip_bad), load_tokenizer(args.model)
        ids = problem_ids(tok, problems[0])
    print(f"{len(problems)} problems, {sum(len(p.teachers) for p in problems)} teacher traces; template {template_hash(tok)}\n\n{problems[0]}\n")
    print(f"{len(ids)} tokens: {[tok.decode([i]) for i in ids]}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["convert"]:                      # as a command it needs the converters; as a module it needs none
        with ending():                                   # Ctrl-C
            importlib.import_module("convert").main(sys.argv[2:])
    else:
        show(sys.argv[1:])
