"""What the commands share beside their options: the run's folder, going on with a run, and how a command ends."""

import argparse
import contextlib
import io
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import PIL
import torch
import torchvision

import checkpoint
import distributed
from distributed import RANK
from errors import RunError, Stopped, UsageError
from listing import refuse_inside
from options import Parser

RUN_FILES = (
    "settings.json",
    "settings.resumed-*.json",
    "history.csv",
    "summary.json",
    "report.html",
    "validation.png",
    "validation.before.png",
    "[0-9][0-9][0-9][0-9][0-9]/features-*",
    "projector_config.pbtxt",
    "checkpoint.pt*",
    "checkpoint.new.pt*",
    "checkpoint.previous.pt*",
    "encoder.pt",
    "predictions.csv",
    "events.out.tfevents.*",
)


def resume(parser: Parser, args: argparse.Namespace, may_change: set[str]) -> dict | None:
    """With --resume: load the folder's last checkpoint, and set `args` to what the run was started with.

    Raises UsageError where there is no such run, or where an option is given that is not in `may_change`.
    """
    if not args.resume:
        return None
    folder = Path(args.resume)
    if not folder.is_dir():
        raise UsageError(f"--resume {folder}: no such folder")
    state = checkpoint.load_last(folder, lambda warning: print(warning, file=sys.stderr))
    if not isinstance(state, dict) or state.get("script") != Path(sys.argv[0]).stem:
        raise UsageError(f"--resume {folder} was no run of {Path(sys.argv[0]).name}")
    given = parser.given() - {"resume"}
    for name in sorted(given - may_change):
        flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in sorted(may_change))
        said = "START" if name == "starts" else f"--{name.replace('_', '-')}"
        raise UsageError(f"{said} cannot be given with --resume: the run has its settings, and only {flags} can change")
    vars(args).update({name: value for name, value in state["settings"].items() if name not in given})
    args.resume, args.out = str(folder), str(folder)
    return state


def choose_folder(args: argparse.Namespace, script: str) -> Path:
    """The run's folder, --out or runs/SCRIPT-DATA-ENCODER-TIME; nothing is made yet.

    Raises UsageError where it is a file, or holds a run already and --overwrite was not given.
    """
    name = f"{script}-{Path(args.data).resolve().name}-{args.encoder}-{time.strftime('%y%m%d-%H%M%S')}"
    folder = Path(args.out) if args.out else Path("runs", name)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; give a folder")
    refuse_inside(args.data, "--out", folder)
    old = _run_files(folder)
    if old and not args.overwrite:
        raise UsageError(f"--out {folder} holds a run already ({old[0].name}); give another folder, or --overwrite it")
    return folder


def _run_files(folder: Path) -> list[Path]:
    return [file for pattern in RUN_FILES for file in sorted(folder.glob(pattern))]


def make_folder(folder: Path, args: argparse.Namespace, device: str) -> None:
    """Make the run's folder, hold it for this run, and write `settings.json`: command, settings, versions, device.
    Of several ranks, the first does so for all.

    An older run in it goes, unless it is resumed. Raises UsageError where another run is writing to it.
    """
    if RANK:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if held := checkpoint.lock(folder / ".lock"):
            _held.append(held)
        for file in _run_files(folder) if not vars(args).get("resume") else []:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
            if file.parent != folder:
                with contextlib.suppress(OSError):  # where something else is in it
                    file.parent.rmdir()
    except BlockingIOError:
        raise UsageError(f"--out {folder}: another run is writing there; wait for it, or give another folder") from None
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be used ({error.strerror}); give another folder") from error
    settings = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": vars(args),
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (torch, torchvision, numpy, PIL)},
        },
        "revision": _git_revision(),
        "device": device,
    }
    before = sum(file.name.startswith("settings.") for file in _run_files(folder))  # the first command's stays as it is
    checkpoint.save_json(settings, folder / (f"settings.resumed-{before}.json" if before else "settings.json"))


_held = []  # open files, for as long as this process lives


class Interrupts:
    """While it is entered, Ctrl-C and SIGTERM only set `signal`; a second Ctrl-C ends the process at once."""

    signals = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self):
        self.signal = None
        self.before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def _note(self, number, frame):
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def rescue(state: dict, folder: Path, error: OSError) -> RunError:
    """Save a state that the run's folder does not take somewhere else, and say where."""
    for place in (folder.parent, Path.cwd(), Path(tempfile.gettempdir())):
        try:
            other = Path(tempfile.mkdtemp(prefix="unmix-rescue-", dir=place))
        except OSError:
            continue
        try:
            checkpoint.save_last(state, other)
        except OSError:
            shutil.rmtree(other, ignore_errors=True)
            continue
        return RunError(
            f"{folder} cannot be written to ({error.strerror or error}); the training state is in {other}: "
            f"mend what is wrong and go on with --resume {other}"
        )
    return RunError(f"{folder} cannot be written to ({error.strerror or error}), nor can the temporary folder")


def _git_revision() -> str | None:
    """The commit of this code, with "+" where files differ from it; None outside a git checkout."""

    def git(*words):
        answer = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return answer.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def duration(seconds: float) -> str:
    """Seconds as a person says them: "48 s", "3 min 05 s", "2 h 07 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def run(main: Callable[[], int | None]) -> None:
    """Run a command and exit: 0, or 2 for wrong use and 1 for a failed run, with one line that says why."""
    script = Path(sys.argv[0]).name + (f" (rank {RANK})" if RANK else "")
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the first rank speaks for all
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text in the terminal's encoding
    try:
        status = main() or 0
        distributed.leave(status)
        sys.exit(status)
    except (UsageError, RunError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except Stopped as stop:
        print(f"{script}: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        print(f"{script}: {name}{error.strerror or error}; the files written before are complete", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not full:
            raise
        print(f"{script}: the memory is full; lower --batch-size or --size", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{script}: stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        while _held:
            _held.pop().close()
