"""Checkpoints: everything that an exact resume needs, and nothing else: parameters, optimiser, step.

All randomness of a step comes from (seed, step), so there is no generator state to keep. torch.distributed.checkpoint writes the tensors, every process its
shards, as safetensors, while training goes on; the rest is JSON: no pickle. A checkpoint is written aside, its files' hashes go into manifest.json, and only then
it gets its name: what bears the name step_000050 is whole, and what was damaged later is found out. Any number of processes can go on from it.

    python checkpoint.py out/toy/checkpoints/step_000200 --out out/at_200         # as a Hugging Face checkpoint, for eval.py and everybody else

Left out on purpose: incremental checkpoints, remote storage.
"""
import hashlib
import json
import math
import re
import shutil
import sys
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import lora
from command import Parser, ending, full_disk, log_lines, read_record, write_aside
from data import Tokenizer, load_model, load_tokenizer, save_model
from parallel import all_max, rank, whole_state
from watch import model_hash

warnings.filterwarnings("ignore", message="torch.distributed is disabled")       # one process without torchrun: that is meant

FREE = {"steps", "resume", "save_every", "keep", "eval_problems", "eval_k", "max_tokens", "device", "out", "offload", "gradient_checkpointing", "log_to", "reward_timeout",
        "max_faults", "warn_entropy", "warn_truncated", "warn_spreadless", "warn_ratio", "warn_unscored", "dry_run", "gpu_memory_gb",
        "cache_gb"}                                           # settings of train.py that may change between a run and its resume


def model_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a model: the trained parameters and, where nothing is frozen, the buffers that belong to its weights (a router's corrections, in some MoE)."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = model.state_dict().keys() if all(p.requires_grad for p in model.parameters()) else ()
    return trained | {name: b for name, b in model.named_buffers() if name in whole}


def named_tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its name there: the model's "model/NAME", and per trained parameter "step/NAME", "exp_avg/NAME", "exp_avg_sq/NAME". No copies."""
    tensors = {f"model/{name}": p.detach() for name, p in model_tensors(model).items()}
    for name, p in model.named_parameters() if optimizer else ():
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state.get(p, {}).items()}
    return tensors


def manifest(folder: Path) -> dict[str, list]:
    """{file: [bytes, sha256]} of a folder and those in it (a tokenizer's further chat templates lie in one)."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: [file.stat().st_size, hashlib.file_digest(file.open("rb"), "sha256").hexdigest()] for name, file in files.items() if name != "manifest.json"}


def by_step(folder: Path) -> dict[int, Path]:
    """{step: its checkpoint} in `folder`, the earliest first. A folder of another name (step_000050_best, somebody's copy) is none of the run's."""
    return dict(sorted((int(path.name[5:]), path) for path in folder.glob("step_*") if re.fullmatch("step_([0-9]{6}|[1-9][0-9]{6,})", path.name)))


def check_shared(folder: Path) -> None:
    """Makes the folder; OSError on every process where one does not see what the first has put there: on two machines' own disks lie halves that nobody could load."""
    mark = folder / f".seen_by_all_{all_max(time.time() if rank() == 0 else 0.0):.6f}"
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    all_max(0)                                                # nobody looks before it is there
    lost = all_max(not mark.exists())
    if rank() == 0:
        mark.unlink()
    if lost:
        raise OSError(f"{folder} is not one folder for all processes, so its checkpoints would be in pieces: give an --out on a disk that all machines share")


class Checkpoints:
    """The checkpoints of a run, in `folder`: the last `keep`, and of the others the one with the best training reward."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep, self.pool = folder, keep, ThreadPoolExecutor(1)
        self.pending: Future | None = None
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None            # the writer's own: it talks while training does
        check_shared(folder)
        if rank() == 0:
            for half in folder.glob(".step_*"):               # of a kill in the midst of writing; its number may never come again
                shutil.rmtree(half, ignore_errors=True)

    def save(self, model: PreTrainedModel, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer, step: int, **notes: float) -> None:
        """Starts writing a checkpoint, and returns; `notes` (JSON) go beside the step into state.json. Raises what became of the one before."""
        self.wait()
        aside = self.folder / f".step_{step:06d}"
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            with full_disk(aside):
                for part in (model.config, model.generation_config, tokenizer, *getattr(model, "peft_config", {}).values()):
                    part.save_pretrained(str(aside))
            (aside / "state.json").write_text(json.dumps({"step": step, **notes}))
        all_max(0)                                            # nobody writes before the folder is there
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)         # it copies before async_save returns, and training goes on in place
        written = dcp.async_save(named_tensors(model, optimizer), storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        self.pending = self.pool.submit(self.complete, written, aside)

    def complete(self, written: Future, aside: Path) -> None:
        """In the background: all shards are there -> manifest, name, room made."""
        try:
            written.result()
        except CheckpointException as error:
            reasons = dict.fromkeys(str(e[0] if isinstance(e, tuple) else e) for e in error.failures.values())
            raise OSError(f"{aside.name[1:]} could not be written ({'; '.join(reasons)})") from None
        if rank() == 0:
            (aside / "manifest.json").write_text(json.dumps(manifest(aside), indent=1))
            final = aside.with_name(aside.name[1:])
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            for old in spare(self.folder, self.keep, final):
                shutil.rmtree(old)

    def wait(self, seconds: float | None = None) -> None:
        """Until the last save is done (seconds=0: look, don't wait). OSError says why it could not be written; earlier checkpoints are untouched then."""
        if self.pending and (seconds is None or self.pending.done()):
            pending, self.pending = self.pending, None
            try:
                pending.result()
            except OSError as error:
                raise OSError(f"checkpoint: {error}; earlier ones in {self.folder} are untouched: make room, then go on with --resume auto") from None


def spare(folder: Path, keep: int, last: Path) -> list[Path]:
    """Checkpoints that may go now that `last` is written: all but the last `keep` and, of those before, the one with the best reward. One whose reward cannot be read has
    none. Those after `last` do not count: they were passed over as damaged, or it would not have been written."""
    def reward(path: Path) -> float:
        try:                                                  # not there: a kill came while it was being removed; unreadable: damaged since, and none to go on from
            found = json.loads((path / "state.json").read_text()).get("reward")
        except (OSError, ValueError, AttributeError):
            return -math.inf
        return found if isinstance(found, (int, float)) else -math.inf

    older = [path for step, path in by_step(folder).items() if step <= int(last.name[5:])][:-keep]
    rewards = {path: reward(path) for path in older}
    best = max((path for path in reversed(older) if rewards[path] > -math.inf), key=rewards.get, default=None)                 # of equals the last
    return [path for path in older if path != best]


def clear(folder: Path) -> None:
    """Removes the checkpoints of a run that has ended, and their folder where nothing else lies in it."""
    for checkpoint in (*by_step(folder).values(), *folder.glob(".step_*")):
        shutil.rmtree(checkpoint)
    with suppress(OSError):                                   # somebody's copies stay
        folder.rmdir()


def damage(checkpoint: Path) -> str:
    """Why a checkpoint cannot be used, "" if it is whole: every file of its manifest with its size and hash."""
    try:
        wanted = json.loads((checkpoint / "manifest.json").read_text())
        found = {name: size for name, (size, _) in wanted.items() if not (checkpoint / name).is_file() or (checkpoint / name).stat().st_size != size}
        if found or not wanted:
            return f"{next(iter(found), 'all that it is made of')} is missing or cut short"
        return next((f"{name} was changed" for name, entry in manifest(checkpoint).items() if name in wanted and entry != wanted[name]), "")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"manifest.json cannot be read ({error})"


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """(the newest whole checkpoint, what was wrong with those passed over)."""
    passed = []
    for checkpoint in reversed(by_step(folder).values()):
        if not (why := damage(checkpoint)):
            return checkpoint, passed
        passed.append(f"{checkpoint}: {why}")
    return None, passed


def newest_of_all(folder: Path) -> tuple[Path | None, list[str]]:
    """`newest`, as the first process sees it, on every process."""
    checkpoint, passed = newest(folder) if rank() == 0 else (None, [])
    step = int(all_max(int(checkpoint.name[5:]) if checkpoint else 0))
    return (folder / f"step_{step:06d}" if step else None), passed


def load_checkpoint(checkpoint: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Puts trained parameters and optimiser state back, into whatever shards they have now (what is frozen, under LoRA, comes from --model); -> state.json.
    ValueError for a checkpoint of another model."""
    reader = HuggingFaceStorageReader(str(checkpoint))
    saved = reader.read_metadata().state_dict_metadata
    shapes, mine = {name[6:]: tuple(entry.size) for name, entry in saved.items() if name.startswith("model/")}, model_tensors(model)
    if wrong := {n: s for n, p in mine.items() if (s := shapes.pop(n, None)) != tuple(p.shape)} or shapes:
        name = next(iter(wrong))
        here = tuple(mine.get(name, torch.empty(0)).shape)
        raise ValueError(f"{checkpoint} is of another model: {name} is {wrong[name] or 'missing'} there and {here} here")
    if optimizer:
        optimizer.state.clear()
        for name, p in model.named_parameters():
            if f"exp_avg/{name}" in saved:
                optimizer.state[p] = {"step": torch.zeros((), device=p.device if optimizer.defaults["fused"] else "cpu"),        # where AdamW wants it
                                      "exp_avg": torch.zeros_like(p, requires_grad=False), "exp_avg_sq": torch.zeros_like(p, requires_grad=False)}
    with torch.no_grad():
        dcp.load(named_tensors(model, optimizer), storage_reader=reader, no_dist=not dist.is_initialized())
    return json.loads((checkpoint / "state.json").read_text())


def changed(before: dict, record: dict, free: set[str]) -> str:
    """What keeps a run with the run.json `before` from going on as `record` says, "" if nothing: settings that are not free, the contents of the data files, the
    chat template, the models. Data files that both records have, the training's first, then the held-out, are compared by hash: they may lie elsewhere now."""
    old, new, files = before["config"], record["config"], list(zip(before.get("data", {}).items(), record["data"].items()))
    free = free | {*("data", "eval_data")[:len(files)]}
    if names := [name for name in new if name not in free and old.get(name) != new[name]]:
        return ", ".join(f"--{name} was {old.get(name)!r}, is {new[name]!r}" for name in names) + "; go on with the same settings, or choose another --out"
    for (place, was), (file, now) in files:
        if was != now:
            return f"{file} has other contents (SHA-256 {now}...) than {place} when the run began ({was}...); put the old file back, or choose another --out"
    if (was := before.get("chat_template", record["chat_template"])) != (now := record["chat_template"]):
        return f"the chat template of --model {new['model']} is another one (SHA-256 {now}...) than when the run began ({was}...); put the old one back, or choose another --out"
    for path, now in record.get("models", {}).items():
        if (was := before.get("models", {}).get(path, now)) != now:
            return f"{path} is not the model that it was when the run began (SHA-256 {was}..., now {now}...): put the old one back, or choose another --out"
    return ""


def lost(out: Path, save_every: int, passed: list[str]) -> str:
    """Why a run without a whole checkpoint may not start over in `out`, "" where it may: the kill came before its first one was whole. `passed`: its damaged ones."""
    rows, kept = [row for _, row in (log_lines(out / "log.jsonl") if (out / "log.jsonl").exists() else ())], out / "checkpoints"
    steps = [row["step"] for row in rows]
    due = [row["step"] for row in rows if save_every and row["step"] % save_every == 0 and not row.get("nonfinite")]        # after these one was saved
    # the first is written while training goes on, to the second at most; between a log line and the begin of its writing a kill may come too
    writing = due and kept.is_dir() and due[1:] in ([], steps[-1:]) and ((kept / f".step_{due[0]:06d}").exists() or due == steps[-1:])
    if not passed and not (out / "model").exists() and (not due or writing):
        return ""
    why = "; ".join(passed) or f"{kept} " + ("holds none" if kept.is_dir() else "is not there")
    first, *others = [name for name in ("log.jsonl", "rollouts.jsonl", "checkpoints", "model") if (out / name).exists()]
    return (f"{out} holds {len(steps)} steps and no whole checkpoint ({why}): choose another --out, or move {first} away" + f", with {', '.join(others)}" * bool(others))


def start_folder(out: Path, record: dict, resume: str, free: set[str] = FREE, model: str = "model") -> tuple[Path | None, list[str]]:
    """-> (the checkpoint in `out` to go on from, None for a new run; which were passed over and why). `record`: the run_record of the run that is to go on or begin,
    which writes its model into the folder `model` of `out`; added to it are data that only the earlier one has noted (--eval_problems 0 now), and what that one was
    made by (as "earlier", the oldest first). ValueError where `out` holds a run that is not to be resumed, one of other settings (but for the `free` ones), data or models,
    one whose checkpoints are gone, or anything that a new run would mix with or write over, such as --model itself. A collective."""
    if resume not in ("", "auto"):
        raise ValueError(f"--resume {resume}: only 'auto' (the newest whole checkpoint in --out) is known")
    if (out / model).resolve() == Path(record["config"]["model"]).resolve():
        raise ValueError(f"{out / model} is --model itself, which the run would write over: choose another --out")
    if not resume and (out / "log.jsonl").exists():
        raise ValueError(f"{out} already holds a run: choose another --out, or go on with --resume auto")
    if (out / "log.jsonl").exists() and not (out / "run.json").exists():
        raise ValueError(f"{out} holds log.jsonl and no run.json, the settings that its steps were made with: put it back, choose another --out, or move log.jsonl away")
    others = [file for name in ("rollouts.jsonl", "checkpoints/step_*", "sft.json", "config.json", model) if name for file in out.glob(name)]
    if others and not (resume and (out / "run.json").exists()):               # old checkpoints' higher numbers would win over the new ones
        raise ValueError(f"{others[0]} is there already, of another run or a model: choose another --out, or move it away")
    before = read_record(out / "run.json", "config") if resume and (out / "run.json").exists() else {}
    if odd := [name for name in ("config", "data", "models") if not isinstance(before.get(name, {}), dict)]:
        raise ValueError(f"{out / 'run.json'}: {odd[0]!r} is no object, as a run writes it: put the file back, or choose another --out")
    if before and (why := changed(before, record, free)):
        raise ValueError(f"--resume: {why}")
    record["data"] |= dict(list(before.get("data", {}).items())[len(record["data"]):])
    if before:                                                # what made the steps before each resume
        record["earlier"] = [*before.get("earlier", ()), {name: before.get(name) for name in ("command", "commit", "versions", "machine", "processes")}]
    all_max(0)                                                # the first process writes run.json anew: not before all have read it
    start, passed = newest_of_all(out / "checkpoints") if before else (None, [])
    if start and int(start.name[5:]) > record["config"].get("steps", math.inf):
        raise ValueError(f"--steps {record['config']['steps']}: {start} has gone further already: ask for more, or export one of its checkpoints (python checkpoint.py --help)")
    why = lost(out, before["config"].get("save_every", 0), passed) if before and not start and rank() == 0 else ""
    if all_max(bool(why)):
        raise ValueError(why or f"{out} holds no whole checkpoint: the first process says more")
    if before and not start and rank() == 0:
        print(f"note: no checkpoint in {out / 'checkpoints'} yet: the run starts over", file=sys.stderr)
    return start, passed


def cut_logs(out: Path, step: int, steps: int = 0) -> None:
    """Cuts off the log lines after `step`, so that a run that goes on from there doubles none; if it has `steps` to go to, the evaluation at its end goes too, which was
    of a student that trains on. ValueError names a broken line by file and number, and both logs stay as they are."""
    logs = {name: [(row["step"], line) for line, row in log_lines(out / name)]                 # both, before either is written; a last line torn goes, too
            for name in ("log.jsonl", "rollouts.jsonl") if (out / name).exists()}
    logged = [at for at, _ in logs.get("log.jsonl", ())]
    if again := sum(at > step for at in logged):
        print(f"note: {again} logged step{'s' * (again > 1)} after step {step}, the newest checkpoint's, will be made again", file=sys.stderr)
    if missing := step - len({at for at in logged if at <= step}):
        print(f"note: {out / 'log.jsonl'} lacks {missing} of the {step} steps of the checkpoint: the run goes on all the same, its curves have a gap", file=sys.stderr)
    for name, rows in logs.items():
        write_aside(out / name, lambda file, rows=rows: file.write_bytes(b"".join(line + b"\n" for at, line in rows if at <= step)))
    if step < steps:
        (out / "eval_after.jsonl").unlink(missing_ok=True)


def main() -> None:
    """Writes a checkpoint's model and tokenizer as a Hugging Face folder."""
    parser = Parser(description="A checkpoint of train.py as a Hugging Face folder.", allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="out/RUN/checkpoints/step_NNNNNN")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if not args.checkpoint.is_dir() or (why := damage(args.checkpoint)):
        found = sorted(args.checkpoint.glob("checkpoints/step_*"))
        hint = f"; give one of its checkpoints, such as {found[-1]}" if found else "; it is a model already" if (args.checkpoint / "config.json").is_file() else ""
        sys.exit(f"error: {args.checkpoint} is not a whole checkpoint: {why if args.checkpoint.is_dir() else 'no such folder'}{hint}")
    if args.out.exists():
        sys.exit(f"error: {args.out} is there already: choose another --out")
    if (note := args.checkpoint / "adapter_config.json").is_file():
        about, dtype = json.loads(note.read_text()), AutoConfig.from_pretrained(args.checkpoint).dtype or torch.float32               # what the run held its base in
        run = args.checkpoint.resolve().parent.parent / "run.json"
        known = read_record(run).get("models") if run.is_file() else None
        try:
            base, _ = load_model(name := about["base_model_name_or_path"], dtype=str(dtype).removeprefix("torch."))
            was = known.get(name, "") if isinstance(known, dict) else ""
            if (now := model_hash(name)[:len(was)]) != was:
                raise ValueError(f"{name} is not what it was in training (SHA-256 {was}..., now {now}...): put the old one back")
            model = lora.add_adapters(base, about["r"], about["lora_alpha"], ",".join(about["target_modules"]), name)
        except (ValueError, OSError, ImportError) as error:
            sys.exit(f"error: the adapters' model: {error}")
        state = load_checkpoint(args.checkpoint, model)
        lora.save_merged(model, load_tokenizer(args.checkpoint), args.out, whole_state(model))
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.checkpoint))
        model.generation_config = GenerationConfig.from_pretrained(args.checkpoint)           # all ids that end a text; the config may know one only
        state = load_checkpoint(args.checkpoint, model)
        save_model(model, load_tokenizer(args.checkpoint), args.out)
    print(f"step {state['step']} of {args.checkpoint} is in {args.out}")


if __name__ == "__main__":
    with ending():
        main()
