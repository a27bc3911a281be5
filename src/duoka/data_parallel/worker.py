"""What a helper of the mirror engine does: keeps replicas, computes parts forward and backward, and answers."""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from duoka.data_parallel import call_context, scatter_gather
from duoka.data_parallel.messages import (
    BackwardRequest,
    BackwardResult,
    CreateReplica,
    DeleteReplica,
    ForwardRequest,
    ForwardResult,
    Pickled,
    RebindParameters,
    ReceiveWeights,
    UpdateAttributes,
)
from duoka.data_parallel.replica import Replica, unpack
from duoka.data_parallel.transport.base import BackwardTask, WorkerConfig, WorkerTransport
from duoka.data_parallel.transport.collective import CollectiveWorkerTransport
from duoka.data_parallel.transport.shared import SharedWorkerTransport
from duoka.workers import WorkerChannel, exceptions
from duoka.workers.channel import Message
from duoka.workers.serialization import Payload, dumps

__all__ = ["serve"]


@contextlib.contextmanager
def serve(post: WorkerConfig, line: WorkerChannel) -> Iterator[None]:
    """Answer until the owner ends the conversation."""
    torch.set_num_threads(post.threads)
    if post.device.type != "cpu":
        torch.accelerator.set_device_index(post.device)
    with call_context.kept(post.device):
        server = _RequestHandler(line, _side(post, line))
        while (message := line.receive()).kind != "finish":
            server.take(message)
    server.close()
    del server
    yield


def _side(post: WorkerConfig, line: WorkerChannel) -> WorkerTransport:
    if post.meeting is None:
        return SharedWorkerTransport(post.device, line)
    return CollectiveWorkerTransport(post.device, line, post.meeting)


class _SavedGraph(NamedTuple):
    """What a forward leaves for its backward."""

    replica: Replica
    plan: Any
    inputs: list[torch.Tensor]
    outputs: dict[int, torch.Tensor]


class _RequestHandler:
    def __init__(self, line: WorkerChannel, side: WorkerTransport) -> None:
        self._line, self._side = line, side
        self._replicas: dict[int, Replica] = {}
        self._kept: dict[int, _SavedGraph] = {}
        self._failed: dict[int, BaseException] = {}

    def take(self, message: Message) -> None:
        if self._side.takes(message):
            return
        request = pickle.loads(message.payload.data)
        if isinstance(request, CreateReplica):
            self._configure(request, message.payload.fd)
        elif isinstance(request, DeleteReplica):
            self._replicas.pop(request.model, None)
            self._side.forget(request.model)
        elif isinstance(request, ReceiveWeights):
            self._side.refresh(request)
        elif isinstance(request, UpdateAttributes | RebindParameters):
            self._change(request, message.payload.fd)
        else:
            self._answer(request, message.payload.fd)

    def close(self) -> None:
        self._replicas.clear()
        self._kept.clear()
        self._side.close()

    def _configure(self, request: CreateReplica, fd: int | None) -> None:
        self._failed.pop(request.model, None)
        sys.path[:] = request.path
        try:
            self._replicas[request.model] = Replica(request, fd, self._side)
        except Exception as error:  # said when it is asked to compute
            self._failed[request.model] = error

    def _change(self, request: UpdateAttributes | RebindParameters, fd: int | None) -> None:
        try:
            replica = self._replicas[request.model]
            if isinstance(request, UpdateAttributes):
                replica.patch(request.values, fd)
            else:
                replica.reseat(request)
        except Exception as error:
            self._failed.setdefault(request.model, error)

    def _answer(self, request: ForwardRequest | BackwardRequest, fd: int | None) -> None:
        """Compute, and say what came of it. Only what the user's code may fail in is forgiven; the transport's failures end."""
        for ticket in request.done_with:
            self._kept.pop(ticket, None)
        try:
            answer, payload = (
                self._forward(request, fd) if isinstance(request, ForwardRequest) else self._backward(request)
            )
        except _Failed as failed:
            self._line.send(f"raised:{request.ticket}", exceptions.serialize_exception(failed.error))
            self._side.settle(is_answered=False)
            return
        self._line.send(f"answer:{request.ticket}", Payload(pickle.dumps(answer), fd=payload.fd))
        payload.close()
        self._side.settle(is_answered=True)

    def _forward(self, request: ForwardRequest, fd: int | None) -> tuple[ForwardResult, Payload]:
        inputs = self._side.inputs(request)
        with _forgiving():
            return self._compute(request, inputs, fd)

    def _compute(
        self, request: ForwardRequest, inputs: list[torch.Tensor], fd: int | None
    ) -> tuple[ForwardResult, Payload]:
        if request.model in self._failed:
            raise self._failed[request.model]
        replica = self._replicas[request.model]
        replica.restore()
        for tensor, (_, wants) in zip(inputs, request.inputs, strict=True):
            tensor.requires_grad_(wants)
        args, kwargs = scatter_gather.fill(unpack(request.arguments, fd, self._side.device), inputs)
        call_context.seed_all(request.seed)
        with call_context.entered(request.ambient, self._side.device):
            value = exceptions.call_user_code(replica.compute, *args, **kwargs)
        outputs, skeleton = scatter_gather.take_out(value, request.part)
        with_graph = {i: t for i, t in enumerate(outputs) if t.requires_grad} if request.keeps_graph else {}
        packed = dumps(skeleton)
        if with_graph:
            self._kept[request.ticket] = _SavedGraph(replica, replica.plan, inputs, with_graph)
        place, nbytes, pieces = self._side.put(outputs)
        forms = tuple((piece, index in with_graph) for index, piece in enumerate(pieces))
        return ForwardResult(
            place, nbytes, forms, Pickled(packed.data, packed.sizes), replica.look_for_writes()
        ), packed

    def _backward(self, request: BackwardRequest) -> tuple[BackwardResult, Payload]:
        task = self._side.task(request)
        try:
            with _forgiving():
                return self._compute_backward(request, task)
        finally:
            task.finish()

    def _compute_backward(self, request: BackwardRequest, task: BackwardTask) -> tuple[BackwardResult, Payload]:
        wanted = [index for index, piece in enumerate(request.outputs) if piece is not None]
        if not wanted:  # this device had no part, or nothing of it is used
            return BackwardResult((), (), Pickled(b"")), Payload(b"")
        kept = self._kept.get(request.forward)
        if kept is None or not kept.outputs.keys() >= set(wanted):
            raise RuntimeError(
                "Trying to backward through the graph a second time: what it needs has been freed by the first. "
                "Specify retain_graph=True if you need to backward through the graph again."
            )
        with kept.replica.gradients_to(task, kept.plan):
            exceptions.call_user_code(
                torch.autograd.backward, [kept.outputs[i] for i in wanted], task.given, retain_graph=request.keeps_graph
            )
        inputs = task.put_inputs([tensor.grad for tensor in kept.inputs])
        for tensor in kept.inputs:
            tensor.grad = None
        if not request.keeps_graph:
            for index in wanted:
                del kept.outputs[index]
            if not kept.outputs:
                del self._kept[request.forward]
        payload = dumps(task.apart) if task.apart else Payload(b"")
        return BackwardResult(tuple(task.taken), inputs, Pickled(payload.data, payload.sizes)), payload


class _Failed(Exception):  # noqa: N818 - carries the one that the owner is told
    def __init__(self, error: BaseException) -> None:
        self.error = error


@contextlib.contextmanager
def _forgiving() -> Iterator[None]:
    """Let what the user's code raises be an answer."""
    try:
        yield
    except BaseException as error:
        raise _Failed(error) from None
