"""What a helper of the mirror engine does: keeps replicas, computes parts forward and backward, and answers."""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from duoka.mirror import ambient, nested
from duoka.mirror.memory import Arena, Lease, Piece, Place, Window, lay_out, tensor_at
from duoka.mirror.messages import Answered, Backward, Configure, Forget, Forward, Outputs, Packed, Patch, Reseat
from duoka.mirror.replica import Replica, unpack
from duoka.team import Line, failure
from duoka.team.connection import Message
from duoka.team.payload import Payload, dumps

__all__ = ["serve"]


@contextlib.contextmanager
def serve(threads: int, line: Line) -> Iterator[None]:
    """Answer until the owner ends the conversation."""
    torch.set_num_threads(threads)
    with ambient.kept(torch.device("cpu")):
        server = _Server(line)
        while (message := line.receive()).kind != "finish":
            server.take(message)
    del server
    yield


class _Kept(NamedTuple):
    """What a forward leaves for its backward."""

    replica: Replica
    pieces: list[Piece | None]
    inputs: list[torch.Tensor]
    outputs: dict[int, torch.Tensor]


class _Server:
    def __init__(self, line: Line) -> None:
        self._line = line
        self._windows = {"weights": Window(is_private=sys.platform == "linux"), "traffic": Window()}
        self._replicas: dict[int, Replica] = {}
        self._kept: dict[int, _Kept] = {}
        self._arena = Arena("outputs")
        self._announced = 0
        self._lease: Lease | None = None
        self._failed: dict[int, BaseException] = {}

    def take(self, message: Message) -> None:
        if message.kind in self._windows:
            assert message.payload.fd is not None
            self._windows[message.kind].add(message.payload.fd)
            return
        request = pickle.loads(message.payload.data)
        if isinstance(request, Configure):
            self._configure(request, message.payload.fd)
        elif isinstance(request, Forget):
            self._replicas.pop(request.model, None)
        elif isinstance(request, Patch | Reseat):
            self._change(request, message.payload.fd)
        else:
            self._answer(request, message.payload.fd)

    def _configure(self, request: Configure, fd: int | None) -> None:
        self._failed.pop(request.model, None)
        sys.path[:] = request.path
        try:
            self._replicas[request.model] = Replica(request, fd, self._windows["weights"], self._windows["traffic"])
        except Exception as error:  # said when it is asked to compute
            self._failed[request.model] = error

    def _change(self, request: Patch | Reseat, fd: int | None) -> None:
        try:
            replica = self._replicas[request.model]
            if isinstance(request, Patch):
                replica.patch(request.values, fd)
            else:
                replica.reseat(request)
        except Exception as error:
            self._failed.setdefault(request.model, error)

    def _answer(self, request: Forward | Backward, fd: int | None) -> None:
        for ticket in request.done_with:
            self._kept.pop(ticket, None)
        answer: Outputs | Answered
        try:
            if isinstance(request, Forward):
                answer, payload = self._forward(request, fd)
            else:
                answer, payload = self._backward(request)
        except BaseException as error:
            self._line.send(f"raised:{request.ticket}", failure.pack(error))
            return
        self._line.send(f"answer:{request.ticket}", Payload(pickle.dumps(answer), fd=payload.fd))
        payload.close()

    def _forward(self, request: Forward, fd: int | None) -> tuple[Outputs, Payload]:
        if request.model in self._failed:
            raise self._failed[request.model]
        replica = self._replicas[request.model]
        if replica.writes:
            self._windows["weights"].refresh()
        replica.restore()
        inputs = [self._windows["traffic"].tensor(request.place, piece) for piece, _ in request.inputs]
        for tensor, (_, wants) in zip(inputs, request.inputs, strict=True):
            tensor.requires_grad_(wants)
        args, kwargs = nested.fill(unpack(request.arguments, fd), inputs)
        ambient.seed_all(request.seed)
        with ambient.entered(request.ambient):
            value = replica.module(*args, **kwargs)
        outputs, skeleton = nested.take_out(value, request.part)
        with_graph = {i: t for i, t in enumerate(outputs) if t.requires_grad} if request.keeps_graph else {}
        if with_graph:
            self._kept[request.ticket] = _Kept(replica, replica.gradient_pieces, inputs, with_graph)
        place, pieces = self._put(outputs)
        packed = dumps(skeleton)
        forms = tuple((piece, index in with_graph) for index, piece in enumerate(pieces))
        return Outputs(place, forms, Packed(packed.data, packed.sizes), replica.look_for_writes()), packed

    def _put(self, outputs: list[torch.Tensor]) -> tuple[Place, list[Piece]]:
        """Write outputs to memory that the owner sees; it has read them before it asks for the next forward."""
        self._lease = None
        pieces, size = lay_out(outputs)
        self._lease = self._arena.lend(size)
        for segment in self._arena.segments[self._announced :]:
            self._line.send("segment", Payload(b"", fd=segment.fd))
        self._announced = len(self._arena.segments)
        with torch.no_grad():
            for output, piece in zip(outputs, pieces, strict=True):
                tensor_at(self._lease.base, piece).copy_(output)
        return self._lease.place, pieces

    def _backward(self, request: Backward) -> tuple[Answered, Payload]:
        kept = self._kept.get(request.forward)
        wanted = [index for index, piece in enumerate(request.outputs) if piece is not None]
        if kept is None or not kept.outputs.keys() >= set(wanted):
            raise RuntimeError(
                "Trying to backward through the graph a second time: what it needs has been freed by the first. "
                "Specify retain_graph=True if you need to backward through the graph again."
            )
        traffic, gradients = self._windows["traffic"], kept.replica.gradients
        slots = [None if piece is None else traffic.tensor(request.place, piece) for piece in kept.pieces]
        given = [traffic.tensor(request.place, piece) for piece in request.outputs if piece is not None]
        with gradients.into(slots):
            torch.autograd.backward([kept.outputs[i] for i in wanted], given, retain_graph=request.keeps_graph)
        inputs = tuple(self._put_input_gradients(kept, request))
        if not request.keeps_graph:
            for index in wanted:
                del kept.outputs[index]
            if not kept.outputs:
                del self._kept[request.forward]
        payload = dumps(gradients.sparse) if gradients.sparse else Payload(b"")
        return Answered(tuple(gradients.taken), inputs, Packed(payload.data, payload.sizes)), payload

    def _put_input_gradients(self, kept: _Kept, request: Backward) -> Iterator[int]:
        for index, (tensor, piece) in enumerate(zip(kept.inputs, request.inputs, strict=True)):
            if tensor.grad is not None and piece is not None:
                self._windows["traffic"].tensor(request.place, piece).copy_(tensor.grad)
                tensor.grad = None
                yield index
