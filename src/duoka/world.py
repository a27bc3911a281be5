"""One process's place among the others: rank, size, device, and the collectives, which at size 1 are the identity."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import cloudpickle
import torch
import torch.distributed as dist

__all__ = ["World", "current_world"]

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that work together and this one's place in them.

    Built by ``duoka.launch``; ``current_world()`` returns it. Where ``size`` is 1 every collective returns its input,
    so that one code path serves one device and many.
    """

    rank: int
    """This process's number, from 0; rank 0 is the user's own process."""
    size: int
    """How many processes there are."""
    device: torch.device
    """What this process computes on."""
    local_rank: int = 0
    """This process's number on this machine."""
    local_size: int = 1
    """How many of the processes are on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            self.all_reduce(torch.zeros(1, device="cpu"))

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Return the sum (or ``"max"``, ``"min"``) of ``tensor`` over the ranks: same shape, type and device."""
        if self.size == 1:
            return tensor
        reduced = tensor.detach().to(self._wire(tensor.device), copy=True)
        dist.all_reduce(reduced, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op])
        return reduced.to(tensor.device)

    def any_rank(self, flag: bool) -> bool:
        """Whether ``flag`` is true on at least one rank: how ranks agree to stop, skip or save."""
        return (
            bool(flag) if self.size == 1 else bool(self.all_reduce(torch.tensor(int(flag), device="cpu"), "max").item())
        )

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """Return rank ``source``'s picklable ``value`` on every rank."""
        if self.size == 1:
            return value
        box: list[Any] = [cloudpickle.dumps(value) if self.rank == source else None]
        dist.broadcast_object_list(box, src=source, device=self._wire(torch.device("cpu")))
        return value if self.rank == source else pickle.loads(box[0])

    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's picklable ``value``, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        packed: list[Any] = [None] * self.size
        dist.all_gather_object(packed, cloudpickle.dumps(value))
        return [value if rank == self.rank else pickle.loads(data) for rank, data in enumerate(packed)]

    def _wire(self, device: torch.device) -> torch.device:
        """Where a tensor of ``device`` must lie to be sent: NCCL alone, without gloo, sends no CPU tensors."""
        cpu_is_sent = "gloo" in dist.get_backend_config() or "mpi" in dist.get_backend_config()
        return device if device.type != "cpu" or cpu_is_sent else self.device


_current: ContextVar[World | None] = ContextVar("duoka_world", default=None)


def current_world() -> World:
    """Return this process's place: inside ``duoka.launch`` or a started process group that, else one process alone."""
    world = _current.get()
    if world is not None:
        return world
    if not (dist.is_available() and dist.is_initialized()):
        return World(0, 1, _default_device())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return World(dist.get_rank(), dist.get_world_size(), _default_device(), local_rank, local_size)


@contextlib.contextmanager
def entered(world: World) -> Iterator[World]:
    """Make ``world`` what ``current_world()`` returns inside the ``with`` block."""
    token = _current.set(world)
    try:
        yield world
    finally:
        _current.reset(token)


def is_entered() -> bool:
    """Whether this code runs at a place that ``entered`` gave it."""
    return _current.get() is not None


def _default_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
