"""Handler of Ctrl-C for the time of a ``with`` block."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def handle_interrupt(handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    """Call ``handler`` on Ctrl-C inside the ``with`` block; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
