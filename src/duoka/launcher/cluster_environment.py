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

from duoka.devices import resolve
from duoka.devices import spec as device_grammar
from duoka.errors import LaunchError
from duoka.log import logger
from duoka.world import World

__all__ = ["is_member", "join"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_member(spec: Any = None) -> bool:
    """Whether this process belongs to a job of several ranks, or to one that torchrun or Slurm started.

    A job of one process whose ``spec`` names several devices is none: this process starts helpers for them.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        return True
    if all(name in os.environ for name in _TORCHRUN):
        return os.environ["WORLD_SIZE"] != "1" or _named(spec) < 2
    return _slurm_tasks() > 1


def _named(spec: Any) -> int:
    """How many devices ``spec`` names; 0 where it leaves that to what is there."""
    request = device_grammar.parse(spec)
    return len(request.indices) if request.kind == "index" else request.count or 0


def join(spec: Any, timeout_s: float) -> World:
    """Take this process's place in the job; the group stays until the process ends, as torchrun's programs expect."""
    if not dist.is_initialized() and "RANK" not in os.environ:
        os.environ.update(_slurm_variables())
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = _device(spec, local_rank, local_size)
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


def _device(spec: Any, local_rank: int, local_size: int) -> torch.device:
    """Return what this process computes on: of several devices that are named, the one of its number on its machine."""
    request, named = device_grammar.parse(spec), _named(spec)
    one_for_all = request.kind == "cpu" and named == 1
    if named and named != local_size and not one_for_all:
        raise LaunchError(
            f"device {request.text!r} names {named} device(s), and the job has {local_size} process(es) on this machine, one "
            f"a device: start as many (torchrun --nproc-per-node {named}), or write 'auto', by which each takes the device of "
            "its number"
        )
    if request.kind == "idle" and local_size > 1:
        raise LaunchError(
            f"device {request.text!r} in a job of {local_size} processes on this machine: each would look at another time and "
            "find others idle; name the devices ('0,1'), or set CUDA_VISIBLE_DEVICES for the whole job"
        )
    chosen = resolve(spec).devices
    if one_for_all or chosen[0].type == "cpu":
        return chosen[0]
    if local_rank >= len(chosen):
        raise LaunchError(
            f"this process is number {local_rank} on its machine, which has {len(chosen)} accelerator(s); "
            f"start at most {len(chosen)} processes on it (torchrun --nproc-per-node {len(chosen)})"
        )
    return chosen[local_rank]


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
