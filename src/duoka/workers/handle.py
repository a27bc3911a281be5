"""The owner's handle of one worker process: start, channel, output, death and end; and the events of several."""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from duoka.errors import LaunchError, WorkerDied
from duoka.malloc import with_large_pages
from duoka.workers.channel import Channel, Message
from duoka.workers.environment import worker_environment
from duoka.workers.exceptions import deserialize_exception

_EVENT_ORDER = ("signal", "output", "message", "death")
"""Deaths come last, because a worker may have sent a message before it died."""
_KEPT_OUTPUT_BYTES = 1 << 16
_SHOWN_LINES = 20
_END_TIMEOUT_S = 5.0
_PROGRAM = "import sys; sys.path[:] = {path!r}\nfrom duoka.workers.worker_main import main\nmain()"


class WorkerHandle:
    """A running worker process and the descriptors that connect it with its owner.

    The worker leads a new session of the operating system. Ctrl-C in the terminal therefore reaches the owner only, and
    one signal to the worker's process group also ends the processes that the worker has started.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = -1  # the pool sets it for each use
        self.start_key: tuple[str, ...] = ()  # the pool's: device and variables with which the worker started
        self._output = bytearray()
        own_end, worker_end = socket.socketpair()
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        try:
            self._process = _spawn(worker_end.fileno(), writing)
        except BaseException:
            own_end.close()
            os.close(reading)
            raise
        finally:
            worker_end.close()
            os.close(writing)
        self.channel = Channel(own_end)
        self.output_fd = reading
        self.death_fd = os.pidfd_open(self._process.pid) if hasattr(os, "pidfd_open") else None
        self._open_fds = [fd for fd in (self.output_fd, self.death_fd) if fd is not None]
        self._is_ready = False

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the worker's session."""
        return self._process.pid

    @property
    def label(self) -> str:
        """The device as messages name it: ``cuda:1``, or ``cpu:1`` for the second CPU worker."""
        return f"cpu:{self.rank}" if self.device.type == "cpu" else str(self.device)

    def wait_ready(self) -> None:
        """Wait for the first message; raises WorkerDied when the worker ends instead."""
        if not self._is_ready:
            message = self.receive()
            assert message.kind == "ready", message
            self._is_ready = True

    def receive(self) -> Message:
        """Wait for a message; raises WorkerDied when the worker has ended."""
        try:
            return self.channel.receive()
        except EOFError:
            raise self.death() from None

    def is_alive(self) -> bool:
        """Return whether the worker still runs."""
        return self._process.poll() is None

    def read_output(self) -> bytes:
        """Return the output since the last call; the handle keeps the end of it for ``death``."""
        new = bytearray()
        try:
            while part := os.read(self.output_fd, 1 << 16):
                new += part
        except BlockingIOError:
            pass
        self._output = (self._output + new)[-_KEPT_OUTPUT_BYTES:]
        return bytes(new)

    def death(self) -> WorkerDied:
        """Return the exception that describes how the worker ended; ends the worker if it still runs."""
        self.kill()
        self.read_output()
        status = self._process.returncode
        name = signal.Signals(-status).name if status < 0 else None
        lines = self._output.decode(errors="replace").rstrip().splitlines()[-_SHOWN_LINES:]
        return WorkerDied(self.rank, self.label, None if status < 0 else status, name, "\n".join(lines))

    def kill(self) -> None:
        """Kill the worker and everything in its session, and wait until the worker has ended."""
        is_running = self._process.returncode is None
        with contextlib.suppress(ProcessLookupError):  # DataLoader processes may outlive a worker that has ended
            os.killpg(self.pid, signal.SIGKILL)
        if is_running:
            self._process.wait(_END_TIMEOUT_S)

    def close(self) -> None:
        """Kill the worker and close the descriptors."""
        self.kill()
        self.detach()

    def detach(self) -> None:
        """Close the descriptors without a signal: in a forked child, which does not own the worker."""
        self.channel.close()
        with contextlib.suppress(IndexError):  # pop() gives each descriptor to one thread, should two close at once
            while True:
                os.close(self._open_fds.pop())


class EventSelector:
    """Waits for events of workers, and of a ``signal_source`` if there is one; rebuilds exceptions on ``receiver``."""

    def __init__(self, workers: Sequence[WorkerHandle], receiver: torch.device, signal_source: Any = None) -> None:
        self._workers, self._receiver = workers, receiver
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


def _spawn(channel_fd: int, output_fd: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, *subprocess._args_from_interpreter_flags(), "-P", "-u"]  # type: ignore[attr-defined]
    try:
        return subprocess.Popen(
            [*command, "-c", _PROGRAM.format(path=_module_path()), str(channel_fd)],
            stdin=subprocess.DEVNULL,
            stdout=output_fd,
            stderr=output_fd,
            pass_fds=[channel_fd],
            start_new_session=True,
            env=with_large_pages(worker_environment()),  # each task applies its owner's environment
        )
    except OSError as error:
        raise LaunchError(
            f"a worker process could not be started with {command[0]!r}: {error}. "
            f"Free some memory or processes, or use fewer devices."
        ) from error


def _module_path() -> list[str]:
    """Return the owner's module search path, with the script's folder last.

    A file beside the user's script must not shadow a module that the worker itself imports before it has a task.
    """
    script_folders = {str(Path(name).absolute().parent) for name in sys.argv[:1]}
    path = sorted((entry for entry in sys.path if entry and isinstance(entry, str)), key=script_folders.__contains__)
    package = str(Path(__file__).parents[2])
    return path if package in path else [*path, package]
