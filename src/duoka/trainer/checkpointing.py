"""What a fit keeps on disk to go on from: one training checkpoint, the best weights in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from duoka.checkpoint import (
    load_optimizer_state,
    load_state,
    load_training,
    model_state,
    optimizer_state,
    rng_state,
    save_training,
)
from duoka.errors import CheckpointError
from duoka.log import logger
from duoka.trainer.callbacks import State, fields_to_keep, set_fields
from duoka.trainer.config import TrainerConfig
from duoka.trainer.model_with_loss import ModelWithLoss
from duoka.trainer.train_step import TrainStep
from duoka.world import World

__all__ = [
    "BestWeights",
    "TrainCheckpoint",
    "checkpoint_path",
    "find_checkpoint",
    "is_own",
    "on_main",
    "weights_path",
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


def is_own(path: Path | None, out_dir: str | Path | None) -> bool:
    """Whether ``path`` is the checkpoint of the run in ``out_dir`` itself, which so goes on; else one begins there."""
    return path is not None and out_dir is not None and path.resolve() == checkpoint_path(out_dir).resolve()


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
        result, failure = world.broadcast_object((None, ""))
        if failure:
            raise CheckpointError(f"rank 0: {failure}")
        return result  # type: ignore[return-value]
    try:
        result = work()
    except Exception as error:
        world.broadcast_object((None, f"{type(error).__name__}: {error}"))
        raise
    world.broadcast_object((result, ""))
    return result


@dataclass
class TrainCheckpoint:
    """The parts of a fit that a training checkpoint holds."""

    objective: ModelWithLoss
    stepper: TrainStep
    state: State
    best_weights: BestWeights
    monitor: str | None
    """What says which evaluation is the best."""
    world: World

    def write(self, path: Path, position: Mapping[str, int]) -> None:
        """Write the training checkpoint; every rank has to call it, rank 0 writes."""
        objective, stepper = self.objective, self.stepper
        ranks = self.world.all_gather_object({"rng": rng_state(), "tally": stepper.tally.read()})
        if not self.world.is_main:
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
                "state": fields_to_keep(self.state),
                "best_weights": self.best_weights.kept,
                "monitor": self.monitor,
                "ranks": ranks,
            },
        )

    def restore(self, path: Path) -> tuple[dict[str, int], Any]:
        """Continue from a training checkpoint; return the data position, and this rank's random state or ``None``.

        Rank 0 reads the file, so that it need not be on every machine. Where another number of ranks wrote it there is no
        random state for each, and the training loss of the running epoch is carried on by rank 0.

        Raises:
            CheckpointError: the file is no checkpoint of a Trainer, or one of another model, optimiser or schedule.

        """
        objective, stepper = self.objective, self.stepper
        kept = on_main(self.world, lambda: self._read(path))
        self._check_optimizer(path, kept)
        stepper.schedule.load_state_dict(kept["schedule"])
        load_state(objective.model, kept["model"], source=str(path))
        if isinstance(objective.loss, torch.nn.Module):
            load_state(objective.loss, kept["loss"], source=str(path))
        load_optimizer_state(stepper.optimizer, objective, kept["optimizer"])
        if stepper.scaler is not None and kept["scaler"]:
            stepper.scaler.load_state_dict(kept["scaler"])
        set_fields(self.state, kept["state"])
        self._restore_best(path, kept.get("monitor"), has_weights=kept["has_best"])
        return kept["position"], self._restore_rank(kept["ranks"])

    def _read(self, path: Path) -> dict[str, Any]:
        """Read the file on rank 0, where the best weights stay."""
        kept = load_training(path)
        if missing := {"model", "optimizer", "schedule", "position", "state", "ranks"} - kept.keys():
            raise CheckpointError(
                f"{path} is no checkpoint of a Trainer: it has {', '.join(map(str, kept)) or 'nothing'} and not "
                f"{', '.join(sorted(missing))}; resume from the checkpoint/last.pt of a Trainer's out_dir, or begin a new run "
                f"with its weights: duoka.load({str(path)!r}, into=model)"
            )
        self.best_weights.kept = kept.pop("best_weights", {})
        return {**kept, "has_best": bool(self.best_weights.kept)}

    def _check_optimizer(self, path: Path, kept: Mapping[str, Any]) -> None:
        mine = type(self.stepper.optimizer).__name__
        theirs = kept.get("optimizer_name", mine)  # files of before do not say
        if theirs != mine:
            raise CheckpointError(
                f"{path}: the checkpoint is of {theirs}, this Trainer has {mine}; resume with optimizer={theirs.lower()!r}, "
                "or begin a new run with its weights: duoka.load('model.safetensors', into=model)"
            )

    def _restore_best(self, path: Path, monitor: str | None, *, has_weights: bool) -> None:
        """Forget the best evaluation where its weights are not there, or where something else says now what is best."""
        state = self.state
        if state.best is not None and (not has_weights or monitor != self.monitor):
            why = f"its best is by {monitor!r}" if has_weights else "it does not hold the best weights"
            if self.world.is_main:
                logger.warning("%s: %s, and monitor=%r now; the best is looked for anew", path, why, self.monitor)
            state.best, state.bad_evaluations = None, 0
            self.best_weights.kept = {}

    def _restore_rank(self, ranks: list[dict[str, Any]]) -> Any:
        tally, world = self.stepper.tally, self.world
        same = len(ranks) == world.size
        if same:
            tally.restore(ranks[world.rank]["tally"])
        elif world.is_main:
            tally.restore((sum(rank["tally"][0] for rank in ranks), sum(rank["tally"][1] for rank in ranks)))
        return ranks[world.rank]["rng"] if same else None


class BestWeights:
    """The weights of the best evaluation, on rank 0: in memory, and in every checkpoint, so that they cannot part from it."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        """Values by name, on the CPU; empty where there was no evaluation yet."""

    def keep(self, model: torch.nn.Module) -> None:
        """Keep the weights that ``model`` has now."""
        self.kept = {name: _copy(value) for name, value in model_state(model).items()}

    def load(self, model: torch.nn.Module) -> None:
        """Put the kept weights back into ``model``."""
        load_state(model, self.kept)


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value
