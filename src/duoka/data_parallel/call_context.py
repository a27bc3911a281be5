"""The modes around a call: captured in the user's process, entered by a helper; and the threads of the one and the other."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from duoka.data_parallel.device_remap import RemapCuda, is_renaming
from duoka.data_parallel.messages import TorchModes

__all__ = ["ThreadLimit", "capture", "draw_seed", "entered", "kept", "seed_all"]


def capture(device: torch.device) -> TorchModes:
    """Return the modes that hold here and now."""
    kinds = {"cpu", device.type}
    return TorchModes(
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        torch.get_float32_matmul_precision(),
        is_renaming(),
    )


@contextlib.contextmanager
def entered(ambient: TorchModes, device: torch.device) -> Iterator[None]:
    """Let the modes hold inside the ``with`` block, on a helper's device."""
    _set_lasting(ambient)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(ambient.inference))
        stack.enter_context(torch.set_grad_enabled(ambient.grad))
        for kind, is_enabled, dtype in ambient.autocast:
            if is_enabled:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=ambient.autocast_cache))
        if ambient.own_device:
            stack.enter_context(RemapCuda(device))
        if ambient.within is not None:
            stack.enter_context(ambient.within())
        yield


@contextlib.contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Give the process its own modes back after the ``with`` block."""
    before = capture(device)
    try:
        yield
    finally:
        _set_lasting(before)


def _set_lasting(ambient: TorchModes) -> None:
    """Set the modes that hold for a whole process."""
    if torch.get_default_dtype() != ambient.default_dtype:
        torch.set_default_dtype(ambient.default_dtype)
    if torch.get_float32_matmul_precision() != ambient.precision:
        torch.set_float32_matmul_precision(ambient.precision)
    now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if now != ambient.deterministic:
        torch.use_deterministic_algorithms(ambient.deterministic[0], warn_only=ambient.deterministic[1])


def draw_seed(device: torch.device) -> int:
    """Return a seed that follows from the user's generators, the host's and the device's, and leave them as they are.

    A model that draws random numbers moves one of them on in the user's process too, so the next call has another seed. Both
    states are in the host's memory; nobody waits for the device.
    """
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    seed = int(torch.randint(2**62, (), generator=generator))
    if device.type == "cpu":
        return seed
    state = torch.get_device_module(device).get_rng_state(device)
    return (seed + int.from_bytes(hashlib.blake2b(state.numpy(), digest_size=8).digest())) % 2**62


def seed_all(seed: int) -> None:
    """Seed every generator that a model may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - user code may draw from the global generator


class ThreadLimit:
    """Compute threads of the user's process: fewer while helpers compute beside it, the user's own number otherwise."""

    def __init__(self, while_shared: int) -> None:
        self.while_shared = while_shared
        self._own: int | None = None

    def share(self) -> None:
        """Helpers begin to compute."""
        if self._own is None and torch.get_num_threads() > self.while_shared:
            self._own = torch.get_num_threads()
            torch.set_num_threads(self.while_shared)

    def give_back(self) -> None:
        """Helpers are done."""
        if self._own is not None:
            if torch.get_num_threads() == self.while_shared:  # else the user has set another number meanwhile
                torch.set_num_threads(self._own)
            self._own = None
