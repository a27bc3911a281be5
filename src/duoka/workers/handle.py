"""The owner's handle of one worker process: start, channel, output, death and end; and the events of several."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import NamedTuple, Self

import torch

from duoka.errors import WorkerDied
from duoka.workers.channel import Channel, Message
from duoka.workers.lifetime import STACK_SIGNAL, user_frames
from duoka.workers.resource_limits import explain_resource_errors
from duoka.workers.spawn import start_worker_process

_KEPT_OUTPUT_BYTES = 1 << 16
_SHOWN_LINES = 20
_END_TIMEOUT_S = 5.0
_STACK_TIMEOUT_S = 2.0


class Activity(NamedTuple):
    """What a worker does: a sentence, with its Python stack if it could be asked."""

    text: str
    is_responding: bool


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
        self.was_closed_by_user = False
        self._is_closed = False
        self.is_ready = False
        """Whether the worker has sent its first message."""
        with explain_resource_errors("start a worker process"), contextlib.ExitStack() as on_failure:
            own_end, worker_end = socket.socketpair()
            on_failure.callback(own_end.close)
            with worker_end, _Pipe() as output, _Pipe() as stack:
                self._process = start_worker_process(worker_end.fileno(), output.writing, stack.writing)
                on_failure.callback(self.kill)
                self.channel = Channel(own_end)
                self.death_fd = os.pidfd_open(self._process.pid) if hasattr(os, "pidfd_open") else None
                self.output_fd, self._stack_fd = output.keep_reading(), stack.keep_reading()
            on_failure.pop_all()
        self._open_fds = [fd for fd in (self.output_fd, self._stack_fd, self.death_fd) if fd is not None]

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the worker's session."""
        return self._process.pid

    @property
    def label(self) -> str:
        """The device as messages name it: ``cuda:1``, or ``cpu:1`` for the second CPU worker."""
        return f"cpu:{self.rank}" if self.device.type == "cpu" else str(self.device)

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
        new = b"" if self._is_closed else _read_available(self.output_fd)
        self._output = (self._output + new)[-_KEPT_OUTPUT_BYTES:]
        return new

    def is_stopped(self) -> bool:
        """Return whether a signal or a debugger has stopped the worker."""
        return _process_state(self.pid) in ("T", "t")

    def activity(self) -> Activity:
        """Return what the worker does now; its stack takes up to two seconds."""
        state = _process_state(self.pid)
        if self.is_stopped():
            remedy = f"`kill -CONT {self.pid}` lets it go on"
            return Activity(f"It is stopped, by a signal, a debugger or a frozen container: {remedy}.", False)
        if not self.is_ready:
            return Activity("It is still starting: the machine is busy, or reads its files slowly.", False)
        if stack := self._ask_stack():
            return Activity(f"Its Python code is at, innermost call first:\n{stack}", True)
        return Activity(f"It does not answer (state {state or 'unknown'}): the system does not let it run.", False)

    def _ask_stack(self) -> str:
        _read_available(self._stack_fd)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, STACK_SIGNAL)
        text, new, deadline = b"", b"", time.monotonic() + _STACK_TIMEOUT_S
        while (new or not text) and time.monotonic() < deadline:
            time.sleep(0.05)
            new = _read_available(self._stack_fd)
            text += new
        return user_frames(text.decode(errors="replace"))

    def death(self) -> WorkerDied:
        """Return the exception that describes how the worker ended; ends the worker if it still runs."""
        self.kill()
        self.read_output()
        status = self._process.returncode
        name = None if status >= 0 or self.was_closed_by_user else signal.Signals(-status).name
        lines = self._output.decode(errors="replace").rstrip().splitlines()[-_SHOWN_LINES:]
        reason = "was ended by close_workers()" if self.was_closed_by_user else ""
        return WorkerDied(self.rank, self.label, None if status < 0 else status, name, "\n".join(lines), reason)

    def kill(self) -> None:
        """Kill the worker and everything in its session, and wait until the worker has ended."""
        is_running = self._process.returncode is None
        with contextlib.suppress(ProcessLookupError):  # DataLoader processes may outlive a worker that has ended
            os.killpg(self.pid, signal.SIGKILL)
        if is_running:
            self._process.wait(_END_TIMEOUT_S)

    def close_for_user(self) -> None:
        """Kill the worker, which is in use; its user closes the descriptors when it finds the worker dead."""
        self.was_closed_by_user = True
        self.kill()

    def close(self) -> None:
        """Kill the worker and close the descriptors."""
        self.kill()
        self.detach()

    def detach(self) -> None:
        """Close the descriptors without a signal: in a forked child, which does not own the worker."""
        self._is_closed = True
        self.channel.close()
        with contextlib.suppress(IndexError):  # pop() gives each descriptor to one thread, should two close at once
            while True:
                os.close(self._open_fds.pop())


class _Pipe:
    """A pipe; the ``with`` block closes both ends, but for a reading end that is kept."""

    def __enter__(self) -> Self:
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self._to_close = [self.reading, self.writing]
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._to_close:
            os.close(fd)

    def keep_reading(self) -> int:
        """Return the reading end, which stays open."""
        self._to_close.remove(self.reading)
        return self.reading


def _read_available(fd: int) -> bytes:
    """Return what a descriptor has now."""
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := os.read(fd, 1 << 16):
            parts.append(part)
    return b"".join(parts)


def _process_state(pid: int) -> str:
    """Return the letter by which Linux names the state of a process, such as ``T`` for stopped; elsewhere nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
