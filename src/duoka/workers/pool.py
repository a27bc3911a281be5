"""Warm worker processes of this process: acquired for one task at a time, closed when the process ends."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from duoka.utils.files import write_time_ns
from duoka.utils.signals import handle_interrupt
from duoka.workers.environment import DEVICE_VARIABLES, worker_environment
from duoka.workers.events import wait_until_ready
from duoka.workers.handle import WorkerHandle
from duoka.workers.rendezvous import RendezvousFile
from duoka.workers.spawn import end_starter_thread

_READ_AT_START = (*DEVICE_VARIABLES, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "GLIBC_TUNABLES")
"""Environment variables that a process reads once: a worker that started with other values is not reused."""


class _Pool:
    """Idle and acquired workers. A process has one pool, which registers nothing before its first worker."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._acquired: set[WorkerHandle] = set()
        self._idle: dict[WorkerHandle, dict[str, int | None]] = {}
        """Each worker, with the user's source files and their write times when its last task ended."""
        self._is_registered = False

    def acquire(self, devices: Sequence[torch.device]) -> list[WorkerHandle]:
        """Return a worker for each device, warm if there is one; all of them are ready."""
        workers: list[WorkerHandle] = []
        try:
            for device in devices:
                workers.append(self._reuse(device) or self._start(device))
            for rank, worker in enumerate(workers, start=1):
                worker.rank = rank
            wait_until_ready(workers)
        except BaseException:
            self.release(workers, reusable=False)
            raise
        return workers

    def release(self, workers: Sequence[WorkerHandle], *, reusable: bool) -> None:
        """Take workers back; those that are not ``reusable``, because they may still run a task, are killed."""
        sources = _user_sources() if reusable else {}
        with self._lock:
            for worker in workers:
                if reusable and worker in self._acquired and worker.is_alive():
                    self._idle[worker] = sources
                else:
                    worker.close()
                self._acquired.discard(worker)
            if not self._idle and not self._acquired:
                end_starter_thread()

    def close(self) -> None:
        """Kill every worker; ``release`` closes the descriptors of acquired ones, which may be in use."""
        with self._lock:
            while self._idle:
                self._idle.popitem()[0].close()
            for worker in self._acquired:
                worker.close_for_user()
            end_starter_thread()

    def _reuse(self, device: torch.device) -> WorkerHandle | None:
        key = _start_key(device)
        with self._lock:
            for worker in [worker for worker in self._idle if worker.start_key == key]:
                sources = self._idle.pop(worker)
                if worker.is_alive() and all(write_time_ns(file) == time for file, time in sources.items()):
                    self._acquired.add(worker)
                    return worker
                worker.close()
        return None

    def _start(self, device: torch.device) -> WorkerHandle:
        with self._lock:
            if not self._is_registered:
                atexit.register(self._close_at_exit)
                os.register_at_fork(after_in_child=self._detach_in_child)
                self._is_registered = True
            worker = WorkerHandle(device)
            worker.start_key = _start_key(device)
            self._acquired.add(worker)
            return worker

    def _close_at_exit(self) -> None:
        """Close all workers, which takes no time, without interruption by another Ctrl-C."""
        with handle_interrupt(signal.SIG_IGN):
            self.close()

    def _detach_in_child(self) -> None:
        """Close a forked child's copies of the descriptors, which would keep the parent's workers alive."""
        self._lock = threading.Lock()
        for worker in (*self._idle, *self._acquired):
            worker.detach()
        self._idle.clear()
        self._acquired.clear()


def _start_key(device: torch.device) -> tuple[str, ...]:
    environment = worker_environment()
    return (str(device), RendezvousFile.of_this_process().key, *(environment.get(name, "") for name in _READ_AT_START))


def _user_sources() -> dict[str, int | None]:
    """Return the user's imported source files with their write times: a worker must not run an older version."""
    installed = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]))
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    return {file: write_time_ns(file) for file in files if isinstance(file, str) and not file.startswith(installed)}


_pool = _Pool()
acquire = _pool.acquire
release = _pool.release


def close_workers() -> None:
    """End the warm worker processes now, and free their memory; the next launch starts new ones.

    Without this call they end with this process.

    Example:
        >>> import duoka
        >>> duoka.launch(max, 1, 2, devices="cpu:2")
        2
        >>> duoka.close_workers()
    """
    _pool.close()
