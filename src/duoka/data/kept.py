"""Parts of resident data: every rank makes its own part of each global batch, on its own device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from duoka.data.position import LocalBatch
from duoka.data.resident_loader import DeviceResidentLoader, mix_seed
from duoka.data.sources.base import ShardSpec, order_seed, samples_seed

__all__ = ["ResidentSource"]


class ResidentSource:
    """The parts of a ``Resident`` loader."""

    fingerprint = None

    def __init__(self, loader: DeviceResidentLoader, spec: ShardSpec) -> None:
        self._loader, self._spec = loader, spec
        self._whole_only = spec.training and loader.drop_last
        length, unit = len(loader.tensors[0]), loader.batch_size
        self._length = length // unit * unit if loader.drop_last else length
        whole = unit * spec.batches_per_step
        self.samples = self._length // whole * whole if self._whole_only else self._length

    def __len__(self) -> int:
        return -(-self.samples // (self._loader.batch_size * self._spec.batches_per_step))

    def epoch(self, seed: int, epoch: int, skip: int) -> Iterator[LocalBatch]:
        """Yield this rank's parts of ``epoch``, without making the first ``skip`` samples."""
        loader, drawn = self._loader, self._spec.epoch(epoch)
        order = torch.arange(len(loader.tensors[0]))
        if loader.shuffle:
            generator = torch.Generator().manual_seed(order_seed(seed, drawn))
            order = torch.randperm(len(order), generator=generator)
        stream = samples_seed(seed, drawn)
        for first, last in self._groups(skip):
            yield self._part(order, first, last, stream)

    def close(self) -> None:
        """There is nothing to end."""

    def _groups(self, skip: int) -> Iterator[tuple[int, int]]:
        """Yield the first place of each global batch after ``skip`` samples, and the place after its last."""
        size, merge = self._loader.batch_size, self._spec.batches_per_step
        edges = [skip, *range((skip // size + 1) * size, self._length, size)]
        starts = edges[::merge] if skip < self._length else []
        for first, following in zip(starts, [*starts[1:], self._length], strict=True):
            if not self._whole_only or following - first > size * (merge - 1):
                yield first, following

    def _part(self, order: Tensor, first: int, last: int, stream: int) -> LocalBatch:
        start, stop = (first + bound for bound in self._spec.bounds(last - first))
        count, total = stop - start, last - first
        if not count:
            if not self._spec.training:
                return LocalBatch(None, 0, total)
            start, stop = first, first + 1
        places = torch.arange(start, stop)
        mixed = None
        if self._loader.mix is not None and self._spec.training:
            before = (
                start - 1 if start > first else last - 1
            )  # each is mixed with the one before it, the first with the last
            places, mixed = torch.cat([torch.tensor([before]), places]), mix_seed(stream, first)
        return LocalBatch(self._loader.batch(order[places], places, stream, mixed), count, total)
