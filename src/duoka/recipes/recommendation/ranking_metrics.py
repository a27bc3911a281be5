"""Full ranking: every film that a user does not know yet is ranked, and the films of the test are looked for at the top.

**Order.** Films come by score, highest first; films of equal score (as float32) in the order of their places. That list is
what Recall, Precision, HR and MRR look at, and what a user is shown.

**Ties in NDCG.** A list among equals is an accident, so NDCG is the mean over all orders of films of equal score, as
scikit-learn's and torchmetrics' are. (torchmetrics' other measures take ties in the order of a sort that promises none.)

Per user ``u`` with test films ``T``, and ``top`` the first ``k`` of the list:

- Recall: ``|top & T| / |T|``; Precision: ``|top & T| / k``; HR (hit rate): whether ``top & T`` is not empty;
- MRR: one over the place (from 1) of the first film of ``T``, 0 where it is not among ``top``;
- NDCG: the sum of ``1 / log2(1 + place)`` over ``top & T``, divided by the same for a list that begins with ``T``.

Each is averaged over the users that have a test film. Source: K. Järvelin and J. Kekäläinen, ACM TOIS 20(4), 2002; F.
McSherry and M. Najork, Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores, ECIR
2008.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric, MetricCollection

from duoka.errors import ConfigError, DataError
from duoka.recipes.datasets.movielens import ML1MDataset, SeenItems

__all__ = [
    "CUTOFFS",
    "NAMES",
    "UserItemIndex",
    "RankedItems",
    "RankingEvaluator",
    "UserMean",
    "evaluate",
    "means",
    "measures",
    "top",
]

CUTOFFS = (10, 20, 50)
MEASURES = ("recall", "precision", "ndcg", "hr", "mrr")
NAMES = tuple(f"{name}@{cutoff}" for name in MEASURES for cutoff in CUTOFFS)
"""The measures of one user, in the order of ``measures``' columns."""
BLOCK = 256
"""Users that are scored at once."""
Score = Callable[[Tensor], Tensor]
"""From places of users, int64 ``(batch,)``, to scores of all films ``(batch, films)``."""


@dataclass(frozen=True)
class UserItemIndex:
    """Films by user, as tensors on any device; see ``Seen``."""

    indptr: Tensor
    indices: Tensor

    @classmethod
    def of(cls, seen: SeenItems) -> UserItemIndex:
        """Return the same as tensors on the host."""
        return cls(torch.from_numpy(seen.indptr), torch.from_numpy(seen.indices))

    def to(self, device: torch.device) -> UserItemIndex:
        """Return the same on ``device``."""
        return UserItemIndex(self.indptr.to(device), self.indices.to(device))

    def pairs(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """Return row in ``users`` and film, both ``(pairs,)``, of all films of these users."""
        begins = self.indptr[users]
        counts = self.indptr[users + 1] - begins
        rows = torch.arange(len(users), device=users.device).repeat_interleave(counts)
        steps = torch.arange(len(rows), device=users.device) - (counts.cumsum(0) - counts)[rows]
        return rows, self.indices[begins[rows] + steps]

    def counts(self, users: Tensor) -> Tensor:
        """Return how many films each of ``users`` has, ``(users,)``."""
        return self.indptr[users + 1] - self.indptr[users]


@dataclass(frozen=True)
class RankingEvaluator:
    """What is ranked for whom, and what should come first."""

    seen: UserItemIndex
    """Films that are not ranked, as the user knows them."""
    targets: UserItemIndex
    """Films that should come first."""
    excluded: Tensor | None = None
    """Films that are ranked for nobody, bool ``(films,)``."""

    @classmethod
    def of(cls, data: ML1MDataset, part: str, *, only_its_films: bool = False) -> RankingEvaluator:
        """Return the ranking of ``part``: what came before it (training; for the test, validation too) is known.

        ``only_its_films`` ranks no film but those that the part has ratings of: for films that training has never seen.
        """
        if part not in ("validation", "test"):
            raise ConfigError(f"the part {part!r} cannot be ranked: there is validation, test")
        earlier = ("train",) if part == "validation" else ("train", "validation")
        targets = UserItemIndex.of(data.seen(part))
        excluded = None
        if only_its_films:
            excluded = torch.ones(data.n_items, dtype=torch.bool)
            excluded[targets.indices] = False
        return cls(UserItemIndex.of(data.seen(*earlier)), targets, excluded)

    def to(self, device: torch.device) -> RankingEvaluator:
        """Return the same on ``device``."""
        excluded = None if self.excluded is None else self.excluded.to(device)
        return RankingEvaluator(self.seen.to(device), self.targets.to(device), excluded)

    @property
    def users(self) -> Tensor:
        """Places of the users that have something to be found, ascending."""
        return self.targets.indptr.diff().nonzero().flatten()

    def loader(self, block: int = BLOCK) -> DataLoader[Any]:
        """Return these users in blocks, as evaluation data of a Trainer."""
        return DataLoader(TensorDataset(self.users), batch_size=block)

    def hide(self, keys: Tensor, users: Tensor) -> None:
        """Put films that are not ranked for ``users`` behind all others in ``keys`` ``(users, films)``, in place."""
        rows, items = self.seen.pairs(users)
        keys[rows, items] = HIDDEN
        if self.excluded is not None:
            keys[:, self.excluded] = HIDDEN


HIDDEN = torch.iinfo(torch.int64).min


def top(scores: Tensor, task: RankingEvaluator, users: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the first ``k`` films of each user's list, and how each place is tied.

    Args:
        scores: of all films ``(users, films)``; taken as float32 and left as they are.
        task: what is not ranked.
        users: places ``(users,)``.
        k: how many; fewer columns come back where there are fewer films.

    Returns:
        keys: int64 ``(users, k)``, descending. Films of equal score have equal upper halves; ``HIDDEN`` is no film.
        films: int64 ``(users, k)``.

    Raises:
        DataError: a score is no number.

    """
    keys = _keys(scores)
    task.hide(keys, users)
    best = keys.topk(min(k, keys.shape[1]), dim=1).values  # keys differ, so the order is one
    return best, _film(best, keys.shape[1])


def _keys(scores: Tensor) -> Tensor:
    """Return int64 keys in the order of the list: the score's bits above, the place below, counted from the end."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: minus zero is zero
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # now they are ordered as the numbers are
    if bool(torch.isnan(scores).any()):
        raise DataError(
            "the model's scores are not all numbers (NaN): the training has diverged; lower the learning rate"
        )
    return (bits.long() << 32) + torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)


def _film(keys: Tensor, n_items: int) -> Tensor:
    return n_items - 1 - (keys & 0xFFFFFFFF)


def measures(scores: Tensor, task: RankingEvaluator, users: Tensor) -> Tensor:
    """Return the measures of each user's list, float64 ``(users, len(NAMES))``.

    Args:
        scores: of all films ``(users, films)``.
        task: what is known and what should come first, on the scores' device.
        users: places ``(users,)``; each has a film to be found.

    """
    deepest = max(CUTOFFS)
    keys = _keys(scores)
    task.hide(keys, users)
    best = keys.topk(min(deepest, keys.shape[1]), dim=1).values
    rows, items = task.targets.pairs(users)
    wanted = torch.zeros(keys.shape, dtype=torch.bool, device=keys.device)
    wanted[rows, items] = True
    hits = wanted.gather(1, _film(best, keys.shape[1]).clamp_(0, keys.shape[1] - 1)) & (best != HIDDEN)
    gains = _shared_gains(best >> 32, hits, keys, keys[rows, items], rows)
    missing = deepest - best.shape[1]
    hits, gains = (nn.functional.pad(part.double(), (0, missing)) for part in (hits, gains))
    return _measures(hits, gains, task.targets.counts(users).double())


def _shared_gains(levels: Tensor, hits: Tensor, keys: Tensor, target_keys: Tensor, rows: Tensor) -> Tensor:
    """Return for each place the share of films to be found among all films of the score there, float64 ``(users, k)``.

    The score of the last place may also be that of films that come later: these are counted in the whole row.
    """
    steps = nn.functional.pad((levels.diff(dim=1) != 0).long(), (1, 0))
    group = steps.cumsum(1)
    sizes = torch.zeros(levels.shape, dtype=torch.float64, device=levels.device)
    found = torch.zeros_like(sizes)
    sizes.scatter_add_(1, group, torch.ones_like(sizes))
    found.scatter_add_(1, group, hits.double())
    last = levels[:, -1:]
    floor = last << 32  # the smallest key of that score
    later = (keys >= floor).sum(1, keepdim=True) - levels.shape[1]
    target_levels = target_keys >> 32
    wanted = torch.zeros(len(levels), dtype=torch.float64, device=levels.device)
    wanted.scatter_add_(0, rows, (target_levels == last[rows, 0]).double())
    sizes.scatter_add_(1, group[:, -1:], later.double())
    found.scatter_(1, group[:, -1:], wanted[:, None])
    return (found / sizes.clamp(min=1)).gather(1, group)


def _measures(hits: Tensor, gains: Tensor, counts: Tensor) -> Tensor:
    """Return the measures from what is at each place, float64 ``(users, places)``, and how many are to be found."""
    places = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device)
    discounts = 1 / torch.log2(places + 1)
    ideals = nn.functional.pad(discounts.cumsum(0), (1, 0))
    first = torch.where(hits > 0, 1 / places, 0).amax(1)
    columns: dict[str, Tensor] = {}
    for k in CUTOFFS:
        found = hits[:, :k].sum(1)
        columns[f"recall@{k}"] = found / counts
        columns[f"precision@{k}"] = found / k
        columns[f"ndcg@{k}"] = (gains[:, :k] * discounts[:k]).sum(1) / ideals[counts.clamp(max=k).long()]
        columns[f"hr@{k}"] = (found > 0).double()
        columns[f"mrr@{k}"] = torch.where(first >= 1 / k - 1e-12, first, 0)
    return torch.stack([columns[name] for name in NAMES], dim=1)


class UserMean(Metric):
    """The mean over users of one column of what ``Ranked`` returns."""

    higher_is_better = True
    full_state_update = False
    total: Tensor
    users: Tensor

    def __init__(self, column: int, **options: Any) -> None:
        super().__init__(**options)
        self.column = column
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("users", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, found: Tensor, target: object = None) -> None:  # noqa: ARG002
        """Take in the measures of some users, ``(users, len(NAMES))``."""
        self.total = self.total + found[:, self.column].sum()
        self.users = self.users + len(found)

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.users


def means(names: Sequence[str] = NAMES) -> MetricCollection:
    """Return the metrics of a Trainer that evaluates a ``Ranked`` model; ``names`` are some of ``NAMES``.

    Without groups: a collection would take columns that are equal in the first block for one and the same.
    """
    each: dict[str, Any] = {name: UserMean(NAMES.index(name)) for name in names}
    return MetricCollection(each, compute_groups=False)


class RankedItems(nn.Module):
    """A model as a Trainer evaluates it: given a block of users, it returns the measures of their lists.

    Args:
        model: what is measured; its ``scorer()`` returns an object whose ``all(users)`` is a ``Score``.
        task: what is ranked, and what should come first.

    """

    def __init__(self, model: nn.Module, task: RankingEvaluator) -> None:
        super().__init__()
        self.model, self.task = model, task
        self._placed: dict[torch.device, RankingEvaluator] = {}
        self._score: Score | None = None
        """Made once for all blocks of an evaluation, which begins with ``eval()``."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": {}, "_score": None}

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and forget the scores of the weights of before (``eval()`` comes here, too)."""
        self._score = None
        return super().train(mode)

    def forward(self, users: Tensor) -> dict[str, Tensor]:
        """Return the measures of ``users`` ``(users, len(NAMES))``; scores are float32 whatever the training's precision."""
        task = self._placed.get(users.device)
        if task is None:
            task = self._placed[users.device] = self.task.to(users.device)
        with torch.autocast(users.device.type, enabled=False):
            score = self._score or self._scorer()
            if not self.training:  # nobody changes the weights meanwhile
                self._score = score
            return {"prediction": measures(score(users), task, users)}

    def _scorer(self) -> Score:
        scorer: Any = self.model.scorer()  # type: ignore[operator]
        score: Score = scorer.all
        return score


def evaluate(
    score: Score, task: RankingEvaluator, *, device: torch.device | str = "cpu", block: int = BLOCK
) -> dict[str, float]:
    """Return the measures of ``score``, averaged over the users, on one device; a Trainer does it on several."""
    place = torch.device(device)
    task, users = task.to(place), task.users.to(place)
    total = torch.zeros(len(NAMES), dtype=torch.float64, device=place)
    with torch.inference_mode():
        for first in range(0, len(users), block):
            some = users[first : first + block]
            total += measures(score(some), task, some).sum(0)
    return dict(zip(NAMES, (total / len(users)).tolist(), strict=True))
