"""Messages of a fit, the same on the screen and in ``log.txt``, from rank 0 only."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from duoka.log import logger
from duoka.scaling import Batch
from duoka.strategy import Strategy
from duoka.trainer.callbacks import State
from duoka.trainer.checked_loader import loader_batch_size
from duoka.trainer.config import TrainerConfig
from duoka.trainer.fit_spec import FitSpec
from duoka.trainer.lr_schedule import scaled_learning_rate
from duoka.trainer.metrics import Results
from duoka.trainer.model_selection import PREFIX
from duoka.trainer.progress import Reporter, format_number
from duoka.trainer.run_dir import RunDir
from duoka.utils.text import format_duration


class TrainLogger:
    """Writes the messages of a fit, and measures its epochs."""

    def __init__(
        self, config: TrainerConfig, state: State, reporter: Reporter, run_dir: RunDir | None, *, is_main: bool
    ) -> None:
        self.config, self.state = config, state
        self.reporter, self.run_dir = reporter, run_dir
        self.has_warned_of_loss = not is_main
        self.steps_per_epoch: int | None = None

    def say(self, *lines: str) -> None:
        """Show and log ``lines``."""
        for line in lines:
            self.reporter.say(line)
            if self.run_dir is not None:
                self.run_dir.log(line)

    def resumed(self, path: object, epoch: int) -> None:
        """Log the checkpoint and the position from which the run continues; ``epoch`` counts from 0."""
        limit = self.config.max_steps
        if epoch >= self.config.epochs:
            position = f"and nothing is left to train: all {self.config.epochs} epochs are done"
        elif limit is not None and self.state.step >= limit:
            position = f"and nothing is left to train: all {limit} steps of max_steps are done"
        else:
            position = f"in epoch {epoch + 1}"
        self.say(f"resumed: {path}, after {self.state.step:,} steps, {position}")

    def begin_epoch(self, steps_per_epoch: int | None) -> None:
        """Begin to measure an epoch; ``steps_per_epoch`` is ``None`` for data without length."""
        self.steps_per_epoch = steps_per_epoch
        self.samples_before, self.steps_before, self.began = self.state.samples, self.state.step, time.perf_counter()
        self.reporter.begin_epoch(f"{self.state.epoch}/{self.config.epochs}", steps_per_epoch)

    def show_progress(self, device: torch.device) -> None:
        """Show the progress of the epoch, with the peak memory of tensors on ``device``."""
        state, elapsed = self.state, time.perf_counter() - self.began
        done = state.step - self.steps_before
        parts = [f"loss {format_number(self.checked_loss(state.loss))}"]
        parts.append(f"{(state.samples - self.samples_before) / elapsed:,.0f} samples/s")
        with contextlib.suppress(AttributeError, RuntimeError):  # an accelerator without memory statistics
            if device.type != "cpu":
                parts.append(f"{torch.get_device_module(device).max_memory_allocated(device) / 2**30:.1f} GiB")
        planned = None if self.steps_per_epoch is None else self.steps_per_epoch * self.config.epochs
        ends = [steps for steps in (planned, self.config.max_steps) if steps is not None]
        if ends and done:
            parts.append(f"{format_duration(max(0.0, (min(ends) - state.step) * elapsed / done))} left")
        self.reporter.show(done, " · ".join(parts))

    def record(self, train_loss: float) -> dict[str, Any]:
        """Return the record of the current epoch."""
        state, seconds = self.state, time.perf_counter() - self.began
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
        """Return ``loss``; warn once if it is not finite, as training cannot recover from that."""
        if not math.isfinite(loss) and not self.has_warned_of_loss:
            self.has_warned_of_loss = True
            when = f"in epoch {self.state.epoch}, after {self.state.step} steps"
            remedy = "a lower lr, max_grad_norm=1.0, or precision='fp32' may help"
            logger.warning("the %s became %s %s; %s", name, loss, when, remedy)
        return loss

    def end_epoch(self, record: dict[str, Any], *, is_best: bool) -> None:
        """Log an epoch's ``record``, and write all records."""
        parts = [f"epoch {record['epoch']}/{self.config.epochs}", f"loss {format_number(record['train_loss'])}"]
        evaluated = ((name, value) for name, value in self.state.validation.items() if f"{PREFIX}{name}" in record)
        parts += _format_results(("val loss" if name == "loss" else name, value) for name, value in evaluated)
        parts += [f"lr {record['lr']:.3g}", f"{record['samples_per_s']:,.0f} samples/s"]
        parts += [format_duration(record["seconds"]), *(["best"] if is_best else [])]
        self.say(" · ".join(parts))
        self.write_records()

    def write_records(self) -> None:
        """Write the records of all epochs."""
        if self.run_dir is not None:
            self.run_dir.record(self.state.history)

    def results(self, label: str, results: Results) -> None:
        """Log ``results``."""
        self.say(f"{label}: {' · '.join(_format_results(results.items()))}")


def _format_results(results: Iterable[tuple[str, Any]]) -> list[str]:
    return [f"{name} {format_number(value)}" for name, value in results if isinstance(value, (int, float))]


def startup_summary(
    spec: FitSpec, strategy: Strategy, strategy_reason: str, optimizer: torch.optim.Optimizer, monitors: str
) -> Iterator[str]:
    """Yield the first lines of a fit."""
    config = spec.config
    yield f"devices: {_device_names(spec.devices)} ({spec.reason.rstrip('.')})"
    yield f"strategy: {strategy.name} ({strategy_reason})"
    total = sum(parameter.numel() for parameter in spec.model.parameters())
    trained = sum(parameter.numel() for parameter in spec.model.parameters() if parameter.requires_grad)
    yield f"parameters: {_format_count(total)}" + ("" if trained == total else f", {_format_count(trained)} trained")
    size, accumulated = loader_batch_size(spec.train_data), config.gradient_accumulation_steps
    if isinstance(size, int) and size > 0:
        is_global = config.batch_size_means == "global"
        size *= accumulated if is_global else 1
        if is_global and size < strategy.replicas * accumulated:
            yield f"batch: {size} global, fewer than devices x accumulated: some devices have no sample"
        else:
            yield f"batch: {Batch(size, strategy.replicas, config.batch_size_means, accumulated).summary}"
    rates = sorted({float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups})
    lr = f"lr {', '.join(f'{rate:g}' for rate in rates)} (the optimizer's own)"
    if config.lr is not None:
        lr = scaled_learning_rate(config, strategy.replicas).summary
    yield f"optimizer: {type(optimizer).__name__}, {lr}"
    if config.precision != "fp32":
        yield f"precision: {config.precision}"
    if monitors:
        yield monitors


def _device_names(devices: tuple[torch.device, ...]) -> str:
    if not devices:
        return "this process's rank in a larger job"
    if devices[0].type == "cpu":
        return "the CPU" if len(devices) == 1 else f"{len(devices)} CPU workers"
    names = [str(device) for device in devices]
    with contextlib.suppress(AttributeError, RuntimeError):
        for index, device in enumerate(devices):
            properties = torch.get_device_module(device).get_device_properties(device)
            names[index] += f" {properties.name} ({properties.total_memory / 2**30:.1f} GiB)"
    return ", ".join(names)


def _format_count(count: int) -> str:
    """Return a rounded count.

    >>> _format_count(13_590_000), _format_count(2_410), _format_count(650)
    ('13.59M', '2.41K', '650')
    """
    for factor, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= factor:
            return f"{count / factor:.2f}{letter}"
    return str(count)
