"""Looks after helpers that a device may wait for: the host cannot, when it waits for that device in torch's code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from duoka.workers.handle import WorkerHandle

__all__ = ["DeathMonitor"]

_EVERY_S = 0.5


class DeathMonitor:
    """A thread that calls ``on_death`` once when a helper has died, until it is ended."""

    def __init__(self, helpers: Sequence[WorkerHandle], on_death: Callable[[], None]) -> None:
        self._helpers, self._on_death = helpers, on_death
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="duoka-watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Look no longer."""
        self._is_over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _look(self) -> None:
        while not self._is_over.wait(_EVERY_S):
            if not all(helper.is_alive() for helper in self._helpers):
                self._on_death()
                return
