"""Worker processes: their errors arrive, they end, they may stay, and they see the user's own data set."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from duoka.data import shard

from .helpers import Logged, Noisy, Numbers, globals_of, indices, numbers


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert multiprocessing.active_children() == []


class UnluckyError(Exception):
    pass


class Unlucky(Dataset[int]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        if index == 6:
            raise UnluckyError(f"sample {index}")
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_exception_in_a_data_set_arrives_with_its_own_type(workers: int) -> None:
    sharded = shard(DataLoader(Unlucky(), batch_size=4, num_workers=workers), rank=1, size=2, seed=0)
    state = torch.get_rng_state()
    with pytest.raises(UnluckyError, match="sample 6"):
        list(sharded)
    assert torch.equal(state, torch.get_rng_state())
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("dataset", [Noisy(40), Numbers(40)])
def test_leaving_an_epoch_early_ends_its_workers(dataset: Any) -> None:
    sharded = shard(DataLoader(dataset, batch_size=2, num_workers=1), rank=0, size=1, seed=0)
    for _ in sharded:
        break
    del _
    gc.collect()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("dataset", [Noisy(40), Numbers(40)])
def test_closing_ends_workers_that_stay_and_the_loader_can_be_used_again(dataset: Any) -> None:
    sharded = shard(DataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True), rank=0, size=2, seed=0)
    list(sharded)
    first = multiprocessing.active_children()
    list(sharded)
    assert [worker.pid for worker in first] == [worker.pid for worker in multiprocessing.active_children()] != []
    sharded.close()
    assert multiprocessing.active_children() == []
    assert len(list(sharded)) == 10
    sharded.close()


def test_closing_in_the_middle_of_an_epoch_ends_it() -> None:
    sharded = shard(numbers(40, batch_size=4, num_workers=1), rank=0, size=1, seed=0)
    running = iter(sharded)
    next(running)
    sharded.close()
    assert list(running) == []
    assert multiprocessing.active_children() == []


def test_workers_that_stay_after_an_epoch_left_early_load_the_right_samples() -> None:
    loader = numbers(40, batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)
    sharded = shard(loader, rank=0, size=1, seed=5)
    for _ in sharded:
        break
    second = [indices(part) for part in sharded]
    sharded.close()
    assert second == globals_of(numbers(40, batch_size=4, shuffle=True), 1, epoch=1)


class Told(Logged):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> int:
        return self.epoch


def test_data_sets_in_workers_that_stay_are_told_the_epoch() -> None:
    loader = DataLoader(Told(4), batch_size=4, num_workers=1, persistent_workers=True)
    sharded = shard(loader, rank=0, size=1, seed=0)
    assert [next(iter(list(sharded))).batch.tolist() for _ in range(2)] == [[0] * 4, [1] * 4]
    sharded.close()


class Offset(Dataset[int]):
    offset = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index + self.offset


def set_offset(worker: int) -> None:
    info: Any = get_worker_info()
    info.dataset.offset = 10 + worker


def test_worker_init_fn_sees_the_users_own_data_set() -> None:
    loader = DataLoader(Offset(), batch_size=4, num_workers=1, worker_init_fn=set_offset)
    (part,) = shard(loader, rank=0, size=1, seed=0)
    assert part.batch.tolist() == [10, 11, 12, 13]


def test_rank_without_a_single_sample_ends_its_workers_too() -> None:
    sharded = shard(numbers(2, batch_size=4, num_workers=1), rank=2, size=3, seed=0, training=False)
    assert [tuple(part) for part in sharded] == [(None, 0, 2)]


def test_only_the_ranks_own_samples_are_loaded() -> None:
    dataset = Logged(11)
    list(shard(DataLoader(dataset, batch_size=4), rank=1, size=3, seed=0, merge=2))
    assert dataset.loaded == [3, 4, 5, 9]
