"""Exact sharding of any loader: each rank's part of each global batch, in an order that is the same for any number of ranks."""

from __future__ import annotations

from duoka.data.batches import batch_length, concat_batches, slice_batch, split_batch, to_device
from duoka.data.glimpse import alike
from duoka.data.loader import ShardedLoader, shard
from duoka.data.position import Part, Position

__all__ = [
    "Part",
    "Position",
    "ShardedLoader",
    "alike",
    "batch_length",
    "concat_batches",
    "shard",
    "slice_batch",
    "split_batch",
    "to_device",
]
