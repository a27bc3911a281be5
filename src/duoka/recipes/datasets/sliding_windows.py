"""Sliding windows over a time series, a history and the future after it, as views of one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from duoka.data.sample_fetch import identity_collate


class SlidingWindows(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Data set whose sample ``i`` is ``(history, marks, future)`` of the window that starts at step ``i``.

    Args:
        values: float32 ``(steps, columns)``.
        marks: calendar features, float32 ``(steps, features)``.
        past: steps of the history.
        horizon: steps of the future.
        targets: indices of the columns to forecast.

    """

    def __init__(self, values: Tensor, marks: Tensor, past: int, horizon: int, targets: Sequence[int]) -> None:
        self.values, self.marks = values, marks
        self.past, self.horizon, self.targets = past, horizon, list(targets)

    def __len__(self) -> int:
        return max(0, len(self.values) - self.past - self.horizon + 1)

    @property
    def views(self) -> tuple[Tensor, Tensor]:
        """All windows of values and of marks, ``(windows, past + horizon, columns)``, in the memory of the series."""
        length = self.past + self.horizon
        return self.values.unfold(0, length, 1).transpose(1, 2), self.marks.unfold(0, length, 1).transpose(1, 2)

    @property
    def futures(self) -> Tensor:
        """The true future of all windows, ``(windows, horizon, targets)``."""
        return self.values[self.past :, self.targets].unfold(0, self.horizon, 1).transpose(1, 2)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        history, marks, future = self.__getitems__([index])
        return history[0], marks[0], future[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return a batch: ``(batch, past, columns)``, marks, ``(batch, horizon, targets)``."""
        values, marks = (view[torch.as_tensor(indices)] for view in self.views)
        return values[:, : self.past], marks, values[:, self.past :, self.targets].contiguous()


def loader(samples: SlidingWindows, batch_size: int, *, shuffle: bool = False) -> DataLoader[Any]:
    """Return a loader of ``samples``, whose ``__getitems__`` already returns whole batches."""
    return DataLoader(samples, batch_size=batch_size, shuffle=shuffle, collate_fn=identity_collate)
