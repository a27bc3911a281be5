"""Whether a model may be computed in parts: tried once on a real batch before anything relies on it.

Nothing in a script says which dimension is the batch, or whether a model looks across samples. So a copy of the model
computes a whole batch and the same batch in parts, both here and without randomness, and the parts joined must be the whole.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from duoka.data.global_rng import GLOBAL
from duoka.data_parallel import scatter_gather
from duoka.errors import WorkerDied

__all__ = ["STALE_CLOSURE", "Generators", "SplitCheckResult", "first_line", "is_users", "signature", "check_splittable"]

_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 3e-3, torch.float64: 1e-9}
"""Of the largest value, by type; of float32 and others ``_USUAL``."""
_USUAL = 2e-4
_FILLED = frozenset(
    {"rand", "randn", "rand_like", "randn_like", "normal", "bernoulli", "normal_", "uniform_", "bernoulli_", "randint",
     "randint_like", "exponential_", "multinomial", "poisson", "log_normal_", "cauchy_", "geometric_", "random_", "rrelu"}
)  # fmt: skip
_DROPPED = frozenset(
    {
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
        "dropout_",
        "feature_dropout",
    }
)


_ATOMS = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)


WorkerOutputs = Callable[[type[TorchFunctionMode]], Sequence[tuple[list[torch.Tensor], Any]]]
"""What asks helpers for their parts, computed inside a mode; see ``Engine.others``."""

STALE_CLOSURE = (
    "its forward uses something outside the model that the script has changed, which helper processes do not see; since "
    "the last trial they may have computed with what it was before"
)
"""The verdict of helpers that compute something else."""


class SplitCheckResult(NamedTuple):
    """What came of a trial."""

    reason: str
    """Why the model may not be computed in parts; empty where it may."""
    numbers: tuple[int, ...] = ()
    """Which of its outputs are numbers: means over the samples."""


def signature(module: nn.Module, tensors: Sequence[torch.Tensor], skeleton: Any) -> Any:
    """Return what a verdict holds for: the kinds of arguments, which of them are of the batch's size, and the mode."""
    batch = scatter_gather.batch_size(tensors, 0)
    forms = tuple((t.dim(), t.dtype, t.dim() > 0 and t.size(0) == batch) for t in tensors)
    return module.training, torch.is_grad_enabled(), forms, repr(_shape_of(skeleton))


def check_splittable(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    devices: int,
    worker_outputs: WorkerOutputs | None = None,
) -> SplitCheckResult | None:
    """Compute a batch whole and in parts, and compare.

    Args:
        module: the model; it is not changed, nor is any random generator.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        devices: the number of parts.
        others: what returns tensors and value of each part but the first as helpers compute it inside the mode that it is
            given; they must be what comes out here, or helpers do not see something that the model uses.

    Returns:
        The verdict, ``None`` if the model cannot be tried yet. The batch must have at least two samples.

    """
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in module.parameters()):
        return None  # the first call gives them their shapes
    if any(p.device.type == "cpu" and p.is_shared() for p in module.parameters()):  # type: ignore[no-untyped-call]
        return SplitCheckResult("its parameters are in memory that the script shares with processes of its own")
    tensors, skeleton = scatter_gather.take_out((args, kwargs))
    sizes = scatter_gather.part_sizes(scatter_gather.batch_size(tensors, 0), devices)
    split = [scatter_gather.split(tensor, sizes, 0) for tensor in tensors]
    try:
        model = _copy(module)
        calls = [_given(skeleton, own) for own in (tensors, *zip(*split, strict=True))]
    except Exception as error:
        return SplitCheckResult(f"it or what it is given cannot be copied to be tried: {first_line(error)}")
    theirs, failed = _query_workers(worker_outputs)
    if failed:
        return SplitCheckResult(failed)
    with _undisturbed(), torch.no_grad(), DeterministicMode():
        before = _state(model)
        try:
            whole = model(*calls[0].args, **calls[0].kwargs)
        except Exception as error:
            return SplitCheckResult(f"it could not be tried on a batch: {type(error).__name__}: {first_line(error)}")
        if reason := _side_effect(model, before) or calls[0].changed():
            return SplitCheckResult(reason)
        after_whole = _buffers(model)
        try:
            parts = [_part(model, module, call) for call in calls[1:]]
        except Exception as error:
            return SplitCheckResult(
                f"it cannot compute a part of the batch: {type(error).__name__}: {first_line(error)}"
            )
    for name, buffer in parts[0][1].items():
        if not _close(buffer, after_whole[name]):
            return SplitCheckResult(f"its forward changes the buffer {name!r} by what the whole batch holds")
    for (value, _), other in zip(parts[1:], theirs, strict=False):
        if not _same(scatter_gather.take_out(value)[0], other[0]):
            return SplitCheckResult(STALE_CLOSURE)
    return _compare(whole, [value for value, _ in parts], sizes)


def _query_workers(worker_outputs: WorkerOutputs | None) -> tuple[Sequence[tuple[list[torch.Tensor], Any]], str]:
    """Return what helpers make of their parts, nothing where there are none; and why one cannot, empty if all can."""
    if worker_outputs is None:
        return [], ""
    try:
        with _undisturbed(), torch.no_grad():
            return worker_outputs(DeterministicMode), ""
    except WorkerDied:
        raise
    except Exception as error:
        return [], f"a helper cannot compute its part: {type(error).__name__}: {first_line(error)}"


def _same(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(
        one.shape == other.shape and _close(one, other.to(one.device)) for one, other in zip(ours, theirs, strict=True)
    )


class _Call:
    """Arguments of one call, copies of the user's own."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs
        tensors, skeleton = scatter_gather.take_out((args, kwargs))
        self._versions = [(tensor, tensor._version) for tensor in tensors]
        self._skeleton = pickle.dumps(skeleton)

    def changed(self) -> str:
        """Say what a call did to its arguments; empty if it left them alone."""
        if any(tensor._version != version for tensor, version in self._versions):
            return "its forward changes its inputs in place"
        if pickle.dumps(scatter_gather.take_out((self.args, self.kwargs))[1]) != self._skeleton:
            return "its forward changes an object that it is given"
        return ""


def _given(skeleton: Any, tensors: Sequence[torch.Tensor]) -> _Call:
    args, kwargs = scatter_gather.fill(copy.deepcopy(skeleton), [tensor.detach().clone() for tensor in tensors])
    return _Call(args, kwargs)


def _part(model: nn.Module, module: nn.Module, call: _Call) -> tuple[Any, dict[str, torch.Tensor]]:
    for buffer, first in zip(model.buffers(), module.buffers(), strict=True):
        buffer.copy_(first)
    return model(*call.args, **call.kwargs), _buffers(model)


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _compare(whole: Any, parts: list[Any], sizes: Sequence[int]) -> SplitCheckResult:
    expected, shape = scatter_gather.take_out(whole)
    taken = [scatter_gather.take_out(part, index) for index, part in enumerate(parts)]
    if not expected:
        return SplitCheckResult("it returns no tensors")
    leaves = [_leaves(skeleton) for skeleton in (shape, *(skeleton for _, skeleton in taken))]
    if strange := [leaf for leaf in leaves[0] if not isinstance(leaf, _ATOMS)]:
        kind = type(strange[0]).__name__
        remedy = " (config.use_cache = False leaves it out)" if kind.endswith("Cache") else ""
        return SplitCheckResult(f"it returns a {kind}, which cannot be joined from parts{remedy}")
    if any(own != leaves[0] for own in leaves[1:]):
        return SplitCheckResult("it returns something beside tensors that is not the same for every part of a batch")
    try:
        value, joints = scatter_gather.join([skeleton for _, skeleton in taken], sizes)
        joined = [_join(joint, [tensors for tensors, _ in taken], sizes) for joint in joints]
    except (ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        return SplitCheckResult(f"what it returns for parts cannot be joined: {first_line(error)}")
    if repr(_shape_of(value)) != repr(_shape_of(shape)) or len(joined) != len(expected):
        return SplitCheckResult("what it returns is built differently for a part of a batch")
    for one, other in zip(joined, expected, strict=True):
        if other.dim() == 0 and not other.is_floating_point():
            return SplitCheckResult("it returns a count or a flag of the whole batch")
        if one.shape != other.shape:
            across = f"{tuple(other.shape)} for the whole batch, {tuple(one.shape)} from its parts joined"
            return SplitCheckResult(f"what it returns does not have the batch as its first dimension ({across})")
        if not _close(one, other):
            if other.dim() == 0:
                return SplitCheckResult("the number that it returns is not the mean over the samples of its parts")
            return SplitCheckResult("its output for a whole batch is not what its parts give: it looks across samples")
    return SplitCheckResult("", tuple(index for index, tensor in enumerate(expected) if tensor.dim() == 0))


def _leaves(skeleton: Any) -> list[Any]:
    """What is beside tensors in a value."""
    found: list[Any] = []
    scatter_gather.fill_with(
        lambda leaf: found.append(leaf) if type(leaf) is not scatter_gather.Placeholder else None, skeleton
    )
    return found


def _join(
    joint: scatter_gather.OutputSpec, tensors: Sequence[Sequence[torch.Tensor]], sizes: Sequence[int]
) -> torch.Tensor:
    parts = [tensors[hole.part][hole.number] for hole in joint.holes]
    if parts[0].dim() == 0 and joint.is_joined and parts[0].is_floating_point():
        return sum((part * (size / sum(sizes)) for part, size in zip(parts, sizes, strict=True)), torch.zeros(()))
    return parts[0] if not joint.is_joined or parts[0].dim() == 0 else torch.cat(parts)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not (other.is_floating_point() or other.is_complex()) or other.numel() == 0:
        return torch.equal(one, other)
    scale = float(other.abs().nan_to_num(0, 0, 0).max())
    return torch.allclose(
        one, other, rtol=0, atol=_TOLERANCE.get(other.dtype, _USUAL) * max(scale, 1e-6), equal_nan=True
    )


def _copy(module: nn.Module) -> nn.Module:
    """Return a copy without the user's hooks."""
    model = copy.deepcopy(module)
    for part in model.modules():
        for registry in (part._forward_hooks, part._forward_pre_hooks):
            for key in [key for key, hook in registry.items() if is_users(hook)]:
                del registry[key]
    return model


def is_users(hook: Callable[..., Any]) -> bool:
    """Whether a hook is not torch's own."""
    function = getattr(hook, "__wrapped__", hook)
    where = getattr(function, "__module__", None) or type(function).__module__
    return not str(where).startswith("torch.")


class _State(NamedTuple):
    """What a forward may leave behind in a model, by the names of attributes and parameters."""

    tensors: dict[str, list[int]]
    values: dict[str, bytes]
    versions: dict[str, int]


def _state(model: nn.Module) -> _State:
    tensors, values = {}, {}
    for prefix, part in model.named_modules():
        for attribute, value in part.__dict__.items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            name = f"{prefix}.{attribute}".lstrip(".")
            if isinstance(value, torch.Tensor | list | tuple | dict):
                tensors[name] = [id(tensor) for tensor in scatter_gather.take_out(value)[0]]
            if isinstance(value, int | float | str | list | tuple | dict | set):
                with contextlib.suppress(Exception):
                    values[name] = pickle.dumps(scatter_gather.take_out(value)[1])
    return _State(tensors, values, {name: parameter._version for name, parameter in model.named_parameters()})


def _side_effect(model: nn.Module, before: _State) -> str:
    """Say what a forward left behind in the model; empty if nothing, or a whole number that has grown by one: a counter."""
    after = _state(model)
    for name, tensors in after.tensors.items():
        if not set(tensors) <= set(before.tensors.get(name, ())):
            return f"its forward keeps tensors in {name}, which would be those of one part only"
    for name, value in after.values.items():
        if value != before.values.get(name) and not _has_counted(before.values.get(name), value):
            return f"its forward keeps results in {name}, which would be those of one part only"
    changed = [name for name, version in after.versions.items() if version != before.versions[name]]
    return f"its forward writes to its parameter {changed[0]}" if changed else ""


def _has_counted(before: bytes | None, after: bytes) -> bool:
    one, other = (None if value is None else pickle.loads(value) for value in (before, after))
    return type(one) is int and type(other) is int and other == one + 1


def _shape_of(value: Any) -> Any:
    """The form of nested values, without what no comparison can be made of."""
    if isinstance(value, dict):
        return {key: _shape_of(item) for key, item in value.items()}
    if isinstance(value, tuple | list) and type(value) is not scatter_gather.Placeholder:
        return [_shape_of(item) for item in value]
    return (
        "tensor"
        if type(value) is scatter_gather.Placeholder
        else value
        if isinstance(value, bool | str | None)
        else type(value).__name__
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without a full stop at its end."""
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")


class Generators:
    """The places of the global random generators as they are now."""

    def __init__(self) -> None:
        self._marks = [(stream, stream.mark()) for stream in GLOBAL]

    def rewind(self) -> None:
        """Let the generators go on from there again."""
        for stream, mark in self._marks:
            if stream.moved(mark):
                stream.rewind(mark)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    generators = Generators()
    try:
        yield
    finally:
        generators.rewind()


class DeterministicMode(TorchFunctionMode):
    """Random numbers are all one half, nothing is dropped, and batch norm uses its running statistics."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, or what stands for it."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _DROPPED:
            return args[0] if args else kwargs["input"]
        if function is functional.batch_norm:
            return function(*_without_training(args, kwargs))
        if function is functional.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
            args = args[:4]
        if function is functional.multi_head_attention_forward:
            kwargs = {**kwargs, "training": False}
        if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            return function(*_without_dropout(args), **kwargs)
        result = function(*args, **kwargs)
        if name in _FILLED and isinstance(result, torch.Tensor):
            result.fill_(1 if not result.is_floating_point() else 0.5)
        return result


def _without_training(args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Any]:
    """``batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)`` from running statistics."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    values: dict[str, Any] = {**dict.fromkeys(names[1:5]), "training": False, "momentum": 0.1, "eps": 1e-5}
    values |= dict(zip(names, args, strict=False)) | kwargs
    if values["running_mean"] is None:
        one: torch.Tensor = values["input"]
        channels = one.size(1)
        values["running_mean"], values["running_var"] = one.new_zeros(channels), one.new_ones(channels)
    return [*(values[name] for name in names[:5]), False, values["momentum"], values["eps"]]


def _without_dropout(args: Sequence[Any]) -> list[Any]:
    """The recurrent functions take a probability of dropout, the one float among their arguments, and it becomes 0."""
    return [0.0 if type(value) is float else value for value in args]
