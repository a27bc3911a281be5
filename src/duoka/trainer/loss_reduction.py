"""Reduction of torch's class-weighted losses to ``(sum, weight)``, which has the same mean on any number of devices.

``CrossEntropyLoss`` and ``NLLLoss`` divide by the summed class weights of the targets that are not ignored, and that
sum differs between ranks. Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from duoka.errors import ConfigError

IGNORE_INDEX = -100
"""The target that torch ignores by default."""

FEW_TARGETS = 256
"""Up to this number of targets, a search in a list takes less time than two torch calls."""


class MeanLoss(NamedTuple):
    """A mean loss that is the loss of the whole step, so that it needs no scaling."""

    value: torch.Tensor
    weight: int


def reduce_loss(loss: Callable[..., Any], output: Any, target: Any, *, is_whole_step: bool = False) -> Any:
    """Return ``loss(output, target)`` as a mean over samples, or as ``(sum, weight)`` if its mean is over something else.

    If the batch is the whole step and all its targets count, torch's own mean is the fastest.
    """
    function, options = _class_loss(loss)
    if function is None or not (isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor)):
        return loss(output, target)
    if output.ndim == target.ndim and output.shape == target.shape:
        return loss(output, target)  # targets of the output's shape are probabilities, which have no weights
    ignored = options.get("ignore_index", IGNORE_INDEX)
    if is_whole_step and options.get("weight") is None and _all_targets_count(target, ignored):
        return MeanLoss(function(output, target, **options), target.numel())
    total = function(output, target, **options, reduction="sum")
    return total, _total_weight(target, options.get("weight"), ignored)


def _class_loss(loss: Any) -> tuple[Callable[..., torch.Tensor] | None, Mapping[str, Any]]:
    """Return torch's function behind ``loss`` and its options, if it is cross entropy or negative log-likelihood."""
    if loss is functional.cross_entropy or loss is functional.nll_loss:
        return loss, {}
    kind = type(loss)
    if kind is nn.CrossEntropyLoss:
        names = ("weight", "ignore_index", "label_smoothing")
        return functional.cross_entropy, {name: getattr(loss, name) for name in names}
    if kind is nn.NLLLoss:
        return functional.nll_loss, {"weight": loss.weight, "ignore_index": loss.ignore_index}
    if kind is functools.partial and not loss.args and loss.func in (functional.cross_entropy, functional.nll_loss):
        return loss.func, {name: value for name, value in loss.keywords.items() if name != "reduction"}
    return None, {}


def _all_targets_count(target: torch.Tensor, ignored: int) -> bool:
    """Return whether no target is ignored; ``False`` on an accelerator, where the check would wait for the device."""
    count = target.numel()
    if not target.is_cpu or not count:
        return False
    if count <= FEW_TARGETS and target.ndim == 1:
        return ignored not in target.tolist()
    return not bool((target == ignored).any())


def _total_weight(target: torch.Tensor, weight: torch.Tensor | None, ignored: int) -> torch.Tensor:
    counted = target != ignored
    if weight is None:
        return counted.sum()
    return (weight[torch.where(counted, target, 0)] * counted).sum()


def check_reduction(loss: Any) -> None:
    """Raise ``ConfigError`` for a torch loss with ``reduction="sum"``: its gradient depends on the batch size."""
    if isinstance(loss, functools.partial):
        name, reduction = getattr(loss.func, "__name__", "loss"), loss.keywords.get("reduction")
        owner = getattr(loss.func, "__module__", "")
    else:
        name, reduction, owner = type(loss).__name__, getattr(loss, "reduction", None), type(loss).__module__
    if reduction == "sum" and owner.startswith("torch.nn"):
        raise ConfigError(
            f"loss is {name} with reduction='sum', but a step takes the gradient of the mean over the global batch; "
            'give reduction="mean", or, for a mean over something else than samples, a function that returns (sum, weight)'
        )
