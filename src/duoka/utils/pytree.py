"""Nested containers: dicts, lists, tuples, named tuples, dataclasses, and mappings of other classes.

torch's own pytree treats unregistered classes as leaves; batches and outputs hold such classes (``BatchEncoding``,
``ModelOutput``, dataclasses), so these functions open them too and build others of the same class.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

Container: TypeAlias = tuple[list[Any], Callable[[Sequence[Any]], Any]]
"""A container's children, and a function that builds a container of the same class from other children."""


def open_container(node: Any) -> Container | None:
    """Return the children of a container and its rebuild function; ``None`` for a leaf.

    >>> children, rebuild = open_container({"a": 1, "b": 2})
    >>> rebuild([3, 4])
    {'a': 3, 'b': 4}
    """
    if isinstance(node, Mapping):
        return list(node.values()), lambda children: _rebuild_mapping(node, children)
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(node), lambda children: type(node)(*children)
    if isinstance(node, (list, tuple)):
        return list(node), lambda children: type(node)(children)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node)]
        return [getattr(node, name) for name in names], lambda children: _rebuild_dataclass(node, names, children)
    return None


def map_leaves(function: Callable[[Any], Any], node: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Return ``node`` with ``function(leaf)`` in place of each leaf; ``is_leaf`` may declare containers leaves.

    >>> map_leaves(lambda number: number + 1, {"a": (1, 2), "b": [3]})
    {'a': (2, 3), 'b': [4]}
    """
    container = None if is_leaf is not None and is_leaf(node) else open_container(node)
    if container is None:
        return function(node)
    children, rebuild = container
    return rebuild([map_leaves(function, child, is_leaf) for child in children])


def iter_leaves(node: Any) -> Iterator[Any]:
    """Yield the leaves of ``node`` in order."""
    container = open_container(node)
    if container is None:
        yield node
    else:
        for child in container[0]:
            yield from iter_leaves(child)


def iter_tensors(node: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of ``node`` in order."""
    return (leaf for leaf in iter_leaves(node) if isinstance(leaf, torch.Tensor))


def _rebuild_mapping(node: Mapping[Any, Any], children: Sequence[Any]) -> Any:
    if type(node) is dict:
        return dict(zip(node, children, strict=True))
    if hasattr(node, "__setitem__"):  # a copy keeps the class and its other state: defaultdict, BatchEncoding
        new: Any = copy.copy(node)
        for key, child in zip(node, children, strict=True):
            new[key] = child
        return new
    return type(node)(dict(zip(node, children, strict=True)))  # type: ignore[call-arg]


def _rebuild_dataclass(node: Any, names: Sequence[str], children: Sequence[Any]) -> Any:
    new = copy.copy(node)
    for name, child in zip(names, children, strict=True):
        object.__setattr__(new, name, child)  # works for frozen dataclasses too
    return new
