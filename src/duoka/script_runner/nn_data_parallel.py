"""Replacement of ``torch.nn.DataParallel`` while a script runs, and statistics of its wrappers."""

import contextlib
import copyreg
import importlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from duoka.data_parallel import DataParallel
from duoka.data_parallel.module import devices_of, overridden_steps, restore_from_state, state_of
from duoka.data_parallel.scatter import Arguments
from duoka.script_runner.parallel_call import ParallelizedCall
from duoka.script_runner.patching import Patches
from duoka.script_runner.run_stats import ModelStats, RunStats
from duoka.script_runner.source_scan import caller_location

_TORCH_MODULE = "torch.nn.parallel.data_parallel"


class DataParallelHooks:
    """Records the script's wrappers, and gives ``nn.DataParallel`` the devices of this run."""

    def __init__(self, devices: Sequence[torch.device], stats: RunStats, numbers: Sequence[int] = ()) -> None:
        """Prepare; ``numbers`` are those by which the user named the devices, where they are not 0, 1, ..."""
        self._devices = tuple(devices)
        self._stats = stats
        self._numbers = tuple(numbers)
        self.wrappers: weakref.WeakSet[DataParallel] = weakref.WeakSet()
        """Wrappers that release their workers when the script ends."""

    def install(self, patches: Patches) -> None:
        """Record each wrapper of the script; with several devices replace torch's, too, until the patches end."""
        patches.wrap(DataParallel, "__init__", self._on_init)
        patches.wrap(DataParallel, "forward", self._on_forward)
        if len(self._devices) == 1:
            return
        attributes = {"__doc__": ScriptDataParallel.__doc__, "__module__": _TORCH_MODULE, "_duoka_hooks": self}
        wrapper = _TorchNameMeta("DataParallel", (ScriptDataParallel,), attributes)
        implementation = importlib.import_module(_TORCH_MODULE)
        for owner in (nn, nn.parallel, implementation):
            patches.set(owner, "DataParallel", wrapper)
        for owner in (nn.parallel, implementation):
            patches.set(owner, "data_parallel", _data_parallel)
        patches.callback(self._close_wrappers)

    def devices_for(self, wrapper: type, device_ids: Sequence[int | torch.device] | None) -> tuple[torch.device, ...]:
        """Return the devices of this run that a script's ``device_ids`` name; one if the class overrides a step."""
        if device_ids is None:
            return self._devices[:1] if overridden_steps(wrapper) else self._devices
        named = [one if isinstance(one, int) else torch.device(one).index or 0 for one in device_ids]
        is_by_number = set(named) <= set(self._numbers) and max(named, default=0) >= len(self._devices)
        indices = [self._numbers.index(one) for one in named] if is_by_number else named
        devices = tuple(self._devices[index] for index in indices if 0 <= index < len(self._devices))
        if len(devices) < len(indices):
            self._stats.add_note(
                f"The script uses device_ids={named} at {caller_location()}, but this run has {len(self._devices)} "
                "devices: --device sets how many."
            )
        return self._devices[:1] if overridden_steps(wrapper) else devices or self._devices[:1]

    def register(self, wrapper: DataParallel, how: str) -> None:
        """Record a wrapper of the replaced class, and why it uses one device if it does."""
        stats = self._record(wrapper, how)
        if own := overridden_steps(type(wrapper)):
            stats.refuse(
                f"its wrapper {type(wrapper).__name__} overrides {' and '.join(own)}, which duoka does not call"
            )
        elif len(devices_of(wrapper)) == 1:
            stats.refuse("the script wraps it for one device")
        self.wrappers.add(wrapper)

    def _on_init(self, original: Callable[..., None], wrapper: DataParallel, /, *args: Any, **kwargs: Any) -> None:
        original(wrapper, *args, **kwargs)
        if is_parallel_wrapper(wrapper) and not isinstance(wrapper, ScriptDataParallel):
            self._record(wrapper, f"wrapped by the script at {caller_location()}")

    def _on_forward(self, original: Callable[..., Any], wrapper: DataParallel, /, *inputs: Any, **kwargs: Any) -> Any:
        if ParallelizedCall.is_local() or not is_parallel_wrapper(wrapper):
            return original(wrapper, *inputs, **kwargs)
        stats = self._stats.model(wrapper.module)
        if not stats.devices:  # copied or unpickled: no constructor has run
            self._record(wrapper, "wrapped by the script")
        is_whole = self._is_for_comparison(wrapper)
        with ParallelizedCall.local_only(), _on_first_device(wrapper) if is_whole else contextlib.nullcontext():
            value = original(wrapper, *inputs, **kwargs)
        stats.count(Arguments(inputs, kwargs, wrapper.dim).batch, split=len(devices_of(wrapper)) > 1 and not is_whole)
        return value

    def _is_for_comparison(self, wrapper: DataParallel) -> bool:
        """Return whether this call of nn.DataParallel runs on one device, which returns the same, to compare the speed."""
        return (
            self._stats.is_for_comparison()
            and isinstance(wrapper, ScriptDataParallel)
            and wrapper.dim == 0
            and _fits_one_device(devices_of(wrapper))
        )

    def _record(self, wrapper: DataParallel, how: str) -> ModelStats:
        stats = self._stats.model(wrapper.module)
        stats.name, stats.how = type(wrapper.module).__name__, how
        stats.devices, stats.refusal = len(devices_of(wrapper)), ""
        return stats

    def _close_wrappers(self) -> None:
        for wrapper in self.wrappers:
            DataParallel.close(wrapper)  # a subclass in the script may define another close


class _TorchNameMeta(type):
    """Makes ``isinstance(model, nn.DataParallel)`` true for every ``duoka.DataParallel``."""

    def __instancecheck__(cls, value: object) -> bool:
        is_replacement = "_duoka_hooks" in vars(cls)
        return isinstance(value, DataParallel) if is_replacement else type.__instancecheck__(cls, value)


class ScriptDataParallel(DataParallel, metaclass=_TorchNameMeta):
    """Computes each batch on the devices of this run; see ``duoka.DataParallel``."""

    _duoka_hooks: DataParallelHooks

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[int | torch.device] | None = None,
        output_device: int | torch.device | None = None,
        dim: int = 0,
    ) -> None:
        devices = self._duoka_hooks.devices_for(type(self), device_ids)
        super().__init__(module, devices=list(devices), dim=dim)
        if output_device is not None:
            self.output_device = output_device  # type: ignore[assignment]
        self._duoka_hooks.register(self, f"wrapped by the script at {caller_location()}")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state with ``module.`` in its names, as torch does: scripts remove that prefix."""
        return nn.Module.state_dict(self, *args, **kwargs)

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        """Yield the modules with ``module.`` in their names, as torch does."""
        return nn.Module.named_modules(self, memo, prefix, remove_duplicate)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        double = super().__deepcopy__(memo)
        self._duoka_hooks.wrappers.add(double)
        return double

    def __reduce__(self) -> tuple[Any, ...]:
        if "_duoka_hooks" in vars(type(self)):  # pickled by torch's name, so that torch alone can load it
            return type(self), (self.module,)
        return copyreg.__newobj__, (type(self),), state_of(self) | {"device_ids": []}  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        devices = self._duoka_hooks.devices_for(type(self), None)
        nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]
        restore_from_state(self, devices, None, "warn", {"device_ids": list(range(len(devices)))})
        self._duoka_hooks.register(self, f"loaded by the script at {caller_location()}")


@contextlib.contextmanager
def _on_first_device(wrapper: DataParallel) -> Iterator[None]:
    """Let a wrapper compute on its first device alone."""
    devices = devices_of(wrapper)
    wrapper._duoka_devices = devices[:1]
    try:
        yield
    finally:
        wrapper._duoka_devices = devices


def _fits_one_device(devices: Sequence[torch.device]) -> bool:
    """Return whether one device has the memory for the whole batch, which such a script need not expect."""
    first = devices[0]
    if first.type == "cpu":
        return True
    if first.type != "cuda":
        return False
    free = torch.cuda.mem_get_info(first)[0] + torch.cuda.memory_reserved(first)
    return len(devices) * torch.cuda.max_memory_allocated(first) < free


def is_parallel_wrapper(module: nn.Module) -> bool:
    """Return whether the module is a wrapper that chooses devices; a wrapper with one device is not."""
    return isinstance(module, ScriptDataParallel) or (isinstance(module, DataParallel) and len(devices_of(module)) > 1)


def _data_parallel(module: nn.Module, inputs: Any, *_: Any, module_kwargs: Any = None, **__: Any) -> Any:
    """Replace ``torch.nn.parallel.data_parallel`` by a call of the model, which splits the batch."""
    args = inputs if isinstance(inputs, tuple) else () if inputs is None else (inputs,)
    return module(*args, **(module_kwargs or {}))
