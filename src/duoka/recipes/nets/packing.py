"""Texts laid out for a causal transformer so that each distinct beginning is computed once, and nothing is padding.

In a causal network what is computed at a token depends on the tokens before it alone. So texts that begin alike share all that
is computed for their common beginning: they form a prefix tree. Here the tree is cut into rows of some fixed number of tokens,
and a mask lets each token see its own ancestors only. `gpt2_text` runs a GPT-2 over such rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Packed", "pack"]

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Packed:
    """Rows of tokens, and where in them each piece of text lies."""

    tokens: Tensor
    """``(rows, row length)``, int64."""
    places: Tensor
    """The place of each token in its text, ``(rows, row length)``, int64."""
    seen: Tensor
    """Whether a token sees another of its row, ``(rows, 1, row length, row length)``: itself and what is before it."""
    members: Tensor
    """The tokens of all pieces, piece after piece, as places in the flattened rows, int64."""
    starts: Tensor
    """Where each piece begins in ``members``, ``(pieces,)``, int64."""
    computed: int
    """How many tokens are computed, what fills the rows' ends left out."""

    def to(self, device: torch.device) -> Packed:
        """Return the same on ``device``."""
        tensors = (self.tokens, self.places, self.seen, self.members, self.starts)
        tokens, places, seen, members, starts = (each.to(device, non_blocking=True) for each in tensors)
        return Packed(tokens, places, seen, members, starts, self.computed)


def pack(tokens: Integers, starts: Integers, ends: Integers, row_length: int) -> Packed:
    """Lay out pieces of text in rows.

    Args:
        tokens: ``(pieces, longest)``, each row a text up to the piece's end, then -1. Neighbours share what they have in
            common, so they should be sorted.
        starts: where each piece begins in its text, ``(pieces,)``; the tokens before are read and are no part of it.
        ends: where it ends, ``(pieces,)``.
        row_length: how many tokens a row has; at least ``longest``.

    >>> texts = np.array([[5, 6, 7], [5, 6, 8]])
    >>> packed = pack(texts, starts=np.array([0, 1]), ends=np.array([3, 3]), row_length=4)
    >>> packed.tokens.tolist(), packed.places.tolist()
    ([[5, 6, 7, 8]], [[0, 1, 2, 2]])
    >>> packed.members.tolist(), packed.starts.tolist()
    ([0, 1, 2, 1, 3], [0, 3])

    """
    shared = _shared(tokens, ends)
    bases, rows = _rows(shared, ends, row_length)
    place = np.arange(tokens.shape[1])
    begun = np.where(place >= shared[:, None], np.arange(len(tokens))[:, None], 0)
    owner = np.maximum.accumulate(begun, axis=0)  # the piece that brought this token of this text
    slots = bases[owner] + place
    is_new = (place >= shared[:, None]) & (place < ends[:, None])
    text, where = np.nonzero(is_new)
    own = slots[text, where]
    flat = np.zeros((2, rows * row_length), dtype=np.int64)
    flat[0, own], flat[1, own] = tokens[text, where], where
    inside = (place >= starts[:, None]) & (place < ends[:, None])
    lengths = ends - starts
    return Packed(
        torch.from_numpy(flat[0].reshape(rows, row_length)),
        torch.from_numpy(flat[1].reshape(rows, row_length)),
        torch.from_numpy(_seen(slots[text], where, own, rows, row_length)),
        torch.from_numpy(slots[inside]),
        torch.from_numpy(np.cumsum(lengths) - lengths),
        computed=len(own),
    )


def _shared(tokens: Integers, ends: Integers) -> Integers:
    """Return how many tokens each text has in common with the one before it, ``(pieces,)``."""
    shared = np.zeros(len(tokens), dtype=np.int64)
    alike = np.logical_and.accumulate(tokens[1:] == tokens[:-1], axis=1).sum(axis=1)
    shared[1:] = np.minimum(alike, np.minimum(ends[1:], ends[:-1]))
    return shared


def _rows(shared: Integers, ends: Integers, row_length: int) -> tuple[Integers, int]:
    """Give each text its row, filling one after the other; return where its place 0 would lie, and how many rows there are.

    The first text of a row shares nothing: ``shared`` is changed to say so.
    """
    bases: list[int] = []
    row = used = 0
    for number, (common, end) in enumerate(zip(shared.tolist(), ends.tolist(), strict=True)):
        if used + end - common > row_length:
            row, used, common = row + 1, 0, 0  # the beginning is computed again in a row of its own
            shared[number] = 0
        bases.append(row * row_length + used - common)
        used += end - common
    return np.array(bases, dtype=np.int64), row + 1


def _seen(paths: Integers, where: Integers, own: Integers, rows: int, row_length: int) -> npt.NDArray[Any]:
    """Return the mask: each token sees the path to it; what fills a row's end sees itself, since nobody may see nothing."""
    seen = np.zeros((rows * row_length, row_length), dtype=np.bool_)
    seen[np.arange(rows * row_length), np.arange(rows * row_length) % row_length] = True
    before = np.arange(paths.shape[1]) <= where[:, None]
    seen[np.broadcast_to(own[:, None], paths.shape)[before], paths[before] % row_length] = True
    return seen.reshape(rows, 1, row_length, row_length)
