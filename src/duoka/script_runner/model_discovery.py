"""Discovery of the models that a script trains.

A script moves a model to a device, or passes its parameters to an optimizer; there duoka finds it.
"""

import gc
import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from duoka.data_parallel import DataParallel
from duoka.data_parallel.model_diff import parameters_of
from duoka.script_runner.nn_data_parallel import is_parallel_wrapper
from duoka.script_runner.parallel_call import ParallelizedCall
from duoka.script_runner.patching import Patches
from duoka.script_runner.run_stats import RunStats
from duoka.script_runner.source_scan import (
    caller_location,
    differentiates_gradients,
    is_called_by_script,
    new_sources,
)
from duoka.utils.torch_private import REPLICATE_METHOD, replace_call, replaced_call

DOUBLE_BACKWARD = (
    "the script differentiates gradients (create_graph=True), and workers return gradients without their graph; "
    "if the run never reaches that line, remove it"
)


def refuse_double_backward(source: bytes, stats: RunStats) -> None:
    """Keep models on one device if a source differentiates gradients; the first step shows whether a variable does."""
    answer = differentiates_gradients(source)
    if answer is not False:
        stats.refuse_all(DOUBLE_BACKWARD, until_step=answer is None)


class ModelFinder:
    """Replaces the call of each model that the script trains by a ``ParallelizedCall``."""

    def __init__(self, devices: Sequence[torch.device], stats: RunStats, *, fits_one_device: bool = True) -> None:
        """Prepare; ``fits_one_device`` is whether one device has the memory for a whole batch."""
        self._fits_one_device = fits_one_device
        self._devices = tuple(devices)
        self._stats = stats
        self._calls: weakref.WeakSet[ParallelizedCall] = weakref.WeakSet()
        self._seen_files: set[str] = set()

    def install(self, patches: Patches) -> None:
        """Find models from now on, until the patches end."""
        patches.wrap(nn.Module, "to", self._on_move)
        patches.wrap(nn.Module, "cuda", self._on_move)
        patches.wrap(nn.Module, REPLICATE_METHOD, ParallelizedCall.replicate)
        patches.wrap(torch.optim.Optimizer, "__init__", self._on_optimizer)
        patches.wrap(torch, "compile", self._on_compile)
        patches.wrap(nn.parallel.DistributedDataParallel, "__init__", self._on_ddp)
        patches.wrap(torch.autograd, "grad", self._on_autograd)
        patches.wrap(torch.autograd, "backward", self._on_autograd)
        patches.callback(self._close)

    def _close(self) -> None:
        for call in self._calls:
            call.close()

    def _on_move(self, original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(module, *args, **kwargs)
        if is_called_by_script():
            self._register(module, f"moved to a device at {caller_location()}")
        return result

    def _on_optimizer(
        self, original: Callable[..., Any], optimizer: Any, params: Any, *args: Any, **kwargs: Any
    ) -> None:
        original(optimizer, params, *args, **kwargs)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for module in modules_owning(parameters):
            self._register(module, f"trained by {type(optimizer).__name__} at {caller_location()}")

    def _on_compile(self, original: Callable[..., Any], model: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, nn.Module) and not isinstance(model, DataParallel):
            stats = self._stats.model(model)
            stats.found(type(model).__name__, f"compiled at {caller_location()}")
            stats.refuse(
                "torch.compile compiles it for one device; use duoka.DataParallel(model, compile=True) instead"
            )
        return original(model, *args, **kwargs)

    def _on_autograd(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if inspect.signature(original).bind(*args, **kwargs).arguments.get("create_graph"):
            self._stats.refuse_all(DOUBLE_BACKWARD)
        return original(*args, **kwargs)

    def _on_ddp(self, original: Callable[..., Any], wrapper: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._stats.add_note(
            f"The script uses DistributedDataParallel at {caller_location()}, which needs one process per device: "
            "start it with torchrun or duoka.launch."
        )
        self._stats.model(module).refuse("DistributedDataParallel wraps it")
        original(wrapper, module, *args, **kwargs)

    def _register(self, module: nn.Module, how: str) -> None:
        """Parallelize the calls of ``module``, or of its children if it has no forward."""
        if isinstance(module, nn.parallel.DistributedDataParallel | torch.jit.ScriptModule):
            return
        if any(map(is_parallel_wrapper, module.modules())):
            return
        if isinstance(module, DataParallel):  # for one device
            module = module.module
        if replaced_call(module) is not None or next(parameters_of(module), None) is None:
            return
        if getattr(type(module).forward, "__name__", "") == "_forward_unimplemented":  # such as nn.ModuleDict
            for child in module.children():
                self._register(child, how)
            return
        for source in new_sources(self._seen_files):
            refuse_double_backward(source, self._stats)
        stats = self._stats.model(module)
        stats.found(type(module).__name__, how)
        call = ParallelizedCall(module, self._devices, stats, fits_one_device=self._fits_one_device)
        replace_call(module, call)
        self._calls.add(call)


def modules_owning(parameters: Iterable[torch.Tensor]) -> list[nn.Module]:
    """Return the outermost living modules that have any of these parameters."""
    wanted = {id(parameter) for parameter in parameters}

    def owns(module: nn.Module) -> bool:  # not by module.parameters(), which a class of the script may override
        return any(id(parameter) in wanted for part in module.modules() for parameter in part._parameters.values())

    living = [one for one in gc.get_objects() if issubclass(type(one), nn.Module) and "_parameters" in one.__dict__]
    owning = {id(module): module for module in living if owns(module)}
    inner = {id(part) for module in owning.values() for part in module.modules() if part is not module}
    return [module for key, module in owning.items() if key not in inner]
