"""Values of calls: their tensors, and the rest with a placeholder for each tensor.

Arguments and outputs are containers of ``utils.pytree``, and plain objects that hold tensors: distributions, caches, the
user's classes.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from duoka.utils.pytree import Container, open_container

_ATOMS = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, np.ndarray, np.generic)
_CLOSED = (type, types.ModuleType, types.FunctionType, types.MethodType, nn.Module, torch.Tensor, torch.optim.Optimizer)


class Placeholder(NamedTuple):
    """Stands for an extracted tensor: its position, and the part whose value it belongs to."""

    position: int
    part: int = 0


class PerSample:
    """Stands for a list or an array with one item a sample; an item has placeholders for its tensors."""

    def __init__(self, items: Any, kind: type) -> None:
        self.items, self._kind = items, kind

    def slice(self, start: int, stop: int) -> "PerSample":
        """Return the items of some samples."""
        return PerSample(self.items[start:stop], self._kind)

    def value(self, function: Callable[[Any], Any]) -> Any:
        """Return the list, with ``function`` applied to its items, or the array."""
        return self.items if isinstance(self.items, np.ndarray) else self._kind([function(item) for item in self.items])


def extract_tensors(value: Any, part: int = 0) -> tuple[list[torch.Tensor], Any]:
    """Return the dense tensors in ``value``, and ``value`` with a ``Placeholder`` for each."""
    tensors: list[torch.Tensor] = []

    def extract(leaf: Any) -> Any:
        if not is_dense(leaf):
            return leaf
        tensors.append(leaf)
        return Placeholder(len(tensors) - 1, part)

    return tensors, map_values(extract, value)


def insert_tensors(structure: Any, tensors: Sequence[Any]) -> Any:
    """Return ``structure`` with tensors in place of its placeholders."""

    def fill(leaf: Any) -> Any:
        if type(leaf) is PerSample:
            return leaf.value(lambda item: insert_tensors(item, tensors))
        return tensors[leaf.position] if is_placeholder(leaf) else leaf

    return map_values(fill, structure)


def insert_on_device(structure: Any, tensors: Sequence[torch.Tensor], device: torch.device) -> Any:
    """Return ``structure`` with the tensors in place, moved to ``device`` as ``torch.nn.DataParallel`` does."""
    return insert_tensors(structure, [tensor.to(device, non_blocking=True) for tensor in tensors])


def map_values(function: Callable[[Any], Any], value: Any) -> Any:
    """Return ``value`` with ``function(leaf)`` in place of each leaf; placeholders are leaves."""
    opened = open_value(value)
    if opened is None:
        return function(value)
    children, rebuild = opened
    return rebuild([map_values(function, child) for child in children])


def open_value(value: Any) -> Container | None:
    """Return the children of a container or of an object that holds tensors, and a function that builds it anew."""
    if type(value) in (Placeholder, PerSample) or isinstance(value, _ATOMS):
        return None
    return open_container(value) or _open_object(value)


def is_object(value: Any) -> bool:
    """Return whether ``open_value`` gives an object's attributes and not a container's items."""
    return open_container(value) is None


def is_placeholder(value: Any) -> bool:
    """Return whether ``value`` stands for a tensor."""
    return type(value) is Placeholder


def is_dense(value: Any) -> bool:
    """Return whether ``value`` is a tensor in ordinary memory, which can travel as bytes."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized


def _open_object(value: Any) -> Container | None:
    if not _is_plain_object(value) or not any(_leaves(value, [])):
        return None
    names, cls = list(vars(value)), type(value)

    def rebuild(children: Sequence[Any]) -> Any:
        new = object.__new__(cls)
        new.__dict__.update(zip(names, children, strict=True))
        return new

    return list(vars(value).values()), rebuild


def _is_plain_object(value: Any) -> bool:
    """Return whether an object is its attributes and no more."""
    cls: Any = type(value)
    if isinstance(value, _CLOSED) or cls.__new__ is not object.__new__ or not getattr(value, "__dict__", None):
        return False
    is_default = cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__
    return is_default and getattr(cls, "__getstate__", None) is getattr(object, "__getstate__", None)


def _leaves(value: Any, path: list[int]) -> Iterator[bool]:
    """Yield, for each leaf, whether it stands for a tensor; an object that contains itself has no leaves."""
    if is_placeholder(value) or is_dense(value):
        yield True
        return
    if isinstance(value, _ATOMS) or id(value) in path:
        return
    container = open_container(value)
    children = container[0] if container else list(vars(value).values()) if _is_plain_object(value) else []
    for child in children:
        yield from _leaves(child, [*path, id(value)])
