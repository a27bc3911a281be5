"""What a recommender has to beat: the films that most people know, and those that go with what the user knows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duoka.recipes.recommendation.ranking_metrics import UserItemIndex

__all__ = ["ItemKNN", "Popularity"]

NEIGHBOURS, SHRINK = 100, 10.0
"""ItemKNN: similar films that count for each film, and how many imagined users without a common film damp small numbers."""


class Popularity(nn.Module):
    """The same list for everybody: films by how many users know them.

    Args:
        seen: what each user knows.
        n_items: how many films there are.

    """

    counts: Tensor

    def __init__(self, seen: UserItemIndex, n_items: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.bincount(seen.indices, minlength=n_items).float())

    def scorer(self) -> Popularity:
        """Return what scores: itself."""
        return self

    def all(self, users: Tensor) -> Tensor:
        """Return the scores of all films for ``users``, ``(users, films)``."""
        return self.counts.expand(len(users), -1)


class ItemKNN(nn.Module):
    """Films that are known by the same people as the films that the user knows.

    Two films' similarity is the cosine of their columns of users, shrunk: ``common / (sqrt(a b) + shrink)``, with ``a`` and
    ``b`` users of the one and the other; each film keeps its ``neighbours`` most similar ones. A film's score is the sum of
    its similarities to what the user knows. Source: M. Deshpande and G. Karypis, Item-based Top-N Recommendation Algorithms,
    ACM TOIS 22(1), 2004.

    Args:
        seen: what each user knows.
        n_items: how many films there are.
        neighbours: how many similar films count for each.
        shrink: 0 or more.

    """

    similarity: Tensor

    def __init__(self, seen: UserItemIndex, n_items: int, neighbours: int = NEIGHBOURS, shrink: float = SHRINK) -> None:
        super().__init__()
        self.seen, self.n_items = seen, n_items
        similarity = _cosines(seen, n_items, shrink)
        if neighbours < n_items:
            least = similarity.topk(neighbours, dim=1).values[:, -1:]
            similarity = similarity * (similarity >= least)
        self.register_buffer("similarity", similarity.T.contiguous())  # from what is known to what is scored

    def scorer(self) -> ItemKNN:
        """Return what scores: itself."""
        return self

    def all(self, users: Tensor) -> Tensor:
        """Return the scores of all films for ``users``, ``(users, films)``."""
        rows, items = self.seen.to(users.device).pairs(users)
        known = torch.zeros(len(users), self.n_items, device=users.device)
        known[rows, items] = 1
        return known @ self.similarity


def _cosines(seen: UserItemIndex, n_items: int, shrink: float, block: int = 1024) -> Tensor:
    """Return the shrunk cosines of all pairs of films, float32 ``(films, films)``, 0 between a film and itself."""
    common = torch.zeros(n_items, n_items)
    n_users = len(seen.indptr) - 1
    for first in range(0, n_users, block):
        some = torch.arange(first, min(first + block, n_users))
        rows, items = seen.pairs(some)
        known = torch.zeros(len(some), n_items)
        known[rows, items] = 1
        common.addmm_(known.T, known)
    size = common.diagonal().sqrt()
    similarity = common / (size[:, None] * size + shrink).clamp(min=1e-12)
    return similarity.fill_diagonal_(0)
