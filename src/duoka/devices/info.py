"""What is known of one device: plain values, so that they print, compare and become JSON as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DeviceInfo", "DeviceProcess", "Link"]


@dataclass(frozen=True)
class DeviceProcess:
    """A process that holds memory on a device."""

    pid: int
    user: str | None
    """Who runs it; ``None`` where the system does not tell (another container, a hidden process)."""
    command: str | None
    """Its command line, shortened; ``None`` where the system does not tell."""
    memory_bytes: int | None
    graphics: bool = False
    """Whether it only draws (a desktop), and computes nothing."""
    own: bool = False
    """Whether it is this process or one that this process started."""


@dataclass(frozen=True)
class Link:
    """How a device reaches another one."""

    to: int
    """The other device's index."""
    kind: str
    """As ``nvidia-smi topo -m`` has it: ``NV4``, ``PIX``, ``PXB``, ``PHB``, ``NODE``, ``SYS``."""
    words: str
    """The same in words."""


@dataclass(frozen=True)
class DeviceInfo:
    """One device: an accelerator by the index that the user sees, or the CPU. ``None`` is: nobody here can tell."""

    device: str
    """As torch names it: ``"cuda:0"``, ``"cpu"``."""
    index: int | None
    """The accelerator's number as the user sees it, after ``CUDA_VISIBLE_DEVICES``; ``None`` for the CPU."""
    name: str
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    """By everyone together."""
    utilisation_percent: int | None = None
    """Share of the last second or so in which the device computed, 0 to 100."""
    processes: tuple[DeviceProcess, ...] = ()
    links: tuple[Link, ...] = ()
    uuid: str | None = None
    source: Literal["nvml", "torch", "system"] = "system"
    """Who told; only NVML knows of other processes."""

    @property
    def users(self) -> tuple[DeviceProcess, ...]:
        """The processes of others that compute on it."""
        return tuple(process for process in self.processes if not process.own and not process.graphics)

    @property
    def memory_of_others(self) -> float:
        """The share of the memory, 0 to 1, that others hold, also where the system hides their processes."""
        if not self.memory_total_bytes or self.memory_used_bytes is None:
            return 0.0
        own = sum(process.memory_bytes or 0 for process in self.processes if process.own)
        return max(0.0, (self.memory_used_bytes - own) / self.memory_total_bytes)
