"""One function run on all ranks: rank 0 in this process, the others in workers, ended together in every case."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from duoka.errors import LaunchError
from duoka.utils.signals import interruption
from duoka.workers import pool
from duoka.workers.exceptions import SECONDARY_FAILURE_WAIT_S, is_secondary_failure
from duoka.workers.handle import WorkerHandle
from duoka.workers.interrupts import InterruptHandler, PeerFailed
from duoka.workers.monitor import WorkerMonitor
from duoka.workers.process_context import WorkItem
from duoka.workers.rendezvous import ENTER_RENDEZVOUS, READY_FOR_RENDEZVOUS
from duoka.workers.serialization import Payload, dumps, load_and_close


def run_on_all(
    function: Callable[..., AbstractContextManager[Any]],
    configs: Sequence[Any],
    arguments: tuple[Any, ...],
    devices: Sequence[torch.device],
    *,
    unblock: Callable[[], None] = lambda: None,
    show_output: bool = False,
) -> list[Any]:
    """Run ``function(configs[rank], barrier, *arguments)`` on every rank, rank 0 in this thread; return all results.

    Args:
        function: returns a context manager whose value is the rank's result; each rank leaves it when all have a result.
            It calls ``barrier()`` before it waits for other ranks outside Python, equally often on every rank.
        configs: one a rank.
        arguments: the same for every rank; workers get copies.
        devices: one a rank.
        unblock: called in another thread, after the workers have ended, to free a rank 0 that waits for them.
        show_output: whether to print the workers' output.

    Raises:
        the first failure of any rank, as its own type; WorkerDied when a worker died; KeyboardInterrupt on Ctrl-C.

    """
    failure: BaseException | None = None
    monitor: WorkerMonitor | None = None
    packed = _pack(function, arguments) if len(devices) > 1 else Payload(b"")
    try:
        with InterruptHandler() as interrupts:
            workers = pool.acquire(devices[1:])
            monitor = WorkerMonitor(workers, interrupts, unblock, devices[0], show_output=show_output)
            try:
                monitor.start()
                for worker in workers:
                    with _peer_failure(monitor):
                        WorkItem.send(worker, packed, configs[worker.rank], is_session=False)
                results = [_run_rank_zero(function, configs[0], arguments, monitor, workers)]
                results += [load_and_close(monitor.take_result(worker.rank), devices[0]) for worker in workers]
            except BaseException as error:
                interrupts.close()
                failure = _root_cause(error, monitor, interrupts)
                if failure is error:
                    raise
            finally:
                interrupts.close()
                pool.release(workers, reusable=monitor.stop())
    except PeerFailed:  # raised while the caller was already leaving
        failure = monitor.error if monitor is not None else None
    finally:
        packed.close()
    if failure is None and interrupts.interrupted:  # during the clean-up
        raise KeyboardInterrupt
    if failure is None and interrupts.stop_signal:
        raise interruption(interrupts.stop_signal)
    if failure is None:
        return results
    gc.collect()  # frees sockets and ports that the stopped frames still hold
    raise failure


def _pack(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Payload:
    try:
        return dumps((function, arguments))
    except Exception as error:
        raise LaunchError(
            f"the function and its arguments cannot be sent to worker processes: {error}. Open files, locks, sockets and "
            "generators cannot leave their process: create such an object inside the launched function."
        ) from error


def _run_rank_zero(
    function: Callable[..., Any],
    config: Any,
    arguments: tuple[Any, ...],
    monitor: WorkerMonitor,
    workers: Sequence[WorkerHandle],
) -> Any:
    def wait_for_all(kind: str, then_send: str | None = None) -> None:
        monitor.wait_for_all(kind)
        if monitor.error is not None:
            raise PeerFailed
        if then_send is not None:
            for worker in workers:
                with _peer_failure(monitor):
                    worker.channel.send(then_send, Payload(b""))

    with function(config, lambda: wait_for_all(READY_FOR_RENDEZVOUS, ENTER_RENDEZVOUS), *arguments) as result:
        wait_for_all("done", then_send="finish")
    wait_for_all("idle")
    return result


@contextlib.contextmanager
def _peer_failure(monitor: WorkerMonitor) -> Iterator[None]:
    """Raise ``PeerFailed`` if a worker cannot receive, because it has died; the monitor is about to notice that."""
    try:
        yield
    except OSError:
        monitor.wait_for_failure(SECONDARY_FAILURE_WAIT_S)
        raise PeerFailed from None


def _root_cause(error: BaseException, monitor: WorkerMonitor, interrupts: InterruptHandler) -> BaseException:
    """Return the failure that caused the others."""
    if interrupts.interrupted or isinstance(error, KeyboardInterrupt):
        return error if isinstance(error, KeyboardInterrupt) else KeyboardInterrupt()
    if interrupts.stop_signal:
        return error if isinstance(error, SystemExit) else interruption(interrupts.stop_signal)
    if monitor.error is None and is_secondary_failure(error):
        monitor.wait_for_failure(SECONDARY_FAILURE_WAIT_S)
    if monitor.error is not None and (isinstance(error, PeerFailed) or is_secondary_failure(error)):
        return monitor.error
    return error
