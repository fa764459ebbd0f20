"""LoRA (Hu et al. 2021): the student's weights stay, small matrices beside them are trained; as an option, through peft.

    y = W x + (alpha / rank) * B (A x)                A (rank, in) random, B (out, rank) zero at first, stored in float32; W frozen, in the dtype of computing

    python train.py --preset qwen1.5b --lora_rank 32 --lr 1e-5 ...      # pip install peft; a rate some ten times that of full fine-tuning

The frozen start, which the KL is measured to, is the same model with the adapters off: no second copy. Checkpoints hold the adapters and their moments only,
W comes from --model again. In one process the adapters compute in float32, over several, or with --offload, in --dtype as the rest does.
At the end model/ is W + (alpha / rank) * B A, a plain checkpoint, and adapter/ is what peft loads.
Left out on purpose: adapters on the head or an embedding (logprob.py makes the log-probs from a plain head), quantised bases, sampling from merged weights.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from data import Tokenizer, save_model
from parallel import hollow


def adapted(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers with adapters, by name; none in a model without."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def layers_of(model: PreTrainedModel, targets: str) -> dict[str, torch.nn.Module]:
    """The layers that adapters on `targets` go to ("all-linear": every linear layer but the head; or ends of their names, "q_proj,v_proj"), by name. ValueError for
    one of `targets` that names no layer, or the head, or a layer that is not linear."""
    head = model.get_output_embeddings()
    if targets == "all-linear":
        return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head}
    ends = [end.strip() for end in targets.split(",")]
    found = {name: module for name, module in model.named_modules() if name and any(f".{name}".endswith(f".{end}") for end in ends)}
    if idle := [end for end in ends if not any(f".{name}".endswith(f".{end}") for name in found)]:
        raise ValueError(f"--lora_targets {targets}: no layer of this model is called {idle[0]!r}; mend or leave it out")
    if odd := [name for name, module in found.items() if module is head or not isinstance(module, torch.nn.Linear)]:
        raise ValueError(f"--lora_targets {targets}: {odd[0]} is {'the head' if found[odd[0]] is head else 'no linear layer'}; leave it out")
    return found


def add_adapters(model: PreTrainedModel, rank: int, alpha: int, targets: str, base: str) -> PreTrainedModel:
    """`model` with trainable adapters on `targets` (`layers_of`), in place, all else frozen. base: where its weights came from, for whoever loads the adapters.
    ImportError without peft, ValueError where adapters cannot be."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError("--lora_rank: pip install peft, or --lora_rank 0 for full fine-tuning") from None
    layers_of(model, targets)
    names = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, base_model_name_or_path=base, task_type="CAUSAL_LM"), model)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()                           # AdamW's steps would be rounded away in bfloat16
    return model


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """Within, the model is the frozen start, in eval mode. Nothing changes in a model without adapters."""
    layers, was_training = adapted(model).values(), model.training
    for layer in layers:
        layer._disable_adapters = True                        # peft's enable_adapters(False) would also touch requires_grad, which shards are made by
    if layers:
        model.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        if layers:
            model.train(was_training)


def merge(state: dict[str, torch.Tensor], scaling: dict[str, float]) -> dict[str, torch.Tensor]:
    """The state dict of the plain model, float32: {layer: alpha / rank} says which layers have adapters in `state`."""
    merged = {name.replace(".base_layer.", "."): x.float() if x.is_floating_point() else x for name, x in state.items() if ".lora_" not in name}
    for layer, scale in scaling.items():
        merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + scale * (state[f"{layer}.lora_B.default.weight"].float() @ state[f"{layer}.lora_A.default.weight"].float())
    return merged


def save_merged(model: PreTrainedModel, tokenizer: Tokenizer, out: Path, state: dict[str, torch.Tensor], adapter: Path | None = None) -> None:
    """Writes the merged model to `out`, as a plain Hugging Face checkpoint, and the adapters alone to `adapter`, as peft does. `state`: parallel.whole_state."""
    save_model(hollow(model, torch.float32), tokenizer, out, merge(state, {name: layer.scaling["default"] for name, layer in adapted(model).items()}))
    if adapter:
        adapter.mkdir(parents=True, exist_ok=True)
        model.peft_config["default"].save_pretrained(str(adapter))
        save_file({f"base_model.model.{name.replace('.default.', '.')}": x.contiguous() for name, x in state.items() if ".lora_" in name}, adapter / "adapter_model.safetensors")
