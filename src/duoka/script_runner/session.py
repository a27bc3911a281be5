"""Session of one run, which installs all patches of a script's process and removes them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from duoka.data_parallel.call_context import TIMERS
from duoka.data_parallel.device_remap import remap_cuda
from duoka.script_runner.child_processes import note_python_processes
from duoka.script_runner.cuda_emulation import emulate_cuda
from duoka.script_runner.dataloader_hooks import install_loader_hooks
from duoka.script_runner.model_discovery import ModelFinder, refuse_double_backward
from duoka.script_runner.nn_data_parallel import DataParallelHooks
from duoka.script_runner.patching import Patches
from duoka.script_runner.report import describe_devices
from duoka.script_runner.run_stats import RunStats
from duoka.script_runner.trainer_gpu_count import show_trainers_one_gpu
from duoka.utils.signals import handle_interrupt
from duoka.utils.torch_private import check_replace_call
from duoka.workers.environment import DEVICE_VARIABLES, keep_device_variables


class RunSession:
    """Parallelizes the models of the code that runs inside its ``with`` block."""

    def __init__(
        self,
        devices: Sequence[torch.device],
        *,
        scale_batch: bool = False,
        source: bytes = b"",
        numbers: Sequence[int] = (),
    ) -> None:
        """Prepare a run.

        Args:
            devices: the devices; on a single one the script runs as it does without duoka.
            scale_batch: whether training loaders multiply their batch size by the number of devices.
            source: the script's text, if it is known.
            numbers: the numbers by which the user named GPUs that this process sees as 0, 1, ...
        """
        self.devices, self._numbers = tuple(devices), tuple(numbers)
        self.stats = RunStats(devices, TIMERS)
        refuse_double_backward(source, self.stats)
        self.stats.scale_batch = scale_batch
        self._patches = Patches()
        self._device_variables: dict[str, str] | None = None
        """Those of the beginning, in a run on several devices."""

    def __enter__(self) -> RunSession:
        is_parallel, is_cpu = len(self.devices) > 1, self.devices[0].type == "cpu"
        patches, batch_factor = self._patches, len(self.devices) if self.stats.scale_batch else 1
        if is_parallel:
            check_replace_call()
            self._device_variables = patches.enter_context(keep_device_variables())
            if is_cpu:
                patches.enter_context(emulate_cuda(len(self.devices)))
                note_python_processes(patches, self.stats)
            elif (
                self.devices[0].type == "cuda"
            ):  # now, so that the script's CUDA_VISIBLE_DEVICES cannot change the numbers
                torch.cuda.init()  # type: ignore[no-untyped-call]
                torch.cuda.device_count()
            show_trainers_one_gpu(patches, self.stats)
            patches.enter_context(remap_cuda())
            fits_one_device = is_cpu or batch_factor == 1  # a multiplied batch may exceed one GPU's memory
            ModelFinder(self.devices, self.stats, fits_one_device=fits_one_device).install(patches)
        DataParallelHooks(self.devices, self.stats, self._numbers).install(patches)
        install_loader_hooks(patches, self.stats, batch_factor)
        handle = register_optimizer_step_post_hook(lambda optimizer, *_: self.stats.on_step(optimizer))
        patches.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._note_device_variables()
        interrupts: list[object] = []
        with handle_interrupt(lambda *_: interrupts.append(True)):  # not before the workers are released
            self._patches.close()
        if interrupts:
            raise KeyboardInterrupt

    def _note_device_variables(self) -> None:
        """Add a note about each variable by which the script has tried to choose devices."""
        before = self._device_variables
        if before is None:
            return
        for name in (name for name in DEVICE_VARIABLES if name.endswith("VISIBLE_DEVICES")):
            if (now := os.environ.get(name)) != before.get(name):
                self.stats.add_note(
                    f"The script sets {name}={now or ''}, which changes nothing here: the run keeps "
                    f"{describe_devices(self.devices)}. Choose devices with --device."
                )
