"""The helper process, ``python -m duoka.team.helper FD``: waits for work, does it, reports, and dies with its owner.

It never sees the user's main module. A thread of its own listens to the connection: when the other end closes, however
that came about, this process and all that it started (data-loader workers) end at once.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import signal
import socket
import sys
import threading
from typing import Any

import torch

from duoka.team import failure
from duoka.team.connection import Connection, Message
from duoka.team.payload import Payload, dumps, loads
from duoka.team.task import Task

__all__ = ["main"]


def main() -> None:
    """Serve until the owner is gone."""
    connection = Connection(socket.socket(fileno=int(sys.argv[1])))
    os.register_at_fork(after_in_child=connection.close)  # a data-loader worker must not keep the line open
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), name="duoka-listen", daemon=True).start()
    connection.send("ready", Payload(b""))
    while True:
        _serve(inbox.get(), connection, inbox)


def _listen(connection: Connection, inbox: queue.SimpleQueue[Message]) -> None:
    try:
        while True:
            inbox.put(connection.receive())
    finally:  # the owner is gone, or the line is broken: nothing of this session may stay
        os.killpg(0, signal.SIGKILL)


def _serve(message: Message, connection: Connection, inbox: queue.SimpleQueue[Message]) -> None:
    """Run one task, report its value, and leave its context when the owner says that every rank has reported."""
    try:
        with _open(message.payload) as value:
            answer = dumps(value)
            connection.send("done", answer)
            answer.close()
            inbox.get()
    except BaseException as error:  # SystemExit too: the function ended, the helper serves on
        connection.send("echo" if failure.is_echo(error) else "failed", failure.pack(error))
        return
    del value
    _tidy()
    connection.send("idle", Payload(b""))


def _open(payload: Payload) -> contextlib.AbstractContextManager[Any]:
    task: Task = loads(Payload(payload.data), torch.device("cpu"))
    task.surroundings.enter()
    work = Payload(task.work, task.sizes, payload.fd)
    try:
        function, arguments = loads(work, task.device)
    finally:
        work.close()
    context: contextlib.AbstractContextManager[Any] = function(task.place, *arguments)
    return context


def _tidy() -> None:
    gc.collect()
    if torch.accelerator.is_available() and torch.get_device_module().is_initialized():
        torch.accelerator.memory.empty_cache()


if __name__ == "__main__":
    main()
