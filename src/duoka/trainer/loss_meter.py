"""Running mean of a loss, kept on the device and read only on request."""

from typing import Any

import torch

from duoka.world import World

FOLD_EVERY = 64
NEVER = 2**62
"""Number of a step that does not come."""


class LossMeter:
    """Weighted mean. Adding a value computes nothing and does not wait for the device.

    Values wait in a list and are summed together in float64. For float32 values such sums are exact in practice,
    so the order of summation, and with it an interruption, has no effect on the result.
    """

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.total = torch.zeros((), dtype=dtype, device=device)
        self.weight: Any = 0
        self.step = 0
        """Step to which the values belong that are added now."""
        self._first_bad = torch.full((), NEVER, dtype=torch.int64, device=device)
        self._means: list[tuple[torch.Tensor, int, int]] = []
        self._sums: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def reset(self) -> None:
        """Drop all values."""
        self.total.zero_()
        self.weight = 0
        self._means.clear()
        self._sums.clear()

    def add(self, mean: torch.Tensor, count: int) -> None:
        """Add the mean over ``count`` samples."""
        self._means.append((mean.detach(), count, self.step))
        if len(self._means) == FOLD_EVERY:
            self._fold()

    def add_sum(self, total: torch.Tensor, weight: Any) -> None:
        """Add a sum and its weight, which is a number or a tensor on the device."""
        weight = torch.as_tensor(weight, dtype=self.total.dtype, device=self.total.device)
        self._sums.append((total.detach(), weight.detach(), self.step))
        if len(self._sums) == FOLD_EVERY:
            self._fold()

    def merge(self, other: "LossMeter") -> None:
        """Add the values of another meter."""
        other._fold()
        self.total.add_(other.total)
        self.weight = self.weight + other.weight
        torch.minimum(self._first_bad, other._first_bad, out=self._first_bad)

    def first_bad_step(self) -> int:
        """Return the first step with a value that is not finite, ``NEVER`` if there is none; waits for the device."""
        self._fold()
        return int(self._first_bad)

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
            means, numbers, steps = zip(*self._means, strict=True)
            counts = torch.tensor(numbers, dtype=dtype, device="cpu").to(device, non_blocking=True)
            stacked = torch.stack(means)
            self.total.add_((stacked.to(dtype) * counts).sum())
            self._note_bad(stacked, steps)
            self.weight = self.weight + sum(numbers)
            self._means.clear()
        if self._sums:
            sums, weights, steps = zip(*self._sums, strict=True)
            stacked = torch.stack(sums)
            self.total.add_(stacked.to(dtype).sum())
            self._note_bad(stacked, steps)
            self.weight = self.weight + torch.stack(weights).sum()
            self._sums.clear()

    def _note_bad(self, values: torch.Tensor, steps: tuple[int, ...]) -> None:
        numbers = torch.tensor(steps, device="cpu").to(self._first_bad.device, non_blocking=True)
        first = torch.where(values.isfinite(), NEVER, numbers).min()
        torch.minimum(self._first_bad, first, out=self._first_bad)
