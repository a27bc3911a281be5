"""What ``DataParallel(check=...)`` does with the result of a check: warn, raise, or nothing."""

import warnings
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from duoka.data_parallel.call_planner import CallPlanner
from duoka.data_parallel.controller import Plan, minimum_samples
from duoka.data_parallel.model_copy import is_script_hook
from duoka.data_parallel.scatter import Arguments
from duoka.data_parallel.split_check import RunOnWorkers, SplitResult
from duoka.errors import UnsupportedError
from duoka.utils.call_stack import user_stack_level

Check: TypeAlias = Literal["warn", "raise", "off"]
CHECKS: tuple[Check, ...] = get_args(Check)


class CheckPolicy:
    """Checks the calls of one wrapped model."""

    def __init__(self, mode: Check, devices: Sequence[torch.device]) -> None:
        self.mode = mode
        self._devices = devices
        self._planner = CallPlanner(len(devices))
        self._said: set[str] = set()

    def plan_for(self, module: nn.Module) -> Plan | None:
        """Return the function that plans a call of ``module``; ``None`` if nothing is checked."""
        if self.mode == "off":
            return None

        def plan(arguments: Arguments, run_on_workers: RunOnWorkers | None) -> SplitResult | None:
            minimum = minimum_samples(module, arguments, self._devices)
            is_due = self._planner.is_due(module, arguments)
            result = self._planner.plan(module, arguments, run_on_workers, minimum=minimum)
            if is_due and (reason := _hooks(module)):
                self._say(module, reason)
            if result is not None and result.reason:
                self._say(module, result.reason, runs_on_one=not result.is_splittable)
            return result

        return plan

    def _say(self, module: nn.Module, reason: str, *, runs_on_one: bool = False) -> None:
        if reason in self._said:
            return
        self._said.add(reason)
        name, number = type(module).__name__, len(self._devices)
        if runs_on_one:
            text = f"{name} runs on one device and not on {number}: {reason}."
        else:
            text = (
                f"{name} computes something else on {number} devices than on one: {reason}. "
                "Move that computation out of its forward, or accept the difference with check='off'."
            )
        if self.mode == "raise":
            raise UnsupportedError(text)
        warnings.warn(text, stacklevel=user_stack_level())


def _hooks(module: nn.Module) -> str:
    """Return a sentence about hooks that see one part of the batch; empty if there are none."""
    for name, part in module.named_modules():
        for registry in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            if any(is_script_hook(hook) for hook in registry.values()):
                owner = f"the module {name!r}" if name else "the model"
                return f"a hook on {owner} sees the first device's part of the batch only, in this process"
    return ""
