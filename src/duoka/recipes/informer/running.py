"""What both tasks of the recipe do around a training: the learning rate's course, where predictions go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from duoka.recipes.informer.options import Config
from duoka.recipes.runs import Run

__all__ = ["predictions_of", "schedule"]


def schedule(config: Config) -> dict[str, Any]:
    """Return the trainer's options for the learning rate's course."""
    if config.scheduler == "halving":
        return {"scheduler": _halving, "scheduler_interval": "epoch"}
    return {"scheduler": "cosine", "scheduler_interval": "step"} if config.scheduler == "cosine" else {}


def _halving(optimizer: Optimizer) -> LambdaLR:
    """Keep the rate for two epochs, then halve it after each, as the authors' code does."""
    return LambdaLR(optimizer, lambda epoch: 0.5 ** max(0, epoch - 1))


def predictions_of(run: Run, source: str, ending: str) -> Path:
    """Return the file that predictions for the table ``source`` are written to."""
    return run.folder / "predictions" / f"{Path(source).stem}{ending}"
