"""``launch`` on real accelerators: NCCL at one rank, two ranks on one GPU over gloo, everything given back."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import duoka

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.leaks_allowed,  # CUDA keeps threads and descriptors for the life of the process
]


def facts(tensor: torch.Tensor) -> tuple[str, str, float, str]:
    world = duoka.current_world()
    total = torch.full((2,), world.rank + 1.0, device=world.device)
    dist.all_reduce(total)
    on_cpu = world.all_reduce(torch.ones(1))
    return str(world.device), str(tensor.device), total[0].item() + on_cpu.item(), dist.get_backend_config()


def test_one_gpu_runs_over_nccl_and_its_tensors_arrive_on_it() -> None:
    device, arrived, total, backends = duoka.launch(facts, torch.ones(3, device="cuda:0"), devices="0")
    assert (device, arrived, total) == ("cuda:0", "cuda:0", 2.0)
    assert "nccl" in backends


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_on_one_gpu_meet_over_gloo() -> None:
    values = duoka.launch(facts, torch.ones(3, device="cuda:0"), devices="0,0", returns="all")
    assert [value[:3] for value in values] == [("cuda:0", "cuda:0", 5.0)] * 2
    assert "nccl" not in values[0][3]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("devices", ["0", "0,0"])
def test_a_failure_leaves_the_gpu_usable_and_the_generator_as_it_was(devices: str) -> None:
    before = torch.cuda.get_rng_state()

    def fail() -> None:
        torch.rand(3, device="cuda")
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        duoka.launch(fail, devices=devices)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert not dist.is_initialized()
    assert nn.Linear(2, 2).cuda()(torch.ones(1, 2, device="cuda")).shape == (1, 2)
