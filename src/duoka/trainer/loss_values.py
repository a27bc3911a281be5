"""Forms of a loss: a scalar mean, a pair ``(sum, weight)``, or a model output that carries one of them."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch

from duoka.errors import ConfigError
from duoka.trainer.loss_reduction import MeanLoss

Loss = torch.Tensor | tuple[torch.Tensor, Any] | MeanLoss

GIVE_A_LOSS = (
    "give a loss: Trainer(..., loss=torch.nn.functional.cross_entropy), or the name of a model method that takes a "
    "batch: loss='NAME'"
)


def own_loss(output: Any) -> Loss | None:
    """Return the loss that a model's ``output`` carries, ``None`` if it carries none.

    A loss is ``.loss``, ``["loss"]``, a scalar, or ``(sum, weight)`` with a scalar sum. A tensor of shape ``(1,)`` is
    not a loss: it may be the prediction for a batch of one sample.
    """
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if named is not None:
        return to_scalar_loss(named)
    if isinstance(output, torch.Tensor):
        return output if output.ndim == 0 else None
    return _to_scalars(output) if _is_sum_and_weight(output) and output[0].ndim == 0 else None


def to_scalar_loss(result: Any) -> Loss:
    """Return the result of a loss function as a scalar or ``(sum, weight)``; a single number may have any shape."""
    if isinstance(result, torch.Tensor):
        if result.ndim == 0:
            return result
        if result.numel() == 1:
            return result.reshape(())
    elif _is_sum_and_weight(result) and result[0].numel() == 1:
        return _to_scalars(result)
    loss = own_loss(result)
    if loss is None:
        raise _not_a_loss(result)
    return loss


def _to_scalars(pair: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    total, weight = pair
    return total.reshape(()), weight.reshape(()) if isinstance(weight, torch.Tensor) else weight


def _is_sum_and_weight(output: Any) -> bool:
    """Return whether ``output`` may be ``(sum, weight)``; a tuple of loss and logits is not."""
    if not (isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], torch.Tensor)):
        return False
    weight = output[1]
    return weight.numel() == 1 if isinstance(weight, torch.Tensor) else isinstance(weight, numbers.Real)


def _not_a_loss(output: Any) -> ConfigError:
    if isinstance(output, numbers.Number):
        return ConfigError(
            f"the loss returned the number {output!r}, which has no gradient; return the tensor, without .item() or float()"
        )
    if isinstance(output, torch.Tensor):
        return ConfigError(
            f"the loss has the shape {tuple(output.shape)}, but it must be one number, the mean over the batch "
            f'(reduction="mean"); if the model returns no loss, {GIVE_A_LOSS}'
        )
    return ConfigError(f"the loss returned a {type(output).__name__}, which carries no loss; {GIVE_A_LOSS}")
