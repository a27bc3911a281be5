"""One run of a script: what it sees, what is shared out, and what is said at the end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from duoka.mirror.clock import CLOCK
from duoka.mirror.naming import renaming
from duoka.script.account import Account
from duoka.script.loaders import watch_loaders
from duoka.script.patches import Patches
from duoka.script.rehearsal import rehearsal
from duoka.script.sources import differentiates_gradients
from duoka.script.wrapping import DOUBLE_BACKWARD, Finder

__all__ = ["Session"]


class Session:
    """Shares out the models of the code that runs inside its ``with`` block."""

    def __init__(self, devices: Sequence[torch.device], *, scale_batch: bool = False, source: bytes = b"") -> None:
        """Prepare for these devices; one device shares nothing. ``source`` is the script's text, as far as it is known."""
        self.devices = tuple(devices)
        self.account = Account(devices, CLOCK)
        if differentiates_gradients(source):
            self.account.refuse_all(DOUBLE_BACKWARD)
        self.account.scales = scale_batch
        self._factor = len(self.devices) if scale_batch else 1
        self._patches = Patches()

    def __enter__(self) -> Session:
        patches = self._patches
        if len(self.devices) > 1 and self.devices[0].type == "cpu":
            patches.enter_context(rehearsal(len(self.devices)))
        # A batch that was multiplied may be too large for the memory of one accelerator.
        fits_one = self._factor == 1 or self.devices[0].type == "cpu"
        finder = Finder(self.devices, self.account, fits_one=fits_one)
        finder.watch_wrappers(patches)
        if len(self.devices) > 1:
            patches.enter_context(renaming())
            finder.enter(patches)
        watch_loaders(patches, self.account, self._factor)
        handle = register_optimizer_step_post_hook(lambda optimizer, *_: self.account.stepped(optimizer))
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
