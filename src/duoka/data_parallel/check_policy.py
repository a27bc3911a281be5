"""Reports of a check: warnings or errors, as ``DataParallel(check=...)`` asks."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from duoka.data_parallel.call_planner import CallPlanner
from duoka.data_parallel.controller import Plan, minimum_samples
from duoka.data_parallel.model_copy import module_with_script_hook
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

        def check(arguments: Arguments, run_on_workers: RunOnWorkers | None) -> SplitResult | None:
            minimum = minimum_samples(module, arguments, self._devices)
            result = self._planner.plan(
                module, arguments, run_on_workers, minimum=minimum, around=partial(self._reporting_hooks, module)
            )
            if self.mode == "raise" and result is not None and not result.is_failure:
                self._report(type(module).__name__, result)
            return result

        def decide(arguments: Arguments) -> SplitResult | None:
            minimum = minimum_samples(module, arguments, self._devices)
            return self._planner.decide(module, arguments, minimum=minimum)

        return Plan(check, decide, partial(self._report, type(module).__name__), partial(self._planner.refuse, module))

    def _report(self, name: str, result: SplitResult) -> None:
        number = len(self._devices)
        if result.reason and not result.is_splittable:
            self._say(f"{name} runs on one device and not on {number}: {result.reason}.")
        elif result.drawn and not result.reason:
            self._say(
                f"{name} draws random numbers that a check cannot repeat ({result.drawn}), so duoka cannot compare what "
                f"{number} devices compute with what one computes. Draw them with torch, make layers in __init__, "
                "or accept that with check='off'."
            )
        elif result.reason and result.rules is None:
            self._say(
                f"duoka cannot check whether {name} computes on {number} devices what it computes on one: {result.reason}. "
                "check='off' accepts that."
            )
        elif result.reason:
            self._say(
                f"{name} computes something else on {number} devices than on one: {result.reason}. Move that out of its "
                "forward, or accept the difference with check='off'."
            )

    @contextlib.contextmanager
    def _reporting_hooks(self, module: nn.Module) -> Iterator[None]:
        if (name := module_with_script_hook(module)) is not None:
            self._say(
                f"a hook on {f'the module {name!r}' if name else 'the model'} runs in every process on a part of the "
                "batch, and this process sees the first part only. Let the forward return what the hook collects, "
                "call model.module, or accept the difference with check='off'."
            )
        yield

    def _say(self, text: str) -> None:
        if text in self._said:
            return
        self._said.add(text)
        if self.mode == "raise":
            raise UnsupportedError(text)
        warnings.warn(text, stacklevel=user_stack_level())
