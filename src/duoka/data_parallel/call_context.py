"""Context of a call: torch modes and seed for workers; rank 0's thread limit and timers."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from functools import partial

import torch

from duoka.data_parallel.device_remap import RemapCuda, is_remapping
from duoka.data_parallel.messages import ContextFactory
from duoka.utils.rng_state import draw_seed_from_copy


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

    Both states are in host memory, so the host does not wait for the device.
    """
    seed = draw_seed_from_copy(2**62)
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


class Timers:
    """Seconds that rank 0 has spent on moving tensors and messages, and on waiting for workers."""

    def __init__(self) -> None:
        self.transfer_s = 0.0
        self.wait_s = 0.0

    @contextlib.contextmanager
    def transfer(self) -> Iterator[None]:
        """Count the ``with`` block as transfer; waits inside it count as waits."""
        begun, waited = time.perf_counter(), self.wait_s
        try:
            yield
        finally:
            self.transfer_s += time.perf_counter() - begun - (self.wait_s - waited)

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Count the ``with`` block as a wait for workers."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.wait_s += time.perf_counter() - begun


TIMERS = Timers()
