"""Evaluation and prediction on one rank: each sample once, in the unwrapped module, so that ranks may differ in batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from duoka.data import concat_batches, to_device
from duoka.trainer.metrics import Metrics, Results
from duoka.trainer.objective import Objective
from duoka.trainer.tally import Tally
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
    objective: Objective, parts: Iterable[Any], metrics: Metrics, world: World, tick: Callable[[], None] = lambda: None
) -> Results:
    """Return the mean loss over all samples and the metrics, the same on every rank and for every number of ranks."""
    tally = Tally(world.device)
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


def _take(objective: Objective, part: Any, metrics: Metrics, tally: Tally, device: torch.device) -> None:
    judged = objective.judge(to_device(part.batch, device), not metrics.empty)
    if isinstance(judged.loss, tuple):
        tally.add_sum(*judged.loss)
    elif judged.loss is not None:
        tally.add(judged.loss, part.count)
    if not metrics.empty:
        metrics.update(judged.output, judged.target)


def predict(objective: Objective, parts: Iterable[Any], world: World) -> Any:
    """Return the predictions for every sample once, in the order of the data, on the CPU of every rank."""
    mine: list[Any] = []
    with evaluating(objective):
        for part in parts:
            batch = to_device(part.batch, world.device) if part.count else None
            mine.append(to_device(objective.predictions(batch), "cpu") if part.count else None)
    steps = zip(*world.gather(mine), strict=True)  # of each global batch, its parts in the order of ranks
    outputs = [output for step in steps for output in step if output is not None]
    return concat_batches(outputs) if outputs else None
