"""``shard``: any loader, seen as this rank's part of each global batch, with a position to continue from."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from duoka.data.index_order import checked_sampler
from duoka.data.kept import ResidentSource
from duoka.data.position import DataPosition, LocalBatch
from duoka.data.resident_loader import DeviceResidentLoader
from duoka.data.sources.base import BatchSource, ShardSpec
from duoka.data.sources.batches import BatchIterableSource
from duoka.data.sources.iterable import streamed_source
from duoka.data.sources.map_style import MapStyleSource, is_mapped
from duoka.data.stream_fingerprint import StreamFingerprint
from duoka.errors import ConfigError

__all__ = ["ShardedLoader", "shard"]


class ShardedLoader:
    """Iterating it is one epoch of this rank's ``Part``s; every rank yields as many. Built by ``shard``."""

    def __init__(self, source: BatchSource, seed: int) -> None:
        self._source = source
        self._seed = seed
        self._epoch = 0
        self._samples = 0
        self._begun = False
        self._running: weakref.ref[Generator[LocalBatch, None, None]] | None = None

    def __iter__(self) -> Iterator[LocalBatch]:
        self._end_running()
        parts = self._parts()
        self._running = weakref.ref(parts)
        return parts

    def __len__(self) -> int:
        """Return how many parts a whole epoch has; ``TypeError`` where the loader does not know either."""
        return len(self._source)

    @property
    def samples_per_epoch(self) -> int | None:
        """How many samples all ranks together take in a whole epoch, or ``None`` where only reading them would tell."""
        return self._source.samples

    @property
    def fingerprint(self) -> StreamFingerprint | None:
        """What this rank has read first in the epoch, where every rank reads the whole stream: the same on all ranks."""
        return self._source.fingerprint

    @property
    def position(self) -> DataPosition:
        """Where the next part begins: after the parts that were taken from the iterator, whatever workers have prefetched."""
        return DataPosition(self._seed, self._epoch, self._samples)

    def set_position(self, position: DataPosition) -> None:
        """Let the next iteration continue at ``position``, which was saved on any number of ranks.

        What came before is not loaded from map-style data, and read and dropped from other sources. ``position.seed``
        replaces the loader's own.
        """
        self._end_running()
        self._seed, self._epoch, self._samples = position.seed, position.epoch, position.samples
        self._begun = False

    def close(self) -> None:
        """End the iteration in progress and all worker processes; the loader can be iterated again."""
        self._end_running()
        self._source.close()

    def _parts(self) -> Generator[LocalBatch, None, None]:
        if self._begun:  # an epoch that was left early is over
            self._epoch, self._samples = self._epoch + 1, 0
        self._begun = True
        with contextlib.closing(self._source.epoch(self._seed, self._epoch, self._samples)) as parts:  # type: ignore[type-var]
            for part in parts:
                self._samples += part.global_count
                yield part
        self._epoch, self._samples, self._begun = self._epoch + 1, 0, False

    def _end_running(self) -> None:
        running = self._running() if self._running is not None else None
        if running is not None:
            running.close()
        self._running = None


def shard(
    loader: Any, *, rank: int, world_size: int, seed: int, batches_per_step: int = 1, training: bool = True
) -> ShardedLoader:
    """Return rank ``rank``'s part of each global batch of ``loader``, for ``size`` ranks.

    The order is a function of (seed, epoch), whatever draws it: samplers and loaders run with generators of their own, and
    the process's generators stay as they were. A ``torch.Generator`` (or NumPy's, or ``random.Random``) that a sampler,
    loader, data set, transform or collation holds as an attribute starts each epoch, or each sample of map-style data, from
    ``seed`` mixed with the state it was given, which must be the same on every rank and after a resume. One that is held
    otherwise (in a list, a closure, a global variable) or made while samples are loaded is not known: its draws differ.
    A list or array that a sampler, stream or loader shuffles in place is put back after the epoch; other state that it
    carries from epoch to epoch is not known either, and begins anew after a resume: derive it in ``set_epoch(epoch)``.
    Of map-style data a rank loads its own samples only; a stream (``IterableDataset``) or a loader of ready-made batches is
    read whole by every rank, and so is a map-style data set with ``batch_size=None`` whose sampler is no ``BatchSampler``.

    A map-style data set may be asked again for the samples of a batch in which it draws from a generator for the first
    time; with ``batch_size=None`` or in ``collate_fn`` randomness belongs to a rank's part, not to each sample.

    Args:
        loader: a ``DataLoader`` of any kind, or any iterable (or generator function) that yields ready-made batches.
        rank: this process's number, from 0.
        world_size: how many processes divide each global batch.
        seed: what the order of the samples and their augmentation are drawn from; the same on every rank.
        batches_per_step: how many consecutive batches of ``loader`` make one global batch.
        training: where a rank has no sample, whether it gets a filler (``True``) or ``None``; evaluation also draws the
            same order and augmentation every time, and keeps an incomplete global batch whatever ``drop_last`` says.

    Raises ``ConfigError`` for what is no loader, or a sampler that already divides the samples in an unknown way.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> loader = DataLoader(TensorDataset(torch.arange(5)), batch_size=5)
    >>> [shard(loader, rank=rank, world_size=2, seed=0).__iter__().__next__().batch for rank in range(2)]
    [[tensor([0, 1, 2])], [tensor([3, 4])]]

    """
    spec = ShardSpec(rank, world_size, batches_per_step, training)
    return ShardedLoader(_source(loader, spec), seed)


def _source(loader: Any, spec: ShardSpec) -> BatchSource:
    if isinstance(loader, DeviceResidentLoader):
        return ResidentSource(loader, spec)
    if isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__:
        if isinstance(loader.dataset, IterableDataset):
            return streamed_source(loader, spec)
        if is_mapped(loader):
            return MapStyleSource(loader, spec)
        return BatchIterableSource(loader, spec, (checked_sampler(loader), loader.dataset))
    if not inspect.isgeneratorfunction(loader):
        _check_is_loader(loader)
    return BatchIterableSource(loader, spec)


def _check_is_loader(loader: Any) -> None:
    name = type(loader).__name__
    if isinstance(loader, Dataset):
        raise ConfigError(
            f"{name} is a data set, which yields samples and no batches; wrap it: "
            f"torch.utils.data.DataLoader({name.lower()}, batch_size=32, shuffle=True)"
        )
    if isinstance(loader, Iterator):
        raise ConfigError(
            f"{name} is an iterator, which is used up after one epoch; give the list, the loader or the generator function "
            "that it was made from"
        )
    if isinstance(loader, (str, bytes, dict, torch.Tensor)) or not isinstance(loader, Iterable):
        raise ConfigError(
            f"{name} is no loader; give a torch.utils.data.DataLoader, or an iterable that yields batches of tensors"
        )
