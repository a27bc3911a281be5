"""What loads the samples of a map-style data set, here or in a worker process: each sample under a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, default_collate, get_worker_info

from duoka.data.index_order import set_epoch
from duoka.data.rng import RandomUseDetector, derive_seed, generators_of
from duoka.data.worker_pickle import PickledByValue, wrap_result

__all__ = ["FetchRequest", "SampleFetcher", "SeededCollate", "WorkerInit", "identity_collate", "make_fetcher"]

Collate = Callable[[Any], Any]


class FetchRequest(NamedTuple):
    """What one step asks the data set for."""

    indices: Sequence[Any]
    """The indices of this rank's samples."""
    first: int
    """The place in the epoch of the first of them."""
    stream: int
    """What the samples' seeds are drawn from: a function of (seed, epoch)."""
    epoch: int | None
    """The epoch that a data set with ``set_epoch`` is epoch_for_dataset, or ``None``."""


def make_fetcher(dataset: Any, collate: Collate, whole: bool) -> SampleFetcher:
    """Return what answers ``Request``s with collated batches; ``whole`` asks ``dataset[indices]`` for a ready batch."""
    if not whole and collate is default_collate and _draws_nothing(dataset):
        return _TensorRows(dataset) if _has_plain_rows(dataset) else _PlainFetcher(dataset)
    return _SeededFetcher(dataset, collate, whole)


def identity_collate(batch: Any) -> Any:
    """Return ``batch``: the collation of a loader whose data set collates."""
    return batch


class WorkerInit(PickledByValue):
    """The ``worker_init_fn``: shows the user's own function the user's own data set, as it would be without duoka."""

    def __init__(self, function: Callable[[int], None] | None) -> None:
        self._function = function

    def __call__(self, worker: int) -> None:
        """Run in worker process ``worker`` before it loads anything."""
        info: Any = get_worker_info()
        assert info is not None
        object.__setattr__(info, "dataset", info.dataset.dataset)  # torch refuses a plain assignment
        if self._function is not None:
            self._function(worker)


def _draws_nothing(dataset: Any) -> bool:
    """Whether loading from ``dataset`` surely draws no random number: tensors, and parts and chains of these."""
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
    """Base: a data set that answers requests."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, request: FetchRequest) -> Any:
        """Answer a DataLoader, here or in a worker process."""
        return wrap_result(lambda: self.load(request))

    def load(self, request: FetchRequest) -> Any:
        """Return the collated batch."""
        raise NotImplementedError


class _TensorRows(SampleFetcher):
    """Tensors, or a subset of them: all rows of a batch are taken at once, as collating them one by one would yield."""

    def load(self, request: FetchRequest) -> Any:
        dataset: Any = self.dataset
        indices = request.indices
        while type(dataset) is Subset:
            dataset, indices = dataset.dataset, [dataset.indices[index] for index in indices]
        is_numbers = type(indices[0]) is int  # NumPy is five times as fast with those, and slower with tensors
        rows = torch.from_numpy(np.array(indices)) if is_numbers else torch.tensor(indices)
        return [tensor[rows] for tensor in dataset.tensors]


class _PlainFetcher(SampleFetcher):
    """A data set without randomness."""

    def load(self, request: FetchRequest) -> Any:
        return default_collate([self.dataset[index] for index in request.indices])


class _SeededFetcher(SampleFetcher):
    """Any data set: a sample's randomness is a function of (seed, epoch, place in the epoch).

    A data set that loads many samples at once (``__getitems__``) does so until it is seen to draw random numbers; from then
    on it is asked for one at a time, since no draw for a whole part could be the same on another number of devices.
    """

    def __init__(self, dataset: Any, collate: Collate, whole: bool) -> None:
        super().__init__(dataset)
        self._collate = SeededCollate(collate)
        self._whole = whole
        self._many_at_once = not whole and _loads_many(dataset)
        self._loading = RandomUseDetector(generators_of(dataset))
        self._epoch: int | None = None

    def load(self, request: FetchRequest) -> Any:
        if request.epoch is not None and request.epoch != self._epoch:
            set_epoch(request.epoch, self.dataset)  # here too: a worker that stays has a data set of its own
            self._epoch = request.epoch
            self._loading = RandomUseDetector(generators_of(self.dataset))  # it may have made its generators anew
        samples = self._loading.run(lambda: self._load(request))
        return self._collate(samples, request.stream, request.first)

    def _load(self, request: FetchRequest) -> Any:
        if self._whole:
            self._loading.seed(derive_seed(request.stream, request.first))
            return self.dataset[request.indices]
        dataset = self.dataset
        if not self._loading.used:  # nothing is drawn so far; else the watch calls again
            many = self._many_at_once
            return dataset.__getitems__(request.indices) if many else [dataset[index] for index in request.indices]
        return [self._one(index, request.stream, place) for place, index in enumerate(request.indices, request.first)]

    def _one(self, index: Any, stream: int, place: int) -> Any:
        self._loading.seed(derive_seed(stream, place))
        return self.dataset.__getitems__([index])[0] if self._many_at_once else self.dataset[index]


class SeededCollate:
    """A collation whose randomness, if any, is a function of (seed, epoch, place of the part's first sample)."""

    def __init__(self, collate: Collate) -> None:
        self._collate = collate
        self._watch = RandomUseDetector(generators_of(collate))

    def __call__(self, samples: Any, stream: int, first: int) -> Any:
        """Return ``samples`` collated; ``stream`` and ``first`` are those of a ``Request``."""
        if self._collate is default_collate:
            return _collated(samples)
        return self._watch.run(lambda: self._seeded(samples, derive_seed(~stream, first)))

    def _seeded(self, samples: Any, seed: int) -> Any:
        self._watch.seed(seed)
        return self._collate(samples)


def _collated(samples: Any) -> Any:
    """Return ``default_collate(samples)``, of tuples of plain tensors without its search for what each of them is."""
    if set(map(type, samples)) == {tuple} and len(set(map(len, samples))) == 1:
        columns = list(zip(*samples, strict=True))
        if (
            columns
            and get_worker_info() is None
            and all(set(map(type, column)) == {torch.Tensor} for column in columns)
        ):
            return [torch.stack(column) for column in columns]
    return default_collate(samples)


def _loads_many(dataset: Any) -> bool:
    """Whether ``dataset`` has a ``__getitems__`` that is more than a loop over single samples, as ``Subset``'s may be."""
    if type(dataset) is Subset:
        return _loads_many(dataset.dataset)
    return callable(getattr(dataset, "__getitems__", None))
