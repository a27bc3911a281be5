"""Evaluation and prediction on one rank: each sample once, in the unwrapped module, so that ranks may differ in batches."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from duoka.data import LocalBatch, concat_batches, to_device
from duoka.errors import DataError
from duoka.trainer.loss_meter import LossMeter
from duoka.trainer.metrics import Metrics, Results
from duoka.trainer.model_with_loss import ModelWithLoss
from duoka.utils.pytree import iter_tensors
from duoka.utils.rng_state import preserve_rng_state
from duoka.utils.torch_settings import preserve_train_modes
from duoka.world import World


@contextlib.contextmanager
def _evaluation_mode(module: ModelWithLoss) -> Iterator[None]:
    with preserve_train_modes(module), torch.no_grad():
        module.eval()
        yield


def evaluate(module: ModelWithLoss, batches: Iterable[LocalBatch], metrics: Metrics, world: World) -> Results:
    """Return the mean loss over all samples and the metrics, the same on every rank and for any number of ranks."""
    meter = LossMeter(world.device)
    metrics.reset()
    with _evaluation_mode(module):
        for local in batches:
            if local.count:
                batch = to_device(local.batch, world.device)
                loss, output, target = module.evaluate_batch(batch, with_output=not metrics.empty)
                if isinstance(loss, tuple):
                    meter.add_sum(*loss)
                elif loss is not None:
                    meter.add(loss, local.count)
                metrics.update(output, target)
    mean = meter.global_mean(world)
    return {**({} if mean is None else {"loss": mean}), **metrics.compute(world)}


def predict(module: ModelWithLoss, batches: Iterable[LocalBatch], world: World) -> Any:
    """Return the predictions for every sample once, in the order of the data, on the CPU of every rank.

    A model that returns a list with one item per sample gives one list with the items of all samples.
    """
    mine: list[tuple[Any, int]] = []
    first: LocalBatch | None = None
    with _evaluation_mode(module):
        for local in batches:
            first = first or local
            output = module.predictions(to_device(local.batch, world.device)) if local.count else None
            if isinstance(output, torch.Tensor) and not output.ndim:
                raise DataError(
                    f"the model's prediction for {local.count} sample(s) is a single number without a batch dimension; if a "
                    ".squeeze() removes it, write .squeeze(-1)"
                )
            mine.append((to_device(output, "cpu"), local.count))
    steps = zip(*world.all_gather_object(mine), strict=True)  # one tuple per global batch, in the order of ranks
    parts = [(output, count) for step in steps for output, count in step if output is not None]
    outputs = [output for output, _ in parts]
    is_per_sample, is_sure = _has_one_item_per_sample(parts)
    if not is_sure:
        answer = (
            world.is_main and first is not None and _is_longer_for_more_samples(module, first, world, is_per_sample)
        )
        is_per_sample = world.broadcast_object(answer)
    if is_per_sample:
        return [item for output in outputs for item in output]
    try:
        return concat_batches(outputs) if outputs else None
    except DataError as error:
        raise DataError(
            f"predictions of different batches have different shapes: {str(error).partition(';')[0]}; give every sample one "
            "shape (pad in Trainer(..., predict_fn=function of model and batch)), or return a list with one tensor per sample"
        ) from error


def _has_one_item_per_sample(parts: list[tuple[Any, int]]) -> tuple[bool, bool]:
    """Return whether each output is a list with one item for each of its ``count`` samples, and whether that is sure.

    In batches of 2, a list of 2 tensors with 2 rows may hold the columns of a batch as well.
    """
    if not parts or not all(type(output) is list and len(output) == count for output, count in parts):
        return False, True
    sizes = {len(one) == count for output, count in parts for one in iter_tensors(output) if one.ndim}
    do_counts_differ = len({count for _, count in parts}) > 1
    return do_counts_differ or sizes != {True}, do_counts_differ or True not in sizes


def _is_longer_for_more_samples(module: ModelWithLoss, first: LocalBatch, world: World, otherwise: bool) -> bool:
    """Return whether the output for the first batch twice is a longer list; ``otherwise`` if it cannot be computed."""
    try:
        with _evaluation_mode(module), preserve_rng_state():
            output = module.predictions(to_device(concat_batches([first.batch, first.batch]), world.device))
    except Exception:
        return otherwise
    return isinstance(output, list) and len(output) == 2 * first.count
