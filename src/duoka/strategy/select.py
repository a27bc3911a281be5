"""Which strategy a training run uses, and why."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from duoka.errors import ConfigError
from duoka.strategy.base import Strategy
from duoka.strategy.ddp import DDP
from duoka.strategy.single_device import SingleDevice
from duoka.strategy.torch_data_parallel import DP
from duoka.world import World

__all__ = ["NAMES", "choose"]

NAMES = ("auto", "single", "ddp", "dp")
"""What ``strategy`` may be called."""


def choose(
    name: str,
    world: World,
    *,
    devices: Sequence[torch.device] = (),
    ddp_options: Mapping[str, Any] | None = None,
) -> tuple[Strategy, str]:
    """Return the strategy called ``name`` for this rank, and the reason in words.

    Args:
        name: one of ``NAMES``; ``"auto"`` is DDP where there is more than one rank.
        world: this rank's place.
        devices: what ``"dp"`` spreads over, all in this process.
        ddp_options: passed to ``DistributedDataParallel`` as they are.

    Raises:
        ConfigError: there is no strategy of that name, or it cannot serve this number of ranks.

    >>> from duoka.world import World
    >>> strategy, reason = choose("auto", World(0, 1, torch.device("cpu")))
    >>> strategy.name, reason
    ('single', 'one device, nothing to keep together')

    """
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"strategy={name!r} is not one of {', '.join(NAMES)}{hint}")
    if world.size > 1:
        if name in ("single", "dp"):
            raise ConfigError(
                f"strategy={name!r} works in one process, and this job has {world.size}; use 'ddp', or start one process"
            )
        return DDP(world, ddp_options), f"{world.size} ranks, one process a device; gradients averaged during backward"
    if name == "dp":
        return DP(world, devices), f"as asked: one process, {max(1, len(devices))} devices, torch's own nn.DataParallel"
    return SingleDevice(world), "one device, nothing to keep together"
