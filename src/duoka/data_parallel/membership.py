"""A model's use of a crew: it lasts as long as the model does, or a graph that came of it."""

from __future__ import annotations

import contextlib
import threading
import weakref

from duoka.data_parallel.worker_group import WorkerGroup

__all__ = ["WorkerGroupRef"]


class WorkerGroupRef:
    """Keeps the helpers; held by the engine and by each of its calls, and over when the last of them is gone."""

    def __init__(self, crew: WorkerGroup, model: int) -> None:
        crew.join()
        self._end = weakref.finalize(self, _leave_later, crew, model)
        self._end.atexit = False
        self._leave = crew.leave, model

    def end(self) -> None:
        """End it now, whoever holds it."""
        if self._end.detach():
            leave, model = self._leave
            leave(model)


def _leave_later(crew: WorkerGroup, model: int) -> None:
    """Leave from a thread of its own: the garbage collector may come in the middle of anything.

    The interpreter waits for that thread when it ends, as it may be inside torch, which it must not be stopped in. If it is
    ending already, the helpers end with it.
    """
    if crew.is_ours and threading.main_thread().is_alive():
        with contextlib.suppress(RuntimeError):  # it ends just now
            threading.Thread(target=crew.leave, args=(model,), name="duoka-close", daemon=False).start()
