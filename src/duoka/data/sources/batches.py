"""Source for ready-made batches: every rank reads all batches and keeps its shard of each."""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from duoka.data.batch_ops import batch_length, concat_batches, slice_batch
from duoka.data.index_order import set_epoch
from duoka.data.position import LocalBatch
from duoka.data.rng import GLOBAL, IsolatedRng
from duoka.data.shuffle_reset import restore_shuffled_lists
from duoka.data.sources.base import BatchSource, ShardSpec, order_seed
from duoka.data.stream_fingerprint import fingerprint
from duoka.data.user_generators import generators_of, with_wrapped
from duoka.errors import DataError
from duoka.utils.torch_private import stop_dataloader_workers, take_dataloader_iterator

SizedBatch = tuple[Any, int]
"""A batch and its number of samples."""
_END: Any = object()


class BatchIterableSource(BatchSource):
    """Local batches of any iterable of batches; the iterable draws random numbers in isolation."""

    def __init__(
        self,
        loader: Any,
        spec: ShardSpec,
        owners: tuple[object, ...] = (),
        begin: Callable[[int, int], None] | None = None,
        has_columns: bool = False,
    ) -> None:
        """Read ``loader`` (or the generator function) once an epoch.

        ``owners`` are further objects that may hold generators or have ``set_epoch``. ``begin(seed, epoch)`` is called
        before each epoch of a loader that draws nothing in this process. ``has_columns`` is ``slice_batch``'s.
        """
        self._loader = loader
        self._spec = spec
        self._owners = (loader, *owners)
        self._generators = (*GLOBAL, *generators_of(*self._owners))
        self._begin = begin
        self._has_columns = has_columns
        self._is_list = isinstance(loader, (list, tuple))
        self._has_yielded = False
        self._drop_last = spec.training and getattr(loader, "drop_last", False) is True
        if self._is_list:
            self.samples = sum(map(batch_length, loader))

    def __len__(self) -> int:
        batches, per_step = len(self._loader), self._spec.batches_per_step
        return batches // per_step if self._drop_last else -(-batches // per_step)

    def epoch(self, seed: int, epoch: int, skip: int) -> Iterator[LocalBatch]:
        """Yield the local batches of ``epoch``; the first ``skip`` samples are read and dropped."""
        if self._spec.training:
            set_epoch(epoch, *self._owners)
        epoch = self._spec.random_epoch(epoch)
        if self._begin is not None:
            self._begin(seed, epoch)
        draws_here = self._begin is None and not self._is_list
        isolated = IsolatedRng(order_seed(seed, epoch), self._generators) if draws_here else contextlib.nullcontext()
        batches = self._read(isolated)
        owners = () if self._is_list else with_wrapped(*self._owners)
        with restore_shuffled_lists(*owners), contextlib.closing(batches):
            yield from self._local_batches(_skip_samples(batches, skip, self._has_columns))

    def close(self) -> None:
        """Stop worker processes that the loader kept."""
        if isinstance(self._loader, DataLoader):
            stop_dataloader_workers(take_dataloader_iterator(self._loader))

    def _read(self, isolated: contextlib.AbstractContextManager[None]) -> Any:
        """Yield the loader's batches; its code runs inside ``isolated``."""
        with isolated:
            iterator = iter(self._loader() if inspect.isgeneratorfunction(self._loader) else self._loader)
        try:
            while True:
                with isolated:
                    batch = next(iterator, _END)
                if batch is _END:
                    return
                yield batch
        finally:
            if not getattr(self._loader, "persistent_workers", False):
                stop_dataloader_workers(iterator)

    def _local_batches(self, batches: Iterator[SizedBatch]) -> Iterator[LocalBatch]:
        spec, self.fingerprint = self._spec, None
        not_empty = self._require_again((batch, length) for batch, length in batches if length)
        while group := list(itertools.islice(not_empty, spec.batches_per_step)):
            if len(group) < spec.batches_per_step and self._drop_last:
                return
            if self.fingerprint is None and spec.world_size > 1:
                self.fingerprint = fingerprint([batch for batch, _ in group])
            total = sum(length for _, length in group)
            start, stop, count = spec.shard(total)
            yield LocalBatch(_take(group, start, stop, self._has_columns) if start < stop else None, count, total)

    def _require_again(self, batches: Iterator[SizedBatch]) -> Iterator[SizedBatch]:
        """Yield ``batches``; raise ``DataError`` if there are none, although there were some in an earlier epoch."""
        count = 0
        for count, batch in enumerate(batches, 1):  # noqa: B007 - used after the loop
            self._has_yielded = True
            yield batch
        if not count and self._has_yielded and isinstance(self._loader, Iterator):
            raise DataError(
                f"{type(self._loader).__name__} yields no batch in a second epoch: its __iter__ returns the object itself, "
                "which does not start anew after StopIteration. Set it back before raising StopIteration, or let __iter__ "
                "be a generator"
            )


def _skip_samples(batches: Iterable[Any], skip: int, has_columns: bool) -> Iterator[SizedBatch]:
    """Yield ``batches`` with their lengths, without the first ``skip`` samples."""
    for batch in batches:
        length = batch_length(batch)
        if skip >= length:
            skip -= length
            continue
        yield slice_batch(batch, skip, length, length, has_columns=has_columns), length - skip
        skip = 0


def _take(group: list[SizedBatch], start: int, stop: int, has_columns: bool) -> Any:
    """Return samples ``start`` to ``stop`` of the concatenated batches of ``group``."""
    pieces, first = [], 0
    for batch, length in group:
        low, high = max(start - first, 0), min(stop - first, length)
        if low < high:
            pieces.append(slice_batch(batch, low, high, length, has_columns=has_columns))
        first += length
    return concat_batches(pieces, has_columns=has_columns)
