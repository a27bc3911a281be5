"""Exact sharding of any loader, in an order that does not depend on the number of ranks; and device-resident data."""

from duoka.data import transforms
from duoka.data.batch_ops import batch_length, concat_batches, slice_batch, split_batch, to_device
from duoka.data.position import DataPosition, LocalBatch
from duoka.data.resident_loader import DeviceResidentLoader, resident
from duoka.data.sharding import RankLoader, ShardedLoader, local_batches, shard
from duoka.data.stream_fingerprint import require_same_stream

__all__ = [
    "DataPosition",
    "DeviceResidentLoader",
    "LocalBatch",
    "RankLoader",
    "ShardedLoader",
    "batch_length",
    "concat_batches",
    "local_batches",
    "require_same_stream",
    "resident",
    "shard",
    "slice_batch",
    "split_batch",
    "to_device",
    "transforms",
]
