"""What a fit says at its start: devices, strategy, parameters, batch and learning rate, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from duoka.scaling import Batch, LearningRate
from duoka.strategy import Strategy
from duoka.trainer.config import TrainerConfig

__all__ = ["batch_size_of", "count_in_words", "introduction", "learning_rate"]


def learning_rate(config: TrainerConfig, replicas: int) -> LearningRate:
    """Return the learning rate's arithmetic for this number of devices."""
    growth = float(replicas) if config.batch_size_means == "per_device" else 1.0
    return LearningRate(
        config.lr if config.lr is not None else 1.0,
        growth,
        config.lr_scaling,
        config.warmup_epochs,
        config.warmup_steps,
    )


def introduction(
    config: TrainerConfig,
    *,
    model: nn.Module,
    train_data: Any,
    optimizer: torch.optim.Optimizer,
    strategy: Strategy,
    devices: tuple[torch.device, ...],
    reasons: tuple[str, str],
) -> Iterator[str]:
    """Yield the lines that are shown first. ``reasons`` are those for the devices and for the strategy."""
    yield f"devices: {device_names(devices)} ({reasons[0].rstrip('.')})"
    yield f"strategy: {strategy.name} ({reasons[1]})"
    yield f"parameters: {parameters_in_words(model)}"
    size = batch_size_of(train_data)
    if size is not None:
        yield f"batch: {batch_in_words(config, size, strategy.replicas)}"
    yield f"optimiser: {type(optimizer).__name__}, {_rate_in_words(config, optimizer, strategy.replicas)}"
    if config.precision != "fp32":
        yield f"precision: {config.precision}"


def batch_in_words(config: TrainerConfig, size: int, replicas: int) -> str:
    """Return the batch's arithmetic; ``size`` is what the loader yields."""
    accumulate = config.gradient_accumulation_steps
    factor = accumulate if config.batch_size_means == "global" else 1
    if size * factor < replicas * accumulate:
        return f"{size * accumulate} global, fewer than devices x accumulated: some devices will have no sample"
    return Batch(size * factor, replicas, config.batch_size_means, accumulate).summary


def _rate_in_words(config: TrainerConfig, optimizer: torch.optim.Optimizer, replicas: int) -> str:
    rule = learning_rate(config, replicas)
    if config.lr is not None:
        return rule.summary
    rates = sorted({float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups})
    return f"lr {', '.join(f'{rate:g}' for rate in rates)} (its own)"


def device_names(devices: tuple[torch.device, ...]) -> str:
    """Return what the devices are called, with the memory of accelerators."""
    if not devices:
        return "this process's place in a larger job"
    if devices[0].type == "cpu":
        return "the CPU" if len(devices) == 1 else f"{len(devices)} CPU workers"
    return ", ".join(f"{device} {_accelerator(device)}" for device in devices)


def _accelerator(device: torch.device) -> str:
    try:
        properties = torch.get_device_module(device).get_device_properties(device)
        return f"{properties.name} ({properties.total_memory / 2**30:.1f} GiB)"
    except (AttributeError, RuntimeError):
        return ""


def parameters_in_words(model: nn.Module) -> str:
    """Return how many parameters a model has, and how many of them are trained."""
    every = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return count_in_words(every) if trained == every else f"{count_in_words(every)}, {count_in_words(trained)} trained"


def count_in_words(count: int) -> str:
    """Return a number as people say it.

    >>> count_in_words(13_590_000), count_in_words(2_410), count_in_words(650)
    ('13.59M', '2.41K', '650')
    """
    for factor, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= factor:
            return f"{count / factor:.2f}{letter}"
    return str(count)


def batch_size_of(data: Any) -> int | None:
    """Return how many samples a batch of ``data`` has, ``None`` where only loading one would tell."""
    size = getattr(data, "batch_size", None)
    if size is None:
        size = getattr(getattr(data, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None
