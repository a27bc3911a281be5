"""How devices are kept together: one device, DDP, or torch's own DataParallel, behind one small interface."""

from __future__ import annotations

from duoka.strategy.base import Strategy
from duoka.strategy.select import NAMES, choose

__all__ = ["NAMES", "Strategy", "choose"]
