"""Ready-made batches and iterable data sets: every rank reads the same stream and keeps its shard."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ChainDataset, DataLoader, IterableDataset, default_collate

from duoka.data import DataPosition, local_batches
from duoka.errors import ConfigError, DataError
from support.datasets import LENGTHS, SIZES, Batches, Numbers, flat, globals_of, indices, parts_of


def generated() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for batch in torch.randperm(11).split(4):
        yield batch, torch.rand(len(batch))


class Unbatched(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A map-style data set of ready-made batches."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.arange(4 * index, min(4 * index + 4, 11))


@pytest.mark.parametrize("batches_per_step", [1, 2, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_parts_of_ready_batches_make_the_batches_of_one_device(length: int, batches_per_step: int) -> None:
    for loader in (
        Batches(length),
        [(batch, batch) for batch in torch.arange(length).split(4)],
        DataLoader(Numbers(length, shuffled=True), batch_size=4),
        DataLoader(Numbers(length, shuffled=True), batch_size=4, drop_last=True),
    ):
        single = globals_of(loader, 1, batches_per_step=batches_per_step)
        for size in SIZES[1:]:
            assert globals_of(loader, size, batches_per_step=batches_per_step) == single
        if getattr(loader, "drop_last", None) is not True:
            assert sorted(flat(single)) == list(range(length))


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_is_divided_once_with_worker_processes_too(workers: int) -> None:
    loader: DataLoader[Any] = DataLoader(Numbers(11, shuffled=True), batch_size=2, num_workers=workers)
    single = globals_of(loader, 1)
    assert sorted(flat(single)) == list(range(11))
    assert globals_of(loader, 2) == single
    assert flat(globals_of(loader, 2, batches_per_step=2)) == flat(single)
    assert globals_of(loader, 2, epoch=1) != single


def test_stream_in_workers_that_stay_is_a_function_of_the_epoch() -> None:
    loader: DataLoader[Any] = DataLoader(
        Numbers(12, shuffled=True), batch_size=2, num_workers=1, persistent_workers=True
    )
    fresh: DataLoader[Any] = DataLoader(Numbers(12, shuffled=True), batch_size=2, num_workers=1)
    assert globals_of(loader, 2, epoch=2) == globals_of(fresh, 1, epoch=2)


def test_stream_without_workers_collates_only_the_ranks_own_samples() -> None:
    def strange(samples: list[int]) -> frozenset[int]:  # nothing that could be cut or joined
        return frozenset(samples)

    loader: DataLoader[Any] = DataLoader(Numbers(11), batch_size=4, collate_fn=strange)
    parts = [part.batch for part in local_batches(loader, rank=1, world_size=2, seed=0, batches_per_step=2)]
    assert parts == [frozenset({4, 5, 6, 7}), frozenset({10})]


def test_stream_without_workers_ignores_the_timeout_for_workers() -> None:
    loader: DataLoader[Any] = DataLoader(Numbers(11), batch_size=2, timeout=5)
    assert sorted(flat(globals_of(loader, 2))) == list(range(11))


def test_draws_of_a_collation_do_not_change_the_stream() -> None:
    def drawing(samples: list[int]) -> torch.Tensor:
        random.shuffle([*samples])
        return default_collate(samples)

    loader: DataLoader[Any] = DataLoader(Numbers(23, shuffled=True), batch_size=4, collate_fn=drawing)
    assert globals_of(loader, 3) == globals_of(loader, 1)


@pytest.mark.parametrize("loader", [generated, Batches(11), DataLoader(Unbatched(), batch_size=None, shuffle=True)])
def test_order_of_a_custom_loader_is_a_function_of_seed_and_epoch(loader: Any) -> None:
    first = globals_of(loader, 2)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert globals_of(loader, 3) == first
    assert sorted(flat(first)) == list(range(11))
    assert len({str(globals_of(loader, 1, epoch=epoch)) for epoch in range(4)}) > 1
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(np.random.get_state()))


def test_draws_at_each_step_of_a_custom_loader_are_the_same_on_all_ranks() -> None:
    values = []
    for size in (1, 3):
        ranks = [list(local_batches(Batches(11), rank=rank, world_size=size, seed=0)) for rank in range(size)]
        values.append([torch.cat([part.batch[1][: part.count] for part in step]).tolist() for step in zip(*ranks)])  # noqa: B905
    assert values[0] == values[1]
    assert len({value for step in values[0] for value in step}) == 11


def test_dicts_and_names_are_cut_with_their_tensors() -> None:
    batches = [{"x": torch.arange(5), "names": ["a", "b", "c", "d", "e"], "scale": 2.0}]
    (part,) = local_batches(batches, rank=1, world_size=2, seed=0)
    assert part.batch["x"].tolist() == [3, 4]
    assert (part.batch["names"], part.batch["scale"]) == (["d", "e"], 2.0)


def test_lengths_and_sample_counts_are_known_where_the_loader_knows() -> None:
    batches = [torch.arange(4), torch.arange(3)]
    assert (
        len(local_batches(batches, rank=0, world_size=2, seed=0)),
        local_batches(batches, rank=0, world_size=2, seed=0).samples_per_epoch,
    ) == (
        2,
        7,
    )
    assert len(local_batches(Batches(11), rank=0, world_size=2, seed=0, batches_per_step=2)) == 2
    with pytest.raises(TypeError):
        len(local_batches(generated, rank=0, world_size=2, seed=0))


def test_batches_of_unequal_shapes_are_an_error_with_a_remedy() -> None:
    batches = [torch.zeros(2, 5), torch.zeros(1, 4)]
    with pytest.raises(DataError, match=r"\(2, 5\), \(1, 4\).*pad them"):
        list(local_batches(batches, rank=0, world_size=1, seed=0, batches_per_step=2))


def test_empty_batches_are_passed_over() -> None:
    batches = [torch.arange(0), torch.arange(3), torch.arange(0)]
    assert parts_of([(batch,) for batch in batches], 2) == [[[0, 1], [2]]]
    assert [indices(part) for part in local_batches([(b,) for b in batches], rank=0, world_size=1, seed=0)] == [
        [0, 1, 2]
    ]


class Nested(Numbers):
    def __iter__(self) -> Iterator[Any]:
        for number in super().__iter__():
            yield (number, number + 10), number + 20


def test_nested_columns_of_default_collate_are_cut_as_columns() -> None:
    loader: DataLoader[Any] = DataLoader(Nested(4), batch_size=2, num_workers=1)
    parts = list(local_batches(loader, rank=1, world_size=2, seed=0))
    assert repr([part.batch for part in parts]) == repr(
        [[[torch.tensor([n]), torch.tensor([n + 10])], torch.tensor([n + 20])] for n in (1, 3)]
    )


class Words(IterableDataset[Any]):
    """Each sample has four words, as many as a batch has samples."""

    def __iter__(self) -> Iterator[Any]:
        for number in range(8):
            yield {"x": number, "name": str(number), "words": [f"{number}{letter}" for letter in "abcd"]}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batches_per_step", [1, 2])
@pytest.mark.parametrize("size", [2, 4])
def test_columns_of_strings_are_cut_as_columns(workers: int, batches_per_step: int, size: int) -> None:
    loader: DataLoader[Any] = DataLoader(Words(), batch_size=4, num_workers=workers)
    for rank in range(size):
        batches = local_batches(loader, rank=rank, world_size=size, seed=0, batches_per_step=batches_per_step)
        for part in batches:
            own = [str(number) for number in part.batch["x"].tolist()]
            assert list(part.batch["name"]) == own
            assert [list(column) for column in part.batch["words"]] == [[n + letter for n in own] for letter in "abcd"]


class Numbered(IterableDataset[int]):
    """A stream whose order is a function of the epoch, a list that it shuffles and a generator of its own."""

    def __init__(self, first: int) -> None:
        self.items, self.epoch, self.own = list(range(first, first + 6)), 0, random.Random(first)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.own.shuffle(self.items)
        yield from self.items
        yield 100 * self.epoch


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("persistent", [False, True])
def test_parts_of_a_chain_are_streams_like_any_other(workers: int, persistent: bool) -> None:
    def chained() -> DataLoader[Any]:
        chain = ChainDataset([Numbered(0), Numbered(6)])
        return DataLoader(chain, batch_size=4, num_workers=workers, persistent_workers=persistent and workers > 0)

    for epoch in range(3):
        single = flat(globals_of(chained(), 1, epoch=epoch))
        assert sorted(single) == sorted([*range(12), 100 * epoch, 100 * epoch])
        assert flat(globals_of(chained(), 2, epoch=epoch)) == single
    assert flat(globals_of(chained(), 1, epoch=1))[:6] != flat(globals_of(chained(), 1, epoch=2))[:6]
    resumed = local_batches(chained(), rank=0, world_size=1, seed=5)
    resumed.set_position(DataPosition(5, 2, 0))
    assert flat([indices(part) for part in resumed]) == flat(globals_of(chained(), 1, epoch=2))
    resumed.close()


class StartsAnew:
    """A loader that is its own iterator, and starts anew after its end."""

    def __init__(self, again: bool = True) -> None:
        self.at, self.again = 0, again

    def __iter__(self) -> StartsAnew:
        return self

    def __next__(self) -> tuple[torch.Tensor, ...]:
        if self.at >= 10:
            self.at = 0 if self.again else self.at
            raise StopIteration
        self.at += 4
        numbers = torch.arange(self.at - 4, min(self.at, 10))
        return numbers, torch.rand(len(numbers))


def test_a_loader_that_starts_anew_after_its_end_is_read_again() -> None:
    assert globals_of(StartsAnew(), 2, epoch=2) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_loader_that_does_not_start_anew_is_an_error_in_its_second_epoch() -> None:
    batches = local_batches(StartsAnew(again=False), rank=0, world_size=1, seed=0)
    assert len(list(batches)) == 3
    with pytest.raises(DataError, match=r"StartsAnew yields no batch in a second epoch.*StopIteration"):
        list(batches)


def test_iterators_that_cannot_start_anew_are_refused_at_once() -> None:
    loader: DataLoader[Any] = DataLoader(Numbers(4), batch_size=2)
    for iterator in (generated(), iter([1]), map(str, []), iter(loader)):
        with pytest.raises(ConfigError, match="ends after one epoch"):
            local_batches(iterator, rank=0, world_size=1, seed=0)
