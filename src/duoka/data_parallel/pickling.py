"""Pickling of models and their attributes for workers, without the tensors that travel separately."""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from duoka.utils.torch_private import inject_parametrized_class
from duoka.workers.serialization import Payload, dumps

_CAPTURING = "transformers.utils.output_capturing"
"""Its hooks refer to a context variable of the process, so workers make their own."""
_CAPTURED = ("key", "index", "capture_initial_hidden_state")
_tensors: ContextVar[Sequence[torch.Tensor]] = ContextVar("duoka_placeholder_tensors")


def pickle_without_tensors(value: Any, tensors: Sequence[torch.Tensor]) -> Payload:
    """Pickle a model or attribute values; each of ``tensors`` is replaced by its index."""
    indices = {id(tensor): index for index, tensor in enumerate(tensors)}

    def replace(value: Any) -> Any:
        if isinstance(value, FunctionType) and value.__module__ == _CAPTURING:
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            return _new_capturing_hook, ({name: cell.cell_contents for name, cell in cells if name in _CAPTURED},)
        if isinstance(value, nn.DataParallel):
            return _identity, (value.module,)
        if isinstance(value, nn.Module) and parametrize.is_parametrized(value):
            names: Any = value.parametrizations
            return _new_parametrized, (type(value).__bases__[0], list(names)), dict(value.__dict__)
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        if id(value) in indices:
            return _placeholder_tensor, (indices[id(value)],)
        if value.grad_fn is not None:  # a result of an earlier call, stored in the model
            return _identity, (value.detach(),)
        return NotImplemented

    return dumps(value, replace)


@contextmanager
def placeholder_tensors(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let indices in pickles mean these tensors inside the ``with`` block."""
    token = _tensors.set(tensors)
    try:
        yield
    finally:
        _tensors.reset(token)


def _placeholder_tensor(index: int) -> torch.Tensor:
    return _tensors.get()[index]


def _identity(value: Any) -> Any:
    return value


def _new_capturing_hook(settings: dict[str, Any]) -> Any:
    """Return the hook with which transformers records hidden states and attentions."""
    module = nn.Module()
    importlib.import_module(_CAPTURING).install_output_capuring_hook(module, **settings)
    return next(iter(module._forward_hooks.values()))


def _new_parametrized(cls: type[nn.Module], names: list[str]) -> nn.Module:
    """Return an empty parametrized module; pickle refuses the class that ``parametrize`` makes."""
    module = cls.__new__(cls)
    inject_parametrized_class(module, names)
    return module
