"""GPU properties from NVIDIA's management library that torch lacks: memory use, utilization, processes, links.

``nvml`` is the ``pynvml`` module, passed as an argument so that tests can replace it.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from duoka.devices.info import DeviceInfo, DeviceProcess, Link
from duoka.utils.text import plural

_COMMAND_LENGTH = 200


def read(nvml: Any, uuids: Sequence[str]) -> list[DeviceInfo] | None:
    """Return the properties of the GPUs with these UUIDs, in this order, or ``None`` if NVML does not work.

    ``uuids`` are in CUDA's order, without the prefix ``GPU-`` or ``MIG-``.
    """
    with contextlib.suppress(nvml.NVMLError), contextlib.ExitStack() as session:
        nvml.nvmlInit()
        session.callback(nvml.nvmlShutdown)
        handles = [_handle(nvml, uuid) for uuid in uuids]
        return [_device_info(nvml, index, uuids[index], handles) for index in range(len(handles))]
    return None


def _handle(nvml: Any, uuid: str) -> Any:
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _query(nvml: Any, call: str, *arguments: Any) -> Any:
    """Return NVML's answer, or ``None`` if the device, the driver or the user's rights do not allow it."""
    try:
        return getattr(nvml, call)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None


def _device_info(nvml: Any, index: int, uuid: str, handles: Sequence[Any]) -> DeviceInfo:
    handle = handles[index]
    memory = _query(nvml, "nvmlDeviceGetMemoryInfo", handle)
    utilization = _query(nvml, "nvmlDeviceGetUtilizationRates", handle)
    links = (_link(nvml, handle, other, to) for to, other in enumerate(handles) if to != index)
    return DeviceInfo(
        device=f"cuda:{index}",
        index=index,
        name=_query(nvml, "nvmlDeviceGetName", handle) or "NVIDIA GPU",
        memory_total_bytes=memory and int(memory.total),
        memory_used_bytes=memory and int(memory.used),
        utilization_percent=utilization and int(utilization.gpu),
        processes=_processes(nvml, handle),
        links=tuple(link for link in links if link is not None),
        uuid=uuid,
        source="nvml",
    )


def _processes(nvml: Any, handle: Any) -> tuple[DeviceProcess, ...]:
    """Return the processes that hold memory on the device, the largest first."""
    computing = _query(nvml, "nvmlDeviceGetComputeRunningProcesses", handle) or []
    drawing = _query(nvml, "nvmlDeviceGetGraphicsRunningProcesses", handle) or []
    if not computing and not drawing:
        return ()
    import psutil

    this = psutil.Process()
    own = {this.pid, *(child.pid for child in this.children(recursive=True))}
    found = {entry.pid: _process(entry, own, graphics=True) for entry in drawing}
    found.update({entry.pid: _process(entry, own, graphics=False) for entry in computing})
    return tuple(sorted(found.values(), key=lambda process: (-(process.memory_bytes or 0), process.pid)))


def _process(entry: Any, own: set[int], graphics: bool) -> DeviceProcess:
    import psutil

    try:
        known = psutil.Process(entry.pid).as_dict(["username", "cmdline", "name"])
    except psutil.Error:  # ended meanwhile, or its number belongs to another container
        return DeviceProcess(entry.pid, None, None, entry.usedGpuMemory, graphics, own=False)
    command = " ".join(known["cmdline"] or [known["name"] or ""])[:_COMMAND_LENGTH] or None
    return DeviceProcess(entry.pid, known["username"], command, entry.usedGpuMemory, graphics, entry.pid in own)


def _link(nvml: Any, handle: Any, other: Any, to: int) -> Link | None:
    """Return the connection of two GPUs: NVLink if there is one, else the path through PCIe."""
    status = _query(nvml, "nvmlDeviceGetP2PStatus", handle, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    address = _pci_address(_query(nvml, "nvmlDeviceGetPciInfo", other))
    links = range(nvml.NVML_NVLINK_MAX_LINKS) if status == nvml.NVML_P2P_STATUS_OK else []
    if lanes := sum(_leads_to(nvml, handle, number, address) for number in links):
        return Link(to, f"NV{lanes}", plural(lanes, "NVLink"))
    level = _query(nvml, "nvmlDeviceGetTopologyCommonAncestor", handle, other)
    if level is None:
        return None
    paths = {
        nvml.NVML_TOPOLOGY_INTERNAL: ("PIX", "two GPUs on one board"),
        nvml.NVML_TOPOLOGY_SINGLE: ("PIX", "PCIe, one switch between"),
        nvml.NVML_TOPOLOGY_MULTIPLE: ("PXB", "PCIe, several switches between"),
        nvml.NVML_TOPOLOGY_HOSTBRIDGE: ("PHB", "PCIe, through the CPU"),
        nvml.NVML_TOPOLOGY_NODE: ("NODE", "PCIe, through two host bridges of one CPU"),
        nvml.NVML_TOPOLOGY_SYSTEM: ("SYS", "PCIe, and the connection between two CPUs"),
    }
    kind, description = paths.get(level, ("PCI", "PCIe"))
    return Link(to, kind, description)


def _leads_to(nvml: Any, handle: Any, number: int, address: tuple[int, int, int] | None) -> bool:
    """Return whether an NVLink is active and leads to the GPU at ``address``, direct or through a switch."""
    if not _query(nvml, "nvmlDeviceGetNvLinkState", handle, number):
        return False
    if _query(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", handle, number) == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
        return True
    remote = _pci_address(_query(nvml, "nvmlDeviceGetNvLinkRemotePciInfo", handle, number))
    return address is not None and remote == address


def _pci_address(pci: Any) -> tuple[int, int, int] | None:
    return None if pci is None else (pci.domain, pci.bus, pci.device)
