"""Callbacks of a fit, which run on rank 0 only, and the state that they see."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from duoka.trainer.loss_meter import LossMeter
from duoka.trainer.metrics import Results

TIME_IS_OVER = "max_hours is over"
"""Reason of a stop at the time limit."""


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    value: float
    """Value of the monitored result."""
    epoch: int
    """Epoch of this evaluation, from 1."""
    results: Results
    """All results of this evaluation."""


@dataclass
class State:
    """Progress of a fit; every callback gets the same object."""

    model: nn.Module
    """The user's model, without wrappers."""
    optimizer: Optimizer
    epochs: int
    """Number of epochs requested."""
    loss_meter: LossMeter = field(repr=False)
    epoch: int = 0
    """Current epoch, from 1; 0 before the first."""
    step: int = 0
    """Optimizer steps since training began."""
    samples: int = 0
    """Training samples since training began, over all devices."""
    samples_in_epoch: int = 0
    """Training samples of the current epoch, over all devices."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One record per epoch, as in ``metrics.jsonl``."""
    validation: Results = field(default_factory=dict)
    """Results of the latest evaluation."""
    best: Best | None = None
    """The best evaluation; ``None`` without ``monitor``."""
    evaluations_without_improvement: int = 0
    """Number of consecutive evaluations, up to the latest, that were not better."""
    stop_reason: str = ""
    """Reason to stop early; empty while training continues."""

    @property
    def loss(self) -> float:
        """Mean training loss of the current epoch on rank 0's device; reading it waits for the device."""
        return self.loss_meter.mean()

    def stop(self, reason: str = "a callback requested it") -> None:
        """End training: after this step if a callback overrides ``on_step_end``, else after this epoch."""
        self.stop_reason = self.stop_reason or reason

    def checkpoint_fields(self) -> dict[str, Any]:
        """Return the fields that a checkpoint holds."""
        names = ("epoch", "step", "samples", "samples_in_epoch", "history", "validation")
        saved = {name: getattr(self, name) for name in (*names, "evaluations_without_improvement")}
        return {**saved, "best": None if self.best is None else dataclasses.asdict(self.best)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from what ``checkpoint_fields`` returned."""
        for name in self.checkpoint_fields():
            setattr(self, name, saved[name])
        best = saved["best"]
        self.best = None if best is None else Best(best["value"], best["epoch"], best["results"])


class Callback:
    """Base class of callbacks: override the methods that you need.

    Example:
        >>> class StopAtSmallLoss(Callback):
        ...     def on_epoch_end(self, state):
        ...         if state.history[-1]["train_loss"] < 0.01:
        ...             state.stop("the loss is small enough")

    """

    def on_fit_start(self, state: State) -> None:
        """Called once, before the first step."""

    def on_step_end(self, state: State) -> None:
        """Called after every optimizer step; has no cost unless overridden."""

    def on_evaluate(self, state: State) -> None:
        """Called after every evaluation; ``state.validation`` has its results."""

    def on_epoch_end(self, state: State) -> None:
        """Called after every epoch; ``state.history[-1]`` is its record."""

    def on_fit_end(self, state: State) -> None:
        """Called once, after the last epoch, when the model has the best weights."""
