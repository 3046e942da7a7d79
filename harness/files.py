"""Atomic file writes, locks, and the files below a folder."""

import contextlib
import csv
import errno
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from harness.errors import RunError, ValueProblem

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LEFT_BEHIND = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}  # folders
FULL = (errno.ENOSPC, errno.EDQUOT)  # what a full disk says
_held = contextlib.ExitStack()  # locks of the command that is running


def unusable(name: str, place: str | Path, error: OSError, needs: str = "") -> Exception:
    """The exception to raise when the folder `place`, the value of the parameter `name`, cannot be written to."""
    if error.errno in FULL:
        option = name.replace("_", "-")
        return RunError(f"the disk of --{option} {place} is full{needs}; free some, or give another folder")
    return ValueProblem(name, place, f"cannot be used ({error.strerror}); give another folder")


def write(file: str | Path, fill: Callable[[BinaryIO], object], ending: str = ".part") -> None:
    """Call `fill(stream)` on a temporary file beside, with this `ending`, flush, then rename it: never half a file."""
    file = Path(file)
    part = file.with_name(f"{file.name}{ending}")
    try:
        with open(part, "wb") as stream:
            fill(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_json(value: object, file: str | Path) -> None:
    """Write `value` as indented JSON."""
    write(file, lambda stream: stream.write((json.dumps(value, indent=2) + "\n").encode()))


def write_csv(rows: Iterable[Iterable], file: str | Path) -> None:
    """Write rows as CSV in UTF-8; bytes of a file's name that are not text become a backslash and a number."""

    def fill(stream):
        text = io.TextIOWrapper(stream, "utf-8", errors="backslashreplace", newline="", write_through=True)
        csv.writer(text).writerows(rows)
        text.detach()

    write(file, fill)


def lock(file: str | Path, wait: bool = False) -> IO | None:
    """Lock `file` until the returned stream is closed or this process ends; None on systems without locks. The file
    must stay where it is: if it were removed, a later process would lock another file of the same name. Raises
    BlockingIOError if another process has the lock, unless `wait`."""
    if fcntl is None:
        return None
    stream = open(file, "w")  # noqa: SIM115
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        stream.close()
        if isinstance(error, BlockingIOError):
            raise
        return None  # a file system without locks
    return stream


def hold(file: str | Path) -> None:
    """Lock `file` until `release`, or until this process ends. Raises BlockingIOError if another process has it."""
    _held.enter_context(lock(file) or contextlib.nullcontext())


def release() -> None:
    """Release what `hold` locked: at the end of a command."""
    _held.close()


def refuse_inside(images: str, name: str, place: str | Path) -> None:
    """Raises ValueProblem about `name` if files written to `place` would be taken for images of the folder `images`."""
    if Path(images).is_dir() and Path(place).resolve().is_relative_to(Path(images).resolve()):
        raise ValueProblem(name, place, f"is inside {images}, whose images its files would join; give one elsewhere")


def ignored(folder: str) -> bool:
    """Whether a folder of this name is hidden, or one that some program leaves behind among images."""
    return folder.startswith(".") or folder in LEFT_BEHIND


def files_below(root: Path, skipped: list[tuple[str, str]]) -> Iterator[str]:
    """Relative paths of files that are not hidden, through links too, each folder once, and not by a link if it is
    here. Folders that may not be read are added to `skipped`. Raises OSError if one cannot be read: a lost drive."""
    visited = set()

    def note(error):
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise error
        skipped.append((os.path.relpath(error.filename, root), f"a folder that cannot be read: {error.strerror}"))

    for folder, folders, files in os.walk(root, onerror=note, followlinks=True):
        folders[:] = sorted((f for f in folders if not ignored(f)), key=lambda f: (os.path.islink(f"{folder}/{f}"), f))
        real, inside = os.path.realpath(folder), os.path.relpath(folder, root) + "/"
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        for file in files:
            if not file.startswith("."):
                yield (inside.replace(os.sep, "/") + file).removeprefix("./")
