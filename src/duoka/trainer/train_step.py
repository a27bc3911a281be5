"""One optimizer step on one rank. Every batch takes this path, so it holds only what must happen at each step."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from duoka.data import LocalBatch, slice_batch, to_device
from duoka.errors import ConfigError, DataError
from duoka.strategy import Strategy
from duoka.trainer.loss_meter import LossMeter
from duoka.trainer.loss_reduction import MeanLoss
from duoka.trainer.lr_schedule import LRSchedule
from duoka.trainer.metrics import Metrics
from duoka.trainer.model_with_loss import ModelWithLoss
from duoka.utils.torch_private import BatchNorm


def accumulation_windows(batches: Iterable[LocalBatch], size: int) -> Iterator[list[LocalBatch]]:
    """Yield the batches of each optimizer step: ``size`` of them, fewer in the last window."""
    remaining = iter(batches)
    while window := list(itertools.islice(remaining, size)):
        yield window


def split_local_batch(local: LocalBatch, size: int | None) -> Iterator[LocalBatch]:
    """Yield ``local`` in parts of at most ``size`` samples; ``None`` is one part, and so is a filler."""
    if size is None or local.count <= size:
        yield local
        return
    for start in range(0, local.count, size):
        stop = min(start + size, local.count)
        yield LocalBatch(slice_batch(local.batch, start, stop, local.count), stop - start, local.global_count)


class TrainStep:
    """Takes windows of local batches and makes optimizer steps.

    A step's gradient is that of the mean loss over all samples of its window on all ranks. A mean loss is multiplied by
    the local batch's share before backward. With a loss ``(sum, weight)``, sums are accumulated, and the gradients are
    divided once by the weight of the whole window; in a window of one batch, the sum is divided before backward.
    """

    def __init__(
        self,
        module: ModelWithLoss,
        strategy: Strategy,
        optimizer: Optimizer,
        schedule: LRSchedule,
        loss_meter: LossMeter,
        train_metrics: Metrics,
        *,
        max_grad_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.module, self.train_metrics = module, train_metrics
        self.call: Callable[[Any], Any] = module.forward
        """Computes the loss of a batch. Without a wrapper this is ``forward`` itself, as ``ModelWithLoss`` has no hooks."""
        self._loss_share = strategy.loss_scale
        self.strategy, self.optimizer, self.schedule = strategy, optimizer, schedule
        self.loss_meter, self.max_grad_norm, self.scaler = loss_meter, max_grad_norm, scaler
        self.device = strategy.world.device
        self.modules = list(module.modules())
        # torch's own zero_grad only sets gradients to None, in twenty times the time
        self._can_drop_grads = type(optimizer).zero_grad is Optimizer.zero_grad and "zero_grad" not in vars(optimizer)
        self._on_cpu = self.device.type == "cpu"  # loaders yield CPU tensors
        self.micro_batch: int | None = None
        """Largest number of samples that are computed at once; ``None`` is a rank's whole part of a batch."""
        self.recovery: Callable[[list[LocalBatch]], int] | None = None
        """Takes a step in place of this object, and may repeat it; the module is not wrapped then."""
        self.may_split = False
        """Whether ranks may compute different numbers of parts, so that no part may wait for another rank."""
        self._weight: torch.Tensor | None = None
        self._is_single_batch = True
        self._last_grad_scale: float | None = None
        self.note_parameters()

    def note_parameters(self) -> None:
        """Note which parameters are trained, and which the optimizer holds."""
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        named = self.module.named_parameters()
        self.trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        held = {id(parameter) for parameter in self.parameters}
        self._not_in_optimizer = [parameter for parameter in self.trained.values() if id(parameter) not in held]

    def step(self, window: list[LocalBatch]) -> int:
        """Take one optimizer step and return its number of samples over all ranks."""
        if self.recovery is not None:
            return self.recovery(window)
        total = self.accumulate(window)
        self.update()
        return total

    def step_before_wrapping(self, window: list[LocalBatch]) -> tuple[int, list[str]]:
        """Take one step without the strategy's wrapper.

        Return the number of samples, and the names of the parameters that have no gradient on some rank.
        """
        total = self.accumulate(window)
        missing = {name for name, parameter in self.trained.items() if parameter.grad is None}
        by_rank = self.strategy.world.all_gather_object(missing)
        missing_everywhere = set.intersection(*by_rank)
        used = (parameter for name, parameter in self.trained.items() if name not in missing_everywhere)
        self.strategy.all_reduce_gradients(used)
        self.update()
        return total, sorted(set.union(*by_rank))

    def accumulate(self, window: list[LocalBatch]) -> int:
        """Add the gradients of a window, and return its number of samples over all ranks."""
        total = sum(local.global_count for local in window)
        if self.may_split:
            window = [part for local in window for part in split_local_batch(local, self.micro_batch)]
        self._is_single_batch = len(window) == 1 and not self.may_split
        if len(window) > 1:
            with self.strategy.no_sync():
                for local in window[:-1]:
                    self._add_gradient(local, total)
        self._add_gradient(window[-1], total)
        self._check_reduced()
        return total

    def drop_gradients(self) -> None:
        """Forget a window that was not completed."""
        self._weight = None
        self.module.captured = None
        self.zero_grad()

    def _check_reduced(self) -> None:
        """Raise ``ConfigError`` if a parameter that the strategy expects to be used got no gradient on this rank."""
        try:
            self.strategy.check_gradients_reduced()
        except RuntimeError as error:
            if "Expected to have finished reduction" not in str(error):
                raise
            unused = [name.removeprefix("model.") for name, one in self.trained.items() if one.grad is None]
            names = ", ".join(unused[:3]) + (" ..." if len(unused) > 3 else "") or "a parameter"
            raise ConfigError(
                f"{names} got no gradient in a step, though all trained parameters got one in the first; the devices cannot "
                "average such a step. Give Trainer find_unused_parameters=True"
            ) from error

    def _add_gradient(self, local: LocalBatch, total: int) -> None:
        count = local.count
        if not self._on_cpu:
            self.module.check_labels(local.batch)
        batch = local.batch if self._on_cpu else to_device(local.batch, self.device, True)
        if count:
            try:
                loss = self.call(batch)
            except ValueError as error:
                if count > 1 or not str(error).startswith("Expected more than 1 value per channel"):
                    raise
                raise DataError(
                    "batch norm cannot be trained on one sample, and a device got a single sample of a global batch; give "
                    "drop_last=True to the DataLoader, or a batch size that leaves at least two samples per device at the end"
                ) from error
        else:
            with _frozen_batch_norm(self.modules):
                loss = self.call(batch)
        if type(loss) is tuple:
            loss = self._reduce_sum(loss, count)
        elif type(loss) is MeanLoss:
            loss, weight = loss
            self.loss_meter.add(loss, weight)
        else:
            self.loss_meter.add(loss, count)
            share = self._loss_share(count, total)
            if share != 1.0:
                loss = loss * share
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward()
        if count and self.module.captured is not None:
            self.train_metrics.update(*self.module.captured)
            self.module.captured = None

    def _reduce_sum(self, loss: tuple[torch.Tensor, Any], count: int) -> torch.Tensor:
        total, weight = loss
        weight = torch.as_tensor(weight, dtype=self.loss_meter.total.dtype, device=self.device).detach()
        if not count:
            total, weight = total * 0, weight * 0
        self.loss_meter.add_sum(total, weight)
        if self._is_single_batch:  # so the weight of the whole step is known before backward
            return total * self.strategy.inverse_total_weight(weight).to(total.dtype)
        self._weight = weight if self._weight is None else self._weight + weight
        return total

    def update(self) -> None:
        """Make the optimizer step of the accumulated gradients, and drop them."""
        optimizer, scaler = self.optimizer, self.scaler
        if self._weight is not None:
            self.strategy.average_gradients(self.trained.values(), self._weight)
            self._weight = None
        if scaler is not None and self.max_grad_norm is not None:
            scaler.unscale_(optimizer)
        if self.max_grad_norm is not None:
            self.strategy.clip(self.parameters, self.max_grad_norm)
        if scaler is None:
            optimizer.step()
        stepped = scaler is None or self._scaled_step(scaler)
        self.zero_grad()
        if stepped and self.schedule.changes_within_epoch:
            self.schedule.after_step()

    def zero_grad(self) -> None:
        """Drop all gradients, including those of parameters that the optimizer does not hold."""
        if self._can_drop_grads:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            self.optimizer.zero_grad()
        for parameter in self._not_in_optimizer:
            parameter.grad = None

    def _scaled_step(self, scaler: torch.amp.GradScaler) -> bool:
        """Step unless a gradient overflowed; return whether it stepped. Only a schedule needs the answer: it is a wait."""
        before = self._last_grad_scale
        if before is None and self.schedule.changes_within_epoch:
            before = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        if before is None:
            return True
        self._last_grad_scale = scaler.get_scale()
        return self._last_grad_scale >= before


@contextlib.contextmanager
def _frozen_batch_norm(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put batch norm into evaluation mode, so that a rank's filler batch leaves no trace in running statistics.

    SyncBatchNorm communicates with the other ranks in training, so it keeps its mode.
    """
    layers = (layer for layer in modules if isinstance(layer, BatchNorm) and not isinstance(layer, nn.SyncBatchNorm))
    frozen = [layer for layer in layers if layer.training]
    for layer in frozen:
        layer.training = False
    try:
        yield
    finally:
        for layer in frozen:
            layer.training = True
