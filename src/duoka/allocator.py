"""The memory that a training step frees and asks for again: kept, or handed out in large pages, it costs next to nothing.

The GNU C library gives freed memory back to the system, which hands it out again in pages of 4 KiB, each at the first write to
it. In a step on CPU that is thousands of them, a twentieth of its time (``benchmarks/pages.py``). Elsewhere nothing is changed.
"""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["HUGE_PAGES", "keep_freed_memory"]

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""In the environment of a process that starts, this asks for pages of 2 MiB: glibc 2.35 and later, ``man 7 glibc-tunables``."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_KEPT_BYTES = 2**31 - 1
_LARGEST_KEPT_BYTES = 32 << 20
"""The most that the library takes for it: a single tensor larger than this always goes back to the system."""
_WORDS = ("MALLOC_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Let this process keep up to 2 GiB of what it frees, unless its environment says how memory is to be treated.

    Source of the numbers: ``man 3 mallopt``. For processes that are duoka's own; a user's program decides for itself.
    """
    if sys.platform != "linux" or any(name.startswith(_WORDS) for name in os.environ):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None and set_option(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES):
        set_option(_M_TRIM_THRESHOLD, _MOST_KEPT_BYTES)
