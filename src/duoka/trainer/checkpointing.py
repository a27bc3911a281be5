"""Training checkpoint of a fit: one file, with the best weights in it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from duoka import checkpoint
from duoka.checkpoint.optimizer import optimizer_bytes
from duoka.checkpoint.sanitize import tensor_bytes
from duoka.errors import CheckpointError, CheckpointFormatError
from duoka.log import logger
from duoka.trainer.callbacks import State
from duoka.trainer.checkpoint_files import next_path, rotate, set_aside, warn_of_damage
from duoka.trainer.checkpoint_form import check_against, check_optimizer, check_training
from duoka.trainer.model_with_loss import ModelWithLoss
from duoka.trainer.train_step import TrainStep
from duoka.utils.rng_state import rng_state
from duoka.world import World

T = TypeVar("T")


def run_on_rank_zero(world: World, function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0 and return its result on every rank; an error there ends the wait of all ranks.

    Raises:
        CheckpointError: on the other ranks, with rank 0's message; rank 0 raises the original error.

    """
    try:
        mine = (function() if world.is_main else None, "")
    except Exception as error:
        world.broadcast_object((None, f"{type(error).__name__}: {error}"))
        raise
    result, failure = world.broadcast_object(mine)
    if failure:
        raise CheckpointError(f"rank 0: {failure}")
    return result  # type: ignore[return-value]


@dataclass
class TrainCheckpoint:
    """The parts of a fit that a training checkpoint holds."""

    module: ModelWithLoss
    train_step: TrainStep
    state: State
    monitor: str | None
    """Name of the result that selects the best weights."""
    world: World
    best_weights: dict[str, Any] = field(default_factory=dict)
    """State dict of the best evaluation, on rank 0's CPU; empty before the first."""
    has_unused_parameters: bool | None = None
    """What the first step has found; ``None`` before it, and on one rank."""
    keep: int = 2
    """Number of checkpoints that stay on disk."""
    damaged: list[Path] = field(default_factory=list)
    """Files that could not be read, on rank 0."""

    def keep_best_weights(self) -> None:
        """Copy the model's current weights."""
        self.best_weights = {
            name: value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value
            for name, value in checkpoint.model_state(self.module.model).items()
        }

    def write(self, path: Path, position: Mapping[str, int]) -> None:
        """Write the checkpoint from rank 0, and keep those before it; every rank must call this."""
        module, step = self.module, self.train_step
        ranks = self.world.all_gather_object({"rng": rng_state(), "loss_meter": step.loss_meter.read()})
        if not self.world.is_main:
            return
        loss = module.loss
        set_aside(self.damaged, path)
        self.damaged = []
        checkpoint.save_training(
            next_path(path),
            {
                "model": checkpoint.model_state(module.model),
                "loss": checkpoint.model_state(loss) if isinstance(loss, torch.nn.Module) else {},
                "optimizer": checkpoint.optimizer_state(step.optimizer, module),
                "optimizer_name": type(step.optimizer).__name__,
                "schedule": step.schedule.state_dict(),
                "scaler": {} if step.scaler is None else step.scaler.state_dict(),
                "position": dict(position),
                "state": self.state.checkpoint_fields(),
                "best_weights": self.best_weights,
                "monitor": self.monitor,
                "has_unused_parameters": self.has_unused_parameters,
                "ranks": ranks,
            },
        )
        rotate(path, self.keep)

    def size_bytes(self) -> tuple[int, int]:
        """Return about how many bytes a checkpoint and the model's weights will at least take on disk."""
        weights = tensor_bytes(checkpoint.model_state(self.module.model))
        loss = (
            tensor_bytes(checkpoint.model_state(self.module.loss))
            if isinstance(self.module.loss, torch.nn.Module)
            else 0
        )
        state = optimizer_bytes(self.train_step.optimizer, unknown=0)  # a guess must not refuse a run that fits
        return weights * (2 if self.monitor else 1) + loss + state, weights

    def restore(self, paths: Sequence[Path]) -> tuple[Path, dict[str, int], Any]:
        """Continue from the first of ``paths`` that is not damaged.

        Return its path, the data position, and this rank's random state or ``None``.

        Rank 0 reads the file, so other machines do not need it. If the number of ranks has changed, there is no random
        state, and rank 0 continues the training loss of the current epoch.

        Raises:
            CheckpointError: the file is not a Trainer's checkpoint, or its model, optimizer or schedule differs.

        """
        module, step = self.module, self.train_step
        path, saved = run_on_rank_zero(self.world, lambda: self._read_newest(paths))
        mine, theirs = type(step.optimizer).__name__, saved["optimizer_name"]
        if theirs != mine:
            raise CheckpointError(
                f"{path}: the checkpoint has the optimizer {theirs}, this Trainer has {mine}; resume with "
                f"optimizer={theirs.lower()!r}, or begin a new run with its weights: "
                "duoka.load('model.safetensors', into=model)"
            )
        self._check_forms(path, saved)
        step.schedule.load_state_dict(saved["schedule"])
        checkpoint.load_state(module.model, saved["model"], source=str(path))
        if isinstance(module.loss, torch.nn.Module):
            checkpoint.load_state(module.loss, saved["loss"], source=str(path))
        checkpoint.load_optimizer_state(step.optimizer, module, saved["optimizer"])
        if step.scaler is not None and saved["scaler"]:
            step.scaler.load_state_dict(saved["scaler"])
        self.state.restore(saved["state"])
        self.has_unused_parameters = saved["has_unused_parameters"]
        self._check_best(path, saved["monitor"], has_weights=saved["has_best"])
        ranks, world = saved["ranks"], self.world
        if len(ranks) == world.size:
            step.loss_meter.restore(ranks[world.rank]["loss_meter"])
            return path, saved["position"], ranks[world.rank]["rng"]
        if world.is_main:
            totals, weights = zip(*(rank["loss_meter"] for rank in ranks), strict=True)
            step.loss_meter.restore((sum(totals), sum(weights)))
        return path, saved["position"], None

    def _read_newest(self, paths: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
        """Read the first of ``paths`` that is not damaged; raises the first error if all are, or one of another format."""
        errors: list[CheckpointError] = []
        for path, older in zip(paths, [*paths[1:], None], strict=True):
            try:
                return path, self._read(path)
            except CheckpointFormatError:
                raise
            except CheckpointError as error:
                errors.append(error)
                self.damaged.append(path)
                if older is not None:
                    warn_of_damage(error, older)
        raise errors[0]

    def _read(self, path: Path) -> dict[str, Any]:
        """Read the file on rank 0, which keeps the best weights."""
        saved = checkpoint.load_training(path)
        if missing := {"model", "optimizer", "schedule", "position", "state", "ranks"} - saved.keys():
            raise CheckpointFormatError(
                f"{path} is not a Trainer's checkpoint: it has {', '.join(map(str, saved)) or 'nothing'} and lacks "
                f"{', '.join(sorted(missing))}; resume from the checkpoint/last.pt of a Trainer's out_dir, or begin a new run "
                f"with its weights: duoka.load({str(path)!r}, into=model)"
            )
        check_training(saved, path)
        self.best_weights = saved.pop("best_weights", {})
        return {**saved, "has_best": bool(self.best_weights)}

    def _check_forms(self, path: Path, saved: dict[str, Any]) -> None:
        """Refuse state of schedule, scaler and optimizer that they would take and then fail on."""
        step = self.train_step
        scheduler = step.schedule.scheduler
        if saved["schedule"]["signature"] == step.schedule.signature:
            check_against(saved["schedule"]["peak_lrs"], step.schedule.peak_lrs, "schedule.peak_lrs", path)
            if scheduler is not None and type(scheduler).__module__.startswith("torch.optim."):
                check_against(saved["schedule"]["scheduler"], scheduler.state_dict(), "schedule.scheduler", path)
        if step.scaler is not None and saved["scaler"]:
            check_against(saved["scaler"], step.scaler.state_dict(), "scaler", path)
        sizes = {name: parameter.shape for name, parameter in self.module.named_parameters()}
        check_optimizer(saved["optimizer"], step.optimizer, sizes, path)

    def _check_best(self, path: Path, monitor: str | None, *, has_weights: bool) -> None:
        """Drop the best evaluation if its weights are missing, or if another result is monitored now."""
        state = self.state
        if state.best is not None and (not has_weights or monitor != self.monitor):
            why = f"its best evaluation is by monitor={monitor!r}" if has_weights else "it lacks the best weights"
            if self.world.is_main:
                logger.warning("%s: %s; the search for the best starts again with monitor=%r", path, why, self.monitor)
            state.best, state.evaluations_without_improvement = None, 0
            self.best_weights = {}
