"""Options of a training run, checked when ``TrainerConfig`` is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import optim
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from duoka.devices.spec import reconcile
from duoka.errors import ConfigError
from duoka.strategy.select import StrategyName
from duoka.utils.text import did_you_mean
from duoka.utils.validation import check_choice, check_field_types, check_integer, check_number, invalid_option

OPTIMIZERS: dict[str, type[Optimizer]] = {
    kind.__name__.lower(): kind
    for kind in (optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop, optim.Adagrad, optim.NAdam, optim.RAdam)
}
"""Optimizers by name: adam, adamw, sgd, rmsprop, ..."""

SCHEDULERS = {"cosine": "T_max", "multistep": "milestones", "onecycle": "total_steps"}
"""Learning-rate schedules by name, each with its option that replaces the length of the run."""

RENAMED = {
    "batch": "batch_size_means",
    "accumulate": "gradient_accumulation_steps",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "eval_step": "eval_every_epochs",
    "target": "target_key",
    "predict": "predict_fn",
}
"""Names that other programs or earlier versions give an option, and its name here."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Options of ``Trainer``, which takes every field as a keyword argument.

    Options:
        device: Devices to compute on: ``"auto"``, ``"cuda"`` (all GPUs), ``"0,1"``, ``"cpu"``, ``"cpu:2"``, ...
        devices: Alias of ``device``.
        use_multi_gpu: ``False`` uses only the first device that ``device`` names. A job of several processes, started
            by torchrun or Slurm, refuses ``False``.
        strategy: How devices stay in step: ``"auto"`` (DDP for several devices), ``"ddp"``, ``"single"``, ``"dp"``.
        sync_batchnorm: Whether batch norm computes its statistics over all devices (accelerators only) instead of
            over the local batch. A rank without samples joins with a copy of one sample, which enters the statistics
            but not the loss.
        find_unused_parameters: Whether a step may leave parameters without gradient. ``None``: the first step finds
            out. Give ``True`` if the unused parameters differ from step to step.
        ddp_options: Arguments of ``DistributedDataParallel``: ``static_graph``, ``bucket_cap_mb``, ...
        compile: Whether ``torch.compile`` compiles the model together with its loss.
        precision: Number format of forward and backward: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast, with loss
            scaling).
        epochs: Number of passes over the training data.
        max_steps: Largest number of optimizer steps; training ends at this or after ``epochs``, whichever comes first.
        batch_size_means: Meaning of the loader's batch size: ``"per_device"`` (a step on N devices takes N batches) or
            ``"global"`` (each batch is split over the devices).
        gradient_accumulation_steps: Number of global batches per optimizer step.
        micro_batch_size: Largest number of samples that a device computes at once: a larger part of a batch is computed in
            parts, whose gradients add up to the same step. ``"fit"`` finds the largest that fits in memory by a trial on
            all devices. Batch norm and batch losses see the parts.
        on_out_of_memory: ``"raise"``, or ``"halve"``: all devices halve their parts, repeat the step and go on. Gradients are
            then exchanged after a step's computation, not during it.
        optimizer: A name, a class, a function from parameters to an optimizer, or an optimizer of the model's
            parameters.
        lr: Learning rate for the batch of one device; ``None`` is the optimizer's default.
        weight_decay: Weight decay; ``None`` is the optimizer's default.
        optimizer_options: Other arguments of an optimizer given by name or class, such as ``{"momentum": 0.9}``.
        lr_scaling: Growth of ``lr`` with the number of devices: ``"none"``, ``"linear"`` or ``"sqrt"``.
        scheduler: ``"cosine"``, ``"multistep"``, ``"onecycle"``, ``None``, a class, or a function from an optimizer to
            a schedule. ``ReduceLROnPlateau`` gets the monitored result, else the evaluation loss, without
            ``eval_data`` the training loss.
        scheduler_options: Arguments of a schedule given by name or class, such as ``{"milestones": [30, 40]}``.
        scheduler_interval: When the schedule advances: every ``"step"`` or ``"epoch"``; ``None`` is the step for
            onecycle, else the epoch.
        warmup_epochs: Length, in epochs or fractions, of a linear warm-up of the learning rate before the schedule.
        warmup_steps: The same in optimizer steps, for data of unknown length; give one of the two.
        max_grad_norm: Limit of the gradient's total norm over all parameters and ranks; a larger gradient is scaled.
        eval_every_epochs: Number of epochs between evaluations; the last epoch always has one.
        monitor: Name of the evaluation result that selects the best weights; ``None`` keeps the last weights.
        monitor_mode: Whether a lower (``"min"``) or higher (``"max"``) value is better; ``"auto"`` takes the
            metric's own direction, else that of the words in its name, and raises an error if neither decides.
        early_stop_patience: Stop after this number of consecutive evaluations without improvement; implies
            ``monitor="loss"`` if ``monitor`` is not given.
        target_key: Key of the target in dict batches; ``None`` tries labels, label, targets, target, y.
        predict_fn: Source of predictions: a method of the model that takes a batch, by name, or a function
            ``(model, batch)``.
        seed: Seed of the sample order and random augmentation, and, together with the rank, of dropout masks.
        out_dir: Folder for metrics, curves, log, weights and checkpoints; ``None`` writes nothing. One program at a
            time trains there. A new run in the folder of another run moves that run's files into a subfolder.
        resume: ``True`` continues from the checkpoint in ``out_dir``; ``"auto"`` does so if there is one; or the path
            of a checkpoint or of a run's folder. Model, optimizer and schedule must be the same. If the checkpoint
            does not match, ``out_dir`` stays unchanged.
        checkpoint_every_steps: Also write a checkpoint every so many optimizer steps, not only after each epoch.
        checkpoint_minutes: Also write a checkpoint, after a step, when the last one is so many minutes old; ``None`` does
            not. Without ``out_dir`` it has no effect.
        keep_checkpoints: Number of checkpoints that stay on disk: the last and those before it. Each holds the best
            weights as well. If the last is damaged, ``resume`` continues from the one before, with a warning.
        max_hours: Time limit: training stops, evaluates and saves, so that ``fit`` returns within so many hours if
            evaluation and checkpoint take as long as before. ``resume`` continues later.
        on_nonfinite_loss: ``"stop"`` ends training with ``duoka.errors.DivergenceError`` when the loss becomes NaN or
            infinite, or before a write if a trained parameter is; nothing is saved after that. ``"warn"`` goes on.
            With ``precision="fp16"`` training goes on, as loss scaling skips such steps.
        find_nonfinite_layer: Whether the error names the first layer with such an output; this slows every step.
        tensorboard: Whether to write TensorBoard events into ``out_dir``; ``None`` does if TensorBoard is installed.
        verbose: Whether to print progress.

    Raises:
        ConfigError: an option has a value that is not valid.

    """

    device: Any = "auto"
    devices: InitVar[Any] = None
    use_multi_gpu: bool = True
    strategy: StrategyName = "auto"
    sync_batchnorm: bool = False
    find_unused_parameters: bool | None = None
    ddp_options: Mapping[str, Any] = field(default_factory=dict)
    compile: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    epochs: int = 10
    max_steps: int | None = None
    batch_size_means: Literal["per_device", "global"] = "per_device"
    gradient_accumulation_steps: int = 1
    micro_batch_size: int | Literal["fit"] | None = None
    on_out_of_memory: Literal["raise", "halve"] = "raise"

    optimizer: Any = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    scheduler: Any = None
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    scheduler_interval: Literal["step", "epoch"] | None = None
    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    max_grad_norm: float | None = None

    eval_every_epochs: int = 1
    monitor: str | None = None
    monitor_mode: Literal["auto", "min", "max"] = "auto"
    early_stop_patience: int | None = None

    target_key: str | None = None
    predict_fn: Any = None

    seed: int = 0
    out_dir: str | Path | None = None
    resume: bool | str | Path = False
    checkpoint_every_steps: int | None = None
    checkpoint_minutes: float | None = 10.0
    keep_checkpoints: int = 2
    max_hours: float | None = None
    on_nonfinite_loss: Literal["stop", "warn"] = "stop"
    find_nonfinite_layer: bool = False
    tensorboard: bool | None = None
    verbose: bool = True

    def __post_init__(self, devices: Any) -> None:
        device = reconcile(None if isinstance(self.device, str) and self.device == "auto" else self.device, devices)
        object.__setattr__(self, "device", device)
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, item.name, value.item())
        check_field_types(self)
        self._check_optimizer_and_scheduler()
        self._check_numbers()
        self._check_micro_batches()
        self._check_combinations()

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> TrainerConfig:
        """Return the configuration of ``options``; an unknown name raises an error that suggests the right one."""
        names = [*(item.name for item in dataclasses.fields(cls)), "devices"]
        for option in options:
            if option not in names:
                meant = f"did you mean {RENAMED[option]!r}?" if option in RENAMED else did_you_mean(option, names)
                raise ConfigError(f"Trainer has no option {option!r}; {meant or 'it has ' + ', '.join(names)}")
        return cls(**options)

    def _check_optimizer_and_scheduler(self) -> None:
        if isinstance(self.optimizer, str):
            check_choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        elif not callable(self.optimizer) and not isinstance(self.optimizer, Optimizer):
            expected = f"a name ({', '.join(OPTIMIZERS)}), a class, a function from parameters to an optimizer, or an optimizer"
            raise invalid_option("optimizer", self.optimizer, expected)
        if isinstance(self.scheduler, LRScheduler):
            raise ConfigError(
                "scheduler is a schedule object, bound to the optimizer of one device; give a function that builds it: "
                f"scheduler=lambda optimizer: {type(self.scheduler).__name__}(optimizer, ...)"
            )
        if isinstance(self.scheduler, str):
            check_choice("scheduler", self.scheduler, tuple(SCHEDULERS))
        elif self.scheduler is not None and not callable(self.scheduler):
            expected = f"a name ({', '.join(SCHEDULERS)}), a class or a function"
            raise invalid_option("scheduler", self.scheduler, expected)

    def _check_numbers(self) -> None:
        at_least_1 = ("epochs", "gradient_accumulation_steps", "eval_every_epochs", "max_steps", "early_stop_patience")
        for name in (*at_least_1, "checkpoint_every_steps", "keep_checkpoints", "warmup_steps", "seed"):
            if (value := getattr(self, name)) is not None:
                check_integer(name, value, 0 if name in ("warmup_steps", "seed") else 1)
        above_0 = ("lr", "max_grad_norm", "checkpoint_minutes", "max_hours")
        for name in (*above_0, "weight_decay", "warmup_epochs"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, 0, exclusive=name in above_0)

    def _check_micro_batches(self) -> None:
        if self.micro_batch_size not in (None, "fit"):
            check_integer("micro_batch_size", self.micro_batch_size, 1)
        splits = self.micro_batch_size is not None or self.on_out_of_memory == "halve"
        if splits and (self.strategy == "dp" or self.sync_batchnorm):
            raise ConfigError(
                "micro_batch_size and on_out_of_memory='halve' need one process a device whose forward waits for no other: "
                "leave strategy='dp' and sync_batchnorm out"
            )

    def _check_combinations(self) -> None:
        if self.tensorboard and self.out_dir is None:
            raise ConfigError("tensorboard=True needs out_dir, the folder for the events")
        if self.compile and self.strategy == "dp":
            raise ConfigError(
                "compile=True is not possible with strategy='dp', as nn.DataParallel's replicas cannot be compiled; "
                "use strategy='ddp'"
            )
        own = not isinstance(self.optimizer, (str, type))
        for name in ("lr", "weight_decay", "optimizer_options") if own else ():
            if getattr(self, name):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} has no effect on your own optimizer; set it in the optimizer"
                )
        if own and self.lr_scaling != "none":
            raise ConfigError(
                f"lr_scaling={self.lr_scaling!r} has no effect on your own optimizer, which has its own lr; give "
                "optimizer a name or a class, or scale its lr"
            )
        if self.lr_scaling != "none" and self.lr is None:
            raise ConfigError(f"lr_scaling={self.lr_scaling!r} needs lr, the learning rate for one device's batch")
        if self.warmup_steps and self.warmup_epochs:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} and warmup_epochs={self.warmup_epochs} exclude each other; give one"
            )
        if self.scheduler_options and not isinstance(self.scheduler, (str, type)):
            raise ConfigError(
                f"scheduler_options={dict(self.scheduler_options)!r} has no effect with scheduler={self.scheduler!r}; "
                "give scheduler a name or a class"
            )
        if self.find_nonfinite_layer and self.on_nonfinite_loss == "warn":
            raise ConfigError(
                "find_nonfinite_layer=True has no effect with on_nonfinite_loss='warn'; leave one of them out"
            )
        if self.resume == "":
            raise invalid_option("resume", "", "true, false, 'auto', or the path of a checkpoint or of a run's folder")
        if self.out_dir is None and (self.checkpoint_every_steps or self.resume is True or self.resume == "auto"):
            option = "checkpoint_every_steps" if self.checkpoint_every_steps else "resume"
            raise ConfigError(f"{option}={getattr(self, option)!r} needs out_dir, the folder of the checkpoint")

    def to_plain(self) -> dict[str, Any]:
        """Return the options as text and numbers, for ``trainer.yml``."""
        return {item.name: _to_plain(getattr(self, item.name)) for item in dataclasses.fields(self)}


def _to_plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return getattr(value, "__qualname__", None) or type(value).__qualname__
