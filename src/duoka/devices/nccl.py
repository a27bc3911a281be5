"""The NCCL library of this process: whether it connects these devices, and several ranks on one GPU.

NCCL 2.30 and newer do the latter if ``NCCL_MULTI_RANK_GPU_ENABLE=1`` is set when a process first uses NCCL. Source: the
message with which the library refuses ("Set NCCL_MULTI_RANK_GPU_ENABLE=1 to enable this configuration").
"""

import ctypes
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

VARIABLE = "NCCL_MULTI_RANK_GPU_ENABLE"
_FIRST_VERSION = (2, 30, 0)


def connects(devices: Sequence[torch.device]) -> bool:
    """Return whether NCCL connects ranks on these devices: GPUs, each named once unless ranks may share one."""
    if devices[0].type != "cuda" or not dist.is_nccl_available():
        return False
    return len(set(devices)) == len(devices) or ranks_may_share_a_gpu()


def ranks_may_share_a_gpu() -> bool:
    """Return whether NCCL accepts several ranks on one GPU."""
    return os.environ.get(VARIABLE) == "1" and (loaded_version() or (0, 0, 0)) >= _FIRST_VERSION


def sharing_backend(kind: str) -> str:
    """Return which library connects several ranks on one device of a type, with the reason: ``over gloo (...)``."""
    if kind != "cuda":
        return "over gloo"
    version = loaded_version()
    name = "NCCL" if version is None else f"NCCL {'.'.join(map(str, version))}"
    if ranks_may_share_a_gpu():
        return f"over {name} ({VARIABLE}=1)"
    if version is not None and version < _FIRST_VERSION:
        return f"over gloo ({name} refuses that; 2.30 or newer accepts it with {VARIABLE}=1)"
    return f"over gloo (NCCL 2.30 or newer accepts that with {VARIABLE}=1)"


def loaded_version() -> tuple[int, int, int] | None:
    """Return the version of the NCCL library that this process runs, ``None`` without one.

    ``torch.cuda.nccl.version()`` is the one that torch was built with; a preloaded library may be newer.
    """
    try:
        library = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        number = ctypes.c_int()
        failed = library.ncclGetVersion(ctypes.byref(number))
    except (AttributeError, OSError):  # another system, a torch without NCCL
        return None
    if failed:
        return None
    major, rest = divmod(number.value, 10_000)
    return major, rest // 100, rest % 100
