"""Statistics of a run: models that ran in parallel, the time of a training step, and its parts."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from duoka.data_parallel.call_context import Timers
from duoka.log import logger

_COMPARISON_STEPS = frozenset({20, 21, 22, 100, 101, 102, 500, 501, 502})
"""Counts of optimizer steps at which a step runs on one device, to compare the speed."""
_NEIGHBORS = 8
"""A step on one device is compared with so many steps before it and after it."""
_MIN_COMPARED = 3
_MAX_KEPT = 4096
"""Steps in memory, the most recent ones."""


class CallKind(NamedTuple):
    """Kind of a model's call; a call without gradients is no training."""

    is_training: bool
    is_split: bool
    batch: int
    """Number of samples."""


@dataclass
class ModelStats:
    """Calls of one model, or of several that one line of the script creates."""

    run: RunStats
    name: str = ""
    how: str = ""
    """Where it was found."""
    refusal: str = ""
    """Why it runs on one device; empty if it may run on all."""
    devices: int = 0
    """Number of devices of its wrapper in the script; 0 without a wrapper, when the run decides."""
    kinds: Counter[CallKind] = field(default_factory=Counter)
    """Calls of each kind."""

    def found(self, name: str, how: str) -> None:
        """Record where the model was found first."""
        if not self.how:
            self.name, self.how = name, how
            self._warn_of_multiplied_batch()

    def refuse(self, reason: str) -> None:
        """Keep the model on one device from now on, unless the script wraps it; the first reason stays."""
        if self.devices < 2 and not self.refusal:
            self.refusal = reason
            self._warn_of_multiplied_batch()

    def _warn_of_multiplied_batch(self) -> None:
        is_final = bool(self.refusal) and not self.run.is_until_step
        if self.how and is_final and self.run.scale_batch and len(self.run.devices) > 1:
            logger.warning(
                "%s (%s) runs on one device, with batches that --scale-batch multiplies: %s. Run without --scale-batch.",
                self.name,
                self.how,
                self.refusal,
            )

    def count(self, batch: int | None, *, split: bool) -> None:
        """Count one call with a batch of ``batch`` samples."""
        is_training = torch.is_grad_enabled()
        self.kinds[CallKind(is_training, split, batch or 0)] += 1
        if is_training:
            self.run.num_split += split
            self.run.num_whole += not split

    @property
    def split(self) -> int:
        """The number of calls split over all devices."""
        return sum(count for kind, count in self.kinds.items() if kind.is_split)

    @property
    def whole(self) -> int:
        """The number of calls on one device."""
        return self.kinds.total() - self.split

    @property
    def batch(self) -> int:
        """The most frequent batch size in training, or in evaluation if the model was not trained."""
        batches: Counter[int] = Counter()
        for kind in self._main_kinds():
            batches[kind.batch] += self.kinds[kind]
        return batches.most_common(1)[0][0] if batches else 0

    @property
    def is_parallel(self) -> bool:
        """Whether a training call was split; for a model that was not trained, any call."""
        return any(kind.is_split for kind in self._main_kinds())

    def _main_kinds(self) -> list[CallKind]:
        return [kind for kind in self.kinds if kind.is_training] or list(self.kinds)

    def merged(self, others: Sequence[ModelStats]) -> ModelStats:
        """Return the sum of this model's calls and those of others."""
        if not others:
            return self
        kinds = sum((model.kinds for model in others), self.kinds)
        return dataclasses.replace(self, name=f"{self.name} ({len(others) + 1} models)", kinds=kinds)


@dataclass
class LoaderStats:
    """A DataLoader of the script that may be for training."""

    location: str
    batch: int
    scaled_batch: int
    """Its batch size in this run, in iterations with gradients."""
    has_trained: bool = False
    """Whether there was such an iteration; known if the batch size is multiplied."""


class StepTiming(NamedTuple):
    """Time from one optimizer step to the next, in seconds."""

    seconds: float
    transfer_s: float
    wait_s: float
    loading_s: float
    is_split: bool


class StepComparison(NamedTuple):
    """Seconds per step on one device and on all devices."""

    one_device_s: float
    all_devices_s: float


class RunStats:
    """Statistics of one run."""

    def __init__(self, devices: Sequence[torch.device], timers: Timers) -> None:
        self.devices = tuple(devices)
        self.timers = timers
        self.models: list[ModelStats] = []
        self.loaders: list[LoaderStats] = []
        self.notes: list[str] = []
        self.scale_batch = False
        """Whether training loaders get larger batches."""
        self.num_whole = self.num_split = 0
        """Training calls of all models: on one device, and split over all devices."""
        self.num_steps = 0
        """Steps of the optimizer that is timed."""
        self.startup_s = 0.0
        """Seconds spent on checking models and starting workers."""
        self.loading_s = 0.0
        """Seconds that the script has waited for its DataLoaders."""
        self.steps: list[StepTiming] = []
        self._refusal = ""
        self.is_until_step = False
        """Whether that refusal ends at the first optimizer step."""
        self._by_module: weakref.WeakKeyDictionary[nn.Module, ModelStats] = weakref.WeakKeyDictionary()
        self._optimizer: weakref.ref[Any] | None = None
        self._last: tuple[float, float, float, float, int, int] | None = None
        """Time and counters at the last step of that optimizer."""
        self._calls_of_step = 0
        """Training calls of all models in the last step."""

    def model(self, module: nn.Module) -> ModelStats:
        """Return the statistics of a model; create them if there are none."""
        stats = self._by_module.get(module)
        if stats is None:
            stats = self._by_module[module] = ModelStats(self, refusal=self._refusal)
            self.models.append(stats)
        return stats

    def refuse_all(self, reason: str, *, until_step: bool = False) -> None:
        """Keep every model on one device from now on; with ``until_step`` only until the first optimizer step."""
        if until_step and self._refusal:
            return
        self._refusal, self.is_until_step = reason, until_step
        for stats in self.models:
            stats.refuse(reason)

    def _end_refusal_until_step(self) -> None:
        reason, self._refusal, self.is_until_step = self._refusal, "", False
        for stats in self.models:
            if stats.refusal == reason:
                stats.refusal = ""

    def add_note(self, text: str) -> None:
        """Add a line to the report, unless it has that line."""
        if text not in self.notes:
            self.notes.append(text)

    @contextlib.contextmanager
    def startup(self) -> Iterator[None]:
        """Count the time of the ``with`` block as ``startup_s``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.startup_s += time.perf_counter() - start

    def on_step(self, optimizer: Any) -> None:
        """Record an optimizer step. Only the first optimizer that is still alive is timed."""
        if self.is_until_step:
            self._end_refusal_until_step()
        if self._optimizer is None or self._optimizer() is None:
            self._optimizer, self._last = weakref.ref(optimizer), None
        if self._optimizer() is not optimizer:
            return
        self.num_steps += 1
        timers = self.timers
        now = (time.perf_counter(), timers.transfer_s, timers.wait_s, self.loading_s, self.num_whole, self.num_split)
        if self._last is not None:
            seconds, transfer, wait, loading, whole, split = (a - b for a, b in zip(now, self._last, strict=True))
            self._calls_of_step = int(whole + split)
            if bool(whole) != bool(split):
                self.steps.append(StepTiming(seconds, transfer, wait, loading, bool(split)))
                del self.steps[:-_MAX_KEPT]
        self._last = now

    def is_for_comparison(self) -> bool:
        """Return whether a call runs on one device to compare the speed: calls of some steps, no more than a step has."""
        if not torch.is_grad_enabled() or self.num_steps not in _COMPARISON_STEPS or self._last is None:
            return False
        return self.num_whole + self.num_split - sum(self._last[-2:]) < self._calls_of_step

    def comparison(self) -> StepComparison | None:
        """Return the times of a step on one device and on all; ``None`` if there are too few steps.

        Steps on one device are compared with their neighbors, which ran under the same conditions. Steps on one device
        at the start are left out.
        """
        first_split = next((index for index, step in enumerate(self.steps) if step.is_split), len(self.steps))
        later = list(enumerate(self.steps))[first_split + 1 :]
        whole = [index for index, step in later if not step.is_split]
        neighbors = {near for index in whole for near in range(index - _NEIGHBORS, index + _NEIGHBORS + 1)}
        beside = [step.seconds for index, step in later[1:] if step.is_split and index in neighbors]
        if len(whole) < _MIN_COMPARED or len(beside) < _MIN_COMPARED:
            return None
        one_device_s = statistics.median(self.steps[index].seconds for index in whole)
        return StepComparison(one_device_s, statistics.median(beside))

    def seconds_per_step(self) -> float | None:
        """Return the median time of a split step, or of any step if none was split."""
        times = [step.seconds for step in self.steps if step.is_split][1:] or [step.seconds for step in self.steps]
        return statistics.median(times) if times else None

    def time_shares(self) -> dict[str, float]:
        """Return the fractions of a split step's time, or of any step's if none was split; there must be a step."""
        steps = [step for step in self.steps if step.is_split] or self.steps
        median = statistics.median(step.seconds for step in steps)
        typical = [step for step in steps if step.seconds <= 3 * median]  # without those that include an evaluation
        total, *parts, _ = (sum(column) for column in zip(*typical, strict=True))
        shares = dict(zip(("transfer", "waiting", "loading data"), (part / total for part in parts), strict=True))
        return {"computing": max(0.0, 1 - sum(shares.values())), **shares}
