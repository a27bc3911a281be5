"""Events of several workers: messages, output, failures and deaths, in one wait."""

import contextlib
import selectors
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from duoka.errors import WorkerDied
from duoka.workers.channel import Message
from duoka.workers.exceptions import deserialize_exception
from duoka.workers.handle import WorkerHandle
from duoka.workers.resource_limits import explain_resource_errors
from duoka.workers.stall_watch import StallWatch

_EVENT_ORDER = ("signal", "output", "message", "death")
"""Deaths come last, because a worker may have sent a message before it died."""
_POLL_S = 0.5


class EventSelector:
    """Waits for events of workers, and of a ``signal_source`` if there is one; rebuilds exceptions on ``receiver``."""

    def __init__(self, workers: Sequence[WorkerHandle], receiver: torch.device, signal_source: Any = None) -> None:
        self._workers, self._receiver = workers, receiver
        with explain_resource_errors("wait for worker processes"):
            self._selector = selectors.DefaultSelector()
        sources: list[tuple[Any, str, WorkerHandle | None]] = [(signal_source, "signal", None)]
        for worker in workers:
            events = {"message": worker.channel, "output": worker.output_fd, "death": worker.death_fd}
            sources += [(source, event, worker) for event, source in events.items()]
        for source, event, owner in sources:
            if source is not None:
                self._selector.register(source, selectors.EVENT_READ, (event, owner))

    def poll(self, timeout_s: float) -> Iterator[tuple[Any, bytes | Message | BaseException | None]]:
        """Yield workers, each with its output, message or failure, and ``(None, None)`` for a signal, as they are ready.

        The failure is WorkerDied, or the exception that ended the worker's task. After ``timeout_s`` nothing is yielded.
        """
        ready = [key.data for key, _ in self._selector.select(timeout_s)]
        if not ready:  # systems without pidfd do not announce a death
            ready = [("death", worker) for worker in self._workers if not worker.is_alive()]
        for event, worker in sorted(ready, key=lambda event: _EVENT_ORDER.index(event[0])):
            if event == "signal":
                yield None, None
            elif event == "output":
                yield worker, worker.read_output()
            elif event == "death":
                yield worker, worker.death()
            else:
                yield worker, self._receive(worker)

    def _receive(self, worker: WorkerHandle) -> Message | BaseException:
        try:
            message = worker.receive()
        except WorkerDied as death:
            return death
        if message.kind != "failed":
            return message
        return deserialize_exception(message.payload, worker.rank, worker.label, self._receiver)

    def close(self) -> None:
        """Stop selecting; the workers stay open."""
        self._selector.close()


def wait_until_ready(workers: Sequence[WorkerHandle]) -> None:
    """Wait for every worker's first message; raises WorkerDied as soon as one of them ends instead."""
    starting = [worker for worker in workers if not worker.is_ready]
    if not starting:
        return
    watch = StallWatch(starting, "starts")
    with contextlib.closing(EventSelector(starting, torch.device("cpu"))) as selector:
        while not all(worker.is_ready for worker in starting):
            for worker, event in selector.poll(_POLL_S):
                if isinstance(event, BaseException):
                    raise event
                worker.is_ready = worker.is_ready or isinstance(event, Message)
            watch.workers = [worker for worker in starting if not worker.is_ready]
            watch.check()
