"""Worker loop of ``DataParallel``: runs forward and backward of replicas, and sends results."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from duoka.data_parallel import messages
from duoka.data_parallel.model_copy import ModelCopies
from duoka.data_parallel.placeholders import extract_tensors, insert_tensors
from duoka.data_parallel.replica import Replica
from duoka.data_parallel.transport import WorkerTransport
from duoka.data_parallel.transport.base import BackwardTask, GradientLayout, WorkerConfig
from duoka.data_parallel.transport.collective import CollectiveWorkerTransport
from duoka.data_parallel.transport.shared import SharedWorkerTransport
from duoka.utils.rng_state import seed_all
from duoka.utils.torch_settings import apply_torch_settings
from duoka.workers import WorkerChannel, exceptions
from duoka.workers.channel import Message
from duoka.workers.serialization import Payload, dumps, load_and_close


@contextlib.contextmanager
def worker_loop(config: WorkerConfig, channel: WorkerChannel) -> Iterator[None]:
    """Handle messages until rank 0 ends the session."""
    torch.set_num_threads(config.num_threads)
    if config.device.type != "cpu":
        torch.accelerator.set_device_index(config.device)
    handler = _RequestHandler(config, channel)
    while (message := channel.receive()).kind != "finish":
        handler.handle(message)
    handler.close()
    del handler
    yield


class _SavedGraph(NamedTuple):
    """The part of a forward that its backward needs."""

    replica: Replica
    gradient_layout: Any
    inputs: list[torch.Tensor]
    outputs: dict[int, torch.Tensor]


class _RequestHandler:
    def __init__(self, config: WorkerConfig, channel: WorkerChannel) -> None:
        self._channel = channel
        transport = CollectiveWorkerTransport if config.rendezvous else SharedWorkerTransport
        self._transport: WorkerTransport = transport(config, channel)
        self._replicas: dict[int, Replica] = {}
        self._graphs: dict[int, _SavedGraph] = {}
        self._errors: dict[int, BaseException] = {}
        """Failures to create or update a replica, by model; its next forward raises them."""

    def handle(self, message: Message) -> None:
        if not self._transport.is_collective and self._transport.try_handle(message):
            return
        request = messages.decode(message.payload)
        if isinstance(request, messages.DeleteReplica):
            self._replicas.pop(request.model, None)
            if self._transport.is_collective:
                self._transport.delete_model(request.model)
        elif isinstance(request, messages.ReceiveWeights):
            assert self._transport.is_collective
            self._transport.receive_weights(request)
        elif isinstance(request, messages.ForwardRequest | messages.BackwardRequest):
            self._compute(request)
        else:
            self._update(request)

    def close(self) -> None:
        self._replicas.clear()
        self._graphs.clear()
        self._transport.close()

    def _update(self, request: messages.CreateReplica | messages.UpdateAttributes | messages.RebindParameters) -> None:
        try:
            if isinstance(request, messages.CreateReplica):
                self._errors.pop(request.model, None)
                sys.path[:] = request.sys_path
                self._replicas[request.model] = Replica(request, self._transport)
            elif isinstance(request, messages.UpdateAttributes):
                self._replicas[request.model].update_attributes(request)
            else:
                self._replicas[request.model].rebind_parameters(request)
        except Exception as error:
            self._errors.setdefault(request.model, error)

    def _compute(self, request: messages.Request) -> None:
        """Run a request and send the result.

        An exception of user code is sent to rank 0; one of the transport ends the worker.
        """
        for call_id in request.released_calls:
            self._graphs.pop(call_id, None)
        run: Callable[[], messages.ForwardResult | messages.BackwardResult]
        task: BackwardTask | None = None
        if isinstance(request, messages.ForwardRequest):
            run = partial(self._forward, request, self._transport.receive_inputs(request))
        else:
            graph = self._graphs.get(request.forward_call_id)
            task = self._transport.start_backward(request, graph.gradient_layout if graph else GradientLayout())
            run = partial(self._backward, request, graph, task)
        try:
            kind, reply = "result", messages.encode(run())
        except BaseException as error:
            kind, reply = "error", exceptions.serialize_exception(error)
        if task is not None:
            task.finish()
        self._channel.send(f"{kind}:{request.call_id}", reply)
        reply.close()
        if self._transport.is_collective:
            self._transport.flush(succeeded=kind == "result")

    def _forward(self, request: messages.ForwardRequest, inputs: list[torch.Tensor]) -> messages.ForwardResult:
        if request.model in self._errors:
            raise self._errors[request.model]
        replica = self._replicas[request.model]
        replica.reset_to_owner_state()
        for tensor, (_, needs_gradient) in zip(inputs, request.inputs, strict=True):
            tensor.requires_grad_(needs_gradient)
        own = [
            tensor.clone() if tensor.requires_grad else tensor for tensor in inputs
        ]  # a leaf refuses in-place writes
        args, kwargs = insert_tensors(load_and_close(request.payload, self._transport.device), own)
        seed_all(request.seed)
        replica.seed_generators(request.seed)
        apply_torch_settings(request.settings)  # process-wide, also after the call
        forward = ModelCopies(replica.module).new() if request.is_check else replica.forward
        with contextlib.ExitStack() as stack:
            for mode in request.modes:
                stack.enter_context(mode())
            value = exceptions.call_user_code(forward, *args, **kwargs)
        outputs, structure = extract_tensors(value, request.rank)
        with_graph = {i: t for i, t in enumerate(outputs) if t.requires_grad} if request.keep_graph else {}
        payload = dumps(structure)
        if with_graph:
            self._graphs[request.call_id] = _SavedGraph(replica, replica.gradient_layout, inputs, with_graph)
        location, nbytes, specs = self._transport.stage_outputs(outputs)
        output_specs = tuple((spec, index in with_graph) for index, spec in enumerate(specs))
        writes = replica.detect_parameter_writes()
        return messages.ForwardResult(location, nbytes, output_specs, payload, writes)

    def _backward(
        self, request: messages.BackwardRequest, graph: _SavedGraph | None, task: BackwardTask
    ) -> messages.BackwardResult:
        wanted = [index for index, spec in enumerate(request.outputs) if spec is not None]
        if not wanted:  # this worker had no chunk, or the loss does not use its outputs
            return messages.BackwardResult((), (), Payload(b""))
        if graph is None or not graph.outputs.keys() >= set(wanted):
            raise RuntimeError(
                "Trying to backward through the graph a second time: the first backward has freed its tensors. "
                "Specify retain_graph=True if you need to backward through the graph again."
            )
        outputs = [graph.outputs[index] for index in wanted]
        graph.replica.task = task
        try:
            exceptions.call_user_code(
                torch.autograd.backward, outputs, task.output_gradients, retain_graph=request.keep_graph
            )
        finally:
            graph.replica.task = None
        inputs = task.return_input_gradients([tensor.grad for tensor in graph.inputs])
        for tensor in graph.inputs:
            tensor.grad = None
        if not request.keep_graph:
            for index in wanted:
                del graph.outputs[index]
            if not graph.outputs:
                del self._graphs[request.forward_call_id]
        payload = dumps(task.inlined) if task.inlined else Payload(b"")
        return messages.BackwardResult(tuple(task.accepted), inputs, payload)
