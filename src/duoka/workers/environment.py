"""Environment of worker processes: the owner's, with the variables of devices as the owner's process has read them."""

import contextlib
import os
from collections.abc import Iterator

DEVICE_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)
"""Environment variables that name devices; a process reads them once."""

_kept: list[dict[str, str]] = []
"""Values of these variables that workers get in place of the present ones; the last counts."""


@contextlib.contextmanager
def keep_device_variables() -> Iterator[dict[str, str]]:
    """Start workers inside the ``with`` block with the present ``DEVICE_VARIABLES``, and return those."""
    values = {name: os.environ[name] for name in DEVICE_VARIABLES if name in os.environ}
    _kept.append(values)
    try:
        yield values
    finally:
        _kept.remove(values)


def worker_environment() -> dict[str, str]:
    """Return the environment for a worker."""
    if not _kept:
        return dict(os.environ)
    others = {name: value for name, value in os.environ.items() if name not in DEVICE_VARIABLES}
    return others | _kept[-1]
