"""What travels to a helper: the work, and what of the user's process it needs around it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Surroundings", "Task"]


@dataclass(frozen=True)
class Surroundings:
    """What of the user's process a task needs around it to run as if it ran there."""

    environment: Mapping[str, str]
    folder: str
    path: Sequence[str]
    arguments: Sequence[str]

    @staticmethod
    def here() -> Surroundings:
        """Those of this process, now."""
        try:
            folder = os.getcwd()
        except FileNotFoundError:  # somebody removed it; a task that needs it will say so
            folder = "/"
        return Surroundings(dict(os.environ), folder, list(sys.path), list(sys.argv))

    def enter(self) -> None:
        """Make them those of this process."""
        for name in os.environ.keys() - self.environment.keys():
            del os.environ[name]
        os.environ.update(self.environment)
        os.chdir(self.folder)
        sys.path[:] = self.path
        sys.argv[:] = self.arguments


@dataclass(frozen=True)
class Task:
    """What to run, once the surroundings are right: ``work`` is a pickled ``(function, arguments)``.

    ``function(place, meet, *arguments)`` returns a context manager: its value is the rank's answer, and it is left when
    all ranks have answered, so that no rank takes a process group away from under another. Where the task ``talks``, it is
    given the whole line to its owner in place of ``meet``.
    """

    surroundings: Surroundings
    device: torch.device
    place: Any
    scratch: str | None
    work: bytes
    sizes: tuple[int, ...]
    talks: bool = False
