"""Notices when an optimiser of some parameters has stepped, until it is told to stop; nothing of it stays then."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["OptimizerStepHook"]


class OptimizerStepHook:
    """Calls a method after each step of an optimiser that owns one of the parameters, for as long as its object exists.

    Which optimisers there will be nobody knows beforehand, so torch's hook for all of them is used. Any other optimiser costs a
    look at its list of parameters.
    """

    def __init__(self, method: Callable[[], None]) -> None:
        self._method = weakref.WeakMethod(method)
        self._parameters: frozenset[int] = frozenset()

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Look out for these from now on; whoever calls keeps them."""
        self._parameters = frozenset(map(id, parameters))
        _hooks.add(self)

    def remove(self) -> None:
        """Look no longer."""
        _hooks.discard(self)

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimiser has stepped."""
        if any(id(parameter) in self._parameters for group in optimizer.param_groups for parameter in group["params"]):
            method = self._method()
            if method is not None:
                method()


class _Hooks:
    """All that are there, behind one hook of torch's.

    Torch iterates over its hooks while it calls them, and an object may be collected at any time, then too: so hooks that
    are only forgotten leave torch's list alone, and the one is taken from it when the last is removed.
    """

    def __init__(self) -> None:
        self._all: weakref.WeakSet[OptimizerStepHook] = weakref.WeakSet()
        self._handle: Any = None

    def add(self, hook: OptimizerStepHook) -> None:
        self._all.add(hook)
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(self._after)

    def discard(self, hook: OptimizerStepHook) -> None:
        self._all.discard(hook)
        if self._handle is not None and not self._all:
            self._handle.remove()
            self._handle = None

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            for hook in list(self._all):
                hook.after(optimizer)


_hooks = _Hooks()
