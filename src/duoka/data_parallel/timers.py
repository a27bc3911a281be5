"""Where the time of the user's process goes while models are computed in parts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

__all__ = ["CLOCK", "Clock"]


class Clock:
    """Seconds that the user's process has spent on moving tensors and messages, and on waiting for helpers."""

    def __init__(self) -> None:
        self.moving = 0.0
        self.waiting = 0.0

    @contextlib.contextmanager
    def moves(self) -> Iterator[None]:
        """The ``with`` block moves something; what of it is spent on waiting counts as waiting."""
        begun, waited = time.perf_counter(), self.waiting
        try:
            yield
        finally:
            self.moving += time.perf_counter() - begun - (self.waiting - waited)

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """The ``with`` block waits for a helper."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.waiting += time.perf_counter() - begun


CLOCK = Clock()
