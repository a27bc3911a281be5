"""Ctrl-C and failures of others, while the user's process may be blocked in a collective that runs no Python code.

Python runs a signal handler between two bytecodes, so not while rank 0 waits inside a collective. The C-level handler does
write to a wake-up descriptor at once; a watching thread reads it, ends the helpers, and their closing connections free the
collective. In the other direction the watching thread stops rank 0, wherever it is, when a helper has failed.
"""

from __future__ import annotations

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

__all__ = ["InterruptHandler", "PeerFailed"]


class PeerFailed(BaseException):
    """Raised in rank 0's function when another rank has failed; ``launch`` turns it into that failure."""


class InterruptHandler:
    """Watches over one job: what a Ctrl-C does, and how the thread that runs rank 0 is stopped. A context manager."""

    def __init__(self) -> None:
        self.interrupted = False
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._open = False
        self._stopped = False
        self._previous: Any = None
        self._previous_wakeup = -1
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._open = True
        previous = signal.getsignal(signal.SIGINT)
        replaceable = callable(previous) or previous is signal.SIG_IGN  # else Ctrl-C ends the process, or C code has it
        if threading.current_thread() is threading.main_thread() and replaceable:
            self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._previous = signal.signal(signal.SIGINT, self._on_interrupt)
            _entered.add(self)
            _watch_forks()
        return self

    def forget(self) -> None:
        """Give the signals back, in a forked child: what it gets would else be read by its parent."""
        with contextlib.suppress(ValueError):  # not the main thread of the child
            signal.signal(signal.SIGINT, self._previous)
            signal.set_wakeup_fd(self._previous_wakeup)

    def __exit__(self, *_: object) -> None:
        self.close()
        _entered.discard(self)
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            signal.set_wakeup_fd(self._previous_wakeup)
        for end in (self._reader, self._writer):
            if end is not None:
                end.close()

    def close(self) -> None:
        """From now on nothing is raised in the caller's thread: signals are only noted."""
        with self._lock:
            self._open = False
            if self._stopped and self._previous is None:  # it may be on its way and not have come yet: call it back
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), None)

    def fileno(self) -> int:
        """Readable when a signal has come."""
        assert self._reader is not None
        return self._reader.fileno()

    def read_signals(self) -> bool:
        """Pass on what has come, and return whether it was a Ctrl-C that will raise KeyboardInterrupt in the caller."""
        assert self._reader is not None
        with contextlib.suppress(BlockingIOError):
            numbers = self._reader.recv(4096)
            if self._previous_wakeup >= 0:
                with contextlib.suppress(OSError):
                    os.write(self._previous_wakeup, numbers)
            if signal.SIGINT in numbers and not self._stopped and self._previous is signal.default_int_handler:
                self.interrupted = True
        return self.interrupted

    def stop_caller(self) -> None:
        """Raise ``Stopped`` in the caller's thread, waking it from a sleep or a read if need be."""
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


_entered: weakref.WeakSet[InterruptHandler] = weakref.WeakSet()
"""Those that have this process's signals; at most one."""


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_forget_all)


def _forget_all() -> None:
    for one in list(_entered):
        one.forget()
