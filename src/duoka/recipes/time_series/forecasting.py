"""Task ``forecast``: the Informer on time series, compared with baselines on the paper's scale."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Final, TypedDict

from torch import Tensor
from torch.nn.functional import mse_loss

from duoka import Trainer
from duoka.errors import ConfigError, DataError
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.common.registry import PredictedTable
from duoka.recipes.datasets import csv_table, time_series
from duoka.recipes.datasets.csv_table import CsvTable, SavedStandardization, Standardization
from duoka.recipes.models.informer import Informer
from duoka.recipes.time_series import baselines, plots, run_steps
from duoka.recipes.time_series.config import NAME, TimeSeriesConfig
from duoka.recipes.time_series.results import Forecasts
from duoka.utils.imports import import_optional
from duoka.utils.text import shorten

MAX_MARKS = 5
"""Calendar features of a step; at least 2 are there."""
DESCRIPTION: Final = "series"
"""Entry of ``results.json`` that describes the data."""


class _SavedSeries(SavedStandardization):
    """Entry ``series`` of ``results.json``: the columns, some of which are targets, and their step and statistics."""

    columns: list[str]
    targets: list[str]
    frequency: str
    marks: int


class SavedForecastResults(TypedDict):
    """What a finished run's ``results.json`` must have."""

    series: _SavedSeries
    windows: dict[str, int]


RESULTS_FORM = SavedForecastResults


@dataclass(frozen=True)
class ForecastData:
    """A series, its target columns and its windows."""

    source: str
    """The file."""
    series: time_series.TimeSeries
    targets: tuple[int, ...]
    """Indices of the target columns in the series."""
    split: time_series.SeriesSplit

    @property
    def target_names(self) -> tuple[str, ...]:
        """Names of the target columns."""
        return tuple(self.series.columns[index] for index in self.targets)

    @property
    def num_windows(self) -> dict[str, int]:
        """Number of windows of each part."""
        split = self.split
        return {"training": len(split.train), "validation": len(split.validation), "test": len(split.test)}

    @property
    def metadata(self) -> dict[str, Any]:
        """Values that distinguish these data from a file with other rows or values."""
        return {
            "windows are": ", ".join(f"{count:,} {part}" for part, count in self.num_windows.items()),
            "parts are": self.date_ranges,
            "means are": self.split.standardization.mean,
            "deviations are": self.split.standardization.std,
        }

    @property
    def description(self) -> dict[str, Any]:
        """Values that ``results.json`` keeps, from which a finished run's model and data are built again."""
        return {
            "source": self.source,
            "columns": self.series.columns,
            "targets": self.target_names,
            "frequency": self.series.frequency,
            "marks": self.split.test.marks.shape[1],
            **dataclasses.asdict(self.split.standardization),
        }

    @property
    def date_ranges(self) -> str:
        """First and last date of each part, as text."""
        dates, ends = self.series.dates, self.split.ends
        ranges = zip(self.num_windows, (0, *ends), ends, strict=False)
        return "; ".join(f"{part}: {dates[start]} to {dates[end - 1]}" for part, start, end in ranges)


def predict_table(
    run: RecipeRun, config: TimeSeriesConfig, model: Informer, saved: _SavedSeries, source: str
) -> PredictedTable:
    """Forecast beyond the end of a file with the columns and the step of the training data, which ``saved`` describes."""
    table = csv_table.read(source)
    indices = [table.find_name(name) for name in saved["columns"]]
    series = time_series.series_from_table(table, config.date, indices, fill=config.fill, frequency=saved["frequency"])
    past, _, horizon = config.lengths
    if len(series) < past:
        raise DataError(
            f"{source} has {len(series):,} rows, and the model needs the last {past:,} (seq_len): give a longer file"
        )
    if series.frequency != saved["frequency"]:
        raise DataError(
            f"{source} has a row every {series.frequency}, and the model was trained on a row every {saved['frequency']}: "
            "give a file with that step"
        )
    standardization = Standardization.from_dict(saved, saved["columns"])
    dates = series.future_dates(horizon)
    marks = time_series.calendar_features(series.dates[-past:].append(dates), series.step_s)
    history = standardization.transform(series.values[-past:])
    forecast = run_steps.predict_on_device(model, config, history[None], marks[None])[0]
    targets = [saved["columns"].index(name) for name in saved["targets"]]
    forecast = standardization.select(targets).inverse_transform(forecast)
    written = run_steps.prediction_path(run, source, ".csv"), run_steps.prediction_path(run, source, ".png")
    rows = [[str(date), *values] for date, values in zip(dates, forecast.tolist(), strict=True)]
    csv_table.write(written[0], [table.columns[table.find_column(config.date)], *saved["targets"]], rows)
    plots.plot_future(written[1], series, targets, dates, forecast, history=max(past, 3 * horizon))
    return PredictedTable(written, f"{horizon} steps from {dates[0]} to {dates[-1]}")


def load(config: TimeSeriesConfig, saved: SavedForecastResults | None = None) -> ForecastData:
    """Return the series that ``config`` names, split into windows.

    ``saved`` is the results of a finished run, whose columns and standardization are used.
    """
    source = config.csv or str(time_series.locate_ett(config.dataset, config.root, download=config.download))
    table = csv_table.read(source)
    if saved is None:
        inputs, targets = _find_columns(table, config)
        frequency, standardization = None, None
    else:
        described = saved[DESCRIPTION]
        inputs, targets = ([table.find_name(name) for name in described[kind]] for kind in ("columns", "targets"))
        frequency, standardization = described["frequency"], Standardization.from_dict(described, described["columns"])
    series = time_series.series_from_table(table, config.date, inputs, fill=config.fill, frequency=frequency)
    indices = tuple(inputs.index(target) for target in targets)
    past, _, horizon = config.lengths
    split = time_series.SeriesSplit.from_series(series, config.split, past, horizon, indices, standardization)
    data = ForecastData(source, series, indices, split)
    if saved is not None and data.num_windows != (then := saved["windows"]):
        raise DataError(
            f"{source} has other windows than in training ({data.num_windows} now, {then} then), so the test may contain "
            "training data: evaluate with the file of the training"
        )
    return data


def _find_columns(table: CsvTable, config: TimeSeriesConfig) -> tuple[list[int], list[int]]:
    """Return the indices of all columns of the series, and of those to forecast."""
    date = table.find_column(config.date)
    others = [index for index in range(len(table.columns)) if index != date]
    inputs = table.find_columns(config.inputs) if config.inputs else others
    targets = (
        table.find_columns(config.targets) if config.targets else inputs if config.features == "M" else inputs[-1:]
    )
    if date in (*inputs, *targets):
        option = "inputs" if date in inputs else "targets"
        raise ConfigError(
            f"column {date + 1} ({table.columns[date]}) of {table.path} has the dates: leave it out of --{option}"
        )
    if config.features != "S":
        return [*inputs, *(index for index in targets if index not in inputs)], targets
    if config.inputs and config.targets and inputs != targets:
        raise ConfigError(
            f"features='S' forecasts a series from itself alone, and `inputs` is {config.inputs!r}: leave --inputs "
            "out, or use --features MS"
        )
    return targets, targets


def check_saved(saved: _SavedSeries, where: str) -> None:
    """Raise DataError if the entry of a run's results contradicts itself."""
    pandas = import_optional("pandas", "forecast")
    Standardization.from_dict(saved, saved["columns"])
    if (
        not saved["targets"]
        or not set(saved["targets"]) <= set(saved["columns"])
        or not 2 <= saved["marks"] <= MAX_MARKS
    ):
        fault = f"targets are {shorten(str(saved['targets']))}, columns {shorten(str(saved['columns']))}"
        raise DataError(f"{where}: series: {fault}, marks {saved['marks']}: correct it, or train a new run")
    try:
        pandas.tseries.frequencies.to_offset(saved["frequency"])
    except ValueError as error:
        frequency = shorten(saved["frequency"])
        raise DataError(f"{where}: series.frequency is {frequency!r}: correct it, or train a new run") from error


def build_model(config: TimeSeriesConfig, saved: dict[str, Any]) -> Informer:
    """Return an Informer for the data that ``saved`` describes."""
    _, label_length, horizon = config.lengths
    inputs, outputs = len(saved["columns"]), len(saved["targets"])
    return Informer(inputs, outputs, saved["marks"], label_length=label_length, horizon=horizon, size=config.size())


def build_trainer(model: Informer, config: TimeSeriesConfig, data: ForecastData, options: dict[str, Any]) -> Trainer:
    """Return the trainer of ``model`` on the windows of ``data``."""
    from torchmetrics import MeanAbsoluteError

    assert config.batch_size is not None
    return Trainer(
        model,
        time_series.loader(data.split.train, config.batch_size, shuffle=True),
        time_series.loader(data.split.validation, max(256, config.batch_size)),
        loss=mse_loss,
        metrics={"mae": MeanAbsoluteError()},
        monitor="loss",
        early_stop_patience=config.patience or None,
        **run_steps.trainer_options(config),
        **options,
    )


def test(trainer: Trainer, config: TimeSeriesConfig, data: ForecastData) -> Forecasts:
    """Forecast all windows of the test part with the model and the baselines."""
    test = data.split.test
    forecasts: dict[str, Tensor] = {"Informer": trainer.predict(time_series.loader(test, 256))}
    run_steps.check_finite(forecasts["Informer"])
    if config.baselines:
        forecasts["last value"] = baselines.last_value(test)
        if (seasonal := baselines.last_season(test, data.series.season_length())) is not None:
            forecasts["last season"] = seasonal
        forecasts["DLinear"] = baselines.dlinear(data.split, config.device, config.seed)
    standardization = data.split.standardization.select(data.targets)
    return Forecasts(forecasts, test.futures, data.target_names, standardization, original=config.inverse)


def write_results(run: RecipeRun, config: TimeSeriesConfig, data: ForecastData, results: Forecasts) -> None:
    """Write errors, forecasts and pictures into the run's folder."""
    series, test = data.series, data.split.test
    errors = {**results.headline, **results.all_errors()}
    run.write_results({"recipe": NAME, **errors, "windows": data.num_windows, DESCRIPTION: data.description})
    notes = [data.date_ranges]
    if config.baselines and "last season" not in results.forecasts:
        notes.append(f"No last season: the past of {test.past} steps is shorter than one of {series.season_length()}.")
    text = results.text(f"{series.name}, {len(test):,} test windows, horizon {config.lengths[2]}", notes)
    run.write_text("evaluation_results.txt", text)
    run.log(text)
    dates = series.dates[data.split.ends[1] - test.past :]  # from the first test window's history on
    units, every = results.standardization, slice(0, len(test), test.horizon)  # consecutive windows
    values = [
        units.inverse_transform(each[every]).flatten(0, 1) for each in (results.truth, results.forecasts["Informer"])
    ]
    path = run.folder / "forecasts.csv"
    run_steps.write_pairs(path, config.date, dates[test.past :], results.names, "forecast", *values)
    plots.plot_examples(run.plots / "forecasts.png", results, dates, test)
    plots.plot_error_by_step(run.plots / "error_by_step.png", results)
    plots.plot_error_by_column(run.plots / "error_by_column.png", results)
