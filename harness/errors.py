"""Exceptions that end a command with one line for the user, and other people's errors in one line."""

import linecache
import os
import traceback


class UsageError(ValueError):
    """Wrong use: a value that makes no sense, or a file that is not there."""

    status = 2  # the command's exit status


class ValueProblem(UsageError):
    """A parameter whose value cannot be used: "name value problem", which a command shows as "--name value problem"."""

    def __init__(self, name: str, value: object, problem: str):
        value = "" if value is None else f" {value}"
        text = f"{name}{value}{'' if problem.startswith(':') else ' '}{problem}"
        super().__init__(text)
        self.as_option = f"--{name.replace('_', '-')}{text[len(name) :]}"


class RunError(RuntimeError):
    """A run that started and had to stop; after a signal, with its state saved and 128 + the signal as status."""

    def __init__(self, message: str, signal: int | None = None):
        super().__init__(message)
        self.status = 128 + signal if signal else 1


def code_line(file: str, line: int) -> str:
    """A line of a file in a person's words."""
    return f" ({os.path.basename(file)}, line {line}: `{linecache.getline(file, line).strip()[:80]}`)"


def describe(error: BaseException, skip: tuple[str, ...]) -> str:
    """Somebody's error in one line, with the last line of code it came through outside paths that begin with `skip`."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(skip)]
    where = code_line(own[-1].filename, own[-1].lineno) if own else ""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300] + where
