"""GPU count for trainers of other libraries: one under ``duoka run``, because duoka splits their batches.

With several GPUs Hugging Face's Trainer multiplies its batch size and its loss by their number, for
``nn.DataParallel``; Lightning's default Trainer starts one process for each.
"""

import sys
from collections.abc import Callable
from types import FrameType

import torch

from duoka.script_runner.patching import Patches
from duoka.script_runner.run_stats import RunStats

_HUGGING_FACE = (
    "Hugging Face's Trainer sees one GPU, and duoka splits its batches: per_device_train_batch_size is the size of a "
    "whole batch."
)
_LIGHTNING = "Lightning's Trainer sees one GPU, and duoka splits its batches: leave devices out, or write devices=1."


def show_trainers_one_gpu(patches: Patches, stats: RunStats) -> None:
    """Let trainers that use all GPUs without a request count one, until the patches end."""

    def device_count(original: Callable[[], int]) -> int:
        note = _note_for(sys._getframe(2))  # frame 1 is the patch
        if not note or original() < 2:
            return original()
        stats.add_note(note)
        return 1

    patches.wrap(torch.cuda, "device_count", device_count)


def _note_for(caller: FrameType) -> str:
    """Return the note for a trainer that counts GPUs; empty for any other caller."""
    name = str(caller.f_globals.get("__name__"))
    if name == "transformers.training_args":
        return _HUGGING_FACE
    is_automatic = caller.f_back is not None and caller.f_back.f_code.co_name == "auto_device_count"
    return _LIGHTNING if is_automatic and name.endswith("fabric.accelerators.cuda") else ""
