"""Sample order: the global batches are those of one device for any sampler and number of ranks."""

from __future__ import annotations

import itertools
import logging
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from duoka.data import local_batches
from duoka.errors import ConfigError
from support import datasets
from support.datasets import LENGTHS, SIZES, flat, globals_of, numbers, parts_of

SAMPLERS = {
    "sequential": lambda length: {"batch_size": 4},
    "shuffled": lambda length: {"batch_size": 4, "shuffle": True},
    "shuffled, incomplete dropped": lambda length: {"batch_size": 4, "shuffle": True, "drop_last": True},
    "with replacement": lambda length: {
        "batch_size": 3,
        "sampler": RandomSampler(range(length), replacement=True, num_samples=2 * length),
    },
    "weighted": lambda length: {"batch_size": 5, "sampler": WeightedRandomSampler(range(1, length + 1), length + 3)},
    "own generator": lambda length: {"batch_size": 4, "shuffle": True, "generator": torch.Generator().manual_seed(3)},
    "custom": lambda length: {"batch_size": 4, "sampler": datasets.DrawingSampler(length)},
    "custom batches": lambda length: {"batch_sampler": datasets.Buckets(length)},
}


@pytest.mark.parametrize("batches_per_step", [1, 2, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_parts_of_all_ranks_make_the_global_batches_of_one_device(sampler: str, batches_per_step: int) -> None:
    for length in LENGTHS[1:]:
        loader = numbers(length, **SAMPLERS[sampler](length))
        single = globals_of(loader, 1, batches_per_step=batches_per_step)
        for size in SIZES[1:]:
            steps = parts_of(loader, size, batches_per_step=batches_per_step)
            assert [flat(step) for step in steps] == single
            for step in steps:
                assert [len(part) for part in step] == [
                    len(part) for part in torch.tensor_split(torch.arange(sum(map(len, step))), size)
                ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", LENGTHS)
def test_one_epoch_holds_every_sample_once(length: int, size: int) -> None:
    loader = numbers(length, batch_size=4, shuffle=length > 0)
    for training in (True, False):
        taken = flat(globals_of(loader, size, training=training, batches_per_step=2))
        assert sorted(taken) == list(range(length))


def test_without_shuffling_the_batches_are_the_loaders_own() -> None:
    loader = numbers(11, batch_size=4)
    assert globals_of(loader, 3) == [batch[0].tolist() for batch in loader]


def test_merged_batches_are_consecutive_batches_of_the_loader() -> None:
    assert globals_of(numbers(11, batch_size=2), 2, batches_per_step=2) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_uneven_last_batch_is_split_without_loss_or_repetition() -> None:
    assert parts_of(numbers(11, batch_size=8), 2) == [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9], [10]]]


def test_drop_last_leaves_no_incomplete_global_batch_in_training_only() -> None:
    loader = numbers(11, batch_size=2, drop_last=True)
    assert globals_of(loader, 2, batches_per_step=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert globals_of(loader, 2, batches_per_step=2, training=False) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("training", [True, False])
def test_rank_without_samples_gets_a_filler_in_training_only(training: bool) -> None:
    for loader in (numbers(5, batch_size=4), [[torch.arange(4)], [torch.arange(4, 5)]]):
        sharded = local_batches(loader, rank=2, world_size=3, seed=0, training=training)
        first, last = list(sharded)
        assert (first.count, first.global_count, first.batch[0].tolist()) == (1, 4, [3])
        assert (last.count, last.global_count) == (0, 1)
        assert last.batch[0].tolist() == [4] if training else last.batch is None


def test_filler_is_the_first_sample_of_the_global_batch() -> None:
    for loader in (numbers(2, batch_size=2), [[torch.arange(2)]], DataLoader(datasets.Numbers(2), batch_size=2)):
        (part,) = local_batches(loader, rank=2, world_size=3, seed=0)
        assert (part.count, part.global_count, torch.as_tensor(part.batch[0]).tolist()) in ((0, 2, [0]), (0, 2, 0))


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "sequential"])
def test_order_is_another_in_each_epoch_and_the_same_for_the_same_epoch(sampler: str) -> None:
    loader = numbers(64, **SAMPLERS[sampler](64))
    epochs = [globals_of(loader, 2, epoch=epoch) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs == [globals_of(loader, 1, epoch=epoch) for epoch in range(3)]
    assert globals_of(loader, 2, seed=6) != epochs[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_order_neither_reads_nor_changes_the_users_generators(sampler: str) -> None:
    loader = numbers(64, **SAMPLERS[sampler](64))
    first = globals_of(loader, 2)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    np.random.randn()  # leaves a number in reserve
    own = getattr(loader.sampler, "own", random.Random())
    before = torch.get_rng_state(), random.getstate(), own.getstate(), str(np.random.get_state())
    assert globals_of(loader, 2) == first
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), own.getstate(), str(np.random.get_state()))


def test_evaluation_takes_the_same_order_every_time() -> None:
    loader = numbers(64, batch_size=4, shuffle=True)
    sharded = local_batches(loader, rank=0, world_size=2, seed=0, training=False)
    assert [datasets.indices(part) for part in sharded] == [datasets.indices(part) for part in sharded]


def test_users_seed_of_a_generator_still_chooses_the_order() -> None:
    orders = [
        globals_of(numbers(64, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(seed)), 2)
        for seed in (1, 2, 1)
    ]
    assert orders[0] == orders[2] != orders[1]


def test_endless_sampler_is_read_no_further_than_needed() -> None:
    sharded = local_batches(numbers(7, batch_size=4, sampler=datasets.Endless()), rank=1, world_size=2, seed=0)
    parts = [part for part, _ in zip(sharded, range(100), strict=False)]
    assert all(part.global_count == 4 and part.count == 2 for part in parts)
    assert len({str(parts[start : start + 8]) for start in range(0, 96, 8)}) == 12  # no draw is repeated
    sharded.close()


def test_set_epoch_of_sampler_and_data_set_is_called() -> None:
    class EpochRecorder(datasets.Logged):
        epochs: ClassVar[list[int]] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    class RecordingSampler(SequentialSampler):
        epochs: ClassVar[list[int]] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    dataset = EpochRecorder(4)
    sharded = local_batches(DataLoader(dataset, sampler=RecordingSampler(dataset)), rank=0, world_size=1, seed=0)
    for _ in range(3):
        list(sharded)
    assert sorted(set(dataset.epochs)) == sorted(set(RecordingSampler.epochs)) == [0, 1, 2]


@pytest.mark.parametrize("shuffle", [True, False])
def test_distributed_sampler_is_replaced_by_the_whole_order(shuffle: bool, caplog: pytest.LogCaptureFixture) -> None:
    dataset = datasets.Logged(11)
    sampler = DistributedSampler(dataset, num_replicas=2, rank=1, shuffle=shuffle)
    with caplog.at_level(logging.WARNING, "duoka"):
        batches = globals_of(DataLoader(dataset, batch_size=4, sampler=sampler), 2)
    assert sorted(flat(batches)) == list(range(11))
    assert (flat(batches) == list(range(11))) is not shuffle


def test_samplers_that_divide_by_themselves_are_refused() -> None:
    class Divided(SequentialSampler):
        num_replicas = 2

    dataset = datasets.Logged(11)
    with pytest.raises(ConfigError, match="already divides the samples over 2"):
        local_batches(DataLoader(dataset, sampler=Divided(dataset)), rank=0, world_size=2, seed=0)


def test_sampler_of_index_lists_without_collation_is_cut_too() -> None:
    tensors = torch.arange(11) * 10
    dataset = _Rows(tensors)
    sampler = BatchSampler(RandomSampler(range(11)), 4, drop_last=False)
    loader = DataLoader(dataset, batch_size=None, sampler=sampler)
    single = globals_of(loader, 1)
    assert sorted(flat(single)) == tensors.tolist()
    assert globals_of(loader, 3) == single


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: list[int]) -> torch.Tensor:
        return self.rows[index]


def test_lengths_are_those_of_the_epoch() -> None:
    for length in LENGTHS[1:]:
        for options in (
            {"batch_size": 4},
            {"batch_size": 4, "drop_last": True},
            {"batch_sampler": datasets.Buckets(length)},
        ):
            for merged, training in itertools.product((1, 2, 3), (True, False)):
                sharded = local_batches(
                    numbers(length, **options), rank=0, world_size=2, seed=0, batches_per_step=merged, training=training
                )
                parts = list(sharded)
                assert len(sharded) == len(parts)
                assert sharded.samples_per_epoch in (None, sum(part.global_count for part in parts))
    assert local_batches(numbers(11, batch_size=4), rank=0, world_size=2, seed=0).samples_per_epoch == 11


@pytest.mark.parametrize(("rank", "size", "batches_per_step"), [(2, 2, 1), (-1, 2, 1), (0, 0, 1), (0, 1, 0)])
def test_impossible_share_is_an_error(rank: int, size: int, batches_per_step: int) -> None:
    with pytest.raises(ConfigError):
        local_batches(numbers(4), rank=rank, world_size=size, seed=0, batches_per_step=batches_per_step)


def test_data_set_instead_of_a_loader_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"wrap it: torch.utils.data.DataLoader\("):
        local_batches(datasets.Logged(3), rank=0, world_size=1, seed=0)


@pytest.mark.parametrize("wrong", [iter([torch.zeros(2)]), torch.zeros(3), {"x": torch.zeros(3)}, "text", 5])
def test_what_is_no_loader_is_an_error(wrong: object) -> None:
    with pytest.raises(ConfigError):
        local_batches(wrong, rank=0, world_size=1, seed=0)
