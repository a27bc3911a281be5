"""Events of several workers: output, messages and deaths, as one list."""

from __future__ import annotations

import selectors
from collections.abc import Sequence
from typing import Any, Literal

from duoka.workers.handle import WorkerHandle

Event = Literal["signal", "output", "message", "death"]
_ORDER: tuple[Event, ...] = ("signal", "output", "message", "death")
"""Deaths come last, because a worker may have sent a message before it died."""


class EventSelector:
    """Waits for events of workers, and of a ``signal_source`` if there is one."""

    def __init__(self, workers: Sequence[WorkerHandle], signal_source: Any = None) -> None:
        self._workers = workers
        self._selector = selectors.DefaultSelector()
        if signal_source is not None:
            self._register(signal_source, "signal", None)
        for worker in workers:
            self._register(worker.channel, "message", worker)
            self._register(worker.output_fd, "output", worker)
            if worker.death_fd is not None:
                self._register(worker.death_fd, "death", worker)

    def select(self, timeout_s: float) -> list[tuple[Event, Any]]:
        """Return the events that are ready, each with its worker; an empty list after ``timeout_s``."""
        ready = [key.data for key, _ in self._selector.select(timeout_s)]
        if not ready:  # systems without pidfd do not announce a death
            ready = [("death", worker) for worker in self._workers if not worker.is_alive()]
        return sorted(ready, key=lambda event: _ORDER.index(event[0]))

    def close(self) -> None:
        """Stop selecting; the workers stay open."""
        self._selector.close()

    def _register(self, source: Any, event: Event, worker: WorkerHandle | None) -> None:
        self._selector.register(source, selectors.EVENT_READ, (event, worker))
