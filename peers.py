"""Other implementations of the same work, for bench.py. Whoever is not installed raises ImportError and is listed as absent.

Of a Case they give log-probs (N,), differentiable, or (where the name says loss, grpo or sft) a loss whose gradients are for the caller to take;
of a Job the number of tokens of each completion that they sampled.
"""
from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

import logprob
from rollout import Sampler
from train import Config

PEER_ERRORS = (ImportError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError, NotImplementedError)     # a peer may be too old for this torch
if logprob.triton is not None:
    from triton.errors import TritonError
    PEER_ERRORS += (TritonError,)
LENGTH, LOW, HIGH, BETA = 256, 0.2, 0.28, 0.04              # tokens per sequence; clip and KL coefficients


@dataclass
class Case:
    """One problem: hidden (N, D) and weight (V, D) with gradients, targets (N,), and what the loss needs per row, (N,) float32."""
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor
    weights: Tensor
    old: Tensor
    ref: Tensor
    temperature: float

    def loss(self, logp: Tensor, rows: slice = slice(None)) -> Tensor:
        """Clipped GRPO with k3, each token with its own weight."""
        a, ratio, drift = self.advantages[rows], (logp - self.old[rows]).exp(), self.ref[rows] - logp
        return ((BETA * (drift.exp() - drift - 1) - torch.minimum(ratio * a, ratio.clamp(1 - LOW, 1 + HIGH) * a)) * self.weights[rows]).sum()


def from_logits(x: Tensor, W: Tensor, y: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax((x @ W.T).float() / temperature, -1).gather(1, y[:, None])[:, 0]


def eager(case: Case) -> Tensor:
    return from_logits(case.hidden, case.weight, case.targets, case.temperature)


def chunked(case: Case, step: int = 1024) -> Tensor:
    parts = zip(case.hidden.split(step), case.targets.split(step))
    return torch.cat([checkpoint(from_logits, x, case.weight, y, case.temperature, use_reentrant=False) for x, y in parts])


def torch_linear_cross_entropy(case: Case) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(case.hidden / case.temperature, case.weight, case.targets, reduction="none", options=options)


def cut_cross_entropy(case: Case) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy
    return -linear_cross_entropy(case.hidden / case.temperature, case.weight, case.targets, reduction="none")


def liger_scaled(case: Case) -> Tensor:
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function as scaled
    return -scaled.apply(case.hidden, case.weight, case.targets, case.temperature, -100, 1, False)


def liger_sft(case: Case) -> Tensor:
    """Step of another loss: it can only sum, so no weights and no GRPO; for its time."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as flce
    out = flce.apply(case.hidden, case.weight, case.targets, None, None, -100, 0.0, 0.0, "sum")
    return out[0] if isinstance(out, tuple) else out


def liger_grpo(case: Case) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    shape = (-1, min(LENGTH, len(case.targets)))
    loss = LigerFusedLinearGRPOLoss(beta=BETA, epsilon_low=LOW, epsilon_high=HIGH, temperature=case.temperature)
    return loss(case.hidden.view(*shape, case.hidden.shape[1]), case.weight, case.targets.view(shape), torch.ones_like(case.targets).view(shape),
                case.advantages.view(shape)[:, 0].contiguous(), ref_per_token_logps=case.ref.view(shape), old_per_token_logps=case.old.view(shape))[0]


def liger_grpo_from_logits(case: Case) -> Tensor:
    from liger_kernel.ops.grpo_loss import GrpoLossFunction
    rows = lambda t: t.view(1, -1).contiguous()
    logits = F.pad(case.hidden, (0, 0, 0, 1)) @ case.weight.T                       # it drops the last position
    return GrpoLossFunction.apply(logits[None], rows(case.old), rows(case.ref), rows(case.targets), case.advantages[:1], None,
                                  case.temperature, BETA, LOW, HIGH, True)[0]


def verl(case: Case) -> Tensor:
    """Its kernels file alone: importing the package would ask for ray and much else."""
    root = importlib.util.find_spec("verl")
    if root is None:
        raise ImportError("verl")
    if "verl_kernels" not in sys.modules:
        device = types.ModuleType("verl.utils.device")
        device.get_device_capability, device.get_device_name = torch.cuda.get_device_capability, lambda: "cuda"
        device.is_cuda_available, device.get_torch_device = True, lambda: torch.cuda
        sys.modules.update({"verl": types.ModuleType("verl"), "verl.utils": types.ModuleType("verl.utils"), "verl.utils.device": device})
        folder, package = Path(root.submodule_search_locations[0]) / "utils" / "kernel", types.ModuleType("verl_kernels")
        package.__path__ = [str(folder)]
        sys.modules["verl_kernels"] = package
    from verl_kernels.linear_cross_entropy import linear_cross_entropy
    return linear_cross_entropy(case.hidden, case.weight, case.targets, case.temperature, "none")[0]


def bare(products: str) -> Callable[[Case], None]:
    """cuBLAS: f logits, x and w the two gradient products, from logits of random bf16."""
    def run(case: Case) -> None:
        x, W, E = case.hidden.detach(), case.weight.detach(), None
        for product in products:
            if product == "f":
                E = x @ W.T
            else:
                torch.mm(E, W) if product == "x" else torch.mm(E.T, x)
    return run


def ours_a(case: Case) -> Tensor:
    return logprob.linear_logprob(case.hidden, case.weight, case.targets, case.temperature)[0]


def ours_b(case: Case, chunk: int = 8192, frozen: bool = False) -> Tensor:
    weight = case.weight.detach() if frozen else case.weight
    return logprob.linear_policy_loss(case.hidden, weight, case.targets, case.temperature, case.loss, chunk)[0]


def ours_from_logits(case: Case) -> Tensor:
    return logprob.logprob_from_logits(case.hidden @ case.weight.T, case.targets, case.temperature)


# ---- sampling

@dataclass
class Job:
    """One sampling problem: `group` completions of each prompt at temperature 1, up to a stop token or max_new_tokens."""
    model: PreTrainedModel
    prompts: list[list[int]]
    group: int
    max_new_tokens: int
    stop_ids: set[int]
    pad_id: int
    samplers: dict[bool | None, Sampler] = field(default_factory=dict)


def sample_ours(job: Job, static: bool | None = None) -> list[int]:
    """By one sampler for all calls, as in a training run: on a GPU its first call also compares its loops."""
    sampler = job.samplers.setdefault(static, Sampler(job.model, job.stop_ids, job.pad_id, static=static))
    return sampler.generate(job.prompts, job.group, job.max_new_tokens, 1.0).lengths.tolist()


def settings(job: Job, **more: object) -> GenerationConfig:
    ends = {"eos_token_id": sorted(job.stop_ids) or None, "pad_token_id": job.pad_id}
    return GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=job.max_new_tokens, **ends, **more)


def up_to_stop(rows: list[list[int]], stop_ids: set[int]) -> list[int]:
    return [next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row)) for row in rows]


def sample_hf(job: Job, **more: object) -> list[int]:
    """transformers' generate; its batch goes on until the last row has stopped."""
    width, device = max(map(len, job.prompts)), job.model.device
    ids = torch.tensor([[job.pad_id] * (width - len(p)) + p for p in job.prompts], device=device)
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in job.prompts], device=device)
    out = job.model.generate(input_ids=ids, attention_mask=real, generation_config=settings(job, num_return_sequences=job.group, **more))
    return up_to_stop(out[:, width:].tolist(), job.stop_ids)


def sample_hf_continuous(job: Job) -> list[int]:
    """transformers' continuous batching with a paged cache, of a page more than the rows need: left to itself it takes the machine's memory, for a mask above all."""
    rows, pages = len(job.prompts) * job.group, -(-(max(map(len, job.prompts)) + job.max_new_tokens) // 256)
    size = ContinuousBatchingConfig(num_blocks=rows * pages + 1, max_batch_tokens=max(256, 2 * rows))           # of 256 tokens each, its default
    results = job.model.generate_batch([p for p in job.prompts for _ in range(job.group)], generation_config=settings(job), continuous_batching_config=size, progress_bar=False)
    return up_to_stop([result.generated_tokens for result in results.values()], job.stop_ids)


class VLLM:
    """vLLM's engine on a copy of the job's model, loaded at the first call. Written from its documentation, not run yet."""

    def __call__(self, job: Job) -> list[int]:
        from vllm import LLM, SamplingParams
        if not hasattr(self, "engine"):
            self.folder = tempfile.TemporaryDirectory()
            job.model.save_pretrained(self.folder.name)
            self.engine = LLM(self.folder.name, skip_tokenizer_init=True, gpu_memory_utilization=0.5, max_model_len=8192, seed=0)
        params = SamplingParams(n=job.group, temperature=1.0, max_tokens=job.max_new_tokens, stop_token_ids=sorted(job.stop_ids), detokenize=False,
                                logprobs=0)                                                                 # 0: of the sampled token
        answers = self.engine.generate([{"prompt_token_ids": p} for p in job.prompts], params, use_tqdm=False)
        return [len(out.token_ids) for answer in answers for out in answer.outputs]

# ---- whole steps


def trl_steps(model: PreTrainedModel, prompts: list[list[int]], config: Config, ends: tuple[int, int], full_length: bool,
              grade: Callable[[list[list[int]], list[int]], list[float]], steps: int, after: Callable[[dict[str, float]], None]) -> None:
    """TRL's GRPOTrainer by our Config, on prompts of ids that pass its tokenizer as words; ends: the ids of eos and pad. grade(completions, prompt numbers) -> rewards;
    after(seconds by part) is called between its steps."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(model.config.vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    seconds: dict[str, float] = {}

    class Timed(trl.GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            started = time.perf_counter()
            out = super()._generate_single_turn(*args, **kwargs)
            seconds.update(sampling=time.perf_counter() - started, tokens=sum(map(len, out[0])))
            return out

        def _calculate_rewards(self, *args, **kwargs):
            started = time.perf_counter()
            out = super()._calculate_rewards(*args, **kwargs)
            seconds["scoring"] = time.perf_counter() - started
            return out

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            whole = time.perf_counter() - self.started
            after({**seconds, "step": whole, "update": whole - seconds["sampling"] - seconds["scoring"]})

    rows = config.problems_per_step * config.group_size
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(output_dir=folder, use_cpu=config.device == "cpu", bf16=False, num_generations=config.group_size, per_device_train_batch_size=rows,
                                  gradient_checkpointing=False, max_completion_length=config.max_new_tokens, temperature=config.temperature, beta=config.beta,
                                  generation_kwargs={"min_new_tokens": config.max_new_tokens} if full_length else None, epsilon=config.clip_low, epsilon_high=config.clip_high,
                                  max_grad_norm=config.max_grad_norm, learning_rate=config.lr, lr_scheduler_type="constant", adam_beta2=config.adam_beta2, optim="adamw_torch",
                                  max_steps=steps, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
        Timed(model=model, args=settings, reward_funcs=lambda completion_ids, number, **_: grade(completion_ids, number), callbacks=[Turns()],
              train_dataset=Dataset.from_dict({"prompt": [" ".join(f"t{i}" for i in p) for p in prompts], "number": list(range(len(prompts)))}),
              processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"t{ends[0]}", pad_token=f"t{ends[1]}")).train()
