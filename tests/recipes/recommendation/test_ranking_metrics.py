"""Full ranking: the measures are those of a plain reference and of torchmetrics, ties included, on one device and two."""

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
    HIDDEN,
    NAMES,
    RankedItems,
    RankingEvaluator,
    UserItemIndex,
    evaluate,
    means,
    measures,
    top,
)

N_USERS, N_ITEMS = 60, 90


def structure(rows: list[list[int]]) -> SeenItems:
    pairs = [(user, item) for user, items in enumerate(rows) for item in items]
    return SeenItems.from_pairs(np.array(pairs, dtype=np.int64).reshape(-1, 2), len(rows), N_ITEMS)


@pytest.fixture(scope="module")
def rows() -> tuple[list[list[int]], list[list[int]]]:
    """What each user knows and should find: also users who find nothing, and one for whom few films are left."""
    random = np.random.default_rng(0)
    seen, targets = [], []
    for user in range(N_USERS):
        mixed = random.permutation(N_ITEMS).tolist()
        known = 85 if user == 7 else int(random.integers(0, 40))
        wanted = 3 if user == 7 else int(random.integers(0, 25)) * (user % 5 > 0)
        seen.append(mixed[:known])
        targets.append(mixed[known : known + wanted])
    return seen, targets


@pytest.fixture(scope="module")
def task(rows) -> RankingEvaluator:
    return RankingEvaluator(UserItemIndex.of(structure(rows[0])), UserItemIndex.of(structure(rows[1])))


def scores_of(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(N_USERS, N_ITEMS, generator=generator)
    return {"distinct": normal, "tied": (2 * normal).round(), "constant": torch.zeros(N_USERS, N_ITEMS)}[kind]


def plain(scores: list[float], seen: list[int], targets: list[int]) -> dict[str, float]:
    """The measures of one user as the module's first lines define them, in plain Python."""
    candidates = [item for item in range(N_ITEMS) if item not in seen]
    order = sorted(candidates, key=lambda item: (-scores[item], item))
    level = {item: [other for other in candidates if scores[other] == scores[item]] for item in candidates}
    share = [len(set(level[item]) & set(targets)) / len(level[item]) for item in order]
    found: dict[str, float] = {}
    for k in CUTOFFS:
        places = [place for place, item in enumerate(order[:k], 1) if item in targets]
        ideal = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(targets)) + 1))
        gain = sum(part / math.log2(place + 1) for place, part in enumerate(share[:k], 1))
        found |= {
            f"recall@{k}": len(places) / len(targets),
            f"precision@{k}": len(places) / k,
            f"ndcg@{k}": gain / ideal,
        }
        found |= {f"hr@{k}": float(bool(places)), f"mrr@{k}": 1 / places[0] if places else 0.0}
    return found


@pytest.mark.parametrize("kind", ["distinct", "tied", "constant"])
def test_measures_are_those_of_a_plain_reference(rows, task, kind):
    scores = scores_of(kind)
    users = task.users
    assert users.tolist() == [user for user in range(N_USERS) if rows[1][user]]
    found = measures(scores[users], task, users)
    for row, user in zip(found.tolist(), users.tolist(), strict=True):
        expected = plain(scores[user].tolist(), rows[0][user], rows[1][user])
        assert dict(zip(NAMES, row, strict=True)) == pytest.approx(expected, abs=1e-12), user
    assert evaluate(lambda some: scores[some], task, block=7) == pytest.approx(
        dict(zip(NAMES, found.mean(0).tolist(), strict=True)), abs=1e-12
    )


@pytest.mark.parametrize("kind", ["distinct", "tied", "constant"])
def test_measures_are_those_of_torchmetrics(rows, task, kind):
    """NDCG of the scores as they are, ties and all.

    Where torchmetrics leaves the order of ties to a sort that promises none it is given our order, as falling scores
    (positive ones: its precision counts no film of a score below 0).
    """
    functions = {
        "recall": retrieval.retrieval_recall,
        "precision": retrieval.retrieval_precision,
        "hr": retrieval.retrieval_hit_rate,
        "mrr": retrieval.retrieval_reciprocal_rank,
    }
    scores, users = scores_of(kind), task.users
    found = measures(scores[users], task, users)
    for row, user in zip(found.tolist(), users.tolist(), strict=True):
        candidates = torch.tensor([item for item in range(N_ITEMS) if item not in rows[0][user]])
        target = torch.isin(candidates, torch.tensor(rows[1][user]))
        _, films = top(scores[user : user + 1], task, torch.tensor([user]), len(candidates))
        order = torch.empty(N_ITEMS).index_put_((films[0],), torch.arange(len(candidates), 0, -1.0))[candidates]
        for k in CUTOFFS:
            expected = {f"ndcg@{k}": retrieval.retrieval_normalized_dcg(scores[user, candidates], target, top_k=k)}
            expected |= {f"{name}@{k}": function(order, target, top_k=k) for name, function in functions.items()}
            for name, value in expected.items():
                assert row[NAMES.index(name)] == pytest.approx(float(value), abs=1e-6), (user, name)


def test_ndcg_is_the_mean_over_all_orders_of_ties():
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    nothing = UserItemIndex(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64))
    task = RankingEvaluator(nothing, UserItemIndex(torch.tensor([0, 2]), torch.tensor([2, 4])))
    values = []
    for order in permutations(range(1, 5)):
        broken = scores.clone()
        broken[0, list(order)] += torch.tensor([0.4, 0.3, 0.2, 0.1])
        values.append(float(measures(broken, task, torch.tensor([0]))[0, NAMES.index("ndcg@10")]))
    tied = float(measures(scores, task, torch.tensor([0]))[0, NAMES.index("ndcg@10")])
    assert tied == pytest.approx(sum(values) / len(values), abs=1e-12)
    assert len({round(value, 9) for value in values}) > 1


def test_the_list_has_no_known_film_and_takes_ties_in_the_order_of_places(rows, task):
    users = torch.arange(N_USERS)
    keys, films = top(scores_of("constant"), task, users, 20)
    for user in range(N_USERS):
        candidates = [item for item in range(N_ITEMS) if item not in rows[0][user]]
        shown = films[user][keys[user] != HIDDEN].tolist()
        assert shown == candidates[:20]
    negative = torch.where(torch.arange(N_ITEMS) % 2 == 0, -0.0, 0.0).expand(N_USERS, -1)
    assert torch.equal(top(negative, task, users, 20)[1], films)  # minus zero is zero


def test_scores_that_are_no_numbers_are_refused(task):
    scores = scores_of("distinct")
    scores[3, 5] = math.nan
    with pytest.raises(DataError, match="NaN"):
        measures(scores[task.users], task, task.users)


def test_scores_are_left_as_they_are(task):
    scores = scores_of("distinct")
    before = scores.clone()
    measures(scores[task.users], task, task.users)
    assert torch.equal(scores, before)


class Table(nn.Module):
    """A model that knows its scores by heart."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def scorer(self) -> "Table":
        assert not torch.is_autocast_enabled("cpu")
        return self

    def all(self, users: torch.Tensor) -> torch.Tensor:
        return self.scores[users]


def test_one_device_and_two_measure_the_same(task):
    scores = scores_of("tied")
    expected = evaluate(lambda users: scores[users], task)
    for device in ("cpu", "cpu:2"):
        trainer = Trainer(
            RankedItems(Table(scores), task), metrics=means(), device=device, precision="bf16", verbose=False
        )
        assert trainer.evaluate(task.loader(block=16)) == pytest.approx(expected, abs=1e-12)


def test_measures_that_begin_alike_stay_apart():
    """One film to be found for each user, which comes first: all measures but precision are 1 in the first block."""
    seen = UserItemIndex.of(structure([[]] * 4))
    task = RankingEvaluator(seen, UserItemIndex.of(structure([[0], [0], [0, 1], [2]])))
    scores = torch.zeros(4, N_ITEMS)
    scores[:, 0] = 1
    trainer = Trainer(RankedItems(Table(scores), task), metrics=means(), device="cpu", verbose=False)
    found = trainer.evaluate(task.loader(block=1))
    assert found == pytest.approx(evaluate(lambda users: scores[users], task), abs=1e-12)
    assert found["hr@10"] == 1
    assert found["ndcg@10"] < found["hr@10"]


def test_what_came_before_a_part_is_known_to_it(tmp_path):
    synthetic_movielens.write(tmp_path, synthetic_movielens.make(40, 60, 1_000))
    data = ML1MDataset(tmp_path)
    validation, test = RankingEvaluator.of(data, "validation"), RankingEvaluator.of(data, "test")
    assert len(validation.seen.indices) == len(data.train)
    assert len(test.seen.indices) == len(data.train) + len(data.validation)
    assert torch.equal(validation.targets.indices, torch.from_numpy(data.seen("validation").indices))
    with pytest.raises(ConfigError, match="'train' cannot be ranked"):
        RankingEvaluator.of(data, "train")
    cold = RankingEvaluator.of(ML1MDataset(tmp_path, split="cold-films"), "test", only_its_films=True)
    films = set(cold.targets.indices.tolist())
    keys, ranked = top(torch.rand(40, 60), cold, torch.arange(40), 60)
    assert set(ranked[keys != HIDDEN].tolist()) == films
