"""Recipe ``informer``: a table of numbers in, predictions out.

`options` has the options, `forecast` the forecasting of series, `regress` the prediction of columns from other columns,
`baselines` what a forecast is measured against, `report` the files and `drawing` the pictures that a run leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import cast

from duoka.errors import ConfigError
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.common.registry import Prediction, RecipeOutcome, Written
from duoka.recipes.time_series import forecasting, regression
from duoka.recipes.time_series.config import TimeSeriesConfig

__all__ = ["TimeSeriesConfig", "evaluate", "load", "predict", "predict_table", "train"]

Config = TimeSeriesConfig
"""What the registry asks every recipe for."""


def train(config: TimeSeriesConfig) -> RecipeOutcome:
    """Train, test, and write the run's folder with its results and pictures."""
    return cast("RecipeOutcome", _task(config).train(config.resolved()))


def evaluate(run: RecipeRun, config: TimeSeriesConfig) -> RecipeOutcome:
    """Test the model of a finished run again; writes ``evaluation.json`` into its folder."""
    return cast("RecipeOutcome", _task(config).evaluate(run, config.resolved()))


def predict(
    run: RecipeRun,
    config: TimeSeriesConfig,  # noqa: ARG001
    sources: Sequence[str],
    *,
    invert: bool = False,  # noqa: ARG001
) -> list[Prediction]:
    """Refuse: this recipe's answers are tables, which ``predict_table`` writes."""
    example = sources[0] if sources and sources[0].lower().endswith((".csv", ".txt", ".tsv")) else "data.csv"
    raise ConfigError(f"a run of the informer predicts from a table: duoka predict {run.folder} --from {example}")


def predict_table(run: RecipeRun, config: TimeSeriesConfig, source: str) -> Written:
    """Write what the model of a finished run makes of a CSV file: a forecast beyond its end, or a prediction for each row."""
    return cast("Written", _task(config).predict_table(run, config.resolved(), source))


def load(config: TimeSeriesConfig) -> forecasting.ForecastData | regression.TableRows:
    """Return the table that ``config`` names, as its task cuts it."""
    return cast("forecasting.ForecastData | regression.TableRows", _task(config).read(config.resolved()))


def _task(config: TimeSeriesConfig) -> ModuleType:
    return {"forecast": forecasting, "regress": regression}[config.task]
