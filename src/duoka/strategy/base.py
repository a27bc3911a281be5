"""The interface that the trainer knows of a strategy; nothing here knows how devices talk to each other."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from duoka.world import World

__all__ = ["Strategy"]


class Strategy(ABC):
    """Keeps the replicas of one module in step while it is trained.

    The gradient it stands for is that of the mean over the global batch, whatever the sizes of the parts: the loss of a
    part (itself a mean) is multiplied by ``loss_scale(count, global_count)`` before ``backward``.
    """

    name: ClassVar[str]
    """What users call it."""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def replicas(self) -> int:
        """How many devices compute at the same time."""
        return self.world.size

    @abstractmethod
    def wrap(self, module: nn.Module) -> nn.Module:
        """Return what is called instead of ``module`` in training; ``module`` itself stays the user's, on its device."""

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Leave gradients on their device inside this block: forward and backward of all micro-batches but the last."""
        return contextlib.nullcontext()

    def loss_scale(self, count: int, global_count: int) -> float:
        """Return the factor for the loss of a part: ``count`` samples here, ``global_count`` in the whole step."""
        return count / global_count

    def average_gradients(self, parameters: Iterable[nn.Parameter], weight: torch.Tensor) -> None:
        """Turn gradients of a sum into those of a mean: ``weight`` is this rank's share of the sum's weight."""
        factor = self.inverse_total_weight(weight)
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for dtype, gradients in by_dtype.items():
            torch._foreach_mul_(gradients, factor.to(dtype))

    def inverse_total_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the factor that makes sums means, 0 where all weigh nothing: ``weight`` is this rank's share of theirs."""
        weight = weight.detach()
        total = self.world.all_reduce(weight.double() if weight.device.type != "mps" else weight)
        return torch.where(total > 0, self.gradient_divisor / total, 0.0)

    @property
    def gradient_divisor(self) -> int:
        """By how many ranks the synchronisation divides the summed gradient."""
        return 1

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Scale gradients so that their norm over all ranks is at most ``max_norm``; return the norm from before."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def synchronize_buffers(self, module: nn.Module) -> None:  # noqa: B027 - one process has nothing to do
        """Give every rank rank 0's buffers: the running statistics of batch norm, which each rank has seen its own of."""

    def broadcast_parameters(self, module: nn.Module) -> None:  # noqa: B027
        """Give every rank rank 0's parameters and buffers."""

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Return the whole state of the unwrapped ``module``, with its own names, on every rank."""
        return module.state_dict()
