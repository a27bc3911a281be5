"""Snapshots of everything that a test could leave behind, and the difference between two of them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass

from support.processes import WORKER_PROGRAM, children

GRACE_S = 3.0
"""How long something may take to end after a test before it counts as a leak."""
SET_BY_LIBRARIES = (
    "PYTEST_", "COV_", "KMP_", "TORCHINDUCTOR_", "TRITON_", "CUDA_MODULE_LOADING", "COLUMNS", "LINES",
)  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """The processes, threads, sockets, variables and files of this moment, each with a description."""

    processes: dict[int, str]
    threads: dict[int, str]
    sockets: dict[str, str]
    variables: dict[str, str]
    files: frozenset[str]
    folder: str
    has_process_group: bool

    def leaks_since(self, before: Snapshot) -> list[str]:
        """Describe everything that exists now and did not exist ``before``."""
        leaks = [f"process {pid}: {line}" for pid, line in self.processes.items() if pid not in before.processes]
        leaks += [f"thread {name}" for ident, name in self.threads.items() if ident not in before.threads]
        leaks += [f"file descriptor {fd} of {it}" for it, fd in self.sockets.items() if it not in before.sockets]
        leaks += [f"file {name}" for name in sorted(self.files - before.files)]
        leaks += self.changed_variables(before)
        if self.folder != before.folder:
            leaks.append(f"working directory {self.folder}, was {before.folder}")
        if self.has_process_group and not before.has_process_group:
            leaks.append("the default process group of torch.distributed")
        return leaks

    def changed_variables(self, before: Snapshot) -> list[str]:
        names = sorted(self.variables.keys() | before.variables.keys())
        changed = [name for name in names if self.variables.get(name) != before.variables.get(name)]
        return [f"environment variable {name}={self.variables.get(name)!r}" for name in changed]


def take_snapshot() -> Snapshot:
    distributed = sys.modules.get("torch.distributed")
    return Snapshot(
        processes=children(),
        threads={thread.ident or 0: thread.name for thread in threading.enumerate()},
        sockets=open_sockets(),
        variables={name: value for name, value in os.environ.items() if not name.startswith(SET_BY_LIBRARIES)},
        files=frozenset(name for name in os.listdir(tempfile.gettempdir()) if name.startswith(("duoka", ".duoka"))),
        folder=os.getcwd(),
        has_process_group=bool(distributed and distributed.is_available() and distributed.is_initialized()),
    )


def open_sockets() -> dict[str, str]:
    found = {}
    for entry in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found[target] = entry
    return found


def find_leaks(before: Snapshot, *, allow_warm_workers: bool) -> list[str]:
    """Return what exists and did not exist ``before``, after waiting up to ``GRACE_S`` for it to end."""
    deadline = time.monotonic() + GRACE_S
    while True:
        now = take_snapshot()
        leaks = now.leaks_since(before)
        if allow_warm_workers and any(WORKER_PROGRAM in line for line in now.processes.values()):
            leaks = [leak for leak in leaks if not _belongs_to_warm_workers(leak)]
        if not leaks or time.monotonic() > deadline:
            return leaks
        gc.collect()
        multiprocessing.active_children()  # waits for children that have ended
        time.sleep(0.02)


def _belongs_to_warm_workers(leak: str) -> bool:
    """Whether duoka keeps this for the next launch; the check at the end of the module looks at it."""
    return WORKER_PROGRAM in leak or leak.startswith(("thread duoka-", "file descriptor"))
