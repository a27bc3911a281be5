"""Entry point of a worker process: waits for tasks, runs them, sends the results, and dies with its owner.

A worker never imports the user's main module. One of its threads listens to the channel. When the owner's end closes for
any reason, the worker ends at once, with everything that it has started (such as DataLoader processes).
"""

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

from duoka.errors import LaunchError
from duoka.workers.channel import Channel, Message
from duoka.workers.exceptions import serialize_exception
from duoka.workers.lifetime import answer_stack_signal, end_with_owner
from duoka.workers.process_context import WorkItem
from duoka.workers.rendezvous import READY_FOR_RENDEZVOUS, remove_owner_folder
from duoka.workers.serialization import Payload, dumps, load_and_close, loads


def main() -> None:
    """Run tasks until the owner has ended."""
    channel_fd, stack_fd, owner_pid, rendezvous_fd = map(int, sys.argv[1:5])
    end_with_owner(owner_pid)
    answer_stack_signal(stack_fd)
    for fd in (stack_fd, rendezvous_fd):
        os.set_inheritable(fd, False)
    channel = Channel(socket.socket(fileno=channel_fd))
    os.register_at_fork(after_in_child=channel.close)  # a DataLoader process must not keep the channel open
    gc.freeze()  # collections after each task then skip the objects that torch's import created
    owner = WorkerChannel(channel, rendezvous_path=sys.argv[5])
    owner.send("ready", Payload(b""))
    while True:
        _run_task(owner)


class WorkerChannel:
    """A worker's end of the channel to its owner; the message ``"finish"`` ends a session.

    A thread reads the channel, and ends the worker and its descendants when the owner has ended.
    """

    def __init__(self, channel: Channel, rendezvous_path: str) -> None:
        self.send = channel.send
        self._rendezvous_path = rendezvous_path
        self._channel = channel
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="duoka-listen", daemon=True).start()

    def receive(self) -> Message:
        """Wait for the owner's next message."""
        return self._inbox.get()

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.send(READY_FOR_RENDEZVOUS, Payload(b""))
        self.receive()

    def _listen(self) -> None:
        try:
            while True:
                self._inbox.put(self._channel.receive())
        finally:  # the owner has ended, or the channel is broken
            remove_owner_folder(self._rendezvous_path)
            os.killpg(0, signal.SIGKILL)


def _run_task(owner: WorkerChannel) -> None:
    """Run one task and send its result; leave its context when the owner says that every rank has a result."""
    message = owner.receive()
    try:
        with _start(message.payload, owner) as value:
            try:
                result = dumps(value)
            except Exception as error:
                raise LaunchError(
                    f"this rank's return value, a {type(value).__name__}, cannot be sent to rank 0: {error}. "
                    "Return numbers, tensors or a state_dict."
                ) from error
            owner.send("done", result)
            result.close()
            owner.receive()
    except BaseException as error:  # SystemExit too ends the task, not the worker
        owner.send("failed", serialize_exception(error))
        return
    del value
    _free_memory()
    owner.send("idle", Payload(b""))


def _start(payload: Payload, owner: WorkerChannel) -> contextlib.AbstractContextManager[Any]:
    item: WorkItem = loads(Payload(payload.data), torch.device("cpu"))
    item.context.apply()
    function, arguments = load_and_close(Payload(item.data, item.sizes, payload.fd), item.device)
    connection = owner if item.is_session else owner.barrier
    context: contextlib.AbstractContextManager[Any] = function(item.config, connection, *arguments)
    return context


def _free_memory() -> None:
    gc.collect()
    if torch.accelerator.is_available():
        is_initialized = getattr(torch.get_device_module(), "is_initialized", bool)  # MPS lacks it, and has no workers
        if is_initialized():
            torch.accelerator.memory.empty_cache()
