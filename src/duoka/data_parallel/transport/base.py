"""Base classes of both transports: a model's weights, a worker's memory for them, and a worker's backward."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from duoka.data_parallel import messages
from duoka.data_parallel.model_diff import ModelSnapshot
from duoka.data_parallel.tensor_layout import Location, TensorSpec, tensor_at
from duoka.data_parallel.transport.buckets import Bucket

Completion: TypeAlias = Callable[[], None]
"""Waits for a transfer that has begun, so that later work sees its result."""


class WorkerConfig(NamedTuple):
    """Start-up configuration of one worker."""

    num_threads: int
    device: torch.device
    rendezvous: tuple[Any, ...] = ()
    """Arguments of its ``PrivateProcessGroup``, where the transport is collective."""


class GradientLayout(NamedTuple):
    """Where workers put gradients of parameters: at the start of a block each, or in buckets that are reduced."""

    specs: Sequence[TensorSpec | None] = ()
    nbytes: int = 0
    buckets: Sequence[Bucket] = ()


class WeightSync:
    """Keeps the workers' view of one model's parameters and buffers up to date."""

    copies_all = False
    placements: tuple[Any, ...]
    """Tuples of one parameter each: location, spec, and what else keeps the memory that workers read."""
    bucket_nbytes: tuple[int, ...] = ()
    gradient_layout: GradientLayout
    buffer_placements: tuple[messages.BufferPlacement | None, ...]

    def __init__(self, snapshot: ModelSnapshot) -> None:
        self.snapshot = snapshot
        self.parameters = snapshot.parameters
        self._shapes = [(parameter.shape, parameter.dtype) for parameter in self.parameters]

    @property
    def parameter_placements(self) -> tuple[messages.ParameterPlacement, ...]:
        """Where workers find each parameter."""
        return tuple(
            (*placement[:2], parameter.requires_grad, isinstance(parameter, nn.Parameter))
            for placement, parameter in zip(self.placements, self.parameters, strict=True)
        )

    def detect_changes(self) -> list[int]:
        """Return the indices of parameters that workers must rebind before the next call."""
        raise NotImplementedError

    def shapes_unchanged(self, indices: Sequence[int]) -> bool:
        """Return whether these parameters keep their first shape and dtype, as replicas need."""
        parameters = self.parameters
        return all(self._shapes[index] == (parameters[index].shape, parameters[index].dtype) for index in indices)

    def push(self, *, training: bool) -> None:
        """Push current parameter and buffer values to the workers."""
        raise NotImplementedError

    def acknowledge(self) -> None:
        """Free the memory of pushed values: all workers have replied, so the values have arrived."""

    def invalidate(self) -> None:
        """Assume that workers' copies are wrong, because a call has failed."""


class BackwardTask:
    """One backward in a worker: its output gradients, and where its results go."""

    def __init__(self, request: messages.BackwardRequest, block: torch.Tensor) -> None:
        self.request, self._block = request, block
        self.output_gradients = [tensor_at(block, spec).data for spec in request.outputs if spec is not None]
        self.accepted: set[int] = set()
        self.inlined: dict[int, torch.Tensor] = {}
        """Gradients that travel inside the result message."""

    def accept_gradient(self, index: int, gradient: torch.Tensor) -> None:
        """Take one parameter's gradient; activation checkpointing may produce several for one parameter."""
        slot = self._parameter_slot(index)
        if slot is None or gradient.layout is not torch.strided:
            self.inlined[index] = self.inlined[index] + gradient if index in self.inlined else gradient
        elif index in self.accepted:
            slot.add_(gradient)
        else:
            slot.copy_(gradient)
            self.accepted.add(index)

    def return_input_gradients(self, gradients: Sequence[torch.Tensor | None]) -> tuple[int, ...]:
        """Return the indices of inputs that have a gradient, and write these gradients for rank 0."""
        written = []
        for index, (gradient, spec) in enumerate(zip(gradients, self.request.inputs, strict=True)):
            if gradient is not None and spec is not None:
                tensor_at(self._block, spec).copy_(gradient)
                written.append(index)
        return tuple(written)

    def finish(self) -> None:
        """Complete the transfers that others wait for, also after a failure."""

    def _parameter_slot(self, index: int) -> torch.Tensor | None:
        """Return where a gradient belongs; ``None`` if that memory has been sent."""
        raise NotImplementedError


class ModelMemory:
    """Memory of a model's parameters or buffers in a worker, in segments or buckets."""

    def __init__(self, bases: list[torch.Tensor]) -> None:
        self.bases = bases

    def tensor(self, location: Location, spec: TensorSpec) -> torch.Tensor:
        """Return one tensor of a block, with its own version counter."""
        return tensor_at(self.bases[location.segment], spec, location.offset).data

    def discard_writes(self) -> None:
        """Undo this worker's writes, if they hide rank 0's values."""

    def is_written_to(self) -> bool:
        """Return whether this worker has written to memory that hides rank 0's values."""
        return False
