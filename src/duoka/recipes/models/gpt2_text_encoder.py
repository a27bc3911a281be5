"""Vectors of the users' and items' texts by a GPT-2: each distinct span is tokenized and encoded once.

A text is a string with one field per line (``"Comedy, Drama\\nToy Story (1995)"``). Each field is a
span and becomes one vector: the mean of GPT-2's last hidden states over its tokens, which have read
the fields before. Nothing is padded, so a vector does not depend on the rest of a batch. Fields that
many texts share should come first, since common prefixes are computed once (`prefix_packing`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, layer_norm

from duoka.errors import ConfigError, DataError
from duoka.recipes.models.gpt2_loading import Tokenize, load_gpt2
from duoka.recipes.models.gpt2_packed_forward import hidden_states
from duoka.recipes.models.prefix_packing import pack_prefix_tree
from duoka.utils.imports import import_optional
from duoka.utils.validation import check_choice

TRAIN_TEXT = ("frozen", "lora", "full")
"""What of a text encoder is trained: nothing, LoRA weights, or all."""
ROW_LENGTH = 32
"""Tokens in a packed row; a longer text makes longer rows."""
ROWS_PER_PASS = 64
"""Rows of a pass without gradients, which bounds the memory for encoding all texts."""
Span = tuple[tuple[int, ...], int]
"""The tokens up to the end of a field, and the field's start in them."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (Hu et al., 2021, https://arxiv.org/abs/2106.09685), by peft.

    Without dropout: a text that is encoded once for many samples has one vector for all of them.
    """

    rank: int = 8
    alpha: float = 32.0
    """Scale of the update, times the rank."""
    layers: tuple[str, ...] = ("c_attn", "c_proj")

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.layers:
            raise ConfigError(f"{self} is not valid: rank must be 1 or more, alpha above 0, and layers not empty")


@dataclass(frozen=True)
class EntityTexts:
    """The texts of all users, or of all items."""

    span_ids: Tensor
    """The spans of each text, ``(entities, fields)``, int64, counted from ``first_span``."""
    first_span: int
    num_spans: int


@dataclass(frozen=True)
class TextSpans:
    """All distinct fields of all texts, tokenized, each after the fields before it; sorted per side."""

    tokens: np.ndarray[Any, np.dtype[np.int64]]
    """``(spans, longest)``, -1 after a span's end."""
    starts: np.ndarray[Any, np.dtype[np.int64]]
    """``(spans,)``; the tokens before are context only."""
    ends: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.starts)


@dataclass
class TokenizedTexts:
    """Tokenized texts of users and items with their GPT-2; made once by ``tokenize_texts``, shared by models."""

    spans: TextSpans
    users: EntityTexts
    items: EntityTexts
    network: Any = field(repr=False)
    """``transformers.GPT2Model``, without dropout and never trained."""
    tokenize: Tokenize = field(repr=False)
    """A field after the first begins with its line break."""
    _vectors: Tensor | None = field(default=None, repr=False)

    @property
    def width(self) -> int:
        """Features of GPT-2's hidden states."""
        return int(self.network.config.n_embd)

    def build_encoder(self, train_text: str, lora: Lora | None = None) -> TextEncoder:
        """Return an encoder with a copy of the GPT-2; ``train_text`` is one of ``TRAIN_TEXT``."""
        return TextEncoder(self.spans, copy.deepcopy(self.network), train_text, lora or Lora())

    def span_vectors(self, device: torch.device | str = "cpu") -> Tensor:
        """Return all spans' vectors by the untrained GPT-2, ``(spans, width)`` on the CPU; computed at the first call."""
        if self._vectors is None:
            encoder = TextEncoder(self.spans, self.network, "frozen", Lora()).to(device)
            with torch.no_grad():
                self._vectors = encoder(torch.arange(len(self.spans))).cpu()
            self.network.to("cpu")
        return self._vectors


class TextEncoder(nn.Module):
    """Encodes spans with a GPT-2; a span's vector does not depend on the others that are encoded with it.

    The GPT-2 ``network`` is changed in place; ``train_text`` is one of ``TRAIN_TEXT``.
    """

    def __init__(self, spans: TextSpans, network: Any, train_text: str, lora: Lora) -> None:
        super().__init__()
        check_choice("train_text", train_text, TRAIN_TEXT)
        self.spans, self.width = spans, int(network.config.n_embd)
        self.row_length = max(ROW_LENGTH, spans.tokens.shape[1])
        self.network = network.requires_grad_(train_text == "full")
        if train_text == "lora":
            peft = import_optional("peft", "recommend")
            options = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.layers)}
            # fan_in_fan_out=True: GPT-2 stores its projections as (in, out)
            peft.inject_adapter_in_model(peft.LoraConfig(**options, lora_dropout=0.0, fan_in_fan_out=True), network)

    def forward(self, span_ids: Tensor) -> Tensor:
        """Return the vectors ``(len(span_ids), width)`` of spans, whose int64 ids are distinct and ascending."""
        ids, device = span_ids.cpu().numpy(), next(self.network.parameters()).device
        if not len(ids):
            return torch.zeros(0, self.width, device=device)
        if torch.is_grad_enabled() or len(ids) <= ROWS_PER_PASS:
            return self._encode(ids, device)
        num_parts = -(-int(self.spans.ends[ids].sum()) // (ROWS_PER_PASS * self.row_length))
        return torch.cat([self._encode(part, device) for part in np.array_split(ids, num_parts)])

    def _encode(self, ids: Any, device: torch.device) -> Tensor:
        tokens, starts, ends = self.spans.tokens[ids], self.spans.starts[ids], self.spans.ends[ids]
        packed = pack_prefix_tree(tokens, starts, ends, self.row_length).to(device)
        states = hidden_states(self.network, packed)
        states = states.float() if states.dtype.itemsize < 4 else states
        means = embedding_bag(packed.span_nodes, states, packed.span_offsets, mode="mean")
        return layer_norm(means, (self.width,))


def tokenize_texts(
    user_texts: Sequence[str], item_texts: Sequence[str], *, pretrained: str | Path = "none", seed: int = 0
) -> TokenizedTexts:
    """Tokenize all texts once, and load or build the GPT-2 that encodes them.

    Args:
        user_texts: one text per user, each with the same number of lines (fields).
        item_texts: one text per item, likewise.
        pretrained: name of a GPT-2 on the hub, a folder with one (``save_pretrained``), or ``"none"``
            for a small random one, made from the texts and ``seed`` alone.
        seed: seed of the small one's weights.

    Raises DataError if a text or field is empty or too long, or texts differ in their number of fields, and ConfigError if
    there is no such GPT-2.
    """
    tokenize, network = load_gpt2(str(pretrained), [*user_texts, *item_texts], seed)
    users, user_spans = _tokenize_side("user", user_texts, tokenize, network.config.n_positions)
    items, item_spans = _tokenize_side("item", item_texts, tokenize, network.config.n_positions)
    spans = _as_arrays([*user_spans, *item_spans])
    users_of, items_of = EntityTexts(users, 0, len(user_spans)), EntityTexts(items, len(user_spans), len(item_spans))
    return TokenizedTexts(spans, users_of, items_of, network.eval(), tokenize)


def _tokenize_side(side: str, texts: Sequence[str], tokenize: Tokenize, max_tokens: int) -> tuple[Tensor, list[Span]]:
    """Return the span ids of each text, ``(texts, fields)``, and the distinct spans, sorted."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    split = [re.split(r"(?=\n)", text) for text in rows]  # fields after the first begin with their line break
    _check_fields(side, texts, split)
    lines = sorted({line for fields in split for line in fields})
    tokens = dict(zip(lines, tokenize(lines), strict=True))
    spans_of = [_spans(tokens[line] for line in fields) for fields in split]
    _check_lengths(side, list(rows), spans_of, max_tokens)
    spans = sorted({span for text in spans_of for span in text})
    ids = {span: number for number, span in enumerate(spans)}
    table = torch.tensor([[ids[span] for span in text] for text in spans_of])
    return table[torch.tensor([rows[text] for text in texts])], spans


def _spans(fields: Iterable[Sequence[int]]) -> list[Span]:
    spans, tokens = list[Span](), tuple[int, ...]()
    for field_tokens in fields:
        spans.append(((*tokens, *field_tokens), len(tokens)))
        tokens, _ = spans[-1]
    return spans


def _as_arrays(spans: Sequence[Span]) -> TextSpans:
    ends = np.array([len(tokens) for tokens, _ in spans], dtype=np.int64)
    table = np.full((len(spans), int(ends.max())), -1, dtype=np.int64)
    table[np.arange(table.shape[1]) < ends[:, None]] = [token for tokens, _ in spans for token in tokens]
    return TextSpans(table, np.array([start for _, start in spans], dtype=np.int64), ends)


def _check_fields(side: str, texts: Sequence[str], split: Sequence[Sequence[str]]) -> None:
    if not texts:
        raise DataError(f"there is no {side} text; give one for each {side}")
    for fields in split:
        text = "".join(fields)
        if not all(part.strip() for part in fields):
            raise DataError(f"the text of {side} {list(texts).index(text)} is {text!r}: fill in its empty field")
        if len(fields) != len(split[0]):
            raise DataError(
                f"the text of {side} {list(texts).index(text)} is {text!r}, which has {len(fields)} fields (lines), but that "
                f"of {side} 0 has {len(split[0])}; give each {side} the same fields"
            )


def _check_lengths(side: str, texts: Sequence[str], spans: Sequence[Sequence[Span]], max_tokens: int) -> None:
    for text, (*_, (tokens, start)) in zip(texts, spans, strict=True):
        if len(tokens) > max_tokens:
            raise DataError(
                f"the {side} text {text!r} has {len(tokens)} tokens, but this GPT-2 reads {max_tokens} at most; shorten it"
            )
        if len(tokens) == start:
            raise DataError(
                f"the tokenizer returns no token for the last field of the {side} text {text!r}; rephrase it"
            )
