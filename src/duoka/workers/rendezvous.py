"""Rendezvous of the private process groups on this machine: a file in memory, loopback only, a short timeout."""

import atexit
import contextlib
import datetime
import functools
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from duoka.workers.serialization import memory_file

READY_FOR_RENDEZVOUS, ENTER_RENDEZVOUS = "ready_for_rendezvous", "enter_rendezvous"
"""Kinds of messages: torch's rendezvous cannot be interrupted, so no rank enters it before all are ready."""
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
CONNECT_TIMEOUT = datetime.timedelta(seconds=30)
"""How long ranks that are all ready may take to connect: milliseconds, or seconds on a machine with a high load.

If one dies meanwhile, the others wait this long in C++ code.
"""
LOOPBACK_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK}
NO_WATCHDOG_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0"}
"""NCCL's watchdog would end the user's process; duoka ends the workers instead."""


class Rendezvous(NamedTuple):
    """Where the ranks of one process group exchange addresses: their part of a file that all of them can open."""

    path: str
    prefix: str

    @staticmethod
    def new() -> "Rendezvous":
        """Return a part of this process's file that no other group uses."""
        return Rendezvous(RendezvousFile.of_this_process().path, f"group-{next(_numbers)}")

    def store(self) -> Any:
        """Return torch's store over this part of the file."""
        return dist.PrefixStore(self.prefix, dist.FileStore(self.path))  # type: ignore[attr-defined]


_numbers = itertools.count(1)


class RendezvousFile:
    """The file of a process and its workers, in memory: it has no name that a cleaner could remove.

    Its descriptor has the same number in the process and in all workers. The process never closes it, because torch's
    ``FileStore`` opens its path again when it is freed, at any later time. A group adds one or two kilobytes.
    Systems without ``/proc`` use a file in a temporary folder.
    """

    def __init__(self) -> None:
        self.fd = memory_file("duoka-rendezvous")
        self.path = f"/proc/self/fd/{self.fd}"
        self._inode = os.fstat(self.fd).st_ino
        if not os.access(self.path, os.R_OK | os.W_OK):
            folder = tempfile.mkdtemp(prefix="duoka-")
            self.path = f"{folder}/store"
            atexit.register(_remove_folder, folder, os.getpid())

    @staticmethod
    def of_this_process() -> "RendezvousFile":
        """Return the file; a new one in a forked child, and when the descriptor has been closed, as daemons do."""
        file = _file_of(os.getpid())
        with contextlib.suppress(OSError):
            if os.fstat(file.fd).st_ino == file._inode:
                return file
        _file_of.cache_clear()
        return _file_of(os.getpid())

    @staticmethod
    def renew() -> None:
        """Use a new file from now on: a rank that was killed while it connected may have left half a record."""
        _file_of.cache_clear()

    @property
    def key(self) -> str:
        """Tell this file from an earlier one of the same number."""
        return f"{self.path} {self._inode}"


@functools.lru_cache(maxsize=1)
def _file_of(pid: int) -> RendezvousFile:  # noqa: ARG001 - the key
    return RendezvousFile()


def remove_owner_folder(path: str) -> None:
    """Remove the temporary folder of a rendezvous file, in a worker whose owner has been killed."""
    if not path.startswith("/proc/"):
        shutil.rmtree(Path(path).parent, ignore_errors=True)


def _remove_folder(folder: str, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def environment_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the ``with`` block, and restore the user's own afterwards."""
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)
        os.environ.update(before)
