"""The processes of one crew as a group of torch.distributed: the four ways in which bytes travel between them.

The group is an object of its own. It is never made torch.distributed's default group nor known to it at all, so whatever
the user does with his own groups in the same process is neither seen nor disturbed.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from duoka.workers.rendezvous import (
    CONNECT_TIMEOUT,
    LOOPBACK,
    NO_WATCHDOG_ENVIRONMENT,
    environment_variables,
    file_store,
)

__all__ = ["PrivateProcessGroup", "PendingCollectives", "backend_of"]

_FOREVER = datetime.timedelta(days=365)
"""Gloo's limit for what comes after: a member may compute for hours, and the death of one breaks its connections."""
_TAG = 0
_ENVIRONMENT = {
    "NCCL_SOCKET_IFNAME": LOOPBACK,
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",  # one order of everything is what is wanted
}
_OWNERS_ENVIRONMENT = _ENVIRONMENT | NO_WATCHDOG_ENVIRONMENT
"""A worker keeps the watchdog: it ends the worker when its device has failed, which the owner notices."""


def backend_of(devices: Sequence[torch.device]) -> str:
    """Return NCCL for GPUs that are all different, which it insists on; gloo otherwise."""
    is_nccl = devices[0].type == "cuda" and len(set(devices)) == len(devices) and dist.is_nccl_available()
    return "nccl" if is_nccl else "gloo"


class PendingCollectives:
    """Something that is on its way. It must be kept until it is waited for, or until its group is closed."""

    def __init__(self, work: Any, timeout: datetime.timedelta | None, target: torch.Tensor, host: torch.Tensor) -> None:
        self._work, self._timeout, self._target, self._host = work, timeout, target, host

    def let_go(self) -> Callable[[], bool]:
        """Return what tells whether it has gone, and keep none of its memory: the group does as long as it needs it."""
        work = self._work
        return lambda: bool(work.is_completed())

    def wait(self) -> None:
        """Let what comes after see it: NCCL makes the device's stream wait, gloo this thread."""
        if self._timeout is None:
            self._work.wait()
        else:
            self._work.wait(self._timeout)
        if self._host is not self._target:
            self._target.copy_(self._host)


class PrivateProcessGroup:
    """The members, number 0 being the user's process. All must ask for the same things in the same order.

    Tensors are contiguous, of any type as bytes; only ``reduce`` looks at their numbers. Over gloo, tensors of an
    accelerator go through the host's memory.
    """

    def __init__(self, folder: str, rank: int, size: int, device: torch.device, backend: str) -> None:
        self.rank, self.size = rank, size
        self._device = device
        store = file_store(folder, size)
        self._is_nccl = backend == "nccl"
        self._timeout = None if self._is_nccl else _FOREVER
        self._group: Any = self._nccl(store) if self._is_nccl else self._gloo(store)
        _groups.add(self)

    def broadcast(self, tensor: torch.Tensor) -> PendingCollectives:
        """Send from member 0 to all others."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, _FOREVER
        return self._begin(tensor, lambda host: self._group.broadcast([host], options), reads=self.rank == 0)

    def add(self, tensor: torch.Tensor) -> PendingCollectives:
        """Bring the sum of all members' tensors to member 0; the others' are used up. Member 0 must have zeros."""
        if self.size == 2:  # the sum is what the one sends
            return self.receive(tensor, 1) if self.rank == 0 else self.send(tensor, 0)
        options = dist.ReduceOptions()
        options.rootRank, options.reduceOp, options.timeout = 0, dist.ReduceOp.SUM, _FOREVER
        return self._begin(tensor, lambda host: self._group.reduce([host], options), reads=True)

    def send(self, tensor: torch.Tensor, to: int) -> PendingCollectives:
        """Send to one member."""
        return self._begin(tensor, lambda host: self._group.send([host], to, _TAG), reads=True)

    def receive(self, tensor: torch.Tensor, source: int) -> PendingCollectives:
        """Receive from one member."""
        return self._begin(tensor, lambda host: self._group.recv([host], source, _TAG), reads=False)

    def close(self) -> None:
        """Leave the group; what is under way is given up."""
        self.abort()
        self._group = None

    def abort(self) -> None:
        """End what a device waits for: NCCL would wait for a dead member for ever, gloo notices by itself."""
        group = self._group
        if self._is_nccl and group is not None:
            with contextlib.suppress(Exception):  # it may have been ended by a failure
                group.abort()

    def _begin(self, tensor: torch.Tensor, start: Any, *, reads: bool) -> PendingCollectives:
        host = tensor
        if not self._is_nccl and tensor.device.type != "cpu":
            host = tensor.cpu() if reads else torch.empty_like(tensor, device="cpu")
        return PendingCollectives(start(host), self._timeout, tensor, host)

    def _gloo(self, store: Any) -> Any:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(interface=LOOPBACK)]
        options._timeout = CONNECT_TIMEOUT
        return dist.ProcessGroupGloo(store, self.rank, self.size, options)

    def _nccl(self, store: Any) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _FOREVER
        with environment_variables(_ENVIRONMENT if self.rank else _OWNERS_ENVIRONMENT):
            group = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
            group.eager_connect_single_device(self._device)  # so that everything is one communicator's, in one order
        return group


_groups: weakref.WeakSet[PrivateProcessGroup] = weakref.WeakSet()


def _keep_in_child() -> None:
    """Let a forked child never destroy torch's groups: that waits for threads of theirs which only its parent has."""
    for group in list(_groups):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group._group))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_in_child)
