"""The thread that watches the helpers while a job runs: their answers, failures, deaths and output, and Ctrl-C."""

from __future__ import annotations

import contextlib
import selectors
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from duoka.workers import exceptions
from duoka.workers.channel import Message
from duoka.workers.handle import WorkerHandle
from duoka.workers.interrupts import InterruptHandler
from duoka.workers.serialization import Payload

__all__ = ["WorkerMonitor"]

_ECHO_S = 1.0
"""How long a failure that only says 'another rank went away' waits for that rank's own."""
_POLL_S = 0.2
"""How often a death is looked for on systems that cannot announce one."""


class WorkerMonitor:
    """Watches one job: what each helper has reported, and in ``error`` the first failure, which stops the caller's thread."""

    def __init__(
        self,
        helpers: Sequence[WorkerHandle],
        interruption: InterruptHandler,
        unblock: Callable[[], None],
        receiver: torch.device,
        *,
        show: bool,
    ) -> None:
        self.error: BaseException | None = None
        self._helpers = helpers
        self._interruption = interruption
        self._unblock = unblock
        self._receiver = receiver
        self._show = show
        self._reports: dict[str, dict[int, Payload]] = {"met": {}, "done": {}, "idle": {}}
        self._unread: list[Payload] = []
        self._echo: tuple[WorkerHandle, Message, float] | None = None
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="duoka-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def await_all(self, kind: str) -> None:
        """Wait until every helper has ``met`` the others, is ``done``, or is ``idle``; returns early when one has failed."""
        self._await(lambda: len(self._reports[kind]) == len(self._helpers))

    def answer(self, rank: int) -> Payload:
        """What the helper of ``rank`` was ``done`` with; whoever takes it closes it."""
        payload = self._reports["done"][rank]
        self._unread.remove(payload)
        return payload

    def await_failure(self, timeout_s: float) -> None:
        """Wait for a failure, if there is to be one."""
        self._await(lambda: False, timeout_s)

    def kill(self) -> None:
        """End the helpers; their deaths are no news from now on."""
        self._ended = True
        for helper in self._helpers:
            helper.kill()

    def end(self) -> bool:
        """Stop watching; helpers that are not idle are ended. Returns whether all of them are idle, to be used again."""
        is_clean = len(self._reports["idle"]) == len(self._helpers)
        if not is_clean:
            self.kill()
        self._thread.join()
        for payload in self._unread:
            payload.close()
        return is_clean

    def _await(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self.error is not None or self._ended, timeout_s)

    def _run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                self._watch(selector)
        except BaseException as error:  # whatever it is, rank 0 must not wait for a thread that has gone
            self._fail(error)
        with self._changed:
            self._changed.notify_all()

    def _watch(self, selector: selectors.BaseSelector) -> None:
        selector.register(self._interruption, selectors.EVENT_READ, self._on_signal)
        for helper in self._helpers:
            selector.register(helper.connection, selectors.EVENT_READ, partial(self._on_message, helper))
            selector.register(helper.output_fd, selectors.EVENT_READ, partial(self._on_output, helper))
            if helper.death_fd is not None:
                selector.register(helper.death_fd, selectors.EVENT_READ, partial(self._on_death, helper))
        while not self._ended and len(self._reports["idle"]) < len(self._helpers):
            for key, _ in selector.select(_POLL_S):
                if not self._ended:
                    key.data()
            self._on_time()

    def _on_signal(self) -> None:
        if self._interruption.read_signals():
            self.kill()
            self._unblock()

    def _on_message(self, helper: WorkerHandle) -> None:
        try:
            message = helper.connection.receive()
        except EOFError:
            self._on_death(helper)
            return
        if message.kind == "failed":
            self._fail(self._unpack(helper, message))
            return
        self._unread.append(message.payload)
        if message.kind == "echo":
            self._echo = self._echo or (helper, message, time.monotonic() + _ECHO_S)
            return
        with self._changed:
            self._reports[message.kind][helper.rank] = message.payload
            self._changed.notify_all()

    def _on_output(self, helper: WorkerHandle) -> None:
        text = helper.read_output().decode(errors="replace")
        if self._show:
            label = f"[rank {helper.rank} {helper.label}]"
            _write("".join(f"{label} {line}\n" for line in text.splitlines()))

    def _on_death(self, helper: WorkerHandle) -> None:
        self._fail(helper.death())

    def _on_time(self) -> None:
        if self._ended:
            return
        for helper in self._helpers:
            if helper.death_fd is None and not helper.is_alive():
                self._on_death(helper)
        if self._echo is not None and time.monotonic() > self._echo[2]:
            helper, message, _ = self._echo
            self._unread.remove(message.payload)
            self._fail(self._unpack(helper, message))

    def _unpack(self, helper: WorkerHandle, message: Message) -> BaseException:
        return exceptions.unpack(message.payload, helper.rank, helper.label, self._receiver)

    def _fail(self, error: BaseException) -> None:
        """Keep the first failure, end the helpers, and stop rank 0, wherever it is."""
        if self._ended:
            return
        self.error = error
        self.kill()
        self._unblock()
        with self._changed:
            self._changed.notify_all()
        self._interruption.stop_caller()


def _write(text: str) -> None:
    """Print what a helper wrote, as well as the user's own output can show it."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # a closed pipe or file: rank 0 will meet that by itself
        sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
