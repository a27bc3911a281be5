"""Loading a state dict into a model: all names and shapes are compared before the first value is copied."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from duoka.checkpoint.key_names import clean_name, match_names, nearest, unwrap
from duoka.errors import CheckpointError
from duoka.log import logger

__all__ = ["load_state"]

_SHOWN = 20


def load_state(model: nn.Module, state: Mapping[str, Any], *, strict: bool = True, source: str = "the state") -> None:
    """Load ``state`` into ``model``, wrapped or not; names may carry wrappers' prefixes on either side.

    Args:
        model: is as it was when this raises for names or shapes.
        state: values by name.
        strict: whether missing and unexpected names are an error; a wrong shape always is.
        source: what a message calls ``state``.

    Raises:
        CheckpointError: naming the missing, unexpected and mis-shaped keys, the first 20 of many, with both shapes.

    """
    own = unwrap(model)
    current = own.state_dict()
    actual = {clean_name(own, name): name for name in current}
    matched = match_names(map(str, state), actual)
    values = {matched[str(name)]: value for name, value in state.items() if str(name) in matched}
    wanted = {name: current[place] for name, place in actual.items()}
    _fill_what_older_files_lack(values, wanted)
    _compare(source, own, values, wanted, [str(name) for name in state if str(name) not in matched], strict=strict)
    ready = OrderedDict((actual[name], value) for name, value in values.items())
    ready._metadata = _versions(own, state, current)  # type: ignore[attr-defined]
    try:
        own.load_state_dict(ready, strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit {type(own).__name__}: {error}") from error


def _fill_what_older_files_lack(values: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    """A tensor tied to one that is there, stored once; and batch norm's counter, which old versions did not keep."""
    places = {_place(wanted[name]): value for name, value in values.items() if isinstance(wanted[name], torch.Tensor)}
    for name in wanted.keys() - values.keys():
        if isinstance(wanted[name], torch.Tensor) and (tied := places.get(_place(wanted[name]))) is not None:
            values[name] = tied
        elif name.rpartition(".")[2] == "num_batches_tracked":
            values[name] = wanted[name]


def _place(tensor: torch.Tensor) -> Any:
    if is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _versions(own: nn.Module, state: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """The versions of the modules by the model's own names: the file's where it has them, else the model's."""
    own_versions: dict[str, Any] = dict(getattr(current, "_metadata", {}))
    theirs: Mapping[str, Any] = getattr(state, "_metadata", {})
    clean = {clean_name(own, name): name for name in own_versions}
    matched = match_names(theirs, clean)
    return own_versions | {clean[name]: theirs[found] for found, name in matched.items()}


def _compare(
    source: str, own: nn.Module, values: dict[str, Any], wanted: dict[str, Any], unexpected: list[str], *, strict: bool
) -> None:
    unfit = [line for name in wanted if name in values and (line := _difference(name, values[name], wanted[name]))]
    missing = [name for name in wanted if name not in values]
    lines = [_missing(name, wanted[name], unexpected) for name in missing]
    lines += [f"unexpected: {name}" for name in unexpected]
    if unfit or (strict and lines) or (wanted and not values):
        raise CheckpointError(_mismatch(source, type(own).__name__, [*unfit, *lines]))
    if lines:
        logger.warning("%s", _listed(f"{source} was loaded in part into {type(own).__name__}:", lines))


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


def _missing(name: str, value: Any, unexpected: list[str]) -> str:
    close = nearest(name, unexpected)
    hint = f"; did you mean {close}, which is in the file?" if close else ""
    return f"missing: {name} {_shape(value)}{hint}"


def _shape(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"({type(value).__name__})"
    return "(not yet known)" if is_lazy(value) else str(tuple(value.shape))


def _mismatch(source: str, model: str, lines: list[str]) -> str:
    return _listed(f"{source} does not fit {model}; nothing was loaded, and this is how they differ:", lines)


def _listed(heading: str, lines: list[str]) -> str:
    rest = len(lines) - _SHOWN
    shown = [*lines[:_SHOWN], f"... and {rest} more"] if rest > 0 else lines
    return "\n  ".join([heading, *shown])
