"""The transport between CPU workers: tensors lie in memory that all processes see, messages say where."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from duoka.data_parallel.messages import (
    BackwardRequest,
    BackwardResult,
    CreateReplica,
    ForwardRequest,
    ForwardResult,
    ReceiveWeights,
)
from duoka.data_parallel.replica import unpack
from duoka.data_parallel.transport.base import BackwardContext, WorkerConfig, add_gradients
from duoka.data_parallel.transport.shared_memory import (
    Allocation,
    Location,
    SharedArena,
    SharedView,
    TensorSpec,
    lay_out,
    tensor_at,
)
from duoka.data_parallel.transport.shared_weights import SharedWeightSync, gradient_pieces
from duoka.workers import WorkerChannel, WorkerSession
from duoka.workers.channel import Message
from duoka.workers.serialization import Payload

if TYPE_CHECKING:
    from duoka.data_parallel.worker_group import WorkerGroup

__all__ = ["SharedWorkerTransport", "SharedOwnerTransport"]

_CPU = torch.device("cpu")


class SharedOwnerTransport:
    """What the user's process shares with the helpers of one crew."""

    sends = False
    folder = None

    def __init__(self, devices: Sequence[torch.device], weights: SharedArena) -> None:
        self.traffic = SharedArena("traffic")
        self._devices, self._weights = devices, weights
        self._windows: list[SharedView] = []
        self._announced: list[dict[str, int]] = []

    def posts(self, threads: int) -> list[WorkerConfig]:
        """Prepare to meet the helpers, and return what each is given."""
        count = len(self._devices) - 1
        self._windows = [SharedView() for _ in range(count)]
        self._announced = [{} for _ in range(count)]
        return [WorkerConfig(threads, _CPU, None)] * count

    def connect(self, _: WorkerSession) -> None:
        """Do nothing: memory is announced when there is some."""

    def finish(self) -> None:
        """Do nothing: an answer says that all is written."""

    def close(self) -> None:
        """Give the memory back, except what somebody still holds."""
        self._windows.clear()
        self.traffic.close()

    def news(self, index: int) -> Iterator[tuple[str, Payload]]:
        """Announce new memory before anything refers to it."""
        for arena in (self._weights, self.traffic):
            known = self._announced[index].get(arena.name, 0)
            for segment in arena.segments[known:]:
                yield arena.name, Payload(b"", fd=segment.fd)
            self._announced[index][arena.name] = len(arena.segments)

    def takes(self, index: int, message: Message) -> bool:
        """Take new memory of a helper's."""
        if message.kind != "segment":
            return False
        assert message.payload.fd is not None
        self._windows[index].add(message.payload.fd)
        return True

    def weights(
        self,
        _: WorkerGroup,
        __: int,
        parameters: Sequence[nn.Parameter],
        buffers: Sequence[torch.Tensor | None],
        *,
        copies_all: bool,
    ) -> SharedWeightSync:
        """Return the weights of one model."""
        return SharedWeightSync(parameters, buffers, self._weights, self.traffic, copies_all=copies_all)

    def lend(self, nbytes: int) -> Allocation:
        """Return memory to write in what a message speaks of."""
        return self.traffic.lend(nbytes)

    def deliver(self, _: int, __: Allocation) -> None:
        """Do nothing: it is there."""

    def outputs(self, index: int, answer: ForwardResult) -> list[torch.Tensor]:
        """Return the tensors in the helper's own memory."""
        return self._windows[index].tensors(answer.place, [piece for piece, _ in answer.tensors])

    def backward(
        self,
        crew: WorkerGroup,
        passage: BackwardContext,
        gradients: Sequence[Sequence[torch.Tensor | None]],
        *,
        keeps_graph: bool,
    ) -> _SharedGradientExchange:
        """Let those helpers go backward that are given any gradients."""
        exchange = _SharedGradientExchange(crew, passage)
        for index, given in enumerate(gradients):
            if any(gradient is not None for gradient in given):
                exchange.ask(index, given, self.traffic, keeps_graph=keeps_graph)
        return exchange


class _SharedGradientExchange:
    """One region a helper: it begins with the gradients of parameters, then come those of outputs, then those of inputs."""

    def __init__(self, crew: WorkerGroup, passage: BackwardContext) -> None:
        self._crew, self._passage = crew, passage
        self._asked: list[tuple[int, int, Allocation, list[TensorSpec | None]]] = []

    def ask(self, index: int, given: Sequence[torch.Tensor | None], arena: SharedArena, *, keeps_graph: bool) -> None:
        """Let one helper go backward."""
        forms = self._passage.inputs[index]
        pieces, size = lay_out([g for g in given if g is not None], self._passage.plan[1])
        wanting = [piece for piece, wants in forms if wants]
        inputs = iter([piece._replace(offset=size + piece.offset) for piece in wanting])
        size += max((p.offset for p in wanting), default=0) + max((_nbytes(p) for p in wanting), default=0)
        lease = arena.lend(size)
        rest = iter(pieces)
        outputs = [None if gradient is None else next(rest) for gradient in given]
        with torch.no_grad():
            for gradient, place in zip(given, outputs, strict=True):
                if gradient is not None and place is not None:
                    tensor_at(lease.base, place).copy_(gradient)
        slots = [next(inputs) if wants else None for _, wants in forms]
        ticket = self._crew.new_ticket()
        question = BackwardRequest(
            ticket, self._passage.ticket, lease.place, size, tuple(outputs), tuple(slots), (), 0, keeps_graph, ()
        )
        self._crew.ask(index, question, lease)
        self._asked.append((index, ticket, lease, slots))

    def fetch(self) -> tuple[dict[int, torch.Tensor], dict[int, dict[int, torch.Tensor]]]:
        """Wait, and add up."""
        sums: dict[int, torch.Tensor] = {}
        inputs: dict[int, dict[int, torch.Tensor]] = {}
        answers = self._crew.answers([(index, ticket) for index, ticket, *_ in self._asked])
        for (index, _, lease, slots), (answer, fd) in zip(self._asked, answers, strict=True):
            assert isinstance(answer, BackwardResult)
            places = self._passage.plan[0]
            add_gradients(sums, {n: tensor_at(lease.base, places[n]) for n in answer.parameters})
            if answer.apart.data:
                add_gradients(sums, unpack(answer.apart, fd, _CPU))
            inputs[index] = {n: tensor_at(lease.base, piece) for n in answer.inputs if (piece := slots[n]) is not None}
        return sums, inputs

    def give_up(self) -> None:
        """Let the memory come back when the answers do."""
        for index, ticket, *_ in self._asked:
            self._crew.give_up(index, ticket)


class SharedWorkerTransport:
    """The same memory, seen from a helper."""

    def __init__(self, device: torch.device, line: WorkerChannel) -> None:
        self.device = device
        self._line = line
        self._windows = {"weights": SharedView(is_private=sys.platform == "linux"), "traffic": SharedView()}
        self._arena = SharedArena("outputs")
        self._announced = 0
        self._lease: Allocation | None = None

    def takes(self, message: Message) -> bool:
        """Take new memory of the owner's."""
        if message.kind not in self._windows:
            return False
        assert message.payload.fd is not None
        self._windows[message.kind].add(message.payload.fd)
        return True

    def memory(self, _: CreateReplica) -> tuple[SharedView, SharedView]:
        """Return the owner's memory, the same for all models."""
        return self._windows["weights"], self._windows["traffic"]

    def refresh(self, _: ReceiveWeights) -> None:
        """Do nothing: it is never asked."""

    def forget(self, _: int) -> None:
        """Do nothing: the memory is the owner's."""

    def plan(self, parameters: Sequence[nn.Parameter]) -> Any:
        """Return where gradients lie in the region of a backward."""
        return gradient_pieces(parameters)

    def inputs(self, request: ForwardRequest) -> list[torch.Tensor]:
        """Return the tensors of a question."""
        return self._windows["traffic"].tensors(request.place, [piece for piece, _ in request.inputs])

    def put(self, outputs: Sequence[torch.Tensor]) -> tuple[Location, int, list[TensorSpec]]:
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
        return self._lease.place, size, pieces

    def settle(self, *, is_answered: bool) -> None:
        """Do nothing: it is there."""

    def task(self, request: BackwardRequest) -> _SharedBackwardTask:
        """Begin a backward."""
        return _SharedBackwardTask(request, self._windows["traffic"])

    def close(self) -> None:
        """Do nothing: the memory goes with whoever holds it."""


class _SharedBackwardTask:
    """Writes each gradient where the owner reads it, while it is still in the cache."""

    def __init__(self, request: BackwardRequest, window: SharedView) -> None:
        self.given = [window.tensor(request.place, piece) for piece in request.outputs if piece is not None]
        self.taken: set[int] = set()
        self.apart: dict[int, torch.Tensor] = {}
        self._request, self._window = request, window
        self._slots: Sequence[torch.Tensor | None] = ()

    def follow(self, plan: Any) -> None:
        """Take gradients to the places that the forward's plan names."""
        place = self._request.place
        self._slots = [None if piece is None else self._window.tensor(place, piece) for piece in plan[0]]

    def take(self, index: int, gradient: torch.Tensor) -> None:
        """Copy the gradient, or add it where checkpointing makes several of one backward."""
        slot = self._slots[index]
        assert slot is not None
        if gradient.layout is not torch.strided:
            self.apart[index] = self.apart[index] + gradient if index in self.apart else gradient
        elif index in self.taken:
            slot.add_(gradient)
        else:
            slot.copy_(gradient)
            self.taken.add(index)

    def put_inputs(self, gradients: Sequence[torch.Tensor | None]) -> tuple[int, ...]:
        """Write those of inputs, and return the numbers of those that there are."""
        done = []
        for index, (gradient, piece) in enumerate(zip(gradients, self._request.inputs, strict=True)):
            if gradient is not None and piece is not None:
                self._window.tensor(self._request.place, piece).copy_(gradient)
                done.append(index)
        return tuple(done)

    def finish(self) -> None:
        """Do nothing: nobody waits for anything but the answer."""


def _nbytes(piece: TensorSpec) -> int:
    return piece.dtype.itemsize * max(1, sum((s - 1) * t for s, t in zip(piece.shape, piece.stride, strict=True)) + 1)
