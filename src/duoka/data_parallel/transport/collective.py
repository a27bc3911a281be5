"""The transport between accelerators: tensors are sent from device to device, announced by messages.

Every member of the group does the same things in the same order, which is that of the messages. Code of the user's stands
nowhere between an announcement and what it announces: inputs are sent with their question, outputs after their answer,
and what a backward has announced is completed even when it fails, with zeros. So nobody waits for what never comes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from duoka.data_parallel.messages import BackwardRequest, CreateReplica, ForwardRequest, ForwardResult, ReceiveWeights
from duoka.data_parallel.transport.base import BackwardContext, WorkerConfig
from duoka.data_parallel.transport.buckets import Bucket, BucketLayout, allocate, gradient_buckets
from duoka.data_parallel.transport.collective_weights import CollectiveWeightSync
from duoka.data_parallel.transport.gradient_reduction import NOWHERE, CollectiveBackwardTask, CollectiveGradientExchange
from duoka.data_parallel.transport.process_group import PendingCollectives, PrivateProcessGroup, backend_of
from duoka.data_parallel.transport.shared_memory import Allocation, Location, TensorSpec, lay_out, tensor_at
from duoka.data_parallel.transport.watch import DeathMonitor
from duoka.errors import LaunchError
from duoka.workers import WorkerChannel, WorkerSession
from duoka.workers.channel import Message
from duoka.workers.rendezvous import ENTER_RENDEZVOUS, READY_FOR_RENDEZVOUS
from duoka.workers.serialization import Payload

if TYPE_CHECKING:
    from duoka.data_parallel.worker_group import WorkerGroup

__all__ = ["CollectiveWorkerTransport", "CollectiveOwnerTransport"]


class CollectiveOwnerTransport:
    """The user's process as member 0 of a group, the helpers being the others."""

    sends = True

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self._backend = backend_of(devices)
        self._end: weakref.finalize[..., Any] | None = None
        self.folder: str | None = None
        """Where the members find each other."""
        self._group: PrivateProcessGroup | None = None
        self._watch: DeathMonitor | None = None

    def posts(self, threads: int) -> list[WorkerConfig]:
        """Make a private folder to meet in, and return what each helper is given."""
        folder = self.folder = tempfile.mkdtemp(prefix="duoka-")
        self._end = weakref.finalize(self, _remove, folder, os.getpid())
        size = len(self._devices)
        return [
            WorkerConfig(threads, device, (folder, rank, size, device, self._backend))
            for rank, device in enumerate(self._devices)
        ][1:]

    def connect(self, conversation: WorkerSession) -> None:
        """Wait until all have come, in Python; only then enter torch's rendezvous, which cannot be interrupted."""
        count = len(self._devices) - 1
        for _ in range(count):
            index, message = conversation.receive()
            if message.kind != READY_FOR_RENDEZVOUS:
                raise LaunchError(f"helper {index} answered {message.kind!r} out of turn; this is a bug in duoka")
        for index in range(count):
            conversation.send(index, ENTER_RENDEZVOUS, Payload(b""))
        assert self.folder is not None
        self._group = PrivateProcessGroup(self.folder, 0, count + 1, self._devices[0], self._backend)
        self._watch = DeathMonitor(conversation.workers, self._group.abort)

    def finish(self) -> None:
        """Wait until the device has done what it was asked: leaving the group ends what is under way."""
        _await_device(self._devices[0])

    def close(self) -> None:
        """Leave the group, and remove the folder."""
        if self._watch is not None:
            self._watch.end()
            self._watch = None
        if self._group is not None:
            self._group.close()
            self._group = None
        if self._end is not None:
            self._end()
            self._end = self.folder = None

    def news(self, _: int) -> Iterator[tuple[str, Payload]]:
        """Tell nothing."""
        return iter(())

    def takes(self, _: int, __: Message) -> bool:
        """Take nothing."""
        return False

    def weights(
        self,
        crew: WorkerGroup,
        model: int,
        parameters: Sequence[nn.Parameter],
        buffers: Sequence[torch.Tensor | None],
        *,
        copies_all: bool,  # noqa: ARG002 - nothing is shared, so everything is copied
    ) -> CollectiveWeightSync:
        """Return the weights of one model."""
        return CollectiveWeightSync(crew, self._members(), model, parameters, buffers)

    def lend(self, nbytes: int) -> Allocation:
        """Return memory on the first device."""
        return Allocation(NOWHERE, allocate(nbytes, self._devices[0]))

    def deliver(self, index: int, lease: Allocation) -> PendingCollectives | None:
        """Send it to the helper that was just sent the message."""
        return self._members().send(lease.base, index + 1) if len(lease.base) else None

    def outputs(self, index: int, answer: ForwardResult) -> list[torch.Tensor]:
        """Receive the tensors of an answer."""
        base = allocate(answer.nbytes, self._devices[0])
        if answer.nbytes:
            self._members().receive(base, index + 1).wait()
        return [tensor_at(base, piece) for piece, _ in answer.tensors]

    def backward(
        self,
        crew: WorkerGroup,
        passage: BackwardContext,
        gradients: Sequence[Sequence[torch.Tensor | None]],
        *,
        keeps_graph: bool,
    ) -> CollectiveGradientExchange:
        """Let all helpers go backward, those without a part as well: a sum takes everybody."""
        with crew.all_or_none():
            return CollectiveGradientExchange(crew, self._members(), passage, gradients, keeps_graph=keeps_graph)

    def _members(self) -> PrivateProcessGroup:
        assert self._group is not None, "connect() comes first"
        return self._group


class CollectiveWorkerTransport:
    """A helper as a member of the group."""

    def __init__(self, device: torch.device, line: WorkerChannel, meeting: tuple[Any, ...]) -> None:
        self.device = device
        line.send(READY_FOR_RENDEZVOUS, Payload(b""))
        line.receive()  # nobody enters the rendezvous before all are there
        self._group = PrivateProcessGroup(*meeting)
        self._models: dict[int, BucketLayout] = {}
        self._base: torch.Tensor | None = None
        self._task: CollectiveBackwardTask | None = None

    def takes(self, _: Message) -> bool:
        """Take nothing."""
        return False

    def memory(self, request: CreateReplica) -> tuple[BucketLayout, BucketLayout]:
        """Return new memory for the copies of a model's parameters and buffers."""
        buckets = self._models[request.model] = BucketLayout(request.buckets, self.device)
        return buckets, buckets

    def refresh(self, request: ReceiveWeights) -> None:
        """Receive new values of parameters and buffers."""
        bases = self._models[request.model].bases
        for pending in [self._group.broadcast(bases[n]) for n in request.buckets]:
            pending.wait()

    def forget(self, model: int) -> None:
        """Give the model's memory back."""
        self._models.pop(model, None)

    def plan(self, parameters: Sequence[nn.Parameter]) -> list[Bucket]:
        """Return the buckets that gradients are sent in."""
        return gradient_buckets(parameters)

    def inputs(self, request: ForwardRequest) -> list[torch.Tensor]:
        """Receive the tensors of a question."""
        base = self._receive(request.nbytes)
        return [tensor_at(base, piece).data for piece, _ in request.inputs]

    def put(self, outputs: Sequence[torch.Tensor]) -> tuple[Location, int, list[TensorSpec]]:
        """Lay outputs out to be sent when they have been announced."""
        pieces, size = lay_out(outputs)
        self._base = allocate(size, self.device)
        with torch.no_grad():
            for output, piece in zip(outputs, pieces, strict=True):
                tensor_at(self._base, piece).copy_(output)
        return NOWHERE, size, pieces

    def settle(self, *, is_answered: bool) -> None:
        """Send outputs that have been announced; wait for what was begun."""
        base, self._base = self._base, None
        if is_answered and base is not None and len(base):
            self._group.send(base, 0).wait()
        task, self._task = self._task, None
        if task is not None:
            task.wait()

    def task(self, request: BackwardRequest) -> CollectiveBackwardTask:
        """Receive what a backward begins with."""
        base = self._receive(request.nbytes)
        given = [tensor_at(base, piece).data for piece in request.outputs if piece is not None]
        self._task = CollectiveBackwardTask(request, given, self._group, self.device)
        return self._task

    def close(self) -> None:
        """Leave the group when all has gone."""
        _await_device(self.device)
        self._group.close()

    def _receive(self, nbytes: int) -> torch.Tensor:
        base = allocate(nbytes, self.device)
        if nbytes:
            self._group.receive(base, 0).wait()
        return base


def _await_device(device: torch.device) -> None:
    if device.type != "cpu":
        with contextlib.suppress(Exception):  # it has failed, and says so to whoever asks it for something
            torch.accelerator.synchronize(device)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child that ends is not the one that met the helpers there
        shutil.rmtree(folder, ignore_errors=True)
