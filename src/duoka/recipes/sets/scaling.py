"""Standardisation: numbers of mean 0 and deviation 1, by the statistics of the training rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duoka.log import logger

__all__ = ["Scaling"]


@dataclass(frozen=True)
class Scaling:
    """Mean and standard deviation (of the population, as the paper's code has it) of each column."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, rows: Tensor, names: Sequence[str]) -> Scaling:
        """Return the statistics of ``rows (rows, columns)``; a column that never changes is only shifted, and named."""
        std, mean = torch.std_mean(rows.double(), dim=0, correction=0)
        constant = std <= 1e-12 * mean.abs().clamp_min(1)
        for place in constant.nonzero().flatten().tolist():
            logger.warning(
                "column %r is %g in every training row: it says nothing, and becomes 0", names[place], mean[place]
            )
        return cls(tuple(mean.tolist()), tuple(std.masked_fill(constant, 1).tolist()))

    def apply(self, values: Tensor) -> Tensor:
        """Return ``values (..., columns)`` standardised, float32."""
        return ((values.double() - torch.tensor(self.mean).double()) / torch.tensor(self.std).double()).float()

    def invert(self, values: Tensor) -> Tensor:
        """Return standardised ``values (..., columns)`` in their own units, float64."""
        return values.double() * torch.tensor(self.std).double() + torch.tensor(self.mean).double()

    def at(self, places: Sequence[int]) -> Scaling:
        """Return the statistics of the columns at ``places``."""
        return Scaling(tuple(self.mean[place] for place in places), tuple(self.std[place] for place in places))
