"""Standardization of columns to mean 0 and standard deviation 1 by the statistics of the training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duoka.errors import DataError
from duoka.log import logger


@dataclass(frozen=True)
class Standardization:
    """Mean and population standard deviation of each column."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, rows: Tensor, names: Sequence[str]) -> Standardization:
        """Return the statistics of ``rows (rows, columns)``; a constant column is only shifted, with a warning.

        Raises DataError if the squares of a column's numbers overflow.
        """
        std, mean = torch.std_mean(rows.double(), dim=0, correction=0)
        for index in (~std.isfinite()).nonzero().flatten().tolist():
            largest = float(rows[:, index].abs().max())
            raise DataError(
                f"column {names[index]!r} has numbers as large as {largest:.3g}, which overflow: use a larger unit"
            )
        constant = (rows == rows[0]).all(0) | (std == 0)
        for index in constant.nonzero().flatten().tolist():
            logger.warning("column %r is %g in every training row, and becomes 0", names[index], mean[index])
        mean = torch.where(constant, rows[0].double(), mean)  # the computed mean may differ by rounding
        return cls(tuple(mean.tolist()), tuple(std.masked_fill(constant, 1).tolist()))

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Standardization:
        """Return the statistics saved in a JSON object under ``mean`` and ``std``."""
        return cls(tuple(saved["mean"]), tuple(saved["std"]))

    def transform(self, values: Tensor) -> Tensor:
        """Return ``values (..., columns)`` standardized, as float32."""
        mean, std = self._tensors()
        return ((values.double() - mean) / std).float()

    def inverse_transform(self, values: Tensor) -> Tensor:
        """Return standardized ``values (..., columns)`` in their original units, as float64."""
        mean, std = self._tensors()
        return values.double() * std + mean

    def select(self, indices: Sequence[int]) -> Standardization:
        """Return the statistics of some columns."""
        return Standardization(
            tuple(self.mean[index] for index in indices), tuple(self.std[index] for index in indices)
        )

    def _tensors(self) -> tuple[Tensor, Tensor]:
        """Return mean and deviation as float64; float32 would shift numbers that are far from 0."""
        return torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.std, dtype=torch.float64)
