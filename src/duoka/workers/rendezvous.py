"""Rendezvous of the private process groups on this machine: one folder, loopback only, a short timeout."""

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

READY_FOR_RENDEZVOUS, ENTER_RENDEZVOUS = "ready_for_rendezvous", "enter_rendezvous"
"""Kinds of messages: torch's rendezvous cannot be interrupted, so no rank enters it before all are ready."""
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
CONNECT_TIMEOUT = datetime.timedelta(seconds=30)
"""How long ranks that are all ready may take to connect: milliseconds, or seconds on a machine with a high load.

If one dies meanwhile, the others wait this long in C++ code.
"""
LOOPBACK_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK}
NO_WATCHDOG_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0"}
"""NCCL's watchdog would end the user's process; duoka ends the workers instead."""


def file_store(folder: str | None, size: int) -> Any:
    """Return the store through which ``size`` ranks exchange addresses: a file in a private folder, or memory for one."""
    return dist.FileStore(f"{folder}/store", size) if size > 1 else dist.HashStore()  # type: ignore[attr-defined]


@contextlib.contextmanager
def environment_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the ``with`` block, and restore the user's own afterwards."""
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)
        os.environ.update(before)
