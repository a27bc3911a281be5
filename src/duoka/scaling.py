"""Arithmetic of many devices: batch, learning rate, threads and loader workers, as values and in words.

Nothing is measured or started here; the standard library is enough.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from duoka.errors import ConfigError

__all__ = [
    "Batch",
    "Cores",
    "LearningRate",
    "Workers",
    "available_cores",
    "core_limits",
    "loader_workers",
    "split",
    "threads_per_rank",
]

BATCH_MODES = ("per_device", "global")
LR_RULES = ("none", "linear", "sqrt")
WORKERS_PER_DEVICE = 4
"""What is taken where the user says nothing and the cores allow it: four keep one device in images."""


def split(count: int, parts: int) -> tuple[int, ...]:
    """Return the sizes of ``parts`` contiguous, nearly equal parts of ``count``, as ``torch.tensor_split`` makes them.

    >>> split(11, 3)
    (4, 4, 3)
    """
    whole, rest = divmod(count, parts)
    return tuple(whole + (part < rest) for part in range(parts))


@dataclass(frozen=True)
class Batch:
    """How many samples an optimiser step takes, and how many of them each device.

    >>> Batch(256, devices=2).words
    '256 per device x 2 devices = 512 global'
    >>> Batch(100, devices=3, mode="global").words
    '100 global = 34 + 33 + 33 on 3 devices'
    """

    size: int
    """The user's batch size, in samples: of one device at a time, or of a whole step; see ``mode``."""
    devices: int = 1
    """How many devices share the work."""
    mode: str = "per_device"
    """``"per_device"``: every device takes ``size``, the global batch grows with the number of devices (and with
    ``accumulate``). ``"global"``: ``size`` is the global batch, and is split, on any number of devices."""
    accumulate: int = 1
    """How many backward passes an optimiser step sums."""

    def __post_init__(self) -> None:
        for name in ("size", "devices", "accumulate"):
            _check_count(f"batch {name}" if name == "size" else name, getattr(self, name), 1)
        _check_choice("batch", self.mode, BATCH_MODES)
        parts = self.devices * self.accumulate
        if self.mode == "global" and self.size < parts:
            raise ConfigError(
                f"a global batch of {self.size} cannot be split into {parts} parts ({self._factors()}). "
                f"Use at least {parts}, fewer devices, or less accumulation."
            )

    @property
    def global_batch(self) -> int:
        """Samples that one optimiser step takes, over all devices and accumulated passes."""
        return self.size if self.mode == "global" else self.size * self.devices * self.accumulate

    @property
    def device_parts(self) -> tuple[int, ...]:
        """Samples of an optimiser step that each device takes, by rank."""
        return split(self.global_batch, self.devices)

    @property
    def micro_batch(self) -> int:
        """The most samples that a device holds at a time: what its memory must have room for."""
        return split(self.global_batch, self.devices * self.accumulate)[0]

    @property
    def growth(self) -> float:
        """The global batch relative to that of one device with the same settings."""
        return float(self.devices) if self.mode == "per_device" else 1.0

    @property
    def words(self) -> str:
        """The arithmetic as a user reads it."""
        if self.mode == "per_device":
            return f"{self.size} per device x {self._factors()} = {self.global_batch} global"
        if self.devices * self.accumulate == 1:
            return f"{self.size} global on 1 device"
        return f"{self.size} global = {self._parts()}"

    def _parts(self) -> str:
        sizes = split(self.global_batch, self.devices * self.accumulate)
        if sizes[0] == sizes[-1]:
            return f"{sizes[0]} per device x {self._factors()}"
        if self.accumulate > 1 or self.devices > WORDY:
            return f"{sizes[-1]} to {sizes[0]} per device x {self._factors()}"
        return f"{' + '.join(map(str, sizes))} on {self._factors()}"

    def _factors(self) -> str:
        accumulated = f" x {self.accumulate} accumulated" if self.accumulate > 1 else ""
        return f"{_several(self.devices, 'device')}{accumulated}"


WORDY = 8
"""Up to so many parts are written out."""


@dataclass(frozen=True)
class LearningRate:
    """The learning rate for a global batch that grew, and the way up to it.

    Linear with warm-up is the rule of Goyal et al., "Accurate, large minibatch SGD" (2017); the square root keeps the
    variance of a step (Krizhevsky, "One weird trick", 2014) and is the customary one for Adam.

    >>> LearningRate(0.1, growth=2, rule="linear", warmup_epochs=5).words
    'lr 0.1 -> 0.2 (linear), 5 warm-up epochs'
    """

    base: float
    """The learning rate that is right for one device."""
    growth: float = 1.0
    """The global batch relative to the one that ``base`` is right for; ``Batch.growth``."""
    rule: str = "none"
    """``"none"`` keeps ``base``; ``"linear"`` multiplies it by ``growth``; ``"sqrt"`` by the square root of that."""
    warmup_epochs: float = 0.0
    """Epochs, or parts of one, over which the rate rises; this or ``warmup_steps``."""
    warmup_steps: int = 0
    """Optimiser steps over which the rate rises; this or ``warmup_epochs``."""

    def __post_init__(self) -> None:
        _check_number("lr", self.base, positive=True)
        _check_number("growth", self.growth, positive=True)
        _check_choice("lr_scaling", self.rule, LR_RULES)
        _check_number("warmup_epochs", self.warmup_epochs, positive=False)
        _check_count("warmup_steps", self.warmup_steps, 0)
        if self.warmup_epochs and self.warmup_steps:
            raise ConfigError(
                f"warmup_epochs={self.warmup_epochs:g} and warmup_steps={self.warmup_steps} exclude each other. Give one."
            )

    @property
    def factor(self) -> float:
        """What ``base`` is multiplied by."""
        return {"none": 1.0, "linear": self.growth, "sqrt": math.sqrt(self.growth)}[self.rule]

    @property
    def scaled(self) -> float:
        """The learning rate after the warm-up."""
        return self.base * self.factor

    def steps(self, steps_per_epoch: int) -> int:
        """Return the length of the warm-up in optimiser steps; a part of a step counts as a whole one."""
        return self.warmup_steps or math.ceil(self.warmup_epochs * steps_per_epoch)

    def at(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of optimiser step ``step``, from 0: a straight line up, then ``scaled``.

        The line starts from ``base`` where that was scaled up, as Goyal et al. do, else from 0; the last step of the
        warm-up has ``scaled``.
        """
        length = self.steps(steps_per_epoch)
        if step + 1 >= length:
            return self.scaled
        start = self.base if self.scaled > self.base else 0.0
        return start + (self.scaled - start) * (step + 1) / length

    @property
    def words(self) -> str:
        """The arithmetic as a user reads it."""
        lr = f"lr {self.base:g}" if self.factor == 1 else f"lr {self.base:g} -> {self.scaled:g} ({self.rule})"
        if self.warmup_epochs:
            one = self.warmup_epochs == 1
            return f"{lr}, {self.warmup_epochs:g} warm-up epoch{'' if one else 's'}"
        return f"{lr}, {_several(self.warmup_steps, 'warm-up step')}" if self.warmup_steps else lr


@dataclass(frozen=True)
class Cores:
    """How many CPU cores this process may use, and what says so."""

    count: int
    words: str


@dataclass(frozen=True)
class Workers:
    """Data-loader worker processes for each device, and why so many."""

    per_device: int
    """0 is: the device's own process loads."""
    devices: int
    words: str

    @property
    def total(self) -> int:
        """Worker processes on this machine."""
        return self.per_device * self.devices


def loader_workers(devices: int, requested: int | None = None, cores: int | None = None) -> Workers:
    """Return the data-loader workers for ``devices`` devices of this machine, never more than its cores allow.

    Every device's own process keeps a core; the others may load. ``requested`` is for all devices together (``None``:
    four a device), ``cores`` is what there is (``None``: asked of the system).

    >>> loader_workers(2, requested=16, cores=8).words
    '3 per device: 16 were asked for, and 8 cores less 1 for each of 2 devices leave 6'
    """
    _check_count("devices", devices, 1)
    _check_count("cores", 1 if cores is None else cores, 1)
    _check_count("workers", 0 if requested is None else requested, 0)
    cores = available_cores() if cores is None else cores
    room = max(0, cores - devices)
    wanted = WORKERS_PER_DEVICE if requested is None else math.ceil(requested / devices)
    count = min(wanted, room // devices)
    return Workers(count, devices, _workers_words(count, wanted, devices, requested, cores, room))


def _workers_words(count: int, wanted: int, devices: int, requested: int | None, cores: int, room: int) -> str:
    result = f"{count} per device" if count else "none, each device's own process loads"
    asked = (
        "nothing was asked for" if requested is None else f"{requested} {'was' if requested == 1 else 'were'} asked for"
    )
    if count < wanted:
        each = f"1 for each of {devices} devices" if devices > 1 else "1 for the device"
        leave = "leaves" if cores == 1 else "leave"
        return f"{result}: {asked}, and {_several(cores, 'core')} less {each} {leave} {room}"
    return f"{result}: {asked}" + (f", and {cores} cores allow it" if count else "")


def threads_per_rank(ranks: int, cores: int | None = None) -> int:
    """Return the compute threads for each of ``ranks`` processes that share this machine's cores: 1 or more."""
    _check_count("ranks", ranks, 1)
    return max(1, (available_cores() if cores is None else cores) // ranks)


def available_cores() -> int:
    """Return how many CPU cores this process may use: its affinity, less where a container has a smaller quota."""
    return core_limits().count


def core_limits(root: Path = Path("/"), affinity: int | None = None) -> Cores:
    """Return how many cores this process may use, and which limit says so.

    ``root`` is where ``proc`` and ``sys`` are mounted and ``affinity`` how many cores the scheduler allows; a test
    gives its own. Source: Linux kernel documentation, "Control Group v2" (``cpu.max``) and "CFS Bandwidth Control".
    """
    allowed = affinity or _affinity()
    quota = min(_quotas(root), default=math.inf)
    if quota < allowed:
        count = max(1, math.floor(quota))
        return Cores(count, f"{_several(count, 'core')} (the container's quota is {quota:g} of {allowed})")
    return Cores(allowed, _several(allowed, "core"))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(root: Path) -> Iterable[float]:
    """Yield every CPU quota, in cores, that a control group of this process or one above it sets."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            for folder in _upwards(root / "sys/fs/cgroup", group):
                yield from _quota(_read(folder / "cpu.max").split())
        elif "cpu" in controllers.split(","):
            for mount in ("cpu", controllers):
                for folder in _upwards(root / "sys/fs/cgroup" / mount, group):
                    yield from _quota([_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")])


def _upwards(mount: Path, group: str) -> Iterable[Path]:
    """Yield the folder of a control group and those of all above it; in a container ``mount`` itself may be it."""
    parts = [part for part in group.split("/") if part not in ("", "..")]
    for length in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:length])


def _quota(fields: Sequence[str]) -> Iterable[float]:
    """Yield time over period, in cores, where both are numbers: ``max`` and ``-1`` are no limit."""
    if len(fields) == 2 and all(field.isdecimal() and int(field) > 0 for field in fields):
        yield int(fields[0]) / int(fields[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, {least} or more.")


def _check_number(name: str, value: object, *, positive: bool) -> None:
    limit = "greater than 0" if positive else "0 or more"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}; it must be a finite number, {limit}.")
    if value < 0 or (positive and value == 0):
        raise ConfigError(f"{name} is {value!r}; it must be {limit}.")


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}.{meant}")
