"""``launch`` on accelerators: their backend with one and two ranks, one GPU named twice, state restored."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn

import duoka
from duoka import errors
from duoka.devices import nccl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine"),
    pytest.mark.leaks_allowed,  # CUDA keeps threads and descriptors until the process ends
    pytest.mark.filterwarnings("ignore"),
]
DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
FIRST = torch.device(DEVICE.type, 0)
BACKEND = dist.get_default_backend_for_device(DEVICE.type)
ON_TWO = pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="fewer than two devices")
SHARED = pytest.mark.skipif(DEVICE.type != "cuda", reason="gloo supports no accelerator but CUDA")


def rank_summary(tensor: torch.Tensor) -> tuple[str, str, float, str]:
    world = duoka.current_world()
    total = torch.full((2,), world.rank + 1.0, device=world.device)
    dist.all_reduce(total)
    on_cpu = world.all_reduce(torch.ones(1))
    return str(world.device), str(tensor.device), total[0].item() + on_cpu.item(), dist.get_backend_config()


def test_one_device_uses_its_backend_and_gets_its_tensors() -> None:
    device, arrived, total, backends = duoka.launch(rank_summary, torch.ones(3, device=FIRST), devices="0")
    assert (device, arrived, total) == (str(FIRST), str(FIRST), 2.0)
    assert BACKEND in backends


@ON_TWO
def test_two_devices_use_their_backend_and_get_their_tensors() -> None:
    values = duoka.launch(rank_summary, torch.ones(3, device=FIRST), devices="0,1", returns="all")
    names = [f"{DEVICE.type}:{index}" for index in range(2)]
    assert [value[:3] for value in values] == [(name, name, 5.0) for name in names]
    assert BACKEND in values[0][3]


@SHARED
def test_two_ranks_on_one_gpu_use_nccl_or_gloo() -> None:
    values = duoka.launch(rank_summary, torch.ones(3, device=FIRST), devices="0,0", returns="all")
    assert [value[:3] for value in values] == [("cuda:0", "cuda:0", 5.0)] * 2
    assert ("nccl" in values[0][3]) == nccl.ranks_may_share_a_gpu()


@pytest.mark.parametrize("devices", ["0", pytest.param("0,0", marks=SHARED), pytest.param("0,1", marks=ON_TWO)])
def test_a_failure_keeps_the_device_usable_and_the_generator_state(devices: str) -> None:
    before = torch.get_device_module(DEVICE).get_rng_state()

    def fail() -> None:
        torch.rand(3, device=DEVICE)
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        duoka.launch(fail, devices=devices)
    assert torch.equal(torch.get_device_module(DEVICE).get_rng_state(), before)
    assert not dist.is_initialized()
    assert nn.Linear(2, 2).to(DEVICE)(torch.ones(1, 2, device=DEVICE)).shape == (1, 2)


@pytest.mark.parametrize("devices", [pytest.param("0,0", marks=SHARED), pytest.param("0,1", marks=ON_TWO)])
def test_a_rank_that_dies_is_reported_and_the_next_launch_works(devices: str) -> None:
    def total(end: bool) -> float:
        world = duoka.current_world()
        first = world.all_reduce(torch.ones(4, device=world.device))
        if end and world.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return float(world.all_reduce(first)[0])

    assert duoka.launch(total, False, devices=devices) == 4
    with pytest.raises(errors.WorkerDied):
        duoka.launch(total, True, devices=devices)
    assert duoka.launch(total, False, devices=devices) == 4
