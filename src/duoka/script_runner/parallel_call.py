"""Replacement of a model's call, which splits the batch over all devices.

The first call runs the whole batch on one device, later calls split it over all devices. The first call of each
kind checks whether the model may be split at all. A few later training steps also run on one device, which gives
the same result, to compare the speed.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from duoka.data_parallel.call_planner import CallPlanner
from duoka.data_parallel.controller import Controller, Plan, minimum_samples
from duoka.data_parallel.gather import JoinError
from duoka.data_parallel.model_copy import module_with_script_hook
from duoka.data_parallel.model_diff import parameters_of
from duoka.data_parallel.scatter import Arguments
from duoka.data_parallel.split_check import STALE_CLOSURE, SplitResult, describe_error
from duoka.errors import WorkerDied
from duoka.log import logger
from duoka.script_runner.run_stats import ModelStats
from duoka.utils.rng_state import raw_rng_state, set_raw_rng_state
from duoka.utils.torch_private import call_module, is_transformed, replaced_call, restore_call

_MAX_FAILURES = 3
"""Batches on which a device may fail before the model stays on one."""


class ParallelizedCall:
    """Replacement of one model's call."""

    _thread = threading.local()

    def __init__(
        self, module: nn.Module, devices: Sequence[torch.device], stats: ModelStats, *, fits_one_device: bool = True
    ) -> None:
        """Prepare; ``fits_one_device`` is whether one device has the memory for a whole batch."""
        self._module = weakref.ref(module)
        self._devices = tuple(devices)
        self._stats = stats
        self._fits_one_device = fits_one_device
        self._controller: Controller | None = None
        self._start_lock = threading.Lock()
        self._planner = CallPlanner(len(self._devices))
        self._failures = 0
        self._is_first = True

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a pickle or a copy of the model has its own call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute ``module(*args, **kwargs)``."""
        module = self._module()
        assert module is not None, "its module is being called"
        if self.is_local() or torch.compiler.is_compiling() or is_transformed(module):
            return call_module(module, args, kwargs)
        with self.local_only():
            return self._call(module, args, kwargs)

    @classmethod
    def is_local(cls) -> bool:
        """Return whether models called by this thread compute on one device."""
        return getattr(cls._thread, "is_local", False)

    @classmethod
    @contextlib.contextmanager
    def local_only(cls) -> Iterator[None]:
        """Compute models called inside the ``with`` block on one device; their inputs are split already."""
        before, cls._thread.is_local = cls.is_local(), True
        try:
            yield
        finally:
            cls._thread.is_local = before

    @staticmethod
    def replicate(original: Callable[..., nn.Module], module: nn.Module) -> nn.Module:
        """Restore the call of a replica that the script makes with ``nn.parallel.replicate``."""
        replica = original(module)
        restore_call(replica)
        return replica

    def close(self) -> None:
        """Restore the model's call and release the workers."""
        controller, self._controller = self._controller, None
        if controller is not None:
            controller.close()
        if (module := self._module()) is not None and replaced_call(module) is self:
            restore_call(module)

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = Arguments(args, kwargs)
        minimum = minimum_samples(module, arguments, self._devices)
        can_split = len(arguments.sizes(len(self._devices), minimum=minimum)) > 1
        first = None if self._controller is None else next(parameters_of(module), None)
        has_moved = first is not None and first.device != self._devices[0]  # by the script, since it ran on all devices
        check = None
        if (can_split or arguments.refusal) and not self._stats.refusal and not has_moved:
            check = self._check(module, arguments, minimum)
        if check is not None and (reason := _refusal(module, check)):
            self._stats.refuse(reason)
            check = None
        if not can_split or check is None or self._is_for_comparison():
            self._stats.count(arguments.batch, split=False)
            return call_module(module, args, kwargs)
        plan = Plan(lambda *_: check, functools.partial(self._decide, module, minimum))
        return self._split(module, args, kwargs, arguments, plan)

    def _check(self, module: nn.Module, arguments: Arguments, minimum: int) -> SplitResult | None:
        """Return the check's result for this kind of call."""
        run_on_workers = None
        if self._controller is not None:
            run_on_workers = functools.partial(self._controller.run_on_workers_only, module)
        result = self._planner.plan(module, arguments, run_on_workers, minimum=minimum, around=self._stats.run.startup)
        if result is not None and result.reason == STALE_CLOSURE:
            logger.warning("%s runs on one device from here on: %s", type(module).__name__, STALE_CLOSURE)
        return result

    def _decide(self, module: nn.Module, minimum: int, arguments: Arguments) -> SplitResult | None:
        """Check all samples of a call; what differs from one device is computed by one."""
        result = self._planner.decide(module, arguments, minimum=minimum)
        if result is not None and (reason := _refusal(module, result)):
            return result._replace(reason=reason, is_splittable=False)
        return result

    def _is_for_comparison(self) -> bool:
        if not torch.is_grad_enabled() or not self._fits_one_device:
            return False
        is_first, self._is_first = self._is_first, False
        return is_first or self._stats.run.is_for_comparison()

    def _start(self) -> Controller:
        with self._start_lock:
            if self._controller is None:
                with self._stats.run.startup():
                    self._controller = Controller(self._devices, 0)
                    self._controller.group.start()
            return self._controller

    def _split(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        arguments: Arguments,
        plan: Plan,
    ) -> Any:
        controller = self._start()
        generators = raw_rng_state()
        buffers = [buffer.clone() for buffer in module.buffers()] if module.training else []
        try:
            value = controller.run(module, args, kwargs, plan)
        except WorkerDied:
            raise
        except Exception as error:  # if the whole batch fails too, the script gets that exception
            set_raw_rng_state(generators)
            with torch.no_grad():
                for buffer, before in zip(module.buffers(), buffers, strict=False):
                    buffer.copy_(before)
            value = call_module(module, args, kwargs)
            self._failures += 1
            failed = f"a device failed on its part of a batch: {describe_error(error)}"
            reason = error.reason if isinstance(error, JoinError) else failed
            if self._failures == _MAX_FAILURES:
                self._stats.refuse(reason)
            else:
                logger.warning("%s ran on one device for one batch: %s", type(module).__name__, reason)
            self._stats.count(arguments.batch, split=False)
            return value
        self._stats.count(arguments.batch, split=True)
        return value


def _refusal(module: nn.Module, check: SplitResult) -> str:
    """Return why the model stays on one device; empty if it does not."""
    if check.reason:
        return check.reason
    if check.drawn:
        return f"it draws random numbers that the check cannot repeat ({check.drawn})"
    if check.written:
        return f"its forward writes to its parameter {check.written}"
    if any(p.device.type == "cpu" and p.is_shared() for p in parameters_of(module)):  # type: ignore[no-untyped-call]
        return "its parameters are in memory that the script shares with other processes"
    if (name := module_with_script_hook(module)) is not None:
        return f"a hook of the script on {name or 'the model'} must see the whole batch"
    return ""
