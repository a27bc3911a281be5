"""Attributes of other modules that are replaced for as long as a script runs, and put back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Patches"]

_ABSENT = object()


class Patches(contextlib.ExitStack):
    """Replaces attributes until the ``with`` block ends."""

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Let ``owner.name`` be ``value``."""
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        self.callback(functools.partial(_restore, owner, name, before))

    def wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Let ``owner.name(...)`` call ``wrapper(original, ...)``."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        self.set(owner, name, call)


def _restore(owner: Any, name: str, before: Any) -> None:
    if before is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, before)


@contextlib.contextmanager
def replaced(values: dict[str, Any], space: dict[str, Any]) -> Iterator[None]:
    """Let names in a dictionary have other values inside the ``with`` block."""
    before = {name: space.get(name, _ABSENT) for name in values}
    space.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                space.pop(name, None)
            else:
                space[name] = value
