"""The private line between the user's process and one helper: a socket pair, so there is no port and no name to find."""

from __future__ import annotations

import os
import pickle
import socket
import struct
from dataclasses import dataclass

from duoka.workers.serialization import Payload

__all__ = ["Channel", "Message"]

_HEADER = struct.Struct("!Q")
_SMALL_BYTES = 1 << 16


@dataclass(frozen=True)
class Message:
    """One message: what it is, and an object that stays pickled until the receiver is ready to rebuild it."""

    kind: str
    payload: Payload


class Channel:
    """Sends and receives whole messages; one thread may send while another receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        """The descriptor, for selectors."""
        return self._socket.fileno()

    def send(self, kind: str, payload: Payload) -> None:
        """Send one message; raises OSError when the other side is gone."""
        body = pickle.dumps((kind, payload.data, payload.sizes), protocol=5)
        header = _HEADER.pack(len(body))
        if payload.fd is not None:
            socket.send_fds(self._socket, [header], [payload.fd])
            self._socket.sendall(body)
        elif len(body) < _SMALL_BYTES:
            self._socket.sendall(header + body)  # the receiver is woken once
        else:
            self._socket.sendall(header)
            self._socket.sendall(body)

    def receive(self) -> Message:
        """Wait for one message; raises EOFError when the other side is gone."""
        header, fds = self._receive_header()
        kind, data, sizes = pickle.loads(self._receive_exactly(_HEADER.unpack(header)[0]))
        return Message(kind, Payload(data, sizes, fds[0] if fds else None))

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _receive_header(self) -> tuple[bytes, list[int]]:
        header, fds = b"", []
        while len(header) < _HEADER.size:
            try:
                part, new_fds, _, _ = socket.recv_fds(self._socket, _HEADER.size - len(header), 1)
            except ConnectionError as error:
                raise EOFError from error
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
            try:
                count = self._socket.recv_into(view[done:])
            except ConnectionError as error:
                raise EOFError from error
            if count == 0:
                raise EOFError
            done += count
        return data
