"""Messages and file descriptors over a socket pair, which has no port and no name that another process could find."""

import contextlib
import errno
import os
import pickle
import socket
from dataclasses import dataclass
from multiprocessing.connection import Connection

from duoka.workers.resource_limits import explain_resource_errors
from duoka.workers.serialization import Payload


@dataclass(frozen=True)
class Message:
    """A message's kind, and an object that stays pickled until the receiver rebuilds it."""

    kind: str
    payload: Payload


class Channel:
    """One end of the connection between a worker and its owner; one thread may send while another receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._connection = Connection(os.dup(sock.fileno()))
        self._open_ends: list[Connection | socket.socket] = [self._connection, self._socket]

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self._socket.fileno()

    def send(self, kind: str, payload: Payload) -> None:
        """Send one message; raises OSError when the other end is closed."""
        has_fd = payload.fd is not None
        self._connection.send_bytes(pickle.dumps((kind, payload.data, payload.sizes, has_fd), protocol=5))
        if payload.fd is not None:
            socket.send_fds(self._socket, [b"\0"], [payload.fd])

    def receive(self) -> Message:
        """Wait for one message; raises EOFError when the other end is closed."""
        try:
            kind, data, sizes, has_fd = pickle.loads(self._connection.recv_bytes())
            fd = self._receive_fd() if has_fd else None
        except OSError as error:  # the other end has ended, or this end is closed
            raise EOFError from error
        return Message(kind, Payload(data, sizes, fd))

    def close(self) -> None:
        """Close this end; pop() lets one thread close each descriptor, should several call this at once."""
        with contextlib.suppress(IndexError):
            while True:
                self._open_ends.pop().close()

    def _receive_fd(self) -> int:
        _, fds, flags, _ = socket.recv_fds(self._socket, 1, 1)
        if flags & socket.MSG_CTRUNC:
            with explain_resource_errors("receive a tensor from a worker process"):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if not fds:
            raise EOFError
        os.set_inheritable(fds[0], False)
        return fds[0]
