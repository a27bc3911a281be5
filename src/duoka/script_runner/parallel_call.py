"""What stands in the place of a model's call: the whole batch here at first, and its parts on all devices from then on.

The first call of each kind tries whether the model may be computed in parts at all. Now and then a training step is still
computed whole, which changes nothing about its result, so that there is something to compare the speed with.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from duoka.data_parallel import scatter_gather
from duoka.data_parallel.controller import Controller
from duoka.errors import WorkerDied
from duoka.log import logger
from duoka.script_runner.run_stats import ModelStats
from duoka.script_runner.split_check import (
    STALE_CLOSURE,
    Generators,
    SplitCheckResult,
    check_splittable,
    first_line,
    is_users,
    signature,
)

__all__ = ["ParallelizedCall"]

_WHOLE_STEPS = frozenset({20, 21, 22, 100, 101, 102, 500, 501, 502})
"""After so many optimiser steps a step is computed whole, to compare with; so is each model's first call."""


class ParallelizedCall:
    """A model's call, shared out; ``model._compiled_call_impl`` is where torch looks for one before its own."""

    _local = threading.local()

    def __init__(
        self, module: nn.Module, devices: Sequence[torch.device], stats: ModelStats, *, fits_one: bool = True
    ) -> None:
        """Stand in for the calls of ``module``; ``fits_one`` tells whether a whole batch fits on one device."""
        self._module = weakref.ref(module)
        self._devices = tuple(devices)
        self._stats = stats
        self._engine: Controller | None = None
        self._starting = threading.Lock()
        self._verdicts: dict[Any, SplitCheckResult] = {}
        self._seen: Counter[Any] = Counter()
        self._is_first = True
        self._fits_one = fits_one

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_call, ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute ``module(*args, **kwargs)``."""
        module = self._module()
        assert module is not None, "it is the module that is being called"
        if self.is_local() or is_traced(module):
            return _call_locally(module, args, kwargs)
        with self.local_only():
            return self._call(module, args, kwargs)

    @classmethod
    def is_local(cls) -> bool:
        """Whether this thread computes a part now, or a whole that is not to be shared."""
        return getattr(cls._local, "is_so", False)

    @classmethod
    @contextlib.contextmanager
    def local_only(cls) -> Iterator[None]:
        """Let models that are called inside the ``with`` block compute what they are given: it is a part already."""
        before, cls._local.is_so = cls.is_local(), True
        try:
            yield
        finally:
            cls._local.is_so = before

    def close(self) -> None:
        """Give the helpers back, and the model its own call."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
        if (module := self._module()) is not None and module._compiled_call_impl is self:
            del module._compiled_call_impl

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors, skeleton = scatter_gather.take_out((args, kwargs))
        batch = scatter_gather.batch_size(tensors, 0)
        if batch is None or batch < 2 or self._stats.refusal or self._is_elsewhere(module):
            self._stats.count(batch, split=False)
            return _call_locally(module, args, kwargs)
        verdict = self._verdict(module, tensors, skeleton, batch)
        if verdict is None:
            self._stats.count(batch, split=False)
            return _call_locally(module, args, kwargs)
        reason = verdict.reason or _reason_now(module, tensors, verdict)
        if reason:
            self._stats.refuse(reason)
        if reason or self._is_for_comparison():
            self._stats.count(batch, split=False)
            return _call_locally(module, args, kwargs)
        return self._split(module, args, kwargs, batch, verdict)

    def _is_elsewhere(self, module: nn.Module) -> bool:
        """Whether the script has moved a model away for now that was shared, to try or save it on the host."""
        if self._engine is None:  # one that never was there is told so
            return False
        first = next(module.parameters(), None)
        return first is not None and first.device != self._devices[0]

    def _started(self) -> Controller:
        with self._starting:  # two threads that come first at once are not to have an engine each
            if self._engine is None:
                with self._stats.calls.startup():
                    self._engine = Controller(self._devices, 0)
                    self._engine.crew.start()
            return self._engine

    def _verdict(
        self, module: nn.Module, tensors: Sequence[torch.Tensor], skeleton: Any, batch: int
    ) -> SplitCheckResult | None:
        """Return what a trial has said of this kind of call; it is tried again at its 2nd, 4th, 8th, ... call."""
        kind = signature(module, tensors, skeleton)
        self._seen[kind] += 1
        seen = self._seen[kind]
        if kind in self._verdicts and seen & (seen - 1):
            return self._verdicts[kind]
        with self._stats.calls.startup():
            parts = len(self._devices)
            if not self._fits_one and batch >= 2 * parts:  # where the whole may not fit, try one device's part
                sizes = scatter_gather.part_sizes(batch, parts)
                tensors = [scatter_gather.split(tensor, sizes, 0)[0] for tensor in tensors]
            args, kwargs = scatter_gather.fill(skeleton, tensors)
            verdict = check_splittable(module, args, kwargs, parts, self._helpers_on(module, args, kwargs))
        if verdict is not None:
            self._verdicts[kind] = verdict
            if verdict.reason is STALE_CLOSURE:
                logger.warning(
                    "%s: %s; it is computed on one device from here on", type(module).__name__, STALE_CLOSURE
                )
        return verdict

    def _helpers_on(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what asks helpers, once there are any, for what they make of this call."""
        if (engine := self._engine) is None:
            return None
        return functools.partial(engine.others, module, args, kwargs)

    def _is_for_comparison(self) -> bool:
        if not torch.is_grad_enabled() or not self._fits_one:
            return False
        is_first, self._is_first = self._is_first, False
        return is_first or self._stats.calls.steps in _WHOLE_STEPS

    def _split(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, verdict: SplitCheckResult
    ) -> Any:
        engine = self._started()
        generators = Generators()
        try:
            value = engine.run(module, args, kwargs)
        except WorkerDied:
            raise
        except Exception as error:  # of a part: if the whole fails too, its exception is the script's own
            generators.rewind()
            value = _call_locally(module, args, kwargs)
            self._stats.refuse(f"a part of a batch failed: {type(error).__name__}: {first_line(error)}")
            self._stats.count(batch, split=False)
            return value
        self._stats.count(batch, split=True)
        return _weighted_mean(value, verdict.numbers, scatter_gather.part_sizes(batch, len(self._devices)))


def _call_locally(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's own call, on this device."""
    own: Any = module._call_impl
    return own(*args, **kwargs)


def is_traced(module: nn.Module) -> bool:
    """Whether this call is looked at rather than run, or runs with other tensors in the place of the parameters."""
    return (
        torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
        or any(
            p is not None and not isinstance(p, nn.Parameter) for m in module.modules() for p in m._parameters.values()
        )
    )


def _no_call() -> None:
    return None


def _weighted_mean(value: Any, numbers: Sequence[int], sizes: Sequence[int]) -> Any:
    """Turn the numbers among the outputs, which came one a device, into their mean over the batch."""
    if not numbers or len(sizes) == 1:
        return value
    tensors, skeleton = scatter_gather.take_out(value)
    shares = torch.tensor(sizes) / sum(sizes)
    for index in numbers:
        tensors[index] = (tensors[index] * shares.to(tensors[index])).sum()
    return scatter_gather.fill(skeleton, tensors)


def _reason_now(module: nn.Module, tensors: Sequence[torch.Tensor], verdict: SplitCheckResult) -> str:
    """Why this call must see the whole batch although its kind need not; empty if it need not."""
    for name, part in module.named_modules():
        registries = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        if any(is_users(hook) for registry in registries for hook in registry.values()):
            return f"a hook of the script on {name or 'the model'} must see the whole batch"
    if verdict.numbers and any(_marks_ignored(tensor) for tensor in tensors):
        return "it computes its loss itself, over labels of which some do not count, so parts have unequal weight"
    return ""


def _marks_ignored(tensor: torch.Tensor) -> bool:
    """Whether these look like labels of which some are to be ignored: whole numbers below zero."""
    return (
        not tensor.is_floating_point()
        and not tensor.is_complex()
        and tensor.dtype != torch.bool
        and bool((tensor < 0).any())
    )
