"""Attention with several heads: full, and ProbSparse, which spends full attention on a few telling queries only."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from duoka.errors import ConfigError

__all__ = ["CrossAttention", "SelfAttention", "check_heads", "log_length", "prob_sparse", "sampled_keys"]


def prob_sparse(query: Tensor, key: Tensor, value: Tensor, sample: Tensor, top: int, *, causal: bool) -> Tensor:
    """Return ProbSparse attention (Zhou et al., AAAI 2021, https://arxiv.org/abs/2012.07436, section 3).

    A query whose scores hardly differ between keys would only average the values, so it gets just that: the mean of all, or,
    where it must not look ahead, of those so far. The ``top`` queries whose largest score stands out most from their mean
    score, measured on a sample of the keys, get full attention.

    The authors' code takes the running sum where this takes the mean so far; a sum grows with the place and drowns what the
    place itself says. `docs/results/informer.md` compares them.

    Args:
        query: ``(batch, heads, queries, width)``.
        key: ``(batch, heads, keys, width)``.
        value: as ``key``.
        sample: the places of the keys to measure on, ``(sampled,)``; the same for all queries, so that they are compared
            on equal terms and one matrix product measures them all.
        top: how many queries get full attention.
        causal: whether query ``i`` sees keys ``0 .. i`` only; there must be as many queries as keys.

    Returns:
        As ``query``.

    """
    measured = query @ key[:, :, sample].transpose(-2, -1)
    telling = (measured.amax(-1) - measured.mean(-1)).topk(top, sorted=False).indices
    places = telling.unsqueeze(-1).expand(-1, -1, -1, query.shape[-1])
    seen = None
    if causal:
        seen = torch.arange(key.shape[2], device=key.device) <= telling.unsqueeze(-1)
    attended = scaled_dot_product_attention(query.gather(2, places), key, value, attn_mask=seen)
    if causal:
        lazy = value.cumsum(2) / torch.arange(1, value.shape[2] + 1, device=value.device).unsqueeze(1)
    else:
        lazy = value.mean(2, keepdim=True).expand_as(query)
    return lazy.scatter(2, places, attended.to(lazy.dtype))


def sampled_keys(keys: int, count: int, draw: Tensor, salt: int) -> Tensor:
    """Return ``count`` different places below ``keys``, a function of ``draw`` and ``salt`` alone.

    The draw is by a hash (the finaliser of SplitMix64: Steele, Lea, Flood, OOPSLA 2014) and not by a random generator, so that
    every device draws the same at the same step, and the step after a resume draws what it would have.

    Args:
        keys: how many places there are.
        count: how many to draw.
        draw: the number of the draw, an int64 scalar on the device that the places are wanted on.
        salt: what tells this layer from others.

    """
    mixed = (
        torch.arange(1, keys + 1, device=draw.device) * -7046029254386353131 + (draw + 1) * 2862933555777941757 + salt
    )
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    mixed = mixed ^ ((mixed >> 31) & ((1 << 33) - 1))
    return mixed.topk(count).indices


def log_length(factor: int, length: int) -> int:
    """Return ``factor * ceil(ln(length))``, at most ``length``: how many queries or keys ProbSparse takes of ``length``.

    >>> log_length(5, 48), log_length(5, 720), log_length(100, 48)
    (20, 35, 48)
    """
    return min(length, max(1, factor * math.ceil(math.log(max(length, 2)))))


class SelfAttention(nn.Module):
    """Every place of a sequence looks at the others.

    A sequence so short that ProbSparse would take every query gets full attention, which is the same then.

    Args:
        width: of each place.
        heads: how many; they share ``width``.
        factor: ProbSparse's sampling factor; ``None`` is full attention.
        causal: whether a place sees only itself and those before.
        dropout: share of the attention weights that is dropped in training; where ``factor`` is ``None`` only.
        salt: what tells this layer's draws from another's.

    Raises:
        ConfigError: ``heads`` does not divide ``width``.

    """

    def __init__(
        self, width: int, heads: int, *, factor: int | None, causal: bool = False, dropout: float = 0.0, salt: int = 0
    ) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads, self.factor, self.causal, self.dropout, self.salt = heads, factor, causal, dropout, salt
        self.inward = nn.Linear(width, 3 * width)
        self.outward = nn.Linear(width, width)
        self.draws: Tensor
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def forward(self, places: Tensor) -> Tensor:
        """Return ``(batch, length, width)`` of ``places`` of that shape."""
        length = places.shape[1]
        query, key, value = self.inward(places).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        count = length if self.factor is None else log_length(self.factor, length)
        if count == length:
            dropout = self.dropout if self.training and self.factor is None else 0.0
            attended = scaled_dot_product_attention(query, key, value, is_causal=self.causal, dropout_p=dropout)
        else:
            attended = prob_sparse(query, key, value, self._sample(length, count), count, causal=self.causal)
        return self.outward(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _sample(self, length: int, count: int) -> Tensor:
        """Draw the keys to measure on: others at every step of training, always the same ones in evaluation."""
        if not self.training:
            return sampled_keys(length, count, torch.zeros_like(self.draws), self.salt)
        self.draws += 1
        return sampled_keys(length, count, self.draws, self.salt)


class CrossAttention(nn.Module):
    """Every place of one sequence looks at all of another, in full. Arguments and errors are ``SelfAttention``'s."""

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads, self.dropout = heads, dropout
        self.asking = nn.Linear(width, width)
        self.answering = nn.Linear(width, 2 * width)
        self.outward = nn.Linear(width, width)

    def forward(self, places: Tensor, others: Tensor) -> Tensor:
        """Return ``(batch, length, width)`` of ``places`` of that shape and ``others`` ``(batch, any, width)``."""
        query = self.asking(places).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.answering(others).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.outward(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def check_heads(width: int, heads: int) -> None:
    """Make sure that ``heads`` share ``width`` equally."""
    if heads < 1 or width % heads:
        raise ConfigError(
            f"{heads} heads cannot share a width of {width}: it must be a multiple of the number of heads"
        )
