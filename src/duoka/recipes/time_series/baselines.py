"""Baselines of a forecast: the last value, the last season, and a linear model."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from duoka import Trainer
from duoka.recipes.datasets.time_series import SeriesSplit, SlidingWindows, loader
from duoka.recipes.models.dlinear import DLinear

EPOCHS, LEARNING_RATE, BATCH_SIZE = 10, 0.005, 32
"""Training of DLinear with its authors' rate and batch size for ETTh1; the best epoch on the validation part is kept."""


def last_value(windows: SlidingWindows) -> Tensor:
    """Repeat the last known value of each window, ``(windows, horizon, targets)``."""
    values, _ = windows.views
    return values[:, windows.past - 1 : windows.past, windows.targets].expand(-1, windows.horizon, -1)


def last_season(windows: SlidingWindows, season: int) -> Tensor | None:
    """Repeat the last ``season`` steps of each window; ``None`` if the windows' history is shorter."""
    if season > windows.past:
        return None
    values, _ = windows.views
    steps = windows.past - season + torch.arange(windows.horizon) % season
    return values[:, steps][:, :, windows.targets]


def dlinear(split: SeriesSplit, device: Any, seed: int) -> Tensor:
    """Train a linear model on the Informer's windows; return its forecasts ``(windows, horizon, targets)``."""
    test = split.test
    trainer = Trainer(
        DLinear(test.past, test.horizon, test.targets),
        loader(split.train, BATCH_SIZE, shuffle=True),
        loader(split.validation, 512),
        loss=mse_loss,
        device=device,
        batch_size_means="global",
        epochs=EPOCHS,
        optimizer="adam",
        lr=LEARNING_RATE,
        scheduler="cosine",
        scheduler_interval="step",
        monitor="loss",
        seed=seed,
        verbose=False,
    )
    trainer.fit(save_model=False)
    forecasts: Tensor = trainer.predict(loader(test, 512))
    return forecasts
