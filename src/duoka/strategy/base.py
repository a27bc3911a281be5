"""Interface between the trainer and a strategy, and the strategy of a single device."""

import contextlib
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from duoka.utils.torch_private import multiply_in_place
from duoka.world import World


class Strategy:
    """Keeps the replicas of one module in step; this base class serves one device, where collectives are the identity.

    The gradient of a step is that of the mean over the global batch. Each rank multiplies its local mean loss by
    ``loss_scale(count, global_count)`` before ``backward``, so ranks may differ in size.
    """

    name: ClassVar[str] = "single"
    """Name in the option ``strategy``."""
    gradient_divisor = 1
    """Number by which the gradient synchronization divides the sum over ranks."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.replicas = world.size
        """Number of devices that compute at the same time."""

    def wrap(self, module: nn.Module, *, find_unused_parameters: bool = False) -> nn.Module:  # noqa: ARG002
        """Return the module that training steps call; ``module`` itself stays unwrapped."""
        return module

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Keep gradients local inside the block: for all micro-batches of a step but the last."""
        return contextlib.nullcontext()

    def loss_scale(self, count: int, global_count: int) -> float:
        """Return the factor for a mean loss over ``count`` of the step's ``global_count`` samples."""
        return count * self.gradient_divisor / global_count

    def check_gradients_reduced(self) -> None:
        """Raise ``RuntimeError`` if the last backward left gradients that differ between ranks."""

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Synchronize the gradients of a step whose module was not wrapped yet."""

    def average_gradients(self, parameters: Iterable[nn.Parameter], weight: torch.Tensor) -> None:
        """Divide gradients of a summed loss by the total weight; ``weight`` is this rank's part of it."""
        factor = self.inverse_total_weight(weight)
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for dtype, gradients in by_dtype.items():
            multiply_in_place(gradients, factor.to(dtype))

    def inverse_total_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the factor from summed to mean loss, 0 if the total weight is 0; ``weight`` is this rank's part."""
        weight = weight.detach()
        total = self.world.all_reduce(weight.double() if weight.device.type != "mps" else weight)
        return torch.where(total > 0, self.gradient_divisor / total, 0.0)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Scale gradients down to a total norm of ``max_norm``; return the norm before."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite parameters or buffers of this rank with those of rank 0."""
