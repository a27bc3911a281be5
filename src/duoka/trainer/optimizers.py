"""Optimisers and learning-rate schedules by name, warm-up before them, and when each advances."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR, ReduceLROnPlateau

from duoka.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from duoka.trainer.config import TrainerConfig

__all__ = ["OPTIMIZERS", "SCHEDULERS", "LRSchedule", "build_optimizer", "build_schedule"]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
}
"""Optimisers that can be named."""

FUSED = ("adam", "adamw")
"""Optimisers that torch has in one kernel, a fourth of the time of its default on CPUs, and which take no sparse gradients."""

IMPLEMENTATIONS = {"fused", "foreach", "capturable", "differentiable"}
"""Options that choose how an optimiser computes; whoever gives one has chosen."""

LENGTH_OPTIONS = {"cosine": {"T_max"}, "multistep": {"milestones"}, "onecycle": {"total_steps"}}
"""The schedules that can be named, each with the option that says its length where the run does not."""

SCHEDULERS = tuple(LENGTH_OPTIONS)
"""Schedules that can be named."""


def build_optimizer(config: TrainerConfig, module: nn.Module, lr_factor: float) -> Optimizer:
    """Return the optimiser that ``config`` asks for, on the parameters of ``module`` that are trained."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(
            "no parameter of the model has requires_grad, so there is nothing to train; let some be trained: "
            "model.requires_grad_()"
        )
    chosen = config.optimizer
    if isinstance(chosen, Optimizer):
        return _checked(chosen, trained)
    if not isinstance(chosen, (str, type)):
        return _checked(chosen(trained), trained)
    options = dict(config.optimizer_options)
    if config.lr is not None:
        options["lr"] = config.lr * lr_factor
    if config.weight_decay is not None:
        options["weight_decay"] = config.weight_decay
    kind: Any = OPTIMIZERS[chosen] if isinstance(chosen, str) else chosen
    if chosen in FUSED and not options.keys() & IMPLEMENTATIONS and _can_fuse(trained, config.precision):
        options["fused"] = True
    try:
        built: Optimizer = kind(trained, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer={chosen!r} with {options!r}: {error}") from error
    _check_closure(built)
    return built


def _can_fuse(trained: Iterable[nn.Parameter], precision: str) -> bool:
    """Whether torch's implementation in one kernel takes these parameters; a CPU's gradients are not scaled in it."""
    types = {parameter.device.type if parameter.is_floating_point() else "complex" for parameter in trained}
    return types <= {"cuda"} or (types <= {"cpu"} and precision != "fp16")


def _check_closure(optimizer: Optimizer) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer: {type(optimizer).__name__} evaluates the loss several times a step by a closure, which Trainer does "
            "not do; take another, or write the loop yourself: duoka.launch"
        )


def _checked(optimizer: object, trained: Iterable[nn.Parameter]) -> Optimizer:
    """Make sure that an optimiser of the user's own moves this model."""
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizer= returned {optimizer!r}, which is no torch.optim.Optimizer")
    _check_closure(optimizer)
    known = {id(parameter) for parameter in trained}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in known for parameter in held)
    if foreign:
        raise ConfigError(
            f"{foreign} of the optimiser's {len(held)} parameters are not trained parameters of this model; "
            "build it from the same model object: optimizer=torch.optim.AdamW(model.parameters())"
        )
    return optimizer


class LRSchedule:
    """Sets the learning rate: a linear warm-up of ``warmup_steps`` optimiser steps, then ``scheduler``.

    The warm-up rises from ``warmup_start``, a fraction of the full rate. The schedule is
    advanced once an optimiser step or once an epoch of the whole job, however many devices there are. ``length`` is how
    often it was planned to advance after the warm-up, ``None`` where the schedule does not depend on it.
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
        self._full = [float(group["lr"]) for group in optimizer.param_groups]
        self._set_warmup()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do after a step."""
        return self.warmup_steps == 0 and (self.scheduler is None or not self.every_step)

    def after_step(self) -> None:
        """Advance by one optimiser step."""
        self.steps += 1
        if self.steps <= self.warmup_steps:
            self._set_warmup()
        elif self.every_step and self.scheduler is not None and not self._is_at_its_end():
            self.scheduler.step()

    def _is_at_its_end(self) -> bool:
        """Whether a cycle has no step left: data may have more batches than they say, and torch would raise an error."""
        scheduler = self.scheduler
        return isinstance(scheduler, OneCycleLR) and scheduler.last_epoch + 1 >= scheduler.total_steps

    def after_epoch(self) -> None:
        """Advance by one epoch, unless the warm-up still lasts."""
        warm = self.warmup_steps == 0 or self.steps > self.warmup_steps
        plateau = isinstance(self.scheduler, ReduceLROnPlateau)
        if self.scheduler is not None and warm and not self.every_step and not plateau:
            self.scheduler.step()

    def after_evaluation(self, value: float | None) -> None:
        """Give ``value``, what is monitored or the loss, to a schedule that waits for a plateau."""
        if isinstance(self.scheduler, ReduceLROnPlateau) and value is not None:
            self.scheduler.step(value)

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` continues from."""
        inner = None if self.scheduler is None else self.scheduler.state_dict()
        return {
            "kind": self.kind,
            "steps": self.steps,
            "full": self._full,
            "scheduler": inner,
            "length": self.length,
        }

    @property
    def kind(self) -> str:
        """What the schedule is and when it advances; only one of the same kind can go on from its state."""
        unit = "step" if self.every_step else "epoch"
        return "no schedule" if self.scheduler is None else f"{type(self.scheduler).__name__} every {unit}"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, to the end that was planned then.

        Raises:
            CheckpointError: it is of another kind, or this run is longer than that.

        """
        theirs = state.get("kind", self.kind)  # files of before do not say
        if theirs != self.kind:
            raise CheckpointError(
                f"the checkpoint's learning rate has {theirs}, this Trainer's {self.kind}; resume with the scheduler and "
                "scheduler_interval of then, or begin a new run with its weights: duoka.load('model.safetensors', into=model)"
            )
        planned = state.get("length")
        if planned is not None and self.length is not None and self.length > planned:
            unit = "steps" if self.every_step else "epochs"
            raise CheckpointError(
                f"the checkpoint's schedule was planned for {planned} {unit} and would go on for {self.length} {unit} now, "
                "past its end; resume with the epochs, max_steps, batch size and devices that it was planned with, or begin "
                "a new run with its weights: duoka.load('model.safetensors', into=model)"
            )
        self.length = planned
        self.steps = state["steps"]
        self._full = list(state["full"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])

    def _set_warmup(self) -> None:
        if self.warmup_steps:
            done = min(1.0, (self.steps + 1) / self.warmup_steps)
            factor = self.warmup_start + (1.0 - self.warmup_start) * done
            for group, full in zip(self.optimizer.param_groups, self._full, strict=True):
                group["lr"] = full * factor


def build_schedule(
    config: TrainerConfig, optimizer: Optimizer, steps_per_epoch: int | None, lr_factor: float = 1.0
) -> LRSchedule:
    """Return the schedule that ``config`` asks for; ``lr_factor`` is what the rate was multiplied by for N devices.

    A rate that was multiplied is warmed up from what it was before, another from 0 (Goyal et al. 2017).

    Raises:
        ConfigError: the schedule needs the length of an epoch and the training data do not tell it.

    """
    if config.warmup_epochs and steps_per_epoch is None:
        raise ConfigError(
            f"warmup_epochs={config.warmup_epochs} needs training data of known length; give warmup_steps instead"
        )
    warmup = config.warmup_steps or math.ceil(config.warmup_epochs * (steps_per_epoch or 0))
    start = 1 / lr_factor if lr_factor > 1 else 0.0
    interval = config.scheduler_interval or ("step" if config.scheduler in ("onecycle", OneCycleLR) else "epoch")
    if config.scheduler is None:
        return LRSchedule(optimizer, None, interval, warmup, start)
    if not isinstance(config.scheduler, str):
        scheduler = _given(config, optimizer)
        if not isinstance(scheduler, LRScheduler):
            raise ConfigError(f"scheduler= returned {scheduler!r}, which is no torch LRScheduler")
        if isinstance(scheduler, ReduceLROnPlateau) and interval == "step":
            raise ConfigError(
                "scheduler_interval='step' with ReduceLROnPlateau: a plateau shows in the losses of epochs; leave it out"
            )
        return LRSchedule(optimizer, scheduler, interval, warmup, start)
    length = _length(config, interval, steps_per_epoch, warmup)
    scheduler = _named(config, optimizer, length)
    planned = None if LENGTH_OPTIONS[config.scheduler] & config.scheduler_options.keys() else length
    return LRSchedule(optimizer, scheduler, interval, warmup, start, planned)


def _given(config: TrainerConfig, optimizer: Optimizer) -> object:
    """Build a schedule by the class or the function that was given; only a class has options."""
    options = dict(config.scheduler_options)
    if not isinstance(config.scheduler, type):
        return config.scheduler(optimizer)
    try:
        return config.scheduler(optimizer, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"scheduler={config.scheduler.__name__} with scheduler_options={options!r}: {error}"
        ) from error


def _length(config: TrainerConfig, interval: str, steps_per_epoch: int | None, warmup: int) -> int:
    """Return how often the schedule will advance after the warm-up."""
    if interval == "epoch":
        return max(1, config.epochs - (warmup // steps_per_epoch if steps_per_epoch else 0))
    if steps_per_epoch is None and config.max_steps is None:
        raise ConfigError(
            f"scheduler={config.scheduler!r} advances every step and needs to know how many there will be; "
            "the training data have no length: give max_steps, or scheduler_interval='epoch'"
        )
    planned = config.epochs * steps_per_epoch if steps_per_epoch is not None else config.max_steps
    total = min(value for value in (planned, config.max_steps) if value is not None)
    return max(1, total - warmup)


def _named(config: TrainerConfig, optimizer: Optimizer, length: int) -> LRScheduler:
    """Build a schedule by its name; ``length`` is how often it advances."""
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
