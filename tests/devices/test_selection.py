"""Selection of devices, on invented machines and on this one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from duoka.data_parallel.transport.process_group import select_backend
from duoka.devices import DeviceInfo, DeviceProcess, DeviceSelection, nccl, resolve
from duoka.devices.inventory import Inventory, detect
from duoka.devices.selection import select
from duoka.devices.spec import parse
from duoka.errors import DeviceError
from duoka.launcher.rank_context import backend_for

NONE = Inventory()


TWO = Inventory("cuda", 2)


EIGHT = Inventory("cuda", 8)


APPLE = Inventory("mps", 1)


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
    assert "several ranks share cuda:0, over gloo (NCCL" in caplog.text


@pytest.mark.parametrize(
    ("variable", "version", "shares"),
    [("1", (2, 30, 7), True), ("0", (2, 30, 7), False), ("1", (2, 28, 9), False), ("1", None, False)],
)
def test_ranks_share_a_gpu_over_nccl_where_it_accepts_that(variable, version, shares, monkeypatch) -> None:
    monkeypatch.setenv(nccl.VARIABLE, variable)
    monkeypatch.setattr(nccl, "loaded_version", lambda: version)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    selection = on(TWO, "0,0")
    assert ("over NCCL 2.30.7" in selection.reason) == shares
    assert ("over gloo" in selection.reason) != shares
    assert ("NCCL 2.28.9 refuses" in selection.reason) == (version == (2, 28, 9))
    assert select_backend(selection.devices) == ("nccl" if shares else "gloo")
    assert ("nccl" in backend_for(selection.devices)) == shares
    assert select_backend(on(TWO, "0,1").devices) == "nccl"


def test_the_version_of_nccl_is_that_of_the_loaded_library() -> None:
    """Needs no GPU: torch's CUDA wheels load NCCL, and the version in use is at least the one torch was built with."""
    if not torch.distributed.is_nccl_available():
        assert nccl.loaded_version() is None
    else:
        assert nccl.loaded_version() >= torch.cuda.nccl.version()


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
    assert "cuda:4 has 80 % utilization" in choice.reason


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
    assert len(detect().devices()) == count
    assert len(resolve("auto").devices) == max(1, count)
    with pytest.raises(DeviceError):
        resolve(count)


def test_hidden_accelerators_do_not_exist() -> None:
    program = "from duoka.devices import resolve; print(*resolve('auto').devices)"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "cpu"


GPU = 24 * 2**30
