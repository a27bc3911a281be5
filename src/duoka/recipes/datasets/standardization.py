"""Standardisation: numbers of mean 0 and deviation 1, by the statistics of the training rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duoka.errors import DataError
from duoka.log import logger

__all__ = ["Standardization"]


@dataclass(frozen=True)
class Standardization:
    """Mean and standard deviation (of the population, as the paper's code has it) of each column."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, rows: Tensor, names: Sequence[str]) -> Standardization:
        """Return the statistics of ``rows (rows, columns)``; a column that never changes is only shifted, and named.

        Raises:
            DataError: numbers so large that their squares overflow.

        """
        std, mean = torch.std_mean(rows.double(), dim=0, correction=0)
        for place in (~std.isfinite()).nonzero().flatten().tolist():
            largest = float(rows[:, place].abs().max())
            raise DataError(
                f"column {names[place]!r} has numbers as large as {largest:.3g}, which overflow: write them in a larger unit"
            )
        constant = (rows == rows[0]).all(0) | (std == 0)
        for place in constant.nonzero().flatten().tolist():
            logger.warning(
                "column %r is %g in every training row: it says nothing, and becomes 0", names[place], mean[place]
            )
        mean = torch.where(constant, rows[0].double(), mean)  # which rounding would miss
        return cls(tuple(mean.tolist()), tuple(std.masked_fill(constant, 1).tolist()))

    def apply(self, values: Tensor) -> Tensor:
        """Return ``values (..., columns)`` standardised, float32."""
        mean, std = self._tensors()
        return ((values.double() - mean) / std).float()

    def invert(self, values: Tensor) -> Tensor:
        """Return standardised ``values (..., columns)`` in their own units, float64."""
        mean, std = self._tensors()
        return values.double() * std + mean

    def at(self, places: Sequence[int]) -> Standardization:
        """Return the statistics of the columns at ``places``."""
        return Standardization(tuple(self.mean[place] for place in places), tuple(self.std[place] for place in places))

    def _tensors(self) -> tuple[Tensor, Tensor]:
        """Return mean and deviation in double precision: single would shift numbers that are far from 0."""
        return torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.std, dtype=torch.float64)
