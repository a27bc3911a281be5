"""End of a script's threads: Python's order at exit, in a process that goes on."""

import sys
import threading
from typing import Any

_EXECUTOR_FLAGS = {"concurrent.futures.thread": "_shutdown", "concurrent.futures.process": "_global_shutdown"}
"""Modules of executors, and the name of each one's flag that no work is accepted any more."""


def join_threads() -> None:
    """Let idle threads of executors end, and wait for all threads but daemons.

    Python calls what ``threading._register_atexit`` has registered before it joins the threads. Without that an open
    executor would be waited for without end. Executors work again afterwards: this process has a report to write.
    """
    callbacks: list[Any] = getattr(threading, "_threading_atexits", [])  # of Python 3.11 to 3.14
    try:
        for callback in reversed(callbacks):
            callback()
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
    finally:
        for name, flag in _EXECUTOR_FLAGS.items():
            if name in sys.modules:
                setattr(sys.modules[name], flag, False)
