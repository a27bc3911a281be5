"""What a forecast has to beat: the last value, the last season, and a linear model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from duoka import Trainer
from duoka.recipes.datasets.sliding_windows import SlidingWindows, loader
from duoka.recipes.datasets.time_series import SeriesSplit
from duoka.recipes.models.dlinear import DLinear

__all__ = ["dlinear", "last_season", "last_value"]

EPOCHS, RATE, BATCH = 10, 0.005, 32
"""DLinear's training, at its authors' rate and batch for ETTh1; the best of these epochs on the validation part is kept."""


def last_value(windows: SlidingWindows) -> Tensor:
    """Return for each window its last known value at every step, ``(windows, horizon, targets)``."""
    values, _ = windows.views
    return values[:, windows.past - 1 : windows.past, windows.targets].expand(-1, windows.horizon, -1)


def last_season(windows: SlidingWindows, season: int) -> Tensor | None:
    """Return for each window what was ``season`` steps before, as often as needed; ``None`` where its past is shorter."""
    if season > windows.past:
        return None
    values, _ = windows.views
    steps = windows.past - season + torch.arange(windows.horizon) % season
    return values[:, steps][:, :, windows.targets]


def dlinear(parts: SeriesSplit, device: Any, seed: int) -> Tensor:
    """Train a linear model on the same windows as the Informer, and return its forecasts, ``(windows, horizon, targets)``."""
    test = parts.test
    model = DLinear(test.past, test.horizon, test.targets)
    trainer = Trainer(
        model,
        loader(parts.train, BATCH, shuffle=True),
        loader(parts.validation, 512),
        loss=mse_loss,
        device=device,
        batch_size_means="global",
        epochs=EPOCHS,
        optimizer="adam",
        lr=RATE,
        scheduler="cosine",
        scheduler_interval="step",
        monitor="loss",
        seed=seed,
        verbose=False,
    )
    trainer.fit(save_model=False)
    forecasts: Tensor = trainer.predict(loader(test, 512))
    return forecasts
