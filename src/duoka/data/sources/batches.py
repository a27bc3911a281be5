"""Parts of a source that yields ready-made batches: every rank reads the same batches and keeps its part of each."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from duoka.data.batch_ops import batch_length, concat_batches, slice_batch
from duoka.data.index_order import set_epoch
from duoka.data.position import LocalBatch
from duoka.data.rng import GLOBAL, IsolatedRng, generators_of
from duoka.data.shuffle_reset import restore_shuffled_lists
from duoka.data.sources.base import ShardSpec, order_seed, stop_workers
from duoka.data.stream_fingerprint import StreamFingerprint, fingerprint

__all__ = ["BatchIterableSource"]

Sized = tuple[Any, int]
"""A batch and how many samples it holds."""
_END: Any = object()


class BatchIterableSource:
    """The parts of any iterable of batches, which draws its randomness under generators of its own."""

    def __init__(
        self,
        loader: Any,
        spec: ShardSpec,
        owners: tuple[object, ...] = (),
        begin: Callable[[int, int], None] | None = None,
        has_columns: bool = False,
    ) -> None:
        """Read ``loader`` (or the generator function) once an epoch.

        ``owners`` are further objects that may hold generators or have ``set_epoch``. ``begin(seed, epoch)`` is called before
        each epoch of a loader that draws nothing in this process. ``has_columns`` is ``slice_batch``'s.
        """
        self._loader = loader
        self._spec = spec
        self._owners = (loader, *owners)
        self._generators = (*GLOBAL, *generators_of(*self._owners))
        self._begin = begin
        self._has_columns = has_columns
        self._quiet = begin is not None or isinstance(loader, (list, tuple))
        self._whole_only = spec.training and getattr(loader, "drop_last", False) is True
        self._reading: weakref.ref[Any] | None = None
        self.fingerprint: StreamFingerprint | None = None
        self.samples: int | None = sum(map(batch_length, loader)) if isinstance(loader, (list, tuple)) else None

    def __len__(self) -> int:
        batches = len(self._loader)
        return (
            batches // self._spec.batches_per_step if self._whole_only else -(-batches // self._spec.batches_per_step)
        )

    def epoch(self, seed: int, epoch: int, skip: int) -> Iterator[LocalBatch]:
        """Yield this rank's parts of ``epoch``; the first ``skip`` samples are read and dropped."""
        if self._spec.training:
            set_epoch(epoch, *self._owners)
        drawn = self._spec.epoch(epoch)
        if self._begin is not None:
            self._begin(seed, drawn)
        batches = self._read(contextlib.nullcontext() if self._quiet else self._private(seed, drawn))
        owners = () if isinstance(self._loader, (list, tuple)) else self._owners
        with restore_shuffled_lists(*owners), contextlib.closing(batches):
            yield from self._parts(_without(batches, skip, self._has_columns))

    def close(self) -> None:
        """End worker processes that the loader kept."""
        iterator = self._reading() if self._reading is not None else None
        if iterator is not None and getattr(self._loader, "_iterator", None) is iterator:
            self._loader._iterator = None  # or the next epoch would wait for the dead
        stop_workers(iterator)

    def _private(self, seed: int, epoch: int) -> IsolatedRng:
        return IsolatedRng(order_seed(seed, epoch), self._generators)

    def _read(self, private: contextlib.AbstractContextManager[None]) -> Any:
        """Yield the loader's batches; its code runs with the generators of ``private`` in force."""
        with private:
            source = iter(self._loader() if inspect.isgeneratorfunction(self._loader) else self._loader)
        self._reading = _reference(source)
        try:
            while True:
                with private:
                    batch = next(source, _END)
                if batch is _END:
                    return
                yield batch
        finally:
            if not getattr(self._loader, "persistent_workers", False):
                stop_workers(source)

    def _parts(self, batches: Iterator[Sized]) -> Iterator[LocalBatch]:
        spec, self.fingerprint = self._spec, None
        filled = ((batch, length) for batch, length in batches if length)
        while group := list(itertools.islice(filled, spec.batches_per_step)):
            if len(group) < spec.batches_per_step and self._whole_only:
                return
            if self.fingerprint is None and spec.world_size > 1:
                self.fingerprint = fingerprint([batch for batch, _ in group])
            total = sum(length for _, length in group)
            start, stop = spec.bounds(total)
            if start < stop:
                yield LocalBatch(_between(group, start, stop, self._has_columns), stop - start, total)
            else:
                yield LocalBatch(_between(group, 0, 1, self._has_columns) if spec.training else None, 0, total)


def _without(batches: Iterable[Any], skip: int, has_columns: bool) -> Iterator[Sized]:
    """Yield ``batches`` with their lengths, without the first ``skip`` samples."""
    for batch in batches:
        length = batch_length(batch)
        if skip >= length:
            skip -= length
            continue
        yield slice_batch(batch, skip, length, length, has_columns=has_columns), length - skip
        skip = 0


def _between(group: list[Sized], start: int, stop: int, has_columns: bool) -> Any:
    """Return samples ``start`` to ``stop`` of the batches of ``group`` laid end to end."""
    pieces, first = [], 0
    for batch, length in group:
        low, high = max(start - first, 0), min(stop - first, length)
        if low < high:
            pieces.append(slice_batch(batch, low, high, length, has_columns=has_columns))
        first += length
    return concat_batches(pieces)


def _reference(iterator: Any) -> weakref.ref[Any] | None:
    try:
        return weakref.ref(iterator)
    except TypeError:  # built-in iterators, which have no workers
        return None
