"""Choice of the strategy for a training run, with the reason."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from duoka.errors import ConfigError
from duoka.strategy.base import Strategy
from duoka.strategy.ddp import DDP
from duoka.strategy.torch_data_parallel import DP
from duoka.utils.validation import check_choice
from duoka.world import World

StrategyName = Literal["auto", "single", "ddp", "dp"]
STRATEGIES = get_args(StrategyName)
"""Values of the option ``strategy``."""


def select_strategy(
    name: str, world: World, *, devices: Sequence[torch.device] = (), ddp_options: Mapping[str, Any] | None = None
) -> tuple[Strategy, str]:
    """Return the strategy called ``name`` for this rank, and the reason.

    Args:
        name: one of ``STRATEGIES``; ``"auto"`` is DDP for more than one rank, else a single device.
        devices: the devices of strategy ``"dp"``, all used by this process.
        ddp_options: arguments of ``DistributedDataParallel``.

    Raises:
        ConfigError: no strategy has that name, or it does not support this number of ranks.

    >>> from duoka.world import World
    >>> strategy, reason = select_strategy("auto", World(0, 1, torch.device("cpu")))
    >>> strategy.name, reason
    ('single', 'one device')
    """
    check_choice("strategy", name, STRATEGIES)
    if world.size > 1:
        if name in ("single", "dp"):
            raise ConfigError(
                f"strategy={name!r} works in one process, but this job has {world.size}; "
                "use strategy='ddp', or start one process"
            )
        reason = f"{world.size} ranks, one process per device; gradients averaged during backward"
        return DDP(world, ddp_options), reason
    if name == "dp":
        return DP(world, devices), f"as requested: one process, {max(1, len(devices))} devices, torch's nn.DataParallel"
    return Strategy(world), "one device"
