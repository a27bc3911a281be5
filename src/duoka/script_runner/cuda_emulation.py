"""CPU workers that stand for GPUs: what a script asks CUDA for is answered as if each worker were one.

So a script takes the branches that it would take on a machine with several GPUs: ``torch.cuda.device_count() > 1`` is
true, ``cuda:0`` is the CPU. torch's own code, and duoka's, go on seeing the machine as it is.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from duoka.data_parallel.device_remap import RemapCuda, is_cuda
from duoka.script_runner import by_hand
from duoka.script_runner.patching import Patches

__all__ = ["emulate_cuda"]

_INSIDERS = ("torch", "duoka")
_CPU = torch.device("cpu")


@contextlib.contextmanager
def emulate_cuda(workers: int) -> Any:
    """Let ``workers`` CPU workers stand for as many GPUs inside the ``with`` block."""
    with Patches() as patches:
        for name, answer in _fake_cuda_api(workers).items():
            _answer(patches, torch.cuda, name, answer)
        for name, answer in _accelerator_answers(workers).items():
            _answer(patches, torch.accelerator, name, answer)
        for name in [name for name in vars(torch.cuda) if name.endswith("Tensor") and hasattr(torch, name)]:
            patches.set(torch.cuda, name, getattr(torch, name))
        patches.set(torch, "Generator", _FakeGenerator)
        patches.wrap(torch.random, "fork_rng", _fork_rng)
        patches.set(torch.Tensor, "record_stream", lambda *_: None)
        for kind in (torch.UntypedStorage, torch.TypedStorage):
            patches.wrap(kind, "cuda", lambda _, storage, *__, **___: storage)
        patches.wrap(torch.nn.Module, "cuda", lambda _, module, device=None: module.to(_cuda(device)))
        patches.wrap(torch, "load", _load)
        patches.wrap(
            torch, "set_default_device", lambda original, device: original(_CPU if is_cuda(device) else device)
        )
        patches.wrap(torch.amp.autocast_mode.autocast, "__init__", _autocast)
        patches.wrap(torch.amp.grad_scaler.GradScaler, "__init__", _scaler)
        patches.wrap(threading.Thread, "run", functools.partial(_in_rehearsal, workers))
        by_hand.enter(patches)
        patches.enter_context(RemapCuda(_CPU, workers))
        yield


def _in_rehearsal(workers: int, original: Callable[..., Any], thread: threading.Thread) -> None:
    """Run a thread of the script's: function modes hold for the thread that entered them alone."""
    with RemapCuda(_CPU, workers):
        original(thread)


def _cuda(device: Any) -> torch.device:
    """The device that ``module.cuda(device)`` names: ``None``, a number, a string or a device."""
    return torch.device("cuda", device or 0) if device is None or isinstance(device, int) else torch.device(device)


def _answer(patches: Patches, owner: Any, name: str, answer: Any) -> None:
    """Give the script an answer of our own; whoever asks from within torch or duoka gets the true one."""
    original = getattr(owner, name, None)
    if original is None:
        return
    if isinstance(answer, type):
        patches.set(owner, name, answer)
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        asking = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        return (original if asking in _INSIDERS else answer)(*args, **kwargs)

    call.__name__, call.__doc__ = name, original.__doc__
    patches.set(owner, name, call)


def _fake_cuda_api(workers: int) -> dict[str, Any]:
    """What ``torch.cuda`` says, by name."""
    current = [0]

    def number(device: Any = None) -> int:
        index = current[0] if device is None else device if isinstance(device, int) else torch.device(device).index or 0
        if not 0 <= index < workers:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}: this run has {workers} devices")
        return index

    def set_device(device: Any) -> None:
        current[0] = number(device)

    def name_of(device: Any = None) -> str:
        return f"CPU worker {number(device)} (duoka)"

    def memory_used(device: Any = None) -> int:
        number(device)
        return int(psutil.Process().memory_info().rss)

    def properties(device: Any = None) -> Any:
        return SimpleNamespace(
            name=name_of(device),
            total_memory=psutil.virtual_memory().total,
            multi_processor_count=max(1, (psutil.cpu_count() or 1) // workers),
            major=0,
            minor=0,
        )

    used: dict[str, Any] = dict.fromkeys(
        ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "memory_cached"),
        memory_used,
    )
    quiet: dict[str, Any] = dict.fromkeys(
        (
            "empty_cache",
            "synchronize",
            "reset_peak_memory_stats",
            "reset_max_memory_allocated",
            "init",
            "ipc_collect",
            "set_per_process_memory_fraction",
        ),
        _nothing,
    )
    return (
        used
        | quiet
        | {
            "is_available": _constant(True),
            "is_initialized": _constant(True),
            "is_bf16_supported": _constant(True),
            "device_count": _constant(workers),
            "current_device": lambda: current[0],
            "set_device": set_device,
            "get_device_name": name_of,
            "get_device_properties": properties,
            "get_device_capability": _constant((0, 0)),
            "mem_get_info": lambda *_, **__: (psutil.virtual_memory().available, psutil.virtual_memory().total),
            "memory_summary": lambda device=None, **__: f"{name_of(device)}: {memory_used()} bytes in this process",
            "get_rng_state": lambda *_, **__: torch.get_rng_state(),
            "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
            "get_rng_state_all": lambda: [torch.get_rng_state()],
            "set_rng_state_all": lambda states: torch.set_rng_state(next(iter(states))),
            "utilization": lambda *_, **__: int(psutil.cpu_percent()),
            "initial_seed": torch.initial_seed,
            "can_device_access_peer": _constant(True),
            "is_current_stream_capturing": _constant(False),
            "list_gpu_processes": _constant("no processes are running"),
            "current_stream": _constant(_FakeStream()),
            "default_stream": _constant(_FakeStream()),
            "Stream": _FakeStream,
            "Event": _FakeEvent,
            "device": _FakeDevice,
            "stream": lambda *_, **__: contextlib.nullcontext(),
        }
    )


def _accelerator_answers(workers: int) -> dict[str, Any]:
    return {
        "is_available": _constant(True),
        "device_count": _constant(workers),
        "current_accelerator": _constant(torch.device("cuda")),
        "current_device_index": _constant(0),
        "synchronize": _nothing,
        "set_device_index": _nothing,
    }


def _constant(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


_nothing = _constant(None)


class _FakeStream:
    """A stream of work on a CPU worker: everything is done when it is asked for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        event = event or _FakeEvent()
        event.record()
        return event


class _FakeEvent:
    """A moment, for scripts that time themselves."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._seconds = 0.0

    def record(self, *_: Any) -> None:
        import time

        self._seconds = time.perf_counter()

    def synchronize(self) -> None: ...
    def wait(self, _: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _FakeEvent) -> float:
        """Milliseconds, as CUDA's."""
        return 1000 * (end._seconds - self._seconds)


class _FakeDevice(contextlib.nullcontext[None]):
    """``with torch.cuda.device(1):``."""


class _AnyGenerator(type):
    """Makes torch's generators, which are a final class, for the CPU where CUDA is asked for."""

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return _TRUE_GENERATOR(_CPU if is_cuda(device) or isinstance(device, int) else device)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _TRUE_GENERATOR)


class _FakeGenerator(metaclass=_AnyGenerator):
    """``torch.Generator("cuda")``."""


_TRUE_GENERATOR = torch.Generator


def _fork_rng(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``torch.random.fork_rng(devices=[0])``: every worker's generator is the CPU's, which is kept in any case."""
    return original([], *args[1:], **{name: value for name, value in kwargs.items() if name != "devices"})


def _load(original: Callable[..., Any], f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
    if is_cuda(map_location):
        map_location = _CPU
    elif isinstance(map_location, dict):
        map_location = {key: "cpu" if is_cuda(value) else value for key, value in map_location.items()}
    return original(f, map_location, *args, **kwargs)


def _autocast(original: Callable[..., Any], self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
    """CUDA's mixed precision is not rehearsed: CPU workers compute in full precision."""
    if device_type == "cuda":
        dtype = args[0] if args else kwargs.get("dtype")
        original(self, device_type, dtype=dtype, enabled=False)
    else:
        original(self, device_type, *args, **kwargs)


def _scaler(original: Callable[..., Any], self: Any, device: Any = "cuda", *args: Any, **kwargs: Any) -> None:
    if is_cuda(device):
        original(self, "cuda", enabled=False)
    else:
        original(self, device, *args, **kwargs)
