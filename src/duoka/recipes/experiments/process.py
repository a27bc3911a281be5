"""A process that trains one trial: ``python -m duoka.recipes.experiments.process``."""

from __future__ import annotations

import os
import pickle
import sys
import threading

from duoka.malloc import keep_freed_memory
from duoka.recipes.experiments.runner import run_one

__all__: list[str] = []


def _end_with_parent() -> None:
    """End this process when the other end of its standard input is gone, which even a SIGKILL there brings about."""
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> int:
    """Train the trial that comes over standard input; return the exit status."""
    keep_freed_memory()
    trial, device = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return 1 if run_one(trial, device=device) else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the thread still reads, and Python would wait for the lock of what it reads
