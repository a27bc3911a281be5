"""The baselines are what their names say, and find what was planted."""

import math

import numpy as np
import pytest
import torch

from duoka.recipes.datasets import synthetic_movielens
from duoka.recipes.datasets.movielens import ML1MDataset, SeenItems
from duoka.recipes.recommendation.baselines import ItemKNN, Popularity
from duoka.recipes.recommendation.ranking_metrics import RankingEvaluator, UserItemIndex, evaluate

PAIRS = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [2, 0], [3, 3]], dtype=np.int64)


@pytest.fixture
def seen() -> UserItemIndex:
    return UserItemIndex.of(SeenItems.from_pairs(PAIRS, 4, 5))


def test_popularity_counts_who_knows_a_film(seen):
    assert Popularity(seen, 5).all(torch.tensor([3, 0])).tolist() == [[3, 2, 1, 1, 0]] * 2


def test_itemknn_sums_the_shrunk_cosines_to_what_is_known(seen):
    model = ItemKNN(seen, 5, shrink=2)
    common = {(0, 1): 2, (0, 2): 1, (1, 2): 1}
    sizes = [3, 2, 1, 1, 0]
    for user, known in enumerate(([0, 1], [0, 1, 2], [0], [3])):
        expected = [
            sum(common.get((min(i, j), max(i, j)), 0) / (math.sqrt(sizes[i] * sizes[j]) + 2) for j in known)
            for i in range(5)
        ]
        assert model.all(torch.tensor([user]))[0].tolist() == pytest.approx(expected)


def test_itemknn_keeps_the_nearest_films_only(seen):
    scores = ItemKNN(seen, 5, neighbours=1, shrink=2).all(torch.tensor([1]))[0]
    nearest = {0: (1, 2 / (math.sqrt(6) + 2)), 1: (0, 2 / (math.sqrt(6) + 2)), 2: (1, 1 / (math.sqrt(2) + 2))}
    assert scores[:3].tolist() == pytest.approx([nearest[film][1] for film in range(3)])


def test_on_planted_tastes_neighbours_beat_popularity_and_the_law_beats_both(tmp_path):
    example = synthetic_movielens.make(300, 200, 9_000)
    synthetic_movielens.write(tmp_path, example)
    data = ML1MDataset(tmp_path)
    task = RankingEvaluator.of(data, "test")
    popular, neighbours = (model(task.seen, data.n_items).all for model in (Popularity, ItemKNN))
    law = torch.from_numpy(example.utility).float()
    found = [evaluate(score, task)["ndcg@10"] for score in (popular, neighbours, law.__getitem__)]
    assert 1.2 * found[0] < found[1] < found[2]
