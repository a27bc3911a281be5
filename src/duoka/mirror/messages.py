"""What the user's process and its helpers say to each other; tensors travel beside it, these say where they are.

A ``Place`` is one in shared memory, or, of parameters and buffers that are sent, the number of a bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from duoka.mirror.memory import Piece, Place

__all__ = [
    "Ambient",
    "Answered",
    "Backward",
    "Configure",
    "Forget",
    "Forward",
    "Outputs",
    "Packed",
    "Patch",
    "Refresh",
    "Reseat",
]


class Packed(NamedTuple):
    """A pickled object; large buffers lie in the file that travels beside the message."""

    data: bytes
    sizes: tuple[int, ...] = ()


class Ambient(NamedTuple):
    """The modes of torch around a call that decide what it computes."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool
    default_dtype: torch.dtype
    deterministic: tuple[bool, bool]
    precision: str
    own_device: bool
    """Whether a CUDA device that the model's code names means the device of whoever computes."""
    within: Callable[[], AbstractContextManager[Any]] | None = None
    """What else to enter around the call, by its name in an importable module."""


class Configure(NamedTuple):
    """A model, without its tensors: what to build a replica from."""

    model: int
    structure: Packed
    """The model and the options to compile it with."""
    parameters: tuple[tuple[Place, Piece, bool], ...]
    """Place, form, and whether it requires a gradient."""
    buffers: tuple[tuple[Place, Piece] | None, ...]
    buckets: tuple[int, ...]
    """The bytes of each bucket that they are sent in, where they are sent."""
    path: list[str]


class Patch(NamedTuple):
    """New values of attributes: for each module by its number, names and values."""

    model: int
    values: Packed


class Reseat(NamedTuple):
    """Parameters that lie elsewhere now or do not require a gradient any more, by number; see ``Configure``."""

    model: int
    parameters: dict[int, tuple[Place, Piece, bool]]


class Refresh(NamedTuple):
    """Buckets of parameters and buffers that are sent now, by number, in this order."""

    model: int
    buckets: tuple[int, ...]


class Forget(NamedTuple):
    """A model that is gone."""

    model: int


class Forward(NamedTuple):
    """One part of a batch to compute."""

    ticket: int
    model: int
    part: int
    place: Place
    nbytes: int
    inputs: tuple[tuple[Piece, bool], ...]
    """Form, and whether its gradient is wanted."""
    arguments: Packed
    ambient: Ambient
    seed: int
    keeps_graph: bool
    done_with: tuple[int, ...]
    """Tickets of earlier forwards whose graphs nobody needs any more."""


class Outputs(NamedTuple):
    """The answer to ``Forward``."""

    place: Place
    nbytes: int
    tensors: tuple[tuple[Piece, bool], ...]
    """Form, and whether it has a graph."""
    value: Packed
    writes: bool
    """Whether the model writes to its parameters when it is called."""


class Backward(NamedTuple):
    """Gradients of a part's outputs, and where to put those of inputs.

    In shared memory, all are in one region, which those of parameters begin. Where they are sent, ``nbytes`` come with those
    of outputs, those of parameters go into ``buckets``, each so many bytes of one type, and ``returned`` bytes bring back those
    of inputs.
    """

    ticket: int
    forward: int
    place: Place
    nbytes: int
    outputs: tuple[Piece | None, ...]
    inputs: tuple[Piece | None, ...]
    buckets: tuple[tuple[int, torch.dtype], ...]
    returned: int
    keeps_graph: bool
    done_with: tuple[int, ...]


class Answered(NamedTuple):
    """The answer to ``Backward``: the numbers of the parameters and inputs that have a gradient."""

    parameters: tuple[int, ...]
    inputs: tuple[int, ...]
    apart: Packed
    """Gradients of parameters that travel with the message, by number: sparse ones, and any that came too late."""
