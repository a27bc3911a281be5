"""The order of the samples in one epoch: a function of (seed, epoch), the same on every rank; nothing is loaded here."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from duoka.data.rng import GLOBAL, TORCH, IsolatedRng, Rng, generators_of
from duoka.errors import ConfigError
from duoka.log import logger

__all__ = [
    "checked_sampler",
    "skip_samples",
    "generators_used_by",
    "merge_batches",
    "draw_isolated",
    "index_batches",
    "set_epoch",
    "whole_sampler",
]

_LONGEST_CHUNK = 512
_TORCH_SAMPLERS = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


def index_batches(loader: DataLoader[Any]) -> Iterable[Sequence[Any]]:
    """Return what yields the index batches of ``loader``, over the whole data set whatever sampler it has.

    Raises ``ConfigError`` for a sampler that shards by itself in a way duoka does not know.
    """
    batches: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    inner = getattr(batches, "sampler", None)
    whole = whole_sampler(inner, loader.dataset)
    if whole is not inner:
        if type(batches) is not BatchSampler:
            raise ConfigError(
                f"the batch sampler {type(batches).__name__} is built on a DistributedSampler, which gives each process its "
                "own samples; duoka does that itself: build it on RandomSampler(dataset) or SequentialSampler(dataset)"
            )
        return BatchSampler(whole, batches.batch_size, batches.drop_last)
    return whole_sampler(batches, loader.dataset)  # type: ignore[no-any-return]


def whole_sampler(sampler: Any, dataset: Any) -> Any:
    """Return ``sampler``, or in place of torch's ``DistributedSampler`` the one that draws from the whole data set."""
    if type(sampler) is DistributedSampler:
        _warn_of_distributed_sampler()
        return _whole_sampler_like(sampler, dataset)
    replicas = getattr(sampler, "num_replicas", 1)
    if isinstance(replicas, int) and replicas > 1:
        raise ConfigError(
            f"the sampler {type(sampler).__name__} already divides the samples over {replicas} processes; duoka does that "
            "itself: give the DataLoader a sampler over the whole data set"
        )
    return sampler


def checked_sampler(loader: DataLoader[Any]) -> Any:
    """Return the sampler of a ``loader`` that is iterated as it is; ``ConfigError`` where it divides the samples."""
    if whole_sampler(loader.sampler, loader.dataset) is not loader.sampler:
        raise ConfigError(
            "a DataLoader with batch_size=None has a DistributedSampler; leave the sampler out, duoka divides the batches"
        )
    return loader.sampler


def draw_isolated(batches: Iterable[Sequence[Any]], private: IsolatedRng) -> Iterator[Sequence[Any]]:
    """Yield ``batches``, drawn in growing chunks, with the generators of ``private`` in force meanwhile."""
    source: Iterator[Sequence[Any]] | None = None
    length = 16
    while True:
        with private:
            source = iter(batches) if source is None else source
            chunk = list(itertools.islice(source, length))
        yield from chunk
        if len(chunk) < length:
            return
        length = min(4 * length, _LONGEST_CHUNK)


def generators_used_by(batches: Any) -> tuple[Rng, ...]:
    """Return all generators that ``batches``, a sampler, may draw from; torch's own samplers use torch's only."""
    sampler = batches.sampler if type(batches) is BatchSampler else batches
    return (*((TORCH,) if type(sampler) in _TORCH_SAMPLERS else GLOBAL), *generators_of(batches, sampler))


def skip_samples(batches: Iterator[Sequence[Any]], samples: int) -> Iterator[Sequence[Any]]:
    """Yield ``batches`` without their first ``samples`` indices: a batch in which these end gives its rest."""
    while samples > 0:
        batch = next(batches, None)
        if batch is None:
            return
        if len(batch) > samples:
            yield batch[samples:]
        samples -= len(batch)
    yield from batches


def merge_batches(batches: Iterator[Sequence[Any]], merge: int, whole_only: bool) -> Iterator[Sequence[Any]]:
    """Yield global batches of ``merge`` consecutive ``batches``; the last is shorter, or left out with ``whole_only``."""
    if merge == 1:
        yield from (batch for batch in batches if len(batch))
        return
    while group := list(itertools.islice(batches, merge)):
        indices = [index for batch in group for index in batch]
        if indices and (len(group) == merge or not whole_only):
            yield indices


def set_epoch(epoch: int, *owners: object) -> None:
    """Tell ``epoch`` to each of ``owners`` that has a ``set_epoch`` method."""
    for owner in {id(owner): owner for owner in owners}.values():
        if callable(method := getattr(owner, "set_epoch", None)):
            method(epoch)


def _whole_sampler_like(sampler: DistributedSampler[Any], dataset: Any) -> Any:
    if not sampler.shuffle or not len(dataset):
        return SequentialSampler(dataset)
    return RandomSampler(dataset, generator=torch.Generator().manual_seed(sampler.seed))  # the seed keeps its meaning


@functools.cache
def _warn_of_distributed_sampler() -> None:
    logger.warning(
        "the DistributedSampler of the DataLoader was replaced by the same order over the whole data set: duoka divides each "
        "global batch itself, without the repeated samples that DistributedSampler pads with. Leave the sampler out and "
        "give shuffle=True or shuffle=False to the DataLoader"
    )
