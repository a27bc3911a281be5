"""Parameters and buffers in shared memory, so that CPU workers see new values without a transfer.

A parameter with a storage of its own moves into shared memory once; workers see every later change,
edits through ``.data`` included. A parameter whose storage is referenced elsewhere (a state dict
taken earlier, an embedding built from a tensor, a view of a flat vector) stays in place, and rank 0
copies it for workers before each call. Buffers are copied too, because a call changes them while
workers still read them; so are all parameters of a model whose forward writes to its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from duoka.data_parallel.messages import ParameterPlacement
from duoka.data_parallel.tensor_layout import Location, TensorSpec, dense_stride, pack_layout, tensor_at
from duoka.data_parallel.transport.base import WeightSync
from duoka.data_parallel.transport.shared_memory import SharedArena
from duoka.errors import DeviceError
from duoka.utils.torch_private import storage_use_count


class SharedWeightSync(WeightSync):
    """Places each parameter and buffer of one model in shared memory."""

    placements: tuple[_Placement, ...]
    """Replaced, never modified: a call that holds them keeps the memory that it uses."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        buffers: Sequence[torch.Tensor | None],
        weights: SharedArena,
        traffic: SharedArena,
        *,
        copies_all: bool,
    ) -> None:
        super().__init__(parameters)
        self.copies_all = copies_all
        self._weights = weights
        self.placements = tuple(self._place(parameter) for parameter in parameters)
        self.gradient_layout = shared_gradient_layout(parameters)
        specs, size = pack_layout(buffer for buffer in buffers if buffer is not None)
        allocation = traffic.allocate(size)
        self._buffer_copies = [tensor_at(allocation.base, spec) for spec in specs]
        rest = iter(specs)
        self.buffer_placements = tuple(
            None if buffer is None else (allocation.location, next(rest)) for buffer in buffers
        )

    @property
    def parameter_placements(self) -> tuple[ParameterPlacement, ...]:
        """Location, spec and ``requires_grad`` of each parameter."""
        return tuple((p.location, p.spec, p.requires_grad) for p in self.placements)

    def detect_changes(self) -> list[int]:
        """Place anew each parameter that has become another tensor, and return the indices."""
        pairs = list(zip(self.parameters, self.placements, strict=True))
        changed = [index for index, (parameter, placement) in enumerate(pairs) if not placement.fits(parameter)]
        if changed:
            self.placements = tuple(old if old.fits(parameter) else self._place(parameter) for parameter, old in pairs)
            self.gradient_layout = shared_gradient_layout(self.parameters)
        return changed

    def push(self, buffers: Sequence[torch.Tensor | None], *, training: bool) -> None:  # noqa: ARG002
        """Copy buffers, and parameters that stay in place, to shared memory."""
        sources = [buffer for buffer in buffers if buffer is not None]
        targets = list(self._buffer_copies)
        for parameter, placement in zip(self.parameters, self.placements, strict=True):
            if placement.copy is not None:
                sources.append(parameter)
                targets.append(placement.copy)
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def _place(self, parameter: nn.Parameter) -> _Placement:
        if parameter.device.type != "cpu":
            raise DeviceError(
                f"devices are CPU workers, but a parameter of shape {tuple(parameter.shape)} is on {parameter.device}. "
                "Move the model to the CPU, or give duoka.DataParallel the model's devices."
            )
        (spec,), size = pack_layout([parameter])
        if not self.copies_all:
            location = self._weights.find(parameter)
            if location is None and _has_own_storage(parameter):
                location = self._move(parameter, spec)
            if location is not None:
                return _Placement(parameter, location, spec._replace(stride=parameter.stride()), None)
        allocation = self._weights.allocate(size)
        return _Placement(parameter, allocation.location, spec, tensor_at(allocation.base, spec))

    def _move(self, parameter: nn.Parameter, spec: TensorSpec) -> Location:
        allocation = self._weights.allocate(parameter.untyped_storage().nbytes())
        view = tensor_at(allocation.base, spec)
        view.copy_(parameter.data)
        parameter.data = view
        return allocation.location


def shared_gradient_layout(parameters: Sequence[nn.Parameter]) -> tuple[list[TensorSpec | None], int]:
    """Return where the gradients of parameters that require one lie, and their total size."""
    specs, size = pack_layout(parameter for parameter in parameters if parameter.requires_grad)
    rest = iter(specs)
    return [next(rest) if parameter.requires_grad else None for parameter in parameters], size


class _Placement:
    """Where workers find one parameter, and what identifies the parameter as the same tensor."""

    __slots__ = ("_data", "_dtype", "_pointer", "_shape", "copy", "location", "requires_grad", "spec")

    def __init__(
        self, parameter: nn.Parameter, location: Location, spec: TensorSpec, copy: torch.Tensor | None
    ) -> None:
        self.location, self.spec, self.copy = location, spec, copy
        self.requires_grad = parameter.requires_grad
        self._data = parameter.data  # keeps the memory allocated while a worker may read it
        self._shape, self._dtype, self._pointer = parameter.shape, parameter.dtype, parameter.data_ptr()

    def fits(self, parameter: nn.Parameter) -> bool:
        """Return whether shape, dtype, ``requires_grad`` and, if shared, the memory are unchanged."""
        return (
            (self.copy is not None or parameter.data_ptr() == self._pointer)
            and parameter.requires_grad == self.requires_grad
            and parameter.shape == self._shape
            and parameter.dtype == self._dtype
        )


def _has_own_storage(parameter: nn.Parameter) -> bool:
    """Return whether nothing else uses the parameter's storage, so that moving it has no side effect."""
    storage = parameter.untyped_storage()
    if storage.nbytes() != parameter.numel() * parameter.element_size() or storage.nbytes() == 0:
        return False
    if parameter.stride() != dense_stride(parameter):
        return False
    return storage_use_count(storage) <= 2  # the parameter, and the name `storage` here
