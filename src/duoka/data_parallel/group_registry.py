"""Registry of worker groups: one for each list of devices, for as long as a model uses it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

import torch

from duoka.data_parallel.transport.base import OwnerTransport
from duoka.data_parallel.transport.collective import CollectiveOwnerTransport
from duoka.data_parallel.transport.shared import SharedOwnerTransport
from duoka.data_parallel.transport.shared_memory import SharedArena
from duoka.data_parallel.worker import worker_loop
from duoka.data_parallel.worker_group import WorkerGroup

COLLECTIVE_ON_CPU = "DUOKA_COLLECTIVE_TRANSPORT"
"""Environment variable for tests: if set, CPU workers use the collective transport, over gloo."""


class WorkerGroupRegistry:
    """The worker groups of this process, and the shared memory of all models' parameters."""

    def __init__(self) -> None:
        self._groups: weakref.WeakValueDictionary[tuple[str, ...], WorkerGroup] = weakref.WeakValueDictionary()
        self._weights: SharedArena | None = None
        self._pid = os.getpid()

    def get(self, devices: Sequence[torch.device]) -> WorkerGroup:
        """Return the worker group of these devices; a forked child has groups of its own."""
        if self._weights is None or self._pid != os.getpid():
            self._weights, self._pid = SharedArena("weights"), os.getpid()
            self._weights.isolate_on_fork()
            self._groups = weakref.WeakValueDictionary()
        is_collective = devices[0].type != "cpu" or bool(os.environ.get(COLLECTIVE_ON_CPU))
        key = (str(is_collective), *map(str, devices))
        group = self._groups.get(key)
        if group is None:
            transport: OwnerTransport = (
                CollectiveOwnerTransport(devices) if is_collective else SharedOwnerTransport(devices, self._weights)
            )
            group = self._groups[key] = WorkerGroup(devices, transport, worker_loop)
        return group


_registry = WorkerGroupRegistry()
get_worker_group = _registry.get
