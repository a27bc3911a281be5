"""Lists that samplers and streams shuffle in place, put back after each epoch: an order depends on no epoch before it."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["restore_shuffled_lists"]

LONGEST = 1 << 24
"""A longer row of numbers is data and no order of samples: copying it would cost too much."""


@contextlib.contextmanager
def restore_shuffled_lists(*owners: object) -> Iterator[None]:
    """Put back after the block what was shuffled in place in it, of the lists and arrays that ``owners`` have as attributes.

    Anything else that changes (a counter, a list that something was taken from) stays as it is: it may be meant to.
    """
    kept = [(value, _copy(value)) for owner in owners for value in _held(owner)]
    try:
        yield
    finally:
        for value, before in kept:
            if _is_shuffled(value, before):
                value[:] = before


def _held(owner: object) -> list[Any]:
    values = getattr(owner, "__dict__", {}).values()
    return [value for value in values if (isinstance(value, list) or _is_row(value)) and 1 < len(value) <= LONGEST]


def _is_row(value: Any) -> bool:
    return (isinstance(value, np.ndarray) and value.flags.writeable and value.ndim == 1) or (
        isinstance(value, torch.Tensor) and value.ndim == 1 and value.device.type == "cpu" and not value.requires_grad
    )


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value.copy()


def _is_shuffled(value: Any, before: Any) -> bool:
    """Whether ``value`` holds what it held ``before`` in another order."""
    if len(value) != len(before):
        return False
    if isinstance(value, list):
        return not all(map(operator.is_, value, before)) and sorted(map(id, value)) == sorted(map(id, before))
    one, other = np.asarray(value), np.asarray(before)
    return not np.array_equal(one, other) and np.array_equal(np.sort(one), np.sort(other))
