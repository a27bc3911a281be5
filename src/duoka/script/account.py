"""What a run came to: which models were shared out, how long a step took and where its time went, and what would help."""

from __future__ import annotations

import statistics
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from duoka.mirror.clock import Clock

__all__ = ["Account", "LoaderAccount", "ModelAccount", "Shares"]

_KEPT = 4096
"""How many of the last steps are remembered."""


class Calls:
    """How many training calls were computed whole, and how many in parts, by all models together."""

    def __init__(self) -> None:
        self.whole = self.split = 0


@dataclass
class ModelAccount:
    """What became of one model."""

    calls: Calls
    name: str = ""
    how: str = ""
    refusal: str = ""
    """Why it is computed on one device; empty while it is not."""
    whole: int = 0
    split: int = 0
    batches: Counter[int] = field(default_factory=Counter)

    def found(self, name: str, how: str, *, explicit: bool = False) -> None:
        """Note where the model was found: first come, but the script's own wrapping counts most."""
        if not self.how or explicit:
            self.name, self.how = name, how

    def refuse(self, reason: str) -> None:
        """Note why it is computed on one device from now on; the first reason stays."""
        self.refusal = self.refusal or reason

    def count(self, batch: int | None, *, split: bool) -> None:
        """One call of the model, with a batch of so many samples."""
        self.split += split
        self.whole += not split
        if torch.is_grad_enabled():
            self.calls.split += split
            self.calls.whole += not split
            self.batches[batch or 0] += 1

    @property
    def batch(self) -> int:
        """The usual number of samples of a training call."""
        return self.batches.most_common(1)[0][0] if self.batches else 0


@dataclass
class LoaderAccount:
    """A DataLoader of the script."""

    place: str
    batch: int
    scaled: int
    """Its batch size in this run."""


class Step(NamedTuple):
    """From one optimiser step to the next; seconds."""

    seconds: float
    moving: float
    waiting: float
    loading: float
    is_split: bool


class Shares(NamedTuple):
    """Where the time of a usual step goes, as parts of one."""

    computing: float
    moving: float
    waiting: float
    loading: float


class Account:
    """The account of one run."""

    def __init__(self, devices: Sequence[torch.device], clock: Clock) -> None:
        self.devices = tuple(devices)
        self.clock = clock
        self.calls = Calls()
        self.models: list[ModelAccount] = []
        self.loaders: list[LoaderAccount] = []
        self.notes: list[str] = []
        self.whole_script = ""
        """Why nothing of the script may be computed in parts; empty where something may."""
        self.loading = 0.0
        """Seconds that the script has waited for its DataLoaders."""
        self.steps: list[Step] = []
        self._by_module: weakref.WeakKeyDictionary[nn.Module, ModelAccount] = weakref.WeakKeyDictionary()
        self._leader: weakref.ref[Any] | None = None
        self._last: tuple[float, float, float, float, int, int] | None = None

    def model(self, module: nn.Module) -> ModelAccount:
        """Return the account of a model, a new one if there is none."""
        account = self._by_module.get(module)
        if account is None:
            account = self._by_module[module] = ModelAccount(self.calls, refusal=self.whole_script)
            self.models.append(account)
        return account

    def refuse_all(self, reason: str) -> None:
        """Let every model be computed on one device from now on."""
        self.whole_script = reason
        for account in self.models:
            account.refuse(reason)

    def note(self, text: str) -> None:
        """Say this at the end, once."""
        if text not in self.notes:
            self.notes.append(text)

    def stepped(self, optimizer: Any) -> None:
        """An optimiser has stepped; the steps of the first one that is still alive are timed."""
        if self._leader is None or self._leader() is None:
            self._leader, self._last = weakref.ref(optimizer), None
        if self._leader() is not optimizer:
            return
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
                self.steps.append(Step(seconds, moving, waiting, loading, bool(split)))
                del self.steps[:-_KEPT]
        self._last = now

    def seconds_a_step(self, *, split: bool) -> float | None:
        """Return the usual time of a step that was computed in parts, or whole; ``None`` if there were none."""
        times = [step.seconds for step in self.steps if step.is_split is split]
        return statistics.median(times) if times else None

    def shares(self) -> Shares:
        """Return where the time of steps goes; of those in parts if there are any."""
        steps = [step for step in self.steps if step.is_split] or self.steps
        typical = statistics.median(step.seconds for step in steps) if steps else 0.0
        usual = [step for step in steps if step.seconds <= 3 * typical]  # not those with an evaluation between them
        total = sum(step.seconds for step in usual) or 1.0
        moving, waiting, loading = (
            (sum(column) / total for column in list(zip(*usual, strict=True))[1:4]) if usual else (0, 0, 0)
        )
        return Shares(max(0.0, 1 - moving - waiting - loading), moving, waiting, loading)
