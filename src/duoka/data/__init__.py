"""Exact sharding of any loader, in an order that does not depend on the number of ranks; and device-resident data."""

from duoka.data import transforms
from duoka.data.batch_ops import batch_length, concat_batches, slice_batch, split_batch, to_device
from duoka.data.position import DataPosition, LocalBatch
from duoka.data.resident_loader import DeviceResidentLoader, resident
from duoka.data.sharding import ShardedLoader, shard
from duoka.data.stream_fingerprint import same_stream

__all__ = [
    "DataPosition",
    "DeviceResidentLoader",
    "LocalBatch",
    "ShardedLoader",
    "batch_length",
    "concat_batches",
    "resident",
    "same_stream",
    "shard",
    "slice_batch",
    "split_batch",
    "to_device",
    "transforms",
]
