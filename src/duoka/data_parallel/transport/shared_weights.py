"""Parameters and buffers in shared memory, so that CPU workers see new values without a transfer.

A parameter with a storage of its own moves into shared memory once; workers see every later change,
edits through ``.data`` included. A parameter whose storage is referenced elsewhere (a state dict
taken earlier, an embedding built from a tensor, a view of a flat vector) stays in place, and rank 0
copies it for workers before each call. Buffers are copied too, because a call changes them while
workers still read them; so are all parameters of a model whose forward writes to its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from duoka.data_parallel.messages import ParameterPlacement
from duoka.data_parallel.model_diff import ModelSnapshot
from duoka.data_parallel.tensor_layout import Location, TensorSpec, dense_stride, pack_layout, pack_present, tensor_at
from duoka.data_parallel.transport.base import WeightSync
from duoka.data_parallel.transport.shared_memory import SharedArena
from duoka.errors import DeviceError
from duoka.utils.torch_private import storage_use_count


class SharedWeightSync(WeightSync):
    """Places each parameter and buffer of one model in shared memory."""

    placements: tuple[_Placement, ...]
    """Replaced, never modified: a call that holds them keeps the memory that it uses."""

    def __init__(
        self, snapshot: ModelSnapshot, weights: SharedArena, traffic: SharedArena, *, copies_all: bool
    ) -> None:
        super().__init__(snapshot)
        self.copies_all = copies_all
        self._weights = weights
        self.placements = tuple(self._place(parameter) for parameter in self.parameters)
        self.gradient_layout = shared_gradient_layout(self.parameters)
        specs, size = pack_present(snapshot.buffers())
        allocation = traffic.allocate(size)
        self._buffer_copies = [tensor_at(allocation.base, spec) for spec in specs if spec is not None]
        self.buffer_placements = tuple(None if spec is None else (allocation.location, spec) for spec in specs)

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

    def push(self, *, training: bool) -> None:  # noqa: ARG002
        """Copy buffers, and parameters that stay in place, to shared memory."""
        sources = [buffer for buffer in self.snapshot.buffers() if buffer is not None]
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
                spec = spec._replace(stride=parameter.stride())
                return _Placement(location, spec, parameter.requires_grad, parameter.data, parameter.data_ptr(), None)
        location, base = self._weights.allocate(size)
        return _Placement(location, spec, parameter.requires_grad, parameter.data, 0, tensor_at(base, spec))

    def _move(self, parameter: nn.Parameter, spec: TensorSpec) -> Location:
        allocation = self._weights.allocate(parameter.untyped_storage().nbytes())
        view = tensor_at(allocation.base, spec)
        view.copy_(parameter.data)
        parameter.data = view
        return allocation.location


def shared_gradient_layout(parameters: Sequence[nn.Parameter]) -> tuple[list[TensorSpec | None], int]:
    """Return where the gradients of parameters that require one lie, and their total size."""
    return pack_present(parameter if parameter.requires_grad else None for parameter in parameters)


class _Placement(NamedTuple):
    """Where workers find one parameter, and what identifies the parameter as the same tensor."""

    location: Location
    spec: TensorSpec
    requires_grad: bool
    data: torch.Tensor
    """Keeps the memory allocated while a worker may read it."""
    pointer: int
    copy: torch.Tensor | None

    def fits(self, parameter: nn.Parameter) -> bool:
        """Return whether shape, dtype, ``requires_grad`` and, if shared, the memory are unchanged."""
        return (
            (self.copy is not None or parameter.data_ptr() == self.pointer)
            and parameter.requires_grad == self.requires_grad
            and parameter.shape == self.spec.shape
            and parameter.dtype == self.spec.dtype
        )


def _has_own_storage(parameter: nn.Parameter) -> bool:
    """Return whether nothing else uses the parameter's storage, so that moving it has no side effect."""
    storage = parameter.untyped_storage()
    if storage.nbytes() != parameter.numel() * parameter.element_size() or storage.nbytes() == 0:
        return False
    if parameter.stride() != dense_stride(parameter):
        return False
    return storage_use_count(storage) <= 2  # the parameter, and the name `storage` here
