"""Transports: how tensors move between rank 0 and its workers.

``shared`` serves CPU workers: tensors lie in memory that all processes map. ``collective`` serves
accelerators: devices exchange tensors in the order of the messages that announce them. Both have the
same methods; what only one of them needs is called behind ``is_collective``.
"""

from typing import TypeAlias

from duoka.data_parallel.transport.collective import CollectiveOwnerTransport, CollectiveWorkerTransport
from duoka.data_parallel.transport.shared import SharedOwnerTransport, SharedWorkerTransport

OwnerTransport: TypeAlias = SharedOwnerTransport | CollectiveOwnerTransport
"""Rank 0's side, one for each worker group."""
WorkerTransport: TypeAlias = SharedWorkerTransport | CollectiveWorkerTransport
"""A worker's side."""
