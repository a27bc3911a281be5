"""One helper process seen from its owner: start it, read what it writes, learn that it died, end it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from duoka.errors import LaunchError, WorkerDied
from duoka.malloc import with_large_pages
from duoka.workers.channel import Channel

__all__ = ["WorkerHandle"]

_KEPT_OUTPUT_BYTES = 1 << 16
_SHOWN_LINES = 20
_END_TIMEOUT_S = 5.0
_PROGRAM = "import sys; sys.path[:] = {path!r}\nfrom duoka.workers.worker_main import main\nmain()"


class WorkerHandle:
    """A running helper process and the lines to it.

    It has a session of its own, so that Ctrl-C in the terminal reaches the owner only, and so that one signal to its group
    also ends what it has started.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = -1  # given for each task
        self._output = bytearray()
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        try:
            self._process = _spawn(theirs.fileno(), writing)
        except BaseException:
            ours.close()
            os.close(reading)
            raise
        finally:
            theirs.close()
            os.close(writing)
        self.connection = Channel(ours)
        self.output_fd = reading
        self.death_fd = os.pidfd_open(self._process.pid) if hasattr(os, "pidfd_open") else None
        self._open_fds = [fd for fd in (self.output_fd, self.death_fd) if fd is not None]
        self._is_ready = False

    @property
    def pid(self) -> int:
        """Its process id, which is also that of its session."""
        return self._process.pid

    @property
    def label(self) -> str:
        """The device as messages name it: ``cuda:1``, or ``cpu:1`` for the second CPU worker."""
        return f"cpu:{self.rank}" if self.device.type == "cpu" else str(self.device)

    def await_ready(self) -> None:
        """Wait for its first sign of life; raises WorkerDied when it ends instead."""
        if self._is_ready:
            return
        try:
            message = self.connection.receive()
        except EOFError:
            raise self.death() from None
        if message.kind != "ready":
            raise LaunchError(f"a helper process answered {message.kind!r} instead of 'ready'; this is a bug in duoka")
        self._is_ready = True

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def read_output(self) -> bytes:
        """Return what it wrote since the last call, keeping the end of it for a report of its death."""
        new = bytearray()
        try:
            while part := os.read(self.output_fd, 1 << 16):
                new += part
        except BlockingIOError:
            pass
        self._output = (self._output + new)[-_KEPT_OUTPUT_BYTES:]
        return bytes(new)

    def death(self) -> WorkerDied:
        """Describe how it ended."""
        self.kill()
        self.read_output()
        status = self._process.returncode
        name = signal.Signals(-status).name if status < 0 else None
        lines = self._output.decode(errors="replace").rstrip().splitlines()[-_SHOWN_LINES:]
        return WorkerDied(self.rank, self.label, None if status < 0 else status, name, "\n".join(lines))

    def kill(self) -> None:
        """End it and everything in its session now, and wait until it has gone."""
        if self._process.returncode is None:
            _kill_group(self.pid)
            self._process.wait(_END_TIMEOUT_S)
        else:
            _kill_group(self.pid)  # it has gone, its data-loader workers perhaps not

    def close(self) -> None:
        """End it and close the lines to it."""
        self.kill()
        self.forget()

    def forget(self) -> None:
        """Close the lines to it without a signal: in a forked child, which does not own it."""
        self.connection.close()
        with contextlib.suppress(IndexError):  # taken one by one: two threads may close at once, and each number once
            while True:
                os.close(self._open_fds.pop())


def _spawn(line: int, output: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, *subprocess._args_from_interpreter_flags(), "-P", "-u"]  # type: ignore[attr-defined]
    try:
        return subprocess.Popen(
            [*command, "-c", _PROGRAM.format(path=_path(sys.path, sys.argv[:1])), str(line)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[line],
            start_new_session=True,
            env=with_large_pages(os.environ),  # a task has its owner's
        )
    except OSError as error:
        raise LaunchError(
            f"a helper process could not be started with {command[0]!r}: {error}. "
            f"Free some memory or processes, or use fewer devices."
        ) from error


def _path(own: Sequence[str], script: Sequence[str]) -> list[str]:
    """Return where a helper finds modules: where its owner does, in the owner's order, so that nothing shadows another module.

    The folder of the script comes last until there is work: what lies there is the user's, and not for the helper itself.
    """
    beside = {str(Path(name).absolute().parent) for name in script}
    path = sorted((entry for entry in own if entry and isinstance(entry, str)), key=beside.__contains__)
    package = str(Path(__file__).parents[2])
    return path if package in path else [*path, package]


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
