"""Copies of a module within this process: they share its parameters, and nothing that a forward may change."""

import copy
import io
import pickle
import weakref
from collections.abc import Mapping
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from duoka.data_parallel.state_watch import is_user_code


class ModuleCopies:
    """Makes copies of a module as it is now.

    A copy has the parameters themselves. Its other tensors, generators, objects, and the closures of the user's
    functions are copies; classes, modules of Python and global variables are the same objects. (cloudpickle would
    replace the methods of a class of ``__main__`` when it loads an object.)
    """

    def __init__(self, module: nn.Module, replacements: Mapping[int, Any] | None = None) -> None:
        """Record ``module``; raises what pickle raises for an object that cannot be copied.

        ``replacements`` are what all copies have in place of objects, by the objects' ids.
        """
        self._replacements = replacements or {}
        self._kept: list[Any] = []
        file = io.BytesIO()
        _Pickler(file, self._kept, self._replacements).dump(module)
        self._data = file.getvalue()

    def make(self) -> Any:
        """Return a new copy."""
        return _Unpickler(io.BytesIO(self._data), self._kept, self._replacements).load()


class _Pickler(pickle.Pickler):
    """Pickles for this process: what need not be pickled is kept in a list."""

    def __init__(self, file: io.BytesIO, kept: list[Any], replacements: Mapping[int, Any]) -> None:
        super().__init__(file, protocol=5)
        self._kept, self._replacements = kept, replacements

    def persistent_id(self, obj: Any) -> int | None:
        """Return the place of an object in the list; ``None`` if it is pickled."""
        is_plain_function = isinstance(obj, FunctionType) and not _has_own_state(obj)
        is_kept = is_plain_function or isinstance(obj, _KEPT) or hasattr(type(obj), "__deepcopy__")
        if not is_kept and id(obj) not in self._replacements:
            return None
        self._kept.append(obj.value if isinstance(obj, _Kept) else obj)
        return len(self._kept) - 1

    def reducer_override(self, obj: Any) -> Any:
        """Return the parts of modules, functions and cells, which pickle would refuse or look up by name."""
        if isinstance(obj, nn.Module):
            return object.__new__, (type(obj),), dict(obj.__dict__), None, None, _set_attributes
        if isinstance(obj, MethodType):  # by name, pickle would find the class's method in place of an object's own
            return MethodType, (obj.__func__, obj.__self__)
        if isinstance(obj, FunctionType):
            return _copy_function, (_Kept(obj), obj.__closure__, obj.__defaults__, obj.__kwdefaults__), obj.__dict__
        if isinstance(obj, CellType):
            try:
                return CellType, (), obj.cell_contents, None, None, _set_cell
            except ValueError:  # empty
                return CellType, ()
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, kept: list[Any], replacements: Mapping[int, Any]) -> None:
        super().__init__(file)
        self._kept = kept
        self._copies = dict(replacements)

    def persistent_load(self, pid: Any) -> Any:
        kept = self._kept[pid]
        if id(kept) not in self._copies:
            self._copies[id(kept)] = self._copy(kept)
        return self._copies[id(kept)]

    def _copy(self, kept: Any) -> Any:
        if isinstance(kept, torch.Generator):
            copied = torch.Generator(kept.device)
            copied.set_state(kept.get_state())
            return copied
        if isinstance(kept, torch.Tensor):
            return kept if isinstance(kept, nn.Parameter) else kept.detach().clone()
        if isinstance(kept, type) or not hasattr(type(kept), "__deepcopy__"):
            return kept
        return copy.deepcopy(kept, self._copies)


class _Kept:
    def __init__(self, value: Any) -> None:
        self.value = value


_KEPT = (_Kept, type, ModuleType, torch.Tensor, torch.Generator, weakref.ref)


def _has_own_state(function: FunctionType) -> bool:
    is_users = function.__module__ == "__main__" or is_user_code(function.__module__)
    return is_users and (function.__closure__ is not None or bool(function.__dict__))


def _copy_function(original: FunctionType, closure: Any, defaults: Any, kwdefaults: Any) -> FunctionType:
    copied = FunctionType(original.__code__, original.__globals__, original.__name__, defaults, closure)
    copied.__kwdefaults__ = kwdefaults
    copied.__module__, copied.__qualname__ = original.__module__, original.__qualname__
    return copied


def _set_attributes(module: nn.Module, attributes: dict[str, Any]) -> None:
    module.__dict__.update(attributes)


def _set_cell(cell: CellType, contents: Any) -> None:
    cell.cell_contents = contents
