"""Pickling between a process and its DataLoader workers, by value for classes that cannot be imported by name.

A DataLoader worker that is not forked cannot import classes of a script or notebook, nor can a worker process of
duoka's, where they are cloudpickle's copies. A result that cannot be pickled must become an error here:
multiprocessing would drop it, and the receiver would wait forever.
"""

import io
import pickle
import sys
from collections import ChainMap
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

import cloudpickle
from torch.utils.data import get_worker_info

from duoka.utils.torch_private import DataLoaderException


class PickledByValue:
    """Base of objects that workers get; their attributes are pickled by value where a name may not be importable."""

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (type(self),), _dumps(_WorkerPickler, self.__dict__)

    def __setstate__(self, attributes: bytes) -> None:
        self.__dict__.update(pickle.loads(attributes))


def wrap_result(function: Callable[[], Any]) -> Any:
    """Return ``function()``; in a worker, wrapped so that the value or the exception of ``function`` arrives."""
    if get_worker_info() is None:
        return function()
    try:
        return _Result(function())
    except Exception:
        return _Result(wrap_exception())


def wrap_exception() -> Any:
    """Return the exception being handled as torch sends it from a worker process, to be raised by the receiver."""
    info = get_worker_info()
    return DataLoaderException(where=f"in DataLoader worker process {info.id if info else 0}")


class _Result:
    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (_dumps(_ResultPickler, self._value),)


class _WorkerPickler(cloudpickle.Pickler):  # type: ignore[misc] # cloudpickle is not annotated
    """cloudpickle's pickler, which shares tensors, locks and values as multiprocessing's does."""

    dispatch_table: ClassVar[Any] = ChainMap(ForkingPickler._extra_reducers, cloudpickle.Pickler.dispatch_table)  # type: ignore[attr-defined]


class _ResultPickler(_WorkerPickler):
    """Pickles importable classes by name: a forked worker has the classes of the process that receives its result."""

    def reducer_override(self, obj: Any) -> Any:
        module = sys.modules.get(getattr(obj, "__module__", None) or "") if isinstance(obj, type) else None
        if module is not None and getattr(module, obj.__qualname__, None) is obj:
            return NotImplemented
        return super().reducer_override(obj)


def _dumps(pickler: type[_WorkerPickler], value: Any) -> bytes:
    file = io.BytesIO()
    pickler(file).dump(value)
    return file.getvalue()
