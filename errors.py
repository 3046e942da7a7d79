"""The two ways in which a command ends badly, each one line for the person at the keyboard."""


class UsageError(ValueError):
    """Something that was asked for makes no sense or is not there. Exit status 2."""


class RunError(RuntimeError):
    """A run that was started and had to stop. Exit status 1."""
