"""What both tasks of the recipe do around a training: the run's folder, the learning rate's course, where predictions go."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from duoka import current_world, launch
from duoka.recipes.informer.options import NAME, Config
from duoka.recipes.runs import ConfigWriter, Run

__all__ = ["folder_of", "predictions_of", "run_options", "schedule"]


def folder_of(config: Config) -> Run:
    """Return the run's folder, the same for every rank of a job that others started; made if it is new."""
    run = launch(_folder_on_main, config, devices=config.device)
    assert run is not None
    return run


def _folder_on_main(config: Config) -> Run | None:
    if not current_world().is_main:
        return None
    assert config.name is not None
    return Run.at(config.resume) if config.resume else Run.new(config.out, NAME, config.name)


def run_options(run: Run, config: Config) -> dict[str, Any]:
    """Return the trainer's options for the run's folder; its configuration is written when a checkpoint was accepted."""
    return {
        "out_dir": run.folder,
        "resume": "auto" if config.resume else False,
        "callbacks": [ConfigWriter(run, NAME, dataclasses.replace(config, resume=None))],
    }


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
