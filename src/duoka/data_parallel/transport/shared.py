"""Shared-memory transport for CPU workers: messages say where tensors are."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch

from duoka.data_parallel import tensor_layout as layout
from duoka.data_parallel.messages import BackwardRequest, CreateReplica, ForwardRequest, ForwardResult
from duoka.data_parallel.model_diff import ModelSnapshot
from duoka.data_parallel.tensor_layout import Allocation, Location, TensorSpec
from duoka.data_parallel.transport.base import BackwardTask, GradientLayout, WeightSync, WorkerConfig
from duoka.data_parallel.transport.shared_memory import SharedArena, SharedView
from duoka.errors import DeviceError
from duoka.utils.torch_private import storage_use_count
from duoka.workers import WorkerChannel
from duoka.workers.channel import Message
from duoka.workers.serialization import Payload

_CPU = torch.device("cpu")


class SharedOwnerTransport:
    """Rank 0's memory that the workers of one group map, and its view of theirs."""

    is_collective: Literal[False] = False

    def __init__(self, devices: Sequence[torch.device], weights: SharedArena) -> None:
        self.traffic = SharedArena("traffic")
        self.allocate = self.traffic.allocate
        self._devices, self._weights = devices, weights
        self._views: list[SharedView] = []
        self._announced: list[dict[str, int]] = []

    def worker_configs(self, num_threads: int) -> list[WorkerConfig]:
        """Return each worker's configuration."""
        count = len(self._devices) - 1
        self._views = [SharedView() for _ in range(count)]
        self._announced = [{} for _ in range(count)]
        return [WorkerConfig(num_threads, _CPU)] * count

    def close(self) -> None:
        """Free the memory that no tensor holds."""
        self._views.clear()
        self.traffic.close()

    def pending_messages(self, index: int) -> Iterator[tuple[str, Payload]]:
        """Announce new memory before a message refers to it."""
        for arena in (self._weights, self.traffic):
            known = self._announced[index].get(arena.name, 0)
            for segment in arena.segments[known:]:
                yield arena.name, Payload(b"", fd=segment.fd)
            self._announced[index][arena.name] = len(arena.segments)

    def try_handle(self, index: int, message: Message) -> bool:
        """Map new memory of a worker."""
        if message.kind != "segment":
            return False
        assert message.payload.fd is not None
        self._views[index].map_segment(message.payload.fd)
        return True

    def create_weight_sync(
        self, _post: Any, _model: int, snapshot: ModelSnapshot, copies_all: bool
    ) -> _SharedWeightSync:
        """Return the ``WeightSync`` of one model; workers read the memory without a message."""
        return _SharedWeightSync(snapshot, self._weights, self.traffic, copies_all=copies_all)

    def receive_outputs(self, index: int, result: ForwardResult) -> list[torch.Tensor]:
        """Return the output tensors in the worker's own memory."""
        return [self._views[index].tensor(result.location, spec) for spec, _ in result.outputs]


class _SharedWeightSync(WeightSync):
    """Places each parameter and buffer of one model in shared memory.

    A parameter that owns its storage moves there once; workers see every later change, edits
    through ``.data`` included. A parameter whose storage is referenced elsewhere (a state dict, a
    view of a flat vector) stays in place, and rank 0 copies it before each call. So it does with
    buffers, because a call changes them while workers still read them, and with all parameters of a
    model whose forward writes to its parameters.
    """

    placements: tuple[_Placement, ...]
    """Replaced, never modified: a call that holds them keeps the memory that it uses."""

    def __init__(
        self, snapshot: ModelSnapshot, weights: SharedArena, traffic: SharedArena, *, copies_all: bool
    ) -> None:
        super().__init__(snapshot)
        self.copies_all = copies_all
        self._weights = weights
        self.placements = tuple(self._place(parameter) for parameter in self.parameters)
        self.gradient_layout = _gradient_layout(self.parameters)
        specs, size = layout.pack_present(snapshot.buffers())
        allocation = traffic.allocate(size)
        self._buffer_copies = [layout.tensor_at(allocation.base, spec) for spec in specs if spec is not None]
        self.buffer_placements = tuple(None if spec is None else (allocation.location, spec) for spec in specs)

    def detect_changes(self) -> list[int]:
        """Place anew each parameter that has become another tensor, and return the indices."""
        pairs = list(zip(self.parameters, self.placements, strict=True))
        changed = [index for index, (parameter, placement) in enumerate(pairs) if not placement.fits(parameter)]
        if changed:
            self.placements = tuple(old if old.fits(parameter) else self._place(parameter) for parameter, old in pairs)
            self.gradient_layout = _gradient_layout(self.parameters)
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

    def _place(self, parameter: torch.Tensor) -> _Placement:
        if parameter.device.type != "cpu":
            raise DeviceError(
                f"devices are CPU workers, but a parameter of shape {tuple(parameter.shape)} is on {parameter.device}. "
                "Move the model to the CPU, or give duoka.DataParallel the model's devices."
            )
        (spec,), size = layout.pack_layout([parameter])
        if not self.copies_all:
            location = self._weights.find(parameter)
            if location is None and _has_own_storage(parameter):
                location, base = self._weights.allocate(parameter.untyped_storage().nbytes())
                moved = layout.tensor_at(base, spec)
                moved.copy_(parameter.data)
                parameter.data = moved
            if location is not None:
                spec = spec._replace(stride=parameter.stride())
                return _Placement(location, spec, parameter.requires_grad, parameter.data, parameter.data_ptr(), None)
        location, base = self._weights.allocate(size)
        return _Placement(location, spec, parameter.requires_grad, parameter.data, 0, layout.tensor_at(base, spec))


def _gradient_layout(parameters: Sequence[torch.Tensor]) -> GradientLayout:
    """Return where the gradients of parameters that require one lie, and their total size."""
    return GradientLayout(*layout.pack_present(one if one.requires_grad else None for one in parameters))


class _Placement(NamedTuple):
    """Where workers find one parameter, and what identifies the parameter as the same tensor."""

    location: Location
    spec: TensorSpec
    requires_grad: bool
    data: torch.Tensor
    """Keeps the memory allocated while a worker may read it."""
    pointer: int
    copy: torch.Tensor | None

    def fits(self, parameter: torch.Tensor) -> bool:
        """Return whether shape, dtype, ``requires_grad`` and, if shared, the memory are unchanged."""
        return (
            (self.copy is not None or parameter.data_ptr() == self.pointer)
            and parameter.requires_grad == self.requires_grad
            and parameter.shape == self.spec.shape
            and parameter.dtype == self.spec.dtype
        )


def _has_own_storage(parameter: torch.Tensor) -> bool:
    """Return whether nothing else uses the parameter's storage, so that moving it has no side effect."""
    storage = parameter.untyped_storage()
    if storage.nbytes() != parameter.numel() * parameter.element_size() or storage.nbytes() == 0:
        return False
    if not storage.resizable():  # the memory is that of a NumPy array, which the user may edit
        return False
    if parameter.stride() != layout.dense_stride(parameter):
        return False
    return storage_use_count(storage) <= 2  # the parameter, and the name `storage` here


class SharedWorkerTransport:
    """A worker's view of rank 0's memory, and the memory of the outputs."""

    is_collective: Literal[False] = False

    def __init__(self, config: WorkerConfig, channel: WorkerChannel) -> None:
        self.device, self._channel = config.device, channel
        self._views = {"weights": SharedView(is_private=sys.platform == "linux"), "traffic": SharedView()}
        self._arena = SharedArena("outputs")
        self._announced = 0
        self._outputs: Allocation | None = None

    def try_handle(self, message: Message) -> bool:
        """Map new memory of rank 0."""
        if message.kind not in self._views:
            return False
        assert message.payload.fd is not None
        self._views[message.kind].map_segment(message.payload.fd)
        return True

    def model_memory(self, request: CreateReplica) -> tuple[SharedView, SharedView]:  # noqa: ARG002
        """Return rank 0's memory, the same for all models."""
        return self._views["weights"], self._views["traffic"]

    def gradient_layout(self, parameters: Sequence[torch.Tensor]) -> GradientLayout:
        """Return where gradients lie in the block of a backward."""
        return _gradient_layout(parameters)

    def receive_inputs(self, request: ForwardRequest) -> list[torch.Tensor]:
        """Return the input tensors of a request."""
        return [self._views["traffic"].tensor(request.location, spec) for spec, _ in request.inputs]

    def stage_outputs(self, outputs: Sequence[torch.Tensor]) -> tuple[Location, int, list[TensorSpec]]:
        """Copy outputs to shared memory; rank 0 reads them before its next forward request."""
        self._outputs = None
        specs, size = layout.pack_layout(outputs)
        self._outputs = self._arena.allocate(size)
        for segment in self._arena.segments[self._announced :]:
            self._channel.send("segment", Payload(b"", fd=segment.fd))
        self._announced = len(self._arena.segments)
        layout.copy_to_layout(self._outputs.base, specs, outputs)
        return self._outputs.location, size, specs

    def close(self) -> None:
        """Free the memory of outputs, and unmap rank 0's."""
        self._outputs = None
        self._arena.close()
        self._views.clear()

    def start_backward(self, request: BackwardRequest, gradient_layout: GradientLayout) -> _SharedBackwardTask:
        """Begin a backward."""
        location = request.location
        block = self._views["traffic"].bases[location.segment][location.offset :]
        return _SharedBackwardTask(request, block, gradient_layout)


class _SharedBackwardTask(BackwardTask):
    """A backward that writes each gradient to rank 0's memory while it is still in the cache."""

    def __init__(self, request: BackwardRequest, block: torch.Tensor, gradient_layout: GradientLayout) -> None:
        super().__init__(request, block)
        self._specs = gradient_layout.specs

    def _parameter_slot(self, index: int) -> torch.Tensor | None:
        spec = self._specs[index]
        return None if spec is None else layout.tensor_at(self._block, spec)
