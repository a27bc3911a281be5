"""Small data sets, samplers and loaders for the tests of ``duoka.data``."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from duoka.data import LocalBatch, local_batches

LENGTHS = (0, 1, 2, 3, 7, 11, 12, 64)
SIZES = (1, 2, 3, 4, 5)


def numbers(length: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(length)), **options)


def indices(part: LocalBatch) -> list[int]:
    """The samples of a part that count, as a list."""
    if part.batch is None:
        return []
    first = part.batch[0] if isinstance(part.batch, (list, tuple)) else part.batch
    return first[: part.count].tolist()


def globals_of(loader: Any, size: int, **options: Any) -> list[list[int]]:
    """The global batches of one epoch, put together from the parts of ``size`` ranks."""
    return [flat(parts) for parts in parts_of(loader, size, **options)]


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def parts_of(loader: Any, size: int, seed: int = 5, epoch: int = 0, **options: Any) -> list[list[list[int]]]:
    """What each rank takes in each step of one epoch: ``[step][rank]`` is a list of samples."""
    ranks = []
    for rank in range(size):
        sharded = local_batches(loader, rank=rank, world_size=size, seed=seed, **options)
        for _ in range(epoch):
            list(sharded)
        parts = list(sharded)
        sharded.close()
        for part in parts:
            assert part.count == len(indices(part))
        ranks.append([indices(part) for part in parts])
    return [list(step) for step in zip(*ranks, strict=True)]


class Noisy(Dataset[Any]):
    """Samples whose augmentation draws from all three global generators, a different number of times each."""

    def __init__(self, length: int = 11) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, float]:
        drawn = sum(random.random() for _ in range(index % 3 + 1))
        return index, drawn + float(np.random.randn()) + torch.rand(index + 1).sum().item()


class NoisyInBulk(Noisy):
    """The same, loaded many at once: what is drawn for a sample depends on the others in the batch."""

    def __getitems__(self, many: list[int]) -> list[tuple[int, float]]:
        noise = torch.rand(len(many)).tolist()
        return [(index, value) for index, value in zip(many, noise, strict=True)]


class Logged(Dataset[int]):
    """A data set that remembers what was loaded from it."""

    def __init__(self, length: int) -> None:
        self.length, self.loaded = length, list[int]()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        self.loaded.append(index)
        return index


class DrawingSampler(Sampler[int]):
    """A sampler that draws from every global generator, and keeps one of its own that moves on from epoch to epoch."""

    def __init__(self, length: int) -> None:
        self.length, self.own = length, random.Random(3)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        keys = [
            random.random() + np.random.rand() + torch.rand(()).item() + self.own.random() for _ in range(self.length)
        ]
        yield from sorted(range(self.length), key=keys.__getitem__)


class Buckets(Sampler[list[int]]):
    """A batch sampler whose batches have unequal lengths, in a random order."""

    def __init__(self, length: int) -> None:
        cuts = [0, *range(1, length, 3), length]
        self.batches = [list(range(*pair)) for pair in itertools.pairwise(cuts) if pair[0] < pair[1]]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        yield from random.sample(self.batches, len(self.batches))


class Endless(Sampler[int]):
    """A sampler that never ends."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield int(torch.randint(7, ()))


class Numbers(IterableDataset[int]):
    """A stream; its worker processes take turns."""

    def __init__(self, length: int, shuffled: bool = False) -> None:
        self.length, self.shuffled = length, shuffled

    def __iter__(self) -> Iterator[int]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        mine = list(range(first, self.length, step))
        if self.shuffled:
            random.shuffle(mine)
        yield from mine


class Batches:
    """A loader of ready-made batches, as people write them: shuffles at the start, draws at each step."""

    def __init__(self, length: int, batch_size: int = 4) -> None:
        self.length, self.batch_size = length, batch_size

    def __len__(self) -> int:
        return -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.from_numpy(np.random.permutation(self.length))
        for batch in order.split(self.batch_size) if self.length else ():
            yield batch, torch.rand(len(batch))
