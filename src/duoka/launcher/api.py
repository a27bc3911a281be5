"""``launch``: one function on every device of this machine, or on this process's rank of a cluster job."""

import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, overload

import torch.distributed as dist

from duoka.devices.selection import resolve
from duoka.devices.spec import DeviceSpec, reconcile
from duoka.errors import ConfigError, LaunchError
from duoka.launcher import cluster_environment, rank_context
from duoka.utils.validation import check_choice, invalid_option
from duoka.workers import run_on_all
from duoka.workers.exceptions import call_user_code, strip_internal_frames
from duoka.world import has_current_world, use_world

T = TypeVar("T")
_launch_lock = threading.Lock()
"""One launch at a time: a process has one default process group, one environment and one rank."""


@overload
def launch(
    fn: Callable[..., T],
    *args: Any,
    devices: DeviceSpec = ...,
    device: DeviceSpec = ...,
    returns: Literal["first"] = ...,
    output: str = ...,
    timeout_s: float = ...,
) -> T: ...
@overload
def launch(
    fn: Callable[..., T],
    *args: Any,
    devices: DeviceSpec = ...,
    device: DeviceSpec = ...,
    returns: Literal["all"],
    output: str = ...,
    timeout_s: float = ...,
) -> list[T]: ...
def launch(
    fn: Callable[..., Any],
    *args: Any,
    devices: DeviceSpec = None,
    device: DeviceSpec = None,
    returns: Literal["first", "all"] = "first",
    output: str = "quiet",
    timeout_s: float = 1800.0,
    **unknown: Any,
) -> Any:
    """Run ``fn(*args)`` on every device at once and return rank 0's value.

    The calling process is rank 0: it runs ``fn`` itself, on the same objects that it passed. Every further device has a
    worker process, which gets copies. Inside ``fn``, ``torch.distributed`` is initialized, ``duoka.current_world()``
    returns rank, size and device, and the environment has torchrun's variables (``RANK``, ``MASTER_ADDR``, ...).
    ``duoka.data.shard(loader)`` gives each rank its part of every batch. Afterwards the calling process has its earlier
    process group, environment, current device, random generators, thread count and signal handlers. Workers stay warm
    for the next launch.

    A process that torchrun or Slurm started, or whose process group has several ranks, starts no workers. It runs
    ``fn`` as its own rank of that job, and ``devices`` selects accelerators or the CPU.

    Args:
        fn: any callable: of a module, a notebook cell or the REPL; a worker need not be able to import it.
        args: arguments of ``fn``; workers get copies, with accelerator tensors on the worker's own device.
        devices: the device grammar: ``"all"`` (the default), ``"auto"``, ``"0,1"``, ``"cpu:2"``, a ``torch.device``, or a
            list of these.
        device: another spelling of ``devices``.
        returns: ``"first"`` for rank 0's value, ``"all"`` for the list of every rank's value.
        output: ``"quiet"`` shows the workers' output in error reports only; ``"all"`` prints each line with a label.
        timeout_s: seconds after which a gloo collective fails if a rank does not join it; NCCL has no timeout here.

    Raises:
        the exception of ``fn`` on any rank, as its own type, with the remote traceback as its cause; WorkerDied when a
        worker ends without an exception; LaunchError when ``args`` cannot be sent to another process, or when a launched
        function calls ``launch``; DeviceError for devices that do not exist. In a thread other than the main one, a
        worker's exception is raised when rank 0 next runs Python code: it does not interrupt a long sleep.

    Example:
        >>> import duoka
        >>> duoka.launch(lambda: duoka.current_world().rank, devices="cpu:2", returns="all")
        [0, 1]

    """
    _check_arguments(fn, returns, output, unknown)
    spec = reconcile(device, devices, default="all")
    if has_current_world() or not _launch_lock.acquire(blocking=False):
        raise LaunchError(
            "a launch already runs in this process (a launched function or another thread has called launch). "
            "Call launch once, with all the devices it should use"
        )
    try:
        if cluster_environment.is_in_cluster_job(spec):
            return _run_in_cluster_job(fn, args, spec, returns, timeout_s)
        return _run_on_this_machine(fn, args, spec, returns, output, timeout_s)
    except BaseException as error:
        raise error.with_traceback(strip_internal_frames(error.__traceback__))  # noqa: B904 - it is the same error
    finally:
        _launch_lock.release()


def _check_arguments(fn: object, returns: str, output: str, unknown: Mapping[str, Any]) -> None:
    for name in unknown:
        raise ConfigError(f"launch has no option {name!r}; pass arguments of the function by position: launch(fn, 3)")
    check_choice("returns", returns, ("first", "all"))
    check_choice("output", output, ("quiet", "all"))
    if not callable(fn):
        raise invalid_option("fn", fn, "a function", "pass the function itself: launch(train, ...)")


def _run_on_this_machine(
    fn: Callable[..., Any], args: tuple[Any, ...], spec: DeviceSpec, returns: str, output: str, timeout_s: float
) -> Any:
    devices = resolve(spec).devices
    if dist.is_initialized():
        raise LaunchError(
            "this process already has a process group with one rank, and launch has to create its own. "
            "Call torch.distributed.destroy_process_group() first"
        )
    with rank_context.preserve_process_state(devices[0]):
        values = run_on_all(
            rank_context.run_rank,
            rank_context.rank_contexts(devices, timeout_s),
            (fn, args, returns == "all"),
            devices,
            unblock=lambda: rank_context.abort_collectives(devices[0]),
            show_output=output == "all",
        )
    return values if returns == "all" else values[0]


def _run_in_cluster_job(
    fn: Callable[..., Any], args: tuple[Any, ...], spec: DeviceSpec, returns: str, timeout_s: float
) -> Any:
    world = cluster_environment.join_process_group(spec, timeout_s)
    with use_world(world):
        value = call_user_code(fn, *args)
        return world.all_gather_object(value) if returns == "all" else world.broadcast_object(value)
