"""Data positions: a run resumes at the next sample, on any number of devices."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from duoka.data import DataPosition, local_batches
from duoka.errors import CheckpointError, ConfigError
from support import datasets
from support.datasets import flat, globals_of, indices, numbers

LOADERS = {
    "shuffled": lambda: numbers(23, batch_size=4, shuffle=True),
    "custom sampler": lambda: numbers(23, batch_size=4, sampler=datasets.DrawingSampler(23)),
    "custom batches": lambda: numbers(23, batch_sampler=datasets.Buckets(23)),
    "stream": lambda: DataLoader(datasets.Numbers(23), batch_size=4),
    "custom loader": lambda: datasets.Batches(23),
    "list": lambda: [(batch, batch) for batch in torch.arange(23).split(4)],
}


def rest_of(loader: Any, size: int, position: DataPosition) -> list[int]:
    ranks = []
    for rank in range(size):
        sharded = local_batches(loader, rank=rank, world_size=size, seed=0, batches_per_step=size)
        sharded.set_position(position)
        ranks.append([indices(part) for part in sharded])
        assert sharded.position == DataPosition(position.seed, position.epoch + 1, 0)
    return flat([flat(list(step)) for step in zip(*ranks, strict=True)])


@pytest.mark.parametrize("name", LOADERS)
def test_run_continues_at_the_next_sample_on_any_number_of_devices(name: str) -> None:
    loader = LOADERS[name]()
    whole = flat(globals_of(loader, 1, seed=9, epoch=1))
    sharded = local_batches(loader, rank=0, world_size=2, seed=9)
    list(sharded)
    positions = [sharded.position]
    for _ in sharded:
        positions.append(sharded.position)
    assert positions[-1].samples == 23
    for position in positions:
        for size in (1, 2, 3):
            assert rest_of(loader, size, position) == whole[position.samples :]


@pytest.mark.parametrize("name", LOADERS)
def test_run_continues_inside_a_batch_where_the_batch_size_changed(name: str) -> None:
    loader = LOADERS[name]()
    whole = flat(globals_of(loader, 1))
    for samples in range(24):
        assert rest_of(loader, 2, DataPosition(5, 0, samples)) == whole[samples:]


def test_nothing_before_the_position_is_loaded() -> None:
    dataset = datasets.Logged(20)
    sharded = local_batches(DataLoader(dataset, batch_size=4), rank=1, world_size=2, seed=0)
    sharded.set_position(DataPosition(0, 3, 8))
    list(sharded)
    assert dataset.loaded == [10, 11, 14, 15, 18, 19]


def test_position_counts_what_was_taken_and_not_what_was_prefetched() -> None:
    sharded = local_batches(numbers(40, batch_size=4, num_workers=2), rank=0, world_size=2, seed=3)
    for taken, _ in enumerate(sharded, start=1):
        assert sharded.position == DataPosition(3, 0, 4 * taken)
        if taken == 3:
            break
    assert sharded.position == DataPosition(3, 0, 12)
    sharded.close()


@pytest.mark.parametrize("name", LOADERS)
def test_epoch_left_early_is_followed_by_the_next_from_its_start(name: str) -> None:
    loader = LOADERS[name]()
    sharded = local_batches(loader, rank=0, world_size=1, seed=5)
    for _ in itertools.islice(sharded, 2):
        pass
    assert [indices(part) for part in sharded] == globals_of(loader, 1, epoch=1)
    assert [indices(part) for part in sharded] == globals_of(loader, 1, epoch=2)
    assert sharded.position == DataPosition(5, 3, 0)


def test_looking_at_a_loader_without_taking_anything_begins_no_epoch() -> None:
    sharded = local_batches(numbers(8, batch_size=4, shuffle=True), rank=0, world_size=1, seed=5)
    iter(sharded)
    assert sharded.position == DataPosition(5, 0, 0)
    assert next(iter(sharded)) is not None
    assert sharded.position == DataPosition(5, 0, 4)


def test_position_goes_through_a_checkpoint() -> None:
    position = DataPosition(1, 2, 3)
    assert DataPosition.from_dict(position.to_dict()) == position
    with pytest.raises(CheckpointError, match="epoch"):
        DataPosition.from_dict({"seed": 1, "samples": 2})
    with pytest.raises(ConfigError, match=r"samples=-1"):
        DataPosition(0, 0, -1)


class InPlace(Sampler[int]):
    """A sampler that shuffles its own list, or array, in place."""

    def __init__(self, kind: str, length: int = 24) -> None:
        numbers = list(range(length))
        self.kept: Any = {"list": numbers, "array": np.arange(length), "tensor": torch.arange(length)}[kind]
        self.kind = kind

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[int]:
        if self.kind == "tensor":
            self.kept[:] = self.kept[torch.randperm(len(self.kept))]
        else:
            (random if self.kind == "list" else np.random).shuffle(self.kept)
        return iter([int(number) for number in self.kept])


class InPlaceStream(IterableDataset[int]):
    def __init__(self) -> None:
        self.files = list(range(24))

    def __iter__(self) -> Iterator[int]:
        random.shuffle(self.files)
        yield from self.files


@pytest.mark.parametrize("kind", ["list", "array", "tensor", "stream"])
def test_in_place_shuffling_resumes_exactly_from_any_epoch(kind: str) -> None:
    def loader() -> DataLoader[Any]:
        if kind == "stream":
            return DataLoader(InPlaceStream(), batch_size=4)
        return DataLoader(TensorDataset(torch.arange(24)), batch_size=4, sampler=InPlace(kind))

    whole = local_batches(loader(), rank=0, world_size=1, seed=3)
    epochs = [[datasets.indices(part) for part in whole] for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    resumed = local_batches(loader(), rank=0, world_size=1, seed=3)
    resumed.set_position(DataPosition(3, 2, 8))
    assert [datasets.indices(part) for part in resumed] == epochs[2][2:]
