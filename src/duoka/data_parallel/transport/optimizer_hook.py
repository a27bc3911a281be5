"""Hook that runs after each step of an optimizer that owns given parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class OptimizerStepHook:
    """Calls a method, while its object lives, after each step of an optimizer of given parameters.

    Optimizers may be created later, so the hook uses torch's global one. Any other optimizer costs
    a look at its list of parameters.
    """

    def __init__(self, method: Callable[[], None]) -> None:
        self._method = weakref.WeakMethod(method)
        self._parameters: frozenset[int] = frozenset()

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Watch these parameters from now on; the caller keeps them alive."""
        self._parameters = frozenset(map(id, parameters))
        _hooks.add(self)

    def remove(self) -> None:
        """Stop watching."""
        _hooks.discard(self)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Call the method if the optimizer owns a watched parameter."""
        if any(id(parameter) in self._parameters for group in optimizer.param_groups for parameter in group["params"]):
            method = self._method()
            if method is not None:
                method()


class _Hooks:
    """All hooks, behind one global hook of torch.

    torch iterates over its hooks while it calls them, and garbage collection may run then. So a
    collected hook leaves torch's list alone; ``discard`` removes the global hook with the last one.
    """

    def __init__(self) -> None:
        self._all: weakref.WeakSet[OptimizerStepHook] = weakref.WeakSet()
        self._handle: Any = None

    def add(self, hook: OptimizerStepHook) -> None:
        self._all.add(hook)
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(self._after_step)

    def discard(self, hook: OptimizerStepHook) -> None:
        self._all.discard(hook)
        if self._handle is not None and not self._all:
            self._handle.remove()
            self._handle = None

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            for hook in list(self._all):
                hook.after_step(optimizer)


_hooks = _Hooks()
