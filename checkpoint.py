"""Files that are complete or not there, and checkpoints that hold tensors and plain values only."""

import json
import os
from pathlib import Path

import torch


def save(state: object, file: str | Path) -> None:
    """Write what `torch.load(file, weights_only=True)` reads back; beside, then renamed: never half a file."""
    _write(file, lambda stream: torch.save(state, stream))


def save_json(value: object, file: str | Path) -> None:
    """Write `value` as indented JSON, beside, then renamed."""
    _write(file, lambda stream: stream.write((json.dumps(value, indent=2) + "\n").encode()))


def load(file: str | Path) -> object:
    """What `save` wrote, on the CPU. Nothing in the file is executed."""
    return torch.load(file, map_location="cpu", weights_only=True)


def _write(file, write):
    file = Path(file)
    part = file.with_name(f"{file.name}.part")
    try:
        with open(part, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
