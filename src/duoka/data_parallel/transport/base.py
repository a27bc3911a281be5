"""Interfaces of a transport: how tensors move between rank 0 and its workers.

``shared`` serves CPU workers: tensors lie in memory that all processes map. ``collective`` serves
accelerators: devices exchange tensors in the order of the messages that announce them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import nn

from duoka.data_parallel import messages
from duoka.data_parallel.model_diff import ModelSnapshot
from duoka.data_parallel.pickling import unpickle
from duoka.data_parallel.tensor_layout import Allocation, Location, TensorSpec, tensor_at
from duoka.utils.torch_private import add_in_place
from duoka.workers import WorkerChannel, WorkerSession
from duoka.workers.channel import Message
from duoka.workers.serialization import Payload

OutputGradients: TypeAlias = Sequence[Sequence[torch.Tensor | None]]
"""Gradients of each worker's outputs."""
Completion: TypeAlias = Callable[[], None]
"""Waits for a transfer that has begun, so that later work sees its result."""


class WorkerConfig(NamedTuple):
    """Start-up configuration of one worker."""

    num_threads: int
    device: torch.device
    rendezvous: tuple[Any, ...] = ()
    """Arguments of its ``PrivateProcessGroup``, where the transport is collective."""


class GroupChannel(Protocol):
    """The methods of a ``WorkerGroup`` that transports use."""

    devices: tuple[torch.device, ...]

    def new_call_id(self) -> int:
        """Return a number that no other request has."""

    def post(self, message: messages.Notification) -> None:
        """Send a message without a result to every worker."""

    def request(self, index: int, request: messages.Request, allocation: Allocation) -> None:
        """Send a request and its tensors to worker ``index``."""

    def results(self, requests: Sequence[tuple[int, int]]) -> list[Any]:
        """Wait for the results of requests, given as (worker index, call ID)."""

    def discard_result(self, index: int, call_id: int, wait: Completion | None = None) -> None:
        """Drop a result when it arrives, then call ``wait``."""

    def stop_on_error(self) -> AbstractContextManager[None]:
        """Stop the workers if the ``with`` block fails."""


class BackwardContext(NamedTuple):
    """Output gradients of a backward, and what it knows of its forward."""

    call_id: int
    gradients: OutputGradients
    inputs: Sequence[Sequence[TensorSpec | None]]
    """For each worker with a chunk: spec of each input, ``None`` where no gradient is needed."""
    gradient_layout: Any
    """``WeightSync.gradient_layout`` at the time of the forward."""
    keep_graph: bool


class WeightSync:
    """Keeps the workers' view of one model's parameters and buffers up to date."""

    copies_all = False
    placements: tuple[Any, ...]
    """Tuples of one parameter each: location, spec, and what else keeps the memory that workers read."""
    bucket_nbytes: tuple[int, ...] = ()
    gradient_layout: Any
    buffer_placements: tuple[messages.BufferPlacement | None, ...]

    def __init__(self, snapshot: ModelSnapshot) -> None:
        self.snapshot = snapshot
        self.parameters = snapshot.parameters
        self._shapes = [(parameter.shape, parameter.dtype) for parameter in self.parameters]

    @property
    def parameter_placements(self) -> tuple[messages.ParameterPlacement, ...]:
        """Location, spec and ``requires_grad`` of each parameter."""
        pairs = zip(self.placements, self.parameters, strict=True)
        return tuple((*placement[:2], parameter.requires_grad) for placement, parameter in pairs)

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

    def push_async(self) -> None:
        """Start pushing updated parameters right after an optimizer step."""

    def invalidate(self) -> None:
        """Assume that workers' copies are wrong, because a call has failed."""


class GradientExchange:
    """One backward that runs on the workers; subclasses send the requests when they are created."""

    def __init__(self, group: GroupChannel, context: BackwardContext) -> None:
        self._group, self._context = group, context._replace(gradients=())  # frees them after the request
        self._requests: list[tuple[int, int]] = []
        self._inputs: dict[int, tuple[torch.Tensor, list[TensorSpec | None]]] = {}
        """Memory of each worker's input gradients, and the specs there."""

    def wait(self) -> tuple[dict[int, torch.Tensor], dict[int, dict[int, torch.Tensor]]]:
        """Return sums of gradients by parameter, and input gradients by worker and input."""
        results = self._group.results(self._requests)
        sums = self._sum_parameters(results)
        inputs: dict[int, dict[int, torch.Tensor]] = {}
        for (index, _), result in zip(self._requests, results, strict=True):
            if result.payload.data:
                add_gradients(sums, unpickle(result.payload, self._group.devices[0]))
            base, specs = self._inputs[index]
            inputs[index] = {n: tensor_at(base, spec) for n in result.inputs if (spec := specs[n]) is not None}
        return sums, inputs

    def discard(self) -> None:
        """Drop the gradients when they arrive."""
        for index, call_id in self._requests:
            self._group.discard_result(index, call_id)

    def _request(
        self,
        index: int,
        allocation: Allocation,
        outputs: Sequence[TensorSpec | None],
        buckets: tuple[tuple[int, torch.dtype], ...] = (),
        input_nbytes: int = 0,
    ) -> None:
        """Run the backward on one worker; output gradients lie in ``allocation``."""
        request = messages.BackwardRequest(
            self._group.new_call_id(),
            self._context.call_id,
            allocation.location,
            len(allocation.base),
            tuple(outputs),
            tuple(self._inputs[index][1]),
            self._context.keep_graph,
            buckets,
            input_nbytes,
        )
        self._group.request(index, request, allocation)
        self._requests.append((index, request.call_id))

    def _sum_parameters(self, results: Sequence[messages.BackwardResult]) -> dict[int, torch.Tensor]:
        """Return the sums of the parameter gradients that are not inside the results."""
        raise NotImplementedError


class OwnerTransport:
    """Rank 0's side of a transport, for one worker group."""

    is_collective = False
    """Whether transfers are ordered: rank 0 must fetch each result before its next request."""
    temp_dir: str | None = None
    """Private directory; workers remove it if rank 0 is killed."""

    def worker_configs(self, num_threads: int) -> list[WorkerConfig]:
        """Prepare a connection, and return each worker's configuration."""
        raise NotImplementedError

    def connect(self, session: WorkerSession) -> None:
        """Connect to the workers of a new session."""

    def synchronize(self) -> None:
        """Wait for transfers under way, before workers are released."""

    def close(self) -> None:
        """Disconnect; the workers may be dead."""
        raise NotImplementedError

    def pending_messages(self, index: int) -> Iterator[tuple[str, Payload]]:  # noqa: ARG002
        """Yield what worker ``index`` must receive before the next message."""
        return iter(())

    def try_handle(self, index: int, message: Message) -> bool:  # noqa: ARG002
        """Handle a message that is for the transport; return whether it was."""
        return False

    def create_weight_sync(
        self, group: GroupChannel, model: int, snapshot: ModelSnapshot, copies_all: bool
    ) -> WeightSync:
        """Return the ``WeightSync`` of one model."""
        raise NotImplementedError

    def allocate(self, nbytes: int) -> Allocation:
        """Return memory for the tensors of a request."""
        raise NotImplementedError

    def send_inputs(self, index: int, allocation: Allocation) -> Completion | None:
        """Send a request's tensors to worker ``index``, right after the request."""

    def receive_outputs(self, index: int, result: messages.ForwardResult) -> list[torch.Tensor]:
        """Return the output tensors of worker ``index``."""
        raise NotImplementedError

    def start_backward(self, group: GroupChannel, context: BackwardContext) -> GradientExchange:
        """Run the backward on the workers, from the gradients of each worker's outputs."""
        raise NotImplementedError


class BackwardTask:
    """One backward in a worker: its output gradients, and where its results go."""

    def __init__(self, request: messages.BackwardRequest, block: torch.Tensor, input_block: torch.Tensor) -> None:
        self.request = request
        self.output_gradients = [tensor_at(block, spec).data for spec in request.outputs if spec is not None]
        self._input_block = input_block
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
                tensor_at(self._input_block, spec).copy_(gradient)
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


class WorkerTransport:
    """A worker's side of a transport."""

    def __init__(self, config: WorkerConfig, channel: WorkerChannel) -> None:
        self.device, self._channel = config.device, channel

    def try_handle(self, message: Message) -> bool:  # noqa: ARG002
        """Handle a message that is for the transport; return whether it was."""
        return False

    def model_memory(self, request: messages.CreateReplica) -> tuple[ModelMemory, ModelMemory]:
        """Return the memory of a new model's parameters, and of its buffers."""
        raise NotImplementedError

    def receive_weights(self, request: messages.ReceiveWeights) -> None:
        """Receive new values of parameters and buffers."""

    def delete_model(self, model: int) -> None:
        """Free the memory of a model."""

    def gradient_layout(self, parameters: Sequence[nn.Parameter]) -> Any:
        """Return the layout that ``WeightSync.gradient_layout`` has in rank 0."""
        raise NotImplementedError

    def receive_inputs(self, request: messages.ForwardRequest) -> list[torch.Tensor]:
        """Return the input tensors of a request."""
        raise NotImplementedError

    def stage_outputs(self, outputs: Sequence[torch.Tensor]) -> tuple[Location, int, list[TensorSpec]]:
        """Copy outputs to memory for rank 0; return its location, size, and the specs."""
        raise NotImplementedError

    def flush(self, *, succeeded: bool) -> None:
        """Send staged outputs after a result message; drop them after a failure."""

    def start_backward(self, request: messages.BackwardRequest, gradient_layout: Any) -> BackwardTask:
        """Begin a backward, with the layout at its forward; ``None`` if nothing will be computed."""
        raise NotImplementedError

    def close(self) -> None:
        """Disconnect."""


def add_gradients(sums: dict[int, torch.Tensor], new: dict[int, torch.Tensor]) -> None:
    """Add gradients to the sums; a sum may be the first worker's memory, changed in place."""
    both = [n for n in new if n in sums and sums[n].layout is torch.strided and new[n].layout is torch.strided]
    if both:
        add_in_place([sums[n] for n in both], [new[n] for n in both])
    for n in new.keys() - set(both):
        sums[n] = sums[n] + new[n] if n in sums else new[n]
