"""``launch``: a function on every device of this machine, or at this process's place in a larger job."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import torch.distributed as dist

from duoka import workers
from duoka.devices.selection import resolve
from duoka.devices.spec import DeviceSpec, reconcile
from duoka.errors import ConfigError, LaunchError
from duoka.launcher import cluster_environment, rank_context
from duoka.workers.exceptions import own_frames
from duoka.world import entered, is_entered

__all__ = ["launch"]

T = TypeVar("T")
_one_at_a_time = threading.Lock()
"""A process has one default process group, one environment and one rank."""


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
    **others: Any,
) -> Any:
    """Run ``fn(*args)`` on every device at once and return rank 0's value.

    The calling process is rank 0 and runs ``fn`` itself, with the very objects that it was given; every further device has
    a helper process, which gets copies. Inside, ``torch.distributed`` is initialised and ``duoka.current_world()`` tells
    rank, size and device. Afterwards the calling process is as it was: process group, environment, current device, random
    generators, thread count and signal handlers. Helpers stay warm for the next launch.

    In a process that torchrun or Slurm started, or whose process group already has several ranks, no helper is started:
    this process takes its own place in that job, and ``devices`` only says whether to use accelerators or the CPU.

    Args:
        fn: any callable, defined anywhere: a module, a notebook cell, the REPL; it need not be importable.
        args: its arguments; helpers get them by value, tensors on an accelerator arriving on the helper's own device.
        devices: the device grammar: ``"all"`` (the default), ``"auto"``, ``"0,1"``, ``"cpu:2"``, a ``torch.device``, or a
            list of these.
        device: another spelling of ``devices``.
        returns: ``"first"`` for rank 0's value, ``"all"`` for the list of every rank's.
        output: ``"quiet"`` keeps what helpers print for error reports only; ``"all"`` shows it, each line labelled.
        timeout_s: seconds after which a collective over gloo that some rank does not join fails; NCCL waits on.

    Raises:
        what ``fn`` raises on any rank, as its own type, the remote traceback being its cause; WorkerDied when a helper
        process ends without an exception; LaunchError when ``args`` cannot be sent to another process, or when called
        inside a launched function; DeviceError for devices that are not there. Called from another thread than the main one,
        it raises a helper's exception when the Python code of rank 0 next runs: a long sleep is not interrupted there.

    Example:
        >>> import duoka
        >>> duoka.launch(lambda: duoka.current_world().rank, devices="cpu:2", returns="all")
        [0, 1]

    """
    for name in others:
        raise ConfigError(f"launch has no option {name!r}; pass arguments of the function by position: launch(fn, 3)")
    spec = reconcile(device, devices, default="all")
    _check_choice("returns", returns, ("first", "all"))
    _check_choice("output", output, ("quiet", "all"))
    if not callable(fn):
        raise ConfigError(f"launch runs a function; fn is {fn!r}. Pass the function itself: launch(train, ...)")
    if is_entered() or not _one_at_a_time.acquire(blocking=False):
        raise LaunchError(
            "a launch is running in this process already (launch was called inside a launched function, or from another "
            "thread); call it once, with all the devices it should use"
        )
    try:
        if cluster_environment.is_member(spec):
            return _join(fn, args, spec, returns, timeout_s)
        return _launch_here(fn, args, spec, returns, output, timeout_s)
    except BaseException as error:
        raise error.with_traceback(own_frames(error.__traceback__))  # noqa: B904 - it is the same error
    finally:
        _one_at_a_time.release()


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def _launch_here(
    fn: Callable[..., Any], args: tuple[Any, ...], spec: DeviceSpec, returns: str, output: str, timeout_s: float
) -> Any:
    chosen = resolve(spec).devices
    if dist.is_initialized():
        raise LaunchError(
            "this process already has a process group of its own, with one rank; launch needs to make one. "
            "Call torch.distributed.destroy_process_group() first"
        )
    with rank_context.own_state_kept(chosen[0]), rank_context.places(chosen, timeout_s) as places:
        values = workers.run_job(
            rank_context.run,
            places,
            (fn, args, returns == "all"),
            chosen,
            unblock=lambda: rank_context.abort(chosen[0]),
            scratch=places[0].folder,
            show_output=output == "all",
        )
    return values if returns == "all" else values[0]


def _join(fn: Callable[..., Any], args: tuple[Any, ...], spec: DeviceSpec, returns: str, timeout_s: float) -> Any:
    world = cluster_environment.join(spec, timeout_s)
    with entered(world):
        value = fn(*args)
        return world.all_gather_object(value) if returns == "all" else world.broadcast_object(value)
