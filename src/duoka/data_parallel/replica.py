"""A worker's replica of the user's model, reset to rank 0's state before each call."""

import sys
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from duoka.data_parallel.messages import CreateReplica, RebindParameters, UpdateAttributes
from duoka.data_parallel.model_diff import ModelChanges, set_namespaces, unwrapped_modules
from duoka.data_parallel.pickling import placeholder_tensors
from duoka.data_parallel.state_watch import Digest
from duoka.data_parallel.transport import WorkerTransport
from duoka.data_parallel.transport.base import BackwardTask
from duoka.utils.rng_state import derive_seed, reseed
from duoka.workers.serialization import load_and_close


class MaybeCompiled:
    """The choice of ``torch.compile`` or not; it holds the compiled function, outside the model."""

    def __init__(self, options: bool | Mapping[str, Any] | None) -> None:
        self.options: dict[str, Any] | None = None
        if options is not None and options is not False:
            self.options = {} if options is True else dict(options)
        self._module: nn.Module | None = None
        self._compiled: Callable[..., Any] | None = None

    def function(self, module: nn.Module) -> Callable[..., Any]:
        """Return ``module``, or its compiled function."""
        if self.options is None:
            return module
        if self._compiled is None or self._module is not module:
            self._module, self._compiled = module, torch.compile(module, **self.options)
        return self._compiled


class Replica:
    """One model on a worker's device, with parameters of rank 0 or copies, and its own gradients."""

    def __init__(self, message: CreateReplica, transport: WorkerTransport) -> None:
        self._transport = transport
        self._weights, buffer_memory = transport.model_memory(message)
        self._num_calls, self.writes_parameters = 0, False
        self._sources = [self._weights.tensor(location, spec) for location, spec, _, _ in message.parameters]
        self.parameters = [
            nn.Parameter(source, requires_grad) if is_parameter else source.detach().requires_grad_(requires_grad)
            for source, (_, _, requires_grad, is_parameter) in zip(self._sources, message.parameters, strict=True)
        ]
        slots = [None if place is None else buffer_memory.tensor(*place) for place in message.buffers]
        self._tensors = [*self.parameters, *(slot for slot in slots if slot is not None)]
        with placeholder_tensors(self._tensors):
            module, compile_options, namespaces = load_and_close(message.payload, transport.device)
        set_namespaces(namespaces)
        _register_with_transformers(module)
        self.module: nn.Module = module
        self.forward = MaybeCompiled(compile_options).function(module)
        self._modules = unwrapped_modules(module)
        names = [(m._buffers, name) for m in self._modules for name in m._buffers]
        self._buffers = [(*name, slot) for name, slot in zip(names, slots, strict=True) if slot is not None]
        self.task: BackwardTask | None = None
        """The backward that runs: it takes each gradient as soon as autograd has computed it."""
        self._hooked: set[int] = set()
        for index, parameter in enumerate(self.parameters):
            self._add_hook(index, parameter)
        self.gradient_layout = transport.gradient_layout(self.parameters)
        self._attributes = [dict(m.__dict__) for m in self._modules]
        self._generators = self._find_generators()
        self._registries: list[tuple[Any, dict[str, Any]]] = [
            (r, dict(r)) for m in self._modules for r in (m._parameters, m._buffers, m._modules)
        ]

    def rebind_parameters(self, message: RebindParameters) -> None:
        """Use other memory, or another ``requires_grad``, for some parameters."""
        for index, (location, spec, requires_grad, _) in message.parameters.items():
            self._sources[index] = self.parameters[index].data = self._weights.tensor(location, spec)
            self.parameters[index].requires_grad_(requires_grad)
            self._add_hook(index, self.parameters[index])
        self.gradient_layout = self._transport.gradient_layout(self.parameters)

    def update_attributes(self, message: UpdateAttributes) -> None:
        """Set new values of attributes."""
        with placeholder_tensors(self._tensors):
            changes: ModelChanges = load_and_close(message.payload, self._transport.device)
        for index, values in changes.attributes.items():
            self._attributes[index].update(values)
        set_namespaces(changes.namespaces)
        self._generators = self._find_generators()

    def detect_parameter_writes(self) -> bool:
        """Return whether the forward writes to parameters, as that of a momentum encoder does.

        Such writes go to private pages, which then hide rank 0's values, so ``reset_to_owner_state``
        discards them. The check takes a millisecond or two, so it runs after calls 1, 2, 4, 8, ...
        """
        self._num_calls += 1
        if not self.writes_parameters and self._num_calls & (self._num_calls - 1) == 0 and sys.platform == "linux":
            self.writes_parameters = self._weights.is_written_to()
        return self.writes_parameters

    def reset_to_owner_state(self) -> None:
        """Undo what the last call left in the model, and load rank 0's buffers.

        Buffers become new tensors each time, so the graphs of earlier calls keep theirs.
        """
        if self.writes_parameters:
            self._weights.discard_writes()
        for module, attributes in zip(self._modules, self._attributes, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for registry, content in self._registries:
            registry.clear()
            registry.update(content)
        for registry, name, slot in self._buffers:
            registry[name] = slot.clone()
        for parameter, source in zip(self.parameters, self._sources, strict=True):
            if parameter.data_ptr() != source.data_ptr():
                parameter.data = source

    def seed_generators(self, seed: int) -> None:
        """Seed the generators that the model owns, so that each part draws other numbers."""
        for index, generator in enumerate(self._generators):
            reseed(generator, derive_seed(seed, index))

    def _find_generators(self) -> list[Any]:
        known = frozenset(map(id, (*self._modules, *self._tensors)))
        return Digest(self._attributes, known).generators

    def _add_hook(self, index: int, parameter: torch.Tensor) -> None:
        if parameter.requires_grad and index not in self._hooked:
            hook = partial(_on_gradient, weakref.ref(self), index)  # torch's reference is invisible to the collector
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._hooked.add(index)


def _on_gradient(replica: weakref.ref[Replica], index: int, parameter: torch.Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:  # a function's backward returned None for a parameter that it uses
        return
    target = replica()
    assert target is not None
    assert target.task is not None
    target.task.accept_gradient(index, gradient)


def _register_with_transformers(module: nn.Module) -> None:
    """Register an unpickled model with Hugging Face transformers, as its constructors do.

    The library looks up there, by class, which hidden states a model can return.
    """
    library = sys.modules.get("transformers.utils.output_capturing") or sys.modules.get("transformers.utils.generic")
    registry = getattr(library, "_CAN_RECORD_REGISTRY", None)
    if registry is None:
        return
    for part in module.modules():
        if hasattr(part, "_can_record_outputs"):
            registry[str(type(part)) if type(registry) is dict else part] = part._can_record_outputs
