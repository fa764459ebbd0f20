"""Next-token training on (prompt, target) pairs, loss on the targets only: it trains GSRM and the toy's models, and is the SFT baseline.

    loss = - sum over target tokens of log p(token | prompt, earlier tokens) / number of target tokens of the optimiser step

    python sft.py --model toy/student --data toy --epochs 3 --out out/sft            # the SFT baseline: imitate the teacher's traces token by token
    python sft.py --preset paper-gsrm --data pairs.jsonl --out out/gsrm              # GSRM's decomposer, from what `python gsrm.py annotate` wrote; a judge likewise
    torchrun --nproc_per_node 4 sft.py --preset paper-gsrm ...                       # the same update from four processes
    python sft.py ... --resume auto                                                  # the same command goes on after an interruption, bitwise as if there had been none (CPU)

GSRM's prompts are the ones of scoring time (gsrm.decompose_prompt and judge_prompt, under the model's chat template); --task gsrm refuses pairs that are not.
The log-probs come from logprob.py, so [N, V] logits are never held. Rows of like length share a micro-batch, padded on the right, where causal attention cannot
see: no document reads another. A parameter costs 16 bytes (float32 master 4, gradient 4, AdamW 8), in bfloat16 too, which saves time and activations; they are shared
out over processes (parallel.py), or rest in the CPU's memory (--offload True). --dry_run says what fits.
A run leaves its checkpoint, run.json (settings, versions, data) and, once through, sft.json (the same with the losses of the epochs) in --out. Left out on purpose: LoRA, packing.
"""
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import plan
from checkpoint import FREE, Checkpoints, clear, load_checkpoint, start_folder
from command import ConfigParser, flag, folder, write_record, writing
from data import NO_EOS, Tokenizer, chat_ids, data_file, half_pair, join_completion, load_model, load_problems, load_tokenizer, opening, problem_ids, read_jsonl, save_model, tell
from gsrm import DECOMPOSE, JUDGE, NO_STEPS, parse_steps
from logprob import linear_logprob
from parallel import all_sum, finite, hollow, inside, plain, rank, recompute, shard, units, use_device, whole_state, world
from rollout import check_head, micro_batches, predictors, without_dropout
from update import adamw, even
from watch import Leave, leaving, run_record, training

Pair = tuple[list[int], list[int]]                      # prompt ids, target ids


@dataclass(frozen=True)
class Config:
    """Flags of `python sft.py`. A preset overrides defaults, flags override the preset."""
    preset: str = flag("none", "none, or paper-gsrm (the paper's section 4.1)")
    task: Literal["", "gsrm", "trace"] = flag("", "gsrm (pairs of GSRM's prompts, checked), trace (problems with teacher traces); empty: pairs or problems, as the data are")
    model: str = flag("", "checkpoint folder or hub name to start from")
    data: str = flag("", "problems with teacher traces (JSONL or folder), or JSONL of prompt/target pairs")
    out: str = flag("", "folder of the trained checkpoint")
    instruction: str | None = flag(None, "text after each problem (default: the tokenizer's own, else 'Please reason step by step ...')")
    limit: int = flag(0, "use only the first so many problems or pairs of --data (0: all); --eval_data is used whole", "[0, inf)")
    skip_bad: bool = flag(False, "list malformed lines instead of stopping at one")
    max_length: int = flag(0, "tokens that prompt and target may have together (0: the model's positions); nothing is ever cut", "[0, inf)")
    skip_long: bool = flag(False, "list longer pairs and leave them out instead of stopping at one")
    eval_data: str = flag("", "held-out data of the same kind (of a folder: its test.jsonl), whose loss is printed every epoch")
    eval_share: float = flag(0.0, "or this share of the problems of --data, held out", "[0, 1)")
    keep: Literal["last", "best"] = flag("last", "last, or best: the checkpoint of the epoch with the least held-out loss")
    epochs: float = flag(1.0, "passes over the pairs", "(0, inf)")
    batch_size: int = flag(4, "pairs per optimiser step", "[1, inf)")
    max_tokens: int = flag(16384, "padded tokens per micro-batch; no effect on the update", "[1, inf)")
    lr: float = flag(5e-5, "peak learning rate, linear decay", "(0, inf)")
    warmup: float = flag(0.1, "share of the steps in which the rate climbs", "[0, 1]")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "float32, or bfloat16 with float32 master weights: what is computed in, and saved")
    offload: bool = flag(False, "master weights, gradients and moments rest in CPU memory (slower)")
    gradient_checkpointing: bool = flag(False, "recompute each layer in the backward pass instead of holding its activations")
    save_every: int = flag(500, "steps between the checkpoints that a resume goes on from (0: only when asked to stop)", "[0, inf)")
    resume: Literal["", "auto"] = flag("", "auto: go on from the newest whole checkpoint in --out")
    seed: int = flag(0, "order of the pairs, choice of the held-out share", f"[0, {2**63})")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    dry_run: bool = flag(False, "print the settings, the batch, an estimate of memory and time (plan.py), and end")
    gpu_memory_gb: float = flag(80.0, "of the card that --dry_run plans for", "(0, inf)")


PRESETS: dict[str, dict] = {
    "none": {},
    "paper-gsrm": dict(task="gsrm", model="Qwen/Qwen2.5-7B-Instruct", epochs=1.0, lr=5e-5, warmup=0.1, batch_size=4, max_length=25_000, max_tokens=25_000,
                       dtype="bfloat16", gradient_checkpointing=True),
}

# ------------------------------------------------------------------------------------------------ pairs

@dataclass(frozen=True)
class Example:
    """A pair, the place it came from, the text that all pairs of one problem share (a held-out share takes problems whole), and what its file holds."""
    where: str
    source: str
    pair: Pair
    kind: str = ""


def token_pair(tokenizer: Tokenizer, prompt: list[int] | str, target: str) -> Pair:
    """A prompt (ids, or the text of a user turn) and its answer, which ends with the tokenizer's end token; ValueError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(NO_EOS)
    return chat_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt, tokenizer.encode(target, add_special_tokens=False) + [tokenizer.eos_token_id]


def pair_fault(row: object, task: str) -> str:
    """What is wrong with a prompt/target line, "" if nothing: for a GSRM also prompts that it would not be asked, and targets that could not be read back."""
    if not isinstance(row, dict) or {k: type(v) for k, v in row.items()} != {"prompt": str, "target": str} or any(half_pair(v) or not v.strip() for v in row.values()):
        return f"expected the two strings 'prompt' and 'target', neither of them empty, got {str(row)[:80]!r}"
    if task != "gsrm":
        return ""
    if row["prompt"].startswith(JUDGE.partition("{")[0]):
        return "" if row["target"].lower() in ("yes", "no") else f"a judge's target is 'yes' or 'no', not {row['target'][:40]!r}"
    if not row["prompt"].startswith(DECOMPOSE.partition("{")[0]):
        return "the prompt is not one of GSRM's (gsrm.decompose_prompt, judge_prompt): let `python gsrm.py annotate` write the pairs, or leave out --task"
    parsed = parse_steps(row["target"])
    return "" if parsed.steps and not parsed.dropped or row["target"] == NO_STEPS else f"the target cannot be read as steps ({'; '.join(parsed.dropped) or 'empty'})"


def load_texts(config: Config, tokenizer: Tokenizer, path: str, split: str) -> list[tuple[str, str, list[int] | str, str]]:
    """(place, source, prompt, target) of prompt/target lines, or of all teacher traces of problems; of --limit ones in training; ValueError where the data are not --task's."""
    faults, first = list[str](), config.limit if split == "train" else 0
    rows = [] if Path(path).is_dir() else read_jsonl(data_file(path), faults)
    are_pairs = any(isinstance(row, dict) and row.keys() & {"prompt", "target"} for _, row in rows)
    if config.task and (rows or Path(path).is_dir()) and are_pairs != (config.task == "gsrm"):
        raise ValueError(f"{path} holds " + ("prompt/target pairs, and --task trace wants problems with teacher traces: --task gsrm takes the pairs of a GSRM, no --task any"
                         if are_pairs else "problems, and --task gsrm wants lines with 'prompt' and 'target': `python gsrm.py annotate` makes them from problems"))
    if not are_pairs:
        problems = load_problems(path, split, config.skip_bad)[:first or None]
        tell(f"problems of {path} have no teacher trace and are left out", [p.id for p in problems if not p.teachers] if any(p.teachers for p in problems) else [])
        start = "" if opening(tokenizer) else "<think>\n"                      # where the prompt does not open the thinking, the student has to
        return [(f"{path}: problem {p.id}, trace {k}", p.problem, problem_ids(tokenizer, p, config.instruction), start + join_completion(t, p.answer))
                for p in problems for k, t in enumerate(p.teachers, 1)]
    checked = [(where, row, pair_fault(row, config.task)) for where, row in rows]
    faults += [f"{where}: {fault}" for where, _, fault in checked if fault]
    if faults and not config.skip_bad:
        raise ValueError(faults[0])
    tell(f"bad lines of {path} passed over", faults)
    return [(where, row["prompt"].partition("\n<trace>\n")[0], row["prompt"], row["target"]) for where, row, fault in checked if not fault][:first or None]


def load_examples(config: Config, tokenizer: Tokenizer, path: str, split: str = "train", positions: int = 1 << 30) -> list[Example]:
    """The token pairs of `path`. A pair of more tokens than --max_length, or than the model has `positions`, is an error, or with --skip_long told and left out."""
    most = min(config.max_length or positions, positions)
    examples = [Example(where, source, token_pair(tokenizer, prompt, target), "prompt/target pairs" if isinstance(prompt, str) else "problems")
                for where, source, prompt, target in load_texts(config, tokenizer, path, split)]
    if not examples:
        raise ValueError(f"{path}: no good pair is left, or no problem has a teacher trace, so there is nothing to imitate")
    length = lambda e: len(e.pair[0]) + len(e.pair[1])
    if long := [f"{e.where}: {length(e)} tokens" for e in examples if length(e) > most]:
        if not config.skip_long or len(long) == len(examples):
            helps = "--skip_long leaves them out" if len(long) < len(examples) else "a longer --max_length helps, or a model of more positions"
            raise ValueError(f"{long[0]}, more than {most} (--max_length, the model's positions); {len(long)} of {len(examples)} pairs are too long: {helps}")
        tell(f"pairs of {path} are longer than {most} tokens and are left out", long)
    return [e for e in examples if length(e) <= most]


def load_pairs(config: Config, tokenizer: Tokenizer, positions: int = 1 << 30) -> list[Pair]:
    """The token pairs of --data that are trained on."""
    examples = load_examples(config, tokenizer, config.data, "train", positions)
    return [e.pair for e in (hold_out(examples, config.eval_share, config.seed)[0] if config.eval_share else examples)]


def hold_out(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(to train on, held out): a share of the problems, at least one, drawn by `seed`, each with all its pairs."""
    sources = list(dict.fromkeys(e.source for e in examples))
    if len(sources) < 2:
        raise ValueError("--eval_share needs at least two problems: one to hold out, one to train on")
    held = set(random.Random(seed).sample(sources, min(len(sources) - 1, max(1, round(share * len(sources))))))
    return [e for e in examples if e.source not in held], [e for e in examples if e.source in held]


def steps_after(epochs: float, pairs: int, batch_size: int) -> int:
    """The steps after which every pair has had its turn so many times."""
    return max(1, math.ceil(epochs * pairs / batch_size - 1e-9))


def shuffled(pairs: list[Pair], batch_size: int, seed: int) -> Iterator[list[Pair]]:
    """Endless batches, each epoch in an order of its own."""
    rng, queue = random.Random(seed), []
    while True:
        while len(queue) < batch_size:
            queue += rng.sample(pairs, len(pairs))
        yield [queue.pop(0) for _ in range(batch_size)]

# ------------------------------------------------------------------------------------------------ training

def linear_schedule(warmup: float) -> Callable[[float], float]:
    """progress in [0, 1) -> share of the peak rate: up over `warmup`, then straight down."""
    return lambda progress: min(1.0, (progress + 1e-9) / warmup) if progress < warmup else max(0.0, (1 - progress) / (1 - warmup))


def target_logps(model: PreTrainedModel, pairs: list[Pair], max_tokens: int) -> Iterator[torch.Tensor]:
    """The log-probs of the target tokens of this process's share of the pairs, a micro-batch at a time; none of them, but a forward pass, where other processes have more."""
    mine = range(rank(), len(pairs), world())
    for piece in even(micro_batches([len(pairs[n][0]) + len(pairs[n][1]) for n in mine], max_tokens)):
        def logps(rows: list[int] = [mine[i] for i in piece] or [0]) -> torch.Tensor:
            hidden, targets = predictors(model, [pairs[n][0] for n in rows], [pairs[n][1] for n in rows])
            return linear_logprob(hidden, model.get_output_embeddings().weight, targets)[0]
        yield inside(model, logps)[:None if piece else 0]


@torch.no_grad()
def mean_loss(model: PreTrainedModel, pairs: list[Pair], max_tokens: int = 16384) -> float:
    """Loss per target token (nats), in eval mode."""
    was_training = model.training
    model.eval()
    total = -all_sum(torch.tensor(sum(logp.sum().item() for logp in target_logps(model, pairs, max_tokens)), dtype=torch.float64)).item()
    model.train(was_training)
    for root in units(model)[:1]:
        root.reshard()                                                       # a forward pass leaves it whole, and what moves are the shards
    if not math.isfinite(total):
        raise FloatingPointError(f"the held-out loss is {total}: lower the learning rate")
    return total / sum(len(target) for _, target in pairs)


def train_pairs(model: PreTrainedModel, batches: Iterator[list[Pair]], steps: int, lr: float, schedule: Callable[[float], float], max_tokens: int = 16384,
                optimizer: torch.optim.AdamW | None = None, first: int = 0, checkpointing: bool = False) -> Iterator[float]:
    """Trains `model` (float32, or what parallel.shard made of one) in place, yields the loss per target token (nats) after each of the optimiser steps from `first`
    to `steps`; leaves it in eval mode. On several processes each is given all batches, and takes its share of the pairs. FloatingPointError: something is not finite."""
    optimizer = optimizer or adamw(model)
    was_checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if checkpointing and not was_checkpointing:                               # the layers use it in training mode only
        recompute(model)
    try:
        model.train()
        for step in range(first, steps):
            batch, total = next(batches), 0.0
            tokens = sum(len(target) for _, target in batch)                 # one denominator for the whole step, whatever the micro-batches
            for logp in target_logps(model, batch, max_tokens):
                loss = -logp.sum() / tokens
                (loss * world()).backward()                                  # FSDP2 averages over processes, shares are to be summed
                total += loss.item()
            total = all_sum(torch.tensor(total, dtype=torch.float64)).item()
            norm = float(plain(torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)))
            if not math.isfinite(total) or not math.isfinite(norm):
                raise FloatingPointError(f"loss {total:.4g}, gradient norm {norm:.4g} at step {step + 1}, which is not made: lower the learning rate, or look at its pairs")
            optimizer.param_groups[0]["lr"] = lr * schedule(step / steps)
            optimizer.step()
            optimizer.zero_grad()
            if not finite(model):
                raise FloatingPointError(f"step {step + 1} left weights that are not finite: lower the learning rate, or look at its pairs")
            yield total
    finally:
        model.eval()
        if checkpointing and not was_checkpointing:
            recompute(model, False)

# ------------------------------------------------------------------------------------------------ the command

def parse_config(argv: list[str] | None = None) -> Config:
    """Config from defaults, then the preset, then flags. An unknown flag, preset or value ends the program with a line that says so."""
    parser = ConfigParser(Config, description=__doc__.split("\n")[0], allow_abbrev=False)
    c = Config(**parser.parse_with(PRESETS, argv))
    checks = {"model": (c.model, "checkpoint folder or hub name to start from"), "data": (c.data or c.dry_run, "problems with teacher traces, or prompt/target pairs"),
              "out": (c.dry_run or c.out and Path(c.out).resolve() != Path(c.model).resolve(), "a folder, another one than --model"),
              "eval_share": (not (c.eval_share and c.eval_data), "not --eval_data too"),
              "keep": (c.keep == "last" or c.eval_data or c.eval_share, "needs held-out pairs: add --eval_data FILE, or --eval_share 0.05")}
    for name, (fine, wanted) in checks.items():
        if not fine:
            parser.error(f"--{name} {getattr(c, name)!r}: {wanted}" if getattr(c, name) else f"--{name} is needed: {wanted}")
    return c


def save(model: PreTrainedModel, tokenizer: Tokenizer, out: Path, dtype: str) -> None:
    """Writes the checkpoint in `dtype`, from the shards of all processes."""
    state = whole_state(model)
    if rank() == 0:
        empty = hollow(model, getattr(torch, dtype))
        save_model(empty, tokenizer, out, {name: x.to(empty.dtype) if x.is_floating_point() else x for name, x in state.items()})


def learn(config: Config, model: PreTrainedModel, tokenizer: Tokenizer, pairs: list[Pair], held_out: list[Pair], out: Path, start: Path | None) -> list[dict]:
    """Trains, from the checkpoint `start` if there is one, and writes the model into `out`; -> the losses of each epoch. Leave: asked to end, a checkpoint is written."""
    after = lambda epochs: steps_after(epochs, len(pairs), config.batch_size)
    steps, ends = after(config.epochs), {after(min(e, config.epochs)): min(e, config.epochs) for e in range(1, math.ceil(config.epochs) + 1)}
    measure = lambda: mean_loss(model, held_out, config.max_tokens) if held_out else None
    optimizer, checkpoints = adamw(model), Checkpoints(out / "checkpoints", keep=1)
    state = load_checkpoint(start, model, optimizer) if start else {"step": 0, "epochs": [], "losses": []}
    first, table, losses = state["step"], state["epochs"], state["losses"]              # losses: of the steps since the last epoch's end
    news = f" (going on from {start})" if start else f" (loss {measure():.4f} before training)" if held_out else ""
    if rank() == 0:
        print(f"{len(pairs)} pairs, {sum(len(t) for _, t in pairs)} target tokens, {steps} steps of {config.batch_size}, {len(held_out)} pairs held out{news}", flush=True)
    batches = itertools.islice(shuffled(pairs, config.batch_size, config.seed), first, None)
    training = train_pairs(model, batches, steps, config.lr, linear_schedule(config.warmup), config.max_tokens, optimizer, first, config.gradient_checkpointing)
    with leaving() as leave:
        for step, loss in enumerate(bar := tqdm(training, total=steps, initial=first, unit="step", mininterval=1.0, disable=rank() > 0), first + 1):
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            losses.append(loss)
            if step in ends:
                table.append(row := {"epoch": ends[step], "step": step, "loss": sum(losses) / len(losses), "held_out": measure()})
                losses, best = [], config.keep == "best" and row["held_out"] == min(r["held_out"] for r in table)
                if rank() == 0:                           # tqdm's write knows of no `disable`
                    bar.write(f"epoch {row['epoch']}, step {step}: loss {row['loss']:.4f}" + f", held out {row['held_out'] or 0:.4f}" * bool(held_out) + ", the best so far" * best)
                if best or config.keep == "last" and step == steps:
                    save(model, tokenizer, out, config.dtype)
            keep = partial(checkpoints.save, model, tokenizer, optimizer, step, epochs=table, losses=losses)
            if due := bool(config.save_every) and step % config.save_every == 0 and step < steps:
                keep()
            checkpoints.wait(0)
            try:
                leave()
            except Leave as asked:
                if not due:
                    keep()
                checkpoints.wait()
                raise Leave(asked.number, step) from None
    checkpoints.wait()
    return table


def main(config: Config) -> None:
    files = [data_file(path, split) for path, split in ((config.data, "train"), (config.eval_data, "test")) if path]
    if config.dry_run:
        here, positions = config.data and Path(config.model).is_dir(), getattr(plan.read_config(config.model), "max_position_embeddings", 1 << 30)
        lengths = [len(p) + len(t) for p, t in load_pairs(config, load_tokenizer(config.model), positions)] if here else []
        return plan.show_lessons(config, lengths, steps_after(config.epochs, len(lengths), config.batch_size), world()) if rank() == 0 else None
    there = [name for name in ("config.json", "run.json", "sft.json") if (Path(config.out) / name).exists()]
    if there and not ((half := "run.json" in there and "sft.json" not in there) and config.resume):
        raise ValueError(f"{config.out} holds a checkpoint or a run already: choose another --out" + ", or go on with --resume auto" * half)
    record = run_record(config, files, load_tokenizer(config.model), [config.model])
    with writing(folder(config.out), rank() == 0) as out:
        start, passed = start_folder(out, record, config.resume, FREE - {"keep"}, "")      # of train.py a number; here it says which weights are the model
        torch.manual_seed(config.seed)
        use_device(config.device)
        sharded = config.dtype != "float32" or config.offload or world() > 1
        model, tokenizer = load_model(config.model, "cpu" if sharded else config.device)          # a card may not hold the whole
        check_head(model)
        without_dropout(model)
        positions = getattr(model.config, "max_position_embeddings", 1 << 30)
        examples = load_examples(config, tokenizer, config.data, "train", positions)
        held = load_examples(config, tokenizer, config.eval_data, "test", positions) if config.eval_data else []
        if held and held[0].kind != examples[0].kind:
            raise ValueError(f"--data {config.data} holds {examples[0].kind}, --eval_data {config.eval_data} {held[0].kind}: give held-out data of the same kind")
        examples, held = hold_out(examples, config.eval_share, config.seed) if config.eval_share else (examples, held)
        if sharded:
            shard(model, config.dtype, config.offload, config.device)
        if rank() == 0:
            tell("checkpoints passed over", passed)
            write_record(out / "run.json", record)
        table = learn(config, model, tokenizer, [e.pair for e in examples], [e.pair for e in held], out, start)
        if rank() == 0:
            if not any(out.glob("*.safetensors")):
                raise FileNotFoundError(f"{out} has lost the weights of --keep {config.keep}: export the newest of its checkpoints/ with checkpoint.py, or choose another --out")
            (out / "sft.json").write_text(json.dumps(record | {"epochs": table}, indent=1))
            clear(out / "checkpoints")
            print(f"loss of the last epoch {table[-1]['loss']:.4f}, checkpoint in {out}")


if __name__ == "__main__":
    training(main, parse_config)
