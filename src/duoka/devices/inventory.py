"""Accelerators that torch sees, and their properties, read without starting a context on any of them."""

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from duoka.devices import cuda_uuids, nvml
from duoka.devices.info import DeviceInfo

_HIDING_VARIABLES = {
    "cuda": ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    "xpu": ("ZE_AFFINITY_MASK",),
}
"""Environment variables that may hide devices of a type from this process."""
_DRIVER_TIMEOUT_S = 60.0
"""A machine with many GPUs and no persistence mode takes seconds for each GPU."""


@dataclass(frozen=True)
class Inventory:
    """The accelerators that this process sees."""

    type: str | None = None
    """Type in torch (``"cuda"``, ``"mps"``, ``"xpu"``); ``None`` without accelerators."""
    count: int = 0
    note: str = ""
    """Known reason why some or all of the machine's accelerators are missing; half a sentence."""

    def devices(self, indices: Sequence[int] | None = None) -> tuple[torch.device, ...]:
        """Return the devices with these indices; all by default."""
        return tuple(torch.device(str(self.type), i) for i in (range(self.count) if indices is None else indices))


def detect() -> Inventory:
    """Return the accelerators that this process sees, without a context or device memory."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return Inventory(note=f"torch {torch.__version__} is built for the CPU alone")
    count = torch.accelerator.device_count()
    set_variables = [name for name in _HIDING_VARIABLES.get(accelerator.type, ()) if name in os.environ]
    note = f"{set_variables[0]}={os.environ[set_variables[0]]!r} is set" if set_variables else ""
    return Inventory(accelerator.type, count, note) if count else Inventory(note=note)


def describe() -> list[DeviceInfo]:
    """Return the properties of each accelerator by index, or of the CPU if there is none."""
    inventory = detect()
    if inventory.type is None:
        return [_cpu()]
    return device_usage(inventory) or [_from_torch(inventory.type, index) for index in range(inventory.count)]


def device_usage(inventory: Inventory) -> list[DeviceInfo] | None:
    """Return the properties that NVML knows, with other processes, or ``None`` without NVML."""
    if inventory.type != "cuda" or torch.version.hip is not None:
        return None
    try:
        import pynvml
    except ImportError:
        return None
    uuids = _uuids()
    return nvml.read(pynvml, uuids) if uuids is not None and len(uuids) == inventory.count else None


def _uuids() -> list[str] | None:
    """Return the UUID of each CUDA device in CUDA's order, without starting CUDA in this process."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    command = [sys.executable, "-I", "-S", cuda_uuids.__file__]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.split()


def _from_torch(kind: str, index: int) -> DeviceInfo:
    """Return the properties that torch knows: the name and mostly the memory."""
    try:
        properties = torch.get_device_module(kind).get_device_properties(index)
    except (AttributeError, RuntimeError):
        properties = None
    name = str(getattr(properties, "name", kind.upper()))
    total = getattr(properties, "total_memory", None)
    return DeviceInfo(f"{kind}:{index}", index, name, None if total is None else int(total), source="torch")


def _cpu() -> DeviceInfo:
    import psutil

    name, memory = platform.processor() or platform.machine(), psutil.virtual_memory()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return DeviceInfo("cpu", None, name, memory.total, memory.total - memory.available)
