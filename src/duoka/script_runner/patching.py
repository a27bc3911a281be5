"""Attributes of modules and classes replaced while a script runs, and restored afterwards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

_ABSENT = object()


class Patches(contextlib.ExitStack):
    """Replaces attributes until the ``with`` block ends."""

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name`` to ``value``."""
        original = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        self.callback(_restore, owner, name, original)

    def wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Make ``owner.name(...)`` call ``wrapper(original, ...)``."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        self.set(owner, name, call)


def _restore(owner: Any, name: str, original: Any) -> None:
    if original is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, original)
