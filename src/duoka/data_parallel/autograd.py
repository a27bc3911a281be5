"""Parallel call in the user's autograd graph: scatter inputs, gather outputs, reduce gradients.

Two autograd nodes surround the part that rank 0 computes itself. ``ReduceGradients`` is created
before that part, so its backward runs last; ``GatherOutputs`` is created after it, so its backward
runs first (``docs/design.md``).
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd import Function

from duoka.data_parallel.call_context import TIMERS, capture_modes, draw_seed
from duoka.data_parallel.gather import OutputSpec, join_tensors, scatter_gradient
from duoka.data_parallel.gradient_exchange import GradientExchange
from duoka.data_parallel.messages import ContextFactory, ForwardRequest, ForwardResult
from duoka.data_parallel.scatter import Part
from duoka.data_parallel.tensor_layout import Allocation, TensorSpec, copy_to_layout, pack_layout
from duoka.data_parallel.transport.base import WeightSync
from duoka.data_parallel.worker_group import WorkerGroup, WorkerGroupRef
from duoka.errors import UnsupportedError
from duoka.utils.torch_private import backward_keeps_graph, run_after_backward
from duoka.utils.torch_settings import capture_torch_settings
from duoka.workers.serialization import Payload, dumps, load_and_close

_SEED_STEP = 0x9E3779B97F4A7C15
"""Distance of two ranks' seeds."""


class ParallelCall:
    """One forward on all devices, and the backwards through it."""

    def __init__(
        self,
        group: WorkerGroup,
        model: int,
        weights: WeightSync,
        sizes: list[int],
        ref: WorkerGroupRef | None,
    ) -> None:
        self._group_ref = ref  # keeps the workers as long as this graph
        self.sizes = sizes
        self.has_graph: list[list[bool]] = []
        self.writes_parameters = False
        self._group, self._model = group, model
        self._generation = group.generation
        self._call_id = group.new_call_id()
        self._generators = weights.snapshot.generators()
        self._parameters, self._placements = weights.parameters, weights.placements
        self._gradient_layout = weights.gradient_layout
        self.parameter_indices = [n for n, parameter in enumerate(self._parameters) if parameter.requires_grad]
        self._inputs: list[list[TensorSpec | None]] = []
        self._allocations: list[Allocation] = []
        self._is_gathered = self._is_graph_freed = False
        self._exchanges: list[GradientExchange] = []
        """The backward under way: a list that outlives this call, so that a failed one can be discarded."""

    def scatter_inputs(self, parts: Sequence[Part], context: ContextFactory | None = None) -> torch.Tensor | None:
        """Send each worker its part, and return a token that connects the workers' graphs to the user's."""
        parameters = [self._parameters[index] for index in self.parameter_indices]
        inputs = [tensor for part in parts for tensor in part.tensors if tensor.requires_grad]
        keep_graph = context is None and torch.is_grad_enabled() and bool(parameters or inputs)
        device = self._group.devices[0]
        settings, seed = capture_torch_settings(), draw_seed(device, self._generators)
        finalizer = weakref.finalize(
            self, _release_graph, self._group, self._generation, self._call_id, len(parts), self._exchanges
        )
        finalizer.atexit = False
        with contextlib.ExitStack() as stack:
            payloads: dict[int, Payload] = {}
            for index, (chunk, structure) in enumerate(parts):
                rank = index + 1
                if id(structure) not in payloads:  # all parts have one structure, but for lists with one item a sample
                    payloads[id(structure)] = stack.enter_context(contextlib.closing(dumps(structure)))
                specs, size = pack_layout(chunk)
                allocation = self._group.transport.allocate(size)
                copy_to_layout(allocation.base, specs, chunk, non_blocking=True)
                needs = [keep_graph and tensor.requires_grad for tensor in chunk]
                self._inputs.append([spec if needed else None for spec, needed in zip(specs, needs, strict=True)])
                request = ForwardRequest(
                    self._call_id,
                    self._model,
                    rank,
                    allocation.location,
                    size,
                    tuple(zip(specs, needs, strict=True)),
                    payloads[id(structure)],
                    settings,
                    capture_modes(self._group.devices[rank], context),
                    (seed + rank * _SEED_STEP) % 2**63,
                    keep_graph,
                    is_check=context is not None,
                )
                self._group.request(index, request, allocation)
                self._allocations.append(allocation)
        return ReduceGradients.apply(self, *parameters, *inputs) if keep_graph else None

    def gather_outputs(self) -> list[tuple[list[torch.Tensor], Any]]:
        """Return each worker's output tensors, and its value with placeholders for them."""
        self._is_gathered = True
        tensors: list[list[torch.Tensor]] = []

        def receive(index: int, result: ForwardResult) -> None:
            tensors.append(self._group.transport.receive_outputs(index, result))

        results = self._group.results([(index, self._call_id) for index in range(len(self._allocations))], receive)
        self.has_graph = [[has_graph for _, has_graph in result.outputs] for result in results]
        self.writes_parameters = any(result.writes_parameters for result in results)
        values = [load_and_close(result.payload, self._group.devices[0]) for result in results]
        return list(zip(tensors, values, strict=True))

    @contextlib.contextmanager
    def cancel_on_error(self, weights: WeightSync) -> Iterator[None]:
        """If rank 0's own part fails, receive outputs that would block the next transfer, and distrust workers' weights."""
        try:
            yield
        except Exception:
            is_running = not self._is_gathered and self._generation == self._group.generation
            if is_running and self._group.transport.is_collective:
                with contextlib.suppress(Exception):
                    self.gather_outputs()
            weights.invalidate()
            raise

    def start_backward(self, gradients: Sequence[Sequence[torch.Tensor | None]]) -> None:
        """Run the backward on the workers, from the gradients of each worker's outputs."""
        if self._generation != self._group.generation:
            raise RuntimeError(
                "this graph's worker processes were stopped after a failure or by close(); run the forward again"
            )
        keep_graph = backward_keeps_graph()
        _discard(self._exchanges)  # of a backward that failed half-way
        self._group.thread_limit.acquire()
        run_after_backward(self._group.thread_limit.release)
        self._is_graph_freed = not keep_graph and all(
            gradient is not None or not has_graph
            for given, graphs in zip(gradients, self.has_graph, strict=True)
            for gradient, has_graph in zip(given, graphs, strict=True)
        )
        with self._group.lock, self._group.stop_on_error():
            exchange = GradientExchange(
                self._group, self._call_id, gradients, self._inputs, self._gradient_layout, keep_graph=keep_graph
            )
            self._exchanges.append(exchange)

    def wait_gradients(self) -> tuple[dict[int, torch.Tensor], list[torch.Tensor | None]]:
        """Return the workers' gradients: sums by parameter index, and of inputs in order."""
        sums, inputs = self._exchanges[0].wait() if self._exchanges else ({}, {})
        self._exchanges.clear()
        if self._is_graph_freed:
            self._allocations.clear()  # a loss kept until the next step keeps no inputs
        self._group.thread_limit.release()
        return sums, [
            inputs.get(index, {}).get(n)
            for index, specs in enumerate(self._inputs)
            for n, spec in enumerate(specs)
            if spec is not None
        ]


class ReduceGradients(Function):
    """Node of the parameters, before rank 0's part; its backward returns the workers' gradients."""

    @staticmethod
    def forward(ctx: Any, call: ParallelCall, *tensors: torch.Tensor) -> torch.Tensor:
        """Return a token for ``GatherOutputs``."""
        ctx.call = call
        ctx.tensors = [weakref.ref(tensor) for tensor in tensors]
        ctx.devices = [tensor.device for tensor in tensors]
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the workers' gradients."""
        with TIMERS.transfer():
            parameters, inputs = ctx.call.wait_gradients()
        gradients = [parameters.get(index) for index in ctx.call.parameter_indices] + inputs
        for index, reference in enumerate(ctx.tensors):
            if gradients[index] is not None and gradients[index].device != ctx.devices[index]:
                gradients[index] = gradients[index].to(ctx.devices[index])
            if gradients[index] is not None and (tensor := reference()) is not None and tensor._backward_hooks:
                gradients[index] = gradients[index].clone()  # a hook may keep it
        # Referenced until the backward ends, so autograd copies them: no `grad` may be shared memory.
        run_after_backward(list(gradients).clear)
        return None, *gradients


class GatherOutputs(Function):
    """Node of the gathered outputs; its backward runs first, and sends workers their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        call: ParallelCall,
        specs: Sequence[OutputSpec],
        worker_outputs: list[list[torch.Tensor]],
        token: torch.Tensor,
        *own_outputs: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return one tensor for each spec."""
        tensors = [list(own_outputs), *worker_outputs]
        graphs = [list(ctx.needs_input_grad[4:]), *call.has_graph]
        ctx.call, ctx.specs, ctx.graphs = call, specs, graphs
        ctx.shapes = [[tensor.shape for tensor in chunk] for chunk in tensors]
        ctx.like_token = token.detach()
        ctx.set_materialize_grads(False)
        results = tuple(join_tensors(spec, tensors) for spec in specs)
        without_graph = [
            result
            for result, spec in zip(results, specs, strict=True)
            if not any(graphs[p.part][p.position] for p in spec.placeholders)
        ]
        ctx.mark_non_differentiable(*without_graph)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Scatter the gradients."""
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "create_graph=True (double backward) does not work through duoka.DataParallel: workers return "
                "gradients, not graphs. Compute this part of the loss on the wrapped model itself: model.module(x)"
            )
        with TIMERS.transfer():
            chunks: list[list[torch.Tensor | None]] = [[None] * len(shapes) for shapes in ctx.shapes]
            for spec, gradient in zip(ctx.specs, gradients, strict=True):
                if gradient is not None:
                    own = [ctx.shapes[p.part][p.position] for p in spec.placeholders]
                    for p, piece in zip(spec.placeholders, scatter_gradient(gradient, spec, own), strict=True):
                        chunks[p.part][p.position] = piece if ctx.graphs[p.part][p.position] else None
            ctx.call.start_backward(chunks[1:])
        return None, None, None, torch.zeros_like(ctx.like_token), *chunks[0]


def _release_graph(
    group: WorkerGroup, generation: int, call_id: int, num_workers: int, exchanges: list[GradientExchange]
) -> None:
    if not group.is_owned:
        return
    if generation == group.generation:
        _discard(exchanges)
    for index in range(num_workers):
        group.discard_result(index, call_id)
    group.release_graph(call_id)


def _discard(exchanges: list[GradientExchange]) -> None:
    while exchanges:
        exchanges.pop().discard()
