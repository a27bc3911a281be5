"""What a user's own code sees of a running fit, and where it is called. Callbacks run on rank 0 only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from duoka.trainer.loss_meter import LossMeter
from duoka.trainer.metrics import Results

__all__ = ["Best", "Callback", "Callbacks", "State"]


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    value: float
    """Of the monitored result."""
    epoch: int
    """In which it was reached, counted from 1."""
    results: Results
    """All results of that evaluation."""


@dataclass
class State:
    """Where a fit is. The same object is handed to every callback."""

    model: nn.Module
    """The user's own model, without wrappers."""
    optimizer: Optimizer
    epochs: int
    """How many epochs were asked for."""
    tally: LossMeter = field(repr=False)
    epoch: int = 0
    """The current epoch, counted from 1; 0 before the first."""
    step: int = 0
    """Optimiser steps taken since training began, over all devices together."""
    samples: int = 0
    """Training samples taken since training began, over all devices together."""
    samples_in_epoch: int = 0
    """Those of them that belong to the current epoch."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One record an epoch, as in ``metrics.jsonl``."""
    validation: Results = field(default_factory=dict)
    """The latest evaluation."""
    best: Best | None = None
    """The best evaluation, where something is monitored."""
    bad_evaluations: int = 0
    """How many evaluations in a row were no better."""
    stopping: str = ""
    """Why training stops early; empty while it goes on."""

    @property
    def loss(self) -> float:
        """Mean training loss of the current epoch on rank 0's device; reading it waits for the device."""
        return self.tally.mean()

    def stop(self, reason: str = "a callback asked for it") -> None:
        """End training: after this step where a callback has ``on_step_end``, else after this epoch."""
        self.stopping = self.stopping or reason


class Callback:
    """Base class of callbacks: override what you need.

    Example:
        >>> class Patient(Callback):
        ...     def on_epoch_end(self, state):
        ...         if state.history[-1]["train_loss"] < 0.01:
        ...             state.stop("the loss is small enough")

    """

    def on_fit_start(self, state: State) -> None:
        """Called once, before the first step."""

    def on_step_end(self, state: State) -> None:
        """Called after every optimiser step; only where it is overridden does a step cost anything."""

    def on_evaluate(self, state: State) -> None:
        """Called after every evaluation; ``state.validation`` holds it."""

    def on_epoch_end(self, state: State) -> None:
        """Called after every epoch; ``state.history[-1]`` is its record."""

    def on_fit_end(self, state: State) -> None:
        """Called once, after the last epoch, when the best weights are in the model."""


@dataclass(frozen=True)
class Callbacks:
    """All callbacks of a fit; empty on the ranks that are not rank 0."""

    each: tuple[Callback, ...] = ()

    @classmethod
    def of(cls, callbacks: Iterable[Callback]) -> Callbacks:
        """Return these callbacks as one."""
        return cls(tuple(callbacks))

    @property
    def watch_steps(self) -> bool:
        """Whether any wants to be called after every step."""
        return any(type(one).on_step_end is not Callback.on_step_end for one in self.each)

    def call(self, event: str, state: State) -> None:
        """Call ``event`` of each, in their order."""
        for one in self.each:
            getattr(one, event)(state)


def fields_to_keep(state: State) -> dict[str, Any]:
    """Return what a checkpoint keeps of ``state``."""
    names = ("epoch", "step", "samples", "samples_in_epoch", "history", "validation", "bad_evaluations")
    kept = {name: getattr(state, name) for name in names}
    return {**kept, "best": None if state.best is None else dataclasses.asdict(state.best)}


def set_fields(state: State, kept: dict[str, Any]) -> None:
    """Continue from what ``fields_to_keep`` returned."""
    for name, value in kept.items():
        setattr(state, name, value)
    state.best = None if kept["best"] is None else Best(**kept["best"])
