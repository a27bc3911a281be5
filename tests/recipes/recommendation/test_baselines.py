"""Popularity and ItemKNN against plain formulas, and on data with planted preferences."""

import math

import numpy as np
import pytest
import torch

from duoka.recipes.datasets import synthetic_movielens
from duoka.recipes.datasets.movielens import ML1MDataset, SeenItems
from duoka.recipes.recommendation.baselines import ItemKNN, Popularity
from duoka.recipes.recommendation.ranking_metrics import RankingEvaluator

PAIRS = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [2, 0], [3, 3]], dtype=np.int64)


@pytest.fixture
def seen() -> SeenItems:
    return SeenItems.from_pairs(PAIRS, 4, 5)


def test_popularity_counts_the_users_of_an_item(seen):
    assert Popularity(seen, 5).score_all(torch.tensor([3, 0])).tolist() == [[3, 2, 1, 1, 0]] * 2


def test_itemknn_sums_the_shrunk_cosines_to_seen_items(seen):
    model = ItemKNN(seen, 5, shrink=2)
    common = {(0, 1): 2, (0, 2): 1, (1, 2): 1}
    sizes = [3, 2, 1, 1, 0]
    for user, known in enumerate(([0, 1], [0, 1, 2], [0], [3])):
        expected = [
            sum(common.get((min(i, j), max(i, j)), 0) / (math.sqrt(sizes[i] * sizes[j]) + 2) for j in known)
            for i in range(5)
        ]
        assert model.score_all(torch.tensor([user]))[0].tolist() == pytest.approx(expected)


def test_itemknn_keeps_the_nearest_items_only(seen):
    scores = ItemKNN(seen, 5, neighbors=1, shrink=2).score_all(torch.tensor([1]))[0]
    nearest = {0: (1, 2 / (math.sqrt(6) + 2)), 1: (0, 2 / (math.sqrt(6) + 2)), 2: (1, 1 / (math.sqrt(2) + 2))}
    assert scores[:3].tolist() == pytest.approx([nearest[item][1] for item in range(3)])


def test_itemknn_beats_popularity_and_the_ground_truth_beats_both(tmp_path):
    example = synthetic_movielens.make(300, 200, 9_000)
    synthetic_movielens.write(tmp_path, example)
    data = ML1MDataset(tmp_path)
    evaluator = RankingEvaluator.of(data, "test")
    popular, neighbors = (model(evaluator.seen, data.n_items).score_all for model in (Popularity, ItemKNN))
    truth = torch.from_numpy(example.utility).float()
    found = [evaluator.evaluate(score)["ndcg@10"] for score in (popular, neighbors, truth.__getitem__)]
    assert 1.2 * found[0] < found[1] < found[2]
