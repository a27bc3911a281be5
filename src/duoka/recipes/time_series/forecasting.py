"""The task ``forecast``: the Informer on a series, measured on the paper's scale and against simpler forecasts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torchmetrics
from torch import Tensor
from torch.nn.functional import mse_loss

from duoka import Trainer, current_world, devices, load
from duoka.errors import ConfigError, DataError
from duoka.recipes.common.recipe_run import RecipeRun, folder_of, refuse_other_data, run_options
from duoka.recipes.common.registry import RecipeOutcome, Written
from duoka.recipes.datasets import csv_table, ett
from duoka.recipes.datasets.sliding_windows import loader
from duoka.recipes.datasets.standardization import Standardization
from duoka.recipes.datasets.time_series import SeriesSplit, TimeSeries, calendar_features, series_from_table
from duoka.recipes.models.informer import Informer
from duoka.recipes.time_series import baselines, plots
from duoka.recipes.time_series import results as report
from duoka.recipes.time_series.common import check_finite, next_step, predictions_of, schedule
from duoka.recipes.time_series.config import NAME, TimeSeriesConfig

__all__ = ["ForecastData", "evaluate", "predict_table", "read", "train"]


@dataclass(frozen=True)
class ForecastData:
    """A series, what of it is forecast, and its windows."""

    source: str
    """The file."""
    series: TimeSeries
    targets: tuple[int, ...]
    """Places of the forecast columns among the series' columns."""
    parts: SeriesSplit

    @property
    def names(self) -> tuple[str, ...]:
        """The forecast columns."""
        return tuple(self.series.columns[place] for place in self.targets)

    @property
    def windows(self) -> dict[str, int]:
        """How many windows each part has."""
        parts = self.parts
        return {"training": len(parts.train), "validation": len(parts.validation), "test": len(parts.test)}

    @property
    def facts(self) -> dict[str, Any]:
        """What a run remembers of its data: a file of other rows or values differs in one of these."""
        scaling = self.parts.standardization
        windows = ", ".join(f"{count:,} {part}" for part, count in self.windows.items())
        return {
            "windows are": windows,
            "parts are": self.spans,
            "means are": scaling.mean,
            "deviations are": scaling.std,
        }

    @property
    def spans(self) -> str:
        """Say from when to when each part lasts."""
        parts, dates = self.parts, self.series.dates
        first_test = parts.test_start + parts.test.past
        ends = len(parts.train.values), first_test, parts.test_start + len(parts.test.values)
        begins = 0, ends[0], first_test
        words = zip(("training", "validation", "test"), begins, ends, strict=True)
        return "; ".join(f"{part}: {dates[begin]} to {dates[end - 1]}" for part, begin, end in words)


def train(config: TimeSeriesConfig) -> RecipeOutcome:
    """Train, test, and write the run's folder."""
    devices.resolve(config.device)  # a device that is not there is said before any download
    data = read(config)
    run = folder_of(NAME, config, config.device)
    if config.resume:
        refuse_other_data(run, data.facts, data.source)
    torch.manual_seed(config.seed)
    model = _model(config, len(data.series.columns), len(data.targets), data.parts.test.marks.shape[1])
    trainer = _trainer(model, config, data, run_options(run, NAME, config, data.facts))
    with run.resumable(NAME):
        trainer.fit(save_model=True, model_path=run.model)
        results = _tested(trainer, config, data)
        if current_world().is_main:
            _write(run, config, data, results)
    return RecipeOutcome(run, _headline(config, results), next_step(run, data.source))


def evaluate(run: RecipeRun, config: TimeSeriesConfig) -> RecipeOutcome:
    """Test the model of a finished run again."""
    path, results = run.finished_model(), run.read_results("series", "windows")
    remembered = results["series"]
    data = read(config, remembered)
    if data.windows != results["windows"]:
        raise DataError(
            f"{data.source} has other windows than when the run was trained ({data.windows} now, then {results['windows']}), "
            "some of which may have been learnt from: evaluate with the file of the training"
        )
    model = _model(config, len(remembered["columns"]), len(remembered["targets"]), remembered["marks"])
    load(path, into=model)
    tested = _tested(_trainer(model, config, data, {}), dataclasses.replace(config, baselines=False), data)
    headline = _headline(config, tested)
    if current_world().is_main:
        run.write_results(headline, "evaluation.json")
    return RecipeOutcome(run, headline, next_step(run, data.source))


def predict_table(run: RecipeRun, config: TimeSeriesConfig, source: str) -> Written:
    """Forecast beyond the end of a file with the columns and the step of the one that was trained on."""
    path, remembered = run.finished_model(), run.read_results("series")["series"]
    contents = csv_table.read(source)
    places = [contents.find_name(name) for name in remembered["columns"]]
    series = series_from_table(contents, config.date, places, fill=config.fill, frequency=remembered["frequency"])
    past, _, horizon = config.lengths
    if len(series) < past:
        raise DataError(
            f"{source} has {len(series):,} rows, and the model looks at the last {past:,} (seq_len): give a longer file"
        )
    if series.frequency != remembered["frequency"]:
        raise DataError(
            f"{source} has a row every {series.frequency}, and the model was trained on a row every {remembered['frequency']}: "
            "give a file with that step"
        )
    model = _model(config, len(places), len(remembered["targets"]), remembered["marks"])
    load(path, into=model)
    scaling = Standardization(tuple(remembered["mean"]), tuple(remembered["std"]))
    dates = series.future_dates(horizon)
    marks = calendar_features(series.dates[-past:].append(dates), series.step_s)
    device = devices.resolve(config.device).devices[0]
    model.to(device).eval()
    with torch.inference_mode():
        forecast = model(scaling.transform(series.values[-past:])[None].to(device), marks[None].to(device))[0].cpu()
    check_finite(forecast)
    targets = [remembered["columns"].index(name) for name in remembered["targets"]]
    forecast = scaling.select(targets).inverse_transform(forecast)
    written = predictions_of(run, source, ".csv"), predictions_of(run, source, ".png")
    rows = [[str(date), *values] for date, values in zip(dates, forecast.tolist(), strict=True)]
    csv_table.write(written[0], [contents.columns[contents.find_column(config.date)], *remembered["targets"]], rows)
    plots.beyond(written[1], series, targets, dates, forecast, history=max(past, 3 * horizon))
    return Written(written, f"{horizon} steps from {dates[0]} to {dates[-1]}")


def read(config: TimeSeriesConfig, remembered: dict[str, Any] | None = None) -> ForecastData:
    """Return the series that ``config`` names, cut into windows.

    Args:
        config: the options.
        remembered: what a finished run knows of its series, whose columns and scaling are taken then.

    Raises:
        ConfigError: columns that are not there or do not go together.
        DataError: a file that is no regular series, or is too short.

    """
    source = config.csv or str(ett.locate(config.dataset, config.root, download=config.download))
    contents = csv_table.read(source)
    if remembered is None:
        inputs, targets = _columns(contents, config)
    else:
        inputs, targets = ([contents.find_name(name) for name in remembered[kind]] for kind in ("columns", "targets"))
    frequency, scaling = None, None
    if remembered is not None:
        frequency, scaling = (
            remembered["frequency"],
            Standardization(tuple(remembered["mean"]), tuple(remembered["std"])),
        )
    series = series_from_table(contents, config.date, inputs, fill=config.fill, frequency=frequency)
    places = tuple(inputs.index(place) for place in targets)
    past, _, horizon = config.lengths
    return ForecastData(
        source, series, places, SeriesSplit.from_series(series, config.split, past, horizon, places, scaling)
    )


def _columns(contents: csv_table.CsvTable, config: TimeSeriesConfig) -> tuple[list[int], list[int]]:
    """Return the places of the columns to learn from, those to forecast among them, and of those."""
    date = contents.find_column(config.date)
    others = [place for place in range(len(contents.columns)) if place != date]
    inputs = contents.find_columns(config.inputs) if config.inputs else others
    targets = (
        contents.find_columns(config.targets) if config.targets else inputs if config.features == "M" else inputs[-1:]
    )
    if date in (*inputs, *targets):
        option = "inputs" if date in inputs else "targets"
        raise ConfigError(
            f"column {date + 1} ({contents.columns[date]}) of {contents.path} has the dates: leave it out of --{option}"
        )
    if config.features != "S":
        return [*inputs, *(place for place in targets if place not in inputs)], targets
    if config.inputs and config.targets and inputs != targets:
        raise ConfigError(
            f"`features` is S, which forecasts series from themselves alone, and `inputs` is {config.inputs!r}: leave --inputs "
            "out, or use --features MS"
        )
    return targets, targets


def _model(config: TimeSeriesConfig, inputs: int, outputs: int, marks: int) -> Informer:
    _, start, horizon = config.lengths
    return Informer(inputs, outputs, marks, label_length=start, horizon=horizon, size=config.size())


def _trainer(model: Informer, config: TimeSeriesConfig, data: ForecastData, options: dict[str, Any]) -> Trainer:
    assert config.batch_size is not None
    return Trainer(
        model,
        loader(data.parts.train, config.batch_size, shuffle=True),
        loader(data.parts.validation, max(256, config.batch_size)),
        loss=mse_loss,
        metrics={"mae": torchmetrics.MeanAbsoluteError()},
        device=config.device,
        batch_size_means=config.batch_size_means,
        precision=config.precision,
        epochs=config.epochs,
        optimizer=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        monitor="loss",
        early_stop_patience=config.patience or None,
        seed=config.seed,
        **schedule(config),
        **options,
    )


def _tested(trainer: Trainer, config: TimeSeriesConfig, data: ForecastData) -> report.Forecasts:
    """Forecast all windows of the test part, with the model and with what it is measured against."""
    test = data.parts.test
    forecasts: dict[str, Tensor] = {"Informer": trainer.predict(loader(test, 256))}
    check_finite(forecasts["Informer"])
    if config.baselines:
        forecasts["last value"] = baselines.last_value(test)
        if (seasonal := baselines.last_season(test, data.series.season_length())) is not None:
            forecasts["last season"] = seasonal
        forecasts["DLinear"] = baselines.dlinear(data.parts, config.device, config.seed)
    return report.Forecasts(forecasts, test.futures, data.names, data.parts.standardization.select(data.targets))


def _headline(config: TimeSeriesConfig, results: report.Forecasts) -> dict[str, float]:
    """Return the numbers that are printed."""
    found: dict[str, float] = {}
    for name in results.forecasts:
        errors = results.errors(name, original=config.inverse)
        prefix = "test" if name == "Informer" else name.lower().replace(" ", "_")
        found |= {f"{prefix}_mse": errors["mse"], f"{prefix}_mae": errors["mae"]}
    return found


def _write(run: RecipeRun, config: TimeSeriesConfig, data: ForecastData, results: report.Forecasts) -> None:
    """Write numbers, forecasts and pictures into the run's folder."""
    series, scaling = data.series, data.parts.standardization
    remembered = {
        "source": data.source,
        "columns": series.columns,
        "targets": data.names,
        "frequency": series.frequency,
        "marks": data.parts.test.marks.shape[1],
        "mean": scaling.mean,
        "std": scaling.std,
    }
    parts = data.parts
    numbers = {
        "recipe": NAME,
        **_headline(config, results),
        **results.numbers(),
        "windows": data.windows,
        "series": remembered,
    }
    run.write_results(numbers)
    notes = [data.spans]
    if config.baselines and "last season" not in results.forecasts:
        notes.append(
            f"No last season: the past of {parts.test.past} steps is shorter than one of {series.season_length()}."
        )
    text = results.text(f"{series.name}, {len(parts.test):,} test windows, horizon {config.lengths[2]}", notes)
    run.write_text("evaluation_results.txt", text)
    run.log(text)
    dates = series.dates[parts.test_start :]
    report.write_forecasts(run.folder / "forecasts.csv", results, dates, parts.test, config.date)
    plots.examples(run.plots / "forecasts.png", results, dates, parts)
    plots.by_step(run.plots / "error_by_step.png", results)
    plots.by_column(run.plots / "error_by_column.png", results)
