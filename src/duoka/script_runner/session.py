"""One run of a script: what it sees, what is shared out, and what is said at the end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from duoka.data_parallel.device_remap import renaming
from duoka.data_parallel.timers import CLOCK
from duoka.script_runner.cuda_emulation import emulate_cuda
from duoka.script_runner.dataloader_hooks import watch_loaders
from duoka.script_runner.model_discovery import DOUBLE_BACKWARD, ModelFinder
from duoka.script_runner.patching import Patches
from duoka.script_runner.run_stats import RunStats
from duoka.script_runner.source_scan import differentiates_gradients

__all__ = ["RunSession"]


class RunSession:
    """Shares out the models of the code that runs inside its ``with`` block."""

    def __init__(self, devices: Sequence[torch.device], *, scale_batch: bool = False, source: bytes = b"") -> None:
        """Prepare for these devices; one device shares nothing. ``source`` is the script's text, as far as it is known."""
        self.devices = tuple(devices)
        self.stats = RunStats(devices, CLOCK)
        if differentiates_gradients(source):
            self.stats.refuse_all(DOUBLE_BACKWARD)
        self.stats.scales = scale_batch
        self._factor = len(self.devices) if scale_batch else 1
        self._patches = Patches()

    def __enter__(self) -> RunSession:
        patches = self._patches
        if len(self.devices) > 1 and self.devices[0].type == "cpu":
            patches.enter_context(emulate_cuda(len(self.devices)))
        # A batch that was multiplied may be too large for the memory of one accelerator.
        fits_one = self._factor == 1 or self.devices[0].type == "cpu"
        finder = ModelFinder(self.devices, self.stats, fits_one=fits_one)
        finder.track_wrappers(patches)
        if len(self.devices) > 1:
            patches.enter_context(renaming())
            finder.enter(patches)
        watch_loaders(patches, self.stats, self._factor)
        handle = register_optimizer_step_post_hook(lambda optimizer, *_: self.stats.stepped(optimizer))
        patches.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        with _interrupts_later():
            self._patches.close()


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Let Ctrl-C, or one more, wait until helpers are given back: that takes no time, and half of it helps nobody."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
    if pressed:
        raise KeyboardInterrupt
