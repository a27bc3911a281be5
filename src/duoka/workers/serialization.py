"""Payloads between processes: cloudpickle, with the bytes of tensors and arrays in a memory file.

The sender writes the bytes of tensors and NumPy arrays once, for any number of workers. A receiver maps the file
copy-on-write: reading needs no copy, and a write stays in the process that made it. A payload is therefore a value, and
a data set of 2 GB takes 2 GB more for all workers together.
"""

import contextlib
import copy
import functools
import importlib
import io
import itertools
import mmap
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import cloudpickle
import torch
from torch.utils.data import DataLoader

from duoka.utils.library_files import is_library_file
from duoka.utils.torch_private import forget_loaded_sparse_tensors, storage_id, take_dataloader_iterator
from duoka.workers.resource_limits import explain_resource_errors

_CachedFunction = type(functools.cache(len))
_MAPPED_FROM_BYTES = 1 << 20
_receiver: ContextVar[torch.device] = ContextVar("duoka_receiver", default=torch.device("cpu"))


@dataclass(frozen=True)
class Payload:
    """A pickled object: ``data``, and the sizes in bytes of the page-aligned buffers in the memory file ``fd``."""

    data: bytes
    sizes: tuple[int, ...] = ()
    fd: int | None = None

    def close(self) -> None:
        """Close this process's descriptor of the memory file; receivers keep their mappings."""
        if self.fd is not None:
            os.close(self.fd)


def dumps(value: Any, replace: Callable[[Any], Any] | None = None) -> Payload:
    """Pickle ``value``, with functions and classes of ``__main__`` by value; raises what pickling raises.

    ``replace(object)`` may return a tuple like that of ``__reduce__`` to pickle instead, or ``NotImplemented``.
    """
    file = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []

    def keep_large(buffer: pickle.PickleBuffer) -> bool:
        if buffer.raw().nbytes < _MAPPED_FROM_BYTES:
            return True  # small buffers stay in the pickle
        buffers.append(buffer)
        return False

    _PayloadPickler(file, keep_large, replace).dump(value)
    if not buffers:
        return Payload(file.getvalue())
    views = [buffer.raw() for buffer in buffers]
    return Payload(file.getvalue(), tuple(view.nbytes for view in views), _write(views))


def loads(payload: Payload, device: torch.device) -> Any:
    """Rebuild the object: tensors from an accelerator on ``device``, all others on the CPU."""
    token = _receiver.set(device)
    try:
        return pickle.loads(payload.data, buffers=_map(payload))
    finally:
        _receiver.reset(token)
        forget_loaded_sparse_tensors()


def load_and_close(payload: Payload, device: torch.device) -> Any:
    """Rebuild the object as ``loads`` does, and close the payload, even if the object cannot be rebuilt."""
    with contextlib.closing(payload):
        return loads(payload, device)


def memory_file(name: str) -> int:
    """Return the descriptor of an anonymous file in memory, or of an unlinked temporary file where there are none."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    with tempfile.TemporaryFile(prefix=name) as file:
        return os.dup(file.fileno())


class _PayloadPickler(cloudpickle.Pickler):  # type: ignore[misc] # cloudpickle is not annotated
    def __init__(
        self,
        file: io.BytesIO,
        keep_large: Callable[[pickle.PickleBuffer], bool],
        replace: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=keep_large)
        self._replace = replace
        self._storages: dict[int, _Storage] = {}

    def reducer_override(self, obj: Any) -> Any:
        if self._replace is not None and (other := self._replace(obj)) is not NotImplemented:
            return other
        if type(obj) is torch.storage.TypedStorage and obj._untyped_storage.device.type != "meta":
            storage = obj._untyped_storage
            handle = self._storages.setdefault(storage_id(storage), _Storage(storage))
            return _typed_storage, (handle, obj.dtype)
        if isinstance(obj, torch.jit.ScriptFunction):
            return _script_function, (obj.save_to_buffer({}),)
        if isinstance(obj, _CachedFunction) and not _is_importable(obj):
            return _cached_function, (obj.__wrapped__, obj.cache_parameters())
        if type(obj) is torch.Generator:
            return _generator, (obj.device, obj.get_state())
        if isinstance(obj, ModuleType) and type(obj) is not ModuleType and sys.modules.get(obj.__name__) is obj:
            return importlib.import_module, (obj.__name__,)  # torch.backends.cudnn, torch.ops: subclasses of ModuleType
        if isinstance(obj, DataLoader):
            idle = copy.copy(obj)
            take_dataloader_iterator(idle)  # persistent DataLoader processes stay with the original
            return idle.__reduce_ex__(5)
        return super().reducer_override(obj)

    def _dynamic_function_reduce(self, func: FunctionType) -> tuple[Any, ...]:
        """Let a function of an installed library use the library's globals in the receiver, not copies of them."""
        make, arguments, state, *rest = super()._dynamic_function_reduce(func)
        if _is_in_installed_library(func):
            arguments = (arguments[0], _Globals(func.__module__), *arguments[2:])
            state[1]["__globals__"] = {}
        return make, arguments, state, *rest


class _Globals:
    """Stands for the globals of a module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return _globals_of, (self.name,)


def _globals_of(name: str) -> dict[str, Any]:
    return importlib.import_module(name).__dict__


def _is_in_installed_library(func: FunctionType) -> bool:
    module = sys.modules.get(func.__module__)
    file = getattr(module, "__file__", None)
    is_installed = isinstance(file, str) and is_library_file(file)
    return is_installed and func.__globals__ is vars(module) and func.__module__ != "__main__"


class _Storage:
    """Stands for one storage in the pickle, so that tensors that share it also share it in the receiver."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        host: torch.UntypedStorage = self.storage.cpu()  # type: ignore[no-untyped-call]
        array: Any = torch.empty(0, dtype=torch.uint8).set_(host).numpy()
        return _untyped_storage, (pickle.PickleBuffer(array), self.storage.device.type)


def _typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def _untyped_storage(buffer: Any, device_type: str) -> torch.UntypedStorage:
    view = memoryview(buffer)
    if view.nbytes == 0:
        tensor = torch.empty(0, dtype=torch.uint8)
    elif view.readonly:  # it was in the pickle itself
        tensor = torch.frombuffer(bytearray(view), dtype=torch.uint8)
    else:
        tensor = torch.frombuffer(view, dtype=torch.uint8)
    if view.nbytes < _MAPPED_FROM_BYTES:
        tensor = tensor.clone()  # ordinary memory, which can be resized
    return (tensor if device_type == "cpu" else tensor.to(_receiver.get())).untyped_storage()


def _is_importable(obj: Any) -> bool:
    """Return whether a receiver finds an object by the name of its module and its own; it has another ``__main__``."""
    module = None if obj.__module__ == "__main__" else sys.modules.get(obj.__module__)
    return functools.reduce(lambda owner, name: getattr(owner, name, None), obj.__qualname__.split("."), module) is obj


def _cached_function(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _script_function(data: bytes) -> Any:
    return torch.jit.load(io.BytesIO(data))  # type: ignore[no-untyped-call]


def _generator(device: torch.device, state: torch.Tensor) -> torch.Generator:
    return torch.Generator(device if device.type == "cpu" else _receiver.get()).set_state(state)


def _page_offsets(sizes: Iterable[int]) -> list[int]:
    """Return the offset of each buffer in the memory file, and the end of the last; each begins on a page."""
    return list(itertools.accumulate((-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes), initial=0))


def _write(views: Sequence[memoryview]) -> int:
    *offsets, end = _page_offsets(view.nbytes for view in views)
    with explain_resource_errors("send tensors to another process"), contextlib.ExitStack() as on_failure:
        fd = memory_file("duoka-payload")
        on_failure.callback(os.close, fd)
        os.ftruncate(fd, end)
        with os.fdopen(fd, "wb", closefd=False) as file:
            for view, offset in zip(views, offsets, strict=True):
                file.seek(offset)
                file.write(view)
        on_failure.pop_all()
    return fd


def _map(payload: Payload) -> Iterable[memoryview]:
    if payload.fd is None:
        return []
    with explain_resource_errors("receive tensors from another process"):
        view = memoryview(mmap.mmap(payload.fd, 0, access=mmap.ACCESS_COPY))
    offsets = _page_offsets(payload.sizes)
    return [view[offset : offset + size] for offset, size in zip(offsets, payload.sizes, strict=False)]
