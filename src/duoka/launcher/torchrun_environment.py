"""torchrun's environment variables, which a launched function sees too, as code written for torchrun reads them."""

import os
import socket

from duoka.world import World

_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCH_PORT = "DUOKA_LAUNCH_PORT"
"""Marks the variables as those of a launch: the value is that of ``MASTER_PORT``, which torchrun would replace."""


def torchrun_variables(world: World, master_port: int) -> dict[str, str]:
    """Return the variables that torchrun would set for a rank of a launch on this machine.

    Source: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
    """
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "default",
        "ROLE_RANK": str(world.rank),
        "ROLE_WORLD_SIZE": str(world.size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(master_port),
        "TORCHELASTIC_RUN_ID": "duoka",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 serves ``MASTER_PORT`` when the user's code meets there
        _LAUNCH_PORT: str(master_port),
    }


def is_started_by_torchrun() -> bool:
    """Return whether torchrun, or a scheduler like it, has set the variables; those of a launch do not count.

    A launched function's child processes inherit the latter.
    """
    is_of_launch = os.environ.get(_LAUNCH_PORT, "") == os.environ.get("MASTER_PORT")
    return all(name in os.environ for name in _REQUIRED) and not is_of_launch


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
