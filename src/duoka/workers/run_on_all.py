"""One job on a team: the same task on every helper and in this process, ended together however it ends."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from duoka.errors import LaunchError
from duoka.workers import exceptions, pool
from duoka.workers.handle import WorkerHandle
from duoka.workers.interrupts import InterruptHandler, PeerFailed
from duoka.workers.monitor import WorkerMonitor
from duoka.workers.process_context import ProcessContext, WorkItem
from duoka.workers.serialization import Payload, dumps, loads

__all__ = ["run_job"]

_ECHO_S = 1.0
"""How long rank 0, cut off in a collective, waits to hear which rank failed."""


def run_job(
    work: Callable[..., AbstractContextManager[Any]],
    places: Sequence[Any],
    arguments: tuple[Any, ...],
    devices: Sequence[torch.device],
    *,
    scratch: str | None = None,
    unblock: Callable[[], None] = lambda: None,
    show_output: bool = False,
) -> list[Any]:
    """Run ``work(places[rank], meet, *arguments)`` on every rank, rank 0 in this thread, and return the answers of all.

    ``work`` returns a context manager whose value is the rank's answer and which is left when all have answered. Before it
    first waits for the others outside Python it calls ``meet()``, once, which returns when all ranks have called it.
    ``scratch`` is the caller's temporary folder for this job; helpers remove it should the caller be killed before it can.
    ``unblock`` is called from another thread, after the helpers have been ended, to free a rank 0 that waits for them.

    Raises the first failure of any rank as its own type; WorkerDied when a helper died; KeyboardInterrupt on Ctrl-C.
    """
    failed: BaseException | None = None
    watch: WorkerMonitor | None = None
    packed = _pack(work, arguments) if len(devices) > 1 else Payload(b"")
    try:
        with InterruptHandler() as interruption:
            helpers = pool.acquire(devices[1:])
            watch = WorkerMonitor(helpers, interruption, unblock, devices[0], show=show_output)
            try:
                watch.start()
                for helper in helpers:
                    _tell(helper, "run", _task(packed, helper, places[helper.rank], scratch), watch)
                answer = _run_here(work, places[0], arguments, watch, helpers)
                answers = [answer, *(_unpack(watch.answer(helper.rank), devices[0]) for helper in helpers)]
            except BaseException as error:
                interruption.close()
                failed = _cause(error, watch, interruption)
                if failed is error:
                    raise
            finally:
                interruption.close()
                pool.release(helpers, reusable=watch.end())
    except PeerFailed:  # its one signal came while the caller was already on its way out
        failed = watch.error if watch is not None else None
    finally:
        packed.close()
    if failed is None and interruption.interrupted:  # while all was being put away
        raise KeyboardInterrupt
    if failed is None:
        return answers
    gc.collect()  # what the stopped frames held of the group (sockets, ports) goes with them, not at some later time
    raise failed


def _pack(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Payload:
    try:
        return dumps((work, arguments))
    except Exception as error:
        raise LaunchError(
            f"what helper processes need cannot be sent to them: {error}. Open files, locks, sockets and generators stay in "
            "the process that made them: make such an object inside the function that is launched."
        ) from error


def _unpack(answer: Payload, device: torch.device) -> Any:
    try:
        return loads(answer, device)
    finally:
        answer.close()


def _task(packed: Payload, helper: WorkerHandle, place: Any, scratch: str | None) -> Payload:
    task = dumps(WorkItem(ProcessContext.here(), helper.device, place, scratch, packed.data, packed.sizes))
    return Payload(task.data, fd=packed.fd)


def _run_here(
    work: Callable[..., Any],
    place: Any,
    arguments: tuple[Any, ...],
    watch: WorkerMonitor,
    helpers: Sequence[WorkerHandle],
) -> Any:
    def await_all(kind: str, then: str | None = None) -> None:
        watch.await_all(kind)
        if watch.error is not None:
            raise PeerFailed
        if then is not None:
            for helper in helpers:
                _tell(helper, then, Payload(b""), watch)

    with work(place, lambda: await_all("met", then="go"), *arguments) as answer:
        await_all("done", then="finish")
    await_all("idle")
    return answer


def _tell(helper: WorkerHandle, kind: str, payload: Payload, watch: WorkerMonitor) -> None:
    try:
        helper.connection.send(kind, payload)
    except OSError:  # one has just died: the watch is about to say which
        watch.await_failure(_ECHO_S)
        raise PeerFailed from None


def _cause(error: BaseException, watch: WorkerMonitor, interruption: InterruptHandler) -> BaseException:
    """What the user is told: of several failures the one that made the others."""
    if interruption.interrupted or isinstance(error, KeyboardInterrupt):
        return error if isinstance(error, KeyboardInterrupt) else KeyboardInterrupt()
    if watch.error is None and exceptions.is_echo(error):
        watch.await_failure(_ECHO_S)
    if watch.error is not None and (isinstance(error, PeerFailed) or exceptions.is_echo(error)):
        return watch.error
    return error
