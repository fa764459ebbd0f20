"""What keeps an eye on a run: why nothing is being learned, what to do about numbers that are not finite, signals, the run's record, dashboards.

    python train.py --log_to tensorboard                   # or wandb, trackio: each is imported here and nowhere else, none is needed

Nothing here changes a figure of the training: a run with every warning silenced is the same run.
"""
import hashlib
import json
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import torch
from transformers.utils import cached_file

from command import Screen, ending, one_line
from data import Tokenizer, check_folder, file_hash, template_hash
from parallel import all_max, finish, rank, start, world

# ------------------------------------------------------------------------------------------------ why nothing is being learned

class Thresholds(Protocol):
    """What `warnings` reads of train.Config."""
    warn_entropy: float
    warn_truncated: float
    warn_spreadless: float
    warn_ratio: float
    warn_unscored: float
    problems_per_step: int
    group_size: int
    updates_per_batch: int


def warnings(m: dict[str, float], config: Thresholds) -> dict[str, str]:
    """{short name: what is wrong with this step and what helps}, from its metrics; a function of nothing else, so that a resumed run says the same."""
    rows, said = config.problems_per_step * config.group_size, {}
    if m["entropy"] < config.warn_entropy and not m["skipped_step"]:         # a step without a scored row or a spread has measured none
        said["entropy"] = (f"the entropy is {m['entropy']:.3f} nats a token (--warn_entropy {config.warn_entropy}): the student samples nearly the same completion every time, so "
                           "a group has little to compare; raise --beta or --clip_high, lower --lr, or stop here")
    if m["completions/clipped_ratio"] > config.warn_truncated:
        said["truncated"] = (f"{m['completions/clipped_ratio']:.0%} of the completions were cut off at --max_new_tokens (--warn_truncated {config.warn_truncated}): without an "
                             "answer they count as wrong; raise the budget, or look at rollouts.jsonl whether the student ever stops (is its chat template the right one?)")
    if m["frac_reward_zero_std"] > config.warn_spreadless and "teacher_kl" not in m:         # a teacher model moves such rows too
        said["spreadless"] = (f"in {m['frac_reward_zero_std']:.0%} of the groups all rewards are equal (--warn_spreadless {config.warn_spreadless}), so nothing is learned from "
                              "them: the problems are too hard or too easy for this student, or --group_size is too small")
    if config.updates_per_batch == 1 and m["sampling/sampling_logp_difference/max"] > config.warn_ratio:
        said["ratio"] = (f"a token's log-prob differs by {m['sampling/sampling_logp_difference/max']:.2f} nats between sampler and trainer (--warn_ratio {config.warn_ratio}), "
                         "though both are the same weights: bfloat16 does this to rare tokens; where the mean is large too, sampling and training disagree about the model")
    if m["unscored"] > config.warn_unscored * rows:
        cut = m.get("time/gsrm/cut_off", 0)
        said["unscored"] = (f"{m['unscored']:.0f} of {rows} completions have no reward (--warn_unscored {config.warn_unscored}): the reward model or the grader failed, see "
                            "time/gsrm/* in log.jsonl; they are left out, not counted as 0"
                            + f"; {cut:.0f} times a structure was cut off: --gsrm_max_new_tokens may be too small" * (cut > 0))
    if m["nonfinite"]:
        said["nonfinite"] = ("the update left weights that are not finite: they are not kept" if m.get("nonfinite_weights") else
                             "loss or gradient is not finite: the update was skipped on every process") + ", its batch is in faults/"
    return said


class Faults:
    """Steps in a row that were not finite, and whether the run has been rolled back for it."""

    def __init__(self, most: int, in_row: int = 0, rolled_back: bool = False):
        self.most, self.in_row, self.rolled_back, self.why = most, in_row, rolled_back, ""

    def notes(self) -> dict[str, int | bool]:
        """What a checkpoint keeps of them."""
        return {"faults": self.in_row, "rolled_back": self.rolled_back}

    def verdict(self, nonfinite: float, broken: float = 0.0) -> str:
        """"" to go on, "roll back" once, "stop" after that. nonfinite: of the step's loss, gradient or weights; broken: of its weights, with which nothing can go on."""
        self.in_row = self.in_row + 1 if nonfinite else 0
        if self.in_row < self.most and not broken:
            return ""
        self.why = "an update left weights that are not finite" if broken else f"{self.most} steps in a row had a loss or gradient that is not finite"
        self.in_row, again, self.rolled_back = 0, self.rolled_back, True
        return "stop" if again else "roll back"


def dump(out: Path, metrics: dict[str, float], table: list[dict], tokens: list[list[int]]) -> None:
    """faults/step_N.json: all that is known of a step that was not finite; `tokens` are the completions' ids on the first process."""
    (out / "faults").mkdir(exist_ok=True)
    (out / "faults" / f"step_{metrics['step']:06d}.json").write_text(json.dumps({"metrics": metrics, "rollouts": table, "tokens": tokens}), encoding="utf-8")

# ------------------------------------------------------------------------------------------------ asked to leave

class Leave(Exception):
    """The run was asked to end by signal number `number`, and every process agrees."""

    def __init__(self, number: int, after: int = 0):
        super().__init__(f"{signal.Signals(number).name}: stopped after step {after}; go on with --resume auto")
        self.number = number


@contextmanager
def leaving() -> Iterator[Callable[[], None]]:
    """Within: SIGTERM and SIGINT are noted; the function that this gives raises Leave on all processes when one of them was asked. A second signal ends at once."""
    asked: list[float] = []                                  # number and time of the first signal

    def heard(number: int, frame: object) -> None:
        if asked:
            if time.monotonic() - asked[1] > 5:            # torchrun passes on what the terminal has already told everybody
                raise KeyboardInterrupt
            return
        asked.extend((number, time.monotonic()))
        print(f"{signal.Signals(number).name}: leaving after the part of the step that runs now, with a checkpoint; once more to leave at once", file=sys.stderr, flush=True)

    def check() -> None:
        if number := int(all_max(asked[0] if asked else 0)):
            raise Leave(number)
    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def training(main: Callable, parse: Callable) -> None:
    """A training command as a process, alone or one of torchrun's: main(parse()), with one line where its input is bad, a signal's exit status where one has ended it,
    and to its end where nobody reads its screen any more."""
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
    try:
        with ending():
            start()
            main(parse())
    except Leave as asked:
        print(asked, file=sys.stderr)
        sys.exit(128 + asked.number)                          # what a shell expects of a process that a signal has ended
    finish()                                                  # only then: after an error the others may hang in a collective, and torchrun ends them

# ------------------------------------------------------------------------------------------------ the record, and dashboards

MODEL_FILES = ("*.safetensors", "*.bin", "*.index.json", "*config.json", "tokenizer*", "tiktoken.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
               "*.model")                             # weights, what they are computed under, when a text ends, what ids say
WHOLE = 1 << 28                        # bytes of a file that is read whole to know it again; of a larger one 4 KB in 64, which leaves out no tensor of a size that is trained


def peak_gigabytes(device: str) -> float:
    """Peak memory so far: of the GPU, or of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def machine() -> str:
    """The GPU's name, without one the processor's (processors round differently, and a run follows its rounding)."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with suppress(OSError):                                  # Linux; the name that platform gives there is only x86_64
        if found := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


def revision(path: str) -> str | None:
    """The hub's commit of a model that is no folder here; None of a folder, and of what answers behind a URL."""
    if Path(path).is_dir() or "://" in path:
        return None
    check_folder(path)
    with one_line(path):
        return Path(cached_file(path, "config.json")).parent.name                 # .../snapshots/COMMIT/config.json


def model_hash(path: str) -> str:
    """SHA-256 of all that a model's answers follow from, so that another one at the same path is noticed: of a checkpoint folder its files' contents, of a hub name
    its revision; of a URL nothing can be known."""
    seen = hashlib.sha256((revision(path) or "").encode())
    for file in sorted({file for pattern in (*MODEL_FILES, "*.jinja", "gsrm.json") for file in Path(path).glob(pattern) if file.is_file()}):
        with file.open("rb") as content:
            for place in range(0, size := file.stat().st_size, 1 << 16):
                content.seek(place)
                seen.update(content.read(1 << (16 if size < WHOLE else 12)))
    return seen.hexdigest()


def run_record(config: object, files: list[Path], tokenizer: Tokenizer, models: list[str]) -> dict:
    """run.json: everything needed to say what this run was: settings, versions, commit, machine, hashes of the data files, of the models' and of the chat template."""
    here = Path(__file__).resolve().parent
    git = lambda *words: subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False).stdout.strip()
    versions: dict[str, str | None] = {"torch": torch.__version__}           # with its build, +cu130
    for name in ("transformers", "triton", "tiktoken", "numpy", "math-verify", "safetensors"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    try:
        commit = git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:                                # no git here
        commit = ""
    return {"config": asdict(config), "command": sys.argv, "processes": world(), "versions": versions, "python": platform.python_version(), "commit": commit or None,
            "machine": machine(), "data": {str(file): file_hash(file) for file in files}, "models": {path: model_hash(path)[:16] for path in dict.fromkeys(filter(None, models))},
            "chat_template": template_hash(tokenizer)}


def tracker(name: str, out: Path, config: object) -> Callable[[dict[str, float]], None]:
    """A function that takes each step's metrics to `name` (wandb, trackio, tensorboard; "": nowhere). ImportError says what to install."""
    if not name or rank():
        return lambda metrics: None
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(str(out / "tensorboard"))
            return lambda metrics: [writer.add_scalar(key, value, int(metrics["step"])) for key, value in metrics.items() if isinstance(value, int | float)] and writer.flush()
        board = __import__("wandb" if name == "wandb" else "trackio")
    except ImportError:
        raise ImportError(f"--log_to {name}: pip install {name}, or leave the flag out (log.jsonl has every figure)") from None
    board.init(project="nanoRLKD", name=out.name, config=asdict(config))
    return lambda metrics: board.log({key: value for key, value in metrics.items() if isinstance(value, int | float)}, step=int(metrics["step"]))
