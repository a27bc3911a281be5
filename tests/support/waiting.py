"""Waiting for a condition, in place of a sleep and a hope."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(predicate: Callable[[], T], timeout_s: float = 120, interval_s: float = 0.02) -> T:
    """Call ``predicate`` until it returns something true, and return that; raises AssertionError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"still {value!r} after {timeout_s:g} s: {getattr(predicate, '__name__', predicate)}")
        time.sleep(interval_s)
    return value
