"""Checkpoints: everything that an exact resume needs, and nothing else: model, tokenizer, optimiser, step.

All randomness of a step comes from (seed, step), so there is no generator state to keep. Tensors are safetensors, the rest is JSON: no pickle.
A checkpoint is written aside and then renamed, so it is whole or it is not there. Left out on purpose: sharded and asynchronous writing.
"""
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from data import Tokenizer, save_model

FREE = {"steps", "resume", "save_every", "eval_problems", "eval_k", "max_tokens", "device", "out"}     # settings that may change between a run and its resume


def save_checkpoint(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Model, tokenizer, optimiser and step, written aside and then renamed: a checkpoint is whole or it is not there. The two before it are kept."""
    aside = folder / f".step_{step:06d}"
    shutil.rmtree(aside, ignore_errors=True)
    save_model(model, tokenizer, aside)
    state = optimizer.state_dict()["state"]
    save_file({f"{i}/{name}": value.contiguous() for i, entry in state.items() for name, value in entry.items()}, aside / "optimizer.safetensors")
    (aside / "state.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(folder / f"step_{step:06d}", ignore_errors=True)
    aside.rename(folder / f"step_{step:06d}")
    for old in sorted(folder.glob("step_*"))[:-2]:
        shutil.rmtree(old)


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> int:
    """Puts a checkpoint's optimiser state back; -> its step."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        i, name = key.split("/")
        state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((checkpoint / "state.json").read_text())["step"]


def start_folder(out: Path, settings: dict, resume: str, writes: bool) -> Path | None:
    """-> the checkpoint in `out` to go on from, None for a new run; log lines after it are cut off (by the process that `writes`), so that none is doubled.
    ValueError where `out` holds a run that is not to be resumed, or one of other settings."""
    checkpoints = sorted((out / "checkpoints").glob("step_*"))
    if resume not in ("", "auto"):
        raise ValueError(f"--resume {resume}: only 'auto' (the newest checkpoint in --out) is known")
    if not resume and (out / "log.jsonl").exists():
        raise ValueError(f"{out} already holds a run: choose another --out, or go on with --resume auto")
    if not resume or not (out / "run.json").exists():
        return None
    before = json.loads((out / "run.json").read_text())["config"]
    if changed := [name for name in settings if name not in FREE and before.get(name) != settings[name]]:
        differ = ", ".join(f"--{name} was {before.get(name)!r}, is {settings[name]!r}" for name in changed)
        raise ValueError(f"--resume: {differ}; go on with the same settings, or choose another --out")
    step = int(checkpoints[-1].name[5:]) if checkpoints else 0
    for name in ("log.jsonl", "rollouts.jsonl"):
        if writes and (out / name).exists():
            lines = [line for line in (out / name).read_text(encoding="utf-8").split("\n")[:-1] if json.loads(line)["step"] <= step]     # a torn last line goes too
            (out / f".{name}").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            (out / f".{name}").rename(out / name)
    return checkpoints[-1] if checkpoints else None
