"""``DataParallel``, the drop-in class: a wrapped model that computes each batch on several devices at once."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from duoka.data_parallel import scatter_gather
from duoka.data_parallel.controller import Controller
from duoka.data_parallel.part import MaybeCompiled
from duoka.devices import resolve
from duoka.errors import ConfigError, UnsupportedError

__all__ = ["DataParallel", "own_steps", "rebuilt"]

_one_at_a_time = threading.Lock()
_PRIVATE = "_duoka_"

DeviceSpec = str | int | torch.device | Sequence[str | int | torch.device] | None


class DataParallel(nn.DataParallel[nn.Module]):
    """Computes each batch on several devices, from this process, and leaves everything else as it is with one.

    ``forward`` splits the batch, every device computes its part on a replica of the model, and the outputs are joined;
    ``backward`` brings the gradients of all parts to the parameters of the wrapped model. Optimiser, clipping, accumulation,
    hooks, ``state_dict`` and the attributes of the wrapped model work as without the wrapper. The first device is this
    process; each further one has a helper process, started by the first call and shared by all wrapped models.

    Inputs of the batch's size along ``dim`` are split, all others go to every device whole; so with a batch smaller than the
    number of devices, fewer are used. Outputs are concatenated along ``dim``; numbers become a vector with one from
    each device, as with ``torch.nn.DataParallel``. Buffers are those of the first device's part.

    Args:
        module: the model; its parameters stay the same objects. Where devices are CPU workers their values move into memory
            that the processes share.
        device_ids: the devices, as in ``torch.nn.DataParallel``, or in the device grammar; or use ``devices``.
        output_device: kept for scripts that give it; outputs are on the first device.
        dim: the dimension of the batch.
        devices: the device grammar: ``"auto"``, ``"all"``, ``"0,1"``, ``"cpu:2"``, ``torch.device`` or a list of these.
        compile: whether every device compiles its part with ``torch.compile``: ``True``, or that function's keyword arguments,
            such as ``{"mode": "max-autotune"}``. The wrapped model itself and its ``state_dict`` stay as they are.

    Raises:
        what the model raises on any device, as its own type, the remote traceback being its cause; WorkerDied when a helper
        process ends; UnsupportedError for a backward with ``create_graph=True``, and for a subclass with a ``scatter``,
            ``replicate``, ``parallel_apply`` or ``gather`` of its own; DeviceError for devices that are not there.

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
        devices: DeviceSpec = "auto",
        compile: bool | Mapping[str, Any] = False,  # noqa: A002 - torch's own word
        **others: Any,
    ) -> None:
        nn.Module.__init__(self)
        _check_given(module, others)
        chosen = _chosen(device_ids, devices)
        if len(chosen) > 1:
            _refuse_own_steps(type(self))
        self.module = module
        self.dim = dim
        self.device_ids = [index if one.type == "cpu" else one.index for index, one in enumerate(chosen)]
        self.output_device = self.device_ids[0] if output_device is None else output_device  # type: ignore[assignment]
        self.src_device_obj = chosen[0]
        self._duoka_devices = chosen
        self._duoka_part = MaybeCompiled(compile)
        self._duoka_engine: Controller | None = None
        self._duoka_end: Any = None
        self.training = module.training
        if chosen[0].type != "cpu":
            module.to(chosen[0])

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Compute the wrapped model's forward, each device its part."""
        if len(self._duoka_devices) == 1:
            if self._duoka_devices[0].type != "cpu":
                inputs, kwargs = _on(self._duoka_devices[0], inputs, kwargs)
            return self._duoka_part.of(self.module)(*inputs, **kwargs)
        with _one_at_a_time:  # two threads that come first at once are not to have an engine each
            engine = self._duoka_engine
            if engine is None:
                engine = self._duoka_engine = Controller(self._duoka_devices, self.dim, self._duoka_part)
                self._duoka_end = weakref.finalize(self, engine.close_later)
                self._duoka_end.atexit = False
        return engine.run(self.module, inputs, kwargs)

    def close(self) -> None:
        """Give the helper processes back; the wrapped model stays as it is. A later call starts them again."""
        if self._duoka_engine is not None:
            self._duoka_end.detach()
            self._duoka_engine.close()
            self._duoka_engine = None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the wrapped model's own state, without ``module.`` in its names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state with or without ``module.`` in its names."""
        return self.module.load_state_dict(_own_names(state_dict, self.module), strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Let a model with a wrapped part load what its own prefix-free ``state_dict`` says."""
        _add_own_name(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
        return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it where it is: what the wrapped model has and the wrapper has not belongs to the wrapped model."""
        module = self.__dict__.get("_modules", {}).get("module")
        if module is None or name in self.__dict__ or hasattr(type(self), name) or not hasattr(module, name):
            super().__setattr__(name, value)
        else:
            setattr(module, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> DataParallel:
        double = type(self).__new__(type(self))
        memo[id(self)] = double
        double.__dict__.update({name: value for name, value in vars(self).items() if name.startswith(_PRIVATE)})
        return rebuilt(double, self._duoka_devices, self._duoka_part.options, copy.deepcopy(self._duoka_state(), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self._duoka_devices, self._duoka_part.options, self._duoka_state())

    def _duoka_state(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith(_PRIVATE)}


def _chosen(device_ids: DeviceSpec, devices: DeviceSpec) -> tuple[torch.device, ...]:
    """Return the devices that either names; the second argument may be of the device grammar, too."""
    if device_ids is None:
        return resolve(devices).devices
    if devices != "auto":
        raise ConfigError(f"device_ids={device_ids!r} and devices={devices!r} both name devices. Give one of them.")
    if isinstance(device_ids, int):
        raise ConfigError(
            f"device_ids={device_ids!r} is one number; for device {device_ids} alone write devices='{device_ids}', for two "
            "devices devices='0,1'"
        )
    return resolve(device_ids if isinstance(device_ids, str | torch.device) else list(device_ids)).devices


def _on(
    device: torch.device, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a model is given with all tensors on its device, where ``torch.nn.DataParallel`` brings them too."""
    if not kwargs and all(type(value) is torch.Tensor and value.device == device for value in inputs):
        return inputs, kwargs
    tensors, arguments = scatter_gather.take_out((inputs, kwargs))
    moved: tuple[tuple[Any, ...], dict[str, Any]] = scatter_gather.fill(
        arguments, [tensor.to(device, non_blocking=True) for tensor in tensors]
    )
    return moved


def _check_given(module: Any, others: Mapping[str, Any]) -> None:
    """Say what is wrong with the arguments, which nothing else would say before the first call."""
    for name, value in others.items():
        meant = (
            f"; did you mean devices={value!r}?"
            if name == "device"
            else ": module, devices, dim and compile are its own"
        )
        raise ConfigError(f"DataParallel has no option {name!r}{meant}")
    if isinstance(module, type):
        name = module.__name__
        raise ConfigError(
            f"DataParallel wraps a model, and {name} is its class: make one first, DataParallel({name}(...))"
        )
    if isinstance(module, nn.DataParallel | DistributedDataParallel) and not isinstance(module, DataParallel):
        raise ConfigError(
            f"the model is wrapped in torch's {type(module).__name__} already; give the model itself, model.module"
        )
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"DataParallel wraps a torch.nn.Module, and was given a {type(module).__name__}: {module!r:.80}"
        )


def own_steps(kind: type) -> list[str]:
    """Return which steps of ``nn.DataParallel``'s forward the subclass ``kind`` has of its own; they would not be called."""
    names = ("scatter", "replicate", "parallel_apply", "gather")
    return [name for name in names if getattr(kind, name) is not getattr(nn.DataParallel, name)]


def _refuse_own_steps(kind: type) -> None:
    if names := own_steps(kind):
        raise UnsupportedError(
            f"{kind.__name__} has a {' and a '.join(names)} of its own, which nn.DataParallel's forward calls and this one "
            "does not: parts are nearly equal, and outputs are joined. Leave that out (to change what goes in or comes out, "
            "override forward and call super().forward), or keep torch.nn.DataParallel"
        )


def _rebuild(
    kind: type[DataParallel],
    devices: tuple[torch.device, ...],
    options: Mapping[str, Any] | None,
    state: dict[str, Any],
) -> DataParallel:
    """Return what was pickled, of its own class, on devices that must be there."""
    double = rebuilt(kind.__new__(kind), resolve(list(devices)).devices, options, state)
    if devices[0].type != "cpu":
        double.module.to(devices[0])
    return double


def rebuilt(
    double: DataParallel,
    devices: tuple[torch.device, ...],
    options: Mapping[str, Any] | None,
    state: dict[str, Any],
) -> DataParallel:
    """Fill an empty wrapper; what a subclass has beside is among the state."""
    double.__dict__.update(state)
    double.__dict__.update(
        _duoka_devices=devices, _duoka_part=MaybeCompiled(options), _duoka_engine=None, _duoka_end=None
    )
    return double


def _own_names(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """Take ``module.`` off the names if the wrapped model knows them only without it."""
    names = module.state_dict().keys()
    if not state or any(name in names for name in state) or not all(name.startswith("module.") for name in state):
        return state
    return {name.removeprefix("module."): value for name, value in state.items()}


def _add_own_name(state: dict[str, Any], prefix: str) -> None:
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(f"{prefix}module.")]:
        state[f"{prefix}module.{name.removeprefix(prefix)}"] = state.pop(name)
