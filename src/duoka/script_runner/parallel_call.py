"""Replacement of a model's call, which splits the batch over all devices.

The first call runs the whole batch on one device, later calls split it over all devices. The first call of each
kind checks whether the model may be split at all. A few later training steps also run on one device, which gives
the same result, to compare the speed.
"""

import contextlib
import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from duoka.data_parallel import scatter_gather
from duoka.data_parallel.controller import Controller
from duoka.errors import WorkerDied
from duoka.log import logger
from duoka.script_runner.run_stats import COMPARISON_STEPS, ModelStats
from duoka.script_runner.split_check import (
    STALE_CLOSURE,
    SplitCheckResult,
    call_signature,
    check_splittable,
    describe_error,
    is_script_hook,
    weighted_mean,
)
from duoka.utils.rng_state import raw_rng_state, set_raw_rng_state
from duoka.utils.torch_private import call_module, is_in_functorch, replaced_call, restore_call


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
        self._checks: dict[Any, SplitCheckResult] = {}
        self._calls_of_kind: Counter[Any] = Counter()
        self._is_first = True

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a pickle or a copy of the model has its own call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute ``module(*args, **kwargs)``."""
        module = self._module()
        assert module is not None, "its module is being called"
        if self.is_local() or _is_traced(module):
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
        tensors, skeleton = scatter_gather.extract_tensors((args, kwargs))
        batch = scatter_gather.batch_size(tensors, 0)
        first = None if self._controller is None else next(module.parameters(), None)
        has_moved = first is not None and first.device != self._devices[0]  # by the script, since it ran on all devices
        check = None
        if batch is not None and batch >= 2 and not self._stats.refusal and not has_moved:
            check = self._check(module, tensors, skeleton, batch)
        if check is not None and (reason := check.reason or _reason_for_inputs(module, tensors, check)):
            self._stats.refuse(reason)
            check = None
        if batch is None or check is None or self._is_for_comparison():
            self._stats.count(batch, split=False)
            return call_module(module, args, kwargs)
        return self._split(module, args, kwargs, batch, check)

    def _check(
        self, module: nn.Module, tensors: Sequence[torch.Tensor], skeleton: Any, batch: int
    ) -> SplitCheckResult | None:
        """Return the check's result for this kind of call; the check runs at calls 1, 2, 4, 8, ..."""
        kind = call_signature(module, tensors, skeleton)
        self._calls_of_kind[kind] += 1
        count = self._calls_of_kind[kind]
        if kind in self._checks and count & (count - 1):
            return self._checks[kind]
        with self._stats.run.startup():
            num_devices = len(self._devices)
            if not self._fits_one_device and batch >= 2 * num_devices:  # check one device's chunk of the batch
                sizes = scatter_gather.scatter_sizes(batch, num_devices)
                tensors = [scatter_gather.scatter(tensor, sizes, 0)[0] for tensor in tensors]
            args, kwargs = scatter_gather.insert_tensors(skeleton, tensors)
            run_on_workers = None
            if self._controller is not None:
                run_on_workers = functools.partial(self._controller.run_on_workers_only, module, args, kwargs)
            result = check_splittable(module, args, kwargs, num_devices, run_on_workers)
        if result is not None:
            self._checks[kind] = result
            if result.reason == STALE_CLOSURE:
                logger.warning("%s runs on one device from here on: %s", type(module).__name__, STALE_CLOSURE)
        return result

    def _is_for_comparison(self) -> bool:
        if not torch.is_grad_enabled() or not self._fits_one_device:
            return False
        is_first, self._is_first = self._is_first, False
        return is_first or self._stats.run.num_steps in COMPARISON_STEPS

    def _start(self) -> Controller:
        with self._start_lock:
            if self._controller is None:
                with self._stats.run.startup():
                    self._controller = Controller(self._devices, 0)
                    self._controller.group.start()
            return self._controller

    def _split(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, check: SplitCheckResult
    ) -> Any:
        controller = self._start()
        generators = raw_rng_state()
        try:
            value = controller.run(module, args, kwargs)
        except WorkerDied:
            raise
        except Exception as error:  # if the whole batch fails too, the script gets that exception
            set_raw_rng_state(generators)
            value = call_module(module, args, kwargs)
            self._stats.refuse(f"a device failed on its part of a batch: {describe_error(error)}")
            self._stats.count(batch, split=False)
            return value
        self._stats.count(batch, split=True)
        sizes = scatter_gather.scatter_sizes(batch, len(self._devices))
        if not check.scalar_outputs or len(sizes) == 1:
            return value
        tensors, skeleton = scatter_gather.extract_tensors(value)
        for index in check.scalar_outputs:  # gathered as one number per device
            tensors[index] = weighted_mean(tensors[index], sizes)
        return scatter_gather.insert_tensors(skeleton, tensors)


def _is_traced(module: nn.Module) -> bool:
    """Return whether the call is traced or compiled, or uses other tensors as parameters."""
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch.compiler.is_compiling()
        or is_in_functorch()
        or any(
            parameter is not None and not isinstance(parameter, nn.Parameter)
            for part in module.modules()
            for parameter in part._parameters.values()
        )
    )


def _reason_for_inputs(module: nn.Module, tensors: Sequence[torch.Tensor], check: SplitCheckResult) -> str:
    """Return why this call, unlike others of its kind, needs the whole batch; empty if it does not."""
    for name, part in module.named_modules():
        registries = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        if any(is_script_hook(hook) for registry in registries for hook in registry.values()):
            return f"a hook of the script on {name or 'the model'} must see the whole batch"
    integers = [t for t in tensors if not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)]
    if check.scalar_outputs and any(bool((labels < 0).any()) for labels in integers):
        return "its forward computes the loss and ignores negative labels, so the parts have unequal weight"
    return ""
