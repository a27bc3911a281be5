"""Source for a DataLoader over an ``IterableDataset``: every rank reads the same stream and keeps its shard.

Without worker processes a rank collates its own samples only. With worker processes whole batches arrive collated and
are cut, so ``collate_fn`` must return a structure of tensors.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe, default_collate, get_worker_info

from duoka.data.counter_rng import seed_at
from duoka.data.index_order import set_epoch
from duoka.data.position import LocalBatch
from duoka.data.rng import GLOBAL, IsolatedRng
from duoka.data.sample_fetch import SeededCollate, identity_collate, loader_like
from duoka.data.shuffle_reset import restore_shuffled_lists
from duoka.data.sources.base import BatchSource, ShardSpec, order_seed, samples_seed
from duoka.data.sources.batches import BatchIterableSource
from duoka.data.stream_fingerprint import fingerprint
from duoka.data.user_generators import generators_of, with_wrapped
from duoka.data.worker_pickle import PickledByValue, wrap_exception, wrap_result
from duoka.errors import ConfigError
from duoka.utils.torch_private import DataLoaderException


def iterable_source(loader: DataLoader[Any], spec: ShardSpec) -> BatchSource:
    """Return the source for ``loader``, whose data set is an ``IterableDataset``."""
    if loader.num_workers == 0 and loader.batch_size is not None:
        return _InProcessSource(loader, spec)
    if loader.num_workers == 0:
        return BatchIterableSource(loader, spec, (loader.dataset,))
    if isinstance(loader.dataset, IterDataPipe):
        raise ConfigError(
            f"the data pipe {type(loader.dataset).__name__} has num_workers={loader.num_workers}: torch divides it over the "
            "processes of a group, so that ranks would read different streams; set num_workers=0"
        )
    stream, generator = _SeededStream(loader.dataset), torch.Generator()
    batching = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    seeded_loader = loader_like(loader, stream, generator, collate_fn=_WorkerCollate(loader.collate_fn), **batching)

    def begin(seed: int, epoch: int) -> None:
        generator.manual_seed(samples_seed(seed, epoch))
        stream.plan.copy_(torch.tensor([order_seed(seed, epoch) >> 1, epoch], device="cpu"))

    return BatchIterableSource(seeded_loader, spec, (loader.dataset,), begin, loader.collate_fn is default_collate)


class _InProcessSource(BatchSource, IterableDataset[LocalBatch]):
    """Local batches of a stream that this process reads; a rank collates its own samples."""

    def __init__(self, loader: DataLoader[Any], spec: ShardSpec) -> None:
        assert loader.batch_size is not None
        self._dataset: Any = loader.dataset
        self._spec = spec
        self._length = loader.batch_size * spec.batches_per_step
        """The number of samples in a global batch."""
        self._unit = (self._length if spec.training else loader.batch_size) if loader.drop_last else 1
        self._collate = SeededCollate(loader.collate_fn)
        self._generators = (*GLOBAL, *generators_of(loader, loader.dataset))
        self._plan = (0, 0, 0)
        """Seed, epoch and samples to skip of the next iteration."""
        # this DataLoader only pins memory; it returns named tuples as their class
        self._loader = loader_like(loader, self, torch.Generator(), batch_size=None, collate_fn=identity_collate)
        with contextlib.suppress(TypeError, NotImplementedError):  # a data set without length
            self.samples = self._without_incomplete(len(self._dataset))  # type: ignore[arg-type]

    def _without_incomplete(self, length: int) -> int:
        """Return how many of ``length`` samples ``drop_last`` leaves."""
        return length // self._unit * self._unit

    def __len__(self) -> int:
        return -(-self._without_incomplete(len(self._dataset)) // self._length)

    def epoch(self, seed: int, epoch: int, skip: int) -> Iterator[LocalBatch]:
        """Yield the local batches of ``epoch``; the first ``skip`` samples are read and dropped."""
        if self._spec.training:
            set_epoch(epoch, self._dataset)
        self._plan = (seed, self._spec.random_epoch(epoch), skip)
        with restore_shuffled_lists(*with_wrapped(self._dataset)):
            yield from self._loader

    def __iter__(self) -> Iterator[LocalBatch]:
        seed, epoch, first = self._plan
        stream, self.fingerprint = samples_seed(seed, epoch), None
        for group in self._read(IsolatedRng(order_seed(seed, epoch), self._generators), first):
            if self.fingerprint is None and self._spec.world_size > 1:
                self.fingerprint = fingerprint(group)
            start, stop, count = self._spec.shard(len(group))
            batch = self._collate(group[start:stop], stream, first + start) if start < stop else None
            yield LocalBatch(batch, count, len(group))
            first += len(group)

    def _read(self, isolated: IsolatedRng, skip: int) -> Iterator[list[Any]]:
        with isolated:
            samples = iter(self._dataset)
            for _ in itertools.islice(samples, skip):
                pass
        while True:
            with isolated:
                group = list(itertools.islice(samples, self._length))
            if count := self._without_incomplete(len(group)):
                yield group[:count]
            if len(group) < self._length:
                return


class _SeededStream(PickledByValue, IterableDataset[Any]):
    """A user's stream in a worker process; each epoch starts from its own seeds, in persistent workers too.

    A generator that the data set holds starts from the same seed in all workers, which may use it to divide samples.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.plan = torch.zeros(2, dtype=torch.int64, device="cpu")
        """Seed and epoch, in shared memory that running workers see."""
        self.plan.share_memory_()  # type: ignore[no-untyped-call]
        self._held = generators_of(dataset)

    def __iter__(self) -> Iterator[Any]:
        try:
            info: Any = get_worker_info()
            seed, epoch = self.plan.tolist()
            for rng in GLOBAL:
                rng.seed(seed_at(seed, info.id))
            for rng in self._held:
                rng.seed(seed)
            set_epoch(epoch, self.dataset)
            with restore_shuffled_lists(*with_wrapped(self.dataset)):
                yield from self.dataset
        except Exception:
            yield from itertools.repeat(wrap_exception())  # for the collation, which returns it

    def __len__(self) -> int:
        return len(self.dataset)


class _WorkerCollate(PickledByValue):
    """A user's collation in a worker process."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: Any) -> Any:
        last = samples[-1] if type(samples) is list and samples else samples
        return wrap_result(lambda: last if isinstance(last, DataLoaderException) else self._collate(samples))
