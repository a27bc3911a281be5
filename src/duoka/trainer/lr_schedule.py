"""Learning-rate schedule of a run: scaling for several devices, linear warm-up, then a torch scheduler."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR, ReduceLROnPlateau

from duoka.errors import CheckpointError, ConfigError
from duoka.scaling import LearningRate
from duoka.trainer.config import SCHEDULERS, TrainerConfig


def scaled_learning_rate(config: TrainerConfig, replicas: int) -> LearningRate:
    """Return the learning rate for ``replicas`` devices, with its rule and warm-up."""
    growth = float(replicas) if config.batch_size_means == "per_device" else 1.0
    base = config.lr if config.lr is not None else 1.0
    return LearningRate(base, growth, config.lr_scaling, config.warmup_epochs, config.warmup_steps)


class LRSchedule:
    """Linear warm-up over ``warmup_steps`` optimizer steps, then ``scheduler``.

    The warm-up starts from the fraction ``warmup_start`` of the full rate. The scheduler advances once
    per optimizer step or once per epoch, on any number of devices. ``length`` is the number of advances
    that it was planned for; ``None`` if the scheduler does not depend on it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scheduler: LRScheduler | None = None,
        interval: str = "epoch",
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
        length: int | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.every_step = interval == "step"
        self.warmup_steps = warmup_steps
        self.warmup_start = warmup_start
        self.length = length
        self.steps = 0
        self.peak_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._set_warmup()

    @property
    def is_constant_within_epoch(self) -> bool:
        """Whether ``after_step`` never changes the learning rate."""
        return self.warmup_steps == 0 and (self.scheduler is None or not self.every_step)

    def after_step(self) -> None:
        """Advance by one optimizer step."""
        self.steps += 1
        if self.steps <= self.warmup_steps:
            self._set_warmup()
        elif self.every_step and self.scheduler is not None and not self._has_ended():
            self.scheduler.step()

    def _has_ended(self) -> bool:
        """Return whether a cycle has no step left: data may yield more batches than their length says."""
        scheduler = self.scheduler
        return isinstance(scheduler, OneCycleLR) and scheduler.last_epoch + 1 >= scheduler.total_steps

    def after_epoch(self) -> None:
        """Advance by one epoch, after the warm-up."""
        is_warm = self.warmup_steps == 0 or self.steps > self.warmup_steps
        is_plateau = isinstance(self.scheduler, ReduceLROnPlateau)
        if self.scheduler is not None and is_warm and not self.every_step and not is_plateau:
            self.scheduler.step()

    def after_evaluation(self, value: float | None) -> None:
        """Pass the monitored value or the loss to ``ReduceLROnPlateau``."""
        if isinstance(self.scheduler, ReduceLROnPlateau) and value is not None:
            self.scheduler.step(value)

    @property
    def signature(self) -> str:
        """The scheduler's class and interval; both must match to resume."""
        unit = "step" if self.every_step else "epoch"
        return "no schedule" if self.scheduler is None else f"{type(self.scheduler).__name__} every {unit}"

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "signature": self.signature,
            "steps": self.steps,
            "peak_lrs": self.peak_lrs,
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "length": self.length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, up to the length that was planned originally.

        Raises:
            CheckpointError: the signature differs, or this run is longer than planned.

        """
        saved, planned = state["signature"], state["length"]
        if saved != self.signature:
            raise CheckpointError(
                f"the checkpoint's learning rate has {saved}, this Trainer's has {self.signature}; resume with the same "
                "scheduler and scheduler_interval, or begin a new run with its weights: "
                "duoka.load('model.safetensors', into=model)"
            )
        if planned is not None and self.length is not None and self.length > planned:
            unit = "steps" if self.every_step else "epochs"
            raise CheckpointError(
                f"the checkpoint's schedule was planned for {planned} {unit}, and this run needs {self.length} {unit}; resume "
                "with the same epochs, max_steps, batch size and devices, or begin a new run with its weights: "
                "duoka.load('model.safetensors', into=model)"
            )
        self.length = planned
        self.steps = state["steps"]
        self.peak_lrs = list(state["peak_lrs"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])

    def _set_warmup(self) -> None:
        if self.warmup_steps:
            done = min(1.0, (self.steps + 1) / self.warmup_steps)
            factor = self.warmup_start + (1.0 - self.warmup_start) * done
            for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
                group["lr"] = peak * factor


def build_schedule(
    config: TrainerConfig, optimizer: Optimizer, steps_per_epoch: int | None, lr_factor: float = 1.0
) -> LRSchedule:
    """Return the schedule of ``config``; ``lr_factor`` is the learning rate's growth for several devices.

    The warm-up starts from the rate before scaling if that grew, else from 0 (Goyal et al. 2017).

    Raises:
        ConfigError: the schedule needs the length of an epoch, which the training data do not have.

    """
    if config.warmup_epochs and steps_per_epoch is None:
        raise ConfigError(
            f"warmup_epochs={config.warmup_epochs} needs training data of known length; give warmup_steps instead"
        )
    warmup = config.warmup_steps or math.ceil(config.warmup_epochs * (steps_per_epoch or 0))
    start = 1 / lr_factor if lr_factor > 1 else 0.0
    interval = config.scheduler_interval or ("step" if config.scheduler in ("onecycle", OneCycleLR) else "epoch")
    scheduler, planned = None, None
    if isinstance(config.scheduler, str):
        length = _length(config, interval, steps_per_epoch, warmup)
        scheduler = _from_name(config, optimizer, length)
        planned = None if SCHEDULERS[config.scheduler] in config.scheduler_options else length
    elif config.scheduler is not None:
        scheduler = _from_callable(config, optimizer, interval)
    return LRSchedule(optimizer, scheduler, interval, warmup, start, planned)


def _from_callable(config: TrainerConfig, optimizer: Optimizer, interval: str) -> LRScheduler:
    """Build a scheduler with the user's class or function; only a class takes options."""
    options = dict(config.scheduler_options)
    if isinstance(config.scheduler, type):
        try:
            scheduler = config.scheduler(optimizer, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"scheduler={config.scheduler.__name__} with scheduler_options={options!r}: {error}"
            ) from error
    else:
        scheduler = config.scheduler(optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise ConfigError(f"the function scheduler returned {scheduler!r}; it must return a torch LRScheduler")
    if isinstance(scheduler, ReduceLROnPlateau) and interval == "step":
        raise ConfigError(
            "scheduler_interval='step' is not possible with ReduceLROnPlateau, which compares epochs; leave it out"
        )
    return scheduler


def _length(config: TrainerConfig, interval: str, steps_per_epoch: int | None, warmup: int) -> int:
    """Return the number of advances after the warm-up."""
    if interval == "epoch":
        return max(1, config.epochs - (warmup // steps_per_epoch if steps_per_epoch else 0))
    if steps_per_epoch is None and config.max_steps is None:
        raise ConfigError(
            f"scheduler={config.scheduler!r} needs the number of steps, and the training data have no length; "
            "give max_steps, or scheduler_interval='epoch'"
        )
    planned = config.epochs * steps_per_epoch if steps_per_epoch is not None else config.max_steps
    total = min(value for value in (planned, config.max_steps) if value is not None)
    return max(1, total - warmup)


def _from_name(config: TrainerConfig, optimizer: Optimizer, length: int) -> LRScheduler:
    """Build a scheduler by name; ``length`` is the number of advances."""
    options = dict(config.scheduler_options)
    try:
        if config.scheduler == "cosine":
            return CosineAnnealingLR(optimizer, **{"T_max": length, **options})
        if config.scheduler == "multistep":
            milestones = sorted({max(1, length // 2), max(1, length * 3 // 4)})
            return MultiStepLR(optimizer, **{"milestones": milestones, **options})
        highest = [float(group["lr"]) for group in optimizer.param_groups]
        return OneCycleLR(optimizer, **{"max_lr": highest, "total_steps": length, **options})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"scheduler={config.scheduler!r} with {options!r}: {error}") from error
