"""Any loader as one rank's shard of each global batch: with a position to resume from, or as plain batches (``shard``)."""

import contextlib
import inspect
import itertools
import weakref
from collections.abc import Generator, Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from duoka.data.index_order import whole_sampler
from duoka.data.position import DataPosition, LocalBatch
from duoka.data.resident_loader import DeviceResidentLoader, ResidentSource
from duoka.data.sources.base import BatchSource, ShardSpec
from duoka.data.sources.batches import BatchIterableSource
from duoka.data.sources.iterable import iterable_source
from duoka.data.sources.map_style import MapStyleSource, has_index_batches
from duoka.data.stream_fingerprint import StreamFingerprint, require_same_stream
from duoka.errors import ConfigError, DataError
from duoka.utils.torch_private import DataLoaderIterator
from duoka.world import World, current_world


class ShardedLoader:
    """A loader of one rank's ``LocalBatch``es, equally many on every rank; one iteration is one epoch."""

    def __init__(self, source: BatchSource, seed: int) -> None:
        self._source = source
        self._seed = seed
        self._epoch = 0
        self._samples = 0
        self._has_begun = False
        self._iterator: weakref.ref[Generator[LocalBatch, None, None]] | None = None

    def __iter__(self) -> Iterator[LocalBatch]:
        self._close_iterator()
        batches = self._iterate()
        self._iterator = weakref.ref(batches)
        return batches

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch; ``TypeError`` if the user's loader has no length."""
        return len(self._source)

    @property
    def samples_per_epoch(self) -> int | None:
        """The number of samples in a whole epoch over all ranks; ``None`` if only reading them would tell."""
        return self._source.samples

    @property
    def fingerprint(self) -> StreamFingerprint | None:
        """The first samples read of a stream, which are the same on all ranks; ``None`` for map-style data."""
        return self._source.fingerprint

    @property
    def position(self) -> DataPosition:
        """The place after the batches taken from the iterator; batches that workers have prefetched do not count."""
        return DataPosition(self._seed, self._epoch, self._samples)

    def set_position(self, position: DataPosition) -> None:
        """Let the next iteration continue at ``position``, which any number of ranks may have saved.

        Earlier samples of map-style data are not loaded; those of other sources are read and dropped.
        ``position.seed`` replaces the loader's seed.
        """
        self._close_iterator()
        self._seed, self._epoch, self._samples = position.seed, position.epoch, position.samples
        self._has_begun = False

    def close(self) -> None:
        """Stop the running iteration and all worker processes; the loader can be iterated again."""
        self._close_iterator()
        self._source.close()

    def _iterate(self) -> Generator[LocalBatch, None, None]:
        if self._has_begun:  # an epoch that was left early has ended
            self._epoch, self._samples = self._epoch + 1, 0
        self._has_begun = True
        with contextlib.closing(self._source.epoch(self._seed, self._epoch, self._samples)) as batches:  # type: ignore[type-var]
            for batch in batches:
                self._samples += batch.global_count
                yield batch
        self._epoch, self._samples, self._has_begun = self._epoch + 1, 0, False

    def _close_iterator(self) -> None:
        iterator = self._iterator() if self._iterator is not None else None
        if iterator is not None:
            iterator.close()
        self._iterator = None


def local_batches(
    loader: Any, *, rank: int, world_size: int, seed: int, batches_per_step: int = 1, training: bool = True
) -> ShardedLoader:
    """Return rank ``rank``'s shard of each global batch of ``loader``, for ``world_size`` ranks.

    The sample order is a function of (seed, epoch): samplers and loaders draw in isolation, and the process's generators
    keep their states. A ``torch.Generator`` (or NumPy's, or ``random.Random``) that a sampler, loader, data set,
    transform or collation holds as an attribute is seeded at each epoch, or at each sample of map-style data. The seed
    combines ``seed`` with the generator's first state, which must be the same on every rank and after a resume.

    Not supported: generators held otherwise (in a list, a closure, a global variable) or created during loading; their
    draws differ between ranks. A list or array that a sampler, stream or loader shuffles in place is restored after the
    epoch. Other state that changes from epoch to epoch restarts after a resume: derive it in ``set_epoch(epoch)``.

    A rank loads its own samples of map-style data only. Every rank reads a whole stream (``IterableDataset``), a whole
    loader of ready-made batches, and map-style data with ``batch_size=None`` whose sampler is no ``BatchSampler``.

    A map-style data set loads the samples of a batch twice when it first draws from a generator in that batch. With
    ``batch_size=None``, and in ``collate_fn``, random numbers belong to a rank's shard and not to each sample.

    Args:
        loader: a ``DataLoader`` of any kind, or any iterable (or generator function) of ready-made batches.
        rank: this process's number, from 0.
        world_size: the number of processes that share each global batch.
        seed: the source of the sample order and the augmentation; the same on every rank.
        batches_per_step: how many consecutive batches of ``loader`` make one global batch.
        training: a rank without samples gets a filler (``True``) or ``None``. Evaluation also uses the same order and
            augmentation every time, and keeps an incomplete global batch whatever ``drop_last`` says.

    Raises:
        ConfigError: ``loader`` is no loader, or has a sampler that divides the samples in an unknown way.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> loader = DataLoader(TensorDataset(torch.arange(5)), batch_size=5)
    >>> [next(iter(local_batches(loader, rank=rank, world_size=2, seed=0))).batch for rank in range(2)]
    [[tensor([0, 1, 2])], [tensor([3, 4])]]

    """
    return ShardedLoader(_source(loader, ShardSpec(rank, world_size, batches_per_step, training)), seed)


class RankLoader:
    """A loader of this rank's part of each batch of another loader, for the processes of ``current_world()``.

    Every rank iterates over it, equally often. It divides when it is iterated, so it may be created before
    ``duoka.launch`` and passed to the launched function.
    """

    def __init__(self, loader: Any, seed: int, training: bool) -> None:
        self._loader, self._seed, self._training = loader, seed, training
        self._epoch = 0
        self._divided: tuple[World, ShardedLoader] | None = None
        self.loss_scale = 1.0
        """Factor for a mean over the latest part, so that the average of all ranks is the mean over the whole batch.

        It is 1 if all ranks have equally many samples, and 0 where this rank has none.
        """
        _source(loader, ShardSpec(0, 1, 1, training))  # raises for what is no loader

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's parts of one epoch; the next iteration is the next epoch."""
        world, sharded = self._divide()
        epoch, self._epoch = self._epoch, self._epoch + 1
        sharded.set_position(DataPosition(self._seed, epoch))
        batches = iter(sharded)
        first = next(batches, None)  # every rank reads a whole stream, so the first samples must be the same
        epochs, fingerprints = zip(*world.all_gather_object((epoch, sharded.fingerprint)), strict=True)
        if len(set(epochs)) > 1:
            raise DataError(
                f"ranks begin different epochs of the loader ({', '.join(map(str, epochs))} by rank); iterate over it equally "
                "often on every rank"
            )
        require_same_stream(fingerprints, type(self._loader).__name__)
        for local in itertools.chain(() if first is None else (first,), batches):
            if local.batch is not None:
                self.loss_scale = local.count * world.size / local.global_count
                yield local.batch

    def __len__(self) -> int:
        """Return the number of batches in an epoch; ``TypeError`` if the loader has no length."""
        return len(self._divide()[1])

    def close(self) -> None:
        """Stop all worker processes; the loader can be iterated again."""
        if self._divided is not None:
            self._divided[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_divided": None}

    def _divide(self) -> tuple[World, ShardedLoader]:
        world = current_world()
        if self._divided is None or self._divided[0] != world:
            self.close()
            options: dict[str, Any] = {"rank": world.rank, "world_size": world.size, "training": self._training}
            self._divided = world, local_batches(self._loader, seed=self._seed, **options)
        return self._divided


def shard(loader: Any, *, seed: int = 0, training: bool = True) -> RankLoader:
    """Return this rank's part of every batch of ``loader``: what all ranks have together is what one process would have.

    For loops of your own in ``duoka.launch`` or under torchrun. Rank and size are those of ``duoka.current_world()``:
    of ``torch.distributed`` if it is initialized, else a world of one process. Each iteration is one epoch, and the
    loader's batch size is that of all ranks together. Leave out ``DistributedSampler`` and ``set_epoch``. The rules of
    ``local_batches`` for samplers and generators hold here, too.

    Args:
        loader: a ``DataLoader`` of any kind, or any iterable (or generator function) of batches.
        seed: the source of the sample order and the augmentation; the same on every rank.
        training: what a rank gets of a batch with fewer samples than ranks, if none is left for it. ``True``: a copy of
            the first sample, so that all ranks take equally many steps. ``False``: nothing, so that each sample counts
            once. Without training, the order is the same in every epoch.

    Returns:
        An iterable of batches on the host. Where a batch does not divide evenly, multiply the mean loss of a part by its
        ``loss_scale``: the average that DDP takes is then exactly the mean over the batch.

    Raises:
        ConfigError: ``loader`` is no loader, or has a sampler that divides the samples in an unknown way.
        DataError: while iterating, if ranks read different streams.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> batches = shard(DataLoader(TensorDataset(torch.arange(5)), batch_size=2))
    >>> [batch[0].tolist() for batch in batches]  # of one process
    [[0, 1], [2, 3], [4]]

    """
    return RankLoader(loader, seed, training)


def _source(loader: Any, spec: ShardSpec) -> BatchSource:
    if isinstance(loader, DeviceResidentLoader):
        return ResidentSource(loader, spec)
    if isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__:
        if isinstance(loader.dataset, IterableDataset):
            return iterable_source(loader, spec)
        if has_index_batches(loader):
            return MapStyleSource(loader, spec)
        if whole_sampler(loader.sampler, loader.dataset) is not loader.sampler:
            raise ConfigError(
                "a DataLoader with batch_size=None has a DistributedSampler; leave the sampler out, duoka divides the batches"
            )
        return BatchIterableSource(loader, spec, (loader.sampler, loader.dataset))
    if inspect.isgeneratorfunction(loader):
        return BatchIterableSource(loader, spec)
    name = type(loader).__name__
    if isinstance(loader, Dataset):
        raise ConfigError(
            f"{name} is a data set, which yields samples and no batches; wrap it: "
            f"torch.utils.data.DataLoader({name.lower()}, batch_size=32, shuffle=True)"
        )
    if isinstance(loader, Iterator) and not _may_start_anew(loader):
        raise ConfigError(
            f"{name} is an iterator, which ends after one epoch; pass the list, the loader or the generator function "
            "that it was made from"
        )
    if isinstance(loader, (str, bytes, dict, torch.Tensor)) or not isinstance(loader, Iterable):
        raise ConfigError(
            f"{name} is no loader; pass a torch.utils.data.DataLoader, or an iterable that yields batches of tensors"
        )
    return BatchIterableSource(loader, spec)


def _may_start_anew(iterator: Iterator[Any]) -> bool:
    """Return whether an iterator may begin again after its end: a user's class may, Python's and torch's own never do."""
    return isinstance(type(iterator).__next__, FunctionType) and not isinstance(iterator, DataLoaderIterator)
