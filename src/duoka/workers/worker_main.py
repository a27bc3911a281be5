"""The helper process, which calls ``main`` and nothing else: waits for work, does it, reports, and dies with its owner.

It never sees the user's main module. A thread of its own listens to the connection: when the other end closes, however
that came about, this process and all that it started (data-loader workers) end at once.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import shutil
import signal
import socket
import sys
import threading
from typing import Any

import torch

from duoka.errors import LaunchError
from duoka.workers import exceptions
from duoka.workers.channel import Channel, Message
from duoka.workers.process_context import WorkItem
from duoka.workers.serialization import Payload, dumps, loads

__all__ = ["main"]


def main() -> None:
    """Serve until the owner is gone."""
    connection = Channel(socket.socket(fileno=int(sys.argv[1])))
    os.register_at_fork(after_in_child=connection.close)  # a data-loader worker must not keep the line open
    gc.freeze()  # what torch's import has made stays: collecting after each task looks at the task's objects only
    line = _OwnerChannel(connection)
    connection.send("ready", Payload(b""))
    while True:
        _serve(line)


class _OwnerChannel:
    """The owner's end of the line as this process sees it; when the owner is gone, so is everything of this session."""

    def __init__(self, connection: Channel) -> None:
        self.send = connection.send
        self.scratch: str | None = None
        self._connection = connection
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="duoka-listen", daemon=True).start()

    def receive(self) -> Message:
        return self._inbox.get()

    def meet(self) -> None:
        """Wait until every rank has come here."""
        self.send("met", Payload(b""))
        self.receive()

    def _listen(self) -> None:
        try:
            while True:
                self._inbox.put(self._connection.receive())
        finally:  # the owner is gone, or the line is broken: nothing of this session may stay
            if self.scratch is not None:
                shutil.rmtree(self.scratch, ignore_errors=True)
            os.killpg(0, signal.SIGKILL)


def _serve(line: _OwnerChannel) -> None:
    """Run one task and report its value; leave its context when the owner says that every rank has reported."""
    message = line.receive()
    try:
        with _open(message.payload, line) as value:
            answer = _answer(value)
            line.send("done", answer)
            answer.close()
            line.receive()
    except BaseException as error:  # SystemExit too: the function ended, the helper serves on
        line.send("echo" if exceptions.is_echo(error) else "failed", exceptions.pack(error))
        return
    del value
    _tidy()
    line.scratch = None
    line.send("idle", Payload(b""))


def _answer(value: Any) -> Payload:
    try:
        return dumps(value)
    except Exception as error:
        raise LaunchError(
            f"the value that this rank returned, a {type(value).__name__}, cannot be sent to rank 0: {error}. "
            "Return numbers, tensors or a state_dict."
        ) from error


def _open(payload: Payload, line: _OwnerChannel) -> contextlib.AbstractContextManager[Any]:
    task: WorkItem = loads(Payload(payload.data), torch.device("cpu"))
    line.scratch = task.scratch
    task.surroundings.enter()
    work = Payload(task.work, task.sizes, payload.fd)
    try:
        function, arguments = loads(work, task.device)
    finally:
        work.close()
    context: contextlib.AbstractContextManager[Any] = function(
        task.place, line if task.talks else line.meet, *arguments
    )
    return context


def _tidy() -> None:
    gc.collect()
    if torch.accelerator.is_available():
        is_initialized = getattr(torch.get_device_module(), "is_initialized", bool)  # Apple's has none, and no helpers
        if is_initialized():
            torch.accelerator.memory.empty_cache()
