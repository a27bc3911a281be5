"""What code of the user's main module refers to: in a notebook a global that a model's method reads may change at any time.

Such code travels to helpers by value, with the values of its globals as they are then; so these are watched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

__all__ = ["globals_of"]


def globals_of(classes: Iterable[type]) -> list[tuple[dict[str, Any], str]]:
    """Return every global name, and the dictionary it is in, that methods of these classes read, however indirectly."""
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    seen: set[int] = set()

    def look_into(function: FunctionType) -> None:
        if id(function) in seen or not _travels_by_value(function):
            return
        seen.add(id(function))
        space = function.__globals__
        for name in _names(function.__code__):
            if name in space and not isinstance(space[name], ModuleType):
                found[id(space), name] = space, name
                for inner in _functions(space[name]):
                    look_into(inner)

    for kind in {base for one in classes for base in one.__mro__}:
        for function in _functions(kind):
            look_into(function)
    return list(found.values())


def _functions(value: Any) -> Iterator[FunctionType]:
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, type) and _travels_by_value(value):
        for item in vars(value).values():
            inner = getattr(item, "__func__", getattr(item, "fget", item))
            if isinstance(inner, FunctionType):
                yield inner


def _travels_by_value(value: Any) -> bool:
    """Whether helpers cannot import it."""
    return value.__module__ == "__main__" or value.__module__ not in sys.modules


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
