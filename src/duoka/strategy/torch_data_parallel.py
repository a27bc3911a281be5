"""Strategy of one process with several devices: torch's ``nn.DataParallel``, for comparison with the faster ones."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from duoka.strategy.base import Strategy
from duoka.utils.pytree import iter_tensors
from duoka.world import World


class DP(Strategy):
    """Replicates the module at every step, scatters the batch and gathers the losses."""

    name = "dp"

    def __init__(self, world: World, devices: Sequence[torch.device] = ()) -> None:
        super().__init__(world)
        self.devices = tuple(devices) or (world.device,)
        self.replicas = len(self.devices)

    def wrap(self, module: nn.Module, *, find_unused_parameters: bool = False) -> nn.Module:  # noqa: ARG002
        """Return ``module`` in ``nn.DataParallel``; its forward takes a batch and returns the loss."""
        ids = [device.index or 0 for device in self.devices if device.type != "cpu"]
        rows = _LossRow(module)
        return _GatheredLoss(nn.DataParallel(rows, device_ids=ids) if ids else rows)  # no ids would mean every GPU


class _LossRow(nn.Module):
    """Returns a replica's loss as a row ``(sum, weight, loss has its own weight)``, which gathers exactly."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> torch.Tensor:
        loss = self.module(batch)
        if isinstance(loss, tuple):
            total, weight = loss
            return torch.stack([total, torch.as_tensor(weight).to(total), torch.ones_like(total)]).unsqueeze(0)
        samples = next(len(tensor) for tensor in iter_tensors(batch) if tensor.ndim)
        count = torch.full_like(loss, float(samples))
        return torch.stack([loss * count, count, torch.zeros_like(loss)]).unsqueeze(0)


class _GatheredLoss(nn.Module):
    """Turns the gathered rows ``(devices, 3)`` into a loss of the module's own form."""

    def __init__(self, parallel: nn.Module) -> None:
        super().__init__()
        self.parallel = parallel
        self.is_weighted: bool | None = None

    def forward(self, batch: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        rows = self.parallel(batch)
        total, weight, weighted = rows.sum(0).unbind()
        if self.is_weighted is None:  # read from the device once, not at every step
            self.is_weighted = bool(weighted.item())
        return (total, weight.detach()) if self.is_weighted else total / weight
