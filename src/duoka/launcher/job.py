"""A larger job that something else started: torchrun, Slurm, Kubernetes; this process is one of its ranks."""

from __future__ import annotations

import atexit
import datetime
import os
import re
import subprocess
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # first imported while a group is up it would keep that group for good

from duoka.devices import grammar as device_grammar
from duoka.errors import LaunchError
from duoka.log import logger
from duoka.world import World

__all__ = ["is_member", "join"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_member() -> bool:
    """Whether this process belongs to a job of several ranks, or to one that torchrun or Slurm started."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        return True
    return all(name in os.environ for name in _TORCHRUN) or _slurm_tasks() > 1


def join(spec: Any, timeout_s: float) -> World:
    """Take this process's place in the job; the group stays until the process ends, as torchrun's programs expect."""
    if not dist.is_initialized() and "RANK" not in os.environ:
        os.environ.update(_slurm_variables())
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = _device(spec, local_rank)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    if not dist.is_initialized():
        logger.info("joining a job as rank %s of %s", os.environ.get("RANK"), os.environ.get("WORLD_SIZE"))
        dist.init_process_group(
            "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{_accelerator_backend(device)}",
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        atexit.register(_leave)
    return World(dist.get_rank(), dist.get_world_size(), device, local_rank, local_size)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _accelerator_backend(device: torch.device) -> str:
    return dist.get_default_backend_for_device(device.type)


def _device(spec: Any, local_rank: int) -> torch.device:
    """The accelerator of this process's number on its machine, unless the CPU was asked for or is all there is."""
    if device_grammar.parse(spec).kind == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise LaunchError(
            f"this process is number {local_rank} on its machine, which has {count} accelerator(s); "
            f"start at most {count} processes on it (torchrun --nproc-per-node {count})"
        )
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, local_rank)


def _slurm_tasks() -> int:
    """How many tasks ``srun`` started with this one; a batch script itself, and what it starts without srun, is alone."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) if "SLURM_PROCID" in os.environ else 1


def _slurm_variables() -> dict[str, str]:
    """Slurm's variables under torchrun's names; the first node of the list is where the ranks meet."""
    get = os.environ.get
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(_slurm_tasks_here()),
        "MASTER_ADDR": get("MASTER_ADDR") or _first_slurm_host(),
        "MASTER_PORT": get("MASTER_PORT") or str(20000 + int(get("SLURM_JOB_ID", "0")) % 20000),
    }


def _slurm_tasks_here() -> int:
    """Read this node's entry of ``SLURM_STEP_TASKS_PER_NODE``, which reads like ``4(x2),3``."""
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")):
        counts += [int(count)] * int(repeat or 1)
    return counts[min(int(os.environ.get("SLURM_NODEID", 0)), len(counts) - 1)]


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_JOB_NODELIST", "localhost")
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LaunchError(
            f"the first host of SLURM_JOB_NODELIST={nodes!r} could not be found ({error}); set MASTER_ADDR to it"
        ) from error
    return shown.stdout.split()[0]
