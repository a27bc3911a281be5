"""The model together with its loss as one module: its forward takes a batch and returns the loss of the batch.

DDP synchronises what goes through a module's ``forward``, so a loss that is a method of the model works only from inside one.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from duoka.errors import ConfigError, DataError
from duoka.trainer.loss_reduction import MeanLoss, check_reduction, measured

__all__ = ["EvalResult", "ModelWithLoss", "check_calls", "model_output"]

TARGETS = ("labels", "label", "targets", "target", "y")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Loss = torch.Tensor | tuple[torch.Tensor, Any] | MeanLoss


@dataclass(frozen=True)
class EvalResult:
    """What evaluation needs of one batch."""

    loss: Loss | None
    """The batch's mean, or ``(sum, weight)``; ``None`` where the model has no loss of its own and none was given."""
    output: Any
    target: Any


class ModelWithLoss(nn.Module):
    """``model`` and ``loss`` as one module.

    ``loss`` is called as ``loss(output, target)``; is the name of a method of the model that takes a batch; or is ``None``
    for a model that returns its own loss (an output with ``.loss``, a dict with ``"loss"``, or the loss itself).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any] | str | None,
        *,
        target: str | None = None,
        predict: str | Callable[[nn.Module, Any], Any] | None = None,
        precision: str = "fp32",
        device_type: str = "cpu",
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.target = target
        self.predict = predict
        self.keeps = False
        """Whether what the last batch's loss was taken of is kept in ``seen``, for metrics of training."""
        self.seen: tuple[Any, Any] | None = None
        self.alone = False
        """Whether every batch is a whole step, on one device."""
        self.autocast = (device_type, DTYPES[precision]) if precision in DTYPES else None

    def forward(self, batch: Any) -> Loss:
        """Return the loss of ``batch``: its mean over the samples, or ``(sum, weight)``."""
        if self.autocast is None:
            return self._loss(batch)
        with torch.autocast(*self.autocast):
            return self._loss(batch)

    def _loss(self, batch: Any) -> Loss:
        loss = self.loss
        if loss is None:
            output = _own_output(self.model, batch)
            own = own_loss(output)
            if own is None:
                raise _no_own_loss(f"it returned {_in_words(output)}")
            return own
        if isinstance(loss, str):
            return as_loss(getattr(self.model, loss)(batch))
        inputs, target = split_target(batch, self.target)
        output = model_output(self._modules["model"], inputs)  # type: ignore[arg-type]  # the quick way to self.model
        if self.keeps:
            self.seen = output.detach(), target
        result = measured(loss, output, target, alone=self.alone)
        return result if type(result) is MeanLoss else as_loss(result)

    def judge(self, batch: Any, with_output: bool) -> EvalResult:
        """Return loss, predictions and target of ``batch``, from one forward where that is possible."""
        with torch.autocast(*self.autocast) if self.autocast else contextlib.nullcontext():
            loss = self.loss
            if loss is None:
                output = _own_output(self.model, batch)
                return EvalResult(own_loss(output), self._predictions(batch, output), target_of(batch, self.target))
            if isinstance(loss, str):
                own = as_loss(getattr(self.model, loss)(batch))
                output = self.predictions(batch) if with_output else None
                return EvalResult(own, output, target_of(batch, self.target))
            inputs, target = split_target(batch, self.target)
            output = model_output(self.model, inputs)
            return EvalResult(as_loss(measured(loss, output, target)), self._predictions(batch, output), target)

    def predictions(self, batch: Any) -> Any:
        """Return the model's predictions for ``batch``, which may hold a target or not."""
        with torch.autocast(*self.autocast) if self.autocast else contextlib.nullcontext():
            if self.predict is not None:
                return self._predictions(batch, None)
            keep_target = self.loss is None and isinstance(batch, Mapping)
            return prediction_of(
                model_output(self.model, batch if keep_target else inputs_of(self.model, batch, self.target))
            )

    def _predictions(self, batch: Any, output: Any) -> Any:
        if self.predict is None:
            return prediction_of(output)
        if isinstance(self.predict, str):
            return getattr(self.model, self.predict)(batch)
        return self.predict(self.model, batch)


def check_calls(model: nn.Module, loss: Any, predict: Any) -> None:
    """Make sure that ``loss`` and ``predict`` are what can be called, as far as that shows before a batch is there.

    Raises:
        ConfigError: one is not; with what was meant.

    """
    check_reduction(loss)
    for option, value in (("loss", loss), ("predict_fn", predict)):
        if isinstance(value, str) and not callable(getattr(model, value, None)):
            methods = [name for name in dir(type(model)) if callable(getattr(type(model), name))]
            close = difflib.get_close_matches(value, methods, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"{option}={value!r} is to be a method of the model, and {type(model).__name__} has none{hint}"
            )
        if isinstance(value, type):
            raise ConfigError(f"{option} is the class {value.__name__} itself; call it: {option}={value.__name__}()")
        if value is not None and not isinstance(value, str) and not callable(value):
            raise ConfigError(
                f"{option}={value!r} cannot be called; give a function, a module, or the name of a method of the model"
            )


def _own_output(model: nn.Module, batch: Any) -> Any:
    """Call a model that is to return its own loss with the whole batch."""
    try:
        return model_output(model, batch)
    except TypeError as error:
        if _takes(model, batch):
            raise
        names = ", ".join(inspect.signature(model.forward).parameters)
        raise _no_own_loss(f"its forward takes ({names}), which is not all of a batch") from error


def _takes(model: nn.Module, batch: Any) -> bool:
    signature = inspect.signature(model.forward)
    try:
        if isinstance(batch, Mapping):
            signature.bind(**batch)
        else:
            signature.bind(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
    except TypeError:
        return False
    return True


def _no_own_loss(why: str) -> ConfigError:
    return ConfigError(
        f"no loss was given, and the model does not return its own: {why}; give one: "
        "Trainer(..., loss=torch.nn.functional.cross_entropy), or loss='name of a method of the model that takes a batch'"
    )


def _in_words(output: Any) -> str:
    if isinstance(output, torch.Tensor):
        return f"a tensor of shape {tuple(output.shape)}, where a loss is one number"
    return f"a {type(output).__name__}, which carries no loss"


def model_output(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` with a batch's inputs: a mapping as keywords, a tuple or list as positions, else as the one input."""
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs)


def split_target(batch: Any, key: str | None = None) -> tuple[Any, Any]:
    """Return ``(inputs, target)``: the last of a tuple or list, or the entry ``key`` of a mapping."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[:-1], batch[-1]
    if isinstance(batch, Mapping):
        name = _target_key(batch, key)
        if name is not None:
            return {other: value for other, value in batch.items() if other != name}, batch[name]
        raise DataError(
            f"a batch with the keys {', '.join(map(str, batch))} has no target among {', '.join(TARGETS)}; "
            "name it: Trainer(..., target_key='...')"
        )
    raise DataError(
        f"a batch of type {type(batch).__name__} has no target for loss(output, target); let the loader yield "
        "(input, target), or give a loss that takes the whole batch as a method of the model: loss='method'"
    )


def _target_key(batch: Mapping[str, Any], key: str | None) -> str | None:
    return next((name for name in ((key,) if key else TARGETS) if name in batch), None)


def target_of(batch: Any, key: str | None = None) -> Any:
    """Return the target of ``batch``, or ``None`` where there is none."""
    try:
        return split_target(batch, key)[1]
    except DataError:
        return None


def inputs_of(model: nn.Module, batch: Any, key: str | None = None) -> Any:
    """Return the inputs of ``batch`` without its target, if it has one.

    A tuple has a target when it is longer than what ``model.forward`` requires.
    """
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != _target_key(batch, key)}
    if isinstance(batch, (tuple, list)) and len(batch) > 1 and len(batch) > _required(model):
        return batch[:-1]
    return batch


def _required(model: nn.Module) -> int:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(item.kind in positional and item.default is inspect.Parameter.empty for item in parameters) or 1


def own_loss(output: Any) -> Loss | None:
    """Return the loss that a model's ``output`` carries, in training or evaluation; ``None`` where it carries none.

    It is ``.loss``, ``["loss"]``, a scalar, or ``(sum, weight)`` with a scalar sum. A tensor with one element is not taken
    for one: it may be the prediction for a batch of one sample.
    """
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if named is not None:
        return as_loss(named)
    if isinstance(output, torch.Tensor):
        return output if output.ndim == 0 else None
    return _scalars(output) if _is_pair(output) and output[0].ndim == 0 else None


def loss_of(output: Any) -> Loss:
    """Return the loss that a model's ``output`` carries, which has to carry one."""
    loss = own_loss(output)
    if loss is None:
        raise _no_loss(output)
    return loss


def as_loss(result: Any) -> Loss:
    """Return what a loss has returned as a scalar or ``(sum, weight)``; one number in any shape is that number."""
    if isinstance(result, torch.Tensor):
        if result.ndim == 0:
            return result
        if result.numel() == 1:
            return result.reshape(())
    elif _is_pair(result) and result[0].numel() == 1:
        return _scalars(result)
    return loss_of(result)


def _scalars(pair: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    total, weight = pair
    return total.reshape(()), weight.reshape(()) if isinstance(weight, torch.Tensor) else weight


def _is_pair(output: Any) -> bool:
    """Whether ``output`` may be ``(sum, weight)``; a tuple of loss and logits is not."""
    if not (isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], torch.Tensor)):
        return False
    weight = output[1]
    return weight.numel() == 1 if isinstance(weight, torch.Tensor) else isinstance(weight, numbers.Real)


def _no_loss(output: Any) -> ConfigError:
    if isinstance(output, numbers.Number):
        return ConfigError(
            f"the loss returned the number {output!r}, from which no gradient can be taken; return the tensor that it was "
            "made from, without .item() or float()"
        )
    if isinstance(output, torch.Tensor):
        return ConfigError(
            f"the loss has the shape {tuple(output.shape)} and has to be one number, the mean over the batch "
            '(reduction="mean"); if the model returns no loss, give one: '
            "Trainer(..., loss=torch.nn.functional.cross_entropy)"
        )
    return ConfigError(
        f"what was returned is a {type(output).__name__}, which carries no loss; give one: "
        "Trainer(..., loss=torch.nn.functional.cross_entropy), or loss='name of a method of the model that takes a batch'"
    )


def prediction_of(output: Any) -> Any:
    """Return what metrics compare: ``logits`` or ``prediction`` where a model's output has one, else the output."""
    for name in ("logits", "predictions", "prediction"):
        if isinstance(output, Mapping) and name in output:
            return output[name]
        if not isinstance(output, (torch.Tensor, tuple)) and hasattr(output, name):
            return getattr(output, name)
    return output
