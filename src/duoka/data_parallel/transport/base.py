"""How tensors travel between the user's process and its helpers: what the engine asks of a transport, on either side.

There are two. ``sharing`` is for CPU workers: tensors lie in memory that all processes see, and nothing is sent. ``sending`` is
for accelerators: tensors are sent from device to device, in the order of the messages that announce them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn

from duoka.data_parallel.messages import BackwardRequest, CreateReplica, ForwardRequest, ForwardResult, ReceiveWeights
from duoka.data_parallel.transport.shared_memory import Allocation, Location, SharedView, TensorSpec
from duoka.workers import WorkerSession
from duoka.workers.channel import Message
from duoka.workers.serialization import Payload

if TYPE_CHECKING:
    from duoka.data_parallel.transport.buckets import BucketLayout
    from duoka.data_parallel.worker_group import WorkerGroup

__all__ = [
    "GradientExchange",
    "WorkerTransport",
    "OwnerTransport",
    "BackwardContext",
    "PendingWork",
    "WorkerConfig",
    "BackwardTask",
    "WeightSync",
    "add_gradients",
]


class WorkerConfig(NamedTuple):
    """What a helper is given to begin with."""

    threads: int
    device: torch.device
    meeting: tuple[Any, ...] | None
    """Where tensors are sent, the arguments of its ``Group``."""


class PendingWork(Protocol):
    """Something that is on its way."""

    def wait(self) -> None:
        """Let what comes after see it."""


class BackwardContext(NamedTuple):
    """What a call knows of its forward when it goes backward."""

    ticket: int
    inputs: Sequence[Sequence[tuple[TensorSpec, bool]]]
    """For each helper with a part, the form of each tensor and whether its gradient is wanted."""
    plan: Any
    """The gradient plan of the weights at that time."""


class WeightSync(Protocol):
    """A model's parameters and buffers, as helpers get to see them."""

    parameters: Sequence[nn.Parameter]
    copies_all: bool
    seats: Any
    """Whoever keeps it keeps the memory that helpers read now."""
    plan: Any
    """Where gradients go."""

    @property
    def parameter_places(self) -> tuple[tuple[Location, TensorSpec, bool], ...]:
        """Place, form, and ``requires_grad`` of each parameter."""

    @property
    def buffer_places(self) -> tuple[tuple[Location, TensorSpec] | None, ...]:
        """Place and form of each buffer."""

    @property
    def bucket_sizes(self) -> tuple[int, ...]:
        """The bytes of the buckets that both travel in, if they do."""

    def follow(self) -> list[int]:
        """Return the numbers of the parameters of which helpers must be told something before the next call."""

    def fit(self, numbers: Sequence[int]) -> bool:
        """Whether these have the shape and type that they had at first."""

    def bring(self, buffers: Sequence[torch.Tensor | None], *, trains: bool) -> None:
        """Let helpers have the values as they are now."""

    def arrived(self) -> None:
        """All helpers have answered, so they have what was brought."""

    def begin_early(self) -> None:
        """Begin with that, because an optimiser has stepped."""

    def distrust(self) -> None:
        """A call has failed half-way: helpers' copies may be anything."""


class GradientExchange(Protocol):
    """One backward under way on the helpers."""

    def fetch(self) -> tuple[dict[int, torch.Tensor], dict[int, dict[int, torch.Tensor]]]:
        """Wait, and return the sums of gradients by parameter, and those of inputs by helper and number."""

    def give_up(self) -> None:
        """Nobody will fetch it."""


class OwnerTransport(Protocol):
    """A transport in the user's process, for one crew."""

    sends: bool
    """Whether tensors are sent: then what was asked must be fetched before anything else is asked."""

    @property
    def folder(self) -> str | None:
        """A private folder of this crew's, to be removed by helpers should the owner be killed."""

    def posts(self, threads: int) -> list[WorkerConfig]:
        """Prepare to meet the helpers, and return what each is given."""

    def connect(self, conversation: WorkerSession) -> None:
        """Meet them."""

    def finish(self) -> None:
        """Let what is under way arrive, before parting from them in good order."""

    def close(self) -> None:
        """Part from them; they may have been killed."""

    def news(self, index: int) -> Iterator[tuple[str, Payload]]:
        """What helper ``index`` must know before the next message."""

    def takes(self, index: int, message: Message) -> bool:
        """Whether a message of helper ``index`` was for the transport alone."""

    def weights(
        self,
        crew: WorkerGroup,
        model: int,
        parameters: Sequence[nn.Parameter],
        buffers: Sequence[torch.Tensor | None],
        *,
        copies_all: bool,
    ) -> WeightSync:
        """Return the weights of one model."""

    def lend(self, nbytes: int) -> Allocation:
        """Return memory to write in what a message speaks of."""

    def deliver(self, index: int, lease: Allocation) -> PendingWork | None:
        """Begin to bring it to the helper that was just sent the message."""

    def outputs(self, index: int, answer: ForwardResult) -> list[torch.Tensor]:
        """Return the tensors of an answer; valid at once, in memory that is the caller's to read."""

    def backward(
        self,
        crew: WorkerGroup,
        passage: BackwardContext,
        gradients: Sequence[Sequence[torch.Tensor | None]],
        *,
        keeps_graph: bool,
    ) -> GradientExchange:
        """Let helpers go backward, each from the gradients of its outputs."""


class BackwardTask(Protocol):
    """One backward in a helper: what it begins with, and where its gradients go."""

    given: list[torch.Tensor]
    taken: set[int]
    """Parameters whose gradient was taken."""
    apart: dict[int, torch.Tensor]
    """Gradients that must travel with the answer."""

    def follow(self, plan: Any) -> None:
        """Take gradients to the places that the forward's plan names."""

    def take(self, index: int, gradient: torch.Tensor) -> None:
        """Take the gradient of one parameter, as soon as it is there."""

    def put_inputs(self, gradients: Sequence[torch.Tensor | None]) -> tuple[int, ...]:
        """Bring those of inputs back, and return the numbers of those that there are."""

    def finish(self) -> None:
        """Complete what others wait for, also after a failure."""


class WorkerTransport(Protocol):
    """A transport in a helper."""

    device: torch.device

    def takes(self, message: Message) -> bool:
        """Whether a message was for the transport alone."""

    def memory(self, request: CreateReplica) -> tuple[SharedView | BucketLayout, SharedView | BucketLayout]:
        """Return where the parameters and the buffers of a new model lie."""

    def refresh(self, request: ReceiveWeights) -> None:
        """Take new values of parameters and buffers."""

    def forget(self, model: int) -> None:
        """A model is gone."""

    def plan(self, parameters: Sequence[nn.Parameter]) -> Any:
        """Return where gradients go, as the owner's weights say it too."""

    def inputs(self, request: ForwardRequest) -> list[torch.Tensor]:
        """Return the tensors of a question."""

    def put(self, outputs: Sequence[torch.Tensor]) -> tuple[Location, int, list[TensorSpec]]:
        """Prepare to bring back tensors, and return where they are."""

    def settle(self, *, is_answered: bool) -> None:
        """Complete it, when the answer has been sent; or forget it, because there was a failure."""

    def task(self, request: BackwardRequest) -> BackwardTask:
        """Begin a backward."""

    def close(self) -> None:
        """Leave."""


def add_gradients(sums: dict[int, torch.Tensor], new: dict[int, torch.Tensor]) -> None:
    """Add what is new to the sums, in place where a sum is the first helper's own memory."""
    both = [n for n in new if n in sums and sums[n].layout is torch.strided and new[n].layout is torch.strided]
    if both:
        torch._foreach_add_([sums[n] for n in both], [new[n] for n in both])
    for n in new.keys() - set(both):
        sums[n] = sums[n] + new[n] if n in sums else new[n]
