"""Full ranking: all items that a user has not seen are ranked, and the metrics of each list against its targets.

**Order.** Items are sorted by score (as float32), highest first, then by index. Recall, precision,
HR and MRR look at this list, which is also what a user gets.

**Ties in NDCG.** NDCG is the mean over all orders of items with equal scores, as in scikit-learn and
torchmetrics. (torchmetrics' other metrics sort ties unstably, and it has no full ranking on the device.)

For a user with target items ``T``, and ``top`` the first ``k`` of the list:

- Recall: ``|top & T| / |T|``; Precision: ``|top & T| / k``; HR (hit rate): 1 if ``top & T`` is not empty;
- MRR: one over the rank (from 1) of the first item of ``T``, 0 if none is in ``top``;
- NDCG: the sum of ``1 / log2(1 + rank)`` over ``top & T``, over the same sum for a list that starts with ``T``.

Each is averaged over the users with targets. Source: K. Järvelin and J. Kekäläinen, ACM TOIS 20(4),
2002; F. McSherry and M. Najork, Computing Information Retrieval Performance Measures Efficiently in
the Presence of Tied Scores, ECIR 2008.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from duoka.errors import DataError
from duoka.recipes.datasets.movielens import ML1MDataset, SeenItems
from duoka.utils.validation import check_choice

CUTOFFS = (10, 20, 50)
METRICS = tuple(f"{name}@{cutoff}" for name in ("recall", "precision", "ndcg", "hr", "mrr") for cutoff in CUTOFFS)
"""The metrics of one user, in the order of the columns of ``RankingEvaluator.ranking_metrics``."""
USERS_PER_BATCH = 256
EXCLUDED = torch.iinfo(torch.int64).min
"""Sort key of an item that is not ranked."""
ScoreFunction = Callable[[Tensor], Tensor]
"""Indices of users, int64 ``(batch,)``, to their scores of all items ``(batch, items)``."""


@dataclass(frozen=True)
class RankingEvaluator:
    """The metrics of score functions on one part of a data set."""

    seen: SeenItems
    """Items that are not ranked for a user."""
    targets: SeenItems
    """Items that should be ranked first."""
    excluded: Tensor | None = None
    """Items that are not ranked for any user, bool ``(items,)``."""

    @classmethod
    def of(cls, data: ML1MDataset, part: str, *, only_its_films: bool = False) -> RankingEvaluator:
        """Return the evaluator of ``part``, for which the earlier parts are seen.

        ``only_its_films`` ranks only items with ratings in the part, for items without training ratings.
        """
        check_choice("part", part, ("validation", "test"))
        earlier = ("train",) if part == "validation" else ("train", "validation")
        targets = data.seen(part)
        excluded = torch.bincount(targets.indices, minlength=data.n_items) == 0 if only_its_films else None
        return cls(data.seen(*earlier), targets, excluded)

    def to(self, device: torch.device) -> RankingEvaluator:
        """Return the same evaluator on ``device``."""
        excluded = None if self.excluded is None else self.excluded.to(device)
        return RankingEvaluator(self.seen.to(device), self.targets.to(device), excluded)

    @property
    def users(self) -> Tensor:
        """Indices of the users with targets, ascending."""
        return self.targets.indptr.diff().nonzero().flatten()

    def loader(self, batch_size: int = USERS_PER_BATCH) -> DataLoader[Any]:
        """Return batches of these users, as evaluation data of a Trainer."""
        return DataLoader(TensorDataset(self.users), batch_size=batch_size)

    def evaluate(self, score: ScoreFunction, *, batch_size: int = USERS_PER_BATCH) -> dict[str, float]:
        """Return the metrics of ``score``, averaged over the users, on one device; a Trainer uses several."""
        total = torch.zeros(len(METRICS), dtype=torch.float64, device=self.targets.indptr.device)
        with torch.inference_mode():
            for users in torch.split(self.users, batch_size):
                total += self.ranking_metrics(score(users), users).sum(0)
        return dict(zip(METRICS, (total / len(self.users)).tolist(), strict=True))

    def ranking_metrics(self, scores: Tensor, users: Tensor) -> Tensor:
        """Return the metrics of each user's list, float64 ``(users, len(METRICS))``.

        ``scores`` of all items ``(users, items)`` are on the evaluator's device; all ``users`` have a target.
        """
        keys = self.sort_keys(scores, users)
        best, items = top_k(keys, max(CUTOFFS))
        rows, targets = self.targets.pairs(users)
        is_target = torch.zeros(keys.shape, dtype=torch.bool, device=keys.device)
        is_target[rows, targets] = True
        hits = is_target.gather(1, items.clamp_(0, keys.shape[1] - 1)) & (best != EXCLUDED)
        gains = _tied_gains(best >> 32, hits, keys, keys[rows, targets], rows)
        padding = (0, max(CUTOFFS) - best.shape[1])
        hits, gains = (nn.functional.pad(part.double(), padding) for part in (hits, gains))
        return _metrics(hits, gains, self.targets.counts(users).double())

    def sort_keys(self, scores: Tensor, users: Tensor) -> Tensor:
        """Return int64 keys ``(users, items)`` that fall along each user's list; ``EXCLUDED`` is no item of it.

        The upper half is the score as float32, the lower the index, counted from the end.
        """
        bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 turns minus zero into zero
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # now integers in the order of the floats
        if bool(torch.isnan(scores).any()):
            raise DataError("the model's scores have NaN: training has diverged; lower the learning rate")
        keys = (bits.long() << 32) + torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
        keys[self.seen.pairs(users)] = EXCLUDED
        if self.excluded is not None:
            keys[:, self.excluded] = EXCLUDED
        return keys


def top_k(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the largest ``k`` keys of each row, descending, and their items; keys differ, so the order is unique."""
    best = keys.topk(min(k, keys.shape[1]), dim=1).values
    return best, keys.shape[1] - 1 - (best & 0xFFFFFFFF)


def _tied_gains(levels: Tensor, hits: Tensor, keys: Tensor, target_keys: Tensor, rows: Tensor) -> Tensor:
    """Return for each rank the share of targets among all items of its score, float64 ``(users, k)``.

    Items after the last rank may have its score, too: these are counted in the whole row.
    """
    group = nn.functional.pad((levels.diff(dim=1) != 0).long(), (1, 0)).cumsum(1)
    sizes = torch.zeros(levels.shape, dtype=torch.float64, device=levels.device)
    found = torch.zeros_like(sizes)
    sizes.scatter_add_(1, group, torch.ones_like(sizes))
    found.scatter_add_(1, group, hits.double())
    last = levels[:, -1:]
    smallest_key = last << 32
    later = (keys >= smallest_key).sum(1, keepdim=True) - levels.shape[1]
    tied_targets = torch.zeros(len(levels), dtype=torch.float64, device=levels.device)
    tied_targets.scatter_add_(0, rows, (target_keys >> 32 == last[rows, 0]).double())
    sizes.scatter_add_(1, group[:, -1:], later.double())
    found.scatter_(1, group[:, -1:], tied_targets[:, None])
    return (found / sizes.clamp(min=1)).gather(1, group)


def _metrics(hits: Tensor, gains: Tensor, counts: Tensor) -> Tensor:
    """Return the metrics from hits and gains by rank, float64 ``(users, ranks)``, and the numbers of targets."""
    ranks = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device)
    discounts = 1 / torch.log2(ranks + 1)
    ideals = nn.functional.pad(discounts.cumsum(0), (1, 0))
    first = torch.where(hits > 0, 1 / ranks, 0).amax(1)
    columns: dict[str, Tensor] = {}
    for k in CUTOFFS:
        found = hits[:, :k].sum(1)
        columns[f"recall@{k}"] = found / counts
        columns[f"precision@{k}"] = found / k
        columns[f"ndcg@{k}"] = (gains[:, :k] * discounts[:k]).sum(1) / ideals[counts.clamp(max=k).long()]
        columns[f"hr@{k}"] = (found > 0).double()
        columns[f"mrr@{k}"] = torch.where(first >= 1 / k - 1e-12, first, 0)
    return torch.stack([columns[name] for name in METRICS], dim=1)


class RankingModel(nn.Module):
    """A recommender as a Trainer evaluates it: a batch of users in, the metrics of their lists out.

    Args:
        model: its ``score_all(users)``, or that of its ``scorer()`` if it has one, is a ``ScoreFunction``.
        evaluator: the items to rank, and those that should come first.
    """

    def __init__(self, model: nn.Module, evaluator: RankingEvaluator) -> None:
        super().__init__()
        self.model, self.evaluator = model, evaluator
        self._on_device: dict[torch.device, RankingEvaluator] = {}
        self._score: ScoreFunction | None = None
        """Made once for all batches of an evaluation, which starts with ``eval()``."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": {}, "_score": None}

    def train(self, mode: bool = True) -> Self:
        """Set the mode and drop the scorer, whose weights may change; ``eval()`` calls this, too."""
        self._score = None
        return super().train(mode)

    def forward(self, users: Tensor) -> dict[str, Tensor]:
        """Return ``{"prediction": metrics of users}``; scores are float32 whatever the training's precision."""
        evaluator = self._on_device.get(users.device)
        if evaluator is None:
            evaluator = self._on_device[users.device] = self.evaluator.to(users.device)
        with torch.autocast(users.device.type, enabled=False):
            model: Any = self.model
            score = self._score or (model.scorer() if hasattr(model, "scorer") else model).score_all
            if not self.training:  # the weights stay the same
                self._score = score
            return {"prediction": evaluator.ranking_metrics(score(users), users)}
