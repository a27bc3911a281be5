"""The transport between accelerators: tensors are sent from device to device, announced by messages.

Every member of the group does the same things in the same order, which is that of the messages. Code of the user's stands
nowhere between an announcement and what it announces: inputs are sent with their question, outputs after their answer,
and what a backward has announced is completed even when it fails, with zeros. So nobody waits for what never comes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from duoka.errors import LaunchError
from duoka.mirror.buckets import Bucket, Buckets, allocate, gradient_buckets
from duoka.mirror.group import Group, Pending, backend_of
from duoka.mirror.memory import Lease, Piece, Place, lay_out, tensor_at
from duoka.mirror.messages import Answered, Backward, Configure, Forward, Outputs, Refresh
from duoka.mirror.replica import unpack
from duoka.mirror.sent import SentWeights
from duoka.mirror.transport import Passage, Post, add_gradients
from duoka.team import Conversation, Line
from duoka.team.connection import Message
from duoka.team.payload import Payload

if TYPE_CHECKING:
    from duoka.mirror.crew import Crew

__all__ = ["SendingHelper", "SendingOwner"]

_NOWHERE = Place(0, 0)


class SendingOwner:
    """The user's process as member 0 of a group, the helpers being the others."""

    drains = True

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self._backend = backend_of(devices)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._group: Group | None = None

    @property
    def folder(self) -> str | None:
        """Where the members find each other."""
        return None if self._folder is None else self._folder.name

    def posts(self, threads: int) -> list[Post]:
        """Make a private folder to meet in, and return what each helper is given."""
        self._folder = tempfile.TemporaryDirectory(prefix="duoka-", ignore_cleanup_errors=True)
        size = len(self._devices)
        return [
            Post(threads, device, (self._folder.name, rank, size, device, self._backend))
            for rank, device in enumerate(self._devices)
        ][1:]

    def connect(self, conversation: Conversation) -> None:
        """Wait until all have come, in Python; only then enter torch's rendezvous, which cannot be interrupted."""
        count = len(self._devices) - 1
        for _ in range(count):
            index, message = conversation.receive()
            if message.kind != "met":
                raise LaunchError(f"helper {index} answered {message.kind!r} instead of 'met'; this is a bug in duoka")
        for index in range(count):
            conversation.send(index, "go", Payload(b""))
        assert self.folder is not None
        self._group = Group(self.folder, 0, count + 1, self._devices[0], self._backend)

    def close(self) -> None:
        """Leave the group, and remove the folder."""
        if self._group is not None:
            self._group.close()
            self._group = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def news(self, _: int) -> Iterator[tuple[str, Payload]]:
        """Tell nothing."""
        return iter(())

    def takes(self, _: int, __: Message) -> bool:
        """Take nothing."""
        return False

    def weights(
        self,
        crew: Crew,
        model: int,
        parameters: Sequence[nn.Parameter],
        buffers: Sequence[torch.Tensor | None],
        *,
        copies_all: bool,  # noqa: ARG002 - nothing is shared, so everything is copied
    ) -> SentWeights:
        """Return the weights of one model."""
        return SentWeights(crew, self._members(), model, parameters, buffers)

    def lend(self, nbytes: int) -> Lease:
        """Return memory on the first device."""
        return Lease(_NOWHERE, allocate(nbytes, self._devices[0]))

    def deliver(self, index: int, lease: Lease) -> Pending | None:
        """Send it to the helper that was just sent the message."""
        return self._members().send(lease.base, index + 1) if len(lease.base) else None

    def outputs(self, index: int, answer: Outputs) -> list[torch.Tensor]:
        """Receive the tensors of an answer."""
        base = allocate(answer.nbytes, self._devices[0])
        if answer.nbytes:
            self._members().receive(base, index + 1).wait()
        return [tensor_at(base, piece) for piece, _ in answer.tensors]

    def backward(
        self, crew: Crew, passage: Passage, gradients: Sequence[Sequence[torch.Tensor | None]], *, keeps_graph: bool
    ) -> _SentExchange:
        """Let all helpers go backward, those without a part as well: a sum takes everybody."""
        with crew.all_or_none():
            return _SentExchange(crew, self._members(), passage, gradients, keeps_graph=keeps_graph)

    def _members(self) -> Group:
        assert self._group is not None, "connect() comes first"
        return self._group


class _SentExchange:
    """The sums of the helpers' gradients, on their way to the first device while it computes its own."""

    def __init__(
        self,
        crew: Crew,
        group: Group,
        passage: Passage,
        gradients: Sequence[Sequence[torch.Tensor | None]],
        *,
        keeps_graph: bool,
    ) -> None:
        self._crew, self._passage = crew, passage
        self._buckets: list[Bucket] = passage.plan
        self._asked: list[tuple[int, int]] = []
        device = crew.devices[0]
        forms: list[list[Piece | None]] = []
        for index in range(group.size - 1):
            given = gradients[index] if index < len(gradients) else ()
            slots = self._slots(index) if any(gradient is not None for gradient in given) else []
            forms.append(slots)
            if slots or self._buckets:
                self._ask(index, given, slots, keeps_graph=keeps_graph)
        self._sums = [allocate(bucket.nbytes, device) for bucket in self._buckets]
        self._pending = [
            group.add(base.view(bucket.dtype))
            for base, bucket in zip(self._sums, self._buckets, strict=True)
            if len(base)
        ]
        self._returned: list[tuple[torch.Tensor, list[Piece | None]]] = []
        for index, slots in enumerate(forms):
            base = allocate(_size(slots), device)
            self._returned.append((base, slots))
            if len(base):
                self._pending.append(group.receive(base, index + 1))

    def _slots(self, index: int) -> list[Piece | None]:
        """Where the gradients of a helper's inputs come, in the region that they come in."""
        forms = self._passage.inputs[index]
        rest = iter(_packed([piece for piece, wants in forms if wants]))
        return [next(rest) if wants else None for _, wants in forms]

    def _ask(
        self, index: int, given: Sequence[torch.Tensor | None], slots: list[Piece | None], *, keeps_graph: bool
    ) -> None:
        there = [gradient for gradient in given if gradient is not None]
        pieces, size = lay_out(there)
        lease = self._crew.transport.lend(size)
        with torch.no_grad():
            for gradient, piece in zip(there, pieces, strict=True):
                tensor_at(lease.base, piece).copy_(gradient)
        rest = iter(pieces)
        question = Backward(
            self._crew.new_ticket(),
            self._passage.ticket,
            _NOWHERE,
            size,
            tuple(None if gradient is None else next(rest) for gradient in given),
            tuple(slots),
            tuple((bucket.nbytes, bucket.dtype) for bucket in self._buckets),
            _size(slots),
            keeps_graph,
            (),
        )
        self._crew.ask(index, question, lease)
        self._asked.append((index, question.ticket))

    def fetch(self) -> tuple[dict[int, torch.Tensor], dict[int, dict[int, torch.Tensor]]]:
        """Wait for the answers, in Python; when all are there the sums are there or about to be."""
        answers = self._crew.answers(self._asked)
        with self._crew.all_or_none():
            for pending in self._pending:
                pending.wait()
        taken = {n for answer, _ in answers for n in answer.parameters}
        places = {
            n: (base, piece) for base, b in zip(self._sums, self._buckets, strict=True) for n, piece in b.pieces.items()
        }
        sums = {n: tensor_at(*places[n]) for n in sorted(taken)}
        inputs: dict[int, dict[int, torch.Tensor]] = {}
        for (index, _), (answer, fd) in zip(self._asked, answers, strict=True):
            assert isinstance(answer, Answered)
            if answer.apart.data:
                add_gradients(sums, unpack(answer.apart, fd, self._crew.devices[0]))
            base, slots = self._returned[index]
            inputs[index] = {n: tensor_at(base, piece) for n in answer.inputs if (piece := slots[n]) is not None}
        return sums, inputs

    def give_up(self) -> None:
        """Let it come all the same: what is under way is kept until it is there."""
        for index, ticket in self._asked:
            self._crew.give_up(index, ticket, self._pending)


class SendingHelper:
    """A helper as a member of the group."""

    def __init__(self, device: torch.device, line: Line, meeting: tuple[Any, ...]) -> None:
        self.device = device
        line.send("met", Payload(b""))
        line.receive()  # nobody enters the rendezvous before all are there
        self._group = Group(*meeting)
        self._models: dict[int, Buckets] = {}
        self._base: torch.Tensor | None = None
        self._task: _SentTask | None = None

    def takes(self, _: Message) -> bool:
        """Take nothing."""
        return False

    def memory(self, request: Configure) -> tuple[Buckets, Buckets]:
        """Return new memory for the copies of a model's parameters and buffers."""
        buckets = self._models[request.model] = Buckets(request.buckets, self.device)
        return buckets, buckets

    def refresh(self, request: Refresh) -> None:
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

    def inputs(self, request: Forward) -> list[torch.Tensor]:
        """Receive the tensors of a question."""
        base = self._receive(request.nbytes)
        return [tensor_at(base, piece).data for piece, _ in request.inputs]

    def put(self, outputs: Sequence[torch.Tensor]) -> tuple[Place, int, list[Piece]]:
        """Lay outputs out to be sent when they have been announced."""
        pieces, size = lay_out(outputs)
        self._base = allocate(size, self.device)
        with torch.no_grad():
            for output, piece in zip(outputs, pieces, strict=True):
                tensor_at(self._base, piece).copy_(output)
        return _NOWHERE, size, pieces

    def settle(self, *, is_answered: bool) -> None:
        """Send outputs that have been announced; wait for what was begun."""
        base, self._base = self._base, None
        if is_answered and base is not None and len(base):
            self._group.send(base, 0).wait()
        task, self._task = self._task, None
        if task is not None:
            task.wait()

    def task(self, request: Backward) -> _SentTask:
        """Receive what a backward begins with."""
        base = self._receive(request.nbytes)
        given = [tensor_at(base, piece).data for piece in request.outputs if piece is not None]
        self._task = _SentTask(request, given, self._group, self.device)
        return self._task

    def close(self) -> None:
        """Leave the group."""
        self._group.close()

    def _receive(self, nbytes: int) -> torch.Tensor:
        base = allocate(nbytes, self.device)
        if nbytes:
            self._group.receive(base, 0).wait()
        return base


class _SentTask:
    """Sends each bucket of gradients as soon as it is full and all before it have gone."""

    def __init__(self, request: Backward, given: list[torch.Tensor], group: Group, device: torch.device) -> None:
        self.given = given
        self.taken: set[int] = set()
        self.apart: dict[int, torch.Tensor] = {}
        self._request, self._group, self._device = request, group, device
        self._bases: list[torch.Tensor | None] = [None] * len(request.buckets)
        self._missing: list[set[int]] = []
        self._where: dict[int, tuple[int, Piece]] = {}
        self._gone = 0
        self._pending: list[Pending] = []
        self._returned = allocate(request.returned, device)

    def follow(self, plan: Any) -> None:
        """Take gradients to the buckets that the forward's plan names."""
        self._missing = [set(bucket.pieces) for bucket in plan]
        self._where = {n: (b, piece) for b, bucket in enumerate(plan) for n, piece in bucket.pieces.items()}

    def take(self, index: int, gradient: torch.Tensor) -> None:
        """Copy the gradient; what checkpointing adds to one that has gone travels with the answer."""
        bucket, piece = self._where[index]
        if gradient.layout is not torch.strided or bucket < self._gone:
            self.apart[index] = self.apart[index] + gradient if index in self.apart else gradient
        elif index in self.taken:
            tensor_at(self._base(bucket), piece).add_(gradient)
        else:
            tensor_at(self._base(bucket), piece).copy_(gradient)
            self.taken.add(index)
        self._missing[bucket].discard(index)
        while self._gone < len(self._missing) and not self._missing[self._gone]:
            self._send_next()

    def put_inputs(self, gradients: Sequence[torch.Tensor | None]) -> tuple[int, ...]:
        """Lay those of inputs out to be sent, and return the numbers of those that there are."""
        done = []
        for index, (gradient, piece) in enumerate(zip(gradients, self._request.inputs, strict=True)):
            if gradient is not None and piece is not None:
                tensor_at(self._returned, piece).copy_(gradient)
                done.append(index)
        return tuple(done)

    def finish(self) -> None:
        """Send the rest, zeros where there is nothing: others wait for it."""
        while self._gone < len(self._bases):
            self._send_next()
        if len(self._returned):
            self._pending.append(self._group.send(self._returned, 0))

    def wait(self) -> None:
        """Wait until all has gone."""
        for pending in self._pending:
            pending.wait()

    def _base(self, bucket: int) -> torch.Tensor:
        base = self._bases[bucket]
        if base is None:
            base = self._bases[bucket] = allocate(self._request.buckets[bucket][0], self._device)
        return base

    def _send_next(self) -> None:
        base = self._base(self._gone)
        if len(base):
            self._pending.append(self._group.add(base.view(self._request.buckets[self._gone][1])))
        self._gone += 1


def _packed(pieces: Sequence[Piece]) -> list[Piece]:
    """The same forms, one after the other from 0 on."""
    packed, end = [], 0
    for piece in pieces:
        packed.append(piece._replace(offset=end))
        end += _nbytes(piece)
    return packed


def _size(pieces: Sequence[Piece | None]) -> int:
    return max((piece.offset + _nbytes(piece) for piece in pieces if piece is not None), default=0)


def _nbytes(piece: Piece) -> int:
    count = 1
    for size in piece.shape:
        count *= size
    return -(-count * piece.dtype.itemsize // 64) * 64
