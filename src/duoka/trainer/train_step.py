"""One optimiser step on one rank. This is the path that every batch takes, so it does nothing that can be done elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from duoka.data import to_device
from duoka.errors import DataError
from duoka.strategy import Strategy
from duoka.trainer.loss_meter import LossMeter
from duoka.trainer.loss_reduction import MeanLoss
from duoka.trainer.optimizers import LRSchedule

__all__ = ["TrainStep", "batch_norm_at_rest", "windows"]

ONE_SAMPLE = (
    "batch norm cannot be trained on one sample, and a part of a global batch has just one; let no part be so small: "
    "drop_last=True in the DataLoader, or a batch size that leaves at least two samples a device at the end"
)


def windows(parts: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield ``size`` parts at a time: those of one optimiser step. The last window may be shorter."""
    if size == 1:
        for part in parts:
            yield [part]
        return
    window = []
    for part in parts:
        window.append(part)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


class TrainStep:
    """Takes windows of parts and makes optimiser steps of them.

    The gradient of a step is that of the mean loss over all samples of its window on all ranks. A part's loss is a mean and
    is weighted by the part's share before backward; or it is ``(sum, weight)``, then sums are what is added up and the
    gradients are divided by the weight of the whole window, once, afterwards; a window of one part divides its sum.
    """

    def __init__(
        self,
        module: nn.Module,
        strategy: Strategy,
        optimizer: Optimizer,
        schedule: LRSchedule,
        tally: LossMeter,
        *,
        max_grad_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.call: Callable[[Any], Any] = module
        self._scale = strategy.loss_scale
        self.strategy = strategy
        self.optimizer = optimizer
        self.schedule = schedule
        self.tally = tally
        self.max_grad_norm = max_grad_norm
        self.scaler = scaler
        self.device = strategy.world.device
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.modules = list(module.modules())
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        held = {id(parameter) for parameter in self.parameters}
        self._others = [parameter for parameter in self.trained if id(parameter) not in held]
        self._only_forgets = _only_forgets(optimizer)
        self._on_cpu = self.device.type == "cpu"  # where loaders put their batches anyway
        self._weight: torch.Tensor | None = None
        self._alone = True
        self._scheduled = not schedule.idle
        self._loss_scale: float | None = None
        self.observe: Callable[[], None] | None = None
        """Called after the backward of every part that counts; metrics of training."""

    def step(self, window: list[Any]) -> int:
        """Take one optimiser step and return how many samples it took over all ranks."""
        self._alone = len(window) == 1
        if self._alone:
            total: int = window[0].global_count
        else:
            total = sum(part.global_count for part in window)
            with self.strategy.no_sync():
                for part in window[:-1]:
                    self._add_gradient(part, total)
        self._add_gradient(window[-1], total)
        self._update()
        return total

    def use(self, wrapped: nn.Module, module: nn.Module, *, compiled: bool) -> None:
        """Call ``wrapped``, the strategy's wrapper around ``module``, in every step to come.

        Without a wrapper the forward is called directly: the objective is duoka's own and has no hooks.
        """
        self.call = module.forward if wrapped is module and not compiled else wrapped

    def _add_gradient(self, part: Any, total: int) -> None:
        count = part.count
        batch = part.batch if self._on_cpu else to_device(part.batch, self.device, True)
        if count:
            try:
                loss = self.call(batch)
            except ValueError as error:
                if count > 1 or not str(error).startswith("Expected more than 1 value per channel"):
                    raise
                raise DataError(ONE_SAMPLE) from error
        else:
            with batch_norm_at_rest(self.modules):
                loss = self.call(batch)
        if type(loss) is tuple:
            loss = self._weighted(loss, count)
        elif type(loss) is MeanLoss:
            loss, weight = loss
            self.tally.add(loss, weight)
        else:
            self.tally.add(loss, count)
            scale = self._scale(count, total)
            if scale != 1.0:
                loss = loss * scale
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward()
        if self.observe is not None and count:
            self.observe()

    def _weighted(self, loss: tuple[torch.Tensor, Any], count: int) -> torch.Tensor:
        total, weight = loss
        weight = torch.as_tensor(weight, dtype=self.tally.total.dtype, device=self.device).detach()
        if not count:
            total, weight = total * 0, weight * 0
        self.tally.add_sum(total, weight)
        if self._alone:  # the weight of the whole step is known before backward
            return total * self.strategy.inverse_total_weight(weight).to(total.dtype)
        self._weight = weight if self._weight is None else self._weight + weight
        return total

    def _update(self) -> None:
        optimizer, scaler = self.optimizer, self.scaler
        if self._weight is not None:
            self.strategy.average_gradients(self.trained, self._weight)
            self._weight = None
        if scaler is not None and self.max_grad_norm is not None:
            scaler.unscale_(optimizer)
        if self.max_grad_norm is not None:
            self.strategy.clip(self.parameters, self.max_grad_norm)
        stepped = True
        if scaler is None:
            optimizer.step()
        else:
            stepped = self._scaled_step(scaler)
        self.zero_grad()
        if self._scheduled and stepped:
            self.schedule.after_step()

    def zero_grad(self) -> None:
        """Forget the gradients of everything that is trained, of what the optimiser does not hold, too."""
        if self._only_forgets:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            self.optimizer.zero_grad()
        for parameter in self._others:
            parameter.grad = None

    def _scaled_step(self, scaler: torch.amp.GradScaler) -> bool:
        """Step unless a gradient overflowed; return whether it stepped. Only a schedule needs to know: it costs a wait."""
        before = self._loss_scale
        if before is None and self._scheduled:
            before = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        if before is None:
            return True
        self._loss_scale = scaler.get_scale()
        return self._loss_scale >= before


def _only_forgets(optimizer: Optimizer) -> bool:
    """Whether ``zero_grad`` is torch's own, which does nothing but forget gradients, in twenty times the time."""
    return type(optimizer).zero_grad is Optimizer.zero_grad and "zero_grad" not in vars(optimizer)


@contextlib.contextmanager
def batch_norm_at_rest(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let a filler, which counts for nothing, leave no trace in running statistics; one sample has no variance either.

    SyncBatchNorm talks to the other ranks in training, so it goes on.
    """
    resting = [
        part
        for part in modules
        if isinstance(part, _BatchNorm) and not isinstance(part, nn.SyncBatchNorm) and part.training
    ]
    for part in resting:
        part.training = False
    try:
        yield
    finally:
        for part in resting:
            part.training = True
