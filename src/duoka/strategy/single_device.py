"""Strategy of a single device, whose collectives are the identity."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from duoka.strategy.base import Strategy


class SingleDevice(Strategy):
    """Trains on one device without a wrapper."""

    name: ClassVar[str] = "single"

    def wrap(self, module: nn.Module, *, find_unused_parameters: bool = False) -> nn.Module:  # noqa: ARG002
        """Return ``module``."""
        return module
