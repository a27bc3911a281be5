"""Finds the models that a script trains, where it moves them to a device or hands their parameters to an optimiser."""

from __future__ import annotations

import copyreg
import gc
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from duoka.data_parallel import DataParallel
from duoka.data_parallel.module import own_steps, rebuilt
from duoka.script_runner.parallel_call import ParallelizedCall
from duoka.script_runner.patching import Patches
from duoka.script_runner.run_stats import ModelStats, RunStats
from duoka.script_runner.source_scan import Sources, differentiates_gradients

__all__ = ["DOUBLE_BACKWARD", "ModelFinder"]

DOUBLE_BACKWARD = (
    "the script differentiates gradients (create_graph=True), and helpers return gradients without their graph; where a run "
    "does not come to that line, take it out"
)

_INSIDERS = ("torch", "duoka", "contextlib", "functools", "importlib")


class ModelFinder:
    """Gives each model of a script a call that is shared out, and ``nn.DataParallel`` the devices of this run."""

    def __init__(self, devices: Sequence[torch.device], stats: RunStats, *, fits_one: bool = True) -> None:
        self._fits_one = fits_one
        self._devices = tuple(devices)
        self._stats = stats
        self._calls: list[weakref.ref[ParallelizedCall]] = []
        self._wrapped: list[weakref.ref[DataParallel]] = []
        self._sources = Sources()

    def track_wrappers(self, patches: Patches) -> None:
        """Account for what the script shares out itself, until the patches end."""
        patches.wrap(DataParallel, "__init__", self._on_wrapper)
        patches.wrap(DataParallel, "forward", self._on_wrapper_call)

    def enter(self, patches: Patches) -> None:
        """Look from now on, until the patches end."""
        patches.wrap(nn.Module, "to", self._on_move)
        patches.wrap(nn.Module, "cuda", self._on_move)
        patches.wrap(torch.optim.Optimizer, "__init__", self._on_optimizer)
        patches.wrap(torch, "compile", self._on_compile)
        patches.wrap(nn.Module, "_replicate_for_data_parallel", _plain_replica)
        wrapper = self._data_parallel()
        for owner in (nn, nn.parallel, nn.parallel.data_parallel):
            if hasattr(owner, "DataParallel"):
                patches.set(owner, "DataParallel", wrapper)
        patches.set(sys.modules["torch.nn.parallel.data_parallel"], "DataParallel", wrapper)
        for owner in (nn.parallel, sys.modules["torch.nn.parallel.data_parallel"]):
            patches.set(owner, "data_parallel", _data_parallel_function)
        patches.wrap(nn.parallel.DistributedDataParallel, "__init__", self._on_ddp)
        patches.wrap(torch.autograd, "grad", self._on_autograd)
        patches.wrap(torch.autograd, "backward", self._on_autograd)
        patches.callback(self.close)

    def close(self) -> None:
        """Give every model its own call back, and the helpers up."""
        for call in self._calls:
            if (shared := call()) is not None:
                shared.close()
        for reference in self._wrapped:
            if (model := reference()) is not None:
                DataParallel.close(model)  # a subclass of the script's may have a close of its own

    def _on_move(self, original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(module, *args, **kwargs)
        if _is_called_by_script():
            self._register(module, f"moved to a device at {caller_location()}")
        return result

    def _on_optimizer(
        self, original: Callable[..., Any], optimizer: Any, params: Any, *args: Any, **kwargs: Any
    ) -> None:
        original(optimizer, params, *args, **kwargs)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for module in modules_owning(parameters):
            self._register(module, f"trained by {type(optimizer).__name__} at {caller_location()}")

    def _on_wrapper(self, original: Callable[..., None], wrapper: DataParallel, /, *args: Any, **kwargs: Any) -> None:
        original(wrapper, *args, **kwargs)
        if _is_parallel_wrapper(wrapper) and not isinstance(wrapper, _Wrapper):
            self._record_wrapper(wrapper, f"wrapped by the script at {caller_location()}")

    def _on_wrapper_call(
        self, original: Callable[..., Any], wrapper: DataParallel, /, *inputs: Any, **kwargs: Any
    ) -> Any:
        if ParallelizedCall.is_local() or not _is_parallel_wrapper(wrapper):
            return original(wrapper, *inputs, **kwargs)
        stats = self._stats.model(wrapper.module)
        if not stats.devices:  # a copy, or one that was loaded
            self._record_wrapper(wrapper, "wrapped by the script")
        with ParallelizedCall.local_only():
            value = original(wrapper, *inputs, **kwargs)
        stats.count(_batch_size(inputs, kwargs, wrapper.dim), split=len(wrapper._duoka_devices) > 1)
        return value

    def _record_wrapper(self, wrapper: DataParallel, how: str) -> ModelStats:
        stats = self._stats.model(wrapper.module)
        stats.wrapped(type(wrapper.module).__name__, how, len(wrapper._duoka_devices))
        return stats

    def _on_compile(self, original: Callable[..., Any], model: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, nn.Module) and not isinstance(model, DataParallel):
            stats = self._stats.model(model)
            stats.found(type(model).__name__, f"compiled at {caller_location()}")
            stats.refuse(
                "torch.compile has compiled it for one device; duoka.DataParallel(model) before compiling shares it"
            )
        return original(model, *args, **kwargs)

    def _on_autograd(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if inspect.signature(original).bind(*args, **kwargs).arguments.get("create_graph"):
            self._stats.refuse_all(DOUBLE_BACKWARD)
        return original(*args, **kwargs)

    def _on_ddp(self, original: Callable[..., Any], wrapper: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._stats.add_note(
            "The script uses DistributedDataParallel: it shares work between processes that torchrun or duoka.launch start."
        )
        self._stats.model(module).refuse("DistributedDataParallel already shares it between processes")
        original(wrapper, module, *args, **kwargs)

    def _register(self, module: nn.Module, how: str) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel | torch.jit.ScriptModule):
            return
        if any(map(_is_parallel_wrapper, module.modules())):
            return
        if isinstance(module, DataParallel):  # for one device
            module = module.module
        if module._compiled_call_impl is not None or not any(True for _ in module.parameters()):
            return
        if not has_forward(module):
            for child in module.children():
                self._register(child, how)
            return
        if any(differentiates_gradients(source) for source in self._sources.new()):
            self._stats.refuse_all(DOUBLE_BACKWARD)
        stats = self._stats.model(module)
        stats.found(type(module).__name__, how)
        call = ParallelizedCall(module, self._devices, stats, fits_one=self._fits_one)
        module._compiled_call_impl = call
        self._calls.append(weakref.ref(call))

    def _data_parallel(self) -> type:
        finder = self

        class DataParallel(_Wrapper, metaclass=_DataParallelMeta):
            __doc__ = _Wrapper.__doc__

            def __init__(
                self,
                module: nn.Module,
                device_ids: Sequence[int | torch.device] | None = None,
                output_device: int | torch.device | None = None,
                dim: int = 0,
            ) -> None:
                own, devices = own_steps(type(self)), finder._map_device_ids(device_ids)
                super().__init__(module, devices=list(devices[:1] if own else devices), dim=dim)
                if output_device is not None:
                    self.output_device = output_device  # type: ignore[assignment]
                finder._register_wrapper(self, f"wrapped by the script at {caller_location()}", own)

            def __deepcopy__(self, memo: dict[int, Any]) -> Any:
                double = super().__deepcopy__(memo)
                finder._wrapped.append(weakref.ref(double))
                return double

            def __reduce__(self) -> tuple[Any, ...]:
                if type(self) is DataParallel:  # by torch's name for it: what is saved is read by torch alone
                    return DataParallel, (self.module,)
                return copyreg.__newobj__, (type(self),), self._duoka_state() | {"device_ids": []}  # type: ignore[attr-defined]

            def __setstate__(self, state: dict[str, Any]) -> None:
                own = own_steps(type(self))
                devices = finder._devices[: 1 if own else None]
                nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]
                rebuilt(self, tuple(devices), None, {"device_ids": list(range(len(devices)))})
                finder._register_wrapper(self, f"loaded by the script at {caller_location()}", own)

        DataParallel.__module__, DataParallel.__qualname__ = "torch.nn.parallel.data_parallel", "DataParallel"
        return DataParallel

    def _register_wrapper(self, wrapper: Any, how: str, own: list[str]) -> None:
        """Account for a wrapper of the script's; ``own`` are the steps that its class has and duoka does not call."""
        stats = self._record_wrapper(wrapper, how)
        if own:
            stats.refuse(
                f"its wrapper {type(wrapper).__name__} has a {' and a '.join(own)} of its own, which duoka does not call"
            )
        elif len(wrapper._duoka_devices) == 1:
            stats.refuse("the script wraps it for one device")
        self._wrapped.append(weakref.ref(wrapper))

    def _map_device_ids(self, device_ids: Sequence[int | torch.device] | None) -> Sequence[torch.device]:
        """The devices of this run that a script's ``device_ids`` name."""
        if device_ids is None:
            return self._devices
        numbers = [one if isinstance(one, int) else torch.device(one).index or 0 for one in device_ids]
        there = [self._devices[number] for number in numbers if 0 <= number < len(self._devices)]
        if len(there) < len(numbers):
            self._stats.add_note(
                f"The script names devices {numbers}, of which this run has {len(there)}: --device decides how many there are."
            )
        return there or self._devices[:1]


def _plain_replica(original: Callable[..., nn.Module], module: nn.Module) -> nn.Module:
    """Let a replica that the script makes by hand compute what it is given, and not have its model asked."""
    replica = original(module)
    replica.__dict__.pop("_compiled_call_impl", None)
    return replica


class _DataParallelMeta(type):
    """Lets ``isinstance(model, nn.DataParallel)`` hold for a ``duoka.DataParallel`` of the script's own too."""

    def __instancecheck__(cls, value: object) -> bool:
        is_the_stand_in = cls.__module__ == "torch.nn.parallel.data_parallel"
        return isinstance(value, DataParallel) if is_the_stand_in else type.__instancecheck__(cls, value)


class _Wrapper(DataParallel):
    """What ``nn.DataParallel`` is while a script runs: see ``duoka.DataParallel``."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state with ``module.`` in its names, as the script knows it from torch and may cut it off."""
        return nn.Module.state_dict(self, *args, **kwargs)


def _is_parallel_wrapper(module: nn.Module) -> bool:
    """Whether it is a wrapper that decides where its model is computed; one of duoka's own for one device does not."""
    return isinstance(module, _Wrapper) or (isinstance(module, DataParallel) and len(module._duoka_devices) > 1)


def _batch_size(inputs: Any, kwargs: Any, dim: int) -> int | None:
    from duoka.data_parallel import scatter_gather

    return scatter_gather.batch_size(scatter_gather.take_out((inputs, kwargs))[0], dim)


def modules_owning(parameters: Iterable[torch.Tensor]) -> list[nn.Module]:
    """Return the largest living modules that hold any of these parameters."""
    wanted = {id(parameter) for parameter in parameters}
    living = [one for one in gc.get_objects() if issubclass(type(one), nn.Module) and "_parameters" in one.__dict__]
    holding = {id(m): m for m in living if any(id(p) in wanted for p in _parameters_of(m))}
    inner = {id(child) for module in holding.values() for child in _descendants(module)}
    return [module for key, module in holding.items() if key not in inner]


def _parameters_of(module: nn.Module) -> Iterable[Any]:
    return (p for part in module.modules() for p in part._parameters.values() if p is not None)


def _descendants(module: nn.Module) -> Iterable[nn.Module]:
    return (part for part in module.modules() if part is not module)


def has_forward(module: nn.Module) -> bool:
    """Whether it can be called: containers such as ``nn.ModuleDict`` cannot."""
    return getattr(type(module).forward, "__name__", "") != "_forward_unimplemented"


def _is_called_by_script() -> bool:
    """Whether the patched function was called by other code than torch's own."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("duoka.script_runner.patching"):
        frame = frame.f_back
    return frame is None or str(frame.f_globals.get("__name__", "")).partition(".")[0] not in _INSIDERS


def caller_location() -> str:
    """Return file and line of the script's code that is running, the innermost that is not a library's."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in _INSIDERS and "site-packages" not in file:
            cell = file.startswith("<") or "ipykernel_" in file
            return f"line {frame.f_lineno}" + (" of a cell" if cell else f" of {Path(file).name}")
        frame = frame.f_back
    return "a place that is not known"


def _data_parallel_function(module: nn.Module, inputs: Any, *_: Any, module_kwargs: Any = None, **__: Any) -> Any:
    """What ``torch.nn.parallel.data_parallel`` is in a script: the model's call, which is shared out where it is found."""
    args = inputs if isinstance(inputs, tuple) else () if inputs is None else (inputs,)
    return module(*args, **(module_kwargs or {}))
