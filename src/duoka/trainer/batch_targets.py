"""Inputs, target and predictions: what a batch and a model's output consist of."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from duoka.errors import DataError

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
PREDICTION_KEYS = ("logits", "predictions", "prediction")


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call ``model`` with a batch's inputs: a mapping as keyword arguments, a tuple or list as positional ones."""
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs)


def split_target(batch: Any, key: str | None = None) -> tuple[Any, Any]:
    """Return ``(inputs, target)``: the target is the last of a tuple or list, or the entry ``key`` of a mapping."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[:-1], batch[-1]
    if isinstance(batch, Mapping):
        name = _target_key(batch, key)
        if name is not None:
            return {other: value for other, value in batch.items() if other != name}, batch[name]
        raise DataError(
            f"a batch with the keys {', '.join(map(str, batch))} has no target among {', '.join(TARGET_KEYS)}; "
            "name it: Trainer(..., target_key='...')"
        )
    raise DataError(
        f"a batch of type {type(batch).__name__} has no target for loss(output, target); let the loader yield "
        "(input, target), or give a model method that takes the whole batch: loss='method'"
    )


def _target_key(batch: Mapping[str, Any], key: str | None) -> str | None:
    return next((name for name in ((key,) if key else TARGET_KEYS) if name in batch), None)


def target_of(batch: Any, key: str | None = None) -> Any:
    """Return the target of ``batch``, ``None`` if it has none."""
    try:
        return split_target(batch, key)[1]
    except DataError:
        return None


def inputs_of(model: nn.Module, batch: Any, key: str | None = None) -> Any:
    """Return the inputs of ``batch`` without its target, if any.

    A tuple has a target if it is longer than the required arguments of ``model.forward``.
    """
    if isinstance(batch, Mapping):
        name = _target_key(batch, key)
        return {other: value for other, value in batch.items() if other != name}
    if not isinstance(batch, (tuple, list)):
        return batch
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    required = sum(item.kind in positional and item.default is inspect.Parameter.empty for item in parameters)
    return batch[:-1] if len(batch) > max(1, required) else batch


def prediction_of(output: Any) -> Any:
    """Return the input of metrics: ``logits``, ``predictions`` or ``prediction`` of an output, else the output."""
    for name in PREDICTION_KEYS:
        if isinstance(output, Mapping) and name in output:
            return output[name]
        if not isinstance(output, (torch.Tensor, tuple)) and hasattr(output, name):
            return getattr(output, name)
    return output
