"""Devices: the grammar, the selection on machines of any kind, and GPU properties from a stand-in for NVML."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from duoka.devices import DeviceInfo, DeviceProcess, DeviceSelection, cuda_uuids, describe, nvml, resolve
from duoka.devices.inventory import Inventory, detect
from duoka.devices.selection import select
from duoka.devices.spec import parse
from duoka.errors import DeviceError

NONE = Inventory()
TWO = Inventory("cuda", 2)
EIGHT = Inventory("cuda", 8)
APPLE = Inventory("mps", 1)
GPU = 24 * 2**30


def on(seen: Inventory, spec: Any, facts: list[DeviceInfo] | None = None) -> DeviceSelection:
    """Resolve ``spec`` on a machine with these accelerators."""
    return select(parse(spec), seen, lambda: facts)


def names(choice: DeviceSelection) -> str:
    return " ".join(map(str, choice.devices))


def gpu(index: int, **facts: Any) -> DeviceInfo:
    return DeviceInfo(f"cuda:{index}", index, "GPU", GPU, source="nvml", **facts)


BUSY = DeviceProcess(4711, "ann", "python train.py", 9 * 2**30)


@pytest.mark.parametrize(
    ("seen", "spec", "chosen"),
    [
        (EIGHT, "0", "cuda:0"),
        (EIGHT, 0, "cuda:0"),
        (EIGHT, "0,1", "cuda:0 cuda:1"),
        (EIGHT, "3,1", "cuda:3 cuda:1"),
        (EIGHT, " 0 , 2-4 ", "cuda:0 cuda:2 cuda:3 cuda:4"),
        (EIGHT, "0-3", "cuda:0 cuda:1 cuda:2 cuda:3"),
        (EIGHT, "5-5", "cuda:5"),
        (EIGHT, "cuda:1", "cuda:1"),
        (EIGHT, "CUDA:1", "cuda:1"),
        (EIGHT, "gpu:7", "cuda:7"),
        (EIGHT, "rocm:7", "cuda:7"),
        (EIGHT, "cuda:0,cuda:3", "cuda:0 cuda:3"),
        (EIGHT, [0, "2-3", torch.device("cuda:5")], "cuda:0 cuda:2 cuda:3 cuda:5"),
        (EIGHT, torch.device("cuda", 6), "cuda:6"),
        (EIGHT, torch.tensor(6), "cuda:6"),
        (TWO, None, "cuda:0 cuda:1"),
        (TWO, "auto", "cuda:0 cuda:1"),
        (TWO, "all", "cuda:0 cuda:1"),
        (TWO, "cuda", "cuda:0 cuda:1"),
        (TWO, "gpu", "cuda:0 cuda:1"),
        (TWO, torch.device("cuda"), "cuda:0 cuda:1"),
        (TWO, "cpu", "cpu"),
        (TWO, "cpu:4", "cpu cpu cpu cpu"),
        (TWO, ["cpu:2", "cpu"], "cpu cpu cpu"),
        (TWO, torch.device("cpu", 0), "cpu"),
        (NONE, "auto", "cpu"),
        (NONE, "cpu:2", "cpu cpu"),
        (APPLE, "auto", "mps:0"),
        (APPLE, "gpu", "mps:0"),
        (APPLE, "mps", "mps:0"),
        (APPLE, "0", "mps:0"),
    ],
)
def test_every_form_of_the_grammar_selects_its_devices(seen: Inventory, spec: Any, chosen: str) -> None:
    assert names(on(seen, spec)) == chosen


@pytest.mark.parametrize("spec", ["auto", "cpu:3", "0,1", "1"])
def test_selected_devices_are_a_valid_specification(spec: str) -> None:
    first = on(TWO, spec)
    assert on(TWO, first.devices).devices == first.devices
    assert on(TWO, ",".join(map(str, first.devices))).devices == first.devices


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("0-", "did you mean '0'"),
        ("-3", "negative"),
        (-1, "negative"),
        ("cuda:-1", "negative"),
        ("3-0", "'0-3'"),
        ("cpu:0", "'cpu' for the CPU"),
        ("idle:0", "1 to 1024"),
        ("cpu:5000", "1 to 1024"),
        ("0-9999", "at most 1024"),
        ("99999999999999999999", "not valid"),
        ("gpu0", "did you mean '0'"),
        ("cuda 1", "did you mean '1'"),
        ("cpu4", "did you mean 'cpu:4'"),
        ("gpus", "did you mean 'gpu'"),
        ("idel", "did you mean 'idle'"),
        ("", "empty"),
        ("0,", "empty"),
        ("²", "not valid"),
        ("all,0", "different kinds"),
        ("0,cpu", "different kinds"),
        ("cuda:0,xpu:1", "cuda and xpu"),
        ([], "empty list"),
        ([[0]], "a list"),
        (True, "bool"),
        (1.0, "float"),
        ({}, "dict"),
    ],
)
def test_an_invalid_specification_is_an_error_with_a_suggestion(spec: Any, message: str) -> None:
    with pytest.raises(DeviceError, match="(?i)" + message.replace("(", r"\(")):
        parse(spec)


@pytest.mark.parametrize(
    ("seen", "spec", "parts"),
    [
        (TWO, "5", ["'5'", "cuda:5", "cuda:0 and cuda:1", "0 to 1"]),
        (TWO, "0,1,2", ["cuda:2;", "0 to 1"]),
        (TWO, "2-40", ["31 more"]),
        (NONE, 0, ["'0'", "no accelerator", "'cpu:2'"]),
        (NONE, "cuda:1", ["cuda:1", "no accelerator"]),
        (NONE, "idle:1", ["no accelerator"]),
        (TWO, "xpu:0", ["xpu:0", "cuda:0 and cuda:1"]),
        (APPLE, "cuda", ["'cuda'", "mps:0"]),
        (NONE, "cuda", ["'cuda' does not exist; this machine has no accelerator", "'cpu'", "'auto'"]),
        (NONE, "GPU", ["'GPU' does not exist; this machine has no accelerator"]),
        (NONE, torch.device("cuda"), ["'cuda' does not exist"]),
        (NONE, "mps", ["'mps' does not exist"]),
        (Inventory(note="torch 2.9+cpu is built for the CPU alone"), "cuda", ["(torch 2.9+cpu is built"]),
        (TWO, "idle:3", ["3", "cuda:0 and cuda:1"]),
        (replace(TWO, note="CUDA_VISIBLE_DEVICES='2,3' is set"), "3", ["CUDA_VISIBLE_DEVICES='2,3'"]),
    ],
)
def test_a_missing_device_is_an_error_that_lists_the_devices(seen: Inventory, spec: Any, parts: list[str]) -> None:
    with pytest.raises(DeviceError) as raised:
        on(seen, spec)
    assert [part for part in parts if part not in str(raised.value)] == []


@pytest.mark.parametrize("spec", ["all", "idle"])
def test_all_and_idle_select_the_cpu_with_a_warning_without_gpus(spec: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert names(on(NONE, spec)) == "cpu"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{spec} selects the CPU" in caplog.text


def test_auto_selects_the_cpu_with_a_reason_and_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert "torch 2.9+cpu" in on(Inventory(note="torch 2.9+cpu is built for the CPU alone"), "auto").reason
    assert not caplog.records


def test_a_repeated_index_is_two_ranks_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert names(on(TWO, "0,0")) == "cuda:0 cuda:0"
    assert "cuda:0 more than once" in caplog.text


def test_idle_selects_unused_devices_and_names_users_of_the_others() -> None:
    own = DeviceProcess(os.getpid(), "me", "python", 20 * 2**30, own=True)
    desktop = DeviceProcess(2, "root", "Xorg", 2**28, graphics=True)
    facts = [
        gpu(0, memory_used_bytes=9 * 2**30, processes=(BUSY,)),
        gpu(1, memory_used_bytes=20 * 2**30, utilization_percent=99, processes=(own,)),
        gpu(2, memory_used_bytes=2**28, utilization_percent=3, processes=(desktop,)),
        gpu(3, memory_used_bytes=12 * 2**30),
        gpu(4, memory_used_bytes=0, utilization_percent=80),
    ]
    choice = on(Inventory("cuda", 5), "idle", facts)
    assert names(choice) == "cuda:1 cuda:2"
    assert "cuda:0 is used by ann (process 4711)" in choice.reason
    assert "cuda:3 has 50% of its memory taken" in choice.reason
    assert "cuda:4 80 %" in choice.reason


def test_idle_with_all_devices_in_use_names_the_users() -> None:
    facts = [gpu(index, memory_used_bytes=9 * 2**30, processes=(BUSY,)) for index in range(2)]
    with pytest.raises(DeviceError, match=r"cuda:1 is used by ann .*idle:1"):
        on(TWO, "idle", facts)


def test_idle_n_selects_the_least_used_and_warns_if_shared(caplog: pytest.LogCaptureFixture) -> None:
    facts = [
        gpu(0, memory_used_bytes=9 * 2**30, utilization_percent=99, processes=(BUSY,)),
        gpu(1, memory_used_bytes=9 * 2**30, utilization_percent=20, processes=(BUSY,)),
        gpu(2, memory_used_bytes=0, utilization_percent=0),
    ]
    three = Inventory("cuda", 3)
    assert names(on(three, "idle:1", facts)) == "cuda:2"
    assert not caplog.records
    assert names(on(three, "idle:2", facts)) == "cuda:1 cuda:2"
    assert "cuda:1 is used by ann" in caplog.text


def test_idle_without_nvml_is_an_error_with_a_remedy() -> None:
    with pytest.raises(DeviceError, match="nvidia-ml-py"):
        on(TWO, "idle", None)


def test_resolve_agrees_with_torch() -> None:
    count = torch.accelerator.device_count()
    assert len(detect().names()) == count
    assert len(resolve("auto").devices) == max(1, count)
    with pytest.raises(DeviceError):
        resolve(count)


def test_import_resolve_and_describe_do_not_start_cuda() -> None:
    if torch.version.hip or torch.xpu.is_available():
        pytest.skip("the properties come from torch here")
    program = """
        import duoka.devices, torch
        for spec in ("auto", "all", "cpu:2"):
            duoka.devices.resolve(spec)
        duoka.devices.describe()
        assert not torch.cuda.is_initialized()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120, capture_output=True)


def test_hidden_accelerators_do_not_exist() -> None:
    program = "from duoka.devices import resolve; print(*resolve('auto').devices)"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, timeout=120, capture_output=True, text=True
    )
    assert ran.stdout.strip() == "cpu"


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


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_uuids_come_in_the_drivers_own_order(tmp_path: Path) -> None:
    source = """
        int cuInit(unsigned flags) { return flags; }
        int cuDeviceGetCount(int *count) { *count = 2; return 0; }
        int cuDeviceGet(int *device, int ordinal) { *device = 7 - ordinal; return 0; }
        int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
            for (int i = 0; i < 16; i++) uuid[i] = device;
            return 0;
        }
    """
    (tmp_path / "cuda.c").write_text(textwrap.dedent(source))
    library = [shutil.which("cc"), "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "cuda.c"]
    subprocess.run(library, check=True, timeout=60)
    ran = subprocess.run(
        [sys.executable, "-I", "-S", cuda_uuids.__file__],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ran.stdout.split() == ["07070707-0707-0707-0707-070707070707", "06060606-0606-0606-0606-060606060606"]


def test_the_real_nvml_does_not_know_an_invented_device() -> None:
    library = nvml.library()
    assert library is not None
    assert nvml.read(library, ["00000000-0000-0000-0000-000000000000"]) is None


@pytest.mark.skipif(torch.accelerator.device_count() > 0, reason="this machine has an accelerator")
def test_without_accelerators_the_cpu_is_described() -> None:
    (cpu,) = describe()
    assert (cpu.device, cpu.index) == ("cpu", None)
    assert cpu.name
    assert 0 < (cpu.memory_used_bytes or 0) < (cpu.memory_total_bytes or 0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.accelerator.device_count() == 0, reason="needs an accelerator")
def test_properties_of_real_devices_agree_with_torch() -> None:
    facts = describe()
    assert [fact.index for fact in facts] == list(range(torch.accelerator.device_count()))
    for fact in facts:
        properties = torch.get_device_module(detect().type).get_device_properties(fact.index)
        assert fact.name == properties.name
        assert fact.uuid in (None, str(properties.uuid))
