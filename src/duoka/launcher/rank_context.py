"""One rank of a launch: how it finds the others, what it starts with, and what the user's process gets back."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # first imported while a group is up it would keep that group for good
from torch.distributed import distributed_c10d

from duoka import scaling
from duoka.world import World, entered

__all__ = ["RankContext", "abort", "own_state_kept", "places", "run"]

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"

_RENDEZVOUS_S = 4.0
"""How long ranks that are all there may take to connect; if one dies meanwhile, the others wait this long in C++ code."""


@dataclass(frozen=True)
class RankContext:
    """What one rank needs to take its place beside the others."""

    world: World
    folder: str | None
    """Where ranks of this machine find each other; ``None`` for one alone."""
    backend: str
    timeout_s: float
    threads: int
    seed: int | None
    """``None`` for rank 0, which goes on with the user's own random generators."""


@contextlib.contextmanager
def places(devices: Sequence[torch.device], timeout_s: float) -> Iterator[list[RankContext]]:
    """Lay out the ranks, one a device, around a private folder that lives as long as the ``with`` block.

    The file in it through which the ranks find each other is no port and no other user's to read. It is a file with a path
    of its own because torch's store opens that path once more whenever it happens to be freed, however late.
    """
    size, backend, base = len(devices), _backend(devices), _base_seed()
    threads = scaling.threads_per_rank(size) if size > 1 else torch.get_num_threads()
    seeds = [None, *(base + rank for rank in range(1, size))]
    with _folder() if size > 1 else contextlib.nullcontext() as folder:
        yield [
            RankContext(World(rank, size, device, rank, size), folder, backend, timeout_s, threads, seeds[rank])
            for rank, device in enumerate(devices)
        ]


@contextlib.contextmanager
def run(
    place: RankContext, meet: Callable[[], None], fn: Callable[..., Any], args: tuple[Any, ...], wants_all: bool
) -> Iterator[Any]:
    """Run ``fn(*args)`` at ``place``; the value of the ``with`` block is its answer, and the group lives as long."""
    torch.set_num_threads(place.threads)
    if place.world.device.type != "cpu":
        torch.accelerator.set_device_index(place.world.device)
    if place.seed is not None:
        _seed(place.seed)
    meet()  # torch's rendezvous cannot be interrupted: nobody enters it before all are there
    with _process_group(place), entered(place.world):
        value = fn(*args)
        yield value if wants_all or place.world.is_main else None


def abort(device: torch.device) -> None:
    """Free a rank that waits in a collective of an accelerator; over gloo a peer's end does that."""
    if device.type != "cpu" and dist.is_initialized() and "nccl" in dist.get_backend_config():
        with contextlib.suppress(Exception):  # it may just have ended by itself
            distributed_c10d._abort_process_group()


@contextlib.contextmanager
def own_state_kept(device: torch.device) -> Iterator[None]:
    """Give the user's process back as it was: environment, hook, threads, current device, random generators."""
    environment, excepthook = dict(os.environ), sys.excepthook  # torch's groups put a hook of their own around it
    threads = torch.get_num_threads()
    index = torch.accelerator.current_device_index() if device.type != "cpu" else None
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's own
    on_device = _device_generator(device)
    try:
        yield
    finally:
        _restore_environment(environment)
        sys.excepthook = excepthook
        torch.set_num_threads(threads)
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
        np.random.set_state(generators[2])  # noqa: NPY002
        if index is not None:
            _set_device_generator(device, on_device)
            torch.accelerator.set_device_index(index)


def _device_generator(device: torch.device) -> torch.Tensor | None:
    if device.type == "cpu":
        return None
    where = () if device.type == "mps" else (device,)  # there is one, and its functions take no device
    state: torch.Tensor = torch.get_device_module(device).get_rng_state(*where)
    return state


def _set_device_generator(device: torch.device, state: torch.Tensor | None) -> None:
    where = () if device.type == "mps" else (device,)
    torch.get_device_module(device).set_rng_state(state, *where)


def _restore_environment(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


@contextlib.contextmanager
def _process_group(place: RankContext) -> Iterator[None]:
    world = place.world
    os.environ.update(_variables(place))
    store = dist.FileStore(f"{place.folder}/store", world.size) if world.size > 1 else dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(
        place.backend,
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=datetime.timedelta(seconds=_RENDEZVOUS_S),
        device_id=world.device if "nccl" in place.backend else None,
    )
    try:
        set_timeout = (
            getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
        )  # its name before torch 2.14
        set_timeout(datetime.timedelta(seconds=place.timeout_s))
        yield
    except BaseException:
        abort(world.device)
        raise
    finally:
        if dist.is_initialized():  # the function may have destroyed it itself
            dist.destroy_process_group()


def _variables(place: RankContext) -> dict[str, str]:
    """What code written for torchrun reads, and loopback for every connection of the group."""
    world = place.world
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "GLOO_SOCKET_IFNAME": _LOOPBACK,
        "NCCL_SOCKET_IFNAME": _LOOPBACK,
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # NCCL's watchdog would end the user's process; ours ends the helpers
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    }


def _backend(devices: Sequence[torch.device]) -> str:
    """Gloo for the CPU's tensors, and the accelerator's own beside it unless one is used twice, which NCCL refuses."""
    kind = devices[0].type
    if kind in ("cpu", "mps") or len(set(devices)) < len(devices):
        return "gloo"
    return f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="duoka-", ignore_cleanup_errors=True)


def _base_seed() -> int:
    """Drawn from a copy of the user's generator: repeatable after ``manual_seed``, and the user's own draws stay."""
    generator = torch.Generator("cpu")
    generator.set_state(torch.get_rng_state())
    return int(torch.randint(2**31, (), generator=generator, device="cpu"))


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - user code may draw from the global generator
