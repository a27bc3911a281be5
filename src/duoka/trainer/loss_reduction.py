"""Forms of a loss, which have the same mean on any number of devices: a mean over samples, or ``(sum, weight)``.

torch's class-weighted losses divide by the summed class weights of the targets that are not ignored, and that sum
differs between ranks. Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html
"""

import functools
import inspect
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from duoka.errors import ConfigError

IGNORE_INDEX = -100
"""The target that torch ignores by default."""
FEW_TARGETS = 256
"""Up to this number of targets, a search in a list takes less time than two torch calls."""
GIVE_A_LOSS = (
    "give a loss: Trainer(..., loss=torch.nn.functional.cross_entropy), or the name of a model method that takes a "
    "batch: loss='NAME'"
)


class MeanLoss(NamedTuple):
    """A mean loss that is the loss of the whole step, so that it needs no scaling."""

    value: torch.Tensor
    weight: int


Loss = torch.Tensor | tuple[torch.Tensor, Any] | MeanLoss


def own_loss(output: Any) -> Loss | None:
    """Return the loss that a model's ``output`` carries, ``None`` if it carries none.

    A loss is ``.loss``, ``["loss"]``, a scalar, or ``(sum, weight)`` with a scalar sum. A tensor of shape ``(1,)`` is
    not a loss: it may be the prediction for a batch of one sample.
    """
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if named is not None:
        return to_scalar(named)
    if isinstance(output, torch.Tensor):
        return output if output.ndim == 0 else None
    pair = _sum_and_weight(output)
    return pair if pair is not None and output[0].ndim == 0 else None


def to_scalar(result: Any) -> Loss:
    """Return the result of a loss function as a scalar or ``(sum, weight)``; a single number may have any shape."""
    if isinstance(result, torch.Tensor):
        if result.ndim == 0:
            return result
        if result.numel() == 1:
            return result.reshape(())
        raise ConfigError(
            f"the loss has the shape {tuple(result.shape)}, but it must be one number, the mean over the batch "
            f'(reduction="mean"); if the model returns no loss, {GIVE_A_LOSS}'
        )
    if (pair := _sum_and_weight(result)) is not None:
        return pair
    if isinstance(result, numbers.Number):
        raise ConfigError(
            f"the loss returned the number {result!r}, which has no gradient; return the tensor, without .item() or float()"
        )
    loss = own_loss(result)
    if loss is None:
        raise ConfigError(f"the loss returned a {type(result).__name__}, which carries no loss; {GIVE_A_LOSS}")
    return loss


def _sum_and_weight(output: Any) -> tuple[torch.Tensor, Any] | None:
    """Return ``output`` as scalars if it may be ``(sum, weight)``, else ``None``: for a tuple of loss and logits."""
    if not (isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], torch.Tensor)):
        return None
    total, weight = output
    if isinstance(weight, torch.Tensor) and weight.numel() == 1:
        weight = weight.reshape(())
    elif not isinstance(weight, numbers.Real):
        return None
    return (total.reshape(()), weight) if total.numel() == 1 else None


def reduce_loss(loss: Callable[..., Any], output: Any, target: Any, *, is_whole_step: bool = False) -> Any:
    """Return ``loss(output, target)`` as a mean over samples, or as ``(sum, weight)`` if its mean is over something else.

    If the batch is the whole step and all its targets count, torch's own mean is the fastest.
    """
    function, options = class_loss(loss)
    if function is None and not is_whole_step:
        with _ClassLossCalls() as calls:
            result = loss(output, target)
        return calls.reduce(result)
    if function is None or not (isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor)):
        return loss(output, target)
    if output.ndim == target.ndim and output.shape == target.shape:
        return loss(output, target)  # targets of the output's shape are probabilities, which have no weights
    weight, ignored = options.get("weight"), options.get("ignore_index", IGNORE_INDEX)
    if is_whole_step and weight is None and _all_targets_count(target, ignored):
        return MeanLoss(function(output, target, **options), target.numel())
    return _sum_and_count(function, output, target, options)


def _sum_and_count(
    function: Callable[..., torch.Tensor], output: torch.Tensor, target: torch.Tensor, options: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a class loss as a sum, and the summed weight of the targets that count."""
    weight, counted = options.get("weight"), target != options.get("ignore_index", IGNORE_INDEX)
    total = function(output, target, **options, reduction="sum")
    return total, counted.sum() if weight is None else (weight[torch.where(counted, target, 0)] * counted).sum()


class _ClassLossCalls(TorchFunctionMode):
    """Records calls of torch's class losses inside a user's loss function."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[torch.Tensor, Callable[..., torch.Tensor], dict[str, Any]]] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and note the call if it is that of a class loss."""
        result = function(*args, **(kwargs or {}))
        if function is functional.cross_entropy or function is functional.nll_loss:
            arguments = inspect.signature(function).bind(*args, **(kwargs or {})).arguments
            self._calls.append((result, function, dict(arguments)))
        return result

    def reduce(self, result: Any) -> Any:
        """Return the result of the user's loss, as ``(sum, weight)`` if it is that of a class loss."""
        for value, function, arguments in self._calls:
            output, target = arguments.pop("input"), arguments.pop("target")
            old_options = [arguments.pop(name, None) for name in ("size_average", "reduce")]
            is_mean = arguments.pop("reduction", "mean") == "mean" and old_options == [None, None]
            if not is_mean or output.shape == target.shape:
                continue
            if value is result:
                return _sum_and_count(function, output, target, arguments)
            ignored = arguments.get("ignore_index", IGNORE_INDEX)
            if arguments.get("weight") is not None or (target.is_cpu and bool((target == ignored).any())):
                warnings.warn(
                    f"the loss adds something to {function.__name__} with class weights or ignored targets, whose mean is not "
                    "over samples: on several devices the step differs from that of one. Return (sum, weight): the "
                    "summed loss, and the summed weight of the targets that count",
                    stacklevel=2,
                )
        return result


def class_loss(loss: Any) -> tuple[Callable[..., torch.Tensor] | None, Mapping[str, Any]]:
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


def check_reduction(loss: Any) -> None:
    """Raise ``ConfigError`` for a torch loss with ``reduction="sum"``: its gradient depends on the batch size."""
    is_partial = isinstance(loss, functools.partial)
    named = loss.func if is_partial else type(loss)
    reduction = loss.keywords.get("reduction") if is_partial else getattr(loss, "reduction", None)
    if reduction == "sum" and getattr(named, "__module__", "").startswith("torch.nn"):
        raise ConfigError(
            f"loss is {named.__name__} with reduction='sum', but a step takes the gradient of the mean over the global batch; "
            'give reduction="mean", or, for a mean over something else than samples, a function that returns (sum, weight)'
        )
