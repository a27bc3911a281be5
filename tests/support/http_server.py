"""HTTP server on the loopback address that answers every request with the same bytes."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """The address of a file, and the paths that clients have requested."""

    url: str
    requests: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serve_bytes(content: bytes, name: str, *, status: int = 200, content_length: int | None = None) -> Iterator[Served]:
    """Serve ``content`` as a file called ``name``; the header may state another length."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.requests.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) if content_length is None else content_length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_port}/{name}")
    thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
