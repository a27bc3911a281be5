"""A conversation: one long task on helpers that are sent messages and answer them, while no thread watches here.

``run_job`` is for a task that begins and ends; this is for helpers that serve somebody for as long as it lives. Whoever
waits for a message waits in Python, so that Ctrl-C ends the wait, and learns at once of the death of any helper.
"""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from duoka.workers import exceptions, pool
from duoka.workers.channel import Message
from duoka.workers.handle import WorkerHandle
from duoka.workers.process_context import ProcessContext, WorkItem
from duoka.workers.serialization import Payload, dumps

__all__ = ["WorkerSession", "WorkerChannel"]

_POLL_S = 0.5
"""How often a death is looked for on systems that cannot announce one."""
_ORDER = ("output", "message", "death")
_END_S = 2.0
"""How long a helper may take to say goodbye before it is ended."""


class WorkerChannel(Protocol):
    """What the task on a helper is given to talk with: messages of any kind but ``"finish"``, which ends it."""

    def send(self, kind: str, payload: Payload) -> None:
        """Send one message to the owner."""

    def receive(self) -> Message:
        """Wait for the owner's next message."""


class WorkerSession:
    """Helpers, one a device, each running ``work(place, line, *arguments)`` until ``end``.

    ``scratch`` is a temporary folder of the owner's; helpers remove it should the owner be killed before it can.
    """

    def __init__(
        self,
        work: Callable[..., AbstractContextManager[Any]],
        places: Sequence[Any],
        arguments: tuple[Any, ...],
        devices: Sequence[torch.device],
        *,
        scratch: str | None = None,
    ) -> None:
        self.helpers: list[WorkerHandle] = pool.acquire(devices)
        self._selector = selectors.DefaultSelector()
        self._is_over = False
        try:
            packed = dumps((work, arguments))
            for index, helper in enumerate(self.helpers):
                self._listen_to(index, helper)
                task = WorkItem(
                    ProcessContext.here(), helper.device, places[index], scratch, packed.data, packed.sizes, talks=True
                )
                helper.connection.send("run", Payload(dumps(task).data, fd=packed.fd))
            packed.close()
        except BaseException:
            self.kill()
            raise

    def send(self, index: int, kind: str, payload: Payload) -> None:
        """Send one message to one helper; raises WorkerDied when it is gone."""
        try:
            self.helpers[index].connection.send(kind, payload)
        except OSError:
            raise self.helpers[index].death() from None

    def receive(self) -> tuple[int, Message]:
        """Wait for a message of any helper; raises WorkerDied, or what ended a helper's task."""
        while True:
            if (found := self._poll(_POLL_S)) is not None:
                return found

    def end(self) -> None:
        """Say goodbye; helpers that answer stay warm for others, the rest are ended."""
        if self._is_over:
            return
        with contextlib.suppress(Exception):
            for answer in ("done", "idle"):  # the first goodbye ends the task, the second lets it leave its context
                for index in range(len(self.helpers)):
                    self.send(index, "finish", Payload(b""))
                self._await_all(answer)
            self._release(reusable=True)
            return
        self.kill()

    def kill(self) -> None:
        """End the helpers now."""
        self._release(reusable=False)

    def _listen_to(self, index: int, helper: WorkerHandle) -> None:
        self._selector.register(helper.connection, selectors.EVENT_READ, ("message", index))
        self._selector.register(helper.output_fd, selectors.EVENT_READ, ("output", index))
        if helper.death_fd is not None:
            self._selector.register(helper.death_fd, selectors.EVENT_READ, ("death", index))

    def _poll(self, timeout_s: float) -> tuple[int, Message] | None:
        for (what, index), helper in sorted(self._events(timeout_s), key=lambda event: _ORDER.index(event[0][0])):
            if what == "output":
                helper.read_output()
            elif what == "message":
                return index, self._take(helper)
            else:
                raise helper.death()
        return None

    def _events(self, timeout_s: float) -> list[tuple[tuple[str, int], WorkerHandle]]:
        """What is there to be read: outputs first, then messages, deaths last, because the dead may have spoken before."""
        events = [key.data for key, _ in self._selector.select(timeout_s)]
        if not events:
            events = [("death", index) for index, helper in enumerate(self.helpers) if not helper.is_alive()]
        return [(event, self.helpers[event[1]]) for event in events]

    def _take(self, helper: WorkerHandle) -> Message:
        try:
            message = helper.connection.receive()
        except EOFError:
            raise helper.death() from None
        if message.kind in ("failed", "echo"):
            raise exceptions.unpack(message.payload, helper.rank, helper.label, torch.device("cpu"))
        return message

    def _await_all(self, kind: str) -> None:
        deadline, waiting = time.monotonic() + _END_S, set(range(len(self.helpers)))
        while waiting:
            if time.monotonic() > deadline:
                raise TimeoutError
            if (found := self._poll(0.05)) is not None:
                found[1].payload.close()
                if found[1].kind == kind:
                    waiting.discard(found[0])

    def _release(self, *, reusable: bool) -> None:
        if not self._is_over:
            self._is_over = True
            self._selector.close()
            pool.release(self.helpers, reusable=reusable)
