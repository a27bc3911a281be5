"""GPU properties from NVML, with a stand-in for hardware that the test machine lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from duoka.devices import DeviceInfo, nvml

GPU = 24 * 2**30


class FakeNvmlError(Exception):
    """The stand-in's ``NVMLError``."""


@dataclass
class FakeGpu:
    """One GPU of the stand-in; its PCI address is the bus number."""

    uuid: str
    name: str
    bus: int
    used: int = 0
    utilization: int | None = None
    compute: tuple[tuple[int, int | None], ...] = ()
    graphics: tuple[tuple[int, int | None], ...] = ()
    nvlinks: tuple[int, ...] = ()  # bus at the other end of each; -1 is a switch
    level: int = 50


class FakeNvml:
    """Replaces the ``pynvml`` module, for hardware that the test machine lacks."""

    NVMLError = FakeNvmlError
    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK = 2, 0
    NVML_NVLINK_MAX_LINKS, NVML_NVLINK_DEVICE_TYPE_SWITCH = 18, 2
    NVML_TOPOLOGY_INTERNAL, NVML_TOPOLOGY_SINGLE, NVML_TOPOLOGY_MULTIPLE = 0, 10, 20
    NVML_TOPOLOGY_HOSTBRIDGE, NVML_TOPOLOGY_NODE, NVML_TOPOLOGY_SYSTEM = 30, 40, 50

    def __init__(self, *gpus: FakeGpu, broken: bool = False) -> None:
        self.gpus = {gpu.uuid: gpu for gpu in gpus}
        self.broken = broken
        self.sessions = 0

    def nvmlInit(self) -> None:
        if self.broken:
            raise FakeNvmlError("driver not loaded")
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        if uuid not in self.gpus:
            raise FakeNvmlError("not found")
        return self.gpus[uuid]

    def nvmlDeviceGetName(self, handle: FakeGpu) -> str:
        return handle.name

    def nvmlDeviceGetMemoryInfo(self, handle: FakeGpu) -> Any:
        return SimpleNamespace(total=GPU, used=handle.used)

    def nvmlDeviceGetUtilizationRates(self, handle: FakeGpu) -> Any:
        if handle.utilization is None:
            raise FakeNvmlError("not supported")
        return SimpleNamespace(gpu=handle.utilization)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: FakeGpu) -> Any:
        return [SimpleNamespace(pid=pid, usedGpuMemory=memory) for pid, memory in handle.compute]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: FakeGpu) -> Any:
        return [SimpleNamespace(pid=pid, usedGpuMemory=memory) for pid, memory in handle.graphics]

    def nvmlDeviceGetP2PStatus(self, handle: FakeGpu, other: FakeGpu, _: int) -> int:
        return 0 if {-1, other.bus} & set(handle.nvlinks) else 5

    def nvmlDeviceGetNvLinkState(self, handle: FakeGpu, number: int) -> int:
        if number >= len(handle.nvlinks):
            raise FakeNvmlError("no such link")
        return 1

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: FakeGpu, number: int) -> int:
        return 2 if handle.nvlinks[number] == -1 else 0

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: FakeGpu, number: int) -> Any:
        return SimpleNamespace(domain=0, bus=handle.nvlinks[number], device=0)

    def nvmlDeviceGetPciInfo(self, handle: FakeGpu) -> Any:
        return SimpleNamespace(domain=0, bus=handle.bus, device=0)

    def nvmlDeviceGetTopologyCommonAncestor(self, handle: FakeGpu, _: FakeGpu) -> int:
        return handle.level


def facts_of(library: FakeNvml, *uuids: str) -> list[DeviceInfo]:
    facts = nvml.read(library, uuids)
    assert facts is not None
    assert library.sessions == 0
    return facts


def test_properties_follow_cudas_order_and_not_nvmls() -> None:
    library = FakeNvml(
        FakeGpu("GPU-aa", "old", 1, used=5, utilization=7),
        FakeGpu("GPU-bb", "new", 2, used=6, utilization=0),
        FakeGpu("MIG-cc", "slice", 3),
    )
    facts = facts_of(library, "bb", "cc", "aa")
    assert [(fact.device, fact.name, fact.memory_used_bytes) for fact in facts] == [
        ("cuda:0", "new", 6),
        ("cuda:1", "slice", 0),
        ("cuda:2", "old", 5),
    ]
    assert [fact.utilization_percent for fact in facts] == [0, None, 7]
    assert {fact.memory_total_bytes for fact in facts} == {GPU}


def test_own_processes_are_separate_from_those_of_others() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        compute = ((os.getpid(), 100), (child.pid, 50), (1, 70), (2**22 + 5, None))
        library = FakeNvml(FakeGpu("GPU-aa", "gpu", 1, compute=compute, graphics=((1, 70), (os.getppid(), 3))))
        processes = facts_of(library, "aa")[0].processes
    finally:
        child.communicate()
    assert [process.memory_bytes for process in processes] == [100, 70, 50, 3, None]
    assert [process.own for process in processes] == [True, False, True, False, False]
    assert [process.graphics for process in processes] == [False, False, False, True, False]
    assert processes[2].command is not None
    assert "input()" in processes[2].command
    assert (processes[4].user, processes[4].command) == (None, None)
    assert [process.pid for process in facts_of(library, "aa")[0].users] == [1, child.pid, 2**22 + 5]


@pytest.mark.parametrize(
    ("nvlinks", "level", "kind"),
    [
        ((2, 2, 9, 2), 50, "NV3"),
        ((-1,) * 18, 50, "NV18"),
        ((9,), 10, "PIX"),
        ((), 20, "PXB"),
        ((), 30, "PHB"),
        ((), 40, "NODE"),
        ((), 50, "SYS"),
    ],
)
def test_a_link_is_nvlink_if_there_is_one_and_else_pcie(nvlinks: tuple[int, ...], level: int, kind: str) -> None:
    library = FakeNvml(FakeGpu("GPU-aa", "gpu", 1, nvlinks=nvlinks, level=level), FakeGpu("GPU-bb", "gpu", 2))
    (link,) = facts_of(library, "aa", "bb")[0].links
    assert (link.to, link.kind) == (1, kind)


def test_a_broken_nvml_or_an_unknown_device_gives_no_properties() -> None:
    assert nvml.read(FakeNvml(broken=True), ["aa"]) is None
    library = FakeNvml(FakeGpu("GPU-aa", "gpu", 1))
    assert nvml.read(library, ["bb"]) is None
    assert library.sessions == 0


def test_the_real_nvml_does_not_know_an_invented_device() -> None:
    assert nvml.read(pynvml, ["00000000-0000-0000-0000-000000000000"]) is None
