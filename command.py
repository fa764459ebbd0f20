"""How a command ends where its input is bad: one line on stderr that says what to change, status 1 or 2, no traceback.

    if __name__ == "__main__":
        with ending():
            main(parse_config())

Errors that are nobody's input (a bug, a full GPU) keep their traceback. Left out on purpose: a registry of commands, colours, logging.
"""
import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path

from transformers import HfArgumentParser


def in_one_line(error: Exception) -> str:
    """What an exception says, on one line; of the system's errors the path and what is wrong with it."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        taken = isinstance(error, (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError))
        return f"{error.filename}: {error.strerror}" + ": choose another path" * taken
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__


@contextmanager
def ending(*more: type[Exception]) -> Iterator[None]:
    """Turns the exceptions that bad input raises (and `more`) into an end with one line."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError, *more) as error:
        sys.exit(f"error: {in_one_line(error)}")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the list of all flags."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {' '.join(message.split())} (all flags: {self.prog} --help)\n")


def flag(default, text: str):
    """A dataclass field whose help text is shown by --help."""
    return field(default=default, metadata={"help": text})


class ConfigParser(Parser, HfArgumentParser):
    """The same, with flags from a dataclass."""

    def parse_with(self, presets: dict[str, dict], argv: list[str] | None) -> dict:
        """The settings: defaults, then those of the preset that the flag --preset names, then flags."""
        preset = self.parse_known_args(argv)[0].preset
        if preset not in presets:
            self.error(f"--preset {preset}: choose one of {', '.join(presets)}")
        self.set_defaults(**presets[preset])
        return vars(self.parse_args(argv))


def at_least(low: float, kind: type = int) -> Callable[[str], float]:
    """A type for add_argument: a finite number, `low` or more."""
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number of {low} or more")
        return value
    return read


Range = tuple[float, float]                              # low <= number < high


def out_of_range(settings: dict[str, object], ranges: dict[str, Range]) -> tuple[str, str]:
    """(name, what it has to be) of the first number among the settings that is out of its range, or not finite; ("", "") if there is none."""
    for name, value in settings.items():
        low, high = ranges.get(name, (-math.inf, math.inf))
        if isinstance(value, (int, float)) and not (math.isfinite(value) and low <= value < high):
            return name, "a finite number" + f", {low} or more" * (low > -math.inf) + f", below {high}" * (high < math.inf)
    return "", ""


def read_record(path: Path, *names: str) -> dict:
    """The JSON object in a file; ValueError names the file where it is none, or lacks one of the fields `names`."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(record, dict) or (missing := [name for name in names if name not in record]):
        raise ValueError(f"{path}: expected a JSON object" + (f" with the field {missing[0]!r}" if isinstance(record, dict) else ""))
    return record


def folder(path: str | Path) -> Path:
    """Makes a folder for what a command writes, before the work is done whose results could then not be kept."""
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)
