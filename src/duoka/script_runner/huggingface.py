"""Hugging Face's Trainer under ``duoka run``: it sees one GPU, because duoka splits its batches.

With several GPUs the Trainer multiplies its batch size and its loss by their number, for ``nn.DataParallel``.
"""

import sys
from collections.abc import Callable

import torch

from duoka.script_runner.patching import Patches
from duoka.script_runner.run_stats import RunStats

_TRAINING_ARGUMENTS = "transformers.training_args"


def show_trainer_one_gpu(patches: Patches, stats: RunStats) -> None:
    """Let ``TrainingArguments`` count one GPU until the patches end."""

    def device_count(original: Callable[[], int]) -> int:
        if sys._getframe(2).f_globals.get("__name__") != _TRAINING_ARGUMENTS:  # frame 1 is the patch
            return original()
        stats.add_note(
            "Hugging Face's Trainer sees one GPU, and duoka splits its batches: per_device_train_batch_size is the size "
            "of a whole batch."
        )
        return min(1, original())

    patches.wrap(torch.cuda, "device_count", device_count)
