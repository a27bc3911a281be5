"""Full ranking: metrics against a plain reference and torchmetrics, with ties, on one and two devices."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.functional import retrieval

from duoka import Trainer
from duoka.errors import ConfigError, DataError
from duoka.recipes.datasets import synthetic_movielens
from duoka.recipes.datasets.movielens import ML1MDataset, SeenItems
from duoka.recipes.recommendation.ranking_metrics import (
    CUTOFFS,
    EXCLUDED,
    METRICS,
    RankingEvaluator,
    RankingModel,
    top_k,
)
from duoka.recipes.recommendation.user_means import mean_metrics

N_USERS, N_ITEMS = 60, 90


def structure(rows: list[list[int]]) -> SeenItems:
    pairs = [(user, item) for user, items in enumerate(rows) for item in items]
    return SeenItems.from_pairs(np.array(pairs, dtype=np.int64).reshape(-1, 2), len(rows), N_ITEMS)


@pytest.fixture(scope="module")
def rows() -> tuple[list[list[int]], list[list[int]]]:
    """Seen and target items of each user; some users have no targets, and one has seen nearly all items."""
    random = np.random.default_rng(0)
    seen, targets = [], []
    for user in range(N_USERS):
        mixed = random.permutation(N_ITEMS).tolist()
        num_seen = 85 if user == 7 else int(random.integers(0, 40))
        num_targets = 3 if user == 7 else int(random.integers(0, 25)) * (user % 5 > 0)
        seen.append(mixed[:num_seen])
        targets.append(mixed[num_seen : num_seen + num_targets])
    return seen, targets


@pytest.fixture(scope="module")
def evaluator(rows) -> RankingEvaluator:
    return RankingEvaluator(structure(rows[0]), structure(rows[1]))


def scores_of(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(N_USERS, N_ITEMS, generator=generator)
    return {"distinct": normal, "tied": (2 * normal).round(), "constant": torch.zeros(N_USERS, N_ITEMS)}[kind]


def plain(scores: list[float], seen: list[int], targets: list[int]) -> dict[str, float]:
    """The metrics of one user in plain Python, as the module's docstring defines them."""
    candidates = [item for item in range(N_ITEMS) if item not in seen]
    order = sorted(candidates, key=lambda item: (-scores[item], item))
    level = {item: [other for other in candidates if scores[other] == scores[item]] for item in candidates}
    share = [len(set(level[item]) & set(targets)) / len(level[item]) for item in order]
    found: dict[str, float] = {}
    for k in CUTOFFS:
        ranks = [rank for rank, item in enumerate(order[:k], 1) if item in targets]
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(targets)) + 1))
        gain = sum(part / math.log2(rank + 1) for rank, part in enumerate(share[:k], 1))
        found |= {
            f"recall@{k}": len(ranks) / len(targets),
            f"precision@{k}": len(ranks) / k,
            f"ndcg@{k}": gain / ideal,
        }
        found |= {f"hr@{k}": float(bool(ranks)), f"mrr@{k}": 1 / ranks[0] if ranks else 0.0}
    return found


@pytest.mark.parametrize("kind", ["distinct", "tied", "constant"])
def test_metrics_equal_a_plain_reference(rows, evaluator, kind):
    scores = scores_of(kind)
    users = evaluator.users
    assert users.tolist() == [user for user in range(N_USERS) if rows[1][user]]
    found = evaluator.ranking_metrics(scores[users], users)
    for row, user in zip(found.tolist(), users.tolist(), strict=True):
        expected = plain(scores[user].tolist(), rows[0][user], rows[1][user])
        assert dict(zip(METRICS, row, strict=True)) == pytest.approx(expected, abs=1e-12), user
    assert evaluator.evaluate(lambda some: scores[some], batch_size=7) == pytest.approx(
        dict(zip(METRICS, found.mean(0).tolist(), strict=True)), abs=1e-12
    )


@pytest.mark.parametrize("kind", ["distinct", "tied", "constant"])
def test_metrics_equal_torchmetrics(rows, evaluator, kind):
    """NDCG gets the tied scores. The other functions sort ties unstably, so they get falling scores in our order.

    These are positive, since torchmetrics' precision ignores items with negative scores.
    """
    functions = {
        "recall": retrieval.retrieval_recall,
        "precision": retrieval.retrieval_precision,
        "hr": retrieval.retrieval_hit_rate,
        "mrr": retrieval.retrieval_reciprocal_rank,
    }
    scores, users = scores_of(kind), evaluator.users
    found = evaluator.ranking_metrics(scores[users], users)
    for row, user in zip(found.tolist(), users.tolist(), strict=True):
        candidates = torch.tensor([item for item in range(N_ITEMS) if item not in rows[0][user]])
        target = torch.isin(candidates, torch.tensor(rows[1][user]))
        keys = evaluator.sort_keys(scores[user : user + 1], torch.tensor([user]))
        _, items = top_k(keys, len(candidates))
        order = torch.empty(N_ITEMS).index_put_((items[0],), torch.arange(len(candidates), 0, -1.0))[candidates]
        for k in CUTOFFS:
            expected = {f"ndcg@{k}": retrieval.retrieval_normalized_dcg(scores[user, candidates], target, top_k=k)}
            expected |= {f"{name}@{k}": function(order, target, top_k=k) for name, function in functions.items()}
            for name, value in expected.items():
                assert row[METRICS.index(name)] == pytest.approx(float(value), abs=1e-6), (user, name)


def test_ndcg_is_the_mean_over_all_orders_of_ties():
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    nothing = SeenItems(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64))
    evaluator = RankingEvaluator(nothing, SeenItems(torch.tensor([0, 2]), torch.tensor([2, 4])))
    values = []
    for order in permutations(range(1, 5)):
        broken = scores.clone()
        broken[0, list(order)] += torch.tensor([0.4, 0.3, 0.2, 0.1])
        values.append(float(evaluator.ranking_metrics(broken, torch.tensor([0]))[0, METRICS.index("ndcg@10")]))
    tied = float(evaluator.ranking_metrics(scores, torch.tensor([0]))[0, METRICS.index("ndcg@10")])
    assert tied == pytest.approx(sum(values) / len(values), abs=1e-12)
    assert len({round(value, 9) for value in values}) > 1


def test_the_list_has_unseen_items_with_ties_in_index_order(rows, evaluator):
    users = torch.arange(N_USERS)
    keys, items = top_k(evaluator.sort_keys(scores_of("constant"), users), 20)
    for user in range(N_USERS):
        candidates = [item for item in range(N_ITEMS) if item not in rows[0][user]]
        shown = items[user][keys[user] != EXCLUDED].tolist()
        assert shown == candidates[:20]
    negative = torch.where(torch.arange(N_ITEMS) % 2 == 0, -0.0, 0.0).expand(N_USERS, -1)
    assert torch.equal(top_k(evaluator.sort_keys(negative, users), 20)[1], items)  # minus zero equals zero


def test_nan_scores_are_rejected(evaluator):
    scores = scores_of("distinct")
    scores[3, 5] = math.nan
    with pytest.raises(DataError, match="NaN"):
        evaluator.ranking_metrics(scores[evaluator.users], evaluator.users)


def test_scores_are_not_modified(evaluator):
    scores = scores_of("distinct")
    before = scores.clone()
    evaluator.ranking_metrics(scores[evaluator.users], evaluator.users)
    assert torch.equal(scores, before)


class Table(nn.Module):
    """A model whose scores are its parameter."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def score_all(self, users: torch.Tensor) -> torch.Tensor:
        assert not torch.is_autocast_enabled("cpu")
        return self.scores[users]


def test_one_and_two_devices_find_the_same_metrics(evaluator):
    scores = scores_of("tied")
    expected = evaluator.evaluate(lambda users: scores[users])
    for device in ("cpu", "cpu:2"):
        trainer = Trainer(
            RankingModel(Table(scores), evaluator),
            metrics=mean_metrics(),
            device=device,
            precision="bf16",
            verbose=False,
        )
        assert trainer.evaluate(evaluator.loader(batch_size=16)) == pytest.approx(expected, abs=1e-12)


def test_metrics_with_equal_first_batches_stay_separate():
    """In the first batch the one target comes first, so all metrics but precision are 1."""
    seen = structure([[]] * 4)
    evaluator = RankingEvaluator(seen, structure([[0], [0], [0, 1], [2]]))
    scores = torch.zeros(4, N_ITEMS)
    scores[:, 0] = 1
    trainer = Trainer(RankingModel(Table(scores), evaluator), metrics=mean_metrics(), device="cpu", verbose=False)
    found = trainer.evaluate(evaluator.loader(batch_size=1))
    assert found == pytest.approx(evaluator.evaluate(lambda users: scores[users]), abs=1e-12)
    assert found["hr@10"] == 1
    assert found["ndcg@10"] < found["hr@10"]


def test_earlier_parts_count_as_seen(tmp_path):
    synthetic_movielens.write(tmp_path, synthetic_movielens.make(40, 60, 1_000))
    data = ML1MDataset(tmp_path)
    validation, test = RankingEvaluator.of(data, "validation"), RankingEvaluator.of(data, "test")
    assert len(validation.seen.indices) == len(data.train)
    assert len(test.seen.indices) == len(data.train) + len(data.validation)
    assert torch.equal(validation.targets.indices, data.seen("validation").indices)
    with pytest.raises(ConfigError, match="part='train'"):
        RankingEvaluator.of(data, "train")
    cold = RankingEvaluator.of(ML1MDataset(tmp_path, split="cold-films"), "test", only_its_films=True)
    expected = set(cold.targets.indices.tolist())
    keys, ranked = top_k(cold.sort_keys(torch.rand(40, 60), torch.arange(40)), 60)
    assert set(ranked[keys != EXCLUDED].tolist()) == expected
