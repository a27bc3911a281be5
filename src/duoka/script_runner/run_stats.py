"""What a run came to: which models were shared out, how long a step took and where its time went, and what would help."""

from __future__ import annotations

import contextlib
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from duoka.data_parallel.timers import Clock

__all__ = ["RunStats", "LoaderStats", "ModelStats", "TimeShares"]

_NEAR = 8
_ENOUGH = 3
_KEPT = 4096
"""How many of the last steps are remembered."""


class CallStats:
    """What all models together have done: training calls whole and in parts, steps of the optimiser, time to get going."""

    def __init__(self) -> None:
        self.whole = self.split = self.steps = 0
        self.startup_s = 0.0
        """Seconds that were spent on trying models and on starting helpers."""

    @contextlib.contextmanager
    def startup(self) -> Iterator[None]:
        """The ``with`` block tries a model or starts helpers."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.startup_s += time.perf_counter() - begun


@dataclass
class ModelStats:
    """What became of one model."""

    calls: CallStats
    name: str = ""
    how: str = ""
    refusal: str = ""
    """Why it is computed on one device; empty while it is not."""
    devices: int = 0
    """On how many devices a wrapper in the script computes it; 0 where there is none, and the run decides."""
    whole: int = 0
    split: int = 0
    trained: Counter[int] = field(default_factory=Counter)
    """Training calls by their number of samples."""
    evaluated: Counter[int] = field(default_factory=Counter)
    """Calls without a graph, likewise."""
    trained_split: int = 0
    """Training calls that were computed in parts."""

    def found(self, name: str, how: str) -> None:
        """Note where the model was found: first come."""
        if not self.how:
            self.name, self.how = name, how

    def wrapped(self, name: str, how: str, devices: int) -> None:
        """Note that a wrapper in the script computes it on so many devices, whatever else is known of it."""
        self.name, self.how, self.devices, self.refusal = name, how, devices, ""

    def refuse(self, reason: str) -> None:
        """Note why it is computed on one device from now on; the first reason stays. A wrapper for several goes on."""
        if self.devices < 2:
            self.refusal = self.refusal or reason

    def count(self, batch: int | None, *, split: bool) -> None:
        """One call of the model, with a batch of so many samples."""
        self.split += split
        self.whole += not split
        is_training = torch.is_grad_enabled()
        (self.trained if is_training else self.evaluated)[batch or 0] += 1
        if is_training:
            self.trained_split += split
            self.calls.split += split
            self.calls.whole += not split

    @property
    def batch(self) -> int:
        """The usual number of samples of a training call, or of any other if there were none."""
        batches = self.trained or self.evaluated
        return batches.most_common(1)[0][0] if batches else 0

    @property
    def is_shared(self) -> bool:
        """Whether its training was computed in parts; of a model that was not trained, its other calls."""
        return bool(self.trained_split if self.trained else self.split)


@dataclass
class LoaderStats:
    """A DataLoader of the script."""

    place: str
    batch: int
    scaled: int
    """Its batch size in this run."""


class StepTiming(NamedTuple):
    """From one optimiser step to the next; seconds."""

    seconds: float
    moving: float
    waiting: float
    loading: float
    is_split: bool


class TimeShares(NamedTuple):
    """Where the time of a usual step goes, as parts of one."""

    computing: float
    moving: float
    waiting: float
    loading: float


class RunStats:
    """The stats of one run."""

    def __init__(self, devices: Sequence[torch.device], clock: Clock) -> None:
        self.devices = tuple(devices)
        self.clock = clock
        self.calls = CallStats()
        self.models: list[ModelStats] = []
        self.loaders: list[LoaderStats] = []
        self.notes: list[str] = []
        self.whole_script = ""
        """Why nothing of the script may be computed in parts; empty where something may."""
        self.scales = False
        """Whether batches of training loaders are multiplied."""
        self.loading = 0.0
        """Seconds that the script has waited for its DataLoaders."""
        self.steps: list[StepTiming] = []
        self._by_module: weakref.WeakKeyDictionary[nn.Module, ModelStats] = weakref.WeakKeyDictionary()
        self._leader: weakref.ref[Any] | None = None
        self._last: tuple[float, float, float, float, int, int] | None = None

    def model(self, module: nn.Module) -> ModelStats:
        """Return the stats of a model, a new one if there is none."""
        stats = self._by_module.get(module)
        if stats is None:
            stats = self._by_module[module] = ModelStats(self.calls, refusal=self.whole_script)
            self.models.append(stats)
        return stats

    def refuse_all(self, reason: str) -> None:
        """Let every model be computed on one device from now on."""
        self.whole_script = reason
        for stats in self.models:
            stats.refuse(reason)

    def add_note(self, text: str) -> None:
        """Say this at the end, once."""
        if text not in self.notes:
            self.notes.append(text)

    def stepped(self, optimizer: Any) -> None:
        """An optimiser has stepped; the steps of the first one that is still alive are timed."""
        if self._leader is None or self._leader() is None:
            self._leader, self._last = weakref.ref(optimizer), None
        if self._leader() is not optimizer:
            return
        self.calls.steps += 1
        now = (
            time.perf_counter(),
            self.clock.moving,
            self.clock.waiting,
            self.loading,
            self.calls.whole,
            self.calls.split,
        )
        if self._last is not None:
            seconds, moving, waiting, loading, whole, split = (a - b for a, b in zip(now, self._last, strict=True))
            if bool(whole) != bool(split):
                self.steps.append(StepTiming(seconds, moving, waiting, loading, bool(split)))
                del self.steps[:-_KEPT]
        self._last = now

    def comparison(self) -> tuple[float, float] | None:
        """Return the time of a step on one device and on all, seconds; ``None`` if there is nothing to compare.

        Steps on one device that lie between others are compared with their neighbours: the machine was the same then, and
        warm. Those at the beginning are not.
        """
        first = next((index for index, step in enumerate(self.steps) if step.is_split), len(self.steps))
        whole = [index for index, step in enumerate(self.steps) if not step.is_split and index > first]
        near = {index for one in whole for index in range(one - _NEAR, one + _NEAR + 1) if index > first + 1}
        beside = [
            self.steps[index].seconds
            for index in sorted(near)
            if index < len(self.steps) and self.steps[index].is_split
        ]
        if len(whole) < _ENOUGH or len(beside) < _ENOUGH:
            return None
        return statistics.median(self.steps[index].seconds for index in whole), statistics.median(beside)

    def seconds_a_step(self) -> float | None:
        """Return the usual time of a step, of those in parts if there are any; ``None`` if there are none."""
        times = [step.seconds for step in self.steps if step.is_split][1:] or [step.seconds for step in self.steps]
        return statistics.median(times) if times else None

    def shares(self) -> TimeShares:
        """Return where the time of steps goes; of those in parts if there are any."""
        steps = [step for step in self.steps if step.is_split] or self.steps
        typical = statistics.median(step.seconds for step in steps) if steps else 0.0
        usual = [step for step in steps if step.seconds <= 3 * typical]  # not those with an evaluation between them
        total = sum(step.seconds for step in usual) or 1.0
        moving, waiting, loading = (
            (sum(column) / total for column in list(zip(*usual, strict=True))[1:4]) if usual else (0, 0, 0)
        )
        return TimeShares(max(0.0, 1 - moving - waiting - loading), moving, waiting, loading)
