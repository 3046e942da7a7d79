"""The run's folder: choosing and making it, resuming from it, and saving elsewhere when it cannot be written to."""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from platform import python_version

import numpy
import PIL
import torch
import torchvision

from harness import checkpoint
from harness.command import Parser
from harness.download import ARCHIVES
from harness.errors import RunError, UsageError
from harness.files import hold, refuse_inside, unusable, write_json
from harness.log import SUBRUNS, as_utf8
from harness.ranks import RANK

FORMAT = 11  # of the training state; another one whenever older states cannot go on
RUN_FILES = [  # what a run writes; nothing else is removed by --overwrite
    *["settings.json", "settings.resumed-*.json", "history.csv", "summary.json", "predictions.csv", "encoder.pt"],
    *["validation.png", "validation.before.png", "checkpoint.pt*", "checkpoint.new.pt*", "checkpoint.previous.pt*"],
    *(f"{place}/events.out.tfevents.*" for place in (".", *SUBRUNS)),
    *(f"{place}/projector_config.pbtxt" for place in SUBRUNS),
    *(f"{place}/[0-9][0-9][0-9][0-9][0-9]/features" for place in SUBRUNS),
]


def resume(parser: Parser, args: argparse.Namespace, may_change: set[str]) -> dict | None:
    """With --resume: load the folder's last checkpoint, and set `args` to the settings that the run started with.
    Raises UsageError if there is no such run, or if an option is given that is not in `may_change`."""
    if not args.resume:
        return None
    folder, script = Path(args.resume), Path(sys.argv[0]).resolve()  # it may have been started through a link
    if folder.is_file():
        raise UsageError(f"--resume {folder} is a file; give the folder that it is in")
    if not folder.is_dir():
        raise UsageError(f"--resume {folder}: no such folder")
    state = checkpoint.load_last(folder, lambda warning: print(warning, file=sys.stderr))
    if not isinstance(state, dict) or state.get("script") != script.stem:
        raise UsageError(f"--resume {folder} was no run of {script.name}")
    if state.get("format") != FORMAT:
        commit = ""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            commit = f" (commit {json.loads((folder / 'settings.json').read_text())['revision'][:12]})"
        raise UsageError(f"--resume {folder}: an older version made this run{commit}; resume it with that one")
    given = parser.given() - {"resume"}
    for name in sorted(given - may_change):
        flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in sorted(may_change))
        option = "START" if name == "starts" else f"--{name.replace('_', '-')}"
        why = f"the run keeps its settings, and only {flags} can change"
        raise UsageError(f"{option} cannot be given with --resume: {why}")
    vars(args).update({name: value for name, value in state["settings"].items() if name not in given})
    args.resume, args.out = str(folder), str(folder)
    return state


def check_same(then: dict[str, object], now: dict[str, object], folder: str) -> None:
    """Raises UsageError if the run in `folder`, to be resumed, had other values by some name than those now."""
    for name in then | now:
        if (was := then.get(name)) != (is_now := now.get(name)):
            values = f": it was {was}, and is {is_now} now" if len(f"{was}{is_now}") < 100 else ""
            raise UsageError(f"--resume {folder}: {name} is not as it was{values}; give the same images and encoder")


def choose(args: argparse.Namespace, kind: str) -> Path:
    """The run's folder: --resume, --out, or runs/KIND-DATA-ENCODER-TIME. Nothing is made yet. Raises UsageError if it
    is a file, or holds a run already and --overwrite was not given."""
    if vars(args).get("resume"):
        return Path(args.resume)
    name = f"{kind}-{as_utf8(Path(args.data).resolve().name)[:50]}-{args.encoder}-{time.strftime('%y%m%d-%H%M%S')}"
    folder = Path(args.out) if args.out else Path("runs", name)
    if (folder.exists() and not folder.is_dir()) or as_utf8(str(folder)) != str(folder):
        raise UsageError(f"--out {folder} {'is a file' if folder.is_file() else 'is no text in UTF-8'}; give a folder")
    refuse_inside(args.data, "out", folder)
    old = _run_files(folder) if args.out else []
    if old and not args.overwrite:
        raise UsageError(f"--out {folder} holds a run already ({old[0].name}); give another folder, or --overwrite it")
    if old and not _is_run(folder):
        raise UsageError(f"--out {folder}: {old[0].name} there is not of a run of this project; give another folder")
    return folder


def _is_run(folder):
    try:
        return {"command", "settings", "versions"} <= json.loads((folder / "settings.json").read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _run_files(folder: Path) -> list[Path]:
    return [file for pattern in RUN_FILES for file in sorted(folder.glob(pattern))]


def make(folder: Path, args: argparse.Namespace, device: str) -> Path:
    """Make the run's folder, lock it, and write `settings.json`: command, settings, versions, device. An older run in
    it is removed, unless it is resumed. Without --out, the name gets a number if there is such a folder: several runs
    may start in one second. The first rank does this for all. Raises UsageError if another run is writing there."""
    for name in ("data", "data_dir"):  # so that a pretext run can go on from another directory
        if name == "data_dir" or args.data not in ("photos", *ARCHIVES):
            setattr(args, name, os.path.abspath(getattr(args, name)))
    if RANK:
        return folder
    resumed = bool(vars(args).get("resume"))
    try:
        name, number = folder.name, 1
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=bool(args.out))
                break
            except FileExistsError:
                if args.out:
                    raise
                number += 1
                folder = folder.with_name(f"{name}-{number}")
        hold(folder / ".lock")
        if not resumed and not args.overwrite and _run_files(folder):
            raise UsageError(f"--out {folder} holds a run by now; give another folder, or --overwrite it")
        if resumed:
            (folder / "summary.json").unlink(missing_ok=True)  # a run that has it is complete
        for file in _run_files(folder) if not resumed else []:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
            for parent in file.relative_to(folder).parents[:-1]:
                with contextlib.suppress(OSError):  # something else is in it
                    (folder / parent).rmdir()
    except BlockingIOError:
        raise UsageError(f"--out {folder}: another run is writing there; wait for it, or give another folder") from None
    except OSError as error:
        raise unusable("out", folder, error) from error
    versions = {"python": python_version()} | {m.__name__: m.__version__ for m in (torch, torchvision, numpy, PIL)}
    settings = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "settings": vars(args)}
    settings |= {"versions": versions, "revision": _git_revision(), "device": device}
    before = len(list(folder.glob("settings.json")) + list(folder.glob("settings.resumed-*.json")))
    write_json(settings, folder / (f"settings.resumed-{before}.json" if before else "settings.json"))
    return folder


@contextlib.contextmanager
def rescued(folder: Path, state: Callable[[], dict]) -> Iterator[None]:
    """A block that writes to the run's folder. If it cannot, `state()` is saved elsewhere, and RunError says where."""
    try:
        yield
    except OSError as error:
        failure = f"{folder} cannot be written to ({error.strerror or error})"
        to_save = state()
        for place in (folder.parent, Path.cwd(), Path(tempfile.gettempdir())):
            other = None
            try:
                other = Path(tempfile.mkdtemp(prefix="unmix-rescue-", dir=place))
                checkpoint.save_last(to_save, other)
            except OSError:
                shutil.rmtree(other or "", ignore_errors=True)
                continue
            go_on = f"mend what is wrong and go on with --resume {shlex.quote(str(other))}"
            raise RunError(f"{failure}; the training state is in {other}: {go_on}") from error
        raise RunError(f"{failure}, nor can the temporary folder") from error


def _git_revision() -> str | None:
    """The commit of this code, with "+" if files differ from it; None outside a git checkout."""
    words = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(words, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
