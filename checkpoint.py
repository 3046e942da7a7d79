"""Files that are complete or not there, and checkpoints that hold tensors and plain values only."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO

import torch
from torch import nn

from errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NEW, LAST, BEFORE = "checkpoint.new.pt", "checkpoint.pt", "checkpoint.previous.pt"


def save(state: object, file: str | Path) -> None:
    """Write what `torch.load(file, weights_only=True)` reads back; beside, then renamed: never half a file."""
    content = io.BytesIO()  # torch.save on a full disk would hide the error
    torch.save(state, content)
    write(file, lambda stream: stream.write(content.getbuffer()))


def save_json(value: object, file: str | Path) -> None:
    """Write `value` as indented JSON, beside, then renamed."""
    write(file, lambda stream: stream.write((json.dumps(value, indent=2) + "\n").encode()))


def load(file: str | Path) -> object:
    """What `save` wrote, on the CPU. Nothing in the file is executed.

    Raises UsageError where the file is damaged, by its checksums, or holds anything but tensors and plain values.
    """
    content = io.BytesIO(Path(file).read_bytes())
    try:
        with zipfile.ZipFile(content) as parts:
            if damaged := parts.testzip():  # torch's files are zip files, whose parts have checksums
                raise UsageError(f"{file} is damaged: the checksum of {damaged} in it is wrong")
        content.seek(0)
        return torch.load(content, map_location="cpu", weights_only=True)
    except (UsageError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise UsageError(f"{file} is refused: it holds more than tensors and plain values, such as code") from error
    except Exception as error:  # whatever the bytes of a damaged file are taken for
        raise UsageError(f"{file} is damaged ({' '.join(str(error).split())[:100]})") from error


def save_last(state: object, folder: Path) -> None:
    """Write the folder's last checkpoint, and keep the one before."""
    save(state, folder / NEW)
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / BEFORE)
    os.replace(folder / NEW, folder / LAST)


def load_last(folder: Path, say: Callable[[str], None] = print) -> dict:
    """The folder's last checkpoint, or the one before where that is damaged, which is said.

    What is damaged is put aside as NAME.damaged, or the next checkpoint would keep it in place of the good one; where
    nothing can be used, all stays as it is. Raises UsageError there, and where there is none.
    """
    there = [folder / name for name in (NEW, LAST, BEFORE) if (folder / name).exists()]
    if not there:
        raise UsageError(f"{folder} holds no {LAST}, so there is nothing to resume; start the run again")
    damaged = {}  # file: why
    for file in there:
        try:
            state = load(file)
        except UsageError as error:
            damaged[file] = error
            continue
        for bad, error in damaged.items():
            bad.rename(bad.with_name(f"{bad.name}.damaged"))
            say(f"{error}; going on from the one before")
        return state
    raise UsageError(f"{'; '.join(map(str, damaged.values()))}, and there is no other; start the run again")


def lock(file: str | Path, wait: bool = False) -> IO | None:
    """Hold `file` until what is returned is closed, or this process ends; None where there are no locks.

    Raises BlockingIOError where another process holds it, unless it is to `wait` for that.
    """
    if fcntl is None:
        return None
    stream = open(file, "w")  # noqa: SIM115
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        stream.close()
        raise
    except OSError:  # a file system without locks
        stream.close()
        return None
    return stream


def fit(module: nn.Module, state: dict, what: str) -> None:
    """Load `state` into `module`. Raises UsageError that lists what differs."""
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{what} holds no weights")
    own = module.state_dict()
    lists = {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {_shape(state[name])} for {_shape(own[name])}"
            for name in own
            if name in state and _shape(state[name]) != _shape(own[name])
        ],
    }
    if any(lists.values()):
        said = "; ".join(f"{word}: {_shorten(names)}" for word, names in lists.items() if names)
        raise UsageError(f"{what} is of another network: {said}")
    module.load_state_dict(state)


def _shape(tensor):
    return "x".join(map(str, tensor.shape)) or "number"


def _shorten(names, most=3):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def write(file: str | Path, fill: Callable[[BinaryIO], None]) -> None:
    """Fill a file beside, bring it to the disk, then rename: never half a file."""
    file = Path(file)
    part = file.with_name(f"{file.name}.part")
    try:
        with open(part, "wb") as stream:
            fill(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
