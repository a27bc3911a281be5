"""Learning-rate schedule of a run: scaling for several devices, linear warm-up, then a torch scheduler."""

import math
from dataclasses import dataclass
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


@dataclass
class LRSchedule:
    """Linear warm-up over ``warmup_steps`` optimizer steps, then ``scheduler``; the same on any number of devices."""

    optimizer: Optimizer
    scheduler: LRScheduler | None = None
    interval: str = "epoch"
    """When the scheduler advances: every ``"step"`` or ``"epoch"``."""
    warmup_steps: int = 0
    warmup_start: float = 0.0
    """Fraction of the full rate from which the warm-up starts."""
    length: int | None = None
    """Number of advances that the scheduler was planned for; ``None`` if it does not depend on that."""

    def __post_init__(self) -> None:
        self.every_step = self.interval == "step"
        self.steps = 0
        self.peak_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.changes_within_epoch = self.warmup_steps > 0 or (self.scheduler is not None and self.every_step)
        self.signature = (
            "no schedule" if self.scheduler is None else f"{type(self.scheduler).__name__} every {self.interval}"
        )
        """The scheduler's class and interval; both must match to resume."""
        self._set_warmup()

    def after_step(self) -> None:
        """Advance by one optimizer step."""
        self.steps += 1
        scheduler = self.scheduler  # a cycle may have no step left: data may yield more batches than their length says
        has_ended = isinstance(scheduler, OneCycleLR) and scheduler.last_epoch + 1 >= scheduler.total_steps
        if self.steps <= self.warmup_steps:
            self._set_warmup()
        elif self.every_step and scheduler is not None and not has_ended:
            scheduler.step()

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
            unit = f"{self.interval}s"
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
    config: TrainerConfig, optimizer: Optimizer, steps_per_epoch: int | None, lr_factor: float
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
    is_named = isinstance(config.scheduler, str)
    length = _length(config, interval, steps_per_epoch, warmup) if is_named else 0
    has_planned_length = is_named and SCHEDULERS[config.scheduler] not in config.scheduler_options
    scheduler = None if config.scheduler is None else _build_scheduler(config, optimizer, interval, length)
    return LRSchedule(optimizer, scheduler, interval, warmup, start, length if has_planned_length else None)


def _build_scheduler(config: TrainerConfig, optimizer: Optimizer, interval: str, length: int) -> LRScheduler:
    """Build a scheduler by name with ``length`` advances, or with the user's class or function."""
    chosen, options = config.scheduler, dict(config.scheduler_options)
    if isinstance(chosen, (str, type)):  # a function takes no options
        try:
            scheduler = _from_name_or_class(chosen, length, optimizer, options)
        except (TypeError, ValueError) as error:
            shown = getattr(chosen, "__name__", repr(chosen))
            raise ConfigError(f"scheduler={shown} with scheduler_options={options!r}: {error}") from error
    else:
        scheduler = chosen(optimizer)
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


def _from_name_or_class(chosen: Any, length: int, optimizer: Optimizer, options: dict[str, Any]) -> LRScheduler:
    if isinstance(chosen, type):
        return chosen(optimizer, **options)  # type: ignore[no-any-return]
    if chosen == "cosine":
        return CosineAnnealingLR(optimizer, **{"T_max": length, **options})
    if chosen == "multistep":
        milestones = sorted({max(1, length // 2), max(1, length * 3 // 4)})
        return MultiStepLR(optimizer, **{"milestones": milestones, **options})
    highest = [float(group["lr"]) for group in optimizer.param_groups]
    return OneCycleLR(optimizer, **{"max_lr": highest, "total_steps": length, **options})
