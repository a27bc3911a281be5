"""The helper processes that this process keeps warm: lent for one job at a time, ended when the process ends."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from duoka.workers.handle import WorkerHandle

__all__ = ["acquire", "close_workers", "release"]

_FIXED_AT_START = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "GLIBC_TUNABLES",
)
"""Environment variables that a process reads once: a helper started under other values of these is not reused."""


class _Pool:
    """Idle helpers by what they were started for. One exists a process; nothing is registered before the first helper."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[tuple[str, ...], dict[str, int], WorkerHandle]] = []
        self._lent: dict[int, tuple[str, ...]] = {}
        self._lent_helpers: dict[int, WorkerHandle] = {}
        self._is_registered = False

    def acquire(self, devices: Sequence[torch.device]) -> list[WorkerHandle]:
        """Return a helper for each device, warm where there is one, all of them ready."""
        helpers: list[WorkerHandle] = []
        try:
            for device in devices:
                helpers.append(self._take(device) or self._start(device))
            for rank, helper in enumerate(helpers, start=1):
                helper.rank = rank
                helper.await_ready()
        except BaseException:
            self.release(helpers, reusable=False)
            raise
        return helpers

    def release(self, helpers: Sequence[WorkerHandle], *, reusable: bool) -> None:
        """Take helpers back; those that may be in the middle of something are ended."""
        sources = _user_sources() if reusable else {}
        with self._lock:
            for helper in helpers:
                key = self._lent.pop(id(helper), None)
                self._lent_helpers.pop(id(helper), None)
                if reusable and key is not None and helper.is_alive():
                    self._idle.append((key, sources, helper))
                else:
                    helper.close()

    def close(self) -> None:
        """End every helper, lent ones too."""
        with self._lock:
            for helper in [*(entry[2] for entry in self._idle), *self._lent_helpers.values()]:
                helper.close()
            self._clear()

    def _take(self, device: torch.device) -> WorkerHandle | None:
        key = _key(device)
        with self._lock:
            for entry in [entry for entry in self._idle if entry[0] == key]:
                self._idle.remove(entry)
                helper = entry[2]
                if helper.is_alive() and not _changed(entry[1]):
                    self._lend(helper, key)
                    return helper
                helper.close()
        return None

    def _start(self, device: torch.device) -> WorkerHandle:
        with self._lock:
            if not self._is_registered:
                atexit.register(self._close_at_exit)
                os.register_at_fork(after_in_child=self._forget)
                self._is_registered = True
            helper = WorkerHandle(device)
            self._lend(helper, _key(device))
            return helper

    def _close_at_exit(self) -> None:
        """End every helper whoever presses Ctrl-C once more: it takes no time, and the program is ending."""
        if threading.current_thread() is not threading.main_thread():
            self.close()
            return
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.close()
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)

    def _lend(self, helper: WorkerHandle, key: tuple[str, ...]) -> None:
        self._lent[id(helper)] = key
        self._lent_helpers[id(helper)] = helper

    def _forget(self) -> None:
        """In a forked child: the helpers are its parent's, and must not be held alive by this child's copies."""
        self._lock = threading.Lock()
        for helper in [*(entry[2] for entry in self._idle), *self._lent_helpers.values()]:
            helper.forget()
        self._clear()

    def _clear(self) -> None:
        self._idle.clear()
        self._lent.clear()
        self._lent_helpers.clear()


def _key(device: torch.device) -> tuple[str, ...]:
    return (str(device), *(os.environ.get(name, "") for name in _FIXED_AT_START))


def _user_sources() -> dict[str, int]:
    """The user's own imported source files and when they were written: a helper must not run an older edition."""
    ours = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]))
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    return {file: _written_ns(file) for file in files if isinstance(file, str) and not file.startswith(ours)}


def _changed(sources: dict[str, int]) -> bool:
    return any(_written_ns(file) != written for file, written in sources.items())


def _written_ns(file: str) -> int:
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return -1


_pool = _Pool()
acquire = _pool.acquire
release = _pool.release


def close_workers() -> None:
    """End the warm helper processes now, with the memory they hold, rather than when this process ends.

    The next launch starts new ones.

    Example:
        >>> import duoka
        >>> duoka.launch(max, 1, 2, devices="cpu:2")
        2
        >>> duoka.close_workers()
    """
    _pool.close()
