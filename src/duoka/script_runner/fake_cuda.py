"""Answers of the emulated ``torch.cuda`` and ``torch.accelerator``: CPU workers, described by the machine's facts.

This file holds values only; ``cuda_emulation`` puts them in the place of torch's.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import psutil
import torch

_CPU = torch.device("cpu")
_WITHOUT_EFFECT = (
    "empty_cache", "synchronize", "init", "ipc_collect", "set_per_process_memory_fraction", "set_stream",
    "reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached", "reset_accumulated_memory_stats",
    "reset_peak_host_memory_stats", "reset_accumulated_host_memory_stats", "manual_seed", "manual_seed_all", "seed",
    "seed_all", "set_sync_debug_mode", "caching_allocator_enable", "check_error", "_record_memory_history",
)  # fmt: skip
"""Seeds, too: the emulated GPUs share the CPU's generator, which ``torch.manual_seed`` alone may seed."""
_MEMORY_IN_USE = (
    "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "memory_cached",
    "max_memory_cached", "device_memory_used",
)  # fmt: skip
_MEMORY_STATISTICS = ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes")
_NOT_MEASURED = ("temperature", "power_draw", "clock_rate", "memory_usage", "get_sync_debug_mode")


def constant(value: Any) -> Callable[..., Any]:
    """Return a function of any arguments that returns ``value``."""
    return lambda *_, **__: value


class FakeDevices:
    """The emulated GPUs, and the one that is current."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.current = 0

    def index(self, device: Any = None) -> int:
        """Return the index that ``device`` names; raise as CUDA does if there is no such device."""
        if device is None:
            return self.current
        index: int | None = device if isinstance(device, int) else torch.device(device).index
        if index is None:
            return self.current
        if not 0 <= index < self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}: this run has {self.count} devices")
        return index

    def set_current(self, device: Any) -> None:
        """Make a device current."""
        self.current = self.index(device)

    def name(self, device: Any = None) -> str:
        """Return a device's name."""
        return f"CPU worker {self.index(device)} (duoka)"

    def memory_in_use(self, device: Any = None) -> int:
        """Return the bytes that this process uses."""
        self.index(device)
        return int(psutil.Process().memory_info().rss)

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        """Return torch's statistics; those that CPU workers do not have are 0."""
        in_use = self.memory_in_use(device)
        ends = ("current", "peak")
        return defaultdict(int, {f"{kind}.all.{end}": in_use for kind in _MEMORY_STATISTICS for end in ends})

    def nested_memory_stats(self, device: Any = None) -> dict[str, dict[str, dict[str, int]]]:
        """Return the same statistics as a nested dictionary."""
        in_use = self.memory_in_use(device)
        return {kind: {"all": {"current": in_use, "peak": in_use}} for kind in _MEMORY_STATISTICS}

    def memory_summary(self, device: Any = None, **_: Any) -> str:
        """Return the use of memory as text."""
        return f"{self.name(device)}: {self.memory_in_use()} bytes in this process"

    def properties(self, device: Any = None) -> Any:
        """Return a device's properties."""
        return SimpleNamespace(
            name=self.name(device),
            total_memory=psutil.virtual_memory().total,
            multi_processor_count=max(1, (psutil.cpu_count() or 1) // self.count),
            major=0,
            minor=0,
        )

    def guard(self) -> type:
        """Return the class whose instances make a device current inside a ``with`` block."""
        devices = self

        class device:  # noqa: N801 - torch's name
            """Makes a device current inside a ``with`` block; a negative index or ``None`` changes nothing."""

            def __init__(self, device: Any) -> None:
                is_none = device is None or (isinstance(device, int) and device < 0) or isinstance(device, torch.Tensor)
                self.idx = -1 if is_none else devices.index(device)
                self.prev_idx = -1

            def __enter__(self) -> None:
                self.prev_idx = devices.current
                devices.current = self.prev_idx if self.idx < 0 else self.idx

            def __exit__(self, *_: object) -> None:
                devices.current = self.prev_idx

        return device


def cuda_answers(devices: FakeDevices) -> dict[str, Callable[..., Any]]:
    """Return functions in the place of those in ``torch.cuda``, by name."""
    return {
        **dict.fromkeys(_WITHOUT_EFFECT, constant(None)),
        **dict.fromkeys(_MEMORY_IN_USE, devices.memory_in_use),
        **dict.fromkeys(("memory_stats", "host_memory_stats"), devices.memory_stats),
        **dict.fromkeys(
            ("memory_stats_as_nested_dict", "host_memory_stats_as_nested_dict"), devices.nested_memory_stats
        ),
        **dict.fromkeys(_NOT_MEASURED, constant(0)),
        **_device_answers(devices),
        "memory_summary": devices.memory_summary,
        "memory_snapshot": constant([]),
        "get_per_process_memory_fraction": constant(1.0),
        "caching_allocator_disabled": constant(contextlib.nullcontext()),
        "get_allocator_backend": constant("native"),
        "utilization": lambda *_, **__: int(psutil.cpu_percent()),
        "list_gpu_processes": constant("no processes are running"),
        "initial_seed": torch.initial_seed,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda new_state, *_, **__: torch.set_rng_state(new_state),
        "get_rng_state_all": lambda: [torch.get_rng_state()] * devices.count,
        "set_rng_state_all": lambda new_states: torch.set_rng_state(next(iter(new_states))),
        "current_stream": constant(FakeStream()),
        "default_stream": constant(FakeStream()),
        "get_stream_from_external": constant(FakeStream()),
        "stream": lambda *_, **__: contextlib.nullcontext(),
    }


def _device_answers(devices: FakeDevices) -> dict[str, Callable[..., Any]]:
    return {
        **dict.fromkeys(
            ("is_available", "is_initialized", "is_bf16_supported", "can_device_access_peer"), constant(True)
        ),
        **dict.fromkeys(("is_current_stream_capturing", "is_tf32_supported"), constant(False)),
        "get_arch_list": list,
        "get_gencode_flags": str,
        "device_count": constant(devices.count),
        "current_device": lambda: devices.current,
        "set_device": devices.set_current,
        "get_device_name": devices.name,
        "get_device_properties": devices.properties,
        "get_device_capability": constant((0, 0)),
        "mem_get_info": lambda *_, **__: (psutil.virtual_memory().available, psutil.virtual_memory().total),
    }


def accelerator_answers(devices: FakeDevices) -> dict[str, Callable[..., Any]]:
    """Return functions in the place of those in ``torch.accelerator``, by name."""
    cuda = cuda_answers(devices)
    same = (
        "is_available", "device_count", "synchronize", "current_stream", "set_stream", "empty_cache", "memory_stats",
        "max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved", "initial_seed",
        "reset_accumulated_memory_stats", "reset_peak_memory_stats", "get_rng_state", "get_rng_state_all",
    )  # fmt: skip
    return {
        **{name: cuda[name] for name in same},
        **dict.fromkeys(("current_device_index", "current_device_idx"), cuda["current_device"]),
        **dict.fromkeys(("set_device_index", "set_device_idx"), devices.set_current),
        "current_accelerator": constant(torch.device("cuda")),
        "get_memory_info": cuda["mem_get_info"],
        "get_device_capability": constant({"supported_dtypes": {torch.float32, torch.float64, torch.bfloat16}}),
        "empty_host_cache": constant(None),
    }


class FakeStream:
    """CUDA stream of a CPU worker: all work is complete at once."""

    synchronize = wait_stream = wait_event = constant(None)
    query = constant(True)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        """Record an event, a new one if there is none, and return it."""
        event = event or FakeEvent()
        event.record()
        return event


class FakeEvent:
    """CUDA event that records the time of the host."""

    synchronize = wait = constant(None)
    query = constant(True)

    def __init__(self, *_: Any, **__: Any) -> None:
        self._seconds = 0.0

    def record(self, *_: Any) -> None:
        """Record the time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: FakeEvent) -> float:
        """Return the time from this event to ``end`` in milliseconds, as CUDA's does."""
        return 1000 * (end._seconds - self._seconds)


NVTX_ANSWERS = {
    **dict.fromkeys(("range_push", "range_pop", "range_start"), constant(0)),
    **dict.fromkeys(("range_end", "mark"), constant(None)),
    "range": lambda *_, **__: contextlib.nullcontext(),
}
"""Functions in the place of those in ``torch.cuda.nvtx``."""

PROFILER_ANSWERS = {
    **dict.fromkeys(("start", "stop"), constant(None)),
    "profile": lambda: contextlib.nullcontext(),
}
"""Functions in the place of those in ``torch.cuda.profiler``."""


def scatter(devices: Sequence[Any], chunk_sizes: Any, dim: int, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split a tensor, as the first step of ``nn.DataParallel``."""
    return torch.split(tensor, list(chunk_sizes), dim) if chunk_sizes else tensor.chunk(len(devices), dim)


def gather(_: Any, dim: int, *outputs: torch.Tensor) -> torch.Tensor:
    """Concatenate tensors, as the last step of ``nn.DataParallel``."""
    return torch.stack(outputs) if outputs[0].dim() == 0 else torch.cat(outputs, dim)


def broadcast(devices: Sequence[Any], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return views, so that gradients of the replicas reach the model's parameters."""
    return tuple(tensor.view_as(tensor) for _ in devices for tensor in tensors)


def copy_buffers(tensors: Sequence[torch.Tensor], devices: Sequence[Any], *_: Any) -> list[list[torch.Tensor]]:
    """Return the model's own buffers for the first replica, so that updates persist, else copies."""
    return [list(tensors), *([tensor.detach().clone() for tensor in tensors] for _ in devices[1:])]


def _add(inputs: Sequence[torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
    return torch.stack(list(inputs)).sum(0)


def _add_each(inputs: Sequence[Sequence[torch.Tensor]], *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
    return tuple(_add(tensors) for tensors in zip(*inputs, strict=True))


COMM_ANSWERS = {
    "broadcast": lambda tensor, devices=None, *, out=None: tuple(tensor.clone() for _ in devices or out),
    "broadcast_coalesced": lambda tensors, devices, *_, **__: copy_buffers(tensors, devices),
    "reduce_add": _add,
    "reduce_add_coalesced": _add_each,
    "scatter": lambda tensor, devices, chunk_sizes=None, dim=0, *_, **__: scatter(devices, chunk_sizes, dim, tensor),
    "gather": lambda tensors, dim=0, *_, **__: gather(None, dim, *tensors),
}
"""Functions in the place of those in ``torch.cuda.comm``, which compute steps of data parallelism."""
