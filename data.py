"""Problems in, prompts out: everything between a file on disk and a list of token ids.

A problem is one JSONL line

    {"id": "p1", "problem": "How many has Ann? ...", "answer": "4", "teachers": ["<one reasoning trace>", ...], "domain": "math"}

where `teachers` holds the K reasoning traces of the teacher (none are needed for evaluation). A completion of a student is
`<trace></think><final answer>`; the opening `<think>` may stand in the prompt (as DeepSeek-R1-Distill's template puts it) or in the completion (`opening`).

Show what a model will read:    python data.py toy --model toy/student
Convert a public data set:      python data.py convert gsm8k --input gsm8k_train.jsonl --out train.jsonl        (convert.py)
Left out on purpose: dataset objects, collators, streaming. A list of Problems fits in memory at any size this method needs (3.2K in the paper).
"""
import argparse
import importlib
import json
import re
import sys
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Protocol

import tiktoken
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()                                   # weights load in a moment; the screen belongs to the run

# ------------------------------------------------------------------------------------------------ problems

@dataclass(frozen=True)
class Problem:
    """One problem with its gold answer and the teacher's K reasoning traces (K may be 0)."""
    id: str
    problem: str
    answer: str
    teachers: tuple[str, ...] = ()
    domain: str = "math"


def check_record(record: object, where: str) -> Problem:
    """A Problem from one decoded JSON line; ValueError names the place, the field and what was expected there."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    known = [f.name for f in fields(Problem)]
    if unknown := sorted(set(record) - set(known)):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; a problem has the fields {', '.join(known)}")
    for name in ("id", "problem", "answer", "domain"):
        value = record.get(name, "math" if name == "domain" else None)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: field {name!r} must be a non-empty string, got {value!r}")
    teachers = record.get("teachers", [])
    if not isinstance(teachers, list) or not all(isinstance(t, str) and t.strip() for t in teachers):
        raise ValueError(f"{where}: field 'teachers' must be a list of non-empty strings, got {str(teachers)[:80]!r}")
    return Problem(**{**record, "teachers": tuple(teachers)})


def read_jsonl(path: str | Path) -> list[tuple[str, object]]:
    """[(place, decoded line)] of a JSONL file; blank lines are passed over; ValueError names the file and the line that is not JSON."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):   # not splitlines: U+2028 is no line end in JSON
        if line.strip():
            try:
                rows.append((f"{path}:{number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})") from None
    return rows


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def append_jsonl(path: str | Path, rows: list[dict]) -> None:
    """The same, at the end of a file."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def load_problems(path: str | Path, split: str = "train") -> list[Problem]:
    """Problems of a JSONL file, or of `split`.jsonl in a folder (so "toy" is the folder toy/). Every line is checked, ids must be unique."""
    file = Path(path) / f"{split}.jsonl" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no problems at {file}: give a JSONL file, or a folder that holds {split}.jsonl")
    problems, seen = [], {}
    for where, record in read_jsonl(file):
        problem = check_record(record, where)
        if problem.id in seen:
            raise ValueError(f"{where}: id {problem.id!r} was used before, at {seen[problem.id]}; ids must be unique")
        seen[problem.id] = where
        problems.append(problem)
    if not problems:
        raise ValueError(f"{file}: holds no problems")
    return problems

# ------------------------------------------------------------------------------------------------ tokenizers and models

class Tokenizer(Protocol):
    """The part of Hugging Face's tokenizer interface that the project uses."""
    chat_template: str | None
    eos_token_id: int
    pad_token_id: int | None
    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool = ...) -> str: ...
    def apply_chat_template(self, messages: list[dict], tokenize: bool = ..., add_generation_prompt: bool = ...) -> str: ...
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
        return self.encoding.decode([i for i in ids if not (skip_special_tokens and i in self.special_ids)])

    def apply_chat_template(self, messages: list[dict], tokenize: bool = False, add_generation_prompt: bool = True) -> str:
        return compiled(self.chat_template).render(messages=messages, add_generation_prompt=add_generation_prompt)

    def save_pretrained(self, path: str | Path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "tiktoken.json").write_text(json.dumps(self.spec, indent=1, ensure_ascii=False), encoding="utf-8")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder (or hub name): a tiktoken.json if one lies there, else transformers' AutoTokenizer."""
    spec = Path(path) / "tiktoken.json"
    return TiktokenTokenizer(json.loads(spec.read_text(encoding="utf-8"))) if spec.is_file() else AutoTokenizer.from_pretrained(path)


def load_model(path: str | Path, device: str = "cpu", dtype: str = "float32") -> tuple[PreTrainedModel, Tokenizer]:
    """(causal LM, tokenizer) of a checkpoint folder or hub name, the model in eval mode on `device`."""
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise ValueError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {model.get_input_embeddings().weight.shape[0]}: "
                         "they do not belong together")
    return model, tokenizer


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, path: str | Path) -> None:
    """The inverse of load_model: a Hugging Face checkpoint folder."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(str(path))


def stop_and_pad_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> tuple[set[int], int]:
    """(every id that ends a completion, the id that fills unused places). The pad id is never looked for in data: lengths say where a row ends."""
    eos = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id} | set([eos] if isinstance(eos, int) else eos or [])
    for token in ("<|im_end|>", "<|endoftext|>", "<|eot_id|>"):              # Qwen base stops at one, its chat template at the other
        ids = tokenizer.encode(token, add_special_tokens=False)
        stops |= set(ids) if len(ids) == 1 else set()
    stops.discard(None)
    return stops, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops)

# ------------------------------------------------------------------------------------------------ prompts and completions

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}Assistant: <think>\n"   # for a base model without one


def chat_ids(tokenizer: Tokenizer, content: str) -> list[int]:
    """Token ids of one user turn under the model's own chat template (PLAIN_TEMPLATE if it has none), ready for the answer.
    A template writes its own BOS, so none is added; without a template the tokenizer's own BOS, if any, stands in front."""
    messages = [{"role": "user", "content": content}]
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = ImmutableSandboxedEnvironment(keep_trailing_newline=True).from_string(PLAIN_TEMPLATE).render(messages=messages)
    return tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template)


def problem_ids(tokenizer: Tokenizer, problem: Problem, instruction: str | None = None) -> list[int]:
    """The student's prompt: the problem and, on its own paragraph, the instruction (None: the tokenizer's own if it has one, else INSTRUCTION)."""
    instruction = getattr(tokenizer, "instruction", INSTRUCTION) if instruction is None else instruction
    return chat_ids(tokenizer, f"{problem.problem}\n\n{instruction}" if instruction else problem.problem)


def opening(tokenizer: Tokenizer) -> str:
    """What the prompt has already written of the assistant's turn: "<think>" or nothing."""
    return "<think>" if tokenizer.decode(chat_ids(tokenizer, "?")).rstrip().endswith("<think>") else ""


def whole_turns(tokenizer: Tokenizer, completions: list[list[int]]) -> list[str]:
    """The assistant's turn of each completion as text: what the prompt has written of it, then what was sampled, without special tokens."""
    start = opening(tokenizer)
    return [start + tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]


def split_completion(text: str) -> tuple[str, str | None]:
    """(trace, final): what stands before and after `</think>`; final is None where the thinking never ended (a truncated completion)."""
    trace, closed, final = re.sub(r"^\s*<think>", "", text, count=1).partition("</think>")
    return trace.strip(), final.strip() if closed else None


def join_completion(trace: str, answer: str) -> str:
    """The inverse: the text that a teacher's trace is taught as by sft.py."""
    return f"{trace.strip()}</think>\n\\boxed{{{answer}}}"


def show(argv: list[str]) -> None:
    """Prints a file's first problem and its prompt, token by token, under a model's tokenizer."""
    parser = argparse.ArgumentParser(prog="python data.py", description="`python data.py convert -h` converts public data sets; otherwise prints a first problem and its prompt's tokens.")
    parser.add_argument("data", help="problems: JSONL, or a folder with train.jsonl")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name, for its tokenizer")
    args = parser.parse_args(argv)
    try:
        first, tok = load_problems(args.data)[0], load_tokenizer(args.model)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    ids = problem_ids(tok, first)
    print(f"{first}\n\n{len(ids)} tokens: {[tok.decode([i]) for i in ids]}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["convert"]:                      # as a command it needs the converters; as a module it needs none
        importlib.import_module("convert").main(sys.argv[2:])
    else:
        show(sys.argv[1:])
