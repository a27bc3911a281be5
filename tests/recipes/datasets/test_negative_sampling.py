"""Negative sampling: uniform over unrated films, new in each epoch, the same on any number of devices."""

import numpy as np
import pytest
import torch

from duoka.data import DataPosition, local_batches
from duoka.errors import DataError
from duoka.recipes.datasets.movielens import SeenItems
from duoka.recipes.datasets.negative_sampling import NegativeSampler, TripletDataset, loader

N_USERS, N_ITEMS = 40, 23


@pytest.fixture(scope="module")
def pairs() -> np.ndarray:
    """Users who have rated between none and all but one of the films."""
    random = np.random.default_rng(0)
    rows = [(user, item) for user in range(N_USERS) for item in random.permutation(N_ITEMS)[: user % N_ITEMS]]
    return random.permutation(np.array(rows, dtype=np.int64))


@pytest.fixture(scope="module")
def seen(pairs) -> SeenItems:
    return SeenItems.from_pairs(pairs, N_USERS, N_ITEMS)


@pytest.mark.parametrize("spread", [1, 3])
def test_each_number_selects_another_unrated_film(pairs, spread):
    """A one-to-one map from numbers to unrated films draws uniformly if the numbers are uniform.

    With candidates ``spread`` apart, the films between them are never drawn.
    """
    films = np.arange(N_ITEMS) * spread
    pairs = np.stack([pairs[:, 0], films[pairs[:, 1]]], 1)
    seen = SeenItems.from_pairs(pairs, N_USERS, N_ITEMS * spread)

    class Counting:
        def integers(self, *_):
            return np.concatenate([np.arange(count) for count in sampler.num_unrated])

    sampler = NegativeSampler(seen, N_ITEMS * spread, candidates=films if spread > 1 else None)
    users = np.repeat(np.arange(N_USERS), sampler.num_unrated)
    drawn = sampler.draw(users, Counting())
    known = {tuple(pair) for pair in pairs.tolist()}
    unknown = [(user, item) for user in range(N_USERS) for item in films.tolist() if (user, item) not in known]
    assert list(zip(users.tolist(), drawn.tolist(), strict=True)) == unknown


def test_draws_are_uniform(seen):
    sampler = NegativeSampler(seen, N_ITEMS)
    drawn = sampler.draw(np.full(60_000, 11), np.random.default_rng(1))
    counts = np.bincount(drawn, minlength=N_ITEMS)
    assert set(np.flatnonzero(counts)) == set(range(N_ITEMS)) - set(seen.items_of(11).tolist())
    assert counts[counts > 0] == pytest.approx(5_000, rel=0.06)


def test_user_who_has_rated_all_films_is_named():
    seen = SeenItems.from_pairs(np.array([[0, 0], [1, 0], [1, 1]]), 2, 2)
    with pytest.raises(DataError, match="the user at index 1 has rated all 2 films"):
        NegativeSampler(seen, 2).draw(np.array([0, 1]), np.random.default_rng(0))
    with pytest.raises(DataError, match=r"^user 42 has rated all 2 films"):
        NegativeSampler(seen, 2, np.array([7, 42])).draw(np.array([0, 1]), np.random.default_rng(0))
    with pytest.raises(DataError, match="the user at index 1 has rated all 2 films of the training"):
        NegativeSampler(seen, 3, candidates=np.array([0, 1])).draw(np.array([1]), np.random.default_rng(0))


def test_each_epoch_has_other_negatives_and_the_same_pairs(pairs, seen):
    triples = TripletDataset(pairs, seen, N_ITEMS, seed=5)
    drawn = []
    for epoch in (0, 1, 0):
        triples.set_epoch(epoch)
        drawn.append(triples.negatives.clone())
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], TripletDataset(pairs, seen, N_ITEMS, seed=6).negatives)
    known = {tuple(pair) for pair in pairs.tolist()}
    assert sorted(known) == sorted(zip(triples.users.tolist(), triples.positives.tolist(), strict=True))
    for negatives in drawn:
        assert not known & set(zip(triples.users.tolist(), negatives.tolist(), strict=True))


def epoch_of(samples, size: int, epoch: int, skip: int = 0) -> list[tuple[int, int, int]]:
    """The samples of all ranks in an epoch, in the order of the global batches."""
    ranks = []
    for rank in range(size):
        parts = local_batches(loader(samples, 32), rank=rank, world_size=size, seed=9)
        parts.set_position(DataPosition(9, epoch, skip))
        ranks.append([part.batch for part in parts])
    steps = [batch for step in zip(*ranks, strict=True) for batch in step]
    columns = [torch.cat([batch[name] for batch in steps]).tolist() for name in ("users", "positives", "negatives")]
    return list(zip(*columns, strict=True))


def test_epoch_is_the_same_on_any_number_of_devices_and_after_a_resume(pairs, seen):
    samples = TripletDataset(pairs, seen, N_ITEMS)
    whole = epoch_of(samples, 1, 3)
    assert epoch_of(samples, 3, 3) == whole
    assert epoch_of(samples, 2, 3, skip=96) == whole[96:]
    other = epoch_of(samples, 1, 4)
    assert {row[:2] for row in other} == {row[:2] for row in whole}
    assert set(other) != set(whole)
