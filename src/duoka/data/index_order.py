"""The order of the samples in one epoch, as batches of indices: a function of (seed, epoch), the same on every rank."""

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

from duoka.data.rng import GLOBAL, TORCH, IsolatedRng, Rng
from duoka.data.user_generators import generators_of, with_wrapped
from duoka.errors import ConfigError
from duoka.log import logger

_FIRST_CHUNK, _LONGEST_CHUNK = 16, 512
_TORCH_SAMPLERS = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


def index_batches(loader: DataLoader[Any]) -> Iterable[Sequence[Any]]:
    """Return the iterable of ``loader``'s index batches over the whole data set, whatever its sampler is.

    Raises ``ConfigError`` for a sampler that divides the samples in an unknown way.
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
    """Return ``sampler``, or for torch's ``DistributedSampler`` the same order over the whole data set."""
    if type(sampler) is DistributedSampler:
        _warn_of_distributed_sampler()
        if not sampler.shuffle or not len(dataset):
            return SequentialSampler(dataset)
        return RandomSampler(dataset, generator=torch.Generator().manual_seed(sampler.seed))  # the user's seed matters
    replicas = getattr(sampler, "num_replicas", 1)
    if isinstance(replicas, int) and replicas > 1:
        raise ConfigError(
            f"the sampler {type(sampler).__name__} already divides the samples over {replicas} processes; duoka does that "
            "itself: give the DataLoader a sampler over the whole data set"
        )
    return sampler


@functools.cache
def _warn_of_distributed_sampler() -> None:
    logger.warning(
        "the DistributedSampler of the DataLoader was replaced by the same order over the whole data set: duoka divides each "
        "global batch itself, without the repeated samples that DistributedSampler pads with. Leave the sampler out and "
        "give shuffle=True or shuffle=False to the DataLoader"
    )


def draw_isolated(batches: Iterable[Sequence[Any]], isolated: IsolatedRng) -> Iterator[Sequence[Any]]:
    """Yield ``batches``, which are drawn inside ``isolated``, in chunks that grow to 512 batches."""
    iterator: Iterator[Sequence[Any]] | None = None
    length = _FIRST_CHUNK
    while True:
        with isolated:
            iterator = iter(batches) if iterator is None else iterator
            chunk = list(itertools.islice(iterator, length))
        yield from chunk
        if len(chunk) < length:
            return
        length = min(4 * length, _LONGEST_CHUNK)


def generators_used_by(batches: Any) -> tuple[Rng, ...]:
    """Return all generators that a sampler may draw from; torch's samplers use torch's generator only."""
    sampler = batches.sampler if type(batches) is BatchSampler else batches
    return (*((TORCH,) if type(sampler) in _TORCH_SAMPLERS else GLOBAL), *generators_of(batches, sampler))


def skip_samples(batches: Iterator[Sequence[Any]], samples: int) -> Iterator[Sequence[Any]]:
    """Yield ``batches`` without their first ``samples`` indices; a batch may be cut."""
    while samples > 0:
        batch = next(batches, None)
        if batch is None:
            return
        if len(batch) > samples:
            yield batch[samples:]
        samples -= len(batch)
    yield from batches


def merge_batches(batches: Iterator[Sequence[Any]], count: int, drop_last: bool) -> Iterator[Sequence[Any]]:
    """Yield global batches of ``count`` consecutive ``batches``; ``drop_last`` leaves out an incomplete last one."""
    if count == 1:
        yield from (batch for batch in batches if len(batch))
        return
    while group := list(itertools.islice(batches, count)):
        indices = [index for batch in group for index in batch]
        if indices and (len(group) == count or not drop_last):
            yield indices


def set_epoch(epoch: int, *owners: object) -> None:
    """Call ``set_epoch(epoch)`` of each of ``owners``, and of what they wrap, that has the method, once each."""
    for owner in with_wrapped(*owners):
        if callable(method := getattr(owner, "set_epoch", None)):
            method(epoch)


def has_set_epoch(dataset: object) -> bool:
    """Return whether ``dataset`` or a data set inside it has ``set_epoch``."""
    return any(callable(getattr(owner, "set_epoch", None)) for owner in with_wrapped(dataset))
