"""Restoring of lists that samplers and streams shuffle in place, so that an order depends on no earlier epoch."""

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

MAX_LENGTH = 1 << 24
"""A longer array holds data and not an order of samples; copying it would cost too much."""


@contextlib.contextmanager
def restore_shuffled_lists(*owners: object) -> Iterator[None]:
    """Restore the lists and arrays among the attributes of ``owners`` that the ``with`` block shuffles in place.

    Other changes (to a counter, to the length of a list) remain, because they may be intended.
    """
    values = [value for owner in owners for value in getattr(owner, "__dict__", {}).values() if _may_be_order(value)]
    copies = [value.clone() if isinstance(value, torch.Tensor) else value.copy() for value in values]
    try:
        yield
    finally:
        for value, copy in zip(values, copies, strict=True):
            if _is_shuffled(value, copy):
                value[:] = copy


def _may_be_order(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        is_row = value.flags.writeable and value.ndim == 1
    elif isinstance(value, torch.Tensor):
        is_row = value.ndim == 1 and value.device.type == "cpu" and not value.requires_grad
    else:
        is_row = isinstance(value, list)
    return is_row and 1 < len(value) <= MAX_LENGTH


def _is_shuffled(value: Any, copy: Any) -> bool:
    """Whether ``value`` holds the items of ``copy`` in another order."""
    if len(value) != len(copy):
        return False
    if isinstance(value, list):
        return not all(map(operator.is_, value, copy)) and sorted(map(id, value)) == sorted(map(id, copy))
    one, other = np.asarray(value), np.asarray(copy)
    return not np.array_equal(one, other) and np.array_equal(np.sort(one), np.sort(other))
