"""Task ``regress``: columns of a table predicted from other columns of the same row."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Final, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from duoka import Trainer
from duoka.errors import ConfigError, DataError
from duoka.log import logger
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.common.registry import PredictedTable
from duoka.recipes.datasets import csv_table
from duoka.recipes.datasets.csv_table import CsvTable, SavedStandardization, Standardization
from duoka.recipes.models.informer import TabularRegressor
from duoka.recipes.time_series import plots, run_steps
from duoka.recipes.time_series.config import NAME, TimeSeriesConfig
from duoka.utils.files import safe_names
from duoka.utils.text import plural

DESCRIPTION: Final = "table"
"""Entry of ``results.json`` that describes the data."""
TRAIN_ROWS, TRAIN_SHARE, NUM_TARGETS = 10_000, 0.8, 2
"""Defaults: training rows of a long table, their share of a short one, and the last columns that are targets."""
EVALUATIONS = 30
"""Evaluations of the test rows during training, for the curves."""


class _SavedTable(TypedDict):
    """Entry ``table`` of ``results.json``."""

    inputs: list[str]
    targets: list[str]
    rows: int
    of_inputs: SavedStandardization
    of_targets: SavedStandardization


class SavedTableResults(TypedDict):
    """What a finished run's ``results.json`` must have."""

    table: _SavedTable


RESULTS_FORM = SavedTableResults


@dataclass(frozen=True)
class TableRows:
    """Training and test rows of a table, standardized by the training rows."""

    source: str
    """The file."""
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    train: TensorDataset
    test: TensorDataset
    of_inputs: Standardization
    of_targets: Standardization
    test_lines: tuple[int, ...]
    """Lines of the test rows in the file."""

    @property
    def metadata(self) -> dict[str, Any]:
        """Values that distinguish these data from a file with other rows or values."""
        return {
            "rows are": f"{len(self.train):,} for training, {len(self.test):,} for the test",
            "means are": [*self.of_inputs.mean, *self.of_targets.mean],
            "deviations are": [*self.of_inputs.std, *self.of_targets.std],
        }

    @property
    def description(self) -> dict[str, Any]:
        """Values that ``results.json`` keeps, from which a finished run's model and data are built again."""
        standardizations = {key: dataclasses.asdict(getattr(self, key)) for key in ("of_inputs", "of_targets")}
        rows = len(self.train) + len(self.test)
        return {"inputs": self.inputs, "targets": self.targets, "rows": rows, **standardizations}

    @property
    def truth(self) -> Tensor:
        """The targets of the test rows in their units, float64 ``(rows, targets)``."""
        return self.of_targets.inverse_transform(self.test.tensors[1])


@dataclass(frozen=True)
class TableResults:
    """Predictions of the test rows, and their metrics."""

    predicted: Tensor
    """In the targets' units, float64 ``(rows, targets)``."""
    summary: dict[str, Any]
    """Content of ``evaluation.json``: what ``regression_metrics`` returns."""

    @property
    def headline(self) -> dict[str, float]:
        """The numbers to print."""
        overall = {f"test_{key}": value for key, value in self.summary["overall"].items()}
        return overall | {f"{name} r2": values["r2"] for name, values in self.summary["targets"].items()}


def predict_table(
    run: RecipeRun, config: TimeSeriesConfig, model: TabularRegressor, saved: _SavedTable, source: str
) -> PredictedTable:
    """Predict the targets of each row of a file that has the input columns of the training, which ``saved`` describes."""
    table = csv_table.read(source)
    values = table.numbers([table.find_name(name) for name in saved["inputs"]], fill=config.fill)
    of_inputs, of_targets = _standardizations(saved)
    predicted = of_targets.inverse_transform(run_steps.predict_on_device(model, config, of_inputs.transform(values)))
    targets = saved["targets"]
    written = [run_steps.prediction_path(run, source, ".csv")]
    rows = [[line, *row] for line, row in zip(table.lines, predicted.tolist(), strict=True)]
    csv_table.write(written[0], ["line", *targets], rows)
    for column, (name, stem) in enumerate(zip(targets, safe_names(targets), strict=True)):
        if name not in table.columns:
            continue
        try:
            truth = table.numbers([table.find_name(name)])[:, 0]
        except DataError as error:  # the true values are not complete
            logger.info("no picture of %s: %s", name, error)
            continue
        written.append(run_steps.prediction_path(run, source, f"-{stem}.png"))
        plots.plot_lines(written[-1], truth, predicted[:, column], name, rows="row")
    return PredictedTable(tuple(written), plural(len(predicted), "row"))


def load(config: TimeSeriesConfig, saved: SavedTableResults | None = None) -> TableRows:
    """Return the table that ``config`` names, split at random into training and test rows.

    ``saved`` is the results of a finished run, whose columns and standardization are used.
    """
    assert config.csv is not None
    table = csv_table.read(config.csv)
    described = None if saved is None else saved[DESCRIPTION]
    if described is None:
        inputs, targets = _find_columns(table, config)
    else:
        inputs, targets = ([table.find_name(name) for name in described[kind]] for kind in ("inputs", "targets"))
        if len(table) != described["rows"]:
            raise DataError(
                f"{config.csv} has {len(table):,} rows, and {described['rows']:,} in training, so its test rows are not known: "
                "evaluate with the file of the training"
            )
    values = table.numbers([*inputs, *targets], fill=config.fill)
    x, y = values[:, : len(inputs)], values[:, len(inputs) :]
    train, test = _split_rows(config, len(table))
    input_names, target_names = (tuple(table.columns[index] for index in indices) for indices in (inputs, targets))
    for rows, part in ((train, "training"), (test, "test")):
        _check_targets(table, y[rows], target_names, part)
    if described is None:
        of_inputs, of_targets = Standardization.fit(x[train], input_names), Standardization.fit(y[train], target_names)
    else:
        of_inputs, of_targets = _standardizations(described)
    x, y = of_inputs.transform(x), of_targets.transform(y)
    parts = TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])
    lines = tuple(table.lines[row] for row in test.tolist())
    return TableRows(config.csv, input_names, target_names, *parts, of_inputs, of_targets, lines)


def _find_columns(table: CsvTable, config: TimeSeriesConfig) -> tuple[list[int], list[int]]:
    width = len(table.columns)
    if not config.targets and width <= NUM_TARGETS:
        raise ConfigError(
            f"{config.csv} has {width} columns; the last {NUM_TARGETS} would be the targets: name them with --targets"
        )
    targets = table.find_columns(config.targets) if config.targets else list(range(width - NUM_TARGETS, width))
    others = [index for index in range(width) if index not in targets]
    inputs = table.find_columns(config.inputs) if config.inputs else others
    if both := [table.columns[index] for index in inputs if index in targets]:
        raise ConfigError(f"both among inputs and targets: {csv_table.join_first(both)}: leave each out of one of them")
    if not inputs:
        raise ConfigError(f"every column of {config.csv} is a target: leave some to learn from")
    return inputs, targets


def regression_metrics(truth: Tensor, predicted: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Return R², RMSE, MAE and the relative L2 error ``|predicted - true| / |true|`` of each target and overall.

    Values are ``(rows, targets)``. The overall R² is the mean over targets; the other overall metrics are of all values.
    """
    error = predicted - truth
    r2 = 1 - error.square().sum(0) / (truth - truth.mean(0)).square().sum(0)

    def metrics(r2: Tensor, error: Tensor, truth: Tensor) -> dict[str, float]:
        values = {
            "r2": r2.mean(),
            "rmse": error.square().mean().sqrt(),
            "mae": error.abs().mean(),
            "l2": error.norm() / truth.norm(),
        }
        return {name: float(value) for name, value in values.items()}

    columns = zip(names, r2, error.unbind(1), truth.unbind(1), strict=True)
    return {"overall": metrics(r2, error, truth), "targets": {name: metrics(*column) for name, *column in columns}}


def _split_rows(config: TimeSeriesConfig, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices of training and test rows, each in the order of the file."""
    default = TRAIN_ROWS if count > TRAIN_ROWS else int(TRAIN_SHARE * count)
    num_train = default if config.train_rows is None else config.train_rows
    if not 2 <= num_train <= count - 2:
        raise DataError(
            f"{config.csv} has {count:,} rows, {num_train:,} of them for training: at least 2 are needed for training and 2 "
            "for the test: use more rows, or another --train_rows"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.split_seed))
    return order[:num_train].sort().values, order[num_train:].sort().values


def _check_targets(table: CsvTable, values: Tensor, names: tuple[str, ...], part: str) -> None:
    """Raise for a constant target, which has no R²."""
    for column, name in zip(values.unbind(1), names, strict=True):
        if bool((column == column[0]).all()):
            number = table.columns.index(name) + 1
            raise DataError(
                f"{table.path}, column {number} ({name}): {float(column[0]):g} in every {part} row, so there is nothing to "
                "predict: choose other --targets, or another split with --split_seed or --train_rows"
            )


def check_saved(saved: _SavedTable, where: str) -> None:
    """Raise DataError if the entry of a run's results contradicts itself."""
    _standardizations(saved)
    if not saved["inputs"] or not saved["targets"] or len({*saved["inputs"], *saved["targets"]}) < 2:
        raise DataError(f"{where}: table: it names no inputs or no targets: correct it, or train a new run")


def _standardizations(saved: _SavedTable) -> tuple[Standardization, Standardization]:
    """Return the statistics of inputs and targets in a run's results."""
    of_inputs = Standardization.from_dict(saved["of_inputs"], saved["inputs"])
    return of_inputs, Standardization.from_dict(saved["of_targets"], saved["targets"])


def build_model(config: TimeSeriesConfig, saved: dict[str, Any]) -> TabularRegressor:
    """Return a model for the table that ``saved`` describes."""
    return TabularRegressor(len(saved["inputs"]), len(saved["targets"]), config.size())


def build_trainer(
    model: TabularRegressor, config: TimeSeriesConfig, rows: TableRows, options: dict[str, Any]
) -> Trainer:
    """Return the trainer of ``model`` on the training rows."""
    assert config.epochs is not None
    return Trainer(
        model,
        DataLoader(rows.train, batch_size=config.batch_size, shuffle=True),
        DataLoader(rows.test, batch_size=run_steps.PREDICT_BATCH),
        loss=mse_loss,
        eval_every_epochs=max(1, config.epochs // EVALUATIONS),
        **run_steps.trainer_options(config),
        **options,
    )


def test(trainer: Trainer, config: TimeSeriesConfig, rows: TableRows) -> TableResults:  # noqa: ARG001
    """Predict the test rows."""
    standardized = trainer.predict(DataLoader(rows.test, batch_size=run_steps.PREDICT_BATCH))
    predicted = rows.of_targets.inverse_transform(standardized)
    run_steps.check_finite(predicted)
    return TableResults(predicted, regression_metrics(rows.truth, predicted, rows.targets))


def write_results(run: RecipeRun, config: TimeSeriesConfig, rows: TableRows, results: TableResults) -> None:  # noqa: ARG001
    """Write metrics, predictions and pictures into the run's folder."""
    predicted, metrics = results.predicted, results.summary
    run.write_results({"recipe": NAME, **metrics, DESCRIPTION: rows.description})
    text = _report(metrics, len(predicted))
    run.write_text("evaluation_results.txt", text)
    run.log(text)
    truth = rows.truth
    path = run.folder / "predictions.csv"
    run_steps.write_pairs(path, "line", rows.test_lines, rows.targets, "predicted", truth, predicted)
    for column, (name, stem) in enumerate(zip(rows.targets, safe_names(rows.targets), strict=True)):
        true, found, r2 = truth[:, column], predicted[:, column], metrics["targets"][name]["r2"]
        plots.plot_lines(run.plots / f"lines_{stem}.png", true, found, name)
        plots.plot_scatter(run.plots / f"scatter_{stem}.png", true, found, name, r2)
    plots.plot_residuals(run.plots / "residuals.png", predicted - truth, rows.targets)


def _report(metrics: dict[str, Any], count: int) -> str:
    width = max(10, *(len(name) + 2 for name in metrics["targets"]))
    lines = [f"{count:,} test rows, in the targets' units; the L2 error is relative to the norm of the target", ""]
    lines.append(f"{'':{width}}{'R²':>10}{'RMSE':>12}{'MAE':>12}{'L2 error':>12}")
    for name, row in {**metrics["targets"], "overall": metrics["overall"]}.items():
        lines.append(f"{name:{width}}{row['r2']:10.4f}{row['rmse']:12.5g}{row['mae']:12.5g}{row['l2']:12.5g}")
    if len(metrics["targets"]) > 1:
        lines += ["", "overall: the mean R² of the targets; RMSE, MAE and L2 error of all values, whatever their units"]
    return "\n".join(lines) + "\n"
