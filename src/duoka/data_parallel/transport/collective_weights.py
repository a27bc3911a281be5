"""Parameters and buffers of the user's model where helpers have copies of them, which are sent what may have changed.

A bucket with a parameter that is being trained, or with buffers, is sent before each forward that keeps a graph: it has nearly
always changed, and to find out would make this process wait for the device. Any other bucket, and all of them in a forward
without a graph, are sent if a version counter or an address has moved; if none has, the content's checksum on the device
decides, because edits through ``.data`` move neither.

What is trained is sent early too, when an optimiser has stepped, while the user's program does other things. If all of it
has gone when the next forward begins, the device has nothing else to do, so the checksum is asked for then as well, and only
what was edited meanwhile is sent again. If not, it was of no use, and is tried less and less often.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from duoka.data_parallel.messages import ReceiveWeights
from duoka.data_parallel.transport.buckets import Bucket, BucketChecksum, gradient_buckets, pack, value_buckets
from duoka.data_parallel.transport.process_group import PendingCollectives, PrivateProcessGroup
from duoka.data_parallel.transport.shared_memory import Location, TensorSpec
from duoka.errors import DeviceError

if TYPE_CHECKING:
    from duoka.data_parallel.worker_group import WorkerGroup

__all__ = ["CollectiveWeightSync"]

_LONGEST_PAUSE = 1023
"""Steps after which sending early is tried again at the latest, where it has not been of use."""


class CollectiveWeightSync:
    """What of one model has been sent, and what is to be sent."""

    copies_all = False
    seats = ()

    def __init__(
        self,
        crew: WorkerGroup,
        group: PrivateProcessGroup,
        model: int,
        parameters: Sequence[nn.Parameter],
        buffers: Sequence[torch.Tensor | None],
    ) -> None:
        self._crew, self._group, self._model = crew, group, model
        self._device = crew.devices[0]
        self.parameters = parameters
        self._forms = [_form(parameter) for parameter in parameters]
        self._check_devices()
        count = len(parameters)
        tensors = [*parameters, *_filled(buffers)]
        kinds = [parameter.requires_grad for parameter in parameters]
        groups = [[n for n in range(count) if kinds[n]], [n for n in range(count) if not kinds[n]]]
        self._buckets: list[Bucket] = value_buckets(tensors, [*groups, range(count, len(tensors))])
        where = {
            n: (Location(b, 0), piece) for b, bucket in enumerate(self._buckets) for n, piece in bucket.pieces.items()
        }
        self._places = [where[n] for n in range(count)]
        rest = iter(range(count, len(tensors)))
        self.buffer_places = tuple(None if buffer is None else where[next(rest)] for buffer in buffers)
        self._marks: list[list[Any]] = [[] for _ in self._buckets]
        self._known: list[torch.Tensor | None] = [None] * len(self._buckets)
        self._checksum: BucketChecksum | None = None
        self._under_way: list[PendingCollectives] = []
        self._early: dict[int, Callable[[], bool]] = {}
        self._pause, self._waits = 0, 0
        self._measure()

    @property
    def parameter_places(self) -> tuple[tuple[Location, TensorSpec, bool], ...]:
        """Bucket, form, and ``requires_grad`` of each parameter."""
        return tuple((*place, wants) for place, wants in zip(self._places, self._wants, strict=True))

    @property
    def bucket_sizes(self) -> tuple[int, ...]:
        """The bytes of each bucket."""
        return tuple(bucket.nbytes for bucket in self._buckets)

    def follow(self) -> list[int]:
        """Return the numbers of parameters that begin or cease to require a gradient, or have another form."""
        self._check_devices()
        moved = [
            index
            for index, parameter in enumerate(self.parameters)
            if parameter.requires_grad != self._wants[index] or _form(parameter) != self._forms[index]
        ]
        if moved:
            self._measure()
        return moved

    def fit(self, numbers: Sequence[int]) -> bool:
        """Whether these have the shape and type that they had at first, so that a replica can go on with them."""
        return all(self._forms[number] == _form(self.parameters[number]) for number in numbers)

    def bring(self, buffers: Sequence[torch.Tensor | None], *, trains: bool) -> None:
        """Send what may have changed."""
        tensors = [*self.parameters, *_filled(buffers)]
        marks = self._look(tensors)
        early = self._take_early()
        live = self._live - early if trains else set()
        moved = {n for n, known in enumerate(self._known) if n in live or known is None or marks[n] != self._marks[n]}
        moved |= self._edited([n for n in range(len(marks)) if n not in moved], tensors)
        self._under_way = list(self._send(sorted(moved), tensors, live).values())

    def arrived(self) -> None:
        """Give back the memory of what was sent: between steps nothing is held but the model's own."""
        under_way, self._under_way = self._under_way, []
        with self._crew.all_or_none():
            for pending in under_way:
                pending.wait()

    def distrust(self) -> None:
        """A call has failed: nobody knows what the model has written to its copies by then."""
        self._known = [None] * len(self._buckets)

    def begin_early(self) -> None:
        """An optimiser has stepped: send what it has changed, if that was of use the last time."""
        if self._pause > 0 or not self.fit(range(len(self.parameters))):
            self._pause -= 1
            return
        marks = self._look(self.parameters)
        stepped = [n for n in self._trained if marks[n] != self._marks[n]]
        self._early.update({n: sent.let_go() for n, sent in self._send(stepped, self.parameters, ()).items()})

    def _take_early(self) -> set[int]:
        """Return the buckets of which all that was sent early has gone."""
        early, self._early = self._early, {}
        if not early:
            return set()
        if all(has_gone() for has_gone in early.values()):
            self._waits = 0
            return set(early)
        self._waits = min(2 * self._waits + 1, _LONGEST_PAUSE)
        self._pause = self._waits
        return set()

    def _look(self, tensors: Sequence[torch.Tensor]) -> list[list[Any]]:
        """Return what moves with most changes, of the given tensors in each bucket."""
        return [[_mark(tensors[n]) for n in bucket.pieces if n < len(tensors)] for bucket in self._buckets]

    def _send(
        self, numbers: Sequence[int], tensors: Sequence[torch.Tensor], unwatched: Collection[int]
    ) -> dict[int, PendingCollectives]:
        """Send these buckets, and remember what they hold, unless that will not be asked."""
        stale = [n for n in numbers if self._buckets[n].nbytes]
        if not stale:
            return {}
        under_way = {}
        self._crew.tell(ReceiveWeights(self._model, tuple(stale)))
        with self._crew.all_or_none():
            for n in stale:
                base = pack(self._buckets[n], tensors, self._device)
                under_way[n] = self._group.broadcast(base)
                self._marks[n] = [_mark(tensors[index]) for index in self._buckets[n].pieces]
                self._known[n] = None if n in unwatched else self._sum(base)
        return under_way

    def _edited(self, numbers: Sequence[int], tensors: Sequence[torch.Tensor]) -> set[int]:
        """Return those whose content is another than what was sent."""
        known = [sent for n in numbers if (sent := self._known[n]) is not None]
        if not known:
            return set()
        now = [self._sum(pack(self._buckets[n], tensors, self._device)) for n in numbers]
        differs = (torch.stack(now) != torch.stack(known)).tolist()
        return {n for n, is_other in zip(numbers, differs, strict=True) if is_other}

    def _sum(self, base: torch.Tensor) -> torch.Tensor:
        if self._checksum is None:
            self._checksum = BucketChecksum(self._device)
        return self._checksum(base)

    def _measure(self) -> None:
        self._wants = [parameter.requires_grad for parameter in self.parameters]
        count = len(self.parameters)
        wanted = {n for n in range(count) if self._wants[n]}
        self._trained = [b for b, bucket in enumerate(self._buckets) if wanted & bucket.pieces.keys()]
        self._live = {b for b, bucket in enumerate(self._buckets) if b in self._trained or max(bucket.pieces) >= count}
        self.plan = gradient_buckets(self.parameters)

    def _check_devices(self) -> None:
        for parameter in self.parameters:
            if parameter.device != self._device:
                raise DeviceError(
                    f"a parameter of shape {tuple(parameter.shape)} is on {parameter.device}, and the first device of "
                    f"duoka.DataParallel is {self._device}. Move the model there: model.to({str(self._device)!r})"
                )


def _filled(buffers: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    return [buffer for buffer in buffers if buffer is not None]


def _form(parameter: nn.Parameter) -> tuple[torch.Size, torch.dtype]:
    return parameter.shape, parameter.dtype


def _mark(tensor: torch.Tensor) -> tuple[int, int]:
    """What moves with most changes; a tensor of inference mode has no version counter."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
