"""The mean of a loss over samples, kept on the device and read only when somebody asks."""

from __future__ import annotations

from typing import Any

import torch

from duoka.world import World

__all__ = ["Tally"]


class Tally:
    """A weighted mean: nothing is read from the device while it grows."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.total = torch.zeros((), dtype=dtype, device=device)
        self.weight: Any = 0
        self.reset()

    def reset(self) -> None:
        """Begin again at nothing."""
        self.total.zero_()
        self.weight = 0

    def add(self, mean: torch.Tensor, count: int) -> None:
        """Add the mean over ``count`` samples."""
        self.total.add_(mean.detach(), alpha=count)
        self.weight += count

    def add_sum(self, total: torch.Tensor, weight: Any) -> None:
        """Add a sum and its weight, a number or a tensor on the device."""
        self.total.add_(total.detach())
        self.weight = self.weight + (weight.detach().to(self.total.dtype) if torch.is_tensor(weight) else weight)

    def read(self) -> tuple[float, float]:
        """Return this rank's ``(sum, weight)``; waits for the device."""
        return float(self.total), float(self.weight)

    def restore(self, state: tuple[float, float]) -> None:
        """Continue from what ``read`` returned."""
        self.total.fill_(state[0])
        self.weight = state[1]

    def mean(self) -> float:
        """Return this rank's mean so far, ``nan`` of nothing; waits for the device."""
        total, weight = self.read()
        return total / weight if weight else float("nan")

    def global_mean(self, world: World) -> float:
        """Return the mean over all ranks; waits for the device and the ranks."""
        both = torch.tensor(self.read(), dtype=torch.float64)
        total, weight = world.all_reduce(both).tolist()
        return total / weight if weight else float("nan")
