"""CPU cores that this process may use, and their division into threads and DataLoader workers."""

import itertools
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from duoka.utils.text import plural
from duoka.utils.validation import check_integer

DEFAULT_WORKERS_PER_DEVICE = 4
"""Four DataLoader workers are enough to feed one device with images."""


@dataclass(frozen=True)
class Cores:
    """The number of CPU cores that this process may use, and the limit that decides it."""

    count: int
    reason: str


@dataclass(frozen=True)
class LoaderWorkers:
    """The number of DataLoader worker processes for each device, and the reason for it."""

    per_device: int
    """0: the device's own process loads its batches."""
    devices: int
    reason: str

    @property
    def total(self) -> int:
        """DataLoader workers on this machine."""
        return self.per_device * self.devices


def loader_workers(devices: int, requested: int | None = None, cores: int | None = None) -> LoaderWorkers:
    """Return the DataLoader workers for ``devices`` devices of this machine, never more than its cores allow.

    One core for each device is reserved for the device's own process.

    Args:
        devices: devices that train.
        requested: workers for all devices together; ``None`` for four a device.
        cores: cores of the machine; ``None`` for those that this process may use.

    >>> loader_workers(2, requested=16, cores=8).reason
    '3 per device: 16 requested, 8 cores minus 1 for each of 2 devices leave 6'
    """
    check_integer("devices", devices, 1)
    check_integer("cores", 1 if cores is None else cores, 1)
    check_integer("num_workers", 0 if requested is None else requested, 0)
    cores = available_cores() if cores is None else cores
    free = max(0, cores - devices)
    wanted = DEFAULT_WORKERS_PER_DEVICE if requested is None else math.ceil(requested / devices)
    count = min(wanted, free // devices)
    result = f"{count} per device" if count else "none, each device's own process loads its batches"
    origin = "the default" if requested is None else f"{requested} requested"
    if count < wanted:
        each = f"1 for each of {devices} devices" if devices > 1 else "1 for the device"
        verb = "leaves" if cores == 1 else "leave"
        return LoaderWorkers(count, devices, f"{result}: {origin}, {plural(cores, 'core')} minus {each} {verb} {free}")
    return LoaderWorkers(count, devices, f"{result}: {origin}" + (f", which {cores} cores allow" if count else ""))


def threads_per_rank(ranks: int, cores: int | None = None) -> int:
    """Return the compute threads for each of ``ranks`` processes that share this machine's cores: 1 or more."""
    check_integer("ranks", ranks, 1)
    return max(1, (available_cores() if cores is None else cores) // ranks)


def available_cores() -> int:
    """Return how many CPU cores this process may use: its affinity, or a container's quota if that is smaller."""
    return core_limits().count


def core_limits(root: Path = Path("/"), affinity: int | None = None) -> Cores:
    """Return how many cores this process may use, and which limit decides it.

    Args:
        root: folder with ``proc`` and ``sys``, which tests replace.
        affinity: cores that the scheduler allows; ``None`` asks the system.

    Source: Linux kernel documentation, "Control Group v2" (``cpu.max``) and "CFS Bandwidth Control".
    """
    if affinity is None:
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_quotas(root), default=math.inf)
    if quota < affinity:
        count = max(1, math.floor(quota))
        return Cores(count, f"{plural(count, 'core')} (the container's quota is {quota:g} of {affinity})")
    return Cores(affinity, plural(affinity, "core"))


def _quotas(root: Path) -> Iterable[float]:
    """Yield every CPU quota, in cores, of this process's control groups and those above them."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = ("cpu", controllers) if controllers else ("",)  # of version 1, or of version 2
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for mount, depth in itertools.product(mounts, range(len(parts), -1, -1)):
            folder = (root / "sys/fs/cgroup" / mount).joinpath(*parts[:depth])
            files = [folder / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
            fields = " ".join(map(_read, files)).split()  # version 2 has the first file, version 1 the other two
            if len(fields) == 2 and all(field.isdecimal() and int(field) > 0 for field in fields):  # not "max", not -1
                yield int(fields[0]) / int(fields[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
