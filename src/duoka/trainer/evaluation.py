"""Evaluation and prediction on one rank: each sample once, in the unwrapped module, so that ranks may differ in batches."""

from collections.abc import Iterable
from typing import Any

import torch

from duoka.data import LocalBatch, concat_batches, to_device
from duoka.errors import DataError
from duoka.trainer.loss_meter import LossMeter
from duoka.trainer.metrics import Metrics, Results
from duoka.trainer.model_with_loss import ModelWithLoss
from duoka.utils.torch_settings import preserve_train_modes
from duoka.world import World


def evaluate(module: ModelWithLoss, batches: Iterable[LocalBatch], metrics: Metrics, world: World) -> Results:
    """Return the mean loss over all samples and the metrics, the same on every rank and for any number of ranks."""
    meter = LossMeter(world.device)
    metrics.reset()
    with preserve_train_modes(module), torch.no_grad():
        module.eval()
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
    """Return the predictions for every sample once, in the order of the data, on the CPU of every rank."""
    mine: list[Any] = []
    with preserve_train_modes(module), torch.no_grad():
        module.eval()
        for local in batches:
            output = module.predictions(to_device(local.batch, world.device)) if local.count else None
            if isinstance(output, torch.Tensor) and not output.ndim:
                raise DataError(
                    f"the model's prediction for {local.count} sample(s) is a single number without a batch dimension; if a "
                    ".squeeze() removes it, write .squeeze(-1)"
                )
            mine.append(to_device(output, "cpu"))
    steps = zip(*world.all_gather_object(mine), strict=True)  # one tuple per global batch, in the order of ranks
    outputs = [output for step in steps for output in step if output is not None]
    try:
        return concat_batches(outputs) if outputs else None
    except DataError as error:
        raise DataError(
            f"predictions of different batches have different shapes: {str(error).partition(';')[0]}; give every sample one "
            "shape: pad in Trainer(..., predict_fn=function of model and batch), or predict data of one length at a time"
        ) from error
