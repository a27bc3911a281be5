"""Collective transport for accelerators: messages announce tensors, then devices exchange them.

All ranks perform the same transfers in the order of the messages, and no user code runs between an
announcement and its transfer (``docs/design.md``, "The collective transport").
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from duoka.data_parallel.messages import (
    BackwardRequest,
    CreateReplica,
    ForwardRequest,
    ForwardResult,
    Notification,
    ReceiveWeights,
)
from duoka.data_parallel.model_diff import ModelSnapshot
from duoka.data_parallel.tensor_layout import Allocation, Location, TensorSpec, copy_to_layout, pack_layout, tensor_at
from duoka.data_parallel.transport.base import Completion, GradientLayout, ModelMemory, WorkerConfig
from duoka.data_parallel.transport.buckets import Bucket, allocate_bytes, gradient_buckets
from duoka.data_parallel.transport.collective_weights import CollectiveWeightSync
from duoka.data_parallel.transport.gradient_reduction import CollectiveBackwardTask, GradientReduction
from duoka.data_parallel.transport.process_group import PrivateProcessGroup, select_backend
from duoka.workers import WorkerChannel, WorkerSession
from duoka.workers.handle import WorkerHandle
from duoka.workers.rendezvous import ENTER_RENDEZVOUS, READY_FOR_RENDEZVOUS, Rendezvous
from duoka.workers.resource_limits import explain_resource_errors
from duoka.workers.serialization import Payload

_DEATH_POLL_S = 0.5
_NOWHERE = Location(0, 0)
"""Location in messages whose tensors are sent."""


class CollectiveOwnerTransport:
    """Rank 0 of a private process group; the workers are the other ranks."""

    is_collective: Literal[True] = True
    """Transfers are ordered: rank 0 must fetch each result before its next request."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self._backend = select_backend(devices)
        self._connection = contextlib.ExitStack()
        """Undoes ``connect``."""
        self._rendezvous: Rendezvous | None = None
        self._group: PrivateProcessGroup | None = None

    def worker_configs(self, num_threads: int) -> list[WorkerConfig]:
        """Return each worker's configuration."""
        with explain_resource_errors("connect the ranks"):
            self._rendezvous, size = Rendezvous.new(), len(self._devices)
        return [
            WorkerConfig(num_threads, device, (self._rendezvous, rank, size, device, self._backend))
            for rank, device in enumerate(self._devices)
        ][1:]

    def connect(self, session: WorkerSession) -> None:
        """Wait in Python until all workers are ready: torch's rendezvous blocks Ctrl-C."""
        count = len(self._devices) - 1
        for _ in range(count):
            _, message = session.receive(range(count), "starts")
            assert message.kind == READY_FOR_RENDEZVOUS, message
        for index in range(count):
            session.send(index, ENTER_RENDEZVOUS, Payload(b""))
        assert self._rendezvous is not None, "worker_configs() comes first"
        self._group = PrivateProcessGroup(self._rendezvous, 0, count + 1, self._devices[0], self._backend)
        self._connection.callback(self._group.close)
        self._connection.callback(_monitor_deaths(session.workers, self._group.abort))

    def close(self) -> None:
        """Leave the group."""
        self._connection.close()
        self._group = None

    def create_weight_sync(
        self, post: Callable[[Notification], None], model: int, snapshot: ModelSnapshot, _copies_all: bool
    ) -> CollectiveWeightSync:
        """Return the ``WeightSync`` of one model; workers always have copies."""
        return CollectiveWeightSync(post, self._connected(), self._devices[0], model, snapshot)

    def allocate(self, nbytes: int) -> Allocation:
        """Return memory on the first device."""
        return Allocation(_NOWHERE, allocate_bytes(nbytes, self._devices[0]))

    def send_inputs(self, index: int, base: torch.Tensor) -> Completion:
        """Send a request's tensors to worker ``index``, right after the request."""
        return self._connected().send(base, index + 1).wait

    def receive_outputs(self, index: int, result: ForwardResult) -> list[torch.Tensor]:
        """Receive the output tensors of worker ``index``."""
        base = allocate_bytes(result.nbytes, self._devices[0])
        if result.nbytes:
            self._connected().receive(base, index + 1).wait()
        return [tensor_at(base, spec) for spec, _ in result.outputs]

    def start_reduction(self, buckets: Sequence[Bucket], inputs: dict[int, torch.Tensor]) -> GradientReduction:
        """Sum the workers' buckets, and receive the input gradients of each worker."""
        return GradientReduction(self._connected(), buckets, self._devices[0], inputs)

    def _connected(self) -> PrivateProcessGroup:
        assert self._group is not None, "connect() comes first"
        return self._group


def _monitor_deaths(workers: Sequence[WorkerHandle], on_death: Callable[[], None]) -> Callable[[], None]:
    """Start a thread that calls ``on_death`` when a worker dies; return a function that stops it."""
    stopped = threading.Event()

    def poll() -> None:
        while not stopped.wait(_DEATH_POLL_S):
            if not all(worker.is_alive() for worker in workers):
                on_death()
                return

    def stop() -> None:
        stopped.set()
        if threading.current_thread() is not thread:
            thread.join()

    thread = threading.Thread(target=poll, name="duoka-watch", daemon=True)
    thread.start()
    return stop


class CollectiveWorkerTransport:
    """A worker as a member of the private process group."""

    is_collective: Literal[True] = True

    def __init__(self, config: WorkerConfig, channel: WorkerChannel) -> None:
        self.device = config.device
        channel.barrier()
        self._group = PrivateProcessGroup(*config.rendezvous)
        self._models: dict[int, ModelMemory] = {}
        self._staged: torch.Tensor | None = None
        self._task: CollectiveBackwardTask | None = None

    def model_memory(self, request: CreateReplica) -> tuple[ModelMemory, ModelMemory]:
        """Return new memory for copies of a model's parameters and buffers; broadcasts overwrite its writes."""
        memory = ModelMemory([allocate_bytes(size, self.device) for size in request.bucket_nbytes])
        self._models[request.model] = memory
        return memory, memory

    def receive_weights(self, request: ReceiveWeights) -> None:
        """Receive new values of parameters and buffers."""
        bases = self._models[request.model].bases
        for pending in [self._group.broadcast(bases[bucket]) for bucket in request.buckets]:
            pending.wait()

    def delete_model(self, model: int) -> None:
        """Free the memory of a model."""
        self._models.pop(model, None)

    def gradient_layout(self, parameters: Sequence[torch.Tensor]) -> GradientLayout:
        """Return the buckets in which gradients are reduced."""
        return GradientLayout(buckets=gradient_buckets(parameters))

    def receive_inputs(self, request: ForwardRequest) -> list[torch.Tensor]:
        """Receive the input tensors of a request."""
        base = self._receive(request.nbytes)
        return [tensor_at(base, spec).data for spec, _ in request.inputs]

    def stage_outputs(self, outputs: Sequence[torch.Tensor]) -> tuple[Location, int, list[TensorSpec]]:
        """Pack outputs into a block, which ``flush`` sends."""
        specs, size = pack_layout(outputs)
        self._staged = allocate_bytes(size, self.device)
        copy_to_layout(self._staged, specs, outputs)
        return _NOWHERE, size, specs

    def flush(self, *, succeeded: bool) -> None:
        """Send staged outputs after a result message; wait for a backward's transfers."""
        staged, self._staged = self._staged, None
        if succeeded and staged is not None and len(staged):
            self._group.send(staged, 0).wait()
        task, self._task = self._task, None
        if task is not None:
            task.wait()

    def start_backward(self, request: BackwardRequest, gradient_layout: GradientLayout) -> CollectiveBackwardTask:
        """Receive the output gradients of a backward."""
        block = self._receive(request.nbytes, request.input_nbytes)
        self._task = CollectiveBackwardTask(request, block, self._group, gradient_layout.buckets)
        return self._task

    def close(self) -> None:
        """Leave the group, after all transfers."""
        synchronize(self.device)
        self._group.close()

    def _receive(self, nbytes: int, more_nbytes: int = 0) -> torch.Tensor:
        base = allocate_bytes(nbytes + more_nbytes, self.device)
        if nbytes:
            self._group.receive(base[:nbytes], 0).wait()
        return base


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator: leaving the group would abort transfers under way."""
    if device.type != "cpu":
        with contextlib.suppress(Exception):  # a failed device raises in the next operation of its user
            torch.accelerator.synchronize(device)
