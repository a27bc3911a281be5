"""Shared-memory transport for CPU workers: messages say where tensors are."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from duoka.data_parallel.messages import BackwardRequest, BackwardResult, CreateReplica, ForwardRequest, ForwardResult
from duoka.data_parallel.model_diff import ModelSnapshot
from duoka.data_parallel.tensor_layout import (
    Allocation,
    Location,
    TensorSpec,
    copy_to_layout,
    pack_layout,
    pack_present,
    repack_layout,
    tensor_at,
)
from duoka.data_parallel.transport.base import (
    BackwardContext,
    BackwardTask,
    GradientExchange,
    GroupChannel,
    OwnerTransport,
    WorkerConfig,
    WorkerTransport,
    add_gradients,
)
from duoka.data_parallel.transport.shared_memory import SharedArena, SharedView
from duoka.data_parallel.transport.shared_weights import SharedWeightSync, shared_gradient_layout
from duoka.workers import WorkerChannel
from duoka.workers.channel import Message
from duoka.workers.serialization import Payload

_CPU = torch.device("cpu")


class SharedOwnerTransport(OwnerTransport):
    """Rank 0's memory that the workers of one group map, and its view of theirs."""

    def __init__(self, devices: Sequence[torch.device], weights: SharedArena) -> None:
        self.traffic = SharedArena("traffic")
        self._devices, self._weights = devices, weights
        self._views: list[SharedView] = []
        self._announced: list[dict[str, int]] = []

    def worker_configs(self, num_threads: int) -> list[WorkerConfig]:
        """Return each worker's configuration."""
        count = len(self._devices) - 1
        self._views = [SharedView() for _ in range(count)]
        self._announced = [{} for _ in range(count)]
        return [WorkerConfig(num_threads, _CPU, None)] * count

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
        self, _group: GroupChannel, _model: int, snapshot: ModelSnapshot, copies_all: bool
    ) -> SharedWeightSync:
        """Return the ``WeightSync`` of one model; workers read the memory without a message."""
        return SharedWeightSync(snapshot, self._weights, self.traffic, copies_all=copies_all)

    def allocate(self, nbytes: int) -> Allocation:
        """Return shared memory for the tensors of a request."""
        return self.traffic.allocate(nbytes)

    def receive_outputs(self, index: int, result: ForwardResult) -> list[torch.Tensor]:
        """Return the output tensors in the worker's own memory."""
        return [self._views[index].tensor(result.location, spec) for spec, _ in result.outputs]

    def start_backward(self, group: GroupChannel, context: BackwardContext) -> _SharedGradientExchange:
        """Run the backward on the workers that have any output gradient."""
        return _SharedGradientExchange(group, context, self.traffic)


class _SharedGradientExchange(GradientExchange):
    """A backward on workers, one block each: gradients of parameters, then of outputs, then of inputs."""

    def __init__(self, group: GroupChannel, context: BackwardContext, arena: SharedArena) -> None:
        super().__init__(group, context)
        for index, given in enumerate(context.gradients):
            if all(gradient is None for gradient in given):
                continue
            outputs, size = pack_present(given, context.gradient_layout[1])
            inputs, size = repack_layout(context.wanted_inputs(index), size)
            allocation = arena.allocate(size)
            copy_to_layout(allocation.base, outputs, given)
            self._inputs[index] = allocation.base, inputs
            self._request(index, allocation, outputs)

    def _sum_parameters(self, results: Sequence[BackwardResult]) -> dict[int, torch.Tensor]:
        sums: dict[int, torch.Tensor] = {}
        specs = self._context.gradient_layout[0]
        for (index, _), result in zip(self._requests, results, strict=True):
            base = self._inputs[index][0]
            add_gradients(sums, {n: tensor_at(base, specs[n]) for n in result.parameters})
        return sums


class SharedWorkerTransport(WorkerTransport):
    """A worker's view of rank 0's memory, and the memory of its own outputs."""

    def __init__(self, device: torch.device, channel: WorkerChannel) -> None:
        super().__init__(device)
        self._channel = channel
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

    def gradient_layout(self, parameters: Sequence[nn.Parameter]) -> Any:
        """Return where gradients lie in the block of a backward."""
        return shared_gradient_layout(parameters)

    def receive_inputs(self, request: ForwardRequest) -> list[torch.Tensor]:
        """Return the input tensors of a request."""
        return [self._views["traffic"].tensor(request.location, spec) for spec, _ in request.inputs]

    def stage_outputs(self, outputs: Sequence[torch.Tensor]) -> tuple[Location, int, list[TensorSpec]]:
        """Copy outputs to shared memory; rank 0 reads them before its next forward request."""
        self._outputs = None
        specs, size = pack_layout(outputs)
        self._outputs = self._arena.allocate(size)
        for segment in self._arena.segments[self._announced :]:
            self._channel.send("segment", Payload(b"", fd=segment.fd))
        self._announced = len(self._arena.segments)
        copy_to_layout(self._outputs.base, specs, outputs)
        return self._outputs.location, size, specs

    def start_backward(self, request: BackwardRequest) -> _SharedBackwardTask:
        """Begin a backward."""
        location = request.location
        return _SharedBackwardTask(request, self._views["traffic"].bases[location.segment][location.offset :])


class _SharedBackwardTask(BackwardTask):
    """A backward that writes each gradient to rank 0's memory while it is still in the cache."""

    def __init__(self, request: BackwardRequest, block: torch.Tensor) -> None:
        super().__init__(request, block, block)
        self._specs: Sequence[TensorSpec] = ()

    def use_layout(self, gradient_layout: Any) -> None:
        """Use the gradient layout of the forward."""
        self._specs = gradient_layout[0]

    def _parameter_slot(self, index: int) -> torch.Tensor:
        return tensor_at(self._input_block, self._specs[index])
