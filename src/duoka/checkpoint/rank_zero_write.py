"""Writing on rank 0, whose outcome the other ranks wait for.

A collective would block the program that says ``if rank == 0: duoka.save(...)``, which many do. So rank 0 waits for
no other rank: it writes, and puts the outcome into the store of the process group. A rank that calls too waits for
the outcome there, and raises the error that rank 0 raised. Calls are matched by their path and their number.
"""

import json
import time
from collections.abc import Callable
from typing import Any

from duoka.errors import CheckpointError, ConfigError, StorageError
from duoka.utils.torch_private import default_store
from duoka.world import World, current_world

_WRITING = b"writing"
_DONE = b"done"
_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.1
START_TIMEOUT_S = 1800.0
"""How long a rank waits for rank 0 to begin; torch.distributed waits as long for a peer over gloo."""


def write_on_rank_zero(path: str, write: Callable[[], None]) -> None:
    """Call ``write`` on rank 0; on other ranks, return or raise after rank 0 has."""
    world = current_world()
    store = default_store() if world.size > 1 else None
    if store is None:
        _write_and_broadcast(world, write)
        return
    count = store.add(f"duoka/save/{path}/calls of {world.rank}", 1)
    key = f"duoka/save/{path}/{count}"
    if not world.is_main:
        _wait(store, key, path, world.rank)
        return
    store.set(key, _WRITING)
    try:
        write()
    except BaseException as error:
        # text, because a pickle would let any process that reaches the store's port run code here
        store.set(key, json.dumps({"type": type(error).__name__, "message": str(error)}).encode())
        raise
    store.set(key, _DONE)


def _write_and_broadcast(world: World, write: Callable[[], None]) -> None:
    """Broadcast the outcome: for one rank, or a process group without a store, in which all ranks must call."""
    failure: Exception | None = None
    if world.is_main:
        try:
            write()
        except Exception as error:
            failure = error
    failure = world.broadcast_object(failure)
    if failure is not None:
        raise failure


def _wait(store: Any, key: str, path: str, rank: int) -> None:
    """Poll for the outcome, so that Ctrl-C works; there is no limit once rank 0 has begun to write."""
    pause_s = _FIRST_PAUSE_S
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        outcome = bytes(store.get(key)) if store.check([key]) else b""
        if outcome not in (b"", _WRITING):
            break
        if not outcome and time.monotonic() > deadline:
            raise CheckpointError(
                f"rank {rank} has waited {START_TIMEOUT_S:.0f} s for rank 0 to save {path}, which it has not begun. Call save "
                "on every rank or on rank 0 alone, with the same path on all (a time in its name differs between ranks)"
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    if outcome == _DONE:
        return
    kind, message = json.loads(outcome).values()
    for own in (CheckpointError, StorageError, ConfigError):
        if kind == own.__name__:
            raise own(message)
    raise CheckpointError(f"rank 0 could not save: {kind}: {message}")
