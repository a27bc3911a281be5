"""``DataParallel``, the ``nn.Module`` that users see: it runs a model on several devices at once."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from duoka.data_parallel.check_policy import CHECKS, Check, CheckPolicy
from duoka.data_parallel.controller import Controller
from duoka.data_parallel.placeholders import extract_tensors, insert_on_device
from duoka.data_parallel.replica import MaybeCompiled
from duoka.devices import resolve
from duoka.devices.spec import DeviceSpec, reconcile
from duoka.errors import ConfigError, UnsupportedError
from duoka.utils.text import did_you_mean, join_names
from duoka.utils.torch_private import is_transformed
from duoka.utils.validation import invalid_option

_OPTIONS = ("module", "device_ids", "output_device", "dim", "devices", "device", "compile", "check")
_PRIVATE = "_duoka_"
_start_lock = threading.Lock()


class DataParallel(nn.DataParallel[nn.Module]):
    """Runs a model on several devices, from this process; everything else stays as with one device.

    ``forward`` splits the batch. Each device computes its part on a replica of the model, and the
    outputs are joined; ``backward`` sums the gradients of all chunks in the wrapped model's
    parameters. Optimizers, clipping, accumulation, hooks, ``state_dict`` and the wrapped model's
    attributes work as without the wrapper. This process drives the first device; each further
    device has a worker process, which the first call starts and all wrapped models share.

    Tensors, arrays and lists with one item a sample are split; every device gets all others whole.
    A small batch uses fewer devices. A check of a few samples, whole and in parts, finds how outputs
    are joined: along a dimension, as the mean over all samples (a loss), or as a sum (a count). It
    also compares gradients, buffers and attributes, at the first, second, fourth, eighth call. What
    differs on several devices gives a warning. What cannot be joined is computed on the first device,
    with a warning. Buffers are those of the first part.

    Args:
        module: the model. Its parameters stay the same objects; for CPU workers their values move
            into memory that the processes share.
        device_ids: devices as for ``torch.nn.DataParallel``, or in duoka's device grammar.
        output_device: accepted for existing scripts; outputs are on the first device.
        dim: the batch dimension.
        devices: devices in the device grammar: ``"auto"`` (the default), ``"all"``, ``"0,1"``,
            ``"cpu:2"``, ``torch.device`` or a list of these.
        device: another name of ``devices``.
        compile: whether every device compiles the model with ``torch.compile``: ``True``, or that
            function's keyword arguments, such as ``{"mode": "max-autotune"}``. The wrapped model
            and its ``state_dict`` stay as they are.
        check: ``"warn"`` warns once of each difference from one device, ``"raise"`` raises an error
            instead, and ``"off"`` skips the check: outputs are then concatenated along ``dim``, and
            scalars become a vector with one item per device, as with ``torch.nn.DataParallel``.

    Raises:
        WorkerDied: a worker process has died.
        UnsupportedError: with ``check="raise"``, several devices give something else than one device.
        UnsupportedError: a backward with ``create_graph=True``, or a subclass that overrides
            ``scatter``, ``replicate``, ``parallel_apply`` or ``gather``.
        DeviceError: a device does not exist.

    What the model raises on any device is raised here as its own type; a remote traceback is its
    cause.

    Example:
        >>> import torch, duoka
        >>> model = duoka.DataParallel(torch.nn.Linear(4, 2), devices="cpu:2")
        >>> model(torch.ones(6, 4)).sum().backward()
        >>> model.weight.grad.shape
        torch.Size([2, 4])
        >>> model.close()

    """

    module: nn.Module

    def __init__(
        self,
        module: nn.Module,
        device_ids: DeviceSpec = None,
        output_device: int | torch.device | None = None,
        dim: int = 0,
        *,
        devices: DeviceSpec = None,
        device: DeviceSpec = None,
        compile: bool | Mapping[str, Any] = False,  # noqa: A002 - torch's own name
        check: Check = "warn",
        **others: Any,
    ) -> None:
        nn.Module.__init__(self)
        for name, value in others.items():
            hint = did_you_mean(name, _OPTIONS) or f"it takes {join_names(_OPTIONS)}"
            raise ConfigError(f"{name}={value!r} is not an option of DataParallel; {hint}")
        _check_module(module)
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise invalid_option("dim", dim, "the batch dimension, an integer")
        if not isinstance(compile, bool | Mapping):
            raise invalid_option("compile", compile, "True, False, or a dict of torch.compile's keyword arguments")
        if check not in CHECKS:
            raise invalid_option("check", check, f"one of {join_names(CHECKS)}")
        resolved = _resolve_devices(device_ids, reconcile(device, devices, None))
        if len(resolved) > 1 and (names := overridden_steps(type(self))):
            raise UnsupportedError(
                f"{type(self).__name__} overrides {join_names(names)}, which nn.DataParallel's forward calls and duoka's "
                "does not: it splits the batch nearly equally, and concatenates outputs. Remove the override (to change "
                "inputs or outputs, override forward and call super().forward), or keep torch.nn.DataParallel"
            )
        self.module = module
        self.dim = dim
        self.device_ids = [index if one.type == "cpu" else one.index for index, one in enumerate(resolved)]
        self.output_device = self.device_ids[0] if output_device is None else output_device  # type: ignore[assignment]
        self.src_device_obj = resolved[0]
        self._duoka_devices = resolved
        self._duoka_compiler = MaybeCompiled(compile)
        self._duoka_check = CheckPolicy(check, resolved)
        self._duoka_controller: Controller | None = None
        self._duoka_finalizer: Any = None
        self.training = module.training
        if resolved[0].type != "cpu":
            module.to(resolved[0])

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the wrapped model's forward, each device on its chunk of the batch."""
        if len(self._duoka_devices) == 1:
            if self._duoka_devices[0].type != "cpu":
                inputs, kwargs = _to_device(self._duoka_devices[0], inputs, kwargs)
            return self._duoka_compiler.function(self.module)(*inputs, **kwargs)
        if is_transformed(self.module):
            return self.module(*inputs, **kwargs)
        with _start_lock:  # two threads may make the first call at once
            controller = self._duoka_controller
            if controller is None:
                controller = Controller(self._duoka_devices, self.dim, self._duoka_compiler)
                self._duoka_controller = controller
                self._duoka_finalizer = weakref.finalize(self, controller.close_after_graphs)
                self._duoka_finalizer.atexit = False
        return controller.run(self.module, inputs, kwargs, self._duoka_check.plan_for(self.module))

    def close(self) -> None:
        """Release the worker processes; a later call starts them again. The model stays as it is."""
        if self._duoka_controller is not None:
            self._duoka_finalizer.detach()
            self._duoka_controller.close()
            self._duoka_controller = None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the wrapped model's own state, without the prefix ``module.``."""
        return self.module.state_dict(*args, **kwargs)

    def named_modules(self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        """Yield the modules under the names that they have in the wrapped model, and so parameters and buffers."""
        start = f"{prefix}.module" if prefix else "module"
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            inner = name == start or name.startswith(f"{start}.")
            yield (prefix + name.removeprefix(start)).removeprefix("" if prefix else ".") if inner else name, module

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state with or without the prefix ``module.``."""
        return self.module.load_state_dict(_strip_module_prefix(state_dict, self.module), strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load a state without ``module.`` into a wrapped part of a model."""
        for name in [n for n in state_dict if n.startswith(prefix) and not n.startswith(f"{prefix}module.")]:
            state_dict[f"{prefix}module.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
        return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute that only the wrapped model has on the wrapped model."""
        module = self.__dict__.get("_modules", {}).get("module")
        if module is None or name in self.__dict__ or hasattr(type(self), name) or not hasattr(module, name):
            super().__setattr__(name, value)
        else:
            setattr(module, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> DataParallel:
        double = type(self).__new__(type(self))
        memo[id(self)] = double
        double.__dict__.update({name: value for name, value in vars(self).items() if name.startswith(_PRIVATE)})
        state = copy.deepcopy(state_of(self), memo)
        return restore_from_state(
            double, self._duoka_devices, self._duoka_compiler.options, self._duoka_check.mode, state
        )

    def __reduce__(self) -> tuple[Any, ...]:
        check = self._duoka_check.mode
        return _rebuild, (type(self), self._duoka_devices, self._duoka_compiler.options, check, state_of(self))


def devices_of(wrapper: DataParallel) -> tuple[torch.device, ...]:
    """Return the devices of a wrapper."""
    return wrapper._duoka_devices


def state_of(wrapper: DataParallel) -> dict[str, Any]:
    """Return a wrapper's attributes, without devices and workers."""
    return {name: value for name, value in vars(wrapper).items() if not name.startswith(_PRIVATE)}


def restore_from_state(
    wrapper: DataParallel,
    devices: tuple[torch.device, ...],
    options: Mapping[str, Any] | None,
    check: Check,
    state: dict[str, Any],
) -> DataParallel:
    """Fill an empty wrapper from what ``state_of`` returned, and the options of ``torch.compile``."""
    wrapper.__dict__.update(
        state,
        _duoka_devices=devices,
        _duoka_compiler=MaybeCompiled(options),
        _duoka_check=CheckPolicy(check, devices),
        _duoka_controller=None,
        _duoka_finalizer=None,
    )
    return wrapper


def overridden_steps(cls: type) -> list[str]:
    """Return the steps of ``nn.DataParallel.forward`` that ``cls`` overrides; duoka calls none."""
    names = ("scatter", "replicate", "parallel_apply", "gather")
    return [name for name in names if getattr(cls, name) is not getattr(nn.DataParallel, name)]


def _rebuild(
    cls: type[DataParallel],
    devices: tuple[torch.device, ...],
    options: Mapping[str, Any] | None,
    check: Check,
    state: dict[str, Any],
) -> DataParallel:
    """Return an unpickled wrapper; its devices must exist here."""
    wrapper = restore_from_state(cls.__new__(cls), resolve(list(devices)).devices, options, check, state)
    if devices[0].type != "cpu":
        wrapper.module.to(devices[0])
    return wrapper


def _resolve_devices(device_ids: DeviceSpec, devices: DeviceSpec) -> tuple[torch.device, ...]:
    """Return the devices that either argument names; ``device_ids`` may use the device grammar too."""
    if device_ids is None:
        return resolve("auto" if devices is None else devices).devices
    if devices is not None:
        raise ConfigError(f"device_ids={device_ids!r} and devices={devices!r} both name devices. Give one of them.")
    if isinstance(device_ids, int):
        raise ConfigError(
            f"device_ids={device_ids!r} is ambiguous: write devices='{device_ids}' for device {device_ids} alone, or "
            "devices='0,1' for two devices"
        )
    return resolve(device_ids if isinstance(device_ids, str | torch.device) else list(device_ids)).devices


def _check_module(module: Any) -> None:
    if isinstance(module, type):
        name = module.__name__
        raise ConfigError(
            f"module={name} is a class, and DataParallel wraps a model: create one first, DataParallel({name}(...))"
        )
    if isinstance(module, nn.DataParallel | DistributedDataParallel) and not isinstance(module, DataParallel):
        raise ConfigError(
            f"the model is already wrapped in torch's {type(module).__name__}; give the model itself, model.module"
        )
    if not isinstance(module, nn.Module):
        raise ConfigError(f"module={module!r:.80} is a {type(module).__name__}; it must be a torch.nn.Module")


def _to_device(
    device: torch.device, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with all tensors on ``device``, as ``torch.nn.DataParallel`` does."""
    if not kwargs and all(type(value) is torch.Tensor and value.device == device for value in inputs):
        return inputs, kwargs
    tensors, arguments = extract_tensors((inputs, kwargs))
    args, kwargs = insert_on_device(arguments, tensors, device)
    return args, kwargs


def _strip_module_prefix(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """Remove ``module.`` from the names if the wrapped model has only the names without it."""
    names = module.state_dict().keys()
    if not state or any(name in names for name in state) or not all(name.startswith("module.") for name in state):
        return state
    return {name.removeprefix("module."): value for name, value in state.items()}
