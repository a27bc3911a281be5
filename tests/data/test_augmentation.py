"""Augmentation: random numbers of a sample are a function of (seed, epoch, place in the epoch) alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate

from duoka.data import DataPosition, local_batches
from support.datasets import Noisy, NoisyInBulk


def augmented(
    loader: DataLoader[Any], size: int = 1, position: DataPosition | None = None, **options: Any
) -> dict[int, Any]:
    """What each sample became in one epoch."""
    seen: dict[int, Any] = {}
    for rank in range(size):
        sharded = local_batches(loader, rank=rank, world_size=size, seed=1, **options)
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
    assert augmented(loader, 2, batches_per_step=2) == single


@pytest.mark.parametrize("dataset", ["plain", "in bulk"])
def test_augmentation_is_the_same_with_any_number_of_workers(dataset: str) -> None:
    alone = augmented(DataLoader(DATASETS[dataset], batch_size=4, shuffle=True))
    for workers in (1, 2):
        loader: DataLoader[Any] = DataLoader(DATASETS[dataset], batch_size=4, shuffle=True, num_workers=workers)
        assert augmented(loader) == augmented(loader, 3) == alone


def test_augmentation_is_the_same_after_a_resume_and_another_in_each_epoch() -> None:
    loader: DataLoader[Any] = DataLoader(Noisy(), batch_size=2, shuffle=True)
    whole = augmented(loader)
    rest = augmented(loader, 3, DataPosition(seed=1, epoch=0, samples=4))
    assert len(rest) == 7
    assert rest.items() <= whole.items()
    assert set(augmented(loader, 1, DataPosition(seed=1, epoch=1)).values()).isdisjoint(whole.values())


def test_evaluation_augments_the_same_way_every_time() -> None:
    sharded = local_batches(DataLoader(Noisy(), batch_size=4), rank=0, world_size=1, seed=1, training=False)
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
def test_loading_in_this_process_keeps_the_users_generators(dataset: str) -> None:
    random.seed(1)
    np.random.seed(1)
    np.random.randn()
    sharded = local_batches(DataLoader(DATASETS[dataset], batch_size=4), rank=0, world_size=1, seed=0)
    for _ in range(2):  # before and after it is known what the data set draws from
        before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        list(sharded)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (random.getstate(), str(np.random.get_state()))


def test_sample_drawn_twice_is_augmented_twice() -> None:
    loader: DataLoader[Any] = DataLoader(Noisy(), batch_size=2, sampler=[3, 3, 3, 3])
    values = [part.batch[1].tolist() for part in local_batches(loader, rank=0, world_size=1, seed=1)]
    assert len({value for batch in values for value in batch}) == 4


def test_data_set_that_draws_late_is_noticed() -> None:
    class Late(Dataset[Any]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> tuple[int, float]:
            return index, random.gauss(0, 1) if index >= 9 else float(index)

    assert augmented(DataLoader(Late(), batch_size=4)) == augmented(DataLoader(Late(), batch_size=4), 4)


def test_data_set_that_draws_late_keeps_the_users_generators() -> None:
    class Late(Noisy):
        def __getitem__(self, index: int) -> tuple[int, float]:
            return super().__getitem__(index) if index >= 9 else (index, 0.0)

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(2).tolist(), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    list(local_batches(DataLoader(Late(), batch_size=4), rank=0, world_size=1, seed=0))
    assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected


def test_bulk_loading_is_kept_where_nothing_is_drawn() -> None:
    class Bulk(Dataset[int]):
        asked: list[list[int]] = []  # noqa: RUF012

        def __len__(self) -> int:
            return 6

        def __getitems__(self, indices: list[int]) -> list[int]:
            self.asked.append(list(indices))
            return list(indices)

    list(local_batches(DataLoader(Bulk(), batch_size=4), rank=1, world_size=2, seed=0))
    assert Bulk.asked == [[2, 3], [5]]


class Holding(Dataset[Any]):
    """A data set whose augmentation draws from a generator of its own."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[int, float]:
        rng = self.rng
        return index, torch.rand((), generator=rng).item() if isinstance(rng, torch.Generator) else rng.normal(0, 1)


class Jitter:
    """A transform that holds its generator."""

    def __init__(self) -> None:
        self.rng = random.Random(3)

    def __call__(self, index: int) -> tuple[int, float]:
        return index, self.rng.gauss(0, 1)


class Steps:
    """Transforms in a row, as torchvision's ``Compose``."""

    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)

    def __call__(self, index: int) -> Any:
        return self.transforms[0](index)


class Transformed(Dataset[Any]):
    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Any:
        return self.transform(index)


class Renewed(Holding):
    """Makes its generator anew for each epoch."""

    def __init__(self) -> None:
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.rng = np.random.default_rng(epoch)


HOLDING = {
    "NumPy's generator": lambda: Holding(np.random.default_rng(0)),
    "NumPy's older generator": lambda: Holding(np.random.RandomState(0)),
    "torch's generator": lambda: Holding(torch.Generator()),
    "subset": lambda: Subset(Holding(np.random.default_rng(0)), range(11)),
    "chained": lambda: ConcatDataset(
        [Subset(Transformed(Jitter()), range(4)), Subset(Transformed(Jitter()), range(4, 11))]
    ),
    "transform": lambda: Transformed(Steps(Jitter())),
    "made anew each epoch": Renewed,
}


@pytest.mark.parametrize("name", HOLDING)
def test_generator_that_a_data_set_holds_is_seeded_for_each_sample(name: str) -> None:
    def seen(*args: Any, workers: int = 0, epoch: int = 0, samples: int = 0) -> dict[int, Any]:
        loader = DataLoader(HOLDING[name](), batch_size=4, num_workers=workers)
        return augmented(loader, *args, DataPosition(seed=1, epoch=epoch, samples=samples))

    single = seen(1)
    assert len(set(single.values())) == 11
    assert seen(2) == seen(3) == seen(1, workers=2) == single
    assert seen(2, samples=5).items() <= single.items()
    assert set(seen(1, epoch=1).values()).isdisjoint(single.values())


def test_generator_that_a_data_set_holds_is_given_back_as_it_was() -> None:
    dataset = Holding(np.random.default_rng(0))
    sharded = local_batches(DataLoader(dataset, batch_size=4), rank=0, world_size=1, seed=0)
    first, second = ([part.batch[1].tolist() for part in sharded] for _ in range(2))
    assert first != second
    assert dataset.rng.random() == np.random.default_rng(0).random()


def test_collation_that_holds_a_generator_depends_on_the_place_only() -> None:
    class Masking:
        def __init__(self) -> None:
            self.generator = torch.Generator()

        def __call__(self, samples: list[Any]) -> Any:
            return torch.tensor(samples), torch.rand(len(samples), generator=self.generator)

    loader: DataLoader[Any] = DataLoader(range(11), batch_size=4, collate_fn=Masking())  # type: ignore[arg-type]
    first = augmented(loader)
    assert len(set(first.values())) == 11
    assert augmented(loader, 1, DataPosition(seed=1, samples=4)).items() <= first.items()


class Gaussian(Dataset[Any]):
    """Draws Gaussians, of which every other one is a spare that was drawn before."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, self.draw()


@pytest.mark.parametrize("draw", [np.random.randn, lambda: random.gauss(0, 1)])
def test_spare_gaussian_of_the_users_is_neither_used_nor_lost(draw: Any) -> None:
    loader: DataLoader[Any] = DataLoader(Gaussian(draw), batch_size=1)
    np.random.seed(0), random.seed(0)
    expected = augmented(loader)
    following = [draw() for _ in range(3)]
    for drawn in (1, 2):
        np.random.seed(0), random.seed(0)
        before = [draw() for _ in range(drawn)]
        assert augmented(loader) == expected
        assert [*before, *(draw() for _ in range(3 - drawn))] == following


def test_another_bit_generator_of_numpys_is_noticed() -> None:
    loader: DataLoader[Any] = DataLoader(Gaussian(np.random.rand), batch_size=1)
    list(local_batches(loader, rank=0, world_size=1, seed=0))
    found = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        following = np.random.PCG64(1)
        assert augmented(loader) == augmented(loader, 2)
        assert str(np.random.get_bit_generator().state) == str(following.state)
        np.random.set_bit_generator(np.random.MT19937(1))
        assert augmented(loader) == augmented(loader, 2)
    finally:
        np.random.set_bit_generator(found)


@pytest.mark.parametrize("late", [False, True])
def test_users_draws_between_batches_continue_as_without_loading(late: bool) -> None:
    def draws(batches: Any) -> list[float]:
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        drawn: list[float] = []
        for number, _ in enumerate(batches):
            if number >= 5 or not late:  # odd numbers of draws reach every place of a generator's state
                drawn += [random.getrandbits(32) for _ in range(number % 50)]
                drawn += [torch.rand(()).item(), np.random.randn(), random.gauss(0, 1), np.random.rand()]
        return drawn

    loader: DataLoader[Any] = DataLoader(range(64), batch_size=1)  # type: ignore[arg-type]
    assert draws(local_batches(loader, rank=0, world_size=1, seed=0)) == draws(range(64))


def test_data_set_that_holds_a_global_generator_keeps_its_state() -> None:
    for held in (torch.default_generator, np.random.mtrand._rand):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        expected = torch.rand(2).tolist(), random.random(), np.random.rand()
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        list(local_batches(DataLoader(Holding(held), batch_size=4), rank=0, world_size=1, seed=0))
        assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected
