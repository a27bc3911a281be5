"""Parts of a DataLoader over a map-style data set: each rank loads its own samples and no others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from duoka.data.index_order import (
    draw_isolated,
    generators_used_by,
    index_batches,
    merge_batches,
    set_epoch,
    skip_samples,
)
from duoka.data.position import LocalBatch
from duoka.data.rng import IsolatedRng
from duoka.data.sample_fetch import FetchRequest, WorkerInit, identity_collate, make_fetcher
from duoka.data.shuffle_reset import restore_shuffled_lists
from duoka.data.sources.base import ShardSpec, order_seed, samples_seed, stop_workers

__all__ = ["MapStyleSource", "is_mapped"]


def is_mapped(loader: DataLoader[Any]) -> bool:
    """Whether the index batches of ``loader`` can be cut; not so without batches, where an index is a ready-made one."""
    return loader.batch_sampler is not None or isinstance(loader.sampler, BatchSampler)


class MapStyleSource:
    """The parts of a map-style ``loader``; a new DataLoader with the user's options loads them."""

    fingerprint = None

    def __init__(self, loader: DataLoader[Any], spec: ShardSpec) -> None:
        self._requests = _Requests(loader, spec)
        self._generator = torch.Generator()
        whole = loader.batch_sampler is None  # the sampler yields lists, and dataset[list] is a ready-made batch
        workers = loader.num_workers
        self._samples = make_fetcher(loader.dataset, loader.collate_fn, whole)
        self._is_direct = not workers and not loader.pin_memory
        self._loader: DataLoader[Any] = DataLoader(
            self._samples,
            batch_sampler=self._requests,  # type: ignore[arg-type]
            collate_fn=identity_collate,
            num_workers=workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=WorkerInit(loader.worker_init_fn) if workers else None,
            multiprocessing_context=loader.multiprocessing_context if workers else None,
            generator=self._generator,  # workers are seeded from it: not from the user's global generator
            prefetch_factor=loader.prefetch_factor if workers else None,
            persistent_workers=loader.persistent_workers,
        )
        self.samples = self._requests.samples()

    def __len__(self) -> int:
        return len(self._requests)

    def epoch(self, seed: int, epoch: int, skip: int) -> Iterator[LocalBatch]:
        """Yield this rank's parts of ``epoch``, without loading the first ``skip`` samples."""
        self._generator.manual_seed(samples_seed(seed, epoch))
        taken = self._requests.begin(seed, epoch, skip)
        batches = self._batches()
        try:
            for batch in batches:
                while not (sizes := taken.popleft())[0] and not sizes[2]:
                    yield LocalBatch(None, 0, sizes[1])
                yield LocalBatch(batch, sizes[0], sizes[1])
            while taken:
                yield LocalBatch(None, 0, taken.popleft()[1])
        finally:
            if not self._loader.persistent_workers:
                stop_workers(batches)

    def _batches(self) -> Iterator[Any]:
        """Yield what was requested; where nothing but loading is to be done, without a DataLoader's own work around it."""
        if self._is_direct:
            return map(self._samples.load, self._requests)
        return iter(self._loader)

    def close(self) -> None:
        """End worker processes that were kept."""
        iterator, self._loader._iterator = self._loader._iterator, None
        stop_workers(iterator)


class _Requests(Sampler[FetchRequest]):
    """The batch sampler: yields what this rank loads, and notes the sizes of every global batch for when it is loaded."""

    def __init__(self, loader: DataLoader[Any], spec: ShardSpec) -> None:
        self._batches = index_batches(loader)
        self._spec = spec
        self._whole_only = spec.training and (loader.drop_last or getattr(self._batches, "drop_last", False) is True)
        self._owners = (loader, self._batches, getattr(self._batches, "sampler", None))
        self._generators = generators_used_by(self._batches)
        self._dataset = loader.dataset
        self._plan = (0, 0, 0)
        self._taken: deque[tuple[int, int, bool]] = deque()

    def begin(self, seed: int, epoch: int, skip: int) -> deque[tuple[int, int, bool]]:
        """Prepare for ``epoch``; return the queue of (count, global count, whether something is loaded)."""
        self._plan = (seed, epoch, skip)
        self._taken = deque()
        return self._taken

    def __iter__(self) -> Iterator[FetchRequest]:
        (seed, epoch, skip), taken, spec = self._plan, self._taken, self._spec
        drawn = spec.epoch(epoch)
        if spec.training:
            set_epoch(epoch, *self._owners, self._dataset)
        batches = draw_isolated(self._batches, IsolatedRng(order_seed(seed, drawn), self._generators))
        stream = samples_seed(seed, drawn)
        dataset_epoch = epoch if spec.training and hasattr(self._dataset, "set_epoch") else None
        first = skip
        with restore_shuffled_lists(*self._owners[1:]):
            for indices in merge_batches(skip_samples(batches, skip), spec.batches_per_step, self._whole_only):
                length = len(indices)
                start, stop = spec.bounds(length)
                if start < stop:
                    taken.append((stop - start, length, True))
                    yield FetchRequest(
                        indices if spec.world_size == 1 else indices[start:stop],
                        first + start,
                        stream,
                        dataset_epoch,
                    )
                elif spec.training:
                    taken.append((0, length, True))
                    yield FetchRequest(indices[:1], first, stream, dataset_epoch)
                else:
                    taken.append((0, length, False))
                first += length

    def __len__(self) -> int:
        batches = len(self._batches)  # type: ignore[arg-type]
        return (
            batches // self._spec.batches_per_step if self._whole_only else -(-batches // self._spec.batches_per_step)
        )

    def samples(self) -> int | None:
        """Return how many samples an epoch has, where that is known without drawing one."""
        if type(self._batches) is not BatchSampler:
            return None
        try:
            length = len(self._batches.sampler)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None
        unit = self._batches.batch_size * (self._spec.batches_per_step if self._whole_only else 1)
        return length // unit * unit if self._batches.drop_last else length
