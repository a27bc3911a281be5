"""Ready-made batches and iterable data sets: every rank reads the same stream and keeps its shard."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from duoka.data import shard
from duoka.errors import DataError
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
    parts = [part.batch for part in shard(loader, rank=1, world_size=2, seed=0, batches_per_step=2)]
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
        ranks = [list(shard(Batches(11), rank=rank, world_size=size, seed=0)) for rank in range(size)]
        values.append([torch.cat([part.batch[1][: part.count] for part in step]).tolist() for step in zip(*ranks)])  # noqa: B905
    assert values[0] == values[1]
    assert len({value for step in values[0] for value in step}) == 11


def test_dicts_and_names_are_cut_with_their_tensors() -> None:
    batches = [{"x": torch.arange(5), "names": ["a", "b", "c", "d", "e"], "scale": 2.0}]
    (part,) = shard(batches, rank=1, world_size=2, seed=0)
    assert part.batch["x"].tolist() == [3, 4]
    assert (part.batch["names"], part.batch["scale"]) == (["d", "e"], 2.0)


def test_lengths_and_sample_counts_are_known_where_the_loader_knows() -> None:
    batches = [torch.arange(4), torch.arange(3)]
    assert (
        len(shard(batches, rank=0, world_size=2, seed=0)),
        shard(batches, rank=0, world_size=2, seed=0).samples_per_epoch,
    ) == (
        2,
        7,
    )
    assert len(shard(Batches(11), rank=0, world_size=2, seed=0, batches_per_step=2)) == 2
    with pytest.raises(TypeError):
        len(shard(generated, rank=0, world_size=2, seed=0))


def test_batches_of_unequal_shapes_are_an_error_with_a_remedy() -> None:
    batches = [torch.zeros(2, 5), torch.zeros(1, 4)]
    with pytest.raises(DataError, match=r"\(2, 5\), \(1, 4\).*pad them"):
        list(shard(batches, rank=0, world_size=1, seed=0, batches_per_step=2))


def test_empty_batches_are_passed_over() -> None:
    batches = [torch.arange(0), torch.arange(3), torch.arange(0)]
    assert parts_of([(batch,) for batch in batches], 2) == [[[0, 1], [2]]]
    assert [indices(part) for part in shard([(b,) for b in batches], rank=0, world_size=1, seed=0)] == [[0, 1, 2]]


class Nested(Numbers):
    def __iter__(self) -> Iterator[Any]:
        for number in super().__iter__():
            yield (number, number + 10), number + 20


def test_nested_columns_of_default_collate_are_cut_as_columns() -> None:
    loader: DataLoader[Any] = DataLoader(Nested(4), batch_size=2, num_workers=1)
    parts = list(shard(loader, rank=1, world_size=2, seed=0))
    assert repr([part.batch for part in parts]) == repr(
        [[[torch.tensor([n]), torch.tensor([n + 10])], torch.tensor([n + 20])] for n in (1, 3)]
    )
