"""What a fit keeps on disk to go on from: the training checkpoint, and the best weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from duoka import checkpoint
from duoka.checkpoint import (
    load_optimizer_state,
    load_state,
    load_training,
    model_state,
    optimizer_state,
    save_training,
)
from duoka.errors import CheckpointError
from duoka.trainer.callbacks import State, fields_to_keep, set_fields
from duoka.trainer.config import TrainerConfig
from duoka.trainer.objective import Objective
from duoka.trainer.stepping import Stepper
from duoka.world import World

__all__ = [
    "BestWeights",
    "checkpoint_path",
    "find_checkpoint",
    "on_main",
    "restore_training",
    "weights_path",
    "write_training",
]

T = TypeVar("T")


def checkpoint_path(out_dir: str | Path) -> Path:
    """Return where a run's training checkpoint lies."""
    return Path(out_dir) / "checkpoint" / "last.pt"


def find_checkpoint(config: TrainerConfig) -> Path | None:
    """Return the checkpoint that ``config.resume`` asks for, ``None`` to begin anew.

    Raises:
        CheckpointError: it has to be there and is not.

    """
    if config.resume is False:
        return None
    if config.resume is True or config.resume == "auto":
        assert config.out_dir is not None  # TrainerConfig has checked
        path = checkpoint_path(config.out_dir)
    else:
        path = Path(config.resume)
        path = checkpoint_path(path) if path.is_dir() else path
    if path.exists():
        return path
    if config.resume == "auto":
        return None
    raise CheckpointError(
        f"there is no checkpoint {path} to resume from; resume='auto' begins anew where there is none"
    )


def weights_path(config: TrainerConfig, save_model: bool, model_path: str | Path | None) -> Path | None:
    """Return where the weights that ``fit`` ends with are written, ``None`` for nowhere."""
    if not save_model:
        return None
    if model_path is not None:
        return Path(model_path)
    return None if config.out_dir is None else Path(config.out_dir) / "model.safetensors"


def on_main(world: World, work: Callable[[], T]) -> T:
    """Return on every rank what ``work`` returns on rank 0; where it fails there, no rank is left waiting.

    Raises:
        CheckpointError: on the other ranks, with rank 0's words; rank 0 raises what ``work`` did.

    """
    if not world.is_main:
        result, failure = world.broadcast((None, ""))
        if failure:
            raise CheckpointError(f"rank 0: {failure}")
        return result  # type: ignore[return-value]
    try:
        result = work()
    except Exception as error:
        world.broadcast((None, f"{type(error).__name__}: {error}"))
        raise
    world.broadcast((result, ""))
    return result


def write_training(
    path: Path,
    objective: Objective,
    stepper: Stepper,
    state: State,
    position: Mapping[str, int],
    rng: Any,
    world: World,
) -> None:
    """Write the training checkpoint; every rank has to call it, rank 0 writes."""
    mine = {"rng": rng, "tally": stepper.tally.read()}
    ranks = world.gather(mine)
    if not world.is_main:
        return
    loss = objective.loss
    save_training(
        path,
        {
            "model": model_state(objective.model),
            "loss": model_state(loss) if isinstance(loss, torch.nn.Module) else {},
            "optimizer": optimizer_state(stepper.optimizer, objective),
            "optimizer_name": type(stepper.optimizer).__name__,
            "schedule": stepper.schedule.state_dict(),
            "scaler": {} if stepper.scaler is None else stepper.scaler.state_dict(),
            "position": dict(position),
            "state": fields_to_keep(state),
            "ranks": ranks,
        },
    )


def restore_training(
    path: Path, objective: Objective, stepper: Stepper, state: State, world: World
) -> tuple[dict[str, int], Any]:
    """Continue from a training checkpoint; return the data position, and this rank's random state or ``None``.

    Rank 0 reads the file, so that it need not be on every machine. Where another number of ranks wrote it there is no
    random state for each, and the training loss of the running epoch is carried on by rank 0.
    """
    kept = on_main(world, lambda: load_training(path))
    mine = type(stepper.optimizer).__name__
    theirs = kept.get("optimizer_name", mine)  # files of before do not say
    if theirs != mine:
        raise CheckpointError(
            f"{path}: the checkpoint is of {theirs}, this Trainer has {mine}; resume with optimizer={theirs.lower()!r}, or "
            "begin a new run with its weights: duoka.load('model.safetensors', into=model)"
        )
    stepper.schedule.load_state_dict(kept["schedule"])
    load_state(objective.model, kept["model"], source=str(path))
    if isinstance(objective.loss, torch.nn.Module):
        load_state(objective.loss, kept["loss"], source=str(path))
    load_optimizer_state(stepper.optimizer, objective, kept["optimizer"])
    if stepper.scaler is not None and kept["scaler"]:
        stepper.scaler.load_state_dict(kept["scaler"])
    set_fields(state, kept["state"])
    ranks = kept["ranks"]
    same = len(ranks) == world.size
    if same:
        stepper.tally.restore(ranks[world.rank]["tally"])
    elif world.is_main:
        stepper.tally.restore((sum(rank["tally"][0] for rank in ranks), sum(rank["tally"][1] for rank in ranks)))
    return kept["position"], ranks[world.rank]["rng"] if same else None


class BestWeights:
    """The weights of the best evaluation: in a file where there is a folder or a path for it, else in memory. Rank 0 only."""

    def __init__(self, config: TrainerConfig, path: Path | None) -> None:
        fallback = None if config.out_dir is None else Path(config.out_dir) / "checkpoint" / "best.pt"
        self.path = path or fallback
        self._kept: dict[str, Any] | None = None

    def keep(self, model: torch.nn.Module) -> None:
        """Keep the weights that ``model`` has now."""
        if self.path is not None:
            checkpoint.save(model, self.path)
        else:
            self._kept = {name: _copy(value) for name, value in model_state(model).items()}

    def load(self, model: torch.nn.Module) -> bool:
        """Put the kept weights back into ``model``; return whether there were any."""
        if self.path is not None and self.path.exists():
            checkpoint.load(self.path, into=model)
            return True
        if self._kept is not None:
            load_state(model, self._kept)
        return self._kept is not None


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value
