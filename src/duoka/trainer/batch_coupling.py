"""Notice of a loss that is not a mean over samples, such as one with in-batch negatives: devices cannot divide it."""

import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from duoka.data import LocalBatch, batch_length, slice_batch, to_device
from duoka.data.rng import GLOBAL
from duoka.data.user_generators import generators_of
from duoka.data_parallel.module_copy import ModuleCopies
from duoka.log import logger
from duoka.trainer.loss_reduction import Loss
from duoka.trainer.model_with_loss import ModelWithLoss
from duoka.utils.torch_private import BatchNorm, DispatchMode

MAX_SAMPLES = 8
"""The most samples of the first batch that the check computes."""
TOLERANCE = 1e-2
"""The largest difference, relative to the losses, that counts as rounding; in low precision 8 units of rounding."""
_DROPOUT = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}


class _CannotTell(BaseException):
    """Ends a check without a result; not an ``Exception``, which user code could catch."""


def warn_of_batch_coupling(module: ModelWithLoss, local: LocalBatch, device: torch.device, replicas: int) -> None:
    """Warn if the loss of a batch is not the mean of its halves' losses, so that steps differ from those of one device."""
    if losses := batch_coupling(module, local, device):
        logger.warning(
            "the loss of a batch is not the mean of its halves' losses (%s). Each of %d devices computes the loss of its "
            "own part, so steps differ from those of one device. For a mean over tokens, return (sum, weight). For "
            "in-batch negatives, train on one device, or gather the vectors of all ranks inside the loss",
            losses,
            replicas,
        )


def batch_coupling(module: ModelWithLoss, local: LocalBatch, device: torch.device) -> str:
    """Return how the loss of some samples differs from the mean of the losses of their halves; empty if it does not.

    The loss is computed by copies of ``module`` that share its parameters, without dropout, and with batch norm's
    running statistics. Empty also if that cannot tell: the batch cannot be cut, or the copy cannot be computed, draws
    random numbers, or communicates with other ranks.
    """
    count = min(local.count, MAX_SAMPLES)
    half = -(-count // 2)
    try:
        if count < 2 or batch_length(local.batch) != local.count:
            return ""
        parts = [slice_batch(local.batch, *bounds, local.count) for bounds in ((0, count), (0, half), (half, count))]
        losses = _losses(module, [to_device(part, device) for part in parts])
        return _difference(losses, (count, half, count - half), _tolerance(module, losses))
    except (_CannotTell, Exception):
        return ""


def _difference(losses: Sequence[Loss], counts: Sequence[int], tolerance: float) -> str:
    """Return the first loss and the mean of the other two as text; empty if they differ by rounding only."""
    pairs = [loss if isinstance(loss, tuple) else (loss * n, n) for loss, n in zip(losses, counts, strict=True)]
    (total, weight), *halves = [(float(total), float(weight)) for total, weight in pairs]
    if not weight or abs(sum(weight for _, weight in halves) - weight) > TOLERANCE * weight:
        return ""
    whole, of_halves = total / weight, sum(total for total, _ in halves) / weight
    largest = max(abs(total) / weight for total, weight in ((total, weight), *halves) if weight)
    return f"{whole:.4g} and {of_halves:.4g}" if abs(whole - of_halves) > tolerance * largest + 1e-5 else ""


def _tolerance(module: ModelWithLoss, losses: Sequence[Loss]) -> float:
    values = [loss[0] if isinstance(loss, tuple) else loss for loss in losses]
    dtypes = {one.dtype for one in (*values, *module.parameters()) if one.is_floating_point()}
    return max(TOLERANCE, 8 * max(torch.finfo(dtype).eps for dtype in dtypes))


def _losses(module: ModelWithLoss, batches: Sequence[Any]) -> list[Loss]:
    """Return the loss of each batch, each computed by a new copy, so that no call sees the changes of another."""
    copies = ModuleCopies(module)
    with _without_side_effects():
        return [_loss_of_copy(copies.make(), batch) for batch in batches]


def _loss_of_copy(module: ModelWithLoss, batch: Any) -> Loss:
    module.autocast, module.capture_outputs, module.single_batch_step = None, False, False
    for layer in module.modules():
        if isinstance(layer, BatchNorm):
            layer.training = False
        elif isinstance(layer, nn.RNNBase):
            layer.dropout = 0.0
    with _unless_drawn_from(generators_of(module.loss, *module.modules())), _OwnOperators(), _NoDropout():
        return module(batch)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _without_side_effects() -> Iterator[None]:
    """Compute without gradients, warnings and compiler."""
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.no_grad())
        yield


@contextlib.contextmanager
def _unless_drawn_from(held: Sequence[Any]) -> Iterator[None]:
    """Raise ``_CannotTell`` if the block draws random numbers, and restore all generators."""
    isolated = [(rng, rng.isolate()) for rng in (*GLOBAL, *held)]
    try:
        yield
    finally:
        drawn_from = [rng for rng, state in isolated if rng.was_drawn_from(state)]
        for rng, state in reversed(isolated):
            rng.restore(state)
    if drawn_from:
        raise _CannotTell


class _NoDropout(TorchFunctionMode):
    """Skips functions of dropout, which a model may call by itself; ends the check at a batch norm in training."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, or return its input if it is dropout."""
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in _DROPOUT:
            return args[0] if args else kwargs["input"]
        if function is functional.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        elif function is functional.multi_head_attention_forward:
            kwargs = {**kwargs, "training": False}
        elif function is functional.batch_norm:
            call = inspect.signature(function).bind(*args, **kwargs)
            if call.arguments.get("training", False):
                raise _CannotTell
        return function(*args, **kwargs)


class _OwnOperators(DispatchMode):  # type: ignore[misc]  # torch has not annotated it
    """Ends the check before a collective, which other ranks would not join, and before a random number is drawn."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the operator, if it gives the same result in every call."""
        name = str(function)
        is_random = torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())
        if "c10d" in name or (is_random and "attention" not in name and "rnn" not in name):  # those got no dropout
            raise _CannotTell
        return function(*args, **(kwargs or {}))
