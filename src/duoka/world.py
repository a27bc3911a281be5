"""One process's rank, world size, device and collectives; with one process every collective is the identity."""

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

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train together, and this process's rank among them.

    ``duoka.launch`` creates it and ``current_world()`` returns it. If ``size`` is 1, every collective returns its input,
    so that one code path serves one device and many.
    """

    rank: int
    """This process's number, from 0; rank 0 is the user's own process."""
    size: int
    """The number of processes."""
    device: torch.device
    """The device on which this process computes."""
    local_rank: int = 0
    """This process's number on this machine."""
    local_size: int = 1
    """The number of processes on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.size > 1:
            self.all_reduce(torch.zeros(1, device="cpu"))

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Return the sum (or ``"max"``, ``"min"``) of ``tensor`` over the ranks, with its shape, type and device."""
        if self.size == 1:
            return tensor
        reduced = tensor.detach().to(self._wire_device(tensor.device), copy=True)
        dist.all_reduce(reduced, op=getattr(dist.ReduceOp, op.upper()))
        return reduced.to(tensor.device)

    def any_rank(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on at least one rank: how ranks agree to stop, skip or save."""
        if self.size == 1:
            return bool(flag)
        return bool(self.all_reduce(torch.tensor(int(flag), device="cpu"), "max").item())

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """Return rank ``source``'s picklable ``value`` on every rank."""
        if self.size == 1:
            return value
        box: list[Any] = [cloudpickle.dumps(value) if self.rank == source else None]
        dist.broadcast_object_list(box, src=source, device=self._wire_device(torch.device("cpu")))
        return value if self.rank == source else pickle.loads(box[0])

    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's picklable ``value``, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        packed: list[Any] = [None] * self.size
        dist.all_gather_object(packed, cloudpickle.dumps(value))
        return [value if rank == self.rank else pickle.loads(data) for rank, data in enumerate(packed)]

    def _wire_device(self, device: torch.device) -> torch.device:
        """Return the device from which a tensor of ``device`` is sent: NCCL without gloo sends no CPU tensors."""
        sends_cpu = "gloo" in dist.get_backend_config() or "mpi" in dist.get_backend_config()
        return device if device.type != "cpu" or sends_cpu else self.device


_current: ContextVar[World | None] = ContextVar("duoka_world", default=None)


def current_world() -> World:
    """Return the world of ``duoka.launch`` or of the default process group; otherwise a world of one process."""
    world = _current.get()
    if world is not None:
        return world
    if not (dist.is_available() and dist.is_initialized()):
        return World(0, 1, _default_device())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return World(dist.get_rank(), dist.get_world_size(), _default_device(), local_rank, local_size)


@contextlib.contextmanager
def use_world(world: World) -> Iterator[World]:
    """Let ``current_world()`` return ``world`` inside the ``with`` block."""
    token = _current.set(world)
    try:
        yield world
    finally:
        _current.reset(token)


def has_current_world() -> bool:
    """Return whether this code runs inside ``use_world``."""
    return _current.get() is not None


def _default_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
