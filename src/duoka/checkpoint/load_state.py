"""Loading of a state dict into a model: all names and shapes are compared before the first value is copied."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from duoka.checkpoint.key_names import clean_name, match_names, unwrap
from duoka.errors import CheckpointError
from duoka.log import logger
from duoka.utils.text import did_you_mean

_SHOWN = 20


def load_state(model: nn.Module, state: Mapping[str, Any], *, strict: bool = True, source: str = "the state") -> None:
    """Load ``state`` into ``model``, wrapped or not; names may carry wrappers' prefixes on either side.

    Args:
        model: unchanged if this raises for names or shapes.
        state: values by name.
        strict: whether missing and unexpected names are an error; a wrong shape always is.
        source: the name of ``state`` in messages.

    Raises:
        CheckpointError: a list of missing, unexpected and mis-shaped names with both shapes, at most 20 of them.

    """
    inner = unwrap(model)
    current = inner.state_dict()
    actual_names = {clean_name(inner, name): name for name in current}
    matched = match_names(map(str, state), actual_names)
    values = {matched[str(name)]: value for name, value in state.items() if str(name) in matched}
    wanted = {name: current[actual] for name, actual in actual_names.items()}
    _fill_omitted(values, wanted)
    unexpected = [name for name in map(str, state) if name not in matched]
    _compare(source, type(inner).__name__, values, wanted, unexpected, strict=strict)
    ready = OrderedDict((actual_names[name], value) for name, value in values.items())
    versions: dict[str, Any] = dict(getattr(current, "_metadata", {}))
    saved_versions: Mapping[str, Any] = getattr(state, "_metadata", {})
    clean = {clean_name(inner, name): name for name in versions}
    versions |= {clean[name]: saved_versions[found] for found, name in match_names(saved_versions, clean).items()}
    ready._metadata = versions  # type: ignore[attr-defined]  # the file's where it has them, else the model's
    try:
        inner.load_state_dict(ready, strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit {type(inner).__name__}: {error}") from error


def _fill_omitted(values: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    """Add tensors that a file may omit: a tied tensor that it holds once, and batch norm's counter in old files."""
    stored = {
        _memory_of(wanted[name]): value for name, value in values.items() if isinstance(wanted[name], torch.Tensor)
    }
    for name in wanted.keys() - values.keys():
        if isinstance(wanted[name], torch.Tensor) and (tied := stored.get(_memory_of(wanted[name]))) is not None:
            values[name] = tied
        elif name.rpartition(".")[2] == "num_batches_tracked":
            values[name] = wanted[name]


def _memory_of(tensor: torch.Tensor) -> Any:
    if is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _compare(
    source: str, kind: str, values: dict[str, Any], wanted: dict[str, Any], unexpected: list[str], *, strict: bool
) -> None:
    unfit = [line for name in wanted if name in values and (line := _difference(name, values[name], wanted[name]))]
    lines = []
    for name in [name for name in wanted if name not in values]:
        hint = did_you_mean(name, unexpected, cutoff=0.75)
        lines.append(f"missing: {name} {_shape(wanted[name])}{hint and f'; {hint}'}")
    lines += [f"unexpected: {name}" for name in unexpected]
    if unfit or (strict and lines) or (wanted and not values):
        heading = f"{source} does not fit {kind}; nothing was loaded. The differences:"
        raise CheckpointError(_with_heading(heading, [*unfit, *lines]))
    if lines:
        logger.warning("%s", _with_heading(f"{source} was loaded in part into {kind}:", lines))


def _difference(name: str, value: Any, wanted: Any) -> str | None:
    if not (isinstance(value, torch.Tensor) and isinstance(wanted, torch.Tensor)):
        same_kind = isinstance(value, torch.Tensor) == isinstance(wanted, torch.Tensor)
        return None if same_kind else f"type: {name} is a {type(value).__name__}, the model's a {type(wanted).__name__}"
    if is_lazy(wanted):
        return None
    if value.shape != wanted.shape:
        return f"shape: {name} is {_shape(value)} in the file, {_shape(wanted)} in the model"
    if value.is_complex() and not wanted.is_complex():
        return f"type: {name} is {value.dtype} in the file, {wanted.dtype} in the model"
    return None


def _shape(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"({type(value).__name__})"
    return "(not yet known)" if is_lazy(value) else str(tuple(value.shape))


def _with_heading(heading: str, lines: list[str]) -> str:
    rest = len(lines) - _SHOWN
    shown = [*lines[:_SHOWN], f"... and {rest} more"] if rest > 0 else lines
    return "\n  ".join([heading, *shown])
