"""Ctrl-C, and failures of other ranks, while rank 0 may be blocked in a collective that runs no Python code.

Python runs a signal handler between two bytecodes, so not while rank 0 waits inside a collective. The C-level handler
writes to a wake-up descriptor at once. The monitor thread reads that descriptor and kills the workers; the connections
that close then end the collective. When a worker fails, the monitor thread stops rank 0 in the same way.
"""

import contextlib
import ctypes
import functools
import os
import signal
import socket
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from duoka.utils.signals import SignalWatch
from duoka.workers.resource_limits import explain_resource_errors


class PeerFailed(BaseException):
    """Raised in rank 0's function when another rank has failed; ``run_on_all`` replaces it by that failure."""


class InterruptHandler:
    """Context manager that notes Ctrl-C, and can stop the thread that runs rank 0."""

    def __init__(self) -> None:
        self.interrupted = False
        self.stop_signal = 0
        """The second stop signal, when rank 0 has not acted on the first: it waits for a worker outside of Python."""
        self._num_stop_signals = 0
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._open = False
        self._stopped = False
        self._previous: Any = None
        self._previous_wakeup = -1
        with explain_resource_errors("launch"):
            self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def __enter__(self) -> Self:
        self._open = True
        previous = signal.getsignal(signal.SIGINT)
        is_python_handler = callable(previous) or previous is signal.SIG_IGN
        if threading.current_thread() is threading.main_thread() and is_python_handler:
            self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._previous = signal.signal(signal.SIGINT, self._on_interrupt)
            _active.add(self)
            _register_fork_hook()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        _active.discard(self)
        if self._previous is not None:
            self.restore_signals()
        self._reader.close()
        self._writer.close()

    def close(self) -> None:
        """Raise nothing in the caller's thread from now on; signals are noted only."""
        with self._lock:
            self._open = False
            if self._stopped and self._previous is None:  # cancel an exception that has not been raised yet
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), None)

    def restore_signals(self) -> None:
        """Restore the earlier signal handler, in a forked child too: the parent would read its signals otherwise."""
        with contextlib.suppress(ValueError):  # a child's main thread may be another one
            signal.signal(signal.SIGINT, self._previous)
            signal.set_wakeup_fd(self._previous_wakeup)

    def fileno(self) -> int:
        """Return the descriptor that is readable after a signal."""
        return self._reader.fileno()

    def read_signals(self) -> bool:
        """Forward the signals to an earlier wake-up descriptor; return whether they end the launch at once."""
        with contextlib.suppress(BlockingIOError):
            numbers = self._reader.recv(4096)
            if self._previous_wakeup >= 0:
                with contextlib.suppress(OSError):
                    os.write(self._previous_wakeup, numbers)
            if signal.SIGINT in numbers and not self._stopped and self._previous is signal.default_int_handler:
                self.interrupted = True
            self._count_stop_signals(numbers)
        return self.interrupted or bool(self.stop_signal)

    def _count_stop_signals(self, numbers: bytes) -> None:
        """Note the second signal that a ``SignalWatch`` handles: the first one waits for the end of a step."""
        for number in numbers:
            if isinstance(getattr(signal.getsignal(number), "__self__", None), SignalWatch):
                self._num_stop_signals += 1
                self.stop_signal = number if self._num_stop_signals > 1 else 0

    def stop_caller(self) -> None:
        """Raise ``PeerFailed`` in the caller's thread, and wake it from a sleep or a read."""
        with self._lock:
            if not self._open:
                return
            self._stopped = True
            if self._previous is not None:
                signal.pthread_kill(self._thread, signal.SIGINT)
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(PeerFailed))

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._open:
            self.interrupted |= not self._stopped and self._previous is not signal.SIG_IGN
        elif self._stopped:
            raise PeerFailed
        elif self._previous is not signal.SIG_IGN:
            handler: Callable[[int, FrameType | None], Any] = self._previous
            handler(number, frame)


_active: weakref.WeakSet[InterruptHandler] = weakref.WeakSet()
"""Handlers that have replaced this process's signal handler; at most one."""


@functools.cache
def _register_fork_hook() -> None:
    def restore_all() -> None:
        for handler in list(_active):
            handler.restore_signals()

    os.register_at_fork(after_in_child=restore_all)
