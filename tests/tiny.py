"""Tiny Hugging Face checkpoints for tests: randomly initialised Qwen2, Qwen3 and Llama models with a byte-level BPE tokenizer and the chat template of their family; and a line of
an evaluation's file."""
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from gsrm import Step, words

CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"                # Qwen's
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
R1 = ("{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}"                                   # DeepSeek-R1's: a BOS, and the prompt opens the thinking
      "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}")
SPECIAL = {"chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "r1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")}


def tokenizer(template: str, texts: Iterable[str] = (), size: int = 2000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` tokens, its merges learnt on `texts`, digits one by one; "chatml" pads with another token than it ends with, "r1"
    writes a BOS of its own and pads with its EOS, as the real ones do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL[template]), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    backend.train_from_iterator([*texts, "yes no yes no"] * 2, trainer)
    backend.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ("<think>", "</think>")])
    if template == "chatml":
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML)
    bos, eos = SPECIAL["r1"][:2]
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos, chat_template=R1)


def checkpoint(folder: Path, kind: str, tok: PreTrainedTokenizerFast, tied: bool = False, hidden: int = 32, layers: int = 2, positions: int = 2048, spare: int = 37) -> Path:
    """A checkpoint with random weights in `folder`; its embedding has `spare` rows that no token uses, as Qwen's has."""
    torch.manual_seed(0)
    config = CONFIGS[kind](vocab_size=len(tok) + spare, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
                           head_dim=hidden // 4, max_position_embeddings=positions, tie_word_embeddings=tied,
                           bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def read(trace: str) -> list[Step]:
    """A rule that finds one step in any trace: two traces share its query or not, as it happens, and not its answer, so that a random model's group has a spread."""
    return [Step("there is a text", f"has it an {'odd' if sum(map(ord, trace)) % 2 else 'even'} sum", (words(trace) or ["nothing"])[0])]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(folder: Path, port: int) -> subprocess.Popen:
    """`transformers serve` on 127.0.0.1, ready to answer."""
    with (folder / "serve.log").open("w") as log:
        words = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
                if reply.status == 200:
                    return process
        except OSError:
            time.sleep(0.2)
    process.kill()
    pytest.fail(f"transformers serve did not start, exit status {process.wait()}: {(folder / 'serve.log').read_text()[-500:]}")


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The checkpoint behind `transformers serve` on 127.0.0.1; the URL of its API."""
    port = free_port()
    server = serve(folder, port)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait(30)


def row(name: str, correct: bool | None, answer: str | None = None, sample: int = 0, temperature: float = 1.0, **more: object) -> dict:
    """A line of an evaluation's file."""
    return {"id": name, "sample": sample, "temperature": temperature, "correct": correct, "answer": answer, "structure": None, "true_structure": None, "length": 10, "stop": "stop",
            "text": "", "problem": f"P {name}?", "gold": "1", "steps": None, "left_at": None, "choices": None} | more
