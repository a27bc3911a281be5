"""Messages between rank 0 and its workers. Tensors travel separately; messages say where they are.

A ``Location`` is a place in shared memory, or a bucket where parameters and buffers are broadcast.
"""

import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch

from duoka.data_parallel.tensor_layout import Location, TensorSpec
from duoka.workers.serialization import Payload

BufferPlacement: TypeAlias = tuple[Location, TensorSpec]
ParameterPlacement: TypeAlias = tuple[Location, TensorSpec, bool, bool]
"""Location, spec, ``requires_grad``, and whether it is an ``nn.Parameter``."""
ContextFactory: TypeAlias = Callable[[], AbstractContextManager[Any]]
"""Returns a context manager; workers find the function by name in its module."""


class CreateReplica(NamedTuple):
    """Create a replica of a model: its structure without tensors, and where the tensors are."""

    model: int
    payload: Payload
    """The model, the options of ``torch.compile``, and ``ModelSnapshot.namespaces``."""
    parameters: tuple[ParameterPlacement, ...]
    buffers: tuple[BufferPlacement | None, ...]
    bucket_nbytes: tuple[int, ...]
    """Size of each bucket, where parameters and buffers are broadcast."""
    sys_path: list[str]


class UpdateAttributes(NamedTuple):
    """Set new values; ``payload`` has a ``ModelChanges``."""

    model: int
    payload: Payload


class RebindParameters(NamedTuple):
    """Use other memory or another ``requires_grad`` for some parameters, by index."""

    model: int
    parameters: dict[int, ParameterPlacement]


class ReceiveWeights(NamedTuple):
    """Receive these buckets of parameters and buffers, in this order."""

    model: int
    buckets: tuple[int, ...]


class DeleteReplica(NamedTuple):
    """Delete the replica of a model."""

    model: int


class ForwardRequest(NamedTuple):
    """Run the forward on one chunk of a batch."""

    call_id: int
    model: int
    rank: int
    location: Location
    nbytes: int
    inputs: tuple[tuple[TensorSpec, bool], ...]
    """Spec of each input, and whether it needs a gradient."""
    payload: Payload
    """The arguments, with placeholders for the inputs."""
    settings: dict[str, Any]
    """Process-wide settings, see ``utils.torch_settings``."""
    modes: tuple[ContextFactory, ...]
    """Contexts to enter around the call, outermost first."""
    seed: int
    keep_graph: bool
    is_check: bool
    """Whether a copy of the model computes this, so that nothing stays in the replica."""
    released_calls: tuple[int, ...] = ()
    """Earlier forward calls whose graphs rank 0 has released."""


class ForwardResult(NamedTuple):
    """Result of a ``ForwardRequest``."""

    location: Location
    nbytes: int
    outputs: tuple[tuple[TensorSpec, bool], ...]
    """Spec of each output, and whether it has a graph."""
    payload: Payload
    """The output value, with placeholders for its tensors."""
    writes_parameters: bool
    """Whether the model's forward writes to its parameters."""


class BackwardRequest(NamedTuple):
    """Run the backward of one chunk from the gradients of its outputs.

    One block holds gradients of parameters (in shared memory only), outputs, then inputs. With
    collectives, rank 0 sends its first ``nbytes``; workers reduce gradients of parameters in ``buckets``
    (size, dtype), and send back the last ``input_nbytes``.
    """

    call_id: int
    forward_call_id: int
    location: Location
    nbytes: int
    outputs: tuple[TensorSpec | None, ...]
    inputs: tuple[TensorSpec | None, ...]
    keep_graph: bool
    buckets: tuple[tuple[int, torch.dtype], ...] = ()
    input_nbytes: int = 0
    released_calls: tuple[int, ...] = ()


class BackwardResult(NamedTuple):
    """Result of a ``BackwardRequest``: indices of the parameters and inputs that have a gradient."""

    parameters: tuple[int, ...]
    inputs: tuple[int, ...]
    payload: Payload
    """Gradients of parameters inside the message, by index: sparse ones, and late ones."""


Notification: TypeAlias = CreateReplica | UpdateAttributes | RebindParameters | ReceiveWeights | DeleteReplica
"""A message without a result, for every worker."""
Request: TypeAlias = ForwardRequest | BackwardRequest
"""A message with a result, for one worker."""


def encode(message: Any) -> Payload:
    """Pickle a message; the memory file of its payload accompanies it."""
    payload: Payload | None = getattr(message, "payload", None)
    if payload is None or payload.fd is None:
        return Payload(pickle.dumps(message))
    return Payload(pickle.dumps(message._replace(payload=replace(payload, fd=None))), fd=payload.fd)


def decode(encoded: Payload) -> Any:
    """Return the message that ``encode`` has pickled."""
    message = pickle.loads(encoded.data)
    return message if encoded.fd is None else message._replace(payload=replace(message.payload, fd=encoded.fd))
