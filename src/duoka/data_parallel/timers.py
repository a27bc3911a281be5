"""Timers of rank 0's overhead while models run in parallel: transfers, and waits for workers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Timers:
    """Seconds that rank 0 has spent on moving tensors and messages, and on waiting for workers."""

    def __init__(self) -> None:
        self.transfer_s = 0.0
        self.wait_s = 0.0

    @contextlib.contextmanager
    def transfer(self) -> Iterator[None]:
        """Count the ``with`` block as transfer; waits inside it count as waits."""
        begun, waited = time.perf_counter(), self.wait_s
        try:
            yield
        finally:
            self.transfer_s += time.perf_counter() - begun - (self.wait_s - waited)

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Count the ``with`` block as a wait for workers."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.wait_s += time.perf_counter() - begun


TIMERS = Timers()
