"""Recipe ``informer``: forecasts of time series, and predictions of a table's columns from its other columns.

`config` has the options, `forecasting` and `regression` the two tasks, `baselines` the forecasts to compare with,
`results` the error numbers and `plots` the pictures of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import cast

from duoka.errors import ConfigError
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.common.registry import PredictedTable, Prediction, RecipeOutcome
from duoka.recipes.time_series import forecasting, regression
from duoka.recipes.time_series.config import TimeSeriesConfig

__all__ = ["TimeSeriesConfig", "evaluate", "load", "predict", "predict_table", "train"]

Config = TimeSeriesConfig
"""The name under which the registry finds a recipe's options."""


def train(config: TimeSeriesConfig) -> RecipeOutcome:
    """Train, test, and write results and pictures into the run's folder."""
    return cast("RecipeOutcome", _task(config).train(config.resolved()))


def evaluate(run: RecipeRun, config: TimeSeriesConfig) -> RecipeOutcome:
    """Test the model of a finished run again, and write ``evaluation.json`` into its folder."""
    return cast("RecipeOutcome", _task(config).evaluate_run(run, config.resolved()))


def predict(
    run: RecipeRun,
    config: TimeSeriesConfig,  # noqa: ARG001
    sources: Sequence[str],
    *,
    invert: bool = False,  # noqa: ARG001
) -> list[Prediction]:
    """Raise, because this recipe's predictions are tables, which ``predict_table`` writes."""
    example = sources[0] if sources and sources[0].lower().endswith((".csv", ".txt", ".tsv")) else "data.csv"
    raise ConfigError(f"a run of the informer predicts from a table: duoka predict {run.folder} --from {example}")


def predict_table(run: RecipeRun, config: TimeSeriesConfig, source: str) -> PredictedTable:
    """Write a forecast beyond the end of a CSV file, or a prediction for each of its rows."""
    return cast("PredictedTable", _task(config).predict_table(run, config.resolved(), source))


def load(config: TimeSeriesConfig) -> forecasting.ForecastData | regression.TableRows:
    """Return the data that ``config`` names, split as its task splits them."""
    return cast("forecasting.ForecastData | regression.TableRows", _task(config).load(config.resolved()))


def _task(config: TimeSeriesConfig) -> ModuleType:
    return {"forecast": forecasting, "regress": regression}[config.task]
