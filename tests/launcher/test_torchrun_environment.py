"""A launched function sees torchrun's variables, so that code written for torchrun works in it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import duoka
from duoka.launcher.torchrun_environment import is_started_by_torchrun

pytestmark = pytest.mark.usefixtures("pickle_by_value")

NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
)  # fmt: skip


def variables() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in NAMES}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_sees_torchruns_variables_and_the_caller_its_own_again(size: int) -> None:
    before = dict(os.environ)
    ranks = duoka.launch(variables, devices=f"cpu:{size}", returns="all")
    assert dict(os.environ) == before
    assert [(seen["RANK"], seen["LOCAL_RANK"], seen["ROLE_RANK"]) for seen in ranks] == [
        (str(r),) * 3 for r in range(size)
    ]
    assert {seen["WORLD_SIZE"] for seen in ranks} == {str(size)}
    assert len({seen["MASTER_PORT"] for seen in ranks}) == 1
    assert all(None not in seen.values() for seen in ranks)


def meet_again() -> tuple[float, float]:
    dist.destroy_process_group()
    dist.init_process_group("gloo")  # env://
    total = torch.ones(1)
    dist.all_reduce(total)
    half = dist.new_group(backend="gloo")
    dist.all_reduce(total, group=half)
    return total.item(), dist.get_rank()


def test_a_function_may_create_its_own_group_through_the_environment() -> None:
    for _ in range(2):
        assert duoka.launch(meet_again, devices="cpu:2", returns="all") == [(4, 0), (4, 1)]
    assert duoka.launch(dist.get_rank, devices="cpu:2", returns="all") == [0, 1]


RPC_SCRIPT = """
import torch, torch.distributed as dist, duoka
from torch.distributed import rpc

def call_the_other():
    rank = dist.get_rank()
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2)
    sums = rpc.rpc_sync(f"worker{1 - rank}", torch.add, args=(torch.ones(2), rank))
    rpc.shutdown()
    return sums.tolist()

print(duoka.launch(call_the_other, devices="cpu:2", returns="all"))
"""


def test_remote_procedure_calls_work() -> None:
    done = subprocess.run([sys.executable, "-c", RPC_SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == "[[1.0, 1.0], [2.0, 2.0]]\n"


CHILD = "import duoka; print(duoka.launch(lambda: duoka.current_world().size, devices='cpu'))"


def run_child() -> str | None:
    if dist.get_rank():
        return None
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=100, check=True)
    return done.stdout


def test_a_child_of_a_launched_function_is_no_rank_of_a_job() -> None:
    assert duoka.launch(run_child, devices="cpu:2") == "1\n"


def test_torchrun_inside_a_launched_function_is_recognized() -> None:
    def look() -> list[bool]:
        is_outer = is_started_by_torchrun()
        os.environ["MASTER_PORT"] = "1"
        return [is_outer, is_started_by_torchrun()]

    assert not is_started_by_torchrun()
    assert duoka.launch(look, devices="cpu") == [False, True]
