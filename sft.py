"""Next-token training on (prompt, target) pairs, loss on the targets only: it trains GSRM and the toy's models, and is the SFT baseline.

    loss = - sum over target tokens of log p(token | prompt, earlier tokens) / number of target tokens of the optimiser step

    python sft.py --model toy/student --data toy --epochs 3 --out out/sft            # the SFT baseline: imitate the teacher's traces token by token
    python sft.py --model PATH --data pairs.jsonl --out out/mine                     # lines {"prompt": ..., "target": ...}

The log-probs come from logprob.py, so [N, V] logits are never held. One process; left out on purpose: LoRA, packing.
"""
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedModel

from data import Tokenizer, chat_ids, join_completion, load_model, load_problems, opening, problem_ids, read_jsonl, save_model
from logprob import linear_logprob
from rollout import check_head, micro_batches, predictors

Pair = tuple[list[int], list[int]]                      # prompt ids, target ids


@dataclass(frozen=True)
class Config:
    """Flags of `python sft.py`; the defaults are the paper's for GSRM (section 4.1) where it gives any."""
    model: str = field(metadata={"help": "checkpoint folder or hub name to start from"})
    data: str = field(metadata={"help": "problems with teacher traces (JSONL or folder), or JSONL of prompt/target pairs"})
    out: str = field(metadata={"help": "folder of the trained checkpoint"})
    instruction: str | None = field(default=None, metadata={"help": "text after each problem (default: the tokenizer's own, else 'Please reason step by step ...')"})
    limit: int = field(default=0, metadata={"help": "use only the first so many problems or pairs (0: all)"})
    epochs: float = field(default=1.0, metadata={"help": "passes over the pairs"})
    batch_size: int = field(default=4, metadata={"help": "pairs per optimiser step"})
    max_tokens: int = field(default=16384, metadata={"help": "padded tokens per micro-batch"})
    lr: float = field(default=5e-5, metadata={"help": "peak learning rate, linear decay"})
    warmup: float = field(default=0.1, metadata={"help": "share of the steps in which the rate climbs"})
    seed: int = field(default=0, metadata={"help": "order of the pairs"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu or cuda"})


def linear_schedule(warmup: float) -> Callable[[float], float]:
    """progress in [0, 1) -> share of the peak rate: up over `warmup`, then straight down."""
    return lambda progress: min(1.0, (progress + 1e-9) / warmup) if progress < warmup else max(0.0, (1 - progress) / (1 - warmup))


def train_pairs(model: PreTrainedModel, batches: Iterator[list[Pair]], steps: int, lr: float, schedule: Callable[[float], float],
                max_tokens: int = 16384, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0) -> Iterator[float]:
    """Trains `model` in place, yields the loss per target token (nats) after each of `steps` optimiser steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
    model.train()
    for step in range(steps):
        batch, total = next(batches), 0.0
        tokens = sum(len(target) for _, target in batch)                     # one denominator for the whole step, whatever the micro-batches
        for rows in micro_batches([len(p) + len(t) for p, t in batch], max_tokens):
            hidden, targets = predictors(model, [batch[n][0] for n in rows], [batch[n][1] for n in rows])
            loss = -linear_logprob(hidden, model.get_output_embeddings().weight, targets)[0].sum() / tokens
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"loss is {total} at step {step}: lower the learning rate, or look at the pairs of this step")
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step / steps)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield total
    model.eval()


def token_pair(tokenizer: Tokenizer, prompt: list[int] | str, target: str) -> Pair:
    """A prompt (ids, or the text of a user turn) and its answer, which ends with the end-of-turn token."""
    return chat_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt, tokenizer.encode(target, add_special_tokens=False) + [tokenizer.eos_token_id]


def load_pairs(config: Config, tokenizer: Tokenizer) -> list[Pair]:
    """Token pairs of a file of prompt/target lines, or of every teacher trace of every problem."""
    if Path(config.data).is_file() and (rows := read_jsonl(config.data)) and isinstance(rows[0][1], dict) and "target" in rows[0][1]:
        for where, row in rows:
            if not isinstance(row, dict) or {k: type(v) for k, v in row.items()} != {"prompt": str, "target": str}:
                raise ValueError(f"{where}: expected the two strings 'prompt' and 'target', got {str(row)[:80]}")
        texts = [(row["prompt"], row["target"]) for _, row in rows[:config.limit or None]]
    else:
        problems = load_problems(config.data)[:config.limit or None]
        start = "" if opening(tokenizer) else "<think>\n"                      # where the prompt does not open the thinking, the student has to
        texts = [(problem_ids(tokenizer, p, config.instruction), start + join_completion(t, p.answer)) for p in problems for t in p.teachers]
    if not texts:
        raise ValueError(f"{config.data}: no problem has a teacher trace, so there is nothing to imitate")
    return [token_pair(tokenizer, *text) for text in texts]


def shuffled(pairs: list[Pair], batch_size: int, seed: int) -> Iterator[list[Pair]]:
    """Endless batches, each epoch in an order of its own."""
    rng, queue = random.Random(seed), []
    while True:
        while len(queue) < batch_size:
            queue += rng.sample(pairs, len(pairs))
        yield [queue.pop(0) for _ in range(batch_size)]


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    model, tokenizer = load_model(config.model, config.device)
    check_head(model)
    pairs = load_pairs(config, tokenizer)
    steps = max(1, round(config.epochs * len(pairs) / config.batch_size))
    print(f"{len(pairs)} pairs, {sum(len(t) for _, t in pairs)} target tokens, {steps} steps of {config.batch_size}")
    losses = train_pairs(model, shuffled(pairs, config.batch_size, config.seed), steps, config.lr, linear_schedule(config.warmup), config.max_tokens)
    for loss in (bar := tqdm(losses, total=steps, unit="step", mininterval=1.0)):
        bar.set_postfix(loss=f"{loss:.4f}")
    save_model(model, tokenizer, config.out)
    print(f"last loss {loss:.4f}, checkpoint in {config.out}")


if __name__ == "__main__":
    try:
        main(HfArgumentParser(Config).parse_args_into_dataclasses()[0])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
