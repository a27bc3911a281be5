"""Check of a call: whether devices that compute parts of the batch give what one device gives for the whole.

A copy of the model computes the first samples of a batch whole and in parts, in this process and without randomness. The
check compares outputs, gradients, buffers and attributes, and finds how the outputs are joined.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from duoka.data_parallel.call_context import draw_seed
from duoka.data_parallel.call_copy import CallCopy
from duoka.data_parallel.deterministic_mode import BatchStatisticsMode, DeterministicMode
from duoka.data_parallel.gather import is_close
from duoka.data_parallel.gradient_check import compare_gradients
from duoka.data_parallel.join_rules import JoinRules, NotJoinable, RuleFinder
from duoka.data_parallel.model_copy import ModelCopies, WriteGuard, attributes_of, changed_attribute
from duoka.data_parallel.model_diff import ModelSnapshot, parameters_of
from duoka.data_parallel.placeholders import extract_tensors
from duoka.data_parallel.scatter import Arguments, Part
from duoka.data_parallel.shares import SAMPLES, shares_of, sources_of
from duoka.errors import DeviceError, WorkerDied
from duoka.utils.partition import chunk_sizes
from duoka.utils.rng_state import (
    libraries_that_drew,
    preserve_rng_state,
    raw_rng_state,
    reseed,
    seed_all,
    set_raw_rng_state,
    set_state_of,
    state_of,
)
from duoka.utils.text import first_line, join_names

SAMPLES_PER_DEVICE = 4
MAX_GRADIENT_NUMEL = 1 << 24
"""Bounds the memory of the gradients that a check compares."""

WorkerOutputs = Sequence[tuple[list[torch.Tensor], Any]]
"""Output of each part but the first: its tensors, and the value with placeholders for them."""
RunOnWorkers = Callable[[Arguments, Sequence[int], type[TorchFunctionMode]], WorkerOutputs]
"""Computes all parts but the first on the workers, inside a mode; see ``Controller``."""

STALE_CLOSURE = (
    "its forward reads a variable outside the model that changed during training. Workers still have the old value, so "
    "results since the last check may be wrong. Pass the value as an argument or store it in a buffer"
)
"""Reason to refuse a model whose workers compute something else than this process."""


class SplitResult(NamedTuple):
    """Result of a check."""

    reason: str = ""
    """Why devices give something else than one device; empty if they do not."""
    is_splittable: bool = True
    """Whether devices can compute the call at all."""
    rules: JoinRules | None = None
    """How outputs are joined; ``None`` if they are not known."""
    drawn: str = ""
    """Whose random numbers the model draws that the check cannot repeat, so values were not compared; empty if none."""
    written: str = ""
    """A parameter that the forward writes to."""
    is_failure: bool = False
    """Whether the model raised an exception, as it may do for this batch only."""
    has_statistic: bool = False
    """Whether the forward computes a statistic over the samples, by which a few samples may differ by chance only."""


class _Refusal(Exception):  # noqa: N818 - a result, not an error
    """Ends a check; the message is the reason."""

    is_failure = False


class _Failure(_Refusal):
    is_failure = True


class _NotCheckable(Exception):  # noqa: N818 - a result, not an error
    """The model cannot be copied, so nothing is known."""


class _Outcome(NamedTuple):
    """What one evaluation gave."""

    value: Any
    inputs: list[torch.Tensor]
    buffers: dict[str, torch.Tensor]
    attributes: dict[str, list[Any]]
    written: dict[str, torch.Tensor]
    side_effect: str


def sample_sizes(batch: int, num_devices: int, minimum: int = 1) -> list[int]:
    """Return how many samples of each part a check computes, in all no more than a device's part where it can be.

    Parts of different sizes show that a mean over parts is not one over samples. A first part of odd size shows what
    depends on whether a sample's number is odd.
    """
    part = -(-batch // num_devices)
    limit = min(SAMPLES_PER_DEVICE * num_devices, part) if part > 1 else min(batch, 2 * num_devices)
    limit = max(limit, min(2 * minimum, batch))
    for size in range(limit, 1, -1):
        parts = max(1, min(size // minimum, num_devices))
        if size % parts and size // parts % 2:
            return chunk_sizes(size, parts)[::-1]
    return chunk_sizes(limit, max(1, min(limit // minimum, num_devices)))


def check_call(
    module: nn.Module,
    arguments: Arguments,
    num_devices: int,
    run_on_workers: RunOnWorkers | None = None,
    *,
    minimum: int = 1,
    whole: bool = False,
) -> SplitResult | None:
    """Compute samples whole and in parts, and compare.

    Args:
        module: the model; the check changes neither it nor a random number generator.
        arguments: those of the call, with at least two samples.
        num_devices: the number of parts.
        run_on_workers: computes the same parts on the workers. Their outputs must equal this process's; otherwise the
            workers miss a change outside the model.
        minimum: the smallest number of samples of a part.
        whole: whether to compute all samples of the batch.

    Returns:
        The result; ``None`` if the model cannot be checked: its parameters have no shape, or memory is short.

    """
    if any(map(is_lazy, parameters_of(module))):
        return None
    if arguments.refusal:
        return SplitResult(arguments.refusal, is_splittable=False)
    assert arguments.batch is not None
    sizes = sample_sizes(arguments.batch, num_devices, minimum)
    if whole:
        sizes = arguments.sizes(num_devices, minimum=minimum)
    samples = arguments.head(sum(sizes))
    try:
        from_workers: WorkerOutputs = []
        if run_on_workers is not None:
            with _refuse_on_error("a worker cannot compute its part"), preserve_rng_state():
                from_workers = run_on_workers(samples, sizes, DeterministicMode)
        check = _Check(module, samples, sizes, arguments.batch)
        outside = ModelSnapshot(module)
        with preserve_rng_state(), contextlib.ExitStack() as stack:
            stack.callback(check.restore_generators)
            result = check.result(from_workers)
        changes = outside.diff()
        if not result.reason and (changes is None or changes.namespaces):
            found = [] if changes is None else [name for _, values in changes.namespaces for name in values]
            names = join_names(sorted(found)) if found else "a class"
            reason = f"its forward changes {names} outside the model, and each check of a few samples does so, too"
            result = result._replace(reason=reason)
        return result
    except _NotCheckable as error:
        return SplitResult(str(error))
    except _Refusal as refusal:
        return SplitResult(str(refusal), is_splittable=False, is_failure=refusal.is_failure)
    except torch.OutOfMemoryError:
        return None


class _Check:
    """One check."""

    def __init__(self, module: nn.Module, samples: Arguments, sizes: Sequence[int], batch: int) -> None:
        self._module, self._samples, self._sizes, self._batch = module, samples, sizes, batch
        first = next(parameters_of(module), None)
        self._device = first.device if first is not None else torch.device("cpu")
        self._on_host = self._device.type != "cpu" and _may_index_samples(samples, sizes, batch)
        with _refuse_on_error("it or its inputs cannot be copied for the check", _NotCheckable):
            self._copies = ModelCopies(module)
        self._states = [state_of(generator) for generator in self._copies.generators]

    def result(self, from_workers: WorkerOutputs) -> SplitResult:
        states, before = self._generator_states(), raw_rng_state()
        mode = BatchStatisticsMode(sum(self._sizes))
        whole = self._evaluate(self._samples.whole(), mode, sum(self._sizes))
        draws = self._generator_states() != states
        drawn = _owners_of_draws(libraries_that_drew(before)) if draws else ""
        parts, statistics = [], mode.statistics
        for part, size in zip(self._samples.parts(self._sizes), self._sizes, strict=True):
            set_raw_rng_state(before)  # what a forward draws once for all samples is the same
            self.restore_generators()
            own = BatchStatisticsMode(size)
            parts.append(self._evaluate(part, own, size))
            statistics = statistics & own.statistics
        compare = functools.partial(self._compare, whole, parts, from_workers, mode.choice, bool(statistics))
        if not draws:
            return compare()
        with contextlib.suppress(_Refusal):  # numbers that it draws may have no effect
            result = compare()
            if not result.reason and not self._depends_on_draws(parts[0]):
                return result
        rules = self._find_rules(whole, parts, compares=False)[1]
        return SplitResult(whole.side_effect, rules=rules, drawn=drawn, written=next(iter(whole.written), ""))

    def _depends_on_draws(self, part: _Outcome) -> bool:
        """Return whether the first part gives something else with other random numbers, as it does on another device."""
        seed = self._generator_states()
        seed_all(seed)
        for generator in self._copies.generators:
            reseed(generator, seed)
        other = self._evaluate(self._samples.parts(self._sizes)[0], DeterministicMode(), self._sizes[0])
        finder = RuleFinder({SAMPLES: (1.0,)}, self._samples.dim, compares=True)
        try:
            return bool(finder.find(part.value, [other.value]).mixed)
        except NotJoinable:
            return True

    def _compare(
        self,
        whole: _Outcome,
        parts: Sequence[_Outcome],
        from_workers: WorkerOutputs,
        choice: str,
        has_statistic: bool,
    ) -> SplitResult:
        _compare_with_workers(parts[1:], from_workers)
        finder, rules = self._find_rules(whole, parts, compares=True)
        reasons = [
            whole.side_effect,
            _changed_buffer(whole, parts[0]),
            changed_attribute(whole.attributes, parts[0].attributes),
            _changed_parameters(whole, parts[0]),
            rules.mixed,
        ]
        if torch.is_grad_enabled() and not whole.written and not any(reasons):
            reasons.append(self._changed_gradient(finder, whole, parts))
        if choice and not any(reasons):
            reasons.append(f"it makes a choice ({choice}) by a statistic of the whole batch")
        reason, written = next(filter(None, reasons), ""), next(iter(whole.written), "")
        return SplitResult(reason, rules=rules, written=written, has_statistic=has_statistic)

    def _find_rules(
        self, whole: _Outcome, parts: Sequence[_Outcome], *, compares: bool
    ) -> tuple[RuleFinder, JoinRules]:
        shares = shares_of(self._samples, self._sizes, sources_of(self._samples))
        finder = RuleFinder(shares, self._samples.dim, compares=compares)
        try:
            return finder, finder.find(whole.value, [part.value for part in parts])
        except NotJoinable as error:
            raise _Refusal(str(error)) from error

    def restore_generators(self) -> None:
        """Restore the generators that the model owns."""
        for generator, state in zip(self._copies.generators, self._states, strict=True):
            set_state_of(generator, state)

    def _generator_states(self) -> int:
        return draw_seed(self._device, self._copies.generators)

    def _evaluate(self, part: Part, mode: DeterministicMode, size: int) -> _Outcome:
        """Let a copy of the model compute ``size`` samples."""
        host = torch.device("cpu") if self._on_host else None
        with _refuse_on_error("it or its inputs cannot be copied for the check", _NotCheckable):
            model = self._copies.new(host)
            call = CallCopy(part, host or (None if self._device.type == "cpu" else self._device))
        guard = WriteGuard(self._copies.parameters)
        try:
            with self._refuse_on_error(size), mode, guard:
                value = call.apply(model)
        finally:
            written = guard.undo()
        buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
        return _Outcome(value, call.inputs, buffers, attributes_of(model), written, call.side_effect())

    def _refuse_on_error(self, size: int) -> AbstractContextManager[None]:
        if size == self._batch:
            return _refuse_on_error("it cannot compute a copy of the batch in the check")
        return _refuse_on_error(
            f"it cannot compute a part of the batch in the check ({size} of {self._batch} samples)",
            remedy=". Let its forward accept any number of samples",
        )

    def _changed_gradient(self, finder: RuleFinder, whole: _Outcome, parts: Sequence[_Outcome]) -> str:
        """Return which gradient differs; empty if none does."""
        pairs = [(one, other, path) for one, other, path in finder.pairs if one.requires_grad]
        if not all(other.requires_grad for _, other, _ in pairs):
            return ""
        with DeterministicMode(), contextlib.suppress(Exception):  # the user's own backward will raise it
            own = [list(same) for same in zip(*(part.inputs for part in parts), strict=True)]
            given = [index for index, tensor in enumerate(self._samples.tensors) if tensor.requires_grad]
            dims = [self._samples.dim if self._samples.is_split(index) else None for index in given]
            return compare_gradients(pairs, self._leaves(), list(zip(whole.inputs, own, dims, strict=True)))
        return ""

    def _leaves(self) -> dict[str, torch.Tensor]:
        """Return tensors with gradients by name, as many as fit into ``MAX_GRADIENT_NUMEL``."""
        if self._on_host:
            return {}
        left, found = MAX_GRADIENT_NUMEL, {}
        for index, (name, leaf) in enumerate(zip(self._copies.names, self._copies.leaves, strict=True)):
            if leaf.numel() <= left:
                found[f"{name} ({index})" if name in found else name] = leaf
                left -= leaf.numel()
        return found


@contextlib.contextmanager
def _refuse_on_error(reason: str, refusal: type[Exception] = _Failure, remedy: str = "") -> Iterator[None]:
    try:
        yield
    except (WorkerDied, DeviceError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise refusal(f"{reason}: {describe_error(error)}{remedy}") from error


def describe_error(error: Exception) -> str:
    """Return an exception's type and the first line of its message."""
    kind, line = type(error).__name__, first_line(error).rstrip(".")
    return kind if line == kind else f"{kind}: {line}"


def _owners_of_draws(libraries: Sequence[str]) -> str:
    layers = ", such as the weights of a layer that its forward makes" if "torch's" in libraries else ""
    return join_names(libraries) + layers if libraries else "a generator's that it owns"


def _compare_with_workers(parts: Sequence[_Outcome], from_workers: WorkerOutputs) -> None:
    for part, (theirs, _) in zip(parts, from_workers, strict=False):
        ours = extract_tensors(part.value)[0]
        if len(ours) != len(theirs) or not all(
            one.shape == other.shape and is_close(one, other.to(one.device))
            for one, other in zip(ours, theirs, strict=True)
        ):
            raise _Refusal(STALE_CLOSURE)


def _changed_buffer(whole: _Outcome, part: _Outcome) -> str:
    """Compare buffers after the whole batch and after the first part, which this process computes."""
    for name, buffer in part.buffers.items():
        if name not in whole.buffers or not is_close(buffer, whole.buffers[name]):
            return f"its forward updates the buffer {name!r} from the whole batch"
    return ""


def _changed_parameters(whole: _Outcome, part: _Outcome) -> str:
    for name in whole.written.keys() | part.written.keys():
        one, other = whole.written.get(name), part.written.get(name)
        if one is None or other is None or not is_close(one, other):
            return f"its forward updates the parameter {name} from the whole batch"
    return ""


def _may_index_samples(samples: Arguments, sizes: Sequence[int], batch: int) -> bool:
    """Return whether an integer that every part gets whole could be the number of a sample outside a part.

    On a GPU, an index out of bounds ends all further work of the process, so the host computes such a check.
    """
    for index, tensor in enumerate(samples.tensors):
        is_index = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
        if is_index and not samples.is_split(index) and tensor.numel() and min(sizes) <= int(tensor.max()) < batch:
            return True
    return False
