"""Parameters and buffers of the user's model in memory that CPU workers share, so that no change of a value has to be sent.

A parameter whose storage is its own is moved into shared memory once: whatever changes it afterwards, ``.data`` included,
helpers see. One whose storage somebody else looks at too (a state dict taken before, an embedding made from a tensor, a
view of a flat vector) stays where it is, so that they keep seeing each other, and is copied for helpers before each call.
Buffers are copied as well, because a call changes them while helpers still read them; so are all parameters of a model
that changes its parameters when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from duoka.data_parallel.transport.shared_memory import (
    Location,
    SharedArena,
    TensorSpec,
    dense_stride,
    lay_out,
    tensor_at,
)
from duoka.errors import DeviceError

__all__ = ["SharedWeightSync", "gradient_pieces"]


class SharedWeightSync:
    """Where each parameter and buffer of one model lies for helpers to read."""

    bucket_sizes = ()

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        buffers: Sequence[torch.Tensor | None],
        own: SharedArena,
        traffic: SharedArena,
        *,
        copies_all: bool,
    ) -> None:
        self.parameters = parameters
        self.copies_all = copies_all
        self._own = own
        self.seats: tuple[_Placement, ...] = tuple(self._seat(parameter) for parameter in parameters)
        """Replaced, never changed: a call that keeps them keeps the memory of the parameters that it used."""
        self._forms = [_form(parameter) for parameter in parameters]
        self._measure()
        filled = [buffer for buffer in buffers if buffer is not None]
        pieces, size = lay_out(filled)
        lease = traffic.lend(size)
        self._buffer_slots = [tensor_at(lease.base, piece) for piece in pieces]
        places = iter((lease.place, piece) for piece in pieces)
        self.buffer_places = tuple(None if buffer is None else next(places) for buffer in buffers)

    @property
    def parameter_places(self) -> tuple[tuple[Location, TensorSpec, bool], ...]:
        """Place, form, and ``requires_grad`` of each parameter."""
        return tuple((s.place, s.piece, s.requires_grad) for s in self.seats)

    def follow(self) -> list[int]:
        """Give a new place to what has become another tensor since the last call, and return the numbers of these."""
        pairs = list(zip(self.parameters, self.seats, strict=True))
        moved = [index for index, (parameter, seat) in enumerate(pairs) if not seat.holds(parameter)]
        if moved:
            self.seats = tuple(seat if seat.holds(parameter) else self._seat(parameter) for parameter, seat in pairs)
            self._measure()
        return moved

    def fit(self, numbers: Sequence[int]) -> bool:
        """Whether these have the shape and type that they had at first, so that a replica can go on with them."""
        return all(self._forms[number] == _form(self.parameters[number]) for number in numbers)

    def _measure(self) -> None:
        self.plan = gradient_pieces(self.parameters)

    def bring(self, buffers: Sequence[torch.Tensor | None], *, trains: bool) -> None:  # noqa: ARG002 - it costs too little
        """Copy what is not shared to where helpers read it."""
        sources = [buffer for buffer in buffers if buffer is not None]
        targets = list(self._buffer_slots)
        for parameter, seat in zip(self.parameters, self.seats, strict=True):
            if seat.copy is not None:
                sources.append(parameter)
                targets.append(seat.copy)
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def arrived(self) -> None:
        """Do nothing: nothing was on its way."""

    def begin_early(self) -> None:
        """Do nothing: what an optimiser has changed is there."""

    def distrust(self) -> None:
        """Do nothing: what a helper writes stays in the helper."""

    def _seat(self, parameter: nn.Parameter) -> _Placement:
        if parameter.device.type != "cpu":
            raise DeviceError(
                f"a parameter of shape {tuple(parameter.shape)} is on {parameter.device}, and duoka.DataParallel was given "
                "CPU workers. Move the model to the CPU, or wrap it with its own device."
            )
        pieces, size = lay_out([parameter])
        place = None if self.copies_all else self._own.find(parameter)
        if place is None and not self.copies_all and _is_alone(parameter):
            place = self._move(parameter, pieces[0])
        if place is not None:
            form = TensorSpec(0, tuple(parameter.shape), parameter.stride(), parameter.dtype)
            return _Placement(parameter, place, form, None)
        lease = self._own.lend(size)
        return _Placement(parameter, lease.place, pieces[0], tensor_at(lease.base, pieces[0]))

    def _move(self, parameter: nn.Parameter, piece: TensorSpec) -> Location:
        lease = self._own.lend(parameter.untyped_storage().nbytes())
        view = tensor_at(lease.base, piece)
        view.copy_(parameter.data)
        parameter.data = view
        return lease.place


def gradient_pieces(parameters: Sequence[nn.Parameter]) -> tuple[list[TensorSpec | None], int]:
    """Return where the gradients of those parameters that require one lie, and how many bytes they take."""
    pieces, size = lay_out([parameter for parameter in parameters if parameter.requires_grad])
    rest = iter(pieces)
    return [next(rest) if parameter.requires_grad else None for parameter in parameters], size


class _Placement:
    """Where one parameter lies for helpers, and how to see that it has become another tensor."""

    __slots__ = ("_dtype", "_held", "_pointer", "_shape", "copy", "piece", "place", "requires_grad")

    def __init__(self, parameter: nn.Parameter, place: Location, piece: TensorSpec, copy: torch.Tensor | None) -> None:
        self.place, self.piece, self.copy = place, piece, copy
        self.requires_grad = parameter.requires_grad
        self._held = parameter.data  # its memory is not lent to others while a helper may read it
        self._shape, self._dtype, self._pointer = parameter.shape, parameter.dtype, parameter.data_ptr()

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter is as it was: shape, type and ``requires_grad``, and its memory, where that is shared."""
        return (
            (self.copy is not None or parameter.data_ptr() == self._pointer)
            and parameter.requires_grad == self.requires_grad
            and parameter.shape == self._shape
            and parameter.dtype == self._dtype
        )


def _form(parameter: nn.Parameter) -> tuple[torch.Size, torch.dtype]:
    return parameter.shape, parameter.dtype


def _is_alone(parameter: nn.Parameter) -> bool:
    """Whether nothing else looks at its storage, so that moving it goes unnoticed."""
    storage = parameter.untyped_storage()
    if storage.nbytes() != parameter.numel() * parameter.element_size() or storage.nbytes() == 0:
        return False
    if parameter.stride() != dense_stride(parameter):
        return False
    holders: int = torch._C._storage_Use_Count(storage._cdata)
    return holders <= 2  # the parameter, and the name `storage` here
