"""A process for each device: torch's DistributedDataParallel."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from duoka.errors import ConfigError
from duoka.strategy.base import Strategy
from duoka.world import World

__all__ = ["DDP"]

_BROADCAST_BYTES = 250 * 1024 * 1024


class DDP(Strategy):
    """Averages gradients over the ranks while backward is still running.

    ``options`` go to ``DistributedDataParallel`` as they are: ``static_graph``, ``bucket_cap_mb``,
    ``gradient_as_bucket_view``, ``find_unused_parameters``, ``broadcast_buffers``, ...
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
    """

    name: ClassVar[str] = "ddp"

    def __init__(self, world: World, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(world)
        self.options = dict(options or {})
        self._wrapped: DistributedDataParallel | None = None

    @property
    def gradient_divisor(self) -> int:
        """DDP divides by the number of ranks."""
        return self.world.size

    def wrap(self, module: nn.Module) -> nn.Module:
        """Broadcast rank 0's weights and hook the gradients of ``module``."""
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ConfigError(
                "the model has no parameter that requires a gradient, so there is nothing to train; "
                "set requires_grad=True on what shall be trained"
            )
        device = self.world.device
        device_ids = None if device.type == "cpu" else [device]
        self._wrapped = DistributedDataParallel(module, device_ids=device_ids, **self.options)
        return self._wrapped

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Keep gradients local inside the block."""
        return contextlib.nullcontext() if self._wrapped is None else self._wrapped.no_sync()

    def loss_scale(self, count: int, global_count: int) -> float:
        """Weigh a part by its share, times the number of ranks that DDP will divide by."""
        return count * self.world.size / global_count

    def synchronize_buffers(self, module: nn.Module) -> None:
        """Broadcast rank 0's buffers, in few messages."""
        self._broadcast(list(module.buffers()))

    def broadcast_parameters(self, module: nn.Module) -> None:
        """Broadcast rank 0's parameters and buffers, in few messages."""
        self._broadcast([*module.parameters(), *module.buffers()])

    def _broadcast(self, tensors: list[torch.Tensor]) -> None:
        group = dist.group.WORLD
        if tensors and group is not None:
            dist._broadcast_coalesced(group, [each.detach() for each in tensors], _BROADCAST_BYTES, 0)  # type: ignore[attr-defined]
