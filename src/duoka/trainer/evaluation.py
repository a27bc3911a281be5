"""Evaluation and prediction on one rank: each sample once, in the unwrapped module, so that ranks may differ in batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from duoka.data import concat_batches, to_device
from duoka.errors import DataError
from duoka.trainer.loss_meter import LossMeter
from duoka.trainer.metrics import Metrics, Results
from duoka.trainer.model_with_loss import ModelWithLoss
from duoka.world import World

__all__ = ["evaluate", "evaluating", "predict"]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; afterwards every submodule has the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def evaluate(
    objective: ModelWithLoss,
    parts: Iterable[Any],
    metrics: Metrics,
    world: World,
    tick: Callable[[], None] = lambda: None,
) -> Results:
    """Return the mean loss over all samples and the metrics, the same on every rank and for every number of ranks."""
    tally = LossMeter(world.device)
    metrics.reset()
    with evaluating(objective):
        for part in parts:
            if part.count:
                _take(objective, part, metrics, tally, world.device)
            tick()
    results: Results = {}
    loss = tally.global_mean(world)
    if loss is not None:  # nan is a loss, too
        results["loss"] = loss
    return {**results, **metrics.compute(world)}


def _take(objective: ModelWithLoss, part: Any, metrics: Metrics, tally: LossMeter, device: torch.device) -> None:
    judged = objective.judge(to_device(part.batch, device), not metrics.empty)
    if isinstance(judged.loss, tuple):
        tally.add_sum(*judged.loss)
    elif judged.loss is not None:
        tally.add(judged.loss, part.count)
    if not metrics.empty:
        metrics.update(judged.output, judged.target)


def predict(objective: ModelWithLoss, parts: Iterable[Any], world: World) -> Any:
    """Return the predictions for every sample once, in the order of the data, on the CPU of every rank."""
    mine: list[Any] = []
    with evaluating(objective):
        for part in parts:
            mine.append(_predicted(objective, part, world) if part.count else None)
    steps = zip(*world.all_gather_object(mine), strict=True)  # of each global batch, its parts in the order of ranks
    outputs = [output for step in steps for output in step if output is not None]
    try:
        return concat_batches(outputs) if outputs else None
    except DataError as error:
        raise DataError(
            f"predictions for different batches do not fit together: {str(error).partition(';')[0]}; let them have one shape a "
            "sample: pad them in Trainer(..., predict_fn=function of model and batch), or predict data of one length at a time"
        ) from error


def _predicted(objective: ModelWithLoss, part: Any, world: World) -> Any:
    output = to_device(objective.predictions(to_device(part.batch, world.device)), "cpu")
    if isinstance(output, torch.Tensor) and not output.ndim:
        raise DataError(
            f"the model's prediction for {part.count} sample(s) is a single number without a batch dimension; a .squeeze() may "
            "have taken it away: write .squeeze(-1)"
        )
    return output
