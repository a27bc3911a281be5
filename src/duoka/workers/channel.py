"""Messages and file descriptors over a socket pair, which has no port and no name that another process could find."""

from __future__ import annotations

import os
import pickle
import socket
import struct
from dataclasses import dataclass

from duoka.workers.serialization import Payload

__all__ = ["Channel", "Message"]

_HEADER = struct.Struct("!Q")
_ONE_SEND_BYTES = 1 << 16


@dataclass(frozen=True)
class Message:
    """A message's kind, and an object that stays pickled until the receiver rebuilds it."""

    kind: str
    payload: Payload


class Channel:
    """One end of the connection between a worker and its owner; one thread may send while another receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self._socket.fileno()

    def send(self, kind: str, payload: Payload) -> None:
        """Send one message; raises OSError when the other end is closed."""
        body = pickle.dumps((kind, payload.data, payload.sizes), protocol=5)
        header = _HEADER.pack(len(body))
        if payload.fd is not None:
            socket.send_fds(self._socket, [header], [payload.fd])
            self._socket.sendall(body)
        elif len(body) < _ONE_SEND_BYTES:
            self._socket.sendall(header + body)  # wakes the receiver once
        else:
            self._socket.sendall(header)
            self._socket.sendall(body)

    def receive(self) -> Message:
        """Wait for one message; raises EOFError when the other end is closed."""
        try:
            header, fds = self._receive_header()
            kind, data, sizes = pickle.loads(self._receive_exactly(_HEADER.unpack(header)[0]))
        except ConnectionError as error:
            raise EOFError from error
        return Message(kind, Payload(data, sizes, fds[0] if fds else None))

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _receive_header(self) -> tuple[bytes, list[int]]:
        header, fds = b"", []
        while len(header) < _HEADER.size:
            part, new_fds, _, _ = socket.recv_fds(self._socket, _HEADER.size - len(header), 1)
            if not part:
                raise EOFError
            header += part
            fds += new_fds
        for fd in fds:
            os.set_inheritable(fd, False)
        return header, fds

    def _receive_exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        done = 0
        while done < size:
            count = self._socket.recv_into(view[done:])
            if count == 0:
                raise EOFError
            done += count
        return data
