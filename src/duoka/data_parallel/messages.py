"""What the user's process and its helpers say to each other; tensors travel beside it, these say where they are.

A ``Place`` is one in shared memory, or, of parameters and buffers that are sent, the number of a bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from duoka.data_parallel.transport.shared_memory import Location, TensorSpec

__all__ = [
    "TorchModes",
    "BackwardResult",
    "BackwardRequest",
    "CreateReplica",
    "DeleteReplica",
    "ForwardRequest",
    "ForwardResult",
    "Pickled",
    "UpdateAttributes",
    "ReceiveWeights",
    "RebindParameters",
]


class Pickled(NamedTuple):
    """A pickled object; large buffers lie in the file that travels beside the message."""

    data: bytes
    sizes: tuple[int, ...] = ()


class TorchModes(NamedTuple):
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


class CreateReplica(NamedTuple):
    """A model, without its tensors: what to build a replica from."""

    model: int
    structure: Pickled
    """The model and the options to compile it with."""
    parameters: tuple[tuple[Location, TensorSpec, bool], ...]
    """Place, form, and whether it requires a gradient."""
    buffers: tuple[tuple[Location, TensorSpec] | None, ...]
    buckets: tuple[int, ...]
    """The bytes of each bucket that they are sent in, where they are sent."""
    path: list[str]


class UpdateAttributes(NamedTuple):
    """New values of attributes: for each module by its number, names and values."""

    model: int
    values: Pickled


class RebindParameters(NamedTuple):
    """Parameters that lie elsewhere now or do not require a gradient any more, by number; see ``Configure``."""

    model: int
    parameters: dict[int, tuple[Location, TensorSpec, bool]]


class ReceiveWeights(NamedTuple):
    """Buckets of parameters and buffers that are sent now, by number, in this order."""

    model: int
    buckets: tuple[int, ...]


class DeleteReplica(NamedTuple):
    """A model that is gone."""

    model: int


class ForwardRequest(NamedTuple):
    """One part of a batch to compute."""

    ticket: int
    model: int
    part: int
    place: Location
    nbytes: int
    inputs: tuple[tuple[TensorSpec, bool], ...]
    """Form, and whether its gradient is wanted."""
    arguments: Pickled
    ambient: TorchModes
    seed: int
    keeps_graph: bool
    done_with: tuple[int, ...]
    """Tickets of earlier forwards whose graphs nobody needs any more."""


class ForwardResult(NamedTuple):
    """The answer to ``Forward``."""

    place: Location
    nbytes: int
    tensors: tuple[tuple[TensorSpec, bool], ...]
    """Form, and whether it has a graph."""
    value: Pickled
    writes: bool
    """Whether the model writes to its parameters when it is called."""


class BackwardRequest(NamedTuple):
    """Gradients of a part's outputs, and where to put those of inputs.

    In shared memory, all are in one region, which those of parameters begin. Where they are sent, ``nbytes`` come with those
    of outputs, those of parameters go into ``buckets``, each so many bytes of one type, and ``returned`` bytes bring back those
    of inputs.
    """

    ticket: int
    forward: int
    place: Location
    nbytes: int
    outputs: tuple[TensorSpec | None, ...]
    inputs: tuple[TensorSpec | None, ...]
    buckets: tuple[tuple[int, torch.dtype], ...]
    returned: int
    keeps_graph: bool
    done_with: tuple[int, ...]


class BackwardResult(NamedTuple):
    """The answer to ``Backward``: the numbers of the parameters and inputs that have a gradient."""

    parameters: tuple[int, ...]
    inputs: tuple[int, ...]
    apart: Pickled
    """Gradients of parameters that travel with the message, by number: sparse ones, and any that came too late."""
