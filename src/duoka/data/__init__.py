"""Exact sharding of any loader, in an order that is the same for any number of ranks; and data that stay on the device."""

from __future__ import annotations

from duoka.data import transforms
from duoka.data.batch_ops import batch_length, concat_batches, slice_batch, split_batch, to_device
from duoka.data.position import DataPosition, LocalBatch
from duoka.data.resident_loader import DeviceResidentLoader, resident
from duoka.data.sharding import ShardedLoader, shard
from duoka.data.stream_fingerprint import same_stream

__all__ = [
    "LocalBatch",
    "DataPosition",
    "DeviceResidentLoader",
    "ShardedLoader",
    "same_stream",
    "transforms",
    "batch_length",
    "concat_batches",
    "resident",
    "shard",
    "slice_batch",
    "split_batch",
    "to_device",
]
