"""The score of a user and an item: a dot product of their vectors plus a small MLP, fast for all pairs.

The MLP's first layer is linear in both vectors, so each tower computes its half once per user or item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

BLOCK_BYTES = {"cpu": 2**20, "other": 2**28}
"""Bytes of the first layer that ``score_all`` computes at once: a CPU core's cache, or little of an accelerator's memory."""


class TowerOutput(NamedTuple):
    """What a score needs of users, or of items."""

    dot: Tensor
    """Vectors of the dot product, ``(count, dot_width)``."""
    hidden: Tensor
    """This side's half of the MLP's first layer, ``(count, hidden)``."""

    def select(self, rows: Tensor) -> TowerOutput:
        """Return the outputs of ``rows``, int64 of any shape, which replaces the first dimension."""
        return TowerOutput(gather_rows(self.dot, rows), gather_rows(self.hidden, rows))


class PairScore(nn.Module):
    """The score of a user and an item, ``<a, b> + mlp(u, i)``, for the vectors ``[a, u]`` and ``[b, i]``.

    An MLP alone learns dot products badly (Rendle et al., RecSys 2020, https://arxiv.org/abs/2005.09683).

    Args:
        dot_width: width of ``a`` and ``b``.
        mlp_width: width of ``u`` and ``i``; ``None`` uses ``a`` and ``b`` for the MLP, too.
        hidden: widths of the MLP's two hidden layers.
    """

    def __init__(self, dot_width: int, mlp_width: int | None = None, hidden: tuple[int, int] = (64, 32)) -> None:
        super().__init__()
        self.dot_width, self.is_split = dot_width, mlp_width is not None
        width = dot_width if mlp_width is None else mlp_width
        self.user_layer = nn.Linear(width, hidden[0], bias=False)
        self.item_layer = nn.Linear(width, hidden[0])
        self.hidden_layer = nn.Linear(*hidden)
        self.out_layer = nn.Linear(hidden[1], 1, bias=False)  # a bias would add the same to all items

    def user_tower(self, vectors: Tensor) -> TowerOutput:
        """Return the users' half for their vectors ``(users, width)``."""
        return self._tower(vectors, self.user_layer)

    def item_tower(self, vectors: Tensor) -> TowerOutput:
        """Return the items' half for their vectors ``(items, width)``."""
        return self._tower(vectors, self.item_layer)

    def _tower(self, vectors: Tensor, layer: nn.Linear) -> TowerOutput:
        if not self.is_split:
            return TowerOutput(vectors, layer(vectors))
        dot, rest = vectors.tensor_split((self.dot_width,), 1)
        return TowerOutput(dot, layer(rest))

    def dot(self, user: TowerOutput, item: TowerOutput) -> Tensor:
        """Return the dot products of pairs, ``(count,)``."""
        return (user.dot * item.dot).sum(-1)

    def mlp(self, user: TowerOutput, item: TowerOutput) -> Tensor:
        """Return the MLP's part of the scores of pairs, ``(count,)``."""
        hidden = (user.hidden + item.hidden).relu()
        return self.out_layer(self.hidden_layer(hidden).relu()).squeeze(-1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PairScorer:
    """Scores of any pairs with fixed weights, from the towers of all users and items."""

    score: PairScore
    users: TowerOutput
    items: TowerOutput
    """Their ``dot`` are the items' vectors, whose cosine measures how similar items are."""

    @torch.no_grad()
    def score_all(self, users: Tensor) -> Tensor:
        """Return the scores of ``users``, int64 ``(count,)``, with every item: ``(count, items)``.

        All blocks have the same size, so a score is bit-identical whatever other users are asked for.
        """
        items = self.items
        device, (num_items, width) = items.hidden.device, items.hidden.shape
        block = max(1, BLOCK_BYTES["cpu" if device.type == "cpu" else "other"] // items.hidden.nbytes)
        count, users = len(users), users.to(device)
        tower = self.users.select(torch.cat([users, users[:1].expand(-count % block)]))
        layer, weights = self.score.hidden_layer, self.score.out_layer.weight[0]
        scores = items.hidden.new_empty(len(tower.hidden), num_items)
        first = scores.new_empty(block, num_items, width)
        second = scores.new_empty(block * num_items, layer.out_features)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, len(scores), block):
                rows = slice(start, start + block)
                torch.add(tower.hidden[rows].unsqueeze(1), items.hidden, out=first).relu_()
                torch.addmm(layer.bias, first.flatten(0, 1), layer.weight.T, out=second).relu_()
                torch.mm(tower.dot[rows], items.dot.T, out=scores[rows]).view(-1).addmv_(second, weights)
        return scores[:count]

    @torch.no_grad()
    def score_pairs(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the scores of pairs, int64 ``(count,)`` each: ``(count,)``."""
        device = self.users.hidden.device
        user, item = self.users.select(users.to(device)), self.items.select(items.to(device))
        with torch.autocast(device.type, enabled=False):
            return self.score.dot(user, item) + self.score.mlp(user, item)


def gather_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Return ``table[rows]`` for ``table (count, width)`` and int64 ``rows`` of any shape.

    The gradient sums in a fixed order on every device: accelerators use ``embedding``; the CPU uses
    ``index_select``, which takes two thirds of the time.
    """
    if table.device.type != "cpu":
        return embedding(rows, table)
    return table.index_select(0, rows.flatten()).view(*rows.shape, table.shape[1])
