"""Exact sharding of any loader, in an order that is the same for any number of ranks; and data that stay on the device."""

from __future__ import annotations

from duoka.data import augment
from duoka.data.batches import batch_length, concat_batches, slice_batch, split_batch, to_device
from duoka.data.glimpse import alike
from duoka.data.keeping import Resident, resident
from duoka.data.loader import ShardedLoader, shard
from duoka.data.position import Part, Position

__all__ = [
    "Part",
    "Position",
    "Resident",
    "ShardedLoader",
    "alike",
    "augment",
    "batch_length",
    "concat_batches",
    "resident",
    "shard",
    "slice_batch",
    "split_batch",
    "to_device",
]
