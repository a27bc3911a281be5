"""Function mode that makes a forward deterministic, to compare a batch with its parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_RANDOM = frozenset(
    {"rand", "randn", "rand_like", "randn_like", "normal", "bernoulli", "normal_", "uniform_", "bernoulli_", "randint",
     "randint_like", "exponential_", "multinomial", "poisson", "log_normal_", "cauchy_", "geometric_", "random_", "rrelu"}
)  # fmt: skip
_DROPOUT = frozenset(
    {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
     "feature_dropout"}
)  # fmt: skip
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


class DeterministicMode(TorchFunctionMode):
    """Fills random tensors with 0.5, skips dropout, and lets batch norm use its running statistics."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function or its deterministic replacement."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _DROPOUT:
            return args[0] if args else kwargs["input"]
        if function is functional.batch_norm:
            return function(*_batch_norm_arguments(args, kwargs))
        if function is functional.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
            args = args[:4]
        if function is functional.multi_head_attention_forward:
            kwargs = {**kwargs, "training": False}
        if name in _RECURRENT:  # the only float among their arguments is the dropout probability
            args = [0.0 if type(value) is float else value for value in args]
        result = function(*args, **kwargs)
        if name in _RANDOM and isinstance(result, torch.Tensor):
            result.fill_(0.5 if result.is_floating_point() else 1)
        return result


def _batch_norm_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Any]:
    """Return all arguments of ``batch_norm``, in order, with ``training=False``."""
    call = inspect.signature(functional.batch_norm).bind(*args, **kwargs)
    call.apply_defaults()
    call.arguments["training"] = False
    if call.arguments["running_mean"] is None:
        batch: torch.Tensor = call.arguments["input"]
        call.arguments |= {"running_mean": batch.new_zeros(batch.size(1)), "running_var": batch.new_ones(batch.size(1))}
    return call.args
