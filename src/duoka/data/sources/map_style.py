"""Source for a DataLoader over a map-style data set: each rank loads its own samples only."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

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
from duoka.data.sources.base import ShardSpec, order_seed, samples_seed
from duoka.utils.torch_private import stop_dataloader_workers, take_dataloader_iterator


def has_index_batches(loader: DataLoader[Any]) -> bool:
    """Whether ``loader`` draws batches of indices; without batching, an index stands for a ready-made batch."""
    return loader.batch_sampler is not None or isinstance(loader.sampler, BatchSampler)


class MapStyleSource:
    """Local batches of a map-style ``loader``, loaded by a new DataLoader with the user's options."""

    fingerprint = None

    def __init__(self, loader: DataLoader[Any], spec: ShardSpec) -> None:
        self._requests = _RequestSampler(loader, spec)
        self._generator = torch.Generator()
        dataset_collates = loader.batch_sampler is None  # the sampler yields lists; dataset[list] is a ready-made batch
        workers = loader.num_workers
        self._fetcher = make_fetcher(loader.dataset, loader.collate_fn, dataset_collates)
        self._is_direct = not workers and not loader.pin_memory
        self._loader: DataLoader[Any] = DataLoader(
            self._fetcher,
            batch_sampler=self._requests,  # type: ignore[arg-type]
            collate_fn=identity_collate,
            num_workers=workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=WorkerInit(loader.worker_init_fn) if workers else None,
            multiprocessing_context=loader.multiprocessing_context if workers else None,
            generator=self._generator,  # seeds the workers instead of the user's global generator
            prefetch_factor=loader.prefetch_factor if workers else None,
            persistent_workers=loader.persistent_workers,
        )
        self.samples = self._requests.samples()

    def __len__(self) -> int:
        return len(self._requests)

    def epoch(self, seed: int, epoch: int, skip: int) -> Iterator[LocalBatch]:
        """Yield the local batches of ``epoch``, without loading the first ``skip`` samples."""
        self._generator.manual_seed(samples_seed(seed, epoch))
        sizes = self._requests.begin(seed, epoch, skip)
        # without workers and pinning, the fetcher is called directly, which saves the DataLoader's overhead
        batches = map(self._fetcher.load, self._requests) if self._is_direct else iter(self._loader)
        try:
            for batch in batches:
                while not (size := sizes.popleft()).is_loaded:
                    yield LocalBatch(None, 0, size.global_count)
                yield LocalBatch(batch, size.count, size.global_count)
            while sizes:
                yield LocalBatch(None, 0, sizes.popleft().global_count)
        finally:
            if not self._loader.persistent_workers:
                stop_dataloader_workers(batches)

    def close(self) -> None:
        """Stop persistent worker processes."""
        stop_dataloader_workers(take_dataloader_iterator(self._loader))


class _Size(NamedTuple):
    """The size of a global batch, noted before this rank's shard of it is loaded."""

    count: int  # type: ignore[assignment]  # not the method of tuples
    global_count: int
    is_loaded: bool


class _RequestSampler(Sampler[FetchRequest]):
    """A batch sampler that yields this rank's requests, and notes the size of every global batch."""

    def __init__(self, loader: DataLoader[Any], spec: ShardSpec) -> None:
        self._batches = index_batches(loader)
        self._spec = spec
        self._drop_last = spec.training and (loader.drop_last or getattr(self._batches, "drop_last", False) is True)
        self._owners = (loader, self._batches, getattr(self._batches, "sampler", None))
        self._generators = generators_used_by(self._batches)
        self._dataset = loader.dataset
        self._plan = (0, 0, 0)
        self._sizes: deque[_Size] = deque()

    def begin(self, seed: int, epoch: int, skip: int) -> deque[_Size]:
        """Prepare for ``epoch``; return the queue of sizes that iterating fills."""
        self._plan = (seed, epoch, skip)
        self._sizes = deque()
        return self._sizes

    def __iter__(self) -> Iterator[FetchRequest]:
        (seed, epoch, skip), sizes, spec = self._plan, self._sizes, self._spec
        random_epoch = spec.random_epoch(epoch)
        if spec.training:
            set_epoch(epoch, *self._owners, self._dataset)
        batches = draw_isolated(self._batches, IsolatedRng(order_seed(seed, random_epoch), self._generators))
        stream = samples_seed(seed, random_epoch)
        dataset_epoch = epoch if spec.training and hasattr(self._dataset, "set_epoch") else None
        first = skip
        with restore_shuffled_lists(*self._owners[1:]):
            for indices in merge_batches(skip_samples(batches, skip), spec.batches_per_step, self._drop_last):
                length = len(indices)
                start, stop = spec.bounds(length)
                sizes.append(_Size(stop - start, length, start < stop or spec.training))
                if start < stop:
                    local = indices if spec.world_size == 1 else indices[start:stop]
                    yield FetchRequest(local, first + start, stream, dataset_epoch)
                elif spec.training:
                    yield FetchRequest(indices[:1], first, stream, dataset_epoch)
                first += length

    def __len__(self) -> int:
        batches, per_step = len(self._batches), self._spec.batches_per_step  # type: ignore[arg-type]
        return batches // per_step if self._drop_last else -(-batches // per_step)

    def samples(self) -> int | None:
        """Return the number of samples in an epoch, if it is known without drawing."""
        if type(self._batches) is not BatchSampler:
            return None
        try:
            length = len(self._batches.sampler)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None
        unit = self._batches.batch_size * (self._spec.batches_per_step if self._drop_last else 1)
        return length // unit * unit if self._batches.drop_last else length
