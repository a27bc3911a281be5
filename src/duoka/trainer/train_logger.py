"""What a fit tells people while it works: the same lines on the screen and in ``log.txt``, from rank 0 alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch

from duoka.log import logger
from duoka.trainer.callbacks import Best, State
from duoka.trainer.config import TrainerConfig
from duoka.trainer.metrics import Results
from duoka.trainer.model_selection import PREFIX
from duoka.trainer.progress import Reporter, Snapshot, device_memory_bytes, duration, number
from duoka.trainer.run_dir import NullRunDir

__all__ = ["TrainLogger"]


class TrainLogger:
    """Puts a fit into words."""

    def __init__(
        self, config: TrainerConfig, state: State, reporter: Reporter, folder: NullRunDir, *, is_main: bool
    ) -> None:
        self.config, self.state = config, state
        self.reporter, self.folder = reporter, folder
        self.warned_of_loss = not is_main
        self.steps_per_epoch: int | None = None

    def say(self, *lines: str) -> None:
        """Show and log ``lines``."""
        for line in lines:
            self.reporter.say(line)
            self.folder.log(line)

    def place(self, epoch: int) -> str:
        """Return where a resumed run goes on, in words."""
        limit = self.config.max_steps
        if epoch >= self.config.epochs:
            return f"and nothing is left to train: all {self.config.epochs} epochs are done"
        if limit is not None and self.state.step >= limit:
            return f"and nothing is left to train: all {limit} steps of max_steps are done"
        return f"in epoch {epoch + 1}"

    def unused(self, names: list[str]) -> None:
        """Say which parameters take no part."""
        if names:
            self.say(f"unused in the first step: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")

    # -- one epoch -----------------------------------------------------------------------------------------------------

    def begin_epoch(self, steps_per_epoch: int | None) -> None:
        """Begin to measure an epoch; ``steps_per_epoch`` is ``None`` where the data do not tell."""
        self.steps_per_epoch = steps_per_epoch
        self.samples_before, self.steps_before, self.began = self.state.samples, self.state.step, time.perf_counter()
        self.reporter.begin_epoch(self.state.epoch, self.config.epochs, steps_per_epoch)

    def show(self, device: torch.device) -> None:
        """Show how far the epoch is."""
        state, elapsed = self.state, time.perf_counter() - self.began
        done = state.step - self.steps_before
        self.reporter.show(
            Snapshot(
                epoch=state.epoch,
                epochs=self.config.epochs,
                step=done,
                steps=self.steps_per_epoch,
                loss=self.checked_loss(state.loss),
                samples_per_s=(state.samples - self.samples_before) / elapsed,
                eta_s=self._eta_s(done, elapsed),
                memory_bytes=device_memory_bytes(device),
            )
        )

    def _eta_s(self, done: int, elapsed: float) -> float | None:
        planned = None if self.steps_per_epoch is None else self.steps_per_epoch * self.config.epochs
        ends = [steps for steps in (planned, self.config.max_steps) if steps is not None]
        return max(0.0, (min(ends) - self.state.step) * elapsed / done) if ends and done else None

    def record(self, train_loss: float) -> dict[str, Any]:
        """Return the record of the epoch so far."""
        state = self.state
        seconds = time.perf_counter() - self.began
        return {
            "epoch": state.epoch,
            "step": state.step,
            "samples": state.samples,
            "train_loss": train_loss,
            "lr": float(state.optimizer.param_groups[0]["lr"]),
            "seconds": round(seconds, 4),
            "samples_per_s": round((state.samples - self.samples_before) / seconds, 1),
        }

    def checked_loss(self, loss: float, name: str = "loss") -> float:
        """Say once when the loss is no number any more: nothing can be learnt from then on."""
        if not math.isfinite(loss) and not self.warned_of_loss:
            self.warned_of_loss = True
            logger.warning(
                "the %s became %s in epoch %d, after %d steps; a lower lr, max_grad_norm=1.0, or precision='fp32' may help",
                name,
                loss,
                self.state.epoch,
                self.state.step,
            )
        return loss

    def end_epoch(self, record: dict[str, Any], *, is_best: bool) -> None:
        """Say and write the ``record`` of an epoch, which is the history's last."""
        parts = [f"epoch {record['epoch']}/{self.config.epochs}", f"loss {number(record['train_loss'])}"]
        evaluated = ((name, value) for name, value in self.state.validation.items() if f"{PREFIX}{name}" in record)
        parts += _in_words(("val loss" if name == "loss" else name, value) for name, value in evaluated)
        parts += [f"lr {record['lr']:.3g}", f"{record['samples_per_s']:,.0f} samples/s", duration(record["seconds"])]
        self.say(" · ".join(parts) + (" · best" if is_best else ""))
        self.folder.record(self.state.history)

    # -- the end -------------------------------------------------------------------------------------------------------

    def results(self, label: str, results: Results) -> None:
        """Say ``results``."""
        self.say(f"{label}: {' · '.join(_in_words(results.items()))}")

    def best(self, best: Best, name: str | None) -> None:
        """Say which weights the model ends with."""
        self.say(f"the model has the weights of epoch {best.epoch}, {name} {number(best.value)}")


def _in_words(results: Iterable[tuple[str, Any]]) -> list[str]:
    return [f"{name} {number(value)}" for name, value in results if isinstance(value, (int, float))]
