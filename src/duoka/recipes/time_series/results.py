"""The numbers of a forecast: errors on the standardised scale and in the columns' units, as JSON, as text, as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duoka.recipes.datasets import csv_table
from duoka.recipes.datasets.sliding_windows import SlidingWindows
from duoka.recipes.datasets.standardization import Standardization

__all__ = ["Forecasts", "write_forecasts"]


@dataclass(frozen=True)
class Forecasts:
    """Several forecasts of the same windows, all standardised."""

    forecasts: dict[str, Tensor]
    """Float32 ``(windows, horizon, targets)`` by the name of who made it; the Informer's first."""
    truth: Tensor
    """What came, likewise."""
    names: tuple[str, ...]
    """The targets' columns."""
    scaling: Standardization
    """The targets'."""

    def errors(self, name: str, *, original: bool = False) -> dict[str, Any]:
        """Return ``mse`` and ``mae`` over everything, and of each step and each column; ``original``: in the columns' units."""
        difference = self.forecasts[name].double() - self.truth.double()
        if original:
            difference = difference * torch.tensor(self.scaling.std, dtype=torch.float64)
        square, size = difference.square(), difference.abs()
        columns = zip(self.names, square.mean((0, 1)).tolist(), size.mean((0, 1)).tolist(), strict=True)
        return {
            "mse": float(square.mean()),
            "mae": float(size.mean()),
            "mse_by_step": square.mean((0, 2)).tolist(),
            "mae_by_step": size.mean((0, 2)).tolist(),
            "by_column": {column: {"mse": mse, "mae": mae} for column, mse, mae in columns},
        }

    def numbers(self) -> dict[str, Any]:
        """Return all errors of all forecasts."""
        return {
            "standardised": {name: self.errors(name) for name in self.forecasts},
            "original_units": {name: self.errors(name, original=True) for name in self.forecasts},
        }

    def text(self, title: str, notes: Sequence[str] = ()) -> str:
        """Return a page for people, with ``notes`` below its title."""
        errors = {name: self.errors(name) for name in self.forecasts}
        lines = [
            title,
            *notes,
            "",
            "Errors on the standardised scale (each column divided by its deviation in training):",
            "",
        ]
        lines.append(f"{'':14}{'MSE':>9}{'MAE':>9}")
        lines += [f"{name:14}{found['mse']:9.4f}{found['mae']:9.4f}" for name, found in errors.items()]
        best = min(errors, key=lambda name: float(errors[name]["mse"]))
        lines += ["", f"The smallest MSE is that of: {best}", "", "The Informer, by column:", ""]
        own, units = errors["Informer"]["by_column"], self.errors("Informer", original=True)["by_column"]
        width = max(14, *(len(column) + 2 for column in self.names))
        lines.append(f"{'':{width}}{'MSE':>9}{'MAE':>9}{'MAE in its unit':>18}")
        lines += [
            f"{column:{width}}{own[column]['mse']:9.4f}{own[column]['mae']:9.4f}{units[column]['mae']:18.5g}"
            for column in self.names
        ]
        lines += ["", "MSE by step:", "", "".join(("step".ljust(14), *(name.rjust(13) for name in errors)))]
        steps = zip(*(found["mse_by_step"] for found in errors.values()), strict=True)
        lines += [f"{step:<14}" + "".join(f"{value:13.4f}" for value in values) for step, values in enumerate(steps, 1)]
        return "\n".join(lines) + "\n"


def write_forecasts(path: Path, results: Forecasts, dates: Any, windows: SlidingWindows, date: str) -> None:
    """Write truth and forecast of the test windows that follow each other without overlap, in the columns' units.

    Args:
        path: the file.
        results: what to write; the first forecast is.
        dates: of all steps, from the first window's history on.
        windows: the test windows.
        date: name of the column of dates.

    """
    every = slice(0, len(windows), windows.horizon)
    forecast = results.scaling.inverse_transform(next(iter(results.forecasts.values()))[every]).flatten(0, 1)
    truth = results.scaling.inverse_transform(results.truth[every]).flatten(0, 1)
    header = [date, *(f"{name}{kind}" for name in results.names for kind in ("", " forecast"))]
    rows = [
        [str(when), *(value for pair in zip(true, said, strict=True) for value in pair)]
        for when, true, said in zip(dates[windows.past :], truth.tolist(), forecast.tolist(), strict=False)
    ]
    csv_table.write(path, header, rows)
