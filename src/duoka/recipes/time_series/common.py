"""What both tasks of the recipe do around a training: the learning rate's course, where predictions go."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from duoka.errors import DataError
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.time_series.config import TimeSeriesConfig

__all__ = ["check_finite", "file_names", "next_step", "predictions_of", "schedule"]


def schedule(config: TimeSeriesConfig) -> dict[str, Any]:
    """Return the trainer's options for the learning rate's course."""
    if config.scheduler == "halving":
        return {"scheduler": _halving, "scheduler_interval": "epoch"}
    return {"scheduler": "cosine", "scheduler_interval": "step"} if config.scheduler == "cosine" else {}


def _halving(optimizer: Optimizer) -> LambdaLR:
    """Keep the rate for two epochs, then halve it after each, as the authors' code does."""
    return LambdaLR(optimizer, lambda epoch: 0.5 ** max(0, epoch - 1))


def check_finite(predicted: Tensor) -> None:
    """Make sure that a model says numbers.

    Raises:
        DataError: it does not.

    """
    if not bool(predicted.isfinite().all()):
        raise DataError(
            "the model's answers are no numbers: either its training went astray, so begin it again with a smaller --lr (and "
            "--precision fp32), or it was given numbers that are far from those it learnt from"
        )


def next_step(run: RecipeRun, source: str) -> str:
    """Return the command that predicts with the finished ``run``, as a shell reads it."""
    return shlex.join(("duoka", "predict", str(run.folder), "--from", source))


def file_names(names: Sequence[str]) -> list[str]:
    """Return a word for the file of each column: letters and digits, no two alike on any file system.

    >>> file_names(["Q (m3/s)", "Q [m3/s]", "油温"])
    ['Q__m3_s_', 'Q__m3_s_-2', '油温']
    """
    found: list[str] = []
    for name in names:
        word = "".join(letter if letter.isalnum() else "_" for letter in name)
        taken = sum(other.partition("-")[0].lower() == word.lower() for other in found)
        found.append(f"{word}-{taken + 1}" if taken else word)
    return found


def predictions_of(run: RecipeRun, source: str, ending: str) -> Path:
    """Return the file that predictions for the table ``source`` are written to."""
    return run.folder / "predictions" / f"{Path(source).stem}{ending}"
