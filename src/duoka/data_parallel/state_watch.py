"""Digest of mutable values: what a model's attributes, its classes and its code's globals hold, at any depth.

Pickle walks the values in C; ``_Walker`` tells it what stands for tensors, modules and other objects. Two digests
are equal exactly if nothing has changed that a worker would have to know. A value whose digest is larger than
``MAX_NBYTES`` is not watched.
"""

import functools
import io
import logging
import pickle
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from duoka.utils.library_files import is_library_file

MAX_NBYTES = 1 << 20
"""Largest digest of one value: a megabyte takes about 0.2 ms."""
_ATOMS = (
    int, float, str, bool, bytes, complex, type(None), range, torch.dtype, torch.device, torch.Size, torch.layout,
    torch.memory_format,
)  # fmt: skip
_OPAQUE = (ModuleType, torch.dtype, torch.device, torch.optim.Optimizer, DataLoader, logging.Logger)
"""Compared by identity."""
CachedFunction = type(functools.cache(len))
"""Class of functions with ``functools.lru_cache`` or ``functools.cache``."""
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


class Digest:
    """The digest of some values, and what they refer to."""

    def __init__(self, values: Sequence[Any], shared: frozenset[int] = frozenset()) -> None:
        """Compute the digest; ``shared`` are the ids of tensors and modules whose changes others watch."""
        file = io.BytesIO()
        walker = _Walker(file, shared)
        walker.dump(values)
        self.data = file.getvalue()
        self.tensors = walker.tensors
        self.generators = walker.generators
        self.classes = walker.classes
        self.functions = walker.functions
        self._kept = walker.kept  # identities in the digest stay unique as long as the objects live

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digest) and other.data == self.data

    __hash__ = None  # type: ignore[assignment]


def can_change(value: Any) -> bool:
    """Return whether a value can change in place; others are compared by identity."""
    if isinstance(value, tuple | frozenset):
        return any(map(can_change, value))
    if isinstance(value, FunctionType):
        return value.__closure__ is not None or bool(value.__dict__)
    if isinstance(value, type):
        return value.__module__ == "__main__" or is_user_code(value.__module__)
    return not isinstance(value, _ATOMS) and not isinstance(value, ModuleType | nn.Module)


def is_user_code(module_name: str | None) -> bool:
    """Return whether a module belongs to the user, and neither to an installed library nor to Python."""
    module = sys.modules.get(module_name or "")
    file = getattr(module, "__file__", None)
    if module_name is None or module_name.split(".")[0] in ("duoka", "torch"):
        return False
    return isinstance(file, str) and not is_library_file(file)


class _Walker(pickle.Pickler):
    """Pickles identities and contents; nothing ever loads the result.

    Contents are the state of a reduction, so that an object may contain itself.
    """

    def __init__(self, file: io.BytesIO, shared: frozenset[int]) -> None:
        super().__init__(file, protocol=5)
        self._shared = shared
        self.tensors: list[torch.Tensor] = []
        self.generators: list[Any] = []
        self.classes: list[type] = []
        self.functions: list[FunctionType] = []
        self.kept: list[Any] = []

    def reducer_override(self, obj: Any) -> Any:
        """Return what stands for ``obj``."""
        if obj is _noted:
            return NotImplemented
        if id(obj) in self._shared:
            return _noted, (id(obj),)
        self.kept.append(obj)
        if isinstance(obj, torch.Tensor):
            return self._tensor(obj)
        if isinstance(obj, nn.Module):
            return _noted, (id(obj),), obj.__dict__
        if isinstance(obj, type):
            return self._class(obj)
        if isinstance(obj, FunctionType):
            self.functions.append(obj)
            return _noted, (id(obj),), (_cells(obj), obj.__defaults__, obj.__kwdefaults__, obj.__dict__)
        if isinstance(obj, CachedFunction):
            return _noted, (id(obj),), (obj.__wrapped__,)
        if isinstance(obj, MethodType):
            return _noted, (), (obj.__func__, obj.__self__)
        if isinstance(obj, GENERATORS):
            self.generators.append(obj)
            return _noted, (id(obj),)
        if isinstance(obj, _OPAQUE):
            return _noted, (id(obj),)
        return self._object(obj)

    def _tensor(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        self.tensors.append(tensor)
        address = tensor.data_ptr() if tensor.layout is torch.strided and not tensor.is_meta else 0
        version = -1 if tensor.is_inference() else tensor._version
        return _noted, (id(tensor), version, address, tensor.requires_grad)

    def _class(self, cls: type) -> tuple[Any, ...]:
        if cls.__module__ != "__main__" and not is_user_code(cls.__module__):
            return _noted, (id(cls),)
        self.classes.append(cls)
        return _noted, (id(cls),), dict(class_data(vars(cls)))

    def _object(self, obj: Any) -> tuple[Any, ...]:
        """Return an object's class, attributes and slots, or what its own reduction gives."""
        cls: Any = type(obj)
        is_plain = cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__
        if is_plain and getattr(cls, "__getstate__", None) is getattr(object, "__getstate__", None):
            return _noted, (id(obj),), (cls, getattr(obj, "__dict__", None), list(_slots(obj)))
        try:
            reduced = obj.__reduce_ex__(5)
        except Exception:  # it has no content that pickle knows: a lock, a file
            return _noted, (id(obj),)
        if isinstance(reduced, str):
            return _noted, (id(obj),)
        function, *rest = reduced
        return _noted, (), (function, *(list(part) if hasattr(part, "__next__") else part for part in rest[:4]))


def class_data(contents: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield names and values of the data in a class, ``vars(cls)``, without methods and descriptors."""
    if "_member_map_" in contents:  # an Enum, whose members do not change
        return
    for name, value in contents.items():
        is_special = name.startswith(("__", "_abc_"))
        if not is_special and not hasattr(value, "__get__") and not isinstance(value, FunctionType | type):
            yield name, value


def _noted(*_: Any) -> None:
    """Stand for an object in a digest."""


def _cells(function: FunctionType) -> list[Any]:
    contents = []
    for cell in function.__closure__ or ():
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            contents.append(None)
    return contents


def _slots(obj: Any) -> Iterator[tuple[str, Any]]:
    for cls in type(obj).__mro__:
        names = cls.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if hasattr(obj, name):
                yield name, getattr(obj, name)
