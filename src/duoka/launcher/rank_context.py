"""One rank of a launch: its process group, device, threads and seed, and the state that the user's process gets back."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # first imported while a group exists, it would keep that group for good

from duoka.devices import nccl
from duoka.devices.cpu import threads_per_rank
from duoka.launcher.torchrun_environment import free_port, torchrun_variables
from duoka.utils.rng_state import draw_seed_from_copy, rng_state, seed_all, set_rng_state
from duoka.utils.torch_private import (
    abort_default_process_group,
    forget_failed_process_groups,
    set_default_group_timeout,
)
from duoka.workers.exceptions import RendezvousError, call_user_code
from duoka.workers.process_context import restore_environment
from duoka.workers.rendezvous import (
    CONNECT_TIMEOUT,
    LOOPBACK_ENVIRONMENT,
    NO_WATCHDOG_ENVIRONMENT,
    Rendezvous,
    RendezvousFile,
)
from duoka.workers.resource_limits import explain_resource_errors, reserve_descriptors
from duoka.world import World, use_world


@dataclass(frozen=True)
class RankContext:
    """The settings of one rank's process group, threads and random numbers."""

    world: World
    rendezvous: Rendezvous | None
    """Where the ranks exchange addresses; ``None`` for a single rank."""
    backend: str
    timeout_s: float
    connect_timeout: timedelta
    threads: int
    master_port: int
    """Free port for a second rendezvous of the user's own, through ``env://``."""
    seed: int | None
    """``None`` for rank 0, which keeps the user's own random generators."""


def rank_contexts(devices: Sequence[torch.device], timeout_s: float) -> list[RankContext]:
    """Return a context for each device. The ranks exchange addresses in memory, which takes no port and no file."""
    size, seed = len(devices), draw_seed_from_copy(2**31)
    threads = threads_per_rank(size) if size > 1 else torch.get_num_threads()
    worlds = [World(rank, size, device, rank, size) for rank, device in enumerate(devices)]
    with explain_resource_errors("launch"):
        rendezvous, port = Rendezvous.new() if size > 1 else None, free_port()
    shared = (rendezvous, backend_for(devices), timeout_s, CONNECT_TIMEOUT, threads, port)
    return [RankContext(world, *shared, seed + world.rank if world.rank else None) for world in worlds]


@contextlib.contextmanager
def run_rank(
    context: RankContext, barrier: Callable[[], None], fn: Callable[..., Any], args: tuple[Any, ...], return_all: bool
) -> Iterator[Any]:
    """Run ``fn(*args)`` as one rank; the value of the ``with`` block is the result, and the group exists as long."""
    torch.set_num_threads(context.threads)
    if context.world.device.type != "cpu":
        torch.accelerator.set_device_index(context.world.device)
    if context.seed is not None:
        seed_all(context.seed)
    barrier()  # torch's rendezvous cannot be interrupted, so all ranks must be ready for it
    with _process_group(context), use_world(context.world):
        barrier()  # a function that fails at once must not end its rank while others still connect to it
        value = call_user_code(fn, *args)
        yield value if return_all or context.world.is_main else None


def abort_collectives(device: torch.device) -> None:
    """Free a rank that waits in a collective of an accelerator; gloo's end when a peer's connection closes."""
    if device.type != "cpu":
        abort_default_process_group("nccl")


@contextlib.contextmanager
def preserve_process_state(device: torch.device) -> Iterator[None]:
    """Restore environment, exception hook, thread count, current device and random generators after the block."""
    environment, excepthook = dict(os.environ), sys.excepthook  # torch's process groups replace the hook
    threads = torch.get_num_threads()
    current = torch.accelerator.current_device_index() if device.type != "cpu" else None
    _set_current_device(device)
    generators = rng_state()
    try:
        yield
    finally:
        restore_environment(environment)
        sys.excepthook = excepthook
        torch.set_num_threads(threads)
        _set_current_device(device)
        set_rng_state(generators)
        if current is not None:
            torch.accelerator.set_device_index(current)


def _set_current_device(device: torch.device) -> None:
    """Make an accelerator current and initialize it, so that its random generator has a state."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
        torch.empty(0, device=device)


@contextlib.contextmanager
def _process_group(context: RankContext) -> Iterator[None]:
    """Create the group, with the variables that code written for torchrun reads and connections on loopback."""
    world = context.world
    os.environ.update(torchrun_variables(world, context.master_port))
    os.environ.update({**LOOPBACK_ENVIRONMENT, **NO_WATCHDOG_ENVIRONMENT})
    forget_failed_process_groups()
    spare = contextlib.ExitStack()
    spare.enter_context(reserve_descriptors(world.size))
    try:
        dist.init_process_group(
            context.backend,
            store=context.rendezvous.store() if context.rendezvous else dist.HashStore(),  # type: ignore[attr-defined]
            rank=world.rank,
            world_size=world.size,
            timeout=context.connect_timeout,
            device_id=world.device if "nccl" in context.backend else None,
        )
    except RuntimeError as error:
        spare.close()
        RendezvousFile.renew()
        raise RendezvousError(
            f"in duoka's rendezvous rank {world.rank} of {world.size} could not connect to the others within "
            f"{context.connect_timeout.seconds} s: {error}. If the machine is overloaded, use fewer devices or launch again"
        ) from error
    try:
        set_default_group_timeout(timedelta(seconds=context.timeout_s))
        yield
    except BaseException:
        abort_collectives(world.device)
        raise
    finally:
        spare.close()
        if dist.is_initialized():  # the user's function may have destroyed it
            dist.destroy_process_group()


def backend_for(devices: Sequence[torch.device]) -> str:
    """Return gloo for CPU tensors, with the accelerator's own backend unless it refuses a repeated device."""
    kind = devices[0].type
    is_repeated = len(set(devices)) < len(devices)
    if kind in ("cpu", "mps") or (is_repeated and not nccl.connects(devices)):
        return "gloo"
    return f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
