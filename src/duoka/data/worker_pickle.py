"""What a process and its data-loader workers send each other: classes that only a script, a notebook or a launch knows too.

multiprocessing pickles classes and functions as names. In a helper process those of the user's script are cloudpickle's copies,
which no name leads to, and a worker that is not forked knows none of a notebook either. An answer that cannot be pickled is
worse than an error: multiprocessing drops it, and whoever waits for it waits for ever.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import ChainMap
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

import cloudpickle
from torch._utils import ExceptionWrapper
from torch.utils.data import get_worker_info

__all__ = ["PickledByValue", "wrap_exception", "wrap_result"]


class PickledByValue:
    """Base of what workers are given: its attributes are pickled by value where a name may lead nowhere."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (type(self), _dumps(_WorkerPickler, self.__dict__))


def wrap_result(work: Callable[[], Any]) -> Any:
    """Return ``work()``; in a worker process, as something that arrives as the value or the exception of ``work()``."""
    if get_worker_info() is None:
        return work()
    try:
        return _Result(work())
    except Exception:
        return _Result(wrap_exception())


def wrap_exception() -> ExceptionWrapper:
    """Return the exception that is being handled in a worker process as torch sends it: to be raised where it arrives."""
    info = get_worker_info()
    return ExceptionWrapper(where=f"in DataLoader worker process {info.id if info else 0}")  # type: ignore[no-untyped-call]


class _Result:
    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (_dumps(_ResultPickler, self._value),)


class _WorkerPickler(cloudpickle.Pickler):  # type: ignore[misc] # cloudpickle is not annotated
    """cloudpickle's, with multiprocessing's ways to share tensors, locks and values instead of copying them."""

    dispatch_table: ClassVar[Any] = ChainMap(ForkingPickler._extra_reducers, cloudpickle.Pickler.dispatch_table)  # type: ignore[attr-defined]


class _ResultPickler(_WorkerPickler):
    """Names what has a name here: a forked worker's classes are those of the process that it answers."""

    def reducer_override(self, obj: Any) -> Any:
        module = sys.modules.get(getattr(obj, "__module__", None) or "") if isinstance(obj, type) else None
        if module is not None and getattr(module, obj.__qualname__, None) is obj:
            return NotImplemented
        return super().reducer_override(obj)


def _dumps(pickler: type[_WorkerPickler], value: Any) -> bytes:
    file = io.BytesIO()
    pickler(file).dump(value)
    return file.getvalue()


def _unpickle(kind: type[PickledByValue], attributes: bytes) -> PickledByValue:
    thing = object.__new__(kind)
    thing.__dict__.update(pickle.loads(attributes))
    return thing
