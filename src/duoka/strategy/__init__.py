"""Strategies that keep the devices of a training run in step: one device, DDP, or torch's DataParallel."""

from duoka.strategy.base import Strategy
from duoka.strategy.select import STRATEGIES, select_strategy

__all__ = ["STRATEGIES", "Strategy", "select_strategy"]
