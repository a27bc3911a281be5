"""Accelerators and their properties on this machine, and CUDA's order of UUIDs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from duoka.devices import cuda_uuids, describe
from duoka.devices.inventory import detect


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
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, capture_output=True)


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
    subprocess.run(library, check=True)
    ran = subprocess.run(
        [sys.executable, "-I", "-S", cuda_uuids.__file__],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == ["07070707-0707-0707-0707-070707070707", "06060606-0606-0606-0606-060606060606"]


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
