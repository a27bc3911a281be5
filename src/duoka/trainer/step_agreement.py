"""Events that all ranks learn of between two steps: a signal to stop, the end of the time, a checkpoint that is due."""

import time
from typing import NamedTuple

import torch

from duoka.trainer.config import TrainerConfig
from duoka.utils.signals import SignalWatch
from duoka.world import World

INTERVAL_S = 0.5
"""Time between two agreements, which cost a collective."""


class StepEvents(NamedTuple):
    """Events of any rank."""

    signal: int = 0
    """Number of a signal that asks to stop; 0 for none."""
    is_time_over: bool = False
    is_checkpoint_due: bool = False


class StepAgreement:
    """Meets all ranks at the same steps, about every half second, so that a step has no cost.

    Rank 0 measures the time. It chooses the next step to meet at from the duration of the last steps, and at most doubles
    their number.
    """

    def __init__(self, config: TrainerConfig, world: World, signals: SignalWatch) -> None:
        self.world, self.signals = world, signals
        self.limit_s = None if config.max_hours is None else config.max_hours * 3600
        minutes = None if config.out_dir is None else config.checkpoint_minutes
        self.checkpoint_s = None if minutes is None else minutes * 60
        self.began = self.checkpoint_at = self._met_at = time.monotonic()
        self.durations_s: dict[str, float] = {}
        """How long the parts of an early end last took: evaluation, checkpoint."""
        self.next_step = 0
        self._steps = 1

    def meet(self, step: int) -> StepEvents:
        """Return what has happened on any rank; every rank must call this at the same step."""
        now = time.monotonic()
        mine = [self.signals.received, self._is_time_over(now), self._is_checkpoint_due(now), self._count_steps(now)]
        if not self.world.is_main:
            mine[1:] = [0, 0, 0]
        signal, is_over, is_due, self._steps = self.world.all_reduce(torch.tensor(mine, device="cpu"), "max").tolist()
        self.next_step, self._met_at = step + self._steps, time.monotonic()
        return StepEvents(signal, bool(is_over), bool(is_due))

    def note_checkpoint(self) -> None:
        """Count the time to the next checkpoint from now."""
        self.checkpoint_at = time.monotonic()

    def _is_time_over(self, now: float) -> bool:
        """Return whether the rest of the time is needed for what the end of training does."""
        return self.limit_s is not None and now - self.began + sum(self.durations_s.values()) >= self.limit_s

    def _is_checkpoint_due(self, now: float) -> bool:
        return self.checkpoint_s is not None and now - self.checkpoint_at >= self.checkpoint_s

    def _count_steps(self, now: float) -> int:
        """Return after how many steps to meet again."""
        step_s = max(now - self._met_at, 1e-9) / self._steps
        return max(1, min(2 * self._steps, int(INTERVAL_S / step_s)))
