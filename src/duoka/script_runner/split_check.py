"""Check that a model may be split over devices.

A script does not tell which dimension is the batch, or whether the model mixes samples. So a copy of the model
computes a real batch whole and in parts, in this process and without randomness. The outputs must be equal.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from duoka.data_parallel import scatter_gather
from duoka.errors import WorkerDied
from duoka.utils.rng_state import preserve_rng_state
from duoka.utils.text import first_line

_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 3e-3, torch.float64: 1e-9}
"""Largest difference of two outputs relative to the largest value; see ``_DEFAULT_TOLERANCE``."""
_DEFAULT_TOLERANCE = 2e-4
_COMPARABLE = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)

_RANDOM = frozenset(
    {"rand", "randn", "rand_like", "randn_like", "normal", "bernoulli", "normal_", "uniform_", "bernoulli_", "randint",
     "randint_like", "exponential_", "multinomial", "poisson", "log_normal_", "cauchy_", "geometric_", "random_", "rrelu"}
)  # fmt: skip
_DROPOUT = frozenset(
    {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
     "feature_dropout"}
)  # fmt: skip
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
"""Functions of torch that a check replaces, by name."""

WorkerOutputs = Sequence[tuple[list[torch.Tensor], Any]]
"""Output of each part but the first: its tensors, and the value with placeholders for them."""
RunOnWorkers = Callable[[type[TorchFunctionMode]], WorkerOutputs]
"""Computes all parts but the first on the workers, inside a mode; see ``Controller``."""

STALE_CLOSURE = (
    "its forward reads a variable outside the model that changed during training. Workers still have the old value, so "
    "results since the last check may be wrong. Pass the value as an argument or store it in a buffer"
)
"""Reason to refuse a model whose workers compute something else than this process."""


class SplitCheckResult(NamedTuple):
    """Result of a check."""

    reason: str
    """Why the model must not be split; empty if it may be."""
    scalar_outputs: tuple[int, ...] = ()
    """Indices of the outputs that are means over the samples."""


class _NotSplittable(Exception):  # noqa: N818 - a result, not an error
    """Ends a check; its message is the reason."""


def call_signature(module: nn.Module, tensors: Sequence[torch.Tensor], skeleton: Any) -> Any:
    """Return the kind of call that a check covers: mode, argument types, which ones have batch size."""
    batch = scatter_gather.batch_size(tensors, 0)
    shapes = tuple((t.dim(), t.dtype, t.dim() > 0 and t.size(0) == batch) for t in tensors)
    return module.training, torch.is_grad_enabled(), shapes, repr(_structure(skeleton))


def check_splittable(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_devices: int,
    run_on_workers: RunOnWorkers | None = None,
) -> SplitCheckResult | None:
    """Compute a batch whole and in parts, and compare the outputs.

    Args:
        module: the model; the check changes neither it nor a random number generator.
        args: positional arguments of the call, with at least two samples.
        kwargs: keyword arguments of the call.
        num_devices: the number of parts.
        run_on_workers: computes the same parts on the workers. Their outputs must equal this process's; otherwise the
            workers miss a change outside the model.

    Returns:
        The result; ``None`` if the model cannot be checked yet, because its parameters have no shape.
    """
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in module.parameters()):
        return None
    tensors, skeleton = scatter_gather.extract_tensors((args, kwargs))
    sizes = scatter_gather.scatter_sizes(scatter_gather.batch_size(tensors, 0), num_devices)
    chunks = zip(*(scatter_gather.scatter(tensor, sizes, 0) for tensor in tensors), strict=True)
    from_workers: WorkerOutputs = []
    try:
        if any(p.device.type == "cpu" and p.is_shared() for p in module.parameters()):  # type: ignore[no-untyped-call]
            raise _NotSplittable("its parameters are in memory that the script shares with other processes")
        with _refuse_on_error("it or its inputs cannot be copied for the check"):
            model = _copy_without_hooks(module)
            calls = [_CallArguments(skeleton, own) for own in (tensors, *chunks)]
        if run_on_workers is not None:
            with _refuse_on_error("a worker cannot compute its part"), preserve_rng_state(), torch.no_grad():
                from_workers = run_on_workers(DeterministicMode)
        whole, *parts = _compute_outputs(model, module, calls)
        _compare_with_workers(parts[1:], from_workers)
        return SplitCheckResult("", _compare_outputs(whole, parts, sizes))
    except _NotSplittable as refusal:
        return SplitCheckResult(str(refusal))


def describe_error(error: Exception) -> str:
    """Return an exception's type and the first line of its message."""
    kind, line = type(error).__name__, first_line(error).rstrip(".")
    return kind if line == kind else f"{kind}: {line}"


def is_script_hook(hook: Callable[..., Any]) -> bool:
    """Return whether a hook is defined outside torch."""
    function = getattr(hook, "__wrapped__", hook)
    module = getattr(function, "__module__", None) or type(function).__module__
    return not str(module).startswith("torch.")


@contextlib.contextmanager
def _refuse_on_error(reason: str) -> Iterator[None]:
    try:
        yield
    except WorkerDied:
        raise
    except Exception as error:
        raise _NotSplittable(f"{reason}: {describe_error(error)}") from error


def _copy_without_hooks(module: nn.Module) -> nn.Module:
    """Return a copy of the model without the script's hooks."""
    model = copy.deepcopy(module)
    for part in model.modules():
        for registry in (part._forward_hooks, part._forward_pre_hooks):
            for key in [key for key, hook in registry.items() if is_script_hook(hook)]:
                del registry[key]
    return model


def _compute_outputs(model: nn.Module, module: nn.Module, calls: Sequence[_CallArguments]) -> list[Any]:
    """Return the outputs of ``model``, a copy of ``module``, for the whole batch, which is first, and for each part."""
    outputs: list[Any] = []
    buffers: list[dict[str, torch.Tensor]] = []
    with preserve_rng_state(), torch.no_grad(), DeterministicMode():
        state = _AttributeState(model)
        for call in calls:
            with _refuse_on_error(f"it cannot compute {'a part of the batch' if outputs else 'a batch in the check'}"):
                for buffer, original in zip(model.buffers(), module.buffers(), strict=True):
                    buffer.copy_(original)
                outputs.append(call.apply(model))
            if len(outputs) == 1 and (reason := state.side_effect(model) or call.side_effect()):
                raise _NotSplittable(reason)
            buffers.append({name: buffer.clone() for name, buffer in model.named_buffers()})
    for name, buffer in buffers[1].items():  # of the first part, which this process computes
        if not _is_close(buffer, buffers[0][name]):
            raise _NotSplittable(f"its forward updates the buffer {name!r} from the whole batch")
    return outputs


def _compare_with_workers(parts: Sequence[Any], from_workers: WorkerOutputs) -> None:
    for value, (theirs, _) in zip(parts, from_workers, strict=False):
        ours = scatter_gather.extract_tensors(value)[0]
        if len(ours) != len(theirs) or not all(
            one.shape == other.shape and _is_close(one, other.to(one.device))
            for one, other in zip(ours, theirs, strict=True)
        ):
            raise _NotSplittable(STALE_CLOSURE)


def _compare_outputs(whole: Any, parts: list[Any], sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the indices of scalar outputs; raise unless the gathered parts equal the whole."""
    expected, skeleton = scatter_gather.extract_tensors(whole)
    if not expected:
        raise _NotSplittable("it returns no tensors")
    taken = [scatter_gather.extract_tensors(part, index) for index, part in enumerate(parts)]
    _compare_other_values(skeleton, [own for _, own in taken])
    try:
        value, specs = scatter_gather.gather_structures([own for _, own in taken], sizes)
        gathered = [scatter_gather.gather_tensors(spec, [tensors for tensors, _ in taken], 0) for spec in specs]
    except (ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        raise _NotSplittable(f"its outputs for parts cannot be gathered: {describe_error(error)}") from error
    if repr(_structure(value)) != repr(_structure(skeleton)) or len(gathered) != len(expected):
        raise _NotSplittable("the structure of its output differs for a part of the batch")
    for one, other in zip(gathered, expected, strict=True):
        _compare_tensors(one, other, sizes)
    return tuple(index for index, tensor in enumerate(expected) if tensor.dim() == 0)


def _compare_other_values(whole: Any, parts: Sequence[Any]) -> None:
    """Raise unless values besides tensors can be compared and are the same for all parts."""
    values = _values_besides_tensors(whole)
    if unknown := [value for value in values if not isinstance(value, _COMPARABLE)]:
        kind = type(unknown[0]).__name__
        remedy = " (set config.use_cache = False to leave it out)" if kind.endswith("Cache") else ""
        raise _NotSplittable(f"it returns a {kind}, which cannot be gathered from parts{remedy}")
    if any(_values_besides_tensors(part) != values for part in parts):
        raise _NotSplittable("it returns a value besides tensors that differs between the parts of a batch")


def _values_besides_tensors(skeleton: Any) -> list[Any]:
    found: list[Any] = []
    scatter_gather.map_values(found.append, skeleton)
    return [leaf for leaf in found if type(leaf) is not scatter_gather.Placeholder]


def _compare_tensors(gathered: torch.Tensor, whole: torch.Tensor, sizes: Sequence[int]) -> None:
    if whole.dim() == 0 and not whole.is_floating_point():
        raise _NotSplittable("it returns a count or a flag of the whole batch")
    if whole.dim() == 0 and gathered.shape == (len(sizes),):
        gathered = weighted_mean(gathered, sizes)
    if gathered.shape != whole.shape:
        shapes = f"whole batch {tuple(whole.shape)}, gathered parts {tuple(gathered.shape)}"
        raise _NotSplittable(f"the batch is not the first dimension of its output ({shapes})")
    if not _is_close(gathered, whole):
        if whole.dim() == 0:
            raise _NotSplittable("the number that it returns is not the mean over the samples")
        raise _NotSplittable("its output for one sample depends on other samples of the batch")


def weighted_mean(parts: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return the mean over the batch of means over its parts; ``sizes`` are the numbers of samples."""
    return (parts * (torch.tensor(sizes) / sum(sizes)).to(parts)).sum()


def _is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not (other.is_floating_point() or other.is_complex()) or other.numel() == 0:
        return torch.equal(one, other)
    largest = float(other.abs().nan_to_num(0, 0, 0).max())
    tolerance = _TOLERANCE.get(other.dtype, _DEFAULT_TOLERANCE) * max(largest, 1e-6)
    return torch.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True)


def _structure(value: Any) -> Any:
    """Return nested values with the type's name in place of each value that has no stable text."""
    if type(value) is scatter_gather.Placeholder:
        return "tensor"
    if isinstance(value, dict):
        return {key: _structure(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_structure(item) for item in value]
    return value if isinstance(value, bool | str | None) else type(value).__name__


class _CallArguments:
    """Copies of a call's arguments, which notice when the call changes them."""

    def __init__(self, skeleton: Any, tensors: Sequence[torch.Tensor]) -> None:
        """Copy a call's tensors, and its other values with a placeholder for each tensor."""
        own = [tensor.detach().clone() for tensor in tensors]
        self._args, self._kwargs = scatter_gather.insert_tensors(copy.deepcopy(skeleton), own)
        self._tensors, skeleton = scatter_gather.extract_tensors((self._args, self._kwargs))
        self._versions = [tensor._version for tensor in self._tensors]
        self._pickled = pickle.dumps(skeleton)

    def apply(self, model: nn.Module) -> Any:
        """Call ``model``."""
        return model(*self._args, **self._kwargs)

    def side_effect(self) -> str:
        """Return what the call changed about its arguments; empty if nothing."""
        if [tensor._version for tensor in self._tensors] != self._versions:
            return "its forward changes its inputs in place"
        if pickle.dumps(scatter_gather.extract_tensors((self._args, self._kwargs))[1]) != self._pickled:
            return "its forward changes an object that it receives"
        return ""


class _AttributeState:
    """Attributes and parameters of a model that its forward may change, by name."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors: dict[str, list[int]] = {}
        self._values: dict[str, bytes] = {}
        self._versions = {name: parameter._version for name, parameter in model.named_parameters()}
        for prefix, part in model.named_modules():
            for attribute, value in part.__dict__.items():
                if attribute in ("_parameters", "_buffers", "_modules"):
                    continue
                name = f"{prefix}.{attribute}".lstrip(".")
                if isinstance(value, torch.Tensor | list | tuple | dict):
                    self._tensors[name] = [id(tensor) for tensor in scatter_gather.extract_tensors(value)[0]]
                if isinstance(value, int | float | str | list | tuple | dict | set):
                    with contextlib.suppress(Exception):
                        self._values[name] = pickle.dumps(scatter_gather.extract_tensors(value)[1])

    def side_effect(self, model: nn.Module) -> str:
        """Return what has changed in ``model`` since then; empty if only a call counter has."""
        now = _AttributeState(model)
        for name, tensors in now._tensors.items():
            if not set(tensors) <= set(self._tensors.get(name, ())):
                return f"its forward keeps tensors in {name}, which would hold one part of the batch only"
        for name, value in now._values.items():
            if value != self._values.get(name) and not _is_counter(self._values.get(name), value):
                return f"its forward keeps results in {name}, which would be those of one part of the batch"
        written = [name for name, version in now._versions.items() if version != self._versions[name]]
        return f"its forward writes to its parameter {written[0]}" if written else ""


def _is_counter(before: bytes | None, after: bytes) -> bool:
    """Return whether an attribute is an integer that has grown by one."""
    old, new = (None if value is None else pickle.loads(value) for value in (before, after))
    return type(old) is int and type(new) is int and new == old + 1


class DeterministicMode(TorchFunctionMode):
    """Fills random tensors with 0.5, skips dropout, and lets batch norm use its running statistics."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function or its deterministic replacement."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _DROPOUT:
            return args[0] if args else kwargs["input"]
        if function is functional.batch_norm:
            return function(*_batch_norm_arguments(args, kwargs))
        if function is functional.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
            args = args[:4]
        if function is functional.multi_head_attention_forward:
            kwargs = {**kwargs, "training": False}
        if name in _RECURRENT:  # the only float among their arguments is the dropout probability
            args = [0.0 if type(value) is float else value for value in args]
        result = function(*args, **kwargs)
        if name in _RANDOM and isinstance(result, torch.Tensor):
            result.fill_(0.5 if result.is_floating_point() else 1)
        return result


def _batch_norm_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Any]:
    """Return all arguments of ``batch_norm``, in order, with ``training=False``."""
    call = inspect.signature(functional.batch_norm).bind(*args, **kwargs)
    call.apply_defaults()
    call.arguments["training"] = False
    if call.arguments["running_mean"] is None:
        batch: torch.Tensor = call.arguments["input"]
        call.arguments |= {"running_mean": batch.new_zeros(batch.size(1)), "running_var": batch.new_ones(batch.size(1))}
    return call.args
