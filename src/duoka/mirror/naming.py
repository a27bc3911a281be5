"""A device that a program names means the device of whoever computes: ``cuda:0`` in a model's code, on the second GPU too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["OwnDevice", "is_cuda", "is_renaming", "renaming"]

_renamings = 0


class OwnDevice(TorchFunctionMode):
    """Every ``cuda`` device that is named to a function of torch means one device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function with its devices translated."""
        if kwargs and (device := kwargs.get("device")) is not None and is_cuda(device):
            kwargs = {**kwargs, "device": self._device}
        if function is torch.Tensor.cuda:
            return args[0].to(self._device)
        if function is torch.Tensor.to:
            args = tuple(self._device if is_cuda(word) else word for word in args)
        return function(*args, **(kwargs or {}))


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
