"""The ways in which a command ends before its end, each one line for the person at the keyboard."""


class UsageError(ValueError):
    """Something that was asked for makes no sense or is not there. Exit status 2."""


class RunError(RuntimeError):
    """A run that was started and had to stop. Exit status 1."""


class Stopped(Exception):
    """A run that was told to stop, and whose state is saved. Exit status 128 + the signal's number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
