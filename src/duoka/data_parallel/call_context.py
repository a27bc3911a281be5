"""Context of a call: torch modes, settings and seed for workers, and rank 0's thread limit."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import torch

from duoka.data_parallel.device_remap import RemapCuda, is_remapping
from duoka.data_parallel.messages import ContextFactory
from duoka.utils.torch_settings import capture_torch_settings


def capture_settings() -> dict[str, Any]:
    """Return the process-wide settings that decide a call's result."""
    return capture_torch_settings(("default_dtype", "deterministic", "float32_matmul_precision"))


def capture_modes(device: torch.device, context: ContextFactory | None = None) -> tuple[ContextFactory, ...]:
    """Return contexts that repeat the current modes in the worker of ``device``; ``context`` is innermost."""
    modes: list[ContextFactory] = [
        partial(torch.inference_mode, torch.is_inference_mode_enabled()),
        partial(torch.set_grad_enabled, torch.is_grad_enabled()),
    ]
    for kind in sorted({"cpu", device.type}):
        if torch.is_autocast_enabled(kind):
            dtype, cache = torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
            modes.append(partial(torch.autocast, kind, dtype, cache_enabled=cache))
    if is_remapping():
        modes.append(partial(RemapCuda, device))
    if context is not None:
        modes.append(context)
    return tuple(modes)


def draw_seed(device: torch.device) -> int:
    """Return a seed that depends on the user's CPU and device generators, without advancing them.

    A model that draws random numbers advances one of them in rank 0, so the next call has another
    seed. Both states are in host memory; the host does not wait for the device.
    """
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    seed = int(torch.randint(2**62, (), generator=generator))
    if device.type == "cpu":
        return seed
    state = torch.get_device_module(device).get_rng_state(device)
    return (seed + int.from_bytes(hashlib.blake2b(state.numpy(), digest_size=8).digest())) % 2**62


class ThreadLimit:
    """Limit of rank 0's compute threads while workers compute beside it."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._user_threads: int | None = None

    def acquire(self) -> None:
        """Lower the number of threads, because workers start to compute."""
        if self._user_threads is None and torch.get_num_threads() > self.num_threads:
            self._user_threads = torch.get_num_threads()
            torch.set_num_threads(self.num_threads)

    def release(self) -> None:
        """Restore the user's number of threads, unless the user has set another one meanwhile."""
        if self._user_threads is not None:
            if torch.get_num_threads() == self.num_threads:
                torch.set_num_threads(self._user_threads)
            self._user_threads = None
