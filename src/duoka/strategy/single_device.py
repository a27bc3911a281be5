"""One device: nothing to keep together."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from duoka.strategy.base import Strategy

__all__ = ["SingleDevice"]


class SingleDevice(Strategy):
    """Trains on one device; every method is the identity."""

    name: ClassVar[str] = "single"

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return ``module``."""
        return module
