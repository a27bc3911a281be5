"""A helper's copy of the user's model: built from its structure, brought to its state before each call, never the reverse."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from duoka.data_parallel.libraries import introduce
from duoka.data_parallel.messages import CreateReplica, Pickled, RebindParameters
from duoka.data_parallel.model_diff import modules_of
from duoka.data_parallel.part import MaybeCompiled
from duoka.data_parallel.transport.base import BackwardTask, WorkerTransport
from duoka.workers.serialization import Payload, dumps, loads

__all__ = ["Replica", "pack_values", "unpack"]

_CPU = torch.device("cpu")
_tensors: ContextVar[Sequence[torch.Tensor]] = ContextVar("duoka_replica_tensors")


def pack_values(values: Any, tensors: Sequence[torch.Tensor]) -> Payload:
    """Pickle a model, or new values of its attributes, with a number in the place of each of ``tensors``."""
    return dumps(values, _without(tensors))


def unpack(packed: Pickled, fd: int | None, device: torch.device = _CPU) -> Any:
    """Rebuild what was packed, and close the file that came with it."""
    payload = Payload(packed.data, packed.sizes, fd)
    try:
        return loads(payload, device)
    finally:
        payload.close()


def _without(tensors: Sequence[torch.Tensor]) -> Any:
    numbers = {id(tensor): number for number, tensor in enumerate(tensors)}

    def replace(value: Any) -> Any:
        if isinstance(value, nn.DataParallel):
            return _itself, (value.module,)
        if isinstance(value, nn.Module) and parametrize.is_parametrized(value):
            names: Any = value.parametrizations
            return _parametrized, (type(value).__bases__[0], list(names)), dict(value.__dict__)
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        if id(value) in numbers:
            return _numbered, (numbers[id(value)],)
        if value.grad_fn is not None:  # a result of the last call that somebody keeps in the model
            return _itself, (value.detach(),)
        return NotImplemented

    return replace


def _itself(value: Any) -> Any:
    return value


def _parametrized(kind: type[nn.Module], names: list[str]) -> nn.Module:
    """An empty module with the properties that ``torch.nn.utils.parametrize`` gives; its classes refuse to be pickled."""
    module = kind.__new__(kind)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return module


def _numbered(number: int) -> torch.Tensor:
    return _tensors.get()[number]


@contextmanager
def _numbers_mean(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    token = _tensors.set(tensors)
    try:
        yield
    finally:
        _tensors.reset(token)


class Replica:
    """One model on this helper's device; its parameters are the user's or copies of them, its gradients and buffers its own."""

    def __init__(self, message: CreateReplica, fd: int | None, side: WorkerTransport) -> None:
        self._side = side
        self._weights, traffic = side.memory(message)
        self._calls, self.writes = 0, False
        self._sources = [self._weights.tensor(*seat[:2]) for seat in message.parameters]
        self.parameters = [
            nn.Parameter(source, requires_grad=wants)
            for source, (_, _, wants) in zip(self._sources, message.parameters, strict=True)
        ]
        slots = [None if where is None else traffic.tensor(*where) for where in message.buffers]
        self._tensors = [*self.parameters, *(slot for slot in slots if slot is not None)]
        with _numbers_mean(self._tensors):
            module, options = unpack(message.structure, fd, side.device)
        introduce(module)
        self.compute = MaybeCompiled(options).of(module)
        self._modules = modules_of(module)
        names = [(m._buffers, name) for m in self._modules for name in m._buffers]
        self._buffers = [(*name, slot) for name, slot in zip(names, slots, strict=True) if slot is not None]
        self._task: BackwardTask | None = None
        self._hooked: set[int] = set()
        for index, parameter in enumerate(self.parameters):
            self._hook(index, parameter)
        self.plan = side.plan(self.parameters)
        self._state = [dict(m.__dict__) for m in self._modules]
        self._registries: list[tuple[Any, dict[str, Any]]] = [
            (r, dict(r)) for m in self._modules for r in (m._parameters, m._buffers, m._modules)
        ]

    def reseat(self, message: RebindParameters) -> None:
        """Let parameters lie elsewhere, or begin or cease to require a gradient."""
        for index, seat in message.parameters.items():
            self._sources[index] = self.parameters[index].data = self._weights.tensor(*seat[:2])
            self.parameters[index].requires_grad_(seat[2])
            self._hook(index, self.parameters[index])
        self.plan = self._side.plan(self.parameters)

    def patch(self, packed: Pickled, fd: int | None) -> None:
        """Take over new values of attributes."""
        with _numbers_mean(self._tensors):
            changes: dict[int, dict[str, Any]] = unpack(packed, fd, self._side.device)
        for index, values in changes.items():
            self._state[index].update(values)

    def look_for_writes(self) -> bool:
        """Return whether the model writes to its parameters when it is called, as one with a momentum encoder does.

        It writes to pages of its own, which then hide what the owner writes, so they must be given up before each call.
        Looking takes a millisecond or two, so it is done after calls number 1, 2, 4, 8 and so on.
        """
        self._calls += 1
        if not self.writes and self._calls & (self._calls - 1) == 0 and sys.platform == "linux":
            self.writes = self._weights.is_written_to()
        return self.writes

    def restore(self) -> None:
        """Make it what the user's model is: what the last call left in it goes, buffers are read anew.

        Buffers are new tensors each time, so that graphs of earlier calls keep the ones that they have used.
        """
        if self.writes:
            self._weights.refresh()
        for module, state in zip(self._modules, self._state, strict=True):
            module.__dict__.clear()
            module.__dict__.update(state)
        for registry, content in self._registries:
            registry.clear()
            registry.update(content)
        for registry, name, slot in self._buffers:
            registry[name] = slot.clone()
        for parameter, source in zip(self.parameters, self._sources, strict=True):
            if parameter.data_ptr() != source.data_ptr():
                parameter.data = source

    @contextmanager
    def gradients_to(self, task: BackwardTask, plan: Any) -> Iterator[None]:
        """Give the task each parameter's gradient as it comes inside the ``with`` block."""
        task.follow(plan)
        self._task = task
        try:
            yield
        finally:
            self._task = None

    def _hook(self, index: int, parameter: nn.Parameter) -> None:
        if parameter.requires_grad and index not in self._hooked:
            parameter.register_post_accumulate_grad_hook(partial(self._take, index))  # type: ignore[no-untyped-call]
            self._hooked.add(index)

    def _take(self, index: int, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        assert self._task is not None
        self._task.take(index, gradient)
