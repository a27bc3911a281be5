"""Watch over a wait for workers: reports which worker is waited for and where it is, and ends the wait at a limit."""

import math
import os
import time
from collections.abc import Sequence

from duoka.errors import ConfigError, WorkerStuck
from duoka.log import logger
from duoka.workers.handle import Activity, WorkerHandle

REPORT_VARIABLE, LIMIT_VARIABLE = "DUOKA_STALL_REPORT_S", "DUOKA_STALL_LIMIT_S"
_DEFAULT_S = {REPORT_VARIABLE: 60.0, LIMIT_VARIABLE: 1800.0}

_PAUSE_FROM_S = 5.0
"""Checks follow each other within a second; a longer gap means that this process did not run."""


class StallWatch:
    """One wait for ``workers``, which do ``task``; ``check`` is called again and again until the wait ends.

    The report comes after ``DUOKA_STALL_REPORT_S`` (60 s), and again after twice, four times, ... as long. The limit is
    ``DUOKA_STALL_LIMIT_S`` (1,800 s). A value of 0 switches either off.
    """

    def __init__(self, workers: Sequence[WorkerHandle], task: str) -> None:
        self.workers, self.task = workers, task
        self._report_s, self._stall_limit_s = _seconds(REPORT_VARIABLE), _seconds(LIMIT_VARIABLE)
        self.restart()

    def restart(self) -> None:
        """Begin a new wait."""
        self._since = self._checked = time.monotonic()
        self._next_s, self._limit_s = self._report_s, self._stall_limit_s

    @property
    def waited_s(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._since

    def check(self, *, ends_busy_workers: bool = True) -> None:
        """Report when it is time; at the limit kill a worker that is waited for, and raise WorkerStuck.

        Args:
            ends_busy_workers: whether the limit also holds for a worker that can say where its Python code is.

        """
        self._skip_pause()
        waited_s = self.waited_s
        if waited_s >= self._next_s:
            self._next_s *= 2
            for worker in self.workers:
                logger.warning("%s", self._describe(worker, waited_s, worker.activity()))
        self._checked = time.monotonic()
        if waited_s < self._limit_s:
            return
        self._limit_s *= 2  # for the next look at workers that may go on
        for worker in self.workers:
            activity = worker.activity()
            if ends_busy_workers or not activity.is_responding:
                worker.kill()
                text = (
                    f"{self._describe(worker, waited_s, activity)}\nduoka has ended it after {self._stall_limit_s:g} s. "
                    f"{LIMIT_VARIABLE} sets another limit, 0 none."
                )
                raise WorkerStuck(worker.rank, worker.label, text)

    def _skip_pause(self) -> None:
        """Do not count the time in which this process itself was stopped, as by Ctrl-Z."""
        pause_s = time.monotonic() - self._checked
        if pause_s > _PAUSE_FROM_S:
            self._since += pause_s

    def _describe(self, worker: WorkerHandle, waited_s: float, activity: Activity) -> str:
        return (
            f"duoka has waited {waited_s:.0f} s for rank {worker.rank} ({worker.label}, process {worker.pid}), "
            f"which {self.task}. {activity.text}"
        )


def _seconds(name: str) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else _DEFAULT_S[name]
        if not 0 <= value < math.inf:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{name}={text!r}: give a number of seconds, such as 60, or 0 for never") from None
    return value or math.inf
