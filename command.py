"""How a command ends where its input is bad: one line on stderr that says what to change, status 1 or 2, no traceback.

    if __name__ == "__main__":
        with ending():
            main(parse_config())

Errors that are nobody's input (a bug, a full GPU) keep their traceback. Beside it, what commands share: flags with intervals, records,
logs, the lock on what is written. Left out on purpose: a registry of commands, colours, logging.
"""
import argparse
import fcntl
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import field
from pathlib import Path
from typing import TextIO

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import HfArgumentParser
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

UNREADABLE = OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, SafetensorError, StrictDataclassError         # what a broken checkpoint raises
PICTURES = (".png", ".svg", ".pdf", ".jpg")               # what matplotlib draws


def in_one_line(error: Exception) -> str:
    """What an exception says, on one line; of the system's errors the path and what is wrong with it."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        taken = isinstance(error, (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError))
        return f"{error.filename}: {error.strerror}" + ": choose another path" * taken
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__


def hush(stream: TextIO) -> None:
    """What is written to the stream from here on, and what it still holds, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def ending(*more: type[Exception]) -> Iterator[None]:
    """Turns the exceptions that bad input raises (and `more`) into an end with one line; Ctrl-C too, where a command has no better answer to it. A reader that has
    gone, as `head` does, is no error."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except BrokenPipeError:
        hush(sys.stdout)                                      # or Python complains once more at its end
    except (ValueError, OSError, ImportError, FloatingPointError, *more) as error:
        sys.exit(f"error: {in_one_line(error)}")


class Screen:
    """stdout or stderr of a run of hours: where its reader has gone, as a killed tee has, it says the rest to nobody, and the run goes on."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.heard(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self.heard(self.stream.flush)

    def heard(self, do: Callable, *given: str) -> int | None:
        try:
            return do(*given)
        except BrokenPipeError:
            hush(self.stream)
            return None


@contextmanager
def turned(kinds: tuple[type[Exception], ...], into: Callable[[BaseException], Exception]) -> Iterator[None]:
    """Turns exceptions of these kinds, and a bare Exception as tokenizers raises it, no subclass of it, into another one."""
    def told(kind: type | None, error: BaseException | None, _trace: object) -> None:
        if kind is Exception or kind and issubclass(kind, kinds):
            raise into(error) from None
    with ExitStack() as after:
        after.push(told)
        yield


def full_disk(path: str | Path) -> AbstractContextManager[None]:
    """Turns what safetensors and tokenizers make of a full disk into an OSError."""
    return turned((SafetensorError,), lambda error: OSError(f"{path}: could not be written ({error}): make room"))


@contextmanager
def one_line(path: str | Path) -> Iterator[None]:
    """Turns the paragraphs of transformers on a checkpoint that cannot be loaded into a ValueError of one line."""
    def told(error: BaseException) -> ValueError:
        what = "cannot be loaded; save or copy it again" if Path(path).exists() else "neither a folder here nor a hub name that can be reached"
        return ValueError(f"{path}: {what} ({next(iter(str(error).splitlines()), type(error).__name__)})")
    with ExitStack() as after:
        after.callback(set_verbosity, get_verbosity())
        set_verbosity_error()                            # its report on the weights: data.load_model makes its own
        after.enter_context(turned(UNREADABLE, told))
        yield


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the list of all flags."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {' '.join(message.split())} (all flags: {self.prog} --help)\n")


def flag(default, text: str, interval: str = ""):
    """A dataclass field that becomes a flag: its help text and, of a number, where it has to lie, as in "[0, 1)"; the help says both."""
    return field(default=default, metadata={"help": text + f", in {interval}" * bool(interval)})


class ConfigParser(Parser, HfArgumentParser):
    """The same, with flags from a dataclass: numbers are checked against the interval that their help ends with, Literal fields against their values."""

    def add_argument(self, *names: str, **settings) -> argparse.Action:
        if settings.get("type") in (int, float):
            about, interval = re.fullmatch(r"(.*?)(?:, in ([(\[]\S+, \S+[)\]]))?", settings.get("help", "")).groups()
            settings["type"] = number(settings["type"], interval or "(-inf, inf)", about)
        elif settings.get("action") == "store_false":         # HfArgumentParser's second name of a flag that is True by default
            settings["help"] = argparse.SUPPRESS
        return super().add_argument(*names, **settings)

    def parse_with(self, presets: dict[str, dict], argv: list[str] | None) -> dict:
        """The settings: defaults, then those of the preset that the flag --preset names, then flags."""
        preset = self.parse_known_args(argv)[0].preset
        if preset not in presets:
            self.error(f"--preset {preset}: choose one of {', '.join(presets)}")
        self.set_defaults(**presets[preset])
        return vars(self.parse_args(argv))


def number(kind: type, interval: str, about: str = "") -> Callable[[str], float]:
    """A type for add_argument: a number in an interval, round brackets leaving out its end; `about` says in an error what it is for."""
    low, high = map(float, interval[1:-1].split(","))
    bounds = "" if interval == "(-inf, inf)" else f" of {low:g} or more" if interval.startswith("[") and high == math.inf else f" in {interval}"

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value < high or value == low and interval[0] == "[" or value == high and interval[-1] == "]"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole' if kind is int else 'finite'} number{bounds}" + f" ({about})" * bool(about))
        return value
    return read


def at_least(low: float, kind: type = int) -> Callable[[str], float]:
    """The same for a finite number, `low` or more."""
    return number(kind, f"[{low}, inf)")


def picture_file(text: str) -> Path:
    """A type for add_argument: where a picture goes, with the .png that matplotlib adds where there is no ending; a folder is refused."""
    if (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder: name a file for the picture, such as {path / 'curve.png'}")
    if path.suffix not in ("", *PICTURES):
        raise argparse.ArgumentTypeError(f"{path}: a picture ends in {', '.join(PICTURES)}")
    if not path.parent.exists():
        raise argparse.ArgumentTypeError(f"{path}: no such folder")
    return path if path.suffix else path.with_name(path.name + ".png")


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A decoder's hook: a JSON object as a dict; ValueError where a field stands in it twice, of which json would take the last one silently."""
    if len(record := dict(pairs)) < len(pairs):
        raise ValueError(f"the field {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} stands there twice")
    return record


def decoded(line: bytes, where: object) -> object:
    """What a line, or a file, of JSON in UTF-8 says, with or without an editor's byte order mark; ValueError names the place `where` it is none."""
    try:
        return json.loads(line.decode("utf-8").removeprefix("\ufeff"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        table = str(where).rpartition(":")[0].endswith((".csv", ".tsv"))
        raise ValueError(f"{where}: not valid JSON ({why})" + "; a table has to be made into JSON, one object a line" * table) from None


def read_record(path: Path, *names: str) -> dict:
    """The JSON object in a file; ValueError names the file where it is none, or lacks one of the fields `names`."""
    record = decoded(path.read_bytes(), path)
    if not isinstance(record, dict) or (missing := [name for name in names if name not in record]):
        raise ValueError(f"{path}: expected a JSON object" + (f" with the field {missing[0]!r}" if isinstance(record, dict) else ""))
    return record


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file aside and then renames it: an interruption or a full disk leaves the old one."""
    write(aside := path.with_name(f".{path.name}"))
    aside.replace(path)


def write_record(path: Path, record: dict) -> None:
    """A JSON object into a file, all of it or nothing."""
    write_aside(path, lambda file: file.write_text(json.dumps(record, indent=1), encoding="utf-8"))


def put_aside(fault: str, bad: list[str] | None) -> None:
    """What is wrong with a line: a ValueError, or one more in the list of those that are passed over."""
    if bad is None:
        raise ValueError(fault)
    bad.append(fault)


def tell(what: str, entries: list[str], most: int | None = None) -> None:
    """Counts and lists (the first `most`) on stderr what was left out or looks odd; says nothing where there is nothing."""
    if entries:
        print(f"{len(entries)} {what}:", *(f"  {entry}" for entry in entries[:most]), *["  ..."] * (len(entries[:most]) < len(entries)), sep="\n", file=sys.stderr)


def log_lines(file: Path) -> Iterator[tuple[bytes, dict]]:
    """(line, its JSON object) of a run's log. A last line without its end, torn by a kill or just being written, is left out; ValueError names any other that is no step's."""
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = decoded(line, file)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{file}:{number}: expected the log line of a training step: mend or remove it")
        yield line, row


def folder(path: str | Path) -> Path:
    """Makes a folder for what a command writes, before the work is done whose results could then not be kept."""
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


@contextmanager
def writing(path: str | Path, mine: bool = True, flag: str = "--out") -> Iterator[Path]:
    """Keeps other processes from writing `path` as well, a folder that is there, or a file that need not be: a lock on the folder itself, or on a file beside the
    file that goes at the end; it dies with the process. ValueError where another process holds it. Without `mine` (processes after a run's first one) nothing is locked."""
    path = Path(path)
    place, how = (path, os.O_RDONLY) if path.is_dir() else (path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT)
    held = -1
    while mine and held < 0:
        folder(place.parent)
        held = os.open(place, how, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise ValueError(f"another process is writing {path}: wait for it, or choose another {flag}") from None
        except OSError as error:                              # some network file systems lock nothing, or no folder
            print(f"{path}: cannot be locked ({error.strerror}): nothing keeps a second process from writing there", file=sys.stderr)
        if not place.exists() or not os.path.samestat(os.stat(place), os.fstat(held)):          # the one before has just removed it: once more
            os.close(held)
            held = -1
    try:
        yield path
    finally:
        if mine:
            if place != path:
                place.unlink(missing_ok=True)
            os.close(held)
