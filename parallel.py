"""Several processes: who am I, what do all of us have, and a model whose parameters are spread over all of us (torch's FSDP2).

    torchrun --nproc_per_node 8 train.py ...                                                                   # one machine
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...         # the same line on each of two

Master parameters, gradients and AdamW's moments are float32 and sharded. Forward and backward gather a layer at a time, in `dtype`; gradients are summed in
float32. For sampling all parameters are gathered into a module of their own, so that processes may decode for as long as their rows need without a word to each
other, and CUDA graphs find the weights where they were (`gathered`).
A collective that one process leaves out hangs the others: whoever calls one here calls it on every process, the same number of times.

Left out on purpose: tensor and pipeline parallelism, expert parallelism; one flat list of processes does for the sizes that this method is used at.
"""
import copy
import json
import os
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

BACKEND = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
PATIENCE = timedelta(hours=2)                            # of a collective; waiting for rewards has a shorter one of its own (`meet`)
_gate: list[dist.ProcessGroup] = []                      # what `meet` waits on

# ------------------------------------------------------------------------------------------------ processes

def start() -> None:
    """Joins the processes that torchrun started; without torchrun, nothing. ValueError where something else has numbered them, but not on their machine."""
    if "RANK" in os.environ and not dist.is_initialized():
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("RANK is set in the environment, LOCAL_RANK is not: start the processes with torchrun, or unset RANK for one process alone")
        if (card := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():              # more processes than cards: that is for --device cpu
            torch.cuda.set_device(card)
        store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
        attempt = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)      # or --max_restarts meets the addresses of the dead in it
        dist.init_process_group(BACKEND, store=attempt, rank=number, world_size=count, timeout=PATIENCE)
        _gate.append(dist.new_group(backend="gloo", timeout=PATIENCE))


def use_device(name: str) -> None:
    """Checks a --device, and makes a card that it names the current one, on which kernels are launched; ValueError for one that this process has not."""
    cards = torch.cuda.device_count()
    there = ["cpu", *["cuda"] * (int(os.environ.get("LOCAL_RANK", 0)) < cards), *(f"cuda:{n}" for n in range(cards))]          # of more processes than cards the last have none
    if name not in there:
        raise ValueError(f"--device {name}: not on this machine, choose one of: {', '.join(there)}" + ", or start fewer processes" * (name == "cuda" and cards > 0))
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)


def finish() -> None:
    """Leaves them."""
    if dist.is_initialized():
        _gate.clear()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """x summed over processes, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def all_max(value: float) -> float:
    """The largest of the processes' values."""
    x = torch.tensor(float(value), dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.item()


def gather_rows(rows: list[dict]) -> list[dict]:
    """Rows of every process on each of them, in rank order, as JSON bytes (no pickle)."""
    if world() == 1:
        return rows
    data = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    parts = [torch.zeros(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
    dist.all_gather(parts, torch.nn.functional.pad(data, (0, int(max(sizes)) - len(data))))
    return [row for part, size in zip(parts, sizes) for row in json.loads(bytes(part[:size].tolist()))]


def added_up(counts: dict[str, float]) -> dict[str, float]:
    """{name: sum of all processes' counts}; one that a process lacks is 0 there. A collective."""
    total = Counter()
    for part in gather_rows([dict(counts)]):
        total.update(part)
    return dict(total)


def meet(what: str, seconds: float) -> None:
    """All processes wait here for each other, before the first collective after work of unknown length. RuntimeError names who did not come within `seconds`."""
    if world() == 1:
        return
    try:
        dist.monitored_barrier(_gate[0], timedelta(seconds=seconds), wait_all_ranks=True)
    except RuntimeError as error:
        raise RuntimeError(f"process {rank()}: not all came to meet after {what}: {str(error).splitlines()[0]} (has that process died, or does its reward model hang? "
                           f"--reward_timeout {seconds:.0f} is the patience)") from None

# ------------------------------------------------------------------------------------------------ a model to be trained

def recompute(model: PreTrainedModel, on: bool = True) -> None:
    """Activation checkpointing: in training mode each layer keeps its input only and is computed again in the backward pass."""
    new = hasattr(model, "activation_checkpointing_enable")                   # its name from transformers 5.23 on
    switch = getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_{'enable' if on else 'disable'}")
    switch({"use_reentrant": False}) if on else switch()


def units(model: torch.nn.Module) -> list[FSDPModule]:
    """The model's FSDP units, the root first; none where it is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def shard(model: PreTrainedModel, dtype: str = "float32", offload: bool = False, device: str = "") -> PreTrainedModel:
    """`model` (float32), its parameters spread over all processes, in place: one unit a layer, the rest (embedding, norm, head) one more. `dtype` is what it
    computes in, `device` where (empty: where it is): a model in the CPU's memory moves there unit by unit, so that no card holds the whole. offload: parameters, gradients
    and optimiser state rest in CPU memory. Also good for one process: float32 masters of a bfloat16 model."""
    if not dist.is_initialized():
        dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise ValueError(f"{type(model).__name__} does not say which of its modules are layers (_no_split_modules), so it cannot be sharded")
    there = torch.empty(0, device=device or model.device).device             # this starts CUDA on the process's own card; the mesh would choose one
    policy = {"mesh": init_device_mesh(there.type, (world(),)), "mp_policy": MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32),
              "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()}
    bare = copy.deepcopy(model, {id(model.config): model.config} | {id(p): None for p in model.parameters()} | {id(b): b for b in model.buffers()})     # no weights, for `gathered`
    for layer in layers:
        fully_shard(layer, **policy)
    fully_shard(model, **policy, reshard_after_forward=False)
    model.inside = types.MethodType(lambda self, call: call(), model)
    register_fsdp_forward_method(model, "inside")
    model.__dict__["bare"] = bare                    # past Module.__setattr__: it is no part of the model
    return model


def inside(model: PreTrainedModel, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """call(), as the forward pass of `model`: if it is sharded, the embedding and the head are gathered in there, and the gradients of what comes out are scattered."""
    return model.inside(call) if isinstance(model, FSDPModule) else call()


@contextmanager
def gathered(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """All parameters whole on every process, in the dtype of computing, in places that they keep till the end: for sampling. Yields the module to sample from: the same
    layers without FSDP's hooks (which no CUDA graph can be captured through), on those very parameters; `model` itself where it is not sharded."""
    if not isinstance(model, FSDPModule):
        yield model
        return
    for unit in units(model):
        unit.unshard()
    for name, module in model.bare.named_modules():
        module._parameters.update(model.get_submodule(name)._parameters)
    try:
        yield model.bare
    finally:
        for module in model.bare.modules():
            module._parameters.update(dict.fromkeys(module._parameters))                    # None: a use of what is freed now would be an error
        for unit in units(model)[::-1]:
            unit.reshard()


def plain(x: torch.Tensor) -> torch.Tensor:
    """A tensor as one piece on this process; a collective where it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def finite(model: torch.nn.Module) -> bool:
    """Are all trained parameters finite, on every process? A collective."""
    parts = [p.detach().to_local() if isinstance(p, DTensor) else p.detach() for p in model.parameters() if p.requires_grad]
    ends = [end for part in parts if part.numel() for end in part.aminmax()]           # without a copy of any; NaN comes through
    return not all_max(bool(ends) and not torch.stack(ends).isfinite().all())


def whole_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict, tied weights once, whole on the CPU of process 0 (empty on the others); a tensor at a time, so that no device holds all of it twice."""
    state: dict[str, torch.Tensor] = {}
    twice = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {name for name, _ in model.named_parameters()}
    for name, value in model.state_dict().items():
        if name not in twice:
            value = plain(value.detach())
            if rank() == 0:
                state[name] = value.cpu()
    return state


def hollow(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A plain model of the same kind, without weights: what data.save_model writes a `whole_state` through."""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    plain.generation_config = model.generation_config
    return plain
