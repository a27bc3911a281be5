"""Work for a worker, and the context of the owner's process in which the worker runs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from duoka.utils.torch_settings import apply_torch_settings, capture_torch_settings
from duoka.workers.environment import worker_environment
from duoka.workers.handle import WorkerHandle
from duoka.workers.serialization import Payload, dumps


def restore_environment(environment: Mapping[str, str]) -> None:
    """Give this process exactly these environment variables."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


@dataclass(frozen=True)
class ProcessContext:
    """Environment, working directory, module search path, arguments and torch settings of a process."""

    environment: Mapping[str, str]
    working_directory: str
    sys_path: Sequence[str]
    argv: Sequence[str]
    torch_settings: Mapping[str, Any]

    @staticmethod
    def capture() -> ProcessContext:
        """Return the context of this process, now."""
        try:
            directory = os.getcwd()
        except FileNotFoundError:  # removed meanwhile; a task that opens a file there will say so
            directory = "/"
        return ProcessContext(worker_environment(), directory, list(sys.path), list(sys.argv), capture_torch_settings())

    def apply(self) -> None:
        """Give this process the context."""
        restore_environment(self.environment)
        os.chdir(self.working_directory)
        sys.path[:] = self.sys_path
        sys.argv[:] = self.argv
        apply_torch_settings(self.torch_settings)


@dataclass(frozen=True)
class WorkItem:
    """One task of a worker: ``data`` and ``sizes`` are the payload of a pickled ``(function, arguments)``.

    ``function(config, barrier, *arguments)`` returns a context manager whose value is the rank's result. The worker
    leaves it when all ranks have a result, so that no rank destroys a process group that another still uses. In a
    session the function gets the channel to the owner in place of ``barrier``.
    """

    context: ProcessContext
    device: torch.device
    config: Any
    data: bytes
    sizes: tuple[int, ...]
    is_session: bool

    @staticmethod
    def send(worker: WorkerHandle, packed: Payload, config: Any, *, is_session: bool) -> None:
        """Send a packed ``(function, arguments)`` to a worker, with the context of this process; may raise OSError."""
        context = ProcessContext.capture()
        item = WorkItem(context, worker.device, config, packed.data, packed.sizes, is_session)
        worker.channel.send("run", Payload(dumps(item).data, fd=packed.fd))
