"""Exceptions of duoka. Each message names the cause, the value, and the remedy."""

from __future__ import annotations

from typing import Any

_LONGEST_LINE, _END = 1000, 300


class DuokaError(Exception):
    """Base of all duoka exceptions; exceptions of user code keep their own type.

    A very long line of a message, which a value from a file may make, loses its middle: cause and remedy stay.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(_cut(argument) if isinstance(argument, str) else argument for argument in arguments))


def _cut(text: str) -> str:
    return "\n".join(
        line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - _END]} ... {line[-_END:]}"
        for line in text.split("\n")
    )


class ConfigError(DuokaError, ValueError):
    """An option has a value that is not valid, or does not exist."""


class DeviceError(DuokaError, ValueError):
    """A device does not exist, or cannot be used in this way."""


class DataError(DuokaError):
    """Data are missing, truncated, or in another format than expected."""


class CheckpointError(DuokaError):
    """A checkpoint is damaged, belongs to another model, or contains objects that are not safe to load."""


class CheckpointFormatError(CheckpointError):
    """A checkpoint is whole, and of another kind or of a newer version than this duoka reads."""


class StorageError(DuokaError, OSError):
    """A file could not be written: the disk is full or the folder is not writable."""


class MissingDependencyError(DuokaError, ImportError):
    """An optional package is needed and not installed; the message names the command that installs it."""


class UnsupportedError(DuokaError, NotImplementedError):
    """Something that one device can do and several together cannot; the message says what to use instead."""


class LaunchError(DuokaError, RuntimeError):
    """Worker processes could not start, or cannot run a task."""


class WorkerDied(LaunchError):  # noqa: N818 - not an error of the user
    """A worker process ended without an exception: a signal, the out-of-memory killer, ``os._exit``.

    Attributes: ``rank``; ``exit_code`` (``None`` when a signal ended it); ``signal`` (its name, or ``None``);
    ``last_output`` (the last lines of its output).
    """

    def __init__(
        self, rank: int, device: str, exit_code: int | None, signal: str | None, last_output: str, reason: str = ""
    ) -> None:
        self.rank = rank
        self.device = device
        self.exit_code = exit_code
        self.signal = signal
        self.last_output = last_output
        self.reason = reason
        ended = reason or (f"was killed by {signal}" if signal else f"exited with status {exit_code}")
        cause = (
            " The system's out-of-memory killer does this: use a smaller batch or fewer DataLoader workers."
            if signal == "SIGKILL"
            else ""
        )
        written = f"\nIts last output:\n{last_output}" if last_output else "\nIt has no output."
        super().__init__(f"the worker process of rank {rank} ({device}) {ended}.{cause}{written}")

    def __reduce__(self) -> tuple[type[WorkerDied], tuple[Any, ...]]:
        return type(self), (self.rank, self.device, self.exit_code, self.signal, self.last_output, self.reason)


class WorkerStuck(WorkerDied):
    """A worker process did not finish its work in time, and duoka ended it; the message says where it was."""

    def __init__(self, rank: int, device: str, description: str) -> None:
        super().__init__(rank, device, None, "SIGKILL", "", "was ended by duoka")
        self.args = (description,)

    def __reduce__(self) -> tuple[type[WorkerStuck], tuple[Any, ...]]:
        return type(self), (self.rank, self.device, self.args[0])


class DivergenceError(DuokaError, ArithmeticError):
    """Training stopped because a loss or a parameter was not finite."""


class TrainingInterrupted(SystemExit):
    """Training was stopped by a signal or a time limit, after its state was saved where there is an ``out_dir``.

    A ``SystemExit``: a program that does not catch it ends with the status ``code``: 128 + the signal's number (143 for
    SIGTERM, 129 for SIGHUP, 138 for SIGUSR1), 124 for a time limit.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type[TrainingInterrupted], tuple[str, int]]:
        return type(self), (self.message, int(self.code or 0))
