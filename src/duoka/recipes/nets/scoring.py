"""How well a user and a film fit: a product of their vectors and a small network, quick for all pairs at once.

The network's first layer is linear in what stands for the user and what stands for the film, so each half is computed once a
user and once a film, and a pair costs an addition there. `recommender` has the models that make the vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Score", "Scorer"]

BLOCK_BYTES = {"cpu": 2**21, "other": 2**28}
"""Size of the pairs' first layer that is computed at once: what a core's cache holds, or a share of an accelerator's memory."""


class Score(nn.Module):
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

    def user_half(self, vectors: Tensor) -> Tensor:
        """Return what a user brings to every pair, ``(users, dot + hidden)``, of vectors ``(users, width)``."""
        return torch.cat([vectors[:, : self.dot], self.user(vectors[:, self.dot :] if self.apart else vectors)], 1)

    def item_half(self, vectors: Tensor) -> Tensor:
        """Return the same of films."""
        return torch.cat([vectors[:, : self.dot], self.item(vectors[:, self.dot :] if self.apart else vectors)], 1)

    def products(self, users: Tensor, items: Tensor) -> Tensor:
        """Return ``<a, b>`` of halves ``(..., dot + hidden)``, one of each: ``(...)``."""
        return (users[..., : self.dot] * items[..., : self.dot]).sum(-1)

    def network(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the network's part of the score of halves ``(..., dot + hidden)``: ``(...)``."""
        first = (users[..., self.dot :] + items[..., self.dot :]).relu()
        return self.last(self.second(first).relu()).squeeze(-1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Scorer:
    """A model at rest: both halves of the first layer, from which any pair's score is a few operations."""

    score: Score
    users: Tensor
    """``(users, dot + hidden)``."""
    items: Tensor
    """``(films, dot + hidden)``."""

    @torch.no_grad()
    def all(self, users: Tensor) -> Tensor:
        """Return the scores of ``users``, int64 ``(count,)``, with every film: ``(count, films)``."""
        halves = self.users[users.to(self.users.device)]
        dot, films = self.score.dot, self.items.shape[0]
        result = halves[:, :dot] @ self.items[:, :dot].T
        second, last = self.score.second, self.score.last.weight[0]
        user_part, item_part = halves[:, dot:], self.items[:, dot:].contiguous()
        block = self._users_at_once()
        first = result.new_empty((block, films, user_part.shape[1]))
        then = result.new_empty((block * films, second.out_features))
        for part, scores in zip(torch.split(user_part, block), torch.split(result, block), strict=True):
            count = len(part)
            torch.add(part.unsqueeze(1), item_part, out=first[:count]).relu_()
            hidden = then[: count * films]
            torch.addmm(second.bias, first[:count].flatten(0, 1), second.weight.T, out=hidden).relu_()
            scores.view(-1).addmv_(hidden, last)
        return result

    @torch.no_grad()
    def pairs(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the scores of pairs, int64 ``(count,)`` each: ``(count,)``."""
        user, item = self.users[users.to(self.users.device)], self.items[items.to(self.items.device)]
        return self.score.products(user, item) + self.score.network(user, item)

    def _users_at_once(self) -> int:
        budget = BLOCK_BYTES.get(self.users.device.type, BLOCK_BYTES["other"])
        a_user = self.items.shape[0] * self.score.second.in_features * self.items.element_size()
        return max(1, budget // a_user)
