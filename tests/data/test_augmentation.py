"""What is drawn for a sample is a function of (seed, epoch, place in the epoch), and of nothing else."""

# ruff: noqa: NPY002
from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate

from duoka.data import Position, shard

from .helpers import Noisy, NoisyInBulk


def augmented(
    loader: DataLoader[Any], size: int = 1, position: Position | None = None, **options: Any
) -> dict[int, Any]:
    """What each sample became in one epoch."""
    seen: dict[int, Any] = {}
    for rank in range(size):
        sharded = shard(loader, rank=rank, size=size, seed=1, **options)
        if position is not None:
            sharded.set_position(position)
        for part in sharded:
            indices, values = part.batch
            seen.update(zip(indices[: part.count].tolist(), values[: part.count].tolist(), strict=True))
        sharded.close()
    return seen


DATASETS = {
    "plain": Noisy(),
    "subset": Subset(Noisy(20), range(11)),
    "chained": ConcatDataset([Noisy(7), Subset(Noisy(20), range(7, 11))]),
    "in bulk": NoisyInBulk(),
    "subset in bulk": Subset(NoisyInBulk(20), range(11)),
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_augmentation_is_the_same_on_any_number_of_devices(dataset: str) -> None:
    loader: DataLoader[Any] = DataLoader(DATASETS[dataset], batch_size=4, shuffle=True)
    single = augmented(loader)
    assert len(set(single.values())) == 11
    assert all(augmented(loader, size) == single for size in (2, 3, 5))
    assert augmented(loader, 2, merge=2) == single


@pytest.mark.parametrize("dataset", ["plain", "in bulk"])
def test_augmentation_is_the_same_with_any_number_of_workers(dataset: str) -> None:
    alone = augmented(DataLoader(DATASETS[dataset], batch_size=4, shuffle=True))
    for workers in (1, 2):
        loader: DataLoader[Any] = DataLoader(DATASETS[dataset], batch_size=4, shuffle=True, num_workers=workers)
        assert augmented(loader) == augmented(loader, 3) == alone


def test_augmentation_is_the_same_after_a_resume_and_another_in_each_epoch() -> None:
    loader: DataLoader[Any] = DataLoader(Noisy(), batch_size=2, shuffle=True)
    whole = augmented(loader)
    rest = augmented(loader, 3, Position(seed=1, epoch=0, samples=4))
    assert len(rest) == 7
    assert rest.items() <= whole.items()
    assert set(augmented(loader, 1, Position(seed=1, epoch=1)).values()).isdisjoint(whole.values())


def test_evaluation_augments_the_same_way_every_time() -> None:
    sharded = shard(DataLoader(Noisy(), batch_size=4), rank=0, size=1, seed=1, training=False)
    first, second = ([part.batch[1].tolist() for part in sharded] for _ in range(2))
    assert first == second


def test_collation_may_draw_and_depends_on_the_place_only() -> None:
    def masked(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        indices = default_collate(samples)
        return indices, torch.rand(len(indices)) + np.random.rand()

    loader: DataLoader[Any] = DataLoader(range(11), batch_size=4, collate_fn=masked)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    first = augmented(loader)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert augmented(loader) == first
    assert torch.equal(state, torch.get_rng_state())
    assert len(set(first.values())) == 11


@pytest.mark.parametrize("dataset", DATASETS)
def test_loading_in_this_process_leaves_the_users_generators_alone(dataset: str) -> None:
    random.seed(1)
    np.random.seed(1)
    np.random.randn()
    sharded = shard(DataLoader(DATASETS[dataset], batch_size=4), rank=0, size=1, seed=0)
    for _ in range(2):  # before and after it is known what the data set draws from
        before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        list(sharded)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (random.getstate(), str(np.random.get_state()))


def test_sample_drawn_twice_is_augmented_twice() -> None:
    loader: DataLoader[Any] = DataLoader(Noisy(), batch_size=2, sampler=[3, 3, 3, 3])
    values = [part.batch[1].tolist() for part in shard(loader, rank=0, size=1, seed=1)]
    assert len({value for batch in values for value in batch}) == 4


def test_data_set_that_draws_late_is_noticed() -> None:
    class Late(Dataset[Any]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> tuple[int, float]:
            return index, random.gauss(0, 1) if index >= 9 else float(index)

    assert augmented(DataLoader(Late(), batch_size=4)) == augmented(DataLoader(Late(), batch_size=4), 4)


def test_data_set_that_draws_late_leaves_the_users_generators_alone() -> None:
    class Late(Noisy):
        def __getitem__(self, index: int) -> tuple[int, float]:
            return super().__getitem__(index) if index >= 9 else (index, 0.0)

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(2).tolist(), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    list(shard(DataLoader(Late(), batch_size=4), rank=0, size=1, seed=0))
    assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected


def test_bulk_loading_is_kept_where_nothing_is_drawn() -> None:
    class Bulk(Dataset[int]):
        asked: list[list[int]] = []  # noqa: RUF012

        def __len__(self) -> int:
            return 6

        def __getitems__(self, indices: list[int]) -> list[int]:
            self.asked.append(list(indices))
            return list(indices)

    list(shard(DataLoader(Bulk(), batch_size=4), rank=1, size=2, seed=0))
    assert Bulk.asked == [[2, 3], [5]]
