"""Private process group of one worker group: broadcast, reduce, send and receive over NCCL or gloo.

torch.distributed does not know the group, so the user's process groups
in the same process are independent of it.
"""

import contextlib
import ctypes
import datetime
import os
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from duoka.devices import nccl
from duoka.utils.torch_private import gloo_process_group, nccl_process_group
from duoka.workers.rendezvous import (
    CONNECT_TIMEOUT,
    LOOPBACK,
    NO_WATCHDOG_ENVIRONMENT,
    Rendezvous,
    environment_variables,
)
from duoka.workers.resource_limits import reserve_descriptors

_NO_TIMEOUT = datetime.timedelta(days=365)
"""A worker may compute for hours. The death of a member breaks gloo's connections without a timeout."""
_ENVIRONMENT = {
    "NCCL_SOCKET_IFNAME": LOOPBACK,
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",  # one order for everything is intended
}
_OWNER_ENVIRONMENT = _ENVIRONMENT | NO_WATCHDOG_ENVIRONMENT
"""Workers keep NCCL's watchdog: it ends a worker whose device fails, and its death reaches rank 0."""


def select_backend(devices: Sequence[torch.device]) -> str:
    """Return NCCL where it connects these devices; gloo otherwise."""
    return "nccl" if nccl.connects(devices) else "gloo"


class PendingCollective(NamedTuple):
    """A transfer under way. Keep it until ``wait``, or until its group is closed."""

    work: Any
    timeout: tuple[datetime.timedelta, ...]
    target: torch.Tensor
    host: torch.Tensor

    def wait(self) -> None:
        """Make later work see the result: NCCL blocks the device's stream, gloo blocks this thread."""
        self.work.wait(*self.timeout)
        if self.host is not self.target:
            self.target.copy_(self.host)


class PrivateProcessGroup:
    """The processes of one worker group. All must call the same operations in the same order.

    Tensors are contiguous; only ``reduce_sum`` interprets their type. Over gloo, tensors of an
    accelerator pass through host memory.
    """

    def __init__(self, rendezvous: Rendezvous, rank: int, size: int, device: torch.device, backend: str) -> None:
        self.rank, self.size = rank, size
        self._is_nccl = backend == "nccl"
        self._timeout = () if self._is_nccl else (_NO_TIMEOUT,)
        self._group: Any
        self._spare = contextlib.ExitStack()
        self._spare.enter_context(reserve_descriptors(size))
        store = rendezvous.store()
        if self._is_nccl:
            with environment_variables(_ENVIRONMENT if rank else _OWNER_ENVIRONMENT):
                self._group = nccl_process_group(store, rank, size, device, _NO_TIMEOUT)
        else:
            self._group = gloo_process_group(store, rank, size, LOOPBACK, CONNECT_TIMEOUT)
        _groups.add(self)

    def broadcast(self, tensor: torch.Tensor) -> PendingCollective:
        """Send rank 0's tensor to all other ranks."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, _NO_TIMEOUT
        return self._start(tensor, lambda host: self._group.broadcast([host], options), reads=self.rank == 0)

    def reduce_sum(self, tensor: torch.Tensor) -> PendingCollective:
        """Sum all ranks' tensors into rank 0's, which must be zeros; the others' become undefined."""
        if self.size == 2:  # the sum is what rank 1 sends
            return self.receive(tensor, 1) if self.rank == 0 else self.send(tensor, 0)
        options = dist.ReduceOptions()
        options.rootRank, options.reduceOp, options.timeout = 0, dist.ReduceOp.SUM, _NO_TIMEOUT
        return self._start(tensor, lambda host: self._group.reduce([host], options), reads=True)

    def send(self, tensor: torch.Tensor, target: int) -> PendingCollective:
        """Send to one rank."""
        return self._start(tensor, lambda host: self._group.send([host], target, 0), reads=True)

    def receive(self, tensor: torch.Tensor, source: int) -> PendingCollective:
        """Receive from one rank."""
        return self._start(tensor, lambda host: self._group.recv([host], source, 0), reads=False)

    def close(self) -> None:
        """Leave the group; transfers under way are aborted."""
        self.abort()
        self._spare.close()
        self._group = None

    def abort(self) -> None:
        """Unblock the device: NCCL waits forever for a dead member; gloo detects the death."""
        group = self._group
        if self._is_nccl and group is not None:
            with contextlib.suppress(Exception):  # a failure may have ended the group
                group.abort()

    def _start(self, tensor: torch.Tensor, operation: Any, *, reads: bool) -> PendingCollective:
        host = tensor
        if not self._is_nccl and tensor.device.type != "cpu":
            host = tensor.cpu() if reads else torch.empty_like(tensor, device="cpu")
        return PendingCollective(operation(host), self._timeout, tensor, host)


_groups: weakref.WeakSet[PrivateProcessGroup] = weakref.WeakSet()


def _leak_in_child() -> None:
    """Never destroy torch's groups in a forked child: that waits for threads that only the parent has."""
    for group in list(_groups):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group._group))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leak_in_child)
