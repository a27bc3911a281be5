"""A worker's ties to its owner: the system ends it with its owner, and it answers a signal with its Python stack."""

import ctypes
import faulthandler
import os
import signal
import sys
from pathlib import Path

STACK_SIGNAL = signal.SIGRTMAX - 3 if hasattr(signal, "SIGRTMAX") else signal.SIGUSR2
"""Asks a worker for its stack. The handler is C code, so it answers while a library keeps Python from running."""
_PR_SET_PDEATHSIG = 1
_SHOWN_FRAMES = 8


def end_with_owner(owner: int) -> None:
    """Let Linux kill this process when its owner ends, even if this process is stopped or runs C code."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:  # it has ended before the line above
        os.killpg(0, signal.SIGKILL)


def answer_stack_signal(fd: int) -> None:
    """Write the main thread's Python stack to ``fd`` at each ``STACK_SIGNAL``."""
    faulthandler.register(STACK_SIGNAL, file=fd, all_threads=False)


def user_frames(dump: str) -> str:
    """Return the innermost lines of a stack from ``faulthandler``, without those of duoka that called the user's code."""
    package = f'"{Path(__file__).parents[1]}'
    lines = [line for line in dump.splitlines() if line.startswith("  File ") and "<frozen" not in line]
    num_user = next((n for n, line in enumerate(lines) if package in line), len(lines))
    return "\n".join(lines[: num_user or len(lines)][:_SHOWN_FRAMES])
