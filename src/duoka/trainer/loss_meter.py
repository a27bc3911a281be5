"""Running mean of a loss, kept on the device and read only on request."""

from typing import Any

import torch

from duoka.world import World

FOLD_EVERY = 64


class LossMeter:
    """Weighted mean. Adding a value computes nothing and does not wait for the device.

    Values wait in a list and are summed together in float64. For float32 values such sums are exact in practice,
    so the order of summation, and with it an interruption, has no effect on the result.
    """

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.total = torch.zeros((), dtype=dtype, device=device)
        self.weight: Any = 0
        self._means: list[tuple[torch.Tensor, int]] = []
        self._sums: list[tuple[torch.Tensor, torch.Tensor]] = []

    def reset(self) -> None:
        """Drop all values."""
        self.total.zero_()
        self.weight = 0
        self._means.clear()
        self._sums.clear()

    def add(self, mean: torch.Tensor, count: int) -> None:
        """Add the mean over ``count`` samples."""
        self._means.append((mean.detach(), count))
        if len(self._means) == FOLD_EVERY:
            self._fold()

    def add_sum(self, total: torch.Tensor, weight: Any) -> None:
        """Add a sum and its weight, which is a number or a tensor on the device."""
        weight = torch.as_tensor(weight, dtype=self.total.dtype, device=self.total.device)
        self._sums.append((total.detach(), weight.detach()))
        if len(self._sums) == FOLD_EVERY:
            self._fold()

    def read(self) -> tuple[float, float]:
        """Return this rank's ``(sum, weight)``; waits for the device."""
        self._fold()
        return float(self.total), float(self.weight)

    def restore(self, state: tuple[float, float]) -> None:
        """Continue from what ``read`` returned."""
        self.reset()
        self.total.fill_(state[0])
        self.weight = state[1]

    def mean(self) -> float:
        """Return this rank's mean, ``nan`` if nothing was added; waits for the device."""
        total, weight = self.read()
        return total / weight if weight else float("nan")

    def global_mean(self, world: World) -> float | None:
        """Return the mean over all ranks, ``None`` if nothing was added; waits for the device and the ranks."""
        both = torch.tensor(self.read(), dtype=torch.float64, device="cpu")
        total, weight = world.all_reduce(both).tolist()
        return total / weight if weight else None

    def _fold(self) -> None:
        dtype, device = self.total.dtype, self.total.device
        if self._means:
            means, numbers = zip(*self._means, strict=True)
            counts = torch.tensor(numbers, dtype=dtype, device="cpu").to(device, non_blocking=True)
            self.total.add_((torch.stack(means).to(dtype) * counts).sum())
            self.weight = self.weight + sum(numbers)
            self._means.clear()
        if self._sums:
            sums, weights = zip(*self._sums, strict=True)
            self.total.add_(torch.stack(sums).to(dtype).sum())
            self.weight = self.weight + torch.stack(weights).sum()
            self._sums.clear()
