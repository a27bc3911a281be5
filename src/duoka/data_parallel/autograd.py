"""One call of a wrapped model: its questions to the helpers, and its place in the user's autograd graph.

Two nodes stand around the part that the user's process computes itself. ``Finish`` is made before that part, so autograd
comes to it last; ``Gather`` is made after it, so autograd comes to it first: that sends each helper its slice of the
gradient at once, and ``Finish`` fetches what has become of it when this process is through with its own part.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import Function, Variable

from duoka.data_parallel import call_context
from duoka.data_parallel.membership import WorkerGroupRef
from duoka.data_parallel.messages import ForwardRequest, ForwardResult, Pickled
from duoka.data_parallel.replica import unpack
from duoka.data_parallel.scatter_gather import OutputSpec
from duoka.data_parallel.timers import CLOCK
from duoka.data_parallel.transport.base import BackwardContext, GradientExchange, WeightSync
from duoka.data_parallel.transport.shared_memory import Allocation, TensorSpec, lay_out, tensor_at
from duoka.data_parallel.worker_group import WorkerGroup
from duoka.errors import UnsupportedError
from duoka.workers.serialization import dumps

__all__ = ["ParallelCall", "ReduceGradients", "GatherOutputs", "Within", "join_tensors"]

Within = Callable[[], contextlib.AbstractContextManager[Any]]

_SEEDS_APART = 0x9E3779B97F4A7C15


class ParallelCall:
    """One forward on all devices, and the backwards through it."""

    def __init__(
        self,
        crew: WorkerGroup,
        model: int,
        weights: WeightSync,
        sizes: Sequence[int],
        dim: int,
        membership: WorkerGroupRef | None,
    ) -> None:
        self._membership = membership  # the helpers are needed as long as this graph is
        self.sizes, self.dim = sizes, dim
        self.has_graph: list[list[bool]] = []
        self.writes = False
        self._crew, self._model = crew, model
        self._generation = crew.generation
        self._ticket = crew.new_ticket()
        self._weights = weights
        self._seats, self._plan = weights.seats, weights.plan
        self.parameter_numbers = [n for n, parameter in enumerate(weights.parameters) if parameter.requires_grad]
        self._inputs: list[list[tuple[TensorSpec, bool]]] = []
        self._leases: list[Allocation] = []
        self._is_fetched = self._is_spent = False
        self._exchange: list[GradientExchange] = []
        """The one under way; a list, which outlives this call, so that it is given up if a backward fails half-way."""

    def ask(
        self, parts: Sequence[Sequence[torch.Tensor]], arguments: Any, within: Within | None = None
    ) -> torch.Tensor | None:
        """Send each helper its part; returns what ties the helpers' graphs to the user's, if there is to be one.

        Helpers compute inside ``within()``, where that is given.
        """
        parameters = [self._weights.parameters[number] for number in self.parameter_numbers]
        inputs = [tensor for part in parts for tensor in part if tensor.requires_grad]
        keeps_graph = torch.is_grad_enabled() and bool(parameters or inputs)
        modes = call_context.capture(self._crew.devices[0])._replace(within=within)
        payload, seed = dumps(arguments), call_context.draw_seed(self._crew.devices[0])
        end = weakref.finalize(self, _drop, self._crew, self._generation, self._ticket, len(parts), self._exchange)
        end.atexit = False
        with contextlib.closing(payload):
            for index, part in enumerate(parts):
                lease, forms = self._put(part, keeps_graph)
                question = ForwardRequest(
                    self._ticket,
                    self._model,
                    index + 1,
                    lease.place,
                    len(lease.base),
                    tuple(forms),
                    Pickled(payload.data, payload.sizes),
                    modes,
                    (seed + (index + 1) * _SEEDS_APART) % 2**63,
                    keeps_graph,
                    (),
                )
                self._crew.ask(index, question, lease, payload.fd)
                self._inputs.append(forms)
                self._leases.append(lease)
        return ReduceGradients.apply(self, *parameters, *inputs) if keeps_graph else None

    def _put(self, part: Sequence[torch.Tensor], keeps_graph: bool) -> tuple[Allocation, list[tuple[TensorSpec, bool]]]:
        pieces, size = lay_out(part)
        lease = self._crew.transport.lend(size)
        with torch.no_grad():
            for tensor, piece in zip(part, pieces, strict=True):
                tensor_at(lease.base, piece).copy_(tensor, non_blocking=True)
        return lease, [
            (piece, keeps_graph and tensor.requires_grad) for piece, tensor in zip(pieces, part, strict=True)
        ]

    def outputs(self) -> list[tuple[list[torch.Tensor], Any]]:
        """Return each helper's tensors, in its own memory or sent here, and its value with holes for them."""
        self._is_fetched = True
        values: list[tuple[list[torch.Tensor], Pickled, int | None]] = []
        answers, failed = self._crew.await_all([(index, self._ticket) for index in range(len(self._leases))])
        for index, (answer, fd) in answers.items():
            assert isinstance(answer, ForwardResult)
            with self._crew.all_or_none():
                tensors = self._crew.transport.outputs(index, answer)
            self.writes = self.writes or answer.writes
            self.has_graph.append([has_graph for _, has_graph in answer.tensors])
            values.append((tensors, answer.value, fd))
        if failed is not None:
            for _, _, fd in values:
                if fd is not None:
                    os.close(fd)
            raise failed
        return [(tensors, unpack(value, fd, self._crew.devices[0])) for tensors, value, fd in values]

    def abandon(self) -> None:
        """The user's own part has failed: fetch what others bring, where it would be in the way of what comes next."""
        if not self._is_fetched and self._crew.transport.sends and self._generation == self._crew.generation:
            with contextlib.suppress(Exception):
                self.outputs()

    def send_gradients(self, gradients: Sequence[Sequence[torch.Tensor | None]]) -> None:
        """Let the helpers go backward."""
        if self._generation != self._crew.generation:
            raise RuntimeError(
                "the helpers that computed parts of this graph were ended after a failure or by close(); run the forward "
                "again"
            )
        keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        _give_up(self._exchange)  # one that failed half-way
        self._crew.threads.share()
        Variable._execution_engine.queue_callback(self._crew.threads.give_back)
        self._is_spent = not keeps_graph and all(
            gradient is not None or not has_graph
            for given, graphs in zip(gradients, self.has_graph, strict=True)
            for gradient, has_graph in zip(given, graphs, strict=True)
        )
        passage = BackwardContext(self._ticket, self._inputs, self._plan)
        with self._crew.lock:
            self._exchange.append(
                self._crew.transport.backward(self._crew, passage, gradients, keeps_graph=keeps_graph)
            )

    def fetch_gradients(self) -> tuple[dict[int, torch.Tensor], list[torch.Tensor | None]]:
        """Return the sums of the helpers' gradients: of parameters by number, and of inputs in the order of ``Finish``."""
        sums: dict[int, torch.Tensor] = {}
        inputs: dict[int, dict[int, torch.Tensor]] = {}
        for exchange in self._exchange:
            sums, inputs = exchange.fetch()
        self._exchange.clear()
        if self._is_spent:
            self._leases.clear()  # a loss that is kept until the next step keeps no inputs
        self._crew.threads.give_back()
        wanted = [(i, n) for i, forms in enumerate(self._inputs) for n, (_, wants) in enumerate(forms) if wants]
        return sums, [inputs.get(index, {}).get(number) for index, number in wanted]


class ReduceGradients(Function):
    """The parameters' place in the graph before the user's part: its backward returns the helpers' gradients for them."""

    @staticmethod
    def forward(ctx: Any, call: ParallelCall, *tensors: torch.Tensor) -> torch.Tensor:
        """Return a token that only ``Gather`` uses."""
        ctx.call = call
        ctx.hooked = [weakref.ref(tensor) for tensor in tensors]
        ctx.devices = [tensor.device for tensor in tensors]
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the helpers' gradients."""
        with CLOCK.moves():
            parameters, inputs = ctx.call.fetch_gradients()
        gradients = [parameters.get(number) for number in ctx.call.parameter_numbers] + inputs
        for index, tensor in enumerate(ctx.hooked):
            if gradients[index] is not None and gradients[index].device != ctx.devices[index]:
                gradients[index] = gradients[index].to(ctx.devices[index])
            if gradients[index] is not None and (held := tensor()) is not None and held._backward_hooks:
                gradients[index] = gradients[index].clone()  # a hook may keep what it is shown
        # Held until the backward is over, so that autograd copies them rather than making shared memory someone's `grad`.
        Variable._execution_engine.queue_callback(list(gradients).clear)
        return None, *gradients


class GatherOutputs(Function):
    """The parts' outputs joined: its backward sends each helper its slice of the gradient, first of all nodes."""

    @staticmethod
    def forward(
        ctx: Any,
        call: ParallelCall,
        joints: Sequence[OutputSpec],
        others: list[list[torch.Tensor]],
        token: torch.Tensor,
        *own: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return one tensor for each joint."""
        tensors = [list(own), *others]
        graphs = [list(ctx.needs_input_grad[4:]), *call.has_graph]
        ctx.call, ctx.joints, ctx.graphs = call, joints, graphs
        ctx.shapes = [[tensor.shape for tensor in part] for part in tensors]
        ctx.like_token = token.detach()
        ctx.set_materialize_grads(False)
        results = tuple(join_tensors(joint, tensors, call.dim) for joint in joints)
        without = [
            r
            for r, joint in zip(results, joints, strict=True)
            if not any(graphs[h.part][h.number] for h in joint.holes)
        ]
        ctx.mark_non_differentiable(*without)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Share out the gradients."""
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "a backward with create_graph=True (double backward) cannot go through duoka.DataParallel: helpers return "
                "gradients, not graphs. Compute this part of the loss on the wrapped model itself: model.module(x)"
            )
        with CLOCK.moves():
            parts: list[list[torch.Tensor | None]] = [[None] * len(shapes) for shapes in ctx.shapes]
            for joint, gradient in zip(ctx.joints, gradients, strict=True):
                if gradient is not None:
                    for hole, piece in zip(joint.holes, _cut(gradient, joint, ctx.shapes, ctx.call.dim), strict=True):
                        parts[hole.part][hole.number] = piece if ctx.graphs[hole.part][hole.number] else None
            ctx.call.send_gradients(parts[1:])
        return None, None, None, torch.zeros_like(ctx.like_token), *parts[0]


def join_tensors(joint: OutputSpec, tensors: Sequence[Sequence[torch.Tensor]], dim: int) -> torch.Tensor:
    """Return the parts' tensors one after the other along ``dim``; of numbers, a vector with one from each part."""
    given = [tensors[hole.part][hole.number] for hole in joint.holes]
    if not joint.is_joined:
        return given[0].clone()
    return torch.stack(given) if given[0].dim() == 0 else torch.cat(given, dim)


def _cut(
    gradient: torch.Tensor, joint: OutputSpec, shapes: Sequence[Sequence[torch.Size]], dim: int
) -> Sequence[torch.Tensor]:
    of = [shapes[hole.part][hole.number] for hole in joint.holes]
    if not joint.is_joined:
        return [gradient]
    if not of[0]:
        return gradient.unbind()
    return torch.split(gradient, [shape[dim] for shape in of], dim)


def _drop(crew: WorkerGroup, generation: int, ticket: int, helpers: int, exchange: list[GradientExchange]) -> None:
    if not crew.is_ours:
        return
    if generation == crew.generation:
        _give_up(exchange)
    for index in range(helpers):
        crew.give_up(index, ticket)
    crew.drop(ticket)


def _give_up(exchange: list[GradientExchange]) -> None:
    while exchange:
        exchange.pop().give_up()
