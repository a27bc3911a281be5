"""What a model is made of, besides the values of its tensors, and what of it has changed since it was last looked at.

Looking costs some microseconds a module: attributes are compared by identity, and only what can change without becoming
another object (lists, dictionaries, plain objects, tensors that are no buffers) is compared by what it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

from duoka.data_parallel.definitions import globals_of

__all__ = ["ModelSnapshot", "modules_of"]

_ATOMS = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, type)
_LOOKED_INTO = 64
"""Containers with more items than this are compared by length and identity only."""
_DEPTH = 3
_OWN = ("_parameters", "_buffers", "_modules")


def modules_of(module: nn.Module) -> list[nn.Module]:
    """Return the modules of a model, each once, in order; wrappers for data parallelism inside it do not count."""
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
    """A model's modules, parameters, buffers and attributes as they were when it was looked at."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = modules_of(module)
        self.parameters = list(
            {id(p): p for m in self.modules for p in m._parameters.values() if p is not None}.values()
        )
        self._registries = [registry for m in self.modules for registry in (m._parameters, m._modules)]
        self._registered = [tuple(registry.values()) for registry in self._registries]
        self._buffers = [m._buffers for m in self.modules]
        self._buffer_forms = [_form(buffer) for buffer in self.buffers()]
        self._kinds = [_kind(m) for m in self.modules]
        self._globals = [(*where, _freeze(where[0][where[1]], 1)) for where in globals_of(map(type, self.modules))]
        self._attributes = [dict(m.__dict__) for m in self.modules]
        self._watched = [list(_watched(m)) for m in self.modules]
        self._empty = [list(_empty(m)) for m in self.modules]
        self._all_empty = list(chain.from_iterable(self._empty))

    def buffers(self) -> list[torch.Tensor | None]:
        """Return the buffers as they are now, in order, those that are ``None`` too."""
        return list(chain.from_iterable(buffers.values() for buffers in self._buffers))

    def is_current(self) -> bool:
        """Whether modules, parameters, and the forms of buffers are still the same."""
        for registry, known in zip(self._registries, self._registered, strict=True):
            if len(registry) != len(known) or not all(map(is_, registry.values(), known)):
                return False
        if [_kind(m) for m in self.modules] != self._kinds:
            return False
        if any(name not in space or _freeze(space[name], 1) != held for space, name, held in self._globals):
            return False
        return list(map(_form, self.buffers())) == self._buffer_forms

    def take_changes(self) -> dict[int, dict[str, Any]] | None:
        """Return the attributes that have changed, by module; ``None`` when it takes more than new values to follow them."""
        changes: dict[int, dict[str, Any]] = {}
        for index, module in enumerate(self.modules):
            now, known = module.__dict__, self._attributes[index]
            if len(now) != len(known) or not all(map(is_, now.values(), known.values())):
                if now.keys() != known.keys() and not known.keys() <= now.keys():
                    return None
                changes[index] = {k: v for k, v in now.items() if k not in known or v is not known[k]}
                self._attributes[index] = dict(now)
            for name, held in self._watched[index]:
                if name in now and _freeze(now[name], _DEPTH) != held:
                    changes.setdefault(index, {})[name] = now[name]
        if any(self._all_empty):
            self._take_filled(changes)
        if changes:
            self._look_again(changes)
        if any(name in _OWN or isinstance(value, nn.Module) for new in changes.values() for name, value in new.items()):
            return None
        return {index: new for index, values in changes.items() if (new := _sendable(values))}

    def _take_filled(self, changes: dict[int, dict[str, Any]]) -> None:
        for index, module in enumerate(self.modules):
            filled = [container for container in self._empty[index] if container]
            for name, value in module.__dict__.items():
                if any(value is container for container in filled):
                    changes.setdefault(index, {})[name] = value

    def _look_again(self, changes: dict[int, dict[str, Any]]) -> None:
        for index in changes:
            self._watched[index] = list(_watched(self.modules[index]))
            self._empty[index] = list(_empty(self.modules[index]))
        self._all_empty = list(chain.from_iterable(self._empty))


def _sendable(values: dict[str, Any]) -> dict[str, Any]:
    """Without tensors that have a graph: those are results of the last call, not state."""
    return {k: v for k, v in values.items() if not (isinstance(v, torch.Tensor) and v.grad_fn is not None)}


def _form(buffer: torch.Tensor | None) -> Any:
    return None if buffer is None else (buffer.shape, buffer.dtype, buffer.device)


def _kind(module: nn.Module) -> tuple[type, Any]:
    """Its class, and the class's forward: in a notebook either may be defined anew."""
    return type(module), type(module).forward


def _watched(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes that can change without becoming another object, and what they hold."""
    for name, value in module.__dict__.items():
        if name not in _OWN and not isinstance(value, _ATOMS) and not _is_empty(value):
            yield name, _freeze(value, _DEPTH)


def _empty(module: nn.Module) -> Iterator[Any]:
    """The empty containers, most of them registries of hooks: one glance at all of them tells that nothing was put in."""
    return (value for name, value in module.__dict__.items() if name not in _OWN and _is_empty(value))


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict | list | set) and not value


def _freeze(value: Any, depth: int) -> Any:
    """What to compare a value by; it keeps the objects that it names alive, so that identities stay true."""
    if isinstance(value, _ATOMS):
        return type(value), value
    if isinstance(value, torch.Tensor):
        return _Identity(value), value._version, value.data_ptr() if value.layout is torch.strided else 0
    if isinstance(value, nn.Module) or callable(value):
        return _Identity(value)
    if depth == 0:
        return _Identity(value)
    if isinstance(value, dict):
        items = value.items() if len(value) <= _LOOKED_INTO else ()
        return _Identity(value), len(value), [(k, _freeze(v, depth - 1)) for k, v in items]
    if isinstance(value, list | tuple | set | frozenset):
        return (
            _Identity(value),
            len(value),
            [_freeze(v, depth - 1) for v in (value if len(value) <= _LOOKED_INTO else ())],
        )
    inside = getattr(value, "__dict__", None)
    return (_Identity(value), _freeze(inside, depth - 1)) if isinstance(inside, dict) else _Identity(value)


class _Identity:
    """Equal to another only if both name the very same object."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
