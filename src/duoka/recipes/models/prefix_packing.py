"""Packing of texts for a causal transformer: common prefixes are computed once, and nothing is padded.

In a causal network the state of a token depends on the tokens before it alone. Texts with a common
prefix form a prefix tree whose nodes are the tokens to compute. Only attention reads other tokens:
for it the tree is cut into rows, whose mask lets each node attend to its own ancestors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class PackedTree(NamedTuple):
    """A prefix tree: its nodes, the rows in which they attend to each other, and the nodes of each span."""

    tokens: Tensor
    """Token of each distinct (token, position) pair, ``(pairs,)``, int64."""
    positions: Tensor
    """Position of each pair in its text, ``(pairs,)``."""
    pair_of_node: Tensor
    """``(nodes,)``."""
    node_of_slot: Tensor
    """``(rows, row length)``; a node that the texts of two rows share is in both."""
    attention_mask: Tensor
    """``(rows, 1, row length, row length)``: a slot attends to itself and its ancestors in the row."""
    slot_of_node: Tensor
    """One slot of each node in the flattened rows, ``(nodes,)``."""
    span_nodes: Tensor
    """The nodes of all spans, one span after the other."""
    span_offsets: Tensor
    """Start of each span in ``span_nodes``, ``(spans,)``."""

    def to(self, device: torch.device) -> PackedTree:
        """Return the same tree on ``device``."""
        return PackedTree(*(tensor.to(device, non_blocking=True) for tensor in self))


def pack_prefix_tree(tokens: Integers, starts: Integers, ends: Integers, row_length: int) -> PackedTree:
    """Return the prefix tree of some spans of text.

    Args:
        tokens: ``(spans, longest)``, in each row a text up to the end of its span, then -1. Sorted
            rows share the most, since each row shares its prefix with the one before.
        starts: start of each span in its text, ``(spans,)``; the span's nodes have read the tokens before.
        ends: end of each span, ``(spans,)``.
        row_length: slots in a row; at least ``longest``.

    >>> texts = np.array([[5, 6, 7], [5, 6, 8]])
    >>> packed = pack_prefix_tree(texts, starts=np.array([0, 1]), ends=np.array([3, 3]), row_length=4)
    >>> packed.tokens[packed.pair_of_node].tolist(), packed.node_of_slot.tolist()
    ([5, 6, 7, 8], [[0, 1, 2, 3]])
    >>> packed.span_nodes.tolist(), packed.span_offsets.tolist()
    ([0, 1, 2, 1, 3], [0, 3])
    """
    position, longest = np.arange(tokens.shape[1]), tokens.shape[1]
    shared = np.zeros_like(ends)  # number of tokens that each text shares with the one before it
    equal = np.logical_and.accumulate(tokens[1:] == tokens[:-1], axis=1).sum(axis=1)
    shared[1:] = np.minimum(equal, np.minimum(ends[1:], ends[:-1]))
    new = ends - shared
    nodes = _number_tokens(shared, longest, np.cumsum(new) - new - shared)
    before_end = position < ends[:, None]
    text, at = np.nonzero((position >= shared[:, None]) & before_end)
    pairs, pair_of_node = np.unique(tokens[text, at] * longest + at, return_inverse=True)
    offsets, shared_in_row, count = _assign_rows(shared, ends, row_length)
    slots = _number_tokens(shared_in_row, longest, offsets)
    in_row = (position >= shared_in_row[:, None]) & before_end
    node_of_slot = np.zeros(count * row_length, dtype=np.int64)
    node_of_slot[slots[in_row]] = nodes[in_row]
    lengths = ends - starts
    return PackedTree(
        tokens=torch.from_numpy(pairs // longest),
        positions=torch.from_numpy(pairs % longest),
        pair_of_node=torch.from_numpy(pair_of_node),
        node_of_slot=torch.from_numpy(node_of_slot.reshape(count, row_length)),
        attention_mask=torch.from_numpy(_attention_mask(slots, in_row, count, row_length)),
        slot_of_node=torch.from_numpy(slots[text, at]),
        span_nodes=torch.from_numpy(nodes[(position >= starts[:, None]) & before_end]),
        span_offsets=torch.from_numpy(np.cumsum(lengths) - lengths),
    )


def _number_tokens(shared: Integers, longest: int, offsets: Integers) -> Integers:
    """Return a number for each token, ``(spans, longest)``; a shared token has the number in the text before.

    A text's other tokens get ``offsets[text] + position``.
    """
    position = np.arange(longest)
    owner = np.where(position >= shared[:, None], np.arange(len(shared))[:, None], 0)
    return offsets[np.maximum.accumulate(owner, axis=0)] + position


def _assign_rows(shared: Integers, ends: Integers, row_length: int) -> tuple[Integers, Integers, int]:
    """Fill rows with texts, one after the other.

    Return the slot of each text's position 0, the number of its tokens that its row already has
    (none for a row's first text), and the number of rows.
    """
    offsets, shared_in_row, row, used = [], [], 0, 0
    for common, end in zip(shared.tolist(), ends.tolist(), strict=True):
        if used + end - common > row_length:
            row, used, common = row + 1, 0, 0
        offsets.append(row * row_length + used - common)
        shared_in_row.append(common)
        used += end - common
    return np.array(offsets, dtype=np.int64), np.array(shared_in_row, dtype=np.int64), row + 1


def _attention_mask(slots: Integers, in_row: Flags, rows: int, row_length: int) -> Flags:
    """Return the mask; empty slots attend to themselves, since a softmax over nothing is NaN."""
    mask = np.zeros((rows * row_length, row_length), dtype=np.bool_)
    every = np.arange(rows * row_length)
    mask[every, every % row_length] = True
    text, at = np.nonzero(in_row)
    before = np.arange(slots.shape[1]) <= at[:, None]
    query = np.broadcast_to(slots[text, at][:, None], before.shape)
    mask[query[before], slots[text][before] % row_length] = True
    return mask.reshape(rows, 1, row_length, row_length)
