"""Errors of forecasts, standardized and in the columns' units, as JSON and as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duoka.recipes.datasets.csv_table import Standardization


@dataclass(frozen=True)
class Forecasts:
    """Standardized forecasts of the same windows by several models."""

    forecasts: dict[str, Tensor]
    """float32 ``(windows, horizon, targets)`` by the model's name; the Informer's are first."""
    truth: Tensor
    """True values of the same shape."""
    names: tuple[str, ...]
    """The target columns."""
    standardization: Standardization
    """Statistics of the target columns."""
    original: bool
    """Whether ``headline`` is in the columns' units."""

    def errors(self, model: str, *, original: bool = False) -> dict[str, Any]:
        """Return ``mse`` and ``mae`` in total, by step and by column; ``original`` for the columns' units."""
        difference = self.forecasts[model].double() - self.truth.double()
        if original:
            difference = difference * torch.tensor(self.standardization.std, dtype=torch.float64)
        square, absolute = difference.square(), difference.abs()
        columns = zip(self.names, square.mean((0, 1)).tolist(), absolute.mean((0, 1)).tolist(), strict=True)
        return {
            "mse": float(square.mean()),
            "mae": float(absolute.mean()),
            "mse_by_step": square.mean((0, 2)).tolist(),
            "mae_by_step": absolute.mean((0, 2)).tolist(),
            "by_column": {column: {"mse": mse, "mae": mae} for column, mse, mae in columns},
        }

    def all_errors(self) -> dict[str, Any]:
        """Return the errors of all models on both scales."""
        return {
            "standardised": {model: self.errors(model) for model in self.forecasts},
            "original_units": {model: self.errors(model, original=True) for model in self.forecasts},
        }

    @property
    def headline(self) -> dict[str, float]:
        """The errors to print; the Informer's are called ``test_mse`` and ``test_mae``."""
        found: dict[str, float] = {}
        for model in self.forecasts:
            errors = self.errors(model, original=self.original)
            prefix = "test" if model == "Informer" else model.lower().replace(" ", "_")
            found |= {f"{prefix}_mse": errors["mse"], f"{prefix}_mae": errors["mae"]}
        return found

    summary = headline
    """Content of ``evaluation.json``."""

    def text(self, title: str, notes: Sequence[str] = ()) -> str:
        """Return a report with ``notes`` below its title."""
        errors = {model: self.errors(model) for model in self.forecasts}
        best = min(errors, key=lambda model: float(errors[model]["mse"]))
        lines = [title, *notes, "", "Standardized errors (each column divided by its deviation in training):", ""]
        lines.append(f"{'':14}{'MSE':>9}{'MAE':>9}")
        lines += [f"{model:14}{found['mse']:9.4f}{found['mae']:9.4f}" for model, found in errors.items()]
        lines += ["", f"Smallest MSE: {best}", "", "The Informer by column:", ""]
        own, units = errors["Informer"]["by_column"], self.errors("Informer", original=True)["by_column"]
        width = max(14, *(len(column) + 2 for column in self.names))
        lines.append(f"{'':{width}}{'MSE':>9}{'MAE':>9}{'MAE in its unit':>18}")
        lines += [
            f"{column:{width}}{own[column]['mse']:9.4f}{own[column]['mae']:9.4f}{units[column]['mae']:18.5g}"
            for column in self.names
        ]
        lines += ["", "MSE by step:", "", "".join(("step".ljust(14), *(model.rjust(13) for model in errors)))]
        steps = zip(*(found["mse_by_step"] for found in errors.values()), strict=True)
        lines += [f"{step:<14}" + "".join(f"{value:13.4f}" for value in values) for step, values in enumerate(steps, 1)]
        return "\n".join(lines) + "\n"
