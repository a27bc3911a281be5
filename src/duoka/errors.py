"""Every exception that duoka raises. Each message says what, with which value, and what to do about it."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "DuokaError",
    "LaunchError",
    "MissingDependencyError",
    "StorageError",
    "UnsupportedError",
    "WorkerDied",
]


class DuokaError(Exception):
    """Base of everything duoka raises by itself; a user's own exceptions keep their own type."""


class ConfigError(DuokaError, ValueError):
    """An option has a value it cannot have, or a name that does not exist."""


class DeviceError(DuokaError, ValueError):
    """A device was named that is not there, or cannot be used that way."""


class DataError(DuokaError):
    """Data are missing, truncated or not in the form they should have."""


class CheckpointError(DuokaError):
    """A checkpoint is damaged, belongs to another model, or holds what cannot be loaded safely."""


class StorageError(DuokaError, OSError):
    """A file could not be written: the disk is full or the folder is not writable."""


class MissingDependencyError(DuokaError, ImportError):
    """An optional package is needed and not installed; the message names the command that installs it."""


class UnsupportedError(DuokaError, NotImplementedError):
    """Something that one device can do and several together cannot; the message says what to use instead."""


class LaunchError(DuokaError, RuntimeError):
    """Helper processes could not be started, or were asked for something they cannot do."""


class WorkerDied(LaunchError):  # noqa: N818 - the name that users read in a traceback, not a mistake of theirs
    """A helper process ended without an exception: a signal, the out-of-memory killer, ``os._exit``.

    Attributes: ``rank``; ``exit_code`` (``None`` when a signal ended it); ``signal`` (its name, or ``None``);
    ``last_output`` (the last lines that the helper wrote).
    """

    def __init__(self, rank: int, device: str, exit_code: int | None, signal: str | None, last_output: str) -> None:
        self.rank = rank
        self.device = device
        self.exit_code = exit_code
        self.signal = signal
        self.last_output = last_output
        ended = f"was ended by {signal}" if signal else f"exited with status {exit_code}"
        cause = (
            " The system's out-of-memory killer does this: try a smaller batch or fewer data-loader workers."
            if signal == "SIGKILL"
            else ""
        )
        written = f"\nIts last output:\n{last_output}" if last_output else "\nIt wrote no output."
        super().__init__(f"the helper process of rank {rank} ({device}) {ended}.{cause}{written}")

    def __reduce__(self) -> tuple[type[WorkerDied], tuple[int, str, int | None, str | None, str]]:
        return type(self), (self.rank, self.device, self.exit_code, self.signal, self.last_output)
