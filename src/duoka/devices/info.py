"""Properties of one device as plain values, which print, compare and convert to JSON."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DeviceProcess:
    """A process that holds memory on a device."""

    pid: int
    user: str | None
    """Owner; ``None`` if the system hides it (another container, a hidden process)."""
    command: str | None
    """Command line, shortened; ``None`` if the system hides it."""
    memory_bytes: int | None
    graphics: bool = False
    """Whether it only draws a desktop and computes nothing."""
    own: bool = False
    """Whether it is this process or a descendant of it."""


@dataclass(frozen=True)
class Link:
    """Connection from a device to another one."""

    to: int
    """The other device's index."""
    kind: str
    """Name in ``nvidia-smi topo -m``: ``NV4``, ``PIX``, ``PXB``, ``PHB``, ``NODE``, ``SYS``."""
    description: str
    """The same in plain English."""


@dataclass(frozen=True)
class DeviceInfo:
    """One device: an accelerator with the index that the user sees, or the CPU. ``None`` means unknown."""

    device: str
    """Name in torch: ``"cuda:0"``, ``"cpu"``."""
    index: int | None
    """Index that the user sees, after ``CUDA_VISIBLE_DEVICES``; ``None`` for the CPU."""
    name: str
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    """By all processes together."""
    utilization_percent: int | None = None
    """Share of about the last second in which the device computed, 0 to 100."""
    processes: tuple[DeviceProcess, ...] = ()
    links: tuple[Link, ...] = ()
    uuid: str | None = None
    source: Literal["nvml", "torch", "system"] = "system"
    """Where the values come from; only NVML knows other processes."""

    @property
    def users(self) -> tuple[DeviceProcess, ...]:
        """Processes of other programs that compute on it."""
        return tuple(process for process in self.processes if not process.own and not process.graphics)

    @property
    def foreign_memory_share(self) -> float:
        """Share of the memory, 0 to 1, that other programs hold, even if the system hides their processes."""
        if not self.memory_total_bytes or self.memory_used_bytes is None:
            return 0.0
        own = sum(process.memory_bytes or 0 for process in self.processes if process.own)
        return max(0.0, (self.memory_used_bytes - own) / self.memory_total_bytes)
