"""A device that a program names means the device of whoever computes: ``cuda:0`` in a model's code, on the second GPU too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["RemapCuda", "is_cuda", "is_renaming", "renaming"]

__tracebackhide__ = True
"""Leaves this module's frames out of the traceback of a script under ``duoka run``."""

_renamings = 0


class RemapCuda(TorchFunctionMode):
    """Every ``cuda`` device that is named to a function of torch means one device; so does a number in its place."""

    def __init__(self, device: torch.device, count: int | None = None) -> None:
        """Let CUDA devices mean ``device``; where ``count`` is given there are only so many of them."""
        super().__init__()
        self._device, self._count = device, count
        self._own_ways: dict[Any, Callable[..., Any]] = {
            torch.Tensor.cuda: lambda tensor, device=None, *_, **__: tensor.to(self._own(device)),
            torch.Tensor.to: self._to,
            torch.Tensor.type: self._type,
        }
        if device.type == "cpu":  # which has nothing to gain from pinned memory
            self._own_ways[torch.Tensor.pin_memory] = lambda tensor, *_, **__: tensor

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function with its devices translated."""
        if kwargs:
            if (device := kwargs.get("device")) is not None and _names_cuda(device):
                kwargs = {**kwargs, "device": self._own(device)}
            if kwargs.get("pin_memory") and self._device.type == "cpu":
                kwargs = {**kwargs, "pin_memory": False}
        return self._own_ways.get(function, function)(*args, **(kwargs or {}))

    def _own(self, device: Any) -> torch.device:
        index = (device if isinstance(device, int) else torch.device(device or "cuda").index) or 0
        if self._count is not None and index >= self._count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}: this run has {self._count} devices")
        return self._device

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (self._own(args[0]), *args[1:])
        return tensor.to(*args, **kwargs)

    def _type(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call ``tensor.type("torch.cuda.FloatTensor")``, which changes the device, too."""
        if args and isinstance(args[0], str) and args[0].startswith("torch.cuda."):
            return tensor.type(args[0].replace("torch.cuda.", "torch."), *args[1:], **kwargs).to(self._device)
        return tensor.type(*args, **kwargs)


def _names_cuda(device: object) -> bool:
    return is_cuda(device) or (isinstance(device, int) and not isinstance(device, bool))


def is_cuda(device: object) -> bool:
    """Whether this names a CUDA device: ``"cuda"``, ``"cuda:1"`` or ``torch.device("cuda")``."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.partition(":")[0] == "cuda"


@contextlib.contextmanager
def renaming() -> Iterator[None]:
    """Let helpers take every CUDA device that a model's code names for their own, inside the ``with`` block."""
    global _renamings
    _renamings += 1
    try:
        yield
    finally:
        _renamings -= 1


def is_renaming() -> bool:
    """Whether helpers shall do so."""
    return _renamings > 0
