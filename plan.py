"""What a run will cost, before a weight is loaded: memory of each process at its fullest, and how a step's time is shared out.

    python train.py --preset qwen1.5b --dry_run                                    # writes nothing, needs no GPU, no network for the presets' models
    torchrun --nproc_per_node 8 train.py --preset paper --dry_run                  # the same for eight processes
    python sft.py --preset paper-gsrm --dry_run                                    # and for training on pairs

    masters 4 + AdamW 8 + gradients 4 bytes a trained parameter, reference and working copy 2 (bfloat16); all but the working copy shared out over processes (parallel.py)
    cache = rows * tokens * 2 * layers * KV heads * head dim * bytes           activations = tokens * what a layer keeps (`kept_by_layer`) * layers, or with checkpointing
                                                                                             tokens * (layers * D * bytes + one layer's)
    sampling: bytes of weights and cache, read once a token, / BANDWIDTH          else: 2 N a token forward, 6 N an update (8 with checkpointing) / FLOPS

Sizes come from the model's config and a model without memory (device "meta"). Memory is that of the worst moment of each phase, with rows of full length; times are from below:
launches, waiting, attention's own FLOPs and everything on the CPU are not in them, so believe their proportions sooner than their sum.
Pinned memory (--offload) is handed out in powers of two. Left out on purpose: models other than dense causal LMs, GPUs that differ.
"""
import math
import shlex
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Qwen2Config

from command import one_line
from data import Problem, Tokenizer, check_folder, load_problems, load_tokenizer, problem_ids, stop_and_pad_ids
from decode import attention, cache_bytes
from logprob import CHUNK, WORKSPACE
from lora import layers_of
from rollout import MAX_ROWS, MAX_TOKENS, Sampler

BANDWIDTH, FLOPS = 2.0e12, 400e12        # bytes/s, FLOP/s in bfloat16: A100/H100-class, change them for another card
USABLE = 0.92                            # of a card's memory; the rest is CUDA's own and what the allocator loses
CACHE_GB = 20.0                          # for the keys and values of one wave of sampling
PROMPT, STEPS, QUESTION = 1024, 10, 150  # tokens of a prompt that cannot be counted, steps of a trace, tokens of one of the judge's three questions on each
B7 = dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False)
B1 = dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960, vocab_size=151936, tie_word_embeddings=True)
ELSEWHERE = "http://"            # a reward model that is none of this machine's, as a remedy
READER, SMALL_READER = "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"        # the first is assumed where no --gsrm is given
KNOWN = {"Qwen/Qwen2.5-Math-1.5B": B1 | {"max_position_embeddings": 4096}, "Qwen/Qwen2.5-Math-7B": B7 | {"max_position_embeddings": 4096},
         "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": B7 | {"max_position_embeddings": 131072}, READER: B7 | {"max_position_embeddings": 32768},
         SMALL_READER: B1 | {"max_position_embeddings": 32768}}          # needs no network


class Settings(Protocol):
    """What is read of train.Config."""
    model: str
    data: str
    gsrm: str
    judge: str
    structure_reward: str
    teacher: str
    skip_bad: bool
    instruction: str | None
    steps: int
    problems_per_step: int
    group_size: int
    max_new_tokens: int
    gsrm_max_new_tokens: int
    updates_per_batch: int
    level: str
    beta: float
    w_structure: float
    max_tokens: int
    cache_gb: float
    dtype: str
    gradient_checkpointing: bool
    offload: bool
    lora_rank: int
    lora_targets: str
    gpu_memory_gb: float

# ------------------------------------------------------------------------------------------------ sizes of a model

@dataclass(frozen=True)
class Shape:
    """A causal LM: parameters in all, in one layer, in no layer (embedding, norm, head), in adapters; D, I, V; pinned: each up to a power of two; cached: numbers a token."""
    params: int
    layer: int
    rest: int
    adapters: int
    layers: int
    D: int
    I: int
    V: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    pinned: int
    cached: int


def read_config(path: str) -> PretrainedConfig:
    """The config of a checkpoint folder or hub name; ValueError or FileNotFoundError on one line where there is none. The presets' models need no network."""
    if path in KNOWN and not Path(path).exists():
        return Qwen2Config(**KNOWN[path])
    check_folder(path, "config.json")
    with one_line(path):
        return AutoConfig.from_pretrained(path)


def shape(config: PretrainedConfig, lora_rank: int = 0, lora_targets: str = "all-linear") -> Shape:
    """Counted on a model without memory. ValueError for adapters that cannot be."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = lambda module: sum(p.numel() for p in module.parameters())
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())] or [model]
    linear, text = layers_of(model, lora_targets) if lora_rank else {}, config.get_text_config()
    adapters, I = sum(lora_rank * (m.in_features + m.out_features) for m in linear.values()), getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return Shape(count(model), max(map(count, layers)), count(model) - sum(map(count, layers)), adapters, text.num_hidden_layers, text.hidden_size, I, text.vocab_size,
                 *attention(text), getattr(text, "max_position_embeddings", 1 << 30), sum(1 << (p.numel() - 1).bit_length() for p in model.parameters()), cache_bytes(config, 1))


def cache_tokens(gigabytes: float, per_token: int) -> int:
    """rollout.Sampler's max_tokens under a limit in bytes."""
    return max(1, min(MAX_TOKENS, int(gigabytes * 1e9) // per_token))


def check_room(tokenizer: Tokenizer, problems: list[Problem], instruction: str | None, max_new_tokens: int, positions: int) -> None:
    """ValueError where a prompt and a completion together pass the model's positions: before the work, and not in the step that meets this problem."""
    longest, name = max((len(problem_ids(tokenizer, p, instruction)), p.id) for p in problems)
    if longest + max_new_tokens > positions:
        raise ValueError(f"the prompt of problem {name} has {longest} tokens; with --max_new_tokens {max_new_tokens} it passes the model's {positions} positions: "
                         "lower --max_new_tokens, or drop the problem")


def sampler_of(model: PreTrainedModel, tokenizer: Tokenizer, cache_gb: float = CACHE_GB, dtype: str = "") -> Sampler:
    """A sampler whose cache takes at most `cache_gb` (10^9 bytes), in `dtype` (empty: the model's)."""
    room = cache_tokens(cache_gb, cache_bytes(model.config, (getattr(torch, dtype) if dtype else model.dtype).itemsize))
    return Sampler(model, *stop_and_pad_ids(model, tokenizer), max_tokens=room)


def kept_by_layer(s: Shape, b: int) -> int:
    """Bytes that one layer keeps of a token for the backward pass, as transformers writes Qwen's, Llama's and Mistral's layers with an attention that keeps no weights:
    per norm float32 x, its scale, x after it twice; q, k, v, attention's output and its normaliser; gate, its silu, up, their product."""
    wide, narrow = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return 2 * (4 + 2 * b) * s.D + 4 * (2 + s.heads) + 2 * b * (wide + narrow) + 4 * b * s.I

# ------------------------------------------------------------------------------------------------ a run

@dataclass(frozen=True)
class Wave:
    """A sampling: rows of this process, tokens of the longest, rows decoded together; bytes of their cache, of one layer of it repeated for the query heads, of the logits."""
    rows: int
    longest: int
    together: int
    cache: int
    repeated: int
    logits: int
    seconds: float


def sampling(s: Shape, rows: int, prompts: int, prompt: int, new: int, cache_gb: float, b: int) -> Wave:
    """`prompts` different prompts are computed, then `rows` rows decode `new` tokens each."""
    per_token, longest = s.cached * b, prompt + new
    together = max(1, min(rows, MAX_ROWS, cache_tokens(cache_gb, per_token) // longest))
    decode = sum(max((b * s.params + n * (prompt + new / 2) * per_token) / BANDWIDTH, 2 * s.params * n / FLOPS) * new
                 for n in [together] * (rows // together) + [rows % together] * (rows % together > 0))
    return Wave(rows, longest, together, together * longest * per_token, together * longest * 2 * s.heads * s.head_dim * b, together * s.V * 20,
                decode + 2 * s.params * prompts * prompt / FLOPS)


@dataclass(frozen=True)
class Plan:
    """Bytes on the card by phase and thing ("always" is there in all), in the CPU's memory, more there while saving; seconds of a step by phase, the counts that they come from."""
    memory: dict[str, dict[str, float]]
    cpu: float
    saving: float
    seconds: dict[str, float]
    rollouts: Wave
    reader: Wave | None
    micro_batches: int

    @property
    def peaks(self) -> dict[str, float]:
        """Bytes at the worst moment of each phase."""
        return {name: sum(self.memory["always"].values()) + sum(things.values()) for name, things in self.memory.items() if name != "always"}

    @property
    def peak(self) -> float:
        return max(self.peaks.values())


def estimate(config: Settings, s: Shape, readers: list[Shape], world: int, prompt: int, teacher: Shape | None = None) -> Plan:
    """The plan of one of `world` processes. readers: the reward models that run in it (decomposer, then perhaps a judge); teacher: the model of --teacher."""
    b, lora = getattr(torch, config.dtype).itemsize, config.lora_rank > 0
    sharded = world > 1 or config.offload or config.dtype != "float32" and not lora
    prompts = math.ceil(config.problems_per_step / world)
    rollouts = sampling(s, prompts * config.group_size, prompts, prompt, config.max_new_tokens, config.cache_gb, b)
    rows, longest = rollouts.rows, rollouts.longest
    micro = min(max(config.max_tokens, longest), rows * longest)              # tokens of the largest micro-batch
    trained, rest, two = s.adapters if lora else s.params, b * s.rest * sharded, 2 * b * s.layer * sharded
    weights, moments, gradients = ((b * s.params if lora else 0) + 4 * trained) / world, 8 * trained / world, 4 * trained / world
    reference = b * s.params / world if config.beta and not lora else 0
    at_rest = {"masters": weights, "AdamW's moments": moments, "reference": reference, "teacher": b * teacher.params / world if teacher else 0}
    always = {name: 0 if config.offload else size for name, size in at_rest.items()}
    always |= {"reference's embedding and head": rest * bool(reference), "teacher's embedding and head": b * teacher.rest * sharded if teacher else 0,
               "reward model": b * sum(reader.params for reader in readers)}
    head = config.level == "token"                                            # logprob.py's mode B, else mode A
    wide = min(micro, CHUNK) * s.V * b if head else min(WORKSPACE, micro * s.V) * b
    head_gradient = 0 if lora else s.V * s.D * (b + 4 * (head and micro > CHUNK))
    one_layer = kept_by_layer(s, b) + (4 * (6 * s.D + s.I) if lora and not sharded and b < 4 else 0)          # adapters in float32 keep a copy of what goes in
    layers = s.layers * s.D * b + one_layer if config.gradient_checkpointing else s.layers * one_layer
    at_work = micro * b * (4 * s.D + 3 * s.I)                                  # what a layer holds while it computes
    unit = 0 if lora else (b + 4) * max(s.rest, s.layer) * sharded           # a unit's gradient before and while it is shared out
    memory = {"always": always,
              "sampling": {"working copy": b * s.params * sharded, "cache": rollouts.cache, "a layer's cache for all heads": rollouts.repeated, "logits": rollouts.logits},
              "scoring": {},
              "reference": {"gathered layers": two + (rest if lora else 0), "activations": at_work, "head": micro * max(2 * s.D, 12 * s.V / 256)} if config.beta else {},
              "update": {"gradients": 0 if config.offload else gradients, "gathered weights": rest + two, "a unit's gradient": unit, "activations": micro * layers,
                         "a layer's backward": at_work, "head": wide + head_gradient + micro * s.D * b}}
    if teacher:                                           # its hidden states beside the student's, a layer of it at work, gathered where it is sharded
        kl = min(WORKSPACE, micro * s.V) * b + (0 if lora else 2 * s.V * s.D * b) + 4 * micro * s.D            # linear_kl's backward: logits, the head's gradient twice, hidden's
        memory["update"]["teacher at work"] = micro * b * (5 * teacher.D + 3 * teacher.I) + 2 * b * teacher.layer * sharded + kl
    tokens = rows * longest
    times = {"sampling": rollouts.seconds, "scoring": 0.0, "reference": 2 * s.params * tokens / FLOPS if config.beta else 0.0,
             "update": (6 + 2 * config.gradient_checkpointing - 2 * lora) * s.params * tokens * config.updates_per_batch / FLOPS}
    times["update"] += 2 * teacher.params * tokens * config.updates_per_batch / FLOPS if teacher else 0.0
    here = readers if config.w_structure else []
    reader = sampling(here[0], rows, rows, longest, config.gsrm_max_new_tokens, config.cache_gb, b) if here and not config.gsrm.startswith("http") else None  # or a judge alone
    if reader:
        memory["scoring"] = {"cache": reader.cache, "a layer's cache for all heads": reader.repeated, "logits": reader.logits}
    times["scoring"] = (reader.seconds if reader else 0.0) + sum(2 * x.params * rows * STEPS * 3 * QUESTION / FLOPS for x in here[-1:] if not config.judge.startswith("http"))
    cpu = moments + (weights + gradients + reference) * s.pinned / s.params + (at_rest["teacher"] * teacher.pinned / teacher.params if teacher else 0)
    return Plan(memory, cpu * config.offload, 2 * (4 * trained / world + moments), times, rollouts, reader, math.ceil(tokens / (micro // longest * longest)))  # a copy, its bytes


def remedies(config: Settings, world: int) -> list[tuple[str, Settings, int]]:
    """(what to change, the settings then, the processes then): first what moves no figure of the run, one by one and together, then what does, then more processes."""
    free = {"--gradient_checkpointing True": {"gradient_checkpointing": True}, f"--cache_gb {config.cache_gb / 2:g}": {"cache_gb": config.cache_gb / 2},
            f"--max_tokens {config.max_tokens // 2}": {"max_tokens": config.max_tokens // 2}, "--offload True": {"offload": True}}
    other = {"--dtype bfloat16": {"dtype": "bfloat16"}, "--lora_rank 32": {"lora_rank": config.lora_rank or 32}, "--beta 0": {"beta": 0.0},
             "--gsrm http://..." + " --judge http://..." * bool(config.judge): {"gsrm": ELSEWHERE, "judge": config.judge and ELSEWHERE}}
    new = {text: change for text, change in (free | other).items() if replace(config, **change) != config}
    together = {name: value for text, change in free.items() if text in new for name, value in change.items()}
    way = lambda text: (text, replace(config, **new[text]), world)
    without_cost = [text for text in new if text in free]
    return ([way(text) for text in without_cost] + [(" ".join(without_cost), replace(config, **together), world)] * (len(without_cost) > 1)
            + [way(text) for text in new if text in other] + [(f"torchrun --nproc_per_node {n}", config, n) for n in (2, 4, 8, 16) if world < n <= config.problems_per_step])

# ------------------------------------------------------------------------------------------------ the report

def longest_prompt(config: Settings) -> tuple[int, str]:
    """(tokens of the longest prompt, where that comes from): counted where problems and tokenizer lie here."""
    if config.data and Path(config.model).is_dir():
        tokenizer = load_tokenizer(config.model)
        return max(len(problem_ids(tokenizer, p, config.instruction)) for p in load_problems(config.data, skip_bad=config.skip_bad)), f"the longest of {config.data}"
    return PROMPT, "assumed, as no data and tokenizer lie here"


def gigabytes(things: dict[str, float]) -> str:
    return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in things.items() if size >= 5e7) or "nothing above 0.05"


def settings_of(config: object) -> str:
    """All flags that are not empty, as a command line, wrapped."""
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in asdict(config).items() if name != "dry_run" and value not in ("", None)]
    return textwrap.fill(" ".join(words), 160, break_long_words=False, break_on_hyphens=False) + "\n"


def show_memory(plan: Plan, card: float, ways: Iterable[tuple[str, Plan]]) -> None:
    """Prints the memory by phase, whether it fits a card of so many gigabytes and, where it does not, which of the ways (what to change, the plan then) take less."""
    print(f"\nmemory of each process, GB of 10^9 bytes, on a card of {card:g}\n  always      {sum(plan.memory['always'].values()) / 1e9:6.1f}   {gigabytes(plan.memory['always'])}")
    for name, peak in plan.peaks.items():
        print(f"  {name:10} {peak / 1e9:7.1f} = always + {gigabytes(plan.memory[name])}")
    print(f"  in the CPU's memory {plan.cpu / 1e9:.1f}, and {plan.saving / 1e9:.1f} more while a checkpoint is written")
    fits = lambda p: p.peak <= USABLE * card * 1e9
    worst = max(plan.peaks, key=plan.peaks.get)
    print(f"{'fits' if fits(plan) else 'does not fit'} in {card:g} GB: {plan.peak / 1e9:.1f} at most, in {worst}; {USABLE:.0%} of a card are counted on")
    for text, less in ways if not fits(plan) else ():
        if less.peak < 0.99 * plan.peak:
            print(f"  {text:42} {less.peak / 1e9:6.1f} GB, {'fits' if fits(less) else 'not enough alone'}")


def show(config: Settings, readers: list[str], world: int) -> None:
    """Prints the whole plan. readers: checkpoints of the reward models that will run in each process. ValueError where a model's config cannot be read."""
    fit = lambda c, processes: estimate(c, shape(student, c.lora_rank, c.lora_targets), [] if c.gsrm == ELSEWHERE else shapes, processes, prompt, teacher)
    student, assumed = read_config(config.model), bool(config.w_structure and not config.gsrm and not config.structure_reward)
    teacher = shape(read_config(config.teacher)) if config.teacher else None
    shapes = [shape(read_config(path)) for path in ([READER] if assumed else readers)]
    prompt, source = longest_prompt(config)
    s, plan = shape(student, config.lora_rank, config.lora_targets), fit(config, world)
    r, updates, rows = plan.rollouts, config.updates_per_batch, config.problems_per_step * config.group_size
    print(settings_of(config))
    print(f"student        {config.model}: {s.params / 1e6:,.2f}M parameters" + (f", of which none is trained but {s.adapters / 1e6:.2f}M of adapters" if config.lora_rank else ""))
    reader = f"{READER} assumed, give --gsrm" if assumed else ", ".join([config.gsrm] * ("://" in config.gsrm) + readers) or config.gsrm or config.structure_reward or "none"
    print(f"reward model   {reader}" + f": {sum(x.params for x in shapes) / 1e6:,.2f}M parameters in each process" * bool(shapes))
    if teacher:
        print(f"teacher        {config.teacher}: {teacher.params / 1e6:,.2f}M parameters")
    print(f"batch          {config.problems_per_step} problems x {config.group_size} = {rows} rollouts a step, {r.rows} in each of {world} process(es); at most "
          f"{prompt} (prompt: {source}) + {config.max_new_tokens} = {r.longest} tokens each, {rows * r.longest:,} a step")
    waves = lambda wave: f"{wave.together} rows at a time, {math.ceil(wave.rows / wave.together)} wave(s)"
    print(f"sampling       {waves(r)}" + (f"; the reward model {waves(plan.reader)}" if plan.reader else ""))
    print(f"update         up to {plan.micro_batches} micro-batches of {max(config.max_tokens, r.longest)} tokens in each process, {updates} optimiser step(s) a batch, "
          f"{config.steps * updates} in all")
    if r.longest > s.positions:
        what = f": --max_new_tokens {s.positions - prompt} is the most" if prompt < s.positions else f", the prompt {prompt}"
        print(f"too long       the model has {s.positions} positions{what}")
    show_memory(plan, config.gpu_memory_gb, ((text, fit(settings, processes)) for text, settings, processes in remedies(config, world)))
    total = sum(plan.seconds.values())
    print(f"\ntime of a step of full length, from below, at {BANDWIDTH / 1e12:g} TB/s and {FLOPS / 1e12:g} TFLOP/s: {total:.3g} s, "
          f"{config.steps} steps {config.steps * total / 3600:.3g} h")
    print("  " + ", ".join(f"{name} {t:.3g} s ({t / total:.0%})" for name, t in plan.seconds.items()))


class Lessons(Protocol):
    """What is read of sft.Config."""
    model: str
    data: str
    epochs: float
    batch_size: int
    max_length: int
    max_tokens: int
    dtype: str
    offload: bool
    gradient_checkpointing: bool
    gpu_memory_gb: float


def lesson(config: Lessons, s: Shape, longest: int, world: int) -> Plan:
    """The plan of an optimiser step of sft.py, all pairs of the `longest` length: an update of train.py's without reference and reward model, its loss by linear_logprob."""
    step = SimpleNamespace(problems_per_step=config.batch_size, group_size=1, max_new_tokens=longest, cache_gb=CACHE_GB, max_tokens=config.max_tokens, dtype=config.dtype,
                           offload=config.offload, gradient_checkpointing=config.gradient_checkpointing, lora_rank=0, beta=0.0, level="sequence", updates_per_batch=1,
                           w_structure=0.0)
    plan = estimate(step, s, [], world, 0)
    return replace(plan, memory={name: plan.memory[name] for name in ("always", "update")}, seconds={"update": plan.seconds["update"]})


def show_lessons(config: Lessons, lengths: list[int], steps: int, world: int) -> None:
    """The same for sft.py, of so many steps. lengths: tokens of each pair, none where data and tokenizer do not lie here. ValueError where the model's config cannot be read."""
    s = shape(read_config(config.model))
    source = f"the longest of {config.data}" if lengths else "--max_length, or the model's positions, as no data and tokenizer lie here"
    longest = max(lengths) if lengths else config.max_length or s.positions
    plan, counted = lesson(config, s, longest, world), f"; {len(lengths)} pairs, {steps} steps" if lengths else ""
    print(settings_of(config))
    print(f"model          {config.model}: {s.params / 1e6:,.2f}M parameters")
    print(f"batch          {config.batch_size} pairs a step over {world} process(es){counted}; at most {longest} tokens each ({source}), {config.batch_size * longest:,} a step")
    print(f"update         up to {plan.micro_batches} micro-batches of {max(config.max_tokens, longest)} tokens in each process")
    others = {f"--{name} True": ({name: True}, world) for name in ("gradient_checkpointing", "offload")}
    others |= {f"torchrun --nproc_per_node {n}": ({}, n) for n in (2, 4, 8) if world < n <= config.batch_size}
    show_memory(plan, config.gpu_memory_gb, ((text, lesson(replace(config, **change), s, longest, processes)) for text, (change, processes) in others.items()))
    passes, total = {"forward": 2, "recomputation": 2 * config.gradient_checkpointing, "backward": 4}, plan.seconds["update"]
    print(f"\ntime of a step of full length, from below, at {FLOPS / 1e12:g} TFLOP/s: {total:.3g} s")
    print("  " + ", ".join(f"{name} {total * share / sum(passes.values()):.3g} s ({share / sum(passes.values()):.0%})" for name, share in passes.items() if share))
