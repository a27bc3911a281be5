"""Recommenders that join embeddings of ids with what a GPT-2 reads of descriptions, and how they are trained in two stages.

``GPT2Recommender`` concatenates the two, ``GPT2RecommenderEnhanced`` lets the id ask the fields of the text (cross-attention).
`gpt2_text` has the text side, `recommender` the loss and the recommendations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from duoka.errors import ConfigError
from duoka.recipes.models.attention import check_heads
from duoka.recipes.models.gpt2_text_encoder import EntityTexts, Lora, TokenizedTexts, width_of
from duoka.recipes.models.pair_scoring import PairScore, rows_of
from duoka.recipes.models.recommender import Recommender, distinct, id_embedding, seeded

__all__ = ["GPT2Recommender", "GPT2RecommenderEnhanced", "TwoRates", "carry_over"]


class _TextRecommender(Recommender):
    """What the two with texts share: the text side, and ids that are sometimes hidden so that texts must speak for them."""

    joining: type[nn.Module]

    def __init__(
        self,
        texts: TokenizedTexts,
        *,
        embedding_size: int = 64,
        use_cache: bool = True,
        train_text: str | None = None,
        lora: Lora | None = None,
        heads: int = 4,
        contrast: float = 0.1,
        candidates: int = 256,
        temperature: float = 0.2,
        id_dropout: float = 0.1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        train_text = train_text or ("frozen" if use_cache else "lora")
        _check(use_cache, train_text, id_dropout)
        check_heads(embedding_size, heads)
        counts = len(texts.users.pieces), len(texts.items.pieces)
        with seeded(seed):
            score = PairScore(embedding_size)
            options = {"contrast": contrast, "candidates": candidates, "temperature": temperature}
            super().__init__(*counts, score, **options)  # type: ignore[arg-type]
            self.id_dropout = id_dropout
            width = width_of(texts.network)
            self.user = _Joined(counts[0], texts.users, width, embedding_size, self.joining, heads, salt=1)
            self.item = _Joined(counts[1], texts.items, width, embedding_size, self.joining, heads, salt=2)
            self.draws: Tensor
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
            self.encoder = None if use_cache else texts.encoder(train_text, lora)  # the last part: see ``TwoRates``
        if use_cache:
            self.user.keep(texts.vectors(device))
            self.item.keep(texts.vectors(device))

    def hide(self, *, users: Tensor | None = None, items: Tensor | None = None) -> None:
        """Let texts alone speak for these from now on: films that nobody has rated yet have no id worth knowing."""
        for side, hidden in ((self.user, users), (self.item, items)):
            if hidden is not None:
                side.hidden[hidden.to(side.hidden.device)] = True

    def vectors(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(users, embedding_size)`` and ``(items, embedding_size)``."""
        if self.training:
            self.draws += 1
        (user_texts, user_places), (item_texts, item_places) = self._texts(users, items)
        dropout = self.id_dropout if self.training else 0.0
        joined_users, _ = self.user(users, user_texts, user_places, self.draws, dropout)
        joined_items, _ = self.item(items, item_texts, item_places, self.draws, dropout)
        return joined_users, joined_items

    @torch.no_grad()
    def attention(self, *, users: Tensor | None = None, items: Tensor | None = None) -> Tensor:
        """Return how much the id and each field of the text weigh, ``(count, 1 + fields)``, of ``users`` or of ``items``.

        Raises:
            ConfigError: not one of the two was given, or this model does not weigh.

        """
        if (users is None) == (items is None):
            raise ConfigError("attention() is asked for users= or for items=, one of them")
        wanted = users if users is not None else items
        assert wanted is not None  # one of them was given
        wanted, none = wanted.to(self._device), torch.zeros(0, dtype=torch.int64, device=self._device)
        some, at = torch.unique(wanted, return_inverse=True)
        user_side, item_side = self._texts(*((some, none) if users is not None else (none, some)))
        side, found = (self.user, user_side) if users is not None else (self.item, item_side)
        _, weights = side(some, *found, self.draws, 0.0)
        if weights is None:
            raise ConfigError(f"{type(self).__name__} does not weigh id and text; GPT2RecommenderEnhanced does")
        return weights.float().mean(2)[at]  # type: ignore[no-any-return]

    def _texts(self, users: Tensor, items: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return, a side, the vectors of distinct pieces and where in them each one's fields are, ``(count, fields)``."""
        if self.encoder is None:
            return self.user.kept_of(users), self.item.kept_of(items)
        sides = [torch.unique(s.pieces[w], return_inverse=True) for s, w in ((self.user, users), (self.item, items))]
        (user_some, user_at), (item_some, item_at) = sides
        found = self.encoder(torch.cat([user_some + self.user.first, item_some + self.item.first]))
        return (found[: len(user_some)], user_at), (found[len(user_some) :], item_at)


class _Joined(nn.Module):
    """One side, users or films: embeddings of ids, the projection of their texts, and what joins them."""

    def __init__(
        self, count: int, side: EntityTexts, width: int, size: int, joining: type[nn.Module], heads: int, *, salt: int
    ) -> None:
        super().__init__()
        self.ids = id_embedding(count + 1, size)
        """The last one stands for an id that is hidden."""
        self.project = nn.Linear(width, size)
        self.join = joining(size, side.fields, heads)
        self.first, self.count, self.salt = side.first, side.count, salt
        self.pieces = side.pieces
        """No buffer, since DDP sends buffers at every step."""
        self.hidden: Tensor
        self.register_buffer("hidden", torch.zeros(count, dtype=torch.bool))
        self.kept: Any = None
        """The texts' vectors in cached mode: a parameter that is not trained, since buffers are sent at every step."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.pieces = fn(self.pieces)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def keep(self, vectors: Tensor) -> None:
        """Use these vectors, of all pieces of both sides, for ever."""
        own = vectors[self.first : self.first + self.count].clone()
        self.kept = nn.Parameter(own, requires_grad=False)

    def kept_of(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return kept vectors that include those of ``wanted``'s pieces, and where in them each one's fields are."""
        some, places = distinct(self.pieces[wanted], self.count)
        return (self.kept if len(some) == self.count else rows_of(self.kept, some)), places

    def forward(
        self, wanted: Tensor, texts: Tensor, places: Tensor, draw: Tensor, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return the vectors of ``wanted``, ``(count, size)``, and how much id and fields weighed in them, if anything did."""
        hidden = self.hidden[wanted]
        if dropout:
            hidden = hidden | (_chance(wanted, draw, self.salt) < dropout)
        ids = rows_of(self.ids.weight, torch.where(hidden, len(self.hidden), wanted))
        return self.join(ids, self.project(texts), places)  # type: ignore[no-any-return]


class _Concatenation(nn.Module):
    """Id and the mean of the text's fields, side by side, through one layer."""

    def __init__(self, size: int, fields: int, heads: int) -> None:  # noqa: ARG002 - as ``_CrossAttention``
        super().__init__()
        self.layer = nn.Linear((1 + fields) * size, size)

    def forward(self, ids: Tensor, texts: Tensor, places: Tensor) -> tuple[Tensor, None]:
        """Return ``(count, size)`` of ids of that shape, ``texts (pieces, size)`` and ``places (count, fields)`` in them."""
        return self.layer(torch.cat([ids, rows_of(texts, places).flatten(1)], 1)), None


class _CrossAttention(nn.Module):
    """The id asks itself and the fields of the text, and adds what it gets to what it is."""

    def __init__(self, size: int, fields: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.asking = nn.Linear(size, size)
        self.key = nn.Linear(size, size, bias=False)  # softmax would take no notice of a bias, and AdamW would move it
        self.value = nn.Linear(size, size)
        self.field = nn.Parameter(torch.randn(1 + fields, size) * size**-0.5)
        """What tells the id and each field apart when they are asked."""
        self.outward = nn.Linear(size, size)

    def forward(self, ids: Tensor, texts: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(count, size)`` and the weights ``(count, 1 + fields, heads)``; arguments as above."""
        question = self.asking(ids) * (ids.shape[1] // self.heads) ** -0.5
        keys, values = rows_of(self.key(texts), places), rows_of(self.value(texts), places)
        asked = [
            self._by_head(question * self.key(ids)).sum(2),
            self._by_head(question.unsqueeze(1) * keys).sum(3).flatten(1),
        ]
        asked_fields = torch.unflatten(torch.cat(asked, 1) + question @ self._fields(), 1, (-1, self.heads))
        weights = asked_fields.softmax(1)
        own, others = weights.unsqueeze(3).tensor_split((1,), 1)
        got = own.squeeze(1) * self._by_head(self.value(ids)) + (others * self._by_head(values)).sum(1)
        return ids + self.outward(got.flatten(1)), weights

    def _fields(self) -> Tensor:
        """Return what turns a question into its products with the fields' vectors, ``(size, (1 + fields) * heads)``."""
        apart = self._by_head(self.field).unsqueeze(3) * torch.eye(self.heads, device=self.field.device).unsqueeze(1)
        return apart.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)

    def _by_head(self, vectors: Tensor) -> Tensor:
        return torch.unflatten(vectors, -1, (self.heads, -1))


class GPT2Recommender(_TextRecommender):
    """Joins ids and texts by concatenation.

    Args:
        texts: what ``gpt2_text.prepare`` returned.
        embedding_size: width of the vectors.
        use_cache: whether texts are encoded once, here, and stay as they are; else in every step, with gradients.
        train_text: ``"frozen"``, ``"lora"`` or ``"full"``; ``None`` is frozen where ``use_cache``, else LoRA.
        lora: its sizes.
        heads: of the attention, where there is one.
        contrast: weight of the contrastive term.
        candidates: see ``loss``.
        temperature: of the contrastive term.
        id_dropout: share of the ids that are hidden in each step of training, so that texts learn to stand alone. Which
            ones is a function of the step and the id, so that it is the same on any number of devices.
        seed: decides the first weights.
        device: where texts are encoded for the cache.

    Raises:
        ConfigError: texts are to be cached and trained; or a value that cannot be.

    """

    joining = _Concatenation


class GPT2RecommenderEnhanced(_TextRecommender):
    """Joins ids and texts by attention: the id asks which fields of the text matter. Arguments are ``GPT2Recommender``'s."""

    joining = _CrossAttention


@dataclass(frozen=True)
class TwoRates:
    """An optimiser with a rate of its own for GPT-2: ``Trainer(..., optimizer=TwoRates.of(model, lr=5e-4, text_lr=5e-5))``."""

    lr: float
    text_lr: float
    text_parameters: int
    """How many of the model's trained parameters, the last ones, are GPT-2's."""
    weight_decay: float = 0.01

    @classmethod
    def of(cls, model: nn.Module, *, lr: float, text_lr: float, weight_decay: float = 0.01) -> TwoRates:
        """Return the one for ``model``."""
        encoder = getattr(model, "encoder", None)
        count = 0 if encoder is None else sum(parameter.requires_grad for parameter in encoder.parameters())
        return cls(lr, text_lr, count, weight_decay)

    def __call__(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return AdamW over ``parameters``, the trained ones in the model's order."""
        own = len(parameters) - self.text_parameters
        groups = [{"params": parameters[:own], "lr": self.lr}, {"params": parameters[own:], "lr": self.text_lr}]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, weight_decay=self.weight_decay, fused=True)


def carry_over(source: _TextRecommender, target: _TextRecommender) -> None:
    """Give ``target`` the weights of ``source`` but for the text encoder's: from the cached stage to the dynamic one.

    Raises:
        ConfigError: they are not of one kind and size.

    """
    own = {name: value for name, value in target.state_dict().items() if not name.startswith("encoder.")}
    theirs = {name: value for name, value in source.state_dict().items() if not name.endswith(".kept")}
    theirs = {name: value for name, value in theirs.items() if not name.startswith("encoder.")}
    own = {name: value for name, value in own.items() if not name.endswith(".kept")}
    odd = {name for name in own.keys() | theirs.keys() if name not in own or name not in theirs}
    odd |= {name for name in own.keys() & theirs.keys() if own[name].shape != theirs[name].shape}
    if odd:
        raise ConfigError(
            f"the two models differ in {', '.join(sorted(odd)[:3])}; build both with the same options and texts"
        )
    target.load_state_dict(theirs, strict=False)


def _check(use_cache: bool, train_text: str, id_dropout: float) -> None:
    if use_cache and train_text != "frozen":
        raise ConfigError(
            f"use_cache=True with train_text={train_text!r} would train nothing of the text encoder: cached vectors were "
            "computed before, and no gradient reaches what computed them; give use_cache=False, or train_text='frozen'"
        )
    if not 0 <= id_dropout < 1:
        raise ConfigError(f"id_dropout={id_dropout} has to be a share, from 0 to below 1")


def _chance(numbers: Tensor, draw: Tensor, salt: int) -> Tensor:
    """Return a number from 0 to below 1 for each of ``numbers``: a function of it, the draw and the salt alone.

    The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    mixed = (numbers + 1) * -7046029254386353131 + (draw + 1) * 2862933555777941757 + salt * 3935559000370003845
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    mixed = mixed ^ ((mixed >> 31) & ((1 << 33) - 1))
    return (mixed & (2**24 - 1)).float() / 2**24
