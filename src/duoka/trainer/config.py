"""The options of a training run, each with its meaning and unit, checked when they are put together."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from duoka.errors import ConfigError
from duoka.strategy import NAMES as STRATEGIES
from duoka.trainer.optimizers import OPTIMIZERS, SCHEDULERS

__all__ = ["TrainerConfig"]

PRECISIONS = ("fp32", "bf16", "fp16")
BATCHES = ("per_device", "global")
LR_SCALINGS = ("none", "linear", "sqrt")

KINDS: tuple[tuple[str, tuple[type, ...], tuple[str, ...]], ...] = (
    ("True or False", (bool,), ("use_multi_gpu", "sync_batchnorm", "compile", "verbose")),
    ("True, False or None", (bool, NoneType), ("find_unused_parameters", "tensorboard")),
    ("a name or None", (str, NoneType), ("monitor", "target_key")),
    ("the path of a folder or None", (str, Path, NoneType), ("out_dir",)),
    ("True, False, 'auto' or a path", (bool, str, Path), ("resume",)),
    ("a dict of names and values", (Mapping,), ("ddp_options", "optimizer_options", "scheduler_options")),
)
"""What an option has to be, the types, and the options."""

RENAMED = {
    "batch": "batch_size_means",
    "accumulate": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "eval_step": "eval_every_epochs",
    "target": "target_key",
    "predict": "predict_fn",
}
"""Names that other programs, or earlier versions, give an option, and the name that it has here."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How a model is trained. Every field is a keyword argument of ``Trainer``.

    Options:
        device: What to compute on, in the device grammar: ``"auto"``, ``"cuda"`` (all GPUs), ``"0,1"``, ``"cpu"``,
            ``"cpu:2"``.
        devices: Another name of ``device``; give one of the two.
        use_multi_gpu: Whether to use every device that ``device`` names; ``False`` takes the first one only. In a job
            of several processes that torchrun or Slurm started, ``False`` is refused.
        strategy: How devices are kept together: ``"auto"`` (DDP where there are several), ``"ddp"``, ``"single"``,
            ``"dp"``.
        sync_batchnorm: Whether batch norm takes its statistics over all devices (accelerators only) instead of its
            own part. Where a global batch has fewer samples than there are devices, those without one take part with
            a copy of a sample, which enters these statistics though not the loss: every device has to answer.
        find_unused_parameters: Whether some parameters take no part in a step's loss; ``None`` finds out with one
            forward and backward of a copy of the model and loss before the first step, where there are several ranks.
            Give ``True`` where the unused parameters differ from step to step, ``False`` to leave the trial out.
        ddp_options: Passed to ``DistributedDataParallel`` as they are: ``static_graph``, ``bucket_cap_mb``, ...
        compile: Whether ``torch.compile`` compiles the model together with its loss.
        precision: Number format of forward and backward: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast, with loss
            scaling).
        epochs: How many times the training data are gone through.
        max_steps: Stop after this many optimiser steps, if that is earlier.
        batch_size_means: What the loader's batch size means: ``"per_device"`` (N devices take N batches a step) or ``"global"``
            (one, split).
        gradient_accumulation_steps: How many global batches make one optimiser step.
        optimizer: A name, a class, a function from parameters to an optimiser, or an optimiser of the model's own
            parameters.
        lr: Learning rate for one device's batch; ``None`` leaves the optimiser's own default.
        weight_decay: Weight decay; ``None`` leaves the optimiser's own default.
        optimizer_options: Further arguments of a named optimiser or optimiser class, such as ``{"momentum": 0.9}``.
        lr_scaling: How ``lr`` grows with the number of devices: ``"none"``, ``"linear"`` or ``"sqrt"``.
        scheduler: ``"cosine"``, ``"multistep"``, ``"onecycle"``, ``None``, a class, or a function from an optimiser
            to a schedule. ``ReduceLROnPlateau`` watches what is monitored, else the evaluation's loss, without
            ``eval_data`` the training loss.
        scheduler_options: Further arguments of a named schedule or schedule class, such as ``{"milestones": [30, 40],
            "gamma": 0.1}``.
        scheduler_interval: When the schedule advances: every ``"step"`` or ``"epoch"``; ``None`` is a step for
            onecycle, else an epoch.
        warmup_epochs: Epochs, or a fraction of one, in which the learning rate rises linearly from 0 before the
            schedule begins.
        warmup_steps: The same in optimiser steps, for data of unknown length; give one of the two.
        max_grad_norm: Largest norm of the gradient over all parameters and ranks; a longer one is shortened to it.
        eval_every_epochs: Epochs from one evaluation to the next; the last epoch is always evaluated.
        monitor: Name of the evaluation result that decides which weights are best; ``None`` keeps the last weights.
        monitor_mode: Whether a lower (``"min"``) or higher (``"max"``) value is better; ``"auto"`` asks the metric,
            then the words of its name, and refuses to guess where neither says it.
        early_stop_patience: Stop after this many evaluations in a row without a better one; monitors ``"loss"`` if
            nothing else is named.
        target_key: Key of the target where batches are dicts; ``None`` looks for labels, label, targets, target, y.
        predict_fn: What predicts: the name of a method of the model that takes a batch, or a function ``(model,
            batch)``.
        seed: Decides the order of samples, random augmentation and, with the rank, the random masks.
        out_dir: Folder for metrics, curves, log, weights and checkpoints; ``None`` writes nothing. A run that begins
            anew in the folder of another removes the other's checkpoint and weights.
        resume: ``True`` continues from ``out_dir``'s checkpoint, ``"auto"`` does so if there is one; or the path of
            a checkpoint, or of the folder of a run that has one. Model, optimiser and schedule have to be those of
            then; a checkpoint that is refused leaves ``out_dir`` as it was.
        checkpoint_every_steps: Also write a checkpoint after every so many optimiser steps, not only after each
            epoch.
        tensorboard: Whether ``out_dir`` gets TensorBoard events; ``None`` writes them where TensorBoard is installed.
        verbose: Whether to print what is found and done.

    Raises:
        ConfigError: a value that an option cannot have.

    """

    device: Any = "auto"
    devices: InitVar[Any] = None
    use_multi_gpu: bool = True
    strategy: str = "auto"
    sync_batchnorm: bool = False
    find_unused_parameters: bool | None = None
    ddp_options: Mapping[str, Any] = field(default_factory=dict)
    compile: bool = False
    precision: str = "fp32"

    epochs: int = 10
    max_steps: int | None = None
    batch_size_means: str = "per_device"
    gradient_accumulation_steps: int = 1

    optimizer: Any = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    lr_scaling: str = "none"
    scheduler: Any = None
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    scheduler_interval: str | None = None
    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    max_grad_norm: float | None = None

    eval_every_epochs: int = 1
    monitor: str | None = None
    monitor_mode: str = "auto"
    early_stop_patience: int | None = None

    target_key: str | None = None
    predict_fn: Any = None

    seed: int = 0
    out_dir: str | Path | None = None
    resume: bool | str | Path = False
    checkpoint_every_steps: int | None = None
    tensorboard: bool | None = None
    verbose: bool = True

    def __post_init__(self, devices: Any) -> None:
        if devices is not None:
            if self.device != "auto":
                raise ConfigError(f"device={self.device!r} and devices={devices!r} are one option; give one of them")
            object.__setattr__(self, "device", devices)
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, item.name, value.item())
        self._check_kinds()
        self._check_choices()
        self._check_numbers()
        self._check_combinations()

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> TrainerConfig:
        """Return the configuration of these ``options``, and say which name was meant where one does not exist."""
        names = [*(item.name for item in dataclasses.fields(cls)), "devices"]
        for option in options:
            if option not in names:
                close = [RENAMED[option]] if option in RENAMED else difflib.get_close_matches(option, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"options are {', '.join(names)}"
                raise ConfigError(f"Trainer has no option {option!r}; {hint}")
        return cls(**options)

    def _check_kinds(self) -> None:
        for words, kinds, names in KINDS:
            for name in names:
                if not isinstance(value := getattr(self, name), kinds):
                    raise ConfigError(f"{name}={value!r} has to be {words}")

    def _check_choices(self) -> None:
        _one_of("strategy", self.strategy, STRATEGIES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("batch_size_means", self.batch_size_means, BATCHES)
        _one_of("lr_scaling", self.lr_scaling, LR_SCALINGS)
        _one_of("monitor_mode", self.monitor_mode, ("auto", "min", "max"))
        if self.scheduler_interval is not None:
            _one_of("scheduler_interval", self.scheduler_interval, ("step", "epoch"))
        if isinstance(self.optimizer, str):
            _one_of("optimizer", self.optimizer, tuple(OPTIMIZERS))
        elif not callable(self.optimizer) and not isinstance(self.optimizer, Optimizer):
            raise ConfigError(
                f"optimizer={self.optimizer!r} is neither a name ({', '.join(OPTIMIZERS)}), a class, "
                "a function from parameters to an optimiser, nor an optimiser"
            )
        if isinstance(self.scheduler, LRScheduler):
            raise ConfigError(
                "scheduler is a schedule that was already built, which cannot follow the optimiser of each device; give "
                f"what builds it: scheduler=lambda optimizer: {type(self.scheduler).__name__}(optimizer, ...)"
            )
        if isinstance(self.scheduler, str):
            _one_of("scheduler", self.scheduler, SCHEDULERS)
        elif self.scheduler is not None and not callable(self.scheduler):
            raise ConfigError(
                f"scheduler={self.scheduler!r} is neither a name ({', '.join(SCHEDULERS)}), a class nor a function"
            )

    def _check_numbers(self) -> None:
        for name in ("epochs", "gradient_accumulation_steps", "eval_every_epochs"):
            _whole(name, getattr(self, name), 1)
        for name in ("max_steps", "early_stop_patience", "checkpoint_every_steps"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        _whole("warmup_steps", self.warmup_steps, 0)
        _whole("seed", self.seed, 0)
        for name, positive in (
            ("lr", True),
            ("weight_decay", False),
            ("max_grad_norm", True),
            ("warmup_epochs", False),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0 or (positive and value == 0):
                least = "above 0" if positive else "0 or more"
                raise ConfigError(f"{name}={value!r} has to be a number {least}")

    def _check_combinations(self) -> None:
        if self.tensorboard and self.out_dir is None:
            raise ConfigError("tensorboard=True needs out_dir, the folder that gets the events")
        if self.compile and self.strategy == "dp":
            raise ConfigError(
                "compile=True with strategy='dp': nn.DataParallel's replicas cannot be compiled; use strategy='ddp'"
            )
        built = isinstance(self.optimizer, Optimizer) or (
            callable(self.optimizer) and not isinstance(self.optimizer, (str, type))
        )
        if built:
            for name in ("lr", "weight_decay", "optimizer_options"):
                if getattr(self, name):
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} has no effect on an optimiser of your own; set it there"
                    )
            if self.lr_scaling != "none":
                raise ConfigError(
                    f"lr_scaling={self.lr_scaling!r} scales the lr that Trainer is given; your optimiser brings its own: "
                    "give optimizer a name or a class, or scale its lr yourself"
                )
        if self.lr_scaling != "none" and self.lr is None:
            raise ConfigError(f"lr_scaling={self.lr_scaling!r} needs lr, the rate for one device's batch")
        if self.warmup_steps and self.warmup_epochs:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} and warmup_epochs={self.warmup_epochs} say the same thing; give one"
            )
        if self.scheduler_options and not isinstance(self.scheduler, (str, type)):
            raise ConfigError(
                f"scheduler_options={dict(self.scheduler_options)!r} belong to a named schedule or a class; "
                f"scheduler={self.scheduler!r}"
            )
        if self.out_dir is None and (self.checkpoint_every_steps or self.resume is True or self.resume == "auto"):
            option = "checkpoint_every_steps" if self.checkpoint_every_steps else "resume"
            raise ConfigError(f"{option}={getattr(self, option)!r} needs out_dir, where checkpoints lie")

    def plain(self) -> dict[str, Any]:
        """Return the options as text and numbers, for a file that people read."""
        return {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(self)}


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}{hint}")


def _whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r} has to be a whole number, {least} or more")


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return getattr(value, "__qualname__", None) or type(value).__qualname__
