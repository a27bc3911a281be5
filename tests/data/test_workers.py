"""DataLoader workers: exceptions arrive, workers stop or persist, and see the user's own data set."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from duoka.data import local_batches
from support.datasets import Logged, Noisy, Numbers, globals_of, indices, numbers


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
def test_an_exception_in_a_data_set_keeps_its_type(workers: int) -> None:
    sharded = local_batches(DataLoader(Unlucky(), batch_size=4, num_workers=workers), rank=1, world_size=2, seed=0)
    state = torch.get_rng_state()
    with pytest.raises(UnluckyError, match="sample 6"):
        list(sharded)
    assert torch.equal(state, torch.get_rng_state())
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("dataset", [Noisy(40), Numbers(40)])
def test_leaving_an_epoch_early_ends_its_workers(dataset: Any) -> None:
    sharded = local_batches(DataLoader(dataset, batch_size=2, num_workers=1), rank=0, world_size=1, seed=0)
    for _ in sharded:
        break
    del _
    gc.collect()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("dataset", [Noisy(40), Numbers(40)])
def test_closing_ends_workers_that_stay_and_the_loader_can_be_used_again(dataset: Any) -> None:
    sharded = local_batches(
        DataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True), rank=0, world_size=2, seed=0
    )
    list(sharded)
    first = multiprocessing.active_children()
    list(sharded)
    assert [worker.pid for worker in first] == [worker.pid for worker in multiprocessing.active_children()] != []
    sharded.close()
    assert multiprocessing.active_children() == []
    assert len(list(sharded)) == 10
    sharded.close()


def test_closing_in_the_middle_of_an_epoch_ends_it() -> None:
    sharded = local_batches(numbers(40, batch_size=4, num_workers=1), rank=0, world_size=1, seed=0)
    running = iter(sharded)
    next(running)
    sharded.close()
    assert list(running) == []
    assert multiprocessing.active_children() == []


def test_persistent_workers_load_the_right_samples_after_a_break() -> None:
    loader = numbers(40, batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)
    sharded = local_batches(loader, rank=0, world_size=1, seed=5)
    for _ in sharded:
        break
    second = [indices(part) for part in sharded]
    sharded.close()
    assert second == globals_of(numbers(40, batch_size=4, shuffle=True), 1, epoch=1)


class EpochRecorder(Logged):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> int:
        return self.epoch


def test_set_epoch_is_called_in_persistent_workers() -> None:
    loader = DataLoader(EpochRecorder(4), batch_size=4, num_workers=1, persistent_workers=True)
    sharded = local_batches(loader, rank=0, world_size=1, seed=0)
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
    (part,) = local_batches(loader, rank=0, world_size=1, seed=0)
    assert part.batch.tolist() == [10, 11, 12, 13]


def test_rank_without_a_single_sample_ends_its_workers_too() -> None:
    sharded = local_batches(numbers(2, batch_size=4, num_workers=1), rank=2, world_size=3, seed=0, training=False)
    assert [tuple(part) for part in sharded] == [(None, 0, 2)]


def test_only_the_ranks_own_samples_are_loaded() -> None:
    dataset = Logged(11)
    list(local_batches(DataLoader(dataset, batch_size=4), rank=1, world_size=3, seed=0, batches_per_step=2))
    assert dataset.loaded == [3, 4, 5, 9]


SCRIPT = """
import sys
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import duoka
from duoka.data import local_batches


class Sample(NamedTuple):
    number: torch.Tensor


class Refused(Exception):
    pass


class Table(Dataset):
    def __init__(self, refused):
        self.refused = refused

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == self.refused:
            raise Refused(index)
        return Sample(torch.tensor(index))


class Stream(Table, IterableDataset):
    def __iter__(self):
        yield from (self[index] for index in range(8))


def joined(samples):
    return Sample(torch.stack([sample.number for sample in samples]))


def started(worker):
    assert isinstance(torch.utils.data.get_worker_info().dataset, Table)


def load(kind, context, refused):
    world = duoka.current_world()
    options = {"collate_fn": joined, "worker_init_fn": started, "multiprocessing_context": context}
    loader = DataLoader(kind(refused), batch_size=4, num_workers=1, persistent_workers=True, **options)
    sharded = local_batches(loader, rank=world.rank, world_size=world.size, seed=0)
    seen = []
    for _ in range(2):
        for part in sharded:
            assert type(part.batch) is Sample
            seen += part.batch.number.tolist()
    sharded.close()
    return seen


if __name__ == "__main__":
    context, name = sys.argv[1:]
    kind = {"Table": Table, "Stream": Stream}[name]
    print(duoka.launch(load, kind, context, None, devices="cpu:2", returns="all"))
    try:
        duoka.launch(load, kind, context, 2, devices="cpu:2")
    except Refused as error:
        print("refused", error.__class__ is Refused)
"""


@pytest.mark.parametrize(
    ("context", "kind"),
    [
        ("fork", "Table"),
        ("fork", "Stream"),
        pytest.param("spawn", "Table", marks=pytest.mark.extended),
        pytest.param("spawn", "Stream", marks=pytest.mark.extended),
    ],
)
def test_dataloader_workers_of_ranks_know_the_scripts_classes(context: str, kind: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", str(script), context, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[[0, 1, 4, 5, 0, 1, 4, 5], [2, 3, 6, 7, 2, 3, 6, 7]]", "refused True"], (
        done.stderr
    )


class Counting(Numbers):
    """Counts in shared memory what its workers load."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.loaded = torch.zeros((), dtype=torch.int64).share_memory_()
        self.lock = multiprocessing.get_context("spawn").Lock()

    def __iter__(self) -> Iterator[int]:
        for number in super().__iter__():
            with self.lock:
                self.loaded += 1
            yield number


def test_spawned_workers_share_what_a_data_set_shares() -> None:
    dataset = Counting(6)
    loader = DataLoader(dataset, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    list(local_batches(loader, rank=0, world_size=1, seed=0))
    assert dataset.loaded == 6


def test_spawned_workers_watch_generators_of_their_own() -> None:
    alone = list(
        local_batches(DataLoader(Noisy(), batch_size=4), rank=0, world_size=1, seed=0)
    )  # this process's are found by now
    loader: DataLoader[Any] = DataLoader(Noisy(), batch_size=4, num_workers=1, multiprocessing_context="spawn")
    spawned = list(local_batches(loader, rank=0, world_size=1, seed=0))
    assert [part.batch[1].tolist() for part in spawned] == [part.batch[1].tolist() for part in alone]


class Permuted(Numbers):
    """Its workers agree by a generator that it holds on who yields what."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.rng = torch.Generator()

    def __iter__(self) -> Iterator[int]:
        info: Any = get_worker_info()
        yield from torch.randperm(self.length, generator=self.rng).tolist()[info.id :: info.num_workers]


def test_a_streams_generator_starts_equal_in_all_workers_each_epoch() -> None:
    def epochs(**options: Any) -> list[list[int]]:
        sharded = local_batches(
            DataLoader(Permuted(12), batch_size=3, num_workers=2, **options), rank=0, world_size=1, seed=0
        )
        seen = [[number for part in sharded for number in part.batch.tolist()] for _ in range(2)]
        sharded.close()
        return seen

    first, second = epochs()
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert epochs(persistent_workers=True) == [first, second]
