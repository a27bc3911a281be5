"""Session of one run, which installs all patches of a script's process and removes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from duoka.data_parallel.call_context import TIMERS
from duoka.data_parallel.device_remap import remap_cuda
from duoka.script_runner.cuda_emulation import emulate_cuda
from duoka.script_runner.dataloader_hooks import install_loader_hooks
from duoka.script_runner.model_discovery import DOUBLE_BACKWARD, ModelFinder
from duoka.script_runner.nn_data_parallel import DataParallelHooks
from duoka.script_runner.patching import Patches
from duoka.script_runner.run_stats import RunStats
from duoka.script_runner.source_scan import differentiates_gradients
from duoka.utils.signals import handle_interrupt
from duoka.utils.torch_private import check_replace_call


class RunSession:
    """Parallelizes the models of the code that runs inside its ``with`` block."""

    def __init__(self, devices: Sequence[torch.device], *, scale_batch: bool = False, source: bytes = b"") -> None:
        """Prepare a run.

        Args:
            devices: the devices; on a single one the script runs as it does without duoka.
            scale_batch: whether training loaders multiply their batch size by the number of devices.
            source: the script's text, if it is known.
        """
        self.devices = tuple(devices)
        self.stats = RunStats(devices, TIMERS)
        if differentiates_gradients(source):
            self.stats.refuse_all(DOUBLE_BACKWARD)
        self.stats.scale_batch = scale_batch
        self._patches = Patches()

    def __enter__(self) -> RunSession:
        is_parallel, is_cpu = len(self.devices) > 1, self.devices[0].type == "cpu"
        patches, batch_factor = self._patches, len(self.devices) if self.stats.scale_batch else 1
        if is_parallel:
            check_replace_call()
            if is_cpu:
                patches.enter_context(emulate_cuda(len(self.devices)))
            patches.enter_context(remap_cuda())
            fits_one_device = is_cpu or batch_factor == 1  # a multiplied batch may exceed one GPU's memory
            ModelFinder(self.devices, self.stats, fits_one_device=fits_one_device).install(patches)
        DataParallelHooks(self.devices, self.stats).install(patches)
        install_loader_hooks(patches, self.stats, batch_factor)
        handle = register_optimizer_step_post_hook(lambda optimizer, *_: self.stats.on_step(optimizer))
        patches.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        interrupts: list[object] = []
        with handle_interrupt(lambda *_: interrupts.append(True)):  # not before the workers are released
            self._patches.close()
        if interrupts:
            raise KeyboardInterrupt
