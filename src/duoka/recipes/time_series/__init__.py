"""Recipe ``informer``: forecasts of time series, and predictions of a table's columns from its other columns.

`config` has the options, `forecasting` and `regression` the two tasks, `baselines` the forecasts to compare with,
`results` the error numbers and `plots` the pictures of a run.
"""

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from duoka import current_world, devices
from duoka.errors import ConfigError
from duoka.recipes.common.recipe_run import RecipeRun, fit, recipe_run, run_options
from duoka.recipes.common.registry import PredictedTable, Prediction, RecipeOutcome
from duoka.recipes.time_series import forecasting, regression
from duoka.recipes.time_series.config import NAME, TimeSeriesConfig
from duoka.utils.text import duoka_command

__all__ = ["TimeSeriesConfig", "evaluate", "load", "predict", "predict_table", "train"]

Config = TimeSeriesConfig
"""The name under which the registry finds a recipe's options."""


def train(config: TimeSeriesConfig) -> RecipeOutcome:
    """Train, test, and write results and pictures into the run's folder."""
    config, task = config.resolved(), _task(config)
    devices.resolve(config.device)  # a device that does not exist is an error before any download
    data = task.load(config)
    with recipe_run(NAME, config, data.metadata, data.source) as run:
        torch.manual_seed(config.seed)
        options = run_options(run, NAME, config, data.metadata)
        trainer = task.build_trainer(task.build_model(config, data.description), config, data, options)
        fit(trainer, save_model=True, model_path=run.model)
        results = task.test(trainer, config, data)
        if current_world().is_main:
            task.write_results(run, config, data, results)
    return RecipeOutcome(run, results.headline, duoka_command("predict", run.folder, "--from", data.source))


def evaluate(run: RecipeRun, config: TimeSeriesConfig) -> RecipeOutcome:
    """Test the model of a finished run again, and write ``evaluation.json`` into its folder."""
    config, task = config.resolved(), _task(config)
    model, saved = _load_finished_run(run, config, task)
    data = task.load(config, saved)
    results = task.test(task.build_trainer(model, config, data, {}), dataclasses.replace(config, baselines=False), data)
    run.write_results(results.summary, "evaluation.json")
    return RecipeOutcome(run, results.headline, duoka_command("predict", run.folder, "--from", data.source))


def predict(run: RecipeRun, _: TimeSeriesConfig, sources: Sequence[str], **__: bool) -> list[Prediction]:
    """Raise, because this recipe's predictions are tables, which ``predict_table`` writes."""
    example = sources[0] if sources and sources[0].lower().endswith((".csv", ".txt", ".tsv")) else "data.csv"
    raise ConfigError(
        f"a run of the informer predicts from a table: {duoka_command('predict', run.folder, '--from', example)}"
    )


def predict_table(run: RecipeRun, config: TimeSeriesConfig, source: str) -> PredictedTable:
    """Write a forecast beyond the end of a CSV file, or a prediction for each of its rows."""
    config, task = config.resolved(), _task(config)
    model, saved = _load_finished_run(run, config, task)
    return cast("PredictedTable", task.predict_table(run, config, model, saved[task.DESCRIPTION], source))


def load(config: TimeSeriesConfig) -> forecasting.ForecastData | regression.TableRows:
    """Return the data that ``config`` names, split as its task splits them."""
    return cast("forecasting.ForecastData | regression.TableRows", _task(config).load(config.resolved()))


def _task(config: TimeSeriesConfig) -> ModuleType:
    return {"forecast": forecasting, "regress": regression}[config.task]


def _load_finished_run(run: RecipeRun, config: TimeSeriesConfig, task: ModuleType) -> tuple[nn.Module, dict[str, Any]]:
    """Return the trained model of a run and its results, which describe its data."""
    run.finished_model()  # raises for an unfinished run
    saved = run.read_results(task.RESULTS_FORM)
    task.check_saved(saved[task.DESCRIPTION], str(run.folder / "results.json"))
    return run.build_finished_model(lambda: task.build_model(config, saved[task.DESCRIPTION])), saved
