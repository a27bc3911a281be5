"""Strategy of one process per device, with torch's DistributedDataParallel."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from duoka.errors import ConfigError
from duoka.strategy.base import Strategy
from duoka.utils.torch_private import broadcast_coalesced, check_gradients_reduced
from duoka.world import World

_MESSAGE_BYTES = 250 * 1024 * 1024


class DDP(Strategy):
    """Averages gradients over the ranks while backward still runs.

    ``options`` are arguments of ``DistributedDataParallel``: ``static_graph``, ``bucket_cap_mb``,
    ``gradient_as_bucket_view``, ``find_unused_parameters``, ``broadcast_buffers``, ...
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
    """

    name = "ddp"

    def __init__(self, world: World, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(world)
        self.options = dict(options or {})
        self.gradient_divisor = world.size
        self._wrapped: DistributedDataParallel | None = None

    def wrap(self, module: nn.Module, *, find_unused_parameters: bool = False) -> nn.Module:
        """Broadcast rank 0's weights, and register gradient hooks on ``module``."""
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ConfigError(
                "the model has no parameter with requires_grad=True, so there is nothing to train; "
                "set requires_grad=True on the parameters to be trained"
            )
        device_ids = None if self.world.device.type == "cpu" else [self.world.device]
        options = {"find_unused_parameters": find_unused_parameters, **self.options}
        self._wrapped = DistributedDataParallel(module, device_ids=device_ids, **options)
        return self._wrapped

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Keep gradients local inside the block."""
        return contextlib.nullcontext() if self._wrapped is None else self._wrapped.no_sync()

    def check_gradients_reduced(self) -> None:
        """Raise ``RuntimeError`` if a parameter without gradient kept the last backward from averaging others."""
        if self._wrapped is not None:
            check_gradients_reduced(self._wrapped)

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients as DDP does: divide, then sum; a gradient that this rank lacks counts as 0."""
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient = gradient.contiguous() if gradient.layout == torch.strided else gradient
            dist.all_reduce(gradient.mul_(1 / self.world.size))
            parameter.grad = gradient

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite parameters or buffers of this rank with those of rank 0, several in one message."""
        detached = [each.detach() for each in tensors]
        if detached and dist.group.WORLD is not None:
            broadcast_coalesced(detached, _MESSAGE_BYTES)
