"""The user's model and loss as one module, whose forward takes a batch and returns its loss.

DDP synchronizes what goes through a module's ``forward``; so a loss that is a model method must be called inside one.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from duoka.errors import ConfigError
from duoka.trainer.batch_targets import call_model, inputs_of, prediction_of, split_target, target_of
from duoka.trainer.loss_reduction import GIVE_A_LOSS, Loss, MeanLoss, check_reduction, own_loss, reduce_loss, to_scalar
from duoka.trainer.target_checks import check_labels, class_count, explained_label_error, refuse_broadcast
from duoka.utils.text import did_you_mean

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ModelWithLoss(nn.Module):
    """``model`` and ``loss`` as one module.

    ``loss`` is a callable ``loss(output, target)``, the name of a model method that takes a batch, or ``None`` for a
    model that returns its own loss (an output with ``.loss``, a dict with ``"loss"``, or the loss itself).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any] | str | None,
        *,
        target_key: str | None = None,
        predict_fn: str | Callable[[nn.Module, Any], Any] | None = None,
        precision: str = "fp32",
        device_type: str = "cpu",
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.target_key = target_key
        self.predict_fn = predict_fn
        self.capture_outputs = False
        """Whether ``captured`` keeps the last batch's output and target, for training metrics."""
        self.captured: tuple[Any, Any] | None = None
        self.single_batch_step = False
        """Whether every batch is a whole step, on one device."""
        self.label_range: tuple[int, int] | None = None
        """Number of classes and the ignored label, for the checks of labels before they reach an accelerator."""
        self._is_target_checked = False
        self._on_cpu = device_type == "cpu"
        self.autocast = (device_type, AUTOCAST_DTYPES[precision]) if precision in AUTOCAST_DTYPES else None

    def forward(self, batch: Any) -> Loss:
        """Return the loss of ``batch``: the mean over its samples, or ``(sum, weight)``."""
        if self.autocast is None:
            return self._loss(batch)
        with torch.autocast(*self.autocast):
            return self._loss(batch)

    def _loss(self, batch: Any) -> Loss:
        loss = self.loss
        if loss is None:
            output = _call_with_whole_batch(self.model, batch)
            own = own_loss(output)
            if own is None:
                raise _no_own_loss(
                    f"it returned a tensor of shape {tuple(output.shape)}, but a loss must be one number"
                    if isinstance(output, torch.Tensor)
                    else f"it returned a {type(output).__name__}, which carries no loss"
                )
            return own
        if isinstance(loss, str):
            return to_scalar(getattr(self.model, loss)(batch))
        inputs, target = split_target(batch, self.target_key)
        output = call_model(self._modules["model"], inputs)  # type: ignore[arg-type]  # faster than self.model
        if self.capture_outputs:
            self.captured = output.detach(), target
        result = self._reduced(loss, output, target, is_whole_step=self.single_batch_step)
        return result if type(result) is MeanLoss else to_scalar(result)

    def evaluate_batch(self, batch: Any, *, with_output: bool) -> tuple[Loss | None, Any, Any]:
        """Return loss (``None`` if there is none at all), predictions and target, from one forward if possible."""
        with self._autocast():
            if isinstance(self.loss, str):
                own = to_scalar(getattr(self.model, self.loss)(batch))
                output = self.predictions(batch) if with_output else None
                return own, output, target_of(batch, self.target_key)
            if self.loss is None:
                output, target = _call_with_whole_batch(self.model, batch), target_of(batch, self.target_key)
                loss = own_loss(output)
            else:
                inputs, target = split_target(batch, self.target_key)
                output = call_model(self.model, inputs)
                loss = to_scalar(self._reduced(self.loss, output, target))
            return loss, self._predictions(batch, output), target

    def check_labels(self, batch: Any) -> None:
        """Raise ``DataError`` for a label out of range in a batch on the host, before an accelerator gets it."""
        if self.label_range is not None:
            target = target_of(batch, self.target_key)
            if isinstance(target, torch.Tensor) and target.is_cpu:
                check_labels(target, *self.label_range)

    def _reduced(self, loss: Callable[..., Any], output: Any, target: Any, *, is_whole_step: bool = False) -> Any:
        """Return the loss as ``reduce_loss`` does; the first batch's targets are checked in full."""
        try:
            is_replica = getattr(self, "_is_replica", False)  # in a thread, and dropped after the step
            if self._is_target_checked or is_replica or torch.compiler.is_compiling():
                return reduce_loss(loss, output, target, is_whole_step=is_whole_step)
            self._is_target_checked = True
            if not self._on_cpu and (found := class_count(loss, output, target)) is not None:
                self.label_range = found
                check_labels(target, *found)  # waits for the device, once
            return refuse_broadcast(lambda: reduce_loss(loss, output, target, is_whole_step=is_whole_step))
        except IndexError as error:
            if (explained := explained_label_error(error, output, target)) is None:
                raise
            raise explained from error

    def predictions(self, batch: Any) -> Any:
        """Return the model's predictions for ``batch``, with or without a target in it."""
        with self._autocast():
            if self.predict_fn is not None:
                return self._predictions(batch, None)
            keep_target = self.loss is None and isinstance(batch, Mapping)
            inputs = batch if keep_target else inputs_of(self.model, batch, self.target_key)
            return prediction_of(call_model(self.model, inputs))

    def _predictions(self, batch: Any, output: Any) -> Any:
        if self.predict_fn is None:
            return prediction_of(output)
        if isinstance(self.predict_fn, str):
            return getattr(self.model, self.predict_fn)(batch)
        return self.predict_fn(self.model, batch)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(*self.autocast) if self.autocast else contextlib.nullcontext()


def check_callables(model: nn.Module, loss: Any, predict_fn: Any) -> None:
    """Raise ``ConfigError`` if ``loss`` or ``predict_fn`` cannot be called, as far as that shows without a batch."""
    check_reduction(loss)
    for option, value in (("loss", loss), ("predict_fn", predict_fn)):
        if isinstance(value, str) and not callable(getattr(model, value, None)):
            methods = [name for name in dir(type(model)) if callable(getattr(type(model), name))]
            hint = did_you_mean(value, methods) or "give the name of a method, or a function"
            raise ConfigError(
                f"{option}={value!r} must be a model method, and {type(model).__name__} has no such method; {hint}"
            )
        if isinstance(value, type):
            raise ConfigError(f"{option} is the class {value.__name__} itself; call it: {option}={value.__name__}()")
        if value is not None and not isinstance(value, str) and not callable(value):
            raise ConfigError(
                f"{option}={value!r} cannot be called; give a function, a module, or the name of a model method"
            )


def _call_with_whole_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model that should return its own loss, and explain the error if its forward does not accept a batch."""
    try:
        return call_model(model, batch)
    except TypeError as error:
        signature = inspect.signature(model.forward)
        try:
            call_model(signature.bind, batch)
        except TypeError:
            names = ", ".join(signature.parameters)
            raise _no_own_loss(f"its forward takes ({names}), which is not all of a batch") from error
        raise


def _no_own_loss(why: str) -> ConfigError:
    return ConfigError(f"Trainer has no loss, and the model does not return one: {why}; {GIVE_A_LOSS}")
