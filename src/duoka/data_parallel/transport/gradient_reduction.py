"""A backward where tensors are sent: the helpers' gradients are added up on their way, bucket by bucket, during the backward.

Both sides know the buckets and their order: those of the parameters that required a gradient when the forward was called. The
answers say which parameters got one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from duoka.data_parallel.messages import BackwardRequest, BackwardResult
from duoka.data_parallel.replica import unpack
from duoka.data_parallel.transport.base import BackwardContext, add_gradients
from duoka.data_parallel.transport.buckets import Bucket, allocate
from duoka.data_parallel.transport.process_group import PendingCollectives, PrivateProcessGroup
from duoka.data_parallel.transport.shared_memory import Location, TensorSpec, lay_out, tensor_at

if TYPE_CHECKING:
    from duoka.data_parallel.worker_group import WorkerGroup

__all__ = ["NOWHERE", "CollectiveGradientExchange", "CollectiveBackwardTask"]

NOWHERE = Location(0, 0)
"""The place of what is sent."""


class CollectiveGradientExchange:
    """The sums of the helpers' gradients, on their way to the first device while it computes its own."""

    def __init__(
        self,
        crew: WorkerGroup,
        group: PrivateProcessGroup,
        passage: BackwardContext,
        gradients: Sequence[Sequence[torch.Tensor | None]],
        *,
        keeps_graph: bool,
    ) -> None:
        self._crew, self._passage = crew, passage
        self._buckets: list[Bucket] = passage.plan
        self._asked: list[tuple[int, int]] = []
        device = crew.devices[0]
        forms: list[list[TensorSpec | None]] = []
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
        self._returned: list[tuple[torch.Tensor, list[TensorSpec | None]]] = []
        for index, slots in enumerate(forms):
            base = allocate(_size(slots), device)
            self._returned.append((base, slots))
            if len(base):
                self._pending.append(group.receive(base, index + 1))

    def _slots(self, index: int) -> list[TensorSpec | None]:
        """Where the gradients of a helper's inputs come, in the region that they come in."""
        forms = self._passage.inputs[index]
        rest = iter(_packed([piece for piece, wants in forms if wants]))
        return [next(rest) if wants else None for _, wants in forms]

    def _ask(
        self, index: int, given: Sequence[torch.Tensor | None], slots: list[TensorSpec | None], *, keeps_graph: bool
    ) -> None:
        there = [gradient for gradient in given if gradient is not None]
        pieces, size = lay_out(there)
        lease = self._crew.transport.lend(size)
        with torch.no_grad():
            for gradient, piece in zip(there, pieces, strict=True):
                tensor_at(lease.base, piece).copy_(gradient)
        rest = iter(pieces)
        question = BackwardRequest(
            self._crew.new_ticket(),
            self._passage.ticket,
            NOWHERE,
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
            assert isinstance(answer, BackwardResult)
            if answer.apart.data:
                add_gradients(sums, unpack(answer.apart, fd, self._crew.devices[0]))
            base, slots = self._returned[index]
            inputs[index] = {n: tensor_at(base, piece) for n in answer.inputs if (piece := slots[n]) is not None}
        return sums, inputs

    def give_up(self) -> None:
        """Let it come all the same: what is under way is kept until it is there."""
        rest = _Rest(len(self._asked), self._pending)
        for index, ticket in self._asked:
            self._crew.give_up(index, ticket, rest)


class _Rest:
    """What is under way to nobody: it must be received all the same, and has been sent when all helpers have answered."""

    def __init__(self, answers: int, pending: Sequence[PendingCollectives]) -> None:
        self._answers, self._pending = answers, pending

    def wait(self) -> None:
        """One helper more has answered."""
        self._answers -= 1
        if self._answers == 0:
            for pending in self._pending:
                pending.wait()


class CollectiveBackwardTask:
    """Sends each bucket of gradients as soon as it is full and all before it have gone."""

    def __init__(
        self, request: BackwardRequest, given: list[torch.Tensor], group: PrivateProcessGroup, device: torch.device
    ) -> None:
        self.given = given
        self.taken: set[int] = set()
        self.apart: dict[int, torch.Tensor] = {}
        self._request, self._group, self._device = request, group, device
        self._bases: list[torch.Tensor | None] = [None] * len(request.buckets)
        self._missing: list[set[int]] = []
        self._where: dict[int, tuple[int, TensorSpec]] = {}
        self._gone = 0
        self._pending: list[PendingCollectives] = []
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


def _packed(pieces: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The same forms, one after the other from 0 on."""
    packed, end = [], 0
    for piece in pieces:
        packed.append(piece._replace(offset=end))
        end += _nbytes(piece)
    return packed


def _size(pieces: Sequence[TensorSpec | None]) -> int:
    return max((piece.offset + _nbytes(piece) for piece in pieces if piece is not None), default=0)


def _nbytes(piece: TensorSpec) -> int:
    count = 1
    for size in piece.shape:
        count *= size
    return -(-count * piece.dtype.itemsize // 64) * 64
