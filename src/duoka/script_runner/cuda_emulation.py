"""Emulation of several GPUs by CPU workers, for the script alone.

The script takes the branches that it takes on a machine with GPUs: ``torch.cuda.device_count()`` is the number of CPU
workers, and ``cuda:0`` means the CPU. Code of torch and duoka still gets the machine's real answers.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import nn

from duoka.data_parallel.device_remap import RemapCuda, is_cuda
from duoka.script_runner.patching import Patches
from duoka.utils.torch_private import data_parallel_modules

_LIBRARIES = ("torch", "duoka")
_CPU = torch.device("cpu")
_Generator = torch.Generator
_MEMORY_IN_USE = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "memory_cached")
_WITHOUT_EFFECT = (
    "empty_cache", "synchronize", "init", "ipc_collect", "set_per_process_memory_fraction",
    "reset_peak_memory_stats", "reset_max_memory_allocated",
)  # fmt: skip


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


@contextlib.contextmanager
def emulate_cuda(num_devices: int) -> Iterator[None]:
    """Present ``num_devices`` CPU workers to the script as GPUs inside the ``with`` block."""

    def run_thread(original: Callable[..., Any], thread: threading.Thread) -> None:
        with RemapCuda(_CPU, num_devices):  # function modes are local to a thread
            original(thread)

    with Patches() as patches:
        for patch, owner, table in emulated_api(num_devices):
            for name, value in table.items():
                if hasattr(owner, name):  # older versions of torch lack some names
                    patch(patches, owner, name, value)
        patches.wrap(threading.Thread, "run", run_thread)
        patches.enter_context(RemapCuda(_CPU, num_devices))
        yield


def emulated_api(num_devices: int) -> list[tuple[Callable[..., None], Any, dict[str, Any]]]:
    """Return the names of torch to replace: how to patch, the owner, and a value for each name."""
    appliers = [importlib.import_module(f"torch.nn.parallel{end}") for end in ("", ".parallel_apply", ".data_parallel")]
    scatter_gather, functions, comm = data_parallel_modules()
    tensor_types = [name for name in vars(torch.cuda) if name.endswith("Tensor") and hasattr(torch, name)]
    cuda = _cuda_api(num_devices)
    accelerator = {
        **{name: cuda[name] for name in ("is_available", "device_count", "synchronize")},
        "current_accelerator": _constant(torch.device("cuda")),
        "current_device_index": _constant(0),
        "set_device_index": _constant(None),
    }
    return [
        (_answer_script, torch.cuda, cuda),
        (_answer_script, torch.accelerator, accelerator),
        (Patches.set, torch.cuda, {name: getattr(torch, name) for name in tensor_types}),
        (Patches.set, torch.cuda, {"Stream": _FakeStream, "Event": _FakeEvent, "device": contextlib.nullcontext}),
        (Patches.set, torch, {"Generator": _FakeGenerator}),
        (Patches.set, torch.Tensor, {"record_stream": _constant(None)}),
        (Patches.set, torch.UntypedStorage, {"cuda": lambda storage, *_, **__: storage}),
        (Patches.set, torch.TypedStorage, {"cuda": lambda storage, *_, **__: storage}),
        (Patches.set, nn.Module, {"cuda": _move_module}),
        (Patches.wrap, torch, {"load": _load, "set_default_device": _set_default_device}),
        (Patches.wrap, torch.random, {"fork_rng": _fork_rng}),
        (Patches.wrap, torch.amp.autocast_mode.autocast, {"__init__": _init_autocast}),
        (Patches.wrap, torch.amp.grad_scaler.GradScaler, {"__init__": _init_grad_scaler}),
        # The steps of nn.DataParallel for scripts that call them: torch's need CUDA.
        (Patches.set, scatter_gather, {"Scatter": SimpleNamespace(apply=_scatter)}),
        (Patches.set, scatter_gather, {"Gather": SimpleNamespace(apply=_gather)}),
        (Patches.set, functions, {"Broadcast": SimpleNamespace(apply=_broadcast)}),
        (Patches.set, comm, {"broadcast_coalesced": _copy_buffers}),
        *((Patches.set, owner, {"parallel_apply": _parallel_apply}) for owner in appliers),
    ]


def _cuda_api(num_devices: int) -> dict[str, Any]:
    devices = _FakeDevices(num_devices)
    return {
        **dict.fromkeys(_WITHOUT_EFFECT, _constant(None)),
        **dict.fromkeys(_MEMORY_IN_USE, devices.memory_in_use),
        "is_available": _constant(True),
        "is_initialized": _constant(True),
        "is_bf16_supported": _constant(True),
        "is_current_stream_capturing": _constant(False),
        "can_device_access_peer": _constant(True),
        "device_count": _constant(num_devices),
        "current_device": lambda: devices.current,
        "set_device": devices.set_current,
        "get_device_name": devices.name,
        "get_device_properties": devices.properties,
        "get_device_capability": _constant((0, 0)),
        "mem_get_info": lambda *_, **__: (psutil.virtual_memory().available, psutil.virtual_memory().total),
        "memory_summary": devices.memory_summary,
        "utilization": lambda *_, **__: int(psutil.cpu_percent()),
        "list_gpu_processes": _constant("no processes are running"),
        "initial_seed": torch.initial_seed,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(next(iter(states))),
        "current_stream": _constant(_FakeStream()),
        "default_stream": _constant(_FakeStream()),
        "stream": lambda *_, **__: contextlib.nullcontext(),
    }


def _answer_script(patches: Patches, owner: Any, name: str, answer: Callable[..., Any]) -> None:
    """Replace ``owner.name`` for the script; calls from torch and duoka reach the original."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        return (original if caller in _LIBRARIES else answer)(*args, **kwargs)

    call.__name__, call.__doc__ = name, original.__doc__
    patches.set(owner, name, call)


class _FakeDevices:
    """The emulated GPUs: CPU workers, described by the machine's processor and memory."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.current = 0

    def index(self, device: Any = None) -> int:
        if device is None:
            return self.current
        index = device if isinstance(device, int) else torch.device(device).index or 0
        if not 0 <= index < self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}: this run has {self.count} devices")
        return index

    def set_current(self, device: Any) -> None:
        self.current = self.index(device)

    def name(self, device: Any = None) -> str:
        return f"CPU worker {self.index(device)} (duoka)"

    def memory_in_use(self, device: Any = None) -> int:
        self.index(device)
        return int(psutil.Process().memory_info().rss)

    def memory_summary(self, device: Any = None, **_: Any) -> str:
        return f"{self.name(device)}: {self.memory_in_use()} bytes in this process"

    def properties(self, device: Any = None) -> Any:
        return SimpleNamespace(
            name=self.name(device),
            total_memory=psutil.virtual_memory().total,
            multi_processor_count=max(1, (psutil.cpu_count() or 1) // self.count),
            major=0,
            minor=0,
        )


class _FakeStream:
    """CUDA stream of a CPU worker: all work is complete at once."""

    synchronize = wait_stream = wait_event = _constant(None)
    query = _constant(True)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        event = event or _FakeEvent()
        event.record()
        return event


class _FakeEvent:
    """CUDA event that records the time of the host."""

    synchronize = wait = _constant(None)
    query = _constant(True)

    def __init__(self, *_: Any, **__: Any) -> None:
        self._seconds = 0.0

    def record(self, *_: Any) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: _FakeEvent) -> float:
        """Return the time from this event to ``end`` in milliseconds, as CUDA's does."""
        return 1000 * (end._seconds - self._seconds)


class _FakeGeneratorMeta(type):
    """Creates and recognizes generators of torch's own class, which allows no subclass."""

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return _Generator(_CPU if is_cuda(device) or isinstance(device, int) else device)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _Generator)


class _FakeGenerator(metaclass=_FakeGeneratorMeta):
    """``torch.Generator``, where ``"cuda"`` means the CPU."""


def _move_module(module: nn.Module, device: Any = None) -> nn.Module:
    is_index = device is None or isinstance(device, int)
    return module.to(torch.device("cuda", device or 0) if is_index else torch.device(device))


def _set_default_device(original: Callable[..., Any], device: Any) -> None:
    original(_CPU if is_cuda(device) else device)


def _fork_rng(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``torch.random.fork_rng`` without ``devices``: all of them share the CPU's generator."""
    return original([], *args[1:], **{name: value for name, value in kwargs.items() if name != "devices"})


def _load(original: Callable[..., Any], f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
    if is_cuda(map_location):
        map_location = _CPU
    elif isinstance(map_location, dict):
        map_location = {key: "cpu" if is_cuda(value) else value for key, value in map_location.items()}
    return original(f, map_location, *args, **kwargs)


def _init_autocast(original: Callable[..., Any], self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
    """Disable CUDA's mixed precision: CPU workers compute in full precision."""
    if device_type == "cuda":
        args, kwargs = (), {"dtype": args[0] if args else kwargs.get("dtype"), "enabled": False}
    original(self, device_type, *args, **kwargs)


def _init_grad_scaler(original: Callable[..., Any], self: Any, device: Any = "cuda", *args: Any, **kwargs: Any) -> None:
    if is_cuda(device):
        device, args, kwargs = "cuda", (), {"enabled": False}
    original(self, device, *args, **kwargs)


def _scatter(devices: Sequence[Any], _: Any, dim: int, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor.chunk(len(devices), dim)


def _gather(_: Any, dim: int, *outputs: torch.Tensor) -> torch.Tensor:
    return torch.stack(outputs) if outputs[0].dim() == 0 else torch.cat(outputs, dim)


def _broadcast(devices: Sequence[Any], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return views, so that gradients of the replicas reach the model's parameters."""
    return tuple(tensor.view_as(tensor) for _ in devices for tensor in tensors)


def _copy_buffers(tensors: Sequence[torch.Tensor], devices: Sequence[Any], *_: Any) -> list[list[torch.Tensor]]:
    """Return the model's own buffers for the first replica, so that updates persist, else copies."""
    return [list(tensors), *([tensor.detach().clone() for tensor in tensors] for _ in devices[1:])]


def _parallel_apply(
    modules: Sequence[nn.Module], inputs: Sequence[Any], kwargs_tup: Sequence[Any] | None = None, _: Any = None
) -> list[Any]:
    positional = [value if isinstance(value, list | tuple) else (value,) for value in inputs]
    keyword = [kwargs or {} for kwargs in kwargs_tup or [None] * len(positional)]
    return [module(*args, **kwargs) for module, args, kwargs in zip(modules, positional, keyword, strict=True)]
