"""Everything that a rank needs to train, evaluate or predict, and the model set-up on its device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from duoka.errors import ConfigError
from duoka.strategy import Strategy, select_strategy
from duoka.trainer.callbacks import Callback
from duoka.trainer.config import TrainerConfig
from duoka.trainer.model_with_loss import ModelWithLoss
from duoka.world import World


class RankZeroOnly:
    """Holds objects for rank 0. Workers receive an empty one, so the objects need not be picklable."""

    def __init__(self, callbacks: tuple[Callback, ...] = ()) -> None:
        self.callbacks = callbacks

    def __reduce__(self) -> tuple[type[RankZeroOnly], tuple[()]]:
        return RankZeroOnly, ()


@dataclass
class FitSpec:
    """Model, data and options. Rank 0 has the user's own objects, workers have copies."""

    model: nn.Module
    config: TrainerConfig
    train_data: Any = None
    eval_data: Any = None
    test_data: Any = None
    loss: Callable[..., Any] | str | None = None
    metrics: Any = None
    train_metrics: Any = None
    devices: tuple[torch.device, ...] = ()
    """All devices; with ``strategy="dp"`` those of one process."""
    reason: str = ""
    """Reason for this choice of devices."""
    weights_path: Path | None = None
    """File for the final weights; ``None`` writes none."""
    rank_zero: RankZeroOnly = field(default_factory=RankZeroOnly)

    def strategy(self, world: World) -> tuple[Strategy, str]:
        """Return this rank's strategy, and the reason."""
        if world.size > 1 and not self.config.use_multi_gpu:
            raise ConfigError(
                f"use_multi_gpu=False uses one device, but this job has {world.size} processes, one per device; start one "
                "process, or leave use_multi_gpu out"
            )
        options = dict(self.config.ddp_options)
        return select_strategy(self.config.strategy, world, devices=self.devices, ddp_options=options)


@contextlib.contextmanager
def build_model_with_loss(spec: FitSpec, world: World) -> Iterator[ModelWithLoss]:
    """Yield the model and its loss on this rank's device; afterwards the model has its own batch norm layers again."""
    config = spec.config
    module = ModelWithLoss(
        spec.model,
        spec.loss,
        target_key=config.target_key,
        predict_fn=config.predict_fn,
        precision=config.precision,
        device_type=world.device.type,
    ).to(world.device)
    if not config.sync_batchnorm:
        yield module
        return
    if world.device.type == "cpu":
        raise ConfigError(
            "sync_batchnorm=True needs accelerators, as torch has no SyncBatchNorm for the CPU; leave it out"
        )
    before = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]
    nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]  # with the same tensors
    try:
        yield module
    finally:
        for parent, name, child in before:
            setattr(parent, name, child)
