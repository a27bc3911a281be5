"""Arithmetic of batch size and learning rate on several devices, as numbers and as text."""

import math
from dataclasses import dataclass

from duoka.errors import ConfigError
from duoka.utils.partition import chunk_sizes
from duoka.utils.text import plural
from duoka.utils.validation import check_choice, check_integer, check_number

BATCH_MODES = ("per_device", "global")
LR_RULES = ("none", "linear", "sqrt")
_LISTED_PARTS = 8
"""The text lists the part of each device up to this number of devices."""


@dataclass(frozen=True)
class Batch:
    """The samples of one optimizer step, and of each device in it.

    >>> Batch(256, devices=2).summary
    '256 per device x 2 devices = 512 global'
    >>> Batch(100, devices=3, mode="global").summary
    '100 global = 34 + 33 + 33 on 3 devices'
    """

    size: int
    """The user's batch size, in samples: per device, or for the whole step; see ``mode``."""
    devices: int = 1
    """The number of devices that share the work."""
    mode: str = "per_device"
    """``"per_device"``: each device takes ``size`` samples, so the global batch grows with the number of devices and with
    ``accumulation_steps``. ``"global"``: ``size`` is the global batch, which the devices split."""
    accumulation_steps: int = 1
    """The number of backward passes whose gradients one optimizer step sums."""

    def __post_init__(self) -> None:
        check_integer("batch_size", self.size, 1)
        check_integer("devices", self.devices, 1)
        check_integer("gradient_accumulation_steps", self.accumulation_steps, 1)
        check_choice("batch_size_means", self.mode, BATCH_MODES)
        parts = self.devices * self.accumulation_steps
        if self.mode == "global" and self.size < parts:
            raise ConfigError(
                f"a global batch_size={self.size} cannot be split into {parts} parts ({self._factors()}). "
                f"Use at least {parts}, fewer devices, or fewer gradient_accumulation_steps."
            )

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step, over all devices and accumulated passes."""
        return self.size if self.mode == "global" else self.size * self.devices * self.accumulation_steps

    @property
    def growth(self) -> float:
        """The global batch relative to that of one device with the same settings."""
        return float(self.devices) if self.mode == "per_device" else 1.0

    @property
    def summary(self) -> str:
        """The arithmetic as text."""
        if self.mode == "per_device":
            return f"{self.size} per device x {self._factors()} = {self.global_batch} global"
        parts = chunk_sizes(self.global_batch, self.devices * self.accumulation_steps)
        if len(parts) == 1:
            return f"{self.size} global on 1 device"
        if parts[0] == parts[-1]:
            split = f"{parts[0]} per device x {self._factors()}"
        elif self.accumulation_steps > 1 or self.devices > _LISTED_PARTS:
            split = f"{parts[-1]} to {parts[0]} per device x {self._factors()}"
        else:
            split = f"{' + '.join(map(str, parts))} on {self._factors()}"
        return f"{self.size} global = {split}"

    def _factors(self) -> str:
        accumulated = f" x {self.accumulation_steps} accumulated" if self.accumulation_steps > 1 else ""
        return f"{plural(self.devices, 'device')}{accumulated}"


@dataclass(frozen=True)
class LearningRate:
    """The learning rate for a larger global batch, with its warm-up.

    Linear with warm-up is the rule of Goyal et al., "Accurate, large minibatch SGD" (2017); the square root keeps the
    variance of a step (Krizhevsky, "One weird trick", 2014) and is customary for Adam.

    >>> LearningRate(0.1, growth=2, rule="linear", warmup_epochs=5).summary
    'lr 0.1 -> 0.2 (linear), 5 warm-up epochs'
    """

    base: float
    """The learning rate that is right for one device."""
    growth: float = 1.0
    """The global batch relative to the one that ``base`` is right for; ``Batch.growth``."""
    rule: str = "none"
    """``"none"`` keeps ``base``; ``"linear"`` multiplies it by ``growth``; ``"sqrt"`` by the square root of that."""
    warmup_epochs: float = 0.0
    """Epochs, or fractions of one, in which the rate rises; exclusive with ``warmup_steps``."""
    warmup_steps: int = 0
    """Optimizer steps in which the rate rises; exclusive with ``warmup_epochs``."""

    def __post_init__(self) -> None:
        check_number("lr", self.base, exclusive=True)
        check_number("growth", self.growth, exclusive=True)
        check_choice("lr_scaling", self.rule, LR_RULES)
        check_number("warmup_epochs", self.warmup_epochs)
        check_integer("warmup_steps", self.warmup_steps, 0)
        if self.warmup_epochs and self.warmup_steps:
            raise ConfigError(
                f"warmup_epochs={self.warmup_epochs:g} and warmup_steps={self.warmup_steps} are both given. Give one of them."
            )

    @property
    def factor(self) -> float:
        """The factor between ``base`` and ``scaled``."""
        return {"none": 1.0, "linear": self.growth, "sqrt": math.sqrt(self.growth)}[self.rule]

    @property
    def scaled(self) -> float:
        """The learning rate after the warm-up."""
        return self.base * self.factor

    @property
    def summary(self) -> str:
        """The arithmetic as text."""
        lr = f"lr {self.base:g}" if self.factor == 1 else f"lr {self.base:g} -> {self.scaled:g} ({self.rule})"
        if self.warmup_epochs:
            return f"{lr}, {self.warmup_epochs:g} warm-up epoch{'' if self.warmup_epochs == 1 else 's'}"
        return f"{lr}, {plural(self.warmup_steps, 'warm-up step')}" if self.warmup_steps else lr
