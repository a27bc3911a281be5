"""Loading and collation of a map-style data set's samples, in this process or in a worker, with a seed for each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, default_collate, get_worker_info

from duoka.data.counter_rng import seed_at
from duoka.data.index_order import set_epoch
from duoka.data.rng import Rng, global_rngs
from duoka.data.user_generators import generators_of
from duoka.data.worker_pickle import PickledByValue, wrap_result
from duoka.utils.signals import ignore_first_signals
from duoka.utils.torch_private import set_worker_dataset

T = TypeVar("T")
Collate = Callable[[Any], Any]


class FetchRequest(NamedTuple):
    """The samples that a rank loads for one step."""

    indices: Sequence[Any]
    """The indices of this rank's samples."""
    first: int
    """The place of the first of them in the epoch."""
    stream: int
    """The stream of the samples' seeds: a function of (seed, epoch)."""
    epoch: int | None
    """The epoch for a data set with ``set_epoch``, or ``None``."""


def make_fetcher(dataset: Any, collate: Collate, dataset_collates: bool) -> SampleFetcher:
    """Return the fetcher for ``dataset``; with ``dataset_collates``, ``dataset[indices]`` is a ready-made batch."""
    if not dataset_collates and collate is default_collate and _draws_nothing(dataset):
        return _TensorFetcher(dataset) if _has_plain_rows(dataset) else SampleFetcher(dataset)
    return _SeededFetcher(dataset, collate, dataset_collates)


def loader_like(loader: DataLoader[Any], dataset: Any, generator: torch.Generator, **options: Any) -> DataLoader[Any]:
    """Return a DataLoader over ``dataset`` with the workers of ``loader``, which ``generator`` seeds, not the user's own."""
    workers = loader.num_workers
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout if workers else 0,
        worker_init_fn=WorkerInit(loader.worker_init_fn) if workers else None,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
        generator=generator,
        prefetch_factor=loader.prefetch_factor if workers else None,
        persistent_workers=loader.persistent_workers,
        **options,
    )


def identity_collate(batch: Any) -> Any:
    """Return ``batch``; the fetcher has already collated it."""
    return batch


class WorkerInit(PickledByValue):
    """A ``worker_init_fn`` that calls the user's own with the user's data set in ``get_worker_info()``."""

    def __init__(self, function: Callable[[int], None] | None) -> None:
        self._function = function

    def __call__(self, worker: int) -> None:
        """Run in worker process ``worker`` before it loads anything.

        A lost terminal or Slurm signals all processes. The training process then saves before it ends its workers.
        """
        ignore_first_signals()
        info: Any = get_worker_info()
        set_worker_dataset(info.dataset.dataset)
        if self._function is not None:
            self._function(worker)


def _draws_nothing(dataset: Any) -> bool:
    """Whether loading certainly draws no random number: tensors, and subsets and concatenations of them."""
    if type(dataset) is Subset:
        return _draws_nothing(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(_draws_nothing(part) for part in dataset.datasets)
    return type(dataset) is TensorDataset


def _has_plain_rows(dataset: Any) -> bool:
    if type(dataset) is Subset:
        return _has_plain_rows(dataset.dataset)
    return type(dataset) is TensorDataset and all(
        type(tensor) is torch.Tensor and tensor.layout == torch.strided and tensor.is_contiguous()
        for tensor in dataset.tensors
    )


class SampleFetcher(PickledByValue, Dataset[Any]):
    """A data set that returns the collated batch of a request, for samples without random numbers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, request: FetchRequest) -> Any:
        """Return the batch to a DataLoader, in this process or in a worker."""
        return wrap_result(lambda: self.load(request))

    def load(self, request: FetchRequest) -> Any:
        """Return the collated batch."""
        return default_collate([self.dataset[index] for index in request.indices])


class _TensorFetcher(SampleFetcher):
    """Tensors or a subset of them: indexes all rows of a batch at once, with the same result as collating rows."""

    def load(self, request: FetchRequest) -> Any:
        dataset: Any = self.dataset
        indices = request.indices
        while type(dataset) is Subset:
            dataset, indices = dataset.dataset, [dataset.indices[index] for index in indices]
        is_numbers = type(indices[0]) is int  # through NumPy numbers are five times as fast, tensors slower
        rows = torch.from_numpy(np.array(indices)) if is_numbers else torch.tensor(indices)
        return [tensor[rows] for tensor in dataset.tensors]


class _SeededFetcher(SampleFetcher):
    """Any data set; the random numbers of a sample are a function of (seed, epoch, place in the epoch).

    A data set that loads many samples at once (``__getitems__``) does so until it draws random numbers. From then on it
    loads one sample at a time, because draws for a whole shard would depend on the number of devices.
    """

    def __init__(self, dataset: Any, collate: Collate, dataset_collates: bool) -> None:
        super().__init__(dataset)
        self._collate = SeededCollate(collate)
        self._dataset_collates = dataset_collates
        self._loads_many = not dataset_collates and _loads_many(dataset)
        self._detector = RandomUseDetector(generators_of(dataset))
        self._epoch: int | None = None

    def load(self, request: FetchRequest) -> Any:
        if request.epoch is not None and request.epoch != self._epoch:
            set_epoch(request.epoch, self.dataset)  # also here: a persistent worker has its own copy of the data set
            self._epoch = request.epoch
            self._detector = RandomUseDetector(generators_of(self.dataset))  # set_epoch may have replaced generators
        samples = self._detector.run(lambda: self._load(request))
        return self._collate(samples, request.stream, request.first)

    def _load(self, request: FetchRequest) -> Any:
        if self._dataset_collates:
            self._detector.seed(seed_at(request.stream, request.first))
            return self.dataset[request.indices]
        dataset = self.dataset
        if not self._detector.used:  # if this draws, the detector calls again
            return dataset.__getitems__(request.indices) if self._loads_many else [dataset[i] for i in request.indices]
        samples = []
        for place, index in enumerate(request.indices, request.first):
            self._detector.seed(seed_at(request.stream, place))
            samples.append(dataset.__getitems__([index])[0] if self._loads_many else dataset[index])
        return samples


class SeededCollate:
    """A collation whose random numbers, if any, are a function of (seed, epoch, place of the shard's first sample)."""

    def __init__(self, collate: Collate) -> None:
        self._collate = collate
        self._detector = RandomUseDetector(generators_of(collate))

    def __call__(self, samples: Any, stream: int, first: int) -> Any:
        """Return the collated ``samples``; ``stream`` and ``first`` are those of a ``FetchRequest``."""
        if self._collate is default_collate:
            return _collate_tensors(samples)

        def collate() -> Any:
            self._detector.seed(seed_at(~stream, first))
            return self._collate(samples)

        return self._detector.run(collate)


def _collate_tensors(samples: Any) -> Any:
    """Return ``default_collate(samples)``, with a short cut for tuples of plain tensors."""
    if set(map(type, samples)) == {tuple} and len(set(map(len, samples))) == 1:
        columns = list(zip(*samples, strict=True))
        is_plain = columns and all(set(map(type, column)) == {torch.Tensor} for column in columns)
        if is_plain and get_worker_info() is None:
            return [torch.stack(column) for column in columns]
    return default_collate(samples)


def _loads_many(dataset: Any) -> bool:
    """Whether ``__getitems__`` of ``dataset`` is more than a loop over single samples, as ``Subset``'s may be."""
    if type(dataset) is Subset:
        return _loads_many(dataset.dataset)
    return callable(getattr(dataset, "__getitems__", None))


class RandomUseDetector:
    """Runs a function that may draw random numbers, and seeds only the generators that it draws from.

    Seeding all generators for each sample would take longer than loading many a sample. So a generator is only watched
    until the function draws from it; then the function runs again, and seeds that generator from then on. The user's
    states are restored afterwards.
    """

    def __init__(self, held: Sequence[Rng] = ()) -> None:
        """Watch the global generators, and ``held``, which the user's own objects hold."""
        self.used: list[Rng] = []
        """The generators that were drawn from, which ``seed`` seeds."""
        self._unused: list[Rng] = [*global_rngs(), *held]

    def run(self, function: Callable[[], T]) -> T:
        """Return ``function()``; it is called again if it drew from a generator that was not seeded."""
        while True:
            used = [(rng, rng.isolate()) for rng in self.used]
            unused = [(rng, rng.isolate()) for rng in self._unused]
            try:
                result = function()
            finally:
                drawn_from = [rng for rng, isolated in unused if rng.was_drawn_from(isolated)]
                self.used += drawn_from
                self._unused = [rng for rng in self._unused if rng not in drawn_from]
                for rng, isolated in reversed(used + unused):  # the user may hold a global generator, too
                    rng.restore(isolated)
            if not drawn_from:
                return result

    def seed(self, seed: int) -> None:
        """Seed the generators that were drawn from so far."""
        for rng in self.used:
            rng.seed(seed)
