"""What NVIDIA's management library tells of GPUs, and torch cannot: memory of others, utilisation, processes, links.

``nvml`` is the ``pynvml`` module throughout, given as an argument: the tests give a stand-in for hardware they lack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from duoka.devices.info import DeviceInfo, DeviceProcess, Link

__all__ = ["library", "read"]

_COMMAND_LENGTH = 200


def library() -> Any | None:
    """Return the ``pynvml`` module, or ``None`` where it is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def read(nvml: Any, uuids: Sequence[str]) -> list[DeviceInfo] | None:
    """Return facts about the GPUs with these UUIDs, in this order, or ``None`` where NVML does not work.

    ``uuids`` are in CUDA's order, without the ``GPU-`` or ``MIG-`` in front.
    """
    try:
        with _session(nvml):
            handles = [_handle(nvml, uuid) for uuid in uuids]
            return [_facts(nvml, index, uuids[index], handles) for index in range(len(handles))]
    except nvml.NVMLError:
        return None


@contextmanager
def _session(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        nvml.nvmlShutdown()


def _handle(nvml: Any, uuid: str) -> Any:
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _ask(nvml: Any, call: str, *arguments: Any) -> Any:
    """Return what NVML answers, or ``None`` where this device, driver or user may not know."""
    try:
        return getattr(nvml, call)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None


def _facts(nvml: Any, index: int, uuid: str, handles: Sequence[Any]) -> DeviceInfo:
    handle = handles[index]
    memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    utilisation = _ask(nvml, "nvmlDeviceGetUtilizationRates", handle)
    links = (_link(nvml, handle, other, to) for to, other in enumerate(handles) if to != index)
    return DeviceInfo(
        device=f"cuda:{index}",
        index=index,
        name=_ask(nvml, "nvmlDeviceGetName", handle) or "NVIDIA GPU",
        memory_total_bytes=memory and int(memory.total),
        memory_used_bytes=memory and int(memory.used),
        utilisation_percent=utilisation and int(utilisation.gpu),
        processes=_processes(nvml, handle),
        links=tuple(link for link in links if link is not None),
        uuid=uuid,
        source="nvml",
    )


def _processes(nvml: Any, handle: Any) -> tuple[DeviceProcess, ...]:
    """Return who holds memory on the device, the largest first."""
    computing = _ask(nvml, "nvmlDeviceGetComputeRunningProcesses", handle) or []
    drawing = _ask(nvml, "nvmlDeviceGetGraphicsRunningProcesses", handle) or []
    if not computing and not drawing:
        return ()
    own = _own_pids()
    found = {entry.pid: _process(entry, own, graphics=True) for entry in drawing}
    found.update({entry.pid: _process(entry, own, graphics=False) for entry in computing})
    return tuple(sorted(found.values(), key=lambda process: (-(process.memory_bytes or 0), process.pid)))


def _own_pids() -> frozenset[int]:
    """Return this process and those it started, and they started."""
    import psutil

    this = psutil.Process()
    return frozenset({this.pid, *(child.pid for child in this.children(recursive=True))})


def _process(entry: Any, own: frozenset[int], graphics: bool) -> DeviceProcess:
    import psutil

    try:
        process = psutil.Process(entry.pid)
    except psutil.Error:  # ended meanwhile, or its number belongs to another container
        return DeviceProcess(entry.pid, None, None, entry.usedGpuMemory, graphics, own=False)
    user = _told(process.username)
    command = " ".join(_told(process.cmdline) or [_told(process.name) or ""])[:_COMMAND_LENGTH]
    return DeviceProcess(entry.pid, user, command or None, entry.usedGpuMemory, graphics, entry.pid in own)


def _told(ask: Callable[[], Any]) -> Any:
    """Return what the system tells of a process, or ``None`` where it does not."""
    import psutil

    try:
        return ask()
    except (psutil.Error, KeyError):  # KeyError: a user without a name
        return None


def _link(nvml: Any, handle: Any, other: Any, to: int) -> Link | None:
    """Return how two GPUs reach each other: over NVLink where there is one, else the way through PCIe."""
    if _ask(nvml, "nvmlDeviceGetP2PStatus", handle, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK:
        lanes = _nvlinks(nvml, handle, other)
        if lanes:
            return Link(to, f"NV{lanes}", f"{lanes} NVLink{'s' if lanes > 1 else ''}")
    level = _ask(nvml, "nvmlDeviceGetTopologyCommonAncestor", handle, other)
    if level is None:
        return None
    ways = {
        nvml.NVML_TOPOLOGY_INTERNAL: ("PIX", "two GPUs on one board"),
        nvml.NVML_TOPOLOGY_SINGLE: ("PIX", "PCIe, one switch between"),
        nvml.NVML_TOPOLOGY_MULTIPLE: ("PXB", "PCIe, several switches between"),
        nvml.NVML_TOPOLOGY_HOSTBRIDGE: ("PHB", "PCIe, through the CPU"),
        nvml.NVML_TOPOLOGY_NODE: ("NODE", "PCIe, through two host bridges of one CPU"),
        nvml.NVML_TOPOLOGY_SYSTEM: ("SYS", "PCIe, and the connection between two CPUs"),
    }
    kind, words = ways.get(level, ("PCI", "PCIe"))
    return Link(to, kind, words)


def _nvlinks(nvml: Any, handle: Any, other: Any) -> int:
    """Return how many active NVLinks lead from a GPU to another one, directly or through a switch that joins all."""
    place = _place(_ask(nvml, "nvmlDeviceGetPciInfo", other))
    return sum(_leads_to(nvml, handle, number, place) for number in range(nvml.NVML_NVLINK_MAX_LINKS))


def _leads_to(nvml: Any, handle: Any, number: int, place: tuple[int, int, int] | None) -> bool:
    if not _ask(nvml, "nvmlDeviceGetNvLinkState", handle, number):
        return False
    if _ask(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", handle, number) == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
        return True
    return place is not None and _place(_ask(nvml, "nvmlDeviceGetNvLinkRemotePciInfo", handle, number)) == place


def _place(pci: Any) -> tuple[int, int, int] | None:
    return None if pci is None else (pci.domain, pci.bus, pci.device)
