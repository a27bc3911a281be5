"""Snapshot of a model's structure and state, and the changes since.

A comparison costs some microseconds a module. It compares attributes by identity; what can change in place (lists,
objects, closures, class attributes, globals that the model's code reads) by one digest of all of it, see ``state_watch``.
"""

import importlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from operator import is_
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from duoka.data_parallel.state_watch import MAX_NBYTES, CachedFunction, Digest, can_change, class_data, is_user_code
from duoka.utils.text import format_bytes

REGISTRIES = ("_parameters", "_buffers", "_modules")
Namespace: TypeAlias = type | str
"""A class, or a module's name: workers import it, with the values that it had at first."""
_CLASS_DATA = "data of the class"


def unwrapped_modules(module: nn.Module) -> list[nn.Module]:
    """Return the modules of a model, each once, in order, without wrappers for data parallelism."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [module]
    while waiting:  # a recursive function inside this one would be a reference cycle
        one = waiting.pop()
        while isinstance(one, nn.DataParallel):
            one = one.module
        if one is not None and id(one) not in found:
            found[id(one)] = one
            waiting.extend(reversed(one._modules.values()))
    return list(found.values())


def parameters_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """Return a model's parameters, whatever a ``parameters`` method of its class returns."""
    return nn.Module.parameters(module)


class ModelChanges(NamedTuple):
    """New values: of attributes, by module index; and of classes and modules that workers import."""

    attributes: dict[int, dict[str, Any]]
    namespaces: list[tuple[Namespace, dict[str, Any]]]


class _Watched(NamedTuple):
    """One value that may change in place."""

    space: Mapping[str, Any]
    name: str
    owner: int | Namespace | None
    """A module's index, what workers import, or ``None`` if a change needs the whole model again."""

    @property
    def key(self) -> tuple[int, str]:
        return id(self.space), self.name

    def value(self) -> Any:
        if self.name == _CLASS_DATA:
            return dict(class_data(self.space))
        return self.space.get(self.name)


class ModelSnapshot:
    """A model's modules, parameters, buffers and attributes at one time.

    ``parameters`` also has what is not registered as one and needs the same care: buffers that require a gradient, and
    tensors that attributes hold at any depth (heads in a list, a teacher kept out of ``parameters()``).
    """

    def __init__(self, module: nn.Module, device: torch.device | None = None) -> None:
        """Take a snapshot; tensors in attributes are shared if they are on ``device``."""
        self.modules = unwrapped_modules(module)
        registered = [p for m in self.modules for p in m._parameters.values() if p is not None]
        buffers = [b for m in self.modules for b in m._buffers.values() if b is not None]
        trained = [buffer for buffer in buffers if _is_trained(buffer)]
        known = {id(each) for each in (*self.modules, *registered, *buffers)}
        attributes = [v for m in self.modules for n, v in m.__dict__.items() if n not in REGISTRIES]
        found = Digest(attributes, frozenset(known))
        self._globals = list(_globals_used_by([*map(type, self.modules), *found.functions]))
        found_globals = Digest([space.get(name) for space, name, _ in self._globals], frozenset(known))
        self._device = device or torch.device("cpu")
        hidden = [t for t in (*found.tensors, *found_globals.tensors) if self._can_share(t)]
        parameters: list[Any] = [*registered, *trained, *hidden]
        self.parameters: list[torch.Tensor] = list({id(p): p for p in parameters}.values())
        self._trained_buffers = frozenset(map(id, trained))
        self._shared = frozenset(known | {id(tensor) for tensor in hidden})
        self._registries = [registry for m in self.modules for registry in (m._parameters, m._modules)]
        self._registered = [tuple(registry.values()) for registry in self._registries]
        self._buffers = [m._buffers for m in self.modules]
        self._buffer_specs = [_buffer_spec(b) for b in self._all_buffers()]
        self._code = [_code(m) for m in self.modules]
        self._attributes = [dict(m.__dict__) for m in self.modules]
        classes = {cls for m in self.modules for cls in type(m).__mro__} | {*found.classes, *found_globals.classes}
        self._outside = [
            *(_Watched(vars(cls), _CLASS_DATA, _importable(cls)) for cls in classes if _is_users(cls)),
            *(_Watched(*each) for each in self._globals),
        ]
        """What the model's code reads outside the model."""
        self._empty: dict[int, list[Any]] = {}
        """Empty containers of each module, mostly registries of hooks: ``any`` over all of them finds a change."""
        self._names: dict[int, list[str]] = {}
        """Names of each module's attributes that can change in place."""
        self._digests: dict[tuple[int, str], Digest] = {}
        self._note_attributes(range(len(self.modules)))

    def buffers(self) -> list[torch.Tensor | None]:
        """Return the current buffers in order, ``None`` in place of those among ``parameters``."""
        return [None if id(buffer) in self._trained_buffers else buffer for buffer in self._all_buffers()]

    def tensors(self) -> list[torch.Tensor]:
        """Return the parameters, and the current buffers that are not ``None``."""
        return [*self.parameters, *(buffer for buffer in self.buffers() if buffer is not None)]

    def generators(self) -> list[Any]:
        """Return the random number generators that the model owns."""
        return self._digest.generators

    def namespaces(self) -> list[tuple[Namespace, dict[str, Any]]]:
        """Return what the model's code reads in classes and modules that workers import."""
        return self._changed_namespaces([watched for watched in self._outside if watched.owner is not None])

    def structure_unchanged(self) -> bool:
        """Return whether modules, parameters, code, and the shapes of buffers are the same."""
        for registry, known in zip(self._registries, self._registered, strict=True):
            if len(registry) != len(known) or not all(map(is_, registry.values(), known)):
                return False
        if [_code(m) for m in self.modules] != self._code:
            return False
        return list(map(_buffer_spec, self._all_buffers())) == self._buffer_specs

    def diff(self) -> ModelChanges | None:
        """Return what has changed, and update the snapshot; ``None`` if only the whole model describes it."""
        changes = self._replaced_attributes()
        if changes is None:
            return None
        edited: list[_Watched] = []
        if changes or Digest([watched.value() for watched in self._watched], self._shared) != self._digest:
            before = self._digests
            self._note_attributes(changes)
            if any(_is_trained(tensor) and self._can_share(tensor) for tensor in self._digest.tensors):
                return None  # workers need it as a parameter
            edited = [
                one for one in self._watched if before.get(one.key, self._digests[one.key]) != self._digests[one.key]
            ]
        if any(watched.owner is None for watched in edited):
            return None
        for watched in edited:
            if isinstance(watched.owner, int):
                changes.setdefault(watched.owner, {})[watched.name] = watched.value()
        if any(n in REGISTRIES or isinstance(v, nn.Module) for new in changes.values() for n, v in new.items()):
            return None
        state = {index: {k: v for k, v in new.items() if not _is_result(v)} for index, new in changes.items()}
        return ModelChanges(
            {index: values for index, values in state.items() if values},
            self._changed_namespaces([one for one in edited if not isinstance(one.owner, int)]),
        )

    def _replaced_attributes(self) -> dict[int, dict[str, Any]] | None:
        """Return attributes that are other objects now; ``None`` if an attribute was deleted."""
        changes: dict[int, dict[str, Any]] = {}
        for index, module in enumerate(self.modules):
            current, known = module.__dict__, self._attributes[index]
            if len(current) != len(known) or not all(map(is_, current.values(), known.values())):
                if current.keys() != known.keys() and not known.keys() <= current.keys():
                    return None
                changes[index] = {k: v for k, v in current.items() if k not in known or v is not known[k]}
                self._attributes[index] = dict(current)
        if any(self._all_empty):
            for index, filled in self._empty.items():
                for name, value in self.modules[index].__dict__.items():
                    if any(value is container for container in filled if container):
                        changes.setdefault(index, {})[name] = value
        return changes

    def _all_buffers(self) -> list[torch.Tensor | None]:
        return list(chain.from_iterable(buffers.values() for buffers in self._buffers))

    def _can_share(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor outside the registries can be treated as a parameter."""
        is_dense = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
        return is_dense and tensor.is_leaf and tensor.device == self._device and not tensor.is_quantized

    @staticmethod
    def _changed_namespaces(edited: Iterable[_Watched]) -> list[tuple[Namespace, dict[str, Any]]]:
        found = []
        for watched in edited:
            assert isinstance(watched.owner, type | str)
            value = watched.value()
            values = value if watched.name == _CLASS_DATA else {watched.name: value}
            if sendable := {n: v for n, v in values.items() if not isinstance(v, _NOT_DATA)}:
                found.append((watched.owner, sendable))
        return found

    def _note_attributes(self, indices: Iterable[int]) -> None:
        """Note the attributes of the modules with these indices, and the digest of everything."""
        for index in indices:
            self._names[index], self._empty[index] = [], []
            for name, value in self.modules[index].__dict__.items():
                if name in REGISTRIES:
                    continue
                if isinstance(value, dict | list | set) and not value:
                    self._empty[index].append(value)
                elif can_change(value):
                    self._names[index].append(name)
        self._all_empty = list(chain.from_iterable(self._empty.values()))
        attributes = (_Watched(self.modules[i].__dict__, n, i) for i, names in self._names.items() for n in names)
        self._watched, self._digests = [], {}
        by_identity: dict[int, tuple[Any, Digest]] = {}  # many modules hold the same configuration
        for watched in (*attributes, *self._outside):
            value = watched.value()
            _, digest = by_identity.setdefault(id(value), (value, Digest([value], self._shared)))
            if len(digest.data) <= MAX_NBYTES:
                self._watched.append(watched)
                self._digests[watched.key] = digest
            else:
                _warn_unwatched(watched, digest)
        self._digest = Digest([watched.value() for watched in self._watched], self._shared)


def set_namespaces(namespaces: list[tuple[Namespace, dict[str, Any]]]) -> None:
    """Give classes and modules that this process has imported the values that they have in rank 0."""
    for owner, values in namespaces:
        target = importlib.import_module(owner) if isinstance(owner, str) else owner
        for name, value in values.items():
            setattr(target, name, value)


_unwatched: set[tuple[Any, str]] = set()


def _warn_unwatched(watched: _Watched, digest: Digest) -> None:
    owner = "the model's attribute" if isinstance(watched.owner, int) else "the global variable"
    if watched.key in _unwatched:
        return
    _unwatched.add(watched.key)
    warnings.warn(
        f"{owner} {watched.name!r} holds {format_bytes(len(digest.data))} outside of tensors, so duoka does not look for "
        "changes inside it: workers keep its present content. Assign it anew after a change, or keep it in a tensor.",
        stacklevel=2,
    )


def _is_result(value: Any) -> bool:
    """Return whether a value is a tensor with a graph: a result of the last call, not state."""
    return isinstance(value, torch.Tensor) and value.grad_fn is not None


def _is_trained(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and tensor.is_leaf


def _buffer_spec(buffer: torch.Tensor | None) -> Any:
    """Return what must stay; of a trained buffer also the identity."""
    if buffer is None:
        return None
    return buffer.shape, buffer.dtype, buffer.device, id(buffer) if _is_trained(buffer) else 0


def _code(module: nn.Module) -> tuple[type, Any]:
    """Return the class and its forward; a notebook cell may redefine either."""
    return type(module), type(module).forward


_NOT_DATA = (FunctionType, CachedFunction, type, ModuleType, nn.Module)
"""What workers import with a module, and not a value to send."""


def _globals_used_by(code: Iterable[type | FunctionType]) -> Iterator[tuple[dict[str, Any], str, str | None]]:
    """Yield the globals that methods and functions of the user read, directly or not: namespace, name, owner.

    Workers receive code of the user's main module by value, with the values of its globals at that time. They import
    other modules, and find there the values of the import.
    """
    found: dict[tuple[int, str], tuple[dict[str, Any], str, str | None]] = {}
    classes = dict.fromkeys(base for one in code for base in (one.__mro__ if isinstance(one, type) else [one]))
    waiting = [function for one in classes for function in _functions_of(one)]
    seen: set[int] = set()
    while waiting:
        function = waiting.pop()
        if id(function) in seen or not _is_users(function):
            continue
        seen.add(id(function))
        for space, name in _global_names(function):
            module = space.get("__name__")
            is_imported = is_user_code(module) and module != "__main__"
            found[id(space), name] = space, name, module if is_imported else None
            waiting.extend(_functions_of(space[name]))
    yield from found.values()


def _global_names(function: FunctionType) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the globals that a function names, and the data that it reads in modules of the user."""
    space, names = function.__globals__, set(_names_in(function.__code__))
    for name in sorted(names & space.keys()):
        value = space[name]
        if not isinstance(value, ModuleType):
            yield space, name
        elif is_user_code(value.__name__):
            for inner in sorted(names & vars(value).keys()):
                if not isinstance(vars(value)[inner], _NOT_DATA):
                    yield vars(value), inner


def _functions_of(value: Any) -> Iterator[FunctionType]:
    if isinstance(value, FunctionType | CachedFunction):
        yield _without_cache(value)
    elif isinstance(value, type) and _is_users(value):
        for item in vars(value).values():
            inner = _without_cache(getattr(item, "__func__", getattr(item, "fget", item)))
            if isinstance(inner, FunctionType):
                yield inner


def _without_cache(value: Any) -> Any:
    return value.__wrapped__ if isinstance(value, CachedFunction) else value


def _is_users(value: Any) -> bool:
    """Return whether a class or function is the user's own code."""
    return _importable(value) is None or is_user_code(value.__module__)


def _importable(value: Any) -> Any:
    """Return a class or function if workers import it; ``None`` if they get it by value."""
    return None if value.__module__ == "__main__" or value.__module__ not in sys.modules else value


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
