"""One rank writes, the others wait for how it ended.

A collective would hang the program that says ``if rank == 0: duoka.save(...)``, which many do. So rank 0 waits for
nobody: it writes, and leaves the outcome in the store of the process group; a rank that calls as well waits for the
outcome there, and raises the error that rank 0 raised. Calls are matched by path and by how often each rank saved
to it, which the store counts.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from duoka import errors
from duoka.errors import CheckpointError, ConfigError, StorageError
from duoka.world import World, current_world

__all__ = ["written_by_one"]

_WRITING = b"writing"
_DONE = b"done"
_FIRST_LOOK_S = 0.001
_SLOWEST_LOOK_S = 0.1
PATIENCE_S = 1800.0
"""How long a rank waits for rank 0 to begin; as long as torch.distributed waits for a peer over gloo."""


def written_by_one(path: str, write: Callable[[], None]) -> None:
    """Call ``write`` on rank 0; every other rank that calls this returns, or raises, when rank 0 has."""
    world = current_world()
    store = _store() if world.size > 1 else None
    if store is None:
        _without_a_store(world, write)
        return
    count = store.add(f"duoka/save/{path}/calls of {world.rank}", 1)
    outcome = f"duoka/save/{path}/{count}"
    if world.is_main:
        _write_and_tell(store, outcome, write)
    else:
        _wait(store, outcome, path, world.rank)


def _store() -> Any:
    """The store over which the ranks met; ``None`` where the group has none (MPI, or no group)."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    with contextlib.suppress(AttributeError, RuntimeError, ValueError):
        return dist.distributed_c10d._get_default_store()
    return None


def _without_a_store(world: World, write: Callable[[], None]) -> None:
    """Alone, or in a group that has no store: the outcome goes over the group, so that all ranks must call."""
    failure: Exception | None = None
    if world.is_main:
        try:
            write()
        except Exception as error:
            failure = error
    failure = world.broadcast_object(failure)
    if failure is not None:
        raise failure


def _write_and_tell(store: Any, outcome: str, write: Callable[[], None]) -> None:
    store.set(outcome, _WRITING)
    try:
        write()
    except BaseException as error:
        store.set(outcome, _packed(error))
        raise
    store.set(outcome, _DONE)


def _packed(error: BaseException) -> bytes:
    """The error as text: whoever reaches the store's port must not be able to send code, as a pickle would."""
    return json.dumps({"type": type(error).__name__, "message": str(error)}).encode()


def _unpacked(said: bytes) -> Exception:
    failure = json.loads(said)
    kind = getattr(errors, failure["type"], None)
    if kind in (CheckpointError, StorageError, ConfigError):
        return kind(failure["message"])  # type: ignore[no-any-return]
    return CheckpointError(f"rank 0 could not save: {failure['type']}: {failure['message']}")


def _wait(store: Any, outcome: str, path: str, rank: int) -> None:
    """Wait for rank 0's outcome in short looks, so that Ctrl-C is heard; without limit once rank 0 is writing."""
    pause_s = _FIRST_LOOK_S
    deadline = time.monotonic() + PATIENCE_S
    while True:
        said = bytes(store.get(outcome)) if store.check([outcome]) else b""
        if said not in (b"", _WRITING):
            break
        if not said and time.monotonic() > deadline:
            raise CheckpointError(_nobody_writes(path, rank))
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _SLOWEST_LOOK_S)
    if said != _DONE:
        raise _unpacked(said)


def _nobody_writes(path: str, rank: int) -> str:
    return (
        f"rank {rank} has waited {PATIENCE_S:.0f} s for rank 0 to save {path}, which it has not begun. Call save on "
        "every rank or on rank 0 alone, with the same path on all (a time in its name differs between ranks)"
    )
