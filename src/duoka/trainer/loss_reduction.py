"""torch's own losses whose mean is not over samples: as ``(sum, weight)``, to mean the same on any number of devices.

``CrossEntropyLoss`` and ``NLLLoss`` divide by the sum of the class weights of the targets that are not ignored, which every
part of a batch has another of. Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from duoka.errors import ConfigError

__all__ = ["MeanLoss", "check_reduction", "measured"]

IGNORED = -100
"""The target that torch ignores where nothing else is said."""

FEW = 256
"""Up to how many targets looking through a list takes less time than two calls of torch."""


class MeanLoss(NamedTuple):
    """A mean whose gradient is taken as it is, since no other part belongs to the step."""

    value: torch.Tensor
    weight: int


def measured(loss: Callable[..., Any], output: Any, target: Any, *, alone: bool = False) -> Any:
    """Return what ``loss(output, target)`` is: a mean over samples, or ``(sum, weight)`` where its mean is another.

    Where the batch is ``alone`` in its step and all its targets are seen to count, torch's mean is the quickest.
    """
    function, options = _over_classes(loss)
    if function is None or not (isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor)):
        return loss(output, target)
    if output.ndim == target.ndim and output.shape == target.shape:
        return loss(output, target)  # targets of the output's shape are probabilities, which are not weighed
    if alone and options.get("weight") is None and _all_count(target, options.get("ignore_index", IGNORED)):
        return MeanLoss(function(output, target, **options), target.numel())
    total = function(output, target, **options, reduction="sum")
    return total, _weight(target, options.get("weight"), options.get("ignore_index", IGNORED))


def _over_classes(loss: Any) -> tuple[Callable[..., torch.Tensor] | None, Mapping[str, Any]]:
    """Return torch's function behind ``loss`` and its options, where it is one of the two that weigh their targets."""
    if loss is functional.cross_entropy or loss is functional.nll_loss:
        return loss, {}
    kind = type(loss)
    if kind is nn.CrossEntropyLoss:
        smoothing = loss.label_smoothing
        return functional.cross_entropy, {
            "weight": loss.weight,
            "ignore_index": loss.ignore_index,
            "label_smoothing": smoothing,
        }
    if kind is nn.NLLLoss:
        return functional.nll_loss, {"weight": loss.weight, "ignore_index": loss.ignore_index}
    if kind is functools.partial and not loss.args and loss.func in (functional.cross_entropy, functional.nll_loss):
        return loss.func, {name: value for name, value in loss.keywords.items() if name != "reduction"}
    return None, {}


def _all_count(target: torch.Tensor, ignored: int) -> bool:
    """Whether it is seen that all targets count; on an accelerator looking would be a wait."""
    count = target.numel()
    if not target.is_cpu or not count:
        return False
    if count <= FEW and target.ndim == 1:
        return ignored not in target.tolist()
    return not bool((target == ignored).any())


def _weight(target: torch.Tensor, weight: torch.Tensor | None, ignored: int) -> torch.Tensor:
    counted = target != ignored
    if weight is None:
        return counted.sum()
    return (weight[torch.where(counted, target, 0)] * counted).sum()


def check_reduction(loss: Any) -> None:
    """Make sure that a loss of torch's own is a mean.

    Raises:
        ConfigError: it is a sum, whose gradient would depend on the batch size and the number of devices.

    """
    if isinstance(loss, functools.partial):
        name, reduction = getattr(loss.func, "__name__", "loss"), loss.keywords.get("reduction")
        owner = getattr(loss.func, "__module__", "")
    else:
        name, reduction, owner = type(loss).__name__, getattr(loss, "reduction", None), type(loss).__module__
    if reduction == "sum" and owner.startswith("torch.nn"):
        raise ConfigError(
            f"loss is {name} with reduction='sum'; a step takes the gradient of the mean over the global batch, "
            'whatever its size: give reduction="mean", or for a mean over something else than samples a function that '
            "returns (sum, weight)"
        )
