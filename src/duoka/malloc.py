"""glibc allocator settings for duoka's own processes, so that each training step reuses the memory of the last.

By default glibc returns freed memory to the system, which hands it out again in pages of 4 KiB. On the CPU these page
faults cost 2 to 5 % of a step's time (``benchmarks/pages.py``). Another C library, and an environment that already sets
allocator options, are not changed.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Mapping

_LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Read by glibc 2.35 and later when a process starts (``man 7 glibc-tunables``). It has an effect where the system gives
large pages on request, which is the usual setting."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAX_KEPT_BYTES = 2**31 - 1
_MAX_KEPT_BYTES_IN_CHILDREN = 64 << 20
_MAX_KEPT_BLOCK_BYTES = 32 << 20
"""The largest threshold that glibc accepts: a larger tensor always returns its memory to the system."""
_USER_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES")


def with_large_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a new process whose allocator uses pages of 2 MiB."""
    return {**environment} if _has_user_settings(environment) else {**environment, **_LARGE_PAGES}


def keep_freed_memory() -> None:
    """Let this process keep up to 2 GiB of freed memory, and the processes that it forks (DataLoader workers) 64 MiB.

    For the ``duoka`` command and its scripts. Source of the numbers: ``man 3 mallopt``.
    """
    if sys.platform != "linux" or _has_user_settings(os.environ):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None and set_option(_M_MMAP_THRESHOLD, _MAX_KEPT_BLOCK_BYTES):
        set_option(_M_TRIM_THRESHOLD, _MAX_KEPT_BYTES)
        os.register_at_fork(
            after_in_child=functools.partial(set_option, _M_TRIM_THRESHOLD, _MAX_KEPT_BYTES_IN_CHILDREN)
        )


def _has_user_settings(environment: Mapping[str, str]) -> bool:
    return any(name.startswith(_USER_SETTINGS) for name in environment)
