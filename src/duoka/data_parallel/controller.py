"""One wrapped model on its crew: what has changed is told to the helpers, then each call is split, computed and joined."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from duoka.data_parallel import scatter_gather
from duoka.data_parallel.autograd import GatherOutputs, ParallelCall, Within, join_tensors
from duoka.data_parallel.membership import WorkerGroupRef
from duoka.data_parallel.messages import CreateReplica, Pickled, RebindParameters, UpdateAttributes
from duoka.data_parallel.model_diff import ModelSnapshot
from duoka.data_parallel.part import MaybeCompiled
from duoka.data_parallel.replica import pack_values
from duoka.data_parallel.timers import CLOCK
from duoka.data_parallel.transport.base import WeightSync
from duoka.data_parallel.transport.optimizer_hook import OptimizerStepHook
from duoka.data_parallel.worker_group import WorkerGroup, crew_of
from duoka.errors import LaunchError
from duoka.workers.serialization import Payload

__all__ = ["Controller"]

_numbers = itertools.count(1)


class Controller:
    """Computes a model's calls on all devices of a crew."""

    def __init__(self, devices: Sequence[torch.device], dim: int, part: MaybeCompiled | None = None) -> None:
        self.number = next(_numbers)
        self.crew: WorkerGroup = crew_of(devices)
        self._membership: WorkerGroupRef | None = WorkerGroupRef(self.crew, self.number)
        self._dim = dim
        self._part = part or MaybeCompiled(None)
        self._generation = 0
        self._copies_all = False
        self._structure: ModelSnapshot | None = None
        self._weights: WeightSync | None = None
        self._steps: OptimizerStepHook | None = (
            OptimizerStepHook(self._begin_early) if self.crew.transport.sends else None
        )
        self._failed: Exception | None = None

    def close(self) -> None:
        """Give the helpers back, if no other model uses them."""
        membership, self._membership = self._membership, None
        if self._steps is not None:
            self._steps.remove()
        if membership is not None:
            membership.end()

    def close_later(self) -> None:
        """Give the helpers back when no graph needs them any more: for the garbage collector."""
        self._membership = None

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute ``module(*args, **kwargs)``, each device its part of the batch."""
        if not self.crew.is_ours or (self._structure is None and _is_lazy(module)):
            return module(*args, **kwargs)
        with self.crew.lock:
            if self.crew.in_forward:  # called inside another wrapped model's part, which has this device only
                return module(*args, **kwargs)
            with self._in_forward():
                return self._run(module, args, kwargs)

    def others(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], within: Within
    ) -> list[tuple[list[torch.Tensor], Any]]:
        """Return what each helper makes of its part, as tensors and a value with holes for them; nothing is computed here.

        Helpers compute inside ``within()``, which they find by its name, and without a graph. The list is empty where
        this call has no helpers.
        """
        with self.crew.lock:
            tensors, arguments = scatter_gather.take_out((args, kwargs))
            sizes = scatter_gather.part_sizes(scatter_gather.batch_size(tensors, self._dim), len(self.crew.devices))
            if len(sizes) == 1 or not self.crew.is_ours or self.crew.in_forward:
                return []
            with self._in_forward(), torch.inference_mode(False), torch.no_grad():
                weights = self._tell_changes(module)
                weights.bring(self._buffers(), trains=False)
                call = ParallelCall(self.crew, self.number, weights, sizes, self._dim, self._membership)
                parts = list(zip(*(scatter_gather.split(tensor, sizes, self._dim) for tensor in tensors), strict=True))
                try:
                    call.ask(parts[1:], arguments, within)
                    return self._outputs(call, weights)
                except Exception:
                    call.abandon()
                    weights.distrust()
                    raise

    @contextlib.contextmanager
    def _in_forward(self) -> Iterator[None]:
        """While the crew computes: what a forward calls is not shared again, and Ctrl-C leaves nobody computing."""
        self.crew.in_forward = True
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception):
                self.crew.stop()
            raise
        finally:
            self.crew.threads.give_back()
            self.crew.in_forward = False

    def _begin_early(self) -> None:
        """An optimiser of the model's parameters has stepped: send them while the user's program does other things."""
        if self._weights is None or not self.crew.is_ours or not self.crew.lock.acquire(blocking=False):
            return
        try:
            if not self.crew.in_forward and self._generation == self.crew.generation:
                with torch.inference_mode(False), torch.no_grad():
                    self._weights.begin_early()
        except Exception as error:
            self._failed = error  # the step itself was taken: the next forward says so
        finally:
            self.crew.lock.release()

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (failed := self._failed) is not None:
            self._failed = None
            raise failed
        tensors, arguments = scatter_gather.take_out((args, kwargs))
        sizes = scatter_gather.part_sizes(scatter_gather.batch_size(tensors, self._dim), len(self.crew.devices))
        if len(sizes) == 1:
            if self.crew.devices[0].type != "cpu":
                args, kwargs = scatter_gather.fill(arguments, self._here(tensors))
            return _joined(
                [scatter_gather.take_out(self._part.of(module)(*args, **kwargs))], sizes, self._dim, None, None
            )
        with CLOCK.moves():
            trains = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.no_grad():
                weights = self._tell_changes(module)
                weights.bring(self._buffers(), trains=trains)
            call = ParallelCall(self.crew, self.number, weights, sizes, self._dim, self._membership)
            parts = list(zip(*(scatter_gather.split(tensor, sizes, self._dim) for tensor in tensors), strict=True))
            self.crew.threads.share()
        try:
            with CLOCK.moves():
                token = call.ask(parts[1:], arguments)
                args, kwargs = scatter_gather.fill(arguments, self._here(parts[0]))
            own = scatter_gather.take_out(self._part.of(module)(*args, **kwargs))
            with CLOCK.moves():
                others = self._outputs(call, weights)
        except Exception:
            call.abandon()
            weights.distrust()
            raise
        with CLOCK.moves():
            self._copies_all = self._copies_all or call.writes
            return _joined([own, *others], sizes, self._dim, call, token)

    def _outputs(self, call: ParallelCall, weights: WeightSync) -> list[tuple[list[torch.Tensor], Any]]:
        values = call.outputs()
        if len(call.sizes) == len(self.crew.devices):  # a helper without a part has said nothing
            weights.arrived()
        return values

    def _here(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors on the first device, to which ``torch.nn.DataParallel`` brings them too."""
        return [tensor.to(self.crew.devices[0], non_blocking=True) for tensor in tensors]

    def _tell_changes(self, module: nn.Module) -> WeightSync:
        self.crew.start()
        structure, weights = self._structure, self._weights
        is_known = structure is not None and self._generation == self.crew.generation
        if structure is None or weights is None or not is_known or weights.copies_all != self._copies_all:
            return self._tell_all(module)
        changes = structure.take_changes() if structure.is_current() else None
        if changes is None or (changes and not self._tell_values(changes, structure)):
            return self._tell_all(module)
        if moved := weights.follow():
            if not weights.fit(moved):
                return self._tell_all(module)
            places = weights.parameter_places
            self.crew.tell(RebindParameters(self.number, {index: places[index] for index in moved}))
        return weights

    def _buffers(self) -> list[torch.Tensor | None]:
        assert self._structure is not None
        return self._structure.buffers()

    def _tell_all(self, module: nn.Module) -> WeightSync:
        structure = ModelSnapshot(module)
        buffers = structure.buffers()
        weights = self.crew.transport.weights(
            self.crew, self.number, structure.parameters, buffers, copies_all=self._copies_all
        )
        payload = _packed(module, self._part.options, _tensors(structure))
        try:
            self.crew.tell(
                CreateReplica(
                    self.number,
                    Pickled(payload.data, payload.sizes),
                    weights.parameter_places,
                    weights.buffer_places,
                    weights.bucket_sizes,
                    list(sys.path),
                ),
                payload.fd,
            )
        finally:
            payload.close()
        self._structure, self._weights, self._generation = structure, weights, self.crew.generation
        if self._steps is not None:
            self._steps.watch(structure.parameters)
        return weights

    def _tell_values(self, changes: dict[int, dict[str, Any]], structure: ModelSnapshot) -> bool:
        """Send new values of attributes; returns whether that could be done so."""
        try:
            payload = pack_values(changes, _tensors(structure))
        except Exception:
            return False  # packing the whole model tells what it is
        try:
            self.crew.tell(UpdateAttributes(self.number, Pickled(payload.data, payload.sizes)), payload.fd)
        finally:
            payload.close()
        return True


def _tensors(structure: ModelSnapshot) -> list[torch.Tensor]:
    return [*structure.parameters, *(buffer for buffer in structure.buffers() if buffer is not None)]


def _packed(module: nn.Module, options: dict[str, Any] | None, tensors: Sequence[torch.Tensor]) -> Payload:
    try:
        return pack_values((module, options), tensors)
    except Exception as error:
        raise LaunchError(
            f"the model cannot be sent to the helper processes: {error}. Something in it ({_culprit(module)}) cannot leave "
            "this process: an open file, a lock, a generator, a logger's handler. Keep it outside the model, or make it "
            "where it is used."
        ) from error


def _culprit(module: nn.Module) -> str:
    """Name the first attribute that cannot be pickled."""
    for name, part in module.named_modules():
        for attribute, value in part.__dict__.items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                pack_values(value, ()).close()
            except Exception:
                return f"attribute {attribute!r} of {name or 'the model itself'}"
    return "its class"


def _is_lazy(module: nn.Module) -> bool:
    """Whether a parameter has no shape yet: the first call gives it one, on this device alone."""
    return any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in module.parameters())


def _joined(
    parts: Sequence[tuple[Sequence[torch.Tensor], Any]],
    sizes: Sequence[int],
    dim: int,
    call: ParallelCall | None,
    token: torch.Tensor | None,
) -> Any:
    """Return one value from the parts' tensors and values, with a graph if the call has one."""
    value, joints = scatter_gather.join([skeleton for _, skeleton in parts], sizes)
    tensors = [list(part) for part, _ in parts]
    if token is None or call is None or not joints:
        return scatter_gather.fill(value, [join_tensors(joint, tensors, dim) for joint in joints])
    return scatter_gather.fill(value, GatherOutputs.apply(call, joints, tensors[1:], token, *tensors[0]))
