"""Safe checkpoints: tensors and plain values only, checked by their checksums, the last one and the one before."""

import contextlib
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from harness.errors import UsageError
from harness.files import write

NEW, LAST, BEFORE = "checkpoint.new.pt", "checkpoint.pt", "checkpoint.previous.pt"


def save(state: object, file: str | Path) -> None:
    """Write `state` atomically, for `load` or `torch.load(file, weights_only=True)`."""
    write(file, lambda stream: stream.write(_content(state).getbuffer()))


def _content(state):
    content = io.BytesIO()  # torch.save on a full disk would hide the error
    torch.save(state, content)
    return content


def load(file: str | Path) -> object:
    """Read what `save` wrote, onto the CPU. Nothing in the file is executed. Raises UsageError if the file is damaged
    or holds anything but tensors and plain values."""
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
    except Exception as error:  # zipfile, pickle and torch raise many kinds on damaged bytes
        raise UsageError(f"{file} is damaged ({' '.join(str(error).split())[:100]})") from error


def save_last(state: object, folder: Path) -> None:
    """Write the folder's last checkpoint, and keep the one before."""
    _write_last(_content(state), folder)


def _write_last(content, folder):
    write(folder / NEW, lambda stream: stream.write(content.getbuffer()))
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / BEFORE)
    os.replace(folder / NEW, folder / LAST)


class Writer:
    """Writes last checkpoints in a thread, so that training goes on while a disk is slow."""

    def __init__(self):
        self.pool, self.pending = ThreadPoolExecutor(1), None

    def save_last(self, state: object, folder: Path) -> None:
        """As the function, and later: `state` may change at once. Raises what the write before this one raised."""
        content = _content(state)
        self.wait()
        self.pending = self.pool.submit(_write_last, content, folder)

    def wait(self) -> None:
        """Until the last one is on the disk. Raises what writing it raised."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def load_last(folder: Path, warn: Callable[[str], None] = print) -> dict:
    """The folder's last checkpoint; if that is damaged, `warn(message)` and load the one before. A damaged one is
    renamed to NAME.damaged, so that the next checkpoint does not take the place of the good one. If none can be used,
    all files stay as they are. Raises UsageError then, and if there is none."""
    there = [folder / name for name in (NEW, LAST, BEFORE) if (folder / name).exists()]
    if not there:
        raise UsageError(f"{folder} holds no {LAST}, so nothing can be resumed; start again, in another folder")
    damaged = {}  # file: why
    for file in there:
        try:
            state = load(file)
        except (UsageError, FileNotFoundError) as error:  # another rank may have renamed it
            damaged[file] = error
            continue
        for bad, error in damaged.items():
            with contextlib.suppress(FileNotFoundError):  # another rank has done it
                bad.rename(bad.with_name(f"{bad.name}.damaged"))
            warn(f"{error}; going on from the one before")
        return state
    raise UsageError(f"{'; '.join(map(str, damaged.values()))}, and there is no other; start the run again")


def load_weights(module: nn.Module, state: dict, what: str) -> None:
    """Load `state` into `module`. Raises UsageError with a list of the differences, `what` naming the state."""
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{what} holds no weights")
    expected = module.state_dict()
    shape = lambda tensor: "x".join(map(str, tensor.shape)) or "number"  # noqa: E731
    both = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    differences = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected],
        "of another shape": [f"{name} {shape(state[name])} for {shape(expected[name])}" for name in both],
    }
    if any(differences.values()):
        more = lambda names: f" and {len(names) - 3} more" if len(names) > 3 else ""  # noqa: E731
        listed = [f"{kind}: {', '.join(names[:3])}{more(names)}" for kind, names in differences.items() if names]
        raise UsageError(f"{what} is of another network: {'; '.join(listed)}")
    module.load_state_dict(state)
