"""What travels to a helper: the work, and what of the user's process it needs around it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.backends import cudnn

__all__ = ["ProcessContext", "WorkItem"]


@dataclass(frozen=True)
class ProcessContext:
    """What of the user's process a task needs around it to run as if it ran there."""

    environment: Mapping[str, str]
    folder: str
    path: Sequence[str]
    arguments: Sequence[str]
    settings: Mapping[str, Any]
    """torch's process-wide settings, by their names in ``_SETTINGS``."""

    @staticmethod
    def here() -> ProcessContext:
        """Those of this process, now."""
        settings = {name: get() for name, (get, _) in _SETTINGS.items()}
        try:
            folder = os.getcwd()
        except FileNotFoundError:  # somebody removed it; a task that needs it will say so
            folder = "/"
        return ProcessContext(dict(os.environ), folder, list(sys.path), list(sys.argv), settings)

    def enter(self) -> None:
        """Make them those of this process."""
        for name in os.environ.keys() - self.environment.keys():
            del os.environ[name]
        os.environ.update(self.environment)
        os.chdir(self.folder)
        sys.path[:] = self.path
        sys.argv[:] = self.arguments
        for name, value in self.settings.items():
            get, put = _SETTINGS[name]
            if get() != value:
                put(value)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_anomaly(enabled: bool) -> None:
    torch.autograd.set_detect_anomaly(enabled)


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic": (_deterministic, lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1])),
    "anomaly": (torch.is_anomaly_enabled, _set_anomaly),
    "cudnn_benchmark": (lambda: cudnn.benchmark, lambda value: setattr(cudnn, "benchmark", value)),
    "cudnn_deterministic": (lambda: cudnn.deterministic, lambda value: setattr(cudnn, "deterministic", value)),
    "cudnn_allow_tf32": (lambda: cudnn.allow_tf32, lambda value: setattr(cudnn, "allow_tf32", value)),
}
"""What a script sets at its top and means for every rank: how to read it and how to set it."""


@dataclass(frozen=True)
class WorkItem:
    """What to run, once the surroundings are right: ``work`` is a pickled ``(function, arguments)``.

    ``function(place, meet, *arguments)`` returns a context manager: its value is the rank's answer, and it is left when
    all ranks have answered, so that no rank takes a process group away from under another. Where the task ``talks``, it is
    given the whole line to its owner in place of ``meet``.
    """

    surroundings: ProcessContext
    device: torch.device
    place: Any
    scratch: str | None
    work: bytes
    sizes: tuple[int, ...]
    talks: bool = False
