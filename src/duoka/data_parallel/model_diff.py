"""Snapshot of a model's structure and attributes, and the changes since.

A comparison costs some microseconds a module: it compares attributes by identity, and by content
only what can change in place (lists, dictionaries, plain objects, tensors that are not buffers).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

REGISTRIES = ("_parameters", "_buffers", "_modules")
_IMMUTABLE = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, type)
_MAX_ITEMS = 64
"""Containers with more items are compared by length and identity only."""
_MAX_DEPTH = 3


def unwrapped_modules(module: nn.Module) -> list[nn.Module]:
    """Return the modules of a model, each once, in order, without wrappers for data parallelism."""
    found: dict[int, nn.Module] = {}

    def walk(one: nn.Module | None) -> None:
        while isinstance(one, nn.DataParallel):
            one = one.module
        if one is not None and id(one) not in found:
            found[id(one)] = one
            for child in one._modules.values():
                walk(child)

    walk(module)
    return list(found.values())


class ModelSnapshot:
    """A model's modules, parameters, buffers and attributes at one time."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = unwrapped_modules(module)
        self.parameters = list(
            {id(p): p for m in self.modules for p in m._parameters.values() if p is not None}.values()
        )
        self._registries = [registry for m in self.modules for registry in (m._parameters, m._modules)]
        self._registered = [tuple(registry.values()) for registry in self._registries]
        self._buffers = [m._buffers for m in self.modules]
        self._buffer_specs = [_buffer_spec(buffer) for buffer in self.buffers()]
        self._code = [_code(m) for m in self.modules]
        self._globals = [
            (space, name, _fingerprint(space[name], 1)) for space, name in _globals_used_by(map(type, self.modules))
        ]
        self._attributes = [dict(m.__dict__) for m in self.modules]
        self._mutable: dict[int, list[tuple[str, Any]]] = {}
        """Attributes of each module that can change in place, and their fingerprints."""
        self._empty: dict[int, list[Any]] = {}
        """Empty containers of each module, mostly registries of hooks: ``any`` over all of them finds a change."""
        self._note_values(range(len(self.modules)))

    def buffers(self) -> list[torch.Tensor | None]:
        """Return the current buffers in order, ``None`` included."""
        return list(chain.from_iterable(buffers.values() for buffers in self._buffers))

    def tensors(self) -> list[torch.Tensor]:
        """Return the parameters, and the current buffers that are not ``None``."""
        return [*self.parameters, *(buffer for buffer in self.buffers() if buffer is not None)]

    def structure_unchanged(self) -> bool:
        """Return whether modules, parameters, code, and the shapes of buffers are the same."""
        for registry, known in zip(self._registries, self._registered, strict=True):
            if len(registry) != len(known) or not all(map(is_, registry.values(), known)):
                return False
        if [_code(m) for m in self.modules] != self._code:
            return False
        if any(name not in space or _fingerprint(space[name], 1) != known for space, name, known in self._globals):
            return False
        return list(map(_buffer_spec, self.buffers())) == self._buffer_specs

    def diff(self) -> dict[int, dict[str, Any]] | None:
        """Return changed attributes by module index, and update the snapshot.

        ``None`` means that new attribute values are not enough to describe the change.
        """
        changes: dict[int, dict[str, Any]] = {}
        for index, module in enumerate(self.modules):
            current, known = module.__dict__, self._attributes[index]
            if len(current) != len(known) or not all(map(is_, current.values(), known.values())):
                if current.keys() != known.keys() and not known.keys() <= current.keys():
                    return None
                changes[index] = {k: v for k, v in current.items() if k not in known or v is not known[k]}
                self._attributes[index] = dict(current)
            for name, fingerprint in self._mutable[index]:
                if name in current and _fingerprint(current[name], _MAX_DEPTH) != fingerprint:
                    changes.setdefault(index, {})[name] = current[name]
        if any(self._all_empty):
            for index, filled in self._empty.items():
                for name, value in self.modules[index].__dict__.items():
                    if any(value is container for container in filled if container):
                        changes.setdefault(index, {})[name] = value
        if changes:
            self._note_values(changes)
        if any(n in REGISTRIES or isinstance(v, nn.Module) for new in changes.values() for n, v in new.items()):
            return None
        state = {index: {k: v for k, v in new.items() if not _is_result(v)} for index, new in changes.items()}
        return {index: values for index, values in state.items() if values}

    def _note_values(self, indices: Iterable[int]) -> None:
        """Note the values that can change in place, of the modules with these indices."""
        for index in indices:
            self._mutable[index], self._empty[index] = [], []
            for name, value in self.modules[index].__dict__.items():
                if name in REGISTRIES or isinstance(value, _IMMUTABLE):
                    continue
                if isinstance(value, dict | list | set) and not value:
                    self._empty[index].append(value)
                else:
                    self._mutable[index].append((name, _fingerprint(value, _MAX_DEPTH)))
        self._all_empty = list(chain.from_iterable(self._empty.values()))


def _is_result(value: Any) -> bool:
    """Return whether a value is a tensor with a graph: a result of the last call, not state."""
    return isinstance(value, torch.Tensor) and value.grad_fn is not None


def _buffer_spec(buffer: torch.Tensor | None) -> Any:
    return None if buffer is None else (buffer.shape, buffer.dtype, buffer.device)


def _code(module: nn.Module) -> tuple[type, Any]:
    """Return the class and its forward; a notebook cell may redefine either."""
    return type(module), type(module).forward


def _fingerprint(value: Any, depth: int) -> Any:
    """Return a key for comparing a value; it keeps objects alive, so that their identities stay unique."""
    if isinstance(value, _IMMUTABLE):
        return type(value), value
    identity = (id(value), value)  # tuples compare the objects only where the first items are equal
    if isinstance(value, torch.Tensor):
        return identity, value._version, value.data_ptr() if value.layout is torch.strided else 0
    if isinstance(value, nn.Module) or callable(value) or depth == 0:
        return identity
    if isinstance(value, dict):
        pairs = value.items() if len(value) <= _MAX_ITEMS else ()
        return identity, len(value), [(k, _fingerprint(v, depth - 1)) for k, v in pairs]
    if isinstance(value, list | tuple | set | frozenset):
        items = value if len(value) <= _MAX_ITEMS else ()
        return identity, len(value), [_fingerprint(v, depth - 1) for v in items]
    attributes = getattr(value, "__dict__", None)
    return (identity, _fingerprint(attributes, depth - 1)) if isinstance(attributes, dict) else identity


def _globals_used_by(classes: Iterable[type]) -> list[tuple[dict[str, Any], str]]:
    """Return the globals that user-defined methods read, directly or not, as (namespace, name).

    Workers receive code of the user's main module by value, with the values of its globals at that
    time. In a notebook these may change at any time, so the snapshot watches them.
    """
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    seen: set[int] = set()

    def visit(function: FunctionType) -> None:
        if id(function) in seen or not _is_pickled_by_value(function):
            return
        seen.add(id(function))
        space = function.__globals__
        for name in _names_in(function.__code__):
            if name in space and not isinstance(space[name], ModuleType):
                found[id(space), name] = space, name
                for inner in _functions_of(space[name]):
                    visit(inner)

    for cls in {base for one in classes for base in one.__mro__}:
        for function in _functions_of(cls):
            visit(function)
    return list(found.values())


def _functions_of(value: Any) -> Iterator[FunctionType]:
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, type) and _is_pickled_by_value(value):
        for item in vars(value).values():
            inner = getattr(item, "__func__", getattr(item, "fget", item))
            if isinstance(inner, FunctionType):
                yield inner


def _is_pickled_by_value(value: Any) -> bool:
    """Return whether workers cannot import the class or function."""
    return value.__module__ == "__main__" or value.__module__ not in sys.modules


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
