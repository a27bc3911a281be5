"""Texts laid out for a causal transformer so that each distinct beginning is computed once, and nothing is padding.

In a causal network what is computed at a token depends on the tokens before it alone. So texts that begin alike share all that
is computed for their common beginning: they form a prefix tree, whose nodes are the tokens to compute. Attention alone looks at
other tokens; for it the tree is cut into rows, in which a mask lets each node see its own ancestors only. `gpt2_states` runs a
GPT-2 over the nodes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["PackedTree", "pack"]

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PackedTree:
    """The nodes of a prefix tree, the rows in which they see each other, and which of them are which piece of text."""

    tokens: Tensor
    """Of each distinct pair of token and place in a text, ``(pairs,)``, int64."""
    places: Tensor
    """As ``tokens``."""
    pairs: Tensor
    """Which pair each node is, ``(nodes,)``."""
    rows: Tensor
    """The node in each slot of the rows, ``(rows, row length)``. A node that the texts of two rows share is in both."""
    seen: Tensor
    """Whether one slot sees another of its row, ``(rows, 1, row length, row length)``: itself and its ancestors."""
    homes: Tensor
    """A slot of each node in the flattened rows, ``(nodes,)``."""
    members: Tensor
    """The nodes of all pieces, piece after piece."""
    starts: Tensor
    """Where each piece begins in ``members``, ``(pieces,)``."""

    def to(self, device: torch.device) -> PackedTree:
        """Return the same on ``device``."""
        fields = dataclasses.fields(self)
        return PackedTree(**{item.name: getattr(self, item.name).to(device, non_blocking=True) for item in fields})


def pack(tokens: Integers, starts: Integers, ends: Integers, row_length: int) -> PackedTree:
    """Lay out pieces of text.

    Args:
        tokens: ``(pieces, longest)``, each row a text up to the piece's end, then -1. Neighbours share what they have in
            common, so they should be sorted.
        starts: where each piece begins in its text, ``(pieces,)``; the tokens before are read and are no part of it.
        ends: where it ends, ``(pieces,)``.
        row_length: how many slots a row has; at least ``longest``.

    >>> texts = np.array([[5, 6, 7], [5, 6, 8]])
    >>> packed = pack(texts, starts=np.array([0, 1]), ends=np.array([3, 3]), row_length=4)
    >>> packed.tokens[packed.pairs].tolist(), packed.rows.tolist()
    ([5, 6, 7, 8], [[0, 1, 2, 3]])
    >>> packed.members.tolist(), packed.starts.tolist()
    ([0, 1, 2, 1, 3], [0, 3])

    """
    place, longest = np.arange(tokens.shape[1]), tokens.shape[1]
    shared = _shared(tokens, ends)
    new = ends - shared
    nodes = _owned(shared, longest, np.cumsum(new) - new - shared)
    is_new = (place >= shared[:, None]) & (place < ends[:, None])
    text, where = np.nonzero(is_new)
    pairs, pair_of = np.unique(tokens[text, where] * longest + where, return_inverse=True)
    bases, in_row, count = _rows(shared, ends, row_length)
    slots = _owned(in_row, longest, bases)
    inside = (place >= starts[:, None]) & (place < ends[:, None])
    rows = np.zeros(count * row_length, dtype=np.int64)
    in_rows = (place >= in_row[:, None]) & (place < ends[:, None])
    rows[slots[in_rows]] = nodes[in_rows]
    return PackedTree(
        tokens=torch.from_numpy(pairs // longest),
        places=torch.from_numpy(pairs % longest),
        pairs=torch.from_numpy(pair_of),
        rows=torch.from_numpy(rows.reshape(count, row_length)),
        seen=torch.from_numpy(_seen(slots, in_rows, count, row_length)),
        homes=torch.from_numpy(slots[text, where]),
        members=torch.from_numpy(nodes[inside]),
        starts=torch.from_numpy(np.cumsum(ends - starts) - (ends - starts)),
    )


def _shared(tokens: Integers, ends: Integers) -> Integers:
    """Return how many tokens each text has in common with the one before it, ``(pieces,)``."""
    shared = np.zeros(len(tokens), dtype=np.int64)
    alike = np.logical_and.accumulate(tokens[1:] == tokens[:-1], axis=1).sum(axis=1)
    shared[1:] = np.minimum(alike, np.minimum(ends[1:], ends[:-1]))
    return shared


def _owned(shared: Integers, longest: int, bases: Integers) -> Integers:
    """Number every token of every text, ``(pieces, longest)``; what a text shares with the one before has that one's number.

    A text's own tokens are numbered by their places, from where its place 0 would be: ``bases (pieces,)``.
    """
    place = np.arange(longest)
    begun = np.where(place >= shared[:, None], np.arange(len(shared))[:, None], 0)
    return bases[np.maximum.accumulate(begun, axis=0)] + place


def _rows(shared: Integers, ends: Integers, row_length: int) -> tuple[Integers, Integers, int]:
    """Give each text its row, filling one after the other.

    Returns:
        Where each text's place 0 would lie; how much of it is in its row already (the first text of a row brings all of its
        beginning); and how many rows there are.

    """
    bases, in_row, row, used = [], [], 0, 0
    for common, end in zip(shared.tolist(), ends.tolist(), strict=True):
        if used + end - common > row_length:
            row, used, common = row + 1, 0, 0
        bases.append(row * row_length + used - common)
        in_row.append(common)
        used += end - common
    return np.array(bases, dtype=np.int64), np.array(in_row, dtype=np.int64), row + 1


def _seen(slots: Integers, in_rows: Flags, rows: int, row_length: int) -> Flags:
    """Return the mask: each slot sees the path to it; what fills a row's end sees itself, since nobody may see nothing."""
    seen = np.zeros((rows * row_length, row_length), dtype=np.bool_)
    everyone = np.arange(rows * row_length)
    seen[everyone, everyone % row_length] = True
    text, where = np.nonzero(in_rows)
    before = np.arange(slots.shape[1]) <= where[:, None]
    looking = np.broadcast_to(slots[text, where][:, None], before.shape)
    seen[looking[before], slots[text][before] % row_length] = True
    return seen.reshape(rows, 1, row_length, row_length)
