"""Signal handlers for the time of a ``with`` block: Ctrl-C, and the signals with which systems stop a program."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

from duoka.errors import TrainingInterrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What a system sends before it takes the machine away (SIGTERM), a lost terminal (SIGHUP), and Slurm on request."""


@contextlib.contextmanager
def handle_interrupt(handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    """Call ``handler`` on Ctrl-C inside the ``with`` block; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)


class StopSignals:
    """Context manager that handles the stop signals, in the main thread alone.

    A signal that the user's program ignores or handles itself stays as it is. In a forked child every signal has its
    default effect.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if _is_free(number):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            self.receive(number, frame)

    def receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the interface of handlers
        """Raise ``TrainingInterrupted``, with the status that a shell gives to a program that the signal has ended."""
        raise interruption(number)


class SignalWatch(StopSignals):
    """Notes the first stop signal instead of raising; the second one has the effect that it has outside the block."""

    received = 0
    """Number of the signal; 0 before any."""

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the signal."""
        if not self.received:
            self.received = number
            return
        before = self._before.get(number, signal.SIG_DFL)
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def ignore_first_signals() -> None:
    """Ignore the first SIGHUP and SIGUSR1, for a process that another one ends by SIGTERM."""
    for number in filter(_is_free, (signal.SIGHUP, signal.SIGUSR1)):
        signal.signal(number, lambda number, _: signal.signal(number, signal.SIG_DFL))


def _is_free(number: int) -> bool:
    """Return whether the user's program neither ignores nor handles a signal."""
    handler = signal.getsignal(number)
    return handler is signal.SIG_DFL or isinstance(getattr(handler, "__self__", None), StopSignals)


def interruption(number: int) -> TrainingInterrupted:
    """Return the exception for a signal."""
    return TrainingInterrupted(f"stopped by {signal.Signals(number).name}", 128 + number)
