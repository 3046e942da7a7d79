"""Command lines: the parser, the options' types, signals and exit codes."""

import argparse
import io
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from harness import files, ranks
from harness.errors import RunError, UsageError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors, and whose help shows every default. `doc` is the command's
    docstring: the first paragraph describes it, the rest follows the options."""

    def __init__(self, doc: str):
        description, epilog = doc.split("\n\n", 1)
        super().__init__(description=description, epilog=epilog, formatter_class=_Help, allow_abbrev=False)

    def error(self, message):
        """One line instead of argparse's usage."""
        raise UsageError(f"{message} (see --help)")

    def given(self) -> set[str]:
        """The names of the options that are on the command line."""
        names = vars(self.parse_args())
        marked = self.parse_args(namespace=argparse.Namespace(**dict.fromkeys(names, argparse.SUPPRESS)))
        return {name for name, value in vars(marked).items() if value not in (argparse.SUPPRESS, [], None)}

    def refuse(self, names: set[str], why: str) -> None:
        """Raises UsageError `--name why` if one of these options is on the command line."""
        for name in sorted(self.given() & names):
            raise UsageError(f"--{name.replace('_', '-')} {why}")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # a default that depends on others stands in the text
        return action.help if "(default:" in action.help else super()._get_help_string(action)


def integer(at_least: int, at_most: int = 10**9, word: str | None = None) -> Callable[[str], int | str]:
    """A whole number in a range, or a word."""

    def parse(text):
        if text == word:
            return text
        whole = re.fullmatch(r"[+-]?\d+", text)
        if not whole or not at_least <= int(text) <= at_most:
            upper = f" to {at_most}" if at_most < 10**9 or (whole and int(text) > at_most) else " or more"
            upper += f", nor `{word}`" if word else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {at_least}{upper}")
        return int(text)

    return parse


def _number(what: str, fits: Callable[[float], bool], hint: str) -> Callable[[str], float]:
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}: give {hint}")
        return value

    return parse


rate = _number("a learning rate", lambda value: 0 < value < 1e3, "a number above 0, such as 1e-3")
positive = _number("above 0", lambda value: 0 < value < 1e3, "a number such as 0.5")
share = _number("a share", lambda value: 0 <= value <= 1, "a number from 0 to 1")


def place(text: str) -> str:
    """A file, a folder or a name; not the empty text of an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


class Interrupts:
    """Inside the block, what asks a process to end only sets `signal`: Ctrl-C, SIGTERM, SIGHUP of a terminal that
    closes, and SIGUSR1, with which SLURM announces the end of its time. A second Ctrl-C ends the process at once. What
    the shell had set to be ignored stays ignored, as Ctrl-C in a script's background jobs."""

    def __enter__(self):
        self.signal, self.before = None, {}
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]  # not on Windows
        for number in (getattr(signal, name) for name in names):
            if signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Patient:
    """A stream whose reader may go away, such as a terminal that closes: then nothing is written, and a run goes on."""

    def __init__(self, stream: io.TextIOWrapper):
        self.stream = stream

    def write(self, text: str) -> int:
        """As of a file."""
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As of a file."""
        self._try(self.stream.flush)

    def _try(self, act):
        try:
            act()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # what is in its buffer goes there, too
            os.close(nowhere)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run(main: Callable[[], int | None], several: bool = False) -> None:
    """Run a command and exit: 0, or 2 for wrong use and 1 for a failed run, with one line that says why. Unless it is
    made for `several` processes, it is refused if torchrun started more than one."""
    script = Path(sys.argv[0]).name + (f" (rank {ranks.RANK})" if ranks.RANK else "")
    if ranks.RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  only the first rank prints
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            # A file's name may not be text in the terminal's encoding; a log is read while it is written.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
            setattr(sys, name, Patient(stream))

    try:
        if ranks.RANKS > 1 and not several:
            raise UsageError("this command uses one process; start it without torchrun (and with WORLD_SIZE unset)")
        status, message = main() or 0, None
    except (UsageError, RunError) as error:
        status, message = error.status, getattr(error, "as_option", error)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        status, message = 1, f"{name}{error.strerror or error}; the files written before are complete"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        status, message = 1, "the memory is full; lower --batch-size or --size"
    except KeyboardInterrupt:
        status, message = 130, "stopped"
    finally:
        files.release()
    if message:
        print(f"{script}: {message}", file=sys.stderr)
    ranks.leave(status)
    sys.exit(status)
