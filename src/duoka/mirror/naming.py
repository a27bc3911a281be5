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

    def __init__(self, device: torch.device, count: int | None = None) -> None:
        """Let CUDA devices mean ``device``; where ``count`` is given there are only so many of them."""
        super().__init__()
        self._device, self._count = device, count

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function with its devices translated."""
        if kwargs and (device := kwargs.get("device")) is not None and is_cuda(device):
            kwargs = {**kwargs, "device": self._own(device)}
        if function is torch.Tensor.cuda:
            return args[0].to(self._device)
        if function is torch.Tensor.to:
            args = tuple(self._own(word) if is_cuda(word) else word for word in args)
        return function(*args, **(kwargs or {}))

    def _own(self, device: Any) -> torch.device:
        index = torch.device(device).index or 0
        if self._count is not None and index >= self._count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}: this run has {self._count} devices")
        return self._device


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
