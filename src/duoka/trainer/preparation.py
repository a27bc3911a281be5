"""What happens to a rank before its first step: its own copies, its own random numbers, its place for the model."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from duoka.checkpoint import rng_state, set_rng_state
from duoka.data import ShardedLoader, shard, to_device
from duoka.errors import ConfigError
from duoka.strategy import Strategy, choose
from duoka.trainer.callbacks import Callback
from duoka.trainer.config import TrainerConfig
from duoka.trainer.objective import Objective
from duoka.world import World

__all__ = [
    "Job",
    "MainOnly",
    "modes_kept",
    "prepared_objective",
    "seed_rank",
    "sharded",
    "unused_parameters",
]


class MainOnly:
    """Holds what is for rank 0 alone: it travels to helper processes as nothing, so it need not be picklable."""

    def __init__(self, callbacks: tuple[Callback, ...] = ()) -> None:
        self.callbacks = callbacks

    def __reduce__(self) -> tuple[type[MainOnly], tuple[()]]:
        return MainOnly, ()


@dataclass
class Job:
    """Everything that a rank needs to train, evaluate or predict. Rank 0 has the user's own objects, helpers copies."""

    model: nn.Module
    config: TrainerConfig
    train_data: Any = None
    eval_data: Any = None
    test_data: Any = None
    loss: Callable[..., Any] | str | None = None
    metrics: Any = None
    devices: tuple[torch.device, ...] = ()
    """All devices; those of one process with ``strategy="dp"``."""
    reason: str = ""
    """Why these."""
    save_model: bool = False
    model_path: str | None = None
    main: MainOnly = field(default_factory=MainOnly)

    def strategy(self, world: World) -> tuple[Strategy, str]:
        """Return this rank's strategy, and why it is this one."""
        if world.size > 1 and not self.config.use_multi_gpu:
            raise ConfigError(
                f"use_multi_gpu=False takes one device, and this job has {world.size} processes, one a device each; start "
                "one process, or leave use_multi_gpu out"
            )
        options = dict(self.config.ddp_options)
        return choose(self.config.strategy, world, devices=self.devices, ddp_options=options)


def seed_rank(seed: int, world: World) -> None:
    """Seed every generator of this process; ranks differ on purpose, so that their random masks do."""
    mixed = (seed + 1_000_003 * world.rank) % 2**63
    random.seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002 - the global generator is what users' code draws from
    torch.manual_seed(mixed)


def sharded(job: Job, data: Any, strategy: Strategy, *, training: bool) -> ShardedLoader:
    """Return this rank's part of ``data``."""
    world = strategy.world
    merge = strategy.replicas if job.config.batch == "per_device" else 1
    return shard(data, rank=world.rank, size=world.size, seed=job.config.seed, merge=merge, training=training)


@contextlib.contextmanager
def prepared_objective(job: Job, world: World) -> Iterator[Objective]:
    """Put model and loss together on this rank's device; batch norm is the model's own again afterwards."""
    config = job.config
    objective = Objective(
        job.model,
        job.loss,
        target=config.target,
        predict=config.predict,
        precision=config.precision,
        device_type=world.device.type,
    ).to(world.device)
    with contextlib.ExitStack() as stack:
        if config.sync_batchnorm:
            stack.enter_context(_synchronised_batch_norm(objective, world))
        yield objective


@contextlib.contextmanager
def _synchronised_batch_norm(objective: Objective, world: World) -> Iterator[None]:
    """Replace batch norm by ``SyncBatchNorm`` on the same tensors, and put the user's own modules back in the end."""
    if world.device.type == "cpu":
        raise ConfigError(
            "sync_batchnorm=True needs accelerators, as torch has no SyncBatchNorm for the CPU; leave it out"
        )
    before = [(parent, name, child) for parent in objective.modules() for name, child in parent.named_children()]
    nn.SyncBatchNorm.convert_sync_batchnorm(objective)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for parent, name, child in before:
            setattr(parent, name, child)


@contextlib.contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Give every submodule the mode (training or evaluation) back that it had before the block."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def unused_parameters(objective: Objective, batch: Any, world: World) -> list[str]:
    """Return the trained parameters that take no part in the loss of ``batch`` on some rank.

    One forward and backward find out; buffers, gradients and random generators are as before afterwards.
    """
    generators = rng_state()
    buffers = [buffer.clone() for buffer in objective.buffers()]
    trained = [(name, parameter) for name, parameter in objective.named_parameters() if parameter.requires_grad]
    loss = objective(to_device(batch, world.device))
    (loss[0] if isinstance(loss, tuple) else loss).backward()
    unused = [name for name, parameter in trained if parameter.grad is None]
    for _, parameter in trained:
        parameter.grad = None
    with torch.no_grad():
        for buffer, value in zip(objective.buffers(), buffers, strict=True):
            buffer.copy_(value)
    set_rng_state(generators)
    return sorted({name for names in world.gather(unused) for name in names})
