"""Long-lived session with worker processes that answer requests; no thread of the owner watches them.

``run_on_all`` is for one task. In a session each worker runs a loop over requests until the owner closes the session.
The owner waits for messages in Python, so Ctrl-C ends the wait, and a worker's death ends it at once.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from duoka.workers import pool
from duoka.workers.channel import Message
from duoka.workers.events import EventSelector
from duoka.workers.handle import WorkerHandle
from duoka.workers.process_context import WorkItem
from duoka.workers.serialization import Payload, dumps
from duoka.workers.stall_watch import StallWatch

_POLL_S = 0.5
_CLOSE_TIMEOUT_S = 2.0
"""How long workers may take to leave the session before they are killed."""


class WorkerSession:
    """Workers, one a device, each running ``function(configs[index], channel, *arguments)`` until ``close``."""

    def __init__(
        self,
        function: Callable[..., AbstractContextManager[Any]],
        configs: Sequence[Any],
        arguments: tuple[Any, ...],
        devices: Sequence[torch.device],
    ) -> None:
        self.workers: list[WorkerHandle] = pool.acquire(devices)
        self._selector: EventSelector | None = None
        self._is_closed = False
        try:
            self._selector = EventSelector(self.workers, torch.device("cpu"))
            with contextlib.closing(dumps((function, arguments))) as packed:
                for worker, config in zip(self.workers, configs, strict=True):
                    with _death_of(worker):
                        WorkItem.send(worker, packed, config, is_session=True)
        except BaseException:
            self.kill()
            raise

    def send(self, index: int, kind: str, payload: Payload) -> None:
        """Send one message to one worker; raises WorkerDied when the worker has ended."""
        with _death_of(self.workers[index]):
            self.workers[index].channel.send(kind, payload)

    def receive(self, awaited: Sequence[int] = (), task: str = "") -> tuple[int, Message]:
        """Wait for a message of any worker; a long wait is reported for ``awaited`` workers, which do ``task``.

        Raises WorkerDied, WorkerStuck, or the exception that ended a worker's function.
        """
        watch: StallWatch | None = None
        while (received := self._poll(_POLL_S)) is None:
            watch = watch or StallWatch([self.workers[index] for index in awaited], task)
            watch.check()
        return received

    @property
    def was_closed_by_user(self) -> bool:
        """Whether ``close_workers`` has ended the workers."""
        return any(worker.was_closed_by_user for worker in self.workers)

    def close(self) -> None:
        """End the session; workers that answer in time stay warm, the others are killed."""
        if self._is_closed:
            return
        with contextlib.suppress(Exception):
            for answer in ("done", "idle"):  # the first "finish" ends the function, the second its context
                for index in range(len(self.workers)):
                    self.send(index, "finish", Payload(b""))
                self._wait_for_all(answer)
            self._release(reusable=True)
            return
        self.kill()

    def kill(self) -> None:
        """Kill the workers."""
        self._release(reusable=False)

    def _poll(self, timeout_s: float) -> tuple[int, Message] | None:
        assert self._selector is not None
        for worker, event in self._selector.poll(timeout_s):
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Message):
                return self.workers.index(worker), event
        return None

    def _wait_for_all(self, kind: str) -> None:
        deadline, waiting = time.monotonic() + _CLOSE_TIMEOUT_S, set(range(len(self.workers)))
        while waiting:
            if time.monotonic() > deadline:
                raise TimeoutError
            if (received := self._poll(0.05)) is not None:
                index, message = received
                message.payload.close()
                if message.kind == kind:
                    waiting.discard(index)

    def _release(self, *, reusable: bool) -> None:
        if not self._is_closed:
            self._is_closed = True
            if self._selector is not None:
                self._selector.close()
            pool.release(self.workers, reusable=reusable)


@contextlib.contextmanager
def _death_of(worker: WorkerHandle) -> Iterator[None]:
    """Raise WorkerDied if the ``with`` block cannot send to the worker."""
    try:
        yield
    except OSError:
        raise worker.death() from None
