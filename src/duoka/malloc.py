"""The memory that a training step frees and asks for again: kept, or handed out in large pages, it costs next to nothing.

The GNU C library gives freed memory back to the system, which hands it out again in pages of 4 KiB, each at the first write to
it. In a step on CPU that is thousands of them, 2 to 5 % of its time (``benchmarks/pages.py``). With another C library, or
where the environment says how memory is to be treated, nothing is changed.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Mapping

__all__ = ["keep_freed_memory", "with_large_pages"]

_LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Read when a process starts, by glibc 2.35 and later (``man 7 glibc-tunables``); it counts where large pages are for those who
ask, as most systems have it."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_KEPT_BYTES = 2**31 - 1
_MOST_KEPT_BY_CHILDREN = 64 << 20
_LARGEST_KEPT_BYTES = 32 << 20
"""The largest threshold that the library accepts: a tensor of more bytes than this always goes back to the system."""
_WORDS = ("MALLOC_", "GLIBC_TUNABLES")


def with_large_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a new process in which freed memory comes back in pages of 2 MiB."""
    return {**environment} if _speaks_of_memory(environment) else {**environment, **_LARGE_PAGES}


def keep_freed_memory() -> None:
    """Let this process keep up to 2 GiB of what it frees; those that it forks, such as a DataLoader's, keep little.

    For the ``duoka`` command, and what it starts. Source of the numbers: ``man 3 mallopt``.
    """
    if sys.platform != "linux" or _speaks_of_memory(os.environ):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None and set_option(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES):
        set_option(_M_TRIM_THRESHOLD, _MOST_KEPT_BYTES)
        os.register_at_fork(after_in_child=functools.partial(set_option, _M_TRIM_THRESHOLD, _MOST_KEPT_BY_CHILDREN))


def _speaks_of_memory(environment: Mapping[str, str]) -> bool:
    return any(name.startswith(_WORDS) for name in environment)
