"""Controller of one wrapped model: syncs it to workers, and scatters, computes and gathers calls."""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from duoka.data_parallel.autograd import GatherOutputs, ParallelCall
from duoka.data_parallel.call_context import TIMERS, unknown_mode
from duoka.data_parallel.gather import Join, JoinError, UndecidedError, join_tensors
from duoka.data_parallel.join_rules import JoinRules
from duoka.data_parallel.messages import ContextFactory, CreateReplica, RebindParameters, UpdateAttributes
from duoka.data_parallel.model_diff import REGISTRIES, ModelChanges, ModelSnapshot, parameters_of
from duoka.data_parallel.pickling import pickle_without_tensors
from duoka.data_parallel.placeholders import extract_tensors, insert_on_device, insert_tensors
from duoka.data_parallel.replica import MaybeCompiled
from duoka.data_parallel.scatter import Arguments, Part
from duoka.data_parallel.shares import Shares, Source, shares_of
from duoka.data_parallel.split_check import RunOnWorkers, SplitResult
from duoka.data_parallel.transport.base import WeightSync
from duoka.data_parallel.worker_group import WorkerGroup, WorkerGroupRef, get_worker_group
from duoka.errors import LaunchError
from duoka.workers.serialization import Payload


class Plan(NamedTuple):
    """Decides whether and how a call is split."""

    check: Callable[[Arguments, RunOnWorkers | None], SplitResult | None]
    """Returns ``None`` if it is not known."""
    decide: Callable[[Arguments], SplitResult | None]
    """Checks all samples of a call, because the rules that fitted so far give different values."""
    report: Callable[[SplitResult], None] = lambda _: None
    """Tells the user about the result, when the call has succeeded."""
    refuse: Callable[[Arguments, str], SplitResult] | None = None
    """Lets one device compute calls of this kind; without it, an exception says that outputs cannot be joined."""


_model_ids = itertools.count(1)


class Controller:
    """Runs one model's calls on all devices; one controller a model."""

    def __init__(self, devices: Sequence[torch.device], dim: int, compiler: MaybeCompiled | None = None) -> None:
        self.model_id = next(_model_ids)
        self.group: WorkerGroup = get_worker_group(devices)
        self._group_ref: WorkerGroupRef | None = WorkerGroupRef(self.group, self.model_id)
        self._dim = dim
        self._compiler = compiler or MaybeCompiled(None)
        self._generation = 0
        self._copies_all = False
        self._weights: WeightSync | None = None

    def close(self) -> None:
        """Release the workers if no other model uses them."""
        reference, self._group_ref = self._group_ref, None
        if reference is not None:
            reference.end()

    def close_after_graphs(self) -> None:
        """Release the workers when no graph needs them; safe during garbage collection."""
        self._group_ref = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan | None = None) -> Any:
        """Compute ``module(*args, **kwargs)``, each device its part of the batch."""
        if not self.group.is_owned or (self._weights is None and any(map(is_lazy, parameters_of(module)))):
            return module(*args, **kwargs)  # the first call of lazy parameters, on one device, sets their shapes
        with self.group.lock:
            if self.group.in_forward:  # inside another wrapped model's part, which has this device only
                return module(*args, **kwargs)
            with self._in_forward():
                return self._run(module, args, kwargs, plan)

    def run_on_workers_only(
        self, module: nn.Module, arguments: Arguments, sizes: Sequence[int], context: ContextFactory
    ) -> list[tuple[list[torch.Tensor], Any]]:
        """Return each worker's output tensors and structure for its part; rank 0 computes nothing.

        Workers compute inside ``context()``, which they import by name, and without a graph. The
        list is empty if this call uses no workers.
        """
        with self.group.lock:
            if not self.group.is_owned or self.group.in_forward:
                return []
            with self._in_forward():
                return self._run_on_workers(module, arguments, sizes, context)

    @contextlib.contextmanager
    def _in_forward(self) -> Iterator[None]:
        """Mark a forward, inside which calls are not split again; Ctrl-C stops the workers."""
        self.group.in_forward = True
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception):
                self.group.stop()
            raise
        finally:
            self.group.thread_limit.release()
            self.group.in_forward = False

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan | None) -> Any:
        arguments = Arguments(args, kwargs, self._dim)
        arguments.refusal = arguments.refusal or unknown_mode()
        sizes = arguments.sizes(len(self.group.devices), minimum=minimum_samples(module, arguments, self.group.devices))
        checked: SplitResult | None = None
        if plan is not None and (len(sizes) > 1 or arguments.refusal):
            checked = plan.check(
                arguments, functools.partial(self._run_on_workers, module) if self._weights is not None else None
            )
        if len(sizes) == 1 or (checked is not None and not checked.is_splittable):
            if self.group.devices[0].type != "cpu":
                args, kwargs = insert_on_device(arguments.structure, arguments.tensors, self.group.devices[0])
            value = self._compiler.function(module)(*args, **kwargs)
            if plan is None:
                return _merge_outputs([extract_tensors(value)], Join(sizes, self._dim))
            if checked is not None:
                plan.report(checked)
            return value
        join = _join_for(arguments, sizes, None if checked is None else checked.rules)
        with TIMERS.transfer():
            training = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.no_grad():
                weights = self._sync_model(module, training=training)
            call, parts = self._new_call(weights, sizes), arguments.parts(sizes)
            self.group.thread_limit.acquire()
        with call.cancel_on_error(weights):
            with TIMERS.transfer():
                token = call.scatter_inputs(parts[1:])
                own = _own_chunks(parts[0], arguments.tensors)
                args, kwargs = insert_on_device(parts[0].structure, own, self.group.devices[0])
            first = extract_tensors(self._compiler.function(module)(*args, **kwargs))
            with TIMERS.transfer():
                others = self._gather_outputs(call, weights)
        with TIMERS.transfer():
            self._copies_all = self._copies_all or call.writes_parameters
            try:
                value = _merge_outputs([first, *others], join, call, token)
            except (UndecidedError, JoinError) as error:
                if plan is None:
                    raise
                merge = functools.partial(_merge_outputs, [first, *others], call=call, token=token)
                value, checked = self._join_after_check(module, arguments, plan, sizes, merge, error.reason)
        if plan is not None and checked is not None:
            plan.report(checked)
        return value

    def _join_after_check(
        self,
        module: nn.Module,
        arguments: Arguments,
        plan: Plan,
        sizes: list[int],
        merge: Callable[[Join], Any],
        reason: str,
    ) -> tuple[Any, SplitResult | None]:
        """Check all samples, and join by what that shows; otherwise compute the whole batch on one device."""
        checked = plan.decide(arguments)
        if checked is not None and checked.is_splittable:
            try:
                return merge(_join_for(arguments, sizes, checked.rules)), checked
            except (UndecidedError, JoinError) as error:
                reason, checked = error.reason, None
        if plan.refuse is None:
            raise JoinError(reason if checked is None else checked.reason)
        if checked is None:
            checked = plan.refuse(arguments, f"{reason} (the forward of this call ran twice)")
        args, kwargs = arguments.whole().arguments()
        if self.group.devices[0].type != "cpu":
            args, kwargs = insert_on_device(arguments.structure, arguments.tensors, self.group.devices[0])
        return self._compiler.function(module)(*args, **kwargs), checked

    def _run_on_workers(
        self, module: nn.Module, arguments: Arguments, sizes: Sequence[int], context: ContextFactory
    ) -> list[tuple[list[torch.Tensor], Any]]:
        if len(sizes) == 1:
            return []
        with torch.inference_mode(False), torch.no_grad():
            weights = self._sync_model(module, training=False)
        call = self._new_call(weights, list(sizes))
        with call.cancel_on_error(weights):
            call.scatter_inputs(arguments.parts(sizes)[1:], context)
            return self._gather_outputs(call, weights)

    def _new_call(self, weights: WeightSync, sizes: list[int]) -> ParallelCall:
        return ParallelCall(self.group, self.model_id, weights, sizes, self._group_ref)

    def _gather_outputs(self, call: ParallelCall, weights: WeightSync) -> list[tuple[list[torch.Tensor], Any]]:
        values = call.gather_outputs()
        all_replied = len(call.sizes) == len(self.group.devices)  # a worker without a chunk has not
        if all_replied and self.group.transport.is_collective:
            with self.group.stop_on_error():
                weights.acknowledge()
        return values

    def _sync_model(self, module: nn.Module, *, training: bool) -> WeightSync:
        """Bring the workers' replicas to the model's current state."""
        self.group.start()
        weights = self._send_changes() or self._send_model(module)
        with self.group.stop_on_error():
            weights.push(training=training)
        return weights

    def _send_changes(self) -> WeightSync | None:
        """Send what has changed in the model; ``None`` if the workers need the whole model."""
        weights = self._weights
        if weights is None or self._generation != self.group.generation:
            return None
        if weights.copies_all != self._copies_all or not weights.snapshot.structure_unchanged():
            return None
        changes = weights.snapshot.diff()
        if changes is None or (any(changes) and not self._send_attributes(changes, weights.snapshot)):
            return None
        if changed := weights.detect_changes():
            if not weights.shapes_unchanged(changed):
                return None
            placements = weights.parameter_placements
            self.group.post(RebindParameters(self.model_id, {index: placements[index] for index in changed}))
        return weights

    def _send_model(self, module: nn.Module) -> WeightSync:
        snapshot = ModelSnapshot(module, self.group.devices[0])
        weights = self.group.transport.create_weight_sync(self.group.post, self.model_id, snapshot, self._copies_all)
        with contextlib.closing(_pickle_model(module, self._compiler.options, snapshot)) as payload:
            message = CreateReplica(
                self.model_id,
                payload,
                weights.parameter_placements,
                weights.buffer_placements,
                weights.bucket_nbytes,
                list(sys.path),
            )
            self.group.post(message)
        self._weights, self._generation = weights, self.group.generation
        return weights

    def _send_attributes(self, changes: ModelChanges, snapshot: ModelSnapshot) -> bool:
        """Send new attribute values; return whether pickle accepts them."""
        try:
            payload = pickle_without_tensors(changes, snapshot.tensors())
        except Exception:
            return False  # pickling the whole model names the attribute
        with contextlib.closing(payload):
            self.group.post(UpdateAttributes(self.model_id, payload))
        return True


def _pickle_model(module: nn.Module, options: dict[str, Any] | None, snapshot: ModelSnapshot) -> Payload:
    try:
        return pickle_without_tensors((module, options, snapshot.namespaces()), snapshot.tensors())
    except Exception as error:
        raise LaunchError(
            f"the model cannot be sent to the worker processes: {error}. {_first_unpicklable(module)} cannot leave this "
            "process: an open file, a lock, a generator, a logger's handler. Keep it outside the model, or create it "
            "where it is used."
        ) from error


def _first_unpicklable(module: nn.Module) -> str:
    """Name the first attribute that cannot be pickled."""
    for name, part in module.named_modules():
        for attribute, value in part.__dict__.items():
            if attribute in REGISTRIES:
                continue
            try:
                pickle_without_tensors(value, ()).close()
            except Exception:
                return f"The attribute {attribute!r} of {name or 'the model itself'}"
    return "Its class"


def minimum_samples(module: nn.Module, arguments: Arguments, devices: Sequence[torch.device]) -> int:
    """Return how many samples a part needs: batch norm in training needs two."""
    if not arguments.batch or arguments.batch >= 2 * len(devices):
        return 1
    return 2 if any(isinstance(m, _BatchNorm) and m.training for m in module.modules()) else 1


def _own_chunks(part: Part, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy the chunks of split tensors: what a model writes to its inputs must not change some rows of the caller's."""
    return [chunk if chunk is tensor else chunk.clone() for chunk, tensor in zip(part.tensors, tensors, strict=True)]


def _join_for(arguments: Arguments, sizes: Sequence[int], rules: JoinRules | None) -> Join:
    if rules is None:
        return Join(sizes, arguments.dim)

    def shares(source: Source) -> Shares:
        return shares_of(arguments, sizes, [source])[source]

    return Join(sizes, arguments.dim, rules.rules, shares)


def _merge_outputs(
    outputs: Sequence[tuple[Sequence[torch.Tensor], Any]],
    join: Join,
    call: ParallelCall | None = None,
    token: torch.Tensor | None = None,
) -> Any:
    """Return one value from all devices' outputs, with a graph if the call has one."""
    structure = join.merge([structure for _, structure in outputs])
    tensors = [list(part) for part, _ in outputs]
    join.decide(tensors)
    if token is None or call is None or not join.specs:
        joined = [join_tensors(spec, tensors) for spec in join.specs]
    else:
        joined = GatherOutputs.apply(call, join.specs, tensors[1:], token, *tensors[0])
    return insert_tensors(structure, joined)
