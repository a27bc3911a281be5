"""The task ``regress``: columns of a table predicted from other columns of the same row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from duoka import Trainer, current_world, devices, load
from duoka.errors import ConfigError, DataError
from duoka.log import logger
from duoka.recipes.common.recipe_run import RecipeRun, folder_of, refuse_other_data, run_options
from duoka.recipes.common.registry import RecipeOutcome, Written
from duoka.recipes.datasets import csv_table
from duoka.recipes.datasets.standardization import Standardization
from duoka.recipes.models.tabular_regressor import TabularRegressor
from duoka.recipes.time_series import plots
from duoka.recipes.time_series.common import check_finite, file_names, next_step, predictions_of, schedule
from duoka.recipes.time_series.config import NAME, TimeSeriesConfig

__all__ = ["TableRows", "evaluate", "measures", "predict_table", "read", "train"]

TRAIN_ROWS, TRAIN_SHARE, TARGETS = 10_000, 0.8, 2
EVALUATIONS = 30
"""How often the test rows are evaluated during training, for the curves."""


@dataclass(frozen=True)
class TableRows:
    """A table in two parts, standardised by its training rows."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    train: TensorDataset
    test: TensorDataset
    scaling: tuple[Standardization, Standardization]
    """Of inputs and of targets."""
    test_lines: tuple[int, ...]
    """Where the test rows stand in the file."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a run remembers of its data: a file of other rows or values differs in one of these."""
        counts = f"{len(self.train):,} for training, {len(self.test):,} for the test"
        means, deviations = (
            [value for scaling in self.scaling for value in getattr(scaling, name)] for name in ("mean", "std")
        )
        return {"rows are": counts, "means are": means, "deviations are": deviations}

    @property
    def truth(self) -> Tensor:
        """The test rows' targets in their units, float64 ``(rows, targets)``."""
        return self.scaling[1].inverse_transform(self.test.tensors[1])


def train(config: TimeSeriesConfig) -> RecipeOutcome:
    """Train, test, and write the run's folder."""
    devices.resolve(config.device)
    rows = read(config)
    run = folder_of(NAME, config, config.device)
    if config.resume:
        refuse_other_data(run, rows.facts, str(config.csv))
    torch.manual_seed(config.seed)
    model = TabularRegressor(len(rows.inputs), len(rows.targets), config.size())
    trainer = _trainer(model, config, rows, run_options(run, NAME, config, rows.facts))
    with run.resumable(NAME):
        trainer.fit(save_model=True, model_path=run.model)
        predicted = _predicted(trainer, rows)
        found = measures(rows.truth, predicted, rows.targets)
        if current_world().is_main:
            _write(run, rows, predicted, found)
    assert config.csv is not None
    return RecipeOutcome(run, _headline(found), next_step(run, config.csv))


def evaluate(run: RecipeRun, config: TimeSeriesConfig) -> RecipeOutcome:
    """Test the model of a finished run again."""
    model, remembered = _finished(run, config)
    rows = read(config, remembered)
    found = measures(rows.truth, _predicted(_trainer(model, config, rows, {}), rows), rows.targets)
    if current_world().is_main:
        run.write_results(found, "evaluation.json")
    assert config.csv is not None
    return RecipeOutcome(run, _headline(found), next_step(run, config.csv))


def predict_table(run: RecipeRun, config: TimeSeriesConfig, source: str) -> Written:
    """Predict the targets of each row of a file that has the columns that were learnt from."""
    model, remembered = _finished(run, config)
    contents = csv_table.read(source)
    values = contents.numbers([contents.find_name(name) for name in remembered["inputs"]], fill=config.fill)
    scaling, of_targets = _scaling(remembered)
    device = devices.resolve(config.device).devices[0]
    model.to(device).eval()
    with torch.inference_mode():
        parts = [model(part.to(device)).cpu() for part in torch.split(scaling.transform(values), 4096)]
    predicted = of_targets.inverse_transform(torch.cat(parts))
    check_finite(predicted)
    targets: list[str] = remembered["targets"]
    written = [predictions_of(run, source, ".csv")]
    rows = [[line, *row] for line, row in zip(contents.lines, predicted.tolist(), strict=True)]
    csv_table.write(written[0], ["line", *targets], rows)
    for place, (name, file) in enumerate(zip(targets, file_names(targets), strict=True)):
        if (truth := _known(contents, name)) is not None:
            written.append(predictions_of(run, source, f"-{file}.png"))
            plots.lines(written[-1], truth, predicted[:, place], name, rows="row")
    return Written(tuple(written), f"{len(predicted):,} row{'' if len(predicted) == 1 else 's'}")


def _known(contents: csv_table.CsvTable, name: str) -> Tensor | None:
    """Return the column ``name`` of a file to predict, if it is there and complete: what comes is often not known yet."""
    if name not in contents.columns:
        return None
    try:
        return contents.numbers([contents.find_name(name)])[:, 0]
    except DataError as error:
        logger.info("no picture of %s: %s", name, error)
        return None


def read(config: TimeSeriesConfig, remembered: dict[str, Any] | None = None) -> TableRows:
    """Return the table that ``config`` names, drawn into training and test rows.

    Args:
        config: the options.
        remembered: what a finished run knows of its table, whose columns and scaling are taken then.

    Raises:
        ConfigError: columns that are not there or do not go together.
        DataError: cells that are no numbers, too few rows, targets that never change, other rows than ``remembered``.

    """
    assert config.csv is not None
    contents = csv_table.read(config.csv)
    if remembered is None:
        inputs, targets = _columns(contents, config)
    else:
        inputs, targets = ([contents.find_name(name) for name in remembered[kind]] for kind in ("inputs", "targets"))
        if len(contents) != remembered["rows"]:
            raise DataError(
                f"{config.csv} has {len(contents):,} rows and had {remembered['rows']:,} when the run was trained, so that its "
                "test rows are not known any more: evaluate with the file of the training"
            )
    values = contents.numbers([*inputs, *targets], fill=config.fill)
    train, test = _split(config, len(values))
    names = [contents.columns[place] for place in (*inputs, *targets)]
    for rows, kind in ((train, "training"), (test, "test")):
        _check_targets(contents, values[rows][:, len(inputs) :], names[len(inputs) :], kind)
    scaling = Standardization.fit(values[train], names)
    of_inputs, of_targets = scaling.select(range(len(inputs))), scaling.select(range(len(inputs), len(names)))
    if remembered is not None:
        of_inputs, of_targets = _scaling(remembered)
    parts = [
        TensorDataset(
            of_inputs.transform(values[part, : len(inputs)]), of_targets.transform(values[part, len(inputs) :])
        )
        for part in (train, test)
    ]
    lines = tuple(contents.lines[row] for row in test.tolist())
    return TableRows(
        tuple(names[: len(inputs)]), tuple(names[len(inputs) :]), parts[0], parts[1], (of_inputs, of_targets), lines
    )


def _columns(contents: csv_table.CsvTable, config: TimeSeriesConfig) -> tuple[list[int], list[int]]:
    """Return the places of the columns to learn from and of those to predict."""
    width = len(contents.columns)
    if not config.targets and width <= TARGETS:
        raise ConfigError(
            f"{config.csv} has {width} columns; the last {TARGETS} would be the targets: name them with --targets"
        )
    targets = contents.find_columns(config.targets) if config.targets else list(range(width - TARGETS, width))
    inputs = (
        contents.find_columns(config.inputs)
        if config.inputs
        else [place for place in range(width) if place not in targets]
    )
    if both := [contents.columns[place] for place in inputs if place in targets]:
        raise ConfigError(f"both among inputs and targets: {csv_table.join_first(both)}: leave each out of one of them")
    if not inputs:
        raise ConfigError(f"every column of {config.csv} is a target: leave some to learn from")
    return inputs, targets


def measures(truth: Tensor, predicted: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Return R², RMSE, MAE and the relative L2 error ``|predicted - true| / |true|`` of each target, and of all.

    Over all, R² is the mean of the targets', the others are those of all values together.

    Args:
        truth: in the targets' units, ``(rows, targets)``.
        predicted: likewise.
        names: the targets'.

    """
    error = predicted - truth
    r2 = 1 - error.square().sum(0) / (truth - truth.mean(0)).square().sum(0)
    found = {
        name: {
            "r2": float(r2[place]),
            "rmse": float(error[:, place].square().mean().sqrt()),
            "mae": float(error[:, place].abs().mean()),
            "l2": float(error[:, place].norm() / truth[:, place].norm()),
        }
        for place, name in enumerate(names)
    }
    overall = {"rmse": error.square().mean().sqrt(), "mae": error.abs().mean(), "l2": error.norm() / truth.norm()}
    return {
        "overall": {"r2": float(r2.mean()), **{key: float(value) for key, value in overall.items()}},
        "targets": found,
    }


def _split(config: TimeSeriesConfig, count: int) -> tuple[Tensor, Tensor]:
    """Return the places of training and test rows, each in the order of the file."""
    share = TRAIN_ROWS if count > TRAIN_ROWS else int(TRAIN_SHARE * count)
    wanted = share if config.train_rows is None else config.train_rows
    if not 2 <= wanted <= count - 2:
        raise DataError(
            f"{config.csv} has {count:,} rows, {wanted:,} of them for training: at least 2 are needed for training and 2 for "
            "the test: use more rows, or another --train_rows"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.split_seed))
    return order[:wanted].sort().values, order[wanted:].sort().values


def _check_targets(contents: csv_table.CsvTable, values: Tensor, names: list[str], rows: str) -> None:
    """Refuse a target that never changes: there is nothing to learn, or no R² to measure."""
    for column, name in zip(values.unbind(1), names, strict=True):
        if bool((column == column[0]).all()):
            place = contents.columns.index(name) + 1
            raise DataError(
                f"{contents.path}, column {place} ({name}): {float(column[0]):g} in every {rows} row, so there is nothing to "
                "predict: choose other --targets, or divide the rows otherwise with --split_seed or --train_rows"
            )


def _trainer(model: TabularRegressor, config: TimeSeriesConfig, rows: TableRows, options: dict[str, Any]) -> Trainer:
    assert config.epochs is not None
    return Trainer(
        model,
        DataLoader(rows.train, batch_size=config.batch_size, shuffle=True),
        DataLoader(rows.test, batch_size=4096),
        loss=mse_loss,
        device=config.device,
        batch_size_means=config.batch_size_means,
        precision=config.precision,
        epochs=config.epochs,
        eval_every_epochs=max(1, config.epochs // EVALUATIONS),
        optimizer=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        seed=config.seed,
        **schedule(config),
        **options,
    )


def _predicted(trainer: Trainer, rows: TableRows) -> Tensor:
    """Return the test rows' predictions in the targets' units, float64 ``(rows, targets)``."""
    predicted = rows.scaling[1].inverse_transform(trainer.predict(DataLoader(rows.test, batch_size=4096)))
    check_finite(predicted)
    return predicted


def _headline(found: dict[str, Any]) -> dict[str, float]:
    overall = {f"test_{key}": value for key, value in found["overall"].items()}
    return {**overall, **{f"{name} r2": values["r2"] for name, values in found["targets"].items()}}


def _write(run: RecipeRun, rows: TableRows, predicted: Tensor, found: dict[str, Any]) -> None:
    """Write numbers, predictions and pictures into the run's folder."""
    scaling = dict(zip(("of_inputs", "of_targets"), map(dataclasses.asdict, rows.scaling), strict=True))
    count = len(rows.train) + len(rows.test)
    remembered = {"inputs": rows.inputs, "targets": rows.targets, "rows": count, **scaling}
    run.write_results({"recipe": NAME, **found, "table": remembered})
    text = _text(found, len(predicted))
    run.write_text("evaluation_results.txt", text)
    run.log(text)
    truth = rows.truth
    header = ["line", *(f"{name}{kind}" for name in rows.targets for kind in ("", " predicted"))]
    pairs = torch.stack((truth, predicted), dim=2).flatten(1).tolist()
    csv_table.write(
        run.folder / "predictions.csv", header, [[line, *row] for line, row in zip(rows.test_lines, pairs, strict=True)]
    )
    for place, (name, file) in enumerate(zip(rows.targets, file_names(rows.targets), strict=True)):
        plots.lines(run.plots / f"lines_{file}.png", truth[:, place], predicted[:, place], name)
        plots.scatter(
            run.plots / f"scatter_{file}.png", truth[:, place], predicted[:, place], name, found["targets"][name]["r2"]
        )
    plots.residuals(run.plots / "residuals.png", predicted - truth, rows.targets)


def _text(found: dict[str, Any], count: int) -> str:
    width = max(10, *(len(name) + 2 for name in found["targets"]))
    lines = [f"{count:,} test rows, in the targets' own units; L2 is relative to the targets' own length", ""]
    lines.append(f"{'':{width}}{'R²':>10}{'RMSE':>12}{'MAE':>12}{'L2 error':>12}")
    for name, row in {**found["targets"], "overall": found["overall"]}.items():
        lines.append(f"{name:{width}}{row['r2']:10.4f}{row['rmse']:12.5g}{row['mae']:12.5g}{row['l2']:12.5g}")
    if len(found["targets"]) > 1:
        lines += [
            "",
            "overall: the mean of the targets' R²; RMSE, MAE and L2 error over all values, whatever their units",
        ]
    return "\n".join(lines) + "\n"


def _finished(run: RecipeRun, config: TimeSeriesConfig) -> tuple[TabularRegressor, dict[str, Any]]:
    """Return the trained model of a run and what it remembers of its table."""
    path, remembered = run.finished_model(), run.read_results("table")["table"]
    model = TabularRegressor(len(remembered["inputs"]), len(remembered["targets"]), config.size())
    load(path, into=model)
    return model, remembered


def _scaling(remembered: dict[str, Any]) -> tuple[Standardization, Standardization]:
    """Return the scaling of inputs and of targets that a run remembers."""
    inputs, targets = (
        Standardization(*(tuple(remembered[part][key]) for key in ("mean", "std")))
        for part in ("of_inputs", "of_targets")
    )
    return inputs, targets
