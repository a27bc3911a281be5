"""Attributes of modules and classes replaced while a script runs, and restored afterwards."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock


class Patches(contextlib.ExitStack):
    """Replaces attributes until the ``with`` block ends."""

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name`` to ``value``."""
        self.enter_context(mock.patch.object(owner, name, value))

    def wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Make ``owner.name(...)`` call ``wrapper(original, ...)``."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        self.set(owner, name, call)
