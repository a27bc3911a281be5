"""Context of a call: rank 0's torch modes and seed, applied in workers; and rank 0's thread limit."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch

from duoka.data_parallel.device_remap import RemapCuda, is_remapping
from duoka.data_parallel.messages import ContextFactory, TorchModes
from duoka.utils.torch_settings import apply_torch_settings, capture_torch_settings

_SETTINGS = ("default_dtype", "deterministic", "float32_matmul_precision")


def capture_modes(device: torch.device, context: ContextFactory | None = None) -> TorchModes:
    """Return the current modes; workers also enter ``context()``."""
    return TorchModes(
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted({"cpu", device.type})
        ),
        torch.is_autocast_cache_enabled(),
        capture_torch_settings(_SETTINGS),
        is_remapping(),
        context,
    )


@contextlib.contextmanager
def apply_modes(modes: TorchModes, device: torch.device) -> Iterator[None]:
    """Apply the modes inside the ``with`` block, in a worker; process-wide settings stay."""
    apply_torch_settings(modes.settings)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(modes.inference))
        stack.enter_context(torch.set_grad_enabled(modes.grad))
        for kind, is_enabled, dtype in modes.autocast:
            if is_enabled:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=modes.autocast_cache))
        if modes.remap_cuda:
            stack.enter_context(RemapCuda(device))
        if modes.context is not None:
            stack.enter_context(modes.context())
        yield


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
