"""Recipe ``informer``: a table of numbers in, predictions out.

`options` has the options, `forecast` the forecasting of series, `regress` the prediction of columns from other columns,
`baselines` what a forecast is measured against, `report` the files and `drawing` the pictures that a run leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import cast

from duoka.errors import ConfigError
from duoka.recipes.informer import forecast, regress
from duoka.recipes.informer.options import Config
from duoka.recipes.registry import Outcome, Prediction, Written
from duoka.recipes.runs import Run

__all__ = ["Config", "evaluate", "load", "predict", "predict_table", "train"]


def train(config: Config) -> Outcome:
    """Train, test, and write the run's folder with its results and pictures."""
    return cast("Outcome", _task(config).train(config.resolved()))


def evaluate(run: Run, config: Config) -> Outcome:
    """Test the model of a finished run again; writes ``evaluation.json`` into its folder."""
    return cast("Outcome", _task(config).evaluate(run, config.resolved()))


def predict(run: Run, config: Config, sources: Sequence[str], *, invert: bool = False) -> list[Prediction]:  # noqa: ARG001
    """Refuse: this recipe's answers are tables, which ``predict_table`` writes."""
    example = sources[0] if sources and sources[0].lower().endswith((".csv", ".txt", ".tsv")) else "data.csv"
    raise ConfigError(f"a run of the informer predicts from a table: duoka predict {run.folder} --from {example}")


def predict_table(run: Run, config: Config, source: str) -> Written:
    """Write what the model of a finished run makes of a CSV file: a forecast beyond its end, or a prediction for each row."""
    return cast("Written", _task(config).predict_table(run, config.resolved(), source))


def load(config: Config) -> forecast.Data | regress.Rows:
    """Return the table that ``config`` names, as its task cuts it."""
    return cast("forecast.Data | regress.Rows", _task(config).read(config.resolved()))


def _task(config: Config) -> ModuleType:
    return {"forecast": forecast, "regress": regress}[config.task]
