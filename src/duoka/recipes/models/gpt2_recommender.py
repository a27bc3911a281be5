"""Recommenders that join id embeddings with a GPT-2's vectors of texts, for training in two stages.

`gpt2_text_encoder` encodes the texts, `recommender` has the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from duoka.errors import ConfigError
from duoka.recipes.models.attention import check_heads, hash_at_step
from duoka.recipes.models.gpt2_text_encoder import EntityTexts, Lora, TokenizedTexts
from duoka.recipes.models.pair_scoring import PairScore, gather_rows
from duoka.recipes.models.recommender import Recommender, compact_ids, id_embedding
from duoka.utils.rng_state import preserve_rng_state
from duoka.utils.validation import check_number


class _ConcatFusion(nn.Module):
    """One linear layer on the concatenated id and text fields."""

    def __init__(self, size: int, num_fields: int, heads: int) -> None:  # noqa: ARG002 - as ``_AttentionFusion``
        super().__init__()
        self.layer = nn.Linear((1 + num_fields) * size, size)

    def forward(self, ids: Tensor, texts: Tensor, rows: Tensor) -> tuple[Tensor, None]:
        """Return ``(count, size)`` for ``ids`` of that shape, ``texts (spans, size)`` and ``rows (count, fields)`` of them."""
        return self.layer(torch.cat([ids, gather_rows(texts, rows).flatten(1)], 1)), None


class _AttentionFusion(nn.Module):
    """The id, plus its attention to itself and the text's fields."""

    def __init__(self, size: int, num_fields: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size, bias=False)  # softmax cancels a bias, but AdamW would move it
        self.value = nn.Linear(size, size)
        self.field_keys = nn.Parameter(torch.randn(1 + num_fields, size) * size**-0.5)
        """Added to the keys of the id and of each field, to distinguish them."""
        self.out_proj = nn.Linear(size, size)

    def forward(self, ids: Tensor, texts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(count, size)`` and the weights ``(count, 1 + fields, heads)``; arguments as in ``_ConcatFusion``."""
        query = self.query(ids) * (ids.shape[1] // self.heads) ** -0.5
        keys, values = gather_rows(self.key(texts), rows), gather_rows(self.value(texts), rows)
        scores = [
            self._split_heads(query * self.key(ids)).sum(2),
            self._split_heads(query.unsqueeze(1) * keys).sum(3).flatten(1),
        ]
        logits = torch.unflatten(torch.cat(scores, 1) + query @ self._field_key_matrix(), 1, (-1, self.heads))
        weights = logits.softmax(1)
        id_weights, text_weights = weights.unsqueeze(3).tensor_split((1,), 1)
        attended = id_weights.squeeze(1) * self._split_heads(self.value(ids))
        attended = attended + (text_weights * self._split_heads(values)).sum(1)
        return ids + self.out_proj(attended.flatten(1)), weights

    def _field_key_matrix(self) -> Tensor:
        """Return the matrix whose product with a query is its score with each field key, ``(size, (1 + fields) * heads)``."""
        identity = torch.eye(self.heads, device=self.field_keys.device).unsqueeze(1)
        by_head = self._split_heads(self.field_keys).unsqueeze(3) * identity
        return by_head.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)

    def _split_heads(self, vectors: Tensor) -> Tensor:
        return torch.unflatten(vectors, -1, (self.heads, -1))


class _EntityEncoder(nn.Module):
    """Vectors of one side, users or items: id embeddings, the projection of their texts, and the fusion of both."""

    def __init__(
        self, texts: EntityTexts, text_width: int, size: int, fusion: type[nn.Module], heads: int, *, salt: int
    ) -> None:
        super().__init__()
        count = len(texts.span_ids)
        self.ids = id_embedding(count + 1, size)
        """The last row stands for a hidden id."""
        self.project = nn.Linear(text_width, size)
        self.fusion = fusion(size, texts.span_ids.shape[1], heads)
        self.first_span, self.num_spans, self.salt = texts.first_span, texts.num_spans, salt
        self.span_ids = texts.span_ids
        """Not a buffer, since DDP broadcasts buffers at every step."""
        self.hidden: Tensor
        self.register_buffer("hidden", torch.zeros(count, dtype=torch.bool))
        self.cache: Any = None
        """Vectors of this side's spans with ``use_cache``: a frozen parameter, for the same reason."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.span_ids = fn(self.span_ids)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def cached_texts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cached vectors that include the spans of ``ids``, and the row of each field in them."""
        spans, rows = compact_ids(self.span_ids[ids], self.num_spans)
        return (self.cache if len(spans) == self.num_spans else gather_rows(self.cache, spans)), rows

    def forward(
        self, ids: Tensor, texts: Tensor, text_rows: Tensor, step: Tensor, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return the vectors of ``ids``, ``(count, size)``, and the attention weights of id and fields, if any."""
        hidden = self.hidden[ids]
        if dropout:
            draws = hash_at_step(ids + 1, step, self.salt * 3935559000370003845) & (2**24 - 1)
            hidden = hidden | (draws.float() / 2**24 < dropout)
        embedded = gather_rows(self.ids.weight, torch.where(hidden, len(self.hidden), ids))
        return self.fusion(embedded, self.project(texts), text_rows)  # type: ignore[no-any-return]


class GPT2Recommender(Recommender):
    """Joins ids and texts by concatenation.

    Args:
        texts: the result of ``tokenize_texts``.
        embedding_size: width of the vectors.
        use_cache: encode all texts once, here; otherwise in every step, with gradients.
        train_text: ``"frozen"``, ``"lora"`` or ``"full"``; ``None`` is frozen with ``use_cache``, else LoRA.
        lora: sizes of LoRA.
        heads: heads of the attention, where there is one.
        contrast, candidates, temperature: see ``Recommender``.
        id_dropout: share of ids hidden in each training step, so that texts learn to stand alone. The
            hidden ids are a function of step and id, so they are the same on any number of devices.
        seed: seed of the initial weights.
        device: device that encodes texts for the cache.
    """

    fusion: type[nn.Module] = _ConcatFusion

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
        if use_cache and train_text != "frozen":
            raise ConfigError(
                f"train_text={train_text!r} has no effect with use_cache=True: no gradient reaches the text encoder through "
                "cached vectors; give use_cache=False, or train_text='frozen'"
            )
        check_number("id_dropout", id_dropout, 0, below=1)
        check_heads(embedding_size, heads)
        users, items = texts.users, texts.items
        with preserve_rng_state():
            torch.default_generator.manual_seed(seed)
            counts, score = (len(users.span_ids), len(items.span_ids)), PairScore(embedding_size)
            super().__init__(*counts, score, contrast=contrast, candidates=candidates, temperature=temperature)
            self.id_dropout = id_dropout
            self.user = _EntityEncoder(users, texts.width, embedding_size, self.fusion, heads, salt=1)
            self.item = _EntityEncoder(items, texts.width, embedding_size, self.fusion, heads, salt=2)
            self.step: Tensor
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
            # The last submodule: ``two_lr_groups`` takes the last parameters for its own.
            self.encoder = None if use_cache else texts.build_encoder(train_text, lora)
        if use_cache:
            for side in (self.user, self.item):
                own = texts.span_vectors(device)[side.first_span :][: side.num_spans]
                side.cache = nn.Parameter(own.clone(), requires_grad=False)

    def hide_ids(self, *, users: Tensor | None = None, items: Tensor | None = None) -> None:
        """Ignore the id embeddings of these users and items from now on, such as those without ratings."""
        for side, ids in ((self.user, users), (self.item, items)):
            if ids is not None:
                side.hidden[ids.to(side.hidden.device)] = True

    def vectors(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(users, embedding_size)`` and ``(items, embedding_size)``."""
        if self.training:
            self.step += 1
        user_texts, item_texts = self._encode_texts(users, items)
        dropout = self.id_dropout if self.training else 0.0
        user_vectors, _ = self.user(users, *user_texts, self.step, dropout)
        item_vectors, _ = self.item(items, *item_texts, self.step, dropout)
        return user_vectors, item_vectors

    @torch.no_grad()
    def attention_weights(self, *, users: Tensor | None = None, items: Tensor | None = None) -> Tensor:
        """Return the weights of the id and of each text field, ``(count, 1 + fields)``, of ``users`` or of ``items``."""
        if (users is None) == (items is None):
            raise ConfigError("attention_weights() takes either users= or items=; give one of them")
        wanted: Any = items if users is None else users
        ids, inverse = torch.unique(wanted.to(self._device), return_inverse=True)
        none = ids[:0]
        user_texts, item_texts = self._encode_texts(*((ids, none) if users is not None else (none, ids)))
        side, texts = (self.user, user_texts) if users is not None else (self.item, item_texts)
        _, weights = side(ids, *texts, self.step, 0.0)
        if weights is None:
            raise ConfigError(f"{type(self).__name__} has no attention weights; GPT2RecommenderEnhanced has")
        return weights.float().mean(2)[inverse]  # type: ignore[no-any-return]

    def _encode_texts(self, users: Tensor, items: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return, for each side, vectors of distinct spans and the row of each text's fields in them, ``(count, fields)``."""
        if self.encoder is None:
            return self.user.cached_texts(users), self.item.cached_texts(items)
        user_spans, user_rows = torch.unique(self.user.span_ids[users], return_inverse=True)
        item_spans, item_rows = torch.unique(self.item.span_ids[items], return_inverse=True)
        vectors = self.encoder(torch.cat([user_spans + self.user.first_span, item_spans + self.item.first_span]))
        return (vectors[: len(user_spans)], user_rows), (vectors[len(user_spans) :], item_rows)


class GPT2RecommenderEnhanced(GPT2Recommender):
    """Joins ids and texts by attention: the id attends to the fields."""

    fusion = _AttentionFusion


def two_lr_groups(
    model: nn.Module, *, lr: float, text_lr: float, weight_decay: float = 0.01
) -> Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]:
    """Return a Trainer's ``optimizer=`` for ``model``: AdamW with the learning rate ``text_lr`` for GPT-2."""
    encoder = getattr(model, "encoder", None)
    num_text = 0 if encoder is None else sum(parameter.requires_grad for parameter in encoder.parameters())

    def build_adamw(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return AdamW over the trained parameters in the model's order; the last ``num_text`` are GPT-2's."""
        own = len(parameters) - num_text
        groups = [{"params": parameters[:own], "lr": lr}, {"params": parameters[own:], "lr": text_lr}]
        return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=weight_decay, fused=True)

    return build_adamw


def copy_stage1_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy all weights but the text encoder's from ``source``, of the cached stage, to ``target``, of the dynamic one."""
    weights, expected = (
        {name: value for name, value in model.state_dict().items() if {"encoder", "cache"}.isdisjoint(name.split("."))}
        for model in (source, target)
    )
    shapes, expected_shapes = ({(name, value.shape) for name, value in state.items()} for state in (weights, expected))
    if differing := sorted({name for name, _ in shapes ^ expected_shapes}):
        raise ConfigError(
            f"the models differ in {', '.join(differing[:3])}; build both with the same options and texts"
        )
    target.load_state_dict(weights, strict=False)
