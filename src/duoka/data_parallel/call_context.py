"""Context of a call: torch modes and seed for workers; rank 0's thread limit and timers."""

import contextlib
import hashlib
import pickle
import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from duoka.data_parallel.device_remap import RemapCuda, is_remapping
from duoka.data_parallel.messages import ContextFactory
from duoka.utils.rng_state import state_of
from duoka.utils.torch_private import active_modes


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
    if (default := torch.get_default_device()).type != "cpu":
        modes.append(partial(torch.device, device if default.type == device.type else default))
    if is_remapping():
        modes.append(partial(RemapCuda, device))
    if context is not None:
        modes.append(context)
    return tuple(modes)


def unknown_mode() -> str:
    """Return why workers cannot repeat the active modes, which a program may have entered; empty if they can."""
    names = [type(mode).__name__.lstrip("_") for mode in active_modes() if not isinstance(mode, RemapCuda)]
    return f"the mode {names[0]} is active, which workers do not have" if names else ""


def draw_seed(device: torch.device, generators: Sequence[Any] = ()) -> int:
    """Return a seed that depends on the user's generators of all libraries, without advancing them.

    ``generators`` are further ones: those that the model owns. All states are in host memory, so the host does not
    wait for the device. A call that is repeated from the same states, as by checkpointing, gets the same seed.
    """
    states = [torch.get_rng_state(), np.random.get_state(), random.getstate()]  # noqa: NPY002
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    digest = hashlib.blake2b(digest_size=8)
    for state in (*states, *map(state_of, generators)):
        digest.update(pickle.dumps(state.numpy() if isinstance(state, torch.Tensor) else state))
    return int.from_bytes(digest.digest()) % 2**62


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
