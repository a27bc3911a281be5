"""Cluster jobs of torchrun, Slurm or Kubernetes, of which this process is one rank."""

import atexit
import datetime
import os
import re
import subprocess

import torch
import torch.distributed as dist

from duoka.devices.selection import resolve
from duoka.devices.spec import DeviceSpec, parse
from duoka.errors import LaunchError
from duoka.launcher.rank_context import backend_for
from duoka.launcher.torchrun_environment import is_started_by_torchrun
from duoka.log import logger
from duoka.utils.text import plural
from duoka.world import World


def is_in_cluster_job(spec: DeviceSpec = None) -> bool:
    """Return whether this process is a rank of several, or torchrun or Slurm started it.

    A job of one process does not count if ``spec`` names several devices: this process then starts workers for them.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        return True
    if is_started_by_torchrun():
        return os.environ["WORLD_SIZE"] != "1" or _num_devices_named(spec) < 2
    # Slurm's number counts the tasks that srun started together; a batch script without srun is one task
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _num_devices_named(spec: DeviceSpec) -> int:
    """Return the number of devices that ``spec`` names; 0 if it depends on the machine."""
    request = parse(spec)
    return len(request.indices) if request.kind == "index" else request.count or 0


def join_process_group(spec: DeviceSpec, timeout_s: float) -> World:
    """Join the job's process group, which exists until the process ends, as torchrun's programs expect."""
    if not dist.is_initialized() and "RANK" not in os.environ:
        os.environ.update(_slurm_variables())
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = _device(spec, local_rank, local_size)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    if not dist.is_initialized():
        logger.info("joining a job as rank %s of %s", os.environ.get("RANK"), os.environ.get("WORLD_SIZE"))
        dist.init_process_group(backend_for([device]), timeout=datetime.timedelta(seconds=timeout_s))
        atexit.register(_leave_process_group)
    return World(dist.get_rank(), dist.get_world_size(), device, local_rank, local_size)


def _leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(spec: DeviceSpec, local_rank: int, local_size: int) -> torch.device:
    """Return this process's device: among several that ``spec`` names, the one at position ``local_rank``."""
    request, named = parse(spec), _num_devices_named(spec)
    one_for_all = request.kind == "cpu" and named == 1
    if named and named != local_size and not one_for_all:
        raise LaunchError(
            f"device {request.text!r} names {plural(named, 'device')}, but the job has "
            f"{plural(local_size, 'process', 'processes')} on this machine. Start one process per device "
            f"(torchrun --nproc-per-node {named}), or write 'auto': each process then uses the device of its local rank"
        )
    if request.kind == "idle" and local_size > 1:
        raise LaunchError(
            f"device {request.text!r} is ambiguous in a job of {local_size} processes on this machine, because each could find "
            "other devices idle. Name the devices ('0,1'), or set CUDA_VISIBLE_DEVICES for the whole job"
        )
    chosen = resolve(spec).devices
    if one_for_all or chosen[0].type == "cpu":
        return chosen[0]
    if local_rank < len(chosen):
        return chosen[local_rank]
    raise LaunchError(
        f"this process has local rank {local_rank}, but its machine has {plural(len(chosen), 'accelerator')}. "
        f"Start at most {len(chosen)} processes on it (torchrun --nproc-per-node {len(chosen)})"
    )


def _slurm_variables() -> dict[str, str]:
    """Return Slurm's variables under torchrun's names; the first node of the list is the rendezvous host."""
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
    """Return this node's entry of ``SLURM_STEP_TASKS_PER_NODE``, such as ``4(x2),3``."""
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
            f"scontrol cannot list the hosts of SLURM_JOB_NODELIST={nodes!r} ({error}). Set MASTER_ADDR to the first host"
        ) from error
    return shown.stdout.split()[0]
