"""How well a user and a film fit: a product of their vectors and a small network, quick for all pairs at once.

The network's first layer is linear in what stands for the user and what stands for the film, so each half is computed once a
user and once a film, and a pair costs an addition there. `recommender` has the models that make the vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

__all__ = ["TowerOutput", "PairScore", "PairScorer", "rows_of"]

BLOCK_BYTES = {"cpu": 2**20, "other": 2**28}
"""Size of the pairs' first layer that is computed at once: what a core's cache holds, or a share of an accelerator's memory."""


class TowerOutput(NamedTuple):
    """What users, or films, bring to every pair they are in."""

    product: Tensor
    """``(count, dot)``."""
    first: Tensor
    """Their part of the network's first layer, ``(count, hidden)``."""

    def of(self, rows: Tensor) -> TowerOutput:
        """Return those of ``rows``, int64 of any shape, which stands before the last dimension."""
        return TowerOutput(rows_of(self.product, rows), rows_of(self.first, rows))


class PairScore(nn.Module):
    """The score of a user and a film: ``<a, b> + network(u, i)``, where the vectors are ``[a, u]`` and ``[b, i]``.

    A network alone learns products badly (Rendle et al., RecSys 2020, https://arxiv.org/abs/2005.09683).

    Args:
        dot: width of ``a`` and ``b``.
        width: width of ``u`` and ``i``; where it is ``None`` they are ``a`` and ``b`` themselves.
        hidden: widths of the network's two hidden layers.

    """

    def __init__(self, dot: int, width: int | None = None, hidden: tuple[int, int] = (64, 32)) -> None:
        super().__init__()
        self.dot, self.apart = dot, width is not None
        inward = dot if width is None else width
        self.user = nn.Linear(inward, hidden[0], bias=False)
        self.item = nn.Linear(inward, hidden[0])
        self.second = nn.Linear(*hidden)
        self.last = nn.Linear(hidden[1], 1, bias=False)  # a bias would be the same for all films

    def user_half(self, vectors: Tensor) -> TowerOutput:
        """Return what a user brings to every pair, of vectors ``(users, width)``."""
        return self._half(vectors, self.user)

    def item_half(self, vectors: Tensor) -> TowerOutput:
        """Return the same of films."""
        return self._half(vectors, self.item)

    def _half(self, vectors: Tensor, layer: nn.Linear) -> TowerOutput:
        if not self.apart:
            return TowerOutput(vectors, layer(vectors))
        product, first = vectors.tensor_split((self.dot,), 1)
        return TowerOutput(product, layer(first))

    def products(self, user: TowerOutput, item: TowerOutput) -> Tensor:
        """Return ``<a, b>`` of pairs, halves ``(count, ...)`` each: ``(count,)``."""
        return (user.product * item.product).sum(-1)

    def network(self, user: TowerOutput, item: TowerOutput) -> Tensor:
        """Return the network's part of the score of pairs, halves ``(count, ...)`` each: ``(count,)``."""
        return self.last(self.second((user.first + item.first).relu()).relu()).squeeze(-1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PairScorer:
    """A model at rest: both halves of the first layer, from which any pair's score is a few operations."""

    score: PairScore
    users: TowerOutput
    """Of all users."""
    items: TowerOutput
    """Of all films."""

    @torch.no_grad()
    def all(self, users: Tensor) -> Tensor:
        """Return the scores of ``users``, int64 ``(count,)``, with every film: ``(count, films)``.

        They are computed in blocks of one size, so that a score is the same to the last bit whoever else is asked for.
        """
        users, block = users.to(self.items.first.device), self._users_at_once()
        asked = self.users.of(torch.cat([users, users[:1].expand(-len(users) % block)]))
        with torch.autocast(users.device.type, enabled=False):
            return self._blocks(asked, block)[: len(users)]

    def _blocks(self, asked: TowerOutput, block: int) -> Tensor:
        items = self.items
        films, width = items.first.shape
        second, last = self.score.second, self.score.last.weight[0]
        result = items.first.new_empty(len(asked.first), films)
        first, then = result.new_empty(block, films, width), result.new_empty(block * films, second.out_features)
        for start in range(0, len(result), block):
            one = slice(start, start + block)
            torch.add(asked.first[one].unsqueeze(1), items.first, out=first).relu_()
            torch.addmm(second.bias, first.flatten(0, 1), second.weight.T, out=then).relu_()
            torch.mm(asked.product[one], items.product.T, out=result[one]).view(-1).addmv_(then, last)
        return result

    @torch.no_grad()
    def pairs(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the scores of pairs, int64 ``(count,)`` each: ``(count,)``."""
        device = self.users.first.device
        user, item = self.users.of(users.to(device)), self.items.of(items.to(device))
        with torch.autocast(device.type, enabled=False):
            return self.score.products(user, item) + self.score.network(user, item)

    def _users_at_once(self) -> int:
        budget = BLOCK_BYTES.get(self.users.first.device.type, BLOCK_BYTES["other"])
        return max(1, budget // self.items.first.nbytes)


def rows_of(table: Tensor, rows: Tensor) -> Tensor:
    """Return the rows of ``table (count, width)`` that ``rows``, int64 of any shape, name: ``(*rows.shape, width)``.

    Its gradient is added up in one order on every device: on accelerators ``embedding`` sees to that; on a CPU
    ``index_select`` does, in two thirds of the time.
    """
    if table.device.type != "cpu":
        return embedding(rows, table)
    return table.index_select(0, rows.flatten()).view(*rows.shape, table.shape[1])
