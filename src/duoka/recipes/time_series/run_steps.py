"""Parts of a run that forecasting and regression share: the trainer's options, predictions, and file names."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from duoka import devices
from duoka.errors import DataError
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.datasets import csv_table
from duoka.recipes.time_series.config import TimeSeriesConfig
from duoka.utils.files import safe_name

PREDICT_BATCH = 4096


def trainer_options(config: TimeSeriesConfig) -> dict[str, Any]:
    """Return the options of ``duoka.Trainer`` that both tasks set alike."""
    names = ("device", "batch_size_means", "precision", "epochs", "optimizer", "lr", "weight_decay", "seed")
    options = {name: getattr(config, name) for name in names}
    if config.scheduler == "halving":
        return options | {"scheduler": _halving_schedule, "scheduler_interval": "epoch"}
    return options | ({"scheduler": "cosine", "scheduler_interval": "step"} if config.scheduler == "cosine" else {})


def _halving_schedule(optimizer: Optimizer) -> LambdaLR:
    """Return a schedule that keeps the rate for two epochs and then halves it after each, as the authors' code does."""
    return LambdaLR(optimizer, lambda epoch: 0.5 ** max(0, epoch - 1))


def predict_on_device(model: nn.Module, config: TimeSeriesConfig, *inputs: Tensor) -> Tensor:
    """Return the model's output on the first device of ``config``, computed in parts of the batch."""
    device = devices.resolve(config.device).devices[0]
    model.to(device).eval()
    with torch.inference_mode():
        parts = zip(*(torch.split(tensor, PREDICT_BATCH) for tensor in inputs), strict=True)
        predicted = torch.cat([model(*(tensor.to(device) for tensor in part)).cpu() for part in parts])
    check_finite(predicted)
    return predicted


def check_finite(predicted: Tensor) -> None:
    """Raise DataError if a prediction is infinite or NaN."""
    if not bool(predicted.isfinite().all()):
        raise DataError(
            "the model's predictions are not finite: if its training diverged, train again with a smaller --lr (and "
            "--precision fp32); otherwise its inputs are far from the training data"
        )


def prediction_path(run: RecipeRun, source: str, ending: str) -> Path:
    """Return the file for predictions from the table ``source``."""
    return run.folder / "predictions" / f"{safe_name(Path(source).stem)}{ending}"


def write_pairs(
    path: Path, label: str, labels: Iterable[object], names: Sequence[str], kind: str, truth: Tensor, found: Tensor
) -> None:
    """Write true and found values ``(rows, columns)`` side by side as CSV, after a column ``label`` of ``labels``."""
    header = [label, *(f"{name}{suffix}" for name in names for suffix in ("", f" {kind}"))]
    pairs = torch.stack((truth, found), dim=2).flatten(1).tolist()
    csv_table.write(path, header, [[first, *row] for first, row in zip(labels, pairs, strict=False)])
