"""Source for a DataLoader over a map-style data set: each rank loads its own samples only."""

from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from duoka.data.index_order import (
    draw_isolated,
    generators_used_by,
    has_set_epoch,
    index_batches,
    merge_batches,
    set_epoch,
    skip_samples,
)
from duoka.data.position import LocalBatch
from duoka.data.rng import IsolatedRng
from duoka.data.sample_fetch import FetchRequest, identity_collate, loader_like, make_fetcher
from duoka.data.shuffle_reset import restore_shuffled_lists
from duoka.data.sources.base import BatchSource, ShardSpec, order_seed, samples_seed
from duoka.utils.torch_private import stop_dataloader_workers, take_dataloader_iterator


def has_index_batches(loader: DataLoader[Any]) -> bool:
    """Whether ``loader`` draws batches of indices; without batching, an index stands for a ready-made batch."""
    return loader.batch_sampler is not None or isinstance(loader.sampler, BatchSampler)


class _RequestSampler(Sampler[FetchRequest]):
    """A batch sampler that yields the requests of the current epoch."""

    requests: Iterator[FetchRequest]

    def __iter__(self) -> Iterator[FetchRequest]:
        return self.requests


class MapStyleSource(BatchSource):
    """Local batches of a map-style ``loader``, loaded by a new DataLoader with the user's options."""

    def __init__(self, loader: DataLoader[Any], spec: ShardSpec) -> None:
        self._spec = spec
        self._batches: Any = index_batches(loader)
        self._drop_last = spec.training and (loader.drop_last or getattr(self._batches, "drop_last", False) is True)
        self._owners = (loader, self._batches, getattr(self._batches, "sampler", None))
        self._generators = generators_used_by(self._batches)
        self._dataset = loader.dataset
        dataset_collates = loader.batch_sampler is None  # the sampler yields lists; dataset[list] is a ready-made batch
        self._fetcher = make_fetcher(loader.dataset, loader.collate_fn, dataset_collates)
        self._is_direct = not loader.num_workers and not loader.pin_memory
        self._sampler, self._generator = _RequestSampler(), torch.Generator()
        self._loader = loader_like(
            loader, self._fetcher, self._generator, batch_sampler=self._sampler, collate_fn=identity_collate
        )
        self.samples = self._count_samples()

    def _count_samples(self) -> int | None:
        """Return the number of samples in an epoch, if it is known without drawing."""
        if type(self._batches) is not BatchSampler:
            return None
        try:
            length = len(self._batches.sampler)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None
        unit = self._batches.batch_size * (self._spec.batches_per_step if self._drop_last else 1)
        return length // unit * unit if self._batches.drop_last else length

    def __len__(self) -> int:
        batches, per_step = len(self._batches), self._spec.batches_per_step
        return batches // per_step if self._drop_last else -(-batches // per_step)

    def epoch(self, seed: int, epoch: int, skip: int) -> Iterator[LocalBatch]:
        """Yield the local batches of ``epoch``, without loading the first ``skip`` samples."""
        self._generator.manual_seed(samples_seed(seed, epoch))
        sizes: deque[LocalBatch] = deque()  # without the samples, which are loaded later
        requests = self._sampler.requests = self._requests(seed, epoch, skip, sizes)
        # without workers and pinning, the fetcher is called directly, which saves the DataLoader's overhead
        batches = map(self._fetcher.load, requests) if self._is_direct else iter(self._loader)
        try:
            for batch in batches:
                while not (size := sizes.popleft()).count and not self._spec.training:
                    yield size
                yield LocalBatch(batch, size.count, size.global_count)
            yield from sizes
        finally:
            if not self._loader.persistent_workers:
                stop_dataloader_workers(batches)
            requests.close()

    def close(self) -> None:
        """Stop persistent worker processes."""
        stop_dataloader_workers(take_dataloader_iterator(self._loader))

    def _requests(
        self, seed: int, epoch: int, skip: int, sizes: deque[LocalBatch]
    ) -> Generator[FetchRequest, None, None]:
        """Yield this rank's requests, and add the numbers of samples of every global batch to ``sizes``."""
        spec, random_epoch = self._spec, self._spec.random_epoch(epoch)
        if spec.training:
            set_epoch(epoch, *self._owners, self._dataset)
        batches = draw_isolated(self._batches, IsolatedRng(order_seed(seed, random_epoch), self._generators))
        stream = samples_seed(seed, random_epoch)
        dataset_epoch = epoch if spec.training and has_set_epoch(self._dataset) else None
        first = skip
        with restore_shuffled_lists(*self._owners[1:]):
            for indices in merge_batches(skip_samples(batches, skip), spec.batches_per_step, self._drop_last):
                length = len(indices)
                start, stop, count = spec.shard(length)
                sizes.append(LocalBatch(None, count, length))
                if start < stop:
                    local = indices if spec.world_size == 1 else indices[start:stop]
                    yield FetchRequest(local, first + start, stream, dataset_epoch)
                first += length
