"""One process, several devices: torch's own DataParallel, kept for comparison. DDP and duoka.DataParallel are faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from duoka.strategy.base import Strategy
from duoka.world import World

__all__ = ["DP"]


class DP(Strategy):
    """Replicates the module at every step, scatters the batch, gathers the losses (``nn.DataParallel``)."""

    name: ClassVar[str] = "dp"

    def __init__(self, world: World, devices: Sequence[torch.device] = ()) -> None:
        super().__init__(world)
        self.devices = tuple(devices) or (world.device,)

    @property
    def replicas(self) -> int:
        """The devices that this one process uses."""
        return len(self.devices)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return ``module`` behind ``nn.DataParallel``; its forward takes a batch and returns the batch's loss."""
        ids = [device.index or 0 for device in self.devices if device.type != "cpu"]
        parts = _PartSum(module)
        return _Gathered(nn.DataParallel(parts, device_ids=ids) if ids else parts)  # no ids would mean every GPU


class _PartSum(nn.Module):
    """Return a part's loss as a row ``(sum, weight, whether the loss itself said its weight)``, which gathers exactly."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> torch.Tensor:
        loss = self.module(batch)
        if isinstance(loss, tuple):
            total, weight = loss
            return torch.stack([total, torch.as_tensor(weight).to(total), torch.ones_like(total)]).unsqueeze(0)
        count = torch.full_like(loss, float(_length(batch)))
        return torch.stack([loss * count, count, torch.zeros_like(loss)]).unsqueeze(0)


def _length(batch: Any) -> int:
    """Return how many samples a part holds, of the containers that ``nn.DataParallel`` scatters."""
    return next(len(leaf) for leaf in tree_leaves(batch) if torch.is_tensor(leaf) and leaf.ndim)


class _Gathered(nn.Module):
    """Turn the gathered rows ``(devices, 3)`` back into a loss of the form that the module returned."""

    def __init__(self, parallel: nn.Module) -> None:
        super().__init__()
        self.parallel = parallel
        self.weighted: bool | None = None

    def forward(self, batch: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        rows = self.parallel(batch)
        total, weight, weighted = rows.sum(0).unbind()
        if self.weighted is None:  # read from the device once, not at every step
            self.weighted = bool(weighted.item())
        return (total, weight.detach()) if self.weighted else total / weight
