"""Recommenders without training, as baselines: the most popular items, and items similar to the user's."""

import torch
from torch import Tensor, nn

from duoka.recipes.datasets.movielens import SeenItems

NEIGHBORS, SHRINK = 100, 10.0
"""ItemKNN's similar items per item, and the term that damps similarities from few users."""


class Popularity(nn.Module):
    """The same list for all users: items by their number of users in ``seen``."""

    counts: Tensor

    def __init__(self, seen: SeenItems, n_items: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.bincount(seen.indices, minlength=n_items).float())

    def score_all(self, users: Tensor) -> Tensor:
        """Return the scores of all items for ``users``, ``(users, items)``."""
        return self.counts.expand(len(users), -1)


class ItemKNN(nn.Module):
    """Items whose users are those of the items that the user has seen.

    The similarity of two items is the shrunk cosine of their columns of users,
    ``common / (sqrt(a b) + shrink)`` with their numbers of users ``a`` and ``b``. Each item keeps its
    ``neighbors`` most similar ones. A score is the sum of an item's similarities to the user's items.
    Source: M. Deshpande and G. Karypis, Item-based Top-N Recommendation Algorithms, ACM TOIS 22(1), 2004.

    Args:
        seen: the items of each user.
        n_items: number of items.
        neighbors: similar items that are kept per item.
        shrink: 0 or more.
    """

    similarity: Tensor

    def __init__(self, seen: SeenItems, n_items: int, neighbors: int = NEIGHBORS, shrink: float = SHRINK) -> None:
        super().__init__()
        self.seen, self.n_items = seen, n_items
        common = torch.zeros(n_items, n_items)
        for users in torch.split(torch.arange(len(seen.indptr) - 1), 1024):
            matrix = seen.matrix(users, n_items)
            common.addmm_(matrix.T, matrix)
        size = common.diagonal().sqrt()
        similarity = (common / (size[:, None] * size + shrink).clamp(min=1e-12)).fill_diagonal_(0)
        if neighbors < n_items:
            least = similarity.topk(neighbors, dim=1).values[:, -1:]
            similarity = similarity * (similarity >= least)
        self.register_buffer("similarity", similarity.T.contiguous())  # (seen item, scored item)

    def score_all(self, users: Tensor) -> Tensor:
        """Return the scores of all items for ``users``, ``(users, items)``."""
        return self.seen.to(users.device).matrix(users, self.n_items) @ self.similarity
