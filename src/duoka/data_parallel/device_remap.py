"""Remapping of CUDA devices: ``cuda:0`` in a model's code means the device that runs the code."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__tracebackhide__ = True
"""Hides this module's frames from the traceback of a script under ``duoka run``."""

_active = 0


class RemapCuda(TorchFunctionMode):
    """Replaces every ``cuda`` device or device number in calls of torch functions by one device."""

    def __init__(self, device: torch.device, count: int | None = None) -> None:
        """Let CUDA devices mean ``device``; an index of ``count`` or more is an error."""
        super().__init__()
        self._device, self._count = device, count
        self._replacements: dict[Any, Callable[..., Any]] = {
            torch.Tensor.cuda: lambda tensor, device=None, *_, **__: tensor.to(self._remap(device)),
            torch.Tensor.to: self._to,
            torch.Tensor.type: self._type,
        }
        if device.type == "cpu":  # pinned memory would gain nothing
            self._replacements[torch.Tensor.pin_memory] = lambda tensor, *_, **__: tensor

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function with remapped devices."""
        if kwargs:
            if (device := kwargs.get("device")) is not None and _names_cuda(device):
                kwargs = {**kwargs, "device": self._remap(device)}
            if kwargs.get("pin_memory") and self._device.type == "cpu":
                kwargs = {**kwargs, "pin_memory": False}
        return self._replacements.get(function, function)(*args, **(kwargs or {}))

    def _remap(self, device: Any) -> torch.device:
        index = (device if isinstance(device, int) else torch.device(device or "cuda").index) or 0
        if self._count is not None and index >= self._count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}: this run has {self._count} devices")
        return self._device

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (self._remap(args[0]), *args[1:])
        return tensor.to(*args, **kwargs)

    def _type(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call ``tensor.type("torch.cuda.FloatTensor")``, which also moves the tensor."""
        if args and isinstance(args[0], str) and args[0].startswith("torch.cuda."):
            return tensor.type(args[0].replace("torch.cuda.", "torch."), *args[1:], **kwargs).to(self._device)
        return tensor.type(*args, **kwargs)


def _names_cuda(device: object) -> bool:
    return is_cuda(device) or (isinstance(device, int) and not isinstance(device, bool))


def is_cuda(device: object) -> bool:
    """Return whether this names a CUDA device: ``"cuda"``, ``"cuda:1"`` or ``torch.device("cuda")``."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.partition(":")[0] == "cuda"


@contextlib.contextmanager
def remap_cuda() -> Iterator[None]:
    """Remap CUDA devices in workers, for calls inside the ``with`` block."""
    global _active
    _active += 1
    try:
        yield
    finally:
        _active -= 1


def is_remapping() -> bool:
    """Return whether a ``remap_cuda`` block is active."""
    return _active > 0
