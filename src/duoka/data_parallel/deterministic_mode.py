"""Function mode of a check: the same numbers for a whole batch and for its parts, without randomness."""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from duoka.utils.rng_state import preserve_rng_state

_RANDOM = frozenset(
    {"rand", "randn", "rand_like", "randn_like", "normal", "bernoulli", "normal_", "uniform_", "bernoulli_", "randint",
     "randint_like", "randperm", "exponential_", "multinomial", "poisson", "log_normal_", "cauchy_", "geometric_", "random_",
     "rrelu"}
)  # fmt: skip
_DROPOUT = frozenset(
    {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
     "feature_dropout"}
)  # fmt: skip
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
"""Functions of torch that a check replaces, by name."""
_REDUCTIONS = frozenset(
    {"mean", "sum", "amax", "amin", "max", "min", "var", "std", "median", "logsumexp", "norm", "prod", "nanmean", "quantile",
     "nanquantile"}
)  # fmt: skip
_AFTER_ONE_ARGUMENT = frozenset({"norm", "quantile", "nanquantile"})
"""Those whose ``dim`` is the third argument."""
_CHOICES = frozenset({"topk", "argmax", "argmin", "argsort", "sort", "searchsorted", "bucketize"})
_COMPARISONS = frozenset({"gt", "lt", "ge", "le", "__gt__", "__lt__", "__ge__", "__le__"})
"""Functions whose result jumps: two batches may agree by chance. One number is compared by guards only, as in asserts."""


class DeterministicMode(TorchFunctionMode):
    """Removes randomness, and lets batch norm use its running statistics.

    Random tensors are filled with 0.5, random orders are reversed ones, and dropout does nothing.
    """

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
            args, kwargs = (*args[:4], *(args[4:] and (0.0, *args[5:]))), {**kwargs}
            if len(args) <= 4:
                kwargs["dropout_p"] = 0.0
        if function is functional.multi_head_attention_forward:
            kwargs = {**kwargs, "training": False}
        if name in _RECURRENT:  # the only float among their arguments is the dropout probability
            args = [0.0 if type(value) is float else value for value in args]
        if name in _RANDOM:
            generator = kwargs.get("generator")
            state = None if generator is None else generator.get_state()
            with preserve_rng_state():
                result = function(*args, **kwargs)
            if generator is not None:
                generator.set_state(state)
            if isinstance(result, torch.Tensor):
                with torch.no_grad():
                    if name == "randperm":
                        result.copy_(torch.arange(len(result)).flip(0))
                    else:
                        result.fill_(0.5 if result.is_floating_point() else 1)
            return result
        return function(*args, **kwargs)


class BatchStatisticsMode(DeterministicMode):
    """Notices statistics over the batch, and a choice that depends on one, such as ``topk`` of a mean over all samples."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.choice = ""
        """The first such function; empty if there is none."""
        self.statistics: set[tuple[str, int]] = set()
        """Reductions of the first dimension to more than one number: the function, and that dimension's size per sample.

        A batch and its parts have the same ones, unless that dimension has nothing to do with the samples.
        """
        self._batch = batch
        self._statistics: dict[int, Any] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and note what it depends on."""
        result = super().__torch_function__(function, types, args, kwargs)
        name = getattr(function, "__name__", "")
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        depends = any(self._is_statistic(tensor) for tensor in tensors)
        is_vector = name in _COMPARISONS and isinstance(result, torch.Tensor) and result.dim() > 0
        if depends and (name in _CHOICES or is_vector):
            self.choice = self.choice or name
        size = _reduced_size(name, args, kwargs or {})
        if size % self._batch == 0 and size and any(tensor.dim() for tensor in _tensors(result)):
            self.statistics.add((name, size // self._batch))
        if depends or size == self._batch:
            for tensor in _tensors(result):
                if tensor.is_floating_point():
                    self._statistics[id(tensor)] = weakref.ref(tensor)
        return result

    def _is_statistic(self, tensor: torch.Tensor) -> bool:
        reference = self._statistics.get(id(tensor))
        return reference is not None and reference() is tensor


def _reduced_size(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Return the size of a tensor's first dimension if this is a reduction over it, else 0."""
    if name not in _REDUCTIONS or not (args or "input" in kwargs):
        return 0
    tensor, *others = args or [kwargs["input"]]
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or not tensor.dim():
        return 0
    place = 1 if name in _AFTER_ONE_ARGUMENT else 0
    dims = kwargs.get("dim", kwargs.get("axis", others[place] if len(others) > place else None))
    if "other" in kwargs or isinstance(dims, torch.Tensor):  # the maximum of two tensors, element by element
        return 0
    numbers = dims if isinstance(dims, list | tuple) else [dims]
    is_over_all = dims is None or isinstance(dims, bool)  # var(x, unbiased)
    return tensor.size(0) if is_over_all or any(number in (0, -tensor.dim()) for number in numbers) else 0


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _batch_norm_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Any]:
    """Return all arguments of ``batch_norm``, in order, with ``training=False``."""
    call = inspect.signature(functional.batch_norm).bind(*args, **kwargs)
    call.apply_defaults()
    call.arguments["training"] = False
    if call.arguments["running_mean"] is None:
        batch: torch.Tensor = call.arguments["input"]
        call.arguments |= {"running_mean": batch.new_zeros(batch.size(1)), "running_var": batch.new_ones(batch.size(1))}
    return call.args
